"""What is measured of each policy of the sentiment experiment: a job for each training, and its file.

    RUN/methods/dpo-beta-0.1-seed-0.npz    rewards and log-ratios of its samples along the way, at other
                                           temperatures, on other prompts; what it writes
    RUN/methods/reward-model.npz           how well the learned reward judges held-out pairs
    RUN/methods/opponents.npz              rewards of samples of the SFT model, to win against
    RUN/methods/best-of-n.npz              128 samples of each of some prompts, with both rewards

A job needs only what `make_world` left and the reward model, so several processes share the list of them.
Every process uses one thread: results do not depend on how many there are.

But: no averages over seeds (results.py).

Shapes: P held-out prompts, Q of the other kind, L measurements, M temperatures.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...generation import generate, rows_at_once
from ...model import GPT
from ...policy import shared_prompt_batch, shared_prompt_logps
from ...rivals.reward_model import score_completions
from ..study import Job, kept
from .methods import PPO_EPOCHS, Run, fit_reward, load_reward_model, train_run
from .world import LONGEST, Plan, World, load_world

METHODS_FOLDER = "methods"
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
OTHER_TEMPERATURES = (0.25, 1.0)
DRAWS = 128  # of each prompt, for best of n
SHOWN = 8  # prompts whose samples are kept as text
_SAMPLES, _OPPONENT, _OTHER_OPPONENT, _DRAWS = range(4)  # streams of random numbers

Arrays = dict[str, np.ndarray]


class Drawn(NamedTuple):
    """One completion of each of N prompts.

    Fields:
        completions: token ids.
        rewards: (N,) true ones; log_ratios: (N,) log pi - log pi_ref, nats; reference_logps: (N,).
    """

    completions: list[list[int]]
    rewards: Tensor
    log_ratios: Tensor
    reference_logps: Tensor


def jobs_of(folder: Path, runs: Iterable[Run], plan: Plan) -> dict[str, Job]:
    """File's name -> the job that returns its arrays, and makes it where it is missing.

    The longest come first, so that none is last alone.
    """
    jobs = {"best-of-n": (draw_best_of_n, folder, plan), "opponents": (draw_opponents, folder, plan)}
    jobs |= {run.name: (measure, folder, run, plan) for run in sorted(runs, key=lambda r: r.kind != "ppo")}
    return {name: partial(kept, path_of(folder, name), *job) for name, job in jobs.items()}


def path_of(folder: Path, name: str) -> Path:
    """The file of a job."""
    return folder / METHODS_FOLDER / f"{name}.npz"


def learn_reward(folder: Path, plan: Plan, seed: int) -> Arrays:
    """The reward model, where it is missing; its held-out accuracy, on how many pairs, and seconds."""
    return kept(path_of(folder, "reward-model"), _learn_reward, folder, plan, seed)


def _learn_reward(folder: Path, plan: Plan, seed: int) -> Arrays:
    started = time.perf_counter()
    accuracy, count = fit_reward(folder, load_world(folder), plan, seed)
    facts = {"accuracy": accuracy, "pairs": count, "seconds": time.perf_counter() - started}
    return {name: np.array(fact) for name, fact in facts.items()}


# ------------------------------------------------------------------------------------------------ samples


def sampling_generator(*parts: int) -> torch.Generator:
    """Random numbers of a stage of their own: streams of different parts never meet."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**62
    return torch.Generator().manual_seed(seed)


def draw(
    model: GPT, world: World, prompts: list[list[int]], plan: Plan, stream: torch.Generator,
    temperature: float = 1.0,
) -> Drawn:  # fmt: skip
    """Sample each prompt once, judge it, and compare with the reference; log-ratios are at temperature 1."""
    completions: list[list[int]] = []
    logps = []
    together = rows_at_once(model, LONGEST + plan.max_new_tokens)
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        drawn = generate(
            model, some, max_new_tokens=plan.max_new_tokens, eos=world.policy.tokenizer.eot,
            temperature=temperature, generator=stream,
        )  # fmt: skip
        completions += drawn
        batch = shared_prompt_batch(some, [[y] for y in drawn])
        with torch.no_grad():
            logps.append([shared_prompt_logps(gpt, batch)[:, 0] for gpt in (model, world.policy.model)])
    own, theirs = (torch.cat(parts) for parts in zip(*logps))
    return Drawn(completions, world.truth(prompts, completions), own - theirs, theirs)


def repeated(ids: list[int]) -> float:
    """Share of a completion's runs of three tokens that it has written before: 0 where nothing recurs.

    >>> repeated([1, 2, 3, 1, 2, 3, 1, 2])     # six runs, three of them new
    0.5
    """
    runs = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# ---------------------------------------------------------------------------------------------- trainings


def measured_steps(steps: int) -> list[int]:
    """The steps after which a policy is measured: six, close together at first, multiples of PPO's epochs.

    >>> measured_steps(120)
    [6, 12, 24, 48, 84, 120]
    """
    rounds = steps // PPO_EPOCHS
    return sorted({PPO_EPOCHS * max(1, round(rounds * share)) for share in (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)})


def measure(folder: Path, run: Run, plan: Plan) -> Arrays:
    """Train one policy, and sample it along the way, always with the same random numbers of a seed."""
    world = load_world(folder)
    model, found = world.policy.model, {}
    seconds, started = 0.0, time.perf_counter()

    def sample(gpt: GPT, prompts: list[list[int]], temperature: float = 1.0, *parts: int) -> Drawn:
        return draw(gpt, world, prompts, plan, sampling_generator(_SAMPLES, run.seed, *parts), temperature)

    for step, model in train_run(run, world, plan, folder):
        if step in measured_steps(plan.steps):
            seconds += time.perf_counter() - started
            found[step] = sample(model, world.held_out)
            started = time.perf_counter()
    found = found or {0: sample(model, world.held_out)}  # the SFT model as it is
    arrays = {
        "steps": np.array(list(found)),
        "seconds": np.array(seconds),
        "rewards": torch.stack([drawn.rewards for drawn in found.values()]).numpy(),  # (L, P)
        "log_ratios": torch.stack([drawn.log_ratios for drawn in found.values()]).numpy(),
        **_character(list(found.values())[-1], world),
    }
    if run.full:  # (M, P) and (2, Q)
        for name, prompts, temperatures in (
            ("temperature_rewards", world.held_out, TEMPERATURES),
            ("other_rewards", world.other, OTHER_TEMPERATURES),
        ):
            drawn = [sample(model, prompts, t, 1 + round(100 * t), len(prompts)) for t in temperatures]
            arrays[name] = np.stack([each.rewards.numpy() for each in drawn])
    return arrays


def _character(drawn: Drawn, world: World) -> Arrays:
    """What samples are like: lengths, repetitions, likelihood under the reference, some texts."""
    tokenizer = world.policy.tokenizer
    lengths = torch.tensor([len(y) for y in drawn.completions])
    return {
        "lengths": lengths.numpy(),
        "ended": np.array([y[-1] == tokenizer.eot for y in drawn.completions]),
        "repeated": np.array([repeated(y) for y in drawn.completions]),
        "reference_token_logps": (drawn.reference_logps / lengths).numpy(),
        "texts": np.array([tokenizer.decode(y) for y in drawn.completions[:SHOWN]]),
    }


# --------------------------------------------------------------------------------- the SFT model's samples


def draw_opponents(folder: Path, plan: Plan) -> Arrays:
    """True rewards of a sample of each prompt, which all others are compared with."""
    world = load_world(folder)
    both = {"held_out": (world.held_out, _OPPONENT), "other": (world.other, _OTHER_OPPONENT)}
    return {
        name: draw(world.policy.model, world, prompts, plan, sampling_generator(stream)).rewards.numpy()
        for name, (prompts, stream) in both.items()
    }


def draw_best_of_n(folder: Path, plan: Plan) -> Arrays:
    """True and learned rewards (P', 128) of the samples of some prompts."""
    started = time.perf_counter()
    world, stream = load_world(folder), sampling_generator(_DRAWS)
    learned = load_reward_model(folder, world)
    model, tokenizer = world.policy
    rewards = []
    for prompt in world.held_out[: plan.best_of]:
        prompts = [prompt] * DRAWS
        drawn = generate(
            model, prompts, max_new_tokens=plan.max_new_tokens, eos=tokenizer.eot, generator=stream
        )
        rewards.append((world.truth(prompts, drawn), score_completions(learned, prompts, drawn)))
    true, by_model = (torch.stack(rows).numpy() for rows in zip(*rewards))
    return {"true": true, "learned": by_model, "seconds": np.array(time.perf_counter() - started)}
