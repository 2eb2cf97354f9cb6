"""What a directory is, when it is no Pi0, is said by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsrl_async.pi0.files import find_policy

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 14\n"


def put(**contents: Any) -> Callable[[Path], None]:
    """Files by their paths, with `__` for a slash and `_dot_` for a point; what is no text is JSON."""

    def make(directory: Path) -> None:
        for name, content in contents.items():
            path = directory / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))

    return make


def weights(tensor: str, **beside: Any) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        put(**beside)(directory)
        save_file({tensor: np.zeros(2, np.float32)}, directory / "model.safetensors")

    return make


def run_directory(directory: Path) -> None:
    put(config_dot_yaml="actors: 2\n", checkpoints__00000010_minus_00000010__state_dot_json={})(directory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (weights("a.weight", config_dot_json={"type": kind}), rf"config\.json is of a policy of type '{kind}'")
            for kind in ("smolvla", "act", "diffusion", "vqbet", "pi0_fast")
        ),
        (
            weights("language_model.model.norm.weight", config_dot_json={"model_type": "paligemma"}),
            r"config\.json says that it is PaliGemma, which a Pi0 is trained from: give a Pi0$",
        ),
        (
            weights("a.weight", config_dot_json={"model_type": "openvla", "architectures": ["OpenVLAFor"]}),
            r"says that it is OpenVLA, .* no noise to choose$",
        ),
        (weights("a.weight", config_dot_json={"model_type": "llama"}), r"is of transformers, of type 'llama'$"),
        (weights("a.weight", config_dot_json={"architectures": ["Octo"]}), r"says that it is of the class 'Octo'$"),
        (weights("a.weight", config_dot_json={"model_type": 7}), r"none that begins with paligemma_.*not of a Pi0$"),
        (weights("a.weight"), r"not of a Pi0$"),
        (put(params___METADATA={}, assets__a="x"), r"is a JAX checkpoint: convert it"),
        (put(_METADATA={}, manifest_dot_ocdbt="x"), r"is a JAX checkpoint: convert it"),
        (put(exp__30000__params___METADATA={}), r"holds JAX checkpoints, such as \S+/exp/30000: convert one"),
        (put(pytorch_model_dot_bin="x"), r"only pytorch_model\.bin, and pickled weights are never loaded"),
        (put(weights__policy_dot_pkl="x"), r"only weights/policy\.pkl, and pickled weights are never loaded"),
        (weights("x", adapter_config_dot_json={}), r"adapter_config\.json is of a LoRA adapter: merge it"),
        (put(meta__info_dot_json={}, data__x="x"), r"is a data set of LeRobot, and no policy"),
        (put(model_dot_safetensors=POINTER), r"model\.safetensors is a git-LFS pointer .* `git lfs pull`"),
        (put(config_dot_json=POINTER), r"config\.json is a git-LFS pointer .* `git lfs pull`"),
        (put(model_dot_safetensors="<!DOCTYPE html><html>"), r"model\.safetensors is a web page"),
        (run_directory, r"is the directory of a run of this project, .* evaluate --checkpoint"),
        (put(state_dot_json={}, agent_dot_safetensors="x"), r"is a checkpoint of a run of this project, .*--resume"),
        (put(tokenizer_dot_model="x"), r"has a tokenizer and no weights: it is for policy\.tokenizer$"),
        (put(_dot_cache__x="x"), r"is empty: copy or download"),
        (
            put(a_dot_gguf="x", b="x", c="x", README_dot_md="x"),
            r"has no model\.safetensors .*, but 'README\.md', 'a\.gguf', 'b' and 1 more$",
        ),
    ],
)
def test_what_it_is_is_said(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        find_policy(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    from dsrl_async.pi0.tokenizer import load_tokenizer

    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ValueError, match=rf"{name} is a git-LFS pointer"):
            load_tokenizer(tmp_path / name)
