"""Odds Ratio Preference Optimization: fine-tuning on the chosen, and a contrast of odds beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..closed_form import log1mexp
from ..losses import Loss, Option, PreferenceLoss, _preference_loss
from ..validation import InputError, check_not_negative
from .inputs import policy_logps, token_counts


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    lam: float,
) -> PreferenceLoss:
    """Odds Ratio Preference Optimization: -a_w - lam log sigmoid(o_w - o_l) [D12.5].

    a = log pi(y) / |y| is the log-probability of an average token, and o = a - log(1 - e^a) its log-odds.
    Rewards are the log-odds. With d = sigmoid(o_l - o_w) and p = e^a, the pulls are
    (1 + lam d / (1 - p_w)) / |y_w| and lam d / ((1 - p_l) |y_l|), but for a completion that is certain up to
    rounding 1 stands in for 1 / (1 - p), which is infinite. There is no reference, and nothing plays the part
    of beta.

    Args: as `simpo_loss`; lam >= 0, the weight of the odds, 0 for fine-tuning on chosen completions alone.
    Returns: as `dpo_loss`.
    Raises: InputError: as `simpo_loss`; a log-probability above 0; lam < 0.
    Source: Hong et al. (2024), "ORPO: Monolithic Preference Optimization without Reference Model".
    """
    check_not_negative("lam", lam)
    chosen, rejected = policy_logps(policy_chosen_logps, policy_rejected_logps)
    chosen_lengths, rejected_lengths = token_counts(policy_chosen_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    for name, average in (("policy_chosen_logps", chosen), ("policy_rejected_logps", rejected)):
        if (average > 1e-3).any():  # far above the rounding of a sure completion
            raise InputError(f"{name} must be log-probabilities, which are never above 0.")
    (chosen_odds, chosen_rest), (rejected_odds, rejected_rest) = map(_log_odds, (chosen, rejected))
    log_odds_ratio = chosen_odds - rejected_odds
    log_d = F.logsigmoid(-log_odds_ratio)
    chosen_pull, rejected_pull = torch.exp(log_d - chosen_rest), torch.exp(log_d - rejected_rest)
    return _preference_loss(
        policy_chosen_logps.dtype, losses=-chosen - lam * F.logsigmoid(log_odds_ratio),
        chosen_rewards=chosen_odds, rejected_rewards=rejected_odds,
        chosen_weights=(1 + lam * chosen_pull) / chosen_lengths,
        rejected_weights=lam * rejected_pull / rejected_lengths,
    )  # fmt: skip


def _log_odds(average: Tensor) -> tuple[Tensor, Tensor]:
    """The log-odds of an average token, a - log(1 - e^a), and the log(1 - e^a) of its pull."""
    almost_sure = -torch.finfo(average.dtype).eps  # the odds of certainty are infinite
    rest = log1mexp(average.clamp(max=almost_sure))
    return average - rest, torch.where(average > almost_sure, 0, rest)  # the clamp lets no gradient through


ORPO = Loss(
    "orpo", "ORPO", orpo_loss, "fine-tuning on the chosen and a contrast of odds, without a reference",
    (Option("lam", ">= 0", 0.1, "weight of the odds", "λ"),), proof="D12.5", source="Hong et al. (2024)",
)  # fmt: skip
