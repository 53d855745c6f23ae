"""Reads places of host memory at toy size: each row is there once, and its figures are one time's."""

import dataclasses

import pytest

from experiments import results
from experiments.host_reads import Reads, reads

TOY = Reads(gib=(2**-12, 2**-10), place_bytes=(256, 1024), mib=2**-4, samples=3)


def test_rows_say_what_a_place_takes(tmp_path, capsys):
    settings = dataclasses.replace(TOY, out=tmp_path)
    assert [reads(settings), reads(settings)] == [0, 0]  # the second time nothing is measured
    (path,) = (tmp_path / "a2ats_reads").glob("*.json")
    data = results.load(path)
    assert len(data["rows"]) == 2 * 2 * 2
    for row in data["rows"]:
        assert row["places"] == 2**16 // row["place_bytes"]
        assert row["time_us"] * 1e3 == pytest.approx(row["places"] * row["place_ns"])
        assert row["gb_per_s"] * row["place_ns"] == pytest.approx(row["place_bytes"])
    assert data["claims"]["reads.slowest_place_ns"] == max(row["place_ns"] for row in data["rows"])
    assert capsys.readouterr().out.count("gb_per_s") == 2 * len(data["rows"])


@pytest.mark.parametrize("size", [128, 300])
def test_places_of_parts_of_slots_are_refused(size, tmp_path):
    with pytest.raises(ValueError, match=rf"a multiple of 256 bytes, got \[{size}\]"):
        reads(dataclasses.replace(TOY, place_bytes=(256, size), out=tmp_path))
