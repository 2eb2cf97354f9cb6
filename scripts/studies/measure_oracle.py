"""Measures whether a frozen policy can be steered: plays each scene several times, each time with noise of its own.

    python scripts/studies/measure_oracle.py --episodes 50 --attempts 8 --out oracle.jsonl
    python scripts/studies/measure_oracle.py --config libero_spatial_small --suite libero_spatial --init-states 40-49

An oracle that knew the best of the k attempts from a scene would succeed wherever one of them does. That is a lower
bound of what steering can reach: where all attempts fail, more of them may succeed. The scenes are those of
`python -m dsrl_async.evaluate` with the same options; the noise of an attempt is drawn at every decision, by one of
three rules (`--rules`):
  base      independent N(0, 1) in every number of every action slot, as the policy was trained
  gaussian  the agent's vector N(0, 1), laid out over the slots by `sac.noise_layout`, as a warm-up has it
  agent     the agent's vector uniform within its range, `sac.action_magnitude`, laid out in the same way
A line of JSON for each attempt goes to `--out`; the same command goes on where it ended. stderr has the table, and the
last line on stdout is JSON: for each rule, in all and by task, the success rate of the attempts and the share of scenes
with at least one success, each with its 95 % interval (Wilson).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dsrl_async.config.settings import ConfigError
from dsrl_async.envs.protocol import NumberedScenes
from dsrl_async.evaluate.command import build_parser
from dsrl_async.evaluate.resolve import Evaluation, identity, resolve
from dsrl_async.host.command import guard
from dsrl_async.host.device import resolve_device
from dsrl_async.pretraining.libero_demonstrations import spread
from dsrl_async.run.evaluation.episodes import Episode
from dsrl_async.run.evaluation.results import wilson_interval
from dsrl_async.run.worker.worker import EVALUATION, episode_seed
from dsrl_async.sac.layout import NoiseLayout

NOISE = ("base", "gaussian", "agent")


class Attempt(NamedTuple):
    """One episode that is to be played."""

    noise: str
    attempt: int
    scene: Episode


class Outcome(NamedTuple):
    """One episode that was played: a line of `--out`."""

    noise: str
    attempt: int
    number: int
    """The scene's, as evaluations count them."""
    task: int
    init_state: int | None
    success: bool
    steps: int
    cpu_s: float


class Player:
    """Plays attempts, in this process: one environment, and the policy for one observation at a time."""

    def __init__(self, evaluation: Evaluation) -> None:
        run = evaluation.run
        self.config = config = run.config
        torch.set_num_threads(1)
        device = resolve_device(config.device)
        self.environment = run.environment.make(config.sac.cameras)
        if isinstance(self.environment, NumberedScenes):
            self.environment.number_scenes()
        policy = run.policy.load(config.policy, device, run.spec.prompts, lambda: None)
        self.batch = policy.batch(1, int(policy.prompt_lengths.max()))
        self.layout = NoiseLayout(config.sac, run.horizon, device)
        self.images = np.empty(tuple(self.batch.images.shape[1:]), np.uint8)
        self.state = np.empty(tuple(self.batch.state.shape[1:]), np.float32)
        self.sac_image = np.empty(config.sac.image_shape, np.uint8)

    def play(self, attempt: Attempt) -> Outcome:
        begin, environment, scene = time.process_time(), self.environment, attempt.scene
        seed = episode_seed(self.config.seed, EVALUATION, 0, scene.number)
        random = np.random.default_rng([seed, NOISE.index(attempt.noise), attempt.attempt])
        task_index = environment.reset(seed, scene.number)
        steps = 0
        while True:
            environment.observe(self.images, self.sac_image, self.state)
            outcome = environment.step_chunk(self._choose_actions(attempt.noise, task_index, random))
            steps += outcome.steps
            if outcome.terminated or outcome.truncated:
                break
        task = scene.task if scene.init_state is not None else task_index
        cpu_s = round(time.process_time() - begin, 3)
        return Outcome(
            attempt.noise, attempt.attempt, scene.number, task, scene.init_state, outcome.success, steps, cpu_s
        )

    @torch.no_grad()
    def _choose_actions(self, noise: str, task_index: int, random: np.random.Generator) -> np.ndarray:
        batch, layout = self.batch, self.layout
        of_slots = torch.from_numpy(random.standard_normal(tuple(batch.noise.shape), np.float32))
        if noise == "base":
            batch.noise.copy_(of_slots)
        else:
            agent = random.standard_normal((1, layout.width), np.float32)
            if noise == "agent":
                magnitude = self.config.sac.action_magnitude
                agent = random.uniform(-magnitude, magnitude, (1, layout.width)).astype(np.float32)
            device = batch.noise.device
            batch.noise.copy_(layout.expand(torch.from_numpy(agent).to(device), of_slots.to(device)))
        batch.images[0].copy_(torch.from_numpy(self.images))
        batch.state[0].copy_(torch.from_numpy(self.state))
        batch.fill_prompts(np.array([task_index]))
        batch.encode()
        batch.denoise()
        actions: np.ndarray = batch.actions[0, : self.config.env.chunk].cpu().numpy()
        return actions


class Job(NamedTuple):
    """What one process plays: attempts of one task, whose scene it compiles once."""

    options: argparse.Namespace
    attempts: list[Attempt]


def play_job(job: Job, advance: Callable[[], None]) -> None:
    """Play a job, and append the outcomes to `--out`, each as a line of its own."""
    player = Player(resolve(job.options))
    try:
        with job.options.out.open("a") as file:
            for attempt in job.attempts:
                file.write(json.dumps(player.play(attempt)._asdict()) + "\n")
                file.flush()
                advance()
    finally:
        player.environment.close()


def read_outcomes(path: Path, settings: dict[str, Any]) -> list[Outcome]:
    """Return what was played before; begin the file with the settings, which it must have been begun with."""
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n")
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # the last line was not written to its end
        path.write_text(whole)
    first, *lines = whole.splitlines() or [""]
    if first != json.dumps(settings):
        raise ConfigError(f"--out {path}: it was begun with other settings; give the same ones, or another file")
    return [Outcome(**json.loads(line)) for line in lines]


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of the attempts of one rule: how many succeed, and from how many scenes at least one does."""
    scenes: dict[int, bool] = {}
    for outcome in outcomes:
        scenes[outcome.number] = scenes.get(outcome.number, False) or outcome.success
    figures: dict[str, Any] = {}
    for name, flags in (("attempts", [outcome.success for outcome in outcomes]), ("scenes", list(scenes.values()))):
        low, high = wilson_interval(sum(flags), len(flags))
        interval = {"ci95_low": round(low, 4), "ci95_high": round(high, 4)}
        figures[name] = {"number": len(flags), "successes": sum(flags), "rate": round(sum(flags) / len(flags), 4)}
        figures[name] |= interval
    return figures | {"cpu_s": round(sum(outcome.cpu_s for outcome in outcomes), 1)}


def report(outcomes: Sequence[Outcome], rules: Sequence[str]) -> tuple[dict[str, Any], Table]:
    table = Table("noise", "task", "attempts that succeed", "95 % interval", "scenes with a success", "95 % interval")
    result: dict[str, Any] = {}
    for rule in rules:
        played = [outcome for outcome in outcomes if outcome.noise == rule]
        tasks = sorted({outcome.task for outcome in played})
        result[rule] = summarise(played) | {
            "tasks": {task: summarise([outcome for outcome in played if outcome.task == task]) for task in tasks}
        }
        for task, figures in [*result[rule]["tasks"].items(), ("all", result[rule])]:
            cells = []
            for part in (figures["attempts"], figures["scenes"]):
                cells.append(f"{part['successes']}/{part['number']}, {part['rate']:.0%}")
                cells.append(f"{part['ci95_low']:.0%} to {part['ci95_high']:.0%}")
            table.add_row(rule, str(task), *cells)
        table.add_section()
    return result, table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    parser.prog, parser.usage, parser.description, parser.epilog = Path(__file__).name, None, __doc__, None
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--attempts", type=int, default=8, metavar="K", help="attempts from each scene (default 8)")
    parser.add_argument(
        "--rules",
        type=lambda text: text.split(","),
        default=["base", "agent"],
        metavar="LIST",
        help=f"of how noise is drawn: {', '.join(NOISE)} (default base,agent)",
    )
    options = parser.parse_args(list(argv))
    options.base, options.noise = True, None  # no agent chooses
    options.out = Path(options.out or "oracle.jsonl")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if unknown := set(options.rules) - set(NOISE):
        raise ConfigError(f"--rules: there is no {sorted(unknown)[0]!r}; choose from {', '.join(NOISE)}")
    for name in ("compare", "best", "video", "ray"):
        if getattr(options, name):
            raise ConfigError(f"--{name} means nothing here: no agent plays, nothing is filmed, one machine computes")
    if options.attempts < 1:
        raise ConfigError("--attempts must be at least 1")
    evaluation = resolve(options)
    processes = evaluation.config.actors
    sac = evaluation.config.sac.model_dump()
    noise = {key: value for key, value in sac.items() if key.startswith("noise_") or key == "action_magnitude"}
    settings = {**identity(evaluation), "sac": noise}
    played = read_outcomes(options.out, settings)
    done = {(outcome.noise, outcome.attempt, outcome.number) for outcome in played}
    waiting = [
        Attempt(rule, attempt, scene)
        for attempt in range(options.attempts)
        for scene in evaluation.episodes
        for rule in options.rules
        if (rule, attempt, scene.number) not in done
    ]
    tasks = sorted({attempt.scene.task for attempt in waiting})
    of_task = [[attempt for attempt in waiting if attempt.scene.task == task] for task in tasks]
    share = max(1, -(-processes // max(1, len(tasks))))  # processes for each task
    jobs = [Job(options, part[place::share]) for part in of_task for place in range(share) if part[place::share]]
    if jobs:
        spread(play_job, jobs, min(processes, len(jobs)), len(waiting), "Playing")
    result, table = report(read_outcomes(options.out, settings), options.rules)
    Console(stderr=True, width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(guard(main))
