"""A language model's exported LoRA where this package is not imported: in peft, in transformers, and in llama.cpp.

The exact one answers as the adapter does; the distilled one is as far from it as `to_lora` measured.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hf_peft_ext import to_lora
from hf_peft_ext.export import DistillationSettings

from .methods import METHODS, randomise
from .test_to_lora import low_rank

FEW = DistillationSettings(steps=10, batch_size=8, learning_rate=3e-3, fit_rows=16)
WORDS = "where is my parcel it has not arrived yet you charged the card twice please send money back".split()
TEXTS = [" ".join(WORDS[i : i + 4] + WORDS[: i % 5]) for i in range(len(WORDS))]
CONFIGS = {"exact": low_rank, "unipelt": METHODS["unipelt"]}
LENGTH = 8  # generated tokens


def llama_tokenizer():
    """A tiny tokenizer of the kind that Llama 2 has: BPE with bytes for what it does not know."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    raw.decoder = decoders.Sequence([*parts])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, the LoRAs of two adapters, and what the adapters themselves answer."""
    path, tokenizer = tmp_path_factory.mktemp("served"), llama_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, **sizes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, None, 2
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    held_out = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS[::10]]
    (path / "prompts.json").write_text(json.dumps([ids.tolist() for ids in held_out]))
    answers = {}
    for name, config in CONFIGS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path / "base"), config(task_type="CAUSAL_LM"))
        randomise(model, std=0.1)
        model.eval()
        options = {"texts": TEXTS, "tokenizer": tokenizer, "settings": FEW}
        export = to_lora(model, path / name, r=16, progress=None, **options)
        tokenizer.save_pretrained(path / name)
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0] for ids in held_out]
            greedy = model.generate(input_ids=held_out[0], max_new_tokens=LENGTH, do_sample=False)[0].tolist()
        answers[name] = {"exact": export.exact, "kl": export.fidelity.kl, "logits": logits, "greedy": greedy}
    return path, answers


ALONE = f"""
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
rows = [torch.tensor(row) for row in json.loads((folder / "prompts.json").read_text())]

def read(part):
    return AutoModelForCausalLM.from_pretrained(folder / part).eval()

def answers(model):
    logits = [model(input_ids=row).logits[0].tolist() for row in rows]
    return logits, model.generate(input_ids=rows[0], max_new_tokens={LENGTH}, do_sample=False)[0].tolist()

def ways(name):
    model = PeftModel.from_pretrained(read("base"), folder / name).eval()
    yield "peft", answers(model)
    model.merge_and_unload().save_pretrained(folder / f"{{name}}-merged")
    AutoTokenizer.from_pretrained(folder / name).save_pretrained(folder / f"{{name}}-merged")
    yield "merged", answers(read(f"{{name}}-merged"))
    yield "transformers", answers(read(name))  # from_pretrained reads a folder of an adapter, too
    model = read("base")
    model.load_adapter(folder / name)
    yield "load_adapter", answers(model)

with torch.no_grad():
    results = {{name: dict(ways(name)) for name in sys.argv[2:]}}
results["ours"] = [module for module in sys.modules if module.startswith("hf_peft_ext")]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def alone(folder):
    """What each LoRA answers in a process with peft alone, by the way it was loaded."""
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(folder[0]), *CONFIGS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder[0])
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["ours"] == []
    return results


@pytest.mark.parametrize("name", CONFIGS)
def test_without_this_package(folder, alone, name):
    """peft, a merged model and transformers' own adapters agree; so they do with the adapter, where it is exact."""
    expected, results = folder[1][name], alone[name]
    assert {*results} == {"peft", "merged", "transformers", "load_adapter"}
    logits = {way: [torch.tensor(row) for row in rows] for way, (rows, _) in results.items()}
    for way, rows in logits.items():
        torch.testing.assert_close(rows, logits["peft"], rtol=1e-4, atol=5e-5, msg=way)
        assert results[way][1] == results["peft"][1]
    if name == "exact":
        assert expected["exact"]
        torch.testing.assert_close(logits["peft"], expected["logits"], rtol=1e-4, atol=5e-5)
        assert results["peft"][1] == expected["greedy"]
    log_p, log_q = (torch.cat(rows).log_softmax(-1) for rows in (expected["logits"], logits["peft"]))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert kl == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)  # as measured before it was written


LLAMA_CPP = os.environ.get("LLAMA_CPP")  # a folder with llama.cpp's two scripts


def served(model, prompt, lora=None):
    """The tokens that llama.cpp's server generates greedily after a prompt of tokens."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(model), 64, 1, False
    params.cpuparams.n_threads = 1
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    body = {"prompt": prompt, "n_predict": LENGTH, "temperature": 0.0, "return_tokens": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


@pytest.fixture(scope="module")
def converted(folder, alone):
    """GGUF files of the base model, of the merged models and of the LoRAs, by llama.cpp's own scripts."""
    pytest.importorskip("gguf")
    path, files = folder[0], {}
    for part in ("base", *(f"{name}-merged" for name in CONFIGS), *CONFIGS):
        kind, options = ("lora", ["--base", path / "base"]) if part in CONFIGS else ("hf", [])
        files[part] = path / f"{part}.gguf"
        script = Path(str(LLAMA_CPP)) / f"convert_{kind}_to_gguf.py"
        command = [sys.executable, script, "--outtype", "f32", *options, "--outfile", files[part], path / part]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return files


@pytest.mark.slow
@pytest.mark.skipif(LLAMA_CPP is None, reason="LLAMA_CPP names no folder with llama.cpp's scripts")
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp(folder, alone, converted, name):
    """Converted to GGUF, as a merged model and as a LoRA beside the base, it keeps its weights and its answers."""
    merged, (logits, greedy) = converted[f"{name}-merged"], alone[name]["peft"]
    prompt = json.loads((folder[0] / "prompts.json").read_text())[0]
    read = AutoModelForCausalLM.from_pretrained(
        merged.parent,
        gguf_file=merged.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    with torch.no_grad():
        actual = read(input_ids=torch.tensor(prompt)).logits[0]
    torch.testing.assert_close(actual, torch.tensor(logits[0]), rtol=1e-4, atol=5e-5)
    answer = greedy[len(prompt[0]) :]
    assert served(merged, prompt[0]) == answer
    assert served(converted["base"], prompt[0], converted[name]) == answer
