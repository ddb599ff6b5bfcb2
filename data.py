"""Cityscapes as it is downloaded, augmentation, CopyBlob, class weights, loader, generated scenes.

Cityscapes (Cordts et al. 2016, arXiv 1604.01685) keeps two files for each frame, below one root:

    leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png         RGB, 1024 x 2048
    gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png          label ids, 8 bits

A label id, 0 ... 33, says what an annotator saw. 19 of them are evaluated and renumbered as train
ids 0 ... 18, which networks predict. All others become 255, which losses and metrics ignore. (The
id of license plates, -1, is stored as 255, and stays 255.) A table maps label ids to train ids when
a file is read, so nothing has to be converted beforehand.

Sizes are height x width; Pillow's own sizes, as in `resize`, are width x height.
Random numbers come from (seed, epoch, index): a sample does not depend on the number of workers or
GPUs, and a resumed run sees the same samples as an uninterrupted one.
"""
import atexit
import functools
import math
import multiprocessing
import os
import re
import signal
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps

# ------------------------------------------------------------------------------------ classes

IGNORE = 255                                        # train id of pixels that do not count
Class = namedtuple("Class", "name label_id color")
CLASSES = [                                         # the position is the train id
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
LABEL_IDS = [c.label_id for c in CLASSES]
LAST_LABEL_ID = max(33, *LABEL_IDS)                 # Cityscapes has 0 ... 33, used or not
TRAIN_ID = {c.name: train_id for train_id, c in enumerate(CLASSES)}

LABEL_TO_TRAIN = np.full(256, IGNORE, np.uint8)     # for targets, class weights and CopyBlob
LABEL_TO_TRAIN[LABEL_IDS] = np.arange(len(CLASSES))
# Uncomment this to count trailers (label id 30) as trucks (27). Scores are then not Cityscapes'.
# LABEL_TO_TRAIN[30] = LABEL_TO_TRAIN[27]
TRAIN_TO_LABEL = np.full(256, IGNORE, np.uint8)     # the inverse, for the official scorer
TRAIN_TO_LABEL[:len(CLASSES)] = LABEL_IDS

# ----------------- reading pictures: each error is an OSError or ValueError that names the file

MEAN = (0.485, 0.456, 0.406)                        # of ImageNet, R G B, for values in [0, 1]
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = (124, 116, 104)                        # 255 * MEAN: pads images
PHOTO_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF"]          # not EPS: it runs Ghostscript


def normalize(images):
    """uint8 N x 3 x H x W -> float32 on the same device, (image - mean) / std. The memory format is
    channels_last: the shape stays, the order in memory makes convolutions faster."""
    mean, std = mean_and_std(images.device)
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache                    # sends them to a GPU once, not in each step
def mean_and_std(device):
    """MEAN and STD for values in [0, 255], each 1 x 3 x 1 x 1, on a device."""
    return [255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD)]


def read_picture(path, formats):
    """Read a picture in one of Pillow's `formats` -> Pillow image, upright, in the file's mode."""
    try:
        picture = Image.open(path, formats=formats)
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return picture
    except Exception as error:                      # Pillow raises errors of many kinds
        raise OSError(f"{path}: cannot read this picture ({error}); "
                      f"it must be a complete {' or '.join(formats)} file") from error


def read_image(path):
    """Read a photo, also gray, palette, or with alpha -> RGB Pillow image."""
    picture = read_picture(path, PHOTO_FORMATS)
    if picture.mode[0] in "IF":                     # Pillow's modes I, F, I;16 and the like
        raise ValueError(f"{path}: has {picture.mode} pixels; convert it to 8 bits per channel")
    return picture.convert("RGB")


def read_label(path):
    """Read a PNG of label ids -> Pillow image (mode L) of train ids, 255 = ignored."""
    label = read_picture(path, ["PNG"])
    if label.mode != "L":
        raise ValueError(f"{path}: has {label.mode} pixels instead of 8-bit ids (mode L); use "
                         "Cityscapes' *_gtFine_labelIds.png files, or save ids, not colors")
    pixels = label.histogram()                      # the number of each of 256 values
    wrong = [value for value in range(LAST_LABEL_ID + 1, IGNORE) if pixels[value] > 0]
    if wrong:
        raise ValueError(f"{path}: has the values {wrong[:5]}, but label ids are 0 ... "
                         f"{LAST_LABEL_ID} or 255; correct the file, or CLASSES in data.py")
    return label.point(LABEL_TO_TRAIN.tolist())


# ------------------------------------------------------------------------------------ dataset

IMAGE_FILE = re.compile(r"(.+)_leftImg8bit\.(png|jpg|jpeg)", re.IGNORECASE)
LABEL_FILE = re.compile(r"(.+)_gtFine_labelIds\.png", re.IGNORECASE)
COMPANIONS = re.compile(r".+_gtFine_(color|polygons|(label|instance)(Train)?Ids)\.(png|json)",
                        re.IGNORECASE)              # what else Cityscapes has in gtFine


def list_folder(folder):
    """The Paths in a folder, sorted, without hidden ones ("."); none if it is missing."""
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def find_files(folder, pattern):
    """Find folder/<city>/<file>, where `pattern` matches <file> and its group 1 is the frame.
    -> dict {"<city>/<frame>": Path}, sorted, and a list of Paths that are not used: other files,
    and links without a target, but not COMPANIONS."""
    files, unused = {}, []
    for city in list_folder(folder):
        if not city.is_dir():                       # a file that lies beside the cities
            unused.append(city)
            continue
        for path in list_folder(city):
            match = pattern.fullmatch(path.name)
            if match and path.is_file():
                name = f"{city.name}/{match[1]}"
                if name in files:                   # x.jpg, then x.png: the last one is read
                    unused.append(files[name])
                files[name] = path
            elif match or not COMPANIONS.fullmatch(path.name):
                unused.append(path)                 # a link without a target, or an unknown file
    return files, unused


class Cityscapes(torch.utils.data.Dataset):
    """The frames of one split -> (image uint8 3 x H x W RGB, label uint8 H x W train ids).

    crop: None: whole frames as they are; (h, w): random augmented crops of that size
    copyblob: probability of CopyBlob for a frame, before it is cropped, in [0, 1]
    scale: (min, max) of the random zoom of a crop, see `augment`
    unused: Paths of what lies in the folders of the split and is not read

    Item k = epoch * len + index, so that a crop has new random numbers in each epoch (see
    epoch_batches); whole frames are items 0 ... len - 1. A split other than train and val may
    have no labels; then all pixels are 255. Raises OSError or ValueError for wrong files."""

    def __init__(self, root, split, crop=None, copyblob=0.0, seed=0, scale=(0.5, 2.0)):
        root = Path(os.path.expanduser(root))
        self.crop, self.copyblob, self.seed, self.scale = crop, copyblob, seed, scale
        images, unused_images = find_files(root / "leftImg8bit" / split, IMAGE_FILE)
        labels, unused_labels = find_files(root / "gtFine" / split, LABEL_FILE)
        self.unused = unused_images + unused_labels
        hint = f" (not read, for example: {self.unused[0]})" if self.unused else ""
        if not images:
            splits = ", ".join(path.name for path in list_folder(root / "leftImg8bit"))
            raise FileNotFoundError(
                f"no frames at {root}/leftImg8bit/{split}/<city>/*_leftImg8bit.png{hint}; splits "
                f"there: {splits or 'none'}; unpack leftImg8bit_trainvaltest.zip and "
                "gtFine_trainvaltest.zip into one folder, and name it with --data")
        unpaired = sorted(images.keys() ^ labels.keys())
        if unpaired and (labels or split in ("train", "val")):
            raise FileNotFoundError(
                f"{root}: {len(unpaired)} files of the {len(images)} {split} frames and "
                f"{len(labels)} labels have no partner, for example {unpaired[0]}; labels must end "
                f"in _gtFine_labelIds.png{hint}")
        self.images = list(images.values())
        self.labels = [labels[name] for name in images if labels]       # none in a test split
        self.names = [name.split("/")[1] for name in images]
        self.donors = find_donors(self.pixels) if copyblob > 0 else []

    @functools.cached_property
    def pixels(self):
        """int64 frames x classes: the pixels of each class, counted when first used."""
        return count_classes(self.labels)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, k):
        if self.crop is None and k >= len(self):    # ends a `for` over whole frames
            raise IndexError(k)
        epoch, index = divmod(k, len(self))
        image, label = self.read(index)
        if self.crop is not None:
            rng = np.random.default_rng((self.seed, epoch, index))
            if self.donors and rng.random() < self.copyblob:
                donor, train_id = self.donors[rng.integers(len(self.donors))]
                donor_image, donor_label = self.read(donor)
                image, label = copy_blob(image, label, donor_image, donor_label, train_id)
            image, label = augment(image, label, self.crop, rng, self.scale)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image, torch.from_numpy(np.array(label))

    def read(self, index):
        """Frame `index` as two Pillow images of one size: RGB, and train ids (mode L)."""
        image = read_image(self.images[index])
        if not self.labels:
            return image, Image.new("L", image.size, IGNORE)
        label = read_label(self.labels[index])
        if image.size != label.size:
            raise ValueError(f"{self.labels[index]}: is {label.height} x {label.width}, but its "
                             f"frame is {image.height} x {image.width}; replace one of them")
        return image, label


# ------------------------------------------------------------------------------- augmentation

def place_window(length, crop, zoom, rng):
    """Place the window of `augment` (see its drawing) at random on one axis, of `length` pixels.
    It has crop / zoom pixels. A shorter window lies in the frame; a longer one contains the frame.
    -> start, end: the part of the frame in the window, in pixels of the frame (float)
       crop_start, crop_size: where this goes in the crop, in whole pixels of the crop
    Examples for a frame of 1000 pixels and a crop of 600, if the window begins at `offset`:
        zoom 2:    the window has 300 pixels;  offset 450  -> 450, 750, 0, 600
        zoom 0.5:  the window has 1200 pixels; offset -150 -> 0, 1000, 75, 500
    The second crop has 75 pixels of padding, 500 of the frame, and 25 of padding."""
    window = crop / zoom
    room = length - window                          # negative if the window is longer
    offset = rng.uniform(min(0, room), max(0, room))
    start = max(0, offset)
    end = min(length, offset + window)
    crop_start = round((start - offset) * zoom)
    crop_end = round((end - offset) * zoom)
    return start, end, crop_start, max(1, crop_end - crop_start)        # at least one pixel


def augment(image, label, crop, rng, scale=(0.5, 2.0)):
    """Zoom and crop, color jitter, flip: RGB and label Pillow images -> two of size `crop`.

    A window of the frame is resized to the crop, so that zoom and crop are one operation. Height
    and width are placed separately: the second window is taller than the frame, but narrower.

        frame                               window
        +--------------------+              +-----------+
        |                    |              |  padding  |                crop = (h, w)
        |  window            |       frame  |           |                 +--------+
        |  +------+          |           +--+-----------+--+   resize     |        |
        |  |      | h/zoom   |     or    |  |           |  |   ------->   |        | h
        |  +------+          |           +--+-----------+--+   by zoom    |        |
        |   w/zoom           |              |  padding  |                 +--------+
        +--------------------+              +-----------+                     w

    `zoom` is log-uniform between scale[0] and scale[1]: (0.5, 2) enlarges as often as it reduces.
    Padding is the mean color, and 255 (ignored) in the label."""
    height, width = crop
    zoom = math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))
    left, right, crop_left, new_width = place_window(image.width, width, zoom, rng)
    top, bottom, crop_top, new_height = place_window(image.height, height, zoom, rng)

    box, size = (left, top, right, bottom), (new_width, new_height)     # Pillow: width first
    image_part = jitter(image.resize(size, Image.BILINEAR, box), rng)
    label_part = label.resize(size, Image.NEAREST, box)
    image_crop = Image.new("RGB", (width, height), MEAN_COLOR)
    label_crop = Image.new("L", (width, height), IGNORE)
    image_crop.paste(image_part, (crop_left, crop_top))
    label_crop.paste(label_part, (crop_left, crop_top))
    if rng.random() < 0.5:
        image_crop, label_crop = ImageOps.mirror(image_crop), ImageOps.mirror(label_crop)
    return image_crop, label_crop


def jitter(image, rng):
    """Random brightness, contrast and saturation: each factor is between 0.75 and 1.25.

    With gray = 0.299 R + 0.587 G + 0.114 B:
        y = saturation * x + (1 - saturation) * gray
        z = brightness * (contrast * (y - 128) + 128)
    Together: z = brightness * contrast * y + brightness * (1 - contrast) * 128. It is affine in R,
    G, B, so one 3 x 4 color matrix does it."""
    brightness, contrast, saturation = rng.uniform(0.75, 1.25, 3)
    gray = np.tile([0.299, 0.587, 0.114], (3, 1))               # 3 x 3: each row gives the gray
    matrix = np.zeros((3, 4))
    matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * gray)
    matrix[:, 3] = brightness * (1 - contrast) * 128
    return image.convert("RGB", tuple(matrix.ravel()))          # Pillow applies the matrix


# ----------------------------------------------------------------------------------- CopyBlob

# In Cityscapes, wall, fence, bus and train have less than 1 % of the pixels each, and networks miss
# many of them. CopyBlob pastes such a class from a donor, a training frame that shows enough of it,
# at the same place (hoya012's original at a random one):
#
#     frame                  donor                  result
#     +----------------+     +----------------+     +----------------+
#     |           o    |     |    +-------+   |     |    +------o+   |       people and thin things
#     |          /|\   |  +  |    |  bus  |   |  =  |    |  bu /|\   |       of the frame
#     |          / \   |     |    +-o---o-+   |     |    +-o-- / \   |       stay visible
#     +----------------+     +----------------+     +----------------+
#
# With one camera, a bus fits where it stood. Its depth is unknown: it may cover nearer cars.
# Class weights are counted without what is pasted. With both, rare classes are favored twice.

RARE = [TRAIN_ID[name] for name in ("wall", "fence", "bus", "train") if name in TRAIN_ID]
IN_FRONT = [TRAIN_ID[name] for name in ("pole", "traffic light", "traffic sign", "person", "rider",
                                        "motorcycle", "bicycle") if name in TRAIN_ID]
LEAST_SHARE = 0.005             # of a donor's labeled pixels


def find_donors(pixels):
    """int frames x classes -> list of [frame, train id]: each frame that shows enough of a rare
    class. All pairs are equally likely. Raises ValueError if there are none."""
    labeled = np.maximum(1, pixels.sum(axis=1, keepdims=True))          # of each frame
    shown = np.argwhere(pixels / labeled >= LEAST_SHARE).tolist()       # of all classes
    donors = [pair for pair in shown if pair[1] in RARE]
    if not donors:
        names = ", ".join(CLASSES[train_id].name for train_id in RARE)
        raise ValueError("--copyblob has nothing to paste: no training frame shows a class of RARE "
                         f"({names}; in data.py) on {LEAST_SHARE:.1%} of its labeled pixels")
    return donors


def copy_blob(image, label, donor_image, donor_label, train_id):
    """Paste what a donor shows of a class, where it shows it -> new image and label.
    Thin things and people (IN_FRONT) stay visible. All are Pillow images: RGB, train ids (mode L).
    Adapted from CopyBlob in hoya012/semantic-segmentation-tutorial-pytorch, which pastes at random
    places, and Copy-Paste (Ghiasi et al. 2020, arXiv 2012.07177)."""
    donor_image = donor_image.resize(image.size, Image.BILINEAR)        # if sizes differ
    donor_label = donor_label.resize(image.size, Image.NEAREST)
    blob = np.asarray(donor_label) == train_id
    in_front = np.isin(np.asarray(label), IN_FRONT)
    mask = Image.fromarray(blob & ~in_front)
    image, label = image.copy(), label.copy()
    image.paste(donor_image, mask=mask)
    label.paste(train_id, mask=mask)
    return image, label


# ------------------------------------------------------------------------------ class weights

def count_classes(labels):
    """Count the pixels of each class in each of the label files -> int64 files x classes."""
    with ThreadPoolExecutor() as pool:              # threads, as Pillow releases Python's lock
        counts = list(pool.map(lambda path: read_label(path).histogram(), labels))
    return np.array(counts, np.int64).reshape(len(labels), 256)[:, :len(CLASSES)]


def enet_weights(pixels):
    """1 / ln(1.02 + p), p: share of the labeled pixels (Paszke et al. 2016, arXiv 1606.02147).
    1.02 limits the weights to 1 / ln 1.02, about 50."""
    return 1 / np.log(1.02 + pixels.sum(axis=0) / pixels.sum())


def median_weights(pixels):
    """median(f) / f, f: share in the frames that show the class (Eigen 2014, arXiv 1411.4734).
    Unlike those of `enet_weights`, these weights have no limit."""
    holds = pixels > 0                              # bool frames x classes
    labeled = holds.T @ pixels.sum(axis=1)          # classes: labeled pixels of frames that hold it
    f = pixels.sum(axis=0) / np.maximum(1, labeled)
    return np.where(f > 0, np.median(f[f > 0]) / np.maximum(f, 1e-30), 0)


# int frames x classes -> float classes. One that never occurs has the weight 50 (enet), 0 (median).
CLASS_WEIGHTS = {"none": None, "enet": enet_weights, "median": median_weights}


# ------------------------------------------------------------------------------------- loader

def epoch_batches(epoch, length, batch, seed):
    """The items k (see Cityscapes) of each step of an epoch -> list of lists of ints, DataLoader's
    `batch_sampler`. Each epoch has its own random order; the last, incomplete batch is skipped.
    Example: for 5 frames in batches of 2, [[3, 0], [4, 2]] may be the items of epoch 0. Those of
    epoch 1 are between 5 and 9: item 7 is frame 2 again, with new random numbers."""
    # This key differs from that of every crop, (seed, epoch, index), as index < length:
    rng = np.random.default_rng((seed, epoch, length))
    items = epoch * length + rng.permutation(length)
    steps = length // batch
    return items[:steps * batch].reshape(steps, batch).tolist()


# Ctrl-C (SIGINT) reaches all processes of a program, and so does SIGTERM from many job schedulers.
# train.py then finishes its step, for which it needs the loader's worker processes. So:
# 1. Workers ignore both signals (ignore_stop_signals).
# 2. At the end of a program, Python sends SIGTERM to workers that are left, and would now wait for
#    them forever. So kill_workers runs before that: nothing can ignore SIGKILL.
# 3. On Linux, workers are forked from this process. Python 3.14 would start them from a helper
#    process, which dies of SIGTERM, and PyTorch's workers end when their parent has ended.
def make_loader(dataset, workers, device, **options):
    """A torch DataLoader whose worker processes leave signals to the main process.
    device: the torch.device of the network. workers: None is 0 on a CPU, where the network itself
    keeps all cores busy; for a GPU, it is this process's share of the cores, at most 8."""
    if workers is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):        # on Linux: those that this process may use
            cores = len(os.sched_getaffinity(0))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)        # of torchrun, one per GPU
        share = max(1, min(8, cores // processes))
        workers = 0 if device.type == "cpu" else share
    if workers > 0:
        options["worker_init_fn"] = ignore_stop_signals
        if sys.platform == "linux":
            options["multiprocessing_context"] = "fork"
        atexit.unregister(kill_workers)             # of an earlier call
        atexit.register(kill_workers)   # last registered, so called before multiprocessing's own
    return torch.utils.data.DataLoader(     # from pinned memory, non_blocking copies do not wait
        dataset, num_workers=workers, pin_memory=device.type == "cuda", **options)


def ignore_stop_signals(worker):
    """Make a worker process ignore Ctrl-C (SIGINT) and SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_workers():
    """Kill the workers that are left."""
    if hasattr(signal, "SIGCHLD"):      # its handler (PyTorch's) would report their end as an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


# -------------------------------------------- generated scenes: a demonstration, safe to skip
# Toy street scenes let `python train.py` run without Cityscapes. They have its classes and files.
SCENES_MARK = "GENERATED.txt"           # the file that marks a folder as generated
COLORS = {                              # a part takes one of these; classes share them on purpose
    "air": "gainsboro lightsteelblue silver skyblue", "ground": "darkkhaki olive darkolivegreen",
    "stone": "tan rosybrown gray silver dimgray", "leaf": "darkolivegreen olivedrab seagreen",
    "paint": "gainsboro darkgray black brown steelblue", "plate": "firebrick royalblue gold",
    "cloth": "black brown steelblue silver olive", "paving": "gray darkgray"}
# A part: shape, color, side, bottom, width, height, in meters: "box silver 0 0 .3 5" is .3 wide and
# 5 high. If `side` is not 0, it is painted twice, to the left and right of the thing's middle.
BICYCLE = {"bicycle": "disc black .5 0 .7 .7, box paint 0 .4 1 .25"}
MOTORCYCLE = {"motorcycle": "disc black .6 0 .6 .6, box paint 0 .3 1.3 .6, disc white .5 .6 .3 .3"}
RIDER = {"rider": "box cloth 0 .6 .5 1, disc plate 0 1.5 .4 .4"}
POLE = {"pole": "box silver 0 0 .3 5"}
# Each row: how many things a frame has on average; their smallest and largest distance from the
# middle of the street, in meters; the parts of each class.
THINGS = [
    (14, 12, 25, {"building": "box stone 0 0 10 9, box navy 2.4 1 1.6 2, box navy 2.4 5 1.6 2"}),
    (8, 9, 16, {"vegetation": "box sienna 0 0 .4 3, disc leaf .9 1.6 3 3, disc leaf 0 3 3 3"}),
    (.3, 9, 13, {"wall": "box stone 0 0 9 2, box stone 0 1.8 9.3 .3"}),
    (.4, 9, 13, {"fence": "box leaf 0 .5 9 .3, box leaf 0 1.4 9 .3, box sienna 0 0 .3 2, "
                          "box sienna 2.2 0 .3 2, box sienna 4.4 0 .3 2"}),
    (3, 1, 5, {"car": "disc black .7 0 .4 .6, box paint 0 .3 1.8 .7, box navy 0 .9 1.5 .5"}),
    (.4, 1, 4, {"truck": "box stone 0 .6 2.5 3, box paint 0 .3 2.3 2.2, box navy 0 1.5 2 .7"}),
    (.2, 1, 4, {"bus": "box paint 0 .3 2.6 2.9, box navy 0 1.1 2.3 1.3, box plate 0 2.6 1.5 .4"}),
    (.2, 1, 4, {"train": "box paint 0 .2 2.7 3.3, box navy 0 1.5 2.3 1.3, box plate 0 .8 2.7 .4"}),
    (1.5, 5, 8, {**POLE, "traffic sign": "disc plate 0 2.2 1 1, disc white 0 2.5 .4 .4"}),
    (1.5, 5, 8, {**POLE, "traffic light": "box black 0 2.3 .7 1.7, disc red 0 3.3 .5 .5, "
                                          "disc lime 0 2.5 .5 .5"}),
    (4, 5, 8, {"person": "box cloth 0 0 .5 1.5, disc tan 0 1.4 .35 .35"}), (2, 5, 8, POLE),
    (1, 4, 7, BICYCLE), (.6, 4, 7, MOTORCYCLE),
    (1, 2, 4, {**BICYCLE, **RIDER}), (.6, 2, 4, {**MOTORCYCLE, **RIDER})]
HORIZON, FOCAL, CAMERA = 50, 230, 1.6   # a pinhole camera: row; pixels; meters above the road
SHAPES = {"box": ImageDraw.ImageDraw.rectangle, "disc": ImageDraw.ImageDraw.ellipse,
          "band": ImageDraw.ImageDraw.polygon}


def draw_scene(rng):
    """One frame: the picture (uint8 128 x 256 x 3) and its label ids (uint8 128 x 256)."""
    image, label = Image.new("RGB", (256, 128)), Image.new("L", (256, 128))     # width, height
    image_pen, label_pen = ImageDraw.Draw(image), ImageDraw.Draw(label)

    def paint(name, shape, color, points):
        names = COLORS.get(color, color).split()
        rgb = rng.normal(ImageColor.getrgb(rng.choice(names)), 10).clip(0, 255)
        SHAPES[shape](image_pen, points, tuple(rgb.astype(int)))
        SHAPES[shape](label_pen, points, CLASSES[TRAIN_ID[name]].label_id)

    paint("sky", "box", "air", [(0, 0), (256, 128)])
    middle, curb, y = rng.uniform(100, 156), rng.uniform(4, 5.5), HORIZON + FOCAL * CAMERA
    bands = ("terrain", "ground", 60), ("sidewalk", "paving", 1.6 * curb), ("road", "dimgray", curb)
    for name, color, half_width in bands:
        x = FOCAL * half_width                      # one meter ahead, far below the picture
        paint(name, "band", color, [(middle, HORIZON), (middle - x, y), (middle + x, y)])
    things = []                                     # meters ahead, meters beside, classes
    for number, nearest, farthest, classes in THINGS:
        for _ in range(rng.poisson(number)):
            beside = rng.choice([-1, 1]) * rng.uniform(nearest, farthest)
            things.append((rng.uniform(9, 45), beside, classes))
    things.sort(key=lambda thing: -thing[0])        # far things first
    for ahead, beside, classes in things:
        zoom = FOCAL / ahead                        # pixels per meter
        center = middle + zoom * beside
        for name, parts in classes.items():
            for part in parts.split(", "):
                shape, color, *meters = part.split()
                side, bottom, width, height = zoom * np.array(meters, float)
                y = HORIZON + zoom * CAMERA - bottom
                for x in sorted({center - side, center + side}):        # one x if side is 0
                    paint(name, shape, color, [(x - width / 2, y - height), (x + width / 2, y)])
    label_pen.rectangle([(0, 124), (256, 128)], IGNORE)         # like the car's hood in Cityscapes
    light = rng.uniform(.7, 1.1) * (1 + rng.normal(0, .03, 3))
    image = light * np.asarray(image) + rng.normal(0, 8, (128, 256, 3))
    return image.clip(0, 255).astype(np.uint8), np.asarray(label)


def make_scenes(root, train=200, val=50, seed=0):
    """Write generated frames as a Cityscapes tree at `root`: the same bytes for the same seed."""
    root = Path(root)
    names = {"road", "sidewalk", "terrain", "sky"}.union(*[row[-1] for row in THINGS])
    if not names <= TRAIN_ID.keys():
        raise ValueError("the generated scenes show Cityscapes' classes, but CLASSES in data.py "
                         "has others; pass your own frames with --data")
    if (root / SCENES_MARK).exists():               # a finished tree stays as it is
        return
    if root.exists():
        raise FileExistsError(f"{root} exists but holds no generated scenes; rename it")
    print(f"drawing {train + val} street scenes into {root}, once", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root.parent, prefix=".scenes-") as folder:
        tree = Path(folder, "tree")
        for index, split in enumerate(["train"] * train + ["val"] * val):
            image, label = draw_scene(np.random.default_rng((seed, index)))
            for pixels, kind, suffix in (image, "leftImg8bit", ""), (label, "gtFine", "_labelIds"):
                name = f"toytown_000000_{index:06d}_{kind}{suffix}.png"
                path = tree / kind / split / "toytown" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        (tree / SCENES_MARK).write_text(f"Drawn by data.py with seed {seed}.\n")
        os.replace(tree, root)
