"""Fine-tuning on a few examples against showing them in every prompt (in-context learning)."""

from dataclasses import dataclass
from math import ceil

import torch
from peft import PeftConfig
from transformers import PretrainedConfig

from hf_peft_ext.budget.fake_model import model_on_meta, parameter_counts
from hf_peft_ext.budget.flops import count_flops, kv_cache_bytes, rule_flops
from hf_peft_ext.validation.checks import check, check_count


@dataclass(frozen=True)
class Workload:
    """What is trained and asked. The defaults of training are T-Few's recipe.

    Args:
        shots: examples in each prompt.
        tokens_per_example: tokens of one of them.
        query_tokens: tokens of a query, and of a training row.
        target_tokens: tokens of a target, for an encoder-decoder.
        steps: training steps.
        batch: rows of a training step.
        queries: queries to answer.
    """

    shots: int
    tokens_per_example: int
    query_tokens: int = 103
    target_tokens: int = 1
    steps: int = 1000
    batch: int = 8
    queries: int = 1000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_count(name, value)

    @property
    def context(self) -> int:
        """Tokens of the examples in a prompt."""
        return self.shots * self.tokens_per_example


@dataclass(frozen=True)
class CostComparison:
    """FLOPs of fine-tuning and of in-context learning.

    Args:
        source: "rule" (2 N / 6 N or N / 3 N a token) or "count" (the modules, with attention and adapter).
        training: FLOPs of the whole training.
        tuned_query: FLOPs of a query to the fine-tuned model.
        prompted_query: FLOPs of a query with all examples in its prompt.
        cached_query: FLOPs of a query if the examples' keys and values are cached; None for an encoder-decoder.
        prefill: FLOPs of computing that cache once; None for an encoder-decoder.
    """

    source: str
    training: float
    tuned_query: float
    prompted_query: float
    cached_query: float | None
    prefill: float | None

    def break_even(self) -> int | None:
        """The number of queries from which fine-tuning needs fewer FLOPs; None if it never does."""
        return queries_until(self.training, self.tuned_query, 0.0, self.prompted_query)

    def break_even_cached(self) -> int | None:
        """The same against in-context learning with cached examples."""
        if self.cached_query is None or self.prefill is None:
            return None
        return queries_until(self.training, self.tuned_query, self.prefill, self.cached_query)

    def totals(self, queries: int) -> dict[str, float | None]:
        """FLOPs of everything for a number of queries: fine-tuned, prompted, prompted with a cache."""
        cached = None if self.cached_query is None else (self.prefill or 0.0) + queries * self.cached_query
        tuned, prompted = self.training + queries * self.tuned_query, queries * self.prompted_query
        return {"tuned": tuned, "prompted": prompted, "cached": cached}


def queries_until(fixed: float, each: float, other_fixed: float, other_each: float) -> int | None:
    """The smallest number of queries q >= 0 with fixed + q each <= other_fixed + q other_each."""
    if fixed <= other_fixed:
        return 0
    return None if other_each <= each else ceil((fixed - other_fixed) / (other_each - each))


def compare_by_rule(
    parameters: float,
    work: Workload,
    encoder_decoder: bool = False,
    prompted_parameters: float | None = None,
    prompted_encoder_decoder: bool | None = None,
) -> CostComparison:
    """Table 1 of T-Few (Liu et al. 2022, https://arxiv.org/abs/2205.05638) for any sizes.

    T-Few on T0-11B: 11e9 * 103 = 1.1e12 a query, and 3 * 11e9 * 1000 * 8 * 103 = 2.7e16 for training. GPT-3 with 41
    examples of 98 tokens: 2 * 175e9 * (41 * 98 + 103) = 1.4e15 a query. The table's rows of GPT-3 6.7B and 13B (5.4e13
    and 1.0e14) leave the query's 103 tokens out.

    Args:
        parameters: of the fine-tuned model.
        work: what is trained and asked.
        encoder_decoder: whether that model has an encoder and a decoder.
        prompted_parameters: of the prompted model, by default the same.
        prompted_encoder_decoder: its architecture, by default the same.
    """
    if prompted_encoder_decoder is None:
        prompted_encoder_decoder = encoder_decoder
    n, query = prompted_parameters or parameters, work.query_tokens
    cached = None if prompted_encoder_decoder else rule_flops(n, query)
    return CostComparison(
        source="rule",
        training=rule_flops(parameters, work.steps * work.batch * query, encoder_decoder, training=True),
        tuned_query=rule_flops(parameters, query, encoder_decoder),
        prompted_query=rule_flops(n, work.context + query, prompted_encoder_decoder),
        cached_query=cached,
        prefill=None if cached is None else rule_flops(n, work.context),
    )


def compare_by_count(
    config: PretrainedConfig,
    work: Workload,
    peft_config: PeftConfig | None = None,
    prompted_config: PretrainedConfig | None = None,
) -> CostComparison:
    """The same, counted by `count_flops`.

    Args:
        config: of the fine-tuned model.
        work: what is trained and asked.
        peft_config: the adapter; None to train all weights.
        prompted_config: of the prompted model, by default the same.

    Raises:
        ValueError: a model cannot be built or run on fake tensors.
    """
    prompted, target = prompted_config or config, work.target_tokens
    step = count_flops(config, work.query_tokens, peft_config, target_tokens=target)
    whole = count_flops(prompted, work.context + work.query_tokens, target_tokens=target, training=False)
    cached = prefill = None
    if not prompted.is_encoder_decoder:
        prefill = count_flops(prompted, work.context, training=False).forward
        cached = count_flops(prompted, work.query_tokens, cached_tokens=work.context, training=False).forward
    return CostComparison(
        "count", step.training * work.batch * work.steps, step.forward, whole.forward, cached, prefill
    )


@dataclass(frozen=True)
class CostReport:
    """What `hf-peft-ext cost` prints.

    Args:
        parameters: of the fine-tuned model.
        trained: trained parameters.
        prompted_parameters: of the prompted model.
        rule: FLOPs by the rules.
        count: counted FLOPs.
        cache_bytes: bytes of the examples' keys and values in bfloat16; None for an encoder-decoder.
        notes: where a prompt does not fit its model.
        work: what is trained and asked.
    """

    parameters: int
    trained: int
    prompted_parameters: int
    rule: CostComparison
    count: CostComparison
    cache_bytes: int | None
    notes: list[str]
    work: Workload


def compare_with_in_context(
    config: PretrainedConfig,
    work: Workload,
    peft_config: PeftConfig | None = None,
    prompted_config: PretrainedConfig | None = None,
) -> CostReport:
    """Compare fine-tuning with in-context learning, by rule and by count.

    Args:
        config: of the fine-tuned model.
        work: what is trained and asked.
        peft_config: the adapter; None to train all weights.
        prompted_config: of the prompted model, by default the same.

    Raises:
        ValueError: a model cannot be built or run on fake tensors.
    """
    prompted = prompted_config or config
    parameters, trained = parameter_counts(model_on_meta(config, peft_config))
    if peft_config is not None:
        parameters = parameter_counts(model_on_meta(config))[0]
    n = parameter_counts(model_on_meta(prompted))[0]
    notes, longest = [], getattr(prompted, "max_position_embeddings", None)
    length = work.context + work.query_tokens
    if isinstance(longest, int) and length > longest:
        notes.append(f"The prompt's {length:,} tokens exceed the model's {longest:,} positions.")
    is_pair = config.is_encoder_decoder, prompted.is_encoder_decoder
    cache = None if prompted.is_encoder_decoder else kv_cache_bytes(prompted, work.context, torch.bfloat16)
    rule = compare_by_rule(parameters, work, is_pair[0], n, is_pair[1])
    count = compare_by_count(config, work, peft_config, prompted_config)
    check("work", work, count.tuned_query > 0, "must have products to count")
    return CostReport(parameters, trained, n, rule, count, cache, notes, work)
