"""What `lacre model` does to model files: reads, converts, quantizes, compares. Nothing here serves a request.

Rules: native work runs in a child process (`child.py`), because some files make llama.cpp abort. A command writes
a draft beside its output, tries it, then renames it (`draft.py`). A figure in an answer was measured in that run.
Open `child.py` first, then `inspection.py`, the smallest job.
"""
