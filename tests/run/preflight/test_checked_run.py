"""A start reads things once, and the launched process does without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.gpus import found_gpus

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.host.probe import Unanswered
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run import preflight
from dsrl_async.run.preflight.policy import check_prompts

SMALL = ["--actors", "1", "--sac.batch-size", "1", "--replay.warmup-decisions", "1", "--replay.capacity", "64"]
COUNT_READS = """
import collections, importlib, json, os, sys
directory, command, *arguments = sys.argv[1:]
read = collections.Counter()

def hook(event, given):
    if event == "open" and os.fsdecode(str(given[0])).startswith(directory):
        read[os.path.basename(given[0])] += 1

sys.addaudithook(hook)
assert importlib.import_module(f"dsrl_async.{command}.command").main(arguments) == 0
print(json.dumps(read))
"""


def reads(policy: Path, command: str, *arguments: str) -> dict[str, int]:
    """How many times a command's own process opens each file of the policy."""
    given = [str(policy), command, *arguments, "--policy.checkpoint", str(policy)]
    done = subprocess.run([sys.executable, "-c", COUNT_READS, *given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    counted: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counted


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy"))


def test_the_launched_process_reads_each_file_of_the_policy_once_and_samples_the_weights(
    policy: Path, tmp_path: Path
) -> None:
    limits = ["--max-decisions", "2", "--log.console", "off", "--run-dir", str(tmp_path / "run")]
    counted = reads(policy, "launch", *SMALL, *limits)
    assert counted.pop("model.safetensors") == 2  # its header, and samples of its tensors for `made_with.json`
    assert counted == dict.fromkeys(("config.json", "norm_stats.json", "tokenizer.json"), 1)


def test_an_evaluation_reads_them_once_and_then_the_weights(policy: Path) -> None:
    counted = reads(policy, "evaluate", "--episodes", "1", "--env.max-episode-steps", "1")
    assert counted.pop("model.safetensors") > 1
    assert counted == dict.fromkeys(("config.json", "norm_stats.json", "tokenizer.json"), 1)


def test_words_that_the_tokenizer_does_not_know_are_warned_of_once() -> None:
    files = pi0_record(find_policy(EMBEDDED_POLICY))
    known = preflight.check_run(validate({})).spec
    assert check_prompts(files, known) == ()
    strange = known._replace(prompts=(*known.prompts, f"purple {known.prompts[0]}", "purple magenta"))
    (warning,) = check_prompts(files, strange)
    assert warning.startswith("the policy's tokenizer does not know 'purple', 'magenta' in the environment's prompts")


def test_a_preflight_for_cuda_leaves_torch_to_a_child_process() -> None:
    program = (
        "import sys\n"
        "from dsrl_async.config.load import validate\n"
        "from dsrl_async.config.settings import ConfigError\n"
        "from dsrl_async.run import preflight\n"
        "run = preflight.check_run(validate({'device': 'cuda', 'learner': {'device': 'cuda:77'}}))\n"
        "preflight.check_memory(run)\n"
        "try:\n"
        "    preflight.check_devices(run.config)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "was asked for, but torch finds no CUDA" in done.stdout or "torch's CUDA devices is" in done.stdout


def test_torch_is_asked_once_and_only_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def ask(function: object, time_limit_s: float) -> dict[str, Any]:
        asked.append(function)
        return found_gpus(1, 1)

    monkeypatch.setattr("dsrl_async.host.probe.ask", ask)
    preflight.check_devices(validate({"device": "cpu"}))
    preflight.check_devices(validate({"device": "auto", "learner": {"device": "cpu"}}))
    preflight.check_devices(validate({"learner": {"device": "cuda:7"}}), ["device"])
    assert asked == []
    preflight.check_devices(validate({"device": "cuda", "learner": {"device": "cuda:1"}}))
    assert len(asked) == 1


def test_torch_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(function: object, time_limit_s: float) -> dict[str, int]:
        raise Unanswered("killed by SIGSEGV")

    monkeypatch.setattr("dsrl_async.host.probe.ask", ask)
    with pytest.raises(ConfigError, match=r"^learner\.device: cuda:1 .*\(killed by SIGSEGV\); use cpu, or .*doctor"):
        preflight.check_devices(validate({"learner": {"device": "cuda:1"}}))
