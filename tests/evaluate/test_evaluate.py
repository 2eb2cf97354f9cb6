"""Evaluation: which episodes are played and by whom, that nothing is lost or mixed up, what is reported."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.commands import call
from support.launched import FinishedRun
from support.paths import CONFIGS, FIXTURES
from support.planted import Planted

import dsrl_async
from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import ChunkOutcome, libero_files
from dsrl_async.envs.recording import RecordingEnvironment, unsorted_film
from dsrl_async.evaluate import resolve as resolving
from dsrl_async.evaluate.command import build_parser, main
from dsrl_async.evaluate.films import FILMED_PER_VIDEO, Films, choose_films
from dsrl_async.evaluate.resolve import (
    Evaluation,
    base_settings,
    identify_files,
    identity,
    named_suites,
    resolve,
    resolve_all,
    settings_for_suite,
)
from dsrl_async.evaluate.results import (
    Outcome,
    ResultDirectory,
    check_parent,
    comparison,
    summarise,
    summarise_tasks,
    table,
)
from dsrl_async.pi0 import synthetic
from dsrl_async.run import checkpoints
from dsrl_async.run.evaluation.episodes import Episode, Schedule, across_tasks, parse_numbers, plan_episodes
from dsrl_async.run.evaluation.results import wilson_interval

needs_libero = pytest.mark.skipif(
    find_spec("libero") is None or find_spec("robosuite") is None, reason="pip install -e '.[libero]'"
)

SMALL_LIBERO = CONFIGS / "libero_spatial_small.yaml"
SMALL_LIBERO_POLICY = Path(dsrl_async.__file__).parent / "assets" / "libero_spatial_pi0_small"


def resolved(*options: str) -> Evaluation:
    return resolve(build_parser().parse_args(options))


# Which episodes


def test_a_profiled_run_is_evaluated_without_a_profile(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("profile: true")
    evaluation = resolve(build_parser().parse_args(["--config", str(tmp_path / "run.yaml")]))
    assert not evaluation.config.profile


def test_a_suite_is_every_initial_state_of_every_task_once() -> None:
    planned = plan_episodes([50] * 10, range(10), None, None)
    assert planned == [Episode(50 * task + state, task, state) for task in range(10) for state in range(50)]


def test_fewer_episodes_are_spread_over_the_tasks_and_more_go_round_again() -> None:
    few = plan_episodes([50] * 10, range(10), None, 103)
    assert Counter(episode.task for episode in few) == Counter({task: 10 + (task < 3) for task in range(10)})
    assert [episode.init_state for episode in few if episode.task == 9] == list(range(10))
    again = plan_episodes([50] * 10, [0, 3], [40, 41], 6)
    scenes = [(episode.task, episode.init_state) for episode in again]
    assert scenes == [(task, state) for task in (0, 3) for state in (40, 41, 40)]
    assert len({episode.number for episode in again}) == 6


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    data=st.data(),
    episodes=st.none() | st.integers(1, 60),
)
def test_a_number_means_the_same_scene_whatever_is_chosen(
    counts: list[int], data: st.DataObject, episodes: int | None
) -> None:
    """The environment takes scene `number % total` of all, as `env.scene_order` cycled does."""
    tasks = data.draw(st.lists(st.sampled_from(range(len(counts))), min_size=1, unique=True))
    scenes = [(task, state) for task, count in enumerate(counts) for state in range(count)]
    planned = plan_episodes(counts, tasks, None, episodes)
    assert (
        len({episode.number for episode in planned})
        == len(planned)
        == (episodes or sum(counts[task] for task in tasks))
    )
    for episode in planned:
        assert scenes[episode.number % len(scenes)] == (episode.task, episode.init_state)


@pytest.mark.parametrize(("text", "numbers"), [("0,3", [0, 3]), ("40-43", [40, 41, 42, 43]), ("7, 1-2,1", [1, 2, 7])])
def test_lists_of_numbers(text: str, numbers: list[int]) -> None:
    assert parse_numbers("--tasks", text) == numbers


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", "5-4", "1.5"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--tasks: .*write"):
        parse_numbers("--tasks", text)


# Who plays what


@settings(deadline=None)
@given(
    episodes=st.lists(st.integers(0, 5), max_size=60).map(
        lambda tasks: [Episode(number, task, None) for number, task in enumerate(tasks)]
    ),
    lanes=st.integers(1, 8),
    data=st.data(),
)
def test_every_episode_is_played_once_in_whatever_order_processes_finish(
    episodes: list[Episode], lanes: int, data: st.DataObject
) -> None:
    schedule = Schedule(episodes)
    waiting, played = list(range(lanes)), []
    while waiting:
        lane = data.draw(st.sampled_from(waiting))
        episode = schedule.next(lane)
        if episode is None:
            waiting.remove(lane)
        else:
            played.append(episode)
    assert sorted(played) == episodes


def loads(schedule: Schedule, lengths: dict[int, int], lanes: int) -> tuple[int, int]:
    """Scenes compiled, and the time until all is played, where episodes of a task take `lengths` steps."""
    task_of: dict[int, int] = {}
    compiled = 0
    free_at = dict.fromkeys(range(lanes), 0)
    end = 0
    while free_at:
        lane = min(free_at, key=lambda lane: free_at[lane])
        episode = schedule.next(lane)
        if episode is None:
            del free_at[lane]
            continue
        compiled += task_of.get(lane) != episode.task
        task_of[lane] = episode.task
        free_at[lane] += lengths[episode.task]
        end = max(end, free_at[lane])
    return compiled, end


def test_processes_keep_their_task_and_help_at_the_end() -> None:
    episodes = plan_episodes([50] * 10, range(10), None, None)
    lengths = {task: 80 + 20 * (task % 4) for task in range(10)}
    work = sum(50 * lengths[task] for task in range(10))
    assert loads(Schedule(episodes), lengths, 1) == (10, work)
    for lanes in (2, 3, 4, 16):
        compiled, end = loads(Schedule(episodes), lengths, lanes)
        assert compiled <= 10 + 4 * lanes  # one by one over all tasks it would be hundreds
        assert end <= 1.05 * work / lanes + max(lengths.values())


# What is reported


def outcome(number: int, success: bool = True, task: int = 0, steps: int = 10) -> Outcome:
    return Outcome(number, task, number % 50, 1000 + number, success, steps, 0.5)


def test_summary_by_task_and_its_table() -> None:
    outcomes = [outcome(0, task=2), outcome(1, False, task=2, steps=30), outcome(2, task=0)]
    tasks = summarise_tasks(outcomes, ["first", "second", "third"])
    assert [(task["task"], task["instruction"]) for task in tasks] == [(0, "first"), (2, "third")]
    assert tasks[1] | {"ci95_low": 0, "ci95_high": 0} == {
        **{"task": 2, "instruction": "third", "episodes": 2, "successes": 1, "success_rate": 0.5},
        **{"ci95_low": 0, "ci95_high": 0, "mean_episode_len": 20.0},
    }
    console = Console(file=io.StringIO(), width=120)
    console.print(table({**summarise(outcomes), "tasks": tasks}))
    assert isinstance(console.file, io.StringIO)
    rows = {line.split("│")[1].strip(): line for line in console.file.getvalue().splitlines() if "│" in line}
    assert "1/2" in rows["2"]
    assert "50.0%" in rows["2"]
    assert "2/3" in rows["all"]
    assert "16.7" in rows["all"]  # mean steps


def test_wilson_interval_has_published_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17: 857-872, table I, method 3
    for successes, episodes, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        found = wilson_interval(successes, episodes)
        assert np.round(found, 4).tolist() == [low, high]


def test_weights_are_told_apart_by_digest_or_where_large_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"abc")
    (entry,) = identify_files([file])
    assert entry["bytes"] == 3
    assert entry["sha256"].startswith("ba7816bf")
    monkeypatch.setattr(resolving, "DIGEST_BYTES", 2)
    (entry,) = identify_files([file])
    assert "sha256" not in entry
    assert entry["modified"].startswith("20")


# The directory

SETTINGS = {"seed": 0, "env": {"name": "tabletop", "render_quality": "fast"}}


def written(directory: Path, *numbers: int) -> None:
    out = ResultDirectory(directory, SETTINGS)
    for number in numbers:
        out.add(outcome(number))
    out.close()


def test_the_same_evaluation_goes_on(tmp_path: Path) -> None:
    written(tmp_path / "new", 4, 2)
    written(tmp_path / "new", 1)
    out = ResultDirectory(tmp_path / "new", SETTINGS)
    assert list(out.outcomes.values()) == [outcome(4), outcome(2), outcome(1)]
    out.close()


@pytest.mark.parametrize("lost", range(1, len(json.dumps(outcome(2)._asdict())) + 2, 13))
def test_a_torn_last_line_costs_that_episode_only(tmp_path: Path, lost: int) -> None:
    written(tmp_path, 4, 2)
    lines = tmp_path / "episodes.jsonl"
    lines.write_bytes(lines.read_bytes()[:-lost])
    written(tmp_path, 7)
    out = ResultDirectory(tmp_path, SETTINGS)
    assert list(out.outcomes) == [4, 7]
    out.close()


def test_a_damaged_line_before_the_last_is_reported(tmp_path: Path) -> None:
    written(tmp_path, 4, 2)
    lines = tmp_path / "episodes.jsonl"
    lines.write_bytes(b"?" + lines.read_bytes()[1:])
    with pytest.raises(ConfigError, match="line 1 of episodes"):
        ResultDirectory(tmp_path, SETTINGS)


def test_another_evaluation_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 1)
    for other, words in (
        ({**SETTINGS, "seed": 1}, "seed 0, which is now 1"),
        ({"seed": 0, "env": {"name": "tabletop", "render_quality": "exact"}}, "env.render_quality fast, .* exact"),
        ({"seed": 0, "env": {"name": "tabletop"}}, "env.render_quality fast, .* null"),
        ({**SETTINGS, "suite": "new"}, "suite null, which is now new"),
    ):
        with pytest.raises(ConfigError, match=words):
            ResultDirectory(tmp_path, other)
    written(tmp_path, 2)


def test_a_directory_in_use_or_of_something_else_is_refused(tmp_path: Path) -> None:
    out = ResultDirectory(tmp_path / "one", SETTINGS)
    with pytest.raises(ConfigError, match="another evaluation is writing"):
        ResultDirectory(tmp_path / "one", SETTINGS)
    out.close()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no evaluation"):
        ResultDirectory(tmp_path / "two", SETTINGS)
    with pytest.raises(ConfigError, match="cannot write"):
        ResultDirectory(tmp_path / "two" / "thesis.tex", SETTINGS)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["thesis.tex"]


# Films


@pytest.mark.parametrize(
    ("filmed", "kept"),
    [
        ({5: True, 6: True, 7: True, 8: False, 9: False, 10: False}, {5, 6, 8, 9}),
        ({5: True, 6: True, 7: True, 8: True, 9: False}, {5, 6, 7, 9}),
        ({5: False, 6: False, 7: False, 8: False, 9: False}, {5, 6, 7, 8}),
        ({5: True}, {5}),
        ({}, set()),
    ],
)
def test_films_of_both_kinds_are_kept(filmed: dict[int, bool], kept: set[int]) -> None:
    chosen = choose_films(filmed, 4)
    assert set(chosen) == kept
    assert len(chosen) == len(kept)


def test_filming_stops_when_there_is_enough_and_is_taken_up_again(tmp_path: Path) -> None:
    numbers = list(range(100))
    films = Films(tmp_path, 2, numbers)
    assert [number for number in numbers if films.wanted(number)] == numbers[: 2 * FILMED_PER_VIDEO]
    assert films.plan(numbers[3:]).startswith(
        "films: up to 5 episodes are filmed, each of which takes longer, to keep 2,"
    )
    unsorted_film(tmp_path, 0).parent.mkdir()
    for number, success in ((0, True), (1, True), (3, False)):
        assert films.wanted(number)
        unsorted_film(tmp_path, number).touch()
        films.add(number, success)
    assert not films.wanted(4)
    assert not films.plan(numbers)
    after = Films(tmp_path, 2, numbers)
    after.resume({number: outcome(number, number != 3) for number in (0, 1, 3, 90)})
    assert not after.wanted(4)
    after.keep({number: outcome(number, number != 3) for number in numbers})
    names = ["episode-0000-task-0-init-0-success.mp4", "episode-0003-task-0-init-3-failure.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_films_need_a_directory_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--video: cannot write to .*file"):
        Films(tmp_path / "file", 2, [0])


def test_first_films_are_of_different_tasks() -> None:
    numbers = [episode.number for episode in across_tasks(plan_episodes([50] * 3, [2, 0, 1], None, None))]
    assert numbers[:4] == [0, 50, 100, 1]
    assert len(set(numbers)) == 150


class CountingEnvironment:
    """Its picture tells the step; it succeeds in step 7."""

    spec = dataclasses.make_dataclass("Spec", ["cameras"])(2)

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, seed: int, number: int = 0) -> int:
        self.steps = 0
        return 0

    def step_chunk(self, action_chunk: np.ndarray) -> ChunkOutcome:
        for index in range(len(action_chunk)):
            self.steps += 1
            if self.steps == 7:
                return ChunkOutcome(index + 1, index, True, False)
        return ChunkOutcome(len(action_chunk), -1, False, False)

    def render(self, size: int, camera: int) -> np.ndarray:
        return np.full((size, size, 3), 30 * self.steps + camera, np.uint8)

    def close(self) -> None:
        pass


def test_films_show_every_step_of_all_cameras_in_real_time_and_change_nothing(tmp_path: Path) -> None:
    chunks = np.zeros((2, 5, 7), np.float32)
    wanted = iter([False, True])
    environment = RecordingEnvironment(CountingEnvironment(), lambda: next(wanted), tmp_path, rate_hz=20)
    outcomes = []
    for _ in range(2):
        environment.reset(0, number=12)
        outcomes.append([environment.step_chunk(chunk) for chunk in chunks])
    assert outcomes[0] == outcomes[1]
    assert [path.name for path in (tmp_path / ".unsorted").iterdir()] == ["12.mp4"]
    content = unsorted_film(tmp_path, 12).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # a browser shows it before all of it is there
    with av.open(unsorted_film(tmp_path, 12)) as film:
        (stream,) = film.streams
        assert isinstance(stream, av.VideoStream)
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 20)
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
    assert frames[0].shape == (256, 512, 3)
    brightness = [float(frame[:, :256].mean()) / 30 for frame in frames]
    assert np.abs(np.array(brightness) - [*range(8), *[7] * 10]).max() < 0.2


@pytest.mark.parametrize(
    ("hidden", "options", "words"),
    [
        ("av", [], r"--video: films need PyAV, which is not installed; pip install .*\[video\]"),
        ("av.codec", [], r"--video: films need PyAV, which cannot be loaded \(.*av.codec.*\); pip install .*\[video\]"),
        (None, [], "--video: films need PyAV with the encoder none-such, which this one lacks"),
        ("av", ["--videos", "0"], "--videos: 0 films are none"),
    ],
)
def test_films_that_cannot_be_made_are_refused_at_once(
    hidden: str | None, options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "av"] if hidden else ():
        monkeypatch.delitem(sys.modules, name)
    if hidden:
        monkeypatch.setitem(sys.modules, hidden, None)
    else:
        monkeypatch.setattr("dsrl_async.envs.recording.ENCODER", "none-such")
    with pytest.raises(ConfigError, match=f"^{words}"):  # before it has noticed that there is no such run
        main(["--checkpoint", str(tmp_path / "missing"), "--video", str(tmp_path / "films"), *options])
    assert not (tmp_path / "films").exists()


# The command


def test_no_command_needs_an_extra() -> None:
    """The modules that only extras bring are hidden."""
    code = """
import importlib, sys
extras = "av fast_simplification scipy h5py robosuite bddl gymnasium cupy matplotlib sentencepiece"
sys.modules.update(dict.fromkeys(extras.split()))
for name in ("launch", "evaluate", "doctor", "plan", "bench"):
    importlib.import_module(f"dsrl_async.{name}.command")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_settings_of_a_run_are_options_here_too() -> None:
    options = ["--policy.denoise-steps", "3", "--env.layout", "fixed", "--env.max_episode_steps", "20"]
    evaluation = resolve(build_parser().parse_args(options))
    assert (evaluation.config.policy.denoise_steps, evaluation.config.env.layout) == (3, "fixed")
    assert evaluation.config.env.max_episode_steps == 20
    assert evaluation.episodes == [Episode(number, 0, None) for number in range(100)]


@needs_libero
def test_what_a_suite_plays_and_what_its_configuration_plays(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "env: {name: libero_goal, task_ids: [3], init_states: [1, 2], preset: rlinf, max_episode_steps: 99, "
        "image_size: 96, render_quality: fast}\n"
        f"policy: {{checkpoint: {SMALL_LIBERO_POLICY}}}\n"
    )

    def planned(*options: str) -> tuple[str, set[int | None], set[int | None], int]:
        evaluation = resolve(build_parser().parse_args(["--config", str(config), *options]))
        assert evaluation.config.env.preset == "rlinf"
        assert evaluation.config.env.task_ids is evaluation.config.env.init_states is None
        assert evaluation.config.env.scene_order == "cycled"
        tasks, states = ({episode[index] for episode in evaluation.episodes} for index in (1, 2))
        return evaluation.config.env.name, tasks, states, len(evaluation.episodes)

    assert planned() == ("libero_goal", {3}, {1, 2}, 2)
    assert planned("--init-states", "40-49") == ("libero_goal", {3}, set(range(40, 50)), 10)
    assert planned("--suite", "libero_goal") == ("libero_goal", set(range(10)), set(range(50)), 500)
    assert planned("--suite", "libero_spatial", "--episodes", "100")[1:] == (set(range(10)), set(range(10)), 100)
    assert planned("--suite", "libero_goal", "--tasks", "1,2", "--init-states", "5") == ("libero_goal", {1, 2}, {5}, 2)
    for options, words in (
        (["--tasks", "10"], "tasks 0 to 9, not 10"),
        (["--init-states", "50"], "initial states 0 to 49, not 50"),
        (["--suite", "libero_goal", "--env.name", "tabletop"], "--suite"),
    ):
        with pytest.raises(ValueError, match=words):
            planned(*options)


@needs_libero
def test_another_suite_has_the_preset_s_number_of_steps() -> None:
    def steps(*options: str) -> int:
        policy = "--policy.checkpoint", str(SMALL_LIBERO_POLICY)
        settings: dict[str, Any] = identity(resolved("--config", str(SMALL_LIBERO), *policy, *options))
        number: int = settings["env"]["max_episode_steps"]
        return number

    assert steps("--env.preset", "lerobot") == 220  # the file's
    assert steps("--env.preset", "lerobot", "--suite", "libero_spatial") == 220
    assert steps("--suite", "libero_10") == 520
    assert steps("--suite", "libero_10", "--env.max-episode-steps", "30") == 30


@needs_libero
def test_episodes_that_would_only_be_repeated_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs between two episodes from one initial state: the noise, or the furniture's places."""
    (tmp_path / "config.yaml").write_text(SMALL_LIBERO.read_text())
    saved = tmp_path / "checkpoints" / "1-1"
    monkeypatch.setattr(checkpoints, "find", lambda path: saved)
    one_state = ["--checkpoint", str(tmp_path), "--init-states", "40", "--policy.checkpoint", str(SMALL_LIBERO_POLICY)]

    for options in (
        ["--episodes", "1"],
        ["--episodes", "3", "--noise", "stochastic"],
        ["--episodes", "3", "--base"],
        ["--episodes", "3", "--env.seeding", "episode"],
        ["--episodes", "3", "--env.preset", "lerobot"],
    ):
        resolved(*one_state, *options)
    for options, advice in (
        ([], "--noise stochastic, or --env.seeding episode, or at most --episodes 1$"),
        (["--env.preset", "rlinf"], "--env.seeding episode"),
        # Nothing stands in these scenes but what the initial states place.
        (["--suite", "libero_object", "--env.seeding", "episode"], "--noise stochastic, or at most --episodes 10$"),
    ):
        with pytest.raises(ConfigError, match=f"^--episodes: 11 are more than the 1?[01] scenes.*{advice}"):
            resolved(*one_state, "--episodes", "11", *options)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dsrl_async.evaluate", *arguments]


def run(*arguments: str) -> dict[str, Any]:
    return call("evaluate", *arguments).result


def episodes_in(directory: Path) -> dict[int, list[Any]]:
    """All of each finished episode but the time it took."""
    lines = [json.loads(line) for line in (directory / "episodes.jsonl").read_text().splitlines()]
    assert len({line["number"] for line in lines}) == len(lines)
    return {line["number"]: [line[key] for key in line if key != "wall_s"] for line in lines}


QUICK = ("--policy.denoise-steps", "2", "--env.max-episode-steps", "30", "--seed", "7")


def test_two_processes_give_the_same_outcomes_as_one(tmp_path: Path) -> None:
    results = [
        run(*QUICK, "--episodes", "7", "--processes", number, "--out", str(tmp_path / number)) for number in ("1", "2")
    ]
    assert episodes_in(tmp_path / "1") == episodes_in(tmp_path / "2")
    assert results[0] | {"wall_s": 0} == results[1] | {"wall_s": 0}
    result = results[0]
    assert result["tasks"][0]["episodes"] == result["episodes"] == 7
    assert result["versions"].keys() >= {"dsrl_async", "python", "torch", "numpy", "mujoco"}
    assert len(result["settings"]["policy"]["files"][0]["sha256"]) == 64
    assert json.loads((tmp_path / "1" / "result.json").read_text()) == result
    # All is there: nothing is played again, and other settings are refused.
    again = call("evaluate", *QUICK, "--episodes", "7", "--out", str(tmp_path / "1"))
    assert again.result | {"wall_s": 0} == result | {"wall_s": 0}
    code, _, stderr = call("evaluate", *QUICK, "--episodes", "8", "--out", str(tmp_path / "1"))
    assert code == 2
    assert "begun with episodes 7" in stderr
    assert stderr.count("\n") == 1
    # An earlier version had other settings, and noted packages that this environment does not use.
    path = tmp_path / "1" / "settings.json"
    settings = json.loads(path.read_text())
    settings["versions"]["robosuite"] = "1.4.0"
    settings["env"]["gone"] = 3
    del settings["env"]["reward_rule"]
    path.write_text(json.dumps(settings))
    again = call("evaluate", *QUICK, "--episodes", "7", "--out", str(tmp_path / "1"))
    assert again.result | {"wall_s": 0} == result | {"wall_s": 0}
    options = ("--episodes", "7", "--env.reward-rule", "first_step", "--out", str(tmp_path / "1"))
    code, _, stderr = call("evaluate", *QUICK, *options)
    assert code == 2
    assert "begun with env.reward_rule chunk_success, which is now first_step" in stderr


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = [*QUICK, "--episodes", "12", "--processes", "2"]
    arguments += ["--out", str(tmp_path / "out"), "--video", str(tmp_path / "out" / "films"), "--videos", "2"]
    lines = tmp_path / "out" / "episodes.jsonl"
    begun = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not lines.is_file() or lines.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(begun.pid).children()
    begun.kill()
    begun.wait(60)
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    before = lines.read_bytes()
    assert before.count(b"\n") < 12
    interrupted = run(*arguments)
    assert lines.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert len(list((tmp_path / "out" / "films").glob("episode-*.mp4"))) == 2
    assert not (tmp_path / "out" / "films" / ".unsorted").exists()
    undisturbed = run(*QUICK, "--episodes", "12", "--processes", "1", "--out", str(tmp_path / "whole"))
    assert interrupted | {"wall_s": 0} == undisturbed | {"wall_s": 0}
    assert episodes_in(tmp_path / "out") == episodes_in(tmp_path / "whole")


def test_base_and_checkpoint_of_a_run(tmp_path: Path, finished_run: FinishedRun) -> None:
    arguments = ["--checkpoint", str(finished_run.run_dir), *QUICK, "--episodes", "3", "--processes", "2"]
    done = call("evaluate", *arguments, "--video", str(tmp_path / "video"), "--videos", "2")
    steered = done.result
    assert "films: up to 3 episodes are filmed" in done.stderr
    assert steered.keys() >= {"episodes", "successes", "success_rate", "ci95_low", "ci95_high", "policy"}
    assert steered["episodes"] == 3
    assert steered["ci95_low"] <= steered["success_rate"] <= steered["ci95_high"]
    assert len(list((tmp_path / "video").glob("episode-*.mp4"))) == len(list((tmp_path / "video").iterdir())) == 2
    assert len(steered["settings"]["agent_files"][0]["sha256"]) == 64
    base = run(*arguments, "--base")
    assert base["policy"] == "base"
    assert run(*arguments, "--base") | {"wall_s": 0} == base | {"wall_s": 0}


def test_both_policies_of_a_run_are_compared_and_an_interrupted_comparison_goes_on(
    tmp_path: Path, finished_run: FinishedRun
) -> None:
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(finished_run.run_dir), *QUICK, "--episodes", "2", "--processes", "2"]
    done = call("evaluate", *arguments, "--compare", "--out", str(out))
    results = done.result["suites"]["tabletop"]
    assert list(results) == ["base", "steered"]
    assert [result["settings"]["noise"] for result in results.values()] == ["base", "deterministic"]
    assert results["base"] | {"wall_s": 0} == run(*arguments, "--base") | {"wall_s": 0}
    for policy in results:
        assert json.loads((out / "tabletop" / policy / "result.json").read_text()) == results[policy]
    assert json.loads((out / "result.json").read_text()) == done.result
    assert "tabletop, steered policy" in done.stderr
    line = (out / "tabletop" / "steered" / "episodes.jsonl").read_text().splitlines(keepends=True)[0]
    (out / "tabletop" / "steered" / "episodes.jsonl").write_text(line)
    again = call("evaluate", *arguments, "--compare", "--out", str(out))
    for policy in results:
        assert again.result["suites"]["tabletop"][policy] | {"wall_s": 0} == results[policy] | {"wall_s": 0}
    assert (out / "tabletop" / "steered" / "episodes.jsonl").read_text().startswith(line)
    for options, words in (
        (["--compare", "--episodes", "3"], "begun with episodes 2"),  # before anything is played
        ([], "holds no evaluation; choose another"),
    ):
        code, _, stderr = call("evaluate", *arguments, *options, "--out", str(out))
        assert code == 2
        assert words in stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compare"], "--compare plays the base policy and the steered one; give the latter's run as --checkpoint"),
        (["--compare", "--base", "--checkpoint", "x"], "leave out --base"),
        (["--suite", "libero_goal,tabletop"], "--suite: 'tabletop' names no suite"),
        (["--suite", "libero_goal", "--suite", "nothing*"], r"--suite: 'nothing\*' names no suite"),
        (["--suite", "libero_goal,"], "--suite: '' names no suite"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libero_files, "suites", lambda: ("libero_goal", "libero_goal_swap"))
    with pytest.raises(ConfigError, match=words):
        resolve_all(build_parser().parse_args(options))


def test_suites_are_named_one_by_one_in_a_list_and_by_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    there_are = ("libero_spatial", "libero_goal", "libero_goal_lan", "libero_goal_swap", "libero_10", "libero_10_lan")
    reasons = {"libero_goal_lan": "it has no files", "libero_10_lan": "a mug is missing"}
    monkeypatch.setattr(libero_files, "suites", lambda: there_are)
    monkeypatch.setattr(resolving, "why_not", lambda suite: reasons.get(suite, ""))

    def named(*options: str) -> tuple[list[str | None], list[str]]:
        suites, warnings = named_suites(build_parser().parse_args(options).suite)
        return list(suites), warnings

    left_out = ["left out: it has no files"]
    assert named() == ([None], [])
    assert named("--suite", "libero_10, libero_goal", "--suite", "libero_10") == (["libero_10", "libero_goal"], [])
    assert named("--suite", "libero_spatial,libero_goal*") == ([*there_are[:2], there_are[3]], left_out)
    # What is named without a pattern is refused where its files are looked for.
    assert named("--suite", "libero_goal*,libero_goal_lan")[0] == [there_are[1], there_are[3], there_are[2]]
    assert named("--suite", "libero_unknown") == (["libero_unknown"], [])
    with pytest.raises(ConfigError, match=r"'libero_10_\*' names no suite that can be played: a mug is missing"):
        named("--suite", "libero_10_*")


@needs_libero
def test_several_suites_are_planned_before_any_is_played() -> None:
    options = ["--config", str(SMALL_LIBERO), "--policy.checkpoint", str(SMALL_LIBERO_POLICY), "--episodes", "20"]
    parts, _ = resolve_all(build_parser().parse_args([*options, "--suite", "libero_spatial,libero_goal"]))
    assert [(part.suite, part.policy) for part in parts] == [("libero_spatial", "base"), ("libero_goal", "base")]
    for part, steps in zip(parts, (220, 300), strict=True):
        assert part.evaluation.run.environment.episode_steps == steps
        assert Counter(episode.task for episode in part.evaluation.episodes) == Counter(dict.fromkeys(range(10), 2))


def test_a_run_s_own_steps_hold_for_variations_of_its_suite() -> None:
    env = {"name": "libero_goal", "max_episode_steps": 99, "preset": "rlinf", "task_ids": [3]}
    kept = {"name": "libero_goal", "preset": "rlinf"}
    assert settings_for_suite("libero_goal_swap", env) == kept | {"max_episode_steps": 99}
    assert settings_for_suite("libero_10_swap", env) == kept
    assert settings_for_suite("libero_mine", {"name": "tabletop", "max_episode_steps": 9}) == {"name": "tabletop"}


def test_several_suites_are_one_table() -> None:
    base, steered = summarise([outcome(0, False), outcome(1)]), summarise([outcome(0), outcome(1)])
    console = Console(file=io.StringIO(), width=160)
    console.print(comparison({name: {"base": base, "steered": steered} for name in ("libero_goal", "libero_10")}))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    figures = ["1/2", "50.0%", "9.4% to 90.5%", "2/2", "100.0%", "34.2% to 100.0%"]
    assert [[cell.strip() for cell in row] for row in rows] == [
        [name, *figures] for name in ("libero_goal", "libero_10")
    ]


def test_several_evaluations_are_not_put_into_the_directory_of_one(tmp_path: Path) -> None:
    written(tmp_path, 1)
    with pytest.raises(ConfigError, match="it holds the evaluation of one suite"):
        check_parent(tmp_path)


def settings_found(path: Path) -> tuple[Any, Path | None]:
    """The seed in the configuration that `--checkpoint path` finds, and the checkpoint."""
    settings, checkpoint = base_settings(argparse.Namespace(checkpoint=str(path), best=False, config=None))
    return settings["seed"], checkpoint


def test_a_checkpoint_belongs_to_the_run_where_it_is_found_wherever_links_lead(tmp_path: Path) -> None:
    """Beside what the links lead to lies the configuration of another run."""
    run_dir, archive = tmp_path / "run", tmp_path / "archive" / "checkpoints"
    shutil.copytree(FIXTURES / "run_beb78af", run_dir)
    archive.parent.mkdir()
    (run_dir / "checkpoints").rename(archive)
    (archive.parent / "config.yaml").write_text("seed: 99\n")
    name = "00000084-00000100"
    (run_dir / "checkpoints").symlink_to(archive)  # the whole folder
    for path in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / name):
        assert settings_found(path) == ("5", run_dir / "checkpoints" / name)
    (run_dir / "checkpoints").unlink()
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / name).symlink_to(archive / name)  # one checkpoint
    for path in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / name):
        assert settings_found(path) == ("5", run_dir / "checkpoints" / name)
    (tmp_path / "config.yaml").write_text("seed: 98\n")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "run").symlink_to(run_dir)  # a run by another name
    assert settings_found(tmp_path / "links" / "run") == ("5", tmp_path / "links" / "run" / "checkpoints" / name)
    (tmp_path / "links" / "best").symlink_to(archive / name)  # from somewhere that is no run
    assert settings_found(tmp_path / "links" / "best")[0] == "99"


@contextlib.contextmanager
def playing(processes: int) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A long evaluation with its environment processes, which have begun to play; ended at the end if it still runs."""
    arguments = command("--episodes", "5000", "--processes", str(processes), *QUICK)
    evaluation = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process, workers = psutil.Process(evaluation.pid), list[psutil.Process]()
        deadline = time.monotonic() + 200
        while len(workers) < processes or workers[-1].cpu_times().user < 0.3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            workers = [child for child in process.children() if child.name().startswith("actor-")]  # not the template
        yield evaluation, workers
    finally:
        evaluation.kill()
        evaluation.communicate()


def test_a_killed_environment_process_is_noticed() -> None:
    with playing(2) as (evaluation, workers):
        workers[0].kill()
        stdout, stderr = evaluation.communicate(timeout=60)
    assert evaluation.returncode == 1
    assert stdout == ""
    (sentence,) = (line for line in stderr.splitlines() if not line.endswith("so far"))  # what it waited for
    assert "environment process 0 ended (killed by SIGKILL): python -m dsrl_async.doctor" in sentence


def test_an_interrupt_ends_it_at_once() -> None:
    with playing(3) as (evaluation, workers):
        evaluation.send_signal(signal.SIGINT)
        evaluation.communicate(timeout=30)
        assert evaluation.returncode == 130
        assert psutil.wait_procs(workers, timeout=10)[1] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--episodes", "0"], "--episodes"),
        (["--episodes", "many"], "--episodes"),
        (["--surprise"], "--surprise"),
        (["--tasks", "1"], "--suite"),
        (["--suite", "libero_special"], "libero_special"),
        (["--env.layout", "round"], "env.layout"),
        (["--policy.chekpoint", "x"], "did you mean '--policy.checkpoint'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments: list[str], words: str) -> None:
    code, _, stderr = call("evaluate", *arguments)
    assert code == 2
    assert words in stderr
    assert stderr.count("\n") == 1


# LIBERO


@pytest.fixture(scope="module")
def libero_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random policy whose prompts have room for LIBERO's instructions."""
    sizes = {"image_size": 64, "patch_size": 16, "vision_depth": 1, "vision_mlp": 24, "vlm_width": 40, "vlm_mlp": 48}
    sizes |= {"expert_width": 32, "expert_mlp": 56, "depth": 2, "vocab_size": 120, "max_token_len": 120}
    directory = tmp_path_factory.mktemp("policy")
    synthetic.write_checkpoint(directory, synthetic.pi0_config(False, **sizes), "lerobot")
    return directory


COUNTED = """
from dsrl_async.envs.libero import LiberoEnvironment
load = LiberoEnvironment._load
def counted(environment, task):
    with open({file!r}, "a") as file:
        print(task, file=file)
    load(environment, task)
LiberoEnvironment._load = counted
"""


@pytest.mark.libero
@pytest.mark.slow
@needs_libero
def test_tasks_and_initial_states_of_libero(
    tmp_path: Path, libero_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--suite", "libero_spatial", "--tasks", "0,3", "--init-states", "0-1", "--env.image-size", "64"]
    arguments += ["--policy.checkpoint", str(libero_policy), "--policy.denoise-steps", "2"]
    arguments += ["--env.max-episode-steps", "10", "--env.render-quality", "exact"]
    done = subprocess.run(
        command(*arguments, "--processes", "2", "--out", str(tmp_path / "two"), "--video", str(tmp_path / "films")),
        capture_output=True,
        text=True,
        timeout=250,
    )
    if "cannot render" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    instructions = [libero_files.instruction(name) for name in libero_files.task_names("libero_spatial")]
    assert [(task["task"], task["instruction"], task["episodes"]) for task in result["tasks"]] == [
        (0, instructions[0], 2),
        (3, instructions[3], 2),
    ]
    expected = {"task_ids": [0, 3], "init_states": [0, 1], "max_episode_steps": 10, "settling_steps": 10}
    expected |= {"preset": "openpi", "render_quality": "exact", "seeding": "task"}
    assert {key: result["settings"]["env"][key] for key in expected} == expected
    assert {"mujoco", "robosuite"} <= result["versions"].keys()
    assert "0/2" in done.stderr
    assert "0/4" in done.stderr
    names = {path.name for path in (tmp_path / "films").iterdir()}
    assert "episode-0151-task-3-init-1-failure.mp4" in names
    assert len(names) == 4
    # Again with one task only, whose scene is compiled once for both processes.
    compiled = tmp_path / "compiled"
    planted = Planted(tmp_path, {"dsrl_async.run.worker.template": COUNTED.format(file=str(compiled))})
    monkeypatch.setenv("PYTHONPATH", planted.variables["PYTHONPATH"])
    run(*arguments, "--processes", "2", "--tasks", "3", "--out", str(tmp_path / "one"))
    before = episodes_in(tmp_path / "two")
    assert episodes_in(tmp_path / "one") == {number: before[number] for number in (150, 151)}
    assert compiled.read_text() == "3\n"
