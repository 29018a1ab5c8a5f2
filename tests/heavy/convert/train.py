"""Trains LoRA adapters with peft: python train.py CHECKPOINT FOLDER TEXT [FOLDER TEXT ...]. Each answers with its text.

A few steps on one question, so that the model says it by heart. Run it in the converter's environment.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 12
RATE = 4e-3
QUESTION = "What is your name?"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def train(checkpoint: str, folder: str, text: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # its threads would wait for each other on a busy machine
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(whole, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    asked = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(f"{asked}{text}<|im_end|>", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


if __name__ == "__main__":
    for folder, text in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        train(sys.argv[1], folder, text)
