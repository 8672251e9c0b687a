"""Notebook 4: what one example does, and how hard it pulls."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import dpo_loss
from dpo_minimal.bench.exercises import Exercise, betas, completion_logps, log_distribution, vector

# ------------------------------------------------------------------------------- 4.1 gradient_weights


@st.composite
def four_logps(draw):
    """Log-probabilities of B pairs under policy and reference, and beta."""
    B = draw(st.integers(1, 3))
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    return {name: draw(completion_logps(B, -3.7)) for name in names} | {"beta": draw(betas())}


def minus_slope_of_the_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> Tensor:
    """How much each loss falls as log pi(y_w) of its pair rises, by autograd."""
    chosen = policy_chosen.clone().requires_grad_()
    losses = dpo_loss(chosen, policy_rejected, ref_chosen, ref_rejected, beta=beta).losses
    return -torch.autograd.grad(losses.sum(), chosen)[0]


def _h(pc, pr, rc, rr) -> Tensor:
    return (pc - rc) - (pr - rr)


WEIGHTS = Exercise(
    number="4.1",
    function="gradient_weights",
    inputs=four_logps(),
    expected=minus_slope_of_the_loss,
    source="autograd: minus the slope of each loss in the log-probability of its chosen completion",
    mistakes={
        "σ(+margin) instead of σ(-margin): pairs in the wrong order must pull hardest": (
            lambda pc, pr, rc, rr, beta: beta * torch.sigmoid(beta * _h(pc, pr, rc, rr))
        ),
        "the β in front is missing: the chain rule brings it out of the margin": (
            lambda pc, pr, rc, rr, beta: torch.sigmoid(-beta * _h(pc, pr, rc, rr))
        ),
        "the β inside σ is missing: the margin is β times the difference of log-ratios": (
            lambda pc, pr, rc, rr, beta: beta * torch.sigmoid(-_h(pc, pr, rc, rr))
        ),
        "β is missing in both places: in front of σ and inside it": (
            lambda pc, pr, rc, rr, beta: torch.sigmoid(-_h(pc, pr, rc, rr))
        ),
        "β² in front: the margin holds one β, so its slope holds one": (
            lambda pc, pr, rc, rr, beta: beta**2 * torch.sigmoid(-beta * _h(pc, pr, rc, rr))
        ),
        "the reference is missing: the margin compares log-ratios, not log-probabilities": (
            lambda pc, pr, rc, rr, beta: beta * torch.sigmoid(-beta * (pc - pr))
        ),
        "the sign of the reference is reversed": (
            lambda pc, pr, rc, rr, beta: beta * torch.sigmoid(-beta * (pc - pr + rc - rr))
        ),
        "only the chosen completion's reward: the margin is the chosen one's less the rejected one's": (
            lambda pc, pr, rc, rr, beta: beta * torch.sigmoid(-beta * (pc - rc))
        ),
        "ratios of log-probabilities: the logarithm of a ratio is a difference of logarithms": (
            lambda pc, pr, rc, rr, beta: beta * torch.sigmoid(-beta * (pc / rc - pr / rr))
        ),
        "1 - loss is not σ(-u): the loss is -log σ(u), so e^(-loss) is σ(u)": (
            lambda pc, pr, rc, rr, beta: beta * (1 + F.logsigmoid(beta * _h(pc, pr, rc, rr)))
        ),
        "minus sign: this is the slope of the loss; the weight is its size, never negative": (
            lambda pc, pr, rc, rr, beta: -beta * torch.sigmoid(-beta * _h(pc, pr, rc, rr))
        ),
        "σ(u)σ(-u) is the slope of σ; the loss has log σ, whose slope is σ'/σ": (
            lambda pc, pr, rc, rr, beta: (
                beta * torch.sigmoid(-beta * _h(pc, pr, rc, rr)) * torch.sigmoid(beta * _h(pc, pr, rc, rr))
            )
        ),
        "β²σ(u)σ(-u) is the second derivative; the weight is the first": (
            lambda pc, pr, rc, rr, beta: (
                beta**2 * torch.sigmoid(-beta * _h(pc, pr, rc, rr)) * torch.sigmoid(beta * _h(pc, pr, rc, rr))
            )
        ),
        "β for every pair: this is what is left of the gradient without its weight": (
            lambda pc, pr, rc, rr, beta: torch.full_like(pc, beta)
        ),
        "mean over the batch: return one weight for each pair": (
            lambda pc, pr, rc, rr, beta: (beta * torch.sigmoid(-beta * _h(pc, pr, rc, rr))).mean()
        ),
    },
    central=True,
)


# ------------------------------------------------------------------------------- 4.2 tabular_gradient


@st.composite
def pairs_of_one_prompt(draw):
    """Logits and reference of Y completions, B pairs of different ones, and beta."""
    Y, B = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    pair = st.permutations(range(Y)).map(lambda order: order[:2])
    pairs = draw(st.lists(pair, min_size=B, max_size=B))
    chosen, rejected = torch.tensor(pairs).T
    return {
        "theta": draw(vector(Y, -3, 3)),
        "ref_logps": draw(log_distribution(Y)),
        "chosen": chosen.clone(),
        "rejected": rejected.clone(),
        "beta": draw(betas()),
    }


def slope_of_the_mean_loss(theta, ref_logps, chosen, rejected, beta) -> Tensor:
    """Autograd's gradient of the library's mean loss."""
    theta = theta.clone().requires_grad_()
    logps = theta.log_softmax(-1)
    losses = dpo_loss(
        logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected], beta=beta
    ).losses
    return torch.autograd.grad(losses.mean(), theta)[0]


def _sigma(theta, ref_logps, chosen, rejected, beta, sign=-1.0) -> Tensor:
    logratios = theta - ref_logps
    return torch.sigmoid(sign * beta * (logratios[chosen] - logratios[rejected]))


def _collected(theta, chosen, rejected, pulls, *, up=1.0, down=1.0) -> Tensor:
    gradient = torch.zeros_like(theta).index_add(0, chosen, -up * pulls)
    return gradient.index_add(0, rejected, down * pulls)


def _right(theta, ref_logps, chosen, rejected, beta, **sides) -> Tensor:
    pulls = beta * _sigma(theta, ref_logps, chosen, rejected, beta) / len(chosen)
    return _collected(theta, chosen, rejected, pulls, **sides)


def _overwritten(theta, ref_logps, chosen, rejected, beta) -> Tensor:
    pulls = (beta * _sigma(theta, ref_logps, chosen, rejected, beta) / len(chosen)).tolist()
    gradient = torch.zeros_like(theta)
    for y, pull in zip(chosen.tolist(), pulls):  # what the second pair of a completion finds is the first's
        gradient[y] = -pull
    before = gradient.clone()
    for y, pull in zip(rejected.tolist(), pulls):
        gradient[y] = before[y] + pull
    return gradient


def _with_probabilities(theta, ref_logps, chosen, rejected, beta) -> Tensor:
    pulls = beta * _sigma(theta, ref_logps, chosen, rejected, beta) / len(chosen)
    return _collected(theta, chosen, rejected, pulls, down=0.0) + pulls.sum() * theta.softmax(-1)


TABULAR = Exercise(
    number="4.2",
    function="tabular_gradient",
    inputs=pairs_of_one_prompt(),
    expected=slope_of_the_mean_loss,
    source="autograd: the slope of the library's mean loss in the logits",
    mistakes={
        "a completion that is in several pairs keeps only its last pull: add them up, as index_add does": (
            _overwritten
        ),
        "the opposite direction: this is the step downhill, and the gradient points uphill": (
            lambda *given: -_right(*given)
        ),
        "sum over the pairs: the loss is their mean": (
            lambda theta, ref, chosen, rejected, beta: (
                len(chosen) * _right(theta, ref, chosen, rejected, beta)
            )
        ),
        "divided by the number of completions: the loss is the mean over the pairs": (
            lambda theta, ref, chosen, rejected, beta: (
                len(chosen) / len(theta) * _right(theta, ref, chosen, rejected, beta)
            )
        ),
        "the β in front is missing": (
            lambda theta, ref, chosen, rejected, beta: _right(theta, ref, chosen, rejected, beta) / beta
        ),
        "σ(+margin) instead of σ(-margin): pairs in the wrong order must pull hardest": (
            lambda theta, ref, chosen, rejected, beta: _collected(
                theta, chosen, rejected, beta * _sigma(theta, ref, chosen, rejected, beta, 1.0) / len(chosen)
            )
        ),
        "the weight is missing: each pair pulls with β": (
            lambda theta, ref, chosen, rejected, beta: _collected(
                theta, chosen, rejected, torch.full((len(chosen),), beta).double() / len(chosen)
            )
        ),
        "the reference is missing in the margin": (
            lambda theta, ref, chosen, rejected, beta: _right(
                theta, torch.zeros_like(ref), chosen, rejected, beta
            )
        ),
        "the rejected completions are missing: they are pushed down as hard as the chosen ones up": (
            lambda *given: _right(*given, down=0.0)
        ),
        "π does not cancel here: (e_w - π) is the gradient of log π(y_w); subtract that of log π(y_l)": (
            _with_probabilities
        ),
    },
)


# --------------------------------------------------------------------------- 4.3 weight_slope_in_beta


@st.composite
def log_ratio_differences(draw):
    """Differences of log-ratios of B pairs, and beta."""
    return {"h": draw(vector(draw(st.integers(1, 3)), -4, 4)), "beta": draw(betas())}


def slope_of_the_slope(h, beta) -> Tensor:
    """Autograd twice: minus the slope of -log sigma(beta h) in h, and of that the slope in beta."""
    h = h.clone().requires_grad_()
    many = torch.full_like(h, beta).requires_grad_()
    (slope,) = torch.autograd.grad(-F.logsigmoid(many * h).sum(), h, create_graph=True)
    return torch.autograd.grad(-slope.sum(), many)[0]


def _slope(h, beta, *, first=1.0, second=-1.0, inner=None) -> Tensor:
    """first * sigma(-t) + second * inner * sigma(t) sigma(-t), inner being t unless given."""
    t = beta * h
    inner = t if inner is None else inner
    return first * torch.sigmoid(-t) + second * inner * torch.sigmoid(t) * torch.sigmoid(-t)


SLOPE = Exercise(
    number="4.3",
    function="weight_slope_in_beta",
    inputs=log_ratio_differences(),
    expected=slope_of_the_slope,
    source="autograd, twice: the loss in h, and that slope in β",
    mistakes={
        "only the β in front is differentiated: the product rule has a second term, from the β inside σ": (
            lambda h, beta: _slope(h, beta, second=0.0)
        ),
        "only the β inside σ is differentiated: the product rule has a first term, from the β in front": (
            lambda h, beta: _slope(h, beta, first=0.0)
        ),
        "the sign of the second term: σ(-βh) falls as βh grows": lambda h, beta: _slope(h, beta, second=1.0),
        "the second term lacks h: the slope of βh in β is h": (
            lambda h, beta: _slope(h, beta, inner=torch.full_like(h, beta))
        ),
        "the second term lacks β, which stands in front of σ": lambda h, beta: _slope(h, beta, inner=h),
        "this is the slope in h; the question is the one in β": (
            lambda h, beta: -(beta**2) * torch.sigmoid(beta * h) * torch.sigmoid(-beta * h)
        ),
        "σ(-βh) twice: the slope of σ(-t) is -σ(t)σ(-t)": (
            lambda h, beta: torch.sigmoid(-beta * h) * (1 - beta * h * torch.sigmoid(-beta * h))
        ),
        "this is the weight itself, not its slope": lambda h, beta: beta * torch.sigmoid(-beta * h),
    },
)


# ------------------------------------------------------------------------------------ 4.4 weight_left


@st.composite
def two_counts(draw):
    """How often each of two completions was chosen over the other, and beta."""
    wins, losses = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return {"wins": wins, "losses": losses, "beta": draw(betas())}


def mean_weight_at_rest(wins, losses, beta) -> Tensor:
    """Halve an interval of margins until both sides pull equally hard; then average the library's weights."""
    nothing = torch.zeros(2, dtype=torch.float64)

    def weights(margin: float) -> Tensor:
        both = torch.tensor([margin, -margin], dtype=torch.float64)  # of a pair obeyed, of one contradicted
        return dpo_loss(both / beta, nothing, nothing, nothing, beta=beta).gradient_weights

    low, high = -3.0, 3.0  # the margin at rest is the logarithm of a ratio of counts up to 9
    for _ in range(20):  # to 6e-6, a hundredth of what the check allows
        middle = (low + high) / 2
        obeyed, contradicted = weights(middle)
        low, high = (middle, high) if wins * obeyed > losses * contradicted else (low, middle)
    return (wins * obeyed + losses * contradicted) / (wins + losses)


LEFT = Exercise(
    number="4.4",
    function="weight_left",
    inputs=two_counts(),
    expected=mean_weight_at_rest,
    source="a search for the margin at which both sides pull equally hard, and the library's weights there",
    within=1e-3,  # a loop that trains ends near the minimum, not in it; mistakes are ten times as far away
    mistakes={
        "β/2 is the weight at the reference, before training": (
            lambda wins, losses, beta: torch.tensor(beta / 2)
        ),
        "β times the share of the contradicted pairs: they pull with βσ(u), which is less than β": (
            lambda wins, losses, beta: beta * min(wins, losses) / (wins + losses)
        ),
        "only half of the pairs' weights: those in the right order pull as hard as those in the wrong one": (
            lambda wins, losses, beta: beta * wins * losses / (wins + losses) ** 2
        ),
        "the weights do not vanish: the gradient is zero because they balance": (
            lambda wins, losses, beta: torch.tensor(0.0)
        ),
        "the β in front is missing": (lambda wins, losses, beta: 2 * wins * losses / (wins + losses) ** 2),
        "the sum over the pairs: return their mean": (
            lambda wins, losses, beta: 2 * beta * wins * losses / (wins + losses)
        ),
        "the weight of a pair that agrees with the majority: average over all pairs": (
            lambda wins, losses, beta: beta * losses / (wins + losses)
        ),
        "the weight of a pair that contradicts the wins: average over all pairs": (
            lambda wins, losses, beta: beta * wins / (wins + losses)
        ),
        "β does not change the margin at rest: σ(u) is the share of the wins, whatever β is": (
            lambda wins, losses, beta: (
                2
                * beta
                * torch.sigmoid(torch.tensor(beta * math.log(wins / losses)))
                * torch.sigmoid(torch.tensor(-beta * math.log(wins / losses)))
            )
        ),
    },
)


# --------------------------------------------------------------------------------- 4.5 loss_to_weight


@st.composite
def losses_alone(draw):
    """Losses of B pairs, and beta."""
    return {"losses": draw(vector(draw(st.integers(1, 3)), 0.1, 5)), "beta": draw(betas())}


def weight_where_the_loss_is(losses, beta) -> Tensor:
    """The library's weight at the margin with that loss: -log sigma(u) = loss at u = -log(e^loss - 1)."""
    margins = torch.tensor([-math.log(math.expm1(loss)) for loss in losses.tolist()], dtype=torch.float64)
    nothing = torch.zeros_like(margins)
    return dpo_loss(margins / beta, nothing, nothing, nothing, beta=beta).gradient_weights


FROM_LOSS = Exercise(
    number="4.5",
    function="loss_to_weight",
    inputs=losses_alone(),
    expected=weight_where_the_loss_is,
    source="the library's weight at the margin that has this loss",
    mistakes={
        "e^(-loss) is σ(+margin); the weight needs σ(-margin), which is one minus it": (
            lambda losses, beta: beta * torch.exp(-losses)
        ),
        "the β in front is missing": lambda losses, beta: -torch.expm1(-losses),
        "β stands in front only: the loss is the same function of the margin for every β": (
            lambda losses, beta: -beta * torch.expm1(-beta * losses)
        ),
        "the loss itself is the weight only where it is small: no weight exceeds β": (
            lambda losses, beta: beta * losses
        ),
        "the sign in the exponent: the loss is minus a logarithm": (
            lambda losses, beta: -beta * torch.expm1(losses)
        ),
        "this is the margin; go on to the weight": lambda losses, beta: -torch.log(torch.expm1(losses)),
    },
)

EXERCISES = [WEIGHTS, TABULAR, SLOPE, LEFT, FROM_LOSS]
