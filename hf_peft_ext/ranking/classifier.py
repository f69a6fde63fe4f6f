"""Score answer choices by how probable a language model finds them, and take the best.

Rank classification, as T0, T-Few (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.1) and
lm-evaluation-harness evaluate with it: the score of a choice y of T tokens to a prompt x is log p(y | x), as a whole
("none") or divided by a length of y:

    "token"      T: what T-Few trains with its length-normalised loss and evaluates with
    "byte"       its UTF-8 bytes: `acc_bytes` of lm-evaluation-harness
    "character"  its characters: `acc_norm` of lm-evaluation-harness

Each prompt is read once for all its choices where the model can (see `packing`). Scores do not depend on what shares a
forward, nor on the side that the tokenizer pads on.
"""

from collections.abc import Iterator, Sequence
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
Part = tuple[int, int, int]  # an example, and from which to which of its choices


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
    """The score of every choice of every prompt; the highest is the model's answer.

    The model is run in evaluation mode, and every module is then put back into the mode that it was in.

    Args:
        model: a causal or sequence-to-sequence language model, with adapters or without.
        tokenizer: the model's.
        prompts: texts.
        choices: texts that all prompts share, or such a list for each prompt, of any lengths.
        normalization: what divides the log-probability of a choice: "token", "byte", "character" or "none".
        separator: goes between prompt and choice where neither has white space there; decoders only.
        max_tokens: how many tokens a forward may hold, padding included, which bounds its memory. Prompts share a
            forward, and the choices of a prompt are split over several, to keep to it; a single choice is never split.
        packed: whether a prompt is read once for its choices; None for wherever the model can.

    Returns:
        A float32 tensor of shape (choices,) on the CPU for each prompt.

    Raises:
        TypeError: `prompts`, or the choices of a prompt, are a single text.
        ValueError: a value breaks a rule, or `packed` is True and the model cannot.
    """
    known = get_args(Normalization)
    check("normalization", normalization, normalization in known, f"must be one of {', '.join(known)}")
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


class RankClassifier:
    """A language model as a classifier: its answer to a prompt is the choice it finds most probable.

    Args:
        model: a causal or sequence-to-sequence language model, with adapters or without.
        tokenizer: the model's.
        choices: the choices of prompts that come without.
        normalization, separator, max_tokens, packed: see `score_choices`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        choices: Sequence[str] | None = None,
        normalization: Normalization = "token",
        separator: str = " ",
        max_tokens: int = 2048,
        packed: bool | None = None,
    ):
        self.model, self.tokenizer, self.choices = model, tokenizer, choices
        self.normalization: Normalization = normalization
        self.separator, self.max_tokens, self.packed = separator, max_tokens, packed

    def scores(self, prompts: Sequence[str], choices: Choices | None = None) -> list[Tensor]:
        """The scores of `score_choices`, a tensor of shape (choices,) for each prompt."""
        choices = self.known(choices)
        return score_choices(
            self.model,
            self.tokenizer,
            prompts,
            choices,
            normalization=self.normalization,
            separator=self.separator,
            max_tokens=self.max_tokens,
            packed=self.packed,
        )

    def predict(self, prompts: Sequence[str], choices: Choices | None = None) -> list[str]:
        """The best choice to each prompt; the first of equals."""
        scores = [score.tolist() for score in self.scores(prompts, choices)]
        lists = choices_by_prompt(prompts, self.known(choices))
        return [texts[score.index(max(score))] for texts, score in zip(lists, scores, strict=True)]

    def predict_proba(self, prompts: Sequence[str], choices: Choices | None = None) -> list[Tensor]:
        """The softmax of the scores, of shape (choices,) for each prompt. With "none" it is how probable the model
        finds each choice if it must be one of them; with "token" it is what T-Few's choice loss trains.
        """
        return [score.softmax(0) for score in self.scores(prompts, choices)]

    def known(self, choices: Choices | None) -> Choices:
        choices = self.choices if choices is None else choices
        if choices is None:
            raise ValueError("`choices` (=None) must be given here, or when the classifier is made.")
        return choices


def choices_by_prompt(prompts: Sequence[str], choices: Choices) -> list[list[str]]:
    """A list of choices for each prompt."""
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
    """The choices of all examples, in forwards of at most `max_tokens`, the longest first."""

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
    """What divides the score of each choice."""
    match normalization:
        case "token":
            return [len(choice) for choice in example.choices]
        case "byte":
            return [len(text.encode()) for text in texts]
        case "character":
            return [len(text) for text in texts]
    return [1] * len(texts)
