"""From an `EngineSpec` to a model on its device: which precision, and whether what was loaded is what was asked."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils.chat_template_utils import _get_template_variables
from transformers.utils.import_utils import is_flash_attn_2_available

from services.captioner.engines.hub import locate
from services.captioner.settings import EngineSpec, Precision
from shared.errors import InvalidInput, Unavailable

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_QUANTIZED_LAYER = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
#: Bytes per parameter; the quantized ones leave embeddings and norms at 16 bits.
_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.25, "nf4": 0.75}
_THINKING_SWITCHES = frozenset({"enable_thinking", "thinking"})
_OVERHEAD = 1.2  # of the weights, for activations and the key-value cache ...
_WORKSPACE = 1.5e9  # ... and this much besides, in bytes


@dataclass(frozen=True)
class Loaded:
    model: Any
    processor: Any
    identity: str
    precision: str
    dtype: torch.dtype  # what floating inputs are cast to
    device: torch.device
    context_length: int | None


def load(spec: EngineSpec, name: str, model_roots: Sequence[Path]) -> Loaded:
    """Locate, check, choose a precision and load. `InvalidInput` or `Unavailable` say what to change."""
    if not spec.model:
        raise InvalidInput(
            f"Engine {name!r} has type 'hf' but names no model. Set model to a hub id (owner/name) or a path.",
            code="model_missing",
            param=f"engines.{name}.model",
        )
    device = choose_device(spec.device)
    checkpoint = locate(spec.model, model_roots)
    config = _read(AutoConfig, checkpoint.folder, spec.model)
    shipped_quantized = getattr(config, "quantization_config", None) is not None
    precision: str
    if shipped_quantized:
        if spec.precision != "auto":
            raise InvalidInput(
                f"Model {spec.model!r} is stored quantized already; precision {spec.precision!r} cannot be applied. "
                "Use precision 'auto', or the unquantized model.",
                code="already_quantized",
                param="precision",
            )
        precision, reason = "as stored", "the checkpoint is quantized already"
    elif spec.precision == "auto":
        precision, reason = choose_precision(
            checkpoint.parameters,
            free_bytes=_free_bytes(device),
            on_cpu=device.type == "cpu",
            bf16=device.type != "cuda" or torch.cuda.is_bf16_supported(),
            bitsandbytes=_has_bitsandbytes(),
        )
    else:
        precision, reason = spec.precision, "asked for"
    logger.info("engine %s: %s at %s on %s (%s)", name, checkpoint.identity, precision, device, reason)
    if precision in _QUANTIZED_LAYER and not _has_bitsandbytes():
        raise InvalidInput(
            f"Precision {precision!r} needs the package bitsandbytes, which is not installed. Install it "
            "(pip install bitsandbytes) or choose bf16, fp16 or fp32.",
            code="quantization_unavailable",
            param="precision",
        )
    dtype = _DTYPES.get(precision, torch.bfloat16)
    attention = _attention(spec, device, dtype)
    processor = _processor(checkpoint.folder, spec.model)
    model = _model(checkpoint.folder, spec.model, precision, dtype, device, attention)
    logger.info("engine %s: attention by %s", name, getattr(model.config, "_attn_implementation", "its own code"))
    if spec.compile:
        decoder = model.get_decoder()
        # Sizes change with every batch and every token: one graph has to serve them all.
        decoder.forward = torch.compile(decoder.forward, dynamic=True)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Loaded(model, processor, checkpoint.identity, precision, dtype, device, context)


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU; a device that is not there is an `InvalidInput`."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    device = torch.device(wanted)
    missing = not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count())
    if missing:
        raise InvalidInput(
            f"Device {wanted!r} is not available on this machine. Use 'auto' or one of: "
            f"{', '.join(kind for kind, found in there.items() if found)}.",
            code="device_unavailable",
            param="device",
        )
    return device


def thinking_off(processor: Any) -> dict[str, bool]:
    """The variables by which this processor's chat template is told that the model shall not think aloud."""
    template = processor.chat_template
    template = template["default"] if isinstance(template, dict) else template
    return dict.fromkeys(_THINKING_SWITCHES & _get_template_variables(template), False)


def choose_precision(
    parameters: int, *, free_bytes: int, on_cpu: bool, bf16: bool, bitsandbytes: bool
) -> tuple[Precision, str]:
    """The widest precision that fits, with the reason. 4 bits save memory but are no faster in batches, so 16 bits win
    where they fit; a CPU computes fastest in 32."""
    plain: Precision = "bf16" if bf16 else "fp16"
    candidates: list[Precision] = ["fp32", plain] if on_cpu else [plain]
    if bitsandbytes:
        candidates += ["int8", "nf4"] if not on_cpu else ["nf4"]
    needs: dict[Precision, float] = {
        candidate: parameters * _BYTES[candidate] * _OVERHEAD + _WORKSPACE for candidate in candidates
    }
    for candidate, need in needs.items():
        if need <= free_bytes:
            return candidate, f"needs about {need / 1e9:.1f} GB of {free_bytes / 1e9:.1f} GB free"
    hint = "" if bitsandbytes else " With the package bitsandbytes installed, 4-bit weights could be tried."
    smallest, need = min(needs.items(), key=lambda item: item[1])
    raise InvalidInput(
        f"The model does not fit: even at {smallest} it needs about {need / 1e9:.1f} GB and {free_bytes / 1e9:.1f} GB "
        f"are free. Choose a smaller model or another device.{hint}",
        code="model_too_large",
        param="model",
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _read(auto: Any, folder: Path, model: str) -> Any:
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, json.JSONDecodeError) as error:
        raise _not_loadable(model, error) from error


def _processor(folder: Path, model: str) -> Any:
    processor = _read(AutoProcessor, folder, model)
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise InvalidInput(
            f"Model {model!r} has no processor for images and text together (found {type(processor).__name__}), "
            "so it cannot caption pictures.",
            code="not_image_text_to_text",
            param="model",
        )
    if not processor.chat_template:
        raise InvalidInput(
            f"Model {model!r} has no chat template. Choose an instruction-tuned variant.",
            code="no_chat_template",
            param="model",
        )
    return processor


def _attention(spec: EngineSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    if spec.attention != "flash_attention_2":
        # Without a word the library takes sdpa, and "eager" for the few architectures that have nothing else.
        return None if spec.attention == "sdpa" else spec.attention
    lacking = [
        what
        for what, there in (
            ("the package flash-attn (pip install flash-attn)", is_flash_attn_2_available()),
            ("a CUDA device", device.type == "cuda"),
            ("precision bf16, fp16, int8 or nf4", dtype != torch.float32),
        )
        if not there
    ]
    if lacking:
        raise InvalidInput(
            f"Attention 'flash_attention_2' needs {' and '.join(lacking)}. Provide that, or choose attention 'sdpa'.",
            code="attention_unavailable",
            param="attention",
        )
    return spec.attention


def _model(
    folder: Path, name: str, precision: str, dtype: torch.dtype, device: torch.device, attention: str | None
) -> Any:
    quantization: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "int8": {"load_in_8bit": True},
    }
    build_config: Any = BitsAndBytesConfig
    if precision == "int8":  # says at every layer of every step that it computes in fp16, as int8 kernels do
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(  # nosec B615 # of a folder, local_files_only
            folder,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention,
            quantization_config=build_config(**quantization[precision]) if precision in quantization else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Unavailable(
            f"Out of memory while loading model {name!r} at {precision}. Free the device, or choose precision 'nf4' or "
            "a smaller model.",
            code="model_too_large",
            param="precision",
        ) from error
    except ImportError as error:
        raise InvalidInput(
            f"Precision {precision!r} of model {name!r} cannot be used here: {error}",
            code="quantization_unavailable",
            param="precision",
        ) from error
    except Exception as error:  # architectures raise all kinds; each means that these files do not make this model
        raise _not_loadable(name, error) from error
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise InvalidInput(
            f"Model {name!r} is incomplete: {len(absent)} weights are missing or have the wrong shape "
            f"(first: {absent[0]}). Fetch it again.",
            code="model_not_loadable",
            param="model",
        )
    layer = _QUANTIZED_LAYER.get(precision)
    if layer and not any(type(module).__name__ == layer for module in model.modules()):
        raise InvalidInput(
            f"Model {name!r} has no layer that {precision} can quantize. Choose bf16, fp16 or fp32.",
            code="quantization_unavailable",
            param="precision",
        )
    return model.eval()


def _not_loadable(model: str, error: Exception) -> InvalidInput:
    first_line = str(error).strip().partition("\n")[0][:400]
    return InvalidInput(
        f"Model {model!r} cannot be loaded as an image-text-to-text model ({type(error).__name__}: {first_line}). "
        "Check that it is one, that its download is complete, and that it needs no code of its own (never run here).",
        code="model_not_loadable",
        param="model",
    )
