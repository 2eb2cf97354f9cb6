"""The scripts that make small policies, and the training that they share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from dsrl_async.config.load import validate
from dsrl_async.pi0.checkpoint import load_policy
from dsrl_async.pi0.config import libero_small_config, tabletop_config
from dsrl_async.pi0.model import GemmaNorm
from dsrl_async.pretraining import libero as libero_program
from dsrl_async.pretraining import tabletop
from dsrl_async.pretraining import training as pretraining
from dsrl_async.pretraining.training import action_chunks, build_tokenizer
from dsrl_async.run.preflight import check_run


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return tabletop


@pytest.fixture(scope="module")
def libero() -> ModuleType:
    pytest.importorskip("h5py")
    return libero_program


def demonstrations() -> dict[str, Tensor]:
    """Three episodes of 12, 5 and 20 frames; the action's first component is the frame's number."""
    generator = torch.Generator().manual_seed(0)
    frames = 37
    action = torch.zeros(frames, 7)
    action[:, 0] = torch.arange(frames)
    action[:, 6] = torch.where(torch.arange(frames) % 2 == 0, 1.0, -1.0)
    state = torch.randn(frames, 8, generator=generator)
    state[:, 3:6] = 0
    return {
        "images": torch.randint(256, (frames, 2, 64, 64, 3), dtype=torch.uint8, generator=generator),
        "state": state,
        "action": action,
        "block_position": torch.randn(frames, 3, generator=generator),
        "episode": torch.tensor([0] * 12 + [2] * 5 + [7] * 20, dtype=torch.int32),
        "goal": torch.zeros(frames, dtype=torch.int32),
    }


def test_chunks_stay_within_their_episode() -> None:
    data = demonstrations()
    chunks = action_chunks(data["action"], data["episode"], 10)
    assert chunks.shape == (37, 10, 7)
    assert chunks[1, :, 0].tolist() == list(range(1, 11))
    assert chunks[9, :, 0].tolist() == [9, 10, 11, 0, 0, 0, 0, 0, 0, 0]
    assert chunks[16, :, 0].tolist() == [16] + [0] * 9
    assert (chunks[16, :, 6] == data["action"][16, 6]).all()


def test_demonstrations_are_normalised(script: ModuleType, tmp_path: Path) -> None:
    data = demonstrations()
    save_file(data, tmp_path / "data.safetensors")
    config = tabletop_config()
    tokenizer = build_tokenizer(config, ["put it there"])
    kept, stats = script.read_demonstrations(tmp_path / "data.safetensors", config, tokenizer, "put it there")
    assert torch.equal(kept.images, data["images"])
    assert stats["state"]["mean"] == pytest.approx(data["state"].mean(0).tolist())
    assert stats["state"]["std"][3] == pytest.approx(1e-3), "a constant dimension gets the floor"
    raw = kept.chunks[0, :, 0] * stats["actions"]["std"][0] + stats["actions"]["mean"][0]
    assert raw.tolist() == pytest.approx(list(range(10)), abs=1e-3)


def test_the_script_writes_a_policy_that_loads(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(demonstrations(), tmp_path / "data.safetensors")
    options = {"--data": tmp_path / "data.safetensors", "--joint-steps": 3, "--expert-steps": 3, "--threads": 1}
    options |= {"--joint-batch": 4, "--expert-batch": 4, "--samples": 2}
    for name in ("one", "two"):
        arguments = [str(part) for pair in {**options, "--out": tmp_path / name}.items() for part in pair]
        monkeypatch.setattr(sys, "argv", ["tabletop.py", *arguments])
        script.main()
    one, two = load_policy(tmp_path / "one"), load_policy(tmp_path / "two")
    assert one.config == tabletop_config()
    other = two.model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.model.state_dict().items()), "not seeded"


@pytest.mark.parametrize("state_in_prompt", [False, True])
def test_a_pi05_of_the_same_command_acts_in_the_tabletop(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_in_prompt: bool
) -> None:
    save_file(data := demonstrations(), tmp_path / "data.safetensors")
    options = {"--data": tmp_path / "data.safetensors", "--out": tmp_path / "policy", "--model": "pi05"}
    options |= {"--joint-steps": 3, "--expert-steps": 3, "--threads": 1}
    options |= {"--joint-batch": 4, "--expert-batch": 4, "--samples": 2}
    arguments = [str(part) for pair in options.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["tabletop.py", *arguments, *["--discrete-state-input"] * state_in_prompt])
    script.main()

    run = check_run(validate({"policy": {"checkpoint": str(tmp_path / "policy")}}))
    assert run.policy.description.startswith("Pi0.5")
    assert not run.warnings, "a word of its prompts, or a number of its states, is unknown to the tokenizer"
    loaded = load_policy(tmp_path / "policy")
    assert loaded.config == tabletop_config(pi05=True, state_in_prompt=state_in_prompt)
    gates = [norm.dense.weight for norm in loaded.model.modules() if isinstance(norm, GemmaNorm) and norm.adaptive]
    assert gates
    assert all(bool(gate.any()) for gate in gates), "they begin as zeros, and are trained"

    policy = run.policy.load(run.config.policy, torch.device("cpu"), run.spec.prompts, lambda: None)
    batch = policy.batch(2, int(policy.prompt_lengths.max()))
    batch.noise.normal_(generator=torch.Generator().manual_seed(0)).copy_(batch.noise[:1].expand_as(batch.noise))
    batch.images.copy_(data["images"][:1].expand_as(batch.images))
    batch.state.copy_(torch.stack([data["state"].amin(0), data["state"].amax(0)]) * 1.5)  # beyond what it has seen
    batch.fill_prompts(np.zeros(2, np.int64))
    batch.encode()
    batch.denoise()
    assert batch.actions.isfinite().all()
    assert torch.equal(*batch.actions) is not state_in_prompt, "the state is seen in the prompt, and nowhere else"


def test_a_policy_is_trained_further(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(demonstrations(), tmp_path / "data.safetensors")
    options = ["--data", str(tmp_path / "data.safetensors"), "--threads", "1", "--samples", "1"]
    options += ["--joint-steps", "0", "--expert-batch", "4"]

    def make(name: str, *more: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["tabletop.py", "--out", str(tmp_path / name), *options, *more])
        script.main()
        return load_policy(tmp_path / name).model.state_dict()

    begun = make("begun", "--expert-steps", "1", "--seed", "5")
    start = "--start-from", str(tmp_path / "begun")
    same = make("same", "--expert-steps", "0", *start)
    assert all(torch.equal(tensor, same[name]) for name, tensor in begun.items())
    further = make("further", "--expert-steps", "2", *start)
    assert not torch.equal(begun["action_out.weight"], further["action_out.weight"])
    with pytest.raises(ValueError, match="is another model"):
        make("other", "--expert-steps", "1", "--model", "pi05", *start)


def test_a_prompt_with_the_state_has_a_token_for_every_number() -> None:
    prompt = "put the block on the red plate"
    tokenizer = build_tokenizer(tabletop_config(pi05=True, state_in_prompt=True), [prompt])
    state = np.array([-2, -1, 0, 0.5, 1, 2, -0.7, 0.3], np.float32)
    words = [tokenizer.tokenizer.id_to_token(number) for number in tokenizer.ids(prompt, state)]
    numbers = ["-1", "0", "128", "192", "255", "255", "38", "166"]
    assert words == ["<bos>", "Task:", *prompt.split(), ",", "State:", *numbers, ";", "\n", "Action:"]


def test_the_state_in_the_prompt_is_for_a_pi05(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tabletop.py", "--discrete-state-input"])
    with pytest.raises(ValueError, match="is for --model pi05"):
        script.main()


STATES = {"pick_up_the_bowl": [0, 1, 3, 3], "open_the_drawer": [2, 0, 1]}
"""Initial state of each demonstration of the made-up tasks."""


def write_libero_files(directory: Path, **attributes: Any) -> None:
    """Two tasks; the pictures are white in a corner, and the action's first component is the frame's number."""
    import h5py

    random = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    for task_id, (task, states) in enumerate(STATES.items()):
        with h5py.File(directory / f"{task}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            described = {"suite": "libero_spatial", "task": task, "task_id": task_id, "seed": 5}
            described |= {"language_instruction": task.replace("_", " "), "versions": json.dumps({"mujoco": "3.17.0"})}
            described |= {"render_quality": "fast", "image_size": 128, "settling_steps": 10}
            data.attrs.update(described | (attributes if task_id else {}))
            for number, init_state in enumerate(states):
                frames = 6 + number
                demo = data.create_group(f"demo_{number}")
                demo.attrs["init_state"] = init_state
                actions = random.normal(size=(frames, 7)).astype(np.float32)
                actions[:, 0] = np.arange(frames)
                demo["actions"] = actions
                observation = demo.create_group("obs")
                pictures = np.zeros((frames, 128, 128, 3), np.uint8)
                pictures[:, :8, :16] = 255
                observation["agentview_rgb"] = observation["eye_in_hand_rgb"] = pictures
                observation["robot_state"] = random.normal(size=(frames, 8)).astype(np.float32)
                for name in ("target_position", "goal_position"):
                    observation[name] = random.normal(size=(frames, 3)).astype(np.float32)


def test_libero_frames_are_what_the_environment_shows(libero: ModuleType, tmp_path: Path) -> None:
    write_libero_files(tmp_path)
    frames = libero.read_frames(tmp_path, 64, 1, Console(quiet=True))
    assert frames.images.shape == (frames.described["frames"], 2, 64, 64, 3)
    assert (frames.images[:, :, -3:, -7:] == 255).all(), "LIBERO's files are upside down and mirrored"
    assert not frames.images[:, :, :32].any()
    assert torch.equal(frames.positions[:, 6:9], frames.positions[:, :3] - frames.state[:, :3])
    assert frames.prompts == ["open the drawer", "pick up the bowl"]


def test_held_out_initial_states_come_last_and_do_not_enter_the_statistics(libero: ModuleType, tmp_path: Path) -> None:
    write_libero_files(tmp_path)
    frames = libero.read_frames(tmp_path, 64, 1, Console(quiet=True))
    # The last initial states, 2 and 3, are those of open_the_drawer's demo 0, and of pick_up_the_bowl's 2 and 3.
    assert len(frames.state) - frames.training == 6 + 8 + 9
    assert [task["held_out_init_states"] for task in frames.described["tasks"]] == [[2], [3]]
    tokenizer = build_tokenizer(libero_small_config(), frames.prompts)
    train, held_out, stats = libero.prepare(frames, libero_small_config(), tokenizer)
    assert (len(train), len(held_out)) == (frames.training, 23)
    assert stats["state"]["mean"] == pytest.approx(frames.state[: frames.training].mean(0).tolist())
    raw = held_out.chunks[:, :, 0] * stats["actions"]["std"][0] + stats["actions"]["mean"][0]
    assert raw[0, :6].tolist() == pytest.approx([0, 1, 2, 3, 4, 5], abs=1e-3)
    assert tokenizer.tokenizer.decode(held_out.tokens[0].tolist()[1:4]) == "open the drawer"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"render_quality": "exact"}, "differ in render_quality"),
        ({"versions": '{"mujoco": "2"}'}, "differ in versions"),
    ],
)
def test_files_that_were_recorded_differently_are_refused(
    libero: ModuleType, tmp_path: Path, attributes: dict[str, str], message: str
) -> None:
    write_libero_files(tmp_path, **attributes)
    with pytest.raises(ValueError, match=message):
        libero.read_frames(tmp_path, 64, 1, Console(quiet=True))


def test_a_directory_without_demonstrations_is_refused(
    libero: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["libero.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="record demonstrations first"):
        libero.main()


def run_libero(libero: ModuleType, monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *more: str) -> None:
    options = ["--data", str(data), "--out", str(out), "--threads", "1", "--held-out", "1", "--joint-batch", "4"]
    options += ["--joint-steps", "3", "--expert-steps", "4", "--expert-batch", "4", "--checkpoint-minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["libero.py", *options, *more])
    libero.main()


@pytest.mark.parametrize("losses", [2, 5], ids=["joint", "expert"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(
    libero: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: int
) -> None:
    write_libero_files(tmp_path / "data")
    run_libero(libero, monkeypatch, tmp_path / "data", tmp_path / "whole")
    calls, flow_loss = 0, pretraining.flow_loss

    def interrupted(*args: Any) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > losses:
            raise KeyboardInterrupt
        return flow_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "flow_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_libero(libero, patch, tmp_path / "data", tmp_path / "parts")
    assert load_policy(tmp_path / "parts").config == libero_small_config(), "the policy so far"
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["stage"] == ["joint", "expert"][losses > 3]
    with pytest.raises(SystemExit, match="joint_steps 3, not 5"):
        run_libero(libero, monkeypatch, tmp_path / "data", tmp_path / "parts", "--resume", "--joint-steps", "5")
    write_libero_files(tmp_path / "others", seed=1)
    with pytest.raises(SystemExit, match="other demonstrations"):
        run_libero(libero, monkeypatch, tmp_path / "others", tmp_path / "parts", "--resume")
    run_libero(libero, monkeypatch, tmp_path / "data", tmp_path / "parts", "--resume")
    whole, parts = (load_policy(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_a_training_that_was_stopped_early_leaves_its_policy_and_can_go_on(
    libero: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_libero_files(tmp_path / "data")
    run_libero(libero, monkeypatch, tmp_path / "data", tmp_path / "whole")
    run_libero(
        libero, monkeypatch, tmp_path / "data", tmp_path / "early", "--stop-after", "2", "--checkpoint-minutes", "60"
    )
    said = json.loads((tmp_path / "early" / "training.json").read_text())
    assert (said["stage"], said["step"]) == ("expert", 2)
    whole, early = (load_policy(tmp_path / name).model.state_dict() for name in ("whole", "early"))
    assert any(not torch.equal(tensor, early[name]) for name, tensor in whole.items())
    for stop_after, message in (("1", "has done 2 updates of the second stage"), ("0", "must be at least 1")):
        with pytest.raises(SystemExit, match=message):
            run_libero(
                *(libero, monkeypatch, tmp_path / "data", tmp_path / "early", "--resume", "--stop-after", stop_after)
            )
    run_libero(libero, monkeypatch, tmp_path / "data", tmp_path / "early", "--resume")
    early = load_policy(tmp_path / "early").model.state_dict()
    assert all(torch.equal(tensor, early[name]) for name, tensor in whole.items())


def test_a_libero_policy_says_what_it_was_trained_on(
    libero: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_libero_files(tmp_path / "data")
    run_libero(libero, monkeypatch, tmp_path / "data", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "training.json").read_text())
    assert {key: said[key] for key in ("environment", "render_quality", "render_size", "stage")} == {
        "environment": "libero_spatial",
        "render_quality": "fast",
        "render_size": 128,
        "stage": "complete",
    }
    assert said["demonstrations"]["versions"] == {"mujoco": "3.17.0"}
    assert said["demonstrations"]["tasks"][1]["init_states"] == [0, 1, 3]
    assert said["losses"]["joint"].keys() >= {"flow", "position", "held-out flow", "held-out target from hand (cm)"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "norm_stats.json",
        "tokenizer.json",
        "training.json",
    ]
