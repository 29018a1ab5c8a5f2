"""The worker's settings file (TOML)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lacre.jws import b64u_decode
from lacre_fabric.settings import FilePath, Name, Nats, RootKey, Table
from lacre_fabric.settings import load as load_table


class Model(Table):
    """A model to serve. path: a GGUF file; the default model where left out. name: its id; from the file's where left out."""

    path: FilePath | None = None
    name: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    # Left out, these are derived from the model and the machine; `lacre worker tune` measures the last four.
    context: PositiveInt | None = None  # tokens of one request
    cells: PositiveInt | None = None  # tokens of all requests, in a unified cache
    slots: PositiveInt | None = None  # requests at a time
    threads: PositiveInt | None = None
    flash: bool | None = None  # flash attention
    unified: bool = False  # one cache for all slots in place of one each
    gpu_layers: Annotated[int, Field(ge=-1)] = -1  # layers to put on a GPU; -1 for all
    split_mode: Literal["none", "layer", "row"] = "layer"  # how several GPUs share a model
    main_gpu: NonNegativeInt = 0
    tensor_split: tuple[Annotated[float, Field(ge=0)], ...] = ()


class Settings(Table):
    """The whole file. keys: the folder with the pool's private keys; receipt_key: an Ed25519 key in PEM.

    memory: the folder that remembers the newest manifest seen; without one it is forgotten when the process ends.
    health: the file that says each second how the worker is, for `python -m lacre_backend.health`.
    """

    pool: Name
    node: Name
    trust: RootKey
    keys: FilePath
    receipt_key: FilePath
    memory: FilePath | None = None
    health: FilePath | None = None
    nats: Nats
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    slots: PositiveInt | None = None  # requests at a time; what the models take together, where left out
    drain: Annotated[float, Field(gt=0)] = 30.0  # seconds that running requests have after SIGTERM

    @property
    def root(self) -> bytes:
        return b64u_decode(self.trust)


def load(path: Path) -> Settings:
    """Reads and checks the file. Raises SettingsError."""
    return load_table(Settings, path)
