"""What servers do for each request, by C libraries that the SDK does not need: JSON by orjson, Ed25519 by libsodium.

Open `ed25519.py` first. The SDK's functions take these as arguments and default to the standard library.
"""
