"""`make bench`: every benchmark in turn."""

from bench import command, engine, imports, seal

command.run(__doc__, {"imports": imports.measure, "seal": seal.measure, "engine": engine.measure})
