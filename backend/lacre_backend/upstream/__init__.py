"""Another HTTP service on the worker's host, in place of the engine: vLLM, llama-server, TF Serving, TorchServe.

Rules: only the paths in the settings pass; identity and connection headers never do; answers are bounded.
Open `app.py` first. `settings.py` is its table in the worker's file, and `probe.py` asks whether it can work.
"""
