"""`hf-peft-ext push`: pushes an adapter's folder to the Hub."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from peft.utils import CONFIG_NAME
from rich.table import Table
from rich.text import Text

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.hub_cards.card import write_card
from hf_peft_ext.hub_cards.card_files import CARD
from hf_peft_ext.hub_cards.peft_integration import full_id, published_cards
from hf_peft_ext.hub_cards.push import check_adapter, check_files, check_request, explained, publishable, push_adapter

WEIGHTS_SUFFIX = ".safetensors"


def push(folder: Path, repo_id: str, options: dict[str, Any], dry_run: bool, as_json: bool = False) -> None:
    """Push a folder, or show what would be pushed.

    Args:
        folder: the adapter's folder.
        repo_id: the repository on the Hub.
        options: further arguments of `push_adapter`.
        dry_run: whether to send nothing.
        as_json: whether to print JSON in place of the table and the address.

    Raises:
        typer.Exit: the folder was refused or the push failed; the error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        check_request(repo_id, options)
        check_adapter(folder, publishable(folder))
        if dry_run:
            table, files = preview(folder, repo_id, options)
            print(json.dumps({"files": files})) if as_json else out.print(table, soft_wrap=False)
            return
        with explained(folder, repo_id, options):
            repo_id = full_id(repo_id)
            published = published_cards(repo_id, options["revision"])
        renew_cards(folder, repo_id, published)
        files = publishable(folder)
        if not as_json:
            out.print(contents(folder, files), soft_wrap=False)
        info = push_adapter(folder, repo_id, **options)
    address = info.pr_url or info.commit_url
    print(json.dumps({"url": address, "commit": info.oid, "files": files}) if as_json else address)


def preview(folder: Path, repo_id: str, options: dict[str, Any]) -> tuple[Table, list[str]]:
    """The files that a push would send, as a table and a list.

    It does all but the sending on a copy, so it refuses what the push refuses.
    """
    weights = [name for name in publishable(folder) if name.endswith(WEIGHTS_SUFFIX)]
    with copied(folder, weights) as copy:
        try:
            renew_cards(copy, repo_id, {})
            files = sorted([*publishable(copy), *weights])  # links in the copy
            check_files(copy, files, options)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(folder))) from error
        return contents(copy, files, original=folder), files


@contextmanager
def copied(folder: Path, weights: Sequence[str]) -> Iterator[Path]:
    """A copy of the files that may be pushed, with links to the weights, under the same name: a card may show it."""
    with TemporaryDirectory() as place:
        copy = Path(place, folder.resolve().name)
        copy.mkdir()
        for name in publishable(folder):
            source, target = (folder / name).resolve(), copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source) if name in weights else shutil.copyfile(source, target)
        yield copy


def renew_cards(folder: Path, repo_id: str, published: Mapping[str, str]) -> None:
    """Write the cards of the adapters in a folder. Subfolders without a card, such as checkpoints, get none."""
    for file in publishable(folder):
        card = PurePath(file).parent / CARD
        if PurePath(file).name == CONFIG_NAME and (file == CONFIG_NAME or (folder / card).exists()):
            subfolder = None if file == CONFIG_NAME else card.parent.as_posix()
            text = published.get(card.as_posix())
            write_card(folder / card.parent, repo_id=repo_id, subfolder=subfolder, published=text)


def contents(folder: Path, files: Sequence[str], original: Path | None = None) -> Table:
    """A table of the files to push, with sizes, and of the others. `original` is the folder that `folder` copies."""
    table = Table(box=None, show_header=False)
    for file in files:
        table.add_row("push", Text(file), f"{(folder / file).stat().st_size:,} bytes")
    home = original or folder
    all_files = (Path(parent, name) for parent, _, names in os.walk(home) for name in names)
    for name in sorted(file.relative_to(home).as_posix() for file in all_files):
        if name not in files:
            table.add_row("keep", Text(name), "", style="dim")
    return table
