"""Figures of a gateway's metrics, as Prometheus gets them from its admin listener."""

from __future__ import annotations

import httpx2
from prometheus_client.parser import text_string_to_metric_families


async def receipt_checks(port: int) -> dict[str, int]:
    """How often receipts were checked in each way, and wrong MACs."""
    async with httpx2.AsyncClient(trust_env=False) as http:
        return receipt_checks_in((await http.get(f"http://127.0.0.1:{port}/metrics")).text)


def receipt_checks_in(text: str) -> dict[str, int]:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {each.labels["check"]: int(each.value) for each in samples if each.name == "lacre_receipt_checks_total"}
