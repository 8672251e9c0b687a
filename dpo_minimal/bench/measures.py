"""What a loss does, in numbers: one function for each part of the card, each from a subject to its findings.

A finding's name is its key in card.json; `None` says that it could not be decided, or does not apply.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..closed_form import kl_divergence, optimal_logps
from ..laws.sampling_laws import cramer_rao, kl_law
from ..losses import PreferenceLoss
from ..model import GPT, GPTConfig
from ..policy import EnumeratedPolicy, enumerate_completions
from ..preferences import Rankings, all_sets, expected_pairs, random_cycles
from ..rivals.baselines import frontier_gap
from ..validation import InputError
from .ends import Ends, Scenes, ends, equal_rows, population
from .subject import Subject, example

Findings = dict[str, Any]
SAME = 1e-9  # relative: far above rounding in float64, far below what a dependence does
WIDEST, LIMIT = 8, 1e4  # of the margins that are drawn, nats of reward; of those that must stay finite, nats
BETAS = 0.02, 50.0  # among which the nearest optimum is looked for
EXACT = 1e-12  # up to these nats two ends are the same, or up to the square of what is not sure of log-ratios
MAIN = ("all pairs", "pairs of the reference", "chain", "another reference")


class Curves(NamedTuple):
    """Along margins (M,), nats of reward: the loss, and the pulls on chosen and rejected, (M,) each."""

    margins: Tensor
    losses: Tensor
    chosen: Tensor
    rejected: Tensor


def pairs_of_margins(subject: Subject, margins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference and token counts (M, 2) of pairs with these margins, half of it on either side."""
    h = margins / subject.options.get("beta", 1.0)
    reference = torch.full((len(h), 2), -(h.abs().max().item() / 2 + 20.0), dtype=torch.float64)
    policy = reference + torch.stack([h / 2, -h / 2], -1)
    return policy, reference, torch.full_like(policy, 10.0)


def curves(subject: Subject) -> Curves:
    """The loss and its pulls along margins."""
    margins = torch.arange(-10 * WIDEST, 10 * WIDEST + 1).double() / 10
    return Curves(margins, *subject.pulls(*pairs_of_margins(subject, margins)))


def shape(subject: Subject) -> Findings:
    """Value, finiteness, direction, curvature and pulls of single pairs."""
    along = curves(subject)
    _, reference, lengths = example()
    start = subject(reference, reference, lengths).detach()
    steps = along.losses.diff()
    noise = max(1e-12, 8 * torch.finfo(along.losses.dtype).eps) * along.losses.abs().max()
    bends = steps.diff()
    scale = torch.maximum(along.chosen.abs(), along.rejected.abs()).max()
    middle, pull = len(along.margins) // 2, along.chosen + along.rejected
    _, w, l = subject.pulls(*example(64, 1 / subject.options.get("beta", 1.0)))
    return {
        "value_at_reference": start[0].item() + 0.0 if _same(start, start[0].expand_as(start)) else None,
        "finite_at_large_margins": {
            str(dtype).removeprefix("torch."): _finite(subject, dtype)
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        },
        "rises_from": _first(along.margins[1:], steps > noise),
        "concave_from": _first(along.margins[1:-1], bends < -noise),
        "equal_pulls": _same(w, l),
        "pull_left_at_sure_pairs": (pull[-1] / pull[middle]).item() if pull[middle] != 0 else None,
        "growth_on_unanimous_pairs": _growth(subject),
        "negative_pull_from": _first(
            along.margins, torch.minimum(along.chosen, along.rejected) < -SAME * scale
        ),
        "own_weights_are_its_gradient": _own_weights(subject),
    }


def _finite(subject: Subject, dtype: torch.dtype) -> bool | None:
    """Whether losses and gradients are finite there; None where the loss refuses such numbers."""
    reference = torch.full((2, 2), -1.5 * LIMIT, dtype=dtype)
    policy = reference + LIMIT / 2 * torch.tensor([[1, -1], [-1, 1]], dtype=dtype)
    try:
        numbers = subject.pulls(policy, reference, torch.full_like(policy, 10.0))
    except Exception:
        return None
    return all(bool(each.isfinite().all()) for each in numbers)


def _growth(subject: Subject) -> str:
    """How the margin of a pair that all agree on grows with the time t of training, from how its pull fades
    along margins that double: not at all, like a power u^-k, like e^-u, or to nothing."""
    margins = torch.tensor([8.0, 16.0, 32.0], dtype=torch.float64)
    _, *sides = subject.pulls(*pairs_of_margins(subject, margins))
    pulls = sum(sides)
    if not (pulls > 0).all():
        return "stops"
    early, late = (-pulls.log().diff()).tolist()
    power = late / math.log(2)
    return "t" if power < 0.01 else "log t" if late > 1.5 * early else f"t^{1 / (1 + power):.2g}"


def _first(places: Tensor, holds: Tensor) -> float | None:
    return places[holds][0].item() if holds.any() else None


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= SAME * (1 + one.abs().max()))


def _own_weights(subject: Subject) -> bool | None:
    policy, *rest = example()
    answer = subject.answer(policy, *rest)
    if not isinstance(answer, PreferenceLoss):
        return None
    _, chosen, rejected = subject.pulls(policy, *rest)
    return _same(answer.chosen_weights, chosen) and _same(answer.rejected_weights, rejected)


def invariances(subject: Subject) -> Findings:
    """What a row's loss depends on."""
    scale = 1 / subject.options.get("beta", 1.0)
    policy, reference, lengths = example(8, scale)
    losses = subject(policy, reference, lengths)
    other = reference + 0.1 * scale * torch.arange(16).view(8, 2)
    single = zip(*(table.split(1) for table in (policy, reference, lengths)))
    apart = torch.cat([subject(*row) for row in single])

    def away(*tables: Tensor) -> bool:
        return not _same(losses, subject(*tables))

    return {
        "reads_reference": away(policy, other, lengths),
        "reads_lengths": away(policy, reference, lengths + torch.tensor([1.0, 3.0])),
        "batch_dependent": not _same(losses, apart),
        "ignores_shift_of_logits": not away(policy - 0.5 * scale, reference, lengths),
        "ignores_shift_of_reference": not away(policy, reference - 0.5 * scale, lengths),
        "ignores_swap_of_the_pair": not away(policy.flip(-1), reference.flip(-1), lengths.flip(-1)),
    }


# --------------------------------------------------------------------------------- where training ends


def closest(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float | None
) -> tuple[float, float, float]:
    """(largest KL(pi || pi*) over prompts at this beta, or at the best one where it is None; the beta at
    which it is least; that least one)."""

    def worst(at: float) -> float:
        return kl_divergence(logps, optimal_logps(ref_logps, rewards, beta=at)).max().item()

    grid = torch.linspace(*map(math.log, BETAS), 60).tolist()
    middle = min(grid, key=lambda at: worst(math.exp(at)))
    low, high = middle - 0.15, middle + 0.15
    for _ in range(45):  # golden section
        a, b = high - 0.618034 * (high - low), low + 0.618034 * (high - low)
        low, high = (low, b) if worst(math.exp(a)) < worst(math.exp(b)) else (a, high)
    found = math.exp((low + high) / 2)
    return worst(found if beta is None else beta), found, worst(found)


def endings(subject: Subject, reads_batch: bool, *, quick: bool) -> Findings:
    """Where training on populations ends, and what that depends on [D4.4]."""
    scenes = population(3 if quick else 6)
    found = ends(subject, scenes, reads_batch=reads_batch)
    main = scenes.where(*MAIN)
    none = dict.fromkeys((
        "ends_at_optimum", "kl_to_optimal", "best_beta", "kl_at_best_beta", "kl_to_own_optimum",
        "kl_to_reference", "reward_below_frontier", "depends_on_pairs", "end_reads_reference",
        "kl_after_flips",
    ))  # fmt: skip
    findings = none | {
        "worlds": len(main),
        "worlds_without_end": int(found.runs_away[main].sum()),
        "worlds_undecided": int((~found.settled & ~found.runs_away)[main].sum()),
        "end_on_unanimous_pairs": _has_end(found, scenes, "unanimous"),
        "end_where_one_never_loses": _has_end(found, scenes, "never loses"),
    }
    if findings["worlds_without_end"]:
        return findings | {"ends_at_optimum": False}
    if findings["worlds_undecided"]:
        return findings
    unsure = found.error[main].max().item() / subject.options.get("beta", 1.0)
    exact = max(EXACT, unsure**2)
    tables = scenes.ref_logps[main], scenes.rewards[main]
    kl, best, least = closest(found.logps[main], *tables, subject.options.get("beta"))
    inside = BETAS[0] < best < BETAS[1]  # else the end has no such beta, as the reference has none
    base, tree, drawn, other, flipped = (
        scenes.where(kind)
        for kind in ("all pairs", "chain", "pairs of the reference", "another reference", "reversed")
    )
    moved = max(kl_divergence(found.logps[rows], found.logps[base]).max().item() for rows in (tree, drawn))
    optimal = optimal_logps(
        scenes.ref_logps[flipped], scenes.rewards[flipped], beta=subject.options.get("beta", best)
    )
    after = kl_divergence(found.logps[flipped], optimal).max().item()
    return findings | {
        "ends_at_optimum": kl <= exact and (inside or "beta" in subject.options),
        "kl_to_optimal": kl,
        "best_beta": best if inside else None,
        "kl_at_best_beta": least,
        "ends_at_optimum_of_best_beta": inside and least <= exact,
        "kl_to_own_optimum": _own_optimum(subject, scenes, found, base),
        "kl_to_reference": kl_divergence(found.logps[main], scenes.ref_logps[main]).max().item(),
        "reward_below_frontier": _below_frontier(found, scenes, base),
        "depends_on_pairs": moved > exact,
        "end_reads_reference": kl_divergence(found.logps[other], found.logps[base]).max().item() > exact,
        "kl_after_flips": after if found.settled[flipped].all() else None,
    }


def _has_end(found: Ends, scenes: Scenes, kind: str) -> bool | None:
    (x,) = scenes.where(kind)
    return True if found.settled[x] else False if found.runs_away[x] else None


def _alone(scenes: Scenes, x: int) -> tuple[Tensor, Tensor, Tensor, Rankings]:
    """Reference, rewards, token counts (1, Y) and comparisons of one prompt, without padding."""
    size = int((scenes.ref_logps[x] > -math.inf).sum())
    own = scenes.rankings.prompt == x
    tables = (table[x : x + 1, :size] for table in scenes[:3])
    return *tables, Rankings(
        torch.zeros(int(own.sum())).long(), *(field[own] for field in scenes.rankings[1:])
    )


def _own_optimum(subject: Subject, scenes: Scenes, found: Ends, rows: list[int]) -> float | None:
    """KL(pi || what the record says is its optimum), the worst prompt; None where it does not know."""
    record = subject.record
    if not callable(record.optimum):
        return None
    worst = 0.0
    for x in rows:
        ref, _, lengths, rankings = _alone(scenes, x)
        extra = {"lengths": lengths} if "lengths" in record.reads else {}
        try:
            own = record.optimum(rankings, ref, **extra, **subject.options)
        except InputError:
            return None
        worst = max(worst, kl_divergence(found.logps[x : x + 1, : ref.shape[-1]], own).item())
    return worst


def _below_frontier(found: Ends, scenes: Scenes, rows: list[int]) -> float:
    """Reward that the frontier has at the same divergence, less the policy's, the worst prompt [D10.1]."""
    gaps = []
    for x in rows:
        ref, rewards, *_ = _alone(scenes, x)
        gaps.append(frontier_gap(found.logps[x : x + 1, : ref.shape[-1]], ref, rewards).reward_gap.item())
    return max(gaps)


# ------------------------------------------------------------------------------------------ finite data


def finite_data(subject: Subject, reads_batch: bool, beta: float, *, quick: bool) -> Findings:
    """Estimates from samples, for a loss that ends at pi* of this beta: the mean squared error of its rewards
    over the Cramer-Rao bound [D11.3], and N KL beside the law of maximum likelihood [D11.5]."""
    data_sets, pairs = 200 if quick else 2000, 1000
    data_sets = data_sets // 10 if reads_batch else data_sets  # one after the other
    rewards = torch.tensor([[0.0, 0.5, 1.0, 1.2]], dtype=torch.float64)
    ref = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    truth = expected_pairs(rewards, all_sets(ref > -math.inf))
    generator = torch.Generator().manual_seed(7)
    drawn = torch.multinomial(
        truth.weight.expand(data_sets, -1), pairs, replacement=True, generator=generator
    )
    counts = torch.nn.functional.one_hot(drawn, len(truth.weight)).sum(1).double()
    number = torch.arange(data_sets).repeat_interleave(len(truth.weight))
    every = Rankings(number, truth.order.repeat(data_sets, 1), counts.flatten())
    shape = (data_sets, ref.shape[-1])
    tables = ref.expand(shape), rewards.expand(shape), torch.full(shape, 5.0, dtype=torch.float64)
    found = ends(subject, Scenes(*tables, every, ("sample",) * data_sets), reads_batch=reads_batch)
    scores = beta * (found.logps - ref)
    error = (scores - scores.mean(-1, keepdim=True)) - (rewards - rewards.mean())
    optimal = optimal_logps(ref, rewards, beta=beta)
    law, _ = kl_law(optimal, ref, truth, beta=beta)
    return {
        "efficiency": (error**2).sum(-1).mean().item() / cramer_rao(rewards, truth, pairs).item(),
        "n_kl": pairs * kl_divergence(found.logps, optimal.expand(shape)).mean().item(),
        "n_kl_law": law.item(),
    }


# ---------------------------------------------------------------------------------------------- networks


def on_gpt(subject: Subject, reads_batch: bool, optimal_beta: float, *, quick: bool) -> Findings:
    """A GPT-2 that writes completions of one to four tokens, trained on their population [D9.1]: how far from
    pi*, and how its mean length changes beside that of pi*."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        gpt = GPT(GPTConfig(vocab_size=3, block_size=6, n_layer=1, n_head=2, n_embd=16))
    completions = enumerate_completions(3, 4, eos=2)
    policy = EnumeratedPolicy(gpt, torch.tensor([[0, 1], [1, 1]]), completions).double()
    with torch.no_grad():
        ref = policy().log_softmax(-1)
    rewards = min(1.0, 2 * optimal_beta) * torch.randn(ref.shape, generator=generator, dtype=torch.float64)
    lengths = completions.lengths.double().expand(ref.shape)
    slate = random_cycles(ref > -math.inf, cycles=4, generator=generator)
    rankings = expected_pairs(rewards, slate).normalised_by_prompt()
    rankings = equal_rows(rankings) if reads_batch else rankings
    steps = 500 if quick else 800
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for _ in range(steps):
        loss = rankings.weight @ subject.on_table(policy(), ref, rankings, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logps = policy().log_softmax(-1)
    optimal = optimal_logps(ref, rewards, beta=optimal_beta)
    longer, should_be = (((table.exp() - ref.exp()) * lengths).sum(-1).mean() for table in (logps, optimal))
    return {
        "gpt_kl_to_optimal": kl_divergence(logps, optimal).max().item(),
        "gpt_length_change": longer.item(),
        "gpt_length_change_of_optimum": should_be.item(),
    }


# The chosen and the rejected completion share their first feature; two others share none with them.
FEATURES = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0], [0.0, 0.0]], dtype=torch.float64)


def displacement(subject: Subject) -> Findings:
    """log pi(y_w) - log pi_ref(y_w) once training on one pair, by weights of shared features, has raised its
    log-ratio margin to one nat [D13.1]; None where it does not get there."""
    weights = torch.zeros(2, dtype=torch.float64)
    ref = torch.full((1, 4), -math.log(4), dtype=torch.float64)
    pair = Rankings(torch.tensor([0]), torch.tensor([[0, 1]]), torch.ones(1).double())
    lengths = torch.full_like(ref, 5.0)
    for _ in range(2000):
        leaf = weights.clone().requires_grad_()
        logps = (FEATURES @ leaf).log_softmax(-1).unsqueeze(0)
        if (logps[0, 0] - logps[0, 1]).item() >= 1:
            return {"displacement": (logps - ref)[0, 0].item()}
        (gradient,) = torch.autograd.grad(subject.on_table(logps, ref, pair, lengths).sum(), leaf)
        weights = weights - 0.01 * gradient / gradient.norm().clamp(min=1e-12)
    return {"displacement": None}
