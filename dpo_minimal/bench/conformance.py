"""Is my code the loss I think it is? Checks for anybody's pytest, and for `python -m dpo_minimal check`.

    verdict = check_dpo_loss(my_loss)
    assert verdict.passed, verdict.message

A check calls the function with small random inputs in float64 and compares its answers with this package's;
of what is trained on, also its gradient. What has to be assumed, as in which order the function takes its
arguments, is said in the message.

But: what is known of each function (mistakes.py); how a wrong answer is searched and shown (checks.py).
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..validation import InputError

if TYPE_CHECKING:
    from .checks import Verdict
    from .exercises import Exercise

Given = dict[str, Any]  # the inputs of one call, by name, in the order that is assumed
ANSWERS = ("losses", "loss", "logps")  # what an entry or attribute with the answer may be called
PAIRS = "policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta"
WHAT = {  # what each check compares with, and the inputs in their order
    "dpo_loss": f"DPO's loss -log sigmoid(margin) (Eq. 7) [D4.3], of {PAIRS}",
    "dpo_gradient_weight": "DPO's weight beta sigmoid(-margin) (Eq. 21) [D5.1], of inputs as dpo_loss",
    "ipo_loss": "IPO's loss, the square around 1/(2 beta) [D12.1], of inputs as dpo_loss",
    "cdpo_loss": "conservative DPO's loss [D12.2], of inputs as dpo_loss, and label_smoothing",
    "kto_loss": "KTO's loss [D12.4], of policy_logps, reference_logps, is_desirable, kl_estimate, beta, "
    "desirable_weight, undesirable_weight",
    "reward_model_loss": "Bradley-Terry's loss (Eq. 2) [D2.2], of chosen_rewards, rejected_rewards",
    "sequence_logps": "log pi(y|x), a sum over tokens [D9.1], of logits (B, T, V), ids (B, T), mask (B, T), "
    "True at the completion's tokens; or by name of labels (ids with -100 outside the completion), "
    "prompt_lengths, lengths; the first half of the rows are chosen, the second rejected",
    "optimal_policy": "log pi* (X, Y) (Eq. 4) [D3.3], of ref_logps (X, Y), rewards (X, Y), beta",
    "plackett_luce": "log-probabilities of rankings (Eq. 18) [D8.1], of ranked_rewards (B, K), best first",
    "implicit_reward": "beta log(pi / pi_ref) (Eq. 5) [D4.1], of logps, ref_logps, beta",
    "kl_estimate": "an unbiased KL(pi || pi_ref) [D7.6], of logps, ref_logps of samples of pi",
}


def _checker(name: str) -> Callable[..., Verdict]:
    """The public check of one function."""

    def check(f: Callable, arguments: str | None = None, scale=1.0, gradient=True, **fixed: Any) -> Verdict:
        """Args:
            f: called with these inputs, log-probabilities as (B,) in nats: by name if all its parameters have
                such names, else in this order. It returns one number a row, or the mean of a loss: alone,
                first in a tuple, or as `losses`, `loss` or `logps` of a dict or object.
            arguments: another order, as in a call: "policy_rejected_logps, policy_chosen_logps, tau=beta".
            scale: a constant factor of f's answers, by which they are divided; 1 / math.log(2) for bits.
            gradient: False where no gradient is needed, as for the reference.
            fixed: the inputs that have one value: beta=0.1 for a function that takes no beta.
        Returns: the Verdict: `passed`, `message`, and `mistake`, the name of the known one that f makes.
        Raises: InputError: f cannot be called so, an input is unknown, or Hypothesis is not installed.
        """
        return _check(name, f, arguments, scale, gradient, fixed)

    check.__name__ = check.__qualname__ = f"check_{name}"
    check.__doc__ = f"Whether f is {WHAT[name]}.\n\n        {check.__doc__}"
    return check


CHECKS = {name: _checker(name) for name in WHAT}
globals().update({check.__name__: check for check in CHECKS.values()})


def _check(name: str, f: Any, arguments: str | None, scale: float, gradient: bool, fixed: Given) -> Verdict:
    try:
        from . import checks, mistakes
        from .exercises import Exercise, Strain, samples
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("hypothesis"):
            raise
        raise InputError('the checks need Hypothesis: pip install "dpo-minimal[test]".') from None
    inputs = mistakes.INPUTS[name]
    names = list(samples(inputs)[0])
    if unknown := sorted({*fixed} - {*names}):
        raise InputError(f"{unknown[0]} is no input of {name}; its inputs are {', '.join(names)}.")
    inputs = inputs.map(lambda given: given | fixed) if fixed else inputs
    probe = max(samples(inputs), key=lambda given: len(given[names[0]]))  # of several rows
    call, assumed = _caller(f, name, probe, mistakes.all_names, arguments, fixed)

    def found(*values: Any) -> tuple[Any, str]:
        return _taken(call(dict(zip(names, values))), len(values[0]))

    def function(*values: Any) -> Any:
        answer, _ = found(*values)
        return averaged(answer / scale) if isinstance(answer, Tensor) else answer

    with checks.silence():
        first = checks._outcome(found, probe)
    answer, taken = first if isinstance(first, tuple) else (None, "")  # it raises, as `judge` will find
    is_mean = name.endswith("_loss") and isinstance(answer, Tensor) and answer.dim() == 0
    averaged = torch.mean if is_mean or name == "kl_estimate" else lambda answers: answers
    taken = f"{taken or 'its one number'}, the mean over the batch" if is_mean else taken
    assumed += [f"the answer is {taken}"] * bool(taken) + [f"it has the factor {scale:.5g}"] * (scale != 1)

    wrong = {said: _then(averaged, mistake) for said, mistake in mistakes.mistakes_of(name).items()}
    right = _then(averaged, mistakes.RIGHT[name])
    far = probe | mistakes.FAR
    strain = Strain(far, right(**far)) if {*mistakes.FAR} <= {*names} else None
    exercise = Exercise("", name, inputs, right, "this package's answers", wrong, strain=strain)
    verdict = checks.judge(exercise, function, mistakes.symptom)
    if verdict.passed and gradient and name in mistakes.SLOPES:
        slopes = checks.judge(*_of_slopes(exercise, function, names, mistakes.SLOPES[name]))
        both = verdict._replace(message=f"{verdict.message}\n  Its gradient is right, too.")
        verdict = both if slopes.passed else slopes
    lines = [line for entry in assumed for line in textwrap.wrap(entry, 90)]
    return verdict._replace(message="\n".join([verdict.message, *checks._rows("assumed", lines)]))


def _then(last: Callable, first: Callable) -> Callable:
    return lambda *values, **given: last(first(*values, **given))


def _of_slopes(exercise: Exercise, function: Callable, names: list[str], wanted: tuple[str, ...]):
    """The exercise of the gradient in the inputs that are wanted, and the function's answer to it."""

    def slopes(f: Callable, *values: Any) -> tuple[Tensor, ...]:
        given = dict(zip(names, values))
        leaves = {name: given[name].clone().requires_grad_() for name in wanted}
        try:
            total = f(*(given | leaves).values()).sum()
        except RuntimeError:  # numpy refuses what needs a gradient
            total = torch.zeros(())
        if not total.requires_grad:
            return tuple(map(torch.zeros_like, leaves.values()))
        return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)

    def right(*values: Any) -> tuple[Tensor, ...]:
        return slopes(lambda *values: exercise.expected(**dict(zip(names, values))), *values)

    def only(*kept: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *values: tuple(slope * (n in kept) for n, slope in zip(wanted, right(*values)))

    mistakes = {"the scores are computed without gradient, so that nothing is learnt": only()}
    mistakes |= {f"no gradient reaches {lost}: it is detached": only(*{*wanted} - {lost}) for lost in wanted}
    of_slopes = exercise._replace(
        function=f"{exercise.function} has right values; its gradient in {' and '.join(wanted)}",
        expected=lambda **given: right(*given.values()), source="autograd",
        mistakes=mistakes, strain=None, within=1e-5,  # float32 inside
    )  # fmt: skip
    return of_slopes, partial(slopes, function)


# ------------------------------------------------------------------------------- calling somebody's function


def _caller(f: Any, name: str, given: Given, all_names: Callable, arguments: str | None, fixed: Given):
    """The call of f with inputs by name, and what is assumed of its arguments, as lines."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # as some functions that are written in C have none
        raise InputError(f"check_{name} takes the function itself, got {type(f).__name__}.") from None
    possible = [arguments] if arguments is not None else _possible(signature, given, all_names(given), fixed)
    for text in possible:
        try:
            code = compile(f"f({text})", "arguments", "eval")
            eval(code, {"f": signature.bind} | all_names(given))
            break
        except SyntaxError:
            raise InputError(f"arguments {text!r}: write them as in a call, inputs by name.") from None
        except NameError as error:
            there = ", ".join(all_names(given))
            raise InputError(f"{error.name} is no input of {name}; it has {there}.") from None
        except Exception as error:  # the signature's, or one of an expression
            reason = error
    else:
        raise InputError(
            f"{getattr(f, '__name__', 'f')} cannot be called with what {name} reads ({reason}); say how with "
            f'arguments="{", ".join(given)}", in its own order.'
        )
    guessed = arguments is None and not all("=" in argument for argument in text.split(", "))
    assumed = [f"the arguments are, in this order, {text}"] * guessed
    return lambda given: eval(code, {"f": f} | all_names(given)), assumed


def _possible(signature: inspect.Signature, given: Given, derived: Given, fixed: Given) -> list[str]:
    """As in a call: all by name; or in the order of the inputs, but numbers by name; or all in this order."""
    parameters = signature.parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    inputs = given if "mask" in parameters else derived  # labels beside a mask are ids
    named = [n for n in (given if inspect.Parameter.VAR_KEYWORD in kinds else parameters) if n in inputs]
    ordered = [n for n in given if n in parameters or n not in fixed]
    mixed = [n if isinstance(given[n], Tensor) else f"{n}={n}" for n in ordered]
    by_name = named and inspect.Parameter.VAR_POSITIONAL not in kinds
    calls = [[f"{n}={n}" for n in named]] * bool(by_name) + [mixed, ordered]
    return [", ".join(call) for call in calls]


def _taken(answer: Any, rows: int) -> tuple[Any, str]:
    """The answer within what a function returns, as a tensor where it can be one, and where it stood."""
    taken = ""
    fields = answer if isinstance(answer, Mapping) else {n: getattr(answer, n, None) for n in ANSWERS}
    if key := next((name for name in ANSWERS if fields.get(name) is not None), None):
        taken, answer = f"its {key}", fields[key]
    elif isinstance(answer, tuple) and answer:
        halves = [part for part in answer[:2] if isinstance(part, Tensor) and part.shape == (rows // 2,)]
        taken = "its first two values" if len(halves) == 2 else f"the first of its {len(answer)} values"
        answer = torch.cat(halves) if len(halves) == 2 else answer[0]
    if isinstance(answer, list) and answer and all(isinstance(entry, Tensor) for entry in answer):
        answer = torch.stack(answer)
    try:  # Python's numbers have 64 bits, where torch would give them 32
        return torch.as_tensor(answer, dtype=None if hasattr(answer, "dtype") else torch.float64), taken
    except (TypeError, ValueError, RuntimeError):
        return answer, taken
