"""openpi's model as the measured process of `python -m dsrl_async.bench denoise`. Runs in .reference/openpi."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import openpi_model

from dsrl_async.bench import synthetic
from dsrl_async.bench.systems.serving import Prepare, Sample, StageMeter, serve


def load(config: synthetic.Sizes, dtype: str, seed: int) -> Prepare:
    model = openpi_model.build(config, dtype, seed)
    stack = model.paligemma_with_expert
    embed_image, denoise_step = stack.embed_image, model.denoise_step

    def prepare(inputs: dict[str, np.ndarray], denoise_steps: int) -> Sample:
        def sample(meter: StageMeter) -> Tensor:
            def vision(image: Tensor) -> Tensor:
                meter.enter("vision")
                features = embed_image(image)
                meter.enter("prefill")
                return features

            def denoise(*arguments: Any) -> Tensor:
                meter.enter("denoise")
                return denoise_step(*arguments)

            stack.embed_image, model.denoise_step = vision, denoise
            return openpi_model.sample(model, inputs, denoise_steps)

        return sample

    return prepare


if __name__ == "__main__":
    serve(load)
