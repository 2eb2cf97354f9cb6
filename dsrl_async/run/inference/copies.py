"""How observations get from the slots into a policy's buffers, and its outputs back to the host.

On a GPU all fields of all rows go up in one launch of a kernel, which reads the page-locked slots itself. Without cupy,
or where the slots cannot be page-locked, there is a copy for each row. **None of this has run on a GPU yet.**
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsrl_async.config.files import how_to_install
from dsrl_async.host.device import register_memory
from dsrl_async.host.stages import Stage
from dsrl_async.run.inference.policies import Policies
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Uploads

logger = logging.getLogger(__name__)

SLOTS = "slot/"

SOURCE = """
struct Field {
    const char* rows;
    char* buffer;
    long long row_bytes;
};

struct alignas(16) Chunk {  // what a thread loads at once
    unsigned long long low, high;
};

// Copies row lanes[y] of field z to row y of its buffer; the blocks of x share a row.
extern "C" __global__ void gather_rows(const Field* fields, const long long* lanes) {
    const Field field = fields[blockIdx.z];
    const long long bytes = field.row_bytes;
    const char* from = field.rows + lanes[blockIdx.y] * bytes;
    char* to = field.buffer + blockIdx.y * bytes;
    const long long first = blockIdx.x * blockDim.x + threadIdx.x;
    const long long stride = gridDim.x * blockDim.x;
    const long long width = sizeof(Chunk);
    if (bytes % width == 0) {
        for (long long index = first; index < bytes / width; index += stride)
            ((Chunk*)to)[index] = ((const Chunk*)from)[index];
    } else {
        for (long long index = first; index < bytes; index += stride) to[index] = from[index];
    }
}
"""
"""CUDA, and C++ where `blockIdx` and the like are given. Rows of a multiple of 16 bytes begin at such a multiple, as
the fields of the shared memory do."""

KERNEL = "gather_rows"
BLOCKS = 8
"""Blocks that share a row: with 256 threads of 16 bytes, 32 KiB are on their way, which is what a PCIe link holds."""
THREADS = 256


class Gather(NamedTuple):
    """The kernel, ready for one device."""

    launch: Callable[[int, int, int, int], None]
    """Enqueues it in the current stream, given the device's pointers to the table of fields and to the lanes, and the
    numbers of rows and of fields."""
    device_pointer: Callable[[int], int]
    """What the device calls an address of page-locked memory."""


def compile_gather(device: torch.device) -> Gather:
    """Raises ImportError without cupy, and cupy's own errors where it cannot compile."""
    import cupy

    index = torch.cuda.current_device() if device.index is None else device.index
    with cupy.cuda.Device(index):
        kernel = cupy.RawKernel(SOURCE, KERNEL, backend="nvrtc")
        kernel.compile()

    def launch(fields: int, lanes: int, rows: int, count: int) -> None:
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(index).cuda_stream, index)
        with cupy.cuda.Device(index), stream:
            kernel((BLOCKS, rows, count), (THREADS,), (np.uint64(fields), np.uint64(lanes)))

    def device_pointer(address: int) -> int:
        with cupy.cuda.Device(index):  # CUDA answers for the current device
            return int(cupy.cuda.runtime.pointerGetAttributes(address).devicePointer)

    return Gather(launch, device_pointer)


class Way(NamedTuple):
    """How observations go up."""

    uploads: Uploads
    gather: Gather | None = None
    reason: str = ""
    """Why it is not the best way that a GPU has."""


def prepare_uploads(arena: Arena, device: torch.device) -> Way:
    """Page-lock the slots of this process for `device` and compile the kernel, as far as both can be had."""
    if device.type != "cuda":
        return Way(Uploads.NONE)
    try:
        register_memory(*arena.pages(SLOTS), device)
    except RuntimeError as error:
        return Way(Uploads.PAGEABLE, None, f"the slots could not be page-locked: {error}")
    try:
        return Way(Uploads.GATHERED, compile_gather(device))
    except ImportError:
        return Way(Uploads.PAGE_LOCKED, None, f"cupy is not installed ({how_to_install('cuda')})")
    except Exception as error:  # cupy's own types
        reason = str(error).partition("\n")[0] or type(error).__name__
        return Way(Uploads.PAGE_LOCKED, None, f"cupy cannot compile the kernel that gathers them: {reason}")


class Copies:
    """The copies of a server's batches. A batch must have come down before the next goes up."""

    def __init__(self, arena: Arena, policies: Policies, way: Way) -> None:
        """`way` is what `prepare_uploads` found."""
        self._arena, self._policies, self._gather = arena, policies.steered_batches, way.gather
        device = policies.device
        on_cuda = device.type == "cuda"
        largest = max(self._policies)[0]
        if way.reason:
            logger.warning("observations go to the GPU row by row: %s", way.reason)
        if way.gather is not None:
            self._lanes = torch.zeros(largest, dtype=torch.int64, pin_memory=on_cuda)
            self._lanes_pointer = way.gather.device_pointer(self._lanes.data_ptr())
            self._tables = {
                key: torch.tensor(self._table(policy.inputs, way.gather), device=device)
                for key, policy in self._policies.items()
            }
        if device.type != "cpu":
            width = next(iter(self._policies.values())).outputs.shape[1]
            self._outputs = torch.zeros(largest, width, pin_memory=on_cuda)
            self._down = torch.cuda.Event(blocking=True)  # a wait sleeps: the workers need the core

    def _table(self, inputs: dict[str, Tensor], gather: Gather) -> list[tuple[int, int, int]]:
        """Source, target and bytes of a row of every field, as the kernel reads them."""
        table = []
        for name, buffer in inputs.items():
            rows = self._arena[SLOTS + name]
            assert buffer.is_contiguous(), name
            assert rows[0].nbytes == buffer[0].nbytes, name
            table.append((gather.device_pointer(rows.ctypes.data), buffer.data_ptr(), rows[0].nbytes))
        return table

    def up(self, key: tuple[int, int], lanes: NDArray[np.int64]) -> None:
        """Copy the observations of `lanes` to the first rows of the input buffers of the policy that has that key."""
        inputs = self._policies[key].inputs
        if self._gather is not None:
            self._lanes.numpy()[: len(lanes)] = lanes
            table = self._tables[key]
            self._gather.launch(table.data_ptr(), self._lanes_pointer, len(lanes), len(inputs))
        else:
            for name, buffer in inputs.items():
                copy_rows(self._arena[SLOTS + name], lanes, buffer)

    def down(self, outputs: Tensor, stage: Stage) -> NDArray[np.float32]:
        """`outputs` [n, ...] on the host, when they have been computed; valid until the next call."""
        if outputs.is_cpu:
            return outputs.numpy()
        host = self._outputs[: len(outputs)]
        with stage("device_to_host"):
            host.copy_(outputs, non_blocking=True)
        self._down.record()
        self._down.synchronize()
        return host.numpy()


def copy_rows(rows: NDArray[np.generic], lanes: Sequence[int] | NDArray[np.int64], buffer: Tensor) -> None:
    """Copy rows [N, ...] of `lanes` to the front of `buffer` [B, ...], once and straight from the shared memory.

    On CUDA that is a transfer per row, asynchronous if the memory is page-locked.
    """
    if buffer.is_cpu:
        # `clip`: with another mode numpy gathers into memory of its own first, and copies that to `out`
        rows.take(lanes, axis=0, out=buffer.numpy()[: len(lanes)], mode="clip")
    else:
        for index, lane in enumerate(lanes):
            buffer[index].copy_(torch.from_numpy(rows[lane]), non_blocking=True)
