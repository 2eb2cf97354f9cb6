"""Checkpoints of a run.

    <run>/checkpoints/
      00001234-00001650/        named by the numbers of gradient updates and of decisions
        agent.safetensors       actor, critic, target, temperature, optimisers, generator; and in the metadata the
                                instructions that the agent was trained with, if it is told which one it has
        state.json              counters, versions, and the size and hash of each of the other files
        replay/lane-0000.safetensors ...   rows of each lane, oldest first; not there if the disk was too full
      recovery.safetensors      while the run goes on, and after an end without a checkpoint: the agent, with the
                                contents of a `state.json` in its metadata

What counts is what has the most updates, see `latest`. There is no link to it: run directories are copied by tools that
do not keep links. Whatever else lies here, copies and notes and what such tools leave, is not looked at and stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from dsrl_async import __version__
from dsrl_async.host.files import remove, replacing, temporary_path
from dsrl_async.shm.counters import HISTORY_POINTS, SUCCESS_EPISODES, Counters
from dsrl_async.shm.episodes import export_episodes, import_episodes
from dsrl_async.shm.replay import ReplayRing
from dsrl_async.untrusted import check_regular, parse_json, read_json, shown

logger = logging.getLogger(__name__)

FORMAT = 1
AGENT, STATE, RECOVERY = "agent.safetensors", "state.json", "recovery.safetensors"
KEPT = ("actor_started_episodes", "learner_updates", "control_wall_s", "control_warmup_end", "control_passed_decisions")
SUMMED = ("actor_decisions", "actor_env_steps", "actor_episodes", "actor_successes", "actor_policy_lag")
LEARNED = "prompts"
"""Key of an agent's metadata."""
LARGEST_SUM = 2**62  # of a counter over all lanes, which is an int64
LARGEST_VALUE = 1e9
"""Upper limit on the numbers in a row, and on an agent's weights. What diverges is beyond it a few updates before it is
not finite any more; a flipped bit of an exponent mostly is."""

NAME = re.compile(r"([0-9]+)-([0-9]+)")
TEMPORARY = re.compile(r"\.[0-9]+-[0-9]+\.tmp")
"""What a process that was killed while it wrote a checkpoint leaves, see `files.temporary_path`."""


class FileRecord(BaseModel):
    """What `state.json` says of another file of its checkpoint."""

    model_config = ConfigDict(strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


Count = Annotated[int, Field(ge=0, le=LARGEST_SUM)]
Counts = Annotated[list[Count], Field(min_length=1)]


class SavedCounters(BaseModel):
    """The counters in `state.json`."""

    model_config = ConfigDict(strict=True)

    learner_updates: Counts = Field(max_length=1)
    control_warmup_end: Counts = Field([0], max_length=1)
    control_passed_decisions: Counts = Field([0], max_length=1)
    control_wall_s: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(min_length=1, max_length=1)
    actor_started_episodes: Counts
    actor_decisions: Counts
    actor_env_steps: Counts
    actor_episodes: Counts
    actor_successes: Counts
    actor_policy_lag: Counts


Share = Annotated[float, Field(ge=0, le=1)]


class SavedEpisodes(BaseModel):
    """What `state.json` says of the episodes, see `shm.episodes.export_episodes`."""

    model_config = ConfigDict(strict=True)

    successes: list[Annotated[int, Field(ge=0, le=1)]] = Field(max_length=SUCCESS_EPISODES)
    history: list[Share] = Field(min_length=HISTORY_POINTS, max_length=HISTORY_POINTS)
    history_length: int = Field(ge=0, le=LARGEST_SUM)
    unseen: list[Annotated[list[float], Field(min_length=3, max_length=3)]]


class State(BaseModel):
    """The contents of `state.json`."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    lanes: int
    counters: SavedCounters
    episodes: SavedEpisodes | None = None
    """None in checkpoints from before they were kept."""
    files: dict[str, FileRecord] | None = None
    """By path in the checkpoint; None in checkpoints from before there were hashes, and in a recovery file."""
    replay: bool = True
    """Whether the replay buffer is there."""
    sha256: str | None = None
    """Of the rest, see `_digest`."""

    @model_validator(mode="after")
    def _fits(self) -> State:
        for name, values in self.counters:
            if name.startswith("actor_") and (len(values) != self.lanes or sum(values) > LARGEST_SUM):
                raise ValueError(f"{name} does not fit {self.lanes} lanes")
        if self.files is not None and self.files.keys() != set(_data_files(self.lanes * self.replay)):
            raise ValueError(f"the files that it lists are not those of {self.lanes * self.replay} lanes")
        return self


def save(
    run_dir: Path,
    agent: bytes,
    counters: Counters,
    ring: ReplayRing,
    keep: int,
    beat: Callable[[], None] = lambda: None,
    replay: bool = True,
) -> Path:
    """Write a checkpoint, with or without the replay buffer; older ones beyond `keep` are removed.

    Workers may go on meanwhile. `agent` is the contents of the agent's safetensors file; `beat` is called between the
    larger writes, as a sign of life.

    Raises:
        OSError: it could not be written; the checkpoints before it are as they were.
    """
    root = run_dir / "checkpoints"
    state = _state_of(counters, replay)
    root.mkdir(exist_ok=True)  # but not the run directory, should that be gone
    _clear_abandoned(root)
    final = root / name_of(state)
    while os.path.lexists(final) or os.path.lexists(temporary_path(final)):
        if _is_ours(final) and (not replay or _read_state(final).get("replay", True)):  # nothing has happened since
            return final
        final = root / f"0{final.name}"  # something else has the name
    files: dict[str, dict[str, Any]] = {}
    with replacing(final, beat) as temporary:
        temporary.mkdir()
        if replay:
            (temporary / "replay").mkdir()
        for file in _data_files(ring.lanes * replay):
            beat()
            content = agent if file == AGENT else to_bytes(ring.export_lane(len(files) - 1))
            (temporary / file).write_bytes(content)
            files[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_state(temporary, {**state, "files": files})
    for old in [path for path in complete(root) if _is_ours(path) and path != final][: 1 - keep or None]:
        try:
            _discard(old)
        except OSError as error:
            logger.warning("the old checkpoint %s cannot be removed: %s", old, error.strerror)
    return final


def save_agent(place: Path, agent: bytes, counters: Counters, beat: Callable[[], None]) -> None:
    """Write a checkpoint without replay buffer, which need not belong to those of the run, to `place`.

    Raises:
        OSError: it could not be written; there is nothing at `place` that was not there before.
    """
    record = {"bytes": len(agent), "sha256": hashlib.sha256(agent).hexdigest()}
    with replacing(place, beat) as temporary:
        temporary.mkdir()
        (temporary / AGENT).write_bytes(agent)
        write_state(temporary, {**_state_of(counters, replay=False), "files": {AGENT: record}})


def save_recovery(
    run_dir: Path, agent: Callable[[dict[str, str]], bytes], counters: Counters, beat: Callable[[], None]
) -> None:
    """Write the recovery file; raises OSError if that fails, and the one before is as it was.

    `agent` makes the contents of a safetensors file with the given metadata.
    """
    content = agent({STATE: _to_json(_state_of(counters, replay=False))})
    with replacing(recovery_path(run_dir), beat) as temporary:
        temporary.write_bytes(content)


def _state_of(counters: Counters, replay: bool) -> dict[str, Any]:
    """What `state.json` says of this moment, but for the files."""
    snapshot = counters.snapshot()
    return {
        "format": FORMAT,
        "dsrl_async": __version__,
        "lanes": len(counters.actor_decisions),
        "replay": replay,
        "counters": {key: array.tolist() for key, array in snapshot.items() if key in SUMMED or key in KEPT},
        "episodes": export_episodes(snapshot),
    }


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the `state.json` of a checkpoint."""
    (checkpoint / STATE).write_text(_to_json(state))


def name_of(state: dict[str, Any]) -> str:
    """What a checkpoint is called of which `state.json` says this."""
    updates, decisions = _numbers(state)
    return f"{updates:08d}-{decisions:08d}"


def _to_json(state: dict[str, Any]) -> str:
    return json.dumps({**state, "sha256": _digest(state)})


def _data_files(lanes: int) -> list[str]:
    """The files of a checkpoint besides `state.json`."""
    return [AGENT, *(f"replay/lane-{lane:04d}.safetensors" for lane in range(lanes))]


def _digest(state: dict[str, Any]) -> str:
    """Hash of all that `state.json` says but this hash."""
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _clear_abandoned(root: Path) -> None:
    """Remove what a process that was killed left half written."""
    recovery = temporary_path(recovery_path(root.parent))
    for path in [recovery, *(path for path in root.iterdir() if TEMPORARY.fullmatch(path.name) and path.is_dir())]:
        with contextlib.suppress(OSError):
            remove(path)


def _is_ours(path: Path) -> bool:
    """Whether this is a whole checkpoint where this code wrote it, and no copy of one under another name."""
    numbers = NAME.fullmatch(path.name)
    if path.is_symlink() or numbers is None or min(map(len, numbers.groups())) < 8:
        return False
    try:
        return _numbers(_read_state(path)) == tuple(map(int, numbers.groups()))
    except ValueError:
        return False


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint of ours, but not what somebody else has put into it."""
    files = [STATE, *_files_of(checkpoint, _read_state(checkpoint))]
    if {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")} - {"replay", *files}:
        for file in files:  # from the first on it is no checkpoint any more
            (checkpoint / file).unlink(missing_ok=True)
    else:
        shutil.rmtree(checkpoint.replace(temporary_path(checkpoint)))


def recovery_path(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / RECOVERY


def complete(root: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first: named by their two numbers, and with a `state.json`.

    A copy under two other numbers is none. One of which `state.json` cannot be used is one, so that whoever goes on
    from it is told.
    """
    found: list[tuple[int, int, int, Path]] = []
    for name in _list(root):
        path, match = root / name, NAME.fullmatch(name)
        if match is not None and os.path.isfile(path / STATE):  # unlike Path's, it says no where it may not look
            updates, decisions = map(int, match.groups())
            with contextlib.suppress(ValueError):
                if _numbers(_read_state(path)) != (updates, decisions):
                    continue
            found.append((updates, decisions, len(name), path))
    return [path for *_, path in sorted(found)]


def _list(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def latest(run_dir: Path) -> Path | None:
    """What a run goes on from: its newest checkpoint, or the recovery file if that has more updates; or None."""
    checkpoint, recovery = find(run_dir), recovery_path(run_dir.absolute())
    with contextlib.suppress(ValueError):
        updates = _numbers(_read_state(recovery))[0]
        if checkpoint is None or updates > _named_numbers(checkpoint)[0]:
            return recovery
    return checkpoint


def remove_recovery(run_dir: Path) -> None:
    """Remove the recovery file if there is a checkpoint with as many updates."""
    if latest(run_dir) not in (None, recovery_path(run_dir.absolute())):
        with contextlib.suppress(OSError):
            recovery_path(run_dir).unlink()


def agent_file(saved: Path) -> Path:
    """The safetensors file with the agent of a checkpoint; a recovery file is that itself."""
    return saved if saved.name == RECOVERY else saved / AGENT


def what_is_left(run_dir: Path) -> str:
    """Says what a run that ended without its last checkpoint can go on from."""
    if (saved := latest(run_dir)) is None:
        return "nothing was saved"
    numbers = _numbers(_read_state(saved)) if saved.name == RECOVERY else _named_numbers(saved)
    return f"{saved} holds the agent of update {numbers[0]}, and --resume {run_dir} goes on from there"


def find(path: Path) -> Path | None:
    """The checkpoint directory meant by `path`: itself, or the newest of a run (or of its `checkpoints`), or None.

    It is absolute, but links in it are kept: a checkpoint belongs to the run in which it is found, wherever it lies.
    """
    path = Path(os.path.abspath(path))
    if os.path.isfile(path / STATE) and os.path.isfile(path / AGENT):
        return path
    newest = (complete(path / "checkpoints") or complete(path))[-1:]
    return newest[0] if newest else None


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint belongs to: the one that it was found in, wherever links lead to from there.

    A link from somewhere else belongs to the run that it leads to.
    """
    in_a_run = checkpoint.absolute().parent.name == "checkpoints"
    return (checkpoint.absolute() if in_a_run else checkpoint.resolve()).parent.parent


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of `state.json`; raises ValueError with one sentence if it cannot be used."""
    with naming_an_older_one(checkpoint):
        return _read_state(checkpoint)


def _read_state(saved: Path) -> dict[str, Any]:
    if saved.name == RECOVERY:
        path, state = saved, _read_metadata(saved)
    else:
        path = saved / STATE
        state = read_json(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}, the only one that this version reads")
    try:
        valid = State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged: {where}{': ' * bool(where)}{first['msg']}") from error
    hashed = valid.sha256 is not None or valid.files is not None or saved.name == RECOVERY
    if hashed and valid.sha256 != _digest(state):
        raise ValueError(f"{path} is damaged: what it says does not have the hash that it names")
    return state


def _read_metadata(recovery: Path) -> Any:
    """What a recovery file says of its moment."""
    return parse_json(_metadata(recovery).get(STATE, "{}"), str(recovery))


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; raises ValueError with one sentence if it cannot be read."""
    check_regular(path)
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except Exception as error:  # whatever safetensors may say
        raise ValueError(f"{path} cannot be read: {error}") from error


def _named_numbers(checkpoint: Path) -> tuple[int, int]:
    """The updates and decisions in the name of a checkpoint; zeros where it has another name."""
    match = NAME.fullmatch(checkpoint.name)
    return (int(match[1]), int(match[2])) if match is not None else (0, 0)


def _numbers(state: dict[str, Any]) -> tuple[int, int]:
    """The updates and decisions that a checkpoint is named by."""
    return state["counters"]["learner_updates"][0], sum(state["counters"]["actor_decisions"])


def check(checkpoint: Path, files: Sequence[str] | None = None) -> dict[str, Any]:
    """Check that a checkpoint or recovery file is whole, but for the values of rows; returns what `state.json` says.

    Of a checkpoint, only `files` are looked at if they are given.

    Raises ValueError with one sentence that names the file which is missing, damaged or of another checkpoint.
    """
    state = _read_state(checkpoint)
    for file in _files_of(checkpoint, state) if files is None else files:
        path, record = checkpoint / file, (state.get("files") or {}).get(file)
        size = check_regular(path)
        if record is None:
            continue
        if size != record["bytes"]:
            raise ValueError(f"{path} is damaged: it has {size} bytes, {STATE} says {record['bytes']}")
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != record["sha256"]:
            raise ValueError(f"{path} is damaged or of another checkpoint: its hash is not the one in {STATE}")
    check_agent(agent_file(checkpoint))
    return state


def _files_of(saved: Path, state: dict[str, Any]) -> list[str]:
    """The files of a checkpoint besides `state.json`; a recovery file has none."""
    return [] if saved.name == RECOVERY else _data_files(state["lanes"] * state.get("replay", True))


def learned_metadata(prompts: Sequence[str]) -> dict[str, str]:
    """The metadata of an agent's file that says with which instructions it was trained."""
    return {LEARNED: json.dumps(list(prompts))}


def learned_prompts(agent: Path) -> tuple[str, ...] | None:
    """The instructions that an agent was trained with, by its safetensors file; None if that does not say it.

    Raises ValueError with one sentence if it is damaged.
    """
    found = _metadata(agent).get(LEARNED)
    if found is None:
        return None
    prompts = parse_json(found, str(agent))
    if not (isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts)):
        raise ValueError(f"{agent} is damaged: the instructions that it was trained with are {shown(prompts)}")
    return tuple(prompts)


def check_agent(path: Path) -> None:
    """Check that an agent's file is whole, and that its numbers are finite; raises ValueError with one sentence."""
    check_regular(path)
    try:
        with safe_open(path, "numpy") as file:
            broken = [name for name in sorted(file.keys()) if not is_sound(name, file.get_tensor(name))]
    except Exception as error:  # whatever safetensors and numpy may say
        raise ValueError(f"{path} cannot be read: {error}") from error
    if broken:
        raise ValueError(f"{path} cannot be used: its {broken[0]} is not finite, or beyond {LARGEST_VALUE:g}")


def is_sound(name: str, tensor: np.ndarray) -> bool:
    """Whether a tensor of an agent holds plausible numbers; those of Adam need only be finite."""
    if tensor.dtype.kind != "f":
        return True
    return bool(np.isfinite(tensor).all() if ".adam." in name else (np.abs(tensor) <= LARGEST_VALUE).all())


@contextlib.contextmanager
def naming_an_older_one(checkpoint: Path, option: str = "--resume") -> Iterator[None]:
    """Let a ValueError about a checkpoint say which older one beside it is whole, to be given as an `option`."""
    try:
        yield
    except ValueError as error:
        if (whole := _last_whole(_older(checkpoint))) is None:
            raise
        raise ValueError(f"{error}; an older one is whole: {option} {whole}") from error


def _older(saved: Path) -> list[Path]:
    """The checkpoints beside one, or beside a recovery file, that are older."""
    beside = complete(saved.parent)
    return beside[: beside.index(saved)] if saved in beside else beside * (saved.name == RECOVERY)


def _last_whole(paths: Sequence[Path]) -> Path | None:
    for path in reversed(paths):
        with contextlib.suppress(ValueError):
            check(path)
            return path
    return None


def restore_shared(
    checkpoint: Path,
    counters: Counters,
    ring: ReplayRing,
    tasks: int,
    say: Callable[[str], object] = lambda words: None,
) -> bool:
    """Fill fresh shared memory with a checkpoint's counters and replay rows, also for another number of lanes.

    `tasks` is how many instructions the environment has.
    Where it has no rows, or is a recovery file, they come from the newest one before it that has some. Returns whether
    there were any. `say` is told what is being done.

    Raises ValueError with one sentence if a file is missing, damaged or does not fit.
    """
    with naming_an_older_one(checkpoint):
        state = check(checkpoint)
    source = next((path for path in [checkpoint, *reversed(_older(checkpoint))] if has_replay(path)), None)
    lanes = []
    if source is not None:
        with naming_an_older_one(source):
            files = _files_of(source, state if source == checkpoint else check(source))[1:]
            for number, file in enumerate(files):
                say(f"reading the replay buffer, {number} of {len(files)} lanes")
                lanes.append(read_lane(source / file, ring, tasks))
    restore_counters(state, counters)
    ring.import_lanes(lanes)
    return source is not None


def restore_counters(state: dict[str, Any], counters: Counters) -> None:
    """Fill fresh counters with those in `state.json`."""
    saved = state["counters"]
    counters.learner_updates[0] = saved["learner_updates"][0]
    counters.control_wall_s[0] = saved["control_wall_s"][0]
    for key in ("control_warmup_end", "control_passed_decisions"):  # which an old checkpoint lacks
        getattr(counters, key)[0] = saved.get(key, [0])[0]
    for key in SUMMED:
        mine, values = getattr(counters, key), saved[key]
        shared = min(len(mine), len(values))
        mine[:shared] = values[:shared]
        mine[0] += sum(values[shared:])
    started = saved["actor_started_episodes"][: len(counters.actor_started_episodes)]
    counters.actor_started_episodes[: len(started)] = started
    import_episodes(counters, state.get("episodes"))


def has_replay(saved: Path) -> bool:
    """Whether the replay buffer is in a checkpoint."""
    with contextlib.suppress(ValueError):
        return saved.name != RECOVERY and bool(_read_state(saved).get("replay", True))
    return False


def read_lane(path: Path, ring: ReplayRing, tasks: int) -> dict[str, np.ndarray]:
    """The rows of a lane, whose file has been checked, of an environment with so many instructions.

    Raises ValueError with one sentence if they are damaged or do not fit the ring.
    """
    try:
        rows = load_file(path)
    except Exception as error:  # whatever safetensors and numpy may say
        raise ValueError(f"{path} cannot be read: {error}") from error
    count = len(rows["complete"]) if "complete" in rows and rows["complete"].ndim else 0
    for name, mine in ring.rows.items():
        column = rows.get(name)
        if column is None or column.shape != (count, *mine.shape[2:]) or column.dtype != mine.dtype:
            raise ValueError(f"{path}: rows of {name!r} do not fit this configuration")
        if column.dtype.kind == "f" and not (np.abs(column) <= LARGEST_VALUE).all():
            raise ValueError(f"{path} is damaged: its {name!r} holds values that are not finite or too large")
        if column.dtype.kind == "b" and (column.view(np.uint8) > 1).any():
            raise ValueError(f"{path} is damaged: its {name!r} holds values that are neither true nor false")
    if ring.keeps_seen and count and not 0 <= rows["task_index"].min() <= rows["task_index"].max() < tasks:
        raise ValueError(
            f"{path}: its 'task_index' holds numbers that are none of the environment's {tasks} instructions; it is "
            "damaged, or of an environment with others"
        )
    if (rows["steps"] < rows["complete"]).any() or (rows["policy_version"] < 0).any() or rows["complete"][-1:].any():
        raise ValueError(f"{path} is damaged: it has decisions without steps or policy, or none that is pending")
    return rows
