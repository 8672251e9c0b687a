"""Losses for which the other rows of the batch matter: BCO and AOT.

The rows of a batch are those of the last dimension, and count alike.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import BETA, DPO, Loss, PreferenceLoss, dpo_loss
from ..validation import widen
from .inputs import of_logratios


@of_logratios
def bco_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Binary Classifier Optimization, of pairs: -log s(r_w - delta) - log s(delta - r_l), s the sigmoid and
    r = beta log pi/pi_ref [D12.18].

    delta is the mean of all rewards of the batch, and no gradient flows through it. (The paper has a running
    mean over steps; TRL's `bco_pair` has 0.) The pulls are beta s(delta - r_w) and beta s(r_l - delta).

    Args, Returns, Raises: as `dpo_loss`.
    Source: Jung et al. (2024), "Binary Classifier Optimization for Large Language Model Alignment".
    """
    delta = beta * ((chosen + rejected) / 2).mean(-1, keepdim=True).detach()
    r_w, r_l = beta * chosen - delta, beta * rejected - delta
    return -F.logsigmoid(r_w) - F.logsigmoid(-r_l), beta * torch.sigmoid(-r_w), beta * torch.sigmoid(r_l)


def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """Alignment via Optimal Transport, of pairs: -log s(beta (d - e)), where the k-th smallest policy's
    d = log pi(y_w) - log pi(y_l) of the batch meets the k-th smallest e of the reference [D12.19].

    DPO, but for whose reference a row is compared with; of all such pairings this has the least loss. A
    batch of one is DPO. Each row keeps its place: its pull is beta s(-beta (d - e)); its rewards are DPO's.

    Args, Returns, Raises: as `dpo_loss`.
    Source: Melnyk et al. (2024), "Distributional Preference Alignment of LLMs via Optimal Transport".
    """
    policy = policy_chosen_logps, policy_rejected_logps
    reference = reference_chosen_logps, reference_rejected_logps
    own = dpo_loss(*policy, *reference, beta=beta)
    d, e = (widen(chosen) - widen(rejected) for chosen, rejected in (policy, reference))
    ranks = d.argsort(-1).argsort(-1)
    partner = e.argsort(-1).gather(-1, ranks)
    met = dpo_loss(*policy, *(side.gather(-1, partner) for side in reference), beta=beta)
    return met._replace(chosen_rewards=own.chosen_rewards, rejected_rewards=own.rejected_rewards)


BCO = Loss(
    "bco", "BCO", bco_loss, "a classifier around the batch's mean reward", (BETA,), reads_batch=True,
    start=lambda K, beta: 2 * math.log(2), proof="D12.18", source="Jung et al. (2024)", charted=False,
)  # fmt: skip
AOT = Loss(
    "aot", "AOT", aot_loss, "dpo of margins in sorted order", (BETA,), start=DPO.start, proof="D12.19",
    source="Melnyk et al. (2024)", reads_batch=True, charted=False,
)  # fmt: skip
for _loss in (BCO, AOT):  # a bare function is known to read its batch as well
    _loss.function.reads_batch = True
