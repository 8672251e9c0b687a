"""Choice models, what is shown and what is answered, against enumeration, plain loops and sampling laws."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, normal

from dpo_minimal import InputError
from dpo_minimal.certificates import connected
from dpo_minimal.laws.finite_data import add_prior
from dpo_minimal.laws.sampling_laws import chi_square_quantile
from dpo_minimal.preferences import (
    Rankings,
    Slate,
    all_sets,
    bradley_terry,
    by_size,
    expected_pairs,
    expected_rankings,
    plackett_luce_logprob,
    preference_matrix,
    random_cycles,
    reference_pairs,
    sample_pairs,
    sample_rankings,
    tally,
    win_counts,
)

EPS = torch.finfo(torch.float64).eps
RAGGED = torch.tensor([[True, True, True, True], [True, False, True, True], [False, True, True, True]])
FALSE_ALARM = 1e-6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plackett_luce(rewards) -> float:
    """P(this order), place by place."""
    return math.prod(
        math.exp(r - max(rewards)) / math.fsum(math.exp(s - max(rewards)) for s in rewards[k:])
        for k, r in enumerate(rewards)
    )


def as_table(rankings: Rankings) -> dict[tuple, float]:
    """{(prompt, *order): weight}, added up where a ranking is listed twice."""
    table = Counter()
    for prompt, order, weight in zip(*(field.tolist() for field in rankings)):
        table[(prompt, *order)] += weight
    return table


def assert_same_tables(actual: dict, expected: dict, tolerance: float):
    assert set(actual) == set(expected)
    assert all(abs(actual[key] - weight) <= tolerance for key, weight in expected.items())


@st.composite
def masks(draw, fewest=2):
    """(X, Y) which completions exist, at least `fewest` of each prompt."""
    Y = draw(st.integers(fewest, 6))
    rows = draw(st.lists(st.sets(st.integers(0, Y - 1), min_size=fewest), min_size=1, max_size=3))
    return torch.tensor([[y in row for y in range(Y)] for row in rows])


# ------------------------------------------------------------------------------------------ choice models


@given(generators, st.integers(2, 8), st.sampled_from([1.0, 3.0, 100.0]))
def test_bradley_terry(generator, size, scale):
    """Eq. 1, 16 (property 33): e^a / (e^a + e^b), complementary to the reverse; the matrix of all pairs."""
    rewards = normal(2, size, generator=generator, scale=scale)
    matrix = preference_matrix(rewards)
    for x, i, j in itertools.product(range(2), range(size), range(size)):
        a, b = rewards[x, i].item(), rewards[x, j].item()
        chosen = bradley_terry(rewards[x, i : i + 1], rewards[x, j : j + 1])
        top = max(a, b)
        expected = math.exp(a - top) / (math.exp(a - top) + math.exp(b - top))
        # A few roundings of numbers at most one, and that of the difference of rewards.
        tolerance = 4 * EPS * (1 + abs(a) + abs(b))
        assert abs(chosen.item() - expected) <= tolerance
        assert abs(matrix[x, i, j].item() - expected) <= tolerance
        # Two sigmoids, each rounded once or twice.
        assert abs(matrix[x, i, j] + matrix[x, j, i] - 1) <= 4 * EPS
    assert (matrix.diagonal(dim1=-2, dim2=-1) == 0.5).all()


@given(generators, st.integers(1, 6), st.sampled_from([1.0, 3.0, 30.0]))
def test_plackett_luce_sums_to_one(generator, size, scale):
    """Eq. 18 (property 33): the K! orders of K completions have probabilities that sum to one, each as built
    place by place."""
    rewards = normal(size, generator=generator, scale=scale)
    orders = list(itertools.permutations(range(size)))
    logprobs = plackett_luce_logprob(rewards[torch.tensor(orders)])
    # K roundings of exponents of the rewards' size.
    tolerance = 10 * size * EPS * (1 + rewards.abs().max().item())
    assert abs(logprobs.exp().sum().item() - 1) <= tolerance
    for order, logprob in zip(orders[:24], logprobs.tolist()):
        assert abs(math.exp(logprob) - plackett_luce([rewards[y].item() for y in order])) <= tolerance


@given(generators, st.sampled_from([1.0, 10.0, 100.0]))
def test_ranking_of_two_is_a_comparison(generator, scale):
    """Eq. 18, 20 (property 34): with K = 2 Plackett-Luce is Bradley-Terry."""
    rewards = normal(5, 2, generator=generator, scale=scale)
    log_odds = rewards[:, 0] - rewards[:, 1]
    expected = -torch.log1p(torch.exp(-log_odds.abs())) + log_odds.clamp(max=0)  # log sigmoid
    # Rounding of rewards of this size.
    tolerance = 8 * EPS * (1 + rewards.abs().max())
    assert (plackett_luce_logprob(rewards) - expected).abs().max() <= tolerance
    chosen = bradley_terry(rewards[:, 0], rewards[:, 1])
    assert (plackett_luce_logprob(rewards).exp() - chosen).abs().max() <= tolerance


@given(generators, st.integers(2, 5))
def test_pairs_of_a_ranking_are_bradley_terry(generator, size):
    """Eq. 18 (property 35): the probability that i is ranked before j is sigmoid(r_i - r_j)."""
    rewards = normal(size, generator=generator)
    orders = list(itertools.permutations(range(size)))
    chances = plackett_luce_logprob(rewards[torch.tensor(orders)]).exp().tolist()
    for i, j in itertools.permutations(range(size), 2):
        before = math.fsum(p for order, p in zip(orders, chances) if order.index(i) < order.index(j))
        # Rounding of 60 probabilities with relative error of a few EPS times the rewards' size, about ten.
        assert abs(before - sigmoid((rewards[i] - rewards[j]).item())) <= 1e-13


@given(generators, st.integers(2, 8), st.floats(-20, 20))
def test_choices_ignore_a_prompt_constant(generator, size, constant):
    """Lemma 1, Eq. 1, 18 (property 36): r + f(x) makes the same choices."""
    rewards = normal(3, size, generator=generator)
    shifted = rewards + constant * torch.arange(3).unsqueeze(-1)
    # Rounding of r + c, with |c| at most 40, in each of K terms.
    tolerance = 4 * size * EPS * (41 + rewards.abs().max())
    assert (preference_matrix(shifted) - preference_matrix(rewards)).abs().max() <= tolerance
    assert (plackett_luce_logprob(shifted) - plackett_luce_logprob(rewards)).abs().max() <= tolerance
    assert (
        bradley_terry(shifted[:, 0], shifted[:, 1]) - bradley_terry(rewards[:, 0], rewards[:, 1])
    ).abs().max() <= (tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_rewards_stay_finite(dtype):
    """Eq. 1, 18 (property 74): gaps of 2e4 give probabilities 0 and 1 and log-probabilities of minus the gap,
    in the dtype that came in."""
    rewards = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype)
    assert preference_matrix(rewards).dtype == plackett_luce_logprob(rewards).dtype == dtype
    assert bradley_terry(rewards[:, 0], rewards[:, 1]).tolist() == [1.0, 0.0]
    gap = 2 * rewards[0, 0].item()
    assert plackett_luce_logprob(rewards).tolist() == [0.0, -gap]  # exact: the small term is far below 1 ulp


@pytest.mark.parametrize(
    "function",
    [
        lambda rewards: bradley_terry(rewards[:, 0], rewards[:, 1]),
        preference_matrix,
        plackett_luce_logprob,
    ],
    ids=["bradley_terry", "preference_matrix", "plackett_luce_logprob"],
)
def test_gradient_is_that_of_central_differences(function):
    """Eq. 1, 18 (property 14): autograd's gradient against central differences."""
    rewards = normal(3, 4, generator=torch.Generator().manual_seed(0), scale=2.0).requires_grad_()
    # h^2 / 6 times a third derivative below one, plus EPS / h: both below 1e-9.
    assert torch.autograd.gradcheck(function, rewards, eps=1e-5, atol=1e-9, rtol=1e-8)


@given(generators, st.integers(2, 5))
def test_accuracy_ceiling(generator, size):
    """Eq. 1 (property 52): over all K! orders of the completions, the share of labels an order agrees with is
    largest for the order of the rewards, and then sum of m max(p, 1 - p)."""
    rewards = normal(1, size, generator=generator)
    exists = torch.ones(1, size, dtype=torch.bool)
    slate = all_sets(exists)
    slate = slate._replace(weight=torch.rand(len(slate.weight), generator=generator, dtype=torch.float64))
    slate = slate._replace(weight=slate.weight / slate.weight.sum())  # an arbitrary pair distribution
    labels = as_table(expected_pairs(rewards, slate))

    def accuracy(order):
        return math.fsum(
            w for (_, chosen, rejected), w in labels.items() if order.index(chosen) < order.index(rejected)
        )

    ceiling = 0.0
    for (i, j), m in zip(slate.items.tolist(), slate.weight.tolist()):
        p = sigmoid((rewards[0, i] - rewards[0, j]).item())
        ceiling += m * max(p, 1 - p)
    best = max(accuracy(order) for order in itertools.permutations(range(size)))
    by_reward = rewards[0].argsort(descending=True).tolist()
    # Rounding of ten terms below one.
    assert abs(best - ceiling) <= 100 * EPS
    assert abs(accuracy(by_reward) - ceiling) <= 100 * EPS


# ------------------------------------------------------------------------------------ what people are shown


@given(masks(fewest=3), st.integers(2, 3))
def test_all_sets_lists_each_set_once(exists, size):
    """Eq. 2 (the data distribution): every set of a prompt's completions once, a prompt's sets equally
    likely, prompts equally likely."""
    slate = all_sets(exists, size=size)
    expected = {}
    for x, row in enumerate(exists.tolist()):
        members = [y for y, there in enumerate(row) if there]
        for items in itertools.combinations(members, size):
            expected[(x, *items)] = 1 / (len(exists) * math.comb(len(members), size))
    actual = {(x, *sorted(i)): w for x, i, w in zip(*(field.tolist() for field in slate))}
    assert len(slate.weight) == len(expected)
    assert_same_tables(actual, expected, EPS)  # one division
    assert abs(slate.weight.sum().item() - 1) <= EPS * len(slate.weight)  # that many roundings


@given(masks(fewest=3), st.integers(1, 3), st.integers(2, 3), generators)
def test_random_cycles_connect_what_exists(exists, cycles, size, generator):
    """Eq. 6, 7 (property 24, the optimum needs a connected graph): rings connect exactly the completions that
    exist; each is in `size` sets of every ring; prompts are equally likely."""
    state = generator.get_state()
    slate = random_cycles(exists, cycles=cycles, size=size, generator=generator)
    seen = torch.zeros_like(exists, dtype=torch.long)
    mass = [0.0] * len(exists)
    for x, items, weight in zip(*(field.tolist() for field in slate)):
        assert len(set(items)) == size
        seen[x, items] += 1
        mass[x] += weight
    assert torch.equal(seen, cycles * size * exists.long())
    # Rounding of at most eighteen equal weights.
    assert all(abs(m - 1 / len(exists)) <= 20 * EPS for m in mass)
    met = win_counts(Rankings(*slate), *exists.shape)
    both_exist = exists.unsqueeze(-1) & exists.unsqueeze(-2)
    itself = torch.eye(exists.shape[1], dtype=torch.bool)
    assert torch.equal(connected(met + met.mT), both_exist | itself)

    generator.set_state(state)
    again = random_cycles(exists, cycles=cycles, size=size, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(slate, again))


def test_rings_differ():
    """Eq. 2 (the data distribution): rings are drawn afresh for each prompt and each cycle."""
    slate = random_cycles(
        torch.ones(2, 12, dtype=torch.bool), cycles=2, generator=torch.Generator().manual_seed(0)
    )
    edges = [
        {frozenset(edge) for edge in part.tolist()} for part in slate.items.view(4, 12, 2)
    ]  # prompt-major, then cycle
    for one, other in itertools.combinations(edges, 2):
        assert one != other  # equal with probability 2 * 12 / 12! for fair draws


def test_sets_larger_than_a_prompt_are_refused():
    """Eq. 18: a set cannot have more completions than the poorest prompt, and needs two."""
    generator = torch.Generator().manual_seed(0)
    poor = torch.tensor([[True, True, True], [True, False, True]])
    for build in (all_sets, lambda mask, size: random_cycles(mask, cycles=1, size=size, generator=generator)):
        assert build(poor, size=2).items.shape[-1] == 2
        with pytest.raises(InputError, match="sets of 3: a prompt has only 2 completions"):
            build(poor, size=3)
        for size in (1, 0, -2, 2.0, True):
            with pytest.raises(InputError, match="size must be an integer of at least 2"):
                build(poor, size=size)


# ------------------------------------------------------------------------------------- what they answer


@given(masks(), generators, st.floats(0.2, 5.0), st.floats(0.0, 0.49))
def test_population_of_comparisons(exists, generator, temperature, flip):
    """Eq. 1 (property 21): both outcomes of every pair with the probability of the pair times
    (1 - 2 flip) sigmoid((r_i - r_j) / T) + flip, pair by pair; weights sum to one."""
    rewards = normal(*exists.shape, generator=generator)
    slate = all_sets(exists)
    population = expected_pairs(rewards, slate, temperature=temperature, flip_probability=flip)
    expected = {}
    for x, row in enumerate(exists.tolist()):
        members = [y for y, there in enumerate(row) if there]
        for i, j in itertools.permutations(members, 2):
            clean = sigmoid((rewards[x, i] - rewards[x, j]).item() / temperature)
            share = 1 / (len(exists) * math.comb(len(members), 2))
            expected[(x, i, j)] = share * (clean * (1 - flip) + (1 - clean) * flip)
    # Rounding of exponents below 100.
    assert_same_tables(as_table(population), expected, 100 * EPS)
    assert len(population.weight) == len(expected)
    assert abs(population.weight.sum().item() - 1) <= 10 * EPS * len(population.weight)  # that many roundings


@given(masks(fewest=3), generators, st.integers(2, 3))
def test_population_of_rankings(exists, generator, size):
    """Eq. 18 (property 33): all K! orders of every set, with the set's probability times Plackett-Luce's."""
    rewards = normal(*exists.shape, generator=generator)
    slate = all_sets(exists, size=size)
    population = expected_rankings(rewards, slate)
    expected = {}
    for x, items, weight in zip(*(field.tolist() for field in slate)):
        for order in itertools.permutations(items):
            expected[(x, *order)] = weight * plackett_luce([rewards[x, y].item() for y in order])
    # Rounding of exponents below 20.
    assert_same_tables(as_table(population), expected, 100 * EPS)
    assert abs(population.weight.sum().item() - 1) <= 10 * EPS * len(population.weight)  # that many roundings
    if size == 2:  # a ranking of two is a comparison
        assert_same_tables(as_table(population), as_table(expected_pairs(rewards, slate)), 100 * EPS)


def pearson(sampled: Rankings, law: dict[tuple, float]) -> float:
    """Pearson's statistic of the counts against a law over rankings; no count may fall outside the law."""
    counts = as_table(sampled)
    assert set(counts) <= set(law)
    total = sum(counts.values())
    return sum((counts.get(key, 0) - total * p) ** 2 / (total * p) for key, p in law.items())


@pytest.mark.parametrize(("temperature", "flip"), [(1.0, 0.0), (2.0, 0.0), (0.5, 0.1), (1.0, 0.3)])
def test_comparisons_are_drawn_by_their_law(temperature, flip):
    """Eq. 1 (property 82): frequencies of all outcomes against exact probabilities, Pearson's chi-square."""
    generator = torch.Generator().manual_seed(0)
    rewards = normal(*RAGGED.shape, generator=generator, scale=0.5)
    slate = all_sets(RAGGED)
    uneven = torch.linspace(1, 2, len(slate.weight))
    slate = slate._replace(weight=slate.weight * uneven)  # and not normalised
    total, number = slate.weight.sum().item(), 200_000
    law, noiseless = {}, {}
    for x, (i, j), weight in zip(*(field.tolist() for field in slate)):
        gap = (rewards[x, i] - rewards[x, j]).item()
        p = (1 - 2 * flip) * sigmoid(gap / temperature) + flip
        law[(x, i, j)], law[(x, j, i)] = weight / total * p, weight / total * (1 - p)
        noiseless[(x, i, j)], noiseless[(x, j, i)] = (
            weight / total * sigmoid(gap),
            weight / total * sigmoid(-gap),
        )
    sampled = sample_pairs(
        rewards, number, slate=slate, temperature=temperature, flip_probability=flip, generator=generator
    )
    assert sampled.weight.sum().item() == number
    assert min(law.values()) * number > 100  # enough for the chi-square law of the statistic
    limit = chi_square_quantile(1 - FALSE_ALARM, len(law) - 1)
    assert pearson(sampled, law) <= limit
    if (temperature, flip) != (1.0, 0.0):  # the sample is large enough to notice that noise was ignored
        assert pearson(sampled, noiseless) > 2 * limit


@pytest.mark.parametrize("size", [2, 3])
def test_rankings_are_drawn_by_their_law(size):
    """Eq. 18 (property 82): frequencies of all orders against exact probabilities, Pearson's chi-square."""
    generator = torch.Generator().manual_seed(0)
    rewards = normal(*RAGGED.shape, generator=generator, scale=0.5)
    slate = all_sets(RAGGED, size=size)
    uneven = torch.linspace(1, 2, len(slate.weight))
    slate = slate._replace(weight=slate.weight * uneven)  # and not normalised
    total, number = slate.weight.sum().item(), 200_000
    law, reverse = {}, {}
    for x, items, weight in zip(*(field.tolist() for field in slate)):
        for order in itertools.permutations(items):
            ranked = [rewards[x, y].item() for y in order]
            law[(x, *order)] = weight / total * plackett_luce(ranked)
            # Built from the bottom instead: the mistake of Gumbel noise with the wrong sign.
            reverse[(x, *order)] = weight / total * plackett_luce([-r for r in reversed(ranked)])
    sampled = sample_rankings(rewards, number, slate=slate, generator=generator)
    assert sampled.weight.sum().item() == number
    assert min(law.values()) * number > 100  # enough for the chi-square law of the statistic
    limit = chi_square_quantile(1 - FALSE_ALARM, len(law) - 1)
    assert pearson(sampled, law) <= limit
    if size > 2:  # with two completions both directions are Bradley-Terry
        assert pearson(sampled, reverse) > 2 * limit


@given(generators, st.integers(1, 50))
def test_sampling_is_repeatable(generator, number):
    """Eq. 1, 18 (property 80): the same generator state draws the same data, the next state other data."""
    rewards = normal(*RAGGED.shape, generator=generator)
    slate, triples = all_sets(RAGGED), all_sets(RAGGED, size=3)
    for draw in (
        lambda n: sample_pairs(rewards, n, slate=slate, flip_probability=0.2, generator=generator),
        lambda n: sample_rankings(rewards, n, slate=triples, generator=generator),
    ):
        state = generator.get_state()
        first = draw(number)
        assert first.weight.sum().item() == number
        generator.set_state(state)
        assert all(torch.equal(a, b) for a, b in zip(first, draw(number)))
        generator.set_state(state)
        large, next_large = draw(1000), draw(1000)
        # Counts of 1000 draws over many outcomes: equal only if the generator did not move.
        assert as_table(large) != as_table(next_large)


# ---------------------------------------------------------------------------------------- data as tables

datasets = st.integers(2, 4).flatmap(
    lambda K: st.lists(
        st.tuples(
            st.integers(0, 2), st.permutations(range(4)).map(lambda order: order[:K]), st.integers(1, 9)
        ),
        min_size=1,
        max_size=20,
    )
)


def as_rankings(rows) -> Rankings:
    prompt, order, weight = zip(*rows)
    return Rankings(torch.tensor(prompt), torch.tensor(order), torch.tensor(weight, dtype=torch.float64))


@given(datasets)
def test_tally_adds_up_equal_rankings(rows):
    """Eq. 2, 7 (property 21): each distinct ranking once, weighted by the sum of its weights or its count."""
    rankings = as_rankings(rows)
    merged, counted = tally(*rankings), tally(rankings.prompt, rankings.order)
    weights, counts = Counter(), Counter()
    for prompt, order, weight in rows:
        weights[(prompt, *order)] += weight
        counts[(prompt, *order)] += 1
    for actual, expected in ((merged, weights), (counted, counts)):
        assert len(actual.weight) == len(expected)
        assert as_table(actual) == expected  # exact: small integers


@given(datasets)
def test_win_counts_by_a_loop(rows):
    """Eq. 1, 18 (property 21): entry [x, i, j] adds the weights of the rankings of x with i above j."""
    expected = torch.zeros(3, 4, 4, dtype=torch.float64)
    for prompt, order, weight in rows:
        for k, above in enumerate(order):
            for below in order[k + 1 :]:
                expected[prompt, above, below] += weight
    assert torch.equal(win_counts(as_rankings(rows), 3, 4), expected)  # exact: small integers


@given(datasets, generators)
def test_lookup_and_normalisation(rows, generator):
    """Eq. 2, 7 (property 21): `gather` looks up best first; normalised weights sum to one, in proportion; by
    prompt, each prompt's sum to the same."""
    rankings = as_rankings(rows)
    table = normal(3, 4, generator=generator)
    expected = [[table[prompt, y].item() for y in order] for prompt, order, _ in rows]
    assert rankings.gather(table).tolist() == expected
    total = sum(weight for _, _, weight in rows)
    by_prompt = Counter()
    for prompt, _, weight in rows:
        by_prompt[prompt] += weight
    plain, even = rankings.normalised(), rankings.normalised_by_prompt()
    for i, (prompt, _, weight) in enumerate(rows):
        # One or two divisions of sums of at most twenty terms.
        assert abs(plain.weight[i].item() - weight / total) <= 20 * EPS
        assert abs(even.weight[i].item() - weight / by_prompt[prompt] / len(by_prompt)) <= 20 * EPS
    assert torch.equal(plain.order, rankings.order) and torch.equal(even.prompt, rankings.prompt)


def test_slate_of_triples_gives_no_comparisons():
    """Eq. 1: a comparison is of two; the message says what the slate held."""
    triples = all_sets(RAGGED, size=3)
    rewards = torch.zeros(RAGGED.shape)
    for call in (lambda: expected_pairs(rewards, triples), lambda: sample_pairs(rewards, 5, slate=triples)):
        with pytest.raises(InputError, match="slate must hold pairs, got sets of 3"):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32])
def test_weights_are_shared_out_in_float64(dtype):
    """Counts are exact in every dtype, so are their shares: 1 and 2 of 3, 7 of 7, each prompt a half."""
    data = Rankings(torch.tensor([0, 0, 1]), torch.tensor([[0, 1]] * 3), torch.tensor([1, 2, 7]).to(dtype))
    shares = data.normalised_by_prompt().weight
    assert shares.dtype == torch.float64
    assert shares.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2], rel=2 * EPS, abs=0)  # two divisions
    # and so is the product of two float32 probabilities: no digit is lost but in the table itself
    table = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert torch.equal(reference_pairs(table).weight, reference_pairs(table.double()).weight)


def test_slate_weights_need_not_be_even():
    """Eq. 1: the population follows the slate's own weights, normalised."""
    slate = Slate(torch.tensor([0, 0]), torch.tensor([[0, 1], [1, 2]]), torch.tensor([3.0, 1.0]).double())
    population = as_table(expected_pairs(torch.zeros(1, 3), slate))
    expected = {(0, 0, 1): 3 / 8, (0, 1, 0): 3 / 8, (0, 1, 2): 1 / 8, (0, 2, 1): 1 / 8}
    assert_same_tables(population, expected, EPS)  # equal rewards: halves, exact but for one division


@pytest.mark.parametrize(
    ("prompt", "order", "weight", "named"),
    [
        ([0, 0], [[0, 1], [1, -1]], [1.0, 1.0], "one is negative"),  # read as the last completion
        ([0, -1], [[0, 1], [1, 0]], [1.0, 1.0], "one is negative"),
        ([0], [[0, -1]], [1.0], "one is negative"),
        ([0, 0], [[0, 1], [1, 0]], [1.0, -1.0], "at least 0"),  # maximised instead of minimised
        ([0, 0], [[0, 1], [1, 0]], [1.0, math.nan], "finite"),
        ([0, 0], [[0, 1], [1, 0]], [1.0, math.inf], "finite"),
        ([0, 0], [0, 1], [1.0, 1.0], r"got \(2,\), \(2,\), \(2,\)"),
        ([0], [[0, 1], [1, 0]], [1.0, 1.0], "need shapes"),  # broadcast to both rows
    ],
)
def test_rankings_that_make_no_sense_are_refused(prompt, order, weight, named):
    """By one sentence where they are made, so that no loss, count or certificate reads them."""
    with pytest.raises(InputError, match=rf"^[^\n]*{named}[^\n]*\.$"):
        Rankings(torch.tensor(prompt), torch.tensor(order), torch.tensor(weight))
    fields = torch.tensor([0]), torch.tensor([[1, 1]]), torch.tensor([0])
    assert (
        type(Rankings(*fields)._replace(weight=torch.tensor([2.0]))) is Rankings
    )  # two equal draws are fine
    assert copy.deepcopy(Rankings(*fields)).order.tolist() == [[1, 1]]


def test_tensors_are_made_where_the_input_is():
    """On an accelerator an input's tensors cannot be joined with tensors of the CPU. Here the CPU is the
    input's device, and what is made without a thought is made on "meta", whose tensors hold nothing."""
    exists = torch.tensor([[True, True, True], [True, True, False]])
    rewards, pairs, generator = torch.zeros(2, 3), all_sets(exists), torch.Generator().manual_seed(0)
    data = Rankings(*pairs)
    calls = {
        "all_sets": lambda: all_sets(exists),
        "random_cycles": lambda: random_cycles(exists, cycles=2, generator=generator),
        "reference_pairs": lambda: reference_pairs(torch.where(exists, 0, -torch.inf).log_softmax(-1)),
        "expected_pairs": lambda: expected_pairs(rewards, pairs),
        "sample_pairs": lambda: sample_pairs(rewards, 9, slate=pairs, generator=generator),
        "expected_rankings": lambda: expected_rankings(rewards, pairs),
        "sample_rankings": lambda: sample_rankings(rewards, 9, slate=pairs, generator=generator),
        "tally": lambda: tally(pairs.prompt, pairs.items),
        "tally with weights": lambda: tally(*pairs),
        "win_counts": lambda: [win_counts(data, 2, 3)],
        "by_size": lambda: [part for rows, _, own in by_size(data, exists) for part in (rows, *own)],
        "add_prior": lambda: add_prior(data, exists, 0.5),
    }
    for name, call in calls.items():
        with torch.device("meta"):
            made = call()
        assert all(field.device.type == "cpu" for field in made), name


@given(masks(), generators)
def test_prompts_apart_by_size_are_all_the_data(exists, generator):
    """[D11.8] Each prompt in one part, with its own rankings under its number there; a part is as wide as its
    widest prompt, and none is half as wide."""
    exists = torch.cat([exists, torch.zeros(len(exists), 9, dtype=torch.bool)], -1)
    exists[0] = True  # one wide prompt
    data = sample_pairs(torch.zeros(exists.shape), 40, slate=all_sets(exists), generator=generator)
    whole, seen = win_counts(data, *exists.shape), []
    for rows, width, own in by_size(data, exists):
        seen += rows.tolist()
        widths = [exists[x].nonzero().max().item() + 1 for x in rows.tolist()]
        assert max(widths) == width < 2 * min(widths)
        assert torch.equal(win_counts(own, len(rows), width), whole[rows, :width, :width])
    assert sorted(seen) == list(range(len(exists)))
