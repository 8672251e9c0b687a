"""A function of yours by its name: `path/to/file.py:function` or `package.module:function`.

The file is run as an import would run it, with its folder importable meanwhile, as `python file.py` has it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
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
    module = _of_name(place) if _is_dotted(place) else _of_file(Path(place))
    try:
        function = reduce(getattr, name.split("."), module)
    except AttributeError:
        raise InputError(f"{place}: has no {name}; {_there(module)}.") from None
    if not callable(function):
        raise InputError(f"{target}: is of type {type(function).__name__}, no function; {_there(module)}.")
    return function


def _is_dotted(place: str) -> bool:
    return not place.endswith(".py") and all(part.isidentifier() for part in place.split("."))


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such file; write FILE.py:FUNCTION, with the path of the file.")
    name = f"_loaded_{path.stem}"  # a file named like an installed module must not replace that one
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    with _loading(str(path), path.resolve().parent):
        spec.loader.exec_module(module)
    return module


def _of_name(name: str) -> ModuleType:
    with _loading(name, Path.cwd()):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or f"{name}.".startswith(f"{error.name}."):
                raise InputError(
                    f"{name}: no such module here; name a file as FILE.py:FUNCTION, or install the package."
                ) from None
            raise


@contextlib.contextmanager
def _loading(place: str, folder: Path) -> Iterator[None]:
    """With the folder importable; an error of the loaded code becomes a sentence with its line."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        inside = [frame for frame in frames if frame[0].startswith(str(folder))] or frames
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else inside[-1]
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        where = f"line {line} of {Path(file or place).name}"
        problem = " ".join(f"{where} raises {type(error).__name__}: {reason}".replace(". ", ", ").split())
        raise InputError(f"{place}: cannot be loaded ({problem.rstrip('.: ')}); repair it.") from None
    finally:
        with contextlib.suppress(ValueError):  # the loaded code may have removed it
            sys.path.remove(str(folder))


def _there(module: ModuleType) -> str:
    """What could have been meant: the functions that the module defines itself, or else has at all."""
    found = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    own = [name for name in found if getattr(vars(module)[name], "__module__", None) == module.__name__]
    names = own or found
    if not names:
        return "it has no functions"
    return "it has " + ", ".join(names[:SHOWN]) + (" and others" if len(names) > SHOWN else "")
