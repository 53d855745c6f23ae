"""The kernel benchmark: every claim has its rows, bad options are refused, and cases are checked here."""

import math

import jax
import jax.numpy as jnp
import pytest

from experiments import kernel_peers, kernels, results
from experiments.kernel_claims import CLAIMS, claims
from pallas_kernels import timing
from pallas_kernels.backend import Target, aim
from pallas_kernels.decode_attention.specs import OP, DecodeSpec
from pallas_kernels.registry import ops


def rows(speedup=2.0, fraction=0.5):
    """A row for every timed case and peer, as a run on a GPU would store."""
    for name, op in ops().items():
        for spec in op.specs:
            if "bench" in spec.uses:
                peers = kernel_peers.PEERS.get(name, lambda op, spec: ())(op, spec)
                for peer in [p.name for p in peers] or [""]:
                    yield {
                        "name": name, "spec": spec.name, "peer": peer, "bytes": spec.bytes(),
                        "fraction": fraction, "speedup": speedup,
                    }  # fmt: skip


def test_every_claim_is_about_some_case():
    found = claims(list(rows()))
    assert found.keys() == {name for name, *_ in CLAIMS}
    assert found["decode_attention.copy_fraction_min"] == 0.5
    assert found["decode_attention.int8_time_ratio"] == 0.5
    assert found["chunked_similarity.vs_read_k"] == 2.0


def test_input_sets_are_larger_than_caches_and_fit_into_memory():
    timed = [spec for op in ops().values() for spec in op.specs if {"bench", "tune"} & set(spec.uses)]
    for spec in timed:
        arrays = jax.tree.leaves(jax.eval_shape(spec.arrays, jax.random.key(0)))
        held, n = sum(x.size * x.dtype.itemsize for x in arrays), timing.n_sets(spec)
        assert n == 4 or n * held <= 2**34, spec.name
        assert n == 32 or n * max(held, spec.bytes()) >= 2**29, spec.name


def test_a_claim_is_the_worst_of_its_rows():
    both = [*rows(), *rows(speedup=0.25, fraction=0.1)]
    found = claims(both)
    assert found["select_topk.vs_lax"] == 0.25
    assert found["sparse_matvec.time_ratio_0"] == 4.0
    assert found["chunked_similarity.vs_read_k"] == 10.0


def test_a_peer_is_asked_only_what_it_takes():
    for slots, names in ((6553, ["cudnn"]), (4096, ["cudnn", "jax_op"])):
        spec = DecodeSpec(8, 4, 128, (slots,) * 8, full=True)
        assert [peer.name for peer in kernel_peers.PEERS["decode_attention"](OP, spec)] == names


def test_a_case_is_timed_against_its_peers_and_checked(monkeypatch):
    spec = DecodeSpec(1, 4, 64, (64, 64), "float32", full=True, uses=("bench",))
    monkeypatch.setattr(timing, "_BEYOND_CACHE", 2**16)
    monkeypatch.setattr(timing, "_SPAN_S", 1e-4)
    twice = kernel_peers.Peer("twice", lambda x: [OP.call(**x, **spec.options(), impl="reference")] * 2)
    monkeypatch.setitem(kernel_peers.PEERS, "decode_attention", lambda op, spec: [twice])
    settings = kernels.Settings(samples=3)
    with aim(Target("gpu", "interpreted", "forward")):
        (row,) = kernels.measure(kernels.prepare(OP, spec), 1e9, settings)
    assert row["peer"] == "twice"
    assert row["floor_us"] == pytest.approx(spec.bytes() / 1e3)
    assert row["fraction"] == pytest.approx(row["floor_us"] / row["time_us"])
    assert row["error"] <= spec.limit()


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    spec = DecodeSpec(1, 4, 64, (64, 64), "float32", full=True, uses=("bench",))
    monkeypatch.setattr(timing, "_BEYOND_CACHE", 2**16)
    monkeypatch.setattr(timing, "_SPAN_S", 1e-4)
    monkeypatch.setattr(kernels, "PEERS", {})
    wrong = type(OP)(lambda q, impl, **_: jnp.zeros_like(q) if impl != "reference" else q, OP.specs)
    with aim(Target("gpu", "interpreted", "forward")), pytest.raises(ValueError, match="is wrong: error 1"):
        list(kernels.measure(kernels.prepare(wrong, spec), 1e9, kernels.Settings(samples=3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "timed on a GPU or TPU, got platform 'cpu'"),
        (["--ops", "decode"], r"got ['decode']"),
        (["--cases", "b9"], "got settings.cases='b9', which none has"),
        (["--interpret", "gpu", "--check"], "compiled or interpreted, got --check and"),
        (["--interpret", "cuda"], "interpreted, got settings.interpret='cuda'"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    assert kernels.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_cases_are_checked_by_interpreting(capsys):
    assert kernels.main(["--ops", "spvmm", "--interpret", "gpu"]) == 0
    assert "b1-f2100-m1160-z70-bfloat16" in capsys.readouterr().out


def test_the_interpreter_of_tpus_has_one_case_at_a_time(capsys):
    assert kernels.main(["--ops", "decode_attention", "--interpret", "tpu", "--cases", "int[48]"]) == 0
    assert capsys.readouterr().out.count("-int") == 4


def test_kernels_are_checked_on_the_device_at_hand(capsys, monkeypatch, tmp_path):
    wrong = type(OP)(lambda q, impl, **_: jnp.zeros_like(q) if impl != "reference" else q, OP.specs[:1])
    monkeypatch.setattr(kernels, "ops", lambda: {"decode_attention": wrong, "spvmm": ops()["spvmm"]})
    with aim(Target("gpu", "interpreted", "forward")):
        assert kernels.main(["--check", "--out", str(tmp_path)]) == 1, "a wrong kernel is no success"
    stored = results.load(next(tmp_path.glob("kernel_checks/*.json")))
    assert stored["command"] == "python -m experiments.kernels --check"
    assert {row["name"] for row in stored["rows"]} == {"spvmm"}
    assert all(0 <= row["error"] <= row["limit"] for row in stored["rows"])
    assert "is wrong: error" in capsys.readouterr().err


def test_the_table_shows_every_cell(capsys, monkeypatch, tmp_path):
    row = {"name": "sparse_decode_attention", "spec": "b8-k8-g4-d128-s163840of32772-p16x256-bfloat16-host"}
    row |= {"peer": "uniform heads", "floor_us": 2620.3, "time_us": 3067.1, "speedup": 1.25, "error": 3e-3}
    stored = results.Results(tmp_path / "a.json", {}, (row,))
    monkeypatch.setattr(kernels, "_check", lambda settings: None)
    monkeypatch.setattr(kernels, "_timed", lambda settings: (stored, ["spvmm b1: it is wrong"]))
    assert kernels.main([]) == 1, "a wrong kernel is no success"
    out, error = capsys.readouterr()
    assert all(
        word in out for word in (row["name"], row["spec"], row["peer"], "2620", "3067", "1.25", "a.json")
    )
    assert "error: spvmm b1: it is wrong" in error


def test_a_wrong_case_does_not_hide_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_BEYOND_CACHE", 2**16)
    monkeypatch.setattr(timing, "_SPAN_S", 1e-4)
    monkeypatch.setattr(timing, "copy_rate", lambda: 1e9)
    monkeypatch.setattr(timing, "host_copy_rate", lambda: 1e9)
    monkeypatch.setattr(kernels, "PEERS", {})
    spec = DecodeSpec(1, 4, 64, (64, 64), "float32", full=True, uses=("bench",))
    wrong = type(OP)(lambda q, impl, **_: jnp.zeros_like(q) if impl != "reference" else q, OP.specs)
    right = type(OP)(lambda q, impl, **_: q, OP.specs)
    monkeypatch.setattr(kernels, "_chosen", lambda settings, use: [(wrong, spec), (right, spec)])
    stored, faults = kernels._timed(kernels.Settings(samples=3, out=tmp_path))
    assert len(stored.rows) == 1
    (fault,) = faults
    assert "is wrong: error 1" in fault


def test_the_copy_rate_is_that_of_both_ways(monkeypatch):
    monkeypatch.setattr(timing, "_SPAN_S", 1e-4)
    assert 0 < timing.copy_rate(2**16) < math.inf
