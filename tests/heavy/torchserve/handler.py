"""TorchServe's handler for all-MiniLM-L6-v2: `{"texts": [...]}` becomes a list of vectors of length 1.

TorchServe loads it out of the model's archive, in a process that has its own packages.
"""

from __future__ import annotations

import torch
from transformers import AutoModel, AutoTokenizer
from ts.torch_handler.base_handler import BaseHandler


class Encoder(BaseHandler):  # type: ignore[misc]
    def initialize(self, context):  # type: ignore[no-untyped-def]
        torch.set_num_threads(1)
        folder = context.system_properties["model_dir"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.initialized = True

    def handle(self, data, context):  # type: ignore[no-untyped-def]
        """data: the requests of a batch, each with its body, of which TorchServe has read the JSON."""
        return [self.encode(request["body"]["texts"]) for request in data]

    def encode(self, texts):  # type: ignore[no-untyped-def]
        """The mean over each text's own tokens of the last layer."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).tolist()
