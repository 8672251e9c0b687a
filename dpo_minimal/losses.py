"""What we minimise: one pure function per loss, log-probabilities in, one loss per example out.

The caller averages. Nothing here knows a model, a tokeniser or a batch. Beside the losses each function
returns the implicit rewards and the two *pulls*: the hand-derived coefficients of -grad log pi(y_w) and of
+grad log pi(y_l) in the loss's gradient, i.e. how hard this example pulls.

Shapes: B examples, K ranked answers. Log-probabilities are sums over a completion's tokens, in nats.
Half-precision inputs are subtracted and squashed in float32 and the results returned in the dtype that
came in (float16 holds losses up to 65504). Further leading dimensions are allowed everywhere.

Here are the losses of the paper; all others are in zoo/. Each stands beside its record, a `Loss`, which is
all that the rest of the package knows of it; `zoo.LOSSES` has all records by name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .certificates import maximum_likelihood
from .closed_form import optimal_logps
from .preferences import Rankings, plackett_luce_logprob
from .validation import (
    InputError,
    check_finite,
    check_flip_probability,
    check_not_negative,
    check_positive,
    check_same_shape,
    check_share,
    widen,
)


class PreferenceLoss(NamedTuple):
    """What a preference loss returns, each of shape (B,) [D5.1].

    Fields:
        losses: to be averaged and minimised.
        chosen_rewards, rejected_rewards: implicit rewards beta log(pi / pi_ref), detached; their
            difference is the margin. Losses without a reference say what they put here.
        chosen_weights: coefficient of -grad log pi(y_w), detached.
        rejected_weights: coefficient of +grad log pi(y_l), detached; equal to the former wherever the loss
            is a function of the margin.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_weights: Tensor
    rejected_weights: Tensor

    @property
    def gradient_weights(self) -> Tensor:
        """`chosen_weights`, by the name that suits a loss of margins."""
        return self.chosen_weights


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
        chosen_weights=beta * torch.sigmoid(-margin),
    )


def dpo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float) -> Tensor:
    """Where DPO ends on data: the closed form (Eq. 4) of their maximum-likelihood rewards [D11.7].

    Args: rankings of any K; ref_logps (X, Y); beta > 0. Returns (X, Y) log-probabilities, float64.
    Raises: InputError where the maximum-likelihood estimate does not exist.
    """
    return optimal_logps(ref_logps, maximum_likelihood(rankings, ref_logps > -math.inf), beta=beta)


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
    check_finite(**named)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = map(widen, named.values())
    # Policy against policy first: these two share the model's rounding, and sizes up to 1e4 cancel here.
    margin = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
    return margin, policy_chosen - reference_chosen, policy_rejected - reference_rejected


def _preference_loss(dtype: torch.dtype, losses: Tensor, **readouts: Tensor) -> PreferenceLoss:
    """Back to the dtype that came in; all but the losses detached. One pull where both are equal."""
    narrow = {name: readout.detach().to(dtype) for name, readout in readouts.items()}
    return PreferenceLoss(losses.to(dtype), **{"rejected_weights": narrow["chosen_weights"], **narrow})


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


# ------------------------------------------------------------- explicit rewards, and rankings


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Negative log-likelihood of a comparison under explicit rewards: -log sigmoid(r_w - r_l) (Eq. 2) [D2.2].

    Args: chosen_rewards, rejected_rewards (B,). Returns losses (B,). Raises InputError on bad input.
    """
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
    check_finite(policy_logps=policy_logps, reference_logps=reference_logps)
    return beta * (widen(policy_logps) - widen(reference_logps))


def plackett_luce_preference_loss(
    policy_logps: Tensor, reference_logps: Tensor, *, beta: float
) -> PreferenceLoss:
    """`plackett_luce_dpo_loss` with rewards and pulls of the best and the worst answer (Eq. 20) [D8.3].

    Args, Raises: as `plackett_luce_dpo_loss`. Returns PreferenceLoss of (B,) tensors: chosen is the best
    answer, rejected the worst; with K = 2 it is `dpo_loss`. What lies between is pulled as well.
    """
    rewards = _ranked_rewards(policy_logps, reference_logps, beta)
    weights = plackett_luce_gradient_weights(policy_logps, reference_logps, beta=beta)
    return _preference_loss(
        policy_logps.dtype,
        losses=plackett_luce_loss(rewards),
        chosen_rewards=rewards[..., 0],
        rejected_rewards=rewards[..., -1],
        chosen_weights=weights[..., 0],
        rejected_weights=-weights[..., -1],
    )


# ------------------------------------------------------------------------------------------- records

RANGES: dict[str, Callable[[str, float], None]] = {  # of an option: as people read it, and its check
    "> 0": check_positive,
    ">= 0": check_not_negative,
    "[0, 1/2)": lambda name, value: check_flip_probability(value, name),
    "[0, 1]": check_share,
    "(0, 1/2)": lambda name, value: (check_positive(name, value), check_flip_probability(value, name)),
    "(0, 1]": lambda name, value: (check_positive(name, value), check_share(name, value)),
}
READS: dict[str, tuple[str, int | None]] = {  # parameter of a loss: the table it is taken from, the column
    "policy_chosen_logps": ("policy", 0),
    "policy_rejected_logps": ("policy", 1),
    "reference_chosen_logps": ("reference", 0),
    "reference_rejected_logps": ("reference", 1),
    "chosen_lengths": ("lengths", 0),
    "rejected_lengths": ("lengths", 1),
    "policy_logps": ("policy", None),  # (B, K): the whole ranking, best first
    "reference_logps": ("reference", None),
    "kl_estimate": ("kl_estimate", None),  # one number, or (B,): the policy's divergence from the reference
}


class Option(NamedTuple):
    """A number that a loss takes.

    Fields:
        name: of the parameter; with dashes, of the flag.
        range: a key of `RANGES`.
        default: the command line's; None where it must be given.
        help: what it is, in a few words.
        symbol: stands before its value in tables of results; "" leaves it out there.
    """

    name: str
    range: str
    default: float | None
    help: str
    symbol: str = ""


@dataclass(frozen=True)
class Loss:
    """The record of a loss: what commands, experiments, tests and the table of losses know of it.

    What it reads is told by its parameters, whose names are those of `READS`; all others are options.

    Fields:
        name: as --loss-type writes it.
        title: as tables of results write it.
        function: tensors of shape (B,), or (B, K) -> PreferenceLoss of (B,) tensors.
        summary: a few words for the help.
        labelled: the same for single completions, where there is such a loss: (B,) log-probabilities of
            policy and reference, labels and kl_estimate -> `zoo.kto.LabelLoss`.
        options: in the order in which they are printed.
        start: (K, **options) -> the loss of a row of K completions where policy = reference; None where
            there is no reference, or for a loss that does not say.
        optimum: (rankings, ref_logps (X, Y), **options, and lengths (X, Y) if it reads them) -> (X, Y) log pi
            where the mean loss is least, or InputError where there is none; or "none", or "not known".
        proof: the tag of the section that derives it.
        source: who wrote it down first.
        reads_batch: whether a row's loss depends on the other rows.
        charted: whether the frontier runs it as well; its figure has no place for every variant.
    """

    name: str
    title: str
    function: Callable[..., PreferenceLoss]
    summary: str = ""
    options: tuple[Option, ...] = ()
    start: Callable[..., float] | None = None
    optimum: Callable[..., Tensor] | str = "not known"
    proof: str = ""
    source: str = ""
    labelled: Callable[..., Any] | None = None
    reads_batch: bool = False
    charted: bool = True

    @staticmethod
    @lru_cache
    def of(function: Callable[..., PreferenceLoss]) -> Loss:
        """The record of a function that has none: only what it reads is known."""
        name = getattr(function, "__name__", "the loss")
        return Loss(name, name, function, reads_batch=getattr(function, "reads_batch", False))

    @cached_property
    def parameters(self) -> dict[str, bool]:
        """Those of the function that are given in any case: name, and whether it is one of `READS`."""
        found = inspect.signature(self.function).parameters.values()
        bare = [p.name for p in found if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        return {p.name: p.name in READS for p in found if p.name in READS or p.name in bare}

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Of "policy", "reference", "lengths" and "kl_estimate", what the function reads."""
        return tuple(dict.fromkeys(READS[name][0] for name, read in self.parameters.items() if read))

    @property
    def rows(self) -> str:
        """The kind of data: "preferences", or "rankings" of any K."""
        return "rankings" if "policy_logps" in self.parameters else "preferences"

    def on(self, tables: Mapping[str, Callable[[], Tensor]], options: Mapping[str, float]) -> PreferenceLoss:
        """Call the function with what it reads.

        Args:
            tables: a function for each name that `reads` may have, called only where it is read; (B, K) with
                the best completion first, but `kl_estimate` as it is.
            options: those of the loss.
        Raises:
            InputError: a parameter without a default is no option given and none of `READS`; rankings of more
                than two for a loss of pairs.
        """
        for name, read in self.parameters.items():
            if not read and name not in options:
                raise InputError(
                    f"{self.name} has a parameter {name}, which is no option that was given and none of "
                    f"{', '.join(READS)}; give it, or rename it."
                )
        whole = {name: tables[name]() for name in self.reads}
        split = {name: table.unbind(-1) for name, table in whole.items() if name != "kl_estimate"}
        if self.rows == "preferences" and any(len(columns) != 2 for columns in split.values()):
            raise InputError(f"{self.name} takes pairs, but the rankings are longer; use Plackett-Luce.")
        columns = {}
        for name in filter(READS.get, self.parameters):
            table, column = READS[name]
            columns[name] = whole[table] if column is None else split[table][column]
        return self.function(**columns, **options)


BETA = Option("beta", "> 0", 0.1, "strength of the pull towards the reference", "β")
DPO = Loss(
    "dpo", "DPO", dpo_loss, "the paper's", (BETA,), start=lambda K, **_: math.log(2), optimum=dpo_optimum,
    proof="D11.7", source="Rafailov et al. (2023)",
)  # fmt: skip
PLACKETT_LUCE = Loss(
    "plackett_luce", "Plackett-Luce DPO", plackett_luce_preference_loss, "for rankings", (BETA,),
    start=lambda K, beta: math.log(math.factorial(K)), optimum=dpo_optimum, proof="D8.3",
    source="Rafailov et al. (2023), App. A.3",
)  # fmt: skip
