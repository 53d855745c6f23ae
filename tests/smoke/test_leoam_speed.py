"""Times LeoAM on a tiny random model whose rows lie on a disk: each name has its row and bytes."""

import dataclasses
import math

import numpy as np
import pytest

from experiments import leoam_speed, results
from experiments.leoam_speed import Speed, speed
from kvjax.chunk_files import Layout

CASE = "tiny/2:2x2048"
LAYER = 4 * 2 * 8 * 128 * 2048  # bytes of K and V of two rows
TINY = Speed(cases=(CASE,), topk=0.1, device_gb=0.02, host_gb=1.2 * LAYER / 1e9, steps=4, samples=1, warm=2)
CHUNKS = 2048 // TINY.chunk - 1  # the last is what steps write to


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    settings = dataclasses.replace(TINY, out=folder / "out", disk=folder / "disk")
    assert speed(settings) == 0
    (path,) = (settings.out / "leoam_speed").glob("*.json")
    return settings, results.load(path)


def test_every_name_has_its_row_and_what_it_is_compared_with(measured):
    settings, data = measured
    assert tuple(row["name"] for row in data["rows"] if row["part"] == "decode") == settings.names
    compared = {key.removeprefix("leoam.speedup_over_").split("_")[0] for key in data["claims"]}
    assert compared == {"full", "prefetch", "fixed", "leoam4", "leoam-host", "leoam.latency"}
    assert all(math.isfinite(value) and value > 0 for value in data["claims"].values())
    assert not settings.disk.exists()


def test_what_reads_everything_reads_the_layer_that_is_not_on_the_host(measured):
    rows = {row["name"]: row for row in measured[1]["rows"] if row["part"] == "decode"}
    for name in ("full", "prefetch"):
        assert (
            rows[name]["disk_bytes"]
            == 2 * 8 * CHUNKS * Layout(2, 8, 2048, 128, np.float16, TINY.chunk).stride
        )
    assert all(rows[name]["disk_bytes"] < LAYER / 2 for name in ("fixed", "leoam", "leoam-host"))
    assert all(0 < rows[name]["hit_rate"] < 1 for name in ("fixed", "leoam", "leoam4", "leoam-host"))


def test_the_same_command_goes_on_from_its_rows(measured, monkeypatch, capsys):
    monkeypatch.setattr(leoam_speed, "_timed", pytest.fail)
    assert speed(measured[0]) == 0
    assert "found on the device" in capsys.readouterr().out


def test_a_run_that_is_cut_off_has_claimed_what_it_timed(measured, tmp_path, monkeypatch):
    rows = {row["name"]: row for row in measured[1]["rows"] if row["part"] == "decode"}

    def timed(settings, case, name, *more):
        if name == "fixed":
            raise KeyboardInterrupt
        return {k: v for k, v in rows[name].items() if k not in ("settings", *rows[name]["settings"])}

    monkeypatch.setattr(leoam_speed, "_timed", timed)
    names = ("leoam", "full", "fixed")
    settings = dataclasses.replace(TINY, names=names, out=tmp_path, disk=tmp_path / "disk")
    with pytest.raises(KeyboardInterrupt):
        speed(settings)
    (path,) = (tmp_path / "leoam_speed").glob("*.json")
    ratio = rows["full"]["step_us"] / rows["leoam"]["step_us"]
    assert list(results.load(path)["claims"].values()) == [ratio, ratio]


def test_chunks_of_a_fixed_size_may_be_as_many_as_catch_the_same_attention(tmp_path):
    names = ("fixed", "fixed-equal")
    settings = dataclasses.replace(TINY, names=names, out=tmp_path / "out", disk=tmp_path / "disk", equal=0.3)
    assert speed(settings) == 0
    (path,) = (settings.out / "leoam_speed").glob("*.json")
    rows = {row["name"]: row for row in results.load(path)["rows"] if row["part"] == "decode"}
    assert [rows[name]["chosen"] for name in names] == [int(0.1 * 2048), int(0.3 * 2048)]
    assert rows["fixed"]["disk_bytes"] < rows["fixed-equal"]["disk_bytes"]


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match=r"one of full, prefetch, fixed, fixed-host, fixed-equal, leoam.*got fuller"
    ):
        speed(dataclasses.replace(TINY, names=("full", "fuller")))


def test_where_abstracts_do_not_fit_the_device_they_may_lie_on_the_host(tmp_path):
    settings = dataclasses.replace(
        TINY, device_gb=0.0076, names=("leoam-host",), out=tmp_path / "out", disk=tmp_path / "disk"
    )
    assert speed(settings) == 0
    with pytest.raises(ValueError, match="raise device_budget"):
        speed(dataclasses.replace(settings, names=("leoam",)))
