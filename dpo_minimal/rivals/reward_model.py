"""A learned reward: a GPT body with one number at the end of a completion, fitted to preferences (Eq. 2).

Its head starts at zero, so that before the first step all completions have the same reward. The same network
with a number at each token is the value function of ppo.py.

But: what is done with the reward, by PPO (ppo.py) or by the closed form (closed_form.py).

Shapes: B prompts of a batch, K completions of each, N tokens or completions, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..losses import bradley_terry_loss
from ..model import GPT
from ..policy import SharedPromptBatch, pick, shared_prompt_batch, shared_prompt_states
from ..text.batches import Example, windows
from ..text.objectives import make_window
from ..train import Objective, Record, Window, average, make_optimizer, train
from ..validation import InputError, check_count, check_positive, check_seed

MICRO_SIZE = 16  # rows that go through the model together: of similar length, and few enough for a cache
SCORED_AT_ONCE = 64


class RewardModel(nn.Module):
    """A GPT body and a linear map from its hidden state to a number [D2.2].

    Args: body, the GPT to use; training alters it.
    """

    def __init__(self, body: GPT):
        super().__init__()
        self.body = body
        like = body.wte.weight
        self.head = nn.Linear(body.config.n_embd, 1, dtype=like.dtype, device=like.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: SharedPromptBatch) -> Tensor:
        """r(x, y) of K completions of each prompt, read at each one's last token, its end-of-text [D2.2].

        Prompts are read once, as in `shared_prompt_logps`. Returns (B, K), nats of log-odds; raises as there.
        """
        hidden, tokens = shared_prompt_states(self.body, batch)
        last = batch.completion_lengths.flatten().cumsum(0) - 1  # tokens come completion by completion
        return self.head(pick(hidden, tokens.place[last])).view(batch.completion_lengths.shape)

    def token_values(self, batch: SharedPromptBatch) -> Tensor:
        """V(x, y_<t) for each completion token y_t: a value of what was read before it was chosen [D7.7].

        Returns (N,) in the order of `policy.CompletionTokens`.
        """
        hidden, tokens = shared_prompt_states(self.body, batch)
        return self.head(pick(hidden, tokens.predictor)).squeeze(-1)


def reward_model_objective(model: RewardModel) -> Objective:
    """micro-batch of pairs, chosen first -> (mean of -log sigmoid(r_chosen - r_rejected) (Eq. 2), metrics)
    [D2.2].

    Metrics, means over pairs: rewards/chosen, rewards/rejected, rewards/margins, and rewards/accuracies, in
    which a tie counts one half, as a guess would.
    """

    def objective(micro: SharedPromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        if micro.completion_lengths.shape[-1] != 2:
            raise InputError("a reward model learns from pairs; give each prompt two completions.")
        chosen, rejected = model(micro).unbind(-1)
        margins = (chosen - rejected).detach()
        metrics = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": margins,
            "rewards/accuracies": (1 + margins.sign()) / 2,
        }
        loss = bradley_terry_loss(chosen, rejected).mean()
        return loss, {name: values.mean() for name, values in metrics.items()}

    return objective


def fit_reward_model(
    body: GPT,
    train_rows: Sequence[Example],
    held_out: Sequence[Example],
    *,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    seed: int,
    look_every: int,
    max_grad_norm: float | None = 1.0,
) -> tuple[RewardModel, list[Record]]:
    """Fit a reward model to pairs, and keep the weights that judged held-out pairs best [D2.2].

    Args:
        body: where it starts, usually the SFT model; a copy learns, all of it, also of a frozen one.
        train_rows, held_out: pairs, chosen first.
        learning_rate: AdamW's, without weight decay; batch_size: pairs a step.
        look_every: steps between two evaluations on the held-out pairs; the last step is followed by one too.
    Returns (model, records): the weights with the highest held-out accuracy, the earlier where two are equal;
        a record a step as from `train`, some with eval_loss, eval_rewards/accuracies, ... of the weights
        after the step.
    Raises: InputError: no rows on a side, an option out of range.
    """
    for name, rows in (("training", train_rows), ("held-out", held_out)):
        if not rows:
            raise InputError(f"there are no {name} pairs; give some.")
    check_positive("learning_rate", learning_rate)
    for name, count in (("batch_size", batch_size), ("epochs", epochs), ("look_every", look_every)):
        check_count(name, count)
    check_seed("seed", seed)
    model = RewardModel(copy.deepcopy(body).requires_grad_(True))
    objective = reward_model_objective(model)
    device = str(body.wte.weight.device)
    (held_out_window,) = _windows(held_out, len(held_out), device, seed=0, epochs=1)
    steps = _windows(train_rows, batch_size, device, seed=seed, epochs=epochs)
    last = epochs * -(-len(train_rows) // batch_size)
    optimizer = make_optimizer(model.parameters(), "adamw", learning_rate)
    best, best_weights, records = -1.0, {}, []
    for record in train(objective, optimizer, steps, max_grad_norm=max_grad_norm):
        if record["step"] % look_every == 0 or record["step"] == last:
            found = average(objective, held_out_window)
            record |= {f"eval_{name}": value for name, value in found.items()}
            if found["rewards/accuracies"] > best:
                best, best_weights = found["rewards/accuracies"], copy.deepcopy(model.state_dict())
        records.append(record)
    model.load_state_dict(best_weights)
    return model, records


def _windows(rows: Sequence[Example], size: int, device: str, *, seed: int, epochs: int) -> Iterator[Window]:
    """The windows of all epochs, each laid out when its step comes: together they take much memory."""
    size = min(size, len(rows))
    for epoch in range(epochs):
        for step in windows(rows, window_size=size, micro_size=min(size, MICRO_SIZE), seed=seed, epoch=epoch):
            window = make_window(rows, step, None, dtype="float32", device=device)
            # Shares of a loss per pair; make_window counts tokens.
            yield window._replace(shares=[len(micro) / sum(map(len, step)) for micro in step])


# ------------------------------------------------------------------------------------------------ rewards


def score_completions(
    model: RewardModel, prompts: Sequence[list[int]], completions: Sequence[list[int]]
) -> Tensor:
    """r(x, y) of N prompts with a completion each: (N,) float32 on the CPU, no gradient [D2.2].

    Raises InputError: lists of different length, none, or one that is empty.
    """
    if len(prompts) != len(completions) or not prompts:
        raise InputError(f"got {len(prompts)} prompts and {len(completions)} completions; give one for each.")
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]) + len(completions[n]))
    rewards = torch.empty(len(prompts))
    with torch.no_grad():
        for start in range(0, len(order), SCORED_AT_ONCE):
            rows = order[start : start + SCORED_AT_ONCE]
            batch = shared_prompt_batch([prompts[n] for n in rows], [[completions[n]] for n in rows])
            rewards[rows] = model(batch.to(model.head.weight.device))[:, 0].float().cpu()
    return rewards


def normalised_reward(
    model: RewardModel, prompts: Sequence[list[int]], samples: Sequence[Sequence[list[int]]]
) -> Callable[[Sequence[list[int]], Sequence[list[int]]], Tensor]:
    """r(x, y) - E_ref[r(x, y')] as PPO takes it, (prompts, completions) -> (N,) [D2.2].

    The paper's convention, E_{y|x} r(x, y) = 0 for each x. A loss on pairs leaves such a shift of each prompt
    undetermined; it moves no optimum, but makes rewards of different prompts comparable.

    Args: prompts: X, those that will be asked for; samples: of each, n completions that the reference drew.
    Raises: InputError: here, counts that do not fit; later, a prompt that is not among these.
    Source: Rafailov et al. (2023), section 3.
    """
    count = len(samples[0]) if samples else 0
    if not prompts or len(prompts) != len(samples) or count == 0 or any(len(s) != count for s in samples):
        raise InputError("normalising needs the same number of samples, at least one, for each prompt.")
    flat = [prompt for prompt in prompts for _ in range(count)]
    means = score_completions(model, flat, [y for some in samples for y in some]).view(-1, count).mean(-1)
    mean_of = dict(zip(map(tuple, prompts), means.tolist()))

    def reward(asked: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
        for number, prompt in enumerate(asked, start=1):
            if tuple(prompt) not in mean_of:
                raise InputError(f"prompt {number} has no samples to normalise with; draw some for it.")
        return score_completions(model, asked, completions) - torch.tensor([mean_of[tuple(x)] for x in asked])

    return reward
