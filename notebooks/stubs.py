"""An exercise's code as the student finds it, and as it is solved."""

import re

SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n(.*?)^ *### END SOLUTION(?:\n|\Z)", re.MULTILINE | re.DOTALL)
STUB = "raise NotImplementedError  # your code"


def stub(code: str) -> str:
    """The code with every solution replaced by `raise NotImplementedError`."""
    return SOLUTION.sub(lambda match: f"{match[1]}{STUB}\n", code).rstrip("\n")


def solution(code: str) -> str:
    """The code with its solutions, without the markers."""
    return SOLUTION.sub(lambda match: match[2], code).rstrip("\n")
