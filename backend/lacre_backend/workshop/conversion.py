"""Converts a checkpoint of Hugging Face to GGUF, and tries the result: `lacre model convert`.

Rules:
- The draft is loaded in a child, tokenizes every byte, and computes. Its tokens and logits are compared with what
  transformers makes of the same texts. Only then does the draft get its name.
- What could not be compared is said in the answer, never left out.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from lacre.errors import SettingsError
from lacre_backend.engine import adapters
from lacre_backend.engine.adapters import AdapterFile
from lacre_backend.engine.context import Batch
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.model import MIN_N_CTX, Model, ModelMetadata
from lacre_backend.engine.protocol import Embedding, EngineError, Task, TaskKind
from lacre_backend.engine.sizing import LlamaSettings, derive, free_memory
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models import checksum
from lacre_backend.workshop import converter, reference
from lacre_backend.workshop.checkpoint import ModelFolder, read_checkpoint
from lacre_backend.workshop.child import Job, Report, run
from lacre_backend.workshop.converter import ConverterPlace
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.published import CheckedSource, check_source

# Prose, code, digits, spaces, scripts of several bytes: where tokenizers differ. Short, because a small machine computes them.
SAMPLES: Final = (
    "The capital of France is Paris. I've said they'LL come, haven't I?",
    "for i in range(10):\n    print(f'{i:03d}', i ** 2)\n",
    "In 2026, 123456 people paid $1,234.56 each.\t\n\n  Then they left.",
    "Größe, naïve café, 東京は日本の首都です, Привет мир, مرحبا",
    "🙂 👩‍👩‍👧 ∑∞ \u00a0 ﬁn",
)
# Mean KL to transformers, in nats. Rounding to 16 bits gives 1e-4, rounding to Q8_0 0.005, and rows in a wrong order 1 or more.
MOST_LOSS: Final = 0.02
_OF_EFFECT: Final = 0.1  # of an adapter's effect may be lost: an adapter that does half of its work must not pass
_LEAST_LOSS: Final = 1e-3  # is always allowed: the rounding of the base model and of the adapter, to 16 bits
_READABLE: Final = 4  # bytes of a parameter in transformers' memory
_SPARE: Final = 2**30  # bytes: PyTorch itself, and what it computes in between
_REFERENCE_LIMIT: Final = 3600  # seconds for transformers; a large model on few cores takes minutes to load
_SHARES: Final = (0.55, 0.75, 0.9)  # of the progress: after converting, after transformers, before the name


class ConvertedType(StrEnum):
    """The converter's names. auto: 16 bits, as the checkpoint has them."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


def converted_type(name: str) -> ConvertedType:
    """Raises SettingsError."""
    try:
        return ConvertedType(name)
    except ValueError:
        raise SettingsError(f"--type is {name!r}; give one of: {', '.join(ConvertedType)}.") from None


_BYTES: Final = {ConvertedType.F32: 4.0, ConvertedType.Q8_0: 34 / 32}  # of a parameter; others: 2


@dataclass(frozen=True, slots=True)
class ProbeAsked:
    """path: of the draft. compared: what `reference.py` wrote. adapter: the draft of one, if `path` is its base model."""

    path: Path
    compared: Path
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """- kind: `generate` or `embed`. tokens: how many of transformers' own were the same: all.
    - kl: the mean KL divergence to transformers at each token, in nats. same_top: the share of equal most likely tokens.
    - not_compared: why there is neither.
    - effect: of an adapter: the KL divergence of the base model alone to transformers with the adapter.
    """  # fmt: skip

    kind: str
    tokens: int
    kl: float | None = None
    same_top: float | None = None
    not_compared: str | None = None
    effect: float | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """The new file. parameters: of the checkpoint. source: how its files were checked."""

    path: Path
    architecture: str
    parameters: int
    bytes: int
    probe: Probed
    source: CheckedSource


def convert_model(
    folder: Path,
    out: Path,
    kind: ConvertedType,
    where: ConverterPlace,
    report: Report,
    *,
    trust_code: bool = False,
    signers: Sequence[Path] = (),
) -> Converted:
    """Writes `out`. trust_code: let Python files of the model run. signers: as in `check_source`.

    Raises SettingsError, what `check_source` raises, or OSError.
    """
    source = read_checkpoint(folder, trust_code=trust_code)
    report("checking the source", 0.0)
    checked = check_source(source, signers)
    if set("{}") & set(str(out)):
        raise SettingsError(f"{out}: the converter takes braces in a path for a pattern. Give another --out.")
    size = int(source.parameters * _BYTES.get(kind, 2))
    with converter.unpacked(where.sources) as code, draft(out, source.weights, size=size) as path:
        options = [str(folder), "--outfile", str(path.absolute()), "--outtype", kind.value]
        converter.convert(where.python, code, options, lambda what, share: report(what, share * _SHARES[0]))
        if not path.is_file():
            raise SettingsError(f"The converter wrote nothing for {folder}. Check that this is a language model.")
        checksum.write(path)
        with tempfile.TemporaryDirectory(prefix="lacre-reference-") as kept:
            compared = Path(kept) / "reference.npz"
            report("computing with transformers", _SHARES[0])
            ask_transformers(where.python, source, compared, trust_code=trust_code)
            report("comparing", _SHARES[1])
            probe = run(PROBE, ProbeAsked(path, compared))
        report("writing", _SHARES[2])
        written = path.stat().st_size
    return Converted(out, source.architecture, source.parameters, written, probe, checked)


def ask_transformers(python: Path, source: ModelFolder, out: Path, *, trust_code: bool, adapter: Path | None = None) -> None:
    """Writes transformers' tokens of `SAMPLES`; and its logits, if the machine has memory for them. adapter: a folder of PEFT
    that is applied. Raises SettingsError.
    """
    fits = source.parameters * _READABLE + _SPARE < free_memory()
    asked = {"folder": str(source.folder.absolute()), "texts": SAMPLES, "logits": fits, "trust": trust_code}
    asked |= {"adapter": None if adapter is None else str(adapter.absolute())}
    command: list[str | Path] = [python, "-P", Path(reference.__file__), out]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked).encode(),
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=converter.surroundings(),
            timeout=_REFERENCE_LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise SettingsError("transformers took more than an hour for a few texts. Nothing was written.") from None
    if done.returncode != 0 or not out.is_file():
        lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        last = lines[-1][-300:] if lines else f"exit code {done.returncode}"
        raise SettingsError(f"transformers cannot read this model's tokenizer: {last}. Nothing was written.")


# In the child


def probe(asked: ProbeAsked, _report: Report) -> Probed:
    """Loads the model, computes with it and compares. Raises SettingsError, which says what is different."""
    with closing(Tokenizer(asked.path)) as tokenizer, np.load(asked.compared, allow_pickle=False) as told:
        theirs = [told[f"ids_{i}"].tolist() for i in range(len(SAMPLES))]
        untold = str(told["untold"]) or None
        logits = None if untold else [told[f"logits_{i}"] for i in range(len(SAMPLES))]
        for text, ids in zip(SAMPLES, theirs, strict=True):
            _compare_tokens(text, tokenizer.words(text), ids)
        tokens = sum(map(len, theirs))
        if ModelMetadata.read(asked.path).kind is TaskKind.EMBED:
            if asked.adapter is not None:
                raise SettingsError(
                    "The base model embeds, and adapters are served with models that generate. Nothing was written."
                )
            asyncio.run(_embed(asked.path, theirs))
            return Probed("embed", tokens, not_compared="an embedding model has no logits")
        ours = _logits(asked.path, tokenizer, theirs, asked.adapter)
        base = None if asked.adapter is None or untold else _logits(asked.path, tokenizer, theirs)
    if logits is None:
        return Probed("generate", tokens, not_compared=untold)
    loss, same = divergence(np.concatenate(logits), np.concatenate(ours))
    effect = None if base is None else divergence(np.concatenate(logits), np.concatenate(base))[0]
    most = MOST_LOSS if effect is None else min(MOST_LOSS, max(effect * _OF_EFFECT, _LEAST_LOSS))
    if not loss <= most:
        raise SettingsError(
            f"The converted model computes something else than transformers: KL {loss:.3f} at each token, and at most "
            f"{most:.3g} is allowed. Nothing was written. The converter does not suit this checkpoint."
        )
    return Probed("generate", tokens, round(loss, 6), round(same, 4), effect=None if effect is None else round(effect, 6))


PROBE: Final = Job(f"{__name__}:PROBE", ProbeAsked, Probed, probe)


def _compare_tokens(text: str, ours: list[int], theirs: list[int]) -> None:
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        raise SettingsError(
            f"The converted model makes other tokens of {text[:40]!r} than transformers, from number {at + 1} on. Nothing was "
            "written. Check that the tokenizer's files are the publisher's own."
        )


def divergence(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> tuple[float, float]:
    """The mean KL divergence of `ours` from `theirs` in nats, and the share of rows with the same top. Rows of logits.

    A model may have a larger matrix than its vocabulary: the shorter of the two counts.
    """
    width = min(theirs.shape[1], ours.shape[1])
    wanted, found = _log_softmax(theirs[:, :width]), _log_softmax(ours[:, :width])
    loss = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    return float(loss.mean()), float((wanted.argmax(axis=1) == found.argmax(axis=1)).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    whole: NDArray[np.float64] = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return whole


def _logits(
    path: Path, tokenizer: Tokenizer, texts: Sequence[Sequence[int]], adapter: Path | None = None
) -> list[NDArray[np.float32]]:
    """At every position of each text. All are computed in one step, each as its own sequence."""
    settings = LlamaSettings(n_ctx=max(MIN_N_CTX, *map(len, texts)), slots=len(texts), beyond_training=True)
    threads = derive(path, settings).threads
    model = Model(path, name=path.stem, digest="", n_ctx=MIN_N_CTX, gpu=settings.gpu, tokenizer=tokenizer)
    ends = list(itertools.accumulate(map(len, texts)))
    loaded = {} if adapter is None else adapters.load(model, path, [AdapterFile("", adapter, "")])
    pointer = _context(model, ends[-1], len(texts), threads)
    try:
        for each in loaded.values():
            L.llama_set_adapters_lora(pointer, (L.llama_adapter_lora_p_ctypes * 1)(each), 1, (ctypes.c_float * 1)(1.0))
        batch = Batch(ends[-1])
        for sequence, (ids, end) in enumerate(zip(texts, ends, strict=True)):
            mine = slice(end - len(ids), end)
            batch.token[mine], batch.pos[mine], batch.sequence[mine] = ids, range(len(ids)), sequence
        batch.output[:] = 1
        batch.struct.n_tokens = ends[-1]
        if code := L.llama_decode(pointer, batch.struct):
            raise EngineError(f"llama.cpp could not compute with the converted model (code {code}). Nothing was written.")
        found = np.ctypeslib.as_array(L.llama_get_logits(pointer), (ends[-1], model.n_vocab)).copy()
    finally:
        L.llama_free(pointer)
    if not np.isfinite(found).all():
        raise SettingsError("The converted model computes no numbers (NaN). Nothing was written. Check its weights.")
    return np.split(found, ends[:-1])


def _context(model: Model, tokens: int, sequences: int, threads: int) -> Any:
    params = L.llama_context_default_params()
    params.n_batch = params.n_ubatch = params.n_outputs_max = tokens
    params.n_ctx, params.n_seq_max, params.kv_unified = tokens, sequences, True
    params.n_threads = params.n_threads_batch = threads
    params.no_perf = True
    pointer = L.llama_init_from_model(model.pointer, params)
    if not pointer:
        raise SettingsError("There is too little memory to try the converted model. Nothing was written. Stop other programs.")
    return pointer


async def _embed(path: Path, texts: Sequence[Sequence[int]]) -> None:
    with closing(LlamaEmbedder(path, name=path.stem, digest="")) as engine:
        before, after = engine.model.frame
        for number, ids in enumerate(texts):
            task = Task(str(number), (*before, *ids, *after), 1, TaskKind.EMBED)
            vectors = [event.values async for event in engine.submit(task) if isinstance(event, Embedding)]
            if not vectors or not np.isfinite(vectors[0]).all():
                raise EngineError("The converted model computes no vector. Nothing was written. Check its weights.")
