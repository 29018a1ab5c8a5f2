"""Budgets: how much callers may use. Gateways draw leases from a shared store and spend them without asking it.

Rules: windows, leases and records do no I/O and read no clock; a ceiling holds however many gateways race.
Open `ledger.py` first: it runs leases over a bucket. `plans.py` reads the limits, `settlement.py` settles by receipts, and
`in_flight.py` protects this process itself.
"""
