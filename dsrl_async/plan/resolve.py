"""Finds out what the command line asks about: from its options, measurements and a GPU's data sheet."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from dsrl_async.config.command_line import load_config
from dsrl_async.config.files import how_to_install
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.environments import environment_record
from dsrl_async.host.machine import available_cpus, available_memory
from dsrl_async.host.waiting import waiting
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.plan.capacity import CapacityInputs, Payload
from dsrl_async.plan.gpus import roofline
from dsrl_async.plan.report import PICTURES
from dsrl_async.plan.simulation import EnvironmentTimes
from dsrl_async.policies.pi0 import PI0_SETTINGS, pi0_needs
from dsrl_async.run import preflight
from dsrl_async.run.inference.batching import batch_wait_s
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.run.preflight.learner_memory import actor_parameters
from dsrl_async.shm.memory import action_row
from dsrl_async.shm.replay import replay_fields
from dsrl_async.shm.slots import slot_fields


class Question(NamedTuple):
    """What the command line asks about."""

    config: Config
    inputs: CapacityInputs
    payload: Payload
    policy_settings: frozenset[str]
    """The keys of `policy` that the policy reads."""


def check_options(own: argparse.Namespace) -> None:
    """Raises ConfigError for an option that is missing, or has a value that cannot be."""
    if own.env_ms is None and not own.measure:
        raise ConfigError("--env-ms is missing: the mean time of a chunk; or let it be measured, with --measure")
    if not (own.device_ms or own.gpu or own.measure):
        raise ConfigError("the policy's device is missing: --device-ms or --gpu; or let it be measured, with --measure")
    for name in ("seconds", "env_ms", "update_ms", "cores", "memory_gib", "network_gbit"):
        if (value := getattr(own, name)) is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be a positive number, not {value:g}")
    if own.reset_s is not None and not 0 <= own.reset_s < math.inf:
        raise ConfigError(f"--reset-s must not be negative, not {own.reset_s:g}")
    if own.episode_decisions is not None and not 1 <= own.episode_decisions < math.inf:
        raise ConfigError(f"--episode-decisions must be at least 1, not {own.episode_decisions:g}")
    if min(own.nodes) < 1:
        raise ConfigError(f"--nodes must be at least 1, not {min(own.nodes)}")
    if own.plot is not None:
        if find_spec("matplotlib") is None:
            raise ConfigError(f"--plot needs matplotlib; {how_to_install('plot')}")
        if own.plot.suffix not in PICTURES or not own.plot.absolute().parent.is_dir():
            raise ConfigError(f"--plot {own.plot}: give a {', '.join(PICTURES)} file in a directory that is there")


def device_curve(pairs: Sequence[str]) -> dict[int, float]:
    """Seconds by batch size, from words like `SIZE:MS`; raises ConfigError."""
    times = {}
    for pair in pairs:
        try:
            size, milliseconds = pair.split(":")
            times[int(size)] = float(milliseconds) / 1e3
        except ValueError:
            raise ConfigError(f"--device-ms: {pair!r} is not SIZE:MS; write it like 8:38.2") from None
    if min(times) < 1 or not all(0 < seconds < math.inf for seconds in times.values()):
        raise ConfigError(f"--device-ms: sizes and times must be positive numbers, not {' '.join(pairs)}")
    return times


def read(own: argparse.Namespace, rest: Sequence[str]) -> Question:
    """Everything that is asked about, measured if need be. Raises ValueError, of which ConfigError is one."""
    check_options(own)
    config = load_config(rest)
    curve_s = device_curve(own.device_ms) if own.device_ms else None
    planned = config.model_copy(update={"device": "cuda"}) if own.gpu else config
    run = preflight.check_run(config, wait=waiting) if own.measure else None
    if own.gpu:
        if config.policy.type is not None:
            raise ConfigError(
                f"--gpu is about Pi0, and policy.type is {config.policy.type}; give --device-ms, or --measure"
            )
        policy, policy_settings = pi0_needs(Pi0Config()), PI0_SETTINGS
        curve_s = roofline(own.gpu, Pi0Config(), config.policy.denoise_steps, config.inference.buckets)
    else:
        record = run.policy if run else preflight.check_checkpoint(config)
        policy, policy_settings = record.needs, record.own_settings
    # the policy's sizes and not the environment's own: a simulator need not be installed here
    sizes = policy.spec
    spec = EnvironmentSpec(sizes.cameras, sizes.image_size, sizes.robot_state_dim, sizes.robot_action_dim, ("",))
    config, planned = (preflight.fit_agent(each, sizes, spec) for each in (config, planned))
    environment = environment_record(config.env.model_dump())
    preflight.check_effect(config)
    need = preflight.memory_needed(planned, environment, spec, policy)
    memory = available_memory() if own.memory_gib is None else own.memory_gib * 2**30
    most_actors = preflight.actors_that_fit(planned, environment, spec, policy, memory)
    most_actors //= config.groups
    if most_actors < 1:
        lower = preflight.what_to_lower(planned, environment, spec, policy, "replay.capacity")
        of_each = "" if config.groups == 1 else f" for each of {config.groups} groups"
        raise ConfigError(
            f"the memory of {memory / 2**30:.3g} GiB holds no environment worker{of_each} beside replay, policy and "
            f"learner, which need {need.without_workers / 2**30:.3g}; lower {lower}, or give more with --memory-gib"
        )
    known: dict[str, Any] = {"steps_per_decision": config.env.chunk, "environment": EnvironmentTimes(reset_s=0.0)}
    if run is not None:
        known |= measured(run, own.seconds)
    times = {
        "chunk_s": own.env_ms and own.env_ms / 1e3,
        "reset_s": own.reset_s,
        "reset_probability": own.episode_decisions and 1 / own.episode_decisions,
    }
    known["environment"] = replace(
        known["environment"], **{name: value for name, value in times.items() if value is not None}
    )
    if curve_s is not None:
        known |= {"device_s": curve_s, "device_cores": 1.0}
    if own.update_ms is not None:
        known["update_s"] = own.update_ms / 1e3
    on_gpu = uses_gpu(planned)
    inputs = CapacityInputs(
        **known,
        batch_sizes=config.inference.buckets,
        batch_wait_s=batch_wait_s(config.inference.batch_wait_ms, not on_gpu),
        cores=own.cores or available_cpus(),
        learner_shares_device=on_gpu and config.learner.device is None,
        replay_ratio=config.replay_ratio,
        most_actors=most_actors,
        groups=config.groups,
    )
    return Question(config, inputs, payload_of(config, spec, sizes.action_horizon), policy_settings)


def uses_gpu(config: Config) -> bool:
    """Whether the policy would run on a GPU here."""
    import torch  # only here, as below: it takes seconds, and mistakes should be told before

    return config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())


def measured(run: CheckedRun, seconds: float) -> dict[str, Any]:
    """Measured fields of `CapacityInputs`; stderr is told what is being measured."""
    preflight.check_devices(run.config)
    with waiting("importing PyTorch"):
        from dsrl_async.plan.measure import measure

    def say(what: str) -> None:
        print(f"measuring: {what}", file=sys.stderr, flush=True)

    return measure(run, seconds, say)._asdict()


def payload_of(config: Config, spec: EnvironmentSpec, horizon: int) -> Payload:
    """What a decision and a publication of weights would send over a network.

    Noise is not sent: it follows from the episode's seed, and can be drawn where the policy is.
    """
    from dsrl_async.run.weights import HEADER

    width, cameras = config.sac.noise_width(horizon), len(config.sac.cameras)
    of_actions = action_row(config, spec.cameras, spec.image_size, spec.action_dim)
    fields = slot_fields(1, spec, config.env.chunk, width, 0, cameras)
    fields |= replay_fields(1, 1, spec.state_dim, width, cameras, of_actions, config.sac.instruction_dim > 0)
    size = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in fields.items()}
    return Payload(
        observation=size["slot/images"] + size["slot/sac_image"] + size["slot/state"],
        action_chunk=size["slot/action_chunk"],
        transition=sum(size[name] for name in fields if name.startswith("replay/") and name != "replay/head"),
        weights=4 * actor_parameters(config.sac, horizon) + HEADER.size,
    )
