"""The config of sparse fine-tuning."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from hf_peft_ext.attach.config import RegisteredConfig, layer_list
from hf_peft_ext.validation.checks import check, check_count, check_positive, check_seed, is_number

Selection = Literal["fisher", "lottery_ticket", "diff", "random"]


@dataclass
class SparseConfig(RegisteredConfig):
    """Train k entries of the base model's parameters; the adapter holds their indices and differences.

    The entries are the best of all parameters together: weights, biases, norms and embeddings. They are selected once,
    before training, by a trainer of `hf_peft_ext.trainers` or by `select_sparse_parameters`:

    - fisher: FISH mask, Sung et al. 2021 (https://arxiv.org/abs/2111.09839). The largest mean squared gradients on
      `num_samples` examples.
    - lottery_ticket: LT-SFT, Ansell et al. 2022 (https://arxiv.org/abs/2110.07560). All parameters are
      trained first; the k that moved most are rewound and trained again.
    - diff: diff pruning, Guo et al. 2021 (https://arxiv.org/abs/2012.07463), without the structured gates. All
      differences are trained first as z * w, with hard-concrete gates z and an L0 penalty; the k largest stay, with
      their values, and are trained further.
    - random: uniform, by `seed`; selected when the adapter is attached.

    Modules with children and parameters of their own, and modules whose weights are read without a call, are left as
    they are. peft's SHiRA has r (m + n) entries in each linear weight, and no others.

    Args:
        selection: how the entries are selected.
        num_values: k; None for `density`.
        density: k as a share of the parameters that may be selected.
        target_modules: modules whose parameters may be selected, as in `peft.LoraConfig`; None for all but the head.
        exclude_modules: modules to leave unchanged, named in the same way.
        layers_to_transform: index or indices of the layers to adapt, encoder before decoder; None for the whole model.
        num_samples: examples for "fisher".
        search_epochs: epochs of the first phase of "lottery_ticket" and "diff"; None for those of the second.
        l1: weight of the mean distance abs(theta - theta_0) in the loss, in the first phase of "lottery_ticket".
        l0: weight of the expected number of entries in the loss, in the first phase of "diff".
        seed: of "random".
        target_size: number of parameters that may be selected. It is set when the adapter is attached, so that an
            adapter is not loaded into another model.

    Raises:
        ValueError: a field is unknown, or its value breaks a rule.
    """

    method = "sparse"

    selection: Selection = field(default="fisher", metadata={"help": "How the entries are selected."})
    num_values: int | None = field(default=None, metadata={"help": "Number of entries; None for `density`."})
    density: float = field(default=0.005, metadata={"help": "Share of the parameters."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules with entries to select."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave unchanged."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    num_samples: int = field(default=1024, metadata={"help": 'Examples for "fisher".'})
    search_epochs: float | None = field(default=None, metadata={"help": "Epochs of the first phase."})
    l1: float = field(default=0.0, metadata={"help": 'L1 penalty of "lottery_ticket".'})
    l0: float = field(default=1.25e-7, metadata={"help": 'L0 penalty of "diff".'})
    seed: int = field(default=0, metadata={"help": 'Seed of "random".'})
    target_size: int | None = field(default=None, metadata={"help": "Number of parameters, set when attached."})

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = get_args(Selection)
        check("selection", self.selection, self.selection in choices, f"must be one of {', '.join(choices)}")
        if self.num_values is not None:
            check_count("num_values", self.num_values)
        is_share = is_number(self.density) and 0 < self.density < 1
        check("density", self.density, is_share, "must be a share between 0 and 1")
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        self.layers_to_transform = layer_list(self.layers_to_transform)
        check_count("num_samples", self.num_samples)
        if self.search_epochs is not None:
            check_positive("search_epochs", self.search_epochs)
        for name in ("l1", "l0"):
            value = getattr(self, name)
            check(name, value, is_number(value) and value >= 0, "must be a number of 0 or more")
        check_seed(self.seed)

    def count(self, size: int) -> int:
        """k, for `size` parameters that may be selected.

        Raises:
            ValueError: there are fewer parameters, or the adapter was saved from another model.
        """
        saved = self.target_size
        check("target_size", saved, saved in (None, size), f"must be {size}, as in this model")
        k = self.num_values or max(1, round(self.density * size))
        check("num_values", k, k <= size, f"must be at most {size}, the number of parameters")
        return k
