"""Preferences without a reward: the equilibrium, its certificate, what reaches it, and the test of fit."""

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import CAUGHT, plant
from strategies import generators, normal
from torch import Tensor

from dpo_minimal.__main__ import main
from dpo_minimal.bandit import TabularPolicy, dpo_objective
from dpo_minimal.certificates import maximum_likelihood
from dpo_minimal.closed_form import kl_divergence, optimal_logps
from dpo_minimal.experiments.bandit import convergence, ranking, tables
from dpo_minimal.experiments.bandit.fit import float64_table
from dpo_minimal.laws import games
from dpo_minimal.laws.finite_data import goodness_of_fit, strongest_cycles
from dpo_minimal.policy import EnumeratedPolicy, enumerate_completions
from dpo_minimal.preferences import tally
from dpo_minimal.train import train
from dpo_minimal.validation import InputError


def exact(*numbers) -> Tensor:
    """In float64 from the start."""
    return torch.tensor(numbers, dtype=torch.float64)


CYCLE = exact([0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5])
PARTLY = exact([0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5])
SKEWED = exact(0.7, 0.2, 0.1).log()  # a reference


def drawn(generator, *shape: int, scale: float = 2.0) -> Tensor:
    """Preferences (..., Y, Y) without any reward behind them, some of them all but certain."""
    noise = normal(*shape, shape[-1], generator=generator, scale=scale)
    return torch.sigmoid(noise - noise.mT)


@st.composite
def played(draw):
    """Preferences, a reference, an unrelated policy, beta."""
    generator, shape = draw(generators), (draw(st.integers(1, 3)), draw(st.integers(2, 8)))
    policies = (normal(*shape, generator=generator).log_softmax(-1) for _ in range(2))
    return drawn(generator, *shape), *policies, draw(st.sampled_from([1e-3, 1e-2, 0.05, 0.3, 1.0, 20.0]))


# -------------------------------------------------------------------------------- equilibrium and certificate


def by_scan(P: Tensor, ref: Tensor, beta: float, *, size: int = 200) -> tuple[Tensor, float]:
    """Of a grid on the simplex of three, the policy from which the best answer of either player gains least:
    J is maximised and minimised over the same grid, no closed form is used."""
    corners = torch.tensor([(i, j) for i in range(1, size) for j in range(1, size - i)]).double() / size
    grid = torch.cat([corners, 1 - corners.sum(-1, keepdim=True)], -1)
    penalty = beta * (grid * (grid.log() - ref)).sum(-1)
    some = grid[:: max(1, len(grid) // 1500)]
    own = beta * (some * (some.log() - ref)).sum(-1)
    best = ((some @ P) @ grid.T - own[:, None]).amax(0) + penalty  # max over pi of J(pi, grid)
    return grid[best.argmin()], best.min().item()


@pytest.mark.parametrize("P", [CYCLE, PARTLY], ids=["cycle", "partly"])
def test_the_equilibrium_by_a_scan_of_the_simplex(P):
    """[D11.14] min over opponents of max over policies is attained there, and the value is one half: fails if
    the game's sign or rows and columns are exchanged, or beta is in the wrong place."""
    ref = exact(0.6, 0.3, 0.1).log()
    for beta in (0.05, 0.3):
        star, value = by_scan(P, ref, beta)
        logps, _ = games.regularised_equilibrium(P, ref, beta=beta)
        # the grid has steps of 1/200, the maximum is over 1,500 of its points: measured 0.008 at most
        assert (logps.exp() - star).abs().max() < 0.015
        assert value == pytest.approx(0.5, abs=5e-3)


@given(played())
def test_the_certificate_holds_and_the_equilibrium_is_its_own_best_response(game):
    """[D11.14] The gap is never negative, bounds the divergence of any policy, as the plain formula of both
    players' gains says; Newton's end is a fixed point; its own bound includes rounding."""
    P, ref, logps, beta = game
    star, own = games.regularised_equilibrium(P, ref, beta=beta)
    response = (ref + (P @ star.exp().unsqueeze(-1)).squeeze(-1) / beta).log_softmax(-1)
    # rounding of P pi / beta; a wrong fixed point is off by nats
    torch.testing.assert_close(star, response, rtol=0, atol=1e-14 * (20 + 1 / beta))
    assert (own >= 0).all() and (own / (2 * beta) < 1e-15).all()
    gap = games.duality_gap(P, logps, ref, beta=beta)
    against = (P @ logps.exp().unsqueeze(-1)).squeeze(-1)
    plain = beta * ((ref + against / beta).logsumexp(-1) + kl_divergence(logps, ref))
    torch.testing.assert_close(gap, 2 * plain - 1, rtol=1e-10, atol=1e-12)  # log Z and KL round by 1e-14
    for policy in (logps, (star + 1e-4 * logps).log_softmax(-1)):  # far, and near
        bound = games.duality_gap(P, policy, ref, beta=beta) / (2 * beta)
        assert (kl_divergence(policy, star) <= bound * (1 + 1e-9) + own / (2 * beta)).all()


def test_the_certificate_is_sharp_where_the_game_decides_nothing():
    """[D11.14] Of even preferences pi* is pi_ref, the gap is 2 beta KL(pi || pi_ref), and the bound is the
    divergence itself: a gap without its factor 2 falls below."""
    ref, logps = (exact(*p).log() for p in ([0.7, 0.2, 0.1], [0.2, 0.3, 0.5]))
    gap = games.duality_gap(torch.full((3, 3), 0.5).double(), logps, ref, beta=0.3)
    assert gap.item() == pytest.approx(0.6 * kl_divergence(logps, ref).item(), rel=1e-13)


@given(played())
def test_linear_in_a_reward_gives_the_closed_form(game):
    """[D11.14] P = 1/2 + c (r_i - r_j) has the equilibrium pi_ref e^(c r / beta) / Z."""
    _, ref, rewards, beta = game
    rewards = rewards.clamp(min=-8)
    c = 0.4 / (rewards.amax() - rewards.amin() + 1)
    P = 0.5 + c * (rewards.unsqueeze(-1) - rewards.unsqueeze(-2))
    star, _ = games.regularised_equilibrium(P, ref, beta=beta)
    closed = optimal_logps(ref, c * rewards, beta=beta)
    torch.testing.assert_close(star, closed, rtol=0, atol=1e-14 * (20 + 1 / beta))


def test_rock_paper_scissors_by_symmetry():
    """[D11.14] A uniform reference stays for every beta; shifted roles shift the equilibrium along; paper,
    which beats the common rock, becomes the commonest: which player wins is not exchanged."""
    even = torch.zeros(3).double().log_softmax(-1)
    ref = SKEWED
    for beta in (1e-3, 0.1, 3.0):
        star = games.regularised_equilibrium(CYCLE, even, beta=beta)[0]
        torch.testing.assert_close(star, even, rtol=0, atol=1e-13 / beta)  # rounding of P pi / beta
        first = games.regularised_equilibrium(CYCLE, ref, beta=beta)[0]
        shifted = games.regularised_equilibrium(CYCLE, ref.roll(1), beta=beta)[0]
        torch.testing.assert_close(shifted, first.roll(1), rtol=0, atol=1e-13 * (10 + 1 / beta))
    assert games.regularised_equilibrium(CYCLE, ref, beta=0.1)[0].argmax() == 1


def test_prompts_are_solved_alone_and_absent_completions_stay_absent():
    """[D11.15] A batch gives what each row gives; a table padded with log 0 what the smaller table gives."""
    generator = torch.Generator().manual_seed(3)
    P, ref = drawn(generator, 2, 3, 5), normal(2, 3, 5, generator=generator).log_softmax(-1)
    ref[1, 2, 3:] = -math.inf
    ref = ref.log_softmax(-1)
    logps, gap = games.regularised_equilibrium(P, ref, beta=0.02)
    assert gap.shape == (2, 3) and logps.dtype == torch.float64
    for a, b in itertools.product(range(2), range(3)):
        size = 3 if (a, b) == (1, 2) else 5
        alone, _ = games.regularised_equilibrium(P[a, b, :size, :size], ref[a, b, :size], beta=0.02)
        torch.testing.assert_close(logps[a, b, :size], alone, rtol=0, atol=1e-11)  # rounding over beta
    assert (logps[1, 2, 3:] == -math.inf).all()


@pytest.mark.parametrize("Y", [3, 6, 30])
def test_small_beta_gives_the_von_neumann_winner(Y):
    """[D11.15] By linear programming where scipy is there, and for three by its closed form: the share of
    each is the margin between the two others."""
    generator = torch.Generator().manual_seed(Y)
    P = drawn(generator, Y) if Y > 3 else PARTLY
    winner = games.von_neumann_winner(P).exp()
    assert (P @ winner).max() <= 0.5 + 1e-6 * math.log(Y)
    if Y == 3:
        shares = torch.stack([PARTLY[1, 2], PARTLY[2, 0], PARTLY[0, 1]]) - 0.5
        torch.testing.assert_close(winner, shares / shares.sum(), rtol=0, atol=1e-5)  # beta = 1e-6
    optimize = pytest.importorskip("scipy.optimize")
    # max v with (x'P)_j >= v for all j: a game without ties of this kind has one solution
    found = optimize.linprog(
        [0.0] * Y + [-1.0], A_ub=torch.cat([-P.T, torch.ones(Y, 1)], 1).numpy(), b_ub=[0.0] * Y,
        A_eq=[[1.0] * Y + [0.0]], b_eq=[1.0], bounds=[(0, None)] * Y + [(None, None)],
    )  # fmt: skip
    assert -found.fun == pytest.approx(0.5, abs=1e-9)
    torch.testing.assert_close(winner, torch.tensor(found.x[:Y]), rtol=0, atol=1e-3)  # conditioning / beta


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"preferences": CYCLE + 0.1}, "P + P'"),
        ({"preferences": CYCLE[:2]}, "P + P'"),
        ({"preferences": 3 * CYCLE - 1}, "P + P'"),
        ({"preferences": CYCLE * math.nan}, "finite"),
        ({"preferences": torch.full((4, 4), 0.5)}, "shape"),
        ({"ref_logps": torch.zeros(3)}, "sum to one"),
        ({"beta": 0.0}, "beta"),
        ({"beta": 1e-12}, "too small"),
    ],
)
def test_bad_input_is_refused(wrong, told):
    """One sentence that says what is wrong."""
    good = {"preferences": CYCLE, "ref_logps": torch.tensor([0.7, 0.2, 0.1]).log(), "beta": 0.1}
    games.regularised_equilibrium(**good)
    with pytest.raises(InputError, match=told.replace("+", r"\+")):
        games.regularised_equilibrium(**good | wrong)


@pytest.mark.parametrize("table", [torch.tensor(0.5), torch.zeros(0, 3, 3), torch.full((3,), 0.5)])
def test_what_is_no_table_of_pairs_is_refused(table):
    """By every function that takes preferences alone."""
    for function in (games.von_neumann_winner, games.borda_scores, games.copeland_scores):
        with pytest.raises(InputError, match=r"preferences must be a (non-empty )?table"):
            function(table)


# ------------------------------------------------------------------------------------------- what reaches it


@given(played(), st.floats(0.01, 1.0))
def test_mirror_descent_contracts_as_proved(game, share):
    """[D11.16] Every step of at most 4 beta / (1 + 4 beta^2), from any policy."""
    P, ref, logps, beta = game
    star, _ = games.regularised_equilibrium(P, ref, beta=beta)
    step = share * 4 * beta / (1 + 4 * beta**2)
    for _ in range(3):
        after = games.nash_md_step(P, logps, ref, beta=beta, step=step)
        before, now = kl_divergence(star, logps), kl_divergence(star, after)
        assert (now <= (1 - step * beta) * before * (1 + 1e-9) + 1e-12).all()  # slack: rounding
        logps = after
    response = games.best_response(P, logps, ref, beta=beta)
    full = games.nash_md_step(P, logps, ref, beta=beta, step=1 / beta)
    torch.testing.assert_close(full, response, rtol=0, atol=1e-13 * (20 + 1 / beta))


def nash_md_by_hand(P, logps, ref, beta, step):
    """Munos et al. (2023), eq. 5: the opponent is the mixture, from which the step is taken."""
    mixture = ((1 - step * beta) * logps + step * beta * ref).log_softmax(-1)
    return mixture, (mixture + step * (P @ mixture.exp())).log_softmax(-1)


def test_the_mixtures_of_nash_md_take_these_steps():
    """[D11.16] and its policies end elsewhere: at the best response to what the mixtures end at."""
    ref = SKEWED
    step, beta = 0.5, 0.2
    logps, own_beta = ref, beta * (1 - step * beta)
    mixed = ref
    for _ in range(600):
        mixture, logps = nash_md_by_hand(CYCLE, logps, ref, own_beta, step * beta / own_beta)
        torch.testing.assert_close(mixture, mixed, rtol=0, atol=1e-10)  # rounding of 600 steps
        mixed = games.nash_md_step(CYCLE, mixed, ref, beta=beta, step=step)
    star, _ = games.regularised_equilibrium(CYCLE, ref, beta=beta)
    torch.testing.assert_close(mixture, star, rtol=0, atol=1e-10)
    assert (logps - star).abs().max() > 0.01
    torch.testing.assert_close(logps, games.best_response(CYCLE, star, ref, beta=own_beta), rtol=0, atol=1e-9)


@given(played())
def test_both_objectives_have_the_gradient_of_self_play(game):
    """[D11.16] In the logits: beta pi (h - mean h - (P pi - 1/2) / beta), IPO's 2 / beta times that."""
    P, ref, logps, beta = game
    X = len(ref)
    theta = logps.clone().requires_grad_()
    plain = games.self_play_objective(theta.log_softmax(-1), ref, P, beta=beta)
    ipo = games.online_ipo_objective(theta.log_softmax(-1), ref, P, beta=beta)
    (one,), (two,) = (torch.autograd.grad(value, theta) for value in (plain, ipo))
    pi, h = logps.exp(), logps - ref
    surplus = (P @ pi.unsqueeze(-1)).squeeze(-1) - 0.5
    by_hand = pi * (beta * (h - (pi * h).sum(-1, keepdim=True)) - surplus) / X
    torch.testing.assert_close(one, by_hand, rtol=1e-10, atol=1e-12 * (1 + beta))
    torch.testing.assert_close(two, 2 / beta * by_hand, rtol=1e-10, atol=1e-11 * (1 + 1 / beta))


@pytest.mark.parametrize("way", ["nash_md", "online_ipo"])
def test_a_table_ends_at_the_equilibrium(way):
    """[D11.16] Gradient descent on logits, from the reference, on three prompts."""
    generator = torch.Generator().manual_seed(1)
    P, ref, beta = drawn(generator, 3, 4, scale=0.5), normal(3, 4, generator=generator, scale=0.7), 0.3
    ref = ref.log_softmax(-1)
    star, _ = games.regularised_equilibrium(P, ref, beta=beta)
    policy = TabularPolicy(ref)
    objective = games.online_ipo_objective if way == "online_ipo" else games.self_play_objective
    rate = 3.0 if way == "online_ipo" else 3.0 * 2 / beta  # of the mean over three prompts
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate, momentum=0.5)
    for _ in train(
        lambda _: (objective(policy(), ref, P, beta=beta), {}), optimizer, itertools.repeat(None, 200)
    ):
        pass
    logps = policy().detach()
    bound = games.duality_gap(P, logps, ref, beta=beta) / (2 * beta)
    assert (kl_divergence(logps, star) <= bound + 1e-25).all()  # rounding squared
    assert bound.max() < 1e-8 < 1e-3 < kl_divergence(ref, star).max()


@pytest.mark.parametrize("way, mixture", [("nash_md", 0.3), ("online_ipo", 0.0)])
def test_a_gpt_ends_at_the_equilibrium(way, mixture):
    """[D11.16] All 21 completions of four prompts; of Nash-MD the mixture with the reference ends there."""
    beta, steps = 0.2, 250
    settings = convergence.Settings(beta, 0, 0, steps, 0, "cpu", quick=True)
    gpt, prompts, *_ = convergence.gpt_world(settings)
    completions = enumerate_completions(convergence.VOCAB, 2, convergence.EOS)
    policy = EnumeratedPolicy(copy.deepcopy(gpt), prompts, completions)
    ref = float64_table(policy)
    P = drawn(torch.Generator().manual_seed(5), *ref.shape, scale=0.7)
    star, _ = games.regularised_equilibrium(P, ref, beta=beta)

    def objective(_):
        tables = policy(), ref.float(), P.float()
        if way == "online_ipo":
            return games.online_ipo_objective(*tables, beta=beta), {}
        return games.self_play_objective(*tables, beta=beta * (1 - mixture), mixture=mixture), {}

    optimizer = torch.optim.Adam(policy.parameters(), lr=0.015, betas=(0.9, 0.95), eps=1e-9, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: convergence.gpt_schedule(n, steps))
    for _ in train(objective, optimizer, itertools.repeat(None, steps), scheduler=scheduler):
        pass
    logps = ((1 - mixture) * float64_table(policy) + mixture * ref).log_softmax(-1)
    bound = games.duality_gap(P, logps, ref, beta=beta) / (2 * beta)
    assert (kl_divergence(logps, star) <= bound).all()
    assert bound.max() < 3e-3 < 0.03 < kl_divergence(ref, star).max()
    if mixture:  # the policy itself ends at a best response, which is another
        assert kl_divergence(float64_table(policy), star).max() > 5 * bound.max()


# ------------------------------------------------------------------------------------- what others make of it


def test_dpo_stays_where_preferences_run_in_a_circle():
    """[D11.17] Equal shares: no reward, no gradient. Other shares of the same pairs: another end."""
    exists, ref = torch.ones(1, 3, dtype=torch.bool), SKEWED[None]
    pairs = games.game_pairs(CYCLE[None])
    assert maximum_likelihood(pairs, exists).abs().max() < 1e-12
    theta = ref.clone().requires_grad_()
    loss, _ = dpo_objective(theta.log_softmax(-1), ref, pairs, beta=0.1)
    assert torch.autograd.grad(loss, theta)[0].abs().max() < 1e-16
    shares = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 0.0]]).double()
    rewards = maximum_likelihood(games.game_pairs(CYCLE[None], shares[None] / 10), exists)
    assert rewards[0, 1] - rewards[0, 0] > 0.3  # paper beat rock three times as often as it met scissors


def test_borda_and_copeland_by_hand():
    """[D11.17] and Borda orders as the Bradley-Terry projection of all pairs alike does."""
    expected = exact(0.6, 1.3 / 3, 1.4 / 3)
    torch.testing.assert_close(games.borda_scores(PARTLY), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(games.copeland_scores(PARTLY), torch.full((3,), 0.5).double())
    rewards = maximum_likelihood(games.game_pairs(PARTLY[None]), torch.ones(1, 3, dtype=torch.bool))
    assert rewards[0].argsort().equal(expected.argsort())


def test_the_strongest_cycles_are_found_and_ordered():
    """[D11.17] Two circles, one of four; a transitive table has none."""
    wins = torch.zeros(7, 7)
    for i, j, won, lost in [(0, 1, 9, 1), (1, 2, 9, 1), (2, 3, 8, 2), (3, 0, 7, 3)]:  # a circle of four
        wins[i, j], wins[j, i] = won, lost
    for i, j, won, lost in [(4, 5, 60, 40), (5, 6, 600, 400), (6, 4, 70, 30), (0, 4, 5, 0)]:
        wins[i, j], wins[j, i] = won, lost
    (sure, three), (less, four) = strongest_cycles(wins)
    assert (sure, less) == (pytest.approx(2.0), pytest.approx(4 / math.sqrt(10)))  # 20/sqrt(100); 4/sqrt(10)
    assert three[three.index(4) :] + three[: three.index(4)] == [4, 5, 6]
    assert four[four.index(0) :] + four[: four.index(0)] == [0, 1, 2, 3]
    assert strongest_cycles(torch.ones(5, 5).triu(1)) == []


# ------------------------------------------------------------------------------------------------ test of fit


def sampled(P: Tensor, games_a_pair: int, sets: int, generator) -> Tensor:
    """(sets, Y, Y) counts of wins, each pair compared equally often."""
    P = P.expand(sets, -1, -1)
    upper = torch.binomial(torch.full_like(P, games_a_pair), P, generator=generator).triu(1)
    return upper + (games_a_pair - upper).mT.tril(-1)


def of_counts(wins: Tensor):
    """The comparisons of counts (X, Y, Y)."""
    x, i, j = wins.nonzero().T
    return tally(x, torch.stack([i, j], -1), wins[x, i, j])


def fits(wins: Tensor) -> list:
    """The test of every data set of (sets, Y, Y) by itself."""
    rewards = maximum_likelihood(of_counts(wins), torch.ones(wins.shape[:2], dtype=torch.bool))
    return [goodness_of_fit(r[None], of_counts(w[None])) for r, w in zip(rewards, wins)]


def test_the_test_of_fit_by_hand():
    """[D11.18] A circle of three, each 8 to 2: rewards are equal, each pair gains 8 log 1.6 + 2 log 0.4 over
    one half, and one degree is left; two prompts add up, and a pair alone is always fitted."""
    wins = torch.zeros(2, 3, 3).double()
    for x, y in itertools.product(range(2), range(3)):
        wins[x, y, (y + 1) % 3], wins[x, (y + 1) % 3, y] = 8, 2
    data, exists = of_counts(wins), torch.ones(2, 3, dtype=torch.bool)
    fit = goodness_of_fit(maximum_likelihood(data, exists), data)
    statistic = 2 * 3 * 2 * (8 * math.log(1.6) + 2 * math.log(0.4))
    assert fit.statistic == pytest.approx(statistic, rel=1e-12) and fit.degrees == 2
    assert fit.p_value == pytest.approx(math.exp(-statistic / 2), rel=1e-9)  # chi-square with 2 degrees
    assert fit.rare == 0  # five wins are expected on either side
    pair = of_counts(torch.tensor([[[0.0, 3.0], [1.0, 0.0]]]).double())
    alone = goodness_of_fit(maximum_likelihood(pair, torch.ones(1, 2, dtype=torch.bool)), pair)
    assert alone.degrees == 0 and alone.p_value == 1 and alone.rare == 1
    assert alone.statistic == pytest.approx(0, abs=1e-12)


def test_the_test_of_fit_keeps_its_level_and_sees_a_cycle():
    """[D11.18] Where Bradley-Terry is true it rejects at 5 % in 5 % of 1,000 data sets, within 4.9 standard
    errors (a false alarm in a million); a partly cyclic world with 200 games a pair it always rejects."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.tensor([1.0, 0.3, 0.0, -0.6]).double()
    P = torch.sigmoid(rewards[:, None] - rewards)
    found = fits(sampled(P, 100, 1000, generator))
    assert {fit.degrees for fit in found} == {3} and max(fit.rare for fit in found) == 0
    share = sum(fit.p_value < 0.05 for fit in found) / len(found)
    assert abs(share - 0.05) < 4.9 * math.sqrt(0.05 * 0.95 / len(found))
    assert sum(fit.statistic for fit in found) / len(found) == pytest.approx(3, abs=4.9 * math.sqrt(6 / 1000))
    # 200 games a pair: the noncentrality is some 100, at which p < 1e-6 fails with less than 1e-6
    assert max(fit.p_value for fit in fits(sampled(PARTLY, 200, 20, generator))) < 1e-6


# ------------------------------------------------------------------------------------------------- commands


def games_run(tmp_path, capsys, *arguments: str):
    folder = tmp_path / "run"
    assert main(["games", "--output-dir", str(folder), *arguments]) == 0
    rows = json.loads((folder / "result.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "games.png",
        "result.json",
        "table.csv",
    }
    return {row["policy"].split(",")[0]: row for row in rows}, capsys.readouterr().out


def test_games_of_a_matrix(tmp_path, capsys):
    """A file with names and a reference, capital letters and all; numbers are those of the library."""
    path = tmp_path / "matrix.csv"
    path.write_text("completion,reference,A,b,c\nA,3,.5,.9,.4\nb,5,.1,.5,.7\nc,2,.6,.3,.5\n")
    rows, said = games_run(tmp_path, capsys, "--preferences", str(path), "--beta", "0.3")
    ref = exact(0.3, 0.5, 0.2).log()
    star, _ = games.regularised_equilibrium(PARTLY, ref, beta=0.3)
    for name in ("equilibrium", "Nash-MD", "online IPO"):
        assert [rows[name][f"p({y})"] for y in "Abc"] == pytest.approx(star.exp().tolist(), abs=1e-4)
        assert rows[name]["kl"] <= rows[name]["kl_bound"] <= 1e-9 and name in said
    for name, row in rows.items():
        assert row["kl"] <= row["kl_bound"] or name == "equilibrium"
    rewards = maximum_likelihood(games.game_pairs(PARTLY[None]), torch.ones(1, 3, dtype=torch.bool))
    end = optimal_logps(ref[None], rewards, beta=1.2).exp()[0]
    assert [rows["DPO"][f"p({y})"] for y in "Abc"] == pytest.approx(end.tolist(), abs=1e-4)  # KL of 1e-9


def test_games_of_comparisons_and_bad_files(tmp_path, capsys):
    """Win rates of a list of pairs, with four completions drawn as bars; one sentence for nonsense."""
    path = tmp_path / "battles.json"
    path.write_text(json.dumps([["a", "b"], ["b", "c"], ["c", "a"], ["a", "d", 3], ["d", "a"]]))
    rows, said = games_run(tmp_path, capsys, "--preferences", str(path), "--beta", "1")
    assert "taken for even" in said
    P = torch.tensor([[0.5, 1, 0, 0.75], [0, 0.5, 1, 0.5], [1, 0, 0.5, 0.5], [0.25, 0.5, 0.5, 0.5]]).double()
    star, _ = games.regularised_equilibrium(P, torch.zeros(4).double().log_softmax(-1), beta=1.0)
    assert [rows["equilibrium"][f"p({y})"] for y in "abcd"] == pytest.approx(star.exp().tolist(), abs=1e-12)
    for text, told in (
        ("completion,a,b\na,.5,.5\nb,.6,.5\n", "P + P'"),
        ("completion,a,b\na,.5,x\nb,.5,.5\n", "line 2, column 'b': 'x' is not a number"),
        ("completion,a,a\na,.5,.5\na,.5,.5\n", "twice"),  # they would share a column of table.csv
        ("completion,a,b,c\na,.5,.7,1\nb,.3,.5,1\n", "a row and a column of each"),
        ("completion,a,b\na,.5,.7,.9\nb,.3,.5\n", "4 cells"),
        ("completion,reference,a,b\na,0,.5,.5\nb,1,.5,.5\n", "positive"),
        ("[[0.5]]", "one completion"),
        (f"[[0.5, 1{400 * '0'}], [0.6, 0.5]]", "too large"),
        ("[[0.5, 0.4], [0.6]]", "a row has 1 numbers, but there are 2 rows"),
    ):
        path.write_text(text)
        assert main(["games", "--preferences", str(path)]) == 2
        assert told in capsys.readouterr().err


def test_comparisons_name_their_cycle_and_test_the_fit(tmp_path, capsys, monkeypatch):
    """bandit --comparisons: ties are half a win each way, which the statistic shows; columns are those of the
    library on win rates; pairs that never met count as even."""
    monkeypatch.setattr(ranking.figure, "ranking_figure", lambda *_, **__: None)
    rows = [("a", "b", 8), ("b", "a", 2), ("b", "c", 8), ("c", "b", 2), ("c", "a", 7), ("a", "c", 1)]
    lines = [f"{w},{loser},{w},{n}" for w, loser, n in rows] + ["c,a,tie,2", "c,d,c,6", "c,d,d,4"]
    path = tmp_path / "battles.csv"
    path.write_text("model_a,model_b,winner,count\n" + "\n".join(lines) + "\n")
    assert main(["--comparisons", str(path), "--output-dir", str(tmp_path / "run"), "--beta", "0.2"]) == 0
    said = capsys.readouterr().out
    assert "a beats b beats c beats a (8 to 2, 8 to 2, 8 to 2; weakest link 1.9 s.e.)" in said
    statistic = 2 * 3 * (8 * math.log(1.6) + 2 * math.log(0.4))
    assert f"likelihood ratio {statistic:.2f}, chi-square with 1 degrees" in said
    assert "25% of the pairs fewer than 5 wins" in said  # d won 4
    assert "p = " in said
    # Hardly any wins of each pair: no p.
    lines = [f"{w},{loser},{w},1" for w, loser, _ in rows] + ["c,d,c,2", "c,d,d,1"]
    path.write_text("model_a,model_b,winner,count\n" + "\n".join(lines) + "\n")
    assert main(["--comparisons", str(path), "--output-dir", str(tmp_path / "few"), "--beta", "0.2"]) == 0
    few = capsys.readouterr().out
    assert "but no p, as the law does not hold: of 100%" in few and "p = " not in few
    table = (tmp_path / "run" / "ranking.csv").read_text().splitlines()
    head = table[0].split(",")
    found = {cells[1]: dict(zip(head, cells)) for cells in (line.split(",") for line in table[1:])}
    P = torch.tensor([[0.5, 0.8, 0.2, 0.5], [0.2, 0.5, 0.8, 0.5], [0.8, 0.2, 0.5, 0.6], [0.5, 0.5, 0.4, 0.5]])
    uniform = torch.zeros(4).double().log_softmax(-1)
    star = games.regularised_equilibrium(P.double(), uniform, beta=0.2)[0].exp()
    for name, values in (
        ("equilibrium", star), ("borda", P.mean(-1)), ("copeland", torch.tensor([4, 4, 5, 3]) / 8),
    ):  # fmt: skip
        # P above is in float32
        assert [float(found[y][name]) for y in "abcd"] == pytest.approx(values.tolist(), abs=1e-6)


# ---------------------------------------------------------------------------------------- planted mistakes

PLANTED = {
    "the loser wins": (games._checked, "(P - P.mT) / 2", "(P.mT - P) / 2", lambda: guard_rock()),
    "P transposed": (games._against, "(game @ ", "(game.mT @ ", lambda: guard_rock()),
    "the gap without its factor 2": (games.duality_gap, "2 * beta * kl", "beta * kl", lambda: guard_gap()),
    "a tie is a full win each way": (
        tables._game, "share * count, (1 - share) * count", "(share > 0) * count, (share < 1) * count",
        lambda: guard_tie(),
    ),
    "one degree too many": (
        goodness_of_fit, "played.sum() + comp", "played.sum() + 2 * comp", lambda: guard_fit(),
    ),
    "half the statistic": (goodness_of_fit, "2 * gain", "gain", lambda: guard_fit()),
}  # fmt: skip


guard_gap = test_the_certificate_is_sharp_where_the_game_decides_nothing
guard_fit = test_the_test_of_fit_by_hand
guard_rock = test_rock_paper_scissors_by_symmetry


def guard_tie():
    """As test_comparisons_name_their_cycle, on what the row becomes."""
    row = tables.TableRow("here", {"model_a": "a", "model_b": "b", "winner": "tie", "count": "2"}, ",")
    assert tables._game(row) == ("all", "a", "b", 1.0, 1.0)


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    """The guards pass on the code as it is, and fail on the mistake."""
    function, right, wrong, guard = PLANTED[mistake]
    guard()
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
