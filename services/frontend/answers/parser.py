"""An answer's text taken apart as it comes: a state machine over text in which markers are marks.

Each state is a method that takes from the front of `_text` what it is certain of, whatever comes
next, and says whether there is more to do; so it makes no difference how the text is cut:

    start -> thought -> start again, without thought -> content
    content -> section -> head -> arguments -> tail -> after -> head ... or content

White space beside markers belongs to them. What turns out to be no call is content, with the text
of its markers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from services.frontend.answers.deltas import (
    CallArguments,
    CallBegins,
    Content,
    Delta,
    Reasoning,
)
from services.frontend.answers.families import Family
from services.frontend.answers.heads import Head, More
from services.frontend.answers.marks import ANY, Marker, Marks, Speller
from services.frontend.answers.spans import ObjectSpan

_MARK = re.compile(f"[{ANY}]")
_OPENS = re.compile(f"[{Marker.CALLS.either}{Marker.CALL.either}]")
_ENDS_THOUGHT = re.compile(f"[{Marker.THOUGHT_END.either}]")
_OR_CALLS = re.compile(f"[{Marker.THOUGHT_END.either}{Marker.CALLS.token}{Marker.CALL.token}]")

_State = Callable[[bool], bool]


class AnswerParser:
    """See format.Parser.

    `spelled`: markers that count where they are spelled. `names`: functions that can be called;
    none: nothing is a call. `thinks`: the answer may begin with a thought; `open`: it has.
    """

    def __init__(
        self,
        family: Family,
        spelled: Collection[Marker],
        names: frozenset[str],
        thinks: bool,
        thinking_open: bool,
    ) -> None:
        self.calls = 0
        self._family = family
        self._names = names
        self._marks = Marks(family.markers)
        self._speller = (
            Speller({m: family.markers[m] for m in sorted(spelled)}) if spelled else None
        )
        self._tail = re.compile(family.tail)
        self._may_think = thinks
        self._ends_thought = _OR_CALLS if names and family.in_thought else _ENDS_THOUGHT
        self._text = ""
        self._opened = ""
        """What was taken since the last delta and is content if no call comes of it."""
        self._span = ObjectSpan()
        self._begun = False
        self._state: _State = self._thought if thinking_open else self._start
        self._plain = False
        self._deltas: list[Delta] = []

    @property
    def thinking(self) -> bool:
        """See format.Parser."""
        return self._state == self._thought

    def push(self, text: str) -> list[Delta]:
        """See format.Parser."""
        if self._speller is not None:
            text = self._speller.push(text)
        if not text:
            return []
        if self._plain and not self._text and _MARK.search(text) is None and not text[-1].isspace():
            return [Content(text)]
        return self._run(text, False)

    def finish(self) -> list[Delta]:
        """See format.Parser."""
        rest = self._speller.finish() if self._speller is not None else ""
        return self._run(rest, True)

    def _run(self, text: str, final: bool) -> list[Delta]:
        self._text += text
        while self._state(final):
            pass
        self._plain = self._state == self._content and not self._opened
        deltas, self._deltas = self._deltas, []
        return deltas

    # States

    def _start(self, final: bool) -> bool:
        """Of the answer, or of what follows a thought: only white space came so far."""
        text = self._text.lstrip()
        if not text and not final:
            return False
        if self._may_think and text[:1] in Marker.THOUGHT.either and text:
            self._text = text[1:]
            self._may_think = False
            self._state = self._thought
            return True
        self._state = self._head if self._bare(text) else self._content
        if self._state == self._head:
            self._opened = self._text[: len(self._text) - len(text)]
            self._text = text
        return True

    def _thought(self, final: bool) -> bool:
        self._may_think = False
        if not self._begun:
            self._text = self._text.lstrip("\n")
            self._begun = bool(self._text)
        found = self._ends_thought.search(self._text)
        if found is None:
            kept = "" if final else self._text[len(self._text.rstrip("\n")) :]
            self._reason(self._text[: len(self._text) - len(kept)])
            self._text = kept
            return False
        self._reason(self._text[: found.start()].rstrip("\n"))
        if found[0] in Marker.THOUGHT_END.either:
            self._text = self._text[found.end() :].lstrip("\n")
            self._state = self._after_thought
        else:
            self._text = self._text[found.start() :]
            self._state = self._content
        return True

    def _after_thought(self, final: bool) -> bool:
        """Line ends behind a thought belong to it."""
        self._text = self._text.lstrip("\n")
        if not self._text:
            return False
        self._state = self._start
        return True

    def _content(self, final: bool) -> bool:
        found = _OPENS.search(self._text) if self._names else None
        if found is not None:
            said = self._text[: found.start()].rstrip()
            self._say(said)
            self._opened = self._text[len(said) : found.end()]
            self._text = self._text[found.end() :]
            section = found[0] in Marker.CALLS.either
            self._state = self._section if section else self._head
            return True
        # A call may come behind white space.
        end = len(self._text.rstrip()) if self._names and not final else len(self._text)
        self._say(self._text[:end])
        self._text = self._text[end:]
        return False

    def _section(self, final: bool) -> bool:
        """Between the marker that begins all calls and that of the first."""
        text = self._text.lstrip()
        if not text:
            return self._no_call() if final else False
        if text[0] not in Marker.CALL.either:
            return self._no_call()
        self._take(len(self._text) - len(text) + 1)
        self._state = self._head
        return True

    def _head(self, final: bool) -> bool:
        head = self._family.reader(self._text, final, self._names)
        if isinstance(head, More):
            return False
        if head is None:
            return self._no_call()
        return self._call(head)

    def _arguments(self, final: bool) -> bool:
        count = self._span.push(self._text)
        if count:
            arguments = self._marks.restored(self._text[:count])
            self._deltas.append(CallArguments(self.calls - 1, arguments))
            self._text = self._text[count:]
        if not self._span.done:
            return False
        self._state = self._tail_of_call
        return True

    def _tail_of_call(self, final: bool) -> bool:
        found = self._tail.match(self._text)
        rest = self._text[found.end() :] if found else self._text
        if not rest or (not final and self._family.fence.startswith(rest)):
            if final:
                self._text = ""
            return False
        self._text = rest
        self._state = self._after
        if rest[0] in Marker.CALL_END.either:
            self._text = rest[1:]
        elif rest[0] == self._family.then:
            self._text, self._opened = rest[1:], rest[0]
            self._state = self._head
        return True

    def _after(self, final: bool) -> bool:
        """Behind a call."""
        self._text = self._text.lstrip()
        if not self._text:
            return False
        first = self._text[0]
        if first in Marker.CALLS_END.either:
            self._text = self._text[1:]
            return True
        self._state = self._content
        return True

    # What they do

    def _bare(self, text: str) -> bool:
        return self._family.bare and bool(self._names) and text.startswith("{")

    def _call(self, head: Head) -> bool:
        self._opened = ""
        self._deltas.append(CallBegins(self.calls, head.name, head.id))
        self.calls += 1
        self._text = self._text[head.end :]
        if head.arguments is None:
            self._span = ObjectSpan()
            self._state = self._arguments
        else:
            self._deltas.append(CallArguments(self.calls - 1, head.arguments))
            self._state = self._tail_of_call
        return True

    def _no_call(self) -> bool:
        """What was opened is content, and so is what follows, up to what begins a call."""
        opened, self._opened = self._opened, ""
        self._say(opened)
        self._state = self._content
        return True

    def _take(self, count: int) -> None:
        self._opened += self._text[:count]
        self._text = self._text[count:]

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append(Content(self._marks.restored(text)))

    def _reason(self, text: str) -> None:
        if text:
            self._deltas.append(Reasoning(self._marks.restored(text)))
