"""The methods of the sentiment experiment: how each is trained, and what is measured of it.

What every method has in common is what people tell it: a number of completions with a true reward behind
them, those of the pairs, four a prefix, or as many that PPO with the true reward draws for itself. (A tenth
of the pairs is held out, to tell how much was learnt from the others.) On pairs all take as many steps, at a
learning rate that falls to zero: enough, in the default plan, for DPO to judge held-out pairs no better in
the end. A step takes prefixes with all their pairs, so that a completion is scored once for three of them.
DPO in rounds draws the pairs of each quarter of the prefixes from the policy that it is by then; it takes
twice as many steps, as most of its pairs come late, at twice the rate, because its own draws show what went
astray. PPO makes its draws, and three gradient steps on each 64 of them. One rate, chosen once on the grammar
by DPO and PPO-GT, is everybody else's: from 6e-4 on DPO left the language early. AdamW's steps do not depend
on the scale of a loss, which is what makes one rate a fair one; losses that pull in another way may still
deserve another.

Each job leaves arrays in RUN/methods, such as dpo-beta-0.1-seed-0.npz; `measure`, `draw_opponents` and those
of rewards.py say which.

But: no averages over seeds (results.py).

Shapes: P held-out prompts, Q of the other kind, L measurements, M temperatures.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...model import GPT
from ...policy import SharedPromptBatch
from ...rivals.evaluate import draw
from ...rivals.ppo import PPOSettings, train_ppo
from ...rivals.reward_model import normalised_reward
from ...text.batches import Example, in_passes, windows, with_mismatched
from ...text.objectives import (
    PreferenceBatch,
    completion_logps_of,
    layout,
    loss_of,
    make_window,
    preference_objective,
    reference_logps,
    sft_objective,
)  # fmt: skip
from ...train import Objective, Window, average, make_optimizer, train
from ...zoo import LOSSES
from ..study import Arrays, Job, kept
from .rewards import draws_of, judge_draws, load_reward_model, logps_of_draws
from .world import (
    K,
    Labelled,
    Plan,
    Stream,
    World,
    first_held_out,
    labelled_of,
    load_world,
    path_of,
    sample_rows,
    sampling_generator,
    with_pairs,
)

BETAS, TARGET = (0.1, 1.0, 2.0), 6.0  # of DPO; nats, of PPO
ROUNDS, ROUNDS_BETA = 4, 4.0
ROUNDS_STEPS, ROUNDS_RATE = 2, 2.0  # times what it is on pairs that are there at once
REPEATED = ("DPO", "DPO in rounds", "PPO", "PPO-GT", "SFT")  # if `full`, with several seeds; others with one
PPO_EPOCHS, PPO_BATCH = 3, 8  # gradient steps on each round's samples; these are so often as many as a batch
FIRST_COEFFICIENT = 0.1  # of PPO's KL penalty, before it is steered
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
OTHER_TEMPERATURES = (0.25, 1.0)
SHOWN = 8  # prompts whose samples are kept as text


class Run(NamedTuple):
    """One training."""

    method: str
    setting: str  # "β 0.1"
    kind: str  # "none" (the SFT model as it is), "sft" (on the chosen), "pairs", "rounds", "ppo"
    loss_type: str = ""  # of "pairs" and "rounds", with its options, as `preference_objective` takes them
    options: tuple[tuple[str, float], ...] = ()
    target: float = math.nan  # of "ppo", nats
    learned: bool = False  # of "ppo": by the learned reward, or by the true one
    seed: int = 0  # of the order of data, or of PPO's samples
    full: bool = False  # measured at other temperatures and on other prompts too

    @property
    def name(self) -> str:
        """A file's name."""
        words = f"{self.method} {self.setting} seed {self.seed}".lower()
        words = words.translate(str.maketrans({"β": "beta", "α": "alpha", "γ": "gamma", "λ": "lambda"}))
        return "-".join(re.findall(r"[a-z0-9.]+", words))


def all_runs(*, seeds: int, quick: bool) -> list[Run]:
    """Every training of a run of the command, in the table's order; --quick has fewer settings."""

    def pairs(name: str, full: bool = False, **options: float) -> Run:
        loss = LOSSES[name]
        setting = ", ".join(f"{o.symbol} {options[o.name]:g}" for o in loss.options if o.symbol)
        return Run(loss.title, setting, "pairs", name, tuple(options.items()), full=full)

    in_rounds = pairs("dpo", True, beta=ROUNDS_BETA)._replace(method="DPO in rounds", kind="rounds")
    distinct = [
        Run("SFT", "", "none", full=True),
        Run("Preferred-FT", "", "sft", full=True),
        *(pairs("dpo", full=b == BETAS[-1], beta=b) for b in (BETAS[1:] if quick else BETAS)),
        in_rounds,
        pairs("unlikelihood", full=True, alpha=1.0), pairs("ipo", beta=0.1),
        pairs("kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0), pairs("orpo", lam=1.0),
        Run("PPO", f"KL {TARGET:g}", "ppo", target=TARGET, learned=True, full=True),
        Run("PPO-GT", f"KL {TARGET:g}", "ppo", target=TARGET, full=True),
    ]  # fmt: skip
    count = {run: seeds if run.full and run.method in REPEATED else 1 for run in distinct}
    return [run._replace(seed=seed) for run in distinct for seed in range(count[run])]


def budget_of(run: Run, plan: Plan) -> dict[str, int]:
    """What a run uses: gradient steps, completions in each, completions with a true reward behind them.

    PPO by the learned reward knows no more true rewards than the pairs do, however often it is asked.
    """
    steps, completions, judged = plan.steps, K * plan.batch, K * plan.prefixes
    if run.kind == "none":
        return {"steps": 0, "completions": 0, "judged": 0}
    if run.kind == "rounds":
        steps *= ROUNDS_STEPS
    if run.kind == "ppo":
        completions = PPO_BATCH * plan.batch
        steps = PPO_EPOCHS * (judged // completions)
    return {"steps": steps, "completions": completions, "judged": judged}


def jobs_of(folder: Path, runs: Iterable[Run], plan: Plan) -> dict[str, Job]:
    """File's name -> the job that returns its arrays, and makes it where it is missing.

    The longest come first, so that none is last alone. Each needs what `first_jobs` left.
    """
    jobs = {"best-of-n": (judge_draws, folder, plan), "opponents": (draw_opponents, folder, plan)}
    jobs |= {run.name: (measure, folder, run, plan) for run in sorted(runs, key=lambda r: r.kind != "ppo")}
    return {name: partial(kept, path_of(folder, name), *job) for name, job in jobs.items()}


# ----------------------------------------------------------------------------------------------- training


def train_run(run: Run, world: World, plan: Plan, folder: Path) -> Iterator[tuple[int, GPT]]:
    """Train one run's policy; yields (steps done, the policy) whenever steps were made, or at 0."""
    model = copy.deepcopy(world.policy.model).requires_grad_(True)
    if run.kind == "none":
        yield 0, model
        return
    if run.kind == "ppo":
        reward, each = world.truth, PPO_EPOCHS
        if run.learned:
            samples = [row["completions"] for row in world.rows]
            reward = normalised_reward(load_reward_model(folder, world), world.train_prompts, samples)
        records = train_ppo(
            model, world.policy.model, world.train_prompts, reward, ppo_settings(run, plan),
            eos=world.policy.tokenizer.eot,
        )  # fmt: skip
    else:
        steps = budget_of(run, plan)["steps"]
        objective, stream = _learn_from_pairs(run, world, plan, model, steps)
        rate = plan.learning_rate * (ROUNDS_RATE if run.kind == "rounds" else 1.0)
        optimizer = make_optimizer(model.parameters(), "adamw", rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(  # rises over the warm-up, and falls to zero
            optimizer, lambda done: min(1, (done + 1) / plan.warmup) * (1 - done / steps)
        )
        records, each = train(objective, optimizer, stream, scheduler=scheduler, max_grad_norm=1.0), 1
    for record in records:
        yield each * int(record["step"]), model


class PairsOfPrefixes(NamedTuple):
    """A micro-batch of B prefixes with all their pairs: a completion is scored once, and is in several."""

    batch: SharedPromptBatch
    reference: Tensor  # (B, K) log pi_ref, nats
    pairs: Tensor  # (N, 3) prefix, chosen, rejected


def pairwise_objective(model: GPT, loss_type: str, **options: float) -> Objective:
    """`PairsOfPrefixes` -> (mean loss of the pairs, no metrics), like `preference_objective`."""
    loss = LOSSES[loss_type]

    def objective(micro: PairsOfPrefixes) -> tuple[Tensor, dict[str, Tensor]]:
        logps = completion_logps_of(model, micro.batch, "float32")
        where = micro.pairs[:, :1], micro.pairs[:, 1:]  # (N, 2) out of (B, K)
        lengths = micro.batch.completion_lengths[where]  # of the batch a loss reads no more
        pairs = PreferenceBatch(micro.batch._replace(completion_lengths=lengths), micro.reference[where])
        return loss_of(loss, logps[where], pairs, options).losses.mean(), {}

    return objective


def _learn_from_pairs(
    run: Run, world: World, plan: Plan, model: GPT, steps: int
) -> tuple[Objective, Iterator[Window]]:
    """The objective of a run, and its windows, epoch after epoch, as many as steps.

    An epoch's rest that makes no whole window is passed over, so that every step has the same size.
    """
    size, options = K * plan.batch, dict(run.options)
    if run.kind == "sft":
        chosen = [row._replace(completions=row.completions[:1]) for row in world.examples]
        return sft_objective(model, dtype="float32"), _windows(chosen, None, size, steps, run.seed)
    if "kl_estimate" in LOSSES[run.loss_type].reads:  # one more completion is scored, but teaches nothing
        examples = with_mismatched(world.examples, max_length=plan.context)
        reference = reference_logps(world.policy.model, examples, micro_size=16, dtype="float32")
        objective = preference_objective(model, run.loss_type, dtype="float32", **options)
        return objective, _windows(examples, reference, size // 2, steps, run.seed, model)
    objective = pairwise_objective(model, run.loss_type, **options)
    if run.kind == "rounds":
        return objective, _in_rounds(model, run.seed, world, plan, steps)
    return objective, _windows_of_prefixes(world.labelled, plan.batch, steps, run.seed)


def _windows(
    examples: Sequence[Example], reference: Tensor | None, size: int, steps: int, seed: int,
    policy: GPT | None = None,
) -> Iterator[Window]:  # fmt: skip
    """Windows of so many rows, each by itself."""
    of_rows = partial(
        make_window, examples, reference=reference, dtype="float32", device="cpu", policy=policy
    )
    return map(of_rows, _whole_windows(examples, size, 16, steps, seed))


def _windows_of_prefixes(labelled: Sequence[Labelled], size: int, steps: int, seed: int) -> Iterator[Window]:
    """Windows of so many prefixes with all their pairs."""
    some = with_pairs(labelled)
    whole = _whole_windows([row.example for row in some], size, 4, steps, seed)
    return map(partial(window_of_prefixes, some), whole)


def window_of_prefixes(labelled: Sequence[Labelled], step: list[list[int]]) -> Window:
    """Micro-batches of prefixes by their numbers; every pair of the window counts alike."""
    micro_batches = []
    for rows in ([labelled[n] for n in numbers] for numbers in step):
        batch = layout([row.example for row in rows], dtype="float32", device="cpu")
        pairs = torch.tensor([(n, *pair) for n, row in enumerate(rows) for pair in row.pairs])
        reference = torch.stack([row.reference for row in rows])
        micro_batches.append(PairsOfPrefixes(batch, reference, pairs))
    count = sum(len(micro.pairs) for micro in micro_batches)
    return Window(micro_batches, [len(micro.pairs) / count for micro in micro_batches])


def _whole_windows(
    examples: Sequence[Example], size: int, micro_size: int, steps: int, seed: int
) -> Iterator[list[list[int]]]:
    """The rows of so many steps, epoch after epoch, all of one size."""
    size = min(size, len(examples))
    whole = (
        rows
        for epoch in itertools.count()
        for rows in windows(
            examples, window_size=size, micro_size=min(micro_size, size), seed=seed, epoch=epoch
        )
        if sum(map(len, rows)) == size
    )
    return itertools.islice(whole, steps)


def _in_rounds(model: GPT, seed: int, world: World, plan: Plan, steps: int) -> Iterator[Window]:
    """Windows of prefixes whose completions the model itself draws: a part of them a round, labelled alike.

    It is drawn from when a round begins, as it is by then, and goes on with the pairs of all rounds so far.
    The rounds of R have 1/R, 2/R, ... of all pairs, and steps in that proportion.
    """
    prompts = world.train_prompts[: first_held_out(world.train_prompts)]
    policy = world.policy._replace(model=model)
    labelled: list[Labelled] = []
    for number in range(ROUNDS):
        stream = sampling_generator(Stream.ROUNDS, seed, number).initial_seed()
        rows = sample_rows(policy, prompts[number::ROUNDS], world.truth, plan, stream)
        labelled += labelled_of(rows, world.policy.model)
        ends = [steps * k * (k + 1) // (ROUNDS * (ROUNDS + 1)) for k in (number, number + 1)]
        yield from _windows_of_prefixes(labelled, plan.batch, ends[1] - ends[0], 1000 * seed + number)


def ppo_settings(run: Run, plan: Plan) -> PPOSettings:
    """PPO within the common budget: its value function learns beside the policy, at five times the rate."""
    return PPOSettings(
        iterations=budget_of(run, plan)["steps"] // PPO_EPOCHS, prompts=PPO_BATCH * plan.batch,
        epochs=PPO_EPOCHS, micro_size=16, learning_rate=plan.learning_rate,
        value_learning_rate=5 * plan.learning_rate, clip=0.2,
        kl_coefficient=FIRST_COEFFICIENT, target_kl=run.target, max_new_tokens=plan.max_new_tokens,
        max_grad_norm=1.0, seed=run.seed,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- measuring


def sample(
    model: GPT, world: World, prompts: list[list[int]], plan: Plan, *stream: int, temperature: float = 1.0
) -> tuple[list[list[int]], Tensor, Tensor]:
    """One completion of each prompt, with log pi and log pi_ref; stream: see `sampling_generator`."""
    return draw(
        model, world.policy.model, prompts, max_new_tokens=plan.max_new_tokens,
        eos=world.policy.tokenizer.eot, temperature=temperature, generator=sampling_generator(*stream),
    )  # fmt: skip


def repeated(ids: list[int]) -> float:
    """Share of a completion's runs of three tokens that it has written before: 0 where nothing recurs.

    >>> repeated([1, 2, 3, 1, 2, 3, 1, 2])     # six runs, three of them new
    0.5
    """
    runs = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def orders_rightly(model: GPT, world: World) -> float:
    """Share of held-out pairs whose chosen completion gained on the rejected one; of a tie one half."""
    pairs = world.held_out_pairs
    window = make_window(pairs, in_passes(pairs, 16), world.held_out_reference, dtype="float32", device="cpu")
    found = average(preference_objective(model, "dpo", dtype="float32", beta=1.0), window)
    return found["rewards/accuracies"] + found["dpo/ties"] / 2


def measured_steps(steps: int) -> list[int]:
    """The steps after which a policy is measured: six, close together at first, all but the last multiples
    of PPO's epochs.

    >>> measured_steps(120)
    [6, 12, 24, 48, 84, 120]
    """
    rounds = steps // PPO_EPOCHS
    early = {PPO_EPOCHS * max(1, round(rounds * share)) for share in (0.05, 0.1, 0.2, 0.4, 0.7)}
    return sorted({min(step, steps) for step in early} | {steps})


def measure(folder: Path, run: Run, plan: Plan) -> Arrays:
    """Train one policy, and sample it along the way, always with the same random numbers of a seed."""
    world = load_world(folder)
    tokenizer = world.policy.tokenizer
    prompts, seconds, started = world.held_out, 0.0, time.perf_counter()
    steps, rewards, log_ratios, accuracies = [], [], [], []
    for step, model in train_run(run, world, plan, folder):
        if step in (0, *measured_steps(budget_of(run, plan)["steps"])):
            seconds += time.perf_counter() - started
            completions, logps, ref_logps = sample(model, world, prompts, plan, Stream.SAMPLES, run.seed)
            steps.append(step)
            rewards.append(world.truth(prompts, completions))
            log_ratios.append(logps - ref_logps)
            accuracies.append(orders_rightly(model, world))
            started = time.perf_counter()
    lengths = torch.tensor([len(y) for y in completions])
    arrays = {
        "steps": steps,
        "seconds": seconds,
        "rewards": torch.stack(rewards),  # (L, P)
        "log_ratios": torch.stack(log_ratios),
        "accuracies": accuracies,  # (L,)
        "lengths": lengths,  # (P,) as what follows, of the end's samples
        "ended": [y[-1] == tokenizer.eot for y in completions],
        "repeated": [repeated(y) for y in completions],
        "reference_token_logps": ref_logps / lengths,
        "texts": [tokenizer.decode(y) for y in completions[:SHOWN]],
    }
    if run.method == "DPO":  # for its implicit reward of the draws, beta log pi / pi_ref
        arrays["draw_logps"] = logps_of_draws(model, draws_of(folder, world))
    if run.full:  # (M, P) and (2, Q)
        for name, prompts, temperatures in (
            ("temperature_rewards", world.held_out, TEMPERATURES),
            ("other_rewards", world.other, OTHER_TEMPERATURES),
        ):
            rewards = []
            for t in temperatures:
                parts = Stream.SAMPLES, run.seed, 1 + round(100 * t), len(prompts)
                completions, _, _ = sample(model, world, prompts, plan, *parts, temperature=t)
                rewards.append(world.truth(prompts, completions))
            arrays[name] = torch.stack(rewards)
    return arrays


def draw_opponents(folder: Path, plan: Plan) -> Arrays:
    """True rewards of a sample of each prompt, which all others are compared with."""
    world = load_world(folder)
    both = {"held_out": (world.held_out, Stream.OPPONENT), "other": (world.other, Stream.OTHER_OPPONENT)}
    return {
        name: world.truth(prompts, sample(world.policy.model, world, prompts, plan, stream)[0])
        for name, (prompts, stream) in both.items()
    }
