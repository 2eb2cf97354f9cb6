"""The update of official DSRL (dsrl_pi0, `jaxrl2`) as a measured process of compare_learner.py. Runs in
.reference/jaxrl2; the environment variable DSRL_PI0 names a checkout of https://github.com/nakamotoo/dsrl_pi0."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from learner_system import Updating, bind, serve

bind(json.loads(sys.argv[1])["threads"])  # before JAX makes its threads

sys.path.insert(0, os.environ["DSRL_PI0"])

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxrl2.agents.pixel_sac import pixel_sac_learner


def encoder(weights: dict[str, np.ndarray], convolutions: int) -> dict[str, Any]:
    layers = {
        f"Conv_{number}": {
            "kernel": weights[f"encoder.convolutions.{number}.weight"].transpose(2, 3, 1, 0),
            "bias": weights[f"encoder.convolutions.{number}.bias"],
        }
        for number in range(convolutions)
    }
    return {
        "encoder": layers,
        "Dense_0": dense(weights, "encoder.image_projection"),
        "LayerNorm_0": {"scale": weights["encoder.image_norm.weight"], "bias": weights["encoder.image_norm.bias"]},
    }


def dense(weights: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}


def actor_parameters(weights: dict[str, np.ndarray], convolutions: int, hidden: int) -> dict[str, Any]:
    """jaxrl2's parameters from those of this project's actor, by name."""
    output = dense(weights, "output")
    tensors = [np.split(tensor, 2, axis=-1) for tensor in output.values()]
    halves = [dict(zip(output, parts, strict=True)) for parts in zip(*tensors, strict=True)]
    network = {f"Dense_{number}": half for number, half in enumerate(halves)}
    network["MLP_0"] = {f"Dense_{number}": dense(weights, f"hidden.{number}") for number in range(hidden)}
    return {**encoder(weights, convolutions), "network": network}


def critic_parameters(weights: dict[str, np.ndarray], convolutions: int, hidden: int, actions: int) -> dict[str, Any]:
    """jaxrl2's parameters from those of this project's critic; its heads take the actions before the features."""
    layers: dict[str, Any] = {}
    for number in range(hidden + 1):
        kernel = weights[f"weights.{number}"]
        if number == 0:
            kernel = np.concatenate([kernel[:, -actions:], kernel[:, :-actions]], axis=1)
        layers[f"Dense_{number}"] = {"kernel": kernel, "bias": weights[f"biases.{number}"][:, 0]}
    for number in range(hidden):
        scale, shift = weights[f"norm_scales.{number}"][:, 0], weights[f"norm_shifts.{number}"][:, 0]
        layers[f"LayerNorm_{number}"] = {"scale": scale, "bias": shift}
    return {**encoder(weights, convolutions), "network": {"VmapStateActionValue_0": {"MLP_0": layers}}}


def load(settings: dict[str, Any]) -> Updating:
    sac = settings["sac"]
    with np.load(settings["file"]) as file:
        arrays = dict(file)
    images = arrays["images"][:, :: sac["image_pool"], :: sac["image_pool"], :, None]
    observations, following = (
        FrozenDict(pixels=jnp.asarray(pixels), state=jnp.asarray(state[..., None]))
        for pixels, state in zip(np.split(images, 2), np.split(arrays["states"], 2), strict=True)
    )
    actions = jnp.asarray(arrays["noise"][:, None])
    agent = pixel_sac_learner.PixelSACLearner(
        settings["seed"],
        jax.tree_util.tree_map(lambda rows: rows[:1], observations),
        actions[:1],
        actor_lr=sac["actor_lr"],
        critic_lr=sac["critic_lr"],
        temp_lr=sac["alpha_lr"],
        hidden_dims=tuple(sac["hidden_dims"]),
        cnn_features=tuple(sac["conv_channels"]),
        cnn_strides=tuple(sac["conv_strides"]),
        latent_dim=sac["image_latent_dim"],
        discount=sac["gamma"],
        tau=sac["tau"],
        critic_reduction=sac["q_aggregation"],
        encoder_type="small",
        color_jitter=sac["augmentation"] == "crop_colour",
        aug_next=sac["augmentation"] != "none",
        num_qs=sac["num_q_heads"],
        init_temperature=sac["initial_alpha"],
        target_entropy=sac["target_entropy"],
        action_magnitude=sac["action_magnitude"],
    )
    agent.discount = sac["gamma"]  # `update` reads it, but nothing sets it: a batch has its own
    if sac["augmentation"] == "none":  # which is no option there
        pixel_sac_learner.batched_random_crop = lambda key, images: images
    layers, hidden = len(sac["conv_channels"]), len(sac["hidden_dims"])
    critic = critic_parameters(of("critic", arrays), layers, hidden, actions.shape[-1])
    actor = actor_parameters(of("actor", arrays), layers, hidden)
    agent._critic, agent._target_critic_params = replaced(agent._critic, critic), as_jax(critic)
    agent._actor = replaced(agent._actor, actor)
    batch = FrozenDict(
        observations=observations,
        next_observations=following,
        actions=actions,
        rewards=jnp.asarray(arrays["reward"]),
        masks=jnp.ones(len(arrays["reward"])),
        discount=jnp.asarray(arrays["discount"]),
    )

    def update() -> Callable[[], float]:
        info = agent.update(batch)
        jax.block_until_ready((agent._actor.params, agent._critic.params, agent._target_critic_params, info))
        return lambda: float(info["critic_loss"])

    return update


def of(network: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{network}/"): value for name, value in arrays.items() if name.startswith(f"{network}/")}


def as_jax(parameters: dict[str, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map(jnp.asarray, parameters)


def replaced(state: Any, parameters: dict[str, Any]) -> Any:
    """The state of a network with other parameters, which must have the shapes of those that it has."""
    shapes = [jax.tree_util.tree_map(lambda leaf: leaf.shape, tree) for tree in (dict(state.params), parameters)]
    assert shapes[0] == shapes[1], f"jaxrl2 has the shapes {shapes[0]}, this project {shapes[1]}"
    return state.replace(params=as_jax(parameters))


if __name__ == "__main__":
    serve(load)
