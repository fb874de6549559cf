"""Any `AutoModelForImageTextToText` checkpoint: Qwen-VL, SmolVLM, LLaVA, Gemma 3, InternVL and their like.

One `generate` call serves requests that differ in temperature, length, seed and stop strings (hf_sampling), and shows
each picture to the vision tower once, however many prompts ask about it (hf_vision). No row's trouble is another's: a
batch that does not fit in memory is halved, and a row that comes to nothing is tried once more by itself.
"""

import copy
import gc
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import GenerationConfig

from services.captioner import metrics
from services.captioner.engines import hf_batching, hf_loading
from services.captioner.engines.base import CaptionRequest, Engine, FinishReason, Generation, fit
from services.captioner.engines.hf_batching import Prepared
from services.captioner.engines.hf_prefix import Beginnings
from services.captioner.engines.hf_sampling import RowLimits, RowSampler, RowWatch
from services.captioner.engines.hf_text import Stream, Transcript, opened_by, visible
from services.captioner.engines.hf_vision import VisionReuse, picture_key, unit_keys
from shared.errors import CaptuneError, InvalidInput, Unavailable

logger = logging.getLogger(__name__)

#: Raise when a change of the hf*.py files changes what comes out for the same weights and request.
CODE_VERSION = "hf3"

_MEMORY_WORDS = ("out of memory", "alloc_failed", "can't allocate memory")  # CUDA, MPS; cuBLAS, cuDNN; the CPU
_SMALLER_FOR_S = 600.0  # for so long a batch size that did not fit is not tried again: others may share the device
_ANOTHER_SEED = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Raw:
    """What came of one row: its text, or the error that its request is answered with."""

    item: Prepared
    text: str = ""
    reason: FinishReason = "length"
    tokens: int = 0  # written; with the end token, as it was generated too
    broken: bool = False  # the model's scores were not numbers
    error: CaptuneError | None = None


class HFEngine(Engine):
    """Quantized or plain, batched, left-padded. `spec.model` is a hub id or a path below `model_roots`."""

    default_max_batch: ClassVar[int] = 24  # multiples of three keep the usual prompts of a picture together ...
    gpu_max_batch: ClassVar[int] = 96  # ... and a GPU reads all weights once per token, for however many rows
    _device = torch.device("cpu")

    def load(self) -> None:
        started = time.perf_counter()
        loaded = hf_loading.load(self.spec, self.name, self.model_roots)
        self._model, self._processor = loaded.model, loaded.processor
        self._device, self._dtype = loaded.device, loaded.dtype
        if self._device.type == "cuda" and self.spec.max_batch is None:
            self.max_batch = self.gpu_max_batch
        self._context = loaded.context_length
        self.precision = loaded.precision
        self.revision = " ".join(
            [
                loaded.identity,
                loaded.precision,
                f"max_pixels={self.spec.max_pixels}",
                *([f"attention={self.spec.attention}"] if self.spec.attention != "sdpa" else []),
                *(["compiled"] if self.spec.compile else []),
                CODE_VERSION,
            ]
        )

        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # a decoder continues from the last column, which has to be a real token
        shipped: GenerationConfig = self._model.generation_config
        self._end_ids = _ids(shipped.eos_token_id) | _ids(tokenizer.eos_token_id)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self._end_ids)
        self._pad_id = int(pad)
        self._image_id = getattr(self._model.config, "image_token_id", None)
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
        self._template_switches = hf_loading.thinking_off(self._processor)
        self._thought = ""
        self._fitting: dict[Hashable, tuple[int, float]] = {}  # bucket -> largest batch to try, until when
        self._sanitizes = self._processor_sanitizes()
        self._probe()
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
        ids = tensors["input_ids"]
        prompt_tokens = int(ids.shape[1])
        if self._context is not None and prompt_tokens + request.max_tokens > self._context:
            raise InvalidInput(
                f"The prompt has {prompt_tokens} tokens (images included) and max_tokens is {request.max_tokens}, but "
                f"model {self.name!r} has a context of {self._context}. Shorten the prompt, send fewer images or lower "
                "max_tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        return Prepared(
            replace(request, stop=tuple(filter(None, request.stop))),
            tensors,
            conversation,
            prompt_tokens,
            image_tokens=0 if self._image_id is None else int((ids == self._image_id).sum()),
            image_keys=unit_keys(tensors, [picture_key(image) for image in images]),
            stream=Stream(request.on_text) if request.on_text else None,
        )

    def bucket(self, prepared: Prepared) -> Hashable:
        return hf_batching.bucket(prepared)

    def generate(self, prepared: Sequence[Prepared]) -> list[Raw]:
        raws = self._fitted(prepared)
        # One more try for what came to nothing. Scores that are no numbers may come of the padding, so such a row is
        # tried by itself, with its own seed: the draw is not to blame. For an empty text it is, so another seed is
        # taken (derived from the given one, so that the outcome still hangs on it alone). A greedy row would only
        # repeat itself, but for the rounding of a smaller batch, which is not worth a full-length text.
        alone = [n for n, raw in enumerate(raws) if raw.broken]
        redrawn = [n for n, raw in enumerate(raws) if _is_empty(raw) and raw.item.request.temperature > 0]
        if len(prepared) > 1:
            greedy = [n for n, raw in enumerate(raws) if _is_empty(raw) and raw.item.request.temperature <= 0]
            alone += [n for n in greedy if raws[n].reason == "stop"]
        again = [([n], [prepared[n]]) for n in alone]
        if redrawn:
            again.append((redrawn, [_reseeded(prepared[n]) for n in redrawn]))
        for rows, items in again:
            reason = "not_a_number" if raws[rows[0]].broken else "empty"
            metrics.RETRIES.labels(self.name, reason).inc(len(rows))
            logger.warning("engine %s: %d of %d rows tried once more: %s", self.name, len(rows), len(raws), reason)
            for n, raw in zip(rows, self._fitted(items), strict=True):
                raws[n] = raw
        return raws

    def finish(self, raw: Raw) -> Generation:
        if raw.error is not None:
            raise raw.error
        if raw.broken:
            raise InvalidInput(
                f"Model {self.name!r} computed values that are not numbers for this request, twice. If it happens "
                "often, choose precision bf16 or fp32; else change the picture or the prompt.",
                code="not_a_number",
                param="messages",
            )
        stream = raw.item.stream
        if stream is not None and not raw.text.startswith(stream.sent):
            raise Unavailable(
                "The text had to be begun anew and came out otherwise than what was sent of it. Ask again.",
                code="generation_interrupted",
            )
        if not raw.text:
            logger.warning("engine %s: an empty text after %d tokens (%s)", self.name, raw.tokens, raw.reason)
        return Generation(raw.text, raw.reason, raw.item.prompt_tokens, raw.tokens, raw.item.image_tokens)

    def device_memory(self) -> tuple[int, int] | None:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free, total
        if self._device.type == "mps":
            return torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
        return None

    def _fitted(self, prepared: Sequence[Prepared], *, freed: bool = False) -> list[Raw]:
        """`_batch` in parts that fit in the device's memory. `freed`: this one was tried, then memory was made free."""
        kind = max(hf_batching.bucket(item) for item in prepared)
        size, until = self._fitting.get(kind, (len(prepared), 0.0))
        if len(prepared) > size and time.monotonic() < until:
            parts = [prepared[start : start + size] for start in range(0, len(prepared), size)]
            return [raw for part in parts for raw in self._fitted(part)]
        try:
            return self._batch(prepared)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # Only here, where the error is gone and its traceback holds no tensors any more, can memory be freed.
        metrics.OUT_OF_MEMORY.labels(self.name).inc()
        self._free_memory()
        if len(prepared) == 1:
            if not freed:
                return self._fitted(prepared, freed=True)
            logger.error("engine %s: one request of bucket %s does not fit in memory", self.name, kind)
            return [Raw(prepared[0], error=self._does_not_fit(prepared[0]))]
        half = (len(prepared) + 1) // 2
        logger.warning("engine %s: %d requests of %s do not fit; %d are tried", self.name, len(prepared), kind, half)
        self._fitting[kind] = (half, time.monotonic() + _SMALLER_FOR_S)
        return self._fitted(prepared)

    def _batch(self, prepared: Sequence[Prepared]) -> list[Raw]:
        with torch.inference_mode():
            begun = self._beginnings.inputs(prepared) if self._beginnings else None
            inputs = begun or self._whole(prepared)
        hf_batching.assert_left_padded(inputs)
        requests, width = [item.request for item in prepared], inputs["input_ids"].shape[1]
        limits = torch.tensor([request.max_tokens for request in requests], device=self._device)
        sampler = RowSampler(requests, width, self._device)
        transcripts = {
            row: self._transcript(item) for row, item in enumerate(prepared) if item.request.stop or item.stream
        }
        with torch.inference_mode(), self._looking(prepared):
            output = self._model.generate(
                **inputs,
                max_new_tokens=max(request.max_tokens for request in requests),
                logits_processor=[sampler],
                stopping_criteria=[
                    RowLimits(limits, width, sampler.broken),
                    *([RowWatch(transcripts, sampler.broken)] if transcripts else []),
                ],
            )
        rows: list[list[int]] = output[:, width:].tolist()
        broken: list[bool] = sampler.broken.tolist()
        return [
            Raw(item, broken=True) if broken[n] else self._read(rows[n], item, transcripts.get(n))
            for n, item in enumerate(prepared)
        ]

    def _whole(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """What `generate` takes: all of every prompt, (B, L), and the pictures."""
        return self._placed(self._collate(prepared))

    def _looking(self, prepared: Sequence[Prepared]) -> AbstractContextManager[None]:
        """Inside, a picture of these requests passes the vision tower once, where the model allows it."""
        keys = [key for item in prepared for key in item.image_keys]
        return self._vision.sharing(keys) if self._vision and keys else nullcontext()

    def _read(self, row: Sequence[int], item: Prepared, transcript: Transcript | None) -> Raw:
        """The generated ids of one row, with whatever follows its end -> its text."""
        ids = row[: item.request.max_tokens if transcript is None else transcript.tokens]
        end = next((position for position, token in enumerate(ids) if token in self._end_ids), None)
        if transcript is None:
            written = self._thread_processor().tokenizer.decode(ids[:end], skip_special_tokens=True)
            text, stopped = visible(written, opened=self._thought)
        else:
            text, stopped = transcript.text(), transcript.stopped
        reason: FinishReason = "length" if end is None and not stopped else "stop"
        return Raw(item, text, reason, len(ids) if end is None else end + 1)

    def _transcript(self, item: Prepared) -> Transcript:
        request, tokenizer = item.request, self._thread_processor().tokenizer
        return Transcript(tokenizer, self._end_ids, request.max_tokens, request.stop, self._thought, item.stream)

    def _does_not_fit(self, item: Prepared) -> InvalidInput:
        return InvalidInput(
            f"This request alone does not fit in the memory of the device ({item.prompt_tokens} prompt tokens, "
            f"{item.image_tokens} of them for images; max_tokens {item.request.max_tokens}). Lower max_tokens, send "
            "smaller or fewer images, or have the model served at precision nf4.",
            code="out_of_memory",
            param="max_tokens",
        )

    def _free_memory(self) -> None:
        if self._vision is not None:
            self._vision.clear()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

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
            **self._template_switches,
        )
        return dict(encoded)

    def _placed(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {
            key: value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)
            for key, value in batch.items()
        }

    def _join(self, prepared: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        return hf_batching.join(prepared, self._pad_id)

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

    def _probe(self) -> None:
        """Find out, on three prompts over two unlike pictures, what this model and its processor allow."""
        lines, rings = (Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB"))
        items = [
            self.prepare(CaptionRequest((picture,), prompt, max_tokens=1))
            for picture, prompt in (
                (lines.resize((320, 96)), "Describe the picture."),
                (rings.resize((120, 200)), "Describe the shape of the thing shown."),
                (lines.resize((320, 96)), "Describe its texture."),
            )
        ]
        self._thought = opened_by(self._processor.tokenizer.decode(items[0].tensors["input_ids"][0].tolist()))
        if self._thought:
            logger.warning("engine %s: its prompts make it think before each text, which takes tokens", self.name)
        self._collate: Callable[[Sequence[Prepared]], dict[str, torch.Tensor]] = self._join
        if not self._joins_like_processor(items):
            logger.warning(
                "engine %s: its processor batches in a way of its own; batches are prepared by it", self.name
            )
            self._collate = self._process
        if self.spec.compile:
            self._assert_compiles(items)
        keys = [key for item in items for key in item.image_keys]
        self._vision = VisionReuse.probe(self._model, self._whole(items), keys, name=self.name)
        self._beginnings = None
        if self._collate == self._join:
            how = {"pad_id": self._pad_id, "place": self._placed, "looking": self._looking}
            self._beginnings = Beginnings.probe(self._model, items, self._whole(items), name=self.name, **how)

    def _assert_compiles(self, items: Sequence[Prepared]) -> None:
        """The compiler starts with the first call: better at loading than at the first request."""
        try:
            with torch.inference_mode():
                self._model.generate(**self._placed(self._collate(items)), max_new_tokens=3)
        except Exception as error:  # a compiler that is missing or fails has its own kinds of errors on every platform
            reason = " ".join(str(error).split())[:400]
            raise InvalidInput(
                f"Model {self.name!r} cannot be compiled here ({type(error).__name__}: {reason}). Set compile to "
                "false, or install what is missing (a C++ compiler, Triton).",
                code="compile_unavailable",
                param="compile",
            ) from error

    def _joins_like_processor(self, items: Sequence[Prepared]) -> bool:
        """Whether `_join` gives just what the processor gives for requests of unlike sizes and lengths."""
        own, reference = self._join(items), self._process(items)
        return own.keys() == reference.keys() and all(torch.equal(own[key], reference[key]) for key in own)


def _is_empty(raw: Raw) -> bool:
    return not raw.text and not raw.broken and raw.error is None


def _reseeded(item: Prepared) -> Prepared:
    seed = item.request.seed
    other = None if seed is None else (seed ^ _ANOTHER_SEED) % 2**63
    return replace(item, request=replace(item.request, seed=other))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """The allocator's own error, or that of a library which could not get memory from it."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in _MEMORY_WORDS)


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
