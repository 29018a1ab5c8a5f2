"""Secrets at rest: private key files, the pools' keys by generation, the root and the signer, and their KMS.

Rules: a file of a secret has mode 0600 and is replaced at once; no secret in an error or a log.
Open `pool_keys.py` first. `generations.py` says which key is used when, and `kms/` wraps keys by a service.
"""
