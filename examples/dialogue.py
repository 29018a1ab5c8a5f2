"""A dialogue: each request sends all turns so far, without the oldest ones once they grow too long.

python examples/dialogue.py
"""

from __future__ import annotations

import sys

import lacre

KEPT = 8000  # characters of past turns that are sent along


def main(max_tokens: int) -> None:
    system = {"role": "system", "content": "You are a friendly and brief companion."}
    turns: list[dict[str, str]] = []
    with lacre.Client() as client:
        for line in filter(None, map(str.strip, sys.stdin)):
            turns.append({"role": "user", "content": line})
            while sum(len(turn["content"]) for turn in turns) > KEPT and len(turns) > 1:
                del turns[:2]
            stream = client.chat_stream([system, *turns], max_tokens=max_tokens)
            for piece in stream:
                print(piece, end="", flush=True)
            reply = stream.reply()
            print(f"\n({reply.usage.prompt} tokens read, {reply.usage.cached} of them from the cache)")
            turns.append({"role": "assistant", "content": reply.text})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
