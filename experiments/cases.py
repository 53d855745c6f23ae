"""Describes what speed is measured on: a published shape with random weights, and rows of tokens."""

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments import decode_model
from kvjax.model import Model
from pallas_kernels import timing

__all__ = ["Case", "case_of", "copy_rate", "fitting", "prompts", "random_model", "weight_bytes"]


@dataclass(frozen=True)
class Case:
    """A model's shape, with fewer layers if asked, and rows of tokens."""

    shape: str
    layers: int | None
    batch: int
    tokens: int

    @property
    def label(self) -> str:
        """The name in claims: llama_b8_32k."""
        length = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else f"{self.tokens}"
        family = "".join(c for c in self.shape.split("-")[0] if c.isalpha())
        layers = f"_l{self.layers}" if self.layers else ""
        return f"{family}{layers}_b{self.batch}_{length}"

    def model(self, seed: int) -> Model:
        """Returns the model with random weights."""
        return random_model(self.shape, self.layers, seed)

    def row(self, part: str, name: str, **more: str) -> dict[str, Any]:
        """Returns what tells a row from all others."""
        n_layers = decode_model.config_of(self.shape, self.layers).n_layers
        spec = f"{self.shape} bfloat16, {n_layers} layers"
        return {"part": part, "name": name, **more, "spec": spec, "batch": self.batch, "slots": self.tokens}


def case_of(word: str) -> Case:
    """Parses a case such as llama-3.1-8b:8x32768, or llama-3.1-8b/4:8x32768 with 4 layers.

    Raises:
        ValueError: for one that is not a shape and positive numbers.
    """
    name, _, size = word.partition(":")
    shape, slash, layers = name.partition("/")
    numbers = [*size.split("x"), *([layers] if slash else [])]
    if size.count("x") != 1 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"a case is shape:batch x tokens, such as llama-3.1-8b:8x32768, got {word!r}")
    case = Case(shape, int(layers) if slash else None, int(numbers[0]), int(numbers[1]))
    decode_model.config_of(case.shape, case.layers)
    return case


def prompts(model: Model, batch: int, tokens: int, seed: int) -> np.ndarray:
    """Returns random token ids, [B T]."""
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, tokens), np.int32)


@functools.lru_cache(maxsize=1)
def random_model(shape: str, layers: int | None, seed: int) -> Model:
    """Returns a model with random weights; the newest one is kept, so that parts share it."""
    return decode_model.random(shape, decode_model.config_of(shape, layers), seed)


def weight_bytes(model: Model) -> int:
    """Returns the bytes of the weights that a step reads: not of an embedding that it takes a few rows of."""
    found = sum(x.nbytes for x in jax.tree.leaves(model.params))
    return found if model.config.tied_embeddings else found - model.params["embed"]["embedding"].nbytes


def fitting(batch: int, run: Callable[[int], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Runs with all rows, or with 7/8 or 3/4 of them where memory is short. Returns the rows as well."""
    tried = [n for n in dict.fromkeys((batch, batch * 7 // 8, batch * 3 // 4)) if n]
    for rows in tried:
        try:
            return rows, run(rows)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows == tried[-1]:
                raise
        print(f"{rows} rows do not fit")
        gc.collect()  # what the failed run held
    raise ValueError(f"a batch has at least one row, got {batch=}")


@functools.cache
def copy_rate(mib: int) -> float:
    """Returns the rate at which the device copies so many MiB, in bytes per second; measured once."""
    return timing.copy_rate(mib * 2**20)
