"""The worlds of the frontier: small enough that every completion is enumerated, so that nothing is estimated.

A table of logits, which can be any policy, and a GPT-2 that writes its completions token by token, whose
policies are what its weights can express. A policy is anything whose call returns the (X, Y) table of log pi,
so that one loop trains both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...bandit import TabularPolicy, random_bandit
from ...model import GPT
from ...policy import Completions, EnumeratedPolicy
from ..bandit import convergence
from ..bandit.fit import float64_table

TABLE_PROMPTS, TABLE_COMPLETIONS, TABLE_REFERENCE_SCALE = 4, 32, 1.5
GPT_REWARD_SCALE = 0.5


class World(NamedTuple):
    """Prompts, completions, a reference policy and a reward, all known; tables (X, Y) in float64."""

    name: str  # "table" or "gpt"
    ref_logps: Tensor
    rewards: Tensor
    lengths: Tensor  # tokens of each completion
    reward_scale: float  # deviation of the normal law that rewards were drawn from
    policy: Callable[[], nn.Module]  # makes a new policy that starts at the reference
    reference: GPT | None = None  # this and the rest are the GPT's; None for a table
    prompts: Tensor | None = None
    completions: Completions | None = None


def table_world(seed: int) -> World:
    """Rewards N(0, 1) and a reference whose rarest completions are drawn once in some thousand times."""
    world = random_bandit(
        TABLE_PROMPTS, TABLE_COMPLETIONS, reference_scale=TABLE_REFERENCE_SCALE,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    lengths = torch.ones_like(world.rewards)
    return World(
        "table", world.ref_logps, world.rewards, lengths, 1.0, lambda: TabularPolicy(world.ref_logps)
    )


def gpt_world(seed: int, *, quick: bool, width: int | None = None) -> World:
    """The world of the bandit command's GPT: rewards N(0, 1/4), independent for every completion, with no
    structure that a network could guess.

    Args: quick: 85 instead of 341 completions; width: n_embd, for a policy that cannot express everything.
    """
    settings = convergence.Settings(GPT_REWARD_SCALE, 1, 1, 1, seed, "cpu", quick)
    shape = convergence.GPT_SHAPE if width is None else replace(convergence.GPT_SHAPE, n_embd=width)
    reference, prompts, completions, rewards, _ = convergence.gpt_world(settings, shape)

    def policy() -> EnumeratedPolicy:
        return EnumeratedPolicy(copy.deepcopy(reference), prompts, completions)

    lengths = completions.lengths.double().expand(rewards.shape)
    return World(
        "gpt", float64_table(policy()), rewards, lengths, GPT_REWARD_SCALE, policy, reference, prompts,
        completions,
    )  # fmt: skip
