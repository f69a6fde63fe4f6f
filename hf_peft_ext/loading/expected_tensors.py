"""The tensors that the weights file of an adapter must hold: the adapter is built on the meta device."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    AdaLoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    ShiraConfig,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.shira import ShiraLayer
from peft.tuners.supertuning.layer import SupertuningLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext, _device_constructors

from hf_peft_ext.loading.kept_ranks import left_by_pruning
from hf_peft_ext.tuners.intrinsic.config import IntrinsicConfig
from hf_peft_ext.validation.checks import check

# Types that compute permutations or counts from values; their tensors on the CPU are bounded by `MOST_OF_TYPE`.
BUILT_WITH_VALUES = (PeftType.BOFT, PeftType.UNILORA)
FILLING = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)
SPARE = 2**22  # elements that an adapter may allocate beyond those in its file: 16 MiB in float32
# Types that may allocate as much as the base model: they keep permutations, factors or indices of its weights.
KEEPS_FACTORS = (PeftType.BOFT, PeftType.PSOFT, PeftType.UNILORA, PeftType.OSF)
DRAWN = 4  # numbers of 2 bytes, for each parameter of the model, that a random projection may hold


class MetaAdapter(NamedTuple):
    """An adapter on the meta device.

    Args:
        model: the model with the adapter.
        modules: all modules of that model.
        tensors: parameters and buffers that the model did not have before.
        expected: the tensors that the weights file must hold, by their keys in it.
    """

    model: PeftModel
    modules: Sequence[nn.Module]
    tensors: list[Tensor]
    expected: dict[str, Tensor]


def expected_tensors(model: nn.Module, config: PeftConfig, adapter_name: str) -> dict[str, Tensor]:
    """The tensors that the weights file must hold, on the meta device, by their keys in it.

    The adapter is built on a copy of the model without data. Model and config do not change.

    Raises:
        ValueError: the config does not fit the model, the name is a part of the model, or the adapter would allocate
            more than its file holds.
    """
    copied = copy_without_data(model)
    paths = [path for path, _ in copied.named_modules()]
    before = tensors_of(copied.modules())
    config = copy.deepcopy(config)
    pattern = config.rank_pattern if isinstance(config, AdaLoraConfig) else None
    adapter = attach_on_meta(copied, config, adapter_name, before, low_cpu_mem_usage=True)
    with config_errors(model), torch.device("meta"):
        if any(adapter_name in name for name in (*paths, *adapter.expected)):
            check_name(adapter, adapter_name)
        check_token_indices(adapter, adapter_name)
        add_index_limits(adapter)
    return left_by_pruning(adapter.expected, pattern) if pattern else adapter.expected


def attach_on_meta(
    model: nn.Module, config: PeftConfig, adapter_name: str, before: list[Tensor], low_cpu_mem_usage: bool
) -> MetaAdapter:
    """Attach an adapter whose tensors are on the meta device.

    Args:
        model: changes, also if the config does not fit.
        config: the config; AdaLoRA's and SHiRA's change.
        before: parameters and buffers of the model.
        low_cpu_mem_usage: as in peft, whose way to the meta device copies each tensor once more.

    Raises:
        ValueError: the config does not fit the model, or the adapter would allocate more than its file holds.
    """
    base_ids = {id(tensor) for tensor in before}
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = None  # peft cannot select directions without data
    if isinstance(config, ShiraConfig):
        config.mask_fn = first_weights  # nor draw a mask
    with config_errors(model):
        with nullcontext() if config.peft_type in BUILT_WITH_VALUES else WithoutValues():
            adapted = with_adapter(model, config, adapter_name, low_cpu_mem_usage)
        paths, modules = zip(*adapted.named_modules(remove_duplicate=False), strict=True)  # a state dict has all paths
        state = {
            name: tensor for name, tensor in tensors_by_name(paths, modules).items() if id(tensor) not in base_ids
        }
        expected = get_peft_model_state_dict(adapted, state, adapter_name, save_embedding_layers=False)
    new = [tensor for tensor in tensors_of(modules) if id(tensor) not in base_ids]
    size, in_file = (sum(tensor.numel() for tensor in group) for group in (new, expected.values()))
    spare = SPARE + (sum(tensor.numel() for tensor in before) if config.peft_type in KEEPS_FACTORS else 0)
    drawn = DRAWN * sum(tensor.numel() for tensor in before) if isinstance(config, IntrinsicConfig) else 0
    if size > 2 * in_file + spare + drawn:
        raise ValueError(f"The adapter would allocate {size} numbers, but its file must hold only {in_file}.")
    return MetaAdapter(adapted, modules, new, expected)


@contextmanager
def config_errors(model: nn.Module) -> Iterator[None]:
    """Turn every exception into a ValueError: peft raises all kinds for configs that it cannot apply.

    Warnings are ignored, because peft repeats them when it loads the adapter.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"The adapter does not fit {type(model).__name__}: {reason}") from error


def check_name(adapter: MetaAdapter, adapter_name: str) -> None:
    """Refuse a name with which peft mistakes the adapter's tensors: peft searches their keys for the name.

    Raises:
        ValueError: peft does not find all tensors.
    """
    if not adapter.model.peft_config[adapter_name].is_prompt_learning:
        result = set_peft_model_state_dict(adapter.model, adapter.expected, adapter_name)
        rule = "is the name of a part of the model; take another"
        check("adapter_name", adapter_name, not result.unexpected_keys, rule)


def check_token_indices(adapter: MetaAdapter, adapter_name: str) -> None:
    """Refuse trainable tokens outside the vocabulary.

    Raises:
        ValueError: an index is negative or too large.
    """
    for module in adapter.modules:
        if isinstance(module, TrainableTokensLayer):
            rows, size = module.token_indices.get(adapter_name, []), len(module.weight)
            check("token_indices", rows, all(0 <= row < size for row in rows), f"must be rows of 0 to {size - 1}")


def add_index_limits(adapter: MetaAdapter) -> None:
    """Note on each expected tensor of indices how large they may be: `index_limits`, one for each row."""
    for path, module in adapter.model.named_modules():
        if isinstance(module, (ShiraLayer, SupertuningLayer)):
            base: Any = module.get_base_layer()
            for name in ("shira_indices", "supertuning_indices"):
                tensor: Any = adapter.expected.get(f"{path}.{name}")
                if tensor is not None:
                    tensor.index_limits = list(base.weight.shape) if name == "shira_indices" else [base.weight.numel()]


def first_weights(base_layer: Any, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """A mask of as many weights as SHiRA trains, on the CPU: of the shape of the weights."""
    rows, columns = base_layer.weight.shape
    mask = torch.zeros(rows * columns, device="cpu")
    mask[: r * (rows + columns)] = 1.0
    return mask.view(rows, columns)


def with_adapter(model: nn.Module, config: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> PeftModel:
    """The model with an adapter, built as peft does when it loads one."""
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        return model
    peft_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
    return peft_cls(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)


class WithoutValues(DeviceContext):
    """Like `torch.device("meta")`, but initialisation is skipped: it takes most of the time of building an adapter.

    transformers' `no_init_weights` skips it too, but by changing `torch.nn.init` for all threads.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))
        self.constructors = _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.constructors:
            if kwargs.get("device") is None:
                kwargs["device"] = self.device
        elif func in FILLING or getattr(func, "__module__", None) == "torch.nn.init":
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


class CopyToMeta(TorchFunctionMode):
    """While active, a deep copy of a tensor keeps shape and type without data.

    Tensors with a single element keep their value, because bitsandbytes reads its offsets.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        copied = tensor.clone() if tensor.numel() == 1 else torch.empty_like(tensor, device="meta")
        return memo.setdefault(id(tensor), copied)


def copy_without_data(model: nn.Module) -> nn.Module:
    """A copy of a model with its tensors on the meta device."""
    parameters = list(model.parameters())
    memo: dict[int, Any] = {}  # filled first, because classes of parameters define their own deep copy
    for parameter in parameters:
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.Tensor._make_subclass(type(parameter), meta, parameter.requires_grad)
    with CopyToMeta():
        for parameter in parameters:  # attributes of a quantized weight: its statistics, its module
            if type(parameter) is not nn.Parameter:  # else marks of transformers, which accelerate passes to __new__
                vars(memo[id(parameter)]).update(copy.deepcopy(vars(parameter), memo))
        return copy.deepcopy(model, memo)


def tensors_by_name(paths: Iterable[str], modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The tensors in the state dict of a model with these modules, by name, without a further walk over it."""
    state: dict[str, Tensor] = {}
    for path, module in zip(paths, modules, strict=True):
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                state[prefix + name] = tensor
    return state


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of these modules, without those of their children; each tensor once.

    `Module.parameters` and `Module.buffers` would walk over the model twice more.
    """
    owned = (values for module in modules for values in (module._parameters.values(), module._buffers.values()))
    return list({id(tensor): tensor for values in owned for tensor in values if tensor is not None}.values())
