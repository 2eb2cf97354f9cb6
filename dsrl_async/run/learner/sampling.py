"""What the learner draws batches from: the replay ring in place, or a mirror of it on the learner's device.

`InPlace` and `Mirror` have the same attributes, and `draw` is the same sequence of tensor operations over either:

* `columns`: tensors of the rows of all lanes, one after another;
* `seen`: those that only DSRL-NA's rows have, or None;
* `table`: int64 [rows], of which the first `size` are the places of the decisions that can be drawn, by lane, oldest
  first, so that what is drawn depends on what the ring holds and not on where in the ring it lies;
* `head`: int64 [lanes], the ring's, as of the last `refresh`;
* `refresh()` brings them up to date and returns how many decisions can be drawn;
* `overtaken(positions)`: whether a writer may have come round to one of the drawn rows meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsrl_async.config.settings import SacConfig
from dsrl_async.sac.agent import Batch, RandomNumbers, transition_discount
from dsrl_async.shm.replay import ReplayRing

CHUNK_ROWS = 512
"""Rows that a mirror copies at once: 6 MB, far more than a transfer costs to start, and little page-locked memory."""


class Columns(NamedTuple):
    """The rows of a ring, R = lanes * n with n rows per lane; row r of a lane lies at `lane * n + r % n`."""

    image: Tensor  # uint8 [R, 64, 64, 3 * cameras]
    state: Tensor  # fp32 [R, state_dim]
    noise: Tensor  # fp32 [R, A]; in DSRL-NA's rows the actions, fp32 [R, chunk * action_dim]
    reward: Tensor  # fp32 [R]
    steps: Tensor  # int32 [R]
    terminal: Tensor  # bool [R]


class SeenColumns(NamedTuple):
    """What the policy sees of observations beside the robot's state, `shm.replay.Seen`: DSRL-NA's rows, or a batch."""

    images: Tensor  # uint8 [R, cameras, image_size, image_size, 3]
    task_index: Tensor  # int64 [R]


def rows_of(ring: ReplayRing) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The rows of all lanes, one after another: those of `Columns`, and of `SeenColumns` if they have them."""
    names = [ring.judged if name == "noise" else name for name in Columns._fields]
    seen = ["policy_images", "task_index"] if ring.of_actions else []
    flat = {name: ring.rows[name].reshape(-1, *ring.rows[name].shape[2:]) for name in [*names, *seen]}
    return [flat[name] for name in names], [flat[name] for name in seen]


class Drawable:
    """Which rows can be drawn: those with an outcome that no writer is about to overwrite.

    `table` and `numbers` are int64 [R]: place and row number, by lane, oldest first; the first `size` count.
    """

    def __init__(self, lanes: int, rows_per_lane: int, pinned: bool) -> None:
        self.table = torch.zeros(lanes * rows_per_lane, dtype=torch.int64, pin_memory=pinned)
        self.numbers = np.zeros(lanes * rows_per_lane, np.int64)
        self.size = 0
        self._rows_per_lane = rows_per_lane
        self.head = np.zeros(lanes, np.int64)
        self._of_lane = [np.empty(0, np.int64)] * lanes  # row numbers

    def update(self, head: np.ndarray, low: np.ndarray, complete: np.ndarray) -> bool:
        """Take over a ring's `head` and the first row that counts, `low`, int64 [lanes] each, and `complete` bool
        [lanes, rows]; whether anything is new."""
        changed = np.flatnonzero(head != self.head)
        for lane in changed:
            numbers = np.arange(low[lane], max(low[lane], head[lane] - 1))  # the newest row is pending
            self._of_lane[lane] = numbers[complete[lane, numbers % self._rows_per_lane]]
        if len(changed):
            self.head[:] = head
            self.size = sum(map(len, self._of_lane))
            np.concatenate(self._of_lane, out=self.numbers[: self.size])
            places, lane_begins = self.table.numpy()[: self.size], np.arange(len(head)) * self._rows_per_lane
            np.remainder(self.numbers[: self.size], self._rows_per_lane, out=places)
            places += np.repeat(lane_begins, [len(numbers) for numbers in self._of_lane])
        return len(changed) > 0


def following(lanes: int, rows_per_lane: int, device: torch.device) -> Tensor:
    """int64 [R]: the place of each row's successor in its lane."""
    places = torch.arange(lanes * rows_per_lane).view(lanes, rows_per_lane)
    return places.roll(-1, 1).flatten().to(device)


class InPlace:
    """The ring itself, for a learner on the CPU."""

    def __init__(self, ring: ReplayRing) -> None:
        self.device = torch.device("cpu")
        self._ring = ring
        self._drawable = Drawable(ring.lanes, ring.rows_per_lane, pinned=False)
        columns, seen = rows_of(ring)
        self.columns = Columns(*map(torch.from_numpy, columns))
        self.seen = SeenColumns(*map(torch.from_numpy, seen)) if seen else None
        self.table, self.following = self._drawable.table, following(ring.lanes, ring.rows_per_lane, self.device)
        self.size = torch.ones((), dtype=torch.float64)

    @property
    def head(self) -> np.ndarray:
        return self._drawable.head

    def refresh(self) -> int:
        head = self._ring.heads()
        low = np.maximum(0, head + 1 - self._ring.rows_per_lane)  # as `ReplayRing.windows`
        if self._drawable.update(head, low, self._ring.rows["complete"]):
            self.size.fill_(max(1, self._drawable.size))
        return self._drawable.size

    def overtaken(self, positions: Tensor) -> bool:
        drawn = positions.numpy()
        lanes = self._drawable.table.numpy()[drawn] // self._ring.rows_per_lane
        return bool((self._drawable.numbers[drawn] < self._ring.windows()[0][lanes]).any())


class Mirror:
    """A copy of the ring on a device, to which `refresh` adds what is new: drawing then needs nothing of the host.

    New rows go through page-locked chunks where there is CUDA (which has not been run), and are copied as they are
    elsewhere. A row that its writer may have overwritten while it was copied is left out.
    """

    def __init__(self, ring: ReplayRing, device: torch.device) -> None:
        self.device, self._ring = device, ring
        cuda = device.type == "cuda"
        self._drawable = Drawable(ring.lanes, ring.rows_per_lane, pinned=cuda)
        self._head = np.zeros(ring.lanes, np.int64)
        self._complete = np.zeros((ring.lanes, ring.rows_per_lane), np.bool_)
        columns, seen = rows_of(ring)
        self._rows = [*columns, *seen]
        like = [torch.from_numpy(rows[:1]) for rows in self._rows]
        rows = ring.lanes * ring.rows_per_lane
        self._copies = [one.new_zeros(rows, *one.shape[1:], device=device) for one in like]
        self.columns = Columns(*self._copies[: len(columns)])
        self.seen = SeenColumns(*self._copies[len(columns) :]) if seen else None
        self._chunk = [one.new_zeros(CHUNK_ROWS, *one.shape[1:]) for one in like]
        self._places = torch.zeros(CHUNK_ROWS, dtype=torch.int64)
        if cuda:
            self._chunk = [column.pin_memory() for column in self._chunk]
            self._places = self._places.pin_memory()
        self._copied = torch.cuda.Event(blocking=True) if cuda else None  # a wait sleeps: the workers need the core
        self.table = torch.zeros_like(self._drawable.table, device=device)
        self.following = following(ring.lanes, ring.rows_per_lane, device)
        self.size = torch.ones((), dtype=torch.float64, device=device)

    @property
    def head(self) -> np.ndarray:
        return self._head

    def refresh(self) -> int:
        head = self._ring.heads()
        lanes, numbers = self._new_rows(head)
        for start in range(0, len(numbers), CHUNK_ROWS):
            self._copy(lanes[start : start + CHUNK_ROWS], numbers[start : start + CHUNK_ROWS])
        if len(numbers):
            self._head[:] = head
            # From where nothing was overwritten while it was copied: a row before that may have lost its successor.
            # The device has read the table of the last refresh, which `_copy` waits for; for more than that nobody
            # waits, as the new rows are copied behind all updates that were enqueued.
            self._drawable.update(head, self._ring.windows()[0], self._complete)
            self.table.copy_(self._drawable.table, non_blocking=True)
            self.size.fill_(max(1, self._drawable.size))
            self._record()
        return self._drawable.size

    def overtaken(self, positions: Tensor) -> bool:
        return False  # only `refresh` writes here

    def _new_rows(self, head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lanes and row numbers, int64 each, of the rows to copy: the last one, too, which was pending then."""
        lanes = np.flatnonzero(head != self._head)
        oldest = np.maximum(0, head[lanes] + 1 - self._ring.rows_per_lane)
        first = np.maximum(self._head[lanes] - 1, oldest)
        numbers = [np.arange(a, b) for a, b in zip(first, head[lanes], strict=True)]
        empty = [np.empty(0, np.int64)]
        return np.repeat(lanes, head[lanes] - first), np.concatenate(numbers or empty)

    def _copy(self, lanes: np.ndarray, numbers: np.ndarray) -> None:
        count, slots = len(numbers), numbers % self._ring.rows_per_lane
        self._wait()
        places = self._places[:count]
        places.numpy()[:] = lanes * self._ring.rows_per_lane + slots
        for chunk, rows in zip(self._chunk, self._rows, strict=True):
            np.take(rows, places.numpy(), axis=0, out=chunk.numpy()[:count], mode="clip")
        complete = self._ring.rows["complete"][lanes, slots]
        overtaken = numbers < self._ring.windows()[0][lanes]
        self._complete[lanes, slots] = complete & ~overtaken
        on_device = places.to(self.device, non_blocking=True)
        for column, chunk in zip(self._copies, self._chunk, strict=True):
            column.index_copy_(0, on_device, chunk[:count].to(self.device, non_blocking=True))
        self._record()

    def _wait(self) -> None:
        """Until the device has read what the host is going to overwrite."""
        if self._copied is not None:
            self._copied.synchronize()

    def _record(self) -> None:
        if self._copied is not None:
            self._copied.record()


Source = InPlace | Mirror


def source_for(ring: ReplayRing, device: torch.device) -> Source:
    return InPlace(ring) if device.type == "cpu" else Mirror(ring, device)


def empty_batch(columns: Columns, batch_size: int) -> Batch:
    """Buffers for `draw`."""

    def zeros(rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, *like.shape[1:])

    return Batch(
        images=zeros(2 * batch_size, columns.image),
        states=zeros(2 * batch_size, columns.state),
        noise=zeros(batch_size, columns.noise),
        reward=zeros(batch_size, columns.reward),
        discount=zeros(batch_size, columns.reward),
    )


@torch.no_grad()
def draw(source: Source, random: RandomNumbers, config: SacConfig, positions: Tensor, batch: Batch) -> None:
    """Fill `batch` with decisions drawn uniformly, with replacement.

    `positions`, int64 [B], is filled with their places in the table. Reads no value on the host. `refresh` must have
    found something to draw.
    """
    columns, row = source.columns, draw_rows(source, random, positions)
    both = torch.cat([row, source.following.index_select(0, row)])
    torch.index_select(columns.image, 0, both, out=batch.images)
    torch.index_select(columns.state, 0, both, out=batch.states)
    torch.index_select(columns.noise, 0, row, out=batch.noise)
    torch.index_select(columns.reward, 0, row, out=batch.reward)
    steps, terminal = columns.steps.index_select(0, row), columns.terminal.index_select(0, row)
    batch.discount.copy_(transition_discount(config, steps, terminal))


@torch.no_grad()
def draw_rows(source: Source, random: RandomNumbers, positions: Tensor) -> Tensor:
    """int64 [B]: the places of decisions drawn uniformly; `positions` is as in `draw`."""
    # A product that was rounded up would be one more than the last position.
    positions.copy_((random.rows * source.size).clamp_(max=source.size - 1))
    return source.table.index_select(0, positions)
