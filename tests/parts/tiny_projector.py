"""Pictures, and a vision projector for `tiny_model`: one layer, random weights, of LLaVA's kind: 16 tokens of each picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lacre.errors import SettingsError
from lacre_backend.engine.projector import ProjectorFile, mtmd
from lacre_backend.settings import ModelSettings
from parts.tiny_model import N_EMBD, write_gguf

SIDE, PATCH = 32, 8  # pixels
TOKENS = (SIDE // PATCH) ** 2  # of a picture
_WIDTH, _HEADS, _INNER = 32, 2, 64


def has_mtmd() -> bool:
    """Whether this environment can load a projector: `make projector` made it so."""
    try:
        mtmd()
    except SettingsError:
        return False
    return True


def picture(colour: Any, size: tuple[int, int] = (50, 40), kind: str = "PNG", **options: Any) -> bytes:
    """A file of one colour. Needs Pillow, which `make projector` installs."""
    image = import_module("PIL.Image")
    written = io.BytesIO()
    mode = "RGBA" if isinstance(colour, tuple) and len(colour) == 4 else "RGB"
    image.new(mode, size, colour).save(written, kind, **options)
    return written.getvalue()


def tiny_projector(
    path: Path,
    *,
    n_embd: int = N_EMBD,
    seed: int = 1,
    more: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
) -> Path:
    """n_embd: of the model that it is for. more: metadata in place of its own. tensors: further ones."""
    own = {
        "general.architecture": "clip", "general.type": "mmproj", "general.name": "tiny", "clip.projector_type": "mlp",
        "clip.has_vision_encoder": True, "clip.use_gelu": True,
        "clip.vision.image_size": SIDE, "clip.vision.patch_size": PATCH, "clip.vision.embedding_length": _WIDTH,
        "clip.vision.feed_forward_length": _INNER, "clip.vision.block_count": 1, "clip.vision.attention.head_count": _HEADS,
        "clip.vision.attention.layer_norm_epsilon": 1e-5, "clip.vision.projection_dim": n_embd,
        "clip.vision.image_mean": [0.5] * 3, "clip.vision.image_std": [0.5] * 3,
    }  # fmt: skip
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        return random.normal(0, 0.3, shape)

    made = {
        "v.patch_embd.weight": matrix(_WIDTH, 3, PATCH, PATCH),
        "v.position_embd.weight": matrix(TOKENS, _WIDTH),
        "mm.0.weight": matrix(n_embd, _WIDTH), "mm.0.bias": matrix(n_embd),
        "mm.2.weight": matrix(n_embd, n_embd), "mm.2.bias": matrix(n_embd),
    }  # fmt: skip
    shapes = {
        "attn_q": (_WIDTH, _WIDTH), "attn_k": (_WIDTH, _WIDTH), "attn_v": (_WIDTH, _WIDTH), "attn_out": (_WIDTH, _WIDTH),
        "ffn_up": (_INNER, _WIDTH), "ffn_down": (_WIDTH, _INNER),
    }  # fmt: skip
    for name, (outer, inner) in shapes.items():
        made |= {f"v.blk.0.{name}.weight": matrix(outer, inner), f"v.blk.0.{name}.bias": matrix(outer)}
    for norm in ("v.blk.0.ln1", "v.blk.0.ln2", "v.pre_ln"):
        made |= {f"{norm}.weight": np.ones(_WIDTH), f"{norm}.bias": np.zeros(_WIDTH)}
    return write_gguf(path, own | dict(more), made | dict(tensors))


def file_at(path: Path) -> ProjectorFile:
    return ProjectorFile(path, "sha256:1", path)


def projecting(base: Path, projector: Path, **more: Any) -> ModelSettings:
    """The settings of a model that reads images."""
    return ModelSettings(path=base, name="tiny", projector=projector, context=512, threads=1, slots=1, **more)
