"""Thresholds leave out what their methods say, in prompts and in steps, and refuse what is not theirs."""

import dataclasses
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import kvjax
from kvjax import cli, sharding, thresholds
from kvjax.calibrate import activations, chess
from kvjax.models.decoder import FeedForward
from kvjax.models.quantize import quantize
from kvjax.sparsity import SPARSITIES
from kvjax.sparsity.cats import Cats
from kvjax.sparsity.chess import Chess
from kvjax.thresholds import Site, Threshold
from pallas_kernels import dispatch
from pallas_kernels.backend import Target, aim
from tests.tiny_models import byte_tokenizer, tiny

MODEL = tiny(byte_tokenizer(), windows=(None,))
RNG = np.random.default_rng(0)
LEARNED = RNG.integers(0, 256, (40, 128)).astype(np.int32)
OTHERS = RNG.integers(0, 256, (8, 128)).astype(np.int32)
METHODS = {  # every method of the folder, and more settings of CHESS
    **{name: kind(0.5) for name, kind in SPARSITIES.items()},
    "chess+": Chess(0.5, plus=True, statistic="rms"),
    "chess, groups of 8": Chess(0.5, plus=True, group=8),
}


@pytest.fixture(scope="module")
def found():
    passes = chess.Passes(MODEL, LEARNED)
    return dict(zip(METHODS, chess.closed_form(passes, list(METHODS.values())), strict=True))


def of_zeros(model, thresholds):
    """Returns each site's share of zeros in every layer, on text that no threshold was made from."""
    layers = tuple(thresholds.layers)
    return activations.run(model, OTHERS, _zeros, layers)


def _zeros(logits, seen, layers):
    return [
        {site: jnp.mean(t(x[site]) == 0) for site, t in layer.items()}
        for layer, x in zip(layers, seen, strict=True)
    ]


@given(
    st.integers(1, 40),
    st.sampled_from([1, 2, 5, 8]),
    st.floats(0, 3, width=32),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_threshold_is_what_numpy_says(n, group, level, weighed, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, n)).astype(np.float32)
    weight = rng.uniform(0, 2, n).astype(np.float32) if weighed else None
    score = np.abs(np.float64(x)) * (1 if weight is None else weight)
    for start in range(0, n, group):
        part = score[:, start : start + group]
        part[:] = np.sqrt(np.mean(part**2, axis=1, keepdims=True))
    ours = Threshold(jnp.float32(level), None if weight is None else jnp.asarray(weight), group=group)(
        jnp.asarray(x)
    )
    sure = np.abs(score - level) > 1e-5
    np.testing.assert_array_equal(np.asarray(ours)[sure], np.where(score < level, 0, x)[sure])


def test_nan_stays_and_zero_level_keeps_all():
    x = jnp.array([[0.0, -0.0, 1e-38, jnp.nan, -jnp.inf, 3.0]])
    np.testing.assert_array_equal(Threshold(jnp.float32(0))(x), x)
    assert np.isnan(np.asarray(Threshold(jnp.float32(9))(x))[0, 3])


@pytest.mark.parametrize("name", METHODS)
def test_sparsity_of_other_text_is_that_asked_for(name, found):
    """In every layer, within a point; given what the dense model gives."""
    for layer in of_zeros(MODEL, found[name]):
        for site, share in layer.items():
            assert abs(share - METHODS[name].sparsity) < 0.01 * (3 if METHODS[name].group > 1 else 1), site


def test_chess_is_as_its_authors_compute_it(found):
    """Their formula, in NumPy: t_i = T/u_i, T the pooled quantile of |a_gate|·u_i."""
    gates, ups = [], []
    for row in LEARNED:
        _, seen = activations.run(MODEL, row[None], _both)
        gates.append([np.asarray(layer["ffn/act"][0]) for layer in seen])
        ups.append([np.asarray(layer["ffn/up/out"][0]) for layer in seen])
    for i, layer in enumerate(found["chess"].layers):
        gate, up = (np.concatenate([x[i] for x in part]) for part in (gates, ups))
        u = np.abs(up).mean(0)
        scores = np.sort((np.abs(gate) * u).reshape(-1))
        level = scores[int(0.5 * scores.size)]
        ours = layer[Site.FFN_GATE]
        np.testing.assert_allclose(ours.weight, u, rtol=1e-5)
        np.testing.assert_allclose(ours.level, level, rtol=1e-5)
        rms = found["chess+"].layers[i][Site.FFN_GATE].weight
        np.testing.assert_allclose(rms, np.sqrt((up**2).mean(0)), rtol=1e-5)


def _both(logits, seen):
    return logits, seen


def test_equal_channels_make_chess_cats():
    model = tiny(byte_tokenizer(), windows=(None,))
    params = jax.tree.map(lambda x: x, model.params)
    up = params["layer_0"]["ffn"]["up"]["kernel"]
    params["layer_0"]["ffn"]["up"]["kernel"] = jnp.broadcast_to(up[:, :1], up.shape)
    model = dataclasses.replace(model, params=params)
    ours, theirs = chess.closed_form(chess.Passes(model, LEARNED), [Chess(0.5), Cats(0.5)])
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        a, b = a[Site.FFN_GATE], b[Site.FFN_GATE]
        np.testing.assert_allclose(a.level / a.weight, np.full(48, b.level), rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_out_at_sparsity_0(name):
    method = dataclasses.replace(METHODS[name], sparsity=0.0)
    (ours,) = chess.closed_form(chess.Passes(MODEL, LEARNED[:32]), [method])
    np.testing.assert_array_equal(ours.apply(MODEL).logits(OTHERS), MODEL.logits(OTHERS))


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_the_dense_one_with_zeros(name, found):
    """Its feed-forward block, from the equations in NumPy."""
    ours, (x, *_) = found[name], activations.run(MODEL, OTHERS[:1], _ffn_inputs)
    params, x = MODEL.params["layer_0"]["ffn"], np.asarray(x[0])
    own = {site: t for site, t in ours.layers[0].items() if site.startswith("ffn/")}

    def cut(site, x):
        return np.asarray(own[site](jnp.asarray(x))) if site in own else x

    w = {k: np.asarray(p["kernel"]) for k, p in params.items()}
    gate = cut(Site.GATE_IN, x) @ w["gate"]
    gate = cut(Site.FFN_GATE, gate / (1 + np.exp(-gate)))
    y = cut(Site.DOWN_IN, gate * (cut(Site.UP_IN, x) @ w["up"])) @ w["down"]
    sparse = ours.apply(MODEL)
    variables = {
        "params": sparse.params["layer_0"]["ffn"],
        "thresholds": sparse.thresholds["layer_0"].get("ffn", {}),
    }
    block = FeedForward(MODEL.config).apply(variables, jnp.asarray(x)[None])
    np.testing.assert_allclose(block[0], y, atol=2e-4)


def _ffn_inputs(logits, seen):
    return [layer["ffn/gate/in"] for layer in seen]


def steps(model, batch=3, n=4):
    """Returns the logits of decode steps."""
    ids = OTHERS[:batch, :20]
    logits, state = kvjax.prefill(model, ids, room=n)
    forced = OTHERS[:batch, 20 : 20 + n]
    method = kvjax.METHODS["full"]()
    return kvjax.decode(model, logits, state, method, forced, keep_logits=True)[3], kvjax.prefill(
        model, OTHERS[:batch, : 20 + n]
    )[0]


@pytest.mark.interpreted
@pytest.mark.parametrize(  # on a TPU, what it has kernels of its own for
    ("name", "codes", "platform"),
    [
        *((name, False, "gpu") for name in METHODS),
        ("chess+", True, "gpu"),
        *((name, False, "tpu") for name in ("chess+", "chess, groups of 8", "teal")),
        ("chess+", True, "tpu"),
    ],
)
def test_kernels_change_nothing(name, codes, platform, found):
    model = found[name].apply(quantize(MODEL) if codes else MODEL)
    expected, _ = steps(model)
    with aim(Target(platform, "interpreted", "forward")), dispatch.watch() as taken:
        ours, _ = steps(model)
    assert taken["spvmm"] == platform
    gated, op = Site.FFN_GATE in METHODS[name].sites, "vmmsp" if METHODS[name].group > 1 else "gate_up"
    gates = {x: taken[x] for x in ("gate_up", "vmmsp") if x in taken}
    assert gates == ({op: platform} if gated else {})
    together = Site.Q_IN in METHODS[name].sites and METHODS[name].group == 1
    assert taken.get("spvmm_each") == (platform if together else None)
    np.testing.assert_allclose(ours, expected, atol=3e-3)


@pytest.mark.interpreted
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_gate_that_is_sparse_may_have_sparse_inputs_too(platform, found):
    """No method of ours has both: what one kernel would not see is decided before it."""
    inputs = (Site.GATE_IN, Site.UP_IN)
    layers = [
        {**one, **{site: other[site] for site in inputs}}
        for one, other in zip(found["chess"].layers, found["teal"].layers, strict=True)
    ]
    model = dataclasses.replace(found["chess"], layers=layers).apply(MODEL)
    expected, _ = steps(model)
    with aim(Target(platform, "interpreted", "forward")), dispatch.watch() as taken:
        ours, _ = steps(model)
    assert "gate_up" not in taken
    np.testing.assert_allclose(ours, expected, atol=3e-3)
    assert np.abs(expected - steps(found["chess"].apply(MODEL))[0]).max() > 0.01


def test_more_rows_than_kernels_take_are_multiplied_densely(found):
    model, ids = found["chess"].apply(MODEL), np.tile(OTHERS, (2, 1))[:9, :16]
    with aim(Target("gpu", "interpreted", "forward")), dispatch.watch() as taken:
        logits, state = kvjax.prefill(model, ids, room=1)
        kvjax.decode_step(model, logits.argmax(-1), state)
    assert not {"spvmm", "gate_up", "vmmsp"} & set(taken)


def test_steps_leave_out_what_prompts_do(found):
    kept, after = steps(found["chess+"].apply(MODEL), n=4)
    more, _ = steps(found["chess+"].apply(MODEL), n=5)
    np.testing.assert_allclose(more[:, 4], after, atol=2e-4)  # logits that the fifth token was drawn from
    np.testing.assert_array_equal(kept[:, 0], more[:, 0])


def test_generate_takes_thresholds_or_a_model_with_them(found):
    ours = kvjax.generate(MODEL, "Call me Ishmael.", max_new_tokens=12, sparsity=found["chess"])
    theirs = kvjax.generate(found["chess"].apply(MODEL), "Call me Ishmael.", max_new_tokens=12)
    assert ours == theirs != kvjax.generate(MODEL, "Call me Ishmael.", max_new_tokens=12)


def test_any_cache_method_runs_with_thresholds(found):
    method = kvjax.chain(kvjax.METHODS["snapkv"](budget=24, window=8), kvjax.METHODS["kivi"](bits=8))
    (ours,) = kvjax.generate(MODEL, "a" * 40, method, max_new_tokens=6, sparsity=found["chess+"])
    assert len(ours.ids) == 6


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_loaded(name, found, tmp_path):
    found[name].save(tmp_path)
    ours = type(METHODS[name]).load(tmp_path, MODEL)
    assert ours.method == METHODS[name]
    np.testing.assert_array_equal(ours.apply(MODEL).logits(OTHERS), found[name].apply(MODEL).logits(OTHERS))


def test_what_is_not_ones_own_is_refused(found, tmp_path):
    found["chess"].save(tmp_path)
    other = tiny(byte_tokenizer(), n_kv_heads=4)
    with pytest.raises(ValueError, match="thresholds are of one model"):
        thresholds.load(tmp_path, other)
    with pytest.raises(ValueError, match="thresholds are of one model"):
        found["chess"].apply(other)
    with pytest.raises(ValueError, match="a folder holds one method"):
        Cats.load(tmp_path, MODEL)
    with pytest.raises(FileNotFoundError, match="a folder of `kvjax calibrate chess`"):
        thresholds.load(tmp_path / "none", MODEL)
    with pytest.raises(ValueError, match="one set of thresholds"):
        found["chess"].apply(found["cats"].apply(MODEL))
    with pytest.raises(ValueError, match="one device"):
        found["chess"].apply(dataclasses.replace(MODEL, mesh=sharding.make_mesh()))
    for path in sorted((tmp_path / "thresholds").rglob("*")):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="whole checkpoint"):
        thresholds.load(tmp_path, MODEL)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 50.0, math.nan])
@pytest.mark.parametrize("kind", SPARSITIES.values())
def test_a_sparsity_is_a_share(kind, sparsity):
    with pytest.raises(ValueError, match="sparsity is in"):
        kind(sparsity)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="a group has at least"):
        Cats(group=0)
    with pytest.raises(ValueError, match="a statistic is one of mean, rms"):
        Chess(statistic="median")


def test_channels_that_never_fire_are_left_out_and_counted(tmp_path):
    model = tiny(byte_tokenizer(), windows=(None,))
    params = jax.tree.map(lambda x: x, model.params)
    ffn = params["layer_0"]["ffn"]
    ffn["up"]["kernel"] = ffn["up"]["kernel"].at[:, :5].set(0)
    ffn["gate"]["kernel"] = ffn["gate"]["kernel"].at[:, 5:8].set(0)
    model = dataclasses.replace(model, params=params)
    ours = chess.calibrate(model, LEARNED, tmp_path, Chess(0.5))
    assert '"never": 5' in (tmp_path / "measured.json").read_text()
    assert bool(jnp.isfinite(ours.apply(model).logits(OTHERS)).all())
    assert abs(of_zeros(model, ours)[0][Site.FFN_GATE] - 0.5) < 0.01


def test_the_command_line_calibrates_and_generates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: MODEL)
    folder = str(tmp_path / "out")
    sizes = ["--tokens", "5120", "--context", "256", "--method", "chess:plus=True", "--sparsity", "0.4"]
    assert cli.main(["calibrate", "chess", "--out", folder, *sizes]) == 0
    assert "Chess(sparsity=0.4, plus=True" in capsys.readouterr().out
    assert cli.main(["generate", "Call me", "--thresholds", folder, "--int8", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out
    assert cli.main(["calibrate", "chess", "--out", folder, *sizes, "--sparsity", "1"]) == 2
    assert cli.main(["calibrate", "chess", "--out", folder, "--context", "250"]) == 2


@pytest.mark.parametrize("site", Site)
def test_a_site_counts_the_weights_of_its_products(site):
    c, layer = MODEL.config, MODEL.params["layer_0"]
    part, name, *_ = site.split("/")
    names = ("up", "down") if site is Site.FFN_GATE else (name,)
    assert site.rows(c) * site.row_weights(c) == sum(layer[part][n]["kernel"].size for n in names)
    if site is not Site.FFN_GATE:
        assert site.rows(c) == layer[part][name]["kernel"].shape[0]
