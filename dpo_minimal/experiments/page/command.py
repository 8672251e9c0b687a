"""`python -m dpo_minimal page`: one HTML file to play with, for a lecture or for oneself.

It needs no server and no network: any browser opens it from disk, on a projector or a telephone. Sliders move

  beta               from pi* near the best completion to pi* near the reference              (Eq. 4)
  a training         towards pi*, beside the bound that its gradient proves                   (Eq. 7)
  the pairs' pulls   the gradient weights of every pair during that training
  a point            along the reward-KL frontier, above which there is no policy             (Eq. 3)
  a small GPT        whose tokens each add their part to the margin of a pair

All numbers are computed beforehand, by the library, and stand in the file; the page looks them up and draws.

  dpo-minimal page                              writes page.html, in some eight seconds
  dpo-minimal page --beta 0.5 --output slides/dpo.html
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...text.runs import write_text
from ...validation import InputError, check_range
from ..options import COMMON, Option, add_options, resolve
from .frames import world_frames
from .words import word_frames

OPTIONS = {
    "options": {
        "output": Option("the file to write", str, "page.html", metavar="FILE"),
        "force": Option("overwrite the file", bool),
        "beta": Option(
            "of both trainings; the slider of beta covers 1/16 to 32", float, 1.0,
            check=partial(check_range, low=0.05, high=5.0, reason="beyond, the bars of pi* hardly move"),
        ),  # for rewards that are 0.5 to 5.5 apart
        # In this world the best completion is the one that the reference gives least often.
        "seed": COMMON["seed"]._replace(help="of the world and of the GPT", default=4),
    }
}  # fmt: skip
add_arguments = partial(add_options, groups=OPTIONS)
TEMPLATE, PLACE = Path(__file__).with_name("page.html"), "{{frames}}"


def run(args: argparse.Namespace) -> Path:
    """Check, compute, write the page and say how to open it; returns its path."""
    torch.set_num_threads(1)
    options = resolve(args, OPTIONS)
    path = Path(options.output)
    refuse(path, force=bool(options.force))
    print("Computing what the sliders show: the optimum, two trainings, the frontier.", flush=True)
    write_text(path, page(options.beta, options.seed))
    size = f"{path.stat().st_size / 1e6:.2f} MB"
    print(f"Wrote {path}, {size}. Open it in a browser: {path.resolve().as_uri()}")
    return path


def refuse(path: Path, *, force: bool) -> None:
    """Raise InputError where the page could not be written, before it is computed."""
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}; make it or name another file.")
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder; name a file in it, such as {path / 'page.html'}.")
    if path.exists() and not force:
        raise InputError(f"--output {path}: exists already; overwrite it with --force or name another file.")


def page(beta: float, seed: int) -> str:
    """The HTML: the template with the frames as JSON in it. The same arguments give the same text."""
    frames = world_frames(beta, seed) | {"words": word_frames(beta, seed)}
    text = json.dumps(shortened(frames), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace(PLACE, text.replace("<", "\\u003c"))  # no text may end the script that holds it


def shortened(value: Any) -> Any:
    """Floats with six significant digits, of which the page shows four at most."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value] if isinstance(value, list | tuple) else value
