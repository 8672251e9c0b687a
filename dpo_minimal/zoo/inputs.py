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


def of_averages(formula: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., PreferenceLoss]:
    """`of_margin` of log-ratios that are averaged over tokens: h = g_w / |y_w| - g_l / |y_l|.

    The loss also takes chosen_lengths and rejected_lengths, (B,) counts of scored tokens, end-of-text
    included. Rewards are beta times the averages, and the pulls weight / |y_w| and weight / |y_l|.
    """
    return _of_pairs(formula, slice(0, 1), averaged=True)


def of_logratios(formula: Callable[..., tuple[Tensor, ...]]) -> Callable[..., PreferenceLoss]:
    """The same from (chosen, rejected, *, beta, ...) -> (loss, weight, weight), each completion by itself.

    chosen and rejected are its log pi/pi_ref, (B,); the weights are the pulls of chosen and rejected. Both
    rewards may follow, where they are not DPO's.
    """
    return _of_pairs(formula, slice(1, 3))


def _of_pairs(
    formula: Callable[..., tuple[Tensor, ...]], read: slice, averaged: bool = False
) -> Callable[..., PreferenceLoss]:
    """`read` is what the formula takes of (h, chosen log-ratio, rejected log-ratio)."""
    columns, options = (list(inspect.signature(each).parameters.values()) for each in (dpo_loss, formula))
    lengths = [columns[0].replace(name=f"{side}_lengths") for side in ("chosen", "rejected") if averaged]
    options = [option for option in options if option.kind is option.KEYWORD_ONLY]
    signature = inspect.Signature([*columns[:4], *lengths, *options], return_annotation="PreferenceLoss")

    @functools.wraps(formula)
    def loss(*args: Tensor, **named: Tensor | float) -> PreferenceLoss:
        given = signature.bind(*args, **named)
        logps, beta = given.args[:4], given.kwargs["beta"]
        h, *ratios = _logratios(*logps, beta)
        counts = token_counts(logps[0], *given.args[4:]) if averaged else (1, 1)
        chosen, rejected = (ratio / count for ratio, count in zip(ratios, counts))
        h = chosen - rejected if averaged else h  # which has lost fewer digits
        losses, *found = formula(*(h, chosen, rejected)[read], **given.kwargs)
        weights, rewards = found[:2], found[2:] or (beta * chosen, beta * rejected)
        return _preference_loss(
            logps[0].dtype, losses=losses, chosen_rewards=rewards[0], rejected_rewards=rewards[1],
            chosen_weights=weights[0] / counts[0], rejected_weights=weights[-1] / counts[1],
        )  # fmt: skip

    loss.__signature__ = signature
    return loss


def policy_logps(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and widened."""
    check_finite(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    return widen(chosen), widen(rejected)


def token_counts(logps: Tensor, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Token counts, checked, in the dtype of the widened log-probabilities."""
    for name, lengths in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
        if not isinstance(lengths, Tensor) or lengths.shape != logps.shape:
            shape = tuple(logps.shape)
            raise InputError(f"{name} must be a tensor of shape {shape}, one count a completion.")
        if not ((lengths >= 1) & (lengths < torch.inf)).all():  # NaN fails as well
            raise InputError(f"{name} must be finite and at least 1; an empty completion has no average.")
    dtype = widen(logps).dtype
    return chosen.to(dtype), rejected.to(dtype)


def bisection(above: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The place between low and high where `above` becomes true, entry by entry, enclosed up to rounding.

    Each step asks for fifteen places at once, along a new first axis: on small tables as fast as for one.
    """
    sixteenths = (torch.arange(1, 16).to(low) / 16).view(-1, *[1] * low.dim())
    for _ in range(16):
        passed = (~above(low + (high - low) * sixteenths)).sum(0)
        low, high = low + (high - low) * passed / 16, low + (high - low) * (passed + 1) / 16
    return low, high
