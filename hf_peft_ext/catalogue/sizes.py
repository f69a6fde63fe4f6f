"""How many parameters a method trains on a model, and how many it stores: built on the meta device."""

import copy
from dataclasses import dataclass

from peft import PeftConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_peft_ext.budget.fake_model import head_task, model_on_meta
from hf_peft_ext.budget.memory.build import without_warnings
from hf_peft_ext.catalogue.entries import Entry
from hf_peft_ext.loading.expected_tensors import WithoutValues, attach_on_meta, tensors_of, with_adapter
from hf_peft_ext.tuners.target_modules import REFUSALS, with_target_modules


@dataclass(frozen=True)
class MethodSizes:
    """The sizes of a method on a model.

    Args:
        trained: trained parameters.
        total: parameters of the base model.
        stored: numbers in the adapter's file.
        error: why the method cannot be built on the model; the sizes are 0 then.
    """

    trained: int = 0
    total: int = 0
    stored: int = 0
    error: str = ""

    @property
    def share(self) -> float:
        """Trained parameters, as a part of the base model's."""
        return self.trained / self.total


class SizesOnModel:
    """MethodSizes on one model.

    Args:
        config: the model's config.

    Raises:
        ValueError: the model cannot be built on the meta device.
    """

    def __init__(self, config: PretrainedConfig):
        self.task = head_task(config, encoder_task="FEATURE_EXTRACTION")
        self.base: nn.Module = model_on_meta(config, task=self.task)
        self.total = sum(parameter.numel() for parameter in self.base.parameters())

    def of(self, entry: Entry) -> MethodSizes:
        """The sizes of a method with its default settings."""
        try:
            with without_warnings():
                config = with_target_modules(entry.peft_config(task_type=self.task), self.base)
                model, stored = self._prompted(config) if config.is_prompt_learning else self._attached(config)
        except REFUSALS as error:
            return MethodSizes(error=" ".join(str(error).split()))
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return MethodSizes(trained, self.total, sum(tensor.numel() for tensor in stored.values()))

    def _attached(self, config: PeftConfig) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model with an adapter, and the tensors of its file."""
        base = copy.deepcopy(self.base)
        adapter = attach_on_meta(base, config, "default", tensors_of(base.modules()), low_cpu_mem_usage=True)
        return adapter.model, adapter.expected

    def _prompted(self, config: PeftConfig) -> tuple[nn.Module, dict[str, Tensor]]:
        """The same for prompts, of which the file holds what their network computes."""
        with WithoutValues():
            model = with_adapter(copy.deepcopy(self.base), copy.deepcopy(config), "default", low_cpu_mem_usage=True)
        config.inference_mode = True
        return model, self._attached(config)[1]
