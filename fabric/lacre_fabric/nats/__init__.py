"""The contract of `work` over NATS JetStream: connections, streams, subjects, accounts and roles.

Rules: each role has an account, an inbox and permissions of its own; no message ends a connection's read loop.
After a publish of unknown result the gateway never publishes again.
Open `gateway.py` and `worker.py` first. `roles.py` and `accounts.py` say who may do what, `client.py` reads the protocol.
"""
