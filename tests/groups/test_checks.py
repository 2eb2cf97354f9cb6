"""What a run with groups asks of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.groups import checks, placing
from dsrl_async.groups.checks import check_groups, whole_run
from dsrl_async.groups.placing import local_gpus
from dsrl_async.run import preflight
from dsrl_async.run.preflight import gpu_memory, host, memory

GIB = 2**30
Gpus = Callable[[int], None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Pretend that there are so many GPUs of 80 GiB."""

    def pretend(count: int) -> None:
        found = {
            "devices": count,
            "reason": "",
            "faults": [""] * count,
            "free_bytes": [80 * GIB] * count,
            "total_bytes": [80 * GIB] * count,
        }
        for module in (placing, host, gpu_memory):
            monkeypatch.setattr(module, "cuda_devices", lambda: found)
        monkeypatch.setattr(host, "has_driver", lambda: count > 0)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(checks, "available_memory", lambda: 64 * GIB)
    return pretend


def test_each_group_has_gpus_of_its_own(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(4)
    assert local_gpus(4, 1) == [["0"], ["1"], ["2"], ["3"]]
    assert local_gpus(2, 2) == [["0", "1"], ["2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8a, 7,2")
    assert local_gpus(2, 2) == [["5", "GPU-8a"], ["7", "2"]]
    with pytest.raises(ConfigError, match="3 groups with 2 GPUs each need 6, and torch finds 4 here"):
        local_gpus(3, 2)


def check(**settings: Any) -> preflight.CheckedRun:
    run = preflight.check_run(validate({"actors": 2, "groups": 2, **settings}))
    check_groups(run)
    return run


def test_gpus_are_counted_where_the_policy_is_on_them(gpus: Gpus) -> None:
    gpus(1)
    with pytest.raises(ConfigError, match="2 groups with 1 GPU each need 2, and torch finds 1 here"):
        check()
    check(device="cpu")
    check(group={"gpus": 0}, learner={"device": "cuda"})
    gpus(0)
    assert whole_run(check()).config.actors == 4


def test_with_ray_only_the_learner_needs_a_gpu_here(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "check_library", lambda: None)
    gpus(0)
    check(ray="auto", groups=16)
    check(ray="auto", device="cuda", learner={"device": "cpu"})
    for settings in ({"device": "cuda"}, {"learner": {"device": "cuda"}}):
        with pytest.raises(ConfigError, match="cuda was asked for, but torch finds no CUDA device"):
            check(ray="auto", **settings)


def test_the_memory_of_each_gpu_is_looked_at(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(4)
    run = check(learner={"device": "cuda:3"}, group={"gpus": 2})
    needs = gpu_memory.gpu_needs(run.config, run.policy.needs, gpu_memory.prompt_lengths(run))
    assert {device: (need.weights > 0, need.learner > 0) for device, need in needs.items()} == {
        0: (True, False),
        2: (True, False),
        3: (False, True),
    }


def test_memory_is_that_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for groups in (2, 4):
        monkeypatch.setattr(checks, "available_memory", lambda: 1 << 20)
        with pytest.raises(ConfigError, match=f"for {groups} groups of 2 environments") as caught:
            check(groups=groups)
        asked.append(str(caught.value).split("about ")[1].split(" GiB")[0])
    assert float(asked[1]) > float(asked[0]) + 2 * memory.MODEL_PROCESS_BYTES / GIB
