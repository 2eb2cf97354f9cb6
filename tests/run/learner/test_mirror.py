"""The mirror of the ring on a GPU that computes late: what the host must not overwrite too early."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.late_gpu import LateGpu

from dsrl_async.run.learner import sampling
from dsrl_async.run.learner.sampling import Columns, Mirror, source_for
from dsrl_async.run.learner.uploads import SETS
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
    lanes, numbers = mirror.table.find(torch.arange(int(mirror.size)))
    return [column.index_select(0, lanes * ROWS + numbers % ROWS).numpy() for column in mirror.columns]


class Snapshots:
    """What an update that is enqueued now would read, once it is computed, and what it should."""

    def __init__(self, late: Mirror, plain: Mirror) -> None:
        self._mirrors, self._pairs = (late, plain), []  # type: ignore[var-annotated]

    def take(self) -> None:
        late, plain = ([*mirror.columns, *mirror.table, mirror.size] for mirror in self._mirrors)
        for there, here in zip(late, plain, strict=True):
            self._pairs.append((here.new_zeros(here.shape, device=GPU), here.clone()))
            self._pairs[-1][0].copy_(there, non_blocking=True)

    def check(self) -> None:
        for found, expected in self._pairs:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("eager", [False, True])
def test_a_late_gpu_gets_what_was_written(monkeypatch: pytest.MonkeyPatch, eager: bool) -> None:
    """An update reads the ring as it was at the last refresh before it was enqueued: neither rows that are still on
    their way, nor such as were sent later. The ring goes round meanwhile, and the host overwrites what it sent."""
    monkeypatch.setattr(sampling, "CHUNK_ROWS", CHUNK)
    ring, rng = make_ring(), np.random.default_rng(0)
    plain = Mirror(ring, torch.device("cpu"))
    with LateGpu(eager).install(monkeypatch) as gpu:
        late = source_for(ring, GPU)
        assert isinstance(late, Mirror)
        snapshots = Snapshots(late, plain)
        for decisions in (3, 9, 1, 1, 2, 14, 20, 5):
            write(ring, decisions, rng)
            assert late.refresh() == plain.refresh() > 0
            snapshots.take()
        assert late.refresh() == plain.refresh()
        assert gpu.waits  # for page-locked memory
        gpu.catch_up()
        snapshots.check()
    assert gpu.pageable == 0
    for name, found, expected in zip(Columns._fields, drawable(late), drawable(plain), strict=True):
        assert np.array_equal(found, expected), name
    rows = {name: ring.rows[name].reshape(LANES * ROWS, *ring.rows[name].shape[2:]) for name in Columns._fields}
    lanes, numbers = (found.numpy() for found in late.table.find(torch.arange(int(late.size))))
    for name, found in zip(Columns._fields, drawable(late), strict=True):
        assert np.array_equal(found, rows[name][lanes * ROWS + numbers % ROWS]), name


def test_a_refresh_waits_for_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the device is so far behind that the host has no page-locked memory left: what each set held was copied,
    and what the device was sent before that in the same set is still in use."""
    ring, rng = make_ring(), np.random.default_rng(0)
    with LateGpu().install(monkeypatch) as gpu:
        late = source_for(ring, GPU)
        write(ring, 3, rng)
        late.refresh()
        gpu.catch_up()
        update = torch.zeros(3, device=GPU)
        for _ in range(2 * SETS):
            update.fill_(1.0)  # enqueued, and not done when the rows are copied
            write(ring, 2, rng)
            late.refresh()
            assert gpu.waits_for_updates == 0
        update.fill_(1.0)
        write(ring, 2, rng)
        late.refresh()
        assert gpu.waits_for_updates > 0
