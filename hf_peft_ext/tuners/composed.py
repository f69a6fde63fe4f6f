"""One tuner for every method: it carries out a list of placements."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..placement import Placement
from ..sites import Site
from ..sublayers import Bias, Bottleneck, Gate, LowRank, Prefix, ProjectedPrefix, Projection
from .attach import Attached, OnInput, OnNorm, OnOutput, OnSpan, child_name
from .attention import InAttention, fold
from .config import PlacedConfig
from .plan import excluded, plan

LAYERS: dict[str, type[Attached]] = {
    "output": OnOutput,
    "input": OnInput,
    "norm": OnNorm,
    "span": OnSpan,
    "attention": InAttention,
}


@dataclass
class ComposedConfig(PlacedConfig):
    """A method of one's own: any sub-layers at any sites.

    Args:
        placements: the sub-layers (`Placement`, or dictionaries with its fields).

    Example:
        >>> ComposedConfig(placements=[
        ...     Placement("low_rank", "query", layers=[0, 1], gate="auto", options={"r": 4}),
        ...     Placement("bottleneck", "parallel_ffn", options={"reduction_factor": 16, "init": "lora"}),
        ... ])  # doctest: +SKIP
    """

    method = "composed"

    placements: list[Any] = field(default_factory=list, metadata={"help": "The sub-layers and where they sit."})

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


class ComposedModel(BaseTuner):
    """Attaches the sub-layers of a `PlacedConfig` to a model."""

    prefix = "sublayer_"  # begins the name of `Attached.sublayer_of`; transformers looks for it when it loads
    tuner_layer_cls = Attached
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach the sub-layers of an adapter. Whatever fails, the model is left as it was.

        Raises:
            ValueError: a placement has no site in this model, a layer does not exist, or the adapter's name is one that
                a part of a sub-layer has.
        """
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        assert isinstance(config, PlacedConfig)
        self._plan = plan(model, config)
        self._projections: dict[Any, Projection] = {}
        keep_4bit_trainable(model)
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        before = attached(model)
        kwargs.pop("state_dict", None)  # the placements say everything; peft would look for its own key format
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for layer in attached(model):
                if adapter_name in layer.sublayer_of:
                    layer.sublayer_of.pop(adapter_name)
                if layer not in before:
                    layer.remove()
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad
            raise

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        assert isinstance(peft_config, PlacedConfig)
        return _ExcludedModule() if excluded(key, peft_config) else key in self._plan

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        for placement, site in self._plan[current_key]:
            name = child_name(site.name, placement.sublayer)
            if not hasattr(target, name):
                target.add_module(name, LAYERS[site.act](self.model, site))
            getattr(target, name).put(adapter_name, self.build(placement, site))

    def build(self, placement: Placement, site: Site) -> nn.Module:
        """The sub-layer of a placement, in the widths of a site."""
        gate, options = None, dict(placement.options)
        if placement.gate:
            auto = "token" if site.causal else "mean"
            gate = Gate(site.d_in, auto if placement.gate == "auto" else placement.gate)
        if placement.sublayer == "bias":
            return Bias(site.d_out)
        if placement.sublayer == "low_rank":
            return LowRank(site.d_in, site.d_out, gate=gate, rows=site.rows, width=site.width, **options)
        if placement.sublayer == "bottleneck":
            factor = options.pop("reduction_factor", None)
            options["r"] = options.get("r") or max(1, round(site.d_in / factor))
            return Bottleneck(site.d_in, gate=gate, **options)
        n_tokens, hidden = options.get("num_virtual_tokens", 10), options.get("encoder_hidden_size")
        shape = (site.heads, n_tokens, site.d_k, site.d_v)
        if hidden is None:
            return Prefix(*shape, gate=gate)
        key = (n_tokens, site.d_in, hidden)
        if key not in self._projections:
            self._projections[key] = Projection(*key)
        return ProjectedPrefix(*shape, self._projections[key], gate=gate)

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"\.sublayer_of\.{re.escape(adapter_name)}\.", ".sublayer_of.", key)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kw: Any,
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kw)
        for path, layer in model.named_modules():
            prefix = layer.sublayer_of[adapter_name] if is_projected(layer, adapter_name) else None
            if isinstance(prefix, ProjectedPrefix):
                root = f"{path}.sublayer_of.{adapter_name}."
                for part in ("projection.", "last."):
                    state = {key: value for key, value in state.items() if not key.startswith(root + part)}
                keys, values = prefix.vectors()
                state |= {f"{root}keys": keys.detach().contiguous(), f"{root}values": values.detach().contiguous()}
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if fold_prefixes(model, adapter_name):
            warnings.warn(
                "The saved prefixes are plain: the reparameterisation of this model was folded away.", stacklevel=2
            )
        # tensors mapped from a file lie at odd addresses, where matrix products differ in the last bit
        aligned = {key: value.clone() for key, value in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, aligned)

    # Batches that mix adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_row_adapters(names)
        layers = attached(self.model)
        wrappers = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]

        def pass_names(module: nn.Module, args: Any, kwargs: Any) -> Any:
            each = len(args[0]) // len(names)
            return args, {**kwargs, "adapter_names": [n for n in names for _ in range(each)]}

        handles = [wrapper.register_forward_pre_hook(pass_names, with_kwargs=True) for wrapper in wrappers]
        for layer in layers:
            layer.row_adapters = list(names)
        try:
            yield
        finally:
            for layer in layers:
                layer.row_adapters = None
            for handle in handles:
                handle.remove()

    def _check_row_adapters(self, names: list[str]) -> None:
        if self.training:
            raise ValueError("`adapter_names` can be passed for inference only; call model.eval() first.")
        unknown = set(names) - {"__base__", *self.peft_config}
        if unknown:
            raise ValueError(
                f"`adapter_names` holds {sorted(unknown)}, but the adapters are {sorted(self.peft_config)}."
            )
        if any(layer.merged for layer in attached(self.model)):
            raise ValueError("`adapter_names` cannot be used while adapters are merged; unmerge them first.")

    # Merging and unloading

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refused = [
            f"{layer.site.host} ({type(sublayer).__name__})"
            for layer in attached(self.model)
            for name, sublayer in layer.sublayer_of.items()
            if name in layer.active_adapters and not can_merge(sublayer)
        ]
        if refused:
            listed = ", ".join(refused[:4]) + (f" and {len(refused) - 4} more" if len(refused) > 4 else "")
            raise ValueError(
                f"{len(refused)} sub-layers cannot be merged into weights: {listed}. Bottlenecks and prefixes never can; a "
                "gated low-rank branch can once its gate is a constant (see `fix_gates`)."
            )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for layer in attached(self.model):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer.remove()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def attached(model: nn.Module) -> list[Attached]:
    """The tuner layers of this package in a model."""
    return [module for module in model.modules() if isinstance(module, Attached)]


def can_merge(sublayer: nn.Module) -> bool:
    if isinstance(sublayer, LowRank):
        return sublayer.gate is None or sublayer.gate.is_constant
    return isinstance(sublayer, Bias)


def is_projected(layer: nn.Module, adapter_name: str) -> bool:
    return isinstance(layer, InAttention) and isinstance(
        dict(layer.sublayer_of.items()).get(adapter_name), ProjectedPrefix
    )


def fold_prefixes(model: nn.Module, adapter_name: str = "default") -> int:
    """Replace the reparameterised prefixes of an adapter by plain ones with the same vectors, in place.

    Returns:
        The number of prefixes that were replaced.
    """
    layers = [layer for layer in attached(model) if is_projected(layer, adapter_name)]
    for layer in layers:
        fold(layer, adapter_name)
    return len(layers)


def check_adapter_name(name: str) -> None:
    """peft tells adapters apart by a part of the key, so an adapter must not be called like a part of a sub-layer."""
    kinds = (LowRank(1, 1, 1, gate=Gate(1)), Bottleneck(1, 1, scaling="learned"), Bias(1),
             ProjectedPrefix(1, 1, 1, 1, Projection(1, 1, 1)), Prefix(1, 1, 1, 1))  # fmt: skip
    parts = {part for kind in kinds for key, _ in kind.named_parameters() for part in key.split(".")}
    if name in parts:
        raise ValueError(
            f"`adapter_name` (={name!r}) is the name of a part of a sub-layer; take another than {sorted(parts)}."
        )


def keep_4bit_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on processors with AVX512-BF16.

    There the first forward in evaluation repacks them, after which training silently has no gradients.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # taking the state unpacks a weight that was repacked already
