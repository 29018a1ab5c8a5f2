"""An audit log of a million entries: times and sizes of rotation, verification, export, proofs without the log, and erasure.

python -m bench.audit_years [--requests N]

It prints what it measures, one line a step, and compares with nothing. Half of the entries are intents, half are outcomes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lacre.evidence.audit_proof import AuditProof
from lacre.jose.jws import raw_public_key
from lacre_gateway.audit import entries as kinds
from lacre_gateway.audit import export, series
from lacre_gateway.audit.check import verify
from lacre_gateway.audit.entries import Event, Intent, Outcome, encode
from lacre_gateway.audit.feed import read
from lacre_gateway.audit.journal import MAX_GROUP
from lacre_gateway.audit.reader import LogReader
from lacre_gateway.audit.store import Store

_ORIGIN: Final = "gateway.example.com/audit/g1"
_PROOFS: Final = 1000
_BEGIN: Final = 1_790_000_000.0  # seconds since the epoch, of the first request; one comes each second


def entries_of(number: int) -> Iterator[bytes]:
    """A request as a gateway records it."""
    name, moment = f"{number:032x}", _BEGIN + number
    yield from encode(
        Intent(
            request_id=name, time=moment, subject=f"user-{number % 5000}@example.com", tenant="acme",
            issuer="https://login.example.com/", jti="5e" * 32, address="192.0.2.17", pool="default", model="qwen3-8b",
            action="chat", shape="stream", kem="X25519MLKEM768", max_tokens=1024, sealed_bytes=4096, enc="A" * 43,
            groups=("engineering", "staff"), scopes=("chat",), plan="standard", decision="allow", policies=("people-may-chat",),
            policy_set="ab" * 32, entities="cd" * 32, reserved_prompt_tokens=1200, reserved_tokens=1024, lease="g1",
            limits=("user:standard/tokens_per_day@20782", "user:standard/requests_per_minute@29926080"),
        )
    )  # fmt: skip
    yield from encode(
        Outcome(
            request_id=name, time=moment + 1.5, outcome="answered", status=200, unreceipted=False, receipt="ef" * 32,
            refused_receipt=None, prompt_tokens=800, cached_tokens=512, completion_tokens=200, duration=1.5,
        )
    )  # fmt: skip


@contextmanager
def step(name: str, told: Callable[[], str] = lambda: "") -> Iterator[None]:
    began, computed = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - began, time.process_time() - computed
    print(f"{name:<42}{wall:>10.3f} s  {cpu:>8.3f} s of CPU  {told()}", flush=True)


def size_of(folder: Path) -> str:
    """Of its files, and how many there are."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files"


def fill(store: Store, requests: int) -> None:
    """As group commits of a busy gateway."""
    store.commit(encode(Event(time=_BEGIN, event=kinds.STARTED)))
    each = MAX_GROUP // 2
    for begin in range(0, requests, each):
        store.commit([data for number in range(begin, min(begin + each, requests)) for data in entries_of(number)])
        if store.unpublished >= 64 * MAX_GROUP:
            store.published(store.publication(()).write())
    store.published(store.publication(()).write())


def exported(root: Path, public: bytes, form: export.Format, path: Path, since: float | None) -> None:
    exporter = export.Exporter(form, since)
    with path.open("w") as file:
        for entry in read(root, public):
            if entry is not None:
                file.writelines(line + "\n" for line in exporter.lines(entry))


def lines_of(path: Path) -> str:
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    return f"{lines} lines, {path.stat().st_size / 2**20:.1f} MiB"


def prove(root: Path, public: bytes, size: int, beside: Path) -> None:
    reader = LogReader(root, public)
    texts = []
    with step(f"{_PROOFS} proofs made"):
        texts = [reader.proof(index).text() for index in range(1, size, size // _PROOFS)][:_PROOFS]
    beside.write_text(json.dumps(texts))
    kept: list[str] = json.loads(beside.read_text())
    with step(f"{_PROOFS} proofs checked without the log", lambda: f"{sum(map(len, kept)) / len(kept):.0f} bytes each"):
        for text in kept:
            AuditProof.parse(text).verify(public)


def measure(requests: int) -> None:
    key = Ed25519PrivateKey.generate()
    public = raw_public_key(key)
    with tempfile.TemporaryDirectory(prefix="lacre-audit-") as made:
        root, out = Path(made) / "audit", Path(made) / "out"
        store = Store(root, key, _ORIGIN)
        with step(f"{2 * requests} entries written", lambda: size_of(root)):
            fill(store, requests)
        end = _BEGIN + requests
        with step("rotated", lambda: f"the new log: {size_of(root / 'log-2')}"):
            store.rotate(end, ())
        size = LogReader(root, public).size
        with step("opened again (a restart)"):
            store.close()
            store = Store(root, key, _ORIGIN)
        anchor = (root / "log-2/checkpoint").read_bytes()
        verdict = ""
        with step("both logs verified", lambda: verdict):
            verdict = verify(root, public, [anchor]).words
        for form in export.FORMATS:
            with step(f"exported as {form}", lambda: lines_of(out)):
                exported(root, public, form, out, None)
        with step("exported as ocsf, the last hundredth", lambda: lines_of(out)):
            exported(root, public, "ocsf", out, end - requests / 100)
        prove(root, public, size, out)
        store.commit(encode(Event(time=end, event=kinds.ERASED, target=_ORIGIN, count=size)))
        store.published(store.publication(()).write())
        out.unlink()
        with step("the old log erased", lambda: f"what remains: {size_of(root)}"):
            series.erase(root, public)
        with step("the chain verified after that", lambda: verdict):
            verdict = verify(root, public, [anchor]).words
        store.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500_000, help="two entries each")
    measure(parser.parse_args().requests)
