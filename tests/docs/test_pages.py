"""Every code block of the documentation runs; commands and configurations are such as nbaccel takes."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest
import yaml

from nbaccel import RunConfig
from nbaccel.cli.main import nbaccel
from tests.conftest import Kernel
from tests.docs.pages import PAGES, blocks, cells, name_of

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
COMMANDS = [
    (name_of(page), line)
    for page in PAGES
    for block in blocks(page)
    if block.language == ""
    for line in block.code.replace("\\\n", " ").splitlines()
    if line.startswith("nbaccel ") and "…" not in line
]


@pytest.mark.kernel
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_page_when_its_blocks_run_one_after_another(page: Path, kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok(f"%reset -f\nimport os; os.chdir({str(tmp_path)!r})")
    try:
        for cell in cells(page):
            done = kernel.run(cell, timeout=150)
            assert done.error is None, f"{name_of(page)}:\n{cell}\n{done.output}"
    finally:
        kernel.run("get_ipython().run_line_magic('nbaccel', 'stop')")


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_when_parsed_has_options_there_are(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = ["out" if word.startswith("$") else word for word in words]
    context = click.Context(nbaccel)
    name, command, rest = nbaccel.resolve_command(context, words)
    assert command is not None
    command.make_context(name, rest, parent=context)  # reads them, and runs nothing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_when_shown_is_a_configuration(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            RunConfig.from_mapping(yaml.safe_load(block.code))
