"""How the shipped weights were made: one function per name, from a seed to a finished run."""

from functools import partial

from torch import float64

from . import fonts, sinusoids
from .learned import RULE_RECIPES

RULES = {f"rule-{name}": recipe for name, recipe in RULE_RECIPES.items()}
RECIPES = fonts.RECIPES | sinusoids.RECIPES | RULES
# The same without float32's rounding, which differs between machines: what is repeated to check a record.
EXACT = {name: partial(recipe, dtype=float64, validated=False) for name, recipe in fonts.RECIPES.items()}
EXACT |= sinusoids.RECIPES | RULES
