"""The inference process of a run with a device that takes a given time for a batch and computes nothing.

Everything else is the run's own: `inference.InferenceServer`, its loop, gathering and scattering. In lock step the loop
waits until all lanes are ready, answers all of them, and only then wakes their workers.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dsrl_async.bench.simulated.environment import HORIZON, SPEC, sharpen_timers
from dsrl_async.bench.systems.barrier import serve_in_lock_step
from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import Config
from dsrl_async.host.processes import name_process, prepare_child
from dsrl_async.run.channel import read_secret
from dsrl_async.run.inference.policies import Policies
from dsrl_async.run.inference.server import InferenceServer, notifier, serve
from dsrl_async.sac.networks import Actor
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.slots import Slots

PROMPT_LENGTH = 16
RECORDS = "latencies.npy"
"""File written at the end, int64 [decisions, 3]: time.monotonic_ns of request, start of batch and answer."""


class SimulatedPolicy:
    """Takes `service_s` for a batch. Its buffers are those of `steering.SteeredPolicy`, which describes them."""

    def __init__(
        self, config: Config, batch_size: int, service_s: float, gather: bool, image_size: int = SPEC.image_size
    ) -> None:
        self.service_s = service_s
        self.started_ns = 0
        self.images = torch.zeros(batch_size, SPEC.cameras, image_size, image_size, 3, dtype=torch.uint8)
        self.state = torch.zeros(batch_size, SPEC.state_dim)
        self.sac_image = torch.zeros(batch_size, *config.sac.image_shape, dtype=torch.uint8)
        self.standard_normal = torch.zeros(batch_size, config.sac.normal_width(HORIZON))
        self.inputs = {"state": self.state, "standard_normal": self.standard_normal}
        if gather:
            self.inputs |= {"images": self.images, "sac_image": self.sac_image}
        self.tokens = torch.zeros(batch_size, PROMPT_LENGTH, dtype=torch.int64)
        self.prompts = torch.zeros(1, PROMPT_LENGTH, dtype=torch.int64)
        self.mode = torch.zeros(batch_size, dtype=torch.uint8)
        self.outputs = torch.zeros(batch_size, config.sac.noise_width(HORIZON) + HORIZON * SPEC.action_dim)

    def fill_modes(self, modes: NDArray[np.uint8]) -> None:
        self.mode[: len(modes)].copy_(torch.from_numpy(modes))

    def fill_prompts(self, task_index: NDArray[np.int64]) -> None:
        """Looks them up, as Pi0 does."""
        torch.index_select(self.prompts, 0, torch.from_numpy(task_index), out=self.tokens[: len(task_index)])

    def run(self) -> None:
        self.started_ns = time.monotonic_ns()
        if self.service_s > 0:
            time.sleep(self.service_s)


class Recorder:
    """Notes when each request was made, when its batch began, and when it was answered."""

    def __init__(self, slots: Slots, policies: Policies) -> None:
        self._slots, self._policies = slots, [*policies.steered_batches.values()]
        self._records = array("q")

    def add(self, lanes: np.ndarray) -> None:
        answered_ns = time.monotonic_ns()
        started_ns = max(policy.started_ns for policy in self._policies)  # type: ignore[attr-defined]
        for requested_ns in self._slots.request_ns[lanes].tolist():
            self._records.extend((requested_ns, started_ns, answered_ns))

    def write(self, path: Path) -> None:
        np.save(path, np.array(self._records).reshape(-1, 3))


def main(argument: str) -> None:
    """`argument` is the job of `run.inference.server.main` with the fields of `Simulation` that concern the device."""
    job = json.loads(argument)
    prepare_child(job["parent"])
    name_process("inference", "simulated inference")
    sharpen_timers()
    torch.set_num_threads(job["threads"])
    run_dir = Path(job["run_dir"])
    config = validate(read_yaml(run_dir / "config.yaml"))
    policies = Policies(
        {
            (size, PROMPT_LENGTH): SimulatedPolicy(
                config, size, job["service_s"][str(size)], job["gather"], job["image_size"]
            )
            for size in config.batch_sizes()
        },
        Actor(config.sac, HORIZON, torch.device("cpu"), config.seed),
        prompt_lengths=np.array([PROMPT_LENGTH]),
    )
    arena = Arena.attach(job["arena"])
    recorder = Recorder(Slots(arena), policies) if job["record"] else None
    wake = notifier(job["wake_fds"])

    def notify(lanes: np.ndarray) -> None:
        if recorder is not None:
            recorder.add(lanes)
        if not job["lock_step"]:
            wake(lanes)

    server = InferenceServer(config, arena, policies, notify, run_dir=run_dir)
    server.policy_version = 0
    if job["lock_step"]:
        serve_in_lock_step(server, job)
    else:
        serve(server, read_secret(job["channel_fd"]), job["observation_ready_fd"])
    if recorder is not None:
        recorder.write(run_dir / RECORDS)


if __name__ == "__main__":
    main(sys.argv[1])
