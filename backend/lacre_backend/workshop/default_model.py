"""The type of the default model that is the fastest on this machine: what `lacre up` serves, and `lacre model default` prints.

Rules:
- The loss comes from `default_losses.json`, by the shipped file's digest. `default_speed.py` measures the speed here, once.
- The file and its figures stay in the user's cache, by processor and llama.cpp's build. The file's digest is checked before it
  is used. A missing or damaged file is written again; another processor or build is measured again.
- If anything fails, the shipped file is served, and the reason told. Of several processes, one measures and the others wait.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Final

import llama_cpp as L
import platformdirs
from pydantic import TypeAdapter, ValidationError

from lacre.errors import SettingsError
from lacre.runtime import file_locks, private_files
from lacre_backend.engine.sizing import free_memory
from lacre_backend.engine.tune import SLOTS
from lacre_backend.models.gguf import FileDigests, ModelFile, find
from lacre_backend.workshop.child import Report, run
from lacre_backend.workshop.default_speed import MEASURE, WRITE, MeasureAsked, MeasuredRounds, WriteAsked
from lacre_backend.workshop.draft import draft
from lacre_backend.workshop.quantization import MAX_KL
from lacre_backend.workshop.speed import Speed, better, gain

LEAST_GAIN: Final = 1.1  # in every round: a smaller one is not worth a second file, and may be noise
ALIKE: Final = 0.95  # types with this share of the best gain are as fast; of them, the one that loses least is chosen
SECONDS: Final = 10.0  # after these no further type is tried, so that a first start stays short on a busy machine
PATIENCE: Final = 120.0  # seconds to wait for another process that measures
_SHARE_OF_MEMORY: Final = 0.25  # of what is free: caches and other programs need the rest
_LOSSES: Final = "default_losses.json"
_PROCESSOR: Final = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")  # lines of /proc/cpuinfo


@dataclass(frozen=True, slots=True)
class TypeLoss:
    """What a type loses from the shipped file, and the size of its file."""

    kl: float
    same_top: float
    bytes: int


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A shipped file's own type, and the losses of others, the most promising first."""

    type: str
    bytes: int
    types: Mapping[str, TypeLoss]


@dataclass(frozen=True, slots=True)
class TriedType:
    """speed: of one thread, the best of the rounds. gain: times as fast as the shipped file, the median of the rounds.

    least: in the worst of them.
    """

    type: str
    bytes: int
    kl: float
    same_top: float
    speed: Speed
    gain: float
    least: float


@dataclass(frozen=True, slots=True)
class DefaultRecord:
    """Where a choice comes from. source: the shipped file's digest. type, digest: of the chosen file, which may be the shipped
    one. tried: the shipped type first.
    """

    source: str
    type: str
    digest: str
    processor: str
    llama_cpp: str
    date: str
    tried: list[TriedType]


@dataclass(frozen=True, slots=True)
class DefaultModel:
    """path: of the file to serve. shipped: whether that is the one of the package. told: which file is served, and why."""

    path: Path
    shipped: bool
    told: str
    record: DefaultRecord | None = None


def processor_facts() -> str:
    """The model of the processor, and what it can do; the same after a reboot."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join([platform.machine(), *(line for line in first.splitlines() if line.startswith(_PROCESSOR))])


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a measurement counts for. folder: of the cache. patience: seconds to wait for another process that measures.

    tell: gets a line before work that takes seconds.
    """

    folder: Path = field(default_factory=lambda: platformdirs.user_cache_path("lacre", appauthor=False) / "default-model")
    processor: str = field(default_factory=processor_facts)
    llama_cpp: str = field(default_factory=lambda: f"{L.__version__}: {L.llama_print_system_info().decode()}")
    patience: float = PATIENCE
    tell: Callable[[str], None] = field(default=lambda _line: None)
    report: Report = field(default=lambda _what, _share: None)


def default_model(around: Surroundings, *, again: bool = False) -> DefaultModel:
    """The file to serve. again: measure although that was done. Raises SettingsError only if no model is installed."""
    shipped = find()
    return best(shipped, known_models().get(shipped.digest), around, again=again)


def best(shipped: ModelFile, known: KnownModel | None, around: Surroundings, *, again: bool = False) -> DefaultModel:
    """As `default_model`, of a file and its losses. It raises nothing."""
    try:
        return _best(shipped, known, around, again)
    except (SettingsError, OSError) as exc:
        named = f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.filename else str(exc)
        return DefaultModel(shipped.path, True, f"the shipped file, because {named}")


def known_models() -> Mapping[str, KnownModel]:
    """By digest: the table that ships."""
    return TypeAdapter(dict[str, KnownModel]).validate_json(files(__package__).joinpath(_LOSSES).read_bytes())


def chosen(tried: Sequence[TriedType]) -> TriedType:
    """tried: the shipped type first. Raises SettingsError if a type may be faster, but was not so in every round."""
    shipped, *others = tried
    clear = [each for each in others if each.least >= LEAST_GAIN]
    if not clear:
        unclear = [each.type for each in others if each.gain >= LEAST_GAIN]
        if unclear:
            raise SettingsError(f"the speed of {' and '.join(unclear)} varied too much; the next start measures again")
        return shipped
    fastest = max(each.gain for each in clear)
    return min((each for each in clear if each.gain >= ALIKE * fastest), key=lambda each: each.kl)


def _best(shipped: ModelFile, known: KnownModel | None, around: Surroundings, again: bool) -> DefaultModel:
    if known is None:
        raise SettingsError(f"no losses are known of this file ({shipped.digest})")
    if L.llama_supports_gpu_offload():
        raise SettingsError("llama.cpp computes on a GPU here, and only processors are measured")
    kept = record_path(shipped, around)
    if not again and (found := _kept(kept, shipped, around)) is not None:
        return found
    around.folder.mkdir(parents=True, exist_ok=True)
    lock = file_locks.attempt(around.folder / "lock", around.patience)
    if lock is None:
        raise SettingsError(f"another process has measured for more than {around.patience:.0f} s")
    try:
        if not again and (found := _kept(kept, shipped, around)) is not None:
            return found
        _remove_drafts(around.folder)
        record = None if again else _read(kept, shipped)
        if record is None:
            record = _measured(shipped, known, around)
        if record.type != known.type:
            record = _written(shipped, record, around)
        content = TypeAdapter(DefaultRecord).dump_json(record, indent=1)
        private_files.replace(kept, content)
        return _served(record, shipped, around)
    finally:
        _remove_drafts(around.folder)
        lock.release()


def record_path(shipped: ModelFile, around: Surroundings) -> Path:
    """Where the record of a choice is kept."""
    facts = "\0".join((shipped.digest, around.processor, around.llama_cpp))
    return around.folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _file_path(record: DefaultRecord, around: Surroundings) -> Path:
    return around.folder / f"{record.source.removeprefix('sha256:')[:16]}-{record.type}.gguf"


def _read(path: Path, shipped: ModelFile) -> DefaultRecord | None:
    """None if it is missing, damaged, or of another file."""
    try:
        record = TypeAdapter(DefaultRecord).validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    known = any(each.type == record.type for each in record.tried)
    return record if known and record.source == shipped.digest else None


def _kept(path: Path, shipped: ModelFile, around: Surroundings) -> DefaultModel | None:
    """What was chosen before. None if that is unknown, or if its file is missing or damaged."""
    record = _read(path, shipped)
    if record is None:
        return None
    if record.digest != shipped.digest:
        try:
            if FileDigests.read([_file_path(record, around)]).model != record.digest.removeprefix("sha256:"):
                return None
        except (SettingsError, FileNotFoundError):  # no GGUF, or no file
            return None
    return _served(record, shipped, around)


def _served(record: DefaultRecord, shipped: ModelFile, around: Surroundings) -> DefaultModel:
    if record.digest == shipped.digest:
        return DefaultModel(shipped.path, True, f"the shipped file: no type within a KL of {MAX_KL} is faster here", record)
    path = _file_path(record, around)
    if path.stat().st_size > _room_in_memory():
        raise SettingsError(f"{record.type} takes {path.stat().st_size / 2**20:,.0f} MiB, and too little memory is free")
    figures = next(each for each in record.tried if each.type == record.type)
    told = f"as {record.type}, {figures.gain:.1f} times as fast here as the shipped file, with a KL of {figures.kl:.4f} to it"
    return DefaultModel(path, False, told, record)


def _measured(shipped: ModelFile, known: KnownModel, around: Surroundings) -> DefaultRecord:
    """The choice, before its file is written."""
    within = {name: loss for name, loss in known.types.items() if loss.kl <= MAX_KL}
    disk = shutil.disk_usage(around.folder).free
    types = tuple(name for name, loss in within.items() if loss.bytes <= min(disk, _room_in_memory()))
    if not types:
        raise SettingsError(f"there is too little memory, or too little space in {around.folder}")
    around.tell(f"Measuring once which type of the default model is the fastest on this machine: {', '.join(types)}")
    rounds = run(MEASURE, MeasureAsked(shipped.path, around.folder, types, SECONDS), around.report)
    tried = [_own(known, rounds), *(_tried(each, known.types[each.type]) for each in rounds)]
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return DefaultRecord(shipped.digest, chosen(tried).type, shipped.digest, around.processor, around.llama_cpp, date, tried)


def _remove_drafts(folder: Path) -> None:
    """Those of processes that died: who holds the lock is the only one that writes."""
    for path in folder.glob(".*.draft"):
        path.unlink(missing_ok=True)


def _own(known: KnownModel, rounds: Sequence[MeasuredRounds]) -> TriedType:
    speed = _fastest([speed for each in rounds for speed in each.source])
    return TriedType(known.type, known.bytes, 0.0, 1.0, speed, 1.0, 1.0)


def _tried(found: MeasuredRounds, loss: TypeLoss) -> TriedType:
    gains = [gain(other, source) for other, source in zip(found.other, found.source, strict=True)]
    speed = _fastest(found.other)
    return TriedType(found.type, loss.bytes, loss.kl, loss.same_top, speed, statistics.median(gains), min(gains))


def _fastest(speeds: Sequence[Speed]) -> Speed:
    found = Speed(dict.fromkeys(SLOTS, 0.0), 0.0)
    for speed in speeds:
        found = better(found, speed)
    return found


def _written(shipped: ModelFile, record: DefaultRecord, around: Surroundings) -> DefaultRecord:
    """With the digest of its file, which is written again."""
    with draft(_file_path(record, around), [shipped.path]) as out:
        digest = run(WRITE, WriteAsked(shipped.path, out, record.type), around.report)
    return replace(record, digest=digest)


def _room_in_memory() -> float:
    return free_memory() * _SHARE_OF_MEMORY
