"""Untrusted bytes to upright sRGB pixels: Pillow's door for pictures that came from anywhere, in either tower.

bytes -> read_size | decode_image | decode -> cache_builder/pixels.py, trainer/sources.py

Whatever a decoder does to one picture (any exception, a lie about its size) costs that one picture: PictureError.
What the pixels are depends on the bytes and on PixelRules alone; a change here that alters them raises PIXELS_VERSION.
"""

import functools
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from shared.errors import ConfigError, DataError

PIXELS_VERSION = 1
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp"})
MAX_PROFILE_BYTES = 4 * 2**20
PILLOW_MAX_PIXELS = 178_956_970  # where Pillow itself refuses, whatever we allow

Pixels = npt.NDArray[np.uint8]

_T = Image.Transpose
_UPRIGHT = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE}  # by EXIF orientation
_UPRIGHT |= {6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90}
_SAYS_WHAT_IS_UP = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})  # in Pillow's `info`
_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}


class PictureError(DataError):
    """One picture that cannot be used, and why, in one line."""


@dataclass(frozen=True)
class PixelRules:
    """What of the pixels is a choice; part of every latent's key."""

    background_rgb: tuple[int, int, int] = (255, 255, 255)
    resample: Literal["lanczos", "bicubic"] = "lanczos"


@dataclass(frozen=True)
class PixelLimits:
    """How much one untrusted picture may ask for; raises ConfigError beyond what Pillow itself allows."""

    max_pixels: int = 64_000_000
    max_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ConfigError(f"max_pixels {self.max_pixels}: it must be between 1 and {PILLOW_MAX_PIXELS}")


def read_size(data: bytes, limits: PixelLimits) -> tuple[int, int]:
    """(h, w) of the upright picture, from its header alone; raises PictureError."""
    with _untrusted(), _open(data, limits) as image:
        return _upright_hw(image, _orientation(image))


def decode_image(data: bytes, rules: PixelRules, limits: PixelLimits) -> Image.Image:
    """Upright, sRGB, on the background colour, first frame, in Pillow's own memory; raises PictureError."""
    with _untrusted():
        return _decode(data, rules, limits)


def decode(data: bytes, rules: PixelRules, limits: PixelLimits) -> Pixels:
    """The same as uint8 [h, w, 3], read-only; raises PictureError."""
    with _untrusted():
        return np.asarray(_decode(data, rules, limits))


def cover(image: Image.Image, hw: tuple[int, int]) -> Pixels:
    """Resized (antialiased) so that it covers (h, w), px, and cut in the middle: uint8 [h, w, 3]; one resize."""
    scale = max(hw[0] / image.height, hw[1] / image.width)
    half_h, half_w = hw[0] / scale / 2, hw[1] / scale / 2
    box = (image.width / 2 - half_w, image.height / 2 - half_h, image.width / 2 + half_w, image.height / 2 + half_h)
    inside = (max(0.0, box[0]), max(0.0, box[1]), min(image.width, box[2]), min(image.height, box[3]))
    return np.asarray(image.resize((hw[1], hw[0]), Image.Resampling.LANCZOS, box=inside))


def _decode(data: bytes, rules: PixelRules, limits: PixelLimits) -> Image.Image:
    with _open(data, limits) as image:
        orientation = _orientation(image)
        size_hw = _upright_hw(image, orientation)
        _fix_transparency(image)
        image.load()
        rgb = _flatten(image, rules.background_rgb)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    if (rgb.height, rgb.width) != size_hw:
        raise PictureError(f"its header says {size_hw[0]} x {size_hw[1]} px, it holds {rgb.height} x {rgb.width}")
    return rgb


def _open(data: bytes, limits: PixelLimits) -> ImageFile.ImageFile:
    """The header, parsed and within limits; no pixel is decoded."""
    if len(data) > limits.max_bytes:
        raise PictureError(f"{len(data)} bytes, more than {limits.max_bytes}")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library may have set it for the whole process
    image = Image.open(BytesIO(data), formats=FORMATS)
    if not 0 < image.width * image.height <= limits.max_pixels:
        raise PictureError(f"{image.height} x {image.width} px, more than {limits.max_pixels} pixels")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        image.info.pop("xmp", None)  # Pillow turns the pixels by it when it loads, but not the size in the header
    return image


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation that is still to be applied; 1 where there is none or EXIF is damaged."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow applies it when it loads, and its size already says so
    if _SAYS_WHAT_IS_UP.isdisjoint(image.info):
        return 1  # as getexif would find out, for some of the price of a small header
    try:
        # Image's own method: PNG's would decode all pixels first to look for EXIF behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001
        return 1
    return value if value in range(1, 9) else 1


def _upright_hw(image: Image.Image, orientation: int) -> tuple[int, int]:
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


def _fix_transparency(image: ImageFile.ImageFile) -> None:
    """Put a PNG's transparent colour on the scale of the pixels that Pillow gives; it leaves the file's own depth."""
    colour = image.info.get("transparency")
    raw_mode = image.tile[0].args if image.format == "PNG" and image.tile else None
    if raw_mode in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(sample >> 8 for sample in colour)


def _flatten(image: Image.Image, background_rgb: tuple[int, int, int]) -> Image.Image:
    """A loaded picture of any mode as sRGB on the background: colours first, then what shines through."""
    icc = image.info.get("icc_profile")
    image = _eight_bits(image)
    grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return _to_srgb(image if image.mode in _PROFILE_SPACES else image.convert("L" if grey else "RGB"), icc)
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if grey else "RGBA")
    rgb = _to_srgb(image.convert("L" if grey else "RGB"), icc)
    rgb.paste(background_rgb, mask=image.getchannel("A").point(range(255, -1, -1)))  # where alpha is not
    return rgb


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, rounded (Pillow's convert would clip it at 255); other modes as they are."""
    if image.mode == "F":
        raise PictureError("floating-point samples have no fixed white; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    tags: dict[int, Any] = getattr(image, "tag_v2", {})
    samples = np.asarray(image)
    white = 4095 if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65535
    if samples.min() < 0 or samples.max() > white:
        raise PictureError("32-bit or signed samples beyond 16 bits; save it with 8 or 16 bits")
    scaled = samples.astype(np.uint32)  # in place from here: a table lookup would need 8 bytes a pixel
    scaled *= 255
    scaled += white // 2
    scaled //= white
    inverted = image.mode == "I;16" and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    grey = Image.fromarray((255 - scaled if inverted else scaled).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, icc: object) -> Image.Image:
    """An L, RGB or CMYK picture as RGB, through its profile where that fits; a profile never fails a picture."""
    if isinstance(icc, bytes) and 0 < len(icc) <= MAX_PROFILE_BYTES and (transform := _transform(icc, image.mode)):
        return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=16)  # building a transform costs more than applying it to a small picture
def _transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The way from `icc` to sRGB; None where the profile is damaged, for another mode, or sRGB itself to a level."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(icc))
        if profile.profile.xcolor_space != _PROFILE_SPACES[mode]:
            return None
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags=flags)
    except Exception:  # noqa: BLE001
        return None
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it moves no colour by more than a level: a picture is the same with an sRGB profile and without."""
    cube = np.mgrid[0:256:15, 0:256:15, 0:256:15].reshape(3, -1, 1).T.astype(np.uint8)
    moved = np.asarray(transform.apply(Image.fromarray(cube)))
    return int(np.abs(moved.astype(np.int16) - cube).max()) <= 1


logging.getLogger("PIL").addHandler(logging.NullHandler())  # or its errors go to stderr; ours say the same
_quiet_lock = threading.Lock()
_quiet_filters = ExitStack()
_quiet_users = 0


@contextmanager
def _untrusted() -> Iterator[None]:
    """Turns whatever a decoder raises into PictureError, and keeps its warnings from the world."""
    try:
        with quiet():
            yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"damaged, or not one of {', '.join(FORMATS)}") from None
    except MemoryError:
        raise PictureError("needs more memory than there is") from None
    except Exception as error:  # noqa: BLE001
        said = re.sub(r"[^ -~]+", " ", str(error)).strip()[:160]
        raise PictureError(f"cannot be decoded: {said or type(error).__name__}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from Pillow while any thread decodes: filters are the process's; first in sets, last out resets.

    Each picture is read in one; whoever reads many holds one around them, for filters are a sixth of a small header.
    """
    global _quiet_users
    with _quiet_lock:
        if not _quiet_users:
            _quiet_filters.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_users += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if not _quiet_users:
                _quiet_filters.close()
