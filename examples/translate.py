"""Translates each line of a text into another language, as you type or from a pipe.

echo "Good morning." | python examples/translate.py German
"""

from __future__ import annotations

import sys

import lacre


def main(language: str) -> None:
    rule = f"You are a translator. Answer with the {language} translation of the user's text alone."
    with lacre.Client() as client:
        for line in filter(None, map(str.strip, sys.stdin)):
            turns = [{"role": "system", "content": rule}, {"role": "user", "content": line}]
            for piece in client.chat_stream(turns, max_tokens=2 * len(line), temperature=0):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "French")
