"""Claims: sentences whose figures are computed and whose truth is checked where they are printed."""

import ast
import re
import warnings
from collections.abc import Callable

from .settings import settings_now


class ClaimError(AssertionError):
    """A sentence of the page is not true of the figures just computed."""


def claim(sentence: str, condition: Callable[..., bool], **values: float) -> None:
    """Print a sentence with its figures, and raise if it is false.

    Args:
        sentence: a format string, e.g. "MAML {m:.1f} % beats pixels {p:.1f} %".
        condition: a function of the values; true if the sentence holds.
        values: the computed figures, by the names that the sentence and the condition use.

    Raises:
        ClaimError: the condition is false. Where figures may differ from the book's (full mode, a GPU), a warning
            says so instead.
    """
    text = sentence.format(**values)
    if condition(**values):
        print("✓", text)
        return
    message = f"this claim of the page does not hold here: {text}"
    if settings_now().verified:
        raise ClaimError(message)
    warnings.warn(f"{message} (expected in quick mode on a CPU; this run is {settings_now()})", stacklevel=2)


def check_claims(source: str) -> list[str]:
    """Faults in a code cell's claims, found in its syntax tree: conditions that cannot fail, figures typed by hand."""
    tree = ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.M))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "claim"]
    return [fault for call in calls for fault in _faults(call)]


def _faults(call: ast.Call) -> list[str]:
    where = f"line {call.lineno}: claim"
    if len(call.args) != 2 or not isinstance(call.args[1], ast.Lambda):
        return [f"{where} needs a sentence and a lambda"]
    condition, names = call.args[1], {k.arg for k in call.keywords}
    used = {n.id for n in ast.walk(condition.body) if isinstance(n, ast.Name)}
    compared = any(isinstance(n, ast.Compare) for n in ast.walk(condition.body))
    found = [f"{where}'s condition uses none of its values"] if not used & names else []
    found += [f"{where}'s condition compares nothing"] if not compared else []
    typed = [k.arg for k in call.keywords if not any(isinstance(n, ast.Name) for n in ast.walk(k.value))]
    found += [f"{where}: {name} is a figure typed by hand" for name in typed]
    idle = [name for name in names - used if "{" + name not in _text(call)]
    return found + [f"{where}: {name} is neither in the sentence nor in the condition" for name in idle]


def _text(call: ast.Call) -> str:
    return "".join(n.value for n in ast.walk(call.args[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str))
