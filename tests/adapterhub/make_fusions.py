"""Saves small fusions with AdapterHub's own library, for tests/test_adapterhub_fusion.py; see make_fixtures.py.

    adapters_env/bin/python tests/adapterhub/make_fusions.py

For each family the archive fusion.zip has the two adapters, the fusion, and the logits of the fusion, of the stacked
adapters and of their average. adapters 1.3.0 divides a sum of outputs by the number of adapters after it has weighed
them by weights of the sum 1, so the weights here are twice as large.
"""

import tempfile
import zipfile
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, SeqBnConfig
from adapters.composition import Average, Fuse, Stack
from families import batch, build, fill
from safetensors.torch import save_file

HERE = Path(__file__).parent
# family -> the config of its adapters, and that of the fusion
CASES = {
    "bert": (SeqBnConfig, "dynamic"),
    "distilbert": (DoubleSeqBnConfig, "static"),
    "gpt2": (DoubleSeqBnConfig, "dynamic"),
    "llama": (SeqBnConfig, "dynamic"),
    "t5": (DoubleSeqBnConfig, "dynamic"),
    "bart": (DoubleSeqBnConfig, "dynamic"),
}


@torch.no_grad()
def logits(model, inputs, setup):
    model.set_active_adapters(setup)
    return model(**inputs).logits.contiguous()


def save(family, folder):
    make, kind = CASES[family]
    model, inputs = build(family), batch(family)
    adapters.init(model)
    for name, factor in (("news", 4), ("mails", 5)):
        model.add_adapter(name, config=make(reduction_factor=factor))
    model.add_adapter_fusion(["news", "mails"], kind)
    model.eval()
    fill({key: value for key, value in model.named_parameters() if ".news" in key or ".mails" in key}, 0.5)
    results = {
        "fuse": logits(model, inputs, Fuse("news", "mails")),
        "stack": logits(model, inputs, Stack("news", "mails")),
        "average": logits(model, inputs, Average("news", "mails", weights=[1.6, 0.4], normalize_weights=False)),
        "news": logits(model, inputs, "news"),
    }
    for first, second in (("fuse", "stack"), ("stack", "average"), ("fuse", "average"), ("fuse", "news")):
        assert (results[first] - results[second]).abs().max() > 1e-2
    for name in ("news", "mails"):
        model.save_adapter(str(folder / name), name, with_head=False)
    model.save_adapter_fusion(str(folder / "fusion"), "news,mails", use_safetensors=family == "gpt2")
    save_file(results, folder / "logits.safetensors")


def main():
    with tempfile.TemporaryDirectory() as folder:
        for family in CASES:
            (Path(folder) / family).mkdir()
            save(family, Path(folder) / family)
            print(family)
        with zipfile.ZipFile(HERE / "fusion.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(folder).rglob("*.*")):
                entry = zipfile.ZipInfo(str(path.relative_to(folder)))  # dated 1980: the same file at every run
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
