"""Notebook 3: the loss of preferences, written for a policy."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dpo_minimal import dpo_loss
from dpo_minimal.bench.exercises import (
    Exercise,
    Strain,
    betas,
    completion_logps,
    log_distribution,
    table,
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


# ------------------------------------------------------------------------------ 3.3 one step of training


@st.composite
def one_step(draw):
    """Logits and reference of one prompt, a pair of different completions, beta and a step size."""
    Y = draw(st.integers(2, 4))
    chosen = draw(st.integers(0, Y - 1))
    rejected = draw(st.integers(0, Y - 1).filter(lambda l: l != chosen))
    return {
        "theta": draw(vector(Y, -3, 3)),
        "ref_logps": draw(log_distribution(Y)),
        "chosen": chosen,
        "rejected": rejected,
        "beta": draw(betas()),
        "learning_rate": draw(tenths(0.1, 2)),
    }


def descended(theta, ref_logps, chosen, rejected, beta, learning_rate) -> Tensor:
    """theta after a step along autograd's gradient of the library's loss."""
    theta = theta.clone().requires_grad_()
    logps = theta.log_softmax(-1)
    pair = (logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected])
    loss = dpo_loss(*(entry.view(1) for entry in pair), beta=beta).losses.sum()
    return (theta - learning_rate * torch.autograd.grad(loss, theta)[0]).detach()


def _moved(theta, chosen, rejected, up, down):
    moved = theta.clone()
    moved[chosen] += up
    moved[rejected] += down
    return moved


def _margin(theta, ref_logps, chosen, rejected, beta):
    return beta * ((theta - ref_logps)[chosen] - (theta - ref_logps)[rejected])


def _step(scale: float, *, up: float = 1.0, down: float = -1.0):
    """A student's step: the right one times `scale`, or with one side only."""

    def step(theta, ref_logps, chosen, rejected, beta, learning_rate):
        size = (
            scale * learning_rate * beta * torch.sigmoid(-_margin(theta, ref_logps, chosen, rejected, beta))
        )
        return _moved(theta, chosen, rejected, up * size, down * size)

    return step


def _without_outer_beta(theta, ref_logps, chosen, rejected, beta, learning_rate):
    size = learning_rate * torch.sigmoid(-_margin(theta, ref_logps, chosen, rejected, beta))
    return _moved(theta, chosen, rejected, size, -size)


def _confident(theta, ref_logps, chosen, rejected, beta, learning_rate):
    size = learning_rate * beta * torch.sigmoid(_margin(theta, ref_logps, chosen, rejected, beta))
    return _moved(theta, chosen, rejected, size, -size)


STEP = Exercise(
    number="3.3",
    function="dpo_step",
    inputs=one_step(),
    expected=descended,
    source="a step along autograd's gradient of the loss",
    mistakes={
        "uphill: gradient descent subtracts the gradient": _step(-1.0),
        "the gradient's factor β is missing": _without_outer_beta,
        "the weight is σ(-margin): pairs in the wrong order are pushed hardest": _confident,
        "only the chosen logit moves; the rejected one goes down by as much": _step(1.0, down=0.0),
        "only the rejected logit moves; the chosen one goes up by as much": _step(1.0, up=0.0),
        "this is the step; the logits after it are asked for": (
            lambda theta, *rest: _step(1.0)(theta, *rest) - theta
        ),
        "nothing moves": lambda theta, *_: theta.clone(),
    },
)

# ------------------------------------------------------------------------- 3.4 the member with Z = 1


@st.composite
def rewards_and_reference(draw):
    """Rewards and reference of X prompts, and beta."""
    X, Y = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    return {"rewards": draw(table(X, Y)), "ref_logps": draw(log_distribution(X, Y)), "beta": draw(betas())}


def reward_of_the_optimum(rewards, ref_logps, beta) -> Tensor:
    """beta log(pi* / pi_ref) with pi* by its definition, completion by completion."""
    rows = []
    for reward, ref in zip(rewards.tolist(), ref_logps.tolist()):
        strengths = [math.exp(p + r / beta) for p, r in zip(ref, reward)]
        optimum = [strength / sum(strengths) for strength in strengths]
        rows.append([beta * (math.log(p) - q) for p, q in zip(optimum, ref)])
    return torch.tensor(rows, dtype=torch.float64)


def _log_Z(rewards, ref_logps, beta):
    return (ref_logps + rewards / beta).logsumexp(-1, keepdim=True)


CANONICAL = Exercise(
    number="3.4",
    function="canonical_reward",
    inputs=rewards_and_reference(),
    expected=reward_of_the_optimum,
    source="the implicit reward of π*, which is the reward's equivalent with Z = 1",
    strain=Strain(
        {
            "rewards": torch.tensor([[800.0, 0.0]], dtype=torch.float64),
            "ref_logps": torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(),
            "beta": 1.0,
        },
        torch.tensor([[math.log(2), math.log(2) - 800]], dtype=torch.float64),
    ),
    mistakes={
        "log Z is subtracted: β log Z is in units of reward": lambda r, ref, beta: r - _log_Z(r, ref, beta),
        "the sign is reversed: subtract β log Z": lambda r, ref, beta: r + beta * _log_Z(r, ref, beta),
        "the reference is missing in Z": lambda r, ref, beta: (
            r - beta * (r / beta).logsumexp(-1, keepdim=True)
        ),
        "β multiplies the reward in Z, which has e^(r/β)": (
            lambda r, ref, beta: r - beta * (ref + r * beta).logsumexp(-1, keepdim=True)
        ),
        "one Z for all prompts: each prompt has its own": (
            lambda r, ref, beta: r - beta * (ref + r / beta).flatten().logsumexp(-1)
        ),
        "the mean under the reference is subtracted: that makes E_ref[r] zero, not Z one": (
            lambda r, ref, beta: r - (ref.exp() * r).sum(-1, keepdim=True)
        ),
        "the mean reward is subtracted: that makes the mean zero, not Z one": (
            lambda r, ref, beta: r - r.mean(-1, keepdim=True)
        ),
        "Z without its logarithm": lambda r, ref, beta: r - beta * _log_Z(r, ref, beta).exp(),
        "this is log π*: leave out log π_ref, and multiply by β": (
            lambda r, ref, beta: ref + r / beta - _log_Z(r, ref, beta)
        ),
        "each prompt's Z has lost its axis: keepdim=True": (
            lambda r, ref, beta: r - beta * _log_Z(r, ref, beta).squeeze(-1)
        ),
        "this is β log Z; the reward less it is asked for": (
            lambda r, ref, beta: beta * _log_Z(r, ref, beta).squeeze(-1)
        ),
    },
)

EXERCISES = [LOSS, PREFERENCES, STEP, CANONICAL]
