"""Decides context, sequences and threads for a model on this machine, before its weights are loaded.

Rules:
- A value in the settings is used as it is, or refused with the figures. Missing values are derived.
- Only the model's description is read (llama.cpp's vocabulary-only loading), never its weights.
- Available memory is what can be taken without swapping, and within the control group's limit if there is one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import llama_cpp as L

from lacre.errors import SettingsError
from lacre_backend.engine import shards
from lacre_backend.engine.context import BLOCKS, KvType
from lacre_backend.engine.drafting import MOST
from lacre_backend.engine.model import DEFAULT_N_CTX, MIN_N_CTX, Gpu, ModelMetadata
from lacre_backend.engine.pace import LEAST_PREFILL, MOST_PREFILL, PREFILL
from lacre_backend.engine.plan import BURST, CHUNK, SHARE, STEP, EngineLimits
from lacre_backend.engine.scheduler import PIECE

DEFAULT_SLOTS: Final = 8
MAX_SLOTS: Final = 256  # llama.cpp's own limit
MAX_STEP: Final = 16384  # tokens; beyond some thousands no device reads faster, and the buffers of a step grow with it
OVERHEAD: Final = 192 * 2**20  # bytes: llama.cpp's buffers for one step, and the process
CPU_ROWS: Final = 4  # rows that ggml's kernels for repacked weights process at once
IDLE_SHARE: Final = 0.25  # of the memory left beside weights and caches, for copies of idle caches
_COPIED: Final = 32  # bytes that a copy has for each token, beside its cell
# Of the memory left beside the weights, for caches without a set size: other programs run here too
SHARE_OF_MEMORY: Final = 0.5
# Bytes for those of 16-bit numbers: a block of 32 numbers takes 34 bytes in q8_0 and 18 in q4_0, not 64
_KV_BYTES: Final[dict[KvType, tuple[int, int]]] = {"f16": (1, 1), "bf16": (1, 1), "q8_0": (17, 32), "q4_0": (9, 32)}
_CGROUP: Final = Path("/sys/fs/cgroup")


SpeculationKind = Literal["off", "lookup", "draft"]


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """How to run a model. None: derived from the model and the machine.

    - n_ctx: tokens of one sequence. beyond_training: whether it may exceed the length in the file.
    - slots: parallel sequences. unified: one cache for all of them, with `cells` tokens in total, instead of one each.
    - flash: flash attention; None: llama.cpp decides. threads: None: every core that the process may use.
    - kv_type: the type of the caches' numbers. q8_0 takes 8.5 bits of each and q4_0 4.5; both need flash attention.
    - n_batch: tokens of a step. n_ubatch: those that llama.cpp computes at a time. None: a whole step.
    - chunk: tokens of prompts in a step that generates nothing. burst: tokens of all short prompts in a step that generates.
    - prefill: the share of a step's time that long prompts get while others generate.
    - idle_caches: bytes for copies of idle caches; 0: none are kept.
    - speculation: where guesses of next tokens come from: prompt lookup, or a draft model.
    """

    n_ctx: int | None = None
    threads: int | None = None
    slots: int | None = None
    unified: bool = False
    cells: int | None = None
    flash: bool | None = None
    kv_type: KvType = "f16"
    n_batch: int | None = None
    n_ubatch: int | None = None
    chunk: int | None = None
    burst: int | None = None
    prefill: float = PREFILL
    gpu: Gpu = field(default_factory=Gpu)
    beyond_training: bool = False
    idle_caches: int | None = None
    speculation: SpeculationKind = "off"


@dataclass(frozen=True, slots=True)
class EngineSizing:
    """The decision. cache_bytes: memory of the caches. idle_bytes: of the copies of idle ones."""

    limits: EngineLimits
    threads: int
    cache_bytes: int
    idle_bytes: int = 0


def derive(
    path: Path, settings: LlamaSettings, *, available: int | None = None, beside: int = 0, draft: Path | None = None
) -> EngineSizing:
    """Raises `SettingsError` if the settings are invalid or the model does not fit. available: bytes; None: measured. beside:
    bytes of its adapters. draft: a draft model, with a cache of its own for the same sequences.
    """
    _check(settings)
    facts = ModelMetadata.read(path)
    _check_file(path, facts, settings)
    beside += 0 if draft is None else shards.size(draft)
    room = memory_for_caches(path, facts, settings, available=available, beside=beside)
    cell = bytes_per_token(facts, settings)
    cell += 0 if draft is None else bytes_per_token(ModelMetadata.read(draft), settings)
    context = settings.n_ctx or _context(facts, room, cell)
    slots = settings.slots or _slots(room, context * cell)
    cells = (settings.cells or slots * context) if settings.unified else slots * context
    if not context <= cells <= slots * context:
        raise SettingsError(f"cells is {cells}; with {slots} slots of {context} tokens, use {context} to {slots * context}.")
    size = cells * cell
    if room is not None and size > room:
        raise SettingsError(
            f"The caches of {path.name} ({cells} tokens) take {_mib(size)}, and {_mib(room)} is free beside its weights. "
            "Set fewer slots or a smaller context."
        )
    threads = settings.threads or len(os.sched_getaffinity(0))
    multiple = 1 if room is None else CPU_ROWS
    step, chunk, burst, share = _steps(settings, slots)
    idle = _idle(facts, settings, None if room is None else room - size)
    limits = EngineLimits(
        slots=slots,
        context=context,
        cells=cells,
        unified=settings.unified,
        step=step,
        chunk=chunk,
        burst=burst,
        share=share,
        multiple=multiple,
        cuttable=facts.cuttable,
        drafts=min(_drafts(settings, slots), step - slots),
        saved=idle // (bytes_per_token(facts, settings) + _COPIED),
    )
    return EngineSizing(limits, threads, size, idle)


def _idle(facts: ModelMetadata, settings: LlamaSettings, left: int | None) -> int:
    """Bytes for copies of idle caches. left: bytes beside weights and caches; None: they are on a GPU, whose caches are copied
    only if the settings say so, because it reads a prompt about as fast.
    """
    wanted = settings.idle_caches
    if wanted and settings.unified:
        raise SettingsError("idle_caches is for a cache for each slot: remove unified, or idle_caches.")
    if not facts.cuttable or settings.unified or (left is None and wanted is None):
        return 0
    if wanted is None or left is None:
        return int(max(left or 0, 0) * IDLE_SHARE) if wanted is None else wanted
    if wanted > max(left, 0):
        raise SettingsError(
            f"idle_caches is {wanted} bytes, and {_mib(max(left, 0))} is free beside the weights and caches. Set fewer bytes."
        )
    return wanted


def _steps(settings: LlamaSettings, slots: int) -> tuple[int, int, int, int]:
    """Tokens of a step, a chunk, a burst and a share at first. Missing values are those of `EngineLimits`, or what fits."""
    wanted = slots + (settings.burst or min(BURST, settings.chunk or BURST)) + SHARE
    step = settings.n_batch or max(STEP, settings.chunk or 0, wanted)
    chunk = settings.chunk or min(CHUNK, step)
    burst = settings.burst or min(BURST, chunk, (step - slots) // 2)
    share = min(SHARE, step - slots - burst)
    if chunk > step or share < 1 or burst < 1:
        least = max(settings.chunk or 1, slots + (settings.burst or 1) + 1)
        raise SettingsError(
            f"n_batch is {step}. With {slots} slots, chunks of {chunk} and bursts of {max(burst, 1)}, set {least} or more."
        )
    if settings.n_ubatch is not None and settings.n_ubatch > step:
        raise SettingsError(f"n_ubatch is {settings.n_ubatch}, and n_batch {step}: set n_ubatch to {step} or less.")
    return step, chunk, burst, share


def _drafts(settings: LlamaSettings, slots: int) -> int:
    """How many guesses a step may check. A unified cache is computed as one text, whose steps stay below `PIECE` tokens."""
    if settings.speculation == "off":
        return 0
    return max(min(MOST, PIECE - slots), 0) if settings.unified else MOST


def bytes_per_token(facts: ModelMetadata, settings: LlamaSettings) -> int:
    """Bytes of one cell in a cache of the type that the settings name."""
    of, at_16_bits = _KV_BYTES[settings.kv_type]
    return -(-facts.bytes_per_token * of // at_16_bits)


def _check(settings: LlamaSettings) -> None:
    if settings.kv_type in BLOCKS and settings.flash is False:
        raise SettingsError(f"kv_type {settings.kv_type} needs flash attention: remove `flash = false`, or use f16.")
    _check_steps(settings)
    if settings.n_ctx is not None and settings.n_ctx < MIN_N_CTX:
        raise SettingsError(f"n_ctx is {settings.n_ctx}; a context must hold at least {MIN_N_CTX} tokens.")
    if settings.threads is not None and settings.threads < 1:
        raise SettingsError(f"threads is {settings.threads}; at least one is needed.")
    if settings.slots is not None and not 1 <= settings.slots <= MAX_SLOTS:
        raise SettingsError(f"slots is {settings.slots}; it must be 1 to {MAX_SLOTS}.")
    if settings.cells is not None and not settings.unified:
        raise SettingsError("cells is for a unified cache: set unified too, or remove cells.")


def _check_steps(settings: LlamaSettings) -> None:
    for name, value in (
        ("n_batch", settings.n_batch),
        ("n_ubatch", settings.n_ubatch),
        ("chunk", settings.chunk),
        ("burst", settings.burst),
    ):
        if value is not None and not 1 <= value <= MAX_STEP:
            raise SettingsError(f"{name} is {value}; it must be 1 to {MAX_STEP} tokens.")
    if not LEAST_PREFILL <= settings.prefill <= MOST_PREFILL:
        raise SettingsError(f"prefill is {settings.prefill}; it must be {LEAST_PREFILL} to {MOST_PREFILL}.")


def _check_file(path: Path, facts: ModelMetadata, settings: LlamaSettings) -> None:
    """Raises for settings that the file rules out."""
    if not facts.generates:
        raise SettingsError(
            f"{path.name} cannot generate text with this engine. Its kind ({facts.architecture or 'unknown'}) has "
            "an encoder, or lets tokens see later ones. To embed with it, convert it with its pooling type; or serve another."
        )
    most = facts.n_ctx_most
    if settings.n_ctx is not None and most is not None and settings.n_ctx > most and not settings.beyond_training:
        raise SettingsError(
            f"context is {settings.n_ctx}; {path.name} was trained on at most {most} tokens, and answers badly beyond. "
            f"Set a context of {most} or less, or beyond_training = true to use it anyway."
        )


def memory_for_caches(
    path: Path, facts: ModelMetadata, settings: LlamaSettings, *, available: int | None = None, beside: int = 0
) -> int | None:
    """Bytes available beside the weights. None: unknown, because layers go to a GPU with its own memory.

    available: bytes; None: measured. beside: bytes of adapters. Raises `SettingsError` if the model does not fit.
    """
    if settings.gpu.layers != 0 and L.llama_supports_gpu_offload():
        return None
    weights = shards.size(path) + beside
    free = free_memory() if available is None else available
    room = free - weights - OVERHEAD
    if room < MIN_N_CTX * bytes_per_token(facts, settings):
        raise SettingsError(
            f"{path.name} does not fit: it takes {_mib(weights + OVERHEAD)} without any cache, and {_mib(free)} is free. "
            "Serve a smaller model, or one of fewer bits."
        )
    return room


def _context(facts: ModelMetadata, room: int | None, cell: int) -> int:
    wanted = min(facts.n_ctx_train, DEFAULT_N_CTX)
    if room is None:
        return wanted
    return max(min(wanted, int(room * SHARE_OF_MEMORY) // max(cell, 1)), MIN_N_CTX)


def _slots(room: int | None, size: int) -> int:
    """size: bytes of one sequence's cache."""
    if room is None:
        return DEFAULT_SLOTS
    return max(1, min(DEFAULT_SLOTS, int(room * SHARE_OF_MEMORY) // max(size, 1)))


def free_memory() -> int:
    """Bytes that this process may still allocate."""
    free = _number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free


def _number(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise SettingsError(f"{path} has no {name} entry. Set slots and n_ctx.")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
