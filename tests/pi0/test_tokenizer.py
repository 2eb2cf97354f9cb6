"""Sentencepiece models as tokenizers, and how long prompts get."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from support.pi0_models import make_model, norm_stats, small_config
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from dsrl_async.pi0.checkpoint import LoadedPolicy
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.policy import language_lengths
from dsrl_async.pi0.processing import Normaliser, PromptTokenizer
from dsrl_async.pi0.tokenizer import (
    PALIGEMMA_IDS,
    PALIGEMMA_VOCABULARY,
    STATE_BINS,
    check_prompt,
    check_vocabulary,
    find_tokenizer,
    load_tokenizer,
    longest_prompt,
    unknown_words,
)

SENTENCES = [
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "pick up the black bowl next to the cookie box and place it on the plate",
    "open the middle drawer of the cabinet",
]


def train(directory: Path, **options: object) -> Path:
    """A tiny model with the special ids of PaliGemma's, and a newline that is a token of its own."""
    settings: dict[str, Any] = {
        "sentence_iterator": iter(SENTENCES * 20),
        "model_prefix": str(directory / "paligemma_tokenizer"),
        "vocab_size": 60,
        "hard_vocab_limit": False,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "user_defined_symbols": ["\n"]},
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **options,
    }
    SentencePieceTrainer.train(**settings)
    return directory / "paligemma_tokenizer.model"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece"))


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prefix", {"add_dummy_prefix": True}),
        ("spaces", {"remove_extra_whitespaces": True}),
        ("capitals", {"normalization_rule_name": "nmt_nfkc_cf"}),
    ],
)
def test_a_model_that_changes_the_text_is_refused(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    path = train(tmp_path, **options)
    with pytest.raises(ValueError, match=r"paligemma_tokenizer\.model makes '.*' of 'Pick up  12 ', which PaliGemma"):
        load_tokenizer(path)


def test_bytes_of_unknown_characters_are_no_change(tmp_path: Path) -> None:
    load_tokenizer(train(tmp_path, byte_fallback=True, vocab_size=300))


WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "put", "it", "there"]


def save_tokenizer(path: Path, change: Callable[[Tokenizer], object]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    change(tokenizer)
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.enable_padding(length=48, pad_id=0),
        lambda t: t.enable_truncation(2),
        lambda t: (t.enable_padding(length=48, direction="left"), t.enable_truncation(3, direction="left")),
        lambda t: setattr(
            t,
            "post_processor",
            processors.TemplateProcessing("<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]),
        ),
        lambda t: t.add_special_tokens(["<image>"]),
    ],
)
def test_what_was_saved_with_a_tokenizer_changes_no_prompt(
    tmp_path: Path, change: Callable[[Tokenizer], object]
) -> None:
    path = save_tokenizer(tmp_path, change)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config_of(8), path)
    assert PromptTokenizer(tokenizer, 12).ids("put it there") == [2, 5, 6, 7, 4]


def config_of(vocabulary: int) -> Pi0Config:
    return dataclasses.replace(small_config(), vocab_size=vocabulary)


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "has the normalizer 'Lowercase', which"),
        (lambda t: setattr(t, "normalizer", normalizers.Prepend("<bos>")), "has the normalizer 'Prepend', which"),
        (
            lambda t: setattr(t, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
            "has the normalizer 'NFC', which",
        ),
        (
            lambda t: setattr(t, "normalizer", normalizers.Replace(Regex("(a+)+$"), "b")),
            "has the normalizer 'Replace', which",
        ),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()), "has the pre_tokenizer 'Metaspace', which"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel()), "has the pre_tokenizer 'ByteLevel', which"),
        (lambda t: t.add_tokens(["block"]), "its added token 'block' has the id 8, the policy embeds 8"),
    ],
)
def test_what_changes_the_ids_is_refused_by_name(
    tmp_path: Path, change: Callable[[Tokenizer], object], message: str
) -> None:
    path = save_tokenizer(tmp_path, change)
    with pytest.raises(ValueError, match=rf"tokenizer\.json:? {message}"):
        check_vocabulary(load_tokenizer(path), config_of(8), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].update(there=8000), "has 8001 tokens, the policy embeds 8: it is of another"),
        (lambda c: c["model"]["vocab"].clear(), "has no token '<bos>'"),
        (
            lambda c: c.update(model={"type": "BPE", "vocab": {"<bos>": 0}, "merges": [], "dropout": 0.1}),
            "has a dropout of 0.1",
        ),
        (lambda c: c.update(model={"type": "\n"}), "is not a tokenizer.json of the tokenizers library: "),
        (lambda c: c.update(model=None), "is not a tokenizer.json of the tokenizers library: "),
    ],
)
def test_a_file_that_is_wrong_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = save_tokenizer(tmp_path, lambda tokenizer: None)
    rewrite(change)(path)
    with pytest.raises(ValueError, match=rf"tokenizer\.json {message}") as raised:
        check_vocabulary(load_tokenizer(path), config_of(8), path)
    assert "\n" not in str(raised.value)


def test_a_prompt_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, lambda tokenizer: tokenizer.add_special_tokens(["<image>"])))
    check_prompt(tokenizer, config_of(8), "put it there")
    with pytest.raises(ValueError, match=r"prompt 'put <image> there' has a token with the id 8, the policy embeds 8"):
        check_prompt(tokenizer, config_of(8), "put <image> there")
    path = save_tokenizer(tmp_path, lambda tokenizer: None)
    rewrite(lambda content: content["model"].update(unk_token="[UNK]"))(path)
    with pytest.raises(ValueError, match="tokenizer cannot encode 'put that there': "):
        check_prompt(load_tokenizer(path), config_of(8), "put that there")


def test_words_that_a_tokenizer_leaves_out_are_named() -> None:
    letters = {word: index for index, word in enumerate(["<bos>", "\n", " ", *"abcdefghijklmnopqrstuvwxy"])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    check_prompt(tokenizer, config_of(40), "put it")
    with pytest.raises(ValueError, match="tokenizer has no token for '2' in the prompt 'put Z in 2'"):
        check_prompt(tokenizer, config_of(40), "put Z in 2")


def test_words_that_share_the_token_for_unknown_ones_are_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, lambda tokenizer: None))
    assert unknown_words(tokenizer, "put that there put that thing") == ["that", "thing"]
    assert unknown_words(tokenizer, "put it there") == []
    letters = {word: index for index, word in enumerate(["<bos>", "\n", " ", *"abcdefghijklmnopqrstuvwxy"])}
    assert unknown_words(Tokenizer(models.BPE(letters, [])), "put Z in 2") == []  # it has no such token


def test_the_published_vocabulary_needs_paligemmas_ids(tmp_path: Path) -> None:
    words = dict.fromkeys([*WORDS, *map(str, range(2000))])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="x gives other ids than PaliGemma's tokenizer, which is the policy's"):
        check_vocabulary(tokenizer, config_of(PALIGEMMA_VOCABULARY), Path("x"))
    check_vocabulary(tokenizer, config_of(PALIGEMMA_VOCABULARY - 1), Path("x"))
    ids = {"<pad>": 0, "<bos>": 2, "<unk>": 3, **{text: ids[0] for text, ids in PALIGEMMA_IDS.items()}}
    ids.update({str(number): number for number in range(4, 2000) if number != 108})
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fake = PALIGEMMA_IDS | {text: [found[0]] for text, found in PALIGEMMA_IDS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsrl_async.pi0.tokenizer.PALIGEMMA_IDS", fake)
        check_vocabulary(tokenizer, config_of(PALIGEMMA_VOCABULARY), Path("x"))


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
