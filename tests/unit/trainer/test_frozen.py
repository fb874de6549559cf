"""Methods on frozen features, against other implementations of the same optimum or formula."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from services.trainer import frozen
from services.trainer.features import Features
from services.trainer.methods import METHODS, build
from services.trainer.methods.gda import gaussian
from services.trainer.methods.logistic_regression import DEFAULT, GRID, Regression
from services.trainer.threads import threads_for
from services.trainer.training.memory import peak_memory
from shared.clip.loading import encode_image, normalise
from shared.clip.projection import last_projection
from shared.errors import InvalidInput

NAMES = ["a", "b", "c"]


def clusters(n: int, seed: int = 0, dim: int = 8, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """(3 n, dim) of length 1 around three centres, and their labels."""
    centres = F.normalize(torch.randn(3, dim, generator=torch.Generator().manual_seed(7)), dim=-1)
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(3 * n) % 3
    return F.normalize(centres[labels] + noise * torch.randn(3 * n, dim, generator=rng), dim=-1), labels


def features(shots: int = 6, val: int = 5) -> Features:
    (train, train_labels), (val_emb, val_labels) = clusters(shots, 1), clusters(val, 2)
    prototypes = F.normalize(clusters(1, 3, noise=0.2)[0], dim=-1)
    return Features(NAMES, prototypes, 20.0, shots, train, train_labels, val_emb, val_labels)


def without_val(given: Features) -> Features:
    return replace(given, val=given.val[:0], val_labels=given.val_labels[:0])


# -- linear probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dim"), [(20, 8), (4, 40)])  # more images than dimensions, and fewer
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0, 1e4])
def test_the_probe_is_scikit_learns_at_the_same_regularisation(c, n, dim):
    x, labels = clusters(n, dim=dim)
    weight, bias = Regression(x, labels, 3).fit(c)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=100_000).fit(x.double().numpy(), labels.numpy())
    np.testing.assert_allclose(weight, theirs.coef_, rtol=1e-3, atol=1e-4 * np.abs(theirs.coef_).max())
    # A constant added to every bias changes no probability.
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), rtol=1e-3, atol=1e-3)


def test_a_start_elsewhere_ends_at_the_same_optimum():
    x, labels = clusters(20)
    regression = Regression(x, labels, 3)
    cold = regression.fit(10.0)
    warm = regression.fit(10.0, regression.fit(0.01))
    for one, other in zip(cold, warm, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_probe_takes_the_best_on_val_by_top1_then_nll(tiny):
    (train, labels), (val, val_labels) = clusters(40, 12, noise=0.8), clusters(20, 22, noise=0.8)
    given = replace(features(), train=train, train_labels=labels, val=val, val_labels=val_labels)
    found = build("linear_probe", {}).fit(given, tiny, 0)
    scores = {}
    for c in GRID:
        model = LogisticRegression(C=c, tol=1e-10, max_iter=100_000).fit(given.train.double(), given.train_labels)
        logits = model.decision_function(given.val.double())
        rows = log_softmax(logits, axis=1)[np.arange(len(logits)), given.val_labels]
        scores[c] = (-float((logits.argmax(1) == given.val_labels.numpy()).mean()), float(-rows.mean()))
    assert found.chosen["inverse_regularisation"] == min(GRID, key=lambda c: scores[c])
    assert found.chosen["by"] == "val"
    for point in found.chosen["curve"]:
        top1, nll = scores[point["inverse_regularisation"]]
        assert point["val_top1"] == pytest.approx(-top1)
        assert point["val_nll"] == pytest.approx(nll, rel=1e-2)
    best = [c for c in GRID if scores[c][0] == min(scores.values())[0]]
    assert min(best) < found.chosen["inverse_regularisation"] < max(best)  # the NLL had ties to break


def test_the_probe_without_val_or_with_a_given_value_says_so(tiny):
    given = without_val(features())
    default = build("linear_probe", {}).fit(given, tiny, 0)
    assert default.chosen == {"inverse_regularisation": DEFAULT, "by": "default"}
    same = build("linear_probe", {"inverse_regularisation": DEFAULT}).fit(features(), tiny, 0)
    assert same.chosen == {"inverse_regularisation": DEFAULT, "by": "given"}
    torch.testing.assert_close(same.head.weight, default.head.weight)
    assert default.trainable_parameters == 3 * 8 + 3


# -- GDA ---------------------------------------------------------------------------------------------------------------


def naive_gda(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MMFT.md's formulas, one class after the other."""
    n, d = x.shape
    mu = np.stack([x[labels == c].mean(0) for c in range(3)])
    centred = np.concatenate([x[labels == c] - mu[c] for c in range(3)])
    cov = np.cov(centred, rowvar=False)
    inverse = d * np.linalg.pinv((n - 1) * cov + np.trace(cov) * np.eye(d))
    weight = mu @ inverse
    bias = [math.log(1 / 3) - 0.5 * mu[c] @ inverse @ mu[c] for c in range(3)]
    return weight, np.array(bias)


@pytest.mark.parametrize("n", [2, 6, 40])
def test_gda_equals_a_naive_implementation(n):
    x, labels = clusters(n)
    weight, bias = gaussian(x.double(), labels, 3)
    expected = naive_gda(x.double().numpy(), labels.numpy())
    np.testing.assert_allclose(weight, expected[0], rtol=1e-8)
    np.testing.assert_allclose(bias, expected[1], rtol=1e-8)


def test_gda_with_many_images_is_discriminant_analysis():
    """Then shrinkage vanishes, and both decide by the same means and the same covariance, at other scales."""
    (x, labels), (new, _) = clusters(20_000), clusters(500, 5)
    weight, bias = gaussian(x.double(), labels, 3)
    uniform = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(x.double().numpy(), labels.numpy())
    ours = (new.double() @ weight.T + bias).argmax(1).numpy()
    assert (ours == uniform.predict(new.double().numpy())).mean() > 0.998


def test_gda_with_one_image_a_class_chooses_the_nearest(tiny):
    given = features(shots=1)
    weight, bias = gaussian(given.train.double(), given.train_labels, 3)
    nearest = torch.cdist(given.val.double(), given.train.double()).argmin(1)
    assert ((given.val.double() @ weight.T + bias).argmax(1) == given.train_labels[nearest]).all()


def test_gda_is_the_zero_shot_classifier_plus_alpha_times_the_gaussian(tiny):
    given = features()
    weight, bias = naive_gda(given.train.double().numpy(), given.train_labels.numpy())
    for alpha in (0.0, 0.25, 3.0):
        head = build("gda", {"alpha": alpha}).fit(given, tiny, 0).head
        x = given.val.double().numpy()
        expected = 20.0 * x @ given.prototypes.double().numpy().T + alpha * (x @ weight.T + bias)
        np.testing.assert_allclose(head.logits(given.val), expected, rtol=1e-3, atol=1e-3)


def test_alpha_is_the_best_on_val_and_the_smaller_of_equals(tiny):
    given = features()
    chosen = build("gda", {}).fit(given, tiny, 0).chosen
    tried = [10.0**p for p in range(-4, 3)]
    top1 = {a: build("gda", {"alpha": a}).fit(given, tiny, 0).head.top1(given.val, given.val_labels) for a in tried}
    assert chosen["alpha"] == min(a for a in tried if top1[a] == max(top1.values()))
    assert [point["val_top1"] for point in chosen["curve"]] == [pytest.approx(top1[a]) for a in tried]
    assert build("gda", {}).fit(without_val(given), tiny, 0).chosen == {"alpha": 1.0, "by": "default"}
    perfect = replace(given, val=given.prototypes, val_labels=torch.arange(3))  # zero-shot gets all of them right
    assert build("gda", {}).fit(perfect, tiny, 0).chosen["alpha"] == 1e-4


# -- ProLIP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_balls(tiny, balls) -> Features:
    rng = torch.Generator().manual_seed(0)
    projection, prototypes = last_projection(tiny), F.normalize(torch.randn(3, 16, generator=rng), dim=-1)

    def embed(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return encode_image(tiny, images), projection.unprojected(tiny.model, normalise(images, tiny))

    (train, raw), (val, val_raw) = embed(balls.images), embed(balls.val_images)
    return Features(balls.class_names, prototypes, 20.0, 3, train, balls.labels, val, balls.val_labels, raw, val_raw)


def test_one_small_prolip_step_goes_against_the_gradient(tiny, of_balls):
    """Adam's first step is the sign of the gradient times the learning rate, at which the penalty is still flat."""
    found = build("prolip", {"steps": 1, "learning_rate": 1e-4}).fit(of_balls, tiny, 0)
    original = tiny.model.visual.proj.detach().double().requires_grad_()
    logits = 20.0 * F.normalize(of_balls.train_unprojected.double() @ original, dim=-1) @ of_balls.prototypes.double().T
    gradient = torch.autograd.grad(F.cross_entropy(logits, of_balls.train_labels), original)[0]
    moved = found.changed["visual.proj"].double() - original.detach()
    clear = gradient.abs() > gradient.abs().mean() / 10
    torch.testing.assert_close(moved[clear], -1e-4 * gradient.sign()[clear], rtol=1e-2, atol=1e-7)


def test_a_prolip_step_on_a_layers_weight_goes_against_its_gradient(tiny_resnet):
    """Which is stored the other way round than a ViT's bare projection, and has a bias."""
    projection = last_projection(tiny_resnet)
    assert projection.of_layer
    rng = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(3, len(projection.weight), generator=rng), dim=-1)
    x, labels = torch.randn(9, projection.weight.shape[1], generator=rng), torch.arange(9) % 3
    given = Features(NAMES, prototypes, 20.0, 3, train_labels=labels, train_unprojected=x)
    found = build("prolip", {"steps": 1, "learning_rate": 1e-4}).fit(given, tiny_resnet, 0)
    weight = projection.weight.clone().requires_grad_()
    logits = 20.0 * F.normalize(projection.project(x, weight), dim=-1) @ prototypes.T
    gradient = torch.autograd.grad(F.cross_entropy(logits, labels), weight)[0]
    moved = found.changed[projection.name] - projection.weight
    clear = gradient.abs() > gradient.abs().mean() / 10
    torch.testing.assert_close(moved[clear], -1e-4 * gradient.sign()[clear], rtol=1e-2, atol=1e-7)


def test_prolip_ends_at_the_optimum_of_its_objective(tiny, of_balls):
    """Whose gradient is 0: the cross-entropy's is balanced by the penalty's, 2 * lambda * (W - W0)."""
    found = build("prolip", {"steps": 3000, "learning_rate": 1e-3, "penalty": 0.5}).fit(of_balls, tiny, 0)
    original = tiny.model.visual.proj.detach().double()
    weight = found.changed["visual.proj"].double().requires_grad_()
    logits = 20.0 * F.normalize(of_balls.train_unprojected.double() @ weight, dim=-1) @ of_balls.prototypes.double().T
    gradient = torch.autograd.grad(F.cross_entropy(logits, of_balls.train_labels), weight)[0]
    balance = gradient + 2 * 0.5 * (weight.detach() - original)
    assert balance.norm() < 1e-2 * gradient.norm()
    loss = F.cross_entropy(logits, of_balls.train_labels) + 0.5 * (weight - original).square().sum()
    assert found.chosen["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert found.chosen["relative_change"] == pytest.approx(
        float((weight - original).detach().norm() / original.norm()), rel=1e-4
    )


def test_prolip_moves_less_the_larger_the_penalty_which_is_one_over_the_shots(tiny, of_balls):
    def moved(**hyperparameters: float) -> float:
        run = build("prolip", {"learning_rate": 1e-3, **hyperparameters})
        return run.fit(of_balls, tiny, 0).chosen["relative_change"]

    assert moved(penalty=100.0) < moved(penalty=1.0) < moved(penalty=0.0)
    assert moved() == moved(penalty=1 / 3)
    of_all = build("prolip", {}).fit(replace(of_balls, shots=None), tiny, 0)
    assert of_all.chosen["penalty"] == pytest.approx(3 / 10)  # 10 images of 3 classes


def test_prolip_leaves_the_model_alone_and_needs_only_unprojected_features(tiny, of_balls):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    method = build("prolip", {"learning_rate": 1e-3})
    found = method.fit(replace(of_balls, train=torch.empty(0), val=torch.empty(0)), tiny, 0)
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert list(found.changed) == ["visual.proj"]
    assert found.changed["visual.proj"].shape == before["visual.proj"].shape
    assert not torch.equal(found.changed["visual.proj"], before["visual.proj"])
    assert found.trainable_parameters == before["visual.proj"].numel()
    again = method.fit(of_balls, tiny, 1)
    assert torch.equal(found.changed["visual.proj"], again.changed["visual.proj"])


def test_prolip_that_diverges_says_what_to_lower(tiny, of_balls):
    broken = replace(of_balls, logit_scale=float("inf"))
    with pytest.raises(InvalidInput, match="learning_rate") as caught:
        build("prolip", {}).fit(broken, tiny, 0)
    assert caught.value.code == "loss_not_finite"


# -- as runs -----------------------------------------------------------------------------------------------------------

NOT_FINE_TUNES = [name for name, method in METHODS.items() if method.kind != "fine_tune"]


@pytest.mark.parametrize("name", NOT_FINE_TUNES)
def test_a_run_scores_its_head_on_the_validation_images(name, tiny, of_balls, balls):
    result = frozen.fit(tiny, build(name, {"learning_rate": 0.05} if name == "prolip" else {}), of_balls, 0)
    state = {**tiny.model.state_dict(), **result.model_state}
    raw = of_balls.val_unprojected @ state["visual.proj"]
    expected = result.head.logits(F.normalize(raw, dim=-1)).argmax(1) == balls.val_labels
    assert result.val_top1 == pytest.approx(expected.double().mean().item())
    if name == "prolip":  # by the base model's embeddings the score would be another
        assert result.val_top1 != result.head.top1(of_balls.val, balls.val_labels)
    assert (result.best_epoch, result.steps, result.val_history) == (0, 0, [])
    assert result.seconds > 0
    assert result.peak_memory_bytes is not None
    assert result.peak_memory_bytes > 10 * 2**20
    assert (result.trainable_parameters > 0) == (name in ("linear_probe", "prolip"))
    assert set(result.model_state) == ({"visual.proj"} if name == "prolip" else set())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_the_peak_memory_is_this_runs_and_not_an_earlier_ones(tiny, of_balls):
    earlier = torch.ones(300 * 2**20, dtype=torch.uint8)
    before = peak_memory(torch.device("cpu"))
    del earlier
    result = frozen.fit(tiny, build("zero_shot", {}), of_balls, 0)
    assert (result.peak_memory_bytes or 0) < before - 200 * 2**20


@pytest.mark.parametrize("name", NOT_FINE_TUNES)
def test_a_run_without_validation_has_no_score(name, tiny, of_balls):
    empty = torch.empty(0)
    bare = replace(of_balls, val=empty, val_labels=empty.long(), val_unprojected=empty)
    assert frozen.fit(tiny, build(name, {}), bare, 0).val_top1 is None


def test_small_fits_take_one_thread_and_leave_the_rest_as_they_were():
    torch.set_num_threads(2)
    with threads_for(48):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with threads_for(100_000):
        assert torch.get_num_threads() == 2


def test_zero_shot_needs_no_images(tiny):
    prototypes = F.normalize(torch.randn(3, 16), dim=-1)
    result = frozen.fit(tiny, build("zero_shot", {}), Features(NAMES, prototypes, 20.0), 0)
    torch.testing.assert_close(result.head.weight, 20.0 * prototypes)
    assert not result.head.bias.any()


def test_a_fine_tune_is_not_fitted_here(tiny):
    with pytest.raises(TypeError, match="mmft"):
        frozen.fit(tiny, build("mmft", {}), features(), 0)


@pytest.mark.parametrize("name", ["linear_probe", "gda", "prolip"])
def test_what_the_data_do_not_allow_is_refused(name, tiny, of_balls):
    method = build(name, {})
    kept = of_balls.train_labels != 2
    some = replace(
        of_balls,
        train=of_balls.train[kept],
        train_labels=of_balls.train_labels[kept],
        train_unprojected=of_balls.train_unprojected[kept],
    )
    with pytest.raises(InvalidInput, match="none of blue ball") as caught:
        frozen.fit(tiny, method, some, 0)
    assert caught.value.code == "class_without_images"

    broken = replace(of_balls, train=of_balls.train * math.nan, train_unprojected=of_balls.train_unprojected * math.nan)
    with pytest.raises(InvalidInput, match="not all finite"):
        frozen.fit(tiny, method, broken, 0)

    short = replace(of_balls, val=of_balls.val[:-1], val_unprojected=of_balls.val_unprojected[:-1])
    with pytest.raises(InvalidInput, match=r"8 val images for 9 labels"):
        frozen.fit(tiny, method, short, 0)


def test_one_class_is_no_classifier(tiny):
    with pytest.raises(InvalidInput, match="at least 2 classes"):
        frozen.fit(tiny, build("zero_shot", {}), Features(["a"], torch.ones(1, 16) / 4, 20.0), 0)


def test_missing_classes_are_counted_where_they_are_many(tiny):
    names = [f"class {i}" for i in range(40)]
    given = replace(features(), class_names=names)
    with pytest.raises(InvalidInput, match="class 12 and 27 more"):
        build("gda", {}).fit(given, tiny, 0)
