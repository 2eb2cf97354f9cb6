"""A user's own policy: the page about it, word for word; what is refused, and whose line it was; its buffers."""

from __future__ import annotations

import functools
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.commands import Done, call
from support.paths import ROOT
from torch import Tensor

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.host import probe
from dsrl_async.policies import Policy, PolicySpec
from dsrl_async.policies.buffers import BufferedPolicy
from dsrl_async.policies.find import policy_record
from dsrl_async.policies.user import answer
from dsrl_async.run import preflight

CPU = torch.device("cpu")
SMALL = ["--serial", "--actors", "2", "--sac.batch-size", "4", "--replay.warmup-decisions", "4"]
SPEC = PolicySpec(2, 64, 8, 7, 10, 3)
MODULES = iter(range(1000))


def asked_here(function: object, question: str, time_limit_s: float) -> dict[str, Any]:
    return answer(json.loads(question))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, where a user's modules are found."""
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before


def of_the_page(place: Path, seed: int = 0, module: str = "my_policy") -> str:
    """The page's policy with random weights in `my.safetensors`; returns its source."""
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/your_policy.md").read_text(), re.DOTALL)
    (place / f"{module}.py").write_text(source)
    names: dict[str, Any] = {}
    exec(compile(source, "docs/your_policy.md", "exec"), names)
    torch.manual_seed(seed)
    save_file(names["Network"](64).state_dict(), place / "my.safetensors")
    return source


def module(place: Path, *lines: str, **methods: str) -> str:
    """A policy in a module of its own, with other methods where given; returns its `policy.type`."""
    name = f"users_policy_{next(MODULES)}"
    bodies = {
        "__init__(self, checkpoint)": "super().__init__(checkpoint); self.spec = PolicySpec(2, 64, 8, 7, 10, 3)",
        "load(self, device, prompts)": "pass",
        "encode(self, images, state, prompts)": "return state",
        "denoise(self, encoded, noise)": "return noise.repeat(1, 1, 3)[..., :7] + encoded[:, None, :7]",
    } | {next(head for head in HEADS if head.startswith(key)): body for key, body in methods.items()}
    defined = [f"    def {head}:\n        {body}" for head, body in bodies.items() if body]
    top = ["import torch", "from dsrl_async.policies import Policy, PolicySpec", *lines, "class Mine(Policy):"]
    (place / f"{name}.py").write_text("\n".join([*top, *defined]) + "\n")
    return f"{name}:Mine"


HEADS = (
    *("__init__(self, checkpoint)", "load(self, device, prompts)", "encode(self, images, state, prompts)"),
    *("denoise(self, encoded, noise)", "check_prompts(self, prompts)"),
)


def launch(*arguments: str) -> Done:
    return call("launch", *arguments, "--log.console", "off")


def test_the_page_is_a_policy_that_is_run_resumed_and_evaluated(place: Path) -> None:
    source = of_the_page(place)
    assert source.count("\n") <= 55
    given = ["--policy.type", "my_policy:MyPolicy", "--policy.checkpoint", "my.safetensors"]
    options = ["--policy.options", "{steps: 2}"]
    done = launch(*SMALL, *given, *options, "--max-decisions", "12", "--run-dir", "run")
    assert done.result["decisions"] == 12
    resumed = launch("--resume", "run", "--max-decisions", "20")
    assert resumed.result["decisions"] == 20
    short = ["--episodes", "2", "--processes", "1", "--env.max-episode-steps", "10"]
    evaluated = call("evaluate", "--checkpoint", "run", *short)
    assert evaluated.result["episodes"] == 2
    found = evaluated.result["settings"]["policy"]
    assert (found["type"], found["options"], found["files"][0]["file"]) == (
        "my_policy:MyPolicy",
        {"steps": 2},
        "my.safetensors",
    )
    other = launch(*given, "--sac.algorithm", "na")
    assert other.code == 2
    assert "sac.algorithm: na learns from normalised actions, which a Pi0 gives and my_policy:MyPolicy" in other.stderr
    other = launch("--resume", "run", "--max-decisions", "30", "--policy.options", "{steps: 3}")
    assert other.code == 2
    assert "policy.options: the resumed run was made with" in other.stderr
    of_the_page(place, seed=1)
    other = launch("--resume", "run", "--max-decisions", "30")
    assert other.code == 2
    assert "is not the policy that the resumed run was made with, it differs in weights" in other.stderr


def test_what_it_is_is_asked_of_a_child_and_nothing_of_it_is_imported(place: Path) -> None:
    (place / "my.safetensors").write_bytes(b"0" * 1000)
    name = module(place, "print('noise on stdout')")
    program = (
        "import json, sys\n"
        "from dsrl_async.config.load import validate\n"
        "from dsrl_async.run import preflight\n"
        f"settings = {{'type': '{name}', 'checkpoint': 'my.safetensors'}}\n"
        "run = preflight.check_run(validate({'policy': settings, 'sac': {'noise_dim': 3}}))\n"
        "preflight.check_memory(run)\n"
        "memory = run.policy.needs.memory(run.config.policy, False, 4, 0)\n"
        f"assert not {{'torch', '{name.partition(':')[0]}'}} & sys.modules.keys()\n"
        "print(json.dumps([run.horizon, run.policy.identity(run.spec.prompts), memory]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    horizon, identity, memory = json.loads(done.stdout)
    assert horizon == 10
    assert identity["type"] == name
    assert identity["config"]["action_dim"] == 3
    assert memory[0] == 1000
    assert memory[2] == 4 * Policy.row_bytes


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"__init__": "self.spec = PolicySpec(2, 64, 8, 7, 10, 0)"}, "spec.action_dim a whole number from 1 to"),
        ({"__init__": "self.spec = (2, 64, 8, 7, 10, 3)"}, "as spec a dsrl_async.policies.PolicySpec"),
        ({"__init__": "pass"}, "as spec a dsrl_async.policies.PolicySpec"),
        ({"__init__": "self.spec = 1 / 0"}, r"policy.type: users_policy_\d+.py, line 5: ZeroDivisionError"),
        ({"__init__": "raise ValueError('give a GPU')"}, "policy.type: give a GPU"),
        ({"denoise": ""}, "has no denoise, see dsrl_async.policies.Policy"),
    ],
)
def test_a_policy_that_is_not_one_is_refused(place: Path, methods: dict[str, str], message: str) -> None:
    question: dict[str, Any] = {"type": module(place, **methods), "checkpoint": None, "options": {}}
    assert re.search(message, answer(question)["refused"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "there_is_none:Mine"}, "policy.type: there is no module there_is_none"),
        ({"type": "json:JSONDecoder"}, "json:JSONDecoder must be a subclass of dsrl_async.policies.Policy"),
        ({"type": "my_policy.py:Mine"}, "names a file; name the module, like my_policy:Mine"),
        ({"type": "pi0"}, "'pi0' is not like package.module:function"),
        ({"checkpoint": "nowhere"}, "policy.checkpoint: there is no file or directory nowhere"),
        ({"options": {"depth": 3}}, "policy.options: got an unexpected keyword argument 'depth'"),
    ],
)
def test_settings_that_name_no_policy_are_refused(place: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        policy_record(validate({"policy": {"type": module(place), **settings}}).policy)


def test_settings_without_an_effect_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ask_once", functools.cache(asked_here))
    name = module(place)
    for key, value in {"denoise_steps": 5, "dtype": "bfloat16", "tokenizer": "x.json"}.items():
        config = validate({"policy": {"type": name, key: value}})
        with pytest.raises(ConfigError, match=f"policy.{key}: it has no effect on {name}; leave it out"):
            preflight.check_checkpoint(config)
        preflight.check_checkpoint(config, before=config)
    with pytest.raises(ConfigError, match=r"policy.options: it has no effect on pi0; leave it out"):
        preflight.check_checkpoint(validate({"policy": {"options": {"a": 1}}}))


def test_prompts_are_checked_before_a_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ask_once", functools.cache(asked_here))
    name = module(place, check_prompts="raise ValueError(f'no words for {prompts[0]}')")
    config = validate({"policy": {"type": name}, "sac": {"noise_dim": 3}})
    with pytest.raises(ConfigError, match=r"policy\.type: no words for put the block on the red plate"):
        preflight.check_run(config)


# ---- buffers


class Mine(Policy):
    """Its functions may be replaced."""

    def __init__(self) -> None:
        super().__init__(None)
        self.spec = SPEC
        self.encodings = 0

    def load(self, device: torch.device, prompts: Any) -> None:
        self.table = torch.arange(len(prompts), dtype=torch.float32, device=device)

    def encode(self, images: Tensor, state: Tensor, prompts: Tensor) -> Any:
        self.encodings += 1
        return {"state": state, "more": (images.float().mean((1, 2, 3, 4)), [self.table[prompts]])}

    def denoise(self, encoded: Any, noise: Tensor) -> Tensor:
        image, (prompt,) = encoded["more"]
        row = (image + prompt)[:, None, None]
        return noise.sum(2, keepdim=True) + row + encoded["state"][:, None, :7]


def frozen(policy: Policy) -> BufferedPolicy:
    return BufferedPolicy("mine", policy, CPU, ["up", "down"])


def test_a_batch_encodes_once_and_denoises_often() -> None:
    policy = Mine()
    batch = frozen(policy).batch(4, 0)
    before = policy.encodings
    batch.images.fill_(3)
    batch.state[:] = torch.arange(8.0)
    batch.fill_prompts(np.array([1, 0, 1]))
    batch.encode()
    batch.state.fill_(9)  # the next observation, which has not been encoded
    places = batch.actions.data_ptr(), batch.encoded["state"].data_ptr()
    for noise in (0.0, 2.0):
        batch.noise.fill_(noise)
        batch.denoise()
        expected = 3 + 3 * noise + torch.tensor([1.0, 0, 1, 0])[:, None, None] + torch.arange(7.0)
        torch.testing.assert_close(batch.actions, expected.expand(4, 10, 7))
    assert policy.encodings == before + 1
    assert (batch.actions.data_ptr(), batch.encoded["state"].data_ptr()) == places


def of_shape(*shape: int) -> Callable[..., Tensor]:
    return lambda encoded, noise: torch.zeros(shape)


@pytest.mark.parametrize(
    ("method", "function", "message"),
    [
        ("denoise", of_shape(4, 10, 6), r"denoise must return .*\[4, 10, 7\], and not \[4, 10, 6\]"),
        ("denoise", lambda encoded, noise: None, "and not NoneType"),
        ("encode", lambda images, state, prompts: {"a": 3}, "encode returned int; return tensors"),
        (
            "encode",
            lambda images, state, prompts: state @ state,
            r"test_policy.py, line \d+: RuntimeError: ",
        ),
    ],
)
def test_functions_that_do_something_else_are_named(method: str, function: Any, message: str) -> None:
    policy = Mine()
    setattr(policy, method, function)
    with pytest.raises(RuntimeError, match=f"the policy mine: .*{message}"):
        frozen(policy).batch(4, 0)


@pytest.mark.parametrize(
    "wait",
    [
        lambda images, state, prompts: state * state.sum().item(),
        lambda images, state, prompts: state if state.sum() > 1 else state + 1,
        lambda images, state, prompts: state + state[state > 0].sum(),
    ],
)
def test_what_waits_for_the_device_is_not_captured_and_the_line_is_named(
    wait: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Mine()
    policy.encode, policy.denoise = wait, lambda encoded, noise: noise.repeat(1, 1, 3)[..., :7]  # type: ignore[method-assign]
    loaded = frozen(policy)
    with caplog.at_level(logging.WARNING):
        loaded.batch(2, 0)
        loaded.batch(1, 0)
    (record,) = caplog.records
    assert re.search(
        r"mine is not captured in CUDA graphs, since it waits .*test_policy.py, line \d+: ", record.message
    )
    assert not loaded.capturable
    frozen(Mine()).batch(2, 0)
    assert caplog.records == [record]
