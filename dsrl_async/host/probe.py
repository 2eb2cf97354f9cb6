"""Asks in a process of its own, with a time limit, what may crash or hang in C code or must not be imported here.

`ask` starts this module, which calls the function and prints its answer as one JSON object.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from dsrl_async.host import processes


class Unanswered(Exception):
    """Why there was no answer: a phrase, such as `killed by SIGSEGV`."""


def ask(
    function: Callable[[], dict[str, Any]], time_limit_s: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The answer of a function of a module, JSON-ready, run with the variables of `environment`; raises Unanswered.

    The process ends with this call, however that ends, or with its parent.
    """
    job = json.dumps({"module": function.__module__, "function": function.__name__, "parent": os.getpid()})
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsrl_async.host.probe", job],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(os.environ) if environment is None else environment,
        )
        try:
            code = process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            raise Unanswered(f"no answer within {time_limit_s:g} s") from None
        finally:
            processes.kill_all([process])
        output.seek(0)
        errors.seek(0)
        lines, complaints = (file.read().decode(errors="replace").split("\n") for file in (output, errors))
    if code:
        said = next((line.strip() for line in reversed(complaints) if line.strip()), "without a message")
        raise Unanswered(f"{processes.how_ended(code)}{'' if code < 0 else f': {said}'}")
    answer: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line))
    if "error" in answer:
        raise Unanswered(answer["error"])
    return answer


def cuda_devices() -> dict[str, Any]:
    """How many CUDA devices torch can use, and their memory: `free_bytes` and `total_bytes`, a number for each.

    What is free is what this process has left, with a context of its own on each of them.
    """
    import torch

    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    memory = [torch.cuda.mem_get_info(device) for device in devices]
    return {
        "devices": len(devices),
        "free_bytes": [free for free, _ in memory],
        "total_bytes": [total for _, total in memory],
    }


def main(argument: str) -> None:
    job = json.loads(argument)
    processes.prepare_child(job["parent"])
    try:
        answer = getattr(importlib.import_module(job["module"]), job["function"])()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # what is left of a broken OpenGL context complains, or crashes, when Python takes it apart


if __name__ == "__main__":
    main(sys.argv[1])
