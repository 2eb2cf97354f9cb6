"""The launches of a function that torch.compile fuses, without compiling it: what its scheduler would have generated.

torch.compile is stopped behind the fusion of operations, on fake tensors of the CPU. What it would fuse for a GPU may
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.exc import InductorError
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode

from dsrl_async.bench.launches import Launch, matrices_of_sizes
from dsrl_async.pi0.launch_costs import Matrices


class _Scheduled(Exception):
    """Stops torch.compile when it has fused what it can."""


def launches_of_compiled(stage: str, compiled: Callable[[], object]) -> list[Launch]:
    """The launches of the first call of a function of torch.compile, under a `FakeTensorMode`; nothing is run.

    They have no function that launches them, and bytes read and written in one.
    """
    launches: list[Launch] = []

    def keep(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        for node in nodes:
            launches.extend(_launches(stage, node))
        raise _Scheduled

    torch._dynamo.reset()
    with inductor.patch(_post_fusion_custom_pass=keep, fx_graph_cache=False):
        try:
            compiled()
        except InductorError as error:
            if not isinstance(error.inner_exception, _Scheduled):
                raise
    assert launches, "torch.compile did not get as far as fusing anything"
    return launches


def _launches(stage: str, node: BaseSchedulerNode) -> list[Launch]:
    """Those of a node of the scheduler: none, one, or one with the copy in front of it."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(getattr(node, "node", None), ir.MultiOutput):
        return []
    moved = node.get_read_write_buffers_sizes()
    if not isinstance(node, ExternKernelSchedulerNode):
        return [Launch(stage, "", "fused", "other", moved, 0)]
    kernel: Any = node.node
    name = kernel.op_overload.overloadpacket.__name__
    inputs = [_size(value) for value in kernel.inputs]
    single = kernel.inputs[0].get_dtype() == torch.float32
    if "scaled_dot_product" in name:
        (batch, heads, queries, width), keys = inputs[0], inputs[1][2]
        matrices = Matrices(batch * heads, queries, keys, width)
        masked = len(inputs) > 3
        return [Launch(stage, "", "attention", "attention", moved, 0, matrices, masked, single)]
    found = matrices_of_sizes(name, inputs)
    launch = Launch(
        stage, "", name, "product" if found else "other", moved, 0, found, single=found is not None and single
    )
    if name in ("addmm", "baddbmm") and len(inputs[0]) == len(inputs[1]):  # as `tracing.copies_first`
        copied = kernel.get_numel() * kernel.get_dtype().itemsize
        return [Launch(stage, "", "hidden copy", "other", int(copied), int(copied)), launch]
    return [launch]


def _size(value: Any) -> Sequence[int]:
    return [int(size) for size in value.get_size()]
