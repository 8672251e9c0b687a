"""What methods of the sentiment experiment share besides pairs: the learned reward, and draws to choose from.

Both are in the run folder before any method is trained.

But: no PPO by the learned reward (methods.py), and no best of n of the draws (results.py).

Shapes: P' held-out prompts, 384 draws of each, T tokens of the longest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ...generation import generate
from ...model import GPT
from ...rivals.reward_model import RewardModel, fit_reward_model, score_completions
from ...text.batches import Example
from ...text.objectives import reference_logps
from ...text.runs import read_safetensors, write_atomically
from ..study import Arrays, Job, kept
from .world import K, Plan, Stream, World, load_world, path_of, sampling_generator

REWARD_EPOCHS = 3  # App. C.1
REWARD_MODEL_FILE = "reward_model.safetensors"
DRAWS = 384  # of each prompt, for best of n


def first_jobs(folder: Path, plan: Plan, seed: int) -> list[Job]:
    """What other jobs need: the reward model, and the draws for best of n. `make_world` comes before them."""
    jobs = {"reward-model": (learn_reward, folder, plan, seed), "draws": (draw_for_best_of_n, folder, plan)}
    return [partial(kept, path_of(folder, name), *job) for name, job in jobs.items()]


def learn_reward(folder: Path, plan: Plan, seed: int) -> Arrays:
    """Fit a reward model to the pairs, and keep it in the folder.

    Returns: its accuracy on the held-out pairs, how many these are, and seconds.
    """
    started, world = time.perf_counter(), load_world(folder)
    held_out = world.held_out_pairs
    model, records = fit_reward_model(
        world.policy.model, world.examples, held_out, learning_rate=plan.learning_rate,
        batch_size=K * plan.batch, epochs=REWARD_EPOCHS, seed=seed, look_every=30,
    )  # fmt: skip
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / REWARD_MODEL_FILE, lambda path: safetensors.torch.save_file(weights, path))
    accuracy = max(record.get("eval_rewards/accuracies", 0.0) for record in records)
    return {"accuracy": accuracy, "pairs": len(held_out), "seconds": time.perf_counter() - started}


def load_reward_model(folder: Path, world: World) -> RewardModel:
    """The reward model of this run."""
    model = RewardModel(copy.deepcopy(world.policy.model))
    model.load_state_dict(read_safetensors(folder / REWARD_MODEL_FILE))
    return model.requires_grad_(False)


def draw_for_best_of_n(folder: Path, plan: Plan) -> Arrays:
    """Samples of the reference for some prompts, as token ids (P', 384, T) with -1 after the end."""
    world, stream, rows = load_world(folder), sampling_generator(Stream.DRAWS), []
    most, (model, tokenizer) = plan.max_new_tokens, world.policy
    for prompt in world.held_out[: plan.best_of]:
        rows += generate(model, [prompt] * DRAWS, max_new_tokens=most, eos=tokenizer.eot, generator=stream)
    ids = torch.tensor([row + [-1] * (most - len(row)) for row in rows], dtype=torch.int16)
    return {"ids": ids.view(-1, DRAWS, most)}


def draws_of(folder: Path, world: World) -> list[Example]:
    """What `draw_for_best_of_n` left: 384 of a prompt, then those of the next."""
    ids = kept(path_of(folder, "draws"), draw_for_best_of_n)["ids"].tolist()
    both = ((prompt, row) for prompt, rows in zip(world.held_out, ids) for row in rows)
    return [Example(prompt, [[token for token in row if token >= 0]], "") for prompt, row in both]


def logps_of_draws(model: GPT, draws: Sequence[Example]) -> Tensor:
    """(P', 384) log pi of the draws."""
    return reference_logps(model, draws, micro_size=64, dtype="float32").view(-1, DRAWS)


def judge_draws(folder: Path, plan: Plan) -> Arrays:
    """True and learned rewards and log pi_ref, (P', 384) each, of the draws for best of n."""
    started, world = time.perf_counter(), load_world(folder)
    draws = draws_of(folder, world)
    both = [draw.prompt for draw in draws], [draw.completions[0] for draw in draws]
    rewards = {
        "true": world.truth(*both),
        "learned": score_completions(load_reward_model(folder, world), *both),
    }
    arrays = {name: each.view(-1, DRAWS) for name, each in rewards.items()}
    arrays["reference"] = logps_of_draws(world.policy.model, draws)
    return arrays | {"seconds": time.perf_counter() - started}
