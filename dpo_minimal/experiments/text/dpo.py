"""`python -m dpo_minimal dpo`: a language model learns from preferences, without a reward model.

Pairs of completions of one prompt, chosen and rejected, and a reference pi_ref: the model that training
starts from. The loss of a pair is

  -log sigmoid(beta (log pi(yw|x)/pi_ref(yw|x) - log pi(yl|x)/pi_ref(yl|x)))                       (Eq. 7)

and its optimum is pi_ref exp(r / beta) / Z for the reward r behind the preferences (derivations.md).

  dpo-minimal dpo                                            film reviews: SFT, then DPO on judged samples
                                                             of the SFT model, in a minute or two
  dpo-minimal dpo --data pairs.jsonl --model runs/sft-001    your pairs, from your SFT model
  dpo-minimal dpo --data pairs.jsonl --model gpt2 --dtype bfloat16
  dpo-minimal dpo --data pairs.jsonl --model runs/sft-001 --loss-type kto          one of DPO's relatives
  dpo-minimal dpo --resume runs/dpo-001                      go on where Ctrl-C or a crash stopped it

What to watch. Before the first step every log-ratio must be 0 and so the loss ln 2 = 0.693, which is checked.
rewards/accuracies is the share of pairs ordered rightly: 0.5 is guessing, and 1 on held-out pairs is not to
be had, because people disagree. rewards/chosen and rewards/rejected may both fall, as only their difference
is trained (displacement). kl/policy_reference, measured on the policy's own samples, is what beta limits;
where it runs off while samples get worse, raise beta or stop earlier.

The other losses (derivations.md, chapter 12) are trained in the same way on the same pairs. simpo, orpo and
unlikelihood have no reference: it is kept all the same, to show how far they go from it. kto takes each
chosen completion for a good one and each rejected for a bad one, and reads a third, of another prompt, to
estimate how far the policy has gone; each micro-batch makes that estimate for itself, so that for kto, and
only for it, --gradient-accumulation-steps changes more than rounding.

With --data the defaults are the paper's, where it gives one. The reviews need others: a model of a million
weights, 90 steps from its reference, learns little from RMSprop at 1e-6.

A run folder holds model/ (Hugging Face's layout), metrics.jsonl, training.png, config.json, checkpoints/, the
reference's log-probabilities, and without --data also sft/ and preferences.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...rivals.evaluate import Samples, mean_of, sample
from ...text.batches import Example, check_limits, with_mismatched
from ...text.checkpoint import WEIGHTS_FILE, state_fingerprint
from ...text.data import Dataset, load_dataset
from ...text.objectives import (
    LOSS_TYPES,
    OPTIONS,
    cache_key,
    check_start,
    load_reference_logps,
    loss_options,
    preference_objective,
    reference_logps,
    save_reference_logps,
)
from ...text.reviews import sentiment
from ...text.runs import write_records
from ...text.training_run import Data, run_training
from ...train import Record
from ...validation import InputError, check_count
from . import sft
from .judged import as_pairs, judged_samples
from .options import (
    COMMON,
    CONFIG_FILE,
    Defaults,
    add_data_options,
    add_run_options,
    add_training_options,
    resolve,
    settings_of,
)
from .report import side_by_side, summary
from .setup import (
    MODEL,
    REFERENCE_FILE,
    Policy,
    begin,
    context_of,
    count_parameters,
    load_policy,
    open_folder,
    pin_start,
    prepare,
    read_rows,
    resumable,
    rows_fingerprint,
    sample_length,
    save_policy,
)

DEFAULTS = Defaults(
    file=COMMON
    | {"loss_type": "dpo", "learning_rate": 1e-6, "optimizer": "rmsprop", "rows": None,
       "eval_samples": 16},
    reviews={"rows": 6000, "learning_rate": 2e-4, "optimizer": "adamw",
             "warmup_steps": 20, "eval_steps": 25, "eval_samples": 256},
)  # fmt: skip
# What a loss's options are where nobody gives them. DPO's beta is the paper's, SimPO's two are those of its
# own paper for Llama-3-Base. No paper can name a share of wrong labels, and this one names no alpha.
LOSS_DEFAULTS = {
    "beta": 0.1,
    "label_smoothing": 0.1,
    "flip_probability": 0.1,
    "gamma": 1.0,
    "lam": 0.1,
    "alpha": 0.5,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
}
REVIEWS_BETA, SIMPO_BETA = 0.5, 2.0
RANKED = 4  # samples of a generated ranking
SHOWN = 5
PREFERENCES_FILE = "preferences.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_data_options(parser, DEFAULTS, "preference pairs (rankings for plackett_luce)")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="MODEL",
        help="policy and reference start as this folder, run, or released name (gpt2 to gpt2-xl); needed "
        "with --data (default: one that sft makes on the reviews)",
    )  # fmt: skip
    training = add_training_options(parser, DEFAULTS)
    training.add_argument(
        "--loss-type", choices=LOSS_TYPES, metavar="NAME",
        help="dpo; cdpo and robust, for labels that may be wrong; ipo, whose log-ratio margin has the finite "
        "target 1 / (2 beta), and averaged_ipo, the same per token; kto, for single completions; simpo, orpo "
        "and unlikelihood, without a reference; unweighted_dpo, a warning; or plackett_luce for rankings "
        f"({DEFAULTS.text('loss_type')})",
    )  # fmt: skip
    _add_loss_options(parser)
    looking = parser.add_argument_group("samples")
    looking.add_argument(
        "--eval-samples", type=int, metavar="N",
        help="of the policy at each look, one a held-out row at most; 0 draws none "
        f"({DEFAULTS.text('eval_samples')})",
    )  # fmt: skip
    looking.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help="where a sample is cut (default: half of the model's context, 128 at most)",
    )  # fmt: skip
    add_run_options(parser, DEFAULTS, "dpo")


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    """What single losses take; an option that the chosen one does not is refused."""
    group = parser.add_argument_group("options of the loss")
    for name, text in (
        ("beta", f"strength of the pull towards the reference (default {LOSS_DEFAULTS['beta']}; reviews "
         f"{REVIEWS_BETA}, for which 0.1 would leave the language behind); for simpo, which has none, a "
         f"factor of its rewards (default {SIMPO_BETA}); orpo and unlikelihood have no beta"),
        ("label_smoothing", "for cdpo: share of labels that may be wrong, below 1/2"),
        ("flip_probability", "for robust: share of labels that are wrong, below 1/2"),
        ("gamma", "for simpo: the margin that is wanted, 0 or more; its paper's for Llama-3-Base, like beta"),
        ("lam", "for orpo: weight of the odds, 0 or more"),
        ("alpha", "for unlikelihood: weight of the rejected completion, from 0 to 1"),
        ("desirable_weight", "for kto: weight of chosen completions"),
        ("undesirable_weight", "for kto: weight of rejected completions"),
    ):  # fmt: skip
        default = "" if name == "beta" else f" (default {LOSS_DEFAULTS[name]})"
        group.add_argument("--" + name.replace("_", "-"), type=float, metavar="X", help=text + default)


def _loss_of(options: argparse.Namespace) -> dict[str, float]:
    """The options of the loss, checked; what nobody gave gets its default, here and in `options`."""
    given = {name: getattr(options, name) for name in OPTIONS}
    for name in LOSS_TYPES[options.loss_type].options:
        if given[name] is None:
            given[name] = _default_beta(options) if name == "beta" else LOSS_DEFAULTS[name]
    loss = loss_options(options.loss_type, given)
    vars(options).update(loss)
    return loss


def _default_beta(options: argparse.Namespace) -> float:
    if options.loss_type == "simpo":
        return SIMPO_BETA
    return LOSS_DEFAULTS["beta"] if options.data is not None else REVIEWS_BETA


def run(args: argparse.Namespace) -> Path:
    """Check everything, train, and write the run folder, which is returned."""
    options = resolve(args, "dpo", DEFAULTS)
    loss = _loss_of(options)
    if LOSS_TYPES[options.loss_type].mismatched and options.per_device_train_batch_size < 2:
        raise InputError(
            f"--loss-type {options.loss_type} needs --per-device-train-batch-size 2 or more: it estimates a "
            "divergence from the rows that go through the model together."
        )
    check_count("--eval-samples", options.eval_samples, minimum=0)
    if options.max_new_tokens is not None:
        check_count("--max-new-tokens", options.max_new_tokens)
    if options.data is not None and options.model is None:
        raise InputError(
            "--data needs --model, the SFT model that is policy and reference at the start; make one by "
            f"`dpo-minimal sft --data {options.data}`, or name a folder or gpt2."
        )
    if options.max_new_tokens is not None and options.data is not None and options.eval_samples == 0:
        raise InputError("--max-new-tokens is not used with --eval-samples 0; leave it out.")
    if args.eval_steps is not None and options.held_out == options.eval_samples == 0:
        raise InputError("--eval-steps is not used with --held-out 0 and --eval-samples 0; leave it out.")
    begin(options)
    if options.data is not None:  # all that can be wrong with the input, before anything is written
        policy, dataset = load_policy(options.model), read_rows(options, LOSS_TYPES[options.loss_type].rows)
        sample_length(options.max_new_tokens, policy.model.config.block_size)
        train, held_out = _rows(options, dataset, policy)
        folder = open_folder(options, "dpo")
        with resumable("dpo", folder):
            return _train(options, loss, folder, policy, dataset, train, held_out)
    policy = None if options.model is None else load_policy(options.model)
    context = sft.DEFAULTS.reviews["context"] if policy is None else policy.model.config.block_size
    check_limits(context_of(options, context), options.max_prompt_length)
    sample_length(options.max_new_tokens, context)
    folder = open_folder(options, "dpo")
    with resumable("dpo", folder):
        policy = policy or load_policy(str(_fine_tune(options, folder)))
        policy.model.to(options.device)
        dataset = _judged_reviews(options, folder, policy)
        train, held_out = _rows(options, dataset, policy)
        return _train(options, loss, folder, policy, dataset, train, held_out)


def _rows(
    options: argparse.Namespace, dataset: Dataset, policy: Policy
) -> tuple[list[Example], list[Example]]:
    """Rows as tokens, (training, held out), as the loss reads them."""
    train, held_out = prepare(options, dataset, policy)
    if not LOSS_TYPES[options.loss_type].mismatched:
        return train, held_out
    micro = options.per_device_train_batch_size
    train = _without_a_single_row(train, micro * options.gradient_accumulation_steps, micro)
    held_out = _without_a_single_row(held_out, len(held_out) + 1, micro)  # all at once
    length = context_of(options, policy.model.config.block_size)
    of_train = with_mismatched(train, max_length=length)
    return of_train, with_mismatched(held_out, max_length=length, others=train) if held_out else []


def _without_a_single_row(rows: list[Example], window: int, micro: int) -> list[Example]:
    """One row less where an epoch's last micro-batch would be a single row, which allows no estimate."""
    if len(rows) % window % micro != 1:
        return rows
    print(f"note: {rows[-1].place} is left out: kto needs two rows together, and it would be alone.\n")
    return rows[:-1]


def _train(
    options: argparse.Namespace,
    loss: dict[str, float],
    folder: Path,
    policy: Policy,
    dataset: Dataset,
    train: list[Example],
    held_out: list[Example],
) -> Path:
    model = policy.model.to(options.device)
    reference = copy.deepcopy(model).requires_grad_(False)
    fingerprint = state_fingerprint(reference)
    vocabulary = policy.tokenizer.fingerprint
    pin_start(folder, data=rows_fingerprint(dataset), vocabulary=vocabulary, model=fingerprint)
    print(f"{count_parameters(model):,} parameters; loss {options.loss_type}, {_listed(loss)}.", flush=True)
    logps = _reference(options, folder, policy, [*train, *held_out])
    data = Data(train, held_out, logps[: len(train)], logps[len(train) :])
    look = _Samples(options, policy, reference, held_out or train)
    before = look.draw(reference)
    records = run_training(
        folder, model, preference_objective(model, options.loss_type, dtype=options.dtype, **loss), data,
        settings_of(options), name=options.loss_type.upper(), resume=options.resume is not None,
        check_first=partial(check_start, model, dtype=options.dtype), look=look.record,
    )  # fmt: skip
    if state_fingerprint(reference) != fingerprint:
        raise AssertionError("the reference has moved in training, which is a bug in here")
    save_policy(policy, folder)
    after = look.latest or look.draw(model)  # a run that was finished already has looked at nothing
    from .figure import preference_figure  # matplotlib is slow to import: not before it is needed

    start_of = LOSS_TYPES[options.loss_type].start
    starts = [] if start_of is None else [start_of(len(row.completions), **loss) for row in train]
    start = sum(starts) / len(starts) if starts else None
    preference_figure(records, start, before, after, folder / "training.png")
    if before is not None:
        # Losses without a reference, whose beta is none or another thing, are measured like the others.
        beta = REVIEWS_BETA if start_of is None else options.beta
        print("\n".join(["", *side_by_side(before, after, SHOWN), "", *summary(before, after, beta)]))
    print(f"\nWrote {folder}/model, training.png, metrics.jsonl and config.json.", flush=True)
    return folder


def _listed(loss: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in loss.items())


# -------------------------------------------------------------------------------------- without --data


def _fine_tune(options: argparse.Namespace, folder: Path) -> Path:
    """The SFT model of the reviews, in a run folder of its own; what is there already is used."""
    target = folder / "sft"
    if (target / MODEL / WEIGHTS_FILE).exists():
        return target
    flags = ["--resume", str(target)] if (target / CONFIG_FILE).exists() else _sft_flags(options, target)
    parser = argparse.ArgumentParser()
    sft.add_arguments(parser)
    print("Supervised fine-tuning first: the reference has to speak the language.\n", flush=True)
    sft.run(parser.parse_args(flags))
    print("\nNow preferences between its own samples.\n", flush=True)
    return target


def _sft_flags(options: argparse.Namespace, target: Path) -> list[str]:
    flags = {"--output-dir": target, "--seed": options.seed}
    flags |= {"--device": options.device, "--dtype": options.dtype}
    return [str(word) for pair in flags.items() for word in pair]


def _judged_reviews(options: argparse.Namespace, folder: Path, policy: Policy) -> Dataset:
    """Pairs (rankings) of the SFT model's own samples, kept in preferences.jsonl."""
    path = folder / PREFERENCES_FILE
    kind = LOSS_TYPES[options.loss_type].rows
    if not path.exists():
        rows = judged_samples(
            policy, options.rows, 2 if kind == "preferences" else RANKED, reward=sentiment,
            max_new_tokens=sample_length(options.max_new_tokens, policy.model.config.block_size),
            seed=options.seed, progress=partial(tqdm, desc="sampling", disable=None, leave=False),
        )  # fmt: skip
        write_records(path, as_pairs(rows) if kind == "preferences" else rows)
    return load_dataset(path, kind)


# ------------------------------------------------------------------------------------------- references


def _reference(options: argparse.Namespace, folder: Path, policy: Policy, examples: list[Example]) -> Tensor:
    """log pi_ref of all rows: from the run's cache where it belongs to them, else computed and kept."""
    path = folder / REFERENCE_FILE
    key = cache_key(policy.model, policy.tokenizer, examples, options.dtype)
    logps = load_reference_logps(path, key)
    if logps is None:
        logps = reference_logps(
            policy.model, examples, micro_size=options.per_device_train_batch_size, dtype=options.dtype,
            device=options.device, progress=partial(tqdm, desc="reference", disable=None, leave=False),
        )  # fmt: skip
        save_reference_logps(path, logps, key)
    return logps


class _Samples:
    """Draws the policy's answers to the same prompts again and again, with the same random numbers."""

    def __init__(
        self, options: argparse.Namespace, policy: Policy, reference: torch.nn.Module, rows: list[Example]
    ):
        self.options, self.reference = options, reference
        self.latest: Samples | None = None
        self.model, self.tokenizer = policy
        self.prompts = [policy.tokenizer.decode(example.prompt) for example in rows[: options.eval_samples]]

    def draw(self, model) -> Samples | None:
        if not self.prompts:
            return None
        return sample(
            model, self.reference, self.tokenizer, self.prompts, seed=self.options.seed,
            max_new_tokens=sample_length(self.options.max_new_tokens, model.config.block_size),
            reward=sentiment if self.options.data is None else None,
        )  # fmt: skip

    def record(self) -> Record:
        """What is logged at each look: divergence, length, and the true reward where it is known."""
        self.latest = samples = self.draw(self.model)
        if samples is None:
            return {}
        divergence, length = mean_of(samples.log_ratios), mean_of(samples.lengths)
        found = {"kl/policy_reference": divergence.value, "kl/error": divergence.error}
        found |= {"samples/length": length.value, "samples/ended": samples.ended.double().mean().item()}
        if samples.rewards is not None:
            reward = mean_of(samples.rewards)
            found |= {"samples/reward": reward.value, "samples/reward_error": reward.error}
        return {name: value for name, value in found.items() if math.isfinite(value)}
