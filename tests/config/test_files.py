"""`--config`: files, shipped configurations, and the relative paths in both."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import CONFIGS, ROOT

from dsrl_async.config.files import find_config, read_config
from dsrl_async.config.settings import ConfigError


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds nothing."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_that_of_a_shipped_configuration_and_a_file_comes_first(elsewhere: Path) -> None:
    assert find_config("tabletop") == CONFIGS / "tabletop.yaml"
    (elsewhere / "tabletop").write_text("seed: 7\n")
    assert read_config("tabletop") == {"seed": "7"}


@pytest.mark.parametrize("given", ["nothing", "tabletop.yaml", "configs/tabletop.yaml", "\0", "~"])
def test_what_is_neither_is_refused_with_the_names_there_are(elsewhere: Path, given: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file; by name there are .*libero_spatial_pi0, .*tabletop$"):
        read_config(given)


def test_a_shipped_configuration_finds_the_policy_that_is_shipped(elsewhere: Path) -> None:
    (elsewhere / "dsrl_async/assets/libero_spatial_pi0_small").mkdir(parents=True)  # another one
    for given in ("libero_spatial_small", str(CONFIGS / "libero_spatial_small.yaml")):
        checkpoint = read_config(given)["policy"]["checkpoint"]
        assert checkpoint == str(ROOT / "dsrl_async/assets/libero_spatial_pi0_small")


def test_a_path_is_from_the_working_directory_or_else_from_the_file(elsewhere: Path) -> None:
    file = elsewhere / "lab/config.yaml"
    (elsewhere / "lab/policy").mkdir(parents=True)
    file.write_text("policy: {checkpoint: policy, norm_stats: nowhere}\n")
    assert read_config("lab/config.yaml")["policy"] == {
        "checkpoint": str(file.parent / "policy"),
        "norm_stats": "nowhere",
    }
    (elsewhere / "policy").mkdir()
    assert read_config("lab/config.yaml")["policy"]["checkpoint"] == "policy"


def test_demonstrations_are_found_beside_the_file_as_well(elsewhere: Path) -> None:
    file = elsewhere / "lab/config.yaml"
    (elsewhere / "lab/shown").mkdir(parents=True)
    (elsewhere / "here.hdf5").touch()
    for given, found in (
        ("shown", str(file.parent / "shown")),
        ("[shown, here.hdf5, nowhere.hdf5]", [str(file.parent / "shown"), "here.hdf5", "nowhere.hdf5"]),
        ("null", None),
    ):
        file.write_text(f"replay: {{demonstrations: {given}}}\n")
        assert read_config("lab/config.yaml")["replay"]["demonstrations"] == found
