"""Losses for labels that may be flipped: DPO's with a linear term more (cDPO) or less (robust DPO)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import BETA, DPO, Loss, Option, dpo_optimum
from ..preferences import Rankings, tally
from ..validation import InputError, check_flip_probability
from .inputs import of_margin


@of_margin
def cdpo_loss(h: Tensor, *, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Conservative DPO: (1 - eps) l(u) + eps l(-u) = l(u) + eps u, with l = -log sigmoid [D12.2].

    What DPO would minimise had a share eps of the labels been flipped. Its optimum on a tree of comparisons
    has margins logit(p + eps - 2 eps p), finite for unanimous labels; it is not pi*, nor closer to it where
    eps of the labels really were flipped. The gradient weight is beta (sigmoid(-u) - eps), negative once
    the margin exceeds logit(1 - eps).

    Args: as `dpo_loss`; label_smoothing: eps in [0, 1/2), 0 for DPO.
    Returns, Raises: as `dpo_loss`; InputError also for label_smoothing out of range.
    Source: Mitchell (2023), "A note on DPO with noisy preferences".
    """
    check_flip_probability(label_smoothing, "label_smoothing")
    u = beta * h
    # Both terms are positive; l(u) + eps u would subtract two large numbers where u is far below 0.
    losses = -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)
    return losses, beta * (torch.sigmoid(-u) - label_smoothing)


def cdpo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Where cDPO ends: where DPO would on comparisons of which a share eps is reversed [D12.2].

    Args, Returns, Raises: as `dpo_optimum`; label_smoothing: eps, above 0 for an optimum of unanimous data.
    """
    return dpo_optimum(_mixed(rankings, 1 - label_smoothing, label_smoothing), ref_logps, beta=beta)


CDPO = Loss(
    "cdpo", "cDPO", cdpo_loss, "dpo for labels that may be wrong",
    (BETA, Option("label_smoothing", "[0, 1/2)", 0.1, "share of labels that may be wrong", "ε")),
    start=DPO.start, optimum=cdpo_optimum, proof="D12.2", source="Mitchell (2023)",
)  # fmt: skip


@of_margin
def robust_dpo_loss(h: Tensor, *, beta: float, flip_probability: float) -> tuple[Tensor, Tensor]:
    """Robust DPO: ((1 - eps) l(u) - eps l(-u)) / (1 - 2 eps) = l(u) - eps u / (1 - 2 eps) [D12.3].

    Averaged over labels that are flipped with probability eps it is DPO's loss of the clean ones, so that
    its population optimum is pi*. Losses may be negative; where fewer labels were flipped than eps says,
    finite data may have no optimum. The gradient weight is beta (sigmoid(-u) + eps / (1 - 2 eps)).

    Args: as `dpo_loss`; flip_probability: eps in [0, 1/2), 0 for DPO.
    Returns, Raises: as `dpo_loss`; InputError also for flip_probability out of range.
    Source: Chowdhury et al. (2024), "Provably Robust DPO".
    """
    check_flip_probability(flip_probability)
    u = beta * h
    linear = flip_probability / (1 - 2 * flip_probability)
    return -F.logsigmoid(u) - linear * u, beta * (torch.sigmoid(-u) + linear)


def robust_dpo_optimum(
    rankings: Rankings, ref_logps: Tensor, *, beta: float, flip_probability: float
) -> Tensor:
    """Where robust DPO ends: where DPO would with the flips undone, if anywhere [D12.3].

    Args, Returns: as `dpo_optimum`; flip_probability: eps.
    Raises: InputError where a pair was flipped less often than eps says, so that there may be no optimum.
    """
    clear = 1 - 2 * flip_probability
    undone = _mixed(rankings, (1 - flip_probability) / clear, -flip_probability / clear)
    return dpo_optimum(undone, ref_logps, beta=beta)


ROBUST = Loss(
    "robust", "robust DPO", robust_dpo_loss, "dpo for labels of which a known share is wrong",
    (BETA, Option("flip_probability", "[0, 1/2)", 0.1, "share of wrong labels, TRL's label_smoothing", "ε")),
    start=DPO.start, optimum=robust_dpo_optimum, proof="D12.3", source="Chowdhury et al. (2024)",
)  # fmt: skip


def _mixed(rankings: Rankings, right: float, wrong: float) -> Rankings:
    """`right` times the comparisons plus `wrong` times the same ones reversed [D12.2, D12.3].

    Raises InputError where a weight would be negative: then it is no likelihood that could be maximised,
    and often the loss falls without limit.
    """
    prompt, order, weight = rankings
    weight = torch.cat([right * weight, wrong * weight])
    try:
        mixed = tally(prompt.repeat(2), torch.cat([order, order.flip(-1)]), weight)
    except InputError:  # a negative weight
        text = "robust DPO may have no optimum: a pair was flipped less often than its ε says."
        raise InputError(text) from None
    kept = mixed.weight > 0
    return Rankings(*(field[kept] for field in mixed))
