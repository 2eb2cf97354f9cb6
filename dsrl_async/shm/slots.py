"""One slot per lane: the observation on its way to the policy, and the action chunk on its way back.

An environment worker owns the request fields of its lane's slot, the inference process the response fields, so there is
no lock. A request is published by writing its number after the data it covers, and answered by writing the same number
after the answer. The number holds the worker's incarnation, so an answer to a worker that has died is never taken for
an answer to its successor.
"""

from __future__ import annotations

import time

import numpy as np

from dsrl_async.config.shapes import sac_image_shape
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.shm import order
from dsrl_async.shm.arena import Arena, Fields

INCARNATION_SHIFT = 32  # of a request's number; the bits below count the requests of that incarnation


def slot_fields(
    lanes: int,
    spec: EnvironmentSpec,
    chunk: int,
    noise_width: int,
    standard_normal_width: int,
    agent_cameras: int = 1,
    normalised: bool = False,
) -> Fields:
    """`normalised`: whether answers have the actions as the policy computes them, too, which DSRL-NA learns from."""
    actions: Fields = {"slot/normalised_chunk": ((lanes, chunk, spec.action_dim), "float32")} if normalised else {}
    return {
        "slot/images": ((lanes, spec.cameras, spec.image_size, spec.image_size, 3), "uint8"),
        "slot/sac_image": ((lanes, *sac_image_shape(agent_cameras)), "uint8"),
        "slot/state": ((lanes, spec.state_dim), "float32"),
        "slot/task_index": ((lanes,), "int64"),
        "slot/standard_normal": ((lanes, standard_normal_width), "float32"),
        "slot/request_id": ((lanes,), "int64"),
        "slot/request_ns": ((lanes,), "int64"),
        "slot/action_chunk": ((lanes, chunk, spec.action_dim), "float32"),
        "slot/noise": ((lanes, noise_width), "float32"),
        "slot/policy_version": ((lanes,), "int64"),
        **actions,
        "slot/response_id": ((lanes,), "int64"),
    }


class Slots:
    """Views of the slot fields; row i of N belongs to lane i.

    images uint8 [N, cameras, S, S, 3], sac_image uint8 [N, 64, 64, 3 * agent_cameras], state float32 [N, 8],
    standard_normal float32 [N, H * 32] (drawn by the environment worker, so that noise depends on the episode's seed
    and not on how batches form), action_chunk float32 [N, chunk, 7], noise float32 [N, A], policy_version int64 [N];
    normalised_chunk is as action_chunk, or None.
    """

    def __init__(self, arena: Arena) -> None:
        self.images = arena["slot/images"]
        self.sac_image = arena["slot/sac_image"]
        self.state = arena["slot/state"]
        self.task_index = arena["slot/task_index"]
        self.standard_normal = arena["slot/standard_normal"]
        self.request_id = arena["slot/request_id"]
        self.request_ns = arena["slot/request_ns"]
        self.action_chunk = arena["slot/action_chunk"]
        self.noise = arena["slot/noise"]
        self.policy_version = arena["slot/policy_version"]
        self.response_id = arena["slot/response_id"]
        normalised = "slot/normalised_chunk"
        self.normalised_chunk = arena[normalised] if normalised in arena.fields else None

    def request(self, lane: int, incarnation: int, count: int) -> int:
        """Publish the observation that is written in the slot of `lane`, as the `count`-th request (below 2^32) of an
        incarnation; returns the request's number."""
        number = (incarnation << INCARNATION_SHIFT) | count
        self.request_ns[lane] = time.monotonic_ns()
        order.barrier()
        self.request_id[lane] = number
        return number

    def incarnation(self, lane: int) -> int:
        """The incarnation of the environment worker that made the last request of `lane`; 0 before the first one."""
        return int(self.request_id[lane]) >> INCARNATION_SHIFT

    def answered(self, lane: int, number: int) -> bool:
        """Say whether a request is answered; if it is, the answer can be read."""
        answered = int(self.response_id[lane]) == number
        order.barrier()
        return answered

    def ready(self) -> np.ndarray:
        """Lanes with an unanswered request, longest waiting first, int64 [n]."""
        pending = (self.request_id != self.response_id).nonzero()[0]  # each number is read once
        order.barrier()
        return pending[self.request_ns[pending].argsort(kind="stable")]

    def numbers(self, lanes: np.ndarray) -> np.ndarray:
        """The numbers of the last requests of `lanes`, int64 [n]; what they asked can be read."""
        numbers = self.request_id[lanes]
        order.barrier()
        return numbers

    def answer(
        self,
        lanes: np.ndarray,
        numbers: np.ndarray,
        action_chunk: np.ndarray,
        noise: np.ndarray,
        policy_version: int,
        normalised: np.ndarray | None = None,
    ) -> np.ndarray:
        """Write the answers to requests `numbers` of `lanes`; returns the lanes that still wanted theirs.

        `normalised` is as `action_chunk`, where there is a place for it.

        A lane gets nothing if its environment worker was replaced after the request was gathered.
        """
        current = self.request_id[lanes] == numbers
        if not current.all():
            lanes, numbers, action_chunk, noise = (rows[current] for rows in (lanes, numbers, action_chunk, noise))
            normalised = normalised if normalised is None else normalised[current]
        self.action_chunk[lanes] = action_chunk[:, : self.action_chunk.shape[1]]
        self.noise[lanes] = noise
        if self.normalised_chunk is not None:
            assert normalised is not None
            self.normalised_chunk[lanes] = normalised[:, : self.normalised_chunk.shape[1]]
        self.policy_version[lanes] = policy_version
        order.barrier()
        self.response_id[lanes] = numbers
        return lanes
