"""The log doctor: planted causes found by name, healthy logs without a finding, bad files refused.

Logs are of trainings that were run, of a table (`training_logs.py`), of the package's own GPT, and of TRL's
trainer (`golden/logs`, with the script that makes them); those of public questions have their numbers alone.
"""

import itertools
import json
import math
import random
import re
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planting import CAUGHT, plant
from training_logs import NAMES, as_written, trained, write

from dpo_minimal import Finding, InputError, diagnose
from dpo_minimal.__main__ import main
from dpo_minimal.bench import case, doctor, logs, rules
from dpo_minimal.bench.case import least_loss, softplus
from dpo_minimal.bench.logs import read_log
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.text.batches import Example, with_mismatched
from dpo_minimal.text.objectives import preference_objective, reference_logps
from dpo_minimal.text.training_run import Data, Settings, run_training
from dpo_minimal.zoo import LOSSES
from notebooks.syllabus import DOCUMENTS

GOLDEN = Path(__file__).parent / "golden" / "logs"
LN2 = math.log(2)


def names_of(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings}


# -------------------------------------------------------------------------------------------- planted causes


def other_table(seed: int):
    return lambda reference, rewards: np.random.default_rng(seed).normal(size=reference.shape)


def times(name: str, factor: float):
    """Rows whose logged number has a factor."""
    return lambda metrics: {**metrics, name: factor * metrics[name]}


def loss_with_beta(factor: float):
    """The loss of margins with another beta than those that are logged."""
    return lambda metrics: {**metrics, "loss": np.logaddexp(0, -factor * metrics["rewards/margins"])}


def counting_the_wrong(metrics):
    """An accuracy that counts the pairs in the wrong order."""
    return {**metrics, "rewards/accuracies": metrics["rewards/margins"] < 0}


def with_nll(metrics):
    return {**metrics, "loss": metrics["loss"] - metrics["logps/chosen"]}


def sum_for_difference(metrics):
    return {**metrics, "rewards/margins": metrics["rewards/chosen"] + metrics["rewards/rejected"]}


def rewards_without_reference(beta):
    def change(metrics):
        chosen, rejected = beta * metrics["logps/chosen"], beta * metrics["logps/rejected"]
        margins = chosen - rejected
        loss, right = np.logaddexp(0, -margins), margins > 0
        return {**metrics, **dict(zip(NAMES, (loss, chosen, rejected, margins, right)))}

    return change


def of_empty_completions(metrics):
    """No token counts, so that every log-probability is 0, and every reward."""
    return {name: np.zeros_like(value) + LN2 * (name == "loss") for name, value in metrics.items()}


def overflowing(at: int):
    """A history in which a step overflows float16: all that is computed from then on is nan."""

    def change(history):
        for record in history:
            for name in record:
                if record["step"] >= at and ("loss" in name or "/" in name):
                    record[name] = math.nan
        return history

    return change


def filtered(history):
    """As the Trainer prints it: the loss that is nan is left out of its mean."""
    for before, record in itertools.pairwise(history):
        if math.isnan(record.get("loss", 0.0)):
            record["loss"] = before.get("loss", 0.7)
    return history


def lengths_of_a_policy_that_ends_later(history):
    """Ours, of samples whose chance to end falls from 1/20 to 1/80 a token: lengths as drawn."""
    rng = np.random.default_rng(0)
    ended = iter(np.linspace(1 / 20, 1 / 80, sum("eval_loss" in record for record in history)))
    for record in history:
        record |= {f"{'' if 'loss' in record else 'eval_'}dpo/ties": 0.0}
        if "eval_loss" in record:
            record["samples/length"] = float(rng.geometric(next(ended), size=400).mean())
    return history


def by_shared_features(history):
    """The example of D13.1, by gradient steps on its one weight v: logits φv, φ = (1, 0, 3)."""
    features, v, found = np.array([1.0, 0.0, 3.0]), 0.0, []
    for step in range(1, 21):
        logps = features * v - np.logaddexp.reduce(features * v)
        chosen, rejected = 0.5 * (logps[:2] + math.log(3))
        loss = np.logaddexp(0, rejected - chosen)
        numbers = (loss, chosen, rejected, chosen - rejected, float(chosen > rejected), logps[0], logps[1])
        found.append({**dict(zip(NAMES, map(float, numbers))), "step": step})
        v += 0.5 / (1 + math.exp(chosen - rejected))
    return found


# Name of the cause: (findings, settings of the training; file, claims, and what becomes of the history).
STALE = {"not at the reference"}
PLANTED: dict[str, tuple[set[str], dict]] = {
    "reference of other weights": (STALE, {"start": other_table(7)}),
    "policy of an earlier run, first record averaged": (
        STALE,
        {"start": lambda reference, rewards: reference + rewards, "labels": 50.0, "window": 8, "evaluate": 0},
    ),
    "dropout in training": (STALE, {"noise": 1.0, "beta": 2.0}),
    "no reference": ({"no reference"}, {"loss_of": rewards_without_reference(0.5)}),
    "reference shared with the policy": ({"ties"}, {"reference_at": lambda step, reference, policy: policy}),
    "reference synchronised": (
        {"the reference moves"},
        {"reference_at": lambda step, reference, policy: reference if step < 20 else policy + reference},
    ),
    "beta of the run is another": ({"another beta"}, {"beta": 0.5, "claims": {"beta": 0.1}}),
    "beta twice in the loss": (
        {"below Jensen's bound"}, {"loss_of": loss_with_beta(2.0), "labels": 1000.0, "batch": 64},
    ),
    "chosen and rejected swapped in the rewards": (
        {"below Jensen's bound"},
        {"loss_of": lambda m: {**m, "loss": np.logaddexp(0, m["rewards/margins"])}, "pull": -1.0},
    ),
    "accuracy of the wrong order": (
        {"below the floor of its accuracy"}, {"loss_of": counting_the_wrong, "labels": 20.0, "batch": 64},
    ),
    "a term added to the loss": (
        {"another loss", "above ln 2 with accuracy 1"},
        {"loss_of": with_nll, "labels": 50.0, "claims": {"loss_type": "dpo"}, "batch": 2},
    ),
    "loss summed over accumulated batches": ({"scaled loss"}, {"loss_of": times("loss", 4.0)}),
    "loss divided twice": ({"scaled loss"}, {"loss_of": times("loss", 0.25)}),
    "IPO said to be DPO": (
        {"another loss"},
        {
            "loss_of": lambda m: {**m, "loss": (m["rewards/margins"] / 0.5 - 1) ** 2},
            "claims": {"loss_type": "dpo"},
        },
    ),
    "margin without beta": ({"margins do not add up"}, {"loss_of": times("rewards/margins", 2.0)}),
    "margin with the wrong sign": ({"margins do not add up"}, {"loss_of": sum_for_difference}),
    "overflow": ({"not finite"}, {"history": overflowing(17)}),
    "overflow that the Trainer hides": ({"not finite"}, {"history": lambda h: filtered(overflowing(17)(h))}),
    "empty completions": ({"nothing scored"}, {"loss_of": of_empty_completions}),
    "identical pairs": ({"ties"}, {"pairs_of": lambda pairs: pairs[:, [0, 1, 1]]}),
    "learning rate zero": ({"ties"}, {"rate_at": lambda step: 0.0}),
    "gradient detached": ({"ties"}, {"pull": 0.0}),
    "displacement by shared features": ({"displacement"}, {"history": by_shared_features, "steps": 1}),
    "labels reversed": ({"worse than the reference"}, {"pull": -1.0, "evaluate": 0}),
    "learning rate too high": ({"worse than the reference"}, {"rate": 400.0, "labels": 0.1, "steps": 60}),
    "few pairs of chance, learnt by heart": (
        {"overfitting"}, {"labels": 0.0, "rows": 12, "rate": 8.0, "steps": 200, "batch": 12},
    ),
    "labels without noise": ({"saturation"}, {"labels": 1000.0, "rate": 40.0, "steps": 300}),
    "warm-up longer than the run": ({"warm-up not over"}, {"rate_at": lambda step: step / 150}),
    "samples grow longer": (
        {"length drift"}, {"history": lengths_of_a_policy_that_ends_later, "options": {"eval_samples": 400}},
    ),
}  # fmt: skip
KINDS = [(kind, digits) for digits in ("", "4g", "4") for kind in ("state", "console", "csv")]


def planted(cause: dict) -> tuple[list[dict], dict, dict]:
    """The log of a training with a cause, what is claimed of it, and the options in its config.json."""
    cause = dict(cause)
    claims, options = cause.pop("claims", {}), cause.pop("options", {})
    change = cause.pop("history", lambda history: history)
    return change(trained(**cause)), claims, options


def check_planted(cause: str) -> None:
    """One format, for the mutants."""
    expected, made = PLANTED[cause]
    history, claims, options = planted(made)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"options": options}), encoding="utf-8")
        findings = diagnose(write(Path(folder), history), **claims)
    assert names_of(findings) == expected, findings


@pytest.mark.parametrize("cause", PLANTED)
def test_the_planted_cause_is_named(cause, tmp_path):
    """In every format that is read, and as exactly as trainers write: these findings and no others."""
    expected, made = PLANTED[cause]
    history, claims, options = planted(made)
    (tmp_path / "config.json").write_text(json.dumps({"options": options}), encoding="utf-8")
    for kind, digits in KINDS:
        findings = diagnose(write(tmp_path, history, kind, digits), **claims)
        assert names_of(findings) == expected, (kind, digits, findings)


def test_the_meaning_tells_one_reason_from_another(tmp_path):
    """Findings of one name: which columns tell why."""
    for cause, words in {
        "dropout in training": "dropout is on",
        "policy of an earlier run, first record averaged": "ln 2 / 8 = 0.08664",
        "reference shared with the policy": "the reference is the policy itself",
        "identical pairs": "the same tokens",
        "learning rate zero": "learning rate is 0",
        "gradient detached": "gradient is 0",
        "overflow": "unless the step is skipped",
        "overflow that the Trainer hides": "logging_nan_inf_filter",
        "loss summed over accumulated batches": "4 times",
        "reference of other weights": "root mean square",
    }.items():
        history, claims, _ = planted(PLANTED[cause][1])
        (finding,) = diagnose(write(tmp_path, history), **claims)
        assert words in finding.seen + finding.meaning, finding


def of_one_process(metrics):
    return {name: rows if name == "loss" else rows[:2] for name, rows in metrics.items()}


def check_old_trl() -> None:
    """Before version 0.13: the loss of all rows, and the rewards of those of the first of eight processes."""
    for seed in range(20):
        history = trained(seed=seed, loss_of=of_one_process, batch=16, evaluate=0, labels=1.0, rate=0.1)
        with tempfile.TemporaryDirectory() as folder:
            findings = diagnose(write(Path(folder), history))
        assert not names_of(findings) & {"below Jensen's bound", "below the floor of its accuracy"}, findings


def test_logs_of_several_processes():
    """Single records break bounds there by chance; so it takes most of them."""
    check_old_trl()


# ---------------------------------------------------------------------------------------------- healthy logs

TINY = GPTConfig(vocab_size=11, block_size=24, n_layer=1, n_head=2, n_embd=8)
SETTINGS = Settings(
    learning_rate=3e-3, optimizer="adamw", per_device_train_batch_size=4, gradient_accumulation_steps=2,
    num_train_epochs=3, max_steps=None, warmup_steps=2, max_grad_norm=1.0, logging_steps=1, eval_steps=4,
    save_steps=0, seed=0, dtype="float32", device="cpu",
)  # fmt: skip


def rows_of(completions: int, count: int, seed: int, same: int = 0) -> list[Example]:
    """Short prompts; completions by their rank hold more of token 10 and less of token 9. Of every `same`
    rows one has equal completions."""
    draw = random.Random(seed)
    answers = [[9] * k + [10] * (completions - 1 - k) for k in range(completions)]
    rows = []
    for number in range(count):
        prompt, *begun = (
            [draw.randrange(1, 9) for _ in range(draw.randint(1, 3))] for _ in range(1 + completions)
        )
        completed = [[*some, *answer, 0] for some, answer in zip(begun, answers)]
        is_same = same and number % same == 0
        rows.append(Example(prompt, completed[:1] * completions if is_same else completed, f"row {number}"))
    return rows


def run_of(folder: Path, name: str, same: int = 0, **changes) -> Path:
    """metrics.jsonl of a small GPT trained by a loss of the zoo, with config.json as `dpo` writes it."""
    loss, settings = LOSSES[name], SETTINGS._replace(**changes)
    options = {option.name: option.default or 0.3 for option in loss.options}
    torch.manual_seed(0)
    gpt = GPT(TINY)
    train, held_out = (rows_of(2 + (loss.rows != "preferences"), *of, same) for of in ((24, 1), (8, 2)))
    reading = {}
    if "kl_estimate" in loss.reads:
        train, held_out = (with_mismatched(some, max_length=24) for some in (train, held_out))
        reading = {"policy": gpt}
    if loss.reads_batch:
        settings = settings._replace(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    references = [reference_logps(gpt, some, micro_size=4, dtype="float32") for some in (train, held_out)]
    objective = preference_objective(gpt, name, dtype="float32", **options)
    folder.mkdir(exist_ok=True)
    run_training(folder, gpt, objective, Data(train, held_out, *references, **reading), settings, name="test")
    claimed = {"loss_type": name, "dtype": "float32", "learning_rate": 3e-3, **options}
    (folder / "config.json").write_text(json.dumps({"options": claimed}), encoding="utf-8")
    return folder / "metrics.jsonl"


@pytest.mark.parametrize("name", LOSSES)
def test_runs_of_ours_have_no_finding(name, tmp_path):
    """Every loss that `dpo --loss-type` knows."""
    assert diagnose(run_of(tmp_path / "run", name)) == []


@pytest.mark.parametrize(
    "change", [{"logging_steps": 5}, {"eval_steps": 0}, {"warmup_steps": 0, "num_train_epochs": 1}]
)
def test_other_settings_of_ours_have_no_finding(change, tmp_path):
    """Records that are left out, no evaluation between, a short run."""
    assert diagnose(run_of(tmp_path / "run", "dpo", **change)) == []


def test_identical_pairs_among_others(tmp_path):
    """Ours counts ties in each record."""
    (finding,) = diagnose(run_of(tmp_path / "run", "dpo", same=2))
    assert finding.name == "ties" and "at least" in finding.seen and "whatever is learnt" in finding.meaning


TRL_RUNS: dict[str, tuple[set[str], dict]] = {  # of golden/logs: findings, claims
    "healthy": (set(), {"beta": 0.1, "loss_type": "sigmoid"}),
    "healthy-console": (set(), {}),
    "healthy-accumulated": (set(), {"beta": 0.1}),
    "healthy-precomputed": (set(), {}),
    "healthy-warm-up": (set(), {"beta": 0.3}),
    "healthy-ipo": (set(), {"beta": 0.1, "loss_type": "ipo"}),
    "healthy-hinge": (set(), {}),  # its first record tells that it is another loss
    "healthy-label-smoothing": (set(), {}),
    "other-reference": ({"not at the reference"}, {}),
    "beta-one-half": ({"another beta"}, {"beta": 0.1}),
    "dropout": ({"not at the reference"}, {"beta": 0.5}),
    "same-pairs": ({"ties"}, {}),
    "shared-reference": ({"ties"}, {}),
    "learning-rate-too-high": ({"worse than the reference"}, {}),
    "bfloat16-weights": ({"step too small"}, {}),
    "warm-up-too-long": ({"warm-up not over"}, {}),
    "saturated": ({"saturation", "displacement"}, {}),
    "moving-reference": ({"the reference moves"}, {}),
    "noise-learnt-by-heart": ({"overfitting", "displacement"}, {}),
}


@pytest.mark.parametrize("name", TRL_RUNS)
def test_logs_of_trl(name):
    """What TRL's trainer wrote, with the cause that the name of the run says, and without."""
    expected, claims = TRL_RUNS[name]
    (path,) = set(GOLDEN.glob(f"{name}.*"))
    assert names_of(diagnose(path, **claims)) == expected


def test_every_log_of_trl_is_tested():
    """And made by the script beside them."""
    made = re.findall(r'^    "([\w-]+)": lambda', (GOLDEN / "make_logs.py").read_text(), re.MULTILINE)
    assert sorted(made) == sorted(TRL_RUNS) == sorted(path.stem for path in GOLDEN.glob("*.[jt]*"))


PUBLIC = json.loads((GOLDEN.parent / "public_logs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("question", PUBLIC)
def test_logs_of_public_questions(question, tmp_path):
    """What people have asked about, by their numbers alone."""
    (path := tmp_path / "train.log").write_text("\n".join(PUBLIC[question]["log"]), encoding="utf-8")
    assert names_of(diagnose(path)) == set(PUBLIC[question]["findings"])


CONTRADICTIONS = {
    "not finite", "no reference", "not at the reference", "scaled loss", "another loss",
    "margins do not add up", "below Jensen's bound", "below the floor of its accuracy",
    "above ln 2 with accuracy 1", "the reference moves", "another beta", "ties", "nothing scored",
    "step too small", "warm-up not over",
}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0.02, 3), st.integers(2, 60), st.integers(1, 16), st.integers(1, 7),
    st.floats(0.01, 20), st.floats(0, 30), st.sampled_from(KINDS), st.sampled_from([0, 5, 20]),
)  # fmt: skip
def check_healthy(seed, beta, steps, batch, window, rate, labels, written, evaluate):
    history = trained(
        seed=seed, beta=beta, steps=steps * window, batch=batch, window=window, rate=rate, labels=labels,
        evaluate=evaluate,
    )  # fmt: skip
    assume(any(record.get("rewards/margins") for record in history))  # rows of prompts that were not met yet
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), history, *written)
        found = diagnose(path, beta=beta)
        assert not names_of(found) & CONTRADICTIONS, found
        if rate <= 0.5 and 1 <= labels <= 4 and beta >= 0.1 and batch >= 4:  # what a careful person does
            last = [record for record in history if "loss" in record][-10:]
            learnt = np.mean([record["loss"] for record in last]) < LN2
            rises = np.mean([record["rewards/chosen"] for record in last]) > 0
            assert found == [] or not (learnt and rises), found


def test_healthy_trainings_have_no_finding():
    """Random trainings, averaged, rounded and written in every way: nothing that must hold is broken; and
    where the rate is moderate and the loss and the chosen rewards do what they should, nothing at all."""
    check_healthy()


# --------------------------------------------------------------------------------------- numbers and bounds


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8), st.sampled_from(["4", "4g", ""]))
def test_rounding_covers_what_writing_did(values, digits):
    """Half a unit of the last place of the column is at least what each number lost."""
    written = [float(as_written(value, digits)) for value in values]
    records = [logs.Record({"loss": value}, "") for value in written]
    log = logs.Log(records, {}, {}, False, logs._digits(records), "")
    for value, shown in zip(values, written):
        assert abs(value - shown) <= log.rounding("loss", shown) * (1 + 1e-9) + 1e-12  # of the subtraction


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=12))
def test_least_loss_is_a_bound_and_is_reached(margins):
    """Of any margins, and of those with which it is reached: the wrong ones at 0, or the right ones."""
    mean, share = sum(margins) / len(margins), sum(m > 0 for m in margins) / len(margins)
    assume(abs(mean) > 1e-9 or 0 < share < 1)  # a mean of 0 by cancelling
    bound = least_loss(mean, share)
    assert bound <= sum(map(softplus, (-m for m in margins))) / len(margins) + 1e-12  # rounding
    assert bound >= softplus(-mean) - 1e-12
    assert least_loss(1.0, 0.0) == least_loss(-1.0, 1.0) == math.inf


def test_half_units_are_those_of_torch():
    """A step of 0.99 half units leaves the median weight where it is, and one of 1.01 does not."""
    for name, bits in (("bfloat16", 8), ("float16", 11)):
        weight = torch.tensor(rules.MEDIAN_WEIGHT, dtype=getattr(torch, name))
        half = rules._half_unit(bits)
        assert rules.BITS[name] == bits
        assert (weight.double() - 0.99 * half).to(weight.dtype) == weight
        assert (weight.double() - 1.01 * half).to(weight.dtype) < weight


# --------------------------------------------------------------------------------------------------- formats


def test_the_same_numbers_in_every_format(tmp_path):
    """Names, steps and evaluations are those of TRL's own file, whatever they are written as."""
    history = trained(steps=12, evaluate=4)
    whole = read_log(write(tmp_path, history))
    for kind in ("console", "csv"):
        log = read_log(write(tmp_path, history, kind))
        assert [record.values for record in log.training] == [record.values for record in whole.training]
        for mine, theirs in zip(log.evaluations[""], whole.evaluations[""], strict=True):
            assert {**theirs.values, **mine.values} == theirs.values  # a console has no step there
    assert [record.of("step") for record in whole.training] == list(range(1, 13))
    assert [record.of("step") for record in whole.evaluations[""]] == [0, 4, 8, 12]


def test_names_of_other_trainers(tmp_path):
    """The paper's authors', Weights & Biases', older ones, several data sets; and the run's settings."""
    lines = (
        "DPOConfig(adam_beta1=0.9, beta=0.25, loss_type=['ipo'], torch_dtype=torch.bfloat16)",
        "train stats after 64: {'rewards_train/chosen': '0.25', 'loss/train': '0.5', 'counters/updates': 2}",
        "{'loss': tensor(0.4), 'rewards/margin': 1, 'lr': 1e-6, 'ref_logps/chosen': -3.0, 'loss_scale': 'x'}",
        "{'eval_loss': 0.7, 'rewards_eval/chosen': 0.5, 'eval_helpful_loss': 0.6}",
        "{'train_runtime': 3.1, 'train_loss': 0.6}",
    )
    (path := tmp_path / "a.log").write_text("\n".join(lines), encoding="utf-8")
    log = read_log(path)
    assert log.settings == {"beta": 0.25, "loss_type": "ipo", "dtype": "torch.bfloat16"}
    assert [record.values for record in log.training] == [
        {"step": 2, "rewards/chosen": 0.25, "loss": 0.5},
        {"loss": 0.4, "rewards/margins": 1, "learning_rate": 1e-6, "reference_logps/chosen": -3},
    ]
    evaluations = {data: [record.values for record in records] for data, records in log.evaluations.items()}
    assert evaluations == {"": [{"loss": 0.7, "rewards/chosen": 0.5}], "helpful": [{"loss": 0.6}]}
    header = "train/loss,train/rewards/chosen,train/global_step,eval/loss,note"
    (path := tmp_path / "b.csv").write_text(f"{header}\n0.5,0.1,1,,a\n0.4,0.2,2,0.6,b\n", encoding="utf-8")
    log = read_log(path)
    assert [record.of("loss") for record in log.training] == [0.5, 0.4]
    assert [(r.of("loss"), r.of("step")) for r in log.evaluations[""]] == [(0.6, 2)]


REFUSED = {  # what stands in the file, and what is said of it
    "an SFT log": ('{"loss": 2.5, "step": 1}\n{"loss": 2.4}\n', "loss and one of rewards/chosen.*'loss'"),
    "prose": ("A loss of words.\n", "no record was found"),
    "nothing": ("", "no record was found"),
    "a cut trainer_state.json": ('{\n "log_history": [\n  {"loss": 0.6, "rewards/ch', "cut off or garbled"),
    "a line that is cut": ('{"loss": 1, "epoch": 1}\n{"loss": 1, "log\n{"loss": 1}\n', "line 2: is no JSON"),
    "another JSON": ('{"log_history": [1, 2]}', "no list of records"),
    "a loss of words": ("{'loss': 'low', 'rewards/chosen': 0.1}\n", "line 1: the loss is no number"),
    "a cell of words": ("loss,rewards/chosen\n0.5,0.1\nlow,0.2\n", "line 3: loss is 'low'"),
    "a short row": ("loss,rewards/chosen\n0.5\n", "has 1 cells where the header has 2"),
    "two runs": (
        "{'loss': 0.6, 'rewards/chosen': 0, 'epoch': 2.0}\n{'loss': 0.7, 'rewards/chosen': 0, 'epoch': 0.1}",
        "several runs, as epoch falls from 2 to 0.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_log_is_refused(what, tmp_path):
    """In one sentence, which names the place, what was found and what was wanted."""
    text, told = REFUSED[what]
    (path := tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        diagnose(path)
    (tmp_path / "file").write_bytes(b"{'loss': \xff\xfe}")
    with pytest.raises(InputError, match="not UTF-8"):
        diagnose(path)


def test_a_killed_run_is_read_up_to_its_last_line(tmp_path):
    """As `--resume` reads it; the note says so. Of any other file with a line cut off, nothing is read."""
    (path := tmp_path / "metrics.jsonl").write_text(
        '{"loss": 0.69, "logps/chosen": -2}\n{"loss": 0.6, "logps/chosen": -3}\n{"loss": 0.5, "lo',
        encoding="utf-8",
    )
    log = read_log(path)
    assert len(log.training) == 2 and "line 3, the last, is cut off" in log.note


def test_options_that_contradict(tmp_path):
    """The file's own settings, names of losses, and numbers out of range."""
    (path := tmp_path / "a.log").write_text("beta=0.1 loss_type=sigmoid\n{'loss': 0.69, 'logps/chosen': -2}")
    assert diagnose(path, beta=0.1, loss_type="sigmoid") == diagnose(path, loss_type="dpo") == []
    for options, told in (
        ({"beta": 0.2}, "--beta 0.2: the run has 0.1"),
        ({"loss_type": "ipo"}, "--loss-type ipo: the run has dpo"),
        ({"loss_type": "dpop2"}, "no such loss"),
        ({"beta": -1.0}, "must be a positive"),
    ):
        with pytest.raises(InputError, match=told):
            diagnose(path, **options)


def garbled(data: bytes, draw: random.Random) -> bytes:
    """Cut off, a piece lost or repeated, bytes replaced, or lines in another order."""
    kind, (a, b) = draw.randrange(5), sorted(draw.randrange(len(data)) for _ in range(2))
    if kind == 0:
        return data[:b]
    if kind == 1:
        return data[:a] + data[b:]
    if kind == 2:
        return data[:b] + data[a:]
    if kind == 3:
        spoiled = bytearray(data)
        for _ in range(draw.randint(1, 20)):
            spoiled[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(spoiled)
    lines = data.split(b"\n")
    draw.shuffle(lines)
    return b"\n".join(lines)


@pytest.mark.parametrize("kind", ["state", "console", "csv", "metrics"])
def test_garbled_files_get_one_sentence(kind, tmp_path):
    """200 of each format: findings, or one line; never another exception."""
    history, draw, refused = trained(steps=6, evaluate=3), random.Random(0), 0
    path = write(tmp_path, history, "console" if kind == "console" else "csv" if kind == "csv" else "state")
    if kind == "metrics":
        path.write_text("".join(json.dumps(record) + "\n" for record in history), encoding="utf-8")
    data = path.read_bytes()
    for _ in range(200):
        path.write_bytes(garbled(data, draw))
        try:
            diagnose(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) <= 400
    assert refused > 20  # so the others were read, and these were noticed


def test_ten_thousand_records_take_less_than_two_seconds(tmp_path):
    """Of one processor's time; torch, which is imported before, is not counted."""
    history = trained(steps=200, evaluate=0)
    records = [{**history[k % 200], "step": k + 1, "epoch": k / 100} for k in range(10_000)]
    path = write(tmp_path, records)
    began = time.process_time()
    diagnose(path)
    assert time.process_time() - began < 2  # 0.9 when written


# --------------------------------------------------------------------------------------------------- command


def test_the_command_says_what_was_seen_and_what_to_do(tmp_path, capsys):
    """And its exit code tells whether there was anything: 0, 1, or 2 where nothing could be read."""
    path = write(tmp_path, trained(), "console")
    assert main(["doctor", str(path)]) == 0
    assert (
        "40 records of training, 5 of evaluation; loss dpo, assumed; beta between" in capsys.readouterr().out
    )
    assert main(["doctor", str(path), "--beta", "0.1"]) == 1
    printed = capsys.readouterr().out
    (finding,) = diagnose(path, beta=0.1)
    for words in (finding.name, f"[{finding.tag}]", finding.seen, finding.meaning, finding.remedy):
        assert words in re.sub(r"\s+", " ", printed)
    assert main(["doctor", str(tmp_path / "missing")]) == 2
    assert "no such file" in capsys.readouterr().err


README = (Path(doctor.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_example_of_the_readme(monkeypatch, capsys):
    """The command that it shows prints what it shows."""
    command, printed = re.search(
        r"python -m dpo_minimal (doctor .*)\n```\n\n```\n(.*?)```", README, re.DOTALL
    ).groups()
    monkeypatch.chdir(Path(__file__).parents[1])
    assert main(command.split()) == 1
    assert capsys.readouterr().out.strip() == printed.strip()


def test_every_finding_has_words_and_stands_in_the_readme():
    """Each name that a rule can give, and no others; each tag is a section's."""
    words, source = case._words(), Path(rules.__file__).read_text(encoding="utf-8")
    names = {name.partition(".")[0] for name in words}
    assert names == set(re.findall(r"^\| `([^`]+)` \|", README.split("## The log doctor")[1], re.MULTILINE))
    assert all(f'"{name}' in source for name in names)
    assert names == set().union(*(expected for expected, _ in PLANTED.values())) | {"step too small"}
    sections = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for name, entry in words.items():
        assert entry.keys() == {"tag", "meaning", "remedy"}, name
        assert f">{entry['tag']} " in sections, name
    assert {name for own in rules.EXPLAINED_BY.values() for name in own} | set(rules.EXPLAINED_BY) <= names


# --------------------------------------------------------------------------------------------------- mutants

MUTANTS = [  # function, right, wrong, and what must fail
    (rules._is_away, "> HALF", "> 1e9 * HALF", partial(check_planted, "reference of other weights")),
    (rules.another_loss, "is_wrong and not _is_away(case, record)", "is_wrong",
     partial(check_planted, "reference of other weights")),
    (rules._steps_of_the_first, "return 0 if", "return 0 if True or",
     partial(check_planted, "policy of an earlier run, first record averaged")),
    (rules.no_reference, "min(high, most)", "max(high, most)", check_healthy),
    (rules.no_reference, "len(used) > 1", "len(used) > 1e9", partial(check_planted, "no reference")),
    (rules.not_finite, "not math.isfinite(value)", "False",
     partial(check_planted, "overflow that the Trainer hides")),
    (rules.margins_do_not_add_up, "chosen - rejected - margin", "chosen + rejected - margin", check_healthy),
    (rules._violations, "loss + error < least", "loss - error > least", check_healthy),
    (rules._violations, "least_loss(most, accuracy)", "least_loss(most, 1 - accuracy)", check_healthy),
    (rules._violations, "accuracy == 1 and", "accuracy > 0.5 and", partial(check_planted, "labels reversed")),
    (case.least_loss, "(1 - share) * LN2 +", "LN2 +", test_least_loss_is_a_bound_and_is_reached),
    (case.Case.is_systematic, "of / 2 + ", "0 * ", check_old_trl),
    (rules._slope, "abs(y / x) * error", "0 * error", check_healthy),
    (rules.slopes_of, "(records[0], -1)", "(records[0], 1)", check_healthy),
    (rules.beta_and_reference, "low * (1 - 1e-6) <=", "0 <=",
     partial(check_planted, "beta of the run is another")),
    (rules.nothing_scored, "r.of(logps) == 0 ==", "r.of(logps) <= 0 ==", check_healthy),
    (rules.ties, "record.of(MARGINS) or record.of(ACCURACY) > 0", "False", check_healthy),
    (rules.displacement, "< -HALF", "> HALF", partial(check_planted, "displacement by shared features")),
    (rules.worse_than_the_reference, "> start + HALF +", "< start + HALF +",
     partial(check_planted, "labels reversed")),
    (rules.worse_than_the_reference, "< 0", "> 0",
     partial(check_planted, "few pairs of chance, learnt by heart")),
    (rules.saturation, "< SURE", "> SURE", partial(check_planted, "labels without noise")),
    (rules.warm_up, "before < after", "before <= after", check_healthy),
    (rules.length_drift, "> ERRORS *", "> 10 * ERRORS *", partial(check_planted, "samples grow longer")),
    (rules.step_too_small, "rate < _half", "rate > _half", partial(test_logs_of_trl, "bfloat16-weights")),
    (rules._half_unit, "- bits", "- bits + 1", test_half_units_are_those_of_torch),
    (logs.Log.rounding, "0.5 *", "0.4 *", test_rounding_covers_what_writing_did),
    (logs.Log.rounding, "max(-decimals, size + 1 - digits)", "-decimals",
     test_rounding_covers_what_writing_did),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0].__qualname__}: {m[2]}")
def test_a_wrong_rule_is_noticed(mutant, monkeypatch):
    """Each rule, altered, is caught by the test that guards it."""
    function, right, wrong, guard = mutant
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
