"""A classifier on the mean of BERT's last hidden states, as sentence-transformers' models are trained to be read.

`BertForSequenceClassification` reads the first token. In a model such as MiniLM-L6 that token was never trained to
stand for the text, so that training must first teach attention to gather it there.
"""

from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification


class MeanPooler(nn.Module):
    """The mean over the tokens that are not padding; the classifier sets the mask."""

    mask: Tensor | None = None  # shape: (batch, length)

    def forward(self, hidden: Tensor) -> Tensor:  # shapes: (batch, length, d), (batch, d)
        """The mean."""
        if self.mask is None:
            return hidden.mean(1)
        mask = self.mask.unsqueeze(-1).to(hidden.dtype)  # (batch, length, 1)
        return (hidden * mask).sum(1) / mask.sum(1)


class MeanPooledBert(BertForSequenceClassification):
    """BERT with a classifier on the mean of its last hidden states."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        pooler: Any = MeanPooler()
        self.bert.pooler = pooler

    @wraps(BertForSequenceClassification.forward)  # a trainer reads from its arguments which columns to keep
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        pooler: Any = self.bert.pooler
        pooler.mask = attention_mask
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def read_bert_by_its_mean() -> None:
    """From now on transformers' auto class makes such classifiers of BERT."""
    AutoModelForSequenceClassification.register(BertConfig, MeanPooledBert, exist_ok=True)
