"""The rule set of a gateway: one folder, read and checked as a whole, or not at all.

    lacre.cedarschema       the entities and actions of the rules
    *.cedar                 the rules
    cases/ALLOW|DENY/*.json requests that must be allowed, and denied
    plans.toml              who may use how much; default: the one that ships with Lacre
    time.toml               the time zone for weekdays and local times; default: UTC
    no-cases                an empty file: the set has no cases on purpose

Rules:
- A set consists of the files on the disk at one moment: files that change while they are read are read again.
- It is activated only if everything parses, fits together, and every case holds. A set without cases must say so: they may have
  been left behind, and nothing would then test the rules.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from lacre.errors import SettingsError
from lacre.wire.header import Kem
from lacre_gateway.auth.tokens import Principal
from lacre_gateway.budget.plans import PLANS_FILE, Plans
from lacre_gateway.budget.plans import load as load_plans
from lacre_gateway.budget.plans import parse as parse_plans
from lacre_gateway.http.headers import Action, Shape
from lacre_gateway.policy import cases as written
from lacre_gateway.policy.cases import PolicyCase
from lacre_gateway.policy.cedar import SCHEMA, PolicyError, PolicySet
from lacre_gateway.policy.local_time import TIME_FILE, UTC_ZONE, TimeZone
from lacre_gateway.policy.local_time import parse as parse_zone
from lacre_gateway.policy.question import AdminAction, AdminQuestion, AnyQuestion, Question
from lacre_gateway.settings import shipped

SCHEMA_FILE: Final = "lacre.cedarschema"
NO_CASES: Final = "no-cases"
MISSING: Final = "missing"
UNREADABLE: Final = "unreadable"
PLANS: Final = "plans"
TIME: Final = "time"
_CASES: Final = tuple(f"{written.FOLDER}/{verdict}/*.json" for verdict in ("ALLOW", "DENY"))
_PATTERNS: Final = (SCHEMA_FILE, "*.cedar", PLANS_FILE, TIME_FILE, NO_CASES, *_CASES)
_MAX_FILE: Final = 1 << 20  # bytes; people read these files
_MAX_FILES: Final = 10_000
_TRIES: Final = 5

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class RuleSet:
    """A set that holds. digest: hex SHA-256 over the names and bytes of its files. untested: it says that it has no cases."""

    policies: PolicySet
    cases: tuple[PolicyCase, ...]
    digest: str
    plans: Plans
    signature: Signature = field(repr=False)
    untested: bool = False

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads, checks, and runs the cases. Raises PolicyError."""
        rules = cls.read(folder)
        if not rules.cases and not rules.untested:
            raise PolicyError(
                written.CASE,
                written.FOLDER,
                f"none in {folder}, so nothing tests the rules: write some into {written.FOLDER}/ALLOW and "
                f"{written.FOLDER}/DENY, or make an empty file {NO_CASES} beside the rules",
            )
        for case, wrong in rules.run():
            if wrong is not None:
                raise PolicyError(written.CASE, case.name, wrong)
        return rules

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Everything except running the cases. Raises PolicyError."""
        signature, files = _at_one_moment(folder)
        texts = {name: _text(name, data) for name, data in files.items() if not name.startswith(written.FOLDER)}
        if SCHEMA_FILE not in texts:
            raise PolicyError(MISSING, SCHEMA_FILE, f"missing in {folder}: copy the one that ships with Lacre")
        schema, plans = texts.pop(SCHEMA_FILE), _plans(folder, texts.pop(PLANS_FILE, None))
        zone = _zone(folder, texts.pop(TIME_FILE, None))
        untested = texts.pop(NO_CASES, None) is not None
        if not texts:
            raise PolicyError(MISSING, "*.cedar", f"none in {folder}, so nothing would be allowed: write one")
        policies = PolicySet.parse(schema, texts, zone)
        _check_questions(policies)
        cases = tuple(PolicyCase.parse(name, data) for name, data in files.items() if name.startswith(written.FOLDER))
        return cls(policies, cases, _digest(files), plans, signature, untested)

    def with_policies(self, text: str) -> PolicySet:
        """These policies under this set's schema and time zone, to try them. Raises PolicyError."""
        return PolicySet.parse(str(self.policies.schema), {"candidate.cedar": text}, self.policies.zone)

    def run(self) -> Iterator[tuple[PolicyCase, str | None]]:
        """Each case, and the fault of its decision."""
        for case in self.cases:
            yield case, case.fails(self.policies.decide(case.request.question()))


def copy_shipped(folder: Path) -> None:
    """Copies the rule set that ships with Lacre into a new folder, whole or not at all. Raises SettingsError."""
    _, files = _at_one_moment(shipped())
    try:
        if folder.exists() and any(folder.iterdir()):
            raise SettingsError(f"{folder} is not empty: name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.resolve().parent, prefix=f".{folder.name}."))
        try:
            for name, data in files.items():
                (beside / name).parent.mkdir(parents=True, exist_ok=True)
                (beside / name).write_bytes(data)
            beside.chmod(0o755)  # rules are no secret, and the gateway may run as another user
            os.replace(beside, folder)  # noqa: PTH105 - a folder replaces an empty one only in this way
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except OSError as exc:
        raise SettingsError(f"cannot copy the rules to {folder}: {exc.strerror}") from exc


def _plans(folder: Path, text: str | None) -> Plans:
    """Raises PolicyError."""
    try:
        return load_plans(shipped()) if text is None else parse_plans(text, folder / PLANS_FILE)
    except SettingsError as exc:
        raise PolicyError(PLANS, PLANS_FILE, str(exc)) from exc


def _zone(folder: Path, text: str | None) -> TimeZone:
    """Raises PolicyError."""
    try:
        return UTC_ZONE if text is None else parse_zone(text, folder / TIME_FILE)
    except SettingsError as exc:
        raise PolicyError(TIME, TIME_FILE, str(exc)) from exc


def signature(folder: Path) -> Signature:
    """Changes when a file of the set does. Raises PolicyError."""
    return tuple(_stamp(folder, path) for path in _paths(folder))


def _paths(folder: Path) -> list[Path]:
    try:
        next(folder.iterdir(), None)  # `glob` skips a folder that it cannot read
        paths = [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))]
    except OSError as exc:
        raise _unreadable(folder, exc) from exc
    if len(paths) > _MAX_FILES:
        raise PolicyError(UNREADABLE, "", f"more than {_MAX_FILES} files in {folder}: is it the folder of a rule set?")
    return paths


def _stamp(folder: Path, path: Path) -> tuple[str, int, int, int]:
    name = path.relative_to(folder).as_posix()
    try:
        found = path.stat()
    except OSError:  # a link to nowhere, or just removed: reading it reports that
        return name, 0, 0, 0
    return name, found.st_ino, found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)


def _at_one_moment(folder: Path) -> tuple[Signature, Mapping[str, bytes]]:
    """Raises PolicyError."""
    for _ in range(_TRIES):
        before = signature(folder)
        try:
            files = {path.relative_to(folder).as_posix(): _read(path) for path in _paths(folder)}
        except PolicyError:
            if signature(folder) == before:
                raise
            continue
        if signature(folder) == before:
            return before, files
    raise PolicyError(UNREADABLE, "", f"the files in {folder} never stop changing")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    if len(data) > _MAX_FILE:
        raise PolicyError(UNREADABLE, path.name, f"longer than {_MAX_FILE} bytes")
    return data


def _unreadable(path: Path, error: OSError) -> PolicyError:
    fault = MISSING if isinstance(error, FileNotFoundError) else UNREADABLE
    return PolicyError(fault, path.name, f"cannot be read ({error.strerror})")


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise PolicyError(UNREADABLE, name, "not UTF-8") from exc


def _digest(files: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, data in files.items():
        whole.update(f"{name}\0{len(data)}\0".encode() + data)
    return whole.hexdigest()


def _check_questions(policies: PolicySet) -> None:
    """A custom schema must accept the questions that a gateway asks, or it would deny everything. Raises PolicyError."""
    for question in _questions():
        if (why := policies.misfit(question)) is not None:
            action = question.action.value
            raise PolicyError(SCHEMA, SCHEMA_FILE, f"a gateway's question about {action!r} does not fit ({why})")


def _questions() -> Iterator[AnyQuestion]:
    for plan in (None, "p"):
        who = Principal("s", "t", "i", ("g",), ("c",), plan)
        for action in Action:
            yield Question(who, action, "p", "m", 1, 1, Kem.XWING, Shape.NONE, "192.0.2.1", 0.0, affinity=True)
        for admin in AdminAction:
            yield AdminQuestion(who, admin, "g", "2001:db8::1", 0.0)
