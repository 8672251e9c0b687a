"""What we minimise: one pure function per loss, log-probabilities in, one loss per example out.

The caller averages. Nothing here knows a model, a tokeniser or a batch. Each margin loss returns, beside
the losses, the implicit rewards and the *gradient weight*: the hand-derived coefficient of
-grad(log pi(y_w) - log pi(y_l)) in the loss's gradient, i.e. how hard this example pulls.

Shapes: B examples, K ranked answers. Log-probabilities are sums over a completion's tokens, in nats.
Half-precision inputs are subtracted and squashed in float32 and the results returned in the dtype that
came in (float16 holds losses up to 65504). Further leading dimensions are allowed everywhere.

    dpo_loss  ─┬─ cdpo_loss, robust_dpo_loss     labels that may be flipped: a linear term more or less
               ├─ ipo_loss, averaged_ipo_loss    a square instead of the logarithm
               ├─ unweighted_dpo_loss            what is left without the weight
               └─ plackett_luce_dpo_loss         rankings
    simpo_loss, orpo_loss, unlikelihood_loss     no reference
    kto_loss                                     no pairs
    bradley_terry_loss, plackett_luce_loss       explicit rewards
"""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .closed_form import log1mexp
from .preferences import plackett_luce_logprob
from .validation import (
    InputError,
    check_finite,
    check_flip_probability,
    check_not_negative,
    check_positive,
    check_same_shape,
    widen,
)


class PreferenceLoss(NamedTuple):
    """What a preference loss returns, each of shape (B,) [D5.1].

    Fields:
        losses: to be averaged and minimised.
        chosen_rewards, rejected_rewards: implicit rewards beta log(pi / pi_ref), detached; their
            difference is the margin. Losses without a reference say what they put here.
        gradient_weights: coefficient of -grad(log pi(y_w) - log pi(y_l)), detached. Averaged IPO, SimPO,
            ORPO and Unlikelihood pull the two unequally: theirs is the coefficient of -grad log pi(y_w), and
            their docstrings give that of +grad log pi(y_l).
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


def cdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> PreferenceLoss:
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
    logratio_margin, chosen_logratio, rejected_logratio = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    margin = beta * logratio_margin
    return _preference_loss(
        policy_chosen_logps.dtype,
        # Both terms are positive; l(u) + eps u would subtract two large numbers where u is far below 0.
        losses=-(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin),
        chosen_rewards=beta * chosen_logratio,
        rejected_rewards=beta * rejected_logratio,
        gradient_weights=beta * (torch.sigmoid(-margin) - label_smoothing),
    )


def robust_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    flip_probability: float,
) -> PreferenceLoss:
    """Robust DPO: ((1 - eps) l(u) - eps l(-u)) / (1 - 2 eps) = l(u) - eps u / (1 - 2 eps) [D12.3].

    Averaged over labels that are flipped with probability eps it is DPO's loss of the clean ones, so that
    its population optimum is pi*. Losses may be negative; where fewer labels were flipped than eps says,
    finite data may have no optimum. The gradient weight is beta (sigmoid(-u) + eps / (1 - 2 eps)).

    Args: as `dpo_loss`; flip_probability: eps in [0, 1/2), 0 for DPO.
    Returns, Raises: as `dpo_loss`; InputError also for flip_probability out of range.
    Source: Chowdhury et al. (2024), "Provably Robust DPO".
    """
    check_flip_probability(flip_probability)
    logratio_margin, chosen_logratio, rejected_logratio = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    margin = beta * logratio_margin
    linear = flip_probability / (1 - 2 * flip_probability)
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=-F.logsigmoid(margin) - linear * margin,
        chosen_rewards=beta * chosen_logratio,
        rejected_rewards=beta * rejected_logratio,
        gradient_weights=beta * (torch.sigmoid(-margin) + linear),
    )


def unweighted_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """DPO's gradient without its weight sigmoid(-u): the loss is -u, falling for ever [D12.7].

    What the paper warns of in Sec. 4 and shows in Table 3. Every pair pulls with the constant weight beta,
    however sure the policy is; there is no optimum unless every completion wins half of the time, and the
    policy is that of Unlikelihood with alpha = 1.

    Args, Returns, Raises: as `dpo_loss`.
    """
    logratio_margin, chosen_logratio, rejected_logratio = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=-beta * logratio_margin,
        chosen_rewards=beta * chosen_logratio,
        rejected_rewards=beta * rejected_logratio,
        gradient_weights=torch.full_like(logratio_margin, beta),
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


def averaged_ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """IPO on log-ratios averaged over tokens: (g_w / |y_w| - g_l / |y_l| - 1/(2 beta))^2 [D12.1].

    TRL's convention, under a name of its own because its optimum is another one: each log-ratio is what
    `ipo_loss` would give it, times its length, plus a multiple of its length. With equal lengths L it is
    `ipo_loss` at beta / L, over L^2. Rewards are beta times the averages. With h the difference of averages
    the chosen completion pulls with (1/beta - 2h) / |y_w|, the field `gradient_weights`, and the rejected
    one with (1/beta - 2h) / |y_l|.

    Args: as `ipo_loss`; chosen_lengths, rejected_lengths (B,) counts of scored tokens, end-of-text included.
    Returns, Raises: as `dpo_loss`; InputError also where a length is below 1.
    """
    _, chosen_logratio, rejected_logratio = _logratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
    )
    chosen_lengths, rejected_lengths = _lengths(policy_chosen_logps, chosen_lengths, rejected_lengths)
    chosen_average, rejected_average = chosen_logratio / chosen_lengths, rejected_logratio / rejected_lengths
    gap = chosen_average - rejected_average
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=(gap - 1 / (2 * beta)) ** 2,
        chosen_rewards=beta * chosen_average,
        rejected_rewards=beta * rejected_average,
        gradient_weights=(1 / beta - 2 * gap) / chosen_lengths,
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


# --------------------------------------------------------------------------------- without a reference


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

    Rewards are beta log pi(y) / |y|. With d = sigmoid(gamma - u), the chosen completion pulls with
    beta d / |y_w|, the field `gradient_weights`, and the rejected one with beta d / |y_l|. For gamma = 0 the
    optimum is exp(|y| (r + c) / beta), c being such that it sums to 1: it has forgotten the reference.

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
    chosen, rejected = _policy_logps(policy_chosen_logps, policy_rejected_logps)
    chosen_lengths, rejected_lengths = _lengths(policy_chosen_logps, chosen_lengths, rejected_lengths)
    chosen_reward, rejected_reward = beta * chosen / chosen_lengths, beta * rejected / rejected_lengths
    wanting = chosen_reward - rejected_reward - gamma
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=-F.logsigmoid(wanting),
        chosen_rewards=chosen_reward,
        rejected_rewards=rejected_reward,
        gradient_weights=beta * torch.sigmoid(-wanting) / chosen_lengths,
    )


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
    Rewards are the log-odds. With d = sigmoid(o_l - o_w) and p = e^a, the chosen completion pulls with
    (1 + lam d / (1 - p_w)) / |y_w|, the field `gradient_weights`, and the rejected one with
    lam d / ((1 - p_l) |y_l|). There is no reference, and nothing plays the part of beta.

    Args: as `simpo_loss`; lam >= 0, the weight of the odds, 0 for fine-tuning on chosen completions alone.
    Returns: as `dpo_loss`.
    Raises: InputError: as `simpo_loss`; a log-probability above 0; lam < 0.
    Source: Hong et al. (2024), "ORPO: Monolithic Preference Optimization without Reference Model".
    """
    check_not_negative("lam", lam)
    chosen, rejected = _policy_logps(policy_chosen_logps, policy_rejected_logps)
    chosen_lengths, rejected_lengths = _lengths(policy_chosen_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    for name, average in (("policy_chosen_logps", chosen), ("policy_rejected_logps", rejected)):
        if (average > 1e-3).any():  # far above the rounding of a sure completion
            raise InputError(f"{name} must be log-probabilities, which are never above 0.")
    almost_sure = -torch.finfo(chosen.dtype).eps  # the odds of certainty are infinite
    chosen_rest = log1mexp(chosen.clamp(max=almost_sure))  # log(1 - p)
    rejected_rest = log1mexp(rejected.clamp(max=almost_sure))
    chosen_odds, rejected_odds = chosen - chosen_rest, rejected - rejected_rest
    log_odds_ratio = chosen_odds - rejected_odds
    odds_weight = torch.exp(F.logsigmoid(-log_odds_ratio) - chosen_rest)  # d / (1 - p_w), finite near p = 1
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=-chosen - lam * F.logsigmoid(log_odds_ratio),
        chosen_rewards=chosen_odds,
        rejected_rewards=rejected_odds,
        gradient_weights=(1 + lam * odds_weight) / chosen_lengths,
    )


def unlikelihood_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, alpha: float
) -> PreferenceLoss:
    """Unlikelihood: -log pi(y_w) + alpha log pi(y_l), a baseline of the paper (App. C.3) [D12.7].

    Rewards are the log-probabilities themselves. The chosen completion always pulls with weight 1, the
    rejected one with alpha: nothing fades as the policy learns. With w(y) and l(y) the probabilities to be
    chosen and rejected, the optimum is (w - alpha l) / (1 - alpha) while that is nowhere negative. Beyond,
    and at alpha = 1 unless w = l, the loss falls without limit.

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log pi(y|x), nats.
        alpha: in [0, 1]; 0 is Preferred-FT.
    Returns: as `dpo_loss`.
    Raises: InputError: shapes differ, an entry is not finite, alpha outside [0, 1].
    Source: Rafailov et al. (2023). (Welleck et al., 2020, have log(1 - pi) of the rejected one instead.)
    """
    check_not_negative("alpha", alpha)
    if alpha > 1:
        raise InputError(f"alpha must lie in [0, 1], got {alpha}.")
    chosen, rejected = _policy_logps(policy_chosen_logps, policy_rejected_logps)
    return _preference_loss(
        policy_chosen_logps.dtype,
        losses=-chosen + alpha * rejected,
        chosen_rewards=chosen,
        rejected_rewards=rejected,
        gradient_weights=torch.ones_like(chosen),
    )


def _policy_logps(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and widened."""
    named = dict(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    check_same_shape(**named)
    check_finite(**named)
    return widen(chosen), widen(rejected)


def _lengths(logps: Tensor, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Token counts, checked, in the dtype of the widened log-probabilities."""
    for name, lengths in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
        if not isinstance(lengths, Tensor) or lengths.shape != logps.shape:
            raise InputError(
                f"{name} must be a tensor of shape {tuple(logps.shape)}, one count a completion."
            )
        if not ((lengths >= 1) & (lengths < torch.inf)).all():  # NaN fails as well
            raise InputError(f"{name} must be finite and at least 1; an empty completion has no average.")
    dtype = widen(logps).dtype
    return chosen.to(dtype), rejected.to(dtype)


# ---------------------------------------------------------------------------------------- without pairs


class LabelLoss(NamedTuple):
    """What a loss of single completions returns, each of shape (B,) [D12.4].

    Fields:
        losses: to be averaged and minimised.
        rewards: implicit rewards beta log(pi / pi_ref), detached.
        gradient_weights: coefficient of -grad log pi(y), detached: positive for a desirable completion,
            negative for an undesirable one.
    """

    losses: Tensor
    rewards: Tensor
    gradient_weights: Tensor


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
    Returns:
        LabelLoss of (B,) tensors; losses lie in [0, lambda].
    Raises:
        InputError: shapes differ, an entry is not finite, kl_estimate negative, an option <= 0.
    Source:
        Ethayarajh et al. (2024), "KTO: Model Alignment as Prospect Theoretic Optimization".
    """
    check_positive("beta", beta)
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    check_finite(policy_logps=policy_logps, reference_logps=reference_logps)
    if (
        not isinstance(is_desirable, Tensor)
        or is_desirable.shape != policy_logps.shape
        or is_desirable.dtype != torch.bool
    ):
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
    what is being trained: hence two rows or more, re-paired before they are scored.

    Args: policy_logps, reference_logps (B,), nats, of mismatched rows, B >= 2.
    Returns: a scalar, nats.
    Raises: InputError: shapes differ, an entry is not finite, fewer than two rows.
    """
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    check_finite(policy_logps=policy_logps, reference_logps=reference_logps)
    if policy_logps.numel() < 2:
        raise InputError("kto_kl_estimate needs two rows or more: with one there is no other prompt.")
    return (widen(policy_logps) - widen(reference_logps)).detach().mean().clamp(min=0)


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
