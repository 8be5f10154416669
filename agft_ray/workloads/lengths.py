"""How long prompts and outputs are: distributions of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

BLOCK = 1024
"""Random numbers are drawn so many at once; the streams are those of single draws."""

Draw = Callable[[np.ndarray], np.ndarray]
"""Turns uniform numbers of [0, 1) into tokens."""

# fmt: off
_QUANTILES = (
    0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99, 0.999, 1,
)
# Of the Azure 2023 conversation trace (github.com/Azure/AzurePublicDataset, CC-BY 4.0). Its longest
# prompt is 14,050 tokens; here it is what an 8,192-token context leaves.
_PROMPT_TOKENS = (
    2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 1876, 2734, 4083, 4142, 6179, 7192,
)
_OUTPUT_TOKENS = (
    7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 411, 424, 451, 601, 954, 1000,
)
# fmt: on


def conversation_prompt(uniform: np.ndarray) -> np.ndarray:
    """Piecewise linear through the quantiles of the Azure 2023 conversation trace's prompts."""
    return np.asarray(np.interp(uniform, _QUANTILES, _PROMPT_TOKENS))


def conversation_output(uniform: np.ndarray) -> np.ndarray:
    """As `conversation_prompt`, of the outputs."""
    return np.asarray(np.interp(uniform, _QUANTILES, _OUTPUT_TOKENS))


def lognormal(median: int, sigma: float) -> Draw:
    """Lognormal with this median and standard deviation of the logarithm; 0: always the median."""
    if not sigma:
        return lambda uniform: np.full(uniform.shape, float(median))
    quantile = NormalDist(math.log(median), sigma).inv_cdf

    def draw(uniform: np.ndarray) -> np.ndarray:
        return np.exp([quantile(p) for p in np.maximum(uniform, 1e-12).tolist()])

    return draw


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of prompt and output, drawn independently, that fits a context."""

    prompt: Draw
    output: Draw
    max_model_len: int

    def draw(self, random: np.random.Generator) -> Iterator[tuple[int, int]]:
        """Prompt and output tokens of request after request, without end.

        An output takes at most half of `max_model_len`, a prompt at most what the output leaves.
        """
        for _ in itertools.count():
            uniform = random.random((BLOCK, 2))
            half = self.max_model_len // 2
            outputs = np.clip(np.rint(self.output(uniform[:, 1])), 1, half)
            prompts = np.clip(np.rint(self.prompt(uniform[:, 0])), 1, self.max_model_len - outputs)
            yield from zip(prompts.astype(int).tolist(), outputs.astype(int).tolist(), strict=True)
