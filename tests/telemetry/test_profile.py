"""`--profile`: spans in shared memory, the diagnosis, the report, the trace, and runs made slow on purpose."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.launched import SMALL, Launched
from support.planted import Planted, delay
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs import ChunkOutcome, EnvironmentSpec, environment_spec
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.stages import DeviceStages, no_stage, stages_of
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.policies.pi0 import PI0_SETTINGS, pi0_record
from dsrl_async.policies.user import USER_SETTINGS
from dsrl_async.run import checkpoints
from dsrl_async.run.channel import SocketDirectory, make_ends
from dsrl_async.run.inference import server as inference
from dsrl_async.run.inference.copies import Copies
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.learner import learner
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.weights import WeightPublisher
from dsrl_async.run.worker import worker
from dsrl_async.sac.networks import Actor as SacActor
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Phases, Stop
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing
from dsrl_async.shm.slots import Slots
from dsrl_async.shm.spans import ACTOR_SPANS, STAGES, TRACKS, Spans, newest_spans, phases_of, profiled
from dsrl_async.telemetry.console import NoDisplay
from dsrl_async.telemetry.profile import report
from dsrl_async.telemetry.profile.bottleneck import OWNERS, WORK, Diagnosis, ProcessProfile, RunProfile, diagnose
from dsrl_async.telemetry.profile.hardware import CpuWatch, Gpu, Gpus
from dsrl_async.telemetry.profile.profiler import Profiler, with_stages, with_update
from dsrl_async.telemetry.profile.trace import FIRST_WORKER, INFERENCE, LONGEST_S, MACHINE, chrome_trace

HORIZON = 10
SECOND = 10**9


@pytest.fixture
def profile_config(small_config: Config) -> Config:
    return small_config.model_copy(update={"profile": True})


@pytest.fixture
def profile_memory(profile_config: Config, spec: EnvironmentSpec) -> Arena:
    return create_memory(profile_config, spec, HORIZON)


# ---- spans


def test_without_profile_phases_are_the_plain_ones(memory: Arena, profile_memory: Arena) -> None:
    assert not profiled(memory)
    assert type(phases_of(memory, "actor", 1)) is Phases
    assert not any(name.startswith(("span/", "stage/")) for name in memory.fields)
    assert type(phases_of(profile_memory, "actor", 1)) is not Phases


def test_phases_add_to_their_sums_and_leave_spans(profile_memory: Arena) -> None:
    counters, phase = Counters(profile_memory), phases_of(profile_memory, "actor", 1)
    begin = time.monotonic_ns()
    with phase("render"):
        time.sleep(0.002)
    counters.actor_decisions[1] = 7
    with phase("wait_action"):
        pass
    with pytest.raises(RuntimeError), phase("reset"):
        raise RuntimeError
    end = time.monotonic_ns()
    spans = newest_spans(profile_memory, "actor", 1)
    assert [TRACKS["actor"][name] for name in spans[:, 0]] == ["render", "wait_action", "reset"]
    assert spans[:, 3].tolist() == [0, 7, 7]
    times = spans[:, 1:3].ravel().tolist()
    assert [begin, *times, end] == sorted([begin, *times, end])
    lasted = (spans[:, 2] - spans[:, 1]) * 1e-9
    assert counters.actor_phase_s[1][[1, 4, 2]] == pytest.approx(lasted)
    assert not counters.actor_phase_s[0].any()
    assert len(newest_spans(profile_memory, "actor", 0)) == 0


def test_phases_mark_nvtx_ranges_that_nest(profile_memory: Arena) -> None:
    marked: list[str] = []
    nvtx: Any = types.SimpleNamespace(range_push=marked.append, range_pop=lambda: marked.append("pop"))
    phase = phases_of(profile_memory, "learner", ranges=nvtx)
    with phase("publish"), phase("update"):
        pass
    assert marked == ["publish", "update", "pop", "pop"]


def test_ring_keeps_the_newest_whole_spans(profile_memory: Arena) -> None:
    spans = Spans(profile_memory, "actor", 0)
    for number in range(10):
        spans.add(0, number, number + 1)
    assert newest_spans(profile_memory, "actor")[:, 1].tolist() == list(range(10))
    for number in range(10, 3 * ACTOR_SPANS):
        spans.add(0, number, number + 1)
    # the oldest one may be in the course of being overwritten
    assert newest_spans(profile_memory, "actor")[:, 1].tolist() == list(range(2 * ACTOR_SPANS + 1, 3 * ACTOR_SPANS))
    successor = Spans(profile_memory, "actor", 0)  # of a process that died
    successor.add(0, 10**6, 10**6)
    assert newest_spans(profile_memory, "actor")[-2:, 1].tolist() == [3 * ACTOR_SPANS - 1, 10**6]


WRITER = """
import json, sys
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.spans import Spans
spans = Spans(Arena.attach(json.loads(sys.argv[1])), "actor")
for number in range(1, 60_000):
    spans.add(number % 5, number, 2 * number)
"""


def test_spans_are_whole_while_another_process_writes_them(profile_memory: Arena) -> None:
    arguments = [sys.executable, "-c", WRITER, json.dumps(profile_memory.describe())]
    writer = subprocess.Popen(arguments, pass_fds=[profile_memory.fd])
    read_while_written = 0
    while writer.poll() is None:
        rows = newest_spans(profile_memory, "actor")
        read_while_written += len(rows) > 1
        numbers = rows[:, 1]
        assert (np.diff(numbers) == 1).all()
        assert (rows[:, 0] == numbers % 5).all()
        assert (rows[:, 2] == 2 * numbers).all()
    assert writer.returncode == 0
    assert read_while_written
    assert newest_spans(profile_memory, "actor")[-1, 1] == 59_999


# ---- diagnosis

IDLE = {
    "actor": {"physics": 0.02, "render": 0.02, "reset": 0.01, "replay_write": 0.0, "wait_action": 0.95},
    "inference": {
        **{"wait_request": 0.9, "wait_batch": 0.0, "wait_learner": 0.0, "gather": 0.01, "host_to_device": 0.0},
        **{"prefix": 0.02, "denoise": 0.03, "device_to_host": 0.0, "compute": 0.0, "scatter": 0.01, "weights": 0.01},
    },
    "learner": {
        "wait_data": 0.0,
        "wait_ratio": 0.9,
        "sample": 0.02,
        "update": 0.05,
        "publish": 0.01,
        "checkpoint": 0.0,
    },
}


def figures(
    phases: dict[str, dict[str, float]],
    cores: dict[str, float] | None = None,
    queued: dict[str, float] | None = None,
    cpus: int = 8,
    others: float = 0.0,
    **changes: Any,
) -> RunProfile:
    """A profile of 100 s of a run whose shares are those of `IDLE` but for `phases`."""
    cores, queued = cores or {}, queued or {}
    processes = {
        kind: ProcessProfile(
            4 if kind == "actor" else 1,
            IDLE[kind] | phases.get(kind, {}),
            cores.get(kind, 0.1),
            queued.get(kind, 0.0),
            50,
        )
        for kind in IDLE
    } | {"supervisor": ProcessProfile(1, {}, 0.0, 0.0, 50)}
    used = sum(process.cores for process in processes.values()) + others
    known: dict[str, Any] = {
        **{"seconds": 100.0, "warmed_up": True, "decisions": 1000, "env_steps": 5000, "updates": 1000},
        **{"batch_size": 4.0, "batch_fill": 0.9, "queue_wait_ms": 1.0, "processes": processes, "cpus": cpus},
        **{"core_shares": (used / cpus,) * cpus, "on_gpu": {"inference": False, "learner": False}, "gpus": ()},
        "uploads": "pageable",
    }
    return RunProfile(**(known | changes))


SETTING_OF = {
    **{("actor", phase): "actors" for phase in ("physics", "render", "reset", "replay_write")},
    **{("inference", phase): "inference.batch_wait_ms" for phase in ("gather", "scatter")},
    **{("inference", phase): "" for phase in ("host_to_device", "device_to_host")},
    **{("inference", phase): "inference.threads" for phase in ("prefix", "denoise", "compute")},
    ("inference", "weights"): "learner.publish_interval",
    ("learner", "sample"): "sac.batch_size",
    ("learner", "update"): "learner.threads",
    ("learner", "publish"): "learner.publish_interval",
    ("learner", "checkpoint"): "checkpoint.interval_minutes",
}


def test_all_work_has_a_name_and_advice() -> None:
    stages = {("inference", stage) for stage in STAGES["inference"]}
    phases = {(kind, phase) for kind in OWNERS for phase in TRACKS[kind] if not phase.startswith("wait_")}
    assert set(WORK) == set(SETTING_OF) == stages | phases


@pytest.mark.parametrize(("kind", "phase"), list(SETTING_OF))
def test_whoever_is_always_busy_is_the_bottleneck(kind: str, phase: str) -> None:
    """Work that takes 0.9 of a process's time, which is not spent on waiting then."""
    waits = {name: 0.0 for name in IDLE[kind] if name.startswith("wait_")}
    slow = figures({kind: {phase: 0.9, **waits}})
    result = diagnose(slow, Config())
    assert result[:3] == (kind, phase, SETTING_OF[kind, phase])
    assert WORK[kind, phase] in result.sentence
    assert "90%" in result.sentence
    assert result.sentence.endswith(".")
    assert ". " not in result.sentence


BUSY_LEARNER = {"learner": {"update": 0.9, "wait_ratio": 0.0}, "inference": {"wait_learner": 0.85, "wait_request": 0.0}}
BUSY_POLICY = {"inference": {"denoise": 0.85, "wait_request": 0.05}}
BUSY_COPIES = {"inference": {"host_to_device": 0.85, "wait_request": 0.05}}
BUSY_ACTORS = {"actor": {"render": 0.9, "wait_action": 0.05}}
TURNS = {"actor": {"physics": 0.4, "wait_action": 0.55}, "inference": {"denoise": 0.5, "wait_request": 0.4}}
FULL = {"actor": 1.0, "inference": 0.5, "learner": 0.4}

CASES: dict[str, tuple[RunProfile, dict[str, Any], tuple[str, str, str], str]] = {
    "no free core for more threads of the learner": (
        figures(BUSY_LEARNER, cpus=1, cores={"learner": 0.6}),
        {"replay_ratio": 2.5},
        ("learner", "update", "replay_ratio"),
        "lower replay_ratio (now 2.5)",
    ),
    "threads do not help a GPU": (
        figures(BUSY_POLICY, on_gpu={"inference": True, "learner": True}),
        {"policy": {"denoise_steps": 7}},
        ("inference", "denoise", "policy.denoise_steps"),
        "lower policy.denoise_steps (now 7)",
    ),
    "a prefix on a GPU can be compiled": (
        figures({"inference": {"prefix": 0.9, "wait_request": 0.0}}, on_gpu={"inference": True}),
        {},
        ("inference", "prefix", "policy.compile"),
        "set policy.compile",
    ),
    "one that is compiled needs another device": (
        figures({"inference": {"prefix": 0.9, "wait_request": 0.0}}, on_gpu={"inference": True}),
        {"policy": {"compile": True}},
        ("inference", "prefix", "device"),
        "faster device",
    ),
    "one with Triton's kernels is not compiled": (
        figures({"inference": {"prefix": 0.9, "wait_request": 0.0}}, on_gpu={"inference": True}),
        {"policy": {"kernels": "triton"}},
        ("inference", "prefix", "device"),
        "faster device",
    ),
    "copies are slow because the shared memory is not page-locked": (
        figures(BUSY_COPIES, on_gpu={"inference": True}),
        {},
        ("inference", "host_to_device", ""),
        "why observations go up row by row",
    ),
    "copies are slow although it is": (
        figures(BUSY_COPIES, on_gpu={"inference": True}, uploads="gathered"),
        {},
        ("inference", "host_to_device", ""),
        "a faster link to the GPU",
    ),
    "pictures of LIBERO can be cheaper": (
        figures(BUSY_ACTORS),
        {"env": {"name": "libero_spatial"}},
        ("actor", "render", "env.render_quality"),
        "env.render_quality to fast",
    ),
    "unless they are": (
        figures(BUSY_ACTORS),
        {"env": {"name": "libero_spatial", "render_quality": "fast"}, "actors": 12},
        ("actor", "render", "actors"),
        "raise actors (now 12)",
    ),
    "more actors would have no cores": (
        figures(BUSY_ACTORS, cores={"actor": 3.9}, cpus=4),
        {},
        ("actor", "render", "actors"),
        "more cores are needed",
    ),
    "a core is waited for, not the work": (
        figures(BUSY_ACTORS, cores={"actor": 1.2, "learner": 0.5}, queued={"actor": 0.6}, cpus=2),
        {},
        ("cpu", "actor/render", "actors"),
        "the workers' work waits for a core 60%",
    ),
    "a slow process waits for a core too, but not for long": (
        figures(BUSY_LEARNER, queued={"learner": 0.2}, cpus=2, others=1.5),
        {},
        ("learner", "update", "replay_ratio"),
        "gradient updates",
    ),
    "who waits for a core is not who has them": (
        figures(
            BUSY_ACTORS | {"learner": {"update": 0.5, "wait_ratio": 0.4}},
            cores={"actor": 0.6, "learner": 1.3},
            queued={"actor": 0.5},
            cpus=2,
        ),
        {},
        ("cpu", "learner/update", "replay_ratio"),
        "gradient updates; lower replay_ratio",
    ),
    "other programs have the cores": (
        figures(BUSY_ACTORS, cores={"actor": 0.5}, queued={"actor": 0.6}, cpus=2, others=1.3),
        {},
        ("other_programs", "", ""),
        "use 1.3 of 2 cores while the run gets 0.7",
    ),
    "a quota is used up on a machine where others use more": (
        figures(
            BUSY_ACTORS, cores={"actor": 1.8}, queued={"actor": 0.5}, cpus=2, others=20.0, core_shares=(22 / 64,) * 64
        ),
        {},
        ("cpu", "actor/render", "actors"),
        "2.0 of 2 cores",
    ),
    "a quota leaves cores though others use more than that": (
        figures(BUSY_LEARNER, cores={"learner": 1.0}, cpus=4, core_shares=(20 / 64,) * 64),
        {},
        ("learner", "update", "learner.threads"),
        "raise learner.threads",
    ),
    "all cores in use and nobody always busy": (
        figures(TURNS, cores=FULL, queued={"actor": 0.3}, cpus=2),
        {},
        ("cpu", "actor/physics", "actors"),
        "1.9 of 2 cores",
    ),
    "programs of a lower priority fill the cores": (
        figures(TURNS, cores={"actor": 0.5}, queued={"actor": 0.02}, cpus=2, others=1.3),
        {},
        ("turns", "wait_action", "actors"),
        "Nothing is busy all the time",
    ),
    "turns": (figures(TURNS), {"actors": 2}, ("turns", "wait_action", "actors"), "raise actors (now 2)"),
    "the actors are made to wait though the learner is not always busy": (
        figures({**TURNS, "inference": {"wait_learner": 0.4}, "learner": {"sample": 0.4, "update": 0.2}}),
        {},
        ("learner", "sample", "sac.batch_size"),
        "drawing batches",
    ),
    "waits for fuller batches": (
        figures({**TURNS, "inference": {"wait_batch": 0.5, "denoise": 0.3, "wait_request": 0.1}}),
        {"inference": {"batch_wait_ms": 40}},
        ("inference", "wait_batch", "inference.batch_wait_ms"),
        "lower inference.batch_wait_ms (now 40)",
    ),
    "one process does everything in turn": (
        figures({"actor": {"render": 0.2}, "learner": {"update": 0.5, "wait_ratio": 0.0}}, cpus=1),
        {"serial": True},
        ("learner", "update", "replay_ratio"),
        "50% of the run's time",
    ),
    "few decisions": (figures(BUSY_ACTORS, decisions=3), {}, ("nothing", "", ""), "only 3 decisions"),
    "the run gets no core to start on": (
        figures({}, decisions=0, cores={"actor": 0.0}, queued={"inference": 0.6}, cpus=2, others=1.9),
        {},
        ("other_programs", "", ""),
        "the inference process's work waits for a core 60%",
    ),
    "the run uses all cores to start": (
        figures({}, decisions=0, cores={"actor": 1.9}, queued={"actor": 0.8}, cpus=2),
        {},
        ("nothing", "", ""),
        "only 0 decisions",
    ),
    "a short time": (figures(BUSY_ACTORS, seconds=0.2), {}, ("nothing", "", ""), "in 0.2 s"),
}


@pytest.mark.parametrize("case", CASES)
def test_diagnosis(case: str) -> None:
    seen, settings, expected, words = CASES[case]
    result = diagnose(seen, validate(settings))
    assert result[:3] == expected
    assert words in result.sentence
    keys = set(Config.model_fields)
    assert not result.setting or result.setting.split(".")[0] in keys


@pytest.mark.parametrize("phase", ["prefix", "denoise", "compute"])
@pytest.mark.parametrize("case", ["a GPU", "one core"])
def test_another_policy_is_not_told_of_pi0_s_settings(
    small_config: Config, spec: EnvironmentSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, phase: str
) -> None:
    """A policy that is no Pi0, whether `policy.type` says so or its checkpoint."""
    phases = {"inference": {"prefix": 0.0, "denoise": 0.0, "compute": 0.0, phase: 0.85, "wait_request": 0.05}}
    known: dict[str, Any] = {"on_gpu": {"inference": True}} if case == "a GPU" else {"cpus": 1}
    monkeypatch.setattr(Profiler, "profile", lambda *_: figures(phases, **known))
    sentences = {}
    for name, own_settings in (("Pi0", PI0_SETTINGS), ("another", USER_SETTINGS)):
        run_dir = tmp_path / name
        run_dir.mkdir()
        config = small_config.model_copy(update={"profile": True})
        policy = SimpleNamespace(own_settings=own_settings)
        run: Any = SimpleNamespace(config=config, spec=spec, horizon=10, policy=policy, demonstration_rows=0)
        session = Session(run, run_dir, cast(Any, SimpleNamespace(reason=None, warnings=0)), NoDisplay())
        assert session._profiler is not None
        sentences[name] = session._profiler.write({})[0].sentence
    assert re.findall(r"policy\.\w+", sentences["Pi0"])
    assert set(re.findall(r"policy\.(\w+)", sentences["another"])) <= USER_SETTINGS


# ---- stages


def test_stages_take_the_place_of_the_host_s_wait_for_them() -> None:
    stages = {"host_to_device": 0.1, "prefix": 0.2, "denoise": 0.3, "device_to_host": 0.05}
    phases = {"wait_request": 0.2, "gather": 0.05, "compute": 0.6, "scatter": 0.1}
    on_gpu = with_stages(phases, stages, True)
    assert on_gpu == pytest.approx({**phases, **stages, "compute": 0.05})
    assert with_stages(phases, stages | {"device_to_host": 0.0}, False) == pytest.approx(
        {**phases, "prefix": 0.2, "denoise": 0.3, "compute": 0.1}
    )
    learner = {"update": 0.1, "publish": 0.5}
    assert with_update(learner, {"update": 0.0}) == learner
    assert with_update(learner, {"update": 0.55}) == pytest.approx({"update": 0.55, "publish": 0.05})


class FakeDevice:
    """A clock that tests set, and events that have come to pass once the device is so far."""

    def __init__(self) -> None:
        self.enqueued_ms = self.done_ms = 0.0

    def event(self) -> Any:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.at_ms = device, -1.0

    def record(self) -> None:
        self.at_ms = self.device.enqueued_ms

    def query(self) -> bool:
        return self.at_ms <= self.device.done_ms

    def synchronize(self) -> None:
        self.device.done_ms = max(self.device.done_ms, self.at_ms)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query(), "an event that has not come to pass has no time"
        assert end.query()
        return end.at_ms - self.at_ms


def test_device_stages_are_read_when_they_have_ended(profile_memory: Arena) -> None:
    device, sums = FakeDevice(), profile_memory["stage/inference_s"]
    spans = Spans(profile_memory, "inference_stage")
    stage = DeviceStages(STAGES["inference"], sums, spans, device.event)
    before = time.monotonic_ns()
    for name, lasts_ms in (("prefix", 20.0), ("denoise", 30.0)):
        with stage(name):
            device.enqueued_ms += lasts_ms
    assert not sums.any()  # nothing has been computed yet, and nobody has waited for it
    assert device.done_ms == 0.0
    device.done_ms = 20.0
    with stage("prefix"):
        device.enqueued_ms += 1.0
    assert sums.tolist() == pytest.approx([0, 0.02, 0, 0])
    device.done_ms = device.enqueued_ms
    with stage("prefix"):
        pass
    assert sums.tolist() == pytest.approx([0, 0.021, 0.03, 0])
    rows = newest_spans(profile_memory, "inference_stage")
    assert [STAGES["inference"][name] for name in rows[:, 0]] == ["prefix", "denoise", "prefix"]
    assert (rows[1:, 1] == rows[:-1, 2]).all()  # one after the other
    assert before <= rows[0, 1] <= time.monotonic_ns()


def test_stages_of_a_gpu_are_timed_by_its_events(monkeypatch: pytest.MonkeyPatch, profile_memory: Arena) -> None:
    """Also when the clocks have been compared again, for which nothing may be under way."""
    device, host_ns = FakeDevice(), [0]

    def event(enable_timing: bool) -> Any:
        assert enable_timing, "without it an event has no time"
        return device.event()

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(time, "monotonic_ns", lambda: host_ns[0])
    stage = stages_of(profile_memory, "inference", torch.device("cuda", 0))
    assert profile_memory["stage/inference_on_gpu"][0] == 1
    for start_s in (1.0, 20.0, 40.0):  # by the device's clock; the host's is 5 s ahead at first, and then 6
        device.enqueued_ms = device.done_ms = 1e3 * start_s
        host_ns[0] = round(1e9 * (start_s + (5 if start_s == 1.0 else 6)))
        with stage("prefix"):
            device.enqueued_ms += 10.0
        device.done_ms = device.enqueued_ms
    with stage("denoise"):
        pass
    assert profile_memory["stage/inference_s"].tolist() == pytest.approx([0, 0.03, 0, 0])
    begins = newest_spans(profile_memory, "inference_stage")[:, 1]
    assert (begins * 1e-9).tolist() == pytest.approx([6.0, 26.0, 46.0], abs=0.02)
    with stage("prefix"):
        device.enqueued_ms += 10.0
    computed, host_ns[0] = device.done_ms, 10**12
    with stage("prefix"):
        pass
    assert device.done_ms == computed, "a comparison of the clocks has waited for a stage"


def test_stages_of_the_cpu_are_timed_by_the_host(memory: Arena, profile_memory: Arena) -> None:
    assert stages_of(memory, "inference", torch.device("cpu")) is no_stage
    stage = stages_of(profile_memory, "inference", torch.device("cpu"))
    for name in STAGES["inference"]:
        with stage(name):
            time.sleep(0.001)
    assert (profile_memory["stage/inference_s"] > 0).tolist() == [False, True, True, False]
    assert profile_memory["stage/inference_on_gpu"][0] == 0


# ---- machine


def test_cpu_watch_counts_running_processes_only() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pids = {"supervisor": [os.getpid()], "actor": [child.pid, child.pid]}
    watch = CpuWatch()
    watch.measure(pids)
    assert watch.kinds == {}
    before, begin = watch.cores, time.process_time()
    while time.process_time() < begin + 0.2:
        pass
    watch._due = 0.0  # as if time had passed
    watch.measure(pids)
    kinds = watch.kinds
    assert kinds["supervisor"].running >= 0.15
    assert kinds["actor"].running < kinds["supervisor"].running
    assert kinds["actor"].watched == pytest.approx(2 * kinds["supervisor"].watched, rel=0.1)
    assert all(kind.queued >= 0 for kind in kinds.values())
    assert sum(watch.cores) - sum(before) >= 0.1
    child.communicate(b"\n")
    watch._due = 0.0
    watch.measure(pids | {"actor": [child.pid, os.getpid()]})  # one has ended, one was replaced
    assert watch.kinds["actor"] == kinds["actor"]


def test_cpu_watch_counts_what_this_kernel_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without schedstat, and in a container whose /proc/stat lists fewer cores than it may use."""

    def not_counted(pid: int, thread: int) -> Any:
        raise ValueError("this kernel does not count the CPU time of threads (CONFIG_SCHED_INFO)")

    monkeypatch.setattr("dsrl_async.telemetry.profile.hardware.thread_usage", not_counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 10_000})
    watch = CpuWatch()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # changed while it runs
    begin = time.process_time()
    for until in (0.0, 0.1):
        while time.process_time() < begin + until:
            pass
        watch._due = 0.0
        watch.measure({"supervisor": [os.getpid()]})
    assert watch.kinds["supervisor"].running >= 0.05
    assert watch.kinds["supervisor"].queued == 0
    assert len(watch.cores) == 2
    assert watch.cores[1] == 0
    (record,) = caplog.records
    assert record.message.startswith("waits for a core are not in the profile: this kernel")


def test_gpus_are_none_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Gpus().read() == []


class NVMLError(Exception):
    pass


def fake_nvml(monkeypatch: pytest.MonkeyPatch, broken: Sequence[tuple[str, str]] = ()) -> None:
    """NVML on a machine with two GPUs, of which the second is divided into two parts. `broken` are pairs of a device
    and of what it does not answer, memory or utilization."""
    memory = types.SimpleNamespace(used=3 * 10**9, total=80 * 10**9)
    uuids = {"A": "GPU-aa1", "B": "GPU-ab2", "B0": "MIG-b0", "B1": "MIG-b1"}

    def answer(what: str, value: Any) -> Callable[[str], Any]:
        def ask(handle: str) -> Any:
            if (handle, what) in broken:
                raise NVMLError
            return value

        return ask

    def parts(handle: str) -> int:
        if handle == "A":
            raise NVMLError
        return 7

    def part(handle: str, index: int) -> str:
        if (name := f"{handle}{index}") not in uuids:
            raise NVMLError
        return name

    library = types.ModuleType("pynvml")
    library.__dict__.update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: "AB"[index],
        nvmlDeviceGetMemoryInfo=answer("memory", memory),
        nvmlDeviceGetUtilizationRates=answer("utilization", types.SimpleNamespace(gpu=37)),
        nvmlDeviceGetName=lambda handle: f"H100 {handle}",
        nvmlDeviceGetUUID=lambda handle: uuids[handle].encode(),
        nvmlDeviceGetMaxMigDeviceCount=parts,
        nvmlDeviceGetMigDeviceHandleByIndex=part,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_as_the_library_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device does not answer costs only that figure: a part of a GPU has memory, but no utilisation."""
    fake_nvml(monkeypatch, [("A", "memory"), ("B", "utilization")])
    gpus = tuple(Gpus().read())
    assert gpus == (Gpu("H100 A", 0.37, 0, 0), Gpu("H100 B", None, 3 * 10**9, 80 * 10**9))
    seen = figures({}, gpus=gpus)
    words = report.text(seen, diagnose(seen, Config()))
    assert "GPU 0, H100 A: 37% busy, 0.0 of 0.0 GB used" in words
    assert "GPU 1, H100 B: how busy is not known, 3.0 of 80.0 GB used" in words
    values = report.scalars(seen)
    assert values["profile/gpu_busy/0"] == 0.37
    assert "profile/gpu_busy/1" not in values
    assert values["profile/gpu_memory_gb/1"] == 3.0
    json.dumps(report.as_json(seen, diagnose(seen, Config())), allow_nan=False)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, "A B"),
        ("", ""),
        ("1,0", "B A"),
        (" 1", "B"),
        ("1,2,0", "B"),
        ("-1,0", ""),
        ("0,0", ""),
        ("GPU-ab,GPU-aa", "B A"),
        ("GPU-a", ""),  # of which?
        ("GPU-aa1,0", "A"),
        ("GPU-aa1,GPU-aa", ""),
        ("MIG-b1,MIG-b0", "B1 B0"),
        ("MIG-b2", ""),
    ],
)
def test_gpus_are_those_that_cuda_sees(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str) -> None:
    fake_nvml(monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name.removeprefix("H100 ") for gpu in Gpus().read()] == expected.split()


def test_launched_process_does_without_torch() -> None:
    code = (
        "import sys; from dsrl_async.run.supervisor import session; print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ---- report


def test_report_has_every_figure() -> None:
    seen = figures(BUSY_LEARNER, cores={"learner": 0.83}, queued={"learner": 0.12}, others=0.5)
    diagnosis = diagnose(seen, Config())
    words = report.text(seen, diagnosis)
    assert max(map(len, words.splitlines())) <= 120
    assert " ".join(words.split("\n\n")[0].split()) == diagnosis.sentence
    for part in ("10.0 decisions/s", "actor x4", "update 90.0%", "wait learner 85.0%", "0.83", "12%", "50 MB each"):
        assert part in words
    values = report.scalars(seen)
    assert values["profile/learner/update"] == 0.9
    assert values["profile/waits_for_a_core/learner"] == 0.12
    assert values["profile/cores/other_programs"] == pytest.approx(0.5)
    assert len([name for name in values if name.startswith("profile/core_busy/")]) == 8
    content = report.as_json(seen, diagnosis)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["process"] == "learner"
    assert content["processes"]["learner"]["phases"]["update"] == 0.9


def test_report_of_many_cores_is_no_wider() -> None:
    seen = figures(BUSY_LEARNER, cpus=64)
    words = report.text(seen, diagnose(seen, Config()))
    assert max(map(len, words.splitlines())) <= 120
    assert "64 of them may be kept busy" in " ".join(words.split())


def test_picture_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    seen = figures(BUSY_LEARNER)
    png, width, height = report.picture(seen, diagnose(seen, Config()))
    assert png.startswith(b"\x89PNG")
    assert Image.open(io.BytesIO(png)).size == (width, height)


# ---- trace


def check_trace(trace: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Raises AssertionError unless it is a JSON object in the trace-event format whose spans nest; (process, thread) ->
    spans."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    named = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M", "C")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert event["args"]["name"]
            named.add((event["name"], event["pid"]))
        elif event["ph"] == "C":
            assert event["ts"] >= 0
            assert all(isinstance(value, float) for value in event["args"].values())
        else:
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for (process, _), spans in tracks.items():
        assert ("process_name", process) in named
        assert ("thread_name", process) in named
        for before, after in itertools.pairwise(sorted(spans, key=lambda span: (span["ts"], -span["dur"]))):
            ends = before["ts"] + before["dur"], after["ts"] + after["dur"]
            assert after["ts"] >= ends[0] - 1e-3 or ends[1] <= ends[0] + 1e-3, "spans overlap without nesting"
    return tracks


def test_trace_has_the_spans_of_all_processes_on_one_clock(profile_memory: Arena) -> None:
    for track in TRACKS:
        for ring in range(2 if track == "actor" else 1):
            spans = Spans(profile_memory, track, ring)
            for number in range(5):
                start = (100 + number) * SECOND
                spans.add(0, start, start + SECOND // 2)
    samples = [(second * SECOND, "cores used", {"actor": 0.5}) for second in (1, 102)]
    tracks = check_trace(trace := chrome_trace(profile_memory, 104 * SECOND, samples))
    assert set(tracks) == {(2, 1), (2, 2), (3, 1), (3, 2), (FIRST_WORKER, 1), (FIRST_WORKER + 1, 1)}
    for spans_of_track in tracks.values():
        assert [span["ts"] for span in spans_of_track] == [1e6 * second for second in (100, 101, 102, 103)]
        assert {span["dur"] for span in spans_of_track} == {0.5e6}
    assert tracks[INFERENCE, 2][0]["name"] == "host_to_device"
    curves = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert [(curve["ts"], curve["pid"]) for curve in curves] == [(102e6, MACHINE)]


def test_trace_begins_where_all_processes_have_spans(profile_memory: Arena) -> None:
    quick, slow = Spans(profile_memory, "actor", 0), Spans(profile_memory, "actor", 1)
    for number in range(2 * ACTOR_SPANS):  # 20 ms each
        quick.add(0, number * SECOND // 50, (number + 1) * SECOND // 50)
    until = 2 * ACTOR_SPANS // 50 * SECOND
    for second in range(until // SECOND):
        slow.add(1, second * SECOND, (second + 1) * SECOND)
    tracks = check_trace(chrome_trace(profile_memory, until, []))
    begins = [tracks[FIRST_WORKER + lane, 1][0]["ts"] for lane in (0, 1)]
    assert begins[0] >= (ACTOR_SPANS + 1) / 50 * 1e6
    assert begins[0] <= begins[1] <= begins[0] + 1e6
    assert begins[0] >= until / 1e3 - LONGEST_S * 1e6


def test_overlapping_spans_are_no_valid_trace(profile_memory: Arena) -> None:
    spans = Spans(profile_memory, "learner")
    spans.add(0, 0, 2 * SECOND)
    spans.add(1, SECOND, 3 * SECOND)
    with pytest.raises(AssertionError, match="without nesting"):
        check_trace(chrome_trace(profile_memory, 4 * SECOND, []))


# ---- profiler


def test_profile_starts_anew_when_the_run_has_got_going(
    profile_config: Config, profile_memory: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters, now = Counters(profile_memory), [1000.0]
    handler = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr("dsrl_async.telemetry.profile.profiler.time.monotonic", lambda: now[0])
    profiler = Profiler(profile_config, tmp_path, profile_memory, counters.snapshot())
    try:

        def second(render: float, update: float) -> dict[str, float]:
            now[0] += 1.0
            counters.actor_decisions += 30
            counters.actor_phase_s[:, 1] += render
            counters.learner_phase_s[3] += update
            counters.learner_updates[0] += update > 0
            return profiler.tick(counters.snapshot(), {"supervisor": [os.getpid()]})

        for _ in range(5):
            second(render=0.9, update=0.0)
        assert profiler.write({})[0][:2] == ("actor", "render")
        assert "of the warm-up" in (tmp_path / "profile" / "report.txt").read_text()
        for _ in range(4):
            values = second(render=0.05, update=0.9)
        diagnosis, _ = profiler.write({"actor_mean": 40.0, "learner": 300.0})
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert diagnosis[:2] == ("learner", "update")
    assert values["profile/learner/update"] == pytest.approx(4 * 0.9 / 9, abs=0.01)
    content = json.loads((tmp_path / "profile" / "report.json").read_text())
    assert content["seconds"] == 3.0
    assert content["processes"]["actor"]["phases"]["render"] == pytest.approx(0.05)
    assert content["processes"]["actor"]["memory_mb"] == 40.0
    check_trace(json.loads((tmp_path / "profile" / "trace.json").read_text()))


def test_gpu_is_as_busy_as_it_was_over_the_run_and_not_when_the_report_is_written(
    profile_config: Config, profile_memory: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, busy = [1000.0], [0.0]
    monkeypatch.setattr("dsrl_async.telemetry.profile.profiler.time.monotonic", lambda: now[0])
    part = Gpu("MIG", None, 10**9, 10**10)
    monkeypatch.setattr(Gpus, "read", lambda self: [Gpu("H100", busy[0], 3 * 10**9, 80 * 10**9), part])
    handler = signal.getsignal(signal.SIGUSR1)
    profiler = Profiler(profile_config, tmp_path, profile_memory, Counters(profile_memory).snapshot())
    signal.signal(signal.SIGUSR1, handler)
    for share in (0.9, 0.7, 0.8):
        now[0], busy[0] = now[0] + 1, share
        profiler.tick(Counters(profile_memory).snapshot(), {})
    busy[0] = 0.0  # the processes have been stopped
    profiler.write({})
    content = json.loads((tmp_path / "profile" / "report.json").read_text())
    assert [gpu["utilization"] for gpu in content["gpus"]] == [pytest.approx(0.8), None]
    assert content["gpus"][0]["memory_used"] == 3 * 10**9


# ---- stages made slow on purpose


class InstantEnvironment:
    """Does nothing, in no time; episodes of five decisions."""

    spec = TABLETOP

    def __init__(self) -> None:
        self._decisions = 0

    def reset(self, seed: int, number: int = 0) -> int:
        return 0

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        self._decisions += 1
        return ChunkOutcome(len(action_chunk), -1, False, truncated=self._decisions % 5 == 0)

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        pass

    def close(self) -> None:
        pass


DELAYS: dict[str, tuple[str, Any, str, float]] = {
    "physics": ("actor", InstantEnvironment, "step_chunk", 0.2),
    "render": ("actor", InstantEnvironment, "observe", 0.2),
    "reset": ("actor", InstantEnvironment, "reset", 1.0),
    "replay_write": ("actor", ReplayRing, "append", 0.2),
    "gather": ("inference", Copies, "up", 0.1),
    "prefix": ("inference", SteeredPolicy, "encode", 0.1),
    "denoise": ("inference", SteeredPolicy, "denoise", 0.1),
    "scatter": ("inference", Slots, "answer", 0.1),
    "wait_batch": ("inference", worker.Lane, "advance", 0.2),
    "weights": ("inference", SacActor, "load_flat_", 0.2),
    "sample": ("learner", Updates, "draw_batch", 0.1),
    "update": ("learner", Updates, "run", 0.1),
    "publish": ("learner", WeightPublisher, "publish", 0.2),
    "checkpoint": ("learner", checkpoints, "save", 0.1),
}
"""Phase -> kind of process, owner and name of what it calls, and by how many seconds each call is delayed. The batch
waits where only one of two actors is."""
INSTANT = ("prefix", "denoise", "sample", "update", "checkpoint")
"""Work that is left out, so that the delay stands out also where cores and disks are slow."""


def play_in_threads(config: Config, run_dir: Path, decisions: int) -> Diagnosis:
    """A run whose processes are threads: their own loops, phases and stages, the profile, and no need of many cores."""
    device, spec = torch.device("cpu"), environment_spec(config.env.model_dump())
    arena = create_memory(config, spec, HORIZON)
    counters = Counters(arena)
    observation_ready, transition_ready, *wake = (events.create() for _ in range(2 + config.actors))
    sockets = SocketDirectory()
    ends = make_ends(sockets.endpoint)
    (run_dir / "checkpoints").mkdir()

    def act(lane: int) -> None:
        actor = worker.Lane(lane, 1, config.seed, config.env.model_dump(), arena, InstantEnvironment())
        worker.play(actor, wake[lane], [observation_ready, transition_ready])

    def infer() -> None:
        stage = stages_of(arena, "inference", device)
        files, counters = pi0_record(find_policy(EMBEDDED_POLICY)), Counters(arena)
        policies = inference.load_policies(config, spec, device, files, counters, stage)
        server = inference.InferenceServer(config, arena, policies, inference.notifier(wake))
        inference.serve(server, ends.subscriber, observation_ready)

    def learn() -> None:
        publisher = WeightPublisher(ends.publisher)
        agent = learner.Learner(config, arena, HORIZON, device, run_dir, publisher.publish)
        learner.learn(agent, publisher, transition_ready)
        publisher.close()

    handler = signal.getsignal(signal.SIGUSR1)
    profiler = Profiler(config, run_dir, arena, counters.snapshot())
    with ThreadPoolExecutor(config.actors + 2) as threads:
        roles = [threads.submit(infer), threads.submit(learn)]
        roles += [threads.submit(act, lane) for lane in range(config.actors)]
        while counters.decisions() < decisions and not any(role.done() for role in roles):
            time.sleep(0.05)
            profiler.tick(counters.snapshot(), {})
        counters.stop = Stop.EVERYONE
        for fd in (observation_ready, transition_ready, *wake):
            events.notify(fd)
    signal.signal(signal.SIGUSR1, handler)
    events.close([observation_ready, transition_ready, *wake])
    sockets.close()
    for role in roles:
        role.result()
    return profiler.write({})[0]


@pytest.mark.parametrize("phase", DELAYS)
def test_report_names_the_stage_that_was_made_slow(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    torch.set_num_threads(1)
    for instant in INSTANT:
        _, owner, name, _ = DELAYS[instant]
        monkeypatch.setattr(owner, name, lambda *arguments: True)
    kind, owner, name, seconds = DELAYS[phase]
    original = getattr(owner, name)

    def delayed(*arguments: Any, **keywords: Any) -> Any:
        if phase != "wait_batch" or arguments[0].number == 1:
            time.sleep(seconds)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, delayed)
    settings = small_config.model_dump() | {"profile": True}
    settings["learner"] |= {"publish_interval": 2}
    settings["inference"]["batch_wait_ms"] = 1000.0 if phase == "wait_batch" else None
    settings["checkpoint"]["interval_minutes"] = 1e-6 if phase == "checkpoint" else 5.0
    diagnosis = play_in_threads(validate(settings), tmp_path, decisions=52)
    assert diagnosis[:2] == (kind, phase), (tmp_path / "profile" / "report.txt").read_text()
    advised = SETTING_OF.get((kind, phase), "inference.batch_wait_ms")
    assert diagnosis.setting == advised or diagnosis.setting in ON_FEW_CORES
    tracks = check_trace(json.loads((tmp_path / "profile" / "trace.json").read_text()))
    assert phase in {span["name"] for spans in tracks.values() for span in spans}


ON_FEW_CORES = {"replay_ratio", "policy.denoise_steps", "policy.compile"}
"""What is advised where no core is left for more threads."""


def cpu_seconds() -> tuple[float, float, float]:
    """Seconds that the cores that this process may use were busy, another machine on the same hardware included, that
    this process and its children that have ended used, and of the clock."""
    allowed = os.sched_getaffinity(0)
    cores = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in allowed]
    busy = sum(core.user + core.nice + core.system + core.irq + core.softirq + core.steal for core in cores)
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy, sum(usage.ru_utime + usage.ru_stime for usage in own), time.monotonic()


BUSY_MACHINE = 0.25
"""Share of each core that the run may use: where other programs take so much, processes may wait for a core."""


DENOISE, RENDER, UPDATE = (
    ("inference.server", "dsrl_async.run.inference.steering:SteeredPolicy.denoise"),
    ("worker.template", "dsrl_async.envs.tabletop:TabletopEnvironment.observe"),
    ("learner.learner", "dsrl_async.run.learner.updates:Updates.run"),
)
"""What is made slow: the module of a process, and a function that it calls."""
by_hand = pytest.mark.skipif(
    os.environ.get("DSRL_ALL_PROFILES") != "1",
    reason="the report names these in the test with threads; DSRL_ALL_PROFILES=1 runs them as processes, too",
)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("kind", "phase", "delays", "options"),
    [
        ("inference", "denoise", {DENOISE: 0.3, RENDER: 0.05, UPDATE: 0.05}, ()),
        (
            *("inference", "wait_batch"),
            {("worker.template", "dsrl_async.run.worker.worker:Lane.advance"): 0.3},
            ("--inference.batch-wait-ms", "1000"),
        ),
        pytest.param("actor", "render", {RENDER: 0.3}, (), marks=by_hand),
        pytest.param("learner", "update", {UPDATE: 0.3}, (), marks=by_hand),
    ],
)
def test_profile_of_a_real_run_that_was_made_slow(
    tmp_path: Path, kind: str, phase: str, delays: dict[tuple[str, str], float], options: Sequence[str]
) -> None:
    """In each kind of process a phase, of which one holds up the run. Of what waits for a batch, one worker is slow."""
    condition = "arguments[0].number == 1" if phase == "wait_batch" else "True"
    code = {f"dsrl_async.run.{program}": delay(call, seconds, condition) for (program, call), seconds in delays.items()}
    planted = Planted(tmp_path, code)
    arguments = [*SMALL, "--profile", "--max-decisions", "48", *options]
    begin = cpu_seconds()
    result = Launched(tmp_path / "run", *arguments, planted=planted).finish(280)
    busy, own, seconds = (end - start for start, end in zip(begin, cpu_seconds(), strict=True))
    others = (busy - own) / seconds
    assert result["exit_reason"] == "max_decisions", result
    content = json.loads((tmp_path / "run" / "profile" / "report.json").read_text())
    assert result["bottleneck"] == content["sentence"]
    slowed = {kind: phase}
    if len(delays) > 1:
        slowed = {"inference": "denoise", "actor": "render", "learner": "update"}
    for slow_kind, slow_phase in slowed.items():
        phases: dict[str, float] = content["processes"][slow_kind]["phases"]
        work = {name: share for name, share in phases.items() if name == slow_phase or "wait" not in name}
        assert max(work, key=work.__getitem__) == slow_phase, work
    if content["process"] in ("cpu", "other_programs") and others > BUSY_MACHINE * len(os.sched_getaffinity(0)):
        pytest.skip(f"other programs took {others:.1f} cores: {content['sentence']}")
    assert (content["process"], content["phase"]) == (kind, phase), content["sentence"]
    assert WORK.get((kind, phase), "the wait for fuller batches") in result["bottleneck"]


# ---- real runs


def test_profile_on_demand_and_at_the_end(tmp_path: Path) -> None:
    began = time.monotonic()
    run = Launched(tmp_path / "run", *SMALL, "--profile")
    run.wait_for(lambda figures: figures.get("updates", 0) >= 60, timeout_s=200)
    directory = tmp_path / "run" / "profile"
    assert not directory.exists()
    run.signal(signal.SIGUSR1)
    run.wait_for(lambda _: (directory / "report.png").is_file(), timeout_s=60)
    on_demand = json.loads((directory / "report.json").read_text())
    run.signal(signal.SIGINT)
    result = run.finish()
    assert result["exit_reason"] == "interrupted"
    assert run.left_over() == []
    content = json.loads((directory / "report.json").read_text())
    assert content["decisions"] >= on_demand["decisions"] > 0
    assert content["warmed_up"]
    assert result["bottleneck"] == content["sentence"]
    assert result["bottleneck"] in " ".join((directory / "report.txt").read_text().split())
    for kind in ("actor", "inference", "learner"):
        process = content["processes"][kind]
        assert 0.5 < sum(process["phases"].values()) <= 1.01, kind
        assert process["cores"] > 0
        assert process["memory_mb"] > 1
    assert {"prefix", "denoise"} <= content["processes"]["inference"]["phases"].keys()
    tracks = check_trace(json.loads((directory / "trace.json").read_text()))
    assert set(tracks) == {(2, 1), (2, 2), (3, 1), (FIRST_WORKER, 1), (FIRST_WORKER + 1, 1)}
    everything = [span for spans in tracks.values() for span in spans]
    assert all(began * 1e6 <= span["ts"] <= time.monotonic() * 1e6 for span in everything)
    steps = [span["args"]["step"] for span in sorted(tracks[3, 1], key=lambda span: span["ts"])]
    assert steps == sorted(steps)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = events.Tags()
    expected = {"profile/actor/render", "profile/inference/denoise", "profile/learner/update", "profile/cores/actor"}
    assert expected | {"profile/waits_for_a_core/learner", "profile/core_busy/0"} <= set(tags["scalars"])
    assert tags["images"] == ["profile/report"]


def test_serial_runs_are_profiled_too(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL, "--serial", "--profile", "--max-decisions", "80")
    result = run.finish(200)
    content = json.loads((tmp_path / "run" / "profile" / "report.json").read_text())
    assert content["process"] in OWNERS or content["process"] == "nothing"
    assert content["processes"]["serial"]["cores"] > 0
    assert content["processes"]["serial"]["memory_mb"] > 1
    assert "supervisor" not in content["processes"]
    words = (tmp_path / "run" / "profile" / "report.txt").read_text()
    assert [line.split()[0] for line in words.partition("cores used")[2].splitlines()[1:3]] == ["serial", "other"]
    tags = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith("profile/cores/")} == {
        *("profile/cores/serial", "profile/cores/other_programs")
    }
    assert result["bottleneck"] == content["sentence"]
    check_trace(json.loads((tmp_path / "run" / "profile" / "trace.json").read_text()))
