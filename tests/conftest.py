"""Hypothesis draws the same examples each time, so a failing run fails again; torch stays on one thread."""

import torch
from hypothesis import Phase, settings

# Neither `explain` nor `shrink`: most failures here are of planted bugs, whose first example is enough, and
# both would take a sixth of the whole run's time. `pytest --hypothesis-profile=shrink -k NAME` looks for
# the smallest example of a test that fails.
settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,
    print_blob=False,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)
settings.register_profile(
    "shrink", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate, Phase.shrink]
)
settings.load_profile("default")
torch.set_num_threads(1)  # tables this small are faster on one core
