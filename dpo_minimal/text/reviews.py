"""A grammar of short film reviews whose true sentiment is known: the data that come with the package.

A prompt is a neutral opening, a completion two or three clauses after it. A clause states a fact or one
opinion; an opinion is a word with a value (`VALUES`), scaled by a degree ("utterly", "rather") or turned by a
negation ("never", "far from"), or else a phrase that means something of its own ("could not be better").

The reward r of a text is the mean value of its different opinions, between -3 and 3, and 0 without any. Its
unit is that of Bradley-Terry: of two completions the first is chosen with probability sigmoid(r1 - r2), so
one more point turns even odds into e : 1. It is a mean, and an opinion said twice counts once, so that
neither a longer review nor a repeated word raises it.

    truth:  pick a prompt and completions  ->  their rewards  ->  Bradley-Terry labels  ->  DPO
    truth:  any text, also a broken sample  ->  `opinions`  ->  mean  ->  how positive a policy has become

But: the truth reads opinions, not grammar. "superb superb the" gets 2.5 like a good sentence; what keeps
a policy fluent is the KL penalty. There are 1,720 prompts, and for each some ten million completions of two
clauses and billions of three.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ..preferences import bradley_terry
from ..validation import check_count, check_seed

Pick = Callable[[Sequence[Any]], Any]  # chooses one of several: at random, or in a test each in turn

# ------------------------------------------------------------------------------------- words and values

ADJECTIVES = {
    "good": 1.5, "clever": 1.5, "charming": 1.5, "lively": 1.5, "warm": 1.5, "fresh": 1.5,
    "great": 2.5, "moving": 2.5, "brilliant": 2.5, "superb": 2.5, "wonderful": 2.5, "delightful": 2.5,
    "flat": -1.5, "slow": -1.5, "weak": -1.5, "silly": -1.5, "tired": -1.5, "clumsy": -1.5,
    "dull": -2.5, "awful": -2.5, "dreadful": -2.5, "tedious": -2.5, "boring": -2.5, "lifeless": -2.5,
}  # fmt: skip
VERBS = {"liked": 1.5, "enjoyed": 1.5, "loved": 2.5, "disliked": -1.5, "regretted": -1.5, "hated": -2.5}
DEGREES = {"truly": 1.2, "utterly": 1.2, "rather": 0.5}
NEGATIONS = {"not": -0.5, "never": -0.5, "hardly": -0.5, "far from": -0.5, "anything but": -1.0,
             "not one of": -1.0}  # fmt: skip
PHRASES = {  # said of a film or of a part of it; the words alone would mislead
    "could not be better": 2.5, "makes two hours feel like ten minutes": 2.5, "stays with you for days": 2.5,
    "never puts a foot wrong": 2.5, "leaves you wanting more": 1.5, "is hard to forget": 1.5,
    "could not be worse": -2.5, "makes ten minutes feel like two hours": -2.5, "wastes a good cast": -2.5,
    "never comes to life": -2.5, "leaves much to be desired": -1.5, "is hard to sit through": -1.5,
}  # fmt: skip
VALUES = ADJECTIVES | VERBS | PHRASES

# What stands before a word of opinion; an adjective is as often plain ("") as it has a degree or negation.
BEFORE_ADJECTIVES = (
    *("",) * 8, "truly", "utterly", "rather", "not", "never", "hardly", "far from", "anything but",
)  # fmt: skip
BEFORE_MOMENTS = ("truly", "utterly", "rather", "not", "never", "hardly")  # there is not a dull moment
BEFORE_VERBS = ("", "", "truly", "rather", "never")  # we never liked the music

# ------------------------------------------------------------------------------- words without opinion

GENRES = ("comedy", "drama", "thriller", "western", "mystery", "musical", "romance", "short film",
          "war film", "crime story")  # fmt: skip
ORIGINS = ("from Spain", "from Japan", "about two brothers", "about a lighthouse", "about a train ride",
           "set in Wales", "set by the sea", "by a young director", "by the same director",
           "with an unknown cast", "with songs", "based on a novel")  # fmt: skip
TIMES = ("last night", "on Monday", "last week", "in June", "at noon", "at home", "in Paris")
SUBJECTS = (  # a prompt that a verb follows
    "The new {genre} {origin}", "This {genre} {origin}", "The {genre} we saw {time}",
    "The {genre} I watched {time}", "The second {genre} {origin}",
)  # fmt: skip
OPENINGS = (  # a prompt that a sentence follows
    "We saw a {genre} {time}.", "I watched this {genre} {time}.", "Seen {time}: the {genre} {origin}.",
    "My notes on the {genre} {origin}:", "About the {genre} {origin}:",
)  # fmt: skip
WORKS = ("film", "story", "piece of work", "debut")
PARTS = ("the acting", "the plot", "the music", "the ending", "the script", "the dialogue", "the first half",
         "the camera work", "the leading man", "the last scene")  # fmt: skip
SEVERAL = ("scenes", "songs", "jokes", "actors", "ideas")
MOMENTS = ("moment", "scene", "line", "minute")
PEOPLE = ("I", "we", "my friends", "the critics")
FACTS = ("runs for two hours", "takes place on a train", "was shot in one summer", "has only four actors",
         "moves between two towns", "opens in the spring", "is told in three parts", "follows two sisters",
         "ends where it began", "was made for television")  # fmt: skip

# What a review consists of: the sign of each clause, 0 for a fact; each line is as likely as any other. Two
# in five reviews praise, two in five complain, the rest do both or neither.
PLANS = (
    (1, 1), (1, 1), (1, 1), (1, 0), (0, 1), (1, 1, 1), (1, 0, 1), (0, 1, 1),
    (-1, -1), (-1, -1), (-1, -1), (-1, 0), (0, -1), (-1, -1, -1), (-1, 0, -1), (0, -1, -1),
    (1, -1), (-1, 1), (0, 0), (0, 0),
)  # fmt: skip


# ------------------------------------------------------------------------------------------- the grammar


class Clause(NamedTuple):
    """A clause, what it says (the word or phrase of opinion, or the fact), and its value (0 for a fact)."""

    text: str
    said: str
    value: float


def verb_phrase(pick: Pick, sign: int) -> Clause:
    """What a film or a part of it is or does: "is never dull", "is a truly moving story".

    Args: pick chooses; sign is +1 for praise, -1 for complaint, 0 for a fact.
    """
    if sign == 0:
        fact = pick(FACTS)
        return Clause(fact, fact, 0.0)
    return pick((_is, _is, _is_work, _does))(pick, sign)


def remark(pick: Pick, sign: int) -> Clause:
    """A clause that stands alone: "the plot is never dull", "it opens in the spring"."""
    form = pick((_it, _part, _part, _there_is, _someone, _not_one)) if sign else _it
    return form(pick, sign)


def _opinion(table, before, pattern: str, pick: Pick, sign: int, **choices: Sequence[str]) -> Clause:
    """A clause that states an opinion of that sign.

    Args: table of words with values; before, what may precede the word; pattern, of the clause, in which
        {phrase} is the word with its degree or negation, {a_phrase} the same with its article, and any other
        name is drawn from its choices.
    """
    degree = pick(before)
    factor = (DEGREES | NEGATIONS).get(degree, 1.0)
    word = pick([word for word, value in table.items() if value * factor * sign > 0])
    phrases = {"word": word, "phrase": _join(degree, word), "a_phrase": _article(degree, word)}
    text = pattern.format(**phrases, **{name: pick(words) for name, words in choices.items()})
    return Clause(text, word, table[word] * factor)


def _it(pick: Pick, sign: int) -> Clause:
    clause = verb_phrase(pick, sign)
    return clause._replace(text=f"it {clause.text}")


def _part(pick: Pick, sign: int) -> Clause:
    clause = pick((_is, _is, _does))(pick, sign)
    return clause._replace(text=f"{pick(PARTS)} {clause.text}")


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _article(degree: str, word: str) -> str:
    """ "a dull", "an utterly dull", "never a dull": degrees follow the article, negations precede it."""
    negation, words = ("", _join(degree, word)) if degree not in NEGATIONS else (degree, word)
    return _join(negation, "an" if words[0] in "aeiou" else "a", words)


_is = partial(_opinion, ADJECTIVES, BEFORE_ADJECTIVES, "is {phrase}")
_is_work = partial(_opinion, ADJECTIVES, BEFORE_ADJECTIVES, "is {a_phrase} {work}", work=WORKS)
_does = partial(_opinion, PHRASES, ("",), "{phrase}")
_there_is = partial(_opinion, ADJECTIVES, BEFORE_MOMENTS, "there is {a_phrase} {moment}", moment=MOMENTS)
_someone = partial(_opinion, VERBS, BEFORE_VERBS, "{person} {phrase} {part}", person=PEOPLE, part=PARTS)
_not_one = partial(
    _opinion, ADJECTIVES, ("not one of",), "not one of the {several} is {word}", several=SEVERAL
)


def _prompt(pick: Pick) -> str:
    template = pick(SUBJECTS + OPENINGS)
    return template.format(genre=pick(GENRES), origin=pick(ORIGINS), time=pick(TIMES))


def completion(pick: Pick, prompt: str) -> tuple[str, float]:
    """A completion and its reward: 8 to 30 words that say nothing twice, with a space before the first."""
    first = remark if prompt[-1] in ".:" else verb_phrase
    while True:
        signs = pick(PLANS)
        clauses = [form(pick, sign) for form, sign in zip((first, remark, remark), signs)]
        text = _punctuate(pick, [clause.text for clause in clauses], signs, capital=first is remark)
        if 8 <= len(text.split()) <= 30 and len({clause.said for clause in clauses}) == len(clauses):
            values = [clause.value for clause in clauses if clause.value]
            return text, sum(values) / max(len(values), 1)


def _punctuate(pick: Pick, clauses: list[str], signs: Sequence[int], *, capital: bool) -> str:
    text = " " + (_capital(clauses[0]) if capital else clauses[0])
    if signs[0] * signs[1] < 0:
        text += f", but {clauses[1]}."
    else:
        text += pick((f", and {clauses[1]}.", f". {_capital(clauses[1])}."))
    return " ".join([text, *(f"{_capital(clause)}." for clause in clauses[2:])])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# --------------------------------------------------------------------------------------------- the truth

_MEANINGS = VALUES | DEGREES | NEGATIONS
# The longest phrase first; then borders of clauses, which end the reach of a degree or negation.
_TERMS = re.compile(
    "|".join(rf"\b{re.escape(term)}\b" for term in sorted(_MEANINGS, key=len, reverse=True))
    + r"|\b(?:but|and)\b|[.,;:!?]"
)


def opinions(text: str) -> dict[str, float]:
    """The different opinions that a text states, with their values.

    Read from left to right: a word of opinion has its value times the factors of the last degree and the last
    negation since the last opinion or border of a clause ("and", "but", or a punctuation mark).

    Example:
        >>> opinions("The plot is hardly moving, but there is not a dull moment. An utterly superb film!")
        {'hardly moving': -1.25, 'not dull': 1.25, 'utterly superb': 3.0}
        >>> opinions("The script wastes a good cast.")
        {'wastes a good cast': -2.5}
    """
    found: dict[str, float] = {}
    degree = negation = ""
    for match in _TERMS.finditer(" ".join(text.lower().split())):
        term = match.group()
        if term in VALUES:
            value = VALUES[term] * DEGREES.get(degree, 1.0) * NEGATIONS.get(negation, 1.0)
            found[_join(negation, degree, term)] = value
        degree = term if term in DEGREES else degree
        negation = term if term in NEGATIONS else negation
        if term not in DEGREES and term not in NEGATIONS:
            degree = negation = ""
    return found


def sentiment(text: str) -> float:
    """The true reward of any text: the mean of its different opinions, in [-3, 3]; 0 where it has none.

    Example:
        >>> sentiment(" is never dull, and the plot is moving.")       # the same words as in the next,
        1.875
        >>> sentiment(" is never moving, and the plot is dull.")       # so no count of words can tell
        -1.875
        >>> sentiment("great"), sentiment("great great great"), sentiment("great great dull")
        (2.5, 2.5, 0.0)
    """
    values = opinions(text).values()
    return sum(values) / max(len(values), 1)


# ------------------------------------------------------------------------------------------ the data sets


def prompts(count: int, *, seed: int) -> list[str]:
    """Openings of 3 to 10 words, independent draws, as in the other two functions.

    Raises: InputError: count or seed out of range.

    Example:
        >>> prompts(2, seed=0)
        ['This crime story about a lighthouse', 'This short film by the same director']
    """
    pick = picker("prompts", count, seed)
    return [_prompt(pick) for _ in range(count)]


def demonstrations(count: int, *, seed: int) -> list[dict[str, str]]:
    """Reviews to learn the language from, of every sentiment: rows with "prompt" and "completion".

    Raises: InputError: count or seed out of range.

    Example:
        >>> row = demonstrations(1, seed=0)[0]
        >>> row["prompt"] + row["completion"]
        'The second war film based on a novel is fresh, but we never enjoyed the music.'
    """
    pick = picker("demonstrations", count, seed)
    openings = (_prompt(pick) for _ in range(count))
    return [{"prompt": prompt, "completion": completion(pick, prompt)[0]} for prompt in openings]


def comparisons(count: int, *, seed: int) -> list[dict[str, str]]:
    """Preferences: two different draws of the grammar for one prompt, labelled by Bradley-Terry (Eq. 1).

    The better one is chosen with probability sigmoid(difference in reward), so about one label in five is
    the wrong way round, as it is with people; equal rewards get a fair coin.

    Returns: rows with "prompt", "chosen" and "rejected".
    Raises: InputError: count or seed out of range.

    Example:
        >>> row = comparisons(1, seed=1)[0]
        >>> row["prompt"]
        'The new crime story set by the sea'
        >>> row["chosen"], round(sentiment(row["chosen"]), 2)
        (' is an utterly clever film. My friends liked the script.', 1.65)
        >>> row["rejected"], round(sentiment(row["rejected"]), 2)
        (' opens in the spring, and I never loved the plot.', -1.25)
    """
    pick = picker("comparisons", count, seed)
    drawn = []
    for _ in range(count):
        prompt = _prompt(pick)
        first = second = completion(pick, prompt)
        while second[0] == first[0]:
            second = completion(pick, prompt)
        drawn.append((prompt, first, second))
    rewards = torch.tensor([(first[1], second[1]) for _, first, second in drawn], dtype=torch.float64)
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    first_wins = uniform < bradley_terry(*rewards.unbind(-1))
    rows = []
    for (prompt, first, second), wins in zip(drawn, first_wins):
        chosen, rejected = (first, second) if wins else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen[0], "rejected": rejected[0]})
    return rows


def picker(stream: str, count: int, seed: int) -> Pick:
    """Random choices that depend on stream and seed alone; `random()` is the same in every Python version."""
    check_count("count", count)
    check_seed("seed", seed)
    uniform = random.Random(f"{stream} {seed}").random
    return lambda items: items[int(uniform() * len(items))]
