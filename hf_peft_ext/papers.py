"""The papers of the methods, for citations in cards and documentation."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paper:
    """A paper and its citation.

    Args:
        title: its title.
        arxiv: its arXiv identifier, or "".
        bibtex: its BibTeX entry.
        page: its address, if it is not on arXiv.
    """

    title: str
    arxiv: str
    bibtex: str
    page: str = ""

    @property
    def url(self) -> str:
        """The address of the paper: its own page, or arXiv."""
        return self.page or f"https://arxiv.org/abs/{self.arxiv}"


def read_papers(path: Path) -> dict[str, Paper]:
    """The papers in a BibTeX file, by their keys. Its entries are separated by blank lines, with a field a line."""
    papers: dict[str, Paper] = {}
    for entry in path.read_text("utf-8").strip().split("\n\n"):
        if match := re.match(r"@\w+\{(.+),", entry):
            fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, re.MULTILINE))
            papers[match[1]] = Paper(fields["title"], fields.get("eprint", ""), entry, fields.get("url", ""))
    return papers


BY_KEY = read_papers(Path(__file__).with_name("papers.bib"))
HOULSBY = BY_KEY["houlsby2019parameter"]
PFEIFFER = BY_KEY["pfeiffer2021adapterfusion"]
PREFIX_TUNING = BY_KEY["li2021prefix"]
LORA = BY_KEY["hu2022lora"]
BITFIT = BY_KEY["benzaken2022bitfit"]
UNIPELT = BY_KEY["mao2022unipelt"]
COMPACTER = BY_KEY["karimimahabadi2021compacter"]
ADAMIX = BY_KEY["wang2022adamix"]
ATTENTION_FUSION = BY_KEY["cao2022attention"]
MAM = BY_KEY["he2022towards"]
S4 = BY_KEY["chen2023design"]
IA3 = BY_KEY["liu2022few"]
LADDER = BY_KEY["sung2022lst"]
PROMPT_TUNING = BY_KEY["lester2021power"]
FISH_MASK = BY_KEY["sung2021training"]
LT_SFT = BY_KEY["ansell2022composable"]
SPARSE_ADAPTER = BY_KEY["he2022sparseadapter"]
DIFF_PRUNING = BY_KEY["guo2021diff"]
INTRINSIC = BY_KEY["li2018measuring"]
REFT = BY_KEY["wu2024reft"]
SAID = BY_KEY["aghajanyan2021intrinsic"]

# PEFT type, in lower case -> the papers of the method, its own first.
PAPERS: dict[str, tuple[Paper, ...]] = {
    "bottleneck": (HOULSBY, PFEIFFER, MAM),
    "adamix": (ADAMIX,),
    "attention_fusion": (ATTENTION_FUSION, PFEIFFER),
    "compacter": (COMPACTER,),
    "layer_prefix": (PREFIX_TUNING,),
    "bitfit": (BITFIT,),
    "unipelt": (UNIPELT, PFEIFFER, PREFIX_TUNING, LORA),
    "mam": (MAM, PREFIX_TUNING),
    "s4": (S4, PFEIFFER, PREFIX_TUNING, LORA, BITFIT),
    "composed": (),
    "ladder": (LADDER,),
    "sparse": (FISH_MASK, LT_SFT, DIFF_PRUNING),
    "intrinsic": (INTRINSIC, SAID),
}
# The same for types of peft's own that results of this package are saved as, or compared with.
STOCK_PAPERS: dict[str, tuple[Paper, ...]] = {
    "lora": (LORA,),
    "ia3": (IA3,),
    "prefix_tuning": (PREFIX_TUNING,),
    "prompt_tuning": (PROMPT_TUNING,),
    "p_tuning": (BY_KEY["liu2023gpt"],),
    "adalora": (BY_KEY["zhang2023adalora"], LORA),
    "lokr": (BY_KEY["yeh2024lycoris"],),
    "vera": (BY_KEY["kopiczko2024vera"],),
    "fourierft": (BY_KEY["gao2024fourierft"],),
    "oft": (BY_KEY["qiu2023oft"],),
    "boft": (BY_KEY["liu2024boft"],),
    "shira": (BY_KEY["bhardwaj2024shira"],),
    "ln_tuning": (BY_KEY["zhao2024layernorm"],),
}
