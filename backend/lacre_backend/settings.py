"""The worker's settings file (TOML)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from lacre.jws import b64u_decode
from lacre_fabric.settings import FilePath, Name, Nats, RootKey, Table
from lacre_fabric.settings import load as load_table


class Model(Table):
    """A model to serve. path: a GGUF file; the default model where left out. name: its id; from the file's where left out."""

    path: FilePath | None = None
    name: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    context: PositiveInt | None = None  # tokens; the model's own where left out
    threads: PositiveInt | None = None  # every core that the process may use, where left out
    gpu_layers: Annotated[int, Field(ge=-1)] = -1  # layers to put on a GPU; -1 for all


class Settings(Table):
    """The whole file. keys: the folder with the pool's private keys; receipt_key: an Ed25519 key in PEM.

    memory: the folder that remembers the newest manifest seen; without one it is forgotten when the process ends.
    """

    pool: Name
    node: Name
    trust: RootKey
    keys: FilePath
    receipt_key: FilePath
    memory: FilePath | None = None
    nats: Nats
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    slots: PositiveInt = 1  # requests at a time
    drain: Annotated[float, Field(gt=0)] = 30.0  # seconds that running requests have after SIGTERM

    @property
    def root(self) -> bytes:
        return b64u_decode(self.trust)


def load(path: Path) -> Settings:
    """Reads and checks the file. Raises SettingsError."""
    return load_table(Settings, path)
