"""Finds the config and the weights of an adapter, in a folder or on the Hub. Pickled weights are not accepted."""

from pathlib import Path

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from hf_peft_ext.validation.checks import check, is_hub_id


def adapter_folder(
    id_or_path: str | Path, revision: str | None, subfolder: str | None, token: str | bool | None
) -> tuple[Path, str | None]:
    """The local folder with an adapter's files, and their commit on the Hub (None for a local folder).

    Only the config and the safetensors file are downloaded, both of the same commit.

    Args:
        id_or_path: id on the Hub, or folder.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside the repository or folder.
        token: as in `huggingface_hub`.

    Raises:
        ValueError: a local folder has a `revision`, `subfolder` leads out of the folder, or a file is missing.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or is not accessible.
    """
    inside = Path(subfolder or "")
    check("subfolder", subfolder, not inside.is_absolute() and ".." not in inside.parts, "must lie inside the adapter")
    if Path(id_or_path).exists():
        check("revision", revision, revision is None, "must be None: a local folder has no revisions")
        folder, commit = Path(id_or_path), None
    else:
        rule = "is neither a folder nor an id on the Hub"
        check("id_or_path", str(id_or_path), is_hub_id(str(id_or_path)), rule)
        files = [(inside / name).as_posix() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        folder = Path(snapshot_download(str(id_or_path), revision=revision, allow_patterns=files, token=token))
        commit = folder.name  # the cache has a folder for each commit
    folder = (folder / inside).absolute()
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{id_or_path} has no {CONFIG_NAME}.")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{id_or_path} has no {SAFETENSORS_WEIGHTS_NAME}; pickles such as {WEIGHTS_NAME} are not loaded."
        )
    return folder, commit
