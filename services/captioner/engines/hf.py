"""Any `AutoModelForImageTextToText` checkpoint: Qwen-VL, SmolVLM, LLaVA, Gemma 3, InternVL and their like.

One `generate` call serves requests that differ in temperature, length and seed: sampling is done by the Gumbel-max
trick (argmax of logits/T + Gumbel noise is a draw from softmax(logits/T); Gumbel 1954), so the call itself is greedy,
each row adds its own noise, and a seeded row's text does not depend on which requests it shared the batch with.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from services.captioner.engines import hf_loading
from services.captioner.engines.base import CaptionRequest, Engine, FinishReason, Generation, fit
from shared.errors import InvalidInput

logger = logging.getLogger(__name__)

#: Raise when a change of this file changes what comes out for the same weights and request.
CODE_VERSION = "hf1"


@dataclass(frozen=True)
class Prepared:
    """One request as CPU tensors with a batch axis of 1, plus what steers its row."""

    tensors: dict[str, torch.Tensor]
    conversation: list[dict[str, Any]]
    prompt_tokens: int
    max_tokens: int
    temperature: float
    seed: int | None


@dataclass(frozen=True)
class Raw:
    """Generated ids of one row, end token and padding cut off."""

    ids: list[int]
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int  # with the end token, as it was generated too


class HFEngine(Engine):
    """Quantized or plain, batched, left-padded. `spec.model` is a hub id or a path below `spec.model_roots`."""

    default_max_batch: ClassVar[int] = 16

    def load(self) -> None:
        started = time.perf_counter()
        loaded = hf_loading.load(self.spec, self.name)
        self._model, self._processor = loaded.model, loaded.processor
        self._device, self._dtype = loaded.device, loaded.dtype
        self._context = loaded.context_length
        self.precision = loaded.precision
        self.revision = f"{loaded.identity} {loaded.precision} max_pixels={self.spec.max_pixels} {CODE_VERSION}"

        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # a decoder continues from the last column, which has to be a real token
        shipped: GenerationConfig = self._model.generation_config
        self._end_ids = _ids(shipped.eos_token_id) | _ids(tokenizer.eos_token_id)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._end_ids)
        self._pad_id = int(pad)
        # The checkpoint's own sampling defaults (temperature, top-k, top-p) must not override a request's.
        self._model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            eos_token_id=sorted(self._end_ids),
            pad_token_id=self._pad_id,
            bos_token_id=shipped.bos_token_id,
            repetition_penalty=shipped.repetition_penalty,
        )
        # Tokenizers hold state while they encode, so every CPU thread works on a copy of its own.
        self._local = threading.local()
        self._copy_lock = threading.Lock()
        self._control_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._sanitizes = self._processor_sanitizes()
        self._collate: Callable[[Sequence[Prepared]], dict[str, torch.Tensor]] = self._join
        if not self._joins_like_processor():
            logger.warning(
                "engine %s: its processor batches in a way of its own; batches are prepared by it", self.name
            )
            self._collate = self._process
        logger.info("engine %s: %s ready in %.1f s", self.name, self.revision, time.perf_counter() - started)

    def prepare(self, request: CaptionRequest) -> Prepared:
        if not self._sanitizes and any(token in request.prompt for token in self._control_tokens):
            raise InvalidInput(
                f"The prompt spells a control token of model {self.name!r}, which its processor cannot tell from a "
                "real one. Rephrase it.",
                code="control_token_in_prompt",
                param="messages",
            )
        images = [fit(image, self.spec.max_pixels) for image in request.images]
        # Image first, text after: the prompts of one picture then share their prefix.
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        conversation = [{"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}]
        try:
            tensors = self._encode(self._thread_processor(), conversation)
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in request.images) or "none"
            raise InvalidInput(
                f"Model {self.name!r} does not accept this request (image sizes: {sizes}): {error}",
                code="request_rejected_by_model",
                param="messages",
            ) from error
        prompt_tokens = int(tensors["input_ids"].shape[1])
        if self._context is not None and prompt_tokens + request.max_tokens > self._context:
            raise InvalidInput(
                f"The prompt has {prompt_tokens} tokens (images included) and max_tokens is {request.max_tokens}, but "
                f"model {self.name!r} has a context of {self._context}. Shorten the prompt, send fewer images or lower "
                "max_tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        return Prepared(tensors, conversation, prompt_tokens, request.max_tokens, request.temperature, request.seed)

    def generate(self, prepared: Sequence[Prepared]) -> list[Raw]:
        batch = self._collate(prepared)
        _assert_left_padded(batch)
        width = batch["input_ids"].shape[1]
        limits = torch.tensor([item.max_tokens for item in prepared], device=self._device)
        with torch.inference_mode():
            output = self._model.generate(
                **{key: self._place(value) for key, value in batch.items()},
                max_new_tokens=int(limits.max()),
                logits_processor=[_RowSampler(prepared, self._device)],
                stopping_criteria=[_RowLimits(limits, width)],
            )
        rows: list[list[int]] = output[:, width:].tolist()
        return [self._cut(row, item) for row, item in zip(rows, prepared, strict=True)]

    def finish(self, raw: Raw) -> Generation:
        text: str = self._thread_processor().tokenizer.decode(raw.ids, skip_special_tokens=True)
        return Generation(text.strip(), raw.reason, raw.prompt_tokens, raw.completion_tokens)

    def _cut(self, row: list[int], item: Prepared) -> Raw:
        ids = row[: item.max_tokens]
        end = next((position for position, token in enumerate(ids) if token in self._end_ids), None)
        if end is None:
            return Raw(ids, "length", item.prompt_tokens, len(ids))
        return Raw(ids[:end], "stop", item.prompt_tokens, end + 1)

    def _thread_processor(self) -> Any:
        if not hasattr(self._local, "processor"):
            with self._copy_lock:
                self._local.processor = copy.deepcopy(self._processor)
        return self._local.processor

    def _encode(self, processor: Any, conversations: list[Any], **processor_kwargs: Any) -> dict[str, torch.Tensor]:
        encoded = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            # Words of a prompt that spell a control token ("<|im_end|>", an image placeholder) stay plain words.
            sanitize_control_tokens=self._sanitizes,
            processor_kwargs=processor_kwargs,
        )
        return dict(encoded)

    def _place(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)

    def _join(self, prepared: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        """Requests encoded one by one -> one batch. Whatever runs along the tokens, (1, L), is padded on the left to
        (B, longest); everything else (pixels, grids) is stacked on its first axis, zero-padded where shapes differ."""
        joined: dict[str, torch.Tensor] = {}
        for key in dict.fromkeys(key for item in prepared for key in item.tensors):
            parts = [item.tensors[key] for item in prepared if key in item.tensors]
            along_tokens = all(
                key in item.tensors and item.tensors[key].shape == item.tensors["input_ids"].shape for item in prepared
            )
            target = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
            fill = self._pad_id if key == "input_ids" else 0
            joined[key] = torch.cat([_pad(part, target, fill, left=along_tokens) for part in parts])
        return joined

    def _process(self, prepared: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        """The batch as the processor itself makes it: slower, as the device waits for it."""
        conversations = [item.conversation for item in prepared]
        return self._encode(self._thread_processor(), conversations, padding=True, padding_side="left")

    def _processor_sanitizes(self) -> bool:
        """Whether this processor can keep control tokens that a prompt spells as plain words; some cannot yet."""
        self._sanitizes = True
        try:
            self.prepare(CaptionRequest((Image.new("RGB", (64, 64)),), "Describe.", max_tokens=1))
        except (InvalidInput, NotImplementedError) as error:
            logger.info("engine %s: prompts that spell control tokens are refused (%s)", self.name, error)
            return False
        return True

    def _joins_like_processor(self) -> bool:
        """Whether `_join` gives just what the processor gives for two requests of unlike sizes and lengths."""
        pictures = (Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB"))
        requests = [
            CaptionRequest((pictures[0].resize((320, 96)),), "Describe the picture.", max_tokens=1),
            CaptionRequest((pictures[1].resize((120, 200)),), "Describe the shape of the thing shown.", max_tokens=1),
        ]
        items = [self.prepare(request) for request in requests]
        own, reference = self._join(items), self._process(items)
        return own.keys() == reference.keys() and all(torch.equal(own[key], reference[key]) for key in own)


def _assert_left_padded(batch: dict[str, torch.Tensor]) -> None:
    assert bool(batch["attention_mask"][:, -1].all()), "prompts must be padded on the left"


class _RowSampler(LogitsProcessor):
    """(B, V) scores -> scores whose argmax is each row's next token at that row's temperature and seed."""

    def __init__(self, prepared: Sequence[Prepared], device: torch.device) -> None:
        temperatures = torch.tensor([item.temperature for item in prepared], dtype=torch.float32)
        self._greedy = (temperatures <= 0).unsqueeze(1).to(device)
        self._temperatures = temperatures.clamp_min(1e-4).unsqueeze(1).to(device)
        self._all_greedy = bool((temperatures <= 0).all())
        self._seeded = {
            row: torch.Generator(device).manual_seed(item.seed)
            for row, item in enumerate(prepared)
            if item.seed is not None and item.temperature > 0
        }

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._all_greedy:
            return scores
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_()
        for row, generator in self._seeded.items():
            noise[row].exponential_(generator=generator)
        gumbel = -noise.clamp_min(torch.finfo(torch.float32).tiny).log()
        return torch.where(self._greedy, scores, scores / self._temperatures + gumbel)


class _RowLimits(StoppingCriteria):
    """Ends each row at its own max_tokens. `limits` (B,) counts from column `width`."""

    def __init__(self, limits: torch.Tensor, width: int) -> None:
        self._limits, self._width = limits, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return self._limits <= input_ids.shape[1] - self._width


def _pad(part: torch.Tensor, target: Sequence[int], fill: int, *, left: bool) -> torch.Tensor:
    """(n, *shape) -> (n, *target); new cells hold `fill` and lie before (`left`) or after the old ones."""
    if list(part.shape[1:]) == list(target):
        return part
    padded = part.new_full((part.shape[0], *target), fill)
    window = (slice(size - old, size) if left else slice(old) for old, size in zip(part.shape[1:], target, strict=True))
    padded[(slice(None), *window)] = part
    return padded


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
