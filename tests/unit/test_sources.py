"""Where pictures come from: folders, tables, datasets, buckets and the graph, all behind one interface."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.config.dataset import CaptionSettings, DatasetSettings, SourceSettings, TableSettings
from training.data.sources import local as local_module
from training.data.sources.csv_rows import CsvRows
from training.data.sources.huggingface import HuggingFaceRows
from training.data.sources.local import LocalFolder
from training.data.sources.memory import StoredImages, store_images
from training.data.sources.opening import open_source
from training.data.sources.s3 import S3Bucket
from training.data.sources.table import WithTable
from training.errors import DataError, SettingError

COLOURS = ("red", "green", "blue", "white", "black", "grey")
SECRET = "sesame-open-9f3b"


def save(path, colour="red", size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def touch(path, content=b"x"):
    """A file later than any before it, so that a change shows on file systems with coarse times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    touch.now += 10**9
    os.utime(path, ns=(touch.now, touch.now))


touch.now = time.time_ns()


def ids(source):
    return [found.id for found in source.find()]


def by_id(source):
    return {found.id: found for found in source.find()}


def changed(before, after):
    """Ids whose entry differs in any field."""
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def message(action):
    with pytest.raises(DataError) as raised:
        action()
    return str(raised.value)


# A folder


def test_a_missing_or_empty_folder_is_named(tmp_path):
    assert "cats does not exist. Choose the folder" in message(lambda: ids(LocalFolder(tmp_path / "cats")))
    touch(tmp_path / "notes.txt")
    assert "is a file, not a folder" in message(lambda: ids(LocalFolder(tmp_path / "notes.txt")))
    assert "holds no pictures. Put some in (.png" in message(lambda: ids(LocalFolder(tmp_path)))


def test_a_folder_is_listed_in_the_order_of_whole_paths_without_hidden_files(tmp_path):
    names = ["a.png", "a/z.JPG", "a-b/c.webp", "a b/ü 猫.png", "b.png", "a/b/c.png", "a0.png"]
    for name in (*names, ".hidden/x.png", "a/.x.png", "a/readme.md"):
        touch(tmp_path / name)
    counts = []
    found = [f.id for f in LocalFolder(tmp_path).find(counts.append)]
    assert found == sorted(names)
    assert counts == [len(names)]


def test_what_a_folder_gives_of_a_picture(tmp_path):
    content = bytes(range(256)) * 2048
    touch(tmp_path / "sub/a.tar.png", content)
    touch(tmp_path / "sub/a.tar.txt", "zwölf".encode())
    touch(tmp_path / "b.png")
    source = LocalFolder(tmp_path)
    found = by_id(source)
    assert source.read("sub/a.tar.png") == content
    assert source.head("sub/a.tar.png") == content[: 256 * 1024]
    assert source.text("sub/a.tar.png") == "zwölf".encode()
    assert source.text("b.png") is None
    assert found["sub/a.tar.png"].caption_stamp > 0 == found["b.png"].caption_stamp
    assert found["b.png"].captions is None
    (tmp_path / "b.png").unlink()
    assert "b.png is gone. Put it back" in message(lambda: source.read("b.png"))


def test_kohyas_folder_names_ask_for_passes(tmp_path):
    for name in ("10_cat/a.png", "10_cat/deep/b.png", "10_cat/0_none/c.png", "plain/d.png", "10cat/e.png"):
        touch(tmp_path / "set" / name)
    repeats = {found.id: found.repeats for found in LocalFolder(tmp_path / "set").find()}
    assert repeats == {
        "10_cat/0_none/c.png": 0,
        "10_cat/a.png": 9,
        "10_cat/deep/b.png": 9,
        "10cat/e.png": None,
        "plain/d.png": None,
    }
    (tmp_path / "set").rename(tmp_path / "3_set")
    assert by_id(LocalFolder(tmp_path / "3_set"))["plain/d.png"].repeats == 2


def test_links_are_followed_but_never_in_a_circle(tmp_path):
    touch(tmp_path / "set/cats/a.png")
    touch(tmp_path / "far/b.png")
    touch(tmp_path / "far/deep/c.png")
    touch(tmp_path / "single.png")
    links = {
        "set/cats/up": tmp_path / "set",
        "set/above": tmp_path,
        "set/again": tmp_path / "set/cats",
        "set/out": tmp_path / "far",
        "set/out2": tmp_path / "far/deep",
        "far/back": tmp_path / "set/cats",
        "set/self": tmp_path / "set/self",
        "set/file.png": tmp_path / "single.png",
        "set/broken.png": tmp_path / "nowhere.png",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    source = LocalFolder(tmp_path / "set")
    assert ids(source) == ["broken.png", "cats/a.png", "file.png", "out/b.png", "out/deep/c.png"]
    assert by_id(source)["broken.png"].stamp == 0
    assert source.read("file.png") == b"x"


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "a.png")
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid() == 0:  # root may read anything
        scandir = os.scandir

        def refuse(path):
            if Path(path) == locked:
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
    else:
        locked.chmod(0)
    text = message(lambda: ids(LocalFolder(tmp_path)))
    locked.chmod(0o755)
    assert "locked may not be read. Give this user the right" in text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_unicode_stay_readable(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"/\xff.png", b"/\xfe.png"):
        Path(os.fsdecode(folder + name)).write_bytes(name)
    touch(tmp_path / "\ufffdDCFF.png", b"honest")
    found = ids(LocalFolder(tmp_path))
    assert found == ["caf\ufffdDCE9/\ufffdDCFE.png", "caf\ufffdDCE9/\ufffdDCFF.png", "\ufffdDCFF.png"]
    fresh = LocalFolder(tmp_path)  # an index may name them before anything was listed
    assert [fresh.read(name) for name in found] == [b"/\xfe.png", b"/\xff.png", b"honest"]
    "".join(found).encode()


@pytest.mark.parametrize("edited", ["b/b.png", "b/b.txt"])
def test_an_edited_file_changes_the_fingerprint_and_one_stamp(tmp_path, edited):
    for name in ("a", "b/b", "c"):
        touch(tmp_path / f"{name}.png")
        touch(tmp_path / f"{name}.txt")
    source = LocalFolder(tmp_path)
    before, fingerprint = by_id(source), source.fingerprint()
    assert LocalFolder(tmp_path).fingerprint() == fingerprint
    touch(tmp_path / edited)
    after = by_id(source)
    assert changed(before, after) == ["b/b.png"]
    assert (before["b/b.png"].stamp != after["b/b.png"].stamp) is edited.endswith("png")
    assert source.fingerprint() != fingerprint


def test_a_large_folders_fingerprint_looks_at_folders_only(tmp_path, monkeypatch):
    monkeypatch.setattr(local_module, "FINGERPRINT_FILES", 30)
    for number in range(40):
        touch(tmp_path / f"{number % 3}/{number}.png")
    source = LocalFolder(tmp_path)
    fingerprint = source.fingerprint()
    touch(tmp_path / "0/0.png", b"written over in place")
    assert source.fingerprint() == fingerprint
    (tmp_path / "0/0.png").rename(tmp_path / "0/new.png")
    os.utime(tmp_path / "0", ns=(touch.now + 1, touch.now + 1))
    renamed = source.fingerprint()
    assert renamed != fingerprint
    monkeypatch.setattr(local_module, "FINGERPRINT_FILES", 50)
    exact = source.fingerprint()
    touch(tmp_path / "1/1.png", b"written over in place")
    assert source.fingerprint() != exact


# A table beside the pictures


ROWS = [
    {"filename": "a.png", "caption": "one", "meta": {"tags": ["x", " ", "y"], "w": 12}, "spare": "s"},
    {"filename": "sub/b.png", "caption": "", "meta": {"tags": [], "w": 34}, "spare": "spare b"},
    {"filename": "c.png", "caption": None, "meta": {"tags": None, "w": None}, "spare": None},
]


def write_table(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "sub/b.png", "sub/c.png", "d.png"):
        touch(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_table_tells_captions_by_name(pictures, suffix):
    write_table(pictures / f"t{suffix}", ROWS)
    settings = TableSettings(
        f"t{suffix}", caption_column=("caption", "meta.tags"), fallback_caption_column="spare", width_column="meta.w"
    )
    found = by_id(WithTable(LocalFolder(pictures), settings, pictures))
    captions = {name: f.captions for name, f in found.items()}
    assert captions == {"a.png": ("one", "x", "y"), "sub/b.png": ("spare b",), "sub/c.png": (), "d.png": ()}
    assert found["a.png"].width_px == 0  # half a size is none
    sized = TableSettings(f"t{suffix}", width_column="meta.w", height_column="meta.w")
    found = by_id(WithTable(LocalFolder(pictures), sized, pictures))
    assert [(f.width_px, f.height_px) for f in found.values()] == [(12, 12), (0, 0), (34, 34), (0, 0)]


def test_a_csv_table_and_names_without_extension(pictures):
    content = 'name,text\nsub/b,"first, ""quoted""\nline"\na,zwei\nd.png,drei\n'
    (pictures / "t.csv").write_text(content, encoding="utf-8-sig")
    settings = TableSettings(str(pictures / "t.csv"), "name", ("text",), identifier_includes_extension=False)
    source = WithTable(LocalFolder(pictures), settings, pictures)
    captions = {name: f.captions for name, f in by_id(source).items()}
    assert captions["sub/b.png"] == ('first, "quoted"\nline',)
    assert (captions["a.png"], captions["d.png"], captions["sub/c.png"]) == (("zwei",), ("drei",), ())


def test_an_edited_caption_in_a_table_changes_one_stamp(pictures):
    write_table(pictures / "t.jsonl", ROWS)
    source = WithTable(LocalFolder(pictures), TableSettings("t.jsonl"), pictures)
    before, fingerprint = by_id(source), source.fingerprint()
    write_table(pictures / "t.jsonl", [{**ROWS[0], "caption": "two"}, *ROWS[1:]])
    after = by_id(source)
    assert changed(before, after) == ["a.png"]
    assert before["a.png"].caption_stamp != after["a.png"].caption_stamp
    assert before["a.png"].stamp == after["a.png"].stamp
    assert source.fingerprint() != fingerprint
    other = WithTable(LocalFolder(pictures), TableSettings("t.jsonl", caption_column=("spare",)), pictures)
    assert other.fingerprint() != source.fingerprint()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_what_is_wrong_with_a_table_is_named(pictures, suffix):
    def listing(settings):
        return message(lambda: ids(WithTable(LocalFolder(pictures), settings, pictures)))

    assert f"t{suffix} does not exist" in listing(TableSettings(f"t{suffix}"))
    write_table(pictures / f"t{suffix}", ROWS)
    text = listing(TableSettings(f"t{suffix}", caption_column=("txt", "caption")))
    assert "has no column txt. Choose among" in text
    assert "spare" in text
    write_table(pictures / f"t{suffix}", [*ROWS, ROWS[0]])
    assert "names a.png twice" in listing(TableSettings(f"t{suffix}"))
    (pictures / f"t{suffix}").write_bytes(b"\x00damaged")
    text = listing(TableSettings(f"t{suffix}"))
    assert f"t{suffix}" in text
    assert "cannot be read as parquet" in text or "line 1 is not JSON" in text


# A csv file that names pictures


def test_csv_rows_name_pictures_and_captions(tmp_path):
    touch(tmp_path / "set/b.png", b"bb")
    touch(tmp_path / "far/a 猫.png", b"aa")
    rows = f"file,text,w,h\nb.png,one,30,40\n{tmp_path}/far/a 猫.png,far,,\n./b.png,two,,\n../gone.png,gone,,\n"
    (tmp_path / "set/rows.csv").write_text(rows, encoding="utf-8")
    settings = TableSettings("", "file", ("text",), width_column="w", height_column="h")
    source = CsvRows(tmp_path / "set/rows.csv", settings)
    far, gone = f"{tmp_path}/far/a 猫.png", f"{tmp_path}/gone.png"
    found = by_id(source)
    assert list(found) == sorted([far, "b.png", gone])
    assert found["b.png"].captions == ("one", "two")
    assert (found["b.png"].width_px, found["b.png"].height_px) == (30, 40)
    assert found[gone].stamp == 0
    assert (source.read(far), source.head("b.png")) == (b"aa", b"bb")
    before, fingerprint = found, source.fingerprint()
    touch(tmp_path / "set/b.png", b"new")
    assert changed(before, by_id(source)) == ["b.png"]
    assert source.fingerprint() != fingerprint


def test_csv_rows_without_caption_column_use_texts_beside(tmp_path):
    touch(tmp_path / "b.png")
    touch(tmp_path / "b.txt", b"beside")
    (tmp_path / "rows.csv").write_text("filename\nb.png\n")
    source = CsvRows(tmp_path / "rows.csv", TableSettings(caption_column=()))
    before, fingerprint = by_id(source), source.fingerprint()
    assert (before["b.png"].captions, source.text("b.png")) == (None, b"beside")
    touch(tmp_path / "b.txt")
    assert before["b.png"].caption_stamp != by_id(source)["b.png"].caption_stamp
    assert source.fingerprint() != fingerprint


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"filename,caption\na.png,x\nb.png,x,y\n", "line 3 has 3 values, the first line names 2 columns"),
        (b'filename,caption\n"a\nb.png",x\n,x\n', "line 4 names no picture"),
        (b"filename,caption\nhttps://host/a.png?key=sesame-open-9f3b,x\n", "line 2 names an address"),
        (b"filename,caption\na.png,f\xfcr\n", "line 2 is not UTF-8"),
        (b"name,caption\na.png,x\n", "has no column filename. Choose among those that it has: name, caption"),
        (b"filename,caption\nx.png,x\n", "None of the 1 pictures"),
        (b"filename,caption\n", "holds no pictures"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, content, sentence):
    touch(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_bytes(content)
    text = message(lambda: ids(CsvRows(tmp_path / "rows.csv", TableSettings())))
    assert sentence in text
    assert SECRET not in text


def test_a_missing_csv_is_named(tmp_path):
    assert "rows.csv does not exist" in message(lambda: ids(CsvRows(tmp_path / "rows.csv", TableSettings())))


# The datasets library


@pytest.fixture
def hub_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def png(colour, size=(12, 8)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return file.getvalue()


def dataset_of(datasets, **columns):
    features = {"image": datasets.Image()}
    rows = {"image": [{"bytes": png(colour), "path": None} for colour in COLOURS], **columns}
    dataset = datasets.Dataset.from_dict(rows)
    return dataset.cast(datasets.Features({**dataset.features, **features}))


def colours(source):
    found = ids(source)
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(source.read, found))
    return [Image.open(io.BytesIO(content)).getpixel((0, 0)) for content in pictures]


WANTED = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS]
CAPTIONS = {
    "caption": [f"a {colour}" for colour in COLOURS],
    "meta": [{"tags": [colour, "b"], "score": {"aesthetic": i / 10}} for i, colour in enumerate(COLOURS)],
    "w": list(range(10, 16)),
    "collection": ["x", "x", "y", "y", "z", "z"],
}


def hugging(folder, tmp_path, table=TableSettings(), **settings):  # noqa: B008
    chosen = SourceSettings("huggingface", instance_data_dir=str(folder), table=table, **settings)
    return HuggingFaceRows(chosen, tmp_path / "spool")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "splits", "parquet"])
def test_rows_of_a_dataset(hub_cache, tmp_path, kind, streaming):
    dataset, folder = dataset_of(hub_cache, **CAPTIONS), tmp_path / "set"
    if kind == "parquet":
        folder.mkdir()
        dataset.to_parquet(folder / "train.parquet")
    elif kind == "saved":
        dataset.save_to_disk(folder)
    else:
        hub_cache.DatasetDict(train=dataset, other=dataset.select([0])).save_to_disk(folder)
    table = TableSettings(caption_column=("caption", "meta.tags"), width_column="w", height_column="w")
    source = hugging(folder, tmp_path, table, streaming=streaming)
    found = list(source.find())
    assert [f.id for f in found] == [f"{number:08d}.jpg" for number in range(6)]
    assert found[1].captions == ("a green", "green", "b")
    assert (found[1].width_px, found[1].height_px) == (11, 11)
    assert len({f.stamp for f in found}) == 6
    assert colours(source) == WANTED
    again = hugging(folder, tmp_path, table, streaming=streaming)
    assert again.read("00000002.jpg") == source.read("00000002.jpg")  # before anything was listed
    assert list(again.find()) == found
    assert again.fingerprint() == source.fingerprint()
    if kind == "splits":
        assert len(ids(hugging(folder, tmp_path, split="other", streaming=streaming))) == 1
        assert "no split test. Choose among train, other" in message(
            lambda: ids(hugging(folder, tmp_path, split="test"))
        )


def test_a_dataset_that_is_saved_again_has_other_stamps(hub_cache, tmp_path):
    dataset_of(hub_cache, caption=list("abcdef")).save_to_disk(tmp_path / "set")
    first = hugging(tmp_path / "set", tmp_path)
    before, fingerprint = by_id(first), first.fingerprint()
    dataset_of(hub_cache, caption=list("abcdeg")).save_to_disk(tmp_path / "set")
    second = hugging(tmp_path / "set", tmp_path)
    after = by_id(second)
    assert all(before[name].stamp != after[name].stamp for name in before)
    assert [name for name in before if before[name].captions != after[name].captions] == ["00000005.jpg"]
    assert second.fingerprint() != fingerprint


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv", None])
def test_an_image_folder(hub_cache, tmp_path, metadata):
    folder = tmp_path / "set"
    for number, colour in enumerate(COLOURS):
        save(folder / f"{number}.png", colour)
        touch(folder / f"{number}.png", (folder / f"{number}.png").read_bytes())
    names = [f"{number}.png" for number in range(6)]
    if metadata == "metadata.jsonl":
        rows = [{"file_name": name, "text": f"the {name}"} for name in names]
        (folder / metadata).write_text("\n".join(map(json.dumps, rows)))
    elif metadata:
        (folder / metadata).write_text("file_name,text\n" + "".join(f"{name},the {name}\n" for name in names))
    table = TableSettings(caption_column=("text",) if metadata else ())
    source = hugging(folder, tmp_path, table)
    before, fingerprint = by_id(source), source.fingerprint()
    assert colours(source) == WANTED
    assert [f.captions for f in before.values()] == [(f"the {name}",) if metadata else None for name in names]
    touch(folder / "3.png", png("red", (20, 20)))
    edited = hugging(folder, tmp_path, table)
    assert changed(before, by_id(edited)) == ["00000003.jpg"]
    assert edited.fingerprint() != fingerprint


def test_a_stream_passes_once_and_again_only_when_the_dataset_changed(hub_cache, tmp_path, monkeypatch):
    dataset_of(hub_cache, **CAPTIONS).save_to_disk(tmp_path / "set")
    first = by_id(hugging(tmp_path / "set", tmp_path, streaming=True))
    loads = []
    load = HuggingFaceRows._load
    monkeypatch.setattr(HuggingFaceRows, "_load", lambda self: loads.append(1) or load(self))
    assert by_id(hugging(tmp_path / "set", tmp_path, streaming=True)) == first
    assert not loads
    next(path for path in (tmp_path / "spool").glob("*/*")).unlink()  # someone cleared the folder
    assert colours(hugging(tmp_path / "set", tmp_path, streaming=True)) == WANTED
    assert len(loads) == 1
    dataset_of(hub_cache, **{**CAPTIONS, "caption": list("uvwxyz")}).save_to_disk(tmp_path / "set")
    after = by_id(hugging(tmp_path / "set", tmp_path, streaming=True))
    assert len(loads) == 2
    assert [f.captions for f in after.values()] == [(letter,) for letter in "uvwxyz"]
    assert all(first[name].stamp == after[name].stamp for name in first)  # the pictures are the same


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_filtered_by_columns(hub_cache, tmp_path, streaming):
    dataset_of(hub_cache, **CAPTIONS).save_to_disk(tmp_path / "set")

    def left(table=TableSettings(), **filter_func):  # noqa: B008
        source = hugging(
            tmp_path / "set", tmp_path / str(filter_func), table, filter_func=filter_func, streaming=streaming
        )
        rows = [int(name[:8]) for name in ids(source)]
        assert source.filtered == 6 - len(rows)
        return rows

    sized = TableSettings(width_column="w", height_column="w")
    assert left(sized, min_width=13) == [3, 4, 5]
    assert left(sized, min_width=11, min_height=14) == [4, 5]
    assert left(quality_column="meta.score", quality_thresholds={"aesthetic": 0.2}) == [2, 3, 4, 5]
    assert left(quality_column="meta.score.aesthetic", quality_thresholds=0.5) == [5]
    assert left(collection=["x", "z"]) == [0, 1, 4, 5]
    assert "holds no pictures" in message(lambda: left(collection="nothing"))
    with pytest.raises(SettingError, match="name width_column"):
        left(min_width=3)
    with pytest.raises(SettingError, match="filter_func has 'min_size'"):
        left(min_size=3)


def test_what_is_wrong_with_a_dataset_is_named(hub_cache, tmp_path):
    assert "does not exist" in message(lambda: ids(hugging(tmp_path / "none", tmp_path)))
    dataset_of(hub_cache, **CAPTIONS).save_to_disk(tmp_path / "set")
    text = message(lambda: ids(hugging(tmp_path / "set", tmp_path, image_column="picture")))
    assert "has no column picture. Choose among those that it has: image, caption, meta" in text
    text = message(
        lambda: ids(hugging(tmp_path / "set", tmp_path, TableSettings(caption_column=("text",)), streaming=True))
    )
    assert "has no column text" in text
    (tmp_path / "set/state.json").write_text("{")
    assert "set cannot be read (" in message(lambda: ids(hugging(tmp_path / "set", tmp_path)))
    hub = HuggingFaceRows(SourceSettings("huggingface", dataset_name="nobody/nothing-here"), tmp_path)
    text = message(lambda: ids(hub))
    assert "nobody/nothing-here cannot be loaded from the hub" in text
    assert "HF_TOKEN" in text


# A bucket


@pytest.fixture(scope="module")
def s3_server():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "5"},  # pages as small as that
    )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, "moto_server did not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path):
    """A client of boto3, which the source does not use, over a bucket of this test alone."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-" + SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    client.create_bucket(Bucket="pictures")
    yield client
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST")).close()


def s3_settings(endpoint, bucket="pictures", prefix="", **settings):
    return SourceSettings(
        "aws",
        aws_bucket_name=bucket,
        aws_endpoint_url=endpoint,
        aws_region_name="us-east-1",
        aws_data_prefix=prefix,
        **settings,
    )


def upload(client, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(
                Bucket="pictures", Key=prefix + path.relative_to(folder).as_posix(), Body=path.read_bytes()
            )


def test_a_bucket_gives_what_the_same_folder_gives(bucket, s3_server, tmp_path):
    folder = tmp_path / "5_set"
    for name in ("a.png", "a/z.JPG", "a-b/c.webp", "10_b/ü 猫+&?.png", "a/b/c.png", ".hidden/x.png", "notes.md"):
        touch(folder / name, name.encode() * 9000)
    touch(folder / "a/z.txt", b"caption")
    touch(folder / "empty.png", b"")
    upload(bucket, folder, "deep/5_set/")
    touch(folder / "later.png")
    upload(bucket, folder, "deep/5_set-not/")
    (folder / "later.png").unlink()
    here, there = LocalFolder(folder), S3Bucket(s3_settings(s3_server, prefix="/deep/5_set"))
    assert ids(there) == ids(here)
    assert [f.repeats for f in there.find()] == [f.repeats for f in here.find()]
    with ThreadPoolExecutor(8) as pool:
        names = ids(here) * 3
        assert list(pool.map(there.read, names)) == list(map(here.read, names))
        assert list(pool.map(there.text, names)) == list(map(here.text, names))
    assert all(there.head(name) == here.read(name)[: 64 * 1024] for name in ids(here))
    assert "nothing.png is gone" in message(lambda: there.read("nothing.png"))


def test_an_edited_object_changes_the_fingerprint_and_one_stamp(bucket, s3_server):
    for number in range(12):  # more than two pages
        bucket.put_object(Bucket="pictures", Key=f"{number}.png", Body=b"x")
    source = S3Bucket(s3_settings(s3_server))
    counts = []
    before, fingerprint = {f.id: f for f in source.find(counts.append)}, source.fingerprint()
    assert (len(before), counts) == (12, [12])
    assert source.fingerprint() == fingerprint
    bucket.put_object(Bucket="pictures", Key="11.png", Body=b"y")
    assert changed(before, by_id(source)) == ["11.png"]
    edited = source.fingerprint()
    bucket.put_object(Bucket="pictures", Key="7.txt", Body=b"caption")
    assert changed(before, by_id(source)) == ["11.png", "7.png"]
    assert len({source.fingerprint(), edited, fingerprint}) == 3


def test_what_is_wrong_with_a_bucket_is_named_without_a_secret(bucket, s3_server, monkeypatch):
    def listing(*args, **settings):
        source = S3Bucket(s3_settings(*args, **settings))
        text = message(lambda: ids(source))
        assert SECRET not in text + source.name + repr(source.identity)
        return text

    text = listing(s3_server, "other")
    assert "There is no bucket s3://other/ at http://127.0.0.1" in text
    assert "Check aws_bucket_name" in text
    assert "s3://pictures/cats/ at http" in listing(s3_server, prefix="cats")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
    start = time.monotonic()
    text = listing(dead)
    assert f"s3://pictures/ at {dead} cannot be reached (EndpointConnectionError). Check aws_endpoint_url" in text
    assert time.monotonic() - start < 60  # it gave up by itself
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "needs credentials, and there are none" in listing(s3_server)


def test_access_denied_is_named(s3_server, bucket):
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    source = S3Bucket(s3_settings(s3_server))
    denied = ClientError({"Error": {"Code": "AccessDenied", "Message": f"key {SECRET}"}}, "ListObjectsV2")
    text = str(source._failed(translate_boto_error(denied)))
    assert "refuses access (AccessDenied). Check the keys" in text
    assert SECRET not in text


def test_credentials_in_an_endpoint_are_refused():
    for endpoint in (f"https://me:{SECRET}@host", f"https://host/?key={SECRET}"):
        with pytest.raises(SettingError, match="holds credentials") as raised:
            S3Bucket(s3_settings(endpoint))
        assert SECRET not in str(raised.value)
    with pytest.raises(SettingError, match="write it with https://"):
        S3Bucket(s3_settings("host:9000"))
    with pytest.raises(SettingError, match="aws_bucket_name"):
        S3Bucket(s3_settings("", ""))


# Pictures of the graph


def test_stored_images_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(2))
    digest = store_images(tmp_path, [first, second, first], ["one", " ", "three"])
    assert len(list(tmp_path.glob("*.png"))) == 2
    source = StoredImages(tmp_path, digest)
    found = list(source.find())
    assert [f.captions for f in found] == [("one",), (), ("three",)]
    assert [f.id for f in found] == sorted({f.id for f in found})
    for f, wanted in zip(found, (first, second, first), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(source.read(f.id)))), wanted)
    assert found[0].stamp == found[2].stamp != found[1].stamp
    assert store_images(tmp_path, [first, second, first], ["one", " ", "three"]) == digest
    other = store_images(tmp_path, [first, second, first], ["one", " ", "four"])
    assert StoredImages(tmp_path, other).fingerprint() != source.fingerprint()
    after = list(StoredImages(tmp_path, other).find())
    assert [n for n in range(3) if found[n] != after[n]] == [2]
    assert len(list(tmp_path.iterdir())) == 4


def test_stored_images_that_are_gone_are_named(tmp_path):
    picture = np.zeros((2, 2, 3), np.uint8)
    digest = store_images(tmp_path, [picture], ["x"])
    source = StoredImages(tmp_path, digest)
    (found,) = source.find()
    next(tmp_path.glob("*.png")).unlink()
    assert "is gone" in message(lambda: source.read(found.id))
    assert "Run the node" in message(lambda: ids(StoredImages(tmp_path, "0" * 40)))
    assert "2 pictures but 1 captions" in message(lambda: store_images(tmp_path, [picture] * 2, ["x"]))


# From settings


def test_settings_choose_the_source(tmp_path, hub_cache):
    save(tmp_path / "set/a.png")
    (tmp_path / "set/t.csv").write_text("filename,caption\na.png,told\n")
    digest = store_images(tmp_path / "images", [np.zeros((2, 2, 3), np.uint8)], ["stored"])
    table = TableSettings("t.csv")

    def captions(strategy="textfile", **source):
        settings = DatasetSettings(
            "x", SourceSettings(**source), captions=CaptionSettings(strategy, instance_prompt=("p",))
        )
        opened = open_source(settings, tmp_path / "spool")
        return type(opened).__name__, [f.captions for f in opened.find()]

    folder = str(tmp_path / "set")
    assert captions(instance_data_dir=folder, table=table) == ("LocalFolder", [None])
    assert captions("csv", instance_data_dir=folder, table=table) == ("WithTable", [("told",)])
    assert captions("csv", type="csv", instance_data_dir=folder, table=table) == ("CsvRows", [("told",)])
    assert captions("filename", type="csv", instance_data_dir=folder, table=table) == ("CsvRows", [None])
    stored = str(tmp_path / "images" / f"{digest}.json")
    assert captions(type="memory", instance_data_dir=stored) == ("StoredImages", [("stored",)])
    dataset_of(hub_cache, text=list("abcdef")).save_to_disk(tmp_path / "hf")
    assert captions("instanceprompt", type="huggingface", dataset_name=str(tmp_path / "hf")) == (
        "HuggingFaceRows",
        [None] * 6,
    )
    for wrong in ({}, {"type": "csv", "instance_data_dir": folder}, {"type": "huggingface"}, {"type": "aws"}):
        with pytest.raises(SettingError):
            captions(**wrong)
    with pytest.raises(SettingError, match="where the table"):
        captions("parquet", instance_data_dir=folder)
