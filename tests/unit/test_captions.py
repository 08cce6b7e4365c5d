"""Captions: read by strategy, edited, measured in tokens, written beside the pictures."""

import pytest

from training.config.dataset import CaptionSettings, CaptionShuffle, DatasetSettings
from training.data.captions import (
    CaptionEditor,
    LengthReport,
    Written,
    edit_captions,
    length_report,
    read_caption,
    write_captions,
)
from training.data.sources import Found
from training.errors import DataError, SettingError


class Texts:
    """A source of caption files alone."""

    name = "cats folder"
    identity = ("cats folder",)

    def __init__(self, **texts):
        self.texts = {f"cats/{name}.png": text for name, text in texts.items()}

    def text(self, name):
        return self.texts.get(name)


def read(text=None, name="cats/a.png", captions=None, **settings):
    return read_caption(Texts(a=text), Found(name, 1, captions=captions), CaptionSettings(**settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a cat", ("a cat",)),
        (b"\xef\xbb\xbfa cat\r\n\r\n  two cats \n", ("a cat", "two cats")),
        ("猫\u3000\n🐈".encode(), ("猫", "🐈")),
        (b"\x00\x00\na cat", None),  # half of it is damaged
        (b"a cat\n\x07 \x1b\n", ("a cat",)),
    ],
)
def test_each_line_of_a_text_file_is_a_variant(text, expected):
    if expected is None:
        with pytest.raises(DataError, match=r"The caption cats/a\.txt in cats folder is not UTF-8 text\. Save"):
            read(text)
    else:
        assert read(text) == expected


def test_a_text_file_may_be_one_caption():
    assert read(b"a cat\n\n on a mat ", disable_multiline_split=True) == ("a cat on a mat",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cats/a_black_cat.png", "a black cat"),
        ("a.b_c.tar.webp", "a.b c.tar"),
        ("__x__.png", "x"),
        ("no_folder", "no folder"),
    ],
)
def test_a_file_name_says_what_it_shows(name, expected):
    assert read(name=name, caption_strategy="filename") == (expected,)


@pytest.mark.parametrize("strategy", ["csv", "parquet", "huggingface"])
def test_a_source_may_tell_captions(strategy):
    assert read(captions=(" a ", "", "\0", "b"), caption_strategy=strategy) == ("a", "b")


def test_the_instance_prompts_are_variants():
    settings = {"caption_strategy": "instanceprompt", "instance_prompt": (" a cat ", " ", "the cat")}
    assert read(**settings) == ("a cat", "the cat")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, r"cats/a\.png in cats folder has no caption: add cats/a\.txt, or choose caption_strategy"),
        ({"text": b""}, r"cats/a\.png in cats folder has an empty caption: write it in cats/a\.txt"),
        ({"text": b"\0\0\0\0"}, "has an empty caption"),
        ({"text": "\u200b \ufeff\n".encode()}, "has an empty caption"),
        ({"text": b"caf\xe9"}, r"cats/a\.txt in cats folder is not UTF-8 text\. Save it again as UTF-8\."),
        ({"text": "a cat".encode("utf-16")}, "is not UTF-8 text"),
        ({"text": "a cat".encode("utf-16-le")}, "is not UTF-8 text"),
        ({"name": "cats/___.png", "caption_strategy": "filename"}, "Rename it"),
        ({"caption_strategy": "csv"}, "csv_caption_column"),
        ({"caption_strategy": "parquet", "captions": ()}, "fallback_caption_column"),
        ({"caption_strategy": "huggingface", "captions": (" ", "\0")}, "fallback_caption_column"),
    ],
)
def test_a_caption_that_cannot_be_used_is_named_with_the_remedy(settings, sentence):
    with pytest.raises(DataError, match=sentence):
        read(**settings)


def shuffle(**values):
    return {"caption_shuffle": CaptionShuffle(**({"enable": True} | values))}


PREPEND = {"prepend_instance_prompt": True}
ONLY = {"only_instance_prompt": True}


@pytest.mark.parametrize(
    ("raw", "settings", "expected"),
    [
        # Nothing to edit
        (["a , , b"], {}, ["a , , b"]),
        (["a", "b", "a"], {}, ["a", "b"]),
        ([], {}, []),
        # The instance prompt
        (["a", "b"], {"instance_prompt": ("p",)}, ["a", "b"]),
        (["a", "b"], {"instance_prompt": ("p",), **ONLY}, ["p"]),
        (["a"], {"instance_prompt": ("p", "q"), **ONLY, **PREPEND}, ["p", "q"]),
        (["a", "b"], {"instance_prompt": ("p", " ", "q"), **PREPEND}, ["p a", "q a", "p b", "q b"]),
        (["p"], {"instance_prompt": ("p",), "caption_strategy": "instanceprompt", **PREPEND}, ["p"]),
        # The trigger word
        (["a cat"], {"trigger_word": " sks "}, ["sks, a cat"]),
        (["a SKS cat"], {"trigger_word": "sks"}, ["a SKS cat"]),
        (["asks a cat", "sks_cat"], {"trigger_word": "sks"}, ["sks, asks a cat", "sks, sks_cat"]),
        (["a c++ cat", "a c+ cat"], {"trigger_word": "c++"}, ["a c++ cat", "c++, a c+ cat"]),
        (["a"], {"trigger_word": "sks", "instance_prompt": ("by sks",), **PREPEND}, ["by sks a"]),
        (["a"], {"trigger_word": "sks", "instance_prompt": ("p",), **PREPEND}, ["sks, p a"]),
        (["a"], {"trigger_word": "sks", "instance_prompt": ("p",), **ONLY}, ["sks, p"]),
        # Plain text to take out
        (["a bad cat"], {"caption_filter_list": ("bad",)}, ["a cat"]),
        (["a, bad, b"], {"caption_filter_list": ("bad",)}, ["a, b"]),
        (["bad, a"], {"caption_filter_list": ("bad",)}, ["a"]),
        (["a, bad"], {"caption_filter_list": ("bad",)}, ["a"]),
        (["a,bad,b"], {"caption_filter_list": ("bad",)}, ["a,b"]),
        (["a, , b, bad, c"], {"caption_filter_list": ("bad",)}, ["a, , b, c"]),
        (["a, bad, bad, b"], {"caption_filter_list": ("bad",)}, ["a, b"]),
        (["A cat. bad. A dog."], {"caption_filter_list": ("bad",)}, ["A cat. A dog."]),
        (["a cat, bad."], {"caption_filter_list": ("bad",)}, ["a cat."]),
        (["a  cat"], {"caption_filter_list": ("bad",)}, ["a  cat"]),
        (["a  bad  cat"], {"caption_filter_list": ("bad",)}, ["a cat"]),
        (["an arafed cat, arafed mat"], {"caption_filter_list": ("arafed ",)}, ["an cat, mat"]),
        (["a, bad b"], {"caption_filter_list": (" bad ",)}, ["a, b"]),
        (["Bad cat"], {"caption_filter_list": ("bad",)}, ["Bad cat"]),
        (["bad", "a"], {"caption_filter_list": ("bad",)}, ["a"]),
        (["bad, worse"], {"caption_filter_list": ("bad", "worse")}, []),
        (["bad"], {"caption_filter_list": ("bad",), "instance_prompt": ("p",), **PREPEND}, []),
        (["a ,b"], {"caption_filter_list": (" ", "")}, ["a ,b"]),
        (["bad a", "a"], {"caption_filter_list": ("bad",)}, ["a"]),
        # Regular expressions
        (["this big cat has a hat"], {"caption_filter_list": ("this .* has a ",)}, ["hat"]),
        (["this is it, this is"], {"caption_filter_list": ("^this is",)}, ["it, this is"]),
        (["a (1girl), b"], {"caption_filter_list": (r"\(1girl\)",)}, ["a, b"]),
        (["a cat"], {"caption_filter_list": ("x*",)}, ["a cat"]),
        # Replacements
        (["a cat and a cat"], {"caption_filter_list": ("s/cat/dog/",)}, ["a dog and a cat"]),
        (["a cat and a cat"], {"caption_filter_list": ("s/cat/dog/g",)}, ["a dog and a dog"]),
        (["a CAT"], {"caption_filter_list": ("s/cat/dog/i",)}, ["a dog"]),
        (["a, cat, b"], {"caption_filter_list": ("s/cat//",)}, ["a, b"]),
        (["1 or 2"], {"caption_filter_list": (r"s/(\d) or (\d)/\2 or \1/",)}, ["2 or 1"]),
        (["and/or"], {"caption_filter_list": (r"s/and\/or/or/",)}, ["or"]),
        (["he is s/he"], {"caption_filter_list": ("s/he",)}, ["he is"]),
        (["a"], {"caption_filter_list": ("s/a/b/", "s/b/c/")}, ["c"]),
        # Tags in another order, where it can be foretold
        (["a"], shuffle(count=5), ["a"]),
        (["a, b"], shuffle(position_start=1), ["a, b"]),
        (["a,b"], shuffle(position_start=2, count=3), ["a,b"]),
        (["a, b"], shuffle(count=20), ["a, b", "b, a"]),
        (["a b", ", ,"], shuffle(split_on="space", position_start=9), ["a b", ", ,"]),
        (["a, b"], {"instance_prompt": ("p, q",), **ONLY, **shuffle(count=20)}, ["p, q"]),
        (["a, b"], {"caption_strategy": "instanceprompt", "instance_prompt": ("a, b",), **shuffle()}, ["a, b"]),
        (["a, b"], {"trigger_word": "t", **shuffle(count=20)}, ["t, a, b", "t, b, a"]),
        (["a, b"], {"instance_prompt": ("p, q",), **PREPEND, **shuffle(count=20)}, ["p, q a, b", "p, q b, a"]),
        (["a, a t, b"], {"trigger_word": "t", **shuffle(count=20)}, ["a, a t, b", "b, a t, a"]),
        (["One. 2.5 m."], shuffle(split_on="period", count=20), ["One. 2.5 m.", "2.5 m. One."]),
        (["a b"], shuffle(split_on="space", count=20), ["a b", "b a"]),
        (["a, b"], shuffle(enable=False, count=9), ["a, b"]),
    ],
)
def test_captions_are_edited(raw, settings, expected):
    settings = CaptionSettings(**settings)
    assert edit_captions(tuple(raw), settings, "cats/a.png") == tuple(expected)
    assert CaptionEditor(settings)(tuple(raw), "cats/a.png") == tuple(expected)


def test_nothing_is_copied_where_there_is_nothing_to_edit():
    raw = ("a",)
    assert edit_captions(raw, CaptionSettings(instance_prompt=("p",)), "a.png") is raw


TAGS = tuple("abcdefghij")
GOLDEN = list("dhfagciejb")


def variants(name="cats/a.png", **values):
    settings = CaptionSettings(**shuffle(**values))
    return [text.split(", ") for text in edit_captions((", ".join(TAGS),), settings, name)]


def test_shuffled_variants_hold_the_same_tags_and_keep_the_first_ones():
    original, *others = variants(count=6, position_start=2)
    assert original == list(TAGS)
    assert len(others) == 6  # 8! orders: all differ
    for tags in others:
        assert tags[:2] == ["a", "b"]
        assert tags != original
        assert sorted(tags) == original
    assert variants(count=6, position_start=2, include_original=False) == others


def test_variants_are_a_function_of_seed_picture_and_caption():
    assert variants(count=3) == variants(count=3)
    assert variants(count=4)[:4] == variants(count=3)  # another one leaves the others as they were
    assert variants(count=3)[1:] != variants(count=3, seed=1)[1:]
    assert variants(count=3)[1:] != variants("cats/b.png", count=3)[1:]
    # What other machines and versions of Python made
    assert variants()[1] == GOLDEN


def test_every_place_is_reached():
    firsts = [variants(name=str(number), include_original=False)[0][0] for number in range(1000)]
    assert all(60 <= firsts.count(tag) <= 140 for tag in TAGS)  # 100 ± 4 standard deviations


def test_tags_are_left_out_and_the_others_keep_their_order():
    number = kept = 0
    for seed in range(200):
        for tags in variants(enable=False, tag_dropout=0.3, position_start=2, seed=seed, include_original=False):
            assert tags[:2] == ["a", "b"]
            assert tags == sorted(tags)
            number, kept = number + 1, kept + len(tags) - 2
    assert 0.64 < kept / number / 8 < 0.76  # 0.7 ± 5 standard deviations


def test_something_is_always_said():
    settings = CaptionSettings(**shuffle(enable=False, count=50, tag_dropout=0.99, include_original=False))
    assert set(edit_captions(("a, b",), settings, "a.png")) == {"a", "b"}


def test_a_teacher_reads_the_class_in_place_of_the_trigger():
    edit = CaptionEditor(CaptionSettings(trigger_word="sks", trigger_class="a dog"))
    assert edit.for_teacher("SKS, sks asks") == "a dog, a dog asks"
    assert CaptionEditor(CaptionSettings(trigger_word="sks")).for_teacher("sks runs") == "sks runs"
    with pytest.raises(SettingError, match=r"trigger_class is 'dog'.*trigger_word"):
        CaptionSettings(trigger_class="dog")
    with pytest.raises(SettingError, match=r"trigger_class is 'dog'.*is_regularisation_data"):
        DatasetSettings("a", captions=CaptionSettings(trigger_word="sks", trigger_class="dog"))


def test_the_trigger_word_is_never_left_out():
    settings = CaptionSettings(trigger_word="t", **shuffle(count=50, tag_dropout=0.9, include_original=False))
    texts = edit_captions(("a, a t, b",), settings, "a.png")
    assert "a t" in texts
    assert all("a t" in text.split(", ") for text in texts)


@pytest.mark.parametrize("entry", ["(", "a[", "*a", "s/(/b/", r"s/a/\1/", r"s/a/\g<name>/", "a\\"])
def test_a_filter_that_is_no_regular_expression_is_named(entry):
    with pytest.raises(SettingError, match="caption_filter_list holds") as error:
        CaptionEditor(CaptionSettings(caption_filter_list=("fine", entry)))
    assert repr(entry) in str(error.value)


def test_lengths_are_reported():
    texts = [" ".join(["word"] * length) for length in [1, 31, 32, 100, 101, 200]]
    report = length_report(texts, lambda text: len(text.split()), 100)
    assert report == LengthReport(
        texts=6,
        mean=77.5,
        longest=200,
        over=2,
        cut=((texts[4], 101), (texts[5], 200)),
        histogram=(2, 1, 0, 2, 0, 0, 1),
    )
    many = length_report(["a b"] * 30, len, 2)
    assert (many.over, len(many.cut)) == (30, 20)
    assert length_report([], len, 2) == LengthReport(0, 0.0, 0, 0, (), ())


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "b.txt").write_text("a dog", encoding="utf-8")
    (tmp_path / "c.txt").write_text(" \n", encoding="utf-8")
    return [tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "c.webp", tmp_path / "d.e.png"]


@pytest.mark.parametrize(
    ("policy", "counts", "second"),
    [
        ("keep existing", (2, 0, 1), "a dog"),
        ("replace", (3, 0, 0), "eine Häsin\n"),
        ("add a line", (2, 1, 0), "a dog\neine Häsin\n"),
    ],
)
def test_captions_are_written_beside_their_pictures(pictures, tmp_path, policy, counts, second):
    captions = [" a cat\n\non a  mat ", "eine Häsin", "a fox", " \0"]
    written = write_captions(pictures, captions, policy)
    assert written == Written(*counts, empty=(str(pictures[3]),))
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert texts == {"a.txt": "a cat on a mat\n", "b.txt": second, "c.txt": "a fox\n"}


def test_a_line_is_added_once(pictures):
    for kept in (0, 1):
        assert write_captions(pictures[1:2], ["a wolf"], "add a line") == Written(0, 1 - kept, kept, ())
    assert pictures[1].with_suffix(".txt").read_text(encoding="utf-8") == "a dog\na wolf\n"


def test_captions_that_cannot_be_written_are_refused_before_anything_is(pictures, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="12 captions for 4 pictures"):
        write_captions(pictures, ["a"] * 12, "replace")
    with pytest.raises(SettingError, match="choose one of keep existing, replace, add a line"):
        write_captions(pictures, ["a"] * 4, "overwrite")
    with pytest.raises(DataError, match=r"a\.png and a\.jpg share one caption file"):
        write_captions([tmp_path / "a.png", tmp_path / "a.jpg"], ["a", "b"], "replace")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        write_captions(pictures[1:2], ["a"], "add a line")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_captions([tmp_path / "file" / "a.png"], ["a"], "replace")
