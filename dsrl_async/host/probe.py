"""Asks in a process of its own, with a time limit, what may crash or hang in C code or must not be imported here.

`ask` starts this module, which calls the function and prints its answer as one JSON object.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dsrl_async.host import processes


class Unanswered(Exception):
    """Why there was no answer: a phrase, such as `killed by SIGSEGV`."""


def ask(
    function: Callable[..., dict[str, Any]],
    time_limit_s: float,
    environment: dict[str, str] | None = None,
    argument: Any = None,
) -> dict[str, Any]:
    """The answer of a function of a module, JSON-ready, run with the variables of `environment`; raises Unanswered.

    It gets the `argument`, JSON-ready, if there is one. The process ends with this call, however that ends, or with
    its parent.
    """
    names = {"module": function.__module__, "function": function.__name__}
    job = json.dumps({**names, "arguments": [] if argument is None else [argument], "parent": os.getpid()})
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
    answer: dict[str, Any] | None = None
    with contextlib.suppress(StopIteration, ValueError):
        answer = json.loads(next(line for line in reversed(lines) if line))
    if not isinstance(answer, dict):
        raise Unanswered("it ended before it answered")
    if "error" in answer:
        raise Unanswered(answer["error"])
    return answer


def ask_once(
    function: Callable[..., dict[str, Any]], question: Mapping[str, Any], time_limit_s: float, silence: str
) -> dict[str, Any]:
    """`ask` with a question that is JSON-ready; a child is asked once for each, whatever comes of it.

    Where it does not answer, the answer is `refused`: a sentence that begins with `silence` and says why.
    """
    answer = _ask_once(function, json.dumps(question), time_limit_s)
    return {"refused": f"{silence}: {answer}"} if isinstance(answer, str) else answer


@functools.cache
def _ask_once(function: Callable[..., dict[str, Any]], question: str, time_limit_s: float) -> dict[str, Any] | str:
    """The answer, or why there is none."""
    try:
        return ask(function, time_limit_s, argument=json.loads(question))
    except Unanswered as error:
        return str(error)


def ask_anew() -> None:
    """Forget what `ask_once` was told."""
    _ask_once.cache_clear()


def cuda_devices() -> dict[str, Any]:
    """The CUDA devices that torch finds, each of which was asked to compute something.

    `devices` is their number, and for each of them `free_bytes` and `total_bytes` are its memory and `faults` why it
    cannot compute, or empty. `reason` says why there are none. What is free is what this process has left, with a
    context of its own on each of them.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:  # a driver that is too old is only warned of
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        found = [_cuda_device(index) for index in range(torch.cuda.device_count())]
        free, total, faults = zip(*found, strict=True) if found else ((), (), ())
        return {"devices": len(found), "free_bytes": free, "total_bytes": total, "faults": faults, "reason": ""}
    reason = f"{said[0].message}".partition(" (Triggered internally")[0] if said else ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    return {"devices": 0, "free_bytes": (), "total_bytes": (), "faults": (), "reason": reason}


def _cuda_device(index: int) -> tuple[int, int, str]:
    """Free and total memory of a device, and why it cannot compute: torch also lists those that it has no kernels for
    (too old, or newer than torch), and those that a program has for itself."""
    import torch

    try:
        torch.ones(1, device=f"cuda:{index}").item()
        return *torch.cuda.mem_get_info(index), ""
    except RuntimeError as error:
        return 0, 0, str(error).partition("\n")[0]


def main(argument: str) -> None:
    job, output = json.loads(argument), sys.stdout
    processes.prepare_child(job["parent"])
    try:
        answer = getattr(importlib.import_module(job["module"]), job["function"])(*job["arguments"])
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(f"\n{json.dumps(answer)}", file=output, flush=True)  # whatever the function has printed, and not ended
    os._exit(0)  # what is left of a broken OpenGL context complains, or crashes, when Python takes it apart


if __name__ == "__main__":
    main(sys.argv[1])
