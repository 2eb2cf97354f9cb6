"""Measures what `policy.prefill_precision: fp8` does to the numbers, simulated on the CPU.

    python scripts/studies/measure_fp8.py                              # the embedded policy, on its task's observations
    python scripts/studies/measure_fp8.py --size two_layers            # random weights of Pi0 at openpi's widths
    python scripts/studies/measure_fp8.py --size full --only           # 13 GB of memory

It prints how far keys and values, and actions, are from those of the same weights in float32, as a relative RMS error:
of bfloat16, which is what a GPU computes in otherwise, and of bfloat16 with the observation's matrix products in 8
bits. Without `--only` it also leaves some of these at bfloat16: the first or the last layer of a stack, all layers of
a kind.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsrl_async.bench import synthetic
from dsrl_async.bench.systems.policy import language_length, seeded_policy
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.command import guard
from dsrl_async.pi0.checkpoint import LoadedPolicy, load_policy
from dsrl_async.pi0.config import EMBEDDED_POLICY, Pi0Config
from dsrl_async.pi0.fp8 import use_fp8
from dsrl_async.pi0.memory import fp8_weights
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.processing import scale_images
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.pretraining.tabletop_demonstrations import record_episode

SEED = 0
Inputs = dict[str, Tensor]
"""Buffer of a `Sampler` -> what to fill it with."""


def observations(policy: LoadedPolicy, count: int) -> Inputs:
    """Observations of demonstrations of the embedded task, one of each, from all their parts."""
    episodes = (record_episode(SEED, index) for index in range(10 * count))
    kept = [episode for episode in episodes if episode is not None][:count]
    frames = [row * len(episode["state"]) // count for row, episode in enumerate(kept)]
    images, state = (
        torch.from_numpy(np.stack([episode[name][frame] for frame, episode in zip(frames, kept, strict=True)]))
        for name in ("images", "state")
    )
    pixels = torch.empty(*images.shape[:2], 3, *images.shape[2:4])
    scale_images(images, out=pixels)
    tokens, token_mask = policy.tokenizer(count * list(TABLETOP.prompts))
    torch.manual_seed(SEED)
    noise = torch.randn(count, policy.config.action_horizon, policy.config.action_dim)
    state = policy.normaliser.state(state)
    return {"images": pixels, "tokens": tokens, "token_mask": token_mask, "state": state, "noise": noise}


def synthetic_observations(config: dict[str, Any], count: int) -> Inputs:
    arrays = synthetic.observation(config, synthetic.prompt_lengths(config, count), SEED)
    length = language_length(arrays["token_mask"])
    cut = {name: arrays[name][:, :length] for name in ("tokens", "token_mask")}
    return {name: torch.from_numpy(array) for name, array in (arrays | cut).items()}


def run(model: Pi0, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values of what the observation fills of the buffers, and the actions, in float32."""
    batch, length = inputs["tokens"].shape
    sampler = Sampler(model, batch, length, 10)
    for name, tensor in inputs.items():
        getattr(sampler, name).copy_(tensor)
    sampler.run()
    seen = (sampler._mask[:, :, :, : sampler._state_end] == 0).transpose(2, 3)  # [B, 1, S, 1]
    keys_values = [layer[:, :, :, : sampler._state_end].float() * seen[:, None] for layer in sampler._keys_values]
    return torch.stack(keys_values), sampler.actions[..., : model.config.robot_action_dim].clone()


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


def variants(model: Pi0, only: bool) -> dict[str, list[str]]:
    """What to leave at bfloat16 -> the weights in 8 bits."""
    chosen = list(fp8_weights(model.config))
    if only:
        return {"what the setting leaves out": chosen}
    weights = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if name.startswith(("vision.layers.", "vlm.layers.")) and isinstance(module, nn.Linear)
    ]
    starts = ["vision.", "vlm."]
    for stack, depth in (("vision", model.config.vision_depth), ("vlm", model.config.depth)):
        starts += [f"{stack}.layers.{layer}." for layer in (0, depth - 1)]
    found = {"what the setting leaves out": chosen, "nothing": weights}
    found |= {start.rstrip("."): [name for name in weights if not name.startswith(start)] for start in starts}
    kinds = dict.fromkeys((name.split(".")[0], name.split(".")[-2]) for name in weights)
    for stack, kind in kinds:
        ends = f".{kind}.weight"
        found[f"{stack}, all {kind}"] = [n for n in weights if not (n.startswith(stack) and n.endswith(ends))]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["embedded", *synthetic.SIZES], default="embedded")
    parser.add_argument("--model", choices=list(synthetic.MODELS), default="pi0")
    parser.add_argument("--observations", type=int, help="how many (default: 64 embedded, else 2)")
    parser.add_argument("--only", action="store_true", help="leave nothing at bfloat16 but what the setting leaves")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    embedded = arguments.size == "embedded"
    count = arguments.observations or (64 if embedded else 2)
    if embedded:
        inputs = observations(load_policy(), count)
    else:
        sizes = synthetic.sizes(arguments.model, arguments.size)
        inputs = synthetic_observations(sizes, count)

    def model(dtype: torch.dtype) -> Pi0:
        if embedded:
            return load_policy(EMBEDDED_POLICY, dtype=dtype).model
        return seeded_policy(Pi0Config(**sizes), dtype, SEED)

    expected = run(model(torch.float32), inputs)
    bfloat16 = model(torch.bfloat16)
    print("| 8 bits, but for | products | keys and values | actions |\n|---|---|---|---|")

    def row(what: str, products: int, policy: Pi0) -> None:
        errors = map(error, run(policy, inputs), expected)
        print(f"| {what} | {products} | " + " | ".join(f"{value:.2e}" for value in errors) + " |", flush=True)

    row("everything (bfloat16)", 0, bfloat16)
    chosen = variants(bfloat16, arguments.only)
    for what, names in chosen.items():
        policy = bfloat16 if len(chosen) == 1 else model(torch.bfloat16)
        use_fp8(policy, names)
        row(what, len(names), policy)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
