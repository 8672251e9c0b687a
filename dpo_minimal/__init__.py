"""Direct Preference Optimization from scratch, checked against the closed-form optimum.

The book's names are imported here; those of the annexes when they are first asked for (PEP 562), so that
`import dpo_minimal` costs little more than torch.
"""

from importlib import import_module

from .bandit import Bandit, TabularPolicy, random_bandit
from .certificates import certify
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
    LabelLoss,
    PreferenceLoss,
    averaged_ipo_loss,
    bradley_terry_loss,
    cdpo_loss,
    dpo_loss,
    dpo_loss_from_indices,
    ipo_loss,
    kto_kl_estimate,
    kto_loss,
    orpo_loss,
    plackett_luce_dpo_loss,
    plackett_luce_gradient_weights,
    plackett_luce_loss,
    robust_dpo_loss,
    simpo_loss,
    unlikelihood_loss,
    unweighted_dpo_loss,
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

_ANNEXES = {  # name: the annex file that has it
    "GPT": "text.checkpoint",  # which adds from_pretrained and save_pretrained to it
    "PreferencePair": "text.data",
    "load_preferences": "text.data",
    "maximum_likelihood": "laws.finite_data",
}


def __getattr__(name: str):
    if name not in _ANNEXES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_ANNEXES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ANNEXES})


__all__ = [
    "GPT",
    "Bandit",
    "Completions",
    "EnumeratedPolicy",
    "GPTConfig",
    "InputError",
    "LabelLoss",
    "PreferenceLoss",
    "PreferencePair",
    "Rankings",
    "SequenceBatch",
    "SharedPromptBatch",
    "Slate",
    "TabularPolicy",
    "__version__",
    "all_sets",
    "averaged_ipo_loss",
    "best_of_n_logps",
    "bradley_terry",
    "bradley_terry_loss",
    "canonical_reward",
    "cdpo_loss",
    "certify",
    "completion_logps",
    "dpo_loss",
    "dpo_loss_from_indices",
    "enumerate_completions",
    "expected_pairs",
    "expected_rankings",
    "generate",
    "implicit_reward",
    "ipo_loss",
    "kl_divergence",
    "kto_kl_estimate",
    "kto_loss",
    "load_preferences",
    "log_partition",
    "maximum_likelihood",
    "next_token_logps",
    "optimal_logps",
    "orpo_loss",
    "plackett_luce_dpo_loss",
    "plackett_luce_gradient_weights",
    "plackett_luce_logprob",
    "plackett_luce_loss",
    "preference_matrix",
    "random_bandit",
    "random_cycles",
    "reward_kl_frontier",
    "rlhf_objective",
    "robust_dpo_loss",
    "sample_pairs",
    "sample_rankings",
    "sequence_logps",
    "shared_prompt_batch",
    "shared_prompt_logps",
    "simpo_loss",
    "soft_value",
    "tally",
    "token_logps",
    "train",
    "unlikelihood_loss",
    "unweighted_dpo_loss",
]
