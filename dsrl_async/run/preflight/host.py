"""Whether the machine has the devices, the open files, the channel and the library of films that a run needs."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsrl_async.config.command_line import program
from dsrl_async.config.load import get_key
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.envs.recording import why_no_films
from dsrl_async.host import probe, processes
from dsrl_async.run import channel
from dsrl_async.run.preflight.precision import fp8_fault

logger = logging.getLogger(__name__)

SPARE_DESCRIPTORS = 64
"""Open files of the launched process beside the workers' events: memory, logs, sockets, the terminal."""
DEVICE_KEYS = ("device", "learner.device")
"""The settings that name a device: the policy's, and the learner's."""
TIME_LIMIT_S = 120.0
"""How long torch may take to be imported and to find its devices."""


def check_devices(config: Config, keys: Sequence[str] = DEVICE_KEYS) -> None:
    """Raises ConfigError where a CUDA device that one of the settings asks for is not there, or cannot compute.

    Where `auto` is the CPU although there is an NVIDIA driver, this is said.
    """
    for key in keys:
        name = get_key(config, key) or ""
        if name.startswith("cuda"):
            found = cuda_devices()
            if "error" in found:
                raise ConfigError(
                    f"{key}: {name} was asked for, but torch does not say what there is ({found['error']}); use cpu, "
                    f"or see what {program('doctor')} says"
                )
            check_device(key, name, found)
        elif name == "auto" and cuda_index(config, key) is not None:
            check_device(key, name, cuda_devices())
        elif name == "auto" and not config.serial and has_driver() and not hides_devices():
            found = cuda_devices()
            reason = found.get("error") or found["reason"] or "torch finds no CUDA device"
            logger.warning(
                "%s: auto is the CPU, although there is an NVIDIA driver: %s (--device cpu asks for it)",
                *(key, reason.rstrip(".")),
            )
    if "device" in keys:
        check_kernels(config)
        check_prefill_precision(config)


def check_kernels(config: Config) -> None:
    """Raises ConfigError where the kernels that `policy.kernels` asks for cannot run."""
    if config.policy.kernels != "triton":
        return
    if cuda_index(config, "device") is None:
        raise ConfigError(
            "policy.kernels: triton's run on a GPU, but the policy of this run is computed on the CPU; set it to torch"
        )
    if find_spec("triton") is None:
        raise ConfigError(
            "policy.kernels: triton is not installed, though torch for CUDA brings it; install it as "
            '`python -m pip install "triton>=3.5"`, or set it to torch'
        )
    if missing := missing_for_triton():
        raise ConfigError(
            f"policy.kernels: triton compiles its launches with a C compiler, and there is no {missing}; install it "
            "(`apt-get install gcc python3-dev` has both), or set it to torch"
        )


def missing_for_triton() -> str:
    """What Triton's compilation would not find, or nothing. (Its `runtime/build.py` looks there.)"""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "gcc, clang or compiler that the variable CC names"
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    return "" if headers.joinpath("Python.h").exists() else f"{headers / 'Python.h'}"


def check_prefill_precision(config: Config) -> None:
    """Raises ConfigError where the policy's GPU cannot compute in 8 bits, as a setting asks it to; says that a CPU only
    simulates it."""
    if config.policy.prefill_precision != "fp8":
        return
    key, index = "policy.prefill_precision: fp8", cuda_index(config, "device")
    if index is None:
        logger.warning("%s is simulated on a CPU: the same rounding as on a GPU, and slower than without", key)
        return
    if config.policy.dtype == "float32":
        raise ConfigError(f"{key} goes with bfloat16 on a GPU; leave out policy.dtype, or policy.prefill_precision")
    try:
        fault = probe.ask(fp8_fault, TIME_LIMIT_S, argument=index)["fault"]
    except probe.Unanswered as error:
        fault = str(error)
    if fault:
        raise ConfigError(f"{key} cannot be computed on cuda:{index} ({fault}); leave it out, or choose another GPU")


@functools.cache
def cuda_devices() -> dict[str, Any]:
    """What `probe.cuda_devices` says, or that there are none and the `error`.

    Torch is asked once, in a child process: the supervisor does without it.
    """
    try:
        return probe.ask(probe.cuda_devices, TIME_LIMIT_S)
    except probe.Unanswered as error:
        return {"devices": 0, "reason": "", "error": str(error)}


def has_driver() -> bool:
    """Whether there may be a CUDA device: without a driver's file (the second one is WSL's) torch need not be asked."""
    return any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/dxg"))


def cuda_index(config: Config, key: str) -> int | None:
    """The number of the CUDA device that a run uses by the setting `key`, one of `DEVICE_KEYS`; None for the CPU."""
    name = get_key(config, key) or config.device
    if name == "auto":
        return 0 if not config.serial and has_driver() and cuda_devices()["devices"] else None
    return int(name.partition(":")[2] or 0) if name.startswith("cuda") else None


def hides_devices() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names no device, so that nobody expects one to be used."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def check_device(key: str, name: str | None, found: Mapping[str, Any]) -> None:
    """Raises ConfigError where the CUDA device that the setting `key` asks for is not one of those that were `found`
    (see `probe.cuda_devices`), or cannot compute."""
    if name == "auto" and found["devices"]:
        name = "cuda"
    if name is None or not name.startswith("cuda"):
        return
    count, index = found["devices"], int(name.partition(":")[2] or 0)
    if not count:
        why = f" ({found['reason']})" if found["reason"] else ""
        raise ConfigError(f"{key}: {name} was asked for, but torch finds no CUDA device{why}; leave it out, or use cpu")
    if index >= count:
        raise ConfigError(f"{key}: {name} was asked for, but the last of torch's CUDA devices is cuda:{count - 1}")
    if fault := found["faults"][index]:
        raise ConfigError(
            f"{key}: torch cannot compute on cuda:{index} ({fault}); choose another one with CUDA_VISIBLE_DEVICES, "
            "install a torch that is built for it, or use cpu"
        )


def check_descriptors(config: Config, key: str = "actors") -> None:
    """Every worker has an event of its own, which is an open file; raises ConfigError, naming `key`, if it may not."""
    limit = processes.raise_descriptor_limit()
    if config.lanes + SPARE_DESCRIPTORS > limit:
        raise ConfigError(f"{key}: {config.lanes} need more open files than the limit of {limit}; raise `ulimit -n`")


def check_channel() -> None:
    """Raises ConfigError where learner and inference process can have no channel for the weights."""
    try:
        channel.check_channel()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_compiler(config: Config) -> None:
    """Raises ConfigError where a setting asks for torch.compile on the CPU, and there is no C++ compiler for it."""
    for key, device in zip(("policy.compile", "learner.compile"), DEVICE_KEYS, strict=True):
        if get_key(config, key) and cuda_index(config, device) is None:
            compiler = (shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]  # as torch chooses
            if shutil.which(compiler) is None:
                raise ConfigError(
                    f"{key}: on the CPU torch.compile needs a C++ compiler, and there is no {compiler}; install one "
                    f"(on Debian or Ubuntu: apt-get install g++), name one in the variable CXX, or leave {key} out"
                )


def check_films(config: Config) -> None:
    """Raises ConfigError if the evaluations are to be filmed, and no films can be made here."""
    if config.evaluation.lanes and config.evaluation.films and (reason := why_no_films()) is not None:
        raise ConfigError(f"evaluation.films: {reason}")
