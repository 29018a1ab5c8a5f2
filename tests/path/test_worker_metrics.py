"""What workers do reaches Prometheus by their presence alone: through a real message server, from a worker without a port."""

from __future__ import annotations

from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from lacre_backend.api.app import create_app
from lacre_fabric.operate.nats_server import free_port
from parts.echo_engine import EchoEngine
from parts.stage.live import TINY, LiveStage
from parts.stage.settings import own_issuer
from parts.waiting import until

FIRST = "gen_ai_server_time_to_first_token_seconds_count"


async def shown(port: int) -> dict[str, float]:
    """By name, of the one model that there is."""
    async with httpx2.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    of_model = [each for each in samples if TINY in (each.labels.get("model_name"), each.labels.get("gen_ai_request_model"))]
    assert all((each.labels["pool"], each.labels["region"]) == ("default", "lacre") for each in of_model)
    return {each.name: each.value for each in of_model}


async def test_a_gateway_shows_what_a_worker_does(tmp_path: Path) -> None:
    """While it answers, and after."""
    port = free_port()
    app = create_app([EchoEngine(name=TINY, delay=0.1)])
    async with LiveStage.on_air(tmp_path, app, gateways=0) as live:
        live.gateway(own_issuer(live.site) + f"[admin]\nport = {port}\n")
        await live.start_gateways()
        assert (await shown(port))["vllm:num_requests_waiting"] == 0
        async with live.client(live.token("alice")) as client:
            messages = [{"role": "user", "content": "a" * 40}]
            request = {"model": TINY, "messages": messages, "stream": True, "max_tokens": 40}
            async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
                assert answer.status_code == 200

                async def seen() -> bool:
                    now = await shown(port)
                    return now.get("vllm:num_requests_running") == 1 and 0 < now["vllm:generation_tokens_total"] < 40

                await until(seen)
                lines = [line async for line in answer.aiter_lines()]
            assert "data: [DONE]" in lines
        await until(lambda: live.entries("outcome"))
        [exchange] = live.entries("outcome")

        async def settled() -> bool:
            now = await shown(port)
            done = now["vllm:num_requests_running"] == 0 and now[FIRST] == 1
            return done and now["vllm:generation_tokens_total"] == exchange["completion_tokens"]

        await until(settled)
        now = await shown(port)
        assert now["vllm:prompt_tokens_total"] == now["vllm:prefix_cache_queries_total"] == exchange["prompt_tokens"] > 40
        assert now["vllm:prefix_cache_hits_total"] == exchange["cached_tokens"]
