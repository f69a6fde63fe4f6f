"""Exports an adapter as a plain LoRA of peft: exactly where a LoRA equals it, else by distillation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hf_peft_ext.export.distil import DistillationSettings, distil
from hf_peft_ext.export.divergence import PredictionKind, kind_of
from hf_peft_ext.export.fidelity import Fidelity, fidelity, score
from hf_peft_ext.export.files import write_lora
from hf_peft_ext.export.inputs import Inputs, Text
from hf_peft_ext.export.low_rank_factors import Factors, NotLowRankError, low_rank_factors
from hf_peft_ext.export.report import Export, with_export
from hf_peft_ext.export.roles import Roles, adapter_layers, linear_leaves
from hf_peft_ext.hub_cards.record import TrainingRecord
from hf_peft_ext.model.modes import evaluating, preserve_requires_grad
from hf_peft_ext.registry import extend_peft
from hf_peft_ext.transfer.run.task import Row
from hf_peft_ext.validation.checks import check, check_count, check_writable

PROGRESS_LINES = 5  # lines of progress


def to_lora(
    model: PeftModel,
    folder: str | Path,
    *,
    r: int = 32,
    texts: Sequence[Text | Row] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_rows: Sequence[Row] | None = None,
    adapter_name: str | None = None,
    target_modules: Sequence[str] | None = None,
    settings: DistillationSettings | None = None,
    record: TrainingRecord | None = None,
    progress: Callable[[str], object] | None = print,
) -> Export:
    """Export an adapter as a LoRA that stock peft, transformers and servers of LoRA load.

    - Exactly, if the adapter only changes weights of linear leaves by a rank of at most `r`: low-rank branches without
      gates or with fixed ones (`fix_gates`), and (IA)^3 of few changed entries, where it scales no bias.
    - Else by distillation on `texts`, which need no labels: a LoRA on the linear leaves of all blocks begins from a
      least-squares fit of what the adapter adds, and is trained by KL(adapter || LoRA). Both are on one copy of the
      base weights, which may be quantized.

    What was lost is printed, and written into the LoRA's card. Modules that the adapter saves whole are copied.

    Args:
        model: a model with the adapter: a classifier, a causal or a sequence-to-sequence language model.
        folder: where the LoRA is written, as `save_pretrained` does.
        r: rank of the LoRA; the highest that an exact export may have.
        texts: texts, pairs of texts, or rows of tokens; a tenth is held out to measure on. For an encoder-decoder rows
            may have `labels`; where they have none, the adapter's own answers are generated.
        tokenizer: the model's, needed with `texts`.
        eval_rows: rows of tokens with `labels`, for the task's metric.
        adapter_name: the adapter; the active one by default.
        target_modules: endings of the leaves that are distilled into; None for all linear leaves of the blocks.
        settings: of the distillation.
        record: of the adapter's training, whose base model, data and labels the card names.
        progress: receives lines of progress and of the result; None for none.

    Raises:
        ValueError: an argument breaks its rule, the adapter needs `texts`, or the LoRA came out closer to the base
            model than to the adapter. Nothing is written then.
        TypeError: `model` is no `PeftModel`.
    """
    began, settings, say = perf_counter(), settings or DistillationSettings(), progress or (lambda line: None)
    name = checked_adapter_name(model, folder, r, texts, tokenizer, eval_rows, adapter_name)
    with activated(model, name):
        factors, reason = exact_factors(model, name, r)
        check("texts", texts, bool(factors or texts), f"must be given, to distil the adapter on: {reason}")
        say("A LoRA equals this adapter." if factors else f"Distilled: {reason}.")
        lost, count = None, 0
        if texts and tokenizer is not None:
            export = Distillation(model, tokenizer, settings, r, factors)
            factors, lost, count = export.run(texts, eval_rows, target_modules, say)
        assert factors is not None
        kind = model.peft_config[name].peft_type
        result = Export(Path(folder), str(getattr(kind, "value", kind)), max(len(f.A) for f in factors.values()),
                        count == 0, lost, count, settings.steps if count else 0, perf_counter() - began)  # fmt: skip
        write_lora(folder, model, name, factors, with_export(record or TrainingRecord(), result, model))
    return result


class Distillation:
    """Distils an adapter into a LoRA, or measures an exact one.

    Args:
        model: with the adapter active.
        tokenizer: the model's.
        settings: of the distillation.
        r: rank of the LoRA.
        exact: the factors of an exact LoRA, which is not trained; None to train one.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: DistillationSettings,
        r: int,
        exact: dict[str, Factors] | None,
    ):
        self.model, self.settings, self.r, self.exact = model, settings, r, exact
        base: Any = model.get_base_model()
        self.kind: PredictionKind = kind_of(base.config)
        writes_answers = bool(base.config.is_encoder_decoder and base.can_generate())
        self.inputs = Inputs(tokenizer, writes_answers, next(model.parameters()).device)

    def run(
        self,
        texts: Sequence[Text | Row],
        eval_rows: Sequence[Row] | None,
        target_modules: Sequence[str] | None,
        say: Callable[[str], object],
    ) -> tuple[dict[str, Factors], Fidelity, int]:
        """The factors of the LoRA, how close it is to the adapter, and the number of texts it was trained on.

        Raises:
            ValueError: it is closer to the base model than to the adapter.
        """
        rows, held_out = self.split(texts)
        base = self.model.get_base_model()
        leaves = list(self.exact) if self.exact else linear_leaves(base, target_modules)
        r = max(len(f.A) for f in self.exact.values()) if self.exact else self.r
        torch.manual_seed(self.settings.seed)
        with Roles(self.model, leaves, r).attached() as roles:
            if self.exact:
                roles.load(self.exact)
            else:
                self.train(roles, rows, say)
            lost = fidelity(roles, self.inputs, held_out, self.kind, self.settings.batch_size)
            if eval_rows:
                labelled = self.inputs.encode(eval_rows, self.settings.max_length)
                scores = score(roles, self.inputs, labelled, self.kind, self.settings.batch_size)
                lost = replace(lost, scores=scores)
            factors = roles.factors()
        for line in lost.lines():
            say(line)
        if not self.exact and lost.is_closer_to_base:
            raise ValueError(
                f"`steps` (={self.settings.steps}) and `texts` (={len(rows)}) gave a LoRA that is closer to the base "
                f"model (KL {lost.kl_lora_base:.3g}) than to the adapter (KL {lost.kl:.3g}), so it was not written; "
                "take more steps, more texts or a higher rank."
            )
        return factors, lost, 0 if self.exact else len(rows)

    def split(self, texts: Sequence[Text | Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows to train on, and rows that are held out: every n-th."""
        rows = self.inputs.encode(texts, self.settings.max_length)
        check("texts", len(rows), len(rows) > 1, "must be at least two: some are held out")
        if self.inputs.writes_answers:
            with evaluating(self.model):
                self.inputs.with_answers(self.model, rows, self.settings.batch_size, self.settings.max_new_tokens)
        every = max(2, round(1 / self.settings.held_out))
        held_out = rows[::every]
        return [row for i, row in enumerate(rows) if i % every], held_out

    def train(self, roles: Roles, rows: list[dict[str, Any]], say: Callable[[str], object]) -> None:
        """Train the LoRA, with a few lines of progress."""
        shown = max(1, self.settings.steps // PROGRESS_LINES)
        losses: list[float] = []
        for loss in distil(roles, self.inputs, rows, self.kind, self.settings):
            losses.append(loss)
            if len(losses) % shown == 0:
                say(f"step {len(losses)} of {self.settings.steps}: KL {sum(losses[-shown:]) / shown:.3g}")


def checked_adapter_name(
    model: Any, folder: Any, r: Any, texts: Any, tokenizer: Any, eval_rows: Any, adapter_name: str | None
) -> str:
    """The adapter's name.

    Raises:
        ValueError, TypeError: see `to_lora`.
    """
    extend_peft()
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model` must be a PeftModel, not {type(model).__name__}.")
    check_count("r", r)
    check_writable("folder", str(folder))
    name = adapter_name or str(model.active_adapter)
    check("adapter_name", name, name in model.peft_config, f"must be one of {', '.join(model.peft_config)}")
    kind = model.peft_config[name].peft_type
    check("adapter_name", name, kind != "LORA", "is a LoRA already")
    rule = "is of a type that adds to the input of the model, which cannot be switched off in it"
    check("adapter_name", name, not model.peft_config[name].is_prompt_learning, rule)
    placements: Any = getattr(model.peft_config[name], "placements", None) or ()
    rule = "has a prompt, which makes the output longer than that of a LoRA"
    check("adapter_name", name, all(placement.sublayer != "prompt" for placement in placements), rule)
    check("tokenizer", tokenizer, not texts or tokenizer is not None, "must be given with `texts`")
    unlabelled = [sorted(row) for row in eval_rows or () if not {"input_ids", "labels"} <= row.keys()]
    check("eval_rows", unlabelled[:1], not unlabelled, "must have `input_ids` and `labels`")
    merged = any(layer.merged for layer in adapter_layers(model.get_base_model()))
    check("model", type(model).__name__, not merged, "has merged adapters; call unmerge_adapter() first")
    return name


def exact_factors(model: PeftModel, name: str, r: int) -> tuple[dict[str, Factors] | None, str]:
    """The factors of a LoRA that equals the adapter, or why there are none of a rank up to r."""
    try:
        factors = low_rank_factors(model, name)
    except NotLowRankError as error:
        return None, str(error)
    rank = max((len(f.A) for f in factors.values()), default=0)
    if rank > r:
        return None, f"a LoRA that equals the adapter has rank {rank}, above `r` (={r})"
    return factors or None, "the adapter has no tuner layers"


@contextmanager
def activated(model: PeftModel, name: str) -> Iterator[None]:
    """Within, an adapter is the active one; afterwards the model's own choice is again."""
    before: Any = model.active_adapter
    with preserve_requires_grad(model):
        if before != name:
            model.set_adapter(name)
        try:
            yield
        finally:
            if before != name:
                model.set_adapter(before)
