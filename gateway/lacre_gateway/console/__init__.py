"""The operators' console: pages at the admin listener, made by the server. Open `site.py` first.

Rules:
- It shows what the admin API answers and does what that does: by the same functions, decisions and audit entries.
- It holds no content. What it shows comes from the manifest, the fabric, the rules, the budgets and the audit log.
- A gateway without `[console]` in its settings imports nothing of it.
"""
