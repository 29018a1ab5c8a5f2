"""The page's documents and the headers of every answer. Nothing here is made from a person's or a model's text.

Rules:
- Scripts and styles come from this origin's folder alone, and none is inline. No script can turn text into HTML: the policy
  wants Trusted Types and allows none to be made.
- No other page may frame, open or load any of it, and no address of it leaves as `Referer`.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import Final

STATIC: Final = "/page/"
_TYPES: Final = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_SHELL: Final = "shell.html"  # not served by its name


def guarded(origin: str) -> dict[str, str]:
    """The headers of every answer of the page."""
    own = f"{origin}{STATIC}"
    policy = (
        f"default-src 'none'; script-src {own}; style-src {own}; img-src {own} blob: data:; connect-src {own}; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=(), usb=(), payment=()",
        "cache-control": "no-store",
    }


def loaded() -> dict[str, tuple[bytes, str]]:
    """The files that the browser loads, by name, with their types."""
    found = {}
    for file in files("lacre.page").joinpath("static").iterdir():
        kind = _TYPES.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            found[file.name] = (file.read_bytes(), kind)
    return found


def shell() -> bytes:
    return files("lacre.page").joinpath("static", _SHELL).read_bytes()


def notice(title: str, text: str, *, again: bool = False) -> bytes:
    """A page that says why there is no chat. again: open `/` once more, from this page."""
    refresh = '<meta http-equiv="refresh" content="0;url=/">' if again else ""
    said = "".join(f"<p>{_with_code(line)}</p>" for line in text.splitlines())
    link = '<p><a href="/">Continue</a></p>' if again else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}<title>{escape(title)} · Lacre</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="{STATIC}seal.svg" type="image/svg+xml"><link rel="stylesheet" href="{STATIC}base.css">'
        f'</head><body class="notice"><main><img src="{STATIC}seal.svg" alt="" width="48" height="48">'
        f"<h1>{escape(title)}</h1>{said}{link}</main></body></html>"
    ).encode()


def _with_code(line: str) -> str:
    """Text between backquotes as code."""
    pieces = [escape(piece) for piece in line.split("`")]
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
