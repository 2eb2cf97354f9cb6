"""Steering a policy that is no Pi0: what the inference process asks of it is the protocol, and nothing beside it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.policies import FrozenPolicy
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run.inference import policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, NoiseMode

CPU = torch.device("cpu")


class ReflexBatch:
    """Its action is its noise, scaled by the first number of the state, plus the mean of the image."""

    name = "a reflex"

    def __init__(self, spec: EnvironmentSpec, rows: int) -> None:
        size = spec.image_size
        self.images = torch.zeros(rows, spec.cameras, size, size, 3, dtype=torch.uint8)
        self.state = torch.zeros(rows, spec.state_dim)
        self.noise = torch.zeros(rows, 10, 32)
        self.actions = torch.zeros(rows, 10, spec.action_dim)
        self.brightness = torch.zeros(rows)
        self.prompts: list[int] = []

    def fill_prompts(self, prompts: NDArray[np.int64]) -> None:
        self.prompts = prompts.tolist()

    def encode(self) -> None:
        self.brightness.copy_(self.images.float().mean((1, 2, 3, 4)))

    def denoise(self) -> None:
        scaled = self.noise[..., : self.actions.shape[2]] * self.state[:, :1, None]
        self.actions.copy_(scaled + self.brightness[:, None, None])


class Reflex:
    prompt_lengths = np.zeros(1, np.int64)
    capturable = True

    def __init__(self, environment: EnvironmentSpec) -> None:
        self.environment = environment
        self.spec = SimpleNamespace(
            cameras=environment.cameras,
            image_size=environment.image_size,
            robot_state_dim=environment.state_dim,
            robot_action_dim=environment.action_dim,
            action_horizon=10,
            action_dim=32,
        )

    def batch(self, batch_size: int, prompt_length: int) -> ReflexBatch:
        assert prompt_length == 0
        return ReflexBatch(self.environment, batch_size)


def test_another_policy_is_steered(
    small_config: Config, spec: EnvironmentSpec, memory: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    reflex: FrozenPolicy = Reflex(spec)
    monkeypatch.setattr(policies, "load_frozen_policy", lambda *arguments: reflex)
    files = pi0_record(find_policy(EMBEDDED_POLICY))
    loaded = policies.load_policies(small_config, spec, CPU, files, Counters(memory))
    server = InferenceServer(small_config, memory, loaded, lambda lanes: None, NoiseMode.DETERMINISTIC)
    slots, rng = server.slots, np.random.default_rng(0)
    for lane in (0, 1):
        slots.images[lane] = 10 * lane
        slots.sac_image[lane] = rng.integers(0, 256, slots.sac_image[lane].shape)
        slots.state[lane] = rng.normal(size=8)
        slots.request(lane, incarnation=1, count=1)
    assert server.serve_ready(slots.ready()) == 2
    assert np.abs(slots.noise[0] - slots.noise[1]).max() > 1e-3  # the agent's, by what it sees
    chunk = slots.action_chunk.shape[1]
    for lane in (0, 1):
        expected = slots.noise[lane, :7] * slots.state[lane, 0] + 10 * lane
        np.testing.assert_allclose(slots.action_chunk[lane], np.tile(expected, (chunk, 1)), atol=1e-6)
