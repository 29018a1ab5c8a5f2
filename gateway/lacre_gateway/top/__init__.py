"""`lacre top`: what a gateway does now, in a terminal. It asks the admin API alone, and draws what that answers.

Open `commands.py` first. `screen.py` draws, and does no I/O.
"""
