"""Classifies by ranking: a language model scores all answer choices, and the most probable one is the answer.

Rank classification is the evaluation of T0, T-Few (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.1) and
lm-evaluation-harness. The score of a choice y of T tokens after a prompt x is log p(y | x), undivided ("none") or
divided by a length of y:

    "token"      T, as in T-Few's length-normalised loss and its evaluation
    "byte"       its UTF-8 bytes: `acc_bytes` of lm-evaluation-harness
    "character"  its characters: `acc_norm` of lm-evaluation-harness

Each prompt is read once for all its choices if the model can do so (see `packing`). Scores depend neither on the other
examples in a forward pass nor on the padding side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_peft_ext.model.modes import evaluating
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.ranking.encode import Example, collate, encode_choices
from hf_peft_ext.ranking.packing import bare, choice_token_scores, packs
from hf_peft_ext.validation.checks import check, check_count

Normalization = Literal["token", "byte", "character", "none"]
Choices = Sequence[str] | Sequence[Sequence[str]]
Part = tuple[int, int, int]  # index of an example, first of its choices, end of its choices (exclusive)


@torch.no_grad()
def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Choices,
    normalization: Normalization = "token",
    separator: str = " ",
    max_tokens: int = 2048,
    packed: bool | None = None,
) -> list[Tensor]:
    """Score every choice of every prompt; the choice with the highest score is the model's answer.

    The model runs in evaluation mode. The modes of all modules are restored afterwards.

    Args:
        model: a causal or sequence-to-sequence language model, with or without adapters.
        tokenizer: the model's.
        prompts: texts.
        choices: texts for all prompts, or a list of texts for each prompt, of any lengths.
        normalization: length that divides the log-probability: "token", "byte", "character" or "none".
        separator: inserted between prompt and choice if neither has white space there; decoders only.
        max_tokens: most tokens in a forward pass, padding included. Prompts share a forward pass, and the choices of a
            prompt are split over several; a single choice is never split.
        packed: whether a prompt is read once for all its choices; None if the model can do so.

    Returns:
        A float32 tensor of shape (choices,) on the CPU for each prompt.

    Raises:
        TypeError: `prompts` or `choices` is a single text.
        ValueError: `normalization` or `max_tokens` is not allowed, choices are missing or empty, or `packed` is True
            and the model cannot pack.
    """
    allowed = get_args(Normalization)
    check("normalization", normalization, normalization in allowed, f"must be one of {', '.join(allowed)}")
    check_count("max_tokens", max_tokens)
    texts = choices_by_prompt(prompts, choices)
    base = bare(model)
    seq2seq = base.config.is_encoder_decoder
    packed = packs(model, packed)
    examples = [encode_choices(tokenizer, *pair, seq2seq, separator) for pair in zip(prompts, texts, strict=True)]
    scores = [torch.zeros(len(example.choices)) for example in examples]
    keep_4bit_trainable(base)
    with evaluating(model):
        for parts in batches(examples, max_tokens, packed and not seq2seq):
            batch = collate([examples[i].part(start, stop) for i, start, stop in parts])
            device = base.get_input_embeddings().weight.device
            tokens = choice_token_scores(model, {key: value.to(device) for key, value in batch.items()}, packed)
            log_p = tokens.row_sums(tokens.log_p).cpu().split([stop - start for _, start, stop in parts])
            for (i, start, stop), part in zip(parts, log_p, strict=True):
                scores[i][start:stop] = part
    for score, example, options in zip(scores, examples, texts, strict=True):
        score /= torch.tensor(lengths(example, options, normalization))
    return scores


@dataclass(repr=False, eq=False)
class RankClassifier:
    """A language model as a classifier: it answers a prompt with the most probable choice.

    Args:
        model: a causal or sequence-to-sequence language model, with or without adapters.
        tokenizer: the model's.
        choices: the default choices.
        normalization, separator, max_tokens, packed: see `score_choices`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    choices: Sequence[str] | None = None
    normalization: Normalization = "token"
    separator: str = " "
    max_tokens: int = 2048
    packed: bool | None = None

    def scores(self, prompts: Sequence[str], choices: Choices | None = None) -> list[Tensor]:
        """The scores of `score_choices`, a tensor of shape (choices,) for each prompt.

        Raises:
            TypeError, ValueError: see `score_choices`; or there are neither choices nor default ones.
        """
        settings = (self.normalization, self.separator, self.max_tokens, self.packed)
        return score_choices(self.model, self.tokenizer, prompts, self.choices_or_default(choices), *settings)

    def predict(self, prompts: Sequence[str], choices: Choices | None = None) -> list[str]:
        """The best choice for each prompt; the first of equals.

        Raises:
            TypeError, ValueError: see `scores`.
        """
        scores = [score.tolist() for score in self.scores(prompts, choices)]
        lists = choices_by_prompt(prompts, self.choices_or_default(choices))
        return [texts[score.index(max(score))] for texts, score in zip(lists, scores, strict=True)]

    def predict_proba(self, prompts: Sequence[str], choices: Choices | None = None) -> list[Tensor]:
        """The softmax of the scores, a tensor of shape (choices,) for each prompt.

        With "none" it is the probability of each choice, given that the answer is one of them. With "token" it is the
        distribution that T-Few's choice loss trains.

        Raises:
            TypeError, ValueError: see `scores`.
        """
        return [score.softmax(0) for score in self.scores(prompts, choices)]

    def choices_or_default(self, choices: Choices | None) -> Choices:
        """These choices, or else those of the classifier.

        Raises:
            ValueError: there are none.
        """
        choices = self.choices if choices is None else choices
        if choices is None:
            raise ValueError("`choices` (=None) must be passed here or to the classifier.")
        return choices


def choices_by_prompt(prompts: Sequence[str], choices: Choices) -> list[list[str]]:
    """A list of choices for each prompt.

    Raises:
        TypeError: an argument is a single text.
        ValueError: the number of lists is wrong, or a list or a text is empty.
    """
    for name, value in (("prompts", prompts), ("choices", choices)):
        if isinstance(value, str):
            raise TypeError(f"`{name}` must be a list of texts, not the single text {value!r}.")
    texts = [choice for choice in choices if isinstance(choice, str)]
    lists = [list(choice) for choice in choices if not isinstance(choice, str)]
    if texts and not lists:
        lists, texts = [texts for _ in prompts], []
    rule = f"must be one list of texts, or a list of texts for each of the {len(prompts)} prompts"
    check("choices", choices, not texts and len(lists) == len(prompts), rule)
    for options in lists:
        check("choices", options, len(options) > 0 and all(options), "must hold at least one text, and no empty one")
    return lists


def batches(examples: Sequence[Example], max_tokens: int, packed: bool) -> Iterator[list[Part]]:
    """Distribute the choices over forward passes of at most `max_tokens`, the longest first.

    Args:
        packed: whether the choices of an example share a row.
    """

    def tokens(parts: Sequence[Part]) -> int:
        prompt = max(len(examples[i].prompt) for i, _, _ in parts)
        choices = [[len(choice) for choice in examples[i].choices[start:stop]] for i, start, stop in parts]
        if packed:
            return len(parts) * (prompt + max(map(sum, choices)))
        return sum(map(len, choices)) * (prompt + max(map(max, choices)))

    parts: list[Part] = []
    for i, example in enumerate(examples):
        start = 0
        for stop in range(1, len(example.choices)):
            if tokens([(i, start, stop + 1)]) > max_tokens:
                parts.append((i, start, stop))
                start = stop
        parts.append((i, start, len(example.choices)))
    batch: list[Part] = []
    for part in sorted(parts, key=lambda part: tokens([part]), reverse=True):
        if batch and tokens([*batch, part]) > max_tokens:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def lengths(example: Example, texts: Sequence[str], normalization: Normalization) -> list[int]:
    """The length of each choice that divides its score."""
    if normalization == "token":
        return [len(choice) for choice in example.choices]
    size = {"byte": lambda text: len(text.encode()), "character": len, "none": lambda text: 1}[normalization]
    return [size(text) for text in texts]
