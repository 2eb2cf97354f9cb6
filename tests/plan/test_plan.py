"""The plan: its bounds against cases worked out by hand; the command; what checks it against the benchmark."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.commands import call

from dsrl_async.bench.pipeline import DEVICES
from dsrl_async.config.load import validate
from dsrl_async.config.settings import InferenceConfig
from dsrl_async.plan.capacity import (
    ROW_S,
    CapacityInputs,
    Link,
    Machines,
    Payload,
    curve,
    judge,
    machines,
    predict,
)
from dsrl_async.plan.report import sentence
from dsrl_async.plan.simulation import EnvironmentTimes
from dsrl_async.policies.user import USER_SETTINGS
from dsrl_async.run import preflight

GIVEN = ["--env-ms", "60", "--reset-s", "0.6", "--device-ms", "1:7", "32:153", "--cores", "64", "--memory-gib", "64"]
SMALL = [
    *("--replay.warmup-decisions", "16", "--replay.capacity", "2000", "--sac.batch-size", "16"),
    *("--sac.hidden-dims", "[16, 16]", "--sac.num-q-heads", "2", "--sac.conv-channels", "[4]"),
    *("--policy.denoise-steps", "2", "--env.max-episode-steps", "10", "--inference.buckets", "[1, 2]"),
]
"""A run that takes little time."""


def figures(**changes: Any) -> CapacityInputs:
    """Thinking 1 s, service 0.1 s for any batch up to 4; nothing but the environments and the device takes time."""
    basis = CapacityInputs(
        environment=EnvironmentTimes(chunk_s=1.0, sigma=0.0, reset_s=0.0, reset_probability=0.04),
        steps_per_decision=5,
        device_s={1: 0.1, 4: 0.1},
        batch_sizes=(1, 2, 4),
        cores=1000,
    )
    return replace(basis, **changes)


# ---- what bounds a run


def test_one_actor_alternates_with_the_device() -> None:
    result = predict(figures(), 1)
    assert result.decisions_per_s == pytest.approx(1 / 1.1)
    assert result.env_steps_per_s == pytest.approx(5 / 1.1)
    assert result.updates_per_s == pytest.approx(1 / 1.1)
    assert result.device_busy == pytest.approx(0.1 / 1.1)
    assert result.cores_busy == pytest.approx(1)
    assert result.bound == "environments"


def test_resets_are_part_of_a_decision() -> None:
    times = EnvironmentTimes(chunk_s=1.0, sigma=0.0, reset_s=5.0, reset_probability=1.0)
    result = predict(figures(environment=times), 1)
    assert result.decisions_per_s == pytest.approx(1 / 6.1)
    assert result.cores_busy == pytest.approx(1)


def test_batches_are_those_that_a_run_would_choose() -> None:
    """Three that are always ready: a batch of four would be padded too much, so they are served one by one."""
    ready = EnvironmentTimes(chunk_s=1e-9, sigma=0.0, reset_s=0.0, reset_probability=0.0)
    result = predict(figures(environment=ready, batch_sizes=(1, 4)), 3)
    assert result.decisions_per_s == pytest.approx(10, rel=1e-3)
    assert result.bound == "device"
    assert predict(figures(environment=ready, batch_sizes=(3,)), 3).decisions_per_s == pytest.approx(30, rel=1e-3)


def test_waiting_for_a_fuller_batch_takes_its_time() -> None:
    """Three actors soon take turns at the device and never meet there; waiting for the others, each takes longer."""
    hasty = figures(batch_sizes=(1, 4), environment=EnvironmentTimes(1.0, 0.0, 0.0, 0.0))
    assert predict(hasty, 3).decisions_per_s == pytest.approx(3 / 1.1, rel=1e-3)
    assert predict(replace(hasty, batch_wait_s=0.05), 3).decisions_per_s == pytest.approx(3 / 1.15, rel=0.02)


@pytest.mark.parametrize(("actors", "rate"), [(8, 86), (16, 162), (32, 205), (64, 203)])
def test_published_figures(actors: int, rate: float) -> None:
    """The ideal of docs/measurements/throughput.md times its share that the table there gives for the run's sizes."""
    sizes = InferenceConfig().buckets
    device_s = {size: DEVICES["h100"](size) for size in sizes}
    known = figures(environment=EnvironmentTimes(), device_s=device_s, batch_sizes=sizes)
    assert predict(known, actors).decisions_per_s == pytest.approx(rate, rel=0.04)


def test_cores_bound_the_work() -> None:
    """A decision of the only batch size costs 1 + 0.1 core-seconds; the learner, 0.5 for every second decision."""
    few = figures(cores=2.0, batch_sizes=(1,), update_s=0.5, replay_ratio=0.5)
    result = predict(few, 4)
    assert result.decisions_per_s == pytest.approx(2 / (1.1 + 0.25))
    assert result.updates_per_s == pytest.approx(1 / (1.1 + 0.25))
    assert result.cores_busy == pytest.approx(2.0)
    assert result.bound == "cores"


def test_what_only_waits_needs_no_cores() -> None:
    result = predict(figures(cores=0.01, environment_cores=0.0, device_cores=0.0), 200)
    assert result.bound == "device"
    assert result.decisions_per_s == pytest.approx(40, rel=1e-3)
    assert result.cores_busy == 0


def test_the_learner_holds_the_actors_back() -> None:
    result = predict(figures(update_s=2.0, replay_ratio=0.25), 16)
    assert result.decisions_per_s == pytest.approx(2.0)
    assert result.updates_per_s == pytest.approx(0.5)
    assert result.bound == "learner"


def test_a_shared_device_does_the_learners_work_too() -> None:
    """Full batches of 4 cost 0.025 s a decision, updates 0.1 s: 8 decisions a second in all. The learner by itself
    would keep up with 10."""
    alone = figures(update_s=0.1, update_cores=0.0)
    assert predict(alone, 64).decisions_per_s == pytest.approx(10)
    result = predict(replace(alone, learner_shares_device=True), 64)
    assert result.decisions_per_s == pytest.approx(8)
    assert result.bound == "device"


def test_device_curve_between_and_beyond_what_is_known() -> None:
    known = figures(device_s={2: 0.2, 4: 0.3})
    assert [known.service_s(size) for size in (1, 2, 3, 4, 6)] == pytest.approx([0.2, 0.2, 0.25, 0.3, 0.45])


# ---- the verdict


def test_the_fewest_actors_that_saturate_the_device() -> None:
    basis = figures(environment=EnvironmentTimes(0.3, 0.3, 0.0, 0.04))
    points = curve(basis)
    enough, bound = judge(basis, points)
    assert bound == "device"
    most = max(point.decisions_per_s for point in points)
    assert most == pytest.approx(40, rel=0.01)
    assert enough.actors == next(n for n in itertools.count(1) if predict(basis, n).decisions_per_s >= 0.95 * most)
    # beyond the last point more actors change nothing
    assert predict(basis, 2 * points[-1].actors).decisions_per_s == pytest.approx(points[-1].decisions_per_s, rel=0.01)


def test_memory_ends_the_curve() -> None:
    small = figures(most_actors=7)
    points = curve(small)
    assert [point.actors for point in points] == [1, 2, 3, 4, 6, 7]
    enough, bound = judge(small, points)
    assert (enough.actors, bound) == (7, "memory")


def test_a_run_may_have_no_more_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 7 in the place of 4096, and memory for more."""
    monkeypatch.setattr("dsrl_async.plan.capacity.MOST_ACTORS", 7)
    small = figures(most_actors=7)
    verdict = judge(small, curve(small))
    assert (verdict.enough.actors, verdict.bound) == (7, "actors")
    assert "actors that a run may have are the bound: more machines" in sentence(small, verdict)


def test_one_actor_can_be_enough() -> None:
    slow = figures(update_s=10.0)
    enough, bound = judge(slow, curve(slow))
    assert (enough.actors, bound) == (1, "learner")


def test_what_would_help_is_a_setting_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--env-ms", "60", "--device-ms", "8:40", "--cores", "64", "--memory-gib", "64"]
    assert "fewer policy.denoise_steps or policy.compile would give more" in run(*arguments)
    record = preflight.check_checkpoint(validate({}))
    other = replace(record, own_settings=USER_SETTINGS)
    monkeypatch.setattr(preflight, "check_checkpoint", lambda *_: other)
    printed = " ".join(run(*arguments).split())
    assert "The device is the bound: a faster device, or a policy whose policy.options let it do less, would" in printed
    assert "denoise_steps" not in printed


# ---- many machines


def test_groups_of_a_machine_multiply_devices_and_share_cores_and_learner() -> None:
    """A group with an actor does 1 / 1.1 decisions per second, and is busy with them for a tenth of the time."""
    one, four = (predict(figures(groups=groups), 1) for groups in (1, 4))
    assert four.decisions_per_s == pytest.approx(4 * one.decisions_per_s)
    assert four.device_busy == pytest.approx(one.device_busy)
    assert four.cores_busy == pytest.approx(4 * one.cores_busy)
    few_cores = predict(figures(groups=4, cores=2), 1)
    assert (few_cores.bound, few_cores.decisions_per_s) == ("cores", pytest.approx(2 / 1.1))
    learner = predict(figures(groups=4, update_s=0.5), 1)
    assert (learner.bound, learner.decisions_per_s) == ("learner", pytest.approx(2))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_learner_takes_its_part_of_one_device(groups: int) -> None:
    """Without it, a device of 100 actors does 40 decisions per second; with it, the first one does fewer."""
    most = predict(figures(groups=groups, update_s=0.001, learner_shares_device=True), 100)
    updating = 0.001 * most.decisions_per_s
    assert most.bound == "device"
    assert most.decisions_per_s == pytest.approx(40 * (groups - updating), rel=0.02)


def at(nodes: Sequence[int], bytes_per_s: float = 1e9, publish_s: float = 0.0) -> list[Machines]:
    """Of machines whose memory holds one actor, which does 1 / 1.1 decisions per second."""
    basis = figures(update_s=0.1, replay_ratio=2.0, most_actors=1)
    payload = Payload(observation=1000, action_chunk=10, transition=100, weights=5000)
    return machines(basis, nodes, payload, Link(bytes_per_s, publish_interval=10, publish_s=publish_s))


def test_machines_add_up_until_the_learner_is_full() -> None:
    few, many = at([3, 100])
    assert few.decisions_per_s == pytest.approx(3 / 1.1)
    assert (few.actors, few.bound) == (3, "machines")
    assert few.transition_bytes_per_s == pytest.approx(300 / 1.1)
    # 2 updates a decision, one publication in ten of them, to three machines
    assert few.weights_bytes_per_s == pytest.approx(3 / 1.1 * 2 / 10 * 5000 * 3)
    assert many.bound == "learner"
    assert many.decisions_per_s == pytest.approx(5)
    assert many.updates_per_s == pytest.approx(10)


def test_rows_fill_a_link_and_weights_come_less_often() -> None:
    (thin,) = at([3], bytes_per_s=150)
    assert thin.bound == "network"
    assert thin.decisions_per_s == pytest.approx(1.5)  # of 100 bytes
    assert thin.weights_every_s == pytest.approx(100)  # 5000 bytes to three machines
    assert thin.weights_bytes_per_s == pytest.approx(150)


def test_weights_come_no_more_often_than_they_may() -> None:
    (often,), (seldom,) = at([3]), at([3], publish_s=4.0)
    assert often.weights_every_s == pytest.approx(10 / often.updates_per_s)
    assert seldom.weights_every_s == 4.0
    assert seldom.decisions_per_s == often.decisions_per_s


def test_so_many_rows_that_the_downlink_is_full() -> None:
    basis = figures(most_actors=1)
    (many,) = machines(basis, [20_000], Payload(1, 1, 1, 1), Link(1e12, 10, 1.0))
    assert (many.bound, many.decisions_per_s) == ("downlink", pytest.approx(1 / ROW_S))


def test_the_first_number_of_machines_that_is_too_many_is_told() -> None:
    given = ["--env-ms", "150", "--gpu", "h100", "--cores", "64", "--memory-gib", "64", "--nodes", "1", "2", "64"]
    text = " ".join(run(*given, "--update-ms", "10", "--replay-ratio", "0.3").split())
    assert "2 machines: the learner is the bound, and more machines give nothing." in text
    assert "is the bound, and more machines" not in run(*given)  # without a learner all goes on


def test_groups_of_this_machine_are_those_of_the_run() -> None:
    given = ["--env-ms", "150", "--device-ms", "1:7", "32:153", "--cores", "640", "--memory-gib", "64"]
    one, four = (json.loads(run(*given, "--groups", groups, "--json")) for groups in ("1", "4"))
    assert four["enough"]["decisions_per_s"] == pytest.approx(4 * one["enough"]["decisions_per_s"], rel=0.02)
    assert four["enough"]["actors"] == one["enough"]["actors"]
    assert four["figures"]["groups"] == 4
    text = run(*given, "--groups", "4")
    assert f"4 groups of {one['enough']['actors']} actors saturate their devices" in text


# ---- input that cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--env-ms is missing"),
        (["--env-ms", "60"], "--device-ms or --gpu"),
        ([*GIVEN, "--gpu", "h100"], "--gpu: not allowed with argument --device-ms"),
        (["--env-ms", "60", "--gpu", "voodoo2"], "voodoo2"),
        (["--env-ms", "60", "--device-ms", "8=3"], "8=3"),
        (["--env-ms", "60", "--device-ms", "8:0"], "--device-ms"),
        (["--env-ms", "60", "--device-ms", "0:8"], "--device-ms"),
        ([*GIVEN, "--env-ms", "-1"], "--env-ms must be a positive number, not -1"),
        ([*GIVEN, "--env-ms", "nan"], "--env-ms must be a positive number"),
        ([*GIVEN, "--env-ms", "much"], "--env-ms"),
        ([*GIVEN, "--cores", "0"], "--cores must be a positive number"),
        ([*GIVEN, "--update-ms", "inf"], "--update-ms must be a positive number"),
        ([*GIVEN, "--reset-s", "-1"], "--reset-s must not be negative"),
        ([*GIVEN, "--episode-decisions", "0"], "--episode-decisions must be at least 1"),
        ([*GIVEN, "--memory-gib", "0.1"], "holds no environment worker beside"),
        (
            [*GIVEN, "--memory-gib", "1.5", "--groups", "200", "--replay.capacity", "60000"],
            "holds no environment worker for each of 200 groups",
        ),
        ([*GIVEN, "--memory-gib", "60", "--sac.num-q-heads", "1000000"], "lower sac.num_q_heads, or give more"),
        ([*GIVEN, "--nodes", "0"], "--nodes must be at least 1"),
        ([*GIVEN, "--network-gbit", "0"], "--network-gbit must be a positive number"),
        ([*GIVEN, "--plot", "/nowhere/plan.png"], "--plot"),
        ([*GIVEN, "--plot", "plan.doc"], "--plot"),
        ([*GIVEN, "--sac.gama", "1"], "sac.gamma"),
        (["--measure", "--seconds", "0"], "--seconds must be a positive number"),
    ],
)
def test_input_that_cannot_be_planned_with_is_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("dsrl_async.plan.resolve.measured", started)
    monkeypatch.setattr("dsrl_async.plan.command.curve", started)
    code, out, error = call("plan", *arguments)
    assert code == 2
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


# ---- the command


def run(*arguments: str) -> str:
    done = call("plan", *arguments)
    assert done.code == 0
    return done.stdout


def test_given_figures_end_to_end(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    options = ["--env-ms", "60", "--reset-s", "0.6", "--gpu", "h100", "--cores", "64", "--memory-gib", "64"]
    text = run(*options, "--plot", str(picture))
    assert "actors saturate the device" in text
    assert "█" in text
    assert "313,376 bytes" in text  # 2 x 224 x 224 x 3 + 64 x 64 x 3 + 8 x 4
    assert "12,466 bytes per decision" in text  # 64 x 64 x 3 + 8 x 4 + 32 x 4 + reward, steps, version and two flags
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_has_the_curve_the_verdict_and_the_machines() -> None:
    content = json.loads(run(*GIVEN, "--json", "--nodes", "1", "3", "--env.chunk", "10"))
    first = content["curve"][0]
    assert first["decisions_per_s"] == pytest.approx(1 / (0.06 + 0.6 / 25 + 0.007), rel=0.04)
    assert first["env_steps_per_s"] == pytest.approx(10 * first["decisions_per_s"])
    assert content["bound"] == "device"
    assert content["payload"]["action_chunk"] == 10 * 7 * 4
    assert [one["nodes"] for one in content["machines"]] == [1, 3]
    assert content["figures"]["device_s"] == {"1": 0.007, "32": 0.153}


def test_many_machines_have_the_actors_that_are_enough_without_a_learner() -> None:
    """On one GPU, updates of 20 ms take the time of more decisions than are left. A machine that has its GPU to itself
    needs more actors to use it up; how many, a plan without the learner says as well."""
    given = ["--env-ms", "150", "--gpu", "h100", "--cores", "64", "--memory-gib", "64", "--json", "--nodes", "1", "3"]
    alone = json.loads(run(*given))["enough"]
    content = json.loads(run(*given, "--update-ms", "20"))
    assert content["figures"]["learner_shares_device"]
    assert content["enough"]["actors"] < 0.5 * alone["actors"]
    one, three = content["machines"]
    assert (one["actors"], three["actors"]) == (alone["actors"], 3 * alone["actors"])
    assert one["bound"] == three["bound"] == "learner"  # 50 updates a second
    (free,) = json.loads(run(*given, "--update-ms", "20", "--replay-ratio", "0.05", "--nodes", "1"))["machines"]
    assert free["bound"] == "machines"
    assert free["decisions_per_s"] == pytest.approx(alone["decisions_per_s"])


def test_a_gpu_is_its_roofline() -> None:
    """Bound of Pi0 on an H100: 5.2 ms for one observation, as worked out by hand."""
    content = json.loads(run("--env-ms", "60", "--gpu", "h100", "--memory-gib", "64", "--json"))["figures"]
    assert 1e3 * content["device_s"]["1"] == pytest.approx(1.3 * 5.2, rel=0.03)
    assert content["batch_wait_s"] == 0
    assert content["learner_shares_device"]


def test_learner_and_replay_ratio_come_from_the_options_of_a_run() -> None:
    content = json.loads(run(*GIVEN, "--update-ms", "20", "--replay-ratio", "2", "--device", "cpu", "--json"))
    assert content["bound"] == "learner"
    assert content["curve"][-1]["decisions_per_s"] == pytest.approx(25)
    assert content["figures"]["batch_wait_s"] == 0.001  # what a CPU waits


def test_measures_the_configured_run() -> None:
    code, out, progress = call("plan", "--measure", "--seconds", "0.3", "--device", "cpu", "--json", *SMALL)
    assert code == 0
    content = json.loads(out)["figures"]
    assert content["environment"]["chunk_s"] > 0
    assert content["environment"]["reset_s"] >= 0
    assert content["environment"]["reset_probability"] == pytest.approx(0.5)  # 10 steps are 2 chunks of 5
    assert content["steps_per_decision"] == 5
    assert set(content["device_s"]) == {"1", "2"}
    assert content["update_s"] > 0
    assert all(0 < content[f"{part}_cores"] < 100 for part in ("environment", "device", "update"))
    for part in ("environment", "batches of 2", "gradient updates"):
        assert f"measuring: {part}" in progress or f"measuring: policy, {part}" in progress


def test_an_option_goes_before_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "environment": EnvironmentTimes(0.005, 0.7, 0.1, 0.25),
        "steps_per_decision": 4.5,
        "update_s": 0.009,
        "device_s": {1: 0.001},
    }
    monkeypatch.setattr("dsrl_async.plan.resolve.measured", lambda config, seconds: dict(answers))
    given = ["--update-ms", "3", "--device-ms", "1:2", "--reset-s", "0"]
    content = json.loads(run("--measure", "--json", *given))["figures"]
    assert content["update_s"] == pytest.approx(0.003)
    assert content["device_s"] == {"1": 0.002}
    assert content["environment"] == {"chunk_s": 0.005, "sigma": 0.7, "reset_s": 0.0, "reset_probability": 0.25}
    assert content["steps_per_decision"] == 4.5


def test_ctrl_c_while_it_measures_ends_it_and_leaves_nothing() -> None:
    shared_memory = set(Path("/dev/shm").iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "dsrl_async.plan", "--measure", "--seconds", "3000", "--device", "cpu", *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "environment" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert set(Path("/dev/shm").iterdir()) <= shared_memory
