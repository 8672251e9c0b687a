"""What is measured of each policy of the sentiment experiment, and who measures it: one file a training.

    RUN/methods/dpo-beta-0.1-seed-0.npz    rewards and log-ratios of its samples along the way, at other
                                           temperatures, on other prompts; what it writes
    RUN/methods/best-of-n.npz              128 samples of each of some prompts, with both rewards

A training needs only what `make_world` left, so several processes share the list of them, and a file that is
there is not made again. Every process uses one thread: results do not depend on how many there are.

But: no averages over seeds (sentiment_report.py).

Shapes: P held-out prompts, Q of the other kind, L looks, M temperatures.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...generation import generate, rows_at_once
from ...model import GPT
from ...policy import shared_prompt_batch, shared_prompt_logps
from ...rivals.reward_model import score_completions
from ...text.allocator import keep_freed_memory
from ...text.runs import write_arrays
from ...validation import InputError
from .data import LONGEST, Plan
from .methods import PPO_EPOCHS, Run, fit_reward, load_reward_model, sampling_generator, train_run
from .world import World, load_world

METHODS_FOLDER = "methods"
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
OTHER_TEMPERATURES = (0.25, 1.0)
DRAWS = 128  # of each prompt, for best of n
SHOWN = 8  # prompts whose samples are kept as text
_LOOK, _OPPONENT, _OTHER_OPPONENT, _DRAWS = range(4)  # streams of random numbers


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


def looks_at(steps: int) -> list[int]:
    """The steps after which a policy is looked at: six, close together at first, multiples of PPO's epochs.

    >>> looks_at(120)
    [6, 12, 24, 48, 84, 120]
    """
    rounds = steps // PPO_EPOCHS
    return sorted({PPO_EPOCHS * max(1, round(rounds * share)) for share in (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)})


def draw(
    model: GPT,
    world: World,
    prompts: list[list[int]],
    plan: Plan,
    *,
    temperature: float,
    stream: torch.Generator,
) -> Drawn:
    """Sample each prompt once, judge it, and compare with the reference; log-ratios are at temperature 1."""
    reference = world.policy.model
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
            both = [shared_prompt_logps(network, batch)[:, 0] for network in (model, reference)]
        logps.append(torch.stack(both))
    own, theirs = torch.cat(logps, -1)
    return Drawn(completions, world.truth(prompts, completions), own - theirs, theirs)


def repeated(ids: list[int]) -> float:
    """Share of a completion's runs of three tokens that it has written before: 0 where nothing recurs.

    >>> repeated([1, 2, 3, 1, 2, 3, 1, 2])     # six runs, three of them new
    0.5
    """
    runs = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# ---------------------------------------------------------------------------------------------- trainings


def train_and_look(folder: Path, run: Run, plan: Plan) -> None:
    """Train one policy, look at it, and leave its file."""
    world = _world(folder)
    due = looks_at(plan.steps) if run.kind != "none" else []
    steps, looks, seconds, started = [0], [], 0.0, time.perf_counter()
    model = world.policy.model
    if run.kind == "none":
        looks.append(_look(model, world, plan, run.seed))
    for step, model in train_run(run, world, plan, folder):
        if step in due:
            seconds += time.perf_counter() - started
            looks.append(_look(model, world, plan, run.seed))
            steps.append(step)
            started = time.perf_counter()
    arrays = {
        "steps": np.array(steps[1:] or steps),
        "seconds": np.array(seconds),
        "rewards": torch.stack([look.rewards for look in looks]).numpy(),  # (L, P)
        "log_ratios": torch.stack([look.log_ratios for look in looks]).numpy(),
        **_of_the_last(looks[-1], world),
    }
    if run.full:
        arrays |= _elsewhere(model, world, plan, run.seed)
    write_arrays(path_of(folder, run), arrays)


def _look(model: GPT, world: World, plan: Plan, seed: int) -> Drawn:
    """Samples of the held-out prompts, always with the same random numbers of a seed."""
    stream = sampling_generator(_LOOK, seed)
    return draw(model, world, world.held_out, plan, temperature=1.0, stream=stream)


def _of_the_last(look: Drawn, world: World) -> dict[str, np.ndarray]:
    """What the end's samples are like: lengths, repetitions, likelihood under the reference, some texts."""
    tokenizer = world.policy.tokenizer
    lengths = torch.tensor([len(y) for y in look.completions])
    return {
        "lengths": lengths.numpy(),
        "ended": np.array([y[-1] == tokenizer.eot for y in look.completions]),
        "repeated": np.array([repeated(y) for y in look.completions]),
        "reference_token_logps": (look.reference_logps / lengths).numpy(),
        "texts": np.array([tokenizer.decode(y) for y in look.completions[:SHOWN]]),
    }


def _elsewhere(model: GPT, world: World, plan: Plan, seed: int) -> dict[str, np.ndarray]:
    """Rewards at other temperatures (M, P), and of other prompts (2, Q)."""

    def rewards(prompts: list[list[int]], temperature: float) -> np.ndarray:
        stream = sampling_generator(_LOOK, seed, 1 + round(100 * temperature), len(prompts))
        return draw(model, world, prompts, plan, temperature=temperature, stream=stream).rewards.numpy()

    return {
        "temperature_rewards": np.stack([rewards(world.held_out, t) for t in TEMPERATURES]),
        "other_rewards": np.stack([rewards(world.other, t) for t in OTHER_TEMPERATURES]),
    }


# ------------------------------------------------------------------------------------- reward and best of n


def fit_and_keep_reward(folder: Path, plan: Plan, seed: int) -> None:
    """The reward model, and reward-model.npz with its held-out accuracy."""
    started = time.perf_counter()
    accuracy, count = fit_reward(folder, _world(folder), plan, seed)
    facts = {"accuracy": accuracy, "pairs": count, "seconds": time.perf_counter() - started}
    write_arrays(
        folder / METHODS_FOLDER / "reward-model.npz", {key: np.array(value) for key, value in facts.items()}
    )


def draw_opponents(folder: Path, plan: Plan) -> None:
    """opponents.npz: a sample of the SFT model for each prompt, whose true rewards all others are held to."""
    world = _world(folder)
    both = {}
    for name, prompts, stream in (
        ("held_out", world.held_out, _OPPONENT),
        ("other", world.other, _OTHER_OPPONENT),
    ):
        drawn = draw(
            world.policy.model, world, prompts, plan, temperature=1.0, stream=sampling_generator(stream)
        )
        both[name] = drawn.rewards.numpy()
    write_arrays(folder / METHODS_FOLDER / "opponents.npz", both)


def draw_best_of_n(folder: Path, plan: Plan) -> None:
    """best-of-n.npz: true and learned rewards (P', 128) of the SFT model's samples of some prompts."""
    started = time.perf_counter()
    world, stream = _world(folder), sampling_generator(_DRAWS)
    learned = load_reward_model(folder, world)
    model, tokenizer = world.policy.model, world.policy.tokenizer
    true_rows, learned_rows = [], []
    for prompt in world.held_out[: plan.best_of]:
        prompts = [prompt] * DRAWS
        drawn = generate(
            model, prompts, max_new_tokens=plan.max_new_tokens, eos=tokenizer.eot, generator=stream
        )
        true_rows.append(world.truth(prompts, drawn))
        learned_rows.append(score_completions(learned, prompts, drawn))
    write_arrays(
        folder / METHODS_FOLDER / "best-of-n.npz",
        {"true": torch.stack(true_rows).numpy(), "learned": torch.stack(learned_rows).numpy(),
         "seconds": np.array(time.perf_counter() - started)},
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- the work


def path_of(folder: Path, run: Run) -> Path:
    """The file of a training."""
    return folder / METHODS_FOLDER / f"{run.name}.npz"


def run_all(folder: Path, runs: Iterable[Run], plan: Plan, *, seed: int, workers: int) -> None:
    """Make every file that is missing: what needs no learned reward first, beside the reward model itself.

    Raises InputError where a training failed, or a process died.
    """
    methods = folder / METHODS_FOLDER
    methods.mkdir(exist_ok=True)
    runs = sorted(runs, key=lambda run: run.kind != "ppo")  # the longest first, so that none is last alone
    first: list[tuple[Path, Callable, tuple]] = [
        (methods / "reward-model.npz", fit_and_keep_reward, (folder, plan, seed)),
        (methods / "opponents.npz", draw_opponents, (folder, plan)),
        *((path_of(folder, r), train_and_look, (folder, r, plan)) for r in runs if not r.learned),
    ]
    second: list[tuple[Path, Callable, tuple]] = [
        *((path_of(folder, r), train_and_look, (folder, r, plan)) for r in runs if r.learned),
        (methods / "best-of-n.npz", draw_best_of_n, (folder, plan)),
    ]
    missing = [[work for work in works if not work[0].exists()] for works in (first, second)]
    with tqdm(
        total=len(first) + len(second), initial=len(first) + len(second) - sum(map(len, missing)),
        desc="methods", unit="run", disable=None,
    ) as bar:  # fmt: skip
        for works in missing:
            _work(works, workers, bar)


def _work(works: list[tuple[Path, Callable, tuple]], workers: int, bar: tqdm) -> None:
    if workers == 1 or len(works) < 2:
        for _, function, arguments in works:
            function(*arguments)
            bar.update()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(works)), context, initializer=_start_worker) as pool:
        waiting = [pool.submit(function, *arguments) for _, function, arguments in works]
        try:
            for done in as_completed(waiting):
                done.result()
                bar.update()
        except BrokenProcessPool:
            raise InputError(
                "a process that trained a method died, maybe for want of memory; go on with --resume, and "
                "with --workers 1."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """One thread, and Ctrl-C ends it at once: what was not written is made again on --resume."""
    torch.set_num_threads(1)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _world(folder: Path) -> World:
    return _loaded(folder.resolve())


@cache
def _loaded(folder: Path) -> World:
    """Once a process, which trains many methods of one run."""
    return load_world(folder)
