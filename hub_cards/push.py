"""Pushes an adapter's folder to the Hub: a list says which files may go, each is looked into, one commit carries them.

What is not on the list stays here: optimizers, pickled arguments, logs, hidden files. A file is pushed as it lies in
the folder, byte for byte, and none that holds an access token is pushed at all.
"""

import json
import mmap
import os
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from hf_peft_ext.hub_cards.places import shared_recipe, without_places
from hf_peft_ext.validation.checks import check, is_hub_id

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
ALLOWED = (
    *("*.safetensors", CONFIG_NAME, "README.md", "figures/*.png", "recipe.yaml"),
    *("training_record.json", "trainer_state.json", *TOKENIZER),
)
DENIED = ("optimizer*", "scheduler*")  # whatever their format
REVISION = re.compile(r"(?!.*(\.\.|//|@\{))[^\s~^:?*\[\\/.-][^\s~^:?*\[\\]*(?<![/.])")  # what git takes
# what a trainer keeps in a run's folder beside the adapter: checkpoints, one that is being written, pushes under way
CHECKPOINT = re.compile(r"checkpoint-\d+")
UNFINISHED, STAGES = "unfinished", "hub"
# tokens of users, logins and organisations; each begins with plain text, which `re` finds fast in large files
TOKENS = (rb"hf_(?:[A-Za-z0-9]{30}|(?:oauth|jwt)_[\w.-]{30})", rb"api_org_[A-Za-z0-9]{30}")
# the last is the base of httpx's errors, which httpx or httpx2 this huggingface_hub may use
FAILURES: tuple[type[Exception], ...] = (OSError, RuntimeError, json.JSONDecodeError, HfHubHTTPError.__bases__[0])


class PushError(OSError):
    """A push that did not arrive. The message says why, where the adapter is, and what to run to go on."""


def publishable(folder: str | Path) -> list[str]:
    """The files of a folder that may be pushed, as paths in the repository, sorted.

    Sub-folders (further adapters) are held to the same list, but for what a trainer keeps in its run's folder:
    "checkpoint-N", "unfinished" and "hub" stay out, unless the folder itself is a checkpoint. Hidden files and folders
    stay out, and links unless they lead to a file of the same folder that is on the list as well.

    Raises:
        ValueError: `folder` is no folder.
    """
    check("folder", str(folder), os.path.isdir(folder), "must be a folder")
    root = Path(folder).resolve()
    files = (Path(parent, name) for parent, _, names in os.walk(root) for name in names)
    chosen = (file for file in files if allowed(file, root) and not of_training(file, root))
    return sorted(file.relative_to(root).as_posix() for file in chosen)


def allowed(file: Path, root: Path) -> bool:
    target = Path(os.path.realpath(file))
    inside = target.is_file() and target.is_relative_to(root)
    return inside and all(on_the_list(path.relative_to(root)) for path in (file, target))


def of_training(file: Path, root: Path) -> bool:
    """Whether a file lies in what a trainer keeps beside the adapter; an adapter may have one of those names."""
    top = file.relative_to(root).parts[0]
    if CHECKPOINT.fullmatch(top):
        return not CHECKPOINT.fullmatch(root.name)  # a checkpoint that is pushed can hold its state below
    return top in (UNFINISHED, STAGES) and not (root / top / CONFIG_NAME).exists()


def on_the_list(path: PurePath) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and any(map(path.match, ALLOWED)) and not any(map(path.match, DENIED))


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Push what is `publishable` of an adapter's folder, in one commit: all of it arrives or nothing.

    The repository is created where it is missing, and so is the branch. After an error the same call goes on where it
    stopped: weights that have arrived are not sent again. Files of the repository that are not in the folder stay.

    Args:
        folder: a saved adapter; with several, each in a sub-folder. A trainer's checkpoints in it are left out.
        repo_id: the repository, "user/name" or "name".
        revision: a branch, or an open pull request ("refs/pr/1"); the main branch by default.
        token: an access token; by default that of `hf auth login` or HF_TOKEN.
        private: whether a new repository is private; one that exists stays as it is.
        create_pr: propose the commit as a pull request, which needs no right to write.
        commit_message: the commit's first line.
        commit_description: its further text, and that of the pull request.

    Raises:
        ValueError: the folder holds no adapter, or a file a token or something else than its name says; the card's
            metadata are invalid; `revision` does not go with `create_pr`. Nothing has been pushed.
        PushError: the Hub could not be reached, or refused.
    """
    options: dict[str, Any] = {"revision": revision, "private": private, "create_pr": create_pr}
    options |= {"commit_message": commit_message, "commit_description": commit_description}
    files = publishable(folder)
    check_request(repo_id, options)
    check_files(folder, files, options, token)
    warn_of_local_base(folder, files)
    api = HfApi(token=token, library_name="hf_peft_ext")
    with explained(folder, repo_id, options):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main") and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, published(Path(folder, name))) for name in files],
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


@contextmanager
def explained(folder: str | Path, repo_id: str, options: dict[str, Any]) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hub into a `PushError`."""
    try:
        yield
    except FAILURES as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # huggingface_hub's wrap
        said = [(str(cause) or type(cause).__name__).splitlines()[0], getattr(cause, "server_message", None)]
        reason = "; ".join(text.rstrip(".") for text in said if text)
        raise PushError(
            f"The push to {repo_id} failed: {reason}. The adapter is complete in {folder}. "
            f"Run this to finish the push: {command(folder, repo_id, options)}"
        ) from error


def command(folder: str | Path, repo_id: str, options: dict[str, Any]) -> str:
    """The command line that pushes the same."""
    words = ["hf-peft-ext", "push", str(folder), repo_id]
    for name, value in options.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def check_request(repo_id: str, options: Mapping[str, Any]) -> None:
    """Raise where no repository has such an id, or the revision does not go with the pull request."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"`repo_id` (={repo_id!r}) must be an id on the Hub, such as 'user/name': {said}.") from error
    check("repo_id", repo_id, bool(repo_id), "must be an id on the Hub, such as 'user/name'")
    revision, rule = options["revision"], "must be None with `create_pr`: a pull request is opened against main"
    check("revision", revision, not options["create_pr"] or revision in (None, "main"), rule)
    check("revision", revision, revision is None or bool(REVISION.fullmatch(revision)), "must be a name of a branch")


def published(file: Path) -> Path | bytes:
    """What is sent of a file: itself, but a recipe without the local paths that repeat the run here."""
    if file.name != "recipe.yaml":
        return file
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    return file if without_places(recipe) == recipe else shared_recipe(recipe)


def check_files(
    folder: str | Path, files: list[str], options: Mapping[str, Any], token: str | bool | None = None
) -> None:
    """Raise where the files are no adapter's, one is not what its name says, or a token would go with them."""
    check_adapter(folder, files)
    secrets = [text.encode() for text in (token, get_token()) if isinstance(text, str) and text]
    for name in files:
        check_content(Path(folder, name), name, secrets)
    for name in ("commit_message", "commit_description"):
        check(name, "...", not holds_token((options[name] or "").encode(), secrets), "must not hold an access token")


def check_adapter(folder: str | Path, files: list[str]) -> None:
    homes = {str(PurePath(name).parent) for name in files if PurePath(name).name == CONFIG_NAME}
    complete = homes & {
        str(PurePath(name).parent) for name in files if PurePath(name).name == SAFETENSORS_WEIGHTS_NAME
    }
    rule = f"must hold {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}, not as links that leave the folder"
    check("folder", str(folder), bool(complete), rule)


def check_content(file: Path, name: str, secrets: list[bytes]) -> None:
    """Raise where a file holds a token, or something else than its name says."""
    check("file", name, is_as_named(file), f"is no {file.suffix[1:]} file inside, so nothing was pushed")
    if file.stat().st_size:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            rule = (
                "holds an access token of the Hub, so nothing was pushed; take it out (and revoke it if others saw it)"
            )
            check("file", name, not holds_token(content, secrets), rule)


def holds_token(content: bytes | mmap.mmap, secrets: list[bytes]) -> bool:
    """Whether there is a token known to be in use, or anything that looks like one."""
    return any(re.search(pattern, content) for pattern in (*TOKENS, *map(re.escape, secrets)))


def is_as_named(file: Path) -> bool:
    """Whether a file is what its name says: weights, a picture, or text; never a pickle or an archive."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="numpy"):
                return True
        except SafetensorError:
            return False
    content = file.read_bytes()
    if file.suffix == ".png":
        return content.startswith(b"\x89PNG\r\n\x1a\n")
    if file.suffix in (".model", ".spm") and content.startswith(b"\n"):  # sentencepiece's protocol buffer
        return True
    return b"\0" not in content and is_utf8(content)


def is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def warn_of_local_base(folder: str | Path, files: list[str]) -> None:
    """Say so where the base model is a folder of this machine, which nobody else can load."""
    for name in files:
        if PurePath(name).name == CONFIG_NAME:
            base = json.loads(Path(folder, name).read_text(encoding="utf-8")).get("base_model_name_or_path")
            if base and is_local(base):
                warnings.warn(
                    f"`base_model_name_or_path` (={base!r}) in {name} is a path of this machine: it is pushed as it "
                    f"stands, and others must name the base model themselves. Put its id on the Hub there.",
                    stacklevel=3,
                )


def is_local(model: str) -> bool:
    return not is_hub_id(model) or os.path.exists(model)
