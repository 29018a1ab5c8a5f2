"""Proofs about an answer: receipts, audit proofs, and the document that lists every check.

Rules: a check takes bytes and keys and raises a `VerificationError`; it never repairs or guesses a proof.
Open `verification.py` first: it lists all checks. `receipts.py` and `audit_proof.py` make two of those checks, and `recount.py`
lets a caller count the tokens again.
"""
