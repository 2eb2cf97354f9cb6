"""Evaluation in groups: who plays what, what is played again, and when that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import call

from dsrl_async.config.settings import ConfigError
from dsrl_async.evaluate import fan_out
from dsrl_async.evaluate.command import build_parser
from dsrl_async.evaluate.deal import Deal
from dsrl_async.evaluate.fan_out import MOST_FAILURES, NEWS, READY, Groups, play_in_groups
from dsrl_async.evaluate.films import Films
from dsrl_async.evaluate.lines import Lines
from dsrl_async.evaluate.resolve import Evaluation, device_of_groups, resolve
from dsrl_async.evaluate.results import Outcome
from dsrl_async.groups import placing
from dsrl_async.groups.placing import Ended, Event, Placed, local_gpus
from dsrl_async.run.evaluation.episodes import Episode, Schedule, plan_episodes

# ---- who plays what


@settings(max_examples=50, deadline=None)
@given(
    tasks=st.lists(st.integers(0, 3), max_size=40),
    groups=st.integers(1, 4),
    lanes=st.integers(1, 4),
    data=st.data(),
)
def test_every_episode_is_played_once_although_groups_end(
    tasks: list[int], groups: int, lanes: int, data: st.DataObject
) -> None:
    episodes = [Episode(number, task, None) for number, task in enumerate(tasks)]
    deal = Deal(episodes, groups, lanes)
    held: dict[int, list[Episode]] = {group: [] for group in range(groups)}
    played: list[Episode] = []
    ends = 0
    while deal.missing:
        for group in held:
            held[group] += deal.next(group)
            assert len(held[group]) <= 2 * lanes
        group = data.draw(st.sampled_from([group for group in held if held[group]]))
        if ends < 5 and data.draw(st.booleans()):
            ends += 1
            assert 1 <= deal.give_back(group) <= ends
            held[group] = []
        else:
            episode = held[group].pop(data.draw(st.integers(0, len(held[group]) - 1)))
            assert deal.note(group, episode.number)
            assert not deal.note(group, episode.number)
            played.append(episode)
    assert sorted(played) == episodes
    assert not any(deal.next(group) for group in held)


def test_a_slice_that_fails_again_and_again_is_counted_wherever_it_is_played() -> None:
    deal = Deal([Episode(number, 0, None) for number in range(4)], groups=2, lanes=2)
    other = deal.next(1)
    for failures in (1, 2, 3):
        group = 0
        assert len(deal.next(group)) == 2
        assert deal.give_back(group) == failures
    assert deal.give_back(0) == 0
    for episode in other:
        deal.note(1, episode.number)
    assert [episode.number for episode in deal.next(1)] == sorted(deal.missing)
    assert deal.give_back(1) == 4


def loads(groups: int, lanes: int, length: Callable[[Episode, int], int]) -> tuple[int, int]:
    """Scenes compiled by all workers of a suite's evaluation, and when the last episode ends."""
    deal = Deal(plan_episodes([50] * 10, range(10), None, None), groups, lanes)
    within = {group: Schedule([]) for group in range(groups)}
    task_of: dict[tuple[int, int], int] = {}
    playing: dict[tuple[int, int], tuple[int, Episode]] = {}
    compiled = now = 0
    while deal.missing:
        for group in range(groups):
            within[group].add(deal.next(group))
            for lane in range(lanes):
                if (group, lane) not in playing and (episode := within[group].next(lane)) is not None:
                    compiled += task_of.get((group, lane)) != episode.task
                    task_of[group, lane] = episode.task
                    playing[group, lane] = now + length(episode, group), episode
        worker = min(playing, key=lambda worker: playing[worker][0])
        now, episode = playing.pop(worker)
        deal.note(worker[0], episode.number)
    return compiled, now


@pytest.mark.parametrize(("groups", "lanes"), [(2, 4), (4, 8), (8, 16)])
def test_workers_of_groups_keep_their_tasks_and_all_groups_end_together(groups: int, lanes: int) -> None:
    """Dealt out one by one over all tasks there would be nearly as many scenes to compile as episodes: 500."""
    compiled, end = loads(groups, lanes, lambda episode, group: 80 + 20 * (episode.number % 4))
    assert compiled <= 10 + 4 * groups * lanes
    assert end <= 1.05 * 500 * 110 / (groups * lanes) + 2 * 140


def test_a_slow_group_plays_less() -> None:
    _, end = loads(2, 4, lambda episode, group: 300 if group else 100)
    assert end <= 1.05 * 500 / (4 / 100 + 4 / 300) + 300


def test_lines_are_read_when_they_are_whole(tmp_path: Path) -> None:
    lines, path = Lines(tmp_path / "lines"), tmp_path / "lines"
    assert lines.new() == []
    for written, read in (('{"a": 1}\n{"b"', [{"a": 1}]), (": 2}", []), ('\n{"c": 3}\n', [{"b": 2}, {"c": 3}])):
        with path.open("a") as file:
            file.write(written)
        assert lines.new() == read
    assert lines.new() == []


# ---- groups that only pretend


def evaluation_of(groups: int, *options: str) -> Evaluation:
    return resolve(build_parser().parse_args(["--groups", str(groups), *options]))


class Pretended:
    """A placement whose groups play at once what they are told, but for what `ends` says: (group, incarnation) -> how
    many episodes, how it ends, whether that is fatal. They tell every outcome twice, and the last one as they end."""

    def __init__(self, ends: dict[tuple[int, int], tuple[int, str, bool]]) -> None:
        self.ends, self.jobs = ends, dict[int, dict[str, Any]]()
        self.events: list[Event] = []
        self.left: dict[int, int] = {}
        self.played, self.told = Counter[int](), list[dict[str, Any]]()
        self.closed, self.untold = False, list[tuple[int, Outcome]]()

    def write(self, group: int, **news: Any) -> None:
        with (Path(self.jobs[group]["run_dir"]) / NEWS).open("a") as file:
            print(json.dumps(news), file=file)

    def start(self, group: int, incarnation: int, job: dict[str, Any]) -> None:
        self.jobs[group] = json.loads(json.dumps(job))
        self.left[group] = self.ends.get((group, incarnation), (1000, "", False))[0]
        self.events.append(Placed(group, incarnation, f"GPU {group}"))
        if self.left[group] >= 0:
            self.write(group, doing=READY)
        else:
            self.end(group)

    def tell(self, group: int, line: str) -> None:
        told = json.loads(line)
        self.told.append(told)
        for number, task, init_state in told["episodes"]:
            if self.left[group] == 0:
                self.end(group)
                return
            self.left[group] -= 1
            self.played[number] += 1
            outcome = Outcome(number, task, init_state, number, number % 2 == 0, 10, 0.5)
            self.untold += 2 * [(group, outcome)]

    def end(self, group: int) -> None:
        incarnation = self.jobs[group]["incarnation"]
        _, how, fatal = self.ends[group, incarnation]
        self.events.append(Ended(group, incarnation, how, fatal))

    def poll(self) -> list[Event]:
        for group, outcome in self.untold:
            self.write(group, **outcome._asdict())
        self.untold = []
        events, self.events = self.events, []
        return events

    def waits(self) -> dict[int, str]:
        return {}

    def close(self) -> None:
        self.closed = True


@contextmanager
def no_wait(what: str) -> Any:
    yield lambda words: None


def played(
    placement: Pretended,
    evaluation: Evaluation,
    monkeypatch: pytest.MonkeyPatch,
    films: Films | None = None,
    said: list[str] | None = None,
) -> list[Outcome]:
    monkeypatch.setattr(fan_out, "place", lambda evaluation, directory: placement)
    say = (said if said is not None else []).append
    outcomes = list(play_in_groups(evaluation, evaluation.episodes, films, lambda: None, no_wait, say))
    assert placement.closed
    return outcomes


def test_what_a_group_had_not_played_is_played_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {(1, 1): (1, "killed by SIGKILL", False), (1, 2): (-1, "exit code 1: no", False), (0, 1): (3, "gone", False)}
    placement, said = Pretended(ends), list[str]()
    outcomes = played(placement, evaluation_of(2, "--episodes", "20", "--processes", "2"), monkeypatch, said=said)
    assert sorted(outcome.number for outcome in outcomes) == list(range(20))  # each once
    assert set(placement.played.values()) == {1}  # what was played is not played again
    assert sorted(said) == [
        "group 0 (GPU 0) ended (gone); another process plays what it has not",
        "group 1 (GPU 1) ended (exit code 1: no); another process plays what it has not",
        "group 1 (GPU 1) ended (killed by SIGKILL); another process plays what it has not",
    ]
    assert [placement.jobs[group]["incarnation"] for group in (0, 1)] == [2, 3]


@pytest.mark.parametrize("after", [0, -1])
def test_what_fails_three_times_ends_the_evaluation(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it plays its slice, or before it can play."""
    ends = {(1, incarnation): (after, "exit code 1: no sugar", False) for incarnation in range(1, 9)}
    ends |= {(0, incarnation): ends[1, incarnation] for incarnation in range(1, 9)}
    placement = Pretended(ends)
    with pytest.raises(RuntimeError, match=r"^group [01] \(GPU [01]\) ended \(exit code 1: no sugar\), the third time"):
        played(placement, evaluation_of(2, "--episodes", "8"), monkeypatch)
    assert placement.closed
    assert max(job["incarnation"] for job in placement.jobs.values()) <= MOST_FAILURES


def test_what_no_other_process_could_do_better_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Pretended({(1, 1): (-1, "exit code 3: there is no policy here", True)})
    with pytest.raises(ConfigError, match="there is no policy here"):
        played(placement, evaluation_of(2, "--episodes", "8"), monkeypatch)
    assert placement.closed


def test_an_interrupt_closes_the_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Pretended({})
    monkeypatch.setattr(fan_out, "place", lambda evaluation, directory: placement)

    def interrupt() -> None:
        raise KeyboardInterrupt

    evaluation = evaluation_of(2, "--episodes", "8")
    with pytest.raises(KeyboardInterrupt):
        list(play_in_groups(evaluation, evaluation.episodes, None, interrupt, no_wait, print))
    assert placement.closed
    assert not any(Path(job["run_dir"]).exists() for job in placement.jobs.values())


def test_films_are_chosen_for_all_groups_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placement, films = Pretended({(0, 1): (2, "gone", False)}), Films(tmp_path, 2, list(range(100)))
    played(placement, evaluation_of(2, "--episodes", "40", "--processes", "2"), monkeypatch, films)
    assert placement.jobs[0]["films"] == str(tmp_path)
    filmed = {number for told in placement.told for number in told["film"]}
    assert 2 <= len(filmed) <= 8
    assert not any(films.wanted(number) for number in range(100))  # of both kinds there are enough
    assert set(films._filmed) <= filmed


def test_a_job_is_one_that_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = evaluation_of(3, "--episodes", "7", "--seed", "5")
    placement = Pretended({})
    played(placement, evaluation, monkeypatch)
    assert sorted(placement.jobs) == [0, 1, 2]
    job = placement.jobs[2]
    assert (job["config"]["actors"], job["config"]["seed"], job["begin_with"]) == (3, 5, 0)


def test_of_slow_groups_it_is_said_what_they_do(tmp_path: Path) -> None:
    placement = Pretended({})
    evaluation = evaluation_of(2, "--episodes", "8")
    groups = Groups(evaluation, evaluation.episodes, None, placement, tmp_path, print)
    placement.write(1, doing="loading the policy")
    groups._hear(0)
    groups._hear(1)
    assert groups.doing() == "group 1 of 2: loading the policy"
    placement.waits = lambda: {1: "a GPU"}  # type: ignore[method-assign]
    assert groups.doing() == "group 1 of 2: waiting for a GPU"


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--groups", "0"], "--groups must be at least 1"),
        (["--groups", "2", "--device", "cuda", "--group.gpus", "0"], "--group.gpus 0 denies"),
        (["--ray", "auto", "--video", "films"], "--video: films would be written on the machines of --ray"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = call("evaluate", *options)
    assert code == 2
    assert words in stderr
    assert stderr.count("\n") == 1


def test_ray_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.groups.ray_placement.version", missing)
    with pytest.raises(ConfigError, match="ray: the library is not installed; "):
        evaluation_of(1, "--ray", "auto")


def missing(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_groups_have_gpus_of_their_own_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "cuda_devices", lambda: {"devices": 4})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_gpus(2, 2) == [["0", "1"], ["2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7,0,1")
    assert local_gpus(3, 1) == [["3"], ["GPU-7"], ["0"]]
    with pytest.raises(ConfigError, match=r"^--groups: 3 groups with 2 GPUs each need 6, and torch finds 4 here"):
        local_gpus(3, 2, "--groups")
    with pytest.raises(ConfigError, match=r"^groups: 5 groups with 1 GPU each need 5"):
        local_gpus(5, 1)


def test_the_device_of_a_group_is_the_one_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    config = evaluation_of(1).config
    monkeypatch.setattr("dsrl_async.evaluate.resolve.check_library", lambda: None)

    def device(name: str, ray: str | None, gpus: int = 1) -> str:
        group = config.group.model_copy(update={"gpus": gpus})
        return device_of_groups(config.model_copy(update={"device": name, "group": group}), ray)

    assert [device("auto", None), device("cuda", None), device("cpu", None)] == ["cpu", "cuda", "cpu"]
    assert [device("auto", "auto"), device("cpu", "auto"), device("auto", "auto", 0)] == ["cuda", "cpu", "cpu"]


def test_memory_must_hold_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.run.preflight.memory.available_memory", lambda: 3 << 30)
    evaluation_of(1)
    with pytest.raises(ConfigError, match=r"this run needs about .*; lower --processes or --groups"):
        evaluation_of(9)


# ---- real processes

QUICK = ("--policy.denoise-steps", "2", "--env.max-episode-steps", "30", "--seed", "7", "--episodes", "12")


def episodes_in(directory: Path) -> list[list[Any]]:
    """All of each finished episode but the time it took, by number."""
    lines = [json.loads(line) for line in (directory / "episodes.jsonl").read_text().splitlines()]
    return sorted([line[key] for key in line if key != "wall_s"] for line in lines)


def test_groups_that_are_killed_and_interrupted_give_the_result_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    out = ["--out", str(tmp_path / "groups")]
    arguments = [sys.executable, "-m", "dsrl_async.evaluate", *QUICK, "--groups", "2", "--processes", "1", *out]
    begun = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process, lines = psutil.Process(begun.pid), tmp_path / "groups" / "episodes.jsonl"
    deadline = time.monotonic() + 200
    while not lines.is_file() or not lines.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    everyone = process.children(recursive=True)
    groups = [child for child in process.children() if child.name() == "evaluation"]
    assert len(groups) == 2
    groups[1].kill()
    assert begun.stderr is not None
    said = ""
    while "ended" not in said:
        said = begun.stderr.readline()
        assert said
    assert said.startswith("group 1 (this machine) ended (killed by SIGKILL); another process plays what it has not")
    everyone += process.children(recursive=True)
    begun.send_signal(signal.SIGINT)
    begun.communicate(timeout=30)
    assert begun.returncode == 130
    assert psutil.wait_procs(everyone, timeout=5)[1] == []
    assert os.listdir(tmp_path / "tmp") == []
    assert lines.read_bytes().count(b"\n") < 12
    monkeypatch.setattr(tempfile, "tempdir", None)
    of_groups = call("evaluate", *QUICK, "--groups", "2", "--processes", "2", *out).result  # goes on
    alone = call("evaluate", *QUICK, "--processes", "2", "--out", str(tmp_path / "alone")).result
    assert of_groups | {"wall_s": 0} == alone | {"wall_s": 0}
    assert episodes_in(tmp_path / "groups") == episodes_in(tmp_path / "alone")
