"""An update of the learner can be captured in a CUDA graph, as far as a CPU can tell, and computes what it should.

Each guard is shown to catch a violation.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import CONFIGS
from support.sac_configs import SMALL
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from dsrl_async.bench import learner as bench
from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import Config, SacConfig
from dsrl_async.host.graphs import Captured
from dsrl_async.host.tracing import Operation, OperationTrace
from dsrl_async.run.learner.learner import Learner
from dsrl_async.run.learner.sampling import InPlace, Mirror
from dsrl_async.run.learner.updates import Updates
from dsrl_async.sac import agent as agent_module
from dsrl_async.sac.agent import Adam, SacAgent
from dsrl_async.sac.networks import Critic
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.replay import ReplayRing, Seen, replay_fields

HORIZON = 10
BATCH = 6
OTHER: dict[str, object] = {
    "augmentation": "crop_colour",
    "critic_in_actor_loss": "after",
    "entropy_backup": True,
    "actor_layer_norm": True,
    "critic_layer_norm": False,
    "image_range": "minus_one_one",
    "q_aggregation": "min",
    "alpha_type": "exp",
    "actor_grad_clip": None,
    "discount_per": "decision",
    "conv_channels": [8, 8],
    "conv_kernels": [3, 3],
    "conv_strides": [2, 1],
    "conv_padding": 1,
    "state_latent_dim": 0,
}
"""The other value of nearly every setting that changes what is computed."""
TOLD: dict[str, object] = {"instruction": "task", "instruction_dim": 3}
FALLING: dict[str, object] = {"lr_schedule": "linear", "lr_decay_begin": 1, "lr_decay_end": 4, "train_actor_steps": 0}
FALLING |= {"final_target_entropy": 3.0}
DOCUMENT = CONFIGS / "libero_spatial_pi0.yaml"


def with_settings(changes: dict[str, object]) -> SacConfig:
    return SacConfig(**{**SMALL.model_dump(), **changes})


def make_ring(config: SacConfig = SMALL, rows: int = 40) -> ReplayRing:
    sizes = config.state_dim, config.noise_width(HORIZON)
    fields = replay_fields(2, rows, *sizes, of_tasks=config.instruction_dim > 0)
    return ReplayRing(Arena.create(fields))


def write(ring: ReplayRing, decisions: int, seed: int) -> None:
    """An episode of random decisions in each lane."""
    rng = np.random.default_rng(seed)

    def observation() -> tuple[np.ndarray, np.ndarray, Seen]:
        image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        state = rng.standard_normal(ring.rows["state"].shape[-1:]).astype(np.float32)
        return image, state, Seen(None, seed % 3)

    for lane in range(ring.lanes):
        ring.begin_episode(lane, *observation())
        for index in range(decisions):
            noise = rng.standard_normal(ring.rows["noise"].shape[-1:]).astype(np.float32)
            last = index == decisions - 1
            ring.append(lane, noise, -float(not last), int(rng.integers(1, 6)), last, index, *observation())


def make_updates(
    changes: dict[str, object] | None = None,
    ring: ReplayRing | None = None,
    mirrored: bool = False,
    products: torch.dtype = torch.float32,
) -> Updates:
    config = with_settings(changes or {})
    if ring is None:
        ring = make_ring(config)
        write(ring, 9, seed=0)
    agent = SacAgent(config, HORIZON, products=products)
    instructions = torch.eye(config.instruction_dim) if config.instruction_dim else None
    updates = Updates(agent, Mirror(ring, torch.device("cpu")) if mirrored else InPlace(ring), BATCH, instructions)
    updates.refresh()
    updates.random.draw_(updates.agent.generator)
    return updates


def static_storages(updates: Updates) -> dict[int, str]:
    agent, found = updates.agent, {}
    owners = {
        **vars(updates),
        **updates.random._asdict(),
        **updates.source.columns._asdict(),
        **vars(updates.source),
        **agent._tensors(),
        **{name: module.flat_grad for name, module in (("actor_grad", agent.actor), ("critic_grad", agent.critic))},
        **vars(agent),
        **{f"{name} rate": optimiser.falling_lr for name, optimiser in agent.optimisers.items()},
    }
    for name, value in owners.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.numel():
                found[leaf.untyped_storage().data_ptr()] = name
    return found


def watched(updates: Updates, update_actor: bool) -> list[Operation]:
    """The operations of an update; fails at what cannot be captured."""
    with OperationTrace(guarded=True, static=static_storages(updates)) as trace:
        updates.whole(update_actor)
    return trace.operations


def state_of(updates: Updates) -> dict[str, Tensor]:
    return {**updates.agent.state_tensors(), "metrics": updates.metrics.clone(), "reward": updates.batch.reward.clone()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, equal_nan=True, msg=name)


# --- what a graph needs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("update_actor", [False, True])
@pytest.mark.parametrize("changes", [{}, {**OTHER, **TOLD}, FALLING])
def test_no_sync_and_the_same_trace_for_any_input(
    changes: dict[str, object], update_actor: bool, mirrored: bool
) -> None:
    ring = make_ring(with_settings(changes))
    write(ring, 9, seed=0)
    updates = make_updates(changes, ring, mirrored)
    first = watched(updates, update_actor)
    write(ring, 25, seed=1)
    updates.refresh()
    updates.random.draw_(updates.agent.generator)
    assert len(first) > 150
    assert watched(updates, update_actor) == first


VIOLATIONS: list[Callable[[Tensor], object]] = [
    lambda x: x.sum().item(),
    lambda x: bool(x.sum() > 0),
    lambda x: x.detach().cpu(),
    lambda x: x.detach().numpy(),
    lambda x: x.tolist(),
    lambda x: torch.tensor(0.1),
    lambda x: x.new_tensor([0.5]),
    lambda x: x[x > 0].sum(),
    lambda x: x.nonzero(),
    lambda x: x.detach().max().item(),
]


@pytest.mark.parametrize("violation", VIOLATIONS)
@pytest.mark.parametrize("where", ["draw", "pixels", "critic", "optimiser"])
def test_planted_violations_are_found(
    where: str, violation: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = make_updates()
    owner, name, argument = {
        "draw": ("dsrl_async.run.learner.sampling", "transition_discount", 1),
        "pixels": (agent_module, "preprocess_image", 0),
        "critic": (updates.agent.critic, "q_values", 0),
        "optimiser": (updates.agent.optimisers["critic"], "step", 0),
    }[where]
    plant(monkeypatch, owner, name, lambda arguments: violation(arguments[argument]))
    with pytest.raises(AssertionError, match="forbidden operation"):
        watched(updates, True)


def plant(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, violation: Callable[[tuple[Any, ...]], object]
) -> None:
    """Have a function do something else first; what that gives, if a tensor, is multiplied to its result."""
    owner = __import__(owner, fromlist=[name]) if isinstance(owner, str) else owner
    honest = getattr(owner, name)

    def planted(*arguments: Any, **named: Any) -> Any:
        made = violation(arguments)
        result = honest(*arguments, **named)
        return result * made if isinstance(made, Tensor | float) and isinstance(result, Tensor) else result

    monkeypatch.setattr(owner, name, planted)


def test_a_value_from_the_host_changes_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = make_updates()
    plant(monkeypatch, updates.agent.critic, "q_values", lambda arguments: 1.0 + updates.agent.updates)
    first = watched(updates, True)
    updates.agent.updates += 1
    assert watched(updates, True) != first


def test_a_new_buffer_in_each_update_changes_the_trace() -> None:
    updates = make_updates()
    first = watched(updates, True)
    updates.random = updates.random._replace(normal=updates.random.normal.clone())
    kept = static_storages(updates) | {updates.random.normal.untyped_storage().data_ptr(): "elsewhere"}
    with OperationTrace(guarded=True, static=kept) as trace:
        updates.whole(True)
    assert trace.operations != first


def traced(updates: Updates, update_actor: bool) -> Callable[[], object]:
    """A function that repeats the operations of an update, with whatever it took from Python as constants."""
    before = updates.agent.state_tensors()
    graph = make_fx(lambda: updates.whole(update_actor))()
    updates.agent.load_state_tensors(before)
    return torch.no_grad()(graph)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("changes", [{}, {**OTHER, **TOLD}, FALLING])
def test_replaying_what_was_traced_equals_eager_updates(changes: dict[str, object], mirrored: bool) -> None:
    """What a GPU does: the operations of one update, again and again, while the ring grows and goes round."""
    config = with_settings({**changes, "train_actor_steps": 2})
    rings = [make_ring(config) for _ in range(2)]
    for ring in rings:
        write(ring, 9, seed=0)
    eager, replayed = (make_updates({**changes, "train_actor_steps": 2}, ring, mirrored) for ring in rings)
    functions = [traced(replayed, update_actor) for update_actor in (False, True)]
    replayed.captured = Captured([lambda function=function: function() for function in functions], None)  # type: ignore[misc]
    replayed.agent.load_state_tensors(eager.agent.state_tensors())
    for step in range(6):
        for updates, ring in zip((eager, replayed), rings, strict=True):
            write(ring, 4 + step, seed=step)
            updates.refresh()
            assert updates.draw_batch()
            updates.run()
    assert eager.agent.updates == replayed.agent.updates == 6
    assert_same(state_of(eager), state_of(replayed))
    assert eager.metrics.isfinite().all()


@pytest.mark.parametrize("where", ["critic", "optimiser", "size"])
def test_a_value_that_was_read_on_the_host_makes_the_replay_differ(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = make_updates()
    agent, optimiser = updates.agent, updates.agent.optimisers["critic"]
    if where == "critic":
        violation = lambda arguments: float(updates.random.normal.numpy().sum())  # noqa: E731
        plant(monkeypatch, agent.critic, "q_values", violation)
    elif where == "optimiser":  # a bias correction with the host's count of steps
        plant(monkeypatch, optimiser, "step", lambda _: setattr(optimiser, "lr", 1e-3 / (1 + int(agent.updates))))
    else:
        monkeypatch.setattr(updates.source, "size", torch.tensor(3.0, dtype=torch.float64))
    replay = traced(updates, True)
    if where == "size":
        monkeypatch.undo()
    agent.updates = 7
    updates.random.draw_(agent.generator)
    before = agent.state_tensors()
    updates.whole(True)
    expected = state_of(updates)
    agent.load_state_tensors(before)
    replay()
    assert not torch.equal(agent.critic.flat, expected["critic.flat"])


def test_the_documents_configuration_needs_few_kernels_and_runs_on_the_meta_device() -> None:
    """At full size no operation needs a value on the host; and a GPU would be asked to launch at most 400 kernels."""
    sac = validate(read_yaml(DOCUMENT)).sac
    with torch.device("meta"):
        agent = SacAgent(sac, 50, device="meta")
    source = Mirror(make_ring(sac), agent.device)
    updates = Updates(agent, source, sac.batch_size)
    kernels = []
    for update_actor in (False, True):
        with OperationTrace(guarded=True) as trace:
            updates.whole(update_actor)
        kernels.append(trace.kernels)
    assert 100 < kernels[0] < kernels[1] <= 400


def test_the_meta_device_finds_violations(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        agent = SacAgent(SMALL, HORIZON, device="meta")
    updates = Updates(agent, Mirror(make_ring(), agent.device), BATCH)
    plant(monkeypatch, agent.critic, "q_values", lambda arguments: arguments[0] * torch.zeros(1))
    with pytest.raises((RuntimeError, AssertionError)), OperationTrace(guarded=True):
        updates.whole(True)


def test_capture_falls_back_off_cuda_and_leaves_the_agent_alone(caplog: pytest.LogCaptureFixture) -> None:
    updates = make_updates()
    before = state_of(updates)
    with caplog.at_level(logging.INFO):
        updates.capture()
    assert updates.captured is None
    assert "no CUDA graphs for the learner" in caplog.text
    assert_same(before, state_of(updates))


def test_a_rehearsed_capture_leaves_the_agent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = make_updates()
    before = updates.agent.state_tensors()

    def rehearse(functions: list[Callable[[], None]], *rest: object) -> Captured:
        for function in functions:
            function()
        return Captured(list(functions), None)

    monkeypatch.setattr("dsrl_async.run.learner.updates.capture", rehearse)
    updates.capture()
    assert_same(before, updates.agent.state_tensors())
    updates.run()
    assert not torch.equal(updates.agent.critic.flat, before["critic.flat"])


# --- convolutions and products in bfloat16 -----------------------------------------------------------------


PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")


def test_bfloat16_is_for_convolutions_and_products() -> None:
    """All but the last layers', whose fp32 results are few; what outlives an update is fp32."""
    changes: dict[str, object] = {"actor_layer_norm": True, "state_latent_dim": 8}
    rounded = {}
    for dtype in (torch.float32, torch.bfloat16):
        updates = make_updates(changes, products=dtype)
        with OperationTrace() as trace:
            updates.whole(update_actor=True)
        used = [str(leaves[0]).split("torch.")[-1] for name, leaves in trace.operations if name in PRODUCTS]
        rounded[dtype] = [sum(name in of for of in used) for name in ("bfloat16", "float32")]
        kept = [*updates.agent._tensors().values(), updates.agent.critic.flat_grad, updates.agent.actor.flat_grad]
        assert {tensor.dtype for tensor in kept} == {torch.float32}
        assert updates.metrics.isfinite().all()
    # the last layers: of the actor twice, of the critics three times, and back to the actor's weights and input and to
    # the trained critic's weights; the one number that a Q head gives goes back to its input by no matrix product
    in_any_case = 5 + (2 + 1)
    everything = sum(rounded[torch.float32])
    assert rounded[torch.float32] == [0, everything]
    assert rounded[torch.bfloat16] == [everything - in_any_case, in_any_case]


def test_bfloat16_gives_nearly_the_same_gradients() -> None:
    both = [make_updates({"augmentation": "none"}, products=dtype) for dtype in (torch.float32, torch.bfloat16)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(module.flat.shape, generator=generator) * 0.1 for module in networks(both[0])]
    for updates in both:
        for module, flat in zip(networks(updates), weights, strict=True):
            module.flat.copy_(flat)
        updates.whole(update_actor=True)
    exact, rounded = both
    torch.testing.assert_close(rounded.metrics, exact.metrics, rtol=0.05, atol=0.02)
    for name in ("actor", "critic"):
        first, second = (getattr(updates.agent, name).flat_grad for updates in both)
        assert not torch.equal(first, second)
        assert torch.cosine_similarity(first, second, dim=0) > 0.999


def networks(updates: Updates) -> list[Any]:
    return [updates.agent.actor, updates.agent.critic, updates.agent.target_critic]


@pytest.mark.parametrize("update_actor", [False, True])
def test_updates_in_bfloat16_can_be_captured(update_actor: bool) -> None:
    ring = make_ring()
    write(ring, 9, seed=0)
    updates = make_updates(None, ring, True, torch.bfloat16)
    first = watched(updates, update_actor)
    write(ring, 25, seed=1)
    updates.refresh()
    updates.random.draw_(updates.agent.generator)
    assert watched(updates, update_actor) == first


# --- drawing and learning -----------------------------------------------------------------------------------


def test_learning_from_a_mirror_is_learning_from_the_ring() -> None:
    ring = make_ring()
    write(ring, 9, seed=0)
    both = [make_updates(ring=ring, mirrored=mirrored) for mirrored in (False, True)]
    for step in range(20):
        write(ring, 3, seed=step)
        for updates in both:
            updates.refresh()
            assert updates.draw_batch()
            updates.run()
    assert_same(state_of(both[0]), state_of(both[1]))


def test_overwritten_batches_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = make_updates()
    answers = iter([True, True, False])
    drawn: list[Tensor] = []

    def overtaken(positions: Tensor) -> bool:
        drawn.append(positions.clone())
        return next(answers)

    monkeypatch.setattr(updates.source, "overtaken", overtaken)
    assert updates.draw_batch()
    assert len({tuple(positions.tolist()) for positions in drawn}) == 3
    monkeypatch.setattr(updates.source, "overtaken", lambda positions: True)
    assert not updates.draw_batch()


def test_several_updates_are_launched_up_to_a_publication(small_config: Config, memory: Arena, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    frames: list[bytes] = []
    learner = Learner(small_config, memory, HORIZON, torch.device("cpu"), tmp_path, frames.append)
    assert learner.launch_size() == 1
    updates = learner.updates
    updates.captured = Captured([lambda: updates.whole(False), lambda: updates.whole(True)], None)
    write(learner.ring, 16, seed=0)
    counters = Counters(memory)
    counters.actor_decisions[:] = [16, 16]
    launches = []
    while learner.due():
        launches.append(learner.launch_size())
        assert learner.update(launches[-1])
    assert launches == [10, 6]  # publish_interval is 10, and 16 updates are due
    assert learner.agent.updates == counters.learner_updates[0] == 16
    assert len(frames) == 2


# --- the mathematics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_at_a_time", [1, 4, 100])
@pytest.mark.parametrize("changes", [{}, {**OTHER, "augmentation": "none"}])
def test_losses_and_gradients_are_those_of_the_plain_program(changes: dict[str, object], images_at_a_time: int) -> None:
    """Ten heads in a loop and encoders run anew, by autograd, against batched heads and slices."""
    agent = SacAgent(with_settings(changes), HORIZON)
    generator = torch.Generator().manual_seed(3)
    for module in (agent.actor, agent.critic, agent.target_critic):
        module.flat.copy_(torch.randn(module.flat.shape, generator=generator) * 0.3)
        module.encoder.images_at_a_time = images_at_a_time
    random = agent.random_numbers(10)
    random.draw_(agent.generator)
    batch = bench.random_batch(agent.config, 10, agent.action_dim)
    assert bench.compare(agent, bench.Plain(agent), batch, random) < 2e-5


def test_a_difference_from_the_plain_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_q_values(critic: Critic, features: Tensor, noise: Tensor) -> Tensor:
        return honest(critic, features, noise) + 0.1 * features[:, 0]

    honest = Critic.q_values
    agent = SacAgent(SMALL, HORIZON)
    random = agent.random_numbers(10)
    random.draw_(agent.generator)
    plain, batch = bench.Plain(agent), bench.random_batch(SMALL, 10, agent.action_dim)
    monkeypatch.setattr(Critic, "q_values", wrong_q_values)
    with pytest.raises(ValueError, match="do not compute the same"):
        bench.compare(agent, plain, batch, random)


def test_adam_is_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(50, generator=generator)
    reference = parameter.clone().requires_grad_()
    ours, theirs = Adam(parameter, 1e-2, (0.8, 0.95)), torch.optim.Adam([reference], 1e-2, (0.8, 0.95))
    for _ in range(5):
        gradient = torch.randn(50, generator=generator)
        ours.step(gradient)
        reference.grad = gradient.clone()
        theirs.step()
    torch.testing.assert_close(parameter, reference.detach(), rtol=1e-6, atol=1e-7)
    assert ours.state["step"] == 5


def test_rates_that_fall_at_a_step_are_those_of_a_resume_with_lower_rates() -> None:
    """Bit for bit: three updates with the rates and three with a fifth of them, but for the temperature's, and with
    another target entropy."""
    ring, of_both = make_ring(), {"train_actor_steps": 0}
    write(ring, 20, seed=0)
    of_step = {"lr_schedule": "step", "lr_decay_begin": 3, "lr_final_fraction": 0.2, "final_target_entropy": 3.5}
    stepping = make_updates(of_step | of_both, ring)
    before = make_updates(dict(of_both), ring)
    learn(stepping, 6)
    learn(before, 3)
    lower = {name: 0.2 * getattr(SMALL, name) for name in ("actor_lr", "critic_lr")} | {"target_entropy": 3.5}
    after = make_updates(lower | of_both, ring)
    after.agent.load_state_tensors(before.agent.state_tensors())
    learn(after, 3)
    assert_same(state_of(stepping), state_of(after))
    assert stepping.agent.updates == 6


def test_a_schedule_goes_on_where_it_was_when_the_agent_was_saved() -> None:
    ring = make_ring()
    write(ring, 20, seed=0)
    straight, saved, resumed = (make_updates(FALLING, ring) for _ in range(3))
    learn(straight, 5)
    learn(saved, 3)
    resumed.agent.load_state_tensors(saved.agent.state_tensors())
    learn(resumed, 2)
    assert_same(state_of(straight), state_of(resumed))
    constant = make_updates({"train_actor_steps": 0}, ring)
    learn(constant, 5)
    assert (constant.agent.actor.flat != straight.agent.actor.flat).any()


def learn(updates: Updates, count: int) -> None:
    for _ in range(count):
        assert updates.draw_batch()
        updates.run()


def measured(*options: str) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    bench.run(parser.parse_args(["--config", str(DOCUMENT.with_name("tabletop.yaml")), *options]))


def test_the_benchmark_reports_both_programs_and_the_bound(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    measured("--batch", "4", "--repeats", "2", "--ring-rows", "60", "--out", str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    value = {(line["system"], line["metric"]): line["value"] for line in lines}
    for clock in ("update", "update_cpu"):
        ratio = value["plain", clock] / value["dsrl_async", clock]
        assert value["plain/dsrl_async", clock] == pytest.approx(ratio, rel=1e-4)
        assert value["dsrl_async/bound", clock] > 0
    assert value["plain", "kernels"] > 2000
    assert 200 < value["dsrl_async", "kernels"] <= 400
    assert value["dsrl_async", "host_syncs"] == 0 < value["plain", "host_syncs"]
    assert value["dsrl_async", "arithmetic"] < value["plain", "arithmetic"]
    assert value["dsrl_async-plain", "gradient_difference"] < 1e-2


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--batch", "0"], ["--ring-rows", "2"]])
def test_impossible_options_are_refused(options: list[str]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        measured(*options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, OTHER])
def test_captured_updates_equal_eager_ones(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of both kinds, replayed while the ring grows, with many launches between two looks at the results.

    cuDNN is kept from algorithms that sum in another order each time: Adam would make a difference of any size of it.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device, config = torch.device("cuda"), with_settings({**changes, "train_actor_steps": 2})
    rings = [make_ring(config) for _ in range(2)]
    both = [Updates(SacAgent(config, HORIZON, device), Mirror(ring, device), BATCH) for ring in rings]
    both[1].capture()
    assert both[1].captured is not None
    for step in range(20):
        for updates, ring in zip(both, rings, strict=True):
            write(ring, 4, seed=step)
            updates.refresh()
            assert updates.draw_batch()
            updates.run()
    eager, captured = (updates.agent.state_tensors() for updates in both)
    for name in ("actor.flat", "critic.flat", "target_critic.flat", "alpha.raw"):
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(captured["critic.adam.step"], eager["critic.adam.step"])
