"""Untrusted bytes to pixels: right in every format, mode and orientation, or PictureError and nothing else."""

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from cache_builder.buckets import CropPlan, plan_crop
from cache_builder.pixels import difference_hashes
from shared.errors import ConfigError, DataError
from shared.pictures import EXTENSIONS, PictureError, PixelLimits, PixelRules, Pixels, decode, read_size
from tests.pictures import crop, thumbnail

RULES, LIMITS = PixelRules(), PixelLimits()
ON_RED = PixelRules(background_rgb=(255, 0, 0))
SAVE: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4", "speed": 10},
    "TIFF": {},
    "GIF": {},
    "BMP": {},
}
LOSSY = {"JPEG": 4, "AVIF": 6, "GIF": 40}  # mean levels, generous: colours are few in a GIF


def picture(h: int, w: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: soft shapes, edges, some grain."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(soft).astype(np.int16)
    y, x = np.mgrid[0:h, 0:w]
    for _ in range(4):
        top, left, radius = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(0.1, 0.3) * min(h, w)
        pixels = np.where((np.hypot(y - top, x - left) < radius)[..., None], rng.integers(0, 256, 3), pixels)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8))


def save(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **(SAVE[form] | options))
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(h: int, w: int, depth: int, colour: int, rows: bytes, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG by hand, for what Pillow does not write; `rows` with their filter bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n", header, *before, chunk(b"IDAT", zlib.compress(rows)), after, chunk(b"IEND", b"")]
    return b"".join(parts)


def tiff(h: int, w: int, depth: int, samples: bytes) -> bytes:
    """A grey TIFF by hand."""
    tags = {256: w, 257: h, 258: depth, 259: 1, 262: 1, 273: 8, 277: 1, 278: h, 279: len(samples)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    body = samples + b"\0" * (len(samples) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def decoded(data: bytes, rules: PixelRules = RULES) -> list[Any]:
    """The first row."""
    row: list[Any] = decode(data, rules, LIMITS)[0].tolist()
    return row


def greys(data: bytes, rules: PixelRules = RULES) -> list[int]:
    row = decode(data, rules, LIMITS)[0]
    assert (row == row[:, :1]).all()
    return [int(value) for value in row[:, 0]]


def oriented(image: Image.Image, orientation: int) -> Image.Image:
    """The stored picture that `orientation` turns back into `image`."""
    methods = Image.Transpose
    back = [None, methods.FLIP_LEFT_RIGHT, methods.ROTATE_180, methods.FLIP_TOP_BOTTOM, methods.TRANSPOSE]
    back += [methods.ROTATE_90, methods.TRANSVERSE, methods.ROTATE_270]
    method = back[orientation - 1]
    return image if method is None else image.transpose(method)


@pytest.mark.parametrize("form", SAVE)
def test_every_format(form: str) -> None:
    image = picture(40, 60)
    data = save(image, form)
    pixels = decode(data, RULES, LIMITS)
    assert read_size(data, LIMITS) == (40, 60)
    assert pixels.shape == (40, 60, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.asarray(image)).mean() <= LOSSY.get(form, 0)
    assert {".png", ".jpg", ".jpeg", ".webp", ".avif", ".tiff", ".gif", ".bmp"} <= EXTENSIONS


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(form: str, orientation: int) -> None:
    image = picture(24, 40)
    exif = Image.Exif()
    exif[274] = orientation
    data = save(oriented(image, orientation), form, exif=exif)
    assert read_size(data, LIMITS) == (24, 40)
    assert np.abs(decode(data, RULES, LIMITS).astype(int) - np.asarray(image)).mean() <= LOSSY.get(form, 0)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"", b"\0" * 40])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_nothing(form: str, exif: bytes) -> None:
    data = save(picture(24, 40), form, exif=exif)
    assert read_size(data, LIMITS) == decode(data, RULES, LIMITS).shape[:2] == (24, 40)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[274] = value
    assert decode(save(picture(24, 40), "JPEG", exif=exif), RULES, LIMITS).shape == (24, 40, 3)


def test_orientation_in_xmp_gives_one_size() -> None:
    xmp = b'<x tiff:Orientation="6"/>'
    for data in (save(picture(24, 40), "TIFF", tiffinfo={700: xmp}), save(picture(24, 40), "JPEG", xmp=xmp)):
        assert read_size(data, LIMITS) == decode(data, RULES, LIMITS).shape[:2]


def test_the_size_of_a_png_needs_no_pixels() -> None:
    damaged = save(picture(64, 64))[:200]
    assert read_size(damaged, LIMITS) == (64, 64)
    with pytest.raises(PictureError):
        decode(damaged, RULES, LIMITS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_opaque_modes(mode: str) -> None:
    image = picture(20, 30).convert(mode)
    for form in ("PNG", "TIFF", "BMP", *(["GIF"] if mode != "RGB" else [])):
        assert np.array_equal(decode(save(image, form), ON_RED, LIMITS), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "form"), [("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("PA", "TIFF")])
def test_alpha_shows_the_background(mode: str, form: str) -> None:
    image = Image.new("RGBA", (4, 1), (100, 100, 100, 255))
    for x, alpha in enumerate((0, 51, 204, 255)):
        image.putpixel((x, 0), (100, 100, 100, alpha))
    row = decoded(save(image.convert(mode), form, **({"exact": True} if form == "WEBP" else {})), ON_RED)
    assert row == [[255, 0, 0], [224, 20, 20], [131, 80, 80], [100, 100, 100]]
    assert decoded(save(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))) == [[255, 255, 255]]


def test_transparent_palettes() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    image.putdata([0, 1, 2])
    red = [255, 0, 0]
    assert decoded(save(image, "PNG", transparency=1), ON_RED) == [[10] * 3, red, [30] * 3]
    assert decoded(save(image, "GIF", transparency=1), ON_RED) == [[10] * 3, red, [30] * 3]
    half = decoded(save(image, "PNG", transparency=bytes([255, 0, 51])), ON_RED)
    assert half == [[10] * 3, red, [210, 6, 6]]


def test_the_transparent_colour_of_a_png_has_the_depth_of_the_file() -> None:
    red = [255, 0, 0]

    def transparent(*samples: int) -> bytes:
        return chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))

    assert decoded(png(1, 2, 1, 0, b"\0\x40", transparent(1)), ON_RED) == [[0] * 3, red]
    assert decoded(png(1, 4, 2, 0, b"\0\x1b", transparent(1)), ON_RED) == [[0] * 3, red, [170] * 3, [255] * 3]
    assert decoded(png(1, 2, 4, 0, b"\0\x1f", transparent(1)), ON_RED) == [red, [255] * 3]
    assert decoded(png(1, 2, 8, 0, b"\0\x05\x06", transparent(5)), ON_RED) == [red, [6] * 3]
    assert decoded(png(1, 2, 8, 2, b"\0\1\2\3\4\5\6", transparent(1, 2, 3)), ON_RED) == [red, [4, 5, 6]]
    grey16 = png(1, 3, 16, 0, b"\0" + struct.pack(">3H", 500, 501, 65535), transparent(500))
    assert decoded(grey16, ON_RED) == [red, [2] * 3, [255] * 3]
    colour16 = png(
        1,
        2,
        16,
        2,
        b"\0" + struct.pack(">6H", 0x1234, 0x2345, 0x3456, *[0x4444] * 3),
        transparent(0x1234, 0x2345, 0x3456),
    )
    assert decoded(colour16, ON_RED) == [red, [0x44] * 3]


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    samples = np.array([[0, 128, 129, 257 * 10, 257 * 128, 65535]], np.uint16)
    expected = [0, 0, 1, 10, 128, 255]
    big_endian = Image.frombytes("I;16B", (6, 1), samples.astype(">u2").tobytes())
    assert greys(save(Image.fromarray(samples), "PNG")) == expected
    assert greys(save(Image.fromarray(samples), "TIFF")) == expected
    assert greys(save(big_endian, "TIFF")) == expected
    assert greys(save(Image.fromarray(samples.astype(np.int32)), "TIFF")) == expected
    assert greys(save(Image.fromarray(samples), "TIFF", tiffinfo={262: 0})) == [255 - level for level in expected]


def test_twelve_bit_grey_is_scaled_by_its_own_white() -> None:
    assert greys(tiff(1, 4, 12, bytes.fromhex("000fff800010"))) == [0, 255, 128, 1]


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.full((2, 2), 0.5, np.float32), "floating-point"),
        (np.full((2, 2), 70000, np.int32), "beyond 16 bits"),
        (np.full((2, 2), -1, np.int32), "beyond 16 bits"),
    ],
)
def test_samples_without_a_white_are_refused(samples: Any, reason: str) -> None:
    with pytest.raises(PictureError, match=reason):
        decode(save(Image.fromarray(samples), "TIFF"), RULES, LIMITS)


def test_cmyk_and_ycbcr() -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 40))
    for form in ("JPEG", "TIFF"):
        cmyk = decode(save(image.convert("CMYK"), form), RULES, LIMITS).astype(int)
        assert np.abs(cmyk - (200, 40, 40)).max() <= 3
    assert np.abs(decode(save(image.convert("YCbCr"), "TIFF"), RULES, LIMITS).astype(int) - (200, 40, 40)).max() <= 2


def profile_of(**tags: bytes) -> bytes:
    """sRGB with other bytes for some tags."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, content in tags.items():
        start, length = tag_of(bytes(icc), name.encode())
        icc[start : start + length] = content.ljust(length, b"\0")[:length]
    return bytes(icc)


def tag_of(icc: bytes, name: bytes) -> tuple[int, int]:
    for index in range(struct.unpack_from(">I", icc, 128)[0]):
        entry: tuple[bytes, int, int] = struct.unpack_from(">4sII", icc, 132 + 12 * index)
        if entry[0] == name:
            return entry[1], entry[2]
    raise LookupError(name)


def swapped_profile() -> bytes:
    """An RGB profile whose red is sRGB's green and whose green is its red."""
    icc = profile_of()
    red, green = (icc[start : start + length] for start, length in (tag_of(icc, b"rXYZ"), tag_of(icc, b"gXYZ")))
    return profile_of(rXYZ=green, gXYZ=red)


def new_profile(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    body, table, start = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    white = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s12x4s28x", size, b"", 0x02400000, device, space, connection, b"acsp") + white
    return header.ljust(128, b"\0") + table + body


def linear_grey_profile() -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return new_profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": white, b"kTRC": b"curv\0\0\0\0\0\0\0\1\1\0"})


def cmyk_profile() -> bytes:
    """Its cyan prints red: a table of 2^4 colours in Lab."""
    ramp = bytes(range(256))
    white, black, red = bytes([255, 128, 128]), bytes([0, 128, 128]), bytes([136, 208, 195])
    table = b"".join(black if k else red if c else white for c in (0, 1) for _ in range(4) for k in (0, 1))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return new_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def test_rgb_profiles_are_applied() -> None:
    for form in ("PNG", "WEBP", "TIFF", "JPEG", "AVIF"):
        data = save(Image.new("RGB", (16, 16), (250, 20, 30)), form, icc_profile=swapped_profile())
        assert np.abs(decode(data, RULES, LIMITS).astype(int) - (20, 250, 30)).max() <= 6, form
    alpha = save(Image.new("RGBA", (1, 1), (255, 0, 0, 51)), icc_profile=swapped_profile())
    assert np.abs(np.array(decoded(alpha, PixelRules(background_rgb=(0, 0, 255)))) - (0, 51, 204)).max() <= 1
    palette = save(Image.new("RGB", (1, 1), (255, 0, 0)).quantize(2), icc_profile=swapped_profile())
    assert np.abs(np.array(decoded(palette)) - (0, 255, 0)).max() <= 1


def test_grey_and_cmyk_profiles_are_applied() -> None:
    grey = Image.new("L", (4, 4), 128)
    assert abs(greys(save(grey, icc_profile=linear_grey_profile()))[0] - 188) <= 1  # half the light
    assert abs(greys(save(grey.convert("LA"), icc_profile=linear_grey_profile()))[0] - 188) <= 1
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for form in ("JPEG", "TIFF"):
        assert decoded(save(cyan, form))[0][0] <= 3
        red = decoded(save(cyan, form, icc_profile=cmyk_profile()))[0]
        assert np.abs(np.array(red) - (255, 0, 0)).max() <= 12


def test_an_srgb_profile_changes_no_byte() -> None:
    image = picture(40, 60)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(save(image, icc_profile=icc), RULES, LIMITS), np.asarray(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_profile_never_fails_a_picture(mode: str) -> None:
    image = Image.fromarray(np.full((4, 4), 999, np.uint16)) if mode == "I;16" else picture(4, 4).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    plain = decode(save(image, form), RULES, LIMITS)
    right = {"CMYK": "CMYK", "RGB": "RGB", "RGBA": "RGB"}.get(mode, "GRAY")
    profiles = {"RGB": swapped_profile(), "GRAY": linear_grey_profile(), "CMYK": cmyk_profile()}
    wrong = [profile for space, profile in profiles.items() if space != right]
    for icc in [*wrong, b"garbage", b"x" * 200, profiles[right][:150], b"\0" * 5_000_000]:
        if len(icc) < 1_000_000 or form != "PNG":
            assert np.array_equal(decode(save(image, form, icc_profile=icc), RULES, LIMITS), plain)


def test_only_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for form in ("GIF", "PNG", "WEBP", "AVIF", "TIFF"):
        options = {"save_all": True, "append_images": frames[1:]}
        data = save(frames[0], form, **options)
        assert np.abs(np.array(decoded(data)[0]) - (255, 0, 0)).max() <= 6, form


def huge() -> dict[str, bytes]:
    """Small files that ask for gigabytes."""
    big = 60_000
    gif = bytearray(save(picture(8, 8), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(save(picture(8, 8), "BMP"))
    bmp[18:26] = struct.pack("<ii", big, big)
    long_bmp = bytearray(bmp)
    long_bmp[18:26] = struct.pack("<ii", 1, 2**31 - 1)
    jpeg = bytearray(save(picture(8, 8), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 65500, 65500)
    vp8x = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2
    body = b"WEBP" + vp8x + save(picture(8, 8), "WEBP")[12:]
    return {
        "png": png(big, big, 8, 2, b"\0" * 1000),
        "png just over": png(8000, 8001, 1, 0, b"\0" * 1001 * 8000),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "bmp, one column": bytes(long_bmp),
        "jpeg": bytes(jpeg),
        "webp": b"RIFF" + struct.pack("<I", len(body)) + body,
        "tiff": tiff(big, big, 8, b"\0" * 64),
        "text": png(8, 8, 1, 0, b"\0\0" * 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 300_000_000, 1))),
        "international text": png(
            8, 8, 1, 0, b"\0\0" * 8, chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"\0" * 300_000_000, 1))
        ),
        "wide": png(1, 2**31 - 1, 8, 2, b"\0" * 1000),
        "profile": png(8, 8, 1, 0, b"\0\0" * 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(b"\0" * 99_000_000, 1))),
    }


def test_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    bombs = huge()
    assert len(bombs) >= 12
    for name, data in bombs.items():
        assert len(data) < 2_000_000
        (tmp_path / name).write_bytes(data)
    program = """if True:
        import pathlib, resource, sys
        from shared.pictures import *
        resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            data = path.read_bytes()
            for job in (lambda: read_size(data, PixelLimits()), lambda: decode(data, PixelRules(), PixelLimits())):
                try:
                    print(path.name, "passed", job())
                except PictureError as error:
                    assert error.exit_code == 65 and len(str(error).splitlines()) == 1
        if sys.platform == "linux":  # not ru_maxrss, which begins at the parent's
            status = pathlib.Path("/proc/self/status").read_text()
            assert int(status.split("VmHWM:")[1].split()[0]) < 200_000, status
    """
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_limits() -> None:
    data = save(picture(10, 10))
    assert read_size(data, PixelLimits(max_pixels=100)) == (10, 10)
    with pytest.raises(PictureError, match="10 x 10 px, more than 99 pixels"):
        read_size(data, PixelLimits(max_pixels=99))
    with pytest.raises(PictureError, match="bytes, more than 50"):
        decode(data, RULES, PixelLimits(max_bytes=50))
    with pytest.raises(ConfigError, match="max_pixels"):
        PixelLimits(max_pixels=10**9)
    assert issubclass(PictureError, DataError)


@pytest.mark.parametrize("form", SAVE)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_truncated_pictures_are_refused(form: str, part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some library may have done
    data = save(picture(64, 64), form)
    with pytest.raises(PictureError):
        decode(data[: int(len(data) * part)], RULES, LIMITS)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.4\n", b"<svg/>", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    for job in (lambda: read_size(data, LIMITS), lambda: decode(data, RULES, LIMITS)):
        with pytest.raises(PictureError) as caught:
            job()
        assert "0x" not in str(caught.value)


@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA", "EPS", "PDF", "JPEG2000", "SGI"])
def test_formats_off_the_list_are_refused(form: str) -> None:
    file = io.BytesIO()
    picture(16, 16).save(file, form)
    with pytest.raises(PictureError, match="damaged, or not one of JPEG, PNG"):
        decode(file.getvalue(), RULES, LIMITS)


@pytest.mark.parametrize("form", SAVE)
def test_mutations_give_an_array_or_picture_error(form: str) -> None:
    good, few = save(picture(24, 32), form), PixelLimits(max_pixels=10**6)
    for seed in range(60):
        rng = random.Random(f"{form} {seed}")
        data = bytearray(good)
        for _ in range(rng.choice([1, 2, 5, 20])):
            at = rng.randrange(min(len(data), rng.choice([64, 10**6])))
            kind = rng.randrange(4)
            if kind < 2:
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at : at + rng.randrange(1, 9)]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
        outcomes: list[Any] = []
        for job in (read_size, lambda data, few: decode(data, RULES, few)):
            try:
                outcomes.append(job(bytes(data), few))
            except PictureError as error:
                outcomes.append(str(error))
        size_hw, pixels = outcomes
        if isinstance(pixels, str):
            assert len(pixels.splitlines()) == 1
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape == (*size_hw, 3)


def upright_hw(data: bytes) -> tuple[int, int] | None:
    """What getexif makes of every picture, with and without EXIF; None where Pillow opens none."""
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(SAVE))
    except Exception:  # noqa: BLE001
        return None
    try:
        turned = Image.Image.getexif(image).get(274, 1) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001
        turned = False
    return (image.width, image.height) if turned else (image.height, image.width)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", [form for form in SAVE if form != "TIFF"])
def test_no_orientation_is_passed_over(form: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    sizes = set()
    for told in ({}, {"exif": exif}, {"xmp": b'<x tiff:Orientation="6"/>'}, {"comment": b"hello"}):
        good = save(picture(24, 32), form, **told)
        for seed in range(30):
            rng = random.Random(f"{form} {seed}")
            data = bytearray(good)
            for _ in range(rng.choice([0, 1, 3])):
                data[rng.randrange(min(len(data), rng.choice([64, 400])))] = rng.randrange(256)
            if (expected := upright_hw(bytes(data))) is not None:
                assert read_size(bytes(data), PixelLimits(max_pixels=178_000_000)) == expected
                sizes.add(expected)
    assert {(24, 32)} < sizes or form in ("GIF", "BMP")


def test_an_exhausted_decoder_costs_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError

    data = save(picture(8, 8))
    monkeypatch.setattr(ImageFile.ImageFile, "load", out_of_memory)
    with pytest.raises(PictureError, match="more memory"):
        decode(data, RULES, LIMITS)


def test_warnings_stay_inside_and_filters_stay_as_they_were() -> None:
    image = picture(16, 16)
    odd = TiffImagePlugin.ImageFileDirectory_v2()
    odd[700] = b"x" * 100
    data = bytearray(save(image, "TIFF", tiffinfo=odd))
    entry = data.index(struct.pack("<HHI", 700, 1, 100))
    data[entry + 4 : entry + 8] = struct.pack("<I", 10**6)  # "Tag data larger than file"
    with pytest.warns(UserWarning, match="Tag"), Image.open(io.BytesIO(data)):
        pass
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: decode(bytes(data), RULES, LIMITS), range(64)))
    assert all(np.array_equal(pixels, np.asarray(image)) for pixels in results)
    assert list(warnings.filters) == before


def resize_then_cut(pixels: Pixels, plan: CropPlan, rules: PixelRules, order: str) -> Any:
    """The plan carried out in the plain way; `order` because Pillow resizes first whichever way is less work."""
    resample = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}[rules.resample]
    image, (resize_h, resize_w) = Image.fromarray(pixels), plan.resize_hw
    between = (resize_w, image.height) if order == "rows first" else (image.width, resize_h)
    resized = np.asarray(image.resize(between, resample).resize((resize_w, resize_h), resample)).astype(int)
    (h, w), top, left = plan.target_hw, plan.box_top, plan.box_left
    cut = resized[top : top + h, left : left + w]
    return cut[:, ::-1] if plan.flip else cut


edges = st.integers(1, 200)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(edges, edges),
    st.sampled_from([(64, 64), (48, 80), (80, 48)]),
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    st.booleans(),
    st.sampled_from(["lanczos", "bicubic"]),
)
@example((1, 200), (64, 64), (0.0, 0.999999), True, "lanczos")
@example((64, 70), (64, 64), (0.0, 0.5), False, "lanczos")
def test_crop_is_resize_then_cut(
    size_hw: tuple[int, int], bucket_hw: tuple[int, int], draw: tuple[float, float], flip: bool, resample: Any
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    plan = plan_crop(size_hw, bucket_hw, "random", draw)
    plan = CropPlan(plan.resize_hw, plan.box_top, plan.box_left, plan.target_hw, flip)
    rules = PixelRules(resample=resample)
    cut = crop(pixels, plan, rules)
    assert cut.shape == (*bucket_hw, 3)
    assert cut.flags.writeable
    assert cut.flags.c_contiguous
    plain = [resize_then_cut(pixels, plan, rules, order) for order in ("rows first", "columns first")]
    assert min(np.abs(cut - one).max() for one in plain) <= 2  # noise at its worst: a level from each of two passes


@pytest.mark.parametrize("size_hw", [(300, 420), (900, 650), (100, 90)])
def test_crop_of_a_picture_is_resize_then_cut_to_a_level(size_hw: tuple[int, int]) -> None:
    pixels = np.asarray(picture(*size_hw)) // 2 + 64  # Lanczos does not clip here
    plan = plan_crop(size_hw, (192, 320), "random", (0.3, 0.7))
    plain = Image.fromarray(pixels).resize(plan.resize_hw[::-1], Image.Resampling.LANCZOS)
    box = (plan.box_left, plan.box_top, plan.box_left + 320, plan.box_top + 192)
    assert np.abs(crop(pixels, plan, RULES).astype(int) - np.asarray(plain.crop(box))).max() <= 1


def test_crop_without_a_resize_keeps_every_byte() -> None:
    pixels = np.asarray(picture(70, 90))
    assert np.array_equal(crop(pixels, CropPlan((70, 90), 3, 11, (64, 64)), RULES), pixels[3:67, 11:75])


@pytest.mark.parametrize("size_hw", [(1, 10_000), (10_000, 1), (1, 1), (30_000, 3)])
def test_extreme_shapes_are_cropped_without_extreme_memory(size_hw: tuple[int, int]) -> None:
    pixels = np.full((*size_hw, 3), 77, np.uint8)
    for bucket_hw in ((64, 64), (512, 2048)):
        plan = plan_crop(size_hw, bucket_hw, "random", (0.9999999, 0.9999999))
        assert (crop(pixels, plan, RULES) == 77).all()


def hash_of(thumb: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    return int(difference_hashes(thumb[None])[0])


@pytest.mark.parametrize("seed", range(12))
def test_near_copies_have_near_thumbnails_and_hashes(seed: int) -> None:
    image = picture(300, 420, seed)
    original = thumbnail(np.asarray(image))
    assert original.shape == (8, 9, 3)
    others = [thumbnail(np.asarray(picture(300, 420, seed + 100)))]
    for scale in (0.5, 0.6, 1.0, 1.7):
        smaller = image.resize((round(420 * scale), round(300 * scale)), Image.Resampling.LANCZOS)
        copy = thumbnail(decode(save(smaller, "JPEG", quality=70, subsampling=2), RULES, LIMITS))
        assert np.abs(copy.astype(int) - original).mean() <= 3
        assert (hash_of(copy) ^ hash_of(original)).bit_count() <= 4
        assert all((hash_of(copy) ^ hash_of(other)).bit_count() > 6 for other in others)


def test_the_hash_reads_rows_from_left_to_right_with_a_dead_zone() -> None:
    thumb = np.full((8, 9, 3), 100, np.uint8)
    assert hash_of(thumb) == 0
    thumb[0, 1:] = 102  # not clearly lighter
    thumb[7, 8] = 103
    assert hash_of(thumb) == 1
    thumb[0, 1:] = 103
    assert hash_of(thumb) == 1 << 63 | 1
    noise = np.random.default_rng(0).integers(99, 102, (8, 9, 3), dtype=np.uint8)
    assert hash_of(noise) == 0
