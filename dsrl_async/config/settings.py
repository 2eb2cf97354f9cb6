"""Every setting of a run: its name, type, default, meaning and limits, in one place.

A run's configuration is built from three layers, each overriding the one before: the defaults below,
one YAML file (`--config`), and command-line options (`--sac.gamma 0.99`). `load_config` merges them
and validates the result before anything is started; whatever is wrong becomes one `ConfigError`.

The defaults are those of the embedded tabletop task (`configs/tabletop.yaml` spells them out).
"""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dsrl_async.config.hub import local_path
from dsrl_async.config.shapes import SAC_IMAGE_SIZE, sac_image_shape
from dsrl_async.config.strict_yaml import Quoted, is_text
from dsrl_async.untrusted import shown

LONGEST_MESSAGE = 1200
"""Characters of a message; of a longer one the middle is left out."""


class ConfigError(ValueError):
    """A setting is wrong; the message is one sentence that says which, and how to mend it."""

    def __init__(self, message: str) -> None:
        message = " ".join(message.splitlines())  # it may quote a path, or what a user wrote, of any length
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 3 :]}"
        super().__init__(message)


EMBEDDING_DIM = 64
"""Width of what the agent is told with `sac.instruction: embedding`, unless `sac.instruction_dim` says otherwise."""
MOST_ACTORS = 4096
"""Upper limit on `actors`."""

DELETED = {
    "envs_per_actor": "every environment has a process of its own; leave it out",
}
"""Settings of earlier versions, and what to do instead. In an old run's config.yaml they are ignored."""
DELETED_OPTIONS = DELETED | {"learner_device": "write learner.device"}
"""Options of earlier versions, by their names with underscores, and what to do instead."""


class OnResume(StrEnum):
    """What becomes of a setting that is given another value when a run is resumed; every setting is declared with one.

    Another value of a setting that is `FIXED` would make the rows of the replay buffer, the numbers in the networks or
    the success rate mean something else, or would have no effect any more.
    """

    FIXED = "fixed"
    """The run is refused."""
    ANNOUNCED = "announced"
    """The run goes on with the new value, and says so."""
    FREE = "free"
    """Nothing depends on it but where the run is written to and what is shown of it, so nothing is said."""


T = TypeVar("T")
Fixed = Annotated[T, OnResume.FIXED]
Announced = Annotated[T, OnResume.ANNOUNCED]
Free = Annotated[T, OnResume.FREE]


class Section(BaseModel):
    """Settings that belong together. Keys that it does not have are refused.

    Values may be of their own type or its text, as it stands in a file and on the command line.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _prepare(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        if any(issubclass(kind, BaseModel) for kind in kinds):
            value = {} if value is None else value  # all that stood in it is commented out
            if not isinstance(value, Mapping | BaseModel):
                raise ValueError(f"must be a section with keys, not {shown(value)}")
            return value
        return [_prepare(item, kinds) for item in value] if isinstance(value, list) else _prepare(value, kinds)


def _kinds(annotation: Any) -> set[type]:
    """The types that a setting, or an item of its list, may have."""
    if typing.get_origin(annotation) is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    parts = [part for part in typing.get_args(annotation) if part is not Ellipsis]
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def _prepare(value: Any, kinds: set[type]) -> Any:
    """Refuses what pydantic would take for something else, and reads whole numbers such as `1e5`."""
    if isinstance(value, Quoted):
        value = str(value)
    if isinstance(value, bool) and bool not in kinds:
        raise ValueError(f"must not be {str(value).lower()}")
    if isinstance(value, str) and str in kinds:
        if not value or not is_text(value) or any(character < " " for character in value):
            raise ValueError(f"must be text without control characters, and not empty, which {shown(value)} is not")
    elif int in kinds and isinstance(value, str | int | float):
        number = _number(value) if isinstance(value, str) else value
        if number is not None and abs(number) >= 2**63:
            raise ValueError(f"must be below 2^63, which {shown(value)} is not")
        if isinstance(number, float) and number.is_integer():
            return int(number)
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is the same after it has stood in a YAML file, and in JSON."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_text(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 2**63)


def prepare_options(value: Any) -> Any:
    """Keyword arguments of a user's function; raises ValueError for what cannot be any, or would not be the same."""
    value = {} if value is None else value  # all that stood in it is commented out
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a mapping, such as {{key: value}}, not {shown(value)}")
    for key, item in value.items():
        if not (isinstance(key, str) and key.isidentifier()):
            raise ValueError(f"{shown(key)} cannot be the name of a keyword argument")
        if not _is_plain(item):
            raise ValueError(f"{key} must be made of text, finite numbers, true, false, null, lists and mappings")
    return dict(value)


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


class EnvConfig(Section):
    """The environment that each worker simulates."""

    name: Fixed[str] = "tabletop"
    """Which environment: the embedded MuJoCo tabletop scene, a suite of LIBERO (docs/libero.md), or one of your own:
    `module:function`, or the name that an installed package gives it (docs/your_environment.md)."""
    options: Fixed[dict[str, Any]] = {}
    """yours: keyword arguments of the function that describes your environment."""
    layout: Fixed[Literal["fixed", "swap2", "shuffle"]] = "swap2"
    """tabletop: where the red target plate lies (always in one place, in one of two, or anywhere)."""
    max_episode_steps: Fixed[int | None] = Field(None, gt=0)
    """Environment steps after which an episode is truncated; null means 50 for the tabletop, and for LIBERO what
    `preset` says about the suite."""
    chunk: Fixed[int] = Field(5, gt=0)
    """Environment steps that a decision executes, out of the policy's action horizon."""
    reward: Fixed[Literal["success", "environment"]] = "success"
    """What the agent maximises: success, by the next two settings; or the environment's own rewards, summed over the
    executed steps of a decision, of which step k is discounted by gamma^k where `sac.discount_per` is `env_step`
    (docs/adapters.md)."""
    use_step_penalty: Fixed[bool] = True
    """Reward -1 per decision and 0 for the one that succeeds; if false, 0 and 1."""
    reward_rule: Fixed[Literal["chunk_success", "first_step"]] = "chunk_success"
    """`chunk_success`: a decision counts as successful when any of its steps is; `first_step`: only when its
    first step is (RLinf's rule)."""
    preset: Fixed[Literal["openpi", "rlinf", "lerobot"]] = "openpi"
    """LIBERO: whose protocol `max_episode_steps`, `settling_steps` and `seeding` follow where they are null."""
    task_ids: Fixed[list[int] | None] = None
    """LIBERO: numbers of the suite's tasks to play; null means all."""
    init_states: Fixed[list[int] | None] = None
    """LIBERO: which of a task's published initial states (0 to 49 in its own suites) to start from; null means all.
    RLinf's DSRL plays number 0 of task 0 alone (`configs/libero_spatial_pi0.yaml`)."""
    scene_order: Announced[Literal["sampled", "cycled"]] = "sampled"
    """LIBERO: an episode's task and initial state are drawn, or follow one another: all initial states of the first
    task, then those of the next."""
    instructions: Fixed[Literal["names", "bddl"] | None] = None
    """LIBERO: what the policy is told: the names of the tasks' files, which is what LIBERO's benchmark gives, or what
    their BDDL files say; null means names in LIBERO's own five suites, and BDDL files in variations of them."""
    settling_steps: Fixed[int | None] = Field(None, ge=0)
    """LIBERO: steps before an episode that let the objects come to rest; null means what `preset` says."""
    seeding: Fixed[Literal["episode", "fixed", "task"] | None] = None
    """LIBERO: what places the furniture, which initial states leave open: a seed drawn for each episode, the same
    seed before every episode, or one seed for a task, of whose resets initial state k takes the k-th; null means
    what `preset` says."""
    image_size: Fixed[int] = Field(224, gt=0)
    """LIBERO: height and width of the images for the policy."""
    render_size: Fixed[int | None] = Field(None, gt=0)
    """LIBERO: height and width that the cameras are rendered with, before resizing; null means what `preset` says."""
    antialias: Fixed[bool | None] = None
    """LIBERO: average over what a new pixel covers when the policy's images are resized, as openpi's client does; null
    means what `preset` says."""
    rotate_images: Fixed[bool] = True
    """LIBERO: turn the images by 180 degrees, as published policies were trained."""
    render_quality: Fixed[Literal["exact", "fast"]] = "exact"
    """LIBERO: `exact`: LIBERO's own pixels; `fast`: without reflections and multisampling, with simpler meshes and
    smaller textures, which takes less than half the time where a CPU renders and differs visibly."""

    _prepare_options = field_validator("options", mode="before")(prepare_options)

    @model_validator(mode="after")
    def _check(self) -> EnvConfig:
        for name in ("task_ids", "init_states"):
            numbers = getattr(self, name)
            if numbers is not None and not 0 < len(set(numbers)) == len(numbers):
                raise ValueError(f"{name} must name at least one number and none twice; null means all")
        if self.reward == "environment" and not (self.use_step_penalty and self.reward_rule == "chunk_success"):
            raise ValueError(
                "use_step_penalty and reward_rule say what a success is worth, which reward: environment leaves to the "
                "environment; leave them out, or set reward to success"
            )
        return self


class PolicyConfig(Section):
    """The frozen flow-matching policy."""

    type: Announced[str | None] = None
    """The class of a policy of your own, like `my_module:MyPolicy` (docs/your_policy.md); null means what the
    checkpoint says that it is: a Pi0, or LeRobot's diffusion policy."""
    options: Fixed[dict[str, Any]] = {}
    """yours: keyword arguments of the policy's class."""
    checkpoint: Announced[str | None] = None
    """Directory with the policy's weights as safetensors, from openpi, RLinf, LeRobot or this project, or a model of
    the Hugging Face hub, `owner/name` or `owner/name@revision` (docs/pi0.md); null means the embedded tabletop
    policy, which LIBERO cannot use."""
    tokenizer: Announced[str | None] = None
    """A `tokenizer.json` or sentencepiece `.model`, or a directory or a model of the hub with one; null means the
    checkpoint's own."""
    norm_stats: Announced[str | None] = None
    """openpi's `norm_stats.json`, or a directory with one; null means what the checkpoint holds."""
    action_horizon: Announced[int | None] = Field(None, gt=0)
    """Action slots of one sampled chunk; null means what config.json says, else 50 for Pi0 and 10 for Pi0.5."""
    delta_action_dims: Announced[int | None] = Field(None, ge=0)
    """How many dimensions of the robot's state, from the first, are added to its actions (openpi's
    `extra_delta_transform` is 6); null means 6 for openpi's and RLinf's Pi0, and 0 for others."""
    dtype: Announced[Literal["auto", "float32", "bfloat16"]] = "auto"
    """Type of the transformers' weights and arithmetic; `auto` is bfloat16 on a GPU and float32 on the CPU."""
    prefill_precision: Announced[Literal["dtype", "fp8"]] = "dtype"
    """What the observation's matrix products, most of the policy's work, round their inputs to: `dtype`: what `dtype`
    says; `fp8`: 8 bits with a scale for each token and each output channel, on GPUs of compute capability 8.9 or later
    (an L4, an RTX 4090, an H100), and simulated on a CPU (docs/pi0.md)."""
    ignore_render_quality: Announced[bool] = False
    """LIBERO: play even if the policy, or the resumed run, was trained on images of the other
    `env.render_quality`."""
    denoise_steps: Fixed[int] = Field(10, gt=0, le=1000)
    """Euler steps from noise (t=1) to action (t=0)."""
    compile: Announced[bool] = False
    """Let torch.compile fuse the policy's kernels: half as many to launch, after a minute or more at the start for each
    batch size and prompt length."""
    kernels: Announced[Literal["auto", "torch", "triton"]] = "auto"
    """Which kernels compute what lies between a Pi0's matrix products: `torch`: torch's own; `triton`: fused ones for a
    GPU, which have not run on one yet (docs/gpu.md); `auto` is `torch` until they have. Not with `compile`."""
    graphs: Announced[Literal["auto", "off"]] = "auto"
    """`auto`: on a GPU the policy is captured in CUDA graphs; `off`: every kernel is launched each time, which takes
    longer at small batches."""

    _prepare_options = field_validator("options", mode="before")(prepare_options)

    @model_validator(mode="after")
    def _check(self) -> PolicyConfig:
        if self.compile and self.kernels == "triton":
            raise ValueError("compile and kernels: triton both replace torch's kernels; leave one of them out")
        return self

    def overrides(self) -> dict[str, Any]:
        """What the user says about the checkpoint itself, as keyword arguments of `pi0.files.find_policy`.

        A model of the hub has become the directory that it was downloaded to.
        """
        given = self.model_dump(include={"tokenizer", "norm_stats", "action_horizon", "delta_action_dims"})
        return given | {"tokenizer": self.tokenizer and local_path(self.tokenizer)}


class SacConfig(Section):
    """DSRL-SAC and DSRL-NA: networks, losses and optimisation of the agent."""

    algorithm: Fixed[Literal["sac", "na"]] = "sac"
    """`sac`: the critic judges noise; `na`: it judges the actions that the policy makes of noise, and a second critic,
    which learns from it what noise is worth, trains the actor (docs/learner.md). `na` needs a Pi0."""
    cameras: Fixed[list[int]] = [0]
    """Numbers of the cameras that the agent sees, out of those that the environment shows the policy: 0 is LIBERO's
    agentview and the tabletop's front, 1 their wrist camera. The pictures are stacked along the channels, and an update
    augments all pictures of one moment alike, as official DSRL does."""
    instruction: Fixed[Literal["none", "task", "embedding"]] = "none"
    """What the agent is told of the policy's instruction, where the environment has more than one (docs/tuning.md):
    `none`: nothing; `task`: which of the run's it is, so that it knows no others; `embedding`: the mean of the policy's
    own embeddings of its words, which a Pi0 has."""
    instruction_dim: Fixed[int] = Field(0, ge=0)
    """Width of what it is told; left out, it is the number of the environment's instructions for `task`, 64 for
    `embedding`, and 0 where there is one instruction only."""
    image_pool: Fixed[int] = Field(2, ge=1)
    """Average-pool the 64x64 image by this factor, a divisor of 64, before the convolutions (2 means 32x32)."""
    conv_channels: Fixed[list[int]] = [32]
    """Output channels of each convolution of the image encoder."""
    conv_kernels: Fixed[list[int]] = [4]
    """Kernel size of each convolution."""
    conv_strides: Fixed[list[int]] = [4]
    """Stride of each convolution."""
    conv_padding: Fixed[int] = Field(0, ge=0)
    """Zero padding of each convolution."""
    image_latent_dim: Fixed[int] = Field(64, gt=0)
    """Width of the encoded image."""
    image_range: Fixed[Literal["zero_one", "minus_one_one"]] = "zero_one"
    """Pixels are scaled to [0, 1] (official DSRL) or [-1, 1] (RLinf)."""
    state_dim: Fixed[int] = Field(8, gt=0)
    """Width of the robot's state; left out, it is the environment's."""
    state_latent_dim: Fixed[int] = Field(64, ge=0)
    """Width of the encoded robot state; 0 means that the state is used as it is."""
    hidden_dims: Fixed[list[int]] = [128, 128, 128]
    """Hidden layers of the actor's and of each Q head's MLP."""
    num_q_heads: Fixed[int] = Field(10, gt=0)
    """Number of Q functions in the critic. In `configs/libero_spatial_pi0.yaml` ten have 545,290 parameters, which are
    the "~500K" of RLinf's guide; the whole critic has 2,671,978, and the actor 2,185,248."""
    actor_layer_norm: Fixed[bool] = False
    """LayerNorm after each hidden layer of the actor."""
    critic_layer_norm: Fixed[bool] = True
    """LayerNorm after each hidden layer of the critic."""
    init: Fixed[Literal["orthogonal", "rlinf", "default"]] = "orthogonal"
    """Initialisation: `orthogonal`: of convolutions and MLPs (official DSRL); `rlinf`: RLinf's, which differs in the
    state's encoder and the actor's MLP (torch's default), and in the Q heads (Kaiming normal); `default`: torch's
    default everywhere. All have a small last layer."""
    noise_dim: Fixed[int] = Field(32, gt=0)
    """Width of one noise vector; left out, it is the policy's action width."""
    noise_layout: Fixed[Literal["repeat", "knots", "per_slot", "shift"]] = "repeat"
    """`repeat`: one vector for all slots of the action horizon; `knots`: a few, interpolated over the slots;
    `per_slot`: a vector for each slot; `shift`: one, added to noise of the policy's own in every slot. All keep the
    variance of noise that is N(0, I) (docs/tuning.md)."""
    noise_knots: Fixed[int] = Field(2, gt=0, le=1024)
    """knots: how many vectors the agent chooses, at most one for each slot; 1 is `repeat`."""
    noise_shift: Fixed[float] = Field(0.5, gt=0, lt=1)
    """shift: weight s of the agent's vector; the slots' own noise has sqrt(1 - s^2)."""
    action_magnitude: Fixed[float] = Field(0.4, gt=0)
    """How far from zero the actor's noise may be: it is tanh(.) times this. Official DSRL uses 1.0 for LIBERO."""
    gamma: Fixed[float] = Field(0.979, gt=0, le=1)
    """Discount factor of an environment step or a decision, see `discount_per`."""
    discount_per: Fixed[Literal["env_step", "decision"]] = "env_step"
    """`env_step`: a decision that executed k steps is discounted by gamma^k; `decision`: by gamma."""
    tau: Announced[float] = Field(0.02, gt=0, le=1)
    """Coefficient of the target network's soft update."""
    batch_size: Announced[int] = Field(128, gt=0)
    """Transitions in a gradient update."""
    actor_lr: Announced[float] = Field(1e-3, gt=0)
    """Adam learning rate of the actor."""
    critic_lr: Announced[float] = Field(1e-3, gt=0)
    """Adam learning rate of the critic."""
    alpha_lr: Announced[float] = Field(3e-3, ge=0)
    """Adam learning rate of the temperature."""
    lr_schedule: Announced[Literal["constant", "step", "linear"]] = "constant"
    """How the learning rates of actor and critics fall, but not the temperature's, and how `target_entropy` becomes
    `final_target_entropy`: `step`: all at once at `lr_decay_begin`; `linear`: evenly from there to `lr_decay_end`."""
    lr_final_fraction: Announced[float] = Field(0.2, gt=0, le=1)
    """step, linear: what remains of the learning rates in the end, as a fraction of them."""
    lr_decay_begin: Announced[int] = Field(20_000, gt=0)
    """step, linear: number of updates after which the learning rates begin to fall."""
    lr_decay_end: Announced[int] = Field(40_000, gt=0)
    """linear: number of updates after which they have fallen to `lr_final_fraction`."""
    actor_betas: Announced[tuple[float, float]] = (0.9, 0.999)
    """Adam betas of the actor."""
    actor_grad_clip: Announced[float | None] = Field(10.0, gt=0)
    """The actor's gradient is clipped to this norm; null switches clipping off."""
    critic_grad_clip: Announced[float | None] = Field(10.0, gt=0)
    """The critic's gradient is clipped to this norm; null switches clipping off."""
    alpha_grad_clip: Announced[float | None] = Field(10.0, gt=0)
    """The temperature's gradient is clipped to this norm; null switches clipping off."""
    alpha_type: Fixed[Literal["softplus", "exp"]] = "softplus"
    """How the temperature is parametrised."""
    initial_alpha: Fixed[float] = Field(0.005, gt=0)
    """Temperature at the start."""
    target_entropy: Announced[float] = -16.0
    """Entropy that the temperature steers towards: that of the action before `action_magnitude` scales it. Where a
    published value means the scaled noise (official DSRL's does), subtract noise_dim * ln(action_magnitude) from it:
    at 0.4, -16 here is -45.3 there."""
    final_target_entropy: Announced[float | None] = None
    """step, linear: what `target_entropy` has become in the end, at the same updates as the learning rates fall (which
    stay what they are with `lr_final_fraction: 1`); null means that it stays what it is."""
    q_aggregation: Announced[Literal["mean", "min"]] = "mean"
    """How the Q heads are combined, in the target and in the actor's loss."""
    entropy_backup: Fixed[bool] = False
    """Subtract alpha*log_prob of the next action in the target, as plain SAC does."""
    log_std_min: Fixed[float] = -20.0
    """Lower bound of the actor's log standard deviation (-20 and 2 are those of official DSRL and RLinf)."""
    log_std_max: Fixed[float] = 2.0
    """Upper bound of the actor's log standard deviation."""
    train_actor_steps: Announced[int] = Field(10, ge=0)
    """The actor and the temperature are first updated after this many critic updates, as RLinf's guide says (its code
    counts trajectories)."""
    critic_in_actor_loss: Announced[Literal["before", "after"]] = "before"
    """The critic that an update's actor loss asks: the one from before its step in the same update, or from after it;
    official DSRL and RLinf do the latter, which takes another encoding of the observations. `na`: no effect, the
    actor's loss asks the noise critic."""
    noise_critic_steps: Announced[float] = Field(0.5, gt=0, le=100)
    """na: gradient steps of the noise critic per update of the others, each on a batch of its own; of a fraction,
    such as 0.5, one comes with every second update (official DSRL: 10 after every 20)."""
    noise_critic_noise: Announced[Literal["gaussian", "squashed"]] = "gaussian"
    """na: the noise that the noise critic learns from: N(0, I), as in the paper; or tanh of it times
    `action_magnitude`, which lies where the actor's does. With a small `action_magnitude` hardly any of the former
    does."""
    augmentation: Announced[Literal["none", "crop", "crop_colour"]] = "none"
    """Image augmentation of observation and next observation: random shift by up to `augmentation_pad` pixels; with
    `crop_colour`, for four images in five, also jitter of brightness, contrast, saturation and hue. Official DSRL does
    both, RLinf neither."""
    augmentation_pad: Announced[int] = Field(4, gt=0)
    """Largest random shift in pixels."""
    imitation_weight: Announced[float] = Field(0.1, ge=0)
    """replay.demonstrations: weight of -log pi of the demonstrated noise in the actor's loss, falling linearly to 0;
    0 means that the actor learns of demonstrations by the critic alone."""
    imitation_decay: Announced[int] = Field(2000, gt=0)
    """replay.demonstrations: number of updates after which `imitation_weight` has fallen to 0."""
    imitation_updates: Fixed[int] = Field(300, ge=0)
    """replay.demonstrations: updates of the actor by the demonstrated noise alone, before the first decision."""
    evaluation_noise: Announced[Literal["deterministic", "stochastic"]] = "deterministic"
    """Evaluate with tanh(mean) or with samples."""

    @model_validator(mode="after")
    def _check(self) -> SacConfig:
        if not 0 < len(set(self.cameras)) == len(self.cameras) or min(self.cameras) < 0:
            raise ValueError("cameras must name at least one of the environment's cameras, such as [0], and none twice")
        lengths = {len(self.conv_channels), len(self.conv_kernels), len(self.conv_strides)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError("conv_channels, conv_kernels and conv_strides must have the same length, at least 1")
        if SAC_IMAGE_SIZE % self.image_pool:
            raise ValueError(f"image_pool must divide {SAC_IMAGE_SIZE}, {self.image_pool} does not")
        size = SAC_IMAGE_SIZE // self.image_pool
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            if kernel < 1 or stride < 1:
                raise ValueError("conv_kernels and conv_strides must be positive")
            size = (size + 2 * self.conv_padding - kernel) // stride + 1
            if size < 1:
                raise ValueError("the convolutions leave no pixels; use smaller kernels or strides")
        if not self.hidden_dims or min(self.hidden_dims + self.conv_channels) < 1:
            raise ValueError("hidden_dims and conv_channels must be positive, hidden_dims not empty")
        if not all(0 <= beta < 1 for beta in self.actor_betas):
            raise ValueError(f"actor_betas must be in [0, 1), not {list(self.actor_betas)}")
        if self.log_std_min >= self.log_std_max:
            raise ValueError("log_std_min must be below log_std_max")
        if self.lr_schedule == "linear" and self.lr_decay_begin >= self.lr_decay_end:
            raise ValueError(
                f"lr_decay_begin must be below lr_decay_end with lr_schedule linear, not {self.lr_decay_begin} and "
                f"{self.lr_decay_end}"
            )
        return self

    @property
    def step_discount(self) -> float:
        """The discount of a step within a decision."""
        return self.gamma if self.discount_per == "env_step" else 1.0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of the image that the agent sees: [64, 64, 3 * cameras]."""
        return sac_image_shape(len(self.cameras))

    def with_widths(self, state_dim: int, noise_dim: int, instructions: int = 1) -> SacConfig:
        """These settings with the widths of an environment, which has so many different instructions, and a policy,
        where none was given."""
        instruction_dim = {"none": 0, "task": instructions, "embedding": EMBEDDING_DIM}[self.instruction]
        widths = {
            "state_dim": state_dim,
            "noise_dim": noise_dim,
            "instruction_dim": instruction_dim if instructions > 1 else 0,
        }
        return self.model_copy(update={key: widths[key] for key in widths.keys() - self.model_fields_set})

    def judging_actions(self, action_dim: int) -> SacConfig:
        """These settings for a critic of actions: a chunk is to it what noise is with a vector for each slot."""
        return self.model_copy(update={"noise_dim": action_dim, "noise_layout": "per_slot"})

    def noise_width(self, horizon: int) -> int:
        """Width A of the agent's action: of one noise vector, of the knots, or of one for each of `horizon` slots."""
        return self.noise_dim * {"per_slot": horizon, "knots": self.noise_knots}.get(self.noise_layout, 1)

    def normal_width(self, horizon: int) -> int:
        """How many standard normal numbers a decision draws: those of `horizon` slots, which the layouts share with the
        agent; only with `shift` the agent has others."""
        return self.noise_dim * (horizon + (self.noise_layout == "shift"))

    def imitation(self, updates: int) -> float:
        """The weight of imitation after so many updates."""
        return self.imitation_weight * max(0.0, 1.0 - updates / self.imitation_decay)

    def decayed(self, updates: int) -> float:
        """How far `lr_schedule` has come after so many updates: 0 before it begins, 1 at its end."""
        if self.lr_schedule == "constant" or updates < self.lr_decay_begin:
            return 0.0
        if self.lr_schedule == "step" or updates >= self.lr_decay_end:
            return 1.0
        return (updates - self.lr_decay_begin) / (self.lr_decay_end - self.lr_decay_begin)

    def lr_fraction(self, updates: int) -> float:
        """What the learning rates of actor and critics are multiplied by after so many updates."""
        decayed = self.decayed(updates)
        return self.lr_final_fraction if decayed == 1.0 else 1.0 - decayed * (1.0 - self.lr_final_fraction)

    def target_entropy_after(self, updates: int) -> float:
        """What the temperature steers the entropy towards after so many updates."""
        begin, end, decayed = self.target_entropy, self.final_target_entropy, self.decayed(updates)
        if end is None:
            return begin
        return end if decayed == 1.0 else begin + decayed * (end - begin)


class ReplayConfig(Section):
    """The shared-memory ring that holds transitions."""

    capacity: Announced[int] = Field(40_000, ge=64)
    """Rows for all workers together; a row takes 12.5 kB, and 12.3 more for each further one of `sac.cameras`."""
    warmup_decisions: Announced[int] = Field(128, ge=1)
    """Decisions before learning starts, whose noise `warmup` says. Where it is not given, a larger `sac.batch_size`
    raises it to a batch."""
    warmup: Announced[Literal["gaussian", "actor", "base"] | None] = None
    """Noise of the warm-up: `gaussian`: unsquashed N(0, I), laid out as `sac.noise_layout` says (official DSRL-SAC);
    `actor`: the untrained actor's (RLinf); `base`: the policy's own, independent in every slot (official DSRL-NA). With
    DSRL-SAC, `repeat` and `knots` cannot describe it. null means `actor` with `sac.algorithm: sac`, and `base` with
    `na`."""
    demonstrations: Fixed[list[str] | None] = None
    """Files with demonstrations of the task, which become rows of their own: LIBERO's HDF5, directories of
    LeRobotDatasets, or what `pretraining.make_tabletop_demonstrations --task` writes (docs/demonstrations.md)."""
    demonstration_cameras: Fixed[list[str] | None] = None
    """demonstrations: a LeRobotDataset's features that are the environment's cameras, in its order; null means all that
    are pictures, in the order of its `meta/info.json`."""
    demonstration_share: Announced[float] = Field(0.25, gt=0, lt=1)
    """demonstrations: share of every batch that is drawn from them."""
    demonstration_error: Fixed[float] = Field(0.2, gt=0)
    """demonstrations: largest root mean square error, in normalised actions, between a demonstrated chunk and what the
    policy makes of the nearest noise that was found; what is farther is left out."""

    @field_validator("demonstrations", "demonstration_cameras", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [str(value)] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> ReplayConfig:
        if self.demonstrations is not None and not 0 < len(set(self.demonstrations)) == len(self.demonstrations):
            raise ValueError("demonstrations must name at least one file and none twice; null means none")
        cameras = self.demonstration_cameras
        if cameras is not None and not 0 < len(set(cameras)) == len(cameras):
            raise ValueError("demonstration_cameras must name at least one camera and none twice; null means all")
        return self


class InferenceConfig(Section):
    """The process that batches observations and samples action chunks."""

    buckets: Announced[list[int]] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    """Available batch sizes, in increasing order. A batch is padded to the next one if that fills 90 % of it, and else
    made smaller (docs/throughput.md)."""
    batch_wait_ms: Announced[float | None] = Field(None, ge=0, le=60_000)
    """How long to wait for more observations when not all are ready; null means not at all on a GPU, and 1 ms on a
    CPU, whose cores the workers need to become ready."""
    threads: Announced[int | None] = Field(None, gt=0, le=1024)
    """CPU threads of the inference process; null means a quarter of the cores, but at least one."""

    @model_validator(mode="after")
    def _check(self) -> InferenceConfig:
        if not self.buckets or sorted(set(self.buckets)) != self.buckets or self.buckets[0] < 1:
            raise ValueError("buckets must be positive and strictly increasing, such as [1, 2, 4, 8]")
        return self


class LearnerConfig(Section):
    """The process that updates the SAC agent."""

    device: Announced[str | None] = Field(None, pattern=r"^(cpu|cuda(:\d+)?)$")
    """Device of the learner: `cpu`, `cuda` or one GPU of several, such as `cuda:1`; null means the policy's."""
    threads: Announced[int | None] = Field(None, gt=0, le=1024)
    """CPU threads of the learner process; null means a quarter of the cores, but at least one."""
    precision: Announced[Literal["ieee", "tf32", "bf16"]] = "ieee"
    """What an update's convolutions and matrix products round their inputs to: `ieee`: float32, nothing is rounded;
    `tf32`: 10 bits, on a GPU only; `bf16`: 7 bits. Weights, losses and optimiser are float32 (docs/learner.md)."""
    graphs: Announced[Literal["auto", "off"]] = "auto"
    """`auto`: on a GPU an update is captured in a CUDA graph; `off`: every kernel is launched each time."""
    policy_prefixes: Announced[Literal["encode", "keep"]] = "encode"
    """na: `encode`: the learner's copy of the policy encodes the observations of every batch; `keep`: it encodes each
    row of the replay ring once, and the learner keeps the keys and values (35 kB a row for the tabletop's policy, 10 MB
    for a full-size Pi0)."""
    policy_rows: Announced[int] = Field(64, gt=0, le=4096)
    """na: how many rows the learner's own copy of the policy samples at a time; fewer need less memory."""
    compile: Announced[bool] = False
    """Let torch.compile fuse an update's kernels, after a minute or so at the start. On the CPU it needs a C++ compiler
    (docs/learner.md)."""
    publish_interval: Announced[int] = Field(10, gt=0)
    """Gradient updates between two broadcasts of the actor's weights."""


class CheckpointConfig(Section):
    """How often checkpoints are written, and how many are kept."""

    interval_minutes: Announced[float] = Field(5.0, gt=0)
    """Minutes between two checkpoints while the run goes on; the last one is written when it ends."""
    keep: Announced[int] = Field(2, gt=0)
    """How many checkpoints are kept; older ones are deleted."""


class EvaluationConfig(Section):
    """Evaluation while the run goes on (docs/evaluation.md)."""

    every_decisions: Announced[int | None] = Field(None, gt=0)
    """Decisions from one evaluation to the next; null, here and in `every_minutes`, means that there is none."""
    every_minutes: Announced[float | None] = Field(None, gt=0)
    """Minutes from one evaluation to the next, instead of decisions."""
    episodes: Announced[int] = Field(50, gt=0, le=1_000_000)
    """Held-out episodes of an evaluation, the same each time; those of LIBERO are spread evenly over the tasks."""
    actors: Announced[int] = Field(2, gt=0, le=MOST_ACTORS)
    """How many environment workers play them, beside those of the training."""
    films: Announced[int] = Field(0, ge=0)
    """How many of the episodes are filmed in each evaluation, those of different tasks first."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if self.every_decisions is not None and self.every_minutes is not None:
            raise ValueError("every_decisions and every_minutes cannot be combined; leave one out")
        return self

    @property
    def lanes(self) -> int:
        """The number of its environment workers; 0 without evaluation."""
        wanted = self.every_decisions is not None or self.every_minutes is not None
        return min(self.actors, self.episodes) if wanted else 0


class GroupConfig(Section):
    """Groups, where there are any: how they share a run (docs/groups.md)."""

    gpus: Announced[int] = Field(1, ge=0, le=64)
    """GPUs that each group has, of which its policy uses the first; 0: its policy is computed on the CPU."""
    cpus: Announced[int] = Field(1, gt=0, le=1024)
    """ray: CPU cores that each group asks the cluster for."""
    publish_s: Announced[float] = Field(1.0, gt=0, le=60)
    """Seconds between two broadcasts of the actor's weights to the groups."""
    window_rows: Announced[int] = Field(256, ge=32, le=65_536)
    """How many rows a group may have under way to the learner's side."""
    wait_s: Announced[float] = Field(300.0, gt=0)
    """ray: how long a run waits for a cluster that is gone before it writes a checkpoint and ends."""
    address: Announced[str | None] = None
    """ray: the address by which groups reach this machine; null means the one that it reaches the cluster from."""
    ports: Announced[list[int] | None] = None
    """ray: two ports of this machine for rows and weights; null means free ones."""

    @model_validator(mode="after")
    def _check(self) -> GroupConfig:
        if self.ports is not None and not (
            len(set(self.ports)) == len(self.ports) == 2 and all(0 < port < 65536 for port in self.ports)
        ):
            raise ValueError("ports must be two different numbers below 65536, such as [7001, 7002]")
        return self


class LogConfig(Section):
    """What the run shows of itself while it goes on."""

    interval_s: Free[float] = Field(1.0, gt=0)
    """Seconds between two refreshes of the console and of TensorBoard."""
    loggers: Free[list[Literal["tensorboard", "wandb", "trackio"]]] = ["tensorboard"]
    """Where the curves go: TensorBoard's files in the run directory, Weights & Biases, Trackio (docs/start.md)."""
    project: Free[str] = "dsrl_async"
    """wandb, trackio: the project that the run belongs to."""
    console: Free[Literal["auto", "live", "plain", "off"]] = "auto"
    """A live display, plain lines or nothing; `auto` takes the live display where there is a terminal."""


class Config(Section):
    """The run as a whole."""

    actors: Announced[int] = Field(16, gt=0, le=MOST_ACTORS)
    """How many environment workers, in each of the `groups`: processes that run one environment each."""
    groups: Announced[int] = Field(1, gt=0, le=1024)
    """How many groups: environment workers with a policy on a GPU of their own, all for one learner (docs/groups.md).
    """
    ray: Announced[str | None] = None
    """Address of a Ray cluster on whose machines the groups are, or `auto`; null: all of them are on this machine."""
    seed: Announced[int] = Field(0, ge=0, lt=2**63)
    """Seed of everything random."""
    run_dir: Free[str | None] = None
    """Directory that the run is written to; null means `runs/<date>-<time>-<environment>`."""
    resume: Free[str | None] = None
    """Directory of a run to continue, or one of its checkpoints, with its settings; options override them, also for
    later resumes (`--serial false` takes back `--serial`). See docs/resuming.md."""
    serial: Announced[bool] = False
    """Run everything in one process and a fixed order: reproducible bit for bit, and friendly to a debugger."""
    max_minutes: Announced[float | None] = Field(None, gt=0)
    """Stop after this many minutes; a resumed run has as many again."""
    max_decisions: Announced[int | None] = Field(None, gt=0)
    """Stop after this many decisions, counted over all sessions of a run."""
    profile: Free[bool] = False
    """Find out what holds throughput back: write a report and a trace to the run directory's `profile`, at the end
    and on SIGUSR1 (docs/profiling.md)."""
    stop_at_success: Announced[float | None] = Field(None, gt=0, le=1)
    """Stop when the success rate of the last 100 episodes reaches this, such as 0.9; a resumed run counts those before
    too."""
    replay_ratio: Announced[float] = Field(1.0, gt=0)
    """Gradient updates per decision, counted from the end of the warm-up."""
    replay_ratio_tolerance: Announced[float] = Field(0.02, gt=0, lt=1)
    """How far the number of updates may be from `replay_ratio` x decisions, as a fraction of it."""
    throttle_actors: Announced[bool] = True
    """Workers wait while the learner is behind; if false, only the learner waits, while it is ahead."""
    device: Announced[Literal["auto", "cpu", "cuda"]] = "auto"
    """Device of the policy, and of the learner unless `learner.device` names another; `auto` is CUDA if there is
    any."""
    heartbeat_timeout_s: Announced[float] = Field(120.0, gt=0)
    """A process that gives no sign of life for this long is taken for dead and replaced; so is a worker, or the
    template of all workers, that takes this long to make or reset an environment."""
    env: EnvConfig = EnvConfig()
    policy: PolicyConfig = PolicyConfig()
    sac: SacConfig = SacConfig()
    replay: ReplayConfig = ReplayConfig()
    inference: InferenceConfig = InferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    group: GroupConfig = GroupConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.serial and (self.device == "cuda" or (self.learner.device or "cpu") != "cpu"):
            raise ValueError("serial mode runs on the CPU; drop --serial or set device and learner.device to cpu")
        if self.learner.compile and self.sac.algorithm == "na":
            raise ValueError(
                "learner.compile cannot fuse an update of sac.algorithm na, which samples the policy; leave it out"
            )
        if self.grouped:
            self._check_groups()
        actors = self.groups * self.actors
        if self.replay.capacity < actors * MIN_LANE_ROWS:
            raise ValueError(
                f"replay.capacity must be at least {MIN_LANE_ROWS} rows for each of the {actors} actors "
                f"({actors * MIN_LANE_ROWS}); raise it or lower actors"
            )
        if "warmup_decisions" not in self.replay.model_fields_set:
            self.replay.warmup_decisions = max(self.replay.warmup_decisions, self.sac.batch_size)
        if self.replay.capacity < self.replay.warmup_decisions:
            raise ValueError("replay.capacity must not be below replay.warmup_decisions")
        if self.replay.warmup_decisions < self.sac.batch_size:
            raise ValueError(
                "replay.warmup_decisions must be at least sac.batch_size, or the first batch cannot be filled"
            )
        layout = self.sac.noise_layout
        if self.warmup == "base" and self.sac.algorithm == "sac" and layout in ("repeat", "knots"):
            raise ValueError(
                f"replay.warmup: base is noise that no vector of sac.noise_layout {layout} describes, so that DSRL-SAC "
                "cannot learn from it; take gaussian or actor, sac.noise_layout shift or per_slot, or sac.algorithm na"
            )
        return self

    def _check_groups(self) -> None:
        if self.serial:
            raise ValueError("serial mode is one process, and groups are many; leave out serial, or groups and ray")
        if self.evaluation.lanes:
            raise ValueError(
                "evaluation.every_decisions and every_minutes do not go with groups yet; leave them out, and evaluate "
                "the checkpoints of the run"
            )
        if self.groups * self.actors > MOST_ACTORS:
            raise ValueError(
                f"{self.groups} groups of {self.actors} actors are more than {MOST_ACTORS} environments; lower groups "
                "or actors"
            )
        if self.device == "cuda" and self.group.gpus == 0:
            raise ValueError("device: cuda asks for the GPU that group.gpus: 0 denies; leave one of them out")
        if self.ray is None and (self.group.address or self.group.ports):
            raise ValueError("group.address and group.ports are for groups on other machines; give ray, too")

    @property
    def grouped(self) -> bool:
        """Whether environments and policy are in groups, and not processes of this run's own."""
        return self.groups > 1 or self.ray is not None

    @property
    def warmup(self) -> Literal["gaussian", "actor", "base"]:
        """The noise of the warm-up, `replay.warmup` or what null means there."""
        return self.replay.warmup or ("base" if self.sac.algorithm == "na" else "actor")

    @property
    def lanes(self) -> int:
        """All environments: those of the training, and behind them those of the evaluation."""
        return self.actors + self.evaluation.lanes

    def batch_sizes(self) -> list[int]:
        """The sizes of `inference.buckets` up to the first that holds all environments."""
        buckets = self.inference.buckets
        return [size for size, before in zip(buckets, [0, *buckets], strict=False) if before < self.lanes]


MIN_LANE_ROWS = 16
"""Lower limit on the replay rows of a lane; with fewer, a reader loses most races with the writer."""
