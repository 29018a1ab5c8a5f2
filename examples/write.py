"""Free generation: continues a story several times, at any temperature. One seed gives the same texts each time.

python examples/write.py "Once upon a time, on an island," --count 3
"""

from __future__ import annotations

import argparse

import lacre


def main() -> None:
    arguments = argparse.ArgumentParser(description="Write on.")
    arguments.add_argument("beginning")
    arguments.add_argument("--count", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=60)
    arguments.add_argument("--temperature", type=float, default=0.9)
    arguments.add_argument("--seed", type=int, default=7)
    given = arguments.parse_args()
    with lacre.OpenAI() as client:
        written = client.completions.create(
            model="smollm2-135m",
            prompt=given.beginning,
            n=given.count,
            max_tokens=given.tokens,
            temperature=given.temperature,
            seed=given.seed,
        )
    for choice in written.choices:
        print(f"{choice.index + 1}. {given.beginning}{choice.text}\n")


if __name__ == "__main__":
    main()
