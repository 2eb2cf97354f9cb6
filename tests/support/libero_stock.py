"""Episodes of LIBERO as it is published and of our environment, and what is different between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.bench.systems.stock_libero import StockEnvironment
from dsrl_async.envs.libero import IDLE_ACTION, LiberoEnvironment, Scene


class Episode(NamedTuple):
    """What can be seen of an episode."""

    simulation: list[NDArray[np.float64]]
    """After each step: time, positions and velocities of the simulation."""
    success: list[bool]
    """After each step."""
    state: list[NDArray[np.float32]]
    """At each decision and at the end: float32[8]."""
    images: list[NDArray[np.uint8]]
    """At each decision and at the end: uint8[2, size, size, 3]."""


def play_stock(
    stock: StockEnvironment, scene: Scene, settling_steps: int, chunks: NDArray[np.float32], size: int
) -> Episode:
    """Executes float32[decisions, steps, 7] until it succeeds."""
    episode = Episode([], [], [], [])

    def decide() -> None:
        images, state = stock.observe(size)
        episode.images.append(images)
        episode.state.append(state)

    stock.reset(scene.seed, scene.init_state, scene.resets)
    for _ in range(settling_steps):
        stock.step(np.array(IDLE_ACTION))
    for chunk in chunks:
        decide()
        for action in chunk:
            reward, done = stock.step(action)
            assert done == (reward > 0)
            episode.simulation.append(stock.env.get_sim_state())
            episode.success.append(done)
            if done:
                decide()
                return episode
    decide()
    return episode


def play(environment: LiberoEnvironment, seed: int, number: int, chunks: NDArray[np.float32]) -> Episode:
    """The same with our environment; chunks are executed in parts, so that the simulation is seen at each step."""
    episode = Episode([], [], [], [])
    size = environment.spec.image_size

    def decide() -> None:
        images, state = np.empty((2, size, size, 3), np.uint8), np.empty(8, np.float32)
        environment.observe(images, np.empty((64, 64, 3), np.uint8), state)
        episode.images.append(images)
        episode.state.append(state)

    environment.reset(seed, number)
    for chunk in chunks:
        decide()
        for step in range(len(chunk)):
            outcome = environment.step_chunk(chunk[step : step + 1])
            episode.simulation.append(environment.domain.sim.get_state().flatten())
            episode.success.append(outcome.terminated)
            if outcome.terminated:
                decide()
                return episode
    decide()
    return episode


def differences(one: Episode, other: Episode) -> list[str]:
    """The names of what is not the same to the last bit."""

    def same(first: list[Any], second: list[Any]) -> bool:
        return len(first) == len(second) and all(map(np.array_equal, first, second))

    return [name for name in Episode._fields if not same(getattr(one, name), getattr(other, name))]
