"""The training loop against loops written out by hand."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from planting import CAUGHT, plant

from dpo_minimal.experiments.bandit import convergence
from dpo_minimal.train import OPTIMIZERS, Window, _means, average, make_optimizer, train, warm_up
from dpo_minimal.validation import InputError


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def half_square(p: torch.nn.Parameter):
    """0.5 |p|^2, whose gradient is p: every number of a step of gradient descent is then known."""

    def objective(batch):
        return 0.5 * (p * p).sum(), {"first": p.detach()[0].clone(), "batch": torch.tensor(float(batch))}

    return objective


def regression(seed: int = 0):
    """A small network, a least-squares objective and a list of different batches, all reproducible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        batches = [(torch.randn(7, 3), torch.randn(7, 1)) for _ in range(12)]

    def objective(batch):
        error = network(batch[0]) - batch[1]
        return (error**2).mean(), {"largest": error.detach().abs().max()}

    return network, objective, batches


# --------------------------------------------------------------------------------------------- records


def test_record_describes_the_policy_before_the_step():
    """A loss read after the step would belong to other parameters than the metrics beside it, and the first
    record would not be the one of the untrained policy (ln 2)."""
    p = parameter(2.0)
    stream = train(half_square(p), torch.optim.SGD([p], lr=0.5), [10, 11, 12])
    value = 2.0
    for step, record in enumerate(stream, start=1):
        # powers of two: float64 has every one of these numbers exactly
        assert record == {
            "step": step,
            "loss": 0.5 * value**2,
            "first": value,
            "batch": 9.0 + step,
            "grad_norm": value,
            "learning_rate": 0.5,
        }
        assert list(record) == ["step", "loss", "first", "batch", "grad_norm", "learning_rate"]
        assert all(type(number) in (int, float) for number in record.values())  # no tensors: no graph kept
        value *= 0.5  # p - 0.5 p
        assert p.item() == value  # the step is taken when its record comes
    assert step == 3  # as many steps as batches, no more and no fewer


def test_no_batches_give_no_steps():
    """Zero steps must leave the policy at the reference."""
    p = parameter(2.0)
    assert list(train(half_square(p), torch.optim.SGD([p], lr=0.5), [])) == []
    assert p.item() == 2.0


def test_gradients_of_earlier_steps_do_not_add_up():
    """Without zero_grad, step k would follow the sum of k gradients; and a gradient left over from before
    the training would be in its first step."""
    p = parameter(2.0)
    p.grad = torch.tensor([100.0], dtype=torch.float64)
    records = list(train(half_square(p), torch.optim.SGD([p], lr=0.5), range(4)))
    assert [record["grad_norm"] for record in records] == [2.0, 1.0, 0.5, 0.25]


# -------------------------------------------------------------------------------- schedule and clipping


def test_scheduler_moves_once_a_step_and_its_rate_is_the_one_logged():
    """A scheduler stepped before the optimizer skips its first rate (torch warns only sometimes); one that is
    never stepped trains at full rate to the end."""
    p = parameter(1.0)
    optimizer = torch.optim.SGD([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    records = list(train(half_square(p), optimizer, range(4), scheduler=scheduler))
    rates = [0.5 * (1 - step / 4) for step in range(4)]
    assert [record["learning_rate"] for record in records] == rates
    value = 1.0
    for rate, record in zip(rates, records):
        assert record["first"] == value  # multiples of 1/8 to the fourth power: exact in float64
        value -= rate * value
    assert p.item() == value


@pytest.mark.parametrize("limit", [0.01, 1.0, 4.9])
def test_clipping_scales_the_gradient_to_the_limit(limit):
    """Fails if clipping acts entry by entry, parameter by parameter, or after the step, or if the norm
    logged is the clipped one: then nobody would see that clipping was active."""
    p, q = parameter(3.0), parameter(0.0, 4.0)  # gradients (3) and (0, 4): norm 5 together

    def objective(batch):
        return 0.5 * (p * p).sum() + 0.5 * (q * q).sum(), {}

    optimizer = torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=1.0)
    (record,) = train(objective, optimizer, [None], max_grad_norm=limit)
    assert record["grad_norm"] == 5.0
    moved = torch.cat([p.detach() - 3.0, q.detach() - torch.tensor([0.0, 4.0]).double()])
    # torch divides by norm + 1e-6, i.e. the clipped norm is short by 2e-7 of itself; beyond that, rounding
    expected = limit * 5 / (5 + 1e-6)
    assert moved.norm().item() == pytest.approx(expected, rel=1e-12)
    assert moved.tolist() == pytest.approx([-expected * 3 / 5, 0, -expected * 4 / 5], rel=1e-12)


@pytest.mark.parametrize("limit", [None, 5.1, math.inf])
def test_a_gradient_within_the_limit_is_left_alone(limit):
    """Clipping must be a limit, not a normalisation: below it the step is the plain one, bit by bit."""
    p = parameter(3.0, 4.0)
    (record,) = train(half_square(p), torch.optim.SGD([p], lr=0.25), [0], max_grad_norm=limit)
    assert record["grad_norm"] == 5.0
    assert p.tolist() == [2.25, 3.0]


def test_a_limit_of_zero_is_not_the_same_as_no_limit():
    """An option silently ignored. Zero is a number, so it must be obeyed or refused; treating it
    like None trains with unclipped gradients although a limit was given."""
    p = parameter(3.0, 4.0)
    try:
        list(train(half_square(p), torch.optim.SGD([p], lr=0.25), [0], max_grad_norm=0.0))
    except InputError as error:
        assert "max_grad_norm" in str(error)
    assert p.tolist() == [3.0, 4.0]


# ------------------------------------------------------------------------------------- the whole loop


def test_training_equals_a_loop_written_by_hand_bitwise():
    """Adam with schedule and clipping on changing batches: fails if a batch is skipped or used twice, if
    the scheduler is out of step, or if the loop touches the gradient in any other way."""
    network, objective, batches = regression()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    records = list(train(objective, optimizer, batches, scheduler=scheduler, max_grad_norm=0.3))

    by_hand, objective, _ = regression()
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.05)
    losses, norms, largest = [], [], []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.9**step
        optimizer.zero_grad()
        loss, metrics = objective(batch)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
        coefficient = (0.3 / (norm + 1e-6)).clamp(max=1.0)
        for p in by_hand.parameters():
            p.grad.mul_(coefficient)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
        largest.append(metrics["largest"].item())
    # bitwise: the same float32 operations in the same order
    assert [record["loss"] for record in records] == losses
    assert [record["grad_norm"] for record in records] == norms
    assert [record["largest"] for record in records] == largest
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), by_hand.parameters()))
    assert any(norm > 0.3 for norm in norms)  # clipping did act


def test_the_loop_stops_when_nobody_asks():
    """A loop that runs ahead of its records would measure one policy and save another."""
    p = parameter(1.0)
    taken = []

    def batches():
        for number in itertools.count():
            taken.append(number)
            yield number

    stream = train(half_square(p), torch.optim.SGD([p], lr=0.5), batches())
    assert taken == []  # nothing happens before the first record is asked for
    next(stream)
    next(stream)
    stream.close()
    assert taken == [0, 1]
    assert p.item() == 0.25
    assert list(stream) == []


# ------------------------------------------------------------------------------------------ not finite


def bad_from_step_three(p: torch.nn.Parameter, kind: str):
    def objective(batch):
        loss = 0.5 * (p * p).sum()
        if batch == 3:
            if kind == "nan loss":
                loss = loss * math.nan
            elif kind == "infinite loss":
                loss = loss + math.inf
            else:  # sqrt at 0: the value is finite, the gradient infinite
                loss = loss + (p - p.detach()).abs().sum().add(0.0).sqrt()
        return loss, {}

    return objective


@pytest.mark.parametrize("kind", ["nan loss", "infinite loss", "gradient"])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_training_stops_before_a_step_that_is_not_finite(kind, limit):
    """One NaN step and all parameters are NaN for ever, while Adam's loss curve still looks smooth up to
    there. The step must be named and the parameters must be those of the step before, bit by bit."""
    p = parameter(1.0, -2.0)
    optimizer = torch.optim.Adam([p], lr=0.1)
    stream = train(bad_from_step_three(p, kind), optimizer, [1, 2, 3, 4], max_grad_norm=limit)
    next(stream)
    next(stream)
    before = p.detach().clone()
    moments = [value.clone() for value in optimizer.state[p].values()]
    with pytest.raises(InputError, match=r"^step 3: [^\n]*(nan|inf)[^\n]*\.$"):
        next(stream)
    assert torch.equal(p, before)
    assert all(torch.equal(old, new) for old, new in zip(moments, optimizer.state[p].values()))


# ----------------------------------------------------------------------------------------------- windows


def pull(p: torch.nn.Parameter):
    """batch (weight, target) -> weight 0.5 |p - target|^2: each piece of a window pulls elsewhere."""

    def objective(batch):
        weight, target = batch
        if weight is None:
            raise InputError("this piece is bad; drop it.")
        distance = 0.5 * (p - target).square().sum()
        return weight * distance, {"distance": distance}

    return objective


# At p = 2: gradients -4, 4, 12, losses 8, 4, 72, distances 8, 2, 72. All is exact in float64.
PIECES = Window([(1.0, 6.0), (2.0, 0.0), (1.0, -10.0)], [0.5, 0.25, 0.25], "rows 1 to 8")


@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_window_is_one_step_on_the_average_of_its_pieces(limit):
    """#14: a step for each piece, a share forgotten, metrics of the last piece alone, or each piece clipped
    by itself, which would leave another direction."""
    p = parameter(2.0)
    records = list(train(pull(p), torch.optim.SGD([p], lr=0.5), [PIECES], max_grad_norm=limit))
    whole = {
        "step": 1,
        "loss": 0.5 * 8 + 0.25 * 4 + 0.25 * 72,
        "distance": 0.5 * 8 + 0.25 * 2 + 0.25 * 72,
        "grad_norm": 2.0,  # 0.5 * -4 + 0.25 * 4 + 0.25 * 12
        "learning_rate": 0.5,
    }
    assert records == [whole]
    # torch clips to limit / (norm + 1e-6)
    assert p.item() == pytest.approx(1.0 if limit is None else 2 - 0.5 * 2 / (2 + 1e-6), rel=1e-15)


def test_average_is_the_record_without_the_step():
    p = parameter(2.0)
    assert average(pull(p), PIECES) == {"loss": 23.0, "distance": 22.5}
    assert p.grad is None and p.item() == 2.0


@pytest.mark.parametrize("shares", [[0.5, 0.25, 0.2], [1.0, 1.0, 1.0], [math.nan, 0.5, 0.5]])
def test_shares_that_do_not_make_a_whole_are_refused(shares):
    """Shares that sum to k scale the learning rate by k, and nobody sees it."""
    p = parameter(2.0)
    window = PIECES._replace(shares=shares)
    with pytest.raises(InputError, match=r"^step 1 \(rows 1 to 8\): .* must sum to 1, .*\.$"):
        list(train(pull(p), torch.optim.SGD([p], lr=0.5), [window]))
    with pytest.raises(InputError, match="sum to 1"):
        average(pull(p), window)
    assert p.item() == 2.0
    list(
        train(pull(p), torch.optim.SGD([p], lr=0.1), [Window([(1.0, 0.0)] * 7, [1 / 7] * 7)])
    )  # rounding is fine


@pytest.mark.parametrize("piece", [(math.nan, 1.0), (1.0, math.inf), (None, 1.0)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_piece_is_named_by_its_step_and_rows(piece, place):
    """Somebody has to find the row among thousands; and good pieces of the same window must not be taken."""
    p = parameter(2.0)
    optimizer = torch.optim.Adam([p], lr=0.1)
    pieces = list(PIECES.micro_batches)
    pieces[place] = piece
    stream = train(pull(p), optimizer, [PIECES, Window(pieces, PIECES.shares, "rows 9 to 16")], first_step=41)
    assert next(stream)["step"] == 41
    before, moments = p.item(), [value.clone() for value in optimizer.state[p].values()]
    with pytest.raises(
        InputError, match=r"^step 42 \(rows 9 to 16\): [^\n]*(nan|inf|this piece is bad)[^\n]*\.$"
    ):
        next(stream)
    assert p.item() == before
    assert all(torch.equal(old, new) for old, new in zip(moments, optimizer.state[p].values()))


# --------------------------------------------------------------------------- warm-up, going on, optimizers


@pytest.mark.parametrize("warmup_steps", [0, 1, 4, 150])
def test_warm_up_is_linear_and_reaches_its_rate(warmup_steps):
    """A first rate of zero wastes a step, a rate reached one step late or overshot is another schedule."""
    p = parameter(1.0)
    optimizer = torch.optim.SGD([p], lr=123.0)  # replaced by the scheduler's
    scheduler = warm_up(optimizer, 0.25, warmup_steps)
    records = list(train(half_square(p), optimizer, range(warmup_steps + 3), scheduler=scheduler))
    rates = [0.25 * step / warmup_steps for step in range(1, warmup_steps)] + [0.25] * 4
    # one multiplication by a quotient: within a rounding of the exact rate
    assert [record["learning_rate"] for record in records] == pytest.approx(rates[-len(records) :], rel=1e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("done", [1, 3, 4, 5, 11])
def test_going_on_equals_never_having_stopped(name, done):
    """Warm-up begun again, steps counted from one, moments or their step count lost: bit by bit the same
    records and weights as without an interruption."""

    def going(network, objective, batches, optimizer, first_step):
        scheduler = warm_up(optimizer, 0.01, warmup_steps=4, first_step=first_step)
        return list(
            train(
                objective, optimizer, batches, scheduler=scheduler, max_grad_norm=0.3, first_step=first_step
            )
        )

    network, objective, batches = regression()
    whole = going(network, objective, batches, make_optimizer(network.parameters(), name, 0.01), 1)

    stopped, objective, _ = regression()
    optimizer = make_optimizer(stopped.parameters(), name, 0.01)
    first = going(stopped, objective, batches[:done], optimizer, 1)
    other, objective, _ = regression(seed=1)
    other.load_state_dict(stopped.state_dict())
    restored = make_optimizer(other.parameters(), name, 0.01)
    restored.load_state_dict(optimizer.state_dict())
    assert first + going(other, objective, batches[done:], restored, done + 1) == whole
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), other.parameters()))


def test_optimizers_are_the_formulas_of_their_papers():
    """RMSprop with torch's defaults, Adam with decoupled decay of zero; three steps by hand."""
    rate, slopes = 0.01, [2.0, -1.0, 0.5]
    square, first, second = 0.0, 0.0, 0.0
    by_hand = {"rmsprop": 1.0, "adamw": 1.0}
    for t, slope in enumerate(slopes, start=1):
        square = 0.99 * square + 0.01 * slope**2
        by_hand["rmsprop"] -= rate * slope / (math.sqrt(square) + 1e-8)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        by_hand["adamw"] -= rate * first / (1 - 0.9**t) / (math.sqrt(second / (1 - 0.999**t)) + 1e-8)
    assert set(by_hand) == set(OPTIMIZERS)
    for name, expected in by_hand.items():
        p = parameter(1.0)
        list(train(lambda slope, p=p: (slope * p.sum(), {}), make_optimizer([p], name, rate), slopes))
        assert p.item() == pytest.approx(expected, rel=1e-14)  # float64, some twenty roundings


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_there_is_no_weight_decay(name):
    """Decay pulls towards zero weights, not towards the reference: it moves the optimum. A parameter that
    the loss does not depend on, or has no slope in, must stay where it is, bit by bit."""
    p, flat, unused = parameter(1.0), parameter(3.0, -0.1), parameter(5.0)
    optimizer = make_optimizer([p, flat, unused], name, 0.1)
    list(train(lambda _: (p.sum() + 0 * flat.sum(), {}), optimizer, range(50)))
    assert p.item() < 0 and flat.tolist() == [3.0, -0.1] and unused.item() == 5.0
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_frozen_weights_are_refused():
    """As those of a copy of a frozen reference: torch would raise, or move nothing."""
    weight = parameter(1.0).requires_grad_(False)
    with pytest.raises(InputError, match=r"^all weights are frozen[^\n]*\.$"):
        next(train(lambda _: (weight.sum(), {}), torch.optim.SGD([weight], 0.1), [None]))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match=r"^no optimizer 'sgd'; choose one of rmsprop, adamw\.$"):
        make_optimizer([parameter(1.0)], "sgd", 0.1)


TRAIN_MUTANTS = {
    "step before the window is whole": (
        train, "for step, batch in enumerate(batches, start=first_step):",
        "pieces = (Window([piece], [1.0]) for window in batches for piece in window[0])\n"
        "    for step, batch in enumerate(pieces, start=first_step):",
        lambda: test_a_window_is_one_step_on_the_average_of_its_pieces(None),
    ),
    "not finite seen after the step": (
        train, "if not math.isfinite(numbers[\"loss\"]) or",
        "optimizer.step()\n        if not math.isfinite(numbers[\"loss\"]) or",
        lambda: test_a_bad_piece_is_named_by_its_step_and_rows((math.nan, 1.0), 1),
    ),
    "any shares": (
        _means, "math.isclose(sum(window.shares), 1)", "window.shares",
        lambda: test_shares_that_do_not_make_a_whole_are_refused([1.0, 1.0, 1.0]),
    ),
    "warm-up from zero": (
        warm_up, "(done + 1) / max", "done / max", lambda: test_warm_up_is_linear_and_reaches_its_rate(4),
    ),
    "warm-up begun again": (
        warm_up, "last_epoch=first_step - 2", "last_epoch=-1",
        lambda: test_going_on_equals_never_having_stopped("adamw", 3),
    ),
    "decay left at torch's default": (
        make_optimizer, "weight_decay=0.0, ", "", lambda: test_there_is_no_weight_decay("adamw"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAIN_MUTANTS)
def test_planted_mistakes_are_caught(monkeypatch, name):
    function, right, wrong, guard = TRAIN_MUTANTS[name]
    guard()
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()


# ----------------------------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_numbers(monkeypatch):
    """#80: a hidden source of randomness (dropout, an unseeded generator, torch's global stream) makes runs
    unrepeatable. Bitwise on a CPU, whatever was drawn from the global stream before."""
    monkeypatch.setattr(convergence, "MAX_LENGTH", 2)  # 21 completions instead of 341

    def run(seed: int, disturbance: int):
        settings = convergence.Settings(
            beta=0.5, pairs=1, table_steps=1, gpt_steps=12, seed=seed, device="cpu"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(disturbance)
            return convergence.gpt_population(settings)

    first, again, other = run(1, 0), run(1, 99), run(2, 0)
    assert first.records == again.records
    assert torch.equal(first.logps, again.logps) and torch.equal(first.rewards, again.rewards)
    assert not torch.equal(first.rewards, other.rewards)
    assert not torch.equal(first.ref_logps, other.ref_logps)


def test_training_leaves_the_global_random_stream_alone(monkeypatch):
    """#80: an experiment that advances torch's global stream makes the next one depend on whether it ran."""
    monkeypatch.setattr(convergence, "MAX_LENGTH", 2)
    settings = convergence.Settings(beta=0.5, pairs=1, table_steps=1, gpt_steps=2, seed=0, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        convergence.gpt_population(settings)
        assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------- the experiment


def settings_of(seed: int, steps: int = 2000, *, quick: bool = False) -> convergence.Settings:
    return convergence.Settings(
        beta=0.5, pairs=1, table_steps=1, gpt_steps=steps, seed=seed, device="cpu", quick=quick
    )


@pytest.mark.slow
def test_eight_hundred_steps_of_the_gpt_experiment_are_certified():
    """Fails if DPO on a network heads anywhere but to pi* (beta lost, reference ignored, outcomes swapped:
    the distance then ends above 0.1), or if the certificate claims more than is true. Where there is no
    certificate yet, the divergence must at least have fallen a hundredfold."""
    outcome = convergence.gpt_population(settings_of(seed=0, steps=800))
    first, last = outcome.records[0], outcome.records[-1]
    assert last["step"] == 800
    if math.isfinite(last["distance/bound"]):
        assert (outcome.logps - outcome.target_logps).abs().max().item() <= last["distance/bound"]
    else:
        assert last["kl/policy_target"] <= first["kl/policy_target"] / 100
    for record in outcome.records:  # and the bound holds wherever it is issued
        assert record["distance/max_logp"] <= record["distance/bound"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(13))
def test_ten_seeds_of_the_gpt_experiment(seed):
    """The headline: a GPT trained by DPO ends at pi_ref exp(r / beta) / Z, for ten seeds of reference,
    rewards, prompts and comparisons in the quick world, and three in the full one. Fails if a learning rate
    works for some seeds only."""
    quick = seed < 10
    outcome = convergence.gpt_population(settings_of(seed % 10, 1000 if quick else 2000, quick=quick))
    # pi* from the definition, not from the package's closed form
    optimal = (outcome.ref_logps + outcome.rewards / outcome.beta).log_softmax(-1)
    logps = outcome.logps
    distance = (logps - optimal).abs()
    # The promise is 1e-6 nats of KL and 1e-3 of every log-probability. Another processor adds up in another
    # order, and training makes another path of it; so here, on one processor, it must be a third of that. The
    # worst that was seen, of ten full worlds on three instruction sets with one and two threads, is 7.7e-5;
    # any of the known mistakes stays above 1e-2.
    kl = (logps.exp() * (logps - optimal)).sum(-1)
    assert (kl <= 1e-6 / 3).all()
    assert distance.max() <= 1e-3 / 3
    bound = outcome.logp_bound
    assert torch.isfinite(bound).all()
    assert (distance.amax(-1) <= bound).all()


PROCESSORS = {  # what each library is told not to use
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "this one": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_gpt_experiment_on_other_processors(processor, threads):
    """The end must not depend on how sums are rounded: other instructions, other threads, the quick world.
    Fails if the learning rate does not fall fast enough for Adam to settle, or is too small to arrive: with a
    third of it one full world ended at 7e-5 nats on one instruction set and at 4e-4 on another."""
    code = f"""
import torch
from dpo_minimal.experiments.bandit.convergence import Settings, gpt_population
torch.set_num_threads({threads})
outcome = gpt_population(Settings(0.5, 1, 1, gpt_steps=1000, seed={threads}, device="cpu", quick=True))
print((outcome.logps - outcome.target_logps).abs().max().item(), outcome.logp_bound.max().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | PROCESSORS[processor] | {"OMP_WAIT_POLICY": "PASSIVE"},  # beside other work
    )  # fmt: skip
    distance, bound = map(float, done.stdout.split())
    assert distance <= min(bound, 1e-3 / 3)  # a third of the promise, as in the full world


@pytest.mark.parametrize("seed", range(10))
def test_the_gpts_reference_is_far_from_uniform(seed):
    """A nearly uniform reference would hide a bug that ignores it. Averaged over contexts of the GPT
    experiment, next-token distributions diverge from uniform by over a quarter of log 5, their maximum."""
    reference, prompts, completions, _, _ = convergence.gpt_world(settings_of(seed))
    divergences = []
    for length in range(completions.ids.shape[1]):
        longer = completions.ids[completions.lengths > length, :length]
        contexts = {tuple(context) for context in longer.tolist()}
        for prompt in prompts.tolist():
            ids = torch.tensor([[*prompt, *context] for context in sorted(contexts)])
            with torch.no_grad():
                logps = reference(ids)[:, -1].log_softmax(-1)
            divergences.append((logps.exp() * logps).sum(-1) + math.log(logps.shape[-1]))
    assert torch.cat(divergences).mean() > math.log(5) / 4
