"""How the shipped weights were made: one function per name, from a seed to a finished run."""

from . import fonts, sinusoids

RECIPES = fonts.RECIPES | sinusoids.RECIPES
