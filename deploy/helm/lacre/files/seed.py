"""`python seed.py ARCHIVE STATE [KEYS]`: fills a new state folder from an archive.

Rules:
- Each part, a pool or the rest, is unpacked once. Destroyed keys must not come back, and no version may be signed twice.
- A pool that neither the archive nor site.json has any more was removed. Its keys are destroyed; it may return with others.
- KEYS has a folder for each pool: a volume with the pool's keys, which its workers read.
- models.json beside this file says which model files the manifest names. If it names none, the state keeps its own.
"""

import json
import os
import shutil
import sys
import tarfile
from pathlib import Path, PurePosixPath

RECEIPT = "receipt.pem"  # every pool has one until it is removed


def part(name: PurePosixPath) -> str:
    return "/".join(name.parts[:2]) if name.parts[0] == "pools" else "."


def seed(archive: Path, state: Path, keys: Path | None) -> None:
    marker = state / "seeded.json"
    done = set(json.loads(marker.read_text())) if marker.exists() else set()
    with tarfile.open(archive) as source:
        files = {PurePosixPath(member.name): member for member in source if member.isfile()}
        archived = {part(name) for name in files if name.name == RECEIPT}
        done -= forget(state, done - archived)
        files = {name: member for name, member in files.items() if part(name) not in done and is_whole(part(name), archived)}
        for name in files:
            if name.is_absolute() or ".." in name.parts:
                raise SystemExit(f"{archive} names a file outside of the state: {name}")
            make_room(state, name, keys)
            (state / name).write_bytes(source.extractfile(files[name]).read())
    marker.write_text(json.dumps(sorted(done | {part(name) for name in files})))


def is_whole(part: str, archived: set[str]) -> bool:
    """A removed pool leaves a file in the archive: the ids that its keys had."""
    return part == "." or part in archived


def forget(state: Path, gone: set[str]) -> set[str]:
    """Destroys those of the pools that site.json does not name. Returns them. An archive alone may be incomplete."""
    site = state / "site.json"
    if not site.exists():
        return set()
    named = {f"pools/{pool}" for pool in json.loads(site.read_text())["pools"]}
    found = {pool for pool in gone - named if pool.startswith("pools/")}
    for pool in found:
        keys = state / pool / "keys"
        destroy(keys)
        if keys.is_symlink():
            keys.unlink()
        destroy(state / pool)
        shutil.rmtree(state / pool, ignore_errors=True)
    return found


def destroy(folder: Path) -> None:
    """Overwrites and removes its files. Does nothing for a volume that is no longer mounted."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            with path.open("r+b", buffering=0) as file:
                file.write(bytes(path.stat().st_size))
                os.fsync(file.fileno())
            path.unlink()


def name_models(chosen: Path, state: Path) -> None:
    text = chosen.read_text()
    if not json.loads(text)["pools"]:
        return
    kept = state / "trust" / "models.json"
    draft = kept.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(kept)


def make_room(state: Path, name: PurePosixPath, keys: Path | None) -> None:
    folder = state / name.parent
    if keys is not None and name.parts[0] == "pools" and name.parent.name == "keys" and not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(keys / name.parts[1])
    folder.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    os.umask(0o077)
    seed(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    name_models(Path(__file__).with_name("models.json"), Path(sys.argv[2]))
