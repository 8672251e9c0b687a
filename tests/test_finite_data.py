"""What sampled comparisons determine: the estimate, whether it exists, and the laws of its error.

The estimate is checked without statistics, against iterations and closed forms of the same counts. The
laws are checked by simulation: one prompt a replicate, so that thousands are estimated at once.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, normal

from dpo_minimal.bandit import TabularPolicy, random_bandit, safe_learning_rate
from dpo_minimal.certificates import (
    curvature,
    groups_at_fault,
    largest_resistance,
    maximum_likelihood,
    require_estimate,
)
from dpo_minimal.closed_form import optimal_logps
from dpo_minimal.experiments.bandit.convergence import Settings, finite
from dpo_minimal.laws.finite_data import add_prior, ipo_standard_errors, standard_errors
from dpo_minimal.laws.sampling_laws import chi_square_quantile, finite_data_law, kl_law, normal_quantile
from dpo_minimal.preferences import (
    Rankings,
    Slate,
    all_sets,
    expected_pairs,
    preference_matrix,
    sample_pairs,
    sample_rankings,
    win_counts,
)
from dpo_minimal.train import train
from dpo_minimal.validation import InputError
from dpo_minimal.zoo.ipo import ipo_estimate, ipo_objective

EPS = torch.finfo(torch.float64).eps
Z = 4.8916  # two-sided normal quantile at a false-alarm rate of 1e-6; checked below


# ------------------------------------------------------------------------------------------------ helpers


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def ones(X, Y):
    return torch.ones(X, Y, dtype=torch.bool)


def centred(rewards):
    return rewards - rewards.mean(-1, keepdim=True)


def from_wins(wins):
    """(X, Y, Y) counts of wins as comparisons."""
    x, i, j = wins.nonzero().T
    return Rankings(x, torch.stack([i, j], -1), wins[x, i, j].double())


def replicates(rewards, games, count, generator):
    """`count` data sets on one prompt each: every pair of the (Y,) rewards meets `games` times."""
    Y = len(rewards)
    i, j = torch.triu_indices(Y, Y, offset=1)
    p = torch.sigmoid(rewards[i] - rewards[j]).expand(count, -1)
    won = torch.binomial(torch.full_like(p, games), p, generator=generator)
    wins = torch.zeros(count, Y, Y, dtype=torch.float64)
    wins[:, i, j], wins[:, j, i] = won, games - won
    return from_wins(wins)


def minorise_maximise(wins):
    """Zermelo's iteration for the Bradley-Terry likelihood, all prompts at once; mean-zero rewards."""
    games = wins + wins.mT
    rewards = torch.zeros(wins.shape[:2], dtype=torch.float64)
    for _ in range(20_000):
        strength = rewards.exp()
        share = games / (strength.unsqueeze(-1) + strength.unsqueeze(-2))
        before, rewards = rewards, centred((wins.sum(-1) / share.sum(-1)).log())
        if (rewards - before).abs().max() <= 1e-14:  # a contraction of 0.999 or better leaves 1e-11
            return rewards
    raise AssertionError("Zermelo's iteration did not converge")


def settings(seed):
    return Settings(beta=0.5, pairs=20_000, table_steps=2000, gpt_steps=1, seed=seed, device="cpu")


# ------------------------------------------------------------------------- layer two: the same data, twice


@pytest.mark.parametrize("seed", range(2))
def test_the_trained_policy_is_the_tilt_of_the_estimate(seed):
    """[D11.8] A table trained on 20000 sampled pairs is pi_ref e^{r_hat / beta} / Z of the estimate,
    which Zermelo's iteration finds from the same counts, within its certificate."""
    world = random_bandit(8, 16, generator=generator_of(4 * seed))
    data = sample_pairs(world.rewards, 20_000, slate=all_sets(world.exists), generator=generator_of(seed))
    estimate = maximum_likelihood(data, world.exists)
    zermelo = minorise_maximise(win_counts(data, 8, 16))
    # Zermelo's own stopping error, above; Newton ends at rounding.
    torch.testing.assert_close(estimate, zermelo, rtol=0, atol=1e-11)
    outcome = finite(world, data, estimate, settings(seed))
    target = optimal_logps(world.ref_logps, zermelo, beta=0.5)
    error = (outcome.logps - target).abs().amax(-1)
    # Zermelo's own 1e-11 above, divided by beta, in a difference of two scores
    assert (error <= outcome.logp_bound + 4e-11).all()
    assert outcome.logp_bound.max() <= 1e-9  # a hundred times what training stops at


@given(generators, st.integers(2, 7))
def test_newton_agrees_with_zermelo(generator, Y):
    """[D11.1] two unrelated iterations reach one maximum-likelihood estimate."""
    wins = torch.randint(1, 20, (2, Y, Y), generator=generator).double() * (1 - torch.eye(Y).double())
    estimate = maximum_likelihood(from_wins(wins), ones(2, Y))
    # Zermelo's own stopping error, above
    torch.testing.assert_close(estimate, minorise_maximise(wins), rtol=0, atol=1e-11)
    assert estimate.mean(-1).abs().max() <= 1e-14  # centred: a mean of numbers below 4


@given(generators, st.integers(2, 8))
def test_tree_estimates_are_edge_logits(generator, Y):
    """Properties 29 and 30: on any tree, the smallest being a single pair, each edge's reward difference is
    the logit of its win rate."""
    parent = [int(torch.randint(child, (1,), generator=generator)) for child in range(1, Y)]
    wins = torch.zeros(1, Y, Y, dtype=torch.float64)
    for child, above in enumerate(parent, start=1):
        wins[0, child, above], wins[0, above, child] = torch.randint(
            1, 50, (2,), generator=generator
        ).double()
    estimate = maximum_likelihood(from_wins(wins), ones(1, Y))[0]
    for child, above in enumerate(parent, start=1):
        logit = math.log(wins[0, child, above] / wins[0, above, child])
        # the gradient's rounding, eps, over the smallest curvature of an edge: 0.02 of a tenth of the games
        assert (estimate[child] - estimate[above]).item() == pytest.approx(logit, abs=1e-12)


def test_a_pair_that_one_side_almost_always_wins():
    """Property 29 far out: with 10^k wins against one the estimate is k log 10, or the package says that it
    is out of numerical reach; it never returns another number."""
    wrong = []
    for exponent in range(1, 31):
        wins = torch.tensor([[[0.0, 10.0**exponent], [1.0, 0.0]]], dtype=torch.float64)
        try:
            estimate = maximum_likelihood(from_wins(wins), ones(1, 2))[0]
        except InputError as error:
            assert "out of numerical reach" in str(error) and exponent > 12
            continue
        # The single win keeps its digits among 10^k, and so could the logit; Newton's stopping rule leaves
        # 1e-8 of a step, and a curvature that cancels loses up to 10^k eps = 1e-4 of it.
        if abs((estimate[0] - estimate[1]).item() - exponent * math.log(10)) > 1e-6:
            wrong.append((exponent, (estimate[0] - estimate[1]).item()))
    assert not wrong, f"wrong estimates, as (exponent, reward difference): {wrong}"


def test_very_uneven_data_are_estimated_from_afar():
    """[D11.1] with counts from 1 to 10^6 Newton's plain step would overshoot; the estimate still
    balances observed and expected wins, in 200 random data sets."""
    generator = generator_of(8)
    wins = (10 ** (6 * torch.rand(200, 4, 4, generator=generator, dtype=torch.float64))).round()
    wins = wins * (1 - torch.eye(4, dtype=torch.float64)) * (torch.rand(200, 4, 4, generator=generator) < 0.6)
    ring = torch.arange(4)
    wins[:, ring, (ring + 1) % 4] += 1  # strongly connected
    estimate = maximum_likelihood(from_wins(wins), ones(200, 4))
    expected = (wins + wins.mT) * torch.sigmoid(estimate.unsqueeze(-1) - estimate.unsqueeze(-2))
    surplus = (wins - expected).sum(-1)
    # rounding of a dozen terms as large as the prompt's games
    assert (surplus.abs() <= 32 * EPS * wins.sum((1, 2)).unsqueeze(-1)).all()


def test_estimates_of_rankings_are_stationary():
    """[D8.3] the Plackett-Luce estimate balances observed and expected places: the gradient of the
    negative log-likelihood by autograd vanishes there, for rankings of three and four."""
    rewards = normal(2, 5, generator=generator_of(1), scale=1.0)
    for K in (3, 4):
        data = sample_rankings(rewards, 3000, slate=all_sets(ones(2, 5), size=K), generator=generator_of(K))
        scores = maximum_likelihood(data, ones(2, 5)).requires_grad_()
        ranked = data.gather(scores)
        losses = sum(ranked[:, k:].logsumexp(-1) - ranked[:, k] for k in range(K))
        (gradient,) = torch.autograd.grad(data.weight @ losses, scores)
        # 3000 rankings' worth of sums of probabilities, each rounded to an ulp
        assert gradient.abs().max() <= 3000 * 16 * EPS
        assert (scores - centred(rewards)).abs().max() < 0.5  # and near the truth: ten standard errors


# --------------------------------------------------------------------------------------- when it exists


def three_item_patterns():
    places = [(i, j) for i in range(3) for j in range(3) if i != j]
    for pattern in itertools.product((0, 1), repeat=6):
        wins = torch.zeros(3, 3, dtype=torch.float64)
        for place, won in zip(places, pattern):
            wins[place] = won
        yield wins


def test_the_estimate_exists_exactly_where_ford_says():
    """Property 31: for all 64 patterns of wins among three, the estimate is finite exactly when every group
    of completions has lost to the others; where it exists it is stationary, where not, raising the scores of
    a group that never lost never raises the loss."""
    subsets = [[0], [1], [2], [0, 1], [0, 2], [1, 2]]
    found = 0
    for wins in three_item_patterns():
        never_lost = [s for s in subsets if all(wins[j, i] == 0 for i in s for j in range(3) if j not in s)]
        data = from_wins(wins.unsqueeze(0))
        if never_lost:
            with pytest.raises(InputError, match="estimate does not exist"):
                require_estimate(data, ones(1, 3))
            if len(data.prompt) == 0:
                continue
            with pytest.raises(InputError, match="estimate does not exist"):
                maximum_likelihood(data, ones(1, 3))
            direction = torch.zeros(1, 3, dtype=torch.float64)
            direction[0, never_lost[0]] = 1
            scores = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
            losses = []
            for t in (0.0, 1.0, 2.0, 4.0):
                ranked = data.gather(scores + t * direction)
                losses.append((ranked.logsumexp(-1) - ranked[:, 0]).sum().item())
            # non-increasing but for rounding of a sum of at most six terms
            assert all(b <= a + 1e-14 for a, b in itertools.pairwise(losses))
        else:
            found += 1
            state = curvature(maximum_likelihood(data, ones(1, 3)), data)
            assert state.gradient.abs().max() <= 1e-14  # a mean of six probabilities
            assert torch.linalg.eigvalsh(state.hessian[0])[1] > 0.05  # a strict minimum but for constants
    assert found == 18  # the number of strongly connected labelled digraphs on three nodes


def test_the_groups_at_fault_are_named_truthfully():
    """Property 31: what is said of a group is true of all 64 patterns, something is said exactly where the
    estimate does not exist, and no completion is named twice."""
    for wins in three_item_patterns():
        faults = groups_at_fault(wins)
        named = [member for group, _ in faults for member in group]
        assert len(named) == len(set(named))
        reach = (torch.eye(3, dtype=torch.float64) + wins).matrix_power(3) > 0
        assert bool(faults) == (not reach.all())
        for group, fault in faults:
            others = [y for y in range(3) if y not in group]
            won, lost = wins[group][:, others].sum() > 0, wins[others][:, group].sum() > 0
            expected = {
                (True, False): "never lost to the others",
                (False, True): "never beat the others",
                (False, False): "never met the others",
            }
            assert fault == expected[bool(won), bool(lost)]


def test_the_message_names_prompts_completions_and_a_way_out():
    """Property 31: the error names who is at fault by their own names, IPO's needs less, and each way out
    that it names leads out: IPO only where groups met at all, a prior everywhere."""
    wins = torch.zeros(2, 3, 3, dtype=torch.float64)
    wins[0, 0, 1] = wins[0, 1, 0] = wins[0, 1, 2] = wins[0, 2, 1] = 1  # fine
    wins[1, 0, 1] = wins[1, 1, 0] = wins[1, 0, 2] = 1  # the third only lost
    names = (("salad", "soup"), (("a", "b", "c"), ("leek", "onion", "nettle")))
    with pytest.raises(InputError) as caught:
        maximum_likelihood(from_wins(wins), ones(2, 3), names)
    message = str(caught.value)
    assert "prompt soup: nettle never beat the others" in message
    assert "never lost" not in message  # said of the two others it would only repeat that
    assert "salad" not in message and "add comparisons or a prior, or use IPO" in message
    ipo_estimate(from_wins(wins), ones(2, 3), names, beta=1.0)  # connected: exists
    maximum_likelihood(add_prior(from_wins(wins), ones(2, 3), 0.5), ones(2, 3))
    wins[1, 0, 2] = 0
    for loss, estimate in (("DPO", maximum_likelihood), ("IPO", partial(ipo_estimate, beta=1.0))):
        with pytest.raises(InputError, match=rf"{loss} estimate .*prompt soup.*nettle never met") as caught:
            estimate(from_wins(wins), ones(2, 3), names)
        assert str(caught.value).endswith("; add comparisons between these groups, or a prior.")
        estimate(add_prior(from_wins(wins), ones(2, 3), 0.5), ones(2, 3))


def test_a_refusal_stays_short_and_on_one_line():
    """Completions may be long texts of several lines, and thousands of prompts may be at fault."""
    wins = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(3000, 2, 2)
    texts = tuple(f"{number}\n" + "a long text " * 90 for number in range(3000))
    with pytest.raises(InputError, match=r"and 2995 more prompts\); add") as caught:
        maximum_likelihood(from_wins(wins), ones(3000, 2), (texts, ((texts[0], texts[1]),) * 3000))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_prior_makes_the_estimate_exist_and_shrinks_it():
    """[D11.1] Imaginary wins: of two completions a prior of a turns n1 : n2 into log((n1 + a) / (n2 + a)),
    which exists for unanimous data; each completion gets a wins and a losses, whatever their number."""
    exists = torch.tensor([[True, True, False], [True, True, True]])
    wins = torch.zeros(2, 3, 3, dtype=torch.float64)
    wins[0, 0, 1] = 6  # unanimous
    wins[1, 0, 1] = 2  # and the third never compared
    data = from_wins(wins)
    gaps = []
    for strength in (0.5, 2.0, 50.0):
        weighted = add_prior(data, exists, strength)
        imaginary = win_counts(weighted, 2, 3) - wins
        for total in (imaginary.sum(-1), imaginary.sum(-2)):  # two or three terms
            torch.testing.assert_close(total, strength * exists.double(), rtol=1e-14, atol=1e-14)
        assert torch.equal(imaginary[1] > 0, ~torch.eye(3, dtype=torch.bool))  # each meets each
        estimate = maximum_likelihood(weighted, exists)
        gaps.append((estimate[0, 0] - estimate[0, 1]).item())
        # Newton's quadratic end: rounding of numbers below 3
        assert gaps[-1] == pytest.approx(math.log((6 + strength) / strength), abs=1e-13)
        assert estimate[0, 2] == 0 and estimate[1, 2].item() == pytest.approx(0, abs=1e-13)  # by symmetry
    assert gaps[0] > gaps[1] > gaps[2]
    with pytest.raises(InputError):
        add_prior(data, exists, 0.0)


def league(scatter, generator, X=200, K=12):
    """Rewards (X, K) and win counts of X prompts: completion 0 played one game, the others four a pair."""
    rewards = normal(X, K, generator=generator, scale=scatter)
    games = torch.full((X, K, K), 4.0, dtype=torch.float64).triu(1)
    games[:, 0] = 0
    games[torch.arange(X), 0, torch.randint(1, K, (X,), generator=generator)] = 1
    won = torch.binomial(games, preference_matrix(rewards), generator=generator)
    return rewards, won + (games - won).mT


@pytest.mark.parametrize("strength", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_errors_under_a_prior_cover_the_truth(strength):
    """[D11.10] Rewards that scatter as the prior says, sqrt(2 / a), and half as much: 95 % intervals cover at
    least 95 % of a completion that played a single game, and of those that played a hundred. Fails where
    imaginary games grow with the number of completions: the single game's error is then far too small."""
    generator = generator_of(8)
    for share in (1.0, 0.5):
        rewards, wins = league(share * math.sqrt(2 / strength), generator)
        X, K = rewards.shape
        data = add_prior(from_wins(wins), ones(X, K), strength)
        estimate = maximum_likelihood(data, ones(X, K))
        covered = ((estimate - centred(rewards)).abs() <= 1.96 * standard_errors(estimate, data)).double()
        # 200 intervals: five deviations of a share of 0.95; the others' of one prompt hang together a little
        assert covered[:, 0].mean() >= 0.95 - 5 * math.sqrt(0.95 * 0.05 / X)
        # and 1 % for the normal approximation at margins of 4 nats or more, won by nearly every game
        assert covered[:, 1:].mean() >= 0.95 - 0.01


# --------------------------------------------------------------------------------------------------- IPO


@given(generators, st.integers(2, 6), st.floats(0.05, 5.0))
def test_the_ipo_estimate_is_a_least_squares_fit(generator, Y, beta):
    """Property 57: the estimate is the minimum-norm least-squares solution of h = +-1 / (2 beta),
    row by row."""
    wins = torch.randint(0, 4, (1, Y, Y), generator=generator).double() * (1 - torch.eye(Y).double())
    wins[0, torch.arange(Y - 1), torch.arange(1, Y)] += 1  # connected
    data = from_wins(wins)
    estimate = ipo_estimate(data, ones(1, Y), beta=beta)[0]
    rows = torch.zeros(len(data.prompt), Y, dtype=torch.float64)
    rows.scatter_(1, data.order[:, :1], 1).scatter_(1, data.order[:, 1:], -1)
    root = data.weight.sqrt().unsqueeze(-1)
    solution = torch.linalg.pinv(root * rows) @ (root / (2 * beta))
    # a path of at most six has condition number below 50; results are of size up to Y / (2 beta)
    torch.testing.assert_close(estimate, solution.flatten(), rtol=0, atol=1e-12 * (1 + 1 / beta))


def test_gradient_descent_on_ipo_reaches_the_estimate():
    """[D12.1] gradient descent from the reference ends at the Laplacian solve, unanimous pairs included, at
    any beta."""
    generator = generator_of(3)
    world = random_bandit(2, 4, generator=generator)
    data = sample_pairs(world.rewards, 60, slate=all_sets(world.exists), generator=generator)
    for beta in (0.1, 2.0):
        estimate = ipo_estimate(data, world.exists, beta=beta)
        training = data.normalised_by_prompt()
        policy = TabularPolicy(world.ref_logps)
        rate = safe_learning_rate(training, beta=None)
        optimizer = torch.optim.SGD(policy.parameters(), lr=rate, momentum=0.9, nesterov=True)

        def objective(batch, policy=policy, beta=beta):
            return ipo_objective(policy(), world.ref_logps, batch, beta=beta)[0], {}

        for _ in train(objective, optimizer, itertools.repeat(training, 600)):
            pass
        # mean-zero log-ratios of the logits: gradient descent keeps their sum. Linear convergence at 0.97
        # or better a step leaves rounding of numbers below 1 / beta
        ratios = (policy.theta - world.ref_logps).detach()
        torch.testing.assert_close(ratios, estimate, rtol=0, atol=1e-11 / beta)


@given(generators, st.integers(2, 7), st.floats(0.05, 5.0))
def test_ipo_on_a_tree(generator, Y, beta):
    """Property 58: on a tree each gap is (2 p_hat - 1) / (2 beta); 1 / (2 beta) where unanimous."""
    parent = [int(torch.randint(child, (1,), generator=generator)) for child in range(1, Y)]
    wins = torch.zeros(1, Y, Y, dtype=torch.float64)
    for child, above in enumerate(parent, start=1):
        won = int(torch.randint(0, 11, (1,), generator=generator))
        wins[0, child, above], wins[0, above, child] = won, 10 - won
    estimate = ipo_estimate(from_wins(wins), ones(1, Y), beta=beta)[0]
    for child, above in enumerate(parent, start=1):
        rate = wins[0, child, above].item() / 10
        # a Laplacian solve with condition number below 100
        assert (estimate[child] - estimate[above]).item() == pytest.approx(
            (2 * rate - 1) / (2 * beta), abs=1e-13 * (1 + 1 / beta)
        )


def test_ipo_with_independent_draws_tilts_by_the_win_rate():
    """Property 57: where both completions are drawn from mu the estimate is P(y beats mu) / beta up
    to a constant; on a path of pairs it is not."""
    generator = generator_of(12)
    rewards = normal(1, 5, generator=generator, scale=1.0)
    mu = normal(1, 5, generator=generator, scale=1.0).softmax(-1)[0]
    items = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    slate = Slate(torch.zeros(25, dtype=torch.long), items, torch.outer(mu, mu).flatten())
    win_rate = torch.sigmoid(rewards[0].unsqueeze(-1) - rewards[0]) @ mu
    estimate = ipo_estimate(expected_pairs(rewards, slate), ones(1, 5), beta=0.3)[0]
    # a Laplacian solve with weights within a factor of a hundred
    torch.testing.assert_close(estimate, centred(win_rate / 0.3), rtol=0, atol=1e-12)
    path = Slate(torch.zeros(4, dtype=torch.long), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]]), mu[:4])
    other = ipo_estimate(expected_pairs(rewards, path), ones(1, 5), beta=0.3)[0]
    assert (other - centred(win_rate / 0.3)).abs().max() > 0.05


# ------------------------------------------------------------------------------ layer three: the laws


def test_the_score_statistic_has_its_exact_mean_and_variance():
    """Property 82: at the truth the score statistic N g' I^+ g of N = 40 pairs has mean exactly K - 1
    and variance exactly 2 (K - 1)(1 - 1/N) + (E q1^2 - (K - 1)^2) / N, in 40000 simulated data sets."""
    K, N, R = 4, 40, 40_000
    generator = generator_of(41)
    rewards = normal(1, K, generator=generator, scale=1.0)
    population = expected_pairs(rewards, all_sets(ones(1, K)))
    inverse = curvature(rewards, population).inverse[0]
    # each outcome alone, as a prompt of its own, gives the gradient of one comparison
    E = len(population.prompt)
    single = Rankings(torch.arange(E), population.order, torch.ones(E, dtype=torch.float64))
    gradient = curvature(rewards.expand(E, K), single).gradient  # (E, K)
    q1 = (gradient @ inverse * gradient).sum(-1)
    # information equality: exact but for the rounding of a dozen terms
    assert (population.weight @ q1).item() == pytest.approx(K - 1, abs=1e-12)
    variance = 2 * (K - 1) * (1 - 1 / N) + ((population.weight @ q1**2).item() - (K - 1) ** 2) / N

    drawn = torch.multinomial(population.weight, R * N, replacement=True, generator=generator).view(R, N)
    g = gradient[drawn].mean(1)
    q = N * (g @ inverse * g).sum(-1)
    # false alarm 1e-6 each; the variance's own sampling error is taken from the sample
    assert abs(q.mean().item() - (K - 1)) <= Z * math.sqrt(variance / R)
    squares = (q - (K - 1)) ** 2
    assert abs(squares.mean().item() - variance) <= Z * squares.std().item() / math.sqrt(R)


def test_the_packages_score_statistic_given_the_pairs_shown():
    """Property 82: given which pairs were shown, the reported statistic has mean exactly K - 1 a prompt, and
    variance 2 (K - 1) + sum_e (R_e / N)^2 k_e (1 - 6 k_e) with k = p (1 - p), R the resistance of the pair
    under the data's own information; in 3000 prompts of about 60 sampled pairs each."""
    K, X = 4, 3000
    rewards = normal(1, K, generator=generator_of(50), scale=1.0).expand(X, K)
    data = sample_pairs(rewards, 60 * X, slate=all_sets(ones(X, K)), generator=generator_of(51))
    ref = torch.full((X, K), -math.log(K), dtype=torch.float64)
    beta = 0.7
    law = finite_data_law(optimal_logps(ref, rewards, beta=beta), ref, data, beta=beta)
    assert law.degrees == X * (K - 1)

    wins = win_counts(data, X, K)
    games, N = wins + wins.mT, wins.sum((1, 2))
    p = torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))
    k = p * (1 - p)
    weighted = games * k
    information = torch.diag_embed(weighted.sum(-1)) - weighted  # of all N comparisons
    inverse = torch.linalg.pinv(information)
    surplus = (wins - games * p).sum(-1)
    q = (surplus.unsqueeze(-2) @ inverse @ surplus.unsqueeze(-1)).flatten()
    # two ways to sum the same 3000 quadratic forms
    assert law.score == pytest.approx(q.sum().item(), rel=1e-11)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    resistance = diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2) - 2 * inverse
    assert (N > 20).all()  # so every prompt's graph is connected and the mean is exact
    variance = 2 * (K - 1) + (games * resistance**2 * k * (1 - 6 * k)).sum((1, 2)) / 2
    # false alarm 1e-6 each, as above
    assert abs(law.score - X * (K - 1)) <= Z * variance.sum().sqrt().item()
    surprise = (q - (K - 1)) ** 2 - variance
    assert abs(surprise.mean().item()) <= Z * surprise.std().item() / math.sqrt(X)


def test_the_law_of_data_that_fall_apart_is_refused():
    """[D11.4] Two islands have a degree of freedom less than the law would count; it names a pair apart."""
    data = Rankings(torch.zeros(2, dtype=torch.long), torch.tensor([[0, 1], [2, 3]]), torch.ones(2).double())
    even = torch.full((1, 4), -math.log(4), dtype=torch.float64)
    with pytest.raises(InputError, match=r"prompt 0: no chain .* from completion 0 to 2"):
        finite_data_law(even, even, data, beta=1.0)


def test_the_law_counts_only_what_was_compared():
    """[D11.4] Three prompts: two of three completions compared, nothing, everything many times. Degrees of
    freedom are 1 + 0 + 2, what was never compared has no deviation, and `plenty` is the first prompt's."""
    wins = torch.zeros(3, 3, 3, dtype=torch.float64)
    wins[0, 0, 1], wins[0, 1, 0] = 30, 10
    wins[2] = 700 * (1 - torch.eye(3))
    even = torch.full((3, 3), -math.log(3), dtype=torch.float64)
    law = finite_data_law(even, even, from_wins(wins), beta=1.0)
    assert law.degrees == 1 + 2
    assert law.plenty == pytest.approx(40 / 4, rel=1e-12)  # 40 games; rho^2 = 1 / (1/4) at equal rewards
    nothing = torch.tensor([[False, False, True], [True, True, True], [False, False, False]])
    assert torch.equal(law.logp_deviation == 0, nothing) and torch.equal(law.logp_limit == 0, nothing)


@pytest.mark.parametrize("seed", range(10))
def test_twenty_thousand_pairs_stay_within_their_limits(seed):
    """In the sampled experiment no completion's log-probability is further from
    pi* than its limit, and the score statistic is below its own, at a false-alarm rate of 1e-6 each."""
    world = random_bandit(8, 16, generator=generator_of(4 * seed))
    data = sample_pairs(
        world.rewards, 20_000, slate=all_sets(world.exists), generator=generator_of(4 * seed + 1)
    )
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=0.5)
    law = finite_data_law(optimal, world.ref_logps, data, beta=0.5)
    fitted = optimal_logps(world.ref_logps, maximum_likelihood(data, world.exists), beta=0.5)
    assert law.degrees == 8 * 15 and law.score <= law.score_limit
    assert ((fitted - optimal).abs() <= law.logp_limit).all()
    # The limit means something: labels of the opposite reward are far outside.
    wrong = sample_pairs(-world.rewards, 20_000, slate=all_sets(world.exists), generator=generator_of(seed))
    refused = finite_data_law(optimal, world.ref_logps, wrong, beta=0.5)
    assert refused.score > 10 * refused.score_limit


REPLICATES, GAMES = 4000, 1500


@pytest.fixture(scope="module")
def simulation():
    """4000 data sets of 9000 comparisons among four completions: rewards, reference and data."""
    generator = generator_of(77)
    rewards = normal(4, generator=generator, scale=1.0)
    ref = normal(4, generator=generator, scale=1.0).log_softmax(-1)
    return rewards, ref, replicates(rewards, GAMES, REPLICATES, generator)


def assert_unit_variance(z, rewards):
    """Mean of z^2 within its sampling error at a false-alarm rate of 1e-6, plus the second-order slack
    2 rho^2 / N for the bias of the asymptotic law."""
    population = expected_pairs(rewards.unsqueeze(0), all_sets(ones(1, len(rewards))))
    rho2 = largest_resistance(curvature(rewards.unsqueeze(0), population)).item()
    slack = 2 * rho2 / (6 * GAMES)
    ratio = (z**2).mean(0)
    # z^2 of a normal has variance 2; four coordinates are judged, hence a quarter of the rate each
    tolerance = normal_quantile(1 - 1e-6 / 8) * math.sqrt(2 / len(z)) + slack
    assert tolerance < 0.15  # so that a factor of two, or of its root, is caught
    assert ((ratio - 1).abs() <= tolerance).all(), ratio
    assert (z.mean(0).abs() <= tolerance).all()  # and no bias: the mean's error is smaller still


def test_the_deviation_of_log_probabilities_is_calibrated(simulation):
    """[D11.4] log pi_hat(y) - log pi*(y) has variance (e_y - pi*)' I^+ (e_y - pi*) / (N beta^2)."""
    rewards, ref, data = simulation
    X, beta = REPLICATES, 0.7
    ref = ref.expand(X, 4)
    optimal = optimal_logps(ref, rewards.expand(X, 4), beta=beta)
    law = finite_data_law(optimal, ref, data, beta=beta)
    fitted = optimal_logps(ref, maximum_likelihood(data, ones(X, 4)), beta=beta)
    assert_unit_variance((fitted - optimal) / law.logp_deviation, rewards)
    # the limit is the deviation times the quantile that all 16000 entries share
    quantile = normal_quantile(1 - 1e-6 / (2 * 4 * X))
    torch.testing.assert_close(law.logp_limit, quantile * law.logp_deviation, rtol=1e-14, atol=0)  # a product


def test_standard_errors_are_calibrated(simulation):
    """[D11.3] mean-zero estimated rewards have variance diag(I^+) / N, taken at the estimate."""
    rewards, _, data = simulation
    estimate = maximum_likelihood(data, ones(REPLICATES, 4))
    errors = standard_errors(estimate, data)
    assert_unit_variance((estimate - centred(rewards)) / errors, rewards)


def test_ipo_standard_errors_are_calibrated(simulation):
    """[D12.1] mean-zero IPO log-ratios have the sandwich variance A^+ V A^+ / N, around the population's
    estimate for the same pairs."""
    rewards, _, data = simulation
    beta = 0.4
    population = expected_pairs(rewards.unsqueeze(0), all_sets(ones(1, 4)))
    truth = ipo_estimate(population, ones(1, 4), beta=beta)
    estimate = ipo_estimate(data, ones(REPLICATES, 4), beta=beta)
    errors = ipo_standard_errors(estimate, data, ones(REPLICATES, 4), beta=beta)
    # The pairs shown are fixed here, where the misfit of a pair, d / (2 beta) - h, does not vary: [D12.1]'s V
    # for drawn pairs is larger by its square, so the z-scores may be too small by that share and no larger.
    p = torch.sigmoid(rewards.unsqueeze(-1) - rewards)
    gap = truth[0].unsqueeze(-1) - truth[0]
    misfit = ((2 * p - 1) / (2 * beta) - gap) ** 2
    noise = p * (1 - p) / beta**2

    def sandwich(variance):
        variance = variance - torch.diag(variance.diagonal())
        return (torch.diag(variance.sum(-1)) - variance).diagonal()  # complete graph: A^+ = (I - 11'/4) / 4

    share = (sandwich(noise + misfit) / sandwich(noise)).max().item()
    assert share < 1.1  # rewards of size one are nearly linear
    z = (estimate - truth) / errors
    assert_unit_variance(z * math.sqrt(share), rewards)


def test_two_completions_have_textbook_errors():
    """[D11.3] The delta method at K = 2: n1 : n2 wins give the gap a variance of 1/n1 + 1/n2, DPO's
    log-probabilities (1 - pi) times that deviation over beta, and IPO's gap 4 p (1 - p) / (4 beta^2 N)."""
    n1, n2, beta = 3000.0, 1000.0, 0.3
    data = from_wins(torch.tensor([[[0.0, n1], [n2, 0.0]]], dtype=torch.float64))
    estimate = maximum_likelihood(data, ones(1, 2))
    deviation = math.sqrt(1 / n1 + 1 / n2)
    half = torch.full((1, 2), deviation / 2, dtype=torch.float64)  # a mean-zero reward is half the gap
    # closed forms of a dozen operations
    torch.testing.assert_close(standard_errors(estimate, data), half, rtol=1e-12, atol=0)
    ref = torch.tensor([[0.2, 0.8]], dtype=torch.float64).log()
    optimal = optimal_logps(ref, estimate, beta=beta)
    law = finite_data_law(optimal, ref, data, beta=beta)
    expected = (1 - optimal.exp()) * deviation / beta
    torch.testing.assert_close(law.logp_deviation, expected, rtol=1e-11, atol=0)  # 1 - pi cancels a digit
    assert law.score <= 1e-20  # the truth was set to the estimate: zero but for rounding
    p = n1 / (n1 + n2)
    gap_deviation = math.sqrt(p * (1 - p) / (n1 + n2)) / beta
    errors = ipo_standard_errors(ipo_estimate(data, ones(1, 2), beta=beta), data, ones(1, 2), beta=beta)
    # half a win added either way moves the rate by (1/2 - p) / N, and the deviation by less than 1 / N
    torch.testing.assert_close(
        errors, torch.full((1, 2), gap_deviation / 2, dtype=torch.float64), rtol=1 / (n1 + n2), atol=0
    )
    unanimous = from_wins(torch.tensor([[[0.0, 9.0], [0.0, 0.0]]], dtype=torch.float64))
    sure = ipo_estimate(unanimous, ones(1, 2), beta=beta)
    assert (ipo_standard_errors(sure, unanimous, ones(1, 2), beta=beta) > 0).all()  # nine wins are no proof


def test_a_completion_without_data_has_no_error():
    """[D11.3] Rewards that no comparison touches stay at zero, and so does their error: of a whole prompt
    (where 0 / 0 would be NaN) and of one completion; the prompt beside them keeps its own."""
    wins = torch.zeros(3, 3, 3, dtype=torch.float64)
    wins[0, 0, 1], wins[0, 1, 0] = 30, 10
    wins[2] = 7 * (1 - torch.eye(3))
    data = from_wins(wins)
    errors = standard_errors(torch.zeros(3, 3, dtype=torch.float64), data)
    assert errors[0, 2] == 0 and (errors[1] == 0).all()
    alone = [standard_errors(torch.zeros(1, 3).double(), from_wins(wins[x : x + 1])) for x in (0, 2)]
    torch.testing.assert_close(errors[[0, 2]], torch.cat(alone), rtol=1e-14, atol=0)  # the same operations


def test_the_laws_take_tables_of_any_float_dtype():
    """Fails if a float32 table ends in torch's own error, or is worked out in float32. The slack is the
    table's rounding: entries of 3 nats are off by 2e-7, of which variances hold a few times that share."""
    rewards = normal(2, 3, generator=generator_of(5), scale=1.0)
    ref = torch.full((2, 3), -math.log(3), dtype=torch.float64)
    optimal, population = optimal_logps(ref, rewards, beta=0.5), expected_pairs(rewards, all_sets(ones(2, 3)))
    for law in (finite_data_law, kl_law):
        exact, rounded = (
            law(optimal.to(t), ref.to(t), population, beta=0.5) for t in (ref.dtype, torch.float32)
        )
        for one, other in zip(exact[1:], rounded[1:]):  # the score of finite_data_law is rounding alone here
            torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(one), rtol=1e-5, atol=1e-5)


def test_a_law_leaves_out_what_was_never_compared():
    """[D11.4] A prompt without data, and a completion that nobody was asked about, have no deviation and no
    degree of freedom; `plenty` is that of the prompt that has least."""
    rewards = normal(3, 4, generator=generator_of(3), scale=1.0)
    ref = torch.full((3, 4), -math.log(4), dtype=torch.float64)
    exists = torch.tensor([[True] * 4, [True, True, True, False], [True] * 4])
    slate = all_sets(exists)
    shown = slate.prompt < 2
    slate = Slate(*(field[shown] for field in slate))
    data = sample_pairs(rewards, 3000, slate=slate, generator=generator_of(1))
    rare = data._replace(weight=torch.where(data.prompt == 0, 1.0, 50.0) * data.weight)
    optimal = optimal_logps(ref, rewards, beta=0.5)
    law = finite_data_law(optimal, ref, rare, beta=0.5)
    assert law.degrees == 3 + 2
    none = torch.tensor([[False] * 4, [False, False, False, True], [True] * 4])
    for table in (law.logp_deviation, law.logp_limit):
        assert torch.equal(table == 0, none) and table.isfinite().all()
    state = curvature(0.5 * (optimal - ref), rare)
    each = [(state.total[x] / largest_resistance(state)[x]).item() for x in (0, 1)]
    assert law.plenty == each[0] < each[1]
    # The deviation of one that is all but certain is nearly 0, and rounding makes some of its variances
    # -1e-15: four of these two thousand.
    tops = -18 - 3 * torch.rand(2000, 2, generator=generator_of(2), dtype=torch.float64)
    sure = torch.cat([torch.zeros(2000, 1).double(), tops], -1).log_softmax(-1)
    rewards = normal(2000, 3, generator=generator_of(9), scale=1.5)
    even = expected_pairs(rewards, all_sets(ones(2000, 3)))
    deviation = finite_data_law(sure, sure - 2 * rewards, even, beta=0.5).logp_deviation
    assert deviation.isfinite().all() and deviation[:, 0].max() < 1e-4


def test_errors_shrink_with_the_root_of_the_data():
    """[D11.3] four times the counts halve every standard error and deviation."""
    rewards = normal(1, 5, generator=generator_of(6), scale=1.0)
    ref = torch.full((1, 5), -math.log(5), dtype=torch.float64)
    data = sample_pairs(rewards, 2000, slate=all_sets(ones(1, 5)), generator=generator_of(7))
    more = data._replace(weight=4 * data.weight)
    estimate = maximum_likelihood(data, ones(1, 5))
    optimal = optimal_logps(ref, rewards, beta=0.5)
    # powers of two: exact but for the normalisation of the weights
    torch.testing.assert_close(
        standard_errors(estimate, more), standard_errors(estimate, data) / 2, rtol=1e-13, atol=0
    )
    once, fourfold = (finite_data_law(optimal, ref, d, beta=0.5) for d in (data, more))
    torch.testing.assert_close(fourfold.logp_deviation, once.logp_deviation / 2, rtol=1e-13, atol=0)
    assert fourfold.score == pytest.approx(4 * once.score, rel=1e-12)  # N g' H^+ g with the same g


def binomial_region(n, p, false_alarm):
    """The smallest and largest count that are no more surprising than `false_alarm` / 2 on their side."""
    k = torch.arange(n + 1, dtype=torch.float64)
    n_ = torch.tensor(float(n), dtype=torch.float64)
    log_pmf = (n_ + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    pmf = (log_pmf + k * math.log(p) + (n - k) * math.log1p(-p)).exp()
    below, above = pmf.cumsum(0), pmf.flip(0).cumsum(0).flip(0)
    low = int((below > false_alarm / 2).nonzero()[0])
    high = int((above > false_alarm / 2).nonzero()[-1])
    return low, high, (pmf[:low].sum() + pmf[high + 1 :].sum()).item()


def test_a_single_pair_against_the_exact_binomial():
    """Item 5: with K = 2 the estimate lies in the logit of the exact binomial acceptance region at 1e-6, the
    normal limit agrees with the region's width, and swapped labels fall outside."""
    n, gap = 500, 0.8
    p = 1 / (1 + math.exp(-gap))
    low, high, alarm = binomial_region(n, p, 1e-6)
    assert 1e-7 < alarm <= 1e-6
    left, right = (math.log(k / (n - k)) for k in (low, high))
    rewards = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    ref = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    for seed in range(20):  # 20 draws at 1e-6 each
        data = sample_pairs(rewards, n, slate=all_sets(ones(1, 2)), generator=generator_of(seed))
        estimate = maximum_likelihood(data, ones(1, 2))[0]
        assert left <= (estimate[0] - estimate[1]).item() <= right
        swapped = maximum_likelihood(data._replace(order=data.order.flip(-1)), ones(1, 2))[0]
        assert not left <= (swapped[0] - swapped[1]).item() <= right
    law = finite_data_law(optimal_logps(ref, rewards, beta=1.0), ref, data, beta=1.0)  # of n pairs
    # a large draw sees errors of half a per cent in the labels' probability
    many = 200_000
    low, high, _ = binomial_region(many, p, 1e-6)
    data = sample_pairs(rewards, many, slate=all_sets(ones(1, 2)), generator=generator_of(0))
    assert low <= win_counts(data, 1, 2)[0, 0, 1].item() <= high
    # half the width of the region against Z deviations: the skew is of second order, 1 / sqrt(n) relative
    assert (right - left) / 2 == pytest.approx(Z / math.sqrt(n * p * (1 - p)), rel=0.045)
    # log pi(y) moves by (1 - pi(y)) times the gap; its limit is shared by two entries
    expected = normal_quantile(1 - 1e-6 / 4) / math.sqrt(n * p * (1 - p)) * (1 - torch.tensor([p, 1 - p]))
    torch.testing.assert_close(law.logp_limit[0].float(), expected, rtol=1e-5, atol=0)  # float32 here


# --------------------------------------------------------------------------------------------- quantiles


@given(st.floats(1e-9, 1 - 1e-9))
def test_normal_quantiles_invert_the_error_function(probability):
    """Item 2's quantile: Phi(z) = p with Phi from the error function."""
    z = normal_quantile(probability)
    # z is exact to a few ulps; Phi's slope is below 0.4, its relative slope in the tail below 1 + |z|
    assert math.erfc(-z / math.sqrt(2)) / 2 == pytest.approx(probability, rel=1e-13)
    assert normal_quantile(0.5) == 0
    assert pytest.approx(normal_quantile(1 - 5e-7), abs=5e-5) == Z  # the constant above, to its last digit


@pytest.mark.parametrize("tail", [0.5, 1e-3, 1e-6, 1e-9])
def test_chi_square_quantiles_against_closed_forms(tail):
    """Item 1's quantile: -2 log(tail) at two degrees of freedom, z^2 at one, and at four the root of
    e^{-q/2} (1 + q/2) = tail."""
    # 1 - tail is rounded by eps / 2, which is eps / tail relative to the tail
    relative = 1e-12 + 2 * EPS / tail
    assert chi_square_quantile(1 - tail, 2) == pytest.approx(-2 * math.log(tail), rel=relative)
    assert chi_square_quantile(1 - tail, 1) == pytest.approx(normal_quantile(1 - tail / 2) ** 2, rel=relative)
    q = chi_square_quantile(1 - tail, 4)
    assert math.exp(-q / 2) * (1 + q / 2) == pytest.approx(tail, rel=1e-10 + 4 * EPS / tail)


def test_chi_square_quantiles_of_many_degrees():
    """Item 1's quantile at thousands of degrees: Wilson and Hilferty's cube agrees, and bad input is
    refused."""
    for degrees in (120, 9000):
        z = normal_quantile(1 - 1e-6)
        cube = degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
        # Wilson-Hilferty's error in the tail: below a per cent from a hundred degrees on
        assert chi_square_quantile(1 - 1e-6, degrees) == pytest.approx(cube, rel=5e-3)
    for probability, degrees in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(InputError):
            chi_square_quantile(probability, degrees)


@pytest.mark.parametrize("tail", [0.5, 1e-6, 1e-13])
@pytest.mark.parametrize("degrees", [1, 100, 20_000, 1_000_000])
def test_chi_square_quantiles_invert_their_law(degrees, tail):
    """Item 1's quantile wherever it may be asked for: P(more than it) is the tail. Fails where the search
    ends below it, as one of too few standard deviations does at the smallest tail."""
    q = chi_square_quantile(1 - tail, degrees)
    half = torch.tensor([degrees, q], dtype=torch.float64) / 2
    # 1 - tail is rounded by eps / 2; the incomplete gamma function of 10^6 degrees loses 1e-8 or so, as its
    # exponent is a difference of numbers of size 10^7
    assert torch.special.gammaincc(*half).item() == pytest.approx(tail, rel=2 * EPS / tail + 1e-7, abs=0)
