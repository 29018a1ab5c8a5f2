"""Who is asking: tokens of OIDC issuers, their keys, claims, DPoP, revocations, and throttling of unknown callers.

Rules: the settings pin algorithms for each issuer; every unverified token gets the same 401; keys are fetched over https and
bounded.
Open `tokens.py` first. `claims.py` reads a verified token, and `jwks_remote.py` keeps an issuer's keys.
"""
