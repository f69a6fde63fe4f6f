"""Sizes of the bridge of plug-in transfer under both readings of its factor r, beside the paper's Table 2.

The text of Jin et al. 2023 divides rows and columns by r; its table shows models of 1 / r of the parameters. The sizes
are computed from configs; nothing is downloaded or built. Heads are kept whole, so the width of GPT-2 XL becomes
6 x 64 = 384 instead of 400.

    python examples/benchmarks/bridge_sizes.py
    python examples/benchmarks/bridge_sizes.py --r 8
"""

import math
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, HfArgumentParser, PreTrainedConfig, T5Config

from hf_peft_ext.pruning import pruned_sizes


@dataclass
class Arguments:
    """Options of the command."""

    r: float = field(default=16.0, metadata={"help": "The reduction factor; the paper's table has 16."})


@dataclass(frozen=True)
class Pair:
    """A row of the paper's Table 2, in millions of parameters, and the large model's config."""

    name: str
    small: int
    large: int
    bridge: int
    config: PreTrainedConfig


PAIRS = [
    Pair("GPT-2 XL", 117, 1542, 96, GPT2Config(n_embd=1600, n_layer=48, n_head=25)),
    Pair("T5-3B", 220, 2800, 185, T5Config(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32)),
    Pair("T5-11B", 770, 11000, 688, T5Config(d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128)),
]
PAPER_R = 16


def main() -> None:
    (arguments,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    table = Table(title=f"Parameters in millions, r = {arguments.r:g}")
    for column in (
        "large model",
        "reading",
        "width",
        "heads",
        "inner width",
        "with emb.",
        "without",
        "paper",
        "ratio",
    ):
        table.add_column(column, justify="left" if column in ("large model", "reading") else "right")
    ratios: dict[str, list[float]] = {"width": [], "parameters": []}
    for pair in PAIRS:
        whole = pruned_sizes(pair.config, 1)
        table.add_row(pair.name, "untouched", *shape(whole.config), *millions(whole.parameters, whole.embeddings),
                      str(pair.large), f"{whole.parameters / 1e6 / pair.large:.2f}")  # fmt: skip
        for reading in ("width", "parameters"):
            pruned = pruned_sizes(pair.config, arguments.r, reading)
            ratio = pruned.parameters / 1e6 / pair.bridge
            ratios[reading].append(ratio)
            paper = (str(pair.bridge), f"{ratio:.2f}") if arguments.r == PAPER_R else ("", "")
            table.add_row("", reading, *shape(pruned.config), *millions(pruned.parameters, pruned.embeddings), *paper)
        table.add_section()
    console = Console()
    console.print(table)
    for pair in PAIRS:
        console.print(f"{pair.name}: the paper's {pair.bridge}M is {pair.large}M / {pair.large / pair.bridge:.2f}.")
    if arguments.r == PAPER_R:
        off = {
            reading: math.exp(sum(abs(math.log(x)) for x in found) / len(found)) for reading, found in ratios.items()
        }
        near = min(off, key=lambda reading: off[reading])
        console.print(
            f'The reading "{near}" comes near: off by a factor of {off[near]:.2f} on average (geometric mean), '
            + ", ".join(f'"{reading}" by {factor:.1f}' for reading, factor in off.items() if reading != near)
            + "."
        )


def shape(config: PreTrainedConfig) -> tuple[str, str, str]:
    inner = getattr(config, "d_ff", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return str(config.hidden_size), str(config.num_attention_heads), str(inner)


def millions(parameters: int, embeddings: int) -> tuple[str, str]:
    return f"{parameters / 1e6:.1f}", f"{(parameters - embeddings) / 1e6:.1f}"


if __name__ == "__main__":
    main()
