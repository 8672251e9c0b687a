"""The sentiment experiment: prefixes, pairs, budgets, results, and going on after a stop."""

import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from dpo_minimal.__main__ import main
from dpo_minimal.experiments import study
from dpo_minimal.experiments.sentiment import (
    command as sentiment,
)
from dpo_minimal.experiments.sentiment import (
    methods as sentiment_methods,
)
from dpo_minimal.experiments.sentiment import (
    world as sentiment_world,
)
from dpo_minimal.experiments.sentiment.methods import (
    Run,
    all_runs,
    budget_of,
    jobs_of,
    measure,
    measured_steps,
    pairwise_objective,
    ppo_settings,
    window_of_prefixes,
)
from dpo_minimal.experiments.sentiment.results import (
    MOST_OF_N,
    Group,
    best_of,
    estimated_frontier,
    order_weights,
    results_of,
    reward_within,
    share_of_possible,
)
from dpo_minimal.experiments.sentiment.rewards import DRAWS, draws_of, first_jobs, load_reward_model
from dpo_minimal.experiments.sentiment.world import (
    Plan,
    label_pairs,
    load_world,
    make_world,
    pairs_of,
    path_of,
    take_prefixes,
)
from dpo_minimal.experiments.study import run_jobs
from dpo_minimal.rivals.baselines import best_of_n_reward
from dpo_minimal.rivals.reward_model import score_completions
from dpo_minimal.text.objectives import make_window, preference_objective, reference_logps
from dpo_minimal.text.runs import write_atomically
from dpo_minimal.validation import InputError

ROOT = Path(__file__).parents[1]
TINY = Plan(  # reviews enough that samples hold a word of opinion
    demonstrations=3200, vocab_size=600, context=48, n_layer=1, n_embd=32, sft_epochs=1,
    sft_learning_rate=2e-2, prefixes=8, held_out=6, other=4, max_new_tokens=20, steps=6, batch=2,
    learning_rate=1e-3, warmup=2, best_of=2, noise="none",
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------------------------- prefixes


def test_prefixes_are_two_to_eight_tokens_of_texts_and_different():
    """All lengths occur, each about as often (400 texts, 57 of each: 5 deviations are 35), none twice."""
    texts = [[k, *range(1000, 1012)] for k in range(400)]
    found = take_prefixes(texts, 400, seed=1)
    assert len({tuple(prefix) for prefix in found}) == 400
    for prefix in found:
        assert 2 <= len(prefix) <= 8 and prefix == texts[prefix[0]][: len(prefix)]
    counts = np.bincount([len(prefix) for prefix in found], minlength=9)[2:]
    assert counts.min() >= 57 - 35 and counts.max() <= 57 + 35
    assert take_prefixes(texts, 10, seed=1) == found[:10] != take_prefixes(texts, 10, seed=2)


def test_too_few_prefixes_are_refused():
    """Texts that all begin alike have at most seven prefixes; a text without a further token has none."""
    with pytest.raises(InputError, match="different beginnings"):
        take_prefixes([list(range(20))] * 50, 8, seed=0)
    with pytest.raises(InputError, match="0 different"):
        take_prefixes([[1, 2]] * 50, 1, seed=0)


# --------------------------------------------------------------------------------------------------- pairs


def labels(rewards: list[float], noise: str = "none", seed: int = 0):
    completions = [[k] for k in range(len(rewards))]
    generator = torch.Generator().manual_seed(seed)
    return label_pairs(torch.tensor(rewards), completions, noise=noise, generator=generator)


def test_six_pairs_of_four_agree_with_the_true_order():
    """Every pair once, the better one first."""
    rewards = [0.5, -1.0, 2.0, 0.25]
    pairs, left_out = labels(rewards)
    assert left_out == 0 and {frozenset(pair) for pair in pairs} == {
        frozenset(pair) for pair in combinations(range(4), 2)
    }
    assert all(rewards[chosen] > rewards[rejected] for chosen, rejected in pairs)


def test_ties_are_left_out_and_counted():
    """Of 1, 1, 1, 0 three pairs are ties."""
    pairs, left_out = labels([1.0, 1.0, 1.0, 0.0])
    assert left_out == 3 and sorted(pairs) == [(0, 3), (1, 3), (2, 3)]


def test_bradley_terry_labels_have_the_right_frequency():
    """4,000 labels with p = sigmoid(1): within five deviations, which chance leaves once in two million."""
    generator = torch.Generator().manual_seed(11)
    rewards, count = torch.tensor([0.0, 1.0]), 4000
    wins = 0
    for _ in range(count):
        ((chosen, _),), left_out = label_pairs(
            rewards, [[0], [1]], noise="bradley-terry", generator=generator
        )
        wins += chosen == 1
    p = 1 / (1 + math.exp(-1))
    assert left_out == 0 and abs(wins / count - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_with_noise_equal_rewards_are_a_coin_and_the_same_text_twice_is_left_out():
    """A coin over 64 seeds shows both sides (chance of one side only: 2^-63)."""
    first = {labels([1.0, 1.0], "bradley-terry", seed)[0][0][0] for seed in range(64)}
    assert first == {0, 1}
    same = label_pairs(
        torch.tensor([1.0, 1.0]), [[7], [7]], noise="bradley-terry", generator=torch.Generator()
    )
    assert same == ([], 1)


# ------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "plan", [sentiment.GRAMMAR, sentiment.QUICK, sentiment.REVIEWS, sentiment.QUICK_REVIEWS]
)
def test_every_method_has_the_same_budget(plan):
    """Everybody hears of as many rewards; on pairs there are as many steps, and PPO uses its samples up."""
    runs = [run for run in all_runs(seeds=2, quick=False) if run.kind != "none"]
    assert {r.method for r in runs} >= {"DPO", "DPO in rounds", "PPO", "PPO-GT", "Unlikelihood", "KTO"}
    for run in runs:
        steps, completions, judged = budget_of(run, plan).values()
        assert judged == 4 * plan.prefixes
        if run.kind == "ppo":
            settings = ppo_settings(run, plan)
            assert settings.iterations * settings.epochs == steps and settings.prompts == completions
            assert settings.iterations * settings.prompts == judged  # rewards asked for = rewards of pairs
            assert settings.learning_rate == plan.learning_rate
        else:
            assert steps == plan.steps * (2 if run.kind == "rounds" else 1) and completions == 4 * plan.batch
        measured = measured_steps(steps)
        assert all(step % 3 == 0 for step in measured[:-1]) and measured[-1] == steps


def test_runs_have_files_of_their_own():
    """The paper's sweep is all there, and no two trainings share a name."""
    runs = all_runs(seeds=3, quick=False)
    assert len({run.name for run in runs}) == len(runs)
    count = {
        method: len({r.setting for r in runs if r.method == method}) for method in ("DPO", "PPO", "PPO-GT")
    }
    assert count == {"DPO": 3, "PPO": 1, "PPO-GT": 1}
    assert {run.seed for run in runs if run.method == "DPO"} == {0, 1, 2}
    assert {run.seed for run in runs if run.method == "PPO"} == {0, 1, 2}
    assert all(run.name.isascii() and " " not in run.name for run in runs)


# ------------------------------------------------------------------------------------------------- results


def group_of(kls: list[float], rewards: list[float]) -> Group:
    """A training whose prompts are all alike."""
    tables = [
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1).repeat(1, 1, 3) for values in (rewards, kls)
    ]
    return Group("DPO", "", list(range(len(kls))), *tables, {}, 0.0)


def test_the_most_reward_within_a_divergence_is_read_off_the_path():
    """Linear between looks, from the SFT model on, cut at the limit in both directions; looks beyond it do
    not count, and a way that only loses keeps its start."""
    start = torch.zeros(3, dtype=torch.float64)
    for kls, rewards, nats, expected in (
        ([1.0, 3.0], [2.0, 3.0], 2.0, 2.5),
        ([1.0, 3.0], [2.0, 3.0], 0.5, 1.0),
        ([1.0, 3.0], [2.0, 3.0], 9.0, 3.0),
        ([4.0, 1.0], [2.0, 0.0], 3.0, 1.5),  # out at 3 with 1.5, back at 3 with 4/3
        ([4.0, 1.0], [2.0, 5.0], 3.0, 5.0),
        ([1.0, 2.0], [-1.0, -2.0], 3.0, 0.0),
    ):
        assert reward_within(group_of(kls, rewards), start, nats).value == pytest.approx(expected)


def test_best_of_n_by_another_reward():
    """By the true reward itself: the mean over all subsets; by its negative: the worst of n; by the order of
    the draws: by enumeration."""
    generator = torch.Generator().manual_seed(2)
    true = torch.randn(4, 128, generator=generator, dtype=torch.float64)
    opponents = torch.zeros(4, dtype=torch.float64)
    best, worst = (best_of(true, by.unsqueeze(0), opponents) for by in (true, -true))
    for n in MOST_OF_N:
        assert best[n]["reward"] == pytest.approx(best_of_n_reward(true, n=n).mean().item())
        assert worst[n]["reward"] == pytest.approx(-best_of_n_reward(-true, n=n).mean().item())
    weights = order_weights(3, 6)
    bests = [max(subset) for subset in combinations(range(6), 3)]
    assert weights.tolist() == pytest.approx([bests.count(k) / len(bests) for k in range(6)])


def test_the_estimated_frontier_is_above_best_of_n():
    """No policy on the same draws has more reward at its KL: best of n on them has its exact KL."""
    generator = torch.Generator().manual_seed(4)
    true = torch.randn(6, 128, generator=generator, dtype=torch.float64)
    curve = np.array(estimated_frontier(true))
    assert (np.diff(curve[:, 0]) > 0).all() and (np.diff(curve[:, 1]) > 0).all() and curve[-1, 0] <= 3.6
    for n in (2, 4, 8, 16):
        weights = order_weights(n, 128)
        used = weights[weights > 0]
        kl = (used * (used * 128).log()).sum().item()  # draws with replacement would have no less
        reward = best_of_n_reward(true, n=n).mean().item()
        if kl < curve[-1, 0]:
            # 200 points, joined by straight lines, lie below a concave curve by less than 1e-3
            assert reward <= np.interp(kl, *curve.T) + 1e-3


# ---------------------------------------------------------------------------------------- stages and stops


RUNS = [
    Run("SFT", "", "none", full=True),
    Run("DPO", "β 0.1", "pairs", "dpo", (("beta", 0.1),)),
    Run("DPO in rounds", "β 0.1", "rounds", "dpo", (("beta", 0.1),)),
    Run("KTO", "", "pairs", "kto", (("beta", 0.1), ("desirable_weight", 1.0), ("undesirable_weight", 1.0))),
    Run("Preferred-FT", "", "sft"),
    Run("PPO", "KL 6", "ppo", target=6.0, learned=True),
    Run("PPO-GT", "KL 6", "ppo", target=6.0, full=True),
]


def make(folder: Path, *, resume: bool) -> None:
    make_world(folder, TINY, reviews=None, seed=7, resume=resume)
    run_jobs(first_jobs(folder, TINY, 7), "first", workers=1)
    run_jobs(list(jobs_of(folder, RUNS, TINY).values()), "methods", workers=1)


def arrays_of(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for path in sorted((folder / "methods").glob("*.npz")):
        with np.load(path) as file:
            found[path.name] = dict(file)
    return found


class Ended(BaseException):
    """In place of os._exit."""


def half_a_file(path: Path):
    path.write_text("half")
    signal.raise_signal(signal.SIGINT)


def test_a_worker_that_ctrl_c_ends_leaves_no_file(monkeypatch):
    """What it was writing goes, and so does its process: the pool would give it the next job."""

    def end(code: int):
        raise Ended(code)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", end)
    try:
        study._start_worker()
        with pytest.raises(Ended, match="130"):
            study._call(partial(write_atomically, Path("result.npz"), half_a_file))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(Path().iterdir())


INTERRUPTED = """
import sys
sys.path.insert(0, "tests")
from functools import partial
from pathlib import Path
from dpo_minimal.experiments.study import run_jobs
import test_sentiment as here
if __name__ == "__main__":
    run_jobs([partial(here.long_write, Path(sys.argv[1], f"{k}.npz")) for k in range(9)], "long", 2)
"""


def long_write(path: Path):
    def write(temporary: Path):
        temporary.write_text("half")
        time.sleep(60)

    write_atomically(path, write)


@pytest.mark.slow
def test_ctrl_c_ends_a_study_at_once_and_leaves_no_file(tmp_path):
    """Ctrl-C reaches all processes of a terminal's job."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    (folder := tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)], cwd=ROOT, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0 and not list(folder.iterdir())
    assert "SystemExit" not in err and err.count("Traceback") == 1 and "KeyboardInterrupt" in err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("sentiment") / "run"
    folder.mkdir()
    make(folder, resume=False)
    return folder


def test_held_out_prefixes_never_train(finished):
    """As token ids; and every pair belongs to a training prefix."""
    world = load_world(finished)
    held_out, train = ({tuple(p) for p in prompts} for prompts in (world.held_out, world.train_prompts))
    assert len(held_out) == TINY.held_out and len(train) == TINY.prefixes and not held_out & train
    assert {tuple(example.prompt) for example in world.examples} <= train


def test_pairs_are_ordered_by_the_truth_and_scored_by_the_reference(finished):
    """Chosen above rejected in true reward; reference log-probabilities are those of the same completions."""
    world = load_world(finished)
    rewards = [world.truth([row.prompt] * 2, list(row.completions)).tolist() for row in world.examples]
    assert rewards and all(chosen > rejected for chosen, rejected in rewards)
    again = reference_logps(world.policy.model, world.examples, micro_size=4, dtype="float32")
    # rows of two and of four completions are added up in another order: 2e-5 in float32
    torch.testing.assert_close(world.reference, again, rtol=0, atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_result(finished, monkeypatch):
    """Stopped before the samples, then inside a method: every file as if nothing had happened.

    The SFT model is the same one, because test_training_run.py interrupts that kind of training.
    """
    folder = Path("run").resolve()
    shutil.copytree(finished / "sft", folder / "sft")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sentiment_world, "sample_rows", stop)
        make(folder, resume=False)
    assert (folder / "prompts.json").exists() and not (folder / "preferences.jsonl").exists()
    made = []

    def some(folder, run, plan):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(run)
        return measure(folder, run, plan)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sentiment_methods, "measure", some)
        make(folder, resume=True)
    kept = {run.name: path_of(folder, run.name).stat().st_mtime_ns for run in made}
    make(folder, resume=True)
    assert kept == {run.name: path_of(folder, run.name).stat().st_mtime_ns for run in made}  # not made twice
    ours, theirs = arrays_of(folder), arrays_of(finished)
    assert set(ours) == set(theirs) and len(ours) == len(RUNS) + 4
    for name, arrays in theirs.items():
        for key, table in arrays.items():
            if key != "seconds":
                np.testing.assert_array_equal(ours[name][key], table, err_msg=f"{name} {key}")


def test_the_draws_for_best_of_n_are_judged_each_with_its_own_prompt(finished):
    """One by one: 384 of each, ended or as long as may be, true and learned reward, log pi_ref."""
    world, found = load_world(finished), arrays_of(finished)["best-of-n.npz"]
    draws = draws_of(finished, world)
    assert [draw.prompt for draw in draws[::DRAWS]] == world.held_out[: TINY.best_of]
    assert len(draws) == TINY.best_of * DRAWS
    model, end = load_reward_model(finished, world), world.policy.tokenizer.eot
    for place in (0, DRAWS - 1, DRAWS, 2 * DRAWS - 1):
        (prompt, (ids,), *_), at = draws[place], divmod(place, DRAWS)
        assert end not in ids[:-1] and (ids[-1] == end or len(ids) == TINY.max_new_tokens)
        assert found["true"][at] == world.truth([prompt], [ids]).item()
        assert found["learned"][at] == pytest.approx(
            score_completions(model, [prompt], [ids]).item(), abs=1e-4
        )
        logps = reference_logps(world.policy.model, draws[place : place + 1], micro_size=1, dtype="float32")
        assert found["reference"][at] == pytest.approx(logps.item(), abs=1e-3)  # float32, in another batch


def test_dpo_chooses_by_its_own_reward(finished):
    """Where log pi - log pi_ref is the true reward, its best of n is that by the true reward."""
    found = {name.removesuffix(".npz"): arrays for name, arrays in arrays_of(finished).items()}
    draws, run = found["best-of-n"], RUNS[1]
    assert run.method == "DPO"
    found[run.name] |= {"draw_logps": draws["reference"] + draws["true"].astype("float64")}
    results = results_of(found, RUNS, TINY)
    for n in MOST_OF_N:
        for name in ("reward", "win_rate", "kl"):
            implicit, true = (results.best[by][n][name] for by in ("DPO β 0.1 implicit", "true"))
            assert implicit == pytest.approx(true, abs=1e-9), (n, name)


def test_training_moves_the_policy_and_the_reference_stays(finished):
    """SFT's log-ratios are 0 up to rounding; every trained policy's are not."""
    for run in RUNS:
        with np.load(path_of(finished, run.name)) as file:
            table = file["log_ratios"]
        if run.kind == "none":
            assert np.abs(table).max() < 1e-4  # float32, the same computation twice
        else:
            assert (
                table.shape == (len(measured_steps(budget_of(run, TINY)["steps"])), TINY.held_out)
                and np.abs(table[-1]).max() > 1e-2
            )


def test_rounds_draw_from_the_policy_as_it_is_by_then(finished, monkeypatch):
    """Each round asks the model that was trained so far for its own part of the prefixes; later windows hold
    pairs of all rounds so far, scored by the first reference; and the rate ends near zero."""
    world, plan = load_world(finished), TINY._replace(prefixes=80, steps=30)
    prompts = (world.train_prompts + world.held_out) * 6  # 84, so that each round has pairs
    world, drawn, taken = world._replace(train_prompts=prompts), [], []

    def draws(policy, prefixes, *rest):
        weights = torch.cat([w.detach().flatten() for w in policy.model.parameters()])
        rows = sentiment_world.sample_rows(policy, prefixes, *rest)
        drawn.append((list(prefixes), weights, rows))
        return rows

    def window_of(labelled, step):
        taken.append((len(drawn), len(labelled)))
        again = reference_logps(world.policy.model, [labelled[-1].example], micro_size=1, dtype="float32")
        # float32, added up in another order
        torch.testing.assert_close(labelled[-1].reference, again[0], rtol=0, atol=1e-4)
        return made(labelled, step)

    made, rates = sentiment_methods.window_of_prefixes, []
    train = sentiment_methods.train
    monkeypatch.setattr(sentiment_methods, "sample_rows", draws)
    monkeypatch.setattr(sentiment_methods, "window_of_prefixes", window_of)
    records = lambda *args, **more: (rates.append(r["learning_rate"]) or r for r in train(*args, **more))  # noqa: E731
    monkeypatch.setattr(sentiment_methods, "train", records)
    run = Run("DPO in rounds", "β 0.1", "rounds", "dpo", (("beta", 0.1),))
    steps = [step for step, _ in sentiment_methods.train_run(run, world, plan, finished)]
    assert steps == list(range(1, 61))
    assert [prompt for part in zip(*(prefixes for prefixes, _, _ in drawn)) for prompt in part] == prompts[
        :76
    ]
    reference = torch.cat([w.flatten() for w in world.policy.model.parameters()])
    assert torch.equal(drawn[0][1], reference)
    assert not any(torch.equal(a[1], b[1]) for a, b in combinations(drawn, 2))
    assert [sum(round == k for round, _ in taken) for k in (1, 2, 3, 4)] == [6, 12, 18, 24]
    counts = np.cumsum([sum(bool(row["pairs"]) for row in rows) for _, _, rows in drawn])
    assert all(size == counts[round - 1] for round, size in taken)
    assert rates[0] == pytest.approx(2e-3 / 2) and rates[-1] == pytest.approx(2e-3 / 60)


@pytest.mark.parametrize(
    ("name", "options"), [("dpo", {"beta": 0.3}), ("ipo", {"beta": 0.3}), ("orpo", {"lam": 0.7})]
)
def test_pairs_that_share_completions_have_the_loss_and_gradient_of_pairs_one_by_one(finished, name, options):
    """Also where prefixes have unequal numbers of pairs, in micro-batches of unequal size. In float32, whose
    sums another order moves by some 1e-6 of the largest term."""
    world = load_world(finished)
    model = copy.deepcopy(world.policy.model).requires_grad_(True)
    with torch.no_grad():  # away from the reference, where all pairs would pull alike
        model.h[0].mlp.c_fc.weight.mul_(1.5)
    labelled = [
        row._replace(pairs=row.pairs[: 1 + n % 3]) for n, row in enumerate(world.labelled) if row.pairs
    ]
    examples, reference = pairs_of(labelled)
    assert len(labelled) >= 5 and len(examples) > len(labelled)
    numbers = [*range(len(labelled))]
    together = window_of_prefixes(labelled, [numbers[:4], numbers[4:]])
    apart = make_window(examples, [[*range(len(examples))]], reference, dtype="float32", device="cpu")
    found = []
    for window, make in (
        (together, pairwise_objective),
        (apart, partial(preference_objective, dtype="float32")),
    ):
        objective = make(model, name, **options)
        loss = sum(share * objective(micro)[0] for micro, share in zip(*window[:2]))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_who_has_learnt_nothing_orders_no_pair(finished):
    """The reference: all ties, one half. One that prefers what was rejected: 0, and 1 the other way round."""
    world = load_world(finished)
    assert sentiment_methods.orders_rightly(world.policy.model, world) == pytest.approx(0.5)
    for sign, expected in ((1.0, 0.0), (-1.0, 1.0)):
        behind = world.held_out_reference + sign * torch.tensor([50.0, 0.0])
        moved = world._replace(held_out_reference=behind)
        assert sentiment_methods.orders_rightly(world.policy.model, moved) == pytest.approx(expected)


def test_the_share_of_the_possible_is_at_the_same_divergence():
    """Between two points in a straight line; not beyond the frontier, nor where all that is possible is 0."""
    frontier = [(0.0, 0.0), (1.0, 2.0), (3.0, 3.0)]
    assert share_of_possible(2.0, 1.0, frontier) == pytest.approx(0.4)
    assert share_of_possible(3.1, 1.0, frontier) is None and share_of_possible(0.05, 0.1, frontier) is None


# ------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--seed", "-1"], "--seed"),
        (["--workers", "0"], "--workers"),
        (["--prefixes", "3"], "--prefixes"),  # DPO in rounds parts them in four
        (["--resume", "nowhere"], "config.json"),
        (["--reviews", "nowhere.tsv"], "nowhere.tsv"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(flags, named, capsys):
    assert main(["sentiment", *flags]) == 2
    assert named in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_options_that_contradict_the_resumed_run_are_refused(capsys):
    options = {
        "reviews": None,
        "label_noise": "none",
        "prefixes": None,
        "steps": None,
        "methods": "all",
        "seeds": 1,
        "seed": 0,
        "quick": True,
        "output_dir": "run",
    }
    config = {"command": "sentiment", "options": options | {"plan": TINY._asdict()}, "threads": 1}
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(config))
    assert main(["sentiment", "--resume", "run", "--label-noise", "bradley-terry"]) == 2
    assert "--label-noise is none in that run" in capsys.readouterr().err
    Path("run/config.json").write_text(json.dumps(config | {"command": "dpo"}))
    assert main(["sentiment", "--resume", "run"]) == 2
    assert "'dpo'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("reviews", [False, True])
def test_the_whole_command(reviews, monkeypatch, capsys):
    """Table, figures and files of both kinds of data, the same with two processes as with one."""
    monkeypatch.setattr(sentiment, "QUICK", TINY)
    monkeypatch.setattr(sentiment, "QUICK_REVIEWS", TINY)
    flags = ["sentiment", "--quick"]
    if reviews:
        judged = ("poor", "fine")
        words = ["plot", "song", "scene", "actor", "joke", "end"]
        rows = [
            f"{k % 2}\tthe {words[k % 6]} and the {words[k // 6 % 6]} of film {k} are {judged[k % 2]} ."
            for k in range(120)
        ]
        Path("r.tsv").write_text("\n".join(rows))
        flags += ["--reviews", "r.tsv", "--label-noise", "bradley-terry"]
    assert main([*flags, "--workers", "1", "--output-dir", "one"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "DPO β 1" in printed and "On pairs: 6 steps of 8 completions" in printed
    assert "by the DPO β 2 implicit reward" in printed
    assert ("Bradley-Terry" in printed) == reviews and ("no finite optimum" in printed) != reviews
    assert main([*flags, "--workers", "2", "--output-dir", "two"]) == 0
    for name in ("metrics.jsonl", "samples.txt"):
        assert Path("one", name).read_text() == Path("two", name).read_text()
    with open("one/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    records = [json.loads(line) for line in Path("one/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["method"] not in ("Best of N", "Best of N-GT"):
            last = [r for r in records if (r["method"], r["setting"]) == (row["method"], row["setting"])][-1]
            assert float(row["reward"]) == pytest.approx(last["reward"])
            assert float(row["kl"]) == pytest.approx(last["kl"], abs=1e-9)
    for name in ("sentiment.png", "win_rates.png"):
        height, width = matplotlib.image.imread(f"one/{name}").shape[:2]
        assert width > 1000 and height > 700
