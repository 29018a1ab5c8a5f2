"""Every target, by name."""

from typing import Final

from fuzz import answers, backend, fabric, faces, heads, keys, lineages, proofs, statements, wire
from fuzz.target import Target

_FILES: Final = (wire, statements, answers, proofs, fabric, keys, lineages, heads, backend, faces)
TARGETS: Final[dict[str, Target]] = {target.name: target for file in _FILES for target in file.TARGETS}
