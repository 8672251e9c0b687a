"""Side by side on one machine: pairs a second and peak memory of ours, of TRL and of a tutorial's loop.

`python -m tests.benchmarks --help`. tasks.py says what all are given; contestant.py is the process of one of
them, which imports only its own ours.py, trl_dpo.py or hugging_face.py; duels.py starts two of them, checks
that they do the same work and lets them take turns; results.py makes the table. files.py, apart from these,
measures how large files are read. But: nothing here is part of the package, and the peers' packages
(requirements-bench.txt) are needed only here.
"""
