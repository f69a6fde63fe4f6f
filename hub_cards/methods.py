"""What a method is, in a sentence or two, and whose: the paragraph of a card and its citations."""

from typing import Any

from hf_peft_ext.hub_cards.markdown import listed, ranges
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter
from hf_peft_ext.papers import (
    BITFIT,
    HOULSBY,
    LORA,
    MAM,
    PAPERS,
    PFEIFFER,
    PREFIX_TUNING,
    S4,
    STOCK_PAPERS,
    UNIPELT,
    Paper,
)

NAMES = {
    "unipelt": "UniPELT",
    "mam": "MAM",
    "bottleneck": "Bottleneck",
    "layer_prefix": "Prefix-tuning",
    "bitfit": "BitFit",
    "s4": "S4",
    "composed": "Composed",
    "ladder": "Ladder side-tuning",
    "lora": "LoRA",
    "ia3": "(IA)³",
    "adalora": "AdaLoRA",
    "prefix_tuning": "Prefix-tuning",
    "prompt_tuning": "Prompt-tuning",
}
STYLES = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "parallel": MAM, "scaled_parallel": MAM}
SUBLAYERS = {
    "bottleneck": "bottleneck adapters (down to a few dimensions, through an activation, and up again)",
    "low_rank": "LoRA (low-rank updates of weights)",
    "prefix": "trained prefixes (keys and values that attention sees in front of every text)",
    "bias": "trained biases",
}
STRATEGIES = {"adapter": "adapters", "prefix": "prefixes", "bitfit": "biases", "lora": "LoRA"}
METHODS = {
    "unipelt": "puts {sublayers} into the layers of a frozen model{gates}.",
    "mam": "is short for mix-and-match: {sublayers}, both added to a frozen model.",
    "bottleneck": "adds {sublayers} to a frozen model.",
    "layer_prefix": "leaves a model as it is and adds {sublayers}.",
    "bitfit": "trains biases and leaves the weights as they are.",
    "s4": "puts {sublayers} into a frozen model, different ones into different layers{groups}.",
    "composed": "is put together for this adapter, of {sublayers}{gates}.",
    "ladder": "runs a thin network beside a frozen model, which takes in the hidden states of its blocks and gives "
    "the output in its place; in training, no gradient goes through the model.",
    "lora": "leaves the weights as they are and adds to some of them a product of two thin matrices of low rank.",
    "ia3": "multiplies keys, values and the inner activations of the feed-forward network by trained vectors.",
    "adalora": "is LoRA whose ranks are shared out while training, more to the matrices that matter more.",
    "prefix_tuning": "adds trained keys and values that attention sees in front of every text.",
    "prompt_tuning": "adds trained vectors in front of the embedded text.",
}


def name(adapter: SavedAdapter) -> str:
    """What people call the method."""
    return NAMES.get(adapter.method, adapter.method.upper())


def papers(adapter: SavedAdapter) -> tuple[Paper, ...]:
    """The papers of the method and of the sub-layers that are there, its own first."""
    if not adapter.is_ours:
        return STOCK_PAPERS.get(adapter.method, ())
    if adapter.method == "bottleneck":
        return (STYLES[adapter.config.style],)
    present = {placement.sublayer for placement in adapter.config.to_placements()}
    parts = {PFEIFFER: "bottleneck", PREFIX_TUNING: "prefix", LORA: "low_rank", BITFIT: "bias"}
    if adapter.method == "composed":
        return tuple(paper for paper, sublayer in parts.items() if sublayer in present)
    return tuple(p for p in PAPERS[adapter.method] if p in (UNIPELT, MAM, S4) or parts.get(p, "") in ("", *present))


def description(adapter: SavedAdapter) -> str:
    """The method in a paragraph of Markdown, with a link to its paper."""
    said = METHODS.get(adapter.method)
    own = papers(adapter)[:1] if adapter.method != "composed" else ()
    paper = "".join(f" ([{paper.title}]({paper.url}))" for paper in own)
    if said is None:
        return f"{name(adapter)} is a method of peft{paper}."
    placements: list[Any] = adapter.config.to_placements() if adapter.is_ours else []
    kinds = dict.fromkeys(placement.sublayer for placement in placements)
    gates = ""
    if any(placement.gate for placement in placements):
        gates = "; gates, small networks of their own, decide from each input how much of them is let through"
    sublayers = listed(SUBLAYERS[kind] for kind in kinds) if kinds else ""
    groups = layer_groups(adapter.config) if adapter.method == "s4" else ""
    return f"{name(adapter)}{paper} {said.format(sublayers=sublayers, gates=gates, groups=groups)}"


def layer_groups(config: Any) -> str:
    """Which strategies the groups of S4 have, such as " (layer 0: adapters and LoRA; layers 1 to 5: biases)"."""
    named = [listed(STRATEGIES[strategy] for strategy in names) for names in config.strategies]
    tuned = [(layers, named[i]) for i, layers in enumerate(config.groups or []) if i + 1 in config.tuned]
    said = "; ".join(f"layer{'s' * (len(layers) > 1)} {ranges(layers)}: {names}" for layers, names in tuned)
    return f" ({said})" if said else ""
