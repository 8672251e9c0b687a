"""Divergences other than the reverse KL: optimum, loss, value and certificate, each by a second way.

f and its derivatives are written out again here, in u and in plain Python; brute force, autograd, central
differences and gradient steps are the other ways.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import CAUGHT, plant
from strategies import generators, normal, worlds
from torch import Tensor

from dpo_minimal import (
    InputError,
    TabularPolicy,
    all_sets,
    certify,
    divergence_dpo_loss,
    divergence_optimal_logps,
    dpo_loss,
    expected_pairs,
    optimal_logps,
    reward_kl_frontier,
    soft_value,
)
from dpo_minimal.bandit import mean_on_table
from dpo_minimal.laws import divergences as laws
from dpo_minimal.laws.divergences import (
    certify_divergence,
    divergence_frontier,
    divergence_objective,
    divergence_value,
)
from dpo_minimal.zoo import LOSSES
from dpo_minimal.zoo import divergences as zoo

EPS = torch.finfo(torch.float64).eps
few = settings(max_examples=8)

# f(u), f'(u) and u f''(u), with f(1) = f'(1) = 0.
BY_HAND = {
    "reverse_kl": (lambda u: u * math.log(u) - u + 1, lambda u: math.log(u), lambda u: 1.0),
    "forward_kl": (lambda u: u - 1 - math.log(u), lambda u: 1 - 1 / u, lambda u: 1 / u),
    "jensen_shannon": (
        lambda u: u * math.log(u) - (1 + u) * math.log((1 + u) / 2),
        lambda u: math.log(2 * u / (1 + u)),
        lambda u: 1 / (1 + u),
    ),
    "chi2_kl": (
        lambda u: (u - 1) ** 2 / 2 + u * math.log(u) - u + 1,
        lambda u: u - 1 + math.log(u),
        lambda u: u + 1,
    ),
}
NAMES = {  # of a test's parameter: the arguments
    **{name: {"divergence": name} for name in BY_HAND},
    "half": {"divergence": "alpha", "alpha": 0.5},
    "nearly reverse": {"divergence": "alpha", "alpha": 1e-3},
    "nearly forward": {"divergence": "alpha", "alpha": 0.9},
}
RECORDS = {  # of --loss-type: its divergence
    "forward_kl": "forward_kl",
    "jensen_shannon": "jensen_shannon",
    "alpha_divergence": "alpha",
    "chi2_kl": "chi2_kl",
}
each = pytest.mark.parametrize("name", NAMES)


def formulas(divergence: str, alpha: float | None = None):
    """(f, f', u f'') as functions of u."""
    if divergence != "alpha":
        return BY_HAND[divergence]
    return (
        lambda u: (u - 1 - (u ** (1 - alpha) - 1) / (1 - alpha)) / alpha,
        lambda u: (1 - u**-alpha) / alpha,
        lambda u: u**-alpha,
    )


def pair_by_hand(divergence: str, ratios: list[float], beta: float, alpha: float | None = None):
    """Loss, rewards and pulls of one pair of log-ratios; what is beyond e^44 is held there."""
    _, score, slope = formulas(divergence, alpha)
    power = {"forward_kl": 1.0, "alpha": alpha}.get(divergence)
    low = -44 / power if power else -math.inf
    held = [max(low, min(44.0, x)) if divergence == "chi2_kl" else max(low, x) for x in ratios]
    rewards = [beta * score(math.exp(x)) for x in held]
    margin = rewards[0] - rewards[1]
    loss = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
    pull = beta * (math.exp(min(-margin, 0.0)) / (1 + math.exp(-abs(margin))))
    return loss, rewards, [pull * slope(math.exp(x)) * (x == y) for x, y in zip(held, ratios)]


def elementwise(function, table: Tensor) -> Tensor:
    return torch.tensor([function(v) for v in table.flatten().tolist()], dtype=torch.float64).view(
        table.shape
    )


def f64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


WORLD_REF, WORLD_REWARDS, WORLD_BETA = f64([0.5, 0.3, 0.2]).log(), f64([0.0, 1.0, 2.0]), 0.5


# ------------------------------------------------------------------------------------------------ the optimum


@each
def test_the_optimum_by_brute_force(name):
    """[D11.11] On all policies of three completions with probabilities that are multiples of 1/400."""
    f, *_ = formulas(**NAMES[name])
    value = elementwise(f, torch.arange(1, 400).double()[:, None] / 400 / WORLD_REF.exp())  # (399, 3) f(u)
    i, j = torch.cartesian_prod(torch.arange(1, 400), torch.arange(1, 400)).T
    i, j = i[i + j < 400], j[i + j < 400]
    counts = torch.stack([i, j, 400 - i - j], -1)
    penalty = (WORLD_REF.exp() * value.gather(0, counts - 1)).sum(-1)
    best = counts[(counts.double() / 400 @ WORLD_REWARDS - WORLD_BETA * penalty).argmax()] / 400
    found = divergence_optimal_logps(WORLD_REF, WORLD_REWARDS, beta=WORLD_BETA, **NAMES[name]).exp()
    assert (found - best).abs().max() < 2 / 400  # the best point of a grid may be one step off in each


def check_first_order(world, name: str) -> None:
    _, score, slope = formulas(**NAMES[name])
    logps = divergence_optimal_logps(world.ref_logps, world.rewards, beta=world.beta, **NAMES[name])
    assert logps.logsumexp(-1).abs().max() <= 16 * EPS * (1 + logps.abs().max())
    x = logps - world.ref_logps
    u = x.exp()
    scores = world.beta * elementwise(score, u)
    apart = (scores - world.rewards) - (scores - world.rewards).mean(-1, keepdim=True)
    # log pi is right to a few roundoffs of its size; scores move by beta u f'' times that
    size = 1 + world.ref_logps.abs().max() + logps.abs().max()
    tolerance = 32 * EPS * (size * (world.beta * elementwise(slope, u)).amax(-1, keepdim=True) + 12)
    if name == "nearly reverse":  # 1 - u^-alpha by hand loses what is divided by alpha
        tolerance = tolerance + 8 * EPS * world.beta / 1e-3
    assert (apart.abs() <= tolerance).all()


@each
@few
@given(worlds(scale=2.0))
def test_scores_differ_as_rewards_do(name, world):
    """[D11.11] First-order conditions: beta f'(u) - r is the same for all completions of a prompt."""
    check_first_order(world, name)


@each
@few
@given(worlds(scale=2.0))
def test_no_policy_is_better(name, world):
    """[D11.11] Not one drawn at random, and none beside the optimum."""
    options = {"beta": world.beta, **NAMES[name]}
    best = divergence_optimal_logps(world.ref_logps, world.rewards, **options)

    def value(logps: Tensor) -> Tensor:
        table = logps.log_softmax(-1)
        return divergence_objective(table, *(t.expand_as(table) for t in world[:2]), **options)

    noise = normal(60, *best.shape, generator=world.generator, scale=1.0)
    size = 10 ** torch.linspace(-4, 1, 60).double()[:, None, None]
    others = torch.cat([best + size * noise, world.logps[None]])
    # rounding of sums of rewards below 10 and of a divergence that may be large for chi2_kl
    slack = 64 * EPS * (12 + world.beta * divergence_value(best, world.ref_logps, **NAMES[name]) + world.beta)
    if NAMES[name].get("alpha"):
        slack = slack + 8 * EPS * world.beta / 1e-3
    assert (value(others) <= value(best) + slack).all()


def test_the_reverse_kl_is_the_closed_form_and_alpha_joins_both_kl():
    """[D11.11] alpha = 0 and 1 are the two KL; between them and beside them nothing jumps."""
    ref, r = (normal(3, 6, generator=torch.Generator().manual_seed(0), scale=s) for s in (1.0, 3.0))
    ref, beta = ref.log_softmax(-1), 0.4

    def optimum(divergence, alpha=None):
        return divergence_optimal_logps(ref, r, beta=beta, divergence=divergence, alpha=alpha)

    close = dict(rtol=0, atol=1e-12)  # thirty roundings of log-probabilities of size 50
    torch.testing.assert_close(optimum("reverse_kl"), optimal_logps(ref, r, beta=beta), **close)
    torch.testing.assert_close(optimum("alpha", 0.0), optimum("reverse_kl"), **close)
    torch.testing.assert_close(optimum("alpha", 1.0), optimum("forward_kl"), **close)
    for alpha in (1e-320, 1e-30, 1e-18, 1e-12):
        near = 1e-12 + 1e4 * alpha  # the score is off by alpha x^2 / 2, of log-ratios x below 100
        torch.testing.assert_close(optimum("alpha", alpha), optimum("reverse_kl"), rtol=0, atol=near)
    torch.testing.assert_close(optimum("alpha", 1 - 1e-9), optimum("forward_kl"), rtol=0, atol=1e-7)
    forward = optimum("forward_kl").exp()
    over = beta * ref.exp() / forward + r  # lambda = r + beta / u, of every completion
    torch.testing.assert_close(over, over[:, :1].expand_as(over), rtol=1e-12, atol=0)


@each
@settings(max_examples=2)  # of some dozen entries each
@given(worlds(prompts=st.just(1), completions=st.integers(2, 3), scale=1.0, beta=st.floats(0.2, 3.0)))
def test_gradients_are_those_of_the_implicit_function_theorem(name, world):
    """[D11.11] In reference, rewards and beta, against central differences."""
    beta = f64(world.beta).requires_grad_()
    tables = [t.clone().requires_grad_() for t in (world.ref_logps, world.rewards)]

    def optimum(theta, rewards, beta):
        return divergence_optimal_logps(theta.log_softmax(-1), rewards, beta=beta, **NAMES[name])

    # log-ratios change by up to e^4 per score under chi2_kl's relatives; differences of 1e-6 are good to 1e-8
    assert torch.autograd.gradcheck(optimum, (*tables, beta), eps=1e-6, atol=1e-5, rtol=1e-4)


@each
@few
@given(worlds(scale=2.0))
def test_the_value_falls_with_beta_as_the_divergence_says(name, world):
    """[D11.11] The envelope theorem: the derivative of max J in beta is -D, and its derivative in the rewards
    is the policy; by autograd through the optimum, whose own slope must cancel."""
    beta, rewards = f64(world.beta).requires_grad_(), world.rewards.clone().requires_grad_()
    options = {"beta": beta, **NAMES[name]}
    best = divergence_optimal_logps(world.ref_logps, rewards, **options)
    value = divergence_objective(best, world.ref_logps, rewards, **options)
    on_beta, on_rewards = torch.autograd.grad(value.sum(), (beta, rewards))
    there = divergence_value(best, world.ref_logps, **NAMES[name]).detach()
    # what cancels is multiplied by 1 / beta, and alpha's value is a difference of ones over alpha
    torch.testing.assert_close(on_beta, -there.sum(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(on_rewards, best.exp(), rtol=1e-9, atol=1e-10)
    if name == "reverse_kl":
        torch.testing.assert_close(value, soft_value(world.ref_logps, world.rewards, beta=world.beta))


@each
def test_extreme_rewards_and_ties(name):
    """[D11.11] beta from 1e-9 to 1e9, a best completion that the reference nearly never gives, all tied."""
    ref = f64([[-1e-3, -1000.0, -7.0], [-800.0, -1e-9, -30.0], [-1.0, -1.0, -1.0]]).log_softmax(-1)
    rewards = f64([[0.0, 5.0, 1.0], [3.0, -2.0, 3.0], [1.0, 1.0, 1.0]])
    for beta in (1e-9, 1e-3, 1.0, 1e9):
        logps = divergence_optimal_logps(ref, rewards, beta=beta, **NAMES[name])
        assert not logps.isnan().any() and (logps.logsumexp(-1).abs() < 1e-12).all()
        torch.testing.assert_close(logps[2], ref[2], rtol=0, atol=1e-15)
        grad = torch.autograd.functional.jacobian(
            lambda r, beta=beta: divergence_optimal_logps(ref, r, beta=beta, **NAMES[name]), rewards
        )
        assert grad.isfinite().all()
    near = divergence_optimal_logps(ref, rewards, beta=1e9, **NAMES[name])
    torch.testing.assert_close(near, ref, rtol=0, atol=1e-6)  # r / beta is 5e-9, times at most u f'' = 2


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_and_dtype(name, dtype):
    """[D11.11] A completion that is not there changes nothing and stays there; the dtype comes back."""
    ref = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]]).log().to(dtype)
    rewards = torch.tensor([[0.0, 1.0, 2.0, 9.0], [0.0, 1.0, 2.0, 0.5]]).to(dtype).requires_grad_()
    whole = divergence_optimal_logps(ref, rewards, beta=0.5, **NAMES[name])
    alone = divergence_optimal_logps(ref[0, :3], rewards[0, :3], beta=0.5, **NAMES[name])
    assert whole.dtype == dtype and whole[0, 3] == -math.inf
    assert torch.equal(whole[0, :3], alone)
    (gradient,) = torch.autograd.grad(whole[0, :3].exp()[2] + whole[1].sum(), rewards)
    assert gradient.isfinite().all() and gradient[0, 3] == 0
    exact = divergence_optimal_logps(ref.double().log_softmax(-1), rewards.double(), beta=0.5, **NAMES[name])
    torch.testing.assert_close(whole.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)  # rounded once


# --------------------------------------------------------------------------------------------------- the loss


def check_pair(name: str, pairs: Tensor, beta: float) -> None:
    """Loss, rewards and pulls of (B, 4) log-probabilities by hand, and the pulls by autograd."""
    leaf = pairs.clone().requires_grad_()
    out = divergence_dpo_loss(*leaf.unbind(-1), beta=beta, **NAMES[name])
    (gradient,) = torch.autograd.grad(out.losses.sum(), leaf)
    ratios = (pairs[:, :2] - pairs[:, 2:]).tolist()
    rows = [pair_by_hand(ratios=row, beta=beta, **NAMES[name]) for row in ratios]
    # Twenty roundoffs, of log-ratios up to 20 in exponents; those of a margin act on its exponential. By hand
    # 1 - u^-alpha is divided by alpha.
    lost = 1e-3 if name == "nearly reverse" else 1.0
    for k, (loss, rewards, pulls) in enumerate(rows):
        size = 1 + max(map(abs, rewards))
        close = dict(rel=1e-12 * size / lost, abs=1e-13 * size / lost)
        assert out.losses[k].item() == pytest.approx(loss, **close)
        assert [out.chosen_rewards[k].item(), out.rejected_rewards[k].item()] == pytest.approx(
            rewards, rel=1e-12, abs=1e-14 * beta / lost
        )
        found = [out.chosen_weights[k].item(), out.rejected_weights[k].item()]
        assert found == pytest.approx(pulls, rel=1e-12 * size / lost, abs=1e-290)
        by_autograd = f64([-found[0], found[1], found[0], -found[1]])
        # autograd has 1 + expm1(x) for e^x, right to a roundoff of 1
        torch.testing.assert_close(gradient[k], by_autograd, rtol=1e-12, atol=4 * EPS * beta)
    assert not any(field.requires_grad for field in out[1:])


@each
@few
@given(generators, st.floats(0.05, 5.0))
def test_the_loss_and_its_two_pulls_by_hand(name, generator, beta):
    """[D11.12] -log sigmoid of the difference of scores; beta sigmoid(-m) u f''(u) of either completion."""
    check_pair(name, -0.05 - normal(5, 4, generator=generator).abs(), beta)


@given(generators, st.floats(0.05, 5.0))
def test_the_loss_of_the_reverse_kl_is_dpos(generator, beta):
    """[D11.12] And alpha = 0 too; alpha = 1 is the forward KL's."""
    pairs = [-normal(7, generator=generator).abs() for _ in range(4)]
    dpo = dpo_loss(*pairs, beta=beta)
    close = dict(rtol=1e-13, atol=1e-14)  # the same differences, taken in another order
    for options in ({"divergence": "reverse_kl"}, {"divergence": "alpha", "alpha": 0.0}):
        for one, other in zip(divergence_dpo_loss(*pairs, beta=beta, **options), dpo):
            torch.testing.assert_close(one, other, **close)
    forward, alpha = ({"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 1})
    for one, other in zip(*(divergence_dpo_loss(*pairs, beta=beta, **o) for o in (forward, alpha))):
        assert torch.equal(one, other)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_would_overflow_is_held_and_does_not_pull(name, dtype):
    """[D11.12] Log-ratios of thousands, either way and on both sides: everything is finite, a weight is what
    the gradient is, and where the score is held both are exactly 0."""
    x = f64([-1e5, -1e3, -100, -44.5, -43.5, 0, 43.5, 44.5, 100, 1e3, 1e5])
    w, l = (side.to(dtype).requires_grad_() for side in torch.cartesian_prod(x, x).T.contiguous())
    reference = torch.zeros_like(w).detach()
    out = divergence_dpo_loss(w, l, reference, reference, beta=0.7, **NAMES[name])
    on_w, on_l = torch.autograd.grad(out.losses.sum(), (w, l))
    assert all(field.isfinite().all() and field.dtype == dtype for field in out)
    # Eight roundoffs of a weight; of 1 as well, as autograd has 1 + expm1(x) for e^x, in float32 at least.
    wide = torch.promote_types(dtype, torch.float32)
    close = dict(rtol=8 * torch.finfo(dtype).eps, atol=4 * torch.finfo(wide).eps)
    torch.testing.assert_close(-on_w, out.chosen_weights, **close)
    torch.testing.assert_close(on_l, out.rejected_weights, **close)
    power = {"forward_kl": 1.0, "alpha": NAMES[name].get("alpha")}.get(NAMES[name]["divergence"], 0.0)
    over = w > 44 if name == "chi2_kl" else -power * w > 44
    assert (out.chosen_weights[over] == 0).all() and (on_w[over] == 0).all()
    pulling = ~over & (out.chosen_rewards < out.rejected_rewards)  # the loss is not flat there
    slope = formulas(**NAMES[name])[2]
    expected = elementwise(lambda v: slope(math.exp(v)) if abs(v) < 700 else 0.0, w.detach().double())
    assert (out.chosen_weights[pulling & (expected > 1e-6)] > 0).all()


# ------------------------------------------------------------------------------------------------- its value


@each
@few
@given(worlds(scale=2.0))
def test_the_value_is_the_sum_over_f(name, world):
    """[D11.11] sum pi_ref f(pi / pi_ref), never negative, 0 at the reference."""
    f, *_ = formulas(**NAMES[name])
    terms = world.ref_logps.exp() * elementwise(f, (world.logps - world.ref_logps).exp())
    found = divergence_value(world.logps, world.ref_logps, **NAMES[name])
    lost = NAMES[name].get("alpha", 1.0)
    lost *= 1 - lost if lost < 1 else 1  # alpha's is a difference of ones, divided by alpha (1 - alpha)
    torch.testing.assert_close(found, terms.sum(-1), rtol=1e-11, atol=1e-13 / lost)
    assert (found >= 0).all()
    zero = divergence_value(world.ref_logps, world.ref_logps, **NAMES[name])
    assert zero.abs().max() <= 8 * EPS / lost


def test_values_of_policies_that_leave_something_out():
    """[D11.11] Limits of u f'(u) and f(u): which divergences are infinite where pi or pi_ref is 0."""
    half, one = f64([0.5, 0.5]).log(), f64([1.0, 0.0]).log()
    left_out = {name: divergence_value(one, half, **options).item() for name, options in NAMES.items()}
    added = {name: divergence_value(half, one, **options).item() for name, options in NAMES.items()}
    assert left_out["forward_kl"] == math.inf and added["reverse_kl"] == added["chi2_kl"] == math.inf
    expected = {"reverse_kl": math.log(2), "chi2_kl": math.log(2) + 0.5, "half": 4 * (1 - math.sqrt(0.5))}
    expected["jensen_shannon"] = math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2
    for name, value in expected.items():
        assert left_out[name] == pytest.approx(value, rel=1e-14), name
    for name in ("jensen_shannon", "half"):  # the same both ways
        assert added[name] == pytest.approx(left_out[name], rel=1e-14)
    assert added["forward_kl"] == pytest.approx(math.log(2))
    for options in NAMES.values():  # a padded table has gradients
        theta = f64([0.3, 0.7, 0.0]).log().requires_grad_()
        value = divergence_value(theta, f64([0.5, 0.5, 0.0]).log(), **options)
        (gradient,) = torch.autograd.grad(value, theta)
        assert gradient.isfinite().all() and gradient[2] == 0


@each
@settings(max_examples=5)  # of several prompts and betas each
@given(worlds(scale=1.0))
def test_nothing_lies_beyond_the_frontier(name, world):
    """[D11.11] Along it the reward rises with the divergence at the slope beta, and no policy has more."""
    betas = f64([4.0, 1.0, 0.25])
    tables = (world.ref_logps, world.rewards)
    value, reward = divergence_frontier(*tables, betas, **NAMES[name])
    assert value.shape == reward.shape == (3, len(world.rewards))
    slack = 1e-10  # rounding; alpha's value is a difference of ones over alpha
    steps, gains = value.diff(dim=0), reward.diff(dim=0)
    assert (steps >= -slack).all()
    assert (gains <= betas[:-1, None] * steps + 1e-9).all() and (
        gains >= betas[1:, None] * steps - 1e-9
    ).all()
    mine = divergence_value(world.logps, world.ref_logps, **NAMES[name])
    own = (world.logps.exp() * world.rewards).sum(-1)
    assert (own <= reward + betas[:, None] * (mine - value) + 1e-9).all()
    if name == "reverse_kl":
        for one, other in zip(reward_kl_frontier(*tables, betas), (value, reward)):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------- the certificate


def population(world, prompts: Tensor | None = None):
    return expected_pairs(world.rewards, all_sets(torch.ones_like(world.rewards, dtype=torch.bool)))


def check_bound(name: str, world) -> Tensor:
    """At points from very near the optimum to far from it, the distance is within the bound."""
    options = {"beta": world.beta, **NAMES[name]}
    best = divergence_optimal_logps(world.ref_logps, world.rewards, **options)
    data, ratios = population(world), []
    for power in torch.linspace(-9, 0, 10).tolist():
        noise = normal(*best.shape, generator=world.generator, scale=10**power)
        logps = (best + noise).log_softmax(-1)
        bound = certify_divergence(logps, world.ref_logps, data, **options)
        distance = (logps - best).abs().amax(-1)
        assert (distance <= bound.logp_bound).all()
        assert bound.loss_gap.isinf().equal(bound.x > 0.5)
        ratios.append((bound.logp_bound / distance)[bound.logp_bound.isfinite()])
    return torch.cat(ratios)


@each
@settings(max_examples=3)  # of ten distances each
@given(worlds(completions=st.integers(2, 5), scale=1.0, beta=st.floats(0.2, 2.0)))
def test_the_bound_covers_the_distance(name, world):
    """[D11.13]"""
    check_bound(name, world)


@each
def test_the_bound_is_not_wasteful(name):
    """[D11.13] It is finite near the optimum, and there within ten times the distance for half of the points.

    (For two completions and small steps it is the distance; for more, the worst difference of scores stands
    for all, and the worst log-ratio per score.)"""
    generator, ratios = torch.Generator().manual_seed(1), []
    for _ in range(4):
        ref, rewards, logps = (normal(2, 3, generator=generator, scale=0.7) for _ in range(3))
        world = WorldLike(ref.log_softmax(-1), rewards, logps.log_softmax(-1), 0.6, generator)
        ratios.append(check_bound(name, world))
    ratios = torch.cat(ratios)
    assert len(ratios) >= 50  # of 80: those up to a distance of some hundredths
    assert ratios.min() >= 1 and ratios.median() < 10


class WorldLike:
    def __init__(self, ref_logps, rewards, logps, beta, generator):
        self.ref_logps, self.rewards, self.logps = ref_logps, rewards, logps
        self.beta, self.generator = beta, generator


@given(worlds(scale=1.0))
def test_the_certificate_of_the_reverse_kl_is_certify(world):
    """[D11.13] The map is then the identity over beta; both add rounding of their own."""
    data = population(world)
    near = optimal_logps(world.ref_logps, world.rewards, beta=world.beta)
    near = (near + normal(*near.shape, generator=world.generator, scale=1e-3)).log_softmax(-1) + 3e-5
    ours = certify_divergence(near, world.ref_logps, data, beta=world.beta, divergence="reverse_kl")
    plain = certify(near, world.ref_logps, data, beta=world.beta)
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-12)  # the table was normalised first
    assert (ours.logp_bound >= 3e-5).all()  # it is that far from summing to one


def test_no_bound_where_the_score_would_leave_its_range():
    """[D11.13] f' of the forward KL is below 1: where D / beta reaches beyond, log u could be anything."""
    ref, rewards = f64([[0.5, 0.5]]).log(), f64([[0.0, 3.0]])
    data = expected_pairs(rewards, all_sets(torch.ones(1, 2, dtype=torch.bool)))
    for beta, finite in ((1.0, True), (0.02, False)):
        options = dict(beta=beta, divergence="forward_kl")
        best = divergence_optimal_logps(ref, rewards, **options)
        logps = (best + f64([[0.05, 0.0]])).log_softmax(-1)
        bound = certify_divergence(logps, ref, data, **options)
        assert bound.x < 0.5 and (bound.logp_bound < math.inf).item() is finite
        if not finite:
            assert bound.logp_bound == math.inf
        else:
            assert (logps - best).abs().max() <= bound.logp_bound
    with pytest.raises(InputError):  # a compared completion without probability has no score
        certify_divergence(f64([[1.0, 0.0]]).log(), ref, data, beta=1.0, divergence="forward_kl")
    one_way = data._replace(weight=data.weight * (data.order[:, 0] == 1))
    bound = certify_divergence(ref, ref, one_way, beta=1.0, divergence="forward_kl")
    assert bound.logp_bound.isinf().all()  # no minimiser


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "half", "chi2_kl"])
def test_gradient_steps_end_at_the_optimum_and_know_it(name):
    """[D11.13] From the reference, on a table with an absent completion: the distance to the closed form is
    within the certificate, which ends below a millionth of a nat, and far below what tells it from others."""
    ref = f64([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]]).log()
    rewards = f64([[0.0, 1.0, 2.0, 0.0], [1.0, 0.0, -0.5, 0.3]])
    options = {"beta": 0.5, **NAMES[name]}
    data, policy = expected_pairs(rewards, all_sets(ref > -math.inf)), TabularPolicy(ref)
    optimizer = torch.optim.LBFGS(
        policy.parameters(),
        max_iter=60,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = mean_on_table(divergence_dpo_loss, policy(), ref, data, **options)
        loss.backward()
        return loss

    optimizer.step(closure)
    logps = policy().detach()
    bound = certify_divergence(logps, ref, data, **options).logp_bound
    for other, divergence in NAMES.items():
        best = divergence_optimal_logps(ref, rewards, beta=0.5, **divergence)
        distance = torch.where(ref > -math.inf, logps - best, 0).abs().amax(-1)
        assert (distance <= bound).all() if other == name else (distance > 1e-3).all()
    assert (bound < 1e-6).all()


# ------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_sentence():
    """Unknown names are answered with the known ones; alpha only where it is used."""
    world = (WORLD_REF, WORLD_REWARDS)
    data = expected_pairs(WORLD_REWARDS[None], all_sets(torch.ones(1, 3, dtype=torch.bool)))
    for options, message in (
        ({"divergence": "kl"}, r"^divergence must be one of reverse_kl, .*chi2_kl, got 'kl'\.$"),
        ({"divergence": None}, r"^divergence must be one of .*, got None\.$"),
        ({"divergence": ["alpha"]}, r"^divergence must be one of .*\.$"),
        ({"divergence": "alpha"}, r"^divergence alpha needs alpha, in \[0, 1\]\.$"),
        ({"divergence": "chi2_kl", "alpha": 0.5}, r"^divergence chi2_kl does not use alpha; leave it out\.$"),
        ({"divergence": "alpha", "alpha": 1.5}, r"^alpha must lie in \[0, 1\], got 1\.5\.$"),
        ({"divergence": "alpha", "alpha": math.nan}, r"^alpha must be "),
        ({"divergence": "alpha", "alpha": "half"}, r"^alpha must be "),
    ):
        for call in (
            lambda o=options: divergence_optimal_logps(*world, beta=1.0, **o),
            lambda o=options: divergence_dpo_loss(*[WORLD_REF] * 4, beta=1.0, **o),
            lambda o=options: divergence_value(WORLD_REF, WORLD_REF, **o),
            lambda o=options: divergence_objective(WORLD_REF, *world, beta=1.0, **o),
            lambda o=options: divergence_frontier(*world, [1.0], **o),
            lambda o=options: certify_divergence(WORLD_REF[None], WORLD_REF[None], data, beta=1.0, **o),
        ):
            with pytest.raises(InputError, match=message):
                call()
    with pytest.raises(InputError, match="too small for these rewards"):
        divergence_optimal_logps(WORLD_REF, 1e300 * WORLD_REWARDS, beta=1e-10, divergence="chi2_kl")
    with pytest.raises(InputError, match=r"^betas must hold"):
        divergence_frontier(WORLD_REF, WORLD_REWARDS, [], divergence="chi2_kl")


# ------------------------------------------------------------------------------------------- planted mistakes


def fixed_world() -> WorldLike:
    generator = torch.Generator().manual_seed(5)
    ref, rewards, logps = (normal(2, 4, generator=generator, scale=1.0) for _ in range(3))
    return WorldLike(ref.log_softmax(-1), rewards, logps.log_softmax(-1), 0.7, generator)


PAIRS = f64([[-3.0, -1.5, -2.5, -4.0], [-0.5, -6.0, -1.0, -0.25], [-2.0, -2.0, -1.0, -3.0]])
MUTANTS = {
    "one pull for both": (
        zoo.divergence_dpo_loss, "rule.slope(x)", "rule.slope(held[0])",
        lambda: check_pair("forward_kl", PAIRS, 0.5),
    ),
    "pull without beta": (
        zoo.divergence_dpo_loss, "beta * torch.sigmoid", "torch.sigmoid",
        lambda: check_pair("jensen_shannon", PAIRS, 0.5),
    ),
    "held, but pulling": (
        zoo.divergence_dpo_loss, " * (x == free)", "",
        lambda: test_what_would_overflow_is_held_and_does_not_pull("forward_kl", torch.float64),
    ),
    "not held": (
        zoo.divergence_dpo_loss, "x.clamp(*rule.span)", "x",
        lambda: test_what_would_overflow_is_held_and_does_not_pull("chi2_kl", torch.float64),
    ),
    "absent completions among the best": (
        zoo._log_ratios, "scaled.masked_fill(ref == -math.inf, -math.inf)", "scaled",
        lambda: test_padding_and_dtype("half", torch.float64),
    ),
    "the halves exchanged": (
        zoo._log_ratios, "logsumexp(-1, keepdim=True) > 0", "logsumexp(-1, keepdim=True) < 0",
        lambda: check_first_order(fixed_world(), "chi2_kl"),
    ),
    "a derivative without the root's": (
        zoo.divergence_optimal_logps, "(share * moved).sum(-1, keepdim=True)", "0",
        lambda: test_the_value_falls_with_beta_as_the_divergence_says.hypothesis.inner_test(
            "half", fixed_world()
        ),
    ),
    "omega by one step": (
        zoo._log_omega, "range(6)", "range(1)", lambda: check_first_order(fixed_world(), "chi2_kl"),
    ),
    "the bound of one side": (
        laws.certify_divergence, "for sign in (1, -1)", "for sign in (1, 1)",
        test_no_bound_where_the_score_would_leave_its_range,
    ),
    "the bound not divided by beta": (
        laws.certify_divergence, "/ beta", "* beta", lambda: check_bound("chi2_kl", fixed_world()),
    ),
    "an infinite bound forgotten": (
        laws.certify_divergence, "reach.isnan() | moved.isinf()", "moved.isinf()",
        test_no_bound_where_the_score_would_leave_its_range,
    ),
    "a value without its square": (
        laws.divergence_value, ".sum(-1) / 2", ".sum(-1)", test_values_of_policies_that_leave_something_out,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_caught(name, monkeypatch):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()


@pytest.mark.parametrize("name", RECORDS)
def test_the_records_are_those_of_their_divergences(name):
    """[D11.12] Each record's loss is its divergence's; the frontier's figure has no place for it."""
    options = {"alpha": 0.3} if name == "alpha_divergence" else {}
    mine = LOSSES[name].function(*PAIRS.unbind(-1), beta=0.3, **options)
    other = divergence_dpo_loss(*PAIRS.unbind(-1), beta=0.3, divergence=RECORDS[name], **options)
    assert all(torch.equal(one, two) for one, two in zip(mine, other)) and not LOSSES[name].charted
