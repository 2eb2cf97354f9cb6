"""Makes the rows of a run's demonstrations: what the agent's noise would have to be, and what came of the decisions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from dsrl_async.config.settings import Config
from dsrl_async.config.shapes import sac_image_shape
from dsrl_async.demonstrations import Demonstration
from dsrl_async.envs import ChunkOutcome, EnvironmentSpec
from dsrl_async.envs.images import resize_with_pad, write_agent_image
from dsrl_async.envs.rewards import decision_reward
from dsrl_async.policies import FrozenPolicy, NormalisedBatch
from dsrl_async.run import demonstrations
from dsrl_async.run.inversion.fitting import REFINEMENTS, fit
from dsrl_async.sac.layout import NoiseLayout
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.memory import demonstration_fields
from dsrl_async.shm.replay import DEMONSTRATIONS, ReplayRing, Seen

logger = logging.getLogger(__name__)

SHIFT_DRAWS = 4
"""With `shift`, a part of the slots' noise is not the agent's to choose: what a vector makes is compared for so many
draws of it."""


class Found(NamedTuple):
    """The noise that was found for an episode's frames."""

    vectors: NDArray[np.float32]
    """[n, A], the agent's."""
    errors: NDArray[np.float32]
    """[n], how far the actions that they make are from the demonstrated ones."""
    actions: NDArray[np.float32]
    """[n, chunk * action_dim], the demonstrated ones, normalised."""


class Inverter:
    """The frozen policy, asked backwards, a few rows at a time."""

    def __init__(self, policy: FrozenPolicy, config: Config) -> None:
        batch = policy.batch(config.learner.policy_rows, int(policy.prompt_lengths.max()))
        assert isinstance(batch, NormalisedBatch)
        self.batch, self.config, self.chunk = batch, config, config.env.chunk
        self.horizon, self.size = policy.spec.action_horizon, config.learner.policy_rows
        self.layout = NoiseLayout(config.sac, self.horizon, batch.noise.device)
        self.generator = torch.Generator(batch.noise.device).manual_seed(config.seed)

    def __call__(
        self, images: NDArray[np.uint8], states: NDArray[np.float32], task_index: int, actions: NDArray[np.float32]
    ) -> Found:
        """Noise for n observations: uint8 [n, cameras, size, size, 3], [n, state_dim], and the actions [n, horizon,
        action_dim] in the robot's units."""
        parts = [self._some(images[part], states[part], task_index, actions[part]) for part in self._parts(len(states))]
        return Found(*map(np.concatenate, zip(*parts, strict=True)))

    @torch.no_grad()
    def _some(
        self, images: NDArray[np.uint8], states: NDArray[np.float32], task_index: int, actions: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], ...]:
        batch, count = self.batch, len(states)
        batch.images[:count].copy_(torch.from_numpy(images))
        batch.state[:count].copy_(torch.from_numpy(states))
        batch.fill_prompts(np.full(count, task_index, np.int64))
        batch.encode()
        batch.actions[:count].copy_(torch.from_numpy(actions))
        batch.normalise()
        wanted = self._executed(count)
        batch.invert(REFINEMENTS)
        noise = batch.noise[:count].clone()
        draws = SHIFT_DRAWS if self.layout.shifts else 1
        of_slots = torch.randn(draws, *noise.shape, generator=self.generator, device=noise.device)

        def sample(vectors: Tensor) -> Tensor:
            made = []
            for draw in of_slots:
                batch.noise[:count].copy_(self.layout.expand(vectors, draw))
                batch.denoise()
                made.append(self._executed(count))
            return torch.cat(made, 1)

        found, error = fit(self.config.sac, self.layout, noise, wanted.repeat(1, draws), sample)
        return found.cpu().numpy(), error.cpu().numpy(), wanted.cpu().numpy()

    def _executed(self, count: int) -> Tensor:
        return self.batch.normalised_actions[:count, : self.chunk].flatten(1).clone()

    def _parts(self, count: int) -> Iterator[slice]:
        return (slice(start, min(start + self.size, count)) for start in range(0, count, self.size))


def make_rows(
    config: Config, spec: EnvironmentSpec, policy: FrozenPolicy, rows: int, beat: Callable[[str], object]
) -> dict[str, NDArray[np.generic]]:
    """The rows of all demonstrations, as `ReplayRing.export_lane` gives them; `beat` is told how far this is.

    Raises ValueError if the policy can make hardly anything of what was demonstrated.
    """
    ring = ReplayRing(
        Arena.create(demonstration_fields(config, spec, policy.spec.action_horizon, rows)), DEMONSTRATIONS
    )
    inverter, errors = Inverter(policy, config), []
    for number, demonstration in enumerate(demonstrations.read_all(config, spec)):
        beat(f"inverting demonstration {number + 1}")
        errors.append(_write(ring, demonstration, config, spec, inverter))
    every = np.concatenate(errors)
    limit = config.replay.demonstration_error
    kept = int((every <= limit).sum())
    logger.info(
        "%d demonstrations: of %d decisions, noise was found for %d within demonstration_error %g (the median error is "
        "%.3g, 90 %% are below %.3g)",
        *(len(errors), len(every), kept, limit, np.median(every), np.quantile(every, 0.9)),
    )
    if not kept:
        raise ValueError(
            f"replay.demonstrations: for none of {len(every)} decisions there is noise of which the policy makes what "
            f"was demonstrated to within {limit:g}, the least is {every.min():.3g}; raise replay.demonstration_error, "
            "or sac.action_magnitude, or take demonstrations of what the policy was trained on"
        )
    return ring.export_lane(0)


def _write(
    ring: ReplayRing, demonstration: Demonstration, config: Config, spec: EnvironmentSpec, inverter: Inverter
) -> NDArray[np.float32]:
    """Append an episode's rows; returns the errors of its decisions."""
    frames = demonstration.success + 1
    count = min(frames + 1, len(demonstration.state))
    policy_images = np.empty((count, spec.cameras, spec.image_size, spec.image_size, 3), np.uint8)
    agent_images = np.empty((count, *sac_image_shape(len(config.sac.cameras))), np.uint8)
    for number, of_cameras in enumerate(demonstration.pictures(count)):
        pictures = list(of_cameras)
        policy_images[number] = [resize_with_pad(picture, spec.image_size) for picture in pictures]
        write_agent_image(agent_images[number], [pictures[camera] for camera in config.sac.cameras])
    state, task = demonstration.state, demonstration.task_index
    chunks = demonstrations.chunk_of(demonstration.action, range(frames), inverter.horizon)
    found = inverter(policy_images[:frames], state[:frames], task, chunks)
    near = found.errors <= config.replay.demonstration_error
    of_actions = ring.of_actions

    def seen(frame: int) -> Seen | None:
        return Seen(policy_images[frame] if of_actions else None, task) if ring.keeps_seen else None

    for sequence in demonstrations.sequences(len(state), demonstration.success, config.env.chunk):
        first = sequence[0].frame
        ring.begin_episode(0, agent_images[first], state[first], seen(first))
        for frame, steps, success_step, following in sequence:
            outcome = ChunkOutcome(steps, success_step, success_step >= 0, False)
            row = int(ring.head[0]) - 1
            ring.append(
                0,
                noise=found.actions[frame] if of_actions else found.vectors[frame],
                reward=decision_reward(outcome, config.env.reward_rule, config.env.use_step_penalty),
                steps=steps,
                terminal=outcome.success,
                policy_version=0,
                next_image=agent_images[following],
                next_state=state[following],
                next_seen=seen(following),
            )
            ring.rows["imitated"][0, row] = found.vectors[frame]
            ring.rows["near"][0, row] = near[frame]
            ring.rows["complete"][0, row] = of_actions or near[frame]
    return found.errors


def write_rows(run_dir: Path, columns: dict[str, NDArray[np.generic]]) -> None:
    from dsrl_async.host.files import replacing

    with replacing(demonstrations.rows_path(run_dir), lambda: None) as temporary:
        temporary.write_bytes(save(columns))
