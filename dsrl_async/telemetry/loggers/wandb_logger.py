"""Weights & Biases. `WANDB_MODE=offline` keeps everything in the run directory, for `wandb sync`."""

from __future__ import annotations

import contextlib
import io
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.host.files import write_text
from dsrl_async.telemetry.loggers import Facts
from dsrl_async.untrusted import read_text

INIT_LIMIT_S = 60
LONGEST_ID = 64


def open_logger(config: Config, run_dir: Path, facts: Facts) -> WeightsAndBiases:
    return WeightsAndBiases(config, run_dir, facts)


class WeightsAndBiases:
    """A run of W&B; a resumed run goes on with it, by the id in `RUN/wandb-id.txt`.

    Raises ConfigError if W&B does not take it: nobody is logged in, or the network does not answer.
    """

    def __init__(self, config: Config, run_dir: Path, facts: Facts) -> None:
        import wandb

        self._wandb = wandb
        quiet = wandb.Settings(
            console="off", disable_git=True, disable_code=True, init_timeout=INIT_LIMIT_S, silent=True
        )
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the summary's
                self._run = wandb.init(
                    project=config.log.project,
                    id=_id(run_dir),
                    name=run_dir.absolute().name,
                    dir=run_dir,
                    config=dict(facts.settings),
                    resume="allow",
                    settings=quiet,
                )
                self._run.define_metric("env_steps")
                self._run.define_metric("*", step_metric="env_steps")
                self._run.config.update(dict(facts.texts), allow_val_change=True)
        except Exception as error:  # W&B's own types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"log.loggers: wandb does not take the run: {reason}; `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def scalars(self, values: Mapping[str, float], env_steps: int) -> None:
        with _as_os_error():
            self._run.log({**values, "env_steps": env_steps})

    def image(self, tag: str, file: bytes, width: int, height: int, env_steps: int) -> None:
        with _as_os_error():
            if file.startswith(b"GIF"):
                media = self._wandb.Video(io.BytesIO(file), format="gif")
            else:
                from PIL import Image

                media = self._wandb.Image(Image.open(io.BytesIO(file)))
            self._run.log({tag: media, "env_steps": env_steps})

    def close(self) -> None:
        with _as_os_error(), contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
            self._wandb.teardown()  # ends its process


def _id(run_dir: Path) -> str:
    """The id of a run, made the first time."""
    path = run_dir / "wandb-id.txt"
    if not path.exists():
        write_text(path, f"{uuid.uuid4().hex}\n")
    found = read_text(path, LONGEST_ID + 2).strip()
    if not (found.isalnum() and found.isascii() and len(found) <= LONGEST_ID):
        raise ConfigError(f"{path} holds no id of W&B; remove it, and W&B gets a new run")
    return found


@contextlib.contextmanager
def _as_os_error():  # type: ignore[no-untyped-def]
    """What W&B cannot do does not end a run."""
    try:
        yield
    except Exception as error:
        raise OSError(f"wandb: {error}") from error
