"""Saves small adapters with prediction heads by AdapterHub's own library, for tests/test_adapterhub_heads.py.

    adapters_env/bin/python tests/adapterhub/make_heads.py

See make_fixtures.py. The archive heads.zip has a folder for each case, as `save_adapter` leaves it with a head, and
the outputs. "static" are the heads of transformers' classes, the others flexible heads of `AutoAdapterModel`.
"""

import tempfile
import zipfile
from pathlib import Path

import adapters
import torch
from adapters import AutoAdapterModel, SeqBnConfig
from adapters.heads import CausalLMHead
from families import build, fill
from head_cases import CASES, head_outputs
from safetensors.torch import save_file

HERE = Path(__file__).parent
NAME = "mine"


def make(family, auto, head, changes):
    """A model with an adapter and a head."""
    if head is None:
        model = build(family, auto=auto, **changes)
        adapters.init(model)
    else:
        model = build(family, auto=AutoAdapterModel)
        kind, options = head
        if kind == "causal_lm":
            model.add_prediction_head(CausalLMHead(model, NAME))
        else:
            getattr(model, f"add_{kind}_head")(NAME, **options)
    model.add_adapter(NAME, config=SeqBnConfig(reduction_factor=4))
    model.set_active_adapters(NAME)
    model.eval()
    if head is not None:  # T5 has no prefix with other heads than a classifier
        prefix = "transformer." if family == "t5" and head[0] != "classification" else "/"
        fill({key.removeprefix(prefix): value for key, value in model.named_parameters()}, 0.35)
    else:  # another head than that of the test's base
        outside = (model.base_model_prefix, "encoder", "decoder", "shared")
        own = {key: value for key, value in model.named_parameters() if key.partition(".")[0] not in outside}
        fill({f"saved.{key}": value for key, value in own.items()}, 0.5)
    fill({key: value for key, value in model.named_parameters() if f".{NAME}." in key}, 0.5)
    for key, value in model.named_parameters():
        if key.endswith("in_proj.bias"):  # which the library adds to DeBERTa, and does not save
            value.data.zero_()
    return model


def main():
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (family, auto, head, changes) in CASES.items():
            model = make(family, auto, head, changes)
            results[name] = head_outputs(model, family, name)
            tied = family == "t5" or name.endswith(
                ("mlm", "seq2seq", "causal")
            )  # the library fails to save these safely
            safe = len(results) % 2 == 0 and not tied
            model.save_adapter(str(Path(folder) / name), NAME, use_safetensors=safe)
            print(name, tuple(results[name].shape))
        save_file(results, Path(folder) / "outputs.safetensors")
        with zipfile.ZipFile(HERE / "heads.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(folder).rglob("*.*")):
                entry = zipfile.ZipInfo(str(path.relative_to(folder)))  # dated 1980: the same file at every run
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
