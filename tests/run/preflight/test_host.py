"""The devices that a run asks for: refused in one sentence where they are not there, or cannot compute."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpus import found_gpus

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.host.probe import Unanswered, cuda_devices
from dsrl_async.launch import command as launch
from dsrl_async.run import preflight
from dsrl_async.run.preflight import host
from dsrl_async.run.preflight.precision import fp8_fault

NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    host.cuda_devices.cache_clear()
    yield
    host.cuda_devices.cache_clear()


def find(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    """Have torch find two GPUs, or what `found` says."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("dsrl_async.host.probe.ask", lambda *_: {**found_gpus(1, 1), **found})
    monkeypatch.setattr(host, "has_driver", lambda: True)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"device": "cuda", "learner": {"device": "cpu"}}, None),
        ({"device": "auto"}, None),
        ({"device": "cpu", "learner": {"device": "cuda:1"}}, "learner.device"),
        ({"device": "auto", "learner": {"device": "cuda:1"}}, "learner.device"),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_refused_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], key: str | None
) -> None:
    find(monkeypatch, faults=("", NO_KERNEL))
    if key is None:
        preflight.check_devices(validate(settings))
    else:
        with pytest.raises(
            ConfigError, match=rf"^{key}: torch cannot compute on cuda:1 \({NO_KERNEL}\); .* or use cpu$"
        ):
            preflight.check_devices(validate(settings))


def test_auto_does_not_choose_a_gpu_that_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, faults=(NO_KERNEL, ""))
    with pytest.raises(ConfigError, match=r"^device: torch cannot compute on cuda:0"):
        preflight.check_devices(validate({}))
    preflight.check_devices(validate({"serial": True}))


def test_a_run_that_goes_to_the_cpu_in_spite_of_a_driver_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def said(settings: dict[str, Any]) -> str:
        host.cuda_devices.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            preflight.check_devices(validate(settings))
        return caplog.text

    find(monkeypatch, **{**found_gpus(), "reason": TOO_OLD})
    assert f"device: auto is the CPU, although there is an NVIDIA driver: {TOO_OLD[:-1]} (" in said({})
    for meant in ({"device": "cpu"}, {"serial": True}):
        assert said(meant) == ""
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert said({}) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert TOO_OLD[:-1] in said({})
    monkeypatch.setattr(host, "has_driver", lambda: False)
    assert said({}) == ""


def test_the_reason_is_in_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    find(monkeypatch, **{**found_gpus(), "reason": TOO_OLD})
    with pytest.raises(ConfigError, match=r"torch finds no CUDA device \(CUDA initialization: .*too old.*\); leave"):
        preflight.check_devices(validate({"device": "cuda"}))


def test_triton_kernels_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find(monkeypatch)
    asked: dict[str, Any] = {"policy": {"kernels": "triton"}}
    monkeypatch.setattr(host, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(host.sysconfig, "get_path", lambda *_: str(tmp_path))
    tmp_path.joinpath("Python.h").touch()
    preflight.check_devices(validate(asked))
    for on_cpu in ({"device": "cpu"}, {"serial": True}):
        with pytest.raises(ConfigError, match=r"^policy\.kernels: .* on the CPU; set it to torch$"):
            preflight.check_devices(validate(asked | on_cpu))
        preflight.check_devices(validate(on_cpu))
        preflight.check_devices(validate(asked | on_cpu), ["learner.device"])
    with monkeypatch.context() as patch:
        patch.setattr(host.sysconfig, "get_path", lambda *_: "/no/headers")
        with pytest.raises(ConfigError, match=r"there is no /no/headers/Python\.h; install it"):
            preflight.check_devices(validate(asked))
        patch.delenv("CC")
        patch.setattr(host.shutil, "which", lambda name: None)
        with pytest.raises(
            ConfigError, match=r"there is no gcc, clang or compiler that the variable CC names; install"
        ):
            preflight.check_devices(validate(asked))
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^policy\.kernels: triton is not installed, .* or set it to torch$"):
        preflight.check_devices(validate(asked))


def test_triton_kernels_are_not_compiled_besides() -> None:
    with pytest.raises(ConfigError, match=r"^policy: compile and kernels: triton both replace torch's kernels; leave"):
        validate({"policy": {"kernels": "triton", "compile": True}})


# --- products of 8 bits ---------------------------------------------------------------------------------------------

FP8 = {"policy": {"prefill_precision": "fp8"}}


def test_8_bits_are_refused_on_a_gpu_that_cannot_and_on_no_other_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def ask(function: Any, limit: float, *, argument: int | None = None) -> dict[str, Any]:
        if argument is None:
            return found_gpus(1, 1)
        asked.append((function, argument))
        return {"fault": TOO_OLD}

    find(monkeypatch)
    monkeypatch.setattr("dsrl_async.host.probe.ask", ask)
    preflight.check_devices(validate({}))
    assert asked == [], "only who wants it is asked"
    with pytest.raises(ConfigError, match=r"^policy\.prefill_precision: fp8 cannot .* on cuda:0 \(CUDA init.*GPU$"):
        preflight.check_devices(validate(FP8), ["device"])
    assert asked == [(fp8_fault, 0)]
    with pytest.raises(ConfigError, match=r"^policy\.prefill_precision: fp8 goes with bfloat16 on a GPU; leave out"):
        preflight.check_devices(validate({"policy": {**FP8["policy"], "dtype": "float32"}}))
    assert not caplog.records
    preflight.check_devices(validate({**FP8, "device": "cpu"}))
    assert "policy.prefill_precision: fp8 is simulated on a CPU" in caplog.text
    assert len(asked) == 1


def test_a_gpu_that_does_not_answer_about_8_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(function: Any, limit: float, *, argument: int | None = None) -> dict[str, Any]:
        if argument is None:
            return found_gpus(1)
        raise Unanswered("no answer within 120 s")

    find(monkeypatch)
    monkeypatch.setattr("dsrl_async.host.probe.ask", ask)
    with pytest.raises(ConfigError, match=r"cannot be computed on cuda:0 \(no answer within 120 s\); leave it out"):
        preflight.check_devices(validate(FP8))


@pytest.mark.parametrize(
    ("capability", "torch_version", "fault"),
    [
        ((8, 0), "2.13.0+cu130", "it has compute capability 8.0, and products of 8 bits begin with 8.9"),
        ((8, 6), "2.13.0", "it has compute capability 8.6, and products of 8 bits begin with 8.9"),
        ((8, 9), "2.9.1+cu128", "torch 2.9.1+cu128 starts them on the wrong stream of this GPU, 2.12 does not"),
        ((8, 9), "2.12.0", ""),
        ((9, 0), "2.9.0", ""),
        ((12, 0), "2.13.0", ""),
    ],
)
def test_which_gpus_multiply_8_bits(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], torch_version: str, fault: str
) -> None:
    """The product itself is computed on the CPU here."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch, "__version__", torch_version)
    assert fp8_fault(1) == {"fault": fault}


def test_a_gpu_whose_products_of_8_bits_fail_or_are_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr("dsrl_async.pi0.fp8.scaled_product", lambda *_: ones(32, 32))
    assert fp8_fault(0) == {"fault": "a product that is 65 came out wrong by 64"}

    def refuse(*_: Any) -> torch.Tensor:
        raise RuntimeError("Rowwise scaling is not currently supported on your device\nException raised from ...")

    monkeypatch.setattr("dsrl_async.pi0.fp8.scaled_product", refuse)
    assert fp8_fault(0) == {"fault": "Rowwise scaling is not currently supported on your device"}


# --- what is found --------------------------------------------------------------------------------------------------


def test_each_gpu_is_made_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three GPUs the second is too old for torch, which lists it all the same."""
    ones = torch.ones

    def compute(size: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError(f"{NO_KERNEL}\nCUDA kernel errors might be ...")
        return ones(size)

    monkeypatch.setattr(torch, "ones", compute)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 20 + index))
    assert cuda_devices() == {
        "devices": 3,
        "free_bytes": (10, 0, 12),
        "total_bytes": (20, 0, 22),
        "faults": ("", NO_KERNEL, ""),
        "reason": "",
    }


def test_what_torch_warns_of_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn(f"{TOO_OLD} (Triggered internally at CUDAFunctions.cpp:119.)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda_devices() == {**found_gpus(), "reason": TOO_OLD}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_devices()["reason"] == f"torch {torch.__version__} is built without CUDA"


def test_a_run_that_is_to_be_filmed_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    filmed = ["--evaluation.films", "2", "--policy.checkpoint", "missing"]
    preflight.check_films(validate({"evaluation": {"films": 2, "every_decisions": 100}}))
    monkeypatch.setitem(sys.modules, "av", None)
    reason = r"^evaluation.films: films need PyAV, which is not installed; pip install .*\[video\]"
    with pytest.raises(ConfigError, match=reason):
        launch.main([*filmed, "--evaluation.every-decisions", "100"])
    with pytest.raises(ConfigError, match=r"^policy.checkpoint"):  # there is no evaluation that could be filmed
        launch.main(filmed)


@pytest.mark.parametrize("key", ["policy", "learner"])
def test_without_a_compiler_nothing_is_compiled_for_the_cpu(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = validate({"device": "cpu", key: {"compile": True}})
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{key}\.compile: .* there is no g\+\+; install one .* leave {key}"):
        preflight.check_compiler(config)
    preflight.check_compiler(validate({"device": "cpu"}))
    (tmp_path / "clang++").touch(0o755)
    monkeypatch.setenv("CXX", "clang++ -march=native")
    preflight.check_compiler(config)
