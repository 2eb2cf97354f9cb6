"""Sampling an action chunk: this project's sampler against openpi's PyTorch model.

Both sample from the same seeded weights and inputs (two cameras; openpi gets the third one masked, and all language
slots), each in a process of its own and openpi's in its own environment. The repeats are interleaved. Per case, the
medians of
  vision, prefill, denoise, total   milliseconds: camera images to tokens; all else up to the keys and values that the
                                    actions attend to; the Euler steps
  kernels                           ATen operations of a sample that are not views, in all and per stage: what a GPU
                                    would be asked to launch
  host_syncs                        operations of a sample that no CUDA graph can hold: the host waits for its
                                    device, or a tensor is made from Python data
  peak_memory                       MB, largest resident size of the process while it samples, weights included
  gemm_share, attention_share       shares of a sample's time in matrix products and in fused attention (torch's
                                    profiler, one sample)
and the ratio of the two systems (below 1: this project's is smaller), and the largest difference of their actions.

Not measured: loading, image resizing and tokenising, copies to and from a device, anything on a GPU, and torch.compile:
both programs run eagerly, though openpi's compiles itself by default.

Where memory does not hold both policies, one process at a time is kept, and started anew for each repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from dsrl_async.bench import synthetic
from dsrl_async.bench.report import Report
from dsrl_async.bench.systems.serving import STAGES
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.tensors import parameter_count

ROOT = Path(__file__).resolve().parent.parent.parent
OWN, REFERENCE = "dsrl_async", "openpi"
ENVIRONMENT = ROOT / ".reference" / "openpi"
SEED = 0
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
PROCESS_BYTES = 2**30
"""What a process needs beside its weights at batch 1, roughly: libraries, activations, a tensor being made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", nargs="+", choices=[OWN, REFERENCE], default=[OWN, REFERENCE])
    parser.add_argument("--model", nargs="+", choices=list(synthetic.MODELS), default=["pi0"])
    parser.add_argument(
        "--size",
        nargs="+",
        choices=list(synthetic.SIZES),
        default=["toy"],
        help="toy: full depth, small widths (default); full: as published, 3.2 G parameters; two_layers: full widths",
    )
    parser.add_argument("--dtype", nargs="+", choices=list(ELEMENT_BYTES), default=list(ELEMENT_BYTES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8], help="observations at once (default: 1 4 8)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default: 10)")
    parser.add_argument("--prompt-tokens", type=int, default=17, help="length of every prompt (default: 17)")
    parser.add_argument("--repeats", type=int, default=5, help="timed samples of each system per case (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process (default: all cores)")
    parser.add_argument("--out", type=Path, help="a file to which the JSON lines are written as well")


class Worker:
    """A system in a process of its own (`serving.serve`), loaded and ready when the constructor returns."""

    def __init__(self, system: str, config: synthetic.Sizes, dtype: str, threads: int) -> None:
        """Raises ValueError when the environment of the reference is not there, or the process ends."""
        settings = {"config": config, "dtype": dtype, "seed": SEED, "threads": threads}
        if system == OWN:
            command = [sys.executable, "-m", "dsrl_async.bench.systems.policy"]
        else:
            command = [str(ENVIRONMENT / "bin" / "python"), str(ROOT / "scripts" / "references" / "openpi_worker.py")]
            if not (ENVIRONMENT / "complete").exists():
                raise ValueError(
                    f"openpi's environment {ENVIRONMENT} is not there; make it with "
                    f"'bash {ROOT}/scripts/references/setup.sh openpi', or measure this project alone with "
                    f"'--system {OWN}'"
                )
        self.system = system
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ValueError(f"the process of {self.system} ended with status {code}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
        self._process.stdin.flush()
        return self._answer()


def fit_together(systems: list[str], config: synthetic.Sizes, dtype: str, available: int) -> bool:
    """Whether `available` bytes hold the policies of all systems at once."""
    weights = parameter_count(Pi0Config(**config)) * ELEMENT_BYTES[dtype]
    return len(systems) * (weights + PROCESS_BYTES) <= available


def measure(
    systems: list[str], config: synthetic.Sizes, dtype: str, batch: int, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """For each system: `times` (milliseconds per stage, per repeat), and the answers of `serving.MEASUREMENTS`."""
    lengths = [arguments.prompt_tokens] * batch

    def start(system: str, stack: ExitStack) -> Worker:
        worker = stack.enter_context(Worker(system, config, dtype, arguments.threads))
        worker.ask("prepare", prompt_lengths=lengths, steps=arguments.steps)
        worker.ask("time")  # the first sample also warms up caches and thread pools
        return worker

    results: dict[str, dict[str, Any]] = {system: {"times": []} for system in systems}

    def inspect(worker: Worker) -> None:
        results[worker.system].update(worker.ask("count") | worker.ask("profile") | worker.ask("actions"))

    def time(worker: Worker) -> None:
        results[worker.system]["times"].append(worker.ask("time"))

    if fit_together(systems, config, dtype, psutil.virtual_memory().available):
        with ExitStack() as stack:
            workers = [start(system, stack) for system in systems]
            for worker in workers:
                inspect(worker)
            for _ in range(arguments.repeats):
                for worker in workers:
                    time(worker)
        return results
    print("memory holds one policy at a time: processes alternate, each loaded anew", file=sys.stderr)
    for repeat in range(arguments.repeats):
        for system in systems:
            with ExitStack() as stack:
                worker = start(system, stack)
                if repeat == 0:
                    inspect(worker)
                time(worker)
    return results


def summarise(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, float, str]]:
    """(system, metric, value, unit); ratios and the difference come last, where there are two systems."""
    figures: dict[str, dict[str, tuple[float, str]]] = {}
    for system, result in results.items():
        mine = figures[system] = {}
        for stage in STAGES:
            mine[stage] = statistics.median(times[stage] for times in result["times"]), "ms"
        mine["total"] = statistics.median(sum(times.values()) for times in result["times"]), "ms"
        for stage in STAGES:
            mine[f"kernels_{stage}"] = result["kernels"][stage], "operations"
        mine["kernels"] = sum(result["kernels"].values()), "operations"
        mine["host_syncs"] = result["host_syncs"], "operations"
        mine["peak_memory"] = result["peak_memory"] / 1e6, "MB"
        for metric in ("gemm_share", "attention_share"):
            mine[metric] = result[metric], "share of time"
        for metric, (value, unit) in mine.items():
            yield system, metric, value, unit
    if figures.keys() == {OWN, REFERENCE}:
        for metric, (value, unit) in figures[OWN].items():
            reference = figures[REFERENCE][metric][0]
            if reference and unit != "share of time":
                yield f"{OWN}/{REFERENCE}", metric, value / reference, "ratio"
        difference = np.subtract(results[OWN]["actions"], results[REFERENCE]["actions"])
        yield f"{OWN}-{REFERENCE}", "largest_difference", float(np.abs(difference).max()), "normalised action"


def run(arguments: argparse.Namespace) -> None:
    """Measures every case that the options ask for; see `Report` for what is written."""
    if arguments.repeats < 1 or min(arguments.batch) < 1 or arguments.steps < 1 or arguments.threads < 1:
        raise ValueError("--repeats, --batch, --steps and --threads must be positive")
    report = Report("denoise", arguments.repeats, arguments.out)
    for size in arguments.size:
        for model in arguments.model:
            config = synthetic.sizes(model, size)
            if not 1 <= arguments.prompt_tokens <= config["max_token_len"]:
                raise ValueError(f"--prompt-tokens must be from 1 to {config['max_token_len']} for {model}")
            for dtype in arguments.dtype:
                for batch in arguments.batch:
                    details = f"batch {batch} steps {arguments.steps} threads {arguments.threads}"
                    report.case(f"{model} {size} {dtype} {details}")
                    for figure in summarise(measure(arguments.system, config, dtype, batch, arguments)):
                        report.add(*figure)
