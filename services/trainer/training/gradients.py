"""A step's gradients: the method's loss on a batch, encoded at the run's precision and as memory allows."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from services.trainer.methods.base import Batch, FineTune
from services.trainer.training.encoding import Side, backward
from services.trainer.training.feeding import Draw, Feed
from services.trainer.training.optim import Optimizer
from services.trainer.training.parameters import Tower, Trained
from services.trainer.training.randomness import derived_seed
from services.trainer.training.reports import Diverged
from shared.clip.loading import LoadedClip, encode_text_batch, encode_tokens, normalise, trim_padding
from shared.clip.precision import bf16_pays
from shared.errors import InvalidInput

log = logging.getLogger(__name__)


class Autocast:
    """The arithmetic of each tower; weights and loss stay float32. "auto": bfloat16 where that is faster."""

    def __init__(self, precision: str, clip: LoadedClip, device: torch.device) -> None:
        self.device = device
        fixed = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        text = getattr(clip.model, "text", None)
        towers = {"visual": clip.model.visual, "text": clip.model.transformer if text is None else text}
        self.dtypes: Mapping[str, torch.dtype | None] = {
            name: (torch.bfloat16 if bf16_pays(tower, device) else None) if precision == "auto" else fixed[precision]
            for name, tower in towers.items()
        }

    def __call__(self, tower: Tower, *, enabled: bool = True) -> torch.autocast:
        dtype = self.dtypes[tower]
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=enabled and dtype is not None)


class Gradients:
    """micro_batch: rows encoded at a time, None: all; loss, parts, scale: of the latest step, detached, on the
    device."""

    def __init__(
        self,
        clip: LoadedClip,
        method: FineTune,
        trained: Trained,
        optimizer: Optimizer,
        feed: Feed,
        prototypes: Tensor,
        seed: int,
    ) -> None:
        self.clip, self.method, self.trained, self.optimizer, self.feed = clip, method, trained, optimizer, feed
        self.prototypes, self.seed, self.device, self.peers = prototypes, seed, feed.device, feed.peers
        self.autocast = Autocast(method.hyperparameters.precision, clip, self.device)
        self.micro_batch = method.hyperparameters.micro_batch
        self.loss = self.scale = torch.zeros(())
        self.parts: dict[str, Tensor] = {}
        self._first_bad = torch.zeros(2, device=self.device)  # step and value of the first loss that is not finite
        self._fixed_texts: Tensor | None = None  # (T, D) of all of the run's texts, where the text tower is not trained
        if "text" not in trained.towers and method.step_texts != "none":
            with trained.using() as model:
                self._fixed_texts = encode_tokens(model, feed.texts.table.tokens).to(self.device)

    def compute(self, draw: Draw, step: int) -> None:
        """Leaves the gradients in the parameters. Whenever memory runs out, half as many rows are encoded at a time."""
        sides = [Side(len(draw.labels), lambda a, b: self._images(draw, step, a, b), "visual" in self.trained.towers)]
        if draw.texts is not None and self._fixed_texts is None:
            sides.append(Side(len(draw.texts), lambda a, b: self._texts(draw, step, a, b), trained=True))
        while True:
            self.optimizer.zero_grad()
            try:
                backward(
                    sides,
                    self.prototypes.shape[1],
                    lambda embeddings: self._loss(draw, step, embeddings),
                    self.trained.parameters,
                    self.micro_batch,
                    self.peers,
                )
                return
            except torch.OutOfMemoryError:
                pass  # gone on with outside, where the traceback holds no activations any more
            self._halve(step, max(self.peers.largest_share(side.rows) for side in sides))

    def check(self) -> None:
        """Raises Diverged if any loss so far was not finite. Waits for the device."""
        step, value = self._first_bad.tolist()
        if step:
            raise Diverged.at(f"The loss is {value} at step {int(step)} of {self.feed.total_steps}", self.method)

    def _halve(self, step: int, rows: int) -> None:
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        at_once = min(self.micro_batch or rows, rows)
        if at_once == 1:
            raise InvalidInput(
                f"The memory of {self.device} does not suffice for a single image of '{self.clip.name}'. Train less of "
                "it ('trainable': 'projections' or 'lora'), a smaller model, or on another device.",
                code="out_of_memory",
                param="model",
            )
        self.micro_batch = at_once // 2
        log.warning(
            "out of memory at step %d: encoding %d rows at a time from here on instead of %d, for the same batch",
            step + 1,
            self.micro_batch,
            at_once,
        )

    def _images(self, draw: Draw, step: int, start: int, stop: int) -> Tensor:
        self._seed("visual", step, start)
        pixels = normalise(draw.images[start - draw.start : stop - draw.start], self.clip)
        with self.autocast("visual"):
            embeddings: Tensor = self.trained.model.encode_image(pixels, normalize=True)
        return embeddings.float()

    def _texts(self, draw: Draw, step: int, start: int, stop: int) -> Tensor:
        assert draw.texts is not None
        self._seed("text", step, start)
        tokens = trim_padding(self.trained.model, self.feed.texts.table.tokens[draw.texts[start:stop]])
        with self.autocast("text"):
            return encode_text_batch(self.trained.model, self.feed.move(tokens)).float()

    def _loss(self, draw: Draw, step: int, embeddings: list[Tensor]) -> Tensor:
        text_emb = embeddings[1] if len(embeddings) > 1 else None
        if draw.texts is not None and self._fixed_texts is not None:
            text_emb = self._fixed_texts[self.feed.move(draw.texts)]
        scale = self.trained.model.logit_scale.exp().squeeze()
        self._seed("loss", step, 0)
        loss, parts = self.method.loss(
            Batch(
                image_emb=embeddings[0],
                text_emb=text_emb,
                labels=draw.labels,
                logit_scale=scale,
                prototypes=self.prototypes,
                head=self.trained.head,
            )
        )
        self.loss, self.scale = loss.detach(), scale.detach()
        self.parts = {name: part.detach() for name, part in parts.items()}
        now = torch.stack([torch.full_like(self.loss, step + 1), self.loss]).float()
        first = (self._first_bad[0] == 0) & ~torch.isfinite(self.loss)
        self._first_bad = torch.where(first, now, self._first_bad)
        if self.device.type == "cpu":  # nothing to wait for: stop before the weights are touched
            self.check()
        return self.optimizer.scaled(loss)

    def _seed(self, what: str, step: int, row: int) -> None:
        """Dropout and the like draw from torch's global generators: the same for the same rows of the same step,
        however often and on whichever process."""
        torch.manual_seed(derived_seed(self.seed, what, step, row))
