"""One slot per actor: the observation on its way to the policy, and the action chunk on its way back.

An actor owns its slot's request fields, the inference process the response fields, so there is no lock. A request
is published by writing its number after the data it covers, and answered by writing the same number after the
answer. The number holds the incarnation of the actor process, so an answer to a process that has died is never
taken for an answer to its successor.

This relies on x86-64, which makes stores visible in order; a port to ARM needs a barrier before each publication.
"""

from __future__ import annotations

import time

import numpy as np

from dsrl_async.config.shapes import SAC_IMAGE_SIZE
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.shm.arena import Arena, Fields

SAC_IMAGE_SHAPE = (SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3)


def slot_fields(actors: int, spec: EnvironmentSpec, chunk: int, noise_width: int, standard_normal_width: int) -> Fields:
    return {
        "slot/images": ((actors, spec.cameras, spec.image_size, spec.image_size, 3), "uint8"),
        "slot/sac_image": ((actors, *SAC_IMAGE_SHAPE), "uint8"),
        "slot/state": ((actors, spec.state_dim), "float32"),
        "slot/task_index": ((actors,), "int64"),
        "slot/standard_normal": ((actors, standard_normal_width), "float32"),
        "slot/request_id": ((actors,), "int64"),
        "slot/request_ns": ((actors,), "int64"),
        "slot/action_chunk": ((actors, chunk, spec.action_dim), "float32"),
        "slot/noise": ((actors, noise_width), "float32"),
        "slot/policy_version": ((actors,), "int64"),
        "slot/response_id": ((actors,), "int64"),
    }


class Slots:
    """Views of the slot fields; row i belongs to actor i.

    images uint8 [N, cameras, S, S, 3], sac_image uint8 [N, 64, 64, 3], state float32 [N, 8], standard_normal
    float32 [N, H * 32] (drawn by the actor, so that noise depends on the episode's seed and not on how batches
    form), action_chunk float32 [N, chunk, 7], noise float32 [N, A], policy_version int64 [N].
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

    def request(self, lane: int, incarnation: int, count: int) -> int:
        """Publish the observation written in slot `lane`; returns the request's number."""
        number = (incarnation << 32) | count
        self.request_ns[lane] = time.monotonic_ns()
        self.request_id[lane] = number
        return number

    def answered(self, lane: int, number: int) -> bool:
        return int(self.response_id[lane]) == number

    def ready(self) -> np.ndarray:
        """Lanes with an unanswered request, longest waiting first, int64 [n]."""
        pending = (self.request_id != self.response_id).nonzero()[0]  # each number is read once
        return pending[self.request_ns[pending].argsort(kind="stable")]

    def answer(
        self,
        lanes: np.ndarray,
        numbers: np.ndarray,
        action_chunk: np.ndarray,
        noise: np.ndarray,
        policy_version: int,
    ) -> np.ndarray:
        """Write the answers to requests `numbers` of `lanes`; returns the lanes that still wanted theirs.

        An actor that was replaced after its request was gathered gets nothing.
        """
        current = self.request_id[lanes] == numbers
        if not current.all():
            lanes, numbers, action_chunk, noise = (rows[current] for rows in (lanes, numbers, action_chunk, noise))
        self.action_chunk[lanes] = action_chunk[:, : self.action_chunk.shape[1]]
        self.noise[lanes] = noise
        self.policy_version[lanes] = policy_version
        self.response_id[lanes] = numbers
        return lanes
