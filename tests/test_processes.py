"""Training in several processes that torchrun starts: what one process does, bit for bit; a failure ends all.

`torchrun tests/test_processes.py JOB` is what the processes run: see `JOBS`.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from dpo_minimal.__main__ import main
from dpo_minimal.experiments.text import figure
from dpo_minimal.text import objectives, processes, training_run
from dpo_minimal.train import Window, train
from dpo_minimal.validation import InputError

ROOT = Path(__file__).parents[1]
GOOD, BAD = ("yes", "sure", "of course", "gladly"), ("no", "never", "not now", "hardly")
# 38 rows, of which 36 train: four windows of two micro-batches, and one of a single one, in which the second
# process has nothing to do. The norm is above 0.1 in every step, so that it is clipped.
STEP = ["--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2", "--warmup-steps", "2",
        "--optimizer", "adamw", "--max-grad-norm", "0.1"]  # fmt: skip
SFT = ["sft", "--data", "pairs.jsonl", "--tokenizer", "bytes", "--n-layer", "1", "--n-head", "2", "--n-embd",
       "16", "--max-length", "40", "--learning-rate", "1e-2", *STEP]  # fmt: skip
DPO = ["dpo", "--data", "pairs.jsonl", "--model", "sft1", "--learning-rate", "3e-3", *STEP]
SAMPLES = ["--save-steps", "2", "--eval-steps", "2", "--eval-samples", "3", "--max-new-tokens", "4"]
KTO = ["--loss-type", "kto", "--data", "labels.jsonl"]
LORA = ["--lora-r", "2", "--lora-alpha", "4"]  # all other weights have no gradient
FIFTY = ["--gradient-accumulation-steps", "4", "--num-train-epochs", "17", "--max-steps", "50",
         "--eval-steps", "0", "--eval-samples", "0"]  # fmt: skip


def make_data(folder: Path) -> None:
    """Pairs, labels, and pairs with a bad row; no prompt comes twice."""
    draw = random.Random(0)
    rows = [(f"Can you {number}?", f" {draw.choice(GOOD)}", f" {draw.choice(BAD)}") for number in range(38)]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    labels = [
        {"prompt": row[0], "completion": row[1 + k % 2], "label": k % 2 == 0} for k, row in enumerate(rows)
    ]
    for name, content in (("pairs", pairs), ("labels", labels), ("bad", [*pairs, {**pairs[0], "prompt": 3}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def alone(*commands: list[str]) -> str:
    """Run commands in this process, here; what they print."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for command in commands:
            assert main(command) == 0
    return printed.getvalue()


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess:
    """Start processes here, as users do, and wait for their end."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=100
    )


def files(folder: str) -> dict[str, bytes]:
    """Every file of a run; of JSON its content, without the folder's name and the order of tensors."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    for name in filter(lambda name: name.endswith("/state.json"), found):
        content = json.loads(found[name])
        found[name] = content | {"tensors": sorted(content["tensors"])}
    found["config.json"] = re.sub(rb'"output_dir": ".*"', b"", found["config.json"])
    return found


def as_if_killed(run: str, copy: str) -> None:
    """A copy of a finished run as one that was killed after its fourth step has left it, its log longer."""
    shutil.copytree(run, copy)
    shutil.rmtree(Path(copy, "model"))
    for checkpoint in Path(copy, "checkpoints").iterdir():
        if checkpoint.name != "step-000004":
            shutil.rmtree(checkpoint)


def records_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """The one that a command fails with; of its code nothing is shown, as it would be of a mistake in it."""
    assert done.returncode != 0
    (sentence,) = re.findall("^dpo-minimal: error: (.*)$", done.stderr, re.MULTILINE)
    assert "dpo_minimal/" not in done.stderr, done.stderr
    return sentence


@pytest.fixture
def here(tmp_path, monkeypatch):
    """In a folder with data; without figures, half of a small run's time."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path)
    for name in ("sft_figure", "preference_figure"):
        monkeypatch.setattr(figure, name, lambda *_: None)


# ------------------------------------------------------------------------------------ what the processes run


def watch_writes() -> list[str]:
    """What this process, if it is not the first, opens for writing, makes, moves or removes from now on."""
    writes: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
        writing = flags & (os.O_WRONLY | os.O_RDWR) or event in ("os.rename", "os.mkdir", "os.remove")
        if writing and Path.cwd() in Path(str(arguments[0])).absolute().parents:
            writes.append(f"{event} {arguments[0]}")

    if not processes.leads():
        sys.addaudithook(watch)
    return writes


def add_parts() -> None:
    """Means that only some processes have, a gradient that only one has, and the sign of zeros."""
    own = processes.number
    both, other, frozen = (torch.zeros(2, requires_grad=wanted) for wanted in (True, True, False))
    both.grad = torch.tensor([-0.0, 3.0 - own])
    other.grad = None if own else torch.tensor([-0.0, 7.0])
    means = {"loss": torch.tensor(1.0 + own), f"of {own}": torch.tensor(5.0)}
    summed = processes.add_up(means, [both, other, frozen])
    assert [(name, value.item()) for name, value in summed.items()] == [("loss", 3), ("of 0", 5), ("of 1", 5)]
    assert both.grad.tolist() == [0, 5] and other.grad.tolist() == [0, 7] and frozen.grad is None
    assert both.grad[0].signbit() and other.grad[0].signbit()


SHARED = "all of it is done in shares"


def share() -> int:
    """What `test_two_processes_do_what_one_does` looks at, then an end by force."""
    with processes.joined("dpo"):
        processes.joined = lambda _: contextlib.nullcontext()  # for the commands below, which share this one
        add_parts()
        writes = watch_writes()
        commands = (
            [*SFT, "--output-dir", "sft2"],
            [*DPO, *SAMPLES, "--output-dir", "dpo2"],
            [*DPO, *SAMPLES, *KTO, "--output-dir", "kto2"],
            [*DPO, *SAMPLES, *LORA, "--output-dir", "lora2"],
            ["dpo", "--resume", "resumed2"],
        )
        codes = [main(command) for command in commands]
        found = processes.gather((codes, writes))
        assert found == [([0] * 5, [])] * 2, found
        print(SHARED, flush=True)
        return interrupted(lambda: os.kill(os.getpid(), signal.SIGKILL))


def interrupted(deed) -> int:
    """A run in whose third window the second process does something else first."""
    original = objectives.preference_objective

    def make(*arguments, **options):
        objective, calls = original(*arguments, **options), 0

        def spoiled(micro):
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls == 3 and processes.number == 1:
                deed()
            return objective(micro)

        return spoiled

    objectives.preference_objective = make
    return main([*DPO, *SAMPLES, "--output-dir", "run"])


def refuse() -> None:
    raise InputError("a log-probability is not finite.")


def silent() -> int:
    processes.TIMEOUT = timedelta(seconds=3)
    return interrupted(lambda: time.sleep(90))


JOBS = {
    "share": share,
    "refuse": lambda: interrupted(refuse),
    "silent": silent,
}


# ------------------------------------------------------------------------------------------ as one process


@pytest.mark.slow  # several starts of torch; .ci/run compares two processes with one as well
def test_two_processes_do_what_one_does(here):
    """SFT, DPO, KTO on labels, an adapter, and runs that the other number of processes has begun: every file,
    so also metrics, checkpoints and the reference's log-probabilities, is the same to the last bit, because
    a + b is b + a; what is printed too, once, but for the speed. The second process writes nothing (`share`).

    Then the second is killed in the third step of a run, as where memory runs out, which ends the first: here
    too, because each start of torch in several processes takes seconds."""
    alone([*SFT, "--output-dir", "sft1"])
    runs = {"dpo": [], "kto": KTO, "lora": LORA}
    printed = alone(*([*DPO, *SAMPLES, *more, "--output-dir", f"{name}1"] for name, more in runs.items()))
    as_if_killed("dpo1", "resumed2")
    done = torchrun(2, __file__, "share")
    assert SHARED in done.stdout, done.stdout + done.stderr
    as_if_killed("dpo2", "resumed1")
    alone(["dpo", "--resume", "resumed1"])
    same = [(f"{name}1", f"{name}2") for name in ("sft", *runs)]
    for one, two in [*same, ("dpo1", "resumed1"), ("dpo1", "resumed2")]:
        assert files(one) == files(two), two
    trained = [record for record in records_of("dpo1") if "grad_norm" in record]
    assert len(trained) == 5 and all(record["grad_norm"] > 0.1 for record in trained)
    for line in printed.splitlines():
        text = re.sub("rows/s.*", "", line)
        text = re.sub("(dpo|kto|lora)1/", r"\g<1>2/", text)
        assert text in done.stdout, text
    assert done.stdout.count("columns read:") == 6  # for each of its commands once
    lost = "another process failed, or was silent for 0:30:00; see its report, then --resume."
    assert one_sentence(done) == lost and "SIGKILL" in done.stderr
    assert [record["step"] for record in records_of("run")] == [0, 1, 2, 2]


def test_who_is_told_to_end_blames_no_row():
    """SIGTERM comes where it may, here while a micro-batch is read, whose rows are innocent."""
    weight = torch.ones(1, requires_grad=True)
    rows = Window([None], [1.0], "pairs.jsonl, line 35")
    told = train(lambda _: os.kill(os.getpid(), signal.SIGTERM), torch.optim.SGD([weight]), [rows])
    before = signal.signal(signal.SIGTERM, processes._give_up)
    try:
        with pytest.raises(processes.Lost, match=r"^another process failed"):
            next(told)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow  # four starts of torch on two cores, and fifty steps
def test_four_processes_do_what_one_does_up_to_rounding(here):
    """Four numbers are added up in another order. That moves a loss of 0.2 nats by some 1e-8 at first; Adam
    makes more of it where a gradient is near 0. Over fifty steps 2e-6 was the most, and 2e-8 the mean, as
    errors of either sign cancel: so the mean tells a mistake that is always on one side from rounding. Fifty
    times as much is allowed for other processors."""
    alone([*SFT, "--output-dir", "sft1"], [*DPO, *FIFTY, "--output-dir", "one"])
    done = torchrun(4, "-m", "dpo_minimal", *DPO, *FIFTY, "--output-dir", "four")
    assert done.returncode == 0, done.stderr
    one, four = (
        [record["loss"] for record in records_of(run) if "loss" in record] for run in ("one", "four")
    )
    drift = [there - here for there, here in zip(four, one, strict=True)]
    assert len(drift) == 50 and one[-1] < 0.2 < 0.69 < one[0]
    assert max(map(abs, drift)) < 1e-4 and abs(statistics.fmean(drift)) < 1e-6


TRAIN = [*DPO, *SAMPLES, "--output-dir", "run"]


@pytest.mark.slow  # a start of torch in two processes
def test_a_bad_row_is_said_once(here):
    """Each process reads it; all end with code 2, if torchrun has not ended them before."""
    alone([*SFT, "--output-dir", "sft1"])
    done = torchrun(2, "-m", "dpo_minimal", *TRAIN, "--data", "bad.jsonl")
    assert one_sentence(done) == "bad.jsonl, line 39, field 'prompt': must be text, got a number."
    assert not Path("run").exists() and re.search(r"exitcode +: 2 ", done.stderr)


@pytest.mark.parametrize(
    ("count", "more", "sentence"),
    [
        (3, [], "--gradient-accumulation-steps 2: gives only 2 of 3 processes work; start 2, or raise it."),
        (2, ["--loss-type", "aot", "--gradient-accumulation-steps", "1"],
         "--gradient-accumulation-steps 1: gives only 1 of 2 processes work; start 1, or raise it."),
        (2, ["--device", "cuda:0"],
         "--device cuda:0: each process takes a GPU; give cuda, and start at most 1 here."),
    ],
)  # fmt: skip
def test_more_processes_than_work_or_devices_are_refused(here, monkeypatch, capsys, count, more, sentence):
    """A loss that compares the rows of a step has one micro-batch, and so one process."""
    monkeypatch.setattr(processes, "count", count)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([*TRAIN, *more]) == 2 and not Path("run").exists()
    assert capsys.readouterr().err == f"dpo-minimal: error: {sentence}\n"


def test_other_commands_are_refused_and_the_first_to_fail_speaks(monkeypatch, capsys):
    """As torchrun's environment has it; what a second process then has to say is not printed."""
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.port)}
    for name, value in {**place, "TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    for name in ("number", "count", "store"):
        monkeypatch.setattr(processes, name, getattr(processes, name))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["bandit"]) == 2
    processes.report("the same, from another process")
    signal.signal(signal.SIGTERM, before)
    sentence = "only sft and dpo train in several processes; start bandit without torchrun."
    assert capsys.readouterr().err == f"dpo-minimal: error: {sentence}\n"


@pytest.mark.slow  # two starts of torch in two processes each, and a wait
@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ("refuse", r"step 3 \(pairs.jsonl, line \d+; .*\): a log-probability is not finite\."),
        ("silent", r"another process failed, or was silent for 0:00:03; see its report, then --resume\."),
    ],
)
def test_a_failure_of_one_process_ends_all(here, job, sentence):
    """A bad batch that the second alone sees; no answer from it within a timeout of three seconds."""
    alone([*SFT, "--output-dir", "sft1"])
    done = torchrun(2, __file__, job)
    assert re.fullmatch(sentence, one_sentence(done))
    assert [record["step"] for record in records_of("run")] == [0, 1, 2, 2]


def test_ctrl_c_is_for_the_first_process(monkeypatch):
    """torchrun passes it on to all: the first saves, and the others must wait for that in the next step."""
    with training_run._Interrupt() as interrupt:
        monkeypatch.setattr(processes, "number", 1)
        with training_run._Interrupt() as others:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.asked and not others.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked


if __name__ == "__main__":
    for name in ("sft_figure", "preference_figure"):
        setattr(figure, name, lambda *_: None)
    sys.exit(JOBS[sys.argv[1]]())
