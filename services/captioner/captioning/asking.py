"""One caption: asked for, asked for again in fewer words where it is too long for the CLIP, and made a row."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from services.captioner.captioning.inspecting import Inspecting
from services.captioner.captioning.planning import Wanted, generation, metadata
from services.captioner.captioning.remote import CaptionClient, Reply
from services.captioner.captioning.reuse import Answer
from services.captioner.captioning.writing import Row
from services.captioner.prompts import characteristic_name, render_shorter
from services.captioner.quality.inspect import FEWEST_WORDS, Inspected, Inspector
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.schemas.captions import CaptionJobRequest


class _Said(NamedTuple):
    """An answer, and what it was asked with."""

    prompt: str
    words: int
    reply: Reply

    def provenance(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "words": self.words,
            "raw": self.reply.text,
            "finish_reason": self.reply.finish_reason,
            "prompt_tokens": self.reply.prompt_tokens,
            "completion_tokens": self.reply.completion_tokens,
            "milliseconds": self.reply.milliseconds,
        }


class Asker:
    """`model`: what the captioner says of it. `job`: what every row's provenance says of the job.

    A provenance's prompt, words, raw and finish_reason are of the answer that the text was made from; its tokens and
    milliseconds are those of all its answers. Where it was asked for again (`reasks`), `first` says the same of the
    first answer alone. `reused_from` names the caption that the answer (or, in `first`, the first one) was paid for
    with."""

    def __init__(
        self,
        request: CaptionJobRequest,
        model: dict[str, Any],
        inspector: Inspector,
        remote: CaptionClient,
        job: Mapping[str, Any],
    ) -> None:
        self._request, self._model, self._remote, self._job = request, model, remote, job
        self._inspector, self._inspecting = inspector, Inspecting(inspector)
        self._how = {characteristic_name(each): each for each in request.characteristics}
        self._generation = generation(request)
        self._served = {
            "engine": request.engine,
            "revision": model["revision"],
            "precision": model["precision"],
            **self._generation,
        }

    def close(self) -> None:
        self._inspecting.close()

    async def ask(self, wanted: Wanted, picture: bytes, display_name: str, answer: Answer | None = None) -> Row:
        """`answer`: whose first is this caption's first, where `copy` found it too long. Raises InvalidInput where the
        captioner refuses this caption, Unavailable where it cannot be had now."""
        words = self._request.words
        source: dict[str, Any] = {}
        if answer is None:
            first = _Said(wanted.prompt, words, await self._once(wanted, picture, wanted.prompt, display_name, words))
        else:
            first = _first(answer.provenance)
            source = {"reused_from": answer.source}
        said = [first]
        kept = first
        inspected = await self._finish(first.reply, display_name)
        if inspected.trimmed or "over_budget" in inspected.flags:
            kept = await self._shorter(wanted, picture, display_name, said)
            inspected = await self._finish(kept.reply, display_name)
        replies = [each.reply for each in said]
        asked_again = len(said) > 1
        provenance = {
            **self._served,
            "seed": wanted.seed,
            **kept.provenance(),
            "prompt_tokens": sum(each.prompt_tokens for each in replies),
            "completion_tokens": sum(each.completion_tokens for each in replies),
            "milliseconds": round(sum(each.milliseconds for each in replies), 1),
            **self._job,
            "reasks": len(said) - 1,
            "trimmed": inspected.trimmed,
            **({"first": first.provenance() | source} if asked_again else source),
        }
        return _row(wanted, inspected, provenance)

    async def copy(self, wanted: Wanted, answer: Answer, display_name: str) -> Row | None:
        """The same answer as a caption of another image with the same bytes, or for another CLIP: inspected anew, as
        its class, the names of the others and the length allowed are not the same. What was finished alike is taken
        over with its later answers; else the first answer, for a longer CLIP has no use for fewer words. None where
        that is too long by now and may be asked for again."""
        found = answer.provenance
        first = _first(found)
        if answer.key != wanted.key:
            again = self._may_ask_again and self._too_long(first.reply.text, display_name)
            if again and (not found["reasks"] or self._too_long(found["raw"], display_name)):
                return None
            if not again:
                found = {**found, **first.provenance(), "reasks": 0}
                found.pop("first", None)
        inspected = await self._inspecting.finish(found["raw"], display_name, found["finish_reason"])
        own = {"trimmed": inspected.trimmed, "reused_from": answer.source}
        return _row(wanted, inspected, {**found, **self._job, **own})

    @property
    def _may_ask_again(self) -> bool:
        return self._request.reasks > 0 and self._request.words > FEWEST_WORDS

    def _too_long(self, raw: str, display_name: str) -> bool:
        return self._inspector.measure(raw, display_name).over_budget

    async def _finish(self, reply: Reply, display_name: str) -> Inspected:
        return await self._inspecting.finish(reply.text, display_name, reply.finish_reason)

    async def _shorter(self, wanted: Wanted, picture: bytes, display_name: str, said: list[_Said]) -> _Said:
        """Asks for fewer words until an answer fits, at most `reasks` times. Returns the shortest; adds to `said`."""
        request, inspector = self._request, self._inspector
        asked = request.words
        best = said[0]
        shortest = draft = inspector.measure(best.reply.text, display_name)
        while draft.over_budget and len(said) <= request.reasks and asked > FEWEST_WORDS:
            asked = inspector.fewer_words(asked, draft)
            how = self._how[wanted.characteristic]
            prompt = render_shorter(how, class_name=display_name, domain=str(request.domain), words=asked)
            try:
                reply = await self._once(wanted, picture, prompt, display_name, asked)
            except InvalidInput:
                break  # the caption that is there already can be trimmed
            said.append(_Said(prompt, asked, reply))
            draft = inspector.measure(reply.text, display_name)
            if draft.text and draft.clip_tokens < shortest.clip_tokens:
                best, shortest = said[-1], draft
        return best

    async def _once(self, wanted: Wanted, picture: bytes, prompt: str, display_name: str, words: int) -> Reply:
        return await self._remote.caption(
            self._request.engine,
            self._model["revision"],
            picture,
            prompt,
            seed=wanted.seed,
            metadata=metadata(self._request, wanted.characteristic, display_name, words),
            **self._generation,
        )


def _first(provenance: Mapping[str, Any]) -> _Said:
    found = provenance.get("first", provenance)
    names = ("finish_reason", "prompt_tokens", "completion_tokens", "milliseconds")
    return _Said(found["prompt"], found["words"], Reply(found["raw"], *(found[name] for name in names)))


def _row(wanted: Wanted, inspected: Inspected, provenance: dict[str, Any]) -> Row:
    return {
        "id": new_id("cpt"),
        "image_id": wanted.image.id,
        "key": wanted.key,
        "characteristic": wanted.characteristic,
        "text": inspected.text,
        "clip_tokens": inspected.clip_tokens,
        "flags": inspected.flags,
        "provenance": provenance,
        "replaces": wanted.replaces,
    }
