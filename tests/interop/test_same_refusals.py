"""What the npm package refuses, as the files of tests/refusals say: the Python SDK refuses the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from parts.npm import install
from refusals.__main__ import FILES

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "sdk" / "javascript"
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    install(PACKAGE)


def refused(*names: str, source: Path = PACKAGE / "src") -> dict[str, Any]:
    """By file, how many cases there are, and of which the package says something else."""
    done = subprocess.run(
        [str(NODE), "refuse.mjs", *names], cwd=HERE, env={"PATH": os.environ["PATH"], "LACRE_SOURCE": str(source)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Defences that are taken away from a copy: the file whose cases must notice, a file of the package, its text, another text.
DEFENCES = [
    ("statements", "trust/chain.js", "if (manifest.exp <= now) throw", "if (false) throw"),
    ("statements", "trust/chain.js", "manifest.iat > now + MAX_CLOCK_SKEW", "false"),
    ("statements", "trust/json.js", "> 1) throw new NewerFormatError", "> 2) throw new NewerFormatError"),
    ("statements", "evidence/receipts.js", "claims.completion_tokens > ceiling", "false"),
    ("statements", "evidence/receipts.js", "claims.cached_tokens > claims.prompt_tokens", "false"),
    ("statements", "evidence/receipts.js", "|| !final", ""),
    ("statements", "trust/routes.js", "found.length > MAX_ROUTES", "false"),
    ("documents", "trust/chain.js", "!entry.isOne ||", ""),
    ("documents", "trust/chain.js", "if (!statement) throw", "if (!statement) continue; if (!statement) throw"),
    ("documents", "trust/chain.js", "bytes.length > MAX_DOCUMENT", "false"),
    ("documents", "trust/jws.js", "found === typ", "true"),
    ("documents", "trust/jws.js", "crit !== undefined", "false"),
    ("documents", "trust/ed25519.js", "isWeak(key) ||", ""),
    ("documents", "trust/rollback.js", "candidate.manifest.ver < seen.ver ||", ""),
    ("documents", "trust/rollback.js", "|| !(await continues(candidate, seen, document))", ""),
    ("documents", "wire/bytes.js", "return toBase64(bytes) === text ? bytes : null;", "return bytes;"),
    ("proofs", "evidence/audit_proof.js", "!equal(root, checkpoint.root)", "false"),
    ("proofs", "evidence/audit_proof.js", "if (members[name] === value) continue;", "if (members[name] == value) continue;"),
    ("proofs", "evidence/audit_proof.js", "namesIn(text) !== membersOf(members)", "false"),
    ("proofs", "evidence/audit_proof.js", "name === origin &&", ""),
    ("answers", "wire/ohttp.js", 'const FINAL = ascii("final");', 'const FINAL = ascii("");'),
    ("answers", "wire/ohttp.js", "if (length <= TAG_SIZE) throw", "if (false) throw"),
    ("messages", "wire/bhttp.js", "byte !== 0", "false"),
    ("messages", "wire/bhttp.js", "fields.length === LIMITS.fields", "false"),
    ("messages", "wire/bhttp.js", "CONNECTION_FIELDS.has(name) ||", ""),
    (
        "outside", "exchange/sealing.js",
        "!== 200) throw await problemOf(response);\n    if", ">= 300) throw await problemOf(response);\n    if",
    ),
    ("outside", "exchange/problems.js", "if (error instanceof TooLargeError) return null;", ""),
    ("addresses", "trust/connection.js", 'base.protocol === "http:" &&', "false &&"),
    ("configurations", "wire/keys.js", "|| length !== reader.left", ""),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file", "old", "new"), DEFENCES)
def test_its_cases_notice_a_defence_that_is_gone(tmp_path: Path, name: str, file: str, old: str, new: str) -> None:
    shutil.copytree(PACKAGE / "src", tmp_path / "src")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "node_modules").symlink_to(PACKAGE / "node_modules")
    changed = tmp_path / "src" / file
    text = changed.read_text()
    assert text.count(old) == 1
    changed.write_text(text.replace(old, new))
    assert refused(name, source=tmp_path / "src")[name]["wrong"] != []


@pytest.mark.parametrize("name", FILES)
def test_it_says_what_the_sdk_says(name: str) -> None:
    found = refused(name)[name]
    assert found["cases"] >= 20
    assert found["wrong"] == []
