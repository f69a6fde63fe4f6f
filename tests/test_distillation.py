"""Soft labels of a teacher and the trainers that distil them: against the formula, with padding, cached on disk."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorForSeq2Seq
from transformers import DataCollatorWithPadding as Padding

from hf_peft_ext import UniPELTConfig, load_backbone
from hf_peft_ext.trainers import AdapterSoftLabelTrainer, SoftLabelTrainer, soft_labels
from hf_peft_ext.trainers.distillation import DataCollatorForSoftLabels, soft_label_loss

from .backbones import BACKBONES, SPECIAL, VOCAB
from .methods import ALL, randomise
from .test_training import arguments, tokenizer

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fast tokenizer, using the `__call__` method:UserWarning"),
]
UNIPELT = {"bottleneck_size": 4, "num_virtual_tokens": 4}


def classifier(layers=2, seed=0, labels=3):
    config = BACKBONES["bert"].config | {"num_hidden_layers": layers, "vocab_size": VOCAB, "num_labels": labels}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **config, **SPECIAL))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def adapted(model, task_type="SEQ_CLS", seed=0, std=0.2):
    model = get_peft_model(model, UniPELTConfig(task_type=task_type, **UNIPELT))
    randomise(model, seed=seed, std=std)
    return model.eval()


def rows(count=24, labels=None):
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        ids = torch.randint(6, VOCAB, (4 + i % 5,), generator=generator).tolist()
        row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        made.append(row if labels is None else row | {"labels": labels(i, ids)})
    return made


def t5_rows(count=24):
    return rows(count, labels=lambda i, ids: [*ids[: 1 + i % 3], 2])


class Counted:
    """A collator that counts its calls."""

    def __init__(self, collate):
        self.collate, self.calls = collate, 0

    def __call__(self, batch):
        self.calls += 1
        return self.collate(batch)


def train(cls, folder, student, data, collate, **kwargs):
    options = {"max_steps": 60, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 10}
    config = kwargs.pop("peft_config", None)
    more = {"peft_config": config} if config else {}
    names = ("temperature", "gold_weight", "eval_dataset")
    more |= {name: kwargs.pop(name) for name in names if name in kwargs}
    made = cls(student, arguments(folder, **(options | kwargs)), train_dataset=data, data_collator=collate, **more)
    made.train()
    return made, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def agreement(teacher, student, batch):
    with torch.no_grad():
        return (teacher(**batch).logits.argmax(-1) == student.eval()(**batch).logits.argmax(-1)).float().mean().item()


# the loss


def test_formula():
    """T^2 KL of two softmaxes, by torch's own function; with k classes of the teacher by a loop."""
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    values, classes = teacher.topk(7)
    expected = 4 * torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(soft_label_loss(student, values, classes, 2.0), expected)
    values, classes = teacher.topk(3)
    total = 0.0
    for i in range(5):
        p, q = (values[i] / 0.5).softmax(0), (student[i] / 0.5).softmax(0)
        total += sum(p[j] * (p[j].log() - q[classes[i, j]].log()) for j in range(3)).item()
    assert soft_label_loss(student, values, classes, 0.5).item() == pytest.approx(0.25 * total / 5, rel=1e-5)


# soft labels


@pytest.mark.parametrize("top_k", [None, 2])
def test_computed_once(top_k, tmp_path):
    """Logits of a teacher with an adapter, as it gives them row by row; a second call reads them."""
    teacher, data, collate = adapted(classifier()), rows(), Counted(Padding(tokenizer()))
    made = soft_labels(teacher, data, tmp_path, collate, top_k, batch_size=5)
    assert collate.calls == 5
    again = soft_labels(teacher.train(), data, tmp_path, collate, top_k, batch_size=7)
    assert collate.calls == 5
    assert teacher.training
    teacher.eval()
    assert len(made) == len(again) == 24
    for i in (0, 11, 23):
        with torch.no_grad():
            logits = teacher(**{name: torch.tensor([value]) for name, value in data[i].items()}).logits
        values, classes = logits.topk(top_k or 3)
        torch.testing.assert_close(made[i]["teacher_logits"], values)
        assert torch.equal(again[i]["teacher_classes"], classes)
        assert again[i]["input_ids"] == data[i]["input_ids"]


def test_other_inputs_are_refused(tmp_path):
    """Soft labels of other rows, of another teacher or of another k are never read."""
    teacher, collate = classifier(), Padding(tokenizer())
    soft_labels(teacher, rows(), tmp_path, collate)
    with pytest.raises(ValueError, match=r"`folder` \(=.*\) holds a run with another rows"):
        soft_labels(teacher, rows(23), tmp_path, collate)
    with pytest.raises(ValueError, match="holds a run with another teacher"):
        soft_labels(adapted(classifier()), rows(), tmp_path, collate)
    with pytest.raises(ValueError, match="holds a run with another top_k"):
        soft_labels(teacher, rows(), tmp_path, collate, top_k=1)


@pytest.mark.parametrize("kind", ["plain", "adapter", "4-bit"])
def test_padding_counts_nothing(kind, tmp_path):
    """Sequence to sequence: the loss of a padded batch is the mean over its rows' labels, each row computed alone."""
    BACKBONES["t5"].build(d_model=64, d_kv=16, d_ff=128).save_pretrained(tmp_path / "teacher")
    teacher = load_backbone(tmp_path / "teacher", 4 if kind == "4-bit" else None, task_type="SEQ_2_SEQ_LM")
    teacher = adapted(teacher, "SEQ_2_SEQ_LM") if kind == "adapter" else teacher
    student, collate = BACKBONES["t5"].build(), DataCollatorForSeq2Seq(tokenizer())
    data = soft_labels(teacher, t5_rows(6), tmp_path / "labels", collate, top_k=8, batch_size=4)
    args = arguments(tmp_path, remove_unused_columns=False)
    made = SoftLabelTrainer(student, args, train_dataset=data, data_collator=collate)
    student.eval()
    with torch.no_grad():
        together = made.compute_loss(student, made.data_collator([data[i] for i in range(6)]))
        alone = [made.compute_loss(student, made.data_collator([data[i]])) for i in range(6)]
    lengths = torch.tensor([len(row["labels"]) for row in t5_rows(6)])
    expected = (torch.stack(alone) * lengths).sum() / lengths.sum()
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    assert data[5]["teacher_logits"].shape == (lengths[5], 8)


def test_generated_sequences(tmp_path):
    """Unlabelled rows get the teacher's greedy sequences as labels, with its logits for them."""
    teacher, collate = BACKBONES["t5"].build(), DataCollatorForSeq2Seq(tokenizer())
    data = soft_labels(teacher, rows(6), tmp_path, collate, generate={"max_new_tokens": 5, "do_sample": False})
    for i in range(6):
        ids = torch.tensor([data.rows[i]["input_ids"]])
        with torch.no_grad():
            tokens = teacher.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, 1:].tolist()
        assert data[i]["labels"] == [token for token in tokens if token != 0]
        assert data[i]["teacher_classes"][:, 0].tolist() == data[i]["labels"]  # greedy: the highest logit


# training


@pytest.mark.parametrize("method", [None, "unipelt", "tfew", "ladder"])
def test_a_student_learns_from_unlabelled_rows(method, tmp_path):
    """Trained fully or by an adapter, the student comes to agree with its teacher; else nothing is trained."""
    teacher, collate = adapted(classifier(), std=0.5), Padding(tokenizer())
    data = soft_labels(teacher, rows(), tmp_path / "labels", collate)
    student = classifier(layers=2, seed=1)
    before = {name: p.clone() for name, p in student.named_parameters()}
    cls, config = (
        (SoftLabelTrainer, None) if method is None else (AdapterSoftLabelTrainer, ALL[method](task_type="SEQ_CLS"))
    )
    rate = 1e-3 if method is None else 1e-2
    made, losses = train(
        cls, tmp_path, student, data, collate, peft_config=config, temperature=1.0, learning_rate=rate
    )
    assert losses[-1] < 0.7 * losses[0]
    changed = [n for n, p in student.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert bool(changed) == (method is None)
    batch = collate([dict(row) for row in rows()])
    if method is None:
        assert agreement(teacher, made.model, batch) > 0.8


def test_sequence_to_sequence(tmp_path):
    """A T5 with UniPELT learns its teacher's distributions, with accumulated batches and rows of many lengths."""
    teacher, collate = adapted(BACKBONES["t5"].build(), "SEQ_2_SEQ_LM", std=0.5), DataCollatorForSeq2Seq(tokenizer())
    data = soft_labels(teacher, t5_rows(), tmp_path / "labels", collate)
    config = UniPELTConfig(task_type="SEQ_2_SEQ_LM", **UNIPELT)
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    student = BACKBONES["t5"].build()
    _, losses = train(AdapterSoftLabelTrainer, tmp_path, student, data, collate, peft_config=config, **accumulated)
    assert losses[-1] < 0.9 * losses[0]


def test_gold_labels(tmp_path):
    """The loss is the weighted sum of both terms; evaluation rows without soft labels have the model's own loss."""
    gold = rows(labels=lambda i, ids: i % 3)
    teacher, student, collate = classifier(), classifier(seed=1), Padding(tokenizer())
    data = soft_labels(teacher, gold, tmp_path / "labels", collate)
    made = SoftLabelTrainer(student, arguments(tmp_path), train_dataset=data, data_collator=collate, gold_weight=0.25,
                            eval_dataset=Dataset.from_list(gold))  # fmt: skip
    batch = DataCollatorForSoftLabels(collate)([data[i] for i in range(8)])
    with torch.no_grad():
        outputs = student(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        soft = soft_label_loss(outputs.logits, batch["teacher_logits"], batch["teacher_classes"], 2.0)
        torch.testing.assert_close(made.compute_loss(student, batch), 0.75 * soft + 0.25 * outputs.loss)
        every = collate([dict(row) for row in gold])
        assert made.evaluate()["eval_loss"] == pytest.approx(student(**every).loss.item(), rel=1e-4)


# bad input


def test_refuses(tmp_path):
    """Wrong teachers, rows and numbers are errors that name them."""
    collate, teacher = Padding(tokenizer()), classifier()
    with pytest.raises(ValueError, match=r"`top_k` \(=-1\) must be a positive whole number"):
        soft_labels(teacher, rows(), tmp_path, collate, top_k=-1)
    with pytest.raises(ValueError, match=r"`rows` \(=0\) must have at least one row"):
        soft_labels(teacher, [], tmp_path, collate)
    with pytest.raises(ValueError, match=r"`teacher` \(='LlamaForCausalLM'\) must be a classifier or a sequence-to-"):
        soft_labels(BACKBONES["llama"].build(), rows(), tmp_path / "a", collate)
    unlabelled = {"decoder_input_ids": [0, 5, 6]}
    with pytest.raises(ValueError, match=r"`rows` \(=\[.*\]\) must have `labels`, or `generate` must be set"):
        soft_labels(BACKBONES["t5"].build(), [row | unlabelled for row in rows(1)], tmp_path / "b", collate)
    data = soft_labels(teacher, rows(), tmp_path / "c", collate)
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"`num_classes` \(=3\) must be the student's, 4: a teacher with the same"):
        SoftLabelTrainer(classifier(labels=4), args, train_dataset=data, data_collator=collate)
    with pytest.raises(TypeError, match=r"`train_dataset` \(=list\) must be the result of `soft_labels`"):
        SoftLabelTrainer(classifier(), args, train_dataset=rows(), data_collator=collate)
    for name, value, rule in (("temperature", 0, "a positive number"), ("gold_weight", 2, r"lie in \[0, 1\]")):
        with pytest.raises(ValueError, match=rf"`{name}` \(={value}\) must (be )?{rule}"):
            SoftLabelTrainer(classifier(), args, train_dataset=data, data_collator=collate, **{name: value})
    made = SoftLabelTrainer(classifier(), args, train_dataset=data, data_collator=collate, gold_weight=0.5)
    with pytest.raises(ValueError, match="must have labels for `gold_weight`"):
        made.train()


# TRL, for causal models


# 2026-11: TRL's own default for an argument that transformers renames
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("bits", [None, 4], ids=["float32 teacher", "4-bit teacher"])
def test_causal_models_by_trl(bits, tmp_path):
    """TRL's DistillationTrainer trains our adapter alone, towards a teacher with an adapter, in 4 bits or not."""
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "DistillationTrainer"):
        pytest.skip("this version of TRL has it among its experiments")
    wide = {"hidden_size": 64, "intermediate_size": 128}
    BACKBONES["llama"].build(**wide).save_pretrained(tmp_path / "teacher")
    teacher = adapted(load_backbone(tmp_path / "teacher", bits), "CAUSAL_LM")
    student = BACKBONES["llama"].build()
    before = {name: p.clone() for name, p in student.named_parameters()}
    args = trl.DistillationConfig(
        **{"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False},
        **{"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 8, "logging_steps": 1},
        **{"max_completion_length": 6, "save_strategy": "no", "gradient_checkpointing": False, "beta": 0.0},
    )
    data = Dataset.from_dict({"prompt": [" ".join(f"w{(i + j) % 9}" for j in range(3 + i % 3)) for i in range(64)]})
    made = trl.DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer(),
        peft_config=UniPELTConfig(task_type="CAUSAL_LM", **UNIPELT),
    )  # fmt: skip
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    parameters = dict(made.model.named_parameters())
    assert all(torch.equal(parameters[f"base_model.model.{name}"], p) for name, p in before.items())
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if ".sublayer_of." in n}
