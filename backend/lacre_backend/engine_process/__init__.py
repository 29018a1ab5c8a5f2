"""An engine in a process of its own: a crash of native code ends that process, not the worker.

The two processes:
- The child (`child`) loads the model, and runs the same engine as ever: decode loop, sampling, masks and tokenizer.
- The worker's process keeps the API, sealing and NATS. It holds an `Engine` (`engine`) that passes tasks on, and never loads
  llama.cpp.
- Between them is one Unix socket pair, which no other process has. `codec` and `messages` say what crosses it, and do no I/O.
  A message of one step's tokens takes some microseconds, so no shared memory is needed.

Rules:
- Both ends check what they read: a message has a bounded length, known fields and nothing behind them. What the child sends is
  never executed. A child that breaks a rule is ended.
- A sealed model's key goes to the child over the socket, never by arguments or the environment. The child gets no credentials
  of the key management service: the worker's process unwraps the key, for models only and only while one loads.
- When the child ends, each of its streams ends with `EngineLost`, and it is started again: at once, then with growing delays.
  Until then `EngineLost` answers every call, and the worker is not ready for this model.
- A child ends with the worker: when the socket closes, or the thread that started it ends.
- A restarted child must have the same model file and the same limits, because clients were told their digest.

Open `engine.py` first, then `link.py` (one child, seen from the worker) and `child.py`.
"""
