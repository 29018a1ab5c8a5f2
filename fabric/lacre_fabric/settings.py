"""Settings files (TOML), validated whole into frozen values: the parts that gateway and worker share.

Rules:
- An unknown key is an error that names the nearest known key. A misspelt limit would otherwise be no limit.
- Every error names the key and what to write there. It never repeats the value.
- Relative paths start at the settings file's folder.
- The file names keys and credentials by path. It contains none of them.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.formats import MEMBER, Format
from lacre.jose.jws import b64u_decode
from lacre.runtime import folders
from lacre_fabric.keys import kms
from lacre_fabric.nats import subjects
from lacre_fabric.nats.servers import Servers
from lacre_fabric.work import model_names

# bytes of a settings file: enough for some ten thousand models or issuers; bounds a read of /dev/zero
MAX_FILE: Final = 4 * 2**20
SETTINGS: Final = Format("settings file", "program")
_ROOT_BYTES: Final = 32  # an Ed25519 public key (RFC 8032)


def _from_folder(path: Path, info: ValidationInfo) -> Path:
    if "\0" in str(path):
        raise PydanticCustomError("file_path", "a path holds no null character")
    return info.context["folder"] / folders.expanded(path) if info.context else path


def _root_key(value: str) -> str:
    try:
        size = len(b64u_decode(value))
    except InvalidMessage:
        size = 0
    if size != _ROOT_BYTES:
        raise PydanticCustomError("root_key", "copy the whole root key, as `lacre keys init` printed it (base64url)")
    return value


def _has_port(parts: SplitResult) -> bool:
    """Whether the address has no port or a valid one."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _nats_urls(value: object) -> tuple[str, ...]:
    """One address, or a list of a cluster's addresses."""
    urls = tuple(_nats_url(url) for url in (value if isinstance(value, list) and value else [value]))
    if len({url.partition(":")[0] for url in urls}) > 1:
        raise PydanticCustomError("nats_url_mixed", "write tls:// before every address, or before none")
    return urls


def _nats_url(value: object) -> str:
    parts = urlsplit(value if isinstance(value, str) else "")
    if parts.scheme not in ("nats", "tls") or not parts.hostname or not _has_port(parts):
        raise PydanticCustomError("nats_url", "write an address such as nats://127.0.0.1:4222")
    if parts.username is not None or parts.password is not None:
        raise PydanticCustomError(
            "nats_url_secret", "take user and password out of the address: they belong in nats.credentials"
        )
    return parts.geturl()


def _kms_address(value: str) -> str:
    try:
        return kms.check(value)
    except SettingsError as exc:
        raise PydanticCustomError("kms_address", "{reason}", {"reason": str(exc)}) from exc


FilePath = Annotated[Path, AfterValidator(_from_folder)]
RootKey = Annotated[str, AfterValidator(_root_key)]
KmsAddress = Annotated[str, AfterValidator(_kms_address)]
ModelName = Annotated[str, Field(pattern=model_names.PATTERN)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]  # `subjects` takes it as one token of a subject


def _region_name(value: str) -> str:
    try:
        return subjects.check_region(value)
    except SettingsError as exc:
        raise PydanticCustomError("region", "{reason}", {"reason": str(exc)}) from exc


Region = Annotated[str, AfterValidator(_region_name)]


class Table(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class NatsServers(Table):
    """The NATS servers: one address or a cluster's, and the certificates for TLS."""

    url: Annotated[tuple[str, ...], BeforeValidator(_nats_urls)]
    ca: FilePath | None = None
    certificate: FilePath | None = None
    key: FilePath | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise PydanticCustomError("nats_pair", "certificate and key go together: write both, or neither")
        if (self.ca or self.certificate) is not None and not self.servers.tls:
            raise PydanticCustomError("nats_clear", "ca and certificate are for TLS: write tls:// in url")
        return self

    @property
    def servers(self) -> Servers:
        return Servers(self.url, self.ca, self.certificate, self.key)


class Nats(NatsServers):
    """The NATS servers and the file with this process's credential. region: the NATS cluster that `url` points to."""

    credentials: FilePath
    region: Region = subjects.DEFAULT_REGION


T = TypeVar("T", bound=Table)


def load(kind: type[T], path: Path) -> T:
    """Reads and checks the file. Raises SettingsError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
        text = content.decode("utf-8").removeprefix("\ufeff")  # some editors write a byte order mark
    except OSError as exc:
        raise SettingsError(f"{path}: cannot read the settings file ({exc.strerror})") from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"{path}: the settings file must be UTF-8") from exc
    if len(content) > MAX_FILE:
        raise SettingsError(f"{path}: larger than {MAX_FILE} bytes: this is not a settings file")
    return parse(kind, text, path)


def parse(kind: type[T], text: str, path: Path) -> T:
    """Checks the text of a settings file. path: its location, for messages and relative paths. Raises SettingsError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SettingsError(f"{path}: not TOML: {exc}") from exc
    except RecursionError as exc:
        raise SettingsError(f"{path}: its arrays or tables are nested too deeply; no setting needs that") from exc
    try:
        SETTINGS.check(values)
    except InvalidMessage as exc:
        raise SettingsError(f"{path}: {exc}") from exc
    values.pop(MEMBER, None)
    return validated(kind, values, path)


def validated(kind: type[T], values: object, path: Path) -> T:
    """Checks parsed values. path: as for `parse`. Raises SettingsError."""
    try:
        return kind.model_validate(values, context={"folder": path.resolve().parent})
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_input=False)
        told = (_explain(kind, error) for error in errors if not _echoes(error, errors))
        raise SettingsError(f"{path}: {'; '.join(told)}") from None  # the cause shows the values


def _echoes(error: ErrorDetails, errors: list[ErrorDetails]) -> bool:
    """Whether this is Pydantic's second error for one mistake: a list whose only entry is invalid is also "too short"."""
    place = error["loc"]
    return error["type"] == "too_short" and any(other["loc"][: len(place)] == place for other in errors if other is not error)


def _explain(kind: type[Table], error: ErrorDetails) -> str:
    # Pydantic puts the branch of a union into the location; the settings file has no such level.
    place = [part for part in error["loc"] if not str(part).startswith(("dict[", "function-"))]
    key = ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(str(place[-1]), _known_keys(kind, place[:-1]), n=1, cutoff=0.0)
        return f"{key}: unknown key; the nearest known one is {nearest[0]!r}" if nearest else f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: missing; add it"
    if error["type"] == "too_short":
        return f"{key}: needs at least one entry"
    message = error["msg"].replace("Input should be", "must be").replace("String should", "must")
    return f"{key}: {message}" if key else message


def _known_keys(kind: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys of the table at `place`. List indices and free names lead into the tables that they contain."""
    for part in place:
        if part in kind.model_fields:
            kind = next(_tables(kind.model_fields[str(part)].annotation), kind)
    return list(kind.model_fields)


def _tables(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _tables(inner)
