"""The live display as lines of text, for a terminal of any size.

Each row has several wordings, of which the longest one is taken that fits, and each row has a weight: where the
terminal is low, the rows of least weight are left out. Nothing is wrapped or cut off, and what has no data yet is not
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from dsrl_async.config.settings import Config
from dsrl_async.host.machine import available_cpus
from dsrl_async.telemetry.monitor import GroupView, View, Wait
from dsrl_async.telemetry.profile.bottleneck import at_a_glance

SPARKS = "▁▂▃▄▅▆▇█"
PHASE_CELLS, LEGEND_CELLS = 16, 30
"""Widths of the bar of phases and of the legend beside it, at 80 columns."""
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "white")
LABEL_CELLS = 11
"""Width of the names of the rows, with a space behind."""
FRAMED, WIDE = 60, 132
"""From so many columns on there is a frame, and two halves side by side."""
LEFT_CELLS = 76
"""Width of the left half."""
WIDEST = 200
KINDS = ("actor", "evaluation", "template", "inference", "uplink", "downlink", "learner", "supervisor")
SILENT_S = 5.0
"""From so many seconds on the silence of a group is shown."""
CURVE_LINES = 6
"""Height of the learning curve beside the figures."""

FIRST, FIGURES, DETAILS, EXTRAS, LEAST = 4, 3, 2, 1, 0
"""Weights of rows: what a person looks for first, what explains it, what the time goes to, what else there is, and
empty lines."""


@dataclass(frozen=True)
class Row:
    """A line of the display."""

    weight: int
    wordings: tuple[Text, ...]
    """From the longest to the shortest."""

    def fitting(self, width: int) -> Text | None:
        """The longest wording that fits; None if none does."""
        return next((text for text in self.wordings if text.cell_len <= width), None)


class Screen:
    """What rich draws of a view, as large as the terminal is at that moment."""

    def __init__(self, config: Config, view: View) -> None:
        self._config, self._view = config, view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = min(options.max_width, WIDEST), options.max_height - 1
        config, view = self._config, self._view
        framed = width >= FRAMED and height > len(rows_of(config, view, width, FIRST)) + 2
        inner, lines = (width - 4, height - 2) if framed else (width, height)
        body = Text("\n").join(layout(config, view, inner, lines))
        body.no_wrap, body.overflow = True, "crop"
        if not framed:
            yield body
            return
        title = f"[bold]dsrl_async[/]  {config.env.name}, {config.actors} actor{'s' * (config.actors > 1)}"
        title += f" in {config.groups} groups" * (config.groups > 1)
        yield Panel(body, title=title, title_align="left", border_style="bright_black", width=width)


def layout(config: Config, view: View, width: int, height: int) -> list[Text]:
    """The lines of the display, at most `height` of them and none wider than `width` cells."""
    if width < WIDE - 4:
        rows = rows_of(config, view, width) + processes(view, width)
        return fit(rows, width, height)
    left = fit(rows_of(config, view, LEFT_CELLS), LEFT_CELLS, height)
    room = width - LEFT_CELLS - 4
    right = fit(curve(view, room) + processes(view, room), room, height)
    lines = []
    for one, other in zip_longest(left, right, fillvalue=Text()):
        line = one.copy()
        line.pad_right(LEFT_CELLS + 4 - line.cell_len)
        lines.append(line.append_text(other))
    return lines


def fit(rows: Sequence[Row], width: int, height: int) -> list[Text]:
    """The rows that there is room for, each in the wording that fits."""
    lines: list[tuple[int, Text]] = []
    for row in rows:
        if (text := row.fitting(width)) is not None and (text or (lines and lines[-1][1])):  # one empty line is enough
            lines.append((row.weight, text))
    while lines and (not lines[-1][1] or len(lines) > height):
        if len(lines) <= height:
            lines.pop()
            continue
        least = min(weight for weight, _ in lines)
        last = max(index for index, (weight, _) in enumerate(lines) if weight == least)
        del lines[last]
    return [text for _, text in lines]


def rows_of(config: Config, view: View, width: int, least: int = LEAST) -> list[Row]:
    """The rows about the run as a whole, of at least this weight."""
    narrow = width < FRAMED - 10
    rows = [*progress(view, narrow), EMPTY, *map(wait, view.waits), *([EMPTY] if view.waits else [])]
    rows += narrow_figures(config, view) if narrow else figures(config, view)
    return [row for row in rows if row.weight >= least]


EMPTY = Row(LEAST, (Text(),))


def joined(*parts: str | Text) -> Text:
    """The parts one after the other, each in its own style."""
    return Text.assemble(*parts)


def labelled(label: str, weight: int, *wordings: str | Text) -> Row:
    name = Text(f"{label:<{LABEL_CELLS - 1}} ", "bright_black")
    return Row(weight, tuple(Text.assemble(name, wording) for wording in wordings))


def progress(view: View, narrow: bool) -> list[Row]:
    elapsed, left = duration(view.wall_s), view.remaining_s
    if narrow:
        return [labelled("elapsed", FIGURES, elapsed)] + (
            [] if left is None else [labelled("left", FIRST, Text(duration(left), "bold"), days(left))]
        )
    parts: list[str | tuple[str, str] | Text] = [(elapsed, "bold"), " elapsed"]
    short: list[str | tuple[str, str] | Text] = [*parts]
    if view.progress is not None:
        share = percent(view.progress)
        parts += ["  ", bar_of(view.progress, 32), f"  {share}"]
        short += [f", {share} done"]
    if left is not None:
        parts += ["  ", (duration(left), "bold"), " left"]
        short += [", ", (duration(left), "bold"), " left"]
    return [Row(FIRST, (Text.assemble(*parts), Text.assemble(*short)))]


def bar_of(share: float, width: int) -> Text:
    console = Console(width=width, color_system="standard", force_terminal=True, legacy_windows=False)
    bar = ProgressBar(total=1.0, completed=share, width=width)
    return Text.assemble(*((piece.text, str(piece.style or "")) for piece in console.render(bar) if not piece.control))


def wait(wait: Wait) -> Row:
    """What one starting process does."""
    seconds = f"{wait.seconds:.0f} s"
    name = Text(f"{wait.who:<{LABEL_CELLS - 1}} ", "yellow")
    short = wait.doing.split(",")[0]
    wordings = [f"{wait.doing}, {seconds} ({wait.detail})"] if wait.detail else []
    wordings += [f"{wait.doing}, {seconds}", f"{short}, {seconds}"]
    if wait.detail:
        wordings.append(f"{wait.detail.split(',')[0]}, {seconds}")
    return Row(FIRST, tuple(Text.assemble(name, wording) for wording in (*wordings, seconds)))


def narrow_figures(config: Config, view: View) -> list[Row]:
    """The most important figures in their shortest words."""
    rows = []
    if view.success_rate is not None:
        success = Text(percent(view.success_rate), "bold green")
        rows.append(labelled("success", FIRST, joined(success, f" of the last {view.success_episodes}"), success))
        if len(view.success_history) > 1:
            curves = [Text(sparkline(view.success_history, cells), "green") for cells in (24, 16, 8)]
            rows.append(labelled("so far", DETAILS, *curves))
    if view.decisions > 0:
        rows.append(labelled("decisions", FIRST, f"{view.decisions:,}", short_number(view.decisions)))
        rate = view.recent.decisions_per_s
        rows.append(labelled("speed", FIRST, f"{rate:,.1f} decisions/s", f"{short_number(rate)}/s"))
    if view.warming_up is not None and (view.decisions > 0 or not view.waits):
        done, of = view.warming_up
        rows.append(labelled("warm-up", FIGURES, f"{done:,} of {of:,} decisions", f"{done / of:.0%}"))
    if view.updates > 0:
        rows.append(labelled("updates", FIGURES, f"{view.updates:,}", short_number(view.updates)))
        rows.append(labelled("ratio", DETAILS, ratio_of(config, view, " of "), f"{view.replay_ratio:.2f}"))
    rows += bottleneck(config, view)
    if (shown := view.evaluation) is not None and shown.success_rate is not None:
        rows.append(labelled("evaluation", FIGURES, percent(shown.success_rate)))
    return rows


def figures(config: Config, view: View) -> list[Row]:
    recent, overall, metrics = view.recent, view.overall, view.metrics
    rows: list[Row] = []

    def counted(label: str, weight: int, count: int, rate: float, mean: float) -> None:
        if count > 0:
            short = Text.assemble((f"{count:>12,}", "bold"), f" {rate:>10,.1f}/s")
            rows.append(
                labelled(label, weight, short + Text(f"   mean {mean:,.1f}/s", "bright_black"), short, f"{count:,}")
            )

    if view.success_rate is not None:
        goal = "" if config.stop_at_success is None else f", goal {config.stop_at_success:.0%}"
        success = Text(f"{percent(view.success_rate):>6}", "bold green")
        of = Text(f" of the last {view.success_episodes}{goal}  ", "bright_black")
        curves = [Text(sparkline(view.success_history, cells), "green") for cells in (32, 24, 16)]
        rows.append(
            labelled("success", FIRST, *(joined(success, of, curve) for curve in curves), joined(success, of), success)
        )
    if view.episodes > 0:
        rows.append(labelled("episodes", EXTRAS, Text(f"{view.episodes:>12,}", "bold")))
    counted("env steps", EXTRAS, view.env_steps, recent.env_steps_per_s, overall.env_steps_per_s)
    counted("decisions", FIRST, view.decisions, recent.decisions_per_s, overall.decisions_per_s)
    counted("updates", FIGURES, view.updates, recent.updates_per_s, overall.updates_per_s)
    if view.warming_up is not None:
        if view.decisions > 0 or not view.waits:
            rows.append(labelled("warm-up", FIGURES, f"{warm_up(view)} before the first update", warm_up(view)))
    elif view.updates > 0:
        ratio = ratio_of(config, view, " of ")
        rows.append(labelled("ratio", FIGURES, f"{ratio}   policy lag {recent.policy_lag:.1f} updates", ratio))
    rows += [group_row(number, group) for number, group in enumerate(view.groups) if group.where]
    rows += bottleneck(config, view)
    if recent.batch_size > 0:
        batches = f"{recent.batch_size:.1f} rows, {recent.batch_fill:.0%} full"
        rows.append(labelled("batches", EXTRAS, f"{batches}, waited {recent.queue_wait_ms:.1f} ms", batches))
    if view.replay_size > 0:
        rows.append(labelled("replay", EXTRAS, f"{view.replay_size:,} rows, {view.replay_utilization:.0%} of the ring"))
    if evaluation := evaluation_of(view):
        rows.append(labelled("evaluation", FIGURES, *shorter(evaluation)))
    if loading := loading_of(view):
        rows.append(labelled("policy", FIGURES, loading))
    if graphs := graphs_of(view):
        rows.append(labelled("graphs", EXTRAS, Text(graphs, "bold red" if "failed" in graphs else "")))
    if metrics:
        names = ("train/sac/critic_loss", "train/actor/entropy", "train/sac/alpha")
        parts = [f"{name.split('/')[-1].replace('_', ' ')} {metrics[name]:.4g}" for name in names if name in metrics]
        rows.append(labelled("agent", EXTRAS, *("   ".join(parts[:count]) for count in range(len(parts), 0, -1))))
    return rows


def group_row(number: int, group: GroupView) -> Row:
    rate, waits = f"{group.decisions_per_s:>10,.1f}/s", f"waits {group.waiting:.0%}"
    silent = f", silent {group.silent_s:.0f} s" if (group.silent_s or 0.0) > SILENT_S else ""
    where = f"{rate}   {waits}{silent}   {group.unstored} unstored   {group.where}"
    return labelled(f"group {number}", DETAILS, where, f"{rate}   {waits}{silent}", f"{rate}{silent}")


def shorter(sentence: str) -> list[str]:
    """A list of words between commas, and the same without its last ones."""
    parts = sentence.split(", ")
    return [", ".join(parts[:count]) for count in range(len(parts), 0, -1)]


def bottleneck(config: Config, view: View) -> list[Row]:
    if view.recent.decisions_per_s == 0:
        return []
    glance = at_a_glance(view.recent.phases, view.cpu_percent, available_cpus(), config.serial)
    if glance is None:
        return [labelled("bottleneck", FIRST, "none: the processes wait for each other in turn", "none")]
    wordings = f"{glance.who}: {glance.why}", f"{glance.who} {glance.busy:.0%}", glance.who
    return [labelled("bottleneck", FIRST, *wordings)]


def curve(view: View, width: int) -> list[Row]:
    """The success rate so far, from 0 to 100 %, some lines high."""
    values, cells = view.success_history, width - 5
    if len(values) < 2 or cells < len(values):
        return []
    columns = [values[column * len(values) // cells] for column in range(cells)]
    eighths = [round(value * CURVE_LINES * 8) for value in columns]
    rows = [Row(FIGURES, (Text("success so far", "bright_black"),))]
    for line in range(CURVE_LINES):
        floor = 8 * (CURVE_LINES - 1 - line)
        axis = "100%" if line == 0 else "0%" if line == CURVE_LINES - 1 else ""
        blocks = "".join((" " + SPARKS)[min(max(height - floor, 0), 8)] for height in eighths)
        rows.append(Row(FIGURES, (Text.assemble((f"{axis:>4} ", "bright_black"), (blocks, "green")),)))
    return [*rows, EMPTY]


def processes(view: View, width: int) -> list[Row]:
    """A row for each kind of process: how much of CPU and memory it uses, and what it spends its time on."""
    shown = {kind for kind, phases in view.recent.phases.items() if any(phases.values())} | view.processes.keys()
    kinds = [kind for kind in KINDS if kind in shown]
    if kinds == ["supervisor"]:
        return []
    names: dict[str, str] = {
        kind: f"{kind} ×{view.processes[kind]}" for kind in ("actor", "evaluation") if kind in view.processes
    }
    named = max(len(names.get(kind, kind)) for kind in kinds)
    more = width - 76
    bar_cells = PHASE_CELLS + max(0, more // 4)
    legend_cells = LEGEND_CELLS + more - max(0, more // 4)
    use = f"{'CPU':>6} {'memory':>8}"
    heading = Text(" " * named + use, "bright_black")
    rows = [EMPTY, Row(DETAILS, (heading + Text(" time", "bright_black"), heading, Text()))]
    for kind in kinds:
        bar, legend = phase_bar(view.recent.phases.get(kind, {}), bar_cells, legend_cells)
        bar.pad_right(bar_cells - bar.cell_len)
        cpu = f"{view.cpu_percent[kind]:.0f}%" if kind in view.cpu_percent else ""
        used = memory(view.memory_mb.get("actor_mean" if kind == "actor" else kind, 0.0))
        name = f"{names.get(kind, kind):<{named}}"
        full = Text.assemble(f"{name}{cpu:>6} {used:>8} ", bar, " ", legend)
        full.rstrip()
        with_bar = Text.assemble(f"{name}{cpu:>6} {used:>8} ", bar)
        wordings = [full, with_bar, Text(f"{name}{cpu:>6} {used:>8}"), Text(f"{name}{cpu:>6}")]
        rows.append(Row(DETAILS, tuple(wordings)))
    return rows


def phase_bar(
    phases: dict[str, float], bar_cells: int = PHASE_CELLS, legend_cells: int = LEGEND_CELLS
) -> tuple[Text, Text]:
    """A stacked bar, in which waits are shaded, and a legend of the largest shares, of so many cells at most."""
    bar, legend = Text(), Text()
    scale = bar_cells / max(1.0, sum(phases.values()))
    styles = {}
    edge = 0.0
    for (name, share), colour in zip(phases.items(), COLOURS, strict=False):
        waiting = name.startswith("wait")
        styles[name] = "bright_black" if waiting else colour
        cells = round(edge + share * scale) - round(edge)
        bar.append(("░" if waiting else "█") * cells, styles[name])
        edge += share * scale
    for name, share in sorted(phases.items(), key=lambda item: -item[1]):
        words = f"{name.replace('_', ' ')} {share:.0%}"
        gap = "  " if legend else ""
        if share < 0.005 or len(legend) + len(gap) + len(words) > legend_cells:
            break  # a smaller phase must not take its place
        legend.append(gap).append(words, styles[name])
    return bar, legend


def sparkline(values: tuple[float, ...], width: int) -> str:
    """At most `width` block characters for evenly spaced values in [0, 1], of which the last is always shown."""
    step = max(1, -(-len(values) // width))
    return "".join(SPARKS[min(int(value * len(SPARKS)), len(SPARKS) - 1)] for value in values[::-1][::step][::-1])


def warm_up(view: View) -> str:
    assert view.warming_up is not None
    done, of = view.warming_up
    return f"{done:,} of {of:,} decisions"


def ratio_of(config: Config, view: View, of: str) -> str:
    """The replay ratio and its target."""
    return f"{view.replay_ratio:.3f}{of}{config.replay_ratio:g}"


def evaluation_of(view: View) -> str:
    """The last evaluation, the best, and how far the one is that is going on; empty without evaluation."""
    if (shown := view.evaluation) is None:
        return ""
    parts = []
    if shown.success_rate is not None:
        parts.append(f"{percent(shown.success_rate)} at {shown.decisions:,}")
    if shown.best_success_rate is not None:
        parts.append(f"best {percent(shown.best_success_rate)} at {shown.best_decisions:,}")
    if shown.played is not None:
        parts.append(f"now {shown.played}/{shown.episodes}")
    return ", ".join(parts) or f"of {shown.episodes} episodes"


def loading_of(view: View) -> str:
    """How far the policy is loaded; empty once it is, and before it is known."""
    if view.policies_ready == view.policies:
        return ""
    return f"ready for {view.policies_ready} of {view.policies} batch sizes and prompt lengths"


def graphs_of(view: View) -> str:
    """How policy and learner run on a GPU; empty on the CPU."""
    return ", ".join(f"{name} {state}" for name, state in view.cuda_graphs.items() if state != "none")


def duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def days(seconds: float) -> str:
    whole, rest = divmod(int(seconds) // 3600, 24)
    return f"{whole} d {rest} h"


def memory(megabytes: float) -> str:
    """Megabytes in at most eight characters; nothing if they are not known."""
    if megabytes >= 10_000:
        return f"{megabytes / 1000:,.1f} GB"
    return f"{megabytes:,.0f} MB" if megabytes else ""


def percent(share: float) -> str:
    return f"{share:.1%}"


def short_number(number: float) -> str:
    """Three digits and a letter: 12345678 -> 12.3M."""
    if isinstance(number, int) and number < 1000:
        return str(number)
    for letter in ("", "k", "M", "G"):
        if number < 999.5 or letter == "G":
            break
        number /= 1000
    return f"{number:,.0f}{letter}" if number >= 99.95 else f"{number:.1f}{letter}"
