import dataclasses
import io

import pytest

import kvjax
from kvjax import bandwidths, budgets, cli, cli_calibrate, cli_doctor, host_memory, reading, spec
from kvjax.model import fingerprint
from pallas_kernels.backend import Target, aim
from tests.tiny_models import byte_tokenizer, tiny


@pytest.fixture
def loaded(monkeypatch):
    model = tiny(byte_tokenizer())
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: model)
    return model


@pytest.mark.parametrize("method", ["full", "snapkv:window=4+kivi4"])
def test_generate_writes_what_the_library_returns(loaded, capsys, method):
    budget = [] if method == "full" else ["--budget", "8"]
    code = cli.main(["generate", "Hello, world", "--method", method, *budget, "--max-new-tokens", "40"])
    made = spec.parse(method, budget=8)
    assert (
        capsys.readouterr().out
        == kvjax.generate(loaded, "Hello, world", made, max_new_tokens=40)[0].text + "\n"
    )
    assert code == 0


def test_generate_reads_the_standard_input_and_chats(loaded, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi"))
    assert cli.main(["generate", "-", "--chat", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == kvjax.generate(loaded, "<Hi>", max_new_tokens=5)[0].text + "\n"


@pytest.mark.parametrize(
    "method", [["full"], ["snapkv:window=4", "--budget", "40"], ["leoam:leaf=4,chunk=8,disk={}"]]
)
def test_what_was_read_comes_before_a_prompt(loaded, capsys, tmp_path, method):
    text, folder = "Once upon a time there was a model. " * 3, tmp_path / "book"
    (tmp_path / "text").write_text(text)
    served = ["--method", method[0].format(folder), *method[1:]]
    read = ["read", str(tmp_path / "text"), "--out", str(folder), "--room", "60", *served]
    assert cli.main(read) == 0
    assert "108 tokens, room for 60 more" in capsys.readouterr().out
    made = spec.parse(served[1].replace("book", "other"), **({"budget": 40} if len(method) > 1 else {}))
    for question in ("And then?", "Why?"):  # each begins after the text, whatever was asked before
        ask = ["generate", question, "--context", str(folder), "--max-new-tokens", "20", *served]
        assert cli.main(ask) == 0
        ids = kvjax.pad([loaded.tokenizer.encode(text)])
        state = kvjax.prefill(loaded, ids, made, room=60)[1]
        answer = kvjax.generate(loaded, question, made, max_new_tokens=20, state=state)[0]
        assert capsys.readouterr().out == answer.text + "\n"
    if len(method) == 1:  # what evicts has room
        more = ["--max-new-tokens", "90"]
        assert cli.main(["generate", "Hi", "--context", str(folder), *served, *more]) == 2
        assert "room for the prompt, got 108 + 92 tokens in 188 slots" in capsys.readouterr().err
    assert cli.main(["generate", "Hi", "--context", str(tmp_path / "none"), *served]) == 2
    assert "got none in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--room", "250"], "fit the context of 256 tokens, got 36 and room=250"),
        (["--room", "-1"], "fit the context of 256 tokens, got 36 and room=-1"),
        (["--method", "leoam:leaf=4,chunk=8,disk=elsewhere"], "in its own folder, got method.tier='disk'"),
        (["--method", "leoam:leaf=4,tier=host"], "what is read lies on the device or in its own folder"),
    ],
)
def test_what_cannot_be_saved_is_told_before_it_is_read(loaded, capsys, tmp_path, monkeypatch, more, message):
    (tmp_path / "text").write_text("Once upon a time there was a model. ")
    monkeypatch.setattr(reading, "_read", lambda *args, **kwargs: pytest.fail("the text was read"))
    assert cli.main(["read", str(tmp_path / "text"), "--out", str(tmp_path / "book"), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_question_has_no_first_token_of_its_own(loaded):
    tokenizer = dataclasses.replace(loaded.tokenizer, bos_id=loaded.tokenizer.encode("<")[0])
    model = dataclasses.replace(loaded, tokenizer=tokenizer)
    answers = []
    for question in ("<And?", "And?"):
        state = kvjax.prefill(model, kvjax.pad([[5, 6]]), room=30)[1]
        answers.append(kvjax.generate(model, question, max_new_tokens=4, state=state)[0].ids)
    assert answers[0] == answers[1]


def test_a_state_has_a_prompt_for_each_row(loaded):
    state = kvjax.prefill(loaded, kvjax.pad([[5, 6]]), room=30)[1]
    with pytest.raises(ValueError, match="each row of a state has a prompt, got 2 for 1 rows"):
        kvjax.generate(loaded, ["Hi", "Ho"], max_new_tokens=2, state=state)


def test_pieces_never_cut_a_character(loaded):
    ids = loaded.tokenizer.encode("naïve 🦙 done")
    pieces = list(cli._pieces(loaded, ids))
    assert "".join(pieces) == "naïve 🦙 done"
    assert "�" not in "".join(pieces)
    half = list(cli._pieces(loaded, ids[:-6]))
    assert "".join(half).startswith("naïve ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Hi", "--method", "snapvk"], "did you mean 'snapkv'?"),
        (["Hi", "--method", "snapkv"], "snapkv needs budget"),
        (["Hi", "--budget", "4"], "full takes no further budget, got self.budget=4"),
        (["Hi", "--method", "knorm", "--budget", "0"], "a budget is at least 1 token"),
        (
            ["Hi", "--method", "knorm", "--budget", "1000", "--max-new-tokens", "9"],
            "a budget is at most the context of 256 tokens",
        ),
        (["", "--max-new-tokens", "4"], "a prompt has at least one token"),
        (["Hi", "--max-new-tokens", "0"], "at least one token is generated"),
        (["Hi", "--top-p", "3"], "top_p is in (0, 1]"),
    ],
)
def test_a_user_error_is_one_line_and_no_traceback(loaded, capsys, arguments, message):
    assert cli.main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""


def test_an_unknown_model_and_option_name_the_nearest(capsys):
    assert cli.main(["generate", "Hi", "--model", "smollm3-135m"]) == 2
    assert "'smollm2-135m'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "Hi", "--metod", "full"])
    assert "--method" in "".join(capsys.readouterr())


def test_calibrated_budgets_serve_generation(loaded, capsys, tmp_path, monkeypatch):
    path, long = tmp_path / "shares.json", "Hello, world. " * 14
    sizes = ["--docs", "2", "--context", "240", "--keep", "0.7", "--out", str(path)]
    assert cli.main(["calibrate", "budgets", *sizes]) == 0
    assert "1 of 4 heads need" in capsys.readouterr().out
    monkeypatch.setattr(cli_calibrate.budget_losses, "N_REST", 16)
    assert cli.main(["calibrate", "budgets", "--refine", "1", *sizes]) == 0
    losses = budgets.load(path, loaded).losses
    assert "before and after each round: {} {}".format(*losses) in capsys.readouterr().out
    chelsea = ["generate", long, "--method", "chelsea:slack=8", "--max-new-tokens", "8"]
    assert cli.main([*chelsea, "--budget", "192", "--shares", str(path)]) == 0
    table = budgets.load(path, loaded).table(192, 96)  # 4 sinks, 60 recent tokens, 32 to merge in
    made = kvjax.generate(loaded, long, spec.parse("chelsea:slack=8", budget=table), max_new_tokens=8)
    assert capsys.readouterr().out == made[0].text + "\n"
    assert cli.main([*chelsea, "--shares", str(path)]) == 2
    assert "give --budget too" in capsys.readouterr().err
    assert cli.main(["calibrate", "budgets", "--keep", "1.5", *sizes[:4]]) == 2
    assert "a share is between 0 and 1" in capsys.readouterr().err


def test_a_model_without_tokenizer_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(kvjax, "load", lambda name, dtype=None: tiny())
    assert cli.main(["generate", "Hi"]) == 2
    assert "text needs a tokenizer" in capsys.readouterr().err


def test_ctrl_c_ends_quietly(loaded, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kvjax, "stream", interrupted)
    assert cli.main(["generate", "Hi"]) == 130


def test_lists_name_all_methods_and_models(capsys):
    assert cli.main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + listed for name in kvjax.METHODS)
    assert "snapkv:budget=...,window=32" in listed
    assert cli.main(["models"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.MODELS)


def test_doctor_tells_the_machine_and_its_rates(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidths.timing, "_SPAN_S", 0.001)
    assert cli.main(["doctor", "--disk", str(tmp_path), "--bytes", "300000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line for line in lines}
    assert list(rows) == [
        *("JAX", "backend", "device", "memory", "kernels", "device copy", "to device", "from device"),
        *("disk write", "disk read", "page cache"),
    ]
    assert all("GB/s" in rows[name] for name in rows if name.split()[0] in ("to", "from", "disk"))
    assert "passed by" in rows["page cache"]
    assert not list(tmp_path.iterdir())
    assert cli.main(["doctor", "--bytes", "300000"]) == 0
    assert "name a folder with --disk" in capsys.readouterr().out
    assert cli.main(["doctor", "--disk", str(tmp_path / "none"), "--bytes", "300000"]) == 2
    assert "take another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("at", "back_end", "ops"),
    [
        (Target("cpu", "some"), "reference (XLA)", "all"),
        (Target("gpu", "H100", capability=(9, 0)), "gpu (Pallas Triton)", ""),
        (Target("gpu", "T4", capability=(7, 5)), "reference (XLA)", "all"),
        (Target("tpu", "v5e"), "tpu (Pallas Mosaic)", "write_codes by the reference"),
    ],
)
def test_doctor_tells_which_kernels_run(at, back_end, ops):
    with aim(at):
        found, which = cli_doctor._kernels()
    assert found == back_end
    assert ops in which


def test_shares_and_a_calibration_go_with_a_budget_and_a_chain(loaded, capsys, tmp_path):
    shares, books, long = tmp_path / "shares.json", tmp_path / "books", "Hello, world. " * 14
    budgets.save(budgets.Shares(((0.05, 1.0), (1.0, 1.95)), fingerprint(loaded), 0.75, 240), shares)
    made = ["generate", long, "--max-new-tokens", "4", "--budget", "192", "--shares", str(shares)]
    for method in ("chelsea:slack=8+kivi8", "snapkv:window=40"):
        assert cli.main([*made, "--method", method]) == 0, capsys.readouterr().err
    sizes = ["--tokens", "2560", "--uuid-tokens", "0", "--context", "256", "--centroids", "16"]
    assert cli.main(["calibrate", "a2ats", "--out", str(books), *sizes]) == 0
    found = ["generate", long, "--max-new-tokens", "4", "--calibration", str(books)]
    assert cli.main([*found, "--method", "snapkv:window=4+a2ats:topk=0.5", "--budget", "48"]) == 0
    capsys.readouterr()
    for arguments, message in (
        ([*found, "--method", "a2ats:topk=0.5", "--budget", "5"], "takes no further budget"),
        (["generate", "Hi", "--method", "a2ats:topk=0.5"], "give --calibration FOLDER"),
        (["calibrate", "chess", "--out", str(tmp_path / "x"), "--context", "0"], "whole documents"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_too_little_memory_is_told_in_a_line(loaded, capsys, monkeypatch):
    monkeypatch.setattr(host_memory, "_free", lambda here: 1000)
    assert cli.main(["generate", "Hi", "--max-new-tokens", "4", "--method", "leoam:leaf=4,tier=host"]) == 2
    assert capsys.readouterr().err.startswith("error: K and V fit into host memory")
