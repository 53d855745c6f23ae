"""Rebuilds the tokenizer of a GGUF file, token for token.

**Source**: llama.cpp names the way a text is cut before byte-pair merging ("pre") and keeps
its regular expressions in code; those here are the same, in the form of the tokenizers that
the models were published with. Gemma's and Llama 2's kind ("llama") merges the pair whose
piece has the best score.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kvjax.models.families import nearest
from kvjax.models.gguf_file import GGUFFile

__all__ = ["PRE_TOKENIZERS", "bpe_from_gguf", "special_ids", "stop_ids"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# pre -> the expressions that cut a text one after the other; BPE works within the pieces.
PRE_TOKENIZERS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",),
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# Texts of tokens that end an answer, whatever the file calls its end of sequence.
_STOPS = {
    *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
    *("<end_of_turn>", "<EOT>", "<|endofturn|>"),
}
_KEY = "tokenizer.ggml."


def bpe_from_gguf(file: GGUFFile) -> tuple[Tokenizer, bool, list[str]]:
    """Returns the tokenizer, whether texts begin with BOS, and the tokens' texts.

    Raises:
        ValueError: lists that contradict each other.
        NotImplementedError: a kind of tokenizer that is not rebuilt.
    """
    kind = file.metadata.get(_KEY + "model")
    if kind not in ("gpt2", "llama"):
        raise NotImplementedError(
            f"GGUF tokenizers 'gpt2' and 'llama' are rebuilt, got {kind!r} in {str(file.path)!r}; load the "
            "Hugging Face folder"
        )
    tokens, types = file.list(_KEY + "tokens"), file.list(_KEY + "token_type")
    if len(tokens) != len(types) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(
            f"every token has a text and a type, got {len(tokens)} and {len(types)} in {str(file.path)!r}; "
            "download it again"
        )
    try:
        tokenizer = _byte_level(file, tokens) if kind == "gpt2" else _scored(file, tokens, types)
        tokenizer.add_special_tokens(_added(tokens, types, (_CONTROL, _UNKNOWN), special=True))
        tokenizer.add_tokens(_added(tokens, types, (_USER_DEFINED,), special=False))
    except (ValueError, NotImplementedError):
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokens and merges make a tokenizer, got {error} in {str(file.path)!r}; download it again"
        ) from error
    by_default = kind == "llama" or file.metadata.get(_KEY + "pre") == "llama-bpe"
    return tokenizer, bool(file.metadata.get(_KEY + "add_bos_token", by_default)), tokens


def _added(tokens: list[str], types: list[int], wanted: tuple[int, ...], special: bool) -> list[AddedToken]:
    """Returns the tokens that a text may spell out whole."""
    chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in wanted and token]
    return [AddedToken(token, special=special, normalized=False) for token in chosen]


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with the pre-tokenizer that the file names."""
    pre = file.metadata.get(_KEY + "pre", "default")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise NotImplementedError(
            f"GGUF pre-tokenizers are {', '.join(PRE_TOKENIZERS)}, got {pre!r} in {str(file.path)!r}; the "
            "nearest "
            f"is {nearest(pre, PRE_TOKENIZERS)!r}: load the Hugging Face folder"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.list(_KEY + "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # published with it; llama.cpp leaves it out
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _scored(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Returns a tokenizer that merges by the scores of pieces, with bytes for unknown characters."""
    scores = file.list(_KEY + "scores")
    if len(scores) != len(tokens):
        raise ValueError(
            f"every token has a score, got {len(scores)} for {len(tokens)} in {str(file.path)!r}; download "
            "it again"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    merges = _merges_by_score(tokens, scores, types, vocab)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=(unknown or [None])[0]
        )
    )
    prefix = bool(file.metadata.get(_KEY + "add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    return tokenizer


def _merges_by_score(
    tokens: list[str], scores: list[float], types: list[int], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Returns every pair of pieces that makes a piece, best score of the whole first."""
    skipped = (_UNKNOWN, _CONTROL, _BYTE)
    whole = [i for i, kind in enumerate(types) if kind not in skipped and len(tokens[i]) > 1]
    whole.sort(key=lambda i: -scores[i])  # stable: equal scores stay in the vocabulary's order
    merges = []
    for i in whole:
        token = tokens[i]
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    return merges


def special_ids(file: GGUFFile, n_tokens: int) -> dict[str, int]:
    """Returns the ids of the named special tokens that the file has.

    Raises:
        ValueError: an id beyond the tokens.
    """
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.metadata.get(f"{_KEY}{key}_token_id") for name, key in keys.items()}
    return {name: _checked(file, name, i, n_tokens) for name, i in ids.items() if i is not None}


def stop_ids(file: GGUFFile, tokens: list[str]) -> tuple[int, ...]:
    """Returns the ids that end an answer: those the file names, and known ends among its tokens."""
    named = [file.metadata.get(f"{_KEY}{key}_token_id") for key in ("eos", "eot", "eom")]
    types = file.list(_KEY + "token_type")
    known = [i for i, token in enumerate(tokens) if token in _STOPS and types[i] in (_CONTROL, _USER_DEFINED)]
    stops = {_checked(file, "a stop token", i, len(tokens)) for i in named if i is not None}
    return tuple(sorted(stops.union(known)))


def _checked(file: GGUFFile, name: str, i, n_tokens: int) -> int:
    if type(i) is not int or not 0 <= i < n_tokens:
        raise ValueError(
            f"special tokens are among the {n_tokens} tokens, got {name}={i!r} in {str(file.path)!r}; "
            "download it again"
        )
    return i
