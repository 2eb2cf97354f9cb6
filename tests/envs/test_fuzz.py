"""LIBERO's files with anything in them: accepted, or refused in one sentence (support/fuzzing.py)."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import changed, changed_lines, fuzzed, judged

from dsrl_async.envs import libero_files, libero_init_states

STATES = np.random.default_rng(0).normal(size=(3, 5))
MAP = b"libero_task_map = {\n    'libero_goal': [\n        'open_it',\n        'close_it',\n    ],\n}\n"
OBJECTS = b"""class Base(Object):
    path = f"scenes/{obj_name}.xml"

@register_object
class Stove(Base):
    def __init__(self, obj_name="stove"):
        super().__init__(str(assets / "scenes" / "stove" / "stove.xml"))
"""
PROBLEMS = b'class X(Base):\n    if fixture_category == "table":\n        continue\n'
BDDL = b"(define (problem x)\n  (:language Open it)\n  (:fixtures\n    table - table\n    stove - stove\n  )\n)\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A LIBERO of two tasks."""
    top = tmp_path_factory.mktemp("package")
    inner = top / "libero"
    for name in ("bddl_files/libero_goal", "init_files/libero_goal", "benchmark"):
        (inner / name).mkdir(parents=True)
    for name in libero_files.ASSET_DIRECTORIES:
        (inner / "assets" / name).mkdir(parents=True)
    (inner / "__init__.py").touch()
    (inner / "benchmark" / "libero_suite_task_map.py").write_bytes(MAP)
    for suite in ("libero_goal", "libero_goal_swap"):
        for place in ("bddl_files", "init_files"):
            (inner / place / suite).mkdir(parents=True, exist_ok=True)
        for task in ("open_it", "close_it"):
            (inner / "bddl_files" / suite / f"{task}.bddl").write_bytes(BDDL)
            (inner / "init_files" / suite / f"{task}.pruned_init.npz").write_bytes(of_numpy(STATES))
    (inner / "assets" / "scenes" / "stove").mkdir()
    for model in ("scenes/stove.xml", "scenes/stove/stove.xml"):
        (inner / "assets" / model).touch()
    for place, code in (("objects", OBJECTS), ("problems", PROBLEMS)):
        (inner / "envs" / place).mkdir(parents=True)
        (inner / "envs" / place / "code.py").write_bytes(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libero_files, "_package_directories", lambda name: [top] if name == "libero" else [])
        patch.setattr(libero_files, "version", lambda name: "3.8.1")
        patch.setenv("LIBERO_CONFIG_PATH", str(top))
        libero_files.task_names.cache_clear()
        libero_files.check_tasks("libero_goal", [0, 1])
        libero_files.check_tasks("libero_goal_swap", [0, 1])
        yield inner
    libero_files.task_names.cache_clear()


def of_numpy(states: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, states=states)
    return file.getvalue()


def of_torch(states: np.ndarray) -> bytes:
    file = io.BytesIO()
    torch.save(states, file)
    return file.getvalue()


def repacked(archive: bytes, chance: random.Random, words: list[bytes]) -> bytes:
    """An archive with a changed member, whose checksum is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as before, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after:
        for member in before.infolist():
            content = before.read(member)
            after.writestr(member.filename, changed(content, chance, words) if len(content) > 50 else content)
    return file.getvalue()


ARCHIVES = {".npz": of_numpy(STATES), "": of_torch(STATES)}
STORED = [
    *(
        b"'<f8'",
        b"'>f8'",
        b"'|O'",
        b"True",
        b"False",
        b"(3, 5)",
        b"(-3, -5)",
        b"(999999999999, 5)",
        b"(3,)",
        b"[" * 300,
    ),
    *(
        b"f8",
        b"<",
        b">",
        b"\x89",
        b"\x88",
        b"K\x03",
        b"K\x05",
        b"J\xff\xff\xff\xff",
        b"X\xff\xff\xff\xff",
        b"\x86",
        b".",
    ),
    *(
        b"cos\nsystem\n",
        b"(S'touch planted'\ntR.",
        b"\x8b\x04\x00\x00\x00\xff\xff\xff\x7f",
        b"I" + b"9" * 5000 + b"\n",
        b"F1e\n",
    ),
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"\x93NUMPY\x03\x00", b"states.npy", b"data.pkl"),
]
NAN = b"\xff" * 15
"""At any place among float64 numbers one is not finite."""


@given(seed=st.integers(0, 2**64), kind=st.sampled_from(list(ARCHIVES)))
@fuzzed
def test_init_states(tmp_path: Path, seed: int, kind: str) -> None:
    chance = random.Random(seed)
    path = tmp_path / f"a.pruned_init{kind}"
    change = repacked if chance.random() < 0.6 else changed
    path.write_bytes(change(ARCHIVES[kind], chance, [*STORED, NAN]))
    with judged(f"init states{kind or ' of torch'}", tmp_path, names=str(path)):
        states = libero_init_states.read(path)
        assert states.dtype == np.float64
        assert states.ndim == 2
        assert np.isfinite(states).all()


YAML = b"benchmark_root: /x\nbddl_files: /x/bddl\ninit_states: '/x/init'\nassets: /x/assets\ndatasets: /x/data # mine\n"
YAML_WORDS = [
    *(b'"/a\\nb"', b'"/a\\x1bb"', b"|\n  /a\n  b"),
    *(
        b"",
        b"5",
        b"~",
        b"null",
        b"[a]",
        b"{a: b}",
        b"'",
        b'"',
        b"''",
        b"*a",
        b"&a ",
        b"&a [*a]",
        b"!!python/name:os.system ",
        b"---\n",
    ),
    *(
        b"..",
        b"/",
        b"~root",
        b'"\\0"',
        b'"\\ud800"',
        b"\xff",
        b"\xef\xbb\xbf",
        b"\t",
        b"\x00",
        b": ",
        b"- ",
        b"a" * 5000,
        b"/a" * 3000,
    ),
]


@given(seed=st.integers(0, 2**64))
@fuzzed
def test_liberos_configuration(package: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = package.parent / "config.yaml"
    original = YAML.replace(b"/x", str(package).encode())
    file.write_bytes(chance.choice((changed, changed_lines))(original, chance, YAML_WORDS))
    try:
        with judged("LIBERO's config.yaml", package.parent, names=str(file)):
            libero_files.check_places()
    finally:
        file.unlink()


MAP_WORDS = [
    *(
        b"(",
        b"[" * 300,
        b"]",
        b"{",
        b"}",
        b"'",
        b'"',
        b"'''",
        b"\\",
        b"\x00",
        b"\xff",
        b"\t",
        b"\n",
        b"# coding: utf-16\n",
    ),
    *(
        b"1",
        b"1e999",
        b"9" * 5000,
        b"None",
        b"'../../x'",
        b"'/etc/passwd'",
        b"'a b'",
        b"''",
        b"b'x'",
        b"-" * 3000,
        b"1+1j",
    ),
    *(
        b"open('planted', 'w')",
        b"__import__('os')",
        b"f'{open}'",
        b"lambda: 0",
        b"{[]: 1}",
        b"*[]",
        b"...",
        b"'libero_goal'",
    ),
    *(b"'a': {[]: 1},", b"'a': " + b"-" * 5000 + b"1,", b"'a': 1" + b"+1" * 5000 + b",", b"'a': 1if 1else 2,"),
]


@given(seed=st.integers(0, 2**64))
@fuzzed
def test_list_of_tasks(package: Path, seed: int) -> None:
    chance = random.Random(seed)
    file = package / "benchmark" / "libero_suite_task_map.py"
    file.write_bytes(chance.choice((changed, changed_lines))(MAP, chance, MAP_WORDS))
    libero_files.task_names.cache_clear()
    try:
        with judged("list of tasks", package, names=str(file)):
            names = libero_files.task_names("libero_goal")
            assert all("/" not in name and isinstance(name, str) for name in names)
            assert not Path("planted").exists()
    finally:
        file.write_bytes(MAP)
        libero_files.task_names.cache_clear()


BDDL_WORDS = [b"(", b")", b"(:language", b"(:fixtures" * 50, b" - ", b"\x00", b"\xff", "ü".encode(), b"\n", b"(" * 5000]


@given(seed=st.integers(0, 2**64), suite=st.sampled_from(["libero_goal", "libero_goal_swap"]))
@fuzzed
def test_bddl_files(package: Path, seed: int, suite: str) -> None:
    chance = random.Random(seed)
    file = package / "bddl_files" / suite / "open_it.bddl"
    file.write_bytes(chance.choice((changed, changed_lines))(BDDL, chance, BDDL_WORDS))
    try:
        with judged("BDDL file", package.parent, names=str(file)):
            assert len(libero_files.check_tasks(suite, [0])) <= 1
            libero_files.has_furniture(suite, 0)
            (told,) = libero_files.instructions(suite, [0])
            assert told.isprintable()
    finally:
        file.write_bytes(BDDL)


CODE_WORDS = [
    b"class ",
    b"@register_object\n",
    b"\nclass " + b"A" * 5000,
    b"(",
    b":",
    b"\xff",
    b"\x00",
    b'"',
    b" == ",
    b"../" * 3,
    b"{obj_name}",
]


@given(seed=st.integers(0, 2**64), place=st.sampled_from(["objects", "problems"]))
@fuzzed
def test_code_that_names_objects_and_scenes(package: Path, seed: int, place: str) -> None:
    chance = random.Random(seed)
    code = {"objects": OBJECTS, "problems": PROBLEMS}[place]
    file = package / "envs" / place / "code.py"
    file.write_bytes(chance.choice((changed, changed_lines))(code, chance, CODE_WORDS))
    libero_files._known_kinds.cache_clear()
    try:
        with judged("LIBERO's code", package.parent, names="open_it.bddl"):
            libero_files.check_tasks("libero_goal_swap", [0])
    finally:
        file.write_bytes(code)
        libero_files._known_kinds.cache_clear()
