"""The commands sample and score: their numbers against policy.py and losses.py, and what they refuse."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from planting import CAUGHT, plant

from dpo_minimal import model as model_module
from dpo_minimal.__main__ import main
from dpo_minimal.experiments.text import pair_scores, sample, score
from dpo_minimal.losses import dpo_loss
from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import SequenceBatch, sequence_logps, shared_prompt_batch, shared_prompt_logps
from dpo_minimal.text.batches import tokenize
from dpo_minimal.text.checkpoint import load_model, save_model, state_fingerprint
from dpo_minimal.text.data import load_dataset
from dpo_minimal.text.reviews import prompts as review_prompts
from dpo_minimal.text.reviews import sentiment
from dpo_minimal.text.tokenizer import byte_tokenizer, save_tokenizer, train_bpe

CONTEXT = 64
POLICY, REFERENCE, OTHER = 4, 3, 5  # seeds; under the first two, some margins are positive and some are not
PAIRS = [
    {"prompt": "What is 4 + 2?", "chosen": " It is 6.", "rejected": " It is 7, I am sure."},
    {"prompt": "", "chosen": " Good.", "rejected": "\x1b[2J é bad"},
    {"prompt": "long " * 30, "chosen": " yes", "rejected": " no"},
    {"prompt": "Say", "chosen": " a", "rejected": " b and much more after that"},
]
# Two computations of a float32 sum of some 30 terms near -5: rows of other shapes add up in another order.
TOLERANCE = {"rtol": 0, "atol": 2e-4}


def save(folder: Path, seed: int, *, tokenizer=None) -> str:
    """A GPT of one layer whose opinions are strong enough to be seen, and which writes ASCII."""
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(tokenizer.vocab_size, CONTEXT, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        gpt.ln_f.bias += 1.0  # which adds the sum of its embedding to a token's logit
        gpt.wte.weight[128:256] -= 1.5
        gpt.wte.weight[tokenizer.eot] += 0.1
    save_model(gpt, folder, eos=tokenizer.eot)
    save_tokenizer(tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two models of one vocabulary, one of another, and a file of pairs."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "policy", POLICY)
    save(folder / "reference", REFERENCE)
    save(folder / "other", OTHER, tokenizer=train_bpe("low lower lowest low lower", 260))
    (folder / "pairs.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(saved, monkeypatch):
    monkeypatch.chdir(saved)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def printed(capsys, *arguments: str) -> str:
    before = sorted(Path.cwd().rglob("*"))
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert sorted(Path.cwd().rglob("*")) == before  # both commands only look
    return out


def records(capsys, *arguments: str) -> list[dict]:
    lines = printed(capsys, *arguments, "--json").splitlines()
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines
    ]


SCORE = ("score", "--model", "policy", "--reference", "reference")
ON_FILE = (*SCORE, "--data", "pairs.json")


def examples_of(path: str = "pairs.json"):
    return tokenize(load_dataset(path, "preferences"), byte_tokenizer(), max_length=CONTEXT)[0]


def trained_with(model: str) -> torch.Tensor:
    """(N, 2) log-probabilities as training computes them."""
    examples = examples_of()
    batch = shared_prompt_batch([e.prompt for e in examples], [e.completions for e in examples])
    with torch.no_grad():
        return shared_prompt_logps(load_model(model), batch)


# ------------------------------------------------------------------------------------------------- score


def check_contributions(capsys) -> None:
    """Contributions are beta times the tokens' log-ratios, signed, and add up to the margin."""
    for record in records(capsys, *ON_FILE, "--beta", "0.3")[:-1]:
        total = 0.0
        for name, sign in (("chosen", 1), ("rejected", -1)):
            side = record[name]
            assert len(side["tokens"]) == len(side["contributions"]) == len(side["token_logps"])
            assert side["tokens"][-1] == "<|endoftext|>"
            pairs = zip(side["token_logps"], side["reference_token_logps"], strict=True)
            expected = [sign * 0.3 * (policy - reference) for policy, reference in pairs]
            assert side["contributions"] == pytest.approx(expected, rel=0, abs=1e-12)
            assert side["logp"] == pytest.approx(sum(side["token_logps"]), rel=0, abs=1e-9)
            total += sum(side["contributions"])
        assert abs(record["margin"]) > 0.01  # so that the next line says something
        assert total == pytest.approx(record["margin"], rel=0, abs=1e-9)  # as the help promises


def check_numbers(capsys) -> None:
    """What is printed is dpo_loss of the log-probabilities that training would see, row by row."""
    policy, reference = trained_with("policy"), trained_with("reference")
    expected = dpo_loss(*policy.unbind(-1), *reference.unbind(-1), beta=0.3)
    *pairs, last = records(capsys, *ON_FILE, "--beta", "0.3")
    assert [pair["place"] for pair in pairs] == [f"pairs.json, row {row}" for row in (1, 2, 3, 4)]
    close = dict(TOLERANCE, check_dtype=False)
    for side, name in enumerate(("chosen", "rejected")):
        for field, table in (
            ("logp", policy),
            ("reference_logp", reference),
            ("log_ratio", policy - reference),
        ):
            found = torch.tensor([pair[name][field] for pair in pairs])
            torch.testing.assert_close(found, table[:, side], **close)
        found = torch.tensor([pair[name]["reward"] for pair in pairs])
        torch.testing.assert_close(found, expected[1 + side], **close)
    margins = expected.chosen_rewards - expected.rejected_rewards
    for field, values in (
        ("loss", expected.losses),
        ("weight", expected.gradient_weights),
        ("margin", margins),
    ):
        torch.testing.assert_close(torch.tensor([pair[field] for pair in pairs]), values, **close)
        assert last["summary"][field] == pytest.approx(values.mean().item(), abs=2e-4)
    assert 0 < (margins > 0).double().mean() < 1
    assert last["summary"]["accuracy"] == (margins > 0).double().mean()
    assert (last["summary"]["pairs"], last["summary"]["beta"], last["summary"]["ties"]) == (4, 0.3, 0)
    assert last["audit"]["findings"]["truncated"] == {"count": 1, "places": ["pairs.json, row 3"]}


def check_at_reference(capsys) -> None:
    """Policy = reference: exactly 0, ln 2 and beta / 2; a tie is not counted as right."""
    *pairs, last = records(
        capsys, "score", "--model", "policy", "--reference", "policy", "--data", "pairs.json"
    )
    assert len(pairs) == 4
    for pair in pairs:
        assert (pair["margin"], pair["loss"], pair["weight"]) == (0, pytest.approx(math.log(2)), 0.05)
        for side in (pair["chosen"], pair["rejected"]):
            assert side["log_ratio"] == side["reward"] == 0 and set(map(str, side["contributions"])) == {
                "0.0"
            }
    assert (last["summary"]["accuracy"], last["summary"]["ties"]) == (0, 1)


def check_samples(capsys) -> None:
    """log pi is sequence_logps of what was drawn; tokens and ends are told; one seed, one result."""
    asked = ("sample", "--model", "policy", "--prompt", "The film", "--prompt", "", "--count", "40")
    found = records(capsys, *asked, "--seed", "4")
    assert found == records(capsys, *asked, "--seed", "4") != records(capsys, *asked, "--seed", "5")
    assert [one["prompt"] for one in found] == ["The film"] * 40 + [""] * 40
    assert 0 < sum(one["ended"] for one in found) < 80
    tokenizer, gpt = byte_tokenizer(), load_model("policy")
    compared = 0
    for one in found:
        assert "reward" not in one
        ids = [*tokenizer.encode(one["completion"]), *[tokenizer.eot] * one["ended"]]
        if "\ufffd" in one["completion"]:
            continue  # bytes that are no text: the ids cannot be had back from it
        assert one["tokens"] == len(ids)
        prompt = tokenizer.encode(one["prompt"]) or [tokenizer.eot]
        sizes = torch.tensor([len(prompt)]), torch.tensor([len(prompt) + len(ids)])
        with torch.no_grad():
            logp = sequence_logps(gpt, SequenceBatch(torch.tensor([prompt + ids]), *sizes))
        torch.testing.assert_close(torch.tensor([one["logp"]]), logp, **TOLERANCE)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("check", [check_contributions, check_numbers, check_at_reference, check_samples])
def test_numbers(capsys, check):
    check(capsys)


@pytest.mark.parametrize(
    ("function", "right", "wrong", "check"),
    [
        # a rejected token counted like a chosen one
        (pair_scores.PairScores.contributions, "(rejected[1] - rejected[0])", "(rejected[0] - rejected[1])",
         check_contributions),
        # tokens read one place too early, so that the prompt's end counts and end-of-text does not
        (pair_scores.completion_token_logps, ".double().cpu()", ".double().cpu().roll(1)",
         check_numbers),
        # results put back in the order in which they were computed, not that of the file
        (pair_scores.completion_token_logps, "result[row]", "result[-1 - row]", check_numbers),
        # policy and reference exchanged
        (pair_scores.score_pairs, "*sums[0].unbind(-1), *sums[1]", "*sums[1].unbind(-1), *sums[0]",
         check_numbers),
        # a tie counted as right
        (pair_scores.PairScores.columns, "margins > 0", "margins >= 0", check_at_reference),
        # a seed that is not heeded, log pi of another sample, a cut sample called ended
        (sample._draw, "manual_seed(args.seed)", "manual_seed(0)", check_samples),
        (sample._draw, "logps, strict=True", "logps[::-1], strict=True", check_samples),
        (sample._draw, "y[-1] == tokenizer.eot", "True", check_samples),
    ],
)  # fmt: skip
def test_mutants(monkeypatch, capsys, function, right, wrong, check):
    """Planted mistakes, each seen by its check."""
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        check(capsys)


def test_worked_example():
    """The numbers of the help are those of the loss."""
    tensors = [torch.tensor([value], dtype=torch.float64) for value in (-12.0, -15.0, -14.0, -13.0)]
    result = dpo_loss(*tensors, beta=0.1)
    text = " ".join(score.__doc__.split())
    for words, value in (
        (r"rewards are then ([+.\d]+)", result.chosen_rewards),
        (r"and (-[.\d]+), the margin", result.rejected_rewards),
        (r"margin ([.\d]+), the loss", result.chosen_rewards - result.rejected_rewards),
        (r"sigmoid\(0.4\) = ([.\d]+)", result.losses),
        (r"sigmoid\(-0.4\) = ([.\d]+)", result.gradient_weights),
    ):
        assert float(re.search(words, text)[1]) == pytest.approx(value.item(), abs=5e-5), words


def test_table_and_json_tell_the_same(capsys):
    """Every number of the JSON stands in the table without colours, rounded, on a line of its own kind."""
    *pairs, last = records(capsys, *ON_FILE)
    text = printed(capsys, *ON_FILE)
    assert (
        "\x1b" not in text
    )  # no colours where there is no terminal; and a text's own control character is shown
    assert r"[\x1b]" in text and r"[\xc3]" in text and "warning, 1 row: prompt cut" in text
    for pair in pairs:
        assert f"margin {pair['margin']:+.4f}, loss {pair['loss']:.4f}, weight {pair['weight']:.4f}" in text
        for name in ("chosen", "rejected"):
            side = pair[name]
            numbers = [side["logp"], side["reference_logp"], side["log_ratio"], side["reward"]]
            shown = next(
                line for line in text.splitlines() if line.split()[:2] == [name, f"{side['logp']:.4f}"]
            )
            assert list(map(float, shown.split()[1:])) == pytest.approx(numbers, abs=5.1e-5)
            cells = [
                rf"{re.escape(f'[{token}]')} *{re.escape(f'{value:+z.4f}')}"
                for token, value in zip(side["tokens"], side["contributions"], strict=True)
            ]
            assert re.search(r"\s+".join(cells), text)
    assert f"loss {last['summary']['loss']:>20.4f} ± {last['summary']['loss_error']:.4f}".split() in [
        line.split() for line in text.splitlines()
    ]


def test_colours(capsys, monkeypatch):
    """Green where the margin is raised, red where lowered, on a terminal only and unless switched off; apart
    from them the text is the same."""
    plain = printed(capsys, *ON_FILE)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = printed(capsys, *ON_FILE)
    cells = re.findall(r"\x1b\[30;48;5;(\d+)m\[[^\x1b]*?([-+]\d\.\d{4})\x1b\[0m", coloured)
    assert {int(colour) for colour, _ in cells} >= {pair_scores._GREEN[-1], pair_scores._RED[-1]}
    for colour, value in cells:
        assert int(colour) in (pair_scores._GREEN if float(value) > 0 else pair_scores._RED)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert printed(capsys, *ON_FILE, "--no-color") == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(capsys, *ON_FILE) == plain
    monkeypatch.setenv("NO_COLOR", "")  # as good as not set (no-color.org)
    assert printed(capsys, *ON_FILE) == coloured


def test_depth_follows_size():
    """The largest contribution is deepest, and a zero has no colour."""

    def shade(value: float) -> str | None:
        found = re.search(r"5;(\d+)m", pair_scores._cell("[a]", value, width=12, largest=1.0, colour=True))
        return found and int(found[1])

    assert [shade(value) for value in (0.1, 0.3, 0.5, 0.7, 1.0)] == list(pair_scores._GREEN)
    assert [shade(-value) for value in (0.1, 0.3, 0.5, 0.7, 1.0)] == list(pair_scores._RED)
    assert shade(0.0) is shade(-0.00004) is None


def test_rows_are_those_shown(capsys):
    """--rows limits what is shown, never what is averaged; a pair given is read like a row of a file."""
    whole = records(capsys, *ON_FILE)
    assert records(capsys, *ON_FILE, "--rows", "2") == [*whole[:2], whole[-1]]
    assert records(capsys, *ON_FILE, "--rows", "0") == whole[-1:]
    assert printed(capsys, *ON_FILE, "--rows", "1").count("what each token adds") == 1
    options = [part for name, text in PAIRS[0].items() for part in (f"--{name}", text)]
    pair, last = records(capsys, *SCORE, *options)
    assert pair["margin"] == pytest.approx(whole[0]["margin"], abs=TOLERANCE["atol"])
    assert last["summary"]["loss_error"] is None and last["summary"]["loss"] == pair["loss"]
    assert "mean" not in printed(capsys, *SCORE, *options)


def make_run(folder: Path, **options) -> None:
    """What score reads of a run folder of dpo."""
    save(folder / "model", POLICY)
    start = {"model": state_fingerprint(load_model("reference"))}
    content = {"command": "dpo", "options": {"model": None} | options, "start": start, "threads": 1}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_run_knows_its_reference_and_beta(capsys, tmp_path):
    """A run's beta and start are taken where none are named: its --model, else its sft/."""
    expected = records(capsys, *ON_FILE, "--beta", "0.7")
    make_run(tmp_path / "run", model="reference", beta=0.7, loss_type="dpo")
    with_run = ("score", "--model", str(tmp_path / "run"), "--data", "pairs.json")
    assert records(capsys, *with_run) == expected
    assert records(capsys, *with_run, "--beta", "0.1") == records(capsys, *ON_FILE)
    make_run(tmp_path / "run", model="reference", beta=0.7, loss_type="simpo")  # whose beta is another
    assert records(capsys, *with_run) == records(capsys, *ON_FILE)
    make_run(tmp_path / "run", beta=0.7, loss_type="ipo")
    save(tmp_path / "run" / "sft" / "model", REFERENCE)
    assert records(capsys, *with_run) == expected
    save(tmp_path / "run" / "sft" / "model", OTHER)
    assert_refused(capsys, *with_run, named=("run/sft", "other weights", "--reference"))


# ------------------------------------------------------------------------------------------------ sample


def test_as_many_openings_as_asked_for(capsys):
    """Openings repeat, but are asked for once each: other ones take the place of the repeated."""
    rows = records(capsys, "sample", "--model", "policy", "--rows", "200", "--max-new-tokens", "1")
    assert len({row["prompt"] for row in rows}) == len(rows) == 200
    assert main(["sample", "--model", "policy", "--rows", "100000"]) == 2
    assert "--rows 100000" in capsys.readouterr().err


def test_greedy_is_temperature_zero(capsys):
    """Each token of a greedy sample is the likeliest one; nothing is left to chance."""
    asked = ("sample", "--model", "policy", "--prompt", "The", "--max-new-tokens", "6")
    (one,) = records(capsys, *asked, "--temperature", "0")
    gpt, tokenizer = load_model("policy"), byte_tokenizer()
    ids = tokenizer.encode("The")
    for _ in range(one["tokens"]):
        with torch.no_grad():
            ids.append(int(gpt(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids[3:]) == one["completion"] and one["tokens"] in range(1, 7)
    (top,) = records(capsys, *asked, "--top-k", "1")
    assert top == one


def test_prompts_of_a_file_and_of_reviews(capsys):
    """A file's prompts, each once and in order; else reviews, with the reward of what was written."""
    rows = [*PAIRS[:2], {**PAIRS[0], "chosen": " 6"}, PAIRS[3]]
    Path("again.json").write_text(json.dumps(rows), encoding="utf-8")
    found = records(capsys, "sample", "--model", "policy", "--data", "again.json")
    assert [one["prompt"] for one in found] == ["What is 4 + 2?", "", "Say"]
    asked = ("sample", "--model", "policy", "--seed", "3", "--rows", "2", "--max-new-tokens", "8")
    found = records(capsys, *asked)
    assert [one["prompt"] for one in found] == review_prompts(2, seed=3)
    assert all(one["reward"] == sentiment(one["completion"]) for one in found)
    text = printed(capsys, *asked)
    for one in found:
        assert one["prompt"] in text and f"{one['reward']:+.2f} {one['logp']:8.2f}" in text
    assert text.count("[cut]") == sum(not one["ended"] for one in found) > 0
    assert "\x1b" not in text


def test_samples_fill_the_context(capsys):
    """Without --max-new-tokens a sample may have what the longest prompt leaves, and not a token more."""
    prompt = "x" * (CONTEXT - 3)
    for one in records(
        capsys, "sample", "--model", "policy", "--prompt", prompt, "--prompt", "y", "--count", "20"
    ):
        assert one["tokens"] <= 3 and (one["ended"] or one["tokens"] == 3)
    assert records(capsys, "sample", "--model", "policy", "--prompt", prompt, "--max-new-tokens", "3")
    assert_refused(
        capsys, "sample", "--model", "policy", "--prompt", "y", "--prompt", prompt, "--max-new-tokens", "4",
        named=("--prompt 'xxx", "61 tokens", "--max-new-tokens 4", "64"),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- refusals


def assert_refused(capsys, *arguments: str, named: tuple[str, ...]) -> None:
    """Exit code 2, one sentence on stderr, nothing on stdout."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dpo-minimal: error: ") and err.count("\n") == 1, (out, err)
    assert err.endswith(".\n") and ". " not in err, err
    for part in named:
        assert part in err, err


GIVEN = ("--prompt", "a", "--chosen", "b", "--rejected", "c")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--reference", "other"), ("--reference other", "vocabulary", "--model policy")),
        ((), ("--model policy", "--reference")),
        (("--reference", "nowhere"), ("--reference nowhere", "no such folder")),
        (("--reference", "."), ("--reference .", "config.json")),
        (("--reference", "reference", *GIVEN[:4]), ("--prompt", "--rejected")),
        (("--reference", "reference", "--rejected", "x"), ("--rejected needs --prompt",)),
        (("--reference", "reference", *GIVEN, "--data", "pairs.json"), ("--prompt and --data",)),
        (("--reference", "reference", *GIVEN, "--skip-bad-rows"), ("--skip-bad-rows", "--data")),
        (("--reference", "reference", *GIVEN[:2], "--chosen", " ", "--rejected", "c"), ("'chosen'", "empty")),
        (("--reference", "reference", *GIVEN[:4], "--rejected", "b"), ("'rejected'", "same")),
        (("--reference", "reference", *GIVEN[:4], "--rejected", "c" * 64), ("the pair given", "65 tokens")),
        (("--reference", "reference", *GIVEN[:4], "--rejected", "\udc80"), ("'rejected'", "surrogate")),
        (("--reference", "reference", "--max-length", "65"), ("--max-length 65", "64")),
        (("--reference", "reference", "--beta", "0"), ("--beta", "positive")),
        (("--reference", "reference", "--beta", "nan"), ("--beta", "positive")),
        (("--reference", "reference", "--rows", "-1"), ("--rows", "-1")),
        (("--reference", "reference", "--json", "--no-color"), ("--no-color", "--json")),
        (("--reference", "reference", "--device", "tpu"), ("--device tpu",)),
        (("--reference", "reference", "--data", "nothing.json"), ("nothing.json",)),
    ],
)
def test_score_refuses(capsys, arguments, named):
    assert_refused(capsys, "score", "--model", "policy", *arguments, named=named)


def test_broken_numbers_are_named(capsys, monkeypatch):
    """A log-probability that overflowed is an error with its row, not a table of nan."""
    plant(monkeypatch, model_module.GPT.project, "self.wte.weight)", "self.wte.weight) * 1e39")
    assert_refused(capsys, *ON_FILE, named=("pairs.json, row 1", "--model", "not finite"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--prompt", "a", "--data", "pairs.json"), ("--prompt and --data",)),
        (("--prompt", "a", "--prompt", "a"), ("--prompt", "twice", "--count")),
        (("--prompt", "a", "--kind", "labels"), ("--kind", "--data")),
        (("--prompt", "a", "--rows", "2"), ("--rows", "--prompt")),
        (("--prompt", "\udc80"), ("--prompt", "surrogate")),
        (("--prompt", "x" * CONTEXT), ("--prompt 'xxx", "64 tokens", "leaves too few")),
        (("--data", "pairs.json"), ("pairs.json, row 3", "150 tokens", "leaves too few")),
        (("--prompt", "a", "--temperature", "0", "--top-k", "3"), ("--top-k", "--temperature 0")),
        (("--prompt", "a", "--temperature", "0", "--count", "3"), ("--count", "--temperature 0")),
        (("--prompt", "a", "--temperature", "0", "--seed", "3"), ("--seed", "--temperature 0")),
        (("--prompt", "a", "--temperature", "-1"), ("--temperature", "-1")),
        (("--prompt", "a", "--top-p", "2"), ("--top-p", "2")),
        (("--prompt", "a", "--top-k", "0"), ("--top-k", "0")),
        (("--prompt", "a", "--count", "0"), ("--count", "0")),
        (("--prompt", "a", "--max-new-tokens", "0"), ("--max-new-tokens", "0")),
        (("--seed", "-1"), ("--seed", "-1")),
        (("--seed", str(2**64)), ("--seed", "2^60")),
        (("--device", "cuda:99"), ("--device cuda:99",)),
    ],
)
def test_sample_refuses(capsys, arguments, named):
    assert_refused(capsys, "sample", "--model", "policy", *arguments, named=named)
