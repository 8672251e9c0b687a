"""Every bad input to the closed forms, the choice models and the losses: one sentence naming the argument."""

import math

import pytest
import torch

import dpo_minimal
from dpo_minimal import bandit, certificates, closed_form, losses, preferences
from dpo_minimal.laws import finite_data, sampling_laws
from dpo_minimal.rivals import baselines, evaluate
from dpo_minimal.validation import check_device, check_range
from dpo_minimal.zoo import ipo, unlikelihood

NAN, INF = math.nan, math.inf
LOGPS = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]).log()  # (2, 3), each row a distribution
REWARDS = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.5, 0.0]])
ROW = torch.tensor([-1.0, -2.0, -3.0])  # (B,) log-probabilities, of a batch, not a distribution
SLATE = preferences.all_sets(torch.ones(2, 3, dtype=torch.bool))
EXISTS = torch.tensor([[True, True, True], [True, True, False]])
COMPLETIONS, LENGTHS = torch.tensor([[0, 0], [0, 1], [1, 9]]), torch.tensor([2, 2, 1])


def replaced(table, value):
    """The table with one entry replaced."""
    table = table.clone()
    table.view(-1)[1] = value
    return table


def bad_tables(good, *, distribution=False, minus_inf=True, alone=False):
    """What no function takes in place of this float table; `alone` if no other argument fixes its shape."""
    bad = {
        "nan": replaced(good, NAN),
        "inf": replaced(good, INF),
        "integers": torch.zeros(good.shape, dtype=torch.long),
        "booleans": torch.zeros(good.shape, dtype=torch.bool),
        "list": good.tolist(),
        "none": None,
        "scalar": torch.tensor(-1.0),
        "empty": torch.zeros(*good.shape[:-1], 0),
    }
    if minus_inf:
        bad["minus inf"] = replaced(good, -INF)
    if not alone:
        bad["column"] = good.unsqueeze(-1)  # (B, 1) against (B,) would broadcast to (B, B)
        bad["longer"] = torch.cat([good, good], -1)
    if distribution:
        bad["unnormalised"] = good + 0.01
        bad["probabilities"] = good.exp()
        bad["nothing possible"] = torch.full(good.shape, -INF)
    return bad


BAD_POSITIVE = dict(
    zero=0, zero_float=0.0, negative=-1.0, nan=NAN, inf=INF, bool=True, string="0.5", none=None, list=[0.5]
) | dict(vector=torch.tensor([0.5, 0.5]), zero_tensor=torch.tensor(0.0))
BAD_COUNT = dict(zero=0, negative=-1, real=2.0, bool=True, string="2", none=None, nan=NAN)
BAD_FLIP = dict(
    half=0.5, more=0.7, one=1, negative=-0.1, nan=NAN, string="0.1", none=None, inf=INF, bool=True
)
BAD_BETAS = dict(
    empty=[], zero=[0.5, 0.0], negative=[-0.5], nan=[NAN], inf=[INF], bool=[True], string=["0.5"]
) | dict(number=0.5, none=None, text="0.5", table=torch.ones(2, 2))


def finite(good):
    return bad_tables(good)


def distribution(good):  # log 0 is allowed
    return bad_tables(good, distribution=True, minus_inf=False)


def cases(module, tables):
    """{function: (good arguments, {argument: bad values})} as one list of test parameters."""
    return [
        pytest.param(getattr(module, function), {**good, name: value}, name, id=f"{function}-{name}-{label}")
        for function, (good, bad) in tables.items()
        for name, values in bad.items()
        for label, value in values.items()
    ]


def assert_refused(function, arguments, name):
    """InputError, which is a ValueError, with the argument's own name as a word of its message."""
    assert issubclass(dpo_minimal.InputError, ValueError)
    with pytest.raises(dpo_minimal.InputError, match=rf"(?<!\w){name}(?!\w)"):
        function(**arguments)


WORLD = dict(ref_logps=LOGPS, rewards=REWARDS, beta=0.5)
BAD_WORLD = dict(ref_logps=distribution(LOGPS), rewards=finite(REWARDS), beta=BAD_POSITIVE)

CLOSED_FORM = {
    "log_partition": (WORLD, BAD_WORLD),
    "soft_value": (WORLD, BAD_WORLD),
    "optimal_logps": (WORLD, BAD_WORLD),
    "canonical_reward": (WORLD, BAD_WORLD),
    "implicit_reward": (
        dict(logps=LOGPS, ref_logps=LOGPS, beta=0.5),
        dict(logps=finite(LOGPS), ref_logps=finite(LOGPS), beta=BAD_POSITIVE),
    ),
    "kl_divergence": (
        dict(logps=LOGPS, other_logps=LOGPS),
        dict(logps=distribution(LOGPS), other_logps=distribution(LOGPS)),
    ),
    "rlhf_objective": (dict(logps=LOGPS, **WORLD), dict(logps=distribution(LOGPS), **BAD_WORLD)),
    "best_of_n_logps": (
        dict(ref_logps=LOGPS, rewards=REWARDS, n=2),
        dict(ref_logps=distribution(LOGPS), rewards=finite(REWARDS), n=BAD_COUNT),
    ),
    "reward_kl_frontier": (
        dict(ref_logps=LOGPS, rewards=REWARDS, betas=[0.5]),
        dict(ref_logps=distribution(LOGPS), rewards=finite(REWARDS), betas=BAD_BETAS),
    ),
    "next_token_logps": (
        dict(completion_logps=LOGPS, completions=COMPLETIONS, lengths=LENGTHS),
        dict(
            completion_logps=bad_tables(LOGPS, distribution=True, alone=True),
            completions=dict(flat=COMPLETIONS[:, 0], too_few=COMPLETIONS[:2]),
            lengths=dict(too_few=LENGTHS[:2], column=LENGTHS.unsqueeze(-1))
            | dict(empty=torch.tensor([2, 2, 0]), too_long=torch.tensor([2, 3, 1])),
        ),
    ),
}


@pytest.mark.parametrize(("function", "arguments", "name"), cases(closed_form, CLOSED_FORM))
def test_closed_forms_refuse(function, arguments, name):
    """Eq. 3-5, 8-10: beta > 0, finite rewards, distributions that sum to one (pitfalls of properties 5-7)."""
    assert_refused(function, arguments, name)


def world_tables(good):  # (X, Y) rewards that a slate points into
    return bad_tables(good, alone=True)


PAIRS = dict(rewards=REWARDS, slate=SLATE, temperature=1.0, flip_probability=0.1)
BAD_PAIRS = dict(rewards=world_tables(REWARDS), temperature=BAD_POSITIVE, flip_probability=BAD_FLIP)
BAD_SIZE = BAD_COUNT | dict(one=1, too_large=3)
PREFERENCES = {
    "bradley_terry": (
        dict(first_rewards=ROW, second_rewards=ROW),
        dict(first_rewards=finite(ROW), second_rewards=finite(ROW)),
    ),
    "preference_matrix": (dict(rewards=REWARDS), dict(rewards=world_tables(REWARDS))),
    "plackett_luce_logprob": (dict(ranked_rewards=REWARDS), dict(ranked_rewards=world_tables(REWARDS))),
    "all_sets": (dict(exists=EXISTS), dict(size=BAD_SIZE)),
    "random_cycles": (
        dict(exists=EXISTS, cycles=1, generator=torch.Generator()),
        dict(size=BAD_SIZE, cycles=BAD_COUNT),
    ),
    "expected_pairs": (PAIRS, BAD_PAIRS),
    "sample_pairs": (dict(num_pairs=5, **PAIRS), dict(num_pairs=BAD_COUNT, **BAD_PAIRS)),
    "expected_rankings": (dict(rewards=REWARDS, slate=SLATE), dict(rewards=world_tables(REWARDS))),
    "sample_rankings": (
        dict(rewards=REWARDS, num_rankings=5, slate=SLATE),
        dict(rewards=world_tables(REWARDS), num_rankings=BAD_COUNT),
    ),
}


@pytest.mark.parametrize(("function", "arguments", "name"), cases(preferences, PREFERENCES))
def test_choice_models_refuse(function, arguments, name):
    """Eq. 1, 18: finite rewards, positive temperature, label noise below one half (properties 33, 82)."""
    assert_refused(function, arguments, name)


PAIRED = [f"{who}_{which}_logps" for who in ("policy", "reference") for which in ("chosen", "rejected")]
MARGIN = dict.fromkeys(PAIRED, ROW) | dict(beta=0.5)
BAD_MARGIN = dict.fromkeys(PAIRED, finite(ROW)) | dict(beta=BAD_POSITIVE)
INDEX = torch.tensor([0, 1])
BAD_INDEX = dict(
    beyond=torch.tensor([0, 3]),
    negative=torch.tensor([0, -1]),
    real=torch.tensor([0.0, 1.0]),
    mask=torch.tensor([True, False]),
    short_integers=torch.tensor([0, 1], dtype=torch.uint8),  # torch reads these as a mask
    column=torch.tensor([[0], [1]]),
    empty=torch.tensor([], dtype=torch.long),
    scalar=torch.tensor(0),
)
POLICY = dict.fromkeys(PAIRED[:2], ROW)
BAD_POLICY = dict.fromkeys(PAIRED[:2], finite(ROW))
TOKENS = torch.tensor([1, 2, 3])
COUNTED = dict(chosen_lengths=TOKENS, rejected_lengths=TOKENS.flip(0))
BAD_TOKENS = dict(
    empty_completion=torch.tensor([1, 0, 2]),
    nan=replaced(TOKENS.float(), NAN),
    inf=replaced(TOKENS.float(), INF),
    column=TOKENS.unsqueeze(-1),
    longer=torch.tensor([1, 2, 3, 4]),
    list=[1, 2, 3],
    number=2,
    none=None,
)
BAD_COUNTED = dict.fromkeys(COUNTED, BAD_TOKENS)
BAD_FROM_ZERO = dict(negative=-0.1, nan=NAN, inf=INF, bool=True, string="0.5", none=None)
ABOVE_ZERO = dict(above_zero=replaced(ROW, 0.1))
LABELS = torch.tensor([True, False, True])
KTO = dict(
    policy_logps=ROW,
    reference_logps=ROW,
    is_desirable=LABELS,
    kl_estimate=0.1,
    beta=0.5,
    desirable_weight=1.0,
    undesirable_weight=1.0,
)
BAD_KTO = dict(
    policy_logps=finite(ROW),
    reference_logps=finite(ROW),
    is_desirable=dict(numbers=LABELS.float(), list=LABELS.tolist(), column=LABELS.unsqueeze(-1), none=None),
    kl_estimate=dict(negative=-0.1, nan=NAN, inf=INF, string="0.1", none=None, bool=True)
    | dict(negative_row=replaced(-ROW, -0.1), column=-ROW.unsqueeze(-1), longer=torch.ones(4)),
    beta=BAD_POSITIVE,
    desirable_weight=BAD_POSITIVE,
    undesirable_weight=BAD_POSITIVE,
)
RANKED = dict(policy_logps=LOGPS, reference_logps=LOGPS, beta=0.5)
BAD_RANKED = dict(policy_logps=finite(LOGPS), reference_logps=finite(LOGPS), beta=BAD_POSITIVE)
BAD_NAME = dict(unknown="kl", empty="", none=None, number=1, list=["alpha"])
BAD_SHARE = BAD_FROM_ZERO | dict(above_one=1.01)
LOSSES = {
    "dpo_loss": (MARGIN, BAD_MARGIN),
    "ipo_loss": (MARGIN, BAD_MARGIN),
    "unweighted_dpo_loss": (MARGIN, BAD_MARGIN),
    **{
        f"{name}_loss": (MARGIN, BAD_MARGIN) for name in ("nca", "sppo", "apo_zero", "apo_down", "bco", "aot")
    },
    "cdpo_loss": (MARGIN | dict(label_smoothing=0.1), BAD_MARGIN | dict(label_smoothing=BAD_FLIP)),
    "robust_dpo_loss": (MARGIN | dict(flip_probability=0.1), BAD_MARGIN | dict(flip_probability=BAD_FLIP)),
    "divergence_dpo_loss": (
        MARGIN | dict(divergence="alpha", alpha=0.5),
        BAD_MARGIN | dict(divergence=BAD_NAME, alpha=BAD_SHARE),
    ),
    "divergence_optimal_logps": (
        dict(ref_logps=LOGPS, rewards=REWARDS, beta=0.5, divergence="alpha", alpha=0.5),
        CLOSED_FORM["optimal_logps"][1] | dict(divergence=BAD_NAME, alpha=BAD_SHARE),
    ),
    "averaged_ipo_loss": (MARGIN | COUNTED, BAD_MARGIN | BAD_COUNTED),
    "averaged_dpo_loss": (MARGIN | COUNTED, BAD_MARGIN | BAD_COUNTED),
    "hinge_loss": (MARGIN, BAD_MARGIN),
    "exo_loss": (
        MARGIN | dict(label_smoothing=0.1),
        BAD_MARGIN | dict(label_smoothing=BAD_FLIP | dict(zero=0.0)),
    ),
    "discopop_loss": (MARGIN | dict(tau=0.1), BAD_MARGIN | dict(tau=BAD_POSITIVE | dict(above_one=1.01))),
    "dpop_loss": (MARGIN | dict(lam=0.5), BAD_MARGIN | dict(lam=BAD_FROM_ZERO)),
    "rpo_loss": (
        MARGIN | dict(chosen_lengths=TOKENS, nll_weight=0.5),
        BAD_MARGIN | dict(chosen_lengths=BAD_TOKENS, nll_weight=BAD_FROM_ZERO),
    ),
    "simpo_loss": (
        POLICY | COUNTED | dict(beta=0.5, gamma=0.5),
        BAD_POLICY | BAD_COUNTED | dict(beta=BAD_POSITIVE, gamma=BAD_FROM_ZERO),
    ),
    "orpo_loss": (
        POLICY | COUNTED | dict(lam=0.1),
        {name: bad | ABOVE_ZERO for name, bad in BAD_POLICY.items()} | BAD_COUNTED | dict(lam=BAD_FROM_ZERO),
    ),
    "unlikelihood_loss": (
        POLICY | dict(alpha=0.5),
        BAD_POLICY | dict(alpha=BAD_FROM_ZERO | dict(above_one=1.01)),
    ),
    "kto_loss": (KTO, BAD_KTO),
    "kto_kl_estimate": (
        dict(policy_logps=ROW, reference_logps=ROW),
        dict(policy_logps=finite(ROW), reference_logps=finite(ROW)),
    ),
    "dpo_loss_from_indices": (
        dict(pi_logps=ROW, ref_logps=ROW, yw_idxs=INDEX, yl_idxs=INDEX.flip(0), beta=0.5),
        dict(
            pi_logps=finite(ROW),
            ref_logps=finite(ROW),
            yw_idxs=BAD_INDEX,
            yl_idxs=BAD_INDEX | dict(longer=torch.tensor([0, 1, 2])),
            beta=BAD_POSITIVE,
        ),
    ),
    "bradley_terry_loss": (
        dict(chosen_rewards=ROW, rejected_rewards=ROW),
        dict(chosen_rewards=finite(ROW), rejected_rewards=finite(ROW)),
    ),
    "plackett_luce_loss": (dict(ranked_rewards=REWARDS), dict(ranked_rewards=world_tables(REWARDS))),
    "plackett_luce_dpo_loss": (RANKED, BAD_RANKED),
    "plackett_luce_gradient_weights": (RANKED, BAD_RANKED),
}


@pytest.mark.parametrize(("function", "arguments", "name"), cases(dpo_minimal, LOSSES))
def test_losses_refuse(function, arguments, name):
    """Eq. 2, 7, 20 and the relatives: finite log-probabilities of one shape, beta > 0, indices in range
    (property 79), one token or more, labels that are true or false."""
    assert_refused(function, arguments, name)


POPULATION = preferences.expected_pairs(REWARDS, SLATE)
ONE_PROMPT = POPULATION._replace(prompt=POPULATION.prompt * 0)
LAW = dict(optimal=LOGPS.double(), ref_logps=LOGPS.double(), beta=0.5)
CHANCES = (1 - torch.eye(3)) / 6
BAD_CHANCES = dict(
    row=CHANCES[0], wide=1.5 * CHANCES[:2], alone=torch.ones(1, 1), many=torch.full((21, 21), 1 / 441),
    twice=2 * CHANCES, nan=replaced(CHANCES, NAN),
    negative=CHANCES + torch.diag(torch.tensor([-0.1, 0.1, 0.0])),
)  # fmt: skip
BAD_CHANCE = dict(zero=0.0, one=1.0, negative=-0.1, more=1.1, nan=NAN)
LAWS = {
    "finite_data_law": (dict(rankings=POPULATION, **LAW), dict(beta=BAD_POSITIVE)),
    "kl_law": (dict(population=POPULATION, **LAW), dict(beta=BAD_POSITIVE)),
    "score_moments": (
        dict(scores=REWARDS[:1], population=ONE_PROMPT, num_rankings=5),
        dict(scores=dict(two=REWARDS), num_rankings=BAD_COUNT),
    ),
    "cramer_rao": (
        dict(scores=REWARDS, population=POPULATION, num_rankings=5), dict(num_rankings=BAD_COUNT)
    ),
    "no_estimate_bound": (
        dict(chances=CHANCES, num_pairs=5), dict(chances=BAD_CHANCES, num_pairs=BAD_COUNT)
    ),
    "normal_quantile": (dict(probability=0.5), dict(probability=BAD_CHANCE)),
    "chi_square_quantile": (
        dict(probability=0.5, degrees=3), dict(probability=BAD_CHANCE, degrees=BAD_COUNT)
    ),
}  # fmt: skip
FINITE_DATA = {
    "add_prior": (dict(rankings=POPULATION, exists=EXISTS, strength=1.0), dict(strength=BAD_POSITIVE))
}
ALL = dict(rankings=POPULATION, exists=EXISTS | True)
IPO = {"ipo_estimate": (dict(beta=0.5, **ALL), dict(beta=BAD_POSITIVE))}
UNLIKELIHOOD = {
    "unlikelihood_logps": (dict(alpha=0.1, **ALL), dict(alpha=BAD_FROM_ZERO | dict(one=1, above_one=1.01)))
}

CERTIFICATES = {
    "certify": (
        dict(logps=LOGPS, ref_logps=LOGPS, rankings=POPULATION, beta=0.5),
        dict(logps=distribution(LOGPS), ref_logps=distribution(LOGPS), beta=BAD_POSITIVE),
    )
}
BANDIT = {
    "random_bandit": (
        dict(num_prompts=2, num_completions=3),
        dict(num_prompts=BAD_COUNT, num_completions=BAD_COUNT | dict(one=1))
        | dict(reward_scale=BAD_POSITIVE, reference_scale=BAD_POSITIVE),
    )
}


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    cases(sampling_laws, LAWS) + cases(finite_data, FINITE_DATA) + cases(certificates, CERTIFICATES)
    + cases(bandit, BANDIT) + cases(ipo, IPO) + cases(unlikelihood, UNLIKELIHOOD),
)  # fmt: skip
def test_laws_refuse(function, arguments, name):
    """Probabilities strictly between 0 and 1, counts from 1 on, a square table of chances that sum to one,
    tables of a certificate that are distributions."""
    assert_refused(function, arguments, name)


TABLES = dict(logps=LOGPS, ref_logps=LOGPS, rewards=REWARDS, beta=0.5)
BAD_TABLES = dict(
    logps=finite(LOGPS), ref_logps=finite(LOGPS), rewards=finite(REWARDS), beta=BAD_POSITIVE
)  # fmt: skip
BAD_GRADIENT = BAD_TABLES | dict(logps=dict(unnormalised=LOGPS + 0.01, probabilities=LOGPS.exp()))
BASELINES = {
    "penalised_rewards": (TABLES, BAD_TABLES),
    "policy_gradient": (TABLES, BAD_GRADIENT),
    "natural_gradient_step": (
        TABLES | dict(learning_rate=0.1),
        BAD_GRADIENT | dict(learning_rate=BAD_POSITIVE),
    ),
    "reinforce_variance": (
        TABLES | dict(baseline=REWARDS[:, 0]),
        dict(baseline=dict(column=REWARDS[:, :1], longer=REWARDS[0], number=torch.tensor(0.0))),
    ),
    "kl_estimates": (dict(logps=ROW, ref_logps=ROW), dict(logps=finite(ROW), ref_logps=finite(ROW))),
    "clipped_surrogate": (
        dict(logps=ROW, old_logps=ROW, advantages=ROW, clip=0.2),
        dict(logps=finite(ROW), old_logps=finite(ROW), advantages=finite(ROW), clip=BAD_POSITIVE),
    ),
    "best_of_n_reward": (
        dict(rewards=REWARDS, n=2),
        dict(rewards=world_tables(REWARDS), n=BAD_COUNT | dict(more=4)),
    ),
    "best_of_n_kl_bound": (dict(n=2), dict(n=BAD_COUNT)),
    "frontier_gap": (
        dict(logps=LOGPS, ref_logps=LOGPS, rewards=REWARDS),
        dict(logps=dict(flat=LOGPS[0], unnormalised=LOGPS + 0.01), ref_logps=distribution(LOGPS)),
    ),
}
EVALUATE = {
    "exact_win_rate": (
        dict(logps=LOGPS, other_logps=LOGPS, rewards=REWARDS),
        dict(logps=distribution(LOGPS), other_logps=distribution(LOGPS), rewards=finite(REWARDS)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "name"), cases(baselines, BASELINES) + cases(evaluate, EVALUATE)
)
def test_baselines_refuse(function, arguments, name):
    """As the closed forms do: a table that is none, or of another shape, would be broadcast or be NaN."""
    assert_refused(function, arguments, name)


GOOD = [
    pytest.param(getattr(module, function), good, id=function)
    for module, table in (
        (closed_form, CLOSED_FORM),
        (preferences, PREFERENCES),
        (dpo_minimal, LOSSES),
        (sampling_laws, LAWS),
        (finite_data, FINITE_DATA),
        (ipo, IPO),
        (unlikelihood, UNLIKELIHOOD),
        (baselines, BASELINES),
        (evaluate, EVALUATE),
    )
    for function, (good, _) in table.items()
]


@pytest.mark.parametrize(("function", "arguments"), GOOD)
def test_good_arguments_pass_through_unchanged(function, arguments):
    """The tables above differ from these arguments in one place each, and these are answered with finite
    numbers and left as they were."""
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    result = function(**arguments)
    for output in result if isinstance(result, tuple) else [result]:
        assert torch.as_tensor(output).numel() > 0 and torch.isfinite(torch.as_tensor(output)).all()
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


def test_message_says_where_and_what():
    """The sentence gives the first bad entry's place and value, the two shapes, or how far a sum is off."""
    with pytest.raises(
        dpo_minimal.InputError, match=r"^rewards must be finite, but entry \[0, 1\] is nan\.$"
    ):
        closed_form.optimal_logps(LOGPS, replaced(REWARDS, NAN), beta=0.5)
    with pytest.raises(dpo_minimal.InputError, match=r"shape \(3, 1\) but policy_chosen_logps has \(3,\)"):
        losses.dpo_loss(ROW, ROW, ROW.unsqueeze(-1), ROW, beta=0.5)
    with pytest.raises(
        dpo_minimal.InputError, match=r"a log-sum is off by 0\.01 nats; apply log_softmax\(-1\)"
    ):
        closed_form.optimal_logps(LOGPS + 0.01, REWARDS, beta=0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounded_tables_are_still_distributions(dtype):
    """Property 75: a table normalised in its own dtype, or in float64 and rounded to it, is accepted, and a
    table off by far more than that rounding is not."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 200, generator=generator, dtype=torch.float64)
    rewards = torch.zeros(50, 200, dtype=dtype)
    for table in (logits.log_softmax(-1).to(dtype), logits.to(dtype).log_softmax(-1)):
        # log Z is 0 up to the rounding of entries near 10, a relative eps each.
        size = 10 * torch.finfo(dtype).eps
        assert closed_form.log_partition(table, rewards, beta=1.0).abs().max() <= size
        with pytest.raises(
            dpo_minimal.InputError, match="ref_logps must be log-probabilities that sum to one"
        ):
            closed_form.log_partition(table + max(4e-4, 4 * size), rewards, beta=1.0)


def test_ends_of_a_range_belong_to_it():
    """[low, high] holds both ends; NaN is nowhere."""
    for value in (0, 0.5, 1):
        check_range("share", value, 0, 1, "a share")
    for value in (-1e-9, 1 + 1e-9, NAN):
        with pytest.raises(dpo_minimal.InputError, match=r"^share must lie between 0 and 1 \(a share\)"):
            check_range("share", value, 0, 1, "a share")


def test_a_message_is_one_line_of_400_characters():
    """Of what a file holds, and a message quotes, the middle is left out; place and remedy stay."""
    for quoted in ("x" * 10**6, "\n" * 300, "\x1b[31m\ud800", "\u2028" * 399):
        message = str(dpo_minimal.InputError(f"FILE, line 3: {quoted} is no number; write one."))
        assert message.startswith("FILE, line 3: ") and message.endswith(" is no number; write one.")
        assert len(message) <= 400 and message.isprintable()
    whole = "FILE: " + "y" * 394
    assert str(dpo_minimal.InputError(whole)) == whole


def test_devices_are_numbered_from_zero(monkeypatch):
    """cuda is the first; the number after the last is refused, and so is any other kind."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cpu", "cuda", "cuda:0"):
        check_device(device)
    for device, named in (("cuda:1", "finds no such"), ("mps", "choose cpu or cuda"), ("cuda:", "choose")):
        with pytest.raises(dpo_minimal.InputError, match=rf"^--device {device}: [^\n]*{named}[^\n]*\.$"):
            check_device(device)


def test_whole_numbers_and_tensors_are_numbers():
    """Eq. 4: beta = 2, 2.0 and a zero-dimensional tensor mean the same, in every dtype."""
    expected = closed_form.optimal_logps(LOGPS, REWARDS, beta=2.0)
    for beta in (2, torch.tensor(2.0), torch.tensor(2, dtype=torch.float64), torch.tensor(2)):
        assert torch.equal(closed_form.optimal_logps(LOGPS, REWARDS, beta=beta), expected)
