"""Malformed adapters: each one that hypothesis makes out of a good one is refused by load_adapter with a ValueError,
in less than two seconds and 200 MB, and the base model is what it was.

Every mutation is malformed by construction. The slow test runs 10,000 of them and prints how many of which kind.
"""

import json
import os
import re
import resource
import struct
import time
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PrefixTuningConfig, TrainableTokensConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_peft_ext import BottleneckConfig, ComposedConfig, Placement, UniPELTConfig, load_adapter

from .backbones import BACKBONES
from .saved_adapters import CONFIG, WEIGHTS, fingerprint

SECONDS, MEGABYTES = 2, 200
QV = ["q_proj", "v_proj"]
ADAPTERS = {
    "lora": lambda: LoraConfig(r=2, target_modules=QV),
    "lora_whole": lambda: LoraConfig(
        r=2, target_modules=QV, modules_to_save=["lm_head"], rank_pattern={"v_proj": 3}, use_dora=True
    ),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix_tuning": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "trainable_tokens": lambda: TrainableTokensConfig(token_indices=[1, 2, 3]),
    "bottleneck": lambda: BottleneckConfig(r=2),
    "unipelt": lambda: UniPELTConfig(r=2, bottleneck_size=3, num_virtual_tokens=2),
    "composed": lambda: ComposedConfig(
        placements=[Placement("low_rank", "query", gate="token", options={"r": 2}), Placement("bias", "bias")]
    ),
}


def base_model():
    return BACKBONES["llama"].build(num_hidden_layers=1)


@dataclass
class Files:
    """The files of an adapter, while they are being broken.

    Args:
        config: the JSON object of the config.
        header: that of the weights.
        data: what follows it.
        config_text, header_text, whole: bytes to write instead, if not None.
    """

    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes
    config_text: bytes | None = None
    header_text: bytes | None = None
    whole: bytes | None = None

    @classmethod
    def read(cls, folder: Path) -> "Files":
        whole = (folder / WEIGHTS).read_bytes()
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8:end])
        header.pop("__metadata__", None)  # what stands there may be anything
        return cls(json.loads((folder / CONFIG).read_text()), header, whole[end:])

    def copy(self) -> "Files":
        return Files(json.loads(json.dumps(self.config)), json.loads(json.dumps(self.header)), self.data)

    def weights(self) -> bytes:
        if self.whole is not None:
            return self.whole
        text = json.dumps(self.header).encode() if self.header_text is None else self.header_text
        return struct.pack("<Q", len(text)) + text + self.data

    def write(self, folder: Path) -> None:
        text = json.dumps(self.config).encode() if self.config_text is None else self.config_text
        for name, content in ((CONFIG, text), (WEIGHTS, self.weights())):
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(content)


# Values that no field takes, whatever its type; nested ones are too deep, or hold what is too large
JUNK = st.one_of(
    st.integers(2**20 + 1, 2**80) | st.integers(-(2**80), -(2**20) - 1),
    st.integers(5, 60).map(lambda depth: json.loads("[" * depth + "]" * depth)),
    st.just("long").map(lambda _: "q" * 40_000),
    st.just("wide").map(lambda _: [1] * 5000),
    st.dictionaries(st.sampled_from(["a", "r", "__class__"]), st.just({"x": [2**90]}), min_size=1),
    st.floats(min_value=1e7, max_value=1e300),
)
# Fields of one adapter or more, and values that are none of theirs
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "r": st.sampled_from(["2", 2.0, [2], {}, True, 0, -1, -(2**19), 1, 3, 7, 2**20]),
    "lora_alpha": st.sampled_from(["2", [2], {}, True]),
    "lora_dropout": st.sampled_from(["0", [0.0], None, True, -1.0, 1.5, 2]),
    "target_modules": st.sampled_from([3, 1.5, True, [1], [["q_proj"]], {"q_proj": 1}, ["nosuch"], "nosuch", "("])
    | st.text("({[*+?|\\^$", min_size=1, max_size=30).map(lambda text: "(" + text),
    "modules_to_save": st.sampled_from([3, "lm_head", [3], {}, ["(.*)*"], ["nosuch", ""], ["model layers"]]),
    "feedforward_modules": st.sampled_from([3, [3], {"a": 1}, "(", True]),
    "rank_pattern": st.sampled_from([3, "x", [1], {"(": 2}, {"q_proj": 5}, {"q_proj": "a"}, {"q_proj": {}}]),
    "use_dora": st.sampled_from([1, "true", None, [], {}]),
    "inference_mode": st.sampled_from([1, "true", None, []]),
    "task_type": st.sampled_from([1, "NO_SUCH_TASK", [], True, {}]),
    "num_virtual_tokens": st.sampled_from([0, -3, "3", 3.0, None, True, 1, 5, 2**20]),
    "num_layers": st.sampled_from([0, -1, 2, 2**20, "1", 1.0, True]),
    "token_dim": st.sampled_from([0, -1, 7, 2**20, "16", 16.0]),
    "token_indices": st.sampled_from([3, "1", [1, 2], [1, 2, 60], [1, 2, -100], ["a"], [1.0, 2, 3], {}]),
    "bottleneck_size": st.sampled_from([0, -3, "3", 3.0, None, True, 4, 2**20]),
    "methods": st.sampled_from([3, "lora", [], ["nosuch"], [["lora"]], ["lora", "lora"], ["lora"], {}]),
    "gate_pooling": st.sampled_from([3, "max", None, [], True]),
    "layers_to_transform": st.sampled_from(["0", [1], [-1], 1, -1, [0.0], {}, [[0]], 99]),
    "sites": st.sampled_from([3, "query", [], {"nosuch": ["q_proj"]}, {"query": 3}, {"query": "("}, {"query": ["x"]}]),
    "style": st.sampled_from([3, "nosuch", None, ["houlsby"], "houlsby"]),
    "placements": st.sampled_from(
        [
            *(3, "x", {}, [], [3], [{}], [[[]]], [{"sublayer": "bias"}], [{"sublayer": [], "site": {}}]),
            [{"sublayer": "bias", "site": "bias"}] * 2,
            [{"sublayer": "bias", "site": "bias", "options": {"r": 1}}],
            [{"sublayer": "low_rank", "site": "query", "options": {"r": "2"}}],
            [{"sublayer": "bottleneck", "site": "after_ffn", "options": {"r": 2, "activation": []}}],
        ]
    ),
    "peft_type": st.sampled_from([3, None, [], {}, "XLORA", "lora", "POLY"]) | st.text(max_size=20),
    "peft_version": st.sampled_from([3, [], {}, True]),
    "base_model_name_or_path": st.sampled_from([3, [], {}, True]),
    "auto_mapping": st.sampled_from([3, [], "x", True]),
    "bias": st.sampled_from(["all", "lora_only", None, 3, [], True]),
    "init_lora_weights": st.sampled_from(["pissa", "olora", "loftq", "pissa_niter_4", 3, [], None, "corda"]),
    "layer_replication": st.sampled_from([[[0, 1]] * 40, 3, "x", [[0]], [3]]),
    "megatron_core": st.sampled_from(["os", "subprocess", 3, []]),
    "fan_in_fan_out": st.sampled_from([1, "true", None, []]),
}


def wrong_field(draw, files):
    names = sorted(WRONG.keys() & files.config.keys())
    name = draw(st.sampled_from(names))
    value = draw(WRONG[name])
    if name == "peft_type" and value in [t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING]:
        value = f"{value}_"
    files.config[name] = value


def junk_field(draw, files):
    files.config[draw(st.sampled_from(sorted(files.config)))] = draw(JUNK)


def unknown_field(draw, files):
    known = {f.name for f in fields(PEFT_TYPE_TO_CONFIG_MAPPING[files.config["peft_type"]])} | {"runtime_config"}
    values = st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | JUNK
    said = values.filter(lambda v: v is not None and v is not False and v not in ("", {}, []))  # let through
    files.config[draw(st.text(max_size=300).filter(lambda name: name not in known))] = draw(said)


def no_number(draw, files):
    text, name = json.dumps(files.config), draw(st.sampled_from(sorted(files.config)))
    word = draw(
        st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 5000, "0x10", "1_000", "01"])
    )
    files.config_text = text.replace(f'"{name}": ', f'"{name}": {word}, "peft_version": ', 1).encode()


def broken_json(draw, files):
    text = json.dumps(files.config).encode()
    files.config_text = draw(
        st.one_of(
            st.integers(0, len(text) - 1).map(lambda end: text[:end]),
            st.binary(max_size=64),
            st.sampled_from([b"[" * 200_000, b'{"a":' * 50_000, b"[]", b"3", b"null", b'"x"', b" " * 300_000]),
            st.just(text[:-1] + b', "peft_type": "LORA"}'),
            st.binary(min_size=1, max_size=9).map(lambda tail: text + b"}" + tail),
            st.just(b"\xff\xfe" + text),
        )
    )


def missing_type(draw, files):
    del files.config["peft_type"]


def wrong_length(draw, files):
    """The eight bytes in front say another length than the header has."""
    whole = files.weights()
    length = struct.unpack("<Q", whole[:8])[0]
    near = st.integers(-9, 9).map(lambda d: max(length + d, 0)) | st.integers(0, len(whole) + 9)
    other = draw((near | st.integers(0, 2**64 - 1) | st.just(2**64 - 1)).filter(lambda n: n != length))
    files.whole = struct.pack("<Q", other) + whole[8:]


def truncated(draw, files):
    whole = files.weights()
    files.whole = whole[: draw(st.integers(0, len(whole) - 1))]


def trailing(draw, files):
    files.data += draw(st.binary(min_size=1, max_size=99))


def random_bytes(draw, files):
    files.whole = draw(st.binary(max_size=300))


def flipped_byte(draw, files):
    """One character of the header becomes another; nothing there is without meaning."""
    text = json.dumps(files.header, separators=(",", ":")).encode()
    at = draw(st.integers(0, len(text) - 1))
    to = draw(st.integers(33, 255).filter(lambda byte: byte != text[at]))
    files.header_text = text[:at] + bytes([to]) + text[at + 1 :]


def one_key(draw, files):
    return draw(st.sampled_from(sorted(files.header)))


def renamed_key(draw, files):
    key, entry = one_key(draw, files), None
    entry = files.header.pop(key)
    name = (
        st.text(max_size=40) | st.just(key + ".x") | st.just(key.removeprefix("base_model.")) | st.just("k" * 99_999)
    )
    files.header[draw(name.filter(lambda name: name not in {key, *files.header, "__metadata__"}))] = entry


def missing_key(draw, files):
    del files.header[one_key(draw, files)]


def extra_key(draw, files):
    """One more tensor, sound in itself."""
    target = draw(
        st.sampled_from(["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
        | st.text(max_size=40)
    )
    key = draw(st.sampled_from(["", "base_model.model.", "base_model."])) + target
    if key in files.header or key == "__metadata__":
        key += ".base_layer"
    n = draw(st.integers(0, 4))
    files.header[key] = {"dtype": "F32", "shape": [n], "data_offsets": [len(files.data), len(files.data) + 4 * n]}
    files.data += bytes(4 * n)


def repeated_key(draw, files):
    key = one_key(draw, files)
    text = json.dumps(files.header)
    entry = files.header[draw(st.sampled_from(sorted(files.header)))]
    files.header_text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(entry)}}}".encode()


def wrong_dtype(draw, files):
    known = ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E5M2", "C64"]  # other sizes, or no floats
    files.header[one_key(draw, files)]["dtype"] = draw(
        st.sampled_from(known) | st.text(max_size=9).filter(lambda name: name != "F32") | st.just(3) | st.none()
    )


def wrong_integer_type(draw, files):
    """The same number of bytes, and sound in itself."""
    files.header[one_key(draw, files)]["dtype"] = draw(st.sampled_from(["I32", "U32"]))


def wrong_shape(draw, files):
    entry = files.header[one_key(draw, files)]
    shape = list(entry["shape"])
    sizes = st.lists(st.integers(0, 2**62) | st.integers(0, 70), max_size=5)
    swapped = st.just(shape[::-1]) | st.just([*shape, 1]) | st.just([1, *shape]) | st.just([-n for n in shape])
    junk = st.sampled_from([3, None, "8", [[8]], ["8"], [8.5], [True, "x"], [1] * 3000, [2**64]])
    entry["shape"] = draw((sizes | swapped | junk).filter(lambda other: other != shape))


def wrong_offsets(draw, files):
    """Overlapping, out of order, with holes, beyond the end, negative, or no offsets."""
    entry = files.header[one_key(draw, files)]
    begin, end = entry["data_offsets"]
    shifted = st.integers(1, 64).flatmap(
        lambda by: st.sampled_from(
            [[begin + by, end + by], [begin - by, end - by], [begin, end + by], [begin + by, end]]
        )
    )
    pairs = st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 4096), min_size=2, max_size=2)
    junk = st.sampled_from([[], [begin], [begin, end, end], None, "0", [end, begin], ["a", "b"], [0.5, 1.5], {}])
    entry["data_offsets"] = draw((shifted | pairs | junk).filter(lambda other: other != [begin, end]))


def wrong_entry(draw, files):
    junk = st.sampled_from([None, 3, "x", [], {}, {"dtype": "F32"}, [["F32"]], {"shape": [], "dtype": "F32"}])
    files.header[one_key(draw, files)] = draw(junk)


def wrong_metadata(draw, files):
    files.header["__metadata__"] = draw(st.sampled_from([3, [], "x", {"a": 1}, {"a": {"b": "c"}}, {"a": ["b"]}]))


def broken_header(draw, files):
    bombs = [b"[" * 1_000_000, b'{"a":' * 100_000, b"{}", b"null", b"", b" " * 100, b'{"a":1}' * 9, b"[]," * 999_999]
    files.header_text = draw(st.sampled_from(bombs) | st.binary(max_size=99))


def bad_value(draw, files):
    """NaN, an infinity, or a number that half precision does not reach, anywhere in the data."""
    at = 4 * draw(st.integers(0, len(files.data) // 4 - 1))
    value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38]) | st.floats(1e5, 3e38))
    files.data = files.data[:at] + struct.pack("<f", value) + files.data[at + 4 :]


IN_FILES = [
    *(wrong_field, wrong_field, wrong_field, junk_field, unknown_field, no_number, broken_json, missing_type),
    *(wrong_length, truncated, trailing, random_bytes, flipped_byte, renamed_key, missing_key, extra_key),
    *(repeated_key, wrong_dtype, wrong_integer_type, wrong_shape, wrong_offsets, wrong_entry, wrong_metadata),
    *(broken_header, bad_value),
]


# Mutations of the folder itself


def link(draw, folder):
    name = draw(st.sampled_from([CONFIG, WEIGHTS]))
    (folder / name).unlink()
    target = draw(
        st.sampled_from(["/dev/zero", "/dev/null", "/dev/random", name, "nowhere", "/", "..", "/proc/self/mem"])
    )
    os.symlink(target, folder / name)


def not_a_file(draw, folder):
    path = folder / draw(st.sampled_from([CONFIG, WEIGHTS]))
    path.unlink()
    if draw(st.booleans()):
        os.mkfifo(path)


def pickled(draw, folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def swapped_files(draw, folder):
    content = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(content)


# No key of a module, no folder of its own, or an attribute of a ModuleDict
BAD_NAMES = st.one_of(
    st.text(max_size=300).filter(lambda name: not re.fullmatch(r"[^./\\\x00-\x1f]{1,200}", name)),
    st.sampled_from(["keys", "items", "forward", "training", "_modules", "__class__"]),
)
IN_FOLDER = [link, not_a_file, pickled, swapped_files]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The good adapters, which load."""
    found = {}
    for name, make in ADAPTERS.items():
        folder = tmp_path_factory.mktemp(name)
        get_peft_model(base_model(), make()).save_pretrained(folder)
        found[name] = Files.read(folder)
        found[name].write(folder)
        load_adapter(base_model(), folder)
    return found


@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_malformed_adapters_are_refused(count, sound, tmp_path, capsys):
    base = base_model()
    before = fingerprint(base)
    kinds, slowest, peak = Counter(), 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def refused(data):
        nonlocal base, slowest
        files, name = sound[data.draw(st.sampled_from(sorted(sound)))].copy(), "default"
        mutate = data.draw(st.sampled_from([*IN_FILES, *IN_FOLDER, None]))
        for path in tmp_path.iterdir():
            path.unlink()
        if mutate in IN_FILES:
            mutate(data.draw, files)
        files.write(tmp_path)
        if mutate in IN_FOLDER:
            mutate(data.draw, tmp_path)
        elif mutate is None:
            name = data.draw(BAD_NAMES)
        start = time.process_time()
        try:
            load_adapter(base, tmp_path, name)
        except ValueError:
            pass
        else:
            base = base_model()  # for the next, as hypothesis makes the case smaller
            pytest.fail("was loaded")
        slowest = max(slowest, time.process_time() - start)
        assert slowest < SECONDS
        assert fingerprint(base) == before
        kinds[mutate.__name__ if mutate else "adapter_name"] += 1

    refused()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    with capsys.disabled():
        print(f"\n{kinds.total()} malformed adapters refused, the slowest in {slowest:.2f} s, in {grown:.0f} MB:")
        print(", ".join(f"{kind} {number}" for kind, number in kinds.most_common()))
    assert kinds.total() >= count
    assert grown < MEGABYTES
