"""Claims: sentences whose figures are computed and whose truth is checked where they are printed.

`claim` checks one when the page runs. `check_claims` reads a page's source and refuses claims that could never fail.
"""

import ast
import inspect
import math
import random
import re
import string
import textwrap
import warnings
from collections.abc import Callable, Iterator

from .settings import settings_now

SAFE = {f.__name__: f for f in (abs, all, any, bool, float, int, len, max, min, pow, round, sorted, sum, zip)}

TYPED = re.compile(r"(?<!rate )(?<!= )\b\d+\.\d+")  # a setting may be named in a sentence, a result may not


class ClaimError(AssertionError):
    """A sentence of the page is not true of the figures just computed."""


def claim(sentence: str, condition: Callable[..., bool], **values: object) -> None:
    """Print a sentence with its figures, and raise if it is false.

    Args:
        sentence: a format string, e.g. "MAML {m:.1f} % beats pixels {p:.1f} %".
        condition: a function of the values; true if the sentence holds.
        values: the computed figures, by the names that the sentence and the condition use.

    Raises:
        ClaimError: the condition is false. Where figures may differ from the book's (full mode, a GPU, float32), a
            warning says what was expected and what came instead.
        TypeError: the condition's result is neither true nor false.
    """
    text = sentence.format(**values)
    if _truth(condition(**values)):
        print("✓", text)
        return
    came = ", ".join(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}"
                     for name, value in values.items())  # fmt: skip
    message = f"this claim of the page does not hold here: {text} (expected {_wording(condition)}; got {came})"
    if settings_now().verified:
        raise ClaimError(message)
    print("✗", text)
    warnings.warn(f"{message}. The page was checked in quick mode on a CPU; this is {settings_now()}.", stacklevel=2)


def _truth(result: object) -> bool:
    if str(getattr(result, "dtype", type(result).__name__)).removeprefix("torch.") != "bool" or not hasattr(result, "__bool__"):
        raise TypeError(f"condition must give True or False, got {result!r}: compare something in it")
    return bool(result)


def _wording(condition: Callable[..., bool]) -> str:
    """The condition as its author wrote it, or "it to be true" where the source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent("".join(inspect.findsource(condition)[0])))
    except (OSError, SyntaxError, TypeError):
        return "it to be true"
    names, line = condition.__code__.co_varnames, condition.__code__.co_firstlineno
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Lambda) and n.lineno == line]
    return next((ast.unparse(n.body) for n in found if tuple(a.arg for a in n.args.args) == names), "it to be true")


def check_claims(source: str) -> list[str]:
    """Faults in the claims of one or more code cells, found in their syntax tree.

    A claim needs a sentence and a lambda; the lambda compares its arguments and can be false; its values are
    computed, each is in the sentence or in the condition; the sentence holds no decimal figure typed by hand.
    """
    tree = _tree(source)
    fixed = _constants(tree)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    calls = [c for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) == "claim"]
    return [f"line {call.lineno}: claim{fault}" for call in calls for fault in _faults(call, fixed)]


def _tree(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # a notebook's magics
        return ast.parse(re.sub(r"^([ \t]*)[%!].*$", r"\1pass", source, flags=re.M))


def _faults(call: ast.Call, fixed: set[str]) -> Iterator[str]:
    if len(call.args) != 2 or not isinstance(call.args[1], ast.Lambda):
        yield " needs a sentence and a lambda"
        return
    condition, values = call.args[1], {k.arg: k.value for k in call.keywords if k.arg}
    tested, shown = _names(condition.body) & set(values), _fields(call.args[0])
    yield from _idle_condition(condition, tested)
    yield from (f": {name} is a figure typed by hand" for name, v in values.items() if not _names(v) - set(SAFE))
    if tested and all(not _names(values[name]) - set(SAFE) - fixed for name in tested):
        yield "'s condition tests only constants"
    yield from (f": {name} is neither in the sentence nor in the condition" for name in values if name not in tested | shown)
    yield from (f": {name} in the sentence has no value" for name in sorted(shown - set(values)))
    yield from (f": {figure} in the sentence is typed by hand" for figure in TYPED.findall(_prose(call.args[0])))


def _idle_condition(condition: ast.Lambda, tested: set[str]) -> Iterator[str]:
    """What makes a condition worthless."""
    if not tested:
        yield "'s condition uses none of its values"
    if not any(isinstance(n, ast.Compare) for n in ast.walk(condition.body)):
        yield "'s condition compares nothing"
    elif _always(condition):
        yield "'s condition cannot be false"


def _always(condition: ast.Lambda) -> bool:
    """Whether the condition holds for all of many numbers drawn at random, equal ones among them."""
    names, draw = [a.arg for a in condition.args.args], random.Random(0)
    function = eval(compile(ast.Expression(condition), "<claim>", "eval"), {"__builtins__": SAFE, "math": math})  # noqa: S307
    for trial in range(300):
        same = draw.gauss(0, 100)
        try:
            if not function(*(same if trial % 3 == 0 else draw.gauss(0, 10 ** draw.uniform(-3, 6)) for _ in names)):
                return False
        except Exception:  # not a condition on numbers alone: nothing is known
            return False
    return True


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _constants(tree: ast.AST) -> set[str]:
    """Names to which nothing but literals is assigned."""
    bound = [(t, n.value) for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    typed = {t.id for t, value in bound if isinstance(t, ast.Name) and not _names(value) - set(SAFE)}
    other = {name for t, value in bound if _names(value) - set(SAFE) for name in _names(t)}
    again = {n.id for n in ast.walk(tree) if isinstance(n, (ast.For, ast.AugAssign, ast.comprehension)) for n in ast.walk(n.target)
             if isinstance(n, ast.Name)}  # fmt: skip
    return typed - other - again


def _text(sentence: ast.expr) -> str:
    return "".join(n.value for n in ast.walk(sentence) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _fields(sentence: ast.expr) -> set[str]:
    return {re.split(r"[.\[]", field)[0] for _, field, _, _ in string.Formatter().parse(_text(sentence)) if field}


def _prose(sentence: ast.expr) -> str:
    return "".join(text for text, _, _, _ in string.Formatter().parse(_text(sentence)))
