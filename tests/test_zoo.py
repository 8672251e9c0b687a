"""Records: what they say of a loss is so, and a loss that is added at run time appears wherever losses do.

Values and pulls are written out a second time in test_losses.py and test_relatives.py. Here every record is
held to what can be said of any loss: its pulls are its derivatives, its start and its optimum are its own.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from planting import CAUGHT, plant
from test_losses import f64
from torch import Tensor

from dpo_minimal import (
    InputError,
    Rankings,
    all_sets,
    expected_pairs,
    expected_rankings,
    ipo_loss,
    maximum_likelihood,
    random_bandit,
    zoo,
)
from dpo_minimal.__main__ import main
from dpo_minimal.bandit import loss_on_table
from dpo_minimal.experiments.frontier import pair_methods
from dpo_minimal.experiments.text import dpo as command
from dpo_minimal.losses import (
    DPO,
    RANGES,
    Loss,
    Option,
    PreferenceLoss,
    _preference_loss,
    dpo_loss,
    plackett_luce_preference_loss,
)
from dpo_minimal.text.objectives import loss_options
from dpo_minimal.zoo import (
    LOSSES,
    TRL,
    ipo,
    kto,
    margins,
    noise,
    orpo,
    rpo,
    simpo,
    table_of_losses,
    unlikelihood,
)

INSIDE = {"> 0": (0.7, 2.0), ">= 0": (0.0, 0.7), "[0, 1/2)": (0.0, 0.3), "[0, 1]": (0.0, 0.6)}
INSIDE |= {"(0, 1/2)": (0.01, 0.3), "(0, 1]": (0.05, 0.6)}


def settings_of(loss: Loss) -> list[dict[str, float]]:
    """Two values for each option, the lowest that there is among them."""
    return [{option.name: INSIDE[option.range][k] for option in loss.options} for k in (0, 1)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------- the pulls

K = 3  # of rankings: their middle answer is pulled as well, but the record tells of best and worst
ROWS = {
    "near": -(0.1 + 4 * torch.rand(6, K, generator=generator(0), dtype=torch.float64)),
    # log-ratios of hundreds, either way, and a completion that is all but certain
    "far": f64([[-1e3, -2, -1], [-2, -1, -1e3], [-300, -700, -300], [-1e-9, -3, -9], [-5, -2, -1e-6]]),
}


def on_rows(loss: Loss, policy: Tensor, options: dict[str, float]) -> PreferenceLoss:
    """The loss of rows (B, K), beside a reference and token counts that are the same every time."""
    count, size = len(policy), K if loss.rows == "rankings" else 2
    reference = -(0.1 + 4 * torch.rand(count, K, generator=generator(1), dtype=torch.float64))
    lengths = torch.randint(1, 6, (count, K), generator=generator(2)).double()
    columns = [0, K - 1] if size == 2 else [*range(K)]
    tables = {"policy": policy, "reference": reference, "lengths": lengths}
    given = {name: lambda table=table: table[:, columns] for name, table in tables.items()}
    return loss.on(given | {"kl_estimate": lambda: f64(0.3)}, options)


def check_pulls(name: str, rows: str = "near") -> None:
    """Both weights against autograd, and against central differences of the loss.

    Autograd's derivative is the same formula up to some twenty roundoffs of it and, as the error of a margin
    near 1e3, of 1e3; differences with a step of 2^-16 are off by its square, and by the rounding of losses.
    """
    loss, policy = LOSSES[name], ROWS[rows]
    for options in settings_of(loss):
        leaf = policy.clone().requires_grad_()
        out = on_rows(loss, leaf, options)
        (gradient,) = torch.autograd.grad(out.losses.sum(), leaf)
        assert not any(readout.requires_grad for readout in out[1:])
        for weights, column, sign in ((out.chosen_weights, 0, -1), (out.rejected_weights, K - 1, 1)):
            assert weights.shape == (len(policy),) and weights.isfinite().all()
            torch.testing.assert_close(weights, sign * gradient[:, column], rtol=1e-11, atol=1e-12)
            if rows == "near" and not loss.reads_batch:  # of those, test_pointwise_losses.py moves one row
                step = torch.zeros_like(policy)
                step[:, column] = 2.0**-16
                up, down = (on_rows(loss, policy + side * step, options).losses for side in (1, -1))
                torch.testing.assert_close(weights, sign * (up - down) * 2.0**15, rtol=1e-7, atol=1e-8)
        assert torch.equal(out.gradient_weights, out.chosen_weights)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_two_weights_are_the_derivatives(name, rows):
    """Hand-derived, of every loss, whatever its options: also for margins of hundreds and for certainty."""
    check_pulls(name, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orpos_weights_of_certain_completions_are_what_is_applied(dtype):
    """[D12.5] Where the odds are infinite the clamp stops the gradient, and the weight says the same."""
    w, l = f64([0, -1, 0, -1e-12]).to(dtype).requires_grad_(), f64([-1, 0, 0, -1]).to(dtype).requires_grad_()
    out = orpo.orpo_loss(w, l, torch.ones_like(w), torch.ones_like(l), lam=0.5)
    on_w, on_l = torch.autograd.grad(out.losses.sum(), (w, l))
    close = {"rtol": 64 * torch.finfo(dtype).eps, "atol": 0}  # odds near e^36 are off by 36 roundoffs
    torch.testing.assert_close(out.chosen_weights, -on_w, **close)
    torch.testing.assert_close(out.rejected_weights, on_l, **close)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "lengths" not in loss.reads])
def test_only_what_is_no_function_of_the_margin_pulls_unequally(name):
    """Without token counts, chosen and rejected pull alike but for those named here."""
    out = on_rows(LOSSES[name], ROWS["near"], settings_of(LOSSES[name])[1])
    alike = torch.equal(out.chosen_weights, out.rejected_weights)
    each_by_itself = {"nca", "sppo", "apo_zero", "apo_down", "bco"}
    of_scores = {"forward_kl", "jensen_shannon", "alpha_divergence", "chi2_kl"}  # not of log-ratios [D11.12]
    others = {"unlikelihood", "kto", "plackett_luce", "dpop"}
    assert alike == (name not in others | each_by_itself | of_scores)


# ----------------------------------------------------------------------------------- start, options, optimum


@pytest.mark.parametrize("name", LOSSES)
def test_the_start_is_the_loss_where_policy_is_reference(name):
    """And it exists exactly for losses with a reference, but where the policy's own likelihood is added."""
    loss = LOSSES[name]
    assert (loss.start is not None) == ("reference" in loss.reads and name != "rpo")
    for options in settings_of(loss) if loss.start else ():
        for size in (2, 4) if loss.rows == "rankings" else (2,):
            row = -torch.rand(3, size, generator=generator(3), dtype=torch.float64)
            tables = {"policy": row, "reference": row, "lengths": torch.full_like(row, 5)}
            given = {key: lambda table=table: table for key, table in tables.items()}
            found = loss.on(given | {"kl_estimate": lambda: 0.0}, options).losses
            assert found.tolist() == pytest.approx([loss.start(size, **options)] * 3, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_the_range_of_an_option_is_that_of_the_function(name):
    """What the command line takes the function takes, and the reverse; a default lies inside."""
    loss, data = LOSSES[name], expected_pairs(WORLD.rewards, all_sets(WORLD.exists))
    data = once(data) if loss.reads_batch else data
    good = settings_of(loss)[1]
    for option in loss.options:
        if option.default is not None:
            RANGES[option.range](option.name, option.default)
        for value in (-0.1, 0.0, 1e-3, 0.4999, 0.5, 1.0, 1.01, 50.0, math.inf, math.nan):
            refused = []
            for call in (
                lambda o=option, v=value: RANGES[o.range](o.name, v),
                lambda o=option, v=value: loss_on_table(
                    loss, WORLD.ref_logps, WORLD.ref_logps, data, **good | {o.name: v}
                ),
            ):
                try:
                    call()
                except InputError:
                    refused.append(True)
                else:
                    refused.append(False)
            assert refused[0] == refused[1], (option.name, value)


WORLD = random_bandit(2, 4, generator=generator(4))
LENGTHS = torch.tensor([[1.0, 2, 3, 5], [4, 1, 2, 2]], dtype=torch.float64)
OPTIMA = [name for name, loss in LOSSES.items() if callable(loss.optimum)]


def comparisons(loss: Loss) -> Rankings:
    """Exact preferences, a tenth of them reversed, for which every loss that can have an optimum has one."""
    if loss.rows == "rankings":
        return expected_rankings(WORLD.rewards, all_sets(WORLD.exists, size=3))
    return expected_pairs(WORLD.rewards / 2, all_sets(WORLD.exists), flip_probability=0.1)


def once(data: Rankings) -> Rankings:
    """Each of them once, as a loss that reads its batch needs them."""
    return data._replace(weight=torch.ones_like(data.weight))


def check_optimum(name: str) -> None:
    """There the gradient in the logits vanishes, and a little beside it it does not; no loss is lower."""
    loss, data = LOSSES[name], comparisons(LOSSES[name])
    options = {option.name: min(option.default, 0.1) for option in loss.options}
    lengths = {"lengths": LENGTHS} if "lengths" in loss.reads else {}
    best = loss.optimum(data, WORLD.ref_logps, **lengths, **options)
    assert best.logsumexp(-1).abs().max() <= 1e-12

    def mean(theta: Tensor) -> Tensor:
        out = loss_on_table(loss, theta.log_softmax(-1), WORLD.ref_logps, data, lengths=LENGTHS, **options)
        return data.weight @ out.losses

    if name == "hinge":  # no gradient at a kink; but the loss is convex, so that near points are enough
        near = best + 1e-3 * torch.randn(200, *best.shape, generator=generator(6), dtype=best.dtype)
        assert min(mean(theta) for theta in near) > mean(best)
        return
    theta = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean(theta), theta)
    # Newton ends where scores move by less than 1e-8, squared; weights reach 1 / beta = 10
    assert gradient.abs().max() <= 1e-11
    moved = (best + 0.1 * torch.randn(best.shape, generator=generator(5), dtype=best.dtype)).requires_grad_()
    (gradient,) = torch.autograd.grad(mean(moved), moved)
    assert gradient.abs().max() > 1e-4 and mean(moved) > mean(best)


@pytest.mark.parametrize("name", OPTIMA)
def test_the_optimum_is_one(name):
    """Of every record that has a formula, on a table with reversed labels and uneven lengths."""
    check_optimum(name)


@pytest.mark.parametrize("name", OPTIMA)
def test_the_optimum_of_a_prompt_is_that_of_it_alone(name):
    """Whatever stands beside it: a prompt where nothing is preferred, which is solved at once, with a
    completion less."""
    loss = LOSSES[name]
    size = 3 if loss.rows == "rankings" else 2
    options = {option.name: min(option.default, 0.1) for option in loss.options}
    exists = torch.tensor([[True] * 4, [True, True, True, False]])
    rewards = torch.stack([WORLD.rewards[0] / 2, torch.zeros(4).double()])
    ref = WORLD.ref_logps.masked_fill(~exists, -math.inf).log_softmax(-1)
    population = expected_rankings if loss.rows == "rankings" else expected_pairs

    def optimum(rows: slice, columns: slice) -> Tensor:
        lengths = {"lengths": LENGTHS[rows, columns]} if "lengths" in loss.reads else {}
        data = population(rewards[rows, columns], all_sets(exists[rows, columns], size=size))
        return loss.optimum(data, ref[rows, columns], **lengths, **options)

    together = optimum(slice(0, 2), slice(0, 4))
    first, second = optimum(slice(0, 1), slice(0, 4)), optimum(slice(1, 2), slice(0, 3))
    # Newton's ends, as above; at beta = 0.1 rewards of size 1 are log-ratios of size 10
    torch.testing.assert_close(together[:1], first, rtol=0, atol=1e-11)
    torch.testing.assert_close(together[1:, :3], second, rtol=0, atol=1e-11)
    assert together[1, 3] == -math.inf


@pytest.mark.parametrize("name", OPTIMA)
def test_an_optimum_that_does_not_exist_is_refused(name):
    """A completion that never won has no finite reward, and Unlikelihood's share of it is negative; cDPO,
    IPO, SPPO and the hinge have an optimum all the same. One that was never compared has no reward under any
    loss, and under Unlikelihood, which does not tilt a reference, probability 0."""
    loss = LOSSES[name]
    options = {option.name: min(option.default, 0.1) for option in loss.options}
    lengths = {"lengths": LENGTHS} if "lengths" in loss.reads else {}
    prompt, weight = torch.tensor([0] * 3 + [1] * 3), torch.full((6,), 1 / 6, dtype=torch.float64)
    chain, apart = (torch.tensor(order * 2) for order in ([[0, 1], [1, 2], [2, 3]], [[0, 1], [1, 2], [2, 0]]))
    never_won, never_compared = Rankings(prompt, chain, weight), Rankings(prompt, apart, weight)
    if name in ("cdpo", "ipo", "averaged_ipo", "hinge", "sppo"):
        assert loss.optimum(never_won, WORLD.ref_logps, **lengths, **options).isfinite().all()
    else:
        with pytest.raises(InputError):
            loss.optimum(never_won, WORLD.ref_logps, **lengths, **options)
    if name == "unlikelihood":
        optimum = loss.optimum(never_compared, WORLD.ref_logps, **options)
        torch.testing.assert_close(optimum.exp(), f64([[1, 1, 1, 0]] * 2) / 3)
    else:
        with pytest.raises(InputError):
            loss.optimum(never_compared, WORLD.ref_logps, **lengths, **options)


def test_the_optimum_of_dpo_is_the_closed_form_of_the_estimate():
    """Another way to the same table: Newton's rewards, tilted by hand."""
    data = comparisons(DPO)
    tilt = WORLD.ref_logps + maximum_likelihood(data, WORLD.exists) / 0.3
    torch.testing.assert_close(DPO.optimum(data, WORLD.ref_logps, beta=0.3), tilt.log_softmax(-1))


# ---------------------------------------------------------------------------------- functions without record


def mine(
    policy_chosen_logps: Tensor, chosen_lengths: Tensor, policy_rejected_logps: Tensor, strength=2.0
) -> PreferenceLoss:
    """Reads what it names, in an order of its own."""
    gap = policy_chosen_logps / chosen_lengths - policy_rejected_logps
    return _preference_loss(
        gap.dtype,
        losses=-strength * gap,
        chosen_rewards=gap,
        rejected_rewards=gap,
        chosen_weights=strength / chosen_lengths,
        rejected_weights=torch.full_like(gap, strength),
    )


def test_a_function_without_a_record_is_given_what_it_names():
    """Whatever the order of its parameters; an option may have a default, or be given."""
    data = comparisons(DPO)
    logps = WORLD.ref_logps
    chosen, rejected = data.gather(logps).unbind(-1)
    count = data.gather(LENGTHS)[:, 0]
    for options in ({}, {"strength": 3.0}):
        found = loss_on_table(mine, logps, logps, data, lengths=LENGTHS, **options).losses
        assert torch.equal(found, -options.get("strength", 2.0) * (chosen / count - rejected))

    def exact(policy_chosen_logps, reference_chosen_logps=None, kl_estimate=None, **anything):
        assert anything == {"beta": 1.0}
        return kl_estimate + 0 * policy_chosen_logps * reference_chosen_logps

    away = (logps + torch.arange(4.0)).log_softmax(-1)
    found = loss_on_table(exact, away, logps, data, beta=1.0)
    divergence = (away.exp() * (away - logps)).sum(-1)
    torch.testing.assert_close(found, divergence[data.prompt])


def test_a_partial_function_reads_what_its_function_reads():
    """Its tables are told by the names of parameters: lengths are not the reference's log-probabilities."""
    data, logps = comparisons(DPO), (WORLD.ref_logps + torch.arange(4.0)).log_softmax(-1)
    for name, options in (("simpo", {"beta": 2.0, "gamma": 1.0}), ("dpo", {"beta": 0.3})):
        function, tables = LOSSES[name].function, (logps, WORLD.ref_logps, data)
        expected = loss_on_table(function, *tables, lengths=LENGTHS, **options).losses
        bound = partial(function, **options)
        assert torch.equal(loss_on_table(bound, *tables, lengths=LENGTHS).losses, expected)
        some = partial(function, beta=99.0)  # which what is given in the call goes before
        assert torch.equal(loss_on_table(some, *tables, lengths=LENGTHS, **options).losses, expected)


def test_an_unknown_parameter_is_one_clear_sentence():
    """A misspelled name, an option that was forgotten, nothing but positions."""
    data = comparisons(DPO)

    def misspelled(policy_chosen_logp, policy_rejected_logps, *, beta):
        raise AssertionError("must not be called")

    for function, options, name in (
        (misspelled, {"beta": 1.0}, "misspelled has a parameter policy_chosen_logp"),
        (dpo_loss, {}, "dpo_loss has a parameter beta"),
        (lambda *columns: columns, {}, "<lambda> has a parameter columns"),
    ):
        with pytest.raises(InputError, match=rf"^{name}, which is no option .*; give it, or rename it\.$"):
            loss_on_table(function, WORLD.ref_logps, WORLD.ref_logps, data, **options)


def test_a_loss_of_pairs_refuses_longer_rankings():
    """The two best of three would be taken for the pair."""
    triples = expected_rankings(WORLD.rewards, all_sets(WORLD.exists, size=3))
    with pytest.raises(InputError, match=r"^dpo_loss takes pairs, but the rankings are longer; use .*\.$"):
        loss_on_table(dpo_loss, WORLD.ref_logps, WORLD.ref_logps, triples, beta=1.0)


def test_a_record_and_its_function_are_the_same_on_a_table():
    """`loss_on_table` takes either."""
    data = comparisons(DPO)
    for name, loss in LOSSES.items():
        options, rows = settings_of(loss)[1], once(data) if loss.reads_batch else data
        either = [
            loss_on_table(each, WORLD.ref_logps, WORLD.ref_logps, rows, lengths=LENGTHS, **options)
            for each in (loss, loss.function)
        ]
        assert all(torch.equal(one, other) for one, other in zip(*either)), name


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reads_batch])
def test_a_loss_that_reads_its_batch_refuses_rows_of_unequal_weight(name):
    """Its mean, or its order, would count an outcome of probability 0.9 and one of 0.1 alike."""
    for each in (LOSSES[name], LOSSES[name].function):
        with pytest.raises(InputError, match=r" takes all rows of a batch alike; give .*\.$"):
            loss_on_table(each, WORLD.ref_logps, WORLD.ref_logps, comparisons(DPO), beta=1.0)


# --------------------------------------------------------------------------------------------- one place each


def toy_loss(policy_chosen_logps, policy_rejected_logps, *, beta: float, wit: float) -> PreferenceLoss:
    """DPO with a reference that prefers the chosen completion by `wit` nats."""
    nothing = 0 * policy_chosen_logps
    return dpo_loss(policy_chosen_logps, policy_rejected_logps, nothing + wit, nothing, beta=beta)


TOY = Loss(
    "toy", "Toy", toy_loss, "a loss of this test",
    (Option("beta", "> 0", 0.3, "steepness", "β"), Option("wit", "[0, 1]", 0.7, "its humour", "w")),
    optimum="none", proof="D4.3", source="Nobody (2026)",
)  # fmt: skip


def test_a_loss_added_at_run_time_appears_everywhere(monkeypatch):
    """On tables, as --loss-type with help and refusals, among the frontier's methods, in the table."""
    assert "toy" not in table_of_losses()
    monkeypatch.setitem(LOSSES, "toy", TOY)

    assert loss_on_table(TOY, WORLD.ref_logps, WORLD.ref_logps, comparisons(DPO), beta=1.0, wit=0.5)
    parser = argparse.ArgumentParser(prog="dpo")
    command.add_arguments(parser)
    printed = " ".join(parser.format_help().split())
    assert "toy, a loss of this test" in printed
    assert "--wit X for toy: its humour, [0, 1] (default 0.7)" in printed
    assert "for toy: steepness, > 0 (default 0.3)" in printed
    args = parser.parse_args(["--loss-type", "toy", "--wit", "1"])
    assert command._loss_of(argparse.Namespace(**vars(args) | {"data": None})) == {"beta": 0.3, "wit": 1.0}
    assert loss_options("toy", {"beta": 0.1, "wit": 0.0}) == {"beta": 0.1, "wit": 0.0}
    for given, message in (
        ({"beta": 0.1}, r"^--loss-type toy needs --wit\.$"),
        ({"beta": 0.1, "wit": 2.0}, r"^--wit must lie in \[0, 1\], got 2\.0\.$"),
        ({"beta": 0.1, "wit": 1.0, "lam": 1.0}, r"^--loss-type toy does not use --lam; leave it out\.$"),
    ):
        with pytest.raises(InputError, match=message):
            loss_options("toy", given)

    method = pair_methods.others(0.5, 0.1, (0.1,))[-1]
    assert (method.family, method.setting) == ("Toy", "β 0.3, w 0.7")
    assert [line for line in table_of_losses().split("\n") if "`toy`" in line] == [
        "| `toy` | Toy | π | `beta` > 0, 0.3; `wit` [0, 1], 0.7 | – | none, [D4.3] | Nobody (2026) |"
    ]


def test_a_run_made_before_a_loss_existed_can_be_resumed(monkeypatch, tmp_path):
    """Its config.json knows nothing of the new loss's options; one that is given is still refused."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = vars(parser.parse_args([])) | {"loss_type": "ipo", "beta": 0.2, "seed": 3}
    options |= {"per_device_train_batch_size": 8, "eval_samples": 16}
    config = {"command": "dpo", "threads": 1, "options": options}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setitem(LOSSES, "toy", TOY)

    class Reached(Exception):
        """Everything was understood."""

    def begin(found: argparse.Namespace) -> None:
        raise Reached(found.loss_type, found.beta, found.seed, found.wit)

    monkeypatch.setattr(command.setup, "begin", begin)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(Reached) as reached:
        command.run(parser.parse_args(["--resume", str(tmp_path)]))
    assert reached.value.args == ("ipo", 0.2, 3, None)
    with pytest.raises(InputError, match="was made without --wit"):
        command.run(parser.parse_args(["--resume", str(tmp_path), "--wit", "0.5"]))


def test_the_readme_has_the_table_of_losses():
    """Between its two comments, as it is rendered now; no cell has more than forty words."""
    text = (Path(zoo.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- table of losses -->\n\n")[1].split("\n\n<!-- end of the table -->")[0]
    assert table == table_of_losses()
    assert all(len(cell.split()) <= 40 for cell in table.split("|"))


def test_every_record_is_found_and_named():
    """One record a name, in the order of the help; whoever wrote it down first is named."""
    assert next(iter(LOSSES)) == "dpo" and {"ipo", "averaged_ipo", "kto", "cdpo", "robust"} < {*LOSSES}
    for name, loss in LOSSES.items():
        assert loss.name == name and loss.title and loss.summary and loss.source and loss.proof
        assert all(option.range in RANGES and option.help for option in loss.options)
    assert len({loss.title for loss in LOSSES.values()}) == len(LOSSES)


def test_a_name_of_trl_is_answered_with_ours(capsys):
    """In one sentence, wherever it is typed; the help tells of the name that means another loss there."""
    assert set(TRL.values()) <= {*LOSSES} and not {*TRL} & {*LOSSES}
    for typed in (["dpo", "--loss-type", "sigmoid_norm"], ["card", "sigmoid_norm"]):
        assert main(typed) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.endswith("sigmoid_norm: no such loss; TRL's sigmoid_norm is averaged_dpo here.")
    assert "TRL's ipo is averaged_ipo" in LOSSES["ipo"].summary


# ------------------------------------------------------------------------------------------ planted mistakes

MUTANTS = {
    "DPO's weight of the winner's side": (dpo_loss, "torch.sigmoid(-margin)", "torch.sigmoid(margin)", "dpo"),
    "cDPO's weight without its smoothing": (
        noise.cdpo_loss, "beta * (torch.sigmoid(-u) - label_smoothing)", "beta * torch.sigmoid(-u)", "cdpo",
    ),
    "robust DPO's with the other sign": (
        noise.robust_dpo_loss, "(torch.sigmoid(-u) + linear)", "(torch.sigmoid(-u) - linear)", "robust",
    ),
    "IPO's without the two": (ipo_loss, "1 / beta - 2 * h", "1 / beta - h", "ipo"),
    "averaged IPO's without the two": (
        ipo.averaged_ipo_loss, "1 / beta - 2 * h", "1 / beta - h", "averaged_ipo",
    ),
    "SimPO's chosen length for both": (
        simpo.simpo_loss, "pull / rejected_lengths", "pull / chosen_lengths", "simpo",
    ),
    "SimPO's chosen pull not averaged": (simpo.simpo_loss, "pull / chosen_lengths", "pull", "simpo"),
    "ORPO's chosen pull without fine-tuning": (
        orpo.orpo_loss, "(1 + lam * chosen_pull)", "(lam * chosen_pull)", "orpo",
    ),
    "ORPO's rejected pull with fine-tuning": (
        orpo.orpo_loss, "lam * rejected_pull", "(1 + lam * rejected_pull)", "orpo",
    ),
    "ORPO's rejected pull with the chosen's odds": (
        orpo.orpo_loss, "log_d - rejected_rest", "log_d - chosen_rest", "orpo",
    ),
    "Unlikelihood pulls alike": (
        unlikelihood.unlikelihood_loss, "torch.full_like(rejected, alpha)", "torch.ones_like(rejected)",
        "unlikelihood",
    ),
    "Unlikelihood's chosen pull is alpha": (
        unlikelihood.unlikelihood_loss, "torch.ones_like(chosen)", "torch.full_like(chosen, alpha)",
        "unlikelihood",
    ),
    "unweighted DPO's without beta": (
        unlikelihood.unweighted_dpo_loss, "torch.full_like(h, beta)", "torch.ones_like(h)", "unweighted_dpo",
    ),
    "averaged DPO's of the sum": (
        ipo.averaged_dpo_loss, "beta * torch.sigmoid(-u)", "torch.sigmoid(-u)", "averaged_dpo",
    ),
    "the hinge's beyond its corner": (margins.hinge_loss, "(wanting > 0)", "(wanting > -9)", "hinge"),
    "EXO's without its bell": (margins.exo_loss, "beta * q * rest", "beta", "exo"),
    "DiscoPOP's step upside down": (margins.discopop_loss, "+ step", "- step", "discopop"),
    "DPO-Positive pulls alike": (rpo.dpop_loss, "pull + lam * pull", "pull", "dpop"),
    "KTO's of a sum": (kto.kto_pair_loss, "out.gradient_weights / 2", "out.gradient_weights", "kto"),
    "KTO's rejected pull upwards": (kto.kto_pair_loss, "chosen, -rejected", "chosen, rejected", "kto"),
    "Plackett-Luce's worst answer upwards": (
        plackett_luce_preference_loss, "-weights[..., -1]", "weights[..., -1]", "plackett_luce",
    ),
    "Plackett-Luce's second for its worst": (
        plackett_luce_preference_loss, "-weights[..., -1]", "-weights[..., 1]", "plackett_luce",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_weight_is_caught(name, monkeypatch):
    function, right, wrong, loss = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        check_pulls(loss)


OPTIMUM_MUTANTS = {
    "DPO's without beta": (DPO.optimum, "beta=beta)", "beta=1.0)", "dpo"),
    "cDPO's mixture reversed": (
        noise.cdpo_optimum, "1 - label_smoothing, label_smoothing", "label_smoothing, 1 - label_smoothing",
        "cdpo",
    ),
    "robust DPO's flips not undone": (
        noise.robust_dpo_optimum, "-flip_probability / clear", "flip_probability / clear", "robust",
    ),
    "IPO's without the reference": (ipo.ipo_optimum, "ref_logps + ipo", "0 * ref_logps + ipo", "ipo"),
    "averaged IPO's without lengths": (
        ipo.with_lengths, "lengths * (g + c)", "(g + c)", "averaged_ipo",
    ),
    "averaged IPO's normaliser not found": (
        ipo.with_lengths, "_, c = bisection", "c, _ = 0 * g.sum(-1, keepdim=True), bisection", "averaged_ipo",
    ),
    "averaged DPO's without beta": (
        ipo.averaged_dpo_optimum, "/ beta, lengths", ", lengths", "averaged_dpo",
    ),
    "the hinge's without beta": (margins.hinge_optimum, "beta=beta)", "beta=1.0)", "hinge"),
    "the hinge's first step is its last": (margins.hinge_optimum, "-1e-12", "-1e12", "hinge"),
    "RPO's without lengths": (rpo.rpo_optimum, " / lengths", "", "rpo"),
    "RPO's without DPO": (rpo.rpo_optimum, "beta * state.gradient", "0 * state.gradient", "rpo"),
    "Unlikelihood's shares of wins": (
        unlikelihood.unlikelihood_logps, "chosen - alpha * rejected", "chosen", "unlikelihood",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMUM_MUTANTS)
def test_a_mistake_in_an_optimum_is_caught(name, monkeypatch):
    function, right, wrong, loss = OPTIMUM_MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        check_optimum(loss)
