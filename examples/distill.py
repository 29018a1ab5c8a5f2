"""Distillation: trains a small model on the answers of a served one. The prompts and answers travel sealed.

python examples/distill.py ask prompts.txt --out answers.jsonl
python examples/distill.py train answers.jsonl --tokenizer TEACHER --out STUDENT

`ask` needs Lacre. `train` needs PyTorch and transformers in place of it: the environment of `lacre model convert` has both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TOGETHER = 4  # questions that the teacher answers at a time
BATCH = 4  # conversations in one step of the training
HELD_OUT = 8  # every eighth answer is never trained on: the loss is measured on these
RATE = 2e-3  # the learning rate at the beginning; it falls to 0
IGNORED = -100  # PyTorch's label for a token that does not count: the student learns answers, not prompts
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model")


async def ask(prompts: Sequence[str], out: Path, max_tokens: int) -> None:
    """Writes a line for each prompt, with the teacher's likeliest answer."""
    import lacre  # noqa: PLC0415 - there is none where PyTorch is

    room = asyncio.Semaphore(TOGETHER)

    async def asked(client: lacre.AsyncClient, prompt: str) -> dict[str, Any]:
        async with room:
            reply = await client.chat(prompt, temperature=0, max_tokens=max_tokens)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply.text}]
        return {"model": reply.model, "messages": turns}

    async with lacre.AsyncClient() as client:
        found = await asyncio.gather(*(asked(client, prompt) for prompt in prompts))
    # The file has the prompts in the clear: for its owner alone.
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in found)
    print(f"{len(found)} answers of {found[0]['model']} in {out}")


class Lessons:
    """The conversations as token ids, with a label for each token of an answer."""

    def __init__(self, file: Path, tokenizer: Any, longest: int) -> None:
        conversations = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
        self.padding = tokenizer.eos_token_id
        lessons = [self._lesson(tokenizer, turns, longest) for turns in conversations]
        self.held_out, self.trained = lessons[::HELD_OUT], [each for i, each in enumerate(lessons) if i % HELD_OUT]

    @staticmethod
    def _lesson(tokenizer: Any, turns: list[dict[str, str]], longest: int) -> tuple[list[int], list[int]]:
        asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
        ids = ids[:longest]
        return ids, [IGNORED] * min(len(before), len(ids)) + ids[len(before) :]

    def batches(self, lessons: Sequence[tuple[list[int], list[int]]]) -> Iterator[dict[str, Any]]:
        import torch  # noqa: PLC0415

        for at in range(0, len(lessons), BATCH):
            batch = lessons[at : at + BATCH]
            width = max(len(ids) for ids, _ in batch)
            rows = [(width - len(ids), ids, labels) for ids, labels in batch]
            yield {
                "input_ids": torch.tensor([ids + [self.padding] * n for n, ids, _ in rows]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for n, ids, _ in rows]),
                "labels": torch.tensor([labels + [IGNORED] * n for n, _, labels in rows]),
            }


def loss_of(model: Any, lessons: Lessons) -> float:
    """Nats a token, on the answers that were held out."""
    import torch  # noqa: PLC0415

    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in lessons.batches(lessons.held_out):
            n = int((batch["labels"][:, 1:] != IGNORED).sum())
            total, count = total + float(model(**batch).loss) * n, count + n
    model.train()
    return total / max(count, 1)


def student(tokenizer: Any, width: int, layers: int, longest: int) -> Any:
    """A Llama with random weights, and the teacher's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1), num_key_value_heads=max(width // 128, 1), max_position_embeddings=longest,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def train(arguments: argparse.Namespace) -> None:
    import torch  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    torch.manual_seed(arguments.seed)
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, local_files_only=True)
    lessons = Lessons(arguments.answers, tokenizer, arguments.longest)
    model = student(tokenizer, arguments.width, arguments.layers, arguments.longest)
    before = loss_of(model, lessons)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / arguments.steps)
    for step, batch in zip(range(arguments.steps), endless(lessons, arguments.seed), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.2f} nats a token", flush=True)
    after = loss_of(model, lessons)
    model.half().save_pretrained(arguments.out)
    for name in TOKENIZER:
        if (arguments.tokenizer / name).exists():
            shutil.copy(arguments.tokenizer / name, arguments.out)
    told = {"trained_on": len(lessons.trained), "held_out": len(lessons.held_out), "parameters": model.num_parameters()}
    print(json.dumps(told | {"before": before, "after": after, "seconds": round(time.monotonic() - begin)}))


def endless(lessons: Lessons, seed: int) -> Iterator[dict[str, Any]]:
    """Every lesson once, in another order each time."""
    chance = random.Random(seed)  # noqa: S311 - an order, no secret
    while True:
        yield from lessons.batches(chance.sample(lessons.trained, len(lessons.trained)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("ask", help="ask the served model, through Lacre")
    asking.add_argument("prompts", type=Path, help="a text with a prompt on each line")
    asking.add_argument("--out", type=Path, required=True)
    asking.add_argument("--max-tokens", type=int, default=64)
    training = commands.add_parser("train", help="train a student on the answers")
    training.add_argument("answers", type=Path)
    training.add_argument("--tokenizer", type=Path, required=True, help="the teacher's checkpoint of Hugging Face")
    training.add_argument("--out", type=Path, required=True)
    for name, default in (("width", 256), ("layers", 4), ("steps", 400), ("longest", 256), ("seed", 0)):
        training.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.command == "train":
        train(arguments)
        return
    prompts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    asyncio.run(ask(prompts, arguments.out, arguments.max_tokens))


if __name__ == "__main__":
    main()
