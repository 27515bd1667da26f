"""model_index.json of a pipeline in diffusers layout: which class each of its parts is of.

single_file.py, trainer/bundle_folder.py -> pipeline_index
"""

from collections.abc import Collection
from typing import Any

_CLASSES = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def pipeline_index(parts: Collection[str], scheduler: str, *, from_images: bool) -> dict[str, Any]:
    """Of a pipeline with these `parts` and a scheduler of this class, which draws or begins with pictures."""
    index: dict[str, Any] = {part: own if part in parts else [None, None] for part, own in _CLASSES.items()}
    index["scheduler"] = ["diffusers", scheduler]
    index["_class_name"] = "StableDiffusionXLImg2ImgPipeline" if from_images else "StableDiffusionXLPipeline"
    return index
