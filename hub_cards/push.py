"""Pushes an adapter's folder to the Hub: listed files only, each checked first, in one commit.

Optimizers, pickled arguments, logs and hidden files are not on the list. Files are pushed byte for byte; a file with
an access token stops the push.
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

from hf_peft_ext.hub_cards.redact import shared_recipe, without_places
from hf_peft_ext.validation.checks import check, is_hub_id

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
PUSHED = (
    *("*.safetensors", CONFIG_NAME, "README.md", "figures/*.png", "recipe.yaml"),
    *("training_record.json", "trainer_state.json", *TOKENIZER),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]*_*/config.json"),
)
NEVER_PUSHED = ("optimizer*", "scheduler*")  # in any format
REVISION = re.compile(r"(?!.*(\.\.|//|@\{))[^\s~^:?*\[\\/.-][^\s~^:?*\[\\]*(?<![/.])")  # the names that git accepts
# a trainer's folders beside the adapter: checkpoints, an unfinished one, and pushes
CHECKPOINT = re.compile(r"checkpoint-\d+")
UNFINISHED, PUSHES = "unfinished", "hub"
# tokens of users, logins and organisations; each starts with literal text, which `re` finds fast in large files
TOKENS = (rb"hf_(?:[A-Za-z0-9]{30}|(?:oauth|jwt)_[\w.-]{30})", rb"api_org_[A-Za-z0-9]{30}")
# the last is the base class of httpx's errors; huggingface_hub uses httpx or httpx2
FAILURES: tuple[type[Exception], ...] = (OSError, RuntimeError, json.JSONDecodeError, HfHubHTTPError.__bases__[0])


class PushError(OSError):
    """A push that failed. The message gives the reason, the adapter's folder and the command that continues."""


def publishable(folder: str | Path) -> list[str]:
    """The files of a folder that may be pushed, as sorted paths in the repository.

    The same list applies to sub-folders, which hold further adapters. A trainer's folders "checkpoint-N", "unfinished"
    and "hub" are excluded, unless `folder` itself is a checkpoint. So are hidden files and folders, and links that do
    not lead to a listed file of the same folder.

    Args:
        folder: a saved adapter.

    Raises:
        ValueError: `folder` is not a folder.
    """
    check("folder", str(folder), os.path.isdir(folder), "must be a folder")
    root = Path(folder).resolve()
    files = (Path(parent, name) for parent, _, names in os.walk(root) for name in names)
    chosen = (file for file in files if allowed(file, root) and not of_training(file, root))
    return sorted(file.relative_to(root).as_posix() for file in chosen)


def allowed(file: Path, root: Path) -> bool:
    """Whether a file, and the file that it may link to, is in the folder and on the list."""
    target = Path(os.path.realpath(file))
    inside = target.is_file() and target.is_relative_to(root)
    return inside and all(on_the_list(path.relative_to(root)) for path in (file, target))


def of_training(file: Path, root: Path) -> bool:
    """Whether a file is in a trainer's folder beside the adapter, which is not an adapter of the same name."""
    top = file.relative_to(root).parts[0]
    if CHECKPOINT.fullmatch(top):
        return not CHECKPOINT.fullmatch(root.name)  # a pushed checkpoint can have its state in a sub-folder
    return top in (UNFINISHED, PUSHES) and not (root / top / CONFIG_NAME).exists()


def on_the_list(path: PurePath) -> bool:
    """Whether a path in the repository is on the list of files to push."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and any(map(path.match, PUSHED)) and not any(map(path.match, NEVER_PUSHED))


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
    """Push the `publishable` files of an adapter's folder in one commit: all or nothing arrives.

    A missing repository or branch is created. After an error the same call continues: weights that have arrived are
    not sent again. Files of the repository that are not in the folder stay.

    Args:
        folder: a saved adapter; several adapters are in sub-folders.
        repo_id: the repository, "user/name" or "name".
        revision: a branch, or an open pull request ("refs/pr/1"); the main branch by default.
        token: an access token; by default that of `hf auth login` or HF_TOKEN.
        private: whether a new repository is private; an existing one is not changed.
        create_pr: open a pull request, which needs no write access.
        commit_message: the commit's first line.
        commit_description: the further text of the commit and the pull request.

    Raises:
        ValueError: the folder holds no adapter; a file holds a token or is not of its type; the card's metadata are
            invalid; `revision` is incompatible with `create_pr`. Nothing has been pushed.
        PushError: the Hub could not be reached, or refused.
    """
    texts: dict[str, Any] = {"commit_message": commit_message, "commit_description": commit_description}
    options = {"revision": revision, "private": private, "create_pr": create_pr, **texts}
    files = publishable(folder)
    check_request(repo_id, options)
    check_files(folder, files, options, token)
    warn_of_local_base(folder, files)
    api = HfApi(token=token, library_name="hf_peft_ext")
    with explained(folder, repo_id, options):
        repo_id = create_destination(api, repo_id, private, revision)
        content = [CommitOperationAdd(name, published(Path(folder, name))) for name in files]
        texts["commit_message"] = commit_message or "Upload adapter"
        return api.create_commit(repo_id, content, revision=revision, create_pr=create_pr, **texts)


def create_destination(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Create a repository and a branch of it if they are missing; return the repository's full id."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision not in (None, "main") and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


@contextmanager
def explained(folder: str | Path, repo_id: str, options: dict[str, Any]) -> Iterator[None]:
    """Turn errors of the connection and the Hub into a `PushError`."""
    try:
        yield
    except FAILURES as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # huggingface_hub's wrap
        messages = [(str(cause) or type(cause).__name__).splitlines()[0], getattr(cause, "server_message", None)]
        reason = "; ".join(text.rstrip(".") for text in messages if text)
        raise PushError(
            f"The push to {repo_id} failed: {reason}. The adapter is complete in {folder}. "
            f"Run this to finish the push: {command(folder, repo_id, options)}"
        ) from error


def command(folder: str | Path, repo_id: str, options: dict[str, Any]) -> str:
    """The command line of the same push."""
    words = ["hf-peft-ext", "push", str(folder), repo_id]
    for name, value in options.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def check_request(repo_id: str, options: Mapping[str, Any]) -> None:
    """Refuse an invalid request.

    Raises:
        ValueError: the id is invalid, or the revision is, or does not fit the pull request.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"`repo_id` (={repo_id!r}) must be an id on the Hub, such as 'user/name': {reason}."
        ) from error
    check("repo_id", repo_id, bool(repo_id), "must be an id on the Hub, such as 'user/name'")
    revision, rule = options["revision"], "must be None with `create_pr`: a pull request is opened against main"
    check("revision", revision, not options["create_pr"] or revision in (None, "main"), rule)
    check("revision", revision, revision is None or bool(REVISION.fullmatch(revision)), "must be a name of a branch")


def published(file: Path) -> Path | bytes:
    """The content to push: the file, or a recipe without its local paths."""
    if file.name != "recipe.yaml":
        return file
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    return file if without_places(recipe) == recipe else shared_recipe(recipe)


def check_files(
    folder: str | Path, files: list[str], options: Mapping[str, Any], token: str | bool | None = None
) -> None:
    """Refuse files that must not be pushed.

    Raises:
        ValueError: no adapter is among them, a file is not of its type, or a file or text holds an access token.
    """
    check_adapter(folder, files)
    secrets = [text.encode() for text in (token, get_token()) if isinstance(text, str) and text]
    for name in files:
        check_content(Path(folder, name), name, secrets)
    for name in ("commit_message", "commit_description"):
        check(name, "...", not holds_token((options[name] or "").encode(), secrets), "must not hold an access token")


def check_adapter(folder: str | Path, files: list[str]) -> None:
    """Refuse a folder without an adapter.

    Raises:
        ValueError: no folder of `files` has both a config and weights.
    """
    homes = {str(PurePath(name).parent) for name in files if PurePath(name).name == CONFIG_NAME}
    complete = homes & {
        str(PurePath(name).parent) for name in files if PurePath(name).name == SAFETENSORS_WEIGHTS_NAME
    }
    rule = f"must hold {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}, not as links that leave the folder"
    check("folder", str(folder), bool(complete), rule)


def check_content(file: Path, name: str, secrets: list[bytes]) -> None:
    """Refuse a file with an access token or with content of another type.

    Raises:
        ValueError: the message names the file.
    """
    check("file", name, is_as_named(file), f"is no {file.suffix[1:]} file inside, so nothing was pushed")
    if file.stat().st_size:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            rule = "holds an access token of the Hub, so nothing was pushed; take it out"
            check("file", name, not holds_token(content, secrets), f"{rule} (and revoke it if others saw it)")


def holds_token(content: bytes | mmap.mmap, secrets: list[bytes]) -> bool:
    """Whether a content holds one of the secrets, or a text in the form of a token."""
    return any(re.search(pattern, content) for pattern in (*TOKENS, *map(re.escape, secrets)))


def is_as_named(file: Path) -> bool:
    """Whether a file's content has the type of its name: weights, a picture, or text; never a pickle or an archive."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy"):
                return True
        content = file.read_bytes()
        if file.suffix == ".png":
            return content.startswith(b"\x89PNG\r\n\x1a\n")
        if file.suffix in (".model", ".spm") and content.startswith(b"\n"):  # sentencepiece's protocol buffer
            return True
        return "\0" not in content.decode("utf-8")
    except (SafetensorError, UnicodeDecodeError):
        return False


def warn_of_local_base(folder: str | Path, files: list[str]) -> None:
    """Warn if the base model is a folder of this machine, which nobody else can load."""
    for name in files:
        if PurePath(name).name == CONFIG_NAME:
            base = json.loads(Path(folder, name).read_text(encoding="utf-8")).get("base_model_name_or_path")
            if base and (not is_hub_id(base) or os.path.exists(base)):
                warnings.warn(
                    f"`base_model_name_or_path` (={base!r}) in {name} is a path of this machine: it is pushed as it "
                    f"stands, and others must name the base model themselves. Put its id on the Hub there.",
                    stacklevel=3,
                )
