"""Signed JSON: JWS by Ed25519, the claims inside, and DPoP proofs (RFC 7515, RFC 9449).

Rules: one algorithm and one type for each kind of statement; unknown members are ignored and missing ones refused,
and so is a newer version of a format (`formats.py`).
Open `jws.py` first. `claims.py` reads the typed members of a payload, and `dpop.py` proves that a client holds its key.
"""
