"""Sampling can be captured in a CUDA graph, as far as a CPU can tell; each guard is shown to catch a violation."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pi0_models import fill, make_model, make_sampler, norm_stats, small_config
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from dsrl_async.config.settings import Config
from dsrl_async.host.tracing import CREATION, Operation, OperationTrace
from dsrl_async.pi0.checkpoint import LoadedPolicy
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.policy import Pi0Batch, Pi0Policy
from dsrl_async.pi0.processing import Normaliser, PromptTokenizer
from dsrl_async.pi0.sampler import Sampler, sample_actions
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.sac.networks import Actor

CPU = torch.device("cpu")


def make_steered(model: Pi0, batch: int, device: torch.device = CPU, evaluating: bool = False) -> SteeredPolicy:
    config = Config()
    with device:  # the meta device cannot take over what was made elsewhere
        actor, other = (Actor(config.sac, model.config.action_horizon, device, seed) for seed in (0, 1))
    normaliser = Normaliser(model.config, norm_stats()).to(device)
    tokenizer = PromptTokenizer(Tokenizer(models.WordLevel({"<bos>": 0})), model.config.max_token_len)
    loaded = LoadedPolicy(model.config, model, normaliser, tokenizer)
    policy = Pi0Policy(loaded, [], config.policy.denoise_steps)
    return SteeredPolicy(
        policy.batch(batch, model.config.max_token_len), actor, config.sac, other if evaluating else None
    )


def frozen(steered: SteeredPolicy) -> Pi0Batch:
    assert isinstance(steered.policy, Pi0Batch)
    return steered.policy


def fill_steered(steered: SteeredPolicy, seed: int) -> None:
    generator = torch.Generator(steered.device).manual_seed(seed)
    policy = frozen(steered)
    for images in (policy.images, steered.sac_image):
        images.random_(0, 256, generator=generator)
    for values in (policy.state, steered.standard_normal):
        values.normal_(generator=generator)
    policy.tokens.random_(0, policy.policy.spec.vocab_size, generator=generator)
    policy.token_mask.copy_(torch.arange(policy.tokens.shape[1], device=steered.device) < 1 + seed)
    steered.mode.copy_(torch.arange(len(steered.mode), device=steered.device) >= seed)


def static_storages(steered: SteeredPolicy) -> dict[int, str]:
    found: dict[int, str] = {}
    policy = frozen(steered)
    owners = {
        **vars(policy.sampler),
        **vars(policy),
        **vars(steered),
        **dict(policy.sampler.model.named_parameters()),
        **dict(policy.normaliser.named_buffers()),
        **vars(steered.actor),
        **{f"snapshot {name}": value for name, value in vars(steered.snapshot or nn.Module()).items()},
    }
    for name, value in owners.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found[leaf.untyped_storage().data_ptr()] = name
    return found


def watched(steered: SteeredPolicy) -> list[Operation]:
    """The operations of one run; fails on a host sync anywhere, or on a creation in the denoise loop."""
    operations = []
    for half, forbidden in ((steered.encode, ()), (steered.denoise, CREATION)):
        with OperationTrace(True, forbidden, static_storages(steered)) as trace:
            half()
        operations += trace.operations
    return operations


def plant(model: Pi0, method: str, violation: Callable[[Tensor], object]) -> None:
    """Have `method` of the model do something else first, to its first argument."""
    honest = getattr(model, method)

    def planted(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        result: Tensor = honest(x, *rest, **named)
        made = violation(x)
        return result + made if isinstance(made, Tensor) else result

    object.__setattr__(model, method, planted)


@pytest.mark.parametrize(("pi05", "evaluating"), [(False, False), (True, False), (False, True)])
def test_no_sync_no_creation_and_the_same_trace_for_any_input(pi05: bool, evaluating: bool) -> None:
    steered = make_steered(make_model(small_config(pi05))[0], batch=2, evaluating=evaluating)
    fill_steered(steered, seed=1)
    first = watched(steered)
    fill_steered(steered, seed=2)
    assert len(first) > 500
    assert watched(steered) == first


VIOLATIONS = [
    lambda x: x.sum().item(),
    lambda x: bool(x.sum() > 0),
    lambda x: x.cpu(),
    lambda x: x.numpy(),
    lambda x: x.tolist(),
    lambda x: torch.tensor(0.1),
    lambda x: torch.as_tensor([0.5]),
    lambda x: torch.asarray([0.5]),
    lambda x: x.new_tensor([0.5]),
    lambda x: x[:, [0, 0]].sum(),
    lambda x: x[x > 0].sum(),
    lambda x: x.nonzero(),
]
"""What a CUDA graph cannot hold, or would hold as a constant."""


@pytest.mark.parametrize("violation", VIOLATIONS)
@pytest.mark.parametrize("method", ["run_actions", "run_prefix"])
def test_planted_violations_are_found(method: str, violation: Callable[[Tensor], object]) -> None:
    model, _ = make_model(small_config())
    steered = make_steered(model, batch=1)
    plant(model, method, violation)
    with pytest.raises(AssertionError, match="forbidden operation"):
        watched(steered)


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_violations_before_the_policy_are_found(
    violation: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what is done to an observation before the network sees it."""
    steered = make_steered(make_model(small_config())[0], batch=1)
    honest = frozen(steered).normaliser.state

    def planted(state: Tensor) -> Tensor:
        violation(state)
        return honest(state)

    monkeypatch.setattr(frozen(steered).normaliser, "state", planted)
    with pytest.raises(AssertionError, match="forbidden operation"):
        watched(steered)


@pytest.mark.parametrize("violation", [lambda x: torch.zeros(3), lambda x: torch.cat([x, x])])
def test_tensors_made_in_the_loop_are_found(violation: Callable[[Tensor], object]) -> None:
    model, _ = make_model(small_config())
    steered = make_steered(model, batch=1)
    plant(model, "run_actions", lambda x: violation(x) and None)
    with pytest.raises(AssertionError, match="forbidden operation"):
        watched(steered)


def test_a_value_from_the_host_changes_the_trace() -> None:
    model, _ = make_model(small_config())
    steered = make_steered(model, batch=1)
    factor = 1.0
    plant(model, "run_actions", lambda x: x * factor)
    first = watched(steered)
    factor = 2.0
    assert first != watched(steered)


def test_a_new_buffer_in_each_run_changes_the_trace() -> None:
    model, _ = make_model(small_config())
    steered = make_steered(model, batch=1)
    first = watched(steered)
    steered.policy.noise = steered.policy.noise.clone()
    kept = static_storages(steered) | {steered.policy.noise.untyped_storage().data_ptr(): "elsewhere"}
    with OperationTrace(True, static=kept) as trace:
        steered.encode()
    assert trace.operations != first[: len(trace.operations)]


@pytest.mark.parametrize("pi05", [False, True])
def test_replaying_what_was_traced_equals_the_eager_run(pi05: bool) -> None:
    """What a CUDA graph does: the operations of one run, again, on the same buffers with other contents."""
    steered = make_steered(make_model(small_config(pi05))[0], batch=2)
    fill_steered(steered, seed=1)
    replay = traced(steered)
    fill_steered(steered, seed=2)
    steered.run()
    expected = steered.actions.clone()
    steered.actions.zero_()
    replay()
    assert torch.equal(steered.actions, expected)


def test_new_actor_weights_need_no_new_trace() -> None:
    steered = make_steered(make_model(small_config())[0], batch=2)
    fill_steered(steered, seed=1)
    replay = traced(steered)
    before = steered.actions.clone()
    generator = torch.Generator().manual_seed(1)
    steered.actor.load_flat_(steered.actor.flat + 0.1 * torch.randn(steered.actor.flat.shape, generator=generator))
    steered.run()
    expected = steered.actions.clone()
    assert not torch.allclose(expected, before, atol=1e-3)
    replay()
    assert torch.equal(steered.actions, expected)


def test_a_value_that_was_read_on_the_host_makes_the_replay_differ() -> None:
    model, _ = make_model(small_config())
    steered = make_steered(model, batch=2)
    plant(model, "run_actions", lambda x: x * float(steered.policy.state.numpy().sum()))
    fill_steered(steered, seed=1)
    replay = traced(steered)
    fill_steered(steered, seed=2)
    steered.run()
    expected = steered.actions.clone()
    replay()
    assert not torch.allclose(steered.actions, expected)


def traced(steered: SteeredPolicy) -> Callable[[], object]:
    """A function that repeats the operations of a run, with whatever the run took from Python as constants."""

    def run() -> None:
        steered.encode()
        steered.denoise()

    return torch.no_grad()(make_fx(run)())


@pytest.mark.parametrize("pi05", [False, True])
def test_compiles_without_a_graph_break(pi05: bool) -> None:
    sampler = make_sampler(make_model(small_config(pi05))[0], batch=2, steps=2)
    sampler.run()
    expected = sampler.actions.clone()
    torch._dynamo.reset()
    for half in (sampler.encode, sampler.denoise):
        torch.compile(half, fullgraph=True, backend="eager")()
    assert torch.equal(sampler.actions, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_kernels_compute_the_same() -> None:
    model, _ = make_model(dataclasses.replace(small_config(), depth=2, vision_depth=1))
    eager, compiled = (Sampler(model, 2, 8, 2, compiled=compiled) for compiled in (False, True))
    torch._dynamo.reset()
    for seed in (1, 2):
        for sampler in (eager, compiled):
            fill(sampler, seed)
            sampler.run()
        assert (eager.actions - compiled.actions).abs().max() <= 1e-5


def test_a_graph_break_is_found() -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=1, steps=2)
    plant(model, "run_actions", lambda x: x * 2 if x.sum() > 0 else x)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(sampler.denoise, fullgraph=True, backend="eager")()


def test_runs_leave_no_trace_of_earlier_ones() -> None:
    sampler = make_sampler(make_model(small_config())[0], batch=2)
    sampler.run()
    first = sampler.actions.clone()
    fill(sampler, seed=1)
    sampler.run()
    assert not torch.equal(first, sampler.actions)
    fill(sampler, seed=0)
    sampler.run()
    assert torch.equal(first, sampler.actions)


def test_prompt_slots_that_no_prompt_needs_do_not_matter() -> None:
    model, _ = make_model(small_config())
    long = make_sampler(model, batch=2)  # its prompts have one and five tokens
    short = make_sampler(model, batch=2, length=5)
    for name in ("images", "state", "noise"):
        getattr(short, name).copy_(getattr(long, name))
    short.tokens.copy_(long.tokens[:, :5])
    short.token_mask.copy_(long.token_mask[:, :5])
    long.run()
    short.run()
    assert (long.actions - short.actions).abs().max() <= 1e-5


@pytest.mark.parametrize("pi05", [False, True])
def test_a_prefix_that_was_stored_denoises_as_the_encoded_one(pi05: bool) -> None:
    """Rows of one sampler in another, of another size, in another order; masks and positions come with them."""
    model, _ = make_model(small_config(pi05=pi05))
    first, second = make_sampler(model, 4), make_sampler(model, 3)
    fill(first, seed=3)
    first.token_mask.copy_(torch.arange(first.language_length) < torch.tensor([[2], [5], [first.language_length], [1]]))
    fill(second, seed=4)
    second.run()  # what an observation of its own leaves behind
    first.run()
    keys_values, token_mask = first.prefix()
    before = keys_values.clone()
    rows = torch.tensor([2, 0, 3])
    second.load_prefix(keys_values[rows[:2]], token_mask[rows[:2]])
    second.noise[:2].copy_(first.noise[rows[:2]])
    untouched = second.actions[2].clone()
    second.denoise()
    torch.testing.assert_close(second.actions[:2], first.actions[rows[:2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.actions[2], untouched, rtol=1e-5, atol=1e-5)
    second.load_prefix(keys_values[rows], token_mask[rows])
    second.noise.copy_(first.noise[rows])
    second.denoise()
    torch.testing.assert_close(second.actions, first.actions[rows], rtol=1e-5, atol=1e-5)
    fill(first, seed=9)
    first.run()
    assert torch.equal(keys_values, before)  # it shares no memory


@pytest.mark.parametrize("config", [Pi0Config(), Pi0Config(pi05=True, max_token_len=200, action_horizon=10)])
def test_full_size_runs_on_the_meta_device(config: Pi0Config) -> None:
    """No operation of the real size needs a value on the host, or more than the shapes to be known."""
    with torch.device("meta"):
        model = Pi0(config).set_dtype(torch.bfloat16)
    steered = make_steered(model, 32, torch.device("meta"))
    for half in (steered.encode, steered.denoise):
        with OperationTrace(guarded=True):
            half()
    assert steered.actions.shape == (32, config.action_horizon, 7)


@pytest.mark.parametrize("violation", [lambda x: x.sum().item(), lambda x: x + torch.zeros(1)])
def test_the_meta_device_finds_violations(violation: Callable[[Tensor], object]) -> None:
    with torch.device("meta"):
        model = Pi0(small_config())
    sampler = Sampler(model, 1, 4, 2)
    plant(model, "run_actions", violation)
    with pytest.raises((RuntimeError, AssertionError)), OperationTrace(guarded=True):
        sampler.denoise()


KERNELS_ALLOWED = 4700
"""A call at full depth with ten steps may launch so many, hidden copies included; openpi's PyTorch model has 12,042."""


@pytest.mark.parametrize("pi05", [False, True])
def test_full_depth_needs_few_kernels(pi05: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.pi0.policy.can_pack", lambda model: False)  # as on a GPU
    config = dataclasses.replace(small_config(pi05), depth=18, vision_depth=27)
    steered = make_steered(Pi0(config).set_dtype(torch.bfloat16), batch=1)
    with OperationTrace() as trace:
        frozen(steered).sampler.run()
    assert 2000 < trace.kernels + trace.hidden_copies < KERNELS_ALLOWED


@pytest.mark.parametrize("pi05", [False, True])
def test_residuals_are_added_in_place(pi05: bool) -> None:
    """On a GPU a product that is added to a tensor of its own shape copies it first, unless it is added in place."""
    steered = make_steered(make_model(small_config(pi05))[0], batch=2)
    with OperationTrace() as trace:
        steered.encode()
        steered.denoise()
    assert trace.hidden_copies == 0


def test_residuals_are_not_added_in_place_for_autograd() -> None:
    sampler = make_sampler(make_model(small_config())[0], batch=2)
    model = sampler.model
    with OperationTrace() as trace:
        prefix = model.encode_prefix(sampler.images, sampler.tokens, sampler.token_mask, sampler.state)
        velocity = model.velocity(sampler.noise, torch.tensor([0.3, 0.7]), prefix)
    depth = model.config.depth
    assert trace.hidden_copies == 2 * (2 * (depth - 1) + depth)  # two in each layer of prefix, state and actions
    velocity.sum().backward()
    assert all(parameter.grad is not None for parameter in model.expert.layers[1].parameters())


def test_wrong_shapes_are_named() -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=2)
    good: list[Any] = [sampler.images, sampler.tokens, sampler.token_mask, sampler.state, sampler.noise]
    assert torch.equal(sample_actions(model, *good), sample_actions(model, *good))
    for index, name in ((0, "images"), (2, "token_mask"), (3, "state")):
        bad = list(good)
        bad[index] = bad[index][:, :1]
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            sample_actions(model, *bad)
    with pytest.raises(ValueError, match="language_length"):
        Sampler(model, 1, 13, 10)


def test_capture_falls_back_to_eager_off_cuda(caplog: pytest.LogCaptureFixture) -> None:
    steered = make_steered(make_model(small_config())[0], batch=1)
    with caplog.at_level(logging.INFO):
        assert steered.capture() is None
    assert steered.captured is None
    assert "no CUDA graphs for batch size 1" in caplog.text
    fill_steered(steered, seed=1)
    steered.run()
    assert steered.actions.isfinite().all()
    assert steered.actions.abs().max() > 0


def test_more_compiled_samplers_than_torchs_own_limit() -> None:
    """A run has one for every batch size and prompt length; torch.compile gives up at eight of a kind."""
    model, _ = make_model(dataclasses.replace(small_config(), depth=1, vision_depth=1))
    torch._dynamo.reset()
    for batch in range(1, 12):
        sampler = Sampler(model, batch, 8, 1, compiled=True)
        sampler._encode = torch.compile(sampler._run_encode, fullgraph=True, dynamic=False, backend="eager")
        sampler._step = torch.compile(sampler._run_step, fullgraph=True, dynamic=False, backend="eager")
        sampler.run()
        assert sampler.actions.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pi05", [False, True])
def test_captured_runs_equal_eager_ones(pi05: bool) -> None:
    """Several batch sizes in one pool, replayed in another order than captured, with weights that change."""
    device = torch.device("cuda")
    model = make_model(small_config(pi05))[0].to(device)
    batches, pool = (4, 2, 1), None
    eager = {batch: make_steered(model, batch, device) for batch in batches}
    captured = {batch: make_steered(model, batch, device) for batch in batches}
    for steered in captured.values():
        pool = steered.capture(pool)
        assert steered.captured is not None
    generator = torch.Generator().manual_seed(0)
    for seed, batch in enumerate((1, 4, 2, 4, 1)):
        weights = 0.1 * torch.randn(eager[batch].actor.flat.shape, generator=generator).to(device)
        for steered in (eager[batch], captured[batch]):
            fill_steered(steered, seed)
            steered.actor.load_flat_(weights)
            steered.actions.fill_(torch.nan)
            steered.run()
        torch.cuda.synchronize(device)
        assert (eager[batch].actions - captured[batch].actions).abs().max() <= 1e-5
