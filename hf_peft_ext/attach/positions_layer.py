"""The tuner layer of interventions, which edit single tokens of a sequence."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.forward_state import FORWARD, cached_tokens, hidden_states
from hf_peft_ext.attach.layer import AddToOutput
from hf_peft_ext.attach.masks import PaddingRecorder
from hf_peft_ext.validation.checks import check


class EditPositions(AddToOutput):
    """y = block(x) becomes y with edited tokens, whose places are counted from the start of the sequence."""

    def hooks(self, model: nn.Module) -> list[RemovableHandle]:
        """As of every layer, and one on the attention module, which is given mask and cache.

        Raises:
            ValueError: the block has no attention, or its rows are no sequences.
        """
        rule = f"must be another one at {self.site.host}: "
        check("sublayer", "intervention", bool(self._attention), rule + "it has no attention, whose mask is read")
        tokens = self.site.tokens
        check("sublayer", "intervention", tokens != "unread", rule + "its padding cannot be read")
        check("sublayer", "intervention", tokens == "examples", rule + "its rows are parts of an example, or several")
        recorder = TokenRecorder(self._attention[0])
        self._mask_key = recorder.key
        return [
            *super().hooks(model),
            self._attention[0].register_forward_pre_hook(recorder, with_kwargs=True),
        ]

    def add(self, y: Tensor, x: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """y with edited tokens."""
        try:
            return super().add(y, x, read)
        finally:
            FORWARD.values.pop(self._mask_key, None)


class TokenRecorder(PaddingRecorder):
    """A hook before an attention module: records which tokens are padding, those in the cache included.

    It hands on a mask of shape (batch or 1, cached tokens + length) twice, or what is no tensor. Tokens that a sliding
    window has dropped from the cache count as no padding.
    """

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__call__(attention, args, kwargs)
        x, (used, _) = hidden_states(args, kwargs), FORWARD.values[self.key]
        tokens = cached_tokens(attention, kwargs) + x.shape[1]
        if used is None:
            used = torch.ones(1, tokens, dtype=torch.bool, device=x.device)
        elif isinstance(used, Tensor) and used.shape[1] < tokens:
            used = F.pad(used, (tokens - used.shape[1], 0), value=True)
        FORWARD.values[self.key] = used, used
