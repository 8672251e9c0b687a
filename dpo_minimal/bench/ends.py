"""Where a loss ends: the policy at which training from the reference comes to rest, or that there is none.

Tables of log-probabilities, one prompt a row, each trained on exact preferences or on counts. What is
followed is the field of gradients and not the loss's value, because some losses detach a part of themselves
(KTO's divergence, BCO's mean), so that they descend no function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..bandit import random_bandit
from ..preferences import (
    Rankings,
    Slate,
    all_sets,
    expected_pairs,
    reference_pairs,
)
from .subject import Subject

FAR = 60.0  # a range of scores, in nats of reward, beyond which no world here has its end
NOTHING = 1e-15  # a gradient below it is rounding, where the first one or the curvature is 1
SURE, ROUGH = 1e-8, 0.015  # error of scores: of an exact end; of an average, or where shares are rounded
AWAY = 20.0  # beyond it what still moves has no end
COPIES = 600  # rows that stand for a population where a loss reads its whole batch
FLIPPED = 0.1
SIZES = (3, 4, 5, 4, 5, 5)  # completions of each world


Field = Callable[[Tensor], tuple[Tensor, Tensor]]


class Ends(NamedTuple):
    """The end of each prompt.

    Fields: logps (X, Y) where it came to rest, or was last seen; settled (X,) whether it rests there;
    runs_away (X,) whether it was last seen far off and still moving, neither where it goes to and fro; error
    (X,) about how far the scores are from those of the end.
    """

    logps: Tensor
    settled: Tensor
    runs_away: Tensor
    error: Tensor


class Scenes(NamedTuple):
    """Prompts to be trained on, each by itself.

    Fields: ref_logps, rewards, lengths (X, Y), padded with -inf, 0, 1; rankings of all prompts; kind (X,)
    a word for each.
    """

    ref_logps: Tensor
    rewards: Tensor
    lengths: Tensor
    rankings: Rankings
    kind: tuple[str, ...]

    def where(self, *kinds: str) -> list[int]:
        """The numbers of the prompts of these kinds."""
        return [x for x, kind in enumerate(self.kind) if kind in kinds]


def worlds(count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(reference, rewards, token counts, another reference), of the README's example and of random worlds."""
    found = []
    for seed, size in enumerate(SIZES[:count]):
        generator = torch.Generator().manual_seed(100 + seed)
        world, other = (random_bandit(1, size, generator=generator) for _ in range(2))
        lengths = torch.randint(1, 6, (size,), generator=generator).double()
        ref, rewards = world.ref_logps[0], world.rewards[0]
        if seed == 0:
            ref, rewards = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.arange(3.0).double()
        found.append((ref, rewards, lengths, other.ref_logps[0]))
    return found


def population(count: int) -> Scenes:
    """Some worlds, each with several choices of pairs, with another reference and with labels reversed; and
    the last one with people who agree."""
    rows: list[tuple[str, Tensor, Tensor, Tensor, Rankings]] = []
    for ref, rewards, lengths, other in worlds(count):
        table, last = rewards[None], len(ref) - 1
        everything = all_sets(ref[None] > -math.inf)
        neighbours = torch.stack([torch.arange(last), torch.arange(1, last + 1)], -1)
        chain = Slate(torch.zeros(last).long(), neighbours, torch.ones(last).double())
        pairs = expected_pairs(table, everything)
        drawn = expected_pairs(table, reference_pairs(ref[None]))
        flipped = expected_pairs(table, everything, flip_probability=FLIPPED)
        rows += [
            ("all pairs", ref, rewards, lengths, pairs),
            ("pairs of the reference", ref, rewards, lengths, drawn),
            ("chain", ref, rewards, lengths, expected_pairs(table, chain)),
            ("another reference", other, rewards, lengths, pairs),
            ("reversed", ref, rewards, lengths, flipped),
        ]
    won = rewards[pairs.order[:, 0]] > rewards[pairs.order[:, 1]]
    of_best = (pairs.order == rewards.argmax()).any(-1)
    for kind, kept in (("unanimous", won), ("never loses", won | ~of_best)):
        rows.append((kind, ref, rewards, lengths, pairs._replace(weight=pairs.weight * kept)))
    return _stacked(rows)


def _stacked(rows: list[tuple[str, Tensor, Tensor, Tensor, Rankings]]) -> Scenes:
    kinds, refs, rewards, lengths, pairs = zip(*rows)
    size = torch.tensor([len(each.weight) for each in pairs])
    number = torch.arange(len(rows)).repeat_interleave(size)
    order, weight = torch.cat([each.order for each in pairs]), torch.cat([each.weight for each in pairs])
    kept = weight > 0
    return Scenes(
        _padded(refs, -math.inf), _padded(rewards, 0.0), _padded(lengths, 1.0),
        Rankings(number[kept], order[kept], weight[kept]), kinds,
    )  # fmt: skip


def _padded(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True, padding_value=value)


def ends(subject: Subject, scenes: Scenes, *, reads_batch: bool) -> Ends:
    """Train every prompt from its reference to where the gradient vanishes, if it ever does.

    A loss that reads its whole batch is given each prompt alone, in rows of equal weight.
    """
    if not reads_batch:
        return _settle(_field(subject, scenes, scenes.rankings.normalised_by_prompt()), scenes.ref_logps)
    found = []
    for x, kind in enumerate(scenes.kind):
        own = Rankings(*(field[scenes.rankings.prompt == x] for field in scenes.rankings))
        rows = equal_rows(own._replace(prompt=torch.zeros_like(own.prompt)))
        one = Scenes(*(table[x : x + 1] for table in scenes[:3]), rows, (kind,))
        found.append(_settle(_field(subject, one, rows, reads_batch=True), one.ref_logps, rounds=150))
    every = Ends(*(torch.cat(fields) for fields in zip(*found)))
    return every._replace(error=torch.full_like(every.error, ROUGH))


def equal_rows(rankings: Rankings, count: int = COPIES) -> Rankings:
    """About the same data as `count` rows of equal weight: every outcome as often as it is probable."""
    marks = (rankings.normalised().weight.cumsum(0) * count).round().long()  # so that none is lost
    copies = marks.diff(prepend=marks.new_zeros(1))
    weight = torch.full((int(marks[-1]),), 1 / int(marks[-1]), dtype=torch.float64)
    prompt, order = (field.repeat_interleave(copies, 0) for field in rankings[:2])
    return Rankings(prompt, order, weight)


def _field(subject: Subject, scenes: Scenes, rankings: Rankings, *, reads_batch: bool = False) -> Field:
    """From scores (X, Y) to log-probabilities and the gradient of each prompt's mean loss in the scores, or
    from (C, X, Y) to as many of either.

    Scores are log-ratios times beta, where the loss has one: in them its shape does not depend on beta.
    """
    scale, X = 1 / subject.options.get("beta", 1.0), len(scenes.ref_logps)

    @cache
    def copies(count: int) -> tuple[Tensor, Tensor, Rankings]:
        prompt = (rankings.prompt + X * torch.arange(count).unsqueeze(-1)).flatten()
        weight = rankings.weight.repeat(count) * X  # of each prompt they sum to one
        rows = Rankings(prompt, rankings.order.repeat(count, 1), weight)
        return scenes.ref_logps.repeat(count, 1), scenes.lengths.repeat(count, 1), rows

    def field(scores: Tensor) -> tuple[Tensor, Tensor]:
        leaf = scores.flatten(0, -2).clone().requires_grad_()  # copies of a prompt are as good as others
        ref, lengths, rows = copies(len(leaf) // X)
        logps = (ref + scale * leaf).log_softmax(-1)
        losses = rows.weight * subject.on_table(logps, ref, rows, lengths)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        broken = 0 * losses.detach().new_zeros(len(leaf)).index_add(0, rows.prompt, losses.detach())
        return logps.detach().view_as(scores), (gradient + broken.unsqueeze(-1)).view_as(scores)

    def one_by_one(scores: Tensor) -> tuple[Tensor, Tensor]:
        logps, gradients = zip(*map(field, scores.unflatten(0, (-1, X)) if scores.dim() == 2 else scores))
        return torch.stack(logps).view_as(scores), torch.stack(gradients).view_as(scores)

    return one_by_one if reads_batch else field


def _settle(unscaled: Field, ref: Tensor, rounds: int = 300) -> Ends:
    """Implicit Euler steps along the field whose length grows as the gradient falls: first the path of
    training, at the end Newton's method. What then goes to and fro, at a kink of the loss, is averaged."""
    there = ref > -math.inf
    scores, time = torch.zeros_like(ref), torch.full((len(ref),), 0.3, dtype=torch.float64)
    first, curved = unscaled(scores)[1].norm(dim=-1), _jacobian(unscaled, scores).abs().amax((-2, -1))
    unit = torch.where(first > NOTHING * curved, first, math.inf).unsqueeze(-1)  # inf: it never starts

    def field(scores: Tensor) -> tuple[Tensor, Tensor]:
        logps, gradient = unscaled(scores)  # a loss times a number must end where it did
        return logps, (gradient / unit).nan_to_num(0, 0, 0)

    logps, gradient = field(scores)
    for _ in range(rounds):
        slope = _jacobian(field, scores)
        newton = _solve(slope, torch.zeros(len(ref)).double(), gradient, there)
        rest, lowest = gradient.norm(dim=-1), _lowest_curvature(slope, there)
        # Else the differences cannot tell it from a direction without curvature.
        firm = lowest > 1e-9 * slope.abs().amax((-2, -1))
        error = torch.where(firm, newton.abs().amax(-1), math.inf)
        reach = _range(scores, there)
        error = torch.where(rest == 0, 0, error)  # nothing pulls any more
        settled = error <= SURE
        moving = ~settled & (reach <= FAR) & (rest > NOTHING)
        if not moving.any():
            break
        step = _solve(slope, 1 / time + (-2 * lowest).clamp(min=0), gradient, there)
        step = step * (2 / step.norm(dim=-1, keepdim=True).clamp(min=2.0))
        scores = scores + torch.where(moving.unsqueeze(-1), step, 0)
        logps, new = field(scores)
        ratio = rest / new.norm(dim=-1).clamp(min=1e-300)
        time, gradient = time * ratio.clamp(0.3, 5.0), new
    finite = unscaled(scores)[1].isfinite().all(-1)
    faint = (gradient.norm(dim=-1) < 1e-4) & finite  # at a kink it is not
    settled = (settled & finite) | (faint & (error < 0.01) & (reach <= AWAY))  # in float32 it is not sure
    runs_away = ~settled & (faint | (reach > AWAY))
    error = torch.where(settled, error.clamp(max=ROUGH), ROUGH)
    if (restless := ~settled & ~runs_away & finite).any():
        averaged, coherence = _averaged(field, scores, restless)
        logps = torch.where(restless.unsqueeze(-1), averaged, logps)
        settled = settled | (restless & (coherence < 0.1))
        runs_away = runs_away | (restless & (coherence > 0.9))
    return Ends(logps, settled, runs_away, error)


def _averaged(field: Field, scores: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
    """The mean policy of gradient steps that grow shorter, and how much of these steps went in one direction:
    little around a kink, all of it where there is no end."""
    scale = torch.ones(len(scores), 1, dtype=torch.float64)
    for k in range(1, 1601):
        if k in (1, 801):
            mean, steps, lengths = (torch.zeros_like(scores) for _ in range(3))
        gradient = field(scores)[1]
        scale = torch.maximum(scale, gradient.norm(dim=-1, keepdim=True))
        step = torch.where(moving.unsqueeze(-1), gradient / scale, 0) * 4 / k**0.7
        scores = scores - step
        mean, steps, lengths = mean + scores / 800, steps + step, lengths + step.norm(dim=-1, keepdim=True)
    coherence = steps.norm(dim=-1) / lengths[:, 0].clamp(min=1e-300)
    return field(mean)[0], coherence


def _lowest_curvature(slope: Tensor, there: Tensor) -> Tensor:
    """(X,) the lowest real part of an eigenvalue, in the directions that change the policy."""
    member = there.double()
    constant = member.unsqueeze(-1) * member.unsqueeze(-2) / member.sum(-1)[:, None, None]
    size = slope.abs().amax((-2, -1), keepdim=True)  # lifts the other directions above all curvature
    lifted = slope + 2 * size * (constant + torch.diag_embed(1 - member))
    return torch.linalg.eigvals(lifted).real.amin(-1)


def _solve(slope: Tensor, shift: Tensor, gradient: Tensor, there: Tensor) -> Tensor:
    """-(slope + shift)^-1 gradient (X, Y), in the directions that change the policy."""
    member = there.double()
    constant = member.unsqueeze(-1) * member.unsqueeze(-2) / member.sum(-1)[:, None, None]
    matrix = slope + torch.diag_embed(shift.unsqueeze(-1) * member)
    size = matrix.abs().amax((-2, -1), keepdim=True).clamp(min=1e-290)
    tiny = 1e-15 * torch.eye(slope.shape[-1], dtype=torch.float64)  # where nothing is curved
    inverse = torch.linalg.inv(matrix / size + constant + torch.diag_embed(1 - member) + tiny)
    return -(inverse @ (gradient.unsqueeze(-1) / size)).squeeze(-1)


def _range(scores: Tensor, there: Tensor) -> Tensor:
    return scores.masked_fill(~there, -math.inf).amax(-1) - scores.masked_fill(~there, math.inf).amin(-1)


def _jacobian(field: Field, scores: Tensor, step: float = 1e-4) -> Tensor:
    """(X, Y, Y) by central differences, of what is detached as well."""
    aside = step * torch.eye(scores.shape[-1], dtype=torch.float64).unsqueeze(1)  # (Y, 1, Y)
    ahead, behind = field(torch.cat([scores + aside, scores - aside]))[1].chunk(2)
    return ((ahead - behind) / (2 * step)).permute(1, 2, 0)
