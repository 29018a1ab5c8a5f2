"""What a program that logs its libraries sees of a sealed request: the line of the one that left, and no other."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import lacre
import lacre.openai
from parts.in_memory_http import InMemoryHttp
from parts.issuer import Issuer
from parts.keys import MODEL
from parts.stage import Stage


@pytest.fixture
async def options(tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    async with Stage.on_air(tmp_path, Issuer()) as stage:
        transport = InMemoryHttp(stage.app)
        yield {"url": stage.url, "token": stage.token, "memory": lacre.VersionMemory(), "transport": transport, "retries": 0}


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name in ("httpx", "httpx2")]


async def test_one_line_for_each_request(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with lacre.AsyncClient(**options) as client:
        for _ in range(2):
            with pytest.raises(lacre.LacreError):
                await client.chat("Hello.", model=MODEL)  # there is no worker
    assert [line.split('"')[0].strip() for line in lines(caplog)] == [
        "HTTP Request: GET http://127.0.0.1:9/v1/manifest",
        *["HTTP Request: POST http://127.0.0.1:9/v1/sealed"] * 2,
    ]


async def test_one_line_beneath_a_client_of_openai_s(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with lacre.openai.AsyncOpenAI(**options) as client:
        with pytest.raises(Exception, match="No worker"):
            await client.with_options(max_retries=0).models.list()
    assert len(lines(caplog)) == 2
    assert not any("lacre.invalid" in record.getMessage() for record in caplog.records)


def test_other_requests_of_the_program_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    transport = httpx2.MockTransport(lambda _request: httpx2.Response(200))
    with httpx2.Client(transport=transport) as client:
        client.get("https://lacre.invalid.example/")
    assert len(lines(caplog)) == 1
