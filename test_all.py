"""All tests of the project: `python test_all.py`, or `pytest test_all.py`. The name of a test says
what is promised. Read the helpers, then the tests that interest you. Results are compared with
outputs of the published networks, by hand, or with plain loops."""
import atexit
import contextlib
import functools
import hashlib
import inspect
import io
import itertools
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
import unittest
import urllib.error
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval as evaluation       # the name eval is Python's own
import losses
import metrics
import train
import unet

HERE = Path(__file__).resolve().parent
FOLDER = Path(tempfile.mkdtemp(prefix="unet-test-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
torch.set_num_threads(1)                # a resumed run is exact only with the same number
os.environ["OMP_NUM_THREADS"] = "1"     # for processes that are started here

# ---------------------------------------------------------------------------- helpers

def raises(kind, function, *args):
    """Assert that the call raises `kind` -> the message."""
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} was not raised")


def close(a, b, relative=1e-5, absolute=1e-6):
    """Assert that two tensors or numbers agree; NaN equals NaN."""
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(),
                               rtol=relative, atol=absolute, equal_nan=True)


def write_tree(root, label, image=None, split="train", name="ulm_000000_000001", city="ulm"):
    """Write one frame of a Cityscapes tree; label: uint8 array of label ids -> root."""
    if image is None:
        image = np.zeros((*label.shape[:2], 3), np.uint8)
    for kind, ending, array in (("leftImg8bit", "leftImg8bit", image),
                                ("gtFine", "gtFine_labelIds", label)):
        path = root / kind / split / city / f"{name}_{ending}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return root


def scenes():
    """A small tree of generated scenes, drawn once: 6 training and 3 validation frames."""
    data.make_scenes(FOLDER / "scenes", train=6, val=3)
    return FOLDER / "scenes"


class Hostile:
    """An object whose pickle makes the folder FOLDER/owned when it is loaded."""
    def __reduce__(self):
        return os.mkdir, (str(FOLDER / "owned"),)


# ---------------------------------------------------------------------------- unet

# What the published networks compute with the weights of `fill`: a hash of all keys and shapes,
# then the mean, first and sixth value of each output. To compute a row again, build the network
# from its authors' code, call `fill` and `eval`, and run it on wave(64, 96) in float32:
#   resnet*         torchvision.models, `fc` replaced by nn.Identity(); the outputs of relu, layer1,
#                   layer2, layer3, layer4
#   convnext_tiny   facebookresearch/ConvNeXt, models/convnext.py, `norm` and `head` replaced by
#                   nn.Identity(); the outputs of stages[0] ... stages[3]
#   convunext       1914669687/ConvUNeXt, src/ConvUNeXt.py, in_channels=3, num_classes=19,
#                   bilinear=True, base_c=32; the logits, of wave(64, 96) and of wave(70, 90)
PUBLISHED = """\
resnet18 05d62c7320b26c54 \
     0.2927104 0.4516132 0.6583633  0.8200769 0.237898 0.2939439  1.106259 1.929395 2.120271 \
     0.6997933 0.4553053 0.5298219  0.8354534 2.404161 2.020325
resnet34 adc7641db1c67d20 \
     0.2927104 0.4516132 0.6583633  0.821459 0.2681229 0.3305012  1.167162 2.097874 2.144202 \
     0.5703599 1.518613 1.497737  1.413898 3.803309 3.759392
resnet50 569b8747885996c6 \
     0.2927104 0.4516132 0.6583633  2.22501 5.303634 5.198433  1.940792 6.846388 7.721308 \
     7.847245 19.50659 19.81554  11.73507 41.75172 48.51268
convnext_tiny a7735d83e2f866dc \
     -0.01080847 -3.165019 -0.7931687  -0.01899217 -3.855342 -3.557726 \
     0.002049597 -15.90885 -15.9319  -0.008713127 -6.88745 -6.630893
convunext 157d15644ee68eeb \
     0.02403626 0.3677448 0.3562467  0.03429759 0.4288312 0.4473823"""


def fill(module):
    """Give every weight a fixed value of a suitable scale: sines of 0.37 k + i for the i-th key."""
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
        elif t.ndim == 1:
            t = 1 + 0.1 * t
        else:
            t = t * math.sqrt(3 / t[0].numel())
        state[key] = t.to(state[key].dtype)
    module.load_state_dict(state)


def wave(h, w):
    """The input that belongs to `fill`: 1 x 3 x h x w."""
    t = 0.11 * torch.arange(3 * h * w, dtype=torch.float64)
    return torch.sin(t).reshape(1, 3, h, w).float()


@torch.no_grad()
def test_outputs_equal_those_of_the_published_networks():
    for row in PUBLISHED.split("\n"):
        name, known_hash, *numbers = row.split()
        expected = np.array(numbers, float).reshape(-1, 3)
        model = unet.build_model(name).eval()
        module = model if name == "convunext" else model.encoder
        state = sorted(module.state_dict().items())
        keys = "\n".join(f"{key} {list(value.shape)}" for key, value in state)
        assert hashlib.sha256(keys.encode()).hexdigest().startswith(known_hash), name
        fill(module)
        outputs = module(wave(64, 96))
        if name == "convunext":
            outputs = [outputs, module(wave(70, 90))]
        for output, values in zip(outputs, expected, strict=True):
            flat = output.flatten().double()
            tolerance = 1e-4 * flat.abs().mean().item()
            close([flat.mean(), flat[0], flat[5]], values, 1e-4, tolerance)


@torch.no_grad()
def test_networks_take_any_input_size():
    models = [unet.build_model(name, num_classes=5) for name in unet.MODELS]
    models.append(unet.UNet(unet.ResNet(unet.BasicBlock, (1, 1, 1, 1)), 5, widths=(16, 8)))
    for model in models:
        for size in (1, 1), (1, 40), (33, 65), (63, 2):
            logits = model.eval()(torch.zeros(2, 3, *size))
            assert logits.shape == (2, 5, *size)
            assert logits.isfinite().all()
    for name in "resnet18", "convnext_tiny":        # padded with zeros, right and below
        model = unet.build_model(name, num_classes=5).eval()
        padded = F.pad(wave(50, 70), (0, 26, 0, 14))
        fill(model)
        close(model(wave(50, 70)), model(padded)[..., :50, :70])


@torch.no_grad()
def test_up_equals_a_1x1_convolution_of_the_concatenation():
    up = unet.Up(6, 3, 4).eval()
    fill(up)
    x, skip = torch.randn(2, 6, 5, 7), torch.randn(2, 3, 10, 14)
    upsampled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    weight = torch.cat([up.coarse.weight, up.fine.weight], dim=1)
    y = F.conv2d(torch.cat([upsampled, skip], dim=1), weight)
    close(up(x, skip), up.block(F.relu(up.norm(y))), 1e-4, 1e-5)


@torch.no_grad()
def test_logits_are_float32_and_upsampled_in_float32_under_autocast():
    model, convunext = unet.build_model("resnet18"), unet.build_model("convunext")
    small = []
    model.head.register_forward_hook(lambda module, args, output: small.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(wave(64, 96))
        assert convunext(wave(64, 96)).dtype == logits.dtype == torch.float32
    assert small[0].dtype == torch.bfloat16
    assert torch.equal(logits, F.interpolate(small[0].float(), (64, 96), mode="bilinear"))


def test_every_parameter_gets_a_gradient():
    for name in unet.MODELS:
        model = unet.build_model(name, num_classes=3)
        fill(model)
        for module in model.modules():
            module.drop_path = 0.0                      # else a block may be skipped by chance
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        for key, parameter in model.named_parameters():
            assert torch.any(parameter.grad), (name, key)


def test_stochastic_depth_skips_images_and_keeps_the_mean():
    block = unet.ConvNeXtBlock(4, drop_path=0.5)
    torch.nn.init.ones_(block.gamma)
    x = torch.randn(400, 4, 2, 2)
    branch = block.eval()(x) - x
    trained = block.train()(x) - x
    kept = trained.flatten(1).abs().sum(dim=1) > 0
    assert 140 < kept.sum() < 260                       # of 400 with p = 1/2: six sigma
    close(trained[kept], 2 * branch[kept], 1e-4, 1e-5)
    last_stage = unet.build_model("convnext_tiny").encoder.stages[3]    # of 3 + 3 + 9 + 3 blocks
    close([block.drop_path for block in last_stage], [0.1 * 15 / 17, 0.1 * 16 / 17, 0.1])


def test_depthwise_gradients_equal_those_of_conv2d():
    for mode, dtype, error in (("zeros", torch.float64, 1e-12), ("reflect", torch.float64, 1e-12),
                               ("reflect", torch.float32, 0.05)):       # in bfloat16, by autocast
        conv = unet.DepthwiseConv(5, padding_mode=mode).to(dtype)
        x = torch.randn(2, 5, 6, 9, dtype=dtype, requires_grad=True)
        inputs = [x, *conv.parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y, expected = conv(x), torch.nn.Conv2d.forward(conv, x)
        close(y, expected, error, error)
        gradients = torch.autograd.grad(y.sin().sum(), inputs)
        expected = torch.autograd.grad(expected.sin().sum(), inputs)
        for gradient, value in zip(gradients, expected):
            close(gradient, value, error, error)


def pretrained(name, file=None, answer=urllib.error.URLError("no network")):
    """build_model with ImageNet weights, where torch.hub's cache is a new folder.
    file: what somebody placed in the cache by hand; answer: what the download returns or raises."""
    with (tempfile.TemporaryDirectory(dir=FOLDER) as hub,
          mock.patch("torch.hub.get_dir", return_value=hub),
          mock.patch("torch.hub.urlopen", side_effect=[answer]),    # raised if an exception
          contextlib.redirect_stderr(io.StringIO())):               # torch.hub's progress bar
        path = Path(hub, "checkpoints", unet.SPECS[name].url.split("/")[-1])
        path.parent.mkdir()
        if file is not None:
            torch.save(file, path)
        return unet.build_model(name, pretrained=True)


def test_imagenet_weights_placed_by_hand_are_used():
    for name in "resnet18", "convnext_tiny":
        source = unet.build_model(name).encoder
        fill(source)
        state = source.state_dict()
        file = {**state, "fc.weight": torch.zeros(9)}
        if name == "convnext_tiny":
            file = {"model": {**state, "norm.bias": torch.zeros(9), "head.bias": torch.zeros(9)}}
        encoder = pretrained(name, file).encoder
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_weights_that_cannot_be_loaded_are_one_line():
    for name in "resnet18", "convnext_tiny":
        message = raises(OSError, pretrained, name)
        assert "\n" not in message
        for part in "no network", unet.SPECS[name].url, str(FOLDER), "--no-pretrained":
            assert part in message
    state = unet.build_model("resnet18").encoder.state_dict()
    del state["layer1.0.conv1.weight"]
    assert "layer1.0.conv1.weight" in raises(OSError, pretrained, "resnet18", state)
    raises(OSError, pretrained, "resnet18", {"conv1.weight": Hostile()})
    assert not (FOLDER / "owned").exists()
    response = mock.MagicMock()         # torch.hub: with urlopen(url) as u: u.read() until b""
    response.__enter__.return_value.read.side_effect = [b"other bytes", b""]
    assert "invalid hash" in raises(OSError, pretrained, "resnet18", None, response)
    assert "--no-pretrained" in raises(ValueError, unet.build_model, "convunext", 19, True)
    assert "resnet18" in raises(ValueError, unet.build_model, "vgg")


# -------------------------------------------------------------------------- losses

def example():
    """Logits 2 x 4 x 3 x 5 and their target: the last class is absent, five pixels are 255."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 4, 3, 5, generator=generator)
    target = torch.randint(0, 3, (2, 3, 5), generator=generator)
    target[0, 0] = 255
    return logits, target


def loop_losses(logits, target, w):
    """Each loss from its formula, pixel by pixel -> dict by the names of losses.LOSSES."""
    softmax = logits.double().softmax(dim=1).permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    ce, focal, weights = 0.0, 0.0, 0.0
    overlap, size = np.zeros(4), np.zeros(4)
    for p, t in zip(softmax, target.flatten().tolist()):
        if t != 255:
            ce += w[t] * -math.log(p[t])
            focal += w[t] * (1 - p[t]) ** 2 * -math.log(p[t])
            weights += w[t]
            overlap[t] += p[t]
            size += p
            size[t] += 1
    score = 2 * overlap[:3] / size[:3]                  # class 3 is absent, so it is left out
    dice = 1 - np.average(score, weights=w[:3])
    ce, focal = ce / weights, focal / weights
    return {"ce": ce, "focal": focal, "dice": dice, "ce+dice": ce + dice}


def test_losses_equal_their_formulas_with_and_without_class_weights():
    logits, target = example()
    for class_weights in None, torch.tensor([1.0, 3.0, 0.2, 7.0]):
        w = torch.ones(4) if class_weights is None else class_weights
        expected = loop_losses(logits, target, w.numpy())
        for name in losses.LOSSES:
            assert name in expected, f"add the formula of {name} to loop_losses"
            close(losses.build_loss(name, class_weights)(logits, target), expected[name])
        close(F.cross_entropy(logits, target, w, ignore_index=255), expected["ce"])
    assert {"ce", "dice", "focal", "ce+dice"} <= set(losses.LOSSES)


def test_losses_ignore_pixels_of_255():
    logits, target = example()
    other = logits.clone()
    other[0, :, 0] = torch.tensor([1e4, -1e4, 3.0, 0.0])[:, None]       # where the target is 255
    for name in losses.LOSSES:
        values, gradients = [], []
        for x in logits, other:
            x = x.clone().requires_grad_()
            value = losses.build_loss(name)(x, target)
            value.backward()
            values.append(value)
            gradients.append(x.grad)
        assert torch.equal(*values), name
        assert torch.equal(*gradients), name
        assert not gradients[1][0, :, 0].any(), name


def test_losses_stay_finite():
    logits, target = example()
    ignored = torch.full_like(target, 255)
    for name in losses.LOSSES:
        for x, t in (logits, ignored), (1e4 * logits, target), (0 * logits, target):
            x = x.clone().requires_grad_()
            value = losses.build_loss(name)(x, t)
            value.backward()
            assert value.isfinite(), name
            assert x.grad.isfinite().all(), name
            if t is ignored:
                assert value == 0, name
                assert not x.grad.any(), name


def test_losses_are_float32_under_autocast():
    logits, target = example()
    logits = logits.half()
    def product(logits, target, weights):               # autocast would compute it in 16 bits
        return (logits.mT @ logits).sum()
    with mock.patch.dict(losses.LOSSES, product=product):
        for name in losses.LOSSES:
            loss = losses.build_loss(name)
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(logits, target)
            assert value.dtype == torch.float32
            assert torch.equal(value, loss(logits.float(), target)), name


def test_losses_refuse_unknown_names_and_wrong_shapes():
    logits, target = example()
    assert "ce+dice" in raises(ValueError, losses.build_loss, "mse")
    for name in losses.LOSSES:
        raises(ValueError, losses.build_loss(name), logits, target[:, 1:])
        raises(ValueError, losses.build_loss(name, torch.ones(3)), logits, target)


# ------------------------------------------------------------------------- metrics

def test_confusion_matrix_equals_a_count_in_loops():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (2, 7, 9), generator=generator)
    target[target == 3] = 255
    prediction = torch.randint(0, 4, (2, 7, 9), generator=generator)
    expected = torch.zeros(4, 4).long()
    for t, p in zip(target.flatten().tolist(), prediction.flatten().tolist()):
        if t != 255:
            expected[t, p] += 1
    m = metrics.confusion_matrix(prediction.byte(), target.byte(), 4)
    assert m.dtype == torch.int64
    assert torch.equal(m, expected)
    last = torch.tensor([18, 255], dtype=torch.uint8)   # 19 * 18 + 18 does not fit into uint8
    assert metrics.confusion_matrix(last, last)[18, 18] == 1
    for wrong in ((prediction + 4, target), (prediction - 1, target), (prediction[0], target),
                  (prediction, target.clamp(max=200))):
        raises(ValueError, metrics.confusion_matrix, *wrong, 4)


def test_scores_equal_values_computed_by_hand():
    m = torch.tensor([[7, 1, 0, 0], [2, 2, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0]])
    nan = float("nan")
    close(metrics.pixel_accuracy(m), 9 / 17)
    close(metrics.iou(m), [0.7, 0.2, 0, nan])           # class 2 is missed, class 3 is nowhere
    close(metrics.dice(m), [14 / 17, 4 / 12, 0, nan])
    shares = metrics.confusion_shares(m)
    close(shares[0], [0, 0.3, 0, 0])
    close(shares[1], [0.3, 0, 0.5, 0])
    close(shares[2], [0, 1, 0, 0])
    predicted_never_true = torch.tensor([[5, 1], [0, 0]])
    close(metrics.iou(predicted_never_true), [5 / 6, 0])
    close(metrics.pixel_accuracy(0 * m), nan)


# ------------------------------------------------------- data: reading, and the dataset
ROAD = 7                                                # a label id

def test_label_table():
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    names = [c.name for c in data.CLASSES]
    assert names[3:5] + names[13:17] == ["wall", "fence", "car", "truck", "bus", "train"]
    ignored = np.setdiff1d(np.arange(256), [*ids, 30])  # 30 may count as a truck
    assert data.LABEL_TO_TRAIN[ids].tolist() == list(range(19))
    assert (data.LABEL_TO_TRAIN[ignored] == 255).all()
    assert data.TRAIN_TO_LABEL.tolist() == ids + [255] * 237


def edited(old, new):
    """data.py with a part of its text replaced, as a new module."""
    module = type(data)("edited")
    exec(Path(data.__file__).read_text().replace(old, new), module.__dict__)
    return module


def test_one_edit_counts_trailers_as_trucks_or_reads_other_classes():
    label = np.array([[30, 30, ROAD]], np.uint8)
    module = edited("# LABEL_TO_TRAIN[30]", "LABEL_TO_TRAIN[30]")
    frames = module.Cityscapes(write_tree(FOLDER / "trailers", label), "train")
    assert frames[0][1].tolist() == [[14, 14, 0]]
    assert frames.pixels[0, 14] == 2
    assert frames.pixels.sum() == 3
    for ids in [0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 40]:    # a second CLASSES replaces the first
        module = edited("]\nLABEL_IDS", f"]\nCLASSES = [Class(str(k), k, (k, k, k)) for k in {ids}]"
                        "\nLABEL_IDS")
        label = np.array([[*ids, 33, 255]], np.uint8)
        root = write_tree(FOLDER / f"own-{len(ids)}", label)
        frames = module.Cityscapes(root, "train")
        assert frames[0][1].tolist() == [[*range(len(ids)), 255, 255]]
        assert frames.pixels.tolist() == [[1] * len(ids)]
        unknown = 34 if max(ids) < 34 else 41
        write_tree(root, np.full((1, 9), unknown, np.uint8))
        message = raises(ValueError, frames.__getitem__, 0)
        assert str(frames.labels[0]) in message
        assert str(unknown) in message
        assert "\n" not in raises(ValueError, module.make_scenes, FOLDER / "no-scenes")


def bad_frame(root, kind, *parts):
    """Assert that reading the tree fails with one line that holds all `parts`."""
    message = raises(kind, lambda: data.Cityscapes(root, "train")[0])
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def good_tree(name):
    """A tree of one frame of 4 x 6 pixels -> its root, image path and label path."""
    root = write_tree(FOLDER / name, np.full((4, 6), ROAD, np.uint8))
    data.Cityscapes(root, "train")[0]
    return root, next(root.rglob("*leftImg8bit.png")), next(root.rglob("*labelIds.png"))


def test_missing_and_unpaired_files_are_named():
    empty = FOLDER / "empty"
    bad_frame(empty, FileNotFoundError, "gtFine_trainvaltest.zip", f"{empty}/leftImg8bit/train")
    root, image, label = good_tree("unpaired")
    label.rename(label.with_name("ulm_000000_000002_gtFine_labelIds.png"))
    bad_frame(root, FileNotFoundError, "1 train frames", "1 labels", "ulm_000000_000001")
    shutil.rmtree(root / "gtFine")
    bad_frame(root, FileNotFoundError, "0 labels")
    image.rename(image.with_suffix(".webp"))
    bad_frame(root, FileNotFoundError, "no frames", ".webp")


def test_broken_and_dangerous_files_are_named():
    root, image, label = good_tree("broken-files")
    for path in image, label:
        whole = path.read_bytes()
        changed_pixels = whole[:45] + b"????" + whole[49:]          # in the pixels
        wrong_exif = io.BytesIO()
        Image.open(path).save(wrong_exif, "PNG", exif=b"Exif\0\0no TIFF header")
        for broken in whole[:40], b"", b"no picture", changed_pixels, wrong_exif.getvalue():
            path.write_bytes(broken)
            bad_frame(root, OSError, path)
        path.write_bytes(whole)
    with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 11):              # of 24; Pillow allows double
        bad_frame(root, OSError, image, "decompression bomb")
    Image.effect_noise((64, 64), 50).save(image, "JPEG")
    image.write_bytes(image.read_bytes()[:1000])                    # cut off
    bad_frame(root, OSError, image)
    Image.new("RGB", (6, 4)).save(image, format="EPS")
    with mock.patch("PIL.EpsImagePlugin.Ghostscript") as ghostscript:
        for read in data.read_image, data.read_label:
            assert str(image) in raises(OSError, read, image)
    ghostscript.assert_not_called()


def test_labels_of_the_wrong_kind_are_named():
    root, image, label = good_tree("wrong-labels")
    for mode in "RGB", "P", "I;16":
        Image.new(mode, (6, 4)).save(label)
        bad_frame(root, ValueError, label, mode, "labelIds.png")
    for value in 34, 77, 254:
        Image.new("L", (6, 4), value).save(label)
        bad_frame(root, ValueError, label, value)
    Image.new("L", (6, 5), ROAD).save(label)
    bad_frame(root, ValueError, label, "5 x 6", "4 x 6")
    Image.new("L", (6, 4), ROAD).save(label, format="JPEG")         # JPEG changes the ids
    bad_frame(root, OSError, label, "PNG")


def test_pictures_of_any_mode_are_read_upright():
    ramp = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    for mode in "L", "RGB", "RGBA", "LA", "P", "CMYK":
        path = FOLDER / f"mode-{mode}.tif"
        Image.fromarray(ramp).convert(mode).save(path)
        result = data.read_image(path)
        assert result.mode == "RGB", path
        assert np.array_equal(np.asarray(result)[..., 1], ramp), path
    for dtype in np.uint16, np.int32, np.float32:
        Image.fromarray(ramp.astype(dtype)).save(path)
        assert f"{path}: has " in raises(ValueError, data.read_image, path)
    exif = Image.Exif()
    exif[0x0112] = 6                                    # orientation: turn clockwise to view
    Image.fromarray(ramp).save(FOLDER / "turned.png", exif=exif)
    turned = np.asarray(data.read_image(FOLDER / "turned.png"))
    assert np.array_equal(turned[..., 1], np.rot90(ramp, -1))


def test_normalize_uses_imagenet_numbers_in_rgb_order():
    rgb = torch.tensor([10, 100, 200], dtype=torch.uint8)
    result = data.normalize(rgb.view(1, 3, 1, 1).expand(2, 3, 4, 5))
    for channel, value, mean, std in ((0, 10, 0.485, 0.229), (1, 100, 0.456, 0.224),
                                      (2, 200, 0.406, 0.225)):
        close(result[:, channel], torch.full((2, 4, 5), (value / 255 - mean) / std))
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_what_is_not_read_is_listed():
    root, image, label = good_tree("unused")
    link = label.with_name("ulm_2_gtFine_labelIds.png")
    link.symlink_to("missing")
    listed = [image.with_suffix(".jpg"), image.with_name("notes.txt"), label.with_suffix(".jpg"),
              image.parents[1] / "stray.png"]
    hidden = [image.with_name(f"._{image.name}"), image.parents[1] / ".DS_Store"]
    for ending in "color.png", "instanceIds.png", "polygons.json", "labelTrainIds.png":
        hidden.append(label.with_name(f"ulm_000000_000001_gtFine_{ending}"))
    for path in listed + hidden:
        path.touch()
    frames = data.Cityscapes(root, "train")
    assert frames.images + frames.labels == [image, label]
    assert sorted(frames.unused) == sorted([link, *listed])


def test_frames_may_be_jpg_and_endings_upper_case():
    for name, ending in ("a", ".jpg"), ("b", ".JPEG"), ("c", ".PNG"):
        root = write_tree(FOLDER / "endings", np.full((4, 6), ROAD, np.uint8), name=name)
        image = root / "leftImg8bit/train/ulm" / f"{name}_leftImg8bit.png"
        image.rename(image.with_suffix(ending))
    label = root / "gtFine/train/ulm/c_gtFine_labelIds.png"
    label.rename(label.with_suffix(".PNG"))
    def backwards(folder, original=Path.iterdir):       # the order of the file system
        return sorted(original(folder), reverse=True)
    with mock.patch("pathlib.Path.iterdir", backwards):
        frames = data.Cityscapes(root, "train")
    assert frames.names == ["a", "b", "c"]
    assert frames.unused == []
    assert [label.sum() for _, label in frames] == [0, 0, 0]        # road


def test_whole_frames_are_exact():
    label = np.arange(34, dtype=np.uint8).reshape(2, 17)
    label[0, 0] = 255                                   # license plate, id -1
    pixels = np.random.default_rng(0).integers(0, 256, (2, 17, 3), np.uint8)
    frames = data.Cityscapes(write_tree(FOLDER / "exact", label, pixels), "train")
    image, target = frames[0]
    assert image.dtype == target.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(target.numpy(), data.LABEL_TO_TRAIN[label])


def cropped(**options):
    """Crops of six noisy frames with a wall, so that CopyBlob takes part."""
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (64, 96, 3), np.uint8)
        label = np.full((64, 96), ROAD, np.uint8)
        label[20:40, 8 * index:8 * index + 20] = 12     # wall
        root = write_tree(FOLDER / "cropped", label, noise, name=f"ulm_{index}")
    return data.Cityscapes(root, "train", crop=(48, 64), **options)


def test_samples_depend_on_seed_epoch_and_index_but_not_on_workers():
    frames = cropped(copyblob=0.5)
    other = cropped(copyblob=0.5, seed=1)
    samples = [frames[k] for k in range(12)]            # epochs 0 and 1 of 6 frames
    for k in range(6):
        assert not torch.equal(samples[k][0], samples[k + 6][0])
        assert not torch.equal(samples[k][0], other[k][0])
    order = range(11, -1, -1)
    spawned = torch.utils.data.DataLoader(
        frames, sampler=order, num_workers=2, multiprocessing_context="spawn")
    for loader in spawned, data.make_loader(frames, 2, torch.device("cpu"), sampler=order):
        for k, (image, label) in zip(order, loader, strict=True):
            assert torch.equal(image[0], samples[k][0])
            assert torch.equal(label[0], samples[k][1])


def test_epochs_are_permutations_that_depend_on_seed_and_epoch():
    first = np.array(data.epoch_batches(0, 7, 2, seed=0))
    later = np.array(data.epoch_batches(3, 7, 2, seed=0)) - 3 * 7
    other = np.array(data.epoch_batches(0, 7, 2, seed=1))
    for frames in first, later, other:
        assert frames.shape == (3, 2)
        assert len(np.unique(frames)) == 6
        assert np.isin(frames, range(7)).all()
    assert (first != later).any() and (first != other).any()
    assert str(data.epoch_batches(1, 5, 2, seed=0)) == "[[5, 7], [9, 8]]"     # fixed, for --resume


# -------------------------------------------------------------- data: augmentation

NO_JITTER = mock.patch("data.jitter", lambda image, rng: image)


def augmented(image, label, crop, seed, scale=(0.5, 2.0)):
    """data.augment -> image and label as int arrays."""
    crops = data.augment(image, label, crop, np.random.default_rng(seed), scale)
    return [np.asarray(part).astype(int) for part in crops]


@NO_JITTER
def test_crops_keep_image_and_label_together():
    cells = np.random.default_rng(0).integers(0, 19, (8, 8), np.uint8)
    label = Image.fromarray(cells.repeat(16, axis=0).repeat(16, axis=1))
    image = label.point(lambda value: 13 * value).convert("RGB")    # tells the label
    padded = np.zeros(2)                                # crops whose first, last row is padding
    for seed in range(40):
        x, y = augmented(image, label, (100, 90), seed)
        ignored = y == 255
        assert x.shape == (100, 90, 3)
        assert (x[ignored] == (124, 116, 104)).all()                            # mean color
        assert np.isin(y[~ignored], cells).all()                    # no class is invented
        agree = np.abs(x[..., 0] / 13.0 - y)[~ignored] < 0.51       # not where cells blend
        assert agree.mean() > 0.6
        padded += ignored[[0, -1]].all(axis=1)
    assert ((0 < padded) & (padded < 40)).all()


@NO_JITTER
def test_a_crop_at_scale_1_is_a_window_of_the_frame():
    label = np.arange(240, dtype=np.uint8).reshape(12, 20)          # value = 20 row + column
    picture = Image.fromarray(label)
    corners = set()
    for seed in range(100):
        x, y = augmented(picture.convert("RGB"), picture, (5, 8), seed, scale=(1, 1))
        if y[0, 0] > y[0, 1]:                                       # mirrored
            x, y = x[:, ::-1], y[:, ::-1]
        row, column = divmod(y[0, 0], 20)
        corners.add((row, column))
        assert np.array_equal(y, label[row:row + 5, column:column + 8])
        assert np.abs(x[..., 0] - y).max() <= 11                    # up to half a row and column
    assert len(corners) > 50


@NO_JITTER
def test_zoom_and_flip_are_spread_evenly():
    label = np.tile(np.arange(128, dtype=np.uint8), (128, 1))       # value = column
    label = Image.fromarray(label)
    zooms, mirrored = [], 0
    for seed in range(200):
        _, y = augmented(label.convert("RGB"), label, (8, 32), seed)
        zooms.append(31 / np.ptp(y[0]))
        mirrored += y[0, 0] > y[0, -1]
    assert 0.48 < min(zooms) < 0.55
    assert 1.8 < max(zooms) < 2.3
    assert 70 < np.greater(zooms, 1).sum() < 120        # of 200; if not log-uniform, about 133
    assert 70 < mirrored < 130


def test_jitter_equals_its_formula_and_changes_crops():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    brightness, contrast, saturation = np.random.default_rng(3).uniform(0.75, 1.25, 3)
    gray = (pixels @ [0.299, 0.587, 0.114])[..., None]
    y = saturation * pixels + (1 - saturation) * gray
    z = brightness * (contrast * (y - 128) + 128)
    result = data.jitter(Image.fromarray(pixels), np.random.default_rng(3))
    assert np.abs(np.asarray(result) - z.clip(0, 255)).max() <= 1
    image = Image.new("RGB", (6, 5), "silver")
    crop, _ = augmented(image, image.convert("L"), (4, 4), seed=0, scale=(1, 1))
    assert (crop != 192).all()


# -------------------------------------------------------- data: CopyBlob and weights

def filled(value, names):
    """A Pillow image of 2 x 4 pixels of one gray value, and its label."""
    image = Image.new("RGB", (4, 2), (value, value, value))
    ids = [data.TRAIN_ID[name] for name in names.split()]
    return image, Image.fromarray(np.array(ids, np.uint8).reshape(2, 4))


def test_copy_blob_pastes_a_class_at_its_place_behind_people():
    frame = filled(10, "road person sky road car pole rider road")
    donor = filled(200, "bus bus road road bus bus bus wall")
    image, label = data.copy_blob(*frame, *donor, data.TRAIN_ID["bus"])
    _, expected = filled(0, "bus person sky road bus pole rider road")
    assert np.array_equal(label, expected)
    assert (np.asarray(image)[..., 1] == [[200, 10, 10, 10], [200, 10, 10, 10]]).all()
    assert (np.asarray(frame[0]) == 10).all()           # the frame itself is not changed
    large = [picture.resize((8, 4), Image.NEAREST) for picture in donor]
    assert np.array_equal(data.copy_blob(*frame, *large, data.TRAIN_ID["bus"])[1], label)


def test_copyblob_is_the_probability_that_a_crop_gets_a_rare_class():
    root = FOLDER / "rare"
    for index, label_id in enumerate([12, 12, 28, 13, ROAD]):       # wall, wall, bus, fence
        label = np.full((100, 100), ROAD, np.uint8)     # a crop of 64 / 0.5 = 128 contains it
        height = 1 if label_id == 13 else 50
        label[:height, :49] = label_id                  # of the fence less than 0.5 %
        write_tree(root, label, name=f"ulm_{index}")
    for probability, low, high in (0.0, 0, 0), (0.3, 40, 80), (1.0, 200, 200):
        frames = data.Cityscapes(root, "train", (64, 64), copyblob=probability, scale=(0.5, 0.5))
        found = [np.unique(frames[5 * epoch + 4][1]).tolist() for epoch in range(200)]
        walls, buses = [sum(train_id in ids for ids in found) for train_id in (3, 15)]
        assert low <= walls + buses <= high
        assert abs(walls - 2 * buses) < 60
        assert not any(4 in ids for ids in found)       # fence; the frame itself has only road
    common = write_tree(FOLDER / "common", label)       # only road
    assert "copyblob" in raises(ValueError, data.Cityscapes, common, "train", (64, 64), 0.5)


def test_class_weights_equal_their_formulas():
    pixels = np.zeros((2, 19), np.int64)
    pixels[0, :2] = 60, 40
    pixels[1, 0] = 100
    rest = [1 / math.log(1.02)] * 17
    close(data.CLASS_WEIGHTS["enet"](pixels), [1 / math.log(1.82), 1 / math.log(1.22), *rest])
    f = [160 / 200, 40 / 100]                           # of the frames that hold the class
    close(data.CLASS_WEIGHTS["median"](pixels), [0.6 / f[0], 0.6 / f[1], *[0] * 17])


# --------------------------------------------------------- data: generated scenes

def test_scenes_are_the_same_bytes_for_the_same_seed():
    again, other = FOLDER / "scenes-again", FOLDER / "scenes-other-seed"
    data.make_scenes(again, train=6, val=3)
    data.make_scenes(other, train=6, val=3, seed=1)
    paths = [path.relative_to(again) for path in again.rglob("*.png")]
    assert len(paths) == 18                             # frames and labels
    for path in paths:
        assert (again / path).read_bytes() == (scenes() / path).read_bytes()
        assert (again / path).read_bytes() != (other / path).read_bytes()


def test_scenes_hold_every_class_and_four_are_rare():
    data.make_scenes(FOLDER / "full")                   # as train.py draws them
    for split, fewest in ("train", 20), ("val", 4):
        pixels = data.Cityscapes(FOLDER / "full", split).pixels
        assert ((pixels > 0).sum(axis=0) >= fewest).all()
        assert (pixels.sum(axis=1) == 124 * 256).all()      # of 128 rows, 4 are ignored
        shares = pixels.sum(axis=0) / pixels.sum()
        assert (shares[data.RARE] < 0.01).all()
        assert len(data.RARE) == 4


def test_scenes_are_complete_or_not_there_and_replace_nothing():
    folder = FOLDER / "interrupted"
    with mock.patch("os.replace", side_effect=KeyboardInterrupt):
        raises(KeyboardInterrupt, data.make_scenes, folder / "scenes", 1, 1)
    assert not list(folder.iterdir())
    (folder / "mine.txt").write_text("keep me")
    raises(FileExistsError, data.make_scenes, folder, 1, 1)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


# ------------------------------------------------------------------- train and eval

SMALL = "--model resnet18 --loss ce+dice --crop 64 64 --batch 2 --epochs 2 --amp off --device cpu"
TIMES = {"images_per_s", "data_wait", "seconds"}        # what may differ between equal runs


def tiny(name, classes=19, pretrained=False):
    """A fast network in the place of build_model's. It draws random numbers (stochastic depth)."""
    return unet.UNet(unet.ConvNeXt((1, 1, 1, 1), (8, 8, 8, 8), drop_path=0.8), classes)


def constant(*args):
    """A network that predicts road everywhere: the logit of road is 1, all others are 0."""
    network = torch.nn.Conv2d(3, 19, 1)
    network.weight.data.zero_()
    network.bias.data.copy_(torch.eye(19)[0])
    return network


def striped_tree(name, train=((7, 7, 7, 23),) * 2, val=((7, 7, 7, 23),)):
    """A tree of 64 x 64 frames, each given by the label ids of its four stripes -> its root."""
    for split, frames in ("train", train), ("val", val):
        for k, label_ids in enumerate(frames):
            label = np.repeat(np.uint8(label_ids), 16 * 64).reshape(64, 64)
            image = np.stack([10 * label, 0 * label, 255 - 10 * label], axis=2)
            write_tree(FOLDER / name, label, image, split, f"ulm_{k}")
    return FOLDER / name


def before_step(number, action):
    """A patch of train.seed_step, which begins each step: action() just before a step (from 0)."""
    original = train.seed_step                      # train's own, or that of a patch around this
    def seed_step(seed, step):
        if step == number:
            action()
        original(seed, step)
    return mock.patch("train.seed_step", seed_step)


def new(out):
    """The options of a new run on 6 training frames, 3 steps an epoch. Later ones replace them."""
    return "--data", scenes(), "--out", out, *SMALL.split()


def run(*options, build=tiny, until=None):
    """train.main() up to an error (1 / 0) before step `until` -> printed text, with the status."""
    before = list(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))
    with (mock.patch("train.build_model", build), before_step(until, lambda: 1 / 0),
          contextlib.redirect_stdout(io.StringIO()) as printed):
        try:
            train.main(list(map(str, options)))
        except ZeroDivisionError:
            pass
        except SystemExit as stop:
            print(f"status {stop.code}")
    assert before == list(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)))
    return printed.getvalue()


def one_line(module, *options, build=unet.build_model):
    """Run a script that must end with status 2 and one line on standard error -> the line."""
    words, script = list(map(str, options)), Path(module.__file__).name
    with (contextlib.redirect_stderr(io.StringIO()) as stderr, mock.patch("sys.argv", [script]),
          mock.patch("train.build_model", build)):
        status = raises(SystemExit, evaluation.command_line, lambda: module.main(words))
    line = stderr.getvalue()
    assert status == "2", line                      # `raises` returns text
    assert re.fullmatch(f"{script}: error: .+\n", line), line
    return line


def score(*options, build=unet.build_model):
    """eval.main() on the CPU -> the dicts of metrics.json, what it printed."""
    with (mock.patch.object(evaluation, "build_model", build),
          contextlib.redirect_stdout(io.StringIO()) as printed):
        results = evaluation.main([*map(str, options), "--device", "cpu"])
    return results, printed.getvalue()


def load(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)


@functools.cache
def whole_run():
    """The folder of a tiny run of 6 steps that was not interrupted."""
    run(*new(FOLDER / "whole"))
    return FOLDER / "whole"


@functools.cache
def checkpoint():
    """The folder of a run of the real resnet18: 16 frames of road and sky in different colors."""
    tree = striped_tree("road-and-sky", itertools.product([7, 23], repeat=4),
                        [(7, 0, 23, 7), (7, 7, 23, 23), (23, 7, 7, 0)])
    run(*new(FOLDER / "run"), "--data", tree, "--lr", "0.05", "--no-pretrained",
        "--scale", "1", "1", build=unet.build_model)
    return FOLDER / "run"


def assert_same_run(out, whole):
    """Two finished runs are equal bit by bit: weights, optimizer, scaler, scores and log."""
    a, b = load(whole), load(out)
    assert a.keys() == b.keys()
    assert len(b["log"]) == a["epoch"] == 2
    torch.testing.assert_close(b["optimizer"]["state"], a["optimizer"]["state"], rtol=0, atol=0)
    for key in a.keys() - {"optimizer", "log", "settings"}:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=0)
    for row, other in zip(a["log"], b["log"]):
        assert all(row[key] == other[key] for key in row.keys() - TIMES)


def first_steps(until, *options):
    """A tiny run until before a step -> network with the last gradients, batches, printed text."""
    networks, batches = [], []
    def build(*args):
        networks.append(tiny(""))
        networks[0].register_forward_pre_hook(lambda network, inputs: batches.append(inputs[0]))
        return networks[0]
    printed = run(*new(tempfile.mkdtemp(dir=FOLDER)), *options, build=build, until=until)
    return networks[0], batches, printed


def launch(out, *options, pause=0.1, torchrun=False):
    """Start a tiny run in a new process group, with `torchrun` as two processes -> Popen.
    An item takes `pause` seconds longer, so that a signal comes in time. Ranks write down items."""
    script = FOLDER / f"{out.name}.py"
    script.write_text(f"""import multiprocessing, signal, sys, time, torch
sys.path.insert(0, {str(HERE)!r})
import data, eval, train, unet
{inspect.getsource(tiny)}
def read(frames, k, original=data.Cityscapes.__getitem__):
    time.sleep({pause!r})
    if torch.utils.data.get_worker_info():
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    if frames.crop:
        print(k, file=open(f"{out}-{{train.RANK}}", "a"))
    return original(frames, k)
train.build_model, data.Cityscapes.__getitem__ = tiny, read
if __name__ == "__main__":
    if sys.platform == "linux":
        multiprocessing.set_start_method("forkserver")          # as Python 3.14 does
    eval.command_line(train.main)
""")
    words = [script, *new(out), "--save-minutes", "0", *options]
    if torchrun:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    return subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for_save(process, out):
    while not (out / "last.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def finish(process):
    """What the process printed. Returns once no child of it holds its output open any more."""
    return process.communicate(timeout=120)[0]


def test_learning_rate_formula():
    args = Namespace(lr=2.0, epochs=10)
    close(train.learning_rate(args, 49, 100), 2 * 0.5 * (1 - 49 / 1000)**0.9)   # warmup: an epoch
    close(train.learning_rate(args, 249, 1000), 2 * 0.5 * (1 - 249 / 10000)**0.9)   # or 500 steps
    close(train.learning_rate(args, 500, 100), 2 * 0.5**0.9)
    close(train.learning_rate(args, 999, 100, factor=0.1), 0.2 * 0.001**0.9)


def test_the_first_step_after_init():
    """It changes a weight by rate x 1.9 g: Nesterov's g + 0.9 m, where m = g at first, and g is the
    gradient + decay x weight. With --compile, it does the same. It takes the frames of --seed."""
    start = load(whole_run(), "best.pt")["model"]
    words = "--encoder-lr", "0.1", "--weight-decay", "0.5", "--lr", "0.6", "--seed", "1"
    network, batches, _ = first_steps(1, "--init", whole_run(), *words)
    eagerly = functools.partial(torch.compile, backend="eager")     # needs no C compiler
    with mock.patch("torch.compile", side_effect=eagerly) as compiler:
        compiled, _, _ = first_steps(1, "--init", whole_run(), *words, "--compile")
    for (name, after), other in zip(network.named_parameters(), compiled.parameters()):
        factor = 0.1 if name.startswith("encoder.") else 1.0
        decay = 0.5 if after.ndim > 1 else 0.0      # not for biases and norms
        step = 0.6 / 3 * factor * 1.9 * (after.grad + decay * start[name])      # warmup 1 of 3
        close(start[name] - after, step, 1e-3, 1e-6)
        close(other, after, 1e-3, 1e-4)
    frames = data.Cityscapes(scenes(), "train", (64, 64), seed=1, scale=(0.8, 1.25))
    images = torch.stack([frames[k][0] for k in data.epoch_batches(0, 6, 2, seed=1)[0]])
    assert compiler.called
    assert torch.equal(batches[0], data.normalize(images))                    # as --seed says


def test_init_with_other_classes_takes_all_but_the_last_layer():
    saved, path = load(whole_run(), "best.pt"), FOLDER / "eleven.pt"
    for name in "head.weight", "head.bias":
        saved["model"][name] = saved["model"][name][:11]
    torch.save(saved, path)
    network, _, told = first_steps(0, "--init", path, "--seed", "1")
    assert told.count(f"{path}: has 11 classes instead of 19") == 1
    torch.manual_seed(1)
    for name, random in tiny("").named_parameters():
        expected = random if name.startswith("head.") else saved["model"][name]
        assert torch.equal(network.get_parameter(name), expected), name


def test_the_loss_in_the_log_with_class_weights_and_with_copyblob():
    """Constant logits on two frames of road and one of wall: cross-entropy by hand."""
    tree = striped_tree("walls", [[7] * 4, [7] * 4, [12] * 4])
    wall = math.log(math.e + 18)                    # the logit of road is 1, all others are 0
    road = wall - 1
    w_road = 1 / math.log(1.02 + 2 / 3)
    w_wall = 1 / math.log(1.02 + 1 / 3)
    weighted = np.average([road, road, wall], weights=[w_road, w_road, w_wall])
    for name, options, expected in (
            ("steps", "--batch 1", np.mean([road, road, wall])),
            ("weights", "--batch 3 --class-weights enet", weighted),
            ("blobs", "--batch 3 --copyblob", wall)):           # which covers every frame
        options = f"--data {tree} --loss ce --lr 1e-9 --scale 1 1 {options}"
        run(*new(FOLDER / name), *options.split(), build=constant)
        assert (FOLDER / name / "copyblob.png").exists() == (name == "blobs")
        for row in load(FOLDER / name)["log"]:
            close(row["loss"], expected)


def test_training_learns_and_leaves_its_files():
    out = checkpoint()
    first, last = load(out)["log"]                  # road everywhere has mIoU (0.6 + 0) / 2
    assert last["loss"] < 0.5 * first["loss"]
    assert last["miou"] > 0.8
    assert {path.name for path in out.iterdir()} == {"best.pt", "last.pt", "log.csv", "curves.png"}
    header, _, _ = (out / "log.csv").read_text().splitlines()
    columns = "epoch,loss,lr,pixel_accuracy,miou,mean_dice,images_per_s,data_wait,seconds,gpu_gib"
    assert header == ",".join([columns, *[f"iou {c.name}" for c in data.CLASSES]])


def test_progress():
    """A clock that runs 31 s ahead whenever it is read: a step takes 62 s, half of it waiting."""
    with mock.patch.object(train, "time") as clock:
        clock.monotonic.side_effect = itertools.count(0, 31)
        printed = run(*new(FOLDER / "progress"))
    for row in load(FOLDER / "progress")["log"]:
        assert (row["data_wait"], row["images_per_s"]) == (0.5, 2 / 62)
        assert re.search(rf"\nepoch {row['epoch']}/2  step 3/3  loss {row['loss']:.3f}  0.0 img/s  "
                         r"left 0:0[03]:0[06]\n", printed)          # the mean of the epoch so far


def test_best_is_the_best_epoch_and_a_run_can_be_extended():
    """The truth is 3/4 road and 1/4 sky: all road has mIoU (0.75 + 0) / 2, all sky 0.25 / 2."""
    network, out = constant(), FOLDER / "best"
    road = functools.partial(network.bias.data.copy_, torch.eye(19)[0])
    sky = functools.partial(network.bias.data.copy_, torch.eye(19)[10])
    with before_step(0, sky), before_step(1, road), before_step(2, sky):
        run(*new(out), "--data", striped_tree("best-tree"), "--lr", "1e-9", "--epochs", "3",
            build=lambda *args: network)            # one step an epoch
    best, last = load(out, "best.pt"), load(out)
    assert [row["miou"] for row in last["log"]] == [0.125, 0.375, 0.125]
    assert (best["epoch"], best["best_miou"], last["best_miou"]) == (2, 0.375, 0.375)
    assert [saved["model"]["bias"].argmax() for saved in (best, last)] == [0, 10]
    (out / "best.pt").unlink()
    told = run("--resume", out, "--epochs", "4", "--lr", "1e-8", build=constant)
    assert "best validation mIoU 0.125\nnow: " in told
    assert load(out, "best.pt")["epoch"] == 4
    close(load(out)["log"][3]["lr"], 1e-8 * 0.25**0.9, absolute=0)


def test_runs_without_out_keep_the_files_of_the_run_before():
    words, earlier, later = SMALL.split(), Path("runs/resnet18-ce"), Path("runs/resnet18-dice-2")
    with contextlib.chdir(tempfile.mkdtemp(dir=FOLDER)):
        run("--data", scenes(), *words, "--loss", "ce")
        files = {path.name: path.read_bytes() for path in Path().iterdir()}
        run("--data", scenes(), *words, "--loss", "dice", until=0)    # error before step 0
        assert files["best.pt"] == Path("best.pt").read_bytes()     # not moved before it must be
        told = run("--data", scenes(), *words, "--loss", "dice", "--save-minutes", "0", until=4)
        assert told.count(f"the files of the earlier run are now in {earlier}\n") == 1
        assert files == {path.name: path.read_bytes() for path in earlier.iterdir()}
        results, _ = score("--ckpt", earlier, "best.pt", build=tiny)
        assert [result["settings"]["loss"] for result in results] == ["ce", "dice"]
        later.with_name("resnet18-dice").mkdir()    # the name is taken
        told = run("--data", scenes(), *words, "--epochs", "1")         # ce+dice
        assert f"to continue it: python train.py --resume {later}\n" in told
        run("--resume", later)
        assert load(later)["epoch"] == 2
        assert load(Path())["settings"]["loss"] == "ce+dice"


def test_a_full_disk_and_numbers_that_are_not_finite_leave_the_last_good_file():
    """All happen in the second epoch, steps 2 and 3, so that last.pt stays that of the first."""
    def infinite_loss():                            # float16 skips the step: finite weights
        network.register_forward_hook(lambda network, inputs, output: output * math.inf)
    def infinite_weights():                         # in the last step: no later loss shows them
        network.bias.register_hook(lambda gradient: gradient * math.inf)
    full = mock.patch("os.fsync", side_effect=OSError(28, "No space left on device"))
    tree = striped_tree("four", [[7] * 4] * 4)      # two steps an epoch
    for step, action, amp, part in ((2, infinite_loss, "fp16", "the loss or the weights are not"),
                                    (3, infinite_weights, "off", "the loss or the weights are not"),
                                    (2, full.start, "off", "last.pt: cannot be written (No space")):
        network, out = constant(), Path(tempfile.mkdtemp(dir=FOLDER))
        with before_step(step, action):
            words = *new(out), "--data", tree, "--amp", amp
            line = one_line(train, *words, build=lambda *args: network)
        mock.patch.stopall()                        # the disk is no longer full
        assert part in line
        assert load(out)["step"] == 2
        assert not list(out.glob("*.part"))
        assert load(out)["model"]["bias"].isfinite().all()


def test_float16_gradients_that_overflow():
    """Step 0 of 2 is skipped; the halved scale survives a resume. Step 1 is rate x 1.9 g, as any
    first step. If every step overflows, the run ends with one line."""
    def overflowing(*args):
        network = constant()
        network.bias.register_hook(lambda gradient: gradient * math.inf)
        return network
    once, options = FOLDER / "once", ("--data", striped_tree("overflow"), "--amp", "fp16")
    run(*new(once), *options, until=1, build=overflowing)
    run("--resume", once, build=constant)
    last = load(once)
    momentum = last["optimizer"]["state"][1]["momentum_buffer"]     # of the bias
    close(torch.eye(19)[0] - last["model"]["bias"], last["log"][1]["lr"] * 1.9 * momentum)
    assert last["scaler"]["scale"] == 65536 / 2
    assert momentum.any()
    words = *new(FOLDER / "always"), *options, "--epochs", "20"
    assert "--amp off" in one_line(train, *words, build=overflowing)


def test_resume_after_errors_and_signals_is_exact():
    """After a signal, the run ends after the step, and one line says how to continue."""
    def interrupt():
        for _ in range(3):                          # repeated signals change nothing
            signal.raise_signal(number)
    for number in signal.SIGTERM, signal.SIGINT:
        out = FOLDER / f"signal-{number}"
        with before_step(1, interrupt):             # in the second step
            told = run(*new(out), "--workers", "2")
        line = f"stopped; continue with: python train.py --resume {out / 'last.pt'}\n"
        assert told.endswith(f"{line}status {128 + number}\n")
        assert load(out)["step"] == 2
        run("--resume", out, until=5)               # an error; the epoch was saved after 3 steps
        assert load(out)["step"] == 3
        run("--resume", out)
        assert_same_run(out, whole_run())
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)       # as nohup and a shell's & do
    with before_step(5, interrupt):                 # with SIGINT, the last `number`
        run(*new(FOLDER / "ignored"))
    signal.signal(signal.SIGINT, before)
    assert_same_run(FOLDER / "ignored", whole_run())


def test_resume_after_a_signal_in_the_validation_is_exact():
    """It ends after the current frame. --val-every leaves out epochs, but never the last one."""
    def interrupt(network, inputs):
        if not network.training:
            validated.append(inputs)
            signal.raise_signal(signal.SIGTERM)
    whole, out, validated = FOLDER / "every-5", FOLDER / "validation", []
    options = "--val-every", "5", "--optimizer", "adamw"
    run(*new(whole), *options)
    torch.manual_seed(0)                            # as --seed does
    network = tiny("")
    network.register_forward_pre_hook(interrupt)
    assert "status 143" in run(*new(out), *options, build=lambda *args: network)
    assert len(validated) == 1
    saved = load(out)
    assert (saved["step"], saved["epoch"]) == (6, 1)
    torch.save({**saved, "seconds": 100.0}, out / "last.pt")
    run("--resume", out)
    assert_same_run(out, whole)
    first, second = load(out)["log"]
    assert first["miou"] is None and second["miou"] is not None
    assert second["images_per_s"] < 1                   # of the whole epoch, with those 100 s


def test_signals_to_the_process_group():
    """The same command starts and continues. No process remains, not even a worker (`finish`)."""
    for workers, number, status in ((0, signal.SIGINT, 130), (2, signal.SIGTERM, 143),
                                    (2, signal.SIGKILL, -signal.SIGKILL)):
        out = FOLDER / f"group-{status}"
        process = launch(out, "--resume", "--workers", workers)
        wait_for_save(process, out)
        for pause in 0.05, 0.01, 0.01:              # repeated signals, while it waits for data
            time.sleep(pause)
            os.killpg(process.pid, number)
        told = finish(process)
        line = f"stopped; continue with: python train.py --resume {out / 'last.pt'}\n"
        assert told.endswith(line) == (status > 0), told
        assert "Traceback" not in told, told
        assert process.returncode == status
        assert load(out)["step"] < 6
        run(*new(out), "--resume")
        assert_same_run(out, whole_run())


def test_two_processes():
    """torchrun: frames are shared, SIGINT saves, resume is exact, eval.py agrees."""
    out, whole = FOLDER / "two", FOLDER / "two-whole"
    undisturbed, process = launch(whole, torchrun=True), launch(out, torchrun=True)
    wait_for_save(process, out)
    os.killpg(process.pid, signal.SIGINT)
    told = finish(process)
    assert process.returncode != 0 and load(out)["epoch"] < 2
    line = f"stopped; continue with: torchrun ... train.py --resume {out / 'last.pt'}\n"
    assert told.count(line) == told.count("stopped") == 1, told
    told = finish(launch(out, "--resume", pause=0, torchrun=True))
    assert told.count("resnet18 from step") == told.count("epoch 2/2") == 1, told
    finish(undisturbed)
    assert_same_run(out, whole)
    ranks = [(FOLDER / f"two-whole-{rank}").read_text().split() for rank in range(2)]
    pairs = [{int(first), int(second)} for first, second in zip(*ranks, strict=True)]
    batches = data.epoch_batches(0, 6, 2, seed=0) + data.epoch_batches(1, 6, 2, seed=0)
    assert pairs == list(map(set, batches))
    (scored,), _ = score("--ckpt", out / "last.pt", "--out", FOLDER / "two-eval", build=tiny)
    for key in "miou", "mean_dice", "pixel_accuracy":
        close(scored[key], load(out)["log"][-1][key], 1e-9)


def test_errors_leave_no_process():
    """With data workers: a bug ends with its traceback, a broken frame with one line."""
    tree = shutil.copytree(scenes(), FOLDER / "broken-tree")
    frame = sorted((tree / "leftImg8bit/train").rglob("*.png"))[3]
    frame.write_bytes(frame.read_bytes()[:1000])
    bug = launch(FOLDER / "bug", "--workers", "2", pause="no number, so that sleep fails")
    broken = launch(FOLDER / "broken", "--workers", "2", "--data", tree, pause=0)
    assert "Traceback" in finish(bug)
    assert bug.returncode == 1
    assert finish(broken).splitlines()[-1].startswith(f"broken.py: error: {frame}: ")
    assert broken.returncode == 2


def test_resume_refuses_what_would_change_the_run():
    last, tree = whole_run() / "last.pt", FOLDER / "other-frames"
    for wrong in ("--loss ce", "--seed 1", "--crop 96 96", "--model resnet34", "--batch 3",
                  "--scale 1 2", "--optimizer adamw", "--copyblob", "--class-weights enet",
                  "--out elsewhere", "--epochs 1"):
        assert wrong.split()[0] in one_line(train, "--resume", last, *wrong.split(), build=tiny)
    for split in "train", "val":                    # a frame less
        shutil.copytree(scenes(), tree)
        for kind in "leftImg8bit", "gtFine":
            sorted((tree / kind / split).rglob("*.png"))[-1].unlink()
        assert "validation frames" in one_line(train, "--resume", last, "--data", tree, build=tiny)
        shutil.rmtree(tree)


def test_on_a_gpu():
    if not torch.cuda.is_available():
        raise unittest.SkipTest("there is no GPU")
    for amp in "bf16", "fp16":
        out, words = FOLDER / f"gpu-{amp}", "--device cuda --epochs 1 --workers 2 --amp".split()
        run(*new(out), *words, amp, build=unet.build_model)
        assert 0.01 < load(out)["log"][0]["gpu_gib"] < 4
        assert ("scale" in load(out)["scaler"]) == (amp == "fp16")


# Separated by ; or a new line: wrong options => part of the error (without =>, the first option).
WRONG_FOR_TRAIN = """\
--data {folder} => leftImg8bit_trainvaltest.zip; --resume {good}/typo.pt => has best.pt, last.pt
--data {folder}/no-train => gtFine/train; --data {folder}/no-val => gtFine/val; --resume ''
--out {good} => --resume {good}; --model convunext --pretrained => --no-pretrained
--resume {files} => last.pt: lacks; --model resnet34 --init {good} => of resnet18 with 19 classes
--resume {good}/best.pt => resume from the last.pt; --resume {files}/copy.pt => resume from the last
--data ~nosuchuser/x; --epochs 0; --epoch 2; --batch -1; --batch 7; --lr nan; --lr 0; --crop 32 32
--copyblob 1.5; --workers -1; --workers 1001; --seed x; --scale 0 1; --scale 2 1; --loss mse
--model vgg; --color red; --device cuda:99; --init x --pretrained; --data ''; --init ''; --out ''"""
WRONG_FOR_EVAL = """\
--ckpt {files}/resnet34.pt => of resnet34 with 19 classes
--ckpt {files}/nan.pt --out {out} => not finite; --ckpt {good} --split x => splits there: train, val
--ckpt {good} {good} --labels-out {out} => --labels-out
--ckpt {good} --images {folder}/none => {folder}/none; --ckpt {good} --out {good} => holds a run
--ckpt {good} --images {photos} --out {photos} => holds the photos
--ckpt ''; --data '' --ckpt x; --images '' --ckpt x; --out '' --ckpt x"""


def test_bad_command_lines_are_one_line():
    """Nothing is overwritten, and no code of a file runs."""
    out, good, files = FOLDER / "refused", checkpoint(), Path(tempfile.mkdtemp(dir=FOLDER))
    (files / "junk.pt").write_text("not a checkpoint")
    shutil.copy(good / "last.pt", files / "copy.pt")
    (files / "cut.pt").write_bytes((good / "best.pt").read_bytes()[:100_000])
    torch.save({"model": Hostile(), "settings": {}}, files / "hostile.pt")
    saved = load(good)
    torch.save({"model": saved["model"], "settings": saved["settings"]}, files / "part.pt")
    torch.save({**saved, "settings": {"model": "resnet18"}}, files / "bare.pt")
    for name in "u-net", "resnet34":                # what the file says that its model is
        settings = {**saved["settings"], "model": name}
        torch.save({**saved, "settings": settings}, files / f"{name}.pt")
    saved["model"]["head.bias"][0] = math.nan
    torch.save(saved, files / "nan.pt")
    del saved["waited"]
    torch.save(saved, files / "last.pt")
    striped_tree("no-train", [[0] * 4] * 2)
    striped_tree("no-val", val=[[0] * 4])
    photos = scenes() / "leftImg8bit/val/toytown"
    before = (good / "last.pt").read_bytes()
    for module, rows in (train, WRONG_FOR_TRAIN), (evaluation, WRONG_FOR_EVAL):
        rows = rows.format(folder=FOLDER, good=good, files=files, out=out, photos=photos)
        for row in re.split("; |\n", rows):
            options, _, part = row.partition(" => ")
            words = shlex.split(options)
            expected = part or words[0]
            if module is train and "--resume" not in words:
                words = [*new(out), *words]
            assert expected in one_line(module, *words), row
    for name in "junk", "cut", "part", "bare", "hostile", "u-net", "missing":
        file = f"{files}/{name}.pt"
        assert file in one_line(train, "--resume", file)
        assert file in one_line(train, *new(out), "--init", file)
        assert file in one_line(evaluation, "--ckpt", file)
    assert before == (good / "last.pt").read_bytes()
    with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "99"}):
        # train.WORLD_SIZE was read at the import, and stays 1.
        assert "use python eval.py" in one_line(evaluation, "--ckpt", good)
        assert "cuda:99" in one_line(train, *new(out), "--device", "cuda")  # that of LOCAL_RANK
    with mock.patch("train.WORLD_SIZE", 2), mock.patch("train.dist"):
        assert "2 processes" in one_line(train, *new(out), "--batch", "3")
    assert not list(out.rglob("*.pt"))
    assert not (FOLDER / "owned").exists()


def test_eval_by_its_own_predictions():
    """Score the PNGs that eval.py wrote in loops, and compare with its metrics.json."""
    out, predictions = FOLDER / "eval", FOLDER / "predictions"
    score("--ckpt", checkpoint(), "--out", out, "--labels-out", predictions)
    result, both, either = json.loads((out / "metrics.json").read_text()), Counter(), Counter()
    for path in (FOLDER / "road-and-sky/gtFine/val").rglob("*_labelIds.png"):
        guess = np.array(Image.open(predictions / path.name.replace("gtFine", "pred")))
        truth = np.array(Image.open(path))
        for c in data.CLASSES:
            is_true, is_guessed = truth == c.label_id, (guess == c.label_id) & (truth != 0)
            both[c.name] += (is_true & is_guessed).sum()
            either[c.name] += (is_true | is_guessed).sum()
    for name, scores in result["classes"].items():
        expected = both[name] / either[name] if either[name] > 0 else None
        assert scores["iou"] == expected, name
    assert result["checkpoint"] == str(checkpoint() / "best.pt")    # a folder means its best.pt
    assert result["miou"] == load(checkpoint(), "best.pt")["best_miou"]
    assert (out / "panel_2_ulm_2.png").exists()


def test_tables_and_colors_by_hand():
    matrix = torch.zeros(19, 19).long()
    matrix[:2, :2] = torch.tensor([[6, 2], [1, 3]])     # road and sidewalk
    result = evaluation.summarize(matrix)
    lines = evaluation.class_table(result).split("\n")
    assert lines[1].split() == "sidewalk 0.500 0.667 33.33% road (50% of the union)".split()
    assert lines[2].split() == "road 0.667 0.800 66.67% sidewalk (33% of the union)".split()
    assert lines[3].split()[1:3] == ["n/a", "n/a"]
    assert lines[-2].split() == "mean of 2 0.583 0.733".split()
    assert lines[-1].endswith(" 0.750")
    perfect = evaluation.summarize(torch.eye(19).long())
    lines = evaluation.comparison(["a", "b"], [result, perfect]).split("\n")
    assert lines[1].split() == ["IoU", "road", "0.667", "1.000"]
    assert lines[-1].split() == ["classes", "in", "means", "2", "19"]
    image = np.full((1, 3, 3), 90, np.uint8)
    _, picture = evaluation.panel(image, np.uint8([[4, 4, 255]]), np.uint8([[4, 5, 4]]))[3]
    assert picture.tolist() == [[[30, 30, 30], [0, 255, 255], [0, 0, 0]]]   # right wrong ignored


def test_tta_averages_the_probabilities_of_three_scales_and_their_flips():
    """One of six passes is sure of class 0 (logit 20), three prefer class 1 (logit 3: p = 0.53),
    two class 2. Class 1 has the highest sum of probabilities, 1.6, class 0 that of logits, 20."""
    seen, images = [], torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    def model(x):
        class_id, logit = [(0, 20), (1, 3), (1, 3), (1, 3), (2, 3), (2, 3)][len(seen)]
        seen.append(x)
        logits = logit * torch.eye(19)[class_id].view(1, 19, 1, 1)
        return logits.expand(1, 19, *x.shape[2:])
    assert (evaluation.predict(model, images, tta=True) == 1).all()
    assert sorted(x.shape[2:] for x in seen[::2]) == [(24, 48), (32, 64), (40, 80)]
    for x, flipped in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(x, flipped.flip(3))
    def is_dark(x):                                 # of two classes, by the red of each pixel
        return torch.cat([x[:, :1], -x[:, :1]], dim=1)
    images[..., 32:] = 0                            # dark on the right
    images[..., :32] = 255
    prediction = evaluation.predict(is_dark, images, tta=True)
    assert torch.equal(prediction, evaluation.predict(is_dark, images))


def test_several_checkpoints():
    """Each has a name of its own, also two files of one folder. TTA is six passes for a frame."""
    passes, network = [], constant()
    network.register_forward_pre_hook(lambda *args: passes.append(1))
    out, names = FOLDER / "several", ["1_one_best", "2_two_best", "3_two_last"]
    for name in "one", "two":
        run(*new(out / name), "--data", striped_tree("several-tree"), build=constant)
    results, told = score("--ckpt", out / "one", out / "two", out / "two/last.pt", "--out", out,
                          "--tta", build=lambda *args: network)
    assert len(passes) == 3 * 6
    assert (out / "comparison.png").exists()
    assert re.search(" +".join(names), told)
    for name, result in zip(names, results):
        assert json.loads((out / name / "metrics.json").read_text()) == result


def test_photos_of_any_kind():
    """What fails is reported, the others are done; large ones are reduced to a frame, 64 x 64."""
    folder, out = Path(tempfile.mkdtemp(dir=FOLDER)), FOLDER / "photos-out"
    (out / "RGBA_color.png").mkdir(parents=True)    # so that it cannot be written
    (folder / "notes.txt").touch()
    (folder / "LA.png").write_bytes(b"broken")
    for mode, size in ("L", (40, 30)), ("1", (1, 1)), ("P", (1000, 400)), ("RGBA", (33, 17)):
        Image.new(mode, size).save(folder / f"{mode}.png")
    words = "--ckpt", checkpoint(), "--images", folder, "--out", out, "--labels-out", out
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        words = [*map(str, words), "--device", "cpu"]
        assert "2 of 5 photos" in raises(OSError, evaluation.main, words)
    told = told.getvalue()
    for text in (f"NOTE: 1 files or folders are not used, for example {folder / 'notes.txt'}",
                 f"{folder / 'P.png'}: 400 x 1000, predicted at 40 x 101",
                 f"skipped {folder / 'LA.png'}: ", f"skipped {folder / 'RGBA.png'}: "):
        assert text in told, told
    for mode in "L", "1", "P":
        label_ids = np.array(Image.open(out / f"{mode}_pred_labelIds.png"))
        colors = np.array([c.color for c in data.CLASSES])[data.LABEL_TO_TRAIN[label_ids]]
        assert np.array_equal(Image.open(out / f"{mode}_color.png"), colors)


def test_splits_with_and_without_labels_and_with_equal_names():
    label, out = np.full((30, 40), 7, np.uint8), FOLDER / "split-out"
    root = write_tree(FOLDER / "splits", label, split="test")
    words = "--ckpt", checkpoint(), "--data", root, "--split", "test", "--out", out
    for again in False, True:                           # first with labels, then without
        _, told = score(*words, "--labels-out", out)
        assert Image.open(out / "ulm_000000_000001_pred_labelIds.png").size == (40, 30)
        miou = json.loads((out / "metrics.json").read_text())["miou"]
        assert (miou is None) == again
        assert ("are replaced" in told) == again
        shutil.rmtree(root / "gtFine", ignore_errors=True)
    for city in "ulm", "bonn":                          # two frames of one name
        write_tree(root, label, split="test", city=city)
    assert score(*words)[0][0]["images"] == 2           # but PNGs would overwrite each other:
    assert "ulm_000000_000001" in raises(ValueError, score, *words, "--labels-out", out)


def test_readme_commands_exist_and_the_main_ones_run():
    parsers = {"train.py": train.parse_args, "eval.py": evaluation.parse_args, "test_all.py": list}
    text, folder = (HERE / "README.md").read_text(), FOLDER / "newcomer"
    lines = re.findall(r"^(?:python|torchrun) .*\.py.*", text.replace(" && ", "\n"), re.M)
    commands = [shlex.split(line, comments=True) for line in lines]
    for words in commands:
        script = next(word for word in words if word.endswith(".py"))
        parsers[script](words[words.index(script) + 1:])    # raises where an option is unknown
    shutil.copytree(scenes(), folder / "scenes")
    for words, budget, part in zip(commands[:2], ("--epochs 1 --crop 64 64", "--panels 1"),
                                   ("GENERATED SCENES, not Cityscapes", "worst first")):
        command = [sys.executable, HERE / words[1], *words[2:], *budget.split()]
        result = subprocess.run(command, cwd=folder, env={**os.environ, "CITYSCAPES_DATASET": ""},
                                capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert part in result.stdout, result.stderr
    assert {path.name for path in folder.iterdir()} == {        # and nothing else
        "best.pt", "last.pt", "log.csv", "curves.png", "eval", "scenes"}


if __name__ == "__main__":
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    suite = unittest.TestSuite(map(unittest.FunctionTestCase, tests))
    result = unittest.TextTestRunner(descriptions=False, verbosity=2, buffer=True).run(suite)
    failed, skipped = len(result.failures + result.errors), len(result.skipped)
    ending = f", {skipped} skipped" if skipped > 0 else ""
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed{ending}")
    sys.exit(failed > 0)
