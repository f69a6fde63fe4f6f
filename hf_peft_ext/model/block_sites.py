"""The sites of one block: its attention or the mixer in its place, its feed-forward network, its residual stream."""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from hf_peft_ext.model.attention_shape import fused_rows, key_shape
from hf_peft_ext.model.calls import ends_first, in_order, own_modules
from hf_peft_ext.model.prefix_leaves import prefix_leaves
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.structure import (
    FFN_GATES,
    UNREAD_MASKS,
    attention_leaves,
    covers,
    has_final_norm,
    in_decoder,
    is_attention,
    is_bypassed,
    is_causal,
    is_cross,
    is_mixer,
    is_norm,
    is_of,
    leaf_size,
    prefix_act,
)


class BlockSites:
    """The sites of one block, in the order of execution.

    Args:
        model: the model.
        path: path of the block.
        layer: its index.
    """

    def __init__(self, model: nn.Module, path: str, layer: int):
        self.model, self.path = model, path
        self.modules = dict(in_order(model.get_submodule(path), path))
        inside = [(name, module) for name, module in self.modules.items() if name != path]
        mixers = [(name, module) for name, module in inside if is_mixer(module)]
        self.attentions = [a for a in self.modules.items() if is_attention(a[1]) and a not in mixers]
        self.mixer = next(iter(mixers), None)  # RWKV's second one is its FFN
        self.common: dict[str, Any] = {"layer": layer, "causal": True}

    def find(self) -> list[Site]:
        """All sites of the block; none without attention, a mixer or a whole FFN."""
        if not (self.attentions or self.mixer or len(self.ffn_parts()) == 1):
            return []
        sites = []
        if self.attentions:
            name, attention = next(
                (a for a in self.attentions if not is_cross(a[0][len(self.path) :])), self.attentions[0]
            )
            causal = is_causal(attention) or in_decoder(self.model, self.path)
            self.common |= {"causal": causal, "attention": name, "tokens": self.tokens(attention)}
            sites = [site for name, module in self.attentions for site in self.attention_sites(name, module)]
        elif self.mixer:
            sites = list(self.mixer_sites(*self.mixer))
        ffn = list(self.ffn_sites())
        last = next((site.host for site in ffn if site.name == "after_ffn"), "")
        return sites + ffn + ([] if self.hands_on_images() else [self.residual_site(last), self.output_site()])

    def hands_on_images(self) -> bool:
        """Whether the residual stream between blocks is an image with its features along the second axis (DaViT)."""
        attentions = tuple(name for name, _ in self.attentions)
        convolutions = [(name, m) for name, m in self.modules.items() if isinstance(m, nn.Conv2d)]
        return any(m.in_channels == self.width() and not covers(attentions, name) for name, m in convolutions)

    def tokens(self, attention: nn.Module) -> str:
        """The layout of the tokens, see `Site.tokens`."""
        if is_of(attention, UNREAD_MASKS):
            return "unread"
        is_packed = "cu_seqlens" in inspect.signature(attention.forward).parameters
        in_windows = hasattr(self.modules[self.path], "window_size") or getattr(attention, "window_size", 0)
        return "packed" if is_packed else "windows" if in_windows else "examples"

    def attention_sites(self, name: str, attention: nn.Module) -> Iterator[Site]:
        """The sites of an attention module and its leaves."""
        cross = "cross_" if is_cross(name[len(self.path) :]) else ""
        leaves = {role: f"{name}.{leaf}" for role, leaf in attention_leaves(attention).items()}
        if "output" not in leaves and (output := self.output_beside(name)):
            leaves["output"] = output
        for role in ("query", "key", "value"):
            if role in leaves:
                of_encoder = {"attention": name, "of_encoder": True} if cross and role != "query" else {}
                yield from self.leaf_sites(cross + role, leaves[role], **of_encoder)
        heads, d_k, d_v = shape = key_shape(attention, {role: self.size(leaf) for role, leaf in leaves.items()})
        fused = leaves.get("fused") or leaves.get("latent")
        if fused and heads and not is_bypassed(self.model, fused):
            of_encoder = {"attention": name, "of_encoder": True} if cross and "query" in leaves else {}
            yield from self.fused_sites(cross, fused, attention, shape, **of_encoder)
        reads = leaves.get("fused") or leaves["query"]  # the query may read a latent of another width
        d = self.size(leaves["output"])[1] if "latent" in leaves else self.size(reads)[0]
        act = prefix_act(attention)
        act = "leaves" if act is None or (act == "cache" and cross) else act
        ends = prefix_leaves(self.model, leaves, attention, shape)
        if heads and (ends or act != "leaves"):
            yield Site(f"{cross}attention", host=name, act=act, d_in=d, d_out=d, **self.common,
                       heads=heads, d_k=d_k, d_v=d_v, **ends)  # fmt: skip
        if "output" in leaves:
            d_out = self.size(leaves["output"])[1]
            yield from self.leaf_sites(f"{cross}attention_output", leaves["output"])
            yield Site(f"{cross}after_attention", host=leaves["output"], act="output", d_in=d_out, d_out=d_out,
                       **self.common)  # fmt: skip
            if d == d_out:
                yield Site(f"{cross}parallel_attention", host=leaves["output"], act="span", d_in=d, d_out=d_out,
                           reads=name, **self.common)  # fmt: skip

    def fused_sites(
        self, cross: str, leaf: str, attention: nn.Module, shape: tuple[int, int, int], **kwargs: Any
    ) -> Iterator[Site]:
        """The sites of a leaf that projects to queries, keys and values at once."""
        d_in, width = self.size(leaf)
        for role, rows in fused_rows(attention, width, shape).items():
            if len(rows):
                yield Site(cross + role, host=leaf, act="input", d_in=d_in, d_out=len(rows),
                           rows=rows.clone(), width=width, **{**self.common, **kwargs})  # fmt: skip

    def mixer_sites(self, name: str, mixer: nn.Module) -> Iterator[Site]:
        """The sites of a mixer without softmax: linear attention, a state space, a short convolution.

        Mamba's kernels read the weights of `out_proj` and others, so the sites after a mixer use its whole output.
        """
        d, leaves = self.width(), attention_leaves(mixer)
        roles = {role: f"{name}.{leaves[role]}" for role in ("query", "key", "value") if role in leaves}
        output = self.mixer_output(name, mixer)
        for role, leaf in roles.items():
            yield from self.leaf_sites(role, leaf)
        taken = {*roles.values(), output}
        reading = [leaf for leaf in self.direct_leaves(name, mixer) if self.size(leaf)[0] == d and leaf not in taken]
        if reading and not {"query", "value"} <= roles.keys():
            widest = max(self.size(leaf)[1] for leaf in reading)
            yield from self.leaf_sites("mixer_input", [leaf for leaf in reading if self.size(leaf)[1] == widest][-1])
        if output and self.size(output)[1] == d:
            yield from self.leaf_sites("attention_output", output)
        yield Site("after_attention", host=name, act="output", d_in=d, d_out=d, **self.common)
        yield Site("parallel_attention", host=name, act="input", d_in=d, d_out=d, **self.common)

    def direct_leaves(self, name: str, mixer: nn.Module) -> list[str]:
        """Paths of the linear children of a mixer."""
        return [f"{name}.{leaf}" for leaf, module in mixer.named_children() if leaf_size(module)]

    def mixer_output(self, name: str, mixer: nn.Module) -> str | None:
        """The output leaf of a mixer: by its name, else the last."""
        named, direct = attention_leaves(mixer).get("output"), self.direct_leaves(name, mixer)
        return f"{name}.{named}" if named else direct[-1] if len(direct) > 1 else None

    def ffn_sites(self) -> Iterator[Site]:
        """The sites of the feed-forward network."""
        parts = self.ffn_parts()
        leaves = self.linear_leaves(parts)
        d = self.width()
        whole = self.linear_leaves([part for part in parts if self.is_whole(part, d)])
        candidates = whole or leaves
        opened: set[int] = set()  # output widths of earlier leaves
        for name in candidates:
            d_in, d_out = self.size(name)
            inner = d_in != d and (bool(whole) or d_in in opened)  # the width between the two
            opened |= {d_out} if d_in == d else set()
            if d_out == d and (inner or name == candidates[-1]):
                yield from self.leaf_sites("ffn_output", name)
            elif d_in == d:
                gate = name.rpartition(".")[2] in FFN_GATES
                yield from self.leaf_sites("ffn_gate" if gate else "ffn_input", name)
        if len(parts) == 1:
            host = parts[0]
            yield Site("parallel_ffn", host=host, act="input", d_in=d, d_out=d, **self.common)
        elif ends := self.ffn_ends(leaves, d):
            reads, host = ends
            yield Site("parallel_ffn", host=host, act="span", reads=reads, d_in=d, d_out=d, **self.common)
        else:
            return
        yield Site("after_ffn", host=host, act="output", d_in=d, d_out=d, **self.common)
        if norm := self.ffn_norm():
            yield Site("parallel_residual", host=host, act="span", reads=norm, d_in=d, d_out=d, **self.common)

    def ffn_ends(self, leaves: list[str], d: int) -> tuple[str, str] | None:
        """The first and last leaf of an FFN without a module of its own.

        They are the last of the widest pairs of neighbours with inverse sizes, or else the first and last of all.
        """
        sizes = {leaf: self.size(leaf) for leaf in leaves}
        pairs = [(a, b) for a, b in pairwise(leaves) if sizes[a][0] == d and sizes[a] == sizes[b][::-1]]
        if pairs:
            return max(reversed(pairs), key=lambda pair: sizes[pair[0]][1])
        fits = bool(leaves) and sizes[leaves[0]][0] == d == sizes[leaves[-1]][1]
        return (leaves[0], leaves[-1]) if fits and not ends_first(self.model, leaves[0], leaves[-1]) else None

    def residual_site(self, before: str) -> Site:
        """The site after the last residual; `before` is the module that runs before a norm there."""
        d, norms = self.width(), self.norms(tuple(self.root(name) for name, _ in self.attentions))
        if norms and not self.is_pre_norm(norms):
            host = next((norm for norm in reversed(norms) if self.norm_width(norm) == d), norms[-1])
            d = self.norm_width(host)
            before = "" if before and ends_first(self.model, before, host) else before
            return Site("after_residual", host=host, act="norm", d_in=d, d_out=d, reads=before, **self.common)
        return Site("after_residual", host=self.path, act="output", d_in=d, d_out=d, **self.common)

    def output_site(self) -> Site:
        """The site of the hidden states that the next block reads."""
        d = self.width()
        return Site("block_output", host=self.path, act="output", d_in=d, d_out=d, **self.common)

    def norm_width(self, norm: str) -> int:
        """Number of features of a norm."""
        module: Any = self.modules[norm]
        return len(module.weight)

    def norms(self, inside: tuple[str, ...]) -> list[str]:
        """The norms of the block outside these modules and its mixer."""
        inside = (*inside, self.mixer[0]) if self.mixer else inside
        return [name for name, module in self.modules.items() if is_norm(module) and not covers(inside, name)]

    def ffn_norm(self) -> str | None:
        """The norm in front of the FFN: the last one, in blocks with a norm in front of each branch."""
        norms = self.norms(tuple(name for name, _ in self.attentions))
        mixing = len(self.attentions) or int(self.mixer is not None)
        return norms[-1] if self.is_pre_norm(norms) and len(norms) == mixing + 1 else None

    def is_pre_norm(self, norms: list[str]) -> bool:
        """Whether the block has a norm in front of each branch.

        Then a norm follows the stack, or the block's last norm runs before its FFN (BEiT normalises after pooling).
        """
        parts = self.ffn_parts()
        whole = len(parts) == 1 and bool(norms) and ends_first(self.model, parts[0], norms[-1])
        return has_final_norm(self.model, self.path.rpartition(".")[0]) or whole

    def ffn_parts(self) -> list[str]:
        """The largest modules outside attention with a weight matrix and no norm."""
        attention_roots = tuple(self.root(name) for name, _ in self.attentions)
        if self.mixer:
            attention_roots = (*attention_roots, self.mixer[0])
        parts: list[str] = []
        for name, module in self.modules.items():
            if name == self.path or isinstance(module, nn.ModuleList) or covers(attention_roots, name):
                continue
            if covers(tuple(parts), name) or any(covers((name,), root) for root in attention_roots):
                continue
            has_matrix = any(p.ndim > 1 for p in module.parameters()) or leaf_size(module)
            if has_matrix and not any(is_norm(m) for m in module.modules()):
                parts.append(name)
        return parts

    def is_whole(self, part: str, d: int) -> bool:
        """Whether a part is an FFN by itself: it maps the residual stream to itself and mixes no tokens."""
        sizes = [self.size(name) for name in self.linear_leaves([part])]
        returns = any(a[0] == d == b[1] for i, a in enumerate(sizes) for b in sizes[i + 1 :])
        return returns and not any(isinstance(m, nn.Conv1d) for m in self.modules[part].modules())

    def linear_leaves(self, parts: list[str]) -> list[str]:
        """Paths of the linear leaves of these modules."""
        return [name for part in parts for name, m in own_modules(self.modules[part], part) if leaf_size(m)]

    def root(self, name: str) -> str:
        """The highest module of the block, below lists, that contains this attention module."""
        while (parent := name.rpartition(".")[0]) != self.path and not isinstance(
            self.model.get_submodule(parent), nn.ModuleList
        ):
            name = parent
        return name

    def output_beside(self, attention: str) -> str | None:
        """The output leaf beside an attention module (BERT's `attention.output.dense`)."""
        root = self.root(attention)
        outside = (n for n, m in own_modules(self.modules[root], root) if leaf_size(m) and not covers((attention,), n))
        return next(outside, None)

    def output_leaf(self) -> str:
        """A leaf whose output is as wide as the residual stream."""
        name, attention = self.attentions[0]
        leaf = attention_leaves(attention).get("output")
        return f"{name}.{leaf}" if leaf else self.output_beside(name) or self.linear_leaves(self.ffn_parts())[-1]

    def width(self) -> int:
        """The width of the residual stream."""
        if self.attentions:
            return self.size(self.output_leaf())[1]
        widths = [self.norm_width(norm) for norm in self.norms(())]
        last = self.mixer_output(*self.mixer) if self.mixer else self.linear_leaves(self.ffn_parts())[-1]
        d = self.size(last)[1] if last else 0
        return d if d in widths or not widths else widths[0]

    def leaf_sites(self, site: str, leaf: str, **kwargs: Any) -> Iterator[Site]:
        """The site at a leaf; none where the leaf may never be called."""
        if not is_bypassed(self.model, leaf):
            d_in, d_out = self.size(leaf)
            yield Site(site, host=leaf, act="input", d_in=d_in, d_out=d_out, **{**self.common, **kwargs})

    def size(self, leaf: str) -> tuple[int, int]:
        """(d_in, d_out) of a leaf."""
        size = leaf_size(self.modules[leaf])
        assert size is not None
        return size
