"""From token batches to a loss and what is logged beside it: SFT, and every preference loss by its name.

losses.py and zoo/ know log-probabilities only; here a GPT computes them, the reference's are looked up, and
the per-row results become means. What a loss reads, and its options, are those of its record in `zoo.LOSSES`.

But: no optimizer, no files other than the cache of reference log-probabilities.

Shapes: N examples, B rows of a micro-batch, K completions of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..losses import RANGES, Loss, PreferenceLoss
from ..model import GPT
from ..policy import SharedPromptBatch, shared_prompt_batch, shared_prompt_logps
from ..train import Objective, Window
from ..validation import InputError
from ..zoo import LOSSES, no_such_loss
from ..zoo.kto import LabelLoss, kto_kl_estimate
from .batches import Example, in_passes
from .checkpoint import state_fingerprint
from .processes import in_shares
from .runs import write_atomically
from .tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")


class PreferenceBatch(NamedTuple):
    """Rows of K completions each, and what a loss reads of them beside the policy."""

    batch: SharedPromptBatch
    reference_logps: Tensor  # (B, K) nats
    kl_estimate: Tensor | None = None  # KTO's z0, nats, a scalar: one for all micro-batches of a window
    labels: Tensor | None = None  # (B,) True (good) or False (bad) where K = 1; None for pairs and rankings
    # Rows of the whole window per good one and per bad one, 0 where there is none: times these, a mean over
    # rows is one over good (bad) rows.
    class_weights: tuple[float, float] = (0.0, 0.0)


def loss_of(
    loss: Loss, policy: Tensor, micro: PreferenceBatch, options: dict[str, float]
) -> PreferenceLoss | LabelLoss:
    """A loss on a batch: a PreferenceLoss, or of labelled rows a LabelLoss, of (B,) tensors.

    Args: policy (B, K) log-probabilities, nats; options of the loss.
    """
    if micro.labels is not None:
        columns = policy[:, 0], micro.reference_logps[:, 0], micro.labels, micro.kl_estimate
        return loss.labelled(*columns, **options)
    tables = {
        "policy": lambda: policy,
        "reference": lambda: micro.reference_logps,
        "lengths": lambda: micro.batch.completion_lengths,
        "kl_estimate": lambda: micro.kl_estimate,
    }
    return loss.on(tables, options)


def loss_options(loss_type: str, given: dict[str, float | None]) -> dict[str, float]:
    """The options that a loss takes, out of those given (None where not given).

    Raises InputError: no such loss, an option it does not use, one it needs that is missing or out of range.
    """
    if loss_type not in LOSSES:
        raise no_such_loss(loss_type, "--loss-type ")
    used = {option.name: option for option in LOSSES[loss_type].options}
    found = {name: value for name, value in given.items() if value is not None}
    for name in (*found, *used):
        flag = "--" + name.replace("_", "-")
        if name not in used:
            raise InputError(f"--loss-type {loss_type} does not use {flag}; leave it out.")
        if name not in found:
            raise InputError(f"--loss-type {loss_type} needs {flag}.")
        RANGES[used[name].range](flag, found[name])
    return found


# ----------------------------------------------------------------------------------------------- objectives


def preference_objective(model: GPT, loss_type: str, *, dtype: str, **options: float) -> Objective:
    """micro-batch -> (mean loss, metrics) of a preference loss.

    Metrics, all means over rows, of the policy before the step:
        rewards/chosen, rewards/rejected, rewards/margins: implicit rewards beta log(pi / pi_ref), or what
            the loss's docstring says it has in their place.
        rewards/accuracies: share of rows whose chosen reward is above the rejected one by more than rounding;
            of a ranking, share of neighbours in the right order.
        logps/chosen, logps/rejected: log pi(y|x), nats a sequence, apart, because both may fall.
        dpo/gradient_weight: how hard the loss pulls (of a ranking: on its best answer).
        dpo/saturated_fraction: share of rows that the implicit reward orders with odds above 99 : 1.
        dpo/displacement: share of rows whose chosen completion is less likely than under the reference, by
            more than rounding.
        dpo/chosen_logratio: the mean log(pi / pi_ref), nats, also of losses whose rewards are something else.
        dpo/ties: share of rows (neighbours) with equal rewards up to rounding, neither right nor wrong.
        kto/kl_estimate: of KTO alone, its z0.
    Of labelled rows, chosen stands for the good ones, over which its means are, and rejected for the bad
    ones; rewards/margins is the difference of the two means, and accuracies, ties and saturation judge each
    reward against 0, where the reference is: above it is right for a good row, below it for a bad one. What
    has no row in a window is left out of its record.
    The divergence from the reference is not among them: it is a mean over the policy's own samples.
    A loss that reads its batch is that of each micro-batch: `dpo` refuses to train it on more than one a
    step, and `eval_loss` is its mean over passes of as many rows, of similar length, as a training step has.

    Args:
        model: the policy.
        loss_type: a key of `zoo.LOSSES`; options are its options, checked by `loss_options`.
        dtype: "float32", or "bfloat16" for autocast of the matrix products; weights, log-softmax and the
            loss stay in float32, because a step of 5e-7 would be rounded away in bfloat16.
    """
    options = loss_options(loss_type, options)
    loss = LOSSES[loss_type]
    # RPO, which divides the chosen's likelihood alone by a length, orders completions by sums.
    ordered_by = loss.reads if "rejected_lengths" in loss.parameters else {*loss.reads} - {"lengths"}

    def objective(micro: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logps = completion_logps_of(model, micro.batch, dtype)
        result = loss_of(loss, logps, micro, options)
        measure = _metrics if micro.labels is None else _label_metrics
        metrics = measure(ordered_by, logps.detach(), micro, result, dtype)
        if micro.kl_estimate is not None:
            metrics["kto/kl_estimate"] = micro.kl_estimate
        return result.losses.mean(), {name: values.mean() for name, values in metrics.items()}

    return objective


def _metrics(
    reads: Collection[str], policy: Tensor, micro: PreferenceBatch, result: PreferenceLoss, dtype: str
) -> dict[str, Tensor]:
    """What `preference_objective` logs of each row of log-probabilities (B, K)."""
    ratios, lengths = policy - micro.reference_logps, micro.batch.completion_lengths
    # What the loss orders completions by, and how far rounding may have moved it: float32's in bfloat16 too,
    # by whose own most rows would be ties; exact ties stay ties.
    scores, blur = ratios if "reference" in reads else policy, _rounding(lengths, "float32")
    if "lengths" in reads:
        scores, blur = scores / lengths, blur / lengths
    order = scores[:, :-1] - scores[:, 1:]  # of neighbours; of a pair, chosen minus rejected
    tie = torch.maximum(blur[:, :-1], blur[:, 1:])
    margins = result.chosen_rewards - result.rejected_rewards
    return {
        "rewards/chosen": result.chosen_rewards,
        "rewards/rejected": result.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (order > tie).float(),
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, -1],
        "dpo/gradient_weight": result.gradient_weights,
        "dpo/saturated_fraction": (margins > math.log(99)).float(),
        "dpo/displacement": (ratios[:, 0] < -_rounding(lengths[:, 0], dtype)).float(),
        "dpo/chosen_logratio": ratios[:, 0],
        "dpo/ties": (order.abs() <= tie).float(),
    }


def _label_metrics(
    reads: Collection[str], policy: Tensor, micro: PreferenceBatch, result: LabelLoss, dtype: str
) -> dict[str, Tensor]:
    """The same of each labelled row of log-probabilities (B, 1)."""
    policy, lengths = policy[:, 0], micro.batch.completion_lengths[:, 0]
    ratios = policy - micro.reference_logps[:, 0]
    sign, blur = torch.where(micro.labels, 1.0, -1.0), _rounding(lengths, "float32")
    metrics = {
        "rewards/accuracies": (sign * ratios > blur).float(),
        "dpo/gradient_weight": result.gradient_weights.abs(),
        "dpo/saturated_fraction": (sign * result.rewards > math.log(99)).float(),
        "dpo/ties": (ratios.abs() <= blur).float(),
    }
    of_good, of_bad = micro.class_weights
    for side, weight, own in (("chosen", of_good, micro.labels), ("rejected", of_bad, ~micro.labels)):
        if weight:
            metrics[f"rewards/{side}"] = weight * (own * result.rewards)
            metrics[f"logps/{side}"] = weight * (own * policy)
    if of_good:
        metrics["dpo/displacement"] = of_good * (micro.labels & (ratios < -_rounding(lengths, dtype)))
        metrics["dpo/chosen_logratio"] = of_good * (micro.labels * ratios)
    if of_good and of_bad:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def sft_objective(model: GPT, *, dtype: str) -> Objective:
    """micro-batch -> (minus the mean log-probability of a completion token, in nats; no further metrics).

    Args: as `preference_objective`; every completion of a row counts, and its end-of-text like any token.
    """

    def objective(micro: SharedPromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logps = completion_logps_of(model, micro, dtype)
        return -logps.sum() / micro.completion_lengths.sum(), {}

    return objective


def completion_logps_of(model: GPT, batch: SharedPromptBatch, dtype: str) -> Tensor:
    """(B, K) `shared_prompt_logps`, with the matrix products in the given dtype."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logps = shared_prompt_logps(model, batch)
    if not logps.isfinite().all():
        raise InputError("a log-probability is not finite; lower the learning rate or look for bad data.")
    return logps


# How far two computations of a log-probability may lie apart, in nats for a completion of one token: rows of
# another shape are added up in another order. Over T tokens it grows with sqrt(T). The largest seen between
# shapes, for models of 1M to 124M parameters on a CPU: 2e-5 in float32; in bfloat16 0.05, but 0.24 for logits
# near -100 like GPT-2's, where its numbers are 0.5 apart. In float32 there is a margin for other devices.
_TOKEN_ROUNDING = {"float32": 1e-4, "bfloat16": 0.3}


def _rounding(tokens: Tensor, dtype: str) -> Tensor:
    """Token counts -> nats below which two log-probabilities of them do not differ."""
    return _TOKEN_ROUNDING[dtype] * tokens.sqrt()


# -------------------------------------------------------------------------------------------------- windows


def layout(examples: Sequence[Example], *, dtype: str, device: str) -> SharedPromptBatch:
    """Examples as one batch on the device; in bfloat16 rows are padded to a multiple that its units like."""
    prompts, completions, *_ = zip(*examples, strict=True)
    return shared_prompt_batch(prompts, completions, multiple=16 if dtype == "bfloat16" else 1).to(device)


def make_window(
    examples: Sequence[Example], step: list[list[int]], reference: Tensor | None,
    *, dtype: str, device: str, policy: GPT | None = None,
) -> Window:  # fmt: skip
    """The window of one optimizer step.

    Args:
        examples: N rows.
        step: micro-batches of indices, from `batches.windows`.
        reference: (N, K) log-probabilities for a preference loss, whose shares are rows; None for SFT, whose
            shares are completion tokens.
        policy: for a loss with a KL estimate, the model as it is now. Rows are then of
            `batches.with_mismatched`, whose last completion is for the estimate alone, one for the window.
    """
    micro_batches: list[SharedPromptBatch | PreferenceBatch] = []
    sizes, z0 = [], None
    if policy is not None:
        z0 = _kl_estimate(policy, examples, step, reference, dtype=dtype, device=device)
    labels = [examples[index].label for rows in step for index in rows]
    classes = labels.count(True), labels.count(False)
    weights = tuple(len(labels) / count if count else 0.0 for count in classes)
    for rows in step:
        chosen = [examples[index] for index in rows]
        if policy is not None:
            chosen = [row._replace(completions=row.completions[:-1]) for row in chosen]
        batch = layout(chosen, dtype=dtype, device=device)
        if reference is None:
            micro_batches.append(batch)
            sizes.append(sum(len(ids) for example in chosen for ids in example.completions))
        else:
            logps = reference[rows, : batch.completion_lengths.shape[1]].to(device)
            marks = torch.tensor([row.label for row in chosen], device=device) if any(classes) else None
            micro_batches.append(PreferenceBatch(batch, logps, z0, marks, weights))
            sizes.append(len(rows))
    places = [examples[index].place for rows in step for index in rows]
    name = "; ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    return Window(micro_batches, [size / sum(sizes) for size in sizes], name)


def _kl_estimate(
    policy: GPT, examples: Sequence[Example], step: list[list[int]], reference: Tensor, **where: str
) -> Tensor:
    """KTO's z0 of a window, from the last completion of each of its rows."""
    pieces = []
    for rows in step:
        last = [examples[index]._replace(completions=examples[index].completions[-1:]) for index in rows]
        with torch.no_grad():
            logps = completion_logps_of(policy, layout(last, **where), where["dtype"])[:, 0]
        pieces.append((logps, reference[rows, -1].to(logps.device)))
    return kto_kl_estimate(*map(torch.cat, zip(*pieces, strict=True)))


# -------------------------------------------------------------------------------------- reference log-probs


def reference_logps(
    model: GPT,
    examples: Sequence[Example],
    *,
    micro_size: int,
    dtype: str,
    device: str = "cpu",
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = iter,
) -> Tensor:
    """log pi_ref of every completion of every example, once for a data set; processes share the passes.

    Computed by the same code in the same dtype as the policy's, so that the two agree where the weights do.

    Args:
        model: the reference; no gradient is kept.
        examples: N >= 1 rows.
        micro_size: rows a pass, which are of similar length.
        progress: wraps the iteration over passes, e.g. in a progress bar.
    Returns: (N, K) nats in float32 on the CPU; where an example has fewer than K completions, NaN.
    """
    result = torch.full((len(examples), max(len(example.completions) for example in examples)), math.nan)

    def of_pass(rows: list[int]) -> Tensor:
        batch = layout([examples[index] for index in rows], dtype=dtype, device=device)
        with torch.no_grad():
            return completion_logps_of(model, batch, dtype).float().cpu()

    passes = in_passes(examples, micro_size)
    for rows, logps in zip(passes, in_shares(of_pass, passes, progress)):
        result[torch.tensor(rows), : logps.shape[1]] = logps
    return result


def cache_key(model: GPT, tokenizer: Tokenizer, examples: Sequence[Example], dtype: str) -> str:
    """What reference log-probabilities depend on: weights and how many heads share them, vocabulary, token
    ids after truncation, dtype."""
    facts = (state_fingerprint(model), model.config, tokenizer.fingerprint, dtype)
    digest = hashlib.sha256(repr(facts).encode())
    for example in examples:
        digest.update(json.dumps([example.prompt, example.completions]).encode())
    return digest.hexdigest()


def save_reference_logps(path: Path, logps: Tensor, key: str) -> None:
    """Write (N, K) log-probabilities with the key of what they belong to, in one move.

    Raises InputError where the file cannot be written.
    """
    content, metadata = {"reference_logps": logps.contiguous()}, {"key": key}
    try:
        write_atomically(path, lambda p: safetensors.torch.save_file(content, p, metadata=metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); free some space there.") from None


def load_reference_logps(path: Path, key: str) -> Tensor | None:
    """Read them back; None where there is no such file or it belongs to another key: compute them then.

    Raises InputError where the file is damaged or cannot be read.
    """
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return file.get_tensor("reference_logps")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: is damaged ({error}); delete it to compute it again.") from None


def check_start(model: GPT, window: Window, *, dtype: str) -> None:
    """Before the first step policy = reference: every log-ratio is 0, and so the loss ln 2 for DPO.

    Each is compared, because means hide much: where columns are swapped, gains and losses nearly cancel.

    Args: the policy before any step; the first `PreferenceBatch` window.
    Raises InputError: one is not 0 up to rounding: the reference's were those of other weights or tokens.
    """
    for micro in window.micro_batches:
        with torch.no_grad():
            log_ratios = completion_logps_of(model, micro.batch, dtype) - micro.reference_logps
        if not (log_ratios.abs() <= _rounding(micro.batch.completion_lengths, dtype)).all():
            raise InputError(
                f"the first loss would not be that of policy = reference ({window.name}: log-ratios up to "
                f"{log_ratios.abs().max():.3g} nats); the kept reference log-probabilities belong to other "
                "weights or tokens, so delete reference_logps.safetensors or start a new run."
            )
