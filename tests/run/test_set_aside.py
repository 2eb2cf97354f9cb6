"""`--resume RUN/checkpoints/OLDER`: what is newer is set aside, its points are taken back, and nothing is deleted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import call
from support.launched import SMALL, Launched, state_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.config.command_line import load_config
from dsrl_async.config.settings import ConfigError
from dsrl_async.run import checkpoints
from dsrl_async.run.set_aside import chosen, set_aside

NAMES = ("00000004-00000020", "00000010-00000026", "00000010-00000027", "00000030-00000046")


def write_run(run_dir: Path) -> Path:
    """A run directory as far as one has to look into it to choose a checkpoint."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("actors: 1\n")
    for name in NAMES:
        updates, decisions = map(int, name.split("-"))
        counters: dict[str, list[float]] = {key: [decisions] for key in (*checkpoints.KEPT, *checkpoints.SUMMED)}
        counters["learner_updates"], counters["control_wall_s"] = [updates], [1.0]
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        state = {"format": checkpoints.FORMAT, "lanes": 1, "counters": counters}
        (run_dir / "checkpoints" / name / "state.json").write_text(json.dumps(state))
        (run_dir / "checkpoints" / name / "agent.safetensors").write_text(name)
    return run_dir


def linked(target: Path, link: Path) -> Path:
    link.symlink_to(target)
    return link


def moved_away(run_dir: Path) -> Path:
    """The checkpoints lie elsewhere, beside another run's configuration."""
    archive = run_dir.parent / "archive"
    archive.mkdir()
    (archive / "config.yaml").write_text("actors: 99\n")
    shutil.move(run_dir / "checkpoints", archive / "checkpoints")
    return linked(archive / "checkpoints", run_dir / "checkpoints") / NAMES[1]


WAYS: dict[str, Callable[[Path], Path | str]] = {
    "plain": lambda run: run / "checkpoints" / NAMES[1],
    "trailing slash": lambda run: f"{run}/checkpoints/{NAMES[1]}/",
    "relative": lambda run: os.path.relpath(run / "checkpoints" / NAMES[1]),
    "through another": lambda run: f"{run}/checkpoints/{NAMES[0]}/../{NAMES[1]}",
    "link to it": lambda run: linked(run / "checkpoints" / NAMES[1], run.parent / "good"),
    "link beside it": lambda run: linked(run / "checkpoints" / NAMES[1], run / "checkpoints" / "good"),
    "link to the run": lambda run: linked(run, run.parent / "latest") / "checkpoints" / NAMES[1],
    "checkpoints elsewhere": moved_away,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_found_in_its_run_however_it_is_named(tmp_path: Path, way: str) -> None:
    run_dir = write_run(tmp_path / "run")
    given = WAYS[way](run_dir)
    config = load_config(["--resume", str(given)])
    assert config.actors == 1
    assert config.run_dir is not None
    assert config.resume == str(given)
    found, named = chosen(Path(config.run_dir), Path(config.resume))
    assert named
    assert found is not None
    assert found.name == NAMES[1]
    assert found.samefile(run_dir / "checkpoints" / NAMES[1])
    aside, moved = set_aside(Path(config.run_dir), found)
    assert [path.name for path in moved] == list(NAMES[2:])
    assert sorted(os.listdir(aside)) == list(NAMES[2:])
    assert checkpoints.find(run_dir) == (run_dir / "checkpoints" / NAMES[1])


def test_from_inside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = write_run(tmp_path / "run")
    for place, given, name in (("checkpoints", NAMES[0], NAMES[0]), (f"checkpoints/{NAMES[0]}", ".", NAMES[0])):
        monkeypatch.chdir(run_dir / place)
        config = load_config(["--resume", given])
        assert Path(config.run_dir or "").samefile(run_dir)
        found, named = chosen(Path(config.run_dir or ""), Path(given))
        assert named
        assert found is not None
        assert found.name == name
    for given, place in ((".", "."), ("checkpoints", "."), ("..", "checkpoints")):
        monkeypatch.chdir(run_dir / place)
        config = load_config(["--resume", given])
        found, named = chosen(Path(config.run_dir or ""), Path(given))
        assert not named
        assert found is not None
        assert found.samefile(run_dir / "checkpoints" / NAMES[-1])


@pytest.mark.parametrize("name", ["notes", f"{NAMES[0]}.bak", "set-aside-1/" + NAMES[0], "5-6", "nothing"])
def test_what_is_no_checkpoint_of_the_run_is_refused(tmp_path: Path, name: str) -> None:
    run_dir = write_run(tmp_path / "run")
    given = run_dir / "checkpoints" / name
    if name != "nothing":
        shutil.copytree(run_dir / "checkpoints" / NAMES[0], given)
    if name.startswith("set-aside"):
        with pytest.raises(ConfigError, match=r"^--resume .*: not a run directory.* nor a checkpoint in one"):
            load_config(["--resume", str(given)])
        return
    config = load_config(["--resume", str(given)])
    with pytest.raises(
        ValueError, match=rf"^--resume {given}: it is not one of the checkpoints of {run_dir}"
    ) as caught:
        chosen(Path(config.run_dir or ""), given)
    assert "\n" not in str(caught.value)


def test_nothing_is_lost_when_it_ends_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = write_run(tmp_path / "run")
    root = run_dir / "checkpoints"
    checkpoints.recovery_path(run_dir).write_text("recovery")
    rename = Path.rename
    renamed: list[str] = []

    def rename_two(path: Path, to: Path) -> Path:
        if len(renamed) == 2:
            raise OSError("killed")
        renamed.append(path.name)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_two)
    with pytest.raises(OSError, match="killed"):
        set_aside(run_dir, root / NAMES[0])
    monkeypatch.undo()
    assert renamed == ["recovery.safetensors", NAMES[1]]
    assert checkpoints.find(run_dir) == root / NAMES[-1]
    aside, moved = set_aside(run_dir, root / NAMES[0])
    assert [path.name for path in moved] == list(NAMES[2:])
    assert checkpoints.find(run_dir) == root / NAMES[0]
    kept = {path.parent.name: path.read_text() for path in root.rglob("agent.safetensors")}
    assert kept == {name: name for name in NAMES}
    assert [path.read_text() for path in root.rglob("recovery.safetensors")] == ["recovery"]
    shutil.move(aside / NAMES[-1], root)
    assert checkpoints.find(run_dir) == root / NAMES[-1]


def test_the_newest_sets_nothing_aside(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    aside, moved = set_aside(run_dir, run_dir / "checkpoints" / NAMES[-1])
    assert moved == []
    assert not aside.exists()


# ---- real runs


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process with several checkpoints."""
    run_dir = tmp_path_factory.mktemp("long") / "run"
    often = ["--checkpoint.interval-minutes", "0.002", "--checkpoint.keep", "1000"]
    result = Launched(run_dir, *SMALL, "--serial", "--max-decisions", "150", *often).finish(120)
    assert result["returncode"] == 0, result["stderr"]
    assert len(checkpoints.complete(run_dir / "checkpoints")) > 4
    return run_dir


def decisions_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def middle(run_dir: Path) -> Path:
    """A checkpoint from after the warm-up with others before and behind it."""
    found = checkpoints.complete(run_dir / "checkpoints")
    return next(path for path in found[1:-2] if decisions_of(path) > 50)


def test_a_run_goes_on_from_an_older_checkpoint(tmp_path: Path, long_run: Path) -> None:
    run_dir = Path(shutil.copytree(long_run, tmp_path / "run"))
    older, before = middle(run_dir), checkpoints.complete(run_dir / "checkpoints")
    newer = before[before.index(older) + 1 :]
    limit = decisions_of(older) + 20
    assert limit < 150
    agents = {path.name: (path / "agent.safetensors").read_bytes() for path in newer}
    lines = (run_dir / "metrics.jsonl").read_text()
    env_steps = sum(json.loads((older / "state.json").read_text())["counters"]["actor_env_steps"])
    result = Launched(run_dir, "--resume", f"{older}/", "--max-decisions", str(limit)).finish(120)
    assert result["returncode"] == 0, result["stderr"]
    assert result["decisions"] == limit
    assert result["resumed"] == {"from": str(older), "changes": [f"max_decisions 150 -> {limit}"]}
    assert json.loads((run_dir / "summary.json").read_text())["resumed"] == result["resumed"]
    (aside,) = (run_dir / "checkpoints").glob("set-aside-*")
    assert {path.parent.name: path.read_bytes() for path in aside.rglob("agent.safetensors")} == agents
    assert sum(state_of(run_dir)["counters"]["actor_decisions"]) == limit
    # The curves: what lay beyond is gone from the run and kept aside; nothing is there twice.
    now = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("decisions", "env_steps", "updates", "episodes", "wall_s", "time"):
        assert [line[name] for line in now] == sorted(line[name] for line in now), name
    assert max(line["decisions"] for line in now) == limit
    cut = (aside / "metrics.jsonl").read_text()
    assert lines.endswith(cut)
    assert json.loads(cut.splitlines()[-1])["decisions"] == 150
    assert all(json.loads(line)["env_steps"] >= env_steps for line in cut.splitlines())
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert len(os.listdir(run_dir / "tensorboard")) == 2
    for tag in events.Tags()["scalars"]:
        steps = [point.step for point in events.Scalars(tag)]
        assert steps == sorted(steps), tag
        assert max(steps) <= now[-1]["env_steps"], tag
    episodes = [point.step for point in events.Scalars("env/success_once")]
    assert len(set(episodes)) == len(episodes)
    # Once more, from what counts now.
    again = Launched(run_dir, "--resume", str(run_dir), "--max-decisions", str(limit + 4)).finish(120)
    assert again["decisions"] == limit + 4
    assert again["wall_s"] > result["wall_s"]


def test_nothing_is_set_aside_before_all_checks_have_passed(tmp_path: Path, long_run: Path) -> None:
    run_dir = Path(shutil.copytree(long_run, tmp_path / "run"))
    older = middle(run_dir)
    (older / "replay" / "lane-0001.safetensors").write_bytes(b"damaged")
    listed = sorted(os.listdir(run_dir / "checkpoints"))
    lines = (run_dir / "metrics.jsonl").read_bytes()
    for options, message in (
        (["--sac.image-range", "minus_one_one"], "sac.image_range: the resumed run was made with zero_one"),
        (["--policy.action-horizon", "8"], "is not the policy that the resumed run was made with"),
        (["--max-decisions", "3"], "are done already"),
        (["--max-decisions", "900"], "lane-0001.safetensors"),
    ):
        done = call("launch", "--resume", str(older), *options)
        assert done.code == 2, done.stderr
        assert message in done.stderr
        assert sorted(os.listdir(run_dir / "checkpoints")) == listed
        assert (run_dir / "metrics.jsonl").read_bytes() == lines
