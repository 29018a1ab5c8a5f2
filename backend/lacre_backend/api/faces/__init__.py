"""One generation, asked for and answered in the words of several APIs: a face for each.

A face translates a request in and an answer out. Nothing of a face reaches the engine. Open `face.py` first.
"""
