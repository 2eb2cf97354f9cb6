"""Tokenizer files and prompts: text becomes token ids as in openpi's PaliGemma tokenizer. This needs no torch."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dsrl_async.pi0.config import Pi0Config
from dsrl_async.untrusted import MEGABYTE, in_one_line, parse_json, read_bytes, read_text, shown

logger = logging.getLogger(__name__)

TOKENIZER_NAMES = ("tokenizer.json", "paligemma_tokenizer.model", "tokenizer.model")
"""Names of a tokenizer's file in a checkpoint's directory; the first that exists is used."""
WHERE_TO_GET_ONE = (
    "copy one there or give policy.tokenizer: PaliGemma's is RLinf/openpi_tokenizer and, gated, "
    "google/paligemma-3b-pt-224 on the Hugging Face hub, and gs://big_vision/paligemma_tokenizer.model"
)
LARGEST_TOKENIZER = 64 * MEGABYTE
PALIGEMMA_VOCABULARY, PALIGEMMA_BOS = 257152, 2
PALIGEMMA_IDS = {
    "\n": [108],
    "Task: pick up the black bowl, State: 12 255;\nAction: ": [
        *(7071, 235292, 4788, 908, 573, 2656, 14581, 235269, 3040, 235292, 235248, 235274, 235284, 235248),
        *(235284, 235308, 235308, 235289, 108, 4022, 235292, 235248),
    ],
}
"""What PaliGemma's tokenizer makes of texts, found with the one named in docs/measurements/pi0.md."""
TOY_SIZE = 1000
"""A tokenizer of fewer tokens is nobody's by mistake: it belongs to random weights."""
SPACE = "\u2581"
"""How tokens spell a space."""
STATE_BINS = 256
Ids = Callable[[str, NDArray[np.float32] | None], list[int]]
"""(prompt, state or None) -> its ids, neither padded nor cut."""
LANGUAGE_MULTIPLE = 8
"""Language slots come in multiples of this, so that a run needs few samplers."""


class Encoder(NamedTuple):
    """A tokenizer: text to ids without special tokens, and its special ids."""

    encode: Callable[[str], list[int]]
    bos: int
    pad: int


def find_tokenizer(directory: Path, given: Path | None) -> Path:
    """The tokenizer's file: `given`, or one in `given` if that is a directory, or one in the checkpoint's directory.

    Raises ValueError when `given` does not exist or there is no tokenizer; the message says where to get one.
    """
    if given is not None and not given.is_dir():
        if not given.exists():
            raise ValueError(f"there is no file or directory {given}")
        return given
    place = given or directory
    for name in TOKENIZER_NAMES:
        if os.path.lexists(place / name):
            return place / name
    raise ValueError(f"{place} has no tokenizer ({' or '.join(TOKENIZER_NAMES)}); {WHERE_TO_GET_ONE}")


def load_tokenizer(path: Path) -> Any:
    """Reads a `tokenizer.json` of the tokenizers library, or a sentencepiece model if the name ends in `.model`.

    Padding and truncation that were saved with it are switched off: prompts are padded and cut here.

    Raises ValueError naming the file when it is neither, or does to texts what PaliGemma's does not, and saying what to
    install when sentencepiece is missing.
    """
    return _load_sentencepiece(path) if path.suffix == ".model" else _load_tokenizer_json(path)


def _load_tokenizer_json(path: Path) -> Tokenizer:
    text = read_text(path, LARGEST_TOKENIZER)
    content = parse_json(text, str(path))
    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and BaseException where its own code fails
        reason = in_one_line(error)
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {reason}") from None
    for name in ("normalizer", "pre_tokenizer"):
        for step in _steps(content.get(name)):
            if step not in SPACE_SPELLINGS and not (step["type"] == "Split" and "String" in step["pattern"]):
                raise ValueError(f"{path} has the {name} {shown(step['type'])}, which PaliGemma's tokenizer has not")
    if content["model"].get("dropout"):
        raise ValueError(f"{path} has a dropout of {shown(content['model']['dropout'])}: its ids are random")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


SPACE_SPELLINGS: tuple[dict[str, Any], ...] = (
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False},
    {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": True},
)
"""What a tokenizer.json may do to a text. Splitting it by given strings is allowed besides."""


def _steps(component: Any) -> list[dict[str, Any]]:
    """The steps of a normaliser or a pre-tokenizer that the library has accepted."""
    if component is None:
        return []
    nested = component.get("normalizers", component.get("pretokenizers"))
    return [component] if nested is None else [step for inner in nested for step in _steps(inner)]


def _load_sentencepiece(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{path} is a sentencepiece model, and that library is not installed: "
            "run `pip install sentencepiece`, or give a tokenizer.json"
        ) from None
    content = read_bytes(path, LARGEST_TOKENIZER)
    try:
        processor = SentencePieceProcessor(model_proto=content)
        pieces = "".join(processor.encode(SPACED, out_type=str))
    except Exception as error:  # which one is up to the library's version
        raise ValueError(f"{path} is not a sentencepiece model: {in_one_line(error)}") from None
    read = re.sub("<0x([0-9A-F]{2})>", lambda byte: chr(int(byte[1], 16)), pieces).replace(SPACE, " ")
    if read != SPACED:
        raise ValueError(f"{path} makes {shown(read)} of {shown(SPACED)}, which PaliGemma's tokenizer leaves as it is")
    return processor


SPACED = "Pick up  12 "
"""A text that whoever adds or drops spaces or cares for capitals makes another one of."""


def check_vocabulary(tokenizer: Any, config: Pi0Config, source: Path) -> None:
    """Raises ValueError, naming the tokenizer's file, when its ids are not those that the policy was trained with.

    Special tokens that were added behind the vocabulary, such as PaliGemma's `<image>`, need no embedding, since
    `check_prompt` sees to it that no prompt has them.
    """
    encoder = make_encoder(tokenizer, source)
    if isinstance(tokenizer, Tokenizer):
        last = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    else:
        last = tokenizer.get_piece_size() - 1
    needed = max(last, encoder.bos, encoder.pad) + 1
    if needed > config.vocab_size:
        raise ValueError(f"{source} has {needed} tokens, the policy embeds {config.vocab_size}: it is of another model")
    if isinstance(tokenizer, Tokenizer):
        for number, added in tokenizer.get_added_tokens_decoder().items():
            if number >= config.vocab_size and not added.special:
                raise ValueError(
                    f"{source}: its added token {shown(added.content)} has the id {number}, "
                    f"the policy embeds {config.vocab_size}"
                )
    if config.vocab_size == PALIGEMMA_VOCABULARY and needed > TOY_SIZE:
        found = {text: encoder.encode(text) for text in PALIGEMMA_IDS}
        if found != PALIGEMMA_IDS or encoder.bos != PALIGEMMA_BOS:
            raise ValueError(f"{source} gives other ids than PaliGemma's tokenizer, which is the policy's")


def make_encoder(tokenizer: Any, source: Path | str = "tokenizer") -> Encoder:
    """Makes the same calls for both libraries. Raises ValueError, naming `source`, when there is no token <bos>.

    So does `encode` when the tokenizer can make nothing of a text.
    """
    if isinstance(tokenizer, Tokenizer):
        bos, pad = tokenizer.token_to_id("<bos>"), tokenizer.token_to_id("<pad>")
    else:
        bos, pad = tokenizer.bos_id(), tokenizer.pad_id()
    if bos is None or bos < 0:
        raise ValueError(f"{source} has no token '<bos>'")

    def encode(text: str) -> list[int]:
        try:
            if isinstance(tokenizer, Tokenizer):
                return list(tokenizer.encode(text, add_special_tokens=False).ids)
            return list(tokenizer.encode(text))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # see `_load_tokenizer_json`
            raise ValueError(f"{source} cannot encode {shown(text)}: {in_one_line(error)}") from None

    return Encoder(encode, bos, 0 if pad is None or pad < 0 else pad)


def prompt_ids(encoder: Encoder, prompt: str, state: NDArray[np.float32] | None = None) -> list[int]:
    """Ids of a prompt, neither padded nor cut.

    Without `state` (pi0, pi05_libero) they are <bos>, the prompt and a newline that is encoded by itself. With the
    normalised state (pi0.5 with `state_in_prompt`) they are <bos>, "Task: ..., State: ...;" and "Action: " on a line of
    its own; the state is written as numbers of 256 equal bins of [-1, 1] (-1 below it, 255 above).
    """
    if state is None:
        return [encoder.bos, *instruction_ids(encoder, prompt), *encoder.encode("\n")]
    text = cleaned(prompt)
    edges = np.linspace(-1, 1, STATE_BINS + 1)[:-1]
    bins = " ".join(str(index) for index in np.digitize(state, edges) - 1)
    return [encoder.bos, *encoder.encode(f"Task: {text}, State: {bins};\nAction: ")]


def cleaned(prompt: str) -> str:
    """A prompt as openpi tokenizes it."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def instruction_ids(encoder: Encoder, prompt: str) -> list[int]:
    """Ids of a prompt's own words."""
    return encoder.encode(cleaned(prompt))


def check_prompt(tokenizer: Any, config: Pi0Config, prompt: str, source: Path | str = "tokenizer") -> None:
    """Raises ValueError when the policy has no embedding for a token of the prompt, or words have no token at all."""
    state = np.zeros(config.robot_state_dim, np.float32) if config.state_in_prompt else None
    if (largest := max(prompt_ids(make_encoder(tokenizer, source), prompt, state))) >= config.vocab_size:
        raise ValueError(
            f"the prompt {shown(prompt)} has a token with the id {largest}, the policy embeds {config.vocab_size}"
        )
    if isinstance(tokenizer, Tokenizer):  # which may leave out what it does not know; sentencepiece never does
        letters = sorted(set("".join(prompt.split())))
        if missing := [letter for letter in letters if not tokenizer.encode(letter, add_special_tokens=False).ids]:
            raise ValueError(f"{source} has no token for {shown(missing[0])} in the prompt {shown(prompt)}")


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words of a prompt that the tokenizer has one token for, the same for all that it does not know."""
    if isinstance(tokenizer, Tokenizer):
        name = getattr(tokenizer.model, "unk_token", None)
        unknown = None if name is None else tokenizer.token_to_id(name)
    else:
        unknown = tokenizer.unk_id()
    encode = make_encoder(tokenizer).encode
    return [word for word in dict.fromkeys(prompt.split()) if unknown is not None and unknown in encode(word)]


def longest_prompt(ids: Ids, prompt: str, slots: int, state_width: int | None) -> int:
    """Upper limit on a prompt's ids, reached when all `state_width` numbers of the state (if any) are the longest.

    `ids` is `prompt_ids` of a tokenizer. Logs a warning if the prompt does not fit into the policy's `slots`.
    """
    states: list[NDArray[np.float32] | None] = [None]
    if state_width is not None:
        centres = (np.arange(-1, STATE_BINS) + 0.5) * 2 / STATE_BINS - 1  # the bins' centres, and one below them
        states = [np.full(state_width, centre, np.float32) for centre in centres]
    length = max(len(ids(prompt, state)) for state in states)
    if length > slots:
        logger.warning("the prompt %r has up to %d tokens, the policy takes %d: it is cut", prompt, length, slots)
    return length


def language_bucket(length: int, most: int) -> int:
    """Language slots of the sampler for prompts of `length` tokens, of `most` that the policy has."""
    return min(most, length + -length % LANGUAGE_MULTIPLE)


def language_slots(config: Pi0Config, ids: Ids, prompts: Sequence[str]) -> list[int]:
    """Language slots that each prompt needs, rounded up so that there are few different lengths.

    A run's prompts are known when it starts, so a batch needs no more slots than its longest prompt has tokens. `ids`
    is `prompt_ids` of a tokenizer.
    """
    most = config.max_token_len
    state_width = config.robot_state_dim if config.state_in_prompt else None
    return [language_bucket(longest_prompt(ids, prompt, most, state_width), most) for prompt in prompts]


def pad_ids(encoder: Encoder, rows: Sequence[list[int]], length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids [B, length] and validity [B, length]; rows are padded or cut to the language slots."""
    tokens = np.full((len(rows), length), encoder.pad, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.bool_)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row[:length]
        mask[index, : len(row)] = True
    return tokens, mask
