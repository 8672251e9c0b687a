"""`python -m dpo_minimal dpo`: a language model learns from preferences, without a reward model.

Pairs of completions of one prompt, chosen and rejected, and a reference pi_ref: the model that training
starts from. The loss of a pair is

  -log sigmoid(beta (log pi(yw|x)/pi_ref(yw|x) - log pi(yl|x)/pi_ref(yl|x)))                       (Eq. 7)

and its optimum is pi_ref exp(r / beta) / Z for the reward r behind the preferences (derivations.md).

  dpo-minimal dpo                                            film reviews: SFT, then DPO on judged samples
                                                             of the SFT model, in about two minutes
  dpo-minimal dpo --data pairs.jsonl --model runs/sft-001    your pairs, from your SFT model
  dpo-minimal dpo --data pairs.jsonl --model gpt2 --dtype bfloat16
  dpo-minimal dpo --data pairs.jsonl --model runs/sft-001 --loss-type kto          one of DPO's relatives
  dpo-minimal dpo --lora-r 8 --lora-alpha 16                 learn an adapter (LoRA); also with --data
  dpo-minimal dpo --resume runs/dpo-001                      go on where Ctrl-C or a crash stopped it

What to watch. Before the first step every log-ratio must be 0 and so the loss ln 2 = 0.693, which is checked.
rewards/accuracies is the share of pairs in the right order: 0.5 is guessing, and 1 cannot be reached on
held-out pairs, because people disagree. rewards/chosen and rewards/rejected may both fall, as only their
difference is trained (displacement). kl/policy_reference, measured on the policy's own samples, is what beta
limits; where it grows while samples get worse, raise beta or stop earlier.

The other losses (zoo/README.md) are trained in the same way on the same pairs. Those without a reference are
measured against it all the same. kto reads {prompt, completion, label}, true for good and false for bad, as
well as pairs, of which it takes each chosen completion for a good one and each rejected for a bad one. Where
labels of one kind are rarer and no weight is given, they get the weight that makes up for it.

A run folder holds model/ (Hugging Face's layout), metrics.jsonl, training.png, config.json, checkpoints/, the
reference's log-probabilities; with --lora-r also adapter/, without --data sft/ and preferences.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...losses import Loss
from ...losses import Option as LossOption
from ...rivals.evaluate import Samples, mean_of
from ...text import objectives, processes
from ...text.batches import check_limits, with_mismatched
from ...text.checkpoint import WEIGHTS_FILE, state_fingerprint
from ...text.data import Dataset, has_labels, load_dataset
from ...text.examples import Examples
from ...text.reviews import sentiment
from ...text.runs import write_records
from ...text.training_run import Data
from ...train import Record
from ...validation import InputError
from ...zoo import LOSSES, TRL
from ..options import COMMON, DATA, RUN, TRAINING, Option, add_options, altered, at_least, declared, resolve
from . import figure, setup, sft
from .judged import as_pairs, judged_samples
from .report import sample_lines, summary
from .setup import CONFIG_FILE, MODEL, Policy, Rows, load_policy

REVIEWS_BETA = 0.5  # of a loss with a reference, for the reviews: 0.1 would let the language get lost
RANKED = 4  # samples of a generated ranking
SHOWN = 5
CLASS_WEIGHTS = ("desirable_weight", "undesirable_weight")
PREFERENCES_FILE, REFERENCE_FILE = "preferences.jsonl", "reference_logps.safetensors"
GROUPS = {
    "data": altered(DATA, rows={"reviews": 9000}, held_out={"reviews": 0.06}),
    "model": {
        "model": COMMON["model"]._replace(
            help="policy and reference start as this run, folder, or released name (gpt2 to gpt2-xl); needed "
            "with --data (default: a model that sft trains on the reviews)"
        ),
    },
    "training": altered(
        TRAINING, learning_rate={"default": 1e-6, "reviews": 1.5e-4}, warmup_steps={"reviews": 20},
        per_device_train_batch_size={"reviews": 16}, gradient_accumulation_steps={"reviews": 4},
        optimizer={"default": "rmsprop", "reviews": "adamw"},
    ),
    "adapter (LoRA)": setup.LORA,
    "samples": {
        "eval_samples": Option(
            "samples drawn at each evaluation, at most one a held-out row; 0 draws none", int, 16, 512,
            check=at_least(0),
        ),
        "max_new_tokens": Option("tokens of a sample at most (default: half of the context, at most 128)"),
    },
    "run": altered(RUN, eval_steps={"reviews": 30}),
}  # fmt: skip


def groups() -> dict[str, dict[str, Option]]:
    """All options: `GROUPS`, and those of the losses that there are now."""
    names = "; ".join(f"{loss.name}, {loss.summary}" for loss in LOSSES.values())
    loss_type = Option(names, str, "dpo", metavar="NAME", choices={**LOSSES, **TRL})  # these it refuses later
    training = GROUPS["training"] | {"loss_type": loss_type}
    return GROUPS | {"training": training, "options of the loss": _loss_options()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_options(parser, groups())


def _loss_options() -> dict[str, Option]:
    """What losses take, each option with all its meanings; one that the chosen loss has not is refused."""
    losses_of: dict[str, dict[str, list[str]]] = {}  # by option and meaning
    for loss in LOSSES.values():
        for option in loss.options:
            default, reviews = (_default(loss, option, data) for data in ("a file", None))
            shown = "none" if default is None else f"{default:g}"
            shown += "" if default == reviews else f"; without --data {reviews:g}"
            meaning = f"{option.help}, {option.range} (default {shown})"
            losses_of.setdefault(option.name, {}).setdefault(meaning, []).append(loss.name)
    return {
        name: Option("; ".join(f"for {', '.join(of)}: {text}" for text, of in meanings.items()), float)
        for name, meanings in losses_of.items()
    }


def _default(loss: Loss, option: LossOption, data: str | None) -> float | None:
    pulls_to_reference = option.name == "beta" and "reference" in loss.reads
    return REVIEWS_BETA if data is None and pulls_to_reference else option.default


def _loss_of(options: argparse.Namespace) -> dict[str, float]:
    """The options of the loss, checked; what nobody gave gets its default, here and in `options`."""
    loss = LOSSES.get(options.loss_type)  # None of a run that another version made; refused below
    given = {name: getattr(options, name, None) for name in _loss_options()}
    for option in loss.options if loss else ():
        if given[option.name] is None:
            given[option.name] = _default(loss, option, options.data)
    found = objectives.loss_options(options.loss_type, given)
    vars(options).update(given | found)
    return found


def run(args: argparse.Namespace) -> Path:
    """Check everything, train, and write the run folder, which is returned."""
    no_samples = args.eval_samples == 0
    if args.resume is not None:  # also a run that was made before some loss existed
        unset = [name for name in _loss_options() if getattr(args, name) is None]
        args = argparse.Namespace(**{name: x for name, x in vars(args).items() if name not in unset})
    options = resolve(
        args, groups(),
        ("data", args.model is None, "{} needs --model, the SFT model that is policy and reference at the "
         f"start; make one by `dpo-minimal sft --data {args.data}`, or name a folder or gpt2."),
        ("max_new_tokens", no_samples and args.data is not None,
         "{} is not used with --eval-samples 0; leave it out."),
        ("eval_steps", no_samples and args.held_out == 0,
         "{} is not used with --held-out 0 and --eval-samples 0; leave it out."),
        command="dpo",
    )  # fmt: skip
    unweighted = all(getattr(options, name, None) is None for name in CLASS_WEIGHTS)
    loss = _loss_of(options)
    if LOSSES[options.loss_type].reads_batch and options.gradient_accumulation_steps > 1:
        text = "compares the rows of a step with each other; give --gradient-accumulation-steps 1."
        raise InputError(f"--loss-type {options.loss_type} {text}")
    setup.begin(options)
    if options.data is None and options.model is None:
        processes.begin(options.device, sft.GROUPS["training"]["gradient_accumulation_steps"].reviews)
    # All that can be wrong with the input is checked before anything is written.
    policy = None if options.model is None else load_policy(options.model)
    dataset = None if options.data is None else _load(options)
    context = sft.REVIEWS_CONTEXT if policy is None else policy.model.config.block_size
    setup.sample_length(options.max_new_tokens, context)
    check_limits(setup.context_of(options, context), options.max_prompt_length)
    rows = None if dataset is None else _rows(options, dataset, policy)
    if rows is not None and unweighted:
        loss |= _balanced(options, rows.train)
    del dataset  # its texts: from here on there are tokens
    with setup.resumable("dpo", setup.open_folder(options, "dpo")) as folder:
        if rows is None:
            policy = policy or load_policy(str(_fine_tune(options, folder)))
            policy.model.to(options.device)
            rows = _rows(options, _judged_reviews(options, folder, policy), policy)
        return _train(options, loss, folder, policy, rows)


def _load(options: argparse.Namespace) -> Dataset:
    """The rows of --data: labelled completions where the loss reads them and the file has them."""
    loss = LOSSES[options.loss_type]
    labelled = loss.labelled is not None and has_labels(options.data)
    return setup.load_rows(options, "labels" if labelled else loss.rows, options.rows)


def _balanced(options: argparse.Namespace, examples: Examples) -> dict[str, float]:
    """Weights with which the good and the bad ones of labelled training rows count alike, 1 for the more
    frequent kind; none for pairs, and where there is one kind only.

    Both are kept in `options`. Source: Ethayarajh et al. (2024), Eq. 9, whose range is 1 to 4/3.
    """
    labels = [row.label for row in examples]
    good, bad = labels.count(True), labels.count(False)
    if 0 in (good, bad):
        return {}
    weights = {"desirable_weight": max(1.0, bad / good), "undesirable_weight": max(1.0, good / bad)}
    vars(options).update(weights)
    if good != bad:
        given = ", ".join(f"--{name.replace('_', '-')} {value:.4g}" for name, value in weights.items())
        print(f"note: {good} training rows are good and {bad} bad; with {given} both kinds count alike.\n")
    return weights


def _rows(options: argparse.Namespace, dataset: Dataset, policy: Policy) -> Rows:
    """Rows as tokens, as the loss reads them."""
    rows = setup.prepare(options, dataset, policy)
    if "kl_estimate" not in LOSSES[options.loss_type].reads:
        return rows
    length = setup.context_of(options, policy.model.config.block_size)
    return rows._replace(
        train=with_mismatched(rows.train, max_length=length),
        held_out=with_mismatched(rows.held_out, max_length=length, others=rows.train),
    )


def _train(
    options: argparse.Namespace, loss: dict[str, float], folder: Path, policy: Policy, rows: Rows
) -> Path:
    reference = policy.model.to(options.device)
    fingerprint = setup.pin_start(folder, policy, rows)
    listed = ", ".join(f"{name} {value:g}" for name, value in loss.items())
    print(f"{setup.size_of(reference):,} parameters; loss {options.loss_type}, {listed}.", flush=True)
    logps = _reference(options, folder, policy, rows.train + rows.held_out)
    # An adapter's reference is the model without it, of which there is no copy.
    model = copy.deepcopy(reference) if options.lora_r is None else setup.adapted(options, reference)
    policy = policy._replace(model=model)
    reference.requires_grad_(False)
    record, count = LOSSES[options.loss_type], len(rows.train)
    reading = {"policy": model} if "kl_estimate" in record.reads else {}
    data = Data(rows.train, rows.held_out, logps[:count], logps[count:], **reading)
    length = setup.sample_length(options.max_new_tokens, model.config.block_size)
    draw = partial(
        setup.draw_samples, options, reference=reference, rows=rows, count=options.eval_samples, length=length
    )
    drawn = [draw(policy._replace(model=reference))]

    def measure_samples() -> Record:
        drawn.append(draw(policy))
        return _sample_metrics(drawn[-1])

    objective = objectives.preference_objective(model, options.loss_type, dtype=options.dtype, **loss)
    records = setup.train_in(
        folder, options, policy, objective, data, name=options.loss_type.upper(), look=measure_samples,
        check_first=partial(objectives.check_start, model, dtype=options.dtype),
    )  # fmt: skip
    if state_fingerprint(reference) != fingerprint:
        raise AssertionError("the reference has moved in training, which is a bug in here")
    if not processes.leads():
        return folder
    if len(drawn) == 1:  # a run that was finished already, in which nothing was evaluated
        drawn.append(draw(policy))
    before, after = drawn[0], drawn[-1]
    figure.preference_figure(
        records, _start(record, rows.train, loss), before, after, folder / "training.png"
    )
    if before is not None:
        # Losses without a reference, whose beta is none or another thing, are measured like the others.
        beta = loss["beta"] if "reference" in record.reads and "beta" in loss else REVIEWS_BETA
        texts = sample_lines(SHOWN, {"before": before, "after": after})
        print("\n".join(["", *texts, "", *summary(before, after, beta)]))
    print(f"\nWrote {folder}/model, training.png, metrics.jsonl and config.json.", flush=True)
    return folder


def _start(record: Loss, examples: Examples, loss: dict[str, float]) -> float | None:
    """The mean loss of rows where policy = reference; None for a loss that does not say."""
    if record.start is None:
        return None
    if examples[0].label is None:
        return statistics.fmean(record.start(len(row.completions), **loss) for row in examples)
    labels = torch.tensor([row.label for row in examples])
    same = torch.zeros(len(examples))
    return record.labelled(same, same, labels, 0.0, **loss).losses.mean().item()


def _sample_metrics(samples: Samples | None) -> Record:
    """What is logged of samples: divergence, length, and the true reward where it is known."""
    if samples is None:
        return {}
    divergence, length = mean_of(samples.log_ratios), mean_of(samples.lengths)
    found = {"kl/policy_reference": divergence.value, "kl/error": divergence.error}
    found |= {"samples/length": length.value, "samples/ended": samples.ended.double().mean().item()}
    if samples.rewards is not None:
        reward = mean_of(samples.rewards)
        found |= {"samples/reward": reward.value, "samples/reward_error": reward.error}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _fine_tune(options: argparse.Namespace, folder: Path) -> Path:
    """The SFT model of the reviews, in a run folder of its own; what is there already is used."""
    target = folder / "sft"
    finished, begun = processes.from_first(
        lambda: [(target / name).exists() for name in (f"{MODEL}/{WEIGHTS_FILE}", CONFIG_FILE)]
    )
    if finished:
        return target
    given = {"resume": str(target)}
    if not begun:
        given = {name: getattr(options, name) for name in ("seed", "device", "dtype")}
        given["output_dir"] = str(target)
    print("Supervised fine-tuning first: the reference has to speak the language.\n", flush=True)
    sft.run(argparse.Namespace(**dict.fromkeys(declared(sft.GROUPS)) | given))
    print("\nNow preferences between its own samples.\n", flush=True)
    return target


def _judged_reviews(options: argparse.Namespace, folder: Path, policy: Policy) -> Dataset:
    """Pairs (rankings) of the SFT model's own samples, kept in preferences.jsonl."""
    path = folder / PREFERENCES_FILE
    kind = LOSSES[options.loss_type].rows

    def make() -> None:
        rows = judged_samples(
            policy, options.rows, 2 if kind == "preferences" else RANKED, reward=sentiment,
            max_new_tokens=setup.sample_length(options.max_new_tokens, policy.model.config.block_size),
            seed=options.seed,
        )  # fmt: skip
        write_records(path, as_pairs(rows) if kind == "preferences" else rows)

    processes.from_first(lambda: path.exists() or make())
    return load_dataset(path, kind)


def _reference(options: argparse.Namespace, folder: Path, policy: Policy, examples: Examples) -> Tensor:
    """log pi_ref of all rows: from the run's cache where it belongs to them, else computed and kept."""
    path = folder / REFERENCE_FILE
    key = objectives.cache_key(policy.model, policy.tokenizer, examples, options.dtype)
    logps = processes.from_first(lambda: objectives.load_reference_logps(path, key))
    if logps is None:
        logps = objectives.reference_logps(
            policy.model, examples, micro_size=options.per_device_train_batch_size, dtype=options.dtype,
            device=options.device, progress=partial(tqdm, desc="reference", disable=None, leave=False),
        )  # fmt: skip
        objectives.save_reference_logps(path, logps, key)
    return logps
