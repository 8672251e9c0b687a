"""Four trainings, from the reference, towards a target known beforehand: the experiments of bandit."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...bandit import Bandit, dpo_objective, plackett_luce_objective
from ...closed_form import optimal_logps
from ...model import GPT, GPTConfig
from ...policy import Completions, EnumeratedPolicy, enumerate_completions
from ...preferences import Rankings, all_sets, expected_pairs, expected_rankings, random_cycles
from .fit import Outcome, Task, fit, fit_table, float64_table

# The table's training stops here: far below what anybody needs, far above float64's rounding.
TABULAR_BOUND = 1e-11  # or 1e-12 / beta where that is more: the rounding of scores grows like 1 / beta
RANKED = 4  # completions a ranking holds, where every prompt has as many

# The GPT's world. Five tokens and at most four of them make 341 completions a prompt; the width is far
# above V - 1 = 4, so every next-token distribution is within reach of the last layer.
VOCAB, EOS, MAX_LENGTH, PROMPT_LENGTH, GPT_PROMPTS = 5, 4, 4, 2, 4
QUICK_MAX_LENGTH = 3  # 85 completions a prompt
GPT_SHAPE = GPTConfig(vocab_size=VOCAB, block_size=PROMPT_LENGTH + MAX_LENGTH, n_layer=2, n_head=4, n_embd=32)
SHARPNESS = 5.0  # final LayerNorm gain of the reference: its conditionals are then far from uniform
CYCLES = 4  # random rings of compared completions: 8 comparisons for each completion instead of 340
# Adam's; gpt_schedule multiplies it. With a third of it some seeds are not there after 2,000 steps.
GPT_LEARNING_RATE = 2e-2


def gpt_schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: warm-up over the first 4 % of the steps, and half a cosine down to zero.

    Adam's steps do not shrink with the gradient, so at the end the policy is about one last step away from
    pi*. A line down to zero ends with rates of 1 / steps, a cosine with rates of its square. A short training
    has a lower rate, for it has no time to make good what large first steps do.
    """
    rise, fall = min(1, (step + 1) / (0.04 * steps)), (1 + math.cos(math.pi * step / steps)) / 2
    return min(1, math.sqrt(steps / 1000)) * rise * fall


@dataclass(frozen=True)
class Settings:
    """The checked options that the experiments depend on."""

    beta: float
    pairs: int
    table_steps: int
    gpt_steps: int
    seed: int
    device: str
    quick: bool = False  # a smaller world for the GPT


PURPOSES = ("world", "pairs", "gpt_weights", "gpt_world", "rankings")


def seeded_generator(settings: Settings, purpose: str) -> torch.Generator:
    """An independent stream of random numbers for each purpose, so that one experiment's draws do not
    depend on whether another ran."""
    return torch.Generator().manual_seed(len(PURPOSES) * settings.seed + PURPOSES.index(purpose))


def tabular(world: Bandit, settings: Settings) -> Outcome:
    """The population objective of all pairs, on a table of logits; target pi* [D4.4]."""
    rankings = expected_pairs(world.rewards, all_sets(world.exists))
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=settings.beta)
    return _fit_table("tabular", world, rankings, optimal, "pi*", settings)


def finite(world: Bandit, data: Rankings, estimate: Tensor, settings: Settings) -> Outcome:
    """The objective of sampled pairs; target pi_ref exp(r_hat / beta) / Z of the estimate [D11.8]."""
    target = optimal_logps(world.ref_logps, estimate, beta=settings.beta)
    outcome = _fit_table("finite", world, data, target, "MLE", settings)
    return replace(outcome, rankings=data)  # with counts as weights, which the training normalised


def plackett_luce(world: Bandit, settings: Settings, size: int) -> Outcome:
    """Rankings of `size` neighbours along random rings, all orders with their probability [D8.3]."""
    generator = seeded_generator(settings, "rankings")
    slate = random_cycles(world.exists, cycles=2, size=size, generator=generator)
    rankings = expected_rankings(world.rewards, slate)
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=settings.beta)
    return _fit_table("plackett_luce", world, rankings, optimal, "pi*", settings, plackett_luce_objective)


def _fit_table(
    name: str, world: Bandit, rankings: Rankings, target_logps: Tensor, target: str, settings: Settings,
    objective=dpo_objective,
) -> Outcome:  # fmt: skip
    tables = world.ref_logps, world.rewards, target_logps
    return fit_table(
        Task(name, target, settings.beta, *tables, rankings, objective), settings.device,
        steps=settings.table_steps, measure_every=5, stop_at_bound=max(TABULAR_BOUND, 1e-12 / settings.beta),
    )  # fmt: skip


def gpt_world(
    settings: Settings, shape: GPTConfig = GPT_SHAPE
) -> tuple[GPT, Tensor, Completions, Tensor, Rankings]:
    """The reference GPT, its prompts, all completions, their rewards, and the population of comparisons.

    Rewards are independent for every completion, with no structure that a network could guess. Their
    deviation is beta, for a spread of pi* / pi_ref that is the same for every beta, but at most one: beyond,
    labels would be all but certain and pairs say little.
    """
    generator = seeded_generator(settings, "gpt_world")
    with torch.random.fork_rng(devices=[]):  # GPT draws its weights from torch's global stream
        torch.manual_seed(seeded_generator(settings, "gpt_weights").initial_seed())
        reference = GPT(shape)
    with torch.no_grad():
        reference.ln_f.weight.mul_(SHARPNESS)
    words = VOCAB - 1
    prompts = torch.randperm(words**PROMPT_LENGTH, generator=generator)[:GPT_PROMPTS].sort().values
    prompts = torch.stack([prompts // words, prompts % words], -1)
    max_length = QUICK_MAX_LENGTH if settings.quick else MAX_LENGTH
    completions = enumerate_completions(VOCAB, max_length, EOS)
    X, Y = GPT_PROMPTS, len(completions.ids)
    rewards = min(settings.beta, 1) * torch.randn(X, Y, generator=generator, dtype=torch.float64)
    slate = random_cycles(torch.ones(X, Y, dtype=torch.bool), cycles=CYCLES, generator=generator)
    return reference, prompts, completions, rewards, expected_pairs(rewards, slate)


def gpt_population(settings: Settings) -> Outcome:
    """The population objective on a GPT, all of whose completions are enumerated; target pi* [D9.1]."""
    reference, prompts, completions, rewards, rankings = gpt_world(settings)
    device = settings.device
    completions = Completions(*(field.to(device) for field in completions))
    policy = EnumeratedPolicy(copy.deepcopy(reference), prompts.to(device), completions).to(device)
    ref_logps, rewards, rankings = float64_table(policy), rewards.to(device), rankings.to(device)
    # Gradients shrink like beta * deviation of rewards; Adam's floor must shrink along.
    floor = 1e-8 * settings.beta * min(settings.beta, 1)
    optimizer = torch.optim.Adam(
        policy.parameters(), lr=GPT_LEARNING_RATE, betas=(0.9, 0.95), eps=floor, fused=True
    )
    steps = settings.gpt_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: gpt_schedule(step, steps))
    tables = ref_logps, rewards, optimal_logps(ref_logps, rewards, beta=settings.beta)
    task = Task("gpt", "pi*", settings.beta, *tables, rankings, dpo_objective)
    return fit(task, policy, optimizer, steps=steps, measure_every=max(1, steps // 30), scheduler=schedule)
