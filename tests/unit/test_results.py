"""Results files outlive kills, full disks, other runs and broken files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import provenance
from experiments.results import load, start

ROOT = Path(__file__).parents[2]


def begin(folder, seed=0, device="Test Chip", command="python -m experiments.demo", **more):
    return start("demo", seed=seed, device=device, folder=folder, command=command, **more)


def test_file_holds_header_rows_and_claims(tmp_path):
    written = begin(tmp_path).add({"method": "snapkv", "budget": 512}, {"kl": np.float32(0.5)})
    written = written.claim({"snapkv.kl@0.25": 0.5})
    data = load(written.path)
    assert written.path.parent == tmp_path / "demo"
    assert written.path.name == f"test-chip-{data['date'][:10]}.json"
    assert data["rows"] == [{"method": "snapkv", "budget": 512, "kl": 0.5, "settings": ["method", "budget"]}]
    assert data["claims"] == {"snapkv.kl@0.25": 0.5}
    assert data["command"] == "python -m experiments.demo"
    assert {"python", "jax", "source"} <= data["versions"].keys()
    assert data["commit"] == "unknown" or len(data["commit"].removesuffix("-dirty")) == 40
    assert os.listdir(written.path.parent) == [written.path.name], "no temporary file is left"


def test_a_copy_without_history_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_COMMIT", "0123abc")
    assert start("tried", 0, folder=tmp_path).header["commit"] == "0123abc"


def test_device_and_command_are_found_out(tmp_path):
    script = "from experiments.results import start; print(start('demo', 0, folder='.').header)"
    run = subprocess.run(
        [sys.executable, "-c", script, "--budgets", "0.5 0.25"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'command': \"python -c --budgets '0.5 0.25'\"" in run.stdout
    assert f"'device': '{os.cpu_count()}-core CPU (" in run.stdout
    assert os.listdir(tmp_path) == [], "nothing is written before there is a figure"


def test_rerun_goes_on_where_it_stopped(tmp_path):
    first = begin(tmp_path).add({"budget": (1, 2)}, {"kl": 0.5}).claim({"kl": 0.5})
    again = begin(tmp_path)
    assert again == first
    assert again.find({"budget": (1, 2)})["kl"] == 0.5
    both = again.add({"budget": 3}, {"kl": 0.25})
    assert [row["kl"] for row in load(both.path)["rows"]] == [0.5, 0.25]


def test_row_of_other_settings_is_not_reused(tmp_path):
    written = begin(tmp_path).add({"model": "a", "text": "t", "budget": 1}, {"kl": 0.5})
    for other in (
        {"model": "b", "text": "t", "budget": 1},
        {"model": "a", "text": "t", "budget": 2},
        {"model": "a", "text": "t"},
        {"model": "a", "text": "t", "budget": 1, "seed": 0},
    ):
        assert written.find(other) is None
    assert written.find({"budget": 1, "text": "t", "model": "a"}), "the order of settings is no setting"


def test_row_measured_again_replaces_its_old_one(tmp_path):
    written = begin(tmp_path).add({"m": 1}, {"kl": 0.5}).add({"m": 2}, {"kl": 0.7}).add({"m": 1}, {"kl": 0.6})
    assert sorted((row["m"], row["kl"]) for row in load(written.path)["rows"]) == [(1, 0.6), (2, 0.7)]


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"device": "Chip 2"}, {"command": "python -m experiments.demo -x"}, {"resume": False}],
)
def test_another_run_gets_a_file_of_its_own(tmp_path, other):
    first = begin(tmp_path).add({"m": 1}, {"kl": 0.5})
    second = begin(tmp_path, **other)
    assert second.rows == ()
    second = second.add({"m": 1}, {"kl": 0.9})
    assert load(first.path)["rows"][0]["kl"] == 0.5
    assert second.path != first.path


def test_runs_that_begin_together_have_a_file_each(tmp_path):
    runs = [begin(tmp_path, command=f"python -m experiments.demo {i}") for i in range(3)]
    assert len({run.path for run in runs}) == 1, "none has written yet"
    runs = [run.add({"m": i}, {"kl": float(i)}).add({"m": 9}, {"kl": 9.0}) for i, run in enumerate(runs)]
    assert [load(run.path)["rows"][0]["kl"] for run in runs] == [0, 1, 2]
    assert [begin(tmp_path, command=run.header["command"]).path for run in runs] == [r.path for r in runs]


def test_a_full_disk_leaves_nothing_of_a_first_row(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="make room"):
        begin(tmp_path).add({"m": 1}, {"kl": 0.5})
    assert os.listdir(tmp_path / "demo") == []


def test_changed_source_measures_anew(tmp_path, monkeypatch):
    first = begin(tmp_path).add({"m": 1}, {"kl": 0.5})
    monkeypatch.setattr(provenance, "_source_digest", lambda: "of another source")
    assert begin(tmp_path).rows == ()
    assert begin(tmp_path).path == first.path.with_stem(first.path.stem + "-2")


@pytest.mark.parametrize("fault", ["truncated", "no header", "bad bytes"])
def test_corrupt_file_is_set_aside_and_said(tmp_path, fault):
    path = begin(tmp_path).add({"m": 1}, {"kl": 0.5}).path
    whole = path.read_bytes()
    broken = {
        "truncated": whole[: len(whole) // 2],
        "no header": b'{"rows": []}',
        "bad bytes": b"\xff" + whole,
    }
    path.write_bytes(broken[fault])
    with pytest.warns(UserWarning, match=r"kept as test-chip-.*\.json\.corrupt"):
        again = begin(tmp_path)
    assert again.rows == ()
    again.add({"m": 1}, {"kl": 0.75})
    assert path.with_name(path.name + ".corrupt").read_bytes() == broken[fault]
    path.write_bytes(broken[fault])
    with pytest.warns(UserWarning, match=r"-2\.json\.corrupt"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a results file is JSON, got"),
        ("[]", "holds a JSON object"),
        ("{}", "has 'experiment' of type str"),
        ({"seed": "0"}, "has 'seed' of type int"),
        ({"rows": [1]}, "rows is an object whose 'settings'"),
        ({"rows": [{"settings": ["m"]}]}, "rows is an object whose 'settings'"),
        ({"claims": {"kl": "low"}}, "claims is a number"),
        ({"claims": {"kl": True}}, "claims is a number"),
    ],
)
def test_load_refuses_what_is_no_results_file(tmp_path, text, message):
    path = begin(tmp_path).add({"m": 1}, {"kl": 0.5}).path
    path.write_text(text if isinstance(text, str) else json.dumps(load(path) | text))
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert path.name in str(error.value)
    assert "again" in str(error.value)


def test_bad_rows_are_refused_and_the_file_stays(tmp_path):
    written = begin(tmp_path).add({"m": 1}, {"kl": 0.5})
    before = written.path.read_bytes()
    with pytest.raises(ValueError, match=r"each name once.*taken=\['m'\].*rename"):
        written.add({"m": 2}, {"m": 3})
    with pytest.raises(ValueError, match=r"keeps 'settings'.*rename"):
        written.add({"m": 2}, {"settings": 3})
    with pytest.raises(ValueError, match=r"figures are finite.*use None"):
        written.add({"m": 2}, {"kl": float("nan")})
    with pytest.raises(ValueError, match=r"figures are finite.*use None"):
        written.claim({"kl": np.float32("inf")})
    with pytest.raises(TypeError, match=r"figures are JSON or 0-d arrays.*convert"):
        written.add({"m": 2}, {"kl": object()})
    assert written.path.read_bytes() == before


def test_full_disk_is_named_and_the_old_file_intact(tmp_path, monkeypatch):
    written = begin(tmp_path).add({"m": 1}, {"kl": 0.5})
    before = written.path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*intact, make room and run again") as error:
        written.add({"m": 2}, {"kl": 0.5})
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(written.path)
    assert os.listdir(written.path.parent) == [written.path.name]
    assert written.path.read_bytes() == before


WRITER = """
import os, signal, sys
from pathlib import Path
from experiments.results import start
results = start("demo", seed=0, device="Test Chip", folder=sys.argv[1], command="python -m experiments.demo")
if sys.argv[2] != "never":
    real, calls = getattr(os, sys.argv[2]), []
    def killing(*args, **more):
        calls.append(args)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    setattr(os, sys.argv[2], killing)
for i in range(100_000):
    if results.find({"i": i}) is None:
        results = results.add({"i": i}, {"text": "x" * 1000})
        print(i, flush=True)
"""


def writer(folder, killed_in):
    command = [sys.executable, "-c", WRITER, str(folder), killed_in]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("killed_in", ["fsync", "replace"])
def test_process_killed_inside_a_write_keeps_every_row_before(tmp_path, killed_in):
    child = writer(tmp_path, killed_in)
    printed = child.communicate(timeout=60)[0].split()
    assert child.returncode == -signal.SIGKILL
    again = begin(tmp_path)
    assert [row["i"] for row in again.rows] == [int(i) for i in printed] == [0, 1, 2]
    again.add({"i": 3}, {})
    assert os.listdir(again.path.parent) == [again.path.name], "what the kill left is overwritten"


def test_process_killed_at_any_time_goes_on_from_there(tmp_path):
    done = -1
    for wait in (0.0, 0.003, 0.007, 0.011):
        child = writer(tmp_path, "never")
        reported = int(child.stdout.readline())
        assert reported == done + 1, "a rerun measures nothing twice"
        time.sleep(wait)
        child.kill()
        reported = max([reported, *map(int, child.communicate(timeout=60)[0].splitlines()[:-1])])
        rows = [row["i"] for row in begin(tmp_path).rows]
        assert rows == list(range(len(rows)))
        assert len(rows) > reported
        done = rows[-1]
