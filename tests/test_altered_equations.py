"""Alter an equation of the paper, and see that the derivation no longer holds.

Each row names an equation, a mistake that people make in it, the section that derives it, and what is
altered: a piece of a package function where one exists, otherwise a piece of the section's own block. The
section must then fail on random instances, by one of its own comparisons.
"""

from typing import NamedTuple

import pytest
from document import PAPER, SECTIONS, BlockFailure, opening_names, run_section, world
from planting import plant

from dpo_minimal import closed_form, losses, preferences


class Altered(NamedTuple):
    """`wrong` instead of `right`, in `function` or, where there is none, in the blocks of section `tag`."""

    equation: str
    mistake: str
    tag: str
    right: str
    wrong: str
    function: object | None = None


KL = "kl_divergence(logps, ref_logps)"
ONE_COLUMN, ALL_COLUMNS = "torch.randn(X, 1,", "torch.randn(X, K,"
HARD_VALUE = "(ref_logps.exp() * rewards).sum(-1)"
ALTERED = [
    Altered("Eq. 1", "flipped sign", "D2.1", "first_rewards - second_rewards",
            "second_rewards - first_rewards", preferences.bradley_terry),
    Altered("Eq. 1", "rewards added", "D2.1", "- rewards.unsqueeze(-2)", "+ rewards.unsqueeze(-2)",
            preferences.preference_matrix),
    Altered("Eq. 16", "strength is the reward, not e^r", "D2.1", "strength = rewards.exp()",
            "strength = rewards"),
    Altered("Eq. 16", "odds for probability", "D2.1", "(strength[:, w] + strength[:, l])", "strength[:, l]"),
    Altered("Eq. 2", "missing logarithm", "D2.2", "-F.logsigmoid(", "-torch.sigmoid(",
            losses.bradley_terry_loss),
    Altered("Eq. 2", "flipped sign", "D2.2", "widen(chosen_rewards) - widen(rejected_rewards)",
            "widen(rejected_rewards) - widen(chosen_rewards)", losses.bradley_terry_loss),
    Altered("Eq. 3", "dropped beta", "D3.2", f"beta * {KL}", KL, closed_form.rlhf_objective),
    Altered("Eq. 3", "swapped divergence", "D3.2", KL, "kl_divergence(ref_logps, logps)",
            closed_form.rlhf_objective),
    Altered("Eq. 3", "divergence rewarded", "D3.2", f"- beta * {KL}", f"+ beta * {KL}",
            closed_form.rlhf_objective),
    Altered("Eq. 4", "times beta instead of over beta", "D3.4", "rewards / beta", "rewards * beta",
            closed_form._tilt),
    Altered("Eq. 4", "flipped sign", "D3.4", "rewards / beta", "-rewards / beta", closed_form._tilt),
    Altered("Eq. 4", "not normalised", "D3.4", ".log_softmax(-1)", "", closed_form.optimal_logps),
    Altered("Eq. 4", "reference forgotten", "D3.4", "ref_logps + tilt", "tilt", closed_form._tilt),
    Altered("Eq. 5", "dropped beta", "D4.1", "beta * (logps - ref_logps)", "logps - ref_logps",
            closed_form.implicit_reward),
    Altered("Eq. 5", "missing logarithm", "D4.1", "beta * (logps - ref_logps)",
            "beta * (logps - ref_logps).exp()", closed_form.implicit_reward),
    Altered("Eq. 6", "flipped sign", "D4.2", "beta * ratio[:, l] - beta * ratio[:, w]",
            "beta * ratio[:, w] - beta * ratio[:, l]"),
    Altered("Eq. 6", "dropped beta", "D4.2", "beta * ratio[:, l] - beta * ratio[:, w]",
            "ratio[:, l] - ratio[:, w]"),
    Altered("Eq. 6", "reference forgotten", "D4.2", "ratio = optimal - ref_logps", "ratio = optimal"),
    Altered("Eq. 7", "missing logarithm", "D4.3", "-F.logsigmoid(margin)", "-torch.sigmoid(margin)",
            losses.dpo_loss),
    Altered("Eq. 7", "dropped beta", "D4.3", "margin = beta * logratio_margin", "margin = logratio_margin",
            losses.dpo_loss),
    Altered("Eq. 7", "beta on the policy only", "D4.3", "beta * logratio_margin",
            "beta * logratio_margin - (1 - beta) * (reference_chosen_logps - reference_rejected_logps)",
            losses.dpo_loss),
    Altered("Eq. 7", "reference forgotten", "D4.3", " - (reference_chosen - reference_rejected)", "",
            losses._logratios),
    Altered("Eq. 8", "hard for soft value", "D6.4", "soft_value(ref_logps, rewards, beta=beta)", HARD_VALUE,
            closed_form.canonical_reward),
    Altered("Eq. 8", "normaliser added", "D6.4", "rewards - soft_value", "rewards + soft_value",
            closed_form.canonical_reward),
    Altered("Eq. 8", "dropped beta", "D6.4", "soft_value(", "log_partition(", closed_form.canonical_reward),
    Altered("Eq. 9", "dropped beta", "D6.4", "(ref_logps.exp() * (canonical / beta).exp())",
            "(ref_logps.exp() * canonical.exp())"),
    Altered("Eq. 9", "another member of the class", "D6.4", "(canonical / beta).exp()).sum(-1)",
            "(rewards / beta).exp()).sum(-1)"),
    Altered("Eq. 10", "missing logarithm", "D7.2", "- beta * (logps - ref_logps)",
            "- beta * (logps - ref_logps).exp()"),
    Altered("Eq. 10", "expectation under the reference", "D7.2", "(logps.exp() * advantage)",
            "(ref_logps.exp() * advantage)"),
    Altered("Eq. 10", "hard for soft maximum", "D7.2", "beta * log_partition(ref_logps, rewards, beta=beta)",
            "rewards.amax(-1)", closed_form.soft_value),
    Altered("Eq. 11", "dropped beta", "D3.2", "penalty = beta * (logps - ref_logps)",
            "penalty = logps - ref_logps"),
    Altered("Eq. 11", "penalty for being rarer", "D3.2", "(rewards - penalty)", "(rewards + penalty)"),
    Altered("Eq. 12", "dropped beta", "D3.3", "(logps - ref_logps - rewards / beta)",
            "(logps - ref_logps - rewards)"),
    Altered("Eq. 12", "Z on the wrong side", "D3.3", "rewards / beta - Z.log()", "rewards / beta + Z.log()"),
    Altered("Eq. 12", "hard for soft maximum", "D3.3", ".logsumexp(-1)", ".amax(-1)",
            closed_form.log_partition),
    Altered("Eq. 13", "swapped divergence", "D3.3", "kl_divergence(logps, optimal) -",
            "kl_divergence(optimal, logps) -"),
    Altered("Eq. 13", "log Z forgotten", "D3.3",
            "optimal) - log_partition(ref_logps, rewards, beta=beta)", "optimal)"),
    Altered("Eq. 14", "dropped beta", "D3.3", "- beta * kl_divergence(logps, optimal)",
            "- kl_divergence(logps, optimal)"),
    Altered("Eq. 14", "swapped divergence", "D3.3", "- beta * kl_divergence(logps, optimal)",
            "- beta * kl_divergence(optimal, logps)"),
    Altered("Eq. 15", "times beta instead of over beta", "D3.4",
            "tilted = ref_logps.exp() * (rewards / beta)", "tilted = ref_logps.exp() * (rewards * beta)"),
    Altered("Eq. 15", "value without beta", "D3.4", "same(best, beta * log_partition",
            "same(best, log_partition"),
    Altered("Eq. 17", "log Z forgotten", "D4.1", " + beta * log_Z[:, None]", ""),
    Altered("Eq. 17", "log Z without beta", "D4.1", "+ beta * log_Z[:, None]", "+ log_Z[:, None]"),
    Altered("Eq. 18", "worst first", "D8.1", "ranked_rewards.flip(-1).logcumsumexp(-1).flip(-1)",
            "ranked_rewards.logcumsumexp(-1)", preferences.plackett_luce_logprob),
    Altered("Eq. 18", "hard for soft maximum", "D8.1", ".logcumsumexp(-1)", ".cummax(-1).values",
            preferences.plackett_luce_logprob),
    Altered("Eq. 18", "everyone stays", "D8.1", "ranked_rewards.flip(-1).logcumsumexp(-1).flip(-1)",
            "ranked_rewards.logsumexp(-1, keepdim=True)", preferences.plackett_luce_logprob),
    Altered("Eq. 19", "reference forgotten", "D8.3",
            "implied = implicit_reward(optimal, ref_logps, beta=beta)", "implied = beta * optimal"),
    Altered("Eq. 19", "flipped sign", "D8.3", "implied = implicit_reward(optimal, ref_logps, beta=beta)",
            "implied = implicit_reward(ref_logps, optimal, beta=beta)"),
    Altered("Eq. 20", "flipped sign", "D8.3", "widen(policy_logps) - widen(reference_logps)",
            "widen(reference_logps) - widen(policy_logps)", losses._ranked_rewards),
    Altered("Eq. 20", "dropped beta", "D8.3", "beta * (widen", "(widen", losses._ranked_rewards),
    Altered("Eq. 21", "sign as the paper prints it", "D5.1",
            "[:, w] - implicit_reward(policy, ref_logps, beta=beta)[:, l]",
            "[:, l] - implicit_reward(policy, ref_logps, beta=beta)[:, w]"),
    Altered("Eq. 21", "dropped beta", "D5.1", "u = implicit_reward(policy, ref_logps, beta=beta)[:, w] -",
            "u = (policy - ref_logps)[:, w] -"),
    Altered("Eq. 22", "not divided by sigma", "D5.1", "torch.sigmoid(-u.detach()) / sigma",
            "torch.sigmoid(-u.detach())"),
    Altered("Eq. 22", "sign forgotten", "D5.1", "(-slope * u)", "(slope * u)"),
    Altered("Sec. 4", "weight of the winner's side", "D5.1", "torch.sigmoid(-margin)",
            "torch.sigmoid(margin)", losses.dpo_loss),
    Altered("Sec. 4", "dropped beta", "D5.1", "chosen_weights=beta * ", "chosen_weights=",
            losses.dpo_loss),
    Altered("Definition 1", "depends on the completion", "D6.1", ONE_COLUMN, ALL_COLUMNS),
    Altered("Lemma 1", "depends on the completion", "D6.2", ONE_COLUMN, ALL_COLUMNS),
    Altered("Lemma 1", "scaled instead of shifted", "D6.2", "rewards + f", "rewards * f"),
    Altered("Lemma 2", "depends on the completion", "D6.3", ONE_COLUMN, ALL_COLUMNS),
    Altered("Lemma 2", "scaled instead of shifted", "D6.3", "rewards + f", "rewards * f.exp()"),
    Altered("Theorem 1", "policy and reference exchanged", "D6.5",
            "implicit_reward(optimal, ref_logps, beta=beta)",
            "implicit_reward(ref_logps, optimal, beta=beta)"),
    Altered("Theorem 1", "a reward for which Z converges", "D6.5", "(2 * n.log())", "(0.5 * n.log())"),
    Altered("Proposition 1", "dropped beta", "D6.6", "logps + f[:, None] / beta", "logps + f[:, None]"),
    Altered("Proposition 1", "depends on the completion", "D6.6", "f[:, None] / beta",
            "f[:, None] / beta * rewards"),
]  # fmt: skip


def test_every_equation_of_the_paper_is_altered():
    """At least two mistakes in each numbered equation, one in each lemma, theorem and definition."""
    rows = [(row.equation, row.mistake) for row in ALTERED]
    assert len(rows) == len(set(rows))
    for item in PAPER:
        assert sum(equation == item for equation, _ in rows) >= (2 if item.startswith("Eq.") else 1), item
    assert {equation for equation, _ in rows} == set(PAPER)


@pytest.mark.parametrize("row", ALTERED, ids=lambda row: f"{row.equation}: {row.mistake}")
def test_an_altered_equation_is_noticed(monkeypatch, row):
    """The section holds as it stands (test_derivations.py) and fails with the mistake."""
    section = SECTIONS[row.tag]
    if row.function is not None:
        plant(monkeypatch, row.function, row.right, row.wrong)
    else:
        assert any(row.right in block.source for block in section), f"{row.tag} no longer has {row.right!r}"
        section = [block._replace(source=block.source.replace(row.right, row.wrong)) for block in section]
    opening = opening_names()

    with pytest.raises(BlockFailure):
        for number in range(30):
            run_section(section, opening, world(row.tag, number))
