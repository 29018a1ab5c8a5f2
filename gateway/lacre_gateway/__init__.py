"""The gateway: who may do what, how much, and the record of it. It forwards ciphertext and holds no key that opens any."""
