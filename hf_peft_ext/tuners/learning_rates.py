"""The learning rate to begin with, by method."""

import math

from peft import PeftConfig

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.validation.checks import check

LEARNING_RATES = {
    "LORA": 4e-3,
    "ADALORA": 1.2e-2,
    "LOKR": 1.2e-2,
    "VERA": 1e-2,
    "FOURIERFT": 5e-2,
    "OFT": 1e-3,
    "BOFT": 1e-3,
    "SHIRA": 4e-3,
    "LN_TUNING": 5e-3,
    "BEFT": 5e-3,
    "P_TUNING": 1e-2,
    "UNIPELT": 4e-3,
    "MAM": 2e-3,
    "S4": 2e-3,
    "BOTTLENECK": 4e-3,
    "ADAMIX": 9e-3,
    "ATTENTION_FUSION": 1e-2,
    "COMPACTER": 9e-3,
    "LAYER_PREFIX": 1e-2,
    "PREFIX_TUNING": 1e-2,
    "PROMPT_TUNING": 3e-2,
    "LADDER": 1e-3,
    "INTRINSIC": 3e-3,
    "IA3": 2e-2,
    "TFEW": 2e-2,
    "BITFIT": 5e-3,
    "SPARSE": 1e-3,
}


# The largest learning rate times scaling times width of a bottleneck. Adam moves all of W_up by the learning rate at
# the first steps, so that this product is how far the output moves. MiniLM, 100 messages, 104 steps, widths of 24 to
# 512: at 0.3 and less all of 27 runs learned, at 0.6 8 of 9, at 1.2 2 of 9 (`examples/studies/wide_bottlenecks.py`).
WIDEST_STEP = 0.3


def recommended_learning_rate(config: PeftConfig, hidden_size: int | None = None) -> float:
    """The learning rate to begin with, for AdamW with linear decay and a warm-up of a tenth of the steps.

    The rates of LoRA, AdaLoRA, KronA, (IA)³ and this package's methods but ladders, attention fusion and intrinsic
    dimension were chosen on SST-2 alone: MiniLM (22 million parameters), 100 rows, batches of 8, 104 steps, 0.5 % of
    the parameters trained, one seed, rates a factor of 2 or 3 apart. Of rates that tied it is the higher one, or the
    one between two that are a factor of 3 apart (`examples/studies/which_method.py --stage tune`). That of intrinsic
    dimension is from TREC, 300 rows, 76 steps, d = 3,000, one seed: 74 % at 3e-3, 36 at 1e-3, 41 at 1e-2. The other
    rates are usual values that were not measured. TREC and short messages wanted higher ones where the classifier
    read the first token, and did well at these where it read the mean (`--head mean`). Larger models and longer
    training usually want smaller ones: on SmolLM2 (135 million parameters) a third was better for UniPELT and S4, of
    which three of six runs ended 10 points or more lower at these; published rates of LoRA on models of billions of
    parameters are about a twentieth. `hf-peft-ext compare` tries rates around these on your own model and rows.

    Wide bottlenecks get a lower rate, 0.3 / (scaling * width) at most: at their type's own rate they stop learning.
    So MAM has 2e-3 at a width of 37 and 1.5e-4 at its default width, 512.

    Args:
        config: the config of an adapter: of a type of peft that `compare` knows, or any of this package but
            `ComposedConfig`.
        hidden_size: of the model, from which bottlenecks with a `reduction_factor` have their width; None to leave
            their width out.

    Raises:
        ValueError: no rate is known for this type.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    rule = f"must be one of {', '.join(LEARNING_RATES)}; no rate is known for others"
    check("peft_type", kind, kind in LEARNING_RATES, rule)
    return min(LEARNING_RATES[kind], largest_rate(config, hidden_size))


def largest_rate(config: PeftConfig, hidden_size: int | None = None) -> float:
    """The largest learning rate that the bottlenecks of a config allow; infinite for none.

    Args:
        config, hidden_size: as in `recommended_learning_rate`.
    """
    if not isinstance(config, PlacedConfig) or config.peft_type == "S4":  # whose sizes follow from a budget
        return math.inf
    rates = [math.inf]
    for placement in config.to_placements():
        if placement.sublayer == "bottleneck":
            options = placement.options
            width = options.get("r") or (hidden_size or 0) / options["reduction_factor"]
            scaling = options.get("scaling", 1.0)
            kept = 1 - options.get("sparsity", 0.0)  # of the entries of W_up
            step = kept * width * (1.0 if scaling == "learned" else abs(scaling))
            rates.append(WIDEST_STEP / step if step else math.inf)
    return min(rates)
