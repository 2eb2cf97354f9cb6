"""The shared memory of a run: slots, replay ring and counters in one mapping."""

from __future__ import annotations

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.shm.arena import Arena, Fields
from dsrl_async.shm.assignments import assignment_fields
from dsrl_async.shm.counters import counter_fields
from dsrl_async.shm.replay import replay_fields
from dsrl_async.shm.slots import slot_fields
from dsrl_async.shm.spans import span_fields


def run_fields(config: Config, spec: EnvironmentSpec, horizon: int) -> Fields:
    """All arrays of a run with `config.lanes` environments and a policy of `horizon` action slots.

    The replay ring and the spans are of the training's lanes only.
    """
    lanes, evaluation, sac = config.actors, config.evaluation.lanes, config.sac
    width, cameras = sac.noise_width(horizon), len(sac.cameras)
    return {
        **slot_fields(config.lanes, spec, config.env.chunk, width, horizon * sac.noise_dim, cameras),
        **replay_fields(lanes, config.replay.capacity // lanes, spec.state_dim, width, cameras),
        **counter_fields(lanes, evaluation),
        **(assignment_fields(evaluation) if evaluation else {}),
        **(span_fields(config.actors) if config.profile else {}),
    }


def create_memory(config: Config, spec: EnvironmentSpec, horizon: int) -> Arena:
    return Arena.create(run_fields(config, spec, horizon))
