"""Checks that need the machine and the files, made before anything is started; each failure is one sentence."""

from __future__ import annotations

import os
from pathlib import Path

from dsrl_async.config.hub import local_path
from dsrl_async.config.load import read_run_settings, validate
from dsrl_async.config.settings import Config, ConfigError, EnvConfig, PolicyConfig
from dsrl_async.envs import OWN_SETTINGS, EnvironmentRecord, EnvironmentSpec, graphics
from dsrl_async.host.environments import environment_record, environment_spec
from dsrl_async.host.policies import policy_record
from dsrl_async.pi0.config import EMBEDDED_POLICY, TRAINING
from dsrl_async.pi0.files import maker_of, read_content
from dsrl_async.policies import PolicyRecord, PolicySizes, find
from dsrl_async.run.instructions import check_kind, instructions_of
from dsrl_async.run.preflight.hub import fetch_policy
from dsrl_async.untrusted import read_object, shown


def directory_of(config: Config) -> Path | None:
    """Where the policy's files are, those of a model of the hub once `fetch_policy` has been called; None if they are
    nowhere that a setting says."""
    if config.policy.checkpoint is not None:
        return Path(local_path(config.policy.checkpoint))
    return EMBEDDED_POLICY if config.policy.type is None else None


def place(config: Config) -> str:
    """What to call the policy in a message."""
    return str(directory_of(config) or config.policy.type)


def check_environment(config: Config, before: Config | None = None) -> EnvironmentSpec:
    """The environment's shapes; raises ConfigError when it is not installed, or has no such task or initial state, and
    as `check_effect`."""
    try:
        spec = environment_spec(config.env.model_dump())
    except ValueError as error:
        key = "" if str(error).startswith("env.") else "env.name: "
        raise ConfigError(f"{key}{error}") from error
    check_effect(config, before)
    return spec


def check_effect(config: Config, before: Config | None = None) -> None:
    """Raises ConfigError when a setting has no effect on the environment, and another value than its default.

    `before` are settings that have been accepted already: those of a run. Of a run that is resumed they are read.
    """
    record, before = environment_record(config.env.model_dump()), _accepted(config, before)
    accepted = EnvConfig() if before is None else before.env
    for key in sorted(OWN_SETTINGS - record.own_settings):
        value = getattr(config.env, key)
        if value not in (getattr(EnvConfig(), key), getattr(accepted, key)):
            raise ConfigError(f"env.{key}: it has no effect on {record.name}; leave it out")


def _accepted(config: Config, before: Config | None) -> Config | None:
    if config.resume is not None and config.run_dir is not None:
        return validate(read_run_settings(Path(config.run_dir)))
    return before


def check_files(environment: EnvironmentRecord) -> tuple[str, ...]:
    """Check the environment's own files; returns warnings. Raises ConfigError if one is missing or damaged."""
    try:
        return tuple(environment.check())
    except ValueError as error:
        raise ConfigError(f"env.name: {error}") from error


def check_graphics(environment: EnvironmentRecord) -> None:
    """Raises ConfigError if the environment draws with OpenGL and the variables that choose it make no sense."""
    try:
        if environment.needs_opengl:
            graphics.variables()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_checkpoint(config: Config, before: Config | None = None) -> PolicyRecord:
    """What is known of the policy; raises ConfigError when there is none, it is incomplete or contradicts itself, or a
    setting has no effect on it and another value than its default.

    `before` is as in `check_effect`. A policy of the hub is downloaded first, see `fetch_policy`.
    """
    config = fetch_policy(config)
    try:
        record = policy_record(config.policy)
    except ValueError as error:
        key = "" if str(error).startswith("policy.") else "policy.checkpoint: "
        raise ConfigError(f"{key}{error}") from error
    before = _accepted(config, before)
    accepted = PolicyConfig() if before is None else before.policy
    for key in sorted(find.OWN_SETTINGS - record.own_settings):
        value = getattr(config.policy, key)
        if value not in (getattr(PolicyConfig(), key), getattr(accepted, key)):
            raise ConfigError(f"policy.{key}: it has no effect on {record.type}; leave it out")
    return record


def check_prompts(policy: PolicyRecord, spec: EnvironmentSpec) -> tuple[str, ...]:
    """Check that the policy can be given the environment's prompts; returns warnings. Raises ConfigError if not."""
    try:
        return policy.check_prompts(spec.prompts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_algorithm(config: Config, policy: PolicyRecord) -> None:
    """Raises ConfigError if the agent's algorithm asks what the policy cannot be asked, or what it steers towards is
    to change and never does."""
    if config.sac.algorithm == "na" and not policy.normalised:
        raise ConfigError(
            f"sac.algorithm: na learns from normalised actions, which a Pi0 gives and {policy.type} does not; set it "
            "to sac"
        )
    if config.sac.lr_schedule == "constant" and config.sac.final_target_entropy is not None:
        raise ConfigError(
            "sac.final_target_entropy: it has no effect with sac.lr_schedule constant; set that to step or linear, or "
            "leave this out"
        )


def check_instructions(
    config: Config, policy: PolicyRecord, spec: EnvironmentSpec, before: Config | None = None
) -> tuple[str, ...]:
    """Check that the agent can be told its task as `sac.instruction` says; returns warnings.

    `before` is as in `check_effect`; that a run cannot go on with another kind, `check_resume` says. Raises ConfigError
    if it cannot be told, see `instructions_of`.
    """
    kind, accepted = config.sac.instruction, _accepted(config, before)
    if accepted is not None and accepted.sac.instruction != kind:
        return ()
    check_kind(config.sac, policy)
    if kind != "none" and not config.sac.instruction_dim:
        return (f"sac.instruction {kind} has no effect, since {config.env.name} has one instruction",)
    instructions_of(config.sac, policy, spec.prompts)
    return ()


def fit_agent(config: Config, policy: PolicySizes, spec: EnvironmentSpec) -> Config:
    """The settings with the agent's widths, where the user gave none: those of the environment and the policy."""
    sac = config.sac.with_widths(spec.state_dim, policy.action_dim, len(set(spec.prompts)))
    return config.model_copy(update={"sac": sac})


def check_fit(config: Config, policy: PolicySizes, spec: EnvironmentSpec) -> None:
    """Raises ConfigError unless policy, environment and agent have the same shapes."""
    record = environment_record(config.env.model_dump())
    if config.policy.type is None and config.policy.checkpoint is None and not record.embedded_policy:
        ours = f", or --config {record.example}" if record.example else ""
        raise ConfigError(
            f"policy.checkpoint: null means the tabletop's policy; for {record.name} give --policy.checkpoint DIR{ours}"
        )
    for what, of_policy, of_env in (
        ("cameras", policy.cameras, spec.cameras),
        ("image size", policy.image_size, spec.image_size),
        ("robot state", policy.robot_state_dim, spec.state_dim),
        ("robot action", policy.robot_action_dim, spec.action_dim),
    ):
        if of_policy != of_env:
            raise ConfigError(
                f"policy.checkpoint: the {what} of {place(config)} is {of_policy}, "
                f"that of the environment {record.name} is {of_env}{_remedy(config, record, what, of_policy)}"
            )
    if config.env.chunk > policy.action_horizon:
        raise ConfigError(
            f"env.chunk: {config.env.chunk} is more than the policy's {policy.action_horizon} action slots"
        )
    if config.sac.noise_dim != policy.action_dim:
        raise ConfigError(
            f"sac.noise_dim: {config.sac.noise_dim} must be the policy's action width, {policy.action_dim}; "
            "leave it out"
        )
    if config.sac.noise_layout == "knots" and config.sac.noise_knots > policy.action_horizon:
        raise ConfigError(
            f"sac.noise_knots: {config.sac.noise_knots} is more than the policy's {policy.action_horizon} action "
            "slots; give fewer, or sac.noise_layout per_slot"
        )
    if (camera := max(config.sac.cameras)) >= spec.cameras:
        there = ", ".join(map(str, range(spec.cameras)))
        raise ConfigError(f"sac.cameras: {record.name} has no camera {camera}; choose from {there}")
    if config.sac.state_dim != spec.state_dim:
        raise ConfigError(
            f"sac.state_dim: {config.sac.state_dim} must be the robot state's width, {spec.state_dim}; leave it out"
        )


def _remedy(config: Config, record: EnvironmentRecord, what: str, of_policy: int) -> str:
    """What to do about a size in which a policy and an environment differ, if anything, for the end of a message."""
    has_options = "options" in record.own_settings
    if what == "image size":
        if "image_size" in record.own_settings:
            return f"; set env.image_size to {of_policy}"
        return f"; make it {of_policy} if env.options can" if has_options else ""
    directory = directory_of(config)
    if config.policy.type is not None or directory is None or not has_options:
        return ""
    if maker_of(read_content(directory)) != "openpi or RLinf":
        return ""
    return "; its files do not say it, and LIBERO's is taken: docs/adapters.md has a config.json that does"


def trained_quality(directory: Path, maker: str) -> str | None:
    """The `env.render_quality` of the pictures that a policy was trained on; None if nobody says.

    `maker` is that of its `PolicyFiles`.

    Raises ValueError naming the file that cannot be understood.
    """
    if os.path.lexists(directory / TRAINING):
        quality = read_object(directory / TRAINING).get("render_quality")
        if quality not in (None, "exact", "fast"):
            raise ValueError(f"{directory / TRAINING}: render_quality is {shown(quality)}, it must be exact or fast")
        return quality
    return None if maker in ("dsrl_async", "yours") else "exact"


def check_render_quality(config: Config, maker: str) -> None:
    """Raises ConfigError when the policy was trained on other pictures than the run would show it."""
    own_settings = environment_record(config.env.model_dump()).own_settings
    if "render_quality" not in own_settings or config.policy.ignore_render_quality:
        return
    directory = directory_of(config)
    if directory is None:
        return
    try:
        trained = trained_quality(directory, maker)
    except ValueError as error:
        raise ConfigError(f"policy.checkpoint: {error}") from error
    if trained not in (None, config.env.render_quality):
        raise ConfigError(
            f"env.render_quality: the policy {directory} was trained on {trained} pictures, not on "
            f"{config.env.render_quality} ones; set it to {trained}, or policy.ignore_render_quality to true"
        )
