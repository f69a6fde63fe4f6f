"""The ladder of the paper's bridge: with nothing cut the large model's logits, against the mix written out, and its
activations kept on disk: equal to those computed, in any batch, and without a forward of the large model.
"""

import pytest
import torch
from transformers import TrainingArguments

from hf_peft_ext.choices import Example, collate
from hf_peft_ext.packing import choice_token_scores
from hf_peft_ext.pruning import thin_copy
from hf_peft_ext.trainers import BridgeTrainer
from hf_peft_ext.transfer import bridge
from hf_peft_ext.transfer.activations import Activations

from .backbones import BACKBONES, output
from .test_transfer_fold import plugged_model, refuses, slow


def forwards(plugged):
    """A list that grows with each forward of the large model: the number of its rows."""
    found = []
    base = plugged.get_base_model()
    base.register_forward_pre_hook(lambda _, args, kwargs: found.append(len(kwargs["input_ids"])), with_kwargs=True)
    return found


@pytest.fixture(params=["llama", slow("bert"), slow("gpt2")])
def family(request):
    return request.param


def test_with_nothing_cut_it_is_the_large_model(family):
    plugged, inputs = plugged_model(family, "lora"), BACKBONES[family].inputs()
    model = bridge(plugged, thin_copy(plugged.get_base_model(), 1), ladder=True)
    with torch.no_grad(), plugged.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), output(plugged, inputs), atol=1e-5, rtol=1e-4)


def test_rungs_mix_in_what_the_large_blocks_read(family):
    """Half and half at the start, at the channels that are kept; trained with the bridge; the large model is not."""
    plugged, inputs = plugged_model(family, "lora"), BACKBONES[family].inputs()
    thin = thin_copy(plugged.get_base_model(), 2)
    model = bridge(plugged, thin, ladder=True)
    with torch.no_grad():
        states = Activations(plugged, thin.kept["residual"])(inputs)
        with plugged.disable_adapter():
            hidden = plugged.get_base_model()(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], hidden[1][..., thin.kept["residual"]])
    rungs = [module for module in model.modules() if type(module).__name__ == "Rung"]
    met = []
    rungs[1].register_forward_pre_hook(lambda _, args: met.append(args[0]))
    rungs[1].block.register_forward_pre_hook(lambda _, args: met.append(args[0]))
    output(model, inputs).square().mean().backward()
    torch.testing.assert_close(met[1], (met[0] + states[1]) / 2)
    assert all(p.grad is not None for rung in rungs for p in (rung.alpha, rung.down.weight))
    assert all(p.grad is None for name, p in plugged.named_parameters() if ".seen_" not in name)


def test_later_epochs_never_run_the_large_model(tmp_path):
    plugged = plugged_model("llama", "lora")
    thin, ran = thin_copy(plugged.get_base_model(), 4), forwards(plugged)
    ids = torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    given = {"ladder": True, "cache": tmp_path / "activations"}
    BridgeTrainer(plugged, args, thin, "paper", train_dataset=rows, **given).train()
    assert sum(ran) == 6  # each row once
    assert len(list((tmp_path / "activations").iterdir())) == 6


def test_kept_is_computed(tmp_path, family):
    """Rows of other lengths, in batches with other paddings; another large model has rows of its own."""
    plugged = plugged_model(family, "lora")
    kept, ran = torch.tensor([1, 4, 7]), forwards(plugged)
    cached, plain = Activations(plugged, kept, tmp_path), Activations(plugged, kept)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (3, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, 5:] = 0
    cached({"input_ids": ids[:2, :5], "attention_mask": mask[:2, :5]})
    del ran[:]
    found = cached({"input_ids": ids, "attention_mask": mask})
    assert ran == [1]
    wanted = plain({"input_ids": ids, "attention_mask": mask})
    seen = mask.bool()
    torch.testing.assert_close(found[:, seen], wanted[:, seen], atol=1e-5, rtol=1e-5)
    del ran[:]
    Activations(plugged, kept + 1, tmp_path)({"input_ids": ids, "attention_mask": mask})
    assert ran == [3]


def test_packed_choices(tmp_path):
    """Choices behind one prompt, which padding in front of shorter prompts moves: the same scores, nothing twice."""
    plugged = plugged_model("llama", "lora")
    model = bridge(plugged, thin_copy(plugged.get_base_model(), 2), ladder=True, cache=tmp_path)
    plain = bridge(plugged, thin_copy(plugged.get_base_model(), 2), ladder=True)
    ran, words = forwards(plugged), BACKBONES["llama"].inputs()["input_ids"][0].tolist()
    examples = [Example(words[:5], [words[:2], words[2:5]]), Example(words[1:4], [words[3:6], words[:1]])]

    def scores(of, chosen):
        with torch.no_grad():
            return choice_token_scores(of, collate(chosen)).log_p

    scores(model, examples[1:])
    del ran[:]
    found = scores(model, examples)
    assert ran == [1]
    torch.testing.assert_close(found, scores(plain, examples), atol=1e-5, rtol=1e-5)


def test_errors(tmp_path):
    plugged = plugged_model("t5", "lora")
    thin = thin_copy(plugged.get_base_model(), 2)
    refuses("`model` .='T5For.*encoder-decoder", ValueError, lambda: bridge(plugged, thin, ladder=True))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    call = lambda: BridgeTrainer(plugged, args, thin, "delta", ladder=True)  # noqa: E731
    refuses("`ladder` .=True. is for the paper's bridge", ValueError, call)
