"""Turns text into token ids and back, and messages into a prompt, as the model's files say."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvjax.models.gguf_file import GGUFFile
from kvjax.models.gguf_tokenizer import bpe_from_gguf, special_ids, stop_ids
from kvjax.models.safetensors_file import read_json

__all__ = ["Tokenizer", "load_tokenizer"]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with what its model needs: the first token, the stop tokens, a chat template.

    bos_id: the token a text begins with, if the model has one; add_bos: whether it does by
    default. special: texts that the template may name, such as "bos_token".
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None = None
    add_bos: bool = False
    stop_ids: tuple[int, ...] = ()
    template: str | None = field(default=None, repr=False)
    special: dict[str, str] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Returns the token ids of a text; of an empty one, none.

        Args:
            text: special tokens written out in it become their ids; bytes that the vocabulary lacks
                (some control characters in SmolLM2's) are left out, as published.
            bos: whether the ids begin with bos_id, never twice; None asks the model's files.

        Raises:
            ValueError: bos of a model that has none, or a text that is not Unicode.
        """
        if bos and self.bos_id is None:
            raise ValueError(f"bos=True needs a model with a first token, got {self.bos_id=}; leave bos out")
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # what the library says of both
            raise ValueError(
                f"a text is a str without lone surrogates, got {ascii(text)[:60]}; replace them"
            ) from None
        wanted = bos or (bos is None and self.add_bos and bool(ids))
        return [self.bos_id, *ids] if wanted and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Returns the text of token ids; ids of the embedding without a token give nothing.

        Raises:
            ValueError: an id below 0 or beyond 32 bits.
        """
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < 2**32:
            raise ValueError(f"token ids are from 0 to {self.vocab_size - 1}, got {min(ids)} to {max(ids)}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def chat(self, messages: Sequence, generate: bool = True) -> str:
        """Returns the prompt of a conversation by the model's chat template.

        Args:
            messages: dicts with "role" and "content", oldest first.
            generate: end where the assistant's answer begins.

        Raises:
            ValueError: no template, a malformed message, or one that the template refuses.

        Example:
            >>> import kvjax
            >>> tokenizer = kvjax.load("smollm2-135m").tokenizer
            >>> tokenizer.chat([{"role": "user", "content": "Hi"}])[-22:]
            '<|im_start|>assistant\\n'
        """
        if self.template is None:
            raise ValueError(
                "chat needs a model with a chat template, got one without; encode the plain text, or choose "
                "an "
                "instruction-tuned model"
            )
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"a message is a dict with 'role' and 'content', got {message=}")
        try:
            template = _environment().from_string(self.template)
            return template.render(messages=list(messages), add_generation_prompt=generate, **self.special)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"the chat template must accept the messages, got from it: {error}; change roles or order"
            ) from error


class _Generation(Extension):
    """Accepts the {% generation %} mark that training puts around answers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        """Returns what stands between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Returns the environment that transformers renders chat templates in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """Returns the tokenizer of a Hugging Face folder or a GGUF file; None if a folder has none.

    Raises:
        ValueError: a damaged file.
        NotImplementedError: a kind of tokenizer that is not rebuilt.
    """
    path = Path(path)
    return _from_folder(path) if path.is_dir() else _from_gguf(GGUFFile(path))


def _from_gguf(file: GGUFFile) -> Tokenizer:
    """Returns the tokenizer that a GGUF file describes."""
    backend, add_bos, tokens = bpe_from_gguf(file)
    ids = special_ids(file, len(tokens))
    template = file.metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_id=ids.get("bos_token"),
        add_bos=add_bos and "bos_token" in ids,
        stop_ids=stop_ids(file, tokens),
        template=template if isinstance(template, str) else None,
        special={name: tokens[i] for name, i in ids.items()},
    )


def _from_folder(path: Path) -> Tokenizer | None:
    """Returns the tokenizer of a Hugging Face folder, if it has one."""
    file = path / "tokenizer.json"
    if not file.is_file():
        if (path / "tokenizer.model").is_file():
            raise NotImplementedError(
                f"tokenizers are read from tokenizer.json, got only tokenizer.model in {str(path)!r}; "
                "convert it "
                "with transformers' save_pretrained, or take a GGUF of the model"
            )
        return None
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer.json holds a tokenizer, got {error} in {str(file)!r}; download it again"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    settings, config, generation = (
        _settings(path / name) for name in ("tokenizer_config.json", "config.json", "generation_config.json")
    )
    special = {
        name: _content(settings[name]) for name in _SPECIAL if _content(settings.get(name)) is not None
    }
    first = backend.encode("a").ids[:1]
    bare = backend.encode("a", add_special_tokens=False).ids[:1]
    bos_id = (
        backend.token_to_id(special["bos_token"]) if "bos_token" in special else _ids(config, "bos_token_id")
    )
    if isinstance(bos_id, list):
        bos_id = bos_id[0] if bos_id else None
    if bos_id is None and first != bare:
        bos_id = first[0]
    add_bos = settings.get("add_bos_token")
    stops = _ids(generation, "eos_token_id") or _ids(config, "eos_token_id")
    if "eos_token" in special:
        stops.append(backend.token_to_id(special["eos_token"]))
    return Tokenizer(
        backend,
        bos_id=bos_id,
        add_bos=(add_bos if isinstance(add_bos, bool) else first == [bos_id] != bare) and bos_id is not None,
        stop_ids=tuple(sorted({i for i in stops if i is not None})),
        template=_template(path, settings),
        special=special,
    )


def _settings(path: Path) -> dict:
    """Returns a JSON object, empty if there is no such file."""
    if not path.is_file():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path.name} holds an object, got {type(settings).__name__} in {str(path)!r}; download it again"
        )
    return settings


def _content(token) -> str | None:
    """Returns a token's text, which may stand inside an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ids(settings: dict, key: str) -> list[int]:
    """Returns the token ids under a key that holds one, several or none."""
    value = settings.get(key)
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int and i >= 0]


def _template(path: Path, settings: dict) -> str | None:
    """Returns the chat template: its own file, or the default one of tokenizer_config.json."""
    own = path / "chat_template.jinja"
    if own.is_file():
        return own.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
