"""The models, methods and prompts that the laws over methods run on."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.calibrate.codebooks import Codebooks
from kvjax.method import CacheMethod
from kvjax.methods import METHODS, make
from kvjax.model import Model
from kvjax.models.config import ModelConfig, RopeConfig

BUDGET, PROMPT, NEW = 48, 90, 12
CHUNKS = {
    "chelsea": {"chunk": 16},
    "leoam": {"topk": BUDGET, "leaf": 4, "root": 16, "window": 8, "n_sinks": 4},
}


def tiny(group: int, n_kv_heads: int = 2, windows=(None, None)) -> Model:
    """A random decoder whose attention is far from uniform."""
    config = ModelConfig(
        family="llama",
        vocab_size=97,
        width=32,
        ffn_width=48,
        n_layers=len(windows),
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=16,
        context_length=512,
        rope=RopeConfig(),
        norm_eps=1e-5,
        query_scale=0.25,
        layer_windows=windows,
    )
    rng, params = np.random.default_rng(group), {}
    for path, shape in config.param_shapes().items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        scale = 1.0 if leaf in ("scale", "embedding") else 1.5 / np.sqrt(shape[0])
        node[leaf] = jnp.asarray(
            rng.normal(1.0 if leaf == "scale" else 0.0, scale * (0.1 if leaf == "scale" else 1), shape),
            jnp.float32,
        )
    return Model("tiny", config, params, None, jnp.dtype("float32"))


MODELS = {"G2": tiny(2), "G1 with a window": tiny(1, windows=(24, None))}
ONE_LAYER = tiny(2, windows=(None,))  # as layers are alike, and each is compiled


def codebooks(model: Model, seed: int = 0, n_codes: int = 24) -> Codebooks:
    """Random codebooks for a tiny model, in a frame that is not that of its keys."""
    c, rng = model.config, np.random.default_rng(seed)
    square = rng.normal(size=(c.n_layers, c.n_kv_heads, c.head_dim, 2 * c.head_dim))
    metric = np.linalg.cholesky(square @ np.swapaxes(square, -1, -2) / (2 * c.head_dim))
    centroids = rng.normal(size=(c.n_layers, c.n_kv_heads, n_codes, c.head_dim)) @ metric
    books = (jnp.asarray(x, jnp.float32) for x in (centroids, metric))
    return Codebooks(*books, tuple(w is not None for w in c.layer_windows), "tiny", 64, 64)


def fitted(method: CacheMethod, model: Model) -> CacheMethod:
    """Returns the method with codebooks for the model, if it has any."""
    if not hasattr(method, "calibration"):
        return method
    return dataclasses.replace(method, calibration=codebooks(model))


def settings(name: str, budget=BUDGET) -> dict:
    """The settings under which a method is tested: its defaults at a budget, for prompts this short."""
    known = METHODS[name].__dataclass_fields__
    short = {"budget": budget, "dense_layers": 0, "n_recent": 8, "slack": 6} | CHUNKS.get(name, {})
    if "calibration" in known:  # the tiny models have one shape
        short |= {"calibration": codebooks(MODELS["G2"]), "topk": budget, "far": 64, "window": 8}
    return {k: v for k, v in short.items() if k in known}


CASES = {name: make(name, **settings(name)) for name in METHODS}
CASES |= {
    "snapkv+kivi4": kvjax.chain(make("snapkv", budget=BUDGET), make("kivi", bits=4)),
    "knorm+quest": kvjax.chain(make("knorm", budget=BUDGET), make("quest", budget=32, dense_layers=0)),
    "chelsea+kivi8": kvjax.chain(make("chelsea", **settings("chelsea")), make("kivi", bits=8)),
    "chelsea+quest": kvjax.chain(
        make("chelsea", **settings("chelsea")), make("quest", budget=32, dense_layers=0)
    ),
    "a2ats, host": make("a2ats", **settings("a2ats"), tier="host"),
    "leoam, host": make("leoam", **settings("leoam") | {"root": None, "abstract_bits": 8}, tier="host"),
    "quest+kivi8": kvjax.chain(make("quest", budget=32, dense_layers=0), make("kivi", bits=8)),
}
EVICTS = [name for name, m in CASES.items() if m.evicts]
RNG = np.random.default_rng(0)
# No token twice: equal tokens have equal keys in the first layer, and rounding would choose between them.
PROMPTS = np.stack([RNG.permutation(97)[:PROMPT] for _ in range(2)]).astype(np.int32)
FORCED = RNG.integers(0, 97, (2, NEW)).astype(np.int32)


def run(model: Model, method: CacheMethod, ids=PROMPTS, forced=FORCED, **options):
    """Prefills and decodes forced tokens; returns the logits of each step, and the state."""
    first, state = kvjax.prefill(model, ids, method, room=forced.shape[1], **options)
    _, last, state, kept = kvjax.decode(model, first, state, method, forced, keep_logits=True)
    return np.concatenate([np.asarray(kept), np.asarray(last)[:, None]], axis=1), state
