"""Who may do what: Cedar rules and their cases, read as one set (docs/policies.md).

Rules: deny by default; a set is read whole, tested against its cases, and swapped at once; the last good one stays.
Open `question.py` first: a request as rules see it. `cedar.py` decides, and `rules.py` with `cases.py` reads a folder.
`live.py` holds the active set. `trial.py`, `explain.py` and `replay.py` serve the commands.
"""
