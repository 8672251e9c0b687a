"""Notebook 9: exhibits of bugs, their repairs, and the properties that they break."""

import functools
import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import enumerate_completions
from dpo_minimal.bench.exercises import Exercise, betas, table, tenths, vector

# ------------------------------------------------------------- the exhibits, as the notebook shows them


def exhibit_a(token_logps, scored):
    """(B, T) log-probabilities of tokens, (B, T) which count -> (B,)."""
    return (token_logps * scored).sum(-1) / scored.sum(-1)


def exhibit_b(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """(B,) log-probabilities -> (B,) losses."""
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected))


def exhibit_c(gradients, counts):
    """(M, P) gradients of the micro-batches' mean losses, (M,) their rows -> (P,)."""
    return gradients.mean(0)


def exhibit_d(policy, reference):
    """(B, B) log-probabilities, row: prompt, column: completion -> z0, a scalar."""
    logratios = (policy - reference).diagonal()
    others = logratios.roll(1)  # put each prompt together with the completion of another one
    return others.mean().clamp(min=0)


def exhibit_e(ids, prompt_lengths, eos):
    """(B, T) ids, right-padded with eos, (B,) -> (B, T) which tokens are scored."""
    in_prompt = torch.arange(ids.shape[1]) < prompt_lengths[:, None]
    return ~in_prompt & (ids != eos)


def exhibit_f(theta, chosen, rejected, beta, learning_rate, steps):
    """(Y,) logits, a pair -> (Y,) logits of the policy and of the reference after training."""
    policy = theta.clone().requires_grad_()
    reference = policy.detach()
    for _ in range(steps):
        logratios = policy.log_softmax(-1) - reference.log_softmax(-1)
        loss = -F.logsigmoid(beta * (logratios[chosen] - logratios[rejected]))
        (gradient,) = torch.autograd.grad(loss, policy)
        policy.data -= learning_rate * gradient
    return policy.detach(), reference


# ------------------------------------------------------------------------ 9.1 a completion's probability


@st.composite
def scored_logps(draw):
    """Log-probabilities of tokens, and which of them count: one at least in each row."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    row = st.lists(st.booleans(), min_size=T, max_size=T).filter(any)
    return {
        "token_logps": draw(table(B, T, -3, 0)),
        "scored": torch.tensor(draw(st.lists(row, min_size=B, max_size=B))),
    }


def products_of_probabilities(token_logps, scored) -> Tensor:
    """The probabilities of the scored tokens multiplied one by one, row by row."""
    rows = zip(token_logps.tolist(), scored.tolist())
    chances = [math.prod(math.exp(logp) for logp, counts in zip(*row) if counts) for row in rows]
    return torch.tensor([math.log(chance) for chance in chances], dtype=torch.float64)


COMPLETION = Exercise(
    number="9.1",
    function="completion_logp",
    inputs=scored_logps(),
    expected=products_of_probabilities,
    source="the probabilities of the scored tokens, multiplied one by one",
    mistakes={
        "still exhibit A: a mean over tokens is no log-probability of the completion": exhibit_a,
        "a mean over the whole row, prompt and padding included; it is a sum over scored tokens": (
            lambda token_logps, scored: (token_logps * scored).mean(-1)
        ),
        "the prompt and the padding are counted: only scored tokens belong to the completion": (
            lambda token_logps, scored: token_logps.sum(-1)
        ),
        "the mask is upside down: True marks what is scored": (
            lambda token_logps, scored: (token_logps * ~scored).sum(-1)
        ),
        "this is the probability; its logarithm is asked for": (
            lambda token_logps, scored: (token_logps * scored).sum(-1).exp()
        ),
        "the sign is reversed: this is a negative log-likelihood": (
            lambda token_logps, scored: -(token_logps * scored).sum(-1)
        ),
        "summed over the batch as well: one number for each row": (
            lambda token_logps, scored: (token_logps * scored).sum()
        ),
        "these are the tokens' log-probabilities; add them up": (
            lambda token_logps, scored: token_logps * scored
        ),
    },
)


# ------------------------------------------------------------------------------ 9.2 micro-batches


@st.composite
def micro_batches(draw):
    """Gradients of M micro-batches' mean losses in P parameters, and how many rows each has."""
    M, P = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    counts = draw(st.lists(st.integers(1, 5), min_size=M, max_size=M))
    return {
        "gradients": draw(table(M, P)),
        "counts": torch.tensor(counts, dtype=torch.float64),
    }


def row_by_row(gradients, counts) -> Tensor:
    """As if each row of a micro-batch had that micro-batch's mean gradient: the plain mean over all rows."""
    rows = [g for g, count in zip(gradients.tolist(), counts.tolist()) for _ in range(round(count))]
    return torch.tensor([sum(column) / len(rows) for column in zip(*rows)], dtype=torch.float64)


ACCUMULATED = Exercise(
    number="9.2",
    function="step_gradient",
    inputs=micro_batches(),
    expected=row_by_row,
    source="a mean over all rows, one after the other",
    mistakes={
        "still exhibit C: rows of a small micro-batch count more than others": exhibit_c,
        "the micro-batches' gradients are added up: the step grows with their number": (
            lambda gradients, counts: gradients.sum(0)
        ),
        "this is a sum over rows; divide by how many there are": lambda gradients, counts: counts @ gradients,
        "divided by the number of micro-batches; divide by the number of rows": (
            lambda gradients, counts: counts @ gradients / len(counts)
        ),
        "all micro-batches are taken to be as large as the first": (
            lambda gradients, counts: counts @ gradients / (len(counts) * counts[0])
        ),
        "the weights are upside down: a large micro-batch counts more, not less": (
            lambda gradients, counts: (1 / counts) @ gradients / (1 / counts).sum()
        ),
    },
)


# ------------------------------------------------------------------------------- 9.3 KTO's divergence


@st.composite
def prompts_and_completions(draw):
    """Log-probabilities of B completions after each of B prompts, under policy and reference."""
    B = draw(st.integers(3, 4))
    return {"policy": draw(table(B, B, -5, 0)), "reference": draw(table(B, B, -5, 0))}


def neighbour_by_neighbour(policy, reference) -> Tensor:
    """Prompt after prompt, with the completion of the next one."""
    B, (left, right) = len(policy), (policy.tolist(), reference.tolist())
    mean = sum(left[i][(i + 1) % B] - right[i][(i + 1) % B] for i in range(B)) / B
    return torch.tensor(max(mean, 0.0), dtype=torch.float64)


def _next(table_of_numbers: Tensor) -> Tensor:
    """(B,) entries [i, i + 1], the last with the first."""
    return table_of_numbers.roll(-1, dims=1).diagonal()


def _all_others(policy, reference):
    apart = ~torch.eye(len(policy), dtype=torch.bool)
    return (policy - reference)[apart].mean().clamp(min=0)


Z0 = Exercise(
    number="9.3",
    function="kto_z0",
    inputs=prompts_and_completions(),
    expected=neighbour_by_neighbour,
    source="prompt after prompt with the completion of the next",
    mistakes={
        "still exhibit D: re-pair before scoring, not after; a mean does not see the order": exhibit_d,
        "the other neighbour: prompt i goes with completion i + 1, row i and column i + 1": (
            lambda policy, reference: (policy - reference).roll(1, dims=1).diagonal().mean().clamp(min=0)
        ),
        "the matched completions are still among them: this is a mean over all pairs": (
            lambda policy, reference: (policy - reference).mean().clamp(min=0)
        ),
        "all other completions are used; the exercise asks for the next one only": _all_others,
        "the clamp is missing: a divergence is never negative": (
            lambda policy, reference: _next(policy - reference).mean()
        ),
        "clamped before the mean is taken: clamp the mean": (
            lambda policy, reference: _next(policy - reference).clamp(min=0).mean()
        ),
        "the log-ratio is upside down: policy less reference": (
            lambda policy, reference: _next(reference - policy).mean().clamp(min=0)
        ),
        "a sum; the estimate is a mean": (
            lambda policy, reference: _next(policy - reference).sum().clamp(min=0)
        ),
    },
)


# ---------------------------------------------------------------------------------- 9.4 which tokens


@st.composite
def row_lengths(draw):
    """Lengths of B prompts, of prompts with completions, and the width of the padded batch."""
    B = draw(st.integers(1, 3))
    prompts = draw(st.lists(st.integers(1, 3), min_size=B, max_size=B))
    completions = draw(st.lists(st.integers(1, 3), min_size=B, max_size=B))
    lengths = [p + c for p, c in zip(prompts, completions)]
    return {
        "prompt_lengths": torch.tensor(prompts),
        "lengths": torch.tensor(lengths),
        "width": max(lengths) + draw(st.integers(0, 2)),
    }


def place_by_place(prompt_lengths, lengths, width) -> Tensor:
    """Every row written out: the prompt, the completion, the padding."""
    rows = zip(prompt_lengths.tolist(), lengths.tolist())
    return torch.tensor([[False] * p + [True] * (n - p) + [False] * (width - n) for p, n in rows])


def _between(first, last):
    """A student's mask: places from `first(p, n)` up to, not including, `last(p, n, width)`."""

    def scored(prompt_lengths, lengths, width):
        places, p, n = torch.arange(width), prompt_lengths[:, None], lengths[:, None]
        return (places >= first(p, n)) & (places < last(p, n, width))

    return scored


SCORED = Exercise(
    number="9.4",
    function="scored_tokens",
    inputs=row_lengths(),
    expected=place_by_place,
    source="rows written out: the prompt, the completion, the padding",
    mistakes={
        "the last token is lost: the end-of-text belongs to the completion": _between(
            lambda p, n: p, lambda p, n, width: n - 1
        ),
        "the padding is scored": _between(lambda p, n: p, lambda p, n, width: width),
        "the prompt is scored": _between(lambda p, n: 0 * p, lambda p, n, width: n),
        "the completion's first token is lost: counting begins at 0": _between(
            lambda p, n: p + 1, lambda p, n, width: n
        ),
        "one token too many at the end: a row's last token stands at position lengths - 1": _between(
            lambda p, n: p, lambda p, n, width: n + 1
        ),
        "one place early: these are the positions that predict the tokens": _between(
            lambda p, n: p - 1, lambda p, n, width: n - 1
        ),
        "lengths count prompt and completion together: do not add the prompt again": _between(
            lambda p, n: p, lambda p, n, width: p + n
        ),
        "the mask is upside down: True marks the completion": (
            lambda prompt_lengths, lengths, width: ~place_by_place(prompt_lengths, lengths, width)
        ),
    },
)


# ------------------------------------------------------------------------------ 9.5 the reference stays


@st.composite
def a_short_training(draw):
    """Logits, a pair of different completions, beta, a step size and a number of steps."""
    Y = draw(st.integers(2, 3))
    chosen = draw(st.integers(0, Y - 1))
    return {
        "theta": draw(vector(Y, -2, 2)),
        "chosen": chosen,
        "rejected": draw(st.integers(0, Y - 1).filter(lambda l: l != chosen)),
        "beta": draw(betas()),
        "learning_rate": draw(tenths(0.1, 1)),
        "steps": draw(st.integers(1, 3)),
    }


def margin_by_margin(theta, chosen, rejected, beta, learning_rate, steps) -> tuple[Tensor, Tensor]:
    """What the logits of a pair do, from its margin alone [D11.6]; the reference is what theta was."""
    up = 0.0  # by which the chosen logit has risen, and the rejected one fallen
    for _ in range(steps):
        up += learning_rate * beta / (1 + math.exp(beta * 2 * up))
    logits = theta.tolist()
    logits[chosen], logits[rejected] = logits[chosen] + up, logits[rejected] - up
    return torch.tensor(logits, dtype=torch.float64), theta


def _pulled(theta, chosen, rejected, up):
    moved = theta.clone()
    moved[chosen] += up
    moved[rejected] -= up
    return moved


def _copied_at_every_step(theta, chosen, rejected, beta, learning_rate, steps):
    pull = learning_rate * beta / 2
    late = _pulled(theta, chosen, rejected, (steps - 1) * pull)
    return _pulled(theta, chosen, rejected, steps * pull), late


def _moved(theta, chosen, rejected, *numbers):
    return margin_by_margin(theta, chosen, rejected, *numbers)[0]


def _without_reference(theta, chosen, rejected, beta, learning_rate, steps):
    policy = theta.clone()
    for _ in range(steps):
        margin = beta * (policy[chosen] - policy[rejected])
        policy = _pulled(policy, chosen, rejected, learning_rate * beta * torch.sigmoid(-margin))
    return policy, theta


TRAINED = Exercise(
    number="9.5",
    function="train_pair",
    inputs=a_short_training(),
    expected=margin_by_margin,
    source="the margin's own recursion, u ← u + 2ηβ²σ(-u)",
    mistakes={
        "still exhibit F: detach shares the numbers; clone copies them": exhibit_f,
        "the reference is copied anew at every step; copy it once, before the first": _copied_at_every_step,
        "the policy has not moved: the steps went into a copy": (
            lambda theta, *_: (theta.clone(), theta.clone())
        ),
        "the loss does not look at the reference": _without_reference,
        "uphill: gradient descent subtracts the gradient": (
            lambda theta, chosen, rejected, beta, learning_rate, steps: (
                _moved(theta, chosen, rejected, beta, -learning_rate, steps),
                theta,
            )
        ),
        "chosen and rejected are exchanged": (
            lambda theta, chosen, rejected, *numbers: (_moved(theta, rejected, chosen, *numbers), theta)
        ),
        "β is missing: it multiplies the difference of log-ratios": (
            lambda theta, chosen, rejected, beta, *rest: (_moved(theta, chosen, rejected, 1.0, *rest), theta)
        ),
        "right policy, wrong reference: give back the one that was kept": (
            lambda theta, *rest: (_moved(theta, *rest), _moved(theta, *rest))
        ),
        "reference first, policy second: the order is (policy, reference)": (
            lambda theta, *rest: (theta, _moved(theta, *rest))
        ),
    },
)


# ----------------------------------------------------------- properties of a program, and how to test them

PROPERTIES = {
    "starts at log 2": "where the policy is the reference, the DPO loss of every pair is log 2",
    "sums to one": "the probabilities of all completions of a prompt add up to one",
    "constants cancel": "one number added to both log-probabilities of a pair leaves the DPO loss as it is",
    "padding is ignored": "more padding on the right leaves a completion's log-probability as it is",
    "micro-batches agree": "rows split into micro-batches give the gradient of all rows at once",
    "exchange": "with chosen and rejected exchanged, the DPO loss is larger by the margin",
    "reference stays": "training leaves the reference as it was",
    "good ones count": "KTO's loss falls when all good completions become likelier after their own prompts",
}

RIGHT = {  # the parts of a program
    "completion_logp": lambda token_logps, scored: (token_logps * scored).sum(-1),
    "losses": lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * ((pc - rc) - (pr - rr))),
    "step_gradient": row_by_row,
    "z0": neighbour_by_neighbour,
    "scored": lambda ids, prompt_lengths, lengths, eos: place_by_place(prompt_lengths, lengths, ids.shape[1]),
    "train": margin_by_margin,
}
EXHIBITS = {  # a program with one part replaced
    "A": RIGHT | {"completion_logp": exhibit_a},
    "B": RIGHT | {"losses": exhibit_b},
    "C": RIGHT | {"step_gradient": exhibit_c},
    "D": RIGHT | {"z0": exhibit_d},
    "E": RIGHT | {"scored": lambda ids, prompt_lengths, _, eos: exhibit_e(ids, prompt_lengths, eos)},
    "F": RIGHT | {"train": exhibit_f},
}
DRAWS = 20  # of random inputs for each property


def _same(left: Tensor, right: Tensor) -> bool:
    return bool(torch.allclose(left, right, rtol=0, atol=1e-9))


def _normal(generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _everything(program, generator, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """All completions of up to three tokens after one prompt, as rows: ids, which are scored, token_logps.

    The model is a random table of what follows what; beyond a completion's end it says anything.
    """
    eos, prompt = 0, 1
    completions = enumerate_completions(3, 3, eos)
    ids = F.pad(F.pad(completions.ids, (1, 0), value=prompt), (0, padding), value=eos)
    lengths = completions.lengths + 1
    following = _normal(generator, 3, 3).log_softmax(-1)
    token_logps = F.pad(following[ids[:, :-1], ids[:, 1:]], (1, 0), value=-1.0)
    return ids, program["scored"](ids, torch.ones_like(lengths), lengths, eos), token_logps


def _starts_at_log_2(program, generator) -> bool:
    scored = torch.ones(8, 5, dtype=torch.bool)
    logps = program["completion_logp"](_normal(generator, 8, 5), scored)  # under policy and reference alike
    losses = program["losses"](logps[:4], logps[4:], logps[:4], logps[4:], 0.3)
    return _same(losses, torch.full((4,), math.log(2), dtype=torch.float64))


def _sums_to_one(program, generator) -> bool:
    _, scored, token_logps = _everything(program, generator, padding=1)
    return _same(program["completion_logp"](token_logps, scored).exp().sum(), torch.ones(()).double())


def _constants_cancel(program, generator) -> bool:
    four, (of_policy, of_reference) = _normal(generator, 4, 5), _normal(generator, 2, 5)
    shifted = four + torch.stack([of_policy, of_policy, of_reference, of_reference])
    return _same(program["losses"](*shifted, 0.3), program["losses"](*four, 0.3))


def _padding_is_ignored(program, generator) -> bool:
    state = generator.get_state()
    _, scored, token_logps = _everything(program, generator, padding=0)
    generator.set_state(state)  # the same model again
    _, wide_scored, wide_logps = _everything(program, generator, padding=3)
    logp = program["completion_logp"]
    return _same(logp(token_logps, scored), logp(wide_logps, wide_scored))


def _micro_batches_agree(program, generator) -> bool:
    rows, counts = _normal(generator, 10, 3), [4, 4, 2]
    means = torch.stack([part.mean(0) for part in rows.split(counts)])
    return _same(program["step_gradient"](means, torch.tensor(counts).double()), rows.mean(0))


def _exchange(program, generator) -> bool:
    pc, pr, rc, rr = _normal(generator, 4, 5)
    difference = program["losses"](pr, pc, rr, rc, 0.3) - program["losses"](pc, pr, rc, rr, 0.3)
    return _same(difference, 0.3 * ((pc - rc) - (pr - rr)))


def _reference_stays(program, generator) -> bool:
    theta = _normal(generator, 4)
    return _same(program["train"](theta, 1, 2, 0.5, 1.0, 5)[1], theta)


def _good_ones_count(program, generator) -> bool:
    policy, reference = _normal(generator, 2, 4, 4)

    def loss(table_of_numbers):
        gain = (table_of_numbers - reference).diagonal() - program["z0"](table_of_numbers, reference)
        return torch.sigmoid(-gain).mean()

    return bool(loss(policy + torch.eye(4).double()) < loss(policy) - 1e-9)


TESTS = {
    "starts at log 2": _starts_at_log_2,
    "sums to one": _sums_to_one,
    "constants cancel": _constants_cancel,
    "padding is ignored": _padding_is_ignored,
    "micro-batches agree": _micro_batches_agree,
    "exchange": _exchange,
    "reference stays": _reference_stays,
    "good ones count": _good_ones_count,
}


@functools.cache
def holds(name: str, exhibit: str | None = None) -> bool:
    """Whether the property holds on all random inputs; of the right program, unless an exhibit is named."""
    generator = torch.Generator().manual_seed(0)
    program = RIGHT if exhibit is None else EXHIBITS[exhibit]
    return all(TESTS[name](program, generator) for _ in range(DRAWS))


# ------------------------------------------------------------------------------------- 9.6 diagnosis


def first_broken(exhibit) -> str:
    """The first property of the list that a test finds broken."""
    return next(name for name in PROPERTIES if not holds(name, exhibit))


def why_not(answer, exhibit) -> str | None:
    """What is wrong with naming this property for this exhibit."""
    if not isinstance(answer, str) or answer not in PROPERTIES:
        return f"that is not one of the names: {', '.join(PROPERTIES)}"
    if holds(answer, exhibit):
        return f"that property holds for exhibit {exhibit}, so it is not its fault"
    return None


def _but(exhibit: str, name: str):
    """A student's diagnosis: right, but for one exhibit."""
    return lambda asked: name if asked == exhibit else first_broken(asked)


DIAGNOSIS = Exercise(
    number="9.6",
    function="diagnosis",
    # The first number is thrown away: Hypothesis would otherwise run out of different inputs.
    inputs=st.tuples(st.integers(0, 10**6), st.sampled_from(sorted(EXHIBITS))).map(
        lambda drawn: {"exhibit": drawn[1]}
    ),
    expected=first_broken,
    source="tests of that property on random inputs",
    complaint=why_not,
    mistakes={
        "exhibit A divides by the number of scored tokens, so padding does no harm; add up probabilities": (
            _but("A", "padding is ignored")
        ),
        "exhibit A starts at log 2, as anything does that treats policy and reference alike": (
            _but("A", "starts at log 2")
        ),
        "in exhibit B the reference does not move; it is only weighed wrongly": _but("B", "reference stays"),
        "in exhibit D nothing is split into micro-batches; ask what the estimate is made of": (
            _but("D", "micro-batches agree")
        ),
        "exhibit E ignores all padding; ask what else it ignores": _but("E", "padding is ignored"),
        "exhibit F does start at log 2; its fault is that it never leaves it": _but("F", "starts at log 2"),
    },
)

EXERCISES = [COMPLETION, ACCUMULATED, Z0, SCORED, TRAINED, DIAGNOSIS]
