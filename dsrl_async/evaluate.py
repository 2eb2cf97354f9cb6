"""The command: `python -m dsrl_async.evaluate [--checkpoint RUN] --episodes N --seed S [--video DIR]`.

Plays episodes with a fixed policy: the base policy (every action slot starts from independent N(0, I) noise), or the
steered policy of a run's checkpoint. Several environment processes, one policy in this process. Scenes and noise depend
on the seed and the episode's number only, and are never those of training. The last line on stdout is the result as
one JSON object: `episodes, successes, success_rate, ci95_low, ci95_high, policy`, and what else identifies it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from torch import Tensor

from dsrl_async import checkpoints, preflight, processes
from dsrl_async.config import Config, ConfigError, read_yaml, validate
from dsrl_async.device import resolve_device
from dsrl_async.inference import InferenceServer, load_policies
from dsrl_async.preflight import cpu_threads, policy_directory
from dsrl_async.session import StopRequest
from dsrl_async.shm import events
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.steering import Mode


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson score; sensible also at 0 % and 100 %)."""
    rate = successes / episodes
    centre = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * (rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m dsrl_async.evaluate", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        help="a run directory (its last checkpoint) or a checkpoint directory; none: the base policy",
    )
    parser.add_argument("--base", action="store_true", help="evaluate the base policy of --checkpoint's run")
    parser.add_argument("--config", help="YAML file with the environment and policy, if there is no --checkpoint")
    parser.add_argument("--episodes", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise (default 0)")
    parser.add_argument(
        "--processes", type=int, default=None, help="environment processes (default: min(16, episodes))"
    )
    parser.add_argument(
        "--noise", choices=("deterministic", "stochastic"), help="default: sac.evaluation_noise of the run"
    )
    parser.add_argument("--video", metavar="DIR", help="write mp4 films of the first episodes there")
    parser.add_argument("--videos", type=int, default=4, help="how many episodes to film (default 4)")
    return parser


def resolve(options: argparse.Namespace) -> tuple[Config, Path | None, Mode]:
    """The run's configuration with evaluation's sizes, the checkpoint if any, and how noise is chosen."""
    for name in ("episodes", "processes", "videos"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise ConfigError("--seed must be in [0, 2^63)")
    checkpoint, settings = None, {}
    if options.checkpoint is not None:
        if options.config is not None:
            raise ConfigError("--config cannot be combined with --checkpoint: the run's own configuration is used")
        checkpoint = checkpoints.find(Path(options.checkpoint))
        if checkpoint is None:
            what = "there is no checkpoint in it" if Path(options.checkpoint).exists() else "it does not exist"
            raise ConfigError(
                f"--checkpoint {options.checkpoint}: {what}; give a run directory, or one of its checkpoints"
            )
        settings = read_yaml(checkpoint.parent.parent / "config.yaml")
    elif options.config is not None:
        settings = read_yaml(Path(options.config))
    config = validate(settings)
    actors = options.processes or min(16, options.episodes)
    replay = config.replay.model_copy(update={"capacity": 2 * actors})  # the actors write it, nobody reads it
    config = config.model_copy(update={"actors": actors, "seed": options.seed, "replay": replay})
    mode: Mode = options.noise or config.sac.evaluation_noise
    if checkpoint is None or options.base:
        mode = "base"
    return config, checkpoint, mode


def load_actor(checkpoint: Path, server: InferenceServer) -> None:
    """Put a checkpoint's actor weights into the server; raises ConfigError with one sentence if they do not fit."""
    path = checkpoint / "agent.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            flat: Tensor = file.get_tensor("actor.flat")
        server.policies.actor.load_flat_(flat)
    except Exception as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error


def evaluate(
    config: Config,
    checkpoint: Path | None,
    mode: Mode,
    episodes: int,
    video_dir: Path | None = None,
    videos: int = 0,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Play `episodes` episodes of `config.seed` in `config.actors` processes.

    Raises:
        ConfigError: the policy or the checkpoint cannot be used.
        RuntimeError: an environment process died; the message holds the end of its output.
        KeyboardInterrupt: `stop` was requested.
    """
    policy, spec = preflight.check_policy(config)
    preflight.check_device(config)
    preflight.check_descriptors(config)
    preflight.check_memory(config, spec, policy.action_horizon)
    torch.set_num_threads(cpu_threads(config.inference.threads))
    arena = create_memory(config, spec, policy.action_horizon)
    counters = Counters(arena)
    observation_ready = events.create()
    wake = [events.create() for _ in range(config.actors)]
    device = resolve_device(config.device)

    def notify(lanes: np.ndarray) -> None:
        for lane in lanes:
            events.notify(wake[lane])

    policies = load_policies(config, spec, device, mode, policy_directory(config))
    server = InferenceServer(config, arena, policies, notify, training=False)
    if checkpoint is not None and mode != "base":
        load_actor(checkpoint, server)
    actors: list[subprocess.Popen[bytes]] = []
    with (
        tempfile.TemporaryDirectory() as logs,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        try:
            for lane in range(config.actors):
                evaluation = {
                    "episodes": [lane, episodes, config.actors],
                    "video_dir": str(video_dir) if video_dir else None,
                    "videos": videos,
                }
                log = Path(logs) / f"actor-{lane:03d}.log"
                env_config, notify_fds = config.env.model_dump(), [observation_ready]
                actors.append(
                    processes.start_actor(
                        arena, lane, 1, config.seed, env_config, wake[lane], notify_fds, log, evaluation
                    )
                )
            bar = progress.add_task(f"{mode} policy", total=episodes)
            last_decision = time.monotonic()
            while True:
                if stop is not None and stop.reason:
                    raise KeyboardInterrupt
                codes = [actor.poll() for actor in actors]
                for lane, code in enumerate(codes):
                    if code:
                        message = processes.last_line(Path(logs) / f"actor-{lane:03d}.log")
                        raise RuntimeError(f"environment process {lane} ended with exit code {code}: {message}")
                if None not in codes:
                    break
                ready = server.slots.ready()
                if len(ready):
                    server.serve_ready(ready)
                    last_decision = time.monotonic()
                elif time.monotonic() - last_decision > config.heartbeat_timeout_s:
                    raise RuntimeError("the environment processes give no sign of life any more")
                else:
                    events.wait(observation_ready, timeout_s=0.1)
                progress.update(bar, completed=int(counters.actor_episodes.sum()))
        finally:
            processes.kill_all(actors)
            events.close([observation_ready, *wake])
    played, successes = int(counters.actor_episodes.sum()), int(counters.actor_successes.sum())
    assert played == episodes, f"{played} of {episodes} episodes were played"
    low, high = wilson_interval(successes, episodes)
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": round(successes / episodes, 4),
        "ci95_low": round(low, 4),
        "ci95_high": round(high, 4),
        "policy": "base" if mode == "base" else str(checkpoint),
        "noise": mode,
        "seed": config.seed,
        "mean_episode_len": round(float(counters.actor_env_steps.sum()) / episodes, 2),
    }


def main(argv: Sequence[str]) -> int:
    stop = StopRequest()
    begin = time.monotonic()
    try:
        options = build_parser().parse_args(list(argv))
        config, checkpoint, mode = resolve(options)
        video_dir = Path(options.video) if options.video else None
        if video_dir is not None:
            try:
                video_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--video: cannot write to {video_dir}: {error.strerror}") from error
            if not os.access(video_dir, os.W_OK):
                raise ConfigError(f"--video: cannot write to {video_dir}")
        result = evaluate(config, checkpoint, mode, options.episodes, video_dir, options.videos, stop)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps({**result, "wall_s": round(time.monotonic() - begin, 2)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
