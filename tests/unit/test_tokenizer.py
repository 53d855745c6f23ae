"""Encodes and decodes as the published tokenizers do, and fills in their chat templates."""

import json
import pydoc_data.topics
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import bpe_metadata, byte_vocabulary, scored_metadata, sizes, write_gguf
from tokenizers import decoders, models, pre_tokenizers, processors

from kvjax.models.gguf_file import GGUFFile
from kvjax.models.hub import fetch
from kvjax.models.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[1] / "golden" / "data" / "smollm2"
GPL = Path("/usr/share/common-licenses/GPL-3")
PIECES = ["a", "b", "c", "▁", "ab", "bc", "▁a", "abc", "aa", "aaa", "▁▁", "ca", "▁ab"]


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    return load_tokenizer(fetch("smollm2-135m"))


@pytest.mark.parametrize("name", ["france", "code", "passkey"])
def test_smollm2_prompts(name, smollm2_tokenizer):
    reference = json.loads((DATA / "smollm2.json").read_text())[name]
    ids = reference["prompt_ids"]
    text = reference.get("prompt") or smollm2_tokenizer.decode(ids, skip_special=False)
    assert smollm2_tokenizer.encode(text) == ids
    assert (
        smollm2_tokenizer.decode(reference["greedy32_ids"], skip_special=False) == reference["greedy32_text"]
    )


def test_smollm2_long_text(smollm2_tokenizer):
    with np.load(DATA / "smollm2_gpl3_2048_nll.npz") as file:
        ids = file["ids"].tolist()
    text = smollm2_tokenizer.decode(ids)
    assert "GNU GENERAL PUBLIC LICENSE" in text
    assert smollm2_tokenizer.encode(text) == ids
    if GPL.exists():
        assert smollm2_tokenizer.encode(GPL.read_text())[: len(ids)] == ids


def test_smollm2_special_tokens(smollm2_tokenizer):
    assert (smollm2_tokenizer.bos_id, smollm2_tokenizer.add_bos, smollm2_tokenizer.vocab_size) == (
        1,
        False,
        49152,
    )
    assert smollm2_tokenizer.stop_ids == (0, 2)
    assert smollm2_tokenizer.encode("<|im_start|>a<|im_end|>") == [1, 81, 2]
    assert smollm2_tokenizer.decode([1, 81, 2]) == "a"
    assert smollm2_tokenizer.decode([1, 81, 2], skip_special=False) == "<|im_start|>a<|im_end|>"


@given(text=st.text())
def test_smollm2_gives_every_text_back(text, smollm2_tokenizer):
    """Except for the bytes that its published vocabulary lacks, all of them rare."""
    tokens = smollm2_tokenizer.backend.get_vocab()
    lacking = {b for b, token in enumerate(byte_vocabulary()) if token not in tokens}
    assert lacking < {*range(32), *range(0xC0, 0x100)}
    text = "".join(c for c in text if not lacking.intersection(c.encode()))
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special=False) == text


def test_empty_text_and_bos(smollm2_tokenizer):
    assert smollm2_tokenizer.encode("") == []
    assert smollm2_tokenizer.encode("", bos=True) == [1]
    ids = smollm2_tokenizer.encode("Hello")
    assert smollm2_tokenizer.encode("Hello", bos=True) == [1, *ids]
    assert smollm2_tokenizer.encode("<|im_start|>Hello", bos=True) == [1, *ids]
    assert smollm2_tokenizer.encode("Hello", bos=False) == ids


def test_bad_arguments(smollm2_tokenizer):
    with pytest.raises(ValueError, match=r"without lone surrogates, got 'a.ud800"):
        smollm2_tokenizer.encode("a\ud800")
    for ids in ([-1], [2**40]):
        with pytest.raises(ValueError, match="token ids are from 0 to 49151"):
            smollm2_tokenizer.decode(ids)
    assert smollm2_tokenizer.decode([60_000]) == ""
    with pytest.raises(ValueError, match="needs a model with a first token"):
        Tokenizer(smollm2_tokenizer.backend).encode("a", bos=True)


def test_smollm2_chat(smollm2_tokenizer):
    assert smollm2_tokenizer.chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert smollm2_tokenizer.chat(messages, generate=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    )


def chat(smollm2_tokenizer, template, messages=()):
    tokenizer = Tokenizer(smollm2_tokenizer.backend, template=template, special={"bos_token": "<s>"})
    return tokenizer.chat(list(messages))


def test_templates_have_what_transformers_gives_them(smollm2_tokenizer):
    user = [{"role": "user", "content": "é<"}]
    assert chat(smollm2_tokenizer, "{{ bos_token }}{{ messages | tojson }}", user) == (
        '<s>[{"role": "user", "content": "é<"}]'
    )
    assert chat(smollm2_tokenizer, "{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert chat(smollm2_tokenizer, "{% generation %}x{% endgeneration %}") == "x"
    assert chat(smollm2_tokenizer, "{% for m in messages %}{% break %}{% endfor %}a", user) == "a"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{% for %}", "the chat template must accept"),
        ("{{ messages[0]['content'] + 'x' }}", "the chat template must accept"),
        (None, "chat needs a model with a chat template"),
    ],
)
def test_templates_that_refuse(template, match, smollm2_tokenizer):
    with pytest.raises(ValueError, match=match):
        chat(smollm2_tokenizer, template, [{"role": "user", "content": None}])


@pytest.mark.parametrize("message", ["Hi", {"content": "Hi"}, {"role": 1}])
def test_malformed_messages(message, smollm2_tokenizer):
    with pytest.raises(ValueError, match="a message is a dict with 'role' and 'content'"):
        smollm2_tokenizer.chat([message])


PIECES_OF = {  # what lies between the cuts, by hand from llama.cpp's expressions
    "gpt-2": ["I", "'m", " 1234", " x", "  ", " y", "!!", "\n", "\n", "Z"],
    "smollm": ["I", "'m", " ", "1", "2", "3", "4", " x", "  ", " y", "!!", "\n", "\n", "Z"],
    "qwen2": ["I", "'m", " ", "1", "2", "3", "4", " x", "  ", " y", "!!\n\n", "Z"],
    "llama-bpe": ["I", "'m", " ", "123", "4", " x", "  ", " y", "!!\n\n", "Z"],
    "default": ["I", "'", "m", " ", "123", "4", " x", "  ", " y", "!!", "\n", "\n", "Z"],
}


def tiny(tmp_path, metadata):
    return write_gguf(tmp_path / "x.gguf", metadata=sizes() | metadata)


@pytest.mark.parametrize("pre", PIECES_OF)
def test_pre_tokenizers_cut_where_llama_cpp_cuts(pre, tmp_path):
    tokenizer = load_tokenizer(tiny(tmp_path, bpe_metadata(pre)))
    text = "I'm 1234 x   y!!\n\nZ"
    cuts = [span for _, span in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[a:b] for a, b in cuts] == PIECES_OF[pre]


def test_the_default_cut_takes_some_punctuation_first(tmp_path):
    tokenizer = load_tokenizer(tiny(tmp_path, bpe_metadata("default")))
    assert [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("+`*")] == ["+", "`", "*"]


def test_bpe_merges_added_tokens_and_stops(tmp_path):
    metadata = bpe_metadata(
        extra=("he", "<|im_end|>", "<tool>"), eos_token_id=10, add_bos_token=True, bos_token_id=5
    )
    tokenizer = load_tokenizer(tiny(tmp_path, metadata))
    assert tokenizer.encode("he<tool>", bos=False) == [256, 258]
    assert tokenizer.stop_ids == (10, 257)
    assert tokenizer.encode("he") == [5, 256]
    assert tokenizer.encode("") == []


def test_llama_3_takes_whole_words_before_merging_and_adds_bos(tmp_path):
    metadata = bpe_metadata("llama-bpe", merges=("h e",), extra=("he", "hello"), bos_token_id=0)
    assert load_tokenizer(tiny(tmp_path, metadata)).encode("hello") == [0, 257]


def merge_by_score(text, tokens, scores):
    """Encodes as SentencePiece does: merges the neighbours whose piece scores best, leftmost first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[vocab[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in vocab]
        if not pairs:
            break
        i = min(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    ids = []
    for symbol in symbols:
        ids += [vocab[symbol]] if symbol in vocab else [vocab[f"<0x{b:02X}>"] for b in symbol.encode()]
    return ids


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    path = tiny(tmp_path_factory.mktemp("scored"), scored_metadata(PIECES))
    file = GGUFFile(path)
    return load_tokenizer(path), file.list("tokenizer.ggml.tokens"), file.list("tokenizer.ggml.scores")


@given(text=st.text(st.sampled_from("aabbc  xé🎉"), max_size=30))
def test_scored_pieces_merge_as_in_sentencepiece(text, scored):
    tokenizer, tokens, scores = scored
    ids = tokenizer.encode(text, bos=False)
    assert ids == merge_by_score(text, tokens, scores)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == ([2, *ids] if text else [])


def test_scored_pieces_with_a_space_before_the_text(tmp_path):
    tokenizer = load_tokenizer(tiny(tmp_path, scored_metadata(PIECES, prefix=True, add_bos_token=False)))
    assert tokenizer.encode("a") == [260 + PIECES.index("▁a")]
    assert tokenizer.decode(tokenizer.encode("abc ab")) == "abc ab"


@pytest.mark.parametrize(
    ("metadata", "error", "match"),
    [
        ({}, NotImplementedError, "'gpt2' and 'llama' are rebuilt, got None"),
        (bpe_metadata(model="t5"), NotImplementedError, "got 't5'"),
        (bpe_metadata("qwen"), NotImplementedError, "got 'qwen' in .*; the nearest is 'qwen2'"),
        (bpe_metadata(token_type=[1]), ValueError, "every token has a text and a type, got 258 and 1"),
        (bpe_metadata(merges=("he he",)), ValueError, "tokens and merges make a tokenizer"),
        (bpe_metadata(merges=("hehe",)), ValueError, "tokens and merges make a tokenizer"),
        (bpe_metadata(bos_token_id=1000), ValueError, "are among the 258 tokens, got bos_token=1000"),
        (bpe_metadata(eot_token_id=1000), ValueError, "got a stop token=1000"),
        (scored_metadata(PIECES, scores=[0.0]), ValueError, "every token has a score, got 1 for"),
    ],
)
def test_broken_gguf_tokenizers(metadata, error, match, tmp_path):
    with pytest.raises(error, match=match):
        load_tokenizer(tiny(tmp_path, metadata))


@pytest.fixture
def folder(tmp_path):
    """A folder with a byte-level tokenizer that begins texts with <s>."""
    tokens = {f"<0x{i:02X}>": i for i in range(3)} | {c: 3 + i for i, c in enumerate("abcĠ")}
    backend = tokenizers.Tokenizer(models.BPE(vocab=tokens, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 7)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "{{ eos_token }}1"}
        )
    )
    return tmp_path


def test_folder(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.stop_ids) == (7, True, (8,))
    assert tokenizer.encode("ab c") == [7, 3, 4, 6, 5]
    assert tokenizer.encode("ab", bos=False) == [3, 4]
    assert tokenizer.encode("<s>ab") == [7, 3, 4]
    assert tokenizer.decode([7, 3, 4, 6, 5, 8]) == "ab c"
    assert tokenizer.chat([]) == "</s>1"


def test_folder_stops_and_templates(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    (folder / "chat_template.jinja").write_text("{{ bos_token }}2")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids == (8, 9)
    assert tokenizer.chat([]) == "<s>2"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "3"}]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "add_bos_token": False})
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat([]) == "3"
    assert (tokenizer.bos_id, tokenizer.encode("a")) == (7, [3])


def test_folders_without_tokenizer(tmp_path, folder):
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds an object, got list"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json holds a tokenizer, got"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder) is None
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(NotImplementedError, match=r"only tokenizer\.model"):
        load_tokenizer(folder)


TEXT = "".join(pydoc_data.topics.topics[k] for k in ("if", "strings", "numbers"))
ODD = "  two\n\n\n   three\t\ttabs 12345 café naïve 你好 🎉 <end_of_turn>\u200b\u0301"


@pytest.mark.large
def test_gemma_merges_as_sentencepiece():
    tokenizer = load_tokenizer(fetch("gemma3-270m"))
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.vocab_size) == (2, True, 262144)
    assert tokenizer.stop_ids == (1, 106)
    file = GGUFFile(fetch("gemma3-270m"))
    tokens, scores = file.list("tokenizer.ggml.tokens"), file.list("tokenizer.ggml.scores")
    for line in [line for line in TEXT.split("\n") if line.strip()][:40]:
        text = " ".join(line.split())  # runs of spaces are tokens of their own
        ids = tokenizer.encode(text, bos=False)
        assert ids == merge_by_score(text, tokens, scores)
    for text in (TEXT, ODD):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == "<bos>" + text
    assert tokenizer.encode("a  b\n\nc", bos=False) == [236746, 138, 236763, 108, 236755]


@pytest.mark.large
def test_qwen_round_trip_and_chat():
    tokenizer = load_tokenizer(fetch("qwen2.5-coder-1.5b"))
    assert (tokenizer.add_bos, tokenizer.stop_ids) == (False, (151643, 151645))
    for text in (TEXT, ODD.replace("\u0301", "")):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.encode("Hello 12") == [9707, 220, 16, 17]
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
