"""Files that are written whole or not at all, and read with suspicion."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "metalearn_utils checkpoint 2"


class CheckpointError(RuntimeError):
    """A checkpoint is unreadable, cannot be written, or belongs to another run."""


def check_writable(path: Path | None) -> None:
    """Raise a `CheckpointError` if no file can be made beside `path`, before any work is spent."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise CheckpointError(f"checkpoint: cannot write to {path}: {error}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, tensors and plain values only; a `CheckpointError` that says what is wrong with it."""
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} is truncated or not a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} is foreign: expected format {FORMAT!r}")
    return state


def write_atomically(path: Path, value: Any) -> None:
    """`torch.save` to a temporary file beside `path`, then rename: no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
