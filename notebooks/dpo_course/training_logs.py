"""Six trainings of small policies and what they log: notebook 11 asks what is the matter with each.

Their records have the names, and the file the form, that TRL's trainer gives them. What is planted where is
told by `PLANTED`; a repaired training is the same without it.

But: what a log shows is found by `dpo_minimal.diagnose`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dpo_minimal as dpo

Record = dict[str, float]
BETA = 0.5  # which every run claims
PROMPTS, BATCH, EVERY = 24, 64, 10
FEATURES = torch.tensor(
    [1.0, 0.0, 2.0, 4.0], dtype=torch.float64
)  # of four completions; the last is in no pair


class Run(NamedTuple):
    """One training on pairs.

    Fields: beta, by which it really multiplies; another_reference, the reference is not where the policy
    starts; follows, the reference is the policy itself; shared, completions have one weight in common, that
    of their feature, instead of a logit each; people, so many label each pair; steps of gradient descent.
    """

    beta: float = BETA
    another_reference: bool = False
    follows: bool = False
    shared: bool = False
    people: int = 400
    steps: int = 400

    @property
    def rate(self) -> float:
        """The learning rate: the same pace for each beta, and smaller for a weight that all pairs pull."""
        return 6 / self.beta**2 / (PROMPTS * 2 if self.shared else 1)


PLANTED = {
    "A": {"follows": True},
    "B": {},
    "C": {"another_reference": True},
    "D": {"people": 1},
    "E": {"beta": 0.1},
    "F": {"shared": True},
}
STEPS = {"D": 1200}  # the others have as many as a run has by itself


def write_log(letter: str, *, repaired: bool = False) -> Path:
    """Train a run and write its log as `trainer_state.json`, in a new folder; return its path."""
    steps = STEPS.get(letter, Run().steps)
    records = train(Run(steps=steps, **({} if repaired else PLANTED[letter])))
    path = Path(tempfile.mkdtemp()) / "trainer_state.json"
    path.write_text(json.dumps({"log_history": records}, indent=1), encoding="utf-8")
    return path


def train(run: Run) -> list[Record]:
    """Records of every tenth step's batch, and of held-out pairs before training and after each quarter."""
    generator = torch.Generator().manual_seed(0)
    start, another = torch.randn(2, PROMPTS, 4, generator=generator, dtype=torch.float64)
    start[:, :3] -= FEATURES[:3]  # the worse ones are likelier at first
    pairs, held_out = labelled(run.people, generator), labelled(8, generator)
    parameters = (torch.zeros(1, dtype=torch.float64) if run.shared else start.clone()).requires_grad_()
    records = []
    for step in range(run.steps + 1):
        policy = (start + parameters * FEATURES if run.shared else parameters).log_softmax(-1)
        reference = (start + another if run.another_reference else start).log_softmax(-1)
        reference = policy.detach() if run.follows else reference
        if step % (run.steps // 4) == 0:
            _, told = _of_batch(run.beta, held_out, policy, reference)
            records.append({"step": step} | {f"eval_{name}": value for name, value in told.items()})
        drawn = torch.multinomial(pairs.weight, BATCH, replacement=True, generator=generator)
        batch = dpo.Rankings(pairs.prompt[drawn], pairs.order[drawn], torch.ones(BATCH))
        loss, told = _of_batch(run.beta, batch, policy, reference)
        if step % EVERY == 0 and step < run.steps:
            records.append({"step": step + 1, **told})
        (gradient,) = torch.autograd.grad(loss, parameters)
        parameters.data -= run.rate * gradient
    return records


def chances() -> Tensor:
    """(2 PROMPTS,) probabilities that people prefer the first of each pair to the second [D2.1]."""
    generator = torch.Generator().manual_seed(1)
    rewards = FEATURES - 1 + 0.5 * torch.randn(PROMPTS, 4, generator=generator, dtype=torch.float64)
    return torch.sigmoid(rewards[:, :2] - rewards[:, 1:3]).flatten()


def labelled(people: int, generator: torch.Generator) -> dpo.Rankings:
    """Two pairs of each prompt, y1 with y2 and y2 with y3, each labelled by so many people."""
    won = torch.binomial(torch.full((2 * PROMPTS,), float(people)).double(), chances(), generator=generator)
    first = torch.tensor([0, 1]).repeat(PROMPTS)
    order = torch.stack([torch.stack([first, first + 1], -1), torch.stack([first + 1, first], -1)]).flatten(
        0, 1
    )
    prompt = torch.arange(PROMPTS).repeat_interleave(2).repeat(2)
    return dpo.Rankings(prompt, order, torch.cat([won, people - won]))


def _of_batch(beta: float, pairs: dpo.Rankings, policy: Tensor, reference: Tensor) -> tuple[Tensor, Record]:
    """The mean loss, and what a trainer logs: means over the pairs."""
    chosen, rejected = pairs.gather(policy).T
    out = dpo.dpo_loss(chosen, rejected, *pairs.gather(reference).T, beta=beta)
    margins = out.chosen_rewards - out.rejected_rewards
    logged = {
        "loss": out.losses, "rewards/chosen": out.chosen_rewards, "rewards/rejected": out.rejected_rewards,
        "rewards/margins": margins, "rewards/accuracies": (margins > 0).double(),
        "logps/chosen": chosen, "logps/rejected": rejected,
    }  # fmt: skip
    share = pairs.normalised().weight
    return share @ out.losses, {name: (share @ values.detach()).item() for name, values in logged.items()}
