"""What the sentiment experiment prints and writes: the table, what it says of DPO and PPO, samples to read.

But: how the numbers come about (results.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ...text.runs import write_json, write_records
from ..study import Files, paragraph, table, write_csv, write_text
from ..text.report import prompt_line, text_lines
from .methods import REWARD_EPOCHS, SHOWN, budget_of
from .results import CHARACTER, NATS, Group, Results, Row, path_rows
from .world import K, Plan, World

PRINTED = 2  # prompts whose samples are printed
EARLY, LATE = (f"reward_within_{nats:g}_nats" for nats in NATS)
COLUMNS = (
    ("method", "<12", ""), ("setting", "<13", ""), ("seeds", ">5", ""), ("reward", ">13", ""),
    ("KL, nats", ">13", ""), ("win rate, %", ">18", ""), (f"in {NATS[0]:g} nats", ">12", ""),
    (f"in {NATS[1]:g} nats", ">12", ""), ("steps", ">6", ""), ("sec", ">5", ".0f"),
)  # fmt: skip
CHARACTER_COLUMNS = (
    ("what it writes", "<26", ""), ("tokens", ">7", ".1f"), ("ended", ">7", ".0%"), ("repeated", ">9", ".1%"),
    ("log pi_ref a token", ">19", ".2f"),
)  # fmt: skip


def table_text(rows: Sequence[Row]) -> str:
    """The printed table."""
    cells = []
    for row in rows:
        win, low, high = (100 * row[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
        kl = f"<= {row['kl']:.2f}" if row["method"].startswith("Best") else _plus_minus(row, "kl")
        cells.append(
            (row["method"], row["setting"], row["seeds"], _plus_minus(row, "reward"), kl,
             f"{win:.0f} [{low:.0f}, {high:.0f}]", _plus_minus(row, EARLY), _plus_minus(row, LATE),
             row.get("steps", "-"), row["seconds"])
        )  # fmt: skip
    header, *lines = table(COLUMNS, cells)
    note = (
        "Reward, KL and win rate (against a sample of the SFT model, a tie one half): of samples at "
        "temperature 1 of held-out prefixes, with 95 % intervals over prompts and seeds (seeds vary the "
        f"training, not the SFT model or the pairs). In {NATS[0]:g} and {NATS[1]:g} nats: the most reward on "
        "a training's path, from the SFT model in straight lines between measurements, within that KL. "
        "Best of N: chosen by the learned reward (GT: the true one); its KL is an upper bound. Unlikelihood "
        "at α 1 is DPO without its weight. sec: of one training, without its measurements."
    )
    return "\n".join([header, "-" * len(header), *lines, "", paragraph(note)])


def _plus_minus(row: Row, name: str) -> str:
    if row.get(name) is None:
        return "-"
    return f"{row[name]:z.2f} ± {(row[f'{name}_high'] - row[f'{name}_low']) / 2:.2f}"


def budget_text(plan: Plan) -> str:
    """What every method may use."""
    steps, completions, judged = budget_of(plan).values()
    return paragraph(
        f"Every method: {steps} gradient steps on {completions} completions each, AdamW at "
        f"{plan.learning_rate:g} after {plan.warmup} steps of warm-up, gradients clipped at 1, and "
        f"{judged:,} completions with a true reward behind them. The rate is one of three that were tried, "
        "once, on DPO and PPO-GT together; nothing is tuned for one method. PPO's "
        f"learned reward is fitted on top of that, in {REWARD_EPOCHS} epochs of the pairs."
    )


def labels_text(rows: Sequence[Row], noise: str) -> str:
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
            "acts through how far these steps and this network go (laws/README.md, D11.6; "
            "notebooks/errata.md, E40); see also --label-noise."
        )
    else:
        text += (
            f"the same completion twice. Labels by Bradley-Terry: {wrong / pairs:.0%} choose the worse one. "
            "Where a prefix's labels run in a circle through all its completions, the DPO loss has a finite "
            "optimum for them, which depends on beta (laws/README.md, D11.6)."
        )
    return paragraph(text)


def comparison_text(results: Results, rows: Sequence[Row]) -> str:
    """DPO beside PPO at equal divergence, beside what is possible, and what each learnt from."""
    lines = ["The most reward within a divergence, of each method's best setting (95 %):"]
    for method in ("DPO", "PPO", "PPO-GT"):
        of_method = [row for row in results.rows if row["method"] == method]
        best = [(max(of_method, key=lambda row: row[name]), name) for name in (EARLY, LATE)]
        texts = [
            f"{_plus_minus(r, name)} in {kl:g} nats ({r['setting']})" for (r, name), kl in zip(best, NATS)
        ]
        lines.append(f"  {method:<12}" + "; ".join(texts))
    for name, entries in results.best.items():
        n, row = max((n, row) for n, row in entries.items() if row["kl"] <= NATS[0])
        reward = f"{_plus_minus(row, 'reward')} in {row['kl']:.2f} nats"
        lines.append(f"  {'best of N':<12}{reward} (N {n}, by the {name} reward)")
    kl, most = results.frontier[-1]
    lines.append(
        f"  {'possible':<12}{most:.2f} in {kl:.2f} nats (pi_ref exp(r / beta) / Z on 128 draws a prefix)"
    )
    judged = torch.tensor([reward for row in rows for reward in row["rewards"]])
    end = max(row["reward"] for row in results.rows if row["method"] == "PPO-GT")
    why = (
        f"What they learnt from: DPO saw the better one of two out of {len(judged):,} samples of the SFT "
        "model, one bit a pair; the learned reward knows the same, and orders "
        f"{results.accuracy:.0%} of {results.pairs:,} held-out pairs rightly. So what best of N by "
        "that reward has more than DPO at the same divergence is not for want of pairs, and what best of N "
        "by the true reward has more still is. PPO-GT learnt from the rewards of as many completions, but "
        f"its own, which move to where reward is: it ended at {end:.2f}, which "
        f"{(judged >= end).double().mean():.1%} of DPO's completions have. `frontier --pairs` measures "
        "exactly what is due to pairs, coverage, optimisation."
    )
    return "\n".join([*lines, paragraph(why)])


def character_text(results: Results) -> str:
    """Lengths, repetitions, likelihood under the reference: where a policy stops being a language model."""
    rows = [(g.label, *(row[name] for name in CHARACTER)) for g, row in zip(results.groups, results.rows)]
    note = "repeated: share of runs of three tokens that the sample had before."
    return "\n".join([*table(CHARACTER_COLUMNS, rows), note])


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


def report(results: Results, plan: Plan, world: World, noise: str, drawn: Sequence[Row]) -> list[str]:
    """Everything that is printed; drawn: the rows of preferences.jsonl."""
    return [
        table_text(results.rows), "", budget_text(plan), "", labels_text(drawn, noise), "",
        comparison_text(results, drawn), "", character_text(results), "",
        sample_text(world, PRINTED, results.full),
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
        "samples.txt": partial(write_text, text=sample_text(world, SHOWN, results.groups) + "\n"),
    }
