"""The command line as a whole: what it imports, its version, and what each command says when something is wrong."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from importlib.metadata import version

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments
from typer.testing import CliRunner

from hf_peft_ext.cli import app
from hf_peft_ext.cli.failures import one_line
from hf_peft_ext.cli.tables import print_table
from hf_peft_ext.recipes.progress import TrainingLines
from hf_peft_ext.recipes.recipe_source import RecipeError
from hf_peft_ext.search.progress import SearchLines
from hf_peft_ext.validation.checks import check_writable

COMMANDS = ("train", "compare", "cost", "annotate-or-distil", "search", "push", "memory", "methods", "inspect",
            "import-adapterhub")  # fmt: skip
HELPS = """
import sys
from hf_peft_ext_cli import app
commands = ("train", "compare", "cost", "annotate-or-distil", "search", "search report", "push", "memory")
commands = (*commands, "intrinsic-dimension", "methods", "inspect", "import-adapterhub", "to-lora")
for words in ("--help", "--version", *(f"{command} --help" for command in commands)):
    app(words.split(), standalone_mode=False)
print("imported:", [name for name in ("torch", "transformers", "peft", "hf_peft_ext", "yaml") if name in sys.modules])
"""


def test_help_imports_nothing_heavy():
    """Help and version come without the package, whose import takes seconds."""
    done = subprocess.run([sys.executable, "-c", HELPS], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert all(command in done.stdout for command in (*COMMANDS, "lm-eval", "report"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command):
    """At 80 columns, with no line longer; and each that prints data takes --json."""
    text = CliRunner().invoke(app, [command, "--help"], terminal_width=80).output
    assert f"hf-peft-ext {command}" in text
    assert "--json" in text
    assert max(map(len, text.splitlines())) <= 80


def test_completion():
    """typer's, for the shells that it knows."""
    done = subprocess.run(
        [sys.executable, "-c", "from hf_peft_ext_cli import app; app(prog_name='hf-peft-ext')"],
        env={
            **os.environ,
            "_HF_PEFT_EXT_COMPLETE": "complete_bash",
            "COMP_WORDS": "hf-peft-ext met",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["methods"]
    text = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    assert "--install-completion" in text


@pytest.mark.parametrize("width", [80, 200])
def test_wide_tables(width):
    """A table wider than the terminal is printed in blocks of columns; no line is cut or wrapped."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    rows = [{"method": name, **{f"column {i}": f"{i}{name}" * 3 for i in range(8)}} for name in ("one", "[two]")]
    print_table(console, rows, ["bold", None])
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert words.count("[two]") == words.count("one") == words.count("method") == (1 if width == 200 else 3)
    assert all(row[column] in words for row in rows for column in row)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_in_a_terminal_of_80_columns():
    """In a real terminal, colours included, no line of the catalogue is longer than the terminal."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-W", "ignore", "-m", "hf_peft_ext.cli", "methods"]
    process = subprocess.Popen(command, stdout=side, stderr=subprocess.DEVNULL, env=environment | {"TERM": "xterm"})
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # the end of the terminal
        while part := os.read(main, 65536):
            shown += part
    assert process.wait(timeout=300) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert max(map(len, plain.splitlines())) <= 80
    assert "Ladder side-tuning" in plain
    assert b"\x1b[" in shown


def test_importing_the_package_registers_the_methods():
    """All of them, in a process that has not imported peft before."""
    code = "import hf_peft_ext; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as t; print(t['UNIPELT'])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("<class 'hf_peft_ext."), done.stderr


def test_a_launcher_can_run_it_as_a_module():
    """As `torchrun -m hf_peft_ext.cli` and `accelerate launch -m hf_peft_ext.cli` do."""
    run = subprocess.run([sys.executable, "-m", "hf_peft_ext.cli", "--version"], capture_output=True, text=True)
    assert run.stdout.splitlines()[0] == f"hf_peft_ext {version('hf_peft_ext')}", run.stderr


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.splitlines()[0] == f"hf_peft_ext {version('hf_peft_ext')}"
    assert f"transformers {version('transformers')}" in result.output


# folders


def test_writable(tmp_path):
    """A folder that can be made, or is there, passes and nothing is left of the attempt."""
    for folder in (tmp_path, tmp_path / "a" / "b"):
        check_writable("output_dir", folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/inside", "dangling", "dangling/inside", "x" * 300, "/proc/none/x"])
def test_not_writable(place, tmp_path):
    """A file or a dangling link where the folder should be or pass, a name too long, a system that takes no files."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`output_dir` \(='.*'\) must lie where files can be written \(.*: .+\)\."):
        check_writable("output_dir", tmp_path / place)
    assert len(list(tmp_path.iterdir())) == 2


# errors


class Said:
    """In the place of a console."""

    def __init__(self):
        self.text = ""

    def print(self, text):
        self.text += text


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError("a\n  b"), 2), (ValueError("a b"), 2), (OSError("a b"), 1), (RuntimeError("a\nb"), 1)],
)
def test_one_line(error, code):
    import typer

    said = Said()
    with pytest.raises(typer.Exit) as left, one_line(said):
        raise error
    assert left.value.exit_code == code
    assert said.text == "[bold red]Error[/] a b"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(AssertionError), one_line(Said()):
        raise AssertionError


@pytest.mark.parametrize("missing", ["optuna", pytest.param("matplotlib", marks=pytest.mark.slow)])
def test_a_search_without_its_extra(missing):
    """The error says what to install, from Python and from the command line."""
    code = f"import sys; sys.modules[{missing!r}] = None; "
    for rest in (
        "from hf_peft_ext.search import DesignSpaceSearch",
        "from hf_peft_ext.cli import app; app(['search', '--config', 'x.yaml'])",
    ):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code + rest], capture_output=True, text=True, timeout=300
        )
        assert done.returncode != 0
        assert f"needs {missing}: pip install 'hf_peft_ext[search]'." in done.stderr


# progress


def test_a_line_a_minute(capsys):
    """At most one a minute, with step, loss and what is left; none of ranks other than 0."""
    now = [0.0]
    lines = TrainingLines(clock=lambda: now[0])
    state = TrainerState(max_steps=100, global_step=20, is_world_process_zero=True)
    told = (TrainingArguments(use_cpu=True), state, TrainerControl())
    lines.on_train_begin(*told)
    for step in range(1, 11):  # half a minute each; 20 were done before
        now[0] += 30
        state.global_step = 20 + step
        lines.on_log(*told, logs={"loss": 0.5})
        lines.on_step_end(*told)
        lines.on_prediction_step(*told)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    assert said[0] == "step 22 of 100, loss 0.5, 1 min, about 39 min left"
    assert said[-1] == "step 30 of 100, loss 0.5, 5 min, about 35 min left"
    now[0] += 60
    lines.on_prediction_step(*told)
    assert capsys.readouterr().err == "evaluating after step 30 of 100\n"
    state.is_world_process_zero, now[0] = False, 1e6
    lines.on_step_end(*told)
    assert capsys.readouterr().err == ""


def test_a_line_a_minute_of_a_search(capsys):
    now = [0.0]
    for silent in (False, True):
        with SearchLines(disable=silent, clock=lambda: now[0]) as lines:
            stage = lines.add_task("S1", total=8, failed="")
            for done in range(4):
                now[0] += 40
                lines.update(stage, completed=done, failed="1 failed" if done else "")
        said = capsys.readouterr().err.splitlines()
        assert said == ([] if silent else ["S1: 1 of 8 runs, 1 failed", "S1: 3 of 8 runs, 1 failed"])
