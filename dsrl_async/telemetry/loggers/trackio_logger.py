"""Trackio, Hugging Face's tracker with W&B's interface, which keeps its data on this machine (`trackio show`)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.telemetry.loggers import Facts


def open_logger(config: Config, run_dir: Path, facts: Facts) -> Trackio:
    return Trackio(config, run_dir, facts)


class Trackio:
    """A run of Trackio, named after the run directory; a resumed run goes on with it. Pictures are left out.

    Raises ConfigError if Trackio does not take it.
    """

    def __init__(self, config: Config, run_dir: Path, facts: Facts) -> None:
        import trackio

        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the summary's
                name = run_dir.absolute().name
                settings = dict(facts.settings)
                self._run = trackio.init(project=config.log.project, name=name, config=settings, resume="allow")
        except Exception as error:
            raise ConfigError(f"log.loggers: trackio does not take the run: {error}") from error

    def scalars(self, values: Mapping[str, float], env_steps: int) -> None:
        try:
            self._run.log({**values, "env_steps": env_steps}, step=env_steps)
        except Exception as error:
            raise OSError(f"trackio: {error}") from error

    def image(self, tag: str, file: bytes, width: int, height: int, env_steps: int) -> None:
        pass

    def close(self) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._run.finish()
        except Exception as error:
            raise OSError(f"trackio: {error}") from error
