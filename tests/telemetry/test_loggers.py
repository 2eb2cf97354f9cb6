"""Where curves go: TensorBoard's story, W&B without a network, and loggers that fail."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.fake_run import FakeRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.sac import METRIC_NAMES
from dsrl_async.telemetry.loggers import Logger, check_loggers
from dsrl_async.telemetry.loggers.tensorboard_logger import STORY
from dsrl_async.telemetry.loggers.texts import commit, texts


def events(run: FakeRun) -> EventAccumulator:
    run.monitor.close()
    return EventAccumulator(str(run.run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_tensorboard_has_the_story_the_texts_and_the_settings(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", actors=3)
    run.texts = {"config": "as it is"}
    found = events(run.start())
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [chart.title for chart in layout.category[0].chart] == list(STORY)
    assert found.Tensors("config")[-1].tensor_proto.string_val == [b"as it is"]
    about = found.summary_metadata[hparams.SESSION_START_INFO_TAG].plugin_data.content
    settings = hparams.parse_session_start_info_plugin_data(about).hparams
    assert settings["actors"].number_value == 3
    assert settings["env.name"].string_value == "tabletop"
    assert settings["sac.entropy_backup"].bool_value is False


def test_the_story_tells_of_curves_that_there_are() -> None:
    known = {
        *METRIC_NAMES,
        "async/success_rate",
        "async/policy_lag",
        "async/replay_ratio",
        "env/return",
        "env/episode_len",
    }
    known |= {"eval/success_rate", "eval/return", "eval/episode_len"}
    known |= {f"time/{name}" for name in ("env_steps_per_s", "decisions_per_s", "updates_per_s")}
    assert {tag for tags in STORY.values() for tag in tags} <= known


def test_a_run_that_is_still_loading_draws_no_zeros(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run").start()
    run.tick()
    tags = set(run.scalars())
    assert "train/replay_buffer/size" in tags
    assert not [tag for tag in tags if tag.startswith(("async/", "time/"))]


def test_a_logger_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def scalars(self, values: object, env_steps: int) -> None:
            raise OSError("no network")

        def image(self, *_: object) -> None:
            raise OSError("no network")

        def close(self) -> None:
            raise OSError("no network")

    run = FakeRun(tmp_path / "run").start()
    run.monitor._loggers["broken"] = Broken()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            run.tick()
        run.monitor.write_image("picture", b"", 1, 1)
    assert [record.message for record in caplog.records] == ["broken has gaps from here on: no network"]
    assert len(run.lines()) == 3
    assert len(run.scalars()["train/replay_buffer/size"]) == 3


@pytest.mark.parametrize(
    ("loggers", "words"),
    [(["tensorboard", "tensorboard"], "has one twice"), (["wandb"], r"wandb is not installed; pip")],
)
def test_loggers_that_cannot_be_are_refused(loggers: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.telemetry.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"^log.loggers: .*{words}"):
        check_loggers(validate({"log": {"loggers": loggers}}))


def test_texts_say_settings_and_versions_and_the_commit(tmp_path: Path) -> None:
    said = texts(validate({"seed": 77}))
    assert "seed: 77" in said["config"]
    assert "| torch | " in said["versions"]
    assert commit(tmp_path) == ""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert commit(tmp_path) == ""  # there is none yet
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    assert len(commit(tmp_path)) == 12


@pytest.mark.skipif(find_spec("wandb") is None, reason="pip install -e '.[wandb]'")
@pytest.mark.slow
def test_weights_and_biases_offline_goes_on_with_its_run(tmp_path: Path) -> None:
    """In a process of its own: W&B has one, which must have ended with it."""
    code = """
import json, os, sys
from pathlib import Path
import psutil
from support.fake_run import FakeRun
for launch in range(2):
    run = FakeRun(Path(sys.argv[1]), log={"loggers": ["tensorboard", "wandb"]}).start()
    run.counters["actor_env_steps"] += 50
    run.tick()
    run.monitor.close()
print(json.dumps([len(psutil.Process().children()), "torch" in sys.modules]))
"""
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, False]
    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert set(runs) == {(tmp_path / "run/wandb-id.txt").read_text().strip()}


def test_time_that_loggers_take_to_open_is_none_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's time is by the session's clock, which begins behind them; a resume compares the two."""
    run = FakeRun(tmp_path / "run")

    def slow(*_: object) -> dict[str, Logger]:
        run.now += 5.0
        return {}

    monkeypatch.setattr("dsrl_async.telemetry.monitor.open_loggers", slow)
    assert run.start().tick(1.0).wall_s == 1.0
