"""Extraction: turns a free text into an object of a fixed shape. The worker's grammar lets the model write nothing else.

echo "Ada Lovelace was born in London in 1815." | python examples/extract.py
"""

from __future__ import annotations

import json
import sys

from pydantic import BaseModel, Field

import lacre


class Person(BaseModel):
    name: str = Field(max_length=60)
    city: str = Field(max_length=60)
    born: int


def main() -> None:
    schema = Person.model_json_schema() | {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    with lacre.Client() as client:
        question = f"Who is this about?\n\n{sys.stdin.read()}"
        reply = client.chat(question, response_format=wanted, temperature=0, max_tokens=200)
    person = Person.model_validate_json(reply.text)
    print(json.dumps(person.model_dump(), ensure_ascii=False))


if __name__ == "__main__":
    main()
