"""The config of intrinsic dimension: how many numbers are trained, and how they are projected."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from hf_peft_ext.attach.config import RegisteredConfig, layer_list
from hf_peft_ext.tuners.intrinsic.projections import ProjectionKind
from hf_peft_ext.validation.checks import check, check_count, check_seed

Variant = Literal["global", "layer", "tensor"]
MAX_D = 2**20  # the largest number that a config may have to be loaded


@dataclass
class IntrinsicConfig(RegisteredConfig):
    """Train d numbers: theta = theta_0 + P theta_d, for a random projection P onto all parameters of the model.

    Li et al. 2018 (https://arxiv.org/abs/1804.08838): the smallest d with 90 % of the score of full fine-tuning is
    the intrinsic dimension of a task (`measure_intrinsic_dimension`). Aghajanyan et al. 2021
    (https://arxiv.org/abs/2012.13255) add a trained scale lambda_i for each layer, SAID: theta_i = theta_0,i +
    lambda_i P_i theta_d.

    - All floating-point parameters are adapted, embeddings and norms included, but for `modules_to_save` and an output
      head that is not tied to the embeddings. Tied weights get the same update.
    - P has columns of length sqrt(D / d) for D adapted parameters, where the papers' have length 1. So a learning rate
      suits all d; one near that of full fine-tuning, or a few times as large, is a good start.
    - The file holds d numbers. P is drawn from `seed` and the names of the parameters.
    - The untrained adapter is the base model: theta_d = 0 and lambda = 1.
    - A forward adds P theta_d to each weight, so that a quantized model is refused. In half precision the sums are
      rounded, as those of a merged LoRA are.

    Args:
        d: how many numbers are trained; the scales of "layer" and "tensor" are among them.
        variant: "global" for none (DID), or a scale for each "layer" or "tensor" (SAID). Outside of numbered layers,
            each module is a layer.
        projection: P: "fastfood", O(D log d) in time and O(D) in memory for D adapted parameters; or, for small
            models, "dense" or "sparse" random matrices.
        seed: seed of P.
        target_modules: modules whose own parameters are adapted: a regular expression, a list of endings, or
            "all-linear"; None for all.
        exclude_modules: modules to leave unchanged, named in the same way.
        layers_to_transform: index or indices of the layers to adapt, encoder before decoder; None for all, and for the
            parameters outside of layers.
        trainable_token_indices: must be None: embeddings are among the adapted parameters.

    Raises:
        ValueError: a field is unknown, or its value breaks a rule.
    """

    method = "intrinsic"

    d: int = field(default=1000, metadata={"help": "How many numbers are trained."})
    variant: Variant = field(default="global", metadata={"help": "A scale for each layer or tensor, or none."})
    projection: ProjectionKind = field(default="fastfood", metadata={"help": "The kind of random projection."})
    seed: int = field(default=0, metadata={"help": "Seed of the projection."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave unchanged."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("d", self.d)
        check("d", self.d, self.d <= MAX_D, f"must be at most {MAX_D}")
        for name, kind in (("variant", Variant), ("projection", ProjectionKind)):
            value = getattr(self, name)
            check(name, value, value in get_args(kind), f"must be one of {', '.join(get_args(kind))}")
        check_seed(self.seed)
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        self.layers_to_transform = layer_list(self.layers_to_transform)
        rule = "must be None: embeddings are among the adapted parameters"
        check("trainable_token_indices", self.trainable_token_indices, not self.trainable_token_indices, rule)
