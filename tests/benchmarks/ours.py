"""Our side: the package's own loop, as its `dpo` command runs it, and its `generate`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from dpo_minimal.batches import Example, windows
from dpo_minimal.checkpoint import load_model, save_model
from dpo_minimal.generation import generate
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.objectives import make_window, preference_objective, reference_logps
from dpo_minimal.train import make_optimizer, train

from .contestant import Turns
from .tasks import (
    BETA,
    CHECKED_STEPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NEW_TOKENS,
    SHAPES,
    Task,
    end_of_text,
    make_pairs,
    make_prompts,
)


def write_weights(task: Task) -> None:
    """The folder that every contestant loads: a GPT-2 with random weights."""
    torch.manual_seed(task.seed)
    config = GPTConfig(**{k: v for k, v in SHAPES[task.shape]._asdict().items() if k != "pairs_per_step"})
    save_model(GPT(config), task.folder, eos=end_of_text(task))


def steps(task: Task, examples: list[Example]) -> Iterator[list[list[int]]]:
    """Micro-batches of indices: the first steps in the file's order, as the peers take them, then ours."""
    for step in range(CHECKED_STEPS):
        rows = list(range(step * task.pairs_per_step, (step + 1) * task.pairs_per_step))
        yield [rows[start : start + task.micro_size] for start in range(0, len(rows), task.micro_size)]
    sizes = {"window_size": task.pairs_per_step, "micro_size": task.micro_size}
    for epoch in itertools.count():
        yield from windows(examples, **sizes, seed=task.seed, epoch=epoch)


def train_ours(task: Task, turns: Turns) -> None:
    """DPO with references cached, prompts shared and micro-batches by length."""
    model = load_model(task.folder).to(task.device)
    examples = [
        Example(prompt, [chosen, rejected], f"pair {number}")
        for number, (prompt, chosen, rejected) in enumerate(make_pairs(task), start=1)
    ]
    where = {"dtype": task.dtype, "device": task.device}
    reference_logps(model, examples[: task.micro_size], micro_size=task.micro_size, **where)  # warms up
    start = time.perf_counter()
    references = reference_logps(model, examples, micro_size=task.micro_size, **where)
    reference_seconds = time.perf_counter() - start

    objective = preference_objective(model, "dpo", dtype=task.dtype, beta=BETA)
    optimizer = make_optimizer(model.parameters(), "adamw", LEARNING_RATE)
    batches = (make_window(examples, step, references, **where) for step in steps(task, examples))
    rows = [[example.prompt, *example.completions] for example in examples]
    going = turns.ready(rows, reference_seconds=reference_seconds)
    records = train(objective, optimizer, batches, max_grad_norm=MAX_GRAD_NORM)
    while going:
        going = turns.step_done(task.pairs_per_step, next(records)["loss"])


def sample_ours(task: Task, turns: Turns) -> None:
    """64 sequences of 64 tokens at temperature 1, without an end-of-text."""
    model = load_model(task.folder).to(task.device)
    prompts = make_prompts(task)
    generator = torch.Generator(task.device).manual_seed(task.seed)
    going = turns.ready(prompts)
    while going:
        completions = generate(model, prompts, max_new_tokens=NEW_TOKENS, generator=generator)
        going = turns.step_done(sum(map(len, completions)))
