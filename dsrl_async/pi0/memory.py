"""Estimates the memory that a policy takes, from sizes alone, before a run starts. This needs no torch.

`bytes_per_value` is the size of an element of the transformer stacks: 4 for float32, 2 for bfloat16.
"""

from __future__ import annotations

import functools
import math

from dsrl_async.pi0.config import Pi0Config

KEY_ALIGNMENT = 8
"""Keys and values have room for a multiple of so many tokens (`sampler.MASK_ALIGNMENT`)."""
FP8_ALIGNMENT = 16
"""Widths of a matrix product in 8 bits are multiples of this."""
CAST = ("embedding.", "vlm.", "expert.", "vision.")
"""How the parameters of the transformer stacks begin, which have the policy's dtype."""
KEPT = ("vision.patch.", "vision.position")
"""What stays in float32 of them, beside the norms of the two Gemma stacks (`Pi0.set_dtype`)."""


@functools.cache
def fp8_weights(config: Pi0Config) -> dict[str, int]:
    """The weights that `policy.prefill_precision: fp8` keeps in 8 bits, by parameter, with their output channels.

    They are those of the observation's pass, in the layers of the vision tower and of the language model. Left out is
    what makes the language model's keys and values, which the expert reads: 5 % of the products and half of the error
    (docs/measurements/pi0.md); and what has a width that `torch._scaled_mm` does not take.
    """
    from dsrl_async.pi0.tensors import model_tensors

    found = {}
    for name, parts in model_tensors(config).items():
        rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[-1]
        language = name.startswith("vlm.layers.") and not name.endswith(".qkv.weight")
        layers = language or (name.startswith("vision.layers.") and not config.vision_float32)
        is_matrix = name.endswith(".weight") and "_norm." not in name
        if layers and is_matrix and rows % FP8_ALIGNMENT == columns % FP8_ALIGNMENT == 0:
            found[name] = rows
    return found


@functools.cache  # asked for once per size of a batch and length of a prompt
def weight_bytes(config: Pi0Config, bytes_per_value: int, fp8: bool = False) -> int:
    """Memory of the weights of a loaded policy; `fp8` as in `policy.prefill_precision`."""
    from dsrl_async.pi0.tensors import model_tensors  # which needs safetensors, as nothing else here does

    eight_bits = fp8_weights(config) if fp8 else {}

    def is_cast(name: str) -> bool:
        if name.startswith("vision."):
            return not name.startswith(KEPT) and not config.vision_float32
        return name.startswith(CAST) and "_norm." not in name

    def bytes_of(name: str) -> int:
        return 1 if name in eight_bits else bytes_per_value if is_cast(name) else 4

    weights = sum(
        bytes_of(name) * sum(math.prod(part.shape) for part in parts) for name, parts in model_tensors(config).items()
    )
    return weights + 4 * sum(eight_bits.values())


def simulation_bytes(config: Pi0Config, batch_size: int, language_length: int) -> int:
    """Memory that a CPU takes beside a `Sampler`'s activations to compute in float32 what a GPU does in 8 bits."""
    tokens = batch_size * (config.cameras * config.image_tokens + language_length)
    rows, columns = 2 * config.vlm_mlp, config.vlm_width
    return 4 * (rows * columns + tokens * (rows + columns))


def buffer_bytes(
    config: Pi0Config, batch_size: int, language_length: int, bytes_per_value: int, denoise_steps: int = 10
) -> int:
    """Memory that a `Pi0Batch` keeps: inputs, outputs, keys and values, results of norms, tables over the steps."""
    c = config
    prefix, actions = c.cameras * c.image_tokens + language_length, c.action_horizon
    tokens = prefix + c.state_tokens + actions
    pixels, rotations = 3 * c.cameras * c.image_size**2, 3 * c.head_dim // 2
    robot = c.robot_state_dim + actions * c.robot_action_dim
    inputs = 5 * pixels + 9 * language_length + 4 * (c.action_dim * (1 + 2 * actions) + robot)
    keys_values = 2 * c.depth * c.kv_heads * c.head_dim * (tokens + -tokens % KEY_ALIGNMENT)
    norms = prefix * c.vlm_width + (1 + actions) * c.expert_width
    rows = batch_size * (inputs + (keys_values + norms + actions * rotations) * bytes_per_value)
    positions = c.prefix_length + c.state_tokens + actions
    tables = positions * rotations * bytes_per_value + 4 * (2 * c.depth - 1) * c.vlm_width
    tables += 4 * denoise_steps * c.expert_width
    if c.pi05:  # of each norm its scale; shift and gate, which are views of three; the gate once more, if it is cast
        cast = bytes_per_value if bytes_per_value < 4 else 0
        tables += denoise_steps * (2 * c.depth + 1) * c.expert_width * (16 + cast)
    else:
        tables += 4 * (2 * c.depth + 1 + c.action_dim) * c.expert_width
    return rows + tables


def offset_bytes(config: Pi0Config, denoise_steps: int) -> int:
    """Memory of what `policy.kernels: triton` keeps besides: the vision tower's biases, summed up from layer to layer,
    and pi0.5's shifts behind the projections, for every step."""
    c = config
    biases = 4 * (2 * c.vision_depth + 1) * c.vision_width
    layer = (c.heads + 2 * c.kv_heads) * c.head_dim + 2 * c.expert_mlp
    return biases + (4 * denoise_steps * (c.depth * layer + c.action_dim) if c.pi05 else 0)


def prefix_bytes(config: Pi0Config, language_length: int, bytes_per_value: int) -> int:
    """Memory of what `Sampler.prefix` gives for one observation."""
    c = config
    tokens = c.cameras * c.image_tokens + language_length + c.state_tokens
    return 2 * c.depth * c.kv_heads * c.head_dim * tokens * bytes_per_value + language_length


def activation_bytes(config: Pi0Config, batch_size: int, language_length: int, bytes_per_value: int) -> int:
    """Memory that a `Sampler` takes temporarily while it runs.

    The peak is in an MLP of the language model: gate and up, the gate's GELU, the product of the two; three hidden
    states (the images' and the stack's input, attention), and rotations.
    """
    c = config
    tokens = c.cameras * c.image_tokens + language_length
    rotations = 3 * c.head_dim // 2
    return batch_size * tokens * (4 * c.vlm_mlp + 3 * c.vlm_width + rotations) * bytes_per_value
