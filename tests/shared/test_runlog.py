"""events.jsonl: whole lines or nothing, whoever dies or writes beside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.runlog import RunLog, read_events


def events(path: Path) -> list[dict[str, object]]:
    return list(read_events(path))


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "events.jsonl")
    log.write("step", step=1, loss=0.5, caption="a cröss \u2028 \r\n and 🦊", nested={"a": [1, (2, 3)]})
    log.write("saved", path="checkpoints/step-00000001")
    log.close()
    first, second = events(tmp_path / "events.jsonl")
    assert (first["event"], first["step"], first["loss"]) == ("step", 1, 0.5)
    assert first["caption"] == "a cröss \u2028 \r\n and 🦊"
    assert first["nested"] == {"a": [1, [2, 3]]}
    assert isinstance(first["time_s"], float)
    assert second["path"] == "checkpoints/step-00000001"


def test_what_is_written_can_be_read_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "events.jsonl")
    log.write("started")
    assert [event["event"] for event in events(tmp_path / "events.jsonl")] == ["started"]
    log.close()


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert events(tmp_path / "events.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_become_null(tmp_path: Path, value: float) -> None:
    log = RunLog(tmp_path / "events.jsonl")
    log.write("step", loss=value, more={"inside": [value, 1.0]})
    log.close()
    line = (tmp_path / "events.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert strict["loss"] is None
    assert strict["more"] == {"inside": [None, 1.0]}


def test_a_file_name_that_is_not_utf8_can_be_told(tmp_path: Path) -> None:
    name = b"bad-\xff.png".decode(errors="surrogateescape")
    log = RunLog(tmp_path / "events.jsonl")
    log.write("skipped", path=name)
    log.close()
    assert events(tmp_path / "events.jsonl")[0]["path"] == name


def test_a_line_torn_anywhere_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = RunLog(path)
    log.write("one", text="é")
    log.write("two", text="é" * 20)
    log.close()
    whole = path.read_bytes()
    second_at = whole.index(b"\n") + 1
    for length in range(second_at, len(whole) - 2):
        path.write_bytes(whole[:length])
        assert [event["event"] for event in events(path)] == ["one"]
        again = RunLog(path)
        again.write("three")
        again.close()
        assert [event["event"] for event in events(path)] == ["one", "three"]


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'[1]\n\n7\n\xff\xfe\x00\n{"event": "kept"}\nnull\n')
    assert [event["event"] for event in events(path)] == ["kept"]


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from shared.runlog import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "for i in range(400): log.write('step', who=sys.argv[2], i=i, text='x' * (i * 7 % 3000))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 800
    for who in "ab":
        assert [event["i"] for event in events(path) if event["who"] == who] == list(range(400))
