"""The path of one sealed request: authenticate, decide, reserve, record, send to a worker, forward, settle.

Rules: the gateway never opens a message; the intent is durable before the first byte of an answer leaves.
Open `relay.py` first: it reads like the list above. `trail.py` writes the audit entries, `failures.py` maps errors to refusals,
and `pools.py` serves the manifest.
"""
