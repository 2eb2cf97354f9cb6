"""Makes Triton's interpreter compute with bfloat16 as a GPU does. To be imported where TRITON_INTERPRET is 1.

The interpreter (of Triton 3.9) keeps bfloat16 as 16-bit integers: conversions from float32 drop bits where a GPU
rounds, and a matrix product multiplies the integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"

_convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _convert_rounding(values: NDArray[Any], given: Any, wanted: Any, rounding: Any) -> NDArray[Any]:
    if (given, wanted) == (tl.float32, tl.bfloat16):
        # not from_numpy, whose result would share memory that may be read-only
        rounded = torch.tensor(np.ascontiguousarray(values).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.uint16).numpy()
    if (given, wanted) == (tl.float32, tl.float8e4nv):  # rounded up to a power of two, it would be half of it
        small = torch.tensor(np.ascontiguousarray(values).view(np.float32)).to(torch.float8_e4m3fn)
        return small.view(torch.uint8).numpy()
    converted: NDArray[Any] = _convert(values, given, wanted, rounding)
    return converted


def _dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32).reshape(handle.data.shape)
        return interpreter.TensorHandle(values, tl.float32)

    return _dot(self, widened(a), widened(b), *rest)


interpreter._convert_float = _convert_rounding
interpreter.InterpreterBuilder.create_dot = _dot_of_numbers
