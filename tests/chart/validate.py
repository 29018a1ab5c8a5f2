"""Run by the interpreter of the environment `chart`: validates objects against the schemas of Kubernetes, and of others' kinds.

    validate.py VERSION... < OBJECTS

OBJECTS is a JSON list. Others' kinds are in schemas/GROUP_KIND.json: the fields that the chart uses, in their own API's terms.
What is wrong goes to stdout, a line each; the last line says how many objects were looked at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

SCHEMAS = Path(__file__).resolve().parent / "schemas"


def wrong(each: dict[str, Any], version: str) -> str | None:
    group = each["apiVersion"].replace("/", "_")
    own = SCHEMAS / f"{group}_{each['kind']}.json"
    try:
        if own.exists():
            jsonschema.validate(each, json.loads(own.read_text()))
        else:
            kubernetes_validate.validate(each, version, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as exc:
        return f"{'.'.join(map(str, exc.path))}: {exc.message}"
    except kubernetes_validate.SchemaNotFoundError:
        return "no schema"
    return None


objects = json.load(sys.stdin)
for version in sys.argv[1:]:
    for each in objects:
        if (reason := wrong(each, version)) is not None:
            print(f"{version} {each['kind']} {each['metadata']['name']}: {reason}")
print(f"looked at {len(objects)} for {len(sys.argv) - 1} versions")
