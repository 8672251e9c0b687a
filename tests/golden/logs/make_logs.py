"""Make the logs of this folder again: TRL's DPOTrainer on a tiny GPT-2, healthy and with planted causes.

    python tests/golden/logs/make_logs.py    (requirements-bench.txt; some minutes)

Written with TRL 1.16, transformers 5.23. Each NAME.json is a trainer_state.json without what the doctor does
not read, each NAME.txt a console.
"""

import contextlib
import copy
import io
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
WORDS = ["<eos>", "<unk>", *"abcdefghij", "good", "bad"]
STEPS = 14


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )


def gpt(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    size = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, **rates, eos_token_id=0, bos_token_id=0))


def saved(model: GPT2LMHeadModel) -> str:
    """Its folder, to be loaded by name."""
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return folder


def pairs(count: int = 48, kind: str = "words", seed: int = 0) -> Dataset:
    """Prompts of three letters; chosen answers end with "good", rejected ones with "bad"."""
    draw = random.Random(seed)

    def text(count: int) -> str:
        return " ".join(draw.choices(WORDS[2:12], k=count))

    rows = []
    for _ in range(count):
        row = {
            "prompt": text(3) + " ",
            "chosen": text(draw.randint(1, 4)),
            "rejected": text(draw.randint(1, 4)),
        }
        if kind == "words":
            row["chosen"], row["rejected"] = row["chosen"] + " good", row["rejected"] + " bad"
        elif kind == "same":
            row["rejected"] = row["chosen"]
        rows.append(row)  # of kind "noise", who wins is chance
    return Dataset.from_list(rows)


def run(name: str, *, model=None, reference=None, rows=None, held_out=None, console=False, **options) -> None:
    """Train and write the log."""
    model = model or gpt()
    reference = reference or (None if isinstance(model, str) else copy.deepcopy(model))
    settings = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": STEPS,
        "eval_strategy": "steps", "eval_steps": 7, "eval_on_start": True, "use_cpu": True, "bf16": False,
        "report_to": [], "gradient_checkpointing": False, "save_strategy": "no", "seed": 0,
        "dataloader_num_workers": 0,
    } | options  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model, reference, args=DPOConfig(output_dir=folder, **settings), train_dataset=rows or pairs(),
            eval_dataset=held_out or pairs(12, seed=1), processing_class=tokenizer(),
        )  # fmt: skip
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they name files of this machine
            print(trainer.args if isinstance(model, str) else "")
            trainer.train()
    left_out = ("entropy", "runtime", "per_second", "token")
    history = [
        {key: value for key, value in record.items() if not any(part in key for part in left_out)}
        for record in trainer.state.log_history
        if "train_runtime" not in record
    ]
    if console:
        (HERE / f"{name}.txt").write_text(text.getvalue().replace(folder, "FOLDER"), encoding="utf-8")
    else:
        (HERE / f"{name}.json").write_text(json.dumps({"log_history": history}) + "\n", encoding="utf-8")
    print(f"{name}: {len(history)} records", flush=True)


RUNS = {
    "healthy": lambda name: run(name),
    "healthy-console": lambda name: run(name, console=True),
    "healthy-accumulated": lambda name: run(
        name, gradient_accumulation_steps=2, logging_steps=3, max_steps=18, bf16=True, eval_on_start=False,
    ),
    "healthy-precomputed": lambda name: run(
        name, precompute_ref_log_probs=True, num_train_epochs=2, max_steps=-1,
    ),
    "healthy-warm-up": lambda name: run(name, warmup_steps=4, beta=0.3, console=True),
    "healthy-ipo": lambda name: run(name, loss_type="ipo"),
    "healthy-hinge": lambda name: run(name, loss_type="hinge"),
    "healthy-label-smoothing": lambda name: run(name, label_smoothing=0.1),
    "other-reference": lambda name: run(name, reference=gpt(seed=1)),
    "beta-one-half": lambda name: run(name, beta=0.5),
    "dropout": lambda name: run(name, model=gpt(dropout=0.2), disable_dropout=False, beta=0.5),
    "same-pairs": lambda name: run(name, rows=pairs(kind="same"), held_out=pairs(12, "same", 1)),
    "shared-reference": lambda name: run(name, model=(model := gpt()), reference=copy.copy(model)),
    "learning-rate-too-high": lambda name: run(name, learning_rate=1.0, rows=pairs(kind="noise")),
    "bfloat16-weights": lambda name: run(
        name, model=saved(gpt()), model_init_kwargs={"dtype": "bfloat16"}, learning_rate=1e-7, console=True,
    ),
    "warm-up-too-long": lambda name: run(name, warmup_steps=100),
    "saturated": lambda name: run(name, learning_rate=2e-2, max_steps=120, logging_steps=5, eval_steps=60),
    "moving-reference": lambda name: run(
        name, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.9,
    ),
    "noise-learnt-by-heart": lambda name: run(
        name, rows=pairs(24, "noise"), held_out=pairs(24, "noise", 1), learning_rate=1e-2, max_steps=180,
        logging_steps=6, eval_steps=60,
    ),
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or RUNS:
        RUNS[name](name)
