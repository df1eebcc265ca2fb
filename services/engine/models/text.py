"""Text to tokens and back. CPU work: call it off the event loop. A Tokenizer is thread-safe."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

import tokenizers

from services.engine.models import nested
from services.engine.models.decoding import ByteTable
from services.engine.models.errors import ModelFileError
from services.engine.models.folder import ModelFolder, read_json
from services.engine.models.special import ControlTokens, TooManyNoncharactersError
from services.engine.models.template import FIELD, SECONDS, ChatTemplate, ToolTexts, template_of
from services.runtime.errors import InvalidRequestError

MARKER = re.compile(r"<[^<>\s]+>")
"""The form of tokens that are markers, whatever the vocabulary calls them."""

_SAID = (FIELD, "chat.tools", "chat.variables")


class Tokenizer:
    """A model's tokenizer and chat template.

    now: what templates take for the time. template_seconds: of CPU, for a conversation. Raises
    ModelFileError for what it can't use.
    """

    def __init__(
        self,
        folder: ModelFolder,
        now: Callable[[], datetime] = datetime.now,
        template_seconds: float = SECONDS,
    ) -> None:
        path = folder.path / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelFileError(path, f"can't be read as a tokenizer: {error}") from error
        # A file may ask for what batches in training need.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.added = {token.content: token_id for token_id, token in added.items()}
        """Ids of tokens that are no words, control tokens among them, by their text."""
        self.control_tokens = {i: token.content for i, token in added.items() if token.special}
        """Their text by id."""
        # Many a vocabulary has markers that are not called special, such as DeepSeek's <|User|>.
        self._control = {
            token.content: (token_id, token)
            for token_id, token in added.items()
            if token.special or MARKER.fullmatch(token.content)
        }
        self._control_tokens = ControlTokens(list(self._control))
        self._plain = _without(self._tokenizer, self._control)
        config_path = folder.path / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        self._template = template_of(folder.path, config, now, template_seconds)
        self.table = ByteTable.of(self._tokenizer, path)
        if len(self.table) > folder.vocabulary:
            raise ModelFileError(
                path,
                f"has {len(self.table)} tokens, config.json's vocab_size is {folder.vocabulary}",
            )

    @property
    def template_source(self) -> str:
        """Of the chat template; "" if there is none."""
        return "" if self._template is None else self._template.source

    @property
    def knows_developers(self) -> bool:
        """The chat template has a role "developer"."""
        return self._template is not None and self._template.knows_developers

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a raw prompt. `special`: those too that the model wants at its ends.

        It is taken as it is: control tokens written in it are control tokens, so that a client can
        render conversations itself, and the beginning-of-sequence token is added if the model
        wants one. Text of others belongs in encode_chat().
        """
        _valid("prompt", text)
        return _ids(self._tokenizer, [text], special)[0]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, object] = MappingProxyType({}),
        continues: bool = False,
        told: ToolTexts | None = None,
    ) -> list[int]:
        """Tokens of a conversation, up to where the answer begins.

        Messages and tools as Hugging Face's templates take them, arguments of calls as JSON text,
        `variables` beside them. With `continues` the answer goes on with the last message. `told`:
        for a template that has no functions. Control tokens come from the model's template only: in
        all that was said, names and schemas included, they are plain text, but for the <think> of
        assistants.
        Raises InvalidRequestError if the template refuses the conversation or there is none.
        """
        if self._template is None:
            raise InvalidRequestError(
                "chat", "a conversation", "this model has no chat template; send a prompt"
            )
        try:
            return self._encode_chat(self._template, messages, tools, variables, continues, told)
        except RecursionError:
            raise InvalidRequestError(FIELD, "JSON", "it is nested too deeply") from None

    def _encode_chat(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, object],
        continues: bool,
        told: ToolTexts | None,
    ) -> list[int]:
        said: list[Any] = [template.prepared(messages), list(tools), dict(variables)]
        found = [t for name, v in zip(_SAID, said, strict=True) for t in nested.texts(v, name)]
        for place, text in found:
            _valid(place, text)
        try:
            thoughts = {
                f"{FIELD}[{i}].content"
                for i, message in enumerate(messages)
                if message.get("role") == "assistant"
            }
            own = frozenset(i for i, (place, _) in enumerate(found) if place in thoughts)
            hidden, originals = self._control_tokens.hide([text for _, text in found], own)
        except TooManyNoncharactersError:
            raise InvalidRequestError(
                FIELD, "every Unicode noncharacter", "leave one of U+FDD0 to U+FDEF out"
            ) from None
        if originals:
            stand_ins = iter(hidden)
            said = nested.replaced(said, lambda _: next(stand_ins))
        rendered = template.render(said[0], said[1], said[2], continues, told)
        if not originals:
            return _ids(self._tokenizer, [rendered])[0]
        return self._encode_apart(rendered, originals)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without control tokens; invalid UTF-8 is U+FFFD."""
        detokenizer = Detokenizer(self)
        return detokenizer.push(token_ids) + detokenizer.finish()

    def _encode_apart(self, rendered: str, originals: Mapping[int, str]) -> list[int]:
        """Encodes the template's control tokens, and what is between them as plain text."""
        control: list[int] = []
        between: list[str] = []
        at, strip = 0, False
        for found in self._control_tokens.find(rendered):
            token_id, token = self._control[found.token]
            between.append(_stripped(rendered[at : found.start], strip, token.lstrip))
            control.append(token_id)
            at, strip = found.end, token.rstrip
        between.append(_stripped(rendered[at:], strip, False))
        first, *rest = _ids(self._plain, [text.translate(originals) for text in between])
        for token_id, ids in zip(control, rest, strict=True):
            first += [token_id, *ids]
        return first


class Detokenizer:
    """Text of tokens as they come; push() + push() + ... + finish() is the decode() of them all.

    The bytes of an incomplete character are held back. A token costs the same however many came
    before it. `marks`: what stands for some tokens, by id, in place of their text.
    """

    def __init__(
        self, tokenizer: Tokenizer, marks: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        self._table = tokenizer.table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.table.strip_spaces
        self._marks = marks
        self._marked = frozenset(marks)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is final now. Ids that the tokenizer does not know have none."""
        if self._marked.isdisjoint(token_ids):
            return self._stripped(self._decoder.decode(self._table.join(token_ids)))
        return "".join(map(self._pushed, token_ids))

    def _pushed(self, token_id: int) -> str:
        mark = self._marks.get(token_id)
        if mark is None:
            return self._stripped(self._decoder.decode(self._table.join((token_id,))))
        # A character that the marker breaks off is none.
        broken = self._stripped(self._decoder.decode(b"", True))
        self._strip = 0
        return broken + mark

    def finish(self) -> str:
        """What was held back: U+FFFD if the last character never became complete."""
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                text = text[1:]
                self._strip -= 1
        return text


def _ids(
    tokenizer: tokenizers.Tokenizer, texts: list[str], special: bool = False
) -> list[list[int]]:
    """Of each text. A batch even of one: encode() does not let go of the interpreter lock."""
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]


def _stripped(text: str, left: bool, right: bool) -> str:
    """left, right: the neighbouring control token takes the white space on that side."""
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _without(
    tokenizer: tokenizers.Tokenizer, control: Mapping[str, object]
) -> tokenizers.Tokenizer:
    """The same, to which these tokens are plain text."""
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    plain = tokenizers.Tokenizer.from_str(json.dumps(described))
    plain.encode_special_tokens = True
    return plain


def _valid(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            field, f"U+{ord(text[error.start]):04X}", "lone surrogates are not text"
        ) from None
