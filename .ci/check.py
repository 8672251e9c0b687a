"""The numbers that the READMEs promise, recomputed from what the commands wrote.

`python .ci/check.py NAME FOLDER`, with numpy alone, so that a mistake of the package is not made here again.
"""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def bandit(folder: Path) -> None:
    """Every policy within its certificate of pi*, and within what the README promises."""
    result = np.load(folder / "result.npz")
    for name, limit in (("tabular", 1e-9), ("plackett_luce", 1e-9), ("gpt", 1e-3)):
        ref, rewards, logps = (result[f"{name}_{key}"] for key in ("ref_logps", "rewards", "logps"))
        tilted = ref + rewards / result[f"{name}_beta"]
        optimal = tilted - np.logaddexp.reduce(tilted, axis=-1, keepdims=True)
        distance, kl = np.abs(logps - optimal), (np.exp(logps) * (logps - optimal)).sum(-1)
        bound = result[f"{name}_logp_bound"]
        print(f"{name}: max |log pi - log pi*| {distance.max():.1e}, certified below {bound.max():.1e}")
        assert (distance.max(-1) <= bound).all(), f"{name}: beyond its certificate"
        assert distance[optimal >= np.log(1e-4)].max() <= limit, f"{name}: off target"
        assert np.abs(kl).max() <= 1e-6, f"{name}: off target"


def statistics(folder: Path) -> None:
    """At the largest N: squared error within 3 % of the Cramer-Rao bound, 95 % regions cover 95 %."""
    result = np.load(folder / "result.npz")
    rewards, probability, (chosen, rejected) = result["rewards"], result["probability"], result["order"].T
    surprise = 1 / (1 + np.exp(rewards[chosen] - rewards[rejected]))  # of each outcome
    direction = np.eye(len(rewards))[chosen] - np.eye(len(rewards))[rejected]
    information = direction.T @ ((probability * surprise**2)[:, None] * direction)
    ratio = result["squared_error"][-1].mean() / np.trace(np.linalg.pinv(information))
    print(f"squared error / Cramer-Rao bound {ratio:.4f}")
    assert abs(ratio - 1) <= 0.03, "not efficient"
    limit = 9.487729  # the 95 % quantile of chi-square with 4 degrees of freedom
    for region in ("wald", "likelihood_ratio"):
        coverage = (result[region][-1] <= limit).mean()
        error = (0.95 * 0.05 / result[region].shape[1]) ** 0.5
        print(f"95 % {region} region covers {coverage:.4f}, Monte-Carlo error {error:.4f}")
        assert abs(coverage - 0.95) <= 4 * error, f"{region} region does not cover"


def dpo(folder: Path) -> None:
    """The samples turned positive, on held-out prompts, and the policy stayed near its reference."""
    measured = [record for record in records(folder / "metrics.jsonl") if "samples/reward" in record]
    before, after = measured[0], measured[-1]
    error = math.hypot(before["samples/reward_error"], after["samples/reward_error"])
    rise = after["samples/reward"] - before["samples/reward"]
    print(f"true reward {before['samples/reward']:.2f} -> {after['samples/reward']:.2f}, error {error:.2f}")
    assert abs(before["eval_loss"] - math.log(2)) < 1e-5 and after["eval_loss"] < math.log(2), "the loss"
    assert rise > 5 * error, "the reward has not risen"
    assert after["kl/policy_reference"] < 3, "the policy has left its reference behind"


def frontier(folder: Path) -> None:
    """Nobody is above the frontier."""
    gaps = [record["gap/reward"] for record in records(folder / "metrics.jsonl")]
    print(f"{len(gaps)} policies measured, the least gap to the frontier {min(gaps):.1e}")
    assert min(gaps) >= -1e-9, "above the frontier"


def pairs(folder: Path) -> None:
    """A million pairs bring DPO as near to pi* as the law says.

    A tenth of the pairs is held out: the law of the rest is 1 / 0.9 = 1.11 times this one. In the limit a gap
    is sum_k lambda_k z_k^2 / 2 with standard normal z_k. Its deviation sqrt(sum_k lambda_k^2 / 2) is 0.40 of
    its mean with this world's eigenvalues (`kl_law`), so 0.40 * 1.11 / sqrt(20) = 0.10 is the standard error
    of 20 data sets. The bounds are 6 and 9 of those away; the rest is for early stopping and finite size.
    """
    points = records(folder / "metrics.jsonl")
    wanted = {"world": "table", "method": "DPO", "pairs": 1_000_000}
    gaps = [point["gap"] for point in points if wanted.items() <= point.items()]
    law = float(np.load(folder / "result.npz")["table_law"]) / 1_000_000
    print(f"mean gap of {len(gaps)} data sets of a million pairs, over the law: {np.mean(gaps) / law:.2f}")
    assert 0.5 < np.mean(gaps) / law < 2, "far from the law"


def sentiment(folder: Path) -> None:
    """DPO has raised the true reward."""
    with (folder / "table.csv").open(encoding="utf-8") as file:
        rows = {(row["method"], row["setting"]): row for row in csv.DictReader(file)}
    start, end = (float(rows[key]["reward"]) for key in (("SFT", ""), ("DPO", "β 1")))
    print(f"true reward in sentiment: {start:.2f} -> {end:.2f}")
    assert end > start + 0.2, "DPO has not raised the reward"


if __name__ == "__main__":
    checks = {check.__name__: check for check in (bandit, statistics, dpo, frontier, pairs, sentiment)}
    checks[sys.argv[1]](Path(sys.argv[2]))
