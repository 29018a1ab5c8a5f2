"""The chat page of `lacre proxy --open`: its door, its routes, its chats, and what the browser loads.

Rules: the door is checked before a body is read, and no text of a chat is logged. Chats are in memory, and on
disk only encrypted. The browser builds elements from an allow-list and never parses HTML.
Open `app.py` first, then `door.py`. `history.py` encrypts chats, `markdown.py` reads answers, `static/` has modules and styles.
"""
