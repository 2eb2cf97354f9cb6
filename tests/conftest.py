"""Fixtures that several test files use."""

from __future__ import annotations

import pytest

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec, environment_spec
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.memory import create_memory

HORIZON = 10


@pytest.fixture
def small_config() -> Config:
    """Two actors, a tiny replay buffer, quick warm-up."""
    return validate(
        {
            "actors": 2,
            "replay": {"capacity": 200, "warmup_decisions": 16},
            "sac": {"batch_size": 16, "hidden_dims": [16, 16], "num_q_heads": 2, "conv_channels": [4]},
        }
    )


@pytest.fixture
def spec(small_config: Config) -> EnvironmentSpec:
    return environment_spec(small_config.env.model_dump())


@pytest.fixture
def memory(small_config: Config, spec: EnvironmentSpec) -> Arena:
    return create_memory(small_config, spec, HORIZON)
