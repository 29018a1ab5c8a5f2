"""The node: pulls work, verifies the grant, opens the request, calls an ASGI app and seals its answer.

Rules: a claim stands before the app is called; what the request says inside never differs from its grant.
Open `node.py` first. `grant_check.py` compares, `claims.py` and `readiness.py` say whether the worker may take work.
"""
