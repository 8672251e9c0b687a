"""sft and dpo from the command line: what they write, what they refuse, and that they learn."""

import argparse
import errno
import gzip
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import safetensors.torch
import torch

from dpo_minimal.__main__ import COMMANDS, main
from dpo_minimal.experiments.text import dpo, figure
from dpo_minimal.experiments.text.setup import load_policy
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.text import objectives, tokenizer
from dpo_minimal.text.batches import Example
from dpo_minimal.text.checkpoint import load_model, save_model, state_fingerprint
from dpo_minimal.text.data import has_labels, load_dataset
from dpo_minimal.text.objectives import reference_logps
from dpo_minimal.text.tokenizer import byte_tokenizer, save_tokenizer, train_bpe
from dpo_minimal.validation import InputError
from dpo_minimal.zoo import LOSSES

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
GOOD, BAD = ("yes", "sure", "of course", "gladly"), ("no", "never", "not now", "hardly")
STEPS = ["--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2", "--warmup-steps", "2"]
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--max-length", "40"]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs(count: int, seed: int = 0) -> list[dict]:
    """The chosen answer is polite, whatever the prompt: a rule that a small GPT finds."""
    draw = random.Random(seed)
    return [
        {"prompt": f"Can you {draw.randint(1, 99)}?", "chosen": f" {draw.choice(GOOD)}",
         "rejected": f" {draw.choice(BAD)}"}
        for _ in range(count)
    ]  # fmt: skip


def rankings(count: int) -> list[dict]:
    return [
        {
            "prompt": row["prompt"],
            "responses": [row["rejected"], row["chosen"], " maybe"],
            "ranking": [3, 1, 2],
        }
        for row in pairs(count)
    ]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_figure(monkeypatch):
    """Leave out the drawing, half of a small run's time."""
    monkeypatch.setattr(figure, "preference_figure", lambda *_: None)
    monkeypatch.setattr(figure, "sft_figure", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """pairs.jsonl and a small GPT that was fine-tuned on both sides of them: paths as strings."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pairs.jsonl").write_text(lines(pairs(120)))
    (folder / "ranked.jsonl").write_text(lines(rankings(60)))
    both = [
        {"prompt": row["prompt"], "completion": row[side]}
        for row in pairs(120)
        for side in ("chosen", "rejected")
    ]
    (folder / "both.jsonl").write_text(lines(both))
    run = ["sft", "--data", str(folder / "both.jsonl"), "--tokenizer", "bytes", *TINY, *STEPS]
    assert (
        main(
            [*run, "--learning-rate", "1e-2", "--num-train-epochs", "3", "--output-dir", str(folder / "sft")]
        )
        == 0
    )
    return folder


def dpo_flags(world: Path, out: str = "run", **changes: object) -> list[str]:
    flags = {"--data": world / "pairs.jsonl", "--model": world / "sft", "--optimizer": "adamw",
             "--learning-rate": 3e-3, "--eval-samples": 6, "--max-new-tokens": 8, "--output-dir": out,
             "--save-steps": 3}  # fmt: skip
    flags |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    return [
        "dpo",
        *STEPS,
        *(str(x) for flag, value in flags.items() if value is not None for x in (flag, value)),
    ]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """One DPO run that several tests read."""
    folder = tmp_path_factory.mktemp("dpo") / "run"
    assert main(dpo_flags(world, str(folder))) == 0
    return folder


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, arguments: list[str], *named: str, code: int = 2) -> str:
    """Exit code 2 and one sentence that names the trouble."""
    capsys.readouterr()
    assert main(arguments) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("dpo-minimal: error: ") and message.endswith("."), message
    assert ". " not in message.removeprefix("dpo-minimal: error: ").rstrip("."), message
    for name in named:
        assert name in message, message
    return message


# ------------------------------------------------------------------------------------------------ learning


def test_the_loss_starts_at_ln_2_and_falls(trained):
    """The rule is learnable, so the held-out loss must be far below ln 2 and the order right."""
    records = records_of(trained)
    looked = [record for record in records if "eval_loss" in record]
    assert looked[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert looked[-1]["eval_loss"] < 0.6 and looked[-1]["eval_rewards/accuracies"] > 0.9
    assert looked[0]["kl/policy_reference"] == pytest.approx(0, abs=1e-6)
    assert looked[-1]["kl/policy_reference"] != 0


def test_a_run_folder_holds_what_the_help_says(trained, world):
    assert {path.name for path in trained.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "training.png", "model", "checkpoints",
        "reference_logps.safetensors",
    }  # fmt: skip
    assert {path.name for path in (trained / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tiktoken.json",
    }
    policy, reference = load_policy(str(trained)), load_policy(str(world / "sft"))
    assert policy.tokenizer.fingerprint == reference.tokenizer.fingerprint
    assert state_fingerprint(policy.model) != state_fingerprint(reference.model)
    start = json.loads((trained / "config.json").read_text())["start"]
    assert start["model"] == state_fingerprint(reference.model)
    texts = json.dumps(load_dataset(world / "pairs.jsonl", "preferences").rows)  # as in every version
    assert start["data"] == hashlib.sha256(texts.encode()).hexdigest()
    assert matplotlib.image.imread(trained / "training.png").shape[:2] == (1320, 1760)


def test_the_same_seed_gives_the_same_run(trained, world, no_figure):
    assert main(dpo_flags(world)) == 0
    for name in ("metrics.jsonl", "model/model.safetensors", "reference_logps.safetensors"):
        assert (Path("run") / name).read_bytes() == (trained / name).read_bytes(), name
    assert main(dpo_flags(world, "other", seed=1)) == 0
    assert Path("other/metrics.jsonl").read_bytes() != (trained / "metrics.jsonl").read_bytes()


STARTS = {  # the loss where policy = reference; None where there is no reference to start from
    "ipo": 1 / (4 * 0.1**2), "averaged_ipo": 1 / (4 * 0.1**2), "cdpo": math.log(2), "robust": math.log(2),
    "unweighted_dpo": 0, "kto": 0.5, "simpo": None, "orpo": None, "unlikelihood": None,
    "plackett_luce": math.log(6), "nca": math.log(4), "bco": math.log(4),
}  # fmt: skip


@pytest.mark.parametrize("loss_type", STARTS)
def test_every_loss_starts_where_it_must_and_falls(world, loss_type, capsys, request):
    """By its name alone: the other options have defaults. What was used is written. The figure is drawn of a
    run without a reference, and of rankings; below of labels."""
    drawn = loss_type in ("simpo", "plackett_luce")
    if not drawn:
        request.getfixturevalue("no_figure")
    ranked = loss_type == "plackett_luce"
    data, steps = world / ("ranked.jsonl" if ranked else "pairs.jsonl"), None if ranked else 9
    step = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    step = step if LOSSES[loss_type].reads_batch else {}
    assert main(dpo_flags(world, loss_type=loss_type, data=data, max_steps=steps, **step)) == 0
    looked = [record for record in records_of(Path("run")) if "eval_loss" in record]
    first, last = looked[0]["eval_loss"], looked[-1]["eval_loss"]
    if STARTS[loss_type] is not None:
        assert first == pytest.approx(STARTS[loss_type], rel=1e-5, abs=1e-5)
    assert last < first and (ranked or looked[-1]["eval_rewards/accuracies"] > 0.5)
    assert not drawn or Path("run/training.png").stat().st_size > 10_000
    options = json.loads(Path("run/config.json").read_text())["options"]
    used = [option.name for option in LOSSES[loss_type].options]
    every = {option.name for loss in LOSSES.values() for option in loss.options}
    assert {name for name in every if options[name] is not None} == set(used)
    listed = ", ".join(f"{name} {options[name]:g}" for name in used)
    assert f"; loss {loss_type}, {listed}." in capsys.readouterr().out


def test_kto_takes_pairs_one_by_one_and_goes_on(world, no_figure):
    """A micro-batch of one row is no trouble, since the estimate is the window's. The mismatched completions
    are the same when the run goes on, so that the kept reference fits."""
    Path("some.jsonl").write_text(lines(pairs(44)))
    single = dict(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    flags = dict(loss_type="kto", data="some.jsonl", held_out=5 / 44, undesirable_weight=1.5, **single)
    assert main(dpo_flags(world, **flags)) == 0
    records = records_of(Path("run"))
    assert records[0]["eval_loss"] == pytest.approx(2.5 / 4, abs=1e-5)
    assert records[0]["eval_kto/kl_estimate"] == pytest.approx(0, abs=1e-5)
    assert all(record.get("kto/kl_estimate", 0) >= 0 for record in records)
    assert records[-1]["eval_loss"] < 0.6
    ends_as_before()


def ends_as_before(command: str = "dpo", run: str = "run") -> None:
    """The run goes on from before its last checkpoint, to the same files."""
    names = "metrics.jsonl", "model/model.safetensors"
    kept = [(Path(run) / name).read_bytes() for name in names]
    shutil.rmtree(Path(run) / "model")
    shutil.rmtree(max(Path(run, "checkpoints").iterdir()))
    assert main([command, "--resume", run]) == 0
    assert [(Path(run) / name).read_bytes() for name in names] == kept


def labelled(count: int) -> list[dict]:
    """Each pair as a good and a bad row; a third of the bad ones is not there."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for number, row in enumerate(pairs(count))
        for side in ("chosen", "rejected")
        if number % 3 or side == "chosen"
    ]


def test_labelled_completions_train_by_kto(world, capsys, monkeypatch):
    """Good ones become likelier than bad ones, on held-out rows too; half way it goes on to the same weights
    and records."""
    Path("labels.jsonl").write_text(lines(labelled(90)))
    flags = dpo_flags(world, loss_type="kto", data="labels.jsonl", held_out=0.2, desirable_weight=1.5)
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "labelled completions: 150" in printed and "60% of the completions are labelled good" in printed
    records = records_of(Path("run"))
    first, *_, last = (record for record in records if "eval_loss" in record)
    good = first["eval_loss"] * 4 - 2  # (1.5 g + 1 - g) / 2 for a share g of good rows
    assert good * 30 == pytest.approx(round(good * 30), abs=1e-3) and 10 < good * 30 < 30
    assert last["eval_loss"] < 0.6 and last["eval_rewards/margins"] > 1
    assert last["eval_rewards/margins"] == pytest.approx(
        last["eval_rewards/chosen"] - last["eval_rewards/rejected"], abs=1e-5
    )
    assert Path("run/training.png").stat().st_size > 10_000
    starts = []  # the line of the figure: the mean over the rows that are trained on
    monkeypatch.setattr(figure, "preference_figure", lambda records, start, *_: starts.append(start))
    ends_as_before()
    assert starts == [pytest.approx((1.5 * (90 - 30 * good) + 60 - 30 * (1 - good)) / 120 / 2)]
    refused(capsys, dpo_flags(world, "other", data="labels.jsonl"), "row of labels", "--loss-type kto")
    Path("one.jsonl").write_text(lines(labelled(1)))
    refused(capsys, dpo_flags(world, "other", data="one.jsonl", loss_type="kto"), "other prompts")
    assert not Path("other").exists()


@pytest.mark.parametrize("given", [{}, {"undesirable_weight": 1.0}])
def test_the_rarer_label_gets_the_weight_that_makes_up_for_it(world, capsys, given):
    """90 good and 60 bad ones: 60 x 1.5 = 90. The loss where policy = reference is then 90 / 150, however the
    rows are cut; a weight that is given is left alone, and so is the other."""
    Path("labels.jsonl").write_text(lines(labelled(90)))
    assert main(dpo_flags(world, loss_type="kto", data="labels.jsonl", max_steps=2, held_out=0, **given)) == 0
    assert ("count alike" in capsys.readouterr().out) == (not given)
    options = json.loads(Path("run/config.json").read_text())["options"]
    weights = options["desirable_weight"], options["undesirable_weight"]
    assert weights == ((1.0, 1.0) if given else (1.0, 1.5))
    assert main(["dpo", "--resume", "run"]) == 0  # which keeps them
    assert json.loads(Path("run/config.json").read_text())["options"]["undesirable_weight"] == weights[1]


def test_the_weights_are_those_of_the_rows_that_are_trained_on(world, monkeypatch):
    """Not of rows that are held out; in pairs, or labels of one kind, there is nothing to weigh."""
    seen, balanced = [], dpo._balanced
    monkeypatch.setattr(dpo, "_balanced", lambda o, rows: seen.append(len(rows)) or balanced(o, rows))
    Path("labels.jsonl").write_text(lines(labelled(90)))
    assert main(dpo_flags(world, loss_type="kto", data="labels.jsonl", max_steps=1, held_out=0.2)) == 0
    assert seen == [120]  # of 150
    one = [Example([1], [[2]], "", label=True)]
    two = Example([1], [[2], [3]], "")
    assert balanced(argparse.Namespace(), one * 3) == balanced(argparse.Namespace(), [two]) == {}


def test_the_first_sound_row_says_whether_kto_reads_labels_or_pairs():
    pair, label = pairs(1)[0], labelled(1)[0]
    for rows, labels in (
        ([label, pair], True),
        ([label | {"label": "False"}], True),
        ([pair | {"label": True}], False),  # of a pair, it says something else
        (["no row", label], True),
        ([{"prompt": "a"}, label], False),  # a mistake in it, which `load_dataset` names
    ):
        Path("rows.jsonl").write_text(lines(rows))
        assert has_labels("rows.jsonl") == labels, rows


@pytest.mark.parametrize("count", [1, 5, 12])
def test_a_handful_of_rows_trains_at_the_first_try(count, capsys, no_figure):
    """Nothing can be held out of five rows, no 1,024 tokens be learnt, and 150 steps of warm-up would never
    end: all three adapt, in words, and go on adapted."""
    Path("few.jsonl").write_text(lines([row | {"prompt": f"Say {k}"} for k, row in enumerate(pairs(count))]))
    few = ["--num-train-epochs", "12", "--n-layer", "1", "--n-head", "2", "--n-embd", "16"]
    assert main(["sft", "--data", "few.jsonl", *few, "--output-dir", "sft"]) == 0
    printed = capsys.readouterr().out
    assert "warm-up takes 1 of 12 steps, a tenth, not the paper's 150" in printed
    assert ("too few rows or prompts to hold some out" in printed) == (count < 11)
    records = [record["loss"] for record in records_of(Path("sft")) if "loss" in record]
    assert len(records) == 12 and records[-1] < records[0] - 0.01
    assert f"has {load_policy('sft').tokenizer.vocab_size} tokens instead of 1024" in printed
    assert json.loads(Path("sft/config.json").read_text())["options"]["warmup_steps"] == 1
    ends_as_before("sft", "sft")
    run = ["dpo", "--data", "few.jsonl", "--model", "sft", "--num-train-epochs", "20", "--save-steps", "9"]
    run += ["--eval-samples", "0"]
    assert main([*run, "--output-dir", "run"]) == 0
    printed = capsys.readouterr().out
    assert "warm-up takes 2 of 20 steps" in printed
    losses = [record["loss"] for record in records_of(Path("run")) if "loss" in record]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0]
    ends_as_before()


def test_what_was_asked_for_and_cannot_be_is_refused(world, capsys, no_figure):
    """What is given is obeyed, or refused before anything is written."""
    Path("few.jsonl").write_text(lines(pairs(5)))
    few = ["sft", "--data", "few.jsonl"]
    refused(capsys, [*few, "--vocab-size", "1024"], "--vocab-size 1024", "at most")
    refused(capsys, [*few, "--held-out", "0.05"], "held-out fraction of 0.05")
    assert [path.name for path in Path().iterdir()] == ["few.jsonl"]
    flags = dpo_flags(world, data="few.jsonl", held_out=0.2, eval_samples=0, max_new_tokens=None)
    assert main([*flags, "--warmup-steps", "150"]) == 0
    assert "note: all 1 steps are warm-up" in capsys.readouterr().out


def test_score_reads_runs_without_a_beta(world, capsys, no_figure):
    """Unlikelihood has none; the implicit reward is then measured at the default."""
    assert (
        main(dpo_flags(world, loss_type="unlikelihood", max_steps=1, eval_samples=0, max_new_tokens=None))
        == 0
    )
    capsys.readouterr()
    assert main(["score", "--model", "run", "--data", str(world / "pairs.jsonl")]) == 0
    assert "beta 0.1" in capsys.readouterr().out


def test_bfloat16_multiplies_in_half_precision_and_keeps_float32_weights(trained, world, no_figure):
    assert main(dpo_flags(world, dtype="bfloat16")) == 0
    references, policies = [], []
    for folder in (Path("run"), trained):
        (kept,) = safetensors.torch.load_file(folder / "reference_logps.safetensors").values()
        references.append(kept)
        policies.append(next(r["logps/chosen"] for r in records_of(folder) if "logps/chosen" in r))
    # Measured 0.06 for a row and 0.004 for a mean; rows padded as in bfloat16, but multiplied in float32,
    # are 4e-6 and 0 from float32's.
    assert (references[0] - references[1]).abs().max() > 1e-2
    assert abs(policies[0] - policies[1]) > 1e-3
    weights = safetensors.torch.load_file(Path("run/model/model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert [r["eval_loss"] for r in records_of(Path("run")) if "eval_loss" in r][-1] < 0.6


def test_score_says_whose_reference_is_missing(trained, capsys):
    """A run keeps the name of its start; from another folder a relative one leads nowhere."""
    shutil.copytree(trained, "moved")
    config = json.loads(Path("moved/config.json").read_text())
    config["options"]["model"] = "elsewhere"
    Path("moved/config.json").write_text(json.dumps(config))
    refused(capsys, ["score", "--model", "moved"], "elsewhere", "which moved started from", "by --reference")


def test_weights_that_run_off_end_with_a_remedy(world, capsys):
    refused(capsys, dpo_flags(world, learning_rate=1e30), "lower the learning rate")


def test_sft_of_pairs_learns_the_chosen(world):
    """Preferred-FT: the chosen become likelier than the rejected, which the first model knows as well."""
    flags = ["sft", "--data", str(world / "pairs.jsonl"), "--model", str(world / "sft"), *STEPS]
    assert main([*flags, "--learning-rate", "1e-2", "--output-dir", "run"]) == 0
    looked = [record["eval_loss"] for record in records_of(Path("run")) if "eval_loss" in record]
    assert looked[-1] < looked[0] - 0.1
    assert load_policy("run").model.config == load_policy(str(world / "sft")).model.config
    learnt = Path("run/model/model.safetensors").read_bytes()
    shutil.rmtree("run/model")
    assert main(["sft", "--resume", "run"]) == 0  # from that model again, which the run remembers
    assert Path("run/model/model.safetensors").read_bytes() == learnt


def test_texts_without_prompts_are_learnt(capsys):
    """All rows have the same prompt, none: the held-out part is then made by text."""
    draw = random.Random(0)
    rows = [{"text": f"{draw.choice(GOOD)}, {draw.randint(1, 10**6)}"} for _ in range(60)]
    Path("texts.jsonl").write_text(lines(rows))
    flags = ["--data", "texts.jsonl", "--tokenizer", "bytes", *TINY, *STEPS, "--output-dir", "run"]
    assert main(["sft", *flags]) == 0
    looked = [record["eval_loss"] for record in records_of(Path("run")) if "eval_loss" in record]
    assert looked[-1] < looked[0]


def test_ctrl_c_before_the_first_step_says_how_to_go_on(world, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(objectives, "reference_logps", interrupt)
    assert main(dpo_flags(world)) == 130
    assert "interrupted; go on with `dpo-minimal dpo --resume run`." in capsys.readouterr().err
    monkeypatch.setattr(objectives, "reference_logps", reference_logps)
    assert main(["dpo", "--resume", "run"]) == 0


def test_a_folder_without_tokenizer_is_refused(world, capsys):
    model = load_model(world / "sft" / "model")
    save_model(model, "bare")
    refused(capsys, dpo_flags(world, model="bare"), "bare", "vocab.json and merges.txt")
    save_tokenizer(train_bpe("the cat sat on the mat", 260), "bare")
    refused(capsys, dpo_flags(world, model="bare"), "260", "257")


def own_vocabulary(merges: list[str]) -> None:
    """own/: 260 tokens in Hugging Face's files, end-of-text first, and a GPT with four embeddings more."""
    letters = [chr(v) for v in range(256) if 33 <= v <= 126 or (v >= 161 and v != 173)]
    letters += [chr(256 + k) for k in range(256 - len(letters))]
    names = ["<|endoftext|>", *letters, *(merge.replace(" ", "") for merge in merges)]
    Path("own").mkdir(exist_ok=True)
    Path("own/vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    Path("own/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    torch.manual_seed(0)
    size = len(names) + 4
    save_model(GPT(GPTConfig(vocab_size=size, block_size=48, n_layer=1, n_head=2, n_embd=16)), "own")


def test_a_model_that_brings_its_vocabulary(world, capsys, monkeypatch, no_figure):
    """Its ids, its end-of-text and its padding, in a run that is interrupted, goes on and is sampled from."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    own_vocabulary(["C a", "Ca n", "y o"])
    monkeypatch.setattr(objectives, "reference_logps", interrupt)
    assert main(dpo_flags(world, model="own", max_steps=4)) == 130
    monkeypatch.setattr(objectives, "reference_logps", reference_logps)
    own_vocabulary(["y o", "C a", "Ca n"])
    refused(capsys, ["dpo", "--resume", "run"], "vocabulary")
    own_vocabulary(["C a", "Ca n", "y o"])
    assert main(["dpo", "--resume", "run"]) == 0
    assert "4 embeddings beyond the vocabulary are left out" in capsys.readouterr().err
    model, own = load_policy("run")
    assert (own.kind, own.vocab_size, own.eot, model.config.vocab_size) == ("hugging-face", 260, 0, 260)
    assert [own.token_text(token) for token in own.encode("Can you")] == ["Can", " ", "yo", "u"]
    assert json.loads(Path("run/model/config.json").read_text())["eos_token_id"] == 0
    arguments = ["sample", "--model", "run", "--prompt", "Can you 7?", "--max-new-tokens", "8", "--json"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


def test_a_state_to_go_on_from_is_no_model(trained, capsys):
    state = sorted((trained / "checkpoints").iterdir())[-1]
    refused(capsys, ["sample", "--model", str(state), "--prompt", "x"], str(state), "--resume", "its run")


def test_a_model_folder_that_would_never_end_is_refused(capsys):
    """A pipe in place of config.json: reading it would wait for a writer."""
    Path("model").mkdir()
    os.mkfifo("model/config.json")
    refused(capsys, ["sample", "--model", "model", "--prompt", "x"], "model/config.json", "delete it")


# ------------------------------------------------------------------------------------------------ going on


def test_ctrl_c_and_resume(trained, world, capsys, no_figure):
    """A run in a process of its own lets no other in and is interrupted, and goes on to the files of the
    uninterrupted one."""
    command = [sys.executable, "-m", "dpo_minimal", *dpo_flags(world)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not Path("run/checkpoints/step-000003").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    try:
        refused(capsys, ["dpo", "--resume", "run"], "run: another process is training in it")
    finally:
        process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with `dpo-minimal dpo --resume run`" in err, err
    assert not Path("run/model").exists()
    assert main(["dpo", "--resume", "run"]) == 0
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (Path("run") / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_resumed_run_is_the_run(trained, world, capsys, monkeypatch, no_figure):
    """Nothing about it may change: flags, command, data, model."""
    run = str(trained)
    refused(capsys, ["dpo", "--resume", run, "--beta", "0.2"], "--beta is 0.1")
    refused(capsys, ["dpo", "--resume", run, "--max-steps", "9"], "--max-steps is not given")
    refused(capsys, ["sft", "--resume", run], "'dpo'")
    refused(capsys, ["dpo", "--resume", "nowhere"], "nowhere")
    config, kept = trained / "config.json", (trained / "config.json").read_text()
    config.write_text(kept.replace('"loss_type": "dpo"', '"loss_type": "other"'))
    refused(capsys, ["dpo", "--resume", run], "--loss-type cannot be 'other'", "config.json")
    config.write_text(kept.replace('"device": "cpu"', '"device": "cuda:9"'))  # of a machine that had it
    refused(capsys, ["dpo", "--resume", run], "--device cuda:9", "use cpu")
    config.write_text(kept.replace('"logging_steps": 1', '"logging_steps": 0'))
    refused(capsys, ["dpo", "--resume", run], "--logging-steps")
    config.write_text(kept.replace('"threads": ', '"threads": -'))
    refused(capsys, ["dpo", "--resume", run], "config.json")
    config.write_text(kept)
    data, kept = world / "pairs.jsonl", (world / "pairs.jsonl").read_text()
    data.write_text(lines(pairs(120, seed=1)))
    refused(capsys, ["dpo", "--resume", run], "data is not what it was")
    data.write_text(kept)
    weights = world / "sft" / "model"
    model = load_model(weights)
    kept = (weights / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.wte.weight[0, 0] += 1e-3
    save_model(model, weights)
    refused(capsys, ["dpo", "--resume", run], "model is not what it was")
    (weights / "model.safetensors").write_bytes(kept)
    before = (trained / "model" / "model.safetensors").read_bytes()
    assert main(["dpo", "--resume", run]) == 0  # finished already: the same again
    assert (trained / "model" / "model.safetensors").read_bytes() == before


def test_references_that_are_not_the_models_are_seen_before_a_step(world, capsys, monkeypatch):
    """A cache file with the right key and wrong numbers."""
    monkeypatch.setattr(objectives, "load_reference_logps", lambda path, key: torch.full((120, 2), -30.0))
    refused(capsys, dpo_flags(world), "reference log-probabilities belong to other weights")
    assert not Path("run/model").exists() and not Path("run/checkpoints").exists()


def test_references_are_computed_once(trained, world, monkeypatch, no_figure):
    monkeypatch.setattr(objectives, "reference_logps", lambda *_, **__: pytest.fail("computed again"))
    assert main(["dpo", "--resume", str(trained)]) == 0


# ----------------------------------------------------------------------------------------------- bad input

ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}
BAD_FILES = {
    "not JSON": (b"chosen: b\n", ("line 1", "JSON")),
    "a truncated gzip": (gzip.compress(lines([ROW] * 50).encode())[:-9], ("gzip",)),
    "a missing column": (lines([ROW, {"prompt": "a", "chosen": "b"}]).encode(), ("line 2", "'rejected'")),
    "a wrong type": (lines([ROW | {"chosen": 3}]).encode(), ("line 1", "'chosen'", "number")),
    "an empty completion": (lines([ROW | {"rejected": " "}]).encode(), ("line 1", "'rejected'", "empty")),
    "identical completions": (lines([ROW | {"rejected": " b"}]).encode(), ("line 1", "same as chosen")),
    "a pair that is too long": (lines([ROW | {"chosen": "b" * 60}]).encode(), ("line 1", "--max-length 40")),
    "not UTF-8": (lines([ROW]).encode() + b'{"prompt": "\xff"}\n', ("line 2", "UTF-8")),
    "no row": (b"\n", ("empty",)),
    "a ranking": (lines(rankings(1)).encode(), ("row of rankings", "--loss-type")),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_before_anything_is_written(world, capsys, name):
    content, named = BAD_FILES[name]
    Path("bad.jsonl").write_bytes(content)
    refused(capsys, dpo_flags(world, data="bad.jsonl"), "bad.jsonl", *named)
    assert [path.name for path in Path().iterdir()] == ["bad.jsonl"]


def test_bad_rows_may_be_left_out(world, capsys, no_figure):
    bad = [ROW | {"rejected": " b"}, ROW | {"chosen": "b" * 60}]
    Path("some.jsonl").write_text(lines(pairs(20) + bad))
    assert main([*dpo_flags(world, data="some.jsonl", held_out=0.2), "--skip-bad-rows"]) == 0
    printed = capsys.readouterr().out
    assert "preference pairs: 20" in printed and "line 21" in printed and "line 22" in printed


BAD_FLAGS = {
    "data without model": (dict(model=None), ("--model", "sft --data")),
    "reviews: beyond the context": (dict(model=None, data=None, max_length=200), ("--max-length 200", "96")),
    "reviews: no room": (dict(model=None, data=None, max_new_tokens=96), ("--max-new-tokens 96",)),
    "reviews: prompts": (dict(model=None, data=None, max_prompt_length=96), ("--max-prompt-length 96",)),
    "reviews: too few": (dict(model=None, data=None, rows=5), ("--rows",)),
    "samples that are not drawn": (dict(eval_samples=0, max_new_tokens=4), ("--max-new-tokens",)),
    "no such model, on the reviews": (dict(model="nowhere", data=None), ("nowhere",)),
    "no such model": (dict(model="nowhere"), ("nowhere",)),
    "no such file": (dict(data="nowhere.jsonl"), ("nowhere.jsonl",)),
    "rows of a file": (dict(rows=5), ("--rows",)),
    "beta zero": (dict(beta=0), ("--beta",)),
    "beta nan": (dict(beta="nan"), ("--beta",)),
    "smoothing without noise": (dict(label_smoothing=0.1), ("dpo does not use --label-smoothing",)),
    "beta of orpo": (dict(loss_type="orpo", beta=0.1), ("orpo does not use --beta",)),
    "half of the labels": (dict(loss_type="robust", flip_probability=0.5), ("--flip-probability", "0.5")),
    "more than all": (dict(loss_type="unlikelihood", alpha=1.5), ("--alpha", "[0, 1]")),
    "negative margin": (dict(loss_type="simpo", gamma=-1), ("--gamma", "0")),
    "learning rate": (dict(learning_rate=-1), ("--learning-rate",)),
    "no epochs": (dict(num_train_epochs=0), ("--num-train-epochs",)),
    "negative warm-up": (dict(warmup_steps=-1), ("--warmup-steps",)),
    "all held out": (dict(held_out=1), ("--held-out",)),
    "beyond the context": (dict(max_length=41), ("--max-length 41", "40")),
    "prompt as long as all": (dict(max_prompt_length=40), ("--max-prompt-length",)),
    "device": (dict(device="tpu"), ("--device tpu",)),
    "samples beyond the context": (dict(max_new_tokens=40), ("--max-new-tokens 40",)),
    "seed": (dict(seed=-1), ("--seed",)),
    "clip": (dict(max_grad_norm=-1), ("--max-grad-norm",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_options_are_refused_before_anything_is_written(world, capsys, name):
    changes, named = BAD_FLAGS[name]
    refused(capsys, dpo_flags(world, **changes), *named)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("arguments, named", [
    (["dpo", "--skip-bad-rows"], "--skip-bad-rows"),
    (["sft", "--data", "x", "--rows", "9"], "--rows"),
    (["sft", "--model", "m", "--tokenizer", "bytes"], "--tokenizer"),
    (["sft", "--model", "m", "--n-layer", "2"], "--n-layer"),
    (["sft", "--tokenizer", "bytes", "--vocab-size", "300"], "--vocab-size"),
    (["sft", "--rows", "99"], "--rows"),
    (["sft", "--eval-steps", "5", "--held-out", "0"], "--eval-steps"),
    (["dpo", "--eval-steps", "5", "--held-out", "0", "--eval-samples", "0"], "--eval-steps"),
    (["sft", "--n-embd", "10", "--n-head", "4", "--rows", "500"], "n_embd"),
])  # fmt: skip
def test_options_without_use_are_refused(capsys, arguments, named):
    refused(capsys, arguments, named)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("command", ["audit", "sft"])
def test_a_vocabulary_that_cannot_be_fetched_is_no_trouble_of_the_data(world, capsys, monkeypatch, command):
    def offline():
        raise InputError("GPT-2's vocabulary cannot be fetched; go online once.")

    monkeypatch.setattr(tokenizer, "gpt2_tokenizer", offline)
    told = refused(capsys, [command, "--data", str(world / "pairs.jsonl"), "--tokenizer", "gpt2"])
    assert told.endswith("error: GPT-2's vocabulary cannot be fetched; go online once.")


@pytest.mark.parametrize("how", ["nan", "inf", "shape", "vocabulary", "truncated"])
def test_a_bad_model_is_refused_with_its_tensor(world, capsys, how):
    model = load_model(world / "sft" / "model")
    save_model(model, "model")
    save_tokenizer(byte_tokenizer(), "model")
    path = Path("model/model.safetensors")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        refused(capsys, dpo_flags(world, model="model"), "model.safetensors", "truncated")
        return
    tensors = safetensors.torch.load_file(path)
    if how in ("nan", "inf"):
        tensors["transformer.wpe.weight"][3, 1] = float(how)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        size = dict(model.config.__dict__)
        size |= {"n_embd": 8} if how == "shape" else {"vocab_size": 300}
        save_model(GPT(GPTConfig(**size)), "model")
        if how == "shape":
            safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    named = {"shape": "shape", "vocabulary": "300"}.get(how, "wpe.weight")
    refused(capsys, dpo_flags(world, model="model"), named)
    assert not Path("run").exists()


def test_a_full_disk_is_one_sentence(world, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    refused(capsys, dpo_flags(world), "No space left on device", "free some space")
    assert not list(Path("run").glob("**/*.safetensors"))
    assert list(Path("run").glob("**/.*")) == [Path("run/.lock")]


def test_a_used_folder_is_refused(trained, world, capsys):
    refused(capsys, dpo_flags(world, str(trained)), "holds another run")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and len(printed.splitlines()) > 20 and "default" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert ") (without" not in " ".join(printed.split()), "an option's defaults stand in one bracket"


# ---------------------------------------------------------------------------------------------- real things


@pytest.mark.slow
def test_real_preferences_with_gpt_2s_vocabulary(monkeypatch):
    """Twenty steps on pairs that people wrote, with 50,257 tokens: the held-out loss falls below ln 2."""
    data = SHARED / "data" / "instruction_preferences.json"
    if not data.exists():
        pytest.skip("the real preference pairs are not on this machine")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50257, block_size=256, n_layer=2, n_head=2, n_embd=64)
    save_model(GPT(config), "small")
    save_tokenizer(tokenizer.gpt2_tokenizer(), "small")
    rows = json.loads(data.read_text())
    Path("some.json").write_text(json.dumps(rows[:300]))
    flags = ["--optimizer", "adamw", "--learning-rate", "1e-3", "--warmup-steps", "0", "--max-steps", "20"]
    flags += ["--gradient-accumulation-steps", "1", "--held-out", "0.2", "--eval-samples", "0"]
    assert (
        main(
            [
                "dpo",
                "--data",
                "some.json",
                "--model",
                "small",
                "--skip-bad-rows",
                *flags,
                "--output-dir",
                "run",
            ]
        )
        == 0
    )
    looked = [record["eval_loss"] for record in records_of(Path("run")) if "eval_loss" in record]
    assert looked[0] == pytest.approx(math.log(2), abs=1e-5)
    assert looked[-1] < math.log(2) - 0.01
