"""The grammar against the truth, every clause of it; the labels against Bradley-Terry's law; the draws."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import CAUGHT, plant

from dpo_minimal.laws.sampling_laws import chi_square_quantile, normal_quantile
from dpo_minimal.text import reviews
from dpo_minimal.text.reviews import comparisons, demonstrations, opinions, prompts, sentiment
from dpo_minimal.validation import InputError

# Chance that a right program fails one sampling test; the seeds are fixed, so it never does.
FALSE_ALARM = 1e-6
ROUNDING = 1e-12  # of sums of a few values of size 1; the smallest difference of two rewards is above 0.01

TERMS = sorted(reviews.VALUES | reviews.DEGREES | reviews.NEGATIONS)
word_soup = st.lists(
    st.sampled_from([*TERMS, "the", "film", "is", "but", "and", ".", ",", "undull", "\n"]), max_size=12
).map(" ".join)


def every(form, *arguments) -> Iterator:
    """All that a function can make whose choices come from `pick`: the choices are counted through like the
    wheels of a mileometer, the last one fastest."""
    path: list[int] = []
    while True:
        sizes: list[int] = []

        def pick(items, sizes=sizes):
            sizes.append(len(items))
            if len(sizes) > len(path):
                path.append(0)
            return items[path[len(sizes) - 1]]

        yield form(pick, *arguments)
        while path and path[-1] + 1 == sizes[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


@pytest.fixture(scope="module")
def reviewed() -> list[tuple[dict[str, str], float]]:
    """20,000 demonstrations, each with its reward."""
    return [(row, sentiment(row["completion"])) for row in demonstrations(20_000, seed=0)]


def test_every_yields_everything_once():
    made = list(every(lambda pick: (first := pick("abc")) + (pick("xy") if first == "b" else "")))
    assert made == ["a", "bx", "by", "c"]


# -------------------------------------------------------------------------------- the grammar and the truth


def test_every_clause_means_what_the_grammar_says():
    """Exhaustive: thousands of clauses; the truth, which sees only text, finds that value and no other."""
    seen = set()
    for form in (reviews.verb_phrase, reviews.remark):
        for sign in (1, -1, 0):
            for clause in every(form, sign):
                assert (clause.value > 0) - (clause.value < 0) == sign, clause
                assert abs(sentiment(clause.text) - clause.value) <= ROUNDING, clause
                assert len(opinions(clause.text)) == abs(sign) and abs(clause.value) <= 3, clause
                seen.add(clause.text)
    assert len(seen) > 5000
    assert {"there is not a dull moment", "is an utterly awful debut", "I never liked the plot"} <= seen


def test_every_prompt_is_neutral_and_short():
    made = set(every(reviews._prompt))
    assert len(made) > 1000
    for prompt in made:
        assert 3 <= len(prompt.split()) <= 10 and prompt[0].isupper() and not opinions(prompt), prompt
        assert sentiment(f"{prompt} good") == sentiment("good"), prompt  # and turns nothing that follows


def test_whole_reviews_mean_what_the_grammar_says():
    """The mean over clauses, whatever joins them; and the prompt in front changes nothing."""
    pick = reviews.picker("test", 1, 0)
    for _ in range(3000):
        prompt = reviews._prompt(pick)
        text, reward = reviews.completion(pick, prompt)
        assert abs(sentiment(text) - reward) <= ROUNDING, text
        assert abs(sentiment(prompt + text) - reward) <= ROUNDING, prompt + text
        assert 8 <= len(text.split()) <= 30 and text[0] == " " and text[-1] == ".", text
        assert text[1].isupper() == (prompt[-1] in ".:"), prompt + text


def test_english_is_tidy():
    """Articles, spaces and capitals, on thousands of draws."""
    for row in demonstrations(3000, seed=5):
        text = row["prompt"] + row["completion"]
        words = text.lower().replace(".", "").replace(",", "").split()
        for article, word in pairwise(words):
            assert article != "a" or word[0] not in "aeiou", text
            assert article != "an" or word[0] in "aeiou", text
            assert article != word, text
        assert "  " not in text and " ." not in text and " i " not in text
        assert all(sentence[0].isupper() for sentence in text.rstrip(".").split(". ")), text


def test_negations_are_heard():
    assert sentiment("It is not dull.") > 0 > sentiment("It is not moving.")
    assert sentiment("not one of the jokes is good") == -sentiment("good")
    assert sentiment("It is not new, and the plot is moving.") == sentiment("moving")  # reach ends at ", and"
    assert sentiment("not dull but moving") == (sentiment("not dull") + sentiment("moving")) / 2
    assert sentiment("hardly moving and dull") == (sentiment("hardly moving") + sentiment("dull")) / 2
    assert sentiment("a dullard, unmoving") == 0  # words, not letters
    assert sentiment("It never wastes a good cast!") > 0 < sentiment("NEVER\n DULL")


def test_word_counts_cannot_tell_the_sign(reviewed):
    """Reviews of the grammar with exactly the same words and opposite rewards: whatever value a table gives
    to each word, it gives both the same. And the obvious table, of the words' own values, is often wrong."""
    bags = defaultdict(set)
    wrong = 0
    for row, reward in reviewed:
        words = row["completion"].lower().replace(".", "").replace(",", "").split()
        bags[tuple(sorted(words))].add(reward)
        wrong += reward * sum(reviews.VALUES.get(word, 0) for word in words) < 0
    assert any(max(rewards) > 1 and min(rewards) < -1 for rewards in bags.values())
    assert wrong > 2000  # one in ten has the opposite sign


@given(st.text(max_size=80) | word_soup)
def test_any_text_has_a_bounded_reward_that_repetition_does_not_raise(text):
    reward = sentiment(text)
    assert abs(reward) <= 3
    assert sentiment(". ".join([text] * 5)) == reward
    best = max(opinions(text).values(), default=0.0)
    assert reward <= best + ROUNDING and (opinions(text) or reward == 0)


@given(word_soup, st.sampled_from(sorted(reviews.VALUES)))
def test_length_earns_nothing(text, word):
    """One more opinion moves the mean towards its own value, never beyond."""
    before, after = sentiment(text), sentiment(f"{text} . {word}")
    low, high = sorted((before if opinions(text) else reviews.VALUES[word], reviews.VALUES[word]))
    assert low - ROUNDING <= after <= high + ROUNDING


# ------------------------------------------------------------------------------------------------ the labels


def test_labels_follow_bradley_terry():
    """Pairs in five groups by difference in reward: how often the better one was chosen, against sigmoid.

    Given the pairs, the choices are independent coins, so the squared standardised counts add up to a
    chi-square with five degrees of freedom (the normal limit: each group has hundreds of pairs).
    """
    rows = comparisons(6000, seed=3)
    differences = torch.tensor([sentiment(row["chosen"]) - sentiment(row["rejected"]) for row in rows])
    chances = torch.sigmoid(differences.abs().double())
    groups = torch.bucketize(differences.abs(), torch.tensor([0.7, 1.5, 2.5, 3.5]))
    statistic = 0.0
    for group in range(5):
        inside = (groups == group) & (differences != 0)
        assert inside.sum() > 500  # enough for the normal limit
        surplus = (differences[inside] > 0).sum() - chances[inside].sum()
        statistic += (surplus**2 / (chances * (1 - chances))[inside].sum()).item()
    assert statistic <= chi_square_quantile(1 - FALSE_ALARM, 5)
    agreement = (differences > 0).sum() / (differences != 0).sum()
    assert 0.79 < agreement < 0.84, agreement  # what the docstring calls one wrong label in five


def test_both_sides_are_draws_of_the_grammar():
    """Chosen and rejected together are distributed as the demonstrations: the same mean reward (two-sample
    z-test of independent rows; the two of a pair are independent given the prompt, which tells nothing)."""
    pairs = comparisons(4000, seed=4)
    both = torch.tensor([sentiment(row[side]) for row in pairs for side in ("chosen", "rejected")])
    single = torch.tensor([sentiment(row["completion"]) for row in demonstrations(4000, seed=4)])
    z = (both.mean() - single.mean()) / (both.var() / len(both) + single.var() / len(single)).sqrt()
    assert abs(z) <= normal_quantile(1 - FALSE_ALARM / 2)
    assert all(row["chosen"] != row["rejected"] for row in pairs)


# ------------------------------------------------------------------------------------------------- the draws


def test_prompts_have_one_distribution():
    """All three functions: each genre alike, each template alike (chi-square of independent draws)."""
    for name, drawn in {
        "prompts": prompts(6000, seed=1),
        "demonstrations": [row["prompt"] for row in demonstrations(6000, seed=1)],
        "comparisons": [row["prompt"] for row in comparisons(6000, seed=1)],
    }.items():
        genres = Counter(genre for prompt in drawn for genre in reviews.GENRES if f" {genre}" in prompt)
        sentences = sum(prompt[-1] in ".:" for prompt in drawn)  # half of the templates
        assert sum(genres.values()) == 6000 and len(genres) == len(reviews.GENRES)
        statistic = sum((count - 600) ** 2 / 600 for count in genres.values())
        assert statistic <= chi_square_quantile(1 - FALSE_ALARM, len(reviews.GENRES) - 1), name
        assert abs(sentences - 3000) <= normal_quantile(1 - FALSE_ALARM / 2) * 1500**0.5, name


@pytest.mark.parametrize("draw", [prompts, demonstrations, comparisons])
def test_seed_decides(draw):
    rows = draw(50, seed=7)
    assert draw(50, seed=7) == rows
    assert draw(50, seed=8) != rows
    assert draw(20, seed=7) == rows[:20] or draw is comparisons  # whose labels are drawn all at once


def test_streams_are_apart():
    """The prompts that a policy is judged on are not those it was trained on, though the seed be the same."""
    firsts = [
        [prompts(1, seed=seed)[0] for seed in range(20)],
        [demonstrations(1, seed=seed)[0]["prompt"] for seed in range(20)],
        [comparisons(1, seed=seed)[0]["prompt"] for seed in range(20)],
    ]
    assert firsts[0] != firsts[1] != firsts[2] != firsts[0]


def test_variety(reviewed):
    """20,000 reviews: hardly two alike; half of the rest are praise; no prompt is favoured."""
    rows, rewards = zip(*reviewed)
    completions = Counter(row["completion"] for row in rows)
    assert len(completions) > 16_000 and completions.most_common(1)[0][1] < 40
    assert len({row["prompt"] for row in rows}) > 1500
    rewards = torch.tensor(rewards)
    assert 0.4 < (rewards > 0).float().mean() < 0.48 and 0.4 < (rewards < 0).float().mean() < 0.48
    assert abs(rewards.mean()) < 0.1 and 1.5 < rewards.std() < 1.9


@pytest.mark.parametrize("draw", [prompts, demonstrations, comparisons])
@pytest.mark.parametrize(
    "count, seed, named",
    [(0, 0, "count"), (True, 0, "count"), (3, -1, "seed"), (3, 2**60, "seed"), (3, 0.5, "seed")],
)
def test_bad_arguments_are_refused(draw, count, seed, named):
    with pytest.raises(InputError) as caught:
        draw(count, seed=seed)
    message = str(caught.value)
    assert message.startswith(named) and message.endswith(".") and ". " not in message


# ------------------------------------------------------------------------------------------------- mutants

CLAUSES, HEARD = test_every_clause_means_what_the_grammar_says, test_negations_are_heard
MUTANTS = {
    "labels the wrong way round": (comparisons, "uniform <", "uniform >", test_labels_follow_bradley_terry),
    "the better one always chosen": (
        comparisons, "bradley_terry(*rewards.unbind(-1))",
        "(rewards[:, 0] > rewards[:, 1]).double()", test_labels_follow_bradley_terry,
    ),
    "negation not heard": (opinions, "NEGATIONS.get(negation, 1.0)", "1.0", HEARD),
    "negation reaches beyond its clause": (
        opinions, "term not in DEGREES and term not in NEGATIONS", "term in VALUES", HEARD,
    ),
    "a sum instead of a mean": (sentiment, "max(len(values), 1)", "1", test_length_earns_nothing),
    "each mention counts": (
        opinions, "found[_join(negation, degree, term)]", "found[str(len(found))]",
        test_any_text_has_a_bounded_reward_that_repetition_does_not_raise,
    ),
    "the grammar forgets that a negation turns": (
        reviews._opinion, "value * factor * sign", "value * sign", CLAUSES,
    ),
    "facts counted as opinions": (
        reviews.completion, "if clause.value]", "]", test_whole_reviews_mean_what_the_grammar_says,
    ),
    "a awful debut": (reviews._article, '"an" if words[0] in "aeiou" else "a"', '"a"', test_english_is_tidy),
    "one stream for all": (reviews.picker, 'f"{stream} {seed}"', "seed", test_streams_are_apart),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
