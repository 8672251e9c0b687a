"""Direct Preference Optimization from scratch, checked against the closed-form optimum."""

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
from .finite_data import maximum_likelihood
from .losses import (
    PreferenceLoss,
    bradley_terry_loss,
    dpo_loss,
    dpo_loss_from_indices,
    ipo_loss,
    plackett_luce_dpo_loss,
    plackett_luce_gradient_weights,
    plackett_luce_loss,
)
from .model import GPT, GPTConfig
from .policy import (
    Completions,
    EnumeratedPolicy,
    SequenceBatch,
    completion_logps,
    enumerate_completions,
    sequence_logps,
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

__all__ = [
    "GPT",
    "Bandit",
    "Completions",
    "EnumeratedPolicy",
    "GPTConfig",
    "InputError",
    "PreferenceLoss",
    "Rankings",
    "SequenceBatch",
    "Slate",
    "TabularPolicy",
    "__version__",
    "all_sets",
    "best_of_n_logps",
    "bradley_terry",
    "bradley_terry_loss",
    "canonical_reward",
    "certify",
    "completion_logps",
    "dpo_loss",
    "dpo_loss_from_indices",
    "enumerate_completions",
    "expected_pairs",
    "expected_rankings",
    "implicit_reward",
    "ipo_loss",
    "kl_divergence",
    "log_partition",
    "maximum_likelihood",
    "next_token_logps",
    "optimal_logps",
    "plackett_luce_dpo_loss",
    "plackett_luce_gradient_weights",
    "plackett_luce_logprob",
    "plackett_luce_loss",
    "preference_matrix",
    "random_bandit",
    "random_cycles",
    "reward_kl_frontier",
    "rlhf_objective",
    "sample_pairs",
    "sample_rankings",
    "sequence_logps",
    "soft_value",
    "tally",
    "train",
]
