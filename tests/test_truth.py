"""The true reward: files of labelled reviews, and the regression learnt from them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dpo_minimal.__main__ import main
from dpo_minimal.text.reviews import sentiment as sentiment_of
from dpo_minimal.text.tokenizer import byte_tokenizer
from dpo_minimal.text.truth import (
    MOST,
    BagOfWords,
    Review,
    accuracy,
    fit_bag_of_words,
    read_reviews,
    truth_of,
    words_of,
)
from dpo_minimal.validation import InputError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------------------------- the file


def review_lines(count: int) -> list[str]:
    """Half praise, half complaint."""
    return [f"{k % 2}\treview number {k} is {'good' if k % 2 else 'bad'}" for k in range(count)]


def test_reviews_are_read_as_they_are():
    """Labels the wrong way round, a lost line, or text cut at a second tab would all go unnoticed later."""
    rows = [*review_lines(40), "1\tcafé , with\ta tab ", "0\tlast"]
    Path("r.tsv").write_bytes("\r\n".join(rows).encode())  # as Windows writes them; no line end at the end
    found = read_reviews("r.tsv")
    assert len(found) == 42 and found[-2:] == [Review("café , with\ta tab", True), Review("last", False)]
    assert [review.positive for review in found[:4]] == [False, True, False, True]


def test_a_byte_order_mark_is_not_part_of_the_first_label():
    """Spreadsheets on Windows save UTF-8 with one."""
    Path("r.tsv").write_text("\n".join(review_lines(40)), encoding="utf-8-sig")
    assert read_reviews("r.tsv")[0] == Review("review number 0 is bad", False)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"no tab here", "no tab"),
        (b"2\tgood", "'2'"),
        (b"positive\tgood", "'positive'"),
        (b"1\t  ", "no text"),
        (b"", "no tab"),
        (b"1\tcaf\xe9", "UTF-8"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(line, named, capsys):
    """One sentence with the line's number, and no run folder left behind."""
    rows = [row.encode() for row in review_lines(60)]
    rows[6] = line
    Path("r.tsv").write_bytes(b"\n".join(rows) + b"\n")
    assert main(["sentiment", "--reviews", "r.tsv"]) == 2
    message = capsys.readouterr().err
    assert "--reviews r.tsv, line 7: " in message and named in message
    assert not Path("runs").exists()


def test_files_that_cannot_teach_are_refused():
    """Missing, too short, or of one sign only."""
    with pytest.raises(InputError, match=r"no\.tsv: no such file"):
        read_reviews("no.tsv")
    Path("few.tsv").write_text("\n".join(review_lines(39)))
    with pytest.raises(InputError, match="has 39 reviews"):
        read_reviews("few.tsv")
    Path("one.tsv").write_text("\n".join(f"1\tgood {k}" for k in range(50)))
    with pytest.raises(InputError, match="all labels are 1"):
        read_reviews("one.tsv")


# ----------------------------------------------------------------------------------------------- the truth


def planted(count: int) -> list[Review]:
    """Positive where the planted word is "fine", negative where it is "poor", among words without meaning."""
    draw = torch.Generator().manual_seed(3)
    fillers = [f"filler{chr(97 + k)}" for k in range(12)]
    rows = []
    for k in range(count):
        chosen = torch.randperm(12, generator=draw)[:5].tolist()
        rows.append(
            Review(" ".join([*(fillers[c] for c in chosen), "fine" if k % 2 else "poor"]), k % 2 == 1)
        )
    return rows


def test_the_model_finds_a_planted_vocabulary():
    """Separable by one word: all held-out reviews right, and its weight far above every filler's."""
    model = fit_bag_of_words(planted(200), l2=1e-2)
    assert accuracy(model, planted(260)[200:]) == 1.0
    fillers = [abs(weight) for word, weight in model.weights.items() if word.startswith("filler")]
    assert model.weights["fine"] > 5 * max(fillers) and model.weights["poor"] < -5 * max(fillers)


def test_the_model_is_the_regularised_optimum():
    """The gradient of the penalised mean loss is zero, computed from a dense table of words: a lost bias,
    counts in place of presence, or a penalty of another size would all show."""
    rows = [*planted(60), Review("fine fine fillera poor", True), Review("once only", False)]
    model = fit_bag_of_words(rows, l2=0.05)
    assert "once" not in model.weights  # too rare
    words = list(model.weights)
    table = torch.tensor([[float(w in words_of(r.text)) for w in words] for r in rows], dtype=torch.float64)
    labels = torch.tensor([r.positive for r in rows], dtype=torch.float64)
    weights = torch.tensor([model.weights[w] for w in words], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(model.bias, dtype=torch.float64, requires_grad=True)
    loss = F.binary_cross_entropy_with_logits(table @ weights + bias, labels) + 0.05 / 2 * (weights**2).sum()
    loss.backward()
    # L-BFGS stops at 1e-9; adding up in another order changes 1e-16 of numbers of size 1
    assert weights.grad.abs().max() < 1e-7 and bias.grad.abs() < 1e-7


def test_repeating_a_word_earns_nothing_and_rewards_are_clipped():
    """Else a policy would be paid for "good good good"."""
    model = BagOfWords({"good": 1.5, "great": 3.0, "bad": -2.0}, 0.5)
    assert model.reward("good") == model.reward("Good, good GOOD") == 2.0
    assert model.reward("good great") == MOST and model.log_odds("good great") == 5.0
    assert model.reward("bad unknown") == -1.5


def test_the_truth_reads_prompt_and_completion_as_one_text():
    """A word begun in the prompt counts; end-of-text does not."""
    tokenizer = byte_tokenizer()
    prompts = [tokenizer.encode("It is mov"), tokenizer.encode("It is dull")]
    completions = [[*tokenizer.encode("ing."), tokenizer.eot], [tokenizer.eot]]
    truth = truth_of(None, tokenizer)
    assert truth(prompts, completions).tolist() == [sentiment_of("It is moving."), sentiment_of("It is dull")]
    model = truth_of(BagOfWords({"moving": 2.0}, 0.0), tokenizer)
    assert model(prompts, completions).tolist() == [2.0, 0.0]
