"""Every test of the project: `python test_all.py`, or pytest test_all.py.

A test holds the code against something that does not share its mistakes: numbers of the published
networks, values computed by hand or in plain loops, gradients by finite differences, and the real
main() of train.py and eval.py on a few small frames.
"""
import atexit
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import losses
import metrics
import train
import unet

evaluation = importlib.import_module("eval")        # eval.py, beside the built-in eval
HERE = Path(__file__).resolve().parent
FOLDER = Path(tempfile.mkdtemp(prefix="unet-test-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def raises(kind, function, *args):
    """Assert that the call raises `kind` -> its message."""
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def close(a, b, relative=1e-5, absolute=1e-6):
    """Assert that two tensors (or numbers) agree, NaN with NaN."""
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(),
                               rtol=relative, atol=absolute, equal_nan=True)


class Hostile:
    """An object whose pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(FOLDER / "owned"),)


def scenes():
    """A small tree of generated scenes, drawn once: 6 training and 3 validation frames."""
    data.make_scenes(FOLDER / "scenes", train=6, val=3)
    return FOLDER / "scenes"


SMALL = "--model resnet18 --crop 64 64 --batch 2 --epochs 2 --amp off --device cpu".split()


def small_run(out, *options):
    """train.main() on the small tree -> the rows of its log."""
    return train.main(["--data", str(scenes()), "--out", str(out), *SMALL, *options])


def checkpoint():
    """The folder of a small finished run, trained once."""
    out = FOLDER / "run"
    if not (out / "best.pt").exists():
        small_run(out, "--copyblob", "0.5", "--class-weights", "enet")
    return out


# ------------------------------------------------------------------------------------- unet

# Of the published networks (torchvision, facebookresearch/ConvNeXt, 1914669687/ConvUNeXt) with
# the weights that `fill` gives: a hash of all keys and shapes; then for each output its shape,
# mean, first and sixth value.
PUBLISHED = {
    "resnet18": ("05d62c7320b26c54", [
        ((64, 32, 48), 0.2927104, 0.4516132, 0.6583633),
        ((64, 16, 24), 0.8200769, 0.237898, 0.2939439),
        ((128, 8, 12), 1.106259, 1.929395, 2.120271),
        ((256, 4, 6), 0.6997933, 0.4553053, 0.5298219),
        ((512, 2, 3), 0.8354534, 2.404161, 2.020325)]),
    "resnet34": ("adc7641db1c67d20", [
        ((64, 32, 48), 0.2927104, 0.4516132, 0.6583633),
        ((64, 16, 24), 0.821459, 0.2681229, 0.3305012),
        ((128, 8, 12), 1.167162, 2.097874, 2.144202),
        ((256, 4, 6), 0.5703599, 1.518613, 1.497737),
        ((512, 2, 3), 1.413898, 3.803309, 3.759392)]),
    "resnet50": ("569b8747885996c6", [
        ((64, 32, 48), 0.2927104, 0.4516132, 0.6583633),
        ((256, 16, 24), 2.22501, 5.303634, 5.198433),
        ((512, 8, 12), 1.940792, 6.846388, 7.721308),
        ((1024, 4, 6), 7.847245, 19.50659, 19.81554),
        ((2048, 2, 3), 11.73507, 41.75172, 48.51268)]),
    "convnext_tiny": ("a7735d83e2f866dc", [
        ((96, 16, 24), -0.01080847, -3.165019, -0.7931687),
        ((192, 8, 12), -0.01899217, -3.855342, -3.557726),
        ((384, 4, 6), 0.002049597, -15.90885, -15.9319),
        ((768, 2, 3), -0.008713127, -6.88745, -6.630893)]),
    "convunext": ("157d15644ee68eeb", [
        ((19, 64, 96), 0.02403626, 0.3677448, 0.3562467),
        ((19, 70, 90), 0.03429759, 0.4288312, 0.4473823)]),
}


def fill(module):
    """Give every weight a fixed value of a fitting scale."""
    state = module.state_dict()
    for i, key in enumerate(sorted(state)):
        t = 0.37 * torch.arange(state[key].numel(), dtype=torch.float64) + i
        t = torch.sin(t).reshape(state[key].shape)
        if key.endswith("num_batches_tracked"):
            t = 0 * t
        elif key.endswith("running_var"):
            t = 1 + 0.5 * t
        elif key.endswith(("running_mean", "bias")):
            t = 0.1 * t
        else:
            t = 1 + 0.1 * t if t.ndim == 1 else t * math.sqrt(3 / t[0].numel())
        state[key] = t.to(state[key].dtype)
    module.load_state_dict(state)


def wave(h, w):
    """The input that goes with `fill`."""
    t = 0.11 * torch.arange(3 * h * w, dtype=torch.float64)
    return torch.sin(t).reshape(1, 3, h, w).float()


@torch.no_grad()
def test_published_networks():
    for name, (known, numbers) in PUBLISHED.items():
        model = unet.build_model(name).eval()
        module = model if name == "convunext" else model.encoder
        keys = "\n".join(f"{k} {list(v.shape)}" for k, v in sorted(module.state_dict().items()))
        assert hashlib.sha256(keys.encode()).hexdigest().startswith(known), "keys or shapes differ"
        fill(module)
        outputs = module(wave(64, 96))
        if module is model:
            outputs = [outputs, module(wave(70, 90))]
        assert len(outputs) == len(numbers)
        for output, (shape, mean, first, sixth) in zip(outputs, numbers):
            assert output.shape[1:] == shape
            tolerance = 1e-4 * output.abs().mean().item()
            flat = output.flatten().double()
            close(torch.stack([flat.mean(), flat[0], flat[5]]), [mean, first, sixth], 1e-4,
                  tolerance)


@torch.no_grad()
def test_any_size():
    for name in unet.MODELS:
        model = unet.build_model(name, num_classes=5).eval()
        for size in ((1, 1), (1, 40), (33, 65), (63, 2)):
            logits = model(torch.zeros(2, 3, *size))
            assert logits.shape == (2, 5, *size) and logits.isfinite().all(), (name, size)


def test_every_parameter_learns():
    for name in unet.MODELS:
        model = unet.build_model(name, num_classes=3)
        fill(model)
        for module in model.modules():
            module.drop_path = 0.0                      # else a block may be skipped by chance
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        idle = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle, (name, idle)


def test_stochastic_depth():
    block = unet.ConvNeXtBlock(4, drop_path=0.5)
    torch.nn.init.ones_(block.gamma)
    x = torch.randn(400, 4, 2, 2)
    whole = block.eval()(x) - x
    kept = (block.train()(x) - x).flatten(1).abs().sum(1) > 0
    assert 140 < kept.sum() < 260                       # of 400, p = 1/2: six sigma
    close(block.train()(x[:1].expand(4000, -1, -1, -1)).mean(0), (x + whole)[0], 0.05, 0.05)


def test_depthwise_gradients():
    for mode in ("zeros", "reflect"):
        conv = unet.DepthwiseConv(5, mode).double()
        x = torch.randn(2, 5, 6, 9, dtype=torch.float64, requires_grad=True)
        results = []
        for y in (conv(x), torch.nn.Conv2d.forward(conv, x)):
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *conv.parameters()])])
        for ours, torchs in zip(*results):
            close(ours, torchs, 1e-12, 1e-12)


def test_imagenet_weights():
    with tempfile.TemporaryDirectory() as folder, mock.patch("torch.hub.get_dir", lambda: folder):
        with mock.patch("urllib.request.urlopen", side_effect=urllib.error.URLError("no network")):
            message = raises(OSError, unet.build_model, "resnet18", 19, True)
        for part in (unet.ENCODERS["resnet18"][1], f"{folder}/checkpoints", "--no-pretrained"):
            assert part in message
        source = unet.build_model("resnet18")
        fill(source.encoder)
        state = {**source.encoder.state_dict(), "fc.weight": torch.zeros(9, 9)}
        path = Path(folder, "checkpoints", "resnet18-f37072fd.pth")
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)                         # as put there by hand
        model = unet.build_model("resnet18", 19, pretrained=True)
        for key, value in model.encoder.state_dict().items():
            assert torch.equal(value, state[key]), key
        del state["layer1.0.conv1.weight"]              # nothing may be missing
        torch.save(state, path)
        message = raises(OSError, unet.build_model, "resnet18", 19, True)
        assert "layer1.0.conv1.weight" in message and str(path.parent) in message
        torch.save({"conv1.weight": Hostile()}, path)
        assert str(path.parent) in raises(OSError, unet.build_model, "resnet18", 19, True)
        assert not (FOLDER / "owned").exists()
    raises(ValueError, unet.build_model, "convunext", 19, True)
    raises(ValueError, unet.build_model, "vgg")


# ----------------------------------------------------------------------------------- losses


def loop_loss(name, logits, target, w):
    """A loss from its formula, pixel by pixel in plain Python."""
    n, c, h, width = logits.shape
    p, t = logits.double().softmax(1).tolist(), target.tolist()
    pixels = [(i, y, x) for i in range(n) for y in range(h) for x in range(width)
              if t[i][y][x] != 255]
    total = sum(w[t[i][y][x]] for i, y, x in pixels)
    if name == "dice":
        scores = {}
        for k in {t[i][y][x] for i, y, x in pixels}:
            overlap = sum(p[i][k][y][x] for i, y, x in pixels if t[i][y][x] == k)
            sizes = sum(p[i][k][y][x] + (t[i][y][x] == k) for i, y, x in pixels)
            scores[k] = 2 * overlap / sizes
        return 1 - sum(w[k] * s for k, s in scores.items()) / sum(w[k] for k in scores)
    result = 0.0
    for i, y, x in pixels:
        p_true = p[i][t[i][y][x]][y][x]
        result -= w[t[i][y][x]] * math.log(p_true) * ((1 - p_true) ** 2 if name == "focal" else 1)
    return result / total


def example(seed=0, classes=4):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, classes, 3, 5, generator=g)
    target = torch.randint(0, classes - 1, (2, 3, 5), generator=g)      # the last class is absent
    target[0, 0] = 255
    return logits, target


def test_losses_by_their_formulas():
    logits, target = example()
    for w in (None, [1.0, 3.0, 0.2, 7.0]):
        weights = None if w is None else torch.tensor(w)
        values = {n: losses.build_loss(n, weights)(logits, target) for n in losses.LOSSES}
        for name in ("ce", "focal", "dice"):
            close(values[name], loop_loss(name, logits, target, w or [1.0] * 4))
        close(values["ce+dice"], values["ce"] + values["dice"])
        close(values["ce"], F.cross_entropy(logits, target, weights, ignore_index=255))
        weights = torch.ones(4) if weights is None else weights
        close(losses.focal(logits, target, weights, gamma=0.0), values["ce"], 1e-6)


def test_losses_ignore_255_exactly():
    logits, target = example()
    other = logits.clone()
    other[0, :, 0] = torch.tensor([1e4, -1e4, 3.0, 0.0])[:, None]
    for name in losses.LOSSES:
        gradients = []
        for x in (logits.clone(), other.clone()):
            x.requires_grad_()
            value = losses.build_loss(name)(x, target)
            value.backward()
            gradients.append((value.item(), x.grad))
        assert gradients[0][0] == gradients[1][0], name
        assert torch.equal(gradients[0][1][:, :, 1:], gradients[1][1][:, :, 1:]), name
        assert not gradients[1][1][0, :, 0].any(), name


def test_losses_gradients_by_differences():
    logits, target = example()
    for name in losses.LOSSES:
        loss = losses.build_loss(name, torch.tensor([1.0, 2.0, 0.5, 3.0]))
        x = logits.clone().requires_grad_()
        loss(x, target).backward()
        for at in ((0, 0, 1, 1), (1, 2, 2, 4), (1, 3, 0, 0)):
            step = torch.zeros_like(logits)
            step[at] = 0.05
            slope = (loss(logits + step, target) - loss(logits - step, target)) / 0.1
            close(x.grad[at], slope, 2e-2, 1e-4)


def test_losses_stay_finite():
    logits, target = example()
    for name in losses.LOSSES:
        loss = losses.build_loss(name)
        void = torch.full_like(target, 255)
        for x, t in ((logits, void), (1e4 * logits, target), (0 * logits, target)):
            x = x.clone().requires_grad_()
            value = loss(x, t)
            value.backward()
            assert value.isfinite() and x.grad.isfinite().all(), name
            if (t == 255).all():
                assert value == 0 and not x.grad.any(), name
        with torch.autocast("cpu", torch.bfloat16):
            half = loss(logits.half(), target)
        assert half.dtype == torch.float32
        close(half, loss(logits, target), 1e-2)
    raises(ValueError, losses.build_loss, "mse")
    raises(ValueError, losses.build_loss("ce"), logits, target[:, 1:])


# ---------------------------------------------------------------------------------- metrics


def test_confusion_matrix_by_loops():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (2, 7, 9), generator=g)
    target[target == 3] = 255
    prediction = torch.randint(0, 4, (2, 7, 9), generator=g)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for t, p in zip(target.flatten().tolist(), prediction.flatten().tolist()):
        if t != 255:
            expected[t, p] += 1
    m = metrics.confusion_matrix(prediction.byte(), target.byte(), 4)
    assert m.dtype == torch.int64 and torch.equal(m, expected)
    for wrong in (prediction + 4, prediction - 1):
        raises(ValueError, metrics.confusion_matrix, wrong, target, 4)
    raises(ValueError, metrics.confusion_matrix, prediction, target.clamp(max=200), 4)
    raises(ValueError, metrics.confusion_matrix, prediction[0], target, 4)


def test_scores_by_hand():
    m = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]])
    nan = float("nan")
    close(metrics.pixel_accuracy(m), 9 / 16)
    close(metrics.iou(m), [6 / 9, 3 / 10, 0, nan])      # class 2 is missed, class 3 is nowhere
    close(metrics.dice(m), [12 / 15, 6 / 13, 0, nan])
    close(metrics.iou(m).nanmean(), (6 / 9 + 3 / 10) / 3)
    close(metrics.confusions(m)[:3], [[0, 3 / 9, 0, 0], [3 / 10, 0, 4 / 10, 0], [0, 1, 0, 0]])
    close(metrics.confusions(m).sum(1), 1 - metrics.iou(m))
    close(metrics.iou(torch.tensor([[5, 1], [0, 0]])), [5 / 6, 0])      # predicted, never true: 0


# ------------------------------------------------------------------------------------- data


def test_label_table():
    assert [c.label_id for c in data.CLASSES] == [*range(7, 9), *range(11, 14), 17, *range(19, 29),
                                                  *range(31, 34)]
    assert [c.name for c in data.CLASSES][3:5] == ["wall", "fence"] and len(data.CLASSES) == 19
    for label in range(256):
        ids = [i for i, c in enumerate(data.CLASSES) if c.label_id == label]
        assert data.LABEL_TO_TRAIN[label] == (ids[0] if ids else 255)
    assert all(data.LABEL_TO_TRAIN[data.TRAIN_TO_LABEL[i]] == i for i in range(19))


def write_tree(root, label, image=None, split="train"):
    """A Cityscapes tree of one frame."""
    for kind, end, array in (("leftImg8bit", "leftImg8bit", image),
                             ("gtFine", "gtFine_labelIds", label)):
        path = root / kind / split / "ulm" / f"ulm_000000_000001_{end}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if array is None:
            array = np.zeros((*label.shape[:2], 3), np.uint8)
        Image.fromarray(array).save(path)
    return root


def test_bad_trees_are_named():
    """Every flaw of a tree is an error that names the file, and what is wrong with it."""
    root, good = FOLDER / "bad", np.zeros((4, 6), np.uint8)

    def error(kind, *parts):
        message = raises(kind, lambda: data.Cityscapes(root, "train")[0])
        assert "\n" not in message and all(str(part) in message for part in parts), message

    error(FileNotFoundError, "gtFine_trainvaltest.zip", f"{root}/leftImg8bit/train")
    write_tree(root, good)
    image, label = next(root.rglob("*leftImg8bit.png")), next(root.rglob("*labelIds.png"))
    error_free = data.Cityscapes(root, "train")[0]
    assert error_free[0].shape == (3, 4, 6)
    write_tree(root, good + 77)
    error(ValueError, label, "77")
    for wrong in (np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint16)):
        write_tree(root, wrong, good)
        error(ValueError, label, "8-bit label ids")
    write_tree(root, good, np.zeros((5, 6, 3), np.uint8))
    error(ValueError, label, "(6, 5)")
    write_tree(root, good)
    for path in (image, label):
        whole = path.read_bytes()
        for broken in (whole[:40], b"", b"no picture", whole[:45] + b"????" + whole[49:]):
            path.write_bytes(broken)
            error(OSError, path)
        path.write_bytes(whole)
    Image.fromarray(good).save(label, format="JPEG")    # which changes label ids
    error(OSError, label)
    write_tree(root, good)
    with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 20):  # from which on Pillow only warns
        error(OSError, image, "decompression bomb")
    label.rename(label.with_name("ulm_000000_000002_gtFine_labelIds.png"))
    error(FileNotFoundError, "1 of 1 train frames have no label, 1 labels no frame",
          "ulm_000000_000001", "ulm_000000_000002")


def test_pictures_of_any_mode():
    folder = FOLDER / "modes"
    folder.mkdir()
    ramp = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    for mode in ("L", "RGB", "RGBA", "LA", "P", "CMYK"):
        picture, path = Image.fromarray(ramp).convert(mode), folder / f"{mode}.tif"
        picture.save(path.with_suffix(".tif" if mode == "CMYK" else ".png"))
    Image.fromarray(ramp.astype(np.uint16) * 256 + 99).save(folder / "16.png")
    for path in folder.iterdir():
        picture = data.read_image(path)
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture)[..., 1], ramp), path


def test_whole_frames_are_exact():
    label = np.arange(34, dtype=np.uint8).reshape(2, 17)
    label[0, 0] = 255                                   # licence plate, id -1
    grey = np.arange(34, dtype=np.uint8).reshape(2, 17) * 7
    image, target = data.Cityscapes(write_tree(FOLDER / "exact", label, grey), "train")[0]
    assert image.shape == (3, 2, 17) and image.dtype == target.dtype == torch.uint8
    assert np.array_equal(image[2].numpy(), grey)
    assert np.array_equal(target.numpy(), data.LABEL_TO_TRAIN[label]) and target[0, 0] == 255
    normal = data.normalize(image[None])
    close(normal[0, 1, 0, 3], (21 / 255 - 0.456) / 0.224)


def test_samples_come_from_seed_epoch_index():
    def dataset(seed=0):
        return data.Cityscapes(scenes(), "train", crop=(48, 64), copyblob=0.5, seed=seed)

    frames = dataset()
    plain = [frames[k] for k in range(2 * len(frames))]
    items = range(2 * len(frames))
    loader = torch.utils.data.DataLoader(dataset(), 1, sampler=items, num_workers=2)
    for (image, label), (image2, label2) in zip(plain, loader):
        assert torch.equal(image, image2[0]) and torch.equal(label, label2[0])
    n = len(frames)
    assert not any(torch.equal(plain[k][0], plain[n + k][0]) for k in range(n))     # another epoch
    assert not torch.equal(plain[0][0], dataset(seed=1)[0][0])                      # another seed


def test_crops_keep_image_and_label_together():
    label = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 34, (8, 8)), 16, 0), 16, 1)
    label = label.astype(np.uint8)
    image = Image.fromarray(np.stack([label * 7] * 3, -1))              # the colour tells the label
    padded = 0
    with mock.patch("data.jitter", lambda image, rng: image):
        for seed in range(40):
            rng = np.random.default_rng(seed)
            x, y = data.augment(image, Image.fromarray(label), (100, 90), rng)
            x, y = np.asarray(x), np.asarray(y)
            assert x.shape == (100, 90, 3) and y.shape == (100, 90)
            void = y == 255
            padded += void.mean()
            assert (x[void] == data.MEAN_COLOR).all()
            assert set(np.unique(y)) <= set(np.unique(label)) | {255}   # no class is invented
            right = np.abs(x[..., 0] / 7.0 - y)[~void] < 0.51           # off only where cells blend
            assert right.mean() > 0.6, right.mean()
    assert padded > 0.5


def test_a_crop_at_scale_1_is_a_window_of_the_frame():
    label = np.arange(34, dtype=np.uint8).repeat(40).reshape(34, 40)
    across = np.tile(np.arange(40, dtype=np.uint8), (34, 1))
    image = Image.fromarray(np.stack([label, across, label], -1))
    with mock.patch("data.jitter", lambda image, rng: image):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            x, y = data.augment(image, Image.fromarray(label), (16, 20), rng, scale=(1, 1))
            x = np.asarray(x)
            rows, columns = x[:, 0, 0].astype(int), x[0, :, 1].astype(int)
            assert (np.abs(np.diff(rows)) <= 2).all() and 14 <= np.ptp(rows) <= 16
            assert 18 <= np.ptp(columns) <= 20 and (x[..., 0] == x[:, :1, 0]).all()


def test_jitter_by_numpy():
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    b, c, s = np.random.default_rng(3).uniform(0.75, 1.25, 3)
    grey = (image @ [0.299, 0.587, 0.114])[..., None]
    x = s * image + (1 - s) * grey
    x = b * (c * x + (1 - c) * 128)
    result = np.asarray(data.jitter(Image.fromarray(image), np.random.default_rng(3)))
    assert np.abs(result - x.clip(0, 255)).max() <= 1


def test_copy_blob():
    label = np.full((100, 200), 7, np.uint8)            # road below the horizon, sky above
    label[:50] = 23
    image = np.full((100, 200, 3), 90, np.uint8)
    donor_label, donor_image = label.copy(), image.copy()
    donor_label[30:70, 20:60] = donor_label[60:64, 150:154] = 28       # two buses, one red each
    donor_image[donor_label == 28] = (255, 0, 0)
    places, parts = set(), [Image.fromarray(a) for a in (image, label, donor_image, donor_label)]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x, y = data.copy_blob(*parts[:2], data.cut_blob(*parts[2:], "bus", rng), rng)
        x, y = np.asarray(x), np.asarray(y)
        bus = y == 28
        assert x.shape == image.shape and y.shape == label.shape
        assert (y[~bus] == label[~bus]).all() and (x[~bus] == 90).all()
        assert (x[bus] == (255, 0, 0)).all()
        if bus.any():
            rows, columns = np.flatnonzero(bus.any(1)), np.flatnonzero(bus.any(0))
            foot = rows[-1]
            assert foot >= 49 and label[min(foot + 1, 99), columns[len(columns) // 2]] == 7
            if columns[0] > 0 and columns[-1] < 199 and foot < 99:      # not clipped
                ratio = len(rows) / (foot - 42)                         # horizon at row 42
                large = abs(ratio - 40 / 28) < 0.25
                assert large or abs(ratio - 4 / 22) < 0.1, ratio
                line = -60 / 28 if large else 52 / 22               # on which it stood
                astray = columns.mean() + 0.5 - 100 - line * (foot - 42)
                assert abs(astray) < len(columns) / 2 + 3, astray
                places.add((foot, columns[0]))
    assert len(places) > 20
    assert np.array_equal(np.asarray(parts[1]), label), "the input was changed"
    assert data.cut_blob(*parts[:2], "bus", rng) is None        # a donor without a bus
    hidden = donor_label.copy()
    hidden[60:64, 150:154], hidden[70, 20:30] = 7, 26           # a car before a part of its foot
    assert data.cut_blob(parts[2], Image.fromarray(hidden), "bus", rng)
    hidden[70, 20:40] = 26                                      # before half of it
    assert data.cut_blob(parts[2], Image.fromarray(hidden), "bus", rng) is None
    label[48:95, ::4], label[48:52, 1::4] = 17, 26              # near poles and far cars
    covered = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = data.copy_blob(parts[0], Image.fromarray(label),
                           data.cut_blob(*parts[2:], "bus", rng), rng)[1]
        bus = np.asarray(x) == 28
        assert bus[95:].any() or not bus[label == 17].any()     # poles in front of what is behind
        covered += bus[label == 26].sum()
    assert covered
    sky = Image.fromarray(np.full_like(label, 23))              # a frame without a road
    assert data.copy_blob(parts[0], sky, data.cut_blob(*parts[2:], "bus", rng), rng)[1] is sky


def test_class_pixels_and_weights():
    label = np.full((10, 10), 7, np.uint8)
    label[:2], label[2:3] = 11, 0
    root = write_tree(FOLDER / "counted", label)
    frames = data.Cityscapes(root, "train")
    pixels = data.class_pixels(frames)
    assert pixels.shape == (1, 19) and pixels[0, 0] == 70 and pixels[0, 2] == 20
    assert pixels.sum() == 90
    with mock.patch("data.read_label", side_effect=AssertionError("counted again")):
        assert np.array_equal(data.class_pixels(frames), pixels)
    write_tree(root, np.full((10, 11), 7, np.uint8))    # the files change: counted anew
    assert data.class_pixels(frames).sum() == 110

    pixels = np.zeros((2, 19), np.int64)
    pixels[0, :2], pixels[1, 0] = (60, 40), 100
    enet = data.class_weights(pixels, "enet")
    close(enet[:3], [1 / math.log(1.02 + 0.8), 1 / math.log(1.02 + 0.2), 1 / math.log(1.02)])
    f = [160 / 200, 40 / 100]                           # of the frames that hold the class
    close(data.class_weights(pixels, "median")[:3], [0.6 / f[0], 0.6 / f[1], 0])
    assert data.class_weights(pixels, "none") is None


def test_scenes():
    again = FOLDER / "scenes-again"
    data.make_scenes(again, train=6, val=3)
    files = sorted(f.relative_to(again) for f in again.rglob("*.png"))
    assert len(files) == 18
    assert all((again / f).read_bytes() == (scenes() / f).read_bytes() for f in files)
    found = np.zeros(19)
    for i in range(25):
        image, label = data.draw_scene(np.random.default_rng((0, 0, i)))
        assert image.shape == (128, 256, 3) and label.shape == (128, 256)
        found += np.bincount(data.LABEL_TO_TRAIN[label].ravel(), minlength=256)[:19]
        assert (data.LABEL_TO_TRAIN[label] == 255).any()
    assert (found > 0).all()
    assert set(np.argsort(-found)[:3]) == {0, 2, 8}     # road, building, vegetation
    broken = FOLDER / "broken"
    with mock.patch("os.replace", side_effect=KeyboardInterrupt):
        raises(KeyboardInterrupt, data.make_scenes, broken, 6, 3)
    assert not broken.exists()
    broken.mkdir()
    (broken / "mine.txt").write_text("keep me")
    raises(FileExistsError, data.make_scenes, broken)
    assert (broken / "mine.txt").exists()


# --------------------------------------------------------------------------- train and eval


def test_schedule_and_order():
    rates = [train.schedule(s, 100, 10) for s in range(100)]
    assert rates[0] < 0.11 and max(rates) == max(rates[8:11]) and 0 < rates[99] < 0.02
    close(rates[50], 0.5**0.9)
    steps = [train.items_of(step, 10, 4, seed=0) for step in range(6, 8)]           # epoch 3
    items = sum(steps, [])
    assert len(items) == len(set(items)) == 8 and all(30 <= i < 40 for i in items)
    assert items != sum([train.items_of(step, 10, 4, seed=1) for step in range(6, 8)], [])
    halves = []
    for rank in range(2):
        with mock.patch("train.RANK", rank), mock.patch("train.WORLD", 2):
            halves.append(train.items_of(6, 10, 4, seed=0))
    assert [i for pair in zip(*halves) for i in pair] == steps[0]       # together the same batch
    run, shares = mock.Mock(val_set=range(7), model=torch.nn.Identity()), []

    def note(model, share, *args, **options):
        shares.extend(share)
        return mock.Mock()

    for rank in range(3):                               # each frame is scored once
        with (mock.patch("train.RANK", rank), mock.patch("train.WORLD", 3),
              mock.patch("train.dist"), mock.patch("train.evaluate", note)):
            train.Run.validate(run, [])
    assert sorted(shares) == list(range(7))
    model = unet.build_model("resnet18")
    args = mock.Mock(lr=1.0, encoder_lr=0.1, weight_decay=0.5, pretrained=True, optimizer="sgd")
    groups = train.build_optimizer(model, args, torch.device("cpu")).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    rates = sorted((g["peak_lr"], g["weight_decay"]) for g in groups)
    assert rates == [(0.1, 0), (0.1, 0.5), (1, 0), (1, 0.5)]


def test_run_leaves_its_files_and_none_is_overwritten():
    out = checkpoint()
    log = (out / "log.csv").read_text().splitlines()
    assert len(log) == 3 and log[0].startswith("epoch,loss,lr,")
    best, last = (torch.load(out / n, weights_only=True) for n in ("best.pt", "last.pt"))
    assert set(best) < set(last) and best["settings"]["model"] == "resnet18"
    assert best["miou"] == max(row["miou"] for row in last["log"]) == last["best"]
    before = (out / "last.pt").read_bytes()
    assert "--resume" in raises(ValueError, small_run, out)
    assert (out / "last.pt").read_bytes() == before
    (out / "last.pt.part").touch()
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        message = raises(OSError, train.write, before, out / "last.pt")
    assert f"{out}/last.pt" in message and "No space" in message
    assert (out / "last.pt").read_bytes() == before
    assert not (out / "last.pt.part").exists()


def load(out):
    """The last.pt of a run."""
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_run(whole, out):
    """The last.pt in `out` holds, bit by bit, what the undisturbed run's does."""
    a, b = load(whole), load(out)
    assert a["step"] == b["step"] == 6 and a["best"] == b["best"] and len(b["log"]) == 2
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    timed = ("images_per_s", "data_wait", "seconds")
    for row, row2 in zip(a["log"], b["log"]):
        assert all(row[k] == row2[k] or row[k] != row[k] for k in row if k not in timed)


def tiny(name, classes, pretrained):
    """A network in place of build_model's that draws random numbers: it skips many blocks."""
    return unet.UNet(unet.ConvNeXt((2, 2, 2, 2), (8, 8, 8, 8), drop_path=0.8), classes)


@mock.patch("train.build_model", tiny)
def test_resume_is_as_if_never_stopped():
    """Stopped by a crash, then by a signal, then while validating; with and without workers."""
    whole, out, real, calls = FOLDER / "tiny", FOLDER / "parts", train.Run.train_step, []
    small_run(whole, "--loss", "ce+dice")

    def crash(self, *args):
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    def interrupt(self, *args):
        calls.append(self.step)
        if self.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)

    with mock.patch("train.Run.train_step", crash):
        raises(SystemExit, small_run, out, "--loss", "ce+dice", "--save-minutes", "0")
    with mock.patch("train.Run.train_step", interrupt):
        raises(SystemExit, resume, out, "--workers", "2", "--save-minutes", "9")
    assert calls == [2, 3, 4] and load(out)["step"] == 5
    with mock.patch("train.Run.validate", side_effect=KeyboardInterrupt):
        raises(SystemExit, resume, out, "--workers", "0")
    assert load(out)["step"] == 6 and len(load(out)["log"]) == 1
    resume(out)
    assert_same_run(whole, out)
    assert len(resume(out, "--epochs", "3", "--amp", "fp16")) == 3      # and longer, if asked
    assert "further" in raises(ValueError, resume, out, "--epochs", "1")
    for wrong in ("--lr 1", "--loss ce", "--seed 1", "--crop 32 32", "--out elsewhere"):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            raises(SystemExit, resume, out, *wrong.split())
        assert wrong.split()[0] in stderr.getvalue() and "last.pt" in stderr.getvalue()
    assert "resume from its last.pt" in raises(
        ValueError, train.main, ["--resume", str(out / "best.pt")])


def resume(out, *options):
    """Go on with the run in `out` -> the rows of its log."""
    return train.main(["--resume", str(out / "last.pt"), *options])


def test_killed_at_any_moment():
    """SIGKILL soon after each next last.pt, in the midst of the one after it too."""
    out = FOLDER / "killed"
    options = [*SMALL, "--data", str(scenes()), "--out", str(out), "--loss", "ce+dice",
               "--save-minutes", "0"]
    for delay in (0, 0.1, 0.2):
        before = (out / "last.pt").stat().st_mtime_ns if out.exists() else None
        child = subprocess.Popen([sys.executable, str(HERE / "train.py"), *options],
                                 stdout=subprocess.DEVNULL)
        while child.poll() is None and (
                not (out / "last.pt").exists() or (out / "last.pt").stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(delay)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        options = ["--resume", str(out / "last.pt")]
    assert load(out)["step"] < 6
    resume(out)
    small_run(FOLDER / "whole", "--loss", "ce+dice")
    assert_same_run(FOLDER / "whole", out)


def test_two_processes():
    """torchrun on the CPU: the scores are those of its weights, and one process can go on."""
    out = FOLDER / "two"
    options = [*SMALL, "--data", str(scenes()), "--out", str(out), "--epochs", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(HERE / "train.py"), *options], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/1") == 1, result.stdout         # said once
    last = load(out)
    scored, = run_eval("--ckpt", out / "best.pt", "--out", FOLDER / "two-eval")
    assert last["step"] == 3 and abs(scored["miou"] - last["log"][0]["miou"]) < 1e-9
    assert scored["pixel_accuracy"] == last["log"][0]["pixel_accuracy"]
    assert len(resume(out, "--epochs", "2")) == 2


def test_bad_options_and_files_are_one_line():
    """Through the command line's own door: exit status 2, one line, no traceback."""
    out, junk, hostile = FOLDER / "refused", FOLDER / "junk.pt", FOLDER / "hostile.pt"
    junk.write_text("not a checkpoint")
    (FOLDER / "cut.pt").write_bytes((checkpoint() / "best.pt").read_bytes()[:100_000])
    torch.save({"model": Hostile(), "settings": {}}, hostile)
    other = torch.load(checkpoint() / "best.pt", weights_only=True)
    torch.save({**other, "settings": {**other["settings"], "model": "resnet34"}}, FOLDER / "34.pt")
    small = ["--data", str(scenes()), "--out", str(out), *SMALL]
    best = str(checkpoint() / "best.pt")
    for module, options, *parts in (
            *((train, [*small, option, value], option) for option, value in (
                ("--epochs", "0"), ("--batch", "-1"), ("--lr", "nan"), ("--lr", "0"),
                ("--copyblob", "1.5"), ("--workers", "-1"), ("--seed", "x"), ("--scale", "0"),
                ("--loss", "mse"), ("--model", "vgg"), ("--batch", "7"), ("--colour", "red"),
                ("--device", "cuda:99"))),
            (train, [*small, "--resume", str(junk)], str(junk)),
            (train, [*small, "--resume", str(hostile)], str(hostile)),
            (train, [*small[2:], "--data", str(FOLDER)], "leftImg8bit_trainvaltest.zip"),
            (train, [*small, "--model", "convunext", "--pretrained"], "--no-pretrained"),
            (evaluation, ["--ckpt", str(junk)], str(junk)),
            (evaluation, ["--ckpt", str(FOLDER / "cut.pt")], "cut.pt"),
            (evaluation, ["--ckpt", str(FOLDER / "34.pt")], "34.pt", "resnet34"),
            (evaluation, ["--ckpt", str(hostile)], str(hostile)),
            (evaluation, ["--ckpt", "missing.pt"], "missing.pt"),
            (evaluation, ["--ckpt", best, "--split", "validation"], "leftImg8bit/validation"),
            (evaluation, ["--ckpt", best, "--images", str(out)], str(out)),
            (evaluation, ["--ckpt", best, "--panels", "0"], "--panels")):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), mock.patch("sys.argv", [module.__file__]):
            code = raises(SystemExit, evaluation.command_line, lambda: module.main(options))
        line = stderr.getvalue()
        assert code == "2" and line.count("\n") == 1, (options, line)
        assert line.startswith(f"{Path(module.__file__).name}: error: "), line
        assert all(part in line for part in parts), (options, line)
    assert not (out / "last.pt").exists() and not (FOLDER / "owned").exists()
    raises(KeyError, evaluation.command_line, lambda: {}["a bug keeps its traceback"])
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            raises(SystemExit, evaluation.command_line, mock.Mock(side_effect=error))
        assert "--batch" in stderr.getvalue()


@mock.patch("train.build_model", tiny)
def test_autocast():
    loss = {}
    for amp in ("off", "bf16", "fp16"):
        rows = small_run(FOLDER / amp, "--epochs", "1", "--crop", "32", "32", "--amp", amp)
        loss[amp] = rows[0]["loss"]
    for amp in ("bf16", "fp16"):
        assert loss[amp] != loss["off"]
        close(loss[amp], loss["off"], 0.05)
    assert load(FOLDER / "fp16")["scaler"]["scale"] > 1 and not load(FOLDER / "bf16")["scaler"]
    cuda = torch.device("cuda")
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        with mock.patch("torch.cuda.is_bf16_supported", lambda **options: capable):
            assert evaluation.pick_amp("auto", cuda) == dtype
            if not capable:
                raises(ValueError, evaluation.pick_amp, "bf16", cuda)


def test_training_learns():
    rows = small_run(FOLDER / "learn", "--epochs", "10", "--crop", "64", "128", "--amp", "auto")
    assert min(r["loss"] for r in rows[-3:]) < 0.75 * rows[0]["loss"], [r["loss"] for r in rows]
    assert rows[-1]["miou"] > 0.05                      # all road, the best constant: 0.014


def test_a_loss_that_explodes_stops_the_run():
    out, real = FOLDER / "nan", train.Run.train_step

    def explode(self, *args):
        return real(self, *args) * (float("nan") if self.step == 4 else 1)

    with mock.patch("train.Run.train_step", explode):
        message = raises(FloatingPointError, small_run, out, "--save-minutes", "0")
    items = train.items_of(3, 6, 2, seed=0)             # of the fourth step
    frames = data.Cityscapes(scenes(), "train")
    assert "step 4 " in message and all(str(frames.images[i % 6]) in message for i in items)
    assert load(out)["step"] == 3

    def poison(self, *args):
        loss = real(self, *args)
        if self.step == 2:                              # a finite loss, and an update that is not
            next(self.model.parameters()).data.fill_(float("inf"))
        return loss

    out = FOLDER / "inf"
    with mock.patch("train.Run.train_step", poison):
        message = raises(FloatingPointError, small_run, out, "--save-minutes", "0")
    assert "step 2" in message and load(out)["step"] == 1


def run_eval(*options):
    fixed = "--device cpu --amp off --workers 0".split()
    return evaluation.main([*map(str, options), *fixed])


def test_eval_by_its_own_predictions():
    """Score the labelIds PNGs that eval.py wrote with loops, and compare with its metrics.json."""
    out, predictions = FOLDER / "eval", FOLDER / "predictions"
    run_eval("--ckpt", checkpoint() / "best.pt", "--out", out, "--labels-out", predictions)
    result = json.loads((out / "metrics.json").read_text())
    truths = sorted((scenes() / "gtFine" / "val").rglob("*_labelIds.png"))
    tp, union = np.zeros(34), np.zeros(34)
    for path in truths:
        frame = path.name.removesuffix("_gtFine_labelIds.png")
        truth = np.array(Image.open(path))
        guess = np.array(Image.open(predictions / f"{frame}_pred_labelIds.png"))
        assert truth.shape == guess.shape
        counted = np.isin(truth, [c.label_id for c in data.CLASSES])
        for c in data.CLASSES:
            t, g = (truth == c.label_id) & counted, (guess == c.label_id) & counted
            tp[c.label_id] += (t & g).sum()
            union[c.label_id] += (t | g).sum()
    for c in data.CLASSES:
        expected = tp[c.label_id] / union[c.label_id] if union[c.label_id] else None
        got = result["classes"][c.name]["iou"]
        assert got == expected or abs(got - expected) < 1e-9, c.name
    pixels = sum(c["pixels"] for c in result["classes"].values())
    assert sum(map(sum, result["confusion_matrix"])) == pixels
    assert result["images"] == len(truths) == 3 and result["settings"]["model"] == "resnet18"
    assert abs(result["miou"] - result["settings"]["val_miou"]) < 1e-6
    assert (out / "confusion.png").exists() and len(list(out.glob("panel_*.png"))) == 3


def test_eval_other_uses():
    best = checkpoint() / "best.pt"
    other = FOLDER / "other"
    other.mkdir(exist_ok=True)
    (other / "best.pt").write_bytes(best.read_bytes())
    out = FOLDER / "several"
    first, second = run_eval("--ckpt", best, other / "best.pt", "--out", out)
    assert first["miou"] == second["miou"] and (out / "comparison.png").exists()
    assert (out / "run" / "metrics.json").exists() and (out / "other" / "metrics.json").exists()
    tta, = run_eval("--ckpt", best, "--tta", "--out", FOLDER / "tta")
    assert tta["tta"] and tta["confusion_matrix"] != first["confusion_matrix"]

    pictures = FOLDER / "pictures"
    pictures.mkdir(exist_ok=True)
    for mode, size in (("L", (40, 30)), ("RGBA", (33, 17)), ("RGB", (50, 20))):
        Image.new(mode, size, 128 if mode == "L" else "red").save(pictures / f"{mode}.png")
    run_eval("--ckpt", best, "--images", pictures, "--out", FOLDER / "looks")
    for mode, size in (("L", (40, 30)), ("RGBA", (33, 17)), ("RGB", (50, 20))):
        for kind in ("color", "overlay"):
            assert Image.open(FOLDER / "looks" / f"{mode}_{kind}.png").size == size
    for name in ("L.k.png", "L.tif"):                   # the latter would replace what L.png gave
        Image.new("L", (9, 9)).save(pictures / name)
    assert "L.tif" in raises(ValueError, run_eval, "--ckpt", best, "--images", pictures)

    test = write_tree(FOLDER / "test-split", np.zeros((30, 40), np.uint8), split="test")
    run_eval("--ckpt", best, "--data", test, "--split", "test", "--labels-out", FOLDER / "t",
             "--out", FOLDER / "te")
    labels = np.array(Image.open(FOLDER / "t" / "ulm_000000_000001_pred_labelIds.png"))
    assert labels.shape == (30, 40) and set(np.unique(labels)) <= {c.label_id for c in data.CLASSES}
    assert not (FOLDER / "te" / "metrics.json").exists()


def test_tta_undoes_its_flips():
    """A network that looks at one pixel only predicts the same, but where resizing blends."""
    model = torch.nn.Conv2d(3, 19, 1)
    images = torch.randint(0, 256, (1, 3, 8, 12), dtype=torch.uint8)
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    same = evaluation.predict(model, images) == evaluation.predict(model, images, tta=True)
    assert same.float().mean() > 0.8


# ----------------------------------------------------------------------------------- README


def commands():
    """Every command of README.md that runs a file of the project."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.search(r"\b(train|eval|test_all)\.py", line)]


def test_readme_options_exist():
    lines = commands()
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        module = {"train.py": train, "eval.py": evaluation}.get(words[at])
        if module:                                      # argparse exits on what it does not know
            with mock.patch.object(train, "load_checkpoint", lambda path: {"settings": {}}):
                module.parse_args(words[at + 1:])
        assert (HERE / words[at]).exists(), line


def test_readme_main_commands_run():
    folder = FOLDER / "newcomer"
    folder.mkdir()
    shutil.copytree(scenes(), folder / "scenes")
    environment = {k: v for k, v in os.environ.items() if k != "CITYSCAPES_DATASET"}

    def run(script, *options):
        return subprocess.run([sys.executable, str(HERE / script), *options], cwd=folder,
                              env=environment, capture_output=True, text=True)

    for line, budget in zip(commands()[:2], ("--epochs 1 --crop 32 32", "--panels 1")):
        script, *options = shlex.split(line)[1:]
        result = run(script, *options, *budget.split())
        assert result.returncode == 0, result.stderr
        if script == "train.py":
            assert result.stdout.startswith("GENERATED SCENES"), result.stdout
            again = run(script)                         # refuses, in one line
            assert again.returncode == 2 and again.stderr.count("\n") == 1, again.stderr
    for name in ("best.pt", "last.pt", "log.csv", "eval/metrics.json", "eval/confusion.png"):
        assert (folder / name).exists(), name


if __name__ == "__main__":
    tests = [(name, f) for name, f in list(globals().items()) if name.startswith("test_")]
    failed = 0
    for name, test in tests:
        start, output, result = time.time(), io.StringIO(), "ok  "
        try:
            with contextlib.redirect_stdout(output):
                test()
        except Exception:
            result = "FAIL"
            failed += 1
            print(output.getvalue(), traceback.format_exc())
        print(f"{result}  {time.time() - start:5.1f} s  {name}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(bool(failed))
