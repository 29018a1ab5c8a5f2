"""The gateway: decides who may do what and how much, and records it. It forwards ciphertext and holds no key to open it."""
