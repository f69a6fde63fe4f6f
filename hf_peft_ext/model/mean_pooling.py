"""A text classifier on the mean of the last hidden states."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from hf_peft_ext.validation.checks import check

DROPOUTS = ("classifier_dropout", "hidden_dropout_prob", "dropout")  # names in configs, the first that has a value


class MeanPoolingForSequenceClassification(PreTrainedModel):
    """A classifier or regression on the mean of a text model's last hidden states, over the tokens that are no padding.

    transformers' classifiers of encoders read the first token. Models for sentence embeddings are trained to be read
    by the mean, Reimers and Gurevych 2019 (https://arxiv.org/abs/1908.10084, section 3). A linear layer reads it,
    after dropout; a pooler of the base model is left out.

    It is loaded like transformers' own, from any checkpoint of the text model, and `num_labels`, `id2label` and
    `problem_type` are those of its config:

        model = MeanPoolingForSequenceClassification.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", num_labels=8)

    The linear layer is called `mean_classifier`, so that no other classifier takes it for its own. peft trains and
    saves it with a `task_type` of SEQ_CLS.

    Raises:
        ValueError: the config is of an encoder-decoder, or the model is called with a mask that is not of the shape
            (batch, length).
    """  # noqa: E501

    config_class: Any = AutoConfig
    accepts_loss_kwargs = False  # the loss is the mean over a batch
    supports_gradient_checkpointing = True
    # The text model, which is made first, refuses kernels that it does not support.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: PreTrainedConfig):
        rule = "must be of an encoder or a decoder: an encoder-decoder has two sequences of hidden states"
        check("config", config.model_type, not config.is_encoder_decoder, rule)
        text_model = AutoModel.from_config(config)
        super().__init__(config)
        self.base_model_prefix = text_model.base_model_prefix or "model"
        self.supports_gradient_checkpointing = text_model.supports_gradient_checkpointing
        if getattr(text_model, "pooler", None) is not None:
            text_model.pooler = nn.Identity()  # None is not possible in all models
        setattr(self, self.base_model_prefix, text_model)
        self.num_labels: Any = config.num_labels
        self.dropout = nn.Dropout(
            next((p for name in DROPOUTS if (p := getattr(config, name, None)) is not None), 0.0)
        )
        self.mean_classifier = nn.Linear(config.get_text_config().hidden_size, self.num_labels)
        self.post_init()

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> "MeanPoolingForSequenceClassification":
        """A model with random weights, as transformers' auto classes make it."""
        return cls._from_config(config, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: shape (batch, length).
            attention_mask: 0 at padding, shape (batch, length); None if there is none.
            token_type_ids, position_ids, inputs_embeds, kwargs: of the text model.
            labels: classes, shape (batch,); or numbers, or one number for each class, as in transformers.

        Returns:
            The loss if there are labels, logits of shape (batch, `num_labels`), and what the text model was asked for.
        """
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        given = {name: value for name, value in optional.items() if value is not None}
        outputs = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **given, **kwargs)
        pooled = masked_mean(outputs.last_hidden_state, attention_mask)
        logits = self.mean_classifier(self.dropout(pooled))
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
        )


def masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that are no padding, computed in float32; shapes: (batch, length, d) -> (batch, d).

    Raises:
        ValueError: the mask has another shape than (batch, length).
    """
    if mask is None:
        return hidden.float().mean(1).to(hidden.dtype)
    check("attention_mask", f"of shape {tuple(mask.shape)}", mask.ndim == 2, "must be of shape (batch, length)")
    weights = mask[:, -hidden.shape[1] :, None].float()  # a prefix of `past_key_values` has no hidden states
    return ((hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)).to(hidden.dtype)
