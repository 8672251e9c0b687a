"""Side by side on one machine: pairs a second and peak memory of ours, of TRL and of a tutorial's loop.

    python -m tests.benchmarks --help

    tasks.py       what all are given: the shape of the GPT-2, the same weights and the same tokens
    contestant.py  the process of one contestant: wait for a turn, work, report
    ours.py, trl_dpo.py, hugging_face.py   the contestants
    duels.py       starts the processes, checks that they do the same work, and lets two of them take turns
    results.py     medians, ratios, the table

A contestant's process imports nothing of another's. But: nothing here is part of the package, and the
peers' packages (requirements-bench.txt) are needed only here.
"""
