"""What any process or library call needs below the protocol: supervised tasks, forks, folders, listeners, arguments.

Rules: background work starts in `tasks` alone; after a fork nothing of the parent is used; a listener bounds unknown senders.
Open `tasks.py` first. `listening.py` and `http1.py` are the bounded HTTP/1.1 listener of the gateway and of `lacre proxy`.
"""
