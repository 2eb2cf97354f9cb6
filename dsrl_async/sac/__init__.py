"""DSRL-SAC and DSRL-NA: the agent that chooses the noise from which the frozen policy starts denoising.

`networks` holds the actor and the critic, `agent` the training state and the update, `na` what DSRL-NA adds to both,
`flat` the contiguous parameter buffers, `augmentation` the image augmentation. Everything is fp32 and works on tensors
only.
"""

METRIC_NAMES = (
    "train/sac/critic_loss",
    "train/critic/grad_norm",
    "train/sac/actor_loss",
    "train/actor/entropy",
    "train/actor/grad_norm",
    "train/sac/alpha_loss",
    "train/sac/alpha",
    "train/sac/q_mean",
    "train/sac/target_q_mean",
)
"""Names of the metrics that `SacAgent.learn` returns, in order."""

IMITATION_METRIC_NAME = "train/sac/imitation_loss"
"""Name of the metric that follows them where there are demonstrations."""

NOISE_CRITIC_METRIC_NAMES = ("train/sac/noise_critic_loss", "train/noise_critic/grad_norm")
"""Names of the metrics that `NaAgent.distil` returns, in order."""


def metric_names(algorithm: str, imitates: bool) -> tuple[str, ...]:
    """Names of the metrics of an update, in order, by `sac.algorithm` and whether there are demonstrations."""
    imitation = (IMITATION_METRIC_NAME,) if imitates else ()
    return (*METRIC_NAMES, *imitation, *(NOISE_CRITIC_METRIC_NAMES if algorithm == "na" else ()))
