"""A loss as the card sees it: (B, 2) tables of pairs in, (B,) losses out; or a sentence why it is none.

But: no numbers about it; those are in measures.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..bandit import loss_on_table
from ..losses import READS, Loss
from ..preferences import Rankings
from ..validation import InputError, check_positive

TABLES = ("policy", "reference", "lengths")  # whose columns a function without our names may take, in order
POSITIONS = TABLES[:2]  # of a function of which nothing else is said
BETA = 0.5  # where it is not given: with a smaller one the policies of small tables are all but certain
ROWS = 8  # of the example that every loss is first called with


class Subject:
    """A loss with its options, called as a function of tables.

    Args: loss, a record or a function; reads: the tables whose chosen and rejected columns its first
    parameters are, used only where no parameter has a name of `losses.READS`; options, its own.
    """

    def __init__(self, loss: Loss | Callable, reads: Sequence[str], options: dict[str, float] | None):
        self.record = loss if isinstance(loss, Loss) else _record(loss, reads)
        self.name = self.record.name
        if isinstance(loss, Loss):
            _check_unused(self.name, reads)
        parameters = inspect.signature(self.record.function).parameters.values()
        own = [p for p in parameters if p.name not in READS and p.kind is not p.VAR_KEYWORD]
        defaults = {p.name: p.default for p in own if isinstance(p.default, (int, float))}
        defaults |= {option.name: option.default for option in self.record.options}
        if "beta" not in defaults or isinstance(loss, Loss):
            defaults |= {p.name: BETA for p in own if p.name == "beta"}
        self.options = defaults | (options or {})
        if unused := set(self.options) - {p.name for p in own}:
            known = ", ".join(p.name for p in own) or "none"
            raise InputError(f"{self.name} has no option {min(unused)}; its options are: {known}.")
        if "beta" in self.options:
            check_positive("beta", self.options["beta"])

    def __call__(self, policy: Tensor, reference: Tensor, lengths: Tensor, kl_estimate: Any = 0.0) -> Tensor:
        """The losses (B,) of pairs (B, 2), the chosen one first; a divergence from the reference for losses
        that read one."""
        return _losses(self.name, self.answer(policy, reference, lengths, kl_estimate), len(policy))

    def answer(self, policy: Tensor, reference: Tensor, lengths: Tensor, kl_estimate: Any = 0.0) -> Any:
        """What the function itself returns for them."""
        tables = {"policy": policy, "reference": reference, "lengths": lengths, "kl_estimate": kl_estimate}
        return self.record.on({name: (lambda t=table: t) for name, table in tables.items()}, self.options)

    def on_table(self, logps: Tensor, ref_logps: Tensor, rankings: Rankings, lengths: Tensor) -> Tensor:
        """The losses (E,) of comparisons on tables (X, Y)."""
        record = replace(self.record, reads_batch=False)  # ends.py gives it batches of equally heavy rows
        answer = loss_on_table(record, logps, ref_logps, rankings, lengths=lengths, **self.options)
        return _losses(self.name, answer, len(rankings.weight)).double()

    def pulls(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, and the coefficients of -grad log pi(y_w) and +grad log pi(y_l), (B,) each, by autograd."""
        leaf = policy.clone().requires_grad_()
        losses = self(leaf, reference, lengths)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), -gradient[:, 0], gradient[:, 1]


def example(rows: int = ROWS, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference and token counts of some pairs, (rows, 2) each, the same every time.

    Args: scale of the log-ratios, nats.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 8, (rows, 2), generator=generator).double()
    level, ratio = (
        draw(rows, 2, generator=generator, dtype=torch.float64) for draw in (torch.rand, torch.randn)
    )
    reference = -lengths * (1 + level) - 5 * scale
    return reference + scale * ratio.clamp(-4, 4), reference, lengths


def examine(subject: Subject) -> None:
    """Raise InputError where the function is no loss of pairs that can be trained."""
    name = subject.name
    given = example()
    kept = [table.clone() for table in given]
    policy = given[0].requires_grad_()
    try:
        losses = subject(policy, *given[1:])
        again = subject(policy, *given[1:])
    except InputError:
        raise
    except Exception as error:
        if "inplace" in str(error) or "in-place" in str(error):  # torch's word for it
            raise InputError(f"{name} changes its own inputs; let it work on copies.") from error
        columns = ", ".join(name for name, read in subject.record.parameters.items() if read)
        raise InputError(
            f"{name} raises {type(error).__name__} ({error}) on {ROWS} ordinary pairs; it is called with "
            f"float64 tensors of shape ({ROWS},) for {columns}."
        ) from error
    if any(not torch.equal(table.detach(), before) for table, before in zip(given, kept)):
        raise InputError(f"{name} changes its own inputs; let it work on copies.")
    if not losses.isfinite().all():
        raise InputError(f"{name} gives {losses[~losses.isfinite()][0].item()} on ordinary pairs.")
    if not torch.equal(losses, again):
        raise InputError(f"{name} gives other losses when it is called again; a random loss has no card.")
    if not losses.requires_grad:
        raise InputError(
            f"{name} carries no gradient to the policy's log-probabilities; leave out detach, no_grad, item "
            "and numpy."
        )
    (gradient,) = torch.autograd.grad(losses.sum(), policy, allow_unused=True)
    if gradient is None or not gradient.abs().max() > 0:
        raise InputError(f"{name} has gradient zero in the policy's log-probabilities on ordinary pairs.")


def _losses(name: str, answer: Any, rows: int) -> Tensor:
    """The per-row losses of what a function returned: them, or a tuple that begins with them."""
    if isinstance(answer, (tuple, list)) and len(answer):
        answer = answer[0]
    if not isinstance(answer, Tensor) or not answer.is_floating_point():
        kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise InputError(f"{name} returns {kind}; return a float tensor of losses (B,).")
    if answer.shape != (rows,):
        found = "one number" if answer.dim() == 0 else f"shape {tuple(answer.shape)}"
        raise InputError(
            f"{name} returns {found} for {rows} pairs; return a loss for each, without the mean, (B,)."
        )
    return answer


def _record(function: Callable, reads: Sequence[str]) -> Loss:
    """The record of a function, or of another callable object, with parameters of our names."""
    if not callable(function):
        raise InputError(f"a loss must be a function or a record, got {function!r}.")
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
    function = function.forward if isinstance(function, torch.nn.Module) else function
    return Loss(name, name, _with_our_names(function, name, reads))


def _check_unused(name: str, reads: Sequence[str]) -> None:
    if tuple(reads) not in ((), POSITIONS):
        raise InputError(f"{name} tells what it reads by its parameters' names; leave out reads.")


def _with_our_names(function: Callable, name: str, reads: Sequence[str]) -> Callable:
    """The function itself where a parameter has a name of `losses.READS`; else one that passes the columns of
    `reads` by position."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except ValueError:  # of a builtin
        raise InputError(f"{name} does not tell its parameters; wrap it in a function of yours.") from None
    if any(p.name in READS for p in parameters):
        _check_unused(name, reads)
        return function
    if "policy" not in reads or not set(reads) <= set(TABLES):
        raise InputError(f"reads must name policy, and may name reference and lengths, got {tuple(reads)}.")
    columns = [name for name, (table, place) in READS.items() if table in reads and place is not None]
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(plain) < len(columns) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise InputError(
            f"{name} has {len(plain)} parameters by position, but {' and '.join(reads)} make "
            f"{len(columns)}; name them {', '.join(columns)}, or say what it reads."
        )

    def named(**given: Any) -> Any:
        return function(*[given.pop(name) for name in columns], **given)  # a generator would pop too late

    only = inspect.Parameter.KEYWORD_ONLY
    rest = [p for p in parameters if p not in plain[: len(columns)]]
    named.__signature__ = inspect.Signature([
        *(inspect.Parameter(name, only) for name in columns),
        *(p.replace(kind=only) for p in rest if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)),
    ])  # fmt: skip
    return named
