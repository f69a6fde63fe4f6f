"""Recipes: a run of training as one YAML file, from the command line or from Python."""

from .draft import RecipeError as RecipeError
from .recipe import Recipe as Recipe
from .train import Outcome as Outcome
from .train import prepare as prepare
from .train import train as train
