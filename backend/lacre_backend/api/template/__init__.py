"""Chat templates: from messages to prompt tokens.

Rules: no text of a request ever becomes a control token; a template runs in a sandbox with bounds.
Open `prompt.py` first: it has the argument why this holds.
"""
