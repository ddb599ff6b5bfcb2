"""Score a checkpoint, list its worst classes, and draw what it predicts.

    python eval.py --ckpt best.pt                         # table, metrics.json, pictures in eval/
    python eval.py --ckpt ce/best.pt dice/best.pt         # several checkpoints, side by side
    python eval.py --ckpt best.pt --tta                   # test-time augmentation
    python eval.py --ckpt best.pt --images FOLDER         # any photos: color maps and overlays
    python eval.py --ckpt best.pt --split test --labels-out FOLDER        # for the official scorer

Every frame is scored at the full size of its label, and one confusion matrix counts the pixels of
the whole split.
"""
import argparse
import atexit
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import metrics
from data import (CLASSES, IGNORE, LABEL_TO_TRAIN, TRAIN_TO_LABEL, Cityscapes, normalize,
                  read_image)
from unet import SPECS, build_model

NAMES = [c.name for c in CLASSES]

# ----------------------------------------------------------------------- prediction and scoring

TTA_SCALES = (0.75, 1.0, 1.25)


@torch.no_grad()
def predict(model, images, dtype=None, tta=False):
    """uint8 N x 3 x H x W on the model's device -> train ids, uint8 N x H x W.

    tta: average the class probabilities over TTA_SCALES, each with and without a flip.
    """
    x = normalize(images)
    if not tta:
        with autocast(x.device, dtype):
            return model(x).argmax(dim=1).byte()
    total = 0
    for scale in TTA_SCALES:
        size = [max(1, round(scale * side)) for side in x.shape[-2:]]
        scaled = F.interpolate(x, size, mode="bilinear", antialias=True)
        total = total + probabilities(model, scaled, x.shape[-2:], dtype)
        total = total + probabilities(model, scaled.flip(3), x.shape[-2:], dtype).flip(3)
    return total.argmax(dim=1).byte()


def probabilities(model, x, size, dtype):
    """Class probabilities for x, N x 3 x H x W: softmax of the resized logits -> N x 19 x size."""
    with autocast(x.device, dtype):
        logits = model(x)
    return F.interpolate(logits, size, mode="bilinear").softmax(dim=1)


def evaluate(model, dataset, device, dtype=None, tta=False, workers=0, visit=None):
    """Score a model on whole frames -> confusion matrix, int64 19 x 19, on `device`.

    Frames are processed one at a time, so that they may differ in size.
    visit: called as visit(index, image, label, prediction) with the uint8 tensors of each frame
    """
    model.eval()
    matrix = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64, device=device)
    loader = make_loader(dataset, workers, batch_size=1)
    for index, (images, labels) in enumerate(progress(loader, "evaluating")):
        predictions = predict(model, images.to(device), dtype, tta)
        matrix += metrics.confusion_matrix(predictions, labels.to(device), len(CLASSES))
        if visit is not None:
            visit(index, images[0], labels[0], predictions[0].cpu())
    return matrix


def predict_photo(model, photo, frame_size, device, dtype=None, tta=False):
    """RGB Pillow image of any size -> train ids as a Pillow image (mode L) of that size.

    A photo with more pixels than a validation frame (frame_size: height, width) is reduced to that
    number, because the network was scored at that size. This also limits the memory. The
    prediction is then enlarged to the size of the photo.
    """
    limit = frame_size[0] * frame_size[1]
    zoom = min(1, math.sqrt(limit / (photo.width * photo.height)))
    size = max(1, round(zoom * photo.width)), max(1, round(zoom * photo.height))
    pixels = np.array(photo.resize(size, Image.BILINEAR))       # averages where it reduces
    images = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    ids = predict(model, images.to(device), dtype, tta)[0].cpu().numpy()
    return Image.fromarray(ids).resize(photo.size, Image.NEAREST)


# --------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path):
    """Read a best.pt or last.pt -> dict with at least "model" and "settings".

    model: the weights; settings: the options of train.py. `Run.save_as` in train.py lists the rest.
    Only tensors and plain Python values are read, so that a file cannot run code. Raises
    FileNotFoundError, or ValueError for anything that is not a checkpoint of train.py.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name in "model", "data", "loss":
            if not isinstance(saved["settings"][name], str):
                raise TypeError(f"the setting {name} is not a string")
        if not isinstance(saved["model"], dict):
            raise TypeError("there are no weights")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such file; train.py writes best.pt") from error
    except PermissionError:
        raise
    except Exception as error:                      # torch.load raises errors of many kinds
        raise ValueError(f"{path}: not a complete checkpoint of train.py, or a file that tries to "
                         f"run code ({type(error).__name__})") from error
    name = saved["settings"]["model"]
    if name not in SPECS:
        raise ValueError(f"{path}: its model is {name}, which is not in SPECS of unet.py")
    return saved


def load_weights(model, name, saved, path):
    """Load the weights of a checkpoint into a network; `name` is that of the network.

    Raises ValueError if they do not fit.
    """
    try:
        model.load_state_dict(saved["model"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: its weights, of {saved['settings']['model']}, do not fit {name} "
                         f"with {len(CLASSES)} classes as unet.py builds it") from error


Checkpoint = namedtuple("Checkpoint", "path folder model settings epoch miou frame_size log")


def load_model(path, device):
    """Rebuild the network of a checkpoint -> Checkpoint; `folder` is the name of its folder.

    Raises the errors of load_checkpoint, and ValueError if the weights do not fit.
    """
    saved = load_checkpoint(path)
    settings = saved["settings"]
    model = build_model(settings["model"], len(CLASSES))
    load_weights(model, settings["model"], saved, path)
    if saved.get("label_to_train", LABEL_TO_TRAIN.tolist()) != LABEL_TO_TRAIN.tolist():
        print(f"WARNING: {path} was trained with another LABEL_TO_TRAIN than data.py has now")
    model.to(device, memory_format=torch.channels_last).eval()
    folder = Path(path).resolve().parent.name
    frame_size = saved.get("frame_size", [1024, 2048])          # of the validation
    return Checkpoint(str(path), folder, model, settings, saved.get("epoch"), saved.get("miou"),
                      frame_size, saved.get("log", []))


# ------------------------------------------------------------------------------------- tables


def summarize(matrix):
    """All scores of a confusion matrix (int64 C x C) as plain Python values.

    The score of a class in neither truth nor prediction is None.
    """
    def plain(score):
        return None if score.isnan() else score.item()

    iou, dice = metrics.iou(matrix), metrics.dice(matrix)
    largest, partner = metrics.confusion_shares(matrix).nan_to_num().max(dim=1)
    classes = {}
    for i, name in enumerate(NAMES):
        confused = None
        if largest[i] > 0:
            confused = {"with": NAMES[partner[i]], "share_of_union": largest[i].item()}
        classes[name] = {"iou": plain(iou[i]), "dice": plain(dice[i]),
                         "pixels": matrix[i].sum().item(), "most_confused": confused}
    return {"pixel_accuracy": plain(metrics.pixel_accuracy(matrix)),
            "miou": plain(iou.nanmean()),
            "mean_dice": plain(dice.nanmean()),
            "classes_scored": int((~iou.isnan()).sum()),
            "classes": classes,
            "confusion_matrix": matrix.tolist()}


def format_score(score):
    """A score as text of three decimals, or n/a."""
    return "  n/a" if score is None else f"{score:.3f}"


def class_table(result):
    """The classes of `summarize` as text, lowest IoU first, then the means."""
    def by_iou(item):
        iou = item[1]["iou"]
        return 2 if iou is None else iou            # n/a last

    total = max(1, sum(c["pixels"] for c in result["classes"].values()))
    lines = ["worst first      IoU   Dice  pixels  most confused with"]
    for name, c in sorted(result["classes"].items(), key=by_iou):
        confused = "-"
        if c["most_confused"]:
            share = c["most_confused"]["share_of_union"]
            confused = f"{c['most_confused']['with']} ({share:.0%} of the union)"
        lines.append(f"{name:14s} {format_score(c['iou'])}  {format_score(c['dice'])}  "
                     f"{c['pixels'] / total:6.2%}  {confused}")
    mean = f"mean of {result['classes_scored']}"
    lines.append(f"{mean:14s} {format_score(result['miou'])}  {format_score(result['mean_dice'])}")
    lines.append(f"pixel accuracy {format_score(result['pixel_accuracy'])}")
    return "\n".join(lines)


def comparison(names, results):
    """One column of scores for each checkpoint, as text. * marks the best of a row."""
    rows = []
    for name in NAMES:
        rows.append((f"IoU {name}", [r["classes"][name]["iou"] for r in results]))
    for key in "miou", "mean_dice", "pixel_accuracy":
        rows.append((key, [r[key] for r in results]))
    width = max(len(name) for name in names) + 2
    width = max(width, 9)
    lines = [f"{'':18s}" + "".join(f"{name:>{width}s}" for name in names)]
    for name, scores in rows:
        best = max((s for s in scores if s is not None), default=None)
        line = f"{name:18s}"
        for score in scores:
            mark = "*" if score is not None and score == best else " "
            line += f"{format_score(score) + mark:>{width}s}"
        lines.append(line)
    return "\n".join(lines)


NEARLY_ALL = 0.95       # of the pixels: a warning is printed if more have one predicted class


def predicted_shares(pixels):
    """Text: the predicted classes by their share of the pixels (int 19), largest first."""
    shares = pixels / max(1, pixels.sum())
    parts = []
    for i in np.argsort(-shares):
        if shares[i] > 0:
            parts.append(f"{NAMES[i]} {shares[i]:.1%}")
    text = "predicted: " + ", ".join(parts)
    if shares.max() > NEARLY_ALL:
        text += ("\nWARNING: nearly all pixels have one class; "
                 "are these pictures like those of the training?")
    return text


# ------------------------------------------------------------------------------------ pictures

PALETTE = np.zeros((256, 3), np.uint8)              # train id -> color; 255 is black
PALETTE[:len(CLASSES)] = [c.color for c in CLASSES]
ERROR_COLOR = (255, 40, 40)
TILE = 480                                          # width of a picture in a sheet, in pixels
FONT = ImageFont.load_default(15)


def colorize(ids):
    """Train ids as a Pillow image (mode L) -> their colors, RGB."""
    picture = ids.copy()
    picture.putpalette(PALETTE.ravel().tolist())
    return picture.convert("RGB")


def error_picture(image, label, prediction):
    """Three uint8 arrays -> the image darkened, wrong pixels red, ignored pixels black."""
    errors = image // 3
    errors[label != prediction] = ERROR_COLOR
    errors[label == IGNORE] = 0
    return errors


def picture_grid(rows):
    """Draw rows of (title, uint8 H x W x 3) pairs, and the colors of the classes below."""
    picture_height = max(1, round(TILE * rows[0][0][1].shape[0] / rows[0][0][1].shape[1]))
    row_height = picture_height + 28                # a title and a margin
    columns = max(len(row) for row in rows)
    legend = [(c.name, c.color) for c in CLASSES]
    legend += [("ignored", (0, 0, 0)), ("error", ERROR_COLOR)]
    per_line = max(1, columns * TILE // 120)
    legend_height = 28 * math.ceil(len(legend) / per_line)
    size = columns * TILE, len(rows) * row_height + legend_height
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        for j, (title, pixels) in enumerate(row):
            x, y = j * TILE, i * row_height
            draw.text((x + 4, y + 4), title, "black", FONT)
            smooth = Image.BILINEAR if pixels.shape[1] > TILE else Image.NEAREST
            tile = Image.fromarray(pixels).resize((TILE - 4, picture_height), smooth)
            picture.paste(tile, (x + 2, y + 26))
    for i, (name, color) in enumerate(legend):
        x = 6 + 120 * (i % per_line)
        y = len(rows) * row_height + 28 * (i // per_line) + 4
        draw.rectangle((x, y, x + 16, y + 16), color)
        draw.text((x + 22, y), name, "black", FONT)
    return picture


def panel(frame):
    """One frame: image, truth, prediction and errors; without a truth, image and prediction."""
    image, label, prediction = frame
    row = [("image", image), ("prediction", PALETTE[prediction])]
    if (label != IGNORE).any():
        row.insert(1, ("truth", PALETTE[label]))
        row.append(("errors", error_picture(image, label, prediction)))
    return picture_grid([row])


def comparison_picture(names, results, pictures):
    """Two frames: image and truth first, then the predictions and errors of each checkpoint.

    pictures: for each checkpoint {index: (image, label, prediction)}, see `score_checkpoint`
    """
    chosen = sorted(pictures[0])
    row = []
    for index in chosen:
        image, label, _ = pictures[0][index]
        row += [("image", image), ("truth", PALETTE[label])]
    rows = [row]
    for name, result, predicted in zip(names, results, pictures):
        row = []
        for index in chosen:
            image, label, prediction = predicted[index]
            row.append((f"{name}, mIoU {format_score(result['miou'])}", PALETTE[prediction]))
            row.append(("errors", error_picture(image, label, prediction)))
        rows.append(row)
    return picture_grid(rows)


def confusion_picture(matrix, title):
    """Draw a confusion matrix (int64 C x C): each row in percent of its class."""
    cell, left, top = 44, 120, 160
    side = cell * len(NAMES)
    picture = Image.new("RGB", (left + side + 10, top + side + 10), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((6, 6), f"{title}\nrow: truth, column: prediction, % of the row", "black", FONT)
    for i, name in enumerate(NAMES):
        draw.text((left - 8, top + cell * i + cell // 2), name, "black", FONT, anchor="rm")
        text = Image.new("RGB", (100, 20), "white")
        ImageDraw.Draw(text).text((0, 10), name, "black", FONT, anchor="lm")
        picture.paste(text.rotate(90, expand=True), (left + cell * i + 12, top - 104))
    share = (matrix.double() / matrix.sum(dim=1, keepdim=True)).numpy()
    for i in range(len(NAMES)):
        for j in range(len(NAMES)):
            if np.isnan(share[i, j]):               # the class has no pixel
                continue
            full = np.array((20, 110, 60) if i == j else (190, 30, 30))
            color = 255 - (255 - full) * math.sqrt(share[i, j])         # white for 0
            x, y = left + cell * j, top + cell * i
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), tuple(color.astype(int).tolist()))
            if share[i, j] >= 0.005:
                text_color = "white" if share[i, j] > 0.3 else "black"
                draw.text((x + cell // 2, y + cell // 2), f"{100 * share[i, j]:.0f}", text_color,
                          FONT, anchor="mm")
    return picture


CURVE_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


def curves_picture(logs):
    """Draw training loss and validation mIoU over the epochs; logs: {name: rows of log.csv}."""
    width, height = 480, 300                        # of one plot, inside its axes
    picture = Image.new("RGB", (2 * width + 180, height + 90 + 20 * len(logs)), "white")
    draw = ImageDraw.Draw(picture)
    last_epoch = max(row["epoch"] for rows in logs.values() for row in rows)
    for k, (key, title) in enumerate((("loss", "training loss"), ("miou", "validation mIoU"))):
        values = [row[key] for rows in logs.values() for row in rows if row[key] is not None]
        top = max(values, default=0) or 1
        left, bottom = 60 + k * (width + 80), 40 + height
        draw.text((left, 10), title, "black", FONT)
        draw.text((left + width, bottom + 24), "epoch", "black", FONT, anchor="ra")
        for i in range(5):                          # grid lines and their numbers
            y = bottom - height * i / 4
            draw.line((left, y, left + width, y), "#dddddd")
            draw.text((left - 6, y), f"{top * i / 4:.2f}", "black", FONT, anchor="rm")
        for epoch in sorted({0, round(last_epoch / 2), last_epoch}):
            x = left + width * epoch / last_epoch
            draw.text((x, bottom + 6), str(epoch), "black", FONT, anchor="ma")
        for (name, rows), color in zip(logs.items(), CURVE_COLORS * len(logs)):
            points = []
            for row in rows:
                if row[key] is not None:            # --val-every may leave epochs out
                    points.append((left + width * row["epoch"] / last_epoch,
                                   bottom - height * row[key] / top))
            draw.line(points, color, 2)
            for x, y in points:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), color)
    for i, (name, color) in enumerate(zip(logs, CURVE_COLORS * len(logs))):
        y = height + 85 + 20 * i
        draw.line((60, y, 90, y), color, 3)
        draw.text((100, y), name, "black", FONT, anchor="lm")
    return picture


# ------------------------------------------------------------------------------- the commands


def score_checkpoint(ckpt, dataset, out, device, dtype, args):
    """Evaluate a checkpoint, print its table, and write its files into the folder `out`.

    -> (result, pictured): the dict of metrics.json, and {index: (image, label, prediction)} of two
    frames for `comparison_picture`, as uint8 arrays
    """
    count = min(args.panels, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    pictured = {}
    pixels = np.zeros(len(CLASSES), np.int64)       # predicted as each class
    out.mkdir(parents=True, exist_ok=True)

    def visit(index, image, label, prediction):
        image = image.permute(1, 2, 0).numpy()
        label, prediction = label.numpy(), prediction.numpy()
        pixels[:] += np.bincount(prediction.ravel(), minlength=len(CLASSES))
        if args.labels_out:
            save_labels(prediction, args.labels_out, dataset.names[index])
        if index in chosen:
            panel((image, label, prediction)).save(out / f"panel_{dataset.names[index]}.png")
        if index in chosen[:2]:                     # all panels would fill the memory
            pictured[index] = image, label, prediction

    matrix = evaluate(ckpt.model, dataset, device, dtype, args.tta, args.workers, visit)
    matrix = matrix.cpu()
    result = {"checkpoint": ckpt.path, "settings": ckpt.settings, "epoch": ckpt.epoch,
              "val_miou": ckpt.miou, "split": args.split, "data": str(args.data),
              "images": len(dataset), "tta": args.tta, **summarize(matrix)}
    if matrix.sum() == 0:
        print("the labels hold none of the classes, so there is no score")
        (out / "metrics.json").unlink(missing_ok=True)          # of another split
        (out / "confusion.png").unlink(missing_ok=True)
        print(predicted_shares(pixels))
        return result, pictured
    (out / "metrics.json").write_text(json.dumps(result, indent=1))
    title = f"{ckpt.path} on {args.split}, mIoU {format_score(result['miou'])}"
    confusion_picture(matrix, title).save(out / "confusion.png")
    print(class_table(result))
    if pixels.max() > NEARLY_ALL * pixels.sum():
        print(predicted_shares(pixels))
    return result, pictured


def save_labels(train_ids, folder, frame):
    """Write a prediction (uint8 H x W) as label ids, with the name that the scorer expects."""
    Image.fromarray(TRAIN_TO_LABEL[train_ids]).save(folder / f"{frame}_pred_labelIds.png")


def check_unique(names, folder):
    """Raise ValueError if results, which are named after their frames, overwrite each other."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{folder}: two pictures are named {name}, and their results would "
                             "overwrite each other; rename one")
        seen.add(name)


def predict_photos(ckpt, device, dtype, args):
    """Write a color map and an overlay of each photo in --images -> the number of failures."""
    endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    if not args.images.exists():
        raise FileNotFoundError(f"{args.images}: no such file or folder of photos")
    files = [args.images]
    if not args.images.is_file():
        files = sorted(f for f in args.images.iterdir()
                       if f.suffix.lower() in endings and not f.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"{args.images}: no {' '.join(endings)} files in this folder")
    check_unique([file.stem for file in files], args.images)
    if args.out.resolve() == files[0].resolve().parent:
        raise ValueError(f"--out {args.out}: is the folder of the photos; choose another one")
    args.out.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(len(CLASSES), np.int64)
    failures = 0
    for file in progress(files, "predicting"):
        try:
            photo = read_image(file)
        except (OSError, ValueError) as error:
            print(f"skipped {error}", file=sys.stderr)
            failures += 1
            continue
        ids = predict_photo(ckpt.model, photo, ckpt.frame_size, device, dtype, args.tta)
        pixels += ids.histogram()[:len(CLASSES)]
        colors = colorize(ids)
        colors.save(args.out / f"{file.stem}_color.png")
        Image.blend(photo, colors, 0.5).save(args.out / f"{file.stem}_overlay.png")
        if args.labels_out:
            save_labels(np.asarray(ids), args.labels_out, file.stem)
    print(f"{len(files) - failures} photos: {args.out}/*_color.png and *_overlay.png")
    if failures < len(files):
        print(predicted_shares(pixels))
    return failures


def parse_args(argv=None):
    """The options of eval.py."""
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", nargs="+", metavar="BEST_PT",
                   help="one or more checkpoints of train.py")
    p.add_argument("--data", type=Path, metavar="FOLDER",
                   help="root of the dataset (default: the one of the training; of several "
                   "checkpoints, of the first)")
    p.add_argument("--split", default="val", metavar="NAME",
                   help="split to evaluate: train, val, test or another folder (default: val)")
    p.add_argument("--out", type=Path, default=Path("eval"), metavar="FOLDER",
                   help="where results are written, over files of the same names (default: eval)")
    p.add_argument("--tta", action="store_true",
                   help="average predictions over three scales and flips; 6 times slower")
    p.add_argument("--images", type=Path, metavar="PATH",
                   help="predict a photo or a folder of photos instead of a split")
    p.add_argument("--labels-out", type=Path, metavar="FOLDER",
                   help="also write predictions as PNGs of label ids, at full size")
    p.add_argument("--panels", type=number_in(1, 10**6, int), default=6, metavar="N",
                   help="number of frames to draw (default: 6)")
    p.add_argument("--device", default="auto", metavar="NAME",
                   help="cuda, cuda:1, mps or cpu (default: the fastest available)")
    p.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"],
                   help="precision of autocast; off is float32 (default: as in the training; "
                   "of several checkpoints, of the first)")
    p.add_argument("--workers", type=number_in(0, 1000, int), metavar="N",
                   help="processes that read frames (default: up to 8; on a CPU 0)")
    args = p.parse_args(argv)
    if not args.ckpt:
        p.error("no checkpoint is given; train.py writes one: --ckpt best.pt")
    if len(args.ckpt) > 1 and (args.images or args.labels_out):
        p.error("--images and --labels-out need exactly one --ckpt")
    return args


def find_data(settings):
    """The root of the data of a run; if that folder is gone, $CITYSCAPES_DATASET if it is set."""
    variable = os.environ.get("CITYSCAPES_DATASET")
    if variable and not Path(settings["data"]).exists():
        return variable
    return settings["data"]


def main(argv=None):
    """Run one command line (default: sys.argv) -> a list of the dicts in metrics.json."""
    args = parse_args(argv)
    device = pick_device(args.device)
    args.workers = pick_workers(args.workers, device)
    if args.labels_out:
        args.labels_out.mkdir(parents=True, exist_ok=True)
    ckpts = [load_model(path, device) for path in args.ckpt]
    dtype = pick_amp(args.amp or ckpts[0].settings.get("amp", "auto"), device)
    if args.images:
        if predict_photos(ckpts[0], device, dtype, args) > 0:
            sys.exit(2)
        return []
    names = [ckpt.folder for ckpt in ckpts]
    if len(set(names)) < len(names):                # folders of one name: number them
        names = [f"{i}_{name}" for i, name in enumerate(names, start=1)]

    args.data = args.data or Path(find_data(ckpts[0].settings))
    dataset = Cityscapes(args.data, args.split)
    if args.labels_out:
        check_unique(dataset.names, args.data)
    print(f"{len(dataset)} {args.split} frames of {args.data}, evaluated at full size", flush=True)
    results, pictures = [], []
    for name, ckpt in zip(names, ckpts):
        print(f"\n{ckpt.path}: {ckpt.settings['model']}, loss {ckpt.settings['loss']}, "
              f"epoch {ckpt.epoch}")
        out = args.out / name if len(ckpts) > 1 else args.out
        result, pictured = score_checkpoint(ckpt, dataset, out, device, dtype, args)
        results.append(result)
        pictures.append(pictured)
    if len(ckpts) > 1:
        print("\n" + comparison(names, results))
        comparison_picture(names, results, pictures).save(args.out / "comparison.png")
    logs = {name: ckpt.log for name, ckpt in zip(names, ckpts) if ckpt.log}
    if logs:
        curves_picture(logs).save(args.out / "curves.png")
    print(f"\nresults: {args.out}/")
    return results


# ----------------------------- support for train.py and eval.py: devices, processes, messages

def pick_device(name="auto"):
    """A torch.device by name; "auto" is cuda if there is one, else mps, else cpu.

    Under torchrun, each process takes the GPU of its LOCAL_RANK. Raises ValueError if the device
    cannot be used.
    """
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(device)           # first, or GPU 0 is opened as well
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); try --device cpu, or under "
                         "torchrun as many processes as there are GPUs") from error
    return device


def pick_amp(name, device):
    """The dtype for autocast: torch.bfloat16, torch.float16, or None for no autocast (float32).

    "auto" is the fastest: bfloat16 on GPUs that have it, else float16 on CUDA; on a CPU bfloat16
    if it has matrix units for it (AMX). Raises ValueError for "bf16" if the device has none.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        automatic = "bf16" if has_bf16 else "fp16"
    elif device.type == "cpu":
        has_bf16 = True
        automatic = "off"
        if hasattr(torch.cpu, "get_capabilities"):  # old versions of torch have none
            if torch.cpu.get_capabilities().get("amx_bf16"):
                automatic = "bf16"
    else:
        has_bf16 = False
        automatic = "off"
    if name == "auto":
        name = automatic
    if name == "bf16" and not has_bf16:
        raise ValueError(f"--amp bf16: {device.type} has no bfloat16 here; use --amp auto")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """The autocast context for a dtype of `pick_amp`; for None it does nothing."""
    if dtype is None:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype)


def pick_workers(number, device):
    """The number of data workers; None is this process's share of the CPU cores, at most 8.

    On a CPU None is 0, as the network itself keeps all cores busy.
    """
    if number is not None:
        return number
    if device.type == "cpu":
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)    # of torchrun on this machine
    return max(1, min(8, usable_cores() // processes))


def usable_cores():
    """CPU cores that this process may use: its affinity, and on Linux a container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):                   # no such file, or the quota is "max"
        pass
    return max(1, cores)


def rank():
    """The number of this process under torchrun, else 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def progress(items, what):
    """Yield the items. On a terminal, one line that is updated in place counts them."""
    start = time.monotonic()
    live = sys.stdout.isatty() and rank() == 0
    for number, item in enumerate(items, start=1):
        yield item
        if live:
            rate = number / (time.monotonic() - start)
            print(f"\r\033[K{what} {number}/{len(items)}  {rate:.1f}/s ", end="", flush=True)
    if live:
        print("\r\033[K", end="", flush=True)


def number_in(low, high, kind=float):
    """A type for argparse: numbers of a kind between `low` and `high`."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    convert.__name__ = kind.__name__                # in argparse's message: invalid int value
    return convert


def advice(error):
    """What to tell the user about an exception, in one line; None to show its traceback.

    The checks of the input raise ValueError or OSError. `python -X dev` shows the traceback anyway.
    """
    text = " ".join(str(error).split())
    memory = "(of|allocate|shared) memory|killed by signal: (Killed|Bus)"      # Killed: by Linux
    if isinstance(error, MemoryError) or re.search(memory, text):
        return ("out of memory: lower --workers (in a container, raise --shm-size); for training, "
                "lower --batch or --crop, or choose a smaller --model; for evaluation, try "
                f"--amp bf16 without --tta. {text[:250]}").strip()
    if isinstance(error, (OSError, ValueError, FloatingPointError)):
        message = str(error).strip().split("\n")[-1]    # a worker's error has its traceback first
        return re.sub(r"^\w+Error: ", "", message)
    return None


# --------------------------------------------------- signals and data workers, skip at first

# Ctrl-C, the end of a terminal or ssh session, and what schedulers send. Windows has only two.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1")
                if hasattr(signal, name)]

# What handles them. They may reach one process or all of them, and twice:
#
#     while a run trains          train.StopSignals: the run stops after its step, and is saved
#     in its data workers         ignored, so that they live until the main process has saved
#     while the program ends      ignored, so that a repeated signal does not change its status
#     else                        Python's default


def command_line(main):
    """Run main(). An error that the user can correct ends in one line and exit status 2.

    To see the traceback of such an error: python -X dev train.py ...
    """
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = advice(error)
        if message is None or sys.flags.dev_mode:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        ignore_stop_signals()


def make_loader(dataset, workers, **options):
    """A torch DataLoader whose worker processes leave signals to the main process."""
    if workers > 0:
        options["worker_init_fn"] = ignore_stop_signals
        if sys.platform == "linux":                 # fork is fast, and safe: workers use no GPU
            options["multiprocessing_context"] = "fork"
        atexit.unregister(kill_workers)             # so that it is registered only once
        atexit.register(kill_workers)
    return torch.utils.data.DataLoader(dataset, num_workers=workers, **options)


def ignore_stop_signals(*worker):
    """Make this process ignore STOP_SIGNALS. A DataLoader passes the number of the worker."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """End the workers that are left when the main process ends, for example after an error.

    PyTorch sends them SIGTERM, which they ignore.
    """
    if hasattr(signal, "SIGCHLD"):      # PyTorch's handler would report their end as an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


if __name__ == "__main__":
    command_line(main)
