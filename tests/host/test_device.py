"""The device, and how float32 is computed on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsrl_async.host.device import resolve_device, set_float32_precision

CUDA, CUDNN = torch.backends.cuda, torch.backends.cudnn


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where torch finds a GPU; afterwards float32 is computed as torch does without being told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    CUDA.matmul.allow_tf32, CUDNN.allow_tf32 = False, True


def precisions() -> tuple[str, str]:
    return CUDA.matmul.fp32_precision, CUDNN.conv.fp32_precision  # type: ignore[attr-defined]


@pytest.mark.usefixtures("cuda")
def test_float32_is_what_was_asked_for_and_torch_can_read_it() -> None:
    """torch raises at some of these where one of its two settings says something else than the other."""
    for tf32 in (False, True, False):
        assert resolve_device("cuda", tf32) == torch.device("cuda")
        assert precisions() == 2 * (("tf32",) if tf32 else ("ieee",))
        assert CUDA.matmul.allow_tf32 is CUDNN.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        with CUDNN.flags(enabled=True, deterministic=True, allow_tf32=tf32):
            pass
        assert ("tf32" in precisions()) is tf32


@pytest.mark.usefixtures("cuda")
def test_a_numbered_device_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events, captures and torch's page-locked memory are the current device's."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [resolve_device(name) for name in ("cuda", "cuda:1")] == [torch.device("cuda"), torch.device("cuda", 1)]
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.usefixtures("cuda")
def test_the_default_is_float32() -> None:
    set_float32_precision(tf32=True)
    resolve_device("auto")
    assert precisions() == ("ieee", "ieee")


def test_the_cpu_leaves_the_settings_alone() -> None:
    before = precisions()
    assert resolve_device("cpu", tf32=True) == torch.device("cpu")
    assert precisions() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused_before_anything_is_set() -> None:
    before = precisions()
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        resolve_device("cuda")
    assert precisions() == before
