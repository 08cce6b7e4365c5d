"""SimpleTuner's ``multidatabackend.json``, read and written."""

import json
import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config.databackend.keys import Backends
from training.config.databackend.read import parse_databackend, read_databackend
from training.config.databackend.write import write_databackend
from training.config.dataset import (
    ALIGNMENTS_PX,
    BACKGROUNDS,
    CROP_ASPECTS,
    CROP_STYLES,
    ON_BAD_IMAGE,
    SPLITS,
    CacheSettings,
    CaptionSettings,
    CaptionShuffle,
    DatasetSettings,
    GeometrySettings,
    MixSettings,
    SourceSettings,
    TableSettings,
    TextCacheSettings,
)
from training.config.json_text import plain_json
from training.config.paths import resolve
from training.errors import SettingError

SAMPLE = (Path(__file__).parents[1] / "simpletuner" / "multidatabackend.json").read_text()


def parse(*entries, defaults=None):
    return parse_databackend(list(entries), "multi.json", defaults)


def one(defaults=None, **keys):
    (dataset,) = parse({"id": "a", **keys}, defaults=defaults).datasets
    return dataset


def refused(sentence, *entries, **keys):
    with pytest.raises(SettingError, match=sentence):
        parse(*entries or [{"id": "a", **keys}])


def test_the_sample_is_read(tmp_path):
    path = tmp_path / "multidatabackend.json"
    path.write_text(SAMPLE, encoding="utf-8")
    assert read_databackend(path) == Backends(
        datasets=(
            DatasetSettings(
                id="lumina2-training",
                source=SourceSettings(type="local", instance_data_dir="/datasets/training"),
                geometry=GeometrySettings(
                    resolution=1024,
                    resolution_type="pixel_area",
                    crop=True,
                    crop_aspect="square",
                    crop_style="center",
                    minimum_image_size=512,
                    maximum_image_size=2048,
                    target_downsample_size=1024,
                ),
                captions=CaptionSettings(caption_strategy="textfile"),
                cache=CacheSettings(cache_dir_vae="cache/vae/lumina2/training"),
            ),
        ),
        text_cache=TextCacheSettings(cache_dir="cache/text/lumina2", write_batch_size=128),
        notes=("No effect here: metadata_backend.",),
    )
    assert read_databackend(path, {"vae_batch_size": "1"}).datasets[0].cache.vae_batch_size == 1


def test_what_a_file_leaves_out_is_simpletuners_default():
    dataset = one()
    geometry = dataset.geometry
    assert (geometry.crop, geometry.crop_aspect, geometry.crop_style) == (False, "square", "center")
    assert (geometry.resolution, geometry.resolution_type, geometry.aspect_bucket_alignment) == (1024, "pixel_area", 64)
    assert dataset.captions == CaptionSettings(caption_strategy="filename")
    assert dataset.mix == MixSettings()
    assert dataset.cache == CacheSettings(vae_batch_size=4, write_batch_size=128)
    assert one(parquet={"path": "a.parquet"}).source.table.identifier_includes_extension is False
    assert one(type="csv", csv_file="a.csv").source.table.filename_column == "url"
    assert parse({"id": "a"}).text_cache == TextCacheSettings()


def test_the_trainings_own_keys_hold_where_a_dataset_says_nothing():
    defaults = {"vae_batch_size": 2, "resolution": "512", "caption_strategy": "textfile", "learning_rate": 1, "seed": 7}
    dataset = one(defaults, caption_shuffle={"enable": True})
    assert (dataset.cache.vae_batch_size, dataset.geometry.resolution) == (2, 512)
    assert dataset.captions.caption_strategy == "textfile"
    assert dataset.captions.caption_shuffle.seed == 7
    assert one(defaults, vae_batch_size=3, resolution=768, caption_shuffle={"seed": 0}) == replace(
        one(),
        geometry=replace(one().geometry, resolution=768),
        captions=CaptionSettings(caption_strategy="textfile"),
        cache=CacheSettings(vae_batch_size=3),
    )


@pytest.mark.parametrize(
    ("keys", "fresh"),
    [
        ({"crop": True, "crop_style": "random"}, True),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1]}, True),
        ({"crop": False, "crop_style": "random"}, False),
        ({"crop": True, "crop_style": "random", "vae_cache_clear_each_epoch": False}, False),
        ({"crop": True}, False),
    ],
)
def test_random_crops_are_drawn_anew_in_each_epoch(keys, fresh):
    assert one(**keys).cache.vae_cache_clear_each_epoch is fresh


def test_texts_are_taken_for_numbers_and_booleans():
    dataset = one(
        crop="True", resolution="1.5", resolution_type="area", repeats="9", vae_batch_size=2.0, end_epoch=None
    )
    assert (dataset.geometry.crop, dataset.geometry.resolution) == (True, 1.5)
    assert (dataset.mix.repeats, dataset.cache.vae_batch_size, dataset.mix.end_epoch) == (9, 2, 0)
    assert one(end_epoch=None, crop_style=None) == one()
    assert type(dataset.cache.vae_batch_size) is int
    assert one(crop="False").geometry.crop is False


def test_captions_and_tables_are_read():
    shuffle = {"enable": "true", "count": 3, "split_on": "period", "position_start": 1, "tag_dropout": 0.1}
    dataset = one(
        caption_strategy="parquet",
        instance_prompt=["a cat", "the cat"],
        caption_shuffle=shuffle,
        parquet={
            "path": "t.parquet",
            "caption_column": ["a", "b.c"],
            "fallback_caption_column": "d",
            "width_column": "w",
        },
    )
    assert dataset.captions == CaptionSettings(
        "parquet", ("a cat", "the cat"), caption_shuffle=CaptionShuffle(True, 3, 0, "period", 1, tag_dropout=0.1)
    )
    assert dataset.source.table == TableSettings("t.parquet", "filename", ("a", "b.c"), "d", "w", "", False)
    assert one(instance_prompt="a cat").captions.instance_prompt == ("a cat",)
    table = one(type="csv", csv_file="t.csv", csv_caption_column="c", csv_cache_dir="x").source.table
    assert table == TableSettings("t.csv", "url", ("c",))
    source = one(
        type="huggingface",
        dataset_name="x/y",
        caption_column=["a", "b"],
        huggingface={"width_column": "w", "filter_func": {"min_width": 5}, "composite_image_config": {}},
    ).source
    assert source == SourceSettings(
        "huggingface",
        dataset_name="x/y",
        table=TableSettings(caption_column=("a", "b"), width_column="w"),
        filter_func={"min_width": 5},
    )


def test_aspects_may_have_weights():
    aspects = one(crop_aspect_buckets=["1.0", 0.75, {"aspect": 2, "weight": 0.5}, {"aspect_ratio": 3}])
    assert aspects.geometry.crop_aspect_buckets == ((1, 1), (0.75, 1), (2, 0.5), (3, 1))


def test_several_resolutions_are_several_datasets():
    datasets = parse({"id": "a", "resolution": [512, "768"], "repeats": 2}, {"id": "b", "resolution": [640]}).datasets
    assert [(d.id, d.geometry.resolution, d.mix.repeats) for d in datasets] == [
        ("a-512", 512, 2),
        ("a-768", 768, 2),
        ("b", 640, 0),
    ]
    refused('two datasets with the id "a-512"', {"id": "a", "resolution": [512, 768]}, {"id": "a-512"})
    refused("resolution is", resolution=[])


def test_the_environment_is_put_in(monkeypatch):
    monkeypatch.setenv("PICTURES", "/data")
    dataset = one(instance_data_dir="{env:PICTURES}/cats", parquet={"path": "{env:PICTURES}/t"})
    assert (dataset.source.instance_data_dir, dataset.source.table.path) == ("/data/cats", "/data/t")
    monkeypatch.delenv("PICTURES")
    refused('dataset "a": the environment variable PICTURES is not set', instance_data_dir="{env:PICTURES}/cats")
    parse({"id": "b"}, {"id": "a", "instance_data_dir": "{env:PICTURES}", "disabled": True})


def test_secrets_are_not_kept():
    secret = "wpz-764e973452"
    keys = {"type": "aws", "aws_bucket_name": "b", "aws_access_key_id": secret, "aws_secret_access_key": secret}
    backends = parse({"id": "a", **keys, "aws_endpoint_url": "https://foo.bar/"})
    assert backends.datasets[0].source == SourceSettings(
        "aws", aws_bucket_name="b", aws_endpoint_url="https://foo.bar/"
    )
    assert [note for note in backends.notes if "set AWS_SECRET_ACCESS_KEY" in note]
    written = write_databackend(backends)
    assert secret not in repr(backends) + repr(written)
    assert written[0]["aws_access_key_id"] == "{env:AWS_ACCESS_KEY_ID}"
    assert parse(*written) == replace(backends, notes=())


def test_what_is_disabled_is_left_out():
    backends = parse({"id": "a"}, {"id": "b", "disabled": "true", "nonsense": 1}, {"id": "c", "disable": True})
    assert [dataset.id for dataset in backends.datasets] == ["a"]
    assert backends.notes == ('"b" is disabled and left out.', '"c" is disabled and left out.')
    assert [d.id for d in parse({"id": "a", "disabled": "false"}).datasets] == ["a"]
    refused("no dataset of pictures to train on", id="a", disabled=True)


def test_keys_without_effect_are_listed_once():
    keys = {"hash_filenames": True, "delete_unwanted_images": True}
    backends = parse({"id": "a", **keys}, {"id": "b", **keys, "num_proc": 4})
    assert backends.notes == ("No effect here: hash_filenames, delete_unwanted_images, num_proc.",)


TEXT_CACHE = {"id": "texts", "dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "c/text"}
# Whole files as people write them, and of each dataset what has to come of it.
WRITTEN = {
    "two datasets and regularisation": (
        [{"id": "cats", "type": "local", "instance_data_dir": "cats", "repeats": "9", "crop": "False",
          "resolution": 512, "resolution_type": "pixel", "caption_strategy": "textfile"},
         {"id": "dogs", "instance_data_dir": "dogs", "probability": 0.5, "start_epoch": 2,
          "caption_strategy": "filename"},
         {"id": "others", "instance_data_dir": "o", "is_regularization_data": "true", "crop": "True"}, TEXT_CACHE],
        {"cats": {"mix.repeats": 9, "geometry.crop": False, "geometry.resolution": 512},
         "dogs": {"mix.probability": 0.5, "mix.start_epoch": 2},
         "others": {"mix.is_regularisation_data": True, "geometry.crop": True}},
    ),
    "S3": (
        [{"id": "bucket", "type": "aws", "aws_bucket_name": "pictures", "aws_data_prefix": "train",
          "aws_endpoint_url": "https://s3.example", "aws_region_name": None, "aws_access_key_id": "id",
          "aws_secret_access_key": "key", "caption_strategy": "textfile", "metadata_backend": "json",
          "vae_cache_clear_each_epoch": True},
         {**TEXT_CACHE, "type": "aws", "aws_bucket_name": "texts", "aws_access_key_id": "id"}],
        {"bucket": {"source.aws_bucket_name": "pictures", "source.aws_data_prefix": "train",
                    "cache.vae_cache_clear_each_epoch": True}},
    ),
    "csv of addresses": (
        [{"id": "list", "type": "csv", "csv_file": "p.csv", "csv_caption_column": "text", "csv_url_column": "image_url",
          "csv_cache_dir": "c/csv", "caption_strategy": "csv", "hash_filenames": True}, TEXT_CACHE],
        {"list": {"source.type": "csv", "source.table.path": "p.csv", "source.table.caption_column": ("text",),
                  "source.table.filename_column": "image_url"}},
    ),
    "parquet": (
        [{"id": "photos", "type": "local", "instance_data_dir": "p", "caption_strategy": "parquet",
          "metadata_backend": "parquet", "parquet": {"path": "p.parquet", "filename_column": "id",
          "caption_column": "caption", "fallback_caption_column": "tags", "width_column": "width",
          "height_column": "height", "identifier_includes_extension": False}}, TEXT_CACHE],
        {"photos": {"source.table.fallback_caption_column": "tags", "source.table.width_column": "width",
                    "source.table.identifier_includes_extension": False}},
    ),
    "Hugging Face": (
        [{"id": "hub", "type": "huggingface", "dataset_name": "me/cats", "split": "train", "image_column": "image",
          "caption_strategy": "huggingface", "caption_column": ["long", "short"], "num_proc": 16,
          "metadata_backend": "huggingface", "huggingface": {"filter_func": {"min_width": 512}}}, TEXT_CACHE],
        {"hub": {"source.dataset_name": "me/cats", "source.table.caption_column": ("long", "short"),
                 "source.filter_func": {"min_width": 512}}},
    ),
    "masks, held-out pictures and several sizes": (
        [{"id": "a", "instance_data_dir": "a", "conditioning_data": "m", "resolution": [512, 768], "crop": True,
          "crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.75, 1.33]},
         {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "m"},
         {"id": "kept", "dataset_type": "eval", "instance_data_dir": "k"}, TEXT_CACHE],
        {"a-512": {"mix.conditioning_data": "m"}, "a-768": {"geometry.resolution": 768},
         "m": {"mix.conditioning_type": "mask"}, "kept": {"mix.dataset_type": "eval"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_files_as_people_write_them(name):
    entries, expected = WRITTEN[name]
    backends = parse(*entries)
    assert [each.id for each in backends.datasets] == list(expected)
    assert backends.text_cache.cache_dir == "c/text"
    for dataset in backends.datasets:
        for path, value in expected[dataset.id].items():
            assert attrgetter(path)(dataset) == value, path
    again = parse(*json.loads(json.dumps(write_databackend(backends))))
    assert replace(again, notes=()) == replace(backends, notes=())


KEYS = """
id type dataset_type instance_data_dir disabled disable cache_dir_vae resolution resolution_type minimum_image_size
maximum_image_size target_downsample_size minimum_aspect_ratio maximum_aspect_ratio max_upscale_threshold crop
crop_aspect crop_aspect_buckets crop_style caption_strategy instance_prompt prepend_instance_prompt
only_instance_prompt disable_multiline_split caption_shuffle caption_filter_list parquet csv_file csv_caption_column
csv_cache_dir metadata_backend vae_cache_disable vae_cache_ondemand vae_cache_clear_each_epoch
vae_cache_scan_behaviour skip_file_discovery preserve_data_backend_cache override_dataset_config image_embeds
text_embeds dataset_name split revision image_column caption_column num_proc huggingface aws_bucket_name
aws_endpoint_url aws_region_name aws_access_key_id aws_secret_access_key aws_session_token aws_data_prefix
aws_max_pool_connections conditioning_data conditioning_type conditioning source_dataset_id repeats probability
start_epoch start_step end_epoch end_step disable_after_epoch_step is_regularisation_data is_regularization_data
max_num_samples train_batch_size vae_batch_size write_batch_size delete_unwanted_images timestep_sampling_offset
hash_filenames text_encoder_batch_size text_cache_ondemand text_cache_disable cache_dir
"""

ONLY_WITH = {
    "caption_column": {"type": "huggingface"},
    "source_dataset_id": {"dataset_type": "conditioning", "conditioning_type": "mask"},
}


def test_every_key_of_simpletuners_documents_is_known():
    for key in KEYS.split():
        try:
            parse({**ONLY_WITH.get(key, {}), key: {}, "id": "a"})
        except SettingError as error:
            said = str(error)
        else:
            said = ""
        assert "there is no setting" not in said, key


@pytest.mark.parametrize(
    ("sentence", "keys"),
    [
        (
            r'multi\.json, dataset "a": there is no setting "crop_stile"; did you mean "crop_style"\?',
            {"crop_stile": "x"},
        ),
        (r'there is no setting "xyzzy"; take it out\.', {"xyzzy": 1}),
        (r'caption_shuffle: there is no setting "cuont"; did you mean "count"\?', {"caption_shuffle": {"cuont": 1}}),
        (r"parquet: there is no setting", {"parquet": {"pth": "x"}}),
        (r'"a": repeats is \'many\'; a whole number is wanted', {"repeats": "many"}),
        ("repeats is 1.5; a whole number", {"repeats": 1.5}),
        ("repeats is True; a whole number", {"repeats": True}),
        ("resolution is \\['x'\\]|resolution is 'x'; a number is wanted", {"resolution": ["x"]}),
        ("resolution is nan; a number", {"resolution": float("nan")}),
        ("crop is 'maybe'; true or false", {"crop": "maybe"}),
        ("crop is 2; true or false", {"crop": 2}),
        ("instance_data_dir is 3; a text", {"instance_data_dir": 3}),
        ("instance_prompt is .*; a text or a list of texts", {"instance_prompt": [1]}),
        ("crop_aspect_buckets is 1; a list of aspects", {"crop_aspect_buckets": 1}),
        ("crop_aspect_buckets is .*; a list of aspects", {"crop_aspect_buckets": [{"ratio": 1}]}),
        ("caption_shuffle is 1; a block", {"caption_shuffle": 1}),
        ("filter_func is 1; a block", {"type": "huggingface", "huggingface": {"filter_func": 1}}),
        ("\"a\": crop_aspect is 'squre'; choose one of", {"crop_aspect": "squre"}),
        ("needs aspects to choose from", {"crop": True, "crop_aspect": "closest"}),
        ('crop_style is "face", which is not offered; use center, corner or random', {"crop_style": "face"}),
        ("dataset_type is 'video'", {"dataset_type": "video"}),
        ("names a csv file and a parquet block", {"csv_file": "a", "parquet": {}}),
        ('image_embeds is "x", but no', {"image_embeds": "x"}),
        ("conditioning_data is 1", {"conditioning_data": 1}),
        ("names 2 datasets", {"conditioning_data": ["b", "c"]}),
    ],
)
def test_a_mistake_is_named_with_its_place(sentence, keys):
    with pytest.raises(SettingError, match=sentence) as error:
        one(**keys)
    assert str(error.value).startswith('multi.json, dataset "a"')
    assert re.search(r"; \w|, which|, but ", str(error.value)), "a remedy behind what is wrong"


def test_entries_need_ids_of_their_own():
    refused(r"multi\.json, dataset 2, has no id", {"id": "a"}, {"type": "local"})
    refused("dataset 1, has no id", {"id": 5})
    refused('two datasets with the id "a"', {"id": "a"}, {"id": "a"})
    for entries in ({"id": "a"}, ["a"], None):
        with pytest.raises(SettingError, match="has to hold a list of datasets"):
            parse_databackend(entries, "multi.json")


TEXTS = {"dataset_type": "text_embeds"}


def test_one_text_cache_is_used(tmp_path):
    both = [
        {"id": "a"},
        {"id": "t", "cache_dir": "x", **TEXTS},
        {"id": "u", "cache_dir": "y", "default": True, **TEXTS},
    ]
    backends = parse(*both)
    assert backends.text_cache.cache_dir == "y"
    assert backends.notes == ('"t" is left out: all captions are kept in "u".',)
    assert parse(*both[:2]).text_cache.cache_dir == "x"
    refused("t, u, none have", *both[:2], {"id": "u", **TEXTS})
    refused("t, u, 2 have", both[0], {**both[1], "default": True}, both[2])
    refused("write_batch_size is 0; choose at least 1", both[0], {**both[1], "write_batch_size": 0})
    refused('"t": there is no setting "crop"', both[0], {**both[1], "crop": True})


@pytest.mark.parametrize("name", ["filters.txt", "filters.json"])
def test_caption_filters_may_lie_in_a_file(tmp_path, name):
    filters = ["arafed ", "^this .* has", "s/this/that/"]
    text = json.dumps(filters) if name.endswith("json") else "\n".join([*filters, ""])
    (tmp_path / name).write_text(text, encoding="utf-8")
    entries = [{"id": "a"}, {"id": "t", "caption_filter_list": name, **TEXTS}]
    (tmp_path / "config").mkdir()
    path = tmp_path / "config" / "multi.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert read_databackend(path).text_cache.caption_filter_list == tuple(filters)
    (tmp_path / name).unlink()
    with pytest.raises(SettingError, match=r"caption_filter_list .* cannot be read"):
        read_databackend(path)


def test_a_picture_cache_may_be_an_entry_of_its_own():
    store = {"id": "v", "dataset_type": "image_embeds", "type": "local", "cache_dir": "x"}
    assert parse({"id": "a", "image_embeds": "v"}, store).datasets[0].cache.cache_dir_vae == "x"
    own = {"id": "a", "image_embeds": "v", "cache_dir_vae": "y"}
    assert parse(own, store).datasets[0].cache.cache_dir_vae == "y"
    # SimpleTuner's own example leaves the type of the entry out
    assert len(parse({"id": "a", "image_embeds": "v"}, {"id": "v", "type": "local"}).datasets) == 1


def test_masks_are_joined_to_their_pictures():
    masks = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask"}
    for pictures, mask in [
        ({"id": "a", "conditioning_data": "m"}, masks),
        ({"id": "a", "conditioning_data": ["m"]}, masks),
        ({"id": "a"}, {**masks, "source_dataset_id": "a"}),
        ({"id": "a", "resolution": [512, 768]}, {**masks, "source_dataset_id": "a", "resolution": [512, 768]}),
    ]:
        *pictures, mask = parse(pictures, mask).datasets
        assert (mask.id, mask.mix) == ("m", MixSettings(dataset_type="conditioning", conditioning_type="mask"))
        assert {dataset.mix.conditioning_data for dataset in pictures} == {"m"}
    refused('there is no dataset "n" for conditioning_data', {"id": "a", "conditioning_data": "n"}, masks)
    for other in (
        {**masks, "disabled": True},
        {**masks, "conditioning_type": "controlnet"},
        {**masks, "conditioning_type": None},
    ):
        backends = parse({"id": "a", "conditioning_data": "m"}, other)
        assert backends.datasets == parse({"id": "a"}).datasets
        assert backends.notes[-1] == '"a" is trained without "m", which is left out.'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, // one\n "b": [1, 2,], # two\n}', {"a": 1, "b": [1, 2]}),
        ('/* a\n "b" */ ["http://x", "#1", "/* c */", "\\"//,]"]', ["http://x", "#1", "/* c */", '"//,]']),
        ("[1, /* x */ 2, // y\n ]", [1, 2]),
        ('["a,]", ""]', ["a,]", ""]),
    ],
)
def test_comments_are_left_out(text, expected):
    plain = plain_json(text)
    assert json.loads(plain) == expected
    assert plain.count("\n") == text.count("\n")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "multi.json"
    with pytest.raises(SettingError, match=r"multi\.json does not exist"):
        read_databackend(path)
    path.write_text('[\n/* two\nlines */ {"id": "a" "b"}]', encoding="utf-8")
    with pytest.raises(SettingError, match=r"multi\.json, line 3, is not JSON"):
        read_databackend(path)
    path.write_bytes(b"[\xff]")
    with pytest.raises(SettingError, match="in UTF-8"):
        read_databackend(path)
    path.write_bytes(b'\xef\xbb\xbf[{"id": "a"}]')
    assert read_databackend(path).datasets[0].id == "a"


def test_paths_are_looked_for_in_every_folder(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    (second / "cats").mkdir(parents=True)
    first.mkdir()
    for folder in (first, second):
        (folder / "t.parquet").touch()
    source = SourceSettings(instance_data_dir="cats", table=TableSettings("t.parquet"), dataset_name="x/y")
    written = DatasetSettings("a", source, cache=CacheSettings(cache_dir_vae="cache/vae"))
    found = resolve(written, [first, second])
    assert found.source.instance_data_dir == str(second / "cats")
    assert found.source.table.path == str(first / "t.parquet")
    assert found.source.dataset_name == "x/y"
    assert found.cache.cache_dir_vae == str(first / "cache/vae")
    (second / "cache" / "vae").mkdir(parents=True)
    assert resolve(written, [first, second]).cache.cache_dir_vae == str(second / "cache/vae")
    missing = replace(written, source=replace(source, instance_data_dir="dogs"))
    assert resolve(missing, [first, second]).source.instance_data_dir == "dogs"
    absolute = replace(written, source=replace(source, instance_data_dir=str(tmp_path)))
    assert resolve(absolute, [first]).source.instance_data_dir == str(tmp_path)
    assert resolve(DatasetSettings("a"), [Path()]) == DatasetSettings("a")


names = st.text("abcXYZ09_-/ .é猫", min_size=1, max_size=8).filter(str.strip)
maybe = names | st.just("")
several = st.lists(names, max_size=3).map(tuple)
counts = st.integers(1, 1000)
shares = st.floats(0, 1)


@st.composite
def geometries(draw):
    area = draw(st.sampled_from(["area", "pixel", "pixel_area"]))
    sizes = st.floats(0.1, 4) if area == "area" else st.integers(64, 4096)
    largest = draw(sizes | st.just(0))
    return GeometrySettings(
        resolution=draw(sizes),
        resolution_type=area,
        aspect_bucket_alignment=draw(st.sampled_from(ALIGNMENTS_PX)),
        aspect_bucket_rounding=draw(st.integers(1, 5)),
        crop=draw(st.booleans()),
        crop_aspect=draw(st.sampled_from(CROP_ASPECTS)),
        crop_style=draw(st.sampled_from(CROP_STYLES)),
        crop_aspect_buckets=draw(
            st.lists(st.tuples(st.floats(0.1, 10), st.just(1.0) | shares), min_size=1, max_size=3)
            .filter(lambda aspects: any(weight for _, weight in aspects))
            .map(tuple)
        ),
        minimum_image_size=draw(sizes | st.just(0)),
        maximum_image_size=largest,
        target_downsample_size=largest,
        minimum_aspect_ratio=draw(st.floats(0, 1)),
        maximum_aspect_ratio=draw(st.floats(1, 5) | st.just(0)),
        max_upscale_threshold=draw(st.none() | shares),
        horizontal_flip=draw(st.booleans()),
        alpha_background=draw(st.sampled_from(BACKGROUNDS)),
    )


tables = st.builds(TableSettings, maybe, names, several.filter(bool), maybe, maybe, maybe, st.booleans())
sources = st.one_of(
    st.builds(SourceSettings, st.just("local"), maybe, tables),
    st.builds(SourceSettings, st.just("csv"), maybe, tables),
    st.builds(
        SourceSettings,
        type=st.just("huggingface"),
        table=tables,
        dataset_name=maybe,
        dataset_config=maybe,
        split=names,
        revision=maybe,
        image_column=names,
        streaming=st.booleans(),
        filter_func=st.dictionaries(names, st.integers() | names | st.lists(names), max_size=2),
    ),
    st.builds(
        SourceSettings, st.just("aws"), aws_bucket_name=maybe, aws_data_prefix=maybe, aws_max_pool_connections=counts
    ),
)
shuffles = st.builds(
    CaptionShuffle,
    st.booleans(),
    counts,
    st.integers(0, 2**64),
    st.sampled_from(SPLITS),
    st.integers(0, 9),
    st.booleans(),
    st.floats(0, 0.9),
)
captions = st.builds(
    CaptionSettings,
    st.sampled_from(["textfile", "filename", "instanceprompt", "csv", "parquet", "huggingface"]),
    several.filter(bool),
    st.booleans(),
    st.booleans(),
    maybe,
    st.booleans(),
    shuffles | st.just(CaptionShuffle()),
    several,
    st.none() | shares,
)
mixes = st.builds(
    MixSettings,
    dataset_type=st.sampled_from(["image", "eval"]),
    repeats=st.integers(0, 99),
    probability=st.floats(0, 9),
    start_epoch=st.integers(1, 5),
    end_epoch=st.just(0) | st.integers(5, 9),
    start_step=st.integers(0, 5),
    end_step=st.just(0) | st.integers(6, 9),
    is_regularisation_data=st.booleans(),
    max_num_samples=st.integers(0, 9),
)
caches = st.builds(CacheSettings, counts, counts, st.booleans(), st.booleans(), maybe, st.sampled_from(ON_BAD_IMAGE))
datasets = st.builds(DatasetSettings, names, sources, geometries(), captions, mixes, caches)
text_caches = st.builds(TextCacheSettings, maybe, counts, several)


@settings(deadline=None, max_examples=150)
@given(st.lists(datasets, min_size=1, max_size=3, unique_by=lambda dataset: dataset.id), text_caches)
def test_what_is_written_is_read_as_the_same(several, text_cache):
    several[0] = replace(several[0], mix=replace(several[0].mix, dataset_type="image"))
    if len(several) > 1:
        masks = MixSettings(dataset_type="conditioning", conditioning_type="mask")
        several[1] = replace(several[1], mix=masks)
        several[0] = replace(several[0], mix=replace(several[0].mix, conditioning_data=several[1].id))
    backends = Backends(tuple(several), text_cache)
    written = json.loads(json.dumps(write_databackend(backends)))
    assert parse(*written) == backends
    contrary = {"vae_cache_disable": True, "minimum_image_size": 1, "only_instance_prompt": True, "write_batch_size": 5}
    assert parse(*written, defaults=contrary) == backends


def test_the_sample_is_written_as_it_was():
    written = write_databackend(parse(*json.loads(SAMPLE)))
    for before, after in zip(json.loads(SAMPLE), written, strict=True):
        assert {key: after[key] for key in before if key in after} == {
            key: value for key, value in before.items() if key not in ("metadata_backend", "disabled")
        }
    assert [entry["id"] for entry in write_databackend(Backends((DatasetSettings("text-embeds"),)))] == [
        "text-embeds",
        "text-embeds-cache",
    ]
