"""Plays an episode in LIBERO as published and in our environment, and compares the two."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.bench.systems.stock_libero import StockEnvironment
from dsrl_async.envs.libero import IDLE_ACTION, LiberoEnvironment, Scene


class Trajectory(NamedTuple):
    """The observable course of an episode."""

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
) -> Trajectory:
    """Executes float32[decisions, steps, 7] until it succeeds."""
    trajectory = Trajectory([], [], [], [])

    def decide() -> None:
        images, state = stock.observe(size)
        trajectory.images.append(images)
        trajectory.state.append(state)

    stock.reset(scene.seed, scene.init_state, scene.resets)
    for _ in range(settling_steps):
        stock.step(np.array(IDLE_ACTION))
    for chunk in chunks:
        decide()
        for action in chunk:
            reward, done = stock.step(action)
            assert done == (reward > 0)
            trajectory.simulation.append(stock.env.get_sim_state())
            trajectory.success.append(done)
            if done:
                decide()
                return trajectory
    decide()
    return trajectory


def play(environment: LiberoEnvironment, seed: int, number: int, chunks: NDArray[np.float32]) -> Trajectory:
    """Does the same with our environment, one step at a time, so that the simulation is seen at each step."""
    trajectory = Trajectory([], [], [], [])
    size = environment.spec.image_size

    def decide() -> None:
        images, state = np.empty((2, size, size, 3), np.uint8), np.empty(8, np.float32)
        environment.observe(images, np.empty((64, 64, 3), np.uint8), state)
        trajectory.images.append(images)
        trajectory.state.append(state)

    environment.reset(seed, number)
    for chunk in chunks:
        decide()
        for step in range(len(chunk)):
            outcome = environment.step_chunk(chunk[step : step + 1])
            trajectory.simulation.append(environment.domain.sim.get_state().flatten())
            trajectory.success.append(outcome.terminated)
            if outcome.terminated:
                decide()
                return trajectory
    decide()
    return trajectory


def differences(one: Trajectory, other: Trajectory) -> list[str]:
    """The names of the fields that are not the same to the last bit."""

    def same(first: list[Any], second: list[Any]) -> bool:
        return len(first) == len(second) and all(map(np.array_equal, first, second))

    return [name for name in Trajectory._fields if not same(getattr(one, name), getattr(other, name))]
