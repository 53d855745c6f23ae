"""Tries the faults of rows on a disk, with few kills, and shows that one that is not survived is counted."""

import pytest

from experiments import leoam, leoam_fault_disk, leoam_fault_kills, leoam_faults, results
from kvjax import blocks

SIZES = ["--prompt", "128", "--steps", "48"]
KINDS = {
    "killed": 3, "flipped": 24, "disk full": 12, "short read": 4, "read error": 1, "slow disk": 1,
    "two processes": 1, "refused folder": 3,
}  # fmt: skip


def test_every_fault_is_survived_and_tried_once(tmp_path, monkeypatch):
    arguments = ["faults", *SIZES, "--kills", "3", "--out", str(tmp_path)]
    assert leoam.main(arguments) == 0
    (path,) = (tmp_path / "leoam_faults").glob("*.json")
    data = results.load(path)
    for row in data["rows"]:
        assert row["survived"] is True, row
        assert row["outcome"], row
        assert "/tmp" not in row["outcome"], row
    rows = [row["fault"] for row in data["rows"]]
    assert {kind: rows.count(kind) for kind in KINDS} == KINDS
    n = len(rows)
    assert data["claims"] == {"leoam.faults_tried": n, "leoam.faults_survived": n}
    kills = [row for row in data["rows"] if row["fault"] == "killed"]
    assert any(row["recovered"] and min(row["recovered"]) > 0 for row in kills)
    assert all(row["place"] in ("start", "prompt", "save", "decoding", "end") for row in kills)
    mended = [row for row in data["rows"] if row["outcome"].endswith("the tokens are read anew")]
    assert len(mended) == 16  # all flips but those in manifests

    def tries(*args):
        raise AssertionError("a stored fault is tried again")

    monkeypatch.setattr(leoam_faults, "outcome", tries)
    assert leoam.main(arguments) == 0
    assert results.load(path) == data


def test_damage_that_nobody_notices_is_not_survived(tmp_path, monkeypatch):
    def unchecked(raw, number, generation, stride, path):
        return memoryview(raw)[: blocks._SEAL.unpack_from(raw, stride - blocks._SEAL.size)[3]]

    tried = leoam_fault_disk.DiskFaults(leoam_faults.Faults(), tmp_path.resolve())
    run = {(fault, case): run for fault, case, run in tried.each()}["flipped", "chunk 0"]
    assert leoam_faults.outcome(run, tried.folder)["survived"] is True
    monkeypatch.setattr(blocks, "_opened", unchecked)
    found = leoam_faults.outcome(run, tried.folder)
    assert found["survived"] is False
    assert found["outcome"] == "nothing was said; not mended"


def test_what_a_kill_loses_or_changes_is_not_survived(tmp_path, monkeypatch):
    tried = leoam_fault_kills.Kills(leoam_faults.Faults(prompt=128, steps=48), tmp_path.resolve())
    tried.reference.rows[0][1, 0, 0, 0, 0] ^= 1
    tried.reference.digests.clear()
    whole = leoam_fault_kills.run

    def promises(*args):
        """Kills it at the end, when it has said that more lies on the disk than does."""
        lines, seconds = whole(*args[:2], 10 + tried.reference.seconds)
        return [*lines[:-1], lines[-1] | {"sealed": [1000, 0]}], seconds

    monkeypatch.setattr(leoam_fault_kills, "run", promises)
    found = leoam_faults.outcome(lambda: tried.killed(0), tried.folder)
    assert found["survived"] is False
    for lost in (
        "sealed tokens are lost",
        "; rows are changed",
        "got None after 4",
        "rows of the save are changed",
    ):
        assert lost in found["outcome"]


def test_a_fault_that_is_not_survived_fails_the_command(tmp_path, monkeypatch, capsys):
    lost = [("killed", "moment 0", lambda: {"place": "save", "outcome": "lost", "survived": False})]
    monkeypatch.setattr(leoam_faults.Kills, "each", lambda _: lost)
    monkeypatch.setattr(leoam_faults.Kills, "reference", None)
    monkeypatch.setattr(leoam_faults.DiskFaults, "each", lambda _: [("slow disk", "all", lambda: 1 / 0)])
    monkeypatch.setattr(leoam_faults.DiskFaults, "reference", None)
    assert leoam.main(["faults", "--out", str(tmp_path)]) == 1
    (path,) = (tmp_path / "leoam_faults").glob("*.json")
    assert results.load(path)["claims"] == {"leoam.faults_tried": 2, "leoam.faults_survived": 0}
    printed = capsys.readouterr().out
    assert "NOT SURVIVED | killed | moment 0 | save | lost" in printed
    assert "NOT SURVIVED | slow disk | all |  | ZeroDivisionError: division by zero" in printed


@pytest.mark.parametrize("wrong", [["--prompt", "100"], ["--steps", "16"]])
def test_lengths_that_calls_do_not_divide_are_refused(tmp_path, wrong, capsys):
    assert leoam.main(["faults", *wrong, "--out", str(tmp_path)]) == 2
    assert "take a multiple of" in capsys.readouterr().err.replace("\n", " ")
