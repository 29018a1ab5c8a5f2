"""Model files: which GGUF files a worker serves, and by which ids.

Rules: what a worker's settings demand of a model (sealed, signed) is checked before it is loaded.
Open `opening.py` first; `gguf.py` finds plain files, `signatures.py` verifies, `sealed.py` has the format of encrypted ones.
"""
