"""Sampling an action chunk: this project's sampler against openpi's PyTorch model.

Both sample from the same seeded weights and inputs (two cameras; openpi gets the third one masked, and all language
slots), each in a process of its own and openpi's in its own environment. The repeats are interleaved. The figures of a
case are the medians of
  vision, prefill, denoise, total   milliseconds: from camera images to tokens; everything else up to the keys and
                                    values that the actions attend to; the Euler steps
  kernels                           ATen operations of a sample that are not views, in all and per stage: what a GPU
                                    would be asked to launch; in bfloat16 a CPU is asked for others, with more in
                                    each (`pi0.packed`)
  host_syncs                        operations of a sample that no CUDA graph can hold: the host waits for its
                                    device, or a tensor is made from Python data
  peak_memory                       MB, largest resident size of the process while it samples, weights included
  gemm_share, attention_share       shares of a sample's time in matrix products and in fused attention (torch's
                                    profiler, one sample)
the ratio of the two systems (below 1: this project's is smaller), and the largest difference of their actions.

Not measured: loading, image resizing and tokenising, copies to and from a device, anything on a GPU, and torch.compile:
both programs run eagerly, though openpi's compiles itself by default.

If memory does not hold both policies, one process at a time exists, and each repeat starts a new one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import psutil

from dsrl_async.bench import synthetic
from dsrl_async.bench.conversation import SystemProcess
from dsrl_async.bench.figures import Figure, JsonLines, add_output_arguments, require_positive
from dsrl_async.bench.references import reference_command
from dsrl_async.bench.systems.serving import STAGES
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.tensors import parameter_count

OWN, REFERENCE = "dsrl_async", "openpi"
SEED = 0
CLOCKS = {"wall": "time", "cpu": "cpu_time"}
"""Choice of `--clock` -> what a process is asked for."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
PROCESS_BYTES = 2**30
"""Rough memory that a process needs beside its weights at batch 1: libraries, activations, a tensor being made."""


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
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each process (default: as many as cores)"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: CPU time of all threads, which other programs disturb less (default: wall)",
    )
    add_output_arguments(parser, repeats=5)


def start(system: str, config: synthetic.Sizes, dtype: str, threads: int) -> SystemProcess:
    """The process of a system (`serving.serve`), loaded and ready.

    Raises ValueError when the environment of the reference does not exist or the process ends.
    """
    if system == OWN:
        command = [sys.executable, "-m", "dsrl_async.bench.systems.policy"]
    else:
        command = reference_command(REFERENCE, "openpi_worker.py", f"--system {OWN}")
    settings = {"config": config, "dtype": dtype, "seed": SEED, "threads": threads}
    process = SystemProcess(system, command, settings)
    process.answer()
    return process


def fit_together(systems: list[str], config: synthetic.Sizes, dtype: str, available: int) -> bool:
    """Whether the policies of all systems fit into `available` bytes at once."""
    weights = parameter_count(Pi0Config(**config)) * ELEMENT_BYTES[dtype]
    return len(systems) * (weights + PROCESS_BYTES) <= available


def measure(
    systems: list[str], config: synthetic.Sizes, dtype: str, batch: int, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """System -> `times` (milliseconds per stage, per repeat) and the answers of `serving.MEASUREMENTS`."""
    lengths, clock = [arguments.prompt_tokens] * batch, CLOCKS[arguments.clock]

    def warmed_up(system: str, stack: ExitStack) -> SystemProcess:
        process = stack.enter_context(start(system, config, dtype, arguments.threads))
        process.ask(do="prepare", prompt_lengths=lengths, steps=arguments.steps)
        process.ask(do=clock)  # the first sample also warms up caches and thread pools
        return process

    results: dict[str, dict[str, Any]] = {system: {"times": []} for system in systems}

    def inspect(process: SystemProcess) -> None:
        results[process.system].update(process.ask(do="count") | process.ask(do="profile") | process.ask(do="actions"))

    def time(process: SystemProcess) -> None:
        results[process.system]["times"].append(process.ask(do=clock))

    if fit_together(systems, config, dtype, psutil.virtual_memory().available):
        with ExitStack() as stack:
            processes = [warmed_up(system, stack) for system in systems]
            for process in processes:
                inspect(process)
            for _ in range(arguments.repeats):
                for process in processes:
                    time(process)
        return results
    print("memory holds one policy at a time: processes alternate, each loaded anew", file=sys.stderr)
    for repeat in range(arguments.repeats):
        for system in systems:
            with ExitStack() as stack:
                process = warmed_up(system, stack)
                if repeat == 0:
                    inspect(process)
                time(process)
    return results


def summarise(results: dict[str, dict[str, Any]]) -> Iterator[Figure]:
    """Medians, then ratios and the largest difference if there are two systems."""
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
            yield Figure(system, metric, value, unit)
    if figures.keys() == {OWN, REFERENCE}:
        for metric, (value, unit) in figures[OWN].items():
            reference = figures[REFERENCE][metric][0]
            if reference and unit != "share of time":
                yield Figure(f"{OWN}/{REFERENCE}", metric, value / reference, "ratio")
        difference = np.subtract(results[OWN]["actions"], results[REFERENCE]["actions"])
        largest = float(np.abs(difference).max())
        yield Figure(f"{OWN}-{REFERENCE}", "largest_difference", largest, "normalised action")


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "repeats", "batch", "steps", "threads")
    lines = JsonLines("denoise", arguments)
    for size in arguments.size:
        for model in arguments.model:
            config = synthetic.sizes(model, size)
            if not 1 <= arguments.prompt_tokens <= config["max_token_len"]:
                raise ValueError(f"--prompt-tokens must be from 1 to {config['max_token_len']} for {model}")
            for dtype in arguments.dtype:
                for batch in arguments.batch:
                    details = f"batch {batch} steps {arguments.steps} threads {arguments.threads}"
                    details += " CPU time" if arguments.clock == "cpu" else ""
                    lines.case(f"{model} {size} {dtype} {details}")
                    lines.add(summarise(measure(arguments.system, config, dtype, batch, arguments)))
