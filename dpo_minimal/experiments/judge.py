"""`python -m dpo_minimal judge`: a language model says which of two answers is better, as in the paper.

  dpo-minimal judge --pairs FILE --endpoint http://127.0.0.1:8000/v1 --model NAME --prompt summary-concise
  dpo-minimal judge --agreement runs/judge-001/verdicts.jsonl    does it agree with people? asks nobody

Rows are {"prompt", "a", "b"}, with "id" and "people" (labels "a", "b", "tie") if you like. Any server with
OpenAI's chat completions is asked, by POST ENDPOINT/chat/completions; /v1 is added to an address without it.
Which answer is shown first is drawn, and undone afterwards. A reply that is not A, B or tie is counted as
unparsed. Replies are kept in --cache: a second run asks nothing, an interrupted one goes on. The key is sent
as a header and written nowhere. Rows of --agreement are {"judge", "people"}: the paper's Table 2.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..rivals import judge
from ..rivals.evaluate import Interval, win_rate
from ..text.files import Row, read_rows
from ..text.runs import new_run_folder, refuse_used_folder, versions, write_json, write_records
from ..validation import InputError, check_positive
from .options import RUN, Option, add_options, resolve

LEVEL = 0.01  # of the test for a position
LABELS = {"a": 1.0, "b": -1.0, "tie": 0.0, "unparsed": 0.0}
GROUPS = {
    "asking": {
        "pairs": Option("rows to judge", str, metavar="FILE"),
        "endpoint": Option("address of the server", str, metavar="URL"),
        "model": Option("name of the model there", str, metavar="NAME"),
        "prompt": Option("what is asked", str, choices=judge.PROMPTS),
        "both_orders": Option("ask each pair in both orders; where they disagree, it is a tie", bool),
        "seed": RUN["seed"]._replace(help="of the orders"),
        "max_tokens": Option("most tokens of a reply (default: the server decides)"),
        "timeout": Option("seconds without a byte", float, 120.0, check=check_positive),
        "workers": Option("questions asked at a time", int, 4),
        "key_variable": Option("environment variable with the key", str, "OPENAI_API_KEY", metavar="NAME"),
        "cache": Option("file of replies", str, "runs/judge-cache.jsonl", metavar="FILE"),
    },
    "run": {
        "agreement": Option("rows to compare, instead of asking", str, metavar="FILE"),
        "output_dir": RUN["output_dir"],
    },
}  # fmt: skip
add_arguments = partial(add_options, groups=GROUPS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ask or read, print, write a run folder. Returns what its result.json holds."""
    asking, key = args.agreement is None, os.environ.get(args.key_variable or "OPENAI_API_KEY", "")
    if absent := [n for n in ("pairs", "endpoint", "model", "prompt") if asking and getattr(args, n) is None]:
        raise InputError(f"judge needs --{absent[0]}, or only --agreement, which asks nobody.")
    args = resolve(
        args, GROUPS,
        (" ".join(GROUPS["asking"]), not asking, "{} is not used with --agreement; leave it out."),
        ("seed", bool(args.both_orders), "{} is not used with --both-orders; leave it out."),
        ("key_variable", not key, "{} names a variable that is empty; put the key there."),
    )  # fmt: skip
    refuse_used_folder(args.output_dir)
    rows = read_pairs(
        args.pairs if asking else args.agreement, ("prompt", "a", "b") if asking else ("judge",)
    )
    result = ask(args, key, rows) if asking else {}
    result |= agreement(rows)
    if not result:
        raise InputError(
            f"{args.agreement}: no row has a or b in 'people', and in 'judge' beside it; add some."
        )
    folder = new_run_folder(args.output_dir, "judge")
    write_records(folder / "verdicts.jsonl", rows)
    write_json(folder / "result.json", result)
    write_json(folder / "config.json", {"command": "judge", **vars(args), **versions()})
    for name, value in result.items():
        shown = "{:.3f}  [{:.3f}, {:.3f}]".format(*value) if isinstance(value, Interval) else value
        print(f"{name.replace('_', ' '):<32}{shown}")
    if result.get("position_p", 1) < LEVEL:
        print(f"The judge prefers a position (p < {LEVEL}), which draws win rates towards 1/2.")
    print(f"Wrote {folder}: verdicts.jsonl, result.json, config.json; intervals are of 95 %.")
    return result


def read_pairs(path: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows with `fields`, id and people. Raises InputError naming the row."""
    rows: dict[str, dict[str, Any]] = {}
    for number, (place, parse) in enumerate(read_rows(path), start=1):
        row = Row(place, parse())
        found = {"id": row.columns.get("id", number), "people": row.columns.get("people", [])}
        rows[str(found["id"])] = found | {name: row.text(name, row.get(name)) for name in fields}
        if len(rows) < number:
            raise row.error("id", "is that of an earlier row; give each pair its own")
        for name in {"people", "judge"} & set(row.columns):
            labels = [row.columns[name]] if name == "judge" else row.columns[name]
            if not isinstance(labels, list) or any(label not in LABELS for label in labels):
                raise row.error(name, f"must be of the labels {', '.join(LABELS)}")
    return list(rows.values())


def ask(args: argparse.Namespace, key: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the judge says is added to the rows; returns win rates of a, and the test for a position."""
    server, coin = judge.Server.at(args.endpoint, key, args.timeout), random.Random(args.seed)
    settings = {"model": args.model, "temperature": 0}
    settings |= {"max_tokens": args.max_tokens} if args.max_tokens else {}
    orders = [("ab", "ba") if args.both_orders else coin.choice((("ab",), ("ba",))) for _ in rows]
    shown = [(row, order) for row, some in zip(rows, orders) for order in some]
    asked = [judge.question(args.prompt, row["prompt"], row[i], row[j]) for row, (i, j) in shown]
    bodies = [settings | {"messages": messages} for messages in asked]
    texts, count = judge.replies(server, bodies, Path(args.cache), workers=args.workers)
    for (row, order), text in zip(shown, texts):
        said = {"first": order[0], "verdict": judge.verdict_of(text, order[0]), "reply": text}
        row["asked"] = [*row.get("asked", ()), said]
    leans = []  # of each pair, towards the answer shown first
    for row in rows:
        said = {one["verdict"] for one in row["asked"]}
        row["judge"] = "unparsed" if "unparsed" in said else said.pop() if len(said) == 1 else "tie"
        leans.append(sum(LABELS[one["verdict"]] * LABELS[one["first"]] for one in row["asked"]))
    first, second = sum(lean > 0 for lean in leans), sum(lean < 0 for lean in leans)
    labels = [row["judge"] for row in rows]
    place = {f: [one["verdict"] for row in rows for one in row["asked"] if one["first"] == f] for f in "ab"}
    return {
        "pairs": len(rows), "questions": len(bodies), "asked": count,
        **{label: labels.count(label) for label in LABELS}, "win_rate": _rate(labels),
        "win_rate_shown_first": _rate(place["a"]), "win_rate_shown_second": _rate(place["b"]),
        "prefers_first": first, "prefers_second": second, "position_p": judge.sign_test(first, second),
    }  # fmt: skip


def _rate(verdicts: list[str]) -> Interval | None:
    scores = torch.tensor([LABELS[verdict] for verdict in verdicts if verdict != "unparsed"])
    return win_rate(scores, torch.zeros_like(scores)) if len(scores) else None


def agreement(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Table 2: win rates of a, and how often who agrees, on the pairs that people labelled; without ties."""
    rows = [row for row in rows if row["people"]]
    sides = ([row["judge"]] for row in rows), (row["people"] for row in rows)
    counts = [torch.tensor([[of.count(c) for c in "ab"] for of in side]).double() for side in sides]
    if not rows or not all(side.sum() for side in counts):
        return {}
    found: dict[str, Any] = {"ties_of_people": sum(row["people"].count("tie") for row in rows)}
    for name, wins in zip(("judge", "people"), counts):
        found[f"win_rate_by_{name}"] = judge.clustered_share(wins[:, 0], wins.sum(1))
    for name, tables in zip(("judge_and_person", "two_people"), judge.label_tables(*counts)):
        found[f"{name}_comparisons"] = int(tables.sum())
        if len(some := tables[tables.sum((1, 2)) > 0]):
            hits, kappa = some.diagonal(dim1=1, dim2=2).sum(-1), judge.jackknife_interval(judge.kappa, some)
            found[f"{name}_agree"] = judge.clustered_share(hits, some.sum((1, 2)))
            found[f"{name}_kappa"] = kappa if math.isfinite(kappa.value) else None  # all labels are alike
    return found
