"""What gateways and workers say to each other: subjects, frames, grants, receipts, and the NATS that carries them."""
