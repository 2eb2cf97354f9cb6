"""Loading the policy for all batch sizes and prompt lengths: what is seen of it meanwhile, and what captures share."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.pi0 import checkpoint
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run.inference import policies
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.supervisor.supervisor import LOADING_S
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters

CPU = torch.device("cpu")
STEP_S = 60.0
"""How long it takes, by the test's clock, to read a tensor, or to compile or to capture for a pair."""


class Loading:
    """Loads the tabletop's policy for four pairs of batch size and prompt length on a pretended GPU.

    Attributes:
        done: what was done, one after the other, with what a capture was given.
        silences: seconds since the last sign of life when each of them ended.
        counters: the run's.
        pool: the memory pool of the captures.
    """

    def __init__(self, config: Config, spec: EnvironmentSpec, memory: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, object]] = []
        self.silences: list[float] = []
        self.counters, self.pool, self._now = Counters(memory), object(), 0.0
        monkeypatch.setattr(time, "monotonic_ns", lambda: int(self._now * 1e9))
        monkeypatch.setattr(checkpoint, "_read_tensor", lambda *arguments: self._work("read"))
        monkeypatch.setattr(SteeredPolicy, "run", lambda policy: self._work("compile"))
        monkeypatch.setattr(SteeredPolicy, "capture", lambda policy, pool: self._work("capture", pool))
        monkeypatch.setattr(policies, "graphs_of", lambda setting, device, state: contextlib.nullcontext(True))
        config.policy.compile, config.inference.buckets = True, [1, 2]
        spec = spec._replace(prompts=("put", "put the block on the red plate near the green one"))
        policies.load_policies(config, spec, CPU, pi0_record(find_policy(EMBEDDED_POLICY)), self.counters)

    def _work(self, what: str, pool: object = None) -> object:
        self._now += STEP_S
        self.silences.append(self._now - self.counters.inference_loading_ns[0] * 1e-9)
        self.done.append((what, pool))
        return self.pool


@pytest.fixture
def loading(small_config: Config, spec: EnvironmentSpec, memory: Arena, monkeypatch: pytest.MonkeyPatch) -> Loading:
    return Loading(small_config, spec, memory, monkeypatch)


def test_there_are_signs_of_life_while_a_policy_is_loaded(loading: Loading) -> None:
    """The supervisor takes a process for dead that is silent for LOADING_S, however many sizes there are."""
    assert [what for what, _ in loading.done if what != "read"] == 4 * ["compile", "capture"]
    assert len(loading.done) > 8 + 50
    assert max(loading.silences) == STEP_S < LOADING_S
    assert loading.counters.inference_prepared.tolist() == [4, 4]


def test_all_captures_of_a_policy_get_one_pool(loading: Loading) -> None:
    assert [pool for what, pool in loading.done if what == "capture"] == [None, *3 * [loading.pool]]
