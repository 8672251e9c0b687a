"""What we minimise: one pure function per loss, log-probabilities in, one loss per example out.

The caller averages. Nothing here knows a model, a tokeniser or a batch. Each margin loss returns, beside
the losses, the implicit rewards and the *gradient weight*: the hand-derived coefficient of
-grad(log pi(y_w) - log pi(y_l)) in the loss's gradient, i.e. how hard this example pulls.

Shapes: B examples, K ranked answers. Log-probabilities are sums over a completion's tokens, in nats.
Half-precision inputs are subtracted and squashed in float32 and the results returned in the dtype that
came in (float16 holds losses up to 65504). Further leading dimensions are allowed everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .preferences import plackett_luce_logprob
from .validation import InputError, check_finite, check_positive, check_same_shape, widen


class PreferenceLoss(NamedTuple):
    """What a preference loss returns, each of shape (B,) [D5.1].

    Fields:
        losses: to be averaged and minimised.
        chosen_rewards, rejected_rewards: implicit rewards beta log(pi / pi_ref), detached; their
            difference is the margin.
        gradient_weights: coefficient of -grad(log pi(y_w) - log pi(y_l)), detached.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    gradient_weights: Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """Direct Preference Optimization: -log sigmoid(margin) (Eq. 7) [D4.3].

    margin = beta (log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)), and the gradient is
    -w grad(log pi(y_w) - log pi(y_l)) with w = beta sigmoid(-margin) (Sec. 4, Eq. 21) [D5.1, D5.4]:
    the weight is near beta where the implicit reward orders the pair wrongly, near 0 where it is sure.

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log pi(y|x), nats.
        reference_chosen_logps, reference_rejected_logps: (B,) log pi_ref(y|x), nats.
        beta: strength of the KL penalty, > 0.
    Returns:
        PreferenceLoss of (B,) tensors; gradients flow to whatever requires them through `losses`.
    Raises:
        InputError: shapes differ, an entry is not finite, beta <= 0.
    Source:
        Rafailov et al. (2023), "Direct Preference Optimization".

    Example:
        >>> at_reference = dpo_loss(*[torch.tensor([-3.0])] * 4, beta=0.1)
        >>> at_reference.losses, at_reference.gradient_weights                 # log 2 and beta / 2
        (tensor([0.6931]), tensor([0.0500]))
    """
    logratio_margin, chosen_logratio, rejected_logratio = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    margin = beta * logratio_margin
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=-F.logsigmoid(margin),  # not softplus(-margin): torch linearises softplus above 20
        chosen_rewards=beta * chosen_logratio,
        rejected_rewards=beta * rejected_logratio,
        gradient_weights=beta * torch.sigmoid(-margin),
    )


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """Identity Preference Optimization: (h - 1/(2 beta))^2 with h the difference of log-ratios [D12.1].

    A least-squares target instead of a logistic one, so it has a finite optimum on any data whose
    comparisons connect all completions, unanimous ones included. Log-probabilities are summed over
    tokens, as in the paper, where beta is called tau. The gradient weight is 1/beta - 2h: negative once
    the target is overshot.

    Args, Returns, Raises: as `dpo_loss`.
    Source: Azar et al. (2023), "A General Theoretical Paradigm to Understand Learning from Human
        Preferences".
    """
    logratio_margin, chosen_logratio, rejected_logratio = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=(logratio_margin - 1 / (2 * beta)) ** 2,
        chosen_rewards=beta * chosen_logratio,
        rejected_rewards=beta * rejected_logratio,
        gradient_weights=1 / beta - 2 * logratio_margin,
    )


def _logratios(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked and widened: (log-ratio margin, chosen log-ratio, rejected log-ratio), each (B,)."""
    named = dict(
        policy_chosen_logps=policy_chosen,
        policy_rejected_logps=policy_rejected,
        reference_chosen_logps=reference_chosen,
        reference_rejected_logps=reference_rejected,
    )
    check_positive("beta", beta)
    check_same_shape(**named)
    check_finite(**named)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = map(widen, named.values())
    # Policy against policy first: these two share the model's rounding, and sizes up to 1e4 cancel here.
    margin = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
    return margin, policy_chosen - reference_chosen, policy_rejected - reference_rejected


def _preference_loss(
    dtype: torch.dtype, losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, gradient_weights
) -> PreferenceLoss:
    """Back to the dtype that came in; everything but the losses detached."""
    readouts = (chosen_rewards, rejected_rewards, gradient_weights)
    return PreferenceLoss(losses.to(dtype), *(readout.detach().to(dtype) for readout in readouts))


def dpo_loss_from_indices(
    pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """The DPO loss in the form of the paper's Appendix B: completions once, pairs as indices [D4.3].

    Args:
        pi_logps, ref_logps: (B,) log-probabilities of B completions under policy and reference, nats.
        yw_idxs, yl_idxs: (T,) integer positions in [0, B) of the chosen and rejected completion of each
            of T pairs; a completion may appear in many pairs.
        beta: > 0.
    Returns:
        (losses (T,), rewards (B,)); the rewards beta (log pi - log pi_ref) are detached.
    Raises:
        InputError: shapes differ, an entry is not finite, an index is out of range, beta <= 0.
    """
    check_same_shape(pi_logps=pi_logps, ref_logps=ref_logps)
    check_finite(pi_logps=pi_logps, ref_logps=ref_logps)
    if pi_logps.dim() != 1:
        raise InputError(f"pi_logps must have shape (B,), got {tuple(pi_logps.shape)}.")
    for name, index in (("yw_idxs", yw_idxs), ("yl_idxs", yl_idxs)):
        integer = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
        if not integer or index.dim() != 1 or len(index) != len(yw_idxs):
            raise InputError(f"{name} must be a one-dimensional integer tensor as long as yw_idxs.")
        if index.numel() == 0 or index.min() < 0 or index.max() >= len(pi_logps):
            raise InputError(f"{name} must hold at least one index, all in [0, {len(pi_logps)}).")
    losses = dpo_loss(
        pi_logps[yw_idxs], pi_logps[yl_idxs], ref_logps[yw_idxs], ref_logps[yl_idxs], beta=beta
    ).losses
    rewards = beta * (widen(pi_logps) - widen(ref_logps)).detach()
    return losses, rewards.to(pi_logps.dtype)


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Negative log-likelihood of a comparison under explicit rewards: -log sigmoid(r_w - r_l) (Eq. 2) [D2.2].

    Args: chosen_rewards, rejected_rewards (B,). Returns losses (B,). Raises InputError on bad input.
    """
    check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check_finite(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return -F.logsigmoid(widen(chosen_rewards) - widen(rejected_rewards)).to(chosen_rewards.dtype)


def plackett_luce_loss(ranked_rewards: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking under explicit rewards: minus the log of Eq. 18 [D8.1].

    Args: ranked_rewards (B, K), best first. Returns losses (B,). Raises InputError on bad input.
    """
    check_same_shape(ranked_rewards=ranked_rewards)
    return -plackett_luce_logprob(widen(ranked_rewards)).to(ranked_rewards.dtype)


def plackett_luce_dpo_loss(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """DPO for rankings: `plackett_luce_loss` of the implicit rewards beta log(pi / pi_ref) (Eq. 20) [D8.3].

    Args:
        policy_logps, reference_logps: (B, K) log-probabilities of K answers, best first, nats.
        beta: > 0.
    Returns:
        losses (B,); with K = 2 they are those of `dpo_loss`.
    Raises:
        InputError: shapes differ, an entry is not finite, beta <= 0.
    """
    return plackett_luce_loss(_ranked_rewards(policy_logps, reference_logps, beta)).to(policy_logps.dtype)


def plackett_luce_gradient_weights(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """How hard `plackett_luce_dpo_loss` pulls each answer up: the coefficient of -grad log pi(y_k) [D8.4].

    w_k = beta (1 - sum_{i <= k} P(y_k takes place i | places before i are as ranked)). Over k they sum
    to zero; with K = 2 they are (w, -w) with w the weight of `dpo_loss`.

    Args, Raises: as `plackett_luce_dpo_loss`. Returns (B, K), detached.
    """
    rewards = _ranked_rewards(policy_logps, reference_logps, beta).detach()
    still_there = rewards.flip(-1).logcumsumexp(-1).flip(-1)  # entry i: log sum over j >= i of e^r_j
    K = rewards.shape[-1]
    # chance[..., i, k]: that y_k takes place i; only answers still there (k >= i) can.
    chance = (rewards.unsqueeze(-2) - still_there.unsqueeze(-1)).masked_fill(
        torch.ones(K, K, dtype=torch.bool, device=rewards.device).tril(-1), -torch.inf
    )
    return (beta * (1 - chance.exp().sum(-2))).to(policy_logps.dtype)


def _ranked_rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    check_positive("beta", beta)
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    check_finite(policy_logps=policy_logps, reference_logps=reference_logps)
    return beta * (widen(policy_logps) - widen(reference_logps))
