"""Whether a run fits into the memory of the GPUs that it uses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.gpus import found_gpus

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.doctor import checks
from dsrl_async.host.probe import Unanswered
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.policy import language_lengths
from dsrl_async.policies.pi0 import pi0_needs
from dsrl_async.run import preflight
from dsrl_async.run.preflight import gpu_memory, host
from dsrl_async.run.preflight.checked_run import CheckedRun

GIB = 2**30


def gpus(monkeypatch: pytest.MonkeyPatch, *free_gib: float) -> list[object]:
    """Have torch find these GPUs; what it is asked is added to the list."""
    asked: list[object] = []
    free = [round(gib * GIB) for gib in free_gib]

    def ask(function: object, time_limit_s: float) -> dict[str, Any]:
        asked.append(function)
        return found_gpus(*free)

    monkeypatch.setattr("dsrl_async.host.probe.ask", ask)
    monkeypatch.setattr(host, "has_driver", lambda: True)
    return asked


def full_size(**settings: Any) -> CheckedRun:
    run = preflight.check_run(validate(settings))
    return dataclasses.replace(run, policy=dataclasses.replace(run.policy, needs=pi0_needs(Pi0Config())))


def test_a_run_that_does_not_fit_is_told_what_helps_most(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 23.5)
    fits = full_size(device="cuda")
    (memory,) = preflight.check_gpu_memory(fits).values()
    assert 9 * GIB < memory.need.total < 23.5 * GIB
    with pytest.raises(ConfigError) as caught:
        preflight.check_gpu_memory(
            full_size(device="cuda", policy={"dtype": "float32"}, actors=64, inference={"buckets": [32, 64]})
        )
    message = str(caught.value)
    assert "\n" not in message
    assert "of cuda:0, and 23.5 are free" in message
    advised = message.split("most first: ")[1].split("; ")
    spares = [float(part.rpartition("spares ")[2].rstrip(")")) for part in advised]
    assert spares == sorted(spares, reverse=True)
    assert advised[0].startswith("policy.dtype: bfloat16")
    assert any(part.startswith("inference.buckets") for part in advised)
    assert not any("replay" in part for part in advised)  # it would spare next to nothing


def test_a_large_ring_is_to_be_made_smaller_or_kept_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 23.5)
    with pytest.raises(
        ConfigError, match=r"most first: learner\.device: cpu.*; half the replay\.capacity \(spares 1\d\."
    ):
        preflight.check_gpu_memory(full_size(device="cuda", replay={"capacity": 2_000_000}))
    elsewhere = full_size(device="cuda", replay={"capacity": 2_000_000}, learner={"device": "cpu"})
    preflight.check_gpu_memory(elsewhere)


def test_each_gpu_has_its_own_need(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 40, 40)
    apart = preflight.check_gpu_memory(full_size(device="cuda", learner={"device": "cuda:1"}))
    together = preflight.check_gpu_memory(full_size(device="cuda"))
    assert sorted(apart) == [0, 1]
    assert apart[0].need.mirror == apart[1].need.weights == 0
    whole, parts = together[0].need, [apart[device].need for device in (0, 1)]
    assert whole.total == pytest.approx(sum(part.total for part in parts) + gpu_memory.CONTEXT_BYTES, abs=2)
    assert preflight.check_gpu_memory(full_size(device="cuda"), ["device"])[0].need.total == parts[0].total


def test_the_host_needs_nothing_for_a_policy_on_a_gpu_that_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    run = full_size()

    def of_policy(run: CheckedRun) -> int:
        return preflight.memory_needed(run.config, run.environment, run.spec, run.policy.needs).policy

    asked = gpus(monkeypatch, 80)
    assert of_policy(run) == of_policy(run) == 0
    assert len(asked) == 1
    assert of_policy(full_size(device="cpu")) > 10 * GIB
    host.cuda_devices.cache_clear()
    gpus(monkeypatch)  # the driver is there, and torch is one without CUDA
    assert of_policy(run) > 10 * GIB
    assert preflight.check_gpu_memory(run) == {}
    host.cuda_devices.cache_clear()

    def crash(function: object, time_limit_s: float) -> dict[str, Any]:
        raise Unanswered("killed by SIGSEGV")

    monkeypatch.setattr("dsrl_async.host.probe.ask", crash)
    assert of_policy(run) > 10 * GIB


def test_torch_is_not_asked_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gpus(monkeypatch, 80)
    monkeypatch.setattr(host, "has_driver", lambda: False)
    assert preflight.check_gpu_memory(full_size()) == {}
    assert asked == []


def test_the_doctor_has_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 40)
    config = validate({"device": "cuda"})
    (memory,) = preflight.check_gpu_memory(preflight.check_run(config)).values()
    (finding,) = checks.check_gpu_memory(config, checks.Options())
    assert finding.status == "ok"
    assert f"40.0 of 80.0 GiB free, about {preflight.describe(memory.need)} needed" in finding.message
    host.cuda_devices.cache_clear()
    gpus(monkeypatch, 0.2)
    with pytest.raises(ConfigError, match=r"and 0\.2 are free"):
        list(checks.check_gpu_memory(config, checks.Options()))


def test_prompt_lengths_are_those_of_the_loaded_policy() -> None:
    from dsrl_async.pi0.checkpoint import load_policy
    from dsrl_async.pi0.config import EMBEDDED_POLICY

    run = preflight.check_run(validate({}))
    loaded = load_policy(EMBEDDED_POLICY)
    assert gpu_memory.prompt_lengths(run) == sorted(set(language_lengths(loaded, run.spec.prompts).tolist()))
