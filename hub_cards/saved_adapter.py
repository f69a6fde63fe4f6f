"""Reads a saved adapter without its weights: the config, and the names and shapes in the safetensors header."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from hf_peft_ext.attach.placement import SITES
from hf_peft_ext.hub_cards.markdown import cell
from hf_peft_ext.registry import REGISTERED
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.suggestions import ranges

SUBLAYER_KEY = re.compile(rf"(?:(?P<host>.+)\.)?(?P<place>\w+_(?:{'|'.join(SITES)}))\.sublayer_of\.(?P<rest>.+)")
SPARSE_KEY = re.compile(r"(?:.+\.)?parameter_deltas\.deltas_of\.(?P<rest>values|indices)")
LADDER_KEY = re.compile(r"(?P<host>.+)\.ladder\.side_of\.(?P<rest>.+)")
SUBSPACE_KEY = re.compile(r".+\.intrinsic_subspace\.(?P<rest>.+)")
CLASSIFIER_KEY = re.compile(r"(^|\.)(classifier|score|classification_head|logits_proj)\.")
PLACE = re.compile(rf"(?P<site>\w+)_(?P<sublayer>{'|'.join(SITES)})")
# Name of a tensor in a sub-layer -> the dimension with the sub-layer's size, and the size's name.
SIZE_DIMENSIONS = {
    **{
        "down.weight": (0, "r"),
        "down.bias": (0, "r"),
        "factors": (0, "n"),
        **{f"edit_of.{name}.W": (0, "r") for name in ("all", "first", "last")},
        "down.weights": (1, "r"),
        "down.biases": (0, "experts"),
        "A": (0, "r"),
        "P_K": (1, "tokens"),
    },
    "side.up.weight": (1, "d"),
    "subspace.vector": (0, "d"),
    **{"lora_A.weight": (0, "r"), "lora_A": (0, "r"), "lora_embedding_A": (0, "r")},
}
SITE_NAMES = {
    "after_attention": "after attention",
    "after_ffn": "after the FFN",
    "after_residual": "after the FFN and its residual",
    "parallel_attention": "beside attention",
    "parallel_ffn": "beside the FFN",
    "parallel_residual": "beside the FFN, from the residual stream",
    "block_output": "hidden states behind a block",
    "attention": "keys and values of attention",
    "query": "query projection",
    "key": "key projection",
    "value": "value projection",
    "attention_output": "output projection of attention",
    "ffn_input": "input projection of the FFN",
    "ffn_gate": "gate projection of the FFN",
    "ffn_output": "output projection of the FFN",
    "trained": "linear leaves and norms",
    "blocks": "beside the blocks",
    "parameters": "entries of weights, biases, norms and embeddings",
    "shared": "in no layer: factors that all share",
    "projected": "parameters, by a random projection",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor in the file.

    Args:
        key: its name in the file.
        shape: its shape.
        host: path of the base model's module that it belongs to.
        sublayer: its sub-layer, its stock method, or "saved whole".
        site: of the sub-layer.
        rest: its name in the sub-layer.
    """

    key: str
    shape: tuple[int, ...]
    host: str
    sublayer: str
    site: str
    rest: str


@dataclass(frozen=True)
class ArchitectureRow:
    """A row of the architecture table; each text is Markdown."""

    sublayer: str
    site: str
    layers: str
    size: str
    gate: str
    parameters: int


class SavedAdapter:
    """An adapter's folder.

    Args:
        folder: of `save_pretrained`.

    Raises:
        ValueError: the folder has no config or no safetensors, or one of them cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            check("folder", str(folder), (self.folder / name).is_file(), f"holds no {name}; save an adapter there")
        stored = json.loads((self.folder / CONFIG_NAME).read_text(encoding="utf-8"))
        kind = stored.get("peft_type") if isinstance(stored, dict) else None
        types = {member.value for member in PEFT_TYPE_TO_CONFIG_MAPPING}
        check("peft_type", kind, kind in types, f"in {CONFIG_NAME} must be a type of the installed peft")
        self.config: Any = PeftConfig.from_pretrained(str(folder))
        self.method = str(kind).lower()

    @property
    def is_ours(self) -> bool:
        """Whether loading it needs this package."""
        return self.config.peft_type in REGISTERED

    @property
    def prefix(self) -> str:
        """The first part of its tensors' names, for types of peft's own."""
        return PEFT_TYPE_TO_PREFIX_MAPPING[self.config.peft_type].rstrip("_")

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors in the file.

        Raises:
            ValueError: the file is not safetensors.
        """
        try:
            with safe_open(self.folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
                return [self._tensor(key, tuple(file.get_slice(key).get_shape())) for key in file.keys()]
        except SafetensorError as error:
            name = SAFETENSORS_WEIGHTS_NAME
            raise ValueError(f"`folder` (={str(self.folder)!r}) holds an invalid {name}: {error}.") from error

    def _tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        path = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if self.is_ours and (match := SUBLAYER_KEY.fullmatch(path)) and (place := PLACE.fullmatch(match["place"])):
            return Tensor(key, shape, match["host"] or "", place["sublayer"], place["site"], match["rest"])
        if self.is_ours and (match := LADDER_KEY.fullmatch(path)):
            return Tensor(key, shape, match["host"], "ladder", "blocks", f"side.{match['rest']}")
        if self.is_ours and (match := SPARSE_KEY.fullmatch(path)):
            return Tensor(key, shape, "", "sparse differences", "parameters", match["rest"])
        if self.is_ours and (match := SUBSPACE_KEY.fullmatch(path)):
            return Tensor(key, shape, "", "subspace", "projected", f"subspace.{match['rest']}")
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if not self.is_ours and part.startswith(self.prefix)), None)
        if at:
            return Tensor(key, shape, ".".join(parts[:at]), self.method, parts[at - 1], ".".join(parts[at:]))
        if parts[0] in ("prompt_embeddings", "base_model"):  # in no module of the model
            return Tensor(key, shape, "", self.method, parts[-1], path)
        return Tensor(key, shape, ".".join(parts[:-1]), "saved whole", parts[-2] if len(parts) > 1 else path, path)

    @property
    def parameters(self) -> int:
        """The number of parameters, without indices and masks."""
        return count(self.tensors)

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return (self.folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size

    def rows(self) -> list[ArchitectureRow]:
        """The architecture: a row for each sub-layer at each site."""
        places: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        for tensor in self.tensors:
            places[tensor.sublayer, tensor.site].append(tensor)
        order = ("bottleneck", "prefix", "low_rank", "bias", "coupling", "prompt", "intervention")
        ranked = sorted(places, key=lambda p: (p[0] == "saved whole", order.index(p[0]) if p[0] in order else 9))
        return [self._row(*place, places[place]) for place in ranked]

    def _row(self, sublayer: str, site: str, tensors: list[Tensor]) -> ArchitectureRow:
        sizes: dict[str, set[int]] = defaultdict(set)
        for tensor in tensors:
            if tensor.rest in SIZE_DIMENSIONS:
                dimension, name = SIZE_DIMENSIONS[tensor.rest]
                sizes[name].add(tensor.shape[dimension])
        return ArchitectureRow(
            sublayer=sublayer.replace("_", " ") if self.is_ours or sublayer == "saved whole" else sublayer.upper(),
            site=self._site(sublayer, site, tensors),
            layers=self._layers(sublayer, tensors),
            size=", ".join(f"{name} = {ranges(values)}" for name, values in sizes.items()),
            gate=self._gate(sublayer, site) if any(t.rest.startswith("gate.") for t in tensors) else "",
            parameters=count(tensors),
        )

    def _layers(self, sublayer: str, tensors: list[Tensor]) -> str:
        named = {"ladder": "layers_to_keep", "sparse differences": "layers_to_transform"}
        if sublayer not in named:
            return layers(tensor.host for tensor in tensors)
        chosen = getattr(self.config, named[sublayer])
        return "all" if chosen is None else ranges(set(chosen))

    def _site(self, sublayer: str, site: str, tensors: list[Tensor]) -> str:
        bare = site.removeprefix("cross_")
        if self.is_ours and sublayer != "saved whole" and bare in SITE_NAMES:
            name = SITE_NAMES[bare]
            if bare == site:
                return name
            crossed = name.replace("attention", "cross-attention")
            return crossed if crossed != name else f"{name} of cross-attention"
        return ", ".join(cell(name) for name in sorted({t.host.rpartition(".")[2] or site for t in tensors}))

    def _gate(self, sublayer: str, site: str) -> str:
        chosen = {p.gate for p in self.config.to_placements() if p.sublayer == sublayer and p.gate
                  and (p.site in (site, site.removeprefix("cross_")) or site == "target")}  # fmt: skip
        return ", ".join(sorted(str(pooling).replace("_", " ") for pooling in chosen))

    @property
    def reads_mean(self) -> bool:
        """Whether its classifier is that of `MeanPoolingForSequenceClassification`."""
        return any("mean_pooling.classifier." in tensor.key for tensor in self.tensors)

    def number_of_labels(self) -> int | None:
        """The number of classes of the saved head; None if no head was saved."""
        heads = [t.shape[0] for t in self.tensors if t.sublayer == "saved whole" and len(t.shape) == 2
                 and CLASSIFIER_KEY.search(t.key)]  # fmt: skip
        return min(heads, default=None)


def count(tensors: Iterable[Tensor]) -> int:
    """The number of parameters in these tensors; indices and masks are none."""
    return sum(prod(tensor.shape) for tensor in tensors if not tensor.rest.endswith(("indices", "_mask")))


def layers(hosts: Iterable[str]) -> str:
    """The layers of modules, by stack: the first number in a path is the index of the layer."""
    stacks: dict[str, set[int]] = defaultdict(set)
    outside = False
    for host in hosts:
        if match := re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", host):
            stacks[match[1] or ""].add(int(match[2]))
        else:
            outside = True
    sides = {
        stack: next((s for s in ("encoder", "decoder") if s in stack.split(".")), cell(stack)) for stack in stacks
    }
    ordered = sorted(stacks, key=lambda stack: sides[stack] == "decoder")
    named = [f"{sides[s]} {ranges(stacks[s])}" if len(stacks) > 1 else ranges(stacks[s]) for s in ordered]
    return ", ".join([*named, *(["outside the layers"] if outside else [])])
