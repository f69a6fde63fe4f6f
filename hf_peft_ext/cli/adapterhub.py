"""`hf-peft-ext import-adapterhub`: an adapter of AdapterHub's library, saved as one of peft."""

import json
from pathlib import Path
from typing import Any

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.cli.tables import print_values

ADAPTERHUB_FILES = (
    *("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"),
    *("head_config.json", "model_head.safetensors", "pytorch_model_head.bin"),
)


def import_command(path: str, output: Path, model: str | None, task_type: str | None, as_json: bool) -> None:
    """Import an adapter, and save it.

    Args:
        path: the folder of an adapter that `adapters` saved, or its id on the Hub.
        output: the folder to write.
        model: the base model's folder or Hub id; None for the one that the adapter names.
        task_type: peft's name of the task, which decides on the model's head; None for that of the saved head,
            or one that suits the model.
        as_json: whether to print JSON in place of the lines.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        from huggingface_hub import snapshot_download
        from transformers import AutoConfig
        from transformers.utils import logging

        from hf_peft_ext.budget.model_class import HEAD_CLASSES, head_task
        from hf_peft_ext.loading.adapterhub import from_adapterhub
        from hf_peft_ext.loading.adapterhub.saved_head import head_auto_class, read_head
        from hf_peft_ext.validation.checks import check, check_writable, is_hub_id
        from hf_peft_ext.validation.config_schema import read_json

        logging.set_verbosity_error()
        check_writable("output", output)
        folder = Path(path)
        if not folder.exists():
            check("path", path, is_hub_id(path), "is neither a folder nor an id on the Hub")
            folder = Path(snapshot_download(path, allow_patterns=list(ADAPTERHUB_FILES)))
        check("path", path, (folder / ADAPTERHUB_FILES[0]).is_file(), f"has no {ADAPTERHUB_FILES[0]}")
        base = str(model or read_json(folder / ADAPTERHUB_FILES[0]).get("model_name") or "")
        check("model", base, bool(base), "must name the base model, which the adapter does not")
        head = read_head(folder)
        auto_class = None if task_type or head is None else head_auto_class(head)
        if auto_class is None:
            task = task_type or head_task(AutoConfig.from_pretrained(base), encoder_task="FEATURE_EXTRACTION")
            check("task_type", task, task in HEAD_CLASSES, f"must be one of {', '.join(HEAD_CLASSES)}")
            auto_class = HEAD_CLASSES[task]
        adapter = from_adapterhub(folder, auto_class.from_pretrained(base, **(head.base_kwargs() if head else {})))
        adapter.save_pretrained(str(output))
        config: Any = adapter.peft_config["default"]
        modules = ", ".join(sorted(set(getattr(config, "modules_to_save", None) or []))) or "none"
    values = {"adapter": str(output), "PEFT type": str(config.peft_type.value), "base model": base, "head": modules}
    if head and head.labels:
        values["labels"] = ", ".join(sorted(head.labels, key=lambda label: head.labels[label]))
    if as_json:
        print(json.dumps({name.lower().replace(" ", "_"): value for name, value in values.items()}))
    else:
        print_values(out, values)
