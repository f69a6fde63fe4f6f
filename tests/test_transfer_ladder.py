"""The ladder of the paper's bridge: with nothing cut the large model's logits, against the mix written out, and its
activations kept on disk: equal to those computed, in any batch, and without a forward of the large model.
"""

import pytest
import torch
from transformers import TrainingArguments

from hf_peft_ext.pruning import pruned_copy
from hf_peft_ext.ranking.encode import Example, collate
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.ranking.packing import choice_token_scores
from hf_peft_ext.trainers import BridgeTrainer
from hf_peft_ext.transfer import bridge
from hf_peft_ext.transfer.bridges.activations import Activations
from hf_peft_ext.tuners.ladder.network import SideBlock

from .backbones import BACKBONES, output
from .test_transfer_fold import plugged_model, refuses, slow


def forwards(plugged):
    """A list that grows with each forward of the large model: the number of its rows."""
    found = []
    base = plugged.get_base_model()
    base.register_forward_pre_hook(lambda _, args, kwargs: found.append(len(kwargs["input_ids"])), with_kwargs=True)
    return found


@pytest.fixture(params=["llama", "t5", slow("bert"), slow("gpt2")])
def family(request):
    return request.param


def hidden_of(base, inputs):
    """The input of each block, by stack: the `hidden_states` of transformers without the last, after the norm."""
    found = base(**inputs, output_hidden_states=True)
    names = ["hidden_states"] if "hidden_states" in found else ["encoder_hidden_states", "decoder_hidden_states"]
    return [found[name][:-1] for name in names]


def side_blocks_of(model):
    return [module for module in model.modules() if isinstance(module, SideBlock)]


def test_with_nothing_cut_it_is_the_large_model(family):
    plugged, inputs = plugged_model(family, "lora"), BACKBONES[family].inputs()
    model = bridge(plugged, pruned_copy(plugged.get_base_model(), 1), ladder=True)
    with torch.no_grad(), plugged.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), output(plugged, inputs), atol=1e-5, rtol=1e-4)


def test_side_blocks_mix_in_what_the_large_blocks_read(family):
    """Half and half at the start, at the channels that are kept; trained with the bridge; the large model is not."""
    plugged, inputs = plugged_model(family, "lora"), BACKBONES[family].inputs()
    pruned = pruned_copy(plugged.get_base_model(), 2)
    model = bridge(plugged, pruned, ladder=True)
    with torch.no_grad(), plugged.disable_adapter():
        hidden = [states for stack in hidden_of(plugged.get_base_model(), inputs) for states in stack]
    side_blocks, met = side_blocks_of(model), []
    for side_block in side_blocks:
        side_block.register_forward_pre_hook(lambda _, args: met.append(args[0]))
        side_block.block.register_forward_pre_hook(lambda _, args: met.append(args[0]))
    output(model, inputs).square().mean().backward()
    for own, mixed, large in zip(met[::2], met[1::2], hidden, strict=True):
        torch.testing.assert_close(mixed, (own + large[..., pruned.kept["residual"]]) / 2)
    assert all(p.grad is not None for side_block in side_blocks for p in (side_block.alpha, side_block.down.weight))
    assert all(p.grad is None for name, p in plugged.named_parameters() if ".parametrizations." not in name)


def test_with_open_gates_it_is_the_bridge_without_a_ladder(family):
    plugged, inputs = plugged_model(family, "lora"), BACKBONES[family].inputs()
    model, bare = (bridge(plugged, pruned_copy(plugged.get_base_model(), 2), ladder=on) for on in (True, False))
    with torch.no_grad():
        for side_block in side_blocks_of(model):
            side_block.alpha.fill_(10.0)
        torch.testing.assert_close(output(model, inputs), output(bare, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_later_epochs_never_run_the_large_model(name, tmp_path):
    plugged = plugged_model(name, "lora")
    pruned, ran = pruned_copy(plugged.get_base_model(), 4), forwards(plugged)
    ids = torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    given = {"ladder": True, "cache": tmp_path / "activations"}
    BridgeTrainer(plugged, args, pruned, "paper", train_dataset=rows, **given).train()
    assert sum(ran) == 6  # each row once
    assert len(list((tmp_path / "activations").iterdir())) == (12 if name == "t5" else 6)


def test_kept_is_computed(tmp_path, family):
    """Rows of other lengths, in batches with other paddings; another large model has rows of its own."""
    plugged = plugged_model(family, "lora")
    pruned, ran = pruned_copy(plugged.get_base_model(), 4), forwards(plugged)
    cached, plain = Activations(plugged, pruned, tmp_path), Activations(plugged, pruned)
    draw = torch.Generator().manual_seed(0)
    ids, answers = torch.randint(3, 60, (3, 7), generator=draw), torch.randint(3, 60, (3, 4), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, 5:] = 0
    answers[0, 2:] = answers[1, 3:] = IGNORED
    labels = {"labels": answers} if family == "t5" else {}
    cached({"input_ids": ids[:2, :5], "attention_mask": mask[:2, :5], **{n: x[:2, :3] for n, x in labels.items()}})
    del ran[:]
    inputs = {"input_ids": ids, "attention_mask": mask, **labels}
    found = cached(inputs)
    assert ran == [1]
    for stack, wanted, seen in zip(found, plain(inputs), (mask.bool(), answers != IGNORED), strict=False):
        torch.testing.assert_close(stack[:, seen], wanted[:, seen], atol=1e-5, rtol=1e-5)
        assert not stack[:, ~seen].any()
    del ran[:]
    with torch.no_grad():
        pruned.model.get_input_embeddings().weight.mul_(2)
    Activations(plugged, pruned, tmp_path)(inputs)
    assert ran == [3]


def test_an_encoder_is_kept_once_for_all_answers(tmp_path):
    plugged, inputs = plugged_model("t5", "lora"), BACKBONES["t5"].inputs(padding="none")
    activations = Activations(plugged, pruned_copy(plugged.get_base_model(), 4), tmp_path)
    found = [activations({**inputs, "decoder_input_ids": inputs["decoder_input_ids"] + i}) for i in (0, 1)]
    assert len(list(tmp_path.iterdir())) == 3 + 2 * 3
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_losses_and_gradients_are_those_without_the_files(tmp_path, family):
    """From files that are there: the same loss over labels, and gradients, as with a forward each time."""
    inputs, steps = BACKBONES[family].inputs(), []
    if family != "bert":
        inputs["labels"] = inputs.pop("decoder_input_ids", inputs["input_ids"]).clone()
        inputs["labels"][:2, 5:] = IGNORED
    for cache in (None, tmp_path, tmp_path):
        plugged = plugged_model(family, "lora")
        ran = forwards(plugged)
        found = bridge(plugged, pruned_copy(plugged.get_base_model(), 2), ladder=True, cache=cache)(**inputs)
        seen = inputs["attention_mask"].bool()
        loss = found["last_hidden_state"][seen].square().mean() if family == "bert" else found["loss"]
        loss.backward()
        steps.append((loss.detach(), *(p.grad for p in plugged.parameters() if p.grad is not None), len(ran)))
    assert [step[-1] for step in steps] == [1, 1, 0]
    torch.testing.assert_close(steps[1][:-1], steps[0][:-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(steps[2][:-1], steps[1][:-1], atol=0, rtol=0)


def test_packed_choices(tmp_path):
    """Choices behind one prompt, which padding in front of shorter prompts moves: the same scores, nothing twice."""
    plugged = plugged_model("llama", "lora")
    model = bridge(plugged, pruned_copy(plugged.get_base_model(), 2), ladder=True, cache=tmp_path)
    plain = bridge(plugged, pruned_copy(plugged.get_base_model(), 2), ladder=True)
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


def test_choices_of_an_encoder_decoder(tmp_path):
    """A row for each choice, behind one text: its loss, and nothing is run again in the next epoch."""
    plugged = plugged_model("t5", "lora")
    model = bridge(plugged, pruned_copy(plugged.get_base_model(), 2), ladder=True, cache=tmp_path)
    ran, words = forwards(plugged), BACKBONES["t5"].inputs()["input_ids"][0].tolist()
    batch = collate([Example(words[:5], [words[:2], words[2:5]]), Example(words[1:4], [words[3:6], words[:1]])])
    first, second = (choice_token_scores(model, batch, packed=False).log_p for _ in range(2))
    assert torch.equal(first, second)
    assert ran == [4]
    packed = lambda: choice_token_scores(model, batch, packed=True)  # noqa: E731
    refuses(r"`len.decoder_input_ids.` .=4. must be the number of rows", ValueError, packed)


def test_errors(tmp_path):
    plugged = plugged_model("t5", "lora")
    model = bridge(plugged, pruned_copy(plugged.get_base_model(), 2), ladder=True)
    inputs = BACKBONES["t5"].inputs()
    refuses(
        "`past_key_values` .='tuple'. must be None: a bridge", ValueError, lambda: model(**inputs, past_key_values=())
    )
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    pruned = pruned_copy(plugged.get_base_model(), 2)
    call = lambda: BridgeTrainer(plugged, args, pruned, "delta", ladder=True)  # noqa: E731
    refuses("`ladder` .=True. is for the paper's bridge", ValueError, call)
