"""The layouts of the noise: their limits, their variance, and what `shift` leaves to the policy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sac_configs import SMALL

from dsrl_async.config.settings import SacConfig
from dsrl_async.sac.layout import NoiseLayout

DIM = SMALL.noise_dim


def with_settings(**changes: object) -> SacConfig:
    return SacConfig(**{**SMALL.model_dump(), **changes})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def knots(count: int, horizon: int) -> NoiseLayout:
    return NoiseLayout(with_settings(noise_layout="knots", noise_knots=count), horizon)


@pytest.mark.parametrize("horizon", [1, 2, 10])
def test_one_knot_is_repeat_and_a_knot_for_each_slot_is_per_slot(horizon: int) -> None:
    one, all_slots = normal(3, DIM), normal(3, horizon * DIM)
    repeat, per_slot = (NoiseLayout(with_settings(noise_layout=name), horizon) for name in ("repeat", "per_slot"))
    assert torch.equal(knots(1, horizon).expand(one), repeat.expand(one))
    assert torch.equal(knots(horizon, horizon).expand(all_slots), per_slot.expand(all_slots))


@settings(max_examples=50, deadline=None)
@given(horizon=st.integers(1, 50), data=st.data())
def test_knots_are_in_their_slots_and_every_slot_has_variance_one(horizon: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, horizon))
    layout = knots(count, horizon)
    # What each slot has of each knot: the slots of unit vectors.
    weights = layout.expand(torch.eye(count).repeat_interleave(DIM, 1))[:, :, 0]
    torch.testing.assert_close(weights.square().sum(0), torch.ones(horizon))
    assert (weights >= 0).all()
    assert ((weights > 0).sum(0) <= 2).all()
    middles = (weights * torch.arange(count).unsqueeze(1)).sum(0) / weights.sum(0)
    assert (middles.diff() > 0).all() or count == 1  # from the first knot on to the last
    if count > 1:
        assert weights[0, 0] == weights[-1, -1] == 1
    apart = torch.arange(count) * (horizon - 1) / max(1, count - 1)
    for knot, slot in enumerate(apart.tolist()):
        if slot == int(slot):
            assert weights[:, int(slot)].tolist() == [float(other == knot) for other in range(count)]


def test_each_vector_of_the_agent_has_its_knot() -> None:
    noise = normal(2, 3 * DIM)
    slots = knots(3, 9).expand(noise)
    for knot, slot in enumerate((0, 4, 8)):
        assert torch.equal(slots[:, slot], noise[:, knot * DIM : (knot + 1) * DIM])
    between = (noise[:, DIM : 2 * DIM] + noise[:, 2 * DIM :]) / 2**0.5
    torch.testing.assert_close(slots[:, 6], between)


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(0.01, 0.99), horizon=st.integers(1, 20))
def test_a_shift_keeps_the_variance_and_moves_every_slot_by_the_same(shift: float, horizon: int) -> None:
    layout = NoiseLayout(with_settings(noise_layout="shift", noise_shift=shift), horizon)
    noise, of_slots, none = normal(4, DIM), normal(4, horizon, DIM, seed=1), torch.zeros(4, DIM)
    moved, stayed = layout.expand(noise, of_slots), layout.expand(none, of_slots)
    torch.testing.assert_close(moved - stayed, (shift * noise).unsqueeze(1).expand(-1, horizon, -1))
    # of independent numbers: the variances of both parts make one
    ones = torch.ones(1, horizon, DIM)
    own, agents = layout.expand(torch.zeros(1, DIM), ones), layout.expand(torch.ones(1, DIM), 0 * ones)
    torch.testing.assert_close(own.square() + agents.square(), ones)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"noise_layout": "repeat"}, DIM),
        ({"noise_layout": "knots", "noise_knots": 3}, 3 * DIM),
        ({"noise_layout": "per_slot"}, 10 * DIM),
        ({"noise_layout": "shift"}, DIM),
    ],
)
def test_slots_of_standard_normal_noise_have_variance_one(changes: dict[str, object], width: int) -> None:
    config = with_settings(**changes)
    layout = NoiseLayout(config, 10)
    assert config.noise_width(10) == layout.width == width
    assert config.normal_width(10) == (11 if layout.shifts else 10) * DIM
    slots = layout.expand(normal(20_000, width), normal(20_000, 10, DIM, seed=1))
    assert slots.shape == (20_000, 10, DIM)
    assert (slots.mean(0).abs() < 0.03).all()
    assert (slots.var(0) - 1).abs().max() < 0.06
