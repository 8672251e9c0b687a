"""`python -m dpo_minimal judge`: a language model says which of two answers is better, as in the paper.

  dpo-minimal judge --pairs FILE --endpoint http://127.0.0.1:8000/v1 --model NAME --prompt summary-concise
  dpo-minimal judge --agreement runs/judge-001/verdicts.jsonl    does it agree with people? asks nobody

Rows are {"prompt", "a", "b"}, with "id" and "people" (labels "a", "b", "tie") if you like. Any server with
OpenAI's chat completions is asked, by POST ENDPOINT/chat/completions, with /v1 between where it is missing.
Which answer is shown first is drawn, and undone afterwards; replies that are not A, B or tie are counted.
With --cache a second run asks nothing, and an interrupted one goes on. The key is sent, and written nowhere.
"""

from __future__ import annotations

import argparse
import os
import random
from functools import partial
from pathlib import Path

import torch

from ..rivals import judge
from ..rivals.evaluate import Interval, win_rate
from ..text.files import Row, read_rows
from ..text.runs import refuse_used_folder, write_json, write_records
from ..validation import InputError
from .options import RUN, Option, add_options, resolve
from .study import run_folder

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
        "workers": Option("questions asked at a time", int, 4),
        "key_variable": Option("environment variable with the key", str, "OPENAI_API_KEY", metavar="NAME"),
        "cache": Option("file of replies", str, "runs/judge-cache.jsonl", metavar="FILE"),
    },
    "people": {"agreement": Option("rows to read, without asking", str, metavar="FILE")},
    "run": {"output_dir": RUN["output_dir"]},
}  # fmt: skip
add_arguments = partial(add_options, groups=GROUPS)


def run(args: argparse.Namespace) -> dict:
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
    rows = read_pairs(*((args.pairs, "prompt", "a", "b") if asking else (args.agreement, "judge")))
    result = (ask(args, key, rows) if asking else {}) | agreement(rows)
    if not result:
        raise InputError(f"{args.agreement}: has no a or b in 'people' with one in 'judge'; add some.")
    folder = run_folder("judge", vars(args))
    write_records(folder / "verdicts.jsonl", rows)
    write_json(folder / "result.json", result)
    for name, value in result.items():
        shown = "{:.3f}  [{:.3f}, {:.3f}]".format(*value) if isinstance(value, Interval) else value
        print(f"{name.replace('_', ' '):<32}{f'{shown:.2g}' if isinstance(shown, float) else shown}")
    if result.get("unparsed") == len(rows):
        print("No reply is A, B or tie: see verdicts.jsonl, and name a larger model.")
    if result.get("position_p", 1) < LEVEL:
        print(f"The judge prefers a position (p < {LEVEL}), which draws win rates towards 1/2.")
    print(f"Wrote {folder}: verdicts.jsonl, result.json, config.json. Intervals are of 95 %.")
    return result


def read_pairs(path: str, *fields: str) -> list[dict]:
    """Rows with `fields`, id and people. Raises InputError naming the row."""
    rows = []
    for number, (place, parse) in enumerate(read_rows(path), start=1):
        row = Row(place, parse())
        found = {name: row.text(name, row.get(name)) for name in fields}
        people, known = row.columns.get("people") or [], [l for l in LABELS if l != "unparsed"]
        if found.get("judge", "a") not in LABELS:
            raise row.error("judge", f"must be one of the labels {', '.join(LABELS)}")
        if not isinstance(people, list) or any(label not in known for label in people):
            raise row.error("people", f"must be a list of the labels {', '.join(known)}")
        rows.append({"id": row.columns.get("id", number)} | found | {"people": people})
    return rows


def ask(args: argparse.Namespace, key: str, rows: list[dict]) -> dict:
    """What the judge says is added to the rows; returns win rates of a, and the test for a position."""
    server, coin = judge.Server.at(args.endpoint, key), random.Random(args.seed)
    limit = {"max_tokens": args.max_tokens} if args.max_tokens else {}
    body = {"model": args.model, "temperature": 0} | limit
    for row in rows:
        row["asked"] = [{"first": first} for first in ("ab" if args.both_orders else coin.choice("ab"))]
    every = [(row, one) for row in rows for one in row["asked"]]
    bodies = [body | {"messages": judge.question(args.prompt, row, one["first"])} for row, one in every]
    texts, count = judge.replies(server, bodies, Path(args.cache), workers=args.workers)
    for (_, one), text in zip(every, texts):
        one |= {"verdict": judge.verdict_of(text, one["first"]), "reply": text}
    for row in rows:
        said = {one["verdict"] for one in row["asked"]}  # one verdict, or two that agree
        row["judge"] = "unparsed" if "unparsed" in said else said.pop() if len(said) == 1 else "tie"
    leans = [sum(LABELS[one["verdict"]] * LABELS[one["first"]] for one in row["asked"]) for row in rows]
    first, second = sum(lean > 0 for lean in leans), sum(lean < 0 for lean in leans)
    labels = {"": [row["judge"] for row in rows]}
    labels |= {f"_{f}_first": [one["verdict"] for _, one in every if one["first"] == f] for f in "ab"}
    scores = {name: torch.tensor([LABELS[v] for v in of if v != "unparsed"]) for name, of in labels.items()}
    return {
        "pairs": len(rows), "asked": count, **{label: labels[""].count(label) for label in LABELS},
        **{"win_rate" + name: win_rate(s, 0 * s) if len(s) else None for name, s in scores.items()},
        "prefers_first": first, "prefers_second": second, "position_p": judge.sign_test(first, second),
    }  # fmt: skip


def agreement(rows: list[dict]) -> dict:
    """Table 2, of the rows that people labelled: win rates of a, and how often who agrees; without ties."""
    rows = [row for row in rows if row["people"]]
    sides = ([row["judge"]] for row in rows), (row["people"] for row in rows)
    counts = [torch.tensor([[of.count(c) for c in "ab"] for of in side]).double() for side in sides]
    if not all(side.sum() for side in counts):
        return {}
    found = {"ties_of_people": sum(row["people"].count("tie") for row in rows)}
    for name, wins in zip(("judge", "people"), counts):
        found[f"win_rate_by_{name}"] = judge.clustered_share(wins[:, 0], wins.sum(1))
    for name, tables in zip(("judge_and_person", "two_people"), judge.label_tables(*counts)):
        found[f"{name}_comparisons"] = int(tables.sum())
        if len(some := tables[tables.sum((1, 2)) > 0]):
            found[f"{name}_agree"] = judge.clustered_share(some[:, 0, 0] + some[:, 1, 1], some.sum((1, 2)))
            found[f"{name}_kappa"] = judge.jackknife_interval(judge.kappa, some)
    return found
