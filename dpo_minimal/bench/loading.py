"""A function of yours by its name: `path/to/file.py:function` or `package.module:function`.

The file is run as an import would run it, with its folder importable meanwhile, as `python file.py` has it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from ..validation import InputError

SHOWN = 8  # names in a message


def load_function(target: str) -> Callable[..., Any]:
    """What `path/to/file.py:function` or `package.module:function` names; dots may lead into classes.

    Raises: InputError: no colon, no such file, module or function, an error while it loads, not callable.
    """
    place, colon, name = target.rpartition(":")
    if not (place and colon and name):
        raise InputError(f"{target}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.")
    is_file = place.endswith(".py") or not all(part.isidentifier() for part in place.split("."))
    if is_file and not Path(place).is_file():
        raise InputError(f"{place}: no such file; write FILE.py:FUNCTION, with the path of the file.")
    module = _loaded(place, is_file)
    there = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    known = "it has " + (", ".join(there[:SHOWN]) or "no functions of its own")
    try:
        function = reduce(getattr, name.split("."), module)
    except AttributeError:
        raise InputError(f"{place}: has no {name}; {known}.") from None
    if not callable(function):
        raise InputError(f"{target}: is of type {type(function).__name__}, no function; {known}.")
    return function


def _loaded(place: str, is_file: bool) -> ModuleType:
    """The module, run with its folder importable; what it raises becomes a sentence with its line."""
    folder = str(Path(place).resolve().parent if is_file else Path.cwd())
    sys.path.insert(0, folder)
    try:
        return _run(Path(place)) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not is_file and missing and f"{place}.".startswith(f"{missing}."):
            raise InputError(f"{place}: no such module here; name a file as FILE.py:FUNCTION.") from None
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        inside = [frame for frame in frames if frame[0].startswith(folder)] or frames
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else inside[-1]
        reason = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        reason = " ".join(reason.replace(". ", ", ").rstrip(".: ").split())
        where = f"line {line} of {Path(file or place).name}"
        raise InputError(f"{place}: cannot be loaded ({where} raises {reason}); repair it.") from None
    finally:
        with contextlib.suppress(ValueError):  # the loaded code may have removed it
            sys.path.remove(folder)


def _run(path: Path) -> ModuleType:
    name = f"_loaded_{path.stem}"  # a file named like an installed module must not replace that one
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(path)))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
