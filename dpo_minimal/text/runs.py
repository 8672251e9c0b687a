"""Run folders: one new folder a run, every file in it whole or absent."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import secrets
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..validation import InputError
from ..version import __version__
from .files import read_bytes
from .processes import leads


def refuse_used_folder(output_dir: str | None) -> None:
    """Raise InputError where `new_run_folder` would, and make nothing: to be called before the work."""
    if output_dir == "":
        raise InputError("--output-dir is empty; name a folder.")
    folder = Path("runs" if output_dir is None else output_dir)
    try:
        refuse_link(folder)
        blocking = next((path for path in (folder, *folder.parents) if path.exists()), None)
        if blocking is not None and not blocking.is_dir():
            raise InputError(f"--output-dir {folder}: {blocking} is a file; name a folder.")
        if output_dir is not None and folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"--output-dir {folder}: holds another run; name a new folder or empty this one."
            )
        with tempfile.TemporaryDirectory(dir=blocking):  # permission bits are not enough to know
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def refuse_link(folder: Path) -> None:
    """Raise InputError for a run folder that is a link: a run writes where its name says."""
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link; name the folder that it leads to, {folder.resolve()}.")


def new_run_folder(output_dir: str | None, command: str) -> Path:
    """Make the folder that a run writes into.

    Args:
        output_dir: the folder asked for, which must not exist or be empty; None takes the next free
            `runs/COMMAND-NNN`.
    Raises InputError: the folder holds something already, is a file, or cannot be written.
    """
    refuse_used_folder(output_dir)
    folder = Path("runs" if output_dir is None else output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if output_dir is not None:
            return folder
        for number in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                (numbered := folder / f"{command}-{number:03d}").mkdir()
                return numbered
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"--output-dir {folder}: cannot be written ({reason}); name another folder.")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one move, also of a link.

    Of several processes the first alone writes.
    """
    if not leads():
        return
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        # Who may read it is for the umask to say; the files of `tempfile` are for their owner alone.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with no content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, indented, ending with a newline."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """The one object that a JSON file holds. Raises InputError where it is missing or anything else."""
    data = read_bytes(path)
    try:
        fields = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, nested too deeply
        raise InputError(f"{path}: is not JSON; copy it again.") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: must hold one JSON object; copy it again.")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON's")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped from it: copy what is to outlive the file. Raises InputError."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; copy the folder again.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); see to its permissions.") from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: is truncated or damaged ({str(error)[:150]!r}); copy it again.") from None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file that numpy alone can read."""
    write_atomically(path, lambda p: np.savez_compressed(p, **arrays))


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one `record_line` each."""
    write_text(path, "".join(map(record_line, records)))


def record_line(record: dict[str, Any]) -> str:
    """A JSON object on a line; numbers that JSON cannot write (inf, nan) become null."""
    missing = {
        key: None for key, value in record.items() if isinstance(value, float) and not np.isfinite(value)
    }
    return json.dumps(record | missing) + "\n"


def versions() -> dict[str, str]:
    """What a later reader needs to get the same numbers."""
    return {
        "dpo_minimal": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
