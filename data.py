"""Cityscapes as it comes from the archives, training augmentation, and generated street scenes.

Cityscapes (Cordts et al. 2016, arXiv 1604.01685) keeps each frame twice, below one root folder:

    leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png         RGB, 2048 x 1024
    gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png          one label id a pixel

A label id (0 ... 33) names what the annotator saw. 19 of them are evaluated and numbered anew as
train ids 0 ... 18, which is what networks predict; all others become 255, which losses and
metrics ignore. The mapping is a 256-entry table, applied when a label is read: nothing to convert.

Images are uint8 RGB, labels uint8 train ids: H x W (x 3) arrays in here, tensors (3 x) H x W out.
All random numbers come from (seed, epoch, index), so neither workers nor GPUs nor a resumed run
change a sample.
"""
import hashlib
import math
import os
import signal
import warnings
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

warnings.simplefilter("error", Image.DecompressionBombWarning)

# ---------------------------------------------------------------------------------- labels

IGNORE = 255
Class = namedtuple("Class", "name label_id color")
CLASSES = [                                         # in the order of their train ids
    Class("road", 7, (128, 64, 128)), Class("sidewalk", 8, (244, 35, 232)),
    Class("building", 11, (70, 70, 70)), Class("wall", 12, (102, 102, 156)),
    Class("fence", 13, (190, 153, 153)), Class("pole", 17, (153, 153, 153)),
    Class("traffic light", 19, (250, 170, 30)), Class("traffic sign", 20, (220, 220, 0)),
    Class("vegetation", 21, (107, 142, 35)), Class("terrain", 22, (152, 251, 152)),
    Class("sky", 23, (70, 130, 180)), Class("person", 24, (220, 20, 60)),
    Class("rider", 25, (255, 0, 0)), Class("car", 26, (0, 0, 142)),
    Class("truck", 27, (0, 0, 70)), Class("bus", 28, (0, 60, 100)),
    Class("train", 31, (0, 80, 100)), Class("motorcycle", 32, (0, 0, 230)),
    Class("bicycle", 33, (119, 11, 32)),
]
TRAIN_TO_LABEL = np.full(256, IGNORE, np.uint8)
TRAIN_TO_LABEL[:len(CLASSES)] = [c.label_id for c in CLASSES]
LABEL_TO_TRAIN = np.full(256, IGNORE, np.uint8)
LABEL_TO_TRAIN[TRAIN_TO_LABEL[:len(CLASSES)]] = range(len(CLASSES))
TRAIN_ID = {c.name: i for i, c in enumerate(CLASSES)}

MEAN = (0.485, 0.456, 0.406)                        # of ImageNet's R, G, B, as shares of 255
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = tuple(round(255 * m) for m in MEAN)    # pads images: it normalises to about 0


def normalize(images):
    """uint8 N x 3 x H x W -> float32 of mean 0 and deviation 1 (ImageNet's), on its own device."""
    mean = 255 * torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = 255 * torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() - mean) / std


def read_picture(path, formats=None):
    """Any file that Pillow reads -> Pillow image. Raises OSError naming a file that is broken."""
    try:
        picture = Image.open(path, formats=formats)
        picture.load()
        return picture
    except Exception as error:                      # Pillow raises about any kind
        raise OSError(f"{path}: cannot be read as a picture ({error}); copy it anew") from error


def read_image(path):
    """A picture of 8 or 16 bits (grey, palette, alpha too) -> RGB Pillow image, upright."""
    picture = read_picture(path)
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):                # 16 bits, of which the upper 8 are kept
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def read_label(path):
    """A PNG of label ids -> (Pillow image of label ids, int 256: pixels of each).

    Raises ValueError for any other picture.
    """
    label = read_picture(path, formats=["PNG"])
    if label.mode != "L":
        raise ValueError(f"{path}: holds {label.mode} pixels, not 8-bit label ids; "
                         "use the *_gtFine_labelIds.png files")
    ids = np.asarray(label).ravel()                 # counted by runs of one id, which are long
    ends = np.append(np.flatnonzero(ids[1:] != ids[:-1]), ids.size - 1)
    counts = np.bincount(ids[ends], np.diff(ends, prepend=-1), 256).astype(int)
    wrong = 34 + np.flatnonzero(counts[34:255])     # 255 is label id -1
    if len(wrong):
        raise ValueError(f"{path}: holds the values {wrong[:5].tolist()}, which no Cityscapes "
                         "label has (label ids are 0 ... 33)")
    return label, counts


# --------------------------------------------------------------------------------- dataset


class Cityscapes(torch.utils.data.Dataset):
    """The frames of one split -> (image uint8 3 x H x W RGB, label uint8 H x W train ids).

    crop=None gives the whole frame as it is; crop=(h, w) a random augmented crop of that size,
    preceded by CopyBlob with probability `copyblob`. Item k is frame k % len in epoch k // len.
    The split "test" has no labels: there all are 255. Raises FileNotFoundError, saying what is
    missing, where a folder is not laid out as above.
    """

    def __init__(self, root, split, crop=None, copyblob=0.0, seed=0, scale=(0.5, 2.0)):
        self.split, self.crop, self.copyblob, self.seed, self.scale = (
            split, crop, copyblob, seed, scale)
        self.root = root = Path(root).expanduser()
        images, labels = (
            {f"{f.parent.name}/{f.name.removesuffix(end)}": f
             for f in sorted((root / kind / split).glob(f"*/*{end}"))}
            for kind, end in (("leftImg8bit", "_leftImg8bit.png"),
                              ("gtFine", "_gtFine_labelIds.png")))
        if not images:
            raise FileNotFoundError(
                f"no frames at {root}/leftImg8bit/{split}/<city>/*_leftImg8bit.png, their labels "
                f"beside them at {root}/gtFine/{split}/<city>/*_gtFine_labelIds.png: name that "
                "root with --data or $CITYSCAPES_DATASET; it is what leftImg8bit_trainvaltest.zip "
                "and gtFine_trainvaltest.zip (cityscapes-dataset.com) unpack to")
        odd = sorted(images.keys() ^ labels.keys()) if split != "test" else []
        if odd:
            raise FileNotFoundError(
                f"{root}: {len(images.keys() - labels.keys())} of {len(images)} {split} frames "
                f"have no label, {len(labels.keys() - images.keys())} labels no frame: "
                f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}; unpack both archives anew")
        self.images = list(images.values())
        self.labels = [labels.get(key) for key in images]
        self.frames = [key.split("/")[1] for key in images]
        self.blobs = collect_blobs(self) if copyblob else {}

    def __len__(self):
        return len(self.images)

    def __iter__(self):                             # one epoch; items go on for ever
        return (self[i] for i in range(len(self)))

    def __getitem__(self, k):
        epoch, index = divmod(k, len(self))
        image, label = self.read(index)
        if self.crop:
            rng = np.random.default_rng((self.seed, epoch, index))
            if rng.random() < self.copyblob and self.blobs:
                blobs = list(self.blobs.values())[rng.integers(len(self.blobs))]
                image, label = copy_blob(image, label, blobs[rng.integers(len(blobs))], rng)
            image, label = augment(image, label, self.crop, rng, self.scale)
        label = LABEL_TO_TRAIN.take(np.asarray(label))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(label)

    def read(self, index):
        """Frame `index` as two Pillow images: RGB, and label ids."""
        image = read_image(self.images[index])
        if self.split == "test":
            return image, Image.new("L", image.size)            # label id 0, unlabeled
        label, _ = read_label(self.labels[index])
        if image.size != label.size:
            raise ValueError(f"{self.labels[index]}: is {label.size}, its frame {image.size}; "
                             "they must be of one size")
        return image, label


def leave_ctrl_c(*worker):
    """Let a worker process ignore Ctrl-C, on which its parent acts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def augment(image, label, crop, rng, scale=(0.5, 2.0)):
    """Scale, crop, flip and jitter: two Pillow images -> two of crop=(h, w) pixels.

    Scale and crop are one operation: a box of the frame is resized straight to the crop, the
    label by nearest. A box that reaches beyond the frame is padded, with the mean colour and 255.
    """
    (h, w), (width, height) = crop, image.size
    zoom = math.exp(rng.uniform(*np.log(scale)))    # as often enlarged as shrunk
    spare_x, spare_y = width - w / zoom, height - h / zoom      # negative: the box is larger
    x = rng.uniform(min(0, spare_x), max(0, spare_x))
    y = rng.uniform(min(0, spare_y), max(0, spare_y))
    box = max(0, x), max(0, y), min(width, x + w / zoom), min(height, y + h / zoom)
    left, top, right, bottom = (round((b - o) * zoom) for b, o in zip(box, (x, y, x, y)))
    size = max(1, right - left), max(1, bottom - top)
    image = jitter(image.resize(size, Image.BILINEAR, box), rng)
    label = label.resize(size, Image.NEAREST, box)
    if size != (w, h):
        small_image, small_label = image, label
        image, label = Image.new("RGB", (w, h), MEAN_COLOR), Image.new("L", (w, h), IGNORE)
        image.paste(small_image, (left, top))
        label.paste(small_label, (left, top))
    if rng.random() < 0.5:
        image, label = (i.transpose(Image.FLIP_LEFT_RIGHT) for i in (image, label))
    return image, label


def jitter(image, rng):
    """Brightness, contrast (about mid-grey) and saturation, each x 0.75 ... 1.25, as one matrix."""
    brightness, contrast, saturation = rng.uniform(0.75, 1.25, 3)
    grey = np.ones((3, 1)) * [0.299, 0.587, 0.114]              # three rows of luma weights
    matrix = np.empty((3, 4))
    matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey)
    matrix[:, 3] = brightness * (1 - contrast) * 128
    return image.convert("RGB", tuple(matrix.ravel()))


# -------------------------------------------------------------------------------- CopyBlob

# The classes that Cityscapes holds little of and networks miss most, and what each stands on.
CARRIER = {"wall": "sidewalk", "fence": "sidewalk", "bus": "road", "train": "road"}
GROUND = 6, 7, 8, 9, 10, 22             # label ids: ground, road, sidewalk, parking, rails, terrain
HORIZON = 0.42                      # share of a frame's height above it, judged by eye
Blob = namedtuple("Blob", "name image mask foot")   # foot: (x, y) from mid-horizon, in pixels


def cut_blob(image, label, name, rng):
    """Cut a blob of the class `name` out of a frame -> Blob, or None where there is none.

    image: RGB Pillow image, label: Pillow image of label ids. The blob is what the class fills in
    one unbroken range of columns; larger ones are taken more often. It must stand in the open,
    with ground below it in 70 % of them: one whose foot is hidden would float where it is pasted.
    """
    ids = np.asarray(label)
    mask = ids == CLASSES[TRAIN_ID[name]].label_id
    feet = len(ids) - 1 - mask[::-1].argmax(0)                  # the lowest row in each column
    grounded = np.isin(np.append(ids, ids[-1:], 0)[feet + 1, np.arange(ids.shape[1])], GROUND)
    edges = np.diff(mask.any(0), prepend=False, append=False)   # True where a range starts, stops
    ranges = [(a, b) for a, b in np.flatnonzero(edges).reshape(-1, 2) if grounded[a:b].mean() > 0.7]
    if not ranges:
        return None
    sizes = [mask[:, a:b].sum() for a, b in ranges]             # [a, b): the columns of a blob
    left, right = ranges[rng.choice(len(ranges), p=np.array(sizes) / sum(sizes))]
    rows = np.flatnonzero(mask[:, left:right].any(1))
    box = int(left), int(rows[0]), int(right), int(rows[-1] + 1)
    foot = (left + right - image.width) / 2, max(1.0, box[3] - HORIZON * image.height)
    return Blob(name, image.crop(box), Image.fromarray(mask).crop(box), foot)


def copy_blob(image, label, blob, rng):
    """CopyBlob: paste a blob of a rare class onto the class that carries it (CARRIER).

    image: RGB Pillow image, label: Pillow image of label ids -> image, label. The blob's foot
    lands on a random pixel of the carrier, nearer or farther on the line through the vanishing
    point on which it stood, give or take half its width, so that its edges still recede there. It
    is resized as perspective asks, in proportion to the foot's distance below the horizon, to half
    or twice its size at most. What would lie outside of the frame is clipped, and what stands
    nearer stays in front. Returns the input where there is no place.
    After Copy-Paste (Ghiasi et al. 2020, arXiv 2012.07177), for classes instead of instances.
    """
    step = max(1, image.height // 128)              # every step-th pixel is enough to choose from
    carrier = CLASSES[TRAIN_ID[CARRIER[blob.name]]].label_id
    ys, xs = step * np.array(np.nonzero(np.asarray(label)[::step, ::step] == carrier))
    scales = (ys - HORIZON * image.height) / blob.foot[1]
    astray = np.abs(xs - image.width / 2 - scales * blob.foot[0]) / blob.image.width
    places = np.flatnonzero((scales > 0.5) & (scales < 2) & (astray < scales / 2))
    if not len(places):
        return image, label
    at = places[rng.integers(len(places))]
    size = [max(1, round(side * scales[at])) for side in blob.image.size]
    corner = int(xs[at] - size[0] // 2), int(ys[at] + 1 - size[1])
    mask = blob.mask.resize(size, Image.NEAREST)
    # A class that covers the row of the foot, unless it is ground, stands nearer in that column.
    behind = np.asarray(label.crop((*corner, corner[0] + size[0], corner[1] + size[1])))
    nearer = (behind == behind[-1]) & ~np.isin(behind[-1], GROUND)
    mask = Image.fromarray(np.asarray(mask) & ~nearer)
    image, label = image.copy(), label.copy()
    image.paste(blob.image.resize(size, Image.BILINEAR), corner, mask)
    label.paste(CLASSES[TRAIN_ID[blob.name]].label_id, corner, mask)
    return image, label


def collect_blobs(dataset, most=64):
    """Blobs of each rare class, one of each of up to `most` frames -> {name: [Blob, ...]}.

    They are cut once, from frames drawn at random by the dataset's seed, and kept in memory: to
    read a whole second frame for each blob would double the cost of a sample.
    """
    pixels, rng = class_pixels(dataset), np.random.default_rng((dataset.seed, 0, 0, 1))
    jobs = []
    for name in CARRIER:
        donors = rng.permutation(np.flatnonzero(pixels[:, TRAIN_ID[name]]))[:most]
        jobs += zip(donors, [name] * len(donors), rng.spawn(len(donors)))
    with ThreadPoolExecutor() as pool:
        cut = pool.map(lambda job: cut_blob(*dataset.read(job[0]), *job[1:]), jobs)
        blobs = list(filter(None, cut))             # without the frames that held none in the open
    return {name: found for name in CARRIER if (found := [b for b in blobs if b.name == name])}


# --------------------------------------------------------------------------- class weights


def class_pixels(dataset):
    """Pixels of each class in each label file of a Cityscapes split -> int64 frames x 19.

    Counted once and cached in its root, under a fingerprint of the files' names, sizes and times:
    when they change, it is counted anew. A root that cannot be written to is counted each time.
    """
    labels, root = dataset.labels, dataset.root
    stats = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in labels]
    fingerprint = hashlib.sha256(repr(stats).encode()).hexdigest()
    cache = root / f"class_pixels_{dataset.split}.npz"
    try:
        with np.load(cache) as saved:
            if str(saved["fingerprint"]) == fingerprint:
                return saved["pixels"]
    except (OSError, KeyError, ValueError, EOFError, BadZipFile):
        pass                                        # no cache, or a broken one: count
    print(f"counting the pixels of each class in {len(labels)} labels, once", flush=True)
    with ThreadPoolExecutor() as pool:              # Pillow decodes outside of Python's lock
        counts = [counts for _, counts in pool.map(read_label, labels)]
    pixels = np.array(counts)[:, TRAIN_TO_LABEL[:len(CLASSES)]]
    part = cache.with_suffix(f".{os.getpid()}.npz")
    with suppress(OSError):                         # a root that is read-only, a full disk
        np.savez(part, fingerprint=fingerprint, pixels=pixels)
        os.replace(part, cache)
    with suppress(OSError):
        part.unlink()
    return pixels


def class_weights(pixels, scheme):
    """Class weights from `class_pixels`, int frames x 19 -> float32 19, or None for "none".

    enet: w = 1 / ln(1.02 + p), p the class's share of the labelled pixels (Paszke et al. 2016,
    arXiv 1606.02147). median: w = median(f) / f, f the class's share of the pixels of the frames
    that hold it (Eigen and Fergus 2015, arXiv 1411.4734), and 0 for a class without a pixel.
    """
    if scheme == "none":
        return None
    total = pixels.sum(0)
    if not total.any():
        raise ValueError("no training label holds any of the 19 classes: no weights from that")
    if scheme == "enet":
        w = 1 / np.log(1.02 + total / total.sum())
    elif scheme == "median":
        f = total / ((pixels > 0) * pixels.sum(1, keepdims=True)).sum(0).clip(1)
        w = np.divide(np.median(f[f > 0]), f, out=np.zeros(len(f)), where=f > 0)
    else:
        raise ValueError(f"no class weights are called {scheme!r}; there are: none, enet, median")
    return torch.tensor(w, dtype=torch.float32)


# --------------------------------------------------------------------------------- scenes

# Real streets need a download; these are drawn, so that everything runs anywhere. They are no
# substitute: what they share with Cityscapes is its files, its classes, and their imbalance.

SCENES_MARK = "GENERATED.txt"                       # a file that tells such a tree from real frames
WIDTH, HEIGHT = 256, 128                            # of a frame, in pixels
IDS = {"ego vehicle": 1, "static": 4, **{c.name: c.label_id for c in CLASSES}}
# Colours to choose from; classes share them on purpose: only shape and place tell them apart.
PAINT, STONE = "e1e1dc 969ba0 2d2f34 962826 324b82 bea046", "aa9678 8c5c4c 828282 c3b9a5 625c5a"
CLOTH = "2d303c b43c32 3c64b4 d2cdbe 6e8c3c"
TONES = dict(paint=PAINT, load="e1e1dc 969ba0 324b82", bus="c32d2d bea046 e1e1dc",
             tram="4b8c5a bea046 c32d2d", shirt=CLOTH, vest="d7b432 c85a28 8c322d",
             trousers=CLOTH, stone=STONE, brick="8c5c4c 7a4a3c aa9678",
             green="4b5f32 3c5537 64693c 70643c", bark="4b4034", road="646468 767370 54545a",
             metal="34363a 585b5d", grey="b9bec3 a0a5aa 50545a", plank="b4a08c 7a8c78 e1e1dc",
             grass="6e8c46 78823c 64693c", air="cdd2d7 96b9e1 a5a5a8", skin="d7aa91 785541",
             dark="18181c", glass="303842 555f69", plate="c32d2d 2d55a5 d7b432", pale="e1e1dc",
             lamp="ebe6c8 aa1e1e", stop="f53228", go="46eb82")
# Flat things, in centimetres: the label, then strokes from back to front. "metal 30 0 0 0 700" is
# a line in metal, 30 wide, from (0, 0) up to (0, 700); width 0 fills the corners instead, and
# three numbers are a disc: its middle and its radius.
FLAT = dict(
    person="person; trousers 18 22 0 20 40 0 90 -15 45 -25 0; shirt 14 -30 85 -20 142 20 142 33 99;"
           "shirt 0 -23 150 23 150 18 80 -18 80; dark 0 0 171 16; skin 0 0 164 14",
    bicycle="bicycle; dark 8 -55 36 36; dark 8 55 36 36; metal 9 55 36 36 108 20 112;"
            "paint 8 0 36 -55 36 -20 85 40 85 0 36 -20 95",
    motorcycle="motorcycle; dark 0 -70 36 37; dark 0 70 36 37; metal 0 -70 25 35 20 50 70 -30 70;"
               "paint 0 -105 100 -90 65 50 55 75 100 30 110 -20 85; metal 12 70 34 45 120 25 120",
    rider="rider; trousers 22 -22 95 22 75 5 30; vest 0 -36 88 -8 85 28 150 -5 158;"
          "vest 14 12 142 15 115 40 115; plate 0 20 178 17; skin 0 23 169 14",
    lamp="pole; grey 34 0 0 0 700; grey 22 0 700 160 720", post="pole; grey 28 0 0 0 280",
    light="traffic light; dark 0 -35 240 35 240 35 420 -35 420; stop 0 0 385 22; metal 0 0 330 22;"
          "go 0 0 275 22",
    triangle="traffic sign; plate 0 -60 230 60 230 0 335; pale 0 -33 245 33 245 0 305",
    disc="traffic sign; plate 0 0 270 50; pale 0 0 270 32",
    board="traffic sign; plate 0 -90 220 90 220 90 320 -90 320; pale 15 -60 270 60 270")
# Boxes, in metres: half width, from, to (along the street), bottom, top, colour; then bands of
# panes on their faces: colour, bottom, top, how many along the side, how many across the end,
# rows, and the part of its place that a pane fills (0: it is a wheel).
LAMPS, WHEELS = ("lamp", .5, .75, 0, 2, 1, .4), ("dark", 0, 1, 2, 0, 1, 0)
SOLID = dict(
    car=[(.9, -2.1, 2.1, .3, .95, "paint", ("dark", 0, .72, 2, 0, 1, 0), LAMPS),
         (.76, -1.6, 1.1, .95, 1.5, "paint", ("glass", 1, 1.42, 2, 1, 1, .8))],
    truck=[(1.15, 2.1, 3.9, .6, 2.7, "paint", ("glass", 1.6, 2.5, 1, 1, 1, .8), WHEELS, LAMPS),
           (1.25, -3.9, 1.8, .6, 3.6, "load", WHEELS, LAMPS)],
    bus=[(1.3, -5.5, 5.5, .35, 3.1, "bus", ("glass", 1.5, 2.7, 6, 1, 1, .85), WHEELS, LAMPS)],
    train=[(1.3, mid - 5.8, mid + 5.8, .2, 3.5, "tram", ("load", .8, 1.3, 1, 0, 1, 1),
            ("glass", 1.6, 2.9, 7, 1, 1, .75), LAMPS) for mid in (-12, 0, 12)],
    wall=[(.2, -5.2, 5.2, 0, 2, "stone", ("brick", 0, 1.8, 12, 1, 5, .88))],
    fence=[(.01, -5.2, 5.2, 0, 2.2, None, ("plank", 0, 2.2, 16, 1, 1, .62),
            ("plank", .2, .5, 1, 1, 1, 1), ("plank", 1.5, 1.8, 1, 1, 1, 1))],
    static=[(.4, -.35, .35, 0, 1.2, "paint", ("dark", .8, 1, 1, 1, 1, .9))],
    **{f"building{n}": [(4.5, -5.5, 5.5, 0, 3.6 + 3.2 * n, "stone", ("glass", 0, 2.7, 2, 2, 1, .8),
                         ("glass", 3.2, 3.2 + 3.2 * n, 4, 3, n, .55))] for n in (1, 2, 3, 4, 5)})
# What stands beside the road: how many a side, metres from the kerb and ahead, turn.
BESIDE = {
    "person": (1.4, .3, 2.2, 5, 12, 0, 0), "tree": (1.9, .5, 1, 10, 50, 0, 0),
    "lamp": (.7, .2, .6, 7, 18, 0, 0), "post light": (.5, .2, .6, 7, 16, 0, 0),
    "post disc": (.25, .2, .6, 7, 16, 0, 0), "post triangle": (.25, .2, .6, 7, 16, 0, 0),
    "post board": (.2, .2, .6, 8, 18, 0, 0), "static": (.2, .4, 2, 7, 14, 0, 0),
    "bicycle": (.22, .5, 1.5, 5, 10, .8, 2.3), "bicycle rider": (.22, -2.5, -.5, 5, 10, .8, 2.3),
    "motorcycle": (.13, .5, 1.5, 5, 10, .8, 2.3),
    "motorcycle rider": (.18, -2.5, -.5, 5, 10, .8, 2.3)}
# Strength of fine, middling and coarse texture; classes not named have (3, 2, 3).
TEXTURE = dict(road=(5, 3, 6), sidewalk=(5, 4, 6), building=(4, 4, 6), wall=(6, 6, 6),
               vegetation=(16, 14, 10), terrain=(13, 6, 8), sky=(1, 1, 5))


def rectangle(u0, u1, v0, v1):
    """Corners of a rectangle."""
    return [(u0, v0), (u1, v0), (u1, v1), (u0, v1)]


def oval(u, v, ru, rv, n=12):
    """An ellipse around (u, v) as n corners."""
    angles = [2 * math.pi * i / n for i in range(n + 1)]
    return [(u + ru * math.cos(a), v + rv * math.sin(a)) for a in angles]


class Canvas:
    """A picture and its labels, painted together, far to near, through one pinhole camera.

    Points are (right, away, up) in metres from the spot on the street that `move` chose."""

    def __init__(self, rng):
        self.rng, size = rng, (2 * WIDTH, 2 * HEIGHT)   # twice too large: shrinking mixes edges
        self.focal, self.u0, self.v0, self.height, self.bend, self.haze, self.sun = rng.uniform(
            (420, WIDTH - 60, .7 * HEIGHT, 1.4, -.003, .002, .6),
            (520, WIDTH + 60, .88 * HEIGHT, 1.9, .003, .012, 1.1)).tolist()
        self.move(0, 0)
        self.air = self.tone("air")
        self.image = Image.new("RGB", size, tuple(map(int, self.air)))
        self.label = Image.new("L", size, IDS["sky"])
        self.pens = ImageDraw.Draw(self.image, "RGBA"), ImageDraw.Draw(self.label)

    def move(self, x, z, turn=0.0):
        """Start a new object: its place, its heading, its own colours."""
        self.x, self.z, self.cos, self.sin, self.tones = x, z, math.cos(turn), math.sin(turn), {}
        x += self.bend * z * z
        self.eye = z * self.sin - x * self.cos, -x * self.sin - z * self.cos, self.height

    def tone(self, name):
        if name not in self.tones:
            shades = TONES[name].split()
            shade = bytes.fromhex(shades[self.rng.integers(len(shades))])
            self.tones[name] = [c + e for c, e in zip(shade, self.rng.normal(0, 9, 3).tolist())]
        return self.tones[name]

    def paint(self, axis, plane, shape, label, colour, shade=1.0, stroke=0.0, opacity=1.0):
        """Fill a shape, or draw it in lines `stroke` metres wide, standing along the street (axis
        0), across it (1) or lying (2). No label or no colour leaves that picture as it is."""
        spots, depth = [], 0.0
        for u, v in shape:
            right, away, up = ((plane, u, v), (u, plane, v), (u, v, plane))[axis]
            z = max(self.z + away * self.cos - right * self.sin, 1.0)
            x = self.x + right * self.cos + away * self.sin + self.bend * z * z
            zoom = self.focal / z
            spots.append((self.u0 + x * zoom, self.v0 + (self.height - up) * zoom))
            depth += z / len(shape)
        clear, fills = math.exp(-self.haze * depth), [None, IDS.get(label)]
        if colour:      # the farther, the more of it is air
            mix = [clear * shade * c + (1 - clear) * a for c, a in zip(self.tone(colour), self.air)]
            fills[0] = (*(min(max(int(m), 0), 255) for m in mix), int(255 * opacity))
        for pen, fill in zip(self.pens, fills):
            if fill is not None and stroke:
                pen.line(spots, fill, math.ceil(stroke * self.focal / depth), joint="curve")
            elif fill is not None:
                pen.polygon(spots, fill)

    def box(self, spans, label, colour, bands):
        """Paint the faces of a box that the camera sees, and the bands of panes on them."""
        for axis, shade in (2, 1.15), (0, self.sun), (1, .9):
            low, high = spans[axis]
            if low <= self.eye[axis] <= high:
                continue
            plane = low if self.eye[axis] < low else high
            (u0, u1), side = (spans[i] for i in range(3) if i != axis)
            self.paint(axis, plane, rectangle(u0, u1, *side), label, colour, shade)
            for tint, bottom, top, *count, rows, part in bands if axis < 2 else ():
                du, dv = (u1 - u0) / max(count[axis], 1), (top - bottom) / rows
                for i in range(count[axis] * rows):
                    u, v = u0 + (i // rows + .5) * du, bottom + (i % rows + .5) * dv
                    ru, rv = part * du / 2, (part if rows > 1 else 1) * dv / 2
                    pane = rectangle(u - ru, u + ru, v - rv, v + rv) if part else oval(u, v, rv, rv)
                    self.paint(axis, plane, pane, label, tint, shade)


def flat(canvas, names, axis):
    """Flat things of the table, one on the other, in proportions of their own."""
    wide, tall = canvas.rng.uniform((.85, .9), (1.2, 1.1)).tolist()
    wide *= canvas.rng.choice([-1, 1])
    for name in names:
        label, *strokes = FLAT[name].split(";")
        for colour, stroke, *at in map(str.split, strokes):
            at = [int(number) for number in at]
            shape = oval(*at, at[2]) if len(at) == 3 else list(zip(at[::2], at[1::2]))
            shape = [(u * wide / 100, v * tall / 100) for u, v in shape]
            if len(at) == 3 and stroke != "0":      # the spokes of a wheel
                canvas.paint(axis, 0, shape, label, "metal", opacity=.3)
            canvas.paint(axis, 0, shape, label, colour, 1, int(stroke) / 100)


def solid(canvas, name):
    """A solid of the table, on its shadow, heading away or towards us."""
    way, long = canvas.rng.choice([-1, 1]), canvas.rng.uniform(.92, 1.08)
    end, half = max(part[2] for part in SOLID[name]), SOLID[name][0][0] + .3
    canvas.paint(2, 0, rectangle(-half, half, -.4, 2 * end), None, "dark", opacity=.6)
    parts = [(low, sorted((long * (end + way * a), long * (end + way * b))), half, *rest)
             for half, a, b, low, *rest in SOLID[name]]
    for low, away, half, high, colour, *bands in sorted(parts, key=lambda p: (p[0], -p[1][0])):
        canvas.box([(-half, half), away, (low, high)], name.rstrip("12345"), colour, bands)


def tree(canvas, trunk):
    """Leaf clumps around a centre, on a trunk or, as a bush, on the ground."""
    size, rng = canvas.rng.uniform(1.1, 2), canvas.rng
    canvas.paint(1, 0, [(0, 0), (0, trunk + size)], "vegetation", "bark", stroke=.3)
    for _ in range(10):
        (u, v), rough = rng.normal(0, .7, 2).tolist(), rng.normal(0, .18, (8, 2)).tolist()
        clump = [(size * (a + da), max(trunk + size * (1.5 + b + db), 0))
                 for (a, b), (da, db) in zip(oval(u, v, .9, .7, 7), rough)]
        canvas.paint(1, 0, clump, "vegetation", "green", 1 + .2 * v + .3 * rough[0][0])


def strip(canvas, x0, x1, label, colour, shade=1.0, opacity=1.0):
    """Ground along the street, in pieces so that it bends and fades with distance."""
    edges = np.geomspace(1.5, 150, 8).tolist()
    for a, b in zip(edges, edges[1:]):
        canvas.paint(2, 0, rectangle(x0, x1, a, b), label, colour, shade, 0, opacity)


def draw_scene(rng):
    """One frame: the picture (height, width, 3) and its labelIds (height, width), both uint8."""
    canvas, things = Canvas(rng), []
    def put(layer, x, z, name, turn=0.0):
        things.append((layer, -float(z), float(x), turn, str(name)))
    lane, track = rng.uniform(2.8, 3.6), rng.random() < .25
    shady = rng.choice([-1, 0, 1])      # the side whose houses throw their shadow on the street
    curbs = {-1: -lane * rng.choice([1.5, 2.2]) - .3, 1: lane * .5 + rng.choice([.5, 2.4])}
    strip(canvas, -60, 60, "terrain", "grass")
    strip(canvas, curbs[-1], curbs[1], "road", "road")
    for x in np.arange(curbs[-1] + lane, curbs[1] - 1, lane):
        for z in range(4, 60, 6):
            canvas.paint(2, 0, rectangle(x - .08, x + .08, z, z + 3), None, "pale", opacity=.7)
    if track:
        strip(canvas, -lane - 1.2, -lane + 1.2, None, "stone", .8, .5)
        for rail in -.75 - lane, .75 - lane:
            strip(canvas, rail - .1, rail + .1, None, "dark")
    for side, curb in curbs.items():
        inner = curb + side * rng.choice([0, rng.uniform(.8, 1.8)], p=[.75, .25])   # a verge
        edge = inner + side * rng.uniform(2.2, 3.5)
        strip(canvas, curb, inner, "terrain", "grass")
        strip(canvas, inner, edge, "sidewalk", "road", rng.uniform(1.15, 1.5))
        strip(canvas, inner, inner + side * .15, None, "pale", .8, .6)
        for z in range(4, 30, 2):
            canvas.paint(2, 0, [(inner, z), (edge, z)], None, "dark", 1, .05, .4)
        if side == shady:
            strip(canvas, edge, curb - side * rng.uniform(-1, 3), None, "dark", 1, .45)
        limit = rng.choice(["", "wall", "fence"], p=[.66, .17, .17])
        back = edge + side * rng.choice([2, 4] if limit else [0, 0, 2])
        for z in np.arange(rng.uniform(3, 8), 80, 11.5):
            if rng.random() < .63:
                put(0, back + side * 4.5, z, f"building{rng.integers(1, 6)}")
            for near in z + 11 * rng.random(2):
                put(0, back + side * rng.uniform(2, 7), near, rng.choice(["tree", "bush"]))
            if limit and z < 40:
                put(1, edge, z, limit)
        for name, (mean, x0, x1, z0, z1, *turns) in BESIDE.items():
            for _ in range(rng.poisson(mean)):
                x, z = inner + side * rng.uniform(x0, x1), rng.uniform(z0, z1)
                put(2, x, z, name, rng.uniform(*turns))
        for z in np.arange(rng.uniform(7, 14), 40, 7) if abs(curb) > lane * .8 else ():
            if rng.random() < .58:
                put(2, curb - side * 1.1, z, "car", rng.normal(0, .04))
    left, ahead = rng.choice(["car", "truck", "bus"], 2, p=[.72, .13, .15])
    put(2, 0, rng.uniform(12, 24), ahead)
    put(2, -lane, rng.uniform(11, 22), "train" if track and rng.random() < .8 else left)
    for layer, z, x, turn, name in sorted(things):
        canvas.move(x, -z, turn)
        if name in ("tree", "bush"):
            tree(canvas, rng.uniform(2.2, 3.2) if name == "tree" else 0)
        elif name in SOLID:
            solid(canvas, name)
        else:
            flat(canvas, name.split(), 0 if turn else 1)
    canvas.move(0, 0)
    hood = oval(WIDTH + rng.uniform(-40, 40), 2 * HEIGHT + 6, WIDTH * 1.3, rng.uniform(8, 36), 40)
    for pen, fill in zip(canvas.pens, (tuple(map(int, canvas.tone("paint"))), IDS["ego vehicle"])):
        pen.polygon(hood, fill)
    return develop(canvas.image, canvas.label, rng)


def develop(image, label, rng):
    """Add what a camera adds: texture, the day's light, and noise of the sensor."""
    image, label = np.asarray(image.reduce(2), np.float32), np.asarray(label)[::2, ::2]
    strength = np.full((34, 3), (3, 2, 3), np.float32)
    for name, amounts in TEXTURE.items():
        strength[IDS[name]] = amounts
    for scale, amount in zip((1, 3, 16), strength[label].transpose(2, 0, 1)):
        coarse = rng.normal(0, 1, (HEIGHT // scale + 2, WIDTH // scale + 2)).astype(np.float32)
        grain = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.BILINEAR)
        image = image + (amount * np.asarray(grain))[..., None]
    light = rng.uniform(.78, 1.12) * (1 + rng.normal(0, .03, 3))
    light = light * np.linspace(1, rng.uniform(.8, 1.1), HEIGHT)[:, None, None]
    image = 255 * (image.clip(0, 255) / 255 * light).clip(0, 1) ** rng.uniform(.85, 1.15)
    image += rng.normal(0, rng.uniform(1, 3.5), image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def write_scene(tree, seed, job):
    """Draw one frame into a Cityscapes tree; job: the split's name and number, the index."""
    split, number, index = job
    frame = draw_scene(np.random.default_rng((seed, number, index)))
    for pixels, kind, end in zip(frame, ("leftImg8bit", "gtFine"), ("", "_labelIds")):
        path = tree / kind / split / "toytown" / f"toytown_000000_{index:06d}_{kind}{end}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)


def make_scenes(root, train=200, val=50, seed=0):
    """Write the frames as a Cityscapes tree at `root`: the same bytes for the same seed.

    A finished tree is left as it is; an interrupted one never gets the name `root`. Raises
    FileExistsError where something else is there.
    """
    root = Path(root)
    if (root / SCENES_MARK).exists():
        return
    if root.exists():
        raise FileExistsError(f"{root}: is there, but holds no generated scenes; rename it")
    print(f"drawing {train + val} street scenes into {root}, once (about 10 s)", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    jobs = [("train", 0, i) for i in range(train)] + [("val", 1, i) for i in range(val)]
    with (TemporaryDirectory(dir=root.parent, prefix=".scenes-") as folder,
          ProcessPoolExecutor(initializer=leave_ctrl_c) as pool):
        tree = Path(folder, "tree")
        list(pool.map(partial(write_scene, tree, seed), jobs))
        (tree / SCENES_MARK).write_text(f"Street scenes drawn by data.py with seed {seed}.\n")
        try:
            os.replace(tree, root)
        except OSError:
            if not (root / SCENES_MARK).exists():   # else another run was first
                raise
