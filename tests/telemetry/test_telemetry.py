"""Telemetry: figures from counters, TensorBoard and JSON files, the console, the learning-curve plot."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.fake_run import FakeRun

from dsrl_async.config.load import validate
from dsrl_async.shm.counters import (
    ACTOR_PHASES,
    EPISODE_LOG,
    HISTORY_POINTS,
    INFERENCE_PHASES,
    LEARNER_PHASES,
    Graphs,
)
from dsrl_async.shm.episodes import finished_episodes
from dsrl_async.telemetry.console import LiveDisplay, make_console, plain_line
from dsrl_async.telemetry.monitor import View, scalars
from dsrl_async.telemetry.screen import Screen, phase_bar, sparkline
from dsrl_async.telemetry.usage import ProcessUsage

DOCUMENTED = {
    *("env/episode_len", "env/return", "env/reward", "env/success_once"),
    *("train/sac/critic_loss", "train/critic/grad_norm", "train/sac/actor_loss", "train/actor/entropy"),
    *("train/actor/grad_norm", "train/sac/alpha_loss", "train/sac/alpha"),
    *("train/replay_buffer/size", "train/replay_buffer/utilization"),
}


def busy(run: FakeRun) -> None:
    """One second of an imaginary run of two actors."""
    c = run.counters
    c["actor_decisions"] += [10, 30]
    c["actor_env_steps"] += [50, 149]
    c["actor_policy_lag"] += [20, 100]
    c["actor_phase_s"] += [[0.5, 0.2, 0, 0, 0.3], [0.7, 0.0, 0, 0, 0.1]]
    c["inference_batches"] += 10
    c["inference_rows"] += 40
    c["inference_padded_rows"] += 50
    c["inference_queue_wait_s"] += 0.08
    c["inference_phase_s"] += [0.1, 0, 0, 0, 0.9, 0, 0]
    c["learner_updates"] += 20
    c["learner_replay_size"][0] = 1000
    c["learner_phase_s"] += [0, 0.25, 0, 0.75, 0, 0]
    c["learner_metrics"][:] = np.arange(16)
    c["learner_metrics_update"][0] = c["learner_updates"][0]
    run.finish_episode(0, -3.0, 20, True)
    run.finish_episode(1, -10.0, 50, False)


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path / "run").start()


# ---- figures


def test_figures_of_known_counters(run: FakeRun) -> None:
    for _ in range(20):
        busy(run)
        view = run.tick()
    for _ in range(10):  # a pause as long as the window of the recent rates
        view = run.tick()
    assert (view.env_steps, view.decisions, view.updates, view.episodes) == (20 * 199, 800, 400, 40)
    assert view.overall.env_steps_per_s == pytest.approx(20 * 199 / 30)
    assert view.overall.decisions_per_s == pytest.approx(800 / 30)
    assert view.recent.env_steps_per_s == 0 == view.recent.updates_per_s
    busy(run)
    recent = run.tick().recent
    assert recent.decisions_per_s == pytest.approx(40 / 10)
    assert recent.updates_per_s == pytest.approx(20 / 10)
    assert recent.policy_lag == pytest.approx(120 / 40)
    assert (recent.batch_size, recent.batch_fill) == (pytest.approx(4.0), pytest.approx(0.8))
    assert recent.queue_wait_ms == pytest.approx(2.0)
    assert recent.phases["actor"]["physics"] == pytest.approx((0.5 + 0.7) / 2 / 10)
    assert recent.phases["inference"]["compute"] == pytest.approx(0.09)
    assert recent.phases["learner"]["wait_ratio"] == pytest.approx(0.025)


def test_replay_ratio_counts_from_the_end_of_the_warmup(run: FakeRun) -> None:
    run.counters["actor_decisions"][:] = [300, 100]
    assert run.tick().replay_ratio == 0.0  # the warm-up of 400 is just over
    run.counters["actor_decisions"][:] = [500, 100]
    run.counters["learner_updates"][0] = 50
    assert run.tick().replay_ratio == pytest.approx(50 / 200)
    run.counters["control_passed_decisions"][0] = 100  # it has warmed up again
    assert run.tick().replay_ratio == pytest.approx(50 / 100)


def test_remaining_is_that_of_the_earlier_limit(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", max_minutes=1, max_decisions=1000).start()
    run.counters["actor_decisions"][0] = 100
    view = run.tick(10)  # 10 decisions/s: 90 s left to 1000, 50 s left to a minute
    assert view.remaining_s == pytest.approx(50)
    assert view.progress == pytest.approx(10 / 60)
    run.counters["actor_decisions"][0] = 900
    view = run.tick(10)  # 80 decisions/s
    assert view.remaining_s == pytest.approx(100 / 80)
    assert view.progress == pytest.approx(0.9)


def test_serial_mode_spreads_actor_phases_over_its_one_process(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", serial=True, device="cpu").start()
    run.counters["actor_phase_s"][:, 0] = [0.2, 0.3]
    assert run.tick().recent.phases["actor"]["physics"] == pytest.approx(0.5)


def test_resumed_run_keeps_counts_but_not_rates(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", resumed_wall_s=1000.0)
    for name in ("actor_decisions", "actor_env_steps", "actor_episodes", "learner_updates"):
        run.counters[name] += 5000
    run.start()
    assert run.monitor.summary()["success_rate"] is None  # the episodes of before are not in the log
    busy(run)
    run.tick()
    summary = run.monitor.summary()
    assert summary["wall_s"] == 1001.0
    assert (summary["decisions"], summary["episodes"], summary["updates"]) == (10_040, 10_002, 5020)
    assert (summary["decisions_per_s"], summary["updates_per_s"]) == (40.0, 20.0)
    assert summary["replay_ratio"] == pytest.approx(5020 / (10_040 - 400), abs=1e-4)
    assert summary["success_rate"] == 0.5


# ---- episodes


def test_episodes_of_all_actors_are_read_once_and_in_order(run: FakeRun) -> None:
    seen = run.counters["actor_episodes"].copy()
    for episode in range(3):
        run.finish_episode(0, episode, 10 + episode, False)
    run.finish_episode(1, 100, 20, True)
    episodes = finished_episodes(run.snapshot(), seen)
    assert [e.episode_return for e in episodes if e.length < 20] == [0, 1, 2]
    assert episodes[2:] in (
        [(2, 12, 0), (100, 20, 1)],
        [(100, 20, 1), (2, 12, 0)],
    )  # newest of each actor last
    assert finished_episodes(run.snapshot(), run.counters["actor_episodes"].copy()) == []


def test_overwritten_episodes_are_lost_and_the_others_kept(run: FakeRun) -> None:
    seen = run.counters["actor_episodes"].copy()
    total = EPISODE_LOG + 36
    for episode in range(total):
        run.finish_episode(1, float(episode), 1, False)
    returns = [episode.episode_return for episode in finished_episodes(run.snapshot(), seen)]
    assert returns == list(range(36, total))
    assert run.tick().episodes == total


def test_success_rate_is_of_the_last_100_episodes(run: FakeRun) -> None:
    assert run.tick().success_rate is None
    run.finish_episode(0, 0, 1, True)
    assert run.tick().success_rate == 1.0
    for episode in range(150):
        run.finish_episode(episode % 2, 0, 1, episode >= 120)
        view = run.tick()
    assert (view.success_rate, view.success_episodes) == (0.3, 100)
    assert HISTORY_POINTS // 2 <= len(view.success_history) <= HISTORY_POINTS
    assert min(view.success_history) < 0.1
    assert view.success_history[-1] == 0.3


# ---- files


def test_tensorboard_has_exactly_the_documented_names(run: FakeRun) -> None:
    busy(run)
    run.tick(pids={"supervisor": [os.getpid()], "actor": [os.getpid()]})
    scalars = run.scalars()
    assert {tag for tag in scalars if tag.startswith(("env/", "train/"))} == DOCUMENTED
    phases = {"actor": ACTOR_PHASES, "inference": INFERENCE_PHASES, "learner": LEARNER_PHASES}
    rates = {"time/env_steps_per_s", "time/decisions_per_s", "time/updates_per_s"}
    shares = {f"time/{kind}/{phase}" for kind, names in phases.items() for phase in names}
    assert {tag for tag in scalars if tag.startswith("time/")} == rates | shares
    names = ("policy_lag", "batch_size", "batch_fill", "queue_wait_ms", "replay_ratio", "success_rate")
    assert {tag for tag in scalars if tag.startswith("async/")} == {f"async/{name}" for name in names}
    assert {"system/cpu_percent/total", "system/cpu_percent/actor", "system/memory_mb/total"} <= set(scalars)


def test_tensorboard_values_lie_at_env_steps(run: FakeRun) -> None:
    busy(run)
    run.tick()
    run.counters["actor_env_steps"] += 1
    run.tick()  # nothing finished, no new metrics
    scalars = run.scalars()
    assert scalars["env/return"] == [(199, pytest.approx(-6.5))]
    assert scalars["env/episode_len"] == [(199, 35.0)]
    assert scalars["env/reward"] == [(199, pytest.approx((-3 / 20 - 10 / 50) / 2))]
    assert scalars["env/success_once"] == [(199, 0.5)]
    assert scalars["train/actor/entropy"] == [(199, 3.0)]
    assert scalars["train/replay_buffer/utilization"][0] == (199, pytest.approx(1000 / 40_000))
    assert [step for step, _ in scalars["async/policy_lag"]] == [199, 201]


def test_metrics_not_yet_computed_are_left_out_but_later_nans_are_written(run: FakeRun) -> None:
    run.counters["learner_metrics"][:3] = [1.0, 2.0, np.nan]
    for update, metrics in ((5, 3), (50, 3)):
        run.counters["learner_metrics_update"][0] = update
        run.counters["actor_env_steps"][0] += metrics
        run.tick()
    scalars = run.scalars()
    assert [step for step, _ in scalars["train/sac/critic_loss"]] == [3, 6]
    assert len(scalars["train/sac/actor_loss"]) == 1
    assert np.isnan(scalars["train/sac/actor_loss"][0][1])
    assert [line["metrics"].get("train/sac/actor_loss", "absent") for line in run.lines()] == ["absent", None]


def test_resumed_run_adds_a_file_and_replaces_what_lay_beyond(tmp_path: Path) -> None:
    first = FakeRun(tmp_path / "run").start()
    for _ in range(4):
        busy(first)
        first.tick()
    first.monitor.close()
    second = FakeRun(tmp_path / "run", resumed_wall_s=2.0)
    for _ in range(2):  # as if the checkpoint were of the second tick
        busy(second)
    second.start()
    busy(second)
    second.tick()
    assert [step for step, _ in second.scalars()["env/return"]] == [199, 398, 597]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert [line["decisions"] for line in second.lines()] == [40, 80, 120, 160, 120]


def test_metrics_file_has_the_main_figures(run: FakeRun) -> None:
    busy(run)
    run.tick()
    (line,) = run.lines()
    assert (line["wall_s"], line["env_steps"], line["decisions"], line["success_rate"]) == (1.0, 199, 40, 0.5)
    assert (line["updates_per_s"], line["batch_fill"], line["policy_lag"]) == (20.0, 0.8, 3.0)


def test_summary_has_exactly_its_keys_and_is_json(run: FakeRun) -> None:
    before = run.monitor.summary()
    run.counters["learner_metrics"][:] = np.nan
    busy(run)
    run.tick(0.0)  # no time has passed
    run.tick(1.0)
    summary = run.monitor.summary()
    run.monitor.close()
    run.monitor.close()
    assert before["success_rate"] is None
    expected = "wall_s env_steps decisions updates episodes success_rate success_episodes"
    expected += " env_steps_per_s decisions_per_s updates_per_s replay_ratio policy_lag_mean"
    expected += " batch_size_mean batch_fill phases memory_mb cuda_graphs"
    for result in (before, summary):
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert set(result) == set(expected.split())
        assert set(result["phases"]) == {"actor", "inference", "learner"}
        assert set(result["memory_mb"]) == {"supervisor", "inference", "learner", "template", "actor_mean"}
    assert summary["batch_size_mean"] == 4.0
    assert summary["phases"]["actor"]["physics"] == pytest.approx(0.6)


# ---- processes


def test_dead_process_is_tolerated_and_its_last_memory_kept() -> None:
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    pids = {"supervisor": [os.getpid()], "inference": [child.pid]}
    usage = ProcessUsage()
    usage.measure(pids, 0.0)
    memory = usage.memory_mb["inference"]
    assert memory > 1
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    usage.measure(pids, 1e3)  # a zombie
    child.communicate()
    usage.measure(pids, 2e3)  # gone
    assert usage.cpu_percent["inference"] == 0.0
    assert usage.memory_mb["inference"] == memory
    usage.measure({**pids, "inference": [os.getpid()]}, 3e3)  # restarted
    assert usage.memory_mb["inference"] == pytest.approx(usage.memory_mb["supervisor"], rel=0.2)
    ProcessUsage().measure(pids, 0.0)  # never seen alive


def test_memory_of_a_kind_that_comes_later_is_not_waited_for() -> None:
    usage, pids = ProcessUsage(), {"supervisor": [os.getpid()]}
    usage.measure(pids, 0.0)
    usage.measure(pids | {"actor": [os.getpid()]}, 9.9)
    assert usage.memory_mb["actor"] == pytest.approx(usage.memory_mb["supervisor"], rel=0.2)


def test_actors_are_added_for_cpu_and_averaged_for_memory(run: FakeRun) -> None:
    pids = {"supervisor": [os.getpid()], "actor": [os.getpid(), os.getpid()]}
    view = run.tick(pids=pids)
    assert view.processes == {"supervisor": 1, "actor": 2}
    assert view.memory_mb["actor_mean"] == pytest.approx(view.memory_mb["supervisor"], rel=0.2)
    total = run.scalars()["system/memory_mb/total"][0][1]
    assert total == pytest.approx(view.memory_mb["supervisor"] + 2 * view.memory_mb["actor_mean"])


# ---- console


def huge(run: FakeRun) -> View:
    """A view with the longest numbers that a run may reach."""
    for name in ("actor_decisions", "actor_env_steps"):
        run.counters[name] += 10**9 // run.config.actors
    run.counters["inference_phase_s"] += 50.0
    own = os.getpid()
    view = run.tick(pids={"supervisor": [own], "inference": [own], "actor": [own] * run.config.actors})
    cpu_percent = {"actor": 100.0 * run.config.actors, "inference": 9_999.0, "supervisor": 107.0}
    return replace(view, cpu_percent=cpu_percent, memory_mb=dict.fromkeys(view.memory_mb, 123_456.0))


@pytest.mark.parametrize("actors", [2, 2000])
@pytest.mark.parametrize("make", [FakeRun.tick, huge])
def test_live_display_fits_80_columns(tmp_path: Path, actors: int, make: Callable[[FakeRun], View]) -> None:
    capacity = {"capacity": 200_000}
    run = FakeRun(tmp_path / "run", actors, replay=capacity, max_minutes=600, stop_at_success=0.9).start()
    run.counters["actor_decisions"][0] = run.counters["learner_updates"][0] = 1000
    for _ in range(100):
        run.finish_episode(0, 0, 1, True)
        run.counters["inference_phase_s"] += 10.0
        run.tick(100)
    console = Console(file=io.StringIO(), width=80, record=True, force_terminal=True)
    console.print(Screen(run.config, make(run)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) == 80
    for word in ("goal 90%", "decisions", "policy lag", "inference"):
        assert word in text
    assert "…" not in text


def test_a_smaller_share_is_not_named_in_the_place_of_a_larger_one() -> None:
    _, legend = phase_bar({"compute": 0.21, "wait_learner": 0.46, "gather": 0.04, "scatter": 0.02})
    assert legend.plain == "wait learner 46%  compute 21%"
    _, legend = phase_bar({"wait_request": 0.46, "a_phase_with_a_long_name": 0.21, "scatter": 0.2})
    assert legend.plain == "wait request 46%"


def test_live_display_shows_the_figures(run: FakeRun) -> None:
    busy(run)
    console = Console(file=io.StringIO(), width=80, record=True, force_terminal=True)
    console.print(Screen(run.config, run.tick()))
    text = console.export_text()
    for words in (
        "50.0% of the last 2",
        "199.0/s",
        "20.0/s",
        "80% full",
        "compute 90%",
        "wait ratio 25%",
        "0:00:01",
    ):
        assert words in text


@pytest.mark.parametrize("width", [40, 80])
def test_live_display_restores_the_terminal_and_keeps_log_messages(run: FakeRun, width: int) -> None:
    out = io.StringIO()
    display = LiveDisplay(run.config, Console(file=out, force_terminal=True, width=width))
    logger = logging.Logger("test")
    logger.addHandler(display.handler)
    try:
        display.update(run.tick())
        logger.warning("actor-001 was restarted")
        display.update(run.tick())
        raise RuntimeError
    except RuntimeError:
        display.close()
    display.close()
    text = out.getvalue()
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h")  # the cursor: hidden, then shown
    assert "restarted" in text


def test_plain_console_prints_a_line_every_five_seconds_to_stderr(
    run: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    display = make_console(run.config)  # pytest's stderr is no terminal
    for _ in range(12):
        busy(run)
        display.update(run.tick())
    display.close()
    display.close()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert [line.split()[0] for line in lines] == ["[0:00:01]", "[0:00:06]", "[0:00:11]", "[0:00:12]"]
    assert re.search(r"success 50.0% .* decisions 480 \(40.0/s\) .* updates 240 .* lag 3.0", lines[-1])


def test_console_off_prints_nothing(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    display = make_console(validate({"log": {"console": "off"}}))
    logger = logging.Logger("test")
    logger.addHandler(display.handler)
    logger.error("unseen")
    display.update(run.tick())
    display.close()
    assert capsys.readouterr() == ("", "")


def test_live_console_can_be_forced_without_a_terminal() -> None:
    display = make_console(validate({"log": {"console": "live"}}))
    display.close()
    assert isinstance(display, LiveDisplay)


def test_a_run_says_whether_it_replays_graphs(run: FakeRun) -> None:
    """On a GPU; on the CPU there is nothing to say."""
    assert run.monitor.summary()["cuda_graphs"] == {"policy": "none", "learner": "none"}
    view = run.tick()
    assert not [name for name in scalars(view) if "graphs" in name]
    assert "graphs" not in plain_line(run.config, view)
    assert "graphs" not in shown(run, view)
    run.counters["inference_graphs"][0], run.counters["learner_graphs"][0] = Graphs.CAPTURED, Graphs.FAILED
    view = run.tick()
    assert run.monitor.summary()["cuda_graphs"] == {"policy": "captured", "learner": "failed"}
    values = {name: value for name, value in scalars(view).items() if "graphs" in name}
    assert values == {"system/cuda_graphs/policy": 1.0, "system/cuda_graphs/learner": 0.0}
    assert "CUDA graphs: policy captured, learner failed" in plain_line(run.config, view)
    assert "policy captured, learner failed" in shown(run, view)


def test_a_run_says_how_far_its_policy_is_loaded(run: FakeRun) -> None:
    """Compiling it for all batch sizes can take long."""
    words = "ready for 3 of 20 batch sizes and prompt lengths"
    for prepared, said in (([0, 0], False), ([3, 20], True), ([20, 20], False)):
        run.counters["inference_prepared"][:] = prepared
        view = run.tick()
        assert (f"policy {words}" in plain_line(run.config, view)) is said
        assert (words in shown(run, view)) is said


def shown(run: FakeRun, view: View) -> str:
    """The live display as text."""
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(Screen(run.config, view))
    return console.export_text()


def test_plain_line_leaves_out_what_has_no_data_yet(run: FakeRun) -> None:
    line = "[0:00:01] warm-up 0 of 400 decisions before the first update"
    assert plain_line(run.config, run.tick()) == line
    run.counters["actor_decisions"][0] = 40
    assert re.fullmatch(
        r"\[0:00:02\] decisions 40 \(.*/s\) \| warm-up 40 of 400 decisions before the first update",
        plain_line(run.config, run.tick()),
    )


def test_sparkline_spans_the_scale_and_keeps_the_last_value() -> None:
    assert sparkline((0.0, 0.5, 1.0), 8) == "▁▅█"
    assert sparkline((*([0.0] * 99), 1.0), 10).endswith("▁█")
    assert len(sparkline((0.5,) * 99, 10)) <= 10
    assert sparkline((), 10) == ""


# ---- plot
