"""The link between gateways and workers: its contract, NATS, keys, and the operator's commands."""
