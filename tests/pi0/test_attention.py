"""What attention is given: shapes and strides that a GPU's attention kernels take, and which kernels those are."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.pi0_models import make_model, make_sampler, small_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import _cur_sdpa_kernel_backends as enabled_kernels
from torch.overrides import TorchFunctionMode

import dsrl_async.pi0.model as network
import dsrl_async.pi0.sampler as sampling
from dsrl_async.host.tracing import OperationTrace
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.model import ATTENTION_KERNELS, MASKED, Pi0, Rope, attend, rope_frequency, rotate_, rotate_apart_
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.pi0.tokenizer import language_bucket


class Call(NamedTuple):
    """Of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    kernels: list[SDPBackend]


class AttentionCalls(TorchFunctionMode):
    """Records the calls under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            kernels = enabled_kernels(with_priority=True)
            self.calls.append(Call(query, key, value, kwargs.get("attn_mask"), kernels))
        return func(*args, **kwargs)


def calls_of(sampler: Sampler) -> list[Call]:
    with AttentionCalls() as recorded:
        sampler.run()
    return recorded.calls


def check(call: Call) -> None:
    """What kernels have been found to refuse, to slow down at, or to compute wrongly (pytorch issue 191937)."""
    assert call.query.shape[1] == call.key.shape[1] == call.value.shape[1], "heads are shared, not counted"
    for tensor in (call.query, call.key, call.value):
        assert all(stride or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)), "stride 0"
        assert tensor.stride(-1) == 1
    assert call.key.shape[2] % 32 != 1
    if call.mask is not None:
        assert call.mask.shape == (call.query.shape[0], 1, 1, call.key.shape[2])
        assert call.mask.dtype == call.query.dtype
        assert call.mask.stride(0) % 8 == 0, "the mask would be copied in each call"


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("pi05", [False, True])
def test_attention_gets_no_repeated_keys(pi05: bool, kv_heads: int) -> None:
    config = small_config(pi05, kv_heads)
    calls = calls_of(make_sampler(make_model(config)[0], batch=2, steps=2))
    vision, others = calls[: config.vision_depth], calls[config.vision_depth :]
    assert len(others) == config.depth - 1 + (config.depth - 1) * config.state_tokens + 2 * config.depth
    for call in calls:
        check(call)
    assert all(call.mask is None for call in vision)  # so that they get what takes no mask
    share = config.heads // kv_heads
    assert {call.query.shape[1] for call in others} == {kv_heads}
    assert others[-1].query.shape[2] == share * config.action_horizon


@pytest.mark.parametrize("config", [Pi0Config(), Pi0Config(pi05=True, max_token_len=200, action_horizon=10)])
def test_attention_at_full_size(config: Pi0Config) -> None:
    with torch.device("meta"):
        model = Pi0(config).set_dtype(torch.bfloat16)
    for length in (8, 24, config.max_token_len):
        calls = calls_of(Sampler(model, 3, length, 1))
        for call in calls:
            check(call)
        prefix = config.cameras * config.image_tokens + length
        assert calls[config.vision_depth].query.shape == (3, 1, 8 * prefix, 256)
        assert calls[-1].query.shape == (3, 1, 8 * config.action_horizon, 256)
        assert calls[-1].key.shape[2] % 8 == 0


def test_a_repeated_key_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_repeated_keys(query: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
        share = query.shape[2] // keys_values.shape[2]
        key, value = keys_values.unsqueeze(3).expand(-1, -1, -1, share, -1, -1).flatten(2, 3).unbind(1)
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    repeating = network.TORCH_LAYER._replace(attend=with_repeated_keys)
    monkeypatch.setattr(sampling, "TORCH", network.TORCH._replace(vlm=repeating, expert=repeating))
    calls = calls_of(make_sampler(make_model(small_config())[0], batch=2, steps=1))
    with pytest.raises(AssertionError, match="stride 0"):
        check(calls[-1])


@pytest.mark.parametrize("config", [Pi0Config(), Pi0Config(pi05=True, max_token_len=200), tabletop_config()])
def test_no_prompt_makes_an_unlucky_number_of_keys(config: Pi0Config) -> None:
    images = config.cameras * config.image_tokens
    lengths = {language_bucket(length, config.max_token_len) for length in range(1, config.max_token_len + 1)}
    assert all((images + length) % 32 != 1 for length in lengths)


def test_a_run_may_use_these_kernels_and_leaves_the_choice_as_it_was() -> None:
    sampler = make_sampler(make_model(small_config())[0], batch=1, steps=1)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION], set_priority=True):
        before = enabled_kernels(with_priority=True)
        calls = calls_of(sampler)
        assert enabled_kernels(with_priority=True) == before
    assert {tuple(call.kernels) for call in calls} == {tuple(ATTENTION_KERNELS)}
    assert SDPBackend.CUDNN_ATTENTION not in ATTENTION_KERNELS
    assert ATTENTION_KERNELS[-1] is SDPBackend.MATH  # refuses nothing


def tensors(heads: int, groups: int, tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, tokens, heads, 20, generator=generator)
    keys_values = torch.randn(3, 2, groups, keys, 20, generator=generator)
    blocked = torch.rand(3, 1, 1, keys, generator=generator) < 0.3
    return query, keys_values, blocked * MASKED


@pytest.mark.parametrize("tokens", [1, 7, 50])
@pytest.mark.parametrize(("heads", "groups"), [(8, 1), (8, 2), (6, 3), (4, 4)])
def test_attention_is_that_of_the_formula(heads: int, groups: int, tokens: int) -> None:
    """Head h attends to the keys of group h * groups // heads."""
    query, keys_values, mask = tensors(heads, groups, tokens, keys=56)
    key, value = keys_values.double().repeat_interleave(heads // groups, dim=2).unbind(1)
    scores = torch.einsum("bthd,bhsd->bhts", query.double(), key) * 20**-0.5 + mask
    expected = torch.einsum("bhts,bhsd->bthd", scores.softmax(-1), value).flatten(2)
    assert (attend(query, keys_values, mask) - expected).abs().max() <= 1e-6


def test_folding_the_heads_copies_nothing() -> None:
    query, keys_values, mask = tensors(heads=8, groups=1, tokens=7, keys=56)
    apart = F.pad(query, (0, 0, 0, 1))[:, :, :8]  # heads that do not lie together
    for heads, kernels in ((query, 1), (apart, 2)):
        with OperationTrace() as trace:
            attend(heads, keys_values, mask)
        assert trace.kernels == kernels, [name for name, _ in trace.operations]


@pytest.mark.parametrize("pi05", [False, True])
def test_sampling_copies_no_queries_and_no_results_of_attention(pi05: bool) -> None:
    sampler = make_sampler(make_model(small_config(pi05))[0], batch=2, steps=2)
    with OperationTrace() as trace:
        sampler.run()
    assert "clone" not in {name for name, _ in trace.operations}


def test_rotating_apart_is_rotating() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 9, 12, generator=generator)
    angle = torch.arange(5)[:, None] * rope_frequency(12)
    rope = Rope.of_rows(torch.cat([angle.cos(), -angle.sin(), angle.sin()], dim=-1).expand(2, 5, -1))
    expected, rest = x.clone(), x.clone()
    rotate_(expected, rope)
    first = rotate_apart_(rest, rope, heads=8)
    assert first.is_contiguous()
    assert torch.equal(first, expected[:, :, :8])
    assert torch.equal(rest[:, :, 8:], expected[:, :, 8:])
