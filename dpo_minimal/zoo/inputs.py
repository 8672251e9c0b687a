"""What losses without a reference, and losses that average over tokens, do with their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import InputError, check_finite, widen


def policy_logps(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Checked and widened."""
    named = dict(policy_chosen_logps=chosen, policy_rejected_logps=rejected)
    check_finite(**named)
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
