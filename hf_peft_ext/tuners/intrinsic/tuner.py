"""The tuner of intrinsic dimension: attaches the projections of one vector to all parameters."""

from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule
from torch import nn

from hf_peft_ext.attach.adapter_tuner import AdapterTuner, check_adapter_name, unload_auxiliary
from hf_peft_ext.tuners.intrinsic.config import IntrinsicConfig
from hf_peft_ext.tuners.intrinsic.layer import IntrinsicLayer, attach_layer
from hf_peft_ext.tuners.intrinsic.projections import PROJECTIONS, Shuffle, generator_of
from hf_peft_ext.tuners.intrinsic.subspace import Subspace
from hf_peft_ext.tuners.intrinsic.targets import Target, scale_group, target_parameters
from hf_peft_ext.validation.checks import check


class IntrinsicModel(AdapterTuner):
    """Attaches the subspace of an `IntrinsicConfig` to a model."""

    prefix = "intrinsic_"  # begins the name of `IntrinsicLayer.intrinsic_subspace`
    container = "intrinsic_subspace"
    tuner_layer_cls = IntrinsicLayer
    reads_whole_batches = "all rows of a batch read the same weights"

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Attach the subspace of an adapter. The model is unchanged after an error.

        `low_cpu_mem_usage` has no effect: there are d numbers, and the weights of the model must not move.

        Raises:
            ValueError: the config does not fit the model, or `adapter_name` cannot be the name of an adapter.
        """
        config = cast(IntrinsicConfig, self.peft_config[adapter_name])
        check_adapter_name(adapter_name)
        parts = AdapterParts(target_parameters(model, config), config)
        self._parts = parts
        kwargs.pop("state_dict", None)  # the config is complete; peft would look for keys in its own format
        try:
            with self.taken_off_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, False, **kwargs)
        finally:
            del self._parts

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        return key in self._parts.paths or (_ExcludedModule() if peft_config.exclude_modules else False)

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
        self._parts.attach(self.model, "", adapter_name)  # peft does not visit the model itself
        self._parts.attach(target, current_key, adapter_name)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # peft warns of them, but here tied weights get one update, and stay tied

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = intrinsic_layers(self.model)
        for layer in layers:
            if merge:
                layer.merge(safe_merge, adapter_names)
            else:
                layer.unmerge()
        for layer in layers:
            layer.remove()
        unload_auxiliary(self, merge, safe_merge, adapter_names)
        return self.model


class AdapterParts:
    """The subspace of an adapter and the projections of its parameters, drawn from the seed.

    Args:
        targets: the parameters, each place of a tied one included.
        config: the config.

    Attributes:
        targets: path of a module -> its parameters, until they are attached.
        paths: the paths of these modules.

    Raises:
        ValueError: `d` is no larger than the number of scales, or larger than the number of parameters.
    """

    def __init__(self, targets: list[Target], config: IntrinsicConfig):
        untied = [target for target in targets if target.tied_to is None]
        total = sum(target.parameter.numel() for target in untied)
        groups = [scale_group(target, config.variant == "tensor") for target in untied]
        names = list(dict.fromkeys(groups)) if config.variant != "global" else []
        check("d", config.d, config.d > len(names), f"must be larger than the number of scales, {len(names)}")
        check("d", config.d, config.d <= total, f"must be at most the number of adapted parameters, {total}")
        d = config.d - len(names)
        is_meta = any(target.parameter.is_meta for target in untied)
        shuffle = None
        if config.projection == "fastfood":
            shuffle = Shuffle(d, None if is_meta else generator_of(config.seed, ""))
        self.subspace = Subspace(config.d, len(names), shuffle)
        self.scale_of = {t.key: names.index(g) if names else 0 for t, g in zip(untied, groups, strict=True)}
        self.projection_of: dict[str, nn.Module] = {}
        for target in untied:
            generator = None if target.parameter.is_meta else generator_of(config.seed, target.key)
            projection = PROJECTIONS[config.projection](target.parameter.numel(), d, total, generator)
            self.projection_of[target.key] = projection
        self.owner = targets[0]
        self.targets: dict[str, list[Target]] = {}
        for target in targets:
            self.targets.setdefault(target.path, []).append(target)
        self.paths = frozenset(self.targets)

    def attach(self, module: nn.Module, path: str, adapter_name: str) -> None:
        """Attach the adapter to the parameters of a module, once.

        Args:
            module: the module.
            path: its path.
            adapter_name: the adapter.
        """
        for target in self.targets.pop(path, ()):
            attach_layer(module, target.name).put(
                adapter_name,
                self.projection_of[target.key],
                self.subspace,
                self.scale_of[target.key],
                is_owner=target is self.owner,
                is_tied=target.tied_to is not None,
            )


def intrinsic_layers(model: nn.Module) -> list[IntrinsicLayer]:
    """The tuner layers of intrinsic dimension in a model."""
    return [module for module in model.modules() if isinstance(module, IntrinsicLayer)]
