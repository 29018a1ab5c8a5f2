"""`lacre up --projector`: what the manifest names is what answers."""

from __future__ import annotations

import base64
from pathlib import Path

from lacre.client import fetch_manifest
from lacre_backend.engine.projector import projected_digest
from lacre_backend.models.gguf import find
from parts.tiny_model import tiny_model
from parts.tiny_projector import TOKENS, picture, tiny_projector
from parts.up import Up


def test_a_projector_is_named_and_kept(tmp_path: Path) -> None:
    """In the manifest by the digest of both files, with what the model reads. A restart needs no option."""
    model, projector = tiny_model(tmp_path / "m.gguf"), tiny_projector(tmp_path / "mmproj.gguf")
    both = projected_digest(find(model).digest, find(projector).digest)
    image = base64.b64encode(picture("red")).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    for arguments in (("--model", str(model), "--projector", str(projector)), ()):
        with Up.start(tmp_path / "state", *arguments) as up, up.client(pin_models={"m": both}) as client:
            entry = fetch_manifest(up.url).pools["default"].models["m"]
            assert (entry.digests, entry.modalities) == ((both,), ("text", "image"))
            plain = client.chat("Hi.", max_tokens=4, temperature=0)
            seen = client.chat(
                [{"role": "user", "content": [shown, {"type": "text", "text": "Hi."}]}], max_tokens=4, temperature=0
            )
            assert seen.usage.prompt == plain.usage.prompt + TOKENS
