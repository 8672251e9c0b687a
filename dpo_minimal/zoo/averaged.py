"""DPO on log-ratios that are averaged over tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..certificates import maximum_likelihood
from ..losses import BETA, DPO, Loss, PreferenceLoss, _logratios, _preference_loss
from ..preferences import Rankings
from .inputs import token_counts
from .ipo import with_lengths


def averaged_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """DPO on averages over tokens: -log sigmoid(u) with u = beta (g_w / |y_w| - g_l / |y_l|) [D12.12].

    g are log-ratios, rewards beta times their averages, and the pulls beta sigmoid(-u) over the length. With
    equal lengths L it is `dpo_loss` at beta / L; its optimum moves the longer completions further.

    Args, Returns, Raises: as `averaged_ipo_loss`.
    """
    _, *ratios = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    lengths = token_counts(policy_chosen_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = (beta * ratio / length for ratio, length in zip(ratios, lengths))
    pull = beta * torch.sigmoid(rejected - chosen)
    return _preference_loss(
        policy_chosen_logps.dtype, losses=-F.logsigmoid(chosen - rejected), chosen_rewards=chosen,
        rejected_rewards=rejected, chosen_weights=pull / lengths[0], rejected_weights=pull / lengths[1],
    )  # fmt: skip


def averaged_dpo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float, lengths: Tensor) -> Tensor:
    """Where averaged DPO ends: log pi = log pi_ref + |y| (r / beta + c), r the maximum-likelihood rewards and
    c one number for each prompt [D12.12].

    Args: as `dpo_optimum`; lengths (X, Y) tokens. Returns (X, Y). Raises as `dpo_optimum`.
    """
    return with_lengths(ref_logps, maximum_likelihood(rankings, ref_logps > -math.inf) / beta, lengths)


AVERAGED_DPO = Loss(
    "averaged_dpo", "averaged DPO", averaged_dpo_loss, "dpo for the mean over tokens", (BETA,),
    start=DPO.start, optimum=averaged_dpo_optimum, proof="D12.12", source="TRL's `sigmoid_norm`",
    charted=False,
)  # fmt: skip
