"""Samples in columns: what was added comes back, merged and chosen as asked, and fifty thousand take no memory."""

from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_builder.buckets import CropPlan
from cache_builder.keys import text_keys_for
from cache_builder.report import BuildReport
from cache_builder.sample_rows import DataSet, packed
from cache_builder.samples import Samples
from cache_builder.sealing import SampleRows
from cache_builder.sources import Found
from cache_builder.todo import Pictures, account_for
from shared.pictures import PixelLimits, PixelRules

TEXT_KEY = text_keys_for(1, {})
THUMBNAIL = bytes(range(216))
PLANS = [CropPlan((64 + n, 80), n, 3, (64, 64), flip) for n in range(3) for flip in (False, True)]
META = st.dictionaries(
    st.text(max_size=3),
    st.one_of(
        st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(), st.tuples(st.text())
    ),
    max_size=3,
)
ADDED = st.fixed_dictionaries(
    {
        "path": st.text(st.characters(codec="utf-8"), max_size=8),
        "place": st.tuples(st.text(), st.integers(0, 2**63)),
        "captions": st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=3, unique=True),
        "plans": st.lists(st.sampled_from(PLANS), min_size=1, max_size=3, unique=True),
        "meta": META,
        "known": st.booleans(),
    }
)


def key(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def read(*place: Any) -> bytes:
    return repr(place).encode()


def add(samples: Samples, index: int, one: dict[str, Any], digest: bytes) -> None:
    found = Found(one["path"], tuple(one["captions"]), partial(read, *one["place"]), one["meta"])
    crops = [key(index, plan) + packed(plan) for plan in one["plans"]]
    thumbnail = THUMBNAIL if one["known"] else None
    samples.add(found, digest, key(digest), (70, 80 + index), thumbnail, one["captions"], crops, is_sided=False)


def make() -> Samples:
    samples = Samples(TEXT_KEY)
    samples.datasets.append(DataSet("set", PixelRules(), PixelLimits()))
    return samples


@settings(max_examples=40, deadline=None)
@given(st.lists(ADDED, min_size=2, max_size=6), st.data())
def test_what_was_added_comes_back(items: list[dict[str, Any]], data: st.DataObject) -> None:
    samples = make()
    for index, one in enumerate(items):
        add(samples, index, one, bytes([index]) * 32)
    samples.merge(0, [1])
    samples.learn(1, THUMBNAIL)
    items[0] = items[0] | {
        "captions": list(dict.fromkeys([*items[0]["captions"], *items[1]["captions"]])),
        "meta": items[1]["meta"] | items[0]["meta"],
    }
    items[1] = items[1] | {"known": True}
    kept = sorted(data.draw(st.sets(st.integers(0, len(items) - 1), min_size=1)))
    left = samples.only(np.array(kept))
    assert len(left) == len(kept)
    for sample, index in zip(left, kept, strict=True):
        one = items[index]
        assert (sample.dataset, sample.path, sample.digest) == ("set", one["path"], bytes([index]) * 32)
        assert (sample.captions, sample.meta) == (tuple(one["captions"]), one["meta"])
        assert sample.text_keys == tuple(TEXT_KEY(caption.encode()) for caption in one["captions"])
        assert [(crop.plan, crop.latent_key) for crop in sample.crops] == [(p, key(index, p)) for p in one["plans"]]
        assert (sample.original_hw, sample.thumbnail) == ((70, 80 + index), THUMBNAIL if one["known"] else None)
        assert sample.read() == read(*one["place"])
    crops = [crop for sample in left for crop in sample.crops]
    assert [left.crop(index) for index in range(len(left.crops))] == crops
    assert left.of_crop(np.arange(len(crops))).tolist() == [s.index for s in left for _ in s.crops]
    assert [left.text(i) for i in range(len(left.texts))] == [text for sample in left for text in sample.captions]


def test_fifty_thousand_take_no_memory(tmp_path: Path) -> None:
    samples = Samples(TEXT_KEY, tmp_path)
    samples.datasets.append(DataSet("set", PixelRules(), PixelLimits()))
    one = {"path": "a.png", "place": ("a.png",), "captions": ["words"], "plans": PLANS[:1], "meta": {}, "known": True}
    before = private_bytes()
    for index in range(50_000):
        add(samples, index, one, index.to_bytes(32, "little"))
    assert len(samples.rows) == len(samples.facts) == 50_000
    account_for(BuildReport(), samples, Pictures(samples, np.arange(0)).crops, {})
    assert sum(1 for _ in SampleRows(samples, np.zeros(50_000, bool), {})) == 50_000
    assert private_bytes() - before < 50_000 * 100  # as objects they took 1,800 bytes each


def private_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Anonymous:"))
