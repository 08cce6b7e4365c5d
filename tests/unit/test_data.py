"""From a folder to batches: pictures, captions, crops and the order they are drawn in."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import append, load_dataset
from training.data.geometry import plan_crop
from training.data.pictures import load_picture, picture_size
from training.data.sampler import Sampler
from training.data.source import folder_fingerprint
from training.errors import DataError


def save(path, size=(80, 60), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(options.pop("mode", "RGB"), size, colour).save(path, **options)
    return path


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cats does not exist\. Choose the folder"):
        load_dataset(tmp_path / "cats", 64)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match="holds no pictures"):
        load_dataset(tmp_path, 64)
    with pytest.raises(DataError, match="is a file, not a folder"):
        load_dataset(tmp_path / "notes.txt", 64)


def test_all_missing_captions_are_counted_at_once(tmp_path):
    for name in ("a", "sub/b", "c"):
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("first\n\n second \n", encoding="utf-8")
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"missing for 2 of 3 pictures \(first: c\.png\)\. Add c\.txt"):
        load_dataset(tmp_path, 64)
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "sub/b.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8"):
        load_dataset(tmp_path, 64)
    (tmp_path / "sub/b.txt").write_text("\ufeffwith mark", encoding="utf-8")
    captions = {sample.id: sample.captions for sample in load_dataset(tmp_path, 64).samples}
    assert captions == {"a.png": ("first", "second"), "c.png": ("third",), "sub/b.png": ("with mark",)}


def test_captions_from_names_and_from_one_prompt(tmp_path):
    save(tmp_path / "red_apple.png")
    assert load_dataset(tmp_path, 64, caption_strategy="filename").samples[0].captions == ("red apple",)
    prompted = load_dataset(tmp_path, 64, caption_strategy="instanceprompt", instance_prompt=" a zorblax ")
    assert prompted.samples[0].captions == ("a zorblax",)
    with pytest.raises(DataError, match="instance_prompt is empty"):
        load_dataset(tmp_path, 64, caption_strategy="instanceprompt")


def test_pictures_that_cannot_be_read_are_skipped_and_named(tmp_path):
    save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "empty.jpg").touch()
    dataset = load_dataset(tmp_path, 64, caption_strategy="filename")
    assert [sample.id for sample in dataset.samples] == ["good.png"]
    assert len(dataset.skipped) == 2
    assert "bad.png cannot be read" in dataset.skipped[0]
    (tmp_path / "good.png").unlink()
    with pytest.raises(DataError, match="None of the 2 pictures"):
        load_dataset(tmp_path, 64, caption_strategy="filename")


def test_kohya_folder_names_ask_for_passes(tmp_path):
    save(tmp_path / "10_cats" / "a.png")
    save(tmp_path / "other" / "b.png")
    dataset = load_dataset(tmp_path, 64, caption_strategy="filename", repeats=2)
    assert [sample.repeats for sample in dataset.samples] == [9, 2]
    assert load_dataset(tmp_path / "10_cats", 64, caption_strategy="filename").samples[0].repeats == 9


def test_appended_datasets_keep_their_ids_apart(tmp_path):
    save(tmp_path / "a.png")
    one = load_dataset(tmp_path, 64, caption_strategy="filename")
    three = append(append(one, one), one)
    assert len({sample.id for sample in three.samples}) == 3


def test_the_fingerprint_follows_names_sizes_and_times(tmp_path):
    save(tmp_path / "a.png")
    before = folder_fingerprint(tmp_path)
    assert folder_fingerprint(tmp_path) == before
    (tmp_path / "a.txt").write_text("one")
    assert folder_fingerprint(tmp_path) != before


def test_crops_cover_the_bucket_and_keep_the_middle():
    generator = random.Random(0)
    for _ in range(500):
        width, height = generator.randint(1, 5000), generator.randint(1, 5000)
        resolution, crop = generator.choice([64, 512, 1024]), generator.choice(["preserve", "square"])
        plan = plan_crop(width, height, resolution, crop)
        assert plan.width_px % 64 == plan.height_px % 64 == 0
        assert plan.width_px >= 64 <= plan.height_px
        assert plan.scaled_width_px >= plan.width_px
        assert plan.scaled_height_px >= plan.height_px
        assert 0 <= plan.scaled_width_px - plan.width_px - 2 * plan.left_px <= 1
        assert 0 <= plan.scaled_height_px - plan.height_px - 2 * plan.top_px <= 1
        # cut along one side only, and scaled alike in both
        assert plan.scaled_width_px == plan.width_px or plan.scaled_height_px == plan.height_px
    assert plan_crop(2000, 1000, 1024, "square").width_px == 1024
    wide = plan_crop(2000, 1000, 1024, "preserve")
    assert (wide.width_px, wide.height_px) == (1472, 704)
    assert plan_crop(4000, 2000, 1024, "preserve").width_px == 1472  # the aspect alone decides


def test_pictures_stand_upright_over_white_and_in_the_middle(tmp_path):
    turned = Image.new("RGB", (80, 40), "blue")
    turned.paste("red", (0, 0, 40, 40))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # seen: turned right, so that the left half lies on top
    turned.save(tmp_path / "turned.png", exif=exif)
    assert picture_size(tmp_path / "turned.png") == (40, 80)
    pixels = load_picture(tmp_path / "turned.png", plan_crop(40, 80, 64, "square"))
    assert pixels.shape == (64, 64, 3)
    assert pixels[5, 32].tolist() == [255, 0, 0]
    assert pixels[60, 32].tolist() == [0, 0, 255]

    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (16, 16, 48, 48))
    clear.save(tmp_path / "clear.png")
    pixels = load_picture(tmp_path / "clear.png", plan_crop(64, 64, 64, "square"))
    assert pixels[2, 2].tolist() == [255, 255, 255]
    assert pixels[32, 32].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "mode", "colour"),
    [("cmyk.jpg", "CMYK", (0, 255, 255, 0)), ("grey16.png", "I;16", 30000), ("palette.gif", "P", 1), ("l.png", "L", 9)],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path, name, mode, colour):
    Image.new(mode, (64, 64), colour).save(tmp_path / name)
    pixels = load_picture(tmp_path / name, plan_crop(64, 64, 64, "square"))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    if mode == "CMYK":
        assert pixels[0, 0, 0] > 200 > pixels[0, 0, 1]
    if mode == "I;16":
        assert abs(int(pixels[0, 0, 0]) - 30000 // 257) <= 1


def test_a_picture_cut_short_is_named(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut\.png cannot be read"):
        load_picture(path, plan_crop(64, 64, 64, "square"))


def test_batches_hold_one_bucket_and_an_epoch_holds_everything():
    buckets = ["wide"] * 5 + ["tall"] * 8
    repeats = [0] * 4 + [2] + [0] * 8
    sampler = Sampler(buckets, repeats, 4, seed=1)
    assert sampler.steps_per_epoch == 2 + 2  # 7 wide ones, 8 tall ones
    epoch = [sampler.batch(step) for step in range(4)]
    assert all(len(batch) == 4 and len({buckets[i] for i in batch}) == 1 for batch in epoch)
    seen = Counter(index for batch in epoch for index in batch)
    assert set(seen) == set(range(13))
    assert all(seen[i] == 1 for i in range(5, 13))
    assert seen[4] >= 3
    assert sum(seen[i] for i in range(5)) == 8  # 7 and one again to fill the batch


def test_batches_depend_on_seed_and_step_alone():
    def batches(seed, steps):
        sampler = Sampler(["a"] * 10, [0] * 10, 3, seed)
        return [sampler.batch(step) for step in steps]

    forward = batches(1, range(40))
    assert batches(1, [39, 3, 20]) == [forward[39], forward[3], forward[20]]
    assert batches(2, range(40)) != forward
    assert forward[:4] != forward[4:8]  # another epoch, another order
    assert Sampler(["a"], [0], 4, 0).batch(0) == [0, 0, 0, 0]
    with pytest.raises(DataError, match="empty"):
        Sampler([], [], 1, 0)
