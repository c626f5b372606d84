"""Check every link and picture of the built site, and of the README, without a network.

    python docs/check_links.py docs/_build/html

A link inside the site must lead to a file that exists, and its fragment to an id there;
a link to elsewhere must be a well-formed address, and nothing may be loaded from there.
"""

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")
HOST = re.compile(r"([a-z0-9-]+\.)+[a-z]{2,}", re.I)
#: Attributes with an address; what they name is loaded, but for ``href`` of an ``a``.
ADDRESSES = {"href", "src", "data", "poster"}


class Link(NamedTuple):
    address: str
    line: int
    is_loaded: bool


class Page(HTMLParser):
    """The links of a page and the ids that links may lead to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id" or (name == "name" and tag == "a"):
                self.ids.add(value)
            elif name in ADDRESSES and value is not None:
                line, _ = self.getpos()
                self.links.append(Link(value, line, tag != "a"))


@cache
def read(path):
    return Page(path.read_text("utf-8"))


def fault(link, path, index="index.html"):
    """What is wrong with a link in the file ``path``, or None.

    A link to a folder leads to its ``index``.
    """
    parts = urlsplit(link.address)
    if parts.scheme in ("http", "https"):
        if link.is_loaded:
            return "is loaded from elsewhere"
        return None if HOST.fullmatch(parts.hostname or "") else "is no address"
    if parts.scheme in ("data", "mailto"):
        return None
    if parts.scheme or parts.netloc:
        return "is no address"
    target = path.parent / unquote(parts.path) if parts.path else path
    if target.is_dir():
        target /= index
    if not target.exists():
        return "leads to no file"
    if parts.fragment and target.suffix == ".html":
        if unquote(parts.fragment) not in read(target.resolve()).ids:
            return "leads to no such place in the page"
    return None


def faults_of_site(folder):
    """Lines ``page:line: link fault`` for all pages under a folder."""
    pages = sorted(Path(folder).resolve().rglob("*.html"))
    if not pages:
        yield f"{folder}: has no page"
    for path in pages:
        for link in read(path).links:
            if found := fault(link, path):
                yield f"{path}:{link.line}: {link.address} {found}"


def faults_of_markdown(path):
    """The same for the files that a page outside the site, as the README, links to."""
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        for address in MARKDOWN_LINK.findall(text):
            address = address.partition("#")[0]  # its ids are made where it is shown
            link = Link(address, number, is_loaded=False)
            if found := address and fault(link, path, index=""):
                yield f"{path}:{number}: {address} {found}"


def main(folder):
    faults = [*faults_of_site(folder)]
    for path in sorted(ROOT.glob("*.md")):
        faults += faults_of_markdown(path)
    print("\n".join(faults) or "All links and pictures lead somewhere.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
