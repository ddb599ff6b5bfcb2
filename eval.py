"""Score a checkpoint, list its worst classes, and draw what it predicts.

    python eval.py --ckpt best.pt                         # table, metrics.json, pictures in eval/
    python eval.py --ckpt runs/ce runs/dice               # several checkpoints, side by side
    python eval.py --ckpt best.pt --tta                   # test-time augmentation
    python eval.py --ckpt best.pt --images FOLDER         # any photos: color maps and overlays
    python eval.py --ckpt best.pt --split test --labels-out FOLDER        # for the official scorer

Every frame is scored at the full size of its label, and one confusion matrix counts the pixels of
the whole split. Sizes are height x width. train.py takes from this file how to predict, score,
draw, read checkpoints, and read a command line.
"""
import argparse
import errno
import json
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import metrics
from data import CLASSES, IGNORE, TRAIN_TO_LABEL, Cityscapes, make_loader, normalize, read_image
from unet import SPECS, build_model

NAMES = [c.name for c in CLASSES]

# -------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(model, images, dtype=None, tta=False):
    """uint8 N x 3 x H x W on the model's device -> train ids, uint8 N x H x W.
    tta: average the class probabilities over three scales, each with and without a flip. Raises
    FloatingPointError if the output is not finite: argmax would silently give class 0."""
    def logits(x):
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return model(x)
    x = normalize(images)
    if tta:
        scores, (height, width) = 0, x.shape[-2:]
        for scale in 0.75, 1.0, 1.25:
            size = max(1, round(scale * height)), max(1, round(scale * width))
            scaled = F.interpolate(x, size, mode="bilinear", antialias=True)
            for y in logits(scaled), logits(scaled.flip(3)).flip(3):
                y = F.interpolate(y, (height, width), mode="bilinear")
                scores = scores + y.softmax(dim=1)
    else:
        scores = logits(x)
    if not scores.isfinite().all():
        raise FloatingPointError("the network's output is not finite; try --amp off or bf16")
    return scores.argmax(dim=1).byte()


def predictions(model, dataset, device, dtype=None, tta=False, workers=0):
    """Predict whole frames, one at a time, as they may differ in size. Yields image (uint8 3 x H x
    W), label (uint8 H x W), both on the CPU, and prediction on `device`."""
    model.eval()
    for images, labels in make_loader(dataset, workers, device, batch_size=1):
        prediction = predict(model, images.to(device), dtype, tta)
        yield images[0], labels[0], prediction[0]


def predict_photo(model, photo, frame_size, device, dtype=None, tta=False):
    """RGB Pillow image of any size -> train ids (mode L) of that size, and the size predicted at.
    A photo with more pixels than a validation frame (frame_size: height, width) is reduced to that
    number, because the network was scored at that size. Its prediction is enlarged again."""
    zoom = min(1, math.sqrt(math.prod(frame_size) / math.prod(photo.size)))
    width = max(1, round(zoom * photo.width))
    height = max(1, round(zoom * photo.height))
    pixels = np.array(photo.resize((width, height), Image.BILINEAR))    # averages if it reduces
    images = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    ids = predict(model, images.to(device), dtype, tta)[0].cpu().numpy()
    return Image.fromarray(ids).resize(photo.size, Image.NEAREST), (height, width)


def progress(items, describe):
    """Yield the items, and print every 30 seconds how far the loop is: describe(number) -> text."""
    printed_at = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item                                  # the body of the loop runs here
        if time.monotonic() - printed_at > 30:
            print(describe(number), flush=True)
            printed_at = time.monotonic()


# ------------------------------------------------------------------------------- checkpoints

def find_checkpoint(path, names=("best.pt", "last.pt")):
    """The path of a checkpoint; in the folder of a run, the first of `names`. FileNotFoundError."""
    path = Path(path)
    for file in path, *[path / name for name in names]:
        if file.is_file():
            return file
    folder = path if path.is_dir() else path.parent
    found = ", ".join(sorted(file.name for file in folder.glob("*.pt")))
    raise FileNotFoundError(f"{path}: no such file, and no folder with {' or '.join(names)}, which "
                            f"train.py writes; {folder} has {found or 'no .pt files'}")


def load_checkpoint(path):
    """Read a best.pt or last.pt -> dict: "model", the weights; "settings", the options of the
    training; "epoch", "frame_size" (height, width), and more, see `save` in train.py. Only
    tensors and plain Python values are read: a file cannot run code. Raises OSError, ValueError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        weights, name = saved["model"], str(saved["settings"]["model"])
    except OSError:
        raise
    except Exception as error:                      # torch.load raises errors of many kinds
        raise ValueError(f"{path}: not a complete checkpoint of train.py, or a file that tries to "
                         f"run code ({type(error).__name__})") from error
    missing = {"epoch", "frame_size"} - saved.keys()
    missing |= {"loss", "copyblob", "amp", "data"} - saved["settings"].keys()
    if missing or name not in SPECS or not isinstance(weights, dict):
        raise ValueError(f"{path}: incomplete, or its model {name} is not one of SPECS in unet.py")
    return saved


def load_weights(model, saved, path, new_head=False):
    """Load the weights of a checkpoint into a network that `build_model` built.
    new_head: if the checkpoint has another number of classes, the network keeps its own last layer,
    and one line says so. Raises ValueError if the weights do not fit."""
    weights, own = dict(saved["model"]), model.state_dict()
    weight, bias = list(own)[-2:]                   # names of the last layer: a row for each class
    classes = len(weights.get(bias, []))
    if new_head and bias in weights and classes != len(own[bias]):
        weights[weight], weights[bias] = own[weight], own[bias]
        print(f"{path}: has {classes} classes instead of {len(CLASSES)}, so the last layer starts "
              "from random weights", flush=True)
    try:
        model.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: its weights, of {saved['settings']['model']} with {classes} "
                         f"classes, do not fit this network with {len(CLASSES)} classes; use the "
                         "code and the --model of its training") from error


def load_model(path, device):
    """Rebuild a network -> the dict of load_checkpoint, with the network as "model", and "path"."""
    path = find_checkpoint(path)
    saved = load_checkpoint(path)
    model = build_model(saved["settings"]["model"], len(CLASSES))
    load_weights(model, saved, path)
    model.to(device, memory_format=torch.channels_last)
    return {**saved, "path": path, "model": model}


# -------------------------------------------------------------------------- scores and tables

def summarize(matrix):
    """All scores of a confusion matrix (int64 C x C) as plain Python values; None for NaN."""
    def plain(score):
        return None if score.isnan() else score.item()
    iou, dice = metrics.iou(matrix), metrics.dice(matrix)
    largest, partner = metrics.confusion_shares(matrix).nan_to_num().max(dim=1)
    result = {"pixel_accuracy": plain(metrics.pixel_accuracy(matrix))}
    result["miou"] = plain(iou.nanmean())
    result["mean_dice"] = plain(dice.nanmean())
    result["classes_scored"] = int((~iou.isnan()).sum())
    result["confusion_matrix"] = matrix.tolist()
    result["classes"] = {}
    for i, name in enumerate(NAMES):
        confused = None
        if largest[i] > 0:
            confused = {"with": NAMES[partner[i]], "share_of_union": largest[i].item()}
        pixels = matrix[i].sum().item()
        result["classes"][name] = {"iou": plain(iou[i]), "dice": plain(dice[i]),
                                   "pixels": pixels, "most_confused": confused}
    return result


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
        scores = f"{format_score(c['iou'])}  {format_score(c['dice'])}"
        lines.append(f"{name:14s} {scores}  {c['pixels'] / total:6.2%}  {confused}")
    name = f"mean of {result['classes_scored']}"
    scores = f"{format_score(result['miou'])}  {format_score(result['mean_dice'])}"
    lines.append(f"{name:14s} {scores}")
    return "\n".join([*lines, f"pixel accuracy {format_score(result['pixel_accuracy'])}"])


def comparison(names, results):
    """One column of scores for each checkpoint, as text."""
    width, lines = 2 + max(5, *map(len, names)), []
    def add_line(title, texts):
        lines.append(title.ljust(18) + "".join(text.rjust(width) for text in texts))
    add_line("", names)
    for name in NAMES:
        add_line(f"IoU {name}", [format_score(r["classes"][name]["iou"]) for r in results])
    for key, title in (("miou", "mIoU"), ("mean_dice", "Dice"), ("pixel_accuracy", "accuracy")):
        add_line(title, [format_score(r[key]) for r in results])
    add_line("classes in means", [str(r["classes_scored"]) for r in results])
    return "\n".join(lines)


def predicted_shares(pixels):
    """Text: the predicted classes by their share of the pixels (int C), largest first."""
    shares = pixels / max(1, pixels.sum())
    order = np.argsort(-shares)
    text = ", ".join(f"{NAMES[i]} {shares[i]:.1%}" for i in order if shares[i] > 0)
    if shares.max() > 0.95:
        text += "\nWARNING: nearly all pixels have one class; are the pictures as in training?"
    return f"predicted: {text}"


# ---------------------------------------------------------------------------------- pictures

PALETTE = np.zeros((256, 3), np.uint8)              # train id -> color; 255 is black
PALETTE[:len(CLASSES)] = [c.color for c in CLASSES]
ERROR_COLOR = (0, 255, 255)                         # no class of Cityscapes has it
TILE = 480                                          # width of a picture in a sheet, in pixels


def sheet(width, height):
    """A white RGB picture, and the pen that draws on it."""
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.font = ImageFont.load_default(15)
    return picture, pen


def legend(width):
    """A picture with the name of each color, `width` pixels wide."""
    entries = [(c.name, c.color) for c in CLASSES]
    entries += [("ignored", (0, 0, 0)), ("error", ERROR_COLOR)]
    per_line = max(1, width // 120)
    picture, pen = sheet(width, 28 * math.ceil(len(entries) / per_line))
    for i, (name, color) in enumerate(entries):
        x = 6 + 120 * (i % per_line)
        y = 4 + 28 * (i // per_line)
        pen.rectangle((x, y, x + 16, y + 16), color)
        pen.text((x + 22, y), name, "black")
    return picture


def picture_grid(rows):
    """Draw rows of (title, uint8 H x W x 3) pairs, and the colors of the classes below."""
    height, width = rows[0][0][1].shape[:2]
    tile_height = max(1, round(TILE * height / width))
    row_height = tile_height + 28                   # with a title
    colors = legend(TILE * max(len(row) for row in rows))
    picture, pen = sheet(colors.width, len(rows) * row_height + colors.height)
    for i, row in enumerate(rows):
        for j, (title, pixels) in enumerate(row):
            x, y = j * TILE, i * row_height
            pen.text((x + 4, y + 4), title, "black")
            method = Image.BILINEAR if pixels.shape[1] > TILE else Image.NEAREST
            tile = Image.fromarray(pixels).resize((TILE - 4, tile_height), method)
            picture.paste(tile, (x + 2, y + 26))
    picture.paste(colors, (0, len(rows) * row_height))
    return picture


def panel(image, label, prediction, title="prediction"):
    """uint8 H x W x 3, H x W, H x W -> a row of `picture_grid`, of two pictures without a truth."""
    row = [("image", image), (title, PALETTE[prediction])]
    if (label != IGNORE).any():
        errors = image // 3                         # darkened
        errors[label != prediction] = ERROR_COLOR
        errors[label == IGNORE] = 0
        row.insert(1, ("truth", PALETTE[label]))
        row.append(("errors", errors))
    return row


def confusion_picture(matrix, title):
    """Draw a confusion matrix (int64 C x C): each row in percent of its class."""
    cell, left, top = 44, 120, 160
    side = cell * len(NAMES)
    picture, pen = sheet(left + side + 10, top + side + 10)
    pen.text((6, 6), f"{title}\nrow: truth, column: prediction, % of the row", "black")
    names, names_pen = sheet(110, side)             # one below the other
    for i, name in enumerate(NAMES):
        names_pen.text((0, cell * i + 22), name, "black", anchor="lm")
    picture.paste(names, (6, top))
    picture.paste(names.rotate(90, expand=True), (left, top - 114))
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp_min(1)
    for i, row in enumerate(shares.tolist()):
        for j, share in enumerate(row):
            x, y = left + cell * j, top + cell * i
            light = round(255 - 255 * math.sqrt(share))             # white for 0
            pen.rectangle((x, y, x + 42, y + 42), (255, light, light))
            if share > 0.005:
                pen.text((x + 22, y + 22), f"{100 * share:.0f}", "black", anchor="mm")
    return picture


def curves_picture(log):
    """Draw training loss and validation mIoU over the epochs; log: the rows of log.csv (dicts)."""
    last = log[-1]["epoch"]
    width, height, bottom = 480, 300, 340           # of one plot, inside its axes
    picture, pen = sheet(2 * width + 180, bottom + 50)
    for left, key, title in (60, "loss", "training loss"), (620, "miou", "validation mIoU"):
        rows = [row for row in log if row[key] is not None]     # None: no validation
        top = math.ceil(max([1, *[row[key] for row in rows]]))
        def at(epoch, value):
            return left + width * epoch / last, bottom - height * value / top
        pen.text((left, 10), title, "black")
        pen.text((left + width, bottom + 24), "epoch", "black", anchor="ra")
        for value in np.linspace(0, top, 6):        # grid lines and their numbers
            pen.line([at(0, value), at(last, value)], "#dddddd")
            pen.text(at(0, value), f"{value:.1f} ", "black", anchor="rm")
        for epoch in sorted({0, round(last / 2), last}):
            pen.text(at(epoch, 0), str(epoch), "black", anchor="ma")
        points = [at(row["epoch"], row[key]) for row in rows]
        pen.line(points, "steelblue", 2)
        for x, y in points:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), "steelblue")
    return picture


# ------------------------------------------------------------- scoring the frames of a split

def report_unused(paths, say=print):
    """Say in one line how many files are not read, if there are any."""
    if paths:
        say(f"NOTE: {len(paths)} files or folders are not used, for example {paths[0]}")


def check_unique(names, folder):
    """Raise ValueError if results, which are named after their frames, overwrite each other."""
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{folder}: {count} pictures are named {name}, and their results would "
                         "overwrite each other; rename them")


def save_labels(train_ids, folder, frame):
    """Write a prediction (uint8 H x W) as label ids, with the name that the scorer expects."""
    Image.fromarray(TRAIN_TO_LABEL[train_ids]).save(folder / f"{frame}_pred_labelIds.png")


def score_split(ckpts, device, dtype, args):
    """Score the checkpoints on the frames of --split -> a list of the dicts in metrics.json."""
    args.data = args.data or ckpts[0]["settings"]["data"]
    dataset = Cityscapes(args.data, args.split)
    if args.labels_out:
        check_unique(dataset.names, args.data)
    print(f"{len(dataset)} {args.split} frames of {args.data}, evaluated at full size", flush=True)
    report_unused(dataset.unused)
    names, results, pictured = [], [], []
    for number, ckpt in enumerate(ckpts, start=1):
        path = ckpt["path"]
        names.append(f"{number}_{path.resolve().parent.name}_{path.stem}")
        out = args.out
        if len(ckpts) > 1:
            out = out / names[-1]
        result, rows = score_checkpoint(ckpt, dataset, out, device, dtype, args)
        results.append(result)
        pictured.append(rows)
    if len(ckpts) > 1:
        print("\n" + comparison(names, results))
        rows = []
        for rows_of_frame in zip(*pictured):        # the first of each checkpoint, then the second
            rows += rows_of_frame
        picture_grid(rows).save(args.out / "comparison.png")
    print(f"\nresults: {args.out}/")
    return results


def score_checkpoint(ckpt, dataset, out, device, dtype, args):
    """Evaluate a checkpoint, print its table, and write its files into the folder `out`.
    -> the dict of metrics.json, and the panels of the first two frames that are drawn"""
    settings = ckpt["settings"]
    print(f"\n{ckpt['path']}: {settings['model']}, loss {settings['loss']}, "
          f"copyblob {settings['copyblob']:g}, epoch {ckpt['epoch']}")
    out.mkdir(parents=True, exist_ok=True)
    count = min(args.panels, len(dataset))          # of the frames to draw, at equal distances:
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    rows = []
    matrix = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    pixels = np.zeros(len(CLASSES), np.int64)       # predicted as each class
    frames = predictions(ckpt["model"], dataset, device, dtype, args.tta, args.workers)
    frames = progress(frames, lambda number: f"frame {number}/{len(dataset)}")
    for index, (image, label, prediction) in enumerate(frames):
        prediction = prediction.cpu()
        matrix += metrics.confusion_matrix(prediction, label, len(CLASSES))
        image = image.permute(1, 2, 0).numpy()
        label, prediction = label.numpy(), prediction.numpy()
        pixels += np.bincount(prediction.ravel(), minlength=len(CLASSES))
        if args.labels_out:
            save_labels(prediction, args.labels_out, dataset.names[index])
        if index in chosen:
            title = "/".join(ckpt["path"].resolve().parts[-2:])         # folder and file
            row = panel(image, label, prediction, f"prediction of {title}")
            path = out / f"panel_{index}_{dataset.names[index]}.png"
            picture_grid([row]).save(path)
            if len(rows) < 2:                       # all of them would need much memory
                rows.append(row)
    result = {"checkpoint": str(ckpt["path"]), "epoch": ckpt["epoch"], "settings": settings}
    result.update(data=str(args.data), split=args.split, images=len(dataset), tta=args.tta)
    result.update(summarize(matrix))
    (out / "metrics.json").write_text(json.dumps(result, indent=1))
    title = f"{ckpt['path']} on {args.split}, mIoU {format_score(result['miou'])}"
    confusion_picture(matrix, title).save(out / "confusion.png")
    print(class_table(result))
    print(predicted_shares(pixels))
    return result, rows


# ------------------------------------------------------------------------------------ photos

PHOTO_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def find_photos(path):
    """The photos of --images, a file or a folder. One line reports the other files there."""
    files = [path]
    if not path.is_file():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    photos = [file for file in files if file.suffix.lower() in PHOTO_ENDINGS]
    if not photos:
        raise FileNotFoundError(f"{path}: no {' '.join(PHOTO_ENDINGS)} files there")
    report_unused(sorted(set(files) - set(photos)))
    check_unique([photo.stem for photo in photos], path)
    return photos


def predict_photos(ckpt, device, dtype, args):
    """Write a color map and an overlay of each photo in --images.
    Raises OSError at the end if some could not be read or written."""
    photos, out = find_photos(args.images), args.out
    if photos[0].parent.resolve() in [out.resolve(), (args.labels_out or out).resolve()]:
        raise ValueError(f"{photos[0].parent}: holds the photos; choose another folder for results")
    out.mkdir(parents=True, exist_ok=True)
    legend(600).save(out / "legend.png")
    model = ckpt["model"].eval()
    pixels, failures = np.zeros(len(CLASSES), np.int64), 0
    for file in photos:
        try:
            photo = read_image(file)
            ids, size = predict_photo(model, photo, ckpt["frame_size"], device, dtype, args.tta)
            colors = Image.fromarray(PALETTE[np.asarray(ids)])
            colors.save(out / f"{file.stem}_color.png")
            Image.blend(photo, colors, 0.5).save(out / f"{file.stem}_overlay.png")
            if args.labels_out:
                save_labels(np.asarray(ids), args.labels_out, file.stem)
            pixels += ids.histogram()[:len(CLASSES)]
            print(f"{file}: {photo.height} x {photo.width}, predicted at {size[0]} x {size[1]}")
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:       # a full disk
                raise
            print(f"skipped {file}: {error}", file=sys.stderr)
            failures += 1
    if failures < len(photos):
        print(predicted_shares(pixels))
        print(f"results: {out}/*_color.png and *_overlay.png; legend.png names the colors")
    if failures > 0:
        raise OSError(f"{failures} of {len(photos)} photos failed, see above")


# -------------------------------------------------------------------------- the command line

def pick_device(name="auto"):
    """A torch.device by name; "auto" is the GPU if there is one (cuda, mps, ...), else cpu. "cuda"
    under torchrun is GPU LOCAL_RANK, this process's number on its machine. Raises ValueError."""
    if name == "auto":
        name = "cpu"
        if torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(device)           # else PyTorch also takes memory on GPU 0
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); try --device cpu, or under "
                         "torchrun as many processes as there are GPUs") from error
    return device


def pick_amp(name, device):
    """The dtype for autocast, which computes convolutions and matrix products in 16 bits; weights
    and their gradients stay float32. Raises ValueError.

        "bf16"    torch.bfloat16
        "fp16"    torch.float16, of a smaller range
        "off"     None: float32 (TF32 in a GPU's convolutions, PyTorch's default)
        "auto"    bf16 on CUDA GPUs that have it and on CPUs with matrix units for it (AMX),
                  fp16 on other CUDA GPUs, else off"""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not has_bf16:
        raise ValueError("--amp bf16: this GPU has no bfloat16; use --amp auto")
    if name == "auto":
        name = "off"
        if device.type == "cuda":
            name = "bf16" if has_bf16 else "fp16"
        elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):   # not in torch 2.6
            if torch.cpu.get_capabilities().get("amx_bf16"):
                name = "bf16"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def number_in(low, high, kind=float):
    """A type for argparse: numbers of a kind between `low` and `high`."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    convert.__name__ = kind.__name__                # in argparse's message: invalid int value
    return convert


def path_option(text):
    """A type for argparse: a path. The value of an unset shell variable, '', is an error."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))


def command_line(main):
    """Run main(). An error that the user can correct ends in one line and exit status 2.
    To see the traceback of such an error: python -X dev train.py ..."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        message = str(error).strip().split("\n")[-1]    # a worker's error has its traceback first
        message = re.sub(r"^\w+Error: ", "", message)
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def parse_args(argv=None):
    """The options of eval.py. Raises ValueError, or SystemExit (argparse)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", nargs="+", type=path_option, required=True, metavar="BEST_PT",
        help="one or more checkpoints of train.py, or the folders of their runs")
    add("--data", type=path_option, help="(default: that of the training, of the first checkpoint)")
    add("--split", default="val", help="train, val, test or another folder (default: val)")
    add("--out", type=path_option, default=Path("eval"), help="folder of results (default: eval)")
    add("--tta", action="store_true", help="average over scales and flips; takes 6 times as long")
    add("--images", type=path_option, help="a photo or a folder of photos, instead of a split")
    add("--labels-out", type=path_option, help="also write predictions as PNGs of label ids")
    add("--panels", type=number_in(1, 10**6, int), default=6, help="frames to draw (default: 6)")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the fastest)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"],
        help="precision; off is float32 (default: --amp of the training of the first checkpoint)")
    add("--workers", type=number_in(0, 1000, int), help="(default: up to 8; on a CPU 0)")
    args = parser.parse_args(argv)
    if (args.out / "last.pt").exists() or (args.out / "best.pt").exists():
        raise ValueError(f"--out {args.out} holds a run of train.py; choose another folder")
    if len(args.ckpt) > 1 and (args.images or args.labels_out):
        raise ValueError("--images and --labels-out need exactly one --ckpt")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError("torchrun would repeat the same work in each process; use python eval.py")
    return args


def main(argv=None):
    """Run one command line (default: sys.argv) -> a list of the dicts in metrics.json."""
    args = parse_args(argv)
    device = pick_device(args.device)
    ckpts = [load_model(path, device) for path in args.ckpt]
    for folder in args.out, args.labels_out:
        if folder and folder.exists() and any(folder.iterdir()):
            print(f"NOTE: {folder} is not empty; files of equal names are replaced")
    if args.labels_out:
        args.labels_out.mkdir(parents=True, exist_ok=True)
    dtype = pick_amp(args.amp or ckpts[0]["settings"]["amp"], device)
    if args.images:
        predict_photos(ckpts[0], device, dtype, args)
        return []
    return score_split(ckpts, device, dtype, args)


if __name__ == "__main__":
    command_line(main)
