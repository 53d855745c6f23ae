"""The command line `kvjax`: generate text, read it for later, calibrate, list methods, see the machine."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

import kvjax
from kvjax import context_folder
from kvjax.cli_calibrate import Calibrate
from kvjax.cli_doctor import Doctor
from kvjax.cli_served import Served
from kvjax.contexts import load_context, save_context
from kvjax.model import Model
from kvjax.models.hub import MODELS
from kvjax.sampling import Sampling
from kvjax.sparsity import SPARSITIES

__all__ = ["Generate", "Methods", "Models", "Read", "main"]


@dataclass(frozen=True)
class Generate(Served):
    """Continues a prompt and writes the text as it comes.

    Args:
        prompt: the text, or - to read it from the standard input.
        context: a folder of `kvjax read`, with its model, method and options; what was read comes before.
        max_new_tokens: tokens at most; a stop token ends sooner.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0 = all.
        top_p: draw among the likeliest that hold this probability.
        min_p: draw among those with this share of the likeliest one's probability.
        seed: the same seed draws the same text.
        chat: the prompt is a message to an instruction-tuned model.
    """

    prompt: tyro.conf.Positional[str]
    context: Path | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    chat: bool = False

    def run(self) -> None:
        """Writes the continuation to the standard output."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed=self.seed)
        model, method = self.loaded()
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        if self.chat:
            prompt = model.tokenizer.chat([{"role": "user", "content": prompt}])
        state = None if self.context is None else load_context(self.context, model, method).state
        steps = kvjax.stream(
            model,
            prompt,
            method,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            compress=self.compress,
            state=state,
        )
        for piece in _pieces(model, (token for (token,) in steps)):
            print(piece, end="", flush=True)
        print()


@dataclass(frozen=True)
class Read(Served):
    """Reads a text once and saves what the model knows of it, for `kvjax generate --context`.

    Args:
        text: a file, or - for the standard input.
        out: the folder; of a method that keeps rows on a disk, its own.
        room: tokens that may follow, in a prompt and its answer.
    """

    text: tyro.conf.Positional[str]
    out: Path
    room: int = 1024

    def run(self) -> None:
        """Reads, saves, and says how much.

        Raises:
            ValueError: for a method that keeps rows on the host, or on a disk in another folder.
        """
        text = sys.stdin.read() if self.text == "-" else Path(self.text).read_text(encoding="utf-8")
        model, method = self.loaded()
        folder = self.out if method.folder is None else Path(method.folder)
        if method.tier == "host" or folder.resolve() != self.out.resolve():
            raise ValueError(
                f"what is read lies on the device or in its own folder, got {method.tier=}, {str(folder)!r} "
                f"for {str(self.out)!r}: take another tier, or that folder"
            )
        context_folder.lock(self.out).close()  # what cannot be written is told before the text is read
        ids = kvjax.pad([model.tokenizer.encode(text)])
        _, state = kvjax.prefill(model, ids, method, room=self.room, compress=self.compress)
        save_context(self.out, model, method, state, ids)
        print(f"{self.out}: {ids.shape[1]:,} tokens, room for {self.room:,} more")


@dataclass(frozen=True)
class Methods:
    """Lists the methods, their settings and what they do."""

    def run(self) -> None:
        """Writes one line per method and one per setting."""
        for name, kind in kvjax.METHODS.items():
            print(f"{name:<14} {sys.modules[kind.__module__].__doc__.splitlines()[0]}")
            if settings := ",".join(map(_setting, dataclasses.fields(kind))):
                print(f"{'':<14} {name}:{settings}")
        print("thresholds of activations, beside any of them (kvjax calibrate chess):")
        for name, kind in SPARSITIES.items():
            print(f"{name:<14} {sys.modules[kind.__module__].__doc__.splitlines()[0]}")
            print(f"{'':<14} {name}:{','.join(map(_setting, dataclasses.fields(kind)))}")


@dataclass(frozen=True)
class Models:
    """Lists the models that are known by name."""

    def run(self) -> None:
        """Writes one line per model."""
        for name, model in MODELS.items():
            print(f"{name:<20} {model.n_bytes / 1e6:>6.0f} MB  {model.file}")
        print("also: hf:org/name, the folder of a Hugging Face checkpoint, or a .gguf file")


Command = Generate | Read | Calibrate | Methods | Models | Doctor


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 on what the user can mend, 130 on Ctrl-C."""
    names = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)  # budgets, not what:budgets
    command = tyro.cli(Command, args=arguments, prog="kvjax", description=__doc__, config=names)
    try:
        command.run()
    except (ValueError, NotImplementedError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as in `| head`
            sys.stderr.close()
            return 0
        Console(stderr=True).print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _setting(field: dataclasses.Field) -> str:
    """Returns `name=default`, or `name=...` where one must be given."""
    return f"{field.name}={'...' if field.default is dataclasses.MISSING else field.default}"


def _pieces(model: Model, tokens: Iterable[int]) -> Iterator[str]:
    """Yields text as tokens complete it: a character may take several. Stop tokens give none."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        text = model.tokenizer.decode(ids)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    yield model.tokenizer.decode(ids)[len(shown) :]
