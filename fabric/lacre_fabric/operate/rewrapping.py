"""Moves a state folder's keys from one KMS to another, or to and from unwrapped files.

Rules:
- Nothing is written before every key was opened: by the old service, or by the new one if an interrupted run moved it. A key
  that neither opens stops everything.
- A key's new file is opened again and compared before it replaces the old one atomically.
- The state names the new service last. Until then, the same command continues an interrupted run.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lacre.errors import SettingsError
from lacre.jose.jws import raw_public_key
from lacre.wire.wiping import overwrite
from lacre_fabric.keys import kms, pool_keys
from lacre_fabric.keys.kms.protocol import EncryptionContext, KmsError, WrongWrapping
from lacre_fabric.keys.kms.wrapping import Keeping, keeping
from lacre_fabric.keys.secret_files import destroy_leftovers, parse_ed25519, replace_by, write_secret
from lacre_fabric.operate.site import Site


@dataclass(frozen=True, slots=True)
class Moved:
    """A key's file. before: whether an earlier run moved it."""

    path: Path
    before: bool


@dataclass(frozen=True, slots=True)
class _Move:
    """One key, and how it is stored before and after."""

    path: Path
    context: EncryptionContext
    source: Keeping
    target: Keeping

    def done(self) -> bool:
        """Whether an earlier run moved it. If neither service opens it, raises the old service's error."""
        if self._arrived():
            return True
        overwrite(self.source.read(self.path, self.context))
        return False

    def do(self) -> None:
        secret = self.source.read(self.path, self.context)
        try:
            coming = self.path.with_name(f".{self.path.name}.rewrapped")  # not a key file by its name, so no worker loads it
            write_secret(coming, self.target.encoded(secret, self.context, self._public(secret)))
            again = self.target.read(coming, self.context)
            same = hmac.compare_digest(again, secret)
            overwrite(again)
            if not same:
                raise WrongWrapping(
                    f"{self.path}: the new service does not unwrap the key that it wrapped; the old file is unchanged"
                )
            replace_by(coming, self.path)
        finally:
            overwrite(secret)

    def _arrived(self) -> bool:
        try:
            overwrite(self.target.read(self.path, self.context))
        except (SettingsError, KmsError) as exc:
            if isinstance(exc, KmsError) and exc.retryable:
                raise  # the answer is not known yet
            return False
        return True

    def _public(self, secret: bytearray) -> bytes:
        if self.context.purpose != "receipt-key":
            return b""
        return raw_public_key(parse_ed25519(secret, self.path))


def rewrap(site: Site, source: str, target: str) -> Iterator[Moved]:
    """Yields each key when it is done; consume all to move all. Call it inside `Site.changing`. Raises SettingsError or
    KmsError.

    If source and target are the same, each key is wrapped again with the newest version of the service's key.
    """
    anew = kms.check(source) == kms.check(target)
    with ExitStack() as stack:
        moves = []
        for pool in site.pools:
            for kind in ("*.key", "*.receipt"):
                destroy_leftovers(site.keys_folder(pool), kind)
            destroy_leftovers(site.receipt_file(pool).parent, "*.pem")
            kept = [stack.enter_context(keeping(address, pool)) for address in (source, target)]
            moves += [_Move(path, context, *kept) for path, context in _keys(site, pool, kept[0])]
        before = [move.done() and not anew for move in moves]
        for move, was_done in zip(moves, before, strict=True):
            if not was_done:
                move.do()
            yield Moved(move.path, was_done)
    site.keep_kms(target)


def _keys(site: Site, pool: str, kept: Keeping) -> Iterator[tuple[Path, EncryptionContext]]:
    """Every key of the pool. Raises SettingsError if a live one has no file."""
    folder = site.keys_folder(pool)
    there = {pool_keys.number(path): path for path in pool_keys.files(folder)}
    if missing := {key_id for one in site.generations(pool).live for key_id in one.ids} - there.keys():
        raise SettingsError(f"{folder} lacks the keys {', '.join(map(str, sorted(missing)))}: restore them first")
    yield from ((path, kept.pool_key(key_id)) for key_id, path in sorted(there.items()))
    for path in (*pool_keys.receipt_files(folder), site.receipt_file(pool)):
        yield path, kept.receipt_key()
