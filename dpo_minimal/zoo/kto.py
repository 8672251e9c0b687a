"""Kahneman-Tversky Optimization: no pairs, but single completions, each good or bad."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..closed_form import kl_divergence
from ..losses import BETA, Loss, Option, PreferenceLoss
from ..preferences import Rankings
from ..validation import InputError, check_finite, check_positive, widen


class LabelLoss(NamedTuple):
    """What a loss of single completions returns, each of shape (B,), all but the losses detached [D12.4]."""

    losses: Tensor  # to be averaged and minimised
    rewards: Tensor  # implicit rewards beta log(pi / pi_ref)
    gradient_weights: Tensor  # coefficient of -grad log pi(y): > 0 if desirable, < 0 if not


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    is_desirable: Tensor,
    kl_estimate: Tensor | float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LabelLoss:
    """Kahneman-Tversky Optimization: lambda (1 - sigmoid(+-beta (log pi/pi_ref - z0))) [D12.4].

    Plus and lambda_D for a desirable completion, minus and lambda_U for an undesirable one. The pull is a
    bell of height lambda beta / 4 around z0: easy and hopeless examples are ignored alike. The optimum is
    never pi*; it is a threshold on the share of desirable labels.

    Args:
        policy_logps, reference_logps: (B,) log-probabilities of single completions, nats.
        is_desirable: (B,) True for good, False for bad.
        kl_estimate: z0 >= 0, nats: one number, from `kto_kl_estimate`, or (B,) one a row, each the exact
            divergence of its prompt's table; no gradient flows through it.
        beta, desirable_weight, undesirable_weight: > 0.
    Returns: LabelLoss of (B,) tensors; losses lie in [0, lambda].
    Raises: InputError: shapes differ, an entry is not finite, kl_estimate negative, an option <= 0.
    Source: Ethayarajh et al. (2024), "KTO: Model Alignment as Prospect Theoretic Optimization".
    """
    check_positive("beta", beta)
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    check_finite(policy_logps=policy_logps, reference_logps=reference_logps)
    boolean = isinstance(is_desirable, Tensor) and is_desirable.dtype == torch.bool
    if not boolean or is_desirable.shape != policy_logps.shape:
        raise InputError(f"is_desirable must be a boolean tensor of shape {tuple(policy_logps.shape)}.")
    logratio = widen(policy_logps) - widen(reference_logps)
    if isinstance(kl_estimate, bool) or not isinstance(kl_estimate, (Tensor, Real)):
        raise InputError(f"kl_estimate must be a number or a tensor, got {kl_estimate!r}.")
    kl_estimate = torch.as_tensor(kl_estimate, dtype=logratio.dtype, device=logratio.device).detach()
    if not (kl_estimate >= 0).all() or not torch.isfinite(kl_estimate).all():
        raise InputError("kl_estimate must be finite and not negative, as divergences are.")
    if kl_estimate.dim() and kl_estimate.shape != logratio.shape:
        raise InputError(f"kl_estimate must be one number, or one a row, got {tuple(kl_estimate.shape)}.")
    sign = torch.where(is_desirable, 1.0, -1.0).to(logratio.dtype)
    weight = torch.where(  # not two plain numbers, which `where` would round to float32
        is_desirable, logratio.new_tensor(desirable_weight), logratio.new_tensor(undesirable_weight)
    )
    gain = sign * beta * (logratio - kl_estimate)
    slope = torch.sigmoid(gain) * torch.sigmoid(-gain)  # of the sigmoid: at most 1/4
    dtype = policy_logps.dtype
    return LabelLoss(
        (weight * torch.sigmoid(-gain)).to(dtype),
        (beta * logratio).detach().to(dtype),
        (weight * sign * beta * slope).detach().to(dtype),
    )


def kto_kl_estimate(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """KTO's z0: the mean log-ratio of completions that belong to *other* prompts, at least 0, detached
    [D12.4].

    The completion of another prompt stands in for a sample of the policy. It is a rough stand-in, and biased
    even where prompts do not matter, but it must not be the matched completion itself, whose log-ratio is
    what is being trained: rows are re-paired before they are scored.

    Args: policy_logps, reference_logps (B,), nats, of mismatched rows.
    Returns: a scalar, nats.
    Raises: InputError: shapes differ, an entry is not finite, no rows.
    """
    check_finite(policy_logps=policy_logps, reference_logps=reference_logps)
    return (widen(policy_logps) - widen(reference_logps)).detach().mean().clamp(min=0)


def kto_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    kl_estimate: Tensor | float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> PreferenceLoss:
    """`kto_loss` of pairs: the chosen completion is desirable, the rejected one is not, and a pair's loss is
    the mean of the two [D12.4].

    Args: as `dpo_loss` and `kto_loss`; kl_estimate one number, or (B,). Returns PreferenceLoss, (B,) each.
    Raises: InputError: as `kto_loss`.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps], -1)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps], -1)
    if isinstance(kl_estimate, Tensor) and kl_estimate.dim():
        kl_estimate = kl_estimate.unsqueeze(-1).expand(policy.shape)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    out = _of_pairs(policy, reference, kl_estimate, beta=beta, **weights)
    chosen, rejected = (out.gradient_weights / 2).unbind(-1)
    return PreferenceLoss(out.losses.mean(-1), *out.rewards.unbind(-1), chosen, -rejected)


def kto_on_table(logps: Tensor, ref_logps: Tensor, rankings: Rankings, **options: float) -> LabelLoss:
    """`kto_loss` of every comparison, the chosen completion desirable and the rejected one not, (E, 2) each
    [D12.4].

    Options: as `kto_loss`. A table knows the divergence that z0 stands for: it is exact, each prompt's own.
    """
    policy, reference = rankings.gather(logps), rankings.gather(ref_logps)
    z0 = kl_divergence(logps.detach(), ref_logps)[rankings.prompt].unsqueeze(-1).expand(policy.shape)
    return _of_pairs(policy, reference, z0, **options)


def _of_pairs(policy: Tensor, reference: Tensor, kl_estimate: Tensor | float, **options: float) -> LabelLoss:
    """`kto_loss` of (B, 2) log-probabilities, chosen first."""
    desirable = torch.tensor([True, False], device=policy.device).expand(policy.shape)
    return kto_loss(policy, reference, desirable, kl_estimate, **options)


KTO = Loss(
    "kto", "KTO", kto_pair_loss, "for completions labelled good or bad, or for pairs",
    (
        BETA,
        Option("desirable_weight", "> 0", 1.0, "weight of good completions (labels: as needed)"),
        Option("undesirable_weight", "> 0", 1.0, "weight of bad completions (labels: as needed)"),
    ),
    start=lambda K, beta, desirable_weight, undesirable_weight: (desirable_weight + undesirable_weight) / 4,
    proof="D12.4", source="Ethayarajh et al. (2024)", labelled=kto_loss,
)  # fmt: skip
