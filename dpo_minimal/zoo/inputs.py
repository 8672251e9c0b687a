"""What losses do with their inputs before and after their own formula."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..losses import PreferenceLoss, _logratios, _preference_loss, dpo_loss
from ..validation import InputError, check_finite, widen


def of_margin(formula: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., PreferenceLoss]:
    """Make a loss of pairs, with the parameters of `dpo_loss`, from (h, *, beta, ...) -> (loss, weight).

    h = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l), DPO's margin without its beta, is (B,), checked and
    widened; loss and weight, the pull of either completion, are (B,). Implicit rewards are DPO's.
    """
    return _of_pairs(formula, slice(0, 1))


def of_logratios(formula: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., PreferenceLoss]:
    """The same from (chosen, rejected, *, beta, ...) -> (loss, weight, weight), each completion by itself.

    chosen and rejected are its log pi/pi_ref, (B,); the weights are the pulls of chosen and rejected.
    """
    return _of_pairs(formula, slice(1, 3))


def _of_pairs(formula: Callable[..., tuple[Tensor, ...]], read: slice) -> Callable[..., PreferenceLoss]:
    """`read` is what the formula takes of (h, chosen log-ratio, rejected log-ratio)."""

    @functools.wraps(formula)
    def loss(
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        beta: float,
        **options: float,
    ) -> PreferenceLoss:
        found = _logratios(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta
        )
        losses, *weights = formula(*found[read], beta=beta, **options)
        return _preference_loss(
            policy_chosen_logps.dtype,
            losses=losses,
            chosen_rewards=beta * found[1],
            rejected_rewards=beta * found[2],
            chosen_weights=weights[0],
            rejected_weights=weights[-1],
        )

    logps, options = (list(inspect.signature(each).parameters.values()) for each in (dpo_loss, formula))
    given = [option for option in options if option.kind is option.KEYWORD_ONLY]
    loss.__signature__ = inspect.Signature([*logps[:4], *given], return_annotation="PreferenceLoss")
    return loss


def policy_logps(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and widened."""
    check_finite(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    return widen(chosen), widen(rejected)


def token_counts(logps: Tensor, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
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
