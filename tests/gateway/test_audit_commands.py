"""`lacre audit`, as an auditor uses it: on a folder of files, without a gateway."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lacre.jose.jws import b64u
from lacre_gateway.audit.reader import LogReader
from parts.auditing import PUBLIC, written


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "audit"
    asyncio.run(written(folder, 150))
    return folder


def lacre(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lacre", "audit", *map(str, args)], capture_output=True, text=True, check=False
    )


def test_verify(log: Path, tmp_path: Path) -> None:
    said = lacre("verify", log)
    assert (said.returncode, said.stdout.splitlines()[-1]) == (0, "self-consistent only")
    kept = tmp_path / "kept"
    kept.write_bytes((log / "checkpoint").read_bytes())
    found = json.loads(lacre("verify", log, "--checkpoint", kept, "--key", b64u(PUBLIC), "--json").stdout)
    assert (found["ok"], found["entries"], found["requests"], found["under_way"]) == (True, 302, 150, 0)
    assert found["verdict"] == "holds, and extends the kept checkpoint of 302 entries"


def test_verify_says_where(log: Path, tmp_path: Path) -> None:
    bent = tmp_path / "bent"
    subprocess.run(["cp", "-r", log, bent], check=True)
    bundle = bent / "tile" / "entries" / "000"
    bundle.write_bytes(bundle.read_bytes().replace(b"alice", b"mallo", 1))
    said = lacre("verify", bent)
    assert said.returncode == 1
    assert said.stdout.splitlines()[-1].startswith("does not hold: tile/entries/000, entry 1: ")
    assert lacre("verify", log, "--key", b64u(bytes(32))).returncode == 1


def test_what_a_client_kept(log: Path, tmp_path: Path) -> None:
    proof = LogReader(log, PUBLIC).proof(7)
    for name, text in (("file", proof.text()), ("header", proof.header() + "\n")):
        (tmp_path / name).write_text(text)
        said = lacre("check-receipt", tmp_path / name, log)
        assert (said.returncode, said.stdout[:24]) == (0, "entry 7 is in the log, a")
    (tmp_path / "bent").write_text(proof.header().replace("index=7", "index=8"))
    said = lacre("check-receipt", tmp_path / "bent", log)
    assert said.returncode == 5 and "does not hold" in said.stderr


def test_prove(log: Path, tmp_path: Path) -> None:
    by_index, by_request = lacre("prove", log, "--index", "21"), lacre("prove", log, "--request", f"{10:032x}")
    assert by_index.stdout == by_request.stdout == LogReader(log, PUBLIC).proof(21).text()
    for args in ([], ["--index", "1", "--request", "x"], ["--index", "302"], ["--request", "none"]):
        assert lacre("prove", log, *args).returncode == 1


def test_tail(log: Path) -> None:
    lines = lacre("tail", log, "-n", "2").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["outcome", "event"]


def test_query(log: Path, tmp_path: Path) -> None:
    lines = lacre("query", log, "--subject", "alice", "--decision", "allow", "--limit", "3").stdout.splitlines()
    assert [json.loads(line)["index"] for line in lines] == [295, 297, 299]
    assert len(lacre("query", log, "--request", f"{4:032x}").stdout.splitlines()) == 2
    assert len(lacre("query", log, "--until", "1970-01-01T00:00:10").stdout.splitlines()) == 17
    sql = "SELECT outcome, count(*) AS requests FROM entries WHERE kind = 'outcome' GROUP BY outcome"
    said = lacre("query", log, "--sql", sql, "--index", tmp_path / "index.sqlite")
    assert json.loads(said.stdout) == {"outcome": "answered", "requests": 150}
    assert (tmp_path / "index.sqlite").stat().st_mode & 0o777 == 0o600
    for bad in ("DELETE FROM entries", "SELECT x"):
        refused = lacre("query", log, "--sql", bad)
        assert refused.returncode == 1 and "--sql" in refused.stderr


def test_no_log(tmp_path: Path) -> None:
    said = lacre("verify", tmp_path / "none")
    assert said.returncode == 1 and "is not the folder of an audit log" in said.stderr and "Traceback" not in said.stderr
