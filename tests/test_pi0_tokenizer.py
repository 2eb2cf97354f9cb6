"""Sentencepiece models as tokenizers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from dsrl_async.pi0.processing import PromptTokenizer
from dsrl_async.pi0.tokenizer import find_tokenizer, load_tokenizer

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
