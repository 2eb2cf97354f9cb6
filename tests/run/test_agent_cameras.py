"""A run whose agent sees other cameras than the first: it is given what they show, in that order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.commands import call
from support.launched import SMALL, Launched, checkpoint_of

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import user
from dsrl_async.envs.images import resize_with_pad
from dsrl_async.envs.tabletop import TabletopEnvironment
from dsrl_async.run.worker.worker import TRAINING, episode_seed


@pytest.mark.parametrize("cameras", [[], [0, 0], [-1], [True]])
def test_lists_that_name_no_cameras_are_refused(cameras: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"sac\.?(cameras)?:? .*cameras must name at least one|sac.cameras: must not"):
        validate({"sac": {"cameras": cameras}})


def test_a_users_environment_need_not_think_of_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "three_cameras.py").write_text(
        "import numpy as np\n"
        "from dsrl_async.envs import EnvironmentSpec, UserEnvironment\n"
        "class Simulation:\n"
        "    def reset(self, seed, number=0): return 0\n"
        "    def step_chunk(self, action_chunk): raise NotImplementedError\n"
        "    def observe(self, images, state):\n"
        "        images[:] = np.random.default_rng(1).integers(0, 256, images.shape)\n"
        "        state[:] = 0\n"
        "    def close(self): pass\n"
        "def make():\n"
        "    spec = EnvironmentSpec(cameras=3, image_size=100, state_dim=2, action_dim=2, prompts=('go',))\n"
        "    return UserEnvironment(spec=spec, make=Simulation, episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = validate({"env": {"name": "three_cameras:make"}}).env.model_dump()
    environment = user.user_record(settings, user.describe(settings)).make([2, 0])
    environment.reset(0)
    images, seen = np.zeros((3, 100, 100, 3), np.uint8), np.zeros((64, 64, 6), np.uint8)
    environment.observe(images, seen, np.zeros(2, np.float32))
    for place, camera in enumerate([2, 0]):
        np.testing.assert_array_equal(seen[:, :, 3 * place : 3 * place + 3], resize_with_pad(images[camera], 64))
    environment.close()


def test_what_the_agent_sees_is_stored_learned_from_and_evaluated(tmp_path: Path) -> None:
    arguments = [*SMALL, "--sac.cameras", "[1, 0]", "--sac.augmentation", "crop_colour", "--max-decisions", "60"]
    result = Launched(tmp_path, *arguments).finish()
    assert result["returncode"] == 0, result["stderr"]
    assert result["updates"] > 20
    for lane in (0, 1):
        rows = load_file(checkpoint_of(tmp_path) / "replay" / f"lane-{lane:04d}.safetensors")["image"]
        assert rows.shape[1:] == (64, 64, 6)
        environment, seed = TabletopEnvironment(), episode_seed(0, TRAINING, lane, 0)
        environment.reset(seed, lane)
        images, front = np.zeros((2, 64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
        environment.observe(images, front, np.zeros(8, np.float32))
        np.testing.assert_array_equal(rows[0], np.concatenate([images[1], images[0]], axis=2))
        environment.close()
    played = call("evaluate", "--checkpoint", str(tmp_path), "--episodes", "1", "--processes", "1").result
    assert played["episodes"] == 1
