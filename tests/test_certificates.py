"""The certificate: a bound on the distance to the optimum from one gradient, never below the truth.

The truth is pi* where the data are a population, and Newton's optimum where they are counts.
"""

import copy
import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, normal, worlds

from dpo_minimal import certificates
from dpo_minimal.bandit import TabularPolicy, dpo_objective, safe_learning_rate
from dpo_minimal.certificates import (
    certify,
    connected,
    curvature,
    laplacian_inverse,
    largest_resistance,
    maximum_likelihood,
)
from dpo_minimal.losses import plackett_luce_loss
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import EnumeratedPolicy, enumerate_completions
from dpo_minimal.preferences import (
    Rankings,
    Slate,
    all_sets,
    expected_pairs,
    expected_rankings,
    random_cycles,
    sample_pairs,
    sample_rankings,
)
from dpo_minimal.train import train
from dpo_minimal.validation import InputError

EPS = torch.finfo(torch.float64).eps


# ------------------------------------------------------------------------------------------------ helpers


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def tilt(ref_logps, rewards, beta):
    """log of pi_ref e^{r / beta} / Z."""
    return (ref_logps + rewards / beta).log_softmax(-1)


def random_rankings(X, Y, K, *, generator, count=12):
    """Random rankings with random weights, at least one a prompt."""
    prompt = torch.cat([torch.arange(X), torch.randint(X, (count,), generator=generator)])
    order = torch.rand(len(prompt), Y, generator=generator).argsort(-1)[:, :K]
    weight = 0.1 + torch.rand(len(prompt), generator=generator, dtype=torch.float64)
    return Rankings(prompt, order, weight)


def mean_loss(scores, rankings, x):
    """The normalised negative log-likelihood of prompt x as a function of its row of scores."""
    mine = rankings.prompt == x
    weight = rankings.weight[mine] / rankings.weight[mine].sum()
    return weight @ plackett_luce_loss(scores[rankings.order[mine]])


def starts(optimum, generator):
    """(X, Y) score tables from very near the optimum to far from it, one distance a prompt."""
    X, Y = optimum.shape
    size = 10 ** (-9 + 10 * torch.rand(X, 1, generator=generator, dtype=torch.float64))
    return optimum + size * normal(X, Y, generator=generator, scale=1.0)


def excess(scores, optimum, rankings):
    """(X,) exact loss of `scores` above that of `optimum` for comparisons, where `optimum` is their
    minimiser: a sum of Bernoulli divergences, by its series where the difference of scores is small."""
    total = torch.zeros(len(scores), dtype=torch.float64).index_add(0, rankings.prompt, rankings.weight)
    u, at = rankings.gather(optimum), rankings.gather(scores)
    u, delta = u[:, 0] - u[:, 1], (at[:, 0] - at[:, 1]) - (u[:, 0] - u[:, 1])
    q, not_q = torch.sigmoid(u), torch.sigmoid(-u)
    # log(1 + e^{u + delta}) - log(1 + e^u) - q delta, the divergence KL(Bern(q) || Bern(sigmoid(u + delta)))
    exact = torch.log1p(q * torch.expm1(delta)) - q * delta
    series = q * not_q * delta**2 * (1 / 2 + (not_q - q) * delta / 6)  # next term: delta^2 / 24 relative
    divergence = torch.where(delta.abs() < 1e-4, series, exact)
    # each unordered pair is listed once for either outcome, whose weights add up to the pair's weight
    weight = rankings.weight / total[rankings.prompt]
    return torch.zeros_like(total).index_add(0, rankings.prompt, weight * divergence)


def gap_to(logps, target):
    return torch.where(target > -math.inf, logps - target, 0).abs().amax(-1)


# ------------------------------------------------------------------------------------- linear algebra in it


@pytest.mark.parametrize("K", [2, 3, 4])
@given(worlds(completions=st.integers(4, 6)))
def test_curvature_is_the_derivative_of_the_loss(K, world):
    """Property 81: gradient and Hessian in the scores agree with autograd's of the Plackett-Luce negative
    log-likelihood, prompt by prompt with weights normalised to one."""
    X, Y = world.rewards.shape
    rankings = random_rankings(X, Y, K, generator=world.generator)
    state = curvature(world.rewards, rankings)
    for x in range(X):

        def loss(scores, x=x):
            return mean_loss(scores, rankings, x)

        row = world.rewards[x]
        gradient = torch.autograd.functional.jacobian(loss, row)
        hessian = torch.autograd.functional.hessian(loss, row)
        # sums of a dozen probabilities, whose exponents are differences of scores below 30; autograd's
        # second derivative of log-cumsum-exp cancels terms as large as the first one's rounding
        torch.testing.assert_close(state.gradient[x], gradient, rtol=0, atol=1e-13)
        torch.testing.assert_close(state.hessian[x], hessian, rtol=0, atol=1e-12)
        seen = torch.zeros(Y, dtype=torch.bool)
        seen[rankings.order[rankings.prompt == x].flatten()] = True
        assert torch.equal(state.compared[x], seen)
        weight = rankings.weight[rankings.prompt == x].sum()
        assert state.total[x].item() == pytest.approx(weight.item(), rel=1e-14)  # the same dozen numbers


def test_curvature_keeps_the_digits_of_a_sure_comparison():
    """Property 81: at a margin u the gradient of one comparison is sigmoid(-u), with full relative accuracy
    where 1 - sigmoid(u) would already be zero."""
    u = torch.tensor([1.0, 20.0, 40.0, 300.0], dtype=torch.float64)
    scores = torch.stack([u, torch.zeros_like(u)], -1)
    data = Rankings(torch.arange(4), torch.tensor([[0, 1]]).expand(4, 2), torch.ones(4, dtype=torch.float64))
    state = curvature(scores, data)
    exact = torch.tensor([math.exp(-v) / (1 + math.exp(-v)) for v in u.tolist()], dtype=torch.float64)
    # one exponential of an argument of size u: relative error u ulps at most
    torch.testing.assert_close(state.gradient, torch.stack([-exact, exact], -1), rtol=300 * EPS, atol=0)


@given(generators, st.integers(2, 8))
def test_laplacian_inverse_is_the_pseudo_inverse(generator, Y):
    """[D11.2] The Laplacian inverse: on connected graphs with edge weights within a factor of ten, the
    rank-one correction equals the pseudo-inverse, also with completions left out."""
    present = torch.rand(3, Y, generator=generator) < 0.7
    present[:, :2] = True  # at least one edge
    weight = 0.1 + 0.9 * torch.rand(3, Y, Y, generator=generator, dtype=torch.float64)
    weight = (weight + weight.mT) / 2 * (present.unsqueeze(-1) & present.unsqueeze(-2))
    weight = weight * (1 - torch.eye(Y, dtype=torch.float64))
    laplacian = torch.diag_embed(weight.sum(-1)) - weight
    scale = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64).view(3, 1, 1)  # a pure change of units
    inverse = laplacian_inverse(laplacian * scale, present) * scale
    # complete graphs: the smallest eigenvalue is at least 0.1 * 2, the condition number below 100
    torch.testing.assert_close(inverse, torch.linalg.pinv(laplacian), rtol=0, atol=1e-12)
    assert (inverse.masked_select(~present.unsqueeze(-1)).abs() <= 1e-14).all()  # exactly what was put there


def test_large_tables_are_inverted_on_two_threads():
    """torch's batched LU raised here, or was silently wrong: it calls a library in parallel that is not made
    for it (pytorch issue 142815)."""
    weights = torch.rand(3, 200, 200, dtype=torch.float64, generator=generator_of(0))
    weights = weights + weights.mT
    laplacian = torch.diag_embed(weights.sum(-1)) - weights
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inverse = laplacian_inverse(laplacian, torch.ones(3, 200, dtype=torch.bool))
    finally:
        torch.set_num_threads(threads)
    # Its entries are some 1 / 200, known to Y eps of the largest.
    torch.testing.assert_close(inverse, torch.linalg.pinv(laplacian), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tiny", [1e-6, 1e-10, 1e-13])
def test_laplacian_inverse_does_not_cut_off_flat_directions(tiny):
    """[D11.2] a path with edges of weight 1 and `tiny` has resistances 1 and 1 / tiny across them; with
    a cut-off the second would be small, and divergent data would be certified."""
    laplacian = torch.tensor([[[1.0, -1, 0], [-1, 1 + tiny, -tiny], [0, -tiny, tiny]]], dtype=torch.float64)
    inverse = laplacian_inverse(laplacian, torch.ones(1, 3, dtype=torch.bool))[0]
    resistance = (inverse[1, 1] + inverse[2, 2] - 2 * inverse[1, 2]).item()
    # the middle entry 1 + tiny is rounded by up to eps, relative to tiny; a few more in the inversion
    assert resistance == pytest.approx(1 / tiny, rel=8 * EPS / tiny)


@given(generators, st.integers(1, 8), st.floats(0.05, 0.6))
def test_connected_is_reachability(generator, Y, density):
    """Ford's condition rests on reachability in the win graph: against Floyd and Warshall's loops."""
    wins = (torch.rand(3, Y, Y, generator=generator) < density).double()
    reach = connected(wins)
    for x in range(3):
        brute = [[bool(wins[x, i, j] > 0) or i == j for j in range(Y)] for i in range(Y)]
        for k, i, j in itertools.product(range(Y), repeat=3):  # k outermost
            brute[i][j] = brute[i][j] or (brute[i][k] and brute[k][j])
        assert reach[x].tolist() == brute


def test_connected_follows_the_longest_chain():
    """Reachability along a chain through all of 37 completions, whose length is no power of two."""
    chain = torch.diag(torch.ones(36), 1).unsqueeze(0)
    assert torch.equal(connected(chain)[0], torch.ones(37, 37, dtype=torch.bool).triu())


# ----------------------------------------------------------------------------- never below the truth


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_the_bound_covers_the_distance_and_is_not_wasteful(K, beta):
    """Property 81 [D11.2]: over 600 random starts at 1e-9 to 10 nats from the optimum, for pairs and
    rankings alike, the log-probability bound covers the true distance wherever it is finite, its median
    excess is below a factor of two, and the divergences obey D^2 / 8."""
    X, Y = 600, 5
    generator = generator_of(100 + K)
    rewards = normal(X, Y, generator=generator, scale=1.0)
    ref = normal(X, Y, generator=generator, scale=1.0).log_softmax(-1)
    slate = random_cycles(torch.ones(X, Y, dtype=torch.bool), cycles=2, size=K, generator=generator)
    rankings = expected_rankings(rewards, slate)
    logps = tilt(ref, starts(rewards, generator), beta)
    optimal = tilt(ref, rewards, beta)
    certificate = certify(logps, ref, rankings, beta=beta)

    issued = certificate.logp_bound.isfinite()
    truth = gap_to(logps, optimal)
    assert issued.sum() >= 300 and (~issued).sum() >= 30  # near starts and far ones
    assert torch.equal(issued, certificate.x <= 0.5)  # every graph here is connected
    # both tables are rounded log-softmaxes of numbers below 10 / beta + 5
    rounding = 8 * EPS * (10 / beta + 5)
    assert (truth <= certificate.logp_bound + rounding)[issued].all()
    near = issued & (truth > 1e-8)  # where rounding allowances do not count
    assert (certificate.logp_bound / truth)[near].median() <= 2

    bound = certificate.logp_bound[issued]
    there, here = optimal[issued], logps[issued]
    for p, q in ((here, there), (there, here)):
        # the plain sum is rounded to an ulp of its largest terms, of order one
        assert ((p.exp() * (p - q)).sum(-1) <= bound**2 / 8 + 1e-14 / beta).all()
    # J(pi*) - J(pi) = beta KL(pi || pi*), the objectives summed one by one
    value = [
        (p.exp() * (rewards[issued] - beta * (p - ref[issued]))).sum(-1) for p in (there, here)
    ]  # of size below 10, a dozen roundings
    assert (value[0] - value[1] <= beta * bound**2 / 8 + 1e-13).all()


def test_the_loss_gap_bound_covers_the_loss_gap():
    """Property 81: the loss is above its minimum by at most (x + (1 - x) log(1 - x)) / rho^2, from gaps of
    1e-18 to 1; the truth is a sum of Bernoulli divergences."""
    X, Y = 600, 5
    generator = generator_of(7)
    rewards = normal(X, Y, generator=generator, scale=1.0)
    ref = torch.full((X, Y), -math.log(Y), dtype=torch.float64)
    slate = random_cycles(torch.ones(X, Y, dtype=torch.bool), cycles=2, generator=generator)
    rankings = expected_pairs(rewards, slate)
    scores = starts(rewards, generator)
    logps = tilt(ref, scores, 1.0)
    certificate = certify(logps, ref, rankings, beta=1.0)
    issued = certificate.loss_gap.isfinite()
    assert torch.equal(issued, certificate.logp_bound.isfinite()) and issued.sum() >= 300
    truth = excess(logps - ref, rewards, rankings)
    # Differences of scores are rounded by 1e-15 or so, which is 1e-6 of the smallest (1e-9): the divergence,
    # quadratic in them, is known to twice that.
    assert (certificate.loss_gap >= truth * (1 - 4e-6))[issued].all()
    near = issued & (certificate.x < 0.1)
    assert (certificate.loss_gap / truth)[near].median() <= 10  # rho^2 nu^2 against the actual direction


def test_the_refined_distance_is_never_undercut():
    """Property 81: the distance bound is min{-log(1 - x), range(H^+ g) + x/(1 - x) + log(1 - x)}, either
    arm of it decides somewhere, and no true range of score differences exceeds it in 2000 draws."""
    X, Y = 2000, 4
    generator = generator_of(13)
    rewards = normal(X, Y, generator=generator, scale=1.0)
    ref = torch.full((X, Y), -math.log(Y), dtype=torch.float64)
    slate = random_cycles(torch.ones(X, Y, dtype=torch.bool), cycles=1, generator=generator)
    rankings = expected_pairs(rewards, slate)
    size = 10 ** (-4 + 4.5 * torch.rand(X, 1, generator=generator, dtype=torch.float64))
    scores = rewards + size * normal(X, Y, generator=generator, scale=1.0)
    certificate = certify(tilt(ref, scores, 1.0), ref, rankings, beta=1.0)

    state = curvature(scores, rankings)
    inverse = torch.linalg.pinv(state.hessian)
    step = (inverse @ state.gradient.unsqueeze(-1)).squeeze(-1)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    rho2 = (diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2) - 2 * inverse).flatten(1).amax(-1)
    x = (rho2 * (step * state.gradient).sum(-1)).clamp(min=0).sqrt()
    simple = -torch.log1p(-x)
    newton = step.amax(-1) - step.amin(-1) + x / (1 - x) + torch.log1p(-x)

    issued = certificate.logp_bound.isfinite()
    assert issued.sum() >= 500
    assert (simple < newton)[issued].any() and (newton < simple)[issued].any()
    # pinv of Hessians with condition number up to 1e4, and the allowance for rounding in the bound
    expected = torch.minimum(simple, newton)
    torch.testing.assert_close(certificate.logp_bound[issued], expected[issued], rtol=1e-9, atol=1e-11)
    gap = (x + (1 - x) * torch.log1p(-x)) / rho2  # for x from 1e-4 on it keeps 7 digits
    torch.testing.assert_close(certificate.loss_gap[issued], gap[issued], rtol=1e-6, atol=0)
    difference = scores - rewards
    truth = difference.amax(-1) - difference.amin(-1)
    assert (truth <= certificate.logp_bound + 1e-14)[issued].all()  # rounding of scores below 10


def test_a_known_loss_gap_bounds_the_distance_from_anywhere():
    """[D11.2] with rho taken at the optimum and y = rho^2 times the loss gap, the range of score differences
    is at most y/2 + sqrt(y^2/4 + 2y), near the optimum and far from it."""
    X, Y = 600, 5
    generator = generator_of(31)
    rewards = normal(X, Y, generator=generator, scale=1.0)
    slate = random_cycles(torch.ones(X, Y, dtype=torch.bool), cycles=1, generator=generator)
    rankings = expected_pairs(rewards, slate)
    scores = starts(rewards, generator)
    y = largest_resistance(curvature(rewards, rankings)) * excess(scores, rewards, rankings)
    difference = scores - rewards
    truth = difference.amax(-1) - difference.amin(-1)
    # relative: half the 4e-6 by which the divergence of the nearest starts is known
    assert (truth <= (y / 2 + (y**2 / 4 + 2 * y).sqrt()) * (1 + 4e-6)).all()
    assert truth.max() > 10


@given(worlds(prompts=st.just(2), completions=st.integers(3, 6), scale=1.0), st.floats(-8, 0.5))
def test_the_bound_covers_the_distance_to_the_estimate_of_data(world, size):
    """Property 81 on counts: the minimiser is the maximum-likelihood estimate, found here by Newton."""
    exists = torch.ones_like(world.ref_logps, dtype=torch.bool)
    for data in (
        sample_pairs(world.rewards, 1500, slate=all_sets(exists), generator=world.generator),
        sample_rankings(world.rewards, 1500, slate=all_sets(exists, size=3), generator=world.generator),
    ):
        try:
            estimate = maximum_likelihood(data, exists)
        except InputError:
            continue  # a completion that never lost: no estimate to compare with
        noise = normal(*exists.shape, generator=world.generator, scale=10**size)
        logps = tilt(world.ref_logps, estimate + noise, world.beta)
        certificate = certify(logps, world.ref_logps, data, beta=world.beta)
        truth = gap_to(logps, tilt(world.ref_logps, estimate, world.beta))
        # Newton stops at a step below 1e-8, so its error is below 1e-16 times the third derivative's
        # factor: rounding of scores below 10, whose effect on log pi is divided by beta
        slack = 64 * EPS * (10 / world.beta + 10)
        assert (truth <= certificate.logp_bound + slack).all()


@given(worlds(completions=st.integers(2, 5), scale=2.0))
def test_at_the_optimum_the_bound_covers_rounding(world):
    """Property 81 at the optimum itself: the bound is positive and covers the distance to the exact pi*,
    computed with forty digits, of the closed form in float64 and of the point where the gradient in float64
    vanishes, which ill-conditioned comparisons put elsewhere."""
    X, Y = world.rewards.shape
    exists = torch.ones(X, Y, dtype=torch.bool)
    items = torch.stack([torch.arange(Y - 1), torch.arange(1, Y)], -1).repeat(X, 1)
    path = Slate(torch.arange(X).repeat_interleave(Y - 1), items, torch.ones(len(items)).double())
    rankings = expected_pairs(world.rewards, path)
    for scores in (world.rewards, maximum_likelihood(rankings, exists)):
        logps = tilt(world.ref_logps, scores, world.beta)
        certificate = certify(logps, world.ref_logps, rankings, beta=world.beta)
        # rounding, amplified by resistances up to e^12 (rewards of size 2 differ by 12 at most), over beta
        assert (certificate.logp_bound < 64 * EPS * math.exp(12) / world.beta).all()
        assert (certificate.loss_gap >= 0).all()
        with localcontext() as context:
            context.prec = 40
            beta = Decimal(world.beta)
            for x in range(X):
                rows = zip(world.ref_logps[x].tolist(), world.rewards[x].tolist())
                exponents = [Decimal(a) + Decimal(r) / beta for a, r in rows]
                log_z = sum(e.exp() for e in exponents).ln()
                errors = [abs(Decimal(v) - (e - log_z)) for v, e in zip(logps[x].tolist(), exponents)]
                assert max(errors) <= Decimal(certificate.logp_bound[x].item())


def test_x_is_not_understated_where_the_inverse_loses_digits():
    """[D11.2] On a path g' H^+ g and rho^2 are sums over its edges, known here to forty digits. Margins up to
    16 leave the inverse eight digits fewer than float64 has; x, from which every bound follows, allows for
    their loss, and by no more than 1e-7 of itself."""
    X, Y = 200, 6
    generator = generator_of(0)
    scores = (16 * torch.rand(X, Y, generator=generator, dtype=torch.float64)).cumsum(-1)
    scores = scores * torch.linspace(0.1, 1, X).double().unsqueeze(-1)
    ref = torch.full((X, Y), -math.log(Y), dtype=torch.float64)
    logps = tilt(ref, scores, 1.0)
    forth = [(y, y + 1, 1.0 + y) for y in range(Y - 1)]
    edges = forth + [(loser, winner, 3.0) for winner, loser, _ in forth]
    x = certify(logps, ref, one_each(X, *edges), beta=1.0).x
    total = sum(weight for *_, weight in edges)
    with localcontext() as context:
        context.prec = 40
        for found, row in zip(x.tolist(), (logps - ref).tolist()):
            decrement, resistance = Decimal(0), Decimal(0)
            for winner, loser, won in forth:
                chance = 1 / (1 + (Decimal(row[loser]) - Decimal(row[winner])).exp())
                games, won = Decimal(won + 3) / Decimal(total), Decimal(won) / Decimal(total)
                edge = games * chance * (1 - chance)
                decrement += (games * chance - won) ** 2 / edge
                resistance += 1 / edge
            exact = (decrement * resistance).sqrt()
            assert found == math.inf or exact <= Decimal(found) <= exact * (1 + Decimal("1e-7"))
    assert x.isfinite().sum() > X / 2


def test_the_bound_covers_the_rounding_of_large_log_probabilities():
    """[D11.2] at beta = 200 scores of size 100 * beta lose digits in products and differences that the
    gradient cannot see; against the exact pi*, computed with forty digits, at the optimum."""
    X, beta = 200, 200.0
    generator = generator_of(0)
    rewards = normal(X, 2, generator=generator, scale=1.0)
    ref = normal(X, 2, generator=generator, scale=100.0).log_softmax(-1)
    rankings = expected_pairs(rewards, all_sets(torch.ones(X, 2, dtype=torch.bool)))
    logps = tilt(ref, rewards, beta)
    bound = certify(logps, ref, rankings, beta=beta).logp_bound
    assert (bound < 1e-11).all()  # some 200 ulps of log-probabilities of size 100
    with localcontext() as context:
        context.prec = 40
        for x in range(X):
            exponents = [Decimal(a) + Decimal(r) / 200 for a, r in zip(ref[x].tolist(), rewards[x].tolist())]
            top = max(exponents)
            log_z = top + sum((e - top).exp() for e in exponents).ln()
            errors = [abs(Decimal(v) - (e - log_z)) for v, e in zip(logps[x].tolist(), exponents)]
            assert max(errors) <= Decimal(bound[x].item())


# ------------------------------------------------------------------------------------ when it must refuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_weights_of_any_dtype_are_reckoned_in_float64(dtype):
    """Counts are exact in every dtype, so estimate, curvature and bound are those of float64 counts. In the
    weights' own dtype 7 : 3 was out of reach in float32, an integer could not be divided, and the bound lay
    below the distance, because it allows for float64's rounding only."""
    prompt, order = (
        torch.zeros(6, dtype=torch.long),
        torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [0, 2], [2, 0]]),
    )
    counts = torch.tensor([7, 3, 6, 2, 5, 5])
    data, same = (Rankings(prompt, order, counts.to(d)) for d in (dtype, torch.float64))
    exists = torch.ones(1, 3, dtype=torch.bool)
    rewards = maximum_likelihood(data, exists)
    assert torch.equal(rewards, maximum_likelihood(same, exists))
    ref_logps = torch.zeros(1, 3).double().log_softmax(-1)
    logps = tilt(ref_logps, rewards, 0.5)
    assert certify(logps, ref_logps, data, beta=0.5).logp_bound < 1e-12  # Newton's end, to float64's rounding
    for weighted in (data, data.normalised(), data.normalised_by_prompt()):
        for table in (logps, logps.float()):  # and a policy of another dtype than the weights has a loss
            loss, weight = dpo_objective(table, ref_logps.to(table.dtype), weighted, beta=0.5)
            expected = dpo_objective(
                logps, ref_logps, weighted._replace(weight=weighted.weight.double()), beta=0.5
            )
            # A dozen roundings of float32. In bfloat16, the weights' own dtype, each would be 4e-3.
            torch.testing.assert_close(
                torch.stack([loss, weight]).double(), torch.stack(expected), rtol=1e-6, atol=0
            )
    assert data.normalised().weight.sum() == pytest.approx(1, abs=1e-15)
    many = Rankings(prompt[:2], order[:2], torch.tensor([256, 1]).to(dtype)).normalised()  # bfloat16: 256
    assert many.weight.sum() == pytest.approx(1, abs=1e-15)


def test_no_bound_where_comparisons_do_not_connect():
    """[D11.2] inf for a graph in two parts, for a completion never compared, for a prompt without data;
    the prompt beside them that is connected gets its bound."""
    ref = torch.full((4, 4), -math.log(4), dtype=torch.float64)
    both_ways = [(0, 0, 1), (0, 2, 3), (1, 0, 1), (1, 1, 2), (3, 0, 1), (3, 1, 2), (3, 2, 3)]
    rows = [(x, i, j) for x, i, j in both_ways] + [(x, j, i) for x, i, j in both_ways]
    table = torch.tensor(rows)
    data = Rankings(table[:, 0], table[:, 1:], torch.ones(len(rows), dtype=torch.float64))
    certificate = certify(ref, ref, data, beta=0.5)  # equal wins: the reference is the optimum
    for field in (certificate.logp_bound, certificate.loss_gap):
        assert field[:3].tolist() == [math.inf] * 3
        assert 0 <= field[3] < 1e-12  # at the optimum: rounding only


def test_no_bound_for_a_prompt_with_a_single_completion_and_no_data():
    """[D11.2] a prompt without comparisons gets inf, also where it has one completion only."""
    ref = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64).log()
    data = Rankings(torch.tensor([0, 0]), torch.tensor([[0, 1], [1, 0]]), torch.ones(2, dtype=torch.float64))
    certificate = certify(ref, ref, data, beta=1.0)
    assert certificate.logp_bound[0] < 1e-12  # equal wins: at the optimum, rounding only
    assert certificate.logp_bound[1] == math.inf and certificate.loss_gap[1] == math.inf


def test_ragged_prompts_are_judged_on_what_they_have():
    """Property 81 on prompts of 2, 3 and 5 completions: finite bounds that cover the distance."""
    generator = generator_of(3)
    exists = torch.arange(5) < torch.tensor([[2], [3], [5]])
    ref = normal(3, 5, generator=generator, scale=1.0).masked_fill(~exists, -math.inf).log_softmax(-1)
    rewards = normal(3, 5, generator=generator, scale=1.0).masked_fill(~exists, 0)
    rankings = expected_pairs(rewards, all_sets(exists))
    noise = normal(3, 5, generator=generator, scale=0.01)
    logps = tilt(ref, rewards + noise, 0.7)
    certificate = certify(logps, ref, rankings, beta=0.7)
    truth = gap_to(logps, tilt(ref, rewards, 0.7))
    assert (truth <= certificate.logp_bound).all() and (certificate.logp_bound <= 5 * truth).all()


def test_completions_that_do_not_exist_change_no_certificate():
    """[D11.2] a prompt gets the bound it would get in a table of its own, also the finer one by Newton's
    step; and the estimate next to a prompt that has a single completion is that without it."""
    generator = generator_of(4)
    exists = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    ref = normal(2, 5, generator=generator, scale=1.0).masked_fill(~exists, -math.inf).log_softmax(-1)
    rewards = normal(2, 5, generator=generator, scale=1.0).masked_fill(~exists, 0)
    narrow = expected_pairs(rewards[:1, :3], all_sets(exists[:1, :3]))
    logps = tilt(ref, rewards + normal(2, 5, generator=generator, scale=0.02), 0.7)
    wide, own = (
        certify(logps[:X, :Y], ref[:X, :Y], narrow, beta=0.7) for X, Y in ((2, 5), (1, 3))
    )  # the same numbers, but for an allowance for rounding that counts columns
    for field, other in zip(wide, own):
        torch.testing.assert_close(field[:1], other, rtol=1e-12, atol=0)
    assert own.logp_bound < -torch.log1p(-own.x) / 0.7  # Newton's step decides
    estimate = maximum_likelihood(narrow, exists)
    assert (estimate[:, 3:] == 0).all() and (estimate[1] == 0).all()
    torch.testing.assert_close(estimate[:1, :3], maximum_likelihood(narrow, exists[:1, :3]))


MARGINS = torch.cat([torch.linspace(-40, 60, 201), torch.linspace(65, 700, 128)]).double()


def one_each(X, *edges):
    """The same comparisons (winner, loser, weight) for each of X prompts."""
    order = torch.tensor([(winner, loser) for winner, loser, _ in edges]).repeat(X, 1)
    weight = torch.tensor([weight for *_, weight in edges], dtype=torch.float64).repeat(X)
    return Rankings(torch.arange(X).repeat_interleave(len(edges)), order, weight)


def test_no_bound_anywhere_on_the_path_of_a_pair_that_one_side_always_won():
    """[D11.2] with one comparison x = 1 / sigmoid(u) exactly, above one for every margin: no minimiser, no
    bound, however small the gradient."""
    X = len(MARGINS)
    ref = torch.full((X, 2), -math.log(2), dtype=torch.float64)
    logps = torch.stack([MARGINS, torch.zeros(X)], -1).log_softmax(-1)
    certificate = certify(logps, ref, one_each(X, (0, 1, 1.0)), beta=1.0)
    middle = MARGINS.abs() <= 10  # beyond, the allowance for rounding dominates x
    expected = 1 + (-MARGINS[middle]).exp()
    # the allowance itself: eps / (sigmoid(u) sigmoid(-u)) is below 1e-10 at u = 10
    torch.testing.assert_close(certificate.x[middle], expected, rtol=1e-10, atol=0)
    issued = certificate.logp_bound.isfinite() | certificate.loss_gap.isfinite()
    assert not issued.any(), f"certified separable data at margins {MARGINS[issued].tolist()}"


def test_no_bound_where_one_of_two_edges_is_separable():
    """[D11.2] an even pair beside a pair that one side always won: the flat direction is a vanishing part of
    the Hessian, and still nothing may be certified at any margin."""
    X = len(MARGINS)
    ref = torch.full((X, 3), -math.log(3), dtype=torch.float64)
    data = one_each(X, (0, 1, 1.0), (1, 0, 1.0), (1, 2, 1.0))
    logps = torch.stack([MARGINS, MARGINS, torch.zeros(X)], -1).log_softmax(-1)
    certificate = certify(logps, ref, data, beta=1.0)
    # without a minimiser x is at least 1; where float64 cannot tell it is inf, not what the noise makes it
    assert (certificate.x >= 1 - 1e-9).all()
    issued = certificate.logp_bound.isfinite() | certificate.loss_gap.isfinite()
    assert not issued.any(), f"certified separable data at margins {MARGINS[issued].tolist()}"


def test_the_bound_is_not_fooled_by_a_policy_far_from_the_optimum():
    """Property 81 far out: with win rate 0.7 the optimum has margin logit(0.7); at margins up to 700, where
    the Hessian all but vanishes, a bound is either refused or covers the distance."""
    X = len(MARGINS)
    ref = torch.full((X, 2), -math.log(2), dtype=torch.float64)
    logps = torch.stack([MARGINS, torch.zeros(X)], -1).log_softmax(-1)
    certificate = certify(logps, ref, one_each(X, (0, 1, 0.7), (1, 0, 0.3)), beta=1.0)
    optimal = torch.tensor([0.7, 0.3], dtype=torch.float64).log().expand(X, 2)
    wrong = gap_to(logps, optimal) > certificate.logp_bound + 1e-14  # rounding of either table
    assert not wrong.any(), f"bound below the distance at margins {MARGINS[wrong].tolist()}"


def test_no_bound_anywhere_on_the_path_of_separable_data():
    """[D11.2] gradient descent on chains of one-way wins never passes for converged, over 400 steps and at
    scores far along the direction it takes."""
    chain = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 2]])
    data = Rankings(torch.zeros(4, dtype=torch.long), chain, torch.ones(4, dtype=torch.float64)).normalised()
    ref = normal(1, 4, generator=generator_of(6), scale=1.0).log_softmax(-1)
    policy = TabularPolicy(ref)
    optimizer = torch.optim.SGD(
        policy.parameters(), lr=safe_learning_rate(data, beta=0.5), momentum=0.9, nesterov=True
    )

    def objective(batch):
        return dpo_objective(policy(), ref, batch, beta=0.5)[0], {}

    for record in train(objective, optimizer, itertools.repeat(data, 400)):
        if record["step"] % 20 == 0:
            certificate = certify(policy().detach(), ref, data, beta=0.5)
            assert certificate.logp_bound.item() == math.inf and certificate.x.item() > 1
    far = torch.logspace(0, 2.5, 40, dtype=torch.float64).unsqueeze(-1) * -torch.arange(4).double()
    for scores in far:
        logps = tilt(ref, scores.unsqueeze(0), 0.5)
        assert certify(logps, ref, data, beta=0.5).logp_bound.item() == math.inf


def test_a_certificate_carries_no_gradient():
    """It is asked of a policy in training: a graph kept with each record would fill the memory."""
    ref = normal(2, 4, generator=generator_of(2), scale=1.0).log_softmax(-1)
    data = expected_pairs(torch.zeros(2, 4).double(), all_sets(torch.ones(2, 4, dtype=torch.bool)))
    certificate = certify(TabularPolicy(ref)(), ref.clone().requires_grad_(), data, beta=1.0)
    assert not any(field.requires_grad for field in certificate)


def test_no_bound_where_the_condition_number_exceeds_its_limit():
    """[D11.2] At the minimum of a path 0-1-2 whose edges weigh 1 and w, gradient and x are zero; but
    the condition number is about 1 / w. A bound is issued below 1e8 and none above, where the allowance for
    the inverse's lost digits is no longer to be trusted."""
    ref = torch.full((1, 3), -math.log(3), dtype=torch.float64)
    for light, issued in ((1e-7, True), (1e-10, False)):
        both = [(0, 1, 1.0), (1, 0, 1.0), (1, 2, light), (2, 1, light)]
        certificate = certify(ref, ref, one_each(1, *both), beta=1.0)
        assert certificate.logp_bound.isfinite().item() is issued
        assert certificate.x.isfinite().item() is issued


def test_uneven_prompts_cost_the_sum_of_the_parts(monkeypatch):
    """Forty prompts of two completions beside one of thirty: estimate and bounds are those of each alone, and
    no table is wider than its prompt needs. Padded, all 41 tables would have 900 entries each."""
    exists = torch.zeros(41, 30, dtype=torch.bool)
    exists[:, :2], exists[20] = True, True
    rewards = torch.where(exists, normal(41, 30, generator=generator_of(3), scale=1.0), 0)
    data, ref = expected_pairs(rewards, all_sets(exists)), exists.double().log().log_softmax(-1)
    logps = torch.where(
        exists, ref + rewards / 2 + 1e-3 * normal(41, 30, generator=generator_of(4)), -math.inf
    )
    logps, sizes = logps.log_softmax(-1), []

    def inverse(hessian, compared):
        sizes.append(hessian.numel())
        return laplacian_inverse(hessian, compared)

    monkeypatch.setattr(certificates, "laplacian_inverse", inverse)
    estimate, together = maximum_likelihood(data, exists), certify(logps, ref, data, beta=0.5)
    assert max(sizes) <= max(40 * 2 * 2, 30 * 30)
    for x, width in ((0, 2), (20, 30), (40, 2)):
        mine = data.prompt == x
        own = Rankings(data.prompt[mine] * 0, data.order[mine], data.weight[mine])
        alone = certify(logps[x : x + 1, :width], ref[x : x + 1, :width], own, beta=0.5)
        for field, single in zip(together, alone):
            torch.testing.assert_close(field[x : x + 1], single, rtol=1e-12, atol=0)  # sums in another order
        expected = maximum_likelihood(own, exists[x : x + 1, :width])
        torch.testing.assert_close(estimate[x : x + 1, :width], expected, rtol=0, atol=1e-13)
    assert (estimate[~exists] == 0).all()


def test_certify_refuses_bad_input():
    """[D11.2] The conditions: equal shapes, beta > 0, finite compared log-probabilities."""
    ref = torch.full((1, 3), -math.log(3), dtype=torch.float64)
    data = Rankings(torch.zeros(1, dtype=torch.long), torch.tensor([[0, 1]]), torch.ones(1).double())
    gone = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    for logps, other, beta in ((ref, ref, 0.0), (ref, ref[:, :2], 1.0), (gone, ref, 1.0)):
        with pytest.raises(InputError):
            certify(logps, other, data, beta=beta)


# ---------------------------------------------------------------------------------------- function space


def test_a_network_is_certified_in_function_space():
    """[D11.2] a GPT whose completions are all enumerated is judged like a table. Trained from the reference
    by Adam, its bound covers its distance to pi*, and shrinks to a small multiple of it."""
    beta = 0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference = GPT(GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=2, n_embd=16)).double()
    with torch.no_grad():
        reference.ln_f.weight.mul_(6.0)  # conditionals far from uniform
    completions = enumerate_completions(3, 2, 2)
    prompts = torch.tensor([[0, 1], [1, 1]])
    policy = EnumeratedPolicy(copy.deepcopy(reference), prompts, completions)
    with torch.no_grad():
        ref = policy()
    X, Y = ref.shape
    rewards = beta * normal(X, Y, generator=generator_of(0), scale=1.0)
    rankings = expected_pairs(rewards, all_sets(torch.ones(X, Y, dtype=torch.bool)))
    optimal = tilt(ref, rewards, beta)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    steps = 400
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 2)

    def objective(batch):
        return dpo_objective(policy(), ref, batch, beta=beta)[0], {}

    bounds = []
    for record in train(objective, optimizer, itertools.repeat(rankings, steps), scheduler=decay):
        if record["step"] % 50 == 0:
            logps = policy().detach()
            bound = certify(logps, ref, rankings, beta=beta).logp_bound
            truth = gap_to(logps, optimal)
            # all completions are enumerated, so the table is a distribution but for float64's rounding
            assert (truth <= bound + 1e-13).all()
            bounds.append(bound.max().item())
    assert bounds[-1] <= 1e-3  # a thousandth of a nat, from a start more than half a nat away
    assert gap_to(ref, optimal).max() > 0.5
    assert (bound <= 3 * truth + 1e-12).all()  # the median of bound over truth is below 2 elsewhere


def test_a_table_that_is_off_normal_gets_a_wider_bound_or_none():
    """[D11.2] scores ignore a shift of the whole table, its distance to pi* does not: a small excess is added
    to the bound, a large one is refused, and so is a NaN that no comparison touches."""
    generator = generator_of(11)
    ref, rewards = (normal(2, 5, generator=generator, scale=1.0) for _ in range(2))
    ref = ref.log_softmax(-1)
    rankings = expected_pairs(rewards, all_sets(torch.ones(2, 5, dtype=torch.bool)))
    optimal = tilt(ref, rewards, 0.7)
    bound = certify(optimal + 5e-5, ref, rankings, beta=0.7).logp_bound
    # the shift itself, and rounding at the optimum
    assert (bound >= 5e-5).all() and (bound <= 5e-5 + 1e-11).all()
    single = certify(optimal.float(), ref.float(), rankings, beta=0.7).logp_bound
    assert ((optimal.float().double() - optimal).abs().amax(-1) <= single).all()
    with pytest.raises(InputError, match=r"^logps must"):
        certify(optimal + 5, ref, rankings, beta=0.7)
    hole = ref.clone()
    hole[0, 4] = math.nan
    with pytest.raises(InputError, match=r"^ref_logps must"):
        certify(optimal, hole, rankings, beta=0.7)
