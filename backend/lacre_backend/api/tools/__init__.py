"""Tools: what a request may ask for, and how a model's calls are read and written.

Rules: arguments are enforced by a grammar where the tool is strict; unknown members are refused by name.
Open `request.py` first, then `format.py`.
"""
