"""Small trained weights that ship with the package: float32 tensors in NAME.pt, how they were made in NAME.json."""

import json
from pathlib import Path
from typing import Any

import torch

from .checkpoints import write_atomically
from .rules import Params

FOLDER = Path(__file__).parent / "weights"
# The names of shipped learned rules begin so: see `rule_files`.
RULE = "rule-"


def available() -> list[str]:
    """Names of the networks that ship with the package; its learned rules: `rule_files.available_rules`."""
    return sorted(path.stem for path in FOLDER.glob("*.pt") if not path.stem.startswith(RULE))


def load_weights(name: str, dtype: torch.dtype = torch.float32) -> Params:
    """The parameters stored under `name`.

    Args:
        name: one of `available()`.
        dtype: floating-point type of the result; the stored values are float32.

    Raises:
        ValueError: no such weights.
    """
    if name not in available():
        raise ValueError(f"name must be one of {available()}, got {name!r}")
    stored = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    return {key: value.to(dtype) for key, value in stored.items()}


def describe(name: str) -> dict[str, Any]:
    """How the weights were made: command, seed, iterations, CPU seconds, and the loss of the first 50 iterations."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def save_weights(name: str, theta: Params, record: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Store parameters in float32 and their record; returns the path of the tensors."""
    path = folder / f"{name}.pt"
    write_atomically(path, {key: value.detach().float().contiguous() for key, value in theta.items()})
    write_record(name, record, folder)
    return path


def write_record(name: str, record: dict[str, Any], folder: Path = FOLDER) -> None:
    """Store how NAME.pt was made beside it."""
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
