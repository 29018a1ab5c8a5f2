"""An engine in a process of its own: a crash of native code ends that process, not the worker.

The child loads the model and runs the same engine as ever: decode loop, sampling, masks, tokenizer. The worker's process keeps
API, sealing and NATS, and an `Engine` that passes everything on. Between them is one socket, which no other process has.

Rules:
- A model's key crosses the socket alone, and the child has no credentials. Nothing it sends is executed, and each message is
  bounded. When it ends, its work ends with `EngineLost`, and it is started again. It ends with the worker.

Open `engine.py` first, then `link.py` (one child, seen from the worker) and `child.py`. `messages.py` says what crosses.
"""
