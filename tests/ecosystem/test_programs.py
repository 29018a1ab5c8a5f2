"""Programs of `openai` 3 and 2, `langchain-openai` and `pydantic-ai`, with *only* the client argument changed."""

from __future__ import annotations

import pytest

from ecosystem.conftest import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OPENAI = pytest.mark.parametrize(("name", "sealed", "major"), [("openai3", "lacre", "3."), ("openai2", "legacy", "2.")])
FRAMEWORKS = pytest.mark.parametrize(("name", "sealed"), [("openai3", "lacre"), ("openai2", "legacy")])


@OPENAI
class TestOpenai:
    def test_one_answer_four_ways(self, run: Run, name: str, sealed: str, major: str) -> None:
        told = run(name, sealed, "with_openai.py", "chat", "stream", "helper", "asynchronous")
        assert told["openai"].startswith(major)
        text = told["chat"]["text"]
        assert text and told["chat"]["model"] == "smollm2-135m"
        assert told["stream"]["text"] == told["helper"]["text"] == told["asynchronous"]["text"] == text
        assert told["asynchronous"]["streamed"] == text
        assert told["stream"]["pieces"] > 3

    def test_tools(self, run: Run, name: str, sealed: str, major: str) -> None:
        told = run(name, sealed, "with_openai.py", "tools")["tools"]
        assert told["name"] == "get_weather"
        assert set(told["arguments"]) == {"city"} and told["then"]

    def test_a_json_schema(self, run: Run, name: str, sealed: str, major: str) -> None:
        answer = run(name, sealed, "with_openai.py", "schema")["schema"]["answer"]
        assert answer["mood"] in ("good", "bad") and isinstance(answer["points"], int) and len(answer) == 2

    def test_embeddings(self, run: Run, name: str, sealed: str, major: str) -> None:
        told = run(name, sealed, "with_openai.py", "embeddings")["embeddings"]
        assert told["length"] == 384
        assert told["near"] > told["far"] + 0.2

    def test_models_and_errors(self, run: Run, name: str, sealed: str, major: str) -> None:
        told = run(name, sealed, "with_openai.py", "models", "errors")
        assert "smollm2-135m" in told["models"]["models"]
        assert told["errors"] == {"code": "model_not_found", "status": 404}


@FRAMEWORKS
class TestLangchain:
    def test_invoke_and_astream(self, run: Run, name: str, sealed: str) -> None:
        told = run(name, sealed, "with_langchain.py", "invoke", "astream")
        assert told["invoke"]["text"] == told["astream"]["text"] != ""
        assert told["astream"]["pieces"] > 3 and 0 < told["invoke"]["tokens"] <= 12

    def test_tool_binding(self, run: Run, name: str, sealed: str) -> None:
        told = run(name, sealed, "with_langchain.py", "binding")["binding"]
        assert told["name"] == "add" and set(told["arguments"]) == {"a", "b"} and told["then"]

    def test_embeddings(self, run: Run, name: str, sealed: str) -> None:
        assert run(name, sealed, "with_langchain.py", "embeddings")["embeddings"] == {"length": 384, "many": 2}


class TestPydanticAi:
    def test_run_and_stream(self, run: Run) -> None:
        told = run("openai3", "lacre", "with_pydantic_ai.py", "run", "stream")
        assert told["run"]["text"] == told["stream"]["text"] != ""
        assert told["stream"]["pieces"] > 3 and 0 < told["run"]["tokens"] <= 12

    def test_structured_output(self, run: Run) -> None:
        assert run("openai3", "lacre", "with_pydantic_ai.py", "structured")["structured"]["mood"] in ("good", "bad")
