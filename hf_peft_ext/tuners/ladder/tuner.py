"""Ladder side-tuning: a narrow network beside the backbone, trained without a gradient through the backbone."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast, get_args

from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel
from torch import nn

from hf_peft_ext.attach.adapter_tuner import AdapterTuner, check_adapter_name, unload_auxiliary
from hf_peft_ext.attach.config import InitConfig, layer_list
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.pruning import Importance
from hf_peft_ext.pruning.pruned_config import Reduce
from hf_peft_ext.tuners.ladder.build import side_networks
from hf_peft_ext.tuners.ladder.layer import CHILD, Ladder
from hf_peft_ext.validation.checks import check, check_positive


@dataclass
class LadderConfig(InitConfig):
    """Ladder side-tuning: narrow blocks beside a frozen backbone read its hidden states and compute the output.

    Sung et al. 2022 (https://arxiv.org/abs/2206.06522), with the defaults of its code: r = 8, T = 0.1, a side block at
    every block. The backbone runs without gradients; only the side network, its projections and the head keep
    activations. Its output is the input of the model's own frozen head, or of a classifier in `modules_to_save`.

    - Side blocks start as the backbone's, pruned to 1 / r of their width. So the model's structure must show which
      axes its weights have; see `tuners.ladder.build`.
    - The paper's code divides the width of each head and keeps their number; here heads are kept or dropped whole.
    - The output of the side network is added to the backbone's last hidden states, and its last projection starts at
      zero, so that the untrained adapter is the base model. In the paper the side network's output takes their place,
      from a random projection (`init="paper"`).

    Args:
        r: the factor between the widths of the backbone and the side network, at least 1.
        reduce: what r divides: every dimension ("width", the paper), or the number of parameters ("parameters").
        layers_to_keep: index or indices of the blocks that get a side block, encoder before decoder; None for all.
        temperature: T in the gates sigmoid(alpha / T).
        target_modules: must be None; kept because tools of peft's ecosystem read it.

    Raises:
        ValueError: a field is unknown, or its value breaks a rule.
    """

    method = "ladder"

    r: float = field(default=8, metadata={"help": "Width of the backbone over that of the side network."})
    reduce: Reduce = field(default="width", metadata={"help": 'What r divides: "width" or "parameters".'})
    layers_to_keep: list[int] | int | None = field(default=None, metadata={"help": "Blocks that get a side block."})
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the gates."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Must be None."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check("r", self.r, self.r >= 1, "must be at least 1")
        choices = get_args(Reduce)
        check("reduce", self.reduce, self.reduce in choices, f"must be one of {', '.join(choices)}")
        check_positive("temperature", self.temperature)
        self.layers_to_keep = layer_list(self.layers_to_keep, "layers_to_keep")
        rule = "must be None: a ladder reads whole blocks; see `layers_to_keep`"
        check("target_modules", self.target_modules, not self.target_modules, rule)


class LadderModel(AdapterTuner):
    """Attaches the side networks of a `LadderConfig` to a model."""

    prefix = "side_"  # begins the name of `Ladder.side_of`; transformers looks for it when it loads
    container = "side_of"
    tuner_layer_cls = Ladder
    reads_whole_batches = "a ladder reads whole batches"

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Attach the side networks of an adapter. The model is unchanged after an error.

        Raises:
            ValueError: the architecture cannot be pruned, a layer does not exist, or `adapter_name` cannot be the name
                of an adapter.
            TypeError: `model` is no transformers model.
        """
        config = cast(LadderConfig, self.peft_config[adapter_name])
        check_adapter_name(adapter_name)
        keep_4bit_trainable(model)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            self._sides = side_networks(model, config)
        kwargs.pop("state_dict", None)  # the config is complete; peft would look for keys in its own format
        try:
            with self.taken_off_on_error(model, adapter_name):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)
        finally:
            del self._sides

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:
        return key in self._sides

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
        side = self._sides[current_key]
        if not hasattr(target, CHILD):
            target.add_module(CHILD, Ladder(side.host, side.role))
        getattr(target, CHILD).put(adapter_name, side.network, side.kept)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one.

        Raises:
            ValueError: there are several: only one side network can give the output.
        """
        single = isinstance(adapter_name, str) or len(adapter_name) <= 1
        check("adapter_name", adapter_name, single, "must be a single one: only one side network can give the output")
        super().set_adapter(adapter_name, inference_mode)

    # Unsupported operations, and removal

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Not possible for a ladder.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "A ladder is a separate network, which cannot be merged into weights of the base model; use `unload`. "
            "`hf_peft_ext.to_lora` trains a LoRA that answers like it, which can be merged."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        for ladder in ladders(self.model):
            ladder.remove()
        unload_auxiliary(self)
        return self.model


def prune_ladder(model: nn.Module, importance: Importance, adapter_name: str = "default") -> None:
    """Initialise the side blocks of a ladder again, from the backbone pruned by other scores than weight magnitude.

    The paper prunes by Fisher scores from 1,024 labelled examples. Projections and gates are not changed.

    Args:
        model: a model with a ladder.
        importance: `hf_peft_ext.pruning.importance` of the base model, taken before it got an adapter.
        adapter_name: the adapter whose side network is initialised.

    Raises:
        ValueError: the model has no ladder of that name, or the scores are not of this model.
    """
    own = [ladder for ladder in ladders(model) if adapter_name in ladder.side_of]
    check("adapter_name", adapter_name, bool(own), "is no ladder of this model")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = cast(Any, model).peft_config[adapter_name]
    for ladder, side in zip(own, side_networks(base, config, importance).values(), strict=True):
        ladder.side_of[adapter_name].init_from(side.network)


def ladders(model: nn.Module) -> list[Ladder]:
    """The ladders in a model, one for each backbone."""
    return [module for module in model.modules() if isinstance(module, Ladder)]
