"""In-context learning: prompts that begin with answered examples of the task.

Nothing is trained; the model reads k answered examples before every prompt (Brown et al. 2020,
https://arxiv.org/abs/2005.14165). The T-Few paper compares with it.
"""

import random
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
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
    """Put k answered demonstrations before the prompt of each example.

        Review: dull. Verdict: bad

        Review: fine. Verdict: good

        Review: I liked it. Verdict:

    Args:
        examples: mappings with `prompt` and `choices`, as from `PromptTemplate.render`.
        demonstrations: mappings with `prompt`, `choices` and `answer`. A demonstration is skipped for an example with
            the same prompt, if its answer is among the example's choices.
        k: number of demonstrations; 0 leaves the prompts unchanged.
        seed: of the draws, which depend only on the seed and the index of the example.
        tokenizer: needed for `max_tokens` and `chat`.
        max_tokens: most tokens of a prompt with its longest choice, as in `context_length(model)`. The first
            demonstrations are dropped until the rest fits, with a warning. None for no limit.
        separator: between demonstrations; not used in chats.
        chat: format each demonstration as a turn of the user and a turn of the model.
        shared: draw once for all examples.

    Returns:
        The examples, each with a longer `prompt`.

    Raises:
        ValueError: `k` is negative or larger than the number of demonstrations; `max_tokens` or `chat` is set without
            `tokenizer`; or the tokenizer has no chat template.
    """
    rule = f"must be a whole number from 0 to {len(demonstrations)}, the number of demonstrations"
    check("k", k, type(k) is int and 0 <= k <= len(demonstrations), rule)
    needed = chat or max_tokens is not None
    check("tokenizer", tokenizer, tokenizer is not None or not needed, "is needed for `chat` and `max_tokens`")
    prompts, remaining = [], []
    for i, example in enumerate(examples):
        drawn = draw(demonstrations, example, k, f"{seed}" if shared else f"{seed} {i}")

        def prompt(dropped: int, drawn: list[Prompted] = drawn, example: Prompted = example) -> str:
            if chat:
                return as_chat(tokenizer, example["prompt"], drawn[dropped:])  # pyright: ignore[reportArgumentType]
            return separator.join([*map(answered, drawn[dropped:]), example["prompt"]])

        dropped = 0 if max_tokens is None else number_to_drop(prompt, len(drawn), example, tokenizer, max_tokens)
        prompts.append(prompt(dropped))
        if dropped:
            remaining.append(len(drawn) - dropped)
    if remaining:
        where = f"{len(remaining)} of {len(prompts)} prompts, down to {min(remaining)}"
        warnings.warn(f"Fewer than {k=} demonstrations in {where}: no more fit into {max_tokens=}.", stacklevel=2)
    return [{**example, "prompt": text} for example, text in zip(examples, prompts, strict=True)]


def draw(demonstrations: Sequence[Prompted], example: Prompted, k: int, seed: str) -> list[Prompted]:
    """k demonstrations in random order, without any that reveals the example's answer."""
    order = random.Random(seed).sample(range(len(demonstrations)), len(demonstrations))
    others = (demonstrations[i] for i in order if not reveals_answer(demonstrations[i], example))
    return list(islice(others, k))


def reveals_answer(demonstration: Prompted, example: Prompted) -> bool:
    """Whether the prompts are equal and the demonstration's answer is among the example's choices."""
    answer = demonstration["choices"][demonstration["answer"]]
    return demonstration["prompt"] == example["prompt"] and answer in example["choices"]


def answered(example: Prompted) -> str:
    """Prompt and right choice as one text, separated by white space."""
    prompt, choice = example["prompt"], example["choices"][example["answer"]]
    touching = prompt[-1:].isspace() or choice[:1].isspace() or not prompt
    return f"{prompt}{choice}" if touching else f"{prompt} {choice}"


def number_to_drop(
    prompt: Callable[[int], str],
    n_demonstrations: int,
    example: Prompted,
    tokenizer: Any,
    max_tokens: int,
) -> int:
    """How many demonstrations must be dropped to fit; all of them if none fits.

    Args:
        prompt: the prompt as a function of the number of dropped demonstrations.
        max_tokens: for the prompt and the longest choice.
    """
    longest = max(len(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in example["choices"]) + 1

    def fits(dropped: int) -> bool:
        return len(tokenizer(prompt(dropped))["input_ids"]) + longest <= max_tokens

    return bisect_left(range(n_demonstrations), True, key=fits)


def context_length(model: nn.Module) -> int | None:
    """The most tokens that a model can read; None if its config sets no limit."""
    return getattr(bare(model).config.get_text_config(), "max_position_embeddings", None)
