"""When an evaluation begins, who plays what, what is kept of it, and what a resumed run goes on with."""

from __future__ import annotations

import io
import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from support.fake_run import FakeRun
from support.played import PlayedRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import ChunkOutcome, NumberedScenes
from dsrl_async.envs.recording import RecordingEnvironment, preview_of, unsorted_film
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.environments import environment_record
from dsrl_async.run import checkpoints
from dsrl_async.run.evaluation.episodes import held_out
from dsrl_async.run.evaluation.files import evaluations, find_best, take_back
from dsrl_async.run.set_aside import chosen
from dsrl_async.run.supervisor.evaluation import scalars
from dsrl_async.shm.counters import NoiseMode, Stop
from dsrl_async.telemetry.console import plain_line
from dsrl_async.telemetry.monitor import gif_size


def test_the_base_policy_first_then_the_agent_at_every_multiple(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path)
    first = run.finish(lambda number: number == 1).result
    assert (first["policy"], first["decisions"], first["env_steps"]) == ("base", 0, 0)
    assert (first["successes"], first["episodes"]) == (1, 3)
    assert run.evaluations.best is None
    run.at(99)
    assert run.step() is None
    assert len(evaluations(tmp_path)) == 1
    run.at(120)
    second = run.finish(lambda number: number < 2).result
    assert (second["policy"], second["noise"], second["decisions"], second["env_steps"]) == (
        *("agent", "deterministic", 120),
        600,
    )
    assert second["return"] == pytest.approx(-16 / 3)
    assert second["episode_len"] == pytest.approx(80 / 3)
    run.at(199)
    run.step()
    assert len(evaluations(tmp_path)) == 2
    run.at(200)
    assert run.finish().result["decisions"] == 200


def test_no_agent_is_evaluated_before_its_first_update(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path)
    run.finish()
    run.at(130, updates=0)
    run.step()
    assert len(evaluations(tmp_path)) == 1
    run.at(131, updates=1)
    run.step()
    assert len(evaluations(tmp_path)) == 2


def test_by_minutes(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path, every_decisions=None, every_minutes=2.0)
    run.finish()
    run.at(10)
    run.wall_s = 119.0
    run.step()
    assert len(evaluations(tmp_path)) == 1
    run.wall_s = 120.0
    assert run.finish().result["decisions"] == 10
    run.wall_s = 240.0  # but nothing has been decided since
    run.step()
    assert run.counters.control_snapshots[0] == 1


def test_only_one_of_the_two_can_be_given() -> None:
    with pytest.raises(ConfigError, match="every_decisions and every_minutes cannot be combined"):
        validate({"evaluation": {"every_decisions": 5, "every_minutes": 5}})


def test_an_episode_is_given_when_its_snapshot_is_loaded_and_never_twice(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path, episodes=5, actors=2)
    run.finish()
    run.at(100)
    run.step()
    run.step()
    assert run.counters.control_snapshots[0] == 1
    assert run.counters.control_evaluation[0] == 1  # the base policy's: the learner has not written its agent yet
    run.learn()
    run.step()
    assert run.counters.begun_evaluation(1) == (2, 100, NoiseMode.SNAPSHOT_DETERMINISTIC)
    played: list[int] = []
    while len(played) < 5:
        run.infer()
        run.step()
        played += run.end_episodes(lambda number: False)
    assert sorted(played) == [0, 1, 2, 3, 4]
    assert set(run.woken) == {2, 3}  # the lanes behind those of the training
    assert run.step() is not None


def test_a_worker_that_is_replaced_plays_the_episode_again(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path, episodes=2, actors=1)
    run.infer()
    run.step()
    run.step()
    number = run.assignments.next(0)
    again = run.assignments.take(0, -1, [], incarnation=2)  # the first one has died
    assert next(again) == number == 0
    assert run.assignments.taker[0] == 2
    run.end_episodes(lambda number: True)
    assert run.step() is None
    third = run.assignments.take(0, -1, [], incarnation=3)
    assert next(third) == 1
    run.lanes.end_episode(0, -10.0, 50, False)
    run.counters.stop = Stop.WORKERS
    assert list(third) == []
    assert run.finish().result["episodes"] == 2


def test_one_that_takes_too_long_is_told_of_once_and_the_next_one_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = PlayedRun(tmp_path)
    run.step()
    run.at(150)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            run.step()
    assert caplog.text.count("takes longer than the time to the next one") == 1
    assert len(evaluations(tmp_path)) == 1
    assert run.finish().result["decisions"] == 0
    assert run.finish().result["decisions"] == 150


def test_an_agent_that_cannot_be_written_or_read_leaves_one_point_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = PlayedRun(tmp_path)
    run.finish()
    run.at(100)
    run.step()
    run.counters.answer_snapshot(1)  # and there is nothing: the disk is full
    run.step()
    assert "the evaluation at 100 decisions is left out: the agent could not be written" in caplog.text
    run.at(200)
    run.step()
    run.learn()
    run.step()
    run.counters.inference_evaluation[0] = -int(run.counters.control_evaluation[0])
    run.step()
    assert "the evaluation at 200 decisions is left out: its agent cannot be read" in caplog.text
    run.at(300)
    assert run.finish().result["decisions"] == 300


# the best


def test_the_best_is_by_success_then_return_and_at_equal_ones_the_earlier(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path)
    run.finish(lambda number: True)  # the base policy has no agent that could be kept
    kept = []
    for decisions, successes in ((100, 1), (200, 2), (300, 2), (400, 1), (500, 3)):
        run.at(decisions)
        run.finish(set(range(successes)).__contains__)
        found = find_best(tmp_path)
        assert found is not None
        kept.append(found[0].name)
        assert [path.name for path in (tmp_path / "best").iterdir()] == kept[-1:]
        checkpoints.check(found[0])
    names = [f"{count:08d}-{count:08d}" for count in (100, 200, 200, 200, 500)]
    assert kept == names
    assert not any(files.snapshot.exists() for files in evaluations(tmp_path))


def test_at_equal_success_the_higher_return_is_better(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path, episodes=1)
    run.finish()
    run.at(100)
    run.finish()
    run.at(200)
    run.step()
    run.learn()
    run.infer()
    run.step()
    run.infer()
    run.step()
    run.lanes.end_episode(0, -9.0, 45, False)  # it fails, too, but sooner
    assert run.step() is not None
    assert run.evaluations.best is not None
    assert run.evaluations.best[1]["decisions"] == 200


def test_the_best_one_is_none_that_a_run_goes_on_from(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path)
    run.finish()
    run.at(100)
    run.finish()
    best = find_best(tmp_path)
    assert best is not None
    assert checkpoints.find(tmp_path) is None
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.run_of(best[0]) == tmp_path
    with pytest.raises(ValueError, match="not one of the checkpoints"):
        chosen(tmp_path, best[0])


def test_a_kill_between_two_best_ones_leaves_the_better_one_and_damage_is_seen(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path)
    run.finish()
    run.at(100)
    run.finish(lambda number: True)
    better = find_best(tmp_path)
    assert better is not None
    copy = tmp_path / "kept"
    shutil.copytree(better[0], copy)
    shutil.rmtree(tmp_path / "best")
    other = PlayedRun(tmp_path, decisions=100)
    other.at(200)
    other.finish()
    copy.rename(tmp_path / "best" / better[0].name)
    found = find_best(tmp_path)
    assert found is not None
    assert found[0] == better[0]
    state = found[0] / "state.json"
    state.write_text(state.read_text().replace('"successes": 3', '"successes": 2'))
    found = find_best(tmp_path)
    assert found is not None
    assert found[0] != better[0]


# resumed runs


def interrupted(run_dir: Path, films: int = 0) -> PlayedRun:
    """A run that ends while the agent of decision 100 is evaluated, of which one episode has ended."""
    run = PlayedRun(run_dir, actors=1, films=films)
    run.finish()
    run.at(100)
    run.step()
    run.learn()
    run.infer()
    run.step()
    run.infer()
    run.step()
    run.end_episodes(lambda number: True)
    run.step()
    return run


def test_a_resumed_run_plays_what_is_left_of_an_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = interrupted(tmp_path)
    with caplog.at_level(logging.INFO):
        run.evaluations.end()
    assert "interrupted after 1 of 3 episodes; --resume goes on with it" in caplog.text
    with (tmp_path / "evaluation/00000100/episodes.jsonl").open("a") as file:
        file.write('{"number": 1, "task"')  # the machine stopped while it was written
    resumed = PlayedRun(tmp_path, decisions=140, actors=1)
    played = []
    finished = resumed.step()
    while finished is None:
        resumed.infer()
        played += resumed.end_episodes(lambda number: False)
        finished = resumed.step()
    assert played == [1, 2]
    assert finished.result["decisions"] == 100
    assert finished.result["successes"] == 1
    assert resumed.evaluations.best is not None
    resumed.at(199)
    resumed.step()
    assert len(evaluations(tmp_path)) == 2
    resumed.at(200)
    assert resumed.finish().result["decisions"] == 200


def test_the_base_policy_is_played_once(tmp_path: Path) -> None:
    PlayedRun(tmp_path).finish()
    resumed = PlayedRun(tmp_path, decisions=60)
    resumed.step()
    assert len(evaluations(tmp_path)) == 1
    assert resumed.evaluations.last is not None


def test_with_other_episodes_what_is_pending_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path)
    resumed = PlayedRun(tmp_path, decisions=140, episodes=4)
    assert "the evaluation at 100 decisions cannot be gone on with" in caplog.text
    resumed.at(200)
    assert resumed.finish().result["episodes"] == 4


def test_what_began_after_the_checkpoint_is_taken_back_or_set_aside(tmp_path: Path) -> None:
    run = interrupted(tmp_path)
    run.finish()
    take_back(tmp_path, 100, None)
    assert [files.planned.decisions for files in evaluations(tmp_path)] == [0, 100]
    take_back(tmp_path, 99, tmp_path / "aside")
    assert [files.planned.decisions for files in evaluations(tmp_path)] == [0]
    assert json.loads((tmp_path / "aside/evaluation/00000100/result.json").read_text())["episodes"] == 3
    assert find_best(tmp_path) is not None  # what was reached stays


# what is shown


def test_scalars_by_task_where_there_are_several(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path)
    result = run.finish(lambda number: number == 0).result
    assert set(scalars(result)) == {f"eval/{name}" for name in ("success_rate", "ci95_low", "return", "episode_len")}
    assert scalars(result)["eval/success_rate"] == pytest.approx(1 / 3, abs=1e-3)
    assert scalars(result)["eval/ci95_low"] == pytest.approx(0.0615, abs=1e-4)
    several = {**result, "tasks": [{**result["tasks"][0], "task": task} for task in (2, 7)]}
    assert set(scalars(several)) > {"eval/success_rate", "eval/task_2/success_rate", "eval/task_7/return"}


def test_films_are_named_by_what_came_of_them_and_shown(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path, films=2)
    unsorted = tmp_path / "evaluation" / ".unsorted"
    unsorted.mkdir(parents=True)
    for number in (0, 1):
        for kind in ("mp4", "gif"):
            (unsorted / f"{number}.{kind}").write_text(f"{kind} {number}")
    run.infer()
    run.step()
    run.step()
    assert run.assignments.film.tolist() == [True, True]
    finished = run.finish(lambda number: number == 1)
    assert finished.previews == {"episode-0000": b"gif 0", "episode-0001": b"gif 1"}
    films = sorted(path.name for path in (tmp_path / "evaluation/00000000").glob("episode-*"))
    assert films == ["episode-0000-failure.mp4", "episode-0001-success.mp4"]
    assert not run.assignments.film[run.assignments.episode == 2].any()


class FilmedEnvironment:
    """Turns from black to white in ten steps."""

    spec = TABLETOP

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, seed: int, number: int = 0) -> int:
        self.steps = 0
        return 0

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        self.steps += len(action_chunk)
        return ChunkOutcome(len(action_chunk), -1, False, truncated=self.steps >= 10)

    def render(self, size: int, camera: int) -> NDArray[np.uint8]:
        return np.full((size, size, 3), 25 * self.steps, np.uint8)

    def close(self) -> None: ...


def test_a_film_has_a_preview_that_tensorboard_can_show(tmp_path: Path) -> None:
    recording = RecordingEnvironment(FilmedEnvironment(), lambda: True, tmp_path, 10, preview=True)
    recording.reset(0, 7)
    for _ in range(2):
        outcome = recording.step_chunk(np.zeros((5, 7), np.float32))
    assert outcome.truncated
    assert unsorted_film(tmp_path, 7).is_file()
    gif = preview_of(unsorted_film(tmp_path, 7)).read_bytes()
    with Image.open(io.BytesIO(gif)) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    brightness = [float(np.mean(frame)) for frame in frames]
    assert len(frames) >= 10
    assert brightness == sorted(brightness)
    assert brightness[-1] - brightness[0] > 200
    width, height = gif_size(gif)
    assert (width, height) == (128 * TABLETOP.cameras, 128)
    run = FakeRun(tmp_path / "run").start()
    run.monitor.write_image("eval/episode-0007", gif, width, height, env_steps=500)
    run.monitor.close()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    (shown,) = events.Images("eval/episode-0007")
    assert (shown.step, shown.width, shown.encoded_image_string) == (500, width, gif)


def test_the_display_shows_the_last_the_best_and_how_far_the_next_is(tmp_path: Path) -> None:
    run = PlayedRun(tmp_path)
    shown = FakeRun(tmp_path / "run", evaluation={"every_decisions": 100}).start()

    def line() -> str:
        shown.monitor.evaluation = run.evaluations.view
        return plain_line(shown.config, shown.tick())

    assert "| evaluation of 3 episodes" in line()
    run.finish()
    run.at(100)
    run.finish(lambda number: number == 0)
    run.at(200)
    run.step()
    assert "| evaluation 33.3% at 100, best 33.3% at 100, now 0/3" in line()
    assert shown.lines()[-1]["evaluation"]["success_rate"] == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.skipif(find_spec("libero") is None, reason="needs LIBERO")
def test_libero_plays_the_scenes_that_an_evaluation_of_the_run_would() -> None:
    chosen = {"name": "libero_spatial", "task_ids": [2, 5], "init_states": [1, 3]}
    config = validate({"env": chosen, "evaluation": {"every_decisions": 10, "episodes": 6}})
    record = environment_record(config.env.model_dump())
    config.sac.evaluation_noise = "stochastic"
    episodes = held_out(record, config)
    assert [(episode.task, episode.init_state) for episode in episodes[:4]] == [(2, 1), (2, 3), (2, 1), (5, 1)]
    everything = {**chosen, "task_ids": None, "init_states": None, "scene_order": "cycled"}
    evaluated = environment_record(validate({"env": everything}).env.model_dump()).make([0])
    trained = record.make([0])
    assert isinstance(trained, NumberedScenes)
    trained.number_scenes()
    for episode in episodes:
        scene = trained.scene(9, episode.number)  # type: ignore[attr-defined]
        assert scene == evaluated.scene(9, episode.number)  # type: ignore[attr-defined]
        assert (scene.task, scene.init_state) == (episode.task, episode.init_state)
    assert list(record.task_numbers()) == [2, 5]
