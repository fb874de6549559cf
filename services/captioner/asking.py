"""One caption: asked for, asked for again in fewer words where it is too long for the CLIP, and made a row."""

from collections.abc import Mapping
from typing import Any

from services.captioner.inspecting import Inspecting
from services.captioner.planning import Wanted, generation, metadata
from services.captioner.prompts import characteristic_name, render_shorter
from services.captioner.quality.inspect import FEWEST_WORDS, Inspected, Inspector
from services.captioner.remote import CaptionClient, Reply
from services.captioner.reuse import Answer
from services.captioner.writing import Row
from shared.errors import InvalidInput
from shared.ids import new_id
from shared.schemas.captions import CaptionJobRequest


class Asker:
    """`model`: what the captioner says of it. `job`: what every row's provenance says of the job."""

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

    async def ask(self, wanted: Wanted, picture: bytes, display_name: str) -> Row:
        """Raises InvalidInput where the captioner refuses this caption, Unavailable where it cannot be had now."""
        words = self._request.words
        reply = await self._once(wanted, picture, wanted.prompt, display_name, words)
        replies = [reply]
        inspected = await self._inspecting.finish(reply.text, display_name, reply.finish_reason)
        if inspected.trimmed or "over_budget" in inspected.flags:
            reply, words = await self._shorter(wanted, picture, display_name, replies)
            inspected = await self._inspecting.finish(reply.text, display_name, reply.finish_reason)
        provenance = {
            "prompt": wanted.prompt,
            **self._served,
            "seed": wanted.seed,
            "words": words,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": sum(each.prompt_tokens for each in replies),
            "completion_tokens": sum(each.completion_tokens for each in replies),
            "milliseconds": round(sum(each.milliseconds for each in replies), 1),
            **self._job,
            "raw": reply.text,
            "reasks": len(replies) - 1,
            "trimmed": inspected.trimmed,
        }
        return _row(wanted, inspected, provenance)

    async def copy(self, wanted: Wanted, answer: Answer, display_name: str) -> Row:
        """The same answer as a caption of another image with the same bytes, or for another CLIP: inspected anew, as
        its class, the names of the others and the length allowed are not the same."""
        found = answer.provenance
        inspected = await self._inspecting.finish(found["raw"], display_name, found["finish_reason"])
        source = {"caption_id": answer.caption_id, "job_id": answer.job_id}
        return _row(wanted, inspected, {**found, **self._job, "trimmed": inspected.trimmed, "reused_from": source})

    async def _shorter(
        self, wanted: Wanted, picture: bytes, display_name: str, replies: list[Reply]
    ) -> tuple[Reply, int]:
        """Asks for fewer words until an answer fits, at most `reasks` times. Returns the shortest and its words; adds
        to `replies`."""
        request, inspector = self._request, self._inspector
        words = asked = request.words
        best = replies[0]
        shortest = draft = inspector.measure(best.text, display_name)
        while draft.over_budget and len(replies) <= request.reasks and asked > FEWEST_WORDS:
            asked = inspector.fewer_words(asked, draft)
            how = self._how[wanted.characteristic]
            prompt = render_shorter(how, class_name=display_name, domain=str(request.domain), words=asked)
            try:
                reply = await self._once(wanted, picture, prompt, display_name, asked)
            except InvalidInput:
                break  # the caption that is there already can be trimmed
            replies.append(reply)
            draft = inspector.measure(reply.text, display_name)
            if draft.text and draft.clip_tokens < shortest.clip_tokens:
                best, shortest, words = reply, draft, asked
        return best, words

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
