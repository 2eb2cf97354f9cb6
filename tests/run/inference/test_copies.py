"""What goes up to a GPU and comes down from it: the kernel that gathers, and how many copies a batch costs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.devices import CountCopies

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.stages import no_stage
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run.inference import copies
from dsrl_async.run.inference.copies import BLOCKS, KERNEL, SOURCE, THREADS, Copies, Gather, Way, prepare_uploads
from dsrl_async.run.inference.policies import Policies, load_policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, NoiseMode, Uploads
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.slots import slot_fields

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

GRID = """
struct Index { unsigned x, y, z; };
static Index blockIdx, threadIdx, gridDim, blockDim;
#define __global__
"""
LOOP = """
extern "C" void launch(const void* fields, const void* lanes, unsigned x, unsigned y, unsigned z, unsigned threads) {
    gridDim = {x, y, z};
    blockDim = {threads, 1, 1};
    for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
                for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
                    gather_rows((const Field*)fields, (const long long*)lanes);
}
"""
"""They make a program for the CPU of the kernel's source: its threads run one after another."""


@pytest.fixture(scope="module")
def gather_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Gather:
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("needs g++")
    directory = tmp_path_factory.mktemp("kernel")
    (directory / "gather.cpp").write_text(GRID + SOURCE + LOOP)
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "gather.cpp", "-o", "gather.so"]
    subprocess.run(command, cwd=directory, check=True, timeout=100)
    library = ctypes.CDLL(str(directory / "gather.so"))

    def launch(fields: int, lanes: int, rows: int, count: int) -> None:
        library.launch(ctypes.c_void_p(fields), ctypes.c_void_p(lanes), BLOCKS, rows, count, THREADS)

    return Gather(launch, lambda address: address)


@pytest.mark.parametrize("row_bytes", [1, 16, 28, 32, 150_528, 150_529])
def test_the_kernel_takes_rows_as_numpy_does(gather_on_cpu: Gather, row_bytes: int) -> None:
    rng, lanes = np.random.default_rng(0), np.array([4, 0, 2], np.int64)
    memory = Arena.create(dict.fromkeys(("slot/one", "slot/other"), ((5, row_bytes), "uint8")))
    buffers = [np.full((4, row_bytes), 77, np.uint8) for _ in range(2)]
    for name in memory.fields:
        memory[name][:] = rng.integers(0, 256, (5, row_bytes))
    table = np.array(
        [
            (memory[name].ctypes.data, buffer.ctypes.data, row_bytes)
            for name, buffer in zip(memory.fields, buffers, strict=True)
        ]
    )
    gather_on_cpu.launch(table.ctypes.data, lanes.ctypes.data, len(lanes), len(table))
    for name, buffer in zip(memory.fields, buffers, strict=True):
        assert (buffer[:3] == memory[name].take(lanes, axis=0)).all()
        assert (buffer[3:] == 77).all()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_compiles(architecture: str) -> None:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs cuda-bindings and nvidia-cuda-nvrtc: {error}")
    _, program = nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"gather.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, 1, [f"--gpu-architecture={architecture}".encode()])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * max(2, size)  # which is written to, and Python has one b" " for everybody
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    assembly = b" " * max(2, size)
    nvrtc.nvrtcGetPTX(program, assembly)
    assert f".entry {KERNEL}(".encode() in assembly
    assert b"ld.global.v" in assembly  # 16 bytes at once, or the link is not kept busy


def load(config: Config, spec: EnvironmentSpec, memory: Arena) -> Policies:
    return load_policies(config, spec, CPU, pi0_record(find_policy(EMBEDDED_POLICY)), Counters(memory))


def fill_slots(memory: Arena) -> None:
    rng = np.random.default_rng(1)
    for name in ("images", "sac_image"):
        memory[f"slot/{name}"][:] = rng.integers(0, 256, memory[f"slot/{name}"].shape)
    for name in ("state", "standard_normal"):
        memory[f"slot/{name}"][:] = rng.normal(size=memory[f"slot/{name}"].shape)


def test_one_launch_fills_what_copies_of_rows_fill(
    small_config: Config, spec: EnvironmentSpec, memory: Arena, gather_on_cpu: Gather
) -> None:
    fill_slots(memory)
    policies = load(small_config, spec, memory)
    key = max(policies.steered_batches)
    inputs, lanes, filled = policies.steered_batches[key].inputs, np.array([1, 0]), []
    for way in (Way(Uploads.NONE), Way(Uploads.GATHERED, gather_on_cpu)):
        for buffer in inputs.values():
            buffer.zero_()
        Copies(memory, policies, way).up(key, lanes)
        filled.append({name: buffer.numpy().copy() for name, buffer in inputs.items()})
    for name in inputs:
        assert (filled[0][name] == memory[f"slot/{name}"][lanes]).all()
        assert (filled[0][name] == filled[1][name]).all()


class FakeEvent:
    waits = 0

    def __init__(self, blocking: bool) -> None:
        assert blocking, "while the host waits, it would keep a core busy"

    def record(self) -> None: ...

    def synchronize(self) -> None:
        FakeEvent.waits += 1


@pytest.mark.parametrize("gathered", [True, False])
def test_copies_of_a_batch_of_sixteen(
    small_config: Config, spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch, gathered: bool
) -> None:
    """All buffers are on the meta device: what crosses to it and back is counted, and nothing else may mix the two."""
    config = small_config.model_copy(update={"actors": 16})
    memory = create_memory(config, spec, 10)
    policies = load(config, spec, memory)
    launches: list[tuple[int, ...]] = []
    gather = Gather(lambda *arguments: launches.append(arguments), lambda address: address)
    way = Way(Uploads.GATHERED, gather) if gathered else Way(Uploads.PAGEABLE)
    monkeypatch.setattr(copies, "prepare_uploads", lambda *_: way)
    monkeypatch.setattr("dsrl_async.run.inference.server.prepare_uploads", lambda *_: way)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(Policies, "device", torch.device("meta"))
    monkeypatch.setattr(FakeEvent, "waits", 0)
    for steered in policies.steered_batches.values():
        assert hasattr(steered, "policy")
        for owner in (steered, steered.policy):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor) and name != "prompts":
                    setattr(owner, name, value.to("meta"))
        steered.inputs = {name: buffer.to("meta") for name, buffer in steered.inputs.items()}
        frozen = steered.policy.policy
        frozen.tokens, frozen.token_mask = frozen.tokens.to("meta"), frozen.token_mask.to("meta")
        monkeypatch.setattr(steered, "run", lambda: None)
    server = InferenceServer(config, memory, policies, lambda lanes: None, NoiseMode.DETERMINISTIC)
    for lane in range(16):
        server.slots.request(lane, incarnation=1, count=1)
    with CountCopies() as counted:
        assert server.serve_ready(server.slots.ready()) == 16
    assert counted.up == (0 if gathered else 4 * 16) + 1  # the prompts' numbers
    assert len(launches) == int(gathered)
    assert counted.down == 1
    assert FakeEvent.waits == 1
    assert server.counters.inference_uploads[0] == way.uploads


# page-locking


class FakeCudart:
    """Notes what is registered, and keeps an error as CUDA does: until some launch of torch's raises it."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self, status: int) -> None:
        self.status, self.registered, self.last_error = status, [], 0  # type: ignore[var-annotated]

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered.append((address, size, flags))
        self.last_error = self.status
        return self.status

    def cudaGetErrorString(self, status: int) -> str:
        return f"error {status}"

    def ones(self, *_: Any, **__: Any) -> None:
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")


def fake_cudart(monkeypatch: pytest.MonkeyPatch, status: int) -> FakeCudart:
    cudart = FakeCudart(status)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", lambda _: no_stage(""))
    monkeypatch.setattr(torch, "ones", cudart.ones)
    return cudart


def test_only_the_slots_are_page_locked(
    small_config: Config, spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = fake_cudart(monkeypatch, 0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    memory = create_memory(small_config, spec, 10)
    way = prepare_uploads(memory, GPU)
    assert way.uploads == Uploads.PAGE_LOCKED
    assert "cupy is not installed" in way.reason
    ((address, size, flags),) = cudart.registered
    page = os.sysconf("SC_PAGESIZE")
    assert address % page == size % page == 0
    assert flags == 2  # mapped: the kernel reads it
    slots = [memory[name] for name in slot_fields(2, spec, 5, 32, 320)]
    for rows in slots:
        assert address <= rows.ctypes.data
        assert rows.ctypes.data + rows.nbytes <= address + size
    assert size < sum(rows.nbytes for rows in slots) + 2 * page + 64 * len(slots)
    assert memory["replay/image"].ctypes.data + memory["replay/image"].nbytes > address + size


def test_a_refusal_is_told_and_leaves_no_error_behind(memory: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = fake_cudart(monkeypatch, 712)
    way = prepare_uploads(memory, GPU)
    assert way.uploads == Uploads.PAGEABLE
    assert way.gather is None
    assert "error 712" in way.reason
    assert cudart.last_error == 0


def test_a_kernel_that_cupy_cannot_compile_is_told(memory: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> Gather:
        raise OSError("libnvrtc.so.13 is missing\nand more")

    fake_cudart(monkeypatch, 0)
    monkeypatch.setattr(copies, "compile_gather", fail)
    way = prepare_uploads(memory, GPU)
    assert way.uploads == Uploads.PAGE_LOCKED
    assert way.reason.endswith("libnvrtc.so.13 is missing")


def test_on_the_cpu_nothing_is_registered(memory: Arena) -> None:
    assert prepare_uploads(memory, CPU) == (Uploads.NONE, None, "")


def test_outputs_come_down_as_they_are(small_config: Config, spec: EnvironmentSpec, memory: Arena) -> None:
    policies = load(small_config, spec, memory)
    for policy in policies.steered_batches.values():
        policy.outputs.normal_()
        outputs = Copies(memory, policies, Way(Uploads.NONE)).down(policy.outputs[:1], no_stage)
        assert outputs.ctypes.data == policy.outputs.data_ptr()  # a view: the CPU copies nothing


@pytest.mark.parametrize("number", [0, 1])
def test_the_kernel_is_launched_on_the_current_stream(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """`compile_gather` against the calls of cupy that it makes, while cupy's current device is another one."""
    calls: list[Any] = []
    current = [7]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    class RawKernel:
        def __init__(self, source: str, name: str, backend: str) -> None:
            assert (source, name, backend) == (SOURCE, KERNEL, "nvrtc")

        def compile(self) -> None:
            calls.append(("compiled", current[-1]))

        def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
            assert current[-1] == number
            calls.append((grid, block, arguments))

    class ExternalStream:
        def __init__(self, pointer: int, device: int) -> None:
            self.pointer = (pointer, device)

        def __enter__(self) -> None:
            assert current[-1] == number, "cupy has a current stream for each device"
            calls.append(self.pointer)

        def __exit__(self, *error: object) -> None: ...

    def attributes(address: int) -> SimpleNamespace:
        return SimpleNamespace(devicePointer=address + 1 if current[-1] == number else 0)

    cuda = SimpleNamespace(
        Device=device, ExternalStream=ExternalStream, runtime=SimpleNamespace(pointerGetAttributes=attributes)
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawKernel=RawKernel, cuda=cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=99 + index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: number)
    for where in (torch.device("cuda", number), torch.device("cuda")):
        gather = copies.compile_gather(where)
        gather.launch(1 << 40, 2, 16, 4)
        launched = ((BLOCKS, 16, 4), (THREADS,), (1 << 40, 2))
        assert calls == [("compiled", number), (99 + number, number), launched]
        assert all(type(argument) is np.uint64 for argument in calls[-1][2])
        assert gather.device_pointer(5) == 6
        calls.clear()
    assert current == [7]
