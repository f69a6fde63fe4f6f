"""Exports adapters as plain LoRA: exactly where a LoRA equals them, else by distillation."""

from hf_peft_ext.export.conversion import convert_to_lora as convert_to_lora
from hf_peft_ext.export.distil import DistillationSettings as DistillationSettings
from hf_peft_ext.export.fidelity import Fidelity as Fidelity
from hf_peft_ext.export.report import Export as Export
from hf_peft_ext.export.to_lora import to_lora as to_lora
