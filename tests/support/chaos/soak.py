"""The replay ring at full speed: writers that are killed now and then, and a reader that checks every row it draws.

A row says which lane and row number it is and which writer wrote it, and all its fields follow from that. The writers
append as fast as they can, through `ReplayRing`; the reader draws as the learner does, through `sampling`. Observations
are small, so that there are as many rows as possible.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from support.chaos import plants
from support.chaos.rows import WINDOWS, mix

from dsrl_async.config.settings import SacConfig
from dsrl_async.run.learner.sampling import InPlace, draw, empty_batch
from dsrl_async.sac.agent import RandomNumbers
from dsrl_async.shm import replay
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.replay import ReplayRing, replay_fields

PIXELS = 48
WORDS = 4  # of 8 bytes, in a state and in a noise
BLOCK = 1024
"""Rows that a writer prepares at once."""
ROWS_PER_LANE = 2048
EPISODE = 40
BATCH = 32
CHECKED = 512
"""Batches that are checked at once."""
KILL_S = 1.0
"""Mean time between two kills of writers."""
PLANT_LIMIT_S = 60.0

Words = NDArray[np.int64]


def make_ring(lanes: int) -> ReplayRing:
    fields = replay_fields(lanes, ROWS_PER_LANE, state_dim=2 * WORDS, noise_width=2 * WORDS)
    fields["replay/image"] = ((lanes, ROWS_PER_LANE, PIXELS), "uint8")
    return ReplayRing(Arena.create(fields))


def words(lane: Words, number: Words, writer: Words, salt: int) -> Words:
    """Four integers that identify an observation, [n, 4]; with another salt, a noise."""
    who = lane << 32 | writer
    return np.stack([number, who, mix(salt, lane, number, writer), mix(salt + 1, lane, number, writer)], 1).astype(
        np.int64
    )


def pixels(number: Words, writer: Words) -> NDArray[np.uint8]:
    places = mix(5, number, writer).astype(np.int64) % (1 << 16)
    found: NDArray[np.uint8] = WINDOWS[places, :PIXELS]
    return found


def write(ring: ReplayRing, lane: int, writer: int) -> None:
    """Append to a lane for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    number = int(ring.head[lane])
    in_episode = -1
    while True:
        numbers = np.arange(number, number + BLOCK)
        lanes, writers = np.full(BLOCK, lane), np.full(BLOCK, writer)
        states = words(lanes, numbers, writers, 1).view(np.float32)
        noise = words(lanes, numbers - 1, writers, 3).view(np.float32)  # that of the row before, which it completes
        images = pixels(numbers, writers)
        for index in range(BLOCK):
            if in_episode < 0:
                ring.begin_episode(lane, images[index], states[index])
            else:
                done = number + index - 1
                ring.append(
                    lane,
                    noise=noise[index],
                    reward=float(done % 4096),
                    steps=done % 5 + 1,
                    terminal=done % 7 == 0,
                    policy_version=writer,
                    next_image=images[index],
                    next_state=states[index],
                )
            in_episode = -1 if in_episode == EPISODE else in_episode + 1
        number += BLOCK


@dataclass
class Result:
    """What a soak has done and found."""

    written: int = 0
    drawn: int = 0
    bad: int = 0
    redrawn: int = 0
    """Batches that were thrown away because a writer had come round to one of their rows."""
    kills: int = 0
    seconds: float = 0.0
    wrong: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.written:.3g} rows written, {self.drawn:.3g} drawn and checked: {self.bad} torn or foreign "
            f"{self.wrong or ''}; {self.redrawn} batches drawn again, {self.kills} writers killed, "
            f"{self.seconds:.0f} s ({self.written / max(self.seconds, 1e-9):.3g} rows written a second)"
        )


class Reader:
    """Draws as the learner does, and checks what it has drawn, many batches at once."""

    def __init__(self, ring: ReplayRing, seed: int, result: Result) -> None:
        self.source, self.result = InPlace(ring), result
        self.config, self.generator = SacConfig(), torch.Generator().manual_seed(seed)
        self.random = RandomNumbers(
            torch.zeros(BATCH, dtype=torch.float64), torch.zeros(BATCH, 0), torch.zeros(2, BATCH, 0)
        )
        self.positions = torch.zeros(BATCH, dtype=torch.int64)
        self.batch = empty_batch(self.source.columns, BATCH)
        count = BATCH * CHECKED
        self._images = np.zeros((CHECKED, 2 * BATCH, PIXELS), np.uint8)
        self._states = np.zeros((CHECKED, 2 * BATCH, 2 * WORDS), np.float32)
        self._noise = np.zeros((count, 2 * WORDS), np.float32)
        self._reward, self._discount = np.zeros(count, np.float32), np.zeros(count, np.float32)
        self._lane, self._number = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._filled = 0

    def draw(self) -> None:
        """One batch, if no writer comes round to it meanwhile."""
        if self.source.refresh() < BATCH:
            return
        self.random.rows.uniform_(generator=self.generator)
        draw(self.source, self.random, self.config, self.positions, self.batch)
        if self.source.overtaken(self.positions):
            self.result.redrawn += 1
            return
        at = self._filled
        here = slice(at * BATCH, (at + 1) * BATCH)
        self._images[at], self._states[at] = self.batch.images.numpy(), self.batch.states.numpy()
        self._noise[here], self._reward[here] = self.batch.noise.numpy(), self.batch.reward.numpy()
        self._discount[here] = self.batch.discount.numpy()
        self._lane[here], self._number[here] = self.source.table.find(self.positions)
        self._filled += 1
        if self._filled == CHECKED:
            self.check()

    def check(self) -> None:
        """Compare what was drawn with what the writers of these rows must have written."""
        lane, number = self._lane, self._number
        seen = np.ascontiguousarray(self._states).view(np.int64)
        state, following = seen[:, :BATCH].reshape(-1, WORDS), seen[:, BATCH:].reshape(-1, WORDS)
        image, next_image = (half.reshape(-1, PIXELS) for half in (self._images[:, :BATCH], self._images[:, BATCH:]))
        writer = state[:, 1] & 0xFFFFFFFF
        wrong = {
            "observation": (state != words(lane, number, writer, 1)).any(1),
            "image": (image != pixels(number, writer)).any(1),
            "next observation": (following != words(lane, number + 1, writer, 1)).any(1),
            "next image": (next_image != pixels(number + 1, writer)).any(1),
            "noise": (self._noise.view(np.int64) != words(lane, number, writer, 3)).any(1),
            "reward": self._reward != number % 4096,
            "discount": ~np.isclose(
                self._discount, np.where(number % 7 == 0, 0, self.config.gamma ** (number % 5 + 1)), rtol=1e-4
            ),
        }
        count = self._filled * BATCH
        bad = np.zeros(len(lane), np.bool_)
        for name, rows in wrong.items():
            if rows[:count].any():
                self.result.wrong[name] = self.result.wrong.get(name, 0) + int(rows[:count].sum())
            bad |= rows
        self.result.bad += int(bad[:count].sum())
        self.result.drawn += count
        self._filled = 0


def soak(
    rows: float,
    drawn: float,
    lanes: int,
    seed: int,
    limit_s: float,
    say: Callable[[Result], None] = lambda result: None,
    blind: bool = False,
) -> Result:
    """Write and draw at least so many rows; ends early at `limit_s`, or when something is wrong.

    `blind` is a planted fault: the reader does not look whether a writer has come round.
    """
    torch.set_num_threads(1)
    ring, result, rng = make_ring(lanes), Result(), random.Random(seed)
    reader = Reader(ring, seed, result)
    if blind:
        reader.source.overtaken = lambda positions: False  # type: ignore[method-assign]
    fork = multiprocessing.get_context("fork")
    writers: list[multiprocessing.process.BaseProcess] = []

    def start(lane: int, number: int) -> multiprocessing.process.BaseProcess:
        process = fork.Process(target=write, args=(ring, lane, number), daemon=True)
        process.start()
        return process

    begin = time.monotonic()
    next_kill, next_word, started = begin + 1.0, begin + 20.0, lanes
    try:
        writers += [start(lane, lane) for lane in range(lanes)]
        while result.written < rows or result.drawn < drawn:
            # Enough draws to keep up with the writers, and no more: they need the cores.
            if result.drawn * rows <= result.written * drawn * 1.1 + rows * BATCH * CHECKED:
                for _ in range(16):
                    reader.draw()
            else:
                time.sleep(0.002)
            now = time.monotonic()
            result.written, result.seconds = int(ring.head.sum()), now - begin
            if result.bad or result.seconds > limit_s:
                break
            if now > next_kill:
                lane = rng.randrange(lanes)
                writers[lane].kill()
                writers[lane].join(10)
                writers[lane] = start(lane, started)
                started, result.kills, next_kill = started + 1, result.kills + 1, now + rng.expovariate(1 / KILL_S)
            if now > next_word:
                say(result)
                next_word = now + 20.0
        reader.check()
    finally:
        for writer in writers:
            writer.kill()
            writer.join(10)
    return result


def run(rows: float, drawn: float, lanes: int, seed: int, limit_s: float, say: Callable[[str], None]) -> int:
    """The command: finds planted faults first, then soaks; returns the exit code."""
    append = ReplayRing.append
    plants.noise_after_head(replay)
    late = soak(1e12, 1e12, lanes, seed, PLANT_LIMIT_S)
    ReplayRing.append = append  # type: ignore[method-assign]
    say(f"planted, noise after head: {late}")
    blind = soak(1e12, 1e12, lanes, seed, PLANT_LIMIT_S, blind=True)
    say(f"planted, a reader that does not look whether rows were overwritten: {blind}")
    if not late.bad or not blind.bad:
        say("a planted fault was not found")
        return 1
    result = soak(rows, drawn, lanes, seed, limit_s, lambda now: say(f"so far: {now}"))
    say(str(result))
    short = result.written < rows or result.drawn < drawn
    return 1 if result.bad or short else 0
