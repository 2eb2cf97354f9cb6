"""Rows of the training and of an evaluation share batches, and nothing that is counted for the training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.run.inference.policies import Policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.run.weights import Weights
from dsrl_async.sac.networks import Actor
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import NoiseMode
from dsrl_async.shm.memory import create_memory

ACTORS, EVALUATORS, WARMUP = 3, 2, 16
LANES = ACTORS + EVALUATORS


class NotedBatch:
    """Computes nothing; notes the modes of its rows."""

    def __init__(self, rows: int, width: int, notes: list[NDArray[np.uint8]]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs = torch.zeros(rows, width)
        self._notes = notes

    def fill_modes(self, modes: NDArray[np.uint8]) -> None:
        self._notes.append(modes.copy())

    def fill_prompts(self, task_index: NDArray[np.int64]) -> None: ...
    def run(self) -> None: ...


def configure(**more: object) -> Config:
    return validate(
        {
            "actors": ACTORS,
            "replay": {"capacity": 200, "warmup": "gaussian", "warmup_decisions": WARMUP},
            "sac": {"batch_size": 16, "hidden_dims": [4], "num_q_heads": 1, "conv_channels": [1]},
            "evaluation": {"every_decisions": 10, "actors": EVALUATORS},
            "inference": {"buckets": list(range(1, 9))},
            **more,
        }
    )


def serve(config: Config) -> tuple[InferenceServer, Arena, list[NDArray[np.uint8]]]:
    """A server with weights, and the modes of the batches that it makes."""
    arena, notes = create_memory(config, TABLETOP, 10), list[NDArray[np.uint8]]()
    width = config.sac.noise_width(10) + 10 * TABLETOP.action_dim
    batches = {(size, 8): NotedBatch(size, width, notes) for size in config.batch_sizes()}
    actors = [Actor(config.sac, 10, torch.device("cpu"), seed) for seed in (0, 1)]
    policies = Policies(batches, actors[0], np.array([8]), snapshot=actors[1])
    server = InferenceServer(config, arena, policies, lambda lanes: None)
    server.load_weights(Weights(0, np.zeros(actors[0].flat.numel(), np.float32)))
    return server, arena, notes


@settings(max_examples=50, deadline=None)
@given(
    ready=st.sets(st.integers(0, LANES - 1)),
    executing=st.sets(st.integers(0, LANES - 1)),
    decisions=st.integers(0, 60),
    evaluated=st.integers(0, 1000),
    updates=st.integers(0, 60),
    most=st.none() | st.integers(1, 60),
    mode=st.sampled_from([None, NoiseMode.BASE, NoiseMode.SNAPSHOT_DETERMINISTIC]),
)
def test_what_is_answered_and_counted(
    ready: set[int],
    executing: set[int],
    decisions: int,
    evaluated: int,
    updates: int,
    most: int | None,
    mode: NoiseMode | None,
) -> None:
    server, arena, notes = serve(configure(max_decisions=most))
    slots, counters = server.slots, server.counters
    counters.actor_decisions[0], counters.learner_updates[0] = decisions, updates
    arena["evaluation/actor/decisions"][:] = evaluated
    arena["evaluation/actor/episodes"][:] = evaluated
    server.evaluation_mode = mode
    for lane in executing - ready:
        slots.response_id[lane] = slots.request(lane, 1, 1)
    handed_out = decisions + len({lane for lane in executing - ready if lane < ACTORS})
    assert server.handed_out() == handed_out
    for lane in ready:
        slots.request(lane, 1, 2)
    wanted = len({lane for lane in ready if lane < ACTORS})
    allowed = max(0, server.allowed(wanted, handed_out))
    answered = server.serve_ready(slots.ready())
    done = {lane for lane in ready if slots.response_id[lane] == slots.request_id[lane]}
    assert len(done) == answered
    of_training, of_evaluation = {lane for lane in done if lane < ACTORS}, {lane for lane in done if lane >= ACTORS}
    assert len(of_training) <= allowed
    assert server.handed_out() == handed_out + len(of_training)
    waiting = {lane for lane in ready if lane >= ACTORS}
    assert of_evaluation == (waiting if mode is not None else set())  # whoever of the training has to wait
    assert len(of_training) == allowed  # there is a batch size for every number
    if answered:
        expected = NoiseMode.WARM_UP if handed_out < WARMUP else NoiseMode.STOCHASTIC
        modes = notes[0].tolist()
        assert modes.count(expected) == len(of_training)
        assert mode is None or modes.count(mode) == len(of_evaluation)


@pytest.mark.parametrize(
    ("warmup", "algorithm", "expected"),
    [
        (None, "sac", NoiseMode.STOCHASTIC),
        ("gaussian", "sac", NoiseMode.WARM_UP),
        (None, "na", NoiseMode.BASE),
        ("gaussian", "na", NoiseMode.WARM_UP),
        ("actor", "sac", NoiseMode.STOCHASTIC),
        ("base", "sac", NoiseMode.BASE),
    ],
)
def test_the_noise_of_the_warm_up(warmup: str | None, algorithm: str, expected: NoiseMode) -> None:
    base = configure()
    replay = base.replay.model_copy(update={"warmup": warmup})
    sac = base.sac.model_copy(update={"algorithm": algorithm, "noise_layout": "shift"})
    server, _, notes = serve(base.model_copy(update={"replay": replay, "sac": sac}))
    server.policy_version = -1  # as before the first weights
    server.slots.request(0, 1, 1)
    answered = server.serve_ready(server.slots.ready())
    if expected == NoiseMode.STOCHASTIC:
        assert answered == 0
        server.policy_version = 0
        answered = server.serve_ready(server.slots.ready())
    assert answered == 1
    assert notes[0].tolist() == [expected]


def test_nothing_is_answered_before_the_snapshot_is_there() -> None:
    server, _, _ = serve(configure())
    server.slots.request(ACTORS, 1, 1)
    assert server.serve_ready(server.slots.ready()) == 0


def test_the_snapshot_stays_while_newer_weights_come(tmp_path: object) -> None:
    server, _, _ = serve(configure())
    snapshot = server.policies.snapshot
    assert snapshot is not None
    before, place = snapshot.flat.clone(), snapshot.flat.data_ptr()
    server.load_weights(Weights(1, np.ones(snapshot.flat.numel(), np.float32)))
    assert torch.equal(snapshot.flat, before)
    assert snapshot.flat.data_ptr() == place


def test_without_evaluation_there_is_no_second_actor_and_nothing_more_in_memory() -> None:
    config = configure(evaluation={})
    assert (config.lanes, config.batch_sizes()) == (ACTORS, [1, 2, 3])
    with_it = create_memory(configure(), TABLETOP, 10)
    without = create_memory(config, TABLETOP, 10)
    assert not any(name.startswith(("evaluation/", "assignment/")) for name in without.fields)
    assert without["slot/images"].shape[0] == ACTORS
    assert with_it["slot/images"].shape[0] == LANES
    for arena in (with_it, without):  # the ring and all that the training counts
        assert arena["replay/head"].shape == arena["actor/decisions"].shape == (ACTORS,)


@pytest.mark.parametrize("actors", [EVALUATORS, 100])
def test_batches_are_large_enough_for_all(actors: int) -> None:
    config = configure(evaluation={"every_decisions": 10, "actors": actors, "episodes": 4})
    assert config.lanes == ACTORS + min(actors, 4)
    assert config.batch_sizes()[-1] >= config.lanes
