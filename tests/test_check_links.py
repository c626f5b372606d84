"""The check of links and pictures, which is a part of ``make docs``, can fail."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "check_links.py"
SPEC = importlib.util.spec_from_file_location("check_links", SCRIPT)
check_links = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_links)

GOOD = """
<h1 id="top">A site</h1><a href="#top">up</a> <a href="sub/b.html#there">there</a>
<a href="sub/">folder</a> <img src="picture%20one.png"> <img src="data:,">
<a href="https://example.org/page?x=1#y">elsewhere</a> <a href="mailto:a@b.org">to</a>
"""


@pytest.fixture
def site(tmp_path):
    check_links.read.cache_clear()
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "picture one.png").write_bytes(b"")
    (tmp_path / "a.html").write_text(GOOD)
    (tmp_path / "sub" / "index.html").write_text("<p>index</p>")
    (tmp_path / "sub" / "b.html").write_text('<a href="../a.html" id="there">back</a>')
    return tmp_path


def test_good_site_has_no_fault(site):
    assert not list(check_links.faults_of_site(site))


@pytest.mark.parametrize(
    ("tag", "fault"),
    [
        ('<a href="no.html">', "no file"),
        ('<a href="sub/b.html#nowhere">', "no such place"),
        ('<a href="#nowhere">', "no such place"),
        ('<a href="sub/../../outside.html">', "no file"),
        ('<a href="empty/">', "no file"),
        ('<img src="no.png">', "no file"),
        ('<script src="https://cdn.example.org/x.js">', "from elsewhere"),
        ('<img src="//cdn.example.org/x.png">', "no address"),
        ('<a href="https:///no-host">', "no address"),
        ('<a href="htps://example.org">', "no address"),
    ],
)
def test_fault_is_found_at_its_line(site, tag, fault):
    (site / "a.html").write_text(GOOD + tag)
    [line] = check_links.faults_of_site(site)
    assert fault in line
    assert "a.html:5:" in line


def test_site_without_a_page_is_a_fault(tmp_path):
    assert len(list(check_links.faults_of_site(tmp_path))) == 1


def test_links_of_markdown(tmp_path):
    (tmp_path / "there.md").touch()
    (tmp_path / "folder").mkdir()
    page = tmp_path / "README.md"
    page.write_text(
        "[a](there.md#b) [b](folder) [c](https://d.org/e)\n![f](no.png) [g](#h)\n"
    )
    [line] = check_links.faults_of_markdown(page)
    assert line.endswith("README.md:2: no.png leads to no file")


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_of_this_project(page):
    assert not list(check_links.faults_of_markdown(page))
