"""Prefixes with a softmax of their own: between the query leaf and the output leaf of an attention module.

They need neither the keys and values of attention nor its mask, so they fit every attention module with these two
leaves, with any kernel and any cache. What they add to a token depends on no other token.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.forward_state import FORWARD, hidden_states, new_key
from hf_peft_ext.attach.hook_order import move_last
from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.attach.masks import UNMASKED


class SeparatePrefix(TunerLayer):
    """softmax(Q K^T) V becomes softmax(Q K^T) V + g softmax(Q P_K^T) P_V.

    The layer is a child of the query leaf. A hook there computes the second term, and a hook at the output leaf adds
    it to that leaf's input.
    """

    rows: Any  # Tensor, the rows of the queries where they are not contiguous in the leaf's output

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        key, output = new_key(self.site.host), model.get_submodule(self.site.output)
        rows = self.site.query_rows
        self._span = contiguous(rows)
        self.register_buffer("rows", None if self._span else rows, persistent=False)
        attend = partial(attend_to_prefix, key, self.name)
        self._query_hook = self.host.register_forward_hook(attend, with_kwargs=True)
        return [self._query_hook, output.register_forward_pre_hook(partial(add_prefix, key))]

    def run_last(self) -> None:
        """Let the hook of the query leaf run after those of low-rank branches and biases, which change the queries."""
        move_last(self.host._forward_hooks, self._query_hook)

    def attended(
        self,
        x: Tensor,  # shape: (batch, length, d)
        q: Tensor,  # shape: (batch, length, width of the query leaf)
    ) -> Tensor | None:  # shape: (batch, length, heads * d_v)
        """The sum over the active adapters; None if there are none."""
        q = q[..., self._span or self.rows.to(q.device)]
        if FORWARD.row_adapters is not None:
            return self.attended_by_row(x, q)
        token_mask, total = FORWARD.values.get(self._mask_key, UNMASKED)[self._mask_index], None
        for sublayer in self.active_here.values():
            o = sublayer.attend(q, x, token_mask)
            total = o if total is None else total + o
        return total

    def attended_by_row(self, x: Tensor, q: Tensor) -> Tensor | None:
        """As `attended`, with its own adapter for each row, and zeros for rows without one."""
        total = None
        for name, rows in self.rows_by_adapter(len(x), x.device):
            o = self.sublayer_of[name].attend(q[rows], x[rows], self.token_mask(rows, len(x)))
            total = o.new_zeros(len(x), *o.shape[1:]) if total is None else total
            total[rows] = o
        return total


def contiguous(rows: Tensor | None) -> slice | None:
    """The indices as a slice, all for None; None if they are not contiguous."""
    if rows is None:
        return slice(None)
    first, n = int(rows[0]), len(rows)
    return slice(first, first + n) if rows.tolist() == [*range(first, first + n)] else None


def attend_to_prefix(
    key: str, name: str, leaf: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], q: Tensor
) -> None:
    """After the query leaf: hand on what the prefix adds to the output of attention."""
    added = getattr(leaf, name).attended(hidden_states(args, kwargs), q)
    if added is None:
        FORWARD.values.pop(key, None)  # of a forward that failed
    else:
        FORWARD.hand_on(key, added)


def add_prefix(key: str, leaf: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before the output leaf: add what was handed on.

    Raises:
        ValueError: the leaf reads another layout of tokens than the query leaf.
    """
    added: Tensor | None = FORWARD.values.pop(key, None)
    if added is None:
        return None
    if added.shape != args[0].shape:
        raise ValueError(
            f"`prefix` (of form 'separate') has shape {tuple(added.shape)}, but the output projection of attention "
            f"reads {tuple(args[0].shape)}; leave the prefix out."
        )
    return args[0] + added.to(args[0].dtype), *args[1:]
