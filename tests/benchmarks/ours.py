"""Our side: the package's own loop, as its `dpo` command runs it, and its `generate`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dpo_minimal.generation import generate
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.text.adapters import add_adapter, learnt, save_adapter
from dpo_minimal.text.allocator import keep_freed_memory
from dpo_minimal.text.batches import Example, windows
from dpo_minimal.text.checkpoint import load_model, save_model
from dpo_minimal.text.objectives import make_window, preference_objective, reference_logps
from dpo_minimal.train import make_optimizer, train

from . import tasks
from .contestant import Turns
from .tasks import Task


def write_weights(task: Task) -> None:
    """The folder that every contestant loads: a GPT-2 with random weights; in it that of a new adapter."""
    shape = tasks.SHAPES[task.shape]._asdict()
    del shape["pairs_per_step"]
    torch.manual_seed(task.seed)
    model = GPT(GPTConfig(**shape))
    save_model(model, task.folder, eos=tasks.end_of_text(task))
    save_adapter(add_adapter(model, tasks.RANK, tasks.ALPHA, seed=task.seed), Path(task.folder, "adapter"))


def steps_of(task: Task, examples: list[Example]) -> Iterator[list[list[int]]]:
    """Micro-batches of indices: the first steps in the order of the data, as the peers go, then our own."""
    size, micro = task.pairs_per_step, task.micro_size
    for start in range(0, tasks.CHECKED_STEPS * size, size):
        rows = list(range(start, start + size))
        yield [rows[first : first + micro] for first in range(0, size, micro)]
    for epoch in itertools.count():
        yield from windows(examples, window_size=size, micro_size=micro, seed=task.seed, epoch=epoch)


def train_ours(task: Task, turns: Turns, *, lora: bool = False) -> None:
    """DPO with references cached, prompts shared and micro-batches by length."""
    keep_freed_memory()
    model = load_model(task.folder).to(task.device)
    pairs = tasks.make_pairs(task)
    examples = [Example(prompt, answers, f"pair {n}") for n, (prompt, *answers) in enumerate(pairs, start=1)]
    where = {"dtype": task.dtype, "device": task.device}
    reference_logps(model, examples[: task.micro_size], micro_size=task.micro_size, **where)  # warms up
    start = time.perf_counter()
    references = reference_logps(model, examples, micro_size=task.micro_size, **where)
    reference_seconds = time.perf_counter() - start

    rate = tasks.LEARNING_RATE
    if lora:
        model, rate = add_adapter(model, tasks.RANK, tasks.ALPHA, seed=task.seed), tasks.LORA_RATE * rate
    objective = preference_objective(model, "dpo", dtype=task.dtype, beta=tasks.BETA)
    optimizer = make_optimizer(learnt(model), "adamw", rate)
    batches = (make_window(examples, step, references, **where) for step in steps_of(task, examples))
    records = train(objective, optimizer, batches, max_grad_norm=tasks.MAX_GRAD_NORM)
    rows = [[example.prompt, *example.completions] for example in examples]
    going = turns.ready(rows, reference_seconds=reference_seconds)
    while going:
        going = turns.step_done(task.pairs_per_step, next(records)["loss"])


def sample_ours(task: Task, turns: Turns) -> None:
    """Samples at temperature 1, without an end-of-text."""
    model = load_model(task.folder).to(task.device)
    prompts = tasks.make_prompts(task)
    generator = torch.Generator(task.device).manual_seed(task.seed)
    going = turns.ready(prompts)
    while going:
        completions = generate(model, prompts, max_new_tokens=tasks.NEW_TOKENS, generator=generator)
        going = turns.step_done(sum(map(len, completions)))
