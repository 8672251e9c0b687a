"""The page to play with: its numbers another way, the file, what it refuses; and in a browser, where there is
selenium with Chromium, what it shows after each key."""

import json
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from planting import CAUGHT, plant

from dpo_minimal.__main__ import main
from dpo_minimal.experiments.page import command, frames, words
from dpo_minimal.experiments.text.pair_scores import PairScores, score_pairs
from dpo_minimal.preferences import bradley_terry
from dpo_minimal.text.reviews import sentiment
from notebooks.syllabus import sections

BETA, SEED = 0.7, 2  # none of the command's defaults
ROOT = Path(__file__).parent.parent
EXACT = 1e-11  # float64: some tens of roundings of numbers up to 50


@pytest.fixture(scope="module")
def shown() -> dict:
    """The frames of a world of its own."""
    return frames.world_frames(BETA, SEED)


def tables(shown) -> tuple[np.ndarray, np.ndarray]:
    """Reference probabilities and rewards as the page has them, (8,)."""
    return tuple(np.array([c[name] for c in shown["completions"]]) for name in ("ref", "reward"))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


# ------------------------------------------------------------------------------ the numbers, another way


def test_the_world_is_of_reviews_that_fit_and_differ(shown):
    """Rewards are the sentiment of the texts, the most first; only facts tie."""
    ref, rewards = tables(shown)
    texts = [c["text"] for c in shown["completions"]]
    assert rewards.tolist() == sorted(map(sentiment, texts), reverse=True) == list(map(sentiment, texts))
    assert len({*texts}) == 8 and max(map(len, texts)) <= frames.LONGEST
    assert sum(rewards > 0) == 3 == sum(rewards < 0) and len({*rewards.tolist()}) == 7
    assert ref.sum() == pytest.approx(1, abs=EXACT)


def test_the_optimum_by_hand(shown):
    """Eq. 4 in numpy, its divergence, its reward, its ceiling; the training's beta is one of the slider's."""
    ref, rewards = tables(shown)
    for frame in shown["optimum"]:
        tilted = ref * np.exp(rewards / frame["beta"])
        star = tilted / tilted.sum()
        assert frame["probs"] == pytest.approx(star.tolist(), abs=EXACT)
        assert frame["kl"] == pytest.approx(kl(star, ref), abs=EXACT)
        assert frame["reward"] == pytest.approx(star @ rewards, abs=EXACT)
        assert frame["value"] == pytest.approx(frame["beta"] * math.log(tilted.sum()), abs=EXACT)
    betas = [frame["beta"] for frame in shown["optimum"]]
    assert betas == sorted(betas) and (betas[0], betas[-1]) == (1 / 16, 32) and BETA in betas
    assert shown["target"] == shown["optimum"][betas.index(BETA)]["probs"]


def test_the_ends_of_the_slider_show_what_the_page_says():
    """In the command's own world: nearly all on the best completion, nearly the reference, and in between
    another completion is the most likely."""
    world = frames.page_world(command.OPTIONS["options"]["seed"].default)
    optimum = frames.optimum_frames(world, frames.BETAS)
    modes = [np.argmax(frame["probs"]) for frame in optimum]
    first, *_, last = optimum
    assert first["probs"][0] > 0.99 and modes[0] == 0  # the most reward stands first
    assert np.abs(np.array(last["probs"]) - world.ref_logps[0].exp().numpy()).max() < 0.03
    assert len({*modes}) >= 3


def path_by_hand(ref: np.ndarray, rewards: np.ndarray) -> dict[int, np.ndarray]:
    """Gradient descent on the logits by the formula of the gradient (Eq. 22): {step: probabilities}.

    Each completion is in 7 of the 28 pairs, a quarter of the weight, so the safe step is 8 / beta^2.
    """
    theta, rate = np.log(ref), 8 / BETA**2 / frames.SLOWNESS
    found = {0: ref}
    for step in range(1, frames.STEPS[-1] + 1):
        u = BETA * (theta - np.log(ref))
        u, r = u[:, None] - u, rewards[:, None] - rewards
        pull = BETA * sigmoid(r) * sigmoid(-u)  # of the label "the row is better"
        theta = theta + rate * (pull - pull.T).sum(1) / 28
        found[step] = np.exp(theta) / np.exp(theta).sum()
    return found


def test_the_training_by_hand(shown):
    """The policies of every frame, their error, margins, weights and pulls."""
    ref, rewards = tables(shown)
    path, star = path_by_hand(ref, rewards), np.array(shown["target"])
    items = np.array([pair["items"] for pair in shown["pairs"]])
    assert items.tolist() == [[i, j] for i in range(8) for j in range(i + 1, 8)]
    chances = sigmoid(rewards[items[:, 0]] - rewards[items[:, 1]])
    assert [pair["chance"] for pair in shown["pairs"]] == pytest.approx(chances.tolist(), abs=EXACT)
    assert [frame["step"] for frame in shown["training"]] == frames.STEPS
    for frame in shown["training"]:
        probs = path[frame["step"]]
        # A thousand steps each add their rounding, and the path draws together.
        assert frame["probs"] == pytest.approx(probs.tolist(), abs=1e-10)
        scores = BETA * np.log(np.array(frame["probs"]) / ref)
        u = scores[items[:, 0]] - scores[items[:, 1]]
        weights = BETA * np.stack([sigmoid(-u), sigmoid(u)], 1)
        assert frame["margins"] == pytest.approx(u.tolist(), abs=EXACT)
        assert np.abs(np.array(frame["weights"]) - weights).max() < EXACT
        pulls = weights * np.stack([chances, 1 - chances], 1)
        assert np.abs(np.array(frame["pulls"]) - pulls).max() < EXACT
        assert frame["distance"] == pytest.approx(np.abs(np.log(frame["probs"] / star)).max(), abs=1e-10)
        assert frame["kl"] == pytest.approx(kl(frame["probs"], ref), abs=EXACT)


def test_the_bound_is_issued_and_holds(shown):
    """Not at the reference, from some step on always, and never below the error; it ends small. It is issued
    for x <= 1/2, where the first of the certificate's two bounds is log 2 / beta."""
    bounds = [frame["bound"] for frame in shown["training"]]
    assert bounds[0] is None and bounds[-1] < 0.01
    assert None not in bounds[next(k for k, bound in enumerate(bounds) if bound) :]
    for frame in shown["training"]:
        assert frame["bound"] is None or frame["distance"] <= frame["bound"] <= math.log(2) / BETA + EXACT


def test_the_pulls_of_a_pair_balance_at_the_end(shown):
    """P w(u) - (1 - P) w(-u) = beta (P - sigma(u)), of slope beta / 4 in u at most, and u is within 2 beta
    times the distance."""
    last = shown["training"][-1]
    apart = np.abs(np.diff(last["pulls"], axis=1)).max()
    assert apart <= BETA / 4 * 2 * BETA * last["distance"] + EXACT
    assert np.abs(np.diff(shown["training"][0]["pulls"], axis=1)).max() > 100 * apart


def test_nothing_is_above_a_ceiling(shown):
    """Neither other policies nor best of n, whose reward is that of the best order statistic."""
    places = [*shown["policies"], *shown["best_of_n"], *shown["training"], *shown["optimum"]]
    for line in shown["optimum"]:
        for place in places:
            assert place["reward"] <= line["value"] + line["beta"] * place["kl"] + EXACT
    ref, rewards = tables(shown)
    for place in shown["best_of_n"]:
        at_most = {v: ref[rewards <= v].sum() ** place["n"] for v in (-9.0, *sorted({*rewards.tolist()}))}
        expected = sum(v * (p - q) for (_, q), (v, p) in zip(at_most.items(), [*at_most.items()][1:]))
        assert place["reward"] == pytest.approx(expected, abs=EXACT)
    assert len({round(place["reward"], 6) for place in shown["policies"]}) == frames.RANDOM_POLICIES


# ------------------------------------------------------------------------------------------------ tokens


@pytest.fixture(scope="module")
def spoken() -> tuple[dict, list[PairScores], list]:
    """A short training on few rows: its frames, what they were made of, and copies of the models."""
    made, models = [], []

    def kept(policy, reference, *rest, **options):
        made.append(score_pairs(policy, reference, *rest, **options))
        models.append([{k: v.clone() for k, v in m.state_dict().items()} for m in (policy, reference)])
        kept.gpt = policy
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "REVIEWS", 150)
        patch.setattr(words, "PAIRS", 150)
        patch.setattr(words, "score_pairs", kept)
        found = words.word_frames(BETA, SEED, steps=12)
    return found, made, [kept.gpt, *models]


def test_the_parts_of_the_tokens_sum_to_the_margin(spoken):
    """Parts to sums, sums to the margin, and the weight is the margin's; all zero before the first step."""
    found, *_ = spoken
    assert found["steps"] == [0, 6, 12]
    for pair, (better, worse) in zip(found["pairs"], words.SHOWN, strict=True):
        for side, text in (("chosen", better), ("rejected", worse)):
            assert "".join(pair[side]) == f" {text}.<|endoftext|>"
        assert pair["gap"] == sentiment(better) - sentiment(worse) > 0
        for frame in pair["frames"]:
            assert list(map(len, frame["parts"])) == [len(pair["chosen"]), len(pair["rejected"])]
            assert frame["sums"] == pytest.approx([sum(part) for part in frame["parts"]], abs=EXACT)
            assert sum(frame["sums"]) == pytest.approx(frame["margin"], abs=EXACT)
            assert frame["weight"] == pytest.approx(BETA * sigmoid(-frame["margin"]), abs=EXACT)
        start, *_, end = pair["frames"]
        assert {*map(abs, start["parts"][0] + start["parts"][1])} == {0.0}
        assert abs(end["margin"]) > 0.01


def test_the_parts_are_those_of_the_model_alone(spoken):
    """Each token's part from the logits of one sequence by itself, without prompt sharing or padding."""
    found, made, (gpt, *models) = spoken
    for number, (policy, reference) in enumerate(models):
        for pair, example in zip(found["pairs"], made[number].examples):
            for side, sign in ((0, 1), (1, -1)):
                ids, start = torch.tensor([example.prompt + example.completions[side]]), len(example.prompt)
                logps = []
                for state in (policy, reference):
                    gpt.load_state_dict(state)
                    with torch.no_grad():
                        table = gpt(ids[:, :-1]).double().log_softmax(-1)
                    logps.append(table[0, range(start - 1, ids.shape[1] - 1), ids[0, start:]])
                parts = sign * BETA * (logps[0] - logps[1])
                # float32: sums of 32 products, logits up to 20, so some 1e-5
                assert pair["frames"][number]["parts"][side] == pytest.approx(parts.tolist(), abs=1e-4)


def test_labels_are_bradley_terrys():
    """As many better ones are chosen as the mean of sigmoid(|difference|), within 6 standard deviations."""
    pairs = words.labelled_pairs(4000, seed=SEED)
    gaps = torch.tensor([sentiment(a) - sentiment(b) for a, b in pairs], dtype=torch.float64)
    gaps = gaps[gaps != 0]
    chance = bradley_terry(gaps.abs(), torch.zeros_like(gaps))
    spread = (chance * (1 - chance)).sum().sqrt()
    assert abs((gaps > 0).sum() - chance.sum()) < 6 * spread
    assert all(a != b for a, b in pairs)


# ------------------------------------------------------------------------------------------------ the file


@pytest.fixture
def quick(monkeypatch, shown, spoken, tmp_path):
    """The command with frames that are there already, in a folder of its own."""
    monkeypatch.setattr(command, "world_frames", lambda beta, seed: shown | {"seed": seed})
    monkeypatch.setattr(command, "word_frames", lambda *_: spoken[0])
    monkeypatch.chdir(tmp_path)


def embedded(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="frames">(.*?)</script>', text, re.S)[1])


def test_the_file_holds_its_frames_and_loads_nothing(quick, shown, capsys):
    """Six digits of every number, below 3 MB, no address, and a policy that forbids to load anything."""
    assert main(["page"]) == 0
    out = capsys.readouterr().out
    text = Path("page.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3e6 and Path("page.html").resolve().as_uri() in out
    assert not re.search(r"https?:|src=|@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert "default-src 'none'" in text and "{{" not in text
    found = embedded(text)
    assert found["optimum"][7]["kl"] == float(f"{shown['optimum'][7]['kl']:.6g}") != shown["optimum"][7]["kl"]
    assert found["training"][0]["bound"] is None
    assert [*found] == [*shown, "seed", "words"]


def test_a_text_cannot_end_the_script_that_holds_it(quick, monkeypatch, shown):
    named = [c | {"text": "</script><b>"} for c in shown["completions"]]
    monkeypatch.setattr(command, "world_frames", lambda *_: shown | {"completions": named})
    assert embedded(command.page(1.0, 0))["completions"][0]["text"] == "</script><b>"


def test_the_same_seed_gives_the_same_bytes(monkeypatch):
    """Another seed and another beta give others, of the world and of the tokens."""
    for name, value in (("REVIEWS", 60), ("PAIRS", 60), ("ROWS", 8)):
        monkeypatch.setattr(words, name, value)
    monkeypatch.setattr(words.word_frames, "__kwdefaults__", {"steps": 6})
    monkeypatch.setattr(frames, "STEPS", [0, 1, 2])
    one = command.page(1.0, 0)
    torch.rand(3)  # the global stream plays no part
    assert command.page(1.0, 0) == one
    for other in (command.page(1.0, 1), command.page(0.5, 0)):
        for part in ("training", "words"):
            assert embedded(other)[part] != embedded(one)[part]


def test_what_is_refused(quick, capsys):
    """One sentence that names place and remedy, before anything is computed; --force overwrites."""
    Path("there.html").write_text("mine")
    Path("folder").mkdir()
    for arguments, *told in (
        (["--output", "there.html"], "there.html: exists already", "--force"),
        (["--output", "nowhere/page.html"], "no folder nowhere", "make it"),
        (["--output", "folder"], "is a folder"),
        (["--output", "folder", "--force"], "is a folder"),
        (["--beta", "0.01"], "--beta must lie between 0.05 and 5.0"),
        (["--beta", "nan"], "--beta"),
        (["--seed", "-1"], "--seed"),
    ):
        assert main(["page", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.endswith(".\n") and all(t in err for t in told), err
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["folder", "there.html"]
    assert Path("there.html").read_text() == "mine"
    assert main(["page", "--output", "there.html", "--force"]) == 0
    assert embedded(Path("there.html").read_text(encoding="utf-8"))


def test_the_template_is_packaged_and_its_tags_lead_somewhere():
    """The wheel gets it, every [D...] is a section, and it keeps within its budget of lines."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["dpo_minimal.experiments.page"]
    assert command.TEMPLATE in [file for each in patterns for file in command.TEMPLATE.parent.glob(each)]
    text = command.TEMPLATE.read_text(encoding="utf-8")
    tags = re.findall(r"\[(D\d+\.\d+)\]", text)
    assert len(tags) >= 10 and {*tags} <= {*sections()}
    assert text.count("{{frames}}") == 1 and len(text.splitlines()) <= 450


# ---------------------------------------------------------------------------------------- planted mistakes

PLANTED = {
    "the reference forgotten": (
        frames.place_of, "world.ref_logps)", "0 * logps - math.log(8))", test_the_optimum_by_hand
    ),
    "beta log Z without its beta": (
        frames.optimum_frames, "soft_value(*tables, beta=beta)", "(soft_value(*tables, beta=beta) / beta)",
        test_the_optimum_by_hand,
    ),
    "second labels first": (
        frames.training_frames, "weights.view(labels)", "weights.view(labels).flip(0)",
        test_the_training_by_hand,
    ),
    "pull without the label's probability": (
        frames.training_frames, "chance * each", "0.5 * each", test_the_training_by_hand
    ),
    "another step": (frames.training_path, "/ SLOWNESS", "/ (SLOWNESS - 1)", test_the_training_by_hand),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    """Frames of the first steps pass their test, and those made with the mistake do not."""
    function, right, wrong, guard = PLANTED[mistake]
    monkeypatch.setattr(frames, "STEPS", [0, 1, 10])
    guard(frames.world_frames(BETA, SEED))
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard(frames.world_frames(BETA, SEED))


def test_planted_mistakes_of_tokens_are_caught(monkeypatch, spoken):
    """A forgotten minus of the rejected's tokens; the loser of each comparison taken for the winner."""
    scores = spoken[1][-1]
    parts = lambda: sum(part.sum() for part in scores.contributions(0)).item()  # noqa: E731
    assert parts() == pytest.approx(scores.margins[0].item(), abs=EXACT)
    plant(monkeypatch, PairScores.contributions, "rejected[1] - rejected[0]", "rejected[0] - rejected[1]")
    assert parts() != pytest.approx(scores.margins[0].item(), abs=EXACT)
    plant(monkeypatch, words.labelled_pairs, "if wins", "if not wins")
    with pytest.raises(CAUGHT):
        test_labels_are_bradley_terrys()
