"""What a build tells the service: progress now and then, and never so much that it waits to be heard."""

import json
import os

from cache_builder.build_job import _Voice


def test_a_full_pipe_holds_up_no_progress() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as ours, os.fdopen(writing, "w") as pipe:
        voice = _Voice(pipe)
        for _ in range(5000):  # far more than a pipe takes
            voice.advance("pictures", 0, 9)
        os.set_blocking(reading, False)
        lines = ours.read().splitlines()
    assert 100 < len(lines) < 5000
    assert {json.dumps(json.loads(line), sort_keys=True) for line in lines} == {
        '{"done": 0, "task": "pictures", "total": 9}'
    }
