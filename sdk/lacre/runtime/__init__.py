"""What any process or library call needs below the protocol: supervised tasks, forks, folders, listeners, arguments.

Rules: only `tasks` starts background work; a forked child uses nothing of its parent; a listener bounds unknown senders.
Open `tasks.py` first. `listening.py` and `http1.py` are the bounded HTTP/1.1 listener of the gateway and of `lacre proxy`.
"""
