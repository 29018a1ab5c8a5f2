"""JSON schemas as grammars.

Rules: a schema is enforced whole or refused by name; size and depth are bounded before anything is expanded.
Open `grammar.py` first. `terms.py` has the words in which the others take a schema apart.
"""
