"""Checkpoints that are damaged, mixed, or made up: one sentence each, with the older whole one beside it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.commands import call
from support.learners import HORIZON, fill, make_learner
from support.paths import FIXTURES

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs import environment_spec
from dsrl_async.run import checkpoints
from dsrl_async.run.preflight.run_directory import open_run_directory
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing

OLD_RUN = FIXTURES / "run_beb78af"
LANE = "replay/lane-0001.safetensors"


@pytest.fixture(scope="module")
def config() -> Config:
    return validate(
        {
            "actors": 2,
            "replay": {"capacity": 200, "warmup_decisions": 16},
            "sac": {"batch_size": 16, "hidden_dims": [16, 16], "num_q_heads": 2, "conv_channels": [4]},
        }
    )


@pytest.fixture(scope="module")
def pair(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    run_dir = tmp_path_factory.mktemp("pair")
    (run_dir / "checkpoints").mkdir()
    memory = create_memory(config, environment_spec(config.env.model_dump()), HORIZON)
    learner = make_learner(config, memory, run_dir)
    for seed in (0, 1):
        fill(memory, 40, seed)
        learner.update()
        learner.checkpoint()
    return run_dir


def restore(config: Config, run_dir: Path) -> tuple[Counters, ReplayRing]:
    memory = create_memory(config, environment_spec(config.env.model_dump()), HORIZON)
    counters, ring = Counters(memory), ReplayRing(memory)
    saved = checkpoints.latest(run_dir)
    assert saved is not None
    checkpoints.restore_shared(saved, counters, ring, tasks=2)
    return counters, ring


def refused(config: Config, run_dir: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (any sentence; the caller looks at it)
        restore(config, run_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def swap_lanes(new: Path, old: Path) -> None:
    lanes = [new / "replay" / f"lane-000{lane}.safetensors" for lane in (0, 1)]
    lanes[0].rename(new / "other")
    lanes[1].rename(lanes[0])
    (new / "other").rename(lanes[1])


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "agent missing": (lambda new, old: (new / "agent.safetensors").unlink(), "agent.safetensors"),
    "agent cut": (lambda new, old: os.truncate(new / "agent.safetensors", 900), "agent.safetensors"),
    "agent flipped": (lambda new, old: flip(new / "agent.safetensors", 0.6), "agent.safetensors"),
    "agent's header flipped": (lambda new, old: flip(new / "agent.safetensors", 0), "agent.safetensors"),
    "agent longer": (lambda new, old: os.truncate(new / "agent.safetensors", 10**6), "agent.safetensors"),
    "agent of another": (lambda new, old: shutil.copy(old / "agent.safetensors", new), "agent.safetensors"),
    "agent a directory": (
        lambda new, old: replace(new / "agent.safetensors", os.mkdir),
        "agent.safetensors",
    ),
    "lane missing": (lambda new, old: (new / LANE).unlink(), "lane-0001"),
    "lane cut": (lambda new, old: os.truncate(new / LANE, 5), "lane-0001"),
    "lane flipped": (lambda new, old: flip(new / LANE, 0.99), "lane-0001"),
    "lane of another": (lambda new, old: shutil.copy(old / LANE, new / LANE), "lane-0001"),
    "lane a pipe": (lambda new, old: replace(new / LANE, os.mkfifo), "lane-0001"),
    "lanes swapped": (swap_lanes, "lane-0000"),
    "replay missing": (lambda new, old: shutil.rmtree(new / "replay"), "lane-0000"),
    "state cut": (lambda new, old: os.truncate(new / "state.json", 200), "state.json"),
    "state empty": (lambda new, old: os.truncate(new / "state.json", 0), "state.json"),
    "state deep": (lambda new, old: (new / "state.json").write_text("[" * 10**6), "state.json"),
    "state no text": (lambda new, old: (new / "state.json").write_bytes(b"\xff\xfe\x00"), "state.json"),
    "state huge": (lambda new, old: os.truncate(new / "state.json", 10**9), "state.json"),
    "state's digit": (
        lambda new, old: (new / "state.json").write_text(
            (new / "state.json").read_text().replace('"control_wall_s": [0.0]', '"control_wall_s": [9.0]')
        ),
        "state.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_file_is_named_and_the_older_whole_checkpoint(
    config: Config, pair: Path, tmp_path: Path, damage: str
) -> None:
    run_dir = Path(shutil.copytree(pair, tmp_path / "run"))
    old, new = checkpoints.complete(run_dir / "checkpoints")
    change, name = DAMAGE[damage]
    change(new, old)
    sentence = refused(config, run_dir)
    assert name in sentence.partition("; ")[0]
    assert "bytes" in sentence or damage not in ("agent cut", "agent longer", "lane cut")
    assert sentence.endswith(f"; an older one is whole: --resume {old}")
    (old / "agent.safetensors").unlink()
    assert "whole" not in refused(config, run_dir)


def test_it_is_said_by_launch_and_evaluate(pair: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(OLD_RUN, tmp_path / "run"))
    old = checkpoints.find(run_dir)
    assert old is not None
    new = Path(shutil.copytree(old, old.with_name("00000085-00000100")))
    state = new / "state.json"
    state.write_text(state.read_text().replace('"learner_updates": [84]', '"learner_updates": [85]'))
    os.truncate(new / "agent.safetensors", 5000)
    for command, option in (("launch", "--resume"), ("evaluate", "--checkpoint")):
        limit = ["--max-decisions", "900"] if command == "launch" else ["--episodes", "1"]
        done = call(command, option, str(run_dir), *limit)
        assert done.code == 2
        assert f"{new}/agent.safetensors" in done.stderr
        assert done.stderr.endswith(f"; an older one is whole: {option} {old}\n")
    assert new.is_dir()


def resign(checkpoint: Path) -> None:
    """Make a checkpoint's hashes right, as somebody does who means harm."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    for name in state["files"]:
        content = (checkpoint / name).read_bytes()
        state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(state | {"sha256": checkpoints._digest(state)}))


ROWS: dict[str, tuple[str, Any]] = {
    "reward nan": ("reward", np.nan),
    "reward inf": ("reward", -np.inf),
    "reward too large": ("reward", 3e38),
    "state nan": ("state", np.nan),
    "noise nan": ("noise", np.nan),
    "no steps": ("steps", 0),
    "steps negative": ("steps", -5),
    "version negative": ("policy_version", -1),
    "terminal neither": ("terminal", 2),
    "complete neither": ("complete", 2),
    "nothing pending": ("complete", True),
}


@pytest.mark.parametrize("what", ROWS)
def test_rows_that_cannot_be_are_refused_though_the_hashes_are_right(
    config: Config, pair: Path, tmp_path: Path, what: str
) -> None:
    run_dir = Path(shutil.copytree(pair, tmp_path / "run"))
    new = checkpoints.complete(run_dir / "checkpoints")[-1]
    rows, (name, value) = load_file(new / LANE), ROWS[what]
    rows[name] = rows[name].copy()
    column = rows[name].view(np.uint8) if rows[name].dtype == bool else rows[name]
    column[-1 if value is True else 0] = value
    if value is True:
        rows["steps"] = np.maximum(rows["steps"], 1)
    save_file(rows, new / LANE)
    resign(new)
    assert f"{LANE} is damaged" in refused(config, run_dir)


COLUMNS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "missing": lambda rows: rows.pop("steps"),
    "dtype": lambda rows: rows.update(steps=rows["steps"].astype(np.int64)),
    "shape": lambda rows: rows.update(noise=rows["noise"][:, :-1].copy()),
    "length": lambda rows: rows.update(reward=rows["reward"][:-1].copy()),
    "no complete": lambda rows: rows.pop("complete"),
    "scalar": lambda rows: rows.update(complete=np.array(True)),
}


@pytest.mark.parametrize("what", COLUMNS)
def test_columns_that_do_not_fit_are_refused(config: Config, pair: Path, tmp_path: Path, what: str) -> None:
    run_dir = Path(shutil.copytree(pair, tmp_path / "run"))
    new = checkpoints.complete(run_dir / "checkpoints")[-1]
    rows = load_file(new / LANE)
    COLUMNS[what](rows)
    save_file(rows, new / LANE)
    resign(new)
    assert f"{LANE}: rows of" in refused(config, run_dir)


@pytest.mark.parametrize(
    "name", ["actor.flat", "critic.flat", "target_critic.flat", "alpha.raw", "critic.adam.exp_avg_sq"]
)
def test_an_agent_that_is_not_finite_is_refused_also_where_an_earlier_version_wrote_it(
    config: Config, pair: Path, tmp_path: Path, name: str
) -> None:
    run_dir = Path(shutil.copytree(pair, tmp_path / "run"))
    new = checkpoints.complete(run_dir / "checkpoints")[-1]
    tensors = {key: tensor.copy() for key, tensor in load_file(new / "agent.safetensors").items()}
    tensors[name].reshape(-1)[-1] = np.inf
    save_file(tensors, new / "agent.safetensors")
    state = json.loads((new / "state.json").read_text())
    del state["files"], state["sha256"], state["replay"]
    (new / "state.json").write_text(json.dumps(state))
    assert f"agent.safetensors cannot be used: its {name} is not finite, or beyond" in refused(config, run_dir)


# state.json, whatever is in it

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(2**63) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, held in inner for deeper in places(held, (*path, key)))]


def put(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`state` with something else at one place, or nothing if `value` is Ellipsis."""
    if not path:
        return None if value is ... else value
    state = copy.copy(state)
    if value is ... and len(path) == 1:
        del state[path[0]]
    else:
        state[path[0]] = put(state[path[0]], path[1:], value)
    return state


@pytest.fixture(scope="module")
def mutants(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints to mutate: one of today, and one from before there were hashes."""
    directory = tmp_path_factory.mktemp("mutants")
    originals = [checkpoints.complete(run / "checkpoints")[-1] for run in (pair, OLD_RUN)]
    return [Path(shutil.copytree(path, directory / str(number) / path.name)) for number, path in enumerate(originals)]


@settings(max_examples=int(os.environ.get("DSRL_FUZZ_EXAMPLES", "60")), deadline=None)
@given(data=st.data())
def test_a_state_with_anything_in_it_is_taken_or_refused_in_one_sentence(
    config: Config, mutants: list[Path], data: st.DataObject
) -> None:
    checkpoint = data.draw(st.sampled_from(mutants))
    path = checkpoint / "state.json"
    original = path.read_bytes()
    state = json.loads(original)
    for _ in range(data.draw(st.integers(1, 2))):
        state = put(state, data.draw(st.sampled_from(places(state))), data.draw(st.just(...) | VALUES))
    if data.draw(st.booleans()) and isinstance(state, dict) and "sha256" in state:
        state["sha256"] = checkpoints._digest(state)  # by somebody who means harm
    arena = create_memory(config, environment_spec(config.env.model_dump()), HORIZON)
    counters, sentence = Counters(arena), ""
    try:
        path.write_text(json.dumps(state))
        checkpoints.complete(checkpoint.parent)
        checkpoints.restore_counters(checkpoints.read_state(checkpoint), counters)
    except ValueError as error:
        sentence = str(error)
    finally:
        path.write_bytes(original)
    assert "\n" not in sentence
    assert len(sentence) < 1000
    assert counters.decisions() >= 0
    assert np.isfinite(counters.control_wall_s).all()
    arena.close()  # or tens of thousands of examples run out of descriptors


def test_a_state_with_any_byte_changed_or_cut_off_there_is_refused(mutants: list[Path]) -> None:
    """Names, too: without its `files`, a checkpoint would look like one from before there were hashes."""
    path = mutants[0] / "state.json"
    original = path.read_bytes()
    try:
        for position, byte in enumerate(original):
            for rest in [bytes([byte ^ 1]) + original[position + 1 :], b""][: 1 + (position % 16 == 0)]:
                path.write_bytes(original[:position] + rest)
                with pytest.raises(ValueError) as caught:  # noqa: PT011 (any sentence)
                    checkpoints.read_state(mutants[0])
                assert "\n" not in str(caught.value)
    finally:
        path.write_bytes(original)


def test_a_run_that_saved_nothing_is_told_so_whichever_way_it_is_opened(tmp_path: Path) -> None:
    """And not sent from --run-dir to --resume and back."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD_RUN / "config.yaml", run_dir)
    with pytest.raises(ValueError, match="delete it: nothing was saved there") as caught:
        open_run_directory(validate({"run_dir": str(run_dir)}))
    assert "--resume" not in str(caught.value)
    done = call("launch", "--resume", str(run_dir))
    assert done.code == 2
    assert "nothing was saved there to continue from; delete it, and start a new run" in done.stderr
