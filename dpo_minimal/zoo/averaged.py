"""DPO on log-ratios that are averaged over tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..certificates import maximum_likelihood
from ..losses import BETA, DPO, Loss
from ..preferences import Rankings
from .inputs import of_averages
from .ipo import with_lengths


@of_averages
def averaged_dpo_loss(h: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """DPO on log-ratios averaged over tokens: -log sigmoid(u), u = beta (g_w / |y_w| - g_l / |y_l|) [D12.12].

    Rewards are beta times the averages, and the pulls beta sigmoid(-u) over the length. With equal lengths L
    it is `dpo_loss` at beta / L; its optimum moves the longer completions further.

    Args, Returns, Raises: as `averaged_ipo_loss`.
    """
    u = beta * h
    return -F.logsigmoid(u), beta * torch.sigmoid(-u)


def averaged_dpo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float, lengths: Tensor) -> Tensor:
    """Where averaged DPO ends: log pi = log pi_ref + |y| (r / beta + c), r the maximum-likelihood rewards and
    c one number for each prompt [D12.12].

    Args: as `dpo_optimum`; lengths (X, Y) tokens. Returns (X, Y). Raises as `dpo_optimum`.
    """
    return with_lengths(ref_logps, maximum_likelihood(rankings, ref_logps > -math.inf) / beta, lengths)


AVERAGED_DPO = Loss(
    "averaged_dpo", "averaged DPO", averaged_dpo_loss, "dpo of averages over tokens", (BETA,),
    start=DPO.start, optimum=averaged_dpo_optimum, proof="D12.12", source="TRL's `sigmoid_norm`",
    charted=False,
)  # fmt: skip
