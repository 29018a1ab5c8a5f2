"""The wire format, for both roles: HPKE, Binary HTTP and Oblivious HTTP as bytes in and values out (docs/wire.md).

Rules: no I/O and no clock; import only `cryptography` and `lacre.errors`; check every length before its buffer exists. Only
`opening` handles private keys. The gateway imports only files that cannot open a message, such as `header`.
Open `ohttp.py` first: it seals a request and opens its answer. `opening.py` is the other side.
"""
