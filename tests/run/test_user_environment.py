"""A user's environment from the first start to a checkpoint, and everything that finds it again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from support.commands import call
from support.launched import SMALL, Launched, state_of
from support.paths import ROOT
from support.user_environments import INSTALLED, found_in, write_policy


class Trained(NamedTuple):
    policy: Path
    run_dir: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A run of 60 decisions with the environment of an installed package."""
    directory = tmp_path_factory.mktemp("users")
    policy, run_dir = directory / "policy", directory / "run"
    write_policy(policy, cameras=2, image_size=32, robot_state_dim=5, robot_action_dim=3, action_dim=6)
    with found_in(INSTALLED):
        run = Launched(run_dir, *SMALL, *options(policy), "--sac.cameras", "[1, 0]", "--max-decisions", "60")
        yield Trained(policy, run_dir, run.finish())


def options(policy: Path, name: str = "reaching", **of_environment: Any) -> list[str]:
    return ["--env.name", name, "--env.options", json.dumps(of_environment), "--policy.checkpoint", str(policy)]


def test_it_trains_from_the_start_to_a_checkpoint(trained: Trained) -> None:
    result = trained.result
    assert (result["returncode"], result["exit_reason"]) == (0, "max_decisions"), result["stderr"]
    assert result["restarts"] == {"actor": 0, "inference": 0, "learner": 0, "template": 0}
    assert result["episodes"] >= 60 / 3 - 2  # of 12 steps at most, 5 a decision
    assert state_of(trained.run_dir)["counters"]["learner_updates"] == [result["updates"]]
    assert result["updates"] > 20
    env = yaml.safe_load((trained.run_dir / "config.yaml").read_text())["env"]
    assert (env["name"], env["options"]) == ("reaching", {})
    made_with = json.loads((trained.run_dir / "made_with.json").read_text())
    assert made_with["packages"] == {"reaching": "1.2"}
    assert made_with["environment"]["spec"]["state_dim"] == 5


def test_it_is_evaluated_on_its_own_prompts(trained: Trained, tmp_path: Path) -> None:
    films = ["--video", str(tmp_path / "films"), "--videos", "1"]
    done = call("evaluate", "--checkpoint", str(trained.run_dir), "--processes", "1", "--episodes", "6", *films)
    tasks = done.result["tasks"]
    assert [task["instruction"] for task in tasks] == ["reach the green one", "reach the blue one"]
    assert sum(task["episodes"] for task in tasks) == done.result["episodes"] == 6
    assert done.result["settings"]["env"]["name"] == "reaching"
    assert done.result["versions"]["reaching"] == "1.2"
    assert len(list((tmp_path / "films").glob("*.mp4"))) == 1


@pytest.mark.parametrize("given", [["--tasks", "0"], ["--init-states", "1"]])
def test_an_evaluation_of_it_has_no_tasks_or_initial_states_to_choose(trained: Trained, given: list[str]) -> None:
    done = call("evaluate", "--checkpoint", str(trained.run_dir), *given)
    assert (done.code, done.stderr) == (2, "error: --tasks and --init-states are of LIBERO; give --suite, too\n")


def test_it_goes_on(trained: Trained, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(trained.run_dir, tmp_path / "run"))
    done = call("launch", "--resume", str(run_dir), "--serial", "--max-decisions", "66")
    assert done.result["decisions"] == 66
    assert done.result["resumed"]["changes"] == ["serial false -> true", "max_decisions 60 -> 66"]
    done = call("launch", "--resume", str(run_dir), "--max-decisions", "70", "--env.options", "{reach: 0.5}")
    sentence = (
        'error: env.options: the resumed run was made with {}, not {"reach": 0.5}; leave it so, or start a new run\n'
    )
    assert (done.code, done.stderr) == (2, sentence)


def test_the_doctor_and_the_plan_find_it(trained: Trained) -> None:
    done = call("doctor", "--json", "--resume", str(trained.run_dir), "--max-decisions", "100")
    findings = {(finding["check"], finding["status"]): finding["message"] for finding in done.result["findings"]}
    assert re.match(
        r"reaching in .*reaching/__init__\.py on reaching 1\.2, numpy .*: 2 cameras of 32 pixels, a state of 5",
        findings["environment", "ok"],
    )
    assert findings["graphics", "ok"] == "reaching needs no OpenGL"
    done = call("plan", *options(trained.policy), "--env-ms", "5", "--device-ms", "1:2", "--json")
    assert done.code == 0, done.stderr


def test_it_is_not_found_where_it_is_not(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = Path(shutil.copytree(trained.run_dir, tmp_path / "run"))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("name: reaching", "name: my_own_env:make"))
    monkeypatch.chdir(tmp_path)
    for command in (["launch", "--resume"], ["evaluate", "--checkpoint"]):
        done = call(*command, str(run_dir), *(["--max-decisions", "90"] if "--resume" in command else []))
        assert done.code == 2
        assert re.fullmatch(
            r"error: env\.name: there is no module my_own_env for my_own_env:make, neither installed, nor on "
            rf"PYTHONPATH, nor in the working directory {tmp_path}; start from the directory that has it, or install "
            r"it\n",
            done.stderr,
        )


def test_what_it_raises_in_a_worker_is_told_with_its_line(trained: Trained) -> None:
    """The last line of the worker's log is what a run's message and an evaluation's quote."""
    lines = (INSTALLED / "reaching" / "__init__.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "reshape(3)" in text)
    done = call("evaluate", *options(trained.policy, fault="step"), "--episodes", "1")
    assert done.code == 1
    assert re.search(
        r"^error: environment process 0 ended \(exit code 1\): RuntimeError: the environment reaching: "
        rf"\S*reaching/__init__\.py, line {line}: ValueError: cannot reshape array of size 2 into shape \(3,\)$",
        done.stderr,
        re.MULTILINE,
    )


def test_the_pages_environment_is_one(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found in the working directory, where a console script would not look, by a run of a single process."""
    page = (ROOT / "docs/your_environment.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_env.py").write_text(source)
    (sizes,) = re.findall(r"--small --sizes '(.*?)'", page)
    write_policy(tmp_path / "policy", **json.loads(sizes))
    monkeypatch.chdir(tmp_path)
    arguments = options(Path("policy"), "my_env:make_environment", size=64)
    with found_in(tmp_path / "nowhere"):
        done = call("launch", "--serial", *SMALL, *arguments, "--max-decisions", "20", "--run-dir", "run")
        assert done.result["decisions"] == 20
        assert done.result["env_steps"] > 80
