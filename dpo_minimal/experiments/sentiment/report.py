"""What the sentiment experiment prints and writes; how the numbers come about stands in results.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter

from ...text.runs import write_json, write_records
from ..study import Files, table, write_csv, write_text
from ..text.report import prompt_line, text_lines
from .methods import REWARD_EPOCHS, SHOWN, budget_of
from .results import CHARACTER, WITHIN, Group, Results, Row, path_rows
from .world import Plan, World

PRINTED = 2  # prompts whose samples are printed
COLUMNS = (
    ("method", "<12", ""), ("setting", "<13", ""), ("seeds", ">5", ""), ("reward", ">13", ""),
    ("KL, nats", ">13", ""), ("win rate, %", ">18", ""),
    *((f"in {nats:g} nats", ">12", "") for nats in WITHIN), ("steps", ">6", ""), ("sec", ">5", ".0f"),
)  # fmt: skip
CHARACTER_COLUMNS = (
    ("what it writes", "<26", ""), ("tokens", ">7", ".1f"), ("ended", ">7", ".0%"), ("repeated", ">9", ".1%"),
    ("log pi_ref a token", ">19", ".2f"),
)  # fmt: skip


def results_table(rows: Sequence[Row]) -> list[str]:
    """Every method and setting; of best of N the KL is an upper bound."""
    cells = []
    for row in rows:
        win, low, high = (100 * row[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
        kl = f"<= {row['kl']:.2f}" if row["method"].startswith("Best") else _plus_minus(row, "kl")
        cells.append(
            (row["method"], row["setting"], row["seeds"], _plus_minus(row, "reward"), kl,
             f"{win:.0f} [{low:.0f}, {high:.0f}]", *(_plus_minus(row, name) for name in WITHIN.values()),
             row.get("steps", "-"), row["seconds"])
        )  # fmt: skip
    return table(COLUMNS, cells)


def _plus_minus(row: Row, name: str) -> str:
    if row.get(name) is None:
        return "-"
    return f"{row[name]:z.2f} ± {(row[f'{name}_high'] - row[f'{name}_low']) / 2:.2f}"


def learnt_from(results: Results, plan: Plan, noise: str, drawn: Sequence[Row]) -> list[str]:
    """What every method may use, how the pairs came about, and what the learned and the true reward tell."""
    steps, completions, judged = budget_of(plan).values()
    pairs, left_out = sum(len(row["pairs"]) for row in drawn), sum(row["left_out"] for row in drawn)
    labels = "always the better one is chosen, so the DPO loss has no finite optimum (D11.6)"
    if noise != "none":
        wrong = sum(row["rewards"][w] < row["rewards"][l] for row in drawn for w, l in row["pairs"])
        labels = f"{wrong / pairs:.0%} of the Bradley-Terry labels choose the worse one"
    end = max(row["reward"] for row in results.rows if row["method"] == "PPO-GT")
    above = sum(reward >= end for row in drawn for reward in row["rewards"])
    return [
        f"Every method: {steps} gradient steps on {completions} completions each, AdamW at "
        f"{plan.learning_rate:g} after {plan.warmup} steps of warm-up.",
        f"Pairs: {pairs:,} of {judged:,} judged completions of {len(drawn):,} prefixes, {left_out} left out; "
        f"{labels}.",
        f"The learned reward, {REWARD_EPOCHS} epochs of the pairs, orders {results.accuracy:.0%} of "
        f"{results.pairs:,} held-out pairs rightly.",
        f"PPO-GT saw as many true rewards, of its own samples, and ended at {end:.2f}, which "
        f"{above / judged:.1%} of the pairs' completions have.",
    ]


def comparison(results: Results) -> list[str]:
    """DPO beside PPO and best of N at equal divergence, and beside what is possible."""
    lines = ["The most reward within a divergence, of each method's best setting (95 %):"]
    for method in ("DPO", "PPO", "PPO-GT"):
        of_method, texts = [row for row in results.rows if row["method"] == method], []
        for nats, name in WITHIN.items():
            best = max(of_method, key=itemgetter(name))
            texts.append(f"{_plus_minus(best, name)} in {nats:g} nats ({best['setting']})")
        lines.append(f"  {method:<12}" + "; ".join(texts))
    for name, entries in results.best.items():
        n, row = max((n, row) for n, row in entries.items() if row["kl"] <= min(WITHIN))
        reward = f"{_plus_minus(row, 'reward')} in {row['kl']:.2f} nats"
        lines.append(f"  {'best of N':<12}{reward} (N {n}, by the {name} reward)")
    kl, most = results.frontier[-1]
    possible = f"{most:.2f} in {kl:.2f} nats (pi_ref exp(r / beta) / Z on 128 draws a prefix)"
    return [*lines, f"  {'possible':<12}{possible}"]


def sample_lines(world: World, shown: int, groups: Sequence[Group]) -> list[str]:
    """Samples of the same prompts side by side, with their rewards."""
    lines = []
    for place in range(min(shown, SHOWN, len(world.held_out))):
        lines += ["", prompt_line(world.policy.tokenizer.decode(world.held_out[place]))]
        for group in groups:
            label = group.label.replace("Unlikelihood", "Unlikelih.")
            reward = group.rewards[0, -1, place].item()
            lines += text_lines(label, f"[{reward:+.2f}] {group.last['texts'][0][place]}")
    return lines[1:]


def report(results: Results, plan: Plan, world: World, noise: str) -> list[str]:
    """Everything that is printed."""
    character = [(g.label, *(row[k] for k in CHARACTER)) for g, row in zip(results.groups, results.rows)]
    return [
        *results_table(results.rows), "", *learnt_from(results, plan, noise, world.rows), "",
        *comparison(results), "", *table(CHARACTER_COLUMNS, character), "",
        *sample_lines(world, PRINTED, results.full),
    ]  # fmt: skip


def files(results: Results, world: World, what: str) -> Files:
    """What writes each file of a run; what: where the reviews are from."""
    from .figure import frontier_figure, win_rate_figure  # matplotlib is slow to import

    return {
        "sentiment.png": partial(frontier_figure, results, what),
        "win_rates.png": partial(win_rate_figure, results),
        "table.csv": partial(write_csv, rows=results.rows),
        "win_rates.csv": partial(write_csv, rows=results.win_rates),
        "result.json": partial(write_json, content=results.rows),
        "metrics.jsonl": partial(write_records, records=path_rows(results)),
        "samples.txt": partial(write_text, text="\n".join([*sample_lines(world, SHOWN, results.groups), ""])),
    }
