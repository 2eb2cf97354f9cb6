"""What `plan --measure` does on a GPU, on a pretended one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.gpus import found_gpus

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.plan import measure
from dsrl_async.policies.pi0 import pi0_needs
from dsrl_async.run import preflight
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight import host

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SAC = {"batch_size": 4, "hidden_dims": [8], "num_q_heads": 1, "conv_channels": [4]}


@pytest.mark.parametrize(("graphs", "device"), [("auto", GPU), ("off", GPU), ("auto", CPU)])
def test_updates_are_captured_and_waited_for_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, graphs: str, device: torch.device
) -> None:
    done: list[str] = []
    make_agent, source_for = measure.make_agent, measure.source_for
    monkeypatch.setattr(measure, "RING_ROWS", 64)
    monkeypatch.setattr(measure, "learner_device", lambda config: device)
    monkeypatch.setattr(measure, "make_agent", lambda config, horizon, _: make_agent(config, horizon, CPU))
    monkeypatch.setattr(measure, "source_for", lambda ring, _: source_for(ring, CPU))
    monkeypatch.setattr(Updates, "capture", lambda updates: done.append("capture"))
    monkeypatch.setattr(Updates, "run", lambda updates: done.append("update"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    measure.updating(validate({"sac": SAC, "learner": {"graphs": graphs}}), horizon=10)()
    expected = ["capture"] * (graphs == "auto" and device is GPU) + ["update"] + ["wait"] * (device is GPU)
    assert done == expected


def test_a_gpu_that_is_too_small_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts the batches that are measured, which are larger than those of the run's few workers."""
    run = preflight.check_run(validate({"device": "cuda", "actors": 1}))
    run = dataclasses.replace(run, policy=dataclasses.replace(run.policy, needs=pi0_needs(Pi0Config())))
    host.cuda_devices.cache_clear()
    monkeypatch.setattr("dsrl_async.host.probe.ask", lambda *_: found_gpus(12 << 30))
    assert preflight.check_gpu_memory(run)[0].need.total < 12 << 30
    with pytest.raises(ConfigError, match=r"of cuda:0, and 12\.0 are free"):
        measure.measure(run, 1.0, print)
    host.cuda_devices.cache_clear()
