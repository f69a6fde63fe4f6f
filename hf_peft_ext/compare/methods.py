"""The methods that can be compared: their configs, the sizes that a budget changes, their usual learning rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_peft_ext.tuners.learning_rates import LEARNING_RATES
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.suggestions import did_you_mean

REFERENCE = "lora"
# peft's name for an adapter without layers: it has only the modules in `modules_to_save`
NO_LAYERS = "dummy-target-modules"


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Args:
        title: its name in tables.
        config: the `peft` section of a recipe, without `task_type`; what is left out has the config's default.
        learning_rate: the usual learning rate of its type, for AdamW; wide bottlenecks have a lower one
            (`recommended_learning_rate`). `--rates` are factors on that.
        sizes: the fields that a budget changes, with their defaults; empty if the size of the method is fixed.
        follows: field -> (a field of `sizes`, factor): it is that size times the factor.
        trains_base: whether all parameters of the base model are trained.
    """

    title: str
    config: Mapping[str, Any]
    learning_rate: float
    sizes: Mapping[str, int] = field(default_factory=dict)
    follows: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    trains_base: bool = False

    @property
    def takes_budget(self) -> bool:
        """Whether a budget changes the size; S4 solves its own."""
        return bool(self.sizes) or self.config["peft_type"] == "S4"

    def sized(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The `peft` section with these sizes."""
        followers = {name: sizes[size] * factor for name, (size, factor) in self.follows.items() if size in sizes}
        return {**self.config, **sizes, **followers}


ALPHA = {"lora_alpha": ("r", 2)}  # keeps LoRA's scaling at 2 for every rank

COMPARED_METHODS = {
    "lora": Method("LoRA", {"peft_type": "LORA", "lora_alpha": 16}, LEARNING_RATES["LORA"], {"r": 8}, ALPHA),
    "dora": Method(
        "DoRA", {"peft_type": "LORA", "use_dora": True, "lora_alpha": 16}, LEARNING_RATES["LORA"], {"r": 8}, ALPHA
    ),
    "rslora": Method(
        "rsLoRA", {"peft_type": "LORA", "use_rslora": True, "lora_alpha": 16}, LEARNING_RATES["LORA"], {"r": 8}, ALPHA
    ),
    # of fixed size: its ranks before pruning are twice those after it
    "adalora": Method(
        "AdaLoRA",
        {"peft_type": "ADALORA", "total_step": 100, "tinit": 10, "tfinal": 30, "init_r": 16, "lora_alpha": 16},
        LEARNING_RATES["ADALORA"],
    ),
    "krona": Method("KronA", {"peft_type": "LOKR", "r": 4096, "alpha": 4096}, LEARNING_RATES["LOKR"]),
    "vera": Method("VeRA", {"peft_type": "VERA"}, LEARNING_RATES["VERA"]),
    "fourierft": Method("FourierFT", {"peft_type": "FOURIERFT"}, LEARNING_RATES["FOURIERFT"]),
    "oft": Method("OFT", {"peft_type": "OFT"}, LEARNING_RATES["OFT"]),
    "boft": Method("BOFT", {"peft_type": "BOFT"}, LEARNING_RATES["BOFT"]),
    "shira": Method("SHiRA", {"peft_type": "SHIRA"}, LEARNING_RATES["SHIRA"], {"r": 8}),
    "ln_tuning": Method("LayerNorm tuning", {"peft_type": "LN_TUNING"}, LEARNING_RATES["LN_TUNING"]),
    "beft": Method("BEFT", {"peft_type": "BEFT"}, LEARNING_RATES["BEFT"]),
    "unipelt": Method(
        "UniPELT",
        {"peft_type": "UNIPELT"},
        LEARNING_RATES["UNIPELT"],
        {"bottleneck_size": 48, "r": 8, "num_virtual_tokens": 10},
        ALPHA,
    ),
    "mam": Method(
        "MAM", {"peft_type": "MAM"}, LEARNING_RATES["MAM"], {"bottleneck_size": 512, "num_virtual_tokens": 30}
    ),
    "s4": Method("S4", {"peft_type": "S4"}, LEARNING_RATES["S4"]),
    "pfeiffer": Method(
        "Pfeiffer adapter",
        {"peft_type": "BOTTLENECK", "style": "pfeiffer"},
        LEARNING_RATES["BOTTLENECK"],
        {"r": 48},
    ),
    "sparse_adapter": Method(
        "SparseAdapter",
        {"peft_type": "BOTTLENECK", "style": "pfeiffer", "init": "paper", "sparsity": 0.8},
        LEARNING_RATES["BOTTLENECK"],
        {"r": 240},
    ),
    "houlsby": Method(
        "Houlsby adapter",
        {"peft_type": "BOTTLENECK", "style": "houlsby"},
        LEARNING_RATES["BOTTLENECK"],
        {"r": 64},
    ),
    "compacter": Method("Compacter", {"peft_type": "COMPACTER"}, LEARNING_RATES["COMPACTER"]),
    "compacter++": Method(
        "Compacter++", {"peft_type": "COMPACTER", "style": "compacter++"}, LEARNING_RATES["COMPACTER"]
    ),
    "adamix": Method("AdaMix", {"peft_type": "ADAMIX"}, LEARNING_RATES["ADAMIX"], {"r": 16}),
    "prefix": Method(
        "prefix in attention",
        {"peft_type": "LAYER_PREFIX"},
        LEARNING_RATES["LAYER_PREFIX"],
        {"num_virtual_tokens": 10},
    ),
    "prefix_tuning": Method(
        "peft's prefix tuning",
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10},
        LEARNING_RATES["PREFIX_TUNING"],
        {"num_virtual_tokens": 10},
    ),
    "prompt_tuning": Method(
        "prompt tuning",
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20},
        LEARNING_RATES["PROMPT_TUNING"],
        {"num_virtual_tokens": 20},
    ),
    "p_tuning": Method(
        "P-tuning",
        {"peft_type": "P_TUNING", "num_virtual_tokens": 20},
        LEARNING_RATES["P_TUNING"],
    ),
    "ladder": Method("ladder side-tuning", {"peft_type": "LADDER"}, LEARNING_RATES["LADDER"]),
    "ia3": Method("(IA)³", {"peft_type": "IA3"}, LEARNING_RATES["IA3"]),
    "tfew": Method("T-Few's (IA)³", {"peft_type": "TFEW"}, LEARNING_RATES["TFEW"]),
    "bitfit": Method("BitFit", {"peft_type": "BITFIT"}, LEARNING_RATES["BITFIT"]),
    "fish_mask": Method(
        "FISH mask",
        {"peft_type": "SPARSE", "selection": "fisher"},
        LEARNING_RATES["SPARSE"],
        {"num_values": 100_000},
    ),
    "lt_sft": Method(
        "LT-SFT",
        {"peft_type": "SPARSE", "selection": "lottery_ticket"},
        LEARNING_RATES["SPARSE"],
        {"num_values": 100_000},
    ),
    "diff_pruning": Method(
        "diff pruning",
        {"peft_type": "SPARSE", "selection": "diff"},
        LEARNING_RATES["SPARSE"],
        {"num_values": 100_000},
    ),
    "intrinsic": Method(
        "intrinsic dimension",
        {"peft_type": "INTRINSIC", "d": 1000},
        LEARNING_RATES["INTRINSIC"],
        {"d": 1000},
    ),
    "full": Method("full fine-tuning", {"peft_type": "LORA", "target_modules": NO_LAYERS}, 1e-4, trains_base=True),
    "none": Method("head only", {"peft_type": "LORA", "target_modules": NO_LAYERS}, 1e-2),
}


def check_methods(names: Sequence[str]) -> list[str]:
    """Check the names of methods.

    Raises:
        ValueError: a name is unknown or repeated, or there are fewer than two.
    """
    check("methods", names, not isinstance(names, str), "must be a list of names, not a single string")
    for name in names:
        if name not in COMPARED_METHODS:
            hint = did_you_mean(str(name).lower(), COMPARED_METHODS) or "."
            raise ValueError(f"`methods` (={name!r}) must be one of {', '.join(COMPARED_METHODS)}{hint}")
    check("methods", list(names), len(set(names)) == len(names), "must hold a name once")
    check("methods", list(names), len(names) > 1, "must hold at least two methods to compare")
    return list(names)


def method_named(name: str, recipe_peft: Mapping[str, Any]) -> Method:
    """A method; the fields of the recipe's own `peft` section count if that has the method's type.

    Args:
        name: the method.
        recipe_peft: the `peft` section of the recipe.
    """
    method = COMPARED_METHODS[name]
    written = {key: value for key, value in recipe_peft.items() if key not in ("peft_type", "task_type")}
    is_recipes = recipe_peft.get("peft_type") == method.config["peft_type"] and NO_LAYERS not in method.config.values()
    kept = written if is_recipes else {key: value for key, value in written.items() if key == "modules_to_save"}
    sizes = {size: kept.get(size, default) for size, default in method.sizes.items()}
    return replace(method, config={**method.config, **kept}, sizes=sizes)
