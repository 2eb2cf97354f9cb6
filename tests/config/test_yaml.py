"""Configuration files: what YAML may say in them, what it means, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsrl_async.config import strict_yaml
from dsrl_async.config.command_line import load_config
from dsrl_async.config.load import get_key, leaf_fields, read_run_settings, read_yaml, to_yaml, validate
from dsrl_async.config.settings import Config, ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def refusal(file: Path, content: str | bytes) -> str:
    """The sentence with which a file is refused."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(file)])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sac: {gamma: 0.9}\nseed: 1\nsac: {tau: 0.1}", "the key 'sac' is there twice (line 3)"),
        ("sac:\n  gamma: 0.9\n  tau: 0.1\n  gamma: 0.8", "the key 'gamma' is there twice (line 4)"),
        ("x: {y: {z: {a: 1, a: 1}}}", "the key 'a' is there twice (line 1)"),
        ("seed: 1\n'seed': 1", "the key 'seed' is there twice (line 2)"),
        ("sac.gamma: 0.9\nsac: {gamma: 0.8}", "says sac.gamma twice, in its section and with a dot"),
        ("sac.gama: 0.9", "unknown key 'sac.gama'; did you mean 'sac.gamma'?"),
        ("x.y: 1", "unknown key 'x.y'"),
        (f"actors{'.a' * 400}: 1", "unknown key 'actors.a"),
        ("resume: runs/x", "resume cannot stand in a file; give it on the command line"),
        ("config: other.yaml", "config cannot stand in a file; a file cannot name another"),
        ("sac: 3", "sac: must be a section with keys, not '3'"),
        ("sac: [gamma]", "sac: must be a section with keys, not ['gamma']"),
        ("sac: 3\nsac.gamma: 0.9", "sac: must be a section with keys, not '3'"),
        ("[a, b]", "must hold `key: value` lines"),
        ("word", "must hold `key: value` lines"),
        ("? [a, b]\n: c", "a key must be a word (line 1)"),
        ("1: 2", "unknown key '1'"),
        ("true: 2", "unknown key 'true'"),
        ("seed: 1\n--- \nseed: 2", "there is a second document (line 2)"),
        ("seed: 1\n\tactors: 2", "not valid YAML"),
        ("sac:\n\tgamma: 0.9", "found character '\\t' that cannot start any token (line 2)"),
        (
            "seed: !!python/object/apply:os.getpid []",
            "python/object/apply:os.getpid' is refused; write the value alone",
        ),
        ("seed: !!int 3", "is refused; write the value alone (line 1)"),
        ("seed: *one", "nothing before it is called 'one' (line 1)"),
        ("x: &x [*x]", "nothing before it is called 'x' (line 1)"),
        ("<<: 3", "<< must be followed by a mapping"),
        ('run_dir: "\\ud800"', "characters that are no text (line 1)"),
        ('run_dir: "\\0"', "characters that are no text (line 1)"),
        ('run_dir: "\\UFFFFFFFF"', "an escape for a character that does not exist"),
        ('run_dir: "\\U00110000"', "an escape for a character that does not exist"),
        ("seed: \x00", "a character of number 0, which YAML does not allow"),
        ("seed: 1".encode("utf-16"), "is not a text file in UTF-8"),
        (b"seed: \xff", "is not a text file in UTF-8"),
        ("#" * 300_000, "it has more than 256000 bytes"),
        ("- " * 30 + "x", "nested more than 20 deep"),
    ],
)
def test_what_a_file_cannot_say_is_refused_in_one_sentence(file: Path, content: str | bytes, words: str) -> None:
    assert words in refusal(file, content)


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        ALIASES,
        *(opening * (250_000 // len(opening)) for opening in ("[", "{", "- ", "? ", "{a: ", "!", "&", "%a\n", "'")),
        f"a: [{'1,' * 120_000}]",
        "".join(f"{' ' * depth}a:\n" for depth in range(700)),
    ],
    ids=lambda content: content[:5],
)
def test_a_file_that_means_to_take_long_is_refused_soon(file: Path, content: str) -> None:
    begin = time.process_time()
    refusal(file, content)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ("max_decisions: 1e5", "max_decisions", 100_000),
        ("max_decisions: 1_000", "max_decisions", 1000),
        ("max_decisions: 1.5e1", "max_decisions", 15),
        ("seed: 9223372036854775807", "seed", 2**63 - 1),
        ("actors: 010", "actors", 10),
        ("actors: '4'", "actors", 4),
        ("sac: {actor_lr: 1e-4}", "sac.actor_lr", 1e-4),
        ("sac.gamma: 0.9", "sac.gamma", 0.9),
        ("sac:\nsac.gamma: 0.9", "sac.gamma", 0.9),
        ("sac.gamma: 0.9\nsac: {tau: 0.5}", "sac.gamma", 0.9),
        ("sac:\n  # gamma: 0.9\n", "sac.gamma", Config().sac.gamma),
        ("env:\nlog: ~\n", "env.chunk", Config().env.chunk),
        ("# nothing", "seed", 0),
        ("", "seed", 0),
        ("resume: null", "resume", None),
        ("run_dir: 2026", "run_dir", "2026"),
        ("run_dir: 2026-11-30", "run_dir", "2026-11-30"),
        ("run_dir: no", "run_dir", "no"),
        ("run_dir: 'null'", "run_dir", "null"),
        ("run_dir: ~", "run_dir", None),
        ("run_dir: Läufe/ü", "run_dir", "Läufe/ü"),
        ("\ufeffseed: 3", "seed", 3),
        ("log: {console: off}", "log.console", "off"),
        ("serial: on", "serial", True),
        ("throttle_actors: no", "throttle_actors", False),
        ("max_minutes:", "max_minutes", None),
        ("env: {task_ids: [0, 1e0]}", "env.task_ids", [0, 1]),
        ("sac: {<<: {gamma: 0.5, tau: 0.1}, tau: 0.2}", "sac.tau", 0.2),
        ("sac: {<<: [{gamma: 0.5}, {gamma: 0.6}]}", "sac.gamma", 0.5),
        ("sac: {hidden_dims: &d [3, 4], conv_channels: [8]}\nenv: {task_ids: *d}", "env.task_ids", [3, 4]),
    ],
)
def test_what_a_file_says(file: Path, content: str, key: str, value: Any) -> None:
    file.write_text(content, encoding="utf-8")
    assert get_key(load_config(["--config", str(file)]), key) == value


WRONG = [
    ("max_decisions", "1.5"),
    ("max_decisions", "1e400"),
    ("max_decisions", "9223372036854775808"),
    ("max_decisions", "inf"),
    ("max_decisions", "nan"),
    ("max_decisions", "true"),
    ("max_decisions", "-1e5"),
    ("actors", "1:30"),
    ("actors", "0x10"),
    ("actors", "9" * 5000),
    ("max_minutes", "1:30"),
    ("max_minutes", "true"),
    ("sac.gamma", "yes"),
    ("sac.actor_grad_clip", "off"),
    ("sac.actor_betas", "[nan, 0.9]"),
    ("env.task_ids", "[true]"),
    ("env.task_ids", "[1.5]"),
    ("env.task_ids", "[0, [1]]"),
    ("env.task_ids", "{a: 1}"),
    ("serial", "2"),
    ("serial", "maybe"),
    ("log.console", "no"),
    ("run_dir", '""'),
]


@pytest.mark.parametrize(("key", "text"), WRONG)
def test_a_value_is_refused_in_a_file_as_on_the_command_line(file: Path, key: str, text: str) -> None:
    option = text.strip('"')
    for said in (refusal(file, f"{key}: {text}"), command_line_refusal(f"--{key}={option}")):
        assert said.startswith(key)


def command_line_refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "NaN", "Infinity"])
def test_no_setting_takes_what_is_not_finite(value: str) -> None:
    checked = 0
    for key, field in leaf_fields():
        if "float" in str(field.annotation):
            text = f"[{value}, {value}]" if "tuple" in str(field.annotation) else value
            assert command_line_refusal(f"--{key}={text}").startswith(key)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("value", ["0", "-1"])
def test_settings_that_count_or_measure_are_positive(value: str) -> None:
    """But for those that may be none, and those that may be any number."""
    may_be_zero = {
        *("seed", "env.settling_steps", "policy.delta_action_dims", "sac.conv_padding", "sac.state_latent_dim"),
        *("sac.alpha_lr", "sac.train_actor_steps", "inference.batch_wait_ms", "evaluation.films"),
        *("group.gpus", "sac.instruction_dim"),
        *("sac.imitation_weight", "sac.imitation_updates"),
    }
    any_number = {"sac.target_entropy", "sac.final_target_entropy", "sac.log_std_min", "sac.log_std_max"}
    for key, field in leaf_fields():
        kinds = str(field.annotation)
        if ("int" in kinds or "float" in kinds) and "Literal" not in kinds and key not in any_number:
            if "list" in kinds or "tuple" in kinds or (value == "0" and key in may_be_zero):
                continue
            assert command_line_refusal(f"--{key}={value}").startswith(key)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"actors": True}, "actors: must not be true"),
        ({"sac": {"gamma": True}}, "sac.gamma: must not be true"),
        ({"env": {"task_ids": [False]}}, "env.task_ids: must not be false"),
        ({"max_decisions": 10**400}, "max_decisions: must be below 2^63"),
        ({"actors": float("inf")}, "actors: must be below 2^63"),
        ({"run_dir": "a\nb"}, "run_dir: must be text without control characters"),
        ({"run_dir": "\udcff"}, "run_dir: must be text without control characters"),
        ({"policy": {"checkpoint": ""}}, "policy.checkpoint: must be text without control characters, and not empty"),
        ({"sac": "gamma"}, "sac: must be a section with keys, not 'gamma'"),
    ],
)
def test_values_from_python_are_held_to_the_same(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(settings)
    assert str(caught.value).startswith(words)


def test_an_option_overrides_an_empty_section(file: Path) -> None:
    file.write_text("sac:\n  # tau: 0.5\n")
    assert load_config(["--config", str(file), "--sac.gamma", "0.9"]).sac.gamma == 0.9


def test_a_message_that_quotes_what_is_long_keeps_its_ends() -> None:
    said = command_line_refusal("--resume", "a" * 5000)
    assert said.startswith("--resume aaa")
    assert said.endswith("checkpoints/UPDATES-DECISIONS")
    assert len(said) < 1300


def test_what_is_not_a_regular_file_is_not_opened(file: Path) -> None:
    os.mkfifo(file)
    for path in (file, Path("/dev/zero"), file.parent):
        with pytest.raises(ConfigError, match="it is not a regular file"):
            read_yaml(path)


def test_a_file_is_utf_8_whatever_the_locale(file: Path) -> None:
    file.write_text("run_dir: Läufe\n", encoding="utf-8")
    program = f"from dsrl_async.config.load import *; print(ascii(read_yaml(Path({str(file)!r}))))"
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | locale, capture_output=True, text=True)
    assert done.stdout == "{'run_dir': 'L\\xe4ufe'}\n", done.stderr


@pytest.mark.parametrize("text", ["null", "~", "1e5", "010", "off", "", "- a", "a: b", "*a", "<<", "ü ", "a" * 200])
def test_what_is_written_is_read_back(file: Path, text: str) -> None:
    config = validate({"run_dir": text or None, "sac": {"gamma": 1e-7}, "env": {"task_ids": [0, 3]}})
    file.write_text(to_yaml(config))
    assert validate(read_run_settings(file.parent)) == config
    assert validate(yaml.safe_load(file.read_text())) == config


def test_nothing_is_executed(tmp_path: Path) -> None:
    planted = tmp_path / "executed"
    for text in (
        f"!!python/object/apply:os.system ['touch {planted}']",
        f"x: !!python/object/new:os.system ['touch {planted}']",
        f"!<tag:yaml.org,2002:python/object/apply:os.mkdir> [{planted}]",
    ):
        with pytest.raises(ValueError, match="is refused"):
            strict_yaml.parse(text, "file")
    assert not planted.exists()
