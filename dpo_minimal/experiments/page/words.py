"""The tokens of the page: a small GPT learns from comparisons of film reviews; what does each token of a pair
add to its margin?

It first reads reviews of one clause (SFT), then learns by DPO from pairs labelled as people would. Both take
a few seconds on one core, so its margins are rough.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...losses import dpo_loss
from ...model import GPT, GPTConfig
from ...policy import shared_prompt_logps
from ...preferences import bradley_terry
from ...text.batches import tokenize
from ...text.data import dataset_from_rows
from ...text.examples import Example
from ...text.objectives import layout, sft_objective
from ...text.reviews import picker, sentiment, verb_phrase
from ...text.tokenizer import Tokenizer, make_tokenizer
from ...train import make_optimizer, train
from ..text.pair_scores import SIDES, score_pairs
from .frames import PROMPT, Frame

REVIEWS, PAIRS, VOCABULARY = 1500, 2500, 768  # the vocabulary, at most: then nearly every word is one token
SHAPE = {"block_size": 32, "n_layer": 1, "n_head": 4, "n_embd": 32}
ROWS, SFT_RATE, DPO_RATE = 64, 8e-3, 6e-3  # of a batch; of Adam, falling to zero
STEPS, EVERY = 120, 6  # of each training; and steps of DPO between two frames
SIGNS = (-1, -1, 0, 1, 1)  # of what is written: complaints, facts, praise
SHOWN = (  # better and worse; the same words in another order, or turned round by a negation
    ("is never dull", "is dull"),
    ("is never dull", "is never brilliant"),
    ("could not be better", "could not be worse"),
    ("makes two hours feel like ten minutes", "makes ten minutes feel like two hours"),
    ("is anything but boring", "is a rather boring film"),
    ("runs for two hours", "is a dreadful debut"),
)


def reviews(count: int, *, stream: str, seed: int) -> list[str]:
    """Completions of one clause, each sign as often as `SIGNS` has it."""
    pick = picker(f"page {stream}", count, seed)
    return [f" {verb_phrase(pick, pick(SIGNS)).text}." for _ in range(count)]


def labelled_pairs(count: int, *, seed: int) -> list[tuple[str, str]]:
    """(chosen, rejected) of two different reviews: the first drawn is chosen with probability
    sigmoid(difference in sentiment) (Eq. 1) [D2.1]."""
    drawn = [reviews(count, stream=stream, seed=seed) for stream in ("first", "second")]
    rewards = [torch.tensor(list(map(sentiment, texts)), dtype=torch.float64) for texts in drawn]
    noise = torch.Generator().manual_seed(seed)
    first_wins = torch.rand(count, dtype=torch.float64, generator=noise) < bradley_terry(*rewards)
    return [(a, b) if wins else (b, a) for a, b, wins in zip(*drawn, first_wins) if a != b]


def as_examples(rows: list[tuple[str, ...]], tokenizer: Tokenizer) -> list[Example]:
    """Texts as token ids, read as sft and dpo read them: pairs, or single completions."""
    pairs = len(rows[0]) == 2
    kind, names = ("preferences", SIDES) if pairs else ("demonstrations", ("completion",))
    data = dataset_from_rows([{"prompt": PROMPT, **dict(zip(names, row))} for row in rows], "reviews", kind)
    return list(tokenize(data, tokenizer, max_length=SHAPE["block_size"])[0])


def trained(
    model: GPT, loss: Callable[[list[int]], Tensor], rows: int, *, rate: float, steps: int, seed: int
) -> Iterator[int]:
    """Minimise a mean loss of batches of row numbers, drawn independently; yields 0 and each step."""
    draws = torch.randint(rows, (steps, ROWS), generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = make_optimizer(model.parameters(), "adamw", rate)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    yield 0
    objective = lambda batch: (loss(batch), {})  # noqa: E731
    for record in train(objective, optimizer, draws, scheduler=falling, max_grad_norm=1.0):
        yield int(record["step"])


as_batch = partial(layout, dtype="float32", device="cpu")


def fine_tuned(texts: list[str], tokenizer: Tokenizer, *, steps: int, seed: int) -> GPT:
    """A GPT that writes such reviews."""
    examples = as_examples([(text,) for text in texts], tokenizer)
    with torch.random.fork_rng(devices=[]):  # GPT draws its weights from torch's global stream
        torch.manual_seed(seed)
        model = GPT(GPTConfig(tokenizer.vocab_size, **SHAPE))
    objective = sft_objective(model, dtype="float32")
    loss = lambda rows: objective(as_batch([examples[k] for k in rows]))[0]  # noqa: E731
    for _ in trained(model, loss, len(examples), rate=SFT_RATE, steps=steps, seed=seed):
        pass
    return model


def word_frames(beta: float, seed: int, *, steps: int = STEPS) -> Frame:
    """The pairs shown, and what each token adds to their margins during DPO (Eq. 7) [D9.1, D9.3].

    A token adds beta log(pi / pi_ref) of it after all before it, with a minus in the rejected completion; all
    together are the margin. Returns the `steps`, and for each pair its tokens, its true difference of rewards
    (`gap`), and a frame a step: margin, weight, parts of [chosen, rejected] tokens and their sums.
    """
    texts = reviews(REVIEWS, stream="reviews", seed=seed)
    tokenizer = make_tokenizer("bpe", [PROMPT + text for text in texts], VOCABULARY, at_most=True)
    reference = fine_tuned(texts, tokenizer, steps=steps, seed=seed)
    pairs = as_examples(labelled_pairs(PAIRS, seed=seed), tokenizer)
    shown = as_examples([(f" {better}.", f" {worse}.") for better, worse in SHOWN], tokenizer)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        ref_logps = shared_prompt_logps(reference, as_batch(pairs))

    def loss(rows: list[int]) -> Tensor:
        logps = shared_prompt_logps(policy, as_batch([pairs[k] for k in rows]))
        return dpo_loss(*logps.unbind(-1), *ref_logps[rows].unbind(-1), beta=beta).losses.mean()

    result = [
        {side: [tokenizer.token_text(token) for token in ids] for side, ids in zip(SIDES, pair.completions)}
        | {"gap": sentiment(better) - sentiment(worse), "frames": []}
        for (better, worse), pair in zip(SHOWN, shown)
    ]
    for step in trained(policy, loss, len(pairs), rate=DPO_RATE, steps=steps, seed=seed):
        if step % EVERY == 0:
            scores = score_pairs(policy, reference, shown, beta=beta, device="cpu")
            columns = scores.margins.tolist(), scores.results.gradient_weights.tolist()
            for number, (margin, weight) in enumerate(zip(*columns)):
                parts = [part.tolist() for part in scores.contributions(number)]
                frame = {"margin": margin, "weight": weight, "parts": parts, "sums": list(map(sum, parts))}
                result[number]["frames"].append(frame)
    return {"steps": list(range(0, steps + 1, EVERY)), "pairs": result}
