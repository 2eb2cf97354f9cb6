"""`bench paper` for the sampler of an earlier commit of this repository, by today's count and constants.

    python scripts/studies/paper_of_commit.py beb78af

prints, for batches of 1 and 16 of full-size Pi0, what docs/measurements/gpu_on_paper.md compares: kernels, the copies
among them that CUDA adds, and milliseconds on paper of the two halves of a sample. Needs git.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsrl_async.bench import launches
from dsrl_async.bench.launches import Launch, LaunchCount
from dsrl_async.bench.paper import KINDS, seconds
from dsrl_async.host.command import guard

ROOT = Path(__file__).resolve().parents[2]


def unpack(commit: str, folder: Path) -> None:
    """Writes the package `dsrl_async` of a commit to `folder`."""
    done = subprocess.run(["git", "archive", commit, "dsrl_async"], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ValueError(f"git has no dsrl_async of {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


def import_pi0(folder: Path) -> tuple[Any, Any, Any]:
    """`Pi0Config`, `Pi0` and `Sampler` of the package in `folder`; what is imported of today's stays usable."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "dsrl_async"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    from dsrl_async.pi0.config import Pi0Config
    from dsrl_async.pi0.model import Pi0
    from dsrl_async.pi0.sampler import Sampler

    launches.POLICY = str(folder / "dsrl_async" / "pi0")
    return Pi0Config, Pi0, Sampler


def summary(part: list[Launch]) -> dict[str, float]:
    of_kinds = {f"{kind}_ms": [launch for launch in part if launch.kind == kind] for kind in KINDS}
    times = {name: round(1e3 * seconds(some), 2) for name, some in (of_kinds | {"ms": part}).items()}
    return {"kernels": len(part), "copies": sum(launch.operation == "hidden copy" for launch in part)} | times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="(default: 1 16)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.commit, Path(folder))
        config, network, sampler_class = import_pi0(Path(folder))
        with torch.device("meta"):
            model = network(config()).set_dtype(torch.bfloat16).eval().requires_grad_(False)
        for batch in args.batch:
            sampler = sampler_class(model, batch, 24, 10)
            with LaunchCount("encode") as count:
                sampler.encode()
                count.stage = "denoise"
                sampler.denoise()
            for stage in ("encode", "denoise"):
                part = [launch for launch in count.launches if launch.stage == stage]
                print(json.dumps({"commit": args.commit, "batch": batch, "stage": stage} | summary(part)), flush=True)
            print(json.dumps({"commit": args.commit, "batch": batch, "stage": "total"} | summary(count.launches)))


if __name__ == "__main__":
    sys.exit(guard(main))
