"""Is my code the loss I think it is? Checks for anybody's pytest, and for `python -m dpo_minimal check`.

    verdict = check_dpo_loss(my_loss)
    assert verdict.passed, verdict.message

A check calls the function with small random inputs in float64 and compares its answers with brute force; of
what is trained on, also its gradient with autograd of the library's function. What has to be assumed, as in
which order it takes its arguments, is said in the message.
"""

from __future__ import annotations

import ast
import inspect
import math
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

ANSWERS = ("losses", "loss", "logps")  # what an entry or attribute with the answer may be called


def _check(
    name: str, f: Callable[..., Any], arguments: str | None = None, scale=1.0, gradient=True, **fixed: Any
) -> Verdict:
    try:
        from . import checks, mistakes
        from .exercises import samples
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("hypothesis"):
            raise
        raise InputError('the checks need Hypothesis: pip install "dpo-minimal[test]".') from None
    exercise, ours, wanted, derived = mistakes.KNOWN[name]
    names = list(samples(exercise.inputs)[0])
    if unknown := sorted({*fixed} - {*names}):
        raise InputError(f"{unknown[0]} is no input of {name}; its inputs are {', '.join(names)}.")
    if fixed:
        exercise = exercise._replace(inputs=exercise.inputs.map(lambda given: given | fixed))
    probe = max(samples(exercise.inputs), key=lambda given: len(given[names[0]]))  # where a mean is no row
    call, assumed = _call(f, name, probe, derived, arguments, fixed)

    def function(*values: Any, **given: Any) -> Any:
        given = given or dict(zip(names, values))
        answer, _ = _taken(call(given), len(given[names[0]]))
        if name == "kl_estimate" and isinstance(answer, Tensor) and answer.dim() == 1:
            answer = answer.mean()
        return answer / scale if isinstance(answer, Tensor) else answer

    try:
        with checks._silence():
            answer, taken = _taken(call(checks.copy(probe)), len(probe[names[0]]))
    except (Exception, SystemExit):  # which `judge` will meet again
        answer, taken = None, ""
    if isinstance(answer, Tensor) and answer.dim() == 0 and name.endswith("_loss"):
        taken = f"{taken or 'its one number'}, the mean over the batch"
        exercise, ours = _of_means(exercise, names), _mean(ours)
    assumed += [f"the answer is {taken}"] * bool(taken) + [f"it has the factor {scale:.5g}"] * (scale != 1)
    verdict = checks.judge(exercise, function)
    if verdict.status == "wrong" and verdict.mistake is None:
        with checks._silence():
            verdict = verdict._replace(mistake=_symptom(exercise, function))
        seen = checks._rows("looks like", [verdict.mistake] if verdict.mistake else [])
        verdict = verdict._replace(message="\n".join([verdict.message, *seen]))
    elif verdict.passed and gradient and wanted:
        slopes, answer = _sloped(exercise, function, ours, names, wanted)
        if any(checks.complain(slopes, answer, given) for given in samples(exercise.inputs)):
            verdict = checks.judge(slopes, answer)
        else:
            verdict = verdict._replace(message=f"{verdict.message}\n  Its gradient is right, too.")
    assumed = [line for entry in assumed for line in textwrap.wrap(entry, 90)]
    return verdict._replace(message="\n".join([verdict.message, *checks._rows("assumed", assumed)]))


def _checker(name: str, doc: str) -> Callable[..., Verdict]:
    """The public check of one function."""

    def check(f: Callable[..., Any], **how: Any) -> Verdict:
        return _check(name, f, **how)

    check.__name__ = check.__qualname__ = f"check_{name}"
    check.__doc__ = doc + (" Otherwise as `check_dpo_loss`." if name != "dpo_loss" else "")
    return check


check_dpo_loss = _checker(
    "dpo_loss",
    """Whether f is DPO's loss, -log sigmoid(margin) of B pairs (Eq. 7) [D4.3], and has its gradient.

    Args:
        f: policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, each
            (B,) in nats, and beta -> losses. If all its parameters have such names, it gets these inputs,
            else this order is assumed. It may return one loss a row, or their mean: alone, first in a tuple,
            or as `losses` or `loss` of a dict or object.
        arguments: another order, as in a call: "policy_chosen_logps, policy_rejected_logps, beta=beta";
            constants may be among them, as in "logits, labels, average_log_prob=False".
        scale: a constant factor of f's answers, by which they are divided; 1 / math.log(2) for bits.
        gradient: False where no gradient is needed, as for the reference.
        Further keywords fix inputs: beta=0.1 for a function that takes no beta.
    Returns: the Verdict: `passed`, `message`, and `mistake`, the name of the known one that f makes.
    Raises: InputError: f cannot be called so, an input is unknown, or Hypothesis is not installed.
    """,
)
check_dpo_gradient_weight = _checker(
    "dpo_gradient_weight", "beta sigmoid(-margin), of the inputs of `check_dpo_loss` (Eq. 21) [D5.1]."
)
check_sequence_logps = _checker(
    "sequence_logps",
    """log pi(y|x), the sum over a row's completion tokens [D9.1].

    Args: f: (logits (B, T, V), ids (B, T), mask (B, T), True at the completion's tokens) -> (B,), or two of
        (B/2,): the first half of the rows are chosen, the second rejected. `arguments` may also name labels
        (B, T), the ids with -100 outside the completion, and prompt_lengths and lengths (B,).
    """,
)
check_optimal_policy = _checker(
    "optimal_policy", "f: (ref_logps (X, Y), rewards (X, Y), beta) -> log pi* (X, Y) (Eq. 4) [D3.3]."
)
check_plackett_luce = _checker(
    "plackett_luce", "f: ranked_rewards (B, K), best first -> log-probabilities (B,) (Eq. 18) [D8.1]."
)
check_implicit_reward = _checker(
    "implicit_reward", "f: (logps (B,), ref_logps (B,), beta) -> beta log(pi / pi_ref) (B,) (Eq. 5) [D4.1]."
)
check_reward_model_loss = _checker(
    "reward_model_loss", "f: (chosen_rewards (B,), rejected_rewards (B,)) -> losses (B,) (Eq. 2) [D2.2]."
)
check_kl_estimate = _checker(
    "kl_estimate", "f: (logps, ref_logps), both (N,), of samples of pi -> unbiased KL(pi || pi_ref) [D7.6]."
)
check_ipo_loss = _checker(
    "ipo_loss", "(h - 1 / (2 beta))^2, h the difference of log-ratios, of the inputs of DPO [D12.1]."
)
check_cdpo_loss = _checker(
    "cdpo_loss", "(1 - eps) l(u) + eps l(-u), of DPO's inputs and label_smoothing, which is eps [D12.2]."
)
check_kto_loss = _checker("kto_loss", "KTO's loss of the inputs of `kto_loss`, in their order [D12.4].")
CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


# ------------------------------------------------------------------------------- calling somebody's function


def _call(f, name: str, given: dict, derived: dict, arguments: str | None, fixed: dict):
    """The call of f with inputs by name, and what is assumed of its arguments, as lines."""
    if not callable(f):
        raise InputError(f"check_{name} takes the function itself, got {type(f).__name__}.")
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # of some that are written in C
        signature = inspect.signature(lambda *_: None)
    parameters = signature.parameters
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    everything = {*given} if any(p.kind == p.VAR_KEYWORD for p in parameters.values()) else set()
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD}
    known, keywords, assumed = {*given, *derived}, {}, []
    by_name = {*given} if "mask" in named else known  # labels beside a mask are ids
    if arguments is not None:
        places, keywords = _read(arguments, name, known)
    elif (required or everything) and required <= by_name & named:
        places, keywords = [], {n: n for n in named & by_name | everything}
    else:
        places = [n for n in given if n not in fixed or n in named]
        assumed = [f"the arguments are, in this order, {', '.join(places)}"]
    numbers = {n for n in named & {*given} if not isinstance(given[n], Tensor)}
    while places and isinstance(places[-1], str) and places[-1] in numbers:
        number = places.pop()  # given by its name, as other parameters may stand before it
        keywords[number] = number
    try:
        signature.bind(*places, **keywords)
    except TypeError as error:
        raise InputError(
            f"{getattr(f, '__name__', 'f')} cannot be called with what {name} reads ({error}); say how with "
            f'arguments="{", ".join(given)}", in its own order.'
        ) from None

    def call(inputs: dict[str, Any]) -> Any:
        more = {n: make(**inputs) for n, make in derived.items()} | inputs
        values = [
            more[entry] if isinstance(entry, str) else entry[0] for entry in (*places, *keywords.values())
        ]
        return f(*values[: len(places)], **dict(zip(keywords, values[len(places) :])))

    return call, assumed


def _read(arguments: str, name: str, known: set[str]) -> tuple[list, dict]:
    """The arguments of a call as written: names of inputs, and constants, each in a tuple."""

    def entry(node: ast.expr) -> str | tuple:
        if isinstance(node, ast.Name) and node.id not in known:
            raise InputError(f"{node.id} is no input of {name}; it has {', '.join(sorted(known))}.")
        return node.id if isinstance(node, ast.Name) else (ast.literal_eval(node),)

    try:
        written = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(written, ast.Call) or not isinstance(written.func, ast.Name):
            raise SyntaxError
        keywords = {str(keyword.arg): entry(keyword.value) for keyword in written.keywords}
        return [entry(node) for node in written.args], keywords
    except InputError:  # which is a ValueError
        raise
    except (SyntaxError, ValueError):
        raise InputError(f"arguments {arguments!r}: write them as in a call, inputs by name.") from None


def _taken(answer: Any, rows: int) -> tuple[Any, str]:
    """The answer within what a function returns, as a tensor where it can be one, and where it stood."""
    taken = ""
    has = (lambda key: key in answer) if isinstance(answer, Mapping) else partial(hasattr, answer)
    if found := [key for key in ANSWERS if has(key)]:
        taken = f"its {found[0]}"
        answer = answer[found[0]] if isinstance(answer, Mapping) else getattr(answer, found[0])
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


# ------------------------------------------------------------------- means, gradients, what it looks like


def _mean(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *values, **given: function(*values, **given).mean()


def _of_means(exercise: Exercise, names: list[str]) -> Exercise:
    """The same for a function that returns the mean over the batch."""
    mistakes = {name: _mean(mistake) for name, mistake in exercise.mistakes.items()}
    mistakes["the sum over the batch, where the mean is meant: a step grows with the batch"] = (
        lambda *values: exercise.expected(**dict(zip(names, values))).sum()
    )
    return exercise._replace(expected=_mean(exercise.expected), mistakes=mistakes)


def _sloped(
    exercise: Exercise, function: Callable, ours: Callable, names: list[str], wanted: tuple[str, ...]
):
    """The exercise of the gradient in the inputs that are wanted, and the function's answer to it."""

    def slopes(f: Callable[..., Tensor], *values: Any, **given: Any) -> tuple[Tensor, ...]:
        given = given or dict(zip(names, values))
        leaves = {name: given[name].clone().requires_grad_() for name in wanted}
        try:
            total = f(**given | leaves).sum()
        except RuntimeError as error:
            if "numpy" not in str(error):
                raise
            total = torch.zeros(())  # numpy refuses what needs a gradient
        if not total.requires_grad:
            return tuple(map(torch.zeros_like, leaves.values()))
        return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)

    def only(*kept: str) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *values: tuple(s * (name in kept) for name, s in zip(wanted, slopes(ours, *values)))

    mistakes = {"the scores are computed without gradient, so that nothing is learnt": only()}
    for lost in wanted if len(wanted) > 1 else ():
        mistakes[f"no gradient reaches {lost}: it is detached"] = only(*{*wanted} - {lost})
    gradient = exercise._replace(
        function=f"{exercise.function} has right values; its gradient in {' and '.join(wanted)}", strain=None,
        expected=partial(slopes, ours), source="autograd", mistakes=mistakes, within=1e-5,  # float32 inside
    )  # fmt: skip
    return gradient, partial(slopes, function)


def _symptom(exercise: Exercise, function: Callable[..., Any]) -> str | None:
    """What can be said of answers that no known mistake gives."""
    from .checks import _outcome, agrees, copy
    from .exercises import samples

    drawn = samples(exercise.inputs)
    answers = [_outcome(function, given) for given in drawn]
    expected = [exercise.expected(**copy(given)) for given in drawn]
    if not all(isinstance(a, Tensor) and a.shape == b.shape for a, b in zip(answers, expected)):
        return None
    if answers[0].dtype in (torch.float16, torch.bfloat16):
        return f"its answers are {answers[0].dtype}, which has too few digits: compute in float32"
    got, right = (torch.cat([a.detach().double().flatten() for a in x]) for x in (answers, expected))
    factor = ((got @ right) / (right @ right)).item()
    scaled = got.isfinite().all() and torch.allclose(got, factor * right, 1e-6, 1e-9)
    if scaled and abs(factor) > 1e-6 and abs(factor - 1) > 1e-6:
        named = {1 / math.log(2): " = 1/ln 2: bits, where nats are meant", -1.0: ": the sign is reversed"}
        said = [text for number, text in named.items() if abs(factor - number) < 1e-6]
        return f"equal up to the constant factor {factor:.5g}{''.join(said)}"

    def reads(*names: str, change: Callable = lambda value: value + 0.3) -> bool:
        """Whether any answer changes with these inputs."""
        moved = (_outcome(function, given | {n: change(given[n]) for n in names}) for given in drawn)
        return not all(agrees(a, b, 1e-9) for a, b in zip(moved, answers))

    def other(value: Any) -> Any:
        return ~value if getattr(value, "dtype", None) == torch.bool else value * 1.25

    if unread := [n for n in drawn[0] if n != "ids" and not reads(n, change=other)]:
        return f"the answer does not depend on {' and '.join(unread)}"
    w, l, v, m, *_ = (*drawn[0], *"????")
    if v != "reference_chosen_logps":
        return None
    sides = [side for side, pair in {"chosen": (w, v), "rejected": (l, m)}.items() if reads(*pair)]
    if len(sides) == 1 or (not sides and reads(w, l)):
        how = f"the {sides[0]}'s enters otherwise" if sides else "or both are, each by itself"
        return f"no function of the log-ratios' difference; one side is transformed: {how}"
    return None
