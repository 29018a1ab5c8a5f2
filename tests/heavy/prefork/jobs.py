"""What a Celery worker loads before it forks. As a program: python jobs.py CALLS puts so many in, and prints what came of them.

JOBS_FOLDER: where kombu's file system broker keeps messages, and the results are kept.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import celery
import service

FOLDER = Path(os.environ["JOBS_FOLDER"])
for name in ("messages", "control", "results"):
    (FOLDER / name).mkdir(parents=True, exist_ok=True)

app = celery.Celery("jobs", broker="filesystem://", backend=f"file://{FOLDER}/results")
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(FOLDER / "messages"),
        "data_folder_out": str(FOLDER / "messages"),
        "control_folder": str(FOLDER / "control"),
    },
    broker_connection_retry_on_startup=True,
    worker_enable_remote_control=False,
)


@app.task(name="call")
def call(number: int) -> list[str]:
    """One call: the process that made it, and what came of it."""
    return [str(os.getpid()), service.answer(number)]


if __name__ == "__main__":
    jobs = [call.delay(number) for number in range(int(sys.argv[1]))]
    print(json.dumps([job.get(timeout=300, interval=0.1) for job in jobs]))
