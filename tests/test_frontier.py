"""The frontier command: every method ends where theory says, and nobody crosses the frontier."""

import argparse
import itertools
import json
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from planting import CAUGHT, plant

from dpo_minimal import (
    all_sets,
    averaged_ipo_loss,
    best_of_n_logps,
    bradley_terry_loss,
    expected_pairs,
    kl_divergence,
    kto_loss,
    maximum_likelihood,
    optimal_logps,
    orpo_loss,
    random_bandit,
    simpo_loss,
    unlikelihood_loss,
)
from dpo_minimal.__main__ import main
from dpo_minimal.bandit import TabularPolicy, loss_on_table
from dpo_minimal.bench import figures
from dpo_minimal.experiments.frontier import command as frontier
from dpo_minimal.experiments.frontier import figure as frontier_plots
from dpo_minimal.experiments.frontier import methods, pair_methods, pairs
from dpo_minimal.experiments.frontier.pair_methods import pair_method
from dpo_minimal.experiments.frontier.worlds import World, gpt_world, table_world
from dpo_minimal.experiments.study import carry_out
from dpo_minimal.laws.sampling_laws import finite_data_law
from dpo_minimal.losses import dpo_loss
from dpo_minimal.preferences import Rankings, expected_rankings, reference_pairs, sample_pairs, win_counts
from dpo_minimal.rivals.baselines import frontier_gap
from dpo_minimal.zoo import noise
from dpo_minimal.zoo.ipo import ipo_estimate
from dpo_minimal.zoo.kto import _of_pairs, kto_on_table

BETA, NOISE = 0.4, 0.1


def small_world(X=2, Y=5, seed=0) -> World:
    """A table whose completions differ in length."""
    made = random_bandit(X, Y, generator=torch.Generator().manual_seed(seed))
    lengths = torch.arange(1, Y + 1).double().expand(X, Y)
    return World("table", made.ref_logps, made.rewards, lengths, 1.0, lambda: TabularPolicy(made.ref_logps))


def uniform(world: World):
    """Every pair alike, so that everybody is compared."""
    return all_sets(world.rewards > -torch.inf)


# -------------------------------------------------------------------------- losses on tables, by definition


def test_losses_are_given_what_they_need():
    """The reference where there is one, lengths where tokens are averaged, and chosen before rejected."""
    w = small_world()
    data = expected_pairs(w.rewards, uniform(w))
    logps = torch.randn(w.rewards.shape, generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)
    policy, reference = data.gather(logps).unbind(-1), data.gather(w.ref_logps).unbind(-1)
    lengths = data.gather(w.lengths).unbind(-1)
    for loss, arguments, options in (
        (dpo_loss, (*policy, *reference), {"beta": BETA}),
        (averaged_ipo_loss, (*policy, *reference, *lengths), {"beta": BETA}),
        (simpo_loss, (*policy, *lengths), {"beta": BETA, "gamma": 0.2}),
        (orpo_loss, (*policy, *lengths), {"lam": 0.3}),
        (unlikelihood_loss, policy, {"alpha": 0.3}),
    ):
        found = loss_on_table(loss, logps, w.ref_logps, data, lengths=w.lengths, **options)
        assert torch.equal(found.losses, loss(*arguments, **options).losses), loss.__name__
    found = kto_on_table(logps, w.ref_logps, data, beta=BETA, desirable_weight=1.5, undesirable_weight=0.7)
    z0 = kl_divergence(logps, w.ref_logps)[data.prompt]
    options = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    good = torch.ones_like(policy[0], dtype=torch.bool)
    assert torch.equal(found.losses[:, 0], kto_loss(policy[0], reference[0], good, z0, **options).losses)
    assert torch.equal(found.losses[:, 1], kto_loss(policy[1], reference[1], ~good, z0, **options).losses)
    both = kto_on_table(logps, w.ref_logps, data, beta=BETA, desirable_weight=1.0, undesirable_weight=1.0)
    mean = pair_method("kto", beta=BETA).objective(w)(logps, w.ref_logps, data)
    assert abs(mean - data.weight @ both.losses.sum(-1) / 2) <= 1e-15


# --------------------------------------------------------------------------------- where methods must end


ENDS = {
    "DPO": pair_method("dpo", beta=BETA), "cDPO": pair_method("cdpo", beta=BETA, label_smoothing=NOISE),
    "robust DPO": pair_method("robust", beta=BETA, flip_probability=NOISE),
    "IPO": pair_method("ipo", beta=BETA), "averaged IPO": pair_method("averaged_ipo", beta=BETA),
    "Unlikelihood": pair_method("unlikelihood", alpha=0.05), "Preferred-FT": pair_methods.preferred_ft(),
    "rankings": pair_method("plackett_luce", beta=BETA),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_training_ends_at_the_formula(name):
    """Exact preferences, one in ten labels flipped: each method's end is found by Newton's method, a linear
    system or a formula, and by Adam. 1e-6 nats: what is left of a rate that falls to zero."""
    w = small_world()
    data = expected_pairs(w.rewards, uniform(w), flip_probability=NOISE)
    if name == "rankings":
        data = expected_rankings(w.rewards, all_sets(w.rewards > -torch.inf, size=3))
    run = methods.train_on_pairs(w, ENDS[name], data, steps=400)
    assert run.distance <= 1e-6
    assert torch.equal(run.path[0], w.ref_logps) and run.steps_at[0] == 0 and run.steps_at[-1] == 400
    clean = optimal_logps(w.ref_logps, w.rewards, beta=BETA)
    to_clean = kl_divergence(run.path[-1], clean).max()
    if name in ("robust DPO", "rankings"):  # the flips undone, or none made
        assert to_clean <= 1e-6
    else:
        assert to_clean >= 1e-2


def test_without_flips_robust_dpo_has_no_end():
    """[D12.3] A pair that is flipped less often than it is told: no optimum, and so no distance."""
    w = small_world()
    sure = expected_pairs(6 * w.rewards, uniform(w))
    run = methods.train_on_pairs(w, pair_method("robust", beta=BETA, flip_probability=0.2), sure, steps=5)
    assert run.optimum is None and math.isnan(run.distance)


def test_sampled_pairs_end_at_the_estimate_and_near_the_truth():
    """The trained policy is the estimate of its own pairs, to 1e-8, and that is as near to pi* as its law
    says, at a false-alarm rate of 1e-6 [D11.4]."""
    w = small_world()
    data = sample_pairs(w.rewards, 5000, slate=uniform(w), generator=torch.Generator().manual_seed(0))
    run = methods.train_on_pairs(w, pair_method("dpo", beta=BETA), data, steps=600)
    assert run.distance <= 1e-8
    optimal = optimal_logps(w.ref_logps, w.rewards, beta=BETA)
    law = finite_data_law(optimal, w.ref_logps, data, beta=BETA)
    assert law.plenty > 8 and law.score <= law.score_limit
    assert ((run.path[-1] - optimal).abs() <= law.logp_limit).all()


def test_ppo_ends_at_the_closed_form_of_the_rewards_it_was_given():
    """With wrong rewards at the wrong rewards' optimum, not at pi*."""
    w = small_world()
    wrong = w.rewards.flip(-1)
    run = methods.train_by_ppo(
        w, wrong, "PPO", beta=BETA, target=None, effort=methods.Effort(1, 150, 512, 4), seed=0
    )
    assert run.distance <= 1e-3  # of sampling, fading
    assert kl_divergence(run.path[-1], optimal_logps(w.ref_logps, w.rewards, beta=BETA)).max() > 0.1
    assert run.steps == 600 and run.steps_at[-1] == 600


def test_with_a_target_the_end_is_that_of_the_last_coefficient():
    """Not of the one it starts with; and each look is at the policy after its steps."""
    w = small_world()
    run = methods.train_by_ppo(
        w, w.rewards, "PPO-GT", beta=2.0, target=0.4, effort=methods.Effort(1, 150, 512, 4), seed=0
    )
    assert run.distance <= 1e-3  # of sampling, fading
    assert kl_divergence(run.path[-1], optimal_logps(w.ref_logps, w.rewards, beta=2.0)).mean() > 0.1
    brief = methods.train_by_ppo(
        w, w.rewards, "PPO-GT", beta=2.0, target=None, effort=methods.Effort(1, 6, 64, 2), seed=0
    )
    assert brief.steps_at[:2] == [0, 2] and not torch.equal(brief.path[0], brief.path[1])


def test_gpt_world_has_the_reference_it_says():
    """The policy starts at the table of the world, completions are complete, rewards are of one half."""
    w = gpt_world(0, quick=True)
    assert (w.policy()().detach() - w.ref_logps).abs().max() <= 1e-5  # float32 against float64
    assert w.ref_logps.logsumexp(-1).abs().max() <= 1e-6
    assert w.rewards.shape == (4, 85) and abs(w.rewards.std() - 0.5) <= 0.1  # 5 deviations of 340 draws
    narrow = gpt_world(0, quick=True, width=8)
    assert narrow.reference.config.n_embd == 8 and torch.equal(narrow.rewards, w.rewards)


def test_a_gpt_reward_model_orders_what_it_was_shown():
    """Trained on exact preferences its loss comes near the truth's; a constant a prompt is taken out."""
    w = gpt_world(0, quick=True)
    data = expected_pairs(w.rewards, reference_pairs(w.ref_logps))
    rewards = methods.gpt_reward_model(w, data, data, steps=60, seed=0)
    assert (w.ref_logps.exp() * rewards).sum(-1).abs().max() <= 1e-6  # mean zero under the reference
    chance = data.gather(rewards)
    loss = data.weight @ bradley_terry_loss(chance[:, 0], chance[:, 1])
    truth = data.gather(w.rewards)
    floor = data.weight @ bradley_terry_loss(truth[:, 0], truth[:, 1])
    assert floor < loss < floor + 0.7 * (math.log(2) - floor)  # log 2 is guessing; seen 0.53
    # Held-out comparisons that say the opposite: the first of 20 looks is the best, a twentieth of the way.
    opposite = data._replace(order=data.order.flip(-1))
    assert methods.gpt_reward_model(w, data, opposite, steps=20, seed=0).std() < 0.2 * rewards.std()


# ------------------------------------------------------------------------------------ how many pairs


def test_the_reward_model_is_dpo_in_other_words():
    """The same steps, looks and stopping, here after a fifth of the steps: its closed form is the DPO that is
    stopped early, for any beta, up to Adam's floor under small gradients."""
    w = small_world()
    data = pairs.draw(expected_pairs(w.rewards, uniform(w)), 100, np.random.default_rng(0))
    shown, held_out = pairs.split(data, np.random.default_rng(1))
    wins = [win_counts(part, *w.rewards.shape)[None] for part in (shown, held_out)]
    rewards = pairs.fit_rewards(*wins, steps=100)[0]
    for beta in (0.1, 2.0):
        run = methods.train_on_pairs(w, pair_method("dpo", beta=beta), shown, steps=100)
        best = pairs.best_on_path(run, held_out, beta=beta)
        assert run.steps_at[best] == 20
        # The floor of 1e-12 takes its ratio to the gradients, here above 1e-5, off each of at most 100 steps
        # of at most 0.05 / beta: 5e-7 / beta in all. The next measurement is 1e-2 / beta away.
        apart = run.path[best] - optimal_logps(w.ref_logps, rewards, beta=beta)
        assert apart.abs().max() <= 1e-6 / beta


def test_a_prior_holds_rewards_back():
    """The gradient of the likelihood balances that of the prior; few comparisons, and it decides."""
    w = small_world()
    data = pairs.draw(expected_pairs(w.rewards, uniform(w)), 30, np.random.default_rng(0))
    wins = win_counts(data, *w.rewards.shape)[None]
    scores = pairs.fit_rewards(wins, 0 * wins, prior=0.7)[0].requires_grad_()
    ranked = data.gather(scores)
    loss = data.weight @ bradley_terry_loss(ranked[:, 0], ranked[:, 1])
    (slope,) = torch.autograd.grad(loss + scores.square().sum() / (2 * 0.7**2), scores)
    # Adam comes to rest within its last step, 0.05 / 1200, of the balance. The slope grows by at most 30 / 4
    # times as much: each comparison adds at most 1/2 to its two completions' rows of the Hessian, none has
    # more than ten, and the prior adds 1 / 0.7^2. Seen: a thirtieth of that.
    assert slope.abs().max() <= 30 / 4 * 0.05 / 1200
    assert 0 < scores.abs().max() < 1.5


def test_drawn_counts_follow_the_population():
    """N in all, and Pearson's statistic below its 1 - 1e-6 quantile (39 outcomes, chi-square 96)."""
    w = small_world()
    population = expected_pairs(w.rewards, uniform(w))
    drawn = pairs.draw(population, 40_000, np.random.default_rng(0))
    assert drawn.weight.sum() == 40_000 and len(drawn.weight) == len(population.weight) == 40
    expected = 40_000 * population.weight
    assert ((drawn.weight - expected) ** 2 / expected).sum() <= 96


def test_a_tenth_is_held_out():
    """Nothing is lost, and the share is a tenth within five deviations."""
    w = small_world()
    drawn = pairs.draw(expected_pairs(w.rewards, uniform(w)), 10_000, np.random.default_rng(0))
    shown, held = pairs.split(drawn, np.random.default_rng(1))
    assert torch.equal(shown.weight + held.weight, drawn.weight) and (shown.weight >= 0).all()
    assert abs(held.weight.sum() - 1000) <= 5 * 30


def test_the_reward_model_is_the_estimate_and_stops_in_time():
    """With nothing held out it is Newton's estimate; with comparisons held out, the best of its path."""
    w = small_world()
    data = expected_pairs(w.rewards, uniform(w))
    rewards = pairs.learned_rewards(w, data, None)
    estimate = maximum_likelihood(data, w.rewards > -torch.inf)
    apart = rewards - estimate
    assert (apart - apart.mean(-1, keepdim=True)).abs().max() <= 2e-5  # Adam's last steps; seen 5e-6
    assert (w.ref_logps.exp() * rewards).sum(-1).abs().max() <= 1e-12
    wins = win_counts(data, *w.rewards.shape)[None]
    # Held-out comparisons that say the opposite: the best is to learn nothing.
    stopped = pairs.fit_rewards(wins, wins.mT)
    assert stopped.abs().max() <= 1e-12


def test_dpo_is_the_reward_model_with_the_closed_form_at_every_step():
    """[D11.7] The same gradient steps, the rate over beta squared: the same policy to rounding, all along."""
    w = small_world()
    data = expected_pairs(w.rewards, uniform(w))
    theta = w.ref_logps.clone().requires_grad_()
    scores = torch.zeros_like(theta).requires_grad_()
    for _ in range(50):
        out = loss_on_table(dpo_loss, theta.log_softmax(-1), w.ref_logps, data, beta=BETA)
        (slope,) = torch.autograd.grad(data.weight @ out.losses, theta)
        ranked = data.gather(scores)
        (of_scores,) = torch.autograd.grad(
            data.weight @ bradley_terry_loss(ranked[:, 0], ranked[:, 1]), scores
        )
        with torch.no_grad():
            theta -= 20 * slope
            scores -= 20 * BETA**2 * of_scores
            closed = optimal_logps(w.ref_logps, scores, beta=BETA)
            assert (theta.log_softmax(-1) - closed).abs().max() <= 1e-12


def test_what_was_never_compared_keeps_the_references_odds():
    """[D11.9] All compared: pi*. Nothing but one pair: its two completions share what they had."""
    w = small_world()
    optimal = optimal_logps(w.ref_logps, w.rewards, beta=BETA)
    all_of_it = pairs.covered(w, expected_pairs(w.rewards, uniform(w)), beta=BETA)
    assert (all_of_it - optimal).abs().max() <= 1e-13
    one = Rankings(torch.tensor([0]), torch.tensor([[1, 3]]), torch.ones(1).double())
    found = pairs.covered(w, one, beta=BETA)
    odds, before = found - found[:, :1], w.ref_logps - w.ref_logps[:, :1]
    assert (odds - before)[:, [2, 4]].abs().max() <= 1e-14 and (odds - before)[1].abs().max() <= 1e-14
    gap = (found - w.ref_logps)[0, 1] - (found - w.ref_logps)[0, 3]
    assert abs(gap - (w.rewards[0, 1] - w.rewards[0, 3]) / BETA) <= 1e-13
    # Descent on infinitely many labels of that pair ends there.
    both = expected_pairs(w.rewards, uniform(w))
    kept = ((both.order == 1) | (both.order == 3)).all(-1) & (both.prompt == 0)
    only = Rankings(*(field[kept] for field in both))
    theta = w.ref_logps.clone().requires_grad_()
    for _ in range(300):
        out = loss_on_table(dpo_loss, theta.log_softmax(-1), w.ref_logps, only, beta=BETA)
        (slope,) = torch.autograd.grad(only.weight @ out.losses / only.weight.sum(), theta)
        theta = (theta - 2 / BETA**2 * slope).detach().requires_grad_()
    assert (theta.detach().log_softmax(-1) - found).abs().max() <= 1e-9  # geometric convergence


def test_quartiles_and_worth():
    """A table of known gaps: their medians, means, and how many pairs the law needs for PPO-GT's gap."""
    points = [pairs.Point("table", "DPO", 100, gap) for gap in (1.0, 2.0, 6.0)]
    points += [pairs.Point("table", "PPO-GT", math.inf, 0.01)]
    spread = pairs.spreads(points)["DPO"][100]
    assert spread == (1.5, 2.0, 4.0, 3.0)
    lines = pairs.summary(points, 50.0, 0.5)
    assert any("2 (3)" in line and "0.5" in line for line in lines)
    assert "0.01 nats; the law reaches that with 5e+03 pairs" in lines[-1]


def test_the_look_that_predicts_best_is_taken():
    """Of a path with pi* for exact preferences in its middle, that look: the truth predicts best (Gibbs)."""
    w = small_world()
    data = expected_pairs(w.rewards, uniform(w))
    path = torch.stack([optimal_logps(w.ref_logps, k * w.rewards, beta=BETA) for k in (0, 0.5, 1, 2, 4)])
    found = methods.Run(w, "DPO", "", path, [*range(5)], None)
    assert pairs.best_on_path(found, data, beta=BETA) == 2
    assert pairs.best_on_path(found, data, beta=2 * BETA) == 1  # twice the implicit rewards


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def brief(monkeypatch):
    """A few steps of everything."""
    monkeypatch.setattr(methods, "effort", lambda world, quick: methods.Effort(24, 6, 64, 2))
    monkeypatch.setattr(pairs, "STEPS", 30)
    monkeypatch.setattr(pairs, "PRIOR_STEPS", 30)
    monkeypatch.setitem(pairs.fit_rewards.__kwdefaults__, "steps", 30)
    monkeypatch.setattr(pairs, "SIZES", (100, 1000))
    monkeypatch.setattr(pairs, "GPT_SIZES", (100,))
    monkeypatch.setattr(pairs, "REPLICATES", 2)
    monkeypatch.setattr(pairs, "SAMPLER_SIZES", (100,))


def test_the_command_lists_every_method_and_none_above_the_frontier(brief, tmp_path, capsys):
    """All that the issue of the frontier names is run; the records agree with the tables; the curve is the
    ceiling of every look at every method."""
    out = tmp_path / "run"
    assert main(["frontier", "--quick", "--world", "table", "--output-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    for family in (
        "DPO", "DPO, stopped early", "IPO", "cDPO", "robust DPO", "KTO", "ORPO", "SimPO",
        "DPO without weight", "Unlikelihood", "Preferred-FT", "best of N", "best of N, learned reward",
        "reward model + closed form", "PPO", "PPO-GT",
    ):  # fmt: skip
        assert f"\n  {family:<31} " in printed, family
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert min(record["gap/reward"] for record in records) >= -1e-9
    assert min(record["gap/nats"] for record in records) >= -1e-9
    with np.load(out / "result.npz") as file:
        arrays = dict(file)
    last = [record for record in records if record["number"] == 5][-1]
    table = torch.from_numpy(arrays["table_05_logps"])
    gap = frontier_gap(
        table, torch.from_numpy(arrays["table_ref_logps"]), torch.from_numpy(arrays["table_rewards"])
    )
    assert last["reward"] == gap.reward and last["kl/policy_reference"] == gap.kl
    assert (out / "frontier.png").stat().st_size > 10_000 and (out / "config.json").exists()


def runs_of(w: World, monkeypatch, **options) -> list[methods.Run]:
    """Everything that the command would run on a small world; what is learnt are the rewards reversed."""
    monkeypatch.setattr(pairs, "learned_rewards", lambda world, *_: world.rewards.flip(-1))
    monkeypatch.setattr(frontier, "TARGETS", (0.2, 50.0))
    monkeypatch.setattr(frontier, "BEST_OF", (4,))
    given = dict(beta=BETA, quick=False, population=False, num_pairs=2000, flip_probability=0.0, seed=0)
    args = argparse.Namespace(**given | options)
    study = frontier.frontier_study([w], args)
    return study.runs([job() for job in study.plan[w.name]])


def test_who_knows_the_true_reward(brief, monkeypatch):
    """PPO-GT and best of N have the true one; PPO, the closed form and the other best of N the learned one:
    log ratios of their optima are multiples of it. A target beyond the frontier's end is not tried."""
    w = small_world()
    runs = runs_of(w, monkeypatch)

    def of(family: str) -> methods.Run:
        return next(run for run in runs if run.family == family)

    def direction(table):
        centred = table - table.mean(-1, keepdim=True)
        return centred / centred.norm()

    learned = w.rewards.flip(-1)
    for family, rewards in (("PPO-GT", w.rewards), ("PPO", learned), ("reward model + closed form", learned)):
        assert (direction(of(family).optimum - w.ref_logps) - direction(rewards)).norm() <= 1e-12
    for family, rewards in (("best of N", w.rewards), ("best of N, learned reward", learned)):
        assert (of(family).path[-1] - best_of_n_logps(w.ref_logps, rewards, n=4)).abs().max() <= 1e-12
    assert [run.setting for run in runs if run.family == "PPO-GT"] == ["target KL 0.2"]


def test_the_stopped_policy_lies_on_its_own_path(brief, monkeypatch):
    """DPO stopped early is DPO's path up to the look that predicts the held-out tenth best, here the third
    after the start."""
    monkeypatch.setattr(pairs, "best_on_path", lambda *_, **__: 3)
    runs = runs_of(small_world(), monkeypatch)
    for whole, cut in itertools.pairwise(runs):
        if cut.family == "DPO, stopped early":
            assert whole.setting == cut.setting and torch.equal(cut.path, whole.path[:4])
            assert cut.steps == cut.steps_at[-1] == whole.steps_at[3] < whole.steps
    stopped = [run for run in runs if run.family == "DPO, stopped early"]
    assert len(stopped) == len(frontier.BETAS)
    exact = runs_of(small_world(), monkeypatch, population=True)  # nothing is held out
    assert all(run.family != "DPO, stopped early" for run in exact)


def test_noise_reaches_the_labels_and_those_who_expect_it(brief, monkeypatch):
    """Labels are flipped as often as asked, and robust DPO is told; without noise it expects a tenth."""
    w = small_world()
    for asked, told in ((0.0, 0.1), (0.3, 0.3)):
        runs = runs_of(w, monkeypatch, population=True, flip_probability=asked)
        found = {run.family: run for run in runs}
        assert found["robust DPO"].setting == found["cDPO"].setting == f"β {BETA:g}, ε {told:g}"
        args = argparse.Namespace(population=True, flip_probability=asked)
        ranked = (data := pairs.comparisons(w, args, seed=0)).gather(w.rewards)
        clean = expected_pairs(w.rewards, reference_pairs(w.ref_logps))
        right = torch.where(ranked[:, 0] > ranked[:, 1], 1.0, 0.0).double()
        share = right @ clean.weight
        assert torch.equal(data.order, clean.order)
        assert abs(right @ data.weight - (share * (1 - asked) + (1 - share) * asked)) <= 1e-12


def test_the_law_is_that_of_pairs_shared_by_all_prompts(brief, tmp_path, capsys):
    """N times the mean gap of estimates from N pairs in all: within 4.9 standard errors of 200 data sets
    (1e-6), and the second-order bias that `kl_law` names."""
    w, count = small_world(), 20_000
    args = argparse.Namespace(beta=BETA, quick=True, seed=0)
    carry_out(frontier.pairs_study([w], args), tmp_path)
    with np.load(tmp_path / "result.npz") as file:
        law = file["table_law"].item()
    population = expected_pairs(w.rewards, reference_pairs(w.ref_logps))
    generator = np.random.default_rng(0)
    sets = [pairs.draw(population, count, generator) for _ in range(200)]
    prompts = [
        each.prompt + len(w.rewards) * number for number, each in enumerate(sets)
    ]  # all fitted at once
    joined = Rankings(torch.cat(prompts), *(torch.cat(parts) for parts in zip(*(each[1:3] for each in sets))))
    estimates = maximum_likelihood(joined, (w.rewards > -torch.inf).repeat(200, 1)).view(
        200, *w.rewards.shape
    )
    best = optimal_logps(w.ref_logps.expand_as(estimates), estimates, beta=BETA)
    gaps = [count * pairs.gap_to_optimum(w, logps, beta=BETA) for logps in best]
    assert abs(np.mean(gaps) - law) <= 4.9 * np.std(gaps) / math.sqrt(200) + 0.05 * law


def test_the_same_seed_gives_the_same_numbers(brief, tmp_path, capsys):
    """Every look of every method, to the bit; another seed gives others."""
    found = []
    for place, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / place
        assert (
            main(["frontier", "--pairs", "--world", "table", "--seed", seed, "--output-dir", str(out)]) == 0
        )
        found.append((out / "metrics.jsonl").read_text())
        assert (out / "pairs.png").stat().st_size > 10_000
    assert found[0] == found[1] != found[2]
    assert "Gap to pi* in nats" in capsys.readouterr().out


@pytest.mark.slow
def test_how_many_pairs_for_the_gpt(brief, tmp_path, capsys):
    """Each method at each size and with exact preferences (null in the records), and PPO with the true reward
    once; exact preferences leave nothing uncompared."""
    out = tmp_path / "run"
    assert main(["frontier", "--pairs", "--quick", "--world", "gpt", "--output-dir", str(out)]) == 0
    points = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {(point["method"], point["pairs"]): point["gap"] for point in points}
    names = ("DPO", "DPO, narrow GPT", "reward model + closed form", "PPO", "coverage")
    assert set(found) == {(name, n) for name in names for n in (100, None)} | {
        ("PPO-GT", None),
        ("prior", 100),
    }
    assert found["coverage", None] <= 1e-12 < 0.1 < found["coverage", 100]
    assert "PPO with the true reward" in capsys.readouterr().out and (out / "pairs.png").exists()


def test_no_end_lies_outside_the_figure():
    """A policy on the wrong completion is further away and worse than all of the frontier, and is drawn."""
    w = small_world()
    worst = torch.where(w.rewards == w.rewards.amin(-1, keepdim=True), 0.0, -torch.inf).double()
    run = replace(methods.closed_form(w, w.rewards, "DPO", 1.0), path=torch.stack([w.ref_logps, worst]))
    gap = frontier_gap(run.path, w.ref_logps, w.rewards)
    axis = plt.figure().add_subplot()
    frontier_plots._world_panel(axis, [run])
    plt.close()
    for (low, high), value in ((axis.get_xlim(), gap.kl[-1]), (axis.get_ylim(), gap.reward[-1])):
        assert low < value < high


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, instead of files."""
    saved = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: saved.append(figure))
    yield saved
    plt.close("all")


def gaps_of_everything(world: str) -> list[pairs.Point]:
    """Two data sets a size for every method of the pairs figure."""
    sizes = [(n, gap) for n in (100, 1000) for gap in (30 / n, 50 / n)] + [(math.inf, 1e-13)]
    names = [*frontier_plots.PAIRS_STYLES, "PPO-GT"]
    return [pairs.Point(world, name, n, gap) for name in names for n, gap in sizes]


@pytest.mark.parametrize("count", [1, 2])
def test_titles_and_legends_lie_inside_the_figure(count, drawn, tmp_path):
    """With one world there is half of the room."""
    w = small_world()
    runs = [methods.closed_form(w, w.rewards, name, 1.0) for name in frontier_plots.STYLES]
    what = "10,000,000 sampled pairs, 0.333 of the labels flipped"
    frontier_plots.frontier_figure(count * [runs], what, tmp_path)
    worlds = ("table", "gpt")[:count]
    points = [gaps_of_everything(world) for world in worlds]
    frontier_plots.pairs_figure(points, dict.fromkeys(worlds, 50.0), 0.5, tmp_path)
    for figure in drawn:
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height


def test_what_lies_below_the_axis_says_so(drawn, tmp_path):
    """Its value is written beside it; and PPO on a table, on fewer data sets than the others, has no line."""
    frontier_plots.pairs_figure([gaps_of_everything("table")], {"table": 50.0}, 0.5, tmp_path)
    (axis,) = drawn[0].axes
    assert "1e-13" in [text.get_text() for text in axis.texts]
    lines = {bars.get_label(): bars.lines[0] for bars in axis.containers}
    (climbed,) = (line for label, line in lines.items() if label.startswith("PPO"))
    assert climbed.get_linestyle() == "None" and len(climbed.get_xdata()) == 5


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--population", "--num-pairs", "5"], "--num-pairs"),
        (["--pairs", "--population"], "--pairs"),
        (["--pairs", "--num-pairs", "5"], "--num-pairs"),
        (["--pairs", "--flip-probability", "0.1"], "--flip-probability"),
        (["--num-pairs", "0"], "--num-pairs"),
        (["--num-pairs", str(10**15)], "at most 10,000,000"),
        (["--flip-probability", "0.5"], "--flip-probability"),
        (["--beta", "0"], "--beta"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_options_without_effect_are_refused(arguments, named, tmp_path, capsys):
    """One sentence that names the option, and no folder."""
    assert main(["frontier", *arguments, "--output-dir", str(tmp_path / "run")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_targets_out_of_reach_are_left_out():
    """No policy is further from the reference than the one that says only the best completion."""
    w = table_world(0)
    furthest = frontier.kl_of_best(w)
    best = torch.where(w.rewards == w.rewards.amax(-1, keepdim=True), 0.0, -torch.inf).double()
    assert abs(furthest - kl_divergence(best, w.ref_logps).mean()) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit", "count"), [("table", 1e-3, 5), ("gpt", 1e-2, 4)])
def test_all_ways_lead_to_one_optimum(name, limit, count):
    """With the default run's effort: within 1e-3 nats of pi* for the table, 1e-2 for the GPT."""
    w = table_world(0) if name == "table" else gpt_world(0, quick=False)
    rows = frontier.ways_to_one_optimum(w, argparse.Namespace(beta=0.5, seed=0, quick=False))[2:]
    assert len(rows) == count
    assert all(float(row[40:52]) <= limit for row in rows), rows


MUTANTS = {
    "lengths of the wrong order": (
        loss_on_table,
        "lengths.expand(logps.shape))",
        "lengths.expand(logps.shape)).flip(-1)",
        test_losses_are_given_what_they_need,
    ),
    "both desirable": (
        _of_pairs,
        "torch.tensor([True, False]",
        "torch.tensor([True, True]",
        test_losses_are_given_what_they_need,
    ),
    "mixture reversed": (
        noise._mixed,
        "[right * weight, wrong * weight]",
        "[wrong * weight, right * weight]",
        lambda: test_training_ends_at_the_formula("cDPO"),
    ),
    "groups not centred": (
        pairs.covered,
        "world.rewards - mean",
        "world.rewards",
        test_what_was_never_compared_keeps_the_references_odds,
    ),
    "the last look": (
        pairs.best_on_path,
        "np.argmin([",
        "len([",
        test_the_look_that_predicts_best_is_taken,
    ),
    "axes for the frontier alone": (
        frontier_plots._world_panel,
        "furthest, lowest = max(furthest, end[0]), min(lowest, end[1])",
        "pass",
        test_no_end_lies_outside_the_figure,
    ),
    "never stopped": (
        pairs.fit_rewards,
        "losses.flip(0).argmin(0)",
        "torch.zeros(len(wins), dtype=torch.long)",
        test_the_reward_model_is_the_estimate_and_stops_in_time,
    ),
    "the rate does not fall": (
        pairs.fit_rewards,
        "scheduler=schedule",
        "scheduler=None",
        test_the_reward_model_is_dpo_in_other_words,
    ),
    "a rate of its own": (
        pairs.fit_rewards,
        "pair_methods.TABLE_RATE",
        "2 * pair_methods.TABLE_RATE",
        test_the_reward_model_is_dpo_in_other_words,
    ),
    "looks after other steps": (
        pairs.fit_rewards,
        "stream, steps)",
        "stream, 2 * steps)",
        test_the_reward_model_is_dpo_in_other_words,
    ),
    "the first of equals": (
        pairs.fit_rewards,
        "len(path) - 1 - losses.flip(0).argmin(0)",
        "losses.argmin(0)",
        test_the_reward_model_is_the_estimate_and_stops_in_time,
    ),
    "the prior forgotten": (
        pairs.fit_rewards,
        "if prior is not None",
        "if False",
        test_a_prior_holds_rewards_back,
    ),
    "the prior's deviation not squared": (
        pairs.fit_rewards,
        "prior**2",
        "prior",
        test_a_prior_holds_rewards_back,
    ),
    "held out twice": (
        pairs.split,
        "rankings.weight - held",
        "rankings.weight",
        test_a_tenth_is_held_out,
    ),
    "estimate without its beta": (
        ipo_estimate,
        "/ (2 * beta)",
        "/ 2",
        lambda: test_training_ends_at_the_formula("IPO"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(name, monkeypatch):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
