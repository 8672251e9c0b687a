"""The closed forms against sums, limits, recursions and enumerations that share no code with them."""

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import World, betas, generators, normal, worlds

from dpo_minimal.closed_form import (
    best_of_n_logps,
    canonical_reward,
    implicit_reward,
    kl_divergence,
    log_partition,
    next_token_logps,
    optimal_logps,
    reward_kl_frontier,
    rlhf_objective,
    soft_value,
)
from dpo_minimal.policy import enumerate_completions
from dpo_minimal.validation import InputError

EPS = torch.finfo(torch.float64).eps


def nats(world: World) -> float:
    """Rounding of a log-probability computed from this world: a dozen operations on numbers of this size."""
    size = world.rewards.abs().max() / world.beta + world.ref_logps.abs().max() + world.logps.abs().max()
    return 12 * EPS * (1 + size.item())


def reward_units(world: World) -> float:
    """The same for a reward."""
    return max(world.beta, 1) * nats(world)


def plain_kl(logps, other_logps):
    """sum pi log(pi / pi') as it stands, for tables with full support."""
    return (logps.exp() * (logps - other_logps)).sum(-1)


def close(actual, expected, tolerance) -> bool:
    return bool((actual - expected).abs().max() <= tolerance)


# --------------------------------------------------------------------------------- optimum and partition


@given(worlds())
def test_optimum_is_the_normalised_tilt(world):
    """Eq. 4: pi* = pi_ref e^{r / beta} / Z, and log Z, by scalar arithmetic on shifted exponents."""
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    log_z = log_partition(world.ref_logps, world.rewards, beta=world.beta)
    value = soft_value(world.ref_logps, world.rewards, beta=world.beta)
    for x, (ref, rewards) in enumerate(zip(world.ref_logps.tolist(), world.rewards.tolist())):
        top = max(rewards) / world.beta
        terms = [math.exp(p) * math.exp(r / world.beta - top) for p, r in zip(ref, rewards)]
        z = math.fsum(terms)
        # Rounding of exponents of size max|r| / beta.
        assert abs(log_z[x].item() - (math.log(z) + top)) <= nats(world)
        assert abs(value[x].item() - world.beta * (math.log(z) + top)) <= reward_units(world)
        for y, term in enumerate(terms):
            assert abs(optimum[x, y].exp().item() - term / z) <= nats(world)


@given(worlds(), st.floats(-20, 20))
def test_optimum_ignores_a_prompt_constant(world, constant):
    """Lemma 2 (property 37): r + f(x) has the same optimum, and adds f(x) to the soft value."""
    shifted = world.rewards + constant * torch.arange(1, len(world.rewards) + 1).unsqueeze(-1)
    before = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    after = optimal_logps(world.ref_logps, shifted, beta=world.beta)
    # Rounding of r + c, divided by beta, besides that of either table; c is at most 60.
    tolerance = 2 * nats(world) + 12 * EPS * 60 / world.beta
    assert close(before, after, tolerance)
    rise = soft_value(world.ref_logps, shifted, beta=world.beta) - soft_value(
        world.ref_logps, world.rewards, beta=world.beta
    )
    assert close(rise, shifted[:, 0] - world.rewards[:, 0], max(world.beta, 1) * tolerance)


@given(worlds(), st.floats(-20, 20))
def test_canonical_reward_is_a_class_constant_projection(world, constant):
    """Eq. 8 (property 38): f(f(r)) = f(r) = f(r + c)."""
    once = canonical_reward(world.rewards, world.ref_logps, beta=world.beta)
    twice = canonical_reward(once, world.ref_logps, beta=world.beta)
    shifted = canonical_reward(world.rewards + constant, world.ref_logps, beta=world.beta)
    # |f(r)| <= range(r) + beta |log pi_ref|, so both tables are of the world's size; c is at most 20.
    tolerance = 4 * reward_units(world) + 12 * EPS * 20
    assert close(twice, once, tolerance)
    assert close(shifted, once, tolerance)


@given(worlds())
def test_canonical_reward_has_partition_one(world):
    """Eq. 9 (property 39): sum_y pi_ref e^{f(r) / beta} = 1, summed directly."""
    canonical = canonical_reward(world.rewards, world.ref_logps, beta=world.beta)
    total = (world.ref_logps + canonical / world.beta).exp().sum(-1)
    # The exponents are log pi*, off by the rounding of a log-probability; so, relatively, is their sum.
    assert close(total, torch.ones_like(total), 3 * nats(world))


@given(worlds(), st.floats(-20, 20))
def test_only_one_member_of_a_class_has_partition_one(world, constant):
    """Prop. 1 (property 40): log Z of f(r) + c is c / beta, so Z = 1 forces c = 0."""
    canonical = canonical_reward(world.rewards, world.ref_logps, beta=world.beta)
    log_z = log_partition(world.ref_logps, canonical + constant, beta=world.beta)
    # Rounding of exponents of the size of r / beta and of c / beta.
    assert close(
        log_z, torch.full_like(log_z, constant / world.beta), 4 * nats(world) + 20 * EPS / world.beta
    )


@given(worlds())
def test_reward_from_its_optimum(world):
    """Eq. 5, 17 (property 41): beta log(pi* / pi_ref) + beta log Z = r; without log Z it is Eq. 8's f(r)."""
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    implied = implicit_reward(optimum, world.ref_logps, beta=world.beta)
    value = soft_value(world.ref_logps, world.rewards, beta=world.beta)
    # Rounding of log pi* and of beta log Z, in units of reward.
    assert close(implied + value.unsqueeze(-1), world.rewards, 4 * reward_units(world))
    canonical = canonical_reward(world.rewards, world.ref_logps, beta=world.beta)
    assert close(implied, canonical, 4 * reward_units(world))


# ----------------------------------------------------------------------------------------- the objective


@given(worlds())
def test_objective_is_its_sum(world):
    """Eq. 3, 11: J = sum_y pi (r - beta log(pi / pi_ref)), and Eq. 12's KL by the textbook sum."""
    summand = world.rewards - world.beta * (world.logps - world.ref_logps)
    expected = (world.logps.exp() * summand).sum(-1)
    actual = rlhf_objective(world.logps, world.ref_logps, world.rewards, beta=world.beta)
    # Rounding of a sum whose terms have the world's size.
    assert close(actual, expected, 4 * reward_units(world))
    divergence = kl_divergence(world.logps, world.ref_logps)
    assert close(divergence, plain_kl(world.logps, world.ref_logps), 4 * nats(world))


@given(worlds())
def test_soft_value_is_the_maximum(world):
    """Eq. 10, 13, 15 (properties 42, 43): J(pi) = beta log Z - beta KL(pi || pi*) <= beta log Z = J(pi*)."""
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    value = soft_value(world.ref_logps, world.rewards, beta=world.beta)
    tolerance = 6 * reward_units(world)  # rounding of two objectives and a value of the world's size
    at_optimum = rlhf_objective(optimum, world.ref_logps, world.rewards, beta=world.beta)
    assert close(at_optimum, value, tolerance)
    elsewhere = rlhf_objective(world.logps, world.ref_logps, world.rewards, beta=world.beta)
    shortfall = world.beta * plain_kl(world.logps, optimum)
    assert close(value - elsewhere, shortfall, tolerance)
    assert (elsewhere <= value + tolerance).all()


@given(worlds())
def test_objective_is_stationary_only_at_the_optimum(world):
    """Eq. 3, 4 (property 53): grad J = pi (R - E R), R = r - beta log(pi / pi_ref); zero at pi*."""

    def gradient(logits):
        logits = logits.clone().requires_grad_()
        objective = rlhf_objective(logits.log_softmax(-1), world.ref_logps, world.rewards, beta=world.beta)
        return torch.autograd.grad(objective.sum(), logits)[0]

    regularised = world.rewards - world.beta * (world.logps - world.ref_logps)
    pi = world.logps.exp()
    expected = pi * (regularised - (pi * regularised).sum(-1, keepdim=True))
    tolerance = 10 * reward_units(world)  # rounding of sums of terms of the world's size
    assert close(gradient(world.logps), expected, tolerance)
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    assert close(gradient(optimum), torch.zeros_like(optimum), tolerance)


@given(worlds())
def test_jeffreys_divergence_is_the_reward_gained(world):
    """Eq. 4 (property 44): E_pi*[r] - E_ref[r] = beta [KL(pi* || pi_ref) + KL(pi_ref || pi*)]."""
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    gained = ((optimum.exp() - world.ref_logps.exp()) * world.rewards).sum(-1)
    there, back = kl_divergence(optimum, world.ref_logps), kl_divergence(world.ref_logps, optimum)
    # Rounding of sums of terms of the world's size.
    assert close(gained, world.beta * (there + back), 6 * reward_units(world))


@given(worlds())
def test_gap_between_soft_and_hard_value(world):
    """Eq. 10 (property 45): beta log Z - E_ref[r] = beta KL(pi_ref || pi*) >= 0, and 0 for constant r."""
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    gap = soft_value(world.ref_logps, world.rewards, beta=world.beta) - (
        world.ref_logps.exp() * world.rewards
    ).sum(-1)
    tolerance = 6 * reward_units(world)  # rounding of sums of terms of the world's size
    assert close(gap, world.beta * kl_divergence(world.ref_logps, optimum), tolerance)
    assert (gap >= -tolerance).all()
    constant = world.rewards[:, :1].expand_as(world.rewards)
    flat = soft_value(world.ref_logps, constant, beta=world.beta)
    assert close(flat, constant[:, 0], tolerance)


@given(worlds())
def test_two_rounds_are_one_at_half_the_penalty(world):
    """Eq. 4 (property 48): with pi* as the next reference, two rounds at beta are one at beta / 2."""
    once = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    twice = optimal_logps(once, world.rewards, beta=world.beta)
    # Rounding of exponents up to twice the world's size.
    assert close(twice, optimal_logps(world.ref_logps, world.rewards, beta=world.beta / 2), 6 * nats(world))


@given(worlds())
def test_no_penalty_leaves_the_best_completion(world):
    """Eq. 4 (property 49): as beta -> 0, 1 - pi*(best) <= e^{-gap / beta} / pi_ref(best), and the value
    tends to max r."""
    top = world.rewards.topk(2, dim=-1)
    gap = (top.values[:, 0] - top.values[:, 1]).min().item()
    best_logp = world.ref_logps.gather(-1, top.indices[:, :1]).squeeze(-1)
    beta = max(gap, 1e-6) / (30 + best_logp.abs().max().item())
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=beta)
    missing = 1 - optimum.gather(-1, top.indices[:, :1]).exp().squeeze(-1)
    # The bound is a theorem; the slack is rounding of a probability near one.
    assert (missing <= (-gap / beta - best_logp).exp() + 1e-12).all()
    value = soft_value(world.ref_logps, world.rewards, beta=beta)
    slack = 12 * EPS * (beta + top.values[:, 0].abs() + beta * best_logp.abs())  # rounding of the value
    assert (value <= top.values[:, 0] + slack).all()
    assert (value >= top.values[:, 0] + beta * best_logp - slack).all()


@given(worlds(), st.floats(1.0, 1e12))
def test_strong_penalty_leaves_the_reference(world, beta):
    """Eq. 4 (property 49): as beta -> inf, |log pi* - log pi_ref| <= range(r) / beta, and the value tends to
    E_ref[r] within Hoeffding's range(r)^2 / (8 beta)."""
    spread = world.rewards.amax(-1) - world.rewards.amin(-1)
    optimum = optimal_logps(world.ref_logps, world.rewards, beta=beta)
    # The bound is a theorem; the slack is rounding of log-probabilities (here beta >= 1).
    slack = 12 * EPS * (1 + world.ref_logps.abs().max() + world.rewards.abs().max())
    assert ((optimum - world.ref_logps).abs().amax(-1) <= spread / beta + slack).all()
    excess = soft_value(world.ref_logps, world.rewards, beta=beta) - (
        world.ref_logps.exp() * world.rewards
    ).sum(-1)
    assert (excess >= -beta * slack).all()
    assert (excess <= spread**2 / (8 * beta) + beta * slack).all()


@given(worlds(), st.floats(0.01, 3.0))
def test_more_reward_more_probability(world, more):
    """Eq. 4 (property 50): raising r_y raises pi*(y) and lowers every other probability."""
    before = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    raised = world.rewards.clone()
    raised[:, 0] += more
    change = optimal_logps(world.ref_logps, raised, beta=world.beta) - before
    slack = 2 * nats(world)  # rounding of two log-probabilities
    assert (change[:, 0] >= -slack).all()
    assert (change[:, 1:] <= slack).all()
    # Odds are tilted by exactly more / beta: log pi*(0) - log pi*(y) rises by that.
    tilt = more / world.beta
    assert close(change[:, :1] - change[:, 1:], tilt, 3 * slack + 12 * EPS * tilt)


@given(worlds(prompts=st.just(1), beta=st.floats(0.3, 5.0)))
def test_response_of_the_optimum_to_the_reward(world):
    """Eq. 4 (property 50): d pi*_i / d r_j = (pi_i [i = j] - pi_i pi_j) / beta, by central differences."""
    ref, rewards, beta = world.ref_logps[0], world.rewards[0], world.beta
    pi = optimal_logps(ref, rewards, beta=beta).exp()
    expected = (torch.diag(pi) - torch.outer(pi, pi)) / beta
    step = 1e-5
    moved = step * torch.eye(len(pi), dtype=pi.dtype)
    up = optimal_logps(ref.expand_as(moved), rewards + moved, beta=beta).exp()
    down = optimal_logps(ref.expand_as(moved), rewards - moved, beta=beta).exp()
    # h^2 / 6 times a third derivative below 1 / beta^3, plus the rounding of pi* divided by h.
    assert close((up - down).T / (2 * step), expected, step**2 / beta**3 + nats(world) / step)


# ---------------------------------------------------------------------------------- frontier


@given(worlds(scale=1.5), st.lists(st.floats(0.1, 5.0), min_size=1, max_size=6))
def test_frontier_points_are_the_optima(world, penalties):
    """Eq. 3: each point is KL(pi* || pi_ref) and E[r] of that beta's optimum, betas a list or a tensor."""
    kl, reward = reward_kl_frontier(world.ref_logps, world.rewards, penalties)
    assert kl.shape == reward.shape == (len(penalties), len(world.rewards))
    for i, beta in enumerate(penalties):
        optimum = optimal_logps(world.ref_logps, world.rewards, beta=beta)
        # Rounding of exponents of size |r| / beta with beta >= 0.1.
        tolerance = 12 * EPS * (1 + 10 * world.rewards.abs().max() + world.ref_logps.abs().max())
        assert close(kl[i], plain_kl(optimum, world.ref_logps), tolerance)
        assert close(reward[i], (optimum.exp() * world.rewards).sum(-1), 10 * tolerance)
    again = reward_kl_frontier(world.ref_logps, world.rewards, torch.tensor(penalties, dtype=torch.float64))
    assert torch.equal(kl, again[0]) and torch.equal(reward, again[1])


@given(worlds(prompts=st.just(1), beta=st.floats(0.2, 5.0)))
def test_slope_of_the_frontier(world):
    """Eq. 3 (property 46): d E[r] / d KL = beta, with d KL / d beta = -Var(r) / beta^3 at the optimum."""
    beta, step = world.beta, 1e-5 * world.beta
    grid = torch.tensor([beta - step, beta + step], dtype=torch.float64)
    kl, reward = reward_kl_frontier(world.ref_logps, world.rewards, grid)
    (kl_low, kl_high), (reward_low, reward_high) = kl.squeeze(-1).tolist(), reward.squeeze(-1).tolist()
    # By the mean value theorem a chord's slope lies between its ends' betas; then rounding of E[r] and KL.
    rounding = 4 * reward_units(world) * (1 + beta)
    assert (
        abs((reward_high - reward_low) - beta * (kl_high - kl_low)) <= step * abs(kl_high - kl_low) + rounding
    )

    point = torch.tensor([beta], dtype=torch.float64, requires_grad=True)
    kl, reward = reward_kl_frontier(world.ref_logps, world.rewards, point)
    slope_kl, slope_reward = (
        torch.autograd.grad(out.sum(), point, retain_graph=True)[0] for out in (kl, reward)
    )
    pi = optimal_logps(world.ref_logps, world.rewards, beta=beta).exp()
    variance = (pi * (world.rewards - (pi * world.rewards).sum()) ** 2).sum()
    # Rounding of terms of size r^2 / beta^3 and below.
    size = 1 + (world.rewards.abs().max().item() / beta) ** 2
    assert abs(slope_kl.item() + variance.item() / beta**3) <= 100 * EPS * size * (1 + 1 / beta) * (1 + size)
    assert abs(slope_reward.item() - beta * slope_kl.item()) <= 100 * EPS * size * (1 + size)


@pytest.mark.parametrize("seed", range(3))
def test_no_policy_lies_above_the_frontier(seed):
    """Eq. 3 (property 47): of 10^4 policies none has more reward than the frontier at the same KL; nor more
    than beta KL + beta log Z for any beta, whose least value is reached on the frontier."""
    generator = torch.Generator().manual_seed(seed)
    ref = normal(5, generator=generator, scale=1.0).log_softmax(-1)
    rewards = normal(5, generator=generator, scale=2.0)
    count = 10_000
    # From very close to the frontier to far away.
    penalty = 10 ** (2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 0.7)
    noise = 10 ** (4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 3.5)
    logps = ref + rewards / penalty + noise * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    logps = logps.log_softmax(-1)
    kl, reward = plain_kl(logps, ref), (logps.exp() * rewards).sum(-1)

    # Bisect log beta, to 19 / 2^45: KL falls as beta rises. `low` keeps KL(low) >= the policy's.
    low, high = (
        torch.full((count,), -7.0, dtype=torch.float64),
        torch.full((count,), 12.0, dtype=torch.float64),
    )
    for _ in range(45):
        middle = (low + high) / 2
        more = reward_kl_frontier(ref, rewards, middle.exp().tolist())[0] >= kl
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    at_same_kl = reward_kl_frontier(ref, rewards, low.exp())[1]
    assert (reward <= at_same_kl + 1e-10).all()  # rounding of KL moves the frontier by beta times as much
    assert (at_same_kl - reward).min() < 1e-4  # the bound is sharp: some of these policies nearly reach it

    for beta in (0.1, 0.5, 2.0, 10.0):
        ceiling = beta * kl + soft_value(ref, rewards, beta=beta)
        assert (reward <= ceiling + 1e-12).all()  # rounding of terms below 100


# ----------------------------------------------------------------------------------------- KL divergence


def exact_kl(logps: list[float], other_logps: list[float]) -> float:
    """KL of two stored tables, each normalised exactly, with fifty digits."""
    with localcontext() as context:
        context.prec = 50
        p, q = [[Decimal(v).exp() for v in table] for table in (logps, other_logps)]
        p_total, q_total = sum(p), sum(q)
        return float(sum(a / p_total * ((a / p_total).ln() - (b / q_total).ln()) for a, b in zip(p, q)))


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("seed", range(3))
def test_divergence_of_close_policies_keeps_its_digits(distance, seed):
    """Eq. 3 (property 56): against fifty-digit arithmetic, and the second-order law d^2 Var(v) / 2."""
    generator = torch.Generator().manual_seed(seed)
    ref = normal(6, generator=generator).log_softmax(-1)
    direction = normal(6, generator=generator, scale=1.0)
    logps = (ref + distance * direction).log_softmax(-1)
    actual = kl_divergence(logps, ref).item()
    # A log-ratio near `distance` is rounded to EPS |log pi|, and d + e^-d - 1 halves the digits lost; the
    # plain sum would err by EPS / distance^2 instead.
    tolerance = 100 * EPS / distance
    assert abs(actual / exact_kl(logps.tolist(), ref.tolist()) - 1) <= tolerance + 20 * EPS
    pi = ref.exp()
    variance = (pi * (direction - (pi * direction).sum()) ** 2).sum().item()
    if distance <= 1e-2:  # the next term of the expansion is smaller by a factor of the order of distance
        assert abs(actual / (distance**2 * variance / 2) - 1) <= 3 * distance + tolerance


@given(worlds())
def test_divergence_is_positive_and_zero_on_itself(world):
    """Eq. 12: KL >= 0, exactly 0 for equal tables, whichever way round."""
    assert torch.equal(kl_divergence(world.logps, world.logps), torch.zeros(len(world.logps)).double())
    assert (kl_divergence(world.logps, world.ref_logps) > 0).all()
    assert (kl_divergence(world.ref_logps, world.logps) > 0).all()


def test_divergence_at_the_edge_of_the_support():
    """Eq. 3: 0 log 0 = 0, log 2 for half the support, +inf where pi' misses support, J = -inf there."""
    half = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    quarter = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log()
    point = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).log()
    # One rounding of log 2 in each table.
    assert abs(kl_divergence(half, quarter).item() - math.log(2)) <= 4 * EPS
    assert abs(kl_divergence(point, quarter).item() - math.log(4)) <= 4 * EPS
    assert kl_divergence(half, half).item() == 0
    assert kl_divergence(quarter, half).item() == math.inf
    assert kl_divergence(half, point).item() == math.inf
    assert rlhf_objective(quarter, half, torch.zeros(3).double(), beta=0.5).item() == -math.inf


def test_divergence_has_a_gradient_at_zero_times_log_zero():
    """Eq. 3: at pi(y) = 0 the gradient in the logits is finite and that of the others, pi (d - KL)."""
    target = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64).log()
    for missing_too in (False, True):
        other = target.clone()
        if missing_too:
            other = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64).log()
        logits = torch.tensor([1.0, -0.5, -math.inf], dtype=torch.float64, requires_grad=True)
        logps = logits.log_softmax(-1)
        divergence = kl_divergence(logps, other)
        gradient = torch.autograd.grad(divergence, logits)[0]
        p = logps.detach().exp()
        ratio = torch.where(p > 0, logps.detach() - other, 0)
        value = (p * ratio).sum()
        # Rounding of a handful of numbers of order one.
        assert close(divergence.detach(), value, 10 * EPS)
        assert close(gradient, p * (ratio - value), 10 * EPS)


@given(worlds(), st.integers(1, 3))
def test_padding_changes_nothing(world, pads):
    """Eq. 3, 4: completions to which the reference gives probability zero are as good as not there."""
    width = world.rewards.shape[-1]

    def pad(table, value):
        return torch.cat([table, torch.full((len(table), pads), value, dtype=table.dtype)], -1)

    ref, logps, rewards = (
        pad(world.ref_logps, -math.inf),
        pad(world.logps, -math.inf),
        pad(world.rewards, 1e3),
    )
    optimum = optimal_logps(ref, rewards, beta=world.beta)
    best = best_of_n_logps(ref, rewards, n=3)
    assert (optimum[:, width:] == -math.inf).all() and (best[:, width:] == -math.inf).all()
    frontier, padded_frontier = (
        torch.stack(reward_kl_frontier(*tables, [world.beta]))
        for tables in ((world.ref_logps, world.rewards), (ref, rewards))
    )
    pairs = {
        "optimum": (optimum[:, :width], optimal_logps(world.ref_logps, world.rewards, beta=world.beta)),
        "best of n": (best[:, :width], best_of_n_logps(world.ref_logps, world.rewards, n=3)),
        "canonical": (
            canonical_reward(rewards, ref, beta=world.beta)[:, :width],
            canonical_reward(world.rewards, world.ref_logps, beta=world.beta),
        ),
        "divergence": (kl_divergence(logps, ref), kl_divergence(world.logps, world.ref_logps)),
        "objective": (
            rlhf_objective(logps, ref, rewards, beta=world.beta),
            rlhf_objective(world.logps, world.ref_logps, world.rewards, beta=world.beta),
        ),
        "frontier": (padded_frontier, frontier),
    }
    for name, (padded, plain) in pairs.items():
        # Only the order of summation may differ.
        assert close(padded, plain, 4 * reward_units(world)), name


# -------------------------------------------------------------------------------------------- best of n


def enumerate_best_of_n(ref, rewards, n):
    """Every sequence of n draws, the winner uniform among the draws that tie for the best."""
    law = [0.0] * len(ref)
    for draws in itertools.product(range(len(ref)), repeat=n):
        best = max(rewards[y] for y in draws)
        winners = [y for y in draws if rewards[y] == best]
        for y in winners:
            law[y] += math.prod(ref[z] for z in draws) / len(winners)
    return law


@given(generators, st.lists(st.integers(-1, 2), min_size=2, max_size=4), st.integers(1, 4))
def test_best_of_n_is_the_enumerated_law(generator, rewards, n):
    """Best of n (property 64): all Y^n draws, ties broken uniformly among the tied draws."""
    ref = normal(len(rewards), generator=generator, scale=1.5).log_softmax(-1)
    actual = best_of_n_logps(ref, torch.tensor(rewards, dtype=torch.float64), n=n).exp()
    expected = enumerate_best_of_n(ref.exp().tolist(), rewards, n)
    # Rounding of at most 256 products, and of n log F.
    assert close(actual, torch.tensor(expected, dtype=torch.float64), 1e-13)


@given(worlds(), st.integers(1, 256), st.booleans())
def test_best_of_n_bounds(world, n, with_ties):
    """Best of n (property 64): sums to one; n = 1 is the reference; KL <= min{log n - (n-1)/n,
    -log P(best)}; it wins against the reference at most n/(n+1) of the time; it is below the frontier."""
    rewards = world.rewards.round(decimals=0) if with_ties else world.rewards
    best = best_of_n_logps(world.ref_logps, rewards, n=n)
    # log F is rounded to EPS |log pi_ref| and multiplied by n.
    tolerance = 12 * EPS * n * (1 + world.ref_logps.abs().max().item())
    assert close(best.exp().sum(-1), torch.ones(len(best)).double(), tolerance)
    assert close(best_of_n_logps(world.ref_logps, rewards, n=1), world.ref_logps, tolerance)

    kl = plain_kl(best, world.ref_logps)
    ref = world.ref_logps.exp()
    tied_for_best = rewards == rewards.amax(-1, keepdim=True)
    ceiling = (-(ref * tied_for_best).sum(-1).log()).clamp(max=math.log(n) - (n - 1) / n)
    kl_tolerance = 12 * EPS * n * (1 + best.abs().max().item())  # each log-ratio has the error above
    assert (kl <= ceiling + kl_tolerance).all()

    mine, other = rewards.unsqueeze(-1), rewards.unsqueeze(-2)
    beats = (mine > other).double() + 0.5 * (mine == other).double()
    win_rate = (best.exp() * (beats @ ref.unsqueeze(-1)).squeeze(-1)).sum(-1)
    assert (win_rate <= n / (n + 1) + tolerance).all() and (win_rate >= 0.5 - tolerance).all()

    for beta in (0.1, 1.0, 5.0):  # no policy is above beta KL + beta log Z
        frontier = beta * kl + soft_value(world.ref_logps, rewards, beta=beta)
        size = 12 * EPS * rewards.abs().max().item()  # rounding of the mean reward
        assert ((best.exp() * rewards).sum(-1) <= frontier + beta * kl_tolerance + n * size).all()


@pytest.mark.parametrize("n", [1, 2, 256, 10**6])
def test_best_of_n_keeps_small_probabilities(n):
    """Best of n (property 64): F^n - (F - p)^n of both two-valued cases, in closed form, down to 1e-12."""
    small = 1e-12
    ref = torch.tensor([math.log1p(-small), math.log(small)], dtype=torch.float64)
    rare_best = best_of_n_logps(ref, torch.tensor([0.0, 1.0]).double(), n=n)
    rare_worst = best_of_n_logps(ref, torch.tensor([1.0, 0.0]).double(), n=n)
    # Relative rounding: the log-probabilities have size up to n |log small|; 1 - small has relative error
    # EPS, which n multiplies.
    tolerance = 20 * EPS * n * abs(math.log(small))
    assert abs(rare_best[1].item() - math.log(-math.expm1(n * math.log1p(-small)))) <= tolerance
    assert abs(rare_worst[1].item() - n * math.log(small)) <= tolerance


# ----------------------------------------------------------------------------- per-token conditionals


class Tree:
    """A random prefix-free set with random conditionals, kept as {prefix: {token: log-probability}}.

    Tokens of a completion are drawn from a vocabulary; the last token ends a completion early (EOS), and not
    every token exists at every prefix.
    """

    def __init__(self, vocabulary: int, depth: int, generator: torch.Generator):
        self.children: dict[tuple, dict[int, float]] = {}
        self.leaves: list[tuple] = []
        self._grow((), vocabulary, depth, generator)

    def _grow(self, prefix, vocabulary, depth, generator):
        chosen = torch.randperm(vocabulary, generator=generator)[
            : int(torch.randint(1 if prefix else 2, vocabulary + 1, (), generator=generator))
        ].tolist()
        logps = normal(len(chosen), generator=generator, scale=1.5).log_softmax(-1).tolist()
        self.children[prefix] = dict(zip(chosen, logps))
        for token in chosen:
            longer = (*prefix, token)
            if token == vocabulary - 1 or len(longer) == depth:
                self.leaves.append(longer)
            else:
                self._grow(longer, vocabulary, depth, generator)

    def logp(self, leaf) -> float:
        return math.fsum(self.children[leaf[:t]][leaf[t]] for t in range(len(leaf)))

    def values(self, rewards: dict[tuple, float], beta: float) -> dict[tuple, float]:
        """V(h) = beta log sum_a pi_ref(a|h) e^{V(ha) / beta}, from the leaves to the root."""
        value = dict(rewards)
        for prefix in sorted(self.children, key=len, reverse=True):
            exponents = [logp + value[(*prefix, a)] / beta for a, logp in self.children[prefix].items()]
            top = max(exponents)
            value[prefix] = beta * (top + math.log(math.fsum(math.exp(e - top) for e in exponents)))
        return value

    def tensors(self, generator):
        """(completions, lengths) with random ids beyond each completion's end."""
        longest = max(map(len, self.leaves))
        completions = torch.randint(0, 9, (len(self.leaves), longest), generator=generator)
        for row, leaf in zip(completions, self.leaves):
            row[: len(leaf)] = torch.tensor(leaf)
        return completions, torch.tensor([len(leaf) for leaf in self.leaves])


trees = st.builds(Tree, st.integers(2, 3), st.integers(1, 4), generators)


@given(trees, generators, betas)
def test_conditionals_of_the_optimum_are_the_soft_q_policy(tree, generator, beta):
    """Eq. 4 (properties 66, 67): log pi*(a|h) = log pi_ref(a|h) + (V(ha) - V(h)) / beta with V by backward
    recursion; the product is pi*, V of the root is beta log Z, and token log-ratios telescope to
    (r - V_0) / beta. Variable length with EOS; two prompts over the same completions."""
    completions, lengths = tree.tensors(generator)
    ref = torch.tensor([tree.logp(leaf) for leaf in tree.leaves], dtype=torch.float64)
    rewards = normal(2, len(tree.leaves), generator=generator)
    optimum = optimal_logps(ref.expand_as(rewards), rewards, beta=beta)
    actual = next_token_logps(optimum, completions, lengths)
    reference = next_token_logps(ref, completions, lengths)
    assert actual.shape == (*rewards.shape, completions.shape[1])
    # Rounding of exponents of this size, over at most four levels.
    tolerance = 50 * EPS * (1 + (rewards.abs().max() / beta + ref.abs().max() + optimum.abs().max()).item())
    for x, row in enumerate(rewards.tolist()):
        value = tree.values(dict(zip(tree.leaves, row)), beta)
        log_z = log_partition(ref, rewards[x], beta=beta)
        assert abs(value[()] / beta - log_z.item()) <= tolerance
        for y, leaf in enumerate(tree.leaves):
            expected = [
                tree.children[leaf[:t]][leaf[t]] + (value[leaf[: t + 1]] - value[leaf[:t]]) / beta
                for t in range(len(leaf))
            ]
            for t, logp in enumerate(expected):
                assert abs(actual[x, y, t].item() - logp) <= tolerance
                assert abs(reference[y, t].item() - tree.children[leaf[:t]][leaf[t]]) <= tolerance
            assert (actual[x, y, len(leaf) :] == 0).all()
            assert abs(math.fsum(expected) - optimum[x, y].item()) <= tolerance
            telescoped = (actual[x, y] - reference[y]).sum().item()
            assert abs(telescoped - (row[y] - value[()]) / beta) <= tolerance
    assert close(actual.sum(-1), optimum, tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_tilting_by_the_hard_value_is_another_worse_policy(seed):
    """Eq. 3, 4 (property 66): V(h) = E_ref[r | h] in place of the soft value gives a policy whose objective
    falls short by beta KL to pi*, while its conditionals are normalised just as well."""
    generator, beta = torch.Generator().manual_seed(seed), 0.7
    completions, lengths = enumerate_completions(vocab_size=3, max_length=3, eos=2)
    leaves = [tuple(row[:length].tolist()) for row, length in zip(completions, lengths)]
    ref = normal(len(leaves), generator=generator, scale=1.0).log_softmax(-1)
    rewards = normal(len(leaves), generator=generator, scale=2.0)
    p, r = dict(zip(leaves, ref.exp().tolist())), dict(zip(leaves, rewards.tolist()))

    def begins(prefix):
        return [leaf for leaf in leaves if leaf[: len(prefix)] == prefix]

    def mass(prefix):
        return math.fsum(p[leaf] for leaf in begins(prefix))

    def hard_value(prefix):
        return math.fsum(p[leaf] * r[leaf] for leaf in begins(prefix)) / mass(prefix)

    def tilted(prefix):  # pi_ref(prefix's last token) e^{hard value / beta}, not yet normalised
        return mass(prefix) / mass(prefix[:-1]) * math.exp(hard_value(prefix) / beta)

    hard = []
    for leaf in leaves:
        logp = 0.0
        for t in range(len(leaf)):
            siblings = {other[: t + 1] for other in begins(leaf[:t])}
            logp += math.log(tilted(leaf[: t + 1]) / math.fsum(map(tilted, siblings)))
        hard.append(logp)
    hard = torch.tensor(hard, dtype=torch.float64)
    optimum = optimal_logps(ref, rewards, beta=beta)
    loss = soft_value(ref, rewards, beta=beta) - rlhf_objective(hard, ref, rewards, beta=beta)
    shortfall = beta * plain_kl(hard, optimum)
    assert close(loss, shortfall, 1e-12)  # rounding of numbers below 100
    # Far above rounding: the hard value misses the variance below the first token, about Var(r) / (2 beta).
    assert loss > 1e-2
    soft = next_token_logps(optimum, completions, lengths)
    assert (soft - next_token_logps(hard, completions, lengths)).abs().max() > 1e-2


# --------------------------------------------------------------------------------- dtypes and gradients

COMPLETIONS = torch.tensor([[0, 0, 7], [0, 1, 7], [1, 7, 7], [2, 0, 1], [2, 0, 2]])
LENGTHS = torch.tensor([2, 2, 1, 3, 3])
TIED = torch.tensor([[0.0, 1.0, 1.0, -1.0, 2.0], [3.0, 3.0, 3.0, -1.0, 0.0]], dtype=torch.float64)

# Each takes (X, 5) logits of the reference, rewards, and logits of a policy.
FUNCTIONS = {
    "log_partition": lambda ref, r, pi: log_partition(ref.log_softmax(-1), r, beta=0.7),
    "soft_value": lambda ref, r, pi: soft_value(ref.log_softmax(-1), r, beta=0.7),
    "optimal_logps": lambda ref, r, pi: optimal_logps(ref.log_softmax(-1), r, beta=0.7),
    "implicit_reward": lambda ref, r, pi: implicit_reward(pi.log_softmax(-1), ref.log_softmax(-1), beta=0.7),
    "canonical_reward": lambda ref, r, pi: canonical_reward(r, ref.log_softmax(-1), beta=0.7),
    "kl_divergence": lambda ref, r, pi: kl_divergence(pi.log_softmax(-1), ref.log_softmax(-1)),
    "rlhf_objective": lambda ref, r, pi: rlhf_objective(pi.log_softmax(-1), ref.log_softmax(-1), r, beta=0.7),
    "best_of_n_logps": lambda ref, r, pi: best_of_n_logps(ref.log_softmax(-1), TIED.to(ref.dtype), n=3),
    "reward_kl_frontier": lambda ref, r, pi: torch.stack(
        reward_kl_frontier(ref.log_softmax(-1), r, [0.5, 1.5])
    ),
    "next_token_logps": lambda ref, r, pi: next_token_logps(pi.log_softmax(-1), COMPLETIONS, LENGTHS),
}
USED = {
    "implicit_reward": (0, 2),
    "kl_divergence": (0, 2),
    "rlhf_objective": (0, 1, 2),
    "best_of_n_logps": (0,),
}
USED["next_token_logps"] = (2,)


def tables(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [normal(2, 5, generator=generator, scale=1.0).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_is_that_of_central_differences(name):
    """Eq. 3-5, 8 (property 14): autograd's gradient in every table against central differences."""
    arguments = tables()
    for i in USED.get(name, (0, 1)):
        arguments[i].requires_grad_()
    # Error h^2 / 6 times a third derivative below 1 / 0.5^3 times rewards, plus EPS / h: both below 1e-9.
    assert torch.autograd.gradcheck(FUNCTIONS[name], arguments, eps=1e-5, atol=1e-8, rtol=1e-8)


PADDED = [
    "log_partition",
    "soft_value",
    "optimal_logps",
    "canonical_reward",
    "kl_divergence",
    "rlhf_objective",
]


@pytest.mark.parametrize("name", [*PADDED, "best_of_n_logps", "reward_kl_frontier"])
def test_gradient_survives_padding(name):
    """Eq. 3, 4: where the reference (and the policy) gives a completion probability zero, the gradient in the
    tables is finite, zero for that completion and otherwise that of the table without it."""
    gradients = []
    for pad in (True, False):
        ref, rewards, pi = tables()
        if pad:
            ref[:, -1], pi[:, -1] = -math.inf, -math.inf
        else:
            ref, rewards, pi = ref[:, :-1], rewards[:, :-1], pi[:, :-1]
        arguments = [table.clone().requires_grad_() for table in (ref, rewards, pi)]
        if name == "best_of_n_logps":
            output = best_of_n_logps(arguments[0].log_softmax(-1), TIED[:, : ref.shape[-1]], n=3)
        else:
            output = FUNCTIONS[name](*arguments)
        # Of the real completions only; each entry counts differently, so that nothing cancels.
        if name in ("optimal_logps", "canonical_reward", "best_of_n_logps"):
            output = output[:, :4] * torch.arange(1, 5)
        used = [arguments[i] for i in USED.get(name, (0, 1))]
        gradients.append(torch.autograd.grad(output.sum(), used))
    for padded, plain in zip(*gradients):
        assert (padded[:, -1] == 0).all()
        assert close(padded[:, :4], plain, 1e-13)  # rounding of numbers below 100


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_kept_and_accurate(name, dtype):
    """Eq. 3-5, 8 (property 75): the result has the input's dtype and float64's value to its precision."""
    narrow = [table.log_softmax(-1) if i != 1 else table for i, table in enumerate(tables(dtype))]
    actual = FUNCTIONS[name](*narrow)
    assert actual.dtype == dtype
    expected = FUNCTIONS[name](*[table.double() for table in narrow])
    # A dozen roundings of numbers no larger than about ten.
    assert close(actual.double(), expected, 12 * torch.finfo(dtype).eps * 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_best_of_many_sums_to_one(dtype):
    """Property 64: the n-th power magnifies what the reference lacks to one; the result still sums to one."""
    generator = torch.Generator().manual_seed(1)
    ref = normal(1000, generator=generator).log_softmax(-1).to(dtype)
    rewards = normal(1000, generator=generator).to(dtype)
    logps = best_of_n_logps(ref, rewards, n=100_000)
    # a thousand roundings of the output dtype, which cancel like their square root
    assert abs(logps.double().exp().sum() - 1) <= 32 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [([[0, 0], [0, 1], [1, 0]], [1, 2, 2]), ([[0, 1], [0, 1], [1, 0]], [2, 2, 2])],
    ids=["one begins another", "one twice"],
)
def test_conditionals_need_a_prefix_free_set(ids, lengths):
    """Eq. 4 (property 66): where one completion begins another its prefix would count both."""
    logps = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    with pytest.raises(InputError, match="prefix-free"):
        next_token_logps(logps, torch.tensor(ids), torch.tensor(lengths))


def test_an_overflowing_tilt_is_refused():
    """Eq. 4: r / beta beyond the dtype would make pi* NaN."""
    table = torch.tensor([0.5, 0.5]).log()
    with pytest.raises(InputError, match="beta"):
        optimal_logps(table, torch.tensor([1.0, -1.0]), beta=1e-40)
