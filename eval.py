"""Score a checkpoint, find its worst classes, and picture what it sees.

    python eval.py --ckpt best.pt                         # table, metrics.json, pictures in eval/
    python eval.py --ckpt ce/best.pt dice/best.pt         # several, side by side
    python eval.py --ckpt best.pt --tta                   # flipped and scaled copies, averaged
    python eval.py --ckpt best.pt --images FOLDER         # any pictures: colour maps, overlays
    python eval.py --ckpt best.pt --split test --labels-out DIR       # for the official scorer

Everything is scored at the label's own size, with one confusion matrix for the whole split.
"""
import argparse
import json
import os
import re
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import metrics
from data import (CLASSES, IGNORE, TRAIN_TO_LABEL, Cityscapes, leave_ctrl_c, normalize,
                  read_image)
from unet import build_model

NAMES = [c.name for c in CLASSES]
PALETTE = np.zeros((256, 3), np.uint8)              # colour of each train id; 255 is black
PALETTE[:len(CLASSES)] = [c.color for c in CLASSES]

# ------------------------------------------------------------------------- device and progress


def pick_device(name="auto"):
    """A torch.device by name; "auto" is cuda, else mps, else cpu."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); try cpu") from error
    return torch.device(name)


def pick_amp(name, device):
    """The autocast dtype, or None for float32: "auto" is bfloat16 where that is faster."""
    cpu, cuda = device.type == "cpu", device.type == "cuda"
    has_bf16 = cpu or cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":                              # a CPU gains on matrix units only (AMX)
        gains = torch.cpu.get_capabilities().get("amx_bf16") if cpu else has_bf16
        name = "bf16" if gains else "fp16" if cuda else "off"
    if name == "bf16" and not has_bf16:
        raise ValueError(f"--amp bf16: this {device.type} has no bfloat16; use --amp auto")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """The autocast context for `dtype`, which does nothing for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def within(low, high, kind=float):
    """A type for argparse: numbers of a kind from `low` to `high`."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    convert.__name__ = kind.__name__                # argparse names it for what is no number
    return convert


def progress(items, what):
    """Yield the items; where the output is a terminal, keep one live line that counts them."""
    start, live = time.time(), sys.stdout.isatty()
    for i, item in enumerate(items):
        yield item
        if live:
            rate = (i + 1) / (time.time() - start)
            print(f"\r{what} {i + 1}/{len(items)}  {rate:.1f}/s ", end="", flush=True)
    if live:
        print("\r\033[K", end="", flush=True)


# ------------------------------------------------------------------------------- the score


@torch.no_grad()
def predict(model, images, dtype=None, tta=False):
    """uint8 N x 3 x H x W on the model's device -> train ids, uint8 N x H x W.

    `tta` averages the class probabilities of three scales, each as it is and flipped.
    """
    x = normalize(images).contiguous(memory_format=torch.channels_last)
    with autocast(x.device, dtype):
        if not tta:
            return model(x).argmax(1).byte()
        total = 0
        for scale in (0.75, 1.0, 1.25):
            size = [max(1, round(scale * s)) for s in x.shape[-2:]]
            scaled = F.interpolate(x, size, mode="bilinear", antialias=True)
            for flip in ((), (3,)):
                logits = model(scaled.flip(flip)).float().flip(flip)
                logits = F.interpolate(logits, x.shape[-2:], mode="bilinear")
                total = total + logits.softmax(1)
    return total.argmax(1).byte()


def evaluate(model, dataset, device, dtype=None, tta=False, workers=0, visit=None):
    """Score a model on whole frames -> confusion matrix, int64 19 x 19 on the CPU.

    Frames go one by one, so they may differ in size, each at the full size of its label.
    `visit(i, image, label, prediction)` is called with each frame's uint8 tensors.
    """
    model.eval()
    matrix = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64, device=device)
    loader = torch.utils.data.DataLoader(dataset, 1, num_workers=workers,
                                         worker_init_fn=leave_ctrl_c)
    for i, (image, label) in enumerate(progress(loader, "evaluating")):
        prediction = predict(model, image.to(device), dtype, tta)
        matrix += metrics.confusion_matrix(prediction, label.to(device), len(CLASSES))
        if visit:
            visit(i, image[0], label[0], prediction[0].cpu())
    return matrix.cpu()


def load_checkpoint(path):
    """Read a best.pt or last.pt -> dict. It is read as tensors and plain values: no code can run.

    Raises FileNotFoundError, or ValueError for any other file.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {**saved, "model": saved["model"], "settings": dict(saved["settings"])}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such checkpoint; train.py writes best.pt")
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint of train.py, or not whole "
                         f"({type(error).__name__}); a file that could run code is refused, "
                         "too") from error


Checkpoint = namedtuple("Checkpoint", "path name model settings")


def rebuild(path, device):
    """The model that train.py saved to `path`, and its settings. Raises as `load_checkpoint`."""
    saved = load_checkpoint(path)
    settings = {**saved["settings"], "epoch": saved.get("epoch"), "val_miou": saved.get("miou")}
    try:
        model = build_model(settings["model"], len(CLASSES))
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: its weights are not those of {settings.get('model')} with "
                         f"{len(CLASSES)} classes, as unet.py builds it") from error
    model.to(device, memory_format=torch.channels_last).eval()
    return Checkpoint(str(path), Path(path).resolve().parent.name, model, settings)


# ------------------------------------------------------------------------------- in numbers


def summarize(matrix):
    """Every score of one confusion matrix as plain values; a class that is nowhere has None."""
    def plain(x):
        return None if x.isnan() else x.item()

    iou, dice, classes = metrics.iou(matrix), metrics.dice(matrix), {}
    most, other = metrics.confusions(matrix).nan_to_num().max(1)
    for c, name in enumerate(NAMES):
        confused = {"with": NAMES[other[c]], "share_of_union": most[c].item()}
        classes[name] = {"iou": plain(iou[c]), "dice": plain(dice[c]),
                         "pixels": matrix[c].sum().item(),
                         "most_confused": confused if most[c] > 0 else None}
    return {"pixel_accuracy": plain(metrics.pixel_accuracy(matrix)), "miou": plain(iou.nanmean()),
            "mean_dice": plain(dice.nanmean()), "classes_scored": int((~iou.isnan()).sum()),
            "classes": classes, "confusion_matrix": matrix.tolist()}


def number(x):
    """A score for print: three digits, or n/a."""
    return "  n/a" if x is None else f"{x:.3f}"


def table(result):
    """The classes of `summarize`, worst IoU first, and the means, as lines of text."""
    total = max(1, sum(c["pixels"] for c in result["classes"].values()))
    rows = sorted(result["classes"].items(),
                  key=lambda row: (row[1]["iou"] is None, row[1]["iou"] or 0))
    lines = ["worst first      IoU   Dice  pixels  most confused with"]
    for name, c in rows:
        other = c["most_confused"]
        text = f"{other['with']} ({other['share_of_union']:.0%} of its union)" if other else "-"
        lines.append(f"{name:14s} {number(c['iou'])}  {number(c['dice'])}  "
                     f"{c['pixels'] / total:6.2%}  {text}")
    scored = f"mean of {result['classes_scored']} classes"
    lines.append(f"{scored:14s} {number(result['miou'])}  {number(result['mean_dice'])}")
    return "\n".join(lines + [f"pixel accuracy {number(result['pixel_accuracy'])}"])


def comparison(names, results):
    """IoU of each class in a column for each checkpoint, the best marked, as lines of text."""
    rows = [(c, [r["classes"][c]["iou"] for r in results]) for c in NAMES]
    rows += [(key, [r[key] for r in results]) for key in ("miou", "mean_dice", "pixel_accuracy")]
    width = max(8, *map(len, names)) + 2
    lines = [f"{'IoU':14s}" + "".join(f"{n:>{width}s}" for n in names)]
    for name, values in rows:
        best = max((v for v in values if v is not None), default=None)
        cells = (number(v) + ("*" if v and v == best else " ") for v in values)
        lines.append(f"{name:14s}" + "".join(f"{c:>{width}s}" for c in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------ in pictures

TILE, FONT = 512, ImageFont.load_default(15)        # width of one picture in a panel, in pixels
WRONG = (255, 40, 40)


def panel(rows, titles):
    """Rows of equal pictures, uint8 H x W x 3, below their titles and above a legend."""
    height = max(1, round(TILE * rows[0][0].shape[0] / rows[0][0].shape[1]))
    columns, legend = len(rows[0]), [(c.name, c.color) for c in CLASSES] + [("ignored", "black")]
    if "errors" in titles:
        legend.append(("wrong", WRONG))
    key = 28 * -(-len(legend) // (4 * columns))         # height of the legend, 4 to a column
    sheet = Image.new("RGB", (TILE * columns, 26 + height * len(rows) + key), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((x * TILE + 6, 4), title, "black", FONT)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sharp = Image.NEAREST if picture.shape[1] < TILE else Image.BILINEAR
            tile = Image.fromarray(picture).resize((TILE - 4, height - 4), sharp)
            sheet.paste(tile, (x * TILE + 2, 26 + y * height))
    for i, (name, color) in enumerate(legend):
        x, y = i % (4 * columns) * TILE // 4 + 6, sheet.height - key + 28 * (i // (4 * columns)) + 4
        draw.rectangle((x, y, x + 18, y + 18), color)
        draw.text((x + 24, y), name, "black", FONT)
    return sheet


def truth_row(image, label, prediction):
    """image | truth | prediction | errors: right pixels dark, wrong ones red, ignored black."""
    image, label, prediction = image.permute(1, 2, 0).numpy(), label.numpy(), prediction.numpy()
    errors = image // 3
    errors[(label != prediction) & (label != IGNORE)] = WRONG
    errors[label == IGNORE] = 0
    return [image, PALETTE[label], PALETTE[prediction], errors]


def confusion_picture(matrix, title):
    """The matrix, each row in percent of its class, darker for more; absent classes blank."""
    cell, left, top = 44, 120, 152
    share = (matrix.double() / matrix.sum(1, keepdim=True)).numpy()
    sheet = Image.new("RGB", (left + cell * len(NAMES) + 10, top + cell * len(NAMES) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 6), title + "\nrows: truth, columns: prediction, % of the row", "black", FONT)
    for i, name in enumerate(NAMES):
        draw.text((left - 8, top + cell * i + cell // 2), name, "black", FONT, anchor="rm")
        upright = Image.new("RGB", (100, 20), "white")
        ImageDraw.Draw(upright).text((0, 10), name, "black", FONT, anchor="lm")
        sheet.paste(upright.rotate(90, expand=True), (left + cell * i + 12, top - 104))
        for j, p in enumerate(share[i]):
            if np.isnan(p):
                continue
            hue = np.array((20, 110, 60) if i == j else (190, 30, 30))
            color = tuple(int(v) for v in 255 - (255 - hue) * p**0.5)
            x, y = left + cell * j, top + cell * i
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), color)
            if p >= 0.005:
                draw.text((x + cell // 2 - 1, y + cell // 2), f"{100 * p:.0f}",
                          "white" if p > 0.3 else "black", FONT, anchor="mm")
    return sheet


# ---------------------------------------------------------------------------------- the run


def save_labels(ids, folder, frame):
    """Write train ids as label ids under the name that the official scorer looks for."""
    Image.fromarray(TRAIN_TO_LABEL[ids]).save(folder / f"{frame}_pred_labelIds.png")


def score(ckpt, dataset, out, args):
    """Evaluate one checkpoint into the folder `out` -> (summary, the frames that are pictured)."""
    chosen = set(np.linspace(0, len(dataset) - 1, min(args.panels, len(dataset))).astype(int))
    pictured, pixels = {}, np.zeros(len(CLASSES), np.int64)
    out.mkdir(parents=True, exist_ok=True)

    def visit(i, image, label, prediction):
        if args.split == "test":
            pixels[:] += np.bincount(prediction.flatten(), minlength=len(CLASSES))
        if args.labels_out:
            save_labels(prediction.numpy(), args.labels_out, dataset.frames[i])
        if i in chosen:
            row = truth_row(image, label, prediction)
            titles = ["image", "truth", "prediction", "errors"]
            every = 2 if args.split == "test" else 1            # no truth and no errors there
            panel([row[::every]], titles[::every]).save(out / f"panel_{dataset.frames[i]}.png")
            if len(args.ckpt) > 1:
                pictured[i] = row

    matrix = evaluate(ckpt.model, dataset, args.device, args.amp, args.tta, args.workers, visit)
    result = {"checkpoint": ckpt.path, "settings": ckpt.settings, "split": args.split,
              "data": str(args.data), "images": len(dataset), "tta": args.tta, **summarize(matrix)}
    if args.split == "test":
        print("the test split has no labels, so there is no score; predicted classes:")
        print(predicted_classes(pixels))
        return result, pictured
    (out / "metrics.json").write_text(json.dumps(result, indent=1))
    title = f"{ckpt.path} on {args.split}, mIoU {number(result['miou'])}"
    confusion_picture(matrix, title).save(out / "confusion.png")
    print(table(result))
    pixels = matrix.sum(0).numpy()
    if pixels.max() > 0.95 * pixels.sum():
        print(predicted_classes(pixels))
    return result, pictured


def predicted_classes(pixels):
    """The share of each predicted class, largest first, and a warning if there is but one."""
    share = pixels / max(1, pixels.sum())
    text = ", ".join(f"{NAMES[c]} {share[c]:.1%}" for c in np.argsort(-share) if share[c] > 0)
    if share.max() > 0.95:
        text += "\nWARNING: nearly every pixel is one class; do image and training data match?"
    return text


def picture_folder(ckpt, args):
    """Colour map and overlay of every picture in --images, and what they show."""
    kinds = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"
    files = sorted(f for f in args.images.iterdir() if f.suffix.lower() in kinds)
    if not files:
        raise FileNotFoundError(f"{args.images}: holds no {', '.join(kinds)}")
    named = {file.stem: file for file in files}
    for file in files:
        if named[file.stem] != file:
            raise ValueError(f"{file}: would be pictured under the name of "
                             f"{named[file.stem].name}; rename it")
    args.out.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(len(CLASSES), np.int64)
    for file in progress(files, "predicting"):
        image = np.array(read_image(file))
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].to(args.device)
        ids = predict(ckpt.model, tensor, args.amp, args.tta)[0].cpu().numpy()
        pixels += np.bincount(ids.ravel(), minlength=len(CLASSES))
        Image.fromarray(PALETTE[ids]).save(args.out / f"{file.stem}_color.png")
        Image.fromarray(image // 2 + PALETTE[ids] // 2).save(args.out / f"{file.stem}_overlay.png")
        if args.labels_out:
            save_labels(ids, args.labels_out, file.stem)
    print(f"{len(files)} pictures -> {args.out}/*_color.png, *_overlay.png")
    print(predicted_classes(pixels))


def parse_args(argv=None):
    """The command line of eval.py; see the top of this file."""
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", nargs="+", required=True, help="one or more best.pt")
    p.add_argument("--data", type=Path, help="Cityscapes' root (default: the checkpoint's)")
    p.add_argument("--split", default="val", help="train, val or test (default val)")
    p.add_argument("--out", type=Path, default=Path("eval"), help="folder to write (default eval)")
    p.add_argument("--tta", action="store_true", help="average flipped and scaled copies")
    p.add_argument("--images", type=Path, help="a folder of any pictures, without labels")
    p.add_argument("--labels-out", type=Path, help="folder for labelIds PNGs at full size")
    p.add_argument("--panels", type=within(1, 10**6, int), default=6,
                   help="frames to picture (default 6)")
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best at hand)")
    p.add_argument("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"])
    p.add_argument("--workers", type=within(0, 1000, int), default=min(4, os.cpu_count() or 1))
    args = p.parse_args(argv)
    args.device = pick_device(args.device)
    args.amp = pick_amp(args.amp, args.device)
    if len(args.ckpt) > 1 and (args.images or args.labels_out or args.split == "test"):
        p.error("--images, --labels-out and the test split take one --ckpt")
    return args


def main(argv=None):
    """Run one command line, sys.argv by default -> the summaries that metrics.json holds."""
    args = parse_args(argv)
    if args.labels_out:
        args.labels_out.mkdir(parents=True, exist_ok=True)
    ckpts = [rebuild(path, args.device) for path in args.ckpt]
    if len({c.name for c in ckpts}) < len(ckpts):
        ckpts = [c._replace(name=f"{i + 1}_{c.name}") for i, c in enumerate(ckpts)]
    if args.images:
        picture_folder(ckpts[0], args)
        return []
    args.data = args.data or Path(ckpts[0].settings["data"])
    dataset = Cityscapes(args.data, args.split)
    print(f"{len(dataset)} {args.split} frames of {args.data}, scored at full size", flush=True)
    scored = []
    for ckpt in ckpts:
        print(f"\n{ckpt.path}: {ckpt.settings['model']}, loss {ckpt.settings['loss']}, "
              f"epoch {ckpt.settings['epoch']}")
        out = args.out / ckpt.name if len(ckpts) > 1 else args.out
        scored.append(score(ckpt, dataset, out, args))
    results, pictures = zip(*scored)
    if len(ckpts) > 1:
        print("\n" + comparison([c.name for c in ckpts], results))
        rows = [[*pictures[0][i][:2], *(p[i][2] for p in pictures)] for i in sorted(pictures[0])]
        titles = [f"{c.name}: mIoU {number(r['miou'])}" for c, r in zip(ckpts, results)]
        panel(rows, ["image", "truth", *titles]).save(args.out / "comparison.png")
    print(f"\npictures{'' if args.split == 'test' else ' and metrics.json'}: {args.out}/")
    return results


def command_line(main):
    """Run main(). What the user can mend ends in one line and exit status 2, not in a traceback.

    To see the traceback none the less: python -X dev train.py ...
    """
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        line = str(error).strip().split("\n")[-1]   # a DataLoader worker's ends its traceback
        line = re.sub(r"^\w+Error: ", "", line)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(of|allocate) memory", str(error)):
            raise
        line = "out of memory: lower --workers, and for training --batch, --crop or --model, too"
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    command_line(main)
