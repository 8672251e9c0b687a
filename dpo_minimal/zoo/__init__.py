"""Every loss by its name: those of the paper, and from each file of this folder the others.

A new loss is one file here, with a function and beside it its record; unlikelihood.py shows how short that
can be. Whatever uses losses reads `LOSSES` when it is called, so that a loss can also be added at run time:
`LOSSES["mine"] = Loss("mine", "Mine", my_function)`. `loss_on_table` takes a function without any record.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..losses import DPO, PLACKETT_LUCE, Loss
from ..validation import InputError

LOSSES: dict[str, Loss] = {DPO.name: DPO}
for _file in iter_modules(__path__):
    for _name, _value in vars(import_module(f".{_file.name}", __name__)).items():
        if isinstance(_value, Loss):
            LOSSES[_value.name] = _value
        elif not _name.startswith("_") and getattr(_value, "__module__", "").endswith(f".zoo.{_file.name}"):
            globals()[_name] = _value  # so that zoo.simpo_loss needs no file's name
LOSSES[PLACKETT_LUCE.name] = PLACKETT_LUCE
TRL = {  # what TRL's loss_type calls otherwise
    "sigmoid": "dpo", "sigmoid_norm": "averaged_dpo", "exo_pair": "exo", "nca_pair": "nca",
    "sppo_hard": "sppo", "bco_pair": "bco", "aot_pair": "aot",
}  # fmt: skip


def no_such_loss(name: str, place: str = "", remedy: str = "choose") -> InputError:
    """For a name that is none of `LOSSES`; one of TRL's is answered with ours."""
    known = f"TRL's {name} is {TRL[name]} here" if name in TRL else f"{remedy} one of {', '.join(LOSSES)}"
    return InputError(f"{place}{name}: no such loss; {known}.")


_READ = {
    "policy": "π",
    "reference": "π_ref",
    "lengths": "token counts",
    "kl_estimate": "a divergence, which text estimates from mismatched completions of the whole batch",
}
_HEADER = """\
| `--loss-type` | loss | reads | options: range, default | at π = π_ref | optimum | source |
| --- | --- | --- | --- | --- | --- | --- |"""


def table_of_losses() -> str:
    """All records as a Markdown table, one row a loss, as it stands in this folder's README."""
    return "\n".join([_HEADER, *map(_row, LOSSES.values())])


def _row(loss: Loss) -> str:
    options = [
        f"`{o.name}` {o.range}, {'none' if o.default is None else f'{o.default:g}'}" for o in loss.options
    ]
    defaults = {option.name: option.default for option in loss.options}
    start = "–"
    if loss.start is not None and None not in defaults.values():
        start = f"{loss.start(2, **defaults):.4g}"
    reads = ("a ranking of " if loss.rows == "rankings" else "") + ", ".join(
        _READ[name] for name in loss.reads
    )
    reads += ", the other rows of the batch" if loss.reads_batch else ""
    optimum = "known" if callable(loss.optimum) else loss.optimum
    proved = f"{optimum}, [{loss.proof}]" if loss.proof else optimum
    cells = f"`{loss.name}`", loss.title, reads, "; ".join(options) or "–", start, proved, loss.source or "–"
    return f"| {' | '.join(cells)} |"
