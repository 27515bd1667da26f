"""Drawn pictures as files: a PNG that says what it was drawn from, and a contact sheet of all of them.

The text chunk `sdxl-experts` holds one JSON object; docs/formats.md lists its keys. No time and no path stands in it:
the same command leaves the same bytes.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.atomic import write_atomically
from shared.contract import PairContract
from shared.errors import DataError
from shared.pictures import Pixels
from shared.progress import say
from shared.sheet import Card, Panel, draw_sheet, shrunk
from trainer.checkpoint import Checkpoint
from trainer.drawing import Drawing
from trainer.ensemble import DrawSettings

PICTURE_FORMAT = 1
CHUNK = "sdxl-experts"
MOST_CARDS = 400


def common_facts(
    settings: DrawSettings, precision: str, contract: PairContract, checkpoints: Sequence[Checkpoint]
) -> dict[str, Any]:
    """What is the same of all pictures of a command."""
    told = asdict(settings) | {"guidance_rescale": settings.rescale(contract), "precision": precision}
    return {"format": PICTURE_FORMAT, **told, "experts": [expert_facts(one) for one in checkpoints]}


def drawing_facts(drawing: Drawing, negatives: Sequence[str | None], first_t: float | None) -> dict[str, Any]:
    """What is one picture's own; a text that differs by expert is told for each besides."""
    facts: dict[str, Any] = {"prompt": drawing.prompts[0], "negative_prompt": negatives[0], "seed": drawing.seed}
    if len(set(drawing.prompts)) > 1:
        facts["expert_prompts"] = list(drawing.prompts)
    if len(set(negatives)) > 1:
        facts["expert_negative_prompts"] = list(negatives)
    if drawing.source is not None:
        facts["source"] = {"name": drawing.source.name, "label": drawing.source.label.hex(), "timestep": first_t}
    return facts


def save_picture(path: Path, pixels: Pixels, facts: Mapping[str, Any]) -> None:
    """Write a PNG, whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps(facts, ensure_ascii=False))
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", pnginfo=info)
    write_atomically(path, data.getvalue())


def read_picture(path: Path) -> Pixels:
    """A picture that this program drew; raises DataError where it cannot be read."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def inline_picture(path: Path, edge_px: int) -> str:
    """A picture as a data URI, JPEG, no longer than `edge_px`; raises DataError where it cannot be read."""
    from PIL import Image

    image, data = Image.fromarray(read_picture(path)), io.BytesIO()
    image.thumbnail((edge_px, edge_px))
    image.save(data, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def card_of(drawing: Drawing, drawn: Pixels, source: Pixels | None, first_t: float | None) -> Card:
    """A picture for the sheet, beside the one that it was begun with."""
    panels = ([] if source is None else [Panel(shrunk(source))]) + [Panel(shrunk(drawn))]
    begun = "" if drawing.source is None else f" · {drawing.source.name} from t = {first_t:.0f}"
    caption = " | ".join(dict.fromkeys(drawing.prompts))
    return Card(tuple(panels), f"{drawing.name}{begun}", caption or "(no prompt)")


def save_sheet(path: Path, cards: Sequence[Card], facts: Mapping[str, Any], negatives: Sequence[str | None]) -> None:
    """Write the contact sheet; of more than 400 pictures the first."""
    if len(cards) > MOST_CARDS:
        say(f"{path} shows the first {MOST_CARDS} of {len(cards)} pictures")
    guidance = facts["guidance"]
    heading = [
        f"{facts['scheduler']}, {facts['steps']} steps",
        f"guidance {' / '.join(f'{g:g}' for g in (guidance if isinstance(guidance, tuple) else (guidance,)))}",
        f"rescale {facts['guidance_rescale']:g}",
        *(f"{e['name']} [{e['timesteps'][0]}, {e['timesteps'][1]}) step {e['step']}" for e in facts["experts"]),
    ]
    against = dict.fromkeys(text for text in negatives if text is not None)
    heading += [f"against {' | '.join(against)}"] if against else []
    write_atomically(path, draw_sheet(" · ".join(heading), cards[:MOST_CARDS]))


def expert_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """An expert as pictures name it."""
    facts, folder = checkpoint.card.facts, checkpoint.weights_folder().name
    return {
        "name": facts.name,
        "timesteps": [facts.low, facts.high],
        "step": checkpoint.state.step,
        "weights": folder,
        "sha256": checkpoint.weights_sha256(folder),
    }
