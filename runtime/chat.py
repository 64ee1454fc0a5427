"""Chat templates (jinja2, sandboxed) and the cut of a prompt into prefix, context and suffix ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import TokenizerError
from runtime.tokenizer import Files, Tokenizer, read_json, token_text

# Stand-ins for the user's texts while the template is rendered. Private-use characters and characters that every
# escaping rewrites: a template that alters its message loses the mark, and split_prompt() notices.
_MARK = re.compile("\ue000<\"([a-z0-9]+)'&>\ue001")
T = TypeVar("T")


@dataclass(frozen=True)
class PromptParts:
    """Token ids of a prompt: prefix + context + suffix. The context's depend on nothing but template and context.

    query: where in the suffix the query's own ids are; empty without a query.
    """

    prefix_ids: list[int]
    context_ids: list[int]
    suffix_ids: list[int]
    query: range = range(0)


class ChatTemplate:
    """A checkpoint's chat template, with the names that Hugging Face's templates expect."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """`tokens`: bos_token, eos_token and so on. Raises TokenizerError if the template does not parse.

        digest: 16 hex digits of both.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        self._tokens = {"bos_token": "", "eos_token": ""} | dict(tokens or {})
        self._template = _guard(lambda: environment.from_string(source))
        self.digest = hashlib.sha256(json.dumps([source, self._tokens]).encode()).hexdigest()[:16]

    @classmethod
    def from_checkpoint(cls, checkpoint: Files) -> ChatTemplate | None:
        """The template of chat_template.jinja or tokenizer_config.json; None if there is none."""
        settings = read_json(checkpoint, "tokenizer_config.json")
        if (data := checkpoint.file("chat_template.jinja")) is not None:
            source: Any = data.decode(errors="replace")
        else:
            source = settings.get("chat_template")
        if isinstance(source, list):  # [{"name": ..., "template": ...}]
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            if "default" not in named:
                raise TokenizerError(f"tokenizer_config.json: no chat template named 'default' among {list(named)}")
            source = named["default"]
        if source is None:
            return None
        if not isinstance(source, str):
            raise TokenizerError(f"tokenizer_config.json: chat_template is {type(source).__name__}, expected text")
        tokens = {key: token_text(settings, key) for key in settings if key.endswith("_token") and settings[key]}
        return cls(source, {key: text for key, text in tokens.items() if text})

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Raises TokenizerError if the template refuses it or fails."""
        values: dict[str, Any] = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return _guard(lambda: self._template.render(values | {"tools": None, "documents": None} | self._tokens))


def split_prompt(
    tokenizer: Tokenizer, template: ChatTemplate | None, context: str, query: str, system: str | None = None,
    turns: Sequence[tuple[str, str]] = ()
) -> PromptParts:
    """Ids of one user turn, the context followed by a blank line and the query, cut around the context.

    turns: questions and answers between the context and the query, which is then a user turn of its own. Without a
    template the same texts stand alone, blank lines between turns, for plain completion. Special tokens are recognised
    in the template's own text only: no system prompt, context, question or answer can end its turn. The texts go in
    exactly as given, also where the template would trim them. BOS is put first if the tokenizer asks for it and the
    template did not. Raises TokenizerError if the template drops, repeats, reorders or alters one of the texts.
    """
    said = {f"{who}{number}": text for number, turn in enumerate(turns)
            for who, text in zip(("question", "answer"), turn, strict=True)} | {"query": query}
    first = next(iter(said))  # stands in the context's own turn
    if context and said[first]:
        said[first] = f"\n\n{said[first]}"
    texts = ({} if system is None else {"system": system}) | {"context": context} | said
    texts = {name: text for name, text in texts.items() if text or name == "system"}
    opening = "".join(_mark(name) for name in ("context", first) if name in texts)
    spoken = [opening, *(_mark(name) if name in texts else "" for name in said if name != first)]
    if template is not None:
        layout = _render_marks(template, texts, spoken)
    else:
        layout = "\n\n".join([_mark("system")] * bool(system) + spoken)

    parts: dict[str, list[int]] = {"prefix": [], "context": [], "suffix": []}
    part, asked = "prefix" if context else "suffix", range(0)
    for name, ids in _encode(tokenizer, layout, texts):
        if name == "query":
            asked = range(len(parts["suffix"]), len(parts["suffix"]) + len(ids))
        parts["context" if name == "context" else part] += ids
        part = "suffix" if name == "context" else part
    return PromptParts(parts["prefix"], parts["context"], parts["suffix"], asked)


def encode_messages(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation up to where the model's next turn begins; messages of {"role", "content"}.

    Special tokens are recognised in the template's own text only. Raises TokenizerError as split_prompt does.
    """
    texts: dict[str, str] = {}
    marked = []
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise TokenizerError(f"message {number} is {message!r}; expected a role and a content, both text")
        texts[f"message{number}"] = message["content"]
        marked.append({**message, "content": _mark(f"message{number}")})
    layout = template.render(marked)
    _check_marks(layout, texts)
    return [token for _, ids in _encode(tokenizer, layout, texts) for token in ids]


def _mark(name: str) -> str:
    return f"\ue000<\"{name}'&>\ue001"


def _encode(tokenizer: Tokenizer, layout: str, texts: Mapping[str, str]) -> list[tuple[str | None, list[int]]]:
    """The layout's pieces as ids, each with its text's name (None: the template's own); BOS first where it is due."""
    encoded: list[tuple[str | None, list[int]]] = []
    last = None
    for name, text in _pieces(layout, texts):
        continues = last is not None and not tokenizer.is_special(last)
        ids = tokenizer.encode(text, special=name is None, continues=continues)
        encoded.append((name, ids))
        last = ids[-1] if ids else last
    first = next((ids[0] for _, ids in encoded if ids), None)
    if tokenizer.adds_bos and first != tokenizer.bos_id and tokenizer.bos_id is not None:
        encoded.insert(0, (None, [tokenizer.bos_id]))
    return encoded


def _render_marks(template: ChatTemplate, texts: Mapping[str, str], spoken: Sequence[str]) -> str:
    """spoken: what user and assistant say in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(spoken)]
    if "system" in texts:
        messages.insert(0, {"role": "system", "content": _mark("system")})
    layout = template.render(messages)
    _check_marks(layout, texts)
    places = [layout.find(content) for content in spoken if content]
    if -1 in places or places != sorted(places):
        raise TokenizerError("the chat template changes the order of context and query; use another template, or none")
    return layout


def _check_marks(layout: str, texts: Mapping[str, str]) -> None:
    found = [match[1] for match in _MARK.finditer(layout)]
    for name in texts:
        if (count := found.count(name)) != 1:
            what = "drops or alters" if count == 0 else f"repeats ({count} times)"
            raise TokenizerError(f"the chat template {what} the {name} text; use another template, or none")


def _pieces(layout: str, texts: Mapping[str, str]) -> list[tuple[str | None, str]]:
    """The layout in order, as (None, the template's own text) and (name, the user's text).

    A space before a user's text goes with it, because tokenizers make one token of " word".
    """
    pieces: list[tuple[str | None, str]] = []
    start = 0
    for match in _MARK.finditer(layout):
        own, name = layout[start : match.start()], match[1]
        kept = own.removesuffix(" ")
        pieces += [(None, kept), (name, own[len(kept) :] + texts[name])]
        start = match.end()
    return [*pieces, (None, layout[start:])]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks assistant text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """Like jinja2's, but without HTML escapes, which would show in the prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _guard(action: Callable[[], T]) -> T:
    try:
        return action()
    except Exception as error:  # a template is a program: it can raise anything
        raise TokenizerError(f"the chat template fails: {error}") from error
