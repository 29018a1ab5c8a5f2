"""Model files: which GGUF files a worker serves, and by which ids.

Open `gguf.py` first.
"""
