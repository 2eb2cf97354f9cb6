"""The shared memory of a run: slots, replay ring and counters in one mapping."""

from __future__ import annotations

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.shm.arena import Arena, Fields
from dsrl_async.shm.assignments import assignment_fields
from dsrl_async.shm.counters import counter_fields
from dsrl_async.shm.replay import ActionRow, demonstration_ring_fields, replay_fields
from dsrl_async.shm.slots import slot_fields
from dsrl_async.shm.spans import span_fields


def action_row(config: Config, cameras: int, image_size: int, action_dim: int) -> ActionRow | None:
    """What rows have for the algorithm of a run, by the sizes of its environment; None for DSRL-SAC."""
    return ActionRow(config.env.chunk, action_dim, cameras, image_size) if config.sac.algorithm == "na" else None


def demonstration_fields(config: Config, spec: EnvironmentSpec, horizon: int, rows: int) -> Fields:
    """The arrays of so many rows of demonstrations; none for 0."""
    if not rows:
        return {}
    of_actions = action_row(config, spec.cameras, spec.image_size, spec.action_dim)
    width, cameras = config.sac.noise_width(horizon), len(config.sac.cameras)
    of_tasks = config.sac.instruction_dim > 0
    return demonstration_ring_fields(rows, spec.state_dim, width, cameras, of_actions, of_tasks)


def run_fields(config: Config, spec: EnvironmentSpec, horizon: int, demonstration_rows: int = 0) -> Fields:
    """All arrays of a run with `config.lanes` environments and a policy of `horizon` action slots.

    The replay ring and the spans are of the training's lanes only.
    """
    lanes, evaluation, sac = config.actors, config.evaluation.lanes, config.sac
    width, cameras = sac.noise_width(horizon), len(sac.cameras)
    of_actions = action_row(config, spec.cameras, spec.image_size, spec.action_dim)
    normal, of_tasks = sac.normal_width(horizon), sac.instruction_dim > 0
    rows = config.replay.capacity // lanes
    return {
        **slot_fields(config.lanes, spec, config.env.chunk, width, normal, cameras, of_actions is not None),
        **replay_fields(lanes, rows, spec.state_dim, width, cameras, of_actions, of_tasks),
        **demonstration_fields(config, spec, horizon, demonstration_rows),
        **counter_fields(lanes, evaluation, config.groups if config.grouped else 0),
        **(assignment_fields(evaluation) if evaluation else {}),
        **(span_fields(config.actors) if config.profile else {}),
    }


def create_memory(config: Config, spec: EnvironmentSpec, horizon: int, demonstration_rows: int = 0) -> Arena:
    return Arena.create(run_fields(config, spec, horizon, demonstration_rows))
