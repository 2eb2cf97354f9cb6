"""Kernels, bytes and products of a computation that is only described, and the times that they are given."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.commands import call
from support.paths import DOCS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsrl_async.bench import paper
from dsrl_async.bench.compiled_launches import launches_of_compiled
from dsrl_async.bench.launches import Launch, LaunchCount
from dsrl_async.bench.paper import H100, count_sample
from dsrl_async.host.tracing import OperationTrace
from dsrl_async.pi0.checkpoint import empty_model
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.launch_costs import LAUNCH_COSTS, LaunchCost, Matrices, launch_cost
from dsrl_async.pi0.model import GemmaLayer
from dsrl_async.pi0.roofline import stages
from dsrl_async.pi0.sampler import Sampler

STAGES = ("vision", "prefill", "state", "denoise")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(program: Callable[[], object]) -> list[Launch]:
    with torch.no_grad(), LaunchCount() as count:
        program()
    return count.launches


def only(program: Callable[[], object]) -> Launch:
    (launch,) = launches_of(program)
    return launch


def test_a_product_has_its_operations_and_its_matrices() -> None:
    launch = only(lambda: meta(3, 5) @ meta(5, 7))
    assert (launch.kind, launch.flops, launch.matrices) == ("product", 2 * 3 * 5 * 7, (1, 3, 7, 5))
    assert (launch.read, launch.written) == (2 * (3 * 5 + 5 * 7), 2 * 3 * 7)
    assert not launch.single
    assert only(lambda: meta(3, 5, dtype=torch.float32) @ meta(5, 7, dtype=torch.float32)).single


@pytest.mark.parametrize(
    ("program", "flops", "bytes_"),
    [
        (lambda: meta(4, 3, 5).bmm(meta(4, 5, 7)), 4 * 2 * 3 * 5 * 7, 2 * 4 * (15 + 35 + 21)),
        (lambda: F.linear(meta(2, 3, 5), meta(7, 5), meta(7)), 2 * 6 * 5 * 7, 2 * (30 + 35 + 7 + 42)),
        (lambda: meta(6, 7).addmm_(meta(6, 5), meta(5, 7)), 2 * 6 * 5 * 7, 2 * (30 + 35 + 42 + 42)),
        (lambda: F.conv2d(meta(2, 3, 8, 8), meta(5, 3, 4, 4), meta(5), 4), 2 * 8 * 48 * 5, 2 * (384 + 240 + 5 + 40)),
    ],
)
def test_products_of_other_forms(program: Callable[[], object], flops: int, bytes_: int) -> None:
    launch = only(program)
    assert (launch.flops, launch.bytes) == (flops, bytes_)


@pytest.mark.parametrize(
    ("program", "read", "written"),
    [
        (lambda: meta(3, 5) + meta(3, 5), 60, 30),
        (lambda: meta(3, 5).mul_(meta(5)), 40, 30),
        (lambda: torch.div(meta(3, 5), meta(3, 1), out=meta(3, 5)), 36, 30),
        (lambda: meta(3, 5).copy_(meta(3, 5)), 30, 30),
        (lambda: meta(3, 5) + meta(1, 5).expand(3, 5), 40, 30),
        (lambda: meta(3, 5).to(torch.float32), 30, 60),
        (lambda: F.embedding(torch.empty(2, dtype=torch.int64, device="meta"), meta(100, 5)), 20 + 16, 20),
        (lambda: torch.cat([meta(3, 5), meta(2, 5)]), 50, 50),
        (lambda: meta(3, 5)[:, 1:3].add_(1), 12, 12),
    ],
)
def test_other_kernels_read_what_they_are_given_and_write_what_they_return(
    program: Callable[[], object], read: int, written: int
) -> None:
    launch = only(program)
    assert (launch.kind, launch.flops, launch.read, launch.written) == ("other", 0, read, written)


def test_a_view_is_no_kernel() -> None:
    assert launches_of(lambda: meta(4, 6).t().reshape(3, 8)[1:].unflatten(1, (2, 4)).expand(2, 2, 4)) != []
    assert launches_of(lambda: meta(4, 6).view(3, 8)[1:].unflatten(1, (2, 4)).transpose(0, 1)) == []


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_one_kernel(masked: bool) -> None:
    query, keys, mask = meta(2, 8, 50, 16), meta(2, 8, 72, 16), meta(2, 1, 1, 72) if masked else None
    launch = only(lambda: F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask))
    assert (launch.kind, launch.masked) == ("attention", masked)
    assert launch.matrices == Matrices(16, 50, 72, 16)
    assert launch.flops == 2 * 2 * 16 * 50 * 72 * 16
    assert launch.bytes == 2 * (2 * query.numel() + 2 * keys.numel() + 144 * masked)


def test_a_copy_within_an_operation_is_a_kernel() -> None:
    copy, product = launches_of(lambda: torch.addmm(meta(6, 7), meta(6, 5), meta(5, 7)))
    assert (copy.operation, copy.read, copy.written, product.kind) == ("hidden copy", 84, 84, "product")


@pytest.fixture(scope="module")
def operations() -> Iterator[Any]:
    """Two kernels of our own, which the counter has to take by their schema."""
    library = torch.library.Library("dsrl_async", "FRAGMENT")
    library.define("test_scaled(Tensor x, Tensor scale) -> Tensor")
    library.define("test_store_(Tensor(a!) buffer, Tensor rows) -> ()")
    library.impl("test_scaled", lambda x, scale: torch.empty_like(x, dtype=torch.bfloat16), "Meta")
    library.impl("test_store_", lambda buffer, rows: None, "Meta")
    yield torch.ops.dsrl_async
    library._destroy()


def test_a_kernel_of_our_own_is_one_kernel(operations: Any) -> None:
    launch = only(lambda: operations.test_scaled(meta(3, 5, dtype=torch.float32), meta(5)))
    assert (launch.operation, launch.kind, launch.read, launch.written) == ("test_scaled", "other", 60 + 10, 30)
    launch = only(lambda: operations.test_store_(meta(100, 5), meta(3, 5)))
    assert (launch.read, launch.written) == (1000 + 30, 1000)


def test_a_kernel_may_declare_what_it_costs(operations: Any) -> None:
    matrices = Matrices(1, 64 * 132, 500, 32)

    @launch_cost("test_store_")
    def _(buffer: Tensor, rows: Tensor) -> LaunchCost:
        return LaunchCost(rows.nbytes, rows.nbytes, "attention", matrices, tile=(64, 32), kernels=2)

    try:
        first, second = launches_of(lambda: operations.test_store_(meta(100, 5), meta(3, 5)))
    finally:
        del LAUNCH_COSTS["test_store_"]
    assert (first.read, first.written, first.matrices, first.kind) == (30, 30, matrices, "attention")
    assert (second.bytes, second.flops) == (0, 0)
    assert H100().seconds(first) == pytest.approx(first.flops / 250e12 + 1.5e-6)
    assert H100().seconds(second) == 1.5e-6


def test_what_torch_would_compile_is_counted_without_compiling() -> None:
    """A product, what is done to it in one kernel, and a sum that CUDA copies a tensor for."""

    def program(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(residual, F.gelu(x @ weight) * 2, weight)

    with FakeTensorMode():
        x, weight = torch.empty(6, 5), torch.empty(5, 5)
        function = torch.compile(program)
        launches = launches_of_compiled("all", lambda: function(x, weight, x))
    assert [(launch.kind, launch.operation) for launch in launches] == [
        ("product", "mm"),
        ("other", "fused"),
        ("other", "hidden copy"),
        ("product", "addmm"),
    ]
    assert [launch.bytes for launch in launches] == [4 * 85, 4 * 60, 4 * 60, 4 * 115]
    assert launches[0].matrices == launches[3].matrices == (1, 6, 5, 5)
    assert {launch.stage for launch in launches} == {"all"}


def other(bytes_: int) -> Launch:
    return Launch("", "", "", "other", bytes_, 0)


def product(*matrices: int, **details: Any) -> Launch:
    return Launch("", "", "", "product", 0, 0, Matrices(*matrices), **details)


def test_time_of_a_kernel() -> None:
    gap = 1.5e-6

    def seconds(launch: Launch) -> float:
        return H100().seconds(launch) - gap

    assert seconds(other(0)) == 0
    assert seconds(other(3_000_000_000)) == pytest.approx(1e-3)
    assert seconds(other(11_000_000)) == pytest.approx(2e-6)  # in the cache
    assert seconds(dataclasses.replace(product(1, 1, 1, 1), read=3_000_000)) == pytest.approx(1e-6)  # weights are not
    full = product(1, 128 * 132, 128, 700)  # one round of whole tiles
    assert seconds(full) == pytest.approx(full.flops / 700e12)
    more = seconds(product(1, 128 * 133, 128, 700))  # a tile too many: half tiles fill two rounds better
    assert more == pytest.approx(min(2.0, 3 / 2 / 0.75) * seconds(full))
    assert seconds(product(1, 128 * 66, 128, 700)) == pytest.approx(seconds(full) / 2)  # split along the inner axis
    assert seconds(dataclasses.replace(full, single=True)) == pytest.approx(full.flops / 50e12)
    own = dataclasses.replace(full, tile=(128, 128))
    assert seconds(own) == pytest.approx(seconds(full) / 0.8)
    eight = dataclasses.replace(full, operation="_scaled_mm")
    assert seconds(eight) == pytest.approx(seconds(full) / 1.7)
    small = Matrices(1, 64 * 66, 64, 700)
    assert seconds(dataclasses.replace(own, matrices=small, tile=(64, 64))) == pytest.approx(
        2 * 64 * 64 * 132 * 700 / (700e12 * 0.8 * 0.5)
    )  # half of the processors are idle, and half tiles load twice as much
    masked = Launch("", "", "", "attention", 0, 0, Matrices(1, 32 * 132, 600, 256), masked=True)
    assert seconds(masked) == pytest.approx(masked.flops / 120e12)
    assert seconds(dataclasses.replace(masked, matrices=Matrices(1, 32, 600, 256))) == pytest.approx(seconds(masked))
    own = dataclasses.replace(masked, masked=False, tile=(16, 64), matrices=Matrices(1, 16 * 66, 600, 256))
    assert seconds(own) == pytest.approx(2 * own.flops / 250e12)
    flash = Launch("", "", "", "attention", 0, 0, Matrices(132, 64, 256, 72))
    assert seconds(flash) == pytest.approx(flash.flops / 250e12)


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def deep(request: pytest.FixtureRequest) -> Pi0Config:
    """Small widths, more layers of one kind than of the other."""
    return dataclasses.replace(tabletop_config(), pi05=request.param, depth=3, vision_depth=4)


def traced_kernels(config: Pi0Config, steps: int) -> tuple[int, int]:
    """What `bench denoise` counts on the CPU: of the first half of a sample, and of all."""
    model = empty_model(config, "cpu", torch.bfloat16)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    sampler = Sampler(model, 2, 8, steps)
    with OperationTrace() as trace:
        sampler.encode()
        encode = trace.kernels
        sampler.denoise()
    return encode, trace.kernels


def test_kernels_of_a_sample_are_those_that_run_on_the_cpu(deep: Pi0Config) -> None:
    launches = count_sample(deep, 2, 8, 3)
    encode = [launch for launch in launches if launch.stage != "denoise"]
    assert (len(encode), len(launches)) == traced_kernels(deep, 3)
    assert {launch.stage for launch in launches} == set(STAGES) - ({"state"} if deep.pi05 else set())


def test_kernels_of_our_own_are_fewer(deep: Pi0Config) -> None:
    pytest.importorskip("triton")
    usual, ours = (count_sample(deep, 2, 8, 3, way) for way in ("eager", "triton"))
    assert len(ours) < 0.5 * len(usual)
    assert sum(launch.bytes for launch in ours) < sum(launch.bytes for launch in usual)
    products = [sum(launch.flops for launch in some) for some in (usual, ours)]
    assert products[0] == pytest.approx(products[1], rel=1e-6)


def test_an_operation_too_many_is_seen(deep: Pi0Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = count_sample(deep, 2, 8, 3)
    forward = GemmaLayer.forward

    def twice(layer: GemmaLayer, x: Tensor, *rest: Any) -> Tensor:
        return forward(layer, x, *rest) + 0

    monkeypatch.setattr(GemmaLayer, "forward", twice)
    after = count_sample(deep, 2, 8, 3)
    layers = (deep.depth - 1) * (1 + deep.state_tokens) + 3 * deep.depth
    assert len(after) - len(before) == layers
    assert sum(launch.bytes for launch in after) > sum(launch.bytes for launch in before)


def test_products_of_a_sample_are_those_of_the_bound() -> None:
    """`roofline` reckons them from the sizes, and leaves out what belongs to the state and the ends."""
    config = Pi0Config()
    work, launches = stages(config, 24, 1), count_sample(config, 2, 24, 1)
    for stage, expected in work.items():
        counted = sum(launch.flops for launch in launches if launch.stage == stage)
        assert counted == pytest.approx(2 * expected.flops, rel=0.02), stage


def test_the_command_prints_its_constants_and_every_stage() -> None:
    result = call("bench", "paper", "--size", "two_layers", "--batch", "3", "--steps", "2")
    assert result.code == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    value = {record["metric"]: record["value"] for record in records}
    assert {name for name in dataclasses.asdict(H100()) if name != "tiles"} <= value.keys()
    for quantity in ("kernels", "ms", "gigabytes", "teraflops"):
        total = sum(value[f"{stage}_{quantity}"] for stage in STAGES)
        assert value[f"total_{quantity}"] == pytest.approx(total, rel=1e-5)
    assert value["denoise_kernels"] == 1 + 2 * value["step_kernels"]
    for stage in STAGES:
        assert value[f"{stage}_kernels"] == sum(value[f"{stage}_{kind}_kernels"] for kind in paper.KINDS)
        assert value[f"{stage}_ms"] > value.get(f"{stage}_bound_ms", 0)
    assert call("bench", "paper", "--prompt-tokens", "49").stderr.endswith("must be from 1 to 48 for pi0\n")


@pytest.mark.parametrize("options", [["--way", "eager"], ["--way", "triton"], ["--way", "triton", "--fp8"]])
def test_the_page_has_the_tables_of_the_command(options: list[str]) -> None:
    if "triton" in options:
        pytest.importorskip("triton")
    result = call("bench", "paper", "--tables", "--batch", "16", *options)
    page = (DOCS / "measurements" / "gpu_on_paper.md").read_text()
    stages_, launches = [block for block in result.stdout.strip().split("\n\n") if block.startswith("|")]
    assert stages_ in page
    assert launches in page or "--fp8" in options
    total = stages_.splitlines()[-1].split(" | ")
    assert f"{float(total[-2]):.1f}, {int(total[1]):,} |" in page, "the table in short"
