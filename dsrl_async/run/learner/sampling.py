"""What the learner draws batches from: the replay ring in place, or a mirror of it on the learner's device.

`InPlace` and `Mirror` have the same attributes, and `draw` is the same sequence of tensor operations over either:

* `columns`: tensors of the rows of all lanes, one after another;
* `seen`: what the policy sees of them, which only DSRL-NA's rows have, or None;
* `task_index`: int64 [R], the numbers of their instructions, or None where they have none;
* `table`: which decisions can be drawn, by lane, oldest first, so that what is drawn depends on what the ring holds and
  not on where in the ring it lies; and `size`, how many there are;
* `refreshed_to`: int64 [lanes], the heads of the ring as of the last `refresh`;
* `refresh()` brings them up to date and returns how many decisions can be drawn;
* `overtaken(positions)`: whether a writer may have come round to one of the drawn rows meanwhile.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsrl_async.config.settings import SacConfig
from dsrl_async.run.learner.uploads import Uploads
from dsrl_async.sac.agent import Batch, Imitated, RandomNumbers, transition_discount
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


def rows_of(ring: ReplayRing) -> dict[str, np.ndarray]:
    """What is drawn of the rows of all lanes, one after another, named as `ReplayRing.rows`."""
    drawn = {ring.judged, "policy_images", "task_index", *Columns._fields}
    return {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in ring.rows.items() if name in drawn}


def columns_of(rows: dict[str, Tensor], ring: ReplayRing) -> tuple[Columns, SeenColumns | None, Tensor | None]:
    """`columns`, `seen` and `task_index` of a source, out of tensors of all that `rows_of` names."""
    columns = Columns(*(rows[ring.judged if name == "noise" else name] for name in Columns._fields))
    seen = SeenColumns(rows["policy_images"], rows["task_index"]) if ring.of_actions else None
    return columns, seen, rows.get("task_index")


class Table(NamedTuple):
    """Which decisions can be drawn, as rings of row numbers, one for each lane: what is new costs the same to add
    whatever the capacity."""

    numbers: Tensor
    """int64 [R]: in a lane's part, the numbers of its rows that can be drawn follow each other, modulo its length."""
    bounds: Tensor
    """int64 [2, lanes]: how many decisions the lanes up to each one have; and what leads from a position, which counts
    all lanes' decisions, to the place in its lane's ring."""

    def find(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Lanes and row numbers of the decisions at `positions`, int64 [B] each, without a value on the host."""
        ends, shifts = self.bounds.unbind()
        rows_per_lane = self.numbers.shape[0] // ends.shape[0]
        lanes = torch.searchsorted(ends, positions, right=True)
        places = (positions + shifts.index_select(0, lanes)).remainder_(rows_per_lane)
        return lanes, self.numbers.index_select(0, places.add_(lanes, alpha=rows_per_lane))

    def rows(self, positions: Tensor) -> Tensor:
        """Where the decisions at `positions` lie among the rows of all lanes, int64 [B] both."""
        lanes, numbers = self.find(positions)
        rows_per_lane = self.numbers.shape[0] // self.bounds.shape[1]
        return numbers.remainder_(rows_per_lane).add_(lanes, alpha=rows_per_lane)


class Drawable:
    """Which rows can be drawn: those with an outcome that no writer is about to overwrite.

    `table` is in memory of the host; `size` is how many there are.
    """

    def __init__(self, lanes: int, rows_per_lane: int) -> None:
        self.table = Table(
            torch.zeros(lanes * rows_per_lane, dtype=torch.int64), torch.zeros(2, lanes, dtype=torch.int64)
        )
        self.size = 0
        self._rows_per_lane = rows_per_lane
        self._numbers = self.table.numbers.numpy().reshape(lanes, rows_per_lane)
        self.refreshed_to, self._begin, self._count = np.zeros((3, lanes), np.int64)

    def update(self, head: np.ndarray, low: np.ndarray, complete: np.ndarray) -> np.ndarray | None:
        """Take over a ring's `head` and the first row that counts, `low`, int64 [lanes] each, and `complete` bool
        [lanes, rows], none of which is ever lower than before.

        Returns the places of the table's new numbers, int64, or None if nothing has changed.
        """
        changed, rows = np.flatnonzero(head != self.refreshed_to), self._rows_per_lane
        places = [self._update_lane(lane, int(head[lane]), int(low[lane]), complete[lane]) for lane in changed.tolist()]
        if not places:
            return None
        self.refreshed_to[:] = head
        ends, shifts = self.table.bounds.numpy()
        np.cumsum(self._count, out=ends)
        np.remainder(self._begin - ends + self._count, rows, out=shifts)
        self.size = int(ends[-1])
        return np.concatenate(places)

    def _update_lane(self, lane: int, head: int, low: int, complete: np.ndarray) -> np.ndarray:
        rows, numbers = self._rows_per_lane, self._numbers[lane]
        begin, count = int(self._begin[lane]), int(self._count[lane])
        gone = bisect.bisect_left(range(count), low, key=lambda index: numbers[(begin + index) % rows])
        begin, count = (begin + gone) % rows, count - gone
        # The newest row is pending, and so was the newest one of the last time.
        new = np.arange(max(low, int(self.refreshed_to[lane]) - 1), head - 1)
        new = new[complete[new % rows]]
        places = (begin + count + np.arange(len(new))) % rows
        numbers[places] = new
        self._begin[lane], self._count[lane] = begin, count + len(new)
        return places + lane * rows


def following(lanes: int, rows_per_lane: int, device: torch.device) -> Tensor:
    """int64 [R]: the place of each row's successor in its lane."""
    places = torch.arange(lanes * rows_per_lane).view(lanes, rows_per_lane)
    return places.roll(-1, 1).flatten().to(device)


class InPlace:
    """The ring itself, for a learner on the CPU."""

    def __init__(self, ring: ReplayRing) -> None:
        self.device = torch.device("cpu")
        self._ring = ring
        self._drawable = Drawable(ring.lanes, ring.rows_per_lane)
        rows = {name: torch.from_numpy(rows) for name, rows in rows_of(ring).items()}
        self.columns, self.seen, self.task_index = columns_of(rows, ring)
        self.table, self.following = self._drawable.table, following(ring.lanes, ring.rows_per_lane, self.device)
        self.size = torch.ones((), dtype=torch.float64)

    @property
    def refreshed_to(self) -> np.ndarray:
        return self._drawable.refreshed_to

    def refresh(self) -> int:
        head = self._ring.heads()
        low = np.maximum(0, head + 1 - self._ring.rows_per_lane)  # as `ReplayRing.windows`
        if self._drawable.update(head, low, self._ring.rows["complete"]) is not None:
            self.size.fill_(max(1, self._drawable.size))
        return self._drawable.size

    def overtaken(self, positions: Tensor) -> bool:
        lanes, numbers = (found.numpy() for found in self.table.find(positions))
        return bool((numbers < self._ring.windows()[0][lanes]).any())


class Mirror:
    """A copy of the ring on a device, to which `refresh` adds what is new: drawing then needs nothing of the host.

    New rows go through `Uploads`, so that `refresh` does not wait for updates that are enqueued (which has not been run
    on a GPU). A row that its writer may have overwritten while it was copied is left out.
    """

    def __init__(self, ring: ReplayRing, device: torch.device) -> None:
        self.device, self._ring = device, ring
        self._drawable = Drawable(ring.lanes, ring.rows_per_lane)
        self._head = np.zeros(ring.lanes, np.int64)
        self._complete = np.zeros((ring.lanes, ring.rows_per_lane), np.bool_)
        named = rows_of(ring)
        self._rows = list(named.values())
        like = [torch.from_numpy(rows[:1]) for rows in self._rows]
        rows = ring.lanes * ring.rows_per_lane
        self._copies = [one.new_zeros(rows, *one.shape[1:], device=device) for one in like]
        self.columns, self.seen, self.task_index = columns_of(dict(zip(named, self._copies, strict=True)), ring)
        self.table = Table(*(torch.zeros_like(tensor, device=device) for tensor in self._drawable.table))
        self.following = following(ring.lanes, ring.rows_per_lane, device)
        self.size = torch.ones((), dtype=torch.float64, device=device)
        places = torch.zeros(1, dtype=torch.int64, device="cpu").expand(CHUNK_ROWS)
        self._new_columns = Uploads([places, *(one.expand(CHUNK_ROWS, *one.shape[1:]) for one in like)], device)
        self._new_numbers = Uploads([places, places, self._drawable.table.bounds], device)

    @property
    def refreshed_to(self) -> np.ndarray:
        return self._head

    def refresh(self) -> int:
        head = self._ring.heads()
        lanes, numbers = self._new_rows(head)
        for start in range(0, len(numbers), CHUNK_ROWS):
            self._copy(lanes[start : start + CHUNK_ROWS], numbers[start : start + CHUNK_ROWS])
        if len(numbers):
            self._head[:] = head
            # From where nothing was overwritten while it was copied: a row before that may have lost its successor.
            changed = self._drawable.update(head, self._ring.windows()[0], self._complete)
            assert changed is not None
            for start in range(0, max(1, len(changed)), CHUNK_ROWS):
                self._copy_table(changed[start : start + CHUNK_ROWS])
            self.size.fill_(max(1, self._drawable.size))
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
        places, *chunk = self._new_columns.buffers()
        places.numpy()[:count] = lanes * self._ring.rows_per_lane + slots
        for column, rows in zip(chunk, self._rows, strict=True):
            np.take(rows, places.numpy()[:count], axis=0, out=column.numpy()[:count], mode="clip")
        complete = self._ring.rows["complete"][lanes, slots]
        overtaken = numbers < self._ring.windows()[0][lanes]
        self._complete[lanes, slots] = complete & ~overtaken
        places, *chunk = self._new_columns.send([count] * (1 + len(chunk)))
        for target, column in zip(self._copies, chunk, strict=True):
            target.index_copy_(0, places, column)
        self._new_columns.end()

    def _copy_table(self, changed: np.ndarray) -> None:
        """Send the numbers at these places of the table, and all bounds."""
        places, numbers, bounds = self._new_numbers.buffers()
        places.numpy()[: len(changed)] = changed
        numbers.numpy()[: len(changed)] = self._drawable.table.numbers.numpy()[changed]
        bounds.copy_(self._drawable.table.bounds)
        places, numbers, bounds = self._new_numbers.send([len(changed), len(changed), len(bounds)])
        self.table.numbers.index_copy_(0, places, numbers)
        self.table.bounds.copy_(bounds)
        self._new_numbers.end()


Source = InPlace | Mirror


def source_for(ring: ReplayRing, device: torch.device) -> Source:
    return InPlace(ring) if device.type == "cpu" else Mirror(ring, device)


def empty_batch(columns: Columns, batch_size: int, instructions: Tensor | None = None) -> Batch:
    """Buffers for `draw`, which is given the same `instructions`."""

    def zeros(rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, *like.shape[1:])

    return Batch(
        images=zeros(2 * batch_size, columns.image),
        states=zeros(2 * batch_size, columns.state),
        noise=zeros(batch_size, columns.noise),
        reward=zeros(batch_size, columns.reward),
        discount=zeros(batch_size, columns.reward),
        instructions=None if instructions is None else zeros(2 * batch_size, instructions),
    )


@torch.no_grad()
def draw(
    source: Source,
    random: RandomNumbers,
    config: SacConfig,
    positions: Tensor,
    batch: Batch,
    instructions: Tensor | None = None,
) -> None:
    """Fill `batch` with decisions drawn uniformly, with replacement.

    `positions`, int64 [B], is filled with where they stand among all that can be drawn. `instructions`, fp32 [P, n], is
    what the agent is told of each of the run's instructions, if anything. Reads no value on the host. `refresh` must
    have found something to draw.
    """
    columns, row = source.columns, draw_rows(source, random, positions)
    both = torch.cat([row, source.following.index_select(0, row)])
    torch.index_select(columns.image, 0, both, out=batch.images)
    torch.index_select(columns.state, 0, both, out=batch.states)
    torch.index_select(columns.noise, 0, row, out=batch.noise)
    torch.index_select(columns.reward, 0, row, out=batch.reward)
    steps, terminal = columns.steps.index_select(0, row), columns.terminal.index_select(0, row)
    batch.discount.copy_(transition_discount(config, steps, terminal))
    if instructions is not None:
        tell(source, both, instructions, batch.instructions)


def tell(source: Source, rows: Tensor, instructions: Tensor, told: Tensor | None) -> None:
    """Write into `told`, fp32 [n, width], what the agent is told of the task of each of the `rows`, int64 [n]."""
    assert source.task_index is not None
    assert told is not None
    torch.index_select(instructions, 0, source.task_index.index_select(0, rows), out=told)


class Demonstrated:
    """What was demonstrated, of which a batch of B gets its last n rows; the ring's are the first.

    Static buffers: `positions` and `row` int64 [n], what was drawn; `of_ring` and `own`, both parts of a batch.
    """

    def __init__(
        self,
        ring: ReplayRing,
        device: torch.device,
        share: float,
        batch_size: int,
        instructions: Tensor | None = None,
    ) -> None:
        self.source = source_for(ring, device)
        self.drawable = self.source.refresh()
        self.count = min(max(1, round(share * batch_size)), batch_size - 1)
        head = int(ring.heads()[0])
        imitated, near = (torch.from_numpy(ring.rows[name][0, :head].copy()) for name in ("imitated", "near"))
        self.imitated, self.near = imitated.to(device), near.to(device, torch.float32)
        self.positions = torch.zeros(self.count, dtype=torch.int64, device=device)
        self.row = torch.zeros_like(self.positions)
        self.own = empty_batch(self.source.columns, self.count, instructions)
        self.of_ring = empty_batch(self.source.columns, batch_size - self.count, instructions)

    @torch.no_grad()
    def draw(
        self,
        source: Source,
        random: RandomNumbers,
        config: SacConfig,
        positions: Tensor,
        batch: Batch,
        instructions: Tensor | None,
        imitated: Imitated,
    ) -> None:
        """As the function `draw`; `positions`, int64 [B - n], are those of the ring's part. Fills `imitated`, too."""
        of_ring, own, count = self.of_ring, self.own, self.count
        draw(source, random._replace(rows=random.rows[:-count]), config, positions, of_ring, instructions)
        draw(self.source, random._replace(rows=random.rows[-count:]), config, self.positions, own, instructions)
        self.row.copy_(self.source.table.rows(self.positions))
        for name in ("images", "states", *(() if instructions is None else ("instructions",))):
            now, after = getattr(of_ring, name).split(len(positions))
            own_now, own_after = getattr(own, name).split(count)
            torch.cat([now, own_now, after, own_after], out=getattr(batch, name))
        for name in ("noise", "reward", "discount"):
            torch.cat([getattr(of_ring, name), getattr(own, name)], out=getattr(batch, name))
        torch.index_select(self.imitated, 0, self.row, out=imitated.noise)
        torch.index_select(self.near, 0, self.row, out=imitated.weight)


@torch.no_grad()
def draw_rows(source: Source, random: RandomNumbers, positions: Tensor) -> Tensor:
    """int64 [B]: the places of decisions drawn uniformly; `positions` is as in `draw`."""
    # A product that was rounded up would be one more than the last position.
    positions.copy_((random.rows * source.size).clamp_(max=source.size - 1))
    return source.table.rows(positions)
