"""Stepping LIBERO: this project's environment against LIBERO's own wrapper.

Both play the same episodes with the same actions and prepare the same observations (two cameras rendered at 256 pixels,
turned, resized to 224), once per decision of --chunk steps; each in a process of its own, the repeats interleaved. The
figures of a system are the medians of
  start               CPU-seconds of a process until its first observation, imports included
  start_wall          the same in seconds
  reset               CPU-seconds from one episode's end to the first observation of the next, without settling steps
  step                CPU-milliseconds per environment step, observations included
  steps_per_second    environment steps per CPU-second
  memory              MB of memory at the end: private memory and a share of what is shared (PSS)
their ratios to LIBERO (below 1: smaller), and the largest differences of pixels and of robot states from LIBERO's.
`dsrl_async fast` is render_quality: fast, whose pixels may differ. CPU-seconds are those of all threads of a process,
including a software renderer's. The `repeats` of a figure are --starts for starts and --repeats for everything else.

With --together N there are also
  start_together      seconds until N processes, started at once, all have their first observation
  memory_together     MB of memory of all these processes then (sum of their PSS)
LIBERO's are N programs. This project's are the environment workers of a run, forked from a template that has imported
and compiled what they all need (run/worker/template.py); the template counts.

Not measured: the policy, learning, and the transport of observations; settling steps; changes between tasks; the time
of a GPU that renders (none has yet).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.bench.conversation import SystemProcess, answer_on_stdout
from dsrl_async.bench.figures import Figure, JsonLines, Metrics, add_output_arguments, require_positive
from dsrl_async.bench.systems.stock_libero import StockEnvironment
from dsrl_async.envs import libero_files

STOCK, OWN, FAST = "libero", "dsrl_async", "dsrl_async fast"
IMAGE_SIZE = 224
SEED = 0
START_S = 3600.0  # limit on the start of a worker, which is slow beside many others
QUALITIES = {OWN: "exact", FAST: "fast"}
UNITS = {
    "start": "CPU-s",
    "start_wall": "s",
    "reset": "CPU-s",
    "step": "CPU-ms",
    "steps_per_second": "steps per CPU-s",
    "memory": "MB",
    "start_together": "s",
    "memory_together": "MB",
}

Samples = dict[str, dict[str, list[float]]]
"""System -> metric -> values in its unit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", default="libero_spatial", metavar="NAME", help="a suite of LIBERO")
    parser.add_argument("--task", type=int, default=0, help="number of the task in the suite (default: 0)")
    parser.add_argument("--system", nargs="+", choices=[STOCK, OWN, FAST], default=[STOCK, OWN, FAST])
    parser.add_argument("--chunk", type=int, default=5, help="environment steps per decision (default: 5)")
    parser.add_argument("--decisions", type=int, default=8, help="decisions per episode (default: 8)")
    parser.add_argument("--starts", type=int, default=1, help="starts of each system, alone and together (default: 1)")
    parser.add_argument("--together", type=int, default=0, metavar="N", help="also start N processes at once")
    add_output_arguments(parser, repeats=5)


def own_settings(suite: str, task: int, render_quality: str) -> dict[str, Any]:
    """The `env` settings that play what `StockEnvironment` does."""
    return {
        "name": suite,
        "task_ids": [task],
        "seeding": "fixed",
        "scene_order": "cycled",
        "settling_steps": 0,
        "max_episode_steps": 10**6,
        "render_quality": render_quality,
    }


class _OwnEnvironment:
    """This project's environment, driven as `StockEnvironment` is."""

    def __init__(self, suite: str, task: int, render_quality: str) -> None:
        from dsrl_async.config.load import validate
        from dsrl_async.envs import make_environment

        settings = own_settings(suite, task, render_quality)
        self._environment: Any = make_environment(validate({"env": settings}).env.model_dump())

    def reset(self, seed: int, init_state: int) -> None:
        self._environment.fixtures_seed = seed
        self._environment.reset(0, init_state)

    def step(self, action: NDArray[np.float32]) -> None:
        self._environment.step_chunk(action[None])

    def observe(self, size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        images, state = np.empty((2, size, size, 3), np.uint8), np.empty(8, np.float32)
        self._environment.observe(images, np.empty((64, 64, 3), np.uint8), state)
        return images, state

    def close(self) -> None:
        self._environment.close()


def memory_mb(pid: int) -> float:
    """Proportional set size of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("Pss:")[1].split()[0]) * 1024 / 1e6


def serve(settings: dict[str, Any]) -> None:
    """The measured process: it answers when it has its first observation, and after each episode."""
    answer = answer_on_stdout()  # LIBERO and robosuite print
    system, suite, task = settings["system"], settings["suite"], settings["task"]
    environment: Any = (
        StockEnvironment(suite, task) if system == STOCK else _OwnEnvironment(suite, task, QUALITIES[system])
    )
    environment.reset(SEED, 0)
    environment.observe(IMAGE_SIZE)
    answer(start=time.process_time())
    for line in sys.stdin:
        episode = json.loads(line)["episode"]
        chunks = np.random.default_rng(episode).uniform(-1, 1, (settings["decisions"], settings["chunk"], 7))
        begin = time.process_time()
        environment.reset(SEED + episode, episode)
        seen = [environment.observe(IMAGE_SIZE)]
        reset = time.process_time() - begin
        for chunk in chunks.astype(np.float32):
            for action in chunk:
                environment.step(action)
            seen.append(environment.observe(IMAGE_SIZE))
        steps = (time.process_time() - begin - reset) / chunks[..., 0].size
        images, states = (np.stack(arrays) for arrays in zip(*seen, strict=True))
        np.savez(settings["seen"], images=images, states=states)
        answer(reset=reset, step=1000 * steps, memory=memory_mb(os.getpid()))
    environment.close()


def start(arguments: argparse.Namespace, system: str, directory: Path) -> SystemProcess:
    """A process that runs `serve`; files of what it has seen go to `directory`."""
    settings = {name: getattr(arguments, name) for name in ("suite", "task", "chunk", "decisions")}
    settings |= {"system": system, "seen": str(seen_file(directory, system))}
    command = [sys.executable, "-m", "dsrl_async.bench.env"]
    return SystemProcess(system, command, settings, quiet=system == STOCK)


def seen_file(directory: Path, system: str) -> Path:
    return directory / f"{system}.npz"


def measure(arguments: argparse.Namespace, directory: Path) -> Iterator[Figure]:
    """Figures of the systems; temporary files go to `directory`."""
    samples: Samples = {system: {} for system in arguments.system}
    distance = {system: {"images": 0.0, "states": 0.0} for system in arguments.system if system != STOCK}

    def note(system: str, values: Metrics) -> None:
        for metric, value in values.items():
            samples[system].setdefault(metric, []).append(value)

    for number in range(arguments.starts):
        with ExitStack() as running:
            processes = []
            for system in arguments.system:  # one after the other, so that each starts alone
                begin = time.monotonic()
                processes.append(running.enter_context(start(arguments, system, directory)))
                note(system, {**processes[-1].answer(), "start_wall": time.monotonic() - begin})
            for episode in range(arguments.repeats if number == arguments.starts - 1 else 0):
                for process in processes:
                    note(process.system, process.ask(episode=episode))
                if STOCK in arguments.system:
                    seen = {system: np.load(seen_file(directory, system)) for system in arguments.system}
                    for system, largest in distance.items():
                        for name in largest:
                            difference = seen[system][name].astype(float) - seen[STOCK][name].astype(float)
                            largest[name] = max(largest[name], float(np.abs(difference).max()))
    for _ in range(arguments.starts if arguments.together else 0):
        for system in arguments.system:
            note(system, start_together(arguments, system, directory))
    yield from summarise(samples, distance)


def start_together(arguments: argparse.Namespace, system: str, directory: Path) -> Metrics:
    """`start_together` and `memory_together` of a system, started in its own way."""
    begin = time.monotonic()
    with ExitStack() as running:
        if system == STOCK:
            processes = [running.enter_context(start(arguments, system, directory)) for _ in range(arguments.together)]
            for process in processes:
                process.answer()
            pids = [process.pid for process in processes]
        else:
            settings = own_settings(arguments.suite, arguments.task, QUALITIES[system])
            pids = running.enter_context(forked_workers(settings, arguments.together))
        seconds = time.monotonic() - begin
        return {"start_together": seconds, "memory_together": sum(map(memory_mb, pids))}


@contextmanager
def forked_workers(env: dict[str, Any], count: int) -> Iterator[list[int]]:
    """Start environment workers with the settings `env` as a run does, but all at once, and end them afterwards.

    Yields the process numbers of the template and the workers when each worker has its first observation. Raises
    ValueError if one of them ends before.
    """
    from dsrl_async.config.load import validate
    from dsrl_async.envs import environment_spec
    from dsrl_async.run.preflight.host import check_descriptors
    from dsrl_async.run.worker.pool import WorkerPool
    from dsrl_async.shm.memory import run_fields

    config = validate({"actors": count, "env": env, "heartbeat_timeout_s": START_S})
    check_descriptors(config, "--together")
    try:
        with WorkerPool(
            config, run_fields(config, environment_spec(config.env.model_dump()), config.env.chunk)
        ) as pool:
            pool.await_template()
            pool.fork_workers()
            pool.await_observations()
            yield pool.pids
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def summarise(samples: Samples, distance: dict[str, dict[str, float]]) -> Iterator[Figure]:
    """Medians and, if LIBERO is among the systems, ratios to it and the largest differences (`distance`) from it."""
    figures: dict[str, dict[str, tuple[float, int]]] = {}
    for system, metrics in samples.items():
        figures[system] = {metric: (statistics.median(values), len(values)) for metric, values in metrics.items()}
        step, episodes = figures[system]["step"]
        figures[system]["steps_per_second"] = 1000 / step, episodes
        for metric, (value, repeats) in figures[system].items():
            yield Figure(system, metric, value, UNITS[metric], repeats)
    if STOCK not in samples:
        return
    for system, largest in distance.items():
        for metric, (value, repeats) in figures[system].items():
            yield Figure(f"{system}/{STOCK}", metric, value / figures[STOCK][metric][0], "ratio", repeats)
        episodes = len(samples[system]["step"])
        yield Figure(f"{system}-{STOCK}", "pixels", largest["images"], "of 255", episodes)
        yield Figure(f"{system}-{STOCK}", "robot_state", largest["states"], "m or rad", episodes)


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "chunk", "decisions", "repeats", "starts")
    if arguments.together < 0:
        raise ValueError("--together must be positive or 0")
    libero_files.selected_tasks(arguments.suite, [arguments.task])
    lines = JsonLines("env", arguments)
    together = f" together {arguments.together}" if arguments.together else ""
    lines.case(f"{arguments.suite} task {arguments.task} chunk {arguments.chunk}{together}")
    with tempfile.TemporaryDirectory() as directory:
        lines.add(measure(arguments, Path(directory)))


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
