"""Configuration of the documentation. `make docs` builds it into docs/_build/html; every warning is an error."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]  # the checkout's package goes before an installed one

project = "hf_peft_ext"
copyright = "the hf_peft_ext authors. Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "public_names"]
exclude_patterns = ["_build", "README.md"]

html_theme = "furo"
html_title = "hf_peft_ext"
html_static_path = ["_static"]
html_css_files = ["widths.css"]
html_theme_options = {"source_repository": "https://github.com/hf-peft-ext/hf_peft_ext/", "source_branch": "main"}
html_theme_options["source_directory"] = "docs/"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # a slow test executes the notebooks; their outputs are kept in the files

default_role = "literal"  # docstrings write `code` in single backticks
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
maximum_signature_line_length = 80

# Dead references are errors. The build has no network, so the inventories of other projects cannot be fetched:
# names of the standard library and of these packages are the only ones that may stay without a link.
nitpicky = True
OTHERS = ["accelerate", "collections", "datasets", "huggingface_hub", "numpy", "optuna", "os", "pathlib", "peft"]
OTHERS += ["rich", "safetensors", "tokenizers", "torch", "transformers", "trl"]
nitpick_ignore_regex = [(r"py:.*", rf"({'|'.join(OTHERS)})(\..*)?")]


def copy_notebooks() -> None:
    """The notebooks of examples/ become pages."""
    target = HERE / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    examples = HERE.parent / "examples"
    for notebook in [*sorted((examples / "notebooks").glob("*.ipynb")), examples / "tour.ipynb"]:
        shutil.copy(notebook, target)


copy_notebooks()
