"""Actors of a run by themselves: started as a run starts them, until they have their first observation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsrl_async.config.load import validate
from dsrl_async.envs import environment_spec
from dsrl_async.host import processes
from dsrl_async.run.preflight.host import check_descriptors
from dsrl_async.run.worker.template import Template
from dsrl_async.shm import events
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.slots import Slots

POLL_S = 0.05


@contextmanager
def forked_actors(env: Mapping[str, Any], actors: int, directory: Path) -> Iterator[list[int]]:
    """So many actors of a run with the settings `env`, all forked at once, and their template, each with what it made.

    Yields the numbers of these processes when every actor has its first observation, and ends them. Their logs go to
    `directory`. Raises ValueError if one of them ends before.
    """
    config = validate({"actors": actors, "env": env})
    check_descriptors(config, "--together")
    env_config = config.env.model_dump()
    arena = create_memory(config, environment_spec(env_config), config.env.chunk)
    notify, *wake = (events.create() for _ in range(1 + actors))
    slots = Slots(arena)
    template = Template(arena, config.seed, env_config, wake, [notify], directory / "template.log")
    children: dict[str, processes.Process] = {"template": template.popen}

    def check_alive() -> None:
        for name, child in children.items():
            if (code := child.poll()) is not None:
                said = processes.last_line(directory / f"{name}.log")
                raise ValueError(f"{name} ended in its start ({processes.how_ended(code)}): {said}")

    def wait(done: Callable[[], bool]) -> None:
        while not done():
            check_alive()
            events.wait(notify, POLL_S)

    try:
        wait(lambda: template.prepared)
        for lane in range(actors):
            name = f"actor-{lane:03d}"
            try:
                children[name] = template.fork(lane, 1, directory / f"{name}.log", check_alive)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
        wait(lambda: bool(slots.request_id.all()))
        yield [child.pid for child in children.values()]
    finally:
        template.close()
        processes.kill_all(children.values())
        events.close([notify, *wake])
        arena.close()
