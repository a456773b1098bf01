"""A model that answers in batches: chats or token ids in, continuations out, greedy unless a temperature is given.

Runs transformers in float32. Prompts are sorted by length and padded on the left ([rows, longest prompt]); answers come in the
order of the prompts. Positions beyond the model's limit are not refused. Knows nothing of documents or of right and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Message = dict[str, Any]

BATCH_ROWS = 16
MAX_NEW_TOKENS = 64


class Answerer:
    """A model and its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.end_id: int = self.tokenizer.eos_token_id
        self.pad_id: int = self.end_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def num_parameters(self) -> int:
        """Number of weights; tied weights count once."""
        return sum(weight.numel() for weight in self.model.parameters())

    def encode(self, text: str) -> list[int]:
        """Return the tokens of plain text, after the token that begins every row."""
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        return token_ids if start is None else [start, *token_ids]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt of a chat that ends with a message of the user."""
        chat = [{"role": message["role"], "content": message["content"]} for message in messages]
        prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        token_ids: list[int] = prompt["input_ids"]
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text without special tokens."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def answer(self, chats: Sequence[Sequence[Message]], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """Answer each chat greedily."""
        outputs = self.generate([self.encode_chat(messages) for messages in chats], max_new_tokens)
        return [self.decode(output).strip() for output in outputs]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        rows: int = BATCH_ROWS,
    ) -> list[list[int]]:
        """Continue each prompt up to `max_new_tokens`, or up to and including the end token. Sampling follows torch's seed."""
        settings: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        outputs: list[list[int]] = [[] for _ in prompts]
        for indices in self.batches(prompts, rows):
            token_ids, mask = self.padded([prompts[index] for index in indices])
            batch = self.model.generate(
                input_ids=token_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.end_id,
                pad_token_id=self.pad_id,
                **settings,
            )
            for index, row in zip(indices, batch[:, token_ids.shape[1] :].tolist(), strict=True):
                outputs[index] = row[: row.index(self.end_id) + 1] if self.end_id in row else row
        return outputs

    @torch.no_grad()
    def choices(self, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return, for each token of each output, the model's first choice after the tokens before it."""
        chosen: list[list[int]] = [[] for _ in prompts]
        rows = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
        for indices in self.batches(rows, BATCH_ROWS):
            token_ids, mask = self.padded([rows[index] for index in indices])
            longest = max(len(outputs[index]) for index in indices)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self.model(
                input_ids=token_ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=longest + 1,
            ).logits
            best = logits.argmax(-1)[:, :-1]
            for index, row in zip(indices, best.tolist(), strict=True):
                chosen[index] = row[len(row) - len(outputs[index]) :]
        return chosen

    def batches(self, prompts: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
        """Return the indices of the prompts in batches of similar length."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        return [order[start : start + rows] for start in range(0, len(order), rows)]

    def padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, both [rows, longest], padded on the left."""
        longest = max(map(len, prompts))
        token_ids = [[self.pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(token_ids), torch.tensor(mask)
