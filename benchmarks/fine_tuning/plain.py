"""CLIP fine-tuned the plain way, the baseline. Four loader processes decode and augment JPEGs with
PIL in every epoch, texts are tokenised batch by batch, `loss.item()` is read in each step; after each epoch every
training caption is encoded again, class by class, in float32, and the validation images are decoded and scored. The
objective, the schedule, the frozen BatchNorm statistics and the selection of the best epoch are those of ours, so that
the accuracies can be compared."""

import copy
import math
import random
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from fine_tuning.material import Material, Split, opened
from services.trainer.methods.mmft import MMFTHyperparameters
from services.trainer.training.losses import mmft_loss
from services.trainer.training.optim import MAX_LOGIT_SCALE, freeze_batch_norm_statistics
from shared.classifier.head import Head
from shared.clip.loading import LoadedClip
from shared.clip.templates import prefixed

LOADERS = 4
AT_ONCE = 256  # captions of a class in one forward


class Pictures(Dataset[tuple[Tensor, int, str]]):
    """Item i: (3, S, S) float32 transformed, its label, and one of its captions."""

    def __init__(self, split: Split, class_names: list[str], transform: Any) -> None:
        self.split, self.class_names, self.transform = split, class_names, transform

    def __len__(self) -> int:
        return len(self.split.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        label = self.split.labels[i]
        text = prefixed(self.class_names[label], random.choice(self.split.captions[i]))
        return self.transform(opened(self.split.files[i])), label, text


def train(
    clip: LoadedClip, material: Material, hp: MMFTHyperparameters, seed: int, device: torch.device
) -> tuple[dict[str, Tensor], Head, float]:
    """-> (the best epoch's state_dict on the CPU, its head, its val top-1). `clip` is left as it is."""
    torch.manual_seed(seed)
    random.seed(seed)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more loaders than cores
    model = copy.deepcopy(clip.model).to(device)
    preprocess = PreprocessCfg(**clip.model.visual.preprocess_cfg)
    augmented = image_transform_v2(preprocess, is_train=True)
    plain = image_transform_v2(preprocess, is_train=False)
    options: dict[str, Any] = {"num_workers": LOADERS, "pin_memory": device.type == "cuda"}
    batch = hp.batch_size
    loader = DataLoader(
        Pictures(material.train, material.class_names, augmented), batch_size=batch, shuffle=True, **options
    )
    val_loader = DataLoader(Pictures(material.val, material.class_names, plain), batch_size=batch, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hp.learning_rate, weight_decay=hp.weight_decay)
    total = hp.epochs * len(loader)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    amp = device.type == "cuda"  # on a GPU the plain way is mixed precision too
    best: tuple[dict[str, Tensor], Head, float] | None = None
    for _ in range(hp.epochs):
        model.train()
        freeze_batch_norm_statistics(model)
        for images, labels, texts in loader:
            tokens = clip.tokenizer(list(texts)).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                image_emb = model.encode_image(images.to(device), normalize=True)
                text_emb = model.encode_text(tokens, normalize=True)
            scale = model.logit_scale.exp()
            loss, _ = mmft_loss(image_emb.float(), text_emb.float(), scale, labels.to(device), hp.w, hp.variant)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            _ = loss.item()
        model.eval()
        head = Head.of_prototypes(prototypes(model, clip, material, device), float(model.logit_scale.detach().exp()))
        val = validate(model, head, val_loader, device)
        if best is None or val > best[2]:
            best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}, head, val
    assert best is not None
    return best


@torch.no_grad()
def prototypes(model: Any, clip: LoadedClip, material: Material, device: torch.device) -> Tensor:
    """(C, D): every caption of a class encoded, one class after another."""
    rows = []
    for label, name in enumerate(material.class_names):
        pairs = zip(material.train.labels, material.train.captions, strict=True)
        texts = [prefixed(name, caption) for own, captions in pairs if own == label for caption in captions]
        tokens = clip.tokenizer(texts).to(device)
        encoded = torch.cat([model.encode_text(part, normalize=True) for part in torch.split(tokens, AT_ONCE)])
        rows.append(F.normalize(encoded.mean(0), dim=-1).cpu())
    return torch.stack(rows)


@torch.no_grad()
def validate(model: Any, head: Head, loader: Any, device: torch.device) -> float:
    embeddings, labels = [], []
    for images, label, _ in loader:
        embeddings.append(model.encode_image(images.to(device), normalize=True).float().cpu())
        labels.append(label)
    return head.top1(torch.cat(embeddings), torch.cat(labels))
