"""Pi0 as a frozen policy: what is known of it before it is loaded. `dsrl_async.pi0` knows nothing of the rest."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from dsrl_async.config.settings import PolicyConfig
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.embeddings import embed_prompts
from dsrl_async.pi0.files import PolicyFiles
from dsrl_async.pi0.identity import identity
from dsrl_async.pi0.memory import (
    activation_bytes,
    buffer_bytes,
    offset_bytes,
    prefix_bytes,
    simulation_bytes,
    weight_bytes,
)
from dsrl_async.pi0.tensors import parameter_count
from dsrl_async.pi0.tokenizer import check_prompt, language_slots, make_encoder, prompt_ids, unknown_words
from dsrl_async.policies.protocol import FrozenPolicy, PolicyMemory, PolicyNeeds, PolicyRecord
from dsrl_async.untrusted import shown

if TYPE_CHECKING:
    import torch

PI0_SETTINGS = frozenset(
    {
        *("tokenizer", "norm_stats", "action_horizon", "delta_action_dims"),
        *("dtype", "prefill_precision", "denoise_steps", "compile", "kernels", "ignore_render_quality"),
    }
)


def pi0_needs(config: Pi0Config) -> PolicyNeeds:
    """What a run needs for a Pi0 of these sizes."""

    def memory(settings: PolicyConfig, on_gpu: bool, batch_size: int, prompt_length: int) -> PolicyMemory:
        half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and on_gpu)
        bytes_per_value = 2 if half else 4
        fp8 = settings.prefill_precision == "fp8"
        simulation = simulation_bytes(config, batch_size, prompt_length) if fp8 and not on_gpu else 0
        return PolicyMemory(
            weight_bytes(config, bytes_per_value, fp8),
            buffer_bytes(config, batch_size, prompt_length, bytes_per_value, settings.denoise_steps)
            + (offset_bytes(config, settings.denoise_steps) if settings.kernels == "triton" else 0),
            activation_bytes(config, batch_size, prompt_length, bytes_per_value) + simulation,
        )

    def with_horizon(horizon: int) -> PolicyNeeds:
        return pi0_needs(dataclasses.replace(config, action_horizon=horizon))

    def of_prefix(settings: PolicyConfig, on_gpu: bool, prompt_length: int) -> int:
        half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and on_gpu)
        return prefix_bytes(config, prompt_length, 2 if half else 4)

    return PolicyNeeds(config, config.max_token_len, memory, with_horizon, of_prefix)


def pi0_record(files: PolicyFiles) -> PolicyRecord:
    """What is known of a Pi0 by its files."""
    config, tensors = files.config, files.tensors

    def prompt_lengths(prompts: Sequence[str]) -> list[int]:
        return language_slots(config, functools.partial(prompt_ids, make_encoder(files.tokenizer)), prompts)

    def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
        unknown: dict[str, None] = {}
        for prompt in prompts:
            try:
                check_prompt(files.tokenizer, config, prompt)
                unknown |= dict.fromkeys(unknown_words(files.tokenizer, prompt))
            except ValueError as error:
                raise ValueError(f"policy.tokenizer: {error}") from error
        if not unknown:
            return ()
        words = ", ".join(map(shown, list(unknown)[:10])) + (", ..." if len(unknown) > 10 else "")
        return (
            f"the policy's tokenizer does not know {words} in the environment's prompts, and has one token for all "
            "such",
        )

    def load(
        settings: PolicyConfig, device: torch.device, prompts: Sequence[str], progress: Callable[[], None]
    ) -> FrozenPolicy:
        from dsrl_async.pi0.checkpoint import read_policy, resolve_dtype
        from dsrl_async.pi0.policy import Pi0Policy

        fp8 = settings.prefill_precision == "fp8"
        loaded = read_policy(files, device, resolve_dtype(settings.dtype, device), progress, fp8)
        kernels: Literal["torch", "triton"] = "triton" if settings.kernels == "triton" else "torch"
        return Pi0Policy(loaded, prompts, settings.denoise_steps, settings.compile, kernels)

    kinds = "/".join(sorted({tensor.dtype for tensor in tensors.values()}))
    stored = sum(tensor.bytes for tensor in tensors.values())
    return PolicyRecord(
        type="pi0",
        description=f"{'Pi0.5' if config.pi05 else 'Pi0'} as {files.maker} stores it, {parameter_count(config):,} "
        f"parameters in {stored / 1e6:,.1f} MB of {kinds}, with tokenizer and norm stats ({files.norm_stats_source})",
        maker=files.maker,
        directory=files.directory,
        needs=pi0_needs(config),
        own_settings=PI0_SETTINGS,
        files=tuple(sorted({tensor.file for tensor in tensors.values()})),
        prompt_lengths=prompt_lengths,
        check_prompts=check_prompts,
        identity=functools.partial(identity, files),
        load=load,
        normalised=True,
        embed_prompts=functools.partial(embed_prompts, files),
    )
