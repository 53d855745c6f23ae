import re

import pytest

import kvjax
from kvjax import spec
from kvjax.methods import METHODS, make
from kvjax.methods.leoam import LeoAM


def test_a_line_gives_the_method_that_code_gives():
    assert spec.parse("full") == make("full")
    assert spec.parse("snapkv:budget=512,window=16") == make("snapkv", budget=512, window=16)
    assert spec.parse(" h2o : budget = 64 , recent = 0.25 ") == make("h2o", budget=64, recent=0.25)
    assert spec.parse("quest:budget=None") == make("quest", budget=None)
    assert spec.parse("kivi4") == make("kivi", bits=4)
    chained = kvjax.chain(make("snapkv", budget=64), make("kivi", bits=4))
    assert spec.parse("snapkv:budget=64+kivi:bits=4") == chained == spec.parse("snapkv+kivi4", budget=64)


def test_a_setting_that_is_a_word_is_read_as_one():
    assert spec.parse("chelsea:similarity=l2", budget=512) == make("chelsea", budget=512, similarity="l2")
    assert spec.parse("leoam:known_by=mean") == LeoAM(known_by="mean")  # a word, or one for each layer
    with pytest.raises(ValueError, match="similarity is cosine, dot or l2"):
        spec.parse("chelsea:similarity=manhattan", budget=512)


def test_defaults_fill_only_what_is_not_given():
    assert spec.parse("snapkv:budget=8,window=4", budget=512) == make("snapkv", budget=8, window=4)
    assert spec.parse("kivi", budget=512) == make("kivi")
    assert "budget" in spec.settings_of("snapkv+kivi4")
    assert "budget" not in spec.settings_of("snapkv:budget=8+kivi4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("snapvk", "got 'snapvk': did you mean 'snapkv'"),
        ("", "a method is one of"),
        ("kivi4+", "a method is one of"),
        ("kvii4", "got 'kvii4': did you mean 'kivi'"),
        ("snapkv:buget=4", "got 'buget': did you mean 'budget'"),
        ("snapkv:evicts=False", "snapkv takes budget, window, kernel, got 'evicts'"),
        ("snapkv", "snapkv needs budget, got {}: give budget=..."),
        ("snapkv:budget", "a setting is written key=value, got 'budget'"),
        ("snapkv:budget=4,budget=5", "a setting is given once, got 'budget' twice"),
        ("snapkv:budget=many", "a setting is a number, True, False or None, got budget='many'"),
        ("snapkv:budget=64,window=2.5", "snapkv takes a whole number as window, got 2.5"),
        ("h2o:budget=64,recent=None", "h2o takes a number as recent, got None"),
        ("chelsea:budget=512,slack=2.5", "chelsea takes a whole number or None as slack, got 2.5"),
        ("chelsea:budget=512,log_n=3", "chelsea takes True or False as log_n, got 3"),
        ("leoam:leaf=None", "leaf is a whole number, or one for each layer, got None"),
        ("leoam:root=64.0", "root is a whole number, or one for each layer, got 64.0"),
        ("leoam:disk=", "a disk is a folder"),
        ("leoam:disk=d,chunk=0", "in chunks of 1 token or more"),
        ("kivi4:bits=3", "codes have 4 or 8 bits"),
        ("kivi4+snapkv:budget=64", "only the first method of a chain may evict"),
    ],
)
def test_a_wrong_line_is_explained(line, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        spec.parse(line)


def test_other_registries_can_be_read():
    assert spec.parse("mine", {"mine": METHODS["knorm"]}, budget=9) == make("knorm", budget=9)
    with pytest.raises(ValueError, match="a method is one of mine, got 'knorm'"):
        spec.parse("knorm", {"mine": METHODS["knorm"]})


@pytest.mark.parametrize("dtype", ["float31", "float16", "int8"])
def test_a_wrong_dtype_is_told_before_anything_is_loaded(dtype):
    with pytest.raises(ValueError, match="a model is loaded in float32 or bfloat16"):
        kvjax.load("no-such-model", dtype)


def test_a_folder_is_a_word(tmp_path):
    method = spec.parse(f"leoam:topk=0.2,disk={tmp_path}/a folder,host_budget=1000000000")
    assert method == LeoAM(topk=0.2, disk=f"{tmp_path}/a folder", host_budget=10**9)
    assert method.folder == f"{tmp_path}/a folder"
