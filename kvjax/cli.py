"""The command line `kvjax`: generate text, calibrate, list methods, list models, look at the machine."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

import kvjax
from kvjax import budgets, spec, thresholds
from kvjax.calibrate import codebooks
from kvjax.cli_calibrate import Calibrate, check_tokenizer
from kvjax.cli_doctor import Doctor
from kvjax.method import CacheMethod
from kvjax.model import Model
from kvjax.models.hub import MODELS
from kvjax.models.quantize import quantize
from kvjax.sampling import Sampling
from kvjax.sparsity import SPARSITIES

__all__ = ["Generate", "Methods", "Models", "main"]


@dataclass(frozen=True)
class Generate:
    """Continues a prompt and writes the text as it comes.

    Args:
        prompt: the text, or - to read it from the standard input.
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        method: such as snapkv:budget=512,window=16 or snapkv+kivi4 (see `kvjax methods`).
        budget: tokens per KV head, for a method that has a budget.
        shares: a file of `kvjax calibrate budgets`: heads have budgets of their own, whose mean is `budget`.
        calibration: a folder of `kvjax calibrate a2ats`, for a method that takes one.
        thresholds: a folder of `kvjax calibrate chess`: activations below them are left out.
        int8: hold the projections as int8 codes.
        compress: when: at the prompt's "end", or after each "chunk" of it.
        max_new_tokens: tokens at most; a stop token ends sooner.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest; 0 = all.
        top_p: draw among the likeliest that hold this probability.
        min_p: draw among those with this share of the likeliest one's probability.
        seed: the same seed draws the same text.
        chat: the prompt is a message to an instruction-tuned model.
    """

    prompt: tyro.conf.Positional[str]
    model: str = "smollm2-135m"
    dtype: str | None = None
    method: str = "full"
    budget: int | None = None
    shares: Path | None = None
    calibration: Path | None = None
    thresholds: Path | None = None
    int8: bool = False
    compress: str = "end"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    chat: bool = False

    def run(self) -> None:
        """Writes the continuation to the standard output."""
        method = self._method()  # wrong names are told before the model is loaded
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed=self.seed)
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        model = kvjax.load(self.model, self.dtype)
        check_tokenizer(model)
        if self.shares is not None:
            table = budgets.load(self.shares, model).table(self.budget, least=getattr(method, "least", 1))
            method = spec.parse(self.method, budget=table)
        if self.calibration is not None:
            method = spec.parse(self.method, calibration=codebooks.load(self.calibration, model))
        model = quantize(model) if self.int8 else model
        if self.thresholds is not None:
            model = thresholds.load(self.thresholds, model).apply(model)
        if self.chat:
            prompt = model.tokenizer.chat([{"role": "user", "content": prompt}])
        steps = kvjax.stream(
            model,
            prompt,
            method,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            compress=self.compress,
        )
        for piece in _pieces(model, (token for (token,) in steps)):
            print(piece, end="", flush=True)
        print()

    def _method(self) -> CacheMethod | None:
        """Returns the method, with the budget where it has one; None for one that takes a calibration."""
        if self.calibration is not None:
            if "calibration" in spec.settings_of(self.method):
                return None
            raise ValueError(
                f"{self.method} takes no calibration, got {str(self.calibration)!r}: leave --calibration out"
            )
        if self.budget is None:
            if self.shares is not None:
                raise ValueError(f"shares are of a budget, got {str(self.shares)!r} alone: give --budget too")
            return spec.parse(self.method)
        method = spec.parse(self.method, budget=self.budget)
        if "budget" not in spec.settings_of(self.method):
            raise ValueError(f"{self.method} takes no further budget, got {self.budget=}: leave --budget out")
        return method


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


Command = Generate | Calibrate | Methods | Models | Doctor


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 on what the user can mend, 130 on Ctrl-C."""
    names = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)  # budgets, not what:budgets
    command = tyro.cli(Command, args=arguments, prog="kvjax", description=__doc__, config=names)
    try:
        command.run()
    except (ValueError, NotImplementedError, OSError) as error:
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
