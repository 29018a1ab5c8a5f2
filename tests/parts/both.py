"""A running `lacre up` that serves a model that writes, and one that embeds, for programs that use both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parts.minilm import NAME, minilm
from parts.up import Up


@contextmanager
def serving_both(folder: Path) -> Iterator[Up]:
    """folder: an empty one. A model is served under its file's name."""
    encoder = folder / f"{NAME}.gguf"
    shutil.copyfile(minilm(), encoder)
    with Up.start(folder / "state", "--model", "smollm2-135m", "--model", str(encoder)) as live:
        yield live
