"""From the rows' task to what the agent is told in a batch: that of the row, and that of the row behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs.shipped import TABLETOP
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run.inference.policies import load_policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.run.learner.learner import make_agent
from dsrl_async.run.learner.na import make_na_updates
from dsrl_async.run.learner.sampling import InPlace, Mirror, Source
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight.policy import fit_agent
from dsrl_async.sac.networks import act
from dsrl_async.shm.counters import Counters, NoiseMode
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing, Seen

CPU = torch.device("cpu")
PROMPTS = ("put the block", "move the cube", "take the red plate")
SPEC = TABLETOP._replace(prompts=PROMPTS)
TABLE = torch.tensor([[1.0, 7.0, 0.0], [2.0, 5.0, 0.0], [3.0, 6.0, 0.0]])
RECORD = pi0_record(find_policy(EMBEDDED_POLICY))


def configure(algorithm: str) -> Config:
    sac = {"algorithm": algorithm, "instruction": "task", "batch_size": 8, "hidden_dims": [16], "num_q_heads": 2}
    settings = {
        "actors": 2,
        "replay": {"capacity": 64, "warmup_decisions": 16},
        "policy": {"denoise_steps": 1},
        "sac": {**sac, "conv_channels": [4], "train_actor_steps": 0},
    }
    return fit_agent(validate(settings), RECORD.spec, SPEC)


def mirror(ring: ReplayRing) -> Source:
    return Mirror(ring, CPU)


@pytest.mark.parametrize("source", [InPlace, mirror])
@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_a_batch_is_told_its_tasks(algorithm: str, source: Callable[[ReplayRing], Source]) -> None:
    """Each row's task is in its state, too. Tasks change within an episode here, so that rows differ from the next."""
    config = configure(algorithm)
    ring = ReplayRing(create_memory(config, SPEC, 10))
    rng, nothing = np.random.default_rng(0), np.zeros((2, 64, 64, 3), np.uint8)

    def observation() -> tuple[np.ndarray, np.ndarray, Seen]:
        task = int(rng.integers(3))
        return np.zeros((64, 64, 3), np.uint8), np.full(8, task, np.float32), Seen(nothing, task)

    for lane in range(2):
        ring.begin_episode(lane, *observation())
        for _ in range(20):
            ring.append(lane, np.zeros(ring.rows[ring.judged].shape[2:], np.float32), -1.0, 5, False, 0, *observation())
    if algorithm == "sac":
        updates = Updates(make_agent(config, 10, CPU), source(ring), 8, TABLE)
    else:
        policy = RECORD.load(config.policy, CPU, PROMPTS, lambda: None)
        updates = make_na_updates(config, policy, CPU, source(ring), torch.float32, TABLE)
    updates.refresh()

    def check(told: Tensor | None, states: Tensor) -> None:
        assert told is not None
        assert torch.equal(told, TABLE[states[:, 0].long()])

    assert updates.draw_batch()
    check(updates.batch.instructions, updates.batch.states)
    first, second = updates.batch.states[:, 0].chunk(2)
    assert not torch.equal(first, second)
    if algorithm == "na":
        updates.run()  # with a step of the noise critic, or the next one has it
        assert updates.draw_batch()
        updates.run()
        check(updates.observations.instructions, updates.observations.states)  # type: ignore[attr-defined]


def test_an_answer_is_what_the_actor_does_about_the_lane_s_task() -> None:
    """Of rows that differ in their tasks only, in a batch that others have been answered with before."""
    config = configure("sac")
    memory = create_memory(config, SPEC, 10)
    policies = load_policies(config, SPEC, CPU, RECORD, Counters(memory))
    server = InferenceServer(config, memory, policies, lambda lanes: None, NoiseMode.DETERMINISTIC)
    weights = torch.randn(policies.actor.flat.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    policies.actor.load_flat_(weights)
    slots, told = server.slots, torch.eye(3) * 3**0.5
    for count, tasks in enumerate([(2, 0), (1, 2), (0, 1)], start=1):
        for lane, task in enumerate(tasks):
            slots.task_index[lane] = task
            slots.request(lane, incarnation=1, count=count)
        assert server.serve_ready(slots.ready()) == 2
        images, states = torch.from_numpy(slots.sac_image), torch.from_numpy(slots.state)
        rest = torch.zeros(2, 32), torch.zeros(2), True
        expected = act(policies.actor, images, states, *rest, instruction=told[list(tasks)])
        assert torch.allclose(torch.from_numpy(slots.noise), expected, atol=1e-6)
        assert not torch.allclose(expected[0], expected[1], atol=1e-3)
