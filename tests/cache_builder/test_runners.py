"""Encoding beside decoding and committing, on one device and on several: the same store, and nothing lost."""

import contextlib
import io
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from cache_builder.build import BuildOptions, build
from cache_builder.config import BuildConfig
from cache_builder.encode import Crop, SampleEncoder
from cache_builder.encoder_process import EncoderProcess, read_message, write_message
from cache_builder.report import BuildReport
from cache_builder.runners import LocalRunner, device_names
from cache_builder.sources import Found, Skipped
from cache_builder.sources.folder import FolderSource
from shared.config import load_config
from shared.errors import ConfigError, ExpertsError, StoreError
from shared.manifest import open_manifest
from shared.record import decode_record
from shared.store import StoreReader
from shared.vae import Vae
from tests.pictures import write_shapes

Build = Callable[..., BuildReport]
ONE_BY_ONE = ("--set", "encode.batch=1", "--set", "encode.text_batch=2")
COUNT = 24


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "set", COUNT)


@pytest.fixture(scope="module")
def one_device(pictures: Path, tiny_model: Path, run_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that one device filled."""
    store = tmp_path_factory.mktemp("one") / "store"
    run_build([pictures], store, tiny_model)
    return store


def keys_of(store: Path) -> list[bytes]:
    with StoreReader(store) as reader:
        return [key for page in reader.sizes() for key, _ in page]


def crops(count: int, size_hw: tuple[int, int] = (64, 48)) -> list[Crop]:
    rng = np.random.default_rng(0)
    return [Crop(bytes([i]) * 16, rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8)) for i in range(count)]


def make_encoder(model: Path, device: str = "cpu", **more: Any) -> SampleEncoder:
    return SampleEncoder(model, device, "float32", "moments", 1, **more)


# --- several devices ---


@pytest.mark.usefixtures("forked_encoders")
def test_two_processes_fill_the_store_that_one_does(
    tmp_path: Path, pictures: Path, one_device: Path, tiny_model: Path, run_build: Build, capfd: Any
) -> None:
    report = run_build([pictures], tmp_path / "store", tiny_model, device="cpu,cpu")
    assert (report.stored, report.seen) == (COUNT, COUNT)
    assert report.digest == open_manifest(one_device, "main").digest
    assert keys_of(tmp_path / "store") == keys_of(one_device)
    assert capfd.readouterr().err.count("loading the VAE") == 2
    with StoreReader(tmp_path / "store") as ours, StoreReader(one_device) as theirs:
        for key in keys_of(one_device):
            with ours.snapshot() as a, theirs.snapshot() as b:
                one, other = a.read(key), b.read(key)
            assert (one.kind, one.meta) == (other.kind, other.meta)
            for name, tensor in one.tensors.items():
                np.testing.assert_allclose(tensor.astype(float), other.tensors[name].astype(float), atol=0.02)
    again = run_build([pictures], tmp_path / "store", tiny_model, device="cpu,cpu")
    assert (again.reused, again.digest) == (COUNT, report.digest)
    assert capfd.readouterr().err == ""  # nothing to encode: no process, no weights


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for(condition: Callable[[], Any], limit_s: float = 60) -> Any:
    end_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return found


def stored(store: Path) -> int:
    with contextlib.suppress(StoreError), StoreReader(store) as reader:  # it may just be being made
        return reader.count()
    return 0


def alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.usefixtures("forked_encoders")
def test_a_process_that_dies_is_one_line_and_loses_nothing(
    tmp_path: Path, pictures: Path, one_device: Path, tiny_model: Path, commands: Any
) -> None:
    more = (*ONE_BY_ONE, "--device", "cpu,cpu")
    running = commands.start_build(pictures, tmp_path / "store", tiny_model, *more)
    children = wait_for(lambda: len(found := children_of(running.pid)) == 2 and found)
    wait_for(lambda: stored(tmp_path / "store") > 3)
    os.kill(children[0], signal.SIGKILL)
    done = running.finish()
    assert done.code == 75
    assert done.out == ""
    assert done.errors == [
        "stopped: the encoder on cpu was ended by SIGKILL; what was stored stays, and the same command goes on"
    ]
    assert alive(children) == []
    assert stored(tmp_path / "store") > 3
    assert not (tmp_path / "store/manifests").exists()
    held = set(keys_of(tmp_path / "store"))
    done = commands.build(pictures, tmp_path / "store", tiny_model)
    assert done.code == 0
    assert held < set(keys_of(tmp_path / "store"))
    assert keys_of(tmp_path / "store") == keys_of(one_device)


@pytest.mark.usefixtures("forked_encoders")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_ends_the_processes_too(
    tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any, sent: signal.Signals
) -> None:
    running = commands.start_build(pictures, tmp_path / "store", tiny_model, *ONE_BY_ONE, "--device", "cpu,cpu")
    children = wait_for(lambda: len(found := children_of(running.pid)) == 2 and found)
    started_s = time.monotonic()
    os.kill(running.pid, sent)
    done = running.finish()
    assert time.monotonic() - started_s < 60  # seconds on a calm machine
    if sent is signal.SIGKILL:
        assert done.code == -signal.SIGKILL
    else:
        assert done.code == 75
        assert done.errors == ["stopped: interrupted; what was stored or saved stays, and the same command goes on"]
    wait_for(lambda: not alive(children))  # by their pipes, where nobody could tell them


def test_sigterm_on_one_device(tmp_path: Path, pictures: Path, tiny_model: Path, commands: Any) -> None:
    running = commands.start_build(pictures, tmp_path / "store", tiny_model, *ONE_BY_ONE)
    wait_for(lambda: stored(tmp_path / "store") > 3)
    os.kill(running.pid, signal.SIGTERM)
    done = running.finish()
    assert done.code == 75
    assert done.errors == ["stopped: interrupted; what was stored or saved stays, and the same command goes on"]


def test_an_error_of_an_encoder_is_the_same_in_a_process(
    tmp_path: Path, pictures: Path, tiny_model: Path, run_build: Build
) -> None:
    with pytest.raises(ConfigError, match=r"--device cuda:7\d cannot be used"):
        run_build([pictures], tmp_path / "store", tiny_model, device="cuda:70,cuda:71")


@pytest.mark.parametrize("setting", ["cuda:0,cpu", "auto,auto", "cuda:0,", ",", "cpu,mps"])
def test_devices_of_several_kinds_are_refused_before_anything_is_made(
    tmp_path: Path, pictures: Path, tiny_model: Path, run_build: Build, setting: str
) -> None:
    with pytest.raises(ConfigError, match="name devices of one kind"):
        run_build([pictures], tmp_path / "store", tiny_model, device=setting)
    assert not (tmp_path / "store").exists()


def test_what_devices_are_named() -> None:
    assert device_names("auto") == ("auto",)
    assert device_names("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert device_names("cpu,cpu") == ("cpu", "cpu")


def test_messages_come_through_whole() -> None:
    pipe = io.BytesIO()
    pixels = crops(2)[1].pixels
    write_message(pipe, {"keys": [b"k" * 16, None]}, [pixels, b"", b"xyz"])
    write_message(pipe, {}, [])
    pipe.seek(0)
    header, blobs = read_message(pipe)
    assert header["keys"] == [b"k" * 16, None]
    assert blobs == [pixels.tobytes(), b"", b"xyz"]
    assert read_message(pipe) == ({"blobs": []}, [])
    for length in range(1, pipe.tell() - 20, 997):
        with pytest.raises(EOFError):
            read_message(io.BytesIO(pipe.getvalue()[:length]))


def test_a_process_that_fails_says_so(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = EncoderProcess(SampleEncoder(tiny_model, "cpu", "nonsense", "moments", 1), "cpu", 1)  # type: ignore[arg-type]
    try:
        with pytest.raises(ExpertsError, match="the encoder on cpu failed, as said above; what was stored stays"):
            list(process.encoded(iter([("tag", crops(1))])))
    finally:
        process.close()
    assert capfd.readouterr().err.rstrip().endswith("AttributeError: module 'torch' has no attribute 'nonsense'")


@pytest.mark.parametrize(("device", "expected"), [("cpu", "float32"), ("cpu,cpu", "float32")])
def test_the_dtype_of_several_devices_is_that_of_one(
    tmp_path: Path, tiny_model: Path, run_build: Build, device: str, expected: str
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = model / "vae/config.json"
    config.write_text(config.read_text().replace('"force_upcast": true', '"force_upcast": false'))
    folder = write_shapes(tmp_path / "set", 1)
    run_build([folder], tmp_path / "store", model)
    report = run_build([folder], tmp_path / "store", model, device=device)
    assert report.reused == 1
    assert open_manifest(tmp_path / "store", "main").settings.build["encode"]["dtype"] == expected


# --- side by side ---


class Watched(SampleEncoder):
    """Says when each batch begins."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.begun = threading.Semaphore(0)
        self.batches: list[list[tuple[int, int]]] = []

    def encode_crops(self, crops: Sequence[Crop]) -> Any:
        self.batches.append([crop.size_hw for crop in crops])
        self.begun.release()
        return super().encode_crops(crops)


def test_the_encoder_works_while_a_batch_is_committed(tiny_model: Path) -> None:
    encoder = Watched(tiny_model, "cpu", "float32", "moments", 1)
    with LocalRunner(encoder) as runner:
        taken = 0
        for tag, records in runner.run((number, crops(2)) for number in range(8)):
            assert (tag, len(records)) == (taken, 2)
            assert encoder.begun.acquire(timeout=10)  # the one that is here
            if taken < 7:
                assert encoder.begun.acquire(timeout=10)  # and the next, though this one is not committed yet
                encoder.begun.release()
            taken += 1
    assert taken == 8


class Slow(Vae):
    """Takes a while for each batch."""

    def encode(self, pixels: torch.Tensor) -> Any:
        time.sleep(0.02)
        return super().encode(pixels)


class Counting(FolderSource):
    """Counts the reads of pictures."""

    reads = 0

    def scan(self) -> Iterator[Found | Skipped]:
        for item in super().scan():
            yield (
                Found(item.path, item.captions, partial(self._counted, item.path)) if isinstance(item, Found) else item
            )

    def _counted(self, path: str) -> bytes:
        self.reads += 1
        return self.read(path)


@pytest.mark.parametrize("batch", [1, 4])
def test_queues_bound_how_much_is_decoded_ahead(tmp_path: Path, tiny_model: Path, batch: int) -> None:
    folder = write_shapes(tmp_path / "set", 60)
    config = load_config(
        BuildConfig, sets=["images.resolution=64", "images.crop=square", f"encode.batch={batch}", "encode.threads=2"]
    )
    source = Counting(folder, "set", config.captions, config.images.max_bytes)
    ahead: list[int] = []

    class Looking(SampleEncoder):
        done = 0

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, load_vae=Slow)

        def encode_crops(self, crops: Sequence[Crop]) -> Any:
            made = super().encode_crops(crops)
            ahead.append(source.reads - 60 - self.done)  # the scan has read each once
            self.done += len(crops)
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache_builder.build.SampleEncoder", Looking)
        report = build([source], tiny_model, config, BuildOptions(tmp_path / "store", "main", "cpu"))
    assert report.stored == 60
    assert source.reads == 120
    in_threads, in_batches = 2 * batch + 2, 6 * batch  # waiting for their like, ready, being encoded
    assert batch < max(ahead) <= in_threads + in_batches + 1


def test_pictures_of_two_resolutions_share_no_batch_and_fill_each(
    tmp_path: Path, pictures: Path, tiny_model: Path, run_build: Build
) -> None:
    """Two data sets with the same pictures at two sizes: each is decoded once, crops of a size stay together."""
    text = "".join(
        f'[[datasets]]\nid = "{name}"\nroot = "{pictures}"\n[datasets.images]\nresolution = {size}\nstep = 64\n'
        'crop = "square"\n'
        for name, size in (("small", 64), ("large", 128))
    )
    (tmp_path / "two.toml").write_text("[images]\nresolution = 64\nstep = 64\n[encode]\nbatch = 4\n" + text)
    config = load_config(BuildConfig, [tmp_path / "two.toml"])
    sources = [Counting(pictures, name, config.captions, config.images.max_bytes) for name in ("small", "large")]
    encoders: list[Watched] = []

    def make(*arguments: Any) -> Watched:
        encoders.append(Watched(*arguments))
        return encoders[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache_builder.build.SampleEncoder", make)
        report = build(sources, tiny_model, config, BuildOptions(tmp_path / "store", "main", "cpu"))
    assert (report.seen, report.stored, report.encoded_crops) == (2 * COUNT, 2 * COUNT, 2 * COUNT)
    assert sum(source.reads for source in sources) == 3 * COUNT
    assert all(len(set(batch)) == 1 for batch in encoders[0].batches)
    assert [len(batch) for batch in encoders[0].batches] == [4] * (2 * COUNT // 4)


# --- out of memory ---


class Greedy(Vae):
    """Asks for more memory than there is where more than `most` pictures are encoded at once."""

    most = 2
    tries: ClassVar[list[int]] = []

    def encode(self, pixels: torch.Tensor) -> Any:
        self.tries.append(len(pixels))
        if len(pixels) > self.most:
            torch.empty(1 << 50, dtype=torch.uint8)
        return super().encode(pixels)


def test_a_batch_that_does_not_fit_is_halved_and_that_is_remembered(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Two(Greedy):
        most, tries = 2, []

    encoder = make_encoder(tiny_model, load_vae=Two)
    made = encoder.encode_crops(crops(8))
    assert Two.tries == [8, 4, 2, 2, 2, 2]
    assert [record and record[0] for record in made] == [crop.key for crop in crops(8)]
    for one, other in zip(made, make_encoder(tiny_model).encode_crops(crops(8)), strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(
            decode_record(*one).tensors["mean"], decode_record(*other).tensors["mean"], atol=0.02
        )
    encoder.encode_crops(crops(5))
    assert Two.tries[6:] == [2, 2, 1]
    encoder.encode_crops(crops(3, (48, 64)))
    assert Two.tries[9:] == [3, 1, 1, 1]
    said = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert said[0] == "out of memory with 8 pictures of 64 x 48 px on cpu: 4 at once from here on"
    assert len(said) == 3


def test_one_picture_that_does_not_fit_is_an_error_with_a_way_out(tiny_model: Path) -> None:
    class Never(Greedy):
        most, tries = 0, []

    with pytest.raises(
        ConfigError, match=r"--device cpu has no memory for one of the pictures of 64 x 48 px: lower images.resolution"
    ):
        make_encoder(tiny_model, load_vae=Never).encode_crops(crops(3))
    assert Never.tries == [3, 1]


def test_other_errors_are_not_taken_for_full_memory(tiny_model: Path) -> None:
    class Broken(Vae):
        def encode(self, pixels: torch.Tensor) -> Any:
            return torch.zeros(2) @ torch.zeros(3)

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        make_encoder(tiny_model, load_vae=Broken).encode_crops(crops(4))


def test_a_build_that_runs_short_of_memory_seals_the_same(
    tmp_path: Path, pictures: Path, one_device: Path, tiny_model: Path, run_build: Build
) -> None:
    class Three(Greedy):
        most, tries = 3, []

    def make(*arguments: Any) -> SampleEncoder:
        return SampleEncoder(*arguments, load_vae=Three)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache_builder.build.SampleEncoder", make)
        report = run_build([pictures], tmp_path / "store", tiny_model)
    assert max(Three.tries) == 4
    assert report.stored == COUNT
    assert report.digest == open_manifest(one_device, "main").digest
    assert keys_of(tmp_path / "store") == keys_of(one_device)
