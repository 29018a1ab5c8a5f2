"""Replaces a pool's receipt key, so that every client knows the key that signs its receipt.

    pools/NAME/receipt.pem           signs the receipts of keys that have no receipt key of their own
    pools/NAME/keys/NUMBER.receipt   signs the receipts of requests that are sealed to the key NUMBER
    pools/NAME/past_receipts.json    the public parts of replaced receipt keys, and until when each signed

Rules:
- A new receipt key comes with new pool keys. A client that seals to such a key has the manifest that names both, so it accepts
  the receipt. A client with an older manifest seals to an older key, and gets a receipt of the older receipt key.
- A receipt key is written before the pool key that it belongs to, so no worker holds the pool key alone. The exception is a
  staged key that gets one later: it is listed only once every worker has both.
- All keys of a generation have the same receipt key. A crash between the files is repaired before the keys are listed
  (`complete`).
- Once no key is left that the old receipt key belongs to, `receipt.pem` gets the new one. The old one is overwritten, and the
  manifest names its public part as a past one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from lacre.errors import InvalidMessage, SettingsError
from lacre.jose.claims import Members
from lacre.jose.jws import b64u
from lacre.trust.manifest import PastReceiptKey, PoolKey
from lacre.wire.wiping import overwrite
from lacre_fabric.keys import pool_keys
from lacre_fabric.keys.generations import Generation, Generations
from lacre_fabric.keys.kms.protocol import KmsError
from lacre_fabric.keys.kms.wrapping import Keeping
from lacre_fabric.keys.secret_files import destroy_leftovers, read_secret, write_secret

_PAST: Final = "past_receipts.json"
MAX_PAST: Final = 64  # in the manifest; one replacement each month for five years
# Seconds after the last request was taken in which its stream may still be signed for: the longest that a gateway allows
_LAST_STREAM: Final = 3600.0

log = structlog.get_logger("lacre.keys")


@dataclass(frozen=True, slots=True)
class ReceiptKeys:
    """The receipt keys of a pool. Methods raise SettingsError, or KmsError where they write. folder: of the pool's keys."""

    folder: Path
    file: Path

    def of(self, generation: Generation | None) -> bytes:
        """The public receipt key of these pool keys."""
        path = self.file if generation is None else self._file_of(generation)
        return pool_keys.public_receipt_key(path)

    def changes(self, generations: Generations) -> bool:
        """Whether the staged keys come with another receipt key than the current ones."""
        staged = generations.staged
        return staged is not None and self.of(staged) != self.of(generations.current)

    def prepare(self, ids: Sequence[int], before: Generation | None, keeping: Keeping, *, anew: bool) -> None:
        """Writes the receipt keys for new pool keys of these ids. before: whose receipt key goes on, if not `anew`."""
        paths = [pool_keys.receipt_file(self.folder, key_id) for key_id in ids]
        if anew:
            pool_keys.make_receipt_keys(paths, keeping)
        elif before is not None and (source := self._file_of(before)) != self.file:
            for path in paths:
                _copy(source, path)

    def complete(self, staged: Generation) -> bool:
        """Whether each of these staged keys has the same receipt key. Completes what an interrupted run left, if it can.

        If not, one of the files is damaged. No client knows these keys yet, so they may get a new one.
        """
        paths = [pool_keys.receipt_file(self.folder, key_id) for key_id in staged.ids]
        there = [path for path in paths if path.exists()]
        if not there:
            return True
        try:
            public = {path: pool_keys.public_receipt_key(path) for path in there}
        except (SettingsError, KmsError) as exc:
            log.warning("receipt_key.damaged", reason=str(exc), remedy="the staged pool keys get a new one")
            return False
        for path in paths:  # they are written in this order, so the first one is the newest
            if public.get(path) != public[there[0]]:
                _copy(there[0], path)
        return True

    def listed(self, generations: Generations, now: float, until: float) -> tuple[tuple[PoolKey, ...], bytes]:
        """The keys that a manifest lists, and the pool's receipt key in it, which is that of the newest ones."""
        newest = self.of(generations.current)
        own = {
            config: key
            for one in generations.live
            if one.listed(now) and (key := self.of(one)) != newest
            for config in one.configs
        }
        keys = generations.pool_keys(now, until)
        return tuple(PoolKey(key.config, key.not_after, own.get(key.config)) for key in keys), newest

    def settle(self, generations: Generations, now: float) -> None:
        """Call it when keys are gone, with those that are left. If none belongs to the old receipt key, replaces that. Can be
        repeated.
        """
        destroy_leftovers(self.file.parent, self.file.name)
        old = self.of(None)
        if not generations.live or any(self.of(one) == old for one in generations.live):
            return
        oldest = generations.live[-1]
        past = [one for one in self.past() if one.key != old]
        kept = [*past, PastReceiptKey(old, round(now + _LAST_STREAM, 3))][-MAX_PAST:]
        members = [{"key": b64u(one.key), "until": one.until} for one in kept]
        write_secret(self.file.parent / _PAST, json.dumps({"past": members}).encode())
        _copy(self._file_of(oldest), self.file)

    def named(self, generations: Generations, now: float) -> tuple[PastReceiptKey, ...]:
        """What a manifest names as past: also the key of pool keys that have left it and are still there."""
        listed = {self.of(one) for one in generations.live if one.listed(now)}
        left = {self.of(one): one.retire_at or now for one in generations.live if one.listed_at is not None}
        past = {one.key: one.until for one in self.past()}
        past |= {key: round(at + _LAST_STREAM, 3) for key, at in left.items() if key not in listed and key not in past}
        return tuple(PastReceiptKey(key, until) for key, until in past.items())[-MAX_PAST:]

    def past(self) -> tuple[PastReceiptKey, ...]:
        path = self.file.parent / _PAST
        if not path.exists():
            return ()
        try:
            return tuple(map(PastReceiptKey.parse, Members.parse(read_secret(path), "the file").objects("past")))
        except InvalidMessage as exc:
            raise SettingsError(f"{path} is damaged ({exc}): restore it from a backup") from exc

    def _file_of(self, generation: Generation) -> Path:
        own = pool_keys.receipt_file(self.folder, generation.ids[0])
        return own if own.exists() else self.file


def _copy(source: Path, to: Path) -> None:
    content = read_secret(source)
    try:
        write_secret(to, content)
    finally:
        overwrite(content)
