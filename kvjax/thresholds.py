"""Says which activations a model leaves out: thresholds at sites, and the protocol of methods that set them.

An activation x_i of a site becomes 0 where |x_i|·w_i is below the site's level; what weighs it, w, is 1 or a
figure of the channel. Rows of weights that meet nothing but zeros are not read in decode steps (`spvmm` and
`gate_up`); in prompts the zeros are there for the sake of quality, and everything is read.

Thresholds lie beside the parameters, in the collection "thresholds" of the model's variables, under the name
of their site.
"""

import abc
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Shaped

from kvjax.calibrate import checkpoint
from kvjax.model import Model, fingerprint

__all__ = ["ActivationSparsity", "Site", "Threshold", "Thresholds", "collection", "load"]

_TINY = 1e-30  # below what any activation counts for


class Site(enum.StrEnum):
    """A tensor of a layer that may be sparse: the gate, activated, or what a projection is given."""

    FFN_GATE = "ffn/act"
    Q_IN = "attn/q/in"
    K_IN = "attn/k/in"
    V_IN = "attn/v/in"
    O_IN = "attn/o/in"
    GATE_IN = "ffn/gate/in"
    UP_IN = "ffn/up/in"
    DOWN_IN = "ffn/down/in"

    def rows(self, config: Any) -> int:
        """Returns its channels, of which each has a row of weights in every product of the site."""
        heads = config.n_heads * config.head_dim
        return {"ffn/act": config.ffn_width, "ffn/down/in": config.ffn_width, "attn/o/in": heads}.get(
            self, config.width
        )

    def row_weights(self, config: Any) -> int:
        """Returns how many weights are not read for each channel that is 0."""
        c = config
        kv, heads = c.n_kv_heads * c.head_dim, c.n_heads * c.head_dim
        return {
            "ffn/act": 2 * c.width,  # a row of up and one of down
            "attn/q/in": heads,
            "attn/k/in": kv,
            "attn/v/in": kv,
            "ffn/gate/in": c.ffn_width,
            "ffn/up/in": c.ffn_width,
        }.get(self, c.width)


@struct.dataclass
class Threshold:
    """Makes small activations of one site 0.

    Args:
        level: what |x|·weight is compared with; 0 keeps all.
        weight: of each channel; None for 1.
        temperature: of a soft threshold, which is for learning: None is hard.
        group: neighbouring channels that live or die together, by the root of their mean square.
    """

    level: Float[Array, ""]
    weight: Float[Array, " C"] | None = None
    temperature: Float[Array, ""] | None = None
    group: int = struct.field(pytree_node=False, default=1)

    @property
    def plain(self) -> bool:
        """Whether each activation alone is compared, as it is, with the level, and hard."""
        return self.weight is None and self.temperature is None and self.group == 1

    def scores(self, x: Shaped[Array, "... C"]) -> Float[Array, "... N"]:
        """Returns what is compared with the level, of each channel or group of them."""
        score = jnp.abs(x.astype(jnp.float32))
        if self.weight is not None:
            score = score * self.weight
        if self.group == 1:
            return score
        n, rest = score.shape[-1], -score.shape[-1] % self.group
        parts = jnp.pad(score * score, [(0, 0)] * (x.ndim - 1) + [(0, rest)])
        sums = parts.reshape(*x.shape[:-1], -1, self.group).sum(-1)
        return jnp.sqrt(sums / np.minimum(n - np.arange(0, n, self.group), self.group))

    def __call__(self, x: Shaped[Array, "... C"]) -> Shaped[Array, "... C"]:
        """Returns x with 0 for what is below the level; NaN stays."""
        score = self.scores(x)
        if self.temperature is None:
            return jnp.where(self._each(score < self.level, x), 0, x)
        return x * self._each(self.soft(score), x).astype(x.dtype)

    def soft(self, score: Float[Array, "... N"]) -> Float[Array, "... N"]:
        """Returns how far each score is kept, in (0, 1): a half at the level."""
        ratio = jnp.log(score + _TINY) - jnp.log(self.level + _TINY)
        return jax.nn.sigmoid(ratio / self.temperature)

    def _each(self, values: Array, x: Array) -> Array:
        """Returns the values of groups as those of their channels."""
        return values if self.group == 1 else jnp.repeat(values, self.group, axis=-1)[..., : x.shape[-1]]


class ActivationSparsity(abc.ABC):
    """A way to choose thresholds. Subclasses are frozen dataclasses.

    Fields that each has: `sparsity`, the share of a site's activations that become 0, in [0, 1); `group`, the
    neighbouring channels that do so together, 1 for each alone (a TPU reads weights by blocks of rows).
    """

    sparsity: float
    group: int
    statistics: ClassVar[tuple[str, ...]] = ("mean", "rms")

    def __post_init__(self) -> None:
        """Raises ValueError for settings that are out of range."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is in [0, 1), got {self.sparsity}: a share, not a percentage")
        if self.group < 1:
            raise ValueError(f"a group has at least 1 channel, got {self.group=}")

    @property
    @abc.abstractmethod
    def sites(self) -> Mapping[Site, str | None]:
        """What is sparse, and by which statistic of up's products it is weighed: None, "mean" or "rms"."""

    @classmethod
    def load(cls, folder: Path | str, model: Model) -> "Thresholds":
        """Reads what `kvjax calibrate chess` wrote for this method, see `load`.

        Raises:
            ValueError: also for the thresholds of another method.
        """
        found = load(folder, model)
        if not isinstance(found.method, cls):
            raise ValueError(f"a folder holds one method, got {found.method} in {str(folder)!r}")
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Thresholds:
    """The thresholds of a model.

    Args:
        method: how they were chosen.
        layers: of each layer, by site.
        model: the fingerprint of the model.
    """

    method: ActivationSparsity
    layers: Sequence[Mapping[Site, Threshold]]
    model: str

    def apply(self, model: Model) -> Model:
        """Returns the model with these thresholds, which any loop with any cache method then keeps to.

        Where the gate is sparse, the projections of gate and up lie the other way, [F M], so that rows of up
        can be left out: they are copied, and the rest is shared with the given model.

        Raises:
            ValueError: for another model, one that has thresholds, or one spread over devices.
        """
        if self.model != fingerprint(model):
            raise ValueError(
                f"thresholds are of one model, got {self.model} for {model.name!r}, which is "
                f"{fingerprint(model)}: calibrate them for it"
            )
        if model.thresholds is not None:
            raise ValueError(f"a model has one set of thresholds, got {model.name!r} with one: load it anew")
        if model.mesh is not None:
            raise ValueError("activation sparsity runs on one device, got a model spread over several")
        gated = Site.FFN_GATE in self.method.sites
        params = {
            name: _turned(part) if gated and name.startswith("layer_") else part
            for name, part in model.params.items()
        }
        return dataclasses.replace(model, params=params, thresholds=collection(self.layers))

    def save(self, folder: Path | str) -> None:
        """Writes an Orbax checkpoint to `folder`/thresholds."""
        arrays = {}
        for i, layer in enumerate(self.layers):
            for site, t in layer.items():
                arrays[f"{i}:{site.name}:level"] = np.asarray(t.level, np.float32)
                if t.weight is not None:
                    arrays[f"{i}:{site.name}:weight"] = np.asarray(t.weight, np.float32)
        about = {
            "name": type(self.method).__name__,
            "settings": dataclasses.asdict(self.method),
            "model": self.model,
            "n_layers": len(self.layers),
        }
        checkpoint.write(Path(folder) / "thresholds", arrays, about)


def collection(layers: Sequence[Mapping[Site, Threshold]]) -> dict:
    """Returns the thresholds of layers as the collection of variables that the decoder reads."""
    found: dict = {}
    for i, layer in enumerate(layers):
        for site, threshold in layer.items():
            node = found.setdefault(f"layer_{i}", {})
            *parents, leaf = site.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = threshold
    return found


def _turned(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a layer's parameters with the projections of gate and up as [F M]."""
    ffn = dict(layer["ffn"])
    for name in ("gate", "up"):
        ffn[name] = dict(ffn[name])
        ffn[name]["kernel_t"] = jax.jit(jnp.transpose)(ffn[name].pop("kernel"))
    return {**layer, "ffn": ffn}


def load(folder: Path | str, model: Model) -> Thresholds:
    """Reads the thresholds of a model.

    Raises:
        ValueError: for a checkpoint that is not whole, or that of another model.
        FileNotFoundError: where there is no folder.
    """
    from kvjax.sparsity import SPARSITIES

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"thresholds are a folder of `kvjax calibrate chess`, got {str(folder)!r}")
    arrays, about = checkpoint.read(Path(folder) / "thresholds")
    kinds = {kind.__name__: kind for kind in SPARSITIES.values()}
    try:
        method = kinds[about["name"]](**about["settings"])
        layers = [
            {
                site: Threshold(
                    jnp.asarray(arrays[f"{i}:{site.name}:level"]),
                    None if kind is None else jnp.asarray(arrays[f"{i}:{site.name}:weight"]),
                    group=method.group,
                )
                for site, kind in method.sites.items()
            }
            for i in range(about["n_layers"])
        ]
        made_for = about["model"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"thresholds are a whole checkpoint, got {str(folder)!r} without {error}") from error
    if made_for != fingerprint(model):
        raise ValueError(
            f"thresholds are of one model, got those of {made_for} in {str(folder)!r} for {model.name!r}, "
            f"which is {fingerprint(model)}: calibrate them for it"
        )
    return Thresholds(method, layers, made_for)
