"""Keep pytest's search for doctests out of these files: importing them takes what only a benchmark needs."""

collect_ignore_glob = ["*.py"]
