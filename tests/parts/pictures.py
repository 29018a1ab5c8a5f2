"""Draws the README's pictures from a real run: `make pictures`. A digest of its run in each lets a test see that it is stale.

docs/pictures/path.svg       one sealed chat, with what each party saw of it
docs/pictures/terminal.svg   `lacre status` and `lacre ask` at a terminal, as rich exports them
"""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape, unescape

import httpx2
from rich.console import Console
from rich.text import Text

import lacre
from lacre.evidence import audit_proof
from lacre.evidence.audit_proof import AuditProof
from parts.terminal import at_terminal
from parts.up import LACRE, Up, environment

FOLDER: Final = Path(__file__).resolve().parents[2] / "docs/pictures"
PROMPT: Final = "Write one sentence about the sea."
COMMANDS: Final = (("status",), ("ask", PROMPT, "--temperature", "0", "--max-tokens", "60"))
COLUMNS: Final = 92
_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]")  # all but colours
_LINE_UP: Final = "\x1b[1A\x1b[2K"  # rich takes its spinner away
_WORD: Final = re.compile(r"[A-Za-z]{3,15}")
_METADATA: Final = re.compile(r"<metadata>(.*?)</metadata>", re.DOTALL)
# rich's own frame, without the fonts that it loads from elsewhere.
_FRAME: Final = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<metadata>METADATA</metadata>
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


class _Tap(httpx2.HTTPTransport):
    """The connection to the gateway. It keeps the last request, and the proof that came back."""

    last: httpx2.Request
    audit = ""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.last = request
        response = super().handle_request(request)
        self.audit = response.headers.get(audit_proof.HEADER, self.audit)
        return response


@dataclass(frozen=True, slots=True)
class Run:
    """One sealed chat. outer: the header fields that the gateway saw. entry: its audit entry. sealed: the request's bytes."""

    outer: dict[str, str]
    entry: dict[str, object]
    sealed: bytes
    kem: str
    answer: str
    prompt_tokens: int
    completion_tokens: int

    def digest(self) -> str:
        """What does not differ between two runs of one version."""
        return json.dumps({"outer": sorted(self.outer), "entry": sorted(self.entry), "kem": self.kem})


def run(url: str, token: str) -> Run:
    tap = _Tap()
    with lacre.Client(url, token=token, memory=lacre.VersionMemory(), transport=tap) as client:
        reply = client.chat(PROMPT, max_tokens=60, temperature=0)
    outer = {name: value for name, value in tap.last.headers.items() if name.startswith("lacre-")}
    receipt, key = reply.receipt, reply.verification.sealed_to
    assert receipt is not None and key is not None
    tokens = (receipt.prompt_tokens, receipt.completion_tokens)
    return Run(outer, AuditProof.parse_header(tap.audit).members, tap.last.content, key.kem, reply.text, *tokens)


def session(up: Up) -> list[str]:
    """What each of `COMMANDS` shows at a terminal, with colours and without the spinner."""
    own = {"LACRE_URL": up.url, "LACRE_TOKEN": up.token, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    known = environment(up.state) | own
    return [_CONTROL.sub("", at_terminal([*LACRE, *command], known).rpartition(_LINE_UP)[2]) for command in COMMANDS]


def session_digest(shown: list[str]) -> str:
    """The words of `lacre status`: no key, no number and nothing that a model said."""
    rows = [" ".join(_WORD.findall(_plain(line))) for line in shown[0].splitlines()]
    return json.dumps({"commands": COMMANDS, "rows": [row.split(" ")[0] for row in rows if row and not row.startswith("sha")]})


def _plain(line: str) -> str:
    return " ".join(word for word in Text.from_ansi(line).plain.split() if len(word) <= 15)


def terminal(shown: list[str]) -> str:
    out = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for command, text in zip(COMMANDS, shown, strict=True):
        words = " ".join(f'"{word}"' if " " in word else word for word in command)
        out.print(Text.assemble(("$ ", "bold green"), (f"lacre {words}", "bold")))
        out.print(Text.from_ansi(text.replace("\r", "").rstrip()))
        out.print()
    drawn = out.export_svg(title="lacre", code_format=_FRAME, unique_id="terminal")
    return "\n".join(line.rstrip() for line in drawn.replace("METADATA", escape(session_digest(shown))).splitlines()) + "\n"


def path(seen: Run) -> str:
    entry, asked, said = seen.entry, f"“{PROMPT}”", _wrapped(f"“{seen.answer}”", 34)
    told = [f"{name}: {value}" for name, value in seen.outer.items()]
    recorded = [f"{name.replace('_', ' ')}: {entry[name]}" for name in ("subject", "tenant", "decision", "reserved_tokens")]
    bytes_seen = [f"{seen.sealed[:12].hex(' ', 2)} …", f"{len(seen.sealed)} bytes that it cannot open"]
    receipt = ["signs a receipt:", f"{seen.prompt_tokens} + {seen.completion_tokens} tokens"]
    columns = (
        ("your program", "#1a7f37", ["asks:", asked, "seals to a key of the pool:", seen.kem, "gets:", *said]),
        ("the gateway: who, never what", "#bf3989", [*told, *recorded, *bytes_seen]),
        ("a worker: what, never who", "#0969da", ["opens:", asked, "answers:", *said, *receipt]),
    )
    height = 96 + 20 * max(len(lines) for _, _, lines in columns)
    parts = [
        f'<svg viewBox="0 0 960 {height}" xmlns="http://www.w3.org/2000/svg">',
        f"<metadata>{escape(seen.digest())}</metadata>",
        "<style>text { font-family: sans-serif; font-size: 13px; fill: #1f2328; }",
        ".title { font-weight: bold; font-size: 14px; } .arrow { font-size: 12px; fill: #59636e; }</style>",
        f'<rect width="960" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, colour, lines) in enumerate(columns):
        left = 10 + number * 330
        box = f'<rect x="{left}" y="44" width="280" height="{height - 54}" rx="8" fill="#f6f8fa"'
        parts.append(f'{box} stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text class="title" x="{left + 12}" y="68" fill="{colour}">{escape(title)}</text>')
        for row, line in enumerate(lines):
            parts.append(f'<text x="{left + 12}" y="{92 + 20 * row}" xml:space="preserve">{escape(line)}</text>')
    for left, text in ((290, "HTTPS"), (620, "NATS")):
        for way in (f"M{left} 100h46m-8 -5l8 5l-8 5", f"M{left + 50} 130h-46m8 -5l-8 5l8 5"):
            parts.append(f'<path d="{way}" fill="none" stroke="#59636e" stroke-width="2"/>')
        for y, word in ((90, text), (150, "sealed")):
            parts.append(f'<text class="arrow" x="{left + 25}" y="{y}" text-anchor="middle">{word}</text>')
    parts.append('<text class="title" x="10" y="28">One sealed chat, and what each party saw of it</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def held(name: str) -> str:
    """The digest in a committed picture."""
    found = _METADATA.search((FOLDER / name).read_text())
    assert found is not None
    return unescape(found[1])


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lacre-pictures-") as folder:
        with Up.start(Path(folder) / "state") as up:
            seen, shown = run(up.url, up.token), session(up)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "path.svg").write_text(path(seen))
    (FOLDER / "terminal.svg").write_text(terminal(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
