"""Who draws the pairs: the KL law of each sampler beside its simulation, at one number of pairs [D11.19]."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ...laws.designs import SAMPLERS, average_design, design_law, label_in_rounds
from ..study import table
from .replicates import Settings, Truth, laws, make_truth, measure

ROUNDS, IN_ROUNDS = 4, ("policy", "tempered")
CELLS = 60_000  # counts of all data sets at most, so that many completions take as long as few


def starts(optimal: Tensor, ref_logps: Tensor) -> dict[str, tuple[str, Tensor, int]]:
    """Name -> sampler, the policy that it draws the first pairs for, rounds: with pi* known, then without."""
    known = {sampler: (sampler, optimal, 1) for sampler in SAMPLERS}
    return known | {f"{sampler}, {ROUNDS} rounds": (sampler, ref_logps, ROUNDS) for sampler in IN_ROUNDS}


def compare(truth: Truth, settings: Settings) -> list[dict]:
    """A record for each sampler, on data sets of the largest size; none where float64 cannot tell the law.

    undecided is the mean of 4 sigma (1 - sigma) over its pairs: 1 if labels are coin flips, 0 if unanimous.
    """
    (world, _, beta, optimal, *_), num_pairs, rows = truth, settings.pairs[-1], []
    count = max(100, min(settings.replicates * 3 // 20, CELLS // len(truth.population.weight)))
    for k, (name, (sampler, start, rounds)) in enumerate(starts(optimal, world.ref_logps).items()):
        slate = average_design(sampler, start, optimal, world.ref_logps, beta=beta, rounds=rounds)
        if design_law(slate, optimal, world.ref_logps, beta=beta).isnan():
            continue
        shown, generator = make_truth(settings, slate), np.random.default_rng([settings.seed, num_pairs, k])
        tables = (each.expand(count, -1) for each in (start, world.rewards, world.ref_logps))
        wins = label_in_rounds(sampler, *tables, num_pairs, beta=beta, rounds=rounds, generator=generator)
        sample = measure(shown, wins[:, *shown.population.order.T])
        law, margins = laws(shown, num_pairs, sample)[0], world.rewards[0][slate.items].diff(dim=-1).flatten()
        undecided = 4 * (slate.weight @ (margins.sigmoid() * (-margins).sigmoid())).item()
        rows.append({
            "sampler": name, "law": law.theory, "kl": law.measured, "kl/error": law.error,
            "judged": law.judged, "outside": law.outside, "undecided": undecided,
            "missing": sample["kl"].isnan().double().mean().item(),
        })  # fmt: skip
    return rows


def samplers_table(rows: list[dict], num_pairs: int, show) -> list[str]:
    """The lines to print. Args: show writes a number with its error."""
    columns = [("sampler", "<18", ""), ("law", ">8", ".4g"), ("labels", ">7", ".2f")]
    columns += [("undecided", ">10", ".2f"), ("no estimate", ">12", ".3g"), ("simulated", ">18", "")]
    reference, cells = next((row["law"] for row in rows if row["sampler"] == "reference"), math.nan), []
    for name, law, kl, error, judged, outside, *rest in map(dict.values, rows):
        text = show(kl, error) + " !" * outside
        cells.append((name, law, law / reference, *rest, text if judged or text == "-" else f"({text})"))
    return [
        f"Who draws the pairs: N KL(pi_hat || pi*), nats, N = {num_pairs}; the first six samplers know pi*",
        *table(columns, cells, indent="  "),
        "labels: for the reference's KL. undecided: mean of 4 sigma (1 - sigma). (...): too few for the law.",
    ]
