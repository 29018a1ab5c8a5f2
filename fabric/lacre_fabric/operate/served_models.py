"""Which models a worker's settings file names, and which ones `lacre up` serves.

Rules:
- Without a choice, the models in the file are served. A new file gets the default model.
- A model's settings stay with it, including its id and path, whether written by hand or by `lacre worker tune`. While the model
  is not served, they wait in `set-aside.toml` beside the file.
- Two files never share an id: a caller could get either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from lacre.errors import SettingsError
from lacre_fabric.operate import settings_files
from lacre_fabric.work.model_names import DEFAULT_MODEL, from_file, is_name

NO_ADAPTERS: Final[Mapping[str, Path]] = MappingProxyType({})
_ASIDE: Final = "set-aside.toml"


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The models to serve. names: the ids for callers, with those of adapters. tables: the `[[models]]` of the settings file;
    empty if it has an `[upstream]`. default: the file of the table without a path; None: the shipped one.
    """

    names: tuple[str, ...]
    tables: tuple[Mapping[str, object], ...]
    default: Path | None = None


def table(model: Path) -> dict[str, str]:
    """The `[[models]]` table for a file that the settings do not name yet. The default model needs only its name."""
    if model.name == DEFAULT_MODEL:
        return {"name": DEFAULT_MODEL}
    return {"name": from_file(model), "path": str(model)}


def chosen(
    path: Path,
    models: Sequence[Path],
    signers: Sequence[Path] = (),
    adapters: Mapping[str, Path] = NO_ADAPTERS,
    projector: Path | None = None,
) -> ServedModels:
    """path: the worker's settings file; it may be missing. models: absolute paths; empty: those in the file.

    signers: public keys, one of which must have signed each model from now on; empty: what the file says stays. adapters: of
    the only model, by name, beside those in the file. projector: of the only model; None: what the file says stays.

    Raises SettingsError for a damaged file, for an `[upstream]` beside chosen models, for two models with one id, and for
    adapters or a projector of several models.
    """
    document: Mapping[str, Any] = settings_files.read(path) or {}
    if "upstream" in document:
        if models or adapters or projector is not None:
            raise SettingsError(f"{path} has a table [upstream]: omit --model, --adapter and --projector, or remove that table")
        return ServedModels(_upstream(path, document), ())
    there = [_named(one) for one in settings_files.tables(path, document, "models")]
    aside = path.with_name(_ASIDE)
    known = there + [_named(one) for one in settings_files.tables(aside, settings_files.read(aside) or {}, "models")]
    wanted = [_as_there(path, known, table(model)) for model in models] or there or [table(Path(DEFAULT_MODEL))]
    unique = list({(one["name"], one.get("path")): one for one in wanted}.values())
    _check_names(unique)
    if adapters and len(unique) > 1:
        raise SettingsError(f"--adapter is for one model, and {len(unique)} are served: write `adapters` into {path}")
    demanded = {"signers": [str(key) for key in signers], "require_signature": True} if signers else {}
    if projector is not None and len(unique) > 1:
        raise SettingsError(f"--projector is for one model, and {len(unique)} are served: write `projector` into {path}")
    files: dict[str, object] = {"adapters": {name: str(file) for name, file in adapters.items()}} if adapters else {}
    if projector is not None:
        files["projector"] = str(projector)
    tables = tuple({**one, **demanded, **files} for one in unique)
    return ServedModels(tuple(name for one in planned(path, tables) for name in _names(one)), tables)


def planned(path: Path, wanted: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """The tables as `keep` would write them, each with its earlier settings. Nothing is written. Raises as `chosen`."""
    there = settings_files.tables(path, settings_files.read(path) or {}, "models")
    aside = path.with_name(_ASIDE)
    waiting = settings_files.tables(aside, settings_files.read(aside) or {}, "models")
    known = [*waiting, *there]
    return [_merged(next((one for one in known if _same(one, table)), {}), table) for table in wanted]


def _merged(before: Mapping[str, object], table: Mapping[str, object]) -> dict[str, object]:
    """Adapters are added to the earlier ones."""
    both = [each for each in (before.get("adapters"), table.get("adapters")) if isinstance(each, Mapping)]
    adapters = {name: file for each in both for name, file in each.items()}
    return {**before, **table, **({"adapters": adapters} if adapters else {})}


def _names(table: Mapping[str, object]) -> Iterator[str]:
    """The ids of a model and of its adapters. The worker refuses adapters that are no table."""
    yield str(table["name"])
    adapters = table.get("adapters")
    yield from (f"{table['name']}:{adapter}" for adapter in (adapters if isinstance(adapters, Mapping) else ()))


def keep(
    path: Path,
    document: MutableMapping[str, Any],
    wanted: Sequence[Mapping[str, object]],
    *,
    same: Callable[[Mapping[str, object], Mapping[str, object]], bool] | None = None,
    derived: Callable[[Mapping[str, object]], bool] | None = None,
) -> None:
    """Puts the tables into the document of the settings file at `path`, each with its earlier settings.

    same: whether two tables are for one model. derived: whether a program would write the same table. Other tables are set
    aside while their model is not served.
    """
    same, derived = same or _same, derived or _is_derived
    settings_files.tables(path, document, "models")  # raises
    aside_path = path.with_name(_ASIDE)
    aside, _new = settings_files.opened(aside_path)
    waiting = settings_files.tables(aside_path, aside, "models")
    known = [_merged(next((one for one in waiting if same(one, table)), {}), table) for table in wanted]
    going = settings_files.set_tables(document, "models", known, same)
    left = [one for one in waiting if not any(same(one, table) for table in wanted)]
    left += [one for one in going if not derived(one) and not any(same(one, other) for other in left)]
    if left != waiting:
        settings_files.set_tables(aside, "models", left, same)
        settings_files.save(aside_path, aside)


def waiting_names(path: Path) -> set[str]:
    """The ids in the set-aside file of the settings file at `path`. Raises SettingsError for a damaged file."""
    aside = path.with_name(_ASIDE)
    return {str(one.get("name")) for one in settings_files.tables(aside, settings_files.read(aside) or {}, "models")}


def _named(table: Mapping[str, Any]) -> dict[str, str]:
    """With a derived id if it has none or an invalid one."""
    path, name = table.get("path"), str(table.get("name", ""))
    if not is_name(name):
        name = DEFAULT_MODEL if path is None else from_file(Path(path))
    return {"name": name} if path is None else {"name": name, "path": str(path)}


def _same(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return _named(one) == _named(other)


def _is_derived(one: Mapping[str, object]) -> bool:
    """Whether `table` derives the same settings for this model."""
    return dict(one) == table(Path(str(one.get("path", DEFAULT_MODEL))))


def _as_there(settings: Path, there: Sequence[dict[str, str]], wanted: dict[str, str]) -> dict[str, str]:
    """The model as the file already names it, perhaps with a person's own id or a relative path."""

    def place(table: Mapping[str, str]) -> str | None:
        return os.path.normpath(settings.parent / table["path"]) if "path" in table else None

    return next((one for one in there if place(one) == place(wanted)), wanted)


def _check_names(tables: Sequence[Mapping[str, str]]) -> None:
    known: dict[str, Mapping[str, str]] = {}
    for one in tables:
        other = known.setdefault(one["name"], one)
        if other is not one:
            both = " and ".join(each.get("path", "the default model") for each in (other, one))
            raise SettingsError(f"{both} would share the id {one['name']}: give one of the files another name")


def _upstream(path: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return tuple(str(model["name"]) for model in document["upstream"]["models"])
    except (LookupError, TypeError) as exc:
        raise SettingsError(f"{path} is damaged: each of upstream.models needs a name") from exc
