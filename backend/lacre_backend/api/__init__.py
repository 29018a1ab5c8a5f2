"""OpenAI's API as an ASGI app over an engine: chat, completions, embeddings, explanations, models.

Rules: it parses a request once and never touches llama.cpp; errors name a field, never its value.
Open `app.py` first, then `endpoint.py`. `faces/` has each API's words, `prompts.py` renders, `run.py` generates, `streaming.py`
answers.
"""
