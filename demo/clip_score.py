"""How well a picture and its prompt agree, as the small world's own CLIP sees it (Hessel et al. 2021)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo.train_clip import to_clip_input, tokenize


def clip_cosines(
    folder: Path, pictures: Sequence[Image.Image], prompts: Sequence[str], *, every: bool = False
) -> list[float]:
    """100 times the cosine between each picture's and its prompt's vector; prompts in the small world's words.

    With `every`, each picture's with all prompts' instead, one picture after another.
    """
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()
    with torch.inference_mode():
        pixels = torch.cat([to_clip_input(torch.from_numpy(np.array(picture))[None]) for picture in pictures])
        output = model(input_ids=tokenize(list(prompts)), pixel_values=pixels)
        images, texts = output.image_embeds, output.text_embeds  # [n, d], of length 1
        cosines = (images @ texts.T).flatten() if every else (images * texts).sum(-1)
    return [100 * float(cosine) for cosine in cosines]
