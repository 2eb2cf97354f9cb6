"""What the agent is told of its task: the rows for the instructions, and who is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config, ConfigError, SacConfig
from dsrl_async.envs.shipped import TABLETOP
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.embeddings import embed_prompts, read_rows
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.names import EMBEDDING, StoredTensor
from dsrl_async.pi0.policy import Pi0Policy
from dsrl_async.pi0.tensors import read_header
from dsrl_async.policies.find import policy_record
from dsrl_async.run import checkpoints
from dsrl_async.run.instructions import instructions_of, learned_by
from dsrl_async.run.preflight.policy import check_instructions, fit_agent

CPU = torch.device("cpu")
RED, PUT, NEAR = "put the block on the red plate", "put the block", "move the cube near the red plate"
RECORD = policy_record(Config().policy)


def told(kind: str, width: int) -> SacConfig:
    return SacConfig.model_validate({"instruction": kind, "instruction_dim": width})


def test_a_task_is_one_of_those_that_were_learned() -> None:
    found = instructions_of(told("task", 3), RECORD, [RED, PUT, RED, NEAR])
    assert found is not None
    assert found.learned == (RED, PUT, NEAR)
    assert np.array_equal(found.table, np.float32(3**0.5) * np.eye(3, dtype=np.float32)[[0, 1, 0, 2]])
    others = instructions_of(told("task", 3), RECORD, [NEAR, "dance", RED], (RED, PUT, NEAR))
    assert others is not None
    assert np.array_equal(others.table, np.concatenate([found.table[3:], np.zeros((1, 3)), found.table[:1]]))


def test_an_embedding_is_the_mean_of_the_policy_s_own_and_keeps_distances() -> None:
    prompts = [RED, PUT, NEAR, "move the block near the cube"]
    loaded = RECORD.load(Config().policy, CPU, prompts, lambda: None)
    assert isinstance(loaded, Pi0Policy)
    numbers = json.loads((EMBEDDED_POLICY / "tokenizer.json").read_text())["model"]["vocab"]
    means = []
    for prompt in prompts:
        ids = torch.tensor([numbers.get(word, numbers["<unk>"]) for word in prompt.split()])
        means.append(loaded.loaded.model.embedding.weight.detach().float()[ids].mean(0).numpy())
    assert RECORD.embed_prompts is not None
    assert np.allclose(RECORD.embed_prompts(prompts), means, atol=1e-6)

    found = instructions_of(told("embedding", 4096), RECORD, prompts)
    assert found is not None
    assert found.table.shape == (4, 4096)
    assert np.square(found.table).mean() == pytest.approx(1.0)
    assert np.abs(found.table.mean(0)).max() < 1e-6
    distances = [
        np.array([np.linalg.norm(one - other) for one in rows for other in rows]) for rows in (found.table, means)
    ]
    apart = distances[1] > 0
    ratio = distances[0][apart] / distances[1][apart]
    assert ratio.max() / ratio.min() < 1.1

    # as long as the learned ones are the same, so is what the agent is told of each, and of others
    others = instructions_of(told("embedding", 4096), RECORD, [NEAR, "put the cube"], prompts)
    assert others is not None
    assert np.allclose(others.table[0], found.table[2], atol=1e-5)
    assert np.abs(others.table[1] - found.table).max(axis=1).min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_table_are_read_as_they_are_stored(tmp_path: Path, dtype: torch.dtype, transposed: bool) -> None:
    from safetensors.torch import save_file as save

    table = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    save({"before": torch.zeros(3, dtype=torch.uint8), "table": table}, tmp_path / "file")
    stored = read_header(tmp_path / "file")["table"]
    if transposed:  # of a network that keeps the table [5, 7]
        table = table.reshape(5, 7).t()
        stored = StoredTensor(*stored[:3], (7, 5), *stored[4:6], True)
    assert np.array_equal(read_rows(stored, [6, 0, 3]), table[[6, 0, 3]].double().numpy())


def test_the_table_has_the_name_that_the_policy_embeds_with() -> None:
    files = find_policy(EMBEDDED_POLICY)
    assert files.tensors[EMBEDDING].shape[0] == files.config.vocab_size
    assert np.array_equal(embed_prompts(files, [""]), np.zeros((1, files.config.vlm_width), np.float32))


def test_there_is_nothing_to_tell_with_one_instruction_or_none() -> None:
    for kind in ("task", "embedding"):
        config = validate({"sac": {"instruction": kind}})
        fitted = fit_agent(config, RECORD.spec, TABLETOP)
        assert fitted.sac.instruction_dim == 0
        assert fitted.sac.model_copy(update={"instruction": "none"}) == fit_agent(Config(), RECORD.spec, TABLETOP).sac
        said = check_instructions(fitted, RECORD, TABLETOP)
        assert said == (f"sac.instruction {kind} has no effect, since tabletop has one instruction",)
    two = TABLETOP._replace(prompts=(RED, PUT, RED))
    widths = {"none": 0, "task": 2, "embedding": 64}
    for kind, width in widths.items():
        fitted = fit_agent(validate({"sac": {"instruction": kind}}), RECORD.spec, two)
        assert fitted.sac.instruction_dim == width
        assert check_instructions(fitted, RECORD, two) == ()


@pytest.mark.parametrize(
    ("sac", "prompts", "sentence"),
    [
        (
            {"instruction": "embedding"},
            (RED, "the red plate on put the block"),
            "sac.instruction: embedding cannot tell 'put the block on the red plate' from 'the red plate on put the "
            "block', which have the same words in the policy's eyes; take task",
        ),
        (
            {"instruction": "task", "instruction_dim": 3},
            (RED, PUT),
            "sac.instruction_dim: 3 must be the number of instructions, 2, with sac.instruction task; leave it out",
        ),
        (
            {"instruction_dim": 3},
            (RED, PUT),
            "sac.instruction_dim: it has no effect with sac.instruction none; leave it out",
        ),
    ],
)
def test_who_is_refused(sac: dict[str, object], prompts: tuple[str, ...], sentence: str) -> None:
    spec = TABLETOP._replace(prompts=prompts)
    config = fit_agent(validate({"sac": sac}), RECORD.spec, spec)
    with pytest.raises(ConfigError) as refused:
        check_instructions(config, RECORD, spec)
    assert str(refused.value) == sentence


def test_a_policy_without_embeddings_is_refused_by_name() -> None:
    record = dataclasses.replace(RECORD, type="my_module:MyPolicy", embed_prompts=None)
    config = validate({"sac": {"instruction": "embedding"}})
    for spec in (TABLETOP, TABLETOP._replace(prompts=(RED, PUT))):
        with pytest.raises(ConfigError) as refused:
            check_instructions(fit_agent(config, record.spec, spec), record, spec)
        assert str(refused.value) == (
            "sac.instruction: embedding is made of the policy's own embeddings of words, which a Pi0 has and "
            "my_module:MyPolicy does not; set it to task"
        )
    task = fit_agent(validate({"sac": {"instruction": "task"}}), record.spec, TABLETOP._replace(prompts=(RED, PUT)))
    assert check_instructions(task, record, TABLETOP._replace(prompts=(RED, PUT))) == ()


def test_an_agent_says_what_it_was_trained_with(tmp_path: Path) -> None:
    def write(metadata: dict[str, str] | None) -> None:
        save_file({"actor.flat": np.zeros(3, np.float32)}, tmp_path / checkpoints.AGENT, metadata)

    write(checkpoints.learned_metadata([RED, 'say "ja"\n']))
    assert learned_by(tmp_path, told("task", 2)) == (RED, 'say "ja"\n')
    assert load_file(tmp_path / checkpoints.AGENT).keys() == {"actor.flat"}
    assert learned_by(tmp_path, told("task", 2), [RED]) == (RED, 'say "ja"\n')
    assert learned_by(tmp_path, told("embedding", 64), [PUT]) is not None
    with pytest.raises(ConfigError) as refused:
        learned_by(tmp_path, told("task", 2), [RED, PUT])
    assert str(refused.value) == (
        f"{tmp_path / checkpoints.AGENT}: the agent was trained with 2 instructions, and 'put the block' is none of "
        "them; with sac.instruction task it knows no others: leave that one out, or train with sac.instruction "
        "embedding"
    )
    write(None)
    assert learned_by(tmp_path, told("none", 0), [PUT]) is None
    with pytest.raises(ConfigError, match="does not say which instructions the agent was trained with"):
        learned_by(tmp_path, told("task", 2))
    for damaged in ("{", "{}", "[]", "[1]", json.dumps("put")):
        write({checkpoints.LEARNED: damaged})
        with pytest.raises(ConfigError, match=r"agent\.safetensors"):
            learned_by(tmp_path, told("task", 2))
