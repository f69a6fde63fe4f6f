"""Recipes: a training run as one YAML file, for the command line or for Python."""

from hf_peft_ext.recipes.recipe import Recipe as Recipe
from hf_peft_ext.recipes.recipe_source import RecipeError as RecipeError
from hf_peft_ext.recipes.run import Outcome as Outcome
from hf_peft_ext.recipes.run import prepare as prepare
from hf_peft_ext.recipes.run import train as train
