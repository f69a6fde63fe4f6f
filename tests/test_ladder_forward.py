"""A ladder by every way into its backbone: threads, replicas, `.forward`, copies, accelerate's hooks, FSDP2, Ctrl-C.

The right value is always the output of one plain call in one thread.
"""

import copy
import inspect
import os
import pickle
import sys
import threading

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model, inject_adapter_in_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, Trainer, TrainingArguments

from hf_peft_ext import LadderConfig
from hf_peft_ext.structure import CACHES, stacks

from .backbones import BACKBONES, output
from .methods import ALL, randomise
from .test_ladder import gradients, laddered, loss

every_family = pytest.mark.parametrize("family", [name for name in BACKBONES if name not in ALL["ladder"].refused])
every_kind = pytest.mark.parametrize("family", ["bert", "llama", "t5"])


@every_kind
def test_threads(family):
    """Two threads with batches of other lengths, switched often."""
    model, _ = laddered(family)
    batches = [BACKBONES[family].inputs(length=n) for n in (6, 11)]
    with torch.no_grad():
        expected = [output(model, inputs) for inputs in batches]
    wrong, switching = [], sys.getswitchinterval()

    def work(i):
        with torch.no_grad():
            wrong.extend(not torch.equal(output(model, batches[i]), expected[i]) for _ in range(15))

    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert len(wrong) == 30  # no thread has died
    assert not any(wrong)


def two_stacks(family):
    return BACKBONES[family].kind == "seq2seq"


def replica_of(model):
    """As `nn.DataParallel` makes it: modules share all but their children, parameters and buffers."""
    modules = list(model.modules())
    twins = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            setattr(twin, name, None if child is None else twins[child])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach().clone())
    return twins[model], twins


@every_family
def test_replicas(family):
    """A replica gives the same output, and by its own weights; its gradients are its own."""
    model, inputs = laddered(family)
    with torch.no_grad():
        expected = output(model, inputs)
        replica, twins = replica_of(model)
        assert torch.equal(output(replica, inputs), expected)
        for twin in (twins[module] for side in sides(model) for module in side.modules()):
            for name, value in list(vars(twin).items()):  # what were parameters are attributes
                if isinstance(value, torch.Tensor):
                    setattr(twin, name, value * 0.5)
        assert (output(replica, inputs) - expected).abs().max() > 1e-3
        assert torch.equal(output(model, inputs), expected)


def sides(model):
    return [m.side_of["default"] for m in model.modules() if hasattr(m, "side_of")]


@every_family
def test_forward_called_by_itself(family):
    """`model.forward(...)` of the outermost module and of the backbone, which hooks on modules would miss."""
    base, inputs = BACKBONES[family].build(), BACKBONES[family].inputs()
    whole = type(base.base_model)
    for model in (base, whole(base.config).eval()):
        with torch.no_grad():
            plain = output(model.forward, inputs)
            inject_adapter_in_model(LadderConfig(r=4), model)
            randomise(model)
            expected = output(model, inputs)
            assert torch.equal(output(model.forward, inputs), expected)
            assert (expected - plain).abs().max() > 1e-2


@every_family
def test_the_class_looks_as_before(family, tmp_path):
    """Name, signature, saved architecture; pickled, copied and unloaded."""
    base, inputs = BACKBONES[family].build(), BACKBONES[family].inputs()
    kinds = [type(module) for module in base.modules()]
    model = get_peft_model(base, LadderConfig(r=4))
    randomise(model)
    changed = [m for m in base.modules() if "plain" in vars(type(m))]
    assert len(changed) == 1 + two_stacks(family)
    for module in changed:
        kind = type(module).plain
        assert isinstance(module, kind)
        assert str(type(module)) == str(kind)
        assert inspect.signature(module.forward) == inspect.signature(kind(module.config).forward)
    with torch.no_grad():
        expected = output(model, inputs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(twin, inputs), expected)
            randomise(twin, seed=4)
            assert (output(twin, inputs) - expected).abs().max() > 1e-3
        assert torch.equal(output(model, inputs), expected)
    plain = model.unload()
    assert [type(module) for module in plain.modules()] == kinds
    plain.save_pretrained(tmp_path)
    assert plain.config.architectures == [kinds[0].__name__]


def test_hooks_of_accelerate():
    """They keep the forward that they wrap; a forward that was replaced in another way is refused."""
    for hooked_first in (True, False):
        model, inputs = BACKBONES["bert"].build(), BACKBONES["bert"].inputs()
        if hooked_first:
            add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
        inject_adapter_in_model(LadderConfig(r=4), model)
        if not hooked_first:
            add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
        randomise(model)
        with torch.no_grad():
            expected = output(laddered("bert")[0], inputs)
            assert torch.equal(output(model.eval(), inputs), expected)
            remove_hook_from_module(model)
            assert torch.equal(output(model, inputs), expected)
    model = BACKBONES["bert"].build()
    model.forward = lambda **kwargs: None
    with pytest.raises(ValueError, match=r"`model` \(='BertModel'\) must have the forward of its class"):
        get_peft_model(model, LadderConfig(r=4))


@every_family
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted(family, error):
    """Autograd and checkpointing are as they were, and the next forward is right."""
    model, inputs = laddered(family)
    base = model.get_base_model()
    before = gradients(model, inputs)
    base.gradient_checkpointing_enable()
    block = list(stacks(base))[-1][1][1]

    def stop(*_):
        raise error

    handle = block.register_forward_pre_hook(stop)
    model.train()
    with pytest.raises(error):
        model(**inputs)
    handle.remove()
    assert torch.is_grad_enabled()
    assert block.gradient_checkpointing
    after = gradients(model.eval(), inputs)
    assert all(torch.equal(gradient, before[name]) for name, gradient in after.items())


@every_family
def test_return_dict(family):
    """None is the config's value, in each class and in the backbone."""
    model, inputs = laddered(family)
    base = model.get_base_model()
    body = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    host = base.get_encoder() if two_stacks(family) else base.base_model
    for called, given in ((model, inputs), (base, inputs), (host, body)):
        with torch.no_grad():
            assert not isinstance(called(**given), tuple)
            assert not isinstance(called(**given, return_dict=None), tuple)
            assert isinstance(called(**given, return_dict=False), tuple)


@every_family
def test_last_hidden_state_is_what_the_head_reads(family):
    """With hidden states asked for before and after the ladder was put in."""
    base, inputs = BACKBONES[family].build(), BACKBONES[family].inputs()
    with torch.no_grad():
        plain = base(**inputs, output_hidden_states=True)
        model = get_peft_model(base, LadderConfig(r=4)).eval()
        randomise(model)
        found = model(**inputs, output_hidden_states=True)
        name = "decoder_hidden_states" if two_stacks(family) else "hidden_states"
        assert len(found[name]) == len(plain[name])
        assert all(torch.equal(a, b) for a, b in zip(found[name][:-1], plain[name][:-1], strict=True))
        last, head = found[name][-1], base.get_output_embeddings()
        scale = 32**-0.5 if family == "t5" and base.config.scale_decoder_outputs else 1.0
        shown = last if head is None else head(last * scale)
        cap = getattr(base.config, "final_logit_softcapping", None)
        shown = shown if cap is None else cap * torch.tanh(shown / cap)
        torch.testing.assert_close(shown, output(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", {}), ("qwen2", {"num_key_value_heads": 1}), ("gpt2", {}), ("t5", {}), ("mistral", {})],
)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("beams", [1, 2])
def test_logits_of_cached_generation(family, sizes, options, beams):
    """With and without a cache, at every step."""
    model = get_peft_model(BACKBONES[family].build(**sizes), LadderConfig(r=4)).eval()
    randomise(model)
    inputs = BACKBONES[family].inputs(padding="left")
    inputs.pop("decoder_input_ids", None)
    given = {**inputs, "max_new_tokens": 4, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**given, **options)
    plain = model.generate(**given, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=0, atol=1e-4)


def test_the_cache_has_a_name_that_is_known():
    """A version that calls it otherwise has to be noticed, for the guards would see no cache."""
    for family in ("llama", "t5", "gpt2"):
        host = BACKBONES[family].build()
        assert {*CACHES} & {*inspect.signature(host.forward).parameters}


def test_trained_by_trainer_without_a_pooler(tmp_path):
    """RoBERTa's classifier reads the last hidden states itself."""
    config = BACKBONES["roberta"].build().config
    config.num_labels = 2
    base = AutoModelForSequenceClassification.from_config(config)
    base.base_model.load_state_dict(BACKBONES["roberta"].build().state_dict(), strict=False)  # weights that matter
    model = get_peft_model(base, LadderConfig(r=4, task_type="SEQ_CLS"))
    rows = [{"input_ids": [3, 4 + i % 2, 5], "labels": i % 2} for i in range(32)]
    args = TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=8, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


@every_kind
def test_eight_bits(family, tmp_path):
    """An int8 backbone is cut alike before its first forward and after it, and goes on as before."""
    pytest.importorskip("bitsandbytes")
    sizes = {"d_model": 64, "d_ff": 128} if family == "t5" else {"hidden_size": 64, "intermediate_size": 128}
    whole = BACKBONES[family].build(**sizes)
    whole.save_pretrained(tmp_path)
    eight, inputs, found = BitsAndBytesConfig(load_in_8bit=True), BACKBONES[family].inputs(), []
    for ran in (False, True):
        base = type(whole).from_pretrained(tmp_path, quantization_config=eight, device_map={"": "cpu"}).eval()
        with torch.no_grad():
            plain = output(base, inputs) if ran else None
            model = get_peft_model(base, LadderConfig(r=4)).eval()
            for number, (name, p) in enumerate(model.named_parameters()):  # what is cut from the backbone stays
                if name.endswith(("down.weight", "up.weight", "down.bias", "up.bias")):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
            found.append(output(model, inputs))
            if ran:
                with model.disable_adapter():
                    assert torch.equal(output(model, inputs), plain)
    assert torch.equal(*found)


def sharded(rank, folder, family):
    """One process of one: the sharded model's outputs and gradients, to a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model, inputs = laddered(family)
    for _, blocks in list(stacks(model)):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        with torch.no_grad():
            found = output(model, inputs)
        model.zero_grad()
        loss(output(model, inputs)).backward()
    whole = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    torch.save((found, whole), f"{folder}/found.pt")
    os._exit(0)  # as in tests/test_training.py


@pytest.mark.slow
@every_kind
def test_sharded_equals_whole(family, tmp_path):
    """FSDP2 with every block a unit: the side network's weights are in the first one's."""
    torch.multiprocessing.spawn(sharded, (str(tmp_path), family), nprocs=1)
    found, whole = torch.load(tmp_path / "found.pt")
    model, inputs = laddered(family)
    with torch.no_grad():
        torch.testing.assert_close(found, output(model, inputs), rtol=1e-4, atol=1e-5)
    expected = gradients(model, inputs)
    assert whole.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(whole[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
