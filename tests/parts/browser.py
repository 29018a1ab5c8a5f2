"""A browser without a screen: it opens a page, and sends each form that it meets, as a person does who agrees to everything.

`python -m parts.browser ADDRESS` is one that `lacre login` can open.
"""

from __future__ import annotations

import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import url2pathname

import httpx2

PERSON = "ada"
MOST = 10  # forms: a login has four


class Form(HTMLParser):
    """The first form of a page. action: None if it has none."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "form" and self.action is None:
            self.action = told["action"] or ""
        if tag == "input" and told.get("name"):
            self.fields[str(told["name"])] = told.get("value") or PERSON


def led_to(address: str) -> str:
    """Where the page of a file goes by itself."""
    page = Path(url2pathname(address.removeprefix("file://"))).read_text()
    found = re.search('http-equiv="refresh" content="0;url=([^"]+)"', page)
    assert found
    return unescape(found[1])


def visit(address: str, *, forms: int | None = None, **fields: str) -> httpx2.Response:
    """The page after the last form, or after so many `forms`. fields: what the person writes or presses there."""
    with httpx2.Client(trust_env=False, timeout=30, follow_redirects=True) as client:
        response = client.get(address)
        for number in range(MOST):
            form = Form(response.text)
            if form.action is None or number == forms:
                return response
            response = client.post(urljoin(str(response.url), form.action), data={**form.fields, **fields})
    raise AssertionError("the pages have no end")


if __name__ == "__main__":
    visit(led_to(sys.argv[1]))
