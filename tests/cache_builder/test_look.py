"""The look at each picture: in order, a batch ahead of whoever asks, and no more than that."""

import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cache_builder import look
from cache_builder.keys import image_digest
from cache_builder.look import Looker, Seen, Unusable, look_at
from cache_builder.scan_cache import ScanCache
from cache_builder.sources import Found
from demo.draw import draw
from demo.scene import make_scene
from shared.pictures import PixelLimits, PixelRules
from shared.store import StoreWriter

BATCH, WAIT_S = 3, 30.0


@pytest.fixture
def looker(tmp_path: Path) -> Iterator[Looker]:
    with StoreWriter(tmp_path / "store") as store:
        yield Looker(PixelRules(), PixelLimits(), store, ScanCache())


def pictures(count: int) -> list[bytes]:
    files = [io.BytesIO() for _ in range(count)]
    for index, file in enumerate(files):
        draw(make_scene(3, index)).save(file, format="PNG")
    return [file.getvalue() for file in files]


def test_looks_come_in_order_whatever_their_number(looker: Looker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "FILES_AT_ONCE", BATCH)
    data = pictures(2 * BATCH + 1)
    data[4] = b"no picture"
    for count in range(len(data) + 1):
        items = [(Found(str(index), (), partial(bytes, one)), index) for index, one in enumerate(data[:count])]
        seen = list(look_at(looker, items, 2))
        assert [item for item, _ in seen] == items
        for (_, index), found in seen:
            assert isinstance(found, Unusable) if index == 4 else isinstance(found, Seen)
            assert isinstance(found, Unusable) or found.digest == image_digest(data[index])


def test_threads_read_one_batch_ahead(looker: Looker, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they work while the caller walks and takes in what was seen; further ahead would only fill memory."""
    monkeypatch.setattr(look, "FILES_AT_ONCE", BATCH)
    data, read = pictures(1)[0], [threading.Event() for _ in range(4 * BATCH)]
    walked = list[int]()

    def read_one(index: int) -> bytes:
        read[index].set()
        return data

    def walk() -> Iterator[tuple[Found, None]]:
        for index in range(len(read)):
            walked.append(index)
            yield Found(str(index), (), partial(read_one, index)), None

    looks = look_at(looker, walk(), 1)
    next(looks)
    assert read[2 * BATCH - 1].wait(WAIT_S)
    assert walked == list(range(2 * BATCH))
    assert not read[2 * BATCH].is_set()
    assert len(list(looks)) == len(read) - 1
