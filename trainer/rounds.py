"""Drawing round by round, each stage with the device to itself: VAE, UNets, VAE.

generate.py -> Rounds.draw -> ensemble.py; offload.py moves the weights

A round is some batches of pictures, so that moving weights costs little beside drawing, and a command that is
interrupted leaves all rounds before. On a CPU nothing is moved, and each batch is a round.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.errors import DataError, RecordCorrupt
from shared.pictures import Pixels
from shared.progress import say
from shared.vae import Vae
from trainer.drawing import Drawing
from trainer.ensemble import DrawSettings, ExpertEnsemble, Start
from trainer.offload import Berth
from trainer.prompt_embeds import EncodedPrompts

ROUND = 32  # pictures


@dataclass(frozen=True)
class Drawn:
    """What became of a drawing: pixels, and the picture that it was begun with; None where that could not be read."""

    drawing: Drawing
    pixels: Pixels | None
    source: Pixels | None = None


@dataclass(frozen=True)
class _Begun:
    """A drawing, and where it was begun with a picture, that picture and its latents [4, h, w]."""

    drawing: Drawing
    x_0: Tensor | None = None
    source: Pixels | None = None


@dataclass(frozen=True)
class Rounds:
    """Everything that drawing takes, loaded."""

    ensemble: ExpertEnsemble
    settings: DrawSettings
    prompts: EncodedPrompts
    vae: Vae
    downscale: int  # px per latent, along an edge
    channels: int  # of a latent
    unets: Sequence[nn.Module]  # on the device together, and given up once all is drawn; none where they take turns
    berth: Berth
    from_t: float | None  # from where on given pictures are drawn

    def draw(self, batches: Sequence[Sequence[Drawing]], advance: Callable[[int], None]) -> Iterator[Drawn]:
        """All drawings, batch by batch, once; those whose picture cannot be read come without pixels, and are said.

        `advance` is told how many more have their latents, long before a round's pictures come.
        """
        most = 1 if self.berth.device.type == "cpu" else max(1, ROUND // max(map(len, batches)))
        for i in range(0, len(batches), most):
            begun = [self._begin(batch) for batch in batches[i : i + most]]
            yield from (Drawn(drawing, None) for _, lost in begun for drawing in lost)
            self.berth.bring(self.unets)
            latents = []
            for ready, lost in begun:
                latents.append(self._draw(ready) if ready else None)
                advance(len(ready) + len(lost))
            if i + most >= len(batches):
                self.berth.give_up(self.unets)  # a CPU has no other way to make room for the VAE
            self.berth.bring([self.vae.module])
            for (ready, _), drawn in zip(begun, latents, strict=True):
                for index, one in enumerate(ready):  # one at a time: a VAE takes more room than any UNet
                    assert drawn is not None
                    yield Drawn(one.drawing, self.vae.decode(drawn[index : index + 1])[0].numpy(), one.source)

    def _begin(self, batch: Sequence[Drawing]) -> tuple[list[_Begun], list[Drawing]]:
        """What of a batch can be drawn, and what cannot."""
        ready, lost = [], []
        for drawing in batch:
            try:
                ready.append(self._read(drawing))
            except (DataError, RecordCorrupt) as error:
                say(f"passed over: {drawing.source.name if drawing.source else drawing.name}: {error}")
                lost.append(drawing)
        return ready, lost

    def _read(self, drawing: Drawing) -> _Begun:
        if drawing.source is None:
            return _Begun(drawing)
        self.berth.bring([self.vae.module])
        return _Begun(drawing, *drawing.source.start(self.vae, drawing.seed))

    def _draw(self, batch: Sequence[_Begun]) -> Tensor:
        """Latents of one batch; each picture's noise is its own, drawn on the CPU."""
        drawings, device = [one.drawing for one in batch], self.berth.device
        generators = [drawing.generator() for drawing in drawings]
        h, w = (edge // self.downscale for edge in drawings[0].hw)
        shape = (1, self.channels, h, w)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        x_0 = [one.x_0 for one in batch if one.x_0 is not None]
        start = None if self.from_t is None else Start(torch.stack(x_0).to(device), self.from_t)
        prompts = self.prompts.batch([drawing.prompts for drawing in drawings], device)
        with torch.inference_mode():
            sizes = [drawing.sizes for drawing in drawings]
            latents = self.ensemble.draw(prompts, sizes, self.settings, noise, generators, start)
        for drawing, finite in zip(drawings, latents.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:
                say(f"{drawing.name}: its latents overflowed and it is black; --precision bf16 or fp32 has more room")
        return latents
