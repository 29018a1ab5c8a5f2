"""Both apps against their own descriptions: schemathesis asks whatever OpenAPI allows, and more, of a real server.

It lives in an environment of its own (`make tested`), and is left out where that is missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from parts.stage import Stage

from .conftest import PutUp, served

SCHEMATHESIS = Path(__file__).resolve().parents[2] / "build" / "contract" / "bin" / "schemathesis"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,unsupported_method,allow_header_conformance,ignored_auth,negative_data_rejection"
)
SECONDS = 20
# A sealed request is bytes, whatever its media type.
HOOKS = """
import schemathesis
schemathesis.serializer.alias("message/ohttp-chunked-req", "application/octet-stream")
"""


PLANS = """
    currency = "USD"
    default_plan = "all"
    [plans.all.user]
    requests_per_minute = 1000000
    [prices."*"]
    prompt = "1"
    cached = "1"
    completion = "1"
"""


@pytest.fixture
async def stage(put_up: PutUp) -> Stage:
    """A stage in which many bad tokens and refusals, from one address, are no reason to say 429."""
    names = ("failed_auth_per_minute", "refused_per_minute", "refused_per_address", "calls_per_address")
    return await put_up(limits="\n".join(f"{name} = 1000000" for name in names), plans=PLANS)


@pytest.mark.slow
@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed: `make tested`")
@pytest.mark.parametrize("which", ["public", "admin"])
async def test_no_breach(stage: Stage, tmp_path: Path, which: str) -> None:
    app = stage.app if which == "public" else stage.admin
    schema = tmp_path / "openapi.json"
    schema.write_text(json.dumps(app.openapi()))
    (tmp_path / "hooks.py").write_text(HOOKS)
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    token = stage.issuer.token(scope="lacre:admin lacre:http", sub="root")
    async with stage.fake_worker(), served(app) as (_, port):
        command = [
            str(SCHEMATHESIS), "run", str(schema), "--url", f"http://127.0.0.1:{port}", "--checks", CHECKS,
            "--header", f"Authorization: Bearer {token}", "--phases", "examples,coverage,fuzzing", "--no-color",
            "--request-timeout", "30", "--seed", "1", "--max-time", str(SECONDS),
        ]  # fmt: skip
        done = await asyncio.to_thread(
            subprocess.run, command, check=False, capture_output=True, text=True, timeout=110, cwd=tmp_path, env=environment
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "Tested" in done.stdout or "passed" in done.stdout
    assert not [line for line in stage.logged() if line["level"] == "error"], stage.logged()


async def test_the_public_description(stage: Stage) -> None:
    """It is complete: every route is in it, and it is not served."""
    document = stage.app.openapi()
    routes = {getattr(route, "path", None) for route in stage.app.routes}
    assert set(document["paths"]) == routes
    assert stage.app.openapi_url is None
