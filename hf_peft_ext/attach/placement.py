"""Placements: which sub-layer goes to which site of which layers, and whether a gate scales it.

Every method of this package is a list of placements; `ComposedConfig` takes such a list directly.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from transformers.activations import ACT2FN

from hf_peft_ext.sublayers import ExpertSharing, OwnNorm, PrefixForm, PromptPosition
from hf_peft_ext.validation.checks import check, check_count, check_dropout, check_positive, is_number

GatePooling = Literal["auto", "mean", "mean_padded", "token"]

# The sites that a sub-layer can have. "attention", "query" and so on cover self- and cross-attention; the `cross_`
# forms name cross-attention alone.
LEAF_SITES = ("query", "key", "value", "mixer_input", "attention_output", "ffn_input", "ffn_gate", "ffn_output")
SITES: dict[str, tuple[str, ...]] = {
    "bottleneck": (
        *("after_attention", "after_ffn", "after_residual"),
        *("parallel_attention", "parallel_ffn", "parallel_residual"),
    ),
    "low_rank": LEAF_SITES,
    "prefix": ("attention",),
    "bias": ("bias",),
    "coupling": ("embeddings",),
    "prompt": ("embeddings",),
    "intervention": ("block_output",),
}
# sub-layer without a gate -> the reason
UNGATED = {
    "bias": "a bias reads no input",
    "coupling": "with a gate, a coupling could not be inverted",
    "prompt": "a prompt reads no input",
    "intervention": "an intervention replaces what it reads",
}
EXPERT_OPTIONS = ("num_experts", "shared_projection")  # of a bottleneck with experts
# The arguments of a sub-layer that a user sets; the others follow from the model.
OPTIONS: dict[str, tuple[str, ...]] = {
    "bottleneck": (
        *("r", "reduction_factor", "activation", "dropout", "scaling", "init", "sparsity"),
        *("phm_dim", "phm_rank", "shared_phm_rule", "norm"),
        *EXPERT_OPTIONS,
    ),
    "low_rank": ("r", "alpha", "dropout", "init_lora_weights"),
    "prefix": ("num_virtual_tokens", "encoder_hidden_size", "form", "shift_positions"),
    "bias": (),
    "coupling": ("reduction_factor", "activation"),
    "prompt": ("num_virtual_tokens", "position"),
    "intervention": (
        *("r", "prefix_positions", "suffix_positions", "tied_weights", "orthogonality", "subtract_projection"),
        *("activation", "dropout"),
    ),
}


@dataclass
class Placement:
    """One sub-layer at one site of some layers.

    Args:
        sublayer: "bottleneck", "low_rank", "prefix", "bias", "coupling", "prompt" or "intervention".
        site: its site (`SITES` lists those of each sub-layer):
            - bottleneck: "after_attention" and "after_ffn" (sequential, before the residual is added),
              "after_residual" (sequential, reads the block's output after residual and norm), "parallel_attention",
              "parallel_ffn", "parallel_residual" (beside the FFN too, but reads the residual stream in front of the
              FFN's norm; only in models that have one there);
            - low_rank: "query", "key", "value", "attention_output", "ffn_input", "ffn_gate", "ffn_output";
              "mixer_input", the input projection of layers without attention (Mamba's `in_proj`), which also takes
              branches for "query", "key" and "value";
            - prefix: "attention"; bias: "bias"; coupling and prompt: "embeddings", which a config names by
              `sites=`;
            - intervention: "block_output", the hidden states between two blocks.
        layers: indices of the layers, encoder before decoder; None for all.
        gate: None, or how the gate is taken over tokens: "mean", "mean_padded" (padding included), "token", or
            "auto" (token where attention is causal, else mean).
        gate_init: the gate's bias before training: it is open to about sigmoid(gate_init).
        options: the sub-layer's arguments. bottleneck: `r` or `reduction_factor`, `activation`, `dropout`, `scaling`,
            `init`, `sparsity`, `norm` (see `sublayers.NormedBottleneck`); for Compacter's form also `phm_dim`,
            `phm_rank`, `shared_phm_rule` (see `sublayers.PHMBottleneck`), for AdaMix's `num_experts`,
            `shared_projection` (see `sublayers.MixtureBottleneck`). low_rank: `r`, `alpha`, `dropout`,
            `init_lora_weights`. prefix:
            `num_virtual_tokens`, `encoder_hidden_size` (width of the reparameterisation; None for plain prefixes),
            `form` ("separate" or "joint": how attention sees the prefix, see `sublayers.Prefix`), `shift_positions`
            (True: T5's relative positions count the prefix, as in AdapterHub's library; every layer of a stack must
            then have it, and the form is "joint"). coupling: `reduction_factor`, `activation` (see
            `sublayers.Coupling`). prompt: `num_virtual_tokens`, `position` (see `sublayers.SoftPrompt`).
            intervention: `r`, `prefix_positions`, `suffix_positions`, `tied_weights`, `orthogonality`,
            `subtract_projection`, `activation`, `dropout` (see `sublayers.Intervention`).

    Raises:
        ValueError: a value is out of range, or an option is unknown.
    """

    sublayer: str
    site: str
    layers: list[int] | None = None
    gate: GatePooling | None = None
    gate_init: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check("sublayer", self.sublayer, self.sublayer in SITES, f"must be one of {', '.join(SITES)}")
        sites = SITES[self.sublayer]
        is_site = self.site.removeprefix("cross_") in sites and self.site != "cross_bias"
        check("site", self.site, is_site, f"must be a site of `{self.sublayer}`: {', '.join(sites)}")
        poolings = get_args(GatePooling)
        rule = f"must be None or one of {', '.join(poolings)}"
        check("gate", self.gate, self.gate is None or self.gate in poolings, rule)
        is_gated = self.gate is not None and self.sublayer in UNGATED
        check("gate", self.gate, not is_gated, f"must be None: {UNGATED.get(self.sublayer)}")
        check("gate_init", self.gate_init, is_number(self.gate_init), "must be a number")
        if self.layers is not None:
            self.layers = list(self.layers)
            for layer in self.layers:
                check("layers", layer, type(layer) is int and layer >= 0, "must hold layer indices of 0 or more")
        unknown = self.options.keys() - set(OPTIONS[self.sublayer])
        if unknown:
            raise ValueError(
                f"`options` of `{self.sublayer}` has no {', '.join(f'`{key}`' for key in sorted(unknown))}; "
                f"it has {', '.join(OPTIONS[self.sublayer]) or 'none'}."
            )
        if self.options.get("shift_positions"):
            self.options = {"form": "joint", **self.options}
        self._check_options()

    def _check_options(self) -> None:
        # None means "not set" where another option may be set instead
        optional = ("r", "reduction_factor", "encoder_hidden_size", "phm_dim", "num_experts")
        o = {key: value for key, value in self.options.items() if value is not None or key not in optional}
        for key in o.keys() & {"r", "num_virtual_tokens", "encoder_hidden_size", "phm_dim", "phm_rank"}:
            check_count(key, o[key])
        for key in o.keys() & {"reduction_factor", "alpha"}:
            check_positive(key, o[key])
        for key in o.keys() & {"dropout", "sparsity"}:
            check_dropout(key, o[key])
        if "activation" in o:
            in_transformers = isinstance(o["activation"], str) and o["activation"] in ACT2FN
            check("activation", o["activation"], in_transformers, "must be an activation of transformers")
        if "form" in o:
            forms = get_args(PrefixForm)
            check("form", o["form"], o["form"] in forms, f"must be one of {', '.join(forms)}")
        if "position" in o:
            positions = get_args(PromptPosition)
            check("position", o["position"], o["position"] in positions, f"must be one of {', '.join(positions)}")
        if "shift_positions" in o:
            shift = o["shift_positions"]
            check("shift_positions", shift, isinstance(shift, bool), "must be True or False")
            check("form", o.get("form"), not shift or o["form"] == "joint", "must be 'joint' with `shift_positions`")
        if "scaling" in o:
            number = is_number(o["scaling"])
            check("scaling", o["scaling"], number or o["scaling"] == "learned", 'must be a number or "learned"')
        if "init" in o:
            number = is_number(o["init"]) and cast(float, o["init"]) >= 0
            check("init", o["init"], number or o["init"] == "lora", 'must be a number of 0 or more, or "lora"')
        if "init_lora_weights" in o:
            init = o["init_lora_weights"]
            check("init_lora_weights", init, init is True or init == "gaussian", 'must be True or "gaussian"')
        if self.sublayer == "bottleneck":
            self._check_bottleneck(o)
        if self.sublayer == "intervention":
            check_intervention(o)
        if self.sublayer == "low_rank":
            check(
                "r", self.options.get("r", 8), self.options.get("r", 8) is not None, "must be a positive whole number"
            )

    def _check_bottleneck(self, o: dict[str, Any]) -> None:
        one = ("r" in o) != ("reduction_factor" in o)
        check("r", o.get("r"), one, "must be given, or else `reduction_factor`, and not both")
        sparsity = o.get("sparsity", 0)
        check("sparsity", sparsity, not sparsity or "phm_dim" not in o, "must be 0 with `phm_dim`")
        if "norm" in o:
            check("norm", o["norm"], o["norm"] in get_args(OwnNorm), "must be before, after or both")
            check("norm", o["norm"], o.keys().isdisjoint({"phm_dim", "num_experts"}), "needs plain matrices")
        for key in o.keys() & {"phm_rank", "shared_phm_rule"}:
            check(key, o[key], "phm_dim" in o, "needs `phm_dim`")
        if "phm_dim" in o:
            shared = o.get("shared_phm_rule", True)
            check("shared_phm_rule", shared, isinstance(shared, bool), "must be True or False")
            rule = f"must be a multiple of `phm_dim` (={o['phm_dim']})"
            check("r", o.get("r"), o.get("r", 0) % o["phm_dim"] == 0, rule)
        if "num_experts" in o:
            several = type(o["num_experts"]) is int and o["num_experts"] > 1
            check("num_experts", o["num_experts"], several, "must be a whole number of 2 or more")
            check("num_experts", o["num_experts"], "phm_dim" not in o, "must be None with `phm_dim`")
            check("sparsity", sparsity, not sparsity, "must be 0 with `num_experts`")
        if "shared_projection" in o:
            shared = o["shared_projection"]
            check("shared_projection", shared, shared in get_args(ExpertSharing), "must be none, down or up")
            check("shared_projection", shared, "num_experts" in o, "needs `num_experts`")

    @property
    def shares_rule(self) -> bool:
        """Whether the adapter's layers share the Kronecker factors of this bottleneck."""
        return self.options.get("phm_dim") is not None and self.options.get("shared_phm_rule", True)

    @classmethod
    def of(cls, value: "Placement | Mapping[str, Any]") -> "Placement":
        """A placement, given as one or as its JSON form.

        Raises:
            TypeError: `value` is neither.
            ValueError: fields are missing or unknown.
        """
        if isinstance(value, Placement):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"`placements` must hold placements or dictionaries, not {type(value).__name__}.")
        unknown = value.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown or not {"sublayer", "site"} <= value.keys():
            raise ValueError(
                f"`placements` (={dict(value)}) must have `sublayer` and `site`, and may have `layers`, `gate`, "
                f"`gate_init` and `options`."
            )
        return cls(**value)


def check_intervention(options: dict[str, Any]) -> None:
    """Check the options that interventions alone have.

    Raises:
        ValueError: a value is out of range.
    """
    positions = {"prefix_positions": 3, "suffix_positions": 0} | options
    for key in ("prefix_positions", "suffix_positions"):
        whole = type(positions[key]) is int and positions[key] >= 0
        check(key, positions[key], whole, "must be a whole number of 0 or more")
    some = positions["prefix_positions"] + positions["suffix_positions"] > 0
    check("prefix_positions", positions["prefix_positions"], some, "must be above 0, or `suffix_positions`")
    for key in options.keys() & {"tied_weights", "orthogonality", "subtract_projection"}:
        check(key, options[key], isinstance(options[key], bool), "must be True or False")
