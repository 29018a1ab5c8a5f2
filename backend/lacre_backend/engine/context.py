"""llama.cpp's context and batch: executes the scheduler's plans, whole and in order.

Rules:
- It belongs to one permanent thread. llama.cpp keeps its workers per calling thread, and a new thread per call decodes at less
  than half the speed.
- No Python work per token if it can be done per step: a batch is written as slices of numpy arrays that llama.cpp reads.
- `wipe` overwrites the cells' data, not only their list. So does `free`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from lacre.errors import SettingsError
from lacre_backend.engine.model import Model, logged_errors
from lacre_backend.engine.plan import Copy, Discard, EngineLimits, MemoryStep, Restore, Save, StepPlan, Trim
from lacre_backend.engine.protocol import EngineError
from lacre_backend.engine.vault import CacheVault

Logits = NDArray[np.float32]

FLASH: Final = {
    None: L.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: L.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: L.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}

KvType = Literal["f16", "bf16", "q8_0", "q4_0"]
KV_TYPES: Final[dict[KvType, int]] = {
    "f16": L.GGML_TYPE_F16,
    "bf16": 30,  # ggml.h's GGML_TYPE_BF16, which llama-cpp-python does not name
    "q8_0": L.GGML_TYPE_Q8_0,
    "q4_0": L.GGML_TYPE_Q4_0,
}
BLOCKS: Final[frozenset[KvType]] = frozenset({"q8_0", "q4_0"})  # types of whole blocks: they need flash attention


@dataclass(frozen=True, slots=True)
class Compute:
    """How a context computes. threads: for one step. flash: flash attention; None: llama.cpp decides. kv_type: of the cache.
    ubatch: tokens that llama.cpp computes at a time; None: a whole step.
    """

    threads: int
    flash: bool | None = None
    kv_type: KvType = "f16"
    ubatch: int | None = None


class Batch:
    """A `llama_batch` on our own arrays. One sequence id per token."""

    def __init__(self, size: int) -> None:
        self.token = np.zeros(size, dtype=np.int32)
        self.pos = np.zeros(size, dtype=np.int32)
        self.sequence = np.zeros(size, dtype=np.int32)
        self.output = np.zeros(size, dtype=np.int8)
        self._counts = np.ones(size, dtype=np.int32)
        # llama.cpp expects a list of sequence ids per token. Here each list has one id, inside `sequence`.
        self._lists = (self.sequence.ctypes.data + 4 * np.arange(size + 1, dtype=np.uint64)).astype(np.uint64)
        self._lists[size] = 0
        self.struct = L.llama_batch()
        kinds: dict[str, Any] = dict(L.llama_batch._fields_)  # type: ignore[arg-type]  # no bit fields here
        for name, array in (
            ("token", self.token),
            ("pos", self.pos),
            ("n_seq_id", self._counts),
            ("seq_id", self._lists),
            ("logits", self.output),
        ):
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def write(self, plan: StepPlan) -> list[int]:
        """Writes the plan. Returns the positions of the outputs in the batch."""
        outputs: list[int] = []
        n = 0
        for segment in plan.segments:
            end = n + len(segment.tokens)
            self.token[n:end] = segment.tokens
            self.pos[n:end] = range(segment.start, segment.start + end - n)
            self.sequence[n:end] = segment.slot
            outputs += range(end - segment.rows, end)
            n = end
        self.output[:n] = 0
        self.output[outputs] = 1
        self.struct.n_tokens = n
        return outputs


def _refused(limits: EngineLimits, compute: Compute, errors: Sequence[str]) -> str:
    if compute.kv_type != "f16":
        reason = "; ".join(errors) or "it gives no reason"
        return (
            f"llama.cpp makes no {compute.kv_type} cache of {limits.slots} sequences of {limits.context} tokens: {reason}. "
            'Set kv_type = "f16", fewer slots or a smaller context.'
        )
    return (
        f"No memory for {limits.slots} sequences of {limits.context} tokens. Set fewer slots, a smaller context, "
        "or a smaller model."
    )


def use_adapter(context: Any, adapter: Any | None) -> None:
    """Makes a context compute with this adapter from now on; None: with the base model alone. Raises EngineError."""
    used = [] if adapter is None else [adapter]
    pointers = (L.llama_adapter_lora_p_ctypes * len(used))(*used)
    if L.llama_set_adapters_lora(context, pointers, len(used), (ctypes.c_float * len(used))(*[1.0] * len(used))) != 0:
        raise EngineError("llama.cpp could not change the adapter. Try again.")


class LlamaContext:
    """A context for `limits.slots` sequences. Raises SettingsError if there is not enough memory for it, or if
    the model cannot have a cache of this type.
    """

    def __init__(
        self, model: Model, limits: EngineLimits, compute: Compute, adapters: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """adapters: of the model, by name."""
        params = L.llama_context_default_params()
        params.n_ctx = limits.cells if limits.unified else limits.slots * limits.context
        params.n_batch, params.n_ubatch = limits.step, min(compute.ubatch or limits.step, limits.step)
        params.n_seq_max = limits.slots
        params.n_outputs_max = limits.slots + limits.drafts
        params.n_threads = params.n_threads_batch = compute.threads
        params.kv_unified = limits.unified
        params.swa_full = True  # cells outside a layer's window stay: a cached prefix may be cut to before it
        params.flash_attn_type = FLASH[compute.flash]
        params.type_k = params.type_v = KV_TYPES[compute.kv_type]
        params.no_perf = True
        with logged_errors() as errors:
            self.pointer = L.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise SettingsError(_refused(limits, compute, errors))
        self._n_vocab = model.n_vocab
        self._memory = L.llama_get_memory(self.pointer)
        self._batch = Batch(limits.step)
        self._adapters = adapters
        self._adapter: str | None = None  # the one in use
        self.vault: CacheVault | None = None

    def keep_copies(self, most: int, free: Callable[[], int]) -> None:
        """Lets plans copy caches out of the slots and back. As `CacheVault`."""
        self.vault = CacheVault(self.pointer, most, free)

    def execute(self, plan: StepPlan) -> list[int]:
        """Executes a plan in which nothing is restored. As `compute`."""
        self.remember(plan.memory)
        return self.compute(plan)

    def remember(self, steps: Sequence[MemoryStep]) -> list[Restore]:
        """Executes a plan's memory. Returns what could not be restored."""
        failed: list[Restore] = []
        for step in steps:
            match step:
                case Trim():
                    self._trim(step)
                case Copy():
                    self._copy(step)
                case Save():
                    if self.vault is not None:
                        self.vault.save(step)
                case Discard():
                    if self.vault is not None:
                        self.vault.discard(step.number)
                case Restore():
                    if not self._restored(step):
                        failed.append(step)
        return failed

    def compute(self, plan: StepPlan) -> list[int]:
        """Computes a plan's segments. Returns the positions of the outputs in the batch, in order. `logits` has one row for
        each.
        """
        outputs: list[int] = []
        if plan.segments:
            self._use(plan.adapter)
            outputs = self._batch.write(plan)
            code = L.llama_decode(self.pointer, self._batch.struct)
            if code != 0:
                raise EngineError(f"llama.cpp could not decode (code {code}). Try again, or with a shorter prompt.")
            L.llama_synchronize(self.pointer)  # a GPU may still compute; callers measure how long a step takes
        for trim in plan.after:
            self._trim(trim)
        return outputs

    def logits(self, rows: int) -> Logits:
        """The logits of the outputs, one row each. The next step overwrites this view."""
        return np.ctypeslib.as_array(L.llama_get_logits(self.pointer), (rows, self._n_vocab))

    def wipe(self) -> None:
        """Removes every cell and overwrites its data."""
        L.llama_memory_clear(self._memory, True)

    def free(self) -> None:
        if self.vault is not None:
            self.vault.close()
        self.wipe()
        L.llama_free(self.pointer)

    def _use(self, adapter: str | None) -> None:
        """llama.cpp plans its memory again when the adapter changes."""
        if adapter != self._adapter:
            use_adapter(self.pointer, None if adapter is None else self._adapters[adapter])
            self._adapter = adapter

    def _trim(self, trim: Trim) -> None:
        if not L.llama_memory_seq_rm(self._memory, trim.slot, trim.keep, -1):
            raise EngineError("This model's cache cannot be cut at this position.")

    def _restored(self, step: Restore) -> bool:
        restored = self.vault is not None and self.vault.restore(step)
        self._trim(Trim(step.slot, step.keep if restored else 0))
        return restored

    def _copy(self, copy: Copy) -> None:
        # A split cache copies whole sequences only. In a unified cache the sequences share the cells.
        L.llama_memory_seq_cp(self._memory, copy.source, copy.target, -1, -1)
        self._trim(Trim(copy.target, copy.keep))
