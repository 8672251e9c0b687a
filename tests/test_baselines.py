"""baselines.py: exact gradients, what a sample of them is worth, PPO, and where other aims end."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from planting import CAUGHT, plant
from strategies import worlds

from dpo_minimal import (
    InputError,
    Rankings,
    TabularPolicy,
    all_sets,
    best_of_n_logps,
    expected_pairs,
    kl_divergence,
    optimal_logps,
    random_bandit,
    reward_kl_frontier,
    rlhf_objective,
    soft_value,
)
from dpo_minimal.closed_form import log_partition
from dpo_minimal.preferences import reference_pairs
from dpo_minimal.rivals import baselines as b
from dpo_minimal.rivals.baselines import frontier_gap


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def world(X=2, Y=5, seed=0, **scales):
    """Reference, another policy and rewards, (X, Y) each."""
    generator = torch.Generator().manual_seed(seed)
    made = random_bandit(X, Y, generator=generator, **scales)
    logps = torch.randn(X, Y, generator=generator, dtype=torch.float64).log_softmax(-1)
    return made.ref_logps, logps, made.rewards


# ------------------------------------------------------------------------------------------------ gradients


@given(worlds())
def test_the_policy_gradient_is_that_of_the_objective(w):
    """[D7.3] against autograd of Eq. 3; it sums to zero, and vanishes at pi*."""
    theta = w.logps.clone().requires_grad_()
    rlhf_objective(theta.log_softmax(-1), w.ref_logps, w.rewards, beta=w.beta).sum().backward()
    found = b.policy_gradient(w.logps, w.ref_logps, w.rewards, beta=w.beta)
    scale = 1 + b.penalised_rewards(w.logps, w.ref_logps, w.rewards, beta=w.beta).abs().max()
    assert (found - theta.grad).abs().max() <= 1e-12 * scale  # rounding of the rewards, summed
    assert found.sum(-1).abs().max() <= 1e-13 * scale
    optimal = optimal_logps(w.ref_logps, w.rewards, beta=w.beta)
    at_best = b.policy_gradient(optimal, w.ref_logps, w.rewards, beta=w.beta)
    rounding = 1e-14 * (1 + w.rewards.abs().max() + w.beta * optimal.abs().max())
    assert at_best.abs().max() <= 10 * rounding


def test_the_natural_gradient_contracts_and_one_step_of_1_over_beta_arrives():
    """[D7.5]: implicit rewards minus rewards shrink by (1 - eta beta) a step, up to a constant."""
    ref, logps, rewards = world()
    beta, eta = 0.4, 0.7

    def gap(policy):
        apart = beta * (policy - ref) - rewards
        return apart - apart.mean(-1, keepdim=True)

    stepped = logps
    for t in range(1, 6):
        stepped = b.natural_gradient_step(stepped, ref, rewards, beta=beta, learning_rate=eta)
        assert (gap(stepped) - (1 - eta * beta) ** t * gap(logps)).abs().max() <= 1e-13
    arrived = b.natural_gradient_step(logps, ref, rewards, beta=beta, learning_rate=1 / beta)
    assert (arrived - optimal_logps(ref, rewards, beta=beta)).abs().max() <= 1e-13


def enumerated_variance(logps, ref, rewards, baseline, beta):
    """tr Cov of (R(y) - b)(e_y - pi), by its definition."""
    p = logps.exp()
    R = rewards - beta * (logps - ref)
    estimates = (R - baseline)[:, None] * (torch.eye(len(p)).double() - p)  # (Y, Y): one row for each y
    mean = p @ estimates
    return (p @ (estimates - mean).square()).sum()


def test_the_variance_of_one_sample_and_its_best_baseline():
    """[D7.4]: by enumeration; a parabola in b around the best one; zero at pi* with the soft value."""
    ref, logps, rewards = world(X=1)
    beta = 0.6
    best = b.best_baseline(logps, ref, rewards, beta=beta)
    lowest = b.reinforce_variance(logps, ref, rewards, best, beta=beta)
    for shift in (-2.0, 0.0, 0.5):
        found = b.reinforce_variance(logps, ref, rewards, best + shift, beta=beta)
        brute = enumerated_variance(logps[0], ref[0], rewards[0], best[0] + shift, beta)
        assert abs(found - brute) <= 1e-12
        assert abs(found - lowest - shift**2 * (1 - logps.exp().square().sum())) <= 1e-12
    both = torch.cat([logps, ref]), torch.cat([ref, ref]), torch.cat([rewards, 2 * rewards])  # two prompts
    rows = [b.reinforce_variance(*(table[x : x + 1] for table in both), best + x, beta=beta) for x in (0, 1)]
    together = b.reinforce_variance(*both, torch.cat([best, best + 1]), beta=beta)
    torch.testing.assert_close(together, torch.cat(rows), rtol=1e-13, atol=0)  # the same operations
    optimal, value = optimal_logps(ref, rewards, beta=beta), soft_value(ref, rewards, beta=beta)
    assert b.reinforce_variance(optimal, ref, rewards, value, beta=beta).abs() <= 1e-14
    without = b.reinforce_variance(optimal, ref, rewards, 0 * value, beta=beta)
    assert abs(without - value**2 * (1 - optimal.exp().square().sum())) <= 1e-13
    # E11: away from pi* the soft value may be worse than nothing.
    even = torch.full((1, 2), -math.log(2), dtype=torch.float64)
    sides = torch.tensor([[-1.0, 1.0]]).double()
    value = soft_value(even, sides, beta=1.0)
    assert b.reinforce_variance(even, even, sides, 0 * value, beta=1.0).abs() <= 1e-15
    assert b.reinforce_variance(even, even, sides, value, beta=1.0) > 0.09
    with pytest.raises(InputError, match=r"baseline must have shape \(1,\), got \(2,\)"):
        b.reinforce_variance(even, even, sides, doubles([0, 0]), beta=1.0)


def test_estimates_of_the_divergence_and_their_gradients():
    """[D7.6]: k1 and k3 have mean KL, k3 >= 0; differentiated, k1 gives 0, k2 the gradient of KL(pi||ref),
    k3 that of KL(ref||pi)."""
    ref, logps, _ = world()
    k1, _, k3 = b.kl_estimates(logps, ref)
    for estimate in (k1, k3):
        assert ((logps.exp() * estimate).sum(-1) - kl_divergence(logps, ref)).abs().max() <= 1e-13
    assert (k3 >= 0).all()
    theta = logps.clone().requires_grad_()
    policy = theta.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value.sum(), theta, retain_graph=True)[0]

    found = [gradient(logps.exp() * estimate) for estimate in b.kl_estimates(policy, ref)]
    expected = [
        torch.zeros_like(logps), gradient(kl_divergence(policy, ref)), gradient(kl_divergence(ref, policy))
    ]  # fmt: skip
    for one, other in zip(found, expected):
        assert (one - other).abs().max() <= 1e-13


# ------------------------------------------------------------------------------------------------------ PPO


def test_the_clipped_surrogate_case_by_case():
    """[D7.7]: value and slope on both sides of the clip, for both signs of the advantage."""
    old = torch.full((6,), -2.0).double()
    ratio = doubles([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    A = doubles([2.0, 2.0, 2.0, -3.0, -3.0, -3.0])
    new = (old + ratio.log()).requires_grad_()
    losses = b.clipped_surrogate(new, old, A, clip=0.2)
    expected = -doubles([1.0, 2.0, 1.2 * 2, 0.8 * -3, -3.0, -4.5])
    assert (losses - expected).abs().max() <= 1e-14  # rounding of exp(log ratio)
    slope = torch.autograd.grad(losses.sum(), new)[0]
    # d/dnew of -ratio A, and none beyond the clip where the advantage has had its way.
    assert (slope + doubles([1.0, 2.0, 0.0, 0.0, -3.0, -4.5])).abs().max() <= 1e-14


def test_gradients_flow_through_the_policy_alone():
    """Neither the old policy nor the advantages are trained by the surrogate."""
    new, old, A = (torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(3))
    b.clipped_surrogate(new, old, A, clip=0.2).sum().backward()
    assert new.grad is not None and old.grad is None and A.grad is None


def test_the_controller_moves_towards_its_target():
    """Up above the target, down below it, at most by a factor e^rate, not at all without one."""
    fixed = b.AdaptiveKL(0.3)
    fixed.update(50.0)
    assert fixed.coefficient == 0.3
    for kl, factor in (
        (4.0, math.exp(0.1)),
        (3.0, math.exp(0.05)),
        (2.0, 1),
        (1.0, math.exp(-0.05)),
        (0.0, math.exp(-0.1)),
        (40.0, math.exp(0.1)),
    ):
        controller = b.AdaptiveKL(0.3, target=2.0)
        controller.update(kl)
        assert math.isclose(controller.coefficient, 0.3 * factor, rel_tol=1e-15)
    for arguments in ((0.0,), (1.0, -1.0), (1.0, 1.0, 0.0)):
        with pytest.raises(InputError):
            b.AdaptiveKL(*arguments)
    for kl in (math.nan, math.inf):  # would stay in the coefficient for ever, also of a fixed one
        with pytest.raises(InputError, match=f"the divergence is {kl}; lower the learning rate"):
            fixed.update(kl)


def climb(beta=0.5, target=None, iterations=200, start=None, seed=0, **changes):
    ref, _, rewards = world(X=2, Y=8)
    policy = TabularPolicy(ref if start is None else start)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(iterations, 1))
    controller = b.AdaptiveKL(beta, target)
    records = list(
        b.ppo(
            policy, ref, rewards, optimizer, controller, iterations=iterations, scheduler=schedule,
            **{"samples": 256, "generator": torch.Generator().manual_seed(seed)} | changes,
        )
    )  # fmt: skip
    return policy().detach(), records, controller, ref, rewards


def test_ppo_reaches_the_closed_form():
    """[D7.7] With the true reward and a fixed coefficient: pi*, although it sees samples only.

    The noise of the samples fades as pi* comes near, so 1e-4 nats are no matter of luck; seen: 1e-6 to 1e-5.
    The reference is 1.5 nats away.
    """
    policy, records, _, ref, rewards = climb()
    optimal = optimal_logps(ref, rewards, beta=0.5)
    assert kl_divergence(ref, optimal).max() > 1
    assert kl_divergence(policy, optimal).max() <= 1e-4
    assert records[0]["kl/policy_reference"] == 0 and len(records) == 200
    assert abs(records[0]["reward"] - (ref.exp() * rewards).sum(-1).mean()) <= 1e-14


def test_advantages_are_penalised_rewards_minus_their_running_mean(monkeypatch):
    """[D7.7] Three rounds: minus the mean of the first round's samples, which each round moves by 0.3 of the
    way after its use. Both epochs see the same ones."""
    rounds, seen = [], []
    penalised, surrogate = b.penalised_rewards, b.clipped_surrogate
    monkeypatch.setattr(
        b, "penalised_rewards", lambda *a, **k: rounds.append(penalised(*a, **k)) or rounds[-1]
    )
    monkeypatch.setattr(b, "clipped_surrogate", lambda *a, **k: seen.append(a[2]) or surrogate(*a, **k))
    climb(iterations=3, samples=5, epochs=2)
    value = rounds[0].mean(-1)
    for R, *advantages in zip(rounds, seen[::2], seen[1::2]):
        for found in advantages:
            torch.testing.assert_close(found, R - value.unsqueeze(-1), rtol=0, atol=1e-14)  # rounding
        value = value + 0.3 * (R.mean(-1) - value)
    assert len(rounds) == 3 and len(seen) == 6


def test_ppo_at_the_optimum_stays_there():
    """Every advantage is zero there, whichever samples come, so nothing moves, up to rounding. (Divided by
    their deviation, they would.)"""
    ref, _, rewards = world(X=2, Y=8)
    optimal = optimal_logps(ref, rewards, beta=0.5)
    policy = TabularPolicy(optimal)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    list(b.ppo(policy, ref, rewards, optimizer, b.AdaptiveKL(0.5), iterations=20, samples=4,
               generator=torch.Generator().manual_seed(0)))  # fmt: skip
    assert (policy() - optimal).abs().max() <= 1e-13  # 80 steps of rounding


def test_ppo_meets_a_target_on_the_frontier():
    """[D7.7] The controller rests where the divergence is the target, and the policy is the optimum there."""
    policy, _, controller, ref, rewards = climb(beta=1.0, target=1.2, iterations=200)
    assert abs(kl_divergence(policy, ref).mean() - 1.2) <= 0.01  # of sampling, fading as above
    assert kl_divergence(policy, optimal_logps(ref, rewards, beta=controller.coefficient)).mean() <= 1e-3
    assert frontier_gap(policy, ref, rewards).reward_gap <= 2e-3


@pytest.mark.parametrize("bad", [[[0.0, 1.0]], torch.tensor([[1, 2, 3]])])
def test_gradients_of_what_is_no_table_are_refused(bad):
    """Fails if a list or a table of integers ends in an error of Python's or torch's own."""
    table = torch.tensor([[0.5, 0.3, 0.2]]).log()
    with pytest.raises(InputError, match="logps must"):
        b.policy_gradient(bad, table, table, beta=1.0)
    with pytest.raises(InputError, match="logps must"):
        b.natural_gradient_step(bad, table, table, beta=1.0, learning_rate=1.0)


def test_ppo_repeats_itself_and_refuses_nonsense():
    """The same seed, the same policy to the bit; another seed, another."""
    first, again, other = (climb(iterations=5, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for wrong in ({"samples": 0}, {"epochs": 0}, {"iterations": 0}, {"clip": 0.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            climb(**wrong)


# ----------------------------------------------------------------------------------------------- other aims


def test_preferred_ft_ends_at_the_law_of_winners():
    """[D10.4] With both completions drawn from the reference: 2 pi_ref E sigma, at most doubled."""
    ref, _, rewards = world()
    X, Y = ref.shape
    first, second = torch.cartesian_prod(torch.arange(Y), torch.arange(Y)).unbind(-1)
    prompt = torch.arange(X).repeat_interleave(Y * Y)
    first, second = first.repeat(X), second.repeat(X)
    chance = torch.sigmoid(rewards[prompt, first] - rewards[prompt, second])
    drawn = (ref[prompt, first] + ref[prompt, second]).exp()
    pairs = Rankings(prompt, torch.stack([first, second], -1), 2 * drawn * chance)  # each order half the time
    found = b.preferred_ft_logps(pairs, ref > -torch.inf)
    wins = torch.sigmoid(rewards[:, :, None] - rewards[:, None]) @ ref.exp()[:, :, None]
    assert (found.exp() - 2 * ref.exp() * wins[:, :, 0]).abs().max() <= 1e-14
    assert (found - ref).max() < math.log(2) and kl_divergence(found, ref).max() < math.log(2)
    # Pairs that must differ show rare completions more often than they are drawn: no such bound.
    skewed = doubles([[0.9, 0.09, 0.01]]).log()
    pairs = expected_pairs(doubles([[0.0, 0.0, 3.0]]), reference_pairs(skewed))
    assert (b.preferred_ft_logps(pairs, skewed > -torch.inf) - skewed).max() > math.log(10)


def test_unlikelihood_ends_at_its_formula_or_nowhere():
    """[D12.7] The gradient vanishes there; beyond the critical alpha it is refused by name."""
    ref, _, rewards = world()
    pairs = expected_pairs(rewards, reference_pairs(ref))

    def share(alpha):
        return b.unlikelihood_logps(pairs, ref > -torch.inf, alpha=alpha)

    assert share(0.02).logsumexp(-1).abs().max() <= 1e-14
    theta = share(0.02).clone().requires_grad_()
    chosen, rejected = pairs.gather(theta.log_softmax(-1)).unbind(-1)
    (-(pairs.weight @ (chosen - 0.02 * rejected))).backward()
    assert theta.grad.abs().max() <= 1e-15
    with pytest.raises(InputError, match=r"no optimum at alpha = 0\.9: completion"):
        share(0.9)
    for alpha in (-0.1, 1.0):
        with pytest.raises(InputError, match="alpha"):
            share(alpha)
    with pytest.raises(InputError, match="prompt 2 has no comparisons"):
        b.preferred_ft_logps(pairs, torch.ones(3, ref.shape[1], dtype=torch.bool))
    # of a ranking of three, all its pairs would count, and the second would have been chosen too
    triple = Rankings(torch.tensor([0]), torch.tensor([[0, 1, 2]]), torch.ones(1))
    with pytest.raises(InputError, match=r"pairs .*, got K = 3\.$"):
        b.preferred_ft_logps(triple, ref[:1] > -torch.inf)


def test_best_of_n_from_samples_is_the_mean_over_all_subsets():
    """[D10.3] Against every subset; n = 1 is the mean, n = m the largest; ties change nothing."""
    draws = torch.tensor([[0.3, -1.0, 2.0, 2.0, 0.1, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0, 4.0]]).double()
    for n in range(1, 7):
        subsets = torch.stack([draws[:, list(s)].amax(-1) for s in itertools.combinations(range(6), n)], -1)
        assert (b.best_of_n_reward(draws, n=n) - subsets.mean(-1)).abs().max() <= 1e-12  # lgamma's rounding
    with pytest.raises(InputError, match="at most the number of draws, 6"):
        b.best_of_n_reward(draws, n=7)


def test_best_of_n_stays_within_its_bound_and_comes_near_it():
    """[D10.3] KL <= log n - (n - 1)/n for every table; near it where no completion is likely."""
    ref, _, rewards = world(X=4, Y=12)
    for n in (1, 2, 7, 32):
        kl = kl_divergence(best_of_n_logps(ref, rewards, n=n), ref)
        bound = b.best_of_n_kl_bound(n)
        assert (kl <= bound + 1e-12).all()
        fine = torch.full((1, 500), -math.log(500), dtype=torch.float64)
        near = kl_divergence(best_of_n_logps(fine, torch.arange(500.0).double()[None], n=n), fine)
        assert bound - n / 500 <= near <= bound + 1e-9  # what atoms of 1/500 cost


# --------------------------------------------------------------------------------------------- the frontier


def test_the_gap_is_zero_on_the_frontier_and_right_below_it():
    """[D10.1] On it for every beta; below it, against a fine grid of the frontier."""
    ref, logps, rewards = world(X=3, Y=6)
    betas = (0.02, 0.3, 1.0, 8.0)
    on = frontier_gap(torch.stack([optimal_logps(ref, rewards, beta=x) for x in betas]), ref, rewards)
    assert on.reward_gap.abs().max() <= 1e-9 and on.kl_gap.abs().max() <= 1e-9  # bisection in log beta
    gap = frontier_gap(logps, ref, rewards)
    kl, reward = reward_kl_frontier(ref, rewards, torch.logspace(-3, 3, 5001).double())
    kl, reward = kl.mean(-1), reward.mean(-1)
    at_kl = reward[(kl - gap.kl).abs().argmin()] - gap.reward
    needed = kl[(reward - gap.reward).abs().argmin()]
    assert abs(gap.reward_gap - at_kl) <= 1e-3 and abs(gap.kl_gap - (gap.kl - needed)) <= 1e-3  # of the grid
    assert abs(gap.kl - kl_divergence(logps, ref).mean()) <= 1e-15


def test_the_ends_of_the_frontier():
    """At the reference there is nothing to lose; with all on the best, no more KL buys anything; a policy
    worse than the reference could have its reward for nothing."""
    ref, _, rewards = world()
    start = frontier_gap(ref, ref, rewards)
    assert start.kl == 0 and start.kl_gap == 0 and start.reward_gap.abs() <= 1e-6  # the root of the rounding
    best = torch.where(rewards == rewards.amax(-1, keepdim=True), 0.0, -torch.inf).double()
    end = frontier_gap(best, ref, rewards)
    assert end.reward_gap.abs() <= 1e-12 and end.kl_gap.abs() <= 1e-9
    # The last nats are bought at a tiny beta where two rewards nearly tie, or prompts differ in scale.
    for uneven in ([[1.0, 1 - 1e-6, 0.0], [1.0, 0.0, 0.5]], [[1.0, 0.0, 0.5], [1e-6, 0.0, 5e-7]]):
        even, first = doubles([[0.5, 0.3, 0.2]] * 2).log(), doubles([[1.0, 0.0, 0.0]] * 2).log()
        end = frontier_gap(first, even, doubles(uneven))
        assert end.reward_gap.abs() <= 1e-12 and end.kl_gap.abs() <= 1e-6  # of a curve that is nearly flat
    worst = torch.where(rewards == rewards.amin(-1, keepdim=True), 0.0, -torch.inf).double()
    below = frontier_gap(worst, ref, rewards)
    assert below.kl_gap == below.kl > 0
    for wrong in (ref[:1], ref.tolist()):
        with pytest.raises(InputError, match="logps must be a tensor"):
            frontier_gap(wrong, ref, rewards)


def test_the_gap_of_float32_tables_and_of_rewards_that_are_all_equal():
    """Tables of any dtype are reckoned in float64, to which the bisection goes. Where no completion is better
    than another, no KL buys anything and all of it is wasted; a size of 10^9 is no difference."""
    ref, logps, rewards = (table.float() for table in world(X=2, Y=4))
    tables = logps, ref, rewards
    single, double = frontier_gap(*tables), frontier_gap(*(table.double() for table in tables))
    assert all(torch.equal(one, other) and one.dtype == torch.float64 for one, other in zip(single, double))
    lower = frontier_gap(logps, ref, rewards - 8)  # only differences count
    for one, other in zip(double[2:], lower[2:]):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # of rewards that lost three bits
    on = frontier_gap(optimal_logps(ref, rewards, beta=0.5), ref, rewards - 8)
    assert abs(on.kl_gap) <= 1e-5 < 1e-2 < on.kl
    for size in (0.0, -3.0, 1e9):
        level = frontier_gap(logps, ref, torch.full_like(rewards, size))
        # the reward by the rounding of a sum of probabilities of float32
        assert level.kl_gap == level.kl > 0 and abs(level.reward_gap) <= 1e-6 * abs(size)
    with pytest.raises(InputError, match=r"^logps must [^\n]*\.$"):
        frontier_gap(logps[0], ref[0], rewards[0])


def test_ten_thousand_policies_lie_below():
    """[D10.1] No random policy, near or far, crosses the frontier by more than rounding."""
    ref, _, rewards = world(X=2, Y=6)
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-3, 1, 10_000).double()[:, None, None]
    drawn = torch.randn(10_000, 2, 6, generator=generator, dtype=torch.float64)
    tilt = 3 * torch.rand(10_000, 1, 1, generator=generator, dtype=torch.float64)
    policies = (ref + tilt * rewards + size * drawn).log_softmax(-1)
    gap = frontier_gap(policies, ref, rewards)
    assert gap.reward_gap.min() >= -1e-10 and gap.kl_gap.min() >= -1e-10
    for beta in (0.1, 1.0, 5.0):  # the dual form: reward <= beta KL + beta log Z
        ceiling = beta * gap.kl + beta * log_partition(ref, rewards, beta=beta).mean()
        reward = (policies.exp() * rewards).sum(-1).mean(-1)
        assert (reward <= ceiling + 1e-12).all()


def test_the_gap_counts_only_completions_that_exist():
    """A prompt has no third completion, whose entry among the rewards, 0, is neither best nor worst of it:
    the policy that always says the best lies on the frontier, whatever stands there."""
    ref = doubles([[0.3, 0.7, 0.0], [0.2, 0.3, 0.5]]).log()
    best = doubles([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).log()
    for entry in (0.0, -1e14, 1e14):
        rewards = doubles([[-1.0, -3.0, entry], [0.0, 1.0, 2.0]])
        gap = frontier_gap(best, ref, rewards)
        assert abs(gap.reward_gap) <= 1e-12 and abs(gap.kl_gap) <= 1e-12, entry  # bisection, to rounding


def test_reference_pairs_are_two_different_draws():
    """[D13.2] Probability proportional to the product, each prompt as likely as any other."""
    ref, _, _ = world(X=3, Y=4)
    ref[0, 3] = -torch.inf
    ref = ref.log_softmax(-1)
    slate = reference_pairs(ref)
    for x in range(3):
        mine = slate.prompt == x
        assert abs(slate.weight[mine].sum() - 1 / 3) <= 1e-15
        product = ref[x].exp()[slate.items[mine]].prod(-1)
        assert (slate.weight[mine] * 3 - product / product.sum()).abs().max() <= 1e-15
    assert len(slate.prompt) == 3 + 6 + 6
    assert torch.equal(
        reference_pairs(torch.zeros(1, 2).double().log_softmax(-1)).items,
        all_sets(torch.ones(1, 2) > 0).items,
    )
    for wrong, named in ((ref[0], "shape"), (ref + 1, "sum to one"), (torch.zeros(2, 1), "only 1")):
        with pytest.raises(InputError, match=named):
            reference_pairs(wrong)
    rare = doubles([[0.0, -800.0, -801.0]]).log_softmax(-1)  # the chance of the last two together is e^-1601
    assert reference_pairs(rare[:, [0, 1, 2]]).weight.sum() == pytest.approx(1, abs=1e-15)
    even = reference_pairs(doubles([[0.0, -800.0, -800.0]]).log_softmax(-1))  # as is that of the others
    assert even.weight.tolist() == [0.5, 0.5, 0.0]


# ------------------------------------------------------------------------------------------------- mutants


def _ppo_target():
    test_ppo_meets_a_target_on_the_frontier()


MUTANTS = {
    "no minimum": (
        b.clipped_surrogate,
        "-torch.minimum(ratio * advantages, ",
        "-(0 * ratio + ",
        test_the_clipped_surrogate_case_by_case,
    ),
    "clip on one side": (
        b.clipped_surrogate,
        "ratio.clamp(1 - clip, 1 + clip)",
        "ratio.clamp(max=1 + clip)",
        test_the_clipped_surrogate_case_by_case,
    ),
    "penalty added": (
        b.penalised_rewards,
        "rewards - beta",
        "rewards + beta",
        test_ppo_at_the_optimum_stays_there,
    ),
    "controller backwards": (
        b.AdaptiveKL.update,
        "self.rate * error",
        "-self.rate * error",
        test_the_controller_moves_towards_its_target,
    ),
    "no clip of its error": (
        b.AdaptiveKL.update,
        "min(max(kl / self.target - 1, -1.0), 1.0)",
        "kl / self.target - 1",
        test_the_controller_moves_towards_its_target,
    ),
    "baseline weighted by pi alone": (
        b.best_baseline,
        "logps.exp() * _squared_step(logps)",
        "logps.exp()",
        test_the_variance_of_one_sample_and_its_best_baseline,
    ),
    "k3 reversed": (
        b.kl_estimates,
        "torch.expm1(-ratio) + ratio",
        "torch.expm1(ratio) - ratio",
        test_estimates_of_the_divergence_and_their_gradients,
    ),
    "alpha forgotten below": (
        b.unlikelihood_logps,
        "/ (1 - alpha)",
        "",
        test_unlikelihood_ends_at_its_formula_or_nowhere,
    ),
    "subsets with repetition": (
        b.best_of_n_reward,
        "torch.lgamma((i - n + 1).clamp(min=1))",
        "0 * i",
        test_best_of_n_from_samples_is_the_mean_over_all_subsets,
    ),
    "bound without its second term": (
        b.best_of_n_kl_bound,
        " - (n - 1) / n",
        "",
        test_best_of_n_stays_within_its_bound_and_comes_near_it,
    ),
    "step without beta": (
        b.natural_gradient_step,
        "beta=beta)",
        "beta=1.0)",
        test_the_natural_gradient_contracts_and_one_step_of_1_over_beta_arrives,
    ),
    "pairs all alike": (
        reference_pairs,
        "(logs - most[pairs.prompt])",
        "(0 * logs)",
        test_reference_pairs_are_two_different_draws,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name, monkeypatch):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
