"""TRL's DPOTrainer, trained by its own `train()`; a callback reports each step and waits for the next turn.

Its defaults stay: the loss, dropout off, sdpa attention, fused AdamW without weight decay, no evaluation,
logging every 10 steps, batches collated in the process itself, a step in one piece, gradient checkpointing,
and the reference as a second model that is run at every step. Set are the numbers of tasks.py, the dtype
(bf16 is its autocast of float32 weights), a constant learning rate, an end that never comes, no saving,
reporting or progress bar, and the order of the data, which is random, so that losses can be compared.
It gets text whose words are the tokens, so it tokenises, adds its end-of-text and pads by itself.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import peft
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from . import tasks
from .contestant import Turns
from .tasks import Task

_END = "<|endoftext|>"


def word_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """The text "t7 t3" is the tokens 7 and 3; the last id is end-of-text."""
    eot = tasks.end_of_text(task)
    tokenizer = Tokenizer(WordLevel({f"t{token}": token for token in range(eot)} | {_END: eot}, _END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(_END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)


def as_text(task: Task) -> Dataset:
    """The pairs as strings without end-of-text, which TRL adds."""

    def words(tokens: list[int]) -> str:
        return "".join(f" t{token}" for token in tokens)

    return Dataset.from_list(
        [
            {"prompt": words(prompt), "chosen": words(chosen[:-1]), "rejected": words(rejected[:-1])}
            for prompt, chosen, rejected in tasks.make_pairs(task)
        ]
    )


def pairs_of(trainer: DPOTrainer) -> list[list[list[int]]]:
    """[prompt, chosen, rejected] of an epoch, read back from the batches that the model will get."""
    pairs = []
    for batch in trainer.get_train_dataloader():
        parts = zip(batch["input_ids"], batch["attention_mask"] == 1, batch["completion_mask"] == 1)
        rows = [(ids[real & ~scored].tolist(), ids[scored].tolist()) for ids, real, scored in parts]
        half = len(rows) // 2  # the chosen ones come first
        for (prompt, chosen), (same_prompt, rejected) in zip(rows[:half], rows[half:]):
            assert prompt == same_prompt, "TRL gave the two completions of a pair other prompts"
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


def adapter_of(task: Task) -> tuple[dict, dict]:
    """Options of a LoraConfig, and the tensors to start from: those of ours."""
    folder = Path(task.folder, "adapter")
    config = {"r": tasks.RANK, "lora_alpha": tasks.ALPHA, "task_type": "CAUSAL_LM"}
    maps = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    return config | {"target_modules": maps}, load_file(folder / "adapter_model.safetensors")


def train_trl(
    task: Task, turns: Turns, *, precompute: bool = False, checkpoint: bool = True, lora: bool = False
) -> None:
    """Its training as a user would set it up, apart from what the module's docstring lists."""
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=tasks.BETA,
            bf16=task.dtype == "bfloat16",
            use_cpu=task.device == "cpu",
            per_device_train_batch_size=task.pairs_per_step,
            train_sampling_strategy="sequential",
            learning_rate=tasks.LEARNING_RATE * (tasks.LORA_RATE if lora else 1),
            lr_scheduler_type="constant",
            max_grad_norm=tasks.MAX_GRAD_NORM,
            max_steps=10**6,
            gradient_checkpointing=checkpoint,
            precompute_ref_log_probs=precompute,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=task.seed,
        )
        settings, adapter = adapter_of(task) if lora else (None, None)
        trainer = TimedTrainer(
            task.folder, args=config, train_dataset=as_text(task), processing_class=word_tokenizer(task),
            peft_config=peft.LoraConfig(**settings) if lora else None,
        )  # fmt: skip
        if lora:
            peft.set_peft_model_state_dict(trainer.model, adapter)
        if turns.ready(pairs_of(trainer), reference_seconds=trainer.reference_seconds):
            trainer.add_callback(TakeTurns(turns, trainer))
            trainer.train()
