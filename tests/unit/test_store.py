"""The store: whole files only, nothing wrong is ever handed out."""

import os
import time

import pytest
import torch
from safetensors.torch import load_file

from training.cache.store import Store, Writer, key_of
from training.errors import CacheError


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "latents"))


def filled(store, count=10, batch=4):
    catalog = store.open()
    with Writer(catalog, batch) as writer:
        for number in range(count):
            writer.add(key_of(n=number), torch.full((2, 3), float(number)), **({"cut": "true"} if number == 7 else {}))
    return catalog


def files(store):
    return sorted(path for path in os.scandir(store.folder) if path.name.endswith(".safetensors"))


def test_what_was_written_is_read_back_by_anybody(store, tmp_path):
    filled(store)
    catalog = store.open()
    assert len(catalog) == 10
    for number in range(10):
        assert torch.equal(catalog.read(key_of(n=number)), torch.full((2, 3), float(number)))
    assert catalog.find([key_of(n=3), key_of(n=99)]).tolist()[1] == -1
    assert catalog.shapes(catalog.find([key_of(n=3)])).tolist() == [[2, 3, 0, 0]]
    assert catalog.notes(key_of(n=7)) == {"cut": "true"}
    assert catalog.notes(key_of(n=6)) == {}
    shards = list((tmp_path / "latents").glob("*.safetensors"))
    assert len(shards) == 3
    assert sum(len(load_file(shard)) for shard in shards) == 10  # plain safetensors for everybody else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_every_dtype_comes_back_as_it_was(store, dtype):
    tensor = (torch.rand(3, 5, 7) * 200).to(dtype)
    store.open().write({key_of(a=1): tensor})
    assert torch.equal(store.open().read(key_of(a=1)), tensor)


def test_a_bit_that_flipped_is_noticed_and_only_that_entry_is_lost(store, tmp_path):
    filled(store, count=4, batch=4)
    (shard,) = (tmp_path / "latents").glob("*.safetensors")
    before = store.state()
    data = bytearray(shard.read_bytes())
    catalog = store.open()
    place = catalog.find([key_of(n=2)])[0]
    data[int(catalog._entries["begin"][place]) + 1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match=r"is damaged and was taken out\. Run the cache node again"):
        catalog.read(key_of(n=2))
    assert store.state() != before  # so that the cache node runs again
    again = store.open()
    assert key_of(n=2) not in again
    for number in (0, 1, 3):
        assert again.read(key_of(n=number))[0, 0] == number
    with pytest.raises(CacheError, match="is missing"):
        again.read(key_of(n=2))


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_file_that_was_cut_is_taken_out_and_named(store, tmp_path, length):
    filled(store, count=4, batch=4)
    (shard,) = (tmp_path / "latents").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:length])
    catalog = store.open()
    assert len(catalog) == 0
    assert shard.name in catalog.damaged[0]
    assert not shard.exists()
    filled(store, count=4, batch=4)
    assert len(store.open()) == 4


def test_two_catalogs_of_one_folder_see_each_other(store):
    one, two = store.open(), store.open()
    one.write({key_of(n=1): torch.ones(2)})
    assert key_of(n=1) not in two
    assert key_of(n=1) in two.refresh()
    two.write({key_of(n=1): torch.ones(2)})  # the same again does no harm
    two.write({key_of(n=1): torch.ones(2) * 2, key_of(n=2): torch.ones(2)})  # nor does another file with the same key
    assert one.refresh().read(key_of(n=2))[0] == 1
    assert one.read(key_of(n=1))[0] in (1, 2)
    one.remove({key_of(n=1)})
    assert key_of(n=1) not in store.open()
    assert two.read(key_of(n=2))[0] == 1  # in another file now


def test_removing_takes_out_what_was_named_and_leaves_what_is_new(store):
    catalog = filled(store)
    assert catalog.remove({key_of(n=1), key_of(n=9), key_of(n=50)}, written_before=0) == 0
    assert catalog.remove({key_of(n=1), key_of(n=9), key_of(n=50)}, written_before=time.time() + 10) == 2
    assert len(catalog) == len(store.open()) == 8
    assert store.open().notes(key_of(n=7)) == {"cut": "true"}
    assert catalog.remove({key_of(n=n) for n in range(10)}) == 8
    assert not files(store)
