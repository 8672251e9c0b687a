"""The process of one contestant: python -m tests.benchmarks.contestant TASK, with the task as JSON.

Commands come on standard input and reports leave on standard output; whatever a library prints goes to
standard error. Each branch imports only what its contestant needs.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from .tasks import Task
from .turns import Turns

TRL_VARIANTS = {  # name: (references precomputed, gradient checkpointing)
    "trl": (False, True),  # both as its defaults have them
    "trl-precomputed": (True, True),
    "trl-no-checkpointing": (False, False),
    "trl-precomputed-no-checkpointing": (True, False),
}


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    match task.contestant:
        case "weights":
            from .ours import write_weights

            write_weights(task)
        case "ours":
            from .ours import train_ours

            train_ours(task, Turns(sys.stdin, reports, task.device))
        case "ours-sampling":
            from .ours import sample_ours

            sample_ours(task, Turns(sys.stdin, reports, task.device))
        case "plain":
            from .hugging_face import train_plainly

            train_plainly(task, Turns(sys.stdin, reports, task.device))
        case "hugging-face-sampling":
            from .hugging_face import sample_hugging_face

            sample_hugging_face(task, Turns(sys.stdin, reports, task.device))
        case name:
            from .trl_dpo import train_trl

            precomputed, checkpointing = TRL_VARIANTS[name]
            train_trl(
                task,
                Turns(sys.stdin, reports, task.device),
                precomputed=precomputed,
                checkpointing=checkpointing,
            )


if __name__ == "__main__":
    main()
