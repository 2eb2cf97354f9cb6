"""What a run has learned, for use outside of runs: `dsrl_async.load_agent`, and the agent that it returns."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from dsrl_async.config.load import read_run_settings, validate
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.envs.images import resize_with_pad, write_agent_image
from dsrl_async.host.device import resolve_device
from dsrl_async.host.environments import environment_record
from dsrl_async.host.graphs import graphs_of
from dsrl_async.policies import PolicyRecord
from dsrl_async.run import checkpoints, preflight
from dsrl_async.run.evaluation.files import find_best
from dsrl_async.run.inference.policies import load_frozen_policy
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.instructions import instructions_of, learned_by
from dsrl_async.sac.networks import Actor
from dsrl_async.shm.counters import NoiseMode
from dsrl_async.untrusted import shown

logger = logging.getLogger(__name__)

Mode = Literal["deterministic", "stochastic", "base"]
"""How the policy's initial noise is chosen: the mode of the actor's distribution, a sample of it, or without the actor,
independent N(0, I) in every action slot, as the frozen policy was trained. With `sac.noise_layout: shift` the
slots' own part of the noise is drawn in every mode."""

Observation = Mapping[str, Any]
"""`images`, `state`, `prompt` and `agent_image`, see `Agent.act`."""


class Agent:
    """A frozen policy and the actor that steers it, loaded by `load_agent`. One thread at a time computes.

    Attributes:
        checkpoint: the checkpoint directory that it was loaded from.
        config: the settings of its run; `device` is what was asked for.
        prompts: the texts that it may be given.
        spec: sizes of what it takes and returns: cameras, image_size, state_dim, action_dim.
        chunk: how many actions of a chunk the run executed before it looked again, `env.chunk`.
        horizon: how many actions the policy samples at once.
        mode: how noise is chosen unless `act` is told otherwise.
        generator: where noise comes from unless `act` is given another.
    """

    def __init__(
        self, checkpoint: Path, config: Config, spec: EnvironmentSpec, policy: PolicyRecord, mode: Mode, seed: int
    ) -> None:
        self.checkpoint, self.config, self.mode = checkpoint, config, mode
        self.spec, self.prompts, self.chunk = spec, spec.prompts, config.env.chunk
        self.generator = np.random.default_rng(seed)
        antialias = environment_record_settings(config).get("antialias")
        self._antialias = True if antialias is None else bool(antialias)
        self._device = resolve_device(config.device)
        self._frozen = load_frozen_policy(config, policy, self._device, spec.prompts, lambda: None)
        self.horizon = self._frozen.spec.action_horizon
        self._actor = Actor(config.sac, self.horizon, self._device)
        load_weights(self._actor, checkpoint)
        learned = learned_by(checkpoint, config.sac, spec.prompts)
        instructions = instructions_of(config.sac, policy, spec.prompts, learned)
        self._instructions = None if instructions is None else torch.from_numpy(instructions.table).to(self._device)
        self._batches: dict[tuple[int, int], SteeredPolicy] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Agent {str(self.checkpoint)!r}: {self.mode}, {len(self.prompts)} prompts, device {self._device}>"

    def act(
        self,
        observation: Observation,
        *,
        mode: Mode | None = None,
        generator: np.random.Generator | Sequence[np.random.Generator] | None = None,
        steps: int | None = None,
    ) -> NDArray[np.float32]:
        """Choose an action chunk, or for a batch of B observations B of them.

        Args:
            observation: a mapping with
                `images`: the pictures of the cameras, in the environment's order, as people see them: uint8
                    [height, width, 3] of any size, one for each of `spec.cameras`; for a batch B times as many,
                    [B, cameras, height, width, 3] or lists. They are resized to the policy's size as the run's
                    environment does it, with black borders where they are not square.
                `state`: the robot's state in its units, floats [state_dim], or [B, state_dim], which makes it a batch.
                `prompt`: one of `prompts`, or B of them; it may be left out where there is only one.
                `agent_image`: what the actor sees, uint8 [64, 64, 3 * cameras of the agent], with B in front for a
                    batch. Left out, it is made from `images` as the run's environment makes it.
            mode: how noise is chosen, see `Mode`.
            generator: where the noise that is drawn comes from, see `Mode`; for a batch also B of them, so that every
                robot has its own.
            steps: how many actions to return, at most `horizon`; as many as the run executed, `chunk`, if None.

        Returns:
            float32 [steps, action_dim], or [B, steps, action_dim], in the robot's units.

        Each size of a batch gets buffers when it first comes, and on a GPU a CUDA graph, which takes some seconds. Rows
        of a batch agree with those of another size to about 1e-6 (docs/measurements/pi0.md).

        Raises:
            ValueError: the observation does not fit; the message is one sentence.
        """
        steps = self.chunk if steps is None else steps
        if not 0 < steps <= self.horizon:
            raise ValueError(f"steps must be between 1 and the policy's {self.horizon}, not {steps}")
        mode = self.mode if mode is None else mode
        if mode not in ("deterministic", "stochastic", "base"):
            raise ValueError(f"mode must be deterministic, stochastic or base, not {shown(mode)}")
        state = _array(observation, "state", np.float32)
        batched = state.ndim == 2
        states = state if batched else state[None]
        count = len(states)
        if states.ndim != 2 or not count or states.shape[1] != self.spec.state_dim or not np.isfinite(states).all():
            raise ValueError(
                f"state must be finite numbers [{self.spec.state_dim}], or [B, {self.spec.state_dim}] for a batch, "
                f"not {_what(state)}"
            )
        given = observation.get("images")
        pictures = [self._pictures(row) for row in self._rows(given if batched else [given], count, "images")]
        prompts = self._prompts(observation.get("prompt"), count, batched)
        normal = self._standard_normal(generator, count)
        agent_images = self._agent_images(observation.get("agent_image"), pictures, count, batched)
        with self._lock:
            batch = self._batch(count, int(self._frozen.prompt_lengths[prompts].max()))
            images = np.empty(tuple(batch.inputs["images"].shape), np.uint8)
            for place, row in zip(images, pictures, strict=True):
                for image, picture in zip(place, row, strict=True):
                    image[:] = resize_with_pad(picture, len(image), self._antialias)
            filled = {
                "images": images,
                "state": states,
                "sac_image": agent_images,
                "standard_normal": normal,
                "task_index": prompts,
            }
            for name, buffer in batch.inputs.items():
                buffer.copy_(torch.from_numpy(filled[name]))
            batch.fill_prompts(prompts)
            batch.fill_modes(np.full(count, NoiseMode[mode.upper()], np.uint8))
            batch.run()
            actions: NDArray[np.float32] = batch.actions[:, :steps].cpu().numpy().copy()
        return actions if batched else actions[0]

    def _batch(self, count: int, length: int) -> SteeredPolicy:
        """The steered policy for batches of `count` rows with prompts of up to `length`, made when it first comes."""
        if (count, length) not in self._batches:
            parts = self._frozen.batch(count, length), self._actor, self.config.sac
            steered = SteeredPolicy(*parts, instructions=self._instructions)
            with graphs_of(self.config.policy.graphs, self._device, np.zeros(1, np.int64)) as graphs:
                if self.config.policy.compile:
                    steered.run()
                if graphs and self._frozen.capturable:
                    steered.capture()
            self._batches[count, length] = steered
        return self._batches[count, length]

    def _rows(self, given: Any, count: int, name: str) -> Sequence[Any] | NDArray[Any]:
        if isinstance(given, str | bytes) or not isinstance(given, Sequence | np.ndarray) or len(given) != count:
            raise ValueError(f"{name} must have an entry for each of the {count} rows of state, not {_what(given)}")
        return given

    def _pictures(self, given: Any) -> list[NDArray[np.uint8]]:
        """The pictures of one observation."""
        cameras = self.spec.cameras
        if not isinstance(given, Sequence | np.ndarray) or len(given) != cameras:
            raise ValueError(f"images must hold the pictures of {cameras} cameras, not {_what(given)}")
        pictures = [np.ascontiguousarray(picture) for picture in given]
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
                pixels = "; pixels are whole numbers from 0 to 255" if picture.dtype.kind == "f" else ""
                raise ValueError(f"images must be uint8 [height, width, 3], not {_what(picture)}{pixels}")
        return pictures

    def _prompts(self, given: Any, count: int, batched: bool) -> NDArray[np.int64]:
        """The numbers of the rows' prompts."""
        if given is None:
            if len(self.prompts) > 1:
                raise ValueError(f"prompt is missing; this agent has {len(self.prompts)}, see its `prompts`")
            return np.zeros(count, np.int64)
        texts = (
            [given] * count if isinstance(given, str) else self._rows(given if batched else [given], count, "prompt")
        )
        for text in texts:
            if text not in self.prompts:
                raise ValueError(
                    f"prompt {shown(text)} is none of this agent's, such as {shown(self.prompts[0])}; "
                    "give it to load_agent among `prompts`"
                )
        return np.array([self.prompts.index(text) for text in texts], np.int64)

    def _standard_normal(
        self, given: np.random.Generator | Sequence[np.random.Generator] | None, count: int
    ) -> NDArray[np.float32]:
        """float32 [count, `sac.normal_width(horizon)`], drawn row after row."""
        width = self.config.sac.normal_width(self.horizon)
        given = self.generator if given is None else given
        generators = [given] * count if isinstance(given, np.random.Generator) else given
        if len(generators) != count:
            raise ValueError(f"generator must be one, or one for each of {count} rows, not {len(generators)}")
        return np.stack([generator.standard_normal(width, np.float32) for generator in generators])

    def _agent_images(
        self, given: Any, pictures: Sequence[Sequence[NDArray[np.uint8]]], count: int, batched: bool
    ) -> NDArray[np.uint8]:
        shape = self.config.sac.image_shape
        if given is None:
            images = np.zeros((count, *shape), np.uint8)
            for image, row in zip(images, pictures, strict=True):
                write_agent_image(image, [row[camera] for camera in self.config.sac.cameras])
            return images
        image = np.ascontiguousarray(given)
        if image.dtype != np.uint8 or image.shape != ((count, *shape) if batched else shape):
            raise ValueError(f"agent_image must be uint8 {list(shape)}, with the batch in front, not {_what(image)}")
        return image if batched else image[None]


def _array(observation: Observation, name: str, dtype: Any) -> NDArray[Any]:
    if name not in observation:
        raise ValueError(f"the observation lacks {name!r}; it needs images, state and prompt")
    try:
        return np.ascontiguousarray(observation[name], dtype)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, not {_what(observation[name])}") from None


def _what(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a sequence of {len(value)}" if isinstance(value, list | tuple) else shown(value)


def with_kernels_that_run(config: Config) -> Config:
    """The settings of a run with torch's kernels, if Triton's cannot run here: results differ by rounding only."""
    try:
        preflight.check_kernels(config)
    except ConfigError:
        return config.model_copy(update={"policy": config.policy.model_copy(update={"kernels": "torch"})})
    return config


def load_agent(
    run: Path | str,
    *,
    best: bool = False,
    device: str = "auto",
    prompts: Sequence[str] = (),
    mode: Mode | None = None,
    seed: int = 0,
) -> Agent:
    """Load the policy of a run and the agent that steers it.

    Args:
        run: a run directory, of which the last checkpoint counts, or one of its checkpoints.
        best: take the run's best checkpoint, by the evaluations during the training.
        device: `cpu`, `cuda`, `cuda:1` and the like; `auto` is CUDA where there is one.
        prompts: texts that the agent may be given besides those of the run's environment. With them the environment
            need not be installed here. An agent with `sac.instruction: task` knows no others than its run's.
        mode: how noise is chosen, see `Mode`; `sac.evaluation_noise` of the run if None.
        seed: of the agent's generator, for the noise.

    A model of the Hugging Face hub is downloaded unless it is in the cache. No simulator is made.

    Raises:
        ValueError: there is no such checkpoint, or it, the policy or the environment cannot be used; one sentence.
    """
    given = Path(run).absolute()
    found = find_best(given) if best else None
    checkpoint = checkpoints.find(given) if not best else found and found[0]
    if checkpoint is None:
        what = "best checkpoint" if best else "checkpoint"
        missing = f"there is no {what} in it" if given.exists() else "it does not exist"
        raise ConfigError(f"{run}: {missing}; give a run directory, or one of its checkpoints")
    run_dir = checkpoints.run_of(checkpoint)
    before = validate(read_run_settings(run_dir))
    config = with_kernels_that_run(before.model_copy(update={"device": device, "resume": None}))
    preflight.check_devices(config, ["device"])
    try:
        spec = preflight.check_environment(config, before)
    except ConfigError as error:
        if not prompts:
            raise ConfigError(f"{error}; or give load_agent `prompts`, with which it needs no environment") from error
        config = preflight.fetch_policy(config)
        policy = preflight.check_checkpoint(config, before)
        sizes = policy.spec
        spec = EnvironmentSpec(sizes.cameras, sizes.image_size, sizes.robot_state_dim, sizes.robot_action_dim, ())
        logger.warning("%s is not asked about: %s", config.env.name, error)
    else:
        checked = preflight.check_run(config, before, learning=False)
        config, policy = checked.config, checked.policy
        preflight.check_made_with(run_dir, preflight.made_with(checked), policy.place)
    spec = spec._replace(prompts=tuple(dict.fromkeys((*spec.prompts, *prompts))))
    for warning in preflight.check_prompts(policy, spec):
        logger.warning(warning)
    return Agent(checkpoint, config, spec, policy, mode or config.sac.evaluation_noise, seed)


def load_weights(actor: Actor, checkpoint: Path, option: str = "give") -> None:
    """Put a checkpoint's actor weights into `actor`; raise ConfigError with one sentence if they do not fit.

    `option` is how an older checkpoint that is whole would be given, such as `--checkpoint`.
    """
    path = checkpoint / checkpoints.AGENT
    with checkpoints.naming_an_older_one(checkpoint, option):
        checkpoints.check(checkpoint, [checkpoints.AGENT])
    try:
        with safe_open(path, framework="pt") as file:
            flat: Tensor = file.get_tensor("actor.flat")
        actor.load_flat_(flat)
    except Exception as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error


def environment_record_settings(config: Config) -> Mapping[str, Any]:
    """The environment's settings with the values of presets, or as they are if it is not there."""
    settings = config.env.model_dump()
    try:
        return environment_record(settings).settings
    except ValueError:
        return settings
