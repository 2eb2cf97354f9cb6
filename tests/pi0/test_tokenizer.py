"""Sentencepiece models as tokenizers, and how long prompts get."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from support.pi0_models import make_model, norm_stats, small_config
from tokenizers import Tokenizer, models, pre_tokenizers

from dsrl_async.pi0.checkpoint import LoadedPolicy
from dsrl_async.pi0.policy import language_lengths
from dsrl_async.pi0.processing import Normaliser, PromptTokenizer
from dsrl_async.pi0.tokenizer import STATE_BINS, find_tokenizer, load_tokenizer, longest_prompt

SENTENCES = [
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "pick up the black bowl next to the cookie box and place it on the plate",
    "open the middle drawer of the cabinet",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the special ids of PaliGemma's, and a newline that is a token of its own."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(directory / "paligemma_tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return directory / "paligemma_tokenizer.model"


def test_prompts_are_what_openpis_tokenizer_makes_of_them(model_file: Path) -> None:
    assert find_tokenizer(model_file.parent, None) == model_file
    tokenizer = PromptTokenizer(load_tokenizer(model_file), 80)
    processor = SentencePieceProcessor(model_file=str(model_file))
    for sentence in SENTENCES:
        expected = processor.encode(sentence, add_bos=True) + processor.encode("\n")
        assert tokenizer.ids(f" {sentence.replace(' ', '_')}\n") == expected
        assert expected[0] == 2
        assert expected[-1] == processor.piece_to_id("\n") != processor.unk_id()
    tokens, mask = tokenizer(SENTENCES)
    assert [row[valid].tolist() for row, valid in zip(tokens, mask, strict=True)] == [
        tokenizer.ids(sentence) for sentence in SENTENCES
    ]
    assert not tokens[~mask].any()  # padded with id 0


def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model") as raised:
        load_tokenizer(tmp_path / "tokenizer.model")
    assert "\n" not in str(raised.value)


def test_without_sentencepiece_the_command_to_install_it_is_named(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"sentencepiece model, .* `pip install sentencepiece`"):
        load_tokenizer(model_file)


def merging_tokenizer(slots: int) -> PromptTokenizer:
    """Has a token for every number of three digits, so that one of two digits takes more ids than 255 does."""
    words = ["<bos>", *(chr(code) for code in range(32, 127)), "\n", *map(str, range(100, STATE_BINS))]
    merges = [(str(n // 10), str(n % 10)) for n in range(10, 26)]
    words += ["".join(pair) for pair in merges]
    merges += [(str(n // 10), str(n % 10)) for n in range(100, STATE_BINS)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PromptTokenizer(tokenizer, slots)


def test_language_slots_are_enough_for_every_state(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = merging_tokenizer(200)
    state = np.linspace(-1.1, 1.1, 8, dtype=np.float32)

    def length(bin_: int) -> int:
        return len(tokenizer.ids("put it there", np.full(8, (bin_ + 0.5) / 128 - 1, np.float32)))

    assert length(255) < length(99) == length(-1)
    assert (
        longest_prompt(tokenizer.ids, "put it there", 200, 8) == length(99) >= len(tokenizer.ids("put it there", state))
    )
    assert longest_prompt(tokenizer.ids, "put it there", 200, None) == len(tokenizer.ids("put it there"))
    model, _ = make_model(dataclasses.replace(small_config(pi05=True), state_in_prompt=True, max_token_len=200))
    policy = LoadedPolicy(model.config, model, Normaliser(model.config, norm_stats()), tokenizer)
    assert language_lengths(policy, ["put it there"])[0] >= length(99)
    assert not caplog.records


def test_a_prompt_that_is_cut_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = merging_tokenizer(10)
    with caplog.at_level(logging.WARNING):
        assert longest_prompt(tokenizer.ids, "put it there", 10, None) == 14
    assert caplog.messages == ["the prompt 'put it there' has up to 14 tokens, the policy takes 10: it is cut"]
