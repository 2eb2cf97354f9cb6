"""How fast sampling could be: the work of its three stages and a lower bound on a device's time for it.

A stage takes at least as long as its matrix products at the device's peak rate, and at least as long as reading its
weights once at the device's memory bandwidth. Norms, softmax and elementwise work are left out.

    python -m dsrl_async.pi0.roofline

prints the bounds of full-size Pi0 as a Markdown table, by default for an H100.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from dsrl_async.pi0.config import Pi0Config


@dataclass(frozen=True)
class Work:
    """The work of one stage."""

    flops: float
    """Floating-point operations of the matrix products per observation; a multiply-add counts as two."""
    weights: int
    """Number of parameters that are read, at any batch size."""

    def bound_s(self, batch_size: int, flops_per_s: float, bytes_per_s: float, bytes_per_weight: int = 2) -> float:
        """Lower bound on the seconds that a batch takes."""
        return max(batch_size * self.flops / flops_per_s, self.weights * bytes_per_weight / bytes_per_s)


def stages(config: Pi0Config, language_length: int, denoise_steps: int) -> dict[str, Work]:
    """The work of `vision`, `prefill` (the language model over images and prompt) and `denoise` (all steps)."""
    c = config
    tokens = c.image_tokens
    layer = 4 * c.vision_width**2 + 2 * c.vision_width * c.vision_mlp
    patch = 3 * c.patch_size**2 * c.vision_width
    vision_weights = c.vision_depth * layer + patch + c.vision_width * c.vlm_width
    attention = c.vision_depth * 2 * tokens**2 * c.vision_width
    vision = Work(2 * c.cameras * (tokens * vision_weights + attention), vision_weights)

    prefix = c.cameras * tokens + language_length
    full, keys_only = _gemma_layer(c, c.vlm_width, c.vlm_mlp)
    vlm_weights = (c.depth - 1) * full + keys_only
    attention = (c.depth - 1) * 2 * prefix**2 * c.heads * c.head_dim
    prefill = Work(2 * (prefix * vlm_weights + attention), vlm_weights)

    horizon = c.action_horizon
    expert_weights = c.depth * _gemma_layer(c, c.expert_width, c.expert_mlp)[0] + 2 * c.action_dim * c.expert_width
    if not c.pi05:
        expert_weights += c.expert_width**2
    keys = prefix + c.state_tokens + horizon
    attention = c.depth * 2 * horizon * keys * c.heads * c.head_dim
    step = 2 * (horizon * expert_weights + attention)
    return {
        "vision": vision,
        "prefill": prefill,
        "denoise": Work(denoise_steps * step, denoise_steps * expert_weights),
    }


def _gemma_layer(config: Pi0Config, width: int, mlp: int) -> tuple[int, int]:
    """Number of parameters of a layer's projections, and of those of a layer that computes keys and values only."""
    heads, kv = config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    return width * (2 * heads + kv + 3 * mlp), width * kv


def main() -> None:
    parser = argparse.ArgumentParser(description="Bounds of full-size Pi0, in milliseconds, as a Markdown table.")
    parser.add_argument("--pi05", action="store_true", help="bounds of Pi0.5 as trained for LIBERO")
    parser.add_argument("--tflops", type=float, default=800, help="rate of matrix products, 1e12 operations a second")
    parser.add_argument("--terabytes", type=float, default=3.35, help="memory bandwidth, 1e12 bytes a second")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--denoise-steps", type=int, default=10)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32])
    args = parser.parse_args()
    config = Pi0Config(pi05=True, action_horizon=10, max_token_len=200) if args.pi05 else Pi0Config()
    work = stages(config, args.prompt_tokens, args.denoise_steps)
    print("| B | " + " | ".join(work) + " | total | observations/s |")
    print("|---|" + "---|" * (len(work) + 2))
    for batch_size in args.batch_sizes:
        bounds = [stage.bound_s(batch_size, args.tflops * 1e12, args.terabytes * 1e12) for stage in work.values()]
        cells = [f"{1e3 * bound:.2f}" for bound in (*bounds, sum(bounds))]
        print(f"| {batch_size} | " + " | ".join(cells) + f" | {batch_size / sum(bounds):.0f} |")


if __name__ == "__main__":
    main()
