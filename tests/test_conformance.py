"""The conformance checks: code as others write it is accepted, known mistakes are refused by name."""

import math
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dpo_minimal
from dpo_minimal.__main__ import main
from dpo_minimal.bench import checks, mistakes
from dpo_minimal.bench.conformance import CHECKS
from dpo_minimal.bench.exercises import samples
from dpo_minimal.bench.loading import load_function
from dpo_minimal.validation import InputError

README = (Path(dpo_minimal.__file__).parent / "bench" / "README.md").read_text(encoding="utf-8")
PAIRS = "policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps"


@pytest.fixture
def quickly(monkeypatch):
    """Thirty draws that are kept, in place of a hundred and the search for the smallest."""

    def first(strategy, fails):
        return next((given for given in samples(strategy) if fails(given)), None)

    monkeypatch.setattr(checks, "smallest", first)


# --------------------------------------------------------------------------- as the known libraries have it


def official_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta, label_smoothing=0.0, ipo=False, reference_free=False,
):  # fmt: skip
    """The authors' code: all variants in one, rewards returned beside the losses."""
    ours, theirs = (
        policy_chosen_logps - policy_rejected_logps,
        reference_chosen_logps - reference_rejected_logps,
    )
    h = ours - (0 if reference_free else theirs)
    if ipo:
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = -F.logsigmoid(beta * h) * (1 - label_smoothing) - F.logsigmoid(-beta * h) * label_smoothing
    rewards = [
        beta * (p - q).detach()
        for p, q in (
            (policy_chosen_logps, reference_chosen_logps),
            (policy_rejected_logps, reference_rejected_logps),
        )
    ]
    return losses, *rewards


def official_batch_logps(logits, labels, average_log_prob=False):
    """The authors' code: labels are the ids, with -100 where nothing counts."""
    labels, logits = labels[:, 1:].clone(), logits[:, :-1, :]
    counts = labels != -100
    labels[labels == -100] = 0
    logps = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
    total = (logps * counts).sum(-1)
    return total / counts.sum(-1) if average_log_prob else total


def concatenated_forward(logits, labels):
    """The authors' and TRL's: one forward pass for both, chosen rows first."""
    logps = official_batch_logps(logits, labels)
    half = len(labels) // 2
    return logps[:half], logps[half:]


def trl_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """TRL: names of its own, and the mean."""
    chosen_logratios, rejected_logratios = (
        chosen_logps - ref_chosen_logps,
        rejected_logps - ref_rejected_logps,
    )
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios)).mean()


def trl_logps(logits, input_ids, completion_mask):
    """TRL: zero where nothing counts, then a roll to the places of the tokens, then the sum."""
    shifted = torch.where(completion_mask.bool(), input_ids, 0).roll(-1, 1)
    counts = completion_mask.roll(-1, 1).bool().clone()
    counts[:, -1] = False
    each = logits.gather(-1, shifted[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return torch.where(counts, each, 0.0).sum(-1)


class TorchtuneLoss(torch.nn.Module):
    """torchtune: a module that holds beta."""

    def __init__(self, beta=0.1, label_smoothing=0.0):
        super().__init__()
        self.beta, self.label_smoothing = beta, label_smoothing

    def forward(self, policy_chosen, policy_rejected, reference_chosen, reference_rejected):
        logits = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        losses = (
            -F.logsigmoid(self.beta * logits) * (1 - self.label_smoothing)
            - F.logsigmoid(-self.beta * logits) * self.label_smoothing
        )
        return (
            losses,
            self.beta * (policy_chosen - reference_chosen).detach(),
            self.beta * (policy_rejected - reference_rejected).detach(),
        )


def torchtune_logps(logits, labels, label_pad_token_id=-100, return_average_logprobs=False):
    labels, logits = labels[:, 1:].clone(), logits[:, :-1]
    counts = labels != label_pad_token_id
    labels[~counts] = 0
    each = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (each * counts).sum(-1) / (counts.sum(-1) if return_average_logprobs else 1)


def halos_dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """HALOs: rewards of both sides first, then their difference."""
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    return (
        -F.logsigmoid(chosen_rewards - rejected_rewards),
        chosen_rewards.detach(),
        rejected_rewards.detach(),
    )


def halos_kto(chosen, rejected, ref_chosen, ref_rejected, kl, beta, desirable_weight, undesirable_weight):
    """HALOs: desirable and undesirable rows apart, their losses one after the other."""
    good = desirable_weight * (1 - torch.sigmoid(beta * ((chosen - ref_chosen) - kl)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (kl - (rejected - ref_rejected))))
    return torch.cat((good, bad), 0)


def halos_kto_of_rows(policy_logps, reference_logps, is_desirable, kl_estimate, **weights):
    """The adapter: splits by label, and puts the losses back into their rows."""
    good = is_desirable
    losses = halos_kto(
        policy_logps[good], policy_logps[~good], reference_logps[good], reference_logps[~good],
        kl_estimate, **weights,
    )  # fmt: skip
    return losses[torch.cat([good.nonzero(), (~good).nonzero()]).flatten().argsort()]


# ----------------------------------------------------------------------------- right, and unusual in form


@dataclass
class Output:
    loss: torch.Tensor


def pair_by_pair(pc, pr, rc, rr, beta):
    return [-F.logsigmoid(beta * ((a - b) - (c - d))) for a, b, c, d in zip(pc, pr, rc, rr)]


def as_a_classifier(pc, pr, rc, rr, beta):
    scores = torch.stack([beta * (pc - rc), beta * (pr - rr)], -1)
    return F.cross_entropy(scores, torch.zeros(len(pc), dtype=torch.long), reduction="none")


def in_single(pc, pr, rc, rr, beta):
    return -F.logsigmoid(beta * ((pc.float() - pr.float()) - (rc.float() - rr.float())))


def token_by_token(logits, ids, mask):
    rows = []
    for row in range(len(ids)):
        each = [
            logits[row, t - 1].log_softmax(-1)[ids[row, t]] for t in range(1, ids.shape[1]) if mask[row, t]
        ]
        rows.append(torch.stack(each).sum())
    return torch.stack(rows)


def with_lengths(logits, ids, prompt_lengths, lengths):
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    place = torch.arange(1, ids.shape[1])
    return (each * ((place >= prompt_lengths[:, None]) & (place < lengths[:, None]))).sum(-1)


def numpy_optimum(reference, rewards, beta):
    tilted = np.asarray(reference) + np.asarray(rewards) / beta
    return tilted - np.log(np.exp(tilted).sum(-1, keepdims=True))


RIGHT = {  # check, function, how it is called
    "official, by the names of its parameters": ("dpo_loss", official_loss, {}),
    "official, IPO": ("ipo_loss", official_loss, {"arguments": f"{PAIRS}, beta, ipo=True"}),
    "official, conservative": ("cdpo_loss", official_loss, {}),
    "official, log-probabilities": ("sequence_logps", official_batch_logps, {}),
    "official, both in one pass": ("sequence_logps", concatenated_forward, {}),
    "this package's": ("dpo_loss", dpo_minimal.dpo_loss, {}),
    "this package's KTO": ("kto_loss", dpo_minimal.kto_loss, {}),
    "TRL, the mean": ("dpo_loss", trl_loss, {}),
    "TRL, log-probabilities": ("sequence_logps", trl_logps, {}),
    "torchtune, a module": ("dpo_loss", TorchtuneLoss(0.3), {"beta": 0.3}),
    "torchtune, smoothed": ("cdpo_loss", TorchtuneLoss(0.3, 0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    "torchtune, log-probabilities": (
        "sequence_logps", torchtune_logps, {"arguments": "logits, labels, label_pad_token_id=-100"},
    ),
    "HALOs, DPO": ("dpo_loss", halos_dpo, {}),
    "HALOs, KTO": ("kto_loss", halos_kto_of_rows, {}),
    "another order, numbers between": (
        "dpo_loss", lambda beta, rc, rr, pr, pc: -F.logsigmoid(beta * (pc - pr - rc + rr)),
        {"arguments": "beta, reference_chosen_logps, reference_rejected_logps, policy_rejected_logps, "
         "policy_chosen_logps"},
    ),
    "keywords of its own": (
        "dpo_loss", lambda *, win, lose, win0, lose0, tau: official_loss(win, lose, win0, lose0, tau),
        {"arguments": "win=policy_chosen_logps, lose=policy_rejected_logps, win0=reference_chosen_logps, "
         "lose0=reference_rejected_logps, tau=beta"},
    ),
    "an expression of an input": (
        "dpo_loss", lambda h, temperature: -F.logsigmoid(h / temperature),
        {"arguments": "policy_chosen_logps - policy_rejected_logps - reference_chosen_logps "
         "+ reference_rejected_logps, 1 / beta"},
    ),
    "beta in order, where epsilon has another name": (
        "cdpo_loss", lambda w, l, v, m, beta, epsilon: official_loss(w, l, v, m, beta, epsilon), {},
    ),
    "a loop over pairs": ("dpo_loss", pair_by_pair, {}),
    "a dict": ("dpo_loss", lambda *given, beta: {"rewards": 0, "losses": official_loss(*given, beta)[0]}, {}),
    "an object": ("dpo_loss", lambda *given, beta: Output(official_loss(*given, beta)[0].mean()), {}),
    "a classifier of two": ("dpo_loss", as_a_classifier, {}),
    "softplus": ("dpo_loss", lambda a, b, c, d, beta: F.softplus(-beta * (a - b - c + d), threshold=1e9), {}),
    "float32 inside": ("dpo_loss", in_single, {}),
    "bits, which is said": (
        "dpo_loss", lambda *given, beta: official_loss(*given, beta)[0] / math.log(2),
        {"scale": 1 / math.log(2)},
    ),
    "no gradient, which is said": (
        "dpo_loss", torch.no_grad()(lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - b - c + d))),
        {"gradient": False},
    ),
    "token by token": ("sequence_logps", token_by_token, {}),
    "labels beside a mask, which are ids": (
        "sequence_logps", lambda logits, labels, mask: scored()(logits, labels, mask), {},
    ),
    "lengths in place of a mask": ("sequence_logps", with_lengths, {}),
    "the weight, in numpy": (
        "dpo_gradient_weight",
        lambda a, b, c, d, beta: beta / (1 + np.exp(beta * np.asarray(a - b - c + d))), {},
    ),
    "the optimum, in numpy": ("optimal_policy", numpy_optimum, {}),
    "rewards as a list of Python's numbers": (
        "implicit_reward", lambda p, q, beta: [beta * (a - b) for a, b in zip(p.tolist(), q.tolist())], {},
    ),
    "a reward model's loss": ("reward_model_loss", lambda w, l: -F.logsigmoid(w - l).mean(), {}),
    "k1, the mean": ("kl_estimate", lambda p, q: (p - q).mean(), {}),
    "k3, sample by sample": ("kl_estimate", lambda p, q: torch.expm1(q - p) + p - q, {}),
    "the ranking's loss, minus which is asked for": (
        "plackett_luce", dpo_minimal.plackett_luce_loss, {"scale": -1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_in_unusual_form_is_accepted(name, quickly):
    check, function, how = RIGHT[name]
    verdict = CHECKS[check](function, **how)
    assert verdict.passed and verdict, verdict.message


# ------------------------------------------------------------------------------------ what is right

STRENGTH = {  # chosen's and rejected's (pi / pi_ref)^beta, beta and epsilon: what must come out
    "dpo_loss": lambda c, r, b: ((c + r) / c).log(),
    "dpo_gradient_weight": lambda c, r, b: b * r / (c + r),
    "ipo_loss": lambda c, r, b: (((c / r).log() - 0.5) / b) ** 2,
    "cdpo_loss": lambda c, r, b, e: (1 - e) * ((c + r) / c).log() + e * ((c + r) / r).log(),
}


def of_strengths(check):
    def brute(w, l, v, m, beta, *more):
        return STRENGTH[check]((w.exp() / v.exp()) ** beta, (l.exp() / m.exp()) ** beta, beta, *more)

    return brute


def of_tokens(logits, ids, mask):
    """A product over the tokens of each row, in Python's numbers."""
    chances = [1.0] * len(ids)
    for row, place in mask.nonzero().tolist():
        strengths = [math.exp(number) for number in logits[row, place - 1].tolist()]
        chances[row] *= strengths[ids[row, place]] / sum(strengths)
    return torch.tensor([math.log(chance) for chance in chances], dtype=torch.float64)


def of_labels(policy, reference, good, kl, beta, desirable, undesirable):
    strength, other = (policy.exp() / reference.exp()) ** beta, math.exp(kl) ** beta
    return torch.where(good, desirable * other, undesirable * strength) / (strength + other)


def of_places(rewards):
    strengths = rewards.exp()
    return sum((strengths[:, k] / strengths[:, k:].sum(-1)).log() for k in range(rewards.shape[1]))


def of_tilted(reference, rewards, beta):
    tilted = reference.exp() * (rewards / beta).exp()
    return (tilted / tilted.sum(-1, keepdim=True)).log()


BRUTE = {
    **{check: of_strengths(check) for check in STRENGTH},
    "sequence_logps": of_tokens,
    "kto_loss": of_labels,
    "plackett_luce": of_places,
    "optimal_policy": of_tilted,
    "implicit_reward": lambda p, q, beta: (p.exp() / q.exp()).log() * beta,
    "reward_model_loss": lambda w, l: (1 + l.exp() / w.exp()).log(),
    "kl_estimate": lambda p, q: (p.exp() / q.exp()).log(),
}


@pytest.mark.parametrize("check", CHECKS)
def test_right_is_brute_force(check):
    """What answers are compared with: probabilities and strengths divided, where it subtracts logarithms."""
    for given in samples(mistakes.INPUTS[check]):
        right, brute = mistakes.RIGHT[check](**given), BRUTE[check](*given.values())
        assert right == pytest.approx(brute, rel=1e-9, abs=1e-9)  # log(1 - sigmoid) at margins up to 12


def test_the_checks_are_public():
    assert all(getattr(dpo_minimal, f"check_{check}") is function for check, function in CHECKS.items())


def test_what_is_assumed_is_said(quickly):
    """A reader can see that the order of arguments and the choice of the answer were guesses."""
    message = CHECKS["dpo_loss"](trl_loss).message
    assert "assumed " in message and "in this order, policy_chosen_logps, policy_rejected_logps" in message
    assert "the mean over the batch" in message
    message = CHECKS["dpo_loss"](official_loss).message
    assert "the first of its 3 values" in message and "in this order" not in message
    assert "the factor -1" in CHECKS["plackett_luce"](dpo_minimal.plackett_luce_loss, scale=-1.0).message


def test_a_right_formula_that_overflows_is_told_so(quickly):
    def naive(pc, pr, rc, rr, beta):
        return torch.log(1 + torch.exp(-beta * (pc - pr - rc + rr)))

    verdict = CHECKS["dpo_loss"](naive)
    assert verdict.passed and "but here" in verdict.message and "inf" in verdict.message


def test_a_clamp_where_nobody_looks_is_refused(quickly):
    """It gives another finite number at a margin of -800, where DPO's loss is 800 nats."""
    verdict = CHECKS["dpo_loss"](
        lambda pc, pr, rc, rr, b: F.softplus(-(b * (pc - pr - rc + rr)).clamp(-30, 30))
    )
    assert not verdict.passed and verdict.mistake == checks.BOUNDED
    assert "extreme input" in verdict.message and "yours           [30]" in verdict.message


# ----------------------------------------------------------------------------------------- wrong, by name


def h_of(a, b, c, d):
    return (a - b) - (c - d)


def pair_loss(formula):
    """A loss from a formula of log-ratios g of chosen, k of rejected, and beta."""
    return lambda a, b, c, d, beta: -F.logsigmoid(formula(a - c, b - d, beta))


def scored(mask_of=lambda m: m, shift=1, of=lambda x: x.log_softmax(-1)):
    """Log-probabilities of sequences with another mask, shift or squashing, by a loop over the places."""

    def logps(logits, ids, mask):
        total = torch.zeros(len(ids), dtype=logits.dtype)
        mask, numbers = mask_of(mask), of(logits)
        for t in range(shift, ids.shape[1]):
            total = total + mask[:, t] * numbers[:, t - shift].gather(-1, ids[:, t, None]).squeeze(-1)
        return total

    return logps


def only_padding(mask):
    return torch.stack([torch.arange(mask.shape[1]) > row.nonzero().max() for row in mask])


def labels_inverted(logits, ids, mask):
    labels = ids.masked_fill(~mask, -100)  # as trainers have them
    kept = labels == -100
    return scored()(logits, labels.masked_fill(kept, 0), kept)


def chosens_mask(mask):
    return torch.cat([mask[: len(mask) // 2]] * 2)


def mean_of_tokens(logits, labels):
    return official_batch_logps(logits, labels, average_log_prob=True)


def shifted_twice(logits, labels):
    """The labels were shifted by whoever made them, and are shifted again."""
    return official_batch_logps(logits, F.pad(labels[:, 1:], (0, 1), value=-100))


def without_eos(logits, ids, mask):
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return scored(lambda m: m & ~last)(logits, ids, mask)


WRONG = {  # check, function, how it is called, and what its name must contain
    "no reference": ("dpo_loss", lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - b)), "no reference"),
    "official, reference_free": (
        "dpo_loss", lambda *given, beta: official_loss(*given, beta, reference_free=True), "no reference",
    ),
    "beta on the chosen only": ("dpo_loss", pair_loss(lambda g, k, b: b * g - k), "transformed: beta"),
    "rejected clamped": (
        "dpo_loss", pair_loss(lambda g, k, b: b * (g - k.clamp(max=0))), "one side is transformed: one",
    ),
    "chosen scaled": (
        "dpo_loss", lambda a, b, c, d, beta: -F.logsigmoid(beta * (1.5 * a - c - b + d)),
        "one side is transformed: the chosen's",
    ),
    "rejected as a probability": (
        "dpo_loss", lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - c - (b.exp() - d))),
        "one side is transformed: the rejected's",
    ),
    "beta outside": ("dpo_loss", lambda *g, beta: -beta * F.logsigmoid(h_of(*g)), "beta is outside"),
    "beta missing": ("dpo_loss", lambda *g, beta: -F.logsigmoid(h_of(*g)), "beta is missing"),
    "beta on the policy only": (
        "dpo_loss", lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - b) - (c - d)),
        "beta is missing on the reference",
    ),
    "beta twice": ("dpo_loss", pair_loss(lambda g, k, b: b * (b * g - b * k)), "beta is applied twice"),
    "reference swapped": (
        "dpo_loss", lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - d - (b - c))), "two sides are swapped",
    ),
    "reference twice": (
        "dpo_loss", lambda a, b, c, d, beta: -F.logsigmoid(beta * ((a - c) - (b - d) - (c - d))), "twice",
    ),
    "softplus of +margin": (
        "dpo_loss", lambda *g, beta: F.softplus(beta * h_of(*g)), "chosen and rejected are swapped",
    ),
    "no logarithm": ("dpo_loss", lambda *g, beta: -torch.sigmoid(beta * h_of(*g)), "logarithm is missing"),
    "sum of log-ratios": ("dpo_loss", pair_loss(lambda g, k, b: b * (g + k)), "the sum of the two"),
    "no minus": ("dpo_loss", lambda *g, beta: F.logsigmoid(beta * h_of(*g)), "the sign is reversed"),
    "bits": (
        "dpo_loss", lambda *g, beta: -F.logsigmoid(beta * h_of(*g)) / math.log(2), "1.4427 = 1/ln 2: bits",
    ),
    "half precision": (
        "dpo_loss", lambda *g, beta: -F.logsigmoid(beta * h_of(*g)).bfloat16(), "too few digits",
    ),
    "sum over the batch": (
        "dpo_loss", lambda *g, beta: -F.logsigmoid(beta * h_of(*g)).sum(), "the sum over the batch",
    ),
    "numpy in a loss": (
        "dpo_loss", lambda *g, beta: np.log1p(np.exp(-beta * h_of(*(x.numpy() for x in g)))),
        "computed without gradient",
    ),
    "loss under no_grad": (
        "dpo_loss", torch.no_grad()(lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - b - c + d))),
        "computed without gradient",
    ),
    "rejected detached": (
        "dpo_loss", lambda a, b, c, d, beta: -F.logsigmoid(beta * (a - b.detach() - c + d)),
        "no gradient reaches policy_rejected_logps",
    ),
    "labels inverted": ("sequence_logps", labels_inverted, "token 0 is scored wherever the label is -100"),
    "only padding": ("sequence_logps", scored(only_padding), "a mask that keeps only padding"),
    "the chosen's mask": ("sequence_logps", scored(chosens_mask), "masked by the chosen's mask"),
    "scores without gradient": (
        "sequence_logps", torch.no_grad()(lambda logits, labels: official_batch_logps(logits, labels)),
        "computed without gradient",
    ),
    "the mean": ("sequence_logps", mean_of_tokens, "the mean of tokens"),
    "shifted twice": ("sequence_logps", shifted_twice, "an extra shift"),
    "not shifted": ("sequence_logps", scored(shift=0), "no shift"),
    "prompt": ("sequence_logps", scored(lambda m: m.flip(-1).cummax(-1).values.flip(-1)), "prompt tokens"),
    "padding": ("sequence_logps", scored(lambda m: m.cummax(-1).values), "padding is counted"),
    "inverted": ("sequence_logps", scored(lambda m: ~m), "the mask is inverted"),
    "no mask": ("sequence_logps", scored(torch.ones_like), "the whole row"),
    "no end-of-text": ("sequence_logps", without_eos, "the last token is not counted"),
    "raw logits": ("sequence_logps", scored(of=lambda x: x), "raw logits"),
    "wrong axis": ("sequence_logps", scored(of=lambda x: x.log_softmax(1)), "over the places"),
    "beta upside down": ("optimal_policy", lambda q, r, b: (q + b * r).log_softmax(-1), "upside down"),
    "the loss itself": ("dpo_gradient_weight", lambda *g, beta: -F.logsigmoid(beta * h_of(*g)), "DPO"),
    "beta missing in front": (
        "dpo_gradient_weight", lambda *g, beta: torch.sigmoid(-beta * h_of(*g)), "the beta in front",
    ),
    "optimum without reference": ("optimal_policy", lambda q, r, b: (r / b).log_softmax(-1), "no reference"),
    "all in the denominators": ("plackett_luce", lambda r: r.log_softmax(-1).sum(-1), "every denominator"),
    "k2": ("kl_estimate", lambda p, q: (p - q) ** 2 / 2, "k2"),
    "a table's KL": ("kl_estimate", lambda p, q: (p.exp() * (p - q)).sum(), "weighted with π again"),
    "IPO's target": ("ipo_loss", lambda *g, beta: (h_of(*g) - 1 / beta) ** 2, "1/(2 beta), not 1/beta"),
    "no smoothing": (
        "cdpo_loss", lambda a, b, c, d, beta, label_smoothing: official_loss(a, b, c, d, beta)[0],
        "another loss, DPO",
    ),
    "hinge": ("dpo_loss", lambda *g, beta: (1 - beta * h_of(*g)).relu().mean(), "another loss, hinge"),
    "robust": (
        "cdpo_loss", lambda a, b, c, d, beta, label_smoothing: dpo_minimal.robust_dpo_loss(
            a, b, c, d, beta=beta, flip_probability=label_smoothing
        ), "another loss, robust DPO",
    ),
    "KTO without z0": (
        "kto_loss", lambda kl_estimate, **given: halos_kto_of_rows(kl_estimate=0.0, **given), "z0 is missing",
    ),
    "unread beta": ("implicit_reward", lambda p, q, beta: p - q, "beta is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_code_is_refused_by_name(name, quickly):
    check, function, said = WRONG[name]
    verdict = CHECKS[check](function)
    assert not verdict.passed and not verdict
    assert verdict.mistake and said in verdict.mistake, verdict.message
    assert f"looks like      {verdict.mistake}" in verdict.message


def constant_weight(*given, beta):
    """Right values, and a gradient without sigmoid(-margin)."""
    u = beta * h_of(*given)
    return -F.logsigmoid(u).detach() - (u - u.detach())


UNNAMED = {  # no known mistake: refused with the input that tells
    "another temperature": ("dpo_loss", lambda *g, beta: -F.logsigmoid(beta * h_of(*g) ** 3)),
    "a constant is added": ("dpo_loss", lambda *g, beta: 0.1 - F.logsigmoid(beta * h_of(*g) + 0.01)),
    "(B, 1)": ("dpo_loss", lambda *g, beta: -F.logsigmoid(beta * h_of(*g))[:, None]),
    "its input is changed": (
        "dpo_loss", lambda a, *g, beta: -F.logsigmoid(beta * h_of(a.clone(), *g) + 0 * a.mul_(2)),
    ),
    "nothing": ("dpo_loss", lambda *g, beta: None),
    "raises": ("sequence_logps", lambda logits, ids, mask: logits[:, 99]),
    "a constant weight": ("dpo_loss", constant_weight),
}  # fmt: skip


@pytest.mark.parametrize("name", UNNAMED)
def test_other_wrong_code_is_refused_with_its_smallest_input(name, quickly):
    check, function = UNNAMED[name]
    verdict = CHECKS[check](function)
    assert verdict.status == "wrong" and verdict.mistake is None, verdict.message
    assert "smallest input" in verdict.message


@pytest.mark.parametrize("check", CHECKS)
def test_every_mistake_is_told_from_right_and_from_the_others(check):
    """A name that fits two mistakes would be a guess."""
    drawn = samples(mistakes.INPUTS[check])[:10]
    answers = {"right": [mistakes.RIGHT[check](**given) for given in drawn]}
    for name, mistake in mistakes.mistakes_of(check).items():
        answers[name] = [mistake(*checks.copy(given).values()) for given in drawn]
        for other in list(answers)[:-1]:
            same = (checks.agrees(a, b, 1e-9) for a, b in zip(answers[name], answers[other]))
            assert not all(same), f"{name} = {other}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_the_whole_search_decides_alike(name):
    if name in RIGHT:
        check, function, how = RIGHT[name]
        assert CHECKS[check](function, **how).passed
    else:
        check, function, said = WRONG[name]
        assert said in CHECKS[check](function).mistake


# ----------------------------------------------------------------------------------- calls that cannot be


@pytest.mark.parametrize(
    ("function", "how", "named"),
    [
        (lambda a, b: a, {}, "too many positional arguments"),
        (official_loss, {"arguments": "policy_chosen_logps"}, "missing a required argument"),
        (official_loss, {"arguments": "chosen_logps"}, "chosen_logps is no input of dpo_loss"),
        (official_loss, {"arguments": "beta, ="}, "as in a call"),
        (official_loss, {"arguments": "beta + gamma"}, "gamma is no input of dpo_loss"),
        (official_loss, {"gamma": 1.0}, "gamma is no input of dpo_loss"),
        (official_loss(*[torch.zeros(1)] * 4, 1.0), {}, "takes the function itself, got tuple"),
    ],
)
def test_calls_that_cannot_be_are_refused(function, how, named):
    with pytest.raises(InputError, match=re.escape(named)):
        CHECKS["dpo_loss"](function, **how)


def test_without_hypothesis_one_sentence_tells_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "dpo_minimal.bench.checks")
    monkeypatch.delattr(dpo_minimal.bench, "checks")
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.setitem(sys.modules, "hypothesis.errors", None)
    with pytest.raises(InputError, match=r'pip install "dpo-minimal\[test\]"'):
        CHECKS["dpo_loss"](official_loss)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a right loss, a wrong one, and what cannot be loaded."""
    monkeypatch.chdir(tmp_path)
    Path("losses.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"  # looks for its module
        "import neighbour\nimport torch.nn.functional as F\nNUMBER = 1\n\n"
        "@dataclass\nclass Settings:\n    beta: float\n\n"
        "def dpo(pc, pr, rc, rr, beta):\n    return -F.logsigmoid(beta * (pc - pr - rc + rr))\n\n"
        "def wrong(pc, pr, rc, rr, beta):\n    return -F.logsigmoid(beta * (pc - pr))\n\n"
        "class Trainer:\n    @staticmethod\n"
        "    def loss(pc, pr, rc, rr):\n        return dpo(pc, pr, rc, rr, 0.5)\n"
    )
    Path("neighbour.py").write_text("")
    Path("broken.py").write_text("import torch\n1 / 0\n")
    Path("grammar.py").write_text("def f(:\n")
    Path("leaves.py").write_text("import sys\nsys.exit('usage')\n")
    yield
    for name in ("neighbour", "_loaded_losses"):
        sys.modules.pop(name, None)


def test_exit_codes_and_messages(files, quickly, capsys):
    assert main(["check", "--dpo-loss", "losses.py:dpo"]) == 0
    assert "losses.py:dpo, as dpo_loss: right." in capsys.readouterr().out
    assert main(["check", "--dpo-loss", "losses.py:dpo", "--dpo-loss", "losses.py:wrong"]) == 1
    out = capsys.readouterr().out
    assert "losses.py:dpo, as dpo_loss: right." in out and "looks like      no reference" in out
    assert main(["check", "--dpo-loss", "losses.py:Trainer.loss", "--beta", "0.5"]) == 0
    swapped = (
        "policy_rejected_logps, policy_chosen_logps, reference_rejected_logps, reference_chosen_logps, beta"
    )
    assert main(["check", "--dpo-loss", f"losses.py:dpo({swapped})"]) == 1
    assert "chosen and rejected are swapped" in capsys.readouterr().out
    assert main(["check", "--dpo-loss", "losses.py:dpo", "--arguments", swapped]) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "name a function to check"),
        (["--dpo-loss", "losses.py"], "write FILE.py:FUNCTION"),
        (["--dpo-loss", "nowhere.py:dpo"], "nowhere.py: no such file"),
        (["--dpo-loss", "nowhere:dpo"], "nowhere: no such module"),
        (["--dpo-loss", "losses.py:ipo"], "has no ipo; it has Settings, dpo, wrong, Trainer"),
        (["--dpo-loss", "losses.py:NUMBER"], "is of type int, no function"),
        (["--dpo-loss", "broken.py:f"], "line 2 of broken.py raises ZeroDivisionError"),
        (["--dpo-loss", "grammar.py:f"], "line 1 of grammar.py raises SyntaxError"),
        (["--dpo-loss", "leaves.py:f"], "line 2 of leaves.py raises SystemExit"),
        (["--dpo-loss", "losses.py:dpo(beta)"], "--dpo-loss dpo cannot be called"),
        (["--dpo-loss", "losses.py:dpo", "--beta", "-1"], "--beta must be a positive"),
        (["--sequence-logps", "losses.py:dpo", "--arguments", "beta"], "--sequence-logps beta is no input"),
        (["--dpo-loss", "losses.py:dpo(beta)", "--arguments", "beta"], "--arguments is for functions that"),
    ],
)
def test_bad_input_is_one_sentence(files, arguments, named, capsys):
    assert main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and named in err, err


def test_functions_of_modules_are_loaded(files):
    assert load_function("math:sin") is math.sin
    assert load_function("losses:dpo") is sys.modules.pop("losses").dpo
    assert load_function("./losses.py:dpo").__name__ == "dpo"


def test_the_readme_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    """The file, the command and its output stand there as they are."""
    section = README.split("## Conformance checks\n")[1].split("\n## ")[0]
    source, test = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    rest = re.sub(r"```python\n.*?```", "", section, flags=re.DOTALL)
    command, shown = re.findall(r"```(?:sh)?\n(.*?)```", rest, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("trainer.py").write_text(source)
    assert main(shlex.split(command.removeprefix("python -m dpo_minimal "))) == 1
    assert capsys.readouterr().out == shown
    Path("test_trainer.py").write_text(test)
    monkeypatch.syspath_prepend(tmp_path)
    names = runpy.run_path("test_trainer.py")
    with pytest.raises(AssertionError, match="an extra shift"):
        names["test_log_probabilities"]()
