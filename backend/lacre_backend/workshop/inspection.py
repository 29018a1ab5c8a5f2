"""What a GGUF file holds, whether it is whole, and what this machine can run of it: for `lacre model inspect`.

Rules:
- Its own reader walks the head first and checks that every tensor lies within the file. llama.cpp sees the file after that.
- A fault that leaves the rest readable (no template, an unusable vocabulary) is a line of `faults`, not an error.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import llama_cpp as L
from llama_cpp.llama_cpp import _lib as _llama

from lacre.errors import InvalidMessage, SettingsError
from lacre_backend.api.template.prompt import ChatTemplate
from lacre_backend.api.tools.format import DEEPSEEK, DEEPSEEK_V3_1, FUNCTIONARY, HERMES, KIMI, LLAMA, MISTRAL, MISTRAL_LIST
from lacre_backend.api.tools.gemma import GEMMA
from lacre_backend.api.tools.harmony import HARMONY_CALLS
from lacre_backend.api.tools.tagged import GLM, QWEN_CODER, SEED
from lacre_backend.engine import gguf_header, sizing
from lacre_backend.engine.gguf_header import Header, Malformed, Tensor
from lacre_backend.engine.model import Gpu, Model, ModelMetadata
from lacre_backend.engine.protocol import TaskKind
from lacre_backend.engine.shards import check_file, files_of
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.engine.tensor_bytes import tensor_bytes
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models.opening import Conditions, OpenedModel, open_model
from lacre_backend.models.sealed import is_sealed, read_head
from lacre_backend.models.signatures import claimed_signer
from lacre_backend.workshop.bandwidth import bytes_per_second
from lacre_backend.workshop.child import Report
from lacre_fabric.keys.kms import PLAIN

NO_WEIGHTS: Final = "it holds a vocabulary and no weights. Give the whole model"
_CALLS: Final = (
    (HERMES, "hermes"), (LLAMA, "llama"), (MISTRAL, "mistral"), (MISTRAL_LIST, "mistral-2024"), (DEEPSEEK, "deepseek"),
    (DEEPSEEK_V3_1, "deepseek-3.1"), (KIMI, "kimi"), (FUNCTIONARY, "functionary"), (QWEN_CODER, "qwen-coder"), (SEED, "seed"),
    (GLM, "glm"), (GEMMA, "gemma-4"), (HARMONY_CALLS, "harmony"),
)  # fmt: skip
_SUPER_BLOCK: Final = 256  # weights that a K or IQ type packs together; a row of another length falls back to an older type
_ENOUGH_CONTEXT: Final = 64  # tokens; for the template's trial no context is used


@dataclass(frozen=True, slots=True)
class InspectAsked:
    """path: of the model, or of any of its shards. kms: the address of the service that opens a sealed one."""

    path: Path
    kms: str = PLAIN


@dataclass(frozen=True, slots=True)
class TypeUse:
    """One type of the weights. parameters, bytes: of all tensors of this type."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class OnThisNode:
    """What the machine can run. reason: why it does not fit.

    tokens_per_second: of one stream, at most: each token reads every weight, and the speed of the memory was measured.
    """

    fits: bool
    reason: str | None = None
    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """- path, files: the first file, and all of them. bytes: of all. digest: of all in sequence, `sha256:` and hex.
    - type: the name that llama.cpp gives the mixture of types. types: by name. fell_back: tensors in another type than the
      mixture's, because their rows are no multiple of 256.
    - context: tokens that it was trained on. kv_bytes_per_token: of the cache at 16 bits.
    - template: whether it has a chat template of its own. tool_format: how it writes calls; None: it does not, or unknown.
    - checked: whether its checksum matches; False if it has none. Every byte of a sealed file is checked when it is opened.
    - sealed, signature: None for a plain file, and for one without a signature beside it.
    """  # fmt: skip

    path: Path
    files: list[str]
    bytes: int
    digest: str
    name: str
    architecture: str
    kind: str
    parameters: int
    type: str
    types: dict[str, TypeUse]
    fell_back: dict[str, str]
    layers: int | None
    embedding: int
    context: int
    kv_bytes_per_token: int
    vocabulary: int | None
    tokenizer: str | None
    template: bool
    tool_format: str | None
    node: OnThisNode
    checked: bool = False
    sealed: str | None = None
    signature: str | None = None
    faults: list[str] = field(default_factory=list)


def inspect(asked: InspectAsked, report: Report) -> Inspected:
    """Raises SettingsError for a file that no command could use, or OSError."""
    report("reading", 0.0)
    path = asked.path
    check_file(path)
    sealed = is_sealed(path)
    headers = [] if sealed else [(file, read_header(file)) for file in files_of(path)]
    for file, header in headers:
        check_extents(file, header)
    report("digest", 0.2)
    opened = open_model(path, None, Conditions(asked.kms))
    found = opened.file
    if sealed:
        headers = [(found.path, read_header(found.path))]
    report("loading the vocabulary", 0.7)
    facts = ModelMetadata.read(found.path)
    first = headers[0][1]
    faults = list(_faults(first, _kind(facts)))
    calls = None
    try:
        calls = _tool_format(found.path)
    except SettingsError as exc:
        faults.append(str(exc))
    report("this machine", 0.9)
    size = sum(file.stat().st_size for file, _ in headers)
    tensors = [tensor for _, header in headers for tensor in header.tensors]
    mixture = mixture_of(first)
    return Inspected(
        path=path if sealed else found.path,
        files=[path.name] if sealed else [file.name for file, _ in headers],
        bytes=size,
        digest=found.digest,
        name=found.name,
        architecture=facts.architecture,
        kind=_kind(facts),
        parameters=sum(tensor.elements for tensor in tensors),
        type=mixture,
        types=types_of(tensors),
        fell_back=fell_back_in(mixture, tensors),
        layers=first.number(f"{facts.architecture}.block_count"),
        embedding=facts.n_embd,
        context=facts.n_ctx_train,
        kv_bytes_per_token=facts.bytes_per_token,
        vocabulary=_items(first, "tokenizer.ggml.tokens"),
        tokenizer=first.text("tokenizer.ggml.pre") or first.text("tokenizer.ggml.model"),
        template=bool(first.text("tokenizer.chat_template")),
        tool_format=calls,
        node=_node(found.path, facts, size) if tensors else OnThisNode(False, reason=NO_WEIGHTS),
        checked=found.digests.checked,
        sealed=f"by {read_head(path).scheme}:" if sealed else None,
        signature=said_signature(opened),
        faults=faults,
    )


def check_weights(path: Path, headers: Iterable[Header]) -> None:
    """Raises SettingsError if there are none."""
    if not any(header.tensors for header in headers):
        raise SettingsError(f"{path} cannot be run: {NO_WEIGHTS}.")


def read_header(path: Path) -> Header:
    try:
        return gguf_header.read(path)
    except Malformed as exc:
        raise SettingsError(f"{path} is not a usable GGUF file: {exc}. Copy it again, or convert the model again.") from None


def check_whole(path: Path) -> None:
    """Raises SettingsError if a file of the model is cut off, or OSError. Reads only heads."""
    for file in files_of(path):
        check_extents(file, read_header(file))


def check_extents(path: Path, header: Header) -> None:
    """Raises SettingsError if a tensor lies outside the file, or has a type or a shape that ggml does not know."""
    size = path.stat().st_size
    for tensor in header.tensors:
        end = header.data_at + tensor.offset + tensor_bytes(path, tensor)
        if end > size:
            raise SettingsError(
                f"{path} is cut off: its tensor {tensor.name[:64]!r} ends at byte {end:,}, and the file has {size:,}. "
                "Copy it again."
            )


def type_name(kind: int) -> str:
    _llama.ggml_type_name.restype = ctypes.c_char_p
    return bytes(_llama.ggml_type_name(kind)).decode().upper()


def _kind(facts: ModelMetadata) -> str:
    """What it does, as a verb."""
    if facts.ranks:
        return "rerank"
    if facts.kind is TaskKind.EMBED:
        return "embed"
    return "generate" if facts.generates else "encode"


def types_of(tensors: list[Tensor]) -> dict[str, TypeUse]:
    """By name, the largest first."""
    used: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        used[type_name(tensor.kind)].append(tensor)
    most = sorted(used.items(), key=lambda pair: -sum(tensor.elements for tensor in pair[1]))
    return {
        name: TypeUse(len(those), sum(t.elements for t in those), sum(tensor_bytes(Path(), t) for t in those))
        for name, those in most
    }


def mixture_of(header: Header) -> str:
    """llama.cpp's name of the file type, such as `Q4_K_M`."""
    number = header.number("general.file_type")
    names = {
        int(value): name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_")
        for name, value in vars(L).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED" and isinstance(value, int)
    }
    if number in names:
        return names[number]
    kinds = Counter({type_name(t.kind): t.elements for t in header.tensors if len(t.shape) > 1})
    return kinds.most_common(1)[0][0] if kinds else "unknown"


def fell_back_in(mixture: str, tensors: list[Tensor]) -> dict[str, str]:
    """Only K and IQ types pack 256 weights together, and need rows that are multiples of it."""
    if "_K" not in mixture and not mixture.startswith(("IQ", "TQ")):
        return {}
    return {
        tensor.name: type_name(tensor.kind)
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.shape[0] % _SUPER_BLOCK and int(_llama.ggml_blck_size(tensor.kind)) < _SUPER_BLOCK
    }


def _items(header: Header, key: str) -> int | None:
    value = header.metadata.get(key)
    return value.count if isinstance(value, gguf_header.MetadataArray) else None


def _faults(header: Header, kind: str) -> Iterator[str]:
    if kind == "generate" and not header.text("tokenizer.chat_template"):
        yield "It has no chat template: only text completion works well."


def _tool_format(path: Path) -> str | None:
    """Raises SettingsError if the vocabulary or the template is unusable."""
    with closing(Tokenizer(path)) as tokenizer:  # tries every byte, in a process of its own
        model = Model(
            path, name=path.stem, digest="", n_ctx=_ENOUGH_CONTEXT, gpu=Gpu(layers=0), tokenizer=tokenizer, vocab_only=True
        )
        if not model.info.chat_template:
            return None
        calls = ChatTemplate(model.info).calls
    return next((name for form, name in _CALLS if form == calls), None)


def said_signature(opened: OpenedModel) -> str | None:
    """Who signed it as the signature says, which is not verified. None if there is none."""
    try:
        bundle = opened.bundle()
        return f"by the key {claimed_signer(bundle)} (not verified)" if bundle else None
    except InvalidMessage as exc:
        return f"unusable: {exc}"


def _node(path: Path, facts: ModelMetadata, size: int) -> OnThisNode:
    try:
        if facts.kind is TaskKind.EMBED:
            sizing.memory_for_caches(path, facts, LlamaSettings())
            return OnThisNode(True, context=facts.n_ctx_train, threads=len(os.sched_getaffinity(0)))
        sized = sizing.derive(path, LlamaSettings())
    except SettingsError as exc:
        return OnThisNode(False, reason=str(exc))
    limits = sized.limits
    expected = round(bytes_per_second() / size, 1)
    return OnThisNode(True, None, limits.context, limits.slots, sized.threads, expected)
