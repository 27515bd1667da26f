"""A store takes little more than the bytes of its tensors at 1024 px."""

from benchmarks.store_read import MOMENTS, SAMPLES, sample_bytes
from benchmarks.store_size import measure


def test_frames_pages_and_facts_take_four_per_cent_at_most() -> None:
    for layout in (SAMPLES, MOMENTS):
        sizes = measure(layout, 64)
        assert sample_bytes(layout) == sizes["raw"] < sizes["framed"] < sizes["used"] <= sizes["file"]
        assert 0 < sizes["overhead"] <= 0.04
