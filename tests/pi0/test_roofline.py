"""The work of the published sizes against figures that were computed by others."""

from __future__ import annotations

import pytest

from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.roofline import stages


def test_work_of_pi0_at_full_size() -> None:
    """Independently computed for two cameras, 48 language slots and one step."""
    work = stages(Pi0Config(), language_length=48, denoise_steps=1)
    assert work["vision"].flops == pytest.approx(440e9, rel=0.01)
    assert work["prefill"].flops == pytest.approx(2141e9, rel=0.01)
    assert work["denoise"].flops == pytest.approx(36e9, rel=0.02)
    assert 2 * work["vision"].weights == pytest.approx(0.83e9, rel=0.01)
    assert 2 * work["prefill"].weights == pytest.approx(3.75e9, rel=0.01)
    assert 2 * work["denoise"].weights == pytest.approx(0.636e9, rel=0.03)


@pytest.mark.parametrize(("batch_size", "milliseconds"), [(1, 5.2), (8, 29.4), (16, 58.8), (32, 117.7)])
def test_bound_of_an_h100(batch_size: int, milliseconds: float) -> None:
    work = stages(Pi0Config(), language_length=48, denoise_steps=10)
    bound = sum(stage.bound_s(batch_size, 800e12, 3.35e12) for stage in work.values())
    assert 1e3 * bound == pytest.approx(milliseconds, rel=0.03)
