"""How many functions of this package the forward of one block calls, and how many LoRA of peft calls.

The formulas (two sub-layers, prefix, gate), the tuner layer, attention, the masks and the state of a forward have a
file each, eight in all; fewer would mean several of these in one.
"""

import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_peft_ext

from .backbones import BACKBONES
from .methods import METHODS

CALLS, FILES = 40, 8
BLOCKS = {"bert": "encoder.layer", "llama": "model.layers"}
LEAVES = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def calls_of_blocks(package, backbone, config):
    """For each block of a model, (file, function) -> calls in one forward, for functions of a package."""
    family, folder = BACKBONES[backbone], str(Path(package.__file__).parent)
    model = get_peft_model(family.build(), config).eval()
    counts = []

    def profile(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder):
            counts[-1][Path(code.co_filename).name, code.co_name] += 1

    def start(block, args):
        counts.append(Counter())
        sys.setprofile(profile)

    def stop(block, args, output):
        sys.setprofile(None)

    handles = []
    for block in model.get_submodule(f"base_model.model.{BLOCKS[backbone]}"):
        handles += [block.register_forward_pre_hook(start), block.register_forward_hook(stop)]
    with torch.no_grad():
        try:
            model(**family.inputs())
        finally:
            sys.setprofile(None)
            for handle in handles:
                handle.remove()
    assert len(counts) == 2
    return counts


@pytest.mark.parametrize("backbone", BLOCKS)
def test_unipelt(backbone):
    """The first block computes the masks that all blocks share, which takes a few calls more."""
    for count, more in zip(calls_of_blocks(hf_peft_ext, backbone, METHODS["unipelt"]()), (2, 0), strict=True):
        files = {file for file, _ in count}
        assert {"low_rank.py", "bottleneck.py", "prefix.py", "gate.py", "layer.py", "separate_prefix.py"} <= files
        assert count.total() <= CALLS + more, count
        assert len(files) <= FILES, files


@pytest.mark.parametrize("backbone", BLOCKS)
def test_lora_of_peft(backbone):
    """For the record: two leaves, without a gate, of the four sub-layers and four gates of UniPELT."""
    for count in calls_of_blocks(peft, backbone, LoraConfig(target_modules=LEAVES[backbone])):
        assert count.total() <= 18
        assert len({file for file, _ in count}) <= 2
