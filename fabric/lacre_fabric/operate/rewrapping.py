"""Moves a state folder's wrapped keys from one key management service to another, or to files as they are, and back.

Rules:
- Nothing is written before every key was opened: by the service that it is to leave, or, where another run was broken off, by
  the one that it has reached. A key that neither opens stops all of it.
- A key's new file is opened again and compared before it takes the old one's place, which it does in one step.
- The state names the new service last: until then, the same command goes on where it was broken off.
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
    """A key's file. before: whether an earlier run had moved it."""

    path: Path
    before: bool


@dataclass(frozen=True, slots=True)
class _Move:
    """One key, and how it is kept before and after."""

    path: Path
    context: EncryptionContext
    source: Keeping
    target: Keeping

    def done(self) -> bool:
        """Whether an earlier run had moved it. Raises where neither opens it: the reason that the source gives."""
        if self._arrived():
            return True
        overwrite(self.source.read(self.path, self.context))
        return False

    def do(self) -> None:
        secret = self.source.read(self.path, self.context)
        try:
            coming = self.path.with_name(f".{self.path.name}.rewrapped")  # no key file by its name: no worker takes it up
            write_secret(coming, self.target.encoded(secret, self.context, self._public(secret)))
            again = self.target.read(coming, self.context)
            same = hmac.compare_digest(again, secret)
            overwrite(again)
            if not same:
                raise WrongWrapping(
                    f"{self.path}: the new service does not give back what it wrapped; the old file is as it was"
                )
            replace_by(coming, self.path)
        finally:
            overwrite(secret)

    def _arrived(self) -> bool:
        try:
            overwrite(self.target.read(self.path, self.context))
        except (SettingsError, KmsError) as exc:
            if isinstance(exc, KmsError) and exc.retryable:
                raise  # nobody knows yet
            return False
        return True

    def _public(self, secret: bytearray) -> bytes:
        if self.context.purpose != "receipt-key":
            return b""
        return raw_public_key(parse_ed25519(secret, self.path))


def rewrap(site: Site, source: str, target: str) -> Iterator[Moved]:
    """Each key as it is done; all of them once this is exhausted. Inside `Site.changing`. Raises SettingsError or KmsError.

    From an address to itself, each key is wrapped anew: by the newest version of the service's key.
    """
    anew = kms.check(source) == kms.check(target)
    with ExitStack() as stack:
        moves = []
        for pool in site.pools:
            destroy_leftovers(site.keys_folder(pool), "*.key")
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
    """Every key of the pool. Raises SettingsError where one that lives has no file."""
    folder = site.keys_folder(pool)
    there = {pool_keys.number(path): path for path in pool_keys.files(folder)}
    if missing := {key_id for one in site.generations(pool).live for key_id in one.ids} - there.keys():
        raise SettingsError(f"{folder} lacks the keys {', '.join(map(str, sorted(missing)))}: bring them back first")
    yield from ((path, kept.pool_key(key_id)) for key_id, path in sorted(there.items()))
    yield site.receipt_file(pool), kept.receipt_key()
