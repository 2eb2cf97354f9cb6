"""Stepping LIBERO: this project's environment against LIBERO's own wrapper.

Both play the same episodes with the same actions and prepare the same observations (two cameras rendered at 256 pixels,
turned, resized to 224), once per decision of --chunk steps; each in a process of its own, the repeats interleaved. Per
system, the medians of
  start               CPU-seconds of a process until its first observation, imports included
  start_wall          the same in seconds
  reset               CPU-seconds from one episode's end to the next one's first observation, without settling steps
  step                CPU-milliseconds per environment step, observations included
  steps_per_second    environment steps per CPU-second
  memory              MB of memory at the end: private, and a share of what is shared (PSS)
and the ratio of each system to LIBERO (below 1: it is smaller), and how far pixels and robot states are from LIBERO's:
the largest difference of any of them. `dsrl_async fast` is render_quality: fast, whose pixels may differ. CPU-seconds
are of all threads of a process, those of a software renderer included. `repeats` of a figure is how many samples it is
the median of: --starts of the starts, --repeats of the others.

With --together N, also
  start_together      seconds until N processes, started at once, all have their first observation
  memory_together     MB of memory of all these processes then (sum of their PSS)
LIBERO's are N programs. This project's are the environment workers of a run, which are forked from one process that has
imported and compiled what all of them need (run/worker/template.py); that process counts.

Not measured: the policy, learning, and what carries observations; settling steps; changes between tasks; the time of a
GPU, where one draws (none has yet).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.bench.report import Report
from dsrl_async.bench.systems.stock_libero import StockEnvironment
from dsrl_async.envs.libero_files import SUITES

STOCK, OWN, FAST = "libero", "dsrl_async", "dsrl_async fast"
IMAGE_SIZE = 224
SEED = 0
START_S = 3600.0  # until a worker that starts with many others has to be ready
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
Figure = tuple[str, str, float, str, int]
"""(system, metric, value, unit, samples that it is made of)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=SUITES, default="libero_spatial")
    parser.add_argument("--task", type=int, default=0, help="the task's number in the suite (default: 0)")
    parser.add_argument("--system", nargs="+", choices=[STOCK, OWN, FAST], default=[STOCK, OWN, FAST])
    parser.add_argument("--chunk", type=int, default=5, help="environment steps per decision (default: 5)")
    parser.add_argument("--decisions", type=int, default=8, help="of each repeat's episode (default: 8)")
    parser.add_argument("--repeats", type=int, default=5, help="episodes of each system (default: 5)")
    parser.add_argument("--starts", type=int, default=1, help="of each system, alone and together (default: 1)")
    parser.add_argument("--together", type=int, default=0, help="also start so many processes at once (default: none)")
    parser.add_argument("--out", type=Path, help="a file to which the JSON lines are written as well")


def own_settings(suite: str, task: int, render_quality: str) -> dict[str, Any]:
    """`env` of a configuration that plays what `StockEnvironment` does."""
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
        self._environment._preset_seed = seed
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


def _serve(settings: dict[str, Any]) -> None:
    """The measured process: answers one JSON line when it has its first observation, and one per episode."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LIBERO and robosuite print

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

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


class _Process:
    """A system in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, system: str, directory: Path) -> None:
        self.system, self.seen = system, directory / f"{system}.npz"
        settings = {
            "system": system,
            "suite": arguments.suite,
            "task": arguments.task,
            "chunk": arguments.chunk,
            "decisions": arguments.decisions,
            "seen": str(self.seen),
        }
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dsrl_async.bench.env", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if system == STOCK else None,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def started(self) -> dict[str, float]:
        """Waits for the first observation."""
        return {**self._answer(), "start_wall": time.monotonic() - self._begin}

    def play(self, episode: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"episode": episode}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self.system} ended with status {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        self._process.communicate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(arguments: argparse.Namespace, directory: Path) -> Iterator[Figure]:
    """Figures of the systems; files of what was seen go to `directory`."""
    samples: Samples = {system: {} for system in arguments.system}
    distance = {system: {"images": 0.0, "states": 0.0} for system in arguments.system if system != STOCK}

    def note(system: str, figures: dict[str, float]) -> None:
        for metric, value in figures.items():
            samples[system].setdefault(metric, []).append(value)

    processes: list[_Process] = []
    try:
        for _ in range(arguments.starts):
            while processes:
                processes.pop().end()
            for system in arguments.system:  # one after the other, so that each starts alone
                processes.append(_Process(arguments, system, directory))
                note(system, processes[-1].started())
        for episode in range(arguments.repeats):
            for process in processes:
                note(process.system, process.play(episode))
            if STOCK in arguments.system:
                seen = {process.system: np.load(process.seen) for process in processes}
                for system, greatest in distance.items():
                    for name in greatest:
                        difference = np.abs(seen[system][name].astype(float) - seen[STOCK][name].astype(float)).max()
                        greatest[name] = max(greatest[name], float(difference))
        while processes:
            processes.pop().end()
    finally:
        for process in processes:
            process.kill()
    for _ in range(arguments.starts if arguments.together else 0):
        for system in arguments.system:
            note(system, start_together(arguments, system, directory))
    yield from summarise(samples, distance)


def start_together(arguments: argparse.Namespace, system: str, directory: Path) -> dict[str, float]:
    """`start_together` and `memory_together` of a system, each in the way that it is run in."""
    begin = time.monotonic()
    with ExitStack() as started:
        if system == STOCK:
            programs: list[_Process] = []
            for _ in range(arguments.together):
                programs.append(_Process(arguments, system, directory))
                started.callback(programs[-1].kill)
            for program in programs:
                program.started()
            pids = [program.pid for program in programs]
        else:
            settings = own_settings(arguments.suite, arguments.task, QUALITIES[system])
            pids = started.enter_context(forked_workers(settings, arguments.together))
        seconds = time.monotonic() - begin
        return {"start_together": seconds, "memory_together": sum(map(memory_mb, pids))}


@contextmanager
def forked_workers(env: dict[str, Any], count: int) -> Iterator[list[int]]:
    """Start environment workers with the settings `env` as a run does, but all at once; end them in the end.

    Yields the process numbers of their template and of all of them, when each has its first observation. Raises
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
    """Medians, and against LIBERO, where it is among the systems, ratios and the largest differences (`distance`)."""
    figures: dict[str, dict[str, tuple[float, int]]] = {}
    for system, metrics in samples.items():
        figures[system] = {metric: (statistics.median(values), len(values)) for metric, values in metrics.items()}
        step, episodes = figures[system]["step"]
        figures[system]["steps_per_second"] = 1000 / step, episodes
        for metric, (value, repeats) in figures[system].items():
            yield system, metric, value, UNITS[metric], repeats
    if STOCK not in samples:
        return
    for system, greatest in distance.items():
        for metric, (value, repeats) in figures[system].items():
            yield f"{system}/{STOCK}", metric, value / figures[STOCK][metric][0], "ratio", repeats
        episodes = len(samples[system]["step"])
        yield f"{system}-{STOCK}", "pixels", greatest["images"], "of 255", episodes
        yield f"{system}-{STOCK}", "robot_state", greatest["states"], "m or rad", episodes


def run(arguments: argparse.Namespace) -> None:
    """Measures what the options ask for; see `Report` for what is written."""
    import tempfile

    from dsrl_async.envs import libero_files

    if min(arguments.chunk, arguments.decisions, arguments.repeats, arguments.starts) < 1 or arguments.together < 0:
        raise ValueError("--chunk, --decisions, --repeats and --starts must be positive, --together not negative")
    libero_files.selected_tasks(arguments.suite, [arguments.task])
    report = Report("env", arguments.repeats, arguments.out)
    case = f"{arguments.suite} task {arguments.task} chunk {arguments.chunk}"
    if arguments.together:
        case += f" together {arguments.together}"
    report.case(case)
    with tempfile.TemporaryDirectory() as directory:
        for figure in measure(arguments, Path(directory)):
            report.add(*figure)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
