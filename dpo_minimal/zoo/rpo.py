"""Against chosen completions that become less likely: their likelihood beside a loss of pairs (RPO), and a
margin that counts their fall (DPO-Positive)."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..certificates import curvature, laplacian_inverse
from ..losses import BETA, DPO, Loss, Option, PreferenceLoss, _preference_loss, dpo_optimum
from ..preferences import Rankings, win_counts
from ..validation import InputError, check_not_negative, widen
from .inputs import of_logratios, token_counts


def with_nll(loss: Loss) -> Loss:
    """The record of a loss of pairs with nll_weight (-log pi(y_w) / |y_w|) beside it [D12.13].

    Its function takes chosen_lengths and nll_weight >= 0 as well, all by name. The pull on the chosen gains
    nll_weight / |y_w|; the one on the rejected and the rewards are as before.

    Raises: InputError: a loss of rankings.
    Source: Pang et al. (2024), "Iterative Reasoning Preference Optimization", for DPO.
    """
    if "policy_chosen_logps" not in loss.parameters:
        raise InputError(f"{loss.name} takes no pairs; give with_nll a loss that does.")
    taken = inspect.signature(loss.function).parameters

    def function(*, nll_weight: float, **given: Tensor | float) -> PreferenceLoss:
        check_not_negative("nll_weight", nll_weight)
        wide = {name: widen(value) if isinstance(value, Tensor) else value for name, value in given.items()}
        out, chosen = loss.function(**{name: wide[name] for name in wide if name in taken}), wide[CHOSEN]
        share = nll_weight / token_counts(chosen, *[given["chosen_lengths"]] * 2)[0]
        fields = out._asdict() | {"chosen_weights": out.chosen_weights + share}
        return _preference_loss(given[CHOSEN].dtype, **fields | {"losses": out.losses - share * chosen})

    added = {name: inspect.Parameter(name, NAMED) for name in ("chosen_lengths", "nll_weight")}
    named = {name: parameter.replace(kind=NAMED) for name, parameter in taken.items()}
    function.__signature__ = inspect.Signature([*(named | added).values()])
    function.__name__ = f"{loss.name}_nll_loss"
    function.__doc__ = f"{loss.title} + nll_weight (-log pi(y_w) / |y_w|) [D12.13]."
    weight = Option("nll_weight", ">= 0", 1.0, "weight of the chosen's mean token", "ν")
    return replace(
        loss, name=f"{loss.name}_nll", title=f"{loss.title} + NLL", function=function, proof="D12.13",
        summary=f"{loss.name} with the likelihood of the chosen beside it", options=(*loss.options, weight),
        start=None, optimum="not known", labelled=None, charted=False,
    )  # fmt: skip


CHOSEN, NAMED = "policy_chosen_logps", inspect.Parameter.KEYWORD_ONLY


def rpo_optimum(
    rankings: Rankings, ref_logps: Tensor, *, beta: float, nll_weight: float, lengths: Tensor
) -> Tensor:
    """Where RPO ends, by Newton's method: its loss is convex in the logits [D12.13].

    Args: as `dpo_optimum`; lengths (X, Y) tokens. Returns (X, Y) log-probabilities, float64.
    Raises: InputError where some completion never won: it would fall for ever.
    """
    if nll_weight == 0:
        return dpo_optimum(rankings, ref_logps, beta=beta)
    exists, wins = ref_logps > -math.inf, win_counts(rankings, *ref_logps.shape)
    drawn = nll_weight * wins.sum(-1) / wins.sum((-2, -1)).unsqueeze(-1) / lengths  # pull of the likelihood
    if not (drawn > 0)[exists].all():
        raise InputError("RPO has no optimum, because some completion never won; add comparisons.")
    total, ratios = drawn.sum(-1, keepdim=True), torch.zeros_like(drawn)
    for _ in range(200):
        pi = (ref_logps + ratios).softmax(-1)
        state = curvature(beta * ratios, rankings)
        slope = beta * state.gradient + total * pi - drawn
        spread = torch.diag_embed(pi) - pi.unsqueeze(-1) * pi.unsqueeze(-2)
        inverse = laplacian_inverse(beta**2 * state.hessian + total.unsqueeze(-1) * spread, exists)
        step = -(inverse @ slope.unsqueeze(-1)).squeeze(-1)
        reach = max(1, beta) * (step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True))
        ratios = ratios + step * torch.where(reach > 1e-8, torch.log1p(reach) / reach, 1)  # as for DPO
        if reach.max() < 1e-8:
            return (ref_logps + ratios).log_softmax(-1)
    raise InputError("RPO has an optimum, but out of numerical reach; raise nll_weight or lower beta.")


RPO = replace(with_nll(DPO), name="rpo", title="RPO", optimum=rpo_optimum, source="Pang et al. (2024)")
rpo_loss = RPO.function


@of_logratios
def dpop_loss(chosen: Tensor, rejected: Tensor, *, beta: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """DPO-Positive: -log sigmoid(u), u = beta (h - lam max(0, log pi_ref(y_w) / pi(y_w))) [D12.14].

    A chosen completion that has become less likely than under the reference takes lam times its fall off the
    margin. With d = beta sigmoid(-u) the pulls are (1 + lam) d and d then, d and d otherwise. pi* is no
    stationary point, unless it is the reference.

    Args: as `dpo_loss`; lam: >= 0, 0 for DPO.
    Returns, Raises: as `dpo_loss`; InputError also for lam < 0.
    Source: Pal et al. (2024), "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive".
    """
    check_not_negative("lam", lam)
    u = beta * (chosen - rejected - lam * F.relu(-chosen))
    pull = beta * torch.sigmoid(-u)
    return -F.logsigmoid(u), torch.where(chosen < 0, pull + lam * pull, pull), pull


DPOP = Loss(
    "dpop", "DPO-Positive", dpop_loss, "dpo whose margin counts a fall of the chosen",
    (BETA, Option("lam", ">= 0", 50.0, "weight of the chosen's fall", "λ")), start=DPO.start, proof="D12.14",
    source="Pal et al. (2024)", charted=False,
)  # fmt: skip
