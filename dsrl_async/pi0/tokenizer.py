"""Tokenizer files and prompts: text becomes token ids as in openpi's PaliGemma tokenizer. This needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dsrl_async.pi0.config import Pi0Config

logger = logging.getLogger(__name__)

TOKENIZER_NAMES = ("tokenizer.json", "paligemma_tokenizer.model", "tokenizer.model")
"""Names of a tokenizer's file in a checkpoint's directory; the first that exists is used."""
WHERE_TO_GET_ONE = (
    "copy one there or give policy.tokenizer: PaliGemma's is on the Hugging Face hub in RLinf/openpi_tokenizer and "
    "in google/paligemma-3b-pt-224, and at gs://big_vision/paligemma_tokenizer.model"
)
STATE_BINS = 256
Ids = Callable[[str, NDArray[np.float32] | None], list[int]]
"""(prompt, state or None) -> its ids, neither padded nor cut."""
LANGUAGE_MULTIPLE = 8
"""Language slots come in multiples of this, so that a run needs few samplers."""


class Encoder(NamedTuple):
    """A tokenizer: text to ids without special tokens, its special ids, and how many embeddings its ids need.

    Tokens that were added behind the vocabulary, such as PaliGemma's `<image>`, need none: no prompt contains them.
    """

    encode: Callable[[str], list[int]]
    bos: int
    pad: int
    size: int


def find_tokenizer(directory: Path, given: Path | None) -> Path:
    """The tokenizer's file: `given`, or one in `given` if that is a directory, or one in the checkpoint's directory.

    Raises ValueError when `given` does not exist or there is no tokenizer; the message says where to get one.
    """
    if given is not None and given.is_file():
        return given
    if given is not None and not given.is_dir():
        raise ValueError(f"there is no file or directory {given}")
    place = given or directory
    for name in TOKENIZER_NAMES:
        if (place / name).is_file():
            return place / name
    raise ValueError(f"{place} has no tokenizer ({' or '.join(TOKENIZER_NAMES)}); {WHERE_TO_GET_ONE}")


def load_tokenizer(path: Path) -> Any:
    """Reads a `tokenizer.json` of the tokenizers library, or a sentencepiece model if the name ends in `.model`.

    Raises ValueError naming the file when it is neither, and saying what to install when sentencepiece is missing.
    """
    if path.suffix != ".model":
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{path} is a sentencepiece model, and that library is not installed: "
            "run `pip install sentencepiece`, or give a tokenizer.json"
        ) from None
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {' '.join(str(error).split())}") from None


def make_encoder(tokenizer: Any, source: Path | str = "tokenizer") -> Encoder:
    """Makes the same calls for both libraries. Raises ValueError, naming `source`, when there is no token <bos>."""
    if isinstance(tokenizer, Tokenizer):
        bos, pad = tokenizer.token_to_id("<bos>"), tokenizer.token_to_id("<pad>")
        size = tokenizer.get_vocab_size(with_added_tokens=False)
    else:
        bos, pad, size = tokenizer.bos_id(), tokenizer.pad_id(), tokenizer.get_piece_size()
    if bos is None or bos < 0:
        raise ValueError(f"{source} has no token '<bos>'")

    def encode(text: str) -> list[int]:
        if isinstance(tokenizer, Tokenizer):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        return list(tokenizer.encode(text))

    pad = 0 if pad is None or pad < 0 else pad
    return Encoder(encode, bos, pad, max(size, bos + 1, pad + 1))


def prompt_ids(encoder: Encoder, prompt: str, state: NDArray[np.float32] | None = None) -> list[int]:
    """Ids of a prompt, neither padded nor cut.

    Without `state` (pi0, pi05_libero) they are <bos>, the prompt and a newline that is encoded by itself. With the
    normalised state (pi0.5 with `state_in_prompt`) they are <bos>, "Task: ..., State: ...;" and "Action: " on a line of
    its own; the state is written as numbers of 256 equal bins of [-1, 1] (-1 below it, 255 above).
    """
    text = prompt.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        return [encoder.bos, *encoder.encode(text), *encoder.encode("\n")]
    edges = np.linspace(-1, 1, STATE_BINS + 1)[:-1]
    bins = " ".join(str(index) for index in np.digitize(state, edges) - 1)
    return [encoder.bos, *encoder.encode(f"Task: {text}, State: {bins};\nAction: ")]


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
