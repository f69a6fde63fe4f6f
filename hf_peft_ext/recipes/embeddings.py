"""Recipes of embedding models: their data, loss and evaluator, and how they are loaded, by sentence-transformers."""

import math
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from hf_peft_ext.recipes.dataset_config import DatasetArguments
from hf_peft_ext.recipes.recipe_source import RecipeError, optional
from hf_peft_ext.validation.checks import check, check_count

PACKAGE_AND_EXTRA = ("sentence_transformers", "embeddings")
# metrics of sentence-transformers' evaluators, which compute them
RETRIEVAL: dict[str, Any] = dict.fromkeys(
    (
        "cosine_ndcg@10",
        "cosine_mrr@10",
        "cosine_map@100",
        "cosine_accuracy@1",
        "cosine_precision@10",
        "cosine_recall@10",
    )
)
SIMILARITY: dict[str, Any] = dict.fromkeys(("pearson_cosine", "spearman_cosine"))


@dataclass
class EmbeddingData(DatasetArguments):
    """Data of FEATURE_EXTRACTION: pairs of texts that belong together, or pairs with the similarity of each.

    Args:
        anchor_column: column of the first texts; the queries of an evaluation.
        positive_column: column of the second texts; an evaluation searches them for those of the query.
        negative_column: column of texts that do not belong to the first; also searched.
        score_column: column of similarities in [-1, 1], which the cosine learns.
        max_length: longer texts are cut to so many tokens; None for the model's own limit.
    """

    anchor_column: str = "anchor"
    positive_column: str = "positive"
    negative_column: str | None = None
    score_column: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "must be left out beside `score_column`"
        check("negative_column", self.negative_column, None in (self.negative_column, self.score_column), rule)
        if self.max_length is not None:
            check_count("max_length", self.max_length)

    def names(self) -> dict[str, str]:
        """Column -> its name for sentence-transformers, in the order of its losses."""
        columns = (self.anchor_column, self.positive_column, self.negative_column, self.score_column)
        return {
            column: name
            for column, name in zip(columns, ("anchor", "positive", "negative", "score"), strict=True)
            if column
        }

    def columns(self) -> list[str]:
        """The columns that are read."""
        return list(self.names())

    def encode(self, rows: Any, tokenizer: Any, labels: list[str]) -> Any:
        """The columns under sentence-transformers' names; its trainer makes tokens of them.

        Raises:
            RecipeError: a score is no number in [-1, 1].
        """
        names = self.names()
        for i, score in enumerate(rows[self.score_column] if self.score_column else ()):
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            if not is_number or not math.isfinite(score) or abs(score) > 1:
                rule = f"must hold numbers in [-1, 1], as a cosine; row {i} has {score!r}"
                raise RecipeError(f"`data.score_column` (={self.score_column!r}) {rule}.")
        return rows.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})


class EmbeddingModel:
    """Loads a SentenceTransformer, as an auto class of transformers loads its models."""

    @staticmethod
    def from_pretrained(source: str, revision: str | None = None, **kwargs: Any) -> Any:
        """Load a model.

        Args:
            source: Hub id or folder. Without sentence-transformers' files the embedding is the mean over tokens.
            revision: branch, tag or commit on the Hub.
            kwargs: for the transformers model inside.
        """
        device = None if "device_map" in kwargs else str(PartialState().device)
        cls = optional(*PACKAGE_AND_EXTRA).SentenceTransformer
        return cls(source, revision=revision, device=device, model_kwargs=kwargs)


def embedding_options(model: Any, data: EmbeddingData, evaluated: Any) -> dict[str, Any]:
    """The loss and the evaluator of a trainer, and the model's own tokenizer, which has its `max_seq_length`.

    Pairs are trained by InfoNCE with the other rows of the batch as negatives (MultipleNegativesRankingLoss), and
    scores by the squared error of the cosine (CosineSimilarityLoss).

    Args:
        model: the SentenceTransformer, whose `max_seq_length` is set.
        data: the recipe's data.
        evaluated: rows to evaluate on, from `data.encode`; None for no evaluator.
    """
    losses = optional(f"{PACKAGE_AND_EXTRA[0]}.sentence_transformer.losses", PACKAGE_AND_EXTRA[1])
    if data.max_length is not None:
        model.max_seq_length = data.max_length
    loss = (losses.CosineSimilarityLoss if data.score_column else losses.MultipleNegativesRankingLoss)(model)
    evaluator = None if evaluated is None else similarity(evaluated) if data.score_column else retrieval(evaluated)
    return {"loss": loss, "evaluator": evaluator, "processing_class": model.tokenizer}


def retrieval(rows: Any) -> Any:
    """An evaluator that searches all second texts, and the negatives, for those that a query has in the rows."""
    evaluation = optional(f"{PACKAGE_AND_EXTRA[0]}.sentence_transformer.evaluation", PACKAGE_AND_EXTRA[1])
    negatives = rows["negative"] if "negative" in rows.column_names else []
    queries, texts = ({text: str(i) for i, text in enumerate(dict.fromkeys(part))} for part in (
        rows["anchor"], [*rows["positive"], *negatives]
    ))  # fmt: skip
    relevant: dict[str, set[str]] = {id_: set() for id_ in queries.values()}
    for anchor, positive in zip(rows["anchor"], rows["positive"], strict=True):
        relevant[queries[anchor]].add(texts[positive])
    return evaluation.InformationRetrievalEvaluator(
        {id_: text for text, id_ in queries.items()}, {id_: text for text, id_ in texts.items()}, relevant,
        accuracy_at_k=[1], precision_recall_at_k=[10], write_csv=False,
        score_functions={"cosine": optional(f"{PACKAGE_AND_EXTRA[0]}.util", PACKAGE_AND_EXTRA[1]).cos_sim},
    )  # fmt: skip


def similarity(rows: Any) -> Any:
    """An evaluator of the correlation between the cosines of the pairs and their scores."""
    evaluation = optional(f"{PACKAGE_AND_EXTRA[0]}.sentence_transformer.evaluation", PACKAGE_AND_EXTRA[1])
    columns = (list(rows[name]) for name in ("anchor", "positive", "score"))
    return evaluation.EmbeddingSimilarityEvaluator(*columns, similarity_fn_names=["cosine"], write_csv=False)
