"""Estimates the memory that sampling takes beside the weights, from sizes alone, before a run starts.

`bytes_per_value` is the size of an element of the transformer stacks: 4 for float32, 2 for bfloat16.
"""

from __future__ import annotations

from dsrl_async.pi0.config import Pi0Config


def buffer_bytes(config: Pi0Config, batch_size: int, language_length: int, bytes_per_value: int) -> int:
    """Memory that a `Sampler` keeps for inputs, output, keys and values, and the results of norms.

    Masks and tables (a few MB) are left out.
    """
    c = config
    inputs = 4 * 3 * c.cameras * c.image_size**2 + 8 * language_length + 4 * c.action_dim * (1 + 2 * c.action_horizon)
    prefix = c.cameras * c.image_tokens + language_length
    tokens = prefix + c.state_tokens + c.action_horizon
    keys_values = 2 * c.depth * c.kv_heads * c.head_dim * tokens
    norms = prefix * c.vlm_width + (1 + c.action_horizon) * c.expert_width
    return batch_size * (inputs + (keys_values + norms) * bytes_per_value)


def activation_bytes(config: Pi0Config, batch_size: int, language_length: int, bytes_per_value: int) -> int:
    """Memory that a `Sampler` takes temporarily while it runs.

    The peak is in an MLP of the language model: gate and up, the gate's GELU, the product of the two, and about six
    hidden states (the input of the stack and of the layer, queries, attention).
    """
    c = config
    tokens = c.cameras * c.image_tokens + language_length
    return batch_size * tokens * (4 * c.vlm_mlp + 6 * c.vlm_width) * bytes_per_value
