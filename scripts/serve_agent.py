"""Serve an agent to robots by openpi's protocol, so that `openpi_client.WebsocketClientPolicy` can be used with it.

    python scripts/serve_agent.py runs/NAME --port 8000

A client that connects is sent a message about the agent. It sends an observation and gets a chunk of actions back,
again and again; `GET /healthz` answers OK. Messages are msgpack maps with numpy arrays as openpi packs them, and
nothing is ever unpickled. Who sends something else is told what is wrong in a text message, which openpi's client
raises as RuntimeError, and may go on. Nobody is asked who they are: by default only this machine is listened to
(docs/using_the_agent.md). Needs `pip install "dsrl_async[serve]"`.
"""

from __future__ import annotations

import argparse
import asyncio
import http
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

import dsrl_async
from dsrl_async.host.command import guard
from dsrl_async.untrusted import in_one_line, shown

logger = logging.getLogger("serve_agent")

LARGEST_MESSAGE = 64 << 20
"""Bytes of a message; three uncompressed pictures of 1080 lines have 19 MB."""
MOST_AXES = 8
Robot = tuple[dsrl_async.Agent, np.random.Generator]


@dataclass(frozen=True)
class Keys:
    """Under which keys an observation has what the agent takes. The defaults are those of openpi's LIBERO client."""

    images: Sequence[str] = ("observation/image", "observation/wrist_image")
    """Of the cameras' pictures, in the environment's order."""
    state: str = "observation/state"
    prompt: str = "prompt"


def pack(message: Any) -> bytes:
    """A message, in which there may be numpy arrays and numbers, in openpi's form."""

    def of_numpy(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        raise TypeError(f"{type(value).__name__} cannot be sent")

    packed: bytes = msgpack.packb(message, default=of_numpy)
    return packed


def unpack(data: bytes) -> Any:
    """What a message says; raises ValueError if it is not msgpack, or an array in it is none of plain numbers."""

    def to_numpy(value: dict[Any, Any]) -> Any:
        if b"__ndarray__" in value:
            shape, content = value.get(b"shape"), value.get(b"data")
            dtype = plain_dtype(value.get(b"dtype"))
            if not isinstance(shape, list) or len(shape) > MOST_AXES or not isinstance(content, bytes):
                raise ValueError("an array needs data, and a shape of few axes")
            return np.frombuffer(content, dtype).reshape(shape)
        if b"__npgeneric__" in value:
            return plain_dtype(value.get(b"dtype")).type(value.get(b"data"))
        return value

    try:
        return msgpack.unpackb(data, object_hook=to_numpy)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"the message is not msgpack with arrays of numbers: {in_one_line(error)}") from None


def plain_dtype(name: Any) -> np.dtype[Any]:
    """The dtype of that name; raises ValueError unless it is one of booleans, whole numbers or floats."""
    if not isinstance(name, str) or len(name) > 8:
        raise ValueError(f"{shown(name)} is no dtype")
    dtype = np.dtype(name)
    if dtype.kind not in "biuf":
        raise ValueError(f"arrays of {shown(name)} are not read")
    return dtype


def answer(data: str | bytes, robot: Robot, keys: Keys, prompt: str | None) -> str | bytes:
    """The answer to one message: the actions, packed, or a sentence about what is wrong with it."""
    agent, generator = robot
    begin = time.perf_counter()
    try:
        message = unpack(data) if isinstance(data, bytes) else None
        if not isinstance(message, Mapping):
            raise ValueError("a message must be a msgpack map with an observation")
        if missing := [key for key in (*keys.images, keys.state) if key not in message]:
            raise ValueError(f"the observation lacks {shown(missing[0])}; it has {shown(sorted(map(str, message)))}")
        state = np.asarray(message[keys.state])
        if state.ndim != 1:
            raise ValueError(f"{keys.state} must have one axis: one observation is answered at a time")
        images = [message[key] for key in keys.images]
        observation = {"images": images, "state": state, "prompt": message.get(keys.prompt, prompt)}
        actions = agent.act(observation, generator=generator)
    except (ValueError, TypeError) as error:
        return in_one_line(error)
    except Exception:
        logger.exception("an observation could not be answered")
        return "the server failed at this observation; its log says why"
    return pack({"actions": actions, "server_timing": {"infer_ms": 1e3 * (time.perf_counter() - begin)}})


def about(agent: dsrl_async.Agent, keys: Keys) -> dict[str, Any]:
    """What a client is told of the agent when it connects."""
    return {
        "checkpoint": str(agent.checkpoint),
        "prompts": list(agent.prompts),
        "image_keys": list(keys.images),
        "image_size": agent.spec.image_size,
        "state_dim": agent.spec.state_dim,
        "action_dim": agent.spec.action_dim,
        "chunk": agent.chunk,
        "noise": agent.mode,
    }


def health(connection: ServerConnection, request: Request) -> Response | None:
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None


async def run_server(
    agent: dsrl_async.Agent,
    host: str,
    port: int,
    keys: Keys,
    prompt: str | None = None,
    seed: int = 0,
    listening: Callable[[int], None] = lambda port: None,
) -> None:
    """Serve until the task is cancelled; `listening` is called with the port, which is a free one if `port` is 0.

    `prompt` is that of observations without one. Each connection has noise of its own, which `seed` determines.
    """
    seeds = np.random.SeedSequence(seed)

    async def converse(connection: ServerConnection) -> None:
        robot = agent, np.random.default_rng(seeds.spawn(1)[0])
        logger.info("%s has connected", connection.remote_address)
        try:
            await connection.send(pack(about(agent, keys)))
            async for message in connection:
                await connection.send(await asyncio.to_thread(answer, message, robot, keys, prompt))
        except ConnectionClosed:
            pass
        logger.info("%s has left", connection.remote_address)

    options: dict[str, Any] = {"compression": None, "max_size": LARGEST_MESSAGE, "process_request": health}
    async with serve(converse, host, port, **options) as server:
        bound = server.sockets[0].getsockname()[1]
        logger.info("listening on %s, port %d", host, bound)
        listening(bound)
        await server.serve_forever()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory, or one of its checkpoints")
    parser.add_argument("--best", action="store_true", help="serve the run's best checkpoint")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (the default)")
    parser.add_argument(
        "--noise", choices=("deterministic", "stochastic", "base"), help="default: as the run evaluates"
    )
    parser.add_argument("--prompt", help="that of observations without one; it need not be one of the run's")
    parser.add_argument("--image-keys", nargs="+", default=list(Keys.images), help="of the pictures, in order")
    parser.add_argument("--state-key", default=Keys.state)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: only this machine)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    options = parser.parse_args(list(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prompts = [] if options.prompt is None else [options.prompt]
    agent = dsrl_async.load_agent(
        options.run, best=options.best, device=options.device, mode=options.noise, prompts=prompts
    )
    keys = Keys(options.image_keys, options.state_key)
    if len(keys.images) != agent.spec.cameras:
        raise ValueError(f"--image-keys must be {agent.spec.cameras}, one for each camera, not {len(keys.images)}")
    asyncio.run(run_server(agent, options.host, options.port, keys, options.prompt, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(guard(lambda: main(sys.argv[1:])))
