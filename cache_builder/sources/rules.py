"""What a source may be told: which kind it is, and which columns hold pictures, captions and the rest."""

from typing import Literal

from shared.config import Config

SourceKind = Literal["folder", "table", "webdataset"]
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")


class SourceRules(Config):
    """How a data set is read."""

    kind: SourceKind | None = None
    """What the root is; unset: a .parquet, .jsonl or .csv file is a table, .tar files are webdataset, else a folder."""

    image_columns: tuple[str, ...] = (
        "image", "jpg", "png", "webp", "image_bytes", "bytes", "file_name", "image_path", "path", "filename",
    )  # fmt: skip
    """Columns of a table that may hold the picture (bytes, {bytes, path} or a path); the first filled one counts."""

    caption_columns: tuple[str, ...] = ("text", "caption", "captions", "prompt")
    """Columns, or keys of JSON, that may hold the caption or a list of them; the first filled one counts."""

    meta_columns: tuple[str, ...] | None = None
    """Columns carried along as meta_*; unset: all others of numbers, strings, booleans and lists of strings."""

    captions_from: Literal["data", "name"] = "data"
    """Captions come from files and columns, or are the picture's name without suffix, "_" read as a space."""

    metadata: tuple[str, ...] = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
    """Tables in a folder of pictures that name them in a column file_name; the first that exists is read."""
