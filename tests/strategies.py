"""What the property tests draw from: the input ranges of the property list.

K in [2, 8] completions, beta in [0.05, 5], logits and rewards N(0, 3^2), float64, one to three prompts.
A drawn seed fills the tables, so that an example is a few integers and a failure is easy to repeat.
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor


class World(NamedTuple):
    """Tables (X, Y) in float64: reference, rewards, an unrelated policy; beta; a generator for more draws."""

    ref_logps: Tensor
    rewards: Tensor
    logps: Tensor
    beta: float
    generator: torch.Generator


def normal(*shape: int, generator: torch.Generator, scale: float = 3.0) -> Tensor:
    """float64 draws of N(0, scale^2)."""
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


betas = st.floats(0.05, 5.0)
generators = st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


PROMPTS, COMPLETIONS = st.integers(1, 3), st.integers(2, 8)


@st.composite
def worlds(draw, prompts=PROMPTS, completions=COMPLETIONS, scale=3.0, beta=betas) -> World:
    """A random bandit with a random policy beside it."""
    generator = draw(generators)
    shape = (draw(prompts), draw(completions))
    tables = [normal(*shape, generator=generator, scale=scale) for _ in range(3)]
    return World(tables[0].log_softmax(-1), tables[1], tables[2].log_softmax(-1), draw(beta), generator)
