"""Downloads a policy, or a tokenizer, from the Hugging Face hub into the hub's own cache: `download`, or as a process.

Only safetensors, JSON and tokenizer files are fetched, never pickles or code, and each is compared with the size and
the hash that the hub lists. What the hub says is as foreign as any file.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dsrl_async.config.files import how_to_install
from dsrl_async.config.hub import HubName, cache, endpoint
from dsrl_async.host.processes import prepare_child
from dsrl_async.pi0.config import NORM_STATS
from dsrl_async.pi0.foreign import PICKLES, check_directory
from dsrl_async.pi0.tokenizer import TOKENIZER_NAMES
from dsrl_async.run.preflight.hub import complete, write_record
from dsrl_async.untrusted import MEGABYTE, in_one_line, shown

MOST_FILES = 10_000
"""A model of more files than that is none of a policy."""
LARGEST_SMALL_FILE = 64 * MEGABYTE
"""Of a file that holds no weights; larger ones are not needed and not fetched."""
UNREACHABLE = {"ConnectionError", "ConnectError", "TimeoutException", "Timeout", "TransportError", "TimeoutError"}
"""Names of the exceptions of any HTTP library for a server that does not answer; the hub's versions use several."""


BROKEN_OFF = {"ChunkedEncodingError", "RemoteProtocolError", "ReadError", "ReadTimeout", "ProtocolError"}
"""Likewise, for an answer that ended too early. Some versions of the hub's library then go on by themselves, others do
when they are asked again."""
TRIES, PAUSE_S = 5, 1.0


class ListedFile(NamedTuple):
    """A file as the hub lists it."""

    bytes: int
    sha256: str | None
    """Of its content, if it is kept in the hub's large file storage."""
    git_sha1: str
    """Git's hash of it; for a file in large file storage, of the pointer to it."""


def download(name: HubName, setting: str) -> HubName:
    """Fetch the files that a setting of `policy` needs into the cache; returns the name with its commit.

    Raises ValueError, with one sentence, when they cannot be had.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(f"{name} is no directory here; to have it from the hub: {how_to_install('hub')}") from None
    if any(os.environ.get(variable, "").upper() in ("1", "TRUE", "YES", "ON") for variable in OFFLINE):
        raise ValueError(_unreachable(name, setting, f"{' or '.join(OFFLINE)} forbids it"))
    api = huggingface_hub.HfApi(endpoint=endpoint())
    with _explaining(name, setting, errors):
        pinned = HubName(name.repository, str(api.repo_info(name.repository, revision=name.revision).sha))
    if not pinned.pinned or (name.pinned and pinned != name):
        raise ValueError(f"{endpoint()} answers the commit {shown(pinned.revision)} for {name}")
    with _explaining(name, setting, errors):
        tree = api.list_repo_tree(name.repository, recursive=True, revision=pinned.revision)
        entries = list(itertools.islice(tree, MOST_FILES + 1))
    wanted = choose(name, _list(name, entries), setting)
    missing = _missing(pinned, wanted)
    for path in missing:
        with _explaining(name, setting, errors):
            fetched = _fetch(huggingface_hub.hf_hub_download, pinned, path)
        assert Path(fetched) == pinned.directory / path, f"the cache has {path} at {fetched}"
        _check(pinned, path, wanted[path])
    write_record(pinned, setting, {path: listed.bytes for path, listed in wanted.items()})
    return pinned


def _fetch(fetch_file: Callable[..., str], name: HubName, path: str) -> str:
    """Fetch a file into the cache, in several attempts if the connection breaks; returns where it is."""
    for _ in range(TRIES - 1):
        try:
            return fetch_file(name.repository, path, **_where(name))
        except Exception as error:
            if not _kinds(error) & BROKEN_OFF:
                raise
            time.sleep(PAUSE_S)
    return fetch_file(name.repository, path, **_where(name))


def _where(name: HubName) -> dict[str, Any]:
    return {"revision": name.revision, "cache_dir": str(cache()), "endpoint": endpoint()}


def _kinds(error: BaseException) -> set[str]:
    """The names of the classes of an exception and of its cause."""
    reasons = [error] if error.__cause__ is None else [error, error.__cause__]
    return {kind.__name__ for reason in reasons for kind in type(reason).__mro__}


@contextlib.contextmanager
def _explaining(name: HubName, setting: str, errors: Any) -> Iterator[None]:
    """Makes a sentence of what the hub's library raises in the block, as a ValueError; `errors` is its module."""
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is gated: accept its conditions at {endpoint()}/{name.repository}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name.repository} has no branch, tag or commit {name.revision or 'main'}") from None
    except Exception as error:  # also of the HTTP library, which is another one in each version of the hub's
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 404):
            raise ValueError(
                f"there is neither a directory {name.repository} here nor a model of that name on {endpoint()}, "
                "unless it is a private one: then log in with `hf auth login` or set HF_TOKEN"
            ) from None
        reason = error.__cause__ or error
        words, kinds = in_one_line(f"{type(reason).__name__}: {reason}"), _kinds(error)
        if kinds & UNREACHABLE and not kinds & BROKEN_OFF:
            raise ValueError(_unreachable(name, setting, words)) from None
        raise ValueError(f"{name} cannot be downloaded from {endpoint()}: {words}; try again") from None


OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _unreachable(name: HubName, setting: str, why: str) -> str:
    """What to do where there is no network, by what the cache has."""
    records = name.folder.glob(f"dsrl_async/*-{setting}.json")
    cached = [HubName(name.repository, path.name[:40]) for path in sorted(records)]
    there = [str(other) for other in cached if complete(other, setting)]
    mend = f"the cache has {there[-1]}: give that" if there else "download it elsewhere, and give the directory"
    here = "no directory here, " if name.revision is None else ""
    return f"{name} is {here}not in {cache()}, and {endpoint()} cannot be asked for it ({why}); {mend}"


def _list(name: HubName, entries: Sequence[Any]) -> dict[str, ListedFile]:
    """The files of a model by path; raises ValueError if a path or a size is none, or there are too many."""
    if len(entries) > MOST_FILES:
        raise ValueError(f"{name} has more than {MOST_FILES} files, which no policy has")
    listed: dict[str, ListedFile] = {}
    for entry in entries:
        path, size = entry.path, getattr(entry, "size", None)
        parts = str(path).split("/")
        if any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts) or len(path) > 1000:
            raise ValueError(f"{endpoint()} lists {shown(path)} among the files of {name}, which is no file's name")
        if isinstance(size, int):  # and not a directory
            lfs = getattr(entry, "lfs", None)
            listed[path] = ListedFile(size if lfs is None else lfs.size, lfs and lfs.sha256, str(entry.blob_id))
    return listed


def choose(name: HubName, listed: Mapping[str, ListedFile], setting: str) -> dict[str, ListedFile]:
    """What to fetch of a model: what lies at its top, and norm stats up to three directories down.

    Raises ValueError, saying what it is, when there are no weights, or no tokenizer.
    """
    top = [path for path in listed if "/" not in path]
    small = {path for path, file in listed.items() if file.bytes <= LARGEST_SMALL_FILE}
    wanted = [path for path in top if path in TOKENIZER_NAMES and path in small]
    if setting == "tokenizer":
        if not wanted:
            raise ValueError(f"{name} has no tokenizer ({' or '.join(TOKENIZER_NAMES)})")
        return {path: listed[path] for path in wanted}
    check_directory(Path(str(name)), top)
    weights = [path for path in top if path.endswith(".safetensors")]
    if not weights:
        raise ValueError(_without_weights(name, listed))
    wanted += [path for path in top if path.endswith(".json") and path in small and path not in wanted]
    wanted += [path for path in listed if path in small and "/" in path and _is_norm_stats(PurePosixPath(path))]
    return {path: listed[path] for path in wanted + weights}


def _is_norm_stats(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.name == NORM_STATS and len(path.parts) <= 4 and not hidden


def _without_weights(name: HubName, listed: Mapping[str, ListedFile]) -> str:
    nested = sorted(path for path in listed if path.endswith(".safetensors"))
    if nested:
        place = nested[-1].rpartition("/")[0]
        return (
            f"{name} has no weights at its top, but in {place}: "
            f"`hf download {name.repository} --include '{place}/*'`, and give the directory that holds them"
        )
    if any(path.endswith("params/_METADATA") for path in listed):
        return f"{name} is a JAX checkpoint: download and convert it, as docs/pi0.md says"
    if pickles := sorted(path for path in listed if path.rpartition(".")[2] in PICKLES):
        return (
            f"{name} has no safetensors, only {pickles[0]}, and pickled weights are never loaded: "
            "convert them to safetensors, as docs/pi0.md says"
        )
    if "meta/info.json" in listed:
        return f"{name} is a data set, and no policy: give a policy that was trained on it"
    return f"{name} has no safetensors: it is no policy that this project reads"


def _missing(name: HubName, files: Mapping[str, ListedFile]) -> list[str]:
    """The files that are not in the cache; says on stderr what is fetched. Raises ValueError when it does not fit."""

    def there(path: str) -> bool:
        return (name.directory / path).is_file() and (name.directory / path).stat().st_size == files[path].bytes

    missing = [path for path in files if not there(path)]
    needed = sum(files[path].bytes for path in missing)
    place = next(parent for parent in (cache(), *cache().parents) if parent.exists())
    if needed > (free := shutil.disk_usage(place).free):
        raise ValueError(
            f"{name.repository} takes {needed / 1e9:.1f} GB, and {cache()} has room for {free / 1e9:.1f} GB; "
            "free some, or set HF_HOME to a directory on another disk"
        )
    if missing:
        size = f"{len(missing)} files, {needed / 1e6:,.1f} MB"
        print(f"downloading {name} from {endpoint()} to {cache()}: {size}", file=sys.stderr, flush=True)
    return missing


def _check(name: HubName, path: str, listed: ListedFile) -> None:
    """Compare a file with what the hub lists; one that differs is removed, so that it is not used."""
    file = name.directory / path
    size = file.stat().st_size
    digest = hashlib.sha256() if listed.sha256 else hashlib.sha1(b"blob %d\0" % size)
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    if size != listed.bytes or digest.hexdigest() != (listed.sha256 or listed.git_sha1):
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        raise ValueError(
            f"{path} of {name} did not arrive as the hub lists it ({size} bytes of {listed.bytes}, or another hash) "
            "and was removed: try again"
        )


def main(argument: str) -> None:
    """Download as `hub.fetch_policy` asks, and print the answer as one line of JSON."""
    job = json.loads(argument)
    prepare_child(job["parent"])
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # a log needs no more lines than that
    try:
        answer = {"commit": download(HubName(*job["name"]), job["setting"]).revision}
    except ValueError as error:
        answer = {"error": " ".join(str(error).split())}
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
