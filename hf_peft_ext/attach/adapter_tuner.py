"""Base of this package's tuners: adapter names, and the tensors of an adapter in a model and in a file."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_peft_ext.attach.checked_loading import check_complete, record_base_model
from hf_peft_ext.attach.weighted_adapter import add_weighted_adapter
from hf_peft_ext.validation.checks import check

ADAPTER_NAME = re.compile(r"[^./\\\x00-\x1f]{1,200}")
# peft's containers of modules and embedding rows that are trained whole, by adapter name.
TRAINED_WHOLE = ("modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")


class AdapterTuner(BaseTuner):
    """A tuner whose layers hold the modules of all adapters in one `ModuleDict`, by adapter name.

    Attributes:
        container: name of that `ModuleDict`. It begins with `prefix`, which transformers looks for when it loads.
        reads_whole_batches: why the rows of a batch cannot have different adapters, unless a tuner mixes them.
    """

    container: ClassVar[str]
    reads_whole_batches: ClassVar[str] = ""
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        record_base_model(self, model)  # peft calls this when the tuner is built

    @contextmanager
    def taken_off_on_error(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """Within, an error takes the adapter off the model again: its layers and what it made trainable."""

        def layers() -> list[Any]:
            return [module for module in model.modules() if isinstance(module, self.tuner_layer_cls)]

        before, trainable = layers(), [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            yield
        except BaseException:
            for layer in layers():
                layer.drop(adapter_name)
                if layer not in before:
                    layer.remove()
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad
            raise

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose weights are sum_i w_i theta_i, as `IA3Model.add_weighted_adapter` does.

        Heads and other modules that are saved whole are combined too. The outputs are a linear combination only where
        an adapter is linear in its weights (biases, sparse differences). Elsewhere this averages adapters of one task
        as a soup (AdapterSoup, Chronopoulou et al. 2023, https://arxiv.org/abs/2302.07027).

        Args:
            adapters: names of adapters of this model, of one type and with equal configs.
            weights: a number for each.
            adapter_name: name of the new adapter, which is not activated.

        Raises:
            ValueError: an argument breaks a rule, or the adapters do not have the same tensors.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        check("adapter_names", names, names is None, f"must be None: {self.reads_whole_batches}")
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        host, mark, part = key.partition(f".{cls.container}.{adapter_name}.")
        return f"{host.replace('.base_layer.', '.')}.{cls.container}.{part}" if mark else key

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
        """The tensors of an adapter from `state_dict`, or from the model where they are missing there.

        peft drops every key that contains the name of another adapter. But a part of the model or a sub-layer may
        have the same name ("gate").
        """
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kw)
        mark = f".{cls.container}.{adapter_name}"
        own = {key: value for key, value in state.items() if f"{mark}." in key}
        entries = [(path, module) for path, module in model.named_modules() if path.endswith(mark)]
        keys = {f"{path}.{key}" for path, module in entries for key in module.state_dict(keep_vars=True)}
        if len(own) < len(keys):
            own = {key: value for key, value in model.state_dict().items() if key in keys} | own
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file by their names in the model.

        Raises:
            ValueError: a tensor is not part of the adapter, is not finite, or has the wrong shape; or one is missing.
        """
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, aligned_copies(state_dict))
        own = tuple(f".{part}.{adapter_name}." for part in (cls.container, *TRAINED_WHOLE))
        others = sorted(key for key in state if not any(mark in f"{key}." for mark in own))
        check("adapter_model", others[:3], not others, "holds tensors that are no part of the adapter")
        real = {key: value for key, value in state.items() if value.is_floating_point() and not value.is_meta}
        broken = [key for key, value in real.items() if not value.isfinite().all()]
        check("adapter_model", broken[:3], not broken, "holds weights that are not finite")
        check_complete(cls, model, adapter_name, state)
        return state


def check_adapter_name(name: str) -> None:
    """Refuse names that cannot be a key of a module, or would lead out of the folder that peft saves to."""
    rule = "must have 1 to 200 characters, without dots, slashes, backslashes and control characters"
    check("adapter_name", name, bool(ADAPTER_NAME.fullmatch(name)), rule)
    rule = "is an attribute of torch's ModuleDict; take another"
    check("adapter_name", name, not hasattr(nn.ModuleDict(), name), rule)


def aligned_copies(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a file's tensors. Memory-mapped tensors may be unaligned, which changes the last bit of products."""
    return {key: value.clone() for key, value in state_dict.items()}


def unload_auxiliary(
    tuner: BaseTuner, merge: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> None:
    """Remove peft's wrappers of modules that are saved whole, and its config if no other tuner is left."""
    for path, module in list(tuner.model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            parent, _, name = _get_submodules(tuner.model, path)
            plain = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            setattr(parent, name, plain)  # peft's `_replace_module` copies weights, which not every module has
    if not any(isinstance(module, BaseTunerLayer) for module in tuner.model.modules()):
        del tuner.model.peft_config  # other tuners in the model keep theirs
