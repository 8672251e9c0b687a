"""What the sentiment experiment prints and writes: the table, what it says of DPO and PPO, samples to read.

But: how the numbers come about (sentiment_results.py).
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...text.runs import write_atomically, write_json, write_records
from ..text.report import prompt_line, text_lines
from .data import K, Plan
from .methods import REWARD_EPOCHS, Run, budget_of
from .results import NATS, Group, Interval, Results, crossed_interval, reward_within, win_interval
from .runs import OTHER_TEMPERATURES, SHOWN, TEMPERATURES
from .world import World, read_rows

PRINTED = 2  # prompts whose samples are printed
WIDTH = 110


def table_rows(results: Results, runs: Sequence[Run], plan: Plan) -> list[dict[str, Any]]:
    """A row for each method and setting: numbers for table.csv, from which the printed table is made."""
    budgets = {(run.method, run.setting): budget_of(run, plan) for run in runs}
    rows = []
    for group in results.groups:
        row = {"method": group.method, "setting": group.setting, "seeds": len(group.rewards)}
        row |= _spread("reward", crossed_interval(group.rewards[:, -1]))
        row |= _spread("kl", crossed_interval(group.log_ratios[:, -1]))
        row |= _spread("win_rate", win_interval(group.rewards[:, -1], results.opponents))
        for nats in NATS:
            within = reward_within(group, results.start, nats) if group.method != "SFT" else None
            row |= _spread(f"reward_within_{nats:g}_nats", within)
        row |= budgets[group.method, group.setting] | {"seconds": group.seconds}
        rows.append(row | _character(group))
    for method, best in (("Best of N", results.learned_best), ("Best of N-GT", results.true_best)):
        for entry in best[1:]:
            row = {"method": method, "setting": f"N {entry.n}", "seeds": 1}
            row |= _spread("reward", entry.reward) | _spread("kl", Interval(entry.kl, entry.kl, entry.kl))
            row |= _spread("win_rate", entry.win)
            rows.append(row | {"seconds": results.best_seconds})
    return rows


def _spread(name: str, interval: Interval | None) -> dict[str, float | None]:
    values = (None, None, None) if interval is None else interval
    return dict(zip((name, f"{name}_low", f"{name}_high"), values))


def _character(group: Group) -> dict[str, float]:
    """What the end's samples are like, means over seeds and prompts."""
    return {
        name: group.last[name].mean().item()
        for name in ("lengths", "ended", "repeated", "reference_token_logps")
    }


def win_rate_rows(results: Results) -> list[dict[str, Any]]:
    """Win rates over temperatures, on held-out prompts and on those of another kind: for win_rates.csv."""
    rows = []
    for group in results.groups:
        if "temperature_rewards" not in group.last:
            continue
        for prompts, key, opponents, temperatures in (
            ("held out", "temperature_rewards", results.opponents, TEMPERATURES),
            ("other", "other_rewards", results.other_opponents, OTHER_TEMPERATURES),
        ):
            for place, temperature in enumerate(temperatures):
                win = win_interval(group.last[key][:, place], opponents)
                row = {"method": group.method, "setting": group.setting, "prompts": prompts}
                rows.append(row | {"temperature": temperature} | _spread("win_rate", win))
    return rows


def path_rows(results: Results) -> list[dict[str, Any]]:
    """What the figures draw of trainings, for metrics.jsonl: a row for each setting, seed and look."""
    rows = []
    for group in results.groups:
        for seed, (rewards, log_ratios) in enumerate(zip(group.rewards, group.log_ratios)):
            for step, r, kl in zip(group.steps, rewards, log_ratios):
                wins = (1 + torch.sign(r - results.opponents)) / 2
                rows.append(
                    {"method": group.method, "setting": group.setting, "seed": seed, "step": step,
                     "reward": r.mean().item(), "reward_error": (r.std() / len(r) ** 0.5).item(),
                     "kl": kl.mean().item(), "kl_error": (kl.std() / len(kl) ** 0.5).item(),
                     "win_rate": wins.mean().item()}
                )  # fmt: skip
    return rows


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """The printed table."""
    early, late = (f"reward_within_{nats:g}_nats" for nats in NATS)
    header = (
        f"{'method':<13}{'setting':<14}{'seeds':>5} {'reward':>13} {'KL, nats':>13} {'win rate, %':>18} "
        f"{f'in {NATS[0]:g} nats':>12} {f'in {NATS[1]:g} nats':>12} {'steps':>6} {'sec':>5}"
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        win, low, high = (100 * row[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
        kl = f"<= {row['kl']:.2f}" if row["method"].startswith("Best") else _plus_minus(row, "kl")
        lines.append(
            f"{row['method']:<13}{row['setting']:<14}{row['seeds']:>5} {_plus_minus(row, 'reward'):>13} "
            f"{kl:>13} {f'{win:.0f} [{low:.0f}, {high:.0f}]':>18} {_plus_minus(row, early):>12} "
            f"{_plus_minus(row, late):>12} {row.get('steps', '-'):>6} {row['seconds']:>5.0f}"
        )
    note = (
        "Reward, KL and win rate (against a sample of the SFT model, a tie one half): of samples at "
        "temperature 1 of held-out prefixes, with 95 % intervals over prompts and seeds (seeds vary the "
        "training, not the SFT model or the pairs). "
        f"In {NATS[0]:g} and {NATS[1]:g} nats: the most reward on a training's way, from the SFT model in "
        "straight lines between looks, within that KL. Best of N: chosen by the learned reward (GT: the true "
        "one); its KL is an "
        "upper bound. Unlikelihood at α 1 is DPO without its weight. sec: of one training, without its looks."
    )
    return "\n".join([*lines, "", _paragraph(note)])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _plus_minus(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    return f"{value:z.2f} ± {(row[f'{name}_high'] - row[f'{name}_low']) / 2:.2f}"


# ------------------------------------------------------------------------------------------------- words


def budget_text(plan: Plan, runs: Sequence[Run]) -> str:
    """What every method may use."""
    used = {tuple(budget_of(run, plan).values()) for run in runs if run.kind != "none"}
    if len(used) != 1:
        raise AssertionError(f"the budgets differ, which is a bug in here: {used}")
    steps, completions, judged = used.pop()
    return _paragraph(
        f"Every method: {steps} gradient steps on {completions} completions each, AdamW at "
        f"{plan.learning_rate:g} after {plan.warmup} steps of warm-up, gradients clipped at 1, and "
        f"{judged:,} completions with a true reward behind them. The rate is one of three that were tried, "
        "once, on DPO and PPO-GT together; nothing is tuned for one method. PPO's "
        f"learned reward is fitted on top of that, in {REWARD_EPOCHS} epochs of the pairs."
    )


def labels_text(rows: Sequence[dict[str, Any]], noise: str) -> str:
    """How the pairs came about, and what that means for DPO."""
    pairs, left_out = sum(len(row["pairs"]) for row in rows), sum(row["left_out"] for row in rows)
    wrong = sum(row["rewards"][w] < row["rewards"][l] for row in rows for w, l in row["pairs"])
    text = (
        f"{pairs:,} pairs of {K * len(rows):,} completions of {len(rows):,} prefixes; {left_out} left out: "
    )
    if noise == "none":
        text += (
            "equal rewards. Labels are free of noise: the six pairs of a prefix agree with an order, so that "
            "every margin may grow for ever. The DPO loss then has no finite optimum for any beta, which "
            "acts through how far these steps and this network go (derivations.md, D11.6 and E40); see also "
            "--label-noise."
        )
    else:
        text += (
            f"the same completion twice. Labels by Bradley-Terry: {wrong / pairs:.0%} choose the worse one. "
            "Where a prefix's labels run in a circle through all its completions, the DPO loss has a finite "
            "optimum for them, which depends on beta (derivations.md, D11.6)."
        )
    return _paragraph(text)


def comparison_text(results: Results, rows: Sequence[dict[str, Any]]) -> str:
    """DPO beside PPO at equal divergence, beside what is possible, and what each had seen."""
    lines = ["The most reward within a divergence, of each method's best setting (95 %):"]
    for method in ("DPO", "PPO", "PPO-GT"):
        lines.append(f"  {method:<12}" + "; ".join(_best_within(results, method, nats) for nats in NATS))
    for name, best in (("learned", results.learned_best), ("true", results.true_best)):
        entry = max((entry for entry in best if entry.kl <= NATS[0]), key=lambda entry: entry.n)
        lines.append(
            f"  {'best of N':<12}{entry.reward.value:z.2f} ± {entry.reward.half:.2f} in {entry.kl:.2f} nats "
            f"(N {entry.n}, by the {name} reward)"
        )
    kl, most = results.frontier[-1]
    lines.append(
        f"  {'possible':<12}{most:.2f} in {kl:.2f} nats (pi_ref exp(r / beta) / Z on 128 draws a prefix)"
    )
    judged = torch.tensor([reward for row in rows for reward in row["rewards"]])
    end = max(group.rewards[:, -1].mean().item() for group in results.groups if group.method == "PPO-GT")
    share = (judged >= end).double().mean()
    why = (
        f"What they learnt from: DPO saw the better one of two out of {len(judged):,} samples of the SFT "
        "model, one bit a pair; the learned reward knows the same, and orders "
        f"{results.accuracy:.0%} of {results.accuracy_pairs:,} held-out pairs rightly. So what best of N by "
        "that reward has more than DPO at the same divergence is not for want of pairs, and what best of N "
        "by the true reward has more still is. PPO-GT was told the rewards of as many completions, but its "
        f"own, which move to where reward is: it ended at {end:.2f}, which {share:.1%} of DPO's completions "
        "have. `frontier --pairs` measures exactly what is due to pairs, coverage, optimisation."
    )
    return "\n".join([*lines, _paragraph(why)])


def _best_within(results: Results, method: str, nats: float) -> str:
    found = [
        (reward_within(group, results.start, nats), group.setting)
        for group in results.groups
        if group.method == method
    ]
    best, setting = max(found, key=lambda entry: entry[0].value)
    return f"{best.value:z.2f} ± {best.half:.2f} in {nats:g} nats ({setting})"


def character_text(results: Results) -> str:
    """Lengths, repetitions, likelihood under the reference: where a policy stops being a language model."""
    lines = [
        "",
        f"{'what it writes':<26}{'tokens':>8}{'ended':>8}{'repeated':>10}{'log pi_ref a token':>20}",
    ]
    for group in results.groups:
        found = _character(group)
        lines.append(
            f"{group.label:<26}{found['lengths']:>8.1f}{found['ended']:>8.0%}{found['repeated']:>10.1%}"
            f"{found['reference_token_logps']:>20.2f}"
        )
    return "\n".join([*lines, "repeated: share of runs of three tokens that the sample had before."])


def sample_text(results: Results, world: World, shown: int, every: bool) -> str:
    """Samples of the same prompts side by side, with their rewards.

    Args: every: of all settings, else of those that were looked at everywhere.
    """
    lines = []
    for place in range(min(shown, SHOWN, len(world.held_out))):
        lines += ["", prompt_line(world.policy.tokenizer.decode(world.held_out[place]))]
        for group in results.groups:
            if every or "temperature_rewards" in group.last:
                reward = group.rewards[0, -1, place].item()
                lines += text_lines(_short(group.label), f"[{reward:+.2f}] {group.last['texts'][0][place]}")
    return "\n".join(lines)


def _short(label: str) -> str:
    return label.replace("Unlikelihood", "Unlikelih.")


# ------------------------------------------------------------------------------------------------- files


def write_report(
    folder: Path, results: Results, runs: Sequence[Run], plan: Plan, world: World, *, noise: str, what: str
) -> None:
    """Print everything, and write the tables, metrics.jsonl, samples.txt and the two figures."""
    from .figure import frontier_figure, win_rate_figure  # matplotlib: slow to import

    rows, drawn = table_rows(results, runs, plan), read_rows(folder)
    print("\n" + table_text(rows))
    for text in (budget_text(plan, runs), labels_text(drawn, noise), comparison_text(results, drawn)):
        print("\n" + text)
    print(character_text(results))
    print(sample_text(results, world, PRINTED, every=False))
    write_json(folder / "result.json", rows)
    _write_csv(folder / "table.csv", rows)
    _write_csv(folder / "win_rates.csv", win_rate_rows(results))
    write_records(folder / "metrics.jsonl", path_rows(results))
    text = sample_text(results, world, SHOWN, every=True).strip() + "\n"
    write_atomically(folder / "samples.txt", lambda path: path.write_text(text, encoding="utf-8"))
    frontier_figure(results, folder / "sentiment.png", what=what)
    win_rate_figure(results, folder / "win_rates.png")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda p: p.write_text(text.getvalue(), encoding="utf-8"))
