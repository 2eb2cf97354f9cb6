"""The plan: its model against cases worked out by hand and against the simulated queue; the command."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsrl_async import plan
from dsrl_async.capacity import Figures, ModelError, Payload, curve, judge, machines, predict
from dsrl_async.throughput_model import EnvironmentTimes, equilibrium, simulate

GIVEN = ["--env-ms", "60", "--reset-s", "0.6", "--device-ms", "1:7", "32:153", "--cores", "64", "--memory-gib", "64"]


def figures(**changes: Any) -> Figures:
    """Thinking 1 s, service 0.1 s for any batch up to 4; nothing but the environments and the device takes time."""
    basis = Figures(
        environment=EnvironmentTimes(chunk_s=1.0, sigma=0.3, reset_s=0.0, reset_probability=0.04),
        steps_per_decision=5,
        device_s={1: 0.1, 4: 0.1},
        batch_sizes=(1, 2, 4),
        cores=1000,
    )
    return replace(basis, **changes)


# ---- the queue


def test_one_actor_alternates_with_the_device() -> None:
    result = equilibrium(1, 3.0, lambda size: 1.0, [1])
    assert result.decisions_per_s == pytest.approx(1 / 4)
    assert result.device_busy == pytest.approx(1 / 4)
    assert result.batch_size == pytest.approx(1)


def test_two_actors_and_batches_of_one_by_hand() -> None:
    """Service 1, thinking exponential with mean 1/r. After a service the other waits with probability q = 1 - exp(-r);
    if not, one of the two comes after 1/(2r): a cycle takes 1 + (1 - q) / (2r)."""
    rate = 0.7
    cycle = 1 + math.exp(-rate) / (2 * rate)
    result = equilibrium(2, 1 / rate, lambda size: 1.0, [1])
    assert result.decisions_per_s == pytest.approx(1 / cycle)
    assert result.device_busy == pytest.approx(1 / cycle)


def test_two_actors_and_batches_of_two_by_hand() -> None:
    """As before, but both may be served together. With a service of 1 for both sizes, and q as above: after a batch of
    one the other waits with probability q, and is served alone; after a batch of two nobody waits. So batches are of
    one but for those that nobody ever joins: the same as batches of one."""
    alone = equilibrium(2, 1.0, lambda size: 1.0, [1])
    assert equilibrium(2, 1.0, lambda size: 1.0, [1, 2]).decisions_per_s == pytest.approx(alone.decisions_per_s)


def test_waiting_for_a_fuller_batch_by_hand() -> None:
    """Two actors, service 1, wait 1, thinking exponential with mean 1: s = exp(-1). After a batch of two nobody waits;
    one comes after 1/2, and within the wait the other with probability 1 - s. After a batch of one the other waits
    with probability 1 - s, and the wait begins at once. The share `a` of batches that begin with somebody waiting is
    a = P(batch of one) (1 - s) = s (1 - s)."""
    s = math.exp(-1)
    begun_at_once = s * (1 - s)
    served = 1 * s + 2 * (1 - s)
    cycle = (1 - begun_at_once) * 0.5 + 1 + 1
    result = equilibrium(2, 1.0, lambda size: 1.0, [1, 2], batch_wait_s=1.0)
    assert result.decisions_per_s == pytest.approx(served / cycle)
    assert result.batch_size == pytest.approx(served)


def test_a_saturated_device_serves_full_batches() -> None:
    result = equilibrium(100, 0.01, lambda size: 0.1 * size, list(range(1, 9)))
    assert result.decisions_per_s == pytest.approx(10)
    assert result.batch_size == pytest.approx(8)
    assert equilibrium(9, 0.0, lambda size: 0.1 * size, [1, 2, 4, 8]).decisions_per_s == pytest.approx(10)


@pytest.mark.parametrize("actors", [1, 3, 10])
def test_machine_repairman_with_constant_service(actors: int) -> None:
    """Exponential thinking, constant service, one at a time: what the chain is exact for."""
    rng = np.random.default_rng(0)

    def thinking() -> Any:
        while True:
            yield float(rng.exponential(1.0))

    simulated = simulate([thinking() for _ in range(actors)], lambda size: 0.2, [1], 20_000, skip=1000)
    exact = equilibrium(actors, 1.0, lambda size: 0.2, [1])
    assert exact.decisions_per_s == pytest.approx(simulated.decisions_per_s, rel=0.03)
    assert exact.device_busy == pytest.approx(simulated.device_busy, rel=0.03)


DEVICES = {
    "roofline": lambda size: 1.3e-3 * max(5.2, 3.68 * size),
    "launches": lambda size: 0.020 + 0.0048 * size,
    "flat": lambda size: 0.050,
}


@settings(max_examples=25, deadline=None)
@given(
    actors=st.integers(1, 96),
    sigma=st.floats(0.25, 1.0),
    reset_s=st.sampled_from([0.0, 0.3, 0.6, 1.5]),
    device=st.sampled_from(sorted(DEVICES)),
    sizes=st.sampled_from([(1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), (8,)]),
    batch_wait_s=st.sampled_from([0.0, 0.001, 0.01]),
)
def test_prediction_is_within_a_tenth_of_the_simulation(
    actors: int, sigma: float, reset_s: float, device: str, sizes: tuple[int, ...], batch_wait_s: float
) -> None:
    times = EnvironmentTimes(0.06, sigma, reset_s, 1 / 25)
    service_s = DEVICES[device]
    simulated = simulate(
        [times.totals(0, lane) for lane in range(actors)],
        service_s,
        sizes,
        max(3000, 40 * actors),
        max(1000, 20 * actors),
        batch_wait_s,
    )
    predicted = predict(
        figures(
            environment=times,
            device_s={size: service_s(size) for size in sizes},
            batch_sizes=sizes,
            batch_wait_s=batch_wait_s,
        ),
        actors,
    )
    assert predicted.decisions_per_s == pytest.approx(simulated.decisions_per_s, rel=0.1)
    assert predicted.device_busy == pytest.approx(simulated.device_busy, abs=0.08)


# ---- what bounds a run


def test_enough_of_everything_leaves_the_queue_alone() -> None:
    result = predict(figures(), 1)
    assert result.decisions_per_s == pytest.approx(1 / 1.1)
    assert result.env_steps_per_s == pytest.approx(5 / 1.1)
    assert result.updates_per_s == pytest.approx(1 / 1.1)
    assert result.stretch == 1
    assert result.bound == "environments"


def test_resets_are_part_of_the_mean() -> None:
    """1 s a chunk, and 5 s after a tenth of them."""
    times = EnvironmentTimes(chunk_s=1.0, sigma=0.0, reset_s=5.0, reset_probability=0.1)
    assert predict(figures(environment=times), 1).decisions_per_s == pytest.approx(1 / 1.6)


def test_cores_bound_the_work() -> None:
    """A decision of the only batch size costs 1 + 0.1 core-seconds; the learner, 0.5 for every second decision."""
    few = figures(cores=2.0, batch_sizes=(1,), update_s=0.5, replay_ratio=0.5)
    result = predict(few, 64)
    assert result.decisions_per_s == pytest.approx(2 / (1.1 + 0.25), rel=1e-3)
    assert result.updates_per_s == pytest.approx(1 / (1.1 + 0.25), rel=1e-3)
    assert result.cores_busy == pytest.approx(2.0, rel=1e-3)
    assert result.bound == "cores"
    assert result.stretch > 1


def test_what_only_waits_needs_no_cores() -> None:
    sleeping = figures(cores=0.01, environment_cores=0.0, device_cores=0.0)
    result = predict(sleeping, 200)
    assert result.bound == "device"
    assert result.decisions_per_s == pytest.approx(40, rel=1e-3)
    assert result.cores_busy == 0


def test_the_learner_holds_the_actors_back_unless_they_run_free() -> None:
    slow = figures(update_s=2.0, replay_ratio=0.25)
    held = predict(slow, 16)
    assert held.decisions_per_s == pytest.approx(2.0)
    assert held.updates_per_s == pytest.approx(0.5)
    assert held.bound == "learner"
    assert held.batch_size == 4
    free = predict(replace(slow, throttle_actors=False), 16)
    assert free.decisions_per_s > 10
    assert free.updates_per_s == pytest.approx(0.5)


def test_a_shared_device_does_the_learners_work_too() -> None:
    """Full batches of 4 cost 0.025 s a decision, updates 0.1 s: 8 decisions a second in all. The learner by itself
    would keep up with 10."""
    alone = figures(update_s=0.1, update_cores=0.0)
    shared = replace(alone, learner_shares_device=True)
    assert predict(alone, 64).decisions_per_s == pytest.approx(10)
    result = predict(shared, 64)
    assert result.decisions_per_s == pytest.approx(8, rel=0.01)
    assert result.bound == "device"


@settings(max_examples=15, deadline=None)
@given(
    actors=st.integers(1, 40),
    cores=st.floats(0.5, 20),
    update_s=st.sampled_from([0.0, 0.02, 0.2]),
    chunk_s=st.floats(0.01, 2),
    shared=st.booleans(),
)
def test_more_never_gives_less(actors: int, cores: float, update_s: float, chunk_s: float, shared: bool) -> None:
    # a batch of any size: with few sizes, a device may serve fewer when more wait
    basis = figures(
        environment=EnvironmentTimes(chunk_s, 0.3, 0.5, 0.05),
        batch_sizes=tuple(range(1, 17)),
        device_s={1: 0.05, 16: 0.2},
        cores=cores,
        update_s=update_s,
        learner_shares_device=shared,
    )
    rate = predict(basis, actors).decisions_per_s
    almost = (1 - 1e-3) * rate
    assert predict(basis, actors + 1).decisions_per_s >= almost
    assert predict(replace(basis, cores=1.5 * cores), actors).decisions_per_s >= almost
    assert predict(replace(basis, update_s=update_s / 2), actors).decisions_per_s >= almost
    assert predict(replace(basis, device_s={1: 0.04, 16: 0.1}), actors).decisions_per_s >= almost
    point = predict(basis, actors)
    assert point.cores_busy <= 1.001 * cores
    assert point.decisions_per_s <= actors / basis.think_s
    assert 0 < point.device_busy <= 1


# ---- the verdict


@pytest.mark.parametrize("chunk_s", [0.7, 1.0, 1.4])
def test_the_fewest_actors_that_saturate_the_device(chunk_s: float) -> None:
    basis = figures(environment=EnvironmentTimes(chunk_s, 0.3, 0.0, 0.04))
    points = curve(basis)
    verdict = judge(basis, points)
    assert verdict.bound == "device"
    assert verdict.at_most.decisions_per_s == pytest.approx(40, rel=0.01)
    enough = 0.95 * verdict.at_most.decisions_per_s
    assert verdict.actors == next(n for n in itertools.count(1) if predict(basis, n).decisions_per_s >= enough)
    # beyond the last point more actors change nothing
    assert predict(basis, 2 * points[-1].actors).decisions_per_s == pytest.approx(points[-1].decisions_per_s, rel=0.01)


def test_memory_ends_the_curve() -> None:
    small = figures(most_actors=7)
    points = curve(small, also=[5, 9])
    assert [point.actors for point in points] == [1, 2, 3, 4, 5, 6, 7]
    verdict = judge(small, points)
    assert (verdict.actors, verdict.bound) == (7, "memory")


def test_device_curve_between_and_beyond_what_is_known() -> None:
    known = figures(device_s={2: 0.2, 4: 0.3})
    assert [known.service_s(size) for size in (1, 2, 3, 4, 6)] == pytest.approx([0.2, 0.2, 0.25, 0.3, 0.4])
    assert figures(device_s={2: 0.2}).service_s(4) == pytest.approx(0.4)


# ---- many machines

PAYLOAD = Payload(observation=1000, action_chunk=10, transition=100, weights=5000)


def test_machines_add_up_until_the_learner_or_its_link_is_full() -> None:
    """A machine with one actor does 1 / 1.1 decisions per second."""
    basis = figures(update_s=0.1, replay_ratio=2.0)

    def at(nodes: int, network: float = 1e9) -> Any:
        return machines(basis, 1, nodes, PAYLOAD, publish_interval=10, network_bytes_per_s=network)

    few = at(3)
    assert few.decisions_per_s == pytest.approx(3 / 1.1)
    assert few.bound == "nodes"
    assert few.actors == 3
    assert few.transition_bytes_per_s == pytest.approx(300 / 1.1)
    assert few.observation_bytes_per_s == pytest.approx(3000 / 1.1)
    # 2 updates a decision, one publication in ten of them, to three machines
    assert few.weights_bytes_per_s == pytest.approx(3 / 1.1 * 2 / 10 * 5000 * 3)
    many = at(100)
    assert many.bound == "learner"
    assert many.decisions_per_s == pytest.approx(5)
    assert many.updates_per_s == pytest.approx(10)
    thin = at(3, network=3000)
    assert thin.bound == "network"
    assert thin.decisions_per_s == pytest.approx(1)  # 1 x 2 / 10 x 5000 x 3
    assert thin.weights_bytes_per_s == pytest.approx(3000)


# ---- input that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": EnvironmentTimes(0.0, 0.3, 0.0, 0.04)}, "time of a chunk"),
        ({"environment": EnvironmentTimes(1.0, 0.3, 0.0, 1.5)}, "episode"),
        ({"environment": EnvironmentTimes(1.0, 0.3, -1.0, 0.5)}, "reset"),
        ({"environment": EnvironmentTimes(math.nan, 0.3, 0.0, 0.5)}, "time of a chunk"),
        ({"device_s": {}}, "device's curve"),
        ({"device_s": {1: 0.2, 8: 0.1}}, "must not fall"),
        ({"device_s": {1: 0.0}}, "device's curve"),
        ({"cores": 0.0}, "cores"),
        ({"update_s": math.inf}, "update"),
        ({"most_actors": 0}, "memory holds no actor"),
    ],
)
def test_impossible_figures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        figures(**changes)


def test_no_actors_are_refused() -> None:
    with pytest.raises(ModelError, match="at least 1 actor"):
        predict(figures(), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--env-ms"),
        (["--env-ms", "60"], "--device-ms or --gpu"),
        ([*GIVEN, "--gpu", "h100"], "not both"),
        (["--env-ms", "60", "--device-ms", "8=3"], "8=3"),
        (["--env-ms", "60", "--device-ms", "1:7", "8:3"], "must not fall"),
        ([*GIVEN, "--env-ms", "-1"], "time of a chunk"),
        ([*GIVEN, "--env-ms", "much"], "--env-ms"),
        ([*GIVEN, "--episode-decisions", "0"], "--episode-decisions"),
        ([*GIVEN, "--memory-gib", "0.1"], "memory holds no actor"),
        ([*GIVEN, "--actor-mb", "0"], "--actor-mb"),
        ([*GIVEN, "--nodes", "0"], "--nodes"),
        ([*GIVEN, "--network-gbit", "0"], "--network-gbit"),
        ([*GIVEN, "--plot", "/nowhere/plan.png"], "--plot"),
        ([*GIVEN, "--sac.gama", "1"], "sac.gamma"),
        (["--measure", "--seconds", "0"], "--seconds"),
    ],
)
def test_input_that_cannot_be_planned_with_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


# ---- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert plan.main(arguments) == 0
    return capsys.readouterr().out


def test_given_figures_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    text = run(capsys, *GIVEN, "--model", "pi0", "--plot", str(picture), "--simulate", "--actors", "10")
    assert "saturate the device" in text
    assert "█" in text
    assert " 10 " in text  # the configured number of actors is in the table
    assert "313,376 bytes" in text  # 2 x 224 x 224 x 3 + 64 x 64 x 3 + 8 x 4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_has_the_curve_the_verdict_and_the_machines(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *GIVEN, "--model", "pi0", "--json", "--nodes", "1", "3", "--env.chunk", "10", "--simulate")
    content = json.loads(out)
    by_actors = {point["actors"]: point for point in content["curve"]}
    assert by_actors[1]["decisions_per_s"] == pytest.approx(1 / (0.06 + 0.6 / 25 + 0.007), rel=0.02)
    assert by_actors[1]["env_steps_per_s"] == pytest.approx(10 * by_actors[1]["decisions_per_s"])
    assert content["simulated"]["1"] == pytest.approx(by_actors[1]["decisions_per_s"], rel=0.05)
    assert content["verdict"]["bound"] == "device"
    assert content["payload"]["action_chunk"] == 10 * 7 * 4
    assert [one["nodes"] for one in content["machines"]] == [1, 3]
    assert content["figures"]["device_s"] == {"1": 0.007, "32": 0.153}


def test_a_gpu_is_its_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    """Bound of Pi0 on an H100: 5.2 ms for one observation, as worked out by hand."""
    options = ["--env-ms", "60", "--gpu", "h100", "--cores", "8", "--memory-gib", "64", "--json"]
    device = json.loads(run(capsys, *options, "--above-bound", "1.3"))["figures"]["device_s"]
    assert 1e3 * device["1"] == pytest.approx(1.3 * 5.2, rel=0.03)
    slower = json.loads(run(capsys, *options, "--above-bound", "2.6"))["figures"]["device_s"]
    assert slower["1"] == pytest.approx(2 * device["1"])


def test_learner_and_replay_ratio_come_from_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *GIVEN, "--update-ms", "20", "--replay-ratio", "2", "--json")
    content = json.loads(out)
    assert content["verdict"]["bound"] == "learner"
    assert content["verdict"]["most_decisions_per_s"] == pytest.approx(25)


def test_measures_the_configured_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = [
        *("--actors", "2", "--replay.warmup-decisions", "16", "--replay.capacity", "2000", "--sac.batch-size", "16"),
        *("--sac.hidden-dims", "[16, 16]", "--sac.num-q-heads", "2", "--sac.conv-channels", "[4]"),
        *("--policy.denoise-steps", "2", "--learner.publish-interval", "2", "--env.max-episode-steps", "10"),
    ]
    text = run(capsys, "--measure", "--seconds", "0.4", *small)
    command = text.strip().splitlines()[-1]
    assert command.startswith("python -m dsrl_async.plan ")
    # what was measured, given again, is the same plan
    options = shlex.split(command)[3:]
    content = json.loads(run(capsys, *options, *small, "--json"))["figures"]
    assert content["environment"]["chunk_s"] > 0
    assert content["environment"]["reset_s"] >= 0
    assert content["environment"]["reset_probability"] == pytest.approx(0.5)  # 10 steps are 2 chunks of 5
    assert set(content["device_s"]) == {"1", "2"}
    assert 0 < content["device_s"]["1"] <= content["device_s"]["2"]
    assert content["update_s"] > 0
    assert content["cores"] > 0
    assert f"{1e3 * content['environment']['chunk_s']:.4g} ms per chunk" in text


def test_an_option_goes_before_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"env_ms": 5.0, "update_ms": 9.0, "device": {1: 0.001}, "steps": 4.5, "on_gpu": False, "cores": 1.5}
    monkeypatch.setattr(plan, "measured", lambda own, config: dict(answers))
    content = json.loads(run(capsys, "--measure", "--json", "--update-ms", "3", "--device-ms", "1:2"))["figures"]
    assert content["update_s"] == pytest.approx(0.003)
    assert content["device_s"] == {"1": 0.002}
    assert content["environment"]["chunk_s"] == pytest.approx(0.005)
    assert content["steps_per_decision"] == 4.5
    assert content["cores"] == 1.5
