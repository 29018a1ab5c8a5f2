"""Many sequences in one llama.cpp context: scheduling, decoding, sampling, embedding, sizing.

Rules: no HTTP and no JSON in here; the scheduler has no I/O and no clock; llama.cpp runs on one thread.
Cells are dropped at release and overwritten when the engine is idle.
Open `protocol.py` first, then `scheduler.py` and `generate.py`, which runs it. `tokenizer.py` works in a process of its own.
"""
