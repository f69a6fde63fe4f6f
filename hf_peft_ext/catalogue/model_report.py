"""The sites of a model, and the names of its modules for peft: read from its config, without its weights."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from hf_peft_ext.budget.fake_model import head_task, model_on_meta
from hf_peft_ext.model.find_target_modules import find_target_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import layer_paths
from hf_peft_ext.validation.suggestions import ranges


@dataclass(frozen=True)
class SiteRow:
    """A kind of site of a model.

    Args:
        site: its name, as in `Placement.site`.
        module: the path of its module in the first layer that has it.
        layers: the layers that have it, such as "0 to 11".
        width: widths of the tensor that is read and of the one that is added.
        count: how many there are.
    """

    site: str
    module: str
    layers: str
    width: str
    count: int


@dataclass(frozen=True)
class ModelReport:
    """A report on a model.

    Args:
        model_type: transformers' name of the architecture.
        model_class: the class that was built.
        parameters: how many it has.
        layers: how many blocks it has.
        target_modules: of peft's methods on query and value projections (`find_target_modules`).
        all_target_modules: of peft's methods on all linear layers of the blocks.
        sites: its sites.
    """

    model_type: str
    model_class: str
    parameters: int
    layers: int
    target_modules: list[str]
    all_target_modules: list[str]
    sites: list[SiteRow]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def inspect_model(config: PretrainedConfig) -> ModelReport:
    """Report on a model, built on the meta device.

    Raises:
        ValueError: the model cannot be built there.
    """
    model = model_on_meta(config, task=head_task(config, encoder_task="FEATURE_EXTRACTION"))
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in find_sites(model):
        groups[site.name].append(site)
    return ModelReport(
        model_type=config.model_type,
        model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=len(list(layer_paths(model))),
        target_modules=targets(model),
        all_target_modules=targets(model, ("query", "key", "value", "attention_output"), feedforward=True),
        sites=[site_row(name, group) for name, group in groups.items()],
    )


def targets(model: Any, sites: tuple[str, ...] = ("query", "value"), feedforward: bool = False) -> list[str]:
    """The names of a model's projections; none where it has no such linear layers."""
    try:
        return find_target_modules(model, sites, feedforward)
    except ValueError:
        return []


def site_row(name: str, group: list[Site]) -> SiteRow:
    """A row for the sites of one name."""
    layers = ranges(site.layer for site in group if site.layer is not None)
    widths = sorted({f"{site.d_in} > {site.d_out}" if site.d_in else str(site.d_out) for site in group})
    return SiteRow(name, group[0].host, layers or "outside", ", ".join(widths), len(group))
