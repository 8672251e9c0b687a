"""What the sentiment experiment prints and writes: the table, what it says of DPO and PPO, samples to read.

But: how the numbers come about (results.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...text.runs import write_json, write_records
from ..study import paragraph, table, write_csv, write_text
from ..text.report import prompt_line, text_lines
from .data import K, Plan
from .methods import REWARD_EPOCHS, Run, budget_of
from .results import NATS, Group, Interval, Results, crossed_interval, reward_within, win_interval
from .runs import OTHER_TEMPERATURES, SHOWN, TEMPERATURES
from .world import World

PRINTED = 2  # prompts whose samples are printed


# -------------------------------------------------------------------------------------------------- rows


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
            within = reward_within(group, results.start, nats) if group.method != "SFT" else (None,) * 3
            row |= _spread(f"reward_within_{nats:g}_nats", within)
        row |= budgets[group.method, group.setting] | {"seconds": group.seconds}
        rows.append(row | _character(group))
    for method, best in (("Best of N", results.learned_best), ("Best of N-GT", results.true_best)):
        for entry in best[1:]:
            row = {"method": method, "setting": f"N {entry.n}", "seeds": 1}
            row |= _spread("reward", entry.reward) | _spread("kl", (entry.kl,) * 3)
            rows.append(row | _spread("win_rate", entry.win) | {"seconds": results.best_seconds})
    return rows


def _spread(name: str, interval: Interval | tuple) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval))


def _character(group: Group) -> dict[str, float]:
    """What the end's samples are like, means over seeds and prompts."""
    names = ("lengths", "ended", "repeated", "reference_token_logps")
    return {name: group.last[name].mean().item() for name in names}


def win_rate_rows(results: Results) -> list[dict[str, Any]]:
    """Win rates over temperatures, on held-out prompts and on those of another kind: for win_rates.csv."""
    rows = []
    for group in results.full:
        for prompts, key, opponents, temperatures in (
            ("held out", "temperature_rewards", results.opponents, TEMPERATURES),
            ("other", "other_rewards", results.other_opponents, OTHER_TEMPERATURES),
        ):
            for place, temperature in enumerate(temperatures):
                row = {"method": group.method, "setting": group.setting, "prompts": prompts}
                win = win_interval(group.last[key][:, place], opponents)
                rows.append(row | {"temperature": temperature} | _spread("win_rate", win))
    return rows


def path_rows(results: Results) -> list[dict[str, Any]]:
    """What the figures draw of trainings, for metrics.jsonl: a row for each setting, seed and measurement."""
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


# ------------------------------------------------------------------------------------------------- table

COLUMNS = (
    ("method", "<12", ""), ("setting", "<13", ""), ("seeds", ">5", ""), ("reward", ">13", ""),
    ("KL, nats", ">13", ""), ("win rate, %", ">18", ""), (f"in {NATS[0]:g} nats", ">12", ""),
    (f"in {NATS[1]:g} nats", ">12", ""), ("steps", ">6", ""), ("sec", ">5", ".0f"),
)  # fmt: skip


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """The printed table."""
    early, late = (f"reward_within_{nats:g}_nats" for nats in NATS)
    cells = []
    for row in rows:
        win, low, high = (100 * row[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
        kl = f"<= {row['kl']:.2f}" if row["method"].startswith("Best") else _plus_minus(row, "kl")
        cells.append(
            (row["method"], row["setting"], row["seeds"], _plus_minus(row, "reward"), kl,
             f"{win:.0f} [{low:.0f}, {high:.0f}]", _plus_minus(row, early), _plus_minus(row, late),
             row.get("steps", "-"), row["seconds"])
        )  # fmt: skip
    header, *lines = table(COLUMNS, cells)
    note = (
        "Reward, KL and win rate (against a sample of the SFT model, a tie one half): of samples at "
        "temperature 1 of held-out prefixes, with 95 % intervals over prompts and seeds (seeds vary the "
        "training, not the SFT model or the pairs). "
        f"In {NATS[0]:g} and {NATS[1]:g} nats: the most reward on a training's way, from the SFT model in "
        "straight lines between looks, within that KL. Best of N: chosen by the learned reward (GT: the true "
        "one); its KL is an "
        "upper bound. Unlikelihood at α 1 is DPO without its weight. sec: of one training, without its looks."
    )
    return "\n".join([header, "-" * len(header), *lines, "", paragraph(note)])


def _plus_minus(row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        return "-"
    return f"{row[name]:z.2f} ± {(row[f'{name}_high'] - row[f'{name}_low']) / 2:.2f}"


# ------------------------------------------------------------------------------------------------- words


def budget_text(plan: Plan, runs: Sequence[Run]) -> str:
    """What every method may use."""
    used = {tuple(budget_of(run, plan).values()) for run in runs if run.kind != "none"}
    if len(used) != 1:
        raise AssertionError(f"the budgets differ, which is a bug in here: {used}")
    steps, completions, judged = used.pop()
    return paragraph(
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
    return paragraph(text)


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
    why = (
        f"What they learnt from: DPO saw the better one of two out of {len(judged):,} samples of the SFT "
        "model, one bit a pair; the learned reward knows the same, and orders "
        f"{results.accuracy:.0%} of {results.accuracy_pairs:,} held-out pairs rightly. So what best of N by "
        "that reward has more than DPO at the same divergence is not for want of pairs, and what best of N "
        "by the true reward has more still is. PPO-GT was told the rewards of as many completions, but its "
        f"own, which move to where reward is: it ended at {end:.2f}, which "
        f"{(judged >= end).double().mean():.1%} of DPO's completions have. `frontier --pairs` measures "
        "exactly what is due to pairs, coverage, optimisation."
    )
    return "\n".join([*lines, paragraph(why)])


def _best_within(results: Results, method: str, nats: float) -> str:
    groups = [group for group in results.groups if group.method == method]
    found = [(reward_within(group, results.start, nats), group.setting) for group in groups]
    best, setting = max(found, key=lambda entry: entry[0].value)
    return f"{best.value:z.2f} ± {best.half:.2f} in {nats:g} nats ({setting})"


def character_text(results: Results) -> str:
    """Lengths, repetitions, likelihood under the reference: where a policy stops being a language model."""
    columns = (("what it writes", "<26", ""), ("tokens", ">7", ".1f"), ("ended", ">7", ".0%"),
               ("repeated", ">9", ".1%"), ("log pi_ref a token", ">19", ".2f"))  # fmt: skip
    rows = [(group.label, *_character(group).values()) for group in results.groups]
    note = "repeated: share of runs of three tokens that the sample had before."
    return "\n".join([*table(columns, rows), note])


def sample_text(world: World, shown: int, groups: Sequence[Group]) -> str:
    """Samples of the same prompts side by side, with their rewards."""
    lines = []
    for place in range(min(shown, SHOWN, len(world.held_out))):
        lines += ["", prompt_line(world.policy.tokenizer.decode(world.held_out[place]))]
        for group in groups:
            label = group.label.replace("Unlikelihood", "Unlikelih.")
            reward = group.rewards[0, -1, place].item()
            lines += text_lines(label, f"[{reward:+.2f}] {group.last['texts'][0][place]}")
    return "\n".join(lines[1:])


# ------------------------------------------------------------------------------------------------- all of it


def report(
    results: Results, runs: Sequence[Run], plan: Plan, world: World, noise: str, drawn: Sequence[dict]
) -> str:
    """Everything that is printed; drawn: the rows of preferences.jsonl."""
    return "\n\n".join(
        [
            table_text(table_rows(results, runs, plan)), budget_text(plan, runs), labels_text(drawn, noise),
            comparison_text(results, drawn), character_text(results),
            sample_text(world, PRINTED, results.full),
        ]
    )  # fmt: skip


def files(
    results: Results, runs: Sequence[Run], plan: Plan, world: World, what: str
) -> dict[str, Callable[[Path], None]]:
    """The files of a run; what: where the reviews are from."""
    from .figure import frontier_figure, win_rate_figure  # matplotlib is slow to import

    rows = table_rows(results, runs, plan)
    return {
        "sentiment.png": partial(frontier_figure, results, what),
        "win_rates.png": partial(win_rate_figure, results),
        "table.csv": partial(write_csv, rows=rows),
        "win_rates.csv": partial(write_csv, rows=win_rate_rows(results)),
        "result.json": partial(write_json, content=rows),
        "metrics.jsonl": partial(write_records, records=path_rows(results)),
        "samples.txt": partial(write_text, text=sample_text(world, SHOWN, results.groups) + "\n"),
    }
