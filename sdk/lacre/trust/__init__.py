"""Which keys a client believes: from the pinned root, over its statements, to the signed manifest.

Rules: decide from bytes and a given clock, and fetch nothing; fail closed; never go back to an older manifest.
Open `chain.py` first: it reads the connection string and verifies the chain. `manifest.py` is what a chain leads to,
`rollback.py` compares it with the newest one seen, and `manifest_store.py` remembers that one.
"""
