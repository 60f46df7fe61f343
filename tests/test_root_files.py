"""What stands at the top of the repository for those who cite, upgrade or report is true."""

import importlib
import re
import tomllib

import pytest
import yaml
from support.tiny import ROOT

from tvaprune.models.families import FAMILIES

PAGES = ("CHANGELOG.md", "SECURITY.md")


def version_of(project):
    """The version that a build of a pyproject.toml has."""
    module, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version, cited = version_of(project), yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version and cited["license"] == project["project"]["license"]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    other = {"tool": {"setuptools": {"dynamic": {"version": {"attr": "yaml.__version__"}}}}}
    assert version_of(other) == yaml.__version__ != version  # control: it is read from where pyproject says


def test_a_citation_has_what_the_format_asks_for():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors", "type"} <= set(cited)
    paper = cited["preferred-citation"]
    bibtex = " ".join((ROOT / "README.md").read_text().replace("{", "").replace("}", "").split())
    for words in (paper["title"], paper["collection-title"], str(paper["year"])):
        assert words in bibtex
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in bibtex


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_files_that_are_there(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:tests|tvaprune)/[\w/.]+|[A-Z]+\.md)`", text)
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    assert "families, each" not in text or f"- {len(FAMILIES)} families, each" in text
