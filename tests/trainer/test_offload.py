"""Models that take turns on a device: torch's meta device stands for one, as it is another than the CPU."""

import torch
from torch import nn

from trainer.offload import Berth

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


def test_on_a_cpu_nothing_moves() -> None:
    module = nn.Linear(2, 2)
    address = module.weight.data_ptr()
    Berth(torch.device("cpu")).bring([module])
    Berth(torch.device("cpu")).bring([])
    assert module.weight.data_ptr() == address
