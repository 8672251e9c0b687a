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
from collections.abc import Callable, Iterable, Sequence
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
from ..zoo import LOSSES
from ..zoo.kto import kto_kl_estimate
from .batches import Example, in_passes
from .checkpoint import state_fingerprint
from .runs import write_atomically
from .tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")


class PreferenceBatch(NamedTuple):
    """Rows of K completions each, with the reference's log-probabilities of them, (B, K) nats."""

    batch: SharedPromptBatch
    reference_logps: Tensor


def loss_of(loss: Loss, policy: Tensor, micro: PreferenceBatch, options: dict[str, float]) -> PreferenceLoss:
    """A loss on a batch.

    KTO's divergence is estimated from the third completion of each row, of another prompt
    (`batches.with_mismatched`): it is the micro-batch's own, so its pieces do not add up to the whole
    window's exactly.

    Args: policy (B, K) log-probabilities, nats; options of the loss. Returns PreferenceLoss of (B,) tensors.
    """
    own = slice(2) if "kl_estimate" in loss.reads else slice(None)
    tables = {
        "policy": lambda: policy[:, own],
        "reference": lambda: micro.reference_logps[:, own],
        "lengths": lambda: micro.batch.completion_lengths[:, own],
        "kl_estimate": lambda: _kl_estimate(policy, micro),
    }
    return loss.on(tables, options)


def _kl_estimate(policy: Tensor, micro: PreferenceBatch) -> Tensor:
    if policy.shape[1] != 3:
        raise InputError(
            f"kto needs rows of three completions, the third of another prompt, but they have "
            f"{policy.shape[1]}; make them with batches.with_mismatched."
        )
    if len(policy) < 2:
        raise InputError(
            "kto estimates a divergence from the rows that go through the model together and needs two or "
            "more; raise --per-device-train-batch-size."
        )
    return kto_kl_estimate(policy[:, 2], micro.reference_logps[:, 2])


def loss_options(loss_type: str, given: dict[str, float | None]) -> dict[str, float]:
    """The options that a loss takes, out of those given (None where not given).

    Raises InputError: no such loss, an option it does not use, one it needs that is missing or out of range.
    """
    if loss_type not in LOSSES:
        raise InputError(f"--loss-type {loss_type}: no such loss; choose one of {', '.join(LOSSES)}.")
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
    The divergence from the reference is not among them: it is a mean over the policy's own samples.

    Args:
        model: the policy.
        loss_type: a key of `zoo.LOSSES`; options are its options, checked by `loss_options`.
        dtype: "float32", or "bfloat16" for autocast of the matrix products; weights, log-softmax and the
            loss stay in float32, because a step of 5e-7 would be rounded away in bfloat16.
    """
    options = loss_options(loss_type, options)
    loss = LOSSES[loss_type]

    def objective(micro: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logps = completion_logps_of(model, micro.batch, dtype)
        if not logps.isfinite().all():
            raise InputError(
                "a log-probability is nan or infinite; lower the learning rate or look for bad data."
            )
        result = loss_of(loss, logps, micro, options)
        metrics = _metrics(loss.reads, logps.detach(), micro, result, dtype)
        return result.losses.mean(), {name: values.mean() for name, values in metrics.items()}

    return objective


def _metrics(
    reads: tuple[str, ...], policy: Tensor, micro: PreferenceBatch, result: PreferenceLoss, dtype: str
) -> dict[str, Tensor]:
    """What `preference_objective` logs of each row of log-probabilities (B, K)."""
    ratios, lengths = policy - micro.reference_logps, micro.batch.completion_lengths
    metrics = {}
    if "kl_estimate" in reads:  # the completion of another prompt has done its part
        metrics["kto/kl_estimate"] = _kl_estimate(policy, micro)
        policy, ratios, lengths = policy[:, :2], ratios[:, :2], lengths[:, :2]
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
    } | metrics


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
        return shared_prompt_logps(model, batch)


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
    examples: Sequence[Example], step: list[list[int]], reference: Tensor | None, *, dtype: str, device: str
) -> Window:
    """The window of one optimizer step.

    Args:
        examples: N rows.
        step: micro-batches of indices, from `batches.windows`.
        reference: (N, K) log-probabilities for a preference loss, whose shares are rows; None for SFT, whose
            shares are completion tokens.
    """
    micro_batches: list[SharedPromptBatch | PreferenceBatch] = []
    sizes = []
    for rows in step:
        chosen = [examples[index] for index in rows]
        batch = layout(chosen, dtype=dtype, device=device)
        if reference is None:
            micro_batches.append(batch)
            sizes.append(sum(len(ids) for example in chosen for ids in example.completions))
        else:
            logps = reference[rows, : batch.completion_lengths.shape[1]]
            micro_batches.append(PreferenceBatch(batch, logps.to(device)))
            sizes.append(len(rows))
    places = [examples[index].place for rows in step for index in rows]
    name = "; ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
    return Window(micro_batches, [size / sum(sizes) for size in sizes], name)


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
    """log pi_ref of every completion of every example, once for a data set.

    Computed by the same code in the same dtype as the policy's, so that the two agree where the weights do.

    Args:
        model: the reference; no gradient is kept.
        examples: N >= 1 rows.
        micro_size: rows a pass, which are of similar length.
        progress: wraps the iteration over passes, e.g. in a progress bar.
    Returns: (N, K) nats in float32 on the CPU; where an example has fewer than K completions, NaN.
    """
    result = torch.full((len(examples), max(len(example.completions) for example in examples)), math.nan)
    with torch.no_grad():
        for rows in progress(in_passes(examples, micro_size)):
            batch = layout([examples[index] for index in rows], dtype=dtype, device=device)
            logps = completion_logps_of(model, batch, dtype).float().cpu()
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
    if not path.exists():
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
