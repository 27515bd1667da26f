"""One round of an evaluation's pictures: prompts by every choice of experts, held-out pictures finished from below B.

gallery.py -> draw_round -> OUT/pictures/round-0001/choice-0/000-seed-0.png, OUT/pictures/round-0001/held-out/

A picture of the pair is the one that generate-images draws with the same settings. The UNets wait in main memory and
have the device one at a time.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.conditioning import MicroConditioning
from shared.device import free_unused_memory
from shared.errors import DataError, RecordCorrupt
from shared.vae import Vae, choose_encode_dtype
from trainer.drawing import Drawing, batches
from trainer.drawn import precision_name
from trainer.ensemble import Denoiser, Expert, ExpertEnsemble, Start, plan_steps
from trainer.gallery import Gallery, Pictures, finishes_from
from trainer.handover import latent_facts
from trainer.lineup import Candidate, LineUp, as_expert
from trainer.offload import Berth, OffloadedUnet
from trainer.picture_files import PICTURE_FORMAT, drawing_facts, expert_facts, read_picture, save_picture
from trainer.prompt_embeds import EncodedPrompts
from trainer.report import Finished, HandOver
from trainer.rounds import Rounds
from trainer.sources import Source
from trainer.unet import ConditionedUnet, load_unet


@dataclass(frozen=True)
class Drawn:
    """What was drawn in a round."""

    choices: Sequence[Pictures]
    finished: list[Finished]
    finished_from: float | None
    handover: list[HandOver]


def draw_round(gallery: Gallery, line: LineUp, number: int, advance: Callable[[int], None]) -> Drawn:
    """All pictures of a round."""
    easel = Easel(gallery, line, gallery.out / "pictures" / f"round-{number:04d}")
    drawn = [easel.draw_choice(index, choice, advance) for index, choice in enumerate(line.choices())]
    finished, from_t = easel.finish(advance)
    handover = easel.hand_over()
    del easel
    free_unused_memory()
    return Drawn(drawn, finished, from_t, handover)


class Easel:
    """What one round is drawn with: every candidate's UNet and the VAE, in main memory until they are needed."""

    def __init__(self, gallery: Gallery, line: LineUp, folder: Path) -> None:
        self._gallery, self._line, self._folder = gallery, line, folder
        cpu = torch.device("cpu")
        self._berth = Berth(gallery.device)
        self._models = {one.name: self._ready(one, cpu) for one in line.candidates}
        self._vae = Vae(gallery.model, cpu, choose_encode_dtype("auto", gallery.vae, gallery.device.type))
        self._vae.device = gallery.device

    def draw_choice(self, index: int, choice: Sequence[Candidate], advance: Callable[[int], None]) -> Pictures:
        """The prompts by one choice, and their scores."""
        wish, hw = self._gallery.wish, (self._gallery.own_px,) * 2
        sizes = MicroConditioning(hw, (0, 0), hw)
        drawings = [
            Drawing(f"{i:03d}-seed-{wish.seed}", (prompt,) * len(choice), wish.seed, hw, sizes)
            for i, prompt in enumerate(wish.prompts)
        ]
        paths = self._draw(drawings, choice, self._folder / f"choice-{index}", None, advance)
        kept = [paths[drawing.name] for drawing in drawings]
        return Pictures([self._below(path) for path in kept], self._scores(kept))

    def finish(self, advance: Callable[[int], None]) -> tuple[list[Finished], float | None]:
        """Held-out pictures by everybody who may answer below the lowest boundary; those that cannot be read go."""
        from_t, sources = finishes_from(self._line), self._gallery.sources
        if from_t is None or not sources:
            return [], None
        folder, others = self._folder / "held-out", self._line.choices()[-1][1:]
        drawn: list[tuple[str, dict[str, Path]]] = []
        for who, candidate in enumerate(self._line.parts[0].candidates):
            drawings = [self._finishing(i, one, who, len(others) + 1) for i, (_, one) in enumerate(sources)]
            drawn.append((candidate.name, self._draw(drawings, (candidate, *others), folder, from_t, advance)))
        found = [self._finished(i, dataset, one, drawn) for i, (dataset, one) in enumerate(sources)]
        return [one for one in found if one is not None], self._first(from_t)

    def hand_over(self) -> list[HandOver]:
        """What everybody who may answer above the lowest boundary hands over there, beside real latents."""
        sources = self._gallery.sources
        if finishes_from(self._line) is None or not sources:
            return []
        self._berth.bring([self._vae.module])
        started = []
        for _, source in sources:
            with contextlib.suppress(DataError, RecordCorrupt):  # that it cannot be read has been said
                started.append((source, source.start(self._vae, self._gallery.wish.seed)[0]))
        return [self._handed_over(one, started) for one in self._line.parts[1].candidates] if started else []

    def _handed_over(self, candidate: Candidate, started: Sequence[tuple[Source, Tensor]]) -> HandOver:
        gallery, facts = self._gallery, candidate.facts
        expert = Expert(facts, self._models[candidate.name], gallery.dtype)
        ensemble, settings = ExpertEnsemble([expert], self._line.contract), gallery.wish.settings
        last_t = plan_steps([facts], self._line.contract, settings)[-1][1]
        embeds = EncodedPrompts(gallery.embeds, [facts], [None])
        estimates: dict[bool, list[Tensor]] = {False: [], True: []}
        for source, x_0 in started:
            prompts = embeds.batch([(source.caption or "",)], gallery.device)
            for is_real, own in estimates.items():
                generator = source.generator(gallery.wish.seed)
                noise = torch.randn((1, *x_0.shape), generator=generator).to(gallery.device)
                start = Start(x_0[None].to(gallery.device), last_t) if is_real else None
                with torch.inference_mode():
                    drawn = ensemble.draw(prompts, [source.sizes], settings, noise, [generator], start)
                own.append(drawn[0].cpu())
        facts_of = {is_real: latent_facts(own) for is_real, own in estimates.items()}
        return HandOver(
            candidate=candidate.name, timestep=last_t, pictures=len(started), drawn=facts_of[False], real=facts_of[True]
        )

    def _ready(self, candidate: Candidate, device: torch.device) -> Denoiser:
        unet = load_unet(candidate.folder, device, self._gallery.dtype)
        unet.eval()
        model = as_expert(candidate, unet, self._line, self._gallery.dtype).model
        assert isinstance(model, ConditionedUnet)
        return OffloadedUnet(model, self._berth)

    def _first(self, from_t: float) -> float:
        """The schedule's first timestep at or below `from_t`."""
        facts = [self._line.parts[0].start.facts]
        return plan_steps(facts, self._line.contract, self._gallery.wish.settings, from_t)[0][1]

    def _draw(
        self,
        drawings: Sequence[Drawing],
        choice: Sequence[Candidate],
        folder: Path,
        from_t: float | None,
        advance: Callable[[int], None],
    ) -> dict[str, Path]:
        """Draw and save; paths by the drawings' names, and sources by the picture's number, where there are some."""
        gallery, paths = self._gallery, dict[str, Path]()
        first_t = None if from_t is None else self._first(from_t)
        if drawings:
            folder.mkdir(parents=True, exist_ok=True)
        for drawn in self._rounds(choice, from_t).draw(list(batches(drawings, gallery.wish.batch)), advance):
            if drawn.pixels is None:
                continue
            name = drawn.drawing.name
            facts = self._common(choice) | drawing_facts(drawn.drawing, [None] * len(choice), first_t)
            paths[name] = folder / f"{name}.png"
            save_picture(paths[name], drawn.pixels, facts)
            if drawn.source is not None:
                own = f"{name[:3]}-source"
                paths[own] = folder / f"{own}.png"
                save_picture(paths[own], drawn.source, {"format": PICTURE_FORMAT})
        return paths

    def _rounds(self, choice: Sequence[Candidate], from_t: float | None) -> Rounds:
        gallery = self._gallery
        experts = [Expert(one.facts, self._models[one.name], gallery.dtype) for one in choice]
        prompts = EncodedPrompts(gallery.embeds, [one.facts for one in choice], [None] * len(choice))
        return Rounds(
            ExpertEnsemble(experts, self._line.contract), gallery.wish.settings, prompts, self._vae,
            gallery.vae.downscale, gallery.vae.latent_channels, [], self._berth, from_t,
        )  # fmt: skip

    def _common(self, choice: Sequence[Candidate]) -> dict[str, Any]:
        wish = self._gallery.wish
        told = asdict(wish.settings) | {"guidance_rescale": wish.settings.rescale(self._line.contract)}
        experts = [
            {"name": one.name, "timesteps": [one.facts.low, one.facts.high]}
            if one.checkpoint is None
            else expert_facts(one.checkpoint)
            for one in choice
        ]
        precision = precision_name(self._gallery.dtype)
        return {"format": PICTURE_FORMAT, **told, "precision": precision, "experts": experts}

    def _finishing(self, index: int, source: Source, who: int, parts: int) -> Drawing:
        texts, seed = (source.caption or "",) * parts, self._gallery.wish.seed
        return Drawing(f"{index:03d}-by-{who}", texts, seed, source.hw, source.sizes, source)

    def _finished(
        self, index: int, dataset: str, source: Source, drawn: Sequence[tuple[str, Mapping[str, Path]]]
    ) -> Finished | None:
        kept = [(name, paths[f"{index:03d}-by-{who}"]) for who, (name, paths) in enumerate(drawn)
                if f"{index:03d}-by-{who}" in paths]  # fmt: skip
        if not kept:
            return None
        return Finished(
            dataset=dataset,
            name=source.name,
            caption=source.caption or "",
            source=self._below(kept[0][1].parent / f"{index:03d}-source.png"),
            pictures=[(name, self._below(path)) for name, path in kept],
        )

    def _scores(self, paths: Sequence[Path]) -> list[float]:
        clip = self._gallery.clip
        if clip is None:
            return []
        self._berth.bring([clip.module])
        pairs = zip(paths, self._gallery.wish.prompts, strict=True)
        return [clip.score(read_picture(path), prompt, self._gallery.device) for path, prompt in pairs]

    def _below(self, path: Path) -> str:
        return path.relative_to(self._gallery.out).as_posix()
