"""Tables that cost more than a page may take: stored beside the page with what they depend on, refused when stale."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .evaluate import Scores

ROOT = Path(__file__).resolve().parent


def fingerprint(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 (first 16 digits) of each file, by its name within the package or by its own name."""
    return {_name(p): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted(paths, key=_name)}


def write(path: Path, command: str, depends: Iterable[Path], content: dict[str, Any]) -> None:
    """Store a table with the command that makes it and the hashes of the files it depends on."""
    record = {"command": command, "depends": fingerprint(depends)} | content
    _store(path, json.dumps(record, indent=1) + "\n")


def kept(path: Path, depends: Iterable[Path], run: Callable[[], Any]) -> Any:
    """A part of a table that an interrupted run left at `path`, unless a file that it depends on changed; or of a run now.

    Args:
        path: a JSON file in the cache; half-written parts never stand there.
        depends: the files that the part depends on.
        run: makes the part, of what JSON can hold.
    """
    now = fingerprint(depends)
    if path.exists() and (record := json.loads(path.read_text("utf-8")))["depends"] == now:
        return record["part"]
    part = run()
    _store(path, json.dumps({"depends": now, "part": part}))
    return part


def read(name: str) -> dict[str, Any]:
    """The stored table `name`; it travels with the package, so that a notebook finds it on Colab too."""
    path = ROOT / "tables" / f"{name}.json"
    if not path.exists():
        have = sorted(p.stem for p in path.parent.glob("*.json"))
        raise ValueError(f"name must be one of {have}, got {name!r}")
    return json.loads(path.read_text("utf-8"))


def stale(name: str, depends: Iterable[Path]) -> list[str]:
    """Names of the files that changed since the table was made; files that are absent here (data) are not judged."""
    stored, now = read(name)["depends"], fingerprint(p for p in depends if p.exists())
    return [name for name, digest in now.items() if stored.get(name) != digest]


def encode(correct: Tensor) -> str:
    """Counts 0 to 25 per task as letters A to Z."""
    return "".join(chr(65 + int(c)) for c in correct)


def decode(letters: str, queries: int = 25) -> Tensor:
    """Per-task accuracies in percent, [tasks], from letters."""
    return torch.tensor([100 * (ord(c) - 65) / queries for c in letters], dtype=torch.float64)


def floats(text: str) -> Tensor:
    """Numbers stored as float32 in base64, as a float64 tensor [n]."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32).double()


def scores(letters: str, transductive: bool) -> Scores:
    """Stored per-task accuracies as `Scores`."""
    return Scores(decode(letters)[None], "accuracy", transductive)


def _store(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _name(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
