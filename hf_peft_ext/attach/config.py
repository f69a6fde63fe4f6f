"""Base classes of the configs: peft's fields, checks, and the list of placements."""

from abc import abstractmethod
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from hf_peft_ext.attach.placement import SITES, Placement
from hf_peft_ext.registry import extend_peft
from hf_peft_ext.sublayers import PrefixForm
from hf_peft_ext.validation.checks import check, check_count
from hf_peft_ext.validation.config_schema import known_fields, read_json, says_something
from hf_peft_ext.validation.suggestions import did_you_mean

Initialization = Literal["base", "paper"]
PREFIX_FORMS: dict[Initialization, PrefixForm] = {"base": "separate", "paper": "joint"}


class UnknownField(ValueError, TypeError):
    """A config has no such field.

    Also a TypeError with Python's wording, by which peft recognises a file of a later version: it drops the field and
    warns.
    """

    def __init__(self, name: str, value: object, config_cls: type):
        hint = did_you_mean(name, [f.name for f in fields(config_cls)]) or "."
        what = f"`{name}` (={value!r}) is not a field of {config_cls.__name__}"
        super().__init__(f"{what}{hint} ({config_cls.__name__} got an unexpected keyword argument.)")


@dataclass
class NamedFields:
    """Refuses unknown fields, and suggests the nearest one. The first config, also an unpickled one, extends peft."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        extend_peft()
        for name in sorted(kwargs.keys() - {f.name for f in fields(cls)}):
            raise UnknownField(name, kwargs[name], cls)
        return super().__new__(cls)


@dataclass
class RegisteredConfig(NamedFields, PeftConfig):
    """Base of the configs of this package's own PEFT types.

    Args:
        modules_to_save: modules trained and saved whole, such as a classification head.
        trainable_token_indices: rows of the embedding to train, as in `peft.LoraConfig`.
        bias: must be "none"; `BitFitConfig` trains biases.
        target_parameters: must be None; kept because tools of peft's ecosystem read it.

    Raises:
        ValueError: a field is unknown, or its value breaks a rule.
    """

    method: ClassVar[str]  # the PEFT type in lower case

    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train."}
    )
    bias: str = field(default="none", metadata={"help": 'Must be "none"; see BitFitConfig.'})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Must be None."})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As `PeftConfig.from_pretrained`.

        Raises:
            ValueError: the weights beside the config are a pickle, or the config breaks a rule.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        pickled = (folder / WEIGHTS_NAME).exists() and not (folder / SAFETENSORS_WEIGHTS_NAME).exists()
        check("path", str(folder), not pickled, f"holds its weights as a pickle, {WEIGHTS_NAME}, which is not loaded")
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields in a file, with their types checked.

        Raises:
            ValueError: the file is not a JSON object, or a value has the wrong type.
        """
        values = {key: value for key, value in read_json(path_json_file).items() if says_something(key, value)}
        unknown = values.keys() - {f.name for f in fields(cls)}  # peft drops fields of a later version, and warns
        checked = known_fields(cls, {key: value for key, value in values.items() if key not in unknown})
        return {key: values[key] for key in unknown} | checked

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        check("bias", self.bias, self.bias == "none", 'must be "none"; BitFitConfig trains biases')
        rule = "must be None: no sub-layer of this package acts on a bare parameter"
        check("target_parameters", self.target_parameters, not self.target_parameters, rule)

    def to_placements(self) -> list[Placement]:
        """The placements of the method; empty if it is not made of sub-layers."""
        return []


@dataclass
class PlacedConfig(RegisteredConfig):
    """Base of the configs: a method is the list of placements that `to_placements` returns.

    Args:
        target_modules: the leaves that carry the low-rank branch, as in `peft.LoraConfig` (a regular expression, a
            list of endings or "all-linear"); None for the sites that the method names. Methods without one refuse it.
        exclude_modules: modules to leave unchanged, named in the same way.
        layers_to_transform: index or indices of the layers to adapt, encoder before decoder; None for all.
        sites: for models whose structure is not recognised: site name -> modules, named as in `target_modules`.

    Raises:
        ValueError: a field is unknown, or its value breaks a rule.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Leaves of the low-rank branch."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave unchanged."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    sites: dict[str, list[str] | str] | None = field(default=None, metadata={"help": "Site name -> modules."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        self.layers_to_transform = layer_list(self.layers_to_transform)
        for name in self.sites or {}:
            allowed = [site for sites in SITES.values() for site in sites]
            check("sites", name, name.removeprefix("cross_") in allowed, f"must name sites: {', '.join(allowed)}")
        placements = self.to_placements()
        low_rank = any(p.sublayer == "low_rank" for p in placements)
        rule = f"names leaves for a low-rank branch, which {type(self).__name__} does not have here; see `sites`"
        check("target_modules", self.target_modules, low_rank or not self.target_modules, rule)
        shared = {p.options["phm_dim"] for p in placements if p.shares_rule}
        check("phm_dim", sorted(shared), len(shared) < 2, "must be one number where `shared_phm_rule` is True")

    @abstractmethod
    def to_placements(self) -> list[Placement]:
        """The placements of the method."""

    def resolved(self, model: nn.Module) -> "PlacedConfig":
        """The config for this model. It is another one only where sizes depend on the model."""
        return self

    def stored(self) -> "PlacedConfig":
        """The config that describes the saved adapter: reparameterised prefixes are saved as plain ones."""
        return self

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `stored()`, as `PeftConfig.save_pretrained` does."""
        stored = self.stored()
        if stored is self:
            super().save_pretrained(save_directory, **kwargs)
        else:
            stored.save_pretrained(save_directory, **kwargs)


def layer_list(layers: list[int] | int | None, name: str = "layers_to_transform") -> list[int] | None:
    """The value of a field that names layers, as a list.

    Raises:
        ValueError: it is neither a layer index nor a list of them.
    """
    if layers is None:
        return None
    chosen = [layers] if isinstance(layers, int) else list(layers)
    valid = bool(chosen) and all(type(layer) is int and layer >= 0 for layer in chosen)
    check(name, layers, valid, "must be a layer index or a list of them, 0 or more")
    return chosen


@dataclass
class InitConfig(RegisteredConfig):
    """Base of the configs of methods that can begin in two ways.

    Args:
        init: "base": the untrained adapter is the base model, as with LoRA. "paper": it begins as in the papers and in
            AdapterHub's library.
    """

    init: Initialization = field(default="base", metadata={"help": 'Untrained: "base" model, or as in the "paper".'})

    def __post_init__(self) -> None:
        inits = get_args(Initialization)
        check("init", self.init, self.init in inits, f"must be one of {', '.join(inits)}")
        super().__post_init__()


@dataclass
class PrefixedConfig(InitConfig, PlacedConfig):
    """Base of the configs with a prefix.

    Args:
        num_virtual_tokens: number of prefix vectors in a layer.
        prefix_projection: train the prefixes as the output of a network (Li and Liang 2021, section 4.3). The network
            is dropped when the adapter is saved (see `merge_prefix_projections`), so training can be resumed from the
            checkpoints of `hf_peft_ext.trainers` alone, which keep it.
        encoder_hidden_size: width of that network.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Prefix vectors in a layer."})
    prefix_projection: bool = field(default=False, metadata={"help": "Reparameterise the prefixes in training."})
    encoder_hidden_size: int = field(default=512, metadata={"help": "Width of the reparameterisation."})

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        check_count("encoder_hidden_size", self.encoder_hidden_size)
        super().__post_init__()

    def prefix(self, **gate: Any) -> Placement:
        """The placement of the prefix."""
        hidden = self.encoder_hidden_size if self.prefix_projection else None
        options = {"num_virtual_tokens": self.num_virtual_tokens, "encoder_hidden_size": hidden}
        options["form"] = PREFIX_FORMS[self.init]
        return Placement("prefix", "attention", options=options, **gate)

    def stored(self) -> PlacedConfig:
        return replace(self, prefix_projection=False) if self.prefix_projection else self


@dataclass
class ComposedConfig(PlacedConfig):
    """A custom method: any sub-layers at any sites.

    Args:
        placements: the sub-layers (`Placement`, or dictionaries with its fields).

    Example:
        >>> ComposedConfig(placements=[
        ...     Placement("low_rank", "query", layers=[0, 1], gate="auto", options={"r": 4}),
        ...     Placement("bottleneck", "parallel_ffn", options={"reduction_factor": 16}),
        ... ])  # doctest: +SKIP
    """

    method = "composed"

    placements: list[Placement] = field(default_factory=list, metadata={"help": "The sub-layers and where they sit."})

    def __post_init__(self) -> None:
        self.placements = [Placement.of(p) for p in self.placements]
        if not self.placements:
            raise ValueError("`placements` (=[]) must hold at least one placement.")
        super().__post_init__()

    def to_placements(self) -> list[Placement]:
        return self.placements

    def stored(self) -> PlacedConfig:
        if not any(p.options.get("encoder_hidden_size") for p in self.placements):
            return self
        plain = [replace(p, options={k: v for k, v in p.options.items() if k != "encoder_hidden_size"})
                 for p in self.placements]  # fmt: skip
        return replace(self, placements=plain)
