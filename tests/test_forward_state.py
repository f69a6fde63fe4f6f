"""A forward leaves nothing on a module: threads, copies that share hooks, and the hooks of others stay right."""

import sys
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer, TrainingArguments

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.attach.forward_state import FORWARD
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.model.structure import layer_paths

from .backbones import BACKBONES, output
from .methods import METHODS, randomise

FAMILIES = ("bert", "t5", "llama", "gemma2", "falcon", "gpt2")
GATED = ("unipelt", "mam", "scaled_parallel", "houlsby", "pfeiffer", "composed")


def tuned(method, backbone):
    model = get_peft_model(BACKBONES[backbone].build(), METHODS[method]())
    randomise(model)
    return model.eval()


def in_threads(*jobs):
    """Run the jobs at once, with switches as often as Python allows; what one raises is raised."""
    failures, interval = [], sys.getswitchinterval()

    def work(job):
        try:
            with torch.no_grad():
                job()
        except BaseException as error:
            failures.append(error)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("method", GATED)
@pytest.mark.parametrize("backbone", FAMILIES)
def test_threads_share_a_model(method, backbone):
    """Two threads with batches of other lengths and other padding get what each gets alone."""
    model, family = tuned(method, backbone), BACKBONES[backbone]
    batches = [family.inputs(), family.inputs(batch=2, length=12, padding="left")]
    with torch.no_grad():
        expected = [output(model, batch) for batch in batches]

    def job(batch, result):
        for _ in range(12):
            torch.testing.assert_close(output(model, batch), result, rtol=0, atol=1e-5)

    in_threads(*(lambda b=b, e=e: job(b, e) for b, e in zip(batches, expected, strict=True)))


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_threads_mix_adapters(backbone):
    """The adapters of the rows belong to the thread that passed them, in the head that is saved whole too."""
    model, family = tuned("unipelt", backbone), BACKBONES[backbone]
    model.add_adapter("other", METHODS["unipelt"]())
    randomise(model, "other", seed=5)
    inputs = family.inputs()
    names = [["default", "other", "__base__"], ["other", "other", "default"]]
    with torch.no_grad():
        expected = [output(model.eval(), inputs, adapter_names=n) for n in names] + [output(model, inputs)]

    def job(result, **kwargs):
        for _ in range(8):
            assert torch.equal(output(model, inputs, **kwargs), result)

    in_threads(
        lambda: job(expected[0], adapter_names=names[0]),
        lambda: job(expected[1], adapter_names=names[1]),
        lambda: job(expected[2]),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["bert", "t5", "llama", "falcon"])
def test_nothing_is_kept(method, backbone):
    """After a forward no tuner layer has an attribute that it did not have before, and nothing waits to be taken."""
    model, family = tuned(method, backbone), BACKBONES[backbone]
    before, waiting = [dict(vars(layer)) for layer in tuner_layers(model)], dict(FORWARD.values)
    with torch.no_grad():
        output(model, family.inputs())
    for layer, attributes in zip(tuner_layers(model), before, strict=True):
        assert vars(layer) == attributes
    assert FORWARD.values.keys() == waiting.keys()
    assert FORWARD.row_adapters is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", GATED)
@pytest.mark.parametrize("backbone", ["bert", "t5", "llama", "falcon"])
def test_a_backward_that_computes_blocks_anew_keeps_nothing(method, backbone, reentrant):
    model, family = tuned(method, backbone).train(), BACKBONES[backbone]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    waiting = dict(FORWARD.values)
    output(model, family.inputs()).sum().backward()
    assert FORWARD.values.keys() == waiting.keys()


@pytest.mark.parametrize("method", GATED)
def test_a_failed_forward_keeps_no_padding(method):
    model, inputs = tuned(method, "bert"), BACKBONES["bert"].inputs()

    def fail(*args):
        raise RuntimeError("no memory")

    waiting = dict(FORWARD.values)
    attention = [module for name, module in model.named_modules() if name.endswith("attention.output")][-1]
    handle = attention.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"), torch.no_grad():
        output(model, inputs)
    assert not [key for key in FORWARD.values.keys() - waiting.keys() if key.startswith("padding")]
    handle.remove()


def replica_of(model):
    """A copy of a model as `nn.DataParallel` makes it: modules are copied, hooks are shared."""
    modules = list(model.modules())
    place = {module: i for i, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, copy in zip(modules, copies, strict=True):
        for name, child in module._modules.items():
            if child is not None:
                setattr(copy, name, copies[place[child]])
        for name, parameter in module._parameters.items():
            copy._parameters[name] = None
            if parameter is not None:
                del copy._parameters[name]
                setattr(copy, name, parameter.detach().clone())
        for name, buffer in module._buffers.items():
            copy._buffers[name] = None if buffer is None else buffer.clone()
    return copies[0], copies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", FAMILIES)
def test_replicas_use_their_own_weights(method, backbone):
    """A replica computes what the model does; with its own adapter changed, it does not, and the model stays."""
    model, family = tuned(method, backbone), BACKBONES[backbone]
    inputs = family.inputs()
    with torch.no_grad():
        expected = output(model, inputs)
        replica, copies = replica_of(model)
        assert torch.equal(output(replica, inputs), expected)
        for (name, _), copy in zip(model.named_modules(), copies, strict=True):
            if ".sublayer_of.default" in name:
                for value in vars(copy).values():
                    if isinstance(value, torch.Tensor):
                        value.mul_(0.5).add_(0.01)
        assert (output(replica, inputs) - expected).abs().max() > 1e-4
        assert torch.equal(output(model, inputs), expected)


def hidden_states_of(result):
    named = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    return [state for name in named for state in result.get(name) or ()]


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "unipelt", "mam", "bitfit"])
@pytest.mark.parametrize("backbone", ["llama", "t5", "gpt2", "bert", "modernbert", "qwen2"])
@pytest.mark.parametrize("asked_before", [False, True], ids=["fresh", "asked_before"])
def test_hidden_states(method, backbone, asked_before, tmp_path):
    """They are what the next block reads, whether transformers' own hooks or ours were installed first."""
    family = BACKBONES[backbone]
    base, inputs = family.build(), family.inputs()
    with torch.no_grad():
        if asked_before:
            base(**inputs, output_hidden_states=True)
        model = get_peft_model(base, METHODS[method]())
        randomise(model)
        model.eval().save_pretrained(tmp_path)
        read = []
        blocks = [model.get_submodule(path) for path in layer_paths(model) if path.endswith(".1")]
        handles = [
            block.register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0]), with_kwargs=True)
            for block in blocks
        ]
        found = hidden_states_of(model(**inputs, output_hidden_states=True))
        for handle in handles:
            handle.remove()
        again = PeftModel.from_pretrained(family.build(), tmp_path).eval()
        reloaded = hidden_states_of(again(**inputs, output_hidden_states=True))
    assert read
    for state in read:
        assert any(torch.equal(state, other) for other in found)
    assert all(torch.equal(a, b) for a, b in zip(found, reloaded, strict=True))


def test_vision_language_models_read_adapted_hidden_states(tmp_path):
    """LLaVA reads the hidden states of its vision tower: with hooks in the wrong order its logits are wrong."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llava",
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **small},
        text_config={"model_type": "llama", "vocab_size": 60, **small},
        image_token_id=59,
        vision_feature_layer=-2,
    )

    def build():
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config).eval()

    ids = torch.full((1, 8), 5)
    ids[:, 1:5] = 59
    torch.manual_seed(1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    base = build()
    with torch.no_grad():
        base(**inputs)
        model = get_peft_model(base, METHODS["pfeiffer"]())
        randomise(model)
        model.eval().save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build(), tmp_path).eval()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["bert", "roberta", "electra", "distilbert", "llama", "t5", "opt"])
def test_matrices_are_decayed(method, backbone, tmp_path):
    """Trainer exempts what lies inside a norm; matrices of an adapter are decayed wherever they act, as LoRA's are."""
    model = get_peft_model(BACKBONES[backbone].build(), METHODS[method]())
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True)
    decayed = Trainer(model, arguments).get_decay_parameter_names(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name for name, p in trained.items() if p.ndim >= 2 and not name.endswith(".biases")}  # one an expert
    assert matrices <= set(decayed)


@pytest.mark.parametrize("kind", ["PeftModel", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_one_adapter_name_for_each_row(kind, count):
    """Also where peft keeps the batch to itself."""
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

    cls = {"SEQ_CLS": BertForSequenceClassification, "TOKEN_CLS": BertForTokenClassification}.get(kind, BertModel)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = get_peft_model(
        cls(BertConfig(vocab_size=60, **sizes)), UniPELTConfig(task_type=None if kind == "PeftModel" else kind)
    ).eval()
    inputs = BACKBONES["bert"].inputs()
    for batch in ({"input_ids": inputs["input_ids"]}, {"inputs_embeds": torch.randn(3, 9, 32)}):
        with pytest.raises(ValueError, match="must have one name for each of the 3 rows"):
            model(**batch, adapter_names=["default"] * count)
    model(**inputs, adapter_names=["default"] * 3)


@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_generation_repeats_the_names_for_beams(backbone):
    task = "CAUSAL_LM" if backbone == "llama" else "SEQ_2_SEQ_LM"
    model = get_peft_model(BACKBONES[backbone].build(), METHODS["unipelt"](task_type=task)).eval()
    inputs = {k: v for k, v in BACKBONES[backbone].inputs().items() if k != "decoder_input_ids"}
    model.generate(**inputs, adapter_names=["default"] * 3, num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="must have one name for each of the 3 rows"):
        model.generate(**inputs, adapter_names=["default"] * 6, num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize("backbone", ["bert", "llama", "t5"])
def test_double_precision(backbone):
    for method in ("unipelt", "mam", "layer_prefix", "pfeiffer"):
        model = tuned(method, backbone).double()
        with torch.no_grad():
            assert output(model, BACKBONES[backbone].inputs()).dtype == torch.float64


class Logits(nn.Module):
    """What `torch.export` and `torch.jit.trace` can record: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return output(self.model, {"input_ids": ids, "attention_mask": mask}, return_dict=True)


@pytest.mark.parametrize(
    "method", ["unipelt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layer_prefix", "mam", "houlsby"))]
)
@pytest.mark.parametrize("backbone", ["bert", "distilbert"])
@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_recorded_with_dynamic_shapes(method, backbone, how):
    """A graph recorded from one batch is exact on batches of another size and length."""
    model, family = Logits(tuned(method, backbone)).eval(), BACKBONES[backbone]
    first, second = (family.inputs(batch=b, length=n) for b, n in ((2, 8), (3, 11)))
    first, second = ((x["input_ids"], x["attention_mask"]) for x in (first, second))
    with torch.no_grad():
        expected = model(*second)
        if how == "trace":
            recorded = torch.jit.trace(model, first, strict=False, check_trace=False)
        else:
            shape = {0: torch.export.Dim("batch", min=2, max=16), 1: torch.export.Dim("length", min=2, max=32)}
            recorded = torch.export.export(model, first, dynamic_shapes=(shape, shape), strict=False).module()
        torch.testing.assert_close(recorded(*second), expected, rtol=0, atol=1e-5)


def test_prefix_projection_over_two_devices():
    """The network that the layers share may lie on another device than a layer."""
    model = get_peft_model(BACKBONES["bert"].build(), METHODS["projected_prefix"]())
    layers = tuner_layers(model)
    prefixes = [layer.sublayer_of["default"] for layer in layers]
    assert prefixes[0].projection is prefixes[1].projection
    prefixes[1].last.to("meta")
    keys, values = prefixes[1].vectors()
    assert keys.device.type == values.device.type == "meta"
    assert prefixes[0].vectors()[0].device.type == "cpu"


@pytest.mark.parametrize("method", ["unipelt", "layer_prefix", "houlsby", "bitfit"])
def test_idle_adapters_are_not_visited(method):
    """A forward does not walk the adapters that are not active: the number of calls does not depend on them."""
    model, inputs = tuned(method, "llama"), BACKBONES["llama"].inputs()

    def calls():
        count = 0

        def profile(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        with torch.no_grad():
            output(model, inputs)  # whatever is done once
            sys.setprofile(profile)
            try:
                output(model, inputs)
            finally:
                sys.setprofile(None)
        return count

    alone = calls()
    for i in range(12):
        model.add_adapter(f"idle{i}", METHODS[method]())
    model.eval()
    assert abs(calls() - alone) < 10
