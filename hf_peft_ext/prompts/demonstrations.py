"""In-context learning: prompts that open with examples of the task and their answers.

What T-Few is compared with (Brown et al. 2020, https://arxiv.org/abs/2005.14165): nothing is trained; the model reads
k answered examples in front of every prompt.
"""

import random
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_peft_ext.prompts.chat import chat as as_chat
from hf_peft_ext.ranking.packing import bare
from hf_peft_ext.validation.checks import check

Prompted = Mapping[str, Any]  # `prompt`, `choices` and `answer`


def with_demonstrations(
    examples: Sequence[Prompted],
    demonstrations: Sequence[Prompted],
    k: int,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
    separator: str = "\n\n",
    chat: bool = False,
    shared: bool = False,
) -> list[dict[str, Any]]:
    """Examples whose prompts begin with k others and their answers.

        Review: dull. Verdict: bad

        Review: fine. Verdict: good

        Review: I liked it. Verdict:

    Args:
        examples: mappings with `prompt` and `choices`, as `PromptTemplate.render` makes them.
        demonstrations: mappings with `prompt`, `choices` and `answer`, to draw from. None with the same prompt
            as an example, and one of its choices for an answer, is shown to it.
        k: how many are shown. 0 leaves the prompts as they are.
        seed: of the draws, which depend on it and on the place of the example alone.
        tokenizer: counts the tokens for `max_tokens`, and has the template for `chat`.
        max_tokens: what the model can read, prompt and longest choice together: `context_length(model)`. The first
            demonstrations are left out, whole, until the rest fits; a warning says how often. None for no limit.
        separator: between demonstrations; not used in chats.
        chat: each demonstration is a turn of the user and one of the model.
        shared: one draw for all examples instead of one for each.

    Returns:
        The examples, each with a longer `prompt`.

    Raises:
        ValueError: `k` is negative or more than there are demonstrations; `max_tokens` or `chat` without `tokenizer`.
    """
    rule = f"must be a whole number from 0 to {len(demonstrations)}, the number of demonstrations"
    check("k", k, type(k) is int and 0 <= k <= len(demonstrations), rule)
    needs = chat or max_tokens is not None
    check("tokenizer", tokenizer, tokenizer is not None or not needs, "is needed for `chat` and `max_tokens`")
    prompts, cut = [], []
    for i, example in enumerate(examples):
        shown = draw(demonstrations, example, k, f"{seed}" if shared else f"{seed} {i}")

        def prompt(dropped: int, shown: list[Prompted] = shown, example: Prompted = example) -> str:
            if chat:
                return as_chat(tokenizer, example["prompt"], shown[dropped:])  # pyright: ignore[reportArgumentType]
            return separator.join([*map(answered, shown[dropped:]), example["prompt"]])

        dropped = 0 if max_tokens is None else first_that_fits(prompt, len(shown), example, tokenizer, max_tokens)
        prompts.append(prompt(dropped))
        if dropped:
            cut.append(len(shown) - dropped)
    if cut:
        where = f"{len(cut)} of {len(prompts)} prompts, down to {min(cut)}"
        warnings.warn(f"Fewer than {k=} demonstrations in {where}: no more fit into {max_tokens=}.", stacklevel=2)
    return [{**example, "prompt": text} for example, text in zip(examples, prompts, strict=True)]


def draw(demonstrations: Sequence[Prompted], example: Prompted, k: int, seed: str) -> list[Prompted]:
    """k of them, in random order, none that tells the example's answer."""
    order = random.Random(seed).sample(range(len(demonstrations)), len(demonstrations))
    others = (demonstrations[i] for i in order if not tells(demonstrations[i], example))
    return [shown for shown, _ in zip(others, range(k), strict=False)]


def tells(shown: Prompted, example: Prompted) -> bool:
    """Whether a demonstration has the example's prompt and one of its choices, so that it gives the answer away."""
    return shown["prompt"] == example["prompt"] and shown["choices"][shown["answer"]] in example["choices"]


def answered(example: Prompted) -> str:
    """Prompt and right choice as one text, a space between them unless one of them has white space there."""
    prompt, choice = example["prompt"], example["choices"][example["answer"]]
    touching = prompt[-1:].isspace() or choice[:1].isspace() or not prompt
    return f"{prompt}{choice}" if touching else f"{prompt} {choice}"


def first_that_fits(
    prompt: Callable[[int], str],
    most: int,
    example: Prompted,
    tokenizer: Any,
    max_tokens: int,
) -> int:
    """How many demonstrations must be left out; all, if none fits."""
    longest = max(len(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in example["choices"]) + 1

    def fits(dropped: int) -> bool:
        return len(tokenizer(prompt(dropped))["input_ids"]) + longest <= max_tokens

    return bisect_left(range(most), True, key=fits)


def context_length(model: nn.Module) -> int | None:
    """How many tokens a model can read; None where its config sets no limit."""
    return getattr(bare(model).config.get_text_config(), "max_position_embeddings", None)
