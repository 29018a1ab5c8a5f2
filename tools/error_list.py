"""Writes docs/errors.md from the code: every error type, its meaning and its remedy. A test compares them.

python tools/error_list.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lacre import errors, problems

DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "errors.md"

_HEAD: Final = """\
# Errors

*Written by `make errors` from the code, and compared with it by a test.*

```python
import lacre

try:
    with lacre.Client() as client:
        print(client.chat("Name three seas.").text)
except lacre.LacreError as error:
    print(f"{type(error).__name__}: {error}")
    print(error.remedy)  # what to do next
    print(error.request_id)  # for the operator, who finds the request by it; None if no gateway answered
    print(error.verification)  # what was checked, and with which keys; None if nothing had begun
```

Every error that Lacre raises is a `lacre.LacreError`. Its branches say whose fault it was, and each type has a remedy. No
message contains a key, a token, a prompt or an answer.

| type | further attributes |
|---|---|
| `RefusedError` and the types below it | `status`, `problem`, `retry_after`, `details` ([wire.md](wire.md#13-errors)) |
| `NetworkError` | `cause`: `refused`, `name`, `certificate`, `proxy` and so on |
| `ApiError` | `status`, `code`, `type` |
| `StreamBroken` | the `text` and the number of `tokens` that arrived |
| `TimedOut`, `Unreachable` | they are httpx2's exceptions too, so programs that handle those need no change |

## Types

An indented type is a kind of the one above it.

| type | what happened | what to do |
|---|---|---|
"""

_REFUSALS: Final = """
## Refusals by the gateway

No signature covers a refusal that comes before the seal. It may change what a client tries next, never what it trusts. The
error's `problem` is one of these types. OpenAI's clients show its last part as `error.code`.

| `problem` | status | raised as | what to do |
|---|---|---|---|
"""


def rows(kind: type[errors.LacreError], known: frozenset[type[errors.LacreError]], depth: int = 0) -> Iterator[str]:
    """The row of a type, then those of its subtypes, in the order of their definition."""
    said = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    yield f"| {'&emsp;' * depth}`{kind.__name__}` | {said} | {kind.remedy} |"
    for below in kind.__subclasses__():
        if below in known:
            yield from rows(below, known, depth + 1)


def known() -> frozenset[type[errors.LacreError]]:
    """Every type that the SDK defines."""
    found = (each for each in vars(errors).values() if inspect.isclass(each))
    return frozenset(each for each in found if issubclass(each, errors.LacreError))


def document() -> str:
    table = "\n".join(rows(errors.LacreError, known()))
    refusals = "\n".join(
        f"| `{problem.type}` | {problem.status} | `{getattr(problem.error, '__name__', '')}` | {problem.remedy} |"
        for problem in problems.BY_TYPE.values()
    )
    return f"{_HEAD}{table}\n{_REFUSALS}{refusals}\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
