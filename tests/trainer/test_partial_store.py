"""A store that has only a part of a manifest trains nobody, and says so before anything is written."""

from pathlib import Path

import pytest

from shared.config import load_config
from shared.errors import ConfigError
from shared.manifest import mark_parts
from shared.parts import Part
from tests.stores import row, write_store
from trainer.config import ExpertConfig
from trainer.run import Request, look_at_run, open_run

SETS = ["name=base", "timesteps.low=350", "timesteps.high=1000", "steps=1"]


def test_a_run_needs_the_whole_manifest(tmp_path: Path) -> None:
    manifest = write_store(tmp_path / "store", [row(index) for index in range(8)])
    mark_parts(manifest.path.parent, manifest.digest, [Part(0, 2)])
    current = manifest.path.with_name("current.json")
    current.write_bytes(manifest.path.with_suffix(".json").read_bytes())
    config = load_config(ExpertConfig, [], SETS)
    request = Request(config, tmp_path / "store", "main", tmp_path / "model", tmp_path / "run", "cpu")
    for opened in (open_run, look_at_run):
        with pytest.raises(ConfigError, match=r"only part 0/2 of manifest 'main'.*--partition"):
            opened(request)
    assert not (tmp_path / "run").exists()
