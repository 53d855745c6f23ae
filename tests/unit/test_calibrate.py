"""Codebooks are what their equations say, survive interrupts and refuse what is not theirs."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import codebooks as method_codebooks
from method_cases import tiny

import kvjax
from kvjax import cli, replay, text
from kvjax.calibrate import a2ats, checkpoint, codebooks, kmeans, refine, statistics
from kvjax.calibrate.a2ats import Settings, calibrate
from kvjax.calibrate.codebooks import Codebooks
from kvjax.methods import layers
from kvjax.model import fingerprint
from kvjax.rope import rotate
from pallas_kernels.vq_assign import vq_assign
from tests import tiny_models

MODEL = tiny(2)
WINDOWED = tiny(1, windows=(24, None))
DOCUMENTS = np.random.default_rng(1).integers(0, 97, (4, 80)).astype(np.int32)
SETTINGS = Settings(n_centroids=16, per_centroid=12, refine=20, far=50, window=8)
KEY = jax.random.key(0)


def collect(model=MODEL, documents=DOCUMENTS, n_keys=150, n_queries=20, seed=0):
    return statistics.collect(
        model, documents, n_keys=n_keys, n_queries=n_queries, far=50, window=8, seed=seed
    )


@pytest.fixture(scope="module")
def seen():
    return collect()


@pytest.fixture(scope="module")
def records():
    """Per layer the queries and keys of all documents, in float64."""
    layered = [replay.record(MODEL, [row.tolist()], room=0, chunk=80)[2] for row in DOCUMENTS]
    return [
        tuple(np.concatenate([np.asarray(r[j][i][0]) for r in layered]) for i in range(2)) for j in range(2)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return calibrate(MODEL, DOCUMENTS, folder, SETTINGS), folder


def test_q2_is_that_of_far_queries_in_float64(seen, records):
    for (q, _), q2 in zip(records, seen.q2, strict=True):
        far = np.float64(rotate(jnp.asarray(q), jnp.full(q.shape[:-1], 50), MODEL.config.rope))
        expected = np.einsum("tkgd,tkge->kde", far, far) / (far.shape[0] * far.shape[2])
        np.testing.assert_allclose(q2, expected, rtol=1e-6, atol=1e-6)


def test_the_metric_is_the_root_of_normalised_q2(seen):
    a = np.float64(statistics.metric(seen.q2[0]))
    q2 = seen.q2[0] / np.sqrt(np.mean(seen.q2[0] ** 2, axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(a @ a.swapaxes(1, 2), q2, atol=1e-4)
    assert np.isfinite(statistics.metric(np.zeros((1, 4, 4)))).all()  # a head without queries
    one = np.ones(8)[:, None] @ np.ones((1, 8))
    assert np.isfinite(statistics.metric(one[None])).all()  # of rank one


def test_kept_keys_are_drawn_tokens_in_the_same_places_of_all_heads(seen, records):
    at = statistics._drawn(DOCUMENTS.size, 150, 0)
    assert len(set(at.tolist())) == 150
    for (_, k), keys in zip(records, seen.keys, strict=True):
        np.testing.assert_allclose(keys, k[at].swapaxes(0, 1), rtol=1e-4, atol=1e-5)
    few = collect(n_keys=10**6, n_queries=10**6)
    assert few.keys.shape == (2, 2, DOCUMENTS.size, 16)
    assert few.queries.shape == (2, DOCUMENTS.size, 2, 2, 16)


def test_every_token_is_drawn_equally_often():
    counts = np.zeros(40)
    for seed in range(2000):
        counts[statistics._drawn(40, 10, seed)] += 1
    assert (np.abs(counts - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)).all()


def test_share_is_the_attention_that_exact_selection_catches():
    """Of uniform attention the selected tokens' number; of peaked attention nearly all."""
    layer, length, window = layers(MODEL.config)[0], 200, 20
    zeros = jnp.zeros((1, length, 2, 2, 16)), *(jnp.zeros((1, length, 2, 16)),) * 2
    at = np.linspace(150, 199, 8).astype(int) + 1.0
    caught = (window + 8 + 6) / at  # window, sinks, 3% of 200
    found = statistics.share(replay.Record(*zeros), layer=layer, window=window)
    np.testing.assert_allclose(found, caught.mean(), rtol=1e-5)
    far = rotate(jnp.ones((1, 1, 16)), jnp.full((1, 1), -100), layer.rope)  # meets keys 100 tokens before
    keys = jnp.zeros((1, length, 2, 16)).at[:, 60:64].set(40.0)
    q = jnp.broadcast_to(far, (1, length, 2, 2, 16))
    assert float(statistics.share(replay.Record(q, keys, keys), layer=layer, window=window)) > 0.99


@pytest.mark.parametrize("query_aware", [True, False])
def test_codes_minimise_the_error_that_queries_see(seen, query_aware):
    """Brute force over (k − c) Q2 (k − c)ᵀ in float64; the identity is plain quantisation."""
    q2 = seen.q2[1] / np.sqrt(np.mean(seen.q2[1] ** 2, axis=(1, 2), keepdims=True))
    q2 = q2 + 1e-6 * np.eye(16) if query_aware else np.tile(np.eye(16), (2, 1, 1))
    a = statistics.metric(seen.q2[1]) if query_aware else np.float32(q2)
    keys = seen.keys[1]
    x = jnp.asarray(keys @ a)
    centroids = kmeans.fit(x, KEY, n_centroids=12).centroids
    codes = np.asarray(vq_assign(x[None], centroids))[0]
    c = np.float64(centroids) @ np.linalg.inv(np.float64(a))
    gap = np.float64(keys)[:, :, None] - c[:, None]
    error = np.einsum("kncd,kde,knce->knc", gap, q2, gap, optimize=True)
    chosen = np.take_along_axis(error, codes[..., None].astype(int), 2)[..., 0]
    np.testing.assert_allclose(chosen, error.min(2), rtol=1e-3, atol=1e-4)
    assert (codes == error.argmin(2)).mean() > 0.99


def test_query_aware_codebooks_score_better_than_plain_ones(tmp_path):
    """What the metric is for, on the objective it is from."""
    errors = {}
    for aware in (True, False):
        settings = dataclasses.replace(SETTINGS, query_aware=aware, refine=0)
        books = calibrate(MODEL, DOCUMENTS, tmp_path / str(aware), settings)
        found, total = collect(n_keys=192), 0.0
        for i in range(2):
            x = found.keys[i] @ books.metric[i]
            codes = np.asarray(vq_assign(jnp.asarray(x)[None], jnp.asarray(books.centroids[i])))[0].astype(
                int
            )
            coded = np.take_along_axis(books.centroids[i], codes[..., None], 1)
            back = (x - coded) @ np.linalg.inv(books.metric[i])
            total += np.einsum("knd,kde,kne->", back, found.q2[i], back)
        errors[aware] = total
    assert errors[True] < 0.95 * errors[False]


def fitted(x, n, **options):
    out = kmeans.fit(jnp.asarray(x, jnp.float32), KEY, n_centroids=n, **options)
    losses = np.asarray(out.losses)
    codes = np.asarray(vq_assign(jnp.asarray(x, jnp.float32)[None], out.centroids))[0]
    return np.asarray(out.centroids), losses[np.isfinite(losses[:, 0])], codes


@pytest.mark.parametrize("n", [1, 7, 40])
def test_the_loss_never_rises_and_no_cluster_is_empty(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(3, 400, 8)) * rng.exponential(size=(3, 400, 1))
    centroids, losses, codes = fitted(x, n)
    assert (np.diff(losses, axis=0) <= 1e-6 * losses[:-1]).all()
    assert all(len(np.unique(row)) == n for row in codes)
    gap = ((x[:, :, None] - centroids[:, None]) ** 2).sum(-1).min(2).mean(1)
    assert (gap <= losses[-1] * (1 + 1e-5)).all()
    np.testing.assert_array_equal(fitted(x, n)[0], centroids)  # the same seed, the same codebook


def test_empty_clusters_are_seeded_anew_though_keys_repeat(monkeypatch):
    """All seeds are equal, so all clusters but one start empty; each vector is there ten times."""
    points = np.random.default_rng(0).normal(size=(2, 30, 8))
    x = np.repeat(points, 10, axis=1)
    same = lambda x, key, *, n_centroids: jnp.tile(x[:, :1], (1, n_centroids, 1))  # noqa: E731
    monkeypatch.setattr(kmeans, "seeds", same)
    _, losses, codes = fitted(x, 30, tol=1.1e-4)
    assert all(len(np.unique(row)) == 30 for row in codes)
    assert losses[-1].max() < 1e-10


def test_more_centroids_than_distinct_keys_are_no_harm():
    x = np.repeat(np.random.default_rng(0).normal(size=(1, 5, 8)), 20, axis=1)
    centroids, losses, codes = fitted(x, 9)
    assert np.isfinite(centroids).all()
    assert losses[-1].max() < 1e-10
    assert len(np.unique(codes)) == 5


def test_planted_clusters_are_found():
    rng = np.random.default_rng(3)
    centers = 10 * rng.normal(size=(2, 20, 8))
    x = np.repeat(centers, 30, axis=1) + 0.02 * rng.normal(size=(2, 600, 8))
    centroids, *_ = fitted(x, 20)
    gap = np.sqrt(((centers[:, :, None] - centroids[:, None]) ** 2).sum(-1))
    assert gap.min(2).max() < 0.04


def test_refinement_is_never_worse_on_what_it_does_not_see(seen):
    layer, x = layers(MODEL.config)[1], jnp.asarray(seen.keys[1])
    y = jnp.asarray(seen.queries[1].transpose(1, 2, 0, 3))
    start = kmeans.fit(refine.split(x, 1)[0], KEY, n_centroids=12).centroids
    for rate in (0.05, 50.0):  # a rate that ruins them keeps k-means'
        out = refine.refine(start, x, y, KEY, layer=layer, n_steps=60, rate=rate)
        assert out.held_out.shape == (4, 2)
        held = refine.split(x, 1)[1], refine.split(y, 2)[1]
        kept = np.asarray(refine.score_loss(out.centroids, *held, layer=layer))
        np.testing.assert_allclose(kept, out.held_out.min(0), rtol=1e-4)
        assert (kept <= out.held_out[0] * (1 + 1e-6)).all()


def test_refinement_lowers_the_loss_it_is_of(seen):
    layer, x = layers(MODEL.config)[1], jnp.asarray(seen.keys[1])
    y = jnp.asarray(seen.queries[1].transpose(1, 2, 0, 3))
    start = kmeans.fit(x, KEY, n_centroids=12).centroids
    learnt, _ = refine._steps(
        start, refine.optax.scale_by_adam().init(start), x, y, KEY, jnp.full(2, 0.02), layer=layer
    )
    before, after = (np.asarray(refine.score_loss(c, x, y, layer=layer)) for c in (start, learnt))
    assert (after < 0.97 * before).all()


def test_the_held_out_are_a_tenth_and_never_learnt_from():
    kept, held = refine.split(jnp.arange(41)[None], 1)
    assert held[0].tolist() == [0, 10, 20, 30, 40]
    assert sorted([*kept[0].tolist(), *held[0].tolist()]) == list(range(41))


def test_refinement_without_queries_raises():
    one = jnp.ones((2, 2, 1, 16))
    with pytest.raises(ValueError, match="refinement takes steps and 2 queries or more"):
        refine.refine(one[:, 0], one[:, 0], one, KEY, layer=layers(MODEL.config)[0], n_steps=1)


def test_codebooks_first_cut_inside_a_trace_serve_the_next_one():
    books = method_codebooks(tiny(2))
    cut = jax.jit(lambda x: x + books.layer(1).centroids)
    np.testing.assert_array_equal(cut(0.0)[0], books.centroids[1])
    np.testing.assert_array_equal(books.layer(1).centroids[0], books.centroids[1])  # no tracer is left


def test_codebooks_survive_a_checkpoint(made):
    books, folder = made
    assert books.centroids.shape == (2, 2, 16, 16)
    assert np.isfinite(books.centroids).all()
    read = codebooks.load(folder, MODEL)
    for field in dataclasses.fields(Codebooks):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(books, field.name))
    assert read.layer(1).flat == books.flat[1:]
    np.testing.assert_array_equal(read.layer(1).centroids, books.centroids[1:])
    assert (read.far, read.window, read.model) == (50, 8, fingerprint(MODEL))
    assert not (folder / "statistics").exists()


def test_what_was_measured_lies_beside_the_codebooks(made, seen, tmp_path):
    measured = json.loads((made[1] / "measured.json").read_text())
    assert list(measured) == ["0", "1"]
    for i, layer in enumerate(measured.values()):
        assert layer.keys() == {"share", "losses", "held_out"}
        assert layer["share"] == pytest.approx(seen.share[i])
        losses = np.array(layer["losses"])  # iterations, heads; those that were not run are left out
        assert losses.shape == (len(losses), 2)
        assert (losses[-1] < losses[0]).all()
        assert np.shape(layer["held_out"]) == (2, 2)  # looks, heads
    calibrate(MODEL, DOCUMENTS, tmp_path, dataclasses.replace(SETTINGS, refine=0))
    assert "held_out" not in json.loads((tmp_path / "measured.json").read_text())["0"]


class Killed(BaseException):
    """What no handler takes for an error."""


@pytest.mark.parametrize("at", ["collect", "layer 0", "layer 1", "save"])
def test_an_interrupted_run_goes_on_to_the_same_end(made, tmp_path, monkeypatch, at):
    where = {"collect": statistics, "save": codebooks}.get(at, a2ats)
    name = {"collect": "collect", "save": "save"}.get(at, "_layer")
    true = getattr(where, name)

    def kill(*args, **options):
        if name != "_layer":
            raise Killed
        if args[1] == int(at[-1]):
            args[3]()  # the statistics are there by then
            raise Killed
        return true(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, kill)
        with pytest.raises(Killed):
            calibrate(MODEL, DOCUMENTS, tmp_path, SETTINGS)
        with pytest.raises(ValueError, match=r"a calibration is a whole checkpoint, .* calibrate anew"):
            codebooks.load(tmp_path, MODEL)
    if at != "collect":  # what is stored is not read from the text again
        monkeypatch.setattr(statistics, "collect", kill if name == "collect" else None)
    books = calibrate(MODEL, DOCUMENTS, tmp_path, SETTINGS)
    np.testing.assert_array_equal(books.centroids, made[0].centroids)
    np.testing.assert_array_equal(books.metric, made[0].metric)
    assert books.flat == made[0].flat


def test_keys_of_a_bfloat16_model_are_kept_and_stored_as_they_are(tmp_path, monkeypatch):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.params)
    model = dataclasses.replace(MODEL, params=half, dtype=jnp.dtype("bfloat16"))
    books = calibrate(model, DOCUMENTS, tmp_path / "whole", SETTINGS)
    assert books.centroids.dtype == np.float32
    with monkeypatch.context() as patch:
        patch.setattr(kmeans, "fit", None)
        with pytest.raises(TypeError):
            calibrate(model, DOCUMENTS, tmp_path / "cut", SETTINGS)
    assert checkpoint.read(tmp_path / "cut" / "statistics")[0]["keys"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        calibrate(model, DOCUMENTS, tmp_path / "cut", SETTINGS).centroids, books.centroids
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": dataclasses.replace(SETTINGS, seed=1)}, "settings"),
        ({"model": tiny(2, windows=(None, None), n_kv_heads=1)}, "model"),
        ({"documents": DOCUMENTS[::-1].copy()}, "text"),
    ],
)
def test_a_folder_of_another_calibration_is_refused(made, changes, named):
    call = {"model": MODEL, "documents": DOCUMENTS, "settings": SETTINGS, "folder": made[1]} | changes
    with pytest.raises(ValueError, match=f"a folder holds one calibration, got another {named} in .*delete"):
        calibrate(**call)


def test_codebooks_of_another_model_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"codebooks belong to one model, got those of another .* calibrate"):
        codebooks.load(made[1], tiny(4))
    fewer = {name: getattr(made[0], name)[:, :1] for name in ("centroids", "metric")}
    codebooks.save(dataclasses.replace(made[0], **fewer), tmp_path)
    with pytest.raises(ValueError, match=r"which are \(2, 1, 16, 16\) for \(2, 2, 16, 16\)"):
        codebooks.load(tmp_path, MODEL)
    with pytest.raises(FileNotFoundError, match="codebooks are a folder of `kvjax calibrate a2ats`"):
        codebooks.load(tmp_path / "none", MODEL)


def test_any_damage_of_a_checkpoint_is_told(made, tmp_path):
    """Every file in turn: cut in half, or gone."""
    files = [p.relative_to(made[1]) for p in (made[1] / "codebooks").rglob("*") if p.is_file()]
    told = 0
    for i, (file, damage) in enumerate((f, d) for f in files for d in ("cut", "gone", "other")):
        copy = tmp_path / str(i)
        shutil.copytree(made[1] / "codebooks", copy / "codebooks")
        raw = (copy / file).read_bytes()
        flipped = raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 255]) + raw[len(raw) // 2 + 1 :]
        (copy / file).write_bytes({"cut": raw[: len(raw) // 2], "other": flipped}.get(damage, b""))
        if damage == "gone":
            (copy / file).unlink()
        try:
            read = codebooks.load(copy, MODEL)
        except ValueError as error:
            assert "calibrate anew" in str(error)  # noqa: PT017
            told += 1
        else:  # files that hold nothing of it, such as Orbax's own metadata
            np.testing.assert_array_equal(read.centroids, made[0].centroids)
            np.testing.assert_array_equal(read.metric, made[0].metric)
    assert told >= 10


def test_a_checkpoint_of_something_else_is_refused(made, tmp_path):
    checkpoint.write(tmp_path / "codebooks", {"x": np.ones(3)}, {})
    with pytest.raises(ValueError, match=r"holds no codebooks .*: calibrate anew"):
        codebooks.load(tmp_path, MODEL)
    arrays, about = checkpoint.read(made[1] / "codebooks")
    checkpoint.write(tmp_path / "codebooks", arrays, about | {"flat": [True]})
    with pytest.raises(ValueError, match=r"holds no codebooks .*shapes disagree.*: calibrate anew"):
        codebooks.load(tmp_path, MODEL)


def test_a_damaged_part_is_told(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "x")
    for file in (tmp_path / "x" / "layer_001" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"layer_001.*: delete it and calibrate anew"):
        calibrate(MODEL, DOCUMENTS, tmp_path / "x", SETTINGS)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (MODEL, {"n_centroids": 33}, "each centroid needs 10 keys, got 320 of 320 tokens for n_centroids=33"),
        (MODEL, {"per_centroid": 9}, "each centroid needs 10 keys, got 144 of 320 tokens"),
        (MODEL, {"n_centroids": 0}, "there are 1 to 32,768 centroids, got n_centroids=0"),
        (MODEL, {"n_centroids": 2**15 + 1}, "there are 1 to 32,768 centroids"),
        (tiny(1, windows=(24, 24)), {}, "layers with a window have no far keys"),
    ],
)
def test_what_cannot_be_calibrated_raises(tmp_path, model, changes, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, DOCUMENTS, tmp_path, dataclasses.replace(SETTINGS, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("documents", [DOCUMENTS + 90, DOCUMENTS - 9, np.zeros((1, 520), np.int32)])
def test_documents_that_the_model_cannot_read_raise(tmp_path, documents):
    with pytest.raises(ValueError, match="documents fit the context of 512 and the vocabulary of 97, got"):
        calibrate(MODEL, documents, tmp_path, SETTINGS)


def test_layers_with_a_window_or_flat_attention_are_attended_densely(tmp_path):
    plain = dataclasses.replace(SETTINGS, refine=0, query_aware=False)
    books = calibrate(WINDOWED, DOCUMENTS, tmp_path / "a", plain)
    assert books.flat[0]
    assert not books.centroids[0].any()
    assert books.centroids[1].any()
    np.testing.assert_array_equal(books.metric, np.tile(np.eye(16, dtype=np.float32), (2, 2, 1, 1)))
    for threshold, expected in ((1.01, True), (0.0, False)):
        settings = dataclasses.replace(plain, flat_below=threshold)
        books = calibrate(WINDOWED, DOCUMENTS, tmp_path / str(expected), settings)
        assert books.flat == (True, expected)


def test_uuid_text_is_seeded_and_of_uuids():
    tokenizer = tiny_models.byte_tokenizer()
    ids = text.uuids(tokenizer, 3, 111, seed=4)
    assert ids.shape == (3, 111)
    lines = tokenizer.decode(ids.ravel().tolist()).split("\n")
    assert len(set(lines)) == len(lines)
    assert all(len(line) == 36 and line[14] == "4" for line in lines[:-1])
    np.testing.assert_array_equal(text.uuids(tokenizer, 3, 111, seed=4), ids)
    assert (text.uuids(tokenizer, 3, 111, seed=5) != ids).any()
    assert text.uuids(tokenizer, 0, 111, seed=5).shape == (0, 111)


def test_the_command_line_calibrates(monkeypatch, capsys, tmp_path):
    model = tiny_models.tiny(tiny_models.byte_tokenizer())
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    sizes = ["--tokens", "512", "--uuid-tokens", "128", "--context", "128", "--centroids", "8"]
    command = ["calibrate", "a2ats", "--out", str(tmp_path), *sizes]
    assert cli.main([*command, "--refine", "1"]) == 0
    assert "8 centroids a head; layers attended densely: " in capsys.readouterr().out
    assert codebooks.load(tmp_path, model).centroids.shape == (2, 2, 8, 8)
    assert cli.main([*command, "--tokens", "500"]) == 2
    assert "texts are whole documents" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "got another settings" in capsys.readouterr().err
    assert cli.main([*command[:4], *sizes[:6], "--centroids", "1000"]) == 2
    assert "each centroid needs 10 keys, got 640" in capsys.readouterr().err
