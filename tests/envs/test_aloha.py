"""The joints and grippers of ALOHA as openpi knows them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsrl_async.envs import aloha

# `_decode_state` and `_encode_actions` of openpi 15a9616 with adapt_to_pi, on np.linspace(-0.9, 1.7, 14).
GIVEN = np.linspace(-0.9, 1.7, 14)
STATE = [-0.9, 0.7, 0.5, -0.3, -0.1, 0.1, -0.43215956, 0.5, -0.7, -0.9, 1.1, 1.3, 1.5, 0.9456528]
ACTION = [-0.9, 0.7, 0.5, -0.3, -0.1, 0.1, 0.69540312, 0.5, -0.7, -0.9, 1.1, 1.3, 1.5, 1.35818776]


def test_state_and_action_are_those_of_openpi() -> None:
    np.testing.assert_allclose(aloha.state_for_pi(GIVEN), STATE, atol=1e-8)
    np.testing.assert_allclose(aloha.action_from_pi(GIVEN), ACTION, atol=1e-8)


@given(arrays(np.float64, (3, 14), elements=st.floats(-2, 2)))
@settings(max_examples=30, deadline=None)
def test_both_leave_what_they_are_given_and_turn_the_same_joints(values: np.ndarray) -> None:
    before = values.copy()
    for function in (aloha.state_for_pi, aloha.action_from_pi):
        turned = function(values)
        joints = [joint for joint in range(14) if joint not in aloha.GRIPPERS]
        assert (np.abs(turned)[:, joints] == np.abs(values)[:, joints]).all()
        assert (turned[1] == function(values[1])).all()
    assert (values == before).all()


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="ALOHA has 14 joints and grippers, not 13"):
        aloha.state_for_pi(np.zeros(13))
