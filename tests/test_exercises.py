"""The course's checks: right answers pass, known mistakes are refused by name, dull ones are refused too."""

import functools
import time
import warnings

import numpy as np
import pytest
import student_answers
import torch
import torch.nn.functional as F
from dpo_course import training
from dpo_course.checks import check, find_exercise, judge
from dpo_course.exercises import CHAPTERS, all_exercises

from dpo_minimal.bench.checks import BOUNDED, agrees, complain, copy, recognise, show
from dpo_minimal.bench.exercises import samples, smallest
from notebooks import build

EXERCISES = all_exercises()
MISTAKES = [(number, name) for number, exercise in EXERCISES.items() for name in exercise.mistakes]


@functools.cache
def solutions(chapter):
    """The solved exercise functions of one notebook, by name."""
    (source,) = build.FOLDER.glob(f"source/{chapter:0>2}_*.py")
    namespace = {}
    for cell in build.solved_notebook(source).cells:
        if {"setup", "exercise"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    return namespace


def solution(number):
    return solutions(number.partition(".")[0])[EXERCISES[number].function]


def refused(exercise, function):
    """Whether some draw shows that the function is wrong, without shrinking it."""
    return any(complain(exercise, function, given) is not None for given in samples(exercise.inputs))


def test_the_course_is_complete():
    """Twenty exercises at least, some in all ten notebooks; the five central ones know five mistakes."""
    assert len(EXERCISES) >= 20
    assert {number.partition(".")[0] for number in EXERCISES} == set(CHAPTERS)
    central = {
        exercise.function: len(exercise.mistakes) for exercise in EXERCISES.values() if exercise.central
    }
    names = {"optimal_logps", "dpo_loss", "gradient_weights", "plackett_luce_logprob", "sequence_logps"}
    assert set(central) == names
    assert min(central.values()) >= 5
    assert all(exercise.mistakes for exercise in EXERCISES.values())
    assert len(MISTAKES) > 400, "the README says so"


@pytest.mark.parametrize("number", EXERCISES)
def test_a_check_accepts_its_solution(number):
    assert not refused(EXERCISES[number], solution(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", EXERCISES)
def test_the_whole_check_accepts_its_solution_within_five_seconds(number):
    start = time.process_time()
    verdict = judge(number, solution(number))
    assert verdict.status == "right", verdict.message
    # Five are allowed; of processor time, because other tests run beside this one.
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("number", "name"), MISTAKES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(MISTAKES)])
def test_every_known_mistake_is_refused_by_its_name(number, name):
    exercise = EXERCISES[number]
    assert refused(exercise, exercise.mistakes[name])
    assert recognise(exercise, exercise.mistakes[name]) == name


@pytest.mark.slow
@pytest.mark.parametrize("number", EXERCISES)
def test_the_whole_check_names_a_mistake_of_every_exercise(number):
    """As above, through Hypothesis's search and its shrinking, as a student sees it; what this adds is the
    same for all mistakes of an exercise, so one of each will do (and students' own, below)."""
    name = next(iter(EXERCISES[number].mistakes))
    verdict = judge(number, EXERCISES[number].mistakes[name])
    assert verdict.status == "wrong"
    assert verdict.mistake == name
    assert f"looks like      {name}" in verdict.message
    assert "smallest input" in verdict.message


@pytest.mark.slow
@pytest.mark.parametrize(("number", "answer"), student_answers.RIGHT)
def test_right_answers_of_students_pass(number, answer):
    """Loops and other formulas are as good as the solution."""
    verdict = judge(number, answer)
    assert verdict.status == "right", verdict.message


@pytest.mark.slow
@pytest.mark.parametrize(("number", "answer", "name"), student_answers.WRONG)
def test_mistakes_of_students_are_named(number, answer, name):
    """The five central exercises know at least five mistakes each, however they are written."""
    verdict = judge(number, answer)
    assert verdict.status == "wrong"
    assert verdict.mistake is not None and name in verdict.mistake, verdict.message


@pytest.mark.parametrize("number", EXERCISES)
def test_a_check_refuses_constant_functions(number):
    exercise = EXERCISES[number]
    answers = [exercise.expected(**copy(given)) for given in samples(exercise.inputs)[:10]]
    for constant in [*answers, 0.0, 1.0]:
        assert refused(exercise, lambda *_, constant=constant: constant)


@pytest.mark.parametrize("number", EXERCISES)
def test_a_check_refuses_functions_that_ignore_an_argument(number):
    """Each argument in turn is replaced: by zeros, by ones, by its own last entry, or by another draw."""
    exercise, right = EXERCISES[number], solution(number)
    for place, name in enumerate(samples(exercise.inputs)[0]):
        seen = [given[name] for given in samples(exercise.inputs)]
        for substitute in substitutes(seen):

            def ignoring(*arguments, place=place, substitute=substitute):
                changed = list(arguments)
                changed[place] = substitute(changed[place])
                return right(*changed)

            assert refused(exercise, ignoring), f"{number} does not look at {name}"


def substitutes(seen):
    """Ways not to look at an argument whose values are `seen`."""
    if isinstance(seen[0], torch.Tensor):
        yield torch.zeros_like
        yield torch.ones_like
        if seen[0].dtype.is_floating_point:
            yield lambda value: value.mean().expand_as(value).clone() if value.numel() > 1 else value * 0
        return
    for other in {repr(value): value for value in seen}.values():
        yield lambda _, other=other: other
        return


def own_losses():
    """Losses of students, and where each ends in a world: None where it falls for ever. By closed forms."""

    def tilted(beta):
        return lambda ref, rewards: (ref + rewards / beta).log_softmax(-1)

    def difference(pc, pr, rc, rr):
        return (pc - rc) - (pr - rr)

    def winners(ref, rewards):
        wins = torch.sigmoid(rewards[:, None] - rewards).fill_diagonal_(0).sum(-1)
        return (wins / wins.sum()).log()

    def mean_of_targets(ref, rewards):  # IPO on all pairs: each h is a difference of mean chances to win
        chances = 2 * torch.sigmoid(rewards[:, None] - rewards) - 1
        return (ref + chances.mean(-1)).log_softmax(-1)

    return {
        "brier": (lambda *four: torch.sigmoid(-difference(*four)) ** 2, tilted(1.0)),
        "scaled down": (lambda *four: 1e-6 * (-difference(*four)).exp(), tilted(2.0)),
        "ipo": (lambda *four: (difference(*four) - 1) ** 2, mean_of_targets),
        "no reference": (
            lambda pc, pr, rc, rr: -torch.nn.functional.logsigmoid(pc - pr),
            lambda ref, rewards: rewards.log_softmax(-1),
        ),
        "only the chosen": (lambda pc, pr, rc, rr: -pc, winners),
        "bounded": (lambda *four: -torch.sigmoid(difference(*four)), None),
        "straight": (lambda *four: -difference(*four), None),
        "for one completion only": (
            lambda pc, pr, rc, rr: -torch.sigmoid(pc - rc) - torch.sigmoid(rr - pr),
            None,
        ),
    }


@pytest.mark.parametrize("name", own_losses())
def test_a_loss_of_ones_own_is_judged_by_where_it_ends(name):
    """10.6: each consistent answer is accepted; another end is refused, and none where there is one."""
    worlds = {world["rewards"].tolist()[-1]: world for world in samples(EXERCISES["10.6"].inputs)}
    world = worlds[0.0 if name == "for one completion only" else 2.0]  # in the others it raises one, too
    loss, end = own_losses()[name]

    def complaint(claimed):
        return EXERCISES["10.6"].complaint((loss, claimed), **world)

    right = None if end is None else end(*world.values())
    assert complaint(right) is None
    away = torch.tensor([0.2, -0.2, 0.0])  # of a fifth of a nat: ten times what the check lets pass
    wrong = world["rewards"].log_softmax(-1) + world["ref_logps"] if end is None else right + away.double()
    assert "leaves it" in complaint(wrong.log_softmax(-1))
    if end is not None:
        assert "stops at" in complaint(None)


def test_what_cannot_be_trained_is_no_loss_of_ones_own():
    world = samples(EXERCISES["10.6"].inputs)[0]

    def complaint(loss):
        return EXERCISES["10.6"].complaint((loss, None), **world)

    logsigmoid = torch.nn.functional.logsigmoid
    assert "no slope" in complaint(lambda pc, pr, rc, rr: rc - rr + 0 * pc)
    assert "have the shape ()" in complaint(lambda pc, pr, rc, rr: (pr - pc).mean())
    assert "depends on the other pairs" in complaint(lambda pc, pr, rc, rr: (pr - pc) * pc.mean())
    assert "DPO's loss" in complaint(lambda pc, pr, rc, rr: -logsigmoid(0.3 * (pc - rc - pr + rr)))
    assert "raises TypeError" in complaint(lambda margin: margin)
    assert "is nan" in complaint(lambda pc, pr, rc, rr: pc.log())


def test_a_stub_is_not_solved_yet(capsys):
    def stub(*_):
        raise NotImplementedError

    check("3.1", stub)
    assert capsys.readouterr().out == "3.1 dpo_loss: not solved yet.\n"


def test_a_counterexample_is_the_smallest(capsys):
    """Without beta on the reference: one pair, of which one number differs, and a beta that shows it."""

    def loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
        margin = beta * (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
        return -torch.nn.functional.logsigmoid(margin)

    check("3.1", loss)
    told = capsys.readouterr().out
    assert told.count("[-0.7]") == 3 and told.count("[-0.8]") == 1 and "beta = 2" in told
    assert "β is missing on the reference" in told


def refusal(answer):
    verdict = judge("3.1", answer)
    assert verdict.status == "wrong"
    return verdict.message


def test_every_kind_of_failure_is_told():
    assert "takes 1 positional argument" in refusal(lambda logps: logps)
    assert "returns nothing" in refusal(lambda *_: None)
    assert "should be (1,), yours is ()" in refusal(lambda *_: torch.tensor(0.0))
    assert "changed its own input" in refusal(lambda chosen, *_: chosen.add_(1))
    assert "differently each time" in refusal(lambda chosen, *_: chosen + torch.rand(len(chosen)))
    assert "give the check the function itself" in refusal(torch.zeros(3))
    assert "SystemExit" in refusal(lambda *_: exit())
    assert "nan" in refusal(lambda chosen, *_: chosen * torch.nan)


def test_an_answer_in_other_parts_is_told():
    """The right numbers in one tensor look right when they are shown; what is wrong is how they are put."""

    def told(number, rearranged):
        verdict = judge(number, lambda *given: rearranged(*solution(number)(*given)))
        assert verdict.status == "wrong"
        return verdict.message

    assert judge("8.1", lambda *given: list(solution("8.1")(*given))).status == "right"
    asked = "2 tensors are asked for: return (first, second)"
    assert asked in told("8.1", lambda kl, reward: torch.stack([kl, reward]))
    assert asked in told("9.5", lambda policy, reference: torch.stack([policy, reference]))
    assert asked in told("6.3", lambda first, second: torch.cat([first[None], second]))
    assert asked in told("9.5", lambda policy, reference: (policy,))
    longer = told("8.1", lambda kl, reward: (kl, reward[None]))
    assert "part 2: the shape should be (), yours is (1,)" in longer
    assert "part 1: one tensor of shape" in told("9.5", lambda policy, reference: (None, reference))
    assert "shape (1,) is asked for, yours is of type tuple" in refusal(lambda *given: given[:2])


@pytest.mark.parametrize("number", ["9.4"])
def test_a_mask_has_booleans(number):
    """Zeros and ones compare equal to it, but cannot index or be inverted."""
    name, mistake = next(iter(EXERCISES[number].mistakes.items()))

    def in_numbers(answer, kind):
        return judge(number, lambda *given: answer(*given).to(kind))

    assert judge(number, lambda *given: solution(number)(*given).tolist()).status == "right"
    for kind in (torch.float64, torch.int64):
        reason = f"a mask of booleans is asked for, yours is {str(kind).removeprefix('torch.')}"
        assert reason in in_numbers(solution(number), kind).message
        both = in_numbers(mistake, kind)
        assert reason in both.message and both.mistake == name


def margin(pc, pr, rc, rr, beta):
    return beta * ((pc - rc) - (pr - rr))


def loss_of(margin_to_loss):
    return lambda *given: margin_to_loss(margin(*given))


def loss_with_beta_as(kind):
    """The loss; beta goes through another type on its way."""
    return lambda *four_and_beta: F.softplus(-margin(*four_and_beta[:4], kind(four_and_beta[4])))


def optimum_filled_in(ref_logps, rewards, beta):
    table = torch.zeros(ref_logps.shape)
    for row, (logps, r) in enumerate(zip(ref_logps, rewards)):
        table[row] = (logps + r / beta).log_softmax(-1)
    return table * torch.ones(1, dtype=torch.float64)  # float64 at the end


@pytest.mark.parametrize(
    ("number", "answer", "reason"),
    [
        ("3.1", loss_with_beta_as(torch.tensor), "torch.tensor(0.1)"),
        ("2.3", optimum_filled_in, "torch.zeros(2)"),
        ("3.1", loss_with_beta_as(lambda beta: float(np.float32(beta))), "float32, a small number"),
        ("3.1", loss_of(lambda m: F.softplus(-m).float()), "float32, a small number"),
        ("3.1", loss_of(lambda m: F.softplus(-m).float().numpy()), "float32, a small number"),
        ("3.1", loss_of(lambda m: -(1 - torch.sigmoid(-m)).log()), "a difference of nearly equal ones"),
    ],
)
def test_float32_on_the_way_is_no_mistake(number, answer, reason):
    """Seven digits are right, and the message says why there are no more."""
    verdict = judge(number, answer)
    told = next(line for line in verdict.message.split("\n") if line.startswith("  digits "))
    assert verdict.status == "right" and reason in told
    assert torch.get_default_dtype() == torch.float32, "it is set for a moment"


def test_a_mistake_in_float32_is_a_mistake():
    """1e-4 is ten times what a hundred roundings come to. Its name is found without the other digits too."""
    assert judge("3.1", loss_of(lambda m: F.softplus(-m).float() + 1e-4)).status == "wrong"
    single = judge("3.1", lambda *given: student_answers.loss_scaled(*given).float())
    assert single.mistake == "off by β: did you scale the loss instead of the margin?"


BOUNDS = {  # everybody's habits: they keep NaN away, and are wrong where nobody looks
    **{f"+ {e}": ("3.1", loss_of(lambda m, e=e: -(m.sigmoid() + e).log())) for e in (1e-6, 1e-8, 1e-30)},
    **{f"clamp {c}": ("3.1", loss_of(lambda m, c=c: F.softplus(-m.clamp(-c, c)))) for c in (5, 30)},
    "2.3": ("2.3", lambda ref, r, beta: (ref + r / beta).softmax(-1).clamp(min=1e-30).log()),
    "1.2": ("1.2", lambda r, wins: -(wins * ((r[:, None] - r).sigmoid() + 1e-8).log()).sum() / wins.sum()),
}


@pytest.mark.parametrize("habit", BOUNDS)
def test_a_bounded_answer_is_refused_by_name(habit):
    """At the strain a check asks for the right number: a finite one is not enough."""
    verdict = judge(*BOUNDS[habit])
    assert verdict.status == "wrong" and verdict.mistake == BOUNDED
    assert f"looks like      {BOUNDED}" in verdict.message
    expected, yours = (line for line in verdict.message.split("\n") if line[2:10] in ("expected", "yours   "))
    assert expected[18:] != yours[18:], "two numbers that look alike say nothing"


def test_the_smallest_input_has_few_numbers():
    """Shrinking alone ends at four tokens: the number of tokens is drawn before them."""
    exercise = EXERCISES["9.1"]
    mistake = next(iter(exercise.mistakes.values()))
    found = smallest(exercise.inputs, lambda given: complain(exercise, mistake, given))
    assert found["token_logps"].shape == (1, 2), "a mean over one token is its sum"


@pytest.mark.parametrize(
    ("number", "answer"),
    [("2.3", student_answers.optimum_by_loops), ("5.1", student_answers.ranking_by_loops)],
)
def test_a_right_answer_that_overflows_is_told_where(number, answer):
    """Exponentials are right on paper; a long completion has none."""
    verdict = judge(number, answer)
    assert verdict.status == "right" and "leave the range of numbers" in verdict.message
    assert "leave the range of numbers" not in judge(number, solution(number)).message


@pytest.mark.parametrize("number", [number for number, exercise in EXERCISES.items() if exercise.strain])
def test_solutions_do_not_overflow(number):
    assert judge(number, solution(number)).message.count("\n") == 0


def test_a_search_is_silent(capsys):
    """A student's print appears for the one input that is shown, not for the hundreds that were tried."""

    def loud(policy_chosen, *_):
        print("here")
        warnings.warn("there", stacklevel=1)
        return policy_chosen

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        judge("3.1", loud)
    assert capsys.readouterr().out == "here\n"
    assert len(warned) == 1


def test_unknown_exercises_are_refused():
    with pytest.raises(ValueError, match=r"no exercise '3.9'; this notebook has 3.1, 3.2"):
        find_exercise("3.9")
    with pytest.raises(ValueError, match=r"no exercise '12\.1'"):
        find_exercise("12.1")


def test_agreement():
    one = torch.ones(1, dtype=torch.float64)
    assert agrees(one * (1 + 1e-10), one, 1e-9) and not agrees(one * (1 + 1e-8), one, 1e-9)
    assert agrees(one / 0, one / 0, 1e-9) and not agrees(one / 0, -one / 0, 1e-9)
    assert not agrees(one * torch.nan, one, 1e-9)
    assert agrees((1.0, one), (one.squeeze(), one), 1e-9) and not agrees((1.0,), (1.0, 2.0), 1e-9)
    assert agrees("a", "a", 1e-9) and not agrees("a", "b", 1e-9) and not agrees("a", one, 1e-9)
    assert agrees(one.numpy(), one, 1e-9)
    assert agrees([1 / 3], one / 3, 1e-9), "Python's numbers have the digits of float64"
    assert not agrees(one, one / 0, 1e-9)


def test_numbers_are_shown_as_a_student_would_write_them():
    assert show(torch.tensor([[0.0, -1.5], [1 / 3, 2.0]])) == "[[0, -1.5], [0.33333, 2]]"
    assert show((1.0, True, "a")) == "[1, True, 'a']"
    assert show(-torch.inf) == "-inf"


def test_what_answers_train_with():
    """The small GPT is a distribution, the same for the same seed, and leaves the generator alone; `descend`
    ends in a minimum, at rates that rise over 20 steps and fall to zero."""
    before = torch.get_rng_state()
    gpt, again, other = training.small_gpt(1), training.small_gpt(1), training.small_gpt(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(gpt.wte.weight, again.wte.weight) and not torch.equal(gpt.wte.weight, other.wte.weight)
    rows = torch.cartesian_prod(torch.tensor([3]), torch.arange(5), torch.arange(5))
    logps = training.logps_of_rows(gpt, rows)
    assert abs(logps.exp().sum().item() - 1) < 1e-12 and logps.max() - logps.min() > 0.1

    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    records = training.descend(lambda goal: ((x - goal).square().sum(), {}), [x], [torch.ones(2)] * 200, 0.1)
    assert (x - 1).abs().max() < 1e-3  # the last rates are below it
    rates = [record["learning_rate"] for record in records]
    assert rates.index(max(rates)) == 19 and max(rates) < 0.1 and rates[-1] == pytest.approx(0.1 / 200)
