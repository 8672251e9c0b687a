"""Our side: the package's own loop, as its `dpo` command runs it, and its `generate`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from dpo_minimal.allocator import keep_freed_memory
from dpo_minimal.batches import Example, windows
from dpo_minimal.checkpoint import load_model, save_model
from dpo_minimal.generation import generate
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.objectives import make_window, preference_objective, reference_logps
from dpo_minimal.train import Window, make_optimizer, train

from .tasks import BETA, MAX_GRAD_NORM, NEW_TOKENS, SHAPES, Task, end_of_text, make_pairs, make_prompts
from .turns import Turns


def write_weights(task: Task) -> None:
    """The folder that every contestant loads: a GPT-2 with random weights."""
    config = GPTConfig(**{k: v for k, v in SHAPES[task.shape]._asdict().items() if k != "pairs_per_step"})
    save_model(GPT(config), task.folder, eos=end_of_text(task))


def train_ours(task: Task, turns: Turns) -> None:
    """DPO with references cached, prompts shared and micro-batches by length."""
    keep_freed_memory()
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

    def batches() -> Iterator[Window]:
        sizes = {"window_size": task.pairs_per_step, "micro_size": task.micro_size}
        for epoch in itertools.count():
            for step in windows(examples, **sizes, seed=task.seed, epoch=epoch):
                yield make_window(examples, step, references, **where)

    objective = preference_objective(model, "dpo", dtype=task.dtype, beta=BETA)
    optimizer = make_optimizer(model.parameters(), "adamw", task.learning_rate)
    rows = [[example.prompt, *example.completions] for example in examples]
    if not turns.ready(rows, reference_seconds=reference_seconds):
        return
    for record in train(objective, optimizer, batches(), max_grad_norm=MAX_GRAD_NORM):
        turns.losses.append(record["loss"])
        # Steps differ in length, by design; only a whole epoch costs what as many random batches hold.
        epoch_ends = record["step"] % task.steps_per_epoch == 0
        if not turns.step_done(task.pairs_per_step, may_pause=epoch_ends):
            return


def sample_ours(task: Task, turns: Turns) -> None:
    """64 sequences of 64 tokens by temperature 1, without an end-of-text."""
    model = load_model(task.folder).to(task.device)
    prompts = make_prompts(task)
    generator = torch.Generator(task.device).manual_seed(task.seed)
    going = turns.ready(prompts)
    while going:
        completions = generate(model, prompts, max_new_tokens=NEW_TOKENS, generator=generator)
        going = turns.step_done(sum(map(len, completions)))
