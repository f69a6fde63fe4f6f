"""`hf-peft-ext push`: an adapter's folder to the Hub, from the command line."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any

import typer
from peft.utils import CONFIG_NAME
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .card import write_card
from .push import PushError, check_adapter, explained, publishable, push_adapter
from .saving import CARD, full_id, published_cards

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The folder of a saved adapter.", exists=True, file_okay=False)
]
RepoId = Annotated[
    str, typer.Argument(metavar="REPO_ID", help='The repository: "user/name", or "name" for one of your own.')
]
Revision = Annotated[
    str | None, typer.Option(help='A branch, made if it is missing, or an open pull request, "refs/pr/1".')
]
Private = Annotated[
    bool, typer.Option("--private", help="Make a new repository private. One that exists stays as it is.")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request; needs no right to write.")]
Message = Annotated[str | None, typer.Option(help="The commit's first line.", show_default="Upload adapter")]
Description = Annotated[str | None, typer.Option(help="What else the commit or the pull request says.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would go and what would stay.")]


def push(
    folder: Folder,
    repo_id: RepoId,
    revision: Revision = None,
    private: Private = False,
    create_pr: CreatePr = False,
    commit_message: Message = None,
    commit_description: Description = None,
    dry_run: DryRun = False,
) -> None:
    """Push a saved adapter to the Hub.

    Writes its card (README.md, keeping what you have edited) and uploads, in one commit, the files on a list:
    weights as safetensors, their configuration, the tokenizer, card and figures, recipe, training record and
    trainer state. All else stays here: optimizers, pickled arguments such as training_args.bin, logs, hidden
    files. A file that holds an access token stops the push.

    Log in first with `hf auth login`, or set HF_TOKEN. There is no option for the token: it would stay in the
    shell's history. After a lost connection run the same command again; weights that have arrived are not sent twice.

    For example: `hf-peft-ext push out my-adapter`, or, to propose a change to somebody else's adapter,
    `hf-peft-ext push out their-team/their-adapter --create-pr --commit-message "Trained for longer"`.
    """
    console, errors = Console(), Console(stderr=True)
    options: dict[str, Any] = {"revision": revision, "private": private or None, "create_pr": create_pr}
    options |= {"commit_message": commit_message, "commit_description": commit_description}
    try:
        if not dry_run:
            check_adapter(folder, publishable(folder))
            with explained(folder, repo_id, options):
                repo_id = full_id(repo_id)
                published = published_cards(repo_id, revision)
            renew_cards(folder, repo_id, published)
        files = publishable(folder)
        console.print(contents(folder, files))
        if dry_run:
            return
        info = push_adapter(folder, repo_id, **options)
    except (ValueError, PushError) as error:
        errors.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(info.pr_url or info.commit_url, markup=False, soft_wrap=True)


def renew_cards(folder: Path, repo_id: str, published: Mapping[str, str]) -> None:
    """The cards of the adapters in a folder, below it only where there is one already: not in plain checkpoints."""
    for file in publishable(folder):
        card = PurePath(file).parent / CARD
        if PurePath(file).name == CONFIG_NAME and (file == CONFIG_NAME or (folder / card).exists()):
            inside = None if file == CONFIG_NAME else card.parent.as_posix()
            text = published.get(card.as_posix())
            write_card(folder / card.parent, repo_id=repo_id, subfolder=inside, published=text)


def contents(folder: Path, files: list[str]) -> Table:
    """What goes, with sizes, and what stays."""
    table = Table(box=None, show_header=False)
    for file in files:
        table.add_row("push", Text(file), f"{(folder / file).stat().st_size:,} bytes")
    everything = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    for name in sorted(file.relative_to(folder).as_posix() for file in everything):
        if name not in files:
            table.add_row("keep", Text(name), "", style="dim")
    return table
