"""Formats prompts as turns of a chat, for instruct models."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    demonstrations: Sequence[Mapping[str, Any]] = (),
    system: str | None = None,
) -> str:
    """Format a prompt as a turn of the user, up to the beginning of the model's answer.

    The text follows the tokenizer's chat template. White space at both ends of `prompt` is removed. Score the answers
    like those of any prompt; `ranking.encode.encode_choices` adds no second BOS token.

    Args:
        tokenizer: of a model that was trained for chats.
        prompt: a text.
        demonstrations: earlier turns: mappings with `prompt`, `choices` and `answer`, as from `PromptTemplate.render`.
            Each becomes a turn of the user, and a turn of the model with the right choice.
        system: the system message; None for the default of the chat template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"`tokenizer` ({type(tokenizer).__name__}) has no chat template; use the prompts without `chat`."
        )
    turns = [] if system is None else [{"role": "system", "content": system}]
    for one in demonstrations:
        turns.append({"role": "user", "content": one["prompt"].strip()})
        turns.append({"role": "assistant", "content": one["choices"][one["answer"]].strip()})
    turns.append({"role": "user", "content": prompt.strip()})
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text
