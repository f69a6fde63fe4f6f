"""Reads an untrusted adapter_config.json into a config that is safe to pass to peft."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import AdaLoraConfig, PeftConfig, PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import _prepare_prompt_learning_config
from torch import nn

from hf_peft_ext.attach.config import RegisteredConfig
from hf_peft_ext.loading.kept_ranks import check_kept_ranks
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.config_schema import MAX_NAMES, MODULE_NAME, known_fields, read_json, refuse
from hf_peft_ext.validation.module_patterns import PATTERN_SECONDS, endings_of, matching

# peft's types that the tests train, save and load. Types that are in neither of these lists were not tested.
STOCK = (
    *("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "PVERA", "VBLORA", "UNILORA", "TINYLORA", "RANDLORA", "DELORA"),
    *("GRALORA", "GLORA", "HIRA", "LILY", "MISS", "C3A", "FOURIERFT", "WAVEFT", "OFT", "BOFT", "PSOFT", "HRA"),
    *("ROAD", "OSF", "DEFT", "PEANUT", "SHIRA", "SUPERTUNING", "LN_TUNING", "TRAINABLE_TOKENS", "IA3", "BEFT"),
    *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"),
    *("ADAPTION_PROMPT", "SHADOW", "POLY"),
)
REFUSED = {
    "XLORA": "loads further adapters, from places that its config names",
    "FROD": "computes a basis from the weights of the base model, so its file cannot be checked first",
    "ADAMSS": "has tensors whose shapes depend on the weights of the base model, so its file cannot be checked first",
}
# Field -> the only values it may have, and the reason.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "must be 'none': trained biases of the base model would overwrite its own"),
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal", "eva", "mica"),
        "changes the weights of the base model when it is loaded; save the adapter as a plain LoRA (peft: "
        "`path_initial_model_for_weight_conversion`)",
    ),
    "kasa_config": ((None,), "must be None: KaSA changes the weights of the base model"),
    "layer_replication": ((None,), "must be None: it changes the layers of the base model"),
    "megatron_config": ((None,), "must be None: peft would import a module that the file names"),
    "megatron_core": ((None, "megatron.core"), "must be 'megatron.core': peft imports the module"),
    "arrow_config": ((None,), "must be None: it needs further adapters"),
    "monteclora_config": ((None,), "must be None: it is not checked"),
    "use_bdlora": ((None,), "must be None: it is not checked"),
    "velora_config": ((None,), "must be None: it is not checked"),
    "prompt_tuning_init_state_dict_path": ((None,), "must be None: peft would read a further file"),
    "shadow_model": (("mirror",), "must be 'mirror': peft would load a further model"),
    "save_only_topk_weights": ((False,), "must be False: the indices in the file are not checked"),
    "save_indices": ((False,), "must be False: the indices in the file are not checked"),
    "tokenizer_kwargs": ((None, {}), "must be None: it would be passed on to a tokenizer's loader"),
}
MOST = {"num_cayley_neumann_terms": 64}  # each term costs a matrix product per forward pass
MOST_OF_TYPE = {
    "BOFT": {"boft_n_butterfly_factor": 4},
    "UNILORA": {"r": 64},
}  # these are built before their file is read
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")  # a regular expression, or a list of suffixes
KEYED_PATTERNS = ("rank_pattern", "alpha_pattern")  # regular expression -> number


def read_config(path: Path, model: nn.Module) -> PeftConfig:
    """Read and check a config.

    Regular expressions are replaced by the names of the modules that they match on this model, because peft would
    run them without a time limit.

    Args:
        path: an adapter_config.json.
        model: the base model.

    Raises:
        ValueError: the file is not strict JSON, its PEFT type cannot be checked, a key is unknown, a value has a wrong
            type, is too large or changes the base model, or a pattern takes too long.
    """
    config = config_in_file(path)
    if isinstance(config, PromptLearningConfig):
        check_prompt(config, model)
    paths = [path for path, _ in model.named_modules()]
    if isinstance(config, AdaLoraConfig):
        check_kept_ranks(config, paths)
    name_modules(config, paths)
    return config


def config_in_file(path: Path) -> PeftConfig:
    """Read and check a config without a model.

    Args:
        path: an adapter_config.json.

    Raises:
        ValueError: as `read_config`, but for what depends on the model.
    """
    fields = read_json(path)
    kind = fields.get("peft_type")
    config_cls = config_class(kind)
    fields = known_fields(config_cls, fields)
    for name, most in (MOST | MOST_OF_TYPE.get(str(kind), {})).items():
        if (fields.get(name) or 0) > most:
            refuse(name, fields[name], f"must be at most {most}")
    for name, (allowed, rule) in ONLY.items():
        if name in fields and not any(
            type(fields[name]) is type(value) and fields[name] == value for value in allowed
        ):
            refuse(name, fields[name], rule)
    try:
        config = config_cls(**fields)
    except ValueError:
        raise
    except Exception as error:  # untrusted values can cause any error, in peft's code or ours
        raise ValueError(f"{path} makes no {config_cls.__name__}: {error!r}.") from error
    return config


def config_class(peft_type: object) -> type[PeftConfig]:
    """The config class of a PEFT type that can be checked.

    Raises:
        ValueError: it cannot be checked.
    """
    ours = {t.value: cls for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(cls, RegisteredConfig)}
    stock = {name: PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] for name in STOCK if name in PeftType.__members__}
    classes = ours | stock
    if isinstance(peft_type, str) and peft_type in REFUSED:
        refuse("peft_type", peft_type, REFUSED[peft_type])
    if not isinstance(peft_type, str) or peft_type not in classes:
        refuse("peft_type", peft_type, f"must be one of those that are checked: {', '.join(classes)}")
    return classes[peft_type]


def check_prompt(config: PromptLearningConfig, model: nn.Module) -> None:
    """Refuse prompts and prefixes of a model with other sizes: they would fail in the forward pass.

    Raises:
        ValueError: a size differs from the model's.
    """
    own = replace(config, token_dim=None, num_layers=None, num_attention_heads=None)  # pyright: ignore[reportArgumentType]
    own = _prepare_prompt_learning_config(own, getattr(model, "config", {}))
    for name in ("token_dim", "num_layers", "num_attention_heads"):
        size, expected = getattr(config, name), getattr(own, name)
        check(name, size, size in (None, expected), f"must be {expected}, as in this model")
    submodules = config.num_transformer_submodules
    check("num_transformer_submodules", submodules, submodules in (None, 1, 2), "must be 1 or 2")


def name_modules(config: Any, paths: list[str]) -> None:
    """Replace the config's regular expressions by the names of the modules that they match.

    Args:
        paths: the paths of all modules.

    Raises:
        ValueError: `target_modules` matches nothing, or a pattern is malformed or takes too long.
    """
    until = time.process_time() + PATTERN_SECONDS
    named_by: dict[str, list[str]] = {}  # suffix -> paths
    for path in paths:
        for suffix in endings_of(path):
            named_by.setdefault(suffix, []).append(path)
    for field in PATTERNS:
        pattern = getattr(config, field, None)
        if isinstance(pattern, str):
            if pattern == INCLUDE_LINEAR_LAYERS_SHORTHAND or MODULE_NAME.fullmatch(pattern):
                continue
            named = matching(pattern, paths, until)
            if not named and field == "target_modules":
                refuse(field, pattern, "matches no module of this model")
            # peft reads the entries of a list as suffixes, which may match further modules
            exact = matching(named, paths) == named
            setattr(config, field, named if exact else "|".join(map(re.escape, named)))
        elif pattern and not named_by.keys() >= {*pattern}:
            named = sorted(named_by.keys() & {*pattern})  # peft compares each entry with each module
            if not named and field == "target_modules":
                refuse(field, pattern, "names no module of this model")
            setattr(config, field, type(pattern)(named))
    for field in KEYED_PATTERNS if not isinstance(config, AdaLoraConfig) else ():
        numbers = getattr(config, field, None) or {}
        if len(numbers) > MAX_NAMES or not all(map(MODULE_NAME.fullmatch, numbers)):
            number_of: dict[str, Any] = {}
            for pattern, number in numbers.items():
                plain = MODULE_NAME.fullmatch(pattern)
                named = named_by.get(pattern, []) if plain else matching(rf"(?:.*\.)?(?:{pattern})", paths, until)
                number_of |= {path: number for path in named if path not in number_of}
            setattr(config, field, by_number(number_of))


def by_number(number_of: dict[str, Any]) -> dict[str, Any]:
    """One pattern for each number, in place of one for each path.

    peft compiles each pattern for each module, which takes minutes for thousands of them.
    """
    patterns: dict[Any, list[str]] = {}
    for path, number in number_of.items():
        patterns.setdefault(number, []).append(f"^{re.escape(path)}")
    return {"|".join(names): number for number, names in patterns.items()}
