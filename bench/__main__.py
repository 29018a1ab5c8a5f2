"""`make bench`: every benchmark in turn."""

from bench import command, engine, gateway, imports, seal

command.run(__doc__, {"imports": imports.measure, "seal": seal.measure, "engine": engine.measure, "gateway": gateway.measure})
