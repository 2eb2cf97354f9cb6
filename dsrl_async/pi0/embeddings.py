"""The policy's embeddings of prompts, read from its files without loading it. This needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsrl_async.pi0.files import PolicyFiles
from dsrl_async.pi0.names import EMBEDDING, StoredTensor
from dsrl_async.pi0.tensors import ELEMENT_BYTES
from dsrl_async.pi0.tokenizer import instruction_ids, make_encoder
from dsrl_async.untrusted import open_regular


def embed_prompts(files: PolicyFiles, prompts: Sequence[str]) -> NDArray[np.float32]:
    """float32 [prompts, vlm_width]: the mean of the embeddings of each prompt's tokens, without those that all prompts
    have (its beginning and end, and the robot's state).

    Only these rows of the table are read. Raises OSError if a file cannot be read any more.
    """
    encoder = make_encoder(files.tokenizer)
    ids = [instruction_ids(encoder, prompt) for prompt in prompts]
    tokens = sorted({token for row in ids for token in row})
    of_token = dict(zip(tokens, read_rows(files.tensors[EMBEDDING], tokens), strict=True))
    none = np.zeros(files.config.vlm_width)
    means = [np.mean([of_token[token] for token in row], axis=0) if row else none for row in ids]
    return np.array(means, np.float32)


def read_rows(tensor: StoredTensor, rows: Sequence[int]) -> NDArray[np.float64]:
    """Rows of a stored matrix, float64 [rows, columns]."""
    halves = tensor.dtype == "BF16"  # the upper halves of float32
    shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
    with open_regular(tensor.file) as file:
        stored = np.memmap(
            file, "<u2" if halves else f"<f{ELEMENT_BYTES[tensor.dtype]}", "r", tensor.offset, shape, "C"
        )
        found = np.array((stored.T if tensor.transposed else stored)[list(rows)])
    if halves:
        found = (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float64)
