"""The lock line and the table: the verified facts, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lacre.cli.output import ago, date, printable, say_table, until
from lacre.evidence.verification import Verification

SHORT: Final = 8  # characters of a fingerprint that a person compares at a glance; the table has the whole

Row = tuple[bool, str, str]  # whether it was verified, what it is, and the text


def line(checked: Verification) -> str:
    """One line: what the next prompt is sealed to, and who vouches for it."""
    if checked.manifest is None:
        return "🔓 nothing is verified yet"
    parts = [f"🔒 root {checked.pinned[:SHORT]}…", f"manifest v{checked.manifest.version}, {ago(checked.manifest.age)} old"]
    if checked.sealed_to is not None:
        parts.append(f"sealed to {checked.sealed_to.pool} {checked.sealed_to.key[:SHORT]}…, {checked.sealed_to.kem}")
    if checked.receipt is not None:
        parts.append("receipt ✓")
    if checked.audit is not None:
        parts.append(f"audit #{checked.audit.index} ✓")
    return printable(" · ".join(parts))


def rows(checked: Verification) -> Iterator[Row]:
    """The content of a verification, in the order of the checks; a missing check is shown as such."""
    signed, key, receipt, audit = checked.manifest, checked.sealed_to, checked.receipt, checked.audit
    yield True, "root", f"{checked.pinned}, pinned here"
    if signed is None:
        yield False, "manifest", "none was verified"
        return
    if signed.root != checked.pinned:
        yield True, "root now", f"{signed.root}, to which the pinned root handed over"
    yield True, "signer", f"{signed.signer}, until {until(signed.signer_expires_at)}"
    yield True, "manifest", f"{signed.issuer}, version {signed.version}, signed {ago(signed.age)} ago"
    yield True, "valid until", until(signed.expires_at)
    yield (False, "sealed to", "no request yet") if key is None else (True, "sealed to", f"pool {key.pool}, key {key.key}")
    if key is not None:
        yield True, "KEM", f"{key.kem}, until {date(key.not_after)}"
    if receipt is None:
        yield False, "receipt", "none yet"
    else:
        used = f"{receipt.prompt_tokens} + {receipt.completion_tokens} tokens"
        yield True, "receipt", f"{used}, by model {receipt.model or 'without a digest'}"
    yield (False, "audit", "no entry yet") if audit is None else (True, "audit", f"entry {audit.index}, under a checkpoint")


def show(checked: Verification, *more: Row) -> None:
    """Prints the rows, and `more` rows after them, as data."""
    found = [*rows(checked), *more]
    told = [("✓" if verified else "–", what, how) for verified, what, how in found]
    say_table(("", "", ""), told, styles=[None if verified else "dim" for verified, _, _ in found])
