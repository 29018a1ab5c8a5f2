"""What `lacre up` writes down anew at each start, and what it leaves as somebody set it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lacre.errors import SettingsError
from lacre_fabric.site import Site

TABLES = [{"name": "small", "path": "/models/small.gguf"}, {"name": "large", "path": "/models/large.gguf"}]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "state", {"default": ("small", "large")})
    site.create()
    site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    return site


def models(site: Site) -> list[dict[str, object]]:
    return tomllib.loads(site.worker_settings("default").read_text())["models"]  # type: ignore[no-any-return]


def test_what_was_set_for_a_model_stays(site: Site) -> None:
    path = site.worker_settings("default")
    path.write_text(path.read_text().replace('name = "large"', 'name = "large"\nthreads = 3\nflash = true'))
    site.write_settings("nats://127.0.0.1:5222", 8321, {"default": list(reversed(TABLES))})
    assert models(site) == [{**TABLES[1], "threads": 3, "flash": True}, TABLES[0]]
    site.write_settings("nats://127.0.0.1:5222", 8321, {"default": [{"name": "large", "path": "/models/other.gguf"}]})
    assert models(site) == [{"name": "large", "path": "/models/other.gguf"}], "another file is another model"


@pytest.mark.parametrize("content", ["models = 1", "[[models]", "pool = 'default'"])
def test_a_damaged_file_is_not_overwritten(site: Site, content: str) -> None:
    path = site.worker_settings("default")
    path.write_text(content)
    with pytest.raises(SettingsError, match="damaged"):
        site.write_settings("nats://127.0.0.1:4222", 8321, {"default": TABLES})
    assert path.read_text() == content
