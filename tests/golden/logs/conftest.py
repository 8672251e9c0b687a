"""Keep doctest out of these files: importing them takes what only `make_logs.py` needs."""

collect_ignore_glob = ["*.py"]
