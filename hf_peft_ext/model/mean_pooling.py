"""A text classifier on the mean of the last hidden states."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from hf_peft_ext.validation.checks import check

DROPOUTS = ("classifier_dropout", "hidden_dropout_prob", "dropout")  # names in configs, the first that has a value
WIDTHS = ("word_embed_proj_dim", "hidden_size")  # of the last hidden states, the first that has a value


class MeanPooling(nn.Module):
    """W dropout(m) + b, m the mean of the hidden states over the tokens that are no padding.

    The mean is computed in float32.

    Args:
        d: width of the hidden states.
        num_labels: number of logits.
        dropout: of the mean.
    """

    def __init__(self, d: int, num_labels: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(d, num_labels)  # peft trains and saves modules of this name

    def forward(
        self,
        hidden: Tensor,  # shape: (batch, length, d)
        mask: Tensor | None,  # shape: (batch, length), or longer: a prefix in a cache has no hidden states
    ) -> Tensor:  # shape: (batch, num_labels)
        """The logits.

        Raises:
            ValueError: the mask has another shape.
        """
        if mask is None:
            mask = hidden.new_ones(hidden.shape[:2])
        if mask.ndim != 2 or mask.shape[1] < hidden.shape[1]:
            expected = f"(batch, length) = {tuple(hidden.shape[:2])}"
            raise ValueError(f"`attention_mask` has the shape {tuple(mask.shape)}, and must have {expected}.")
        weight = mask[:, -hidden.shape[1] :, None].to(hidden.device).float()  # (batch, length, 1)
        mean = (hidden.float() * weight).sum(1) / weight.sum(1).clamp_min(1)
        return self.classifier(self.dropout(mean.to(hidden.dtype)))


class MeanPoolingForSequenceClassification(PreTrainedModel):
    """A classifier or regression on the mean of a text model's last hidden states, padding not counted.

    Most of transformers' classifiers of encoders read the first token. Models for sentence embeddings are often
    trained to be read by the mean, Reimers and Gurevych 2019 (https://arxiv.org/abs/1908.10084, section 3). A pooler
    of the text model is left out.

    It is loaded like transformers' own, from any checkpoint of the text model, and `num_labels`, `id2label` and
    `problem_type` are those of its config:

        model = MeanPoolingForSequenceClassification.from_pretrained("intfloat/e5-small-v2", num_labels=8)

    With a `task_type` of SEQ_CLS peft trains and saves its head, `mean_pooling.classifier`, which no class of
    transformers takes for its own.

    Raises:
        ValueError: the config is of an encoder-decoder, the code of the text model is not in transformers, or the
            model is called with a mask that is not of the shape (batch, length).
    """

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
        d = first_value(config.get_text_config(), WIDTHS)
        self.mean_pooling = MeanPooling(d, self.num_labels, first_value(config, DROPOUTS) or 0.0)
        self.post_init()

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, trust_remote_code: bool | None = None, **kwargs: Any
    ) -> "MeanPoolingForSequenceClassification":
        """A model with random weights, as transformers' auto classes make it."""
        check_remote_code(trust_remote_code)
        return cls._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls, *args: Any, trust_remote_code: bool | None = None, **kwargs: Any
    ) -> "MeanPoolingForSequenceClassification":
        """Load a checkpoint of the text model, or of this class, with the arguments of transformers' auto classes."""
        check_remote_code(trust_remote_code)
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: the text model is transformers' own, and its checkpoints are converted as if this class were, too."""
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: shape (batch, length).
            attention_mask: 0 at padding, shape (batch, length); None if there is none.
            token_type_ids, position_ids, inputs_embeds, past_key_values, kwargs: of the text model.
            labels: classes, shape (batch,); or numbers, or one number for each class, as in transformers.

        Returns:
            The loss if there are labels, logits of shape (batch, `num_labels`), and what the text model was asked for.
        """
        optional = {
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        kwargs["return_dict"] = True
        outputs = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **given, **kwargs)
        logits = self.mean_pooling(outputs.last_hidden_state, attention_mask)
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
        )


def first_value(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    """The first of these fields that a config has, and that is not None; None if there is none."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def check_remote_code(trust_remote_code: bool | None) -> None:
    """Refuse a text model whose code is not in transformers.

    Raises:
        ValueError: it is one.
    """
    rule = "must not be set: the code of the text model must be in transformers"
    check("trust_remote_code", trust_remote_code, not trust_remote_code, rule)
