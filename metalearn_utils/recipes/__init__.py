"""How the shipped weights were made: one function per name, from a seed to a finished run."""

from . import fonts

RECIPES = dict(fonts.RECIPES)
