"""How people choose: Bradley-Terry and Plackett-Luce, exact or sampled, with label noise on request.

One representation serves all: `Rankings`, weighted orderings of K completions, best first. A comparison
of two is a ranking with K = 2. Sampled data carry a weight of one a ranking; a *population* carries the
exact probability of every possible ranking instead, so that an expectation is a weighted sum.

What people are shown is separate from how they choose: a `Slate` lists the sets of K completions that they
are asked about, with probabilities.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .validation import (
    InputError,
    check_count,
    check_finite,
    check_flip_probability,
    check_log_distribution,
    check_positive,
)


class _Fields(NamedTuple):
    prompt: Tensor
    order: Tensor
    weight: Tensor


class Rankings(_Fields):
    """E weighted rankings of K completions; a comparison is a ranking with K = 2 [D2.2].

    Fields: prompt (E,) number; order (E, K) completion numbers, best first, for K = 2 the chosen, then the
    rejected one; weight (E,) count or probability of the ranking, >= 0, of any dtype.
    Raises InputError where they are not that: -1 would be read as the last completion.
    """

    def __new__(cls, prompt: Tensor, order: Tensor, weight: Tensor) -> Rankings:
        E = len(weight)
        if prompt.shape != (E,) or weight.shape != (E,) or order.dim() != 2 or len(order) != E:
            shapes = ", ".join(str(tuple(field.shape)) for field in (prompt, order, weight))
            raise InputError(f"rankings need shapes (E,), (E, K) and (E,), got {shapes}.")
        if E > 0 and (prompt.min() < 0 or order.min() < 0):
            raise InputError("rankings need numbers of prompts and completions from 0, but one is negative.")
        if not (weight >= 0).all() or not torch.isfinite(weight).all():
            raise InputError("weights of rankings must be finite numbers of at least 0.")
        return super().__new__(cls, prompt, order, weight)

    def gather(self, table: Tensor) -> Tensor:
        """Look up (X, Y) -> (E, K): the table's entries of the ranked completions, best first."""
        return table[self.prompt.unsqueeze(-1), self.order]

    def normalised(self) -> Rankings:
        """The same rankings with weights that sum to one."""
        return self._replace(weight=self.weight.double() / self.weight.double().sum())

    def normalised_by_prompt(self) -> Rankings:
        """Weights that sum to one, and to the same for each prompt. Where prompts share no parameters this
        moves no optimum, and prompts with little data are trained as fast as the others."""
        weight = self.weight.double()
        total = weight.new_zeros(int(self.prompt.max()) + 1).index_add(0, self.prompt, weight)
        return self._replace(weight=weight / total[self.prompt]).normalised()

    def to(self, device: torch.device | str) -> Rankings:
        """The same rankings on another device."""
        return Rankings(*(field.to(device) for field in self))


class Slate(NamedTuple):
    """E sets of K completions that people are asked to rank, drawn with probability proportional to weight
    [D2.2].

    Fields: prompt (E,), items (E, K) distinct completion numbers in any order, weight (E,).
    """

    prompt: Tensor
    items: Tensor
    weight: Tensor


# ---------------------------------------------------------------------------------------------- models


def bradley_terry(first_rewards: Tensor, second_rewards: Tensor) -> Tensor:
    """P(first is preferred to second) = sigmoid(r_first - r_second) (Eq. 1, 16) [D2.1].

    Args: first_rewards, second_rewards: in nats of log-odds, of any one shape. Returns probabilities of it.
    Raises: InputError: shapes differ or an entry is not finite.
    """
    check_finite(first_rewards=first_rewards, second_rewards=second_rewards)
    return torch.sigmoid(first_rewards - second_rewards)


def preference_matrix(rewards: Tensor) -> Tensor:
    """Every Bradley-Terry probability at once: entry [..., i, j] = P(i is preferred to j) (Eq. 1) [D2.1].

    Args: rewards (..., Y), finite. Returns (..., Y, Y), with 1/2 on the diagonal.
    """
    check_finite(rewards=rewards)
    return torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))


def plackett_luce_logprob(ranked_rewards: Tensor) -> Tensor:
    """log P(this order) = sum_k [r_k - log sum_{j >= k} e^{r_j}], best first (Eq. 18) [D8.1].

    The ranking is built from the top: each place goes to one of those left, with probability
    proportional to e^r. With K = 2 this is the log of Bradley-Terry.

    Args: ranked_rewards (..., K), finite. Returns (...,) nats. Raises InputError on bad input.

    Example:
        >>> plackett_luce_logprob(torch.zeros(3)).exp()                        # each of 3! orders alike
        tensor(0.1667)
    """
    check_finite(ranked_rewards=ranked_rewards)
    still_there = ranked_rewards.flip(-1).logcumsumexp(-1).flip(-1)  # entry k: log sum over j >= k
    return (ranked_rewards - still_there).sum(-1)


# ------------------------------------------------------------------------------- what people are shown


def all_sets(exists: Tensor, *, size: int = 2) -> Slate:
    """Every set of `size` completions, all of a prompt's equally likely, all prompts equally likely [D4.4].

    Args: exists (X, Y) True where the prompt has that completion; size >= 2, at most what any prompt has.
    Raises: InputError.
    """
    _check_size(exists, size)
    sets = torch.combinations(torch.arange(exists.shape[1], device=exists.device), size)  # (S, K)
    prompt, number = exists[:, sets].all(-1).nonzero().T
    return _even_slate(prompt, sets[number], len(exists))


def reference_pairs(ref_logps: Tensor) -> Slate:
    """Two different completions drawn independently from the reference, as in the paper's experiments; all
    prompts equally likely [D13.2].

    Completions that are rare under the reference are rarely compared: this is the problem of coverage.

    Args: ref_logps (X, Y); -inf where the prompt has no such completion.
    Raises: InputError: another shape, no distribution, a prompt with a single completion.
    """
    check_log_distribution(ref_logps=ref_logps)
    if ref_logps.dim() != 2:
        raise InputError(f"ref_logps must have shape (X, Y), got {tuple(ref_logps.shape)}.")
    pairs = all_sets(ref_logps > -torch.inf)
    logs = ref_logps.double()[pairs.prompt.unsqueeze(-1), pairs.items].sum(-1)  # their exponentials may be 0
    most = logs.new_full((len(ref_logps),), -torch.inf).scatter_reduce(0, pairs.prompt, logs, "amax")
    weight = (logs - most[pairs.prompt]).exp()
    total = weight.new_zeros(len(ref_logps)).index_add(0, pairs.prompt, weight)
    return pairs._replace(weight=weight / (len(ref_logps) * total[pairs.prompt]))


def random_cycles(exists: Tensor, *, cycles: int, size: int = 2, generator: torch.Generator) -> Slate:
    """A sparse connected choice of sets: neighbours along `cycles` random rings through all completions
    [D4.4].

    One ring already connects everything, which is all that the optimum needs; a handful make the graph an
    expander, on which training converges about as fast as on all Y^2 pairs.

    Args: exists, size as `all_sets`; cycles >= 1; generator for reproducible draws. Raises: InputError.
    """
    check_count("cycles", cycles)
    _check_size(exists, size)
    X, Y = exists.shape
    noise = torch.rand(X, cycles, Y, generator=generator, device=exists.device)
    ring = noise.masked_fill(~exists.unsqueeze(1), 2).argsort(-1)  # a random order, those absent at the end
    count = exists.sum(-1).view(X, 1, 1)
    place = torch.arange(Y, device=exists.device).expand(X, cycles, Y)
    items = torch.stack([ring.gather(-1, (place + k) % count) for k in range(size)], -1)  # (X, cycles, Y, K)
    prompt = torch.arange(X, device=exists.device).view(X, 1, 1).expand(X, cycles, Y)
    return _even_slate(prompt[place < count], items[place < count], X)


def _check_size(exists: Tensor, size: int) -> None:
    check_count("size", size, minimum=2)
    fewest = int(exists.sum(-1).min())
    if size > fewest:
        raise InputError(f"cannot choose sets of {size}: a prompt has only {fewest} completions; lower size.")


def _even_slate(prompt: Tensor, items: Tensor, num_prompts: int) -> Slate:
    sets = torch.bincount(prompt, minlength=num_prompts)
    return Slate(prompt, items, 1 / (num_prompts * sets[prompt]).double())


# ------------------------------------------------------------------------------------ what they answer


def expected_pairs(
    rewards: Tensor, slate: Slate, *, temperature: float = 1.0, flip_probability: float = 0.0
) -> Rankings:
    """The population of comparisons: both outcomes of each pair, weighted by their exact probability.

    P(first chosen) = (1 - 2 flip) sigmoid((r_first - r_second) / temperature) + flip (Eq. 1) [D2.3].

    Args:
        rewards: (X, Y).
        slate: pairs with their probability.
        temperature: > 0; above one, labels are noisier than Bradley-Terry's.
        flip_probability: in [0, 1/2): the chance that a label is reversed afterwards.
    Returns:
        Rankings with K = 2, 2E of them, weights summing to one.
    """
    chance = _chance_of_first(rewards, slate, temperature, flip_probability)
    prompt = torch.cat([slate.prompt, slate.prompt])
    order = torch.cat([slate.items, slate.items.flip(-1)])
    weight = torch.cat([slate.weight * chance, slate.weight * (1 - chance)])
    return Rankings(prompt, order, weight).normalised()


def sample_pairs(
    rewards: Tensor,
    num_pairs: int,
    *,
    slate: Slate,
    temperature: float = 1.0,
    flip_probability: float = 0.0,
    generator: torch.Generator | None = None,
) -> Rankings:
    """Draw pairs from the slate and label each by Bradley-Terry (Eq. 1) [D2.1, D2.3].

    Args: as `expected_pairs`; num_pairs >= 1; generator for reproducible draws.
    Returns: Rankings with K = 2: the distinct outcomes, each weighted by how often it came.
    """
    check_count("num_pairs", num_pairs)
    chance = _chance_of_first(rewards, slate, temperature, flip_probability)
    drawn = torch.multinomial(slate.weight, num_pairs, replacement=True, generator=generator)
    uniform = torch.rand(num_pairs, generator=generator, dtype=torch.float64, device=drawn.device)
    first_wins = (uniform < chance[drawn]).unsqueeze(-1)
    order = torch.where(first_wins, slate.items[drawn], slate.items[drawn].flip(-1))
    return tally(slate.prompt[drawn], order)


def _chance_of_first(rewards: Tensor, slate: Slate, temperature: float, flip_probability: float) -> Tensor:
    check_finite(rewards=rewards)
    check_positive("temperature", temperature)
    check_flip_probability(flip_probability)
    if slate.items.shape[-1] != 2:
        raise InputError(f"the slate must hold pairs, got sets of {slate.items.shape[-1]} completions.")
    pair = rewards.double()[slate.prompt.unsqueeze(-1), slate.items] / temperature
    return (1 - 2 * flip_probability) * bradley_terry(pair[:, 0], pair[:, 1]) + flip_probability


def expected_rankings(rewards: Tensor, slate: Slate) -> Rankings:
    """The population of rankings: all K! orders of each set with their Plackett-Luce probability (Eq. 18)
    [D8.1]. Returns E * K! rankings, weights summing to one."""
    check_finite(rewards=rewards)
    size = slate.items.shape[-1]
    orders = torch.tensor(list(itertools.permutations(range(size))), device=slate.items.device)  # (K!, K)
    order = slate.items[:, orders].view(-1, size)
    prompt = slate.prompt.repeat_interleave(len(orders))
    chance = plackett_luce_logprob(rewards.double()[prompt.unsqueeze(-1), order]).exp()
    return Rankings(prompt, order, slate.weight.repeat_interleave(len(orders)) * chance).normalised()


def sample_rankings(
    rewards: Tensor, num_rankings: int, *, slate: Slate, generator: torch.Generator | None = None
) -> Rankings:
    """Draw sets from the slate and rank each by Plackett-Luce: sort r + Gumbel noise (Eq. 18) [D8.2].

    Returns: Rankings, the distinct outcomes weighted by how often they came.
    """
    check_count("num_rankings", num_rankings)
    check_finite(rewards=rewards)
    drawn = torch.multinomial(slate.weight, num_rankings, replacement=True, generator=generator)
    items, prompt = slate.items[drawn], slate.prompt[drawn]
    exponential = torch.empty_like(items, dtype=torch.float64).exponential_(generator=generator)
    noisy = rewards.double()[prompt.unsqueeze(-1), items] - exponential.log()  # -log Exp(1) is Gumbel
    return tally(prompt, items.gather(-1, noisy.argsort(-1, descending=True)))


def tally(prompt: Tensor, order: Tensor, weight: Tensor | None = None) -> Rankings:
    """Merge equal rankings and add up their weights (one each by default): the data, without repetition
    [D11.8]."""
    rows, group = torch.unique(torch.cat([prompt.unsqueeze(-1), order], -1), dim=0, return_inverse=True)
    weight = torch.ones_like(prompt, dtype=torch.float64) if weight is None else weight.double()
    return Rankings(rows[:, 0], rows[:, 1:], weight.new_zeros(len(rows)).index_add(0, group, weight))


def win_counts(rankings: Rankings, num_prompts: int, num_completions: int) -> Tensor:
    """(X, Y, Y) float64: entry [x, i, j] is the total weight with which i was ranked above j on prompt x
    [D11.8]."""
    weight = rankings.weight.double()
    counts = weight.new_zeros(num_prompts, num_completions, num_completions)
    K = rankings.order.shape[-1]
    above, below = torch.triu_indices(K, K, offset=1, device=weight.device)
    i, j = rankings.order[:, above], rankings.order[:, below]  # (E, K(K-1)/2)
    index = rankings.prompt.unsqueeze(-1).expand_as(i), i, j
    return counts.index_put(index, weight.unsqueeze(-1).expand(i.shape), accumulate=True)


def by_size(rankings: Rankings, exists: Tensor) -> Iterator[tuple[Tensor, int, Rankings]]:
    """Prompts apart by size, within a factor of two: in one table (X, Y, Y) each of many small prompts would
    take as much room and time as the largest [D11.8].

    Args: exists (X, Y) True where the prompt has that completion; what is ranked counts as well.
    Yields: numbers of the prompts (P,), the width that their tables need, their rankings, by place in (P,).
    """
    there = exists.clone()
    there[rankings.prompt.unsqueeze(-1), rankings.order] = True
    width = (there * torch.arange(1, there.shape[1] + 1, device=there.device)).amax(-1).clamp(min=1)
    octave = width.log2().floor()
    for number in octave.unique():
        mine = octave == number
        prompt, order, weight = (field[mine[rankings.prompt]] for field in rankings)
        own = Rankings(mine.cumsum(0)[prompt] - 1, order, weight)
        yield mine.nonzero().flatten(), int(width[mine].max()), own
