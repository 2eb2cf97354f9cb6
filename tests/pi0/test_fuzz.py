"""What is read of a policy's files is accepted or refused in one sentence, whatever somebody has done to them.

Valid files are changed at random: JSON by its values and keys, everything by its bytes. By hand, many more:

    DSRL_FUZZ_EXAMPLES=100000 python -m pytest tests/pi0/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from dsrl_async.pi0 import files, lerobot, synthetic, tensors, tokenizer
from dsrl_async.pi0.config import Pi0Config

EXAMPLES = int(os.environ.get("DSRL_FUZZ_EXAMPLES", "40"))
SECONDS = 2.0
"""CPU time that any file may take. A valid one takes a few milliseconds."""
SIZES: dict[str, Any] = {
    **{"image_size": 16, "patch_size": 16, "vision_depth": 1, "vision_mlp": 4, "vlm_width": 8, "vlm_mlp": 4},
    **{"expert_width": 8, "expert_mlp": 4, "depth": 1, "vocab_size": 120},
}
LITTLE = 10_000
"""Of more bytes behind a header than these only the number is kept: they are weights, which nobody reads here."""
PROMPT = "put it there"
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 8, 32, 50, 10**9, 2**63, -(2**63), 10**400, 0.5, 1e-8, 1e39, 1e300, -0.0),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "\n",
        "a\nb",
        "\0",
        "\ud800",
        "1",
        "../x.safetensors",
        "/etc/passwd",
        "..",
        "a/b",
    ),
    *("pi0", "pi05", "gemma_2b", "MEAN_STD", "QUANTILES", "IDENTITY", "STATE", "BF16", "F32", "I64", "Lowercase"),
    *([], {}, [[]], [1], [1, 2], {"type": "Split"}, {"a": {"b": []}}, [None], ["x"] * 3, [0.1] * 8, [0.1] * 7),
]
PATHS = ("../x.safetensors", "/etc/passwd", "..", "a/b")
"""What a text may become half the time, since it may name a file."""


class Format(NamedTuple):
    """A kind of file, in a directory that is otherwise valid."""

    layout: str
    path: str
    json: bool = True
    pi05: bool = False


FORMATS = {
    "config.json of this project": Format("ours", "config.json"),
    "config.json of openpi": Format("openpi", "config.json"),
    "config.json of LeRobot's Pi0": Format("lerobot", "config.json"),
    "config.json of LeRobot's Pi0.5": Format("lerobot", "config.json", pi05=True),
    "preprocessor": Format("lerobot", "policy_preprocessor.json"),
    "preprocessor of Pi0.5": Format("lerobot", "policy_preprocessor.json", pi05=True),
    "postprocessor": Format("lerobot", "policy_postprocessor.json"),
    "processor's statistics": Format("lerobot", "policy_preprocessor_step_5_normalizer_processor.safetensors"),
    "norm_stats.json": Format("ours", "norm_stats.json"),
    "norm_stats.json of Pi0.5": Format("openpi", "assets/physical-intelligence/libero/norm_stats.json", pi05=True),
    "tokenizer.json": Format("ours", "tokenizer.json"),
    "sentencepiece": Format("sentencepiece", "tokenizer.model", json=False),
    "safetensors header": Format("openpi", "model.safetensors"),
    "index of shards": Format("rlinf", "model.safetensors.index.json"),
}


def write_directory(directory: Path, layout: str, pi05: bool) -> None:
    config = synthetic.pi0_config(pi05, **SIZES)
    written: dict[str, synthetic.Layout] = {"rlinf": "rlinf", "lerobot": "lerobot"}
    synthetic.write_checkpoint(directory, config, written.get(layout, "openpi"))
    if layout == "ours":
        config.save(directory / "config.json")
        shutil.move(directory / FORMATS["norm_stats.json of Pi0.5"].path, directory / "norm_stats.json")
    if layout == "sentencepiece":
        (directory / "tokenizer.json").unlink()
        options: dict[str, Any] = {
            **{"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "add_dummy_prefix": False},
            **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "user_defined_symbols": ["\n"]},
        }
        prefix = str(directory / "tokenizer")
        SentencePieceTrainer.train(
            sentence_iterator=iter([PROMPT] * 20), model_prefix=prefix, remove_extra_whitespaces=False, **options
        )
    if layout == "lerobot":
        for processor, kind in lerobot.NORMALISERS.items():
            mode = "QUANTILES" if pi05 else "MEAN_STD"
            feature = {"observation.state": {"type": "STATE", "shape": [8]}, "action": {"type": "ACTION", "shape": [7]}}
            step = {"eps": 1e-8, "features": feature, "norm_map": {"STATE": mode, "ACTION": mode, "VISUAL": "IDENTITY"}}
            file = next(directory.glob(f"{processor}*.safetensors")).name
            steps = [
                {"registry_name": "to_batch_processor", "config": {}},
                {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
                {"registry_name": kind, "config": step, "state_file": file},
            ]
            if processor == "policy_preprocessor":
                tokens = {"max_length": config.max_token_len, "padding_side": "right", "truncation": True}
                rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
                steps = [rename, *steps, {"registry_name": lerobot.PROMPT_STEPS[pi05]}]
                steps.append({"registry_name": "tokenizer_processor", "config": tokens})
            (directory / f"{processor}.json").write_text(json.dumps({"name": processor, "steps": steps}))


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found, waiting = [], [content]
    while waiting:
        inner = waiting.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            found.append((inner, key))
            waiting.append(inner[key])
    return found


def change_json(content: Any, chance: random.Random) -> Any:
    """Some values, keys and entries of a JSON value become others."""
    content = copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        found = places(content)
        if chance.random() < 0.5:
            found = [place for place in found if place[0] is content]
        elif chance.random() < 0.5:
            found = [(inner, key) for inner, key in found if isinstance(inner[key], str)]
        if not found:
            return chance.choice(VALUES)
        inner, key = chance.choice(found)
        match chance.randrange(6):
            case 0 | 1:
                named = isinstance(inner[key], str) and chance.random() < 0.5
                inner[key] = copy.deepcopy(chance.choice(PATHS if named else VALUES))
            case 2:
                other, its = chance.choice(found)
                inner[key] = copy.deepcopy(other[its])
            case 3:
                del inner[key]
            case 4 if isinstance(inner, dict):
                inner[f"{key}{chance.choice(('', 'x', chr(10), '.', 'é'))}"] = copy.deepcopy(chance.choice(VALUES))
            case 5 if isinstance(inner, dict):
                inner[chance.choice((str(chance.choice(found)[1]), "x", f"{key}\n"))] = inner.pop(key)
            case _ if isinstance(inner[key], int | float):
                inner[key] = -inner[key] * chance.choice((1, 2, 1e30)) + chance.choice((0, 1))
    return content


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flipped bits, a cut, an insertion, a repetition, or something else altogether."""
    data = bytearray(content)
    at, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    match chance.randrange(8):
        case 0 | 1 | 2:
            for _ in range(chance.choice((1, 2, 8))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 3:
            del data[at:]
        case 4:
            del data[at : min(end, at + 40)]
        case 5:
            data[at:at] = chance.choice(
                (b'"', b"{", b"[" * 100_000, b"\0" * 9, b"\xff", b'{"a":' * 5000, b",", b"9" * 5000)
            )
        case 6:
            data[at:at] = data[at : min(end, at + 200)]
        case 7:
            return chance.choice((b"", b"\0", b"\xff\xfe{}", b"null", b"[]", b"{}", b"3", chance.randbytes(60)))
    return bytes(data)


class Fuzzed:
    """A directory in memory, one file of which changes."""

    def __init__(self, kind: Format, directory: Path) -> None:
        self.kind, self.directory = kind, directory
        write_directory(directory, kind.layout, kind.pi05)
        self.path = directory / kind.path
        self.valid = self.path.read_bytes()
        self.header = self.path.suffix == ".safetensors"
        if self.header:
            self.length = int.from_bytes(self.valid[:8], "little")
            self.content = json.loads(self.valid[8 : 8 + self.length])
        elif kind.json:
            self.content = json.loads(self.valid)
        files.find_policy(directory)  # it is valid, and what is imported late is there
        self.unchanged = tensors.find_tensors(directory)
        outside = directory.parent / "x.safetensors"
        if not outside.exists():
            shutil.copy(next(directory.glob("*.safetensors")), outside)

    def change(self, chance: random.Random) -> None:
        head = self.valid[: 8 + self.length] if self.header else self.valid
        body = self.valid[len(head) :]
        if body and len(body) < LITTLE and chance.random() < 0.3:
            body = change_bytes(body, chance)[: len(body)].ljust(len(body), b"\0")
        elif self.kind.json and chance.random() < 0.7:
            head = json.dumps(change_json(self.content, chance)).encode()
            if self.header:
                head = (len(head) + chance.choice((0, 0, 0, 1, 2**40))).to_bytes(8, "little") + head
        else:
            head = change_bytes(head, chance)
        with self.path.open("wb") as file:
            file.write(head)
            if len(body) < LITTLE:
                file.write(body)
            else:
                file.truncate(len(head) + len(body))

    @contextlib.contextmanager
    def known_weights(self) -> Iterator[None]:
        """The header is read once, except where it is what changes."""
        if self.kind.path.startswith("model."):
            yield
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "find_tensors", lambda directory: dict(self.unchanged))
            yield

    def check(self) -> bool:
        """Whether the directory is accepted; fails unless it is, or is refused as it should be."""
        OPENED.clear()
        begin = time.process_time()
        try:
            with self.known_weights(), watched(self.directory):
                found = files.find_policy(self.directory)
                scaling = files.scaling(found.config, found.norm_stats, "stats")
                tokenizer.check_prompt(found.tokenizer, found.config, PROMPT, self.path)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message, message
            assert len(message) < 1500, message
            assert str(self.directory) in message or "the prompt" in message, message
            accepted = False
        else:
            accepted = True
            assert all(np.isfinite(part.astype(np.float32)).all() for part in scaling)
            assert (scaling.state_scale > 0).all()
            assert max(found.config.depth, found.config.vision_depth, found.config.cameras) <= 1000
        assert time.process_time() - begin < SECONDS
        assert not OPENED, f"opened or did {OPENED}"
        return accepted


WATCHED: list[str] = []
"""The only directory in which something may be opened at the moment, if there is one."""
OPENED: list[Any] = []
FORBIDDEN = ("subprocess", "socket", "exec", "pickle", "compile", "import", "os.system", "os.remove", "os.rename")


def hook(event: str, given: tuple[Any, ...]) -> None:
    if WATCHED and event == "open" and not isinstance(given[0], int):
        if not os.path.realpath(os.fsdecode(given[0])).startswith(WATCHED[0]):
            OPENED.append(given[0])
    elif WATCHED and event.startswith(FORBIDDEN):
        OPENED.append((event, given))


sys.addaudithook(hook)


@contextlib.contextmanager
def watched(directory: Path) -> Iterator[None]:
    WATCHED.append(f"{directory}/")
    try:
        yield
    finally:
        WATCHED.clear()


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Callable[[str], Fuzzed]]:
    memory = "/dev/shm" if EXAMPLES >= 1000 else None  # where other tests look for what has been left
    made: dict[str, Fuzzed] = {}
    with tempfile.TemporaryDirectory(prefix="dsrl_async-fuzz-", dir=memory) as directory:

        def make(name: str) -> Fuzzed:
            if name not in made:
                made[name] = Fuzzed(FORMATS[name], Path(directory, str(len(made))))
            return made[name]

        yield make


@pytest.mark.timeout(300 if EXAMPLES < 1000 else 0)  # which is wall time, of which by hand there may be hours
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_changed_is_accepted_or_refused_in_one_sentence(name: str, fuzzed: Callable[[str], Fuzzed]) -> None:
    kind = fuzzed(name)
    counts = {True: 0, False: 0}
    begin = time.process_time()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES < 1000)
    @given(st.integers(0, 2**62))
    def examine(seed: int) -> None:
        kind.change(random.Random(seed))
        counts[kind.check()] += 1

    examine()
    rate = sum(counts.values()) / (time.process_time() - begin)
    print(f"\n{name}: accepted {counts[True]}, refused {counts[False]}, {rate:.0f} a second of CPU time")
    assert counts[False] > 0.3 * EXAMPLES


def guess(content: Any, key: str, kind: type, path: Path) -> Any:
    """`field` without its check."""
    return content.get(key) or kind()


def trusting_index(index: Path) -> list[Path]:
    return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def trusting_statistic(stats: Any, statistic: str, key: str, width: int, most: int, source: object) -> Any:
    return np.asarray(stats[statistic], np.float64)[:width]


Plant = Callable[[pytest.MonkeyPatch], None]
PLANTS: dict[str, list[Plant]] = {
    "config.json of this project": [
        lambda patch: patch.setattr(Pi0Config, "from_json", lambda content, path: Pi0Config(**content)),
        lambda patch: patch.setattr("dsrl_async.pi0.config.shown", str),
    ],
    "config.json of openpi": [lambda patch: patch.setattr(files, "shown", str)],
    "config.json of LeRobot's Pi0": [lambda patch: patch.setattr(lerobot, "field", guess)],
    "preprocessor": [
        lambda patch: patch.setattr(lerobot, "field", guess),
        lambda patch: patch.setattr(os.path, "basename", str),
    ],
    "postprocessor": [lambda patch: patch.setattr(lerobot, "shown", str)],
    "processor's statistics": [
        lambda patch: patch.setattr(tensors, "safe_open", lambda *_: contextlib.nullcontext()),
    ],
    "norm_stats.json": [
        lambda patch: patch.setattr(files, "_statistic", trusting_statistic),
        lambda patch: patch.setattr(files, "FLOAT32_MAX", 1e308),
    ],
    "tokenizer.json": [
        lambda patch: patch.setattr(tokenizer, "parse_json", lambda text, source: json.loads(text)),
    ],
    "sentencepiece": [lambda patch: patch.setattr(tokenizer, "in_one_line", lambda error: f"{error}\n")],
    "safetensors header": [
        lambda patch: patch.setattr(tensors, "safe_open", lambda *_: contextlib.nullcontext()),
    ],
    "index of shards": [
        lambda patch: patch.setattr(tensors, "_indexed_files", trusting_index),
        lambda patch: patch.setattr(os.path, "basename", str),
    ],
}


@pytest.mark.parametrize(("name", "plant"), [(name, plant) for name, plants in PLANTS.items() for plant in plants])
def test_planted_faults_are_found(
    name: str, plant: Plant, fuzzed: Callable[[str], Fuzzed], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = fuzzed(name)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.2)
    plant(monkeypatch)
    for seed in range(5000):
        kind.change(random.Random(seed))
        try:
            kind.check()
        except Exception as error:  # any fault that is not one sentence
            print(f"found after {seed + 1}: {type(error).__name__} {str(error)[:100]}")
            return
    pytest.fail("5000 changes did not find it")
