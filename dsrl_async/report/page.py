"""Puts the records of runs and evaluations into one HTML page."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import dsrl_async
from dsrl_async.config.files import how_to_install
from dsrl_async.config.settings import ConfigError
from dsrl_async.report.records import RunRecord, as_json, as_yaml


class Row(NamedTuple):
    """A row of the table of figures."""

    key: str
    """Of `summary.json`."""
    style: str = ""
    """How its number is written."""
    factor: float = 1
    """What it is multiplied with before."""


ROWS = {
    "ended because of": Row("exit_reason"),
    "minutes": Row("wall_s", ",.1f", 1 / 60),
    "decisions": Row("decisions", ",d"),
    "environment steps": Row("env_steps", ",d"),
    "gradient updates": Row("updates", ",d"),
    "episodes": Row("episodes", ",d"),
    "success, last episodes of training": Row("success_rate", ".1%"),
    "decisions/s": Row("decisions_per_s", ",.2f"),
    "environment steps/s": Row("env_steps_per_s", ",.2f"),
    "updates/s": Row("updates_per_s", ",.2f"),
    "replay ratio": Row("replay_ratio", ".3f"),
}
UNKNOWN = "not known"


def write_page(runs: Sequence[RunRecord], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The page about runs side by side. Raises ConfigError where the libraries that draw it are missing."""
    try:
        import jinja2

        from dsrl_async.report import pictures
    except ImportError as error:
        raise ConfigError(f"a report needs {error.name}, which is not installed; {how_to_install('report')}") from error

    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = (Path(__file__).parent / "page.html").read_text()
    changed = [run.changed_settings() for run in runs]
    keys = sorted(set().union(*changed))
    return template.from_string(source).render(
        title=", ".join(run.name for run in runs),
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=dsrl_async.__version__,
        runs=runs,
        figures=[(name, [cell(run.figures, row) for run in runs]) for name, row in ROWS.items()],
        evaluations=[with_name(result, runs) for result in evaluations],
        percent=lambda share: f"{share:.1%}",
        learning=pictures.learning(runs),
        throughput=pictures.throughput(runs),
        phases=[pictures.phases(run.figures) for run in runs],
        settings=[(key, [shown(settings, key) for settings in changed]) for key in keys],
        yaml=as_yaml,
        json=as_json,
        commands=[commands(run) for run in runs],
        notes=[note for run in runs for note in run.notes],
    )


def cell(figures: Mapping[str, Any], row: Row) -> str:
    """A figure as the table has it."""
    value = figures.get(row.key)
    if value is None:
        return "no summary yet" if row.key == "exit_reason" else UNKNOWN
    if not isinstance(value, int | float):
        return str(value)
    try:
        return format(value if row.factor == 1 else value * row.factor, row.style)
    except ValueError:  # a count that is not whole
        return str(value)


def shown(settings: Mapping[str, Any], key: str) -> str:
    return as_json(settings[key]) if key in settings else "default"


def with_name(result: Mapping[str, Any], runs: Iterable[RunRecord]) -> dict[str, Any]:
    """An evaluation with a name for its policy: that of the run it is of, where this is one of `runs`."""
    policy = str(result["policy"])
    for run in runs:
        if Path(policy).is_relative_to(run.directory.absolute()):
            return {**result, "name": f"{run.name}, {Path(policy).name}"}
    return {**result, "name": "base policy" if policy == "base" else policy}


def commands(run: RunRecord) -> list[str]:
    """What to type to do it again, to go on, and to measure."""
    directory = shlex.quote(str(run.directory))
    return [
        f"python -m dsrl_async.launch --config {directory}/config.yaml --run-dir {directory}-again",
        f"python -m dsrl_async.launch --resume {directory}",
        f"python -m dsrl_async.evaluate --checkpoint {directory} --out {directory}-evaluation",
        f"tensorboard --logdir {directory}",
    ]
