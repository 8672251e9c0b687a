"""Simple Preference Optimization: the average token's log-probability, and no reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import Loss, Option, PreferenceLoss, _preference_loss
from ..validation import check_not_negative, check_positive
from .inputs import policy_logps, token_counts


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
) -> PreferenceLoss:
    """Simple Preference Optimization: -log sigmoid(u - gamma), u the difference of beta log pi(y) / |y|
    [D12.6].

    Rewards are beta log pi(y) / |y|. With d = sigmoid(gamma - u), the pulls are beta d / |y_w| and
    beta d / |y_l|. For gamma = 0 the optimum is exp(|y| (r + c) / beta), c being such that it sums to 1: it
    has forgotten the reference. For gamma > 0 no formula is known but on a tree of comparisons.

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log pi(y|x), nats, summed over tokens.
        chosen_lengths, rejected_lengths: (B,) counts of scored tokens, end-of-text included.
        beta: > 0.
        gamma: the margin that is wanted, >= 0. (The paper writes gamma; TRL's option is gamma / beta.)
    Returns: as `dpo_loss`.
    Raises: InputError: shapes differ, an entry is not finite, a length below 1, beta <= 0, gamma < 0.
    Source: Meng et al. (2024), "SimPO: Simple Preference Optimization with a Reference-Free Reward".
    """
    check_positive("beta", beta)
    check_not_negative("gamma", gamma)
    chosen, rejected = policy_logps(policy_chosen_logps, policy_rejected_logps)
    chosen_lengths, rejected_lengths = token_counts(policy_chosen_logps, chosen_lengths, rejected_lengths)
    chosen_reward, rejected_reward = beta * chosen / chosen_lengths, beta * rejected / rejected_lengths
    wanting = chosen_reward - rejected_reward - gamma
    pull = beta * torch.sigmoid(-wanting)
    return _preference_loss(
        policy_chosen_logps.dtype, losses=-F.logsigmoid(wanting), chosen_rewards=chosen_reward,
        rejected_rewards=rejected_reward, chosen_weights=pull / chosen_lengths,
        rejected_weights=pull / rejected_lengths,
    )  # fmt: skip


# The defaults are those of its own paper for Llama-3-Base.
SIMPO = Loss(
    "simpo", "SimPO", simpo_loss, "averages over tokens and a wanted margin, without a reference",
    (
        Option("beta", "> 0", 2.0, "factor of the rewards, as there is no reference", "β"),
        Option("gamma", ">= 0", 1.0, "the margin that is wanted", "γ"),
    ),
    proof="D12.6", source="Meng et al. (2024)",
)  # fmt: skip
