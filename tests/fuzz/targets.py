"""Every target, by name."""

from typing import Final

from fuzz import answers, backend, chats, fabric, heads, keys, lineages, proofs, statements, wire
from fuzz.target import Target

_ALL: Final = (
    *wire.TARGETS,
    *statements.TARGETS,
    *answers.TARGETS,
    *proofs.TARGETS,
    *fabric.TARGETS,
    *keys.TARGETS,
    *lineages.TARGETS,
    *heads.TARGETS,
    *backend.TARGETS,
    *chats.TARGETS,
)
TARGETS: Final[dict[str, Target]] = {target.name: target for target in _ALL}
