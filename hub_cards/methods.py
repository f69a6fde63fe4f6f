"""Names, descriptions and papers of methods, for the cards."""

from typing import Any

from hf_peft_ext.hub_cards.markdown import listed
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter
from hf_peft_ext.papers import (
    BITFIT,
    DIFF_PRUNING,
    FISH_MASK,
    HOULSBY,
    LORA,
    LT_SFT,
    MAM,
    PAPERS,
    PFEIFFER,
    PREFIX_TUNING,
    REFT,
    S4,
    SPARSE_ADAPTER,
    STOCK_PAPERS,
    UNIPELT,
    Paper,
)
from hf_peft_ext.validation.suggestions import ranges

KRONECKER = " of a frozen model. Their matrices are sums of Kronecker products of small matrices"
# method, or a style of one -> its common name, and what it does
METHOD_TEXTS = {
    "unipelt": ("UniPELT", "puts {sublayers} into the layers of a frozen model{gates}."),
    "mam": ("MAM", "is short for mix-and-match: {sublayers}, both added to a frozen model."),
    "bottleneck": ("Bottleneck", "adds {sublayers} to a frozen model."),
    "compacter": ("Compacter", f"adds bottleneck adapters after attention and after the FFN{KRONECKER}."),
    "compacter++": ("Compacter++", f"adds bottleneck adapters after the FFN{KRONECKER}."),
    "adamix": (
        "AdaMix",
        "adds several bottleneck adapters at each place of a frozen model. Each training batch goes through one of "
        "them, drawn at random; for inference they are averaged.",
    ),
    "attention_fusion": (
        "Attention fusion",
        "weighs the outputs of several frozen adapters of one model by trained attention, for each token and at each "
        "place. It needs these adapters, loaded under the same names.",
    ),
    "layer_prefix": ("Prefix-tuning", "freezes a model and adds {sublayers}."),
    "bitfit": ("BitFit", "trains biases and freezes the weights."),
    "s4": ("S4", "puts {sublayers} into a frozen model, different ones into different layers{groups}."),
    "composed": ("Composed", "combines, for this adapter, {sublayers}{gates}."),
    "ladder": (
        "Ladder side-tuning",
        "runs a small network beside a frozen model. The network reads the hidden states of the model's blocks and "
        "computes the output in its place; no gradient passes through the model.",
    ),
    "sparse": ("Sparse fine-tuning", "trains a few entries of a model's parameters{groups}; the rest is frozen."),
    "intrinsic": (
        "Intrinsic dimension",
        "trains a few numbers, which a fixed random projection maps onto all parameters of a frozen model.",
    ),
    "lora": ("LoRA", "freezes the weights and adds a product of two low-rank matrices to some of them."),
    "ia3": (
        "(IA)³",
        "multiplies keys, values and the inner activations of the feed-forward network by trained vectors.",
    ),
    "adalora": ("AdaLoRA", "is LoRA that assigns ranks during training: higher ones to more important matrices."),
    "lokr": ("LoKr", "freezes the weights and adds a Kronecker product to some of them."),
    "vera": ("VeRA", "trains vectors that scale random matrices, which all layers share."),
    "fourierft": ("FourierFT", "trains some coefficients of the Fourier transform of the weights' update."),
    "oft": ("OFT", "rotates weights by trained orthogonal blocks."),
    "boft": ("BOFT", "rotates weights by trained orthogonal matrices in butterfly form."),
    "shira": ("SHiRA", "trains a sparse set of the weights."),
    "ln_tuning": ("LayerNorm tuning", "trains the norms and freezes everything else."),
    "beft": ("BEFT", "trains a bias of the value projections."),
    "p_tuning": ("P-tuning", "adds vectors in front of the embedded text, which a small network computes."),
    "prefix_tuning": ("Prefix-tuning", "adds trained keys and values that attention sees in front of every text."),
    "prompt_tuning": ("Prompt-tuning", "adds trained vectors in front of the embedded text."),
}
SELECTIONS = {
    "fisher": (FISH_MASK, "those with the largest mean squared gradients (FISH mask)"),
    "lottery_ticket": (LT_SFT, "those that moved most in a first training of all of them (LT-SFT)"),
    "diff": (DIFF_PRUNING, "those with the largest differences after a training with an L0 penalty (diff pruning)"),
    "random": (None, "drawn at random"),
}
STYLE_PAPERS = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "parallel": MAM, "scaled_parallel": MAM}
SUBLAYER_NAMES = {
    "bottleneck": "bottleneck adapters (down to a few dimensions, through an activation, and up again)",
    "low_rank": "LoRA (low-rank updates of weights)",
    "prefix": "trained prefixes (further keys and values for attention)",
    "bias": "trained biases",
    "coupling": "an invertible coupling of the embeddings",
    "prompt": "a soft prompt (virtual tokens behind the embeddings)",
    "intervention": "ReFT's interventions (low-rank edits of the first and last hidden states)",
}
STRATEGY_NAMES = {"adapter": "adapters", "prefix": "prefixes", "bitfit": "biases", "lora": "LoRA"}


def name(adapter: SavedAdapter) -> str:
    """The common name of the method."""
    return METHOD_TEXTS.get(text_key(adapter), [adapter.method.upper()])[0]


def text_key(adapter: SavedAdapter) -> str:
    """The key of the method in `METHOD_TEXTS`: its style, if that has a text of its own."""
    style = getattr(adapter.config, "style", "")
    return style if style in METHOD_TEXTS else adapter.method


def papers(adapter: SavedAdapter) -> tuple[Paper, ...]:
    """The papers of the method and of the sub-layers in the adapter; the method's own comes first."""
    if not adapter.is_ours:
        return STOCK_PAPERS.get(adapter.method, ())
    if adapter.method == "bottleneck":
        return (STYLE_PAPERS[adapter.config.style], *([SPARSE_ADAPTER] if adapter.config.sparsity else []))
    if adapter.method == "sparse":
        return tuple(filter(None, SELECTIONS[adapter.config.selection][:1]))
    present = {placement.sublayer for placement in adapter.config.to_placements()}
    parts = {PFEIFFER: "bottleneck", PREFIX_TUNING: "prefix", LORA: "low_rank", BITFIT: "bias", REFT: "intervention"}
    if adapter.method == "composed":
        return tuple(paper for paper, sublayer in parts.items() if sublayer in present)
    return tuple(p for p in PAPERS[adapter.method] if p in (UNIPELT, MAM, S4) or parts.get(p, "") in ("", *present))


def description(adapter: SavedAdapter) -> str:
    """The method in a paragraph of Markdown, with a link to its paper."""
    own = papers(adapter)[:1] if adapter.method != "composed" else ()
    paper = "".join(f" ([{paper.title}]({paper.url}))" for paper in own)
    if adapter.method not in METHOD_TEXTS:
        return f"{name(adapter)} is a method of peft{paper}."
    placements: list[Any] = adapter.config.to_placements() if adapter.is_ours else []
    kinds = dict.fromkeys(placement.sublayer for placement in placements)
    gates = ""
    if any(placement.gate for placement in placements):
        gates = "; gates, small networks of their own, decide from each input how much of them is let through"
    sublayers = listed(SUBLAYER_NAMES[kind] for kind in kinds) if kinds else ""
    groups = strategy_groups(adapter.config) if adapter.method == "s4" else ""
    if adapter.method == "sparse":
        groups = f", {SELECTIONS[adapter.config.selection][1]}"
    text = METHOD_TEXTS[text_key(adapter)][1].format(sublayers=sublayers, gates=gates, groups=groups)
    return f"{name(adapter)}{paper} {text}"


def strategy_groups(config: Any) -> str:
    """The strategies of S4's layer groups, such as " (layer 0: adapters and LoRA; layers 1 to 5: biases)"."""
    named = [listed(STRATEGY_NAMES[strategy] for strategy in names) for names in config.strategies]
    tuned = [(layers, named[i]) for i, layers in enumerate(config.groups or []) if i + 1 in config.tuned]
    groups = "; ".join(f"layer{'s' * (len(layers) > 1)} {ranges(layers)}: {names}" for layers, names in tuned)
    return f" ({groups})" if groups else ""
