"""The mirror of the ring on a GPU that computes late: what the host must not overwrite too early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.late_gpu import LateGpu

from dsrl_async.run.learner import sampling
from dsrl_async.run.learner.sampling import Columns, Mirror, source_for
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.replay import ReplayRing, replay_fields

GPU = torch.device("cuda", 0)
LANES, ROWS, CHUNK = 2, 24, 6


def make_ring() -> ReplayRing:
    return ReplayRing(Arena.create(replay_fields(LANES, ROWS, 3, 2)))


def write(ring: ReplayRing, decisions: int, rng: np.random.Generator) -> None:
    """An episode of random decisions in each lane."""

    def observation() -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), rng.standard_normal(3).astype(np.float32)

    for lane in range(LANES):
        ring.begin_episode(lane, *observation())
        for index in range(decisions):
            noise, last = rng.standard_normal(2).astype(np.float32), index == decisions - 1
            ring.append(lane, noise, -float(not last), int(rng.integers(1, 6)), last, index, *observation())


def drawable(mirror: Mirror) -> list[np.ndarray]:
    """The decisions that can be drawn, by column, in their order."""
    places = mirror.table[: int(mirror.size)]
    return [column.index_select(0, places).numpy() for column in mirror.columns]


def test_a_late_gpu_gets_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and table are page-locked, and read only when the device comes to it; the ring goes round meanwhile."""
    monkeypatch.setattr(sampling, "CHUNK_ROWS", CHUNK)
    ring, rng = make_ring(), np.random.default_rng(0)
    plain = Mirror(ring, torch.device("cpu"))
    tables = []  # what an update would draw from after each refresh, and what it should
    with LateGpu().install(monkeypatch) as gpu:
        late = source_for(ring, GPU)
        assert isinstance(late, Mirror)
        for decisions in (3, 9, 1, 1, 2, 14, 20, 5):
            write(ring, decisions, rng)
            waits = gpu.waits
            assert late.refresh() == plain.refresh() > 0
            assert gpu.waits > waits  # chunk by chunk
            tables.append((torch.zeros(LANES * ROWS, dtype=torch.int64, device=GPU), plain.table.clone()))
            tables[-1][0].copy_(late.table, non_blocking=True)
        assert late.refresh() == plain.refresh()
        gpu.catch_up()
        write(ring, 1, rng)
        waits = gpu.waits
        assert late.refresh() == plain.refresh()
        assert gpu.waits == waits, "a few rows are enqueued behind what the device is at"
        gpu.catch_up()
    assert gpu.pageable == 0
    for table, as_it_was in tables:
        assert torch.equal(table, as_it_was)
    for name, found, expected in zip(Columns._fields, drawable(late), drawable(plain), strict=True):
        assert np.array_equal(found, expected), name
    rows = {name: ring.rows[name].reshape(LANES * ROWS, *ring.rows[name].shape[2:]) for name in Columns._fields}
    places = late.table[: int(late.size)].numpy()
    for name, found in zip(Columns._fields, drawable(late), strict=True):
        assert np.array_equal(found, rows[name][places]), name
