"""The I/O of a call over httpx2: connections, tokens, proxies and TLS, and httpx2's errors in our words.

Rules: it never sees a prompt outside `exchange`; an exception of httpx2 is mapped in one place; no secret in a log or an error.
Open `sealed_async.py` first: an httpx2 transport that runs the steps of `exchange`. `dial.py` makes the connections, `oauth.py`
and `token_sources_async.py` get tokens, and `network_causes.py` says why a connection failed. `tools/unasync.py` writes each
`*_sync.py` from the `*_async.py` beside it.
"""
