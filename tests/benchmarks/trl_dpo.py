"""TRL's DPOTrainer, trained by its own `train()`; a callback reports each step and waits for the next turn.

Its defaults stay: the loss, beta 0.1, dropout off, sdpa attention, fused AdamW without weight decay, clipping
to norm 1, logging every 10 steps, no evaluation, batches collated in the process itself, gradient
checkpointing, the reference as a second model that is run at every step, the whole step in one batch. Set
are the dtype (bf16 is its autocast of float32 weights), the batch, a constant learning rate, an end that never
comes, no saving, reporting or progress bar, and pairs in the file's order, which is random, so that its
losses can be compared. It gets text whose words are the tokens: it tokenises, adds its end-of-text and pads.
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

from .contestant import Turns
from .tasks import BETA, LEARNING_RATE, MAX_GRAD_NORM, Task, end_of_text, make_pairs

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


def pairs_of(trainer: DPOTrainer) -> list[list[list[int]]]:
    """[prompt, chosen, rejected] of an epoch as the model gets them: what loader and collator give, in order."""
    pairs = []
    for batch in trainer.get_train_dataloader():
        rows = []
        for ids, real, scored in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]):
            rows.append((ids[(real == 1) & (scored == 0)].tolist(), ids[(real & scored) == 1].tolist()))
        half = len(rows) // 2  # chosen first, then rejected
        for (prompt, chosen), (same_prompt, rejected) in zip(rows[:half], rows[half:]):
            assert prompt == same_prompt, "TRL's collator gave the two completions of a pair other prompts"
            pairs.append([prompt, chosen, rejected])
    return pairs


class TimedTrainer(DPOTrainer):
    """DPOTrainer that notes each step's loss, and how long its pass of the reference takes when warm."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, dataset, name, batch_size):
        rows = [dataset[index] for index in range(batch_size)]
        self.compute_ref_log_probs(self.model, self._prepare_inputs(self.data_collator(rows)))
        start = time.perf_counter()
        result = super()._precompute_ref_logps(dataset, name, batch_size)
        self.reference_seconds = time.perf_counter() - start
        return result

    def training_step(self, *args, **kwargs):
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class TakeTurns(TrainerCallback):
    """Hands the trainer's steps to `Turns`."""

    def __init__(self, turns: Turns, trainer: TimedTrainer):
        self.turns, self.trainer = turns, trainer

    def on_step_end(self, args, state, control, **kwargs):
        going = self.turns.step_done(args.per_device_train_batch_size, self.trainer.loss)
        control.should_training_stop = not going


def make_trainer(task: Task, output_dir: str, *, precomputed: bool, checkpointing: bool) -> TimedTrainer:
    """The trainer as a user would set it up, apart from what the module's docstring lists."""
    config = DPOConfig(
        output_dir=output_dir,
        beta=BETA,
        bf16=task.dtype == "bfloat16",
        use_cpu=task.device == "cpu",
        per_device_train_batch_size=task.pairs_per_step,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        max_steps=10**6,
        gradient_checkpointing=checkpointing,
        precompute_ref_log_probs=precomputed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task.seed,
    )
    return TimedTrainer(
        model=task.folder, args=config, train_dataset=as_text(task), processing_class=word_tokenizer(task)
    )


def train_trl(task: Task, turns: Turns, *, precomputed: bool, checkpointing: bool) -> None:
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(task, output_dir, precomputed=precomputed, checkpointing=checkpointing)
        if turns.ready(pairs_of(trainer), reference_seconds=trainer.reference_seconds):
            trainer.add_callback(TakeTurns(turns, trainer))
            trainer.train()
