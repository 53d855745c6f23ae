"""Chunks that are fitted to layers: sizes that are chosen, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest

import kvjax
from kvjax import chunk_tree, replay
from kvjax.calibrate import chunks
from kvjax.methods import layers
from kvjax.methods.leoam import LeoAM
from tests.tiny_models import tiny

MODEL = tiny(windows=(None, 24, None, None))
DOCUMENTS = np.random.default_rng(0).integers(0, 256, (2, 128))
METHOD = LeoAM(0.2, window=4, n_sinks=2, leaf=8, root=16, known_by="box", dense_layers=1)


@pytest.fixture(scope="module")
def fitted() -> LeoAM:
    return chunks.fit(MODEL, METHOD, DOCUMENTS, n_queries=4, leaves=(4, 8, 16), roots=(8, 16, 32))


def figures(method: LeoAM, j: int) -> np.ndarray:
    found = []
    for ids in DOCUMENTS:
        record = replay.record(MODEL, [ids.tolist()], room=0)[2][j]
        found.append(chunks._tried(*chunks._asked(record, layers(MODEL.config)[j], 128, 4), method=method))
    return np.mean(found, axis=0)


def test_layers_that_choose_get_sizes_and_others_keep_theirs(fitted):
    assert fitted.leaf[:2] == (8, 8)
    assert fitted.root[:2] == (16, 16)
    assert set(fitted.leaf[2:]) <= {4, 8, 16}
    assert dataclasses.replace(fitted, leaf=8, root=16, known_by="box") == METHOD
    assert fitted.known_by[:2] == ("box", "box")
    logits, state = kvjax.prefill(MODEL, DOCUMENTS, fitted, room=1)
    assert np.isfinite(kvjax.decode_step(MODEL, logits.argmax(-1), state, fitted)[0]).all()


def test_a_root_has_the_fewest_evaluations_and_a_leaf_the_most_attention(fitted):
    for j in (2, 3):
        own = METHOD.for_layer(j, 4)
        chosen = dataclasses.replace(own, leaf=fitted.leaf[j], known_by=fitted.known_by[j])
        made = {
            root: figures(dataclasses.replace(chosen, root=root), j)[1]
            for root in (None, 8, 16, 32)
            if root is None or (root % chosen.leaf == 0 and root > chosen.leaf)
        }
        assert made[fitted.root[j]] == min(made.values())
        caught = {}
        for leaf, known_by in itertools.product((4, 8, 16), chunk_tree.KINDS):
            abstracts = (
                1 / leaf / (1 + (known_by != "box"))
            )  # as many bytes: what they take more, tokens take less
            topk = round(128 * (0.2 + 1 / 8 - abstracts))
            one = dataclasses.replace(own, leaf=leaf, known_by=known_by, root=None, topk=topk)
            caught[leaf, known_by] = figures(one, j)[0]
        assert caught[chosen.leaf, chosen.known_by] == max(caught.values())


def test_what_is_caught_is_all_where_all_is_read():
    own = dataclasses.replace(METHOD, topk=1.0, dense_layers=0).for_layer(2, 4)
    assert abs(figures(own, 2)[0] - 1) < 1e-5


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"topk": None}, {}, "sizes are fitted to what is chosen, got topk=None"),
        (
            {"root": None, "known_by": "middle", "abstract_bits": 8},
            {},
            "abstracts as they are, got .*=8: give None",
        ),
        ({}, {"n_queries": 33}, "queries are tokens of the last quarter of documents"),
        ({"pairs": 4}, {"leaves": (6,)}, "got none such for method.pairs=4: give other leaves"),
    ],
)
def test_what_cannot_be_fitted_is_refused(changes, options, message):
    with pytest.raises(ValueError, match=message):
        chunks.fit(MODEL, dataclasses.replace(METHOD, **changes), DOCUMENTS, **options)
