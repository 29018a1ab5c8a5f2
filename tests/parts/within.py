"""`python within.py TREE MODULE [ARGUMENT...]` runs a module as `python -m` does, if Lacre's packages are TREE's."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def main(tree: str, module: str, *arguments: str) -> None:
    for name in ("lacre", "lacre_fabric", "lacre_gateway", "lacre_backend"):
        spec = find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is None or not Path(origin).resolve().is_relative_to(Path(tree).resolve()):
            sys.exit(f"{name} is that of {origin}, not of {tree}")
    sys.argv = [module, *arguments]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
