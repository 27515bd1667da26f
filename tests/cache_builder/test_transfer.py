"""Export and import: the same store elsewhere, whatever is killed when, and nothing of a shard is taken on trust."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_builder.places import open_place
from cache_builder.transfer import store_export
from cache_builder.transfer.listing import FILE, shard_name
from cache_builder.transfer.shard_writer import joined, writing_shard
from cache_builder.transfer.shards import SCHEMA, ShardReader, shard_digest
from cache_builder.transfer.store_export import export_store
from cache_builder.transfer.store_import import import_store
from cache_builder.verify import verify_store
from shared.atomic import sync_file
from shared.errors import ConfigError, DataError, ManifestMismatch, StoreFormat, StoreFull, StoreIO, StoreMissing
from shared.manifest import open_manifest, seal_manifest
from shared.manifest_shelf import sealed_manifests
from shared.parts import Part
from shared.record import encode_record, frame_checksum
from shared.store import StoreWriter
from tests.stores import key, records, records_of, row, settings, write_store

SMALL = 20_000  # bytes of a shard: some ten of them
ROWS = [row(index) for index in range(60)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two manifests of one name, one of another, and a record that nobody names."""
    path = tmp_path_factory.mktemp("whole") / "store"
    write_store(path, ROWS[:50])
    write_store(path, ROWS)
    write_store(path, [row(index, "other") for index in range(8)], "others", ("other",))
    with StoreWriter(path) as writer:
        writer.put_many([(key("waste"), encode_record(key("waste"), "waste", {}, {"text": "x" * 30_000}))])
    return path


@pytest.fixture(scope="module")
def exported(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store as shards in a folder; tests must not write into it."""
    path = tmp_path_factory.mktemp("export")
    export_store(store, str(path), shard_bytes=SMALL)
    return path


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(exported, tmp_path / "export"))


def shelf(store: Path) -> list[tuple[str, str, bool, dict[str, object]]]:
    return [(s.name, s.digest, s.is_current, s.seal()) for s in sealed_manifests(store)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_comes_back_is_the_same_store(store: Path, exported: Path, tmp_path: Path) -> None:
    report = import_store(str(exported), tmp_path / "in")
    assert records(tmp_path / "in") == records(store)
    assert shelf(tmp_path / "in") == shelf(store)
    assert (report.new, report.records, report.manifests) == (len(records(store)),) * 2 + (3,)
    assert report.shards_read == report.shards > 5
    assert not verify_store(tmp_path / "in", deep=True).faults
    again = import_store(str(exported), tmp_path / "in")
    assert (again.new, again.shards_read) == (0, 0)
    before = files(exported)
    kept = export_store(tmp_path / "in", str(exported), shard_bytes=SMALL)
    assert (kept.shards, kept.shards_kept) == (report.shards, report.shards)
    assert files(exported) == before


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_lie_alike_however_many_are_written_at_once(
    store: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(store_export, "SHARDS_AT_ONCE", threads)
    export_store(store, str(tmp_path), shard_bytes=SMALL)
    assert files(tmp_path) == files(exported)


@pytest.mark.parametrize("page_bytes", [100, 1 << 20])
def test_shards_of_other_pages_are_read_alike(store: Path, copy: Path, tmp_path: Path, page_bytes: int) -> None:
    """As exports had them that were made before pages were as small as a frame: a page for each row group."""
    for number, path in enumerate(shards_of(copy)):
        table = pq.read_table(path)
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with pq.ParquetWriter(path, SCHEMA, write_page_checksum=True, data_page_size=page_bytes, **options) as writer:
            writer.write_table(table, row_group_size=len(table))
        in_listing("shards", number, "bytes", value=path.stat().st_size)(copy)
    import_store(str(copy), tmp_path / "in")
    assert records(tmp_path / "in") == records(store)


def test_a_full_disk_is_one_line_and_the_export_goes_on(store: Path, exported: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL // 2, hard))
    try:
        with pytest.raises(StoreFull, match="no space left; free some") as caught:
            export_store(store, str(tmp_path), shard_bytes=SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / FILE).exists()
    assert not list(tmp_path.rglob("*.tmp"))
    export_store(store, str(tmp_path), shard_bytes=SMALL)
    assert files(tmp_path) == files(exported)


def test_shards_that_were_read_do_not_stay_in_memory(store: Path, tmp_path: Path) -> None:
    export_store(store, str(tmp_path / "out"))
    path = shards_of(tmp_path / "out")[0]
    path.read_bytes()
    sync_file(path)
    if not is_cached(path):
        pytest.skip("this file system does not say what is cached")
    import_store(str(tmp_path / "out"), tmp_path / "in")
    assert not is_cached(path)


def is_cached(path: Path) -> bool:
    """Whether the first bytes of a file can be had without the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(16)], 0, os.RWF_NOWAIT) > 0
        except OSError:
            return False


def test_one_manifest_travels_alone(store: Path, exported: Path, tmp_path: Path) -> None:
    alone = export_store(store, str(tmp_path / "alone"), manifest="others")
    assert alone.records == len(records_of([row(index, "other") for index in range(8)]))
    import_store(str(tmp_path / "alone"), tmp_path / "one")
    import_store(str(exported), tmp_path / "two", manifest="others")
    for path in (tmp_path / "one", tmp_path / "two"):
        assert records(path) == records_of([row(index, "other") for index in range(8)])
        assert [s.name for s in sealed_manifests(path)] == ["others"]
        assert not verify_store(path, deep=True).faults


@pytest.mark.parametrize("count", [2, 5])
def test_parts_together_are_the_whole(store: Path, exported: Path, tmp_path: Path, count: int) -> None:
    held = {}
    for index in range(count):
        path = tmp_path / f"part-{index}"
        import_store(str(exported), path, part=Part(index, count))
        held |= (mine := records(path))
        manifest = open_manifest(path, "main")
        assert manifest.digest == open_manifest(store, "main").digest
        assert not verify_store(path, deep=True).faults
        rows = np.flatnonzero(manifest.rows_in([Part(index, count)]))
        assert {variant.latent_key for row in manifest.rows(rows) for variant in row.variants} <= mine.keys()
        assert manifest.parts == (Part(index, count),)
        assert len(mine) < len(records(store))
    whole = records(store)
    assert held == {name: whole[name] for name in whole if name != key("waste")}


def test_a_part_reads_its_own_shards(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [replace(row(index), split="train") for index in range(250)])
    shards = export_store(tmp_path / "store", str(tmp_path / "out"), shard_bytes=SMALL).shards
    report = import_store(str(tmp_path / "out"), tmp_path / "in", part=Part(3, 8))
    assert shards > 25
    assert report.shards_read <= shards // 8 + 6  # its stretch, and where captions lie that many samples have


def test_parts_grow_into_the_whole(store: Path, exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "in"
    for part, parts in ((Part(2, 4), (Part(2, 4),)), (Part(0, 2), (Part(0, 2), Part(2, 4))), (Part(3, 4), ())):
        import_store(str(exported), path, part=part)
        assert open_manifest(path, "main").parts == parts
        assert not verify_store(path, deep=True).faults
    assert shelf(path) == shelf(store)
    import_store(str(exported), path, part=Part(0, 2))  # of what is whole nothing becomes a part
    assert open_manifest(path, "main").parts == ()


def test_a_part_is_not_taken_for_the_whole(exported: Path, tmp_path: Path) -> None:
    import_store(str(exported), tmp_path / "in", part=Part(0, 2))
    with pytest.raises(ConfigError, match="only in part in this store"):
        export_store(tmp_path / "in", str(tmp_path / "out"))
    with StoreWriter(tmp_path / "in") as writer:
        writer.put_many(sorted(records_of(ROWS).items()))
    assert seal_manifest(tmp_path / "in", "main", settings(), ROWS).parts == ()


def test_the_newest_seal_is_current(store: Path, tmp_path: Path) -> None:
    for name, rows in (("old", ROWS[:30]), ("new", ROWS)):
        write_store(tmp_path / name, rows)
        export_store(tmp_path / name, str(tmp_path / f"{name}-out"))
    for order in (("old", "new"), ("new", "old")):
        path = tmp_path / "".join(order)
        for name in order:
            rewrite(tmp_path / f"{name}-out", lambda said, name=name: later(said, name))  # type: ignore[misc]
            import_store(str(tmp_path / f"{name}-out"), path)
        assert open_manifest(path, "main").digest == open_manifest(tmp_path / "new", "main").digest
        assert len(sealed_manifests(path)) == 2


def later(said: dict[str, object], name: str) -> None:
    year = {"old": "2025", "new": "2026"}[name]
    said["manifests"][0]["seal"]["sealed_at"] = f"{year}-01-01T00:00:00Z"  # type: ignore[index]


def test_a_name_goes_over_to_other_data_sets_by_replace_alone(exported: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "in", [row(index, "mine") for index in range(4)], datasets=("mine",))
    before = shelf(tmp_path / "in")
    with pytest.raises(ManifestMismatch, match="--replace"):
        import_store(str(exported), tmp_path / "in")
    assert shelf(tmp_path / "in") == before
    import_store(str(exported), tmp_path / "in", replace=True)
    assert not verify_store(tmp_path / "in").faults


def test_a_store_that_is_not_sound_is_not_exported(tmp_path: Path) -> None:
    write_store(tmp_path / "store", ROWS[:5])
    victim = next(iter(records_of(ROWS[:5])))
    whole = records(tmp_path / "store")[victim]
    with StoreWriter(tmp_path / "store") as writer:
        writer.delete_many([victim])
    with pytest.raises(StoreFormat, match="not in the store"):
        export_store(tmp_path / "store", str(tmp_path / "out"))
    with StoreWriter(tmp_path / "store") as writer:
        writer.put_many([(victim, whole[:-1] + bytes([whole[-1] ^ 1]))])
    with pytest.raises(StoreFormat, match=r"damaged.*--quarantine"):
        export_store(tmp_path / "store", str(tmp_path / "out"))
    assert not (tmp_path / "out" / FILE).exists()
    assert list((tmp_path / "out").rglob("*.parquet")) == []


Spoil = Callable[[Path], object]


def rewrite(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    said = json.loads((folder / FILE).read_text())
    change(said)
    (folder / FILE).write_text(json.dumps(said))


def in_listing(*path: str | int, value: object) -> Spoil:
    def spoil(folder: Path) -> None:
        def change(said: dict[str, object]) -> None:
            place: object = said
            for step in path[:-1]:
                place = place[step]  # type: ignore[index]
            place[path[-1]] = value  # type: ignore[index]

        rewrite(folder, change)

    return spoil


def shards_of(folder: Path) -> list[Path]:
    return [folder / shard_name(shard["digest"]) for shard in json.loads((folder / FILE).read_text())["shards"]]


def with_frames(change: Callable[[list[tuple[bytes, bytes]]], list[tuple[bytes, bytes]]], **options: object) -> Spoil:
    """The first shard written anew, with other frames behind the keys and checksums that are listed."""

    def spoil(folder: Path) -> None:
        path = shards_of(folder)[0]
        table = pq.read_table(path)
        frames = change(list(zip(table.column("key").to_pylist(), table.column("frame").to_pylist(), strict=True)))
        new = table.set_column(2, table.schema.field(2), pa.array([frame for _, frame in frames], pa.binary()))
        pq.write_table(new, path, **({"compression": "none", "use_dictionary": False} | options))
        in_listing("shards", 0, "bytes", value=path.stat().st_size)(folder)

    return spoil


def swapped(frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [frames[1], frames[0], *frames[2:]]


def another(frames: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """A whole record of the right key, but not the one that was exported."""
    name = frames[0][0]
    return [(name, encode_record(name, "latents", {}, {"other": 1})), *frames[1:]]


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "digest leads away": (in_listing("shards", 0, "digest", value="../" * 21 + "x"), "export.json is damaged: shards"),
    "manifest name leads away": (in_listing("manifests", 0, "name", value="../../x"), "export.json is damaged: manif"),
    "manifest digest leads away": (in_listing("manifests", 0, "digest", value="../x"), "export.json is damaged: manif"),
    "seal of another": (in_listing("manifests", 0, "seal", "digest", value="../x"), "has the seal of another"),
    "seal lies about bytes": (in_listing("manifests", 0, "seal", "bytes", value=7), "bytes, not 7"),
    "seal lies about content": (in_listing("manifests", 0, "seal", "xxh3_128", value="0" * 32), "damaged: remove it"),
    "shard lies about bytes": (in_listing("shards", 0, "bytes", value=7), "bytes, not 7"),
    "negative size": (in_listing("shards", 0, "bytes", value=-1), "export.json is damaged: shards"),
    "another shard": (in_listing("shards", 0, "digest", value="0" * 64), "is not there"),
    "newer": (in_listing("format", value=2), "of export format 2"),
    "no JSON": (lambda folder: (folder / FILE).write_text("{"), "export.json is damaged"),
    "no object": (lambda folder: (folder / FILE).write_text("[]"), "export.json is damaged"),
    "shard gone": (lambda folder: shards_of(folder)[0].unlink(), "is not there"),
    "shard exchanged": (lambda folder: shutil.copy(shards_of(folder)[1], shards_of(folder)[0]), "bytes, not"),
    "frames exchanged": (with_frames(swapped), "the record of another key"),
    "another frame": (with_frames(another), "another than its row says"),
    "no frame": (with_frames(lambda frames: [(name, b"") for name, _ in frames]), "only 0 bytes long"),
    "no manifest": (lambda folder: shutil.rmtree(folder / "manifests"), "has None bytes"),
    "a link": (lambda folder: relink(shards_of(folder)[0]), "bytes, not"),
}


def relink(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_export_is_one_line_and_seals_nothing(store: Path, copy: Path, tmp_path: Path, what: str) -> None:
    spoil, said = HOSTILE[what]
    spoil(copy)
    with pytest.raises(DataError, match="(?s)" + said.replace(".", r"\.")) as caught:
        import_store(str(copy), tmp_path / "in")
    assert "\n" not in str(caught.value)
    if (tmp_path / "in").exists():
        assert not sealed_manifests(tmp_path / "in")
        assert records(tmp_path / "in").items() <= records(store).items()
    assert {path.name for path in tmp_path.iterdir()} <= {"export", "in"}


@pytest.mark.parametrize("flips", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_bit_is_wrong_unnoticed(store: Path, tmp_path: Path, flips: int) -> None:
    """Flipped anywhere in a shard: it is found, or it was a bit that says nothing, and the records are the same."""
    whole = records(store)
    some = sorted(whole.items())[:12]
    rows = [(name, frame_checksum(frame)) for name, frame in some]
    place, digest = open_place(tmp_path), shard_digest(rows)
    with place.writing("x") as file, writing_shard(file, rows) as writer:
        writer.write(joined(some[:5]))
        writer.write(joined(some[5:]))
    data = (tmp_path / "x").read_bytes()
    rng = np.random.default_rng(5)
    found = 0
    footer = 8 * (len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    for bit in [*rng.integers(0, 8 * len(data), flips), *rng.integers(footer, 8 * len(data), 2 * flips)]:
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << int(bit) % 8
        (tmp_path / "x").write_bytes(spoilt)
        try:
            with ShardReader(place, "x", digest) as shard:
                got = [
                    (name, bytes(frame))
                    for group, _ in enumerate(shard.groups())
                    for name, frame in shard.frames(group)
                ]
        except DataError:
            found += 1
        else:
            assert got == some, bit
    assert found > 0.9 * flips


def run_in_child(code: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)


def kill_when(child: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> bool:
    """Whether it had to be killed; False where it was done before."""
    while child.poll() is None and not is_time():
        time.sleep(0.002)
    child.kill()
    return child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_export_goes_on(store: Path, exported: Path, tmp_path: Path, kills: int) -> None:
    out, shards = tmp_path / "out", len(shards_of(exported))
    code = (
        "from pathlib import Path; from cache_builder.transfer.store_export import export_store; "
        f"export_store(Path({str(store)!r}), {str(out)!r}, shard_bytes={SMALL})"
    )
    for number in range(kills):
        wanted = 1 + number * shards // kills
        killed = kill_when(run_in_child(code), lambda wanted=wanted: len(list(out.glob("shards/*.parquet"))) > wanted)  # type: ignore[misc]
        assert not killed or not (out / FILE).exists() or number
    report = export_store(store, str(out), shard_bytes=SMALL)
    assert report.shards_kept > 0
    listed = json.loads((out / FILE).read_text())
    assert listed == json.loads((exported / FILE).read_text())
    import_store(str(out), tmp_path / "in")
    assert records(tmp_path / "in") == records(store)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_import_goes_on(store: Path, exported: Path, tmp_path: Path, kills: int) -> None:
    path = tmp_path / "in"
    code = (
        "from pathlib import Path; from cache_builder.transfer import store_import as s; s.COMMIT_BYTES = 5000; "
        f"s.import_store({str(exported)!r}, Path({str(path)!r}))"
    )
    for number in range(kills):
        size = 60_000 + number * 6_000  # two commits at least
        kill_when(run_in_child(code), lambda size=size: data_bytes(path) > size)  # type: ignore[misc]
        if not any(sealed_manifests(path)):
            assert records(path).items() <= records(store).items()
    report = import_store(str(exported), path)
    assert report.new < report.records
    assert records(path) == records(store)
    assert shelf(path) == shelf(store)


def data_bytes(path: Path) -> int:
    try:
        return (path / "data.mdb").stat().st_size
    except FileNotFoundError:
        return 0


def test_places_that_cannot_be_meant(store: Path, tmp_path: Path) -> None:
    for address in ("http://host/x", "s3://", "s3:///x", "s3://b ad/x", "s3://bucket/../x", "", "gs://bucket/x"):
        with pytest.raises(ConfigError, match=r"s3://BUCKET/PREFIX|without"):
            open_place(address)
    with pytest.raises(StoreMissing, match=r"holds no export\.json"):
        import_store(str(tmp_path / "nowhere"), tmp_path / "in")
    assert not (tmp_path / "in").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreIO, match="Not a directory"):
        export_store(store, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="there are: main, others"):
        export_store(store, str(tmp_path / "out"), manifest="none")


def test_a_bucket_is_as_good_as_a_folder(bucket: str, store: Path, exported: Path, tmp_path: Path) -> None:
    address = f"{bucket}/a/deep prefix"
    with pytest.raises(StoreMissing, match=r"holds no export\.json"):
        import_store(address, tmp_path / "in")
    report = export_store(store, address, shard_bytes=SMALL)
    assert export_store(store, address, shard_bytes=SMALL).shards_kept == report.shards
    import_store(address, tmp_path / "part", part=Part(1, 2))
    assert not verify_store(tmp_path / "part", deep=True).faults
    import_store(address, tmp_path / "in")
    assert (records(tmp_path / "in"), shelf(tmp_path / "in")) == (records(store), shelf(store))
    assert open_place(address).read(FILE, 1 << 20) == (exported / FILE).read_bytes()


def test_a_bucket_that_does_not_do_as_asked(
    bucket: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreMissing, match=r"^s3://nobodys/x: there is no such bucket$"):
        import_store("s3://nobodys/x", tmp_path / "in")
    with pytest.raises(StoreIO, match="there is no such bucket"):
        export_store(store, "s3://nobody-has-this/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreIO, match="cannot be reached"):
        import_store(f"{bucket}/x", tmp_path / "in")
    assert not (tmp_path / "in").exists()


@pytest.mark.slow
def test_a_killed_export_to_a_bucket_goes_on(bucket: str, store: Path, tmp_path: Path) -> None:
    address = f"{bucket}/killed"
    code = (
        "from pathlib import Path; from cache_builder.transfer.store_export import export_store; "
        f"export_store(Path({str(store)!r}), {address!r}, shard_bytes={SMALL})"
    )
    for wait_s in (0.6, 0.8, 1.0, 1.2):
        child = run_in_child(code)
        time.sleep(wait_s)
        child.kill()
        child.wait()
    export_store(store, address, shard_bytes=SMALL)
    import_store(address, tmp_path / "in")
    assert (records(tmp_path / "in"), shelf(tmp_path / "in")) == (records(store), shelf(store))


def test_the_commands(commands: object, store: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "in"
    done = commands.store("export", store, "--to", out)  # type: ignore[attr-defined]
    assert (done.code, done.errors) == (0, [])
    assert f"{len(records(store))} records and 3 manifests in 2 shards" in done.out
    done = commands.store("import", out, "--store", path, "--partition", "0/2", "--json")  # type: ignore[attr-defined]
    assert (done.code, json.loads(done.out)["part"]) == (0, "0/2")
    done = commands.store("import", out, "--store", path, "--partition", "2/2")  # type: ignore[attr-defined]
    assert (done.code, len(done.errors)) == (64, 1)
    (out / FILE).unlink()
    done = commands.store("import", out, "--store", path)  # type: ignore[attr-defined]
    assert (done.code, len(done.errors)) == (65, 1)
