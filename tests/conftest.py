"""Quiet, offline, repeatable; at the end of a run a table of the contract, and one of AdapterHub's logits and ours."""

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from huggingface_hub import constants, hf_api

import hf_peft_ext  # noqa: F401  registers the methods

from .hub_server import Hub

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def hub(request, monkeypatch, tmp_path):
    """A Hub of this test's own, which huggingface_hub takes for the real one; the test is logged in as "ann".

    It stores large files by LFS; `@pytest.mark.parametrize("hub", ["xet"], indirect=True)` has them stored by xet.
    """
    use_xet = getattr(request, "param", "lfs") == "xet"
    with Hub(use_xet) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        values |= {"HF_HUB_CACHE": str(tmp_path / "hub-cache"), "HF_HUB_DISABLE_XET": not use_xet}
        values |= {"HF_TOKEN_PATH": str(tmp_path / "token")}  # whatever this machine is logged in as
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made once, for its endpoint
        yield server


def pytest_terminal_summary(terminalreporter):
    contract_table(terminalreporter)
    adapterhub_table(terminalreporter)


def contract_table(terminalreporter):
    """Methods x backbones: how many properties of the contract hold."""
    passed, run = Counter(), Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            if "test_contract.py" in report.nodeid and "[" in report.nodeid:
                cell = tuple(report.nodeid.rpartition("[")[2].rstrip("]").split("-")[:2])
                run[cell] += 1
                passed[cell] += outcome == "passed"
    backbones, methods = (sorted({cell[i] for cell in run if len(cell) == 2}) for i in (0, 1))
    if methods and backbones:
        terminalreporter.section("contract: properties that hold")
        terminalreporter.write_line(" " * 17 + " ".join(f"{b[:10]:>10}" for b in backbones))
        for method in methods:
            cells = [f"{passed[b, method]}/{run[b, method]}" if run[b, method] else "-" for b in backbones]
            terminalreporter.write_line(f"{method:<17}" + " ".join(f"{cell:>10}" for cell in cells))


def adapterhub_table(terminalreporter):
    """Methods x families: the largest difference of a logit from what AdapterHub's library gives."""
    reports = (report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome))
    values = [dict(report.user_properties) for report in reports]
    found = {tuple(value["cell"]): value["difference"] for value in values if "difference" in value}
    families, methods = (list(dict.fromkeys(cell[i] for cell in found)) for i in (0, 1))
    if found:
        terminalreporter.section("adapterhub: largest difference of a logit")
        terminalreporter.write_line(f"| | {' | '.join(families)} |\n|---|{'---|' * len(families)}")
        for method in methods:
            cells = [f"{found[f, method]:.0e}" if (f, method) in found else "-" for f in families]
            terminalreporter.write_line(f"| {method} | " + " | ".join(cells) + " |")
