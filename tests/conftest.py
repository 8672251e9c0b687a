"""Hypothesis draws the same examples each time, so a failing run fails again; torch stays on one thread."""

import torch
from hypothesis import Phase, settings

settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,
    print_blob=False,
    # Not `explain`, which traces lines: most failures here are of planted bugs, and explaining those would
    # take a tenth of the whole run's time.
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.load_profile("default")
torch.set_num_threads(1)  # tables this small are faster on one core
