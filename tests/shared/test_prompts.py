"""Prompts from files of every kind that people have: the same list, or one line that says why not."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from shared.errors import ConfigError, DataError
from shared.prompts import read_prompts_file

PROMPTS = ["a red circle", 'a sign that says "stop, now"', "ein grünes Quadrat, 红"]


def written(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_every_kind_gives_the_same_prompts(tmp_path: Path) -> None:
    quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in PROMPTS]
    files = [
        written(tmp_path, "p.txt", "\ufeff" + "\n\n".join(PROMPTS) + "\r\n"),
        written(tmp_path, "list", "\n".join(PROMPTS)),
        written(tmp_path, "p.csv", "id,Prompt\r\n" + "".join(f"{i},{p}\r\n" for i, p in enumerate(quoted)) + "3,\r\n"),
        written(tmp_path, "p.TSV", "caption\tother\n" + "".join(f"{p}\tx\n" for p in quoted)),
    ]
    table = pa.table({"text": [*PROMPTS, None, " "], "n": [1, 2, 3, 4, 5]})
    pa.parquet.write_table(table, tmp_path / "p.parquet")
    for path in [*files, tmp_path / "p.parquet"]:
        assert read_prompts_file(path) == PROMPTS, path


def test_partiprompts_as_they_are_published(tmp_path: Path) -> None:
    head = "Prompt\tCategory\tChallenge\tNote\n"
    text = head + "bond\tAbstract\tBasic\tBiology-inspired concepts\nhumility\tAbstract\tBasic\t\n"
    assert read_prompts_file(written(tmp_path, "PartiPrompts.tsv", text)) == ["bond", "humility"]


def test_the_column_of_prompts_comes_before_that_of_captions(tmp_path: Path) -> None:
    assert read_prompts_file(written(tmp_path, "p.csv", "text,caption,PROMPT\na,b,c\n")) == ["c"]


def test_files_without_prompts_are_empty_lists(tmp_path: Path) -> None:
    assert read_prompts_file(written(tmp_path, "p.txt", " \n\t\n")) == []
    assert read_prompts_file(written(tmp_path, "p.csv", "")) == []
    assert read_prompts_file(written(tmp_path, "q.csv", "prompt\n")) == []


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("p.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("p.csv", "a,b\n1,2\n", "has no column prompt or caption or text; it has a, b"),
        ("p.csv", 'prompt\n"open', "is not a table"),
        ("p.csv", "prompt\n" + "x" * 200_000, "is not a table"),
        ("p.parquet", b"PAR1 and no more", "is not a Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: str | bytes, says: str) -> None:
    path = written(tmp_path, name, data)
    with pytest.raises(DataError, match=rf"{name} {says}") as raised:
        read_prompts_file(path)
    assert len(str(raised.value).splitlines()) == 1


def test_numbers_are_no_prompts_and_no_file_is_no_prompts(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="its column 'prompt' holds no text"):
        read_prompts_file(tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=r"--prompts .*none: No such file"):
        read_prompts_file(tmp_path / "none")
