"""Policies that are a class of `Policy`: found by its name, and asked what they are.

What `answer` says is plain data, so that the processes which must not import a user's module can ask one that may.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrl_async import users_code
from dsrl_async.config.settings import PolicyConfig
from dsrl_async.policies.policy import Policy
from dsrl_async.policies.protocol import FrozenPolicy, PolicyMemory, PolicyNeeds, PolicyRecord, PolicySpec
from dsrl_async.untrusted import in_one_line, shown
from dsrl_async.users_code import FAULTS, blamed

if TYPE_CHECKING:
    import torch

USER_SETTINGS = frozenset({"options"})
LARGEST_SIZE = 1_000_000
SAMPLES, SAMPLE_BYTES = 64, 4096
"""How many stretches of a file tell it from others, and how long each is; smaller files are read whole."""

Ask = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Calls `answer`, in this process or in another."""


def user_record(question: Mapping[str, Any], ask: Ask, maker: str = "yours") -> PolicyRecord:
    """What is known of a policy by what it says itself.

    `question` has the keys `type` (the class), `checkpoint` (a path, or None), and `options`. Raises ValueError, naming
    the setting or the user's line that is to be mended, if there is no such policy or it is not as `Policy` says.
    """
    described = _asked(ask, question)
    spec = PolicySpec(*described["spec"])
    directory = None if question["checkpoint"] is None else Path(question["checkpoint"])
    files = tuple(map(Path, described["files"]))

    def memory(settings: PolicyConfig, on_gpu: bool, batch_size: int, prompt_length: int) -> PolicyMemory:
        pixels, noise = 3 * spec.cameras * spec.image_size**2, spec.action_horizon * spec.action_dim
        row = pixels + 4 * (spec.robot_state_dim + noise + spec.action_horizon * spec.robot_action_dim)
        return PolicyMemory(described["weight_bytes"], batch_size * row, batch_size * described["row_bytes"])

    def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
        if described["checks_prompts"]:
            _asked(ask, {**question, "prompts": list(prompts)})
        return ()

    def identity(prompts: Sequence[str]) -> dict[str, Any]:
        sizes = spec._asdict()
        config = {**sizes, **{f"options.{name}": value for name, value in question["options"].items()}}
        return {"type": question["type"], "weights": hash_files(files), "config": config}

    def load(
        settings: PolicyConfig, device: torch.device, prompts: Sequence[str], progress: Callable[[], None]
    ) -> FrozenPolicy:
        from dsrl_async.policies.buffers import BufferedPolicy

        policy = make(question)
        progress()
        return BufferedPolicy(question["type"], policy, device, prompts)

    return PolicyRecord(
        type=question["type"],
        description=f"{question['type']}, {described['weight_bytes'] / 1e6:,.1f} MB of weights",
        maker=maker,
        directory=directory,
        needs=PolicyNeeds(spec, 0, memory),
        own_settings=USER_SETTINGS,
        files=files,
        prompt_lengths=lambda prompts: [0] * len(prompts),
        check_prompts=check_prompts,
        identity=identity,
        load=load,
        warnings=tuple(described["warnings"]),
    )


def _asked(ask: Ask, question: Mapping[str, Any]) -> Mapping[str, Any]:
    answered = ask(question)
    if "refused" in answered:
        raise ValueError(answered["refused"])
    return answered["described"]


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the policy, JSON-ready, as `described`, or why that cannot be said as `refused`.

    If the question has `prompts`, the policy checks them.
    """
    try:
        policy = make(question)
        if "prompts" in question:
            _guarded("check_prompts", policy, question["prompts"])
        return {"described": _describe(question["type"], policy)}
    except ValueError as error:
        return {"refused": str(error)}


def make(question: Mapping[str, Any]) -> Policy:
    """Makes the policy, without its weights. Raises ValueError as `user_record`."""
    name, checkpoint = question["type"], question["checkpoint"]
    users_code.check_path("policy.type", name)
    if checkpoint is not None and not os.path.lexists(checkpoint):
        raise ValueError(f"policy.checkpoint: there is no file or directory {checkpoint}")
    found = users_code.find("policy.type", name, name)
    if not (isinstance(found.function, type) and issubclass(found.function, Policy)):
        raise ValueError(f"policy.type: {name} must be a subclass of dsrl_async.policies.Policy")
    if missing := sorted(getattr(found.function, "__abstractmethods__", ())):
        raise ValueError(f"policy.type: {name} has no {missing[0]}, see dsrl_async.policies.Policy")
    path = None if checkpoint is None else Path(checkpoint)
    made = users_code.call("policy.type", name, found, (path,), question["options"], sentences=True)
    assert isinstance(made, Policy)
    return made


def _describe(name: str, policy: Policy) -> dict[str, Any]:
    def require(condition: bool, what: str, value: Any) -> None:
        if not condition:
            raise ValueError(f"policy.type: {name} must have {what}, which {shown(value)} is not")

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    spec = getattr(policy, "spec", None)
    require(isinstance(spec, PolicySpec), "as spec a dsrl_async.policies.PolicySpec when it is made", spec)
    assert spec is not None
    for field, value in spec._asdict().items():
        fine = whole(value, 1) and value <= LARGEST_SIZE
        require(fine, f"as spec.{field} a whole number from 1 to {LARGEST_SIZE}", value)
    files = [str(file) for file in _guarded("files", policy)]
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"policy.checkpoint: there is no file {file}, which {name} needs")
    weights = policy.weight_bytes
    weights = sum(os.path.getsize(file) for file in files) if weights is None else weights
    require(whole(weights, 0), "as weight_bytes a whole number", weights)
    require(whole(policy.row_bytes, 0), "as row_bytes a whole number", policy.row_bytes)
    return {
        "spec": list(spec),
        "files": files,
        "weight_bytes": weights,
        "row_bytes": policy.row_bytes,
        "checks_prompts": type(policy).check_prompts is not Policy.check_prompts,
        "warnings": list(map(str, policy.warnings)),
    }


def _guarded(method: str, policy: Policy, *arguments: Any) -> Any:
    """What a method returns. A ValueError of it is a sentence for the user; of anything else the line is named."""
    try:
        return getattr(policy, method)(*arguments)
    except FAULTS as error:
        if type(error) is ValueError:
            said = in_one_line(error)
            raise ValueError(said if said.startswith("policy.") else f"policy.type: {said}") from error
        raise ValueError(f"policy.type: {blamed(error, type(policy).__module__)}") from error


def hash_files(files: Sequence[Path]) -> str:
    """A hash of sizes and sampled bytes of files in their order, wherever they lie. Raises OSError."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        for path in files:
            file, size = stack.enter_context(path.open("rb", buffering=0)), path.stat().st_size
            digest.update(json.dumps([path.name, size]).encode())
            whole = size <= SAMPLES * SAMPLE_BYTES
            starts = [0] if whole else [k * (size - SAMPLE_BYTES) // (SAMPLES - 1) for k in range(SAMPLES)]
            for start in starts:
                file.seek(start)
                digest.update(file.read(size if whole else SAMPLE_BYTES))
    return digest.hexdigest()
