"""Files that a disk, an editor or a mail program has damaged: each is read, or refused in one sentence.

Ten thousand of them, drawn with fixed seeds over every format that is read; then files made to do harm.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import io
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from dpo_course import cells
from dpo_course.submissions import submissions

from dpo_minimal.experiments.bandit.tables import load_comparisons, load_table
from dpo_minimal.experiments.options import declared, resolve
from dpo_minimal.experiments.text import sft
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.text.checkpoint import load_model, save_model
from dpo_minimal.text.data import KINDS, load_dataset
from dpo_minimal.text.objectives import load_reference_logps, save_reference_logps
from dpo_minimal.text.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from dpo_minimal.text.training_run import _go_on
from dpo_minimal.text.training_state import save_training_state
from dpo_minimal.text.truth import read_reviews
from dpo_minimal.text.vocabulary import END_OF_TEXT
from dpo_minimal.validation import InputError
from notebooks import build

pytestmark = pytest.mark.slow

FILES = 10_000
SECONDS = 5  # of processor time to read one, which takes milliseconds; the machine may be a slow one
MEMORY = 1 << 30  # bytes that reading may take beyond what the process has
LONGEST = 400  # characters of a message

# ------------------------------------------------------------------------------------ rows, tables, reviews

PAIRS = [{"prompt": f"Is {n} even?", "chosen": " Yes – it is." * n, "rejected": " No."} for n in range(1, 8)]
SCORED = [row | {"score_chosen": 5.0, "score_rejected": "3", "meta": {"source": "x"}} for row in PAIRS]
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "Go\U0001f600"))
)
TALKS = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
]
HUMAN, GPT_GOOD, GPT_BAD = (
    {"from": who, "value": text} for who, text in (("human", "Hi"), ("gpt", "Hé"), ("gpt", "No"))
)
SHARED = [{"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": GPT_BAD}] * 3
SAID = [{side: f"\n\nHuman: Hé\n\nAssistant: {side}" for side in ("chosen", "rejected")}] * 3
ASKED = [{"instruction": "Add", "input": f"{n}", "chosen": "1", "rejected": "2"} for n in range(3)]
VOTES = [{"prompt": "Hi", "response_0": "a", "response_1": "b", "better_response_id": n} for n in (0, 1, 1)]
RANKS = [{"prompt": "Say", "responses": ["a", "b", "ç"], "ranking": [2, 3, 1]}] * 3
LABELS = [{"prompt": "Say", "completion": f" {n}", "label": n % 2 == 0} for n in range(4)]
SHOWN = [{"prompt": "Say", "completion": " it"}, {"instruction": "Go", "completion": "gone"}]
CELLS = [["prompt", "chosen", "rejected"], *(list(row.values()) for row in PAIRS), ["a,b", '"c"\nd', "é"]]
WINS = [["prompt", "winner", "loser", "count"], *([f"p{n % 2}", "a,b", "ü", f"{n + 1}"] for n in range(6))]
ARENA = [{"model_a": "x", "model_b": "y", "winner": winner} for winner in ("model_a", "tie", "model_b")]
REWARDS = [["prompt", "completion", "reward", "reference"]]
REWARDS += [[prompt, completion, "0.5", "2"] for prompt in "pq" for completion in "abc"]
REVIEWS = "".join(f"{n % 2}\tA {'good' if n % 2 else 'dull'} film, number {n}.\n" for n in range(44))


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_text(content):
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def table(rows, separator=","):
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    return text.getvalue().encode()


# -------------------------------------------------------------------------------------- models, runs, words


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def in_folder(files, use):
    """What `use` gives for a folder with these files."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), files)
        return use(Path(folder))


def written(write):
    """The files that `write` puts into a folder."""

    def files(folder):
        write(folder)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return in_folder({}, files)


def tiny():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def a_table_of_logps(folder):
    save_reference_logps(folder / "logps.safetensors", torch.arange(6.0).view(3, 2), "k")


def tensors():
    return safetensors.torch.load(written(partial(save_model, tiny()[0]))["model.safetensors"])


def pickled_weights(folder):
    torch.save(tensors(), folder / "pytorch_model.bin")


def shards(folder):
    where = {name: f"{'ab'[number % 2]}.safetensors" for number, name in enumerate(tensors())}
    for part in set(where.values()):
        own = {name: tensor for name, tensor in tensors().items() if where[name] == part}
        safetensors.torch.save_file(own, folder / part)
    (folder / "model.safetensors.index.json").write_bytes(json_text({"weight_map": where}))


SIGNS = [chr(n) for n in (*range(33, 127), *range(161, 173), *range(174, 256))]  # of bytes; 68 have none
MERGES = ["l o", "lo w", "Ġ low"]
TOKENS = [*SIGNS, *map(chr, range(256, 256 + 68)), *(m.replace(" ", "") for m in MERGES), END_OF_TEXT]
IDS = {token: number for number, token in enumerate(TOKENS)}
EOS = {"id": IDS[END_OF_TEXT], "content": END_OF_TEXT, "special": True}


def older_vocabulary(folder):
    settings = {"eos_token": EOS, "add_prefix_space": False, "added_tokens_decoder": {f"{EOS['id']}": EOS}}
    merges = "\n".join(["#version: 0.2", *MERGES, ""])
    files = {"vocab.json": json_text(IDS), "merges.txt": merges.encode()}
    fill(folder, files | {"tokenizer_config.json": json_text(settings)})


def newer_vocabulary(folder):
    model = {"type": "BPE", "dropout": None, "vocab": IDS, "merges": MERGES}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    whole = {"added_tokens": [EOS], "normalizer": None, "pre_tokenizer": cut, "model": model}
    files = {"tokenizer.json": json_text(whole), "special_tokens_map.json": json_text({"eos_token": EOS})}
    fill(folder, files)


def a_run(folder):
    """config.json, a checkpoint and the log."""
    model, optimizer = tiny()
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    (folder / "checkpoints").mkdir()
    save_training_state(folder / "checkpoints" / "step-000001", model, optimizer, {"step": 1})
    lines = [{"step": step, "loss": 1.5, "grad_norm": None} for step in (0, 1, 2)]
    options = {name: option.default for name, option in declared(sft.GROUPS).items() if name != "resume"}
    config = {"command": "sft", "options": options | {"learning_rate": 0.1, "data": "x.jsonl"}, "threads": 2}
    fill(folder, {"metrics.jsonl": json_lines(lines), "config.json": json_text(config)})


# ------------------------------------------------------------------------------------------ what reads them


def resumed(folder):
    """The options of a run to go on with, which must be of their types."""
    options = declared(sft.GROUPS)
    given = argparse.Namespace(**dict.fromkeys(options) | {"resume": str(folder)})
    found = vars(resolve(given, sft.GROUPS, command="sft"))
    for name in set(options) - {"resume"}:
        kinds = (int, float) if options[name].kind is float else options[name].kind
        fits = isinstance(found[name], kinds) and found[name] in (options[name].choices or [found[name]])
        assert found[name] is None or fits, (name, found[name])


def gone_on(folder):
    """A run restored up to its newest checkpoint: the log is of that step, all its numbers are numbers."""
    done, records = _go_on(folder, *tiny())
    assert all(record["step"] <= done for record in records)
    assert all(isinstance(value, int | float | None) for record in records for value in record.values())


def submitted(folder):
    """What the grader takes from a notebook; its sentence for what is none, as ours."""
    if not submissions(folder, folder / "unpacked"):
        raise InputError("there is no notebook to read.")
    path = folder / "03.ipynb"
    try:
        notebook = cells.read(path)
        cells.cells_to_run(notebook, cells.chapters_of(path, notebook))
    except (ValueError, OSError) as error:
        assert re.match(r"this (file )?is no|.*Permission denied", str(error)), error
        raise InputError(f"{error}.") from None


class Format(NamedTuple):
    """A folder of good files, the one to damage, and what reads the folder."""

    files: dict[str, bytes]
    target: str
    readers: list[Callable[[Path], Any]]


@functools.cache
def formats() -> dict[str, Format]:
    found = {}

    def rows(kind, name, content):
        readers = [partial(load_dataset, kind=kind, skip_bad_rows=skip) for skip in (False, True)]
        readers += [partial(load_dataset, kind=other) for other in KINDS if other != kind]
        found[name] = Format({name: content}, name, [lambda folder, r=r: r(folder / name) for r in readers])

    names, *cells = CELLS
    rows("preferences", "pairs.jsonl", json_lines(PAIRS))
    rows("preferences", "pairs.json", json_text(PAIRS))
    rows("preferences", "pairs.jsonl.gz", gzip.compress(json_lines(PAIRS)))
    rows("preferences", "pairs.json.gz", gzip.compress(json_text(PAIRS)))
    rows("preferences", "columns.json", json_text(dict(zip(names, map(list, zip(*cells))))))
    rows("preferences", "split.json", json_text({"columns": names, "data": cells}))
    rows("preferences", "apart.jsonl", b"\n".join(map(json_text, PAIRS)))
    rows("preferences", "scored.jsonl", json_lines(SCORED))
    rows("preferences", "talks.jsonl", json_lines(TALKS))
    rows("preferences", "shared.jsonl", json_lines(SHARED))
    rows("preferences", "said.jsonl", json_lines(SAID))
    rows("preferences", "asked.json", json_text(ASKED))
    rows("preferences", "votes.jsonl", json_lines(VOTES))
    rows("preferences", "cells.csv", table(CELLS))
    rows("preferences", "cells.tsv.gz", gzip.compress(table(CELLS, "\t")))
    rows("rankings", "ranks.jsonl", json_lines(RANKS))
    rows("labels", "labels.json", json_text(LABELS))
    rows("demonstrations", "shown.jsonl", json_lines(SHOWN))

    def file(name, content, read):
        found[name] = Format({name: content}, name, [lambda folder: read(folder / name)])

    file("wins.csv", table(WINS), load_comparisons)
    file("wins.tsv", table(WINS, "\t"), load_comparisons)
    file("wins.json", json_text([["a", "b", 1], ["b", "a", 0.5], ["a", "b", 2]]), load_comparisons)
    file("arena.jsonl", json_lines(ARENA), load_comparisons)
    file("rewards.csv", table(REWARDS), load_table)
    file("reviews.tsv", REVIEWS.encode(), read_reviews)
    logps = written(a_table_of_logps)["logps.safetensors"]
    file("logps.safetensors", logps, partial(load_reference_logps, key="k"))

    model = written(partial(save_model, tiny()[0]))
    config = {"config.json": model["config.json"]}
    learnt = written(partial(save_tokenizer, train_bpe("low lower lowest", 260)))
    older, newer = written(older_vocabulary), written(newer_vocabulary)
    kept = written(partial(save_tokenizer, in_folder(newer, load_tokenizer)))
    run, at = written(a_run), "checkpoints/step-000001/"
    notebook = {"03.ipynb": build.student_path(build.sources()[2]).read_bytes()}
    for name, files, target, read in (
        ("model's config", model, "config.json", load_model),
        ("weights", model, "model.safetensors", load_model),
        ("pickled weights", config | written(pickled_weights), "pytorch_model.bin", load_model),
        ("index of shards", config | written(shards), "model.safetensors.index.json", load_model),
        ("vocabulary learnt", learnt, "tiktoken.json", load_tokenizer),
        ("vocabulary kept", kept, "tiktoken.json", load_tokenizer),
        ("vocabulary", older, "vocab.json", load_tokenizer),
        ("merges", older, "merges.txt", load_tokenizer),
        ("tokenizer's settings", older, "tokenizer_config.json", load_tokenizer),
        ("tokenizer", newer, "tokenizer.json", load_tokenizer),
        ("special tokens", newer, "special_tokens_map.json", load_tokenizer),
        ("run's config", run, "config.json", resumed),
        ("log", run, "metrics.jsonl", gone_on),
        ("state", run, at + "state.json", gone_on),
        ("optimizer", run, at + "optimizer.safetensors", gone_on),
        ("config of a state", run, at + "config.json", gone_on),
        ("notebook", notebook, "03.ipynb", submitted),
    ):
        found[name] = Format(files, target, [read])
    return found


# ---------------------------------------------------------------------------------------------- the damages

LONG = "long " * 20_000


def deep(depth):
    return "[" * depth + "]" * depth


# What may stand where something else should, in JSON and in a table.
ODD = (
    "null", "true", "false", "0", "-1", "1", "0.5", "1e999", "-1e999", "NaN", "Infinity", "1e308", "5e-324",
    f"{2**31}", f"{2**63}", f"{10**9}", f"{10**30}", "9" * 5_000, "[]", "{}", "[[]]", '[{"role": "user"}]',
    '""', '" "', '"\\u0000"', '"\\ud800"', '"\\u2028\\r\\n"', '"\\u001b[31m"', f'"{LONG}"', f'["{LONG}"]',
    f'{{"{LONG}": 1}}', '[null, 1, "x", [], {}]', deep(5), deep(2_000), '{"a": ' * 300 + "1" + "}" * 300,
    '"<|endoftext|>"', '"gpt2"', '"1"', '"nan"',
)  # fmt: skip
ODD_CELLS = (
    "", " ", "nan", "inf", "1e999", "-1", "0", "1_000", "1,5", "٣", '"', '"a\nb"', "a\0b", "\ufeff", LONG,
    "9" * 5_000,
)  # fmt: skip


def places(content, at=()):
    """The keys that lead to each value inside a JSON value."""
    inner = enumerate(content) if isinstance(content, list) else getattr(content, "items", tuple)()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def odd_json(rng, text):
    """The text of a JSON value with one of its values odd, gone or of another name."""
    whole = {"whole": json.loads(text)}
    *parents, last = rng.choice(list(places(whole)))
    holder = functools.reduce(lambda value, key: value[key], parents, whole)
    odd = deep(rng.randrange(900, 1_000)) if rng.random() < 0.1 else rng.choice(ODD)  # about Python's limit
    if parents and rng.random() < 0.1:
        del holder[last]
    elif parents and isinstance(holder, dict) and rng.random() < 0.1:
        holder[rng.choice(("prompt", "messages", "label", LONG, "\ud800"))] = holder.pop(last)
    else:
        holder[last] = "\uffff"
    return json.dumps(whole["whole"]).replace('"\\uffff"', odd)


def odd_part(rng, name, content):
    """A part that is odd in a file whose form is whole."""
    if name.endswith(".gz"):
        return gzip.compress(odd_part(rng, name[:-3], gzip.decompress(content)))
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(content[:8], "little")
        header = odd_json(rng, content[8:end]).encode()
        return len(header).to_bytes(8, "little") + header + content[end:]
    if name.endswith(".bin"):
        return odd_pickle(rng, content)
    if name == "apart.jsonl":
        first, mark, rest = content.partition(b"}")
        return odd_json(rng, first + mark).encode() + rest
    if name.endswith(("json", "ipynb")):
        return odd_json(rng, content).encode()
    lines = content.decode().splitlines(keepends=True)
    number = rng.randrange(len(lines))
    if name.endswith(".jsonl"):
        lines[number] = odd_json(rng, lines[number]) + "\n"
    else:
        cells = re.split("([ ,\t\r\n])", lines[number])
        cells[rng.randrange(0, len(cells), 2)] = rng.choice(ODD_CELLS)
        lines[number] = "".join(cells)
    return "".join(lines).encode()


def odd_pickle(rng, content):
    """Tensors of which one is of another kind, type or shape, without number, or of another name."""
    found = torch.load(io.BytesIO(content), weights_only=True)
    name = rng.choice(list(found))
    value = found.pop(name)
    odd = (
        value.double(), value.int(), value.to(torch.complex64), value[None], value * float("nan"), value[:0],
        torch.zeros(1).expand(10**6, 10**6), value.to_sparse(), value.to("meta"), None, 1, "x", [value],
    )  # fmt: skip
    found[rng.choice((name, name, name, "x", LONG, 1, ("a",)))] = rng.choice(odd)
    file = io.BytesIO()
    torch.save(rng.choice((found, found, found, list(found.values()), value, [found])), file)
    return file.getvalue()


def odd_chunk(rng, content):
    """A part of the bytes gone, doubled, elsewhere, zeroed or noise."""
    one, two, three = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    first, second, third, rest = content[:one], content[one:two], content[two:three], content[three:]
    return rng.choice((
        first + third + rest, first + second * 2 + third + rest, first + third + second + rest,
        first + bytes(two - one) + third + rest, first + rng.randbytes(two - one) + third + rest,
        first + b"\0" + content[one:], rng.randbytes(9) + content, content + rng.randbytes(9), b"",
    ))  # fmt: skip


def flipped(rng, content):
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def in_other_code(rng, content):
    code = rng.choice(("utf-16", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp037"))
    return content.decode("utf-8", "replace").encode(code, "replace")


def as_gzip(rng, content):
    """Whole, cut short, with bits flipped, or with other bytes after it."""
    packed = gzip.compress(content)
    return rng.choice((packed, packed[: rng.randrange(len(packed))], flipped(rng, packed), packed + content))


def damaged(rng, name, content):
    """The content of a file after one of the ways in which files go wrong."""
    way = rng.randrange(12)
    if way < 5:
        return odd_part(rng, name, content)
    if way == 5 and name.endswith((".safetensors", ".bin")):
        return rng.choice((0, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if way in (5, 6):
        return content[: rng.randrange(len(content))]
    return rng.choice((flipped, odd_chunk, odd_chunk, in_other_code, as_gzip))(rng, content)


# ---------------------------------------------------------------------------------------------- the promise


def listing(folder):
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refusal(read, folder):
    """The message of what refuses the folder's file, None where it is read; nothing else may happen."""
    before, start, message = listing(folder), time.process_time(), None
    try:
        read(folder)
    except InputError as error:
        message = str(error)
        assert len(message) <= LONGEST and message.isprintable() and message.endswith("."), message[:1_000]
    assert time.process_time() - start < SECONDS
    assert listing(folder) == before
    return message


@contextlib.contextmanager
def bounded():
    """Memory beyond `MEMORY`, or half a minute, is an error that no reader expects."""
    resource = pytest.importorskip("resource")

    def late(*_):
        raise KeyboardInterrupt("half a minute")  # no OSError, as TimeoutError is

    limits, status = resource.getrlimit(resource.RLIMIT_DATA), Path("/proc/self/status")
    if status.exists():
        held = int(re.search(r"VmData:\s*(\d+) kB", status.read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, limits[1]))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


NAMES = list(formats())


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(name, tmp_path):
    files, target, readers = formats()[name]
    fill(tmp_path, files)
    assert refusal(readers[0], tmp_path) is None, "the file as it should be"
    verdicts = []
    for seed in range(-(-FILES // len(NAMES))):
        content = damaged(random.Random(f"{name} {seed}"), target, files[target])
        (tmp_path / target).write_bytes(content)
        try:
            with bounded():
                verdicts += [refusal(read, tmp_path) is None for read in readers]
        except BaseException as error:
            error.add_note(f"{name}, seed {seed}: {content[:300]!r}")
            raise
    assert sum(verdicts) < 0.7 * len(verdicts), "damages so mild that they test nothing"


# ----------------------------------------------------------------------------------------- made to do harm

BOTTOMLESS = 100_000
HARM = {
    "nested lists": deep(BOTTOMLESS) + "\n",
    "nested objects": '{"a": ' * BOTTOMLESS + "1" + "}" * BOTTOMLESS + "\n",
    "lines of nested lists": (deep(BOTTOMLESS) + "\n") * 2,
    "a row of nested lists": '[{"prompt": ' + deep(BOTTOMLESS) + "}]\n",
    "a field of nested lists": '{"step": 1, "format": ' + deep(BOTTOMLESS) + "}\n",
    "a number of many digits": '{"step": 1, "prompt": ' + "9" * BOTTOMLESS + "}\n",
    "digits": "9" * BOTTOMLESS + "\n",
    "terabytes of a header": "\0\0\0\0\0\1\0\0{}\n",
    "terabytes of a tensor": "J" + "\0" * 7 + '{"a":{"dtype":"U8","shape":[1099511627776],'
    '"data_offsets":[0,1099511627776]}}\n',
    "commas": "," * 10**6 + "\n",
    "quotes": '"' * (10**6 + 1) + "\n",
    "line ends": "\n" * 10**5,
    "NUL": "\0" * 10**6 + "\n",
    "spaces": " " * 10**6 + "{\n",
}
NO_FILES = (
    "a folder", "a pipe without a writer", "a device without an end", "a loop of links", "a file for nobody",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_harmful_file_is_refused(name, tmp_path):
    files, target, readers = formats()[name]
    fill(tmp_path, files)
    for kind, content in HARM.items():
        (tmp_path / target).write_text(content)
        for read in readers:
            with bounded():
                assert refusal(read, tmp_path) is not None or (name, kind) == ("merges", "line ends"), kind


@pytest.mark.parametrize("content", ["", "[", "[{", '{"prompt": "', "prompt,chosen,rejected\n"])
def test_a_gigabyte_in_a_megabyte_is_refused(content, tmp_path):
    packer = gzip.compress(content.encode()), gzip.compress(bytes(1 << 24)) * 64
    (tmp_path / "bomb.jsonl.gz").write_bytes(b"".join(packer))
    for kind in KINDS:
        with bounded():
            assert "unpack" in refusal(lambda f, kind=kind: load_dataset(f / "bomb.jsonl.gz", kind), tmp_path)


@pytest.mark.parametrize("name", ["wins.csv", "rewards.csv", "cells.csv", "reviews.tsv"])
def test_a_cell_of_200_megabytes_is_refused(name, tmp_path):
    """Also after rows with long cells, for which Python's own limit, which is global, has been raised."""
    files, _, readers = formats()[name]
    (tmp_path / "long.csv").write_text("prompt,chosen,rejected\n" + f"{LONG * 10},{LONG},{LONG}!\n" * 20)
    assert refusal(lambda folder: load_dataset(folder / "long.csv", "preferences"), tmp_path) is None
    (tmp_path / name).write_bytes(files[name] + b'a,"' + b"x" * (200 << 20))
    with bounded():
        assert refusal(readers[0], tmp_path) is not None


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused(name, kind, tmp_path):
    files, target, readers = formats()[name]
    path = tmp_path / target
    fill(tmp_path, files)
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe without a writer":
        os.mkfifo(path)
    elif kind == "a file for nobody":
        path.touch(mode=0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")
    else:
        path.symlink_to("/dev/zero" if kind == "a device without an end" else path.name)
    for read in readers:
        with bounded():
            message = refusal(read, tmp_path)
        # What is made anew where it is not there, or need not be there.
        optional = ("log", "logps.safetensors", "tokenizer's settings", "special tokens")
        assert message is not None or name in optional


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    readers = (
        *(partial(load_dataset, kind=kind) for kind in KINDS),
        load_comparisons,
        load_table,
        read_reviews,
    )
    for read in (*readers, load_model):
        for name in ("a\0b", "\ud800", "n" * 10_000):
            with bounded():
                assert refusal(lambda _, read=read, name=name: read(name), tmp_path) is not None
