"""Which keys a client believes: from the pinned root, over its statements, to the signed manifest.

Rules: decide from bytes and a given clock, fetch nothing, fail closed, and never accept an older manifest.
Open `chain.py` first: it reads the connection string and verifies the chain of statements. The chain leads to the manifest in
`manifest.py`. `rollback.py` compares it with the newest one seen, and `manifest_store.py` keeps that one.
"""
