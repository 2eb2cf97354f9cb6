"""Configuration files and options with anything in them: accepted, or refused in one sentence (support/fuzzing.py)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import changed, changed_lines, fuzzed, judged
from support.paths import CONFIGS, ROOT

from dsrl_async.config.command_line import load_config
from dsrl_async.config.load import leaf_fields, read_run_settings, to_yaml, validate
from dsrl_async.config.settings import Config

WORDS = [
    *(b"off", b"on", b"yes", b"no", b"true", b"False", b"null", b"~", b"''", b'""', b"nan", b".inf", b"-inf", b"1e400"),
    *(
        b"0",
        b"-1",
        b"1",
        b"1.5",
        b"1e5",
        b"1_000",
        b"010",
        b"0x10",
        b"0o7",
        b"1:30",
        b"2026-11-30",
        b"9" * 30,
        b"=",
        b"-0",
    ),
    *(
        b"[1, 2]",
        b"[]",
        b"{}",
        b"{a: 1}",
        b"[[1]]",
        b"[true]",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b": ",
        b"- ",
        b"? ",
        b"|",
        b">",
    ),
    *(
        b"&a ",
        b"*a",
        b"&a [*a]",
        b"<<: *a",
        b"<<: {gamma: 0.5}",
        b"!!int ",
        b"!!python/object/apply:os.getpid []",
        b"!x ",
    ),
    *(
        b"\t",
        b"\r",
        b"\x00",
        b"\xef\xbb\xbf",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
        "ü".encode(),
        b"# ",
        b"%a\n",
    ),
    *(b"---\n", b"...\n", b'"\\ud800"', b'"\\0"', b'"\\UFFFFFFFF"', b'"\\x41', b"'", b"sac.gamma: 0.5", b"actors.a: 1"),
    *(
        b"sac:",
        b"sac: 3",
        b"resume: x",
        b"config: x",
        b"envs_per_actor: 2",
        b"cuda",
        b"cuda:1",
        b"tabletop",
        b"a" * 300,
    ),
]
WHOLE = [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))] + [to_yaml(Config()).encode()]
SMALL = [
    b"sac: &a\n  gamma: 0.5\nenv: {task_ids: [0, 1]}\nlog: {<<: {console: off}}\n",
    b"actors: 4\nrun_dir: runs/x  # a comment\nsac:\n  gamma: 0.9\n  hidden_dims: [8, 8]\n  actor_grad_clip: null\n",
    b"max_minutes: 1e-1\nserial: true\n\nlearner:\n  device: 'cpu'\n  precision: \"ieee\"\nlog: {console: off}\n",
]
KEYS = [key for key, _ in leaf_fields()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@given(seed=st.integers(0, 2**64))
@fuzzed
def test_files(file: Path, seed: int) -> None:
    chance = random.Random(seed)
    change = chance.choice((changed, changed_lines))
    file.write_bytes(change(chance.choice(WHOLE if chance.random() < 0.1 else SMALL), chance, WORDS))
    if chance.random() < 0.5:
        with judged("configuration file", file.parent):
            load_config(["--config", str(file)])
    else:
        with judged("a run's configuration", file.parent):
            config = validate(read_run_settings(file.parent))
            assert validate(config.model_dump()) == config


@given(text=st.text(max_size=80))
@fuzzed
def test_text(file: Path, text: str) -> None:
    file.write_bytes(text.encode(errors="surrogatepass"))
    with judged("any text as a configuration file", file.parent):
        load_config(["--config", str(file)])


@given(seed=st.integers(0, 2**64))
@fuzzed
def test_options(seed: int) -> None:
    chance = random.Random(seed)
    arguments = []
    for _ in range(chance.choice((1, 1, 2))):
        key, word = chance.choice(KEYS), chance.choice(WORDS)
        text = changed(word, chance, WORDS).decode(errors="surrogateescape").replace("\0", "")
        flag = key if chance.random() < 0.9 else changed(key.encode(), chance).decode(errors="replace")
        arguments.append(f"--{flag}={text}" if chance.random() < 0.9 else text)
    if any(argument.partition("=")[0] in ("--help", "-h", "--help-all") for argument in arguments):
        return
    with judged("options", ROOT):
        config = load_config([argument for argument in arguments if not argument.startswith("--config")])
        assert validate(config.model_dump()) == config
