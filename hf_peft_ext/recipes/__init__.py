"""Recipes: a run of training as one YAML file, from the command line or from Python."""

from .draft import RecipeError as RecipeError
from .recipe import Recipe as Recipe
from .runs import Outcome as Outcome
from .runs import prepare as prepare
from .runs import train as train
