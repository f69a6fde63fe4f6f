"""sentence-transformers' trainer of embedding models, for adapters."""

from pathlib import Path
from typing import Any, cast

from peft import PeftModel

try:
    from sentence_transformers import SentenceTransformerTrainer
except ImportError as error:
    raise ImportError(
        "AdapterEmbeddingTrainer needs sentence-transformers: pip install 'hf_peft_ext[embeddings]'"
    ) from error

from hf_peft_ext.hub_cards.peft_integration import without_stock_card
from hf_peft_ext.model.sentence_transformer import transformer_module
from hf_peft_ext.trainers.mixin import AdapterTrainerMixin

TEXT_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


class AdapterEmbeddingTrainer(AdapterTrainerMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` for an adapter of the transformers model inside a SentenceTransformer.

    See `AdapterTrainerMixin` for what it adds. A saved folder has the adapter and the files that
    `SentenceTransformer(folder)` needs, and this package's card in place of sentence-transformers'.
    """

    _name = "SentenceTransformer"
    _tags = ("sentence-transformers",)

    @property
    def peft_model(self) -> PeftModel:
        """The transformers model with its adapter."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return cast(PeftModel, transformer_module(model).model)

    def gate_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tokens of the first column of texts."""
        features = self.collect_features(inputs)[0][0]
        return {name: value for name, value in features.items() if name in TEXT_COLUMNS}

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Nothing: the record of this package has what the card shows."""

    def _save_weights(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with without_stock_card(self.peft_model):
            model.save_pretrained(str(folder), create_model_card=False)
