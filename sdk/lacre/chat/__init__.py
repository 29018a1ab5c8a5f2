"""OpenAI's chat format, as far as the SDK reads it: requests, replies, streams and their events.

Rules: parse once, into frozen values; an answer that breaks off raises with the text received so far.
Open `reply.py` first, then `stream_async.py` and `stream.py`. `choices.py` has what all are made of.
"""
