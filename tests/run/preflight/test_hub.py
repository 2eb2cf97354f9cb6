"""Policies from the hub, of a server on this machine that speaks its interface; no real download is made."""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import call
from support.fake_hub import COMMIT, FakeHub, serving
from support.launched import SMALL

from dsrl_async.config.command_line import make_paths_absolute
from dsrl_async.config.hub import HubName, hub_name, local_path
from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.pi0.config import EMBEDDED_POLICY, Pi0Config
from dsrl_async.run import preflight
from dsrl_async.run.preflight.download import complete, download
from dsrl_async.run.preflight.hub import fetch_policy

NAME = HubName("lab/policy")
PINNED = f"lab/policy@{COMMIT}"
FETCHED = {"config.json", "model.safetensors", "norm_stats.json", "tokenizer.json"}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.run.preflight.download.PAUSE_S", 0.0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The embedded policy, with what must not be fetched beside it; the working directory is empty."""
    files = {path.name: path.read_bytes() for path in EMBEDDED_POLICY.iterdir() if path.is_file()}
    files |= dict.fromkeys(("pytorch_model.bin", "modeling.py", "README.md", "old/model.safetensors"), b"never")
    with serving(FakeHub(files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server


def snapshot() -> Path:
    return HubName("lab/policy", COMMIT).directory


def test_only_what_a_policy_needs_is_fetched(hub: FakeHub) -> None:
    assert download(NAME, "checkpoint") == HubName("lab/policy", COMMIT)
    assert {path.name for path in snapshot().iterdir()} == FETCHED
    assert all((snapshot() / name).read_bytes() == hub.files[name] for name in FETCHED)
    asked = {line.split()[1].rpartition("/")[2] for line in hub.asked if "/resolve/" in line or "/storage/" in line}
    assert asked == FETCHED


def test_norm_stats_further_down_come_along(hub: FakeHub) -> None:
    for path in ("assets/lab/norm_stats.json", "a/b/c/d/norm_stats.json", ".hidden/norm_stats.json", "a/other.json"):
        hub.files[path] = hub.files["norm_stats.json"]
    download(NAME, "checkpoint")
    fetched = {str(path.relative_to(snapshot())) for path in snapshot().rglob("*") if path.is_file()}
    assert fetched == FETCHED | {"assets/lab/norm_stats.json"}


def test_a_run_names_the_commit_and_is_resumed_and_evaluated_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """The processes of a run know nothing of the hub, so one in a single process will do."""
    run = str(tmp_path / "run")
    first = call(
        "launch", *SMALL, "--serial", "--policy.checkpoint", "lab/policy", "--max-decisions", "17", "--run-dir", run
    )
    assert first.result["decisions"] == 17
    assert read_yaml(Path(run, "config.yaml"))["policy"]["checkpoint"] == PINNED
    hub.status = 500
    hub.asked.clear()
    (tmp_path / "here" / "lab" / "policy").mkdir(parents=True)  # by now there is such a directory, too
    assert call("launch", "--resume", run, "--max-decisions", "18").result["resumed"]["changes"] == [
        "max_decisions 17 -> 18"
    ]
    result = call("evaluate", "--checkpoint", run, "--episodes", "1", "--env.max-episode-steps", "5").result
    assert result["settings"]["policy"]["checkpoint"] == PINNED
    assert hub.asked == []


def test_a_newer_policy_under_the_same_name_is_not_mistaken_for_the_old_one(hub: FakeHub) -> None:
    config = validate({"policy": {"checkpoint": str(download(NAME, "checkpoint"))}})
    hub.branches["main"] = "f" * 40
    hub.asked.clear()
    assert fetch_policy(config) == config
    assert hub.asked == []
    with pytest.raises(ValueError, match="neither a directory"):  # the server has no files of the new one
        download(NAME, "checkpoint")
    assert hub.asked[-1].endswith(f"tree/{'f' * 40}")


def test_what_is_here_wins_over_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    directory = tmp_path / "here" / "lab" / "policy"
    shutil.copytree(EMBEDDED_POLICY, directory)
    config = validate({"policy": {"checkpoint": "lab/policy"}})
    make_paths_absolute(config.policy)
    assert config.policy.checkpoint == str(directory)
    run = preflight.check_run(config)
    assert (run.policy.directory, hub.asked) == (directory, [])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("lerobot/pi0_libero", HubName("lerobot/pi0_libero")),
        ("lerobot/pi0_libero@main", HubName("lerobot/pi0_libero", "main")),
        ("lerobot/pi0.5_libero@refs/pr/1", HubName("lerobot/pi0.5_libero", "refs/pr/1")),
        *(
            (text, None)
            for text in ("pi0", "./lab/policy", "/lab/policy", "lab/policy/", "a/b/c", "~/policy", "lab/..")
        ),
        *(
            (text, None)
            for text in ("../policy", "lab/po licy", "lab/a--b", "lab/.git", "lab/policy@", "lab/p@../x", "a/b@c@d")
        ),
    ],
)
def test_names_and_paths_are_told_apart(text: str, meant: HubName | None) -> None:
    assert hub_name(text) == meant
    assert local_path(text) == text


def test_a_tokenizer_comes_from_the_hub_too(hub: FakeHub) -> None:
    hub.repository = "lab/words"
    config = fetch_policy(validate({"policy": {"tokenizer": "lab/words"}}))
    assert config.policy.tokenizer == f"lab/words@{COMMIT}"
    assert [path.name for path in HubName("lab/words", COMMIT).directory.iterdir()] == ["tokenizer.json"]
    spec = preflight.check_run(config).policy.spec
    assert isinstance(spec, Pi0Config)
    assert spec.vocab_size == 48
    assert not complete(HubName("lab/words", COMMIT), "checkpoint")


def test_an_interrupted_download_goes_on_where_it_ended(hub: FakeHub) -> None:
    hub.files["model.safetensors"] = random_bytes(15_000_000)  # the hub's library keeps what it has in steps of 10 MiB
    hub.cut["model.safetensors"] = 12_000_000
    download(NAME, "checkpoint")
    assert any("/storage/" in line and "bytes=1" in line for line in hub.asked)
    assert (snapshot() / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


class Enough(Exception):
    """The user has had enough."""


def test_a_download_can_be_interrupted_and_the_next_goes_on(hub: FakeHub) -> None:
    hub.files["model.safetensors"] = random_bytes(15_000_000)
    hub.stalled["model.safetensors"] = 12_000_000

    def heed() -> None:
        if any("/storage/model.safetensors" in line for line in hub.asked) and received():
            raise Enough

    def received() -> bool:
        parts = list((HubName("lab/policy", COMMIT).folder / "blobs").glob("*.incomplete"))
        return any(part.stat().st_size > 0 for part in parts)

    config = validate({"policy": {"checkpoint": "lab/policy"}})
    with pytest.raises(Enough):
        fetch_policy(config, heed)
    hub.resumed.set()
    assert not complete(HubName("lab/policy", COMMIT), "checkpoint")
    hub.asked.clear()
    assert fetch_policy(config).policy.checkpoint == PINNED
    assert (snapshot() / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not any("config.json" in line for line in hub.asked)  # which had arrived


def listed(**entry: Any) -> Callable[[FakeHub], None]:
    return lambda hub: hub.others.append({"type": "file", "size": 3, "oid": "0" * 40, **entry})


def only(*names: str) -> Callable[[FakeHub], None]:
    def change(hub: FakeHub) -> None:
        hub.files = dict.fromkeys(names, b"{}")

    return change


def corrupted(name: str, content: bytes | None = None) -> Callable[[FakeHub], None]:
    def change(hub: FakeHub) -> None:
        hub.sent[name] = content or bytes(len(hub.files[name]))

    return change


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda hub: None, "lab/nothing", r"neither a directory lab/nothing here nor a model of that name on http:"),
        (lambda hub: None, "lab/policy@v2", r"lab/policy has no branch, tag or commit v2$"),
        (lambda hub: setattr(hub, "gated", True), "lab/policy", r"is gated: accept its conditions at http://.*hf auth"),
        (lambda hub: setattr(hub, "status", 503), "lab/policy", r"cannot be downloaded from http://.*503.*try again$"),
        (lambda hub: setattr(hub, "endless", True), "lab/policy", r"has more than 10000 files"),
        *(
            (listed(path=path), "lab/policy", r"lists .* among the files of lab/policy, which is no file's name$")
            for path in ("../../x.json", "/etc/x.json", "a//x.json", "a\\..\\x.json", "./x.json", "x\n.json", "")
        ),
        (corrupted("model.safetensors"), "lab/policy", r"^model\.safetensors of .* did not arrive as the hub lists it"),
        (corrupted("norm_stats.json"), "lab/policy", r"^norm_stats\.json of .* did not arrive as the hub lists it"),
        (
            corrupted("model.safetensors", b"short"),
            "lab/policy",
            r"cannot be downloaded .*model\.safetensors.*try again",
        ),
        (listed(path="big.safetensors", size=10**15), "lab/policy", r"takes 1000000\.0 GB, and .* set HF_HOME"),
        (
            only("pytorch_model.bin", "config.json"),
            "lab/policy",
            r"only pytorch_model\.bin, and pickled weights are never",
        ),
        (
            only("adapter_model.safetensors"),
            "lab/policy",
            r"lab/policy/adapter_model\.safetensors is of a LoRA adapter",
        ),
        (only("last/model.safetensors"), "lab/policy", r"but in last: `hf download lab/policy --include 'last/\*'`"),
        (only("params/_METADATA"), "lab/policy", r"is a JAX checkpoint"),
        (only("meta/info.json"), "lab/policy", r"is a data set, and no policy"),
        (only("README.md"), "lab/policy", r"has no safetensors: it is no policy that this project reads$"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(
    hub: FakeHub, change: Callable[[FakeHub], None], name: str, message: str
) -> None:
    change(hub)
    meant = hub_name(name)
    assert meant is not None
    with pytest.raises(ValueError, match=message) as raised:
        download(meant, "checkpoint")
    assert "\n" not in str(raised.value)
    assert not complete(HubName(meant.repository, COMMIT), "checkpoint")
    assert not any(path.read_bytes() == bytes(10) for path in snapshot().glob("*.safetensors"))


def test_what_was_corrupted_is_fetched_again(hub: FakeHub) -> None:
    hub.sent["model.safetensors"] = bytes(len(hub.files["model.safetensors"]))
    with pytest.raises(ValueError, match="did not arrive"):
        download(NAME, "checkpoint")
    hub.sent.clear()
    download(NAME, "checkpoint")
    assert (snapshot() / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_without_a_network_the_cache_serves_and_else_it_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"is no directory here, not in .*HF_HUB_OFFLINE .* forbids it\); down"):
        download(NAME, "checkpoint")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    download(NAME, "checkpoint")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(ValueError, match=rf"\(Connect\w*: .*\); the cache has {PINNED}: give that$"):
        download(NAME, "checkpoint")
    config = validate({"policy": {"checkpoint": PINNED}})
    assert fetch_policy(config) == config


def test_what_to_install_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = builtins.__import__

    def without_the_library(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return stock(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without_the_library)
    with pytest.raises(
        ValueError, match=r"lab/policy is no directory here; to have it from the hub: pip install .*hub"
    ):
        download(NAME, "checkpoint")


def test_a_file_that_has_vanished_from_the_cache_is_fetched_again(hub: FakeHub) -> None:
    download(NAME, "checkpoint")
    pinned = HubName("lab/policy", COMMIT)
    assert complete(pinned, "checkpoint")
    (snapshot() / "norm_stats.json").unlink()
    assert not complete(pinned, "checkpoint")
    assert download(pinned, "checkpoint") == pinned
    assert complete(pinned, "checkpoint")


def test_a_sentence_of_the_child_names_the_setting(hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match=r"^policy\.tokenizer: there is neither a directory lab/nothing here"):
        preflight.check_run(validate({"policy": {"tokenizer": "lab/nothing"}}))
