"""Losses whose pulls never fade: Unlikelihood, and DPO without its weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses import BETA, Loss, Option, PreferenceLoss, _preference_loss
from ..preferences import Rankings, win_counts
from ..validation import InputError, check_not_negative, check_share
from .inputs import of_margin, policy_logps


def unlikelihood_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, alpha: float
) -> PreferenceLoss:
    """Unlikelihood: -log pi(y_w) + alpha log pi(y_l), a baseline of the paper (App. C.3) [D12.7].

    Rewards are the log-probabilities themselves. The pulls are always 1 and alpha: nothing fades as the
    policy learns. With w(y) and l(y) the probabilities to be chosen and rejected, the optimum is
    (w - alpha l) / (1 - alpha) while that is nowhere negative. Beyond, and at alpha = 1 unless w = l, the
    loss falls without limit.

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log pi(y|x), nats.
        alpha: in [0, 1]; 0 is Preferred-FT.
    Returns: as `dpo_loss`.
    Raises: InputError: shapes differ, an entry is not finite, alpha outside [0, 1].
    Source: Rafailov et al. (2023). (Welleck et al., 2020, have log(1 - pi) of the rejected one instead.)
    """
    check_share("alpha", alpha)
    chosen, rejected = policy_logps(policy_chosen_logps, policy_rejected_logps)
    return _preference_loss(
        policy_chosen_logps.dtype, losses=-chosen + alpha * rejected, chosen_rewards=chosen,
        rejected_rewards=rejected, chosen_weights=torch.ones_like(chosen),
        rejected_weights=torch.full_like(rejected, alpha),
    )  # fmt: skip


def unlikelihood_logps(rankings: Rankings, exists: Tensor, *, alpha: float) -> Tensor:
    """The optimum of Unlikelihood, (w - alpha l) / (1 - alpha), where it exists [D12.7].

    w(y) and l(y) are the shares of comparisons in which y was chosen and rejected.

    Args: rankings with K = 2; exists (X, Y); alpha in [0, 1).
    Returns: (X, Y) log-probabilities.
    Raises: InputError: some w(y) < alpha l(y), so that the loss falls without limit; alpha out of range; a
        prompt without comparisons; K > 2.
    """
    if (K := rankings.order.shape[-1]) != 2:
        raise InputError(f"rankings must be pairs of a chosen and a rejected completion, got K = {K}.")
    check_not_negative("alpha", alpha)
    if alpha >= 1:
        raise InputError(f"alpha must lie in [0, 1), got {alpha}; at 1 there is no optimum.")
    wins = win_counts(rankings, *exists.shape)
    total = wins.sum((-2, -1))
    if not (total > 0).all():
        raise InputError(f"prompt {int((total == 0).nonzero()[0])} has no comparisons; leave it out.")
    chosen, rejected = wins.sum(-1) / total[:, None], wins.sum(-2) / total[:, None]
    share = (chosen - alpha * rejected) / (1 - alpha)
    if (share < 0).any():
        x, y = (share < 0).nonzero()[0].tolist()
        raise InputError(
            f"Unlikelihood has no optimum at alpha = {alpha:g}: completion {y} of prompt {x} was rejected "
            f"more than {1 / alpha:.3g} times as often as chosen; lower alpha."
        )
    return share.log()


UNLIKELIHOOD = Loss(
    "unlikelihood", "Unlikelihood", unlikelihood_loss, "a baseline of the paper, without a reference",
    (Option("alpha", "[0, 1]", 0.5, "weight of the rejected completion", "α"),),
    optimum=lambda rankings, ref_logps, alpha: unlikelihood_logps(
        rankings, ref_logps > -math.inf, alpha=alpha
    ),
    proof="D12.7", source="Rafailov et al. (2023), App. C.3",
)  # fmt: skip


@of_margin
def unweighted_dpo_loss(h: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """DPO's gradient without its weight sigmoid(-u): the loss is -u, falling for ever [D12.7].

    What the paper warns of in Sec. 4 and shows in Table 3. Every pair pulls with the constant weight beta,
    however sure the policy is; there is no optimum unless every completion wins half of the time, and the
    policy is that of Unlikelihood with alpha = 1.

    Args, Returns, Raises: as `dpo_loss`.
    """
    return -beta * h, torch.full_like(h, beta)


UNWEIGHTED_DPO = Loss(
    "unweighted_dpo", "DPO without weight", unweighted_dpo_loss, "dpo whose pull never fades, as a warning",
    (BETA._replace(symbol=""),),  # it only scales the loss, and an optimizer like Adam does not see that
    start=lambda K, beta: 0.0, optimum="none", proof="D12.7", source="Rafailov et al. (2023), Table 3",
)  # fmt: skip
