"""Fuzzing: what a peer may send, against what every parser promises. `make fuzz` searches, `make test` replays the corpus."""
