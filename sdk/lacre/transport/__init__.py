"""The I/O of a call over httpx2: connections, tokens, proxies and TLS, and httpx2's errors in our words.

Rules: it never sees a prompt outside `exchange`; an exception of httpx2 is mapped in one place; no secret in a log or an error.
Open `sealed.py` first: httpx2 transports that run the steps of `exchange`. `dial.py` makes the connections, `oauth.py` and
`token_sources.py` get tokens, and `network_causes.py` says why a connection failed.
"""
