"""Training arguments with the recipe of T-Few."""

from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments

from hf_peft_ext.ranking.classifier import Normalization
from hf_peft_ext.ranking.losses import Averaging
from hf_peft_ext.validation.checks import check, check_count, is_number


@dataclass
class TFewTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the recipe of T-Few as defaults, and the settings of its losses.

    Liu et al. 2022 (https://arxiv.org/abs/2205.05638), section 3.5 and the paper's code: 1,000 steps of 8 examples
    with Adafactor; a learning rate of 3e-3 with a linear warm-up over 6 % of the steps and a linear decay to 0;
    gradients clipped to norm 1.

    Args:
        max_steps: 1,000; or -1, to train by epochs, if `num_train_epochs` is given.
        scale_parameter: of Adafactor: whether the learning rate is relative to the root mean square of a parameter, as
            in the paper, where it is 1 for the vectors of (IA)^3. Parameters that start at zero, such as half of
            LoRA's, then move at a thousandth of the rate; use False for them (or `optim="adamw_torch"`).
            transformers' own `optim="adafactor"` uses False, whatever `optim_args` says.
        lm_weight, choice_weight, unlikelihood_weight: weights of the losses in `hf_peft_ext.ranking.losses`. With the
            last two at 0, only the right choices are trained (the paper does so for dozens of choices).
        power: exponent of the length that divides a choice's log-probability in the choice loss; 0 for no division.
        epsilon: of the unlikelihood loss; 0.01 in the code of the paper.
        average: "token", over all tokens of a step, as in the code of the paper; or "example", as in its text.
        packed: whether a prompt is encoded once for all its choices, with the same results; None if the model can.
        normalization: of the scores that rank the choices in evaluation, see `hf_peft_ext.score_choices`.
        max_prompt_length, max_choice_length, separator: see `DataCollatorForChoices`. The lengths hold in evaluation
            too; `RankClassifier` and `score_choices` have no limits.

    Raises:
        ValueError: a value is invalid.
    """

    learning_rate: float = field(default=3e-3, metadata={"help": "The highest learning rate."})
    # None until __post_init__, which tells by it what was given
    num_train_epochs: float = field(default=None, metadata={"help": "Epochs, in place of steps."})  # pyright: ignore
    max_steps: int = field(default=None, metadata={"help": "Steps: 1,000 if no epochs are given."})  # pyright: ignore
    warmup_steps: float = field(default=0.06, metadata={"help": "Steps in which the rate rises; below 1, a share."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Examples in a batch of evaluation."})
    optim: str = field(default="adafactor", metadata={"help": "The optimizer."})
    scale_parameter: bool = field(default=True, metadata={"help": "Adafactor's rates are relative to parameters."})
    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the language-modelling loss."})
    choice_weight: float = field(default=1.0, metadata={"help": "Weight of the length-normalised choice loss."})
    unlikelihood_weight: float = field(default=1.0, metadata={"help": "Weight of the unlikelihood loss."})
    power: float = field(default=1.0, metadata={"help": "Of the length, in the choice loss."})
    epsilon: float = field(default=0.0, metadata={"help": "Of the unlikelihood loss."})
    average: Averaging = field(default="token", metadata={"help": "Over the tokens of a step, or by example first."})
    packed: bool | None = field(default=None, metadata={"help": "Read prompts once; None for wherever possible."})
    normalization: Normalization = field(default="token", metadata={"help": "What divides scores in evaluation."})
    max_prompt_length: int | None = field(default=256, metadata={"help": "Tokens of a prompt."})
    max_choice_length: int | None = field(default=256, metadata={"help": "Tokens of a choice."})
    separator: str = field(default=" ", metadata={"help": "Between prompt and choice, in decoders."})

    def __post_init__(self) -> None:
        for name in ("lm_weight", "choice_weight", "unlikelihood_weight", "power", "epsilon"):
            value = getattr(self, name)
            check(name, value, is_number(value) and value >= 0, "must be a number of 0 or more")
        rule = "must not be 0 if `choice_weight` and `unlikelihood_weight` are"
        check("lm_weight", self.lm_weight, bool(self.weights), rule)
        for name, choices in (("average", get_args(Averaging)), ("normalization", get_args(Normalization))):
            check(name, getattr(self, name), getattr(self, name) in choices, f"must be one of {', '.join(choices)}")
        for name in ("max_prompt_length", "max_choice_length"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        rule = "must be 0: the losses of T-Few compare choices, and have no labels to smooth"
        check("label_smoothing_factor", self.label_smoothing_factor, self.label_smoothing_factor == 0, rule)
        self._set_length()
        super().__post_init__()
        rule = "must not hold 'inputs': those of T-Few are prompts and choices, which are not one tensor"
        check("include_for_metrics", self.include_for_metrics, "inputs" not in self.include_for_metrics, rule)
        rule = "must not be True: the choices of an example would be parted from its prompt"
        accelerator: Any = self.accelerator_config  # an AcceleratorConfig, after `super().__post_init__`
        check("dispatch_batches", True, not accelerator.dispatch_batches, rule)

    def _set_length(self) -> None:
        """Train by epochs if those alone were given, else by steps."""
        if self.max_steps is None:
            self.max_steps = 1000 if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0  # transformers' default, which copies of these arguments give beside steps
        by_steps = self.num_train_epochs == 3.0 or self.max_steps <= 0
        rule = f"does nothing beside `max_steps` (={self.max_steps}); leave one of them out"
        check("num_train_epochs", self.num_train_epochs, by_steps, rule)

    @property
    def weights(self) -> dict[str, float]:
        """The weights other than 0, by the name of the loss in the log."""
        weights = {
            "lm_loss": self.lm_weight,
            "choice_loss": self.choice_weight,
            "unlikelihood_loss": self.unlikelihood_weight,
        }
        return {name: weight for name, weight in weights.items() if weight}
