"""Other HTTP servers on the worker's host, in place of the engine: vLLM, llama-server, TF Serving, TorchServe.

Rules: only the paths in the settings pass; identity and connection headers never do; answers are bounded.
Open `app.py` first. `settings.py` is its table in the worker's file. `origins.py` chooses among several servers, `origin.py`
asks one of them, and `probe.py` checks whether they can work.
"""
