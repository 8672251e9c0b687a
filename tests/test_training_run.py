"""Runs that go on: after an interruption the same weights as without, bit for bit; nothing half written."""

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from planting import CAUGHT, plant
from test_policy import loud

from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.text import training_run
from dpo_minimal.text.batches import Example
from dpo_minimal.text.checkpoint import load_model, state_fingerprint
from dpo_minimal.text.objectives import check_start, preference_objective, reference_logps, sft_objective
from dpo_minimal.text.runs import refuse_used_folder
from dpo_minimal.text.training_run import (
    Data,
    Interrupted,
    Settings,
    alone_in,
    evaluate,
    planned_steps,
    run_training,
)
from dpo_minimal.text.training_state import load_training_state
from dpo_minimal.train import make_optimizer
from dpo_minimal.validation import InputError

CONFIG = GPTConfig(vocab_size=11, block_size=24, n_layer=1, n_head=2, n_embd=8)
SETTINGS = Settings(
    learning_rate=1e-2, optimizer="adamw", per_device_train_batch_size=2, gradient_accumulation_steps=2,
    num_train_epochs=2, max_steps=None, warmup_steps=9, max_grad_norm=1.0, logging_steps=1, eval_steps=4,
    save_steps=3, seed=5, dtype="float32", device="cpu",
)  # fmt: skip
ROOT = Path(__file__).parents[1]


def rows(count: int, completions: int, seed: int = 0) -> list[Example]:
    """Random token ids; end-of-text is 0."""
    draw = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [draw.randrange(1, 11) for _ in range(draw.randint(1, most))]

    return [
        Example(ids(6), [[*ids(8), 0] for _ in range(completions)], f"rows, row {number}")
        for number in range(1, count + 1)
    ]


def task(kind: str, seed: int = 1):
    """A model, what to minimise, and 22 rows (5 windows of 4 and one of 2) with 5 more held out."""
    gpt = loud(GPT(CONFIG), seed).float()
    train, held_out = rows(22, 1 if kind == "sft" else 2), rows(5, 1 if kind == "sft" else 2, seed=9)
    if kind == "sft":
        return gpt, sft_objective(gpt, dtype="float32"), Data(train, held_out)
    passes = {"micro_size": 2, "dtype": "float32"}
    references = [reference_logps(gpt, some, **passes) for some in (train, held_out)]
    return gpt, preference_objective(gpt, kind, dtype="float32", beta=0.3), Data(train, held_out, *references)


def start(folder: Path, kind: str = "dpo", settings: Settings = SETTINGS, spoil=None, **options):
    """Train; `spoil` may change the objective. Returns (weights, records, optimizer tensors)."""
    folder.mkdir(exist_ok=True)
    gpt, objective, data = task(kind)
    objective = objective if spoil is None else spoil(objective)
    records = run_training(folder, gpt, objective, data, settings, name="test", **options)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return state_fingerprint(gpt), records, (newest / "optimizer.safetensors").read_bytes()


class Stop(Exception):
    """As a crash."""


def failing_at(step: int, exception: type[BaseException] = Stop):
    """Makes an objective raise when it is called with a gradient for the nth window of two micro-batches."""

    def spoil(objective):
        calls = 0

        def spoiled(micro):
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == 2 * step:
                raise exception
            return objective(micro)

        return spoiled

    return spoil


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize(
    "kind, optimizer, steps",
    [("sft", "adamw", (4, 11)), ("dpo", "adamw", (2, 4, 9, 11)), ("dpo", "rmsprop", (4, 11))],
)
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, kind, optimizer, steps):
    """Before the first checkpoint, right after one, between two, in the second epoch: weights, optimizer and
    records are the same to the last bit, because a step is a function of its number and the state."""
    settings = SETTINGS._replace(optimizer=optimizer)
    whole = start(tmp_path / "whole", kind, settings)
    assert len({record["step"] for record in whole[1]}) == 13  # 0 and two epochs of 6
    for step in steps:
        folder = tmp_path / f"stopped-{step}"
        with pytest.raises(Stop):
            start(folder, kind, settings, failing_at(step))
        assert start(folder, kind, settings, resume=True) == whole
        assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def resumed_in_the_middle(tmp_path) -> None:
    test_a_resumed_run_is_an_uninterrupted_one(tmp_path, "dpo", "adamw", [11])


def test_a_finished_run_resumes_to_itself(tmp_path):
    assert start(tmp_path / "run") == start(tmp_path / "run", resume=True)


def signalling_at(call: int):
    """Ctrl-C in the nth micro-batch that is learnt; every window has two, the sixth of an epoch one."""

    def spoil(objective):
        calls = 0

        def spoiled(micro):
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == call and torch.is_grad_enabled():
                signal.raise_signal(signal.SIGINT)
            return objective(micro)

        return spoiled

    return spoil


def test_ctrl_c_saves_the_step_it_is_in(tmp_path):
    """The signal comes in the middle of step 5; step 5 is finished and saved, and the message says how to go
    on, which leads where an uninterrupted run leads."""

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="saved after step 5 of 12"):
        start(tmp_path / "run", spoil=signalling_at(9))
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "run" / "checkpoints" / "step-000005").is_dir()
    assert start(tmp_path / "run", resume=True) == start(tmp_path / "whole")


def test_ctrl_c_in_the_last_step_is_heeded_too(tmp_path):
    """What comes after a training, be it another, must not go on as if nothing had been asked."""
    with pytest.raises(Interrupted, match="after step 12 of 12"):
        start(tmp_path / "run", spoil=signalling_at(22))


def test_a_second_ctrl_c_stops_at_once():
    with training_run._Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


KILLED = """
import sys, time, torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
import test_training_run as here
from pathlib import Path
def slow(objective):
    def spoiled(micro):
        time.sleep(0.01)
        return objective(micro)
    return spoiled
here.start(Path(sys.argv[1]), spoil=slow, settings=here.SETTINGS._replace(save_steps=1, num_train_epochs=4))
"""


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL at a random moment, again and again, also while a checkpoint is being written (one a step)."""
    settings = SETTINGS._replace(save_steps=1, num_train_epochs=4)
    whole = start(tmp_path / "whole", settings=settings)
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT)
    wanted = random.Random(os.getpid()).randint(3, 18)
    deadline = time.monotonic() + 60
    while len(list((folder / "checkpoints").glob("step-*"))) == 0 or newest(folder) < wanted:
        assert process.poll() is None and time.monotonic() < deadline, "it ended by itself"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert newest(folder) < 24
    assert start(folder, settings=settings, resume=True) == whole


def newest(folder: Path) -> int:
    return max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_a_copy_of_a_checkpoint_is_left_alone(tmp_path):
    """A user keeps one under another name; the run goes on from its own."""
    kept = tmp_path / "run" / "checkpoints" / "step-000009-kept"
    kept.mkdir(parents=True)
    (kept.parent / "step-000003").mkdir()
    assert training_run._checkpoints(tmp_path / "run") == [kept.parent / "step-000003"]
    (kept.parent / "step-000001").touch()  # a stray file, which cannot be deleted as a folder
    assert training_run._checkpoints(tmp_path / "run") == [kept.parent / "step-000003"]


def test_a_checkpoint_that_was_moved_is_let_go(tmp_path):
    """A user moved the oldest to another disk and left a link: the run goes on to its end, and at its saves
    the link goes as a folder would, but not what lies behind it."""
    whole = start(tmp_path / "whole")
    with pytest.raises(Stop):
        start(tmp_path / "run", spoil=failing_at(8))
    oldest = training_run._checkpoints(tmp_path / "run")[0]
    oldest.rename(tmp_path / "elsewhere")
    oldest.symlink_to(tmp_path / "elsewhere")
    assert start(tmp_path / "run", resume=True) == whole
    assert not oldest.is_symlink() and any((tmp_path / "elsewhere").iterdir())


def test_nothing_is_deleted_through_a_link(tmp_path):
    """The folder of checkpoints is a link into another run: what that one holds is not for this to prune."""
    theirs = tmp_path / "theirs" / "checkpoints"
    for name in ("step-000001", "step-000002", "step-000003"):
        (theirs / name).mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(theirs)
    start(tmp_path / "run")
    assert {"step-000001", "step-000002", "step-000003"} <= {path.name for path in theirs.iterdir()}


def test_a_run_folder_leads_nowhere_else(tmp_path):
    """A folder that came from somebody else: going on with it must not write where its links lead. A file
    that is a link is replaced; one to a checkpoint is only read."""
    folder, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    (folder / "sft").mkdir(parents=True)
    for name in ("model", "sft/checkpoints"):
        link = folder / name
        link.symlink_to(precious)
        with pytest.raises(InputError, match=rf"{name}: is a link, .*; remove the link\.$"), alone_in(folder):
            pytest.fail("let in")
        link.unlink()
    (tmp_path / "link").symlink_to(folder)
    with (
        pytest.raises(InputError, match=r"link: is a link; name the folder .*run\.$"),
        alone_in(tmp_path / "link"),
    ):
        pytest.fail("let in")
    with pytest.raises(InputError, match="is a link"):
        refuse_used_folder(str(tmp_path / "link"))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-000003").symlink_to(precious)
    (precious / "file").write_text("kept")
    (folder / "metrics.jsonl").symlink_to(precious / "file")
    with alone_in(folder):
        training_run._Log(folder / "metrics.jsonl", []).add({"step": 1, "loss": 0.5})
    assert (precious / "file").read_text() == "kept" and not (folder / "metrics.jsonl").is_symlink()
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(precious / "new")
    with pytest.raises(InputError, match=r"\.lock: is a link"), alone_in(folder):
        pytest.fail("let in")
    assert not (precious / "new").exists()


def test_a_run_folder_belongs_to_one_process(tmp_path):
    """A second process is refused until the first has ended, be it killed; then nobody is."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with alone_in(tmp_path):
            os.write(writer, b"in")
            signal.pause()
    assert os.read(reader, 2) == b"in"
    sentence = rf"^{re.escape(str(tmp_path))}: another process is training in it; .*\.$"
    try:
        with pytest.raises(InputError, match=sentence), alone_in(tmp_path):
            pytest.fail("let in")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for _ in range(2):
        with alone_in(tmp_path):
            pass


def test_a_run_is_readable_as_the_umask_says(tmp_path):
    """Weights learnt from private data, on a machine of many users: no file is for others to read."""
    before = os.umask(0o077)
    try:
        start(tmp_path / "run")
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o077 for path in (tmp_path / "run").rglob("*")}
    assert len(found) > 5 and not any(found.values())


def test_checkpoints_are_the_newest_two_and_whole(tmp_path):
    start(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000009", "step-000012"
    ]  # fmt: skip
    gpt = GPT(CONFIG)
    load_training_state(
        tmp_path / "run" / "checkpoints" / "step-000009", gpt, make_optimizer(gpt.parameters(), "adamw", 1.0)
    )


def test_another_optimizer_cannot_go_on(tmp_path):
    with pytest.raises(Stop):
        start(tmp_path / "run", spoil=failing_at(8))
    with pytest.raises(InputError, match="AdamW was saved"):
        start(tmp_path / "run", settings=SETTINGS._replace(optimizer="rmsprop"), resume=True)


# ------------------------------------------------------------------------------------------- what is logged


def test_every_row_is_learnt_once_an_epoch_and_the_last_window_is_whole(tmp_path):
    """22 rows in windows of 4 are 6 steps an epoch, the last of 2 rows."""
    gpt, objective, data = task("dpo")
    seen = []

    def watching(micro):
        if torch.is_grad_enabled():
            seen.append(len(micro.reference_logps))
        return objective(micro)

    assert planned_steps(SETTINGS, data) == 12
    run_training(tmp_path, gpt, watching, data, SETTINGS, name="test")
    assert sum(seen) == 2 * 22 and sorted(seen) == [2] * 22
    assert planned_steps(SETTINGS._replace(max_steps=7), data) == 7


def test_evaluation_is_the_mean_over_the_held_out_rows(tmp_path):
    """Batches of 2, 2 and 1 must weigh by their rows; 1e-6: float32 sums in another order."""
    gpt, objective, data = task("dpo")
    moved = loud(GPT(CONFIG), 4).float()
    gpt.load_state_dict(moved.state_dict())
    before = state_fingerprint(gpt)
    found = evaluate(objective, SETTINGS, data)
    whole = evaluate(objective, SETTINGS._replace(per_device_train_batch_size=5), data)
    assert state_fingerprint(gpt) == before and all(p.grad is None for p in gpt.parameters())
    assert found == pytest.approx(whole, rel=1e-5, abs=1e-6)
    each = [
        evaluate(objective, SETTINGS, Data([], [row], None, data.held_out_reference[[index]]))["eval_loss"]
        for index, row in enumerate(data.held_out)
    ]
    assert found["eval_loss"] == pytest.approx(sum(each) / 5, rel=1e-5)
    assert max(each) - min(each) > 0.01


def test_records_have_the_names_of_the_field(tmp_path):
    _, records, _ = start(tmp_path / "run", look=lambda: {"kl/policy_reference": 0.5})
    trained = [record for record in records if "loss" in record]
    looked = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in trained] == list(range(1, 13))
    assert [record["step"] for record in looked] == [0, 4, 8, 12]
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    names |= {"logps/chosen", "logps/rejected", "dpo/gradient_weight", "dpo/saturated_fraction"}
    names |= {"dpo/displacement", "dpo/chosen_logratio", "dpo/ties"}
    assert set(trained[0]) == names | {"step", "grad_norm", "learning_rate"}
    assert set(looked[0]) == {f"eval_{name}" for name in names} | {"step", "kl/policy_reference"}
    assert [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ] == records
    rates = [record["learning_rate"] for record in trained]
    assert rates == pytest.approx([1e-2 * min(1, step / 9) for step in range(1, 13)])
    assert looked[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_run_that_is_all_warm_up_says_so(tmp_path, capsys):
    """The paper's 150 steps on a small file: the learning rate would never be reached, in silence."""
    start(tmp_path / "long", settings=SETTINGS._replace(warmup_steps=48))
    assert "all 12 steps are warm-up, up to 25% of --learning-rate 0.01" in capsys.readouterr().out
    start(tmp_path / "short", settings=SETTINGS._replace(warmup_steps=12))
    assert "warm-up" not in capsys.readouterr().out


def test_few_steps_may_be_logged(tmp_path):
    _, records, _ = start(tmp_path / "run", settings=SETTINGS._replace(logging_steps=5, eval_steps=0))
    assert [record["step"] for record in records] == [0, 1, 5, 10, 12, 12]


def test_displacement_is_told_once_and_only_where_it_is(tmp_path, capsys):
    fallen = {"dpo/displacement": 0.8, "dpo/chosen_logratio": -0.1}
    assert training_run.is_displaced([fallen] * 10)
    assert not training_run.is_displaced([fallen] * 9)  # a spell, not a moment
    # Most fell, but little; the reward of a loss without a reference, a log-probability, is always below 0.
    risen = fallen | {"dpo/chosen_logratio": 0.1, "rewards/chosen": -5.0}
    assert not training_run.is_displaced([risen] * 10)
    assert not training_run.is_displaced([fallen | {"dpo/displacement": 0.4}] * 10)
    assert not training_run.is_displaced([{"loss": 1.0}] * 10)
    assert not training_run.is_displaced([{"loss": 1.0}, *[fallen] * 9])  # a window without good rows
    progress = training_run._Progress("test", 0, 30, 4)
    for step in range(1, 31):
        progress.show(
            {"step": step, "loss": 0.5, "rewards/margins": 1.0, "rewards/accuracies": 1.0, **fallen}
        )
    printed = capsys.readouterr().out
    assert printed.count("Displacement") == 1 and printed.count("rows/s") == 10


# ------------------------------------------------------------------------------------------ what goes wrong


def test_the_first_window_is_checked_before_a_step(tmp_path):
    """Reference log-probabilities of other weights: pitfalls 2 and 12."""
    gpt, objective, data = task("dpo")
    before = state_fingerprint(gpt)
    data = data._replace(train_reference=data.train_reference + 0.01)
    with pytest.raises(InputError, match="belong to other weights"):
        run_training(
            tmp_path, gpt, objective, data, SETTINGS, name="test",
            check_first=partial(check_start, gpt, dtype="float32"),
        )  # fmt: skip
    assert state_fingerprint(gpt) == before and not (tmp_path / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(tmp_path):
    """The last checkpoint stays, so the run can go on from before."""

    def nan_at_five(objective):
        calls = 0

        def spoiled(micro):
            nonlocal calls
            calls += torch.is_grad_enabled()
            loss, metrics = objective(micro)
            return loss * (math.nan if calls == 9 else 1), metrics

        return spoiled

    with pytest.raises(InputError, match=r"^step 5 \(rows, row \d+; rows, row \d+; .*\): loss nan"):
        start(tmp_path / "run", spoil=nan_at_five)
    assert newest(tmp_path / "run") == 3
    assert start(tmp_path / "run", resume=True) == start(tmp_path / "whole")


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    saved = safetensors.torch.save_file
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:  # weights and optimizer of step 3 fit, those of step 6 do not
            raise OSError(errno.ENOSPC, "No space left on device")
        return saved(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match="No space left on device") as refused:
        start(tmp_path / "run")
    assert ". " not in str(refused.value)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert load_model(tmp_path / "run" / "checkpoints" / "step-000003").config == CONFIG
    assert start(tmp_path / "run", resume=True) == start(tmp_path / "whole")


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Stop):
        start(tmp_path / "run", spoil=failing_at(8))
    path = tmp_path / "run" / "checkpoints" / "step-000006" / "state.json"
    whole = path.read_text()
    for state in ('{"step": 5}', '{"step": "6"}', "{}"):
        path.write_text(whole.replace('{\n    "step": 6\n  }', state))
        with pytest.raises(InputError, match=r"step-000006: its state is not of step 6"):
            start(tmp_path / "run", resume=True)
    path.write_text(whole)
    path = path.parent / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"step-000006.*model\.safetensors"):
        start(tmp_path / "run", resume=True)


def test_a_damaged_log_is_named(tmp_path):
    """Only its last line may be cut off, as by a process that is killed."""
    with pytest.raises(Stop):
        start(tmp_path / "run", spoil=failing_at(8))
    path = tmp_path / "run" / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    for line in (b"\xff", b"[1]", b'{"loss": 1}', b'{"step": 1, "loss": []}', first[:-2]):
        path.write_bytes(b"".join([first, line, b"\n", *rest]))
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: is no record of a run; delete it\.$"):
            start(tmp_path / "run", resume=True)
    path.write_bytes(b"".join([first, *rest, first[:-2]]))
    assert start(tmp_path / "run", resume=True) == start(tmp_path / "whole")


MUTANTS = {
    "the schedule begins again": (
        training_run.run_training, "first_step=done + 1),", "first_step=1),", resumed_in_the_middle,
    ),
    "the first windows come again": (
        training_run.run_training, "_windows_from(settings, data, done + 1, last_step)",
        "_windows_from(settings, data, 1, last_step - done)", resumed_in_the_middle,
    ),
    "every epoch has the order of the first": (
        training_run._windows_from, "_epoch(settings, data, epoch)", "_epoch(settings, data, 0)",
        lambda _: order_changes(),
    ),
    "records are kept from beyond the checkpoint": (
        training_run._go_on, 'record["step"] <= done', "True", resumed_in_the_middle,
    ),
    "a checkpoint before the step": (
        training_run.run_training, "_save(folder, model, optimizer, step)",
        "_save(folder, model, optimizer, step - 1)", resumed_in_the_middle,
    ),
    "Ctrl-C does not save": (
        training_run.run_training, " or stop:", ":", test_ctrl_c_saves_the_step_it_is_in,
    ),
    "old checkpoints stay": (
        training_run._save, "[:-KEEP]", "[:0]", test_checkpoints_are_the_newest_two_and_whole,
    ),
    "evaluation sees the first batch alone": (
        training_run.evaluate, "data.held_out, rows,", "data.held_out, rows[:1],",
        test_evaluation_is_the_mean_over_the_held_out_rows,
    ),
}  # fmt: skip


def order_changes() -> None:
    """The second epoch deals the rows anew."""
    _, _, data = task("sft")
    names = [window.name for window in training_run._windows_from(SETTINGS, data, 1, 12)]
    assert names[:6] != names[6:]


def test_epochs_differ():
    order_changes()


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, tmp_path, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises((*CAUGHT, FileExistsError)):
        guard(tmp_path)
