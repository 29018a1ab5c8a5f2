"""llama.cpp's own HTTP server on a port of 127.0.0.1: `python writer.py PORT GGUF KEY_FILE`. Requests need the key."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import xllamacpp

if __name__ == "__main__":
    params = xllamacpp.CommonParams()
    params.port = int(sys.argv[1])
    params.model.path = sys.argv[2]
    params.api_keys = [Path(sys.argv[3]).read_text().strip()]
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()
