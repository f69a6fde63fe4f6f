"""The delta bridge: a thin copy that only carries what the module changes, while the large model itself does the rest.

The large model runs forward, without gradients. In the thin copy a leaf then gives not W' x but

    y = y_large[rows kept] + W' (x - x_ref),

where x_ref is what the leaf reads when nothing is changed, and a norm divides by the norm of the large model's whole
stream. So where nothing is changed the thin copy *is* the large model, its logits included, and what the module
changes goes on through slices of the large model's own weights, from which the module has its gradient.

`around` says what counts as unchanged:

    "plugged"  the large model with the module as it is. x_ref is x itself, cut off from the gradient: the loss is that
               of the plugged model, exactly and at every step; only its gradient goes the thin way.
    "base"     the large model without the module. What it changes is carried by the thin copy, in values too, which
               drift away from the plugged model's as the module grows.

The module reads the whole of what it reads in the large model; of what it writes, the thin copy sees the channels that
it has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.layer import hidden_states
from hf_peft_ext.model.modes import preserve_requires_grad
from hf_peft_ext.model.sites import Site
from hf_peft_ext.model.structure import covers, innermost, is_norm, leaf_size, own_modules
from hf_peft_ext.pruning import PrunedModel
from hf_peft_ext.transfer.bridges.activations import check_weights
from hf_peft_ext.transfer.bridges.bridge import bridge, kept_channels
from hf_peft_ext.transfer.map.adapter_tensors import SEEN, Part, parts_of
from hf_peft_ext.transfer.map.projections import RESIDUAL
from hf_peft_ext.validation.checks import check

Around = Literal["plugged", "base"]


@contextmanager
def delta_bridge(plugged: PeftModel, thin: PrunedModel, around: Around = "plugged") -> Iterator[PeftModel]:
    """The thin copy with the plugged module, held to the large model. Training it trains the plugged one.

        with delta_bridge(plugged, pruned_copy(large, 4)) as model:
            task.loss(model, rows).backward()

    It is called as the large model is and gives its logits, in evaluation mode, which both are put into. Only the
    module is trained: the slices are the large model's own weights. Behind the `with` the large model is as it was.

    Args:
        plugged: what `plug` returned, or any large model with a LoRA or an adapter of this package. It is run by each
            forward of the bridge, without gradients.
        thin: the thin copy of its base model (`pruning.pruned_copy`), as it was cut.
        around: the large model with the module as it is ("plugged") or without it ("base").

    Raises:
        ValueError: `around` is unknown, the thin copy is not of this large model, or that has no weights.
    """
    check("around", around, around in get_args(Around), f"must be one of {', '.join(get_args(Around))}")
    check_weights("plugged", plugged.get_base_model(), "a delta bridge runs it")
    model = bridge(plugged, thin, train_bridge=False)
    if hasattr(thin.model, "model_dim"):  # T5 divides by its root in front of a tied head
        thin.model.model_dim = plugged.get_base_model().model_dim  # pyright: ignore
    anchors = Anchors(plugged.eval(), model.eval(), thin, around)
    try:
        yield model
    finally:
        anchors.remove()


class Anchors:
    """The hooks that hold a thin copy to the large model.

    Args:
        plugged: the large model.
        model: the thin copy with the module's tensors.
        thin: the same copy, and what it kept.
        around: see above.
    """

    def __init__(self, plugged: PeftModel, model: PeftModel, thin: PrunedModel, around: Around):
        self.plugged, self.model, self.thin, self.around = plugged, model, thin, around
        self.large: Any = plugged.get_base_model()
        self.residual = thin.kept[RESIDUAL]
        self.seen: dict[str, Any] = {}  # path -> what the large model had there in this forward
        self.ref: dict[str, Tensor] | None = None  # path -> what the thin copy had where nothing was changed
        self.recording = False
        self.handles: list[RemovableHandle] = []
        self.norms: list[WholeNorm] = []
        copy: Any = model.get_base_model()
        self.handles.append(copy.register_forward_pre_hook(self.run_large, with_kwargs=True))
        larges, thins = dict(own_leaves(self.large)), dict(own_leaves(copy))
        whole = tuple(part.host for part in parts_of(plugged) if part.layer < 0)  # trained, not held
        for path, leaf in thins.items():
            if not covers(whole, path):
                self.anchor(path, larges[path], leaf)
        sources = {part.key: part for part in parts_of(plugged)}
        parts = {part.key: part for part in parts_of(model)}
        for key, part in parts.items():
            self.read_whole(part, sources[key], parts)

    def run_large(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the thin copy runs: the large one, and for "base" the thin copy with nothing changed."""
        for norm in self.norms:
            norm.calls = 0
        if self.recording:
            return
        for norm in self.norms:
            norm.measured.clear()
        self.seen.clear()
        self.ref = None
        with torch.no_grad(), preserve_requires_grad(self.plugged), preserve_requires_grad(self.model):
            if self.around == "plugged":
                self.large(*args, **kwargs)
                return
            with self.plugged.disable_adapter():
                self.large(*args, **kwargs)
            self.recording, self.ref = True, {}
            try:
                with self.model.disable_adapter():
                    module(*args, **kwargs)
            finally:
                self.recording = False
            for norm in self.norms:
                norm.calls = 0

    def remove(self) -> None:
        """Leave both models to themselves."""
        for handle in self.handles:
            handle.remove()
        for norm in self.norms:
            norm.remove()
        self.seen.clear()

    def anchor(self, path: str, large: nn.Module, thin: nn.Module) -> None:
        """Hold a leaf, or a norm along the stream, to the large model's."""
        if leaf_size(thin):
            rows = self.thin.rows_of(path)

            def note(_: nn.Module, args: Any, output: Tensor) -> None:
                self.seen[path] = output if rows is None else output[..., rows.to(output.device)]

            def hold(_: nn.Module, args: Any, output: Tensor) -> Tensor:
                return self.seen[path] + output - self.reference(path, output)

            self.handles += [large.register_forward_hook(note), thin.register_forward_hook(hold)]
        elif is_norm(thin) and len(thin.weight) == len(self.residual) < len(large.weight):  # pyright: ignore
            self.norms.append(WholeNorm(large, thin, self.residual))

    def reference(self, key: str, value: Tensor) -> Tensor:
        """The value where nothing is changed."""
        if self.recording:
            assert self.ref is not None
            self.ref[key] = value
            return value
        return value.detach() if self.ref is None else self.ref[key]

    def read_whole(self, part: Part, source: Part, parts: dict[Any, Part]) -> None:
        """Let a tensor that reads the model read all of what it reads there, and not only the channels kept."""
        if not any(axis.side == "read" for axis in part.axes):
            return
        key = f"{part.host} {part.tensor}"

        def note(x: Tensor) -> None:
            self.seen[key] = x

        if isinstance(part.owner, nn.Linear) and part.site is None:  # LoRA's A, a head: leaves that are called

            def noted(_: nn.Module, args: Any) -> None:
                if self.recording:
                    self.reference(key, args[0])

            def whole(leaf: Any, args: Any, output: Tensor) -> Tensor:
                ref = args[0].detach() if self.ref is None else self.ref[key]
                return output + F.linear(self.seen[key], source.value) - F.linear(ref, leaf.weight)

            host = self.model.get_base_model().get_submodule(part.host)
            self.handles += [host.register_forward_pre_hook(noted), part.owner.register_forward_hook(whole)]
            self.handles.append(
                self.large.get_submodule(part.host).register_forward_pre_hook(lambda _, args: note(args[0]))
            )
        elif (
            part.site is not None
            and (bias := replace(part, tensor=part.tensor.replace("weight", "bias"))).key in parts
        ):
            kept = kept_channels(self.thin)[RESIDUAL, None]

            def unseen(_: nn.Module, args: Any, output: Tensor) -> Tensor:  # shape: (batch, length, r)
                x = self.seen[key]
                return output + F.linear(x, source.value) - F.linear(x[..., kept.to(x.device)], part.value)

            # what the code has of the other channels is, to the thin copy, a bias that each token has of its own
            owner = parts[bias.key].owner
            self.handles.append(owner.get_submodule(SEEN + "bias").register_forward_hook(unseen))
            self.handles.append(watch(self.large, part.site, note))


def watch(model: nn.Module, site: Site, note: Callable[[Tensor], None]) -> RemovableHandle:
    """Have what a sub-layer at this site reads noted, whether it acts or not."""
    if site.act in ("output", "norm"):

        def after(_: nn.Module, args: Any, output: Any) -> None:
            note(output[0] if isinstance(output, tuple) else output)

        return model.get_submodule(site.host).register_forward_hook(after, prepend=True)
    return model.get_submodule(site.reads or site.host).register_forward_pre_hook(
        lambda _, args, kwargs: note(hidden_states(args, kwargs)), with_kwargs=True
    )


class WholeNorm:
    """A norm over all channels of the large model's stream, of which the thin copy has and changes some.

    With c = x - mu over the kept channels, and R_1, R_2 the sums of c and c^2 over the others in the large model:
    y = gain (c - m) / sqrt((sum c^2 + R_2) / d - m^2 + eps) + bias, m = (sum c + R_1) / d. An RMS norm has mu = m = 0.

    It takes the place of `forward`, not of a hook: a Pfeiffer adapter calls the norm's forward a second time. In the
    thin copy the n-th call goes by what the large model had in its n-th, or in its last.
    """

    def __init__(self, large: Any, thin: Any, kept: Tensor):
        self.large, self.thin, self.d, self.kept, self.eps = large, thin, len(large.weight), kept, eps_of(large)
        self.centred = isinstance(large, nn.LayerNorm)
        self.measured: list[tuple[Tensor, Tensor, Tensor]] = []
        self.calls = 0
        if self.centred:
            self.gain, self.bias = thin.weight, thin.bias
        else:  # some add one to their weight: what they make of ones tells the gain
            with torch.no_grad():
                self.gain, self.bias = thin(torch.ones_like(thin.weight)) * (1 + self.eps) ** 0.5, None
        self.plain = large.forward
        large.forward, thin.forward = self.measure, self.divide

    def remove(self) -> None:
        del self.large.forward, self.thin.forward

    def measure(self, x: Tensor) -> Tensor:
        """What the large norm does, noting mu, R_1 and R_2 of each token, shapes: (*batch, 1)."""
        wide = x.float()
        mu = wide.mean(-1, keepdim=True) if self.centred else wide.new_zeros(*x.shape[:-1], 1)
        c = wide - mu
        kept = c[..., self.kept.to(x.device)]
        r_2 = c.square().sum(-1, keepdim=True) - kept.square().sum(-1, keepdim=True)
        self.measured.append((mu, c.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True), r_2))
        return self.plain(x)

    def divide(self, x: Tensor) -> Tensor:
        mu, r_1, r_2 = self.measured[min(self.calls, len(self.measured) - 1)]
        self.calls += 1
        c = x.float() - mu
        m = (c.sum(-1, keepdim=True) + r_1) / self.d if self.centred else 0.0
        mean_square = (c.square().sum(-1, keepdim=True) + r_2) / self.d
        y = self.gain * ((c - m) * (mean_square - m * m + self.eps).rsqrt())
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def eps_of(norm: Any) -> float:
    return next(getattr(norm, name) for name in ("eps", "variance_epsilon", "layer_norm_eps") if hasattr(norm, name))


def own_leaves(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear leaves and norms by the paths of the model without tuners."""
    for path, module in own_modules(model):
        if path and (leaf_size(module) or is_norm(module)):
            yield path, innermost(module)
