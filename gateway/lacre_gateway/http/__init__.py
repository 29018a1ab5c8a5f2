"""HTTP, without the requests' meaning: sockets, uvicorn, one request with its answer, outer headers, refusals, the access log.

Rules: heads and bodies are bounded before the sender is known; an answer is never buffered; a refusal is a problem document.
Open `exchange.py` first: one sealed request. `connection.py` brings it its bytes, `answer_writer.py` makes those of its answer,
and `clock.py` ends what lasts too long. `headers.py` reads the outer headers, and `refusal.py` is sent instead of an answer.
"""
