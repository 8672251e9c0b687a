"""Direct Preference Optimization from scratch, checked against the closed-form optimum.

The book's names are imported here; those of the annexes when they are first asked for (PEP 562), so that
`import dpo_minimal` costs little more than torch. `dpo_minimal.train` is the function, not its file, of which
`from dpo_minimal.train import warm_up` takes the other names.
"""

# ruff: noqa: F401  (what is imported here is `__all__`, computed below)
from importlib import import_module

from .bandit import Bandit, TabularPolicy, random_bandit
from .certificates import certify, maximum_likelihood
from .closed_form import (
    best_of_n_logps,
    canonical_reward,
    implicit_reward,
    kl_divergence,
    log_partition,
    next_token_logps,
    optimal_logps,
    reward_kl_frontier,
    rlhf_objective,
    soft_value,
)
from .generation import generate
from .losses import (
    PreferenceLoss,
    bradley_terry_loss,
    dpo_loss,
    dpo_loss_from_indices,
    plackett_luce_dpo_loss,
    plackett_luce_gradient_weights,
    plackett_luce_loss,
)
from .model import GPTConfig
from .policy import (
    Completions,
    EnumeratedPolicy,
    SequenceBatch,
    SharedPromptBatch,
    completion_logps,
    enumerate_completions,
    sequence_logps,
    shared_prompt_batch,
    shared_prompt_logps,
    token_logps,
)
from .preferences import (
    Rankings,
    Slate,
    all_sets,
    bradley_terry,
    expected_pairs,
    expected_rankings,
    plackett_luce_logprob,
    preference_matrix,
    random_cycles,
    sample_pairs,
    sample_rankings,
    tally,
)
from .train import train
from .validation import InputError
from .version import __version__

_ANNEXES = {  # the file of an annex: its public names
    "bench.card": ("Card", "loss_card"),
    "bench.conformance": (
        "check_cdpo_loss", "check_dpo_gradient_weight", "check_dpo_loss", "check_implicit_reward",
        "check_ipo_loss", "check_kl_estimate", "check_kto_loss", "check_optimal_policy",
        "check_plackett_luce", "check_reward_model_loss", "check_sequence_logps",
    ),
    "bench.doctor": ("Finding", "diagnose"),
    "laws.games": ("duality_gap", "regularised_equilibrium"),
    "text.checkpoint": ("GPT",),  # which adds from_pretrained and save_pretrained to it
    "text.data": ("PreferencePair", "load_preferences"),
    "zoo": (
        "LabelLoss", "aot_loss", "apo_down_loss", "apo_zero_loss", "averaged_dpo_loss",
        "averaged_ipo_loss", "bco_loss", "cdpo_loss", "discopop_loss", "divergence_dpo_loss",
        "divergence_optimal_logps", "dpop_loss", "exo_loss", "hinge_loss", "ipo_loss", "kto_kl_estimate",
        "kto_loss", "nca_loss", "orpo_loss", "robust_dpo_loss", "rpo_loss", "simpo_loss", "sppo_loss",
        "unlikelihood_loss", "unweighted_dpo_loss", "with_nll",
    ),
}  # fmt: skip
_FILE_OF = {name: file for file, names in _ANNEXES.items() for name in names}
_HERE = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith(__name__)]
__all__ = sorted({*_HERE, *_FILE_OF, "__version__"})


def __getattr__(name: str):
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_FILE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILE_OF})
