"""OpenAI's API as an ASGI app over an engine: chat, completions, embeddings, explanations, models.

Rules: it parses a request once and never touches llama.cpp; errors name a field, never its value.
Open `app.py` first. `requests.py` parses, `prompts.py` renders, `run.py` generates, `responses.py` and `streaming.py` answer.
"""
