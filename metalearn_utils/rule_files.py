"""Learned rules as small files: the kind and settings of a rule, and phi in float32."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import weights
from .checkpoints import write_atomically
from .coordinatewise import gated, lstm, per_parameter_mlp
from .learned import step_size
from .rules import Params, Phi, UpdateRule

FORMAT = "metalearn_utils rule 1"
RULES: dict[str, Callable[..., UpdateRule]] = {
    "step_size": step_size,
    "per_parameter_mlp": per_parameter_mlp,
    "lstm": lstm,
    "gated": gated,
}


def available_rules() -> list[str]:
    """Names of the rules that ship with the package; `weights.describe` tells how each was made."""
    return sorted(path.stem for path in weights.FOLDER.glob(f"{weights.RULE}*.pt"))


def save_rule(path: str | Path, rule: UpdateRule, kind: str, **config: bool | int | float) -> Path:
    """Store a learned rule: `RULES[kind](**config)` with the values of `rule.phi`, rounded to float32.

    Args:
        path: the file, written whole or not at all.
        rule: the rule, e.g. `step_size(hidden=8)._replace(phi=trained.theta)`.
        kind: a name in `RULES`.
        config: the settings that `rule` was built with, where they are not the defaults.

    Returns:
        The path of the file.

    Raises:
        ValueError: an unknown kind or setting, a phi with other names or shapes than `RULES[kind](**config)` has,
            values that are not finite in float32, or a rule that moves otherwise than the one that would be loaded.
    """
    built = _build(kind, config)
    _check_shapes("rule.phi", rule.phi, built)
    phi = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in rule.phi.items()}
    _check_finite("rule.phi", phi)
    if not _alike(rule, built):
        raise ValueError(f"rule moves otherwise than {_call(kind, config)}: give all settings that it was built with")
    write_atomically(Path(path), {"format": FORMAT, "kind": kind, "config": config, "phi": phi})
    return Path(path)


def load_rule(source: str | Path) -> UpdateRule:
    """The rule in a file, or one that ships with the package; its phi is float64.

    Args:
        source: the path of a file that `save_rule` wrote, or one of `available_rules()`.

    Raises:
        ValueError: no such file or shipped rule; a truncated or foreign file; an unknown kind; settings or shapes of
            another architecture; weights that are not finite.
    """
    path = _find(source)
    stored = _read(path)
    kind, config, phi = stored["kind"], stored["config"], stored["phi"]
    try:
        built = _build(kind, config)
        _check_shapes("phi", phi, built)
        _check_finite("phi", phi)
    except ValueError as error:
        raise ValueError(f"rule file {path}: {error}") from error
    return built._replace(phi={name: value.double() for name, value in phi.items()})


def shapes(phi: Phi) -> dict[str, Any]:
    """The names in phi with their shapes: what tells one architecture from another."""
    return {k: shapes(v) if isinstance(v, Mapping) else list(v.shape) for k, v in phi.items()}


def _find(source: str | Path) -> Path:
    if source in available_rules():
        return weights.FOLDER / f"{source}.pt"
    if not Path(source).is_file():
        raise ValueError(f"source must be a file or one of the shipped rules {available_rules()}, got {str(source)!r}")
    return Path(source)


def _read(path: Path) -> dict[str, Any]:
    """The content of a rule file, every part of the type that it should have."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"rule file {path} is truncated or not a rule file: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ValueError(f"rule file {path} is foreign: expected format {FORMAT!r}")
    types = {"kind": str, "config": dict, "phi": dict}
    if wrong := [part for part, kind in types.items() if not isinstance(stored.get(part), kind)]:
        raise ValueError(f"rule file {path} is damaged: {wrong[0]} is missing or of the wrong type")
    if not all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in stored["phi"].values()):
        raise ValueError(f"rule file {path} is damaged: phi must hold float32 tensors")
    return stored


def _build(kind: str, config: dict[str, Any]) -> UpdateRule:
    """An untrained rule; it draws from a generator of its own, so that nobody else's random numbers change."""
    if kind not in RULES:
        raise ValueError(f"kind must be one of {sorted(RULES)}, got {kind!r}")
    if odd := [name for name, value in config.items() if type(value) not in (bool, int, float)]:
        raise ValueError(f"config must hold plain numbers and booleans, got {odd[0]}={config[odd[0]]!r}")
    try:
        return RULES[kind](**config, generator=torch.Generator())
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"config does not fit {kind}: {error}") from error


def _check_shapes(name: str, phi: Phi, built: UpdateRule) -> None:
    found, expected = shapes(phi), shapes(built.phi)
    if found != expected:
        raise ValueError(f"{name} is of another architecture: expected {expected}, got {found}")


def _check_finite(name: str, phi: Params) -> None:
    if odd := [key for key, value in phi.items() if not value.isfinite().all()]:
        raise ValueError(f"{name} must be finite in float32, but {odd[0]!r} is not")


def _alike(rule: UpdateRule, built: UpdateRule) -> bool:
    """Whether both, with the same phi, make the same three updates: a setting such as `base` shows in no shape."""
    theta = {"a": torch.tensor([[0.3, -1.2], [0.5, 2.0]]).double(), "b": torch.tensor(-0.7).double()}
    phi = {name: value.detach().to("cpu", torch.float64) for name, value in rule.phi.items()}
    states = [rule.init(theta), built.init(theta)]
    for k in range(3):
        grads = {name: torch.sin((k + 2) * value) for name, value in theta.items()}
        loss = torch.tensor(1.5 / (k + 1), dtype=torch.float64)
        steps = [r.update(phi, grads, s | {"loss": loss}) for r, s in zip((rule, built), states)]
        if not all(torch.allclose(a, b, 0.0, 0.0, equal_nan=True) for a, b in zip(*(u.values() for u, _ in steps))):
            return False
        states = [state for _, state in steps]
    return True


def _call(kind: str, config: dict[str, Any]) -> str:
    return f"{kind}({', '.join(f'{name}={value!r}' for name, value in config.items())})"
