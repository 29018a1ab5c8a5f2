"""`make bench`: every benchmark in turn."""

from bench import imports

imports.main()
