"""Shows a prediction as tables, a sentence and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsrl_async.config.settings import MOST_ACTORS
from dsrl_async.plan.capacity import BUSY, Bound, CapacityInputs, Machines, Payload, Prediction, Verdict
from dsrl_async.policies.pi0 import PI0_SETTINGS

BAR = 24
"""Columns of the longest bar."""

PICTURES = (".pdf", ".png", ".svg")
"""Endings of the files that `plot` can write."""

MORE: dict[Bound, str] = {
    "device": "a faster device{or_less} would give more; more actors would not",
    "cores": "more cores would give more; more actors would not",
    "learner": "a lower replay_ratio, a larger batch with fewer updates or a quicker update would give more; more "
    "actors or groups would not",
    "actors": "more machines would give more",
    "memory": "more memory or a smaller replay.capacity would allow more actors, and they would give more",
}
"""What would help, for each bound."""
NO_MORE: dict[Bound, str] = {
    "learner": "the learner is the bound, and more machines give nothing. What would, in this order: a lower "
    "replay_ratio, a larger sac.batch_size with fewer updates, a quicker update",
    "network": "the rows fill the link of the learner's machine, and more machines give nothing",
    "downlink": "the rows keep the process busy that stores them, and more machines give nothing",
}
"""What is said of the first number of machines that is too many, by its bound."""
LESS = {
    "denoise_steps": ", fewer policy.denoise_steps or policy.compile",
    "options": ", or a policy whose policy.options let it do less,",
}
"""What else helps where the device is the bound, by a key of `policy` that the policy reads."""


def sentence(inputs: CapacityInputs, verdict: Verdict, policy_settings: Set[str] = PI0_SETTINGS) -> str:
    """The verdict in words. `policy_settings` are the keys of `policy` that the policy reads."""
    at, bound = verdict
    actors, saturate, reach = f"{at.actors} actors", "saturate", "reach"
    if at.actors == 1:
        actors, saturate, reach = "1 actor", "saturates", "reaches"
    device = "the device"
    if inputs.groups > 1:
        actors = f"{inputs.groups} groups of {actors}"
        device, saturate, reach = "their devices", "saturate", "reach"
    rates = f"{at.decisions_per_s:,.4g} decisions/s ({at.env_steps_per_s:,.4g} env steps/s, "
    rates += f"{at.updates_per_s:,.4g} updates/s), {BUSY:.0%} of the most that is possible here"
    if bound == "device":
        more = MORE[bound].format(or_less="".join(words for key, words in LESS.items() if key in policy_settings))
        return f"{actors} {saturate} {device}: {rates}. The device is the bound: {more}."
    what = {
        "cores": f"The {inputs.cores:g} CPU cores are the bound",
        "learner": f"The learner is the bound, at a replay ratio of {inputs.replay_ratio:g}",
        "actors": f"The {MOST_ACTORS} actors that a run may have are the bound",
        "memory": f"Memory is the bound: it holds {inputs.most_actors} actors",
    }[bound]
    busy = f"{'A' if inputs.groups > 1 else 'The'} device computes the policy for {at.device_busy:.0%} of the time."
    return f"{actors} {reach} {rates}. {busy} {what}: {MORE[bound]}."


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), header_style="")
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("", "bound") else "right"
    for row in rows:
        table.add_row(*row)
    return table


def show(
    console: Console,
    inputs: CapacityInputs,
    payload: Payload,
    points: Sequence[Prediction],
    verdict: Verdict,
    network: Sequence[Machines],
    policy_settings: Set[str] = PI0_SETTINGS,
) -> None:
    """Print what is known, the curve, the verdict and what many machines would do."""
    times = inputs.environment
    console.print(
        f"environment  {1e3 * times.chunk_s:.4g} ms per chunk of {inputs.steps_per_decision:.3g} steps (spread "
        f"{times.sigma:.2f}), reset {times.reset_s:.3g} s every {1 / times.reset_probability:.3g} decisions, "
        f"{inputs.environment_cores:.2g} cores"
    )
    batches = ", ".join(f"{size}: {1e3 * seconds:.4g}" for size, seconds in sorted(inputs.device_s.items()))
    console.print(f"device       ms by batch size: {batches}; {inputs.device_cores:.2g} cores")
    shared = ", on the policy's device" if inputs.learner_shares_device else ""
    learner = f"{1e3 * inputs.update_s:.4g} ms per update{shared}, {inputs.replay_ratio:g} updates per decision, "
    learner += f"{inputs.update_cores:.2g} cores"
    console.print(f"learner      {learner if inputs.update_s else 'left out (--update-ms)'}")
    console.print(f"machine      {inputs.cores:g} cores, memory for {inputs.most_actors:,} actors\n")

    top = max(point.decisions_per_s for point in points)
    rows = [
        (
            f"{point.actors}",
            f"{point.decisions_per_s:,.4g}",
            "█" * max(1, round(BAR * point.decisions_per_s / top)),
            f"{point.env_steps_per_s:,.4g}",
            f"{point.updates_per_s:,.4g}",
            f"{point.device_busy:.0%}",
            f"{point.cores_busy:.3g}",
            point.bound,
        )
        for point in points
    ]
    console.print(table_of(["actors", "decisions/s", "", "env steps/s", "updates/s", "device", "cores", "bound"], rows))
    console.print(f"\n{sentence(inputs, verdict, policy_settings)}")

    each = network[0].actors // network[0].nodes
    console.print(
        "\nMore machines join a run with --ray (docs/cluster.md); this is what they would be worth."
        f"\nMany machines, each with a group of {each} actors, and one with the learner "
        f"({payload.transition:,} bytes per decision to it, {payload.weights:,} per machine and publication from it):"
    )
    rows_of_machines = [
        (
            f"{one.nodes}",
            f"{one.actors:,}",
            f"{one.decisions_per_s:,.4g}",
            f"{one.updates_per_s:,.4g}",
            f"{one.transition_bytes_per_s / 1e6:,.3g}",
            f"{one.weights_bytes_per_s / 1e6:,.3g}",
            f"{one.weights_every_s:.3g}",
            one.bound,
        )
        for one in network
    ]
    columns = ["machines", "actors", "decisions/s", "updates/s", "in MB/s", "out MB/s", "weights every s", "bound"]
    console.print(table_of(columns, rows_of_machines))
    if (full := next((one for one in network if one.bound in NO_MORE), None)) is not None:
        machines = "1 machine" if full.nodes == 1 else f"{full.nodes} machines"
        console.print(f"{machines}: {NO_MORE[full.bound]}.")
    console.print(
        f"Were only the environments elsewhere, a decision would take {payload.observation:,} bytes to the policy and "
        f"{payload.action_chunk:,} back."
    )


def plot(path: Path, points: Sequence[Prediction], verdict: Verdict) -> None:
    """Draw the curve; raises OSError if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    actors = [point.actors for point in points]
    axes.plot(actors, [point.decisions_per_s for point in points], "o-", label="decisions/s")
    axes.plot(actors, [point.updates_per_s for point in points], "--", label="updates/s")
    axes.axvline(verdict.enough.actors, color="grey", linewidth=1)
    text = f" {verdict.enough.actors} actors\n bound: {verdict.bound}"
    axes.annotate(text, (verdict.enough.actors, 0), (2, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="actors", ylabel="per second", ylim=(0, None), title="predicted throughput")
    axes.set_xticks(actors, [str(number) for number in actors], minor=False)
    axes.minorticks_off()
    busy = axes.twinx()
    busy.plot(actors, [100 * point.device_busy for point in points], ":", color="tab:red", label="device busy")
    busy.set(ylabel="device busy, %", ylim=(0, 105))
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
