"""`python -m dpo_minimal bandit`: DPO finds pi_ref exp(r / beta) / Z, from a table to a GPT-2.

Four trainings, each from the reference, each against a target known beforehand: a table on exact
preference probabilities, a table on sampled pairs, a GPT on exact probabilities, a table on rankings.
"""

from __future__ import annotations

import argparse
import copy
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..bandit import (
    Bandit,
    TabularPolicy,
    dpo_objective,
    plackett_luce_objective,
    random_bandit,
    safe_learning_rate,
)
from ..closed_form import kl_divergence, optimal_logps
from ..finite_data import FiniteDataLaw, finite_data_law, maximum_likelihood
from ..model import GPT, GPTConfig
from ..policy import Completions, EnumeratedPolicy, enumerate_completions
from ..preferences import (
    Rankings,
    all_sets,
    expected_pairs,
    expected_rankings,
    random_cycles,
    sample_pairs,
)
from ..runs import new_run_folder, write_arrays, write_json, write_records
from ..tables import load_table
from ..validation import InputError, check_count, check_positive
from .fit import Outcome, expected_reward, fit, float64_table, max_distance

# The table's training stops here: far below what anybody needs, far above float64's rounding.
TABULAR_BOUND = 1e-11
RANKED = 4  # completions a ranking holds

# The GPT's world. Five tokens and at most four of them make 341 completions a prompt; the width is far
# above V - 1 = 4, so every next-token distribution is within reach of the last layer.
VOCAB, EOS, MAX_LENGTH, PROMPT_LENGTH, GPT_PROMPTS = 5, 4, 4, 2, 4
GPT_SHAPE = GPTConfig(vocab_size=VOCAB, block_size=PROMPT_LENGTH + MAX_LENGTH, n_layer=2, n_head=4, n_embd=32)
SHARPNESS = 3.0  # final LayerNorm gain of the reference: its conditionals are then far from uniform
CYCLES = 4  # random rings of compared completions: 8 comparisons for each completion instead of 340
GPT_LEARNING_RATE = 7e-3  # Adam, warmed up over the first 4 % of the steps, then falling linearly to zero


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    world = parser.add_argument_group("world")
    world.add_argument("--prompts", type=int, metavar="X", help="prompts of the tabular world (default 8)")
    world.add_argument("--completions", type=int, metavar="Y", help="completions of each (default 16)")
    world.add_argument(
        "--table", metavar="FILE.csv",
        help="run the tabular experiments on your own world: columns prompt, completion, reward and, "
        "if not uniform, reference (a probability or a count)",
    )  # fmt: skip
    world.add_argument(
        "--comparisons", metavar="FILE.csv",
        help="train on your own comparisons instead: columns prompt, winner, loser and, optionally, count; "
        "writes ranking.csv with rewards, standard errors and the trained policy",
    )  # fmt: skip
    training = parser.add_argument_group("training")
    training.add_argument(
        "--beta", type=float, default=0.5,
        help="strength of the KL penalty (default %(default)s; the paper's 0.1 works too, but not being 1 "
        "is what matters here: at 1, forgetting beta goes unnoticed)",
    )  # fmt: skip
    training.add_argument("--pairs", type=int, metavar="N", help="pairs to sample (default 20000)")
    training.add_argument(
        "--steps", type=int,
        help="optimisation steps at most, of each experiment (default: 2000 for tables, which stop early "
        "once certified; 2500 for the GPT)",
    )  # fmt: skip
    training.add_argument(
        "--loss", choices=("dpo", "ipo"),
        help="with --comparisons: ipo has a finite optimum even where a completion never lost (default dpo)",
    )  # fmt: skip
    training.add_argument(
        "--prior", type=float, metavar="WINS",
        help="with --comparisons: add this many imaginary wins each way between any two completions",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, help="the same seed gives the same numbers (default 0)")
    run.add_argument("--output-dir", metavar="DIR", help="new folder to write to (default runs/bandit-NNN)")
    run.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    run.add_argument(
        "--quick", action="store_true",
        help="800 steps for the GPT instead of 2500: the same picture, less exact",
    )  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The checked options of one run, written to config.json."""

    beta: float
    pairs: int
    table_steps: int
    gpt_steps: int
    seed: int
    device: str


def run(args: argparse.Namespace) -> Path:
    """Check everything, then run the experiments and write the run folder, which is returned."""
    if args.comparisons is not None:
        from .ranking import run as run_ranking

        return run_ranking(args)
    for option in ("loss", "prior"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option} is used only with --comparisons; leave it out.")
    settings = _settings(args)
    world = _world(args, settings)
    data = sample_pairs(
        world.rewards, settings.pairs, slate=all_sets(world.exists), generator=_generator(settings, "pairs")
    )
    try:
        estimate = maximum_likelihood(data, world.exists, (world.prompts, world.completions))
    except InputError as error:
        raise InputError(f"--pairs {settings.pairs} are too few for this world: {error}") from None
    folder = new_run_folder(args.output_dir, "bandit")
    config = {"command": "bandit", **vars(args), **vars(settings), **versions()}
    write_json(folder / "config.json", config)

    X, Y = world.rewards.shape
    gpt = args.table is None
    print(f"Training towards pi* = pi_ref exp(r / beta) / Z with beta = {settings.beta:g}.\n")
    outcomes = []

    def note(text: str) -> None:
        print(f"{len(outcomes) + 1}. {text}", flush=True)

    note(f"tabular: {X} prompts x {Y} completions, every pair with its exact probability (float64).")
    outcomes.append(tabular(world, settings))
    note(f"finite: {settings.pairs} sampled pairs; the target is their maximum-likelihood estimate.")
    outcomes.append(finite(world, data, estimate, settings))
    if gpt:
        note(
            f"gpt: all completions of a GPT-2 for {GPT_PROMPTS} prompts, exact probabilities on a sparse "
            "graph of pairs (float32, judged in float64)."
        )
        outcomes.append(gpt_population(settings))
    size = ranking_size(world)
    note(f"plackett_luce: rankings of {size} with their exact probability (float64).")
    outcomes.append(plackett_luce(world, settings, size))

    law = finite_data_law(
        optimal_logps(world.ref_logps, world.rewards, beta=settings.beta),
        world.ref_logps, data, beta=settings.beta,
    )  # fmt: skip
    print("\n" + results_table(outcomes, law))
    _write(folder, outcomes)
    print(f"\nWrote {folder}/bandit.png, result.npz, metrics.jsonl and config.json.")
    return folder


def versions() -> dict[str, str]:
    """What a later reader needs to get the same numbers."""
    return {
        "dpo_minimal": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def check_device(device: str) -> None:
    """Raise InputError unless the device is there and has float64."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"--device {device}: choose cpu or cuda (or cuda:N).")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= torch.cuda.device_count():
        raise InputError(f"--device {device}: torch finds no such device on this machine; use cpu.")


def _settings(args: argparse.Namespace) -> Settings:
    check_positive("--beta", args.beta)
    check_device(args.device)
    pairs = 20_000 if args.pairs is None else args.pairs
    check_count("--pairs", pairs)
    if args.steps is not None:
        check_count("--steps", args.steps)
    seed = 0 if args.seed is None else args.seed
    if not 0 <= seed < 2**60:
        raise InputError(f"--seed must lie in [0, 2^60), got {seed}.")
    if args.quick and args.steps is not None:
        raise InputError("--quick and --steps both set the number of steps; give one of them.")
    if args.quick and args.table is not None:
        raise InputError("--quick shortens only the GPT's training, which --table leaves out; leave it out.")
    return Settings(
        beta=args.beta,
        pairs=pairs,
        table_steps=args.steps or 2000,
        gpt_steps=args.steps or (800 if args.quick else 2500),
        seed=seed,
        device=args.device,
    )


def _world(args: argparse.Namespace, settings: Settings) -> Bandit:
    if args.table is not None:
        for option in ("prompts", "completions"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option} is given by the file of --table; leave it out.")
        return load_table(args.table)
    prompts = 8 if args.prompts is None else args.prompts
    completions = 16 if args.completions is None else args.completions
    check_count("--prompts", prompts)
    check_count("--completions", completions, minimum=2)
    return random_bandit(prompts, completions, generator=_generator(settings, "world"))


def _generator(settings: Settings, purpose: str) -> torch.Generator:
    """An independent stream of random numbers for each purpose, so that one experiment's draws do not
    depend on whether another ran."""
    number = ("world", "pairs", "gpt", "rankings").index(purpose)
    return torch.Generator().manual_seed(4 * settings.seed + number)


# ----------------------------------------------------------------------------------- the four experiments


def tabular(world: Bandit, settings: Settings) -> Outcome:
    """The population objective of all pairs, on a table of logits; target pi* [D4.2]."""
    rankings = expected_pairs(world.rewards, all_sets(world.exists))
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=settings.beta)
    return _fit_table("tabular", world, rankings, optimal, "pi*", settings)


def finite(world: Bandit, data: Rankings, estimate: Tensor, settings: Settings) -> Outcome:
    """The objective of sampled pairs; target pi_ref exp(r_hat / beta) / Z of the estimate [D11.1]."""
    target = optimal_logps(world.ref_logps, estimate, beta=settings.beta)
    outcome = _fit_table("finite", world, data, target, "MLE", settings)
    return replace(outcome, rankings=data)  # with counts as weights, which the training normalised


def ranking_size(world: Bandit) -> int:
    """Rankings of four, or of as many completions as every prompt has."""
    return min(RANKED, int(world.exists.sum(-1).min()))


def plackett_luce(world: Bandit, settings: Settings, size: int) -> Outcome:
    """Rankings of `size` neighbours along random rings, all orders with their probability [D8.2]."""
    generator = _generator(settings, "rankings")
    slate = random_cycles(world.exists, cycles=2, size=size, generator=generator)
    rankings = expected_rankings(world.rewards, slate)
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=settings.beta)
    return _fit_table("plackett_luce", world, rankings, optimal, "pi*", settings, plackett_luce_objective)


def _fit_table(
    name: str, world: Bandit, rankings: Rankings, target_logps: Tensor, target: str, settings: Settings,
    objective=dpo_objective,
) -> Outcome:  # fmt: skip
    ref_logps, rewards, target_logps = (
        table.to(settings.device) for table in (world.ref_logps, world.rewards, target_logps)
    )
    rankings = rankings.normalised_by_prompt().to(settings.device)
    policy = TabularPolicy(ref_logps)
    learning_rate = safe_learning_rate(rankings, beta=settings.beta)
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    return fit(
        name, policy, optimizer, rankings,
        objective=objective, ref_logps=ref_logps, rewards=rewards, target_logps=target_logps, target=target,
        beta=settings.beta, steps=settings.table_steps, measure_every=5, stop_at_bound=TABULAR_BOUND,
    )  # fmt: skip


def gpt_world(settings: Settings) -> tuple[GPT, Tensor, Completions, Tensor, Rankings]:
    """The reference GPT, its prompts, all completions, their rewards, and the population of comparisons.

    Rewards are independent N(0, beta^2) for every completion: no structure that a network could guess,
    and a spread of pi* / pi_ref that is the same for every beta.
    """
    generator = _generator(settings, "gpt")
    with torch.random.fork_rng(devices=[]):  # GPT draws its weights from torch's global stream
        torch.manual_seed(4 * settings.seed + 2)
        reference = GPT(GPT_SHAPE)
    with torch.no_grad():
        reference.ln_f.weight.mul_(SHARPNESS)
    words = VOCAB - 1
    prompts = torch.randperm(words**PROMPT_LENGTH, generator=generator)[:GPT_PROMPTS].sort().values
    prompts = torch.stack([prompts // words, prompts % words], -1)
    completions = enumerate_completions(VOCAB, MAX_LENGTH, EOS)
    X, Y = GPT_PROMPTS, len(completions.ids)
    rewards = settings.beta * torch.randn(X, Y, generator=generator, dtype=torch.float64)
    slate = random_cycles(torch.ones(X, Y, dtype=torch.bool), cycles=CYCLES, generator=generator)
    return reference, prompts, completions, rewards, expected_pairs(rewards, slate)


def gpt_population(settings: Settings) -> Outcome:
    """The population objective on a GPT, all of whose completions are enumerated; target pi* [D9.1]."""
    reference, prompts, completions, rewards, rankings = gpt_world(settings)
    device = settings.device
    completions = Completions(*(field.to(device) for field in completions))
    policy = EnumeratedPolicy(copy.deepcopy(reference), prompts.to(device), completions).to(device)
    ref_logps, rewards, rankings = float64_table(policy), rewards.to(device), rankings.to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=GPT_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    steps = settings.gpt_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.04 * steps)) * (1 - step / steps)
    )
    return fit(
        "gpt", policy, optimizer, rankings, objective=dpo_objective, ref_logps=ref_logps, rewards=rewards,
        target_logps=optimal_logps(ref_logps, rewards, beta=settings.beta), target="pi*", beta=settings.beta,
        steps=steps, measure_every=max(1, steps // 50), scheduler=schedule,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- reporting


def results_table(outcomes: list[Outcome], law: FiniteDataLaw) -> str:
    """The table that the command prints, with a line of explanation for what is not obvious in it."""
    header = (
        f"{'experiment':<22}{'max|dlogp|':>11}{'bound':>10}{'TV':>9}{'KL(p|t)':>9}{'KL(t|p)':>9}"
        f"{'reward':>9}{'(best)':>9}{'KL(p|ref)':>10}{'(best)':>9}{'weight':>15}{'sec':>6}"
    )
    lines = [header, "-" * len(header)]
    for outcome in outcomes:
        lines.append(_row(outcome, outcome.target_logps, outcome.target, outcome.logp_bound.max().item()))
        if outcome.name == "finite":
            optimal = optimal_logps(outcome.ref_logps, outcome.rewards, beta=outcome.beta)
            lines.append(_row(outcome, optimal, "pi*", law.logp_limit.max().item()))
            distance = torch.where(law.logp_limit > 0, outcome.logps - optimal, 0).abs()
            excess = (distance / law.logp_limit.clamp(min=1e-300)).max()
    lines += [
        "",
        "max|dlogp|: largest |log policy - log target| in nats; bound: what the certificate proves about it",
        "  (for finite -> pi*: the statistical limit of the least certain completion, false alarms 1e-6);",
        "TV: total variation; p policy, t target; weight: mean gradient weight at the start and at the end.",
        f"Sampled pairs against pi*: the worst completion is at {excess:.0%} of its own limit; score "
        f"statistic {law.score:.1f}, expected {law.degrees}, limit {law.score_limit:.1f}.",
    ]
    return "\n".join(lines)


def _row(outcome: Outcome, target: Tensor, target_name: str, bound: float) -> str:
    logps, ref_logps, rewards = outcome.logps, outcome.ref_logps, outcome.rewards
    start, end = (outcome.records[k]["dpo/gradient_weight"] for k in (0, -1))
    variation = ((logps.exp() - target.exp()).abs().sum(-1) / 2).max().item()
    kls = (kl_divergence(logps, target).max().item(), kl_divergence(target, logps).max().item())
    return (
        f"{outcome.name + ' -> ' + target_name:<22}{max_distance(logps, target):>11.1e}{bound:>10.1e}"
        f"{variation:>9.1e}{kls[0]:>9.1e}{kls[1]:>9.1e}"
        f"{expected_reward(logps, rewards):>9.4f}{expected_reward(target, rewards):>9.4f}"
        f"{kl_divergence(logps, ref_logps).mean():>10.4f}{kl_divergence(target, ref_logps).mean():>9.4f}"
        f"{start:>8.3f}{end:>7.3f}{outcome.seconds:>6.1f}"
    )


def _write(folder: Path, outcomes: list[Outcome]) -> None:
    from ..plots import bandit_figure  # matplotlib is slow to import: not before it is needed

    arrays = {}
    for outcome in outcomes:
        tables = {
            "ref_logps": outcome.ref_logps, "rewards": outcome.rewards, "logps": outcome.logps,
            "beta": torch.tensor(outcome.beta, dtype=torch.float64), "logp_bound": outcome.logp_bound,
            "prompt": outcome.rankings.prompt, "order": outcome.rankings.order,
            "weight": outcome.rankings.weight,
        }  # fmt: skip
        arrays |= {f"{outcome.name}_{key}": table.numpy() for key, table in tables.items()}
    write_arrays(folder / "result.npz", arrays)
    write_records(
        folder / "metrics.jsonl",
        ({"experiment": outcome.name, **record} for outcome in outcomes for record in outcome.records),
    )
    bandit_figure(outcomes, folder / "bandit.png")
