"""Settings files (TOML) that both a program and a person edit: the person's text stays.

Rules:
- A new file gets everything. In an existing file only the given values change. Comments, order, other keys and tables stay, and
  a default that a person removed is not added again.
- A file that cannot be read is damaged, and is not overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from lacre.errors import SettingsError
from lacre_fabric.keys.secret_files import write_secret

Values = Mapping[str, object]


def read(path: Path) -> tomlkit.TOMLDocument | None:
    """None if there is no file. Raises SettingsError for a damaged one."""
    try:
        return tomlkit.parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TOMLKitError) as exc:
        raise SettingsError(f"{path} is damaged ({exc}): correct it, or remove it (its settings are lost)") from exc


def opened(path: Path) -> tuple[tomlkit.TOMLDocument, bool]:
    """The file's document, or an empty one, and whether it is new. Raises SettingsError for a damaged file."""
    document = read(path)
    return (tomlkit.document(), True) if document is None else (document, False)


def write(path: Path, values: Values, defaults: Values | None = None) -> None:
    """Sets `values`, merging tables; a new file also gets `defaults`. Raises SettingsError for a damaged file."""
    document, new = opened(path)
    update(document, values)
    if new:
        update(document, defaults or {})
    save(path, document)


def save(path: Path, document: tomlkit.TOMLDocument) -> None:
    """Writes the document if it differs from the file. If the path is a link, its target is replaced.

    Raises SettingsError for text that is not Unicode, for example a path in another encoding.
    """
    try:
        content = tomlkit.dumps(document).encode()
    except UnicodeEncodeError as exc:
        raise SettingsError(f"{path}: a name in it is not UTF-8, which TOML needs: rename that file or folder") from exc
    if not path.exists() or path.read_bytes() != content:
        write_secret(path.resolve(), content)


def update(table: MutableMapping[str, Any], values: Values) -> None:
    """Sets the values that differ, so that the rest keeps its form."""
    for key, value in values.items():
        inner = table.get(key)
        if isinstance(value, Mapping) and isinstance(inner, MutableMapping):
            update(inner, value)
        elif inner != value:
            table[key] = value


def tables(path: Path, document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The plain values of an array of tables; empty if it is missing. path: the file's, for messages.

    Raises SettingsError if it is something else.
    """
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise SettingsError(f"{path} is damaged: write `{key}` as [[{key}]] tables, or remove the file (its settings are lost)")
    return [dict(one.unwrap()) for one in found]


def set_tables(
    document: MutableMapping[str, Any], key: str, wanted: Sequence[Values], same: Callable[[Values, Values], bool]
) -> list[dict[str, Any]]:
    """Makes the array contain exactly one table for each of `wanted`, in that order. An existing table keeps its other keys.
    Returns the removed tables.
    """
    before = list(document.get(key, []))
    chosen = [next((one for one in before if same(one, values)), None) for values in wanted]
    for found, values in zip(chosen, wanted, strict=True):
        if found is not None:
            update(found, values)
    if [id(one) for one in chosen] == [id(one) for one in before]:
        return []
    going = [dict(one.unwrap()) for one in before if not any(one is kept for kept in chosen)]
    array = tomlkit.aot()
    for found, values in zip(chosen, wanted, strict=True):
        array.append(found if isinstance(found, tomlkit.items.Table) else _table(found or {}, values))
    document.pop(key, None)
    document[key] = array
    return going


def _table(before: Values, values: Values) -> tomlkit.items.Table:
    table = tomlkit.table()
    table.update({**before, **values})
    return table
