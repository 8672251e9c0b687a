"""Notebook 3: the loss of preferences, written for a policy."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal.bench.exercises import (
    Exercise,
    Strain,
    betas,
    completion_logps,
    log_distribution,
    tenths,
    vector,
)

# -------------------------------------------------------------------------------------- 3.1 dpo_loss


@st.composite
def four_logps(draw):
    """Log-probabilities of B pairs under policy and reference, and beta."""
    B = draw(st.integers(1, 3))
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    return {name: draw(completion_logps(B)) for name in names} | {"beta": draw(betas())}


def minus_log_odds_share(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> Tensor:
    """Each pair by itself in Python's own numbers: strengths (pi / pi_ref)^beta, then -log of their share."""
    losses = []
    for numbers in zip(*(t.tolist() for t in (policy_chosen, policy_rejected, ref_chosen, ref_rejected))):
        won, lost, ref_won, ref_lost = (math.exp(number) for number in numbers)
        chosen, rejected = (won / ref_won) ** beta, (lost / ref_lost) ** beta
        losses.append(math.log(chosen + rejected) - math.log(chosen))
    return torch.tensor(losses, dtype=torch.float64)


FAR_BEHIND = {  # a margin of -800
    "policy_chosen": torch.tensor([-900.0], dtype=torch.float64),
    **dict.fromkeys(
        ("policy_rejected", "ref_chosen", "ref_rejected"), torch.tensor([-100.0], dtype=torch.float64)
    ),
    "beta": 1.0,
}

LOSS = Exercise(
    number="3.1",
    function="dpo_loss",
    inputs=four_logps(),
    expected=minus_log_odds_share,
    source="-log of the winner's share of the strengths (π/π_ref)^β, pair by pair",
    strain=Strain(FAR_BEHIND, torch.tensor([800.0]).double()),
    mistakes={
        "β is missing on the reference: it multiplies the whole difference of log-ratios": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr) - (rc - rr))
        ),
        "off by β: did you scale the loss instead of the margin?": (
            lambda pc, pr, rc, rr, beta: -beta * F.logsigmoid(pc - pr - rc + rr)
        ),
        "β is missing": lambda pc, pr, rc, rr, beta: -F.logsigmoid(pc - pr - rc + rr),
        "the margin is divided by β: implicit rewards are β times the log-ratios": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid((pc - pr - rc + rr) / beta)
        ),
        "the reference is missing: the margin compares log-ratios, not log-probabilities": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr))
        ),
        "the sign of the reference is reversed": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr + rc - rr))
        ),
        "chosen and rejected are exchanged": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pr - pc - rr + rc))
        ),
        "the logarithm is missing: this is -σ(margin), which pushes every pair to infinity": (
            lambda pc, pr, rc, rr, beta: -torch.sigmoid(beta * (pc - pr - rc + rr))
        ),
        "the minus sign is missing: this is a log-likelihood, and a loss is minimised": (
            lambda pc, pr, rc, rr, beta: F.logsigmoid(beta * (pc - pr - rc + rr))
        ),
        "this is the margin; the loss is -log σ of it": (
            lambda pc, pr, rc, rr, beta: beta * (pc - pr - rc + rr)
        ),
        "ratios of log-probabilities: the logarithm of a ratio is a difference of logarithms": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc / rc - pr / rr))
        ),
        "ratios of probabilities: the margin compares their logarithms": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * ((pc - rc).exp() - (pr - rr).exp()))
        ),
        "this is the hinge max(0, 1 - margin), the loss of a support vector machine; DPO's is -log σ": (
            lambda pc, pr, rc, rr, beta: (1 - beta * (pc - pr - rc + rr)).clamp(min=0)
        ),
        "the mean margin of the batch is subtracted: each pair is judged by itself": (
            lambda pc, pr, rc, rr, beta: (lambda m: -F.logsigmoid(m - m.mean()))(beta * (pc - pr - rc + rr))
        ),
        "in bits: log2 where the natural logarithm is meant": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr - rc + rr)) / math.log(2)
        ),
        "mean over the batch: return one loss for each pair, the caller averages": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr - rc + rr)).mean()
        ),
        "sum over the batch: return one loss for each pair, the caller averages": (
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr - rc + rr)).sum()
        ),
    },
    central=True,
)


# ------------------------------------------------------------------- 3.2 the preferences a policy implies


@st.composite
def policy_and_reference(draw):
    """One prompt's policy and reference over Y completions, and beta."""
    Y = draw(st.integers(2, 4))
    return {"logps": draw(log_distribution(Y)), "ref_logps": draw(log_distribution(Y)), "beta": draw(betas())}


def shares_of_strength(logps, ref_logps, beta) -> Tensor:
    """P(i beats j), one pair after the other, from strengths (pi / pi_ref)^beta."""
    strengths = [(math.exp(a) / math.exp(b)) ** beta for a, b in zip(logps.tolist(), ref_logps.tolist())]
    return torch.tensor([[i / (i + j) for j in strengths] for i in strengths], dtype=torch.float64)


def _matrix(rewards: Tensor) -> Tensor:
    return torch.sigmoid(rewards[:, None] - rewards[None, :])


PREFERENCES = Exercise(
    number="3.2",
    function="implied_preferences",
    inputs=policy_and_reference(),
    expected=shares_of_strength,
    source="shares of the strengths (π/π_ref)^β, one pair after the other",
    mistakes={
        "rows and columns are exchanged, or the ratio is upside down: [i, j] is the chance that i beats j": (
            lambda logps, ref_logps, beta: _matrix(beta * (logps - ref_logps)).T
        ),
        "the reference is missing: rewards are β times log-ratios": (
            lambda logps, ref_logps, beta: _matrix(beta * logps)
        ),
        "β divides where it should multiply: r = β log(π/π_ref)": (
            lambda logps, ref_logps, beta: _matrix((logps - ref_logps) / beta)
        ),
        "β is missing": lambda logps, ref_logps, beta: _matrix(logps - ref_logps),
        "these are margins; σ turns them into probabilities": (
            lambda logps, ref_logps, beta: (
                beta * ((logps - ref_logps)[:, None] - (logps - ref_logps)[None, :])
            )
        ),
        "a share of probability, not of strength: i against j is no softmax over all completions": (
            lambda logps, ref_logps, beta: (lambda s: s[:, None].expand(len(s), len(s)) / s.sum())(
                (beta * (logps - ref_logps)).exp()
            )
        ),
    },
)


# ------------------------------------------------------------------------- 3.3 training on many pairs


@st.composite
def data_and_settings(draw):
    """A reference over Y completions, how often each was chosen over each other, and how to train."""
    Y = draw(st.integers(2, 3))
    pairs = Y * (Y - 1)
    counts = draw(st.lists(st.integers(0, 3), min_size=pairs, max_size=pairs).filter(any))
    wins = torch.zeros(Y, Y, dtype=torch.float64)
    wins[~torch.eye(Y, dtype=torch.bool)] = torch.tensor(counts, dtype=torch.float64)
    return {
        "ref_logps": draw(log_distribution(Y)),
        "wins": wins,
        "beta": draw(betas()),
        "learning_rate": draw(tenths(0.1, 2)),
        "steps": draw(st.integers(1, 4)),
    }


def pushed_choice_by_choice(ref_logps, wins, beta, learning_rate, steps) -> Tensor:
    """Every choice pushes its winner's logit up and its loser's down, by beta σ(-margin) [D5.1]."""
    choices = [
        (i, j) for i, row in enumerate(wins.tolist()) for j, n in enumerate(row) for _ in range(int(n))
    ]
    ref, theta = ref_logps.tolist(), ref_logps.tolist()
    for _ in range(steps):
        push = [0.0] * len(theta)
        for won, lost in choices:
            margin = beta * (theta[won] - ref[won] - theta[lost] + ref[lost])
            weight = beta / (1 + math.exp(margin)) / len(choices)
            push[won] += weight
            push[lost] -= weight
        theta = [number + learning_rate * change for number, change in zip(theta, push)]
    total = sum(math.exp(number) for number in theta)
    return torch.tensor([number - math.log(total) for number in theta], dtype=torch.float64)


def _slope(theta, ref_logps, wins, beta, *, loss=lambda m: -F.logsigmoid(m), average=True) -> Tensor:
    """The gradient of the mean loss of all choices."""
    theta = theta.clone().requires_grad_()
    rewards = beta * (theta.log_softmax(-1) - ref_logps)
    total = (wins * loss(rewards[:, None] - rewards[None, :])).sum() / (wins.sum() if average else 1)
    return torch.autograd.grad(total, theta)[0]


def _trained(slope=_slope, start=lambda ref: ref, end=lambda theta: theta.log_softmax(-1), fewer=0):
    """Somebody's training: the slope, where it starts, what is returned, and how many steps are left out."""

    def train(ref_logps, wins, beta, learning_rate, steps):
        theta = start(ref_logps).clone()
        for _ in range(steps - fewer):
            theta = theta - learning_rate * slope(theta, ref_logps, wins, beta)
        return end(theta)

    return train


def _accumulating(ref_logps, wins, beta, learning_rate, steps):
    theta, total = ref_logps.clone(), torch.zeros_like(ref_logps)
    for _ in range(steps):
        total = total + _slope(theta, ref_logps, wins, beta)
        theta = theta - learning_rate * total
    return theta.log_softmax(-1)


def _towards_the_winners(theta, ref_logps, wins, beta) -> Tensor:
    """The gradient of -log pi of the winners alone."""
    return theta.softmax(-1) - wins.sum(-1) / wins.sum()


TRAINING = Exercise(
    number="3.3",
    function="train_dpo",
    inputs=data_and_settings(),
    expected=pushed_choice_by_choice,
    source="training without autograd: every choice pushes two logits, one up and one down",
    mistakes={
        "uphill: gradient descent subtracts the gradient": _trained(lambda *given: -_slope(*given)),
        "gradients pile up: clear the old one before each step": _accumulating,
        "the sum over all choices: take their mean": _trained(partial(_slope, average=False)),
        "the mean over the cells of the table: divide by the number of choices": _trained(
            lambda theta, ref, wins, beta: _slope(theta, ref, wins, beta, average=False) / wins.numel()
        ),
        "each kind of choice counts once: weight it by how often it happened": _trained(
            lambda theta, ref, wins, beta: _slope(theta, ref, (wins > 0).double(), beta)
        ),
        "winners and losers are exchanged: wins[i, j] counts how often i was chosen over j": _trained(
            lambda theta, ref, wins, beta: _slope(theta, ref, wins.T, beta)
        ),
        "training starts at zero: it starts at the reference": _trained(start=torch.zeros_like),
        "the reference is missing in the loss": _trained(
            lambda theta, ref, wins, beta: _slope(theta, 0 * ref, wins, beta)
        ),
        "the reference follows the policy: it must stay where training began": _trained(
            lambda theta, ref, wins, beta: _slope(theta, theta.log_softmax(-1), wins, beta)
        ),
        "β is missing": _trained(lambda theta, ref, wins, beta: _slope(theta, ref, wins, 1.0)),
        "the logarithm is missing: this trains on -σ(margin)": _trained(
            partial(_slope, loss=lambda m: -m.sigmoid())
        ),
        "-log π of the winners is minimised: that is SFT on them, the losers do not count": _trained(
            _towards_the_winners
        ),
        "one step too few": _trained(fewer=1),
        "one step too many": _trained(fewer=-1),
        "these are logits: log_softmax makes log-probabilities of them": _trained(end=lambda theta: theta),
        "these are probabilities: return their logarithms": _trained(end=lambda theta: theta.softmax(-1)),
    },
)

# ----------------------------------------------------------------- 3.4 the policy becomes the reference


@st.composite
def world_and_rounds(draw):
    """A reference and rewards of one prompt's Y completions, beta, and how many rounds."""
    Y = draw(st.integers(2, 4))
    return {
        "ref_logps": draw(log_distribution(Y)),
        "rewards": draw(vector(Y, -2, 2)),
        "beta": draw(st.sampled_from([1.0, 2.0, 0.5, 3.0])),
        "rounds": draw(st.integers(1, 4)),
    }


def round_after_round(ref_logps, rewards, beta, rounds) -> Tensor:
    """The optimum, number by number, whose probabilities are the next round's reference."""
    policy = [math.exp(p) for p in ref_logps.tolist()]
    for _ in range(rounds):
        parts = [p * math.exp(r / beta) for p, r in zip(policy, rewards.tolist())]
        policy = [part / sum(parts) for part in parts]
    return torch.tensor([math.log(p) for p in policy], dtype=torch.float64)


def _tilted(ref_logps, rewards, beta) -> Tensor:
    return (ref_logps + rewards / beta).log_softmax(-1)


ROUNDS = Exercise(
    number="3.4",
    function="after_rounds",
    inputs=world_and_rounds(),
    expected=round_after_round,
    source="the optimum of each round, with that of the round before as its reference",
    mistakes={
        "this is the first round's policy: the second has another reference, so it moves on": (
            lambda ref, r, beta, rounds: _tilted(ref, r, beta)
        ),
        "each round costs more: n rounds at β are one at β/n, not at nβ": (
            lambda ref, r, beta, rounds: _tilted(ref, r, beta * rounds)
        ),
        "the reference is counted once a round: only the reward is": (
            lambda ref, r, beta, rounds: (rounds * (ref + r / beta)).log_softmax(-1)
        ),
        "the reward doubles from round to round: people's choices stay as they are, it adds up": (
            lambda ref, r, beta, rounds: _tilted(ref, r * (2**rounds - 1), beta)
        ),
        "β falls from round to round: it stays, the reference moves": (
            lambda ref, r, beta, rounds: _tilted(ref, r * rounds * (rounds + 1) / 2, beta)
        ),
        "one round too many": lambda ref, r, beta, rounds: _tilted(ref, (rounds + 1) * r, beta),
        "one round too few": lambda ref, r, beta, rounds: _tilted(ref, (rounds - 1) * r, beta),
        "the reference is missing": lambda ref, r, beta, rounds: _tilted(0 * ref, rounds * r, beta),
        "β multiplies the reward: π* has e^(r/β)": (
            lambda ref, r, beta, rounds: _tilted(ref, rounds * r, 1 / beta)
        ),
        "β is missing": lambda ref, r, beta, rounds: _tilted(ref, rounds * r, 1.0),
        "the best completion alone: rounds lead there, but only in the limit": (
            lambda ref, r, beta, rounds: (r == r.max()).double().log()
        ),
        "not normalised: subtract log Z": lambda ref, r, beta, rounds: ref + rounds * r / beta,
        "these are probabilities: return their logarithms": (
            lambda ref, r, beta, rounds: _tilted(ref, rounds * r, beta).exp()
        ),
    },
)

EXERCISES = [LOSS, PREFERENCES, TRAINING, ROUNDS]
