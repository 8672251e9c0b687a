"""PPO for a GPT: each token is an action, and the completion's reward comes with the last one.

    an iteration:  draw prompts -> sample completions -> reward, reference, value: once, without gradient
                   -> several gradient steps on those samples, of the policy and of the value function

The reward of a token is -beta (log pi - log pi_ref), and the last one gets the completion's reward on top. So
the sum over a completion is the penalised reward of Eq. 3, whose mean is the objective.

But: no rewards for single tokens, no discount (gamma = lambda = 1: a reward counts the same however many
tokens come before it), no entropy bonus, no clipping of values, no samples from older policies.

Shapes: n completions of an iteration, N tokens of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..generation import generate
from ..model import GPT
from ..policy import SharedPromptBatch, shared_prompt_batch, shared_prompt_token_logps
from ..train import Record, make_optimizer
from ..validation import InputError, check_count, check_positive, check_seed
from .baselines import AdaptiveKL, clipped_surrogate
from .reward_model import RewardModel

Reward = Callable[[Sequence[list[int]], Sequence[list[int]]], Tensor]


class PPOSettings(NamedTuple):
    """How to train [D7.7]."""

    iterations: int  # rounds of sampling
    prompts: int  # completions of each round, one of a prompt drawn at random
    epochs: int  # gradient steps on each round's samples, each on all of them
    micro_size: int  # completions that go through a model together; it changes speed and rounding only
    learning_rate: float  # AdamW's, without weight decay; so is the next
    value_learning_rate: float
    clip: float  # of pi / pi_old around 1
    kl_coefficient: float  # beta, or where it starts if there is a target
    target_kl: float | None  # nats a completion, to which beta is steered; None keeps beta
    max_new_tokens: int  # where a sample is cut; it gets its reward at its last token like any other
    max_grad_norm: float | None  # of policy and value each; None clips nothing
    seed: int  # of prompts and samples


class Rollout(NamedTuple):
    """Some completions of an iteration and what is known of their N tokens, without gradient [D7.7]."""

    batch: SharedPromptBatch  # K = 1 completion a row
    old_logps: Tensor  # (N,) under the policy that drew them
    log_ratios: Tensor  # (N,) old_logps - reference's
    returns: Tensor  # (N,) penalised reward from this token on
    advantages: Tensor  # (N,) returns - values


def train_ppo(
    policy: GPT,
    reference: GPT,
    prompts: Sequence[list[int]],
    reward: Reward,
    settings: PPOSettings,
    *,
    eos: int,
) -> Iterator[Record]:
    """Maximise E[r] - beta KL(pi || pi_ref) (Eq. 3) from samples [D7.7].

    Advantages are not divided by their deviation, as implementations often do: at the optimum all of them
    vanish. On film reviews, still far from there after 60 iterations, dividing made no difference. The loss
    is a sum over tokens and a mean over completions: at ratio 1 its gradient is that of the objective,
    whatever the lengths.

    Args:
        policy: altered in place; usually starts as a copy of the reference.
        reference: only read, and scored once an iteration.
        prompts: token ids, drawn from with replacement.
        reward: (n prompts, n completions) -> (n,) rewards; called once an iteration. Completions include
            their end-of-text where they ended by themselves.
        settings: see `PPOSettings`.
        eos: the end-of-text id.
    Yields:
        A record an iteration, after its gradient steps. Of the samples, i.e. of the policy before the steps:
        step, reward, kl/policy_reference (mean of sampled log-ratios, nats a completion), kl/coefficient,
        length (tokens), ppo/value_loss and ppo/explained_variance (share of the variance of returns) of the
        value before the steps. Of the last step: ppo/clip_fraction (share of tokens whose ratio had left the
        clip range), grad_norm of the policy before clipping.
    Raises: InputError: an option out of range, a frozen policy, policy and reference one object, rewards of
        another shape or not finite, a gradient that is not finite.
    Source: Schulman et al. (2017); Ziegler et al. (2019), "Fine-Tuning Language Models from Human
        Preferences".
    """
    _check(policy, reference, prompts, settings)
    value = value_function(reference)
    optimizers = [
        make_optimizer(policy.parameters(), "adamw", settings.learning_rate),
        make_optimizer(value.parameters(), "adamw", settings.value_learning_rate),
    ]
    controller = AdaptiveKL(settings.kl_coefficient, settings.target_kl)
    generator = torch.Generator(policy.wte.weight.device).manual_seed(settings.seed)
    for step in range(1, settings.iterations + 1):
        coefficient = controller.coefficient
        rollouts, record = collect(
            policy, reference, value, prompts, reward, settings, coefficient, eos=eos, generator=generator
        )
        for _ in range(settings.epochs):
            last = _gradient_step(policy, value, optimizers, rollouts, settings, step)
        controller.update(record["kl/policy_reference"])
        yield {"step": step, **record, **last}


# On film reviews (4 layers, 128 wide, 60 iterations) a value function of 1, 2 and 4 layers reached the same
# objective and explained the same share of returns, 0.2 to 0.3; one layer takes a quarter of the time.
VALUE_LAYERS = 1


def value_function(reference: GPT) -> RewardModel:
    """The reference's embeddings and first layer, copied, with a head that starts at zero [D7.7]."""
    body = copy.deepcopy(reference).requires_grad_(True)
    body.h = body.h[:VALUE_LAYERS]
    return RewardModel(body)


def collect(
    policy: GPT,
    reference: GPT,
    value: RewardModel,
    prompts: Sequence[list[int]],
    reward: Reward,
    settings: PPOSettings,
    coefficient: float,
    *,
    eos: int,
    generator: torch.Generator,
) -> tuple[list[Rollout], Record]:
    """Draw completions and evaluate every network on them once [D7.7].

    Args: as `train_ppo`; coefficient beta; generator on the policy's device.
    Returns: rollouts of micro_size completions of similar length, and what is logged of them.
    """
    device = policy.wte.weight.device
    count = settings.prompts
    drawn = torch.randint(len(prompts), (count,), generator=generator, device=device).tolist()
    asked = [prompts[index] for index in drawn]
    length = settings.max_new_tokens
    completions = generate(policy, asked, max_new_tokens=length, eos=eos, generator=generator)
    rewards = _checked(reward(asked, completions), count).to(device)
    order = sorted(range(count), key=lambda n: len(asked[n]) + len(completions[n]))
    rollouts = []
    with torch.no_grad():
        for start in range(0, count, settings.micro_size):
            rows = order[start : start + settings.micro_size]
            batch = shared_prompt_batch([asked[n] for n in rows], [[completions[n]] for n in rows]).to(device)
            old_logps, tokens = shared_prompt_token_logps(policy, batch)
            log_ratios = old_logps - shared_prompt_token_logps(reference, batch)[0]
            paid = token_rewards(log_ratios, rewards[rows], tokens.sequence, coefficient=coefficient)
            returns = returns_to_go(paid, tokens.sequence)
            advantages = returns - value.token_values(batch)
            rollouts.append(Rollout(batch, old_logps, log_ratios, returns, advantages))
    returns, advantages, log_ratios = (
        torch.cat([getattr(rollout, name) for rollout in rollouts]).double()
        for name in ("returns", "advantages", "log_ratios")
    )
    error = advantages.square().mean()
    return rollouts, {
        "reward": rewards.mean().item(),
        "kl/policy_reference": log_ratios.sum().item() / count,
        "kl/coefficient": coefficient,
        "length": len(returns) / count,
        "ppo/value_loss": error.item(),
        "ppo/explained_variance": (1 - error / returns.var(correction=0).clamp(min=1e-12)).item(),
    }


def token_rewards(log_ratios: Tensor, rewards: Tensor, sequence: Tensor, *, coefficient: float) -> Tensor:
    """-beta log(pi / pi_ref) of each token; a completion's last token gets its reward on top [D7.7].

    Args: log_ratios (N,), tokens completion by completion; rewards (n,); sequence (N,) whose a token is.
    Returns: (N,); over a completion they sum to its penalised reward.
    """
    last = torch.cat([sequence[1:] != sequence[:-1], sequence.new_ones(1, dtype=torch.bool)])
    return torch.where(last, rewards[sequence].to(log_ratios.dtype), 0) - coefficient * log_ratios


def returns_to_go(rewards: Tensor, sequence: Tensor) -> Tensor:
    """(N,) rewards of tokens, completion by completion -> (N,) sums from each to its completion's end [D7.7].

    Example:
        >>> returns_to_go(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 1]))
        tensor([7., 6., 4., 8.])
    """
    wide = rewards.double()  # a running sum over all completions: differences of it lose digits
    from_here = wide.flip(0).cumsum(0).flip(0)
    totals = wide.new_zeros(int(sequence[-1]) + 1).index_add(0, sequence, wide)
    after = totals.flip(0).cumsum(0).flip(0) - totals  # of all later completions
    return (from_here - after[sequence]).to(rewards.dtype)


def ppo_losses(
    policy: GPT, value: RewardModel, rollout: Rollout, *, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The two losses of some completions, each a sum over their tokens [D7.7].

    Returns: clipped surrogate; squared errors of the values; how many tokens' ratios left the clip range.
    """
    logps, _ = shared_prompt_token_logps(policy, rollout.batch)
    surrogate = clipped_surrogate(logps, rollout.old_logps, rollout.advantages, clip=clip)
    errors = (value.token_values(rollout.batch) - rollout.returns).square()
    outside = ((logps.detach() - rollout.old_logps).exp() - 1).abs() > clip
    return surrogate.sum(), errors.sum(), outside.sum()


def _gradient_step(
    policy: GPT,
    value: RewardModel,
    optimizers: list[torch.optim.Optimizer],
    rollouts: list[Rollout],
    settings: PPOSettings,
    step: int,
) -> Record:
    """One step of both networks on all samples of an iteration."""
    tokens = sum(len(rollout.returns) for rollout in rollouts)
    clipped = 0
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    for rollout in rollouts:
        surrogate, errors, outside = ppo_losses(policy, value, rollout, clip=settings.clip)
        (surrogate / settings.prompts + errors / tokens).backward()  # they share no parameter
        clipped += int(outside)
    norms = [
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm or float("inf")).item()
        for network in (policy, value)
    ]
    if not all(map(math.isfinite, norms)):
        raise InputError(
            f"iteration {step}: gradient norms {norms[0]:.4g} of the policy and {norms[1]:.4g} of the value "
            "function; lower the learning rates."
        )
    for optimizer in optimizers:
        optimizer.step()
    return {"ppo/clip_fraction": clipped / tokens, "grad_norm": norms[0]}


def _checked(rewards: Tensor, count: int) -> Tensor:
    rewards = torch.as_tensor(rewards).detach()
    if rewards.shape != (count,) or not rewards.is_floating_point() or not rewards.isfinite().all():
        raise InputError(
            f"the reward must give a finite float for each of {count} completions, got shape "
            f"{tuple(rewards.shape)} of {rewards.dtype}."
        )
    return rewards


def _check(policy: GPT, reference: GPT, prompts: Sequence[list[int]], settings: PPOSettings) -> None:
    for name in ("iterations", "prompts", "epochs", "micro_size", "max_new_tokens"):
        check_count(name, getattr(settings, name))
    for name in ("learning_rate", "value_learning_rate", "clip", "kl_coefficient"):
        check_positive(name, getattr(settings, name))
    for name in ("target_kl", "max_grad_norm"):
        if getattr(settings, name) is not None:
            check_positive(name, getattr(settings, name))
    check_seed("seed", settings.seed)
    if not prompts:
        raise InputError("PPO needs at least one prompt.")
    if policy is reference:
        raise InputError("policy and reference are one object; give PPO a copy of it to train.")
    if not any(weight.requires_grad for weight in policy.parameters()):
        raise InputError("all weights of the policy are frozen; call requires_grad_(True) on it.")
