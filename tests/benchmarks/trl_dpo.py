"""TRL's DPOTrainer, trained by its own `train()`; a callback reports each step and waits for the next turn.

Its defaults stay: loss, beta 0.1, dropout off, fused AdamW without weight decay, clipping to norm 1, logging
every 10 steps, gradient checkpointing, the reference as a second model that is run at every step. Set are the
dtype, the batch, a constant learning rate, an end that never comes, and no saving, reporting or progress bar.
It gets text whose words are the tokens, so it tokenises, adds its end-of-text and pads by itself.
"""

from __future__ import annotations

import tempfile
import time

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from .tasks import Task, end_of_text, make_pairs
from .turns import Turns

_END = "<|endoftext|>"


def word_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """The text "t7 t3" is the tokens 7 and 3; the last id is end-of-text."""
    words = {f"t{token}": token for token in range(end_of_text(task))}
    tokenizer = Tokenizer(WordLevel(words | {_END: end_of_text(task)}, unk_token=_END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(_END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)


def as_text(task: Task) -> Dataset:
    """The pairs as strings without end-of-text, which TRL adds."""

    def words(tokens: list[int]) -> str:
        return " ".join(f"t{token}" for token in tokens)

    return Dataset.from_list(
        [
            {
                "prompt": words(prompt),
                "chosen": " " + words(chosen[:-1]),
                "rejected": " " + words(rejected[:-1]),
            }
            for prompt, chosen, rejected in make_pairs(task)
        ]
    )


class TimedTrainer(DPOTrainer):
    """DPOTrainer that notes how long its pass of the reference takes, after one batch to warm up."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, dataset, name, batch_size):
        rows = [dataset[index] for index in range(batch_size)]
        self.compute_ref_log_probs(self.model, self._prepare_inputs(self.data_collator(rows)))
        start = time.perf_counter()
        result = super()._precompute_ref_logps(dataset, name, batch_size)
        self.reference_seconds = time.perf_counter() - start
        return result


class TakeTurns(TrainerCallback):
    """Hands the trainer's steps and logged losses to `Turns`."""

    def __init__(self, turns: Turns, pairs_per_step: int):
        self.turns, self.pairs_per_step = turns, pairs_per_step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = not self.turns.step_done(self.pairs_per_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.turns.losses.append(logs["loss"])


def make_trainer(task: Task, output_dir: str, *, precomputed: bool, checkpointing: bool) -> TimedTrainer:
    """The trainer as a user would set it up, apart from what the module's docstring lists."""
    logging = {} if task.log_every is None else {"logging_steps": task.log_every}
    config = DPOConfig(
        output_dir=output_dir,
        bf16=task.dtype == "bfloat16",
        use_cpu=task.device == "cpu",
        per_device_train_batch_size=task.pairs_per_step,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        max_steps=10**6,
        gradient_checkpointing=checkpointing,
        precompute_ref_log_probs=precomputed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task.seed,
        **logging,
    )
    return TimedTrainer(
        model=task.folder, args=config, train_dataset=as_text(task), processing_class=word_tokenizer(task)
    )


def train_trl(task: Task, turns: Turns, *, precomputed: bool, checkpointing: bool) -> None:
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(task, output_dir, precomputed=precomputed, checkpointing=checkpointing)
        columns = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        rows = [list(row.values()) for row in columns]
        if turns.ready(rows, reference_seconds=trainer.reference_seconds):
            trainer.add_callback(TakeTurns(turns, task.pairs_per_step))
            trainer.train()
