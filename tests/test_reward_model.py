"""The reward model: its numbers against plain sequences, what it learns, and which weights it keeps."""

import math

import pytest
import torch
from planting import CAUGHT, plant
from test_policy import SMALL, gradients, loud

from dpo_minimal.model import GPT, GPTConfig
from dpo_minimal.policy import enumerate_completions, shared_prompt_batch, tree_states, whole_completions
from dpo_minimal.rivals import reward_model
from dpo_minimal.rivals.reward_model import (
    RewardModel,
    fit_reward_model,
    normalised_reward,
    reward_model_objective,
    score_completions,
)
from dpo_minimal.text.batches import Example
from dpo_minimal.train import average
from dpo_minimal.validation import InputError

ASKED = [[0, 3], [1], [3, 1, 0]]
PAIRS = [[[1, 2], [0, 0, 1, 2]], [[3, 3, 2], [2]], [[0, 1, 3, 2], [3, 2]]]


def loud_model(seed: int = 0) -> RewardModel:
    model = RewardModel(loud(GPT(SMALL), seed))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def plain(model: RewardModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The reward of one completion, alone in its batch and without padding."""
    return model.head(model.body.hidden(torch.tensor([prompt + completion]))[0, -1])[0]


def test_a_tree_reads_each_completion_to_its_end():
    """The state of a completion's last token in the tree of all completions is that of its own sequence."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=4, block_size=6, n_layer=2, n_head=2, n_embd=8)).double()
    completions = enumerate_completions(vocab_size=4, max_length=3, eos=3)
    prompts = torch.tensor([[0, 1], [2, 2]])
    tree, ends = whole_completions(completions)
    states = tree_states(gpt, prompts, tree)[:, ends]
    for x, prompt in enumerate(prompts):
        for y, (ids, length) in enumerate(zip(*completions)):
            alone = gpt.hidden(torch.cat([prompt, ids[:length]])[None])[0, -1]
            assert (states[x, y] - alone).abs().max() <= 1e-12  # float64, another order of sums


# -------------------------------------------------------------------------------------------- the network


def test_rewards_are_those_of_separate_sequences():
    """Fails where a reward is read at another token than the completion's last (the row's last, padding, the
    token before), or where completions that share a prompt see each other."""
    model = loud_model()
    found = model(shared_prompt_batch(ASKED, PAIRS))
    expected = torch.stack([torch.stack([plain(model, x, y) for y in two]) for x, two in zip(ASKED, PAIRS)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)  # float64, see test_policy.ROUNDING
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 0.1


def test_values_of_tokens_do_not_see_their_token():
    """V(x, y_<t) from a sequence that ends before y_t: one that saw its action would bias the gradient."""
    model = loud_model()
    expected = [
        plain(model, prompt, completion[:t]) for prompt, pair in zip(ASKED, PAIRS) for completion in pair
        for t in range(len(completion))
    ]  # fmt: skip
    found = model.token_values(shared_prompt_batch(ASKED, PAIRS))
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-11)


def test_the_gradient_is_that_of_eq_2():
    """grad of -log sigmoid(r_w - r_l) = -sigmoid(r_l - r_w) (grad r_w - grad r_l), means over pairs; and the
    head's bias, which no pair can tell, gets none."""
    model = loud_model()
    loss, metrics = reward_model_objective(model)(shared_prompt_batch(ASKED, PAIRS))
    found = gradients(model, loss)
    total = 0.0
    for x, (w, l) in zip(ASKED, PAIRS):
        r_w, r_l = plain(model, x, w), plain(model, x, l)
        total = total - torch.sigmoid(r_l - r_w).detach() * (r_w - r_l) / len(ASKED)
    expected = gradients(model, total)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name in expected:  # sums of some hundred float64 terms
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12 * largest)
    assert found["head.bias"].abs() <= 1e-15
    margins = [(plain(model, x, w) - plain(model, x, l)).item() for x, (w, l) in zip(ASKED, PAIRS)]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3, rel=1e-10)
    assert metrics["rewards/margins"].item() == pytest.approx(sum(margins) / 3, rel=1e-10)
    assert metrics["rewards/accuracies"].item() == pytest.approx(sum(m > 0 for m in margins) / 3)


def test_metrics_keep_no_graph():
    """They are kept for the log; with their graph, each would keep a batch's activations."""
    loss, metrics = reward_model_objective(loud_model())(shared_prompt_batch(ASKED, PAIRS))
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    assert tuple(metrics) == names
    chosen, rejected, margins, _ = metrics.values()
    assert (chosen - rejected).item() == pytest.approx(margins.item(), rel=1e-12)  # float64 means


def test_at_first_nothing_is_preferred():
    loss, metrics = reward_model_objective(RewardModel(loud(GPT(SMALL))))(shared_prompt_batch(ASKED, PAIRS))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert metrics["rewards/accuracies"] == 0.5


# ----------------------------------------------------------------------------------------------- learning

WORDS, EOT = 8, 0
BODY = GPTConfig(vocab_size=WORDS, block_size=16, n_layer=1, n_head=2, n_embd=16)


def true_reward(completion: list[int]) -> float:
    return 1.5 * sum((token in (1, 2)) - (token in (3, 4)) for token in completion)


def planted_pairs(count: int, seed: int) -> tuple[list[Example], float]:
    """Pairs judged by Bradley-Terry, and the accuracy on them of one who knows the true reward."""
    generator = torch.Generator().manual_seed(seed)
    rows, right = [], 0.0
    for number in range(count):
        prompt, first, second = (
            torch.randint(1, WORDS, (n,), generator=generator).tolist()
            for n in torch.randint(1, 6, (3,), generator=generator)
        )
        margin = true_reward(first) - true_reward(second)
        if torch.rand((), generator=generator) >= 1 / (1 + math.exp(-margin)):
            first, second, margin = second, first, -margin
        right += 0.5 if margin == 0 else margin > 0
        rows.append(Example(prompt, [[*first, EOT], [*second, EOT]], f"row {number}"))
    return rows, right / count


def fitted(count=1200, **options):
    torch.manual_seed(0)
    body = GPT(BODY).requires_grad_(False)  # as a reference often is; a copy of it learns
    rows, _ = planted_pairs(count, 0)
    held_out, ceiling = planted_pairs(500, 1)
    options = {"learning_rate": 1e-2, "batch_size": 32, "epochs": 3, "seed": 0, "look_every": 12} | options
    return body, held_out, ceiling, fit_reward_model(body, rows, held_out, **options)


def test_a_planted_reward_is_learnt_and_the_best_weights_are_kept():
    """Held-out accuracy near that of one who knows the reward; the model that comes back is the one of the
    best look, which is not the last here, and the body given is as it was."""
    body, held_out, ceiling, (model, records) = fitted()
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(body.parameters(), GPT(BODY).parameters()))
    looks = [r["eval_rewards/accuracies"] for r in records if "eval_rewards/accuracies" in r]
    (window,) = reward_model._windows(held_out, 500, "cpu", seed=0, epochs=1)
    accuracy = average(reward_model_objective(model), window)["rewards/accuracies"]
    assert accuracy == max(looks) and looks[-1] < max(looks)
    # what ties give by luck, 0.5 or so of some 60 pairs, is 0.015; the rest is what 1200 noisy pairs leave
    assert ceiling - 0.03 < accuracy < ceiling + 0.03 and ceiling > 0.8
    assert [r["step"] for r in records if "eval_loss" in r] == [*range(12, len(records), 12), len(records)]
    # and rewards themselves are the true ones up to a constant of each prompt
    asked, answers = [[1]] * 4, [[1, 1, 0], [2, 5, 0], [3, 6, 0], [4, 3, 0]]
    scores = score_completions(model, asked, answers)
    assert (scores.diff() < -0.7).all()


def test_the_earlier_of_equals_is_kept(monkeypatch):
    """With looks that all read the same, the weights after the first one come back, and the body given is as
    it was."""
    monkeypatch.setattr(reward_model, "average", lambda *_: {"loss": 1.0, "rewards/accuracies": 0.7})
    body, _, _, (model, records) = fitted(320, epochs=1, look_every=5)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(body.parameters(), GPT(BODY).parameters()))
    original = reward_model.windows
    monkeypatch.setattr(reward_model, "windows", lambda *a, **k: original(*a, **k)[:5])
    _, _, _, (early, few) = fitted(320, epochs=1, look_every=5)
    assert len(records) > len(few) == 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), early.parameters()))


def test_windows_are_laid_out_one_after_the_other_in_an_order_of_the_seed(monkeypatch):
    """All of three epochs beforehand took 500 MiB instead of 7. Another seed, another order."""
    original, trained, made = reward_model.make_window, reward_model.train, []

    def counting(rows, step, *args, **options):
        made.append(step)
        return original(rows, step, *args, **options)

    def watching(*args, **options):
        for record in trained(*args, **options):
            assert len(made) == 1 + record["step"]  # the held-out pairs are one more
            yield record

    monkeypatch.setattr(reward_model, "make_window", counting)
    monkeypatch.setattr(reward_model, "train", watching)
    orders = []
    for seed in (0, 0, 1):
        made.clear()
        fitted(64, seed=seed, epochs=2)
        orders.append(list(made))
    assert len(made) == 5 and orders[0] == orders[1] != orders[2] and orders[0][1:3] != orders[0][3:]


def test_micro_batches_weigh_pairs_not_tokens():
    """A batch in pieces gives the loss of the whole, also where the last piece is smaller."""
    rows, _ = planted_pairs(21, 3)
    torch.manual_seed(0)
    model = RewardModel(loud(GPT(BODY)))
    with torch.no_grad():
        model.head.weight.fill_(0.3)
    (window,) = reward_model._windows(rows, 21, "cpu", seed=0, epochs=1)
    assert [len(micro.ids) for micro in window.micro_batches] == [16, 5]
    batch = shared_prompt_batch([e.prompt for e in rows], [e.completions for e in rows])
    whole = reward_model_objective(model)(batch)[0].item()
    pieces = average(reward_model_objective(model), window)["loss"]
    assert pieces == pytest.approx(whole, rel=1e-12)  # float64


# ------------------------------------------------------------------------------------------------ rewards


def test_scores_come_in_the_order_asked(monkeypatch):
    model = loud_model()
    asked = [x for x in ASKED for _ in range(2)]
    answers = [y for pair in PAIRS for y in pair]
    expected = torch.stack([plain(model, x, y) for x, y in zip(asked, answers)])
    for together in (64, 2):
        monkeypatch.setattr(reward_model, "SCORED_AT_ONCE", together)
        found = score_completions(model, asked, answers)
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)  # float32's 6e-8 at 10


def test_normalised_rewards_have_mean_zero_at_each_prompt():
    """E50: for each prompt, not over all of them; and no difference between completions of a prompt moves."""
    model = loud_model()
    reward = normalised_reward(model, ASKED, PAIRS)
    asked, answers = [x for x in ASKED for _ in range(2)], [y for pair in PAIRS for y in pair]
    scores = reward(asked, answers).view(3, 2)
    assert scores.sum(-1).abs().max() < 1e-5 and scores.abs().min() > 0.05  # float32 at 10
    raw = score_completions(model, asked, answers).view(3, 2)
    torch.testing.assert_close(scores, raw - raw.mean(-1, keepdim=True))
    assert reward([ASKED[1]], [PAIRS[1][1]]).item() == pytest.approx(scores[1, 1].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: score_completions(m, [[1]], []), "one for each"),
        (lambda m: normalised_reward(m, ASKED, PAIRS)([[2, 2]], [[1]]), "prompt 1 has no samples"),
        (lambda m: normalised_reward(m, ASKED, PAIRS[:2]), "same number of samples"),
        (lambda m: reward_model_objective(m)(shared_prompt_batch([[1]], [[[1]]])), "learns from pairs"),
        (lambda m: fitted(look_every=0), "look_every must"),
        (lambda m: fitted(batch_size=0), "batch_size must"),
        (lambda m: fitted(epochs=0), "epochs must"),
    ],
)
def test_what_makes_no_sense_is_refused(call, named):
    with pytest.raises(InputError, match=rf"{named}[^\n]*\.$"):
        call(loud_model())


MUTANTS = {
    "completions end a token early": (
        whole_completions, "device=ids.device), lengths]", "device=ids.device), lengths - 1]",
        test_a_tree_reads_each_completion_to_its_end,
    ),
    "no token is to come": (
        whole_completions, "lengths + 1", "lengths",
        test_a_tree_reads_each_completion_to_its_end,
    ),
    "read at the prompt's last token": (
        RewardModel.forward, "tokens.place[last]", "tokens.predictor[last]",
        test_rewards_are_those_of_separate_sequences,
    ),
    "the value has seen its action": (
        RewardModel.token_values, "tokens.predictor", "tokens.place",
        test_values_of_tokens_do_not_see_their_token,
    ),
    "the last weights are kept": (fit_reward_model, "model.load_state_dict(best_weights)", "pass", None),
    "weights kept by reference": (
        fit_reward_model, "copy.deepcopy(model.state_dict())", "model.state_dict()", None,
    ),
    "the later of equals is kept": (fit_reward_model, "] > best", "] >= best", None),
    "the body given is trained": (fit_reward_model, "copy.deepcopy(body)", "body", None),
    "pieces weigh the same": (
        reward_model._windows, "len(micro) / sum(map(len, step))", "1 / len(step)",
        test_micro_batches_weigh_pairs_not_tokens,
    ),
    "the mean over all prompts": (
        normalised_reward, ".view(-1, count).mean(-1)", ".view(-1, count).mean().expand(len(prompts))",
        test_normalised_rewards_have_mean_zero_at_each_prompt,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard() if guard else test_the_earlier_of_equals_is_kept(monkeypatch)
