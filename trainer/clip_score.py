"""How well a picture and its prompt agree, as a CLIP sees it (Hessel et al. 2021): 100 times the cosine of the two.

gallery.py -> ClipScorer; the door to CLIP. No cosine is raised to 0 here: what is worse than nothing stays visible.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.errors import DataError
from shared.pictures import Pixels


class ClipScorer:
    """A CLIP folder: weights as safetensors, preprocessor_config.json, and its tokenizer. Loaded once, fp32."""

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()  # its bars would tear ours
        logging.set_verbosity_error()  # and its tables of weights that do not fit our one line
        for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise DataError(f"--clip {folder}: no {name} in it; a whole CLIP folder or Hub id is wanted")
        # What prepares pictures by Pillow: it needs no torchvision, and gives what CLIP was trained with.
        PictureProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        try:
            self._processor = PictureProcessor.from_pretrained(folder)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            self._model, report = transformers.CLIPModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(f"--clip {folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        if report["missing_keys"]:
            raise DataError(f"--clip {folder} lacks weights of {sorted(report['missing_keys'])[0]}")
        self._model.eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The network itself, for whoever moves it to another device."""
        module: nn.Module = self._model
        return module

    def score(self, pixels: Pixels, prompt: str, device: torch.device) -> float:
        """100 times the cosine between a picture, uint8 [H, W, 3], and its prompt; what is too long is cut."""
        longest = self._model.config.text_config.max_position_embeddings
        texts = self._tokenizer([prompt], return_tensors="pt", truncation=True, max_length=longest)
        pictures = self._processor(images=[pixels], return_tensors="pt")
        with torch.inference_mode():
            output = self._model(
                input_ids=texts["input_ids"].to(device),
                attention_mask=texts["attention_mask"].to(device),
                pixel_values=pictures["pixel_values"].to(device, torch.float32),
            )
        return 100 * float((output.image_embeds * output.text_embeds).sum())  # of length 1 both
