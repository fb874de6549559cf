"""What is trained, at which rate, and what comes of adapters."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from services.trainer.methods.base import FineTuneHyperparameters
from services.trainer.training.adapters import adaptable
from services.trainer.training.loop import Run
from services.trainer.training.optim import layer_factors, parameter_groups, schedule
from shared.clip.loading import encode_image, encode_text, load_clip, save_clip
from shared.errors import InvalidInput
from tests.unit.trainer.fine_tuning import Classes, HeadOnly, Pairs, features_of, make, tune


def changed(clip, result) -> set[str]:
    before = clip.model.state_dict()
    return {name for name, value in result.model_state.items() if not torch.equal(value, before[name])}


def test_full_trains_everything(tiny, balls):
    names = {name for name, _ in tiny.model.named_parameters()}
    assert changed(tiny, tune(tiny, make(Pairs), balls)) == names


@pytest.mark.parametrize(("trainable", "prefix"), [("visual", "visual."), ("text", "")])
def test_one_tower(tiny, balls, trainable, prefix):
    names = {name for name, _ in tiny.model.named_parameters()}
    visual = {name for name in names if name.startswith("visual.")}
    wanted = visual if trainable == "visual" else names - visual  # the logit scale goes with the texts
    assert changed(tiny, tune(tiny, make(Pairs, trainable=trainable), balls)) == wanted


def test_the_last_projections(tiny, tiny_resnet, balls):
    method = make(Pairs, trainable="projections")
    assert changed(tiny, tune(tiny, method, balls)) == {"visual.proj", "text_projection"}
    resnet = {"visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias", "text_projection"}
    assert changed(tiny_resnet, tune(tiny_resnet, method, balls)) == resnet


def test_a_method_without_texts_leaves_the_text_tower(tiny, balls):
    result = tune(tiny, make(HeadOnly), balls)
    assert all(name.startswith("visual.") for name in changed(tiny, result))
    with pytest.raises(InvalidInput) as caught:
        tune(tiny, make(HeadOnly, trainable="text"), balls)
    assert (caught.value.code, caught.value.param) == ("nothing_to_train", "method.hyperparameters.trainable")


def test_the_head_is_trained_and_is_the_classifier(tiny, balls):
    method = make(Classes, trainable="visual")
    result = tune(tiny, method, balls)
    with Run(tiny, method, balls, features_of(tiny, method, balls), 7, torch.device("cpu")) as run:
        start = run.trained.copy()
    assert not torch.equal(result.head.weight, start["head.weight"])
    assert not torch.equal(result.head.bias, start["head.bias"])
    in_visual = sum(p.numel() for p in tiny.model.visual.parameters())
    assert result.trainable_parameters == in_visual + 3 * 16 + 3
    prototypes = tune(tiny, make(Pairs, trainable="visual"), balls).head
    scale = float(tiny.model.logit_scale.detach().exp())
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.full((3,), scale))
    assert not prototypes.bias.any()


@pytest.mark.parametrize("model", ["tiny", "tiny_resnet"])
def test_adapters_merge_into_ordinary_weights(request, balls, tmp_path, model):
    """What is saved loads as a plain open_clip model and computes what the adapted one did."""
    clip = request.getfixturevalue(model)
    clip = replace(clip, model=copy.deepcopy(clip.model))
    for name, parameter in clip.model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)  # open_clip starts with 0, which would hide the layers before
    method = make(Pairs, trainable="lora")
    texts = ["a red ball", "nothing like it at all"]
    with Run(clip, method, balls, features_of(clip, method, balls), 7, torch.device("cpu")) as run:
        at_the_start = run.trained.model.encode_image(balls.val_images.float() / 127.5 - 1, normalize=True)
        for name, parameter in run.trained.parameters.items():
            if ".lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        state, _ = run.scorer.classifier()
        adapted = run.trained.model.eval()
        with torch.no_grad():
            image_emb = adapted.encode_image(balls.val_images.float() / 127.5 - 1, normalize=True)
            text_emb = adapted.encode_text(clip.tokenizer(texts), normalize=True)
        trainable = sum(p.numel() for p in run.trained.parameters.values())
    torch.testing.assert_close(encode_image(clip, balls.val_images), at_the_start.detach())  # B = 0
    assert state.keys() == clip.model.state_dict().keys()
    save_clip(clip, state, tmp_path / "saved")
    plain = load_clip(str(tmp_path / "saved"), tmp_path, [tmp_path])
    torch.testing.assert_close(encode_image(plain, balls.val_images), image_emb, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode_text(plain, texts), text_emb, rtol=1e-4, atol=1e-5)
    assert (encode_image(clip, balls.val_images) - image_emb).abs().max() > 1e-3  # a ResNet at random sees little
    assert (encode_text(clip, texts) - text_emb).abs().max() > 0.01
    assert trainable < 0.05 * sum(p.numel() for p in clip.model.parameters())


def test_adapters_are_in_attention_linear_layers_and_ungrouped_convolutions(tiny, tiny_resnet, balls):
    lora = make(Pairs, trainable="lora")
    block = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    blocks = {f"{tower}transformer.resblocks.{i}.{name}" for tower in ("visual.", "") for i in (0, 1) for name in block}
    assert changed(tiny, tune(tiny, lora, balls)) == blocks | {"visual.conv1.weight", "logit_scale"}
    with Run(tiny_resnet, lora, balls, features_of(tiny_resnet, lora, balls), 7, torch.device("cpu")) as run:
        assert run.trained.adapters is not None
        of_resnet = set(run.trained.adapters.merged())
    convolutions = {f"visual.layer{i}.0.conv{j}.weight" for i in (1, 2, 3, 4) for j in (1, 2, 3)}
    assert {name for name in of_resnet if ".layer" in name and ".conv" in name} == convolutions
    assert "visual.layer4.0.downsample.0.weight" in of_resnet
    assert not any("attnpool" in name for name in of_resnet)  # reads its layers' weights without calling them
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    assert adaptable(grouped) == ["1"]


def test_adapters_in_one_tower_and_of_a_rank(tiny, balls):
    class OneTower(FineTuneHyperparameters):
        lora_towers: str = "visual"

    class Visual(Classes):
        Hyperparameters = OneTower

    result = tune(tiny, make(Visual, trainable="lora"), balls)
    assert {name.split(".")[0] for name in changed(tiny, result)} == {"visual", "logit_scale"}
    counts = [
        tune(tiny, make(Pairs, trainable="lora", lora_rank=rank, epochs=1), balls).trainable_parameters
        for rank in (1, 2)
    ]
    assert counts[1] - 1 == 2 * (counts[0] - 1)


def test_adapters_leave_the_base_weights_alone(tiny, balls):
    method = make(Pairs, trainable="lora")
    with Run(tiny, method, balls, features_of(tiny, method, balls), 7, torch.device("cpu")) as run:
        run.run(lambda report: None, lambda report: None)
        held = dict(run.trained.model.named_parameters())
        attention = "visual.transformer.resblocks.0.attn"
        base = tiny.model.get_submodule(attention)
        assert torch.equal(held[f"{attention}.parametrizations.in_proj_weight.original"], base.in_proj_weight)
        assert torch.equal(held[f"{attention}.out_proj.parametrizations.weight.original"], base.out_proj.weight)


def test_what_is_decayed(tiny):
    parameters = dict(tiny.model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    hp = FineTuneHyperparameters(weight_decay=0.5)
    decayed, spared = sorted(parameter_groups(parameters, hp), key=lambda group: -group["weight_decay"])
    spared_names = {names[p] for p in spared["params"]}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0)
    assert {"logit_scale", "ln_final.weight", "ln_final.bias", "visual.ln_pre.weight"} <= spared_names
    assert {"text_projection", "visual.conv1.weight"} <= {names[p] for p in decayed["params"]}
    assert len(names) == len(decayed["params"]) + len(spared["params"])
    (everything,) = parameter_groups(parameters, FineTuneHyperparameters(weight_decay=0.5, decay="all"))
    assert everything["weight_decay"] == 0.5
    assert len(everything["params"]) == len(names)


def test_layer_decay_in_a_vit_and_a_text_transformer(tiny):
    factors = layer_factors([*dict(tiny.model.named_parameters()), "head.weight"], 0.5)
    expected = {
        "logit_scale": 1,
        "head.weight": 1,
        "visual.proj": 1,
        "visual.ln_post.weight": 1,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 1 / 2,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 1 / 4,
        "visual.conv1.weight": 1 / 8,
        "visual.class_embedding": 1 / 8,
        "visual.positional_embedding": 1 / 8,
        "visual.ln_pre.bias": 1 / 8,
        "text_projection": 1,
        "ln_final.weight": 1,
        "transformer.resblocks.1.ln_1.weight": 1 / 2,
        "transformer.resblocks.0.ln_1.weight": 1 / 4,
        "token_embedding.weight": 1 / 8,
        "positional_embedding": 1 / 8,
    }
    assert {name: factors[name] for name in expected} == expected
    assert set(layer_factors(dict(tiny.model.named_parameters()), 1.0).values()) == {1.0}


def test_layer_decay_in_other_towers(tiny_resnet):
    resnet = layer_factors(dict(tiny_resnet.model.named_parameters()), 0.5)
    assert resnet["visual.attnpool.c_proj.weight"] == 1
    assert resnet["visual.layer4.0.conv1.weight"] == resnet["visual.layer4.0.downsample.0.weight"] == 1 / 2
    assert resnet["visual.layer1.0.bn1.weight"] == 1 / 16
    assert resnet["visual.conv1.weight"] == resnet["visual.bn3.bias"] == 1 / 32
    # names of the starter's towers: timm's EfficientNet and Hugging Face's BERT
    names = [
        "visual.trunk.conv_stem.weight",
        "visual.trunk.blocks.0.0.conv_dw.weight",
        "visual.trunk.blocks.1.0.conv_pw.weight",
        "visual.trunk.blocks.1.1.conv_pw.weight",
        "visual.trunk.conv_head.weight",
        "visual.head.proj.weight",
        "text.transformer.embeddings.word_embeddings.weight",
        "text.transformer.embeddings.LayerNorm.weight",
        "text.transformer.encoder.layer.0.attention.self.query.weight",
        "text.transformer.encoder.layer.1.output.dense.weight",
    ]
    assert list(layer_factors(names, 0.5).values()) == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1, 1 / 8, 1 / 8, 1 / 4, 1 / 2]


def test_a_lower_layer_moves_less(tiny, balls):
    method = make(Pairs, layer_decay=0.1, epochs=1, batch_size=10)  # one step of AdamW: each number moves by its rate
    result = tune(tiny, method, balls)
    before = tiny.model.state_dict()

    def moved(name: str) -> float:
        return float((result.model_state[name] - before[name]).abs().max())

    assert moved("visual.proj") == pytest.approx(3e-3, rel=0.01)
    assert moved("visual.transformer.resblocks.1.mlp.c_fc.weight") == pytest.approx(3e-4, rel=0.01)
    assert moved("visual.conv1.weight") == pytest.approx(3e-6, rel=0.05)


def test_warmup_rises_in_a_line_and_the_cosine_falls_to_zero():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert schedule(0, 1) == 1
    assert schedule(3, 4, 0.99) == 1  # all of it warm-up


def test_gradients_are_clipped_to_a_norm(tiny, balls):
    norms: list[float] = []
    before: list[float] = []

    method = make(Pairs, max_grad_norm=0.01)
    with Run(tiny, method, balls, features_of(tiny, method, balls), 7, torch.device("cpu")) as run:

        def on_step(report) -> None:
            before.append(report.grad_norm)
            norms.append(float(nn.utils.get_total_norm([p.grad for p in run.trained.parameters.values()])))

        run.run(on_step, lambda report: None)
    assert norms == pytest.approx([0.01] * 12, rel=1e-3)
    assert min(before) > 0.01


def test_a_frozen_tower_is_not_counted_nor_given_gradients(tiny, balls):
    clip = replace(tiny, model=copy.deepcopy(tiny.model))
    method = make(Pairs, trainable="visual")
    with Run(clip, method, balls, features_of(clip, method, balls), 7, torch.device("cpu")) as run:
        run.gradients.compute(run.feed.draw(0), 0)
        with_gradient = {name for name, p in run.trained.model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in clip.model.named_parameters() if name.startswith("visual.")}
