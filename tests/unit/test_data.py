"""From a folder to rows: what an index knows, what a dataset keeps, and what it says of the rest."""

import os
from dataclasses import replace

import pytest
from PIL import Image

from training.config.dataset import (
    CacheSettings,
    CaptionSettings,
    DatasetSettings,
    GeometrySettings,
    MixSettings,
    SourceSettings,
)
from training.data import index as index_module
from training.data.dataset import append, load_dataset, open_rows
from training.data.index import read_index
from training.data.sources.local import LocalFolder
from training.errors import DataError


def save(path, size=(80, 60), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(options.pop("mode", "RGB"), size, colour).save(path, **options)
    return path


def settings(folder, strategy="filename", **groups):
    return DatasetSettings(
        id=folder.name,
        source=SourceSettings(instance_data_dir=str(folder)),
        geometry=groups.get("geometry", GeometrySettings(64)),
        captions=groups.get("captions", CaptionSettings(strategy)),
        mix=groups.get("mix", MixSettings()),
        cache=groups.get("cache", CacheSettings()),
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cats").mkdir()
    return tmp_path / "cats"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


def captions_of(dataset):
    rows = open_rows(dataset.parts[0])
    return dict(zip(rows.ids.to_pylist(), rows.captions.to_pylist(), strict=True))


class Counted(LocalFolder):
    """A folder that tells which pictures and captions were read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.heads, self.texts = [], []

    def head(self, id):
        self.heads.append(id)
        return super().head(id)

    def text(self, id):
        self.texts.append(id)
        return super().text(id)


def test_a_missing_or_empty_folder_is_named(tmp_path, place):
    with pytest.raises(DataError, match=r"dogs does not exist\. Choose the folder"):
        load_dataset(settings(tmp_path / "dogs"), place)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match="holds no pictures"):
        load_dataset(settings(tmp_path), place)
    with pytest.raises(DataError, match="is a file, not a folder"):
        load_dataset(settings(tmp_path / "notes.txt"), place)


def test_pictures_without_a_caption_are_skipped_and_named(folder, place):
    for name in ("a", "sub/b", "c", "d"):
        save(folder / f"{name}.png")
    (folder / "a.txt").write_text("first\n\n second \n", encoding="utf-8")
    (folder / "c.txt").write_text(" \n")
    (folder / "sub/b.txt").write_bytes("für".encode("latin-1"))
    dataset = load_dataset(settings(folder, "textfile"), place)
    assert captions_of(dataset) == {"a.png": ["first", "second"]}
    assert (dataset.reports[0].pictures, dataset.reports[0].kept) == (4, 1)
    said = "\n".join(dataset.skipped)
    assert "c.txt" in said
    assert "d.txt" in said
    assert "not UTF-8" in said
    (folder / "a.txt").unlink()
    with pytest.raises(DataError, match=r"None of the 4 pictures.* The first: .*a\.txt"):
        load_dataset(settings(folder, "textfile"), place)


@pytest.mark.parametrize(
    ("name", "content"),
    [("broken.png", b"not a picture"), ("empty.jpg", b""), ("cut.jpg", None), ("said.txt", b"\xff\xfe\xfa")],
)
def test_on_bad_image_stop_stops_at_the_first(folder, place, name, content):
    save(folder / "good.png")
    save(folder / "said.png")
    (folder / "good.txt").write_text("good")
    (folder / "said.txt").write_text("said")
    if content is None:
        whole = save(folder / name, size=(300, 200)).read_bytes()
        content = whole[:60]
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_bytes(content if name == "said.txt" else b"a caption")
    bad = "said.png" if name == "said.txt" else name
    dataset = load_dataset(settings(folder, "textfile"), place)
    assert bad not in captions_of(dataset)
    assert len(dataset.skipped) == 1
    assert bad.split(".")[0] in dataset.skipped[0]
    with pytest.raises(DataError, match=bad.split(".")[0]):
        load_dataset(settings(folder, "textfile", cache=CacheSettings(on_bad_image="stop")), place)


def test_a_second_scan_reads_only_what_changed(folder, place):
    for name in "abc":
        save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    source = Counted(folder)
    first = load_dataset(settings(folder, "textfile"), place, source=source)
    assert sorted(source.heads) == ["a.png", "b.png", "c.png"]

    def again(strategy="textfile"):
        source.heads.clear()
        source.texts.clear()
        return load_dataset(settings(folder, strategy), place, source=source)

    assert again() == first
    assert (source.heads, source.texts) == ([], [])
    (folder / "b.txt").write_text("another")
    changed = again()
    assert (source.heads, source.texts) == ([], ["b.png"])
    assert changed.parts[0].digest != first.parts[0].digest
    assert captions_of(changed)["b.png"] == ["another"]
    save(folder / "c.png", size=(60, 80))
    assert again().parts[0].digest != changed.parts[0].digest
    assert source.heads == ["c.png"]
    (folder / "a.png").unlink()
    save(folder / "d.png")
    (folder / "d.txt").write_text("d")
    assert list(captions_of(again())) == ["b.png", "c.png", "d.png"]
    assert source.heads == ["d.png"]
    again("filename")
    assert source.heads == []  # sizes are known, whatever is said of the pictures
    with pytest.raises(DataError, match="changed while they were used"):
        open_rows(first.parts[0])


def test_a_damaged_index_is_made_anew(folder, place):
    save(folder / "a.png")
    dataset = load_dataset(settings(folder), place)
    file = next((place / "index").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    assert read_index(file) is None
    assert load_dataset(settings(folder), place) == dataset


def test_an_interrupted_scan_goes_on_from_what_was_read(folder, place, monkeypatch):
    monkeypatch.setattr(index_module, "SEGMENT_ROWS", 10)
    monkeypatch.setattr(index_module, "CHUNK_ROWS", 2)
    for number in range(50):
        save(folder / f"{number:03d}.png")
    source = Counted(folder)

    def interrupt(done, total):
        if done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_dataset(settings(folder), place, interrupt, source)
    read = len(source.heads)
    assert read < 50
    load_dataset(settings(folder), place, source=source)
    assert len(source.heads) <= read + 50 - 20
    assert sorted(set(source.heads)) == [f"{number:03d}.png" for number in range(50)]


def test_what_is_left_out_is_counted_with_its_reason(folder, place):
    save(folder / "good.png", size=(100, 100))
    save(folder / "small.png", size=(30, 100))
    save(folder / "wide.png", size=(500, 100))
    geometry = GeometrySettings(64, crop_aspect="square", minimum_image_size=50, maximum_aspect_ratio=2)
    dataset = load_dataset(settings(folder, geometry=geometry), place)
    assert {reason: (count, names) for reason, count, names in dataset.reports[0].dropped} == {
        "smaller than minimum_image_size": (1, ("small.png",)),
        "aspect above maximum_aspect_ratio": (1, ("wide.png",)),
    }
    assert dataset.reports[0].buckets == ((64, 64, 1),)
    assert any("left out: 1 smaller than minimum_image_size (small.png)" in line for line in dataset.reports[0].lines())
    with pytest.raises(DataError, match=r"leave out all 3 pictures.*Change the filters"):
        load_dataset(settings(folder, geometry=replace(geometry, minimum_image_size=900)), place)


def test_kohya_folder_names_ask_for_passes(folder, place):
    save(folder / "10_cats" / "a.png")
    save(folder / "other" / "b.png")
    dataset = load_dataset(settings(folder, mix=MixSettings(repeats=2)), place)
    assert open_rows(dataset.parts[0]).repeats.tolist() == [9, 2]


def test_a_limit_takes_the_same_pictures_whatever_else_is_there(folder, place):
    for number in range(20):
        save(folder / f"{number}.png")
    limited = settings(folder, mix=MixSettings(max_num_samples=5))
    first = set(open_rows(load_dataset(limited, place).parts[0]).ids.to_pylist())
    assert len(first) == 5
    gone = next(f"{n}.png" for n in range(20) if f"{n}.png" not in first)
    (folder / gone).unlink()
    assert set(open_rows(load_dataset(limited, place).parts[0]).ids.to_pylist()) == first


def test_datasets_of_one_name_are_told_apart(folder, place):
    save(folder / "a.png")
    one = load_dataset(settings(folder), place)
    both = append(append(one, one), one)
    assert [part.settings.id for part in both.parts] == ["cats", "cats-2", "cats-3"]
    assert both.pictures == 3


def test_random_crops_differ_between_epochs_and_keep_their_size(folder, place):
    for number in range(5):
        save(folder / f"{number}.png", size=(300, 100))
    geometry = GeometrySettings(64, crop_aspect="random", crop_style="random", crop_aspect_buckets=((1, 1), (2, 1)))
    part = load_dataset(settings(folder, geometry=geometry), place).parts[0]
    plans = [open_rows(part, epoch).plan for epoch in range(4)]
    assert len({tuple(plan.left_px.tolist()) for plan in plans}) == 4
    assert len({tuple(plan.width_px.tolist()) for plan in plans}) == 1
    assert open_rows(part, 2).plan.left_px.tolist() == plans[2].left_px.tolist()


def test_the_time_of_a_file_alone_is_enough_to_look_again(folder, place):
    save(folder / "a.png")
    source = Counted(folder)
    load_dataset(settings(folder), place, source=source)
    os.utime(folder / "a.png", ns=(1, 1))
    load_dataset(settings(folder), place, source=source)
    assert source.heads == ["a.png", "a.png"]
