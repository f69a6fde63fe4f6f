"""Prompts as the turns of a chat, for instruct models."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    demonstrations: Sequence[Mapping[str, Any]] = (),
    system: str | None = None,
) -> str:
    """A prompt as what the user says in a chat, up to where the model's answer begins.

    The text is the tokenizer's chat template with the marks that it has for turns, and white space at the ends of
    `prompt` left out. Score its answers as those of any prompt; `choices.encode_choices` does not begin it twice.

    Args:
        tokenizer: of a model that was trained for chats.
        prompt: a text.
        demonstrations: turns before it: mappings with `prompt`, `choices` and `answer`, as `PromptTemplate.render`
            makes them. Each is a turn of the user, and one of the model with the right choice.
        system: what stands before all turns; None for what the chat template has there, if anything.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"`tokenizer` ({type(tokenizer).__name__}) has no chat template; pass its prompts as they are."
        )
    turns = [] if system is None else [{"role": "system", "content": system}]
    for shown in demonstrations:
        turns.append({"role": "user", "content": shown["prompt"].strip()})
        turns.append({"role": "assistant", "content": shown["choices"][shown["answer"]].strip()})
    turns.append({"role": "user", "content": prompt.strip()})
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text
