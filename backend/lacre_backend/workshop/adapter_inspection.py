"""What an adapter's file holds, and which models it fits: the job of `lacre model inspect` for any file.

Rules:
- An adapter is told from a model by its head alone. llama.cpp does not see the file.
- Only heads of models are read to see whether the adapter fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from lacre.errors import SettingsError
from lacre_backend.engine import adapters, gguf_header
from lacre_backend.engine.gguf_header import Header, Malformed
from lacre_backend.engine.shards import check_file
from lacre_backend.models.gguf import default_path
from lacre_backend.models.opening import Conditions, open_model
from lacre_backend.models.sealed import is_sealed, read_head
from lacre_backend.workshop.child import Job, Report
from lacre_backend.workshop.inspection import (
    InspectAsked,
    Inspected,
    TypeUse,
    check_extents,
    inspect,
    read_header,
    said_signature,
    types_of,
)

_MOST_MODELS: Final = 100  # files of the adapter's folder that are tried; a folder of shards has many
_FIRST: Final = ".lora_a"


@dataclass(frozen=True, slots=True)
class FileAsked:
    """file: a model or an adapter. base: a model that an adapter should fit; None: try those beside it, and the default."""

    file: InspectAsked
    base: Path | None = None


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """- architecture: of its base model. rank: the largest of its pairs. scale: alpha / rank, by which the pair is multiplied.
    - targets: the kinds of matrices that it changes. layers: how many it changes any of.
    - fits: the models that it fits, of those that were tried. reason: why it does not fit the one that was asked for.
    - The rest: as in `Inspected`.
    """  # fmt: skip

    path: Path
    bytes: int
    digest: str
    name: str
    architecture: str
    kind: str
    rank: int
    alpha: float
    scale: float
    targets: list[str]
    layers: int
    parameters: int
    types: dict[str, TypeUse]
    fits: list[str]
    reason: str | None = None
    checked: bool = False
    sealed: str | None = None
    signature: str | None = None


@dataclass(frozen=True, slots=True)
class InspectedFile:
    """One of them."""

    model: Inspected | None = None
    adapter: InspectedAdapter | None = None


def inspect_file(asked: FileAsked, report: Report) -> InspectedFile:
    """Raises SettingsError for a file that no command could use, or OSError."""
    path = asked.file.path
    check_file(path)
    opened = open_model(path, None, Conditions(asked.file.kms)) if is_sealed(path) else None
    head = path if opened is None else opened.file.path
    if not is_adapter(head):
        if asked.base is not None:
            raise SettingsError(f"--base is for adapters, and {path} is a model. Leave --base away.")
        return InspectedFile(model=inspect(asked.file, report))
    report("reading", 0.2)
    header = read_header(head)
    if opened is None:
        check_extents(path, header)
        opened = open_model(path, None, Conditions())
    report("comparing with models", 0.8)
    fits, reason = _fitting(head, path, asked.base)
    found = replace(_described(path, header), digest=opened.file.digest, fits=fits, reason=reason, name=opened.file.name)
    sealed = f"by {read_head(path).scheme}:" if opened.weights is not None else None
    return InspectedFile(
        adapter=replace(found, sealed=sealed, signature=said_signature(opened), checked=opened.file.digests.checked)
    )


INSPECT_FILE: Final = Job(f"{__name__}:INSPECT_FILE", FileAsked, InspectedFile, inspect_file)


def is_adapter(path: Path) -> bool:
    """False for a file that is not GGUF. Raises OSError."""
    try:
        return gguf_header.read(path).text("general.type") == "adapter"
    except Malformed:
        return False


def _described(path: Path, header: Header) -> InspectedAdapter:
    pairs = [tensor for tensor in header.tensors if tensor.name.endswith(_FIRST)]
    rank = max((min(tensor.shape) for tensor in pairs), default=0)
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    scale = float(alpha) if isinstance(alpha, float) else 0.0
    names = [tensor.name.removesuffix(_FIRST).removesuffix(".weight") for tensor in pairs]
    return InspectedAdapter(
        path=path,
        bytes=path.stat().st_size,
        digest="",
        name="",
        architecture=header.text("general.architecture") or "unknown",
        kind="adapter",
        rank=rank,
        alpha=scale,
        scale=scale / rank if scale and rank else 1.0,  # llama.cpp takes an alpha of 0 for none
        targets=sorted({name.split(".")[-1] for name in names}),
        layers=len({name.split(".")[1] for name in names if name.startswith("blk.")}),
        parameters=sum(tensor.elements for tensor in header.tensors),
        types=types_of(list(header.tensors)),
        fits=[],
    )


def _fitting(head: Path, path: Path, base: Path | None) -> tuple[list[str], str | None]:
    """The models that it fits, and why it does not fit `base`."""
    if base is not None:
        if reason := _unfit(head, base):
            return [], reason
        return [str(base)], None
    tried = (file for file in _models(path) if _unfit(head, file) is None)
    return [str(file) for file in tried], None


def _models(path: Path) -> Iterator[Path]:
    beside: Sequence[Path] = sorted(path.parent.glob("*.gguf"))
    yield from itertools.islice((file for file in beside if file != path), _MOST_MODELS)
    try:
        yield default_path()
    except SettingsError:
        return  # there is none


def _unfit(head: Path, base: Path) -> str | None:
    try:
        check_file(base)  # reading a pipe could wait forever
        adapters.check(head, base)
    except SettingsError as exc:
        return str(exc)
    return None
