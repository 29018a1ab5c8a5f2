"""`make bench`: every benchmark in turn."""

from bench import command, default_model, engine, flood, gateway, imports, planning, scale, seal, sealed

BENCHMARKS = {
    "imports": imports,
    "seal": seal,
    "planning": planning,
    "default_model": default_model,
    "engine": engine,
    "sealed": sealed,
    "gateway": gateway,
    "flood": flood,
    "scale": scale,
}

command.run(__doc__, {name: benchmark.measure for name, benchmark in BENCHMARKS.items()})
