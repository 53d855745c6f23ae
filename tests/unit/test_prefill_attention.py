"""A prompt's attention against float64 loops, by XLA, by cuDNN's arguments, and by interpreted splash."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Layer
from kvjax.models.config import RopeConfig
from kvjax.prefill_attention import attend_prompt
from pallas_kernels import backend, dispatch, tolerance
from pallas_kernels.topology import environment

TESTS = Path(__file__).parents[1]
LAYER = Layer(2, 3, 16, RopeConfig(), 0.3)


def by_loops(layer: Layer, q, k, v, when, mass, pos) -> np.ndarray:
    """One query at a time, one slot at a time."""
    q, k, v, mass = (np.asarray(x, np.float64) for x in (q, k, v, mass))
    when, pos = np.asarray(when), np.asarray(pos)
    out = np.zeros(q.shape)
    for b, t, h, g in np.ndindex(q.shape[:4]):
        logit, rows = [], []
        for s in range(k.shape[2]):
            distance = pos[b, t] - when[b, h, s]
            if mass[b, h, s] == 0 or distance < 0 or (layer.window and distance >= layer.window):
                continue
            dot = q[b, t, h, g] @ k[b, h, s] * layer.scale
            if layer.softcap:
                dot = layer.softcap * np.tanh(dot / layer.softcap)
            logit.append(dot + np.log(mass[b, h, s]))
            rows.append(v[b, h, s])
        if rows:
            p = np.exp(np.array(logit) - max(logit))
            out[b, t, h, g] = p @ np.array(rows) / p.sum()
    return out


def case(n_slots: int, length: int, dtype, layer: Layer = LAYER, seed: int = 0) -> tuple:
    """A state with holes of NaN, merged slots and shuffled positions; the last third is free."""
    rng = np.random.default_rng(seed)
    slots = (2, layer.n_kv_heads, n_slots)
    when = np.stack([rng.permutation(n_slots) for _ in range(slots[0] * slots[1])]).reshape(slots)
    mass = rng.choice([0.0, 1.0, 2.5, 12.0], slots) * (np.arange(n_slots) < 2 * n_slots // 3)
    hole = (mass == 0)[..., None]
    rows = (rng.normal(size=(*slots, layer.head_dim)) for _ in "kv")
    k, v = (jnp.asarray(np.where(hole, np.nan, x), dtype) for x in rows)
    q = rng.normal(size=(2, length, layer.n_kv_heads, layer.group, layer.head_dim))
    pos = np.sort(rng.integers(0, n_slots, (2, length)), axis=1)
    pos[0, :2] = -1  # padding
    when, pos = (jnp.asarray(x, jnp.int32) for x in (when, pos))
    return jnp.asarray(q, dtype), k, v, when, jnp.asarray(mass, jnp.float32), pos


def error(out, args, layer: Layer = LAYER) -> float:
    return tolerance.error(out.astype(jnp.float32), by_loops(layer, *args))


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("n_slots", [40, 530])
def test_blocks_equal_loops(options, n_slots):
    layer = Layer(2, 3, 16, RopeConfig(), 0.3, **options)
    args = case(n_slots, 5, jnp.float32, layer)
    out = attend_prompt(*args, layer=layer)
    assert error(out, args, layer) < 1e-5
    assert error(jnp.zeros_like(out), args, layer) > 0.9
    swapped = (args[0], args[2], args[1], *args[3:])
    assert error(attend_prompt(*swapped, layer=layer), args, layer) > 0.1


@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=str)
@pytest.mark.parametrize("n_slots", [40, 300])
def test_splash_equals_loops(options, n_slots):
    layer = Layer(2, 3, 16, RopeConfig(), 0.25, **options)
    args = case(n_slots, 8, jnp.bfloat16, layer)
    with backend.aim(backend.Target("tpu", "TPU v5 lite", "forward")):
        out = jax.jit(functools.partial(attend_prompt, layer=layer, impl="tpu"))(*args)
    assert error(out, args, layer) < tolerance.limit(jnp.bfloat16, n_slots)


@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=str)
def test_what_cudnn_is_given_means_the_same(options, monkeypatch):
    """There is no cuDNN here, but XLA takes the same arguments."""
    layer, attention, asked = Layer(2, 3, 16, RopeConfig(), 0.3, **options), jax.nn.dot_product_attention, []

    def by_xla(*args, implementation, **rest):
        asked.append(implementation)
        return attention(*args, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    args = case(40, 6, jnp.bfloat16, layer)
    with backend.aim(backend.Target("gpu", "NVIDIA H100 80GB HBM3")):
        out = attend_prompt(*args, layer=layer, impl="gpu")
    assert asked == ["cudnn"]
    assert error(out, args, layer) < 2 * tolerance.limit(jnp.bfloat16, 40)  # log masses are rounded too


REFUSED = [
    ("gpu", {"dtype": jnp.float32}, "cuDNN takes bfloat16 and float16"),
    ("gpu", {"softcap": 3.0}, "cuDNN has no soft cap"),
    ("tpu", {"dtype": jnp.float32}, "splash attention computes in bfloat16"),
    ("tpu", {"softcap": 3.0}, "splash attention caps what masses are added to"),
    ("tpu", {"length": 9}, "takes queries by 8, got T=9"),
]


@pytest.mark.parametrize(("platform", "options", "message"), REFUSED)
def test_what_a_library_refuses_runs_in_blocks_and_raises_by_name(platform, options, message):
    options = {"dtype": jnp.bfloat16, "length": 8, "softcap": None} | options
    layer = Layer(2, 3, 16, RopeConfig(), 0.3, options["softcap"])
    args = case(40, options["length"], options["dtype"], layer)
    with backend.aim(backend.Target(platform, "described")), dispatch.watch() as taken:
        with pytest.raises(NotImplementedError, match=message):
            attend_prompt(*args, layer=layer, impl=platform)
        attend_prompt(*args, layer=layer)
    assert taken == {"prefill_attention": "reference"}


def test_without_cudnn_the_gpu_runs_in_blocks(monkeypatch):
    def missing(*args, **rest):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    with (
        backend.aim(backend.Target("gpu", "described")),
        pytest.raises(NotImplementedError, match="cuDNN must be installed, got cuDNN is not detected"),
    ):
        attend_prompt(*case(40, 8, jnp.bfloat16), layer=LAYER, impl="gpu")


EXPECTED = {
    "h100": ({"whole prompt": "gpu", "long": "gpu", "odd sizes": "gpu"}, "__cudnn$fmha"),
    "v5e": (dict.fromkeys(("whole prompt", "long", "odd sizes", "large heads"), "tpu"), "tpu_custom_call"),
}


@pytest.mark.parametrize("device", EXPECTED)
def test_the_library_is_in_the_compiled_program(device):
    path = os.pathsep.join([str(TESTS.parent), str(Path(sys.prefix) / "compilers"), *sys.path])
    run = subprocess.run(
        [sys.executable, TESTS / "prefill_child.py", device],
        env=os.environ | environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = {line["name"]: line for line in map(json.loads, run.stdout.splitlines())}
    taken, kernel = EXPECTED[device]
    assert len(found) == 6
    for name, line in found.items():
        assert line["prefill_attention"] == taken.get(name, "reference")
        assert line["kernels"] == ([kernel] if name in taken else [])
    bias = 8 * 256 * 1024 * 2  # bytes of one layer's; all at once, a prompt of 8B took gigabytes of them
    assert found["whole prompt"]["temp_bytes_a_layer"] < bias / 4
