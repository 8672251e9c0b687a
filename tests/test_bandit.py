"""Training on tables: gradients, conservation laws, and the limits that gradient descent must reach.

Every limit is a closed form, and every training is judged twice: against that closed form, and against
the bound that the certificate derives from the last gradient alone.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, worlds

from dpo_minimal.bandit import (
    TabularPolicy,
    dpo_objective,
    loss_on_table,
    plackett_luce_objective,
    random_bandit,
    safe_learning_rate,
)
from dpo_minimal.certificates import certify
from dpo_minimal.experiments.bandit.convergence import Settings, plackett_luce, tabular
from dpo_minimal.losses import bradley_terry_loss, dpo_loss
from dpo_minimal.preferences import (
    Rankings,
    Slate,
    all_sets,
    expected_pairs,
    expected_rankings,
    random_cycles,
    sample_pairs,
    tally,
)
from dpo_minimal.train import train
from dpo_minimal.zoo.ipo import ipo_objective

EPS = torch.finfo(torch.float64).eps


# ------------------------------------------------------------------------------------------------ helpers


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tilt(ref_logps, rewards, beta):
    """log of pi_ref e^{r / beta} / Z, written with exponentials only."""
    tilted = ref_logps.exp() * (rewards / beta).exp()
    return (tilted / tilted.sum(-1, keepdim=True)).log()


def distance(logps, other):
    """max |log pi - log pi'| over completions that exist."""
    return torch.where(other > -math.inf, logps - other, 0).abs().max().item()


def rankings_of(prompt, order, weight):
    return Rankings(torch.tensor(prompt), torch.tensor(order), torch.tensor(weight, dtype=torch.float64))


def pairs(*winner_loser_weight):
    """Comparisons on one prompt."""
    rows = [(winner, loser) for winner, loser, _ in winner_loser_weight]
    return rankings_of([0] * len(rows), rows, [weight for *_, weight in winner_loser_weight])


def random_rankings(X, Y, K, *, generator, count=12):
    """Random rankings with random weights: not the law of any reward."""
    prompt = torch.cat([torch.arange(X), torch.randint(X, (count,), generator=generator)])
    order = torch.rand(len(prompt), Y, generator=generator).argsort(-1)[:, :K]
    weight = 0.1 + torch.rand(len(prompt), generator=generator, dtype=torch.float64)
    return Rankings(prompt, order, weight).normalised()


def descend(
    policy, rankings, ref_logps, beta, *, steps, objective=dpo_objective, lr=None, stop_at=0.0, **options
):
    """Full-batch gradient descent by the package's loop; returns the final table.

    Nesterov momentum unless options say otherwise; stops once the certificate promises `stop_at`.
    """
    lr = lr or safe_learning_rate(rankings, beta=None if objective is ipo_objective else beta)
    options = options or {"momentum": 0.9, "nesterov": True}
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr, **options)

    def step_objective(batch):
        return objective(policy(), ref_logps, batch, beta=beta)[0], {}

    for record in train(step_objective, optimizer, itertools.repeat(rankings, steps)):
        if stop_at and record["step"] % 20 == 0:
            bound = certify(policy().detach(), ref_logps, rankings, beta=beta).logp_bound
            if bound.max() <= stop_at:
                break
    return policy().detach()


def assert_reached(logps, target, ref_logps, rankings, beta):
    """The end point is within its certificate of the target, and within 1e-9 nats."""
    bound = certify(logps, ref_logps, rankings, beta=beta).logp_bound
    error = torch.where(target > -math.inf, logps - target, 0).abs().amax(-1)
    # The target's own rounding: a table of size s written in float64 is off by a few eps * s.
    size = torch.where(target > -math.inf, target.abs(), 0).max()
    assert (error <= bound + 8 * EPS * size).all()
    # 1e-9: ten times what `stop_at` asks of the certificate, far above float64's rounding of the tables.
    assert error.max() <= 1e-9


# ------------------------------------------------------------------------------- gradient and curvature


@given(worlds())
def test_tabular_gradient_is_the_weighted_difference_of_indicators(world):
    """Property 13: the gradient in the logits is -beta E[sigmoid(-u) (e_w - e_l)], and sums to zero."""
    X, Y = world.ref_logps.shape
    rankings = random_rankings(X, Y, 2, generator=world.generator)
    policy = TabularPolicy(world.logps)
    loss, mean_weight = dpo_objective(policy(), world.ref_logps, rankings, beta=world.beta)
    loss.backward()

    expected = torch.zeros(X, Y, dtype=torch.float64)
    weights = 0.0
    for x, (w, loser), share in zip(rankings.prompt, rankings.order, rankings.weight):
        g = (world.logps - world.ref_logps)[x]
        pull = world.beta / (1 + torch.exp(world.beta * (g[w] - g[loser])))
        expected[x, w] -= share * pull
        expected[x, loser] += share * pull
        weights += share * pull
    # A dozen sums of numbers up to beta, whose arguments are differences of log-probabilities below 40.
    tolerance = 1e-13 * world.beta * (1 + world.beta)
    torch.testing.assert_close(policy.theta.grad, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(mean_weight, weights, rtol=0, atol=tolerance)
    assert policy.theta.grad.sum(-1).abs().max() <= tolerance


@given(worlds(prompts=st.just(1), completions=st.integers(2, 5)))
def test_gradient_against_central_differences(world):
    """Property 14: autograd agrees with central differences of the objective."""
    rankings = random_rankings(1, world.ref_logps.shape[1], 2, generator=world.generator)
    h = 1e-5

    def loss(logits):
        return dpo_objective(logits.log_softmax(-1), world.ref_logps, rankings, beta=world.beta)[0]

    logits = world.logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    unit = torch.eye(logits.shape[1], dtype=torch.float64)
    differences = [(loss(logits + h * e) - loss(logits - h * e)).item() / (2 * h) for e in unit]
    # |third derivative| <= beta^3 / (6 sqrt 3) < beta^3 / 10 gives beta^3 h^2 / 60; the loss is below
    # 1 + 40 beta and rounded to about eight units in the last place.
    tolerance = world.beta**3 * h**2 / 60 + 8 * EPS * (1 + 40 * world.beta) / h
    torch.testing.assert_close(
        gradient[0].detach(), torch.tensor(differences, dtype=torch.float64), rtol=0, atol=tolerance
    )


@given(worlds(prompts=st.just(1)))
def test_hessian_is_a_graph_laplacian(world):
    """Property 15: the Hessian in the logits is beta^2 times the Laplacian with edge weights
    m sigmoid(u) sigmoid(-u): positive semi-definite, with the constants as its kernel."""
    Y = world.ref_logps.shape[1]
    rankings = random_rankings(1, Y, 2, generator=world.generator)

    def loss(logits):
        return dpo_objective(logits.log_softmax(-1), world.ref_logps, rankings, beta=world.beta)[0]

    hessian = torch.autograd.functional.hessian(loss, world.logps)[0, :, 0]
    s = world.beta * (world.logps - world.ref_logps)[0]
    expected = torch.zeros(Y, Y, dtype=torch.float64)
    for (w, loser), share in zip(rankings.order, rankings.weight):
        edge = torch.zeros(Y, dtype=torch.float64)
        edge[w], edge[loser] = 1, -1
        u = s[w] - s[loser]
        expected += share * torch.sigmoid(u) * torch.sigmoid(-u) * torch.outer(edge, edge)
    expected *= world.beta**2
    # Sums of a dozen terms below beta^2, with arguments u of size up to 40 beta; autograd's double
    # backward takes a few passes more.
    tolerance = 1e-13 * world.beta**2 * (1 + 4 * world.beta)
    torch.testing.assert_close(hessian, expected, rtol=0, atol=tolerance)
    assert torch.linalg.eigvalsh(expected).min() >= -tolerance
    # `safe_learning_rate` is the inverse of a bound on the largest eigenvalue (property 16).
    assert torch.linalg.eigvalsh(hessian).max() * safe_learning_rate(rankings, beta=world.beta) <= 1 + 1e-12


@pytest.mark.parametrize("kind", ["dpo", "pl2", "pl3", "pl4", "pl5", "ipo"])
@given(worlds(completions=st.integers(5, 7)))
def test_a_safe_step_never_raises_the_loss(kind, world):
    """Property 16: with the step 2 / beta^2 per unit of weight (1/4 for IPO), plain gradient descent from
    anywhere never raises the loss: DPO, Plackett-Luce of up to five answers, IPO."""
    K = int(kind[2]) if kind.startswith("pl") else 2
    objective = {"dpo": dpo_objective, "ipo": ipo_objective}.get(kind, plackett_luce_objective)
    rankings = random_rankings(*world.ref_logps.shape, K, generator=world.generator)
    rate = safe_learning_rate(rankings, beta=None if kind == "ipo" else world.beta)
    policy = TabularPolicy(world.logps)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)

    def step_objective(batch):
        return objective(policy(), world.ref_logps, batch, beta=world.beta)[0], {}

    losses = [r["loss"] for r in train(step_objective, optimizer, itertools.repeat(rankings, 6))]
    # Rounding of one loss: a dozen terms, each computed from log-probabilities of size up to 40.
    slack = 1e-13 * (1 + max(losses))
    assert all(after <= before + slack for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]  # random rankings agree with no random start


@pytest.mark.parametrize("K", [2, 3, 5])
def test_the_safe_step_bounds_the_curvature_of_rankings(K):
    """Property 16: the last two of a ranking take part in K - 1 choices; at the reference their direction has
    curvature beta^2 (1/2 + ... + 1/K), and the inverse of the safe step is above it, below four times it."""
    beta, ref = 0.7, torch.zeros(1, K, dtype=torch.float64).log_softmax(-1)
    data = rankings_of([0], [list(range(K))], [1.0])

    def loss(logits):
        return plackett_luce_objective(logits.log_softmax(-1), ref, data, beta=beta)[0]

    hessian = torch.autograd.functional.hessian(loss, ref)[0, :, 0]
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    # by the sum over stages; second derivatives of a few logarithms
    assert largest == pytest.approx(beta**2 * sum(1 / k for k in range(2, K + 1)), rel=1e-12)
    assert 1 - 1e-12 <= 1 / (safe_learning_rate(data, beta=beta) * largest) < 4


def test_safe_step_of_comparisons_is_two_over_beta_squared():
    """Property 16: two completions sharing all the weight allow exactly 2 / beta^2, and the step is nearly
    the largest: at the optimum of an even pair the curvature is half the bound, so 4.2 / beta^2 diverges."""
    rankings = pairs((0, 1, 0.5), (1, 0, 0.5))
    beta = 0.3
    # one division
    assert safe_learning_rate(rankings, beta=beta) == pytest.approx(2 / beta**2, rel=1e-14)
    ref = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log()
    start = ref + torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
    for factor, falls in ((2.0, True), (3.9, True), (4.2, False)):
        policy = TabularPolicy(start)
        logps = descend(policy, rankings, ref, beta, steps=1, lr=factor / beta**2, momentum=0.0)
        assert (distance(logps, ref) < distance(start.log_softmax(-1), ref)) is falls


@given(worlds(), st.floats(-100, 100))
def test_adding_a_constant_to_the_logits_changes_nothing(world, shift):
    """Property 17: theta + c is the same policy, the same loss, and the same gradient, which sums to 0."""
    rankings = random_rankings(*world.ref_logps.shape, 2, generator=world.generator)
    results = []
    for start in (world.logps, world.logps + shift):
        policy = TabularPolicy(start)
        loss, _ = dpo_objective(policy(), world.ref_logps, rankings, beta=world.beta)
        loss.backward()
        results.append((loss.detach(), policy.theta.grad))
    # theta + c rounds each logit to an ulp of 128; the loss's slope is at most 2 beta, the gradient's beta^2
    rounding = 8 * EPS * 128
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=2 * world.beta * rounding)
    torch.testing.assert_close(
        results[0][1], results[1][1], rtol=0, atol=world.beta * (1 + world.beta) * rounding
    )


# --------------------------------------------------------------- what the objective is an expectation of


@given(worlds())
def test_repeating_the_data_or_counting_it_is_the_same(world):
    """Properties 20 and 21: duplicated data leave mean loss and gradient unchanged; integer weights are
    repeated rows."""
    X, Y = world.ref_logps.shape
    rankings = random_rankings(X, Y, 2, generator=world.generator)
    counts = torch.randint(1, 5, (len(rankings.prompt),), generator=world.generator)
    counted = rankings._replace(weight=counts.double()).normalised()
    rows = Rankings(
        rankings.prompt.repeat_interleave(counts),
        rankings.order.repeat_interleave(counts, 0),
        torch.ones(int(counts.sum()), dtype=torch.float64),
    ).normalised()
    twice = Rankings(*(torch.cat([field, field]) for field in rows)).normalised()
    tallied = tally(twice.prompt, twice.order, twice.weight)

    results = []
    for data in (counted, rows, twice, tallied):
        policy = TabularPolicy(world.logps)
        loss, _ = dpo_objective(policy(), world.ref_logps, data, beta=world.beta)
        loss.backward()
        results.append((loss.detach(), policy.theta.grad))
    for loss, gradient in results[1:]:
        # the same numbers summed in another order, at most a hundred of them
        torch.testing.assert_close(loss, results[0][0], rtol=1e-14, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=1e-14 * world.beta)


@given(worlds())
def test_dpo_of_a_tilted_policy_is_the_reward_models_loss(world):
    """Property 22: L_DPO of pi_ref e^{s / beta} / Z is the Bradley-Terry loss of s."""
    rankings = random_rankings(*world.ref_logps.shape, 2, generator=world.generator)
    scores = world.rewards
    policy = (world.ref_logps + scores / world.beta).log_softmax(-1)
    ranked = rankings.gather(scores)
    expected = rankings.weight @ bradley_terry_loss(ranked[:, 0], ranked[:, 1])
    loss, _ = dpo_objective(policy, world.ref_logps, rankings, beta=world.beta)
    # s / beta reaches 200 / beta where rewards reach 10: its rounding, times beta, is that of s
    tolerance = 16 * EPS * (scores.abs().max() + world.beta * world.ref_logps.abs().max() + 1)
    torch.testing.assert_close(loss, expected, rtol=0, atol=tolerance.item())


@given(worlds())
def test_excess_loss_is_a_sum_of_bernoulli_divergences(world):
    """Properties 25 and 26: L(s) - L(r) = sum m KL(Bern(p) || Bern(sigmoid(s_i - s_j))), L(r) is the
    Bayes entropy, and no policy is below it."""
    X, Y = world.ref_logps.shape
    # N(0, 1) rewards keep both outcomes' probabilities well inside (0, 1)
    rewards = world.rewards / 3
    rankings = expected_pairs(rewards, all_sets(torch.ones(X, Y, dtype=torch.bool)))
    i, j = torch.triu_indices(Y, Y, offset=1)
    m = 1 / (X * len(i))  # every pair alike
    p = 1 / (1 + (rewards[:, j] - rewards[:, i]).exp())
    bayes = -m * (p * p.log() + (1 - p) * (1 - p).log()).sum()
    s = world.beta * (world.logps - world.ref_logps)
    log_q, log_not_q = (torch.nn.functional.logsigmoid(sign * (s[:, i] - s[:, j])) for sign in (1, -1))
    divergence = m * (p * (p.log() - log_q) + (1 - p) * ((1 - p).log() - log_not_q)).sum()

    loss, _ = dpo_objective(world.logps, world.ref_logps, rankings, beta=world.beta)
    floor, _ = dpo_objective(
        tilt(world.ref_logps, rewards, world.beta), world.ref_logps, rankings, beta=world.beta
    )
    # margins up to 40 beta, whose rounding the loss inherits; and rewards / beta in the tilt
    tolerance = 32 * EPS * (1 + 40 * world.beta)
    torch.testing.assert_close(floor, bayes, rtol=0, atol=tolerance)
    torch.testing.assert_close(loss, bayes + divergence, rtol=0, atol=tolerance)
    assert loss >= bayes - tolerance
    gap = (s - rewards) - (s - rewards)[:, :1]
    if gap.abs().max() > 1e-3:  # another policy than pi*: strictly above (curvature > 1e-8 here)
        assert loss > bayes


def test_pairs_of_equal_completions_only_add_log_two():
    """Property 28: a pair y = y' costs log 2 whatever the policy, and has no gradient."""
    generator = generator_of(5)
    ref, logps = (normal(1, 4, generator=generator).log_softmax(-1) for _ in range(2))
    beta, share = 0.7, 0.3
    clean = random_rankings(1, 4, 2, generator=generator)
    double = torch.arange(4).unsqueeze(-1).expand(4, 2)
    mixed = Rankings(
        torch.cat([clean.prompt, torch.zeros(4, dtype=torch.long)]),
        torch.cat([clean.order, double]),
        torch.cat([(1 - share) * clean.weight, torch.full((4,), share / 4, dtype=torch.float64)]),
    )
    loss, gradient = [], []
    for data in (clean, mixed):
        policy = TabularPolicy(logps)
        value, _ = dpo_objective(policy(), ref, data, beta=beta)
        value.backward()
        loss.append(value.item())
        gradient.append(policy.theta.grad)
    # a sum of twenty numbers of order one
    assert loss[1] == pytest.approx((1 - share) * loss[0] + share * math.log(2), abs=1e-14)
    torch.testing.assert_close(gradient[1], (1 - share) * gradient[0], rtol=0, atol=1e-14)


# ----------------------------------------------------------------------- layer one: the population optimum


@pytest.mark.parametrize("seed", range(5))
def test_the_population_experiment_reaches_the_closed_form(seed):
    """Property 24: 8 prompts x 16 completions, exact probabilities; the trained table is
    pi_ref e^{r / beta} / Z within the certificate and within 1e-9 nats."""
    world = random_bandit(8, 16, generator=generator_of(4 * seed))
    settings = Settings(beta=0.5, pairs=1, table_steps=600, gpt_steps=1, seed=seed, device="cpu")
    outcome = tabular(world, settings)
    target = tilt(world.ref_logps, world.rewards, 0.5)
    error = (outcome.logps - target).abs().amax(-1)
    # the closed form's own rounding: log-probabilities below 20, a few operations
    assert (error <= outcome.logp_bound + 8 * EPS * 20).all()
    assert error.max() <= 1e-9  # a hundred times the bound at which training stops
    assert outcome.records[0]["loss"] == pytest.approx(math.log(2), abs=1e-14)  # property 1: starts at pi_ref
    assert outcome.records[0]["distance/max_logp"] > 0.5  # and the start is nowhere near the end


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ranking_experiment_reaches_the_closed_form(seed):
    """[D8.3] the population optimum of the Plackett-Luce objective, rankings of four, is pi* too."""
    world = random_bandit(4, 8, generator=generator_of(seed))
    settings = Settings(beta=0.5, pairs=1, table_steps=600, gpt_steps=1, seed=seed, device="cpu")
    outcome = plackett_luce(world, settings, 4)
    error = (outcome.logps - tilt(world.ref_logps, world.rewards, 0.5)).abs().amax(-1)
    assert (error <= outcome.logp_bound + 8 * EPS * 20).all()  # closed form's rounding, as above
    assert error.max() <= 1e-9  # a hundred times the bound at which training stops


def slate_of(name, ref_logps, generator):
    """Which pairs are shown: all connect the completions, with very different weights."""
    X, Y = ref_logps.shape
    exists = torch.ones(X, Y, dtype=torch.bool)
    if name == "iid from the reference":
        items = torch.cartesian_prod(torch.arange(Y), torch.arange(Y))  # equal pairs included
        chance = (ref_logps.unsqueeze(-1) + ref_logps.unsqueeze(-2)).exp().flatten(1)
        return Slate(torch.arange(X).repeat_interleave(Y * Y), items.repeat(X, 1), chance.flatten() / X)
    if name == "uniform":
        return all_sets(exists)
    if name == "random cycles":
        return random_cycles(exists, cycles=2, generator=generator)
    first = torch.arange(Y - 1) if name == "path" else torch.zeros(Y - 1, dtype=torch.long)
    items = torch.stack([first, torch.arange(1, Y)], -1).repeat(X, 1)
    weight = 0.5 + torch.rand(len(items), generator=generator, dtype=torch.float64)
    return Slate(torch.arange(X).repeat_interleave(Y - 1), items, weight / weight.sum())


@pytest.mark.parametrize("beta", [0.1, 1.7])
@pytest.mark.parametrize("shown", ["iid from the reference", "uniform", "path", "star", "random cycles"])
def test_the_population_optimum_does_not_depend_on_the_pairs_shown(shown, beta):
    """Properties 24 and 27: with Bradley-Terry labels every connected choice of pairs leads to the same
    pi_ref e^{r / beta} / Z."""
    generator = generator_of(11)
    world = random_bandit(2, 5, reference_scale=0.7, generator=generator)
    rankings = expected_pairs(world.rewards, slate_of(shown, world.ref_logps, generator))
    rankings = rankings.normalised_by_prompt()
    policy = TabularPolicy(world.ref_logps)
    logps = descend(policy, rankings, world.ref_logps, beta, steps=6000, stop_at=1e-10)
    assert_reached(logps, tilt(world.ref_logps, world.rewards, beta), world.ref_logps, rankings, beta)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_rankings_of_any_size_have_the_same_optimum(K):
    """[D8.3] the population optimum of Plackett-Luce DPO is pi*, for K = 2, 3 and 4."""
    generator = generator_of(K)
    world = random_bandit(2, 5, generator=generator)
    rankings = expected_rankings(world.rewards, all_sets(world.exists, size=K))
    logps = descend(
        TabularPolicy(world.ref_logps), rankings, world.ref_logps, 0.6,
        objective=plackett_luce_objective, steps=3000, stop_at=1e-10,
    )  # fmt: skip
    assert_reached(logps, tilt(world.ref_logps, world.rewards, 0.6), world.ref_logps, rankings, 0.6)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_label_temperature_scales_the_reward(temperature):
    """[D2.3] labels drawn from Bradley-Terry at temperature T lead to pi_ref e^{r / (T beta)} / Z."""
    world = random_bandit(2, 4, generator=generator_of(8))
    rankings = expected_pairs(world.rewards, all_sets(world.exists), temperature=temperature)
    logps = descend(TabularPolicy(world.ref_logps), rankings, world.ref_logps, 0.8, steps=5000, stop_at=1e-10)
    target = tilt(world.ref_logps, world.rewards, temperature * 0.8)
    assert_reached(logps, target, world.ref_logps, rankings, 0.8)
    assert distance(logps, tilt(world.ref_logps, world.rewards, 0.8)) > 0.1  # and not the T = 1 policy


def test_ragged_worlds_train_as_if_the_missing_completions_were_not_there():
    """Property 24 where prompts have 2, 3 and 5 completions: -inf stays -inf, the others reach pi*."""
    generator = generator_of(3)
    exists = torch.arange(5) < torch.tensor([[2], [3], [5]])
    ref = normal(3, 5, generator=generator, scale=1.0).masked_fill(~exists, -math.inf).log_softmax(-1)
    rewards = normal(3, 5, generator=generator, scale=1.0).masked_fill(~exists, 0)
    rankings = expected_pairs(rewards, all_sets(exists))
    policy = TabularPolicy(ref)
    logps = descend(policy, rankings, ref, 0.5, steps=3000, stop_at=1e-10)
    assert torch.equal(logps > -math.inf, exists)
    assert_reached(logps, tilt(ref, rewards, 0.5), ref, rankings, 0.5)


def cyclic(first, second, third, *, strength=0.8):
    """0 beats 1 beats 2 beats 0, each with probability `strength`; weights say how often each is shown."""
    rows = []
    for (w, loser), share in zip([(0, 1), (1, 2), (2, 0)], [first, second, third]):
        rows += [(w, loser, strength * share), (loser, w, (1 - strength) * share)]
    return pairs(*rows)


def test_cyclic_preferences_make_the_optimum_depend_on_the_pairs_shown():
    """Property 27: without a reward behind the labels, the optimum balances expected and observed wins,
    and so depends on how often each pair is shown."""
    ref = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    beta, ends = 0.6, []
    for shares in ((1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)):
        data = cyclic(*shares)
        logps = descend(TabularPolicy(ref), data, ref, beta, steps=4000, stop_at=1e-11)
        s = beta * (logps - ref)[0]
        surplus = torch.zeros(3, dtype=torch.float64)
        for (w, loser), share in zip([(0, 1), (1, 2), (2, 0)], shares):
            gap = share * (0.8 - torch.sigmoid(s[w] - s[loser]))
            surplus[w] += gap
            surplus[loser] -= gap
        assert surplus.abs().max() <= 1e-11  # the gradient at a point certified to 1e-11 nats
        ends.append(logps)
    assert distance(ends[0], ref) <= 1e-10  # symmetric cycle: no completion is better than another
    assert distance(ends[0], ends[1]) > 0.1


# ----------------------------------------------------------------- comparisons that do not connect all


def disconnected():
    """Components {0, 1, 2}, {3, 4}, {5}: the last is never compared."""
    generator = generator_of(21)
    ref = normal(1, 6, generator=generator, scale=1.0).log_softmax(-1)
    rewards = normal(1, 6, generator=generator, scale=1.0)
    items = torch.tensor([[0, 1], [1, 2], [0, 2], [3, 4]])
    weight = torch.tensor([0.3, 0.2, 0.1, 0.4], dtype=torch.float64)
    data = expected_pairs(rewards, Slate(torch.zeros(4, dtype=torch.long), items, weight))
    return ref, rewards, data, ([0, 1, 2], [3, 4], [5])


def test_gradient_descent_keeps_each_components_sum_and_so_has_a_closed_form():
    """Property 18: on a disconnected graph gradient descent ends at
    theta_ref + (r - mean of r over the component) / beta, which is not pi*; no certificate is issued."""
    ref, rewards, data, components = disconnected()
    beta = 0.7
    expected = ref.clone()
    for members in components:
        expected[:, members] += (rewards[:, members] - rewards[:, members].mean()) / beta
    for options in ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.0}):
        policy = TabularPolicy(ref)
        logps = descend(policy, data, ref, beta, steps=300, **options)
        # Each step's gradient sums to zero but for an ulp of a number below one, 300 of them.
        for members in components:
            drift = (policy.theta - ref)[:, members].sum().item()
            assert abs(drift) <= 300 * EPS
        # linear convergence, to 1e-14 after 100 steps: rounding only is left
        torch.testing.assert_close(policy.theta.detach(), expected, rtol=0, atol=1e-10)
        assert certify(logps, ref, data, beta=beta).logp_bound.item() == math.inf
    assert distance(logps, tilt(ref, rewards, beta)) > 0.05


def test_adam_leaves_the_components_sum_for_another_minimiser_of_equal_loss():
    """Property 18 and A4c: Adam rescales each coordinate, so component sums drift by more than 1e-3 while
    the loss ends at the same Bayes entropy."""
    ref, rewards, data, components = disconnected()
    policy = TabularPolicy(ref)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)

    def step_objective(batch):
        return dpo_objective(policy(), ref, batch, beta=0.7)[0], {}

    last = list(train(step_objective, optimizer, itertools.repeat(data, 400)))[-1]
    drifts = [abs((policy.theta - ref)[:, members].sum().item()) for members in components]
    assert max(drifts) > 1e-3
    floor, _ = dpo_objective(tilt(ref, rewards, 0.7), ref, data, beta=0.7)
    # Adam with a constant rate hovers within its rate of the optimum, so the loss within rate^2 of it
    assert last["loss"] == pytest.approx(floor.item(), abs=0.02**2)


# --------------------------------------------------------------------------------- closed forms for data


def test_two_completions_end_at_the_logit_of_their_win_rate():
    """Property 29: with K = 2 and n1 against n2 wins, DPO's gap of log-ratios is log(n1 / n2) / beta."""
    ref = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64).log()
    beta = 0.3
    order = [(0, 1), (1, 0), (0, 1), (1, 0)]
    data = rankings_of([0, 0, 1, 1], order, [13.0, 4.0, 2.0, 5.0]).normalised_by_prompt()
    logps = descend(TabularPolicy(ref), data, ref, beta, steps=4000, stop_at=1e-10)
    g = logps - ref
    expected = torch.tensor([13 / 4, 2 / 5], dtype=torch.float64).log() / beta
    # the difference of two entries that are each certified to 1e-10
    torch.testing.assert_close(g[:, 0] - g[:, 1], expected, rtol=0, atol=2e-10)


def test_a_tree_of_comparisons_ends_at_the_logit_of_every_edge():
    """Property 30: on a tree each edge's gap of log-ratios is logit(win rate) / beta, as if it were alone."""
    edges = {(0, 1): (9, 3), (0, 2): (2, 7), (2, 3): (5, 5), (2, 4): (8, 1)}
    data = pairs(
        *((i, j, n) for (i, j), (n, _) in edges.items()), *((j, i, n) for (i, j), (_, n) in edges.items())
    )
    data = data.normalised()
    ref = normal(1, 5, generator=generator_of(2), scale=1.0).log_softmax(-1)
    logps = descend(TabularPolicy(ref), data, ref, 0.5, steps=6000, stop_at=1e-10)
    assert certify(logps, ref, data, beta=0.5).logp_bound.item() <= 1e-10
    g = (logps - ref)[0]
    for (i, j), (won, lost) in edges.items():
        # the difference of two entries that are each certified to 1e-10
        assert (g[i] - g[j]).item() == pytest.approx(math.log(won / lost) / 0.5, abs=2e-10)


def test_dpo_descends_along_the_path_of_the_reward_model():
    """Property 23: gradient descent on DPO with step eta is gradient descent on the reward model with step
    eta beta^2, tilted by the closed form, at every one of 200 steps."""
    generator = generator_of(17)
    world = random_bandit(2, 5, generator=generator)
    beta = 0.3
    rankings = random_rankings(2, 5, 2, generator=generator)
    rate = safe_learning_rate(rankings, beta=beta)
    policy = TabularPolicy(world.ref_logps)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    scores = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)

    def step_objective(batch):
        return dpo_objective(policy(), world.ref_logps, batch, beta=beta)[0], {}

    worst = 0.0
    for _ in train(step_objective, optimizer, itertools.repeat(rankings, 200)):
        ranked = rankings.gather(scores)
        loss = rankings.weight @ bradley_terry_loss(ranked[:, 0], ranked[:, 1])
        (gradient,) = torch.autograd.grad(loss, scores)
        with torch.no_grad():
            scores -= rate * beta**2 * gradient
        tilted = tilt(world.ref_logps, scores.detach(), beta)
        worst = max(worst, distance(policy().detach(), tilted))
    assert scores.detach().abs().max() > 0.5  # the two really went somewhere
    assert worst <= 1e-12  # 200 roundings of numbers below ten, which add up linearly at worst


def test_a_pair_with_one_winner_diverges_at_the_known_rate():
    """Property 32: on separable data the margin obeys 1 + c t <= u + e^u <= 1 + c t e^{c/2} with
    c = 2 eta beta^2; prompts of different weight give different c in one run."""
    shares = torch.logspace(-5, 0, 11, dtype=torch.float64)
    X, beta, rate = len(shares), 0.4, 10.0
    data = Rankings(torch.arange(X), torch.tensor([[0, 1]]).expand(X, 2), shares)
    generator = generator_of(1)
    ref = normal(X, 2, generator=generator, scale=1.0).log_softmax(-1)
    policy = TabularPolicy(ref)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    c = 2 * rate * beta**2 * shares

    def step_objective(batch):
        return dpo_objective(policy(), ref, batch, beta=beta)[0], {}

    for record in train(step_objective, optimizer, itertools.repeat(data, 500)):
        t = record["step"]
        if t in (1, 2, 10, 100, 500):
            g = (policy() - ref).detach()
            u = beta * (g[:, 0] - g[:, 1])
            # u is off by t roundings of numbers below 20, and e^u multiplies that by itself
            slack = 1e-12 * u.exp()
            assert (u + u.exp() >= 1 + c * t - slack).all()
            assert (u + u.exp() <= 1 + c * t * (c / 2).exp() + slack).all()
    assert u.max() > 7  # log(c t): the bracket was tested far out


@given(worlds(prompts=st.just(1), completions=st.integers(2, 6)), st.floats(0.01, 100))
def test_the_margin_of_a_single_pair_rises_at_every_step(world, rate):
    """Property 51: gradient descent on one pair raises the margin at every step, whatever the step
    size, and on a table the chosen answer never falls and the rejected never rises."""
    ref = world.ref_logps
    data = pairs((0, 1, 1.0))
    policy = TabularPolicy(world.logps)
    before = policy().detach()
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)

    def step_objective(batch):
        return dpo_objective(policy(), ref, batch, beta=world.beta)[0], {}

    for _ in train(step_objective, optimizer, itertools.repeat(data, 10)):
        after = policy().detach()
        rise = after - before
        slack = 4 * EPS * after.abs().max()  # of a log-probability: one log-softmax
        assert rise[0, 0] >= -slack and rise[0, 1] <= slack
        assert rise[0, 0] - rise[0, 1] >= -slack
        u = world.beta * ((before - ref)[0, 0] - (before - ref)[0, 1])
        pull = rate * world.beta / (1 + u.exp())
        if pull > 1e-10:  # else the step drowns in the rounding of the logits
            assert rise[0, 0] - rise[0, 1] > 0
            # exactly twice the step, but for the rounding of logits up to 100 * 5 in size
            assert (rise[0, 0] - rise[0, 1]).item() == pytest.approx(2 * pull.item(), rel=1e-9, abs=1e-12)
        before = after


# ----------------------------------------------------------------------- repeatability, and wrong trainings


def test_the_same_seed_gives_the_same_bits():
    """Property 80: world, data and training repeat bit for bit; another seed gives other numbers."""

    def run(seed):
        generator = generator_of(seed)
        world = random_bandit(3, 5, generator=generator)
        data = sample_pairs(world.rewards, 500, slate=all_sets(world.exists), generator=generator)
        logps = descend(TabularPolicy(world.ref_logps), data.normalised(), world.ref_logps, 0.5, steps=50)
        return (*data, world.rewards, logps)

    first, again, other = run(4), run(4), run(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[-1], other[-1])


@pytest.mark.parametrize(
    "mistake", ["reference ignored", "beta missing on reference", "labels swapped", "weight decay"]
)
def test_a_wrong_training_does_not_meet_the_certificate(mistake):
    """The checks can fail: four common mistakes converge, to limits known in closed form, and the
    certificate of the right objective refuses them."""
    world = random_bandit(2, 4, generator=generator_of(9))
    beta, ref = 0.5, world.ref_logps
    rankings = expected_pairs(world.rewards, all_sets(world.exists)).normalised_by_prompt()
    wrong_ref, wrong_data, wrong_limit, options = ref, rankings, None, {"momentum": 0.9, "nesterov": True}
    if mistake == "reference ignored":
        wrong_ref = torch.zeros_like(ref)
        wrong_limit = (world.rewards / beta).log_softmax(-1)
    elif mistake == "beta missing on reference":
        wrong_ref = ref / beta
        wrong_limit = (ref / beta + world.rewards / beta).log_softmax(-1)
    elif mistake == "labels swapped":
        wrong_data = rankings._replace(order=rankings.order.flip(-1))
        wrong_limit = tilt(ref, -world.rewards, beta)
    else:
        options["weight_decay"] = 0.01
    logps = descend(TabularPolicy(ref), wrong_data, wrong_ref, beta, steps=300, **options)
    if wrong_limit is not None:
        # linear convergence, to 4e-10 after 100 steps: only rounding of numbers below 20 is left
        assert distance(logps, wrong_limit) <= 1e-10
    error = distance(logps, tilt(ref, world.rewards, beta))
    bound = certify(logps, ref, rankings, beta=beta).logp_bound.max().item()
    assert error > 0.01 and bound >= error


def test_ipo_curvature_does_not_depend_on_beta():
    """Property 16 for IPO: with its safe step, plain gradient descent on a single pair jumps to the
    minimum h = 1 / (2 beta) at once, for every beta; 2 and not 4 would be needed to overshoot."""
    for beta in (0.05, 1.0, 3.0):
        ref = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
        data = pairs((0, 1, 1.0))
        logps = descend(TabularPolicy(ref), data, ref, beta, objective=ipo_objective, steps=1, momentum=0.0)
        g = (logps - ref)[0]
        # one step of rounding on a gap of 1 / (2 beta)
        assert (g[0] - g[1]).item() == pytest.approx(1 / (2 * beta), rel=1e-13)
    losses = loss_on_table(dpo_loss, logps, ref, data, beta=3.0).losses  # the same table under the other loss
    assert losses.item() == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-13)  # beta h = 1/2
