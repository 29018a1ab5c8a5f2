"""YAML as Kubernetes' strict readers take it: a name that is written twice in one mapping is an error, not an override."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        assert twice == [], f"written twice in one mapping, {node.start_mark}: {twice}"
        return super().construct_mapping(node, deep)


def load_all(text: str) -> list[Any]:
    """The documents that are not empty."""
    return [each for each in yaml.load_all(text, _Loader) if each]
