"""Logs of trainings that are really run, of a table by DPO in numpy, with or without a cause planted; and how
trainers write them. `test_doctor.py` reads them."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS, COMPLETIONS = 6, 5
NAMES = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected",
)  # fmt: skip
Logits = np.ndarray  # (PROMPTS, COMPLETIONS)
Metrics = dict[str, np.ndarray]  # name -> (rows,)


def log_softmax(logits: Logits) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def drawn_pairs(rng: np.random.Generator, rewards: Logits, count: int) -> np.ndarray:
    """(count, 3): prompt, chosen, rejected; Bradley-Terry chooses."""
    prompt = rng.integers(PROMPTS, size=count)
    first = rng.integers(COMPLETIONS, size=count)
    second = (first + rng.integers(1, COMPLETIONS, size=count)) % COMPLETIONS
    gap = rewards[prompt, first] - rewards[prompt, second]
    swap = np.log(rng.random(count)) > -np.logaddexp(0, -gap)
    return np.stack([prompt, np.where(swap, second, first), np.where(swap, first, second)], axis=-1)


def measured(pairs: np.ndarray, logps: np.ndarray, reference: np.ndarray, beta: float) -> Metrics:
    """What TRL logs of each row: -log sigmoid of the margin, rewards, and ties count as wrong."""
    x, w, l = pairs.T
    chosen, rejected = (beta * (logps[x, y] - reference[x, y]) for y in (w, l))
    margins = chosen - rejected
    return dict(
        zip(
            NAMES,
            (np.logaddexp(0, -margins), chosen, rejected, margins, margins > 0, logps[x, w], logps[x, l]),
        )
    )


def trained(
    *,
    seed: int = 0,
    beta: float = 0.5,
    steps: int = 40,
    batch: int = 8,
    window: int = 1,
    rate: float = 0.5,
    evaluate: int = 10,
    labels: float = 2.0,
    rows: int = 200,
    start: Callable[[Logits, Logits], Logits] = lambda reference, rewards: reference,
    reference_at: Callable[[int, Logits, Logits], Logits] = lambda step, reference, policy: reference,
    noise: float = 0.0,
    pairs_of: Callable[[np.ndarray], np.ndarray] = lambda pairs: pairs,
    loss_of: Callable[[Metrics], Metrics] = lambda metrics: metrics,
    pull: float = 1.0,
    rate_at: Callable[[int], float] = lambda step: 1.0,
) -> list[dict[str, float]]:
    """A log as TRL's `log_history`: stochastic gradient steps on DPO's loss, one record a `window`.

    Args:
        labels: the standard deviation of true rewards; large ones leave no noise in the labels.
        rows: of the data set, from which batches are drawn; as many others are for evaluation.
        start: the policy's logits before training, from the reference's and the true rewards.
        reference_at: the reference's logits at a step, from those at the start and the policy's.
        noise: of the policy's log-probabilities in training alone, and their loss by it: dropout.
        pairs_of: what becomes of the pairs before anybody sees them.
        loss_of: what becomes of the rows' metrics before they are logged.
        pull: times the gradient; negative ones learn the opposite.
        rate_at: times the learning rate at a step.
    """
    rng = np.random.default_rng(seed)
    first_reference = rng.normal(size=(PROMPTS, COMPLETIONS))
    rewards = labels * rng.normal(size=first_reference.shape)
    policy = start(first_reference, rewards).copy()
    data, held_out = (pairs_of(drawn_pairs(rng, rewards, rows)) for _ in range(2))
    history: list[dict[str, float]] = []
    logged: list[dict[str, float]] = []

    def evaluation(step: int) -> None:
        reference = log_softmax(reference_at(step, first_reference, policy))
        found = loss_of(measured(held_out, log_softmax(policy), reference, beta))
        means = {f"eval_{name}": float(np.mean(value)) for name, value in found.items()}
        history.append({**means, "epoch": step * batch / rows, "step": step})

    if evaluate:
        evaluation(0)
    for step in range(1, steps + 1):
        pairs = data[rng.integers(rows, size=batch)]
        x, w, l = pairs.T
        logps = log_softmax(policy)
        seen = logps - noise * rng.random(logps.shape)
        metrics = measured(pairs, seen, log_softmax(reference_at(step, first_reference, policy)), beta)
        logged.append({name: float(np.mean(value)) for name, value in loss_of(metrics).items()})
        weight = pull * beta * np.exp(-np.logaddexp(0, metrics["rewards/margins"])) / batch
        gradient = np.zeros_like(policy)
        np.add.at(gradient, (x, w), -weight)
        np.add.at(gradient, (x, l), weight)  # the normaliser cancels in the margin
        policy = policy - rate * rate_at(step) / beta**2 * gradient
        if step % window == 0:
            record = {name: sum(each[name] for each in logged) / len(logged) for name in logged[0]}
            record |= {"grad_norm": float(np.linalg.norm(gradient)), "learning_rate": 1e-6 * rate_at(step)}
            history.append({**record, "epoch": step * batch / rows, "step": step})
            logged = []
        if evaluate and step % evaluate == 0:
            evaluation(step)
    return history


# ------------------------------------------------------------------------------------------------- formats


def as_written(value: float, digits: str) -> Any:
    """A number rounded as trainers do: "" not at all, "4" to 4 decimals, "4g" to 4 significant digits."""
    if not digits or not math.isfinite(value):
        return value
    return float(f"{value:.4g}") if digits == "4g" else round(value, int(digits))


def write(folder: Path, history: list[dict[str, Any]], kind: str = "state", digits: str = "") -> Path:
    """A log in one of the formats that are read: "state", "console" or "csv"."""
    whole = ("step", "learning_rate") if digits == "4" else ("step",)  # a rate has more than 4 decimals
    history = [{k: v if k in whole else as_written(v, digits) for k, v in row.items()} for row in history]
    if kind == "state":
        path, text = folder / "trainer_state.json", json.dumps({"global_step": 1, "log_history": history})
    elif kind == "console":
        lines, last = (
            ["Loading weights: 100%|####| 1/1 [00:00<00:00]", "some words {of: no matter}"],
            history[-1],
        )
        for row in history:
            if "loss" in row or row is last:
                lines += [repr({k: str(v) for k, v in row.items() if k != "step"})]
                lines += [f" 10%|#   | {row['step']}/{last['step']} [00:01<00:09,  1.0it/s]"]
            else:
                lines += [repr({k: v for k, v in row.items() if k != "step"})]
        path, text = folder / "train.log", "\n".join(lines) + "\n"
    else:
        names = list(dict.fromkeys(name for row in history for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, names, restval="")
        writer.writeheader()
        writer.writerows(history)
        path, text = folder / "log.csv", table.getvalue()
    path.write_text(text, encoding="utf-8")
    return path
