"""The true reward of a text: the grammar's, whose sentiment is known, or a model's, learnt from reviews.

The paper's is a sentiment classifier as large as the policy. Here it is `reviews.sentiment` for the
package's own grammar, and for real reviews a logistic regression on the words that a text contains,

    reward = log p(positive | text) / p(negative | text) = b + sum of w over the text's different words,

trained on the labels. A word counts once, so that repeating it earns nothing.

But: the model reads words, not sentences. "not good" is "not" plus "good" to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import InputError, check_positive
from .files import read_bytes
from .reviews import sentiment
from .tokenizer import Tokenizer

Truth = Callable[[Sequence[list[int]], Sequence[list[int]]], Tensor]  # prompts, completions -> rewards (N,)

FEWEST_REVIEWS = 40  # of a file: fewer make no vocabulary
RARE = 3  # a word in fewer reviews is not counted
L2 = 1e-3  # of the regression, per review: about the best for 8,000 short ones
MOST = 4.0  # log-odds beyond this are clipped: 98 % sure is sure enough, and no text is infinitely good
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


class Review(NamedTuple):
    """A review of the file; is it positive?"""

    text: str
    positive: bool


def read_reviews(path: str | Path) -> list[Review]:
    """Lines `label<TAB>text`, label 1 for positive and 0 for negative, UTF-8.

    Raises InputError naming file and line: no tab, another label, no text, bytes that are not UTF-8; or the
    file: unreadable, too few reviews, none of one sign.
    """
    lines = read_bytes(path).splitlines()
    found = [_review(line, f"--reviews {path}, line {number}") for number, line in enumerate(lines, start=1)]
    if len(found) < FEWEST_REVIEWS:
        raise InputError(f"--reviews {path}: has {len(found)} reviews; give at least {FEWEST_REVIEWS}.")
    positive = sum(review.positive for review in found)
    if positive in (0, len(found)):
        raise InputError(f"--reviews {path}: all labels are {int(positive > 0)}; give reviews of both kinds.")
    return found


def _review(line: bytes, place: str) -> Review:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: byte {error.start + 1} is not UTF-8; save the file in that encoding."
        ) from None
    label, tab, body = text.partition("\t")
    if not tab:
        raise InputError(f"{place}: has no tab between label and text; write label<TAB>text.")
    if label not in ("0", "1"):
        raise InputError(f"{place}: the label must be 1 (positive) or 0 (negative), got {label[:20]!r}.")
    if not body.strip():
        raise InputError(f"{place}: has no text after its label; delete the line.")
    return Review(body.strip(), label == "1")


class BagOfWords(NamedTuple):
    """A logistic regression on which words a text contains."""

    weights: dict[str, float]  # of each word, nats of log-odds
    bias: float

    def log_odds(self, text: str) -> float:
        """log p(positive) / p(negative); unknown words count nothing.

        >>> BagOfWords({"good": 1.5, "dull": -2.0}, 0.25).log_odds("Good, good, but unheard-of!")
        1.75
        """
        return self.bias + sum(self.weights.get(word, 0.0) for word in sorted(words_of(text)))

    def reward(self, text: str) -> float:
        """The log-odds, clipped to [-4, 4]."""
        return min(MOST, max(-MOST, self.log_odds(text)))


def words_of(text: str) -> set[str]:
    """The different words of a text, in lower case.

    >>> sorted(words_of("It's not a dull film; not at all."))
    ['a', 'all', 'at', 'dull', 'film', "it's", 'not']
    """
    return set(_WORD.findall(text.lower()))


def fit_bag_of_words(reviews: Sequence[Review], *, l2: float = L2) -> BagOfWords:
    """Minimise the mean of -log p(label | text) plus l2/2 times the sum of squared weights.

    Strictly convex in the weights, so there is one optimum; full batch, by L-BFGS in float64.

    Args: reviews of both signs; l2 > 0. Raises InputError.
    """
    check_positive("l2", l2)
    bags = [words_of(review.text) for review in reviews]
    counts = Counter(word for bag in bags for word in bag)
    vocabulary = sorted(word for word, count in counts.items() if count >= RARE)
    if not vocabulary:
        raise InputError(f"no word stands in {RARE} reviews or more; give more reviews.")
    place = {word: number for number, word in enumerate(vocabulary)}
    known = [[place[word] for word in sorted(bag) if word in place] for bag in bags]
    index = torch.tensor([number for numbers in known for number in numbers])
    starts = torch.tensor([0, *map(len, known)][:-1]).cumsum(0)
    labels = torch.tensor([review.positive for review in reviews], dtype=torch.float64)
    weights = torch.zeros(len(vocabulary), 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.embedding_bag(index, weights, starts, mode="sum").squeeze(-1) + bias
        loss = F.binary_cross_entropy_with_logits(logits, labels) + l2 / 2 * (weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return BagOfWords(dict(zip(vocabulary, weights.detach().squeeze(-1).tolist())), bias.item())


def accuracy(model: BagOfWords, reviews: Sequence[Review]) -> float:
    """Share of reviews whose sign the model finds."""
    return sum((model.log_odds(review.text) > 0) == review.positive for review in reviews) / len(reviews)


def truth_of(model: BagOfWords | None, tokenizer: Tokenizer) -> Truth:
    """The reward of prompt and completion read as one text, by the model, or the grammar's where it is None.

    The whole text is read, as in the paper: a completion's first letters may end the prompt's last word.
    """
    read = sentiment if model is None else model.reward

    def truth(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
        texts = [tokenizer.decode([*x, *y]) for x, y in zip(prompts, completions, strict=True)]
        return torch.tensor([read(text) for text in texts], dtype=torch.float32)

    return truth
