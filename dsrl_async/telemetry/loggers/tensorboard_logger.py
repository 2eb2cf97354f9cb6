"""TensorBoard: curves, with a page that tells the run's story in the order in which a person reads it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.text import metadata as text

from dsrl_async.config.settings import Config
from dsrl_async.telemetry.loggers import Facts
from dsrl_async.telemetry.loggers.event_file import EventFile

STORY = {
    "success": ("async/success_rate", "eval/success_rate"),
    "return": ("env/return", "eval/return"),
    "episode length": ("env/episode_len", "eval/episode_len"),
    "losses": ("train/sac/critic_loss", "train/sac/actor_loss", "train/sac/alpha_loss"),
    "entropy": ("train/actor/entropy",),
    "alpha": ("train/sac/alpha",),
    "throughput": ("time/env_steps_per_s", "time/decisions_per_s", "time/updates_per_s"),
    "policy lag": ("async/policy_lag",),
    "replay ratio": ("async/replay_ratio",),
}
"""The charts of the page "Custom Scalars", in order: title -> tags."""
HPARAMS = ("actors", "seed", "replay_ratio", "serial")
HPARAM_SECTIONS = ("env.", "policy.", "sac.", "replay.", "learner.", "inference.")


def open_logger(config: Config, run_dir: Path, facts: Facts) -> TensorBoard:
    return TensorBoard(run_dir / "tensorboard", facts)


class TensorBoard:
    """Writes a file of events to a directory; raises OSError if it cannot be made."""

    def __init__(self, directory: Path, facts: Facts) -> None:
        self._file = EventFile(directory)
        self._add(facts.first_undone, session_log=SessionLog(status=SessionLog.START))
        step = max(facts.first_undone - 1, 0)
        charts = [
            layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
            for title, tags in STORY.items()
        ]
        layout = layout_pb2.Layout(category=[layout_pb2.Category(title="run at a glance", chart=charts)])
        about = custom_scalar.create_summary_metadata()
        self._add_text(custom_scalar.CONFIG_SUMMARY_TAG, layout.SerializeToString(), about, step)
        for title, words in facts.texts.items():
            self._add_text(title, words.encode(), text.create_summary_metadata(title, ""), step)
        for tag, content in hyper_parameters(facts.settings):
            about = hparams.create_summary_metadata(content)
            self._add(step, summary=Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=hparams.NULL_TENSOR)]))

    def scalars(self, values: Mapping[str, float], env_steps: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(env_steps, summary=summary)

    def image(self, tag: str, file: bytes, width: int, height: int, env_steps: int) -> None:
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file)
        self._add(env_steps, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def close(self) -> None:
        self._file.close()

    def _add_text(self, tag: str, content: bytes, about: SummaryMetadata, step: int) -> None:
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=shape)
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=tensor)]))

    def _add(self, step: int, **content: Any) -> None:
        self._file.add_event(Event(wall_time=time.time(), step=step, **content))


def hyper_parameters(settings: Mapping[str, Any]) -> list[tuple[str, Message]]:
    """What the page "HParams" compares runs by: those settings that numbers depend on, and three metrics."""
    shown = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None and (key in HPARAMS or key.startswith(HPARAM_SECTIONS))
    }
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag))
        for tag in ("async/success_rate", "eval/success_rate", "env/return")
    ]
    experiment = plugin_data_pb2.HParamsPluginData(
        version=hparams.PLUGIN_DATA_VERSION,
        experiment=api_pb2.Experiment(
            hparam_infos=[api_pb2.HParamInfo(name=key, type=_kind(value)) for key, value in shown.items()],
            metric_infos=metrics,
        ),
    )
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for key, value in shown.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(start.hparams[key], field, value)
    session = plugin_data_pb2.HParamsPluginData(version=hparams.PLUGIN_DATA_VERSION, session_start_info=start)
    return [(hparams.EXPERIMENT_TAG, experiment), (hparams.SESSION_START_INFO_TAG, session)]


def _kind(value: object) -> int:
    names = {bool: "DATA_TYPE_BOOL", str: "DATA_TYPE_STRING"}
    return int(api_pb2.DataType.Value(names.get(type(value), "DATA_TYPE_FLOAT64")))
