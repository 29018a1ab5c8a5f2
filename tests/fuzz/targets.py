"""Every target, by name."""

from typing import Final

from fuzz import answers, statements, wire
from fuzz.target import Target

TARGETS: Final[dict[str, Target]] = {target.name: target for target in (*wire.TARGETS, *statements.TARGETS, *answers.TARGETS)}
