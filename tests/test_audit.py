"""The audit command: what it tells about a file, what it refuses, and that it writes nothing."""

import json
import re
from pathlib import Path

import pytest
from planting import CAUGHT, plant

from dpo_minimal.__main__ import main
from dpo_minimal.experiments.text import audit
from dpo_minimal.experiments.text import setup as text_setup
from dpo_minimal.text import audit as room
from dpo_minimal.text import batches, data
from dpo_minimal.text.tokenizer import byte_tokenizer, save_tokenizer, train_bpe

SHARED = Path(__file__).parents[2] / "shared"
PAIRS = [
    {"prompt": "What is 4 + 2? ", "chosen": "It is 6.", "rejected": "It is 7, I am sure."},
    {"prompt": "What is 4 + 3? ", "chosen": "7", "rejected": "8<|endoftext|>"},
    {"prompt": "What is 4 + 2? ", "chosen": "It is 7, I am sure.", "rejected": "It is 6."},
    {"prompt": "What is 4 + 3? ", "chosen": "7", "rejected": "8<|endoftext|>"},
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def write(rows: list[dict], name: str = "pairs.json") -> str:
    Path(name).write_text(json.dumps(rows), encoding="utf-8")
    return name


def audited(capsys, *arguments: str) -> str:
    """What the command prints; it succeeds, writes nothing and says nothing on stderr."""
    before = sorted(Path.cwd().rglob("*"))
    code = main(["audit", *arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert sorted(Path.cwd().rglob("*")) == before
    return out


def record(capsys, *arguments: str) -> dict:
    return json.loads(audited(capsys, *arguments, "--json"))


def assert_refused(capsys, *arguments: str, named: tuple[str, ...]) -> None:
    """Exit code 2, one sentence on stderr, nothing on stdout."""
    assert main(["audit", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dpo-minimal: error: ") and err.count("\n") == 1, (out, err)
    assert err.endswith(".\n") and ". " not in err, err
    for part in named:
        assert part in err, err


# ------------------------------------------------------------------------------------------ what it tells


def test_troubles_come_with_place_and_remedy(capsys):
    """Data slips, each told. Fails if one in the file is not, or one that is not there is."""
    text = audited(capsys, "--data", write(PAIRS))
    assert sum(line.startswith(("warning", "note")) for line in text.splitlines()) == 4
    for name, count in (
        ("literal_end_of_text", 2),
        ("duplicated", 1),
        ("contradictory", 1),
        ("repeated_prompt", 2),
    ):
        level, what = room.FINDINGS[name]
        assert f"{level}, {count} row{'s' * (count > 1)}: {what}." in text
    assert "row 3 (as row 1)" in text and "row 4 (as row 2)" in text
    assert "preference pairs: 4, different prompts: 2" in text and "pairs.json" in text


def test_a_row_is_shown_as_the_model_sees_it(capsys):
    """Fails if tokens run together, end-of-text is hidden, or chosen and rejected are exchanged."""
    text = audited(capsys, "--data", write([{"prompt": "é\n", "chosen": "a", "rejected": "b c"}]))
    shown = re.sub(r"\s+", " ", text[text.index("token by token") :])
    assert r"prompt [\xc3][\xa9][\n]" in shown
    assert "chosen [a][<|endoftext|>] rejected [b][ ][c][<|endoftext|>]" in shown


def test_long_rows_are_shortened_in_the_middle(capsys):
    """Fails if the end of a long prompt, where the completion begins, cannot be seen, or lines do not end."""
    row = {"prompt": "start " + "x" * 500 + " end", "chosen": "y" * 60, "rejected": "z"}
    text = audited(capsys, "--data", write([row]))
    shown = text[text.index("token by token") :]
    assert max(map(len, shown.splitlines())) <= 100
    joined = shown.replace("\n" + " " * 14, "")
    assert (
        "prompt      [s][t][a][r][t]" in joined and "[e][n][d]\n" in joined and "... 462 more ..." in joined
    )


def test_the_histogram_counts_every_row(capsys):
    """Fails if a row falls between two bars, or the running share is not that of so many tokens."""
    counts = [n * n % 211 + 1 for n in range(200)]
    lines = [line.replace("#", "").split() for line in audit.histogram(counts)]
    assert 4 <= len(lines) <= 10
    for span, number, share in lines:
        first, last = map(int, span.split("-"))
        assert int(number) == sum(first <= count <= last for count in counts)
        assert share == f"{sum(count <= last for count in counts) / len(counts):.0%}"
    assert sum(int(number) for _, number, _ in lines) == len(counts)
    (only,) = audit.histogram([7])
    assert only.split() == ["7", "#" * 40, "1", "100%"]


def test_a_limit_shows_what_it_would_cut(capsys):
    """Rows dropped in silence. Fails if a cut or a row left out is not counted with its place."""
    name = write(PAIRS)
    free = record(capsys, "--data", name)
    assert free["findings"]["truncated"]["count"] == free["findings"]["too_long"]["count"] == 0
    tight = record(capsys, "--data", name, "--max-length", "21")  # rows 1, 3: 15 + 20; rows 2, 4: 15 + 15
    assert tight["findings"]["truncated"]["count"] == 4 and tight["rows"] == 4
    capped = record(capsys, "--data", name, "--max-length", "99", "--max-prompt-length", "7")
    assert capped["findings"]["truncated"]["count"] == 4
    assert "".join(capped["example"]["prompt"]) == "4 + 2? "
    short = record(capsys, "--data", name, "--max-length", "20")
    assert short["rows"] == 2 and [place[:17] for place in short["findings"]["too_long"]["places"]] == [
        "pairs.json, row 1", "pairs.json, row 3",
    ]  # fmt: skip
    assert short["lengths"] == capped["lengths"] == free["lengths"]
    assert_refused(capsys, "--data", name, "--max-length", "12", named=("none of 4 rows", "--max-length 12"))


def test_the_record_says_how_it_was_read(capsys):
    """Fails if --json prints anything else, or leaves out what another reader needs for the same counts."""
    content = record(capsys, "--data", write(PAIRS))
    assert content["tokenizer"] == "bytes" and content["vocab_size"] == 257
    assert content["fingerprint"] == byte_tokenizer().fingerprint
    assert (content["data"], content["kind"], content["max_length"]) == ("pairs.json", "preferences", None)
    assert content["example"]["rejected"][-2:] == [".", "<|endoftext|>"]
    assert set(content["findings"]) == set(room.FINDINGS)


@pytest.mark.parametrize(
    ("kind", "row", "names"),
    [
        ("demonstrations", {"prompt": "p", "completion": "c"}, ["completion"]),
        ("labels", {"prompt": "p", "completion": "c", "label": False}, ["bad"]),
        ("rankings", {"prompt": "p", "responses": ["b", "a", "c"], "ranking": [2, 1, 3]},
         ["rank 1", "rank 2", "rank 3"]),
    ],
)  # fmt: skip
def test_every_kind_of_row(capsys, kind, row, names):
    """Fails if the parts of a row get the names of another kind."""
    content = record(capsys, "--data", write([row, row | {"prompt": "q"}]), "--kind", kind)
    assert list(content["example"]) == ["place", "prompt", *names]
    assert content["kind"] == kind and content["rows"] == 2


def test_the_generated_reviews_are_sound(capsys):
    """The package's own data, alone and with a BPE learnt from them: no warning."""
    for options in ([], ["--kind", "demonstrations"], ["--tokenizer", "bpe"]):
        text = audited(capsys, *options)
        warnings = [line for line in text.splitlines() if line.startswith("warning")]
        assert all("judged otherwise" in line or "repeats" in line for line in warnings), warnings
        assert f"{audit.REVIEWS} generated reviews" in text
    assert "bpe with 512 tokens; limit" in text
    few = record(capsys, "--data", write(PAIRS), "--tokenizer", "bpe")["vocab_size"]
    told = audited(capsys, "--data", write(PAIRS), "--tokenizer", "bpe")
    assert 257 < few < 512 and f"bpe with {few} tokens, as many as the data allow; limit" in told


def test_the_tokenizer_of_a_model(capsys):
    """Fails if --model's own vocabulary is not the one that counts."""
    rows = [row | {"prompt": "What is 4 + 2? " * 9} for row in PAIRS]
    save_tokenizer(train_bpe(json.dumps(rows * 3), 290), Path.cwd())
    name = write(rows)
    own, plain = record(capsys, "--data", name, "--model", "."), record(capsys, "--data", name)
    assert (own["tokenizer"], own["vocab_size"]) == ("bpe", 290)
    assert own["lengths"]["prompt"]["max"] < plain["lengths"]["prompt"]["max"] == 15 * 9
    (Path("run") / "model").mkdir(parents=True)
    save_tokenizer(train_bpe(json.dumps(rows * 3), 280), Path("run/model"))
    assert record(capsys, "--data", name, "--model", "run")["vocab_size"] == 280


def test_released_models_have_the_vocabulary_of_gpt2(capsys, monkeypatch):
    """By name alone: a folder of 50,257 tokens without a tokenizer may be of any language."""
    monkeypatch.setattr(text_setup, "gpt2_tokenizer", lambda: train_bpe(json.dumps(PAIRS * 9), 270))
    name = write(PAIRS)
    assert record(capsys, "--data", name, "--model", "gpt2-medium")["vocab_size"] == 270
    config = {"vocab_size": 50257, "n_positions": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}
    Path("config.json").write_text(json.dumps(config))
    assert_refused(capsys, "--data", name, "--model", ".", named=("vocab.json", "merges.txt"))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        main(["audit", "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert audit.__doc__.strip() in out and "raw bytes (default)" in out


# ---------------------------------------------------------------------------------------- what it refuses


def test_bad_input(capsys):
    name = write([*PAIRS[:2], {"prompt": "p", "chosen": "", "rejected": "x"}])
    assert_refused(capsys, "--data", name, named=("pairs.json", "row 3", "chosen"))
    content = record(capsys, "--data", name, "--skip-bad-rows")
    assert content["rows"] == 2 and content["findings"]["skipped"]["count"] == 1
    assert "row 3" in content["findings"]["skipped"]["places"][0]
    assert_refused(capsys, "--data", "nowhere.jsonl", named=("nowhere.jsonl",))
    good = write(PAIRS, "good.json")
    assert_refused(capsys, "--data", good, "--model", "nowhere", named=("nowhere",))
    assert_refused(capsys, "--data", good, "--max-length", "0", named=("--max-length", "at least 2"))


def test_options_that_would_be_ignored(capsys):
    """Options silently ignored: each that has no effect is refused."""
    assert_refused(capsys, "--kind", "rankings", named=("--kind rankings", "--data"))
    assert_refused(capsys, "--skip-bad-rows", named=("--skip-bad-rows", "--data"))
    assert_refused(capsys, "--max-prompt-length", "9", named=("--max-prompt-length", "--max-length"))
    assert_refused(capsys, "--tokenizer", "bytes", "--model", ".", named=("--tokenizer", "--model"))


# -------------------------------------------------------------------------------------------------- real data


def test_instruction_pairs_with_the_vocabulary_of_gpt2(capsys, monkeypatch):
    """900 real pairs, six of them with chosen equal to rejected. The counts are those of the file, taken with
    the json module alone."""
    path = SHARED / "data" / "instruction_preferences.json"
    if not path.is_file() or not (SHARED / "tiktoken").is_dir():
        pytest.skip("no instruction pairs or no cached GPT-2 vocabulary beside the repository")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    rows = json.loads(path.read_text(encoding="utf-8"))
    same = sum(row["chosen"] == row["rejected"] for row in rows)
    assert_refused(capsys, "--data", str(path), "--tokenizer", "gpt2", named=("row 123",))
    content = record(
        capsys, "--data", str(path), "--tokenizer", "gpt2", "--skip-bad-rows", "--max-length", "96"
    )
    assert content["findings"]["skipped"]["count"] + content["findings"]["identical"]["count"] == same == 6
    assert content["rows"] == 894 and content["vocab_size"] == 50257
    assert content["prompts"] == len(
        {(row["instruction"], row["input"]) for row in rows if row["chosen"] != row["rejected"]}
    )
    assert content["findings"]["literal_end_of_text"]["count"] == 0
    assert content["example"]["chosen"][-1] == "<|endoftext|>"


# ----------------------------------------------------------------------------------------------- planted bugs

MUTANTS = {
    "a finding hidden": (
        room.Audit.__str__, "if places:", "if places[1:]:", test_troubles_come_with_place_and_remedy,
    ),
    "end-of-text of the text not looked for": (
        data.text_findings, "any(END_OF_TEXT in text", "any(END_OF_TEXT == text",
        test_troubles_come_with_place_and_remedy,
    ),
    "the limit not passed on": (
        audit.run, "UNLIMITED if args.max_length is None else args.max_length", "UNLIMITED",
        test_a_limit_shows_what_it_would_cut,
    ),
    "lengths after the cut": (
        batches.tokenize, "sizes.append((len(prompt), *map(len, completions)))",
        "sizes.append((min(len(prompt), max_prompt_length or max_length), *map(len, completions)))",
        test_a_limit_shows_what_it_would_cut,
    ),
    "bars of the wrong width": (
        audit.histogram, "Counter(count // width", "Counter((count - 1) // width",
        test_the_histogram_counts_every_row,
    ),
    "the model's tokenizer ignored": (
        audit._tokenizer, "args.model is not None", "False", test_the_tokenizer_of_a_model,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(monkeypatch, capsys, name):
    """The guard passes as things stand and fails with the bug."""
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard(capsys)
