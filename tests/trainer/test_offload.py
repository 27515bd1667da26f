"""Models that take turns on a device: torch's meta device stands for one, as it is another than the CPU."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from demo.tiny_model import POOLED_WIDTH, TEXT_WIDTHS
from shared.conditioning import PromptEmbeds
from trainer.drawing import GenerateRequest
from trainer.ensemble import DrawSettings
from trainer.generate import generate
from trainer.offload import Berth, OffloadedUnet
from trainer.unet import ConditionedUnet, load_unet

META = torch.device("meta")


def places(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def test_one_group_at_a_time_and_nothing_changes() -> None:
    modules = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(3)]
    before = [[tensor.clone() for tensor in module.state_dict().values()] for module in modules]
    addresses = [[tensor.data_ptr() for tensor in module.parameters()] for module in modules]
    berth = Berth(META)
    for wanted in ([0, 1], [2], [1], [1, 2], [], [0]):
        berth.bring([modules[i] for i in wanted])
        assert [places(module) for module in modules] == [{"meta"} if i in wanted else {"cpu"} for i in range(3)]
    berth.bring([])
    assert [[tensor.data_ptr() for tensor in module.parameters()] for module in modules] == addresses
    for module, kept in zip(modules, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), kept, strict=True))


@pytest.mark.parametrize("device", [META, torch.device("cpu")])
def test_what_is_given_up_holds_nothing(device: torch.device) -> None:
    kept, gone = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in gone.state_dict().values()]
    berth = Berth(device)
    berth.bring([kept, gone])
    assert all(storage() is not None for storage in storages)
    berth.give_up([gone])
    assert places(gone) == {"meta"}
    assert all(storage() is None for storage in storages)
    berth.bring([])
    assert places(kept) == {"cpu"}


def test_on_a_cpu_nothing_moves() -> None:
    module = nn.Linear(2, 2)
    address = module.weight.data_ptr()
    Berth(torch.device("cpu")).bring([module])
    Berth(torch.device("cpu")).bring([])
    assert module.weight.data_ptr() == address


def test_unets_take_turns(tiny_model: Path) -> None:
    unets = [load_unet(tiny_model / "unet", torch.device("cpu")) for _ in range(2)]
    berth = Berth(META)
    turns = [OffloadedUnet(ConditionedUnet(unet, "sdxl", TEXT_WIDTHS[1]), berth) for unet in unets]

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, device=META)

    text = PromptEmbeds(zeros(1, 77, sum(TEXT_WIDTHS)), zeros(1, POOLED_WIDTH))
    for index in (0, 0, 1, 0):
        output = turns[index](zeros(1, 4, 8, 8), zeros(1), text, zeros(1, 6), 6.0)
        assert output.shape == (1, 4, 8, 8)
        assert [places(unet) for unet in unets] == [{"meta"} if i == index else {"cpu"} for i in range(2)]


def test_stages_have_the_device_one_after_another(
    pair: tuple[Path, Path], world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The UNets of a pair together, the VAE alone; before it, where given pictures are encoded."""
    brought, given_up = list[list[str]](), list[list[str]]()

    class Noting(Berth):
        def bring(self, modules: Sequence[nn.Module]) -> None:
            brought.append([type(module).__name__ for module in modules])

        def give_up(self, modules: Sequence[nn.Module]) -> None:
            given_up.append([type(module).__name__ for module in modules])
            super().give_up(modules)

    monkeypatch.setattr("trainer.generate.Berth", Noting)
    unets, vae = ["UNet2DConditionModel"] * 2, ["AutoencoderKL"]
    asked: dict[str, Any] = {"experts": pair, "model": world.model, "out": tmp_path, "device": "cpu"}
    asked |= {"prompts": ("red",), "settings": DrawSettings(4, 1.0)}
    list(generate(GenerateRequest(**asked)))
    assert brought == [unets, vae]
    assert given_up == [unets]
    brought.clear()
    list(generate(GenerateRequest(**asked, from_images=world.store, limit=1)))
    assert brought == [vae, unets, vae]
