"""Notebook 10: what to ask of a preference loss, and how to repair one that fails."""

from itertools import combinations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import optimal_logps
from dpo_minimal.bench.checks import show
from dpo_minimal.bench.exercises import Exercise, betas, completion_logps, vector

FOUR = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")

# ----------------------------------------------------------------------------------- 10.1 both pulls


@st.composite
def pairs_with_lengths(draw):
    """Log-probabilities of B pairs, tokens of the chosen completions, beta, weight of the second term."""
    B = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 6), min_size=B, max_size=B))
    logps = {name: draw(completion_logps(B)) for name in FOUR}
    shares = {"beta": draw(betas()), "alpha": draw(st.sampled_from([1.0, 0.5, 2.0, 0.1]))}
    return logps | {"chosen_lengths": torch.tensor(lengths, dtype=torch.float64)} | shares


def autograd_pulls(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, beta, alpha):
    """Minus the slope in log pi(y_w), and the slope in log pi(y_l), of the loss written with logarithms."""
    won, lost = policy_chosen.clone().requires_grad_(), policy_rejected.clone().requires_grad_()
    odds = (beta * (lost - ref_rejected) - beta * (won - ref_chosen)).exp()
    losses = torch.log1p(odds) - alpha * won / chosen_lengths
    slopes = torch.autograd.grad(losses.sum(), (won, lost))
    return -slopes[0], slopes[1]


def _pulls(formula):
    """A student's two pulls, from its formula in sigma(-u), the lengths, beta and alpha."""

    def both_pulls(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, beta, alpha):
        margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
        return formula(torch.sigmoid(-margin), chosen_lengths, beta, alpha)

    return both_pulls


def _pulls_of(margin):
    """The right pulls, of a margin that a student computes in another way."""

    def both_pulls(pc, pr, rc, rr, chosen_lengths, beta, alpha):
        weight = beta * torch.sigmoid(-margin(pc, pr, rc, rr, beta))
        return weight + alpha / chosen_lengths, weight

    return both_pulls


PULLS = Exercise(
    number="10.1",
    function="both_pulls",
    inputs=pairs_with_lengths(),
    expected=autograd_pulls,
    source="autograd's slopes of the loss in both log-probabilities",
    mistakes={
        "the second term pulls too: it raises the chosen completion, whatever the margin": _pulls(
            lambda s, n, beta, alpha: (beta * s, beta * s)
        ),
        "the second term contains the chosen completion only; the rejected one has DPO's weight": _pulls(
            lambda s, n, beta, alpha: (beta * s + alpha / n, beta * s + alpha / n)
        ),
        "the order is (chosen, rejected)": _pulls(lambda s, n, beta, alpha: (beta * s, beta * s + alpha / n)),
        "the length is missing: the second term has an average over the completion's tokens": _pulls(
            lambda s, n, beta, alpha: (beta * s + alpha, beta * s)
        ),
        "the length divides the second term only; DPO's log-ratios are sums": _pulls(
            lambda s, n, beta, alpha: ((beta * s + alpha) / n, beta * s)
        ),
        "the length divides the second term, it does not multiply it": _pulls(
            lambda s, n, beta, alpha: (beta * s + alpha * n, beta * s)
        ),
        "these are slopes: the pull on the chosen completion is minus its slope": _pulls(
            lambda s, n, beta, alpha: (-beta * s - alpha / n, beta * s)
        ),
        "the pull on the rejected completion is the coefficient of +∇log π: it is positive": _pulls(
            lambda s, n, beta, alpha: (beta * s + alpha / n, -beta * s)
        ),
        "the second term lowers the loss where the chosen completion is likely: its pull is added": _pulls(
            lambda s, n, beta, alpha: (beta * s - alpha / n, beta * s)
        ),
        "the β in front is missing: the margin is β times the difference of log-ratios": _pulls(
            lambda s, n, beta, alpha: (s + alpha / n, s)
        ),
        "β multiplies DPO's part only: the second term has no reference and no β": _pulls(
            lambda s, n, beta, alpha: (beta * (s + alpha / n), beta * s)
        ),
        "α multiplies the second term only": _pulls(
            lambda s, n, beta, alpha: (alpha * (beta * s + 1 / n), alpha * beta * s)
        ),
        "the α is missing": _pulls(lambda s, n, beta, alpha: (beta * s + 1 / n, beta * s)),
        "σ(+u) instead of σ(-u): a pair pulls hard where it is wrong": _pulls(
            lambda s, n, beta, alpha: (beta * (1 - s) + alpha / n, beta * (1 - s))
        ),
        "this is the second term itself: its slope in log π is α divided by the length": (
            lambda pc, pr, rc, rr, n, beta, alpha: (
                (weight := beta * torch.sigmoid(-beta * (pc - rc - pr + rr))) - alpha * pc / n,
                weight,
            )
        ),
        "the reference is missing: the margin compares log-ratios": _pulls_of(
            lambda pc, pr, rc, rr, beta: beta * (pc - pr)
        ),
        "the β inside σ is missing": _pulls_of(lambda pc, pr, rc, rr, beta: pc - rc - pr + rr),
        "mean over the batch: return the pulls of each pair": _pulls(
            lambda s, n, beta, alpha: ((beta * s + alpha / n) / len(s), beta * s / len(s))
        ),
    },
)


# ------------------------------------------------------------------- 10.2 a loss that reads its batch


def autograd_of_centred(margins) -> Tensor:
    """Minus autograd's slope of the mean loss, with the batch's mean inside the graph."""
    u = margins.clone().requires_grad_()
    losses = torch.log1p(torch.exp(u.sum() / len(u) - u))
    return -torch.autograd.grad(losses.sum() / len(u), u)[0]


def _centred(margins: Tensor) -> Tensor:
    return torch.sigmoid(margins.mean() - margins)


CENTRED = Exercise(
    number="10.2",
    function="batch_pulls",
    inputs=st.integers(1, 4).flatmap(lambda B: vector(B, -3, 3)).map(lambda margins: {"margins": margins}),
    expected=autograd_of_centred,
    source="autograd's slope of the mean loss of the batch",
    mistakes={
        "the mean moves with every margin: u_i stands in the loss of every pair, not in its own only": (
            lambda margins: _centred(margins) / len(margins)
        ),
        "of the other pairs' losses too: they contain u_i through the mean": (
            lambda margins: _centred(margins) * (1 - 1 / len(margins)) / len(margins)
        ),
        "this is the slope of the sum: the mean loss has one over B in front": (
            lambda margins: _centred(margins) - _centred(margins).mean()
        ),
        "the sign is reversed: a pull is minus the slope, and a pair below the mean pulls harder": (
            lambda margins: (_centred(margins).mean() - _centred(margins)) / len(margins)
        ),
        "the mean is subtracted from the margin inside σ as well": (
            lambda margins: (torch.sigmoid(-margins) - torch.sigmoid(-margins).mean()) / len(margins)
        ),
        "this is DPO's pull: the mean of the batch is missing": (
            lambda margins: torch.sigmoid(-margins) / len(margins)
        ),
        "the mean of the pulls is subtracted, not their sum: each mean has one over B": (
            lambda margins: (_centred(margins) - _centred(margins).sum()) / len(margins)
        ),
        "one over B twice: once for the mean loss, and once inside the mean pull": (
            lambda margins: (_centred(margins) - _centred(margins).mean()) / len(margins) ** 2
        ),
        "they sum to zero, but not all are zero: pairs below the mean pull up, pairs above it down": (
            torch.zeros_like
        ),
    },
)


# -------------------------------------------------- 10.3 the probability for which a margin is right


@st.composite
def two_pulls(draw):
    """Pulls of a loss at N margins and at their negatives, all positive."""
    N = draw(st.integers(1, 3))
    return {name: draw(vector(N, 0.1, 5)) for name in ("pull", "opposite_pull")}


def balanced(pull, opposite_pull) -> Tensor:
    """Halve [0, 1] until the mean pull of both labels is zero, number by number."""
    found = []
    for kept, opposite in zip(pull.tolist(), opposite_pull.tolist()):
        low, high = 0.0, 1.0
        for _ in range(60):
            p = (low + high) / 2
            mean = p * kept - (1 - p) * opposite
            low, high = (p, high) if mean < 0 else (low, p)
        found.append(low)
    return torch.tensor(found, dtype=torch.float64)


FITTING = Exercise(
    number="10.3",
    function="fitting_probability",
    inputs=two_pulls(),
    expected=balanced,
    source="bisection: the p at which the two labels' pulls have mean zero",
    mistakes={
        "pull and opposite pull are exchanged: the label that pulls harder must be the rarer one": (
            lambda pull, opposite_pull: pull / (pull + opposite_pull)
        ),
        "these are odds; a probability is odds / (1 + odds)": (
            lambda pull, opposite_pull: opposite_pull / pull
        ),
        "these are odds, and upside down": lambda pull, opposite_pull: pull / opposite_pull,
        "this is the margin, in log-odds; σ turns it into a probability": (
            lambda pull, opposite_pull: (opposite_pull / pull).log()
        ),
        "σ of the difference: it is the ratio of the pulls that balances": (
            lambda pull, opposite_pull: torch.sigmoid(opposite_pull - pull)
        ),
        "σ of the ratio: odds are no log-odds": (
            lambda pull, opposite_pull: torch.sigmoid(opposite_pull / pull)
        ),
        "the opposite label has 1 - p, not p: this is what is left over": (
            lambda pull, opposite_pull: pull - opposite_pull
        ),
        "the denominator sums over all margins: each has one of its own": (
            lambda pull, opposite_pull: opposite_pull / (pull + opposite_pull).sum()
        ),
        "the squares are too much: each label pulls with its probability once": (
            lambda pull, opposite_pull: opposite_pull**2 / (pull**2 + opposite_pull**2)
        ),
    },
)


# -------------------------------------------------------------------------- 10.4 the loss of a pull


@st.composite
def pairs(draw):
    """Log-probabilities of B pairs, and beta; margins stay below 12 in size."""
    B = draw(st.integers(1, 3))
    return {name: draw(completion_logps(B, -2.7)) for name in FOUR} | {"beta": draw(betas())}


def area_under_the_pull(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> Tensor:
    """Simpson's rule for the pull from the margin on; 60 nats further it is e^-120."""
    margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    steps = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    width = (60 - margin.clamp(max=0)) / 20_000
    v = margin[:, None] + 20_000 * width[:, None] * steps
    pull = 4 * torch.sigmoid(-v) ** 2 * torch.sigmoid(v)
    simpson = torch.full_like(steps, 2)
    simpson[1::2], simpson[0], simpson[-1] = 4, 1, 1
    return (pull * simpson).sum(-1) * width / 3


def _of_margin(formula):
    """A student's loss, from its formula in the margin."""
    return lambda pc, pr, rc, rr, beta: formula(beta * ((pc - rc) - (pr - rr)))


def _square(margin: Tensor) -> Tensor:
    return 2 * torch.sigmoid(-margin) ** 2


def proper_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *, beta
) -> Tensor:
    """The solution, for the cells of the notebook that follow it: (B,) log-probabilities -> (B,) losses."""
    logratios = policy_chosen_logps - reference_chosen_logps
    return _square(beta * (logratios - (policy_rejected_logps - reference_rejected_logps)))


REPAIRED = Exercise(
    number="10.4",
    function="repaired_loss",
    inputs=pairs(),
    expected=area_under_the_pull,
    source="the area under the pull to the right of the margin, by Simpson's rule",
    mistakes={
        "this is the pull: the loss is its integral": _of_margin(
            lambda u: 4 * torch.sigmoid(-u) ** 2 * torch.sigmoid(u)
        ),
        "the factor 4 is missing": _of_margin(lambda u: torch.sigmoid(-u) ** 2 / 2),
        "off by a factor: the integral of s is s²/2": _of_margin(lambda u: 4 * torch.sigmoid(-u) ** 2),
        "off by a factor: the integral of 4s is 2s²": _of_margin(lambda u: torch.sigmoid(-u) ** 2),
        "the square is missing": _of_margin(lambda u: 2 * torch.sigmoid(-u)),
        "the sign is reversed: a loss falls where its pull is positive": _of_margin(lambda u: -_square(u)),
        "the constant is wrong: the loss tends to zero for large margins": _of_margin(
            lambda u: _square(u) - 2
        ),
        "the constant is wrong: the loss tends to zero for large margins, and is not zero at the reference": (
            _of_margin(lambda u: _square(u) - 0.5)
        ),
        "chosen and rejected are exchanged, or σ(u) and σ(-u)": _of_margin(lambda u: _square(-u)),
        "du is not ds: with s = σ(-u), ds = -s(1 - s) du": _of_margin(
            lambda u: 4 * torch.sigmoid(-u) ** 3 / 3 - torch.sigmoid(-u) ** 4
        ),
        "this is the invention, which is not repaired": _of_margin(
            lambda u: -torch.sigmoid(-u) * F.logsigmoid(u)
        ),
        "this is DPO's loss: its pull has no factor 4σ(u)σ(-u)": _of_margin(lambda u: -F.logsigmoid(u)),
        "β is missing": lambda pc, pr, rc, rr, beta: _square((pc - rc) - (pr - rr)),
        "β stands inside the margin already": lambda pc, pr, rc, rr, beta: (
            beta * _square(beta * ((pc - rc) - (pr - rr)))
        ),
        "the reference is missing: the margin compares log-ratios": lambda pc, pr, rc, rr, beta: _square(
            beta * (pc - pr)
        ),
        "the sign of the reference is reversed": lambda pc, pr, rc, rr, beta: _square(
            beta * (pc + rc - pr - rr)
        ),
        "mean over the batch: return one loss for each pair": _of_margin(lambda u: _square(u).mean()),
        "sum over the batch: return one loss for each pair": _of_margin(lambda u: _square(u).sum()),
    },
)


# ----------------------------------------------------------------------- 10.5 is there an optimum


@st.composite
def few_wins(draw):
    """How often each of Y completions was chosen over each other: mostly never, so that all cases occur; at
    times two pairs, each decided both ways, of which the second never beat the first, or never met it."""
    Y = draw(st.sampled_from([2, 3, 4, 4, 4]))
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=Y * Y, max_size=Y * Y))
    wins = torch.tensor(counts, dtype=torch.float64).view(Y, Y).fill_diagonal_(0)
    apart = draw(st.sampled_from(["", "", "never beat", "never met"])) if Y == 4 else ""
    if apart:
        wins[2:, :2] = 0
        wins[:2, 2:] *= apart == "never beat"
        wins[[0, 1, 2, 3], [1, 0, 3, 2]] += 1
    return {"wins": wins}


def every_division(wins) -> tuple[Tensor, Tensor]:
    """All divisions into two groups: for DPO each has beaten the other, for IPO they were compared."""
    everyone = range(len(wins))
    groups = [set(group) for size in everyone if size for group in combinations(everyone, size)]
    across = [
        sum(wins[i, j].item() for i in group for j in everyone if j not in group) > 0 for group in groups
    ]
    opposite = [across[groups.index(set(everyone) - group)] for group in groups]
    compared = [one or other for one, other in zip(across, opposite)]
    return torch.tensor(all(across)), torch.tensor(all(compared))


def _linked(arrows: Tensor, steps: int | None = None) -> Tensor:
    """(Y, Y) whether a chain of at most so many arrows leads from each to each."""
    one = ((arrows > 0) | torch.eye(len(arrows), dtype=torch.bool)).double()
    return torch.linalg.matrix_power(one, steps or len(arrows)) > 0


def _connected(wins: Tensor) -> Tensor:
    return _linked(wins + wins.T).all()


def _others(wins: Tensor) -> Tensor:
    return wins[~torch.eye(len(wins), dtype=torch.bool)]


EXISTENCE = Exercise(
    number="10.5",
    function="has_one_optimum",
    inputs=few_wins(),
    expected=every_division,
    source="every division of the completions into two groups",
    mistakes={
        "connected is not enough for DPO: what never loses to the rest is raised for ever": (
            lambda wins: (_connected(wins), _connected(wins))
        ),
        "IPO needs no win against the order: its target is finite, so comparisons that connect suffice": (
            lambda wins: (_linked(wins).all(), _linked(wins).all())
        ),
        "the order is (DPO, IPO)": lambda wins: (_connected(wins), _linked(wins).all()),
        "a win and a loss of each completion are not enough: a group of them may never lose to the rest": (
            lambda wins: ((wins.sum(0) > 0).all() & (wins.sum(1) > 0).all(), _connected(wins))
        ),
        "a win of each completion is not enough: a chain of wins must lead from each to each": (
            lambda wins: ((wins.sum(1) > 0).all(), _connected(wins))
        ),
        "not every pair must be decided both ways: chains of wins are enough": (
            lambda wins: ((_others(wins) > 0).all(), _connected(wins))
        ),
        "not every pair must be compared: chains of comparisons are enough": (
            lambda wins: (_linked(wins).all(), (_others(wins + wins.T) > 0).all())
        ),
        "every completion compared is not enough for IPO: two groups without a comparison are left open": (
            lambda wins: (_linked(wins).all(), ((wins + wins.T).sum(0) > 0).all())
        ),
        "IPO too leaves open how completions compare that no chain of comparisons connects": (
            lambda wins: (_linked(wins).all(), torch.tensor(True))
        ),
        "chains may be longer than one win": lambda wins: (
            _linked(wins, 1).all(),
            _linked(wins + wins.T, 1).all(),
        ),
        "chains may be longer than two wins": (
            lambda wins: (_linked(wins, 2).all(), _linked(wins + wins.T, 2).all())
        ),
        "chains must lead from every completion, not only from the first": (
            lambda wins: (_linked(wins)[0].all(), _connected(wins))
        ),
    },
)


# --------------------------------------------------------------- 10.6 a loss of one's own, to its end

WORLDS = [  # few, because a student trains in each; all pairs are compared, with exact probabilities
    {"ref_logps": torch.tensor(ref, dtype=torch.float64).log(), "rewards": torch.tensor(rewards).double()}
    for ref, rewards in [
        ((0.5, 0.3, 0.2), (0.0, 0.8, 2.0)),
        ((0.2, 0.3, 0.5), (1.3, 0.0, 0.5)),
        ((0.2, 0.5, 0.3), (1.6, 0.9, 0.0)),
    ]
]
SLACK = 1e-3  # of what a nat changes in the loss: an end that is right to two digits costs far less
NO_END = "your loss has an end: training from the reference stops at log-probabilities"


def exponential(policy_chosen, policy_rejected, ref_chosen, ref_rejected) -> Tensor:
    """exp(-h), which ends at pi* of beta = 2."""
    return (-_difference(policy_chosen, policy_rejected, ref_chosen, ref_rejected)).exp()


def linear(policy_chosen, policy_rejected, ref_chosen, ref_rejected) -> Tensor:
    """-h, which has no end."""
    return -_difference(policy_chosen, policy_rejected, ref_chosen, ref_rejected)


def _difference(policy_chosen, policy_rejected, ref_chosen, ref_rejected) -> Tensor:
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def expected_loss(loss, ref_logps: Tensor, rewards: Tensor):
    """From logits (Y,) to the mean loss of all pairs, which is what training on endless data lowers."""
    first, second = torch.combinations(torch.arange(len(rewards))).T
    chosen, rejected = torch.cat([first, second]), torch.cat([second, first])
    chances = torch.sigmoid(rewards[chosen] - rewards[rejected])

    def mean(theta: Tensor) -> Tensor:
        logps = theta.log_softmax(-1)
        return chances @ loss(logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected])

    return mean


def descended(objective, start: Tensor) -> Tensor:
    """The logits where a descent from there ends, or as far as it has come."""
    theta = start.clone().requires_grad_()
    search = dict(line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=1e-14)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, max_eval=150, **search)

    def closure():
        value = objective(theta)
        (theta.grad,) = torch.autograd.grad(value, theta)
        return value

    optimizer.step(closure)
    return theta.detach()


def runs_away(objective, start: Tensor) -> bool:
    """Whether the loss never rises when the way that a descent takes goes on, two and four times as far; or,
    since a loss may lower one completion for ever and leave the others, when that one is lowered further."""
    moved = descended(objective, start) - start
    moved = moved - moved.mean()
    if not moved.isfinite().all():
        return True
    lowest = 10 * torch.nn.functional.one_hot(moved.argmin(), len(moved)).double()
    here = objective(start + moved) + 1e-12  # rounding: far out the slopes are smaller than that
    ways = [(start + 2 * moved, start + 4 * moved), (start + moved - lowest, start + moved - 2 * lowest)]
    further = any(objective(near) <= here and objective(far) <= here for near, far in ways)
    return bool(further and moved.abs().max() > 3)


def not_a_loss(loss, ref_logps: Tensor) -> str | None:
    """Why nothing can be trained with it: four columns of log-probabilities in, a loss of each pair out."""
    generator = torch.Generator().manual_seed(0)
    four = [torch.randn(5, generator=generator, dtype=torch.float64) / 2 - 2 for _ in range(4)]
    for policy in four[:2]:
        policy.requires_grad_()
    try:
        losses = loss(*four)
        single = loss(*(column[:1] for column in four))
        slopes = torch.autograd.grad(losses.sum(), four[:2], allow_unused=True)
    except Exception as error:
        return f"your loss raises {type(error).__name__}: {error}"[:200]
    if losses.shape != (5,):
        return f"five pairs have five losses, yours have the shape {tuple(losses.shape)}"
    if not losses.isfinite().all():
        return f"your loss is {losses[~losses.isfinite()][0].item()} for some pair"
    if all(slope is None or not slope.any() for slope in slopes):
        return "your loss has no slope in the policy's log-probabilities, so nothing is trained"
    if not torch.allclose(losses[:1], single):
        return "the loss of a pair depends on the other pairs (question 3); take one of a pair by itself"
    beta = -losses.expm1().log() / _difference(*four)
    if beta.min() > 0 and torch.allclose(beta, beta[0].expand(5)):
        return "this is DPO's loss, whose end you know; change something"
    return None


def not_its_end(answer, ref_logps, rewards) -> str | None:
    """What is wrong with a loss and the end that is claimed for it: training must stay where it is."""
    if not (isinstance(answer, (tuple, list)) and len(answer) == 2 and callable(answer[0])):
        return "return two things, (loss, end): a function of four columns, and log-probabilities or None"
    loss, end = answer
    if (reason := not_a_loss(loss, ref_logps)) is not None:
        return reason
    objective = expected_loss(loss, ref_logps, rewards)
    if end is None:
        stops = descended(objective, ref_logps).log_softmax(-1)
        return None if runs_away(objective, ref_logps) else f"{NO_END} {show(stops)}"
    if not (isinstance(end, Tensor) and end.shape == rewards.shape and end.isfinite().all()):
        return f"the end has {len(rewards)} finite log-probabilities; where there is none, return None"
    end = end.detach().double()
    if (end.exp().sum() - 1).abs() > 1e-3:
        reason = "these are probabilities" if (end.sum() - 1).abs() < 1e-3 else "they do not sum to one"
        return f"the end has log-probabilities: {reason}"
    return _left(objective, end, ref_logps)


def _left(objective, end: Tensor, ref_logps: Tensor) -> str | None:
    """Whether training that begins close to the claimed end goes elsewhere, where the loss is lower."""
    generator = torch.Generator().manual_seed(0)
    near = [end + torch.randn(len(end), generator=generator, dtype=torch.float64) for _ in range(6)]
    claimed = objective(end)
    scale = torch.stack([(objective(place) - claimed).abs() for place in near]).mean()
    for place in near[:2]:
        found = descended(objective, end + 0.1 * (place - end))
        if not claimed - objective(found) <= SLACK * scale:
            if runs_away(objective, end):
                return "training that begins at your end leaves it and goes on and on: is there an end?"
            if (end - ref_logps).abs().max() < 1e-3:
                return f"this is the reference; training leaves it for {show(found.log_softmax(-1))}"
            return f"training that begins at your end leaves it for {show(found.log_softmax(-1))}"
    return None


def _claimed(loss, end):
    """A student's answer: a loss, and what is claimed to be its end, from the reference and the rewards."""
    return lambda ref_logps, rewards: (loss, end(ref_logps, rewards))


def exponentials_end(ref_logps, rewards) -> tuple:
    """A loss and its end in closed form: exp(-h) rests where p e^-h = (1 - p) e^h, at half of logit(p)."""
    return exponential, optimal_logps(ref_logps, rewards, beta=2.0)


OWN = Exercise(
    number="10.6",
    function="my_invention",
    inputs=st.sampled_from(WORLDS),
    expected=exponentials_end,
    source="training with your loss: it stays at the end that you gave, or never ends if you gave none",
    complaint=not_its_end,
    # For losses of the course; that of any other is said by the complaint.
    mistakes={
        "this is π* with β = 1: a loss ends where its own pulls balance, exp(-h) at half of logit(p)": (
            _claimed(exponential, lambda ref, r: optimal_logps(ref, r, beta=1.0))
        ),
        "exp(-h) has an end, where the pulls of the two labels balance": (
            _claimed(exponential, lambda ref, r: None)
        ),
        "-h pulls equally hard for ever, so the commoner label wins: there is no end": (
            _claimed(linear, lambda ref, r: optimal_logps(ref, r, beta=1.0))
        ),
        "this is the reference: nothing was trained": _claimed(exponential, lambda ref, r: ref.clone()),
        "these are probabilities: return their logarithms": (
            _claimed(exponential, lambda ref, r: optimal_logps(ref, r, beta=2.0).exp())
        ),
    },
)

EXERCISES = [PULLS, CENTRED, FITTING, REPAIRED, EXISTENCE, OWN]
