"""The record of who was allowed what: a Merkle log in the C2SP tlog-tiles layout, with signed checkpoints (docs/audit.md).

Rules: an entry holds only allow-listed fields; an entry is durable before its answer leaves; one thread writes.
Open `log.py` first: the gateway calls it. `entries.py` defines an entry. `tiles.py`, `edge.py`, `journal.py` and `store.py` are
the log on disk. `reader.py`, `check.py` and `index.py` read it, also while it grows.
"""
