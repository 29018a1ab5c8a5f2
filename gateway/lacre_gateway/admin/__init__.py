"""The admin API on a listener of its own: health, metrics, reports, revocations and rules.

Rules: policy decides each call and the audit log records it; nothing here shows content.
Open `api.py` first. `gauges.py` counts for metrics, and `reports.py` answers questions about budgets.
"""
