"""The papers of the methods, for citations in cards and documentation."""

from dataclasses import dataclass


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


def paper(key: str, title: str, authors: str, venue: str, year: int, arxiv: str = "", page: str = "") -> Paper:
    """A paper, with a BibTeX entry made from the arguments."""
    entry = {"title": title, "author": authors, "booktitle": venue, "year": str(year)}
    entry |= {"eprint": arxiv, "archivePrefix": "arXiv"} if arxiv else {"url": page}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in entry.items())
    return Paper(title, arxiv, f"@inproceedings{{{key},\n{lines}\n}}", page)


HOULSBY = paper(
    "houlsby2019parameter",
    "Parameter-Efficient Transfer Learning for NLP",
    "Houlsby, Neil and Giurgiu, Andrei and Jastrzebski, Stanislaw and Morrone, Bruna and de Laroussilhe, Quentin and "
    "Gesmundo, Andrea and Attariyan, Mona and Gelly, Sylvain",
    "International Conference on Machine Learning",
    2019,
    "1902.00751",
)
PFEIFFER = paper(
    "pfeiffer2021adapterfusion",
    "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
    "Pfeiffer, Jonas and Kamath, Aishwarya and R{\\\"u}ckl{\\'e}, Andreas and Cho, Kyunghyun and Gurevych, Iryna",
    "Conference of the European Chapter of the Association for Computational Linguistics",
    2021,
    "2005.00247",
)
PREFIX_TUNING = paper(
    "li2021prefix",
    "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
    "Li, Xiang Lisa and Liang, Percy",
    "Annual Meeting of the Association for Computational Linguistics",
    2021,
    "2101.00190",
)
LORA = paper(
    "hu2022lora",
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
    "Wang, Lu and Chen, Weizhu",
    "International Conference on Learning Representations",
    2022,
    "2106.09685",
)
BITFIT = paper(
    "benzaken2022bitfit",
    "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
    "Ben Zaken, Elad and Goldberg, Yoav and Ravfogel, Shauli",
    "Annual Meeting of the Association for Computational Linguistics",
    2022,
    "2106.10199",
)
UNIPELT = paper(
    "mao2022unipelt",
    "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning",
    "Mao, Yuning and Mathias, Lambert and Hou, Rui and Almahairi, Amjad and Ma, Hao and Han, Jiawei and "
    "Yih, Wen-tau and Khabsa, Madian",
    "Annual Meeting of the Association for Computational Linguistics",
    2022,
    "2110.07577",
)
MAM = paper(
    "he2022towards",
    "Towards a Unified View of Parameter-Efficient Transfer Learning",
    "He, Junxian and Zhou, Chunting and Ma, Xuezhe and Berg-Kirkpatrick, Taylor and Neubig, Graham",
    "International Conference on Learning Representations",
    2022,
    "2110.04366",
)
S4 = paper(
    "chen2023design",
    "Parameter-Efficient Fine-Tuning Design Spaces",
    "Chen, Jiaao and Zhang, Aston and Shi, Xingjian and Li, Mu and Smola, Alex and Yang, Diyi",
    "International Conference on Learning Representations",
    2023,
    "2301.01821",
)
IA3 = paper(
    "liu2022few",
    "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    "Liu, Haokun and Tam, Derek and Muqeeth, Mohammed and Mohta, Jay and Huang, Tenghao and Bansal, Mohit and "
    "Raffel, Colin",
    "Advances in Neural Information Processing Systems",
    2022,
    "2205.05638",
)
LADDER = paper(
    "sung2022lst",
    "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
    "Sung, Yi-Lin and Cho, Jaemin and Bansal, Mohit",
    "Advances in Neural Information Processing Systems",
    2022,
    "2206.06522",
)
PLUG_IN = paper(
    "jin2023parameter",
    "Parameter-efficient Tuning for Large Language Model without Calculating Its Gradients",
    "Jin, Feihu and Zhang, Jiajun and Zong, Chengqing",
    "Conference on Empirical Methods in Natural Language Processing",
    2023,
    page="https://aclanthology.org/2023.emnlp-main.22",
)
MEZO = paper(
    "malladi2023fine",
    "Fine-Tuning Language Models with Just Forward Passes",
    "Malladi, Sadhika and Gao, Tianyu and Nichani, Eshaan and Damian, Alex and Lee, Jason D. and Chen, Danqi and "
    "Arora, Sanjeev",
    "Advances in Neural Information Processing Systems",
    2023,
    "2305.17333",
)
PROMPT_TUNING = paper(
    "lester2021power",
    "The Power of Scale for Parameter-Efficient Prompt Tuning",
    "Lester, Brian and Al-Rfou, Rami and Constant, Noah",
    "Conference on Empirical Methods in Natural Language Processing",
    2021,
    "2104.08691",
)

# PEFT type, in lower case -> the papers of the method, its own first.
PAPERS: dict[str, tuple[Paper, ...]] = {
    "bottleneck": (HOULSBY, PFEIFFER, MAM),
    "layer_prefix": (PREFIX_TUNING,),
    "bitfit": (BITFIT,),
    "unipelt": (UNIPELT, PFEIFFER, PREFIX_TUNING, LORA),
    "mam": (MAM, PREFIX_TUNING),
    "s4": (S4, PFEIFFER, PREFIX_TUNING, LORA, BITFIT),
    "composed": (),
    "ladder": (LADDER,),
}
# The same for types of peft's own that results of this package are saved as, or compared with.
STOCK_PAPERS: dict[str, tuple[Paper, ...]] = {
    "lora": (LORA,),
    "ia3": (IA3,),
    "prefix_tuning": (PREFIX_TUNING,),
    "prompt_tuning": (PROMPT_TUNING,),
}
