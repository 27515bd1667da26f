"""Prompts to embeds for each expert, all of them before the first picture: then the text encoders go.

generate.py -> encode_prompts -> EncodedPrompts.batch -> ensemble.py
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.command import one_line
from shared.conditioning import PromptEmbeds
from shared.contract import ExpertFacts
from shared.device import free_unused_memory
from shared.progress import say
from shared.text_encoders import TextEncoders
from trainer.ensemble import Prompt


@dataclass(frozen=True)
class EncodedPrompts:
    """Embeds of every text that pictures are asked for, on the CPU, by text and chunks of 77 tokens."""

    kept: Mapping[tuple[str, int], PromptEmbeds]
    facts: Sequence[ExpertFacts]
    negatives: Sequence[str | None]  # of each expert; None: its null prompt

    def batch(self, asked: Sequence[Sequence[str]], device: torch.device) -> list[Prompt]:
        """For each expert the prompts of a batch; `asked` are the texts of each picture, in the experts' order."""
        return [
            Prompt(
                self._stack([self.kept[texts[index], own.text_chunks] for texts in asked], device),
                self._stack([self._against(index, own)] * len(asked), device),
            )
            for index, own in enumerate(self.facts)
        ]

    def _against(self, index: int, own: ExpertFacts) -> PromptEmbeds:
        negative = self.negatives[index]
        if negative is not None:
            return self.kept[negative, own.text_chunks]
        empty = self.kept["", own.text_chunks]
        if own.null_prompt == "encoded":
            return empty
        return PromptEmbeds(torch.zeros_like(empty.prompt_embeds), torch.zeros_like(empty.pooled_prompt_embeds))

    @staticmethod
    def _stack(embeds: Sequence[PromptEmbeds], device: torch.device) -> PromptEmbeds:
        def joined(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat(list(tensors)).to(device)

        return PromptEmbeds(joined(e.prompt_embeds for e in embeds), joined(e.pooled_prompt_embeds for e in embeds))


def encode_prompts(
    model: Path,
    asked: Iterable[Sequence[str]],
    negatives: Sequence[str | None],
    facts: Sequence[ExpertFacts],
    device: torch.device,
) -> EncodedPrompts:
    """Embeds of all texts; each is encoded once, by itself, and the encoders are gone when this returns.

    `asked` are the texts of each picture and `negatives` those against it, in the experts' order.
    """
    wanted = {(text, own.text_chunks): None for texts in asked for text, own in zip(texts, facts, strict=True)}
    wanted |= {(text or "", own.text_chunks): None for text, own in zip(negatives, facts, strict=True)}
    encoders, kept = TextEncoders(model, device), {}
    for text, chunks in wanted:
        encoders.chunks = chunks
        if encoders.count(text).truncated:
            say(f"cut short to {chunks} x 75 tokens: {one_line(text)}")
        embeds = encoders.encode([text])
        kept[text, chunks] = PromptEmbeds(embeds.prompt_embeds.cpu(), embeds.pooled_prompt_embeds.cpu())
    del encoders
    free_unused_memory()
    return EncodedPrompts(kept, facts, negatives)
