# ruff: noqa: E501
"""The card of `full_record` and a UniPELT adapter, word for word."""

CARD = r"""
---
base_model: acme/tiny-bert
datasets:
- nyu-mll/glue
language:
- en
library_name: peft
license: apache-2.0
metrics:
- accuracy
- f1
pipeline_tag: text-classification
tags:
- peft
- hf_peft_ext
- transformers
- unipelt
- support
- base_model:adapter:acme/tiny-bert
base_model_relation: adapter
model-index:
- name: unipelt
  results:
  - task:
      type: text-classification
    dataset:
      name: nyu-mll/glue
      type: nyu-mll/glue
      config: mrpc
      split: validation
      revision: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb
    metrics:
    - type: accuracy
      value: 0.85312
---

# UniPELT adapter for `acme/tiny-bert`

A [peft](https://github.com/huggingface/peft) adapter: 3,507 parameters (19.4 KiB) that change [`acme/tiny-bert`](https://huggingface.co/acme/tiny-bert), trained on [`nyu-mll/glue`](https://huggingface.co/datasets/nyu-mll/glue).

## Use

```bash
pip install hf_peft_ext
```

```python
import hf_peft_ext  # comes first: it makes the method known to peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

adapter = "unipelt"
base = "acme/tiny-bert"
model = AutoModelForSequenceClassification.from_pretrained(
    base,
    revision="aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    id2label={0: "refund", 1: "lost card", 2: "other"},
)
model = hf_peft_ext.load_adapter(model, adapter)
tokenizer = AutoTokenizer.from_pretrained(base)

inputs = tokenizer("A text to classify.", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])
```

Classes, in order: `refund`, `lost card`, `other`.

## Results

| metric | data | split | this adapter | LoRA | base model |
| --- | --- | --- | ---: | ---: | ---: |
| `accuracy` | `nyu-mll/glue` | `validation` | 0.853 ± 0.012 | 0.841 ± 0.011 | 0.6838 |
| `f1` | `own messages` | `test` | 0.89 |  |  |

Mean ± standard deviation over 3 runs.

## Method

UniPELT ([UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning](https://arxiv.org/abs/2110.07577)) puts bottleneck adapters (down to a few dimensions, through an activation, and up again), trained prefixes (further keys and values for attention) and LoRA (low-rank updates of weights) into the layers of a frozen model; gates, small networks of their own, decide from each input how much of them is let through.

| sub-layer | site | layers | size | gate | parameters |
| --- | --- | --- | --- | --- | ---: |
| bottleneck | after the FFN and its residual | 0 to 1 | r = 4 | auto | 650 |
| prefix | keys and values of attention | 0 to 1 | tokens = 4 | auto | 578 |
| low rank | query projection | 0 to 1 | r = 8 | auto | 1,090 |
| low rank | value projection | 0 to 1 | r = 8 | auto | 1,090 |
| saved whole | `classifier` | outside the layers |  |  | 99 |

Gate `auto`: one gate for each token where attention is causal, else one for the whole text, from the mean of its tokens.

![The mean of each gate by layer and sub-layer, from 0 (shut) to 1 (open)](figures/gates.png)

## Training

| data | used for | config | split | rows | revision | fingerprint |
| --- | --- | --- | --- | ---: | --- | --- |
| [`nyu-mll/glue`](https://huggingface.co/datasets/nyu-mll/glue) | `train` | `mrpc` | `train` | 3,668 | `bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb` | `0123abcd` |
| `own messages` | `eval` |  | `test` | 320 |  |  |

- Trainer: `Adapter`
- Trainable parameters: 3,507 of 22,713,216 (0.0154 %)
- Base model at revision: `aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa`
- Base model quantised: `4-bit NF4, double quantisation`
- Hardware: `2 x AMD EPYC`
- Peak memory: 1.5 GiB
- Step, median: 117 ms
- Training: 4.08 min
- Seeds: `0`, `1`, `2`

![Losses by training step](figures/losses.png)

The recipe, in `recipe.yaml` too; `hf-peft-ext train recipe.yaml` runs it again:

```yaml
model: acme/tiny-bert
method: unipelt
training:
  learning_rate: 0.0005
  max_steps: 50
```

Command:

```bash
hf-peft-ext train recipe.yaml learning_rate=5e-4
```

### Framework versions

- PEFT 0.21.2
- `torch` 2.13.0+cpu

## Citation

```bibtex
@inproceedings{mao2022unipelt,
  title = {UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning},
  author = {Mao, Yuning and Mathias, Lambert and Hou, Rui and Almahairi, Amjad and Ma, Hao and Han, Jiawei and Yih, Wen-tau and Khabsa, Madian},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2022},
  eprint = {2110.07577},
  archivePrefix = {arXiv}
}

@inproceedings{pfeiffer2021adapterfusion,
  title = {AdapterFusion: Non-Destructive Task Composition for Transfer Learning},
  author = {Pfeiffer, Jonas and Kamath, Aishwarya and R{\"u}ckl{\'e}, Andreas and Cho, Kyunghyun and Gurevych, Iryna},
  booktitle = {Conference of the European Chapter of the Association for Computational Linguistics},
  year = {2021},
  eprint = {2005.00247},
  archivePrefix = {arXiv}
}

@inproceedings{li2021prefix,
  title = {Prefix-Tuning: Optimizing Continuous Prompts for Generation},
  author = {Li, Xiang Lisa and Liang, Percy},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2021},
  eprint = {2101.00190},
  archivePrefix = {arXiv}
}

@inproceedings{hu2022lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  eprint = {2106.09685},
  archivePrefix = {arXiv}
}
```
"""
