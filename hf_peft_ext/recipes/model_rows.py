"""Rows of a recipe as tokens that its model reads, with labels, for work without the task's trainer."""

from collections.abc import Iterator
from typing import Any

from hf_peft_ext.ranking.encode import encode_choices
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.recipes.data import InstructionData, RankingData
from hf_peft_ext.recipes.embeddings import EmbeddingData
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.recipes.recipe_source import RecipeError


def model_rows(recipe: Recipe, rows: Any, tokenizer: Any, labels: list[str]) -> list[dict[str, Any]]:
    """Each row as `input_ids`, `attention_mask` and `labels`.

    Instructions and chats are one text, with a label at each token of the response. Of rows with answer choices it is
    the right one.

    Args:
        recipe: the recipe.
        rows: a `datasets.Dataset`, from `recipe.data.load`.
        tokenizer: the model's.
        labels: names of the classes.

    Raises:
        RecipeError: the recipe is of an embedding model, whose rows have no labels.
    """
    if isinstance(recipe.data, EmbeddingData):
        raise RecipeError("`peft.task_type` (='FEATURE_EXTRACTION') must be another: pairs of texts have no labels.")
    encoded = recipe.data.encode(rows, tokenizer, labels)
    if isinstance(recipe.data, RankingData):
        seq2seq = recipe.task.model.__name__ == "AutoModelForSeq2SeqLM"
        return [ranked_row(row, tokenizer, seq2seq) for row in encoded]
    if isinstance(recipe.data, InstructionData):
        return list(instruction_rows(encoded, tokenizer, getattr(recipe.training, "max_length", None)))
    return [dict(row) for row in encoded]


def ranked_row(row: dict[str, Any], tokenizer: Any, seq2seq: bool) -> dict[str, Any]:
    """A prompt and its right choice."""
    example = encode_choices(tokenizer, row["prompt"], [row["choices"][row["answer"]]], seq2seq)
    prompt, choice = example.prompt, example.choices[0]
    ids = prompt if seq2seq else prompt + choice
    labels = choice if seq2seq else [IGNORED] * len(prompt) + choice
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def instruction_rows(rows: Any, tokenizer: Any, max_length: int | None) -> Iterator[dict[str, Any]]:
    """Texts, instructions or chats, as TRL names their columns."""
    for row in rows:
        prompt, text = "", row.get("text", "")
        if "messages" in row:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        elif "prompt" in row:
            prompt, text = row["prompt"], row["prompt"] + row["completion"] + (tokenizer.eos_token or "")
        ids = tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"]
        context = min(len(tokenizer(prompt)["input_ids"]), len(ids)) if prompt else 0
        yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * context + ids[context:]}
