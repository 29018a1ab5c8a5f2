"""Metrics for Prometheus and traces for OpenTelemetry.

Rules: labels come from fixed sets or from settings, never from a caller; no content and no identity in a trace.
Open `metrics.py` first.
"""
