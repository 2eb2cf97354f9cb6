"""What a resumed run may be given otherwise than the run that it continues, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsrl_async.config.load import get_key, leaf_fields, on_resume, read_run_settings, validate
from dsrl_async.config.settings import Config, ConfigError, OnResume
from dsrl_async.host.environments import environment_record
from dsrl_async.run import checkpoints
from dsrl_async.run.set_aside import chosen
from dsrl_async.shm.counters import SUCCESS_EPISODES
from dsrl_async.shm.episodes import last_successes


def check_resume(config: Config, run_dir: Path) -> list[str]:
    """Check that `config` can continue the run; returns what it changes, such as `sac.actor_lr 0.0003 -> 0.0001`.

    Raises:
        ConfigError: there is no such checkpoint, a limit is reached already, or a setting that is fixed was changed.
    """
    assert config.resume is not None
    try:
        saved, _ = chosen(run_dir, Path(config.resume))
        if saved is None:
            raise ConfigError(
                f"--resume {run_dir}: nothing was saved there to continue from; delete it, and start a new run"
            )
        state = checkpoints.read_state(saved)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    done = sum(state["counters"]["actor_decisions"])
    if config.max_decisions is not None and done >= config.max_decisions:
        raise ConfigError(f"max_decisions: {done} of {config.max_decisions} are done already; give a larger number")
    successes = last_successes(state.get("episodes"))
    rate = sum(successes) / SUCCESS_EPISODES if len(successes) == SUCCESS_EPISODES else -1.0
    if config.stop_at_success is not None and rate >= config.stop_at_success:
        raise ConfigError(
            f"stop_at_success: the last {SUCCESS_EPISODES} episodes reach {rate:g} already, "
            f"{config.stop_at_success:g} is asked for; give a larger number, or null"
        )
    return changes(validate(read_run_settings(run_dir)), config)


def changes(before: Config, now: Config) -> list[str]:
    """The settings that are to be announced, see `OnResume`; raises ConfigError for the first that is fixed."""
    changed = []
    for key, field in leaf_fields():
        old, new = get_key(before, key), get_key(now, key)
        fate = on_resume(field)
        if old == new or fate is OnResume.FREE:
            continue
        if fate is OnResume.FIXED and _meaning(before, key) != _meaning(now, key):
            forcible = key == "env.render_quality"
            if not (forcible and now.policy.ignore_render_quality):
                forced = ", or set policy.ignore_render_quality" if forcible else ""
                raise ConfigError(
                    f"{key}: the resumed run was made with {_text(old)}, not {_text(new)}; "
                    f"leave it so, or start a new run{forced}"
                )
        changed.append(f"{key} {_text(old)} -> {_text(new)}")
    return changed


def _meaning(config: Config, key: str) -> Any:
    """The value of a setting, or what a null stands for."""
    section, _, name = key.rpartition(".")
    if section == "env" and get_key(config, key) is None:
        record = environment_record(config.env.model_dump())
        return record.episode_steps if name == "max_episode_steps" else record.settings[name]
    return get_key(config, key)


def _text(value: Any) -> str:
    """A value as it stands in a file, or on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
