"""What a run cannot be faster than: the forwards, backwards, optimiser steps, validations and prototypes of ours, at
its precision and on as many tokens, with every tensor on the device beforehand; nothing is decoded, augmented, drawn,
reported, kept or checked."""

import copy
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from services.trainer.methods.mmft import MMFT
from services.trainer.training.data import RunTexts, TrainData
from services.trainer.training.gradients import Autocast
from services.trainer.training.losses import mmft_loss
from services.trainer.training.memory import freed_blocks_kept
from services.trainer.training.optim import freeze_batch_norm_statistics, parameter_groups, prefer_channels_last
from services.trainer.training.randomness import generator
from shared.clip.loading import LoadedClip, encode_text_batch, encode_tokens, normalise, trim_padding


class Floor:
    def __init__(self, clip: LoadedClip, method: MMFT, data: TrainData, seed: int, device: torch.device) -> None:
        hp = self.hp = method.hyperparameters
        self.device, self.texts = device, RunTexts(clip, method, data)
        self.model = copy.deepcopy(clip.model).to(device)
        prefer_channels_last(self.model)
        self.autocast = Autocast(hp.precision, clip, device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(dict(self.model.named_parameters()), hp), lr=hp.learning_rate, fused=True
        )
        steps = -(-len(data.labels) // hp.batch_size)
        order = torch.randperm(len(data.labels), generator=generator(seed, "floor")).tensor_split(steps)
        self.images = [normalise(data.images[part].to(device), clip) for part in order]
        self.labels = [data.labels[part].to(device) for part in order]
        self.tokens = []
        for epoch in range(hp.epochs):
            drawn = [self.texts.draw(part, generator(seed, "texts", epoch, i)) for i, part in enumerate(order)]
            self.tokens.append([self._ready(self.texts.table.tokens[part]) for part in drawn])
        size = 64 if device.type == "cpu" else 256
        rows = torch.split(torch.arange(len(data.val_labels)), size) if len(data.val_labels) else ()
        self.val = [normalise(data.val_images[part].to(device), clip) for part in rows]

    def _ready(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.device.type == "cpu" else trim_padding(self.model, tokens).to(self.device)

    def run(self) -> float:
        """Seconds of all epochs."""
        with freed_blocks_kept():
            self.step(self.images[0], self.tokens[0][0], self.labels[0])  # kernels chosen, memory taken
            self._wait()
            start = time.perf_counter()
            for tokens in self.tokens:
                for batch in zip(self.images, tokens, self.labels, strict=True):
                    self.step(*batch)
                self.validate()
            self._wait()
            return time.perf_counter() - start

    def step(self, images: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        self.model.train()
        freeze_batch_norm_statistics(self.model)
        with self.autocast("visual"):
            image_emb = self.model.encode_image(images, normalize=True)
        with self.autocast("text"):
            text_emb = encode_text_batch(self.model, tokens)
        scale = self.model.logit_scale.exp().squeeze()
        loss, _ = mmft_loss(image_emb.float(), text_emb.float(), scale, labels, self.hp.w, self.hp.variant)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> None:
        self.model.eval()
        self.prototypes()
        with self.autocast("visual"):
            for part in self.val:
                self.model.encode_image(part, normalize=True)

    def prototypes(self) -> torch.Tensor:
        """(T, D) of every text that the classes' prototypes are made of: all but the means."""
        with self.autocast("text"):
            return encode_tokens(
                self.model, self.texts.table.tokens[torch.unique(torch.cat(self.texts.prototype_rows))]
            )

    def flops(self) -> int:
        """Of the first step, counted: multiplications and additions of matrix products, convolutions, attention."""
        with FlopCounterMode(display=False) as counter:
            self.step(self.images[0], self.tokens[0][0], self.labels[0])
        return int(counter.get_total_flops())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
