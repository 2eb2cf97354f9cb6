"""The replay buffer: a ring of rows in shared memory for each lane.

A row is one decision: the observation SAC saw, the noise that was used, and what came of it. For DSRL-NA it has the
actions instead of the noise, and beside the observation what the policy saw of it. Where the agent knows its task, and
for DSRL-NA, rows have the number of the observation's instruction.

Next observations are not stored: a decision's next observation is the next row of its lane. A lane's newest row is
always *pending*: its observation is there, its outcome is not. When an episode ends (or the environment worker dies)
the pending row simply never gets an outcome; it stays as the last decision's next observation and is never sampled
itself.

Only the environment worker that owns a lane writes it, and it advances `head` after the data, so nothing is locked. A
reader copies rows first and then looks whether the writer has come round to them meanwhile; if so, it draws others
(`sampling.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dsrl_async.config.shapes import sac_image_shape
from dsrl_async.shm import order
from dsrl_async.shm.arena import Arena, Fields

REPLAY, DEMONSTRATIONS = "replay/", "demonstrations/"
"""How the names of the arrays of a ring begin: of what the workers write, and of what was demonstrated."""
HEAD = "head"
OBSERVED = ("image", "state", "policy_images", "task_index")
"""Columns that are written when a row is started; the others come with its outcome."""


class ActionRow(NamedTuple):
    """The sizes of what a row has for DSRL-NA only."""

    chunk: int
    """Actions that a decision executes."""
    action_dim: int
    cameras: int
    """Those that the policy sees."""
    image_size: int
    """Height and width of the policy's images."""

    @property
    def actions(self) -> int:
        """Width of the executed actions, one after the other."""
        return self.chunk * self.action_dim


class Seen(NamedTuple):
    """What the policy sees of an observation, beside the robot's state."""

    images: np.ndarray | None
    """uint8 [cameras, image_size, image_size, 3]; only DSRL-NA's rows have them"""
    task_index: int
    """The number of its instruction."""


def replay_fields(
    lanes: int,
    rows_per_lane: int,
    state_dim: int,
    noise_width: int,
    agent_cameras: int = 1,
    of_actions: ActionRow | None = None,
    of_tasks: bool = False,
) -> Fields:
    """The arrays of a ring, whose rows are DSRL-NA's if `of_actions` is given; all of them have the `task_index` if
    `of_tasks`, and DSRL-NA's in any case."""
    rows = (lanes, rows_per_lane)
    chosen: Fields = {"replay/noise": ((*rows, noise_width), "float32")}
    policy: Fields = {}
    task: Fields = {"replay/task_index": (rows, "int64")} if of_tasks or of_actions is not None else {}
    if of_actions is not None:
        chosen = {"replay/action": ((*rows, of_actions.actions), "float32")}
        pictures = (*rows, of_actions.cameras, of_actions.image_size, of_actions.image_size, 3)
        policy = {"replay/policy_images": (pictures, "uint8")}
    return {
        "replay/image": ((*rows, *sac_image_shape(agent_cameras)), "uint8"),
        "replay/state": ((*rows, state_dim), "float32"),
        **chosen,
        "replay/reward": (rows, "float32"),
        "replay/steps": (rows, "int32"),
        "replay/terminal": (rows, "bool"),
        "replay/policy_version": (rows, "int64"),
        "replay/complete": (rows, "bool"),
        **policy,
        **task,
        "replay/head": ((lanes,), "int64"),
    }


def demonstration_ring_fields(rows: int, state_dim: int, noise_width: int, *sizes: Any) -> Fields:
    """The arrays of the ring of demonstrations, of one lane that is never full; the other arguments are those of
    `replay_fields`."""
    fields = replay_fields(1, rows + 1, state_dim, noise_width, *sizes)
    return {
        **{name.replace(REPLAY, DEMONSTRATIONS, 1): field for name, field in fields.items()},
        f"{DEMONSTRATIONS}imitated": ((1, rows + 1, noise_width), "float32"),
        f"{DEMONSTRATIONS}near": ((1, rows + 1), "bool"),
    }


class ReplayRing:
    """The rings of all lanes, for writers and readers.

    `head` counts the rows that were started in a lane; row r lies at r % rows_per_lane. `of_actions` says whether rows
    are DSRL-NA's, and `judged` which column its critic judges then: `action`, and `noise` otherwise. `keeps_seen` says
    whether rows have anything of `Seen`.
    """

    def __init__(self, arena: Arena, of: str = REPLAY) -> None:
        """`of` is the ring's name, `REPLAY` or `DEMONSTRATIONS`."""
        self.of_actions = f"{of}action" in arena.fields
        self.judged = "action" if self.of_actions else "noise"
        names = [name for name in arena.fields if name.startswith(of) and name != of + HEAD]
        self.rows = {name.removeprefix(of): arena[name] for name in names}
        self.keeps_seen = "task_index" in self.rows
        self.head = arena[of + HEAD]  # row number of the pending row + 1; 0: nothing was ever written
        self.lanes, self.rows_per_lane = self.rows["reward"].shape

    # ---- the environment worker's side

    def begin_episode(self, lane: int, image: np.ndarray, state: np.ndarray, seen: Seen | None = None) -> None:
        """Write an episode's first observation, image uint8 [64, 64, 3 * cameras] and state float32 [8].

        `seen` goes into rows that have anything of it, here and in `append`.
        """
        head = int(self.head[lane])
        order.barrier()  # who sees something of a row that overwrites an older one also sees the number before it
        # A predecessor that was killed inside `append` may have left its pending row marked complete.
        self.rows["complete"][lane, (head - 1) % self.rows_per_lane] = False
        self._write_observation(lane, head, image, state, seen)
        order.barrier()
        self.head[lane] = head + 1

    def append(
        self,
        lane: int,
        noise: np.ndarray,
        reward: float,
        steps: int,
        terminal: bool,
        policy_version: int,
        next_image: np.ndarray,
        next_state: np.ndarray,
        next_seen: Seen | None = None,
    ) -> None:
        """Complete the pending row with its outcome and write the next observation behind it.

        In DSRL-NA's rows the actions [chunk, action_dim] stand where `noise` does in others.
        """
        head = int(self.head[lane])
        assert head > 0, "append before begin_episode"
        order.barrier()  # as in `begin_episode`
        row = (head - 1) % self.rows_per_lane
        self._write_observation(lane, head, next_image, next_state, next_seen)
        rows = self.rows
        rows[self.judged][lane, row] = noise.reshape(-1)
        rows["reward"][lane, row] = reward
        rows["steps"][lane, row] = steps
        rows["terminal"][lane, row] = terminal
        rows["policy_version"][lane, row] = policy_version
        rows["complete"][lane, row] = True
        order.barrier()
        self.head[lane] = head + 1

    def _write_observation(
        self, lane: int, number: int, image: np.ndarray, state: np.ndarray, seen: Seen | None
    ) -> None:
        row = number % self.rows_per_lane
        self.rows["complete"][lane, row] = False
        self.rows["image"][lane, row] = image
        self.rows["state"][lane, row] = state
        if self.keeps_seen:
            assert seen is not None, "the agent, and with DSRL-NA the policy, is told what is here again"
            self.rows["task_index"][lane, row] = seen.task_index
            if self.of_actions:
                self.rows["policy_images"][lane, row] = seen.images

    # ---- the learner's side

    def heads(self) -> np.ndarray:
        """A copy of `head`, int64 [lanes]: later than all that was read before, and earlier than all that is read now.

        So the rows below it are whole, and what it says of rows that were read already is true.
        """
        order.barrier()
        heads = self.head.copy()
        order.barrier()
        return heads

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last row number of each lane that can be read, int64 [lanes] each.

        The last started row is pending; the writer may be filling row `head`, where row `head - rows_per_lane` was.
        """
        head = self.heads()
        low = np.maximum(0, head + 1 - self.rows_per_lane)
        return low, np.maximum(low, head - 1)

    def size(self) -> int:
        """Decisions that can be sampled, at this moment (closing rows not counted)."""
        low, high = self.windows()
        return int(
            sum(
                np.count_nonzero(self.rows["complete"][lane, np.arange(low[lane], high[lane]) % self.rows_per_lane])
                for lane in range(self.lanes)
            )
        )

    # ---- checkpoints

    def export_lane(self, lane: int) -> dict[str, np.ndarray]:
        """Copy a lane's rows, oldest first, the pending one last, as arrays [n, ...] named as `rows`."""
        head, size = int(self.heads()[lane]), self.rows_per_lane
        first = max(0, head - size)
        wrap = min(first + -first % size, head)
        parts = [(first, wrap), (wrap, head)]
        copied = {
            name: np.concatenate([rows[lane, a % size : a % size + b - a] for a, b in parts])
            for name, rows in self.rows.items()
        }
        # The writer may have gone on: what it can have reached is dropped; the last row was pending when copied.
        overtaken = max(0, int(self.windows()[0][lane]) - first)
        copied = {name: column[overtaken:] for name, column in copied.items()}
        if len(copied["complete"]):
            copied["complete"][-1] = False
        return copied

    def import_rows(self, lane: int, columns: dict[str, np.ndarray]) -> None:
        """Append exported rows to a lane, before its worker starts; the oldest are dropped if they do not fit."""
        columns = {name: column[-self.rows_per_lane :] for name, column in columns.items()}
        count, head = len(columns["complete"]), int(self.head[lane])
        numbers = np.arange(head, head + count) % self.rows_per_lane
        for name, column in columns.items():
            self.rows[name][lane, numbers] = column
        order.barrier()
        self.head[lane] = head + count

    def import_lanes(self, exported: list[dict[str, np.ndarray]]) -> None:
        """Fill an empty ring with exported lanes. For another number of lanes they are cut into pieces and spread."""
        if len(exported) == self.lanes and all(len(rows["complete"]) <= self.rows_per_lane for rows in exported):
            for lane, rows in enumerate(exported):
                self.import_rows(lane, rows)
            return
        length = max(2, self.rows_per_lane // 4)
        pieces = []  # (age of the last row, rows)
        for rows in exported:
            count = len(rows["complete"])
            for end in range(count, 1, 1 - length):  # a piece ends with the row that the next one begins with
                piece = {name: column[max(0, end - length) : end].copy() for name, column in rows.items()}
                piece["complete"][-1] = False
                pieces.append((count - end, piece))
        room = self.lanes * self.rows_per_lane
        kept = []
        for _, piece in sorted(pieces, key=lambda piece: piece[0]):
            room -= len(piece["complete"])
            if room < 0:
                break
            kept.append(piece)
        for piece in reversed(kept):  # the oldest first, so that it is overwritten first
            self.import_rows(int(np.argmin(self.head)), piece)
