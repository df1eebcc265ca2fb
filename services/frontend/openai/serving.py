"""From what is asked to answers that run: finds the model, prepares the prompts, begins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.engine.api import Guide, GuideKind
from services.frontend import validate
from services.frontend.begin import Beginning, Caller, Context, Prepared
from services.frontend.chat import Calling, Chat
from services.frontend.openai import models
from services.frontend.openai.answer import AnswerText
from services.frontend.openai.asking import Asking, Names, named_as
from services.frontend.openai.choices import Choice, Choices, seed_of
from services.frontend.openai.heading import Heading
from services.frontend.openai.tokens import Spelling
from services.frontend.served import ServedModel
from services.frontend.validate import Input, Prompt
from services.runtime.errors import InvalidRequestError, UnknownAdapterError, UnknownModelError

REQUEST_ID = "x-request-id"
"""Request metadata; echoed in the answer's."""

DOCUMENTS = frozenset({GuideKind.JSON_SCHEMA, GuideKind.JSON_OBJECT})
"""Guides to what stands behind a thought."""

GuideOf = Callable[[Sequence[int]], Guide | None]


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked: the model, and its adapter's id or nothing."""

    name: str
    served: ServedModel
    adapter: str


@dataclass(frozen=True, slots=True)
class Answers:
    """A request's answers, running."""

    choices: Choices
    heading: Heading
    prepared: Sequence[Prepared]

    async def say_id(self, context: Context) -> None:
        """Echoes the request's id; before the first message."""
        await context.send_initial_metadata(((REQUEST_ID, self.heading.name),))


class Serving:
    """Of one model. `now`: Unix time in seconds."""

    def __init__(self, beginning: Beginning, now: Callable[[], float]) -> None:
        self.beginning = beginning
        self.model = beginning.model
        self.spelling = Spelling(self.model.tokens, self.model.control_tokens)
        self._now = now

    async def target(self, asked: str) -> Target:
        """A name of ListModels: of the model, or of an adapter. Raises UnknownModelError."""
        if not asked:
            raise InvalidRequestError("model", asked, "a name of ListModels")
        served = await self.beginning.served(self.model.name)
        if asked == served.name:
            return Target(asked, served, "")
        try:
            validate.check_adapter(asked)
            adapter = await self.beginning.cluster.coordinator.adapter(served, asked)
        except (InvalidRequestError, UnknownAdapterError):
            names = ", ".join(name for name, _ in models.named(served))
            shown = validate.cut(asked)
            raise UnknownModelError(
                f"model {shown!r} is not served; served: {names}",
                field="model",
                model=shown,
                served=names,
            ) from None
        return Target(asked, served, adapter)

    @asynccontextmanager
    async def answers(
        self, asking: Asking, target: Target, context: Context, arrived: float
    ) -> AsyncIterator[Answers]:
        """Begins the answers, and ends them on leaving. `arrived`: on the cluster's clock."""
        metadata = context.invocation_metadata() or ()
        asked_name = next((str(value) for key, value in metadata if key == REQUEST_ID), "")
        with named_as(asking.names), self.beginning.named(asked_name) as name:
            caller = self.beginning.caller(context, arrived)
            prepared = await self._prepare(asking, target, caller, name)
            heading = Heading(
                name=name,
                created=int(self._now()),
                model=target.name,
                fingerprint=models.fingerprint(target.served, target.adapter),
                tier="default" if asking.tier == "auto" else asking.tier,
            )
            choices = Choices(self._starter(asking, prepared, name), len(prepared), asking.n)
            try:
                yield Answers(choices, heading, prepared)
            finally:
                choices.close()

    async def _prepare(
        self, asking: Asking, target: Target, caller: Caller, name: str
    ) -> list[Prepared]:
        several = len(asking.inputs) > 1
        prepared = []
        for i, given in enumerate(asking.inputs):
            names: Names = ()
            if several:
                names = (("prompt", f"prompt[{i}]"), ("tokens.token_ids", f"prompt[{i}]"))
            asked = validate.Asked(
                model=target.served.name,
                input=given,
                sampling=asking.sampling,
                stop=asking.stop,
                request_id="",
                priority=asking.priority,
                # Answers to one prompt are best given where its KV is.
                session=asking.session or (name if asking.n > 1 else ""),
                ttft_seconds=asking.ttft_seconds,
                itl_seconds=asking.itl_seconds,
                adapter=target.adapter,
            )
            guide = self._guide(asking, given)
            with named_as(names):
                try:
                    prepared.append(await self.beginning.prepare(asked, caller, guide))
                except InvalidRequestError as error:
                    if error.metadata.get("field", "").startswith("sampling.guide"):
                        await self._blame(asking)
                    raise
        return prepared

    async def _blame(self, asking: Asking) -> None:
        """Calls can't be held to their form: names the function whose schema is at fault."""
        for i, function in enumerate(asking.tools):
            if function.parameters:
                schema = Guide(GuideKind.JSON_SCHEMA, (function.parameters,))
                names = (("sampling.guide.json_schema", f"tools[{i}].function.parameters"),)
                with named_as(names):
                    await self.beginning.check_guide(schema)

    def _guide(self, asking: Asking, given: Input) -> GuideOf | None:
        """What holds the answer to a form that depends on whether it begins with a thought."""
        if not isinstance(given, Chat):
            return None
        form, asked = self.model.answers, asking.sampling.guide
        if asking.choice.calling is Calling.NONE and asked is None:
            return None
        if asked is None and not form.takes_tools:
            # It refuses, and nothing is tokenized to find that out.
            form.guide(asking.tools, asking.choice, asking.parallel, False)

        def guide(prompt: Sequence[int]) -> Guide | None:
            thinks = self.model.thinks_after(prompt)
            if asked is not None:
                return form.after_thought(asked, thinks)
            found = form.guide(asking.tools, asking.choice, asking.parallel, thinks)
            if found is not None and asking.sampling.ignore_eos:
                allowed = "false where tool_choice wants a call: the end is part of its form"
                raise InvalidRequestError("ignore_eos", True, allowed)
            return found

        return guide

    def _starter(
        self, asking: Asking, prepared: Sequence[Prepared], name: str
    ) -> Callable[[int, int, int], Choice]:
        def start(index: int, prompt: int, answer: int) -> Choice:
            of = prepared[prompt]
            text = self._text(asking, of, asking.inputs[prompt])
            live = self.beginning.start(
                of,
                # No client's own name has this character.
                name if index == 0 else f"{name}#{index}",
                seed=seed_of(of.sampling.seed, answer),
                text=text,
            )
            return Choice(index, prompt, live, text)

        return start

    def _text(self, asking: Asking, prepared: Prepared, given: Input) -> AnswerText | None:
        """What takes an answer apart; None where all of it is said."""
        if not isinstance(given, Chat):
            return None
        form = self.model.answers
        if not form.thinks and asking.choice.calling is Calling.NONE:
            return None
        thinks = self.model.thinks_after(prepared.prompt)
        guide = asking.sampling.guide
        document = guide is not None and guide.kind in DOCUMENTS
        parser = form.parser(asking.tools, asking.choice, thinks, document)
        return AnswerText(self.model.detokenizer(marked=True), prepared.stop, parser)

    async def echoes(self, asking: Asking, answers: Answers) -> list[str]:
        """The prompts' texts, empty if they are not wanted."""
        if not asking.echo:
            return [""] * len(asking.inputs)
        return [
            given.text
            if isinstance(given, Prompt)
            else await self.beginning.off_loop(self.decoded, prepared.prompt)
            for given, prepared in zip(asking.inputs, answers.prepared, strict=True)
        ]

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Text of tokens."""
        detokenizer = self.model.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.finish()
