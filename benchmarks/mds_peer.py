"""The peer's side of benchmarks.store_read: mosaicml-streaming's MDS, in an environment of its own.

Not part of this package: run by another Python, which needs numpy, torch and mosaicml-streaming. Writes the data set of
the file PLAIN as MDS shards into OUT, says so with a line, and then answers each line "batches size" by putting that
many batches together and printing how many samples that was.
"""

import json
import random
import sys

import numpy as np
from streaming import LocalDataset, MDSWriter


def main(plain: str, out: str, layout: dict[str, dict[str, list[int]]], count: int) -> None:
    shapes = [(name, shape) for tensors in layout.values() for name, shape in tensors.items()]
    sizes = [2 * int(np.prod(shape)) for _, shape in shapes]
    rows = np.memmap(plain, np.uint8, "r").reshape(count, sum(sizes))
    columns = {name: "ndarray:float16:" + ",".join(map(str, shape)) for name, shape in shapes}
    with MDSWriter(out=out, columns=columns) as writer:
        for row in rows:
            parts = np.split(row, np.cumsum(sizes)[:-1])
            writer.write({n: np.frombuffer(p, np.float16).reshape(s) for (n, s), p in zip(shapes, parts)})  # noqa: B905
    data, rng = LocalDataset(out), random.Random(0)
    print(count, flush=True)
    for line in sys.stdin:
        batches, size = map(int, line.split())
        buffers = {name: np.zeros((size, *shape), np.float16) for name, shape in shapes}
        for _ in range(batches):
            for i, index in enumerate(rng.sample(range(count), size)):
                sample = data[index]
                for name, _ in shapes:
                    # As bytes, as ours are copied: half-precision copies run at half the rate.
                    np.copyto(buffers[name][i].reshape(-1).view(np.uint8), sample[name].reshape(-1).view(np.uint8))
        print(batches * size, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
