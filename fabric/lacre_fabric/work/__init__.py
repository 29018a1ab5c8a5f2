"""The contract between gateway and worker, without a transport: work, frames, grants, credit, presence.

Rules: no I/O; what a worker sends is bounded where it is parsed; a gateway binds to the first attempt that sends data.
Open `contract.py` first. `gateway_stream.py` and `worker_stream.py` are the two ends of one answer.
"""
