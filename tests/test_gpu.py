"""What only a GPU can show, on tiny models: bf16, NF4, torch.compile, replicas, threads and attention kernels.

Each against the same model in float32 on the CPU, or against the same model on the GPU without what is tried.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from hf_peft_ext import LadderConfig, TFewConfig

from .backbones import BACKBONES, output
from .methods import METHODS

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FAMILIES = ("bert", "llama", "t5")
EVERY = {**METHODS, "ladder": lambda **kw: LadderConfig(r=4, **kw), "tfew": TFewConfig}
TASK = {"bert": {}, "llama": {"task_type": "CAUSAL_LM"}, "t5": {"task_type": "SEQ_2_SEQ_LM"}}
WIDE = {  # a 4-bit block is 64 wide
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
}


def adapted(backbone, method, **sizes):
    model = get_peft_model(BACKBONES[backbone].build(**sizes), EVERY[method](**TASK[backbone]))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def plain(backbone):
    """Keywords that a plain forward pass takes."""
    return {} if backbone == "bert" else {"use_cache": False}


def inputs_for(backbone, device=DEVICE, **kwargs):
    return {key: value.to(device) for key, value in BACKBONES[backbone].inputs(**kwargs).items()}


def gradients(model, y):
    model.zero_grad()
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device)
    (y.float() * probe).mean().backward()
    # copies: Module.to moves gradients in place
    return {n: p.grad.float().cpu().clone() for n, p in model.named_parameters() if p.grad is not None}


def off(found, expected):
    """Norm of the difference, relative."""
    return ((found.float().cpu() - expected).norm() / expected.norm()).item()


def joined(found):
    return torch.cat([g.flatten() for g in found.values()])


# bf16


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("method", EVERY)
def test_float32_equals_the_cpu(method, backbone):
    """Logits and gradients in float32 are those of the CPU."""
    model = adapted(backbone, method)
    expected = output(model, inputs_for(backbone, "cpu"), **plain(backbone))
    wanted = gradients(model, expected)
    y = output(model.to(DEVICE), inputs_for(backbone), **plain(backbone))
    found = gradients(model, y)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-3, atol=1e-4)
    assert found.keys() == wanted.keys()
    assert off(joined(found), joined(wanted)) < 1e-3


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("method", EVERY)
def test_bf16(method, backbone):
    """In bf16 logits are as near to float32 as the base model's are, and gradients point the same way."""
    kwargs = plain(backbone)
    base = BACKBONES[backbone].build().bfloat16().float()
    with torch.no_grad():
        exact = output(base, inputs_for(backbone, "cpu"), **kwargs)
        noise = off(output(base.to(DEVICE, torch.bfloat16), inputs_for(backbone), **kwargs), exact)
    model = adapted(backbone, method).bfloat16().float()
    expected = output(model, inputs_for(backbone, "cpu"), **kwargs)
    wanted = gradients(model, expected)
    y = output(model.to(DEVICE, torch.bfloat16), inputs_for(backbone), **kwargs)
    found = gradients(model, y)
    assert y.dtype == torch.bfloat16
    assert off(y, expected) < 4 * noise + 0.01
    assert found.keys() == wanted.keys()
    assert all(g.isfinite().all() for g in found.values())
    assert torch.cosine_similarity(joined(found), joined(wanted), dim=0) > 0.97


# Quantized base models

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
NF4 |= {"bnb_4bit_use_double_quant": True}
PRECISIONS = {"NF4": NF4, "8-bit": {"load_in_8bit": True}}


@pytest.fixture
def quantized(tmp_path):
    """Loads a tiny model in 4 or 8 bits, the same at every call, prepared as peft says."""
    pytest.importorskip("bitsandbytes")

    def load(backbone, precision="NF4"):
        folder = tmp_path / "base"
        base = BACKBONES[backbone].build(**WIDE[backbone])
        if not folder.exists():
            base.save_pretrained(folder)
        config = BitsAndBytesConfig(**PRECISIONS[precision])
        model = type(base).from_pretrained(folder, quantization_config=config, device_map={"": DEVICE})
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    return load


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # of bitsandbytes: it computes in float16
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("method", EVERY)
def test_quantized_round_trip(method, backbone, precision, quantized, tmp_path):
    """Trained, evaluated, trained again, saved; reloaded on a fresh quantized model, the logits are equal."""
    kwargs, inputs = plain(backbone), inputs_for(backbone)
    model = get_peft_model(quantized(backbone, precision), EVERY[method](**TASK[backbone]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(2):
        found = gradients(model.train(), output(model, inputs, **kwargs))
        assert found
        assert all(g.isfinite().all() for g in found.values())
        optimizer.step()
        with torch.no_grad():
            seen.append(output(model.eval(), inputs, **kwargs))
    assert (seen[1] - seen[0]).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantized(backbone, precision), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(output(again, inputs, **kwargs), seen[1])


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("method", ["unipelt", "mam", "bitfit", "ladder", "tfew"])
def test_paged_optimizers(method, optimizer, quantized, tmp_path):
    """Trained by an optimizer whose states may go to the CPU; resumed from a checkpoint, the weights are equal."""
    rows = [{"input_ids": torch.tensor([3, 4, 5 + i, 6]), "labels": torch.tensor([3, 4, 5 + i, 6])} for i in range(8)]

    def trained(**kwargs):
        model = get_peft_model(quantized("llama"), EVERY[method](**TASK["llama"]))
        args = TrainingArguments(
            str(tmp_path / "runs"),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            optim=optimizer,
            report_to=[],
            disable_tqdm=True,
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        Trainer(model, args, train_dataset=rows).train(**kwargs)
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        assert any((weights[n] != before[n]).any() for n in weights)
        return weights

    full = trained()
    resumed = trained(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    for name, weight in full.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-2, atol=1e-4, msg=name)


# torch.compile


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # Inductor's advice about this GPU
@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("method", ["unipelt", "unipelt_paper", "mam", "houlsby", "layer_prefix", "bitfit"])
def test_compiles_as_one_graph(method, backbone):
    """By Inductor, without a graph break: outputs and gradients are those of the plain model."""
    inputs, kwargs = inputs_for(backbone), plain(backbone)
    model = adapted(backbone, method).to(DEVICE)
    expected = output(model, inputs, **kwargs)
    wanted = gradients(model, expected)
    torch._dynamo.reset()
    y = output(torch.compile(model, fullgraph=True), inputs, **kwargs)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    found = gradients(model, y)
    assert off(joined({n: found[n] for n in wanted}), joined(wanted)) < 1e-2


# Copies of a model, and threads


def replica(model):
    """A copy as DataParallel makes it, module by module, with adapters of zeros."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, copied in zip(modules, copies, strict=True):
        for name, child in module._modules.items():
            if child is not None:
                setattr(copied, name, copies[index[child]])
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                trained = parameter.requires_grad
                setattr(copied, name, torch.zeros_like(parameter) if trained else parameter.detach().clone())
        for name, buffer in module._buffers.items():
            setattr(copied, name, None if buffer is None else buffer.clone())
    return copies[0]


@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("method", ["unipelt", "mam", "bitfit", "pfeiffer"])
def test_a_replica_computes_with_its_own_weights(method, backbone):
    model = adapted(backbone, method).to(DEVICE)
    inputs, kwargs = inputs_for(backbone), plain(backbone)
    with torch.no_grad():
        expected = output(model, inputs, **kwargs)
        assert (output(replica(model), inputs, **kwargs) - expected).abs().max() > 1e-3
        assert torch.equal(output(model, inputs, **kwargs), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("method", ["unipelt", "mam", "bitfit", "pfeiffer"])
def test_data_parallel(method, backbone):
    """Two devices in one process give the outputs of one."""
    model = adapted(backbone, method).to(DEVICE)
    inputs = inputs_for(backbone, batch=4)
    kwargs = {**plain(backbone), "return_dict": False}
    with torch.no_grad():
        expected = model(**inputs, **kwargs)[0]
        found = nn.DataParallel(model, device_ids=[0, 1])(**inputs, **kwargs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("method", ["unipelt", "mam", "scaled_parallel", "ladder"])
def test_two_threads_on_one_model(method, backbone):
    """Each thread has a batch of its own, and gets the outputs that one thread alone gets."""
    model = adapted(backbone, method).to(DEVICE)
    kwargs = plain(backbone)
    batches = [{**inputs_for(backbone, padding=side, length=n), **kwargs} for side, n in (("right", 9), ("none", 14))]

    @torch.no_grad()  # autograd is switched for each thread
    def run(i):
        return output(model, batches[i])

    expected = [run(0), run(1)]
    with ThreadPoolExecutor(2) as pool:
        for i, found in enumerate(pool.map(run, [0, 1] * 30)):
            torch.testing.assert_close(found, expected[i % 2], rtol=1e-4, atol=1e-4)


# Attention kernels

KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("method", ["layer_prefix", "projected_prefix", "unipelt", "unipelt_paper", "mam"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's reasons why a kernel does not fit
def test_prefix_with_each_kernel(kernel, method, padding):
    """A kernel that takes the base model takes the prefix, with the values and gradients of eager attention."""
    sizes = {"hidden_size": 64, "num_key_value_heads": 2}
    inputs = inputs_for("llama", padding=padding)
    if padding == "none":
        del inputs["attention_mask"]
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    reference = adapted("llama", method, attention="eager", **sizes).bfloat16().float().to(DEVICE)
    expected = output(reference, inputs, use_cache=False)[seen]
    wanted = gradients(reference, expected)
    base = BACKBONES["llama"].build(attention="sdpa", **sizes).to(DEVICE, torch.bfloat16)
    if not takes(KERNELS[kernel], base, inputs):
        pytest.skip("this kernel does not take the base model either")
    model = adapted("llama", method, attention="sdpa", **sizes).to(DEVICE)
    model.load_state_dict(reference.state_dict())
    model.to(torch.bfloat16)
    with sdpa_kernel(KERNELS[kernel]):
        y = output(model, inputs, use_cache=False)[seen]
        found = gradients(model, y)
        assert off(y, expected.cpu()) < 0.03
        assert torch.cosine_similarity(joined(found), joined(wanted), dim=0) > 0.98


def takes(backend, model, inputs):
    """Whether this kernel alone suffices for a forward pass that is trained through."""
    try:
        with sdpa_kernel(backend):  # with gradients: some kernels take a mask, but give it none
            output(model, inputs, use_cache=False)
    except RuntimeError as error:
        if not re.search("No (available kernel|viable backend)", str(error)):
            raise
        return False
    return True
