"""Reads an adapter_config.json of a stranger into a config that peft can be trusted with."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import _prepare_prompt_learning_config
from torch import nn

from hf_peft_ext.attach.config import RegisteredConfig
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.config_schema import MAX_NAMES, MODULE_NAME, known_fields, read_json, refuse
from hf_peft_ext.validation.module_patterns import PATTERN_SECONDS, endings_of, matching

# peft's own types that the tests load. The others read further files, allocate what no file holds, or were not tried.
STOCK = ("LORA", "IA3", "LOHA", "LOKR", "OFT", "HRA", "LN_TUNING", "TRAINABLE_TOKENS",
         "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # fmt: skip
# Fields that may hold only these values, and why.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "must be 'none': other biases than an adapter's own overwrite those of the base model"),
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal", "eva", "mica"),
        "changes the weights of the base model when it is loaded; save the adapter as a plain LoRA (peft: "
        "`path_initial_model_for_weight_conversion`)",
    ),
    "kasa_config": ((None,), "must be None: KaSA changes the weights of the base model"),
    "layer_replication": ((None,), "must be None: it changes the layers of the base model"),
    "megatron_config": ((None,), "must be None: it has peft import a module that the file names"),
    "megatron_core": ((None, "megatron.core"), "must be 'megatron.core': peft imports the module"),
    "arrow_config": ((None,), "must be None: it needs further adapters"),
    "monteclora_config": ((None,), "must be None: it is not checked"),
    "use_bdlora": ((None,), "must be None: it is not checked"),
    "velora_config": ((None,), "must be None: it is not checked"),
    "tokenizer_kwargs": ((None, {}), "must be None: it would be passed on to a tokenizer's loader"),
}
MOST = {"num_cayley_neumann_terms": 64}  # each takes a matrix product in every forward
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")  # a regular expression, or a list of endings
KEYED_PATTERNS = ("rank_pattern", "alpha_pattern")  # regular expression -> number


def read_config(path: Path, model: nn.Module) -> PeftConfig:
    """The config in a file, for a model.

    Regular expressions come back as the names of the modules that they match on this model, so that peft, which has
    no time limit, never runs them.

    Raises:
        ValueError: the file is not strict JSON, the PEFT type is none of those that can be checked, a key is unknown,
            a value has a wrong type, is too large, or is one that changes the base model; or a pattern takes too long.
    """
    given = read_json(path)
    config_cls = config_class(given.get("peft_type"))
    given = known_fields(config_cls, given)
    for name, most in MOST.items():
        if (given.get(name) or 0) > most:
            refuse(name, given[name], f"must be at most {most}")
    for name, (allowed, rule) in ONLY.items():
        if name in given and not any(type(given[name]) is type(value) and given[name] == value for value in allowed):
            refuse(name, given[name], rule)
    try:
        config = config_cls(**given)
    except ValueError:
        raise
    except Exception as error:  # whatever the values of a stranger trip, in peft's code or ours
        raise ValueError(f"{path} makes no {config_cls.__name__}: {error!r}.") from error
    if isinstance(config, PromptLearningConfig):
        check_prompt(config, model)
    name_modules(config, [path for path, _ in model.named_modules()])
    return config


def config_class(peft_type: object) -> type[PeftConfig]:
    ours = {t.value: cls for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(cls, RegisteredConfig)}
    known = ours | {name: PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] for name in STOCK}
    if not isinstance(peft_type, str) or peft_type not in known:
        refuse("peft_type", peft_type, f"must be one of those that are checked: {', '.join(known)}")
    return known[peft_type]


def check_prompt(config: PromptLearningConfig, model: nn.Module) -> None:
    """Refuse prompts and prefixes that were made for a model of other sizes: they would fail in the forward pass."""
    own = replace(config, token_dim=None, num_layers=None, num_attention_heads=None)  # pyright: ignore[reportArgumentType]
    own = _prepare_prompt_learning_config(own, getattr(model, "config", {}))
    for name in ("token_dim", "num_layers", "num_attention_heads"):
        given, rule = getattr(config, name), f"must be {getattr(own, name)}, as in this model"
        check(name, given, given in (None, getattr(own, name)), rule)
    submodules = config.num_transformer_submodules
    check("num_transformer_submodules", submodules, submodules in (None, 1, 2), "must be 1 or 2")


def name_modules(config: Any, paths: list[str]) -> None:
    """Put the names of modules where the config has regular expressions."""
    until = time.process_time() + PATTERN_SECONDS
    named_by: dict[str, list[str]] = {}  # ending -> paths
    for path in paths:
        for ending in endings_of(path):
            named_by.setdefault(ending, []).append(path)
    for field in PATTERNS:
        pattern: Any = getattr(config, field, None)
        is_text = isinstance(pattern, str) and pattern != INCLUDE_LINEAR_LAYERS_SHORTHAND
        if is_text and not MODULE_NAME.fullmatch(pattern):
            named = matching(pattern, paths, until)
            if not named and field == "target_modules":
                refuse(field, pattern, "matches no module of this model")
            # as a list they would be endings, which may end other names too
            exact = matching(named, paths) == named
            setattr(config, field, named if exact else "|".join(map(re.escape, named)))
        elif pattern and not isinstance(pattern, str) and not named_by.keys() >= {*pattern}:
            named = sorted(named_by.keys() & {*pattern})  # peft tries each entry on each module
            if not named and field == "target_modules":
                refuse(field, pattern, "names no module of this model")
            setattr(config, field, type(pattern)(named))
    for field in KEYED_PATTERNS:
        numbers = getattr(config, field, None) or {}
        if len(numbers) > MAX_NAMES or not all(map(MODULE_NAME.fullmatch, numbers)):
            number_of: dict[str, Any] = {}
            for pattern, number in numbers.items():
                plain = MODULE_NAME.fullmatch(pattern)
                named = named_by.get(pattern, []) if plain else matching(rf"(?:.*\.)?(?:{pattern})", paths, until)
                number_of |= {path: number for path in named if path not in number_of}
            setattr(config, field, by_number(number_of))


def by_number(number_of: dict[str, Any]) -> dict[str, Any]:
    """Paths -> numbers, as one pattern for each number: peft compiles each for each module, which takes minutes where
    there are thousands.
    """
    found: dict[Any, list[str]] = {}
    for path, number in number_of.items():
        found.setdefault(number, []).append(f"^{re.escape(path)}")
    return {"|".join(names): number for number, names in found.items()}
