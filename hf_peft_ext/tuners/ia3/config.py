"""T-Few's (IA)^3, on keys, values and the inner activation of the FFN, as an adapter of peft's own type."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from peft import IA3Config
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.attach.changed_config import asked_by, become
from hf_peft_ext.attach.config import NamedFields, layer_list
from hf_peft_ext.attach.resolve import check_layers, excluded, layer_count, no_site_message, saved_whole
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites, override_sites
from hf_peft_ext.model.structure import expert_tensors, innermost, layer_paths
from hf_peft_ext.tuners.ia3.target_modules import module_names
from hf_peft_ext.validation.checks import check, check_names

TFEW_TARGETS = ("key", "value", "ffn_output")


@dataclass
class TFewConfig(NamedFields, IA3Config):
    """(IA)^3 at the paper's sites: l_k * K, l_v * V and W_2 (l_ff * f(W_1 x)), the vectors l being one at the start.

    Liu et al. 2022 (https://arxiv.org/abs/2205.05638), section 3.3. The adapter is of peft's own type: when it is
    attached, the config becomes, in place, an `IA3Config` with the names of the modules, and is saved as such. So the
    adapter can be loaded without this package. (The defaults of `IA3Config` are other sites in many architectures:
    queries in place of keys in BART, Gemma and Qwen, in place of values in OPT.)

    - Where one projection makes queries, keys and values (GPT-2, BLOOM, Falcon), one vector scales all three; its part
      for the queries is kept at one in training. To continue training a saved adapter, load it into a model with this
      config: `model.load_adapter(path, "default", is_trainable=True)`.
    - In a mixture of experts, experts that are not linear modules are not scaled, and a warning names them.

    Args:
        targets: what is scaled: "key", "value", "ffn_output" (the input of the network's last leaf, which is its inner
            activation); "cross_key" and "cross_value" name those of cross-attention alone.
        layers_to_transform: index or indices of the layers to adapt, encoder before decoder; None for all.
        sites: for models whose sites are not found: target -> modules, named as in `target_modules`.
        exclude_modules, modules_to_save, init_ia3_weights: as in `peft.IA3Config`.
        target_modules, feedforward_modules: must be None; they are found.

    Raises:
        ValueError: a field is unknown, or its value breaks a rule.
    """

    targets: Sequence[str] = field(default=TFEW_TARGETS, metadata={"help": "What is scaled."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    sites: dict[str, list[str] | str] | None = field(default=None, metadata={"help": "Target -> modules."})

    def __post_init__(self) -> None:
        targets = (*TFEW_TARGETS, "cross_key", "cross_value")
        self.targets = check_names("targets", self.targets, targets)
        for name in ("target_modules", "feedforward_modules"):
            rule = "must be None: TFewConfig finds the modules; say where they are by `sites`, or use IA3Config"
            check(name, getattr(self, name), getattr(self, name) is None, rule)
        self.layers_to_transform = layer_list(self.layers_to_transform)
        for name in self.sites or {}:
            check("sites", name, name in targets, f"must name targets: {', '.join(targets)}")
        super().__post_init__()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Not possible before the config is on a model.

        Raises:
            ValueError: always.
        """
        raise ValueError("A TFewConfig names no modules before it is on a model; save the PeftModel instead.")


def meet(model: nn.Module, config: IA3Config) -> tuple[IA3Config, dict[str, Tensor]]:
    """Resolve a config on a model: the config of the adapter, and `Resolved.kept` if it is, or was, a `TFewConfig`.

    peft keeps the object that it was given, so a `TFewConfig` is changed in place. One that another model uses already
    is copied first.

    Raises:
        ValueError: as `resolve_targets`.
    """
    asked = asked_by(config) or config
    if not isinstance(asked, TFewConfig):
        return config, {}
    heads = config.modules_to_save and list(config.modules_to_save)  # peft adds to the list
    asked = replace(asked, modules_to_save=heads, inference_mode=config.inference_mode)
    resolved, kept = resolve_targets(model, asked)
    if isinstance(config, TFewConfig):
        become(config, resolved, asked)
        return config, kept
    return resolved, kept


class Resolved(NamedTuple):
    """A `TFewConfig` resolved on a model.

    Args:
        config: the config of the adapter.
        kept: path of a fused projection -> the rows of its vector that must stay one.
    """

    config: IA3Config
    kept: dict[str, Tensor]


def resolve_targets(model: nn.Module, config: TFewConfig) -> Resolved:
    """The adapter of a config on a model, which is not changed.

    Args:
        model: the base model.
        config: the config.

    Raises:
        ValueError: a target has no site, a layer does not exist, or (IA)^3 cannot scale a leaf of this kind.
    """
    hosts: dict[str, list[Site]] = {}
    for site in chosen_sites(model, config):
        hosts.setdefault(site.host, []).append(site)
    leaves = {host: innermost(model.get_submodule(host)) for host in hosts}
    check_hosts(hosts, leaves, config)
    inputs = [host for host, group in hosts.items() if group[0].name == "ffn_output"]
    outputs = [host for host in hosts if host not in inputs]
    others = {path for path, _ in own_modules(model)} - {"", *hosts} - excluded(model, config)
    targets, feedforward = module_names(outputs, inputs, others)
    own = {
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(isinstance(leaf, Conv1D) for leaf in leaves.values()),
    }
    plain = IA3Config(**{f.name: own.get(f.name, getattr(config, f.name)) for f in fields(IA3Config)})
    return Resolved(plain, {host: rows for host, group in hosts.items() if len(rows := other_rows(group))})


def check_hosts(hosts: dict[str, list[Site]], leaves: dict[str, nn.Module], config: TFewConfig) -> None:
    """Refuse modules that peft's (IA)^3 cannot scale, or that `sites` names for both input and output.

    Args:
        hosts: path of a module -> its sites.
        leaves: path of a module -> the module.
        config: the config.

    Raises:
        ValueError: there is such a module.
    """
    for host, group in hosts.items():
        names = [site.name for site in group]
        both = "ffn_output" in names and names.count("ffn_output") < len(names)
        check("sites", config.sites, not both, f"puts `ffn_output` and another target at {host}")
        if not isinstance(leaves[host], (nn.Linear, Conv1D)):
            kind = type(leaves[host]).__name__
            raise ValueError(f"{host} is a {kind}, which peft's (IA)^3 cannot scale; exclude it.")


def chosen_sites(model: nn.Module, config: TFewConfig) -> list[Site]:
    """The sites that the config targets.

    Raises:
        ValueError: a target has no site, a layer does not exist, or no site is left.
    """
    sites = override_sites(model, find_sites(model), config.sites or {})
    layers: Any = config.layers_to_transform
    check_layers("layers_to_transform", layers, layer_count(model, sites))
    for target in config.targets:
        named = [site for site in sites if site.serves(target)]
        if not any(layers is None or site.layer in layers for site in named):
            raise ValueError(no_site_message(model, "(IA)^3", target, layers if named else None))
    left_alone = excluded(model, config)
    chosen = [
        site
        for site in sites
        if any(site.serves(target) for target in config.targets) and (layers is None or site.layer in layers)
        if site.host not in left_alone and not saved_whole(site, config)
    ]
    check("exclude_modules", config.exclude_modules, bool(chosen), "and `modules_to_save` leave no site for (IA)^3")
    if "ffn_output" in config.targets and (left := left_out(model, sites, layers)):
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        warnings.warn(f"(IA)^3 leaves parts of the FFN as they are: {', '.join(left[:4])}{more}.", stacklevel=2)
    return chosen


def left_out(model: nn.Module, sites: list[Site], layers: list[int] | None) -> list[str]:
    """Paths of the parts of FFNs without a site: experts that are one tensor, and blocks that were not recognized."""
    reached = {site.layer for site in sites if site.name == "ffn_output"}
    parts: list[str] = []
    for layer, path in enumerate(layer_paths(model)):
        if layers is None or layer in layers:
            modules = own_modules(model.get_submodule(path), path)
            parts += [name for name, m in modules if expert_tensors(m)] if layer in reached else [path]
    return parts


def other_rows(group: list[Site]) -> Tensor:
    """The rows of a fused projection outside the chosen sites, such as those of the queries."""
    chosen = {row for site in group if site.rows is not None for row in site.rows.tolist()}
    return torch.tensor([row for row in range(group[0].width) if row not in chosen], dtype=torch.long, device="cpu")
