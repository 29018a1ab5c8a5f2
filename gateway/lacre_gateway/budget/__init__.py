"""Budgets: what callers may use, enforced on leases that gateways draw from a shared store and spend by themselves.

`windows`, `record` and `lease` are the algorithm, without I/O and without a clock. `ledger` runs it over a bucket.
"""
