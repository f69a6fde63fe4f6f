"""Finds the two files of an adapter, in a folder or on the Hub; a pickle is none of them."""

from pathlib import Path

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from hf_peft_ext.validation.checks import check, is_hub_id


def adapter_folder(
    id_or_path: str | Path, revision: str | None, subfolder: str | None, token: str | bool | None
) -> tuple[Path, str | None]:
    """The local folder with an adapter's files, and the commit on the Hub that they are of.

    From the Hub the config and the safetensors file are fetched and nothing else, both of one commit.

    Raises:
        ValueError: `revision` is given for a local folder, `subfolder` leads out of the folder, or a file is missing.
    """
    inside = Path(subfolder or "")
    check("subfolder", subfolder, not inside.is_absolute() and ".." not in inside.parts, "must lie inside the adapter")
    if Path(id_or_path).exists():
        check("revision", revision, revision is None, "must be None: a local folder has no revisions")
        folder, commit = Path(id_or_path), None
    else:
        rule = "is neither a folder nor an id on the Hub"
        check("id_or_path", str(id_or_path), is_hub_id(str(id_or_path)), rule)
        wanted = [(inside / name).as_posix() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        folder = Path(snapshot_download(str(id_or_path), revision=revision, allow_patterns=wanted, token=token))
        commit = folder.name  # the cache has a folder for each commit
    folder = (folder / inside).absolute()
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{id_or_path} has no {CONFIG_NAME}.")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{id_or_path} has no {SAFETENSORS_WEIGHTS_NAME}; pickles such as {WEIGHTS_NAME} are not loaded."
        )
    return folder, commit
