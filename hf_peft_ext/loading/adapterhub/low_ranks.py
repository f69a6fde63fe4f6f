"""Converts the low-rank branches of a checkpoint, and finds the leaves that LoRA and (IA)^3 change."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import ConvertedSublayer, gate_pooling_of, linear_state
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.site import Site
from hf_peft_ext.validation.checks import check

ATTENTION_MATRICES = {"q": "query", "k": "key", "v": "value"}
SHARED_A = r"(.*\.)?shared_parameters\.lora_A$"  # VeRA's matrices
FUSED = ("query", "key", "value")  # the order of their rows in a fused leaf, according to the library


def low_rank_sites(method: Settings, checkpoint: Checkpoint, sites: list[Site]) -> list[tuple[str, list[Site]]]:
    """The leaves that LoRA or (IA)^3 changes, each with its sites; a fused leaf has several.

    Of the FFN it changes one leaf or both. Which one "intermediate" is, the checkpoint says: in Llama and Mistral the
    library gives this name to the last.

    Raises:
        ValueError: the checkpoint has a branch on no or several FFN leaves of a layer where there must be one.
    """
    names = {ATTENTION_MATRICES.get(key) for key in method["attn_matrices"]} if method["selfattn_lora"] else set()
    chosen = [as_in_library(site) for site in sites if site.name.removeprefix("cross_") in names]
    flags = [key for key in ("intermediate_lora", "output_lora") if method.get(key)]
    ffn = [site for site in sites if flags and site.name in ("ffn_input", "ffn_output")]
    if len(flags) == 1:
        ffn = [site for site in ffn if checkpoint.matches(f"{checkpoint.unrooted(site.host)}\\.loras\\.")]
        layers = [site.layer for site in ffn]
        expected = {site.layer for site in sites if site.name == "ffn_output"}
        rule = "must have one branch in the FFN of each layer"
        check(flags[0], True, len(layers) == len(expected) and set(layers) == expected, rule)
    ordered = sorted([*chosen, *ffn], key=lambda site: [id(s.host) for s in sites].index(id(site.host)))
    return [(host, list(group)) for host, group in groupby(ordered, lambda site: site.host)]


def as_in_library(site: Site) -> Site:
    """The site, with its rows of a fused leaf where the library takes them: queries, keys, values, a third each."""
    if site.rows is None:
        return site
    thirds = torch.arange(site.width).tensor_split(3)
    rows = thirds[FUSED.index(site.name.removeprefix("cross_"))]
    return site if torch.equal(rows, site.rows) else replace(site, rows=rows, d_out=len(rows))


def low_ranks(method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]) -> Iterator[ConvertedSublayer]:
    """The low-rank branches of a method. The tensors of a fused leaf are split into those of its branches."""
    gated = bool(method.get("use_gating"))
    options = {"r": method["r"], "alpha": method["r"] if gated else method["alpha"], "dropout": method["dropout"]}
    for host, group in low_rank_sites(method, checkpoint, sites):
        tensors = vera_factors(method, checkpoint, host, group) if is_vera(method) else lora_factors(checkpoint, host)
        if gated:
            tensors |= linear_state(checkpoint, f"{host}.loras.gate", "gate")
        parts = {name: tensor.tensor_split(len(group)) for name, tensor in tensors.items()}
        for index, site in enumerate(group):
            own = {name: chunks[index] for name, chunks in parts.items()}
            yield ConvertedSublayer("low_rank", site, gate_pooling_of(method), options, own)


def lora_factors(checkpoint: Checkpoint, host: str) -> dict[str, Tensor]:
    """Take A and B of a leaf."""
    return {name: checkpoint.take(f"{host}.loras.lora_{name}") for name in ("A", "B")}


def is_vera(method: Settings) -> bool:
    """Whether a LoRA of the library is VeRA."""
    return method.get("vera_d") is not None


def vera_factors(method: Settings, checkpoint: Checkpoint, host: str, group: list[Site]) -> dict[str, Tensor]:
    """A and B of a LoRA that equals VeRA: A = D A_shared, B = B_own B_shared.

    The library trains D and B_own as whole matrices, of which peft's VERA has the diagonals only.

    Raises:
        ValueError: the leaf is fused, for which the library's VeRA fails, or a matrix has another shape.
    """
    check("vera_d", method["vera_d"], len(group) == 1 and group[0].rows is None, "must be None on fused leaves")
    pool = next((match[1] or "" for match in checkpoint.matches(SHARED_A) if host_in(match[1], checkpoint, host)), "")
    a, b = (checkpoint.read(f"{pool}shared_parameters.lora_{name}") for name in ("A", "B"))
    d, own = checkpoint.take(f"{host}.loras.vera_D"), checkpoint.take(f"{host}.loras.vera_B")
    site, r = group[0], len(a)
    shapes, expected = [tuple(t.shape) for t in (a, b, d, own)], [(r, site.d_in), (site.d_out, r), (r, r)]
    expected.append((site.d_out, site.d_out))
    check("shapes of VeRA", shapes, shapes == expected, f"must be {expected}, as at {host}")
    return {"A": d @ a, "B": own @ b}


def host_in(pool: str | None, checkpoint: Checkpoint, host: str) -> bool:
    """Whether a leaf is in the part of the model that has this prefix in the checkpoint."""
    return checkpoint.unrooted(host).startswith(pool or "")


def check_fused_rows(converted: list[ConvertedSublayer], sites: list[Site], model: Any) -> None:
    """Refuse branches on rows that are no site's.

    Raises:
        ValueError: DeBERTa's fused leaf has its rows head by head, which the library ignores.
    """
    own = {id(site) for site in sites}
    foreign = [one for one in converted if one.sublayer == "low_rank" and id(one.site) not in own]
    rule = f"must be alone and without a gate in {model.config.model_type}: the library takes rows of several matrices"
    check("architecture", "lora", not foreign, rule)
