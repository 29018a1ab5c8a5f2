"""The clients that are tried, what was seen of each, and docs/clients.md: `python -m ecosystem.clients` writes it.

`test_clients.py` here and in tests/heavy/clients fill `clients.json`. A cell of the page says what a test saw, and with which
engine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

_HERE: Final = Path(__file__).resolve().parent
_HEAVY: Final = _HERE.parent / "heavy/clients"
DOCUMENT: Final = _HERE.parents[1] / "docs/clients.md"
_RECORD: Final = _HERE / "clients.json"

Feature = Literal["chat", "stream", "tools", "structured", "reasoning", "embeddings", "cancellation", "long"]
Engine = Literal["scripted", "model"]

_TALK: Final[tuple[Feature, ...]] = ("chat", "stream", "tools", "structured", "reasoning", "cancellation", "long")
_ALL: Final[tuple[Feature, ...]] = get_args(Feature)


@dataclass(frozen=True, slots=True)
class Client:
    """package: what its lock file pins. api: what it speaks. node: a folder with a package-lock.json and a `client.mjs`.
    heavy: its environment is for `make test-heavy`.
    """

    title: str
    program: str
    environment: str
    package: str
    api: str
    features: tuple[Feature, ...] = _ALL
    node: bool = False
    heavy: bool = False

    @property
    def room(self) -> Path:
        """Where its lock file and its program are."""
        room = _HEAVY if self.heavy else _HERE
        return room / self.environment if self.node else room

    @property
    def version(self) -> str:
        """As its environment's lock file pins it."""
        if self.node:
            lock = json.loads((self.room / "package-lock.json").read_text())
            return str(lock["packages"][f"node_modules/{self.package}"]["version"])
        found = re.search(
            rf"^{re.escape(self.package)}==(\S+)", (self.room / f"{self.environment}.lock").read_text(), re.MULTILINE
        )
        assert found, self.package
        return found[1]


LIGHT: Final = (
    Client("`openai`", "openai", "openai3", "openai", "chat"),
    Client("`openai` 2", "openai", "openai2", "openai", "chat"),
    Client("`openai` for Node", "openai_js", "node", "openai", "chat", node=True),
    Client("`anthropic`", "anthropic", "anthropic", "anthropic", "messages", _TALK),
    Client("`@anthropic-ai/sdk`", "anthropic_js", "anthropic_js", "@anthropic-ai/sdk", "messages", _TALK, node=True),
)
HEAVY: Final = (
    Client("`openai-agents`", "agents", "agents", "openai-agents", "responses", _TALK, heavy=True),
    Client("LangChain agents", "langchain", "langchain", "langchain", "chat", heavy=True),
    Client("LlamaIndex", "llamaindex", "llamaindex", "llama-index-llms-openai-like", "chat", heavy=True),
    Client("Pydantic AI", "pydanticai", "pydanticai", "pydantic-ai-slim", "chat", _TALK, heavy=True),
    Client("`instructor`", "instructor", "instructor", "instructor", "chat", _TALK, heavy=True),
    Client(
        "smolagents", "smolagents", "smolagents", "smolagents", "chat",
        ("chat", "stream", "tools", "cancellation", "long"), heavy=True,
    ),
    Client("Vercel `ai`", "vercel", "vercel", "ai", "chat", node=True, heavy=True),
)  # fmt: skip
# Its tests are test_codex.py. It always streams.
_OF_CODEX: Final[tuple[Feature, ...]] = ("chat", "stream", "tools", "reasoning", "cancellation", "long")
CODEX: Final = Client("Codex CLI", "codex", "codex", "@openai/codex", "responses", _OF_CODEX, node=True, heavy=True)
ALL: Final = (*LIGHT, *HEAVY, CODEX)

_HEAD: Final = """\
# Clients

*Written by `make clients` from what the tests saw, and compared with it by a test.*

```sh
lacre proxy  # prints the two variables that most programs read
export OPENAI_BASE_URL=http://127.0.0.1:11435/v1 OPENAI_API_KEY=...
export ANTHROPIC_BASE_URL=http://127.0.0.1:11435 ANTHROPIC_API_KEY=...  # the same key
```

Each program below ran unchanged through `lacre proxy`, in an environment of its own, with the version that its lock file pins.
Python programs can also use [the SDK](using.md) as their HTTP client, without a proxy.

| mark | what ran |
|---|---|
| ✓ | a scripted engine in a real worker, behind the real gateway and seal: it says what the test tells it to |
| ● | a real model: SmolLM2-135M for texts, all-MiniLM-L6-v2 for embeddings |
| ✗ | it does not work: the notes say why |
| – | not tried, or the program has no such feature |

The default model is too small to use tools well, so tools and agents ran with the scripted engine.

"""
COLUMNS: Final[Mapping[Feature, str]] = {
    "chat": "chat",
    "stream": "stream",
    "tools": "tools",
    "structured": "structured output",
    "reasoning": "reasoning",
    "embeddings": "embeddings",
    "cancellation": "cancellation",
    "long": "long answer",
}
MARKS: Final[Mapping[Engine, str]] = {"scripted": "✓", "model": "●"}
_TAIL: Final = """
- **Tools**: the model calls a tool, the program runs it, and the answer uses its result.
- **Structured output**: an answer that fits a schema, read into an object. The scripted engine shows that the request and the
  answer arrive. A real engine enforces [the schema](schemas.md).
- **Reasoning**: the program shows what the model thought, apart from its answer. LangChain does so if it uses the Responses API
  (`use_responses_api=True`).
- **Cancellation**: the program leaves in the middle of a stream and runs on, and the worker stops computing. Codex is
  ended by Ctrl-C. smolagents closes no stream that it leaves: the worker computes on until Python collects the stream as
  garbage.
- **Long answer**: an answer of more than 512 tokens. Programs of the Messages API must name a `max_tokens`; the
  others name none.

## Codex

The tests ask Codex to edit a file, and it does so. Its network is this machine's loopback alone. Neither the memory of the
gateway nor its disk holds a word of the edit. These are its settings, in `~/.codex/config.toml`, with the name
of the model that it uses.

```toml
{codex}```

By default Codex also offers a web search that OpenAI's servers run. A worker cannot search, so it refuses the request and names
the tool. `web_search = "disabled"` turns it off.

## LangChain

`OpenAIEmbeddings` sends the ids of OpenAI's tokens unless you pass `check_embedding_ctx_length=False`.
"""


def page() -> str:
    """The whole document."""
    head = ["client", "version", "API", *COLUMNS.values()]
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *map(_row, ALL))]
    settings = (CODEX.room / "config.toml").read_text().partition("\n")[2].replace('"scripted"', '"MODEL"', 1)
    return _HEAD + "\n".join(rows) + "\n" + _TAIL.format(codex=settings)


def _row(client: Client) -> Iterator[str]:
    yield client.title
    yield client.version
    yield client.api
    for feature in COLUMNS:
        yield _cell(client, feature)


def _cell(client: Client, feature: Feature) -> str:
    """A mark for each engine that it works with, and the cross if it fails with one."""
    seen = {engine: recorded(client, engine).get(feature) for engine in MARKS}
    marks = [mark for engine, mark in MARKS.items() if seen[engine]]
    return " ".join([*marks, *(["✗"] if False in seen.values() else [])]) or "–"


def _read() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(_RECORD.read_text())
    return read


def recorded(client: Client, engine: Engine) -> dict[Feature, bool]:
    found: dict[Feature, bool] = _read().get(_key(client), {}).get(engine, {})
    return found


def settle(client: Client, engine: Engine, seen: Mapping[Feature, bool], told: object) -> None:
    """Records what was seen, with `LACRE_RECORD=1`. Otherwise it must be what was recorded. told: by the program."""
    if "LACRE_RECORD" in os.environ:
        _keep(client, engine, seen)
    known = recorded(client, engine)
    assert {feature: known.get(feature) for feature in seen} == seen, told


def _keep(client: Client, engine: Engine, seen: Mapping[Feature, bool]) -> None:
    whole = _read()
    whole.setdefault(_key(client), {}).setdefault(engine, {}).update(seen)
    _RECORD.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def _key(client: Client) -> str:
    return f"{client.environment}/{client.program}"


if __name__ == "__main__":
    DOCUMENT.write_text(page())
