"""Writes docs/errors.md from the errors themselves: every type, whose fault it is, and what to do. A test compares them.

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

Every error that Lacre raises is a `lacre.LacreError`. The branches say whose fault it was, and each type says what to do next:

```python
import lacre

try:
    with lacre.Client() as client:
        print(client.chat("Name three seas.").text)
except lacre.LacreError as error:
    print(f"{type(error).__name__}: {error}")
    print(error.remedy)  # what to do next
    print(error.request_id)  # by which the operator finds the request; None where no gateway answered
    print(error.verification)  # what had been checked by then, and with what; None where nothing had begun
```

`RefusedError` and what is below it have `status`, `problem`, `retry_after` and `details` (which limit, how much, which
names would do: [wire.md](wire.md#13-errors) lists them). `NetworkError`
has `cause`: `refused`, `name`, `certificate`, `proxy` and so on.
`ApiError` has `status`, `code` and `type`;
`StreamBroken` has the `text` and the number of `tokens` that came. `TimedOut` and `Unreachable` are httpx2's exceptions too, so
that programs which know those handle them. No message holds a key, a token, a prompt or an answer.

An indented type is a kind of the one above it.

| type | what happened | what to do |
|---|---|---|
"""

_REFUSALS: Final = """
## Refusals by the gateway

What a gateway says before the seal is signed by nobody: it changes what is tried next, never what is trusted. An error of this
kind says in `problem` which of these it is. With a client of OpenAI's the last part of the type is `error.code`.

| `problem` | status | raised as | what to do |
|---|---|---|---|
"""


def rows(kind: type[errors.LacreError], known: frozenset[type[errors.LacreError]], depth: int = 0) -> Iterator[str]:
    """The type's row, and those of its kinds, in the order of their definition."""
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
