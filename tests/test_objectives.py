"""From tokens to loss and metrics: against a loop over tokens and formulas written out here."""

import copy
import errno
import functools
import itertools
import math
import random

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import CAUGHT, plant
from test_divergences import RECORDS, pair_by_hand
from test_margin_losses import MARGINS
from test_pointwise_losses import POINTWISE
from test_policy import gradients, loop_logp, loud
from test_relatives import RELATIVES, Row, log_odds

from dpo_minimal import policy
from dpo_minimal.losses import dpo_loss
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import SequenceBatch, SharedPromptBatch, sequence_logps
from dpo_minimal.text import objectives
from dpo_minimal.text.batches import Example, windows
from dpo_minimal.text.objectives import (
    DTYPES,
    PreferenceBatch,
    cache_key,
    check_start,
    completion_logps_of,
    layout,
    load_reference_logps,
    loss_of,
    loss_options,
    make_window,
    preference_objective,
    reference_logps,
    save_reference_logps,
    sft_objective,
)
from dpo_minimal.text.tokenizer import byte_tokenizer, train_bpe
from dpo_minimal.train import Window, _means, average, make_optimizer, train
from dpo_minimal.validation import InputError
from dpo_minimal.zoo import LOSSES, kto

BY_ROW = RELATIVES | POINTWISE | MARGINS  # whose value and pulls are written out elsewhere, a row at a time
ALONE = [name for name, loss in LOSSES.items() if not loss.reads_batch]
# One loss of each kind, that is of each set of what is read: between GPT and loss nothing else is told apart.
KINDS = list({(LOSSES[name].reads, LOSSES[name].rows): name for name in reversed(ALONE)}.values())
VOCAB = 11
SHAPE = GPTConfig(vocab_size=VOCAB, block_size=256, n_layer=2, n_head=2, n_embd=16)
seeds = st.integers(0, 2**32 - 1)
HERE = {"dtype": "float32", "device": "cpu"}


def gpt_of(seed: int, shape: GPTConfig = SHAPE, scale: float = 0.2) -> GPT:
    """A float32 GPT whose conditionals are far from uniform, from its seed alone."""
    gpt, generator = GPT(shape), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return gpt


def rows_of(seed: int, sizes: list[int], *, prompt: int = 4, completion: int = 6) -> list[Example]:
    """A row for each number of completions, of random tokens and of many lengths."""
    draw = random.Random(seed)

    def text(longest: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))]

    return [
        Example(text(prompt), [text(completion) for _ in range(K)], f"row {number}")
        for number, K in enumerate(sizes, start=1)
    ]


def sizes_of(loss_type: str, count: int) -> list[int]:
    """How many completions each row has: pairs, KTO's with a third, or rankings of uneven length."""
    if LOSSES[loss_type].rows == "rankings":
        return [2 + n % 3 for n in range(count)]
    return [3 if loss_type == "kto" else 2] * count


def options_of(loss_type: str, beta: float = 0.3) -> dict[str, float]:
    """Values for the options of a loss, none of them a default."""
    values = dict(label_smoothing=0.2, flip_probability=0.15, gamma=0.4, lam=0.7, alpha=0.6, tau=0.3)
    values |= dict(beta=beta, desirable_weight=1.3, undesirable_weight=0.8, nll_weight=1.2)
    return {option.name: values[option.name] for option in LOSSES[loss_type].options}


def padded(table: list[list[float]]) -> torch.Tensor:
    """(N, K) in float64, NaN where a row has fewer."""
    width = max(map(len, table))
    return torch.tensor([row + [math.nan] * (width - len(row)) for row in table], dtype=torch.float64)


LOOPED: dict[int, list[list[float]]] = {}


def looped(gpt: GPT, rows: list[Example]) -> list[list[float]]:
    """log pi of every completion, a forward pass a token. Kept, because many losses are tried with the same
    weights and rows."""
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in gpt.parameters())
    key = hash((weights, str([(row.prompt, row.completions) for row in rows])))
    if key not in LOOPED:
        LOOPED[key] = [[loop_logp(gpt, row.prompt, ids) for ids in row.completions] for row in rows]
    return LOOPED[key]


def cut(rows: list[Example], sizes: list[int]) -> list[list[int]]:
    """Indices in micro-batches of these sizes, again cut where the number of completions changes."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].completions))
    micro_batches: list[list[int]] = []
    for size in sizes:
        taken, order = order[:size], order[size:]
        for K in sorted({len(rows[index].completions) for index in taken}):
            micro_batches.append([index for index in taken if len(rows[index].completions) == K])
    assert not order
    return micro_batches


# float64 log-probabilities of a few tokens are right to 1e-11 (test_policy.ROUNDING); rewards multiply that
# by beta and IPO's square by its margin, of size 100. Any mistake in a formula is above 1e-3.
CLOSE = {"rel": 1e-9, "abs": 1e-9}
# Shares of rows are averaged in float32.
SHARES = {"rewards/accuracies", "dpo/saturated_fraction", "dpo/displacement", "dpo/ties"}


# --------------------------------------------------------------------------------- loss and metrics by hand


def by_hand(
    loss_type: str, options: dict, policy_logps: list[float], reference: list[float], lengths, z0: float
) -> dict:
    """Loss and metrics of one row, in plain Python; KTO's z0 is that of its window."""
    beta = options.get("beta", math.nan)
    if loss_type == "kto":  # the third completion is not the row's own
        policy_logps, reference, lengths = policy_logps[:2], reference[:2], lengths[:2]
    ratios = [p - r for p, r in zip(policy_logps, reference)]
    rewards = [beta * ratio for ratio in ratios]
    scores, tokens = ratios, [1.0] * len(ratios)  # what the order is judged by
    margin = rewards[0] - rewards[-1]
    if loss_type == "dpo":
        loss = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
        weight = beta * math.exp(-margin) / (1 + math.exp(-margin))
    elif loss_type == "ipo":
        loss = (ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2
        weight = -2 * (ratios[0] - ratios[1] - 1 / (2 * beta))
    elif loss_type == "kto":
        good, bad = (1 / (1 + math.exp(-(reward - beta * z0))) for reward in rewards)
        loss = (1.3 * (1 - good) + 0.8 * bad) / 2
        weight = 1.3 * beta * good * (1 - good) / 2
    elif loss_type == "plackett_luce":
        odds = [math.exp(reward) for reward in rewards]
        loss = -sum(math.log(odds[k] / sum(odds[k:])) for k in range(len(odds)))
        weight = beta * (1 - odds[0] / sum(odds))
    elif loss_type in RECORDS:
        loss, rewards, (weight, _) = pair_by_hand(RECORDS[loss_type], ratios, **options)
        margin = rewards[0] - rewards[1]
    else:
        row = Row(*policy_logps, *reference, *lengths)
        loss = BY_ROW[loss_type].value(row, **options)
        weight = BY_ROW[loss_type].pulls(row, **options)[0]
        if loss_type in ("averaged_ipo", "averaged_dpo", "simpo", "orpo"):
            tokens = [float(length) for length in lengths]
        if loss_type in ("simpo", "orpo", "unlikelihood"):
            scores = policy_logps
            rewards = [x / n for x, n in zip(scores, tokens)]
            rewards = [log_odds(x) if loss_type == "orpo" else options.get("beta", 1) * x for x in rewards]
        elif loss_type in ("averaged_ipo", "averaged_dpo"):
            rewards = [reward / n for reward, n in zip(rewards, tokens)]
        margin = rewards[0] - rewards[1]
    # float32 rounding of the longer of the two: what is closer cannot be told apart, in whatever dtype
    blur = [1e-4 * math.sqrt(length) / n for length, n in zip(lengths, tokens)]
    ties = [max(pair) for pair in itertools.pairwise(blur)]
    averages = [score / n for score, n in zip(scores, tokens)]
    apart = [better - worse for better, worse in itertools.pairwise(averages)]
    return {
        "loss": loss,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[-1],
        "rewards/margins": margin,
        "rewards/accuracies": sum(a > tie for a, tie in zip(apart, ties)) / len(ties),
        "logps/chosen": policy_logps[0],
        "logps/rejected": policy_logps[-1],
        "dpo/gradient_weight": weight,
        "dpo/saturated_fraction": float(margin > math.log(99)),
        "dpo/displacement": float(ratios[0] < -1e-4 * math.sqrt(lengths[0])),
        "dpo/chosen_logratio": ratios[0],
        "dpo/ties": sum(abs(a) <= tie for a, tie in zip(apart, ties)) / len(ties),
    } | ({"kto/kl_estimate": z0} if loss_type == "kto" else {})


def divergence(policy_logps: list[list[float]], reference: list[list[float]]) -> float:
    """KTO's z0 of a window, whose rows end with a mismatched completion."""
    return max(0.0, sum(p[-1] - r[-1] for p, r in zip(policy_logps, reference)) / len(reference))


def check_by_hand(loss_type: str, seed: int, beta: float, sizes: list[int]) -> None:
    gpt, reference = loud(GPT(SHAPE), seed), loud(GPT(SHAPE), seed + 1)
    rows = rows_of(seed, sizes_of(loss_type, sum(sizes)))
    policy_logps, reference_table = looped(gpt, rows), looped(reference, rows)
    estimator = gpt if loss_type == "kto" else None
    window = make_window(rows, cut(rows, sizes), padded(reference_table), policy=estimator, **HERE)
    options = options_of(loss_type, beta)
    record = average(preference_objective(gpt, loss_type, dtype="float32", **options), window)
    z0 = divergence(policy_logps, reference_table) if loss_type == "kto" else 0.0
    expected = [
        by_hand(loss_type, options, p, r, [len(ids) for ids in row.completions], z0)
        for p, r, row in zip(policy_logps, reference_table, rows)
    ]
    assert list(record) == list(expected[0])
    for name in record:
        mean = sum(row[name] for row in expected) / len(rows)
        assert record[name] == pytest.approx(mean, **({"abs": 1e-6} if name in SHARES else CLOSE)), name
    if loss_type == "dpo":  # and the package's own loss, on the same log-probabilities
        columns = [column for table in (policy_logps, reference_table) for column in padded(table).unbind(-1)]
        assert record["loss"] == pytest.approx(dpo_loss(*columns, **options).losses.mean().item(), **CLOSE)


# Seed, beta and micro-batches: of one size, of a smaller last one, of a larger one, and one row alone.
CASES = [(11, 0.7, [3, 4, 1]), (12, 0.05, [2, 2]), (13, 2.0, [1, 1, 4]), (14, 0.3, [1])]


@pytest.mark.parametrize("loss_type", ALONE)
def test_loss_and_metrics_are_those_of_a_loop_over_tokens(loss_type):
    """A log-probability that is a mean, holds prompt tokens or another row's reference; a metric of the wrong
    column, without beta or averaged over micro-batches instead of rows. Every loss on the first case; what
    the other cases vary is the same code for all losses of a kind."""
    for seed, beta, sizes in CASES if loss_type in KINDS else CASES[:1]:
        check_by_hand(loss_type, seed, beta, sizes)


def test_by_hand_fixed():
    """The same on a case that is no luck of the draw: for the planted mistakes below."""
    for loss_type in ("dpo", "ipo", "plackett_luce"):
        check_by_hand(loss_type, 5, 0.3, [3, 3, 1])


def relatives_by_hand():
    for loss_type in ("simpo", "kto", "unlikelihood", "averaged_ipo"):
        check_by_hand(loss_type, 5, 0.3, [3, 3, 1])


def test_the_mismatched_completion_only_moves_ktos_estimate():
    """It is no part of what is trained, and the better it is the higher is z0, one for the whole window."""
    gpt, rows = gpt_of(1), rows_of(1, [3] * 4)
    objective = preference_objective(gpt, "kto", dtype="float32", **options_of("kto"))
    with torch.no_grad():
        live = completion_logps_of(gpt, layout(rows, **HERE), "float32")
    shifts = torch.tensor([0.5, -0.1, 0.3, 0.1])
    for factor, z0 in ((1, 0.2), (-1, 0.0)):
        reference = live - factor * shifts[:, None]
        window = make_window(rows, [[0], [3, 1, 2]], reference, policy=gpt, **HERE)
        for micro, own in zip(window.micro_batches, ([0], [3, 1, 2])):
            metrics = objective(micro)[1]
            assert metrics["kto/kl_estimate"].item() == pytest.approx(z0, abs=1e-5)  # float32
            assert micro.batch.completion_lengths.tolist() == [
                [len(ids) for ids in rows[n].completions[:2]] for n in own
            ]
            assert metrics["logps/rejected"].item() == pytest.approx(live[own, 1].mean().item(), rel=1e-6)
    pairs = make_window(rows_of(0, [2] * 3), [[0, 1, 2]], torch.zeros(3, 2), policy=gpt, **HERE)
    with pytest.raises(InputError, match="takes pairs"):  # rows that `with_mismatched` has not seen
        objective(pairs.micro_batches[0])


def apart(rows: list[Example]) -> list[Example]:
    """Each pair with a mismatched completion as two labelled rows with the same one."""
    return [
        row._replace(completions=[ids, row.completions[2]], label=good, place=f"{row.place}, {good}")
        for row in rows
        for ids, good in zip(row.completions[:2], (True, False))
    ]


def test_pairs_taken_apart_cost_what_they_cost_together():
    """Loss, gradient, z0 and the means over good and over bad rows; a pair's pull is half of its good row's,
    because its loss is the mean of two."""
    gpt, rows = loud(GPT(SHAPE), 2), rows_of(2, [3] * 5)
    table = looped(loud(GPT(SHAPE), 3), rows)
    singles = [[logps[side], logps[2]] for logps in table for side in (0, 1)]
    objective = preference_objective(gpt, "kto", dtype="float32", **options_of("kto"))
    found = []
    for some, step, reference in ((rows, [[0, 1, 2], [3, 4]], table), (apart(rows), SINGLES, singles)):
        window = make_window(some, step, padded(reference), policy=gpt, **HERE)
        (record,) = train(objective, torch.optim.SGD(gpt.parameters(), lr=0.0), [window])
        found.append((record, [parameter.grad.clone() for parameter in gpt.parameters()]))
    (pair, together), (single, separate) = found
    for one, other in zip(together, separate):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)  # float64 sums in another order
    assert set(single) == set(pair)
    for name in {"loss", "grad_norm", *pair} - SHARES - {"dpo/gradient_weight"}:
        assert single[name] == pytest.approx(pair[name], **CLOSE), name
    assert single["dpo/displacement"] == pytest.approx(pair["dpo/displacement"], abs=1e-6)


SINGLES = [[9, 0, 2], [4], [1, 3, 5], [6, 8], [7]]  # micro-batches of one class among them


def labelled_by_hand(options: dict, rows: list[Example], policy_logps, reference, z0: float) -> dict:
    """Loss and metrics of labelled rows, in plain Python."""
    columns: dict[str, list[float]] = {}
    for row, (policy_logp, _), (reference_logp, _) in zip(rows, policy_logps, reference):
        ratio, blur = policy_logp - reference_logp, 1e-4 * math.sqrt(len(row.completions[0]))
        reward, sign = options["beta"] * ratio, 1 if row.label else -1
        near = 1 / (1 + math.exp(-sign * (reward - options["beta"] * z0)))
        weight = options["desirable_weight" if row.label else "undesirable_weight"]
        side = "chosen" if row.label else "rejected"
        values = {
            "loss": weight * (1 - near), f"rewards/{side}": reward, f"logps/{side}": policy_logp,
            "rewards/accuracies": sign * ratio > blur, "dpo/ties": abs(ratio) <= blur,
            "dpo/gradient_weight": weight * options["beta"] * near * (1 - near),
            "dpo/saturated_fraction": sign * reward > math.log(99), "kto/kl_estimate": z0,
        }  # fmt: skip
        if row.label:
            values |= {"dpo/displacement": ratio < -blur, "dpo/chosen_logratio": ratio}
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    if {"rewards/chosen", "rewards/rejected"} <= set(means):
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


LABELS = {"both": [True, False, False, True, False, False, False], "good": [True] * 7, "bad": [False] * 7}


@pytest.mark.parametrize("labels", LABELS)
def test_labelled_rows_by_hand_however_they_are_cut(labels):
    """Means over one class are those of the window: of micro-batches without it, of different shares of it,
    or with none at all in the window, where nothing is said of it. Gradients against autograd on losses
    written out."""
    check_labelled(labels)


def check_labelled(labels: str = "both") -> None:
    gpt, options = loud(GPT(SHAPE), 6), options_of("kto", 0.7)
    rows = [row._replace(label=label) for row, label in zip(rows_of(6, [2] * 7), LABELS[labels])]
    table = looped(loud(GPT(SHAPE), 7), rows)
    policy_logps = looped(gpt, rows)
    z0 = divergence(policy_logps, table)
    expected = labelled_by_hand(options, rows, policy_logps, table, z0)
    losses = []
    for row, (reference, _) in zip(rows, table):
        ids = torch.tensor([row.prompt + row.completions[0]])
        lengths = torch.tensor([len(row.prompt)]), torch.tensor([ids.shape[1]])
        gain = 0.7 * (sequence_logps(gpt, SequenceBatch(ids, *lengths)) - reference - z0)
        losses.append(1.3 * torch.sigmoid(-gain) if row.label else 0.8 * torch.sigmoid(gain))
    gradient = gradients(gpt, sum(losses) / len(rows))
    objective = preference_objective(gpt, "kto", dtype="float32", **options)
    for step in ([[0, 1, 2, 3, 4, 5, 6]], [[1, 2], [0, 4, 3], [5, 6]], [[n] for n in range(7)]):
        window = make_window(rows, step, padded(table), policy=gpt, **HERE)
        (record,) = train(objective, torch.optim.SGD(gpt.parameters(), lr=0.0), [window])
        for name, parameter in gpt.named_parameters():
            torch.testing.assert_close(parameter.grad, gradient[name], rtol=1e-9, atol=1e-12)
        assert set(record) - {"step", "grad_norm", "learning_rate"} == set(expected)
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, **({"abs": 1e-6} if name in SHARES else CLOSE)), name


@settings(max_examples=8)
@given(seed=seeds, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_sft_loss_is_minus_the_mean_over_all_tokens(seed, sizes):
    """A mean of sequence means weighs short rows too much; a mean of micro-batch means, small ones."""
    check_sft(seed, sizes)


def check_sft(seed: int, sizes: list[int]) -> None:
    gpt, rows = loud(GPT(SHAPE), seed), rows_of(seed, [1] * sum(sizes))
    record = average(sft_objective(gpt, dtype="float32"), make_window(rows, cut(rows, sizes), None, **HERE))
    tokens = sum(len(row.completions[0]) for row in rows)
    total = sum(logp for (logp,) in looped(gpt, rows))
    assert record == {"loss": pytest.approx(-total / tokens, **CLOSE)}


def window_with_shifts(shifts: list[list[float]], *, dtype: str = "float32") -> tuple[GPT, PreferenceBatch]:
    """Rows whose policy lies these many nats above the reference, up to the float32 rounding of a sum."""
    gpt = gpt_of(0)
    rows = rows_of(0, [len(row) for row in shifts])
    batch = layout(rows, dtype=dtype, device="cpu")
    with torch.no_grad():
        live = completion_logps_of(gpt, batch, dtype)
    return gpt, PreferenceBatch(batch, live - torch.tensor(shifts))


def test_wrong_order_ties_and_displacement_are_counted_apart():
    """#1, #2: a tie counted as right makes an untrained policy look good; a falling chosen completion that
    nobody counts hides behind a falling loss."""
    gpt, micro = window_with_shifts([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, -2.0]])
    _, metrics = preference_objective(gpt, "dpo", dtype="float32", beta=0.1)(micro)
    counts = {name: metrics[name].item() for name in SHARES}
    approx = pytest.approx  # float32 means of 0 and 1
    assert counts == {
        "rewards/accuracies": approx(2 / 5),
        "dpo/ties": approx(2 / 5),
        "dpo/displacement": approx(2 / 5),
        "dpo/saturated_fraction": 0,
    }
    # the same rows the other way round: what was right is wrong, ties stay
    swapped = micro._replace(reference_logps=2 * logps_of(gpt, micro) - micro.reference_logps)
    _, metrics = preference_objective(gpt, "dpo", dtype="float32", beta=0.1)(swapped)
    assert metrics["rewards/accuracies"].item() == approx(1 / 5)
    assert metrics["dpo/ties"].item() == approx(2 / 5)


def logps_of(gpt: GPT, micro: PreferenceBatch) -> torch.Tensor:
    with torch.no_grad():
        return completion_logps_of(gpt, micro.batch, "float32")


def test_a_ranking_counts_its_neighbours():
    """Best against worst alone would call 3 > 1 > 2 > 0 well ordered."""
    gpt, micro = window_with_shifts([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, -9.0]])
    _, metrics = preference_objective(gpt, "plackett_luce", dtype="float32", beta=1.0)(micro)
    assert metrics["rewards/accuracies"].item() == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["dpo/ties"].item() == pytest.approx(1 / 3)
    # margins 3 and 9 nats; odds of 99 : 1 are 4.6
    assert metrics["dpo/saturated_fraction"].item() == pytest.approx(1 / 2)


@pytest.mark.parametrize("dtype, nats", [("float32", 1e-4), ("bfloat16", 0.3)])
def test_displacement_is_more_than_rounding(dtype, nats):
    """#2: at the first step half of the rows lie below the reference by a rounding."""
    gpt, micro = window_with_shifts([[0.0, 0.0]] * 4, dtype=dtype)
    edge = nats * micro.batch.completion_lengths[:, 0].sqrt()
    objective = preference_objective(gpt, "dpo", dtype=dtype, beta=0.1)
    for factor, share in ((0.0, 0), (0.8, 0), (1.2, 1)):
        reference = micro.reference_logps.clone()
        reference[:, 0] += factor * edge
        assert objective(micro._replace(reference_logps=reference))[1]["dpo/displacement"].item() == share


# -------------------------------------------------------------------------------------------- accumulation


def separate_gradients(gpt: GPT, loss_type: str | None, rows: list[Example], reference, beta: float) -> dict:
    """Of the whole window as one mean, each completion a sequence of its own."""
    losses, tokens = [], 0
    z0 = divergence(looped(gpt, rows), reference.tolist()) if loss_type == "kto" else 0.0
    for number, row in enumerate(rows):
        logps = []
        for ids in row.completions:
            lengths = torch.tensor([len(row.prompt)]), torch.tensor([len(row.prompt) + len(ids)])
            logps.append(sequence_logps(gpt, SequenceBatch(torch.tensor([row.prompt + ids]), *lengths)))
            tokens += len(ids)
        if loss_type is None:
            losses.append(-sum(logps))
            continue
        ratios = torch.cat(logps) - reference[number, : len(logps)]
        if loss_type in {*BY_ROW, *RECORDS}:  # itself tested elsewhere; here, how rows are put together
            lengths = torch.tensor([[len(ids) for ids in row.completions]])
            of_row = PreferenceBatch(SharedPromptBatch(None, None, lengths), reference[number : number + 1])
            loss = loss_of(LOSSES[loss_type], torch.stack(logps, -1), of_row, options_of(loss_type))
            losses.append(loss.losses)
        elif loss_type == "kto":  # the third is not the row's own
            good, bad = torch.sigmoid(beta * (ratios[:2] - z0))
            losses.append((1.3 * (1 - good) + 0.8 * bad) / 2)
        elif loss_type == "ipo":
            losses.append((ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2)
        else:  # with two answers, Plackett-Luce is DPO
            losses.append(sum((beta * ratios[k:]).logsumexp(0) - beta * ratios[k] for k in range(len(logps))))
    return gradients(gpt, sum(losses) / (tokens if loss_type is None else len(rows)))


WINDOWS = [[7], [3, 3, 1], [1, 4, 2], [1] * 7]


@pytest.mark.parametrize("loss_type", [*KINDS, None])
def test_micro_batches_give_what_the_whole_window_gives(loss_type):
    """#14: a share forgotten or the same for each micro-batch, above all for a last smaller one; tokens where
    rows are meant or the reverse; a gradient that is not accumulated, or is twice."""
    gpt = loud(GPT(SHAPE), 3)
    rows = rows_of(3, [1] * 7 if loss_type is None else sizes_of(loss_type, 7))
    reference = None if loss_type is None else padded(looped(loud(GPT(SHAPE), 4), rows))
    expected, before = separate_gradients(gpt, loss_type, rows, reference, 0.3), copy.deepcopy(gpt)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    records = []
    for sizes in WINDOWS:
        gpt.load_state_dict(before.state_dict())
        if loss_type is None:
            objective = sft_objective(gpt, dtype="float32")
        else:
            objective = preference_objective(gpt, loss_type, dtype="float32", **options_of(loss_type))
        estimator = gpt if loss_type == "kto" else None
        window = make_window(rows, cut(rows, sizes), reference, policy=estimator, **HERE)
        (record,) = train(objective, torch.optim.SGD(gpt.parameters(), lr=1.0), [window])
        records.append(record)
        for (name, after), start in zip(gpt.named_parameters(), before.parameters()):
            # float64 sums in another order: parts in 10^12 of the largest entry; p - g adds a rounding of p
            error = (start - after - expected[name]).abs().max().item()
            assert error <= 1e-10 * scale + 1e-14, (sizes, name)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in expected.values()))
    for record in records:
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-9)
        for name, value in record.items():
            close = {"abs": 1e-6} if name in SHARES else CLOSE
            assert value == pytest.approx(records[0][name], **close), name


def test_a_window_knows_its_rows_and_shares():
    rows = rows_of(0, [2] * 5)
    reference = torch.arange(15.0).view(5, 3)  # a third column, for rankings elsewhere
    window = make_window(rows, [[4, 0], [2]], reference, **HERE)
    assert window.shares == [2 / 3, 1 / 3] and window.name == "row 5; row 1; row 3"
    assert [micro.reference_logps.tolist() for micro in window.micro_batches] == [
        [[12, 13], [0, 1]],
        [[6, 7]],
    ]
    assert window.micro_batches[1].batch.ids[0].tolist() == sum(rows[2].completions, rows[2].prompt)
    rows = rows_of(0, [1] * 5)
    window = make_window(rows, [[0, 1], [2, 3], [4]], None, **HERE)
    tokens = [len(row.completions[0]) for row in rows]
    assert window.name == "row 1; row 2; row 3 and 2 more"
    assert window.shares == [
        n / sum(tokens) for n in (tokens[0] + tokens[1], tokens[2] + tokens[3], tokens[4])
    ]


# ------------------------------------------------------------------------------------------ the first step


def start_of(
    gpt, reference, rows, loss_type, dtype, beta, sizes=(3, 3, 2), reference_size=5
) -> tuple[dict, Window]:
    """The first record of a training from gpt and its window; by default the reference in passes of other
    shapes."""
    table = reference_logps(reference, rows, micro_size=reference_size, dtype=dtype)
    window = make_window(rows, cut(rows, list(sizes)), table, dtype=dtype, device="cpu")
    return average(preference_objective(gpt, loss_type, dtype=dtype, beta=beta), window), window


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.1, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_loss_is_ln_2(dtype, beta, seed):
    """#2, #12: a reference in another precision than the policy, with dropout, of other rows or columns."""
    wide = GPTConfig(vocab_size=VOCAB, block_size=256, n_layer=2, n_head=2, n_embd=64)
    gpt, rows = gpt_of(seed, wide), rows_of(seed, [2] * 8, prompt=30, completion=60)
    record, _ = start_of(gpt, gpt, rows, "dpo", dtype, beta, sizes=[1] * 8, reference_size=1)
    # Passes of the same shapes agree bit for bit, so only float32's rounding of ln 2 remains.
    assert abs(record["loss"] - math.log(2)) <= 1e-6
    _, window = start_of(gpt, gpt, rows, "dpo", dtype, beta)
    check_start(gpt, window, dtype=dtype)  # passes of other shapes: within what rounding can do


def test_a_start_by_name_is_the_loss_where_policy_is_reference():
    """The number that figures show and the loss that is trained must not part."""
    for name, of in LOSSES.items():
        if of.start is None:  # nothing to start from: the same rows under another policy cost something else
            assert name in ("simpo", "orpo", "unlikelihood", "rpo")
            continue
        for K in (2,) if of.rows == "preferences" else (2, 3, 5):
            for beta in (0.1, 3.0):
                logps = torch.randn(4, K, dtype=torch.float64)
                lengths = torch.randint(1, 9, logps.shape)
                micro = PreferenceBatch(SharedPromptBatch(None, None, lengths), logps, torch.tensor(0.0))
                options = options_of(name, beta)
                losses = loss_of(of, logps, micro, options).losses
                assert losses.tolist() == pytest.approx([of.start(K, **options)] * 4, rel=1e-12)


@pytest.mark.parametrize("dtype, nats", [("float32", 1e-4), ("bfloat16", 0.3)])
def test_rounding_alone_is_never_refused_and_anything_more_is(dtype, nats):
    """A run stopped at its first step although nothing is wrong; or a mistake in one of many completions that
    a mean would hide. Long completions and rankings of uneven length too."""
    gpt, rows = gpt_of(7), rows_of(7, [2, 3, 4, 2, 3], completion=40)
    window = make_window(rows, cut(rows, [3, 2]), torch.zeros(5, 4), dtype=dtype, device="cpu")
    for factor, seed in itertools.product((0.95, 1.05), range(4)):
        pieces = []
        for micro in window.micro_batches:
            with torch.no_grad():
                live = completion_logps_of(gpt, micro.batch, dtype)
            signs = 2.0 * torch.randint(2, live.shape, generator=torch.Generator().manual_seed(seed)) - 1
            box = nats * micro.batch.completion_lengths.sqrt()
            pieces.append(micro._replace(reference_logps=live + 0.95 * signs * box))
        K = pieces[-1].reference_logps.shape[1]
        pieces[-1].reference_logps[-1, K - 1] += (factor - 0.95) * (signs * box)[-1, K - 1]
        if factor < 1:
            check_start(gpt, window._replace(micro_batches=pieces), dtype=dtype)
        else:
            with pytest.raises(InputError, match="row"):
                check_start(gpt, window._replace(micro_batches=pieces), dtype=dtype)


def other_weights(gpt, rows, table):
    stale = copy.deepcopy(gpt)
    with torch.no_grad():
        for parameter in stale.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return reference_logps(stale, rows, micro_size=5, dtype="float32")


def other_tokens(gpt, rows, table):  # one token of each completion
    changed = [
        row._replace(completions=[[(ids[0] + 1) % VOCAB, *ids[1:]] for ids in row.completions])
        for row in rows
    ]
    return reference_logps(gpt, changed, micro_size=5, dtype="float32")


def truncated(gpt, rows, table):
    return reference_logps(gpt, [row._replace(prompt=row.prompt[-1:]) for row in rows], **PASSES)


def swapped(gpt, rows, table):
    return table.flip(-1)


def next_row(gpt, rows, table):
    return table.roll(1, 0)


def missing(gpt, rows, table):
    return torch.where(torch.arange(len(table)).unsqueeze(-1) == 7, math.nan, table)


PASSES = {"micro_size": 5, "dtype": "float32"}


@pytest.mark.parametrize(
    "mistake, dtype",
    [(mistake, "float32") for mistake in (other_weights, other_tokens, truncated, swapped, next_row, missing)]
    + [(mistake, "bfloat16") for mistake in (other_weights, other_tokens, swapped, next_row, missing)],
)
def test_a_reference_that_is_not_the_policys_is_refused(mistake, dtype):
    """#12, #13: a run on stale log-probabilities trains towards something else and looks healthy."""
    for seed in range(5):
        gpt, rows = gpt_of(seed, scale=0.4), rows_of(seed, [2] * 8, completion=20)
        table = mistake(gpt, rows, reference_logps(gpt, rows, **PASSES))
        window = make_window(rows, cut(rows, [3, 3, 2]), table, dtype=dtype, device="cpu")
        with pytest.raises(
            InputError, match=r"^the first loss [^\n]*row \d[^\n]*delete reference_logps[^\n]*\.$"
        ):
            check_start(gpt, window, dtype=dtype)


# ----------------------------------------------------------------------------------------------- precision


class Watched(GPT):
    """Keeps the logits that it gave."""

    def project(self, hidden):
        self.logits = super().project(hidden)
        return self.logits


def test_in_bfloat16_the_log_softmax_is_still_float32():
    """#15: a log-softmax in bfloat16 is off by a part in 250 of each log-probability, a loss in bfloat16 of
    each sum; and without autocast nothing is saved."""
    gpt = Watched(SHAPE)
    gpt.load_state_dict(gpt_of(1, scale=0.4).state_dict())
    rows = rows_of(1, [2] * 8, completion=30)
    batch = layout(rows, dtype="bfloat16", device="cpu")
    assert batch.ids.shape[1] % 16 == 0
    logps = completion_logps_of(gpt, batch, "bfloat16")
    assert gpt.logits.dtype == torch.bfloat16 and logps.dtype == torch.float32
    completions = [ids for row in rows for ids in row.completions]
    targets = torch.tensor(list(itertools.chain(*completions)))
    exact = gpt.logits.double().log_softmax(-1)[torch.arange(len(targets)), targets]
    sums = [part.sum().item() for part in exact.split([len(ids) for ids in completions])]
    # up to 30 terms, each right to 2^-22 of logits near 30; in bfloat16 it would be 0.1
    assert logps.flatten().tolist() == pytest.approx(sums, abs=1e-3)
    loss, metrics = preference_objective(gpt, "dpo", dtype="bfloat16", beta=0.1)(
        PreferenceBatch(batch, logps.detach())
    )
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
    assert metrics["logps/chosen"].item() == pytest.approx(sum(sums[::2]) / 8, abs=1e-3)
    assert layout(rows, **HERE).ids.shape[1] == max(len(sum(row.completions, row.prompt)) for row in rows)


@pytest.mark.parametrize("name, first_step", [("adamw", 1.0), ("rmsprop", 10.0)])
def test_weights_stay_float32_and_small_steps_count(name, first_step):
    """#15: a weight of 0.2 in bfloat16 has neighbours 1e-3 away, so a step of 5e-7 would change nothing."""
    gpt, rows = gpt_of(2), rows_of(2, [2] * 6)
    before = copy.deepcopy(gpt)
    _, window = start_of(gpt, gpt_of(3), rows, "dpo", "bfloat16", 0.5, sizes=(4, 2))
    optimizer = make_optimizer(gpt.parameters(), name, 5e-7)
    objective = preference_objective(gpt, "dpo", dtype="bfloat16", beta=0.5)
    assert len(list(train(objective, optimizer, [window]))) == 1
    for (label, after), start in zip(gpt.named_parameters(), before.parameters()):
        assert after.dtype == after.grad.dtype == torch.float32
        assert all(v.dtype == torch.float32 for v in optimizer.state[after].values() if v.numel() > 1)
        large = after.grad.abs() > 1e-5  # far above eps = 1e-8 of both optimizers
        moved = (start - after)[large] / 5e-7
        # the first step is a sign times the rate, or 1 / sqrt(1 - 0.99) of it; weights near 1 are 6e-8 apart
        assert torch.allclose(moved, first_step * after.grad[large].sign(), atol=0.25, rtol=0.01), label
        assert torch.equal(after[after.grad == 0], start[after.grad == 0])  # no weight decay


def test_scoring_has_no_dropout():
    """#3: noise in the policy or the reference is noise in every margin."""
    gpt, rows = gpt_of(4), rows_of(4, [2] * 3)
    batch = layout(rows, **HERE)
    first, second = (completion_logps_of(gpt.train(), batch, "float32") for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, completion_logps_of(gpt.eval(), batch, "float32"))


def test_one_log_probability_that_is_not_finite_is_enough(monkeypatch):
    """Of a batch: its mean would be NaN, or its gradient."""
    batch, found = layout(rows_of(4, [2] * 3), **HERE), torch.zeros(3, 2)
    monkeypatch.setattr(objectives, "shared_prompt_logps", lambda *_: found)
    assert completion_logps_of(gpt_of(0), batch, "float32") is found
    for bad in (math.nan, -math.inf):
        found[1, 0] = bad
        with pytest.raises(InputError, match=r"^a log-probability is not finite; [^\n]*\.$"):
            completion_logps_of(gpt_of(0), batch, "float32")


def test_an_unknown_dtype_is_refused():
    rows = rows_of(0, [1])
    for dtype in ("float16", "bf16"):
        with pytest.raises(InputError, match=rf"^--dtype {dtype}: choose one of float32, bfloat16\.$"):
            completion_logps_of(gpt_of(0), layout(rows, **HERE), dtype)


# --------------------------------------------------------------------------------- reference, kept for later


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_and_live_log_probabilities_agree(dtype):
    """#12: rows given back in the order of their lengths, columns shifted, another precision. In batches of
    the same shape bit for bit, in others to the rounding of their tokens."""
    gpt, rows = gpt_of(6), rows_of(6, [2, 3, 2, 4, 3, 2, 2, 3, 2], prompt=20, completion=40)
    seen = []

    def progress(passes):
        assert len(passes) == len(list(passes))  # a bar knows how many there are
        for rows_of_pass in passes:
            seen.append(rows_of_pass)
            yield rows_of_pass

    table = reference_logps(gpt, rows, micro_size=4, dtype=dtype, progress=progress)
    assert table.shape == (9, 4) and table.dtype == torch.float32 and not table.requires_grad
    assert sorted(index for indices in seen for index in indices) == list(range(9))
    assert max(map(len, seen)) <= 4 and len(seen) < 9
    for indices in seen:
        batch = layout([rows[index] for index in indices], dtype=dtype, device="cpu")
        live = completion_logps_of(gpt, batch, dtype)
        assert torch.equal(live, table[indices, : live.shape[1]])
    for row, kept in zip(rows, table):
        live = completion_logps_of(gpt, layout([row], dtype=dtype, device="cpu"), dtype)[0]
        K = len(row.completions)
        lengths = torch.tensor([len(ids) for ids in row.completions])
        bound = {"float32": 1e-4, "bfloat16": 0.3}[dtype] * lengths.sqrt()  # as in the first step's check
        assert ((live - kept[:K]).abs() <= bound).all()
        assert kept[K:].isnan().all()
    exact = looped(copy.deepcopy(gpt).double(), rows)
    error = max(abs(kept - e) for row, values in zip(table.tolist(), exact) for kept, e in zip(row, values))
    # Measured 9e-6 and 8e-3 nats, of sums down to -94; ten times that for other orders of adding up.
    assert error <= {"float32": 1e-4, "bfloat16": 0.1}[dtype]


def test_the_key_knows_all_that_log_probabilities_depend_on():
    """#12: a file of older weights, of another vocabulary or of rows cut elsewhere, taken for this one."""
    gpt, tokenizer, rows = gpt_of(0), byte_tokenizer(), rows_of(0, [2] * 3, prompt=6)
    moved = copy.deepcopy(gpt)
    with torch.no_grad():
        moved.wpe.weight[-1, -1] += 1e-7  # the smallest change of the last number
    heads = GPT(GPTConfig(**vars(SHAPE) | {"n_head": 4}))
    heads.load_state_dict(gpt.state_dict())
    first = rows[0]
    longest = max(rows, key=lambda row: len(row.prompt))
    cut_left = [row._replace(prompt=row.prompt[1:]) if row is longest else row for row in rows]
    shifted = [first._replace(prompt=first.prompt + first.completions[0][:1]), *rows[1:]]
    joined = [first._replace(completions=[first.completions[0] + first.completions[1]]), *rows[1:]]
    variants = [
        (gpt, tokenizer, rows, "float32"),
        (moved, tokenizer, rows, "float32"),
        (heads, tokenizer, rows, "float32"),
        (gpt, train_bpe("abab" * 9, 258), rows, "float32"),
        (gpt, tokenizer, rows, "bfloat16"),
        (gpt, tokenizer, cut_left, "float32"),
        (gpt, tokenizer, shifted, "float32"),
        (gpt, tokenizer, joined, "float32"),
        (gpt, tokenizer, rows[::-1], "float32"),
        (gpt, tokenizer, rows[:-1], "float32"),
        (gpt, tokenizer, [row._replace(completions=row.completions[::-1]) for row in rows], "float32"),
    ]
    keys = [cache_key(*variant) for variant in variants]
    assert len(set(keys)) == len(keys)
    renamed = [row._replace(place="elsewhere") for row in rows]
    assert cache_key(copy.deepcopy(gpt), byte_tokenizer(), renamed, "float32") == keys[0]


def test_a_kept_table_comes_back_bit_for_bit_and_only_for_its_key(tmp_path):
    path = tmp_path / "reference_logps.safetensors"
    assert load_reference_logps(path, "key") is None
    table = torch.tensor([[-1.5, -1e-30, math.nan], [-500.25, 0.1, -3.0]]).T  # not contiguous
    save_reference_logps(path, table, "key")
    back = load_reference_logps(path, "key")
    assert torch.equal(back.view(torch.int32), table.contiguous().view(torch.int32))
    assert load_reference_logps(path, "another") is None
    save_reference_logps(path, table + 1, "another")  # replaces it
    assert load_reference_logps(path, "key") is None
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_table_is_named(tmp_path):
    """A run that computes it again in silence hides a failing disk; one that trains on it is worse."""
    path = tmp_path / "reference_logps.safetensors"
    save_reference_logps(path, torch.randn(5, 2), "key")
    whole = path.read_bytes()
    damages = [whole[:length] for length in (0, 7, 30, len(whole) - 41, len(whole) - 1)]
    damages += [b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:], whole + b"x", b"not a table at all"]
    for content in damages:
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_reference_logps(path, "key")
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and message.endswith("compute it again."), content[:20]
        assert "\n" not in message
    safetensors.torch.save_file({"other": torch.zeros(2)}, path, metadata={"key": "key"})
    with pytest.raises(InputError, match="damaged"):
        load_reference_logps(path, "key")


def test_a_full_disk_leaves_the_older_table(tmp_path, monkeypatch):
    """Half a file in place of a whole one, or a temporary file left behind."""
    path = tmp_path / "reference_logps.safetensors"
    save_reference_logps(path, torch.ones(3, 2), "key")
    whole = path.read_bytes()

    def full(content, target, metadata):
        target.write_bytes(whole[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        InputError, match=r"cannot be written .*No space left on device.*free some space there\.$"
    ):
        save_reference_logps(path, torch.zeros(3, 2), "key")
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------- options


OPTIONS = {option.name for loss in LOSSES.values() for option in loss.options}
BAD_VALUES = {"beta": (0, -0.1, math.nan, math.inf, "0.1"), "label_smoothing": (-0.1, 0.5, math.nan, "0.1")}
BAD_VALUES |= {"gamma": (-0.1, math.nan, math.inf, "1"), "alpha": (-0.1, 1.1, math.nan, "0.5")}
BAD_VALUES |= {"flip_probability": BAD_VALUES["label_smoothing"], "lam": BAD_VALUES["gamma"]}
BAD_VALUES |= {"nll_weight": BAD_VALUES["gamma"], "tau": (0, -0.1, 1.1, math.nan, "0.5")}
BAD_VALUES |= {f"{side}desirable_weight": BAD_VALUES["beta"] for side in ("", "un")}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_options_that_a_loss_does_not_use_are_refused(loss_type):
    """#10: label smoothing given to a loss that ignores it; a beta that nobody gave."""
    good = options_of(loss_type)
    assert loss_options(loss_type, dict.fromkeys(OPTIONS) | good) == good
    assert set(BAD_VALUES) == set(OPTIONS)
    for name in OPTIONS:
        flag = "--" + name.replace("_", "-")
        if name not in good:
            with pytest.raises(InputError, match=rf"^--loss-type {loss_type} does not use {flag}; .*\.$"):
                loss_options(loss_type, good | {name: 0.1})
            with pytest.raises(InputError, match=f"does not use {flag}"):
                preference_objective(gpt_of(0), loss_type, dtype="float32", **good, **{name: 0.1})
            continue
        for missing in ({}, {name: None}):
            with pytest.raises(InputError, match=rf"^--loss-type {loss_type} needs {flag}\.$"):
                loss_options(loss_type, {key: good[key] for key in good if key != name} | missing)
        for value in BAD_VALUES[name]:
            with pytest.raises(InputError, match=rf"^{flag} must .*\.$"):
                loss_options(loss_type, good | {name: value})
    zeros = {"flip_probability": 0.0, "gamma": 0, "lam": 0, "alpha": 0, "nll_weight": 0}
    zeros |= {} if loss_type == "exo" else {"label_smoothing": 0}  # whose divergence would be infinite
    edge = good | {name: zeros[name] for name in good if name in zeros}
    assert loss_options(loss_type, edge) == edge


def test_an_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(
        InputError, match=r"^--loss-type ppo: no such loss; choose one of dpo, [^.]*cdpo, [^.]*luce\.$"
    ):
        loss_options("ppo", {"beta": 0.1})


def test_weights_that_are_not_numbers_stop_the_first_step():
    """Named with step and rows, before anything moves."""
    gpt = gpt_of(0)
    rows = {name: rows_of(0, [3 if name == "kto" else 2] * 5) for name in (*LOSSES, None)}
    tables = {name: reference_logps(gpt, some, **PASSES) for name, some in rows.items()} | {None: None}
    sound = copy.deepcopy(gpt)
    gpt.ln_f.bias.data[0] = math.nan
    before = copy.deepcopy(gpt.state_dict())
    for loss_type in (*LOSSES, None):
        if loss_type is None:
            objective = sft_objective(gpt, dtype="float32")
        else:
            objective = preference_objective(gpt, loss_type, dtype="float32", **options_of(loss_type))
        of_rows = functools.partial(make_window, rows[loss_type], [[0, 1], [2, 3, 4]], tables[loss_type])
        window = of_rows(policy=sound if loss_type == "kto" else None, **HERE)
        if loss_type == "kto":
            with pytest.raises(InputError, match=r"not finite; lower the learning rate"):
                of_rows(policy=gpt, **HERE)
        stream = train(objective, make_optimizer(gpt.parameters(), "adamw", 0.1), [window], first_step=8)
        with pytest.raises(InputError, match=r"^step 8 \(row 1; row 2; row 3 and 2 more\): .*; lower .*\.$"):
            next(stream)
        for name, weight in gpt.state_dict().items():
            assert torch.equal(weight.view(torch.int32), before[name].view(torch.int32)), name  # NaN too


# ----------------------------------------------------------------------------------------- planted mistakes


def test_windows_of_an_epoch_train_to_the_same_weights():
    """The whole chain, batches.windows included: one micro-batch a step or many, partial last window too."""
    rows, table = rows_of(8, [2] * 11), None
    finals = []
    for micro_size in (4, 1, 3):
        gpt = loud(GPT(SHAPE), 8)
        table = padded(looped(gpt, rows)) if table is None else table
        objective = preference_objective(gpt, "dpo", dtype="float32", beta=0.3)
        steps = windows(rows, window_size=4, micro_size=4, seed=0, epoch=0)
        assert [sum(map(len, step)) for step in steps] == [4, 4, 3]
        cuts = [
            [micro[i : i + micro_size] for micro in step for i in range(0, len(micro), micro_size)]
            for step in steps
        ]
        stream = (make_window(rows, step, table, **HERE) for step in cuts)
        list(train(objective, torch.optim.SGD(gpt.parameters(), lr=1e-3), stream))
        finals.append(gpt)
    for other in finals[1:]:
        for one, two in zip(finals[0].parameters(), other.parameters()):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-11)  # three float64 steps


def accumulation() -> None:
    for loss_type in ("dpo", None):
        test_micro_batches_give_what_the_whole_window_gives(loss_type)


def kept() -> None:
    test_kept_and_live_log_probabilities_agree("float32")


MUTANTS = {
    "mean of token log-probabilities": (
        policy.shared_prompt_logps, ".view(B, K)", ".view(B, K) / batch.completion_lengths",
        test_by_hand_fixed,
    ),
    "prompt tokens scored": (
        objectives.layout,
        "prompts, completions, *_ = zip(*examples, strict=True)",
        "prompts = [e.prompt[:1] for e in examples]\n"
        "    completions = [[e.prompt[1:] + c for c in e.completions] for e in examples]",
        test_by_hand_fixed,
    ),
    "policy and reference swapped": (
        objectives.preference_objective,
        "loss_of(loss, logps, micro, options)",
        "loss_of(loss, micro.reference_logps, micro._replace(reference_logps=logps), options)",
        test_by_hand_fixed,
    ),
    "columns of the reference swapped": (
        objectives.make_window, "].to(device)", "].flip(-1).to(device)", test_by_hand_fixed,
    ),
    "KTO's estimate from the matched pair": (
        objectives._kl_estimate, ".completions[-1:]", ".completions[:1]", relatives_by_hand,
    ),
    "KTO's estimate of the last micro-batch alone": (
        objectives._kl_estimate, "zip(*pieces, strict=True)", "zip(*pieces[-1:])", relatives_by_hand,
    ),
    "labels swapped": (objectives.make_window, "[row.label for", "[not row.label for", check_labelled),
    "means over the class of a micro-batch": (
        objectives.make_window,
        "weights = tuple(len(labels) / count if count else 0.0 for count in classes)",
        "weights = (1.0, 1.0)",
        check_labelled,
    ),
    "a bad row counted as good": (
        objectives._label_metrics, "of_bad, ~micro.labels", "of_bad, micro.labels",
        check_labelled,
    ),
    "displacement of bad rows": (
        objectives._label_metrics, "micro.labels & (ratios", "(ratios", check_labelled,
    ),
    "a bad row right where it is likelier": (
        objectives._label_metrics, "1.0, -1.0)", "1.0, 1.0)", check_labelled,
    ),
    "pulls of two signs that cancel": (
        objectives._label_metrics, "result.gradient_weights.abs()", "result.gradient_weights", check_labelled,
    ),
    "KTO's labels swapped": (
        kto._of_pairs, "torch.tensor([True, False]", "torch.tensor([False, True]", relatives_by_hand,
    ),
    "KTO's row is a sum": (
        kto.kto_pair_loss, "out.losses.mean(-1)", "out.losses.sum(-1)", relatives_by_hand,
    ),
    "order by the reference where there is none": (
        objectives._metrics, "ratios if \"reference\" in reads else policy", "ratios",
        relatives_by_hand,
    ),
    "order by sums where the loss averages": (
        objectives._metrics, 'if "lengths" in reads', "if False", relatives_by_hand,
    ),
    "the mismatched completion trained": (
        objectives.make_window, "row.completions[:-1]", "row.completions[:1] + row.completions[2:]",
        relatives_by_hand,
    ),
    "ties count as right": (
        objectives._metrics, "(order > tie)", "(order >= -tie)",
        test_wrong_order_ties_and_displacement_are_counted_apart,
    ),
    "displacement of the rejected completion": (
        objectives._metrics, "ratios[:, 0] <", "ratios[:, -1] <",
        test_wrong_order_ties_and_displacement_are_counted_apart,
    ),
    "share forgotten in the gradient": (_means, "each(share * loss)", "each(loss)", accumulation),
    "metrics of the last micro-batch alone": (
        _means, "means.get(name, 0) + share * value", "value", accumulation,
    ),
    "partial window counted as whole": (
        objectives.make_window, "size / sum(sizes)", "1 / len(sizes)", accumulation,
    ),
    "SFT averages rows": (
        objectives.make_window,
        "sum(len(ids) for example in chosen for ids in example.completions)", "len(rows)",
        accumulation,
    ),
    "SFT divides by padding": (
        objectives.sft_objective, "micro.completion_lengths.sum()", "micro.ids.numel()",
        lambda: check_sft(3, [3, 1]),
    ),
    "log-softmax in bfloat16": (
        policy._log_sums, "widen(some).logsumexp(-1)", "some.logsumexp(-1)",
        test_in_bfloat16_the_log_softmax_is_still_float32,
    ),
    "sums in bfloat16": (
        policy.shared_prompt_token_logps, "logps[: len", "logps.bfloat16()[: len",
        test_in_bfloat16_the_log_softmax_is_still_float32,
    ),
    "autocast off": (
        objectives.completion_logps_of, 'enabled=dtype == "bfloat16"', "enabled=False",
        test_in_bfloat16_the_log_softmax_is_still_float32,
    ),
    "weights in bfloat16": (
        objectives.completion_logps_of, "logps = shared", "model.bfloat16(); logps = shared",
        lambda: test_weights_stay_float32_and_small_steps_count("adamw", 1.0),
    ),
    "rows left in the order of their lengths": (
        objectives.reference_logps, "torch.tensor(rows)", "torch.tensor(sorted(rows))", kept,
    ),
    "key without the prompt": (
        objectives.cache_key, "[example.prompt, example.completions]", "example.completions",
        test_the_key_knows_all_that_log_probabilities_depend_on,
    ),
    "key without the weights": (
        objectives.cache_key, "state_fingerprint(model)", "len(list(model.parameters()))",
        test_the_key_knows_all_that_log_probabilities_depend_on,
    ),
    "float32's rounding asked of bfloat16": (
        objectives.check_start, "completion_lengths, dtype)", 'completion_lengths, "float32")',
        lambda: test_rounding_alone_is_never_refused_and_anything_more_is("bfloat16", 0.3),
    ),
    "a mean that hides a row": (
        objectives.check_start, "log_ratios.abs() <=", "log_ratios.mean().abs() <=",
        lambda: test_a_reference_that_is_not_the_policys_is_refused(swapped, "float32"),
    ),
    "signs forgotten": (
        objectives.check_start, "log_ratios.abs() <=", "log_ratios <=",
        lambda: test_rounding_alone_is_never_refused_and_anything_more_is("float32", 1e-4),
    ),
}  # fmt: skip


@functools.cache
def passes(guard) -> None:
    """A guard that several mistakes share is run once on correct code."""
    guard()


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistakes_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    passes(guard)
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
