"""All tests of the project, as a reference: `python test_all.py`, or `pytest test_all.py`.

The name of a test says what is promised. Read the helpers, here and at the beginning of a section,
then the tests that interest you. Runs are disturbed by patching train.seed_step.

Results are compared with something that does not share the code's mistakes: outputs of the
published networks, values computed by hand or in plain loops, numerical gradients. The promises
of a run are tested with the real main() of train.py and eval.py on a few small frames.
"""
import atexit
import contextlib
import copy
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
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

evaluation = importlib.import_module("eval")        # eval.py; the name eval is Python's own
HERE = Path(__file__).resolve().parent
FOLDER = Path(tempfile.mkdtemp(prefix="unet-test-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

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


def tiny(name, classes=19, pretrained=False):
    """A fast network in the place of build_model's. It draws random numbers (stochastic depth)."""
    return unet.UNet(unet.ConvNeXt((1, 1, 1, 1), (8, 8, 8, 8), drop_path=0.8), classes)


SMALL = "--model resnet18 --crop 64 64 --batch 2 --epochs 2 --amp off --device cpu".split()


def small_run(out, *options):
    """train.main() on the small tree, 3 steps an epoch -> the rows of its log."""
    return train.main(["--data", str(scenes()), "--out", str(out), *SMALL, *options])


def resume(out, *options):
    """Continue the run in `out` -> the rows of its log."""
    return train.main(["--resume", str(out / "last.pt"), *options])


def load(out, name="last.pt"):
    """The checkpoint of a run."""
    return torch.load(out / name, weights_only=True)


def checkpoint():
    """The folder of a small finished run of resnet18, trained once."""
    out = FOLDER / "run"
    if not (out / "best.pt").exists():
        small_run(out, "--copyblob", "0.5", "--class-weights", "enet")
    return out


class Hostile:
    """An object whose pickle makes the folder FOLDER/owned when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (str(FOLDER / "owned"),)


# ---------------------------------------------------------------------------- unet

# Outputs of the published networks (torchvision, facebookresearch/ConvNeXt and
# 1914669687/ConvUNeXt) with the weights that `fill` gives: a hash of all keys and shapes, then
# the shape, mean, first and sixth value of each output.
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
    """Give every weight a fixed value of a suitable scale."""
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
    """The input that belongs to `fill`."""
    t = 0.11 * torch.arange(3 * h * w, dtype=torch.float64)
    return torch.sin(t).reshape(1, 3, h, w).float()


@torch.no_grad()
def test_outputs_equal_those_of_the_published_networks():
    for name, (known_hash, numbers) in PUBLISHED.items():
        model = unet.build_model(name).eval()
        module = model if name == "convunext" else model.encoder
        state = sorted(module.state_dict().items())
        keys = "\n".join(f"{key} {list(value.shape)}" for key, value in state)
        assert hashlib.sha256(keys.encode()).hexdigest().startswith(known_hash), name
        fill(module)
        outputs = module(wave(64, 96))
        if name == "convunext":
            outputs = [outputs, module(wave(70, 90))]
        assert len(outputs) == len(numbers)
        for output, (shape, mean, first, sixth) in zip(outputs, numbers):
            assert output.shape[1:] == shape
            flat = output.flatten().double()
            tolerance = 1e-4 * flat.abs().mean().item()
            close([flat.mean(), flat[0], flat[5]], [mean, first, sixth], 1e-4, tolerance)


@torch.no_grad()
def test_networks_take_any_input_size():
    for name in unet.MODELS:
        model = unet.build_model(name, num_classes=5).eval()
        for size in (1, 1), (1, 40), (33, 65), (63, 2):
            logits = model(torch.zeros(2, 3, *size))
            assert logits.shape == (2, 5, *size), (name, size)
            assert logits.isfinite().all(), (name, size)


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
def test_unet_pads_encodes_decodes_upsamples_and_crops():
    for name in "resnet18", "convnext_tiny":
        model = unet.build_model(name, num_classes=5).eval()
        fill(model)
        padded = torch.zeros(1, 3, 64, 96)
        padded[..., :50, :70] = wave(50, 70)
        maps = model.encoder(padded)
        assert len(model.ups) == len(maps) - 1
        y = maps[-1]
        for up, skip in zip(model.ups, reversed(maps[:-1])):
            y = up(y, skip)
        logits = F.interpolate(model.head(y), (64, 96), mode="bilinear")
        close(model(wave(50, 70)), logits[..., :50, :70])


def test_too_few_decoder_widths_are_refused():
    encoder = unet.ResNet(unet.BasicBlock, (1, 1, 1, 1))
    raises(ValueError, unet.UNet, encoder, 5, (256, 128, 64))


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
            assert parameter.grad is not None and parameter.grad.any(), (name, key)


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
    for mode in "zeros", "reflect":
        conv = unet.DepthwiseConv(5, mode).double()
        x = torch.randn(2, 5, 6, 9, dtype=torch.float64, requires_grad=True)
        inputs = [x, *conv.parameters()]
        y, expected = conv(x), torch.nn.Conv2d.forward(conv, x)
        close(y, expected, 1e-12, 1e-12)
        gradients = torch.autograd.grad(y.sin().sum(), inputs)
        expected = torch.autograd.grad(expected.sin().sum(), inputs)
        for gradient, value in zip(gradients, expected):
            close(gradient, value, 1e-12, 1e-12)


def pretrained(name, file=None, answer=urllib.error.URLError("no network")):
    """build_model with ImageNet weights, where torch.hub's cache is a new folder.

    file: what somebody placed in the cache by hand; answer: the result or error of the download.
    """
    with (tempfile.TemporaryDirectory(dir=FOLDER) as hub,
          mock.patch("torch.hub.get_dir", return_value=hub),
          mock.patch("torch.hub.urlopen", side_effect=[answer]),
          contextlib.redirect_stderr(io.StringIO())):               # torch.hub's progress bar
        path = Path(hub, "checkpoints", unet.SPECS[name].url.split("/")[-1])
        path.parent.mkdir()
        if file is not None:
            torch.save(file, path)
        return unet.build_model(name, pretrained=True)


def test_missing_network_is_one_line_that_says_what_to_do():
    message = raises(OSError, pretrained, "resnet18")
    assert "\n" not in message
    for part in "no network", unet.SPECS["resnet18"].url, str(FOLDER), "--no-pretrained":
        assert part in message


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


def test_an_unverified_download_is_reported():
    for name in "resnet18", "convnext_tiny":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            raises(OSError, pretrained, name)
        assert ("not verified" in printed.getvalue()) == (name == "convnext_tiny")


def test_incomplete_and_hostile_weight_files_are_refused():
    state = unet.build_model("resnet18").encoder.state_dict()
    del state["layer1.0.conv1.weight"]
    assert "layer1.0.conv1.weight" in raises(OSError, pretrained, "resnet18", state)
    raises(OSError, pretrained, "resnet18", {"conv1.weight": Hostile()})
    assert not (FOLDER / "owned").exists()


def test_a_download_with_the_wrong_hash_is_refused():
    response = mock.MagicMock()
    response.__enter__().read.side_effect = [b"other bytes", b""]
    assert "invalid hash" in raises(OSError, pretrained, "resnet18", None, response)


def test_unknown_models_are_refused():
    assert "resnet18" in raises(ValueError, unet.build_model, "vgg")
    assert "--no-pretrained" in raises(ValueError, unet.build_model, "convunext", 19, True)


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
    ce, focal, dice = ce / weights, focal / weights, 1 - (w[:3] * score).sum() / w[:3].sum()
    return {"ce": ce, "focal": focal, "dice": dice, "ce+dice": ce + dice}


def test_losses_equal_their_formulas_with_and_without_class_weights():
    logits, target = example()
    for class_weights in None, torch.tensor([1.0, 3.0, 0.2, 7.0]):
        w = torch.ones(4) if class_weights is None else class_weights
        expected = loop_losses(logits, target, w.numpy())
        for name in losses.LOSSES:
            close(losses.build_loss(name, class_weights)(logits, target), expected[name])
        close(F.cross_entropy(logits, target, w, ignore_index=255), expected["ce"])
        close(losses.focal(logits, target, w, gamma=0.0), expected["ce"])
    assert {"ce", "dice", "focal", "ce+dice"} <= set(losses.LOSSES)


def test_losses_ignore_pixels_of_255():
    logits, target = example()
    other = logits.clone()
    other[0, :, 0] = torch.tensor([1e4, -1e4, 3.0, 0.0])[:, None]       # where the target is 255
    logits.requires_grad_()
    other.requires_grad_()
    for name in losses.LOSSES:
        loss = losses.build_loss(name)
        assert torch.equal(loss(logits, target), loss(other, target)), name
        gradient, = torch.autograd.grad(loss(logits, target), logits)
        other_gradient, = torch.autograd.grad(loss(other, target), other)
        assert torch.equal(gradient, other_gradient), name
        assert not other_gradient[0, :, 0].any(), name


def test_loss_gradients_equal_numerical_gradients():
    logits, target = example()
    for name in losses.LOSSES:
        loss = losses.build_loss(name, torch.tensor([1.0, 2.0, 0.5, 3.0]))
        x = logits.clone().requires_grad_()
        loss(x, target).backward()
        for index in (0, 0, 1, 1), (1, 2, 2, 4), (1, 3, 0, 0):
            step = torch.zeros_like(logits)
            step[index] = 0.05
            slope = (loss(logits + step, target) - loss(logits - step, target)) / 0.1
            close(x.grad[index], slope, 2e-2, 1e-4)


def test_losses_stay_finite():
    logits, target = example()
    ignored = torch.full_like(target, 255)
    for name in losses.LOSSES:
        for x, t in (logits, ignored), (1e4 * logits, target), (0 * logits, target):
            x = x.clone().requires_grad_()
            value = losses.build_loss(name)(x, t)
            value.backward()
            assert value.isfinite() and x.grad.isfinite().all(), name
            if t is ignored:
                assert value == 0 and not x.grad.any(), name


def test_losses_are_float32_under_autocast():
    logits, target = example()
    for name in losses.LOSSES:
        loss = losses.build_loss(name)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(logits.half(), target)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(logits.half().float(), target)), name

    def probe(logits, target, weights):
        return torch.is_autocast_enabled("cpu")

    with mock.patch.dict(losses.LOSSES, probe=probe), torch.autocast("cpu", torch.bfloat16):
        assert losses.build_loss("probe")(logits, target) is False


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
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for t, p in zip(target.flatten().tolist(), prediction.flatten().tolist()):
        if t != 255:
            expected[t, p] += 1
    m = metrics.confusion_matrix(prediction.byte(), target.byte(), 4)
    assert m.dtype == torch.int64 and torch.equal(m, expected)
    raises(ValueError, metrics.confusion_matrix, prediction + 4, target, 4)
    raises(ValueError, metrics.confusion_matrix, prediction - 1, target, 4)
    raises(ValueError, metrics.confusion_matrix, prediction, target.clamp(max=200), 4)
    raises(ValueError, metrics.confusion_matrix, prediction[0], target, 4)


def test_scores_equal_values_computed_by_hand():
    m = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]])
    nan = float("nan")
    close(metrics.pixel_accuracy(m), 9 / 16)
    close(metrics.iou(m), [6 / 9, 3 / 10, 0, nan])      # class 2 is missed, class 3 is nowhere
    close(metrics.dice(m), [12 / 15, 6 / 13, 0, nan])
    close(metrics.iou(m).nanmean(), (6 / 9 + 3 / 10 + 0) / 3)
    close(metrics.confusion_shares(m)[:3], [[0, 3 / 9, 0, 0], [3 / 10, 0, 4 / 10, 0], [0, 1, 0, 0]])
    close(metrics.confusion_shares(m).sum(dim=1), 1 - metrics.iou(m))
    predicted_never_true = torch.tensor([[5, 1], [0, 0]])
    close(metrics.iou(predicted_never_true), [5 / 6, 0])
    close(metrics.pixel_accuracy(torch.zeros(2, 2, dtype=torch.int64)), nan)


# ------------------------------------------------------------------- data: reading

ROAD, BUILDING, TRAILER = 7, 11, 30                     # label ids


def test_label_table():
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    names = [c.name for c in data.CLASSES]
    assert [c.label_id for c in data.CLASSES] == ids
    assert names[3:5] == ["wall", "fence"] and names[13:17] == ["car", "truck", "bus", "train"]
    for label_id in range(256):
        train_id = ids.index(label_id) if label_id in ids else 255
        assert data.LABEL_TO_TRAIN[label_id] == train_id
    assert data.TRAIN_TO_LABEL[:19].tolist() == ids
    assert (data.TRAIN_TO_LABEL[19:] == 255).all()


def test_one_line_of_the_table_counts_trailers_as_trucks():
    label = np.full((10, 10), TRAILER, np.uint8)
    label[:4] = ROAD
    frames = data.Cityscapes(write_tree(FOLDER / "trailers", label), "train")
    table = data.LABEL_TO_TRAIN.copy()
    table[30] = 255
    with mock.patch("data.LABEL_TO_TRAIN", table):
        assert data.class_pixels(frames).sum() == 40    # cached: only the road counts
    table[30] = data.TRAIN_ID["truck"]
    with mock.patch("data.LABEL_TO_TRAIN", table):
        target = frames[0][1]
        pixels = data.class_pixels(frames)
    assert (target == 14).sum() == 60
    assert pixels[0, 0] == 40 and pixels[0, 14] == 60
    close(data.class_weights(pixels, "enet")[14], 1 / math.log(1.02 + 0.6))


def read_counts(counts):
    """Read a label file that holds {value: pixels}, in one row -> its ids and train ids."""
    label = np.repeat(np.array(list(counts), np.uint8), list(counts.values()))[None]
    frames = data.Cityscapes(write_tree(FOLDER / "counts", label), "train")
    return label, frames[0][1].numpy()


def test_train_ids_in_a_label_ids_file_are_noticed():
    for counts in ({0: 400, 1: 60, 2: 250, 8: 150, 10: 40, 13: 80, 255: 60},    # a street
                   {0: 300, 1: 40, 2: 300, 3: 20, 5: 15, 8: 90, 11: 20, 18: 5, 255: 50},
                   {0: 350, 2: 150, 4: 30, 5: 12, 6: 3, 7: 8, 10: 200},         # no sidewalk
                   {0: 350, 2: 200, 8: 250, 10: 100, 13: 100, 255: 60},
                   {0: 500, 1: 60, 2: 90, 5: 10, 8: 300, 10: 90, 13: 30, 19: 70}):     # 19: ignored
        message = raises(ValueError, read_counts, counts)
        assert "labelTrainIds.png" in message and "gtFine/train/ulm/ulm_000000" in message


def test_unusual_label_ids_are_read():
    for counts in ({1: 50, 3: 30, 4: 20, 7: 400, 8: 60, 11: 250, 21: 90, 23: 40, 26: 60},
                   {1: 200, 2: 20, 3: 100, 7: 50, 26: 20},                      # a dark frame
                   {0: 10, 1: 60, 3: 20, 4: 10, 7: 400, 8: 90, 11: 250, 17: 20},        # a tunnel
                   {0: 100},
                   {0: 60, 7: 40},
                   {0: 5, 1: 10, 2: 5, 3: 80},                  # the dummies of the test split
                   {7: 10, 33: 10, 255: 10}):                   # 255: license plate, id -1
        label, target = read_counts(counts)
        assert np.array_equal(target, data.LABEL_TO_TRAIN[label])


def test_other_classes_may_have_any_label_ids():
    assert "40" in raises(ValueError, read_counts, {1: 60, 2: 30, 40: 10})
    table, classes = np.full(256, 255, np.uint8), list(data.CLASSES)
    for train_id, label_id in enumerate((1, 2, 40)):
        table[label_id] = train_id
        classes[train_id] = data.Class("mine", label_id, (0, 0, 0))
    with mock.patch("data.LABEL_TO_TRAIN", table), mock.patch("data.CLASSES", classes):
        _, target = read_counts({1: 60, 2: 30, 7: 5, 40: 5})        # like train ids, but for 40
        assert np.bincount(target[0], minlength=4)[:3].tolist() == [60, 30, 5]
        read_counts({1: 60, 2: 30, 7: 10})


def test_train_id_trees_are_read_as_they_are():
    label = np.arange(20, dtype=np.uint8).reshape(4, 5)
    label[3, 4] = 255
    root = write_tree(FOLDER / "ready", label)
    path = next(root.rglob("*_labelIds.png"))
    new_path = path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    frames = data.Cityscapes(root, "train")
    assert np.array_equal(frames[0][1].numpy(), label)
    assert data.class_pixels(frames).tolist() == [[1] * 19]
    Image.fromarray(label + 1).save(new_path)           # train id 19
    assert str(new_path) in raises(ValueError, frames.__getitem__, 0)


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
    bad_frame(root, FileNotFoundError, "ulm_000000_000001", "ulm_000000_000002")
    shutil.rmtree(root / "gtFine")
    bad_frame(root, FileNotFoundError, "1 of 1 train frames have no label")


def test_folders_that_may_not_be_read_are_an_error():
    root, image, label = good_tree("unreadable")
    denied = PermissionError(13, "Permission denied", str(image.parent))
    with mock.patch.object(Path, "iterdir", side_effect=denied):
        bad_frame(root, PermissionError, image.parent)


def test_broken_files_are_named():
    root, image, label = good_tree("broken-files")
    for path in image, label:
        whole = path.read_bytes()
        wrong_checksum = whole[:45] + b"????" + whole[49:]
        for broken in whole[:40], b"", b"no picture", wrong_checksum:
            path.write_bytes(broken)
            bad_frame(root, OSError, path)
        Image.open(io.BytesIO(whole)).save(path, exif=b"Exif\0\0no TIFF header")
        bad_frame(root, OSError, path)
        path.write_bytes(whole)


def test_labels_of_the_wrong_kind_are_named():
    root, image, label = good_tree("wrong-labels")
    for mode in "RGB", "P", "I;16":
        Image.new(mode, (6, 4)).save(label)
        bad_frame(root, ValueError, label, mode, "labelIds.png")
    Image.new("L", (6, 4), 77).save(label)
    bad_frame(root, ValueError, label, "77")
    Image.new("L", (6, 4), 34).save(label)
    bad_frame(root, ValueError, label, "34")
    Image.new("L", (6, 5), ROAD).save(label)
    bad_frame(root, ValueError, label, "(6, 5)", "(6, 4)")
    Image.new("L", (6, 4), ROAD).save(label, format="JPEG")         # JPEG changes the ids
    bad_frame(root, OSError, label, "PNG")


def test_decompression_bombs_are_refused():
    root, image, label = good_tree("bomb")
    with mock.patch("PIL.Image.MAX_IMAGE_PIXELS", 11):              # of 24; Pillow allows double
        bad_frame(root, OSError, image, "decompression bomb")


def test_postscript_named_png_never_reaches_ghostscript():
    path = FOLDER / "postscript.png"
    Image.new("RGB", (6, 4)).save(path, format="EPS")
    with mock.patch("PIL.EpsImagePlugin.Ghostscript") as ghostscript:
        assert str(path) in raises(OSError, data.read_image, path)
        assert str(path) in raises(OSError, data.read_label, path)
    ghostscript.assert_not_called()


def test_frames_are_sorted_in_any_order_of_the_file_system():
    names, iterdir = data.Cityscapes(scenes(), "train").names, Path.iterdir
    for reverse in False, True:
        def listed(folder):
            return sorted(iterdir(folder), reverse=reverse)

        with mock.patch.object(Path, "iterdir", listed):
            assert data.Cityscapes(scenes(), "train").names == names == sorted(names)


def test_macos_files_are_ignored():
    root, image, label = good_tree("macos")
    image.with_name(f"._{image.name}").write_bytes(b"resource fork")
    label.with_name("._ulm_000000_000009_gtFine_labelIds.png").write_bytes(b"resource fork")
    assert len(data.Cityscapes(root, "train")) == 1


def test_pictures_of_any_mode_are_read():
    folder = FOLDER / "modes"
    folder.mkdir()
    ramp = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    for mode in "L", "RGB", "RGBA", "LA", "P":
        Image.fromarray(ramp).convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(ramp).convert("CMYK").save(folder / "CMYK.tif")
    Image.fromarray(ramp.astype(np.uint16) * 256 + 99).save(folder / "16 bits.png")
    Image.fromarray((ramp.astype(np.uint16) * 256).astype(">u2")).save(folder / "big endian.tif")
    assert len(list(folder.iterdir())) == 8
    for path in folder.iterdir():
        picture = data.read_image(path)
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture)[..., 1], ramp), path
    for dtype in np.int32, np.float32:
        Image.fromarray(ramp.astype(dtype)).save(folder / "32 bits.tif")
        message = raises(ValueError, data.read_image, folder / "32 bits.tif")
        assert "32 bits.tif" in message and "\n" not in message


def test_photos_are_turned_upright():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6                                    # orientation: turn clockwise to view
    path = FOLDER / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    upright = np.asarray(data.read_image(path))
    assert np.array_equal(upright, np.rot90(pixels, -1))


# ------------------------------------------------------------------- data: dataset


def test_whole_frames_are_exact():
    label = np.arange(34, dtype=np.uint8).reshape(2, 17)
    label[0, 0] = 255                                   # license plate, id -1
    pixels = np.random.default_rng(0).integers(0, 256, (2, 17, 3), np.uint8)
    frames = data.Cityscapes(write_tree(FOLDER / "exact", label, pixels), "train")
    image, target = frames[0]
    assert image.dtype == target.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(target.numpy(), data.LABEL_TO_TRAIN[label])


def test_normalize_uses_imagenet_numbers_in_rgb_order():
    images = torch.tensor([10, 100, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    result = data.normalize(images)
    close(result[:, 0], torch.full((2, 4, 5), (10 / 255 - 0.485) / 0.229))
    close(result[:, 1], torch.full((2, 4, 5), (100 / 255 - 0.456) / 0.224))
    close(result[:, 2], torch.full((2, 4, 5), (200 / 255 - 0.406) / 0.225))
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    with mock.patch("torch.tensor") as copy:        # the constants are on the device by now
        data.normalize(images)
    assert not copy.called


def test_a_split_without_labels_reads_as_255():
    root = write_tree(FOLDER / "unlabeled", np.full((4, 6), ROAD, np.uint8), split="test")
    assert (data.Cityscapes(root, "test")[0][1] == 0).all()
    shutil.rmtree(root / "gtFine")
    frames = data.Cityscapes(root, "test")
    assert not frames.has_labels and len(frames) == 1
    assert frames[0][1].shape == (4, 6) and (frames[0][1] == 255).all()


def cropped(seed=0):
    return data.Cityscapes(scenes(), "train", crop=(48, 64), copyblob=0.5, seed=seed)


def test_samples_depend_on_seed_epoch_and_index():
    frames, again, other_seed = cropped(), cropped(), cropped(seed=1)
    backwards = [again[k] for k in reversed(range(12))]
    for k in range(12):                                 # epochs 0 and 1 of 6 frames
        image, label = frames[k]
        assert torch.equal(image, backwards[11 - k][0])
        assert torch.equal(label, backwards[11 - k][1])
        assert not torch.equal(image, frames[k + 6][0])             # the next epoch
        assert not torch.equal(image, other_seed[k][0])
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for name in "ulm_1", "ulm_2":                       # the same frame twice
        write_tree(FOLDER / "twice", np.full((64, 96), ROAD, np.uint8), noise, name=name)
    twice = data.Cityscapes(FOLDER / "twice", "train", crop=(48, 64))
    assert not torch.equal(twice[0][0], twice[1][0])


def test_forked_and_spawned_workers_give_the_same_samples():
    frames, items = cropped(), range(3, 9)
    forked = evaluation.make_loader(frames, 2, sampler=items)
    with mock.patch("sys.platform", "darwin"):          # where fork is not safe
        spawned = evaluation.make_loader(frames, 1, sampler=items, multiprocessing_context="spawn")
    assert spawned.multiprocessing_context.get_start_method() == "spawn"
    for loader in forked, spawned:
        for k, (image, label) in zip(items, loader, strict=True):
            assert torch.equal(image[0], frames[k][0]) and torch.equal(label[0], frames[k][1])


def test_workers_ignore_the_signals_that_stop_a_run():
    def report(batch):                                  # runs in the worker
        stop = signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1
        return [signal.getsignal(number) for number in stop]

    loader = evaluation.make_loader([0], 1, collate_fn=report)
    assert next(iter(loader)) == [signal.SIG_IGN] * 4


def test_workers_end_quietly_with_the_main_process():
    code = ("import eval as evaluation, torch\n"
            "frames = torch.utils.data.TensorDataset(torch.zeros(100))\n"
            "batches = iter(evaluation.make_loader(frames, 2))\n"
            "next(batches)\n")
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], text=True, timeout=50,
                            cwd=Path(data.__file__).parent, stderr=subprocess.PIPE)
    assert result.returncode == 0 and result.stderr == "", result.stderr


# -------------------------------------------------------------- data: augmentation

NO_JITTER = mock.patch("data.jitter", lambda image, rng: image)


@NO_JITTER
def test_crops_keep_image_and_label_together():
    cells = np.random.default_rng(0).integers(0, 19, (8, 8), np.uint8)
    label = cells.repeat(16, axis=0).repeat(16, axis=1)
    image = Image.fromarray(np.stack([label * 13] * 3, axis=-1))    # the color tells the label
    padded_above, padded_below = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x, y = data.augment(image, Image.fromarray(label), (100, 90), rng)
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == (100, 90, 3) and y.shape == (100, 90)
        ignored = y == 255
        padded_above += ignored[0].all()
        padded_below += ignored[-1].all()
        assert (x[ignored] == (124, 116, 104)).all()                # ImageNet's mean color
        assert np.isin(y[~ignored], cells).all()                    # no class is invented
        agree = np.abs(x[..., 0] / 13.0 - y)[~ignored] < 0.51       # not where cells blend
        assert agree.mean() > 0.6
    assert 0 < padded_above < 40 and 0 < padded_below < 40


@NO_JITTER
def test_a_crop_at_scale_1_is_a_window_of_the_frame():
    label = np.arange(240, dtype=np.uint8).reshape(12, 20)          # value = 20 row + column
    rows, columns = np.divmod(label, 20)
    image = np.stack([20 * rows, 10 * columns, label], axis=-1).astype(np.uint8)
    corners = set()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x, y = data.augment(Image.fromarray(image), Image.fromarray(label), (5, 8), rng, (1, 1))
        x, y = np.asarray(x).astype(int), np.asarray(y)
        if y[0, 0] > y[0, 1]:                                       # mirrored
            x, y = x[:, ::-1], y[:, ::-1]
        row, column = divmod(int(y[0, 0]), 20)
        corners.add((row, column))
        window = slice(row, row + 5), slice(column, column + 8)
        assert np.array_equal(y, label[window])
        difference = np.abs(x - image[window])                      # up to half a pixel
        assert difference[..., 0].max() <= 10 and difference[..., 1].max() <= 5
    assert len(corners) > 50


def test_a_frame_of_less_than_a_pixel_is_one_pixel_of_the_crop():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        start, end, crop_start, crop_end = data.place_window(1, 64, 0.3, rng)
        assert (start, end) == (0, 1) and crop_end == crop_start + 1


@NO_JITTER
def test_zoom_and_flip_are_spread_evenly():
    label = np.tile(np.arange(128, dtype=np.uint8), (128, 1))       # value = column
    image = Image.new("RGB", (128, 128))
    zooms, mirrored = [], 0
    for seed in range(200):
        y = data.augment(image, Image.fromarray(label), (8, 32), np.random.default_rng(seed))[1]
        y = np.asarray(y).astype(int)
        zooms.append(31 / np.ptp(y[0]))
        mirrored += y[0, 0] > y[0, -1]
    assert 0.48 < min(zooms) < 0.55 and 1.8 < max(zooms) < 2.3
    assert 70 < np.greater(zooms, 1).sum() < 120        # of 200; if not log-uniform, about 131
    assert 70 < mirrored < 130


def test_jitter_equals_its_formula_and_is_used():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    image, label = Image.fromarray(pixels), Image.new("L", (6, 5))
    brightness, contrast, saturation = np.random.default_rng(3).uniform(0.75, 1.25, 3)
    gray = (pixels @ [0.299, 0.587, 0.114])[..., None]
    y = saturation * pixels + (1 - saturation) * gray
    z = brightness * (contrast * (y - 128) + 128)
    result = data.jitter(image, np.random.default_rng(3))
    assert np.abs(np.asarray(result) - z.clip(0, 255)).max() <= 1
    with mock.patch("data.jitter", wraps=data.jitter) as jitter:
        data.augment(image, label, (4, 4), np.random.default_rng(0))
    assert jitter.called


# -------------------------------------------------------- data: pixels and weights


def counted_tree(name):
    """A tree of one label, 70 pixels of road, 20 of building and 10 unlabeled -> its dataset."""
    label = np.full((10, 10), ROAD, np.uint8)
    label[:2] = BUILDING
    label[2] = 0
    return data.Cityscapes(write_tree(FOLDER / name, label), "train")


def recounted(frames):
    """Whether class_pixels reads the labels, and does not take its cache. Checks the counts."""
    with mock.patch("data.read_label", wraps=data.read_label) as read_label:
        pixels = data.class_pixels(frames)
    expected = np.stack([np.bincount(label.flatten(), minlength=256)[:19] for _, label in frames])
    assert pixels.dtype == np.int64 and np.array_equal(pixels, expected)
    return read_label.called


def test_class_pixels_are_counted_once_and_again_if_a_label_changes():
    frames = counted_tree("counted")
    pixels = data.class_pixels(frames)
    assert pixels.sum() == 90 and pixels[0, 0] == 70 and pixels[0, 2] == 20
    assert not recounted(frames)
    path = frames.labels[0]
    Image.new("L", (10, 10), ROAD).save(path, compress_level=0)
    assert recounted(frames) and not recounted(frames)
    size, time_ns = path.stat().st_size, path.stat().st_mtime_ns
    Image.new("L", (10, 10), BUILDING).save(path, compress_level=0)
    os.utime(path, ns=(time_ns, time_ns + 10**9))
    assert path.stat().st_size == size and recounted(frames)            # another time
    Image.new("L", (10, 10), ROAD).save(path)
    os.utime(path, ns=(time_ns, time_ns + 10**9))
    assert path.stat().st_size != size and recounted(frames)            # another size


def test_broken_caches_are_replaced():
    frames = counted_tree("broken-cache")
    data.class_pixels(frames)
    cache = frames.root / "class_pixels_train.npz"
    for content in b"", b"no archive", cache.read_bytes()[:100]:
        cache.write_bytes(content)
        assert recounted(frames) and not recounted(frames)


def test_class_pixels_work_in_a_read_only_root():
    frames = counted_tree("read-only")
    error = OSError(30, "Read-only file system")        # what every change to it raises
    with mock.patch("numpy.savez", side_effect=error), mock.patch("os.unlink", side_effect=error):
        assert data.class_pixels(frames).sum() == 90
    with mock.patch("os.replace", side_effect=error):
        assert data.class_pixels(frames).sum() == 90
    assert not list(frames.root.glob("*.npz"))          # nor is a part left behind


def test_class_weights_equal_their_formulas():
    pixels = np.zeros((2, 19), np.int64)
    pixels[0, :2] = 60, 40
    pixels[1, 0] = 100
    rest = [1 / math.log(1.02)] * 17
    close(data.class_weights(pixels, "enet"), [1 / math.log(1.82), 1 / math.log(1.22), *rest])
    f = [160 / 200, 40 / 100]                           # of the frames that hold the class
    close(data.class_weights(pixels, "median"), [0.6 / f[0], 0.6 / f[1], *[0] * 17])
    assert data.class_weights(pixels, "none") is None
    raises(ValueError, data.class_weights, pixels, "inverse")
    for scheme in "enet", "median":
        raises(ValueError, data.class_weights, 0 * pixels, scheme)


# ------------------------------------------------------------------- data: CopyBlob

WALL, BUS = data.TRAIN_ID["wall"], data.TRAIN_ID["bus"]
PERSON, RIDER, CAR = [data.TRAIN_ID[name] for name in ("person", "rider", "car")]


def street():
    """Train ids 256 x 512 of an empty street: sidewalks on both sides, the road between them."""
    ids = np.full((256, 512), data.TRAIN_ID["sky"], np.uint8)
    ids[60:120] = data.TRAIN_ID["building"]
    ids[120:] = data.TRAIN_ID["road"]
    ids[120:, :150] = ids[120:, -150:] = data.TRAIN_ID["sidewalk"]
    return ids


def street_frame(ids, gray=90):
    return Image.new("RGB", (512, 256), (gray, gray, gray)), Image.fromarray(ids)


def wall_frame(top=100, bottom=160, left=40, right=140):
    """A street with a light gray wall."""
    ids = street()
    ids[top:bottom, left:right] = WALL
    return street_frame(ids, gray=200)


def cut_wall(**box):
    return data.cut_blob(*wall_frame(**box), WALL, np.random.default_rng(0))


def paste(ids, blob, seed):
    """Paste a blob into a dark gray frame -> train ids and image after it, as arrays."""
    image, label = data.copy_blob(*street_frame(ids), blob, np.random.default_rng(seed))
    return np.asarray(label), np.asarray(image)


def test_a_blob_stands_on_its_carrier_with_the_size_of_its_distance():
    blob, scales, halves = cut_wall(), [], set()
    assert blob.drop == 160 - 0.42 * 256 and blob.side == 40 + 49 - 256
    for seed in range(40):
        after, _ = paste(street(), blob, seed)
        rows, columns = np.nonzero(after == WALL)
        foot = int(np.median(columns[rows == rows.max()]))
        assert street()[rows.max(), foot] == data.TRAIN_ID["sidewalk"]
        scale = (rows.max() + 1 - 0.42 * 256) / blob.drop
        assert 0.5 < scale < 2
        assert abs(np.ptp(rows) + 1 - 60 * scale) <= 1
        if 0 < columns.min() and columns.max() < 511:               # not clipped
            assert abs(np.ptp(columns) + 1 - 100 * scale) <= 1
        scales.append(scale)
        halves.add(foot > 256)
    assert max(scales) > 1.2 * min(scales) and halves == {True, False}
    ids = street()
    ids[90:150, 200:300] = BUS
    bus = data.cut_blob(*street_frame(ids), BUS, np.random.default_rng(0))
    x, y = data.find_place(Image.fromarray(street()), bus, np.random.default_rng(1))
    assert street()[y, x] == data.TRAIN_ID["road"]


def test_a_blob_is_moved_along_the_street():
    blob, moved = cut_wall(), []
    for seed in range(100):
        x, y = data.find_place(Image.fromarray(street()), blob, np.random.default_rng(seed))
        scale = (y + 1 - 0.42 * 256) / blob.drop
        moved.append(abs(abs(x - 256) / scale - abs(blob.side)))
    assert np.median(moved) < 40                        # 20; for places drawn at random 63


def test_blobs_are_mirrored_on_the_other_side_of_the_street():
    ids = street()
    for column in range(20, 140):                       # the near, high end is on the left
        ids[90 + column // 5:150 - column // 5, column] = WALL
    blob, halves = data.cut_blob(*street_frame(ids, 200), WALL, np.random.default_rng(0)), set()
    for seed in range(20):
        after, image = paste(street(), blob, seed)
        changed = after != street()
        assert (after[changed] == WALL).all() and (image[changed] == 200).all()
        assert (image[~changed] == 90).all()            # nothing changes beside the blob
        heights = changed.sum(axis=0)
        columns = np.flatnonzero(heights)
        on_the_left = columns.mean() < 256
        assert (heights[columns[0]] > heights[columns[-1]]) == on_the_left
        halves.add(bool(on_the_left))
    assert halves == {True, False}


def test_people_and_nearer_things_stay_in_front_of_a_blob():
    for thing, top, bottom, stays in ((PERSON, 90, 125, True), (RIDER, 90, 125, True),
                                      (CAR, 80, 250, True), (255, 80, 250, True),
                                      (CAR, 80, 112, False)):       # that one is farther away
        ids = street()
        ids[top:bottom, ::8] = thing
        hidden = 0
        for seed in range(10):
            after, _ = paste(ids, cut_wall(), seed)
            assert (after == WALL).any()
            hidden += (after[ids == thing] == WALL).sum()
        assert (hidden == 0) == stays


def test_a_frame_without_a_place_is_returned_as_it_is():
    image, label = street_frame(street())
    assert data.copy_blob(image, label, cut_wall(), np.random.default_rng(0))[1] is not label
    assert np.array_equal(np.asarray(label), street()) and (np.asarray(image) == 90).all()
    image, label = street_frame(np.full((256, 512), data.TRAIN_ID["road"], np.uint8))
    pasted = data.copy_blob(image, label, cut_wall(), np.random.default_rng(0))
    assert pasted[0] is image and pasted[1] is label


def test_large_pieces_are_cut_slivers_never_and_poles_leave_holes():
    assert cut_wall(top=100, bottom=125, left=40, right=65) is None     # 0.0048 of the frame
    assert cut_wall(top=100, bottom=126, left=40, right=66) is not None
    assert cut_wall(top=61, bottom=100) is None         # above the horizon
    ids = street()
    ids[100:160, 20:140] = WALL
    ids[90:170, 80:88] = data.TRAIN_ID["pole"]          # narrower than 0.03 of the width
    ids[100:140, 400:430] = WALL                        # a sixth of the area of the other piece
    rng, widths = np.random.default_rng(0), []
    for _ in range(200):
        blob = data.cut_blob(*street_frame(ids), WALL, rng)
        widths.append(blob.image.width)
        if blob.image.width == 120:
            assert np.asarray(blob.mask).sum() == 60 * 112
    assert set(widths) == {30, 120} and 140 < widths.count(120) < 190


def test_blobs_are_pasted_as_often_as_their_class_is_rare():
    pixels = np.zeros((100, 19), np.int64)
    pixels[:, 0] = 980
    pixels[:10, WALL] = 20                              # 2 % of 10 frames, 0.2 % of all
    shares = data.frame_shares(pixels)
    close(shares[0, WALL], 20 / 1000)
    close(shares[50], [1] + [0] * 18)
    blob = cut_wall()
    close(blob.area, 60 * 100 / (256 * 512))           # 4.6 %
    blobs = {WALL: [blob._replace(area=0.01), blob._replace(area=0.02)]}
    assert data.paste_rates(shares, {}, 1.0) == {}
    close(data.paste_rates(shares, blobs, 1.0)[WALL], 3 * 0.002 / 0.015)
    close(data.paste_rates(shares, blobs, 0.5)[WALL], 0.5 * 3 * 0.002 / 0.015)
    small = {WALL: [blob._replace(area=0.005)]}        # would need more than one for each frame
    assert data.paste_rates(shares, small, 0.5)[WALL] == 0.5


def stored(seed=0, most=64, delay=0):
    """collect_blobs on 7 frames with ever larger walls, one with a sliver, and 40 without."""
    frames = [wall_frame(bottom=112 + 24 * i) for i in range(7)]
    frames += [wall_frame(bottom=110, right=50)] + [street_frame(street())] * 40
    pixels = [np.bincount(np.asarray(label).ravel(), minlength=19)[:19] for _, label in frames]
    read = []

    def read_frame(index):
        read.append(index)
        if index == read[0]:
            time.sleep(delay)                           # the first one is the last to arrive
        return frames[index]

    shares = data.frame_shares(np.array(pixels))
    return data.collect_blobs(mock.Mock(seed=seed, read=read_frame), shares, most), read


def test_the_store_prefers_large_blobs_and_depends_on_the_seed_alone():
    blobs, read = stored()
    assert sorted(read) == list(range(7)) and list(blobs) == [WALL] and len(blobs[WALL]) == 7
    drops = [blob.drop for blob in blobs[WALL]]
    assert drops == [blob.drop for blob in stored(delay=0.1)[0][WALL]]
    with mock.patch("data.cut_blob", lambda image, label, train_id, rng: rng.random()):
        assert stored()[0] == stored(delay=0.1)[0]      # each frame has random numbers of its own
    chosen = [stored(seed, most=1)[1][0] for seed in range(60)]
    # In proportion to area, the mean is 4.1; if all frames had the same chance, it would be 3.
    assert len(set(chosen)) > 3 and np.mean(chosen) > 3.6


def test_what_is_not_rare_is_not_pasted_which_is_reported_in_one_line():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert data.collect_blobs(mock.Mock(seed=0), np.full((3, 19), 1 / 19)) == {}
    assert printed.getvalue().startswith("CopyBlob pastes nothing")
    assert printed.getvalue().count("\n") == 1


# --------------------------------------------------------- data: generated scenes


def test_scenes_are_the_same_bytes_for_the_same_seed():
    again, other = FOLDER / "scenes-again", FOLDER / "scenes-other-seed"
    data.make_scenes(again, train=6, val=3)
    data.make_scenes(other, train=6, val=3, seed=1)
    paths = [path.relative_to(again) for path in again.rglob("*.png")]
    assert len(paths) == 18
    for path in paths:
        assert (again / path).read_bytes() == (scenes() / path).read_bytes()
        assert (again / path).read_bytes() != (other / path).read_bytes()
    assert len(data.Cityscapes(again, "train")) == 6 and len(data.Cityscapes(again, "val")) == 3


def test_scenes_hold_every_class():
    found = np.zeros(256, int)
    for i in range(50):
        image, label = data.draw_scene(np.random.default_rng(i))
        assert image.shape == (128, 256, 3) and label.shape == (128, 256)
        assert image.dtype == label.dtype == np.uint8
        train_ids = data.LABEL_TO_TRAIN[label]
        assert (train_ids == 255).any()
        found += np.bincount(train_ids.flatten(), minlength=256)
    assert found[:19].all()
    common = np.argsort(-found[:19])[:3]
    assert set(common) == {0, 2, 8}                     # road, building, vegetation


def test_interrupted_scenes_leave_nothing():
    folder = FOLDER / "interrupted"
    with mock.patch("os.replace", side_effect=KeyboardInterrupt):
        raises(KeyboardInterrupt, data.make_scenes, folder / "scenes", 1, 1)
    assert not list(folder.iterdir())
    data.make_scenes(folder / "scenes", 1, 1)
    assert len(data.Cityscapes(folder / "scenes", "train")) == 1


def test_scenes_never_replace_other_files():
    folder = FOLDER / "foreign"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep me")
    raises(FileExistsError, data.make_scenes, folder, 1, 1)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    finished = next(scenes().rglob("*_leftImg8bit.png"))
    before = finished.stat().st_mtime_ns
    data.make_scenes(scenes(), train=6, val=3)
    assert finished.stat().st_mtime_ns == before


# ------------------------------------------------------------- helpers of train and eval

TIMES = ("seconds", "images_per_s", "data_wait")    # columns of log.csv that no two runs share


def assert_same_run(whole, out):
    """Two finished runs are equal bit by bit: weights, optimizer, scaler, scores and log."""
    a, b = load(whole), load(out)
    torch.testing.assert_close(b["optimizer"]["state"], a["optimizer"]["state"], rtol=0, atol=0)
    assert a.keys() == b.keys()
    for key in a.keys() - {"optimizer", "log", "seconds", "settings", "made_by"}:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=0)
    assert len(a["log"]) == len(b["log"]) == a["epoch"]
    for row, other in zip(a["log"], b["log"]):
        for key in row:
            assert key in TIMES or row[key] == other[key], key


@mock.patch("train.build_model", tiny)
def tiny_run(out, *options, run=small_run):
    """A small_run of the tiny network -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(out, *options)
    return printed.getvalue()


tiny_resume = functools.partial(tiny_run, run=resume)


def whole_run():
    """The folder of a tiny run of 6 steps that was not interrupted, trained once."""
    out = FOLDER / "whole"
    if not out.exists():
        tiny_run(out, "--loss", "ce+dice")
    return out


def ready_run(*options):
    """A tiny Run that has not begun its first step: what main() passes to train()."""
    with mock.patch("train.train") as begin:
        tiny_run(Path(tempfile.mkdtemp(dir=FOLDER)), *options)
    return begin.call_args.args[0]


class Crash(Exception):
    """Stands for any error that ends a run."""


def crash():
    raise Crash


def before_step(number, action=crash):
    """A patch that calls action() just before step `number` (from 0).

    train.train calls seed_step before each step, so that is what is replaced.
    """
    original = train.seed_step

    def seed_step(seed, step):
        if step == number:
            action()
        original(seed, step)
    return mock.patch("train.seed_step", seed_step)


@contextlib.contextmanager
def as_rank(number, world_size=2):
    """This process pretends to be one of several -> a mock of torch.distributed."""
    with (mock.patch("train.rank", lambda: number), mock.patch("train.dist") as dist,
          mock.patch("train.world_size", lambda: world_size)):
        yield dist


def launch(out, *options, pause=0.2, processes=1):
    """Start a tiny run in a new process group -> Popen.

    Each step takes `pause` seconds longer. With several processes, torchrun starts them.
    """
    script = FOLDER / "tiny_train.py"
    script.write_text(f"""import sys, time
sys.path.insert(0, {str(HERE)!r})
import eval, train, unet

{inspect.getsource(tiny)}

def seed_step(seed, step, original=train.seed_step):
    time.sleep({pause!r})
    original(seed, step)


train.build_model, train.seed_step = tiny, seed_step
eval.command_line(train.main)
""")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [script, "--out", out, "--data", scenes(), *SMALL, "--loss", "ce+dice",
                "--save-minutes", "0", *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for_save(process, out, before=None):
    """Wait until the process has replaced the last.pt of time `before` -> the new time."""
    path = out / "last.pt"
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    return path.stat().st_mtime_ns


def finish(process):
    """What the process printed. Returns once no child of it holds its output open any more."""
    return process.communicate(timeout=120)[0]


def command_line_of(module, *options):
    """Run a script's main() through command_line -> exit status, what it wrote to stderr."""
    words = [str(option) for option in options]
    with (contextlib.redirect_stderr(io.StringIO()) as stderr,
          mock.patch.object(evaluation, "ignore_stop_signals"),
          mock.patch("sys.argv", [module.__file__])):
        status = raises(SystemExit, evaluation.command_line, lambda: module.main(words))
    return int(status), stderr.getvalue()


def run_eval(*options):
    """eval.main() on the CPU -> the dicts of metrics.json."""
    words = [str(option) for option in options]
    return evaluation.main([*words, *"--device cpu --amp off --workers 0".split()])


# ------------------------------------------------------------------------- a training run


def test_learning_rate_formula():
    args = mock.Mock(lr=2.0, epochs=10)
    close(train.learning_rate(args, 49, 100), 2 * 0.5 * (1 - 49 / 1000)**0.9)   # warmup: an epoch
    close(train.learning_rate(args, 249, 1000), 2 * 0.5 * (1 - 249 / 10000)**0.9)   # or 500 steps
    close(train.learning_rate(args, 500, 100), 2 * 0.5**0.9)
    close(train.learning_rate(args, 999, 100), 2 * 0.001**0.9)
    close(train.learning_rate(args, 500, 100, factor=0.1), 0.2 * 0.5**0.9)


def test_every_group_trains_at_its_own_rate():
    """The first step of SGD moves a weight by rate x 1.9 x gradient (momentum 0.9, Nesterov)."""
    run = ready_run("--pretrained", "--encoder-lr", "0.1", "--weight-decay", "0")
    before = copy.deepcopy(run.model)
    with before_step(1):
        raises(Crash, train.train, run)
    for (name, new), old in zip(run.model.named_parameters(), before.parameters()):
        rate = run.args.lr / 3                      # the first of three steps of warmup
        if name.startswith("encoder."):
            rate *= 0.1
        close(old - new, rate * 1.9 * new.grad, 1e-3, 1e-6)


def test_clip_grad_limits_the_norm():
    """The first step moves the weights by rate x 1.9 x clipped gradient, whose norm is known."""
    for amp in "off", "fp16":
        run = ready_run("--clip-grad", "0.01", "--weight-decay", "0", "--amp", amp)
        before = copy.deepcopy(run.model)
        with before_step(1):
            raises(Crash, train.train, run)
        square = 0
        for old, new in zip(before.parameters(), run.model.parameters()):
            square += (new - old).square().sum()
        close(square.sqrt(), run.args.lr / 3 * 1.9 * 0.01, 0.01)


def test_epoch_batches_are_whole_and_repeat_no_frame():
    first, second = train.epoch_batches(0, 10, 4, 0), train.epoch_batches(1, 10, 4, 0)
    items, later = sum(first, []), sum(second, [])
    assert [len(batch) for batch in first + second] == [4, 4, 4, 4]
    assert len(set(items)) == len(set(later)) == 8
    assert min(items) >= 0 and max(items) < 10 <= min(later) and max(later) < 20
    assert items != [item - 10 for item in later]
    assert first != train.epoch_batches(0, 10, 4, seed=1)


def test_ranks_share_batches_and_validation_frames():
    run = ready_run("--batch", "6")
    run.val_set = range(7)
    trained, validated = [], []

    def evaluate(model, share, *args, **options):
        validated.extend(share)
        return torch.ones(19, 19)

    for number in range(3):
        with (as_rank(number, 3), mock.patch("train.evaluate", evaluate),
              mock.patch("train.make_loader", return_value=[]) as make_loader):
            list(run.batches())
            run.validate()
        batch, = make_loader.call_args.kwargs["batch_sampler"]
        assert len(batch) == 2
        trained += batch
    assert sorted(trained) == list(range(6)) and sorted(validated) == list(range(7))


def test_a_batch_that_ranks_cannot_share_is_refused():
    args = mock.Mock(data=str(scenes()), crop=[64, 64], seed=0, scale=[1, 1], batch=3, copyblob=0,
                     class_weights="none")
    with as_rank(0, 2):
        assert "2 processes" in raises(ValueError, train.build_data_and_loss, args, None)


def test_ranks_and_steps_draw_different_numbers():
    def draw(number, step, seed=0):
        with as_rank(number):
            train.seed_step(seed, step)
        return torch.rand(4).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert draw(0, 5) != draw(1, 5) and draw(0, 5) != draw(0, 6) and draw(0, 5) != draw(0, 5, 1)


def test_the_seed_changes_the_weights_the_crops_and_the_order():
    heads, crops, orders = [], [], []
    for seed in "0", "1":
        run = ready_run("--seed", seed)
        with mock.patch("train.make_loader", return_value=[]) as make_loader:
            list(run.batches())
        heads.append(run.model.head.weight.tolist())
        crops.append(run.train_set[0][0].tolist())
        orders.append(make_loader.call_args.kwargs["batch_sampler"])
    assert heads[0] != heads[1] and crops[0] != crops[1] and orders[0] != orders[1]


def test_class_weights_reach_the_loss():
    run = ready_run("--class-weights", "enet")
    pixels = np.zeros(256)
    for path in (scenes() / "gtFine" / "train").rglob("*_labelIds.png"):
        pixels += np.bincount(np.array(Image.open(path)).ravel(), minlength=256)
    pixels = pixels[[c.label_id for c in data.CLASSES]]
    weights = torch.tensor(1 / np.log(1.02 + pixels / pixels.sum()), dtype=torch.float32)
    logits, target = torch.randn(2, 19, 8, 8), torch.randint(0, 19, (2, 8, 8))
    close(run.loss_function(logits, target), F.cross_entropy(logits, target, weights))


def test_copyblob_reaches_the_data_set():
    with mock.patch("data.RARE", 1.0):                  # also what is frequent in the scenes
        run = ready_run("--copyblob", "1")
    plain = data.Cityscapes(scenes(), "train", (64, 64), scale=run.args.scale)
    with mock.patch("data.RARE", 1.0):
        pasted = data.Cityscapes(scenes(), "train", (64, 64), 1.0, scale=run.args.scale)
        half = data.Cityscapes(scenes(), "train", (64, 64), 0.5)
    for train_id, rate in pasted.rates.items():
        assert half.rates[train_id] == 0.5 * rate
    changed = 0
    for k in range(24):
        assert torch.equal(run.train_set[k][0], pasted[k][0])
        changed += not torch.equal(run.train_set[k][1], plain[k][1])
    assert changed > 0
    pasted.rates = dict.fromkeys(pasted.blobs, 0.25)
    image, label = pasted.read(0)
    with mock.patch("data.copy_blob", return_value=(image, label)) as copy_blob:
        for seed in range(100):
            pasted.paste_blobs(image, label, np.random.default_rng(seed))
    assert 0.15 < copy_blob.call_count / (100 * len(pasted.blobs)) < 0.35


def test_training_learns():
    """Red tiles are road, blue tiles are sky; the best constant has a mean IoU of about 0.25."""
    rng = np.random.default_rng(0)
    for k in range(18):
        is_road = rng.random((4, 4)).repeat(16, axis=0).repeat(16, axis=1) < 0.5
        image = np.where(is_road[..., None], (200, 40, 40), (40, 40, 200)).astype(np.uint8)
        label = np.where(is_road, 7, 23).astype(np.uint8)
        write_tree(FOLDER / "tiles", label, image, "train" if k < 16 else "val", f"ulm_{k}")
    rows = small_run(FOLDER / "learn", "--data", str(FOLDER / "tiles"), "--no-pretrained",
                     "--epochs", "3", "--lr", "0.05", "--scale", "1", "1")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["miou"] > 0.8


def test_compile_gives_the_same_output():
    run = ready_run()
    run.args.compile = True
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    with mock.patch("torch.compile", side_effect=compile_eagerly) as torch_compile:
        compiled = train.wrap_network(run.model, run.args)
    assert torch_compile.called
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)                            # of stochastic depth
    expected = run.model(x)
    torch.manual_seed(0)
    close(compiled(x), expected, 1e-4, 1e-4)


def test_init_takes_the_weights_and_nothing_else():
    run = ready_run("--init", str(whole_run() / "best.pt"))
    moved = FOLDER / "moved-init.pt"
    shutil.copy(whole_run() / "best.pt", moved)
    tiny_run(FOLDER / "from-init", "--init", str(moved), "--epochs", "1")
    moved.unlink()
    tiny_resume(FOLDER / "from-init", "--epochs", "2")          # a resume does not need the file
    best = load(whole_run(), "best.pt")["model"]
    torch.testing.assert_close(run.model.state_dict(), best, rtol=0, atol=0)
    assert (run.step, run.epoch, run.log, run.best_miou) == (0, 0, [], -1.0)
    encoder = {id(p) for p in run.model.encoder.parameters()}
    seen = 0
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            assert group["factor"] == (0.5 if id(p) in encoder else 1.0)        # --encoder-lr
            assert group["weight_decay"] == (5e-4 if p.ndim > 1 else 0.0)       # not for norms
            seen += 1
    assert seen == len(list(run.model.parameters()))
    assert not any(state["momentum_buffer"].any() for state in run.optimizer.state.values())


def test_init_decides_which_model_is_trained():
    saved = load(checkpoint(), "best.pt")
    saved["settings"]["model"] = "convunext"
    torch.save(saved, FOLDER / "convunext.pt")
    args = train.parse_args(["--init", str(FOLDER / "convunext.pt"), "--crop", "64", "64"])
    train.fill_defaults(args, train.REAL_DEFAULTS)
    assert args.model == "convunext" and args.optimizer == "adamw" and not args.pretrained


# ------------------------------------------------------------------------- files of a run


def test_run_leaves_its_files():
    out = checkpoint()
    header, *rows = (out / "log.csv").read_text().splitlines()
    columns = ["epoch", "loss", "lr", "pixel_accuracy", "miou", "mean_dice", "images_per_s",
               "data_wait", "seconds", "gpu_gib"]
    assert header.split(",") == columns + [f"iou {c.name}" for c in data.CLASSES]
    assert len(rows) == 2 and rows[1].startswith("2,")
    assert Image.open(out / "curves.png").width > 100
    best, last = load(out, "best.pt"), load(out)
    assert set(best) < set(last) and len(last["log"]) == 2
    assert best["settings"]["model"] == "resnet18"
    assert best["settings"]["data"] == str(scenes().resolve())
    made_by = last["made_by"]
    assert made_by["command"][0] == "train.py" and "--class-weights" in made_by["command"]
    assert made_by["torch"] == torch.__version__ and made_by["numpy"] == np.__version__
    if (HERE / ".git").exists() and shutil.which("git"):
        assert re.fullmatch("[0-9a-f]{40}", made_by["commit"])


def test_the_log_has_the_mean_loss_of_the_steps():
    run = ready_run()
    run.loss_function = lambda logits, target: 0 * logits.sum() + 2
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(run)
    assert [row["loss"] for row in run.log] == [2, 2]


def test_the_last_epoch_is_validated_in_any_case():
    run, skipped = ready_run("--epochs", "3", "--val-every", "2"), []
    for run.epoch in range(3):
        skipped.append(run.validate() is None)
    assert skipped == [True, False, False]


def test_best_is_the_best_epoch():
    scores = iter((0.2, 0.5, 0.3))

    def summarize(matrix):
        return {**evaluation.summarize(matrix), "miou": next(scores)}

    with mock.patch("train.summarize", summarize):
        tiny_run(FOLDER / "best", "--epochs", "3")
    best, last = load(FOLDER / "best", "best.pt"), load(FOLDER / "best")
    assert best["epoch"] == 2 and best["miou"] == 0.5 and last["best_miou"] == 0.5
    assert not torch.equal(best["model"]["head.weight"], last["model"]["head.weight"])


def test_a_run_resumed_from_last_pt_alone_writes_a_new_best():
    """Here the best epoch, the first, was lost: the second becomes the best."""
    scores = iter((0.5, 0.3))

    def summarize(matrix):
        return {**evaluation.summarize(matrix), "miou": next(scores)}

    out = FOLDER / "last-alone"
    with mock.patch("train.summarize", summarize):
        tiny_run(out, "--epochs", "1")
        (out / "best.pt").unlink()
        assert "best validation" not in tiny_resume(out)        # nothing is left to train
        assert "best validation mIoU 0.300" in tiny_resume(out, "--epochs", "2")
    assert load(out, "best.pt")["epoch"] == 2


def test_a_checkpoint_has_only_the_miou_of_its_own_weights():
    run = ready_run()
    run.log, run.epoch, run.step = [{"miou": 0.5}], 1, 3
    for step, expected in (3, 0.5), (4, None):      # after the validation, in the next epoch
        run.step = step
        run.save()
        assert load(run.out)["miou"] == expected


def test_labels_without_any_class_are_an_error():
    run = ready_run()
    run.step = run.steps_per_epoch                  # all losses were 0
    assert "gtFine/train" in raises(ValueError, run.end_epoch, None)
    with mock.patch("train.evaluate", return_value=torch.zeros(19, 19)):
        assert "gtFine/val" in raises(ValueError, run.validate)


def test_an_epoch_is_written_before_it_is_printed():
    """If standard output is gone, for example a closed pipe, the epoch's results are kept."""
    out = FOLDER / "no-output"
    with mock.patch("train.Run.print_row", side_effect=BrokenPipeError):
        raises(BrokenPipeError, tiny_run, out, "--loss", "ce+dice")
    assert load(out, "best.pt")["epoch"] == 1
    assert len((out / "log.csv").read_text().splitlines()) == 2
    tiny_resume(out)
    assert_same_run(whole_run(), out)


def test_no_run_is_overwritten():
    before = (whole_run() / "last.pt").read_bytes()
    assert "--resume" in raises(ValueError, tiny_run, whole_run())
    assert (whole_run() / "last.pt").read_bytes() == before


def test_a_full_or_read_only_disk_is_named_and_leaves_the_old_file():
    path = FOLDER / "file"
    path.write_text("old")
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        message = raises(OSError, train.write, b"new", path)
    assert message.startswith(str(path)) and "No space left" in message
    assert path.read_text() == "old" and not Path(f"{path}.part").exists()
    error = OSError(30, "Read-only file system")
    with (mock.patch("train.open", side_effect=error, create=True),
          mock.patch.object(Path, "unlink", side_effect=error)):
        message = raises(OSError, train.write, b"new", path)
    assert message.startswith(str(path)) and "Read-only" in message


def test_out_is_probed_before_anything_is_done():
    error = OSError(30, "Read-only file system")
    with (mock.patch("train.tempfile.TemporaryFile", side_effect=error),
          mock.patch("train.set_up_device") as set_up_device):
        message = raises(OSError, tiny_run, FOLDER / "probed")
    assert "--out" in message and "Read-only" in message and not set_up_device.called


def test_a_locked_log_does_not_end_the_run():
    original = os.replace

    def replace(source, target):
        if Path(target).name == "log.csv":
            raise PermissionError(13, "in use by a spreadsheet")
        original(source, target)

    with mock.patch("os.replace", replace):
        printed = tiny_run(FOLDER / "locked", "--epochs", "1")
    assert "in use by a spreadsheet" in printed and load(FOLDER / "locked")["epoch"] == 1


def test_only_training_tries_which_convolutions_are_fastest():
    run = ready_run()
    next(run.batches())
    assert torch.backends.cudnn.benchmark
    run.validate()                                  # its frames may have many sizes
    assert not torch.backends.cudnn.benchmark


def test_losses_that_are_not_finite_name_step_and_files():
    run = ready_run()
    original, calls = run.loss_function, []

    def loss_function(logits, target):
        calls.append(1)
        return original(logits, target) * (math.inf if len(calls) == 5 else 1)

    run.loss_function = loss_function
    message = raises(FloatingPointError, train.train, run)
    assert "step 5 " in message and load(run.out)["step"] == 3
    for item in train.epoch_batches(1, 6, 2, 0)[1]:
        assert str(run.train_set.images[item - 6]) in message


def test_weights_that_are_not_finite_are_not_saved():
    run = ready_run()
    next(run.model.parameters()).data[0] = math.nan
    assert "weights are not finite" in raises(FloatingPointError, run.save)
    assert not (run.out / "last.pt").exists()


def test_float16_that_always_overflows_stops_the_run():
    run = ready_run("--amp", "fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.5)
    next(run.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    assert "--amp off" in raises(FloatingPointError, train.train, run)


def test_sgd_after_a_first_step_that_was_left_out():
    """float16 gradients overflow in the first step: the next one has no momentum from memory."""
    model = torch.nn.Linear(1000, 1)
    args = mock.Mock(optimizer="sgd", lr=0.1, weight_decay=0.0, pretrained=False, init=None)
    optimizer = train.build_optimizer(model, args)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in math.inf, 1.0:
        junk = torch.full((1, 1000), 1e30)          # freed memory that new buffers may get
        del junk
        optimizer.zero_grad()
        scaler.scale(factor * model.weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones(1, 1000))       # only the gradient of the second step


def test_losses_are_read_every_ten_steps_and_saves_are_on_time():
    """On a GPU, where reading a loss has to wait. No loss in between is lost."""
    run = ready_run()
    run.device = torch.device("cuda")
    with mock.patch("train.time") as clock, mock.patch.object(run, "save_as") as save:
        clock.monotonic.return_value = run.saved_at
        for step in range(1, 25):
            run.after_step(torch.tensor(1.0))
            assert run.loss_sum == step // 10 * 10
        clock.monotonic.return_value += 60 * run.args.save_minutes - 1
        run.after_step(torch.tensor(1.0))
        assert not save.called
        clock.monotonic.return_value += 2
        run.after_step(torch.tensor(1.0))
        assert save.called and run.loss_sum == 26


# ------------------------------------------------------------------------- resume and signals


def test_resume_after_an_error_is_exact():
    out = FOLDER / "error"
    with before_step(2):
        raises(Crash, tiny_run, out, "--loss", "ce+dice", "--save-minutes", "0")
    assert 0 < load(out)["step"] <= 2               # depends on timing
    with before_step(5):                            # saved last at the end of the first epoch
        raises(Crash, tiny_resume, out, "--workers", "2", "--save-minutes", "9")
    assert load(out)["step"] == 3
    tiny_resume(out)
    assert_same_run(whole_run(), out)


def test_resume_after_a_signal_in_a_step_is_exact():
    """Each signal is handled right after the step in which it arrives."""
    out = FOLDER / "signals"
    with before_step(1, lambda: signal.raise_signal(signal.SIGTERM)):
        status = raises(SystemExit, tiny_run, out, "--loss", "ce+dice", "--workers", "2")
    assert status == str(128 + signal.SIGTERM) and load(out)["step"] == 2
    signal.signal(signal.SIGHUP, signal.SIG_DFL)        # in case nohup started the tests
    for step, number in (3, signal.SIGUSR1), (4, signal.SIGHUP):
        with before_step(step, lambda: signal.raise_signal(number)):
            status = raises(SystemExit, tiny_resume, out, "--workers", "0")
        assert status == str(128 + number) and load(out)["step"] == step + 1
    tiny_resume(out)
    assert_same_run(whole_run(), out)


def test_resume_after_a_signal_in_validation_is_exact():
    """Only every second epoch is validated, so that the signal comes after the sixth step."""
    whole, out = FOLDER / "whole-2", FOLDER / "validation"
    options = "--val-every", "2", "--optimizer", "adamw"
    tiny_run(whole, *options)

    def evaluate(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return evaluation.evaluate(*args, **options)

    with mock.patch("train.evaluate", evaluate):
        raises(SystemExit, tiny_run, out, *options)
    assert load(out)["step"] == 6 and load(out)["epoch"] == 1
    tiny_resume(out)
    assert_same_run(whole, out)
    assert [row["miou"] is None for row in load(out)["log"]] == [True, False]


def test_resume_finds_moved_data():
    run = ready_run()
    run.save()
    last = load(run.out)
    for saved, variable in ("/moved", ""), ("/moved", scenes()), (str(scenes()), "/nowhere"):
        last["settings"]["data"] = saved
        torch.save(last, run.out / "last.pt")
        with (mock.patch.dict(os.environ, {"CITYSCAPES_DATASET": str(variable)}),
              mock.patch("train.train") as begin):
            if variable:
                tiny_resume(run.out)
                assert begin.call_args.args[0].args.data == str(scenes().resolve())
            else:
                assert "/moved" in raises(FileNotFoundError, tiny_resume, run.out)
    with mock.patch.dict(os.environ, {"CITYSCAPES_DATASET": str(scenes())}):
        assert "/typo" in raises(FileNotFoundError, tiny_resume, run.out, "--data", "/typo")


def test_resume_in_float16_restores_the_scaler():
    run = ready_run("--amp", "fp16")
    state = {**run.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 5}
    run.scaler.load_state_dict(state)
    run.save()
    with mock.patch("train.train") as begin:
        tiny_resume(run.out)
    assert begin.call_args.args[0].scaler.state_dict() == state


def test_the_same_command_restarts_a_killed_run():
    """--resume without a value, and SIGKILL soon after a save: starts, continues, does nothing."""
    out, saved = FOLDER / "killed", None
    for delay in 0, 0.03:
        process = launch(out, "--resume", pause=0)
        saved = wait_for_save(process, out, saved)
        time.sleep(delay)
        process.kill()
        finish(process)
    assert load(out)["step"] < 6
    command = out, "--loss", "ce+dice", "--save-minutes", "0", "--resume"
    tiny_run(*command)
    assert_same_run(whole_run(), out)
    with before_step(6):                            # there is none
        assert "best validation" in tiny_run(*command)
    assert_same_run(whole_run(), out)


def test_sigterm_to_the_group_saves_the_run():
    out = FOLDER / "group"
    process = launch(out, "--workers", "2")
    wait_for_save(process, out)
    sent = time.monotonic()
    while process.poll() is None and time.monotonic() < sent + 1.5:
        os.killpg(process.pid, signal.SIGTERM)      # to the data workers as well, and repeatedly
        time.sleep(0.005)
    printed = finish(process)
    assert process.returncode == 143, printed
    assert f"python train.py --resume {out}/last.pt" in printed and "Traceback" not in printed
    assert 0 < load(out)["step"] < 6
    tiny_resume(out)
    assert_same_run(whole_run(), out)


def test_two_processes():
    """torchrun: SIGINT saves, resume is exact, eval.py agrees, one process can continue."""
    out, whole = FOLDER / "two", FOLDER / "two-whole"
    undisturbed = launch(whole, processes=2)
    process = launch(out, processes=2)
    wait_for_save(process, out)
    os.killpg(process.pid, signal.SIGINT)
    printed = finish(process)
    assert process.returncode != 0 and load(out)["epoch"] < 2
    assert printed.count("continue with: torchrun ... train.py --resume") == 1, printed
    printed = finish(launch(out, "--resume", pause=0, processes=2))
    for text in "resnet18, loss", "epoch 2/2", "best validation":
        assert printed.count(text) == 1, printed    # rank 0 alone speaks
    finish(undisturbed)
    assert_same_run(whole, out)
    with mock.patch.object(evaluation, "build_model", tiny):
        scored, = run_eval("--ckpt", out / "last.pt", "--out", FOLDER / "two-eval")
    for key in "miou", "mean_dice", "pixel_accuracy":
        close(scored[key], load(out)["log"][-1][key], 1e-9)
    tiny_resume(out, "--epochs", "3")
    assert load(out)["step"] == 9


def test_workers_of_training_end_before_validation():
    counts = []

    def evaluate(*args, **options):
        counts.append(len(multiprocessing.active_children()))
        return evaluation.evaluate(*args, **options)

    with mock.patch("train.evaluate", evaluate):
        tiny_run(FOLDER / "counted-workers", "--workers", "2")
    assert counts == [0, 0]


def test_a_bug_ends_every_process():
    process = launch(FOLDER / "bug", "--workers", "2", pause="no number, so that sleep fails")
    printed = finish(process)                       # no data worker remains
    assert process.returncode == 1 and "TypeError" in printed


def test_a_second_signal_within_two_seconds_is_the_same_request():
    stop = train.StopSignals()
    with mock.patch("train.time") as clock:
        for now in 100, 100.5, 101.9:
            clock.monotonic.return_value = now
            stop.receive(signal.SIGTERM, None)
        assert stop.requested and stop.number == signal.SIGTERM
        clock.monotonic.return_value = 102.1
        raises(KeyboardInterrupt, stop.receive, signal.SIGTERM, None)


def test_a_later_signal_ends_a_run_without_saving():
    def two_signals():
        signal.raise_signal(signal.SIGTERM)
        with mock.patch("train.time.monotonic", return_value=time.monotonic() + 3):
            signal.raise_signal(signal.SIGTERM)

    out = FOLDER / "two-signals"
    with before_step(1, two_signals):
        status = raises(SystemExit, tiny_run, out)
    assert status == str(128 + signal.SIGTERM) and not (out / "last.pt").exists()


def test_nohup_keeps_a_run_alive():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert not stop.requested
    signal.signal(signal.SIGHUP, before)


def test_a_repeated_signal_does_not_change_how_a_run_ends():
    before = signal.getsignal(signal.SIGTERM)
    with train.StopSignals():
        pass
    assert signal.getsignal(signal.SIGTERM) == before
    with train.StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == stop.receive         # until the process has ended
    for number in stop.handlers:
        signal.signal(number, stop.handlers[number])
    with mock.patch.object(evaluation, "ignore_stop_signals") as ignore:
        raises(SystemExit, evaluation.command_line, mock.Mock(side_effect=KeyboardInterrupt))
    assert ignore.called


@mock.patch("train.build_model", tiny)
def test_resume_refuses_what_would_change_the_run():
    last = whole_run() / "last.pt"
    for wrong in ("--clip-grad 1", "--loss ce", "--seed 1", "--crop 96 96", "--model resnet34",
                  "--batch 3", "--out elsewhere", "--epochs 1"):
        status, line = command_line_of(train, "--resume", last, *wrong.split())
        assert status == 2 and wrong.split()[0] in line and line.count("\n") == 1, line
    out = FOLDER / "new-option"                         # a run from before an option existed
    out.mkdir()
    last = load(whole_run())
    del last["settings"]["clip_grad"]
    torch.save(last, out / "last.pt")
    status, line = command_line_of(train, "--resume", out / "last.pt", "--clip-grad", "3")
    assert status == 2 and "--clip-grad" in line
    status, line = command_line_of(train, "--resume", whole_run() / "best.pt")
    assert status == 2 and "last.pt" in line and "--init" in line


def test_resume_accepts_another_spelling_of_out_more_epochs_and_another_rate():
    out = FOLDER / "longer"
    tiny_run(out, "--epochs", "1")
    spelled = str(out / ".." / "longer")
    printed = tiny_resume(out, "--epochs", "2", "--out", spelled, "--amp", "bf16", "--lr", "0.001")
    assert "--epochs" in printed and "learning rate" in printed and load(out)["epoch"] == 2
    assert load(out)["settings"]["lr"] == 0.001 and load(out)["log"][1]["lr"] < 0.001


def test_broken_checkpoints_are_one_line():
    last, path = load(whole_run()), FOLDER / "broken" / "last.pt"
    path.parent.mkdir()
    for change, part in (({"data": None}, path), ({"loss": None}, path), ({"model": 7}, path),
                         ({"model": "u-net"}, path), ({"model": "resnet34"}, "resnet34")):
        torch.save({**last, "settings": {**last["settings"], **change}}, path)
        status, line = command_line_of(train, "--resume", path)
        assert status == 2 and line.count("\n") == 1 and str(part) in line, line
    with mock.patch("torch.load", side_effect=PermissionError(13, "Permission denied", "last.pt")):
        status, line = command_line_of(train, "--resume", path)
    assert status == 2 and "Permission denied: 'last.pt'" in line, line
    torch.save({**last, "num_frames": 7}, path)
    status, line = command_line_of(train, "--resume", path)
    assert status == 2 and "has 6 training frames" in line and "7" in line, line
    torch.save({**last, "label_to_train": [0] * 256}, path)
    status, line = command_line_of(train, "--resume", path)
    assert status == 2 and "LABEL_TO_TRAIN" in line, line
    del last["settings"]["loss"]
    torch.save(last, path)
    for module, option in (train, "--resume"), (evaluation, "--ckpt"):
        status, line = command_line_of(module, option, path)
        assert status == 2 and line.count("\n") == 1 and str(path) in line, line


def test_defaults_of_real_frames():
    root = FOLDER / "real"
    for split in "train", "val":
        write_tree(root, np.full((600, 1100), 7, np.uint8), split=split)
    table = (("resnet34", 8, "sgd", 0.012), ("convunext", 4, "adamw", 0.001),
             ("convnext_tiny", 8, "adamw", 0.001))
    for model, batch, optimizer, lr in table:
        args = train.build_parser().parse_args(["--data", str(root), "--model", model])
        train.fill_defaults(args, train.REAL_DEFAULTS)
        assert (args.batch, args.optimizer, args.crop) == (batch, optimizer, [512, 1024])
        assert args.pretrained == (model != "convunext") and args.epochs == 200
        close(args.lr, lr)


def test_resume_does_not_download():
    out = FOLDER / "pretrained"
    with mock.patch("train.build_model", side_effect=tiny) as build_model:
        small_run(out, "--epochs", "1", "--pretrained")
        resume(out, "--epochs", "2")
    assert [call.args[2] for call in build_model.call_args_list] == [True, False]


# ------------------------------------------------------------------------- processes and GPUs


def test_each_process_selects_its_gpu_first():
    calls = []

    def use(device):
        calls.append(("use", device))
        return torch.ones(1)

    with (mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}),
          mock.patch("torch.cuda.is_available", lambda: True),
          mock.patch("torch.cuda.set_device", lambda device: calls.append(("select", device))),
          mock.patch("torch.zeros", lambda *size, device: use(device)),
          mock.patch("train.dist.init_process_group",
                     lambda backend, device_id: calls.append((backend, device_id)))):
        device = train.set_up_device(mock.Mock(device="auto"))
    assert device == torch.device("cuda:1")
    assert calls == [("select", device), ("use", device), ("cpu:gloo,cuda:nccl", device)]


def test_incomplete_variables_of_torchrun():
    args = mock.Mock(device="cpu")
    with mock.patch.dict(os.environ, {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}):
        assert train.set_up_device(args) == torch.device("cpu")
    with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}):
        assert "torchrun" in raises(ValueError, train.set_up_device, args)
    one_gpu = mock.Mock(device="cuda:1")
    with mock.patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}):
        assert "all processes" in raises(ValueError, train.set_up_device, one_gpu)


def test_batch_norm_is_synchronized_on_gpus():
    for is_cuda in True, False:
        model = mock.Mock()
        model.parameters.side_effect = lambda: iter([mock.Mock(is_cuda=is_cuda)])
        with (as_rank(0), mock.patch("torch.nn.parallel.DistributedDataParallel") as parallel,
              mock.patch("torch.nn.SyncBatchNorm.convert_sync_batchnorm") as convert):
            assert train.wrap_network(model, mock.Mock(compile=False)) is parallel.return_value
        assert parallel.call_args.args[0] is (convert.return_value if is_cuda else model)


def test_batch_norm_averages_are_rank_0s_in_validation():
    run = ready_run()
    with as_rank(1) as dist, mock.patch("train.evaluate") as evaluate:
        evaluate.side_effect = KeyError             # all are sent before
        raises(KeyError, run.validate)
    sent = [(id(call.args[0]), call.args[1]) for call in dist.broadcast.call_args_list]
    assert sent == [(id(buffer), 0) for buffer in run.model.buffers()] and len(sent) > 10


def test_from_rank_0_calls_once_and_broadcasts():
    def broadcast(objects, source):
        assert source == 0
        sent.append(objects[0])
        objects[0] = "received"

    function, sent = mock.Mock(return_value="result"), []
    for number in range(2):
        with as_rank(number) as dist:
            dist.broadcast_object_list.side_effect = broadcast
            assert train.from_rank_0(function) == "received"
    assert sent == ["result", None] and function.call_count == 1


def test_rank_0_alone_counts_pixels_and_shows_progress():
    args = mock.Mock(data=str(scenes()), crop=[64, 64], seed=0, scale=[1, 1], batch=2, copyblob=1,
                     class_weights="enet", loss="ce")

    def broadcast(objects, source):
        objects[0] = np.ones((6, 19), np.int64)

    counting = mock.Mock(side_effect=AssertionError)
    with (as_rank(1) as dist, mock.patch("train.class_pixels", counting),
          mock.patch("data.class_pixels", counting)):
        dist.broadcast_object_list.side_effect = broadcast
        train.build_data_and_loss(args, torch.device("cpu"))
    for number in range(2):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        with (contextlib.redirect_stdout(terminal),
              mock.patch.object(evaluation, "rank", lambda: number)):
            assert list(evaluation.progress([5, 6], "reading")) == [5, 6]
        assert ("reading 2/2" in terminal.getvalue()) == (number == 0)


def test_losses_are_averaged_over_ranks():
    run = ready_run()
    run.losses = [torch.tensor(1.0), torch.tensor(2.0)]
    with as_rank(0) as dist:
        dist.all_reduce.side_effect = lambda losses: losses.add_(torch.tensor([3.0, 6.0]))
        run.check_losses()
    assert run.loss_sum == (1 + 3) / 2 + (2 + 6) / 2


def another_rank_says_stop(tensor, *operation):
    """An all_reduce(MAX) in which another rank was asked to stop."""
    if tensor.ndim == 0:
        tensor.fill_(1)


def test_ranks_stop_together_in_training():
    """A rank that was asked tells the others; one that was not asked stops with them."""
    run = ready_run()
    run.stop.requested = True
    with as_rank(0) as dist:
        raises(train.Stopped, run.after_step, torch.tensor(1.0))
        assert dist.all_reduce.call_args_list[0].args[0] == 1
        assert dist.barrier.called                      # no rank ends before the file is written
    run = ready_run()
    with as_rank(0) as dist:
        run.after_step(torch.tensor(1.0))
        dist.all_reduce.side_effect = another_rank_says_stop
        raises(train.Stopped, run.after_step, torch.tensor(1.0))
    assert load(run.out)["step"] == 2


def test_a_rank_that_got_no_signal_ends_like_the_others():
    with mock.patch("train.train", side_effect=train.Stopped):
        assert raises(SystemExit, tiny_run, FOLDER / "no-signal") == str(128 + signal.SIGTERM)


def test_ranks_that_find_different_files_are_refused():
    """--out on the disk of one machine: rank 0 resumes, another rank would start from step 0."""
    with mock.patch("train.from_rank_0", lambda function: 3):
        message = raises(ValueError, ready_run)
    assert "--out" in message and "share" in message


def test_ranks_stop_together_in_validation():
    """Rank 0 has two of three frames, rank 1 has one: they ask each other once."""
    run = ready_run()
    with as_rank(0) as dist:
        run.validate()
        assert dist.all_reduce.call_count == 2          # the question, and the matrix
        dist.all_reduce.side_effect = another_rank_says_stop
        raises(train.Stopped, run.validate)


def test_default_workers_share_the_usable_cores():
    def workers(processes, quota):
        with (mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": processes}),
              mock.patch("os.sched_getaffinity", lambda pid: set(range(12)), create=True),
              mock.patch.object(Path, "read_text", lambda path: quota)):
            return evaluation.pick_workers(None, torch.device("cuda"))

    assert workers("", "max 100000") == 8 and workers("2", "max 100000") == 6
    assert workers("2", "600000 100000") == 3 and workers("64", "600000 100000") == 1
    assert evaluation.pick_workers(None, torch.device("cpu")) == 0
    assert evaluation.pick_workers(3, torch.device("cpu")) == 3
    assert load(whole_run())["settings"]["workers"] is None     # another machine may have others


def test_precisions():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for has_bf16, dtype in (True, torch.bfloat16), (False, torch.float16):
        with mock.patch("torch.cuda.is_bf16_supported", lambda **options: has_bf16):
            assert evaluation.pick_amp("auto", cuda) == dtype
            if not has_bf16:
                assert "--amp auto" in raises(ValueError, evaluation.pick_amp, "bf16", cuda)
    for has_amx, dtype in (True, torch.bfloat16), (False, None):
        with mock.patch("torch.cpu.get_capabilities", create=True) as capabilities:
            capabilities.return_value = {"amx_bf16": has_amx}
            assert evaluation.pick_amp("auto", cpu) == dtype
    for name, dtype in ("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32):
        with evaluation.autocast(cpu, evaluation.pick_amp(name, cpu)):
            assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_on_a_gpu():
    if not torch.cuda.is_available():
        print("test_on_a_gpu: skipped, there is no GPU", file=sys.stderr)
        return
    for amp in "bf16", "fp16":
        out = FOLDER / f"gpu-{amp}"
        gpu = "--device", "cuda", "--amp", amp
        with before_step(4, lambda: signal.raise_signal(signal.SIGTERM)):
            raises(SystemExit, small_run, out, *gpu, "--workers", "2", "--epochs", "4")
        assert load(out)["step"] == 5
        rows = resume(out)
        assert rows[-1]["loss"] < rows[0]["loss"] and 0.01 < rows[-1]["gpu_gib"] < 4
        assert ("scale" in load(out)["scaler"]) == (amp == "fp16")
        options = "--ckpt", str(out / "last.pt"), "--out", str(out / "eval")
        scored, = evaluation.main([*options, *gpu])
        close(scored["miou"], rows[-1]["miou"], 0.01, 0.001)


# ------------------------------------------------------------------------- the command line


def test_bad_options_and_files_are_one_line():
    out, best = FOLDER / "refused", checkpoint() / "best.pt"
    junk, cut = FOLDER / "junk.pt", FOLDER / "cut.pt"
    hostile, other = FOLDER / "hostile.pt", FOLDER / "other.pt"
    junk.write_text("not a checkpoint")
    cut.write_bytes(best.read_bytes()[:100_000])
    torch.save({"model": Hostile(), "settings": {}}, hostile)
    saved = load(checkpoint(), "best.pt")
    saved["settings"]["model"] = "resnet34"
    torch.save(saved, other)
    new = ["--data", scenes(), "--out", out, *SMALL]
    table = [
        (train, [*new, "--resume", junk], junk),
        (train, [*new, "--resume", hostile], hostile),
        (train, [*new, "--data", FOLDER], "leftImg8bit_trainvaltest.zip"),
        (train, [*new, "--model", "convunext", "--pretrained"], "--no-pretrained"),
        (train, [*new, "--model", "resnet34", "--init", best], "of resnet18, do not fit resnet34"),
        (evaluation, [], "best.pt"),
        (evaluation, ["--ckpt", junk], junk),
        (evaluation, ["--ckpt", cut], cut),
        (evaluation, ["--ckpt", other], f"{other}: its weights, of resnet34, do not fit resnet34"),
        (evaluation, ["--ckpt", hostile], hostile),
        (evaluation, ["--ckpt", "missing.pt"], "missing.pt"),
        (evaluation, ["--ckpt", best, "--split", "validation"], "leftImg8bit/validation"),
        (evaluation, ["--ckpt", best, "--images", FOLDER / "none"], "none: no such file or folder"),
        (evaluation, ["--ckpt", best, best, "--labels-out", out], "--labels-out"),
        (evaluation, ["--ckpt", best, "--panels", "0"], "--panels")]
    for option in ("--epochs 0", "--epoch 2", "--batch -1", "--batch 7", "--lr nan", "--lr 0",
                   "--crop 32 32", "--copyblob 1.5", "--workers -1", "--workers 1001",
                   "--seed x", "--scale 0 1", "--scale 2 1", "--loss mse", "--model vgg",
                   "--color red", "--device cuda:99", f"--pretrained --init {best}"):
        table.append((train, [*new, *option.split()], option.split()[0]))
    for module, options, part in table:
        status, line = command_line_of(module, *options)
        assert status == 2 and line.count("\n") == 1, (options, line)
        assert line.startswith(f"{Path(module.__file__).name}: error: "), line
        assert str(part) in line, (options, line)
    assert not (out / "last.pt").exists() and not (FOLDER / "owned").exists()


def test_data_is_the_option_else_the_variable_else_scenes():
    for option, variable, expected in (("/a", "/b", "/a"), (None, "/b", "/b"),
                                       (None, "", str(Path("scenes").resolve()))):
        args = mock.Mock(data=option)
        with (mock.patch.dict(os.environ, {"CITYSCAPES_DATASET": variable}),
              mock.patch("train.make_scenes") as make_scenes):
            train.prepare_data(args)
        assert args.data == expected and make_scenes.called == (variable == "")


def test_command_line_explains_errors():
    def ending(error):
        return command_line_of(mock.Mock(__file__="x.py", main=mock.Mock(side_effect=error)))

    for error in (torch.OutOfMemoryError("CUDA out of memory. GPU 3\n is full"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                  RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
                  RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"),
                  RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is "
                               "possible that dataloader's workers are out of shared memory.")):
        status, line = ending(error)
        assert status == 2 and "--workers" in line and "--batch" in line
        assert line.endswith(f" {' '.join(str(error).split())}\n") or not str(error), line
    in_a_worker = ValueError("Traceback ...\nOSError: x.png is broken")
    assert ending(in_a_worker) == (2, "x.py: error: x.png is broken\n")
    assert ending(KeyboardInterrupt()) == (130, "")
    crashed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")
    for bug in KeyError("bug"), RuntimeError("bug"), crashed:
        raises(type(bug), evaluation.command_line, mock.Mock(side_effect=bug))
    with mock.patch("sys.flags", mock.Mock(dev_mode=True)):         # python -X dev
        raises(ValueError, evaluation.command_line, mock.Mock(side_effect=ValueError("input")))


# ------------------------------------------------------------------------- eval


def test_eval_by_its_own_predictions():
    """Score the PNGs that eval.py wrote in loops, and compare with its metrics.json."""
    out, predictions = FOLDER / "eval", FOLDER / "predictions"
    run_eval("--ckpt", checkpoint() / "best.pt", "--out", out, "--labels-out", predictions)
    result = json.loads((out / "metrics.json").read_text())
    label_ids = [c.label_id for c in data.CLASSES]
    both, either = np.zeros(34), np.zeros(34)
    truths = sorted((scenes() / "gtFine" / "val").rglob("*_labelIds.png"))
    for path in truths:
        frame = path.name.removesuffix("_gtFine_labelIds.png")
        truth = np.array(Image.open(path))
        guess = np.array(Image.open(predictions / f"{frame}_pred_labelIds.png"))
        assert truth.shape == guess.shape
        counted = np.isin(truth, label_ids)
        for i in label_ids:
            both[i] += (counted & (truth == i) & (guess == i)).sum()
            either[i] += (counted & ((truth == i) | (guess == i))).sum()
    for c in data.CLASSES:
        iou = result["classes"][c.name]["iou"]
        if either[c.label_id] == 0:
            assert iou is None, c.name
        else:
            close(iou, both[c.label_id] / either[c.label_id], 1e-9)
    assert result["images"] == len(truths) == 3 and result["settings"]["model"] == "resnet18"
    close(result["miou"], result["val_miou"])
    assert (out / "confusion.png").exists() and (out / "curves.png").exists()
    assert len(list(out.glob("panel_*.png"))) == 3


def test_tables_equal_values_computed_by_hand():
    matrix = torch.zeros(19, 19, dtype=torch.int64)
    matrix[:2, :2] = torch.tensor([[6, 2], [1, 3]])     # road and sidewalk
    result = evaluation.summarize(matrix)
    close(result["pixel_accuracy"], 9 / 12)
    close(result["miou"], (6 / 9 + 3 / 6) / 2)
    close(result["mean_dice"], (12 / 15 + 6 / 9) / 2)
    assert result["classes_scored"] == 2 and result["classes"]["road"]["pixels"] == 8
    lines = evaluation.class_table(result).split("\n")
    assert lines[1].split() == "sidewalk 0.500 0.667 33.33% road (50% of the union)".split()
    assert lines[2].split() == "road 0.667 0.800 66.67% sidewalk (33% of the union)".split()
    assert lines[3].split()[1:3] == ["n/a", "n/a"]
    perfect = evaluation.summarize(torch.eye(19, dtype=torch.int64))
    lines = evaluation.comparison(["a", "b"], [result, perfect]).split("\n")
    assert lines[1].split() == ["IoU", "road", "0.667", "1.000*"]


def test_precision_is_that_of_the_training():
    saved, path = load(checkpoint(), "best.pt"), FOLDER / "bf16.pt"
    saved["settings"]["amp"] = "bf16"
    torch.save(saved, path)
    options = ["--ckpt", str(path), "--out", str(FOLDER / "bf16"), "--device", "cpu"]
    with (mock.patch.object(evaluation, "pick_amp", return_value=None) as pick_amp,
          contextlib.redirect_stdout(io.StringIO())):
        evaluation.main(options)
        evaluation.main([*options, "--amp", "off"])
    assert [call.args[0] for call in pick_amp.call_args_list] == ["bf16", "off"]


def test_several_checkpoints():
    out = FOLDER / "several"
    for name in "one", "two":
        (out / name).mkdir(parents=True)
        shutil.copy(checkpoint() / "best.pt", out / name)
    with mock.patch.object(evaluation, "probabilities") as probabilities:
        first, second = run_eval("--ckpt", out / "one/best.pt", out / "two/best.pt", "--out", out)
    assert not probabilities.called                     # only --tta needs them
    assert first["confusion_matrix"] == second["confusion_matrix"]
    for name in "comparison.png", "curves.png", "one/metrics.json", "two/metrics.json":
        assert (out / name).exists(), name
    with mock.patch.object(evaluation, "comparison_picture") as picture:
        run_eval("--ckpt", out / "one/best.pt", out / "two/best.pt", "--out", out, "--panels", "3")
    assert [len(pictured) for pictured in picture.call_args.args[2]] == [2, 2]      # not all 3


def test_tta_undoes_its_flips():
    """A network that looks at single pixels predicts the same, except where resizing mixes."""
    images = torch.randint(0, 256, (1, 3, 8, 12), dtype=torch.uint8)
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    model = torch.nn.Conv2d(3, 19, 1)
    plain = evaluation.predict(model, images)
    assert (evaluation.predict(model, images, tta=True) == plain).float().mean() > 0.8


def test_tta_averages_probabilities():
    """One pass is sure of class 0, then three prefer class 1 and two class 2."""
    logits = torch.zeros(6, 1, 19, 1, 1)
    logits[0, :, 0] = 20                            # the sum of the logits would give class 0
    logits[1:4, :, 1] = 3
    logits[4:, :, 2] = 3                            # the last passes alone would give class 2
    passes = iter(logits)

    def model(x):
        return next(passes).expand(1, 19, *x.shape[-2:])

    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert (evaluation.predict(model, images, tta=True) == 1).all()


def test_tta_sees_three_scales_and_their_flips():
    def model(x):
        seen.append(x)
        return torch.zeros(1, 19, *x.shape[-2:])

    seen, images = [], torch.randint(0, 256, (1, 3, 40, 80), dtype=torch.uint8)
    evaluation.predict(model, images, tta=True)
    assert sorted(x.shape[2:] for x in seen[::2]) == [(30, 60), (40, 80), (50, 100)]
    for x, flipped in zip(seen[::2], seen[1::2]):
        assert torch.equal(x, flipped.flip(3))


def test_predictions_are_the_argmax_of_float32_logits():
    """Rebuild them from the bfloat16 output of the last layer, before it is upsampled."""
    model, small = tiny("").eval(), []
    model.head.register_forward_hook(lambda layer, inputs, output: small.append(output))
    images = torch.randint(0, 256, (1, 3, 64, 128), dtype=torch.uint8)
    prediction = evaluation.predict(model, images, torch.bfloat16)
    assert small[0].dtype == torch.bfloat16
    logits = F.interpolate(small[0].float(), (64, 128), mode="bilinear")
    assert torch.equal(prediction, logits.argmax(dim=1).byte())


def test_tta_reaches_the_frames_of_a_split():
    with mock.patch.object(evaluation, "probabilities", wraps=evaluation.probabilities) as passes:
        run_eval("--ckpt", checkpoint() / "best.pt", "--out", FOLDER / "tta", "--tta")
    assert passes.call_count == 6 * 3                   # 3 frames


def test_colors_and_error_picture():
    colors = evaluation.colorize(Image.fromarray(np.uint8([[0, 13, 255]])))
    assert np.asarray(colors).tolist() == [[[128, 64, 128], [0, 0, 142], [0, 0, 0]]]
    image = np.full((1, 3, 3), 90, np.uint8)
    label, prediction = np.uint8([[4, 4, 255]]), np.uint8([[4, 5, 4]])
    picture = evaluation.error_picture(image, label, prediction)
    assert picture.tolist() == [[[30, 30, 30], [255, 40, 40], [0, 0, 0]]]   # right wrong ignored


def test_very_wide_frames_are_drawn():
    for height, width in (4, 700), (1, 1000):
        label = np.zeros((height, width), np.uint8)
        image = np.zeros((height, width, 3), np.uint8)
        assert evaluation.panel((image, label, label)).width > 4 * 400


def test_photos_of_any_kind():
    """A broken photo is skipped and reported, and the exit status is 2."""
    folder, out, best = FOLDER / "photos", FOLDER / "photos-out", checkpoint() / "best.pt"
    folder.mkdir()
    sizes = {"L": (40, 30), "RGBA": (33, 17), "RGB": (50, 20)}
    for mode, size in sizes.items():
        Image.new(mode, size).save(folder / f"{mode}.png")
    (folder / "LA.png").write_bytes(b"broken")
    status, told = command_line_of(
        evaluation, "--ckpt", best, "--images", folder, "--out", out, "--device", "cpu")
    assert status == 2 and str(folder / "LA.png") in told
    for mode, size in sizes.items():
        for kind in "color", "overlay":
            assert Image.open(out / f"{mode}_{kind}.png").size == size
    assert "--out" in raises(ValueError, run_eval, "--ckpt", best, "--images", folder, "--out",
                             folder)
    run_eval("--ckpt", best, "--images", folder / "RGB.png", "--out", out / "one")
    assert sorted(p.name for p in (out / "one").iterdir()) == ["RGB_color.png", "RGB_overlay.png"]
    Image.new("L", (9, 9)).save(folder / "L.tif")   # its results would replace those of L.png
    assert "named L," in raises(ValueError, run_eval, "--ckpt", best, "--images", folder)


def test_large_photos_are_predicted_at_a_reduced_size():
    """At most at the size of the training's frames, 128 x 256; the labels have the photo's size."""
    Image.new("RGB", (1000, 400)).save(FOLDER / "large.png")
    options = "--ckpt", checkpoint() / "best.pt", "--images", FOLDER / "large.png"
    for tta in [], ["--tta"]:
        with (mock.patch.object(evaluation, "normalize", wraps=data.normalize) as normalize,
              mock.patch.object(evaluation, "probabilities",
                                wraps=evaluation.probabilities) as passes):
            run_eval(*options, "--out", FOLDER / "large", *tta)
        assert passes.call_count == 6 * len(tta)
        n, channels, height, width = normalize.call_args.args[0].shape
        assert 0.97 < height * width / (128 * 256) < 1.03 and abs(width / height - 2.5) < 0.05
        assert Image.open(FOLDER / "large/large_color.png").size == (1000, 400)


def test_splits_with_and_without_labels():
    best = checkpoint() / "best.pt"
    root = write_tree(FOLDER / "splits", np.full((30, 40), 7, np.uint8), split="test")
    out = FOLDER / "split-out"
    for name in "labels", "no-labels":                  # the second removes metrics.json again
        run_eval("--ckpt", best, "--data", root, "--split", "test", "--out", out,
                 "--labels-out", out)
        prediction = Image.open(out / "ulm_000000_000001_pred_labelIds.png")
        assert prediction.size == (40, 30)
        assert set(np.unique(prediction)) <= {c.label_id for c in data.CLASSES}
        assert (out / "metrics.json").exists() == (name == "labels")
        shutil.rmtree(root / "gtFine", ignore_errors=True)


def test_frames_of_one_name_in_two_cities_are_scored_but_their_labels_not_written():
    label, best = np.full((8, 8), 7, np.uint8), checkpoint() / "best.pt"
    for city in "ulm", "bonn":
        root = write_tree(FOLDER / "cities", label, split="val", city=city)
    options = "--ckpt", best, "--data", root, "--out", FOLDER / "two-cities"
    result, = run_eval(*options)
    assert result["images"] == 2
    message = raises(ValueError, run_eval, *options, "--labels-out", FOLDER / "two-cities")
    assert "ulm_000000_000001" in message


def test_moved_data_is_found():
    best, moved, out = load(checkpoint(), "best.pt"), FOLDER / "moved.pt", FOLDER / "moved"
    best["settings"]["data"] = "/moved"
    torch.save(best, moved)
    with mock.patch.dict(os.environ, {"CITYSCAPES_DATASET": ""}):
        assert "--data" in raises(FileNotFoundError, run_eval, "--ckpt", moved)
        by_option, = run_eval("--ckpt", moved, "--data", scenes(), "--out", out)
    with mock.patch.dict(os.environ, {"CITYSCAPES_DATASET": str(scenes())}):
        by_variable, = run_eval("--ckpt", moved, "--out", out)
    assert by_option["confusion_matrix"] == by_variable["confusion_matrix"]


# ------------------------------------------------------------------------- README


def readme_commands():
    """The words of every command of README.md that runs a file of the project."""
    commands = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\b(train|eval|test_all)\.py", line):
                commands.append(shlex.split(line, comments=True))
    return commands


def test_readme_options_exist():
    assert len(readme_commands()) >= 3
    for words in readme_commands():
        script = next(word for word in words if word.endswith(".py"))
        options = words[words.index(script) + 1:]
        assert (HERE / script).exists(), words
        with mock.patch("train.load_checkpoint", return_value={"settings": {}}):
            if script == "train.py":
                train.parse_args(options)           # exits where an option does not exist
            if script == "eval.py":
                evaluation.parse_args(options)


def test_readme_main_commands_run():
    folder = FOLDER / "newcomer"
    shutil.copytree(scenes(), folder / "scenes")
    environment = {**os.environ, "CITYSCAPES_DATASET": "", "OMP_NUM_THREADS": "1"}
    train_words, eval_words = readme_commands()[:2]
    for words, budget in ((train_words, ["--epochs", "1", "--crop", "64", "64"]),
                          (eval_words, ["--panels", "1"])):
        command = [sys.executable, str(HERE / words[1]), *words[2:], *budget]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True,
                                text=True)
        assert result.returncode == 0, result.stderr
        if words is train_words:
            assert result.stdout.startswith("GENERATED SCENES")
    assert (folder / "eval/metrics.json").exists()
    written = {"best.pt", "last.pt", "log.csv", "curves.png", "eval", "scenes"}
    assert {path.name for path in folder.iterdir()} == written      # and nothing else


if __name__ == "__main__":
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    passed, failed = 0, 0
    for name, test in tests:
        start, output = time.monotonic(), io.StringIO()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else a stopped run's
        try:
            with contextlib.redirect_stdout(output):
                test()
            passed += 1
            result = "ok  "
        except (Exception, SystemExit):
            failed += 1
            result = "FAIL"
            print(output.getvalue(), traceback.format_exc())
        print(f"{result}  {time.monotonic() - start:5.1f} s  {name}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)
