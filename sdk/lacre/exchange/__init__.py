"""One call as a state machine without I/O: choose a key, seal, open the answer, try again, resume.

Rules: no sockets and no sleeping; a step says what to send or how long to wait, and `transport` does it. A request is sealed
afresh for every attempt. A request that may have run is resumed; it is repeated only if that does no harm.
Open `call.py` first. `steps.py` defines the steps, `retry.py` decides about attempts, and `resume.py` continues a stream.
"""
