"""The wire format, for both roles: HPKE, Binary HTTP and Oblivious HTTP as bytes in and values out (docs/wire.md).

Rules: no I/O and no clock; imports `cryptography` and `lacre.errors` alone; every length is checked before its buffer exists.
Only `opening` handles private keys. The gateway imports `header` and `padding`, and nothing that opens a message.
Open `ohttp.py` first: it seals a request and opens its answer. `opening.py` is the other side.
"""
