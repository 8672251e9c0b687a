"""The benchmark's own honesty: its arithmetic, what it refuses, and that contestants do the same work.

Times are made up here; nothing is measured. What needs Hugging Face's packages is skipped without them.
"""

import io
import itertools
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from planting import CAUGHT, plant

from dpo_minimal.text.batches import tokenize
from dpo_minimal.text.data import dataset_from_rows
from dpo_minimal.text.tokenizer import byte_tokenizer
from dpo_minimal.validation import InputError
from tests.benchmarks import __main__ as command
from tests.benchmarks import contestant, duels, files, ours, results, tasks
from tests.benchmarks.contestant import Turns
from tests.benchmarks.tasks import Task

FACTS = {"tokens": "t", "rows": 100, "threads": 1, "reference_seconds": 0.0, "imports_mib": 200.0}
TASK = Task("trl", "small", "float32", "cpu", 1, "", 32, 8)


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Task:
    """A task of four pairs a step whose weights are written; the process's allocator is left alone."""
    shape = tasks.Shape(n_layer=1, n_head=2, n_embd=16, vocab_size=40, block_size=128, pairs_per_step=4)
    monkeypatch.setitem(tasks.SHAPES, "tiny", shape)
    monkeypatch.setattr(tasks, "LEARNING_RATE", 3e-3)  # a model this small learns slowly
    monkeypatch.setattr(ours, "keep_freed_memory", lambda: True)
    task = Task("ours", "tiny", "float32", "cpu", 1, str(tmp_path / "weights"), 4, 2)
    ours.write_weights(task)
    return task


def play(work, task: Task, *blocks: tuple[float, int], **options) -> list[dict]:
    """Let a contestant work through blocks of (seconds, steps); its facts, then a report a block."""
    lines = [json.dumps({"seconds": seconds, "steps": steps}) + "\n" for seconds, steps in blocks]
    reports = io.StringIO()
    work(task, Turns(io.StringIO("".join(lines)), reports, task.device), **options)
    return [json.loads(line) for line in reports.getvalue().splitlines()]


def block(items: float, seconds: float, peak: float = 500.0) -> dict:
    return {"items": items, "seconds": seconds, "peak_mib": peak, "losses": []}


def duel(*rounds: tuple[dict, dict], ours_facts: dict = FACTS, facts: dict = FACTS, task: Task = TASK):
    return duels.Duel(task, ours_facts, facts, 1e-5, list(rounds))


# ----------------------------------------------------------------------------------------------- arithmetic


def test_the_ratio_is_the_median_over_rounds_of_their_own_ratio():
    # 2, 10 and 3 times as fast; the ratio of medians would be 4 / 1.5, the mean of ratios 5
    played = duel(*((block(a, 2), block(b, 4)) for a, b in ((2, 2), (20, 4), (9, 6))))
    assert results.rate_ratio(played) == results.Ratio(3, 2, 10)


def test_the_first_epoch_pays_for_the_references_of_each_of_its_rows():
    caches = FACTS | {"reference_seconds": 30.0}  # 0.3 s a row
    assert results.first_epoch_rate(5.0, caches) == pytest.approx(1 / (1 / 5 + 0.3))
    played = duel((block(10, 1), block(5, 1)), ours_facts=caches)
    assert results.rate_ratio(played, first_epoch=True).middle == pytest.approx(2.5 / 5)
    assert results.rate_ratio(played).middle == pytest.approx(2)


def test_peaks_are_the_highest_block_and_count_imports_apart():
    assert results.peaks([block(1, 1, 300), block(1, 1, 700), block(1, 1, 500)], FACTS) == [700, 500]
    on_gpu = [block(1, 1) | {"peak_gpu_mib": mib} for mib in (10.0, 30.0)]
    assert results.peaks(on_gpu, FACTS) == [30]


def test_the_table_holds_each_number_once_and_is_markdown():
    played = duel((block(300, 1, 400), block(100, 1, 800)), facts=FACTS | {"imports_mib": 400.0})
    lines = results.rows([played], "ours")
    assert lines[0] == ["small", "float32", "ours", "300", "1", "300", "1", "400 (200)", "1"]
    ratio = "3.00 (3.00–3.00)"
    peers = ["small", "float32", "TRL as it comes", "100", ratio, "100", ratio, "800 (400)", "0.50 (0.50)"]
    assert lines[1] == peers
    text = results.table(lines).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text]
    assert cells[0] == list(results.COLUMNS) and cells[2:] == lines
    assert len(set(map(len, text))) == 1 and set(text[1]) == set("|- ")


def test_sampling_has_no_first_epoch():
    task = TASK._replace(contestant="hugging-face-sampling")
    lines = results.rows([duel((block(4096, 1), block(2048, 1)), task=task)], "ours-sampling")
    assert [line[5:7] for line in lines] == [["–", "–"]] * 2
    assert [line[3] for line in lines] == ["4096", "2048"]


# -------------------------------------------------------------------------------------------------- options


def plan(*arguments: str) -> list[tuple[Task, list[str]]]:
    return command.planned(command.parser().parse_args(arguments))


def test_the_plan_names_every_contest_once():
    contests = plan("--shape", "both")
    names = [(task.shape, task.dtype, task.contestant, task.micro_size) for task, _ in contests]
    assert names == [
        ("small", "float32", "ours", 8),
        ("small", "float32", "ours-sampling", 8),
        ("small", "bfloat16", "ours", 8),
        ("124M", "float32", "ours", 8),
        ("124M", "bfloat16", "ours", 8),
    ]
    faced = {name for _, opponents in contests for name in opponents}
    ((learner, against_it),) = plan("--against", "trl-lora", "all-weights", "--dtype", "float32")
    assert learner.contestant == "ours-lora"
    sides = {"ours", "ours-lora", "ours-sampling"}
    assert faced | {*against_it} | sides == set(tasks.CONTESTANTS) and not faced & {*against_it}
    (only,) = plan("--against", "plain", "--dtype", "float32", "--pairs-per-step", "4")
    assert only[1] == ["plain"] and only[0].pairs_per_step == only[0].micro_size == 4


@pytest.mark.parametrize(
    "arguments",
    [
        "--rounds 0",
        "--threads 0",
        "--seconds 0",
        "--seconds nan",
        "--pairs-per-step -1",
        "--micro-size 64",
        "--shape 124M --against hugging-face-sampling",
        "--dtype bfloat16 --against trl hugging-face-sampling",
    ],
)
def test_an_option_that_cannot_work_is_refused_in_a_sentence_that_names_it(arguments):
    words = arguments.split()
    with pytest.raises(InputError) as error:
        plan(*words)
    sentence = str(error.value)
    flag = [word for word in words if word.startswith("--")][-1]
    assert flag in sentence and sentence.endswith(".") and ". " not in sentence


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, capsys):
    def missing(name):
        raise command.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(command.importlib.metadata, "version", missing)
    with pytest.raises(SystemExit) as stop:
        command.main(["--against", "trl"])
    assert stop.value.code == 2
    assert "pip install -r requirements-bench.txt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ same work


def test_pairs_are_the_same_for_everybody_and_of_the_lengths_that_are_promised():
    pairs = tasks.make_pairs(TASK)
    assert pairs == tasks.make_pairs(TASK._replace(contestant="plain", dtype="bfloat16", micro_size=1))
    assert pairs != tasks.make_pairs(TASK._replace(seed=1))
    eot = tasks.end_of_text(TASK)
    for prompt, *completions in pairs:
        assert 16 <= len(prompt) <= 48 and eot not in prompt
        for completion in completions:
            assert 8 <= len(completion) <= 64 and eot not in completion[:-1] and completion[-1] == eot


def test_a_digest_sees_every_token_and_the_order():
    rows = [[[1, 2], [3, 4], [5]], [[6], [7], [8]]]
    others = [rows[::-1], [[[1, 2], [3], [4, 5]], rows[1]], [rows[0], [[6], [8], [7]]], rows[:1]]
    assert len({tasks.digest(each) for each in [rows, *others]}) == 5


def test_our_steps_are_the_checked_ones_and_then_whole_epochs(tiny):
    examples = [ours.Example(prompt, answers, "") for prompt, *answers in tasks.make_pairs(tiny)]
    steps = itertools.islice(ours.steps_of(tiny, examples), tasks.CHECKED_STEPS + 2 * tasks.STEPS_PER_EPOCH)
    rows = [list(itertools.chain(*step)) for step in steps]
    checked, epochs = rows[: tasks.CHECKED_STEPS], rows[tasks.CHECKED_STEPS :]
    assert list(itertools.chain(*checked)) == list(range(4 * tasks.CHECKED_STEPS))
    for epoch in (epochs[: tasks.STEPS_PER_EPOCH], epochs[tasks.STEPS_PER_EPOCH :]):
        assert sorted(itertools.chain(*epoch)) == list(range(4 * tasks.STEPS_PER_EPOCH))
        assert {len(row) for row in epoch} == {4}


def test_our_contestant_trains_on_those_pairs_whatever_its_micro_size(tiny):
    blocks = (0, tasks.CHECKED_STEPS), (0, tasks.STEPS_PER_EPOCH)
    facts, checked, epoch = play(ours.train_ours, tiny, *blocks)
    assert facts["tokens"] == tasks.digest(tasks.make_pairs(tiny)) and facts["rows"] == 32
    assert 0 < facts["reference_seconds"] < 10 and facts["imports_mib"] <= checked["peak_mib"]
    assert checked["items"] == 4 * tasks.CHECKED_STEPS and epoch["items"] == 4 * tasks.STEPS_PER_EPOCH
    assert checked["losses"] == epoch["losses"]
    _, whole = play(ours.train_ours, tiny._replace(micro_size=4), blocks[0])
    assert len(whole["losses"]) == tasks.CHECKED_STEPS
    # float32's rounding, 6e-8, of a loss near 0.7 a few times over
    assert checked["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert checked["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(checked["losses"][-1] - math.log(2)) > 1e-5  # it learns, so agreement says something


@pytest.mark.parametrize("number", ["BETA", "LEARNING_RATE"])
def test_losses_tell_a_setting_that_is_two_per_cent_off(tiny, monkeypatch, number):
    _, right = play(ours.train_ours, tiny, (0, tasks.CHECKED_STEPS))
    monkeypatch.setattr(tasks, number, 1.02 * getattr(tasks, number))
    _, wrong = play(ours.train_ours, tiny, (0, tasks.CHECKED_STEPS))
    with pytest.raises(InputError, match="do not train alike"):
        duels.check_same_losses(tiny, right["losses"], wrong["losses"])


def test_our_sampler_draws_what_it_counts(tiny):
    facts, report = play(ours.sample_ours, tiny, (0, 1))
    assert facts["tokens"] == tasks.digest(tasks.make_prompts(tiny))
    assert report["items"] == tasks.SAMPLES * tasks.NEW_TOKENS and report["losses"] == []


@pytest.mark.filterwarnings("ignore")  # other people's
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "trl", "trl-precomputed-no-checkpointing", "trl-lora"])
def test_peers_hold_the_same_tokens_and_have_the_same_losses(tiny, monkeypatch, name, dtype):
    pytest.importorskip("trl" if name.startswith("trl") else "transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from tests.benchmarks import hugging_face

    if name == "plain":
        work, options = hugging_face.train_plainly, {}
    else:
        from tests.benchmarks import trl_dpo

        work, options = trl_dpo.train_trl, tasks.CONTESTANTS[name][2]
    task, own = tiny._replace(dtype=dtype), {"lora": name == "trl-lora"}
    our_facts, our_report = play(ours.train_ours, task, (0, tasks.CHECKED_STEPS), **own)
    facts, report = play(work, task, (0, tasks.CHECKED_STEPS), **options)
    duels.check_same_facts(task, our_facts, facts)
    duels.check_same_losses(task, our_report["losses"], report["losses"])


# --------------------------------------------------------------------------------------------------- rounds


def test_a_block_is_a_multiple_of_its_steps_and_lasts_as_asked(monkeypatch):
    ticks = iter([0.0, 3.0, 6.0, 100.0])  # its start, after two steps, after four; the next block's start
    monkeypatch.setattr(contestant, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    def work(task, turns):
        assert turns.ready([])
        done = 0
        while turns.step_done(7, loss=torch.tensor(float(done))):
            done += 1

    _, report = play(work, TASK, (5.0, 2))
    assert report["items"] == 4 * 7 and report["seconds"] == 6
    assert report["losses"] == [0.0, 1.0, 2.0]


class Actor:
    """Stands in for a contestant's process and notes whose turn it was."""

    turns: list[tuple[str, float, int]]
    facts_of: dict[str, dict]
    losses_of: dict[str, list[float]]

    def __init__(self, task: Task):
        self.task, self.facts = task, self.facts_of.get(task.contestant, FACTS)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        pass

    def block(self, seconds: float, steps: int) -> dict:
        name = self.task.contestant
        self.turns.append((name, seconds, steps))
        losses = self.losses_of.get(name, [math.log(2), 0.5])
        return block(len(self.turns), 1.0) | {"losses": losses, "name": name}


@pytest.fixture
def actors(monkeypatch):
    for name, value in (("turns", []), ("facts_of", {}), ("losses_of", {})):
        monkeypatch.setattr(Actor, name, value, raising=False)
    monkeypatch.setattr(duels, "Contestant", Actor)
    return Actor


def stage(rounds: int = 3) -> list[duels.Duel]:
    return duels.contest(
        TASK._replace(contestant="ours"), ["trl"], rounds=rounds, seconds=2.0, notify=lambda played: None
    )


def test_two_contestants_take_turns_in_changing_order(actors):
    (played,) = stage()
    names = [name for name, *_ in actors.turns]
    assert names[:4] == ["ours", "ours", "trl", "trl"]  # to compare losses and to warm up
    assert names[4:] == ["ours", "trl", "trl", "ours", "ours", "trl"]
    assert all(turn[1:] == (2.0, tasks.STEPS_PER_EPOCH) for turn in actors.turns[4:])
    assert [(mine["name"], theirs["name"]) for mine, theirs in played.rounds] == [("ours", "trl")] * 3
    assert played.disagreement == 0


@pytest.mark.parametrize("fact", ["tokens", "rows", "threads"])
def test_other_work_than_ours_is_not_compared(actors, fact):
    actors.facts_of = {"trl": FACTS | {fact: "else"}}
    with pytest.raises(InputError, match=rf"contestant trl .* has other {fact}"):
        stage()


@pytest.mark.parametrize("losses", [[math.log(2), 0.51], [math.log(2), math.nan]])
def test_a_contestant_that_trains_otherwise_is_not_compared(actors, losses):
    actors.losses_of = {"trl": losses}
    with pytest.raises(InputError, match="do not train alike"):
        stage()


def test_a_process_that_dies_is_named_with_its_last_words(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho warning >&2\necho 'No module named trl' >&2\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(InputError, match=r"contestant trl \(small, float32\) .*No module named trl"):
        duels.Contestant(TASK)


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads Linux's /proc")
def test_memory_is_that_of_this_process():
    before = contestant.memory_mib("VmRSS")
    held = torch.ones(2**26)  # 256 MiB: more than an earlier test may have left to reuse
    assert contestant.memory_mib("VmRSS") - before > 200
    del held
    assert contestant.memory_mib("VmHWM") >= before + 200


# ---------------------------------------------------------------------------------------------- large files


def test_dialogues_have_the_form_and_the_size_of_hh():
    """Some 1,060 bytes a row, as 170 MB of 160,000: the mean of 500 strays by about 15. Fails if sizes differ
    in more than their number of rows, or the audit would find anything but repeated prompts."""
    rows = list(files.dialogues(500))
    assert rows == list(files.dialogues(600))[:500] != list(files.dialogues(500, seed=1))
    assert 1000 < sum(len(json.dumps(row)) + 1 for row in rows) / len(rows) < 1120
    data = dataset_from_rows(rows, "dialogues", "preferences")
    assert all(row.prompt.endswith("\n\nAssistant:") for row in data.rows)
    _, audit = tokenize(data, byte_tokenizer(), max_length=4096)
    assert {name for name, places in audit.findings.items() if places} == {"repeated_prompt"}


def test_files_are_measured_size_by_size(monkeypatch, capsys):
    """Fails if a number lands in another row, or a slope is not that between neighbouring sizes."""
    costs = iter(
        [files.Cost(9, 1, 300), files.Cost(9, 5, 350), files.Cost(9, 8, 400), files.Cost(9, 10, 350)]
    )
    monkeypatch.setattr(files, "measure", lambda command: next(costs))
    monkeypatch.setattr(files, "write_dialogues", lambda path, rows: path.write_bytes(b" " * 1000 * rows))
    command.main(["files", "--rows", "2000", "8000"])
    *table, _, audit, _, sft = capsys.readouterr().out.splitlines()
    assert table[2:] == [
        "| audit | 2,000 | 2 | 9.0 | 1.0 | 300 |", "| sft, one step | 2,000 | 2 | 9.0 | 5.0 | 350 |",
        "| audit | 8,000 | 8 | 9.0 | 8.0 | 400 |", "| sft, one step | 8,000 | 8 | 9.0 | 10.0 | 350 |",
    ]  # fmt: skip
    assert audit == "audit: 1,000 rows more take 1.2 CPU seconds and 17 MiB."  # 7 and 100 for 6,000
    assert sft == "sft, one step: 1,000 rows more take 0.83 CPU seconds and 0 MiB."
    assert files.slopes([1000, 3000, 4000], [1.0, 2.0, 5.0]) == "0.5, then 3"
    with pytest.raises(SystemExit):
        command.main(["files", "--rows", "10"])
    assert "--rows" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark counts memory as Linux does")
def test_memory_is_that_of_the_command_and_a_failure_is_no_measurement(monkeypatch, tmp_path):
    script = tmp_path / "python"
    # 512 MiB, and written: zeros are given no memory before they are touched
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'held = b\"1\" * 2**29'\n")
    script.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(script))
        assert files.measure("audit").peak > 512
    script.write_text("#!/bin/sh\necho warning\necho 'no such file' >&2\nexit 2\n")
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(InputError, match="audit failed: no such file"):
        files.measure("audit --data nowhere.jsonl")


# -------------------------------------------------------------------------------------------------- mutants

MUTANTS = {
    "the mean of ratios": (
        results.rate_ratio, "median(ratios)", "sum(ratios) / len(ratios)",
        test_the_ratio_is_the_median_over_rounds_of_their_own_ratio,
    ),
    "the reference's pass for nothing": (
        results.first_epoch_rate, 'facts["reference_seconds"]', "0",
        test_the_first_epoch_pays_for_the_references_of_each_of_its_rows,
    ),
    "the last block's memory": (
        results.peaks, 'max(block["peak_mib"] for block in blocks)', 'blocks[-1]["peak_mib"]',
        test_peaks_are_the_highest_block_and_count_imports_apart,
    ),
    "sampling in bfloat16 dropped in silence": (
        command.planned, "options.against or []", "[]",
        lambda: test_an_option_that_cannot_work_is_refused_in_a_sentence_that_names_it(
            "--dtype bfloat16 --against trl hugging-face-sampling"
        ),
    ),
    "completions without end-of-text": (
        tasks.make_pairs, "- 1), eot]", "- 1)]",
        test_pairs_are_the_same_for_everybody_and_of_the_lengths_that_are_promised,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()


def test_planted_bugs_in_rounds_are_caught(monkeypatch, actors, tiny):
    with monkeypatch.context() as planting:
        plant(planting, duels.contest, "number % 2 == 0", "True")
        with pytest.raises(CAUGHT):
            test_two_contestants_take_turns_in_changing_order(actors)
    with monkeypatch.context() as planting:
        plant(planting, duels.check_same_losses, "not all(difference <=", "any(difference >")  # NaN passes
        with pytest.raises(CAUGHT):
            test_a_contestant_that_trains_otherwise_is_not_compared(actors, [math.log(2), math.nan])
    with monkeypatch.context() as planting:
        plant(planting, ours.steps_of, "start in range(0, ", "start in range(size, size + ")
        with pytest.raises(CAUGHT):
            test_our_steps_are_the_checked_ones_and_then_whole_epochs(tiny)
