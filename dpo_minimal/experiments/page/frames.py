"""The numbers of the page: a world of eight film reviews, its optimum for every beta, and a training on it.

A *frame* is what the page shows at one place of a slider, in plain numbers for JSON. All of them are the
library's, so that the page itself only looks up and draws. The tokens are in words.py. Y completions of one
prompt are Y (Y - 1) / 2 pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...bandit import Bandit, TabularPolicy, dpo_objective, loss_on_table, safe_learning_rate
from ...certificates import certify
from ...closed_form import best_of_n_logps, kl_divergence, optimal_logps, soft_value
from ...losses import dpo_loss
from ...preferences import Rankings, all_sets, bradley_terry, expected_pairs
from ...text.reviews import picker, verb_phrase
from ...train import train
from ..bandit.fit import max_distance

Frame = dict[str, Any]

PROMPT = "The film"
SIGNS = (1, 1, 1, 0, 0, -1, -1, -1)  # of the eight: praise, facts, complaints
LONGEST = 24  # letters of a completion, which must fit on a telephone
BETAS = [2 ** (k / 6) for k in range(-24, 31)]  # 1/16 to 32, six to an octave
STEPS = sorted(
    {0, *(round(10 ** (k / 16)) for k in range(49))}
)  # that have a frame: 16 a decade, up to 1,000
SLOWNESS = 10  # divides the safe step, with which half of the way would be over after three steps
BEST_OF = (2, 4, 8, 16, 64)
RANDOM_POLICIES = 160


def page_world(seed: int) -> Bandit:
    """Eight short film reviews after one prompt, most reward first [D1.1].

    The reward is the reviews' own (`sentiment`), no two praises or complaints alike. The reference is drawn,
    softmax of N(-r / 2, 1): it leans towards complaints, so that there is something to learn.
    """
    pick = picker("page", 1, seed)
    found: dict[str, float] = {}
    while len(found) < len(SIGNS):
        clause = verb_phrase(pick, sign := SIGNS[len(found)])
        if len(clause.text) <= LONGEST and (sign == 0 or clause.value not in found.values()):
            found[clause.text] = clause.value
    names = sorted(found, key=lambda text: -found[text])
    rewards = torch.tensor([[found[text] for text in names]], dtype=torch.float64)
    noise = torch.Generator().manual_seed(seed)
    scores = torch.randn(rewards.shape, generator=noise, dtype=torch.float64) - rewards / 2
    return Bandit(scores.log_softmax(-1), rewards, (PROMPT,), (tuple(names),))


def probs_of(logps: Tensor) -> list[float]:
    """(1, Y) log-probabilities as probabilities."""
    return logps[0].exp().tolist()


def place_of(logps: Tensor, world: Bandit) -> Frame:
    """A policy (1, Y) as a point: KL(pi || pi_ref) in nats, and E_pi[r] [D10.1]."""
    kl, reward = kl_divergence(logps, world.ref_logps), (logps.exp() * world.rewards).sum(-1)
    return {"kl": kl.item(), "reward": reward.item()}


def optimum_frames(world: Bandit, betas: list[float]) -> list[Frame]:
    """pi* = pi_ref exp(r / beta) / Z (Eq. 4) for each beta [D3.4], its place on the frontier [D10.1], and
    beta log Z, where the frontier's tangent begins: no policy is above beta log Z + beta KL."""
    frames, tables = [], (world.ref_logps, world.rewards)
    for beta in betas:
        logps, value = optimal_logps(*tables, beta=beta), soft_value(*tables, beta=beta).item()
        frames.append({"beta": beta, "value": value, "probs": probs_of(logps), **place_of(logps, world)})
    return frames


def training_path(world: Bandit, pairs: Rankings, beta: float) -> Iterator[tuple[int, Tensor]]:
    """DPO on a table of logits, by gradient descent (Eq. 7) [D4.4]: (step, log pi (1, Y)) for `STEPS`."""
    policy = TabularPolicy(world.ref_logps)
    rate = safe_learning_rate(pairs, beta=beta) / SLOWNESS
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    objective = lambda batch: (dpo_objective(policy(), world.ref_logps, batch, beta=beta)[0], {})  # noqa: E731
    yield 0, policy().detach()
    for record in train(objective, optimizer, itertools.repeat(pairs, STEPS[-1])):
        if record["step"] in STEPS:
            yield int(record["step"]), policy().detach()


def training_frames(world: Bandit, beta: float) -> list[Frame]:
    """Where the training is, and what its gradient proves about it [D11.2]; and how each pair pulls [D5.1].

    `bound` is None where no certificate can be issued. A pair has two labels, "the first is better" and "the
    second is better", each with its gradient weight w = beta sigma(-margin) and its pull, the weight times
    the label's probability; entries of `weights` and `pulls` are [first, second], of `margins` the first's.
    """
    pairs = expected_pairs(world.rewards, all_sets(world.exists))
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=beta)
    labels = (2, len(pairs.weight) // 2)  # `expected_pairs` has first all "the first is better"
    chance = pairs.weight * labels[1]  # of each label among the two of its pair
    frames = []
    for step, logps in training_path(world, pairs, beta):
        bound = certify(logps, world.ref_logps, pairs, beta=beta).logp_bound.item()
        each = loss_on_table(dpo_loss, logps, world.ref_logps, pairs, beta=beta)
        weights, pulls = each.gradient_weights, chance * each.gradient_weights
        margins = (each.chosen_rewards - each.rejected_rewards).view(labels)[0]
        frame = {"step": step, "probs": probs_of(logps), "margins": margins.tolist()}
        frame |= {"weights": weights.view(labels).T.tolist(), "pulls": pulls.view(labels).T.tolist()}
        frame |= {"distance": max_distance(logps, optimal), "bound": bound if math.isfinite(bound) else None}
        frames.append(frame | place_of(logps, world))
    return frames


def other_policies(world: Bandit, seed: int) -> list[Frame]:
    """Places of policies that are nobody's optimum: tilted by some multiple of the reward, and by noise."""
    noise = torch.Generator().manual_seed(seed)
    places = []
    for _ in range(RANDOM_POLICIES):
        tilt, spread = torch.rand(2, generator=noise, dtype=torch.float64).tolist()
        drawn = torch.randn(world.rewards.shape, generator=noise, dtype=torch.float64)
        scores = world.ref_logps + 2 * tilt * world.rewards + 2 * spread * drawn
        places.append(place_of(scores.log_softmax(-1), world))
    return places


def world_frames(beta: float, seed: int) -> Frame:
    """Everything on the page but its words. Args: beta of the training, > 0; seed of the world."""
    world = page_world(seed)
    tables, slate = (world.ref_logps, world.rewards), all_sets(world.exists)
    columns = world.completions[0], world.rewards[0].tolist(), probs_of(world.ref_logps)
    chances = bradley_terry(*world.rewards[0, slate.items].unbind(-1)).tolist()
    return {
        "beta": beta,
        "prompt": PROMPT,
        "completions": [dict(zip(("text", "reward", "ref"), row)) for row in zip(*columns)],
        "optimum": optimum_frames(world, sorted({beta, *BETAS})),
        "target": probs_of(optimal_logps(*tables, beta=beta)),
        "training": training_frames(world, beta),
        "pairs": [{"items": i, "chance": chance} for i, chance in zip(slate.items.tolist(), chances)],
        "policies": other_policies(world, seed),
        "best_of_n": [{"n": n, **place_of(best_of_n_logps(*tables, n=n), world)} for n in BEST_OF],  # [D10.3]
    }
