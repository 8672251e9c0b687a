"""Notebook 10: what to ask of a preference loss, and how to repair one that fails."""

from itertools import combinations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import Exercise, betas, completion_logps, log_distribution, vector

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


# ------------------------------------------------------------------------- 10.6 another divergence


@st.composite
def small_worlds(draw):
    """Reference and rewards of Y completions, and beta."""
    Y = draw(st.integers(2, 4))
    rewards = draw(vector(Y, -2, 2))
    return {"ref_logps": draw(log_distribution(Y)), "rewards": rewards, "beta": draw(betas())}


def climbed(ref_logps, rewards, beta) -> Tensor:
    """Newton's method on the objective itself, along the simplex, shortened where it would leave it."""
    ref, Y = ref_logps.exp(), len(rewards)
    pi = ref.clone()

    def value(pi):
        return rewards @ pi + beta * ref @ pi.log()

    for _ in range(100):
        system = torch.ones(Y + 1, Y + 1, dtype=torch.float64)
        system[:Y, :Y], system[Y, Y] = torch.diag(-beta * ref / pi**2), 0.0
        slope = F.pad(-rewards - beta * ref / pi, (0, 1))
        step = torch.linalg.solve(system, slope)[:Y]
        length = min(1.0, 0.9 / max((-step / pi).max().item(), 1e-300))
        while length > 1e-9 and value(pi + length * step) < value(pi) - 1e-13 * (1 + value(pi).abs()):
            length /= 2
        pi = pi + length * step
        if (step / pi).abs().max() < 1e-9:  # the next one would be its square
            break
    return pi.log()


def _root(weights: Tensor, rewards: Tensor) -> Tensor:
    """log of weights / (lambda - r) that sum to one, lambda above all rewards."""
    low, high = rewards.max(), rewards.max() + weights.sum()
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if (weights / (level - rewards)).sum() > 1 else (low, level)
    return (weights / (high - rewards)).log()


FORWARD = Exercise(
    number="10.6",
    function="forward_kl_optimum",
    inputs=small_worlds(),
    expected=climbed,
    source="Newton's method on the objective, on the simplex",
    within=1e-6,  # `torch.tensor(beta).log()` has seven digits, and is no mistake
    mistakes={
        "this is the optimum under the reverse KL, the usual one": (
            lambda ref_logps, rewards, beta: (ref_logps + rewards / beta).log_softmax(-1)
        ),
        "λ is the root of Σπ = 1; max r + β is only an upper bound": (
            lambda ref_logps, rewards, beta: ref_logps + (beta / (rewards.max() + beta - rewards)).log()
        ),
        "dividing by the sum does not find λ: it stands in every denominator": (
            lambda ref_logps, rewards, beta: (ref_logps - (rewards.max() + beta - rewards).log()).log_softmax(
                -1
            )
        ),
        "the β is missing": lambda ref_logps, rewards, beta: _root(ref_logps.exp(), rewards),
        "β is upside down: a large β stays near the reference": (
            lambda ref_logps, rewards, beta: _root(ref_logps.exp() / beta, rewards)
        ),
        "the reference is missing": lambda ref_logps, rewards, beta: _root(
            torch.full_like(rewards, beta / len(rewards)), rewards
        ),
        "the sign of the reward is reversed": lambda ref_logps, rewards, beta: _root(
            beta * ref_logps.exp(), -rewards
        ),
        "these are probabilities: return their logarithms": lambda ref_logps, rewards, beta: _root(
            beta * ref_logps.exp(), rewards
        ).exp(),
        "the logarithm of the reference stands where its probability should": (
            lambda ref_logps, rewards, beta: _root(-beta * ref_logps, rewards)
        ),
        "the reference has moved: at equal rewards the policy is the reference": (
            lambda ref_logps, rewards, beta: (ref_logps + _root(beta * ref_logps.exp(), rewards)).log_softmax(
                -1
            )
        ),
    },
)

EXERCISES = [PULLS, CENTRED, FITTING, REPAIRED, EXISTENCE, FORWARD]
