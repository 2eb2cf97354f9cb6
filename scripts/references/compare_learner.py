"""Times this project's gradient update beside that of official DSRL, which JAX compiles, on the CPU.

    git clone https://github.com/nakamotoo/dsrl_pi0
    bash scripts/references/setup.sh jaxrl2
    DSRL_PI0=dsrl_pi0 .venv/bin/python scripts/references/compare_learner.py

Both start from the same weights, learn from the same batch, draw their own random numbers in each update, and are bound
to the same cores; each is a process of its own, which sleeps while another is timed. Ours is timed as it is and with
`learner.compile`. Two sizes of networks:
  embedded   the embedded task's, but with official DSRL's kernels (3x3) and without an encoder of the state, which it
             lacks: 183k and 606k parameters. It gets the images of 32x32 pixels, which ours makes itself.
  official   official DSRL's for LIBERO: images of 64x64 pixels, four convolutions
First the critic's losses of three updates are compared, with an actor whose noise is next to nothing; then the timed
processes start. Prints a Markdown table: the medians of all updates of the rounds, in milliseconds by the clock and of
CPU time, and ratios (above 1: ours is faster), the lowest and the highest of a round behind them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsrl_async.bench.conversation import SystemProcess
from dsrl_async.bench.references import reference_command
from dsrl_async.config.settings import SacConfig
from dsrl_async.host.processes import WAIT_POLICY
from dsrl_async.sac.agent import SacAgent

OWN, COMPILED, OFFICIAL = "dsrl_async", "compiled", "jaxrl2"
HORIZON, SEED = 10, 0
STATELESS: dict[str, Any] = {"state_latent_dim": 0, "alpha_type": "exp"}
SIZES: dict[str, dict[str, Any]] = {
    "embedded": STATELESS | {"conv_kernels": [3]},
    "official": STATELESS
    | {
        "image_pool": 1,
        "conv_channels": [32] * 4,
        "conv_kernels": [3] * 4,
        "conv_strides": [2, 1, 1, 1],
        "image_latent_dim": 50,
        "action_magnitude": 1.0,
    },
}
BATCH = {"embedded": 128, "official": 256}
NO_CLIPPING = {"actor_grad_clip": None, "critic_grad_clip": None, "alpha_grad_clip": None}
COMPARED_UPDATES, TOLERANCE = 3, 1e-3


def write_start(path: Path, sac: SacConfig, quiet: bool) -> None:
    """Weights and a batch; with `quiet` the actor's noise has the least standard deviation."""
    agent = SacAgent(sac, HORIZON, seed=SEED)
    rng, size = np.random.default_rng(SEED), sac.batch_size
    small = rng.integers(0, 256, (2 * size, 64 // sac.image_pool, 64 // sac.image_pool, 3), dtype=np.uint8)
    arrays = {
        f"{name}/{parameter}": value.detach().numpy()
        for name, network in (("actor", agent.actor), ("critic", agent.critic))
        for parameter, value in network.named_parameters()
    }
    if quiet:
        arrays["actor/output.bias"][agent.action_dim :] = 2 * sac.log_std_min
    np.savez(
        path,
        images=small.repeat(sac.image_pool, 1).repeat(sac.image_pool, 2),  # pooling gives `small` back exactly
        states=rng.standard_normal((2 * size, sac.state_dim), dtype=np.float32),
        noise=rng.standard_normal((size, agent.action_dim), dtype=np.float32),
        reward=np.full(size, -1.0, np.float32),
        discount=np.full(size, 0.9, np.float32),
        **arrays,
    )


def start(system: str, sac: SacConfig, file: Path, threads: int) -> SystemProcess:
    if system != OFFICIAL:
        command = [sys.executable, str(Path(__file__).with_name("own_learner.py"))]
    else:
        command = reference_command("jaxrl2", "jaxrl2_learner.py", "python -m dsrl_async.bench learner")
    settings = {"sac": sac.model_dump(), "file": str(file), "threads": threads, "horizon": HORIZON, "seed": SEED}
    settings["compile"] = system == COMPILED
    process = SystemProcess(system, command, settings, quiet=system == OFFICIAL)
    process.answer()
    return process


def compare(sac: SacConfig, directory: Path) -> None:
    """Check that both learn alike; raises ValueError if they do not."""
    same = sac.model_copy(
        update={"critic_in_actor_loss": "after", "augmentation": "none", "entropy_backup": False} | NO_CLIPPING
    )
    write_start(directory / "quiet.npz", same, quiet=True)
    losses = []
    for system in (OWN, OFFICIAL):
        with start(system, same, directory / "quiet.npz", len(os.sched_getaffinity(0))) as process:
            losses.append(process.ask(updates=COMPARED_UPDATES)["losses"])
    ours, theirs = map(np.array, losses)
    if (difference := float(np.abs(ours / theirs - 1).max())) > TOLERANCE:
        raise ValueError(f"the two do not compute the same: losses {ours.tolist()} and {theirs.tolist()}")
    print(f"critic's losses agree to {difference:.0e}", file=sys.stderr)


def measure(sac: SacConfig, file: Path, threads: int, rounds: int, updates: int) -> dict[str, str]:
    """Cells of the table, by system."""
    results: dict[str, dict[str, list[list[float]]]] = {}
    with ExitStack() as stack:
        processes = [stack.enter_context(start(system, sac, file, threads)) for system in (OWN, COMPILED, OFFICIAL)]
        for process in processes:
            process.ask(updates=3)  # warms up; JAX compiles
            results[process.system] = {"times": [], "cpu_times": []}
        for _ in range(rounds):
            for process in processes:
                answer = process.ask(updates=updates)
                for clock, samples in results[process.system].items():
                    samples.append(answer[clock])
    cells = dict.fromkeys((OWN, COMPILED), "")
    for system in cells:
        for clock in ("times", "cpu_times"):
            ours, theirs = results[system][clock], results[OFFICIAL][clock]
            medians = [statistics.median(itertools.chain.from_iterable(samples)) for samples in (ours, theirs)]
            each = [statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs, strict=True)]
            cells[system] += f" {medians[0]:.1f} | {medians[1]:.1f} |"
            cells[system] += f" {medians[1] / medians[0]:.2f} ({min(each):.2f} to {max(each):.2f}) |"
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--augmentation", nargs="+", choices=["none", "crop", "crop_colour"], default=["none"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20, help="of each in a round (default: 20)")
    arguments = parser.parse_args()
    os.environ |= {name: os.environ.get(name, value) for name, value in WAIT_POLICY.items()}  # as in a run
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="dsrl_async-") as directory:
            rows = []
            for size in arguments.size:
                settings = SIZES[size] | {"batch_size": BATCH[size]}
                compare(SacConfig(**settings), Path(directory))
                for augmentation in arguments.augmentation:
                    sac = SacConfig(**settings, augmentation=augmentation)
                    write_start(Path(directory, "start.npz"), sac, quiet=False)
                    for threads in arguments.threads:
                        load = os.getloadavg()[0]
                        cells = measure(sac, Path(directory, "start.npz"), threads, arguments.rounds, arguments.updates)
                        for system, row in cells.items():
                            rows.append(f"| {size}, {augmentation} | {threads} | {system} |{row} {load:.1f} |")
                            print(rows[-1], file=sys.stderr, flush=True)
    except (ValueError, KeyError) as error:
        sys.exit(f"compare_learner.py: {error}")
    print("| networks, augmentation | threads | ours | ms | theirs | ratio | CPU-ms | theirs | ratio | load |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
