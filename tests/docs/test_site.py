"""The site builds without a warning and without the network; what pages say of messages is what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbaccel
from nbaccel import errors
from nbaccel.core.refused import ATTRIBUTES
from tests.compat import differences
from tests.docs.pages import ROOT

DOCS = ROOT / "docs"
_JOINT = re.compile(r'"\s*\n?\s*f?"')  # where a message goes on in the next line of code
_FILL = re.compile(r"\{[^{}]*\}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_pages_when_built_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not loaded, page


@pytest.mark.parametrize("name", sorted(nbaccel.__all__))
def test_public_name_when_looked_up_is_in_the_reference(site: Path, name: str) -> None:
    home = nbaccel._HOMES[name]
    page = (site / "reference" / "index.html").read_text()
    assert re.search(rf'id="{re.escape(home)}[\w.]*\.{name}"', page), (
        f"{home}.{name} is not in docs/reference.md"
    )


def test_benchmarks_page_when_built_has_the_measured_tables(site: Path) -> None:
    page = (site / "benchmarks" / "index.html").read_text()
    for program in (ROOT / "benchmarks").glob("*.py"):
        assert "__main__" not in program.read_text() or f"benchmarks/{program.name}" in page, program
    for result in (ROOT / "benchmarks" / "results").glob("*.md"):
        first = next(line for line in result.read_text().splitlines() if line.startswith("|"))
        assert first.strip("| ").partition(" | ")[0].strip() in page, result


def test_error_messages_when_looked_up_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    code = "\n".join(path.read_text() for path in sorted((ROOT / "nbaccel").rglob("*.py")))
    said = _JOINT.sub("", code).replace('\\"', '"')
    titles = [title.strip("` ") for title in re.findall(r"^### (.*)$", text, re.MULTILINE)]
    assert len(titles) > 20
    missing = [title for title in titles if title not in said]
    assert not missing, f"no message says: {missing}"
    assert all(name in text for name in errors.__all__)


def test_differences_when_edited_in_scripts_are_told_in_the_migration_page() -> None:
    text = (DOCS / "migration.md").read_text().lower()
    told = {
        differences.SCHEDULER: "**scheduler**",
        differences.TAIL: "**last window of an epoch**",
        differences.COUNTING: "**samples that do not divide evenly**",
        differences.ORDER: "**order of a shuffled loader**",
        differences.NO_SHARED_STATE: "**shared state**",
        differences.OWN_LOADER: "**prepared loaders**",
        differences.NOT_PICKLED: "**pickling an accelerator**",
        differences.HOOKS: "**communication hooks**",
        differences.NO_DEVICE: "",
    }
    for one in differences.DIFFERENCES:
        assert told[one.reason] in text, one


def test_member_of_accelerates_accelerator_when_looked_up_is_in_the_migration_page() -> None:
    import accelerate

    text = (DOCS / "migration.md").read_text()
    same, others = text.partition("## Each member")[2].partition("\n## ")[0].split("\n\nThe others.")
    members = {name for name in dir(accelerate.Accelerator) if not name.startswith("_")}
    missing = {name for name in members if f"`{name}`" not in same + others}
    assert not missing, f"docs/migration.md does not name {sorted(missing)}"
    assert {name for name in members if f"`{name}`" in same} == members & set(dir(nbaccel.Accelerator))
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", others, re.MULTILINE))))
    assert explained == set(ATTRIBUTES)  # the Accelerator's own errors explain the same
