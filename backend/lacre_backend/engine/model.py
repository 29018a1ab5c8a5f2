"""A model loaded by llama.cpp: its vocabulary, its properties and its control tokens.

Rules:
- llama.cpp's log is kept only for errors while a model *loads*, when the process has no prompt. At all other times it is
  dropped unread.
- Everything here is constant after loading, so any thread may call any method.
- The model is freed when its last user releases it, never during a call.
"""

from __future__ import annotations

import ctypes
import re
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import llama_cpp as L
from llama_cpp.llama_cpp import _base_path as _llama_folder
from llama_cpp.llama_cpp import _lib as _llama

from lacre.errors import SettingsError
from lacre_backend.engine.pairs import pair_form
from lacre_backend.engine.protocol import ControlToken, InfillTokens, ModelInfo, TaskKind
from lacre_backend.engine.stream_file import Readable, stream_file
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.engine.vocabulary import Vocabulary

DEFAULT_N_CTX: Final = 8192  # the cache takes memory for every cell at once, even if the model was trained on longer texts
MIN_N_CTX: Final = 64
MAX_PIECE: Final = 1024  # bytes of one token; the longest known are runs of about a hundred spaces
_MAX_FACTOR: Final = 1024.0  # by which scaling may extend a context; models in use have 64 at most
_LOG_LEVEL_ERROR: Final = 4

# llama.cpp has one log callback per process.
_loading: Final = threading.Lock()


@L.llama_log_callback  # type: ignore[untyped-decorator]
def _drop(_level: int, _text: bytes, _user_data: object) -> None:
    """Drops llama.cpp's log outside of loading."""


def silence() -> None:
    """Drops llama.cpp's log. Importing llama_cpp sets a callback that prints."""
    L.llama_log_set(_drop, ctypes.c_void_p(0))


SplitMode = Literal["none", "layer", "row", "tensor"]
_SPLIT_MODES: Final = {
    "none": L.LLAMA_SPLIT_MODE_NONE,
    "layer": L.LLAMA_SPLIT_MODE_LAYER,
    "row": L.LLAMA_SPLIT_MODE_ROW,
    "tensor": L.LLAMA_SPLIT_MODE_TENSOR,
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """The parts on GPUs, if llama.cpp was built for them. layers: -1 for all. main: the device for split mode "none". shares:
    each device's proportion of the model.
    """

    layers: int = -1
    split_mode: SplitMode = "layer"
    main: int = 0
    shares: tuple[float, ...] = ()


def _params(gpu: Gpu) -> Any:
    if gpu.split_mode == "tensor" and not L.llama_supports_gpu_offload():
        raise SettingsError('split_mode = "tensor" needs a GPU, and this llama.cpp was built for none: set "layer".')
    params = L.llama_model_default_params()
    params.n_gpu_layers = gpu.layers
    params.split_mode = _SPLIT_MODES[gpu.split_mode]
    params.main_gpu = gpu.main
    if gpu.shares:
        devices = int(L.llama_max_devices())
        if len(gpu.shares) > devices:
            raise SettingsError(f"tensor_split names {len(gpu.shares)} devices; this llama.cpp supports {devices} at most.")
        params.tensor_split = (ctypes.c_float * devices)(*gpu.shares)
    return params


class Weights(Readable, Protocol):
    """A model that is read through this object, not from a file: a sealed one."""

    def loaded(self) -> None:
        """Called when nothing reads it any longer."""


@contextmanager
def logged_errors() -> Iterator[Sequence[str]]:
    """Keeps llama.cpp's last error messages while the block loads something. One block runs at a time."""
    errors: deque[str] = deque(maxlen=8)

    @L.llama_log_callback  # type: ignore[untyped-decorator]
    def keep_errors(level: int, text: bytes, _user_data: object) -> None:
        if level == _LOG_LEVEL_ERROR and (said := text.decode("utf-8", "replace").strip(" .\n")):
            errors.append(said)

    with _loading:
        L.llama_log_set(keep_errors, ctypes.c_void_p(0))
        try:
            yield errors
        finally:
            silence()


def _load(path: Path, params: Any, weights: Weights | None = None) -> Any:
    """The model. Raises SettingsError with llama.cpp's last error messages, or what reading `weights` raised."""
    with logged_errors() as errors:
        _load_kernels()
        L.llama_backend_init()
        pointer = _pointer(path, params, weights)
    if not pointer:
        reason = "; ".join(errors) or "it gives no reason"
        raise SettingsError(
            f"llama.cpp cannot load {path}: {reason}. "
            "Check that the file is complete, and of an architecture that this llama.cpp supports."
        )
    return pointer


def _pointer(path: Path, params: Any, weights: Weights | None) -> Any:
    if weights is None:
        return L.llama_model_load_from_file(str(path).encode(), params)
    params.load_mode = L.LLAMA_LOAD_MODE_MLOCK  # never swapped out, where the system allows it
    with stream_file(weights) as stream:
        pointer = L.llama_model_load_from_file_ptr(stream.pointer, params)
    weights.loaded()
    if stream.error is not None:
        if pointer:
            L.llama_model_free(pointer)
        raise stream.error
    return pointer


def _load_kernels() -> None:
    """Makes a portable build load the kernels that run fastest on this processor.

    Any other build has its kernels from the start. ggml is reached through llama.cpp's own handle: opened by path it would be
    another copy, whose kernels are unused.
    """
    if int(_llama.ggml_backend_reg_count()) == 0:
        _llama.ggml_backend_load_all_from_path(str(_llama_folder).encode())


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model's properties, read before its weights are loaded. bytes_per_token: of one cell in the cache, at 16 bits.

    - cuttable: whether a sequence's cache can be cut anywhere; recurrent models keep one state, not cells.
    - n_ctx_most: tokens that it was made for, with the file's scaling of positions; None if the file does not say.
    - generates: whether each token depends only on earlier ones.
    """

    architecture: str
    n_ctx_train: int
    n_embd: int
    bytes_per_token: int
    pooling: int | None
    cuttable: bool
    n_ctx_most: int | None = None
    generates: bool = True

    @property
    def kind(self) -> TaskKind:
        """The model's purpose: a model whose file names a pooling type embeds."""
        return TaskKind.GENERATE if self.pooling is None else TaskKind.EMBED

    @property
    def ranks(self) -> bool:
        """Whether it scores a document for a query, instead of a vector of a text."""
        return self.pooling == L.LLAMA_POOLING_TYPE_RANK

    @classmethod
    def read(cls, path: Path) -> ModelMetadata:
        """Raises SettingsError."""
        params = L.llama_model_default_params()
        params.vocab_only = True
        pointer = _load(path, params)
        try:
            return cls._of(pointer)
        finally:
            L.llama_model_free(pointer)

    @classmethod
    def _of(cls, pointer: Any) -> ModelMetadata:
        architecture = _metadata(pointer, "general.architecture") or ""

        def number(name: str, default: int) -> int:
            value = _metadata(pointer, f"{architecture}.{name}")
            # Some models list one number per layer; use the largest, to be safe.
            numbers = [int(part) for part in re.findall(r"-?[0-9]+", value or "")]
            return max(numbers, default=default)

        layers, width, heads = number("block_count", 1), number("embedding_length", 1), number("attention.head_count", 1)
        head = width // max(heads, 1)
        both = number("attention.key_length", head) + number("attention.value_length", head)
        pooling = number("pooling_type", -1)
        trained = number("context_length", 0)
        scaled = number("rope.scaling.original_context_length", 0) * _factor(
            _metadata(pointer, f"{architecture}.rope.scaling.factor")
        )
        causal = (_metadata(pointer, f"{architecture}.attention.causal") or "true").lower() != "false"
        return cls(
            architecture=architecture,
            n_ctx_train=trained or DEFAULT_N_CTX,
            n_embd=width,
            bytes_per_token=2 * layers * number("attention.head_count_kv", heads) * both,
            pooling=None if pooling < 0 else pooling,
            cuttable=not (L.llama_model_is_recurrent(pointer) or L.llama_model_is_hybrid(pointer)),
            n_ctx_most=max(trained, int(scaled)) if trained else None,
            generates=causal and not L.llama_model_has_encoder(pointer),
        )


def _factor(text: str | None) -> float:
    """How many times longer texts may be than the original context; 1 if the file does not say."""
    try:
        factor = float(text or 1)
    except ValueError:
        return 1.0
    return factor if 1 <= factor <= _MAX_FACTOR else 1.0


def _metadata(pointer: Any, key: str) -> str | None:
    buffer = ctypes.create_string_buffer(4096)
    length = L.llama_model_meta_val_str(pointer, key.encode(), buffer, len(buffer))
    return None if length < 0 else buffer.value.decode("utf-8", "replace")


class Model:
    """A loaded GGUF file. `pointer` and `vocab` are llama.cpp's, for the engine's own use."""

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        digest: str,
        n_ctx: int,
        gpu: Gpu,
        kind: TaskKind = TaskKind.GENERATE,
        tokenizer: Tokenizer,
        vocab_only: bool = False,
        weights: Weights | None = None,
    ) -> None:
        """tokenizer: of the same file. Its owner closes it. vocab_only: load no weights; such a model cannot decode.

        weights: of a sealed model, of which `path` has the head alone.
        """
        self.tokenizer = tokenizer
        params = _params(gpu)
        params.vocab_only = vocab_only
        self.pointer = _load(path, params, weights)
        self._weights = weights  # `path` exists as long as it does
        # Not at process exit: a daemon thread may still decode then, and the system frees the memory anyway.
        weakref.finalize(self, L.llama_model_free, self.pointer).atexit = False
        self.vocab = L.llama_model_get_vocab(self.pointer)
        self.n_vocab = int(L.llama_vocab_n_tokens(self.vocab))
        self.vocabulary = Vocabulary(
            [self._read_piece(token) for token in range(self.n_vocab)],
            [token for token in range(self.n_vocab) if L.llama_vocab_is_eog(self.vocab, token)],
        )
        self.info = self._read_info(path, name, digest, n_ctx, kind)

    def piece(self, token: int) -> bytes:
        """A token's own bytes. Control tokens have none: a model's answer cannot contain one as text."""
        return self.vocabulary.pieces[token]

    def speak(self, tokens: Sequence[int]) -> None:
        """Makes control tokens text in answers, except those that end one."""
        spoken = self.vocabulary.speak(tokens, self.info.control_tokens)
        self.info = replace(self.info, spoken_ids=self.info.spoken_ids.union(spoken))

    def released(self, tokens: Sequence[int], stop: Sequence[str]) -> list[str]:
        """The text that each of these tokens of an answer releases."""
        return self.vocabulary.released(tokens, stop)

    def ends(self, token: int) -> bool:
        """Whether a token ends the generation."""
        return token in self.vocabulary.ends

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids. special: whether the text of a control token becomes that token. No token is added around them."""
        return self.tokenizer.words(text, parse_special=special)

    def _read_piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(MAX_PIECE)
        length = L.llama_token_to_piece(self.vocab, token, buffer, MAX_PIECE, 0, False)
        if length < 0:
            raise SettingsError(f"Token {token} of this model is {-length} bytes long; at most {MAX_PIECE} are supported.")
        return buffer.raw[:length]

    def _control_token(self, token: int) -> ControlToken:
        attr = L.llama_vocab_get_attr(self.vocab, token)
        return ControlToken(
            id=token,
            text=L.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace"),
            lstrip=bool(attr & L.LLAMA_TOKEN_ATTR_LSTRIP),
            rstrip=bool(attr & L.LLAMA_TOKEN_ATTR_RSTRIP),
        )

    def _is_control(self, token: int) -> bool:
        # A token that ends generation controls the model, even if the file gives it another type.
        steering = L.LLAMA_TOKEN_ATTR_CONTROL | L.LLAMA_TOKEN_ATTR_UNKNOWN
        return bool(L.llama_vocab_get_attr(self.vocab, token) & steering) or self.ends(token)

    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that the tokenizer adds before and after a text, such as `[CLS]` and `[SEP]`."""
        plain = self.tokenize("a", special=False)
        framed = self.tokenizer.words("a", add_special=True)
        before = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), None)
        if before is None:
            return (), ()
        return tuple(framed[:before]), tuple(framed[before + len(plain) :])

    def _infill(self) -> InfillTokens | None:
        named = (L.llama_vocab_fim_pre, L.llama_vocab_fim_suf, L.llama_vocab_fim_mid)
        before, after, middle = (int(read(self.vocab)) for read in named)
        if min(before, after, middle) < 0:
            return None
        separator = int(L.llama_vocab_fim_sep(self.vocab))
        return InfillTokens(
            self._control_token(before),
            self._control_token(after),
            self._control_token(middle),
            self._control_token(separator) if separator >= 0 else None,
        )

    def _read_info(self, path: Path, name: str, digest: str, n_ctx: int, kind: TaskKind) -> ModelInfo:
        bos, eos = L.llama_vocab_bos(self.vocab), L.llama_vocab_eos(self.vocab)
        template = L.llama_model_chat_template(self.pointer, None)
        return ModelInfo(
            name=name,
            digest=digest,
            created=int(path.stat().st_mtime),
            n_ctx=n_ctx,
            n_vocab=self.n_vocab,
            longest_piece=max(map(len, self.vocabulary.pieces)),
            chat_template=template.decode("utf-8", "replace") if template else None,
            bos=self._control_token(bos) if bos >= 0 else None,
            eos=self._control_token(eos) if eos >= 0 else None,
            add_bos=bool(L.llama_vocab_get_add_bos(self.vocab)),
            control_tokens=tuple(self._control_token(t) for t in range(self.n_vocab) if self._is_control(t)),
            kinds=frozenset({kind}),
            n_embd=int(L.llama_model_n_embd_out(self.pointer)),
            frame=self._frame(),
            infill=self._infill(),
            pair=pair_form(self.pointer, self.tokenize) if kind is TaskKind.RERANK else (),
        )
