"""What the processes of a run under faults meet when they start: an environment and a policy that say what they are.

`install` is called by a `sitecustomize` module that the harness puts on PYTHONPATH. It imports nothing of the product:
each patch is made when the product itself has imported the module, so that a process starts in its usual order.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from support.chaos import plants
from support.chaos.board import Board

PREFIX = "DSRL_CHAOS_"
"""The variables that the harness sets; their presence also marks the processes that belong to a run."""
STEP_S, COMPUTE_S, EXPORT_S, SYNC_S = 0.004, 0.012, 0.01, 0.003
"""How long an action chunk, a batch, a lane of a checkpoint and an fsync take at least: faults are to hit the middle of
them."""

Patch = Callable[[ModuleType], None]


def setting(name: str) -> str:
    return os.environ.get(PREFIX + name, "")


def install() -> None:
    """Have the modules of `PATCHES` patched after their import, in this process and those forked from it."""
    patches = {module: [patch] for module, patch in PATCHES.items()}
    for module, patch in plants.PLANTS.get(setting("PLANT"), {}).items():
        patches.setdefault(module, []).append(patch)
    sys.meta_path.insert(0, _Finder(patches))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, patches: dict[str, list[Patch]]) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in self._patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._patches[name])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, patches: list[Patch]) -> None:
        self._loader, self._patches = loader, patches

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for patch in self._patches:
            patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # runpy and importlib.resources ask for more


_board: list[Board] = []


def board() -> Board:
    if not _board:
        _board.append(Board(Path(setting("BOARD"))))
    return _board[0]


def report(what: str, **details: Any) -> None:
    """Append a finding to the harness's file, in one write."""
    line = json.dumps({"time": time.time(), "run": setting("RUN"), "what": what, **details}) + "\n"
    fd = os.open(setting("FINDINGS"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


# ---- the supervisor


def patch_supervisor(module: ModuleType) -> None:
    board().add("met_supervisor")
    if setting("QUICK_S"):
        module.QUICK_S = float(setting("QUICK_S"))  # type: ignore[attr-defined]


# ---- the environment workers


def patch_environments(module: ModuleType) -> None:
    import dataclasses

    record = module.tabletop_record

    def tabletop_record(settings: Any) -> Any:
        return dataclasses.replace(record(settings), make=make_environment)

    module.tabletop_record = tabletop_record  # type: ignore[attr-defined]


def make_environment(agent_cameras: Any) -> Any:
    board().add("met_template")
    return Environment()


class Environment:
    """Shows which observation it is, and looks at whose action chunk it is given."""

    def __init__(self) -> None:
        from dsrl_async.envs.tabletop_spec import TABLETOP

        self.spec = TABLETOP
        self._episode = self._decision = self._random = 0

    def reset(self, seed: int, number: int = 0) -> int:
        self._episode, self._decision = number, 0
        self._random = int.from_bytes(os.urandom(3), "little")
        return 0

    def _state(self) -> Any:
        import numpy as np
        from support.chaos import rows

        return rows.states(*(np.array([number]) for number in (self._episode, self._decision, self._random)))

    def observe(self, images: Any, sac_image: Any, state: Any) -> None:
        from support.chaos import rows

        state[:] = self._state()[0]
        sac_image[:] = rows.image_of(state)
        images[:] = sac_image[0, 0, 0]

    def step_chunk(self, action_chunk: Any) -> Any:
        from support.chaos import rows

        from dsrl_async.envs.protocol import ChunkOutcome

        state = self._state()
        time.sleep(STEP_S)
        board().add("answers")
        if (action_chunk != state[0, :7]).any():
            board().add("bad_answers")
            report("foreign answer", wanted=state[0].tolist(), got=action_chunk[0].tolist())
        outcome = rows.outcomes(state, len(action_chunk))
        self._decision += 1
        steps, success, truncated = int(outcome.steps[0]), bool(outcome.success[0]), bool(outcome.truncated[0])
        board().decided(self._episode % int(setting("LANES")))
        return ChunkOutcome(steps, steps - 1 if success else -1, success, truncated)

    def close(self) -> None:
        pass


# ---- the inference process


def patch_policies(module: ModuleType) -> None:
    def load_frozen_policy(config: Any, record: Any, device: Any, prompts: Any, progress: Any) -> Any:
        return Policy(record.spec)

    module.load_frozen_policy = load_frozen_policy  # type: ignore[attr-defined]


class Policy:
    """Has the sizes of the real one and takes a fixed time."""

    def __init__(self, spec: Any) -> None:
        import numpy as np

        self.spec, self.prompt_lengths, self.capturable = spec, np.zeros(1, np.int64), True

    def batch(self, batch_size: int, prompt_length: int) -> Any:
        return PolicyBatch(self.spec, batch_size)


class PolicyBatch:
    def __init__(self, spec: Any, size: int) -> None:
        import torch

        self.name = f"batch of {size}"
        pixels = (size, spec.cameras, spec.image_size, spec.image_size, 3)
        self.images = torch.zeros(pixels, dtype=torch.uint8)
        self.state = torch.zeros(size, spec.robot_state_dim)
        self.noise = torch.zeros(size, spec.action_horizon, spec.action_dim)
        self.actions = torch.zeros(size, spec.action_horizon, spec.robot_action_dim)

    def fill_prompts(self, prompts: Any) -> None:
        pass

    def encode(self) -> None:
        pass

    def denoise(self) -> None:
        time.sleep(COMPUTE_S)


def patch_steering(module: ModuleType) -> None:
    from support.chaos import rows

    board().add("met_inference")
    run = module.SteeredPolicy.run

    def stamped(self: Any) -> None:
        run(self)
        state = self.policy.state.numpy()
        rows.stamp(self.noise.numpy(), self.sac_image.numpy(), state)
        self.actions.numpy()[:] = state[:, None, :7]
        board().add("batches")

    module.SteeredPolicy.run = stamped


def patch_flat(module: ModuleType) -> None:
    load_flat_ = module.FlatModule.load_flat_

    def counted(self: Any, values: Any) -> None:
        load_flat_(self, values)
        board().add("weights")

    module.FlatModule.load_flat_ = counted


# ---- the learner


def patch_updates(module: ModuleType) -> None:
    board().add("met_learner")
    draw_batch = module.Updates.draw_batch

    def checked(self: Any) -> bool:
        drawn: bool = draw_batch(self)
        if drawn:
            check_batch(self)
        return drawn

    module.Updates.draw_batch = checked


def check_batch(updates: Any) -> None:
    from support.chaos import rows

    batch, count = updates.batch, len(updates.batch.reward)
    images, states = batch.images.numpy(), batch.states.numpy()
    lanes, _ = updates.source.table.find(updates.positions)
    drawn = rows.Drawn(
        images=images[:count],
        states=states[:count],
        next_images=images[count:],
        next_states=states[count:],
        noise=batch.noise.numpy(),
        reward=batch.reward.numpy(),
        steps=None,
        terminal=None,
        discount=batch.discount.numpy(),
        lanes=lanes.numpy(),
    )
    found = rows.problems(drawn, int(setting("LANES")), updates.agent.config.gamma)
    board().add("draws")
    board().add("rows", count)
    if found:
        bad = sorted({int(row) for numbers in found.values() for row in numbers})
        board().add("bad_rows", len(bad))
        what = {name: len(numbers) for name, numbers in found.items()}
        report("drawn rows", wrong=what, states=states[bad].tolist(), noise=drawn.noise[bad].tolist())


# ---- checkpoints and other files


def patch_ring(module: ModuleType) -> None:
    export_lane = module.ReplayRing.export_lane

    def slow(self: Any, lane: int) -> Any:
        board().add("saves")
        time.sleep(EXPORT_S)
        return export_lane(self, lane)

    module.ReplayRing.export_lane = slow


def patch_files(module: ModuleType) -> None:
    """Notice what is renamed into its place before the kernel was told to write it to the disk."""
    synced: dict[tuple[int, int], tuple[int, int]] = {}
    fsync = os.fsync

    def state(path: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        found = os.stat(path)
        return (found.st_dev, found.st_ino), (found.st_mtime_ns, found.st_size)

    def noted(fd: Any) -> None:
        fsync(fd)
        if setting("PLANT") != "no_sync":
            file, now = state(fd)
            synced[file] = now
        time.sleep(SYNC_S)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "os.rename" or "checkpoints" not in str(arguments[1]):
            return
        source = Path(os.fsdecode(arguments[0]))
        if not source.name.endswith(".tmp"):
            return  # something that is set aside, and was whole before
        board().add("renames")
        for path in [source, *(source.rglob("*") if source.is_dir() else [])]:
            file, now = state(path)
            if synced.get(file) != now:
                report("renamed before it was synced", file=str(path), to=str(arguments[1]))
                return
        synced.clear()

    os.fsync = noted
    sys.addaudithook(look)


PATCHES: dict[str, Patch] = {
    "dsrl_async.run.supervisor.supervisor": patch_supervisor,
    "dsrl_async.envs.shipped": patch_environments,
    "dsrl_async.run.inference.policies": patch_policies,
    "dsrl_async.run.inference.steering": patch_steering,
    "dsrl_async.sac.flat": patch_flat,
    "dsrl_async.run.learner.updates": patch_updates,
    "dsrl_async.shm.replay": patch_ring,
    "dsrl_async.host.files": patch_files,
}
