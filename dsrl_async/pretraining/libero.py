"""Makes a small Pi0 for LIBERO from recorded demonstrations, on CPU cores.

    python -m dsrl_async.pretraining.libero --data data/libero_spatial --out runs/libero_spatial_pi0_small

It reads every `<task>_demo.hdf5` in a directory (LIBERO's own layout and what
`dsrl_async.pretraining.libero_demonstrations` adds to it) and goes through the two stages of
`dsrl_async.pretraining.training`, with an auxiliary loss in the first on the positions of the object to take and of its
goal, in the frame of the world and from the hand. The demonstrations of a few initial states per task are held out, and
their losses are printed beside those of training.

From the first checkpoint on, the output directory holds the latest policy, and in `training.json` what it was trained
on: a policy needs the same kind of images later. After an interruption, the same command with --resume continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsrl_async import __version__, untrusted
from dsrl_async.demonstrations import hdf5
from dsrl_async.envs.images import libero_image
from dsrl_async.host.command import guard
from dsrl_async.host.files import replacing
from dsrl_async.pi0.checkpoint import export_tensors, save_policy
from dsrl_async.pi0.config import TRAINING, Pi0Config, libero_small_config
from dsrl_async.pi0.files import NormStats
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.processing import Normaliser, PromptTokenizer
from dsrl_async.pretraining.training import (
    Demonstrations,
    Expert,
    Joint,
    StageSettings,
    action_chunks,
    build_tokenizer,
    load_training_state,
    progress_bar,
    statistics,
    training_state,
)

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
POSITIONS = ("target", "goal", "target from hand", "goal from hand")
SMALLEST_POSITION_STD = 0.01
"""Floor in metres, so that an error of a centimetre weighs at most as much as a standard deviation."""
SMALLEST_STATE_STD = 0.01
"""Floor in metres and radians: what hardly varies in the demonstrations is not blown up when the robot strays."""
SAME_IN_ALL_FILES = {"suite": str, "render_quality": str, "image_size": int, "settling_steps": int, "versions": str}
OF_A_FILE = {"task": str, "task_id": int, "seed": int}
LARGEST_IMAGE = 1024
FREE_SETTINGS = ("data", "out", "resume", "threads", "checkpoint_minutes", "stop_after")
"""Options that may change when a training is resumed."""
SAME_WHEN_RESUMED = ("settings", "demonstrations")
RESUME = "resume/state.safetensors"
"""It has a directory of its own, since all files of the parent that end in .safetensors belong to the policy."""


class Recording(NamedTuple):
    """A demonstration in a file."""

    held_out: bool
    """Whether its initial state is not trained on."""
    task: int
    """Index of the file."""
    name: str
    frames: int


@dataclass
class Frames:
    """All frames of all files as recorded, except for the images' size and orientation. Held-out ones come last."""

    images: Tensor
    """uint8 [F, 2, size, size, 3], as the environment shows them to a policy."""
    state: Tensor
    """float32 [F, 8]"""
    action: Tensor
    """float32 [F, 7]"""
    positions: Tensor
    """float32 [F, 12], the `POSITIONS` in metres."""
    task: Tensor
    """int64 [F], indices into `prompts`."""
    episode: Tensor
    """int64 [F], increasing."""
    training: int
    """Number of frames to train on."""
    prompts: list[str]
    described: dict[str, Any]
    """The files' attributes, for `training.json`."""


def find_recordings(paths: Sequence[Path], held_out_states: int) -> tuple[list[Recording], list[str], dict[str, Any]]:
    """All demonstrations, the instruction of each file, and the files' attributes.

    The `held_out_states` highest initial states of each file are held out. Raises ValueError, naming the file, when
    that leaves none or the files were not recorded alike.
    """
    recordings, prompts, tasks = [], [], []
    common: dict[str, Any] = {}
    for number, path in enumerate(paths):
        with hdf5.opened(path) as data:
            here = {name: hdf5.attribute(data, name, kind) for name, kind in SAME_IN_ALL_FILES.items()}
            here["versions"] = untrusted.parse_json(here["versions"], "the attribute versions of /data")
            if not 0 < here["image_size"] <= LARGEST_IMAGE:
                raise ValueError(f"its image_size is {here['image_size']}; it must be from 1 to {LARGEST_IMAGE}")
            common = common or here
            if differing := [name for name in here if here[name] != common[name]]:
                raise ValueError(f"{path} and {paths[0].name} differ in {', '.join(differing)}; record them alike")
            demos = hdf5.episodes(data)
            of_demo = {name: hdf5.attribute(demo, "init_state", int) for name, demo in demos.items()}
            states = sorted(set(of_demo.values()))
            if len(states) <= held_out_states:
                raise ValueError(f"{path} has {len(states)} initial states; hold out fewer than {held_out_states}")
            held_out = states[len(states) - held_out_states :]
            for name, demo in demos.items():
                count = hdf5.frames(hdf5.child(demo, "actions", h5py.Dataset))
                recordings.append(Recording(of_demo[name] in held_out, number, name, count))
            prompts.append(hdf5.attribute(data, "language_instruction", str))
            entry = {name: hdf5.attribute(data, name, kind) for name, kind in OF_A_FILE.items()}
            tasks.append({**entry, "episodes": len(demos), "init_states": states, "held_out_init_states": held_out})
    return recordings, prompts, {**common, "tasks": tasks}


def read_frames(directory: Path, image_size: int, held_out_states: int, console: Console) -> Frames:
    """Reads all demonstrations in a directory. Raises ValueError as `find_recordings` does, or when there are none."""
    paths = sorted(directory.glob("*_demo.hdf5"))
    if not paths:
        raise ValueError(f"there is no *_demo.hdf5 in {directory}; record demonstrations first (docs/libero_policy.md)")
    recordings, prompts, described = find_recordings(paths, held_out_states)
    recordings.sort(key=lambda recording: recording.held_out)
    count = sum(recording.frames for recording in recordings)
    training = sum(recording.frames for recording in recordings if not recording.held_out)
    described |= {"episodes": len(recordings), "frames": count, "training_frames": training}
    frames = Frames(
        images=torch.empty(count, len(CAMERAS), image_size, image_size, 3, dtype=torch.uint8),
        state=torch.empty(count, 8),
        action=torch.empty(count, 7),
        positions=torch.empty(count, 3 * len(POSITIONS)),
        task=torch.empty(count, dtype=torch.int64),
        episode=torch.empty(count, dtype=torch.int64),
        training=training,
        prompts=prompts,
        described=described,
    )
    start = 0
    for episode, recording in enumerate(track(recordings, "reading", console=console)):
        rows = slice(start, start + recording.frames)
        with hdf5.opened(paths[recording.task]) as data:
            _fill(frames, rows, hdf5.child(data, recording.name, h5py.Group), described["image_size"])
        frames.task[rows], frames.episode[rows] = recording.task, episode
        start = rows.stop
    return frames


def _fill(frames: Frames, rows: slice, demo: h5py.Group, recorded_size: int) -> None:
    count, size = rows.stop - rows.start, frames.images.shape[2]
    observed = hdf5.child(demo, "obs", h5py.Group)
    for camera, name in enumerate(CAMERAS):
        images = hdf5.pictures(observed, name, count, recorded_size)
        resized = np.stack([libero_image(image, size) for image in images])
        frames.images[rows, camera] = torch.from_numpy(resized)
    widths = {"robot_state": 8, "target_position": 3, "goal_position": 3}
    state, target, goal = (
        torch.from_numpy(hdf5.numbers(observed, name, (count, width))) for name, width in widths.items()
    )
    hand = state[:, :3]
    frames.state[rows] = state
    frames.action[rows] = torch.from_numpy(hdf5.numbers(demo, "actions", (count, 7)))
    frames.positions[rows] = torch.cat([target, goal, target - hand, goal - hand], dim=1)


def prepare(
    frames: Frames, config: Pi0Config, tokenizer: PromptTokenizer
) -> tuple[Demonstrations, Demonstrations | None, NormStats]:
    """Splits the frames into those to train on and held-out ones, both scaled by the statistics of the former."""
    train, held_out = slice(frames.training), slice(frames.training, None)
    stats = {
        "state": statistics(frames.state[train], SMALLEST_STATE_STD),
        "actions": statistics(frames.action[train]),
    }
    normaliser = Normaliser(config, stats)
    state = normaliser.state(frames.state)
    chunks = normaliser.actions(action_chunks(frames.action, frames.episode, config.action_horizon))
    scale = frames.positions[train].std(0).clamp_min(SMALLEST_POSITION_STD)
    positions = (frames.positions - frames.positions[train].mean(0)) / scale
    tokens, token_mask = (part[frames.task] for part in tokenizer(frames.prompts))

    def part(rows: slice) -> Demonstrations:
        images = frames.images[rows]
        fields = (tokens[rows], token_mask[rows], state[rows], chunks[rows], positions[rows])
        return Demonstrations(images, *fields, scale, POSITIONS)

    return part(train), part(held_out) if len(frames.state) > frames.training else None, stats


class Checkpoints:
    """Writes the latest policy and everything that the rest of the training depends on, every few minutes."""

    def __init__(
        self,
        args: argparse.Namespace,
        stats: NormStats,
        tokenizer: PromptTokenizer,
        described: dict[str, Any],
    ) -> None:
        self.directory, self.stats, self.tokenizer, self.described = args.out, stats, tokenizer, described
        self.stop_after = args.stop_after
        self.seconds, self.written = 60 * args.checkpoint_minutes, time.monotonic()
        self.started = time.monotonic()
        """Moved back by the time that training took before an interruption."""

    def after_update(self, stage: Joint | Expert) -> None:
        stopping = isinstance(stage, Expert) and stage.optimiser.step == self.stop_after
        if stopping or time.monotonic() - self.written >= self.seconds:
            self.write(stage)

    def write(self, stage: Joint | Expert) -> None:
        stage.optimiser.swap()
        self.write_policy(stage.model, stage_name(stage), stage.optimiser.step)
        stage.optimiser.swap()
        self.write_state(stage)
        self.written = time.monotonic()

    def minutes(self) -> float:
        """Minutes of training, with those before interruptions."""
        return round((time.monotonic() - self.started) / 60, 1)

    def write_state(self, stage: Joint | Expert) -> None:
        path = self.directory / RESUME
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"stage": stage_name(stage), "minutes": str(self.minutes())}
        metadata |= {name: json.dumps(self.described[name]) for name in SAME_WHEN_RESUMED}
        tensors = {name: tensor.detach().contiguous() for name, tensor in training_state(stage).items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    def write_policy(self, model: Pi0, stage: str, step: int, **described: Any) -> None:
        """Replaces the files, so that an evaluation that reads the directory meanwhile gets old or new weights."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.directory) as temporary:
            save_policy(temporary, model, self.stats, self.tokenizer)
            content = {**self.described, "stage": stage, "step": step, "minutes": self.minutes(), **described}
            (Path(temporary) / TRAINING).write_text(json.dumps(content, indent=2) + "\n")
            for file in sorted(Path(temporary).iterdir()):
                file.replace(self.directory / file.name)

    def read_state(self) -> tuple[str, dict[str, Tensor]]:
        """The name and the state of the interrupted stage.

        Raises ValueError if there is nothing to resume or it belongs to another run.
        """
        path = self.directory / RESUME
        if not os.path.exists(path):
            raise ValueError(f"there is no interrupted training in {self.directory}; leave out --resume")
        untrusted.check_regular(path)
        with safe_open(path, "pt") as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        before, demonstrations = (json.loads(metadata[name]) for name in SAME_WHEN_RESUMED)
        for name, value in self.described["settings"].items():
            if before.get(name) != value:
                raise ValueError(
                    f"the interrupted training had {name} {before.get(name)}, not {value}; "
                    "give the same options, or leave out --resume"
                )
        if demonstrations != json.loads(json.dumps(self.described["demonstrations"])):
            raise ValueError(
                "the interrupted training had other demonstrations; give the same --data, or leave out --resume"
            )
        self.started -= 60 * float(metadata["minutes"])
        return metadata["stage"], state

    def finish(self) -> None:
        """Removes the files that only resuming needs."""
        path = self.directory / RESUME
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def stage_name(stage: Joint | Expert) -> str:
    return type(stage).__name__.lower()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/libero_spatial"), help="directory of *_demo.hdf5")
    out = Path("runs/libero_spatial_pi0_small")
    parser.add_argument("--out", type=Path, default=out, help="checkpoint directory to write")
    parser.add_argument("--resume", action="store_true", help="continue the interrupted training in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--held-out", type=int, default=2, help="initial states per task to measure but not train on")
    parser.add_argument("--joint-steps", type=int, default=2000, help="updates of the first stage")
    parser.add_argument("--joint-batch", type=int, default=64, help="observations per update, first stage")
    parser.add_argument("--expert-steps", type=int, default=5000, help="updates of the second stage")
    parser.add_argument("--expert-batch", type=int, default=96, help="observations per update, second stage")
    parser.add_argument("--samples", type=int, default=4, help="noise samples per observation")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate of both stages")
    parser.add_argument(
        "--stop-after", type=int, help="end after this many updates of the second stage; --resume without it continues"
    )
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="minutes between two checkpoints")
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        pretrain(args, Console())
    except ValueError as error:
        sys.exit(f"dsrl_async.pretraining.libero: {error}")


def pretrain(args: argparse.Namespace, console: Console) -> None:
    """Trains or resumes. Raises ValueError if options, demonstrations or the interrupted training are unusable."""
    if args.stop_after is not None and args.stop_after < 1:
        raise ValueError(f"--stop-after must be at least 1, not {args.stop_after}")
    torch.set_num_threads(args.threads)
    config = libero_small_config()
    frames = read_frames(args.data, config.image_size, args.held_out, console)
    tokenizer = build_tokenizer(config, frames.prompts)
    data, held_out, stats = prepare(frames, config, tokenizer)
    origin = frames.described
    described = {
        "environment": origin.pop("suite"),
        "render_quality": origin.pop("render_quality"),
        "render_size": origin.pop("image_size"),
        "demonstrations": origin,
        "versions": {"dsrl_async": __version__, "torch": torch.__version__},
        "settings": {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS},
    }
    checkpoints = Checkpoints(args, stats, tokenizer, described)
    name, state = checkpoints.read_state() if args.resume else ("joint", None)

    torch.manual_seed(args.seed)
    model = Pi0(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{len(frames.state)} frames, {frames.training} of them to train on, {parameters:,} parameters")
    losses = {}
    with progress_bar(console) as progress:
        if name == "joint":
            stage = StageSettings(args.joint_steps, args.joint_batch, args.samples, args.learning_rate, args.seed)
            joint = Joint(model, data, stage, held_out)
            if state is not None:
                load_training_state(joint, state)
            losses["joint"] = joint.train(progress, checkpoints.after_update)
            checkpoints.write_state(joint)
        stage = StageSettings(args.expert_steps, args.expert_batch, args.samples, args.learning_rate, args.seed + 1)
        expert = Expert(model, data, stage, held_out)
        if state is not None and name == "expert":
            load_training_state(expert, state)
        if args.stop_after is not None and args.stop_after < expert.optimiser.step:
            raise ValueError(
                f"the interrupted training has done {expert.optimiser.step} updates of the second stage, more than "
                f"--stop-after {args.stop_after}; give a larger number, or leave it out"
            )
        losses["expert"] = expert.train(progress, checkpoints.after_update, args.stop_after)
    assert all(bool(tensor.isfinite().all()) for tensor in export_tensors(model).values())
    if expert.optimiser.step == args.expert_steps:
        checkpoints.write_policy(model, "complete", args.expert_steps, losses=losses)
        checkpoints.finish()
    console.print(json.dumps({"minutes": checkpoints.minutes(), "losses": losses}, indent=2))
    console.print(f"checkpoint: {args.out}")


if __name__ == "__main__":
    sys.exit(guard(main))
