"""A build end to end: rows and records are true, what is stored is reused, what goes wrong costs what it must."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_builder.buckets import CropPlan, make_buckets, nearest_bucket, plan_crop
from cache_builder.keys import facts_key, image_digest, sample_id, text_facts_key, text_key
from cache_builder.report import BuildReport
from shared.errors import DataError, ManifestMismatch
from shared.manifest import open_manifest
from shared.manifest_rows import ManifestRow
from shared.pictures import PixelLimits, PixelRules, decode
from shared.record import Record
from shared.store import StoreReader
from shared.text_encoders import TextEncoders, read_text_facts
from shared.vae import read_vae_facts
from tests.pictures import crop, thumbnail, write_shapes

FP16: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}
LATENTS: dict[str, Any] = {
    "rtol": 2e-3,
    "atol": 3e-2,
}  # they spread by 8; the CPU's convolutions differ with the size of a batch
Build = Callable[..., BuildReport]


def rows_of(store: Path, name: str = "main") -> list[ManifestRow]:
    manifest = open_manifest(store, name)
    return manifest.rows(range(len(manifest)))


def read(store: Path, key: bytes) -> Record:
    with StoreReader(store) as reader, reader.snapshot() as snapshot:
        return snapshot.read(key)


def account(report: BuildReport) -> tuple[int, int, int, int, int]:
    report.check()
    quarantined, skipped = len(report.quarantined), report.skipped.total()
    return report.stored, report.reused, quarantined, skipped, report.duplicate


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures: drawn ones, one turned by EXIF, one half transparent, one in a folder below."""
    folder = write_shapes(tmp_path_factory.mktemp("data") / "pictures", 8)
    (folder / "below").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(folder / "shape-00001.png").resize((150, 90)).save(folder / "below/turned.jpg", exif=turned)
    (folder / "below/turned.caption").write_text("a turned one\nand once more\n")
    glass = Image.new("RGBA", (70, 100), (200, 10, 10, 90))
    glass.save(folder / "glass.png")
    (folder / "glass.txt").write_text("red glass " * 60)
    write_shapes(folder / "below/again", 1, seed=5)
    return folder


@pytest.fixture(scope="module")
def built(pictures: Path, tiny_model: Path, run_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of those pictures."""
    store = tmp_path_factory.mktemp("built") / "store"
    report = run_build([pictures], store, tiny_model, "split.eval_fraction=0.3")
    assert account(report) == (11, 0, 0, 0, 0)
    assert (report.captions, report.unique_captions, report.encoded_captions) == (16, 16, 17)  # and the empty one
    assert report.truncated == 1
    return store


def test_rows_say_what_was_done(pictures: Path, built: Path, tiny_model: Path) -> None:
    rows = rows_of(built)
    buckets = make_buckets(64, 16)
    text = read_text_facts(tiny_model)
    assert {row.path for row in rows} == {
        str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.suffix in (".png", ".jpg")
    }
    assert len({row.bucket_hw for row in rows}) > 2
    assert {row.split for row in rows} == {"train", "eval"}
    for row in rows:
        data = (pictures / row.path).read_bytes()
        pixels = decode(data, PixelRules(), PixelLimits())
        captions = (
            next(
                path
                for path in (pictures / row.path).parent.glob(f"{Path(row.path).stem}.*[nt]")
                if "g" not in path.suffix
            )
            .read_text()
            .splitlines()
        )
        assert row.dataset == "pictures"
        assert row.image_digest == image_digest(data)
        assert row.sample_id == sample_id("pictures", row.image_digest)
        assert row.original_hw == pixels.shape[:2]
        assert row.bucket_hw == nearest_bucket(row.original_hw, buckets)
        plan = plan_crop(row.original_hw, row.bucket_hw, "center")
        (variant,) = row.variants
        assert (variant.crop_top_left, variant.target_hw) == ((plan.box_top, plan.box_left), plan.target_hw)
        assert not variant.flip
        assert row.text_keys == tuple(text_key(caption.strip(), 1, text.digests) for caption in captions)


def test_latents_are_those_of_the_crop(pictures: Path, built: Path, tiny_model: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_model / "vae").eval()
    rules = PixelRules()
    for row in rows_of(built):
        pixels = decode((pictures / row.path).read_bytes(), rules, PixelLimits())
        cut = crop(pixels, plan_crop(row.original_hw, row.bucket_hw, "center"), rules)
        with torch.inference_mode():
            x = torch.from_numpy(cut).permute(2, 0, 1)[None].float() / 127.5 - 1
            moments = vae.encode(x).latent_dist
        record = read(built, row.variants[0].latent_key)
        h, w = row.bucket_hw
        held = {name: (tensor.dtype.name, tensor.shape) for name, tensor in record.tensors.items()}
        assert held == dict.fromkeys(("mean", "logvar"), ("float16", (4, h // 8, w // 8)))
        np.testing.assert_allclose(record.tensors["mean"], moments.mean[0].numpy(), **LATENTS)
        np.testing.assert_allclose(record.tensors["logvar"], moments.logvar[0].numpy(), **FP16)
        facts = read(built, facts_key(row.image_digest, rules))
        assert facts.meta["original_hw"] == list(row.original_hw)
        np.testing.assert_array_equal(facts.tensors["thumbnail"], thumbnail(pixels))


def test_texts_are_those_of_the_encoders(built: Path, tiny_model: Path) -> None:
    encoders = TextEncoders(tiny_model, "cpu")
    settings = open_manifest(built, "main").settings
    keys = {key for row in rows_of(built) for key in row.text_keys} | {bytes.fromhex(settings.null_text_key)}
    captions = []
    for key in keys:
        record = read(built, key)
        caption, count = record.meta["caption"], encoders.count(record.meta["caption"])
        captions.append(caption)
        embeds = encoders.encode([caption])
        assert text_key(caption, 1, settings.text_digests) == key
        assert (record.meta["tokens"], record.meta["truncated"]) == (count.tokens, count.truncated)
        assert dict(read(built, text_facts_key(key)).meta) == {"tokens": count.tokens, "truncated": count.truncated}
        np.testing.assert_allclose(record.tensors["prompt_embeds"], embeds.prompt_embeds[0].numpy(), **FP16)
        np.testing.assert_allclose(
            record.tensors["pooled_prompt_embeds"], embeds.pooled_prompt_embeds[0].numpy(), **FP16
        )
        assert record.tensors["prompt_embeds"].shape == (77, sum(settings.text_widths))
        assert record.tensors["pooled_prompt_embeds"].shape == (settings.pooled_width,)
    assert "" in captions
    assert "a turned one" in captions
    assert len(set(captions)) == 17


def test_the_manifest_says_how_it_was_made(built: Path, tiny_model: Path) -> None:
    settings = open_manifest(built, "main").settings
    vae, text = read_vae_facts(tiny_model), read_text_facts(tiny_model)
    assert (settings.vae_digest, settings.scaling_factor, settings.downscale) == (vae.digest, 0.13025, 8)
    assert (settings.text_digests, settings.text_widths, settings.pooled_width) == (text.digests, (32, 64), 48)
    assert settings.zeros_for_empty_prompt
    assert settings.datasets == ("pictures",)
    assert settings.build["images"]["resolution"] == 64
    assert settings.build["encode"] == {"dtype": "float32", "latents": "moments"}


def test_the_same_build_again_stores_nothing(pictures: Path, built: Path, tiny_model: Path, run_build: Build) -> None:
    before = (built / "data.mdb").read_bytes()
    report = run_build([pictures], built, tiny_model, "split.eval_fraction=0.3")
    assert account(report) == (0, 11, 0, 0, 0)
    assert (report.encoded_captions, report.truncated) == (0, 1)
    assert report.digest == open_manifest(built, "main").digest
    assert len(list((built / "manifests/main").glob("*.arrow"))) == 1
    assert (built / "data.mdb").read_bytes() == before


def test_nothing_to_encode_needs_no_torch(
    pictures: Path, built: Path, tiny_model: Path, arguments_of: Callable[..., list[str]]
) -> None:
    program = (
        "import atexit, sys\n"
        "heavy = ('torch', 'diffusers', 'transformers')\n"
        "atexit.register(lambda: print('heavy:', [name for name in heavy if name in sys.modules]))\n"
        "from cache_builder.cli import cache_build\n"
        "cache_build()\n"
    )
    arguments = arguments_of(pictures, built, tiny_model, "--set", "split.eval_fraction=0.3")
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert '"reused": 11' in done.stdout
    assert "heavy: []" in done.stdout
    assert done.stderr == ""


def test_the_same_bytes_twice_are_one_sample_with_all_captions(
    tmp_path: Path, tiny_model: Path, run_build: Build
) -> None:
    folder = write_shapes(tmp_path / "set", 2)
    for name, caption in (("a/copy.png", "of a\nof both"), ("zz.png", "of both\nof z")):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "shape-00001.png", folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    report = run_build([folder], tmp_path / "store", tiny_model)
    assert account(report) == (2, 0, 0, 0, 2)
    row = next(row for row in rows_of(tmp_path / "store") if row.path == "a/copy.png")
    own = (folder / "shape-00001.txt").read_text().splitlines()
    captions = [read(tmp_path / "store", key).meta["caption"] for key in row.text_keys]
    assert captions == ["of a", "of both", *own, "of z"]


def test_two_data_sets_share_records(tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    one, two = write_shapes(tmp_path / "one", 3), write_shapes(tmp_path / "two", 5)
    report = run_build([one, two], tmp_path / "store", tiny_model)
    assert account(report) == (5, 3, 0, 0, 0)
    rows = rows_of(tmp_path / "store")
    assert [row.dataset for row in rows] == ["one"] * 3 + ["two"] * 5
    keys = {(row.dataset, row.path): row.variants[0].latent_key for row in rows}
    assert keys["one", "shape-00001.png"] == keys["two", "shape-00001.png"]
    assert len(set(keys.values())) == 5
    assert len({row.sample_id for row in rows}) == 8
    again = run_build([two, one], tmp_path / "store", tiny_model)
    assert account(again) == (0, 8, 0, 0, 0)
    assert again.digest == report.digest


def test_batches_and_threads_change_no_digest(
    tmp_path: Path, pictures: Path, tiny_model: Path, run_build: Build
) -> None:
    reports = [
        run_build(
            [pictures],
            tmp_path / str(i),
            tiny_model,
            f"encode.batch={batch}",
            f"encode.threads={threads}",
            f"encode.text_batch={batch}",
        )
        for i, (batch, threads) in enumerate([(1, 1), (16, 4)])
    ]
    assert len({report.digest for report in reports}) == 1
    for one, other in zip(rows_of(tmp_path / "0"), rows_of(tmp_path / "1"), strict=True):
        a, b = (read(tmp_path / str(i), one.variants[0].latent_key) for i in range(2))
        np.testing.assert_allclose(a.tensors["mean"], b.tensors["mean"], **LATENTS)
        assert one == other


def test_bad_pictures_are_set_aside_and_the_build_goes_on(tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    folder = write_shapes(tmp_path / "set", 4)
    whole = (folder / "shape-00000.png").read_bytes()
    Image.new("RGB", (1, 200)).save(folder / "thin.png")
    for name, data in {"cut": whole[:-60], "text": b"no picture", "empty": b"", "thin": None}.items():
        (folder / f"{name}.txt").write_text("a caption of its own: " + name)
        if data is not None:
            (folder / f"{name}.png").write_bytes(data)
    report = run_build([folder], tmp_path / "store", tiny_model, "max_quarantined=0.5")
    assert account(report) == (4, 0, 4, 0, 0)
    assert sorted(path for path, _ in report.quarantined) == ["cut.png", "empty.png", "text.png", "thin.png"]
    assert all(reason for _, reason in report.quarantined)
    assert len(rows_of(tmp_path / "store")) == 4
    with pytest.raises(DataError, match=r"4 of 8 pictures cannot be used \(first .*max_quarantined = 0.4; nothing was"):
        run_build([folder], tmp_path / "other", tiny_model, "max_quarantined=0.4")
    assert not (tmp_path / "other/manifests").exists()
    rest = run_build([folder], tmp_path / "other", tiny_model, "max_quarantined=0.5")
    assert account(rest) == (0, 4, 4, 0, 0)


def test_a_manifest_of_nothing_is_never_sealed(tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    folder = write_shapes(tmp_path / "set", 2)
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="2 of 2 pictures cannot be used"):
        run_build([folder], tmp_path / "store", tiny_model, "max_quarantined=1")
    assert not (tmp_path / "store/manifests").exists()


def test_what_changes_between_scan_and_decoding_is_set_aside(
    tmp_path: Path, tiny_model: Path, run_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shapes(tmp_path / "set", 6)
    from cache_builder.fill import Filler

    encode_captions = Filler.encode_captions

    def edit(self: Filler, *arguments: Any) -> bytes:  # between the two passes
        shutil.copy(folder / "shape-00001.png", folder / "shape-00000.png")
        (folder / "shape-00002.png").unlink()
        return encode_captions(self, *arguments)

    monkeypatch.setattr(Filler, "encode_captions", edit)
    report = run_build([folder], tmp_path / "store", tiny_model, "max_quarantined=0.5")
    assert account(report) == (4, 0, 2, 0, 0)
    assert dict(report.quarantined) == {
        "shape-00000.png": "changed since it was scanned; run the same command again",
        "shape-00002.png": "cannot be read: No such file or directory",
    }
    assert {row.path for row in rows_of(tmp_path / "store")} == {f"shape-0000{i}.png" for i in (1, 3, 4, 5)}
    monkeypatch.undo()
    assert account(run_build([folder], tmp_path / "store", tiny_model)) == (0, 4, 0, 0, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_latents_that_are_not_finite_are_never_stored(
    tmp_path: Path, tiny_model: Path, run_build: Build, bad: float
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["quant_conv.weight"][0, 0] = bad  # a latent of more than fp16 holds is infinite when stored
    save_file(tensors, weights)
    folder = write_shapes(tmp_path / "set", 3)
    with pytest.raises(DataError, match=r"3 of 3 .*its latents are not finite"):
        run_build([folder], tmp_path / "store", model)
    with StoreReader(tmp_path / "store") as reader, reader.snapshot() as snapshot:
        digests = [image_digest(path.read_bytes()) for path in folder.glob("*.png")]
        assert not any(snapshot.has(facts_key(digest, PixelRules())) for digest in digests)
    assert account(run_build([folder], tmp_path / "store", tiny_model)) == (3, 0, 0, 0, 0)


def test_a_name_keeps_its_data_sets_and_its_size(
    tmp_path: Path, tiny_model: Path, run_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = write_shapes(tmp_path / "set", 10), tmp_path / "store"
    first = run_build([folder], store, tiny_model)
    monkeypatch.setattr("cache_builder.scan.Scanner.scan", pytest.fail)  # said before anything is looked at
    with pytest.raises(ManifestMismatch, match=r"of data sets set, this build of other: .*--replace"):
        run_build([folder], store, tiny_model, datasets=["other"])
    monkeypatch.undo()
    for index in range(2):
        (folder / f"shape-0000{index}.png").unlink()
    with pytest.raises(ManifestMismatch, match=r"has 10 samples and would keep 8.*--allow-shrink"):
        run_build([folder], store, tiny_model)
    assert open_manifest(store, "main").digest == first.digest
    assert account(run_build([folder], store, tiny_model, allow_shrink=True)) == (0, 8, 0, 0, 0)
    replaced = run_build([folder], store, tiny_model, datasets=["other"], replace=True)
    assert open_manifest(store, "main").digest == replaced.digest
    assert open_manifest(store, "main", first.digest).digest == first.digest  # runs go on with what they began with


def test_a_damaged_facts_record_costs_nothing_but_time(tmp_path: Path, tiny_model: Path, run_build: Build) -> None:
    folder, store = write_shapes(tmp_path / "set", 3), tmp_path / "store"
    first = run_build([folder], store, tiny_model)
    key = facts_key(image_digest((folder / "shape-00000.png").read_bytes()), PixelRules())
    data = bytearray((store / "data.mdb").read_bytes())
    at = 0
    while (at := data.find(b"SXRC", at)) >= 0:  # its frame: the key stands 16 bytes on
        if data[at + 16 : at + 32] == key:
            data[at + 60] ^= 1
        at += 4
    (store / "data.mdb").write_bytes(data)
    again = run_build([folder], store, tiny_model)
    assert account(again) == (1, 2, 0, 0, 0)
    assert again.digest == first.digest


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, of which one tells a side and one has room for one crop alone."""
    folder = write_shapes(tmp_path_factory.mktemp("varied") / "set", 5)
    for index, size in enumerate([(70, 300), (300, 70), (64, 64), (100, 90), (90, 70)]):
        path = folder / f"shape-0000{index}.png"
        Image.open(path).resize(size[::-1], Image.Resampling.LANCZOS).save(path)
        path.with_suffix(".txt").write_text("a shape at the left" if index == 3 else f"a, b, c {index}")
    return folder


VARIED = (
    "images.crop=random",
    "images.variants=3",
    "images.flip=on",
    "images.buckets=[[64, 64], [48, 80]]",
    "images.downsample_to=72",
    "captions.variants={count = 3, drop = 0.2}",
    "captions.trigger=sks",
    "max_quarantined=0.5",
)


def test_every_variant_is_a_crop_with_latents_of_its_own(
    tmp_path: Path, varied: Path, tiny_model: Path, run_build: Build
) -> None:
    from diffusers import AutoencoderKL

    report = run_build([varied], tmp_path / "store", tiny_model, *VARIED)
    assert account(report) == (5, 0, 0, 0, 0)
    assert (report.sided, report.crops, report.encoded_crops) == (1, 23, 23)
    assert "crops 23, 23 encoded now" in report.as_text().splitlines()
    vae, rules = AutoencoderKL.from_pretrained(tiny_model / "vae").eval(), PixelRules()
    counts = {}
    for row in rows_of(tmp_path / "store"):
        pixels = decode((varied / row.path).read_bytes(), rules, PixelLimits())
        counts[row.path[-5]] = (len(row.variants), sum(variant.flip for variant in row.variants))
        for variant in row.variants:
            resize_hw = plan_crop(row.original_hw, row.bucket_hw, "center", downsample_px=72).resize_hw
            top, left = variant.crop_top_left
            assert variant.target_hw == row.bucket_hw
            seen = pixels[:, ::-1] if variant.flip else pixels  # time_ids are those of the picture as it is seen
            cut = crop(np.ascontiguousarray(seen), CropPlan(resize_hw, top, left, row.bucket_hw), rules)
            with torch.inference_mode():
                moments = vae.encode(torch.from_numpy(cut).permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist
            held = read(tmp_path / "store", variant.latent_key).tensors["mean"]
            assert np.abs(held - moments.mean[0].numpy()).mean() < 0.02
        texts = [read(tmp_path / "store", key).meta["caption"] for key in row.text_keys]
        assert all(text.startswith("sks") for text in texts)
    assert counts == {"0": (6, 3), "1": (6, 3), "2": (2, 1), "3": (3, 0), "4": (6, 3)}


def test_variants_are_reused_one_by_one(tmp_path: Path, varied: Path, tiny_model: Path, run_build: Build) -> None:
    store, encoded = tmp_path / "store", []
    from cache_builder.encode import SampleEncoder

    class Counting(SampleEncoder):
        def encode_crops(self, crops: Any) -> Any:
            encoded.extend(crop.key for crop in crops)
            return super().encode_crops(crops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache_builder.build.SampleEncoder", Counting)
        first = run_build([varied], store, tiny_model, *VARIED[:1], *VARIED[3:])
        assert len(encoded) == 5
        assert account(run_build([varied], store, tiny_model, *VARIED)) == (5, 0, 0, 0, 0)
        keys = {variant.latent_key for row in rows_of(store) for variant in row.variants}
        assert len(encoded) == len(set(encoded)) == len(keys) == 23  # each crop just once over both builds
        twice = run_build([varied, varied], store, tiny_model, *VARIED, datasets=["set", "other"], replace=True)
        assert account(twice) == (0, 10, 0, 0, 0)
        back = run_build([varied], store, tiny_model, *VARIED[:1], *VARIED[3:], replace=True, allow_shrink=True)
        assert (account(back), back.digest) == ((0, 5, 0, 0, 0), first.digest)
        assert len(encoded) == 23


def test_a_sample_that_lacks_one_of_its_variants_is_set_aside(
    tmp_path: Path, varied: Path, tiny_model: Path, run_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cache_builder.encode import SampleEncoder

    encode, spoiled = SampleEncoder.encode_crops, []

    def spoil(self: SampleEncoder, crops: Any) -> Any:
        framed = encode(self, crops)
        if not spoiled and len(framed) > 2:
            spoiled.append(crops[1].key)
            framed[1] = None
        return framed

    monkeypatch.setattr(SampleEncoder, "encode_crops", spoil)
    report = run_build([varied], tmp_path / "store", tiny_model, *VARIED)
    assert account(report) == (4, 0, 1, 0, 0)
    assert [reason for _, reason in report.quarantined] == ["its latents are not finite"]
    monkeypatch.undo()
    mended = run_build([varied], tmp_path / "store", tiny_model, *VARIED)
    assert account(mended) == (1, 4, 0, 0, 0)
    assert mended.digest == run_build([varied], tmp_path / "fresh", tiny_model, *VARIED).digest


def test_a_build_that_broke_off_between_two_crops_goes_on_with_the_rest(
    tmp_path: Path, varied: Path, tiny_model: Path, run_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cache_builder.encode import SampleEncoder

    encode, encoded = SampleEncoder.encode_crops, []

    def break_off(self: SampleEncoder, crops: Any) -> Any:
        if len(encoded) >= 8:
            raise KeyboardInterrupt
        encoded.extend(crop.key for crop in crops)
        return encode(self, crops)

    monkeypatch.setattr(SampleEncoder, "encode_crops", break_off)
    with pytest.raises(KeyboardInterrupt):
        run_build([varied], tmp_path / "store", tiny_model, *VARIED)
    monkeypatch.undo()
    rest = run_build([varied], tmp_path / "store", tiny_model, *VARIED)
    assert rest.encoded_crops == 23 - len(encoded)
    assert rest.stored + rest.reused == 5
    assert rest.digest == run_build([varied], tmp_path / "fresh", tiny_model, *VARIED).digest


def test_batches_of_variants_change_no_digest(tmp_path: Path, varied: Path, tiny_model: Path, run_build: Build) -> None:
    small = run_build([varied], tmp_path / "1", tiny_model, *VARIED, "encode.batch=1", "encode.threads=1")
    large = run_build([varied], tmp_path / "2", tiny_model, *VARIED, "encode.batch=16", "encode.threads=4")
    assert small.digest == large.digest


KINDS = ("good", "twin", "cut", "thin", "no caption", "bad caption", "link", "text")


@settings(max_examples=12)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=14), missing=st.sampled_from(["skip", "empty"]))
def test_everything_seen_is_accounted_for(
    kinds: list[str], missing: str, tiny_model: Path, run_build: Build, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, shared = tmp_path_factory.mktemp("mixture"), tmp_path_factory.getbasetemp() / "mixtures"
    drawn = write_shapes(tmp_path_factory.mktemp("drawn"), len(kinds))
    twin = (drawn / "shape-00000.png").read_bytes()
    for index, kind in enumerate(kinds):
        picture, caption = folder / f"{index:02}.png", folder / f"{index:02}.txt"
        data = (drawn / f"shape-{index:05d}.png").read_bytes() + f"{kind} {index}".encode()
        caption.write_bytes(b"a \xff" if kind == "bad caption" else f"picture {index}".encode())
        match kind:
            case "link":
                picture.symlink_to(drawn / "shape-00000.png")
                continue
            case "no caption":
                caption.unlink()
            case "twin":
                data = twin + b"twin"
            case "cut":
                data = data[:100]
            case "thin":
                Image.new("RGB", (2, 400 + index)).save(drawn / "thin.png")
                data = (drawn / "thin.png").read_bytes()
            case "text":
                data = b"not a picture " + bytes([index])
        picture.write_bytes(data)
    count = {kind: kinds.count(kind) for kind in KINDS}
    uncaptioned = count["no caption"] if missing == "skip" else 0
    bad = count["cut"] + count["thin"] + count["text"]
    usable = count["good"] + min(count["twin"], 1) + count["no caption"] - uncaptioned
    options = (f"captions.missing={missing}", "max_quarantined=1", "images.max_pixels=100000")
    if not usable:
        with pytest.raises(DataError, match="can"):
            run_build([folder], shared, tiny_model, *options, replace=True, allow_shrink=True)
        return
    report = run_build([folder], shared, tiny_model, *options, replace=True, allow_shrink=True)
    stored, reused, *others = account(report)
    assert report.seen == len(kinds)
    assert stored + reused == usable
    assert others == [bad, count["link"] + count["bad caption"] + uncaptioned, max(count["twin"] - 1, 0)]
    assert len(rows_of(shared)) == usable
    assert report.as_text().startswith(f"seen {len(kinds)} = stored {stored} + reused {reused} + ")
    again = run_build([folder], shared, tiny_model, *options)
    assert account(again) == (0, usable, *others)
    assert again.digest == report.digest


def test_the_report_reads_well() -> None:
    report = BuildReport(seen=40, stored=10, reused=3, duplicate=1, captions=20, unique_captions=18, manifest="main")
    report.skipped.update({"no caption": 1})
    report.quarantined = [(f"bad\n{index}.png", "damaged\x1b[31m") for index in range(25)]
    report.digest, report.seconds = "ab" * 32, 2.04
    report.check()
    lines = report.as_text().splitlines()
    assert lines[0] == "seen 40 = stored 10 + reused 3 + quarantined 25 + skipped 1 + duplicate 1"
    assert lines[2] == "  skipped 1: no caption"
    assert lines[3] == r"  quarantined bad\n0.png: damaged\x1b[31m"
    assert lines[-2] == "  and 5 more (--json lists all)"
    assert lines[-1] == "manifest main abababababababab in 2.0 s"
    assert len(lines) == 25
    assert len(report.as_json()["quarantined_files"]) == 25
    report.skipped.update(f"caption: not UTF-8 at byte {index}" for index in range(30))
    assert "  and for 11 more reasons (--json lists all)" in report.as_text().splitlines()
    report.skipped = Counter({"no caption": 1})
    report.stored += 1
    with pytest.raises(AssertionError, match="saw 40 pictures and accounts for 41"):
        report.check()
