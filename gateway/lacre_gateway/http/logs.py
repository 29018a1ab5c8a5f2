"""The gateway's additions to `lacre_fabric.logs`: the treatment of uvicorn's records."""

from __future__ import annotations

import logging
from typing import Any

from lacre_fabric.logs import SafeFormatter


def standard_logging(stream: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: every library's records, by the rules above. stream: such as ext://sys.stderr."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"safe": {"()": SafeFormatter}},
        "handlers": {"stream": {"class": "logging.StreamHandler", "formatter": "safe", "stream": stream}},
        "root": {"level": "WARNING", "handlers": ["stream"]},
        # Above every level: Python's last resort would write the records of a logger without handlers.
        "loggers": {"uvicorn.access": {"level": logging.CRITICAL + 1, "handlers": [], "propagate": False}},
    }
