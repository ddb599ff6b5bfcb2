"""Cityscapes as it is downloaded, training augmentation, CopyBlob, and class weights.

Cityscapes (Cordts et al. 2016, arXiv 1604.01685) keeps two files for each frame, below one root:

    leftImg8bit/<split>/<city>/<city>_<seq>_<frame>_leftImg8bit.png         RGB, 2048 x 1024
    gtFine/<split>/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png          label ids, 8 bits
                                         (or: ..._gtFine_labelTrainIds.png, train ids)

A label id, 0 ... 33, says what an annotator saw. 19 of them are evaluated; these are renumbered
as train ids 0 ... 18, which is what networks predict. All others become 255, which losses and
metrics ignore. A table of 256 entries maps them when a label is read, so there is nothing to
convert beforehand. After that, everything works with train ids.

Random numbers come from (seed, epoch, index). A sample therefore does not depend on the number of
workers or GPUs, and a resumed run sees the same samples as an uninterrupted one.
"""
import contextlib
import functools
import hashlib
import math
import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

# ------------------------------------------------------------------------------------ classes

IGNORE = 255                                        # train id of pixels that do not count
Class = namedtuple("Class", "name label_id color")
CLASSES = [                                         # the position is the train id
    Class("road", 7, (128, 64, 128)),
    Class("sidewalk", 8, (244, 35, 232)),
    Class("building", 11, (70, 70, 70)),
    Class("wall", 12, (102, 102, 156)),
    Class("fence", 13, (190, 153, 153)),
    Class("pole", 17, (153, 153, 153)),
    Class("traffic light", 19, (250, 170, 30)),
    Class("traffic sign", 20, (220, 220, 0)),
    Class("vegetation", 21, (107, 142, 35)),
    Class("terrain", 22, (152, 251, 152)),
    Class("sky", 23, (70, 130, 180)),
    Class("person", 24, (220, 20, 60)),
    Class("rider", 25, (255, 0, 0)),
    Class("car", 26, (0, 0, 142)),
    Class("truck", 27, (0, 0, 70)),
    Class("bus", 28, (0, 60, 100)),
    Class("train", 31, (0, 80, 100)),
    Class("motorcycle", 32, (0, 0, 230)),
    Class("bicycle", 33, (119, 11, 32)),
]
LAST_LABEL_ID = 33                                  # the largest one, evaluated or not
TRAIN_ID = {c.name: i for i, c in enumerate(CLASSES)}

# Label id -> train id. Targets, class weights and CopyBlob all follow from this table. A file that
# holds train ids is read as it is.
LABEL_TO_TRAIN = np.full(256, IGNORE, np.uint8)
for c in CLASSES:
    LABEL_TO_TRAIN[c.label_id] = TRAIN_ID[c.name]
# To count trailers (label id 30) as trucks, for example, uncomment this line. It changes the truth
# of the validation too, so scores are no longer Cityscapes' own.
# LABEL_TO_TRAIN[30] = TRAIN_ID["truck"]

TRAIN_TO_LABEL = np.full(256, IGNORE, np.uint8)     # inverse, for the official scorer
for c in CLASSES:
    TRAIN_TO_LABEL[TRAIN_ID[c.name]] = c.label_id

# ----------------------------------------------------------------------------- reading pictures

MEAN = (0.485, 0.456, 0.406)                        # of ImageNet, R G B, for values in [0, 1]
STD = (0.229, 0.224, 0.225)
MEAN_COLOR = tuple(round(255 * m) for m in MEAN)    # pads images; `normalize` maps it to about 0
PHOTO_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF"]          # not EPS: it runs Ghostscript


def normalize(images):
    """uint8 N x 3 x H x W -> float32, minus ImageNet's mean, divided by its standard deviation.

    Stays on the device of `images`. The result is in channels_last memory format, which
    convolutions process fastest.
    """
    mean, std = mean_and_std(images.device)
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache
def mean_and_std(device):
    """MEAN and STD for values in [0, 255], each 1 x 3 x 1 x 1.

    They are kept on the device. PyTorch queues work for a GPU and goes on; a copy in each step
    would make it wait until the queue is empty.
    """
    return [255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD)]


def read_picture(path, formats):
    """Read a picture in one of Pillow's `formats` -> Pillow image, in the file's own mode.

    Raises OSError that names the file if it is missing, broken, or too large for Pillow.
    """
    try:
        picture = Image.open(path, formats=formats)
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)         # the EXIF rotation
        return picture
    except Exception as error:                      # Pillow raises errors of many kinds
        raise OSError(f"{path}: cannot read this picture ({error}); "
                      f"it must be a complete {' or '.join(formats)} file") from error


def read_image(path):
    """Read a photo of 8 or 16 bits per channel (also gray, palette, alpha) -> RGB Pillow image.

    Raises OSError or ValueError that names the file.
    """
    picture = read_picture(path, PHOTO_FORMATS)
    if picture.mode.startswith("I;16"):             # 16 bits of gray: keep the upper 8
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"{path}: has 32-bit pixels, whose range is unknown; "
                         "convert it to 8 bits per channel")
    return picture.convert("RGB")


TRAIN_IDS_END = "_gtFine_labelTrainIds.png"         # the name of a file that holds train ids


def read_label(path):
    """Read a label PNG -> Pillow image (mode L) of train ids, 255 = ignored.

    A file named *_gtFine_labelTrainIds.png holds train ids already; any other holds label ids.
    Raises OSError or ValueError that names the file.
    """
    label = read_picture(path, ["PNG"])
    has_train_ids = str(path).endswith(TRAIN_IDS_END)
    check_label(path, label, has_train_ids)
    if has_train_ids:
        return label
    return label.point(LABEL_TO_TRAIN.tolist())


# ------------------------------------------------------------------------------------ dataset


class Cityscapes(torch.utils.data.Dataset):
    """The frames of one split -> (image uint8 3 x H x W RGB, label uint8 H x W train ids).

    root, split: frames and labels are found as described at the top of this file
    crop: None: whole frames as they are; (h, w): random augmented crops of that size
    copyblob: strength of CopyBlob in [0, 1]; 0 is off, 1 pastes as often as `paste_rates` says
    seed: of all random numbers
    scale: (min, max), range of the random zoom of a crop, see `augment`
    pixels: the split's `class_pixels` for CopyBlob, if they are known already

    Item k = epoch * len + frame, so that a frame has new random numbers in each epoch. train.py
    asks for these k; whole frames are items 0 ... len - 1.

    A split other than train and val may have no labels; then all pixels are 255. Raises
    FileNotFoundError that says which files are missing.
    """

    def __init__(self, root, split, crop=None, copyblob=0.0, seed=0, scale=(0.5, 2.0),
                 pixels=None):
        self.root = Path(root).expanduser()
        self.split, self.crop, self.scale, self.seed = split, crop, scale, seed
        images = find_files(self.root / "leftImg8bit" / split, "_leftImg8bit.png")
        labels = find_files(self.root / "gtFine" / split, "_gtFine_labelIds.png")
        if not labels:
            labels = find_files(self.root / "gtFine" / split, TRAIN_IDS_END)
        if not images:
            raise FileNotFoundError(
                f"no frames at {self.root}/leftImg8bit/{split}/<city>/*_leftImg8bit.png with "
                f"labels at {self.root}/gtFine/{split}/<city>/*_gtFine_labelIds.png; pass the "
                "folder that holds leftImg8bit and gtFine as --data or $CITYSCAPES_DATASET "
                "(Cityscapes: unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
                "into it)")
        self.has_labels = len(labels) > 0
        if self.has_labels or split in ("train", "val"):        # these two must have labels
            check_pairs(self.root, split, images, labels)
        self.images = list(images.values())
        self.labels = [labels.get(name) for name in images]
        self.names = [name.split("/")[1] for name in images]
        self.blobs, self.rates = {}, {}             # by train id: what CopyBlob pastes, how often
        if copyblob > 0:
            shares = frame_shares(class_pixels(self) if pixels is None else pixels)
            self.blobs = collect_blobs(self, shares)
            self.rates = paste_rates(shares, self.blobs, copyblob)

    def __len__(self):
        return len(self.images)

    def __iter__(self):     # without it, `for` would not end, as self[k] is valid for every k
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, k):
        epoch, index = divmod(k, len(self))         # k = epoch * len + index
        image, label = self.read(index)
        if self.crop is not None:
            rng = np.random.default_rng((self.seed, epoch, index))
            image, label = self.paste_blobs(image, label, rng)
            image, label = augment(image, label, self.crop, rng, self.scale)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image, torch.from_numpy(np.array(label))

    def paste_blobs(self, image, label, rng):
        """CopyBlob: paste a blob of each rare class, at its rate."""
        for train_id, blobs in self.blobs.items():
            if rng.random() < self.rates[train_id]:
                blob = blobs[rng.integers(len(blobs))]
                image, label = copy_blob(image, label, blob, rng)
        return image, label

    def read(self, index):
        """Frame `index` as two Pillow images of one size: RGB, and train ids (mode L)."""
        image = read_image(self.images[index])
        if not self.has_labels:
            return image, Image.new("L", image.size, IGNORE)
        label = read_label(self.labels[index])
        if image.size != label.size:
            raise ValueError(f"{self.labels[index]}: its size is {label.size}, but the size of "
                             f"its frame is {image.size}; replace one of them")
        return image, label


def find_files(folder, ending):
    """The files folder/<city>/<name><ending> -> dict {"<city>/<name>": path}, sorted.

    Raises PermissionError for a folder that cannot be read, which `glob` would leave out.
    """
    files = {}
    if not folder.is_dir():
        return files
    for city in sorted(folder.iterdir()):
        if not city.is_dir():
            continue
        for path in sorted(city.iterdir()):         # macOS leaves "._<name>" files on other disks
            if path.name.endswith(ending) and not path.name.startswith("."):
                files[f"{city.name}/{path.name.removesuffix(ending)}"] = path
    return files


# ------------------------------------------------------------------------------- augmentation

JITTER = 0.25                   # brightness, contrast, saturation: each factor is 1 +- JITTER


def place_window(length, crop, zoom, rng):
    """Place a window of crop / zoom pixels at random on one axis of a frame of `length` pixels.

    A window that is shorter than the frame lies in it; a longer one contains it.
    -> start, end: the part of the window inside the frame, in pixels of the frame;
       crop_start, crop_end: where this part goes in the crop, in pixels of the crop
    Examples for a frame of 1000 pixels and a crop of 600, with `offset` where the window begins:
        zoom 2:    the window has 300 pixels;  offset 450 -> (450, 750, 0, 600)
        zoom 0.5:  the window has 1200 pixels; offset -150 -> (0, 1000, 75, 575), the rest is padded
    """
    window = crop / zoom
    if window <= length:
        offset = rng.uniform(0, length - window)
    else:
        offset = rng.uniform(length - window, 0)
    start, end = max(0, offset), min(length, offset + window)
    crop_start, crop_end = round((start - offset) * zoom), round((end - offset) * zoom)
    return start, end, crop_start, max(crop_start + 1, crop_end)        # at least one pixel


def augment(image, label, crop, rng, scale=(0.5, 2.0)):
    """Zoom and crop, color jitter, flip: RGB and label Pillow images -> two of size `crop`.

    A window of the frame is resized to the crop, so that zoom and crop are one operation:

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
    Padding is the mean color, and 255 (ignored) in the label.
    """
    height, width = crop
    zoom = math.exp(rng.uniform(math.log(scale[0]), math.log(scale[1])))
    left, right, x0, x1 = place_window(image.width, width, zoom, rng)
    top, bottom, y0, y1 = place_window(image.height, height, zoom, rng)
    box = (left, top, right, bottom)                # in the frame
    size, corner = (x1 - x0, y1 - y0), (x0, y0)     # of the resized box, in the crop

    image_crop = Image.new("RGB", (width, height), MEAN_COLOR)
    label_crop = Image.new("L", (width, height), IGNORE)
    image_crop.paste(jitter(image.resize(size, Image.BILINEAR, box), rng), corner)
    label_crop.paste(label.resize(size, Image.NEAREST, box), corner)
    if rng.random() < 0.5:
        image_crop = ImageOps.mirror(image_crop)
        label_crop = ImageOps.mirror(label_crop)
    return image_crop, label_crop


def jitter(image, rng):
    """Random brightness, contrast and saturation, each a factor in [1 - JITTER, 1 + JITTER].

    With gray = 0.299 R + 0.587 G + 0.114 B:
        y = saturation * x + (1 - saturation) * gray
        z = brightness * (contrast * (y - 128) + 128)
    Both are affine in R, G, B, so one 3 x 4 color matrix does both.
    """
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, 3)
    gray = np.tile([0.299, 0.587, 0.114], (3, 1))               # 3 x 3: each row gives the gray
    matrix = np.zeros((3, 4))
    matrix[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * gray)
    matrix[:, 3] = brightness * (1 - contrast) * 128
    return image.convert("RGB", tuple(matrix.ravel()))          # Pillow applies the matrix


# ----------------------------------------------------------------------------------- CopyBlob

# Cityscapes has few pixels of wall, fence, bus and train, and networks often miss them. CopyBlob
# cuts a blob, the pixels of such a class in a range of columns of one frame, moves it along the
# street, and pastes it into another frame (assets/copyblob.png):
#
#     horizon ------------------------- V        V: the vanishing point of the street,
#                                     / |           taken to be in the middle
#                        +------+   /   |
#                        |      | /     | drop
#                        | blob /       |        /: the path of the foot along the street
#                        +----x---------+        x: the foot, the blob's lowest point
#                             |<- side->|
#
# A bus with its foot 100 rows below the horizon and 60 columns beside V, for example, is half as
# large when it has driven away to 50 rows below the horizon, 30 columns beside V. In general, on a
# flat street, the size of an object in pixels is proportional to `drop`, the distance of its foot
# below the horizon. So if it moves along the street until its foot is at drop', its width, height
# and side are all multiplied by scale = drop' / drop.

# Classes of large objects that are rare and often missed, and what each of them stands on.
CARRIER = {"wall": "sidewalk", "fence": "sidewalk", "bus": "road", "train": "road"}
ALWAYS_IN_FRONT = [TRAIN_ID["person"], TRAIN_ID["rider"]]
IN_FRONT_IF_NEARER = [TRAIN_ID[name] for name in (
    "pole", "traffic light", "traffic sign", "car", "truck", "bus", "train", "motorcycle",
    "bicycle")] + [IGNORE]              # IGNORE: for example the recording car
HORIZON = 0.42          # row of the horizon / height of the frame, in Cityscapes
LEAST_SHARE = 0.005     # of a frame; smaller pieces are not cut
WIDEST_GAP = 0.03       # of the width: people and poles in front of a wall do not split it
RARE = 0.01             # a class is pasted only if its mean share of a frame's labels is below this
ADDED = 3               # pixels to paste / pixels that the class has; see `paste_rates`
Blob = namedtuple("Blob", "train_id image mask foot_column side drop area")


def choose_piece(mask, rng):
    """Choose a range of columns where a class occurs -> (left, right, pixels), or None.

    mask: bool H x W, where the class is. Gaps up to WIDEST_GAP do not split a piece. Large pieces
    are chosen more often, those below LEAST_SHARE never.
    """
    columns = np.flatnonzero(mask.any(axis=0))
    gaps = np.flatnonzero(np.diff(columns) > WIDEST_GAP * mask.shape[1])
    pieces = np.split(columns, gaps + 1)
    pixels = np.array([mask[:, piece].sum() for piece in pieces])
    pixels[pixels < LEAST_SHARE * mask.size] = 0
    if pixels.sum() == 0:
        return None
    chosen = rng.choice(len(pieces), p=pixels / pixels.sum())
    piece = pieces[chosen]
    return int(piece[0]), int(piece[-1]) + 1, pixels[chosen]


def cut_blob(image, label, train_id, rng):
    """Cut a piece of a class out of a frame -> Blob, or None if there is none.

    image, label: Pillow images, RGB and train ids (mode L)
    Blob: image and mask are Pillow images (RGB and 1 bit) of one size; foot_column is the column of
    the foot in them; side (negative to the left of V) and drop are the distances of the foot from V
    in the frame; area is the blob's share of the frame's pixels
    """
    mask = np.asarray(label) == train_id
    piece = choose_piece(mask, rng)
    if piece is None:
        return None
    left, right, pixels = piece
    rows = np.flatnonzero(mask[:, left:right].any(axis=1))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    box = (left, top, right, bottom)

    lowest = np.flatnonzero(mask[bottom - 1, left:right])       # columns of its lowest row
    foot_column = int(np.median(lowest))
    side = left + foot_column - image.width / 2
    drop = bottom - HORIZON * image.height
    if drop < 1:                                    # it does not reach below the horizon
        return None
    return Blob(train_id, image.crop(box), Image.fromarray(mask).crop(box), foot_column, side,
                drop, pixels / mask.size)


def mirror(blob):
    """The same blob on the other side of the street."""
    return blob._replace(image=ImageOps.mirror(blob.image), mask=ImageOps.mirror(blob.mask),
                         foot_column=blob.image.width - 1 - blob.foot_column,
                         side=-blob.side)


def scale_at(y, label, blob):
    """The scale of a blob whose foot is moved to row y of a frame; y + 1 is its lower edge."""
    return (y + 1 - HORIZON * label.height) / blob.drop


def find_place(label, blob, rng):
    """Choose where the foot of a blob goes: (x, y) on its carrier, or None if there is no place.

    The scale is between 0.5 and 2. When a blob moves along the street, the distance of its foot
    from the middle is multiplied by the scale. Of four random places, left or right of the middle,
    `find_place` takes the one whose distance fits best: what stood at the curb stays near the curb.
    """
    carrier = TRAIN_ID[CARRIER[CLASSES[blob.train_id].name]]
    step = max(1, label.height // 128)              # every step-th pixel is enough
    ys, xs = step * np.array(np.nonzero(np.asarray(label)[::step, ::step] == carrier))
    scales = scale_at(ys, label, blob)              # one for each place (xs[i], ys[i])
    fitting = np.flatnonzero((scales > 0.5) & (scales < 2))     # these are numbers i of places
    if len(fitting) == 0:
        return None
    four = rng.choice(fitting, 4)
    distances = np.abs(xs[four] - label.width / 2)
    wanted_distances = scales[four] * abs(blob.side)
    best = four[np.argmin(np.abs(distances - wanted_distances))]
    return int(xs[best]), int(ys[best])


def copy_blob(image, label, blob, rng):
    """Paste a blob with its foot on its CARRIER -> new image and label.

    What lies outside of the frame is clipped, and people and what seems nearer stay in front, see
    `visible_part`. Returns the same image and label if there is no place.
    Adapted from CopyBlob in hoya012/semantic-segmentation-tutorial-pytorch, which copies all pixels
    of a rare class to a random place, and Copy-Paste (Ghiasi et al. 2020, arXiv 2012.07177).

    image, label: Pillow images, RGB and train ids (mode L)
    """
    place = find_place(label, blob, rng)
    if place is None:
        return image, label
    x, y = place
    if (x < label.width / 2) != (blob.side < 0):    # the blob comes from the other side
        blob = mirror(blob)
    scale = scale_at(y, label, blob)
    width, height = round(scale * blob.image.width), round(scale * blob.image.height)
    left, top = x - int(scale * blob.foot_column), y + 1 - height

    mask = np.asarray(blob.mask.resize((width, height), Image.NEAREST))
    # Outside of the frame, `crop` gives 0, road, which is never in front.
    covered = np.asarray(label.crop((left, top, left + width, top + height)))
    visible = Image.fromarray(visible_part(mask, covered))

    image, label = image.copy(), label.copy()
    image.paste(blob.image.resize((width, height), Image.BILINEAR), (left, top), visible)
    label.paste(blob.train_id, (left, top), visible)
    return image, label


def visible_part(mask, covered):
    """The part of a blob that nothing hides -> bool H x W.

    mask: bool H x W, the pixels of the blob; covered: uint8 H x W, the frame's train ids there.
    People stay in front of a blob. So do the things of IN_FRONT_IF_NEARER in each column where the
    blob's lowest pixel would land on one of them: what hides the foot of an object stands between
    it and the camera. As columns are decided one by one, a thing may be cut at a column.
    Example: a bus covers four pixels of a column, from the top building, car, car, road. Its lowest
    pixel lands on the road, so the bus is nearer than the car and hides it. For building, building,
    car, car, the car stays in front.
    """
    people = np.isin(covered, ALWAYS_IN_FRONT)
    things = np.isin(covered, IN_FRONT_IF_NEARER)
    # For each column, the lowest row of the mask; where the column has none, the last row.
    lowest_row = len(mask) - 1 - np.argmax(mask[::-1], axis=0)
    thing_is_nearer = things[lowest_row, np.arange(mask.shape[1])]      # for each column
    return mask & ~people & ~(things & thing_is_nearer)


def frame_shares(pixels):
    """`class_pixels` as shares of the labeled pixels of each frame -> float frames x 19."""
    return pixels / np.maximum(pixels.sum(axis=1, keepdims=True), 1)


def collect_blobs(dataset, shares, most=64):
    """Cut the blobs to paste, from up to `most` frames for each rare class -> {train id: [Blob]}.

    They are cut once and kept in memory, as reading a second frame for each sample would double
    its cost. Frames are sampled in proportion to what they show of the class. The result depends
    only on the frames and dataset.seed. Prints a line if there is nothing to paste.
    shares: from `frame_shares`
    """
    def cut(index, train_id, rng):
        image, label = dataset.read(index)
        return cut_blob(image, label, train_id, rng)

    # Samples use (seed, epoch, index). A fourth number keeps this stream apart from theirs.
    rng = np.random.default_rng((dataset.seed, 0, 0, 1))
    blobs = {}
    with ThreadPoolExecutor() as pool:
        for train_id in [TRAIN_ID[name] for name in CARRIER]:
            share = shares[:, train_id]
            is_rare = share.mean() < RARE
            chance = np.where(share < LEAST_SHARE, 0, share)        # of each frame to be chosen
            count = min(most, np.count_nonzero(chance))
            if count == 0 or not is_rare:
                continue
            frames = rng.choice(len(chance), count, replace=False, p=chance / chance.sum())
            rngs = rng.spawn(count)                 # one for each frame, as threads have no order
            found = list(pool.map(cut, frames.tolist(), [train_id] * count, rngs))
            found = [blob for blob in found if blob is not None]
            if found:
                blobs[train_id] = found
    if not blobs:
        print(f"CopyBlob pastes nothing: none of {', '.join(CARRIER)} is rare (below {RARE:.0%} of "
              f"the pixels) and covers {LEAST_SHARE:.1%} of a frame in one piece", flush=True)
    return blobs


def paste_rates(shares, blobs, strength):
    """How often each class is pasted -> {train id: rate}, in blobs per frame, from 0 to 1.

    At strength 1, the pasted blobs have about ADDED times the pixels that the class has by itself,
    if nothing hides them.
    Example: the class has 0.2 % of all pixels, and a blob is 1.5 % of a frame on average. Then a
    frame gets a blob with probability ADDED * 0.2 / 1.5 = 0.4.

    shares, blobs: from `frame_shares` and `collect_blobs`; strength: in [0, 1]
    """
    rates = {}
    for train_id, found in blobs.items():
        mean_area = np.mean([blob.area for blob in found])
        rates[train_id] = strength * min(1, ADDED * shares[:, train_id].mean() / mean_area)
    return rates


# ------------------------------------------------------------------------------ class weights


def class_pixels(dataset):
    """Count the pixels of each class in each label of a Cityscapes split -> int64 frames x 19.

    The counts are cached in the root of the data, with a hash of the label files' names, sizes
    and times and of LABEL_TO_TRAIN: if any of them changes, the labels are counted again. After a
    change of `read_label`, delete the file. Without write access, they are counted every time.
    """
    files = []
    for path in dataset.labels:
        stat = path.stat()
        files.append((path.name, stat.st_size, stat.st_mtime_ns))
    key = hashlib.sha256(repr((files, LABEL_TO_TRAIN.tolist())).encode()).hexdigest()
    cache = dataset.root / f"class_pixels_{dataset.split}.npz"
    try:
        with np.load(cache) as saved:
            if str(saved["key"]) == key:
                return saved["pixels"]
    except Exception:                               # there is no cache yet, or it is broken
        pass
    print(f"counting the pixels of each class in {len(files)} labels", flush=True)
    with ThreadPoolExecutor() as pool:              # threads, as Pillow releases Python's lock
        pixels = list(pool.map(count_classes, dataset.labels))
    pixels = np.array(pixels, np.int64)
    part = cache.with_suffix(f".{os.getpid()}.npz")
    try:
        np.savez(part, key=key, pixels=pixels)
        os.replace(part, cache)
    except OSError as error:
        print(f"not cached in {cache} ({error.strerror})", flush=True)
        with contextlib.suppress(OSError):
            part.unlink()
    return pixels


def count_classes(path):
    """Pixels of each class in a label file -> list of 19 ints."""
    return read_label(path).histogram()[:len(CLASSES)]


def class_weights(pixels, scheme):
    """Class weights from `class_pixels` (int frames x 19) -> float32 19, or None for "none".

    enet: w_c = 1 / ln(1.02 + p_c), where p_c is the class's share of all labeled pixels
    (Paszke et al. 2016, arXiv 1606.02147).
    median: w_c = median(f) / f_c, where f_c is the class's share of the labeled pixels of the
    frames that hold it (Eigen and Fergus 2015, arXiv 1411.4734).
    A class without a pixel has weight 0 with "median". Raises ValueError if nothing is labeled.
    """
    if scheme == "none":
        return None
    total = pixels.sum(axis=0)                      # of each class
    if total.sum() == 0:
        raise ValueError("the training labels hold none of the classes, so there are no class "
                         "weights; check the files of --data")
    if scheme == "enet":
        weights = 1 / np.log(1.02 + total / total.sum())
    elif scheme == "median":
        labeled = pixels.sum(axis=1, keepdims=True)            # of each frame
        in_frames_with_class = (labeled * (pixels > 0)).sum(axis=0)
        frequency = total / np.maximum(in_frames_with_class, 1)
        present = frequency > 0
        weights = np.zeros(len(total))
        weights[present] = np.median(frequency[present]) / frequency[present]
    else:
        raise ValueError(f"unknown class weights {scheme!r}; choose from none, enet, median")
    return torch.tensor(weights, dtype=torch.float32)


# ------------------------------------------------------- checks of the input, safe to skip


def check_pairs(root, split, images, labels):
    """Raise FileNotFoundError unless `images` and `labels` (see `find_files`) have equal keys."""
    no_label = sorted(images.keys() - labels.keys())
    no_image = sorted(labels.keys() - images.keys())
    if no_label or no_image:
        examples = ", ".join((no_label + no_image)[:3])
        raise FileNotFoundError(
            f"{root}: {len(no_label)} of {len(images)} {split} frames have no label, and "
            f"{len(no_image)} labels have no frame (for example {examples}); labels must be named "
            f"*_gtFine_labelIds.png, or all of them *{TRAIN_IDS_END}")


def check_label(path, label, has_train_ids):
    """Raise ValueError unless a label picture contains the kind of ids that its file name says."""
    if label.mode != "L":
        raise ValueError(f"{path}: has {label.mode} pixels instead of 8-bit ids (mode L); use "
                         "Cityscapes' *_gtFine_labelIds.png files, or save ids, not colors, as "
                         "8-bit grayscale")
    pixels = np.array(label.histogram())            # of each value, 256
    largest = len(CLASSES) - 1
    if not has_train_ids:
        largest = max(LAST_LABEL_ID, *(c.label_id for c in CLASSES))
    wrong = [value for value in range(largest + 1, 255) if pixels[value] > 0]
    if wrong:
        raise ValueError(f"{path}: has the values {wrong[:5]}, but ids are 0 ... {largest} or 255")
    if not has_train_ids and seem_train_ids(pixels):
        raise ValueError(f"{path}: seems to hold train ids instead of label ids; name such files "
                         f"*{TRAIN_IDS_END}, or, if they do hold label ids, remove this check "
                         "from check_label in data.py")


def seem_train_ids(pixels):
    """Whether a file of label ids seems to hold train ids; pixels: int 256, of each value.

    Label ids 0 ... 6 are leftovers (unlabeled, static, ...) in a small part of a frame, and nearly
    every street has vegetation, sky, people or vehicles, 21 ... 33. Train ids have road, sidewalk
    and building at 0 ... 2, and nothing above 18, or 19 if that stands for ignored.
    """
    low, middle, high = pixels[:7], pixels[7:19], pixels[20:255]            # not 19, see above
    several_low = (low > 0).sum() >= 2
    much_low = low.sum() > middle.sum() / 2
    has_middle = middle.sum() > 0                   # Cityscapes' test labels have none
    low_are_classes = (LABEL_TO_TRAIN[:7] != IGNORE).any()      # if CLASSES was edited
    return several_low and much_low and has_middle and high.sum() == 0 and not low_are_classes


# ----------------------------------------- generated scenes: a demonstration, safe to skip

# Toy street scenes let `python train.py` run without Cityscapes. They have its classes and its kind
# of files. Nothing else depends on how they are drawn: a reader can stop here.

SCENES_MARK = "GENERATED.txt"           # the file that marks a folder as generated
LABEL_ID = {"ego vehicle": 1, **{c.name: c.label_id for c in CLASSES}}
PAINT = [(225, 225, 220), (150, 155, 160), (45, 47, 52), (150, 38, 38), (50, 75, 130)]
COLORS = {              # an object picks one RGB value per name; classes share colors on purpose
    "paint": PAINT, "load": PAINT, "plate": [(195, 45, 45), (45, 85, 165), (215, 180, 50)],
    "cloth": [(45, 48, 60), (180, 60, 50), (60, 100, 180), (210, 205, 190), (110, 140, 60)],
    "stone": [(170, 150, 120), (140, 92, 76), (130, 130, 130), (195, 185, 165), (98, 92, 90)],
    "brick": [(140, 92, 76), (122, 74, 60), (170, 150, 120)], "bark": [(75, 64, 52)],
    "leaf": [(75, 95, 50), (60, 85, 55), (100, 105, 60)], "shade": [(60, 75, 45), (80, 76, 45)],
    "road": [(88, 88, 92), (104, 102, 98), (74, 74, 80)], "dark": [(24, 24, 28)],
    "paving": [(112, 110, 108), (130, 126, 120)], "skin": [(215, 170, 145), (120, 85, 65)],
    "air": [(205, 210, 215), (150, 185, 225), (165, 165, 168)], "white": [(225, 225, 220)],
    "gray": [(185, 190, 195), (160, 165, 170)], "lamp": [(235, 230, 200), (170, 30, 30)],
    "glass": [(48, 56, 66), (85, 95, 105)], "red": [(245, 50, 40)], "green": [(70, 235, 130)]}


# A shape is a list of polygons (color, corners, brightness), painted in this order. A corner is
# (x, y, z) in meters: x away from the middle of the street, y up, z away from the camera.
def bars(color, xs, y0, y1, width, lean=0):
    """A bar at each x of `xs` from the height y0 to y1; its top is shifted by `lean`."""
    left, right = -width / 2, width / 2
    bar = np.array([(left, y0, 0), (right, y0, 0), (right + lean, y1, 0), (left + lean, y1, 0)])
    return [(color, bar + (x, 0, 0), 1) for x in xs]


def discs(color, xs, y, radius):
    """A disc at each x of `xs`, with its middle at the height y."""
    angles = np.arange(16) * math.pi / 8
    disc = np.stack([radius * np.cos(angles), y + radius * np.sin(angles), 0 * angles], 1)
    return [(color, disc + (x, 0, 0), 1) for x in xs]


def side(x, polygons):
    """The same polygons turned onto the side of a box, the plane x, where their x becomes z."""
    return [(color, corners[:, ::-1] + (x, 0, 0), .8) for color, corners, _ in polygons]


def box(color, x, y0, y1, z0, z1):
    """The top, the street side and the front of a box from -x to x: all that the camera sees."""
    top = np.array([(-x, y1, z0), (x, y1, z0), (x, y1, z1), (-x, y1, z1)])
    wall = np.array([(-x, y0, z0), (-x, y1, z0), (-x, y1, z1), (-x, y0, z1)])
    front = np.array([(-x, y0, z0), (x, y0, z0), (x, y1, z0), (-x, y1, z0)])
    return [(color, top, 1.15), (color, wall, .8), (color, front, 1)]


SHAPES = {              # "label: variant"; a name that is no label is painted without a label
    "road": box("road", 60, 0, 0, 1, 150), "terrain": box("leaf", 30, 0, 0, 1, 150),
    "sidewalk": box("paving", 30, 0, .12, 1, 150), "lane mark": box("white", .07, 0, 0, 0, 3),
    "rail": box("dark", .09, 0, 0, 1, 150), "ego vehicle": box("paint", 1, 0, .9, 1.6, 2.6)[:1],
    "person": bars("cloth", [-.13, .13], 0, .9, .19) + bars("load", [0], .85, 1.5, .44)
    + bars("load", [-.3, .3], .8, 1.45, .13) + discs("dark", [0], 1.72, .15)
    + discs("skin", [0], 1.65, .14),
    "rider": bars("cloth", [0], .78, 1, .55) + bars("cloth", [.05], .3, .95, .2, .18)
    + bars("load", [-.15], .85, 1.55, .42, .25) + bars("load", [.45], 1.05, 1.5, .16, -.3)
    + discs("plate", [.18], 1.78, .17) + discs("skin", [.22], 1.67, .14),
    "bicycle": discs("dark", [-.55, .55], .38, .4) + discs("gray", [-.55, .55], .38, .3)
    + bars("paint", [0], .38, .9, .1, -.3) + bars("paint", [0], .38, .85, .1, .4)
    + bars("paint", [.05], .76, .86, .7) + bars("dark", [.55], .38, 1.15, .1, -.15),
    "motorcycle": discs("dark", [-.75, .75], .38, .38) + bars("gray", [.05], .25, .75, .6)
    + bars("dark", [-.5], .75, .9, 1.1, -.1) + bars("paint", [.2], .65, 1.1, .5, .15)
    + bars("gray", [.8], .38, 1.25, .14, -.3) + discs("lamp", [.65], 1.05, .13),
    "pole": bars("gray", [0], 0, 2.8, .28),
    "pole: lamp": bars("gray", [0], 0, 7, .3) + bars("gray", [-.6], 6.9, 7.1, 1.4),
    "traffic light": bars("dark", [0], 2.4, 4.2, .7) + discs("red", [0], 3.85, .22)
    + discs("gray", [0], 3.3, .22) + discs("green", [0], 2.75, .22),
    "traffic sign: round": discs("plate", [0], 2.7, .5) + discs("white", [0], 2.7, .32),
    "traffic sign: board": bars("plate", [0], 2.2, 3.2, 1.6) + bars("white", [0], 2.6, 2.8, 1),
    "car": box("paint", .9, .3, .95, 0, 4.2) + side(-.9, discs("dark", [.8, 3.4], .36, .36))
    + box("paint", .76, .95, 1.5, .2, 3) + side(-.76, bars("glass", [.9, 2.3], 1, 1.4, 1.2))
    + bars("glass", [0], 1, 1.4, 1.3) + bars("lamp", [-.6, .6], .5, .75, .4),
    "truck": box("load", 1.25, .6, 3.6, 2.2, 8) + side(-1.25, discs("dark", [1, 5.5, 6.7], .5, .5))
    + box("paint", 1.15, .5, 2.7, 0, 1.9) + bars("dark", [0], 2.65, 2.8, 2.3)
    + bars("glass", [0], 1.6, 2.4, 2) + bars("lamp", [-.8, .8], .7, 1, .4),
    "bus": box("paint", 1.3, .35, 3.1, 0, 11) + side(-1.3, discs("dark", [2, 8.5], .5, .5))
    + side(-1.3, bars("glass", range(1, 11, 2), 1.4, 2.6, 1.6)) + bars("glass", [0], 1.1, 2.5, 2.3)
    + bars("plate", [0], 2.65, 2.95, 1.6) + bars("lamp", [-.9, .9], .5, .8, .4),
    "train": box("paint", 1.3, .2, 3.5, 0, 30) + side(-1.3, bars("plate", [15], .8, 1.3, 30))
    + side(-1.3, bars("glass", range(1, 30, 2), 1.6, 2.9, 1.5)) + bars("plate", [0], .8, 1.3, 2.6)
    + bars("glass", [0], 1.6, 2.9, 2) + discs("lamp", [-.9, 0, .9], .55, .18),
    "fence": side(0, bars(None, [5.2], 0, 2.2, 10.4) + bars("stone", [5.2], 1.6, 1.8, 10.4)
                  + bars("stone", np.arange(.3, 10.4, .5), 0, 2.2, .28)),
    "wall": box("stone", .2, 0, 2, 0, 10.4)}
for y in np.arange(5) * .4:
    SHAPES["wall"] += side(-.2, bars("brick", np.arange(.5, 10, 1.04), y, y + .34, .95))
for floors in range(1, 6):
    house = box("stone", 4.5, 0, 3.2 * floors + .6, 0, 11)
    for y in np.arange(floors) * 3.2 + 1:
        house += side(-4.5, bars("glass", [1.4, 4.1, 6.9, 9.6], y, y + 1.7, 1.5))
        house += bars("glass", [-3, 0, 3], y, y + 1.7, 1.6)
    SHAPES[f"building: {floors}"] = house
for kind in range(12):
    tree = bars("bark", [0], 0, kind % 4 + 1.5, .3)     # every fourth is a bush
    for x, y in np.random.default_rng(kind).normal((0, kind % 4 + 2), .9, (8, 2)):
        tree += discs("shade", [x], max(y, 1), 1.1) + discs("leaf", [x + .2], max(y, 1) + .3, .8)
    SHAPES[f"vegetation: {kind}"] = tree
BESIDE = {      # the mean number on each side; meters from the curb and from the camera: from, to
    "person": (1.2, .3, 2.2, 5, 14), "pole: lamp": (.6, .2, .6, 7, 18),
    "pole + traffic light": (.5, .2, .6, 7, 16), "pole + traffic sign: round": (.4, .2, .6, 7, 16),
    "pole + traffic sign: board": (.25, .2, .6, 7, 16), "bicycle": (.22, .4, 1.4, 4.5, 9),
    "bicycle + rider": (.22, -2, -.5, 4.5, 9), "motorcycle": (.16, .4, 1.4, 4.5, 9),
    "motorcycle + rider": (.18, -2, -.5, 4.5, 9)}


def draw_scene(rng):
    """One frame: the picture (128 x 256 x 3) and its label ids (128 x 256), both uint8."""
    lane = rng.uniform(2.8, 3.6)
    things = [(0, 0, 0, "road"), (5, 0, 0, "ego vehicle")]  # (layer, z, x, names); last layer last
    things += [(1, z, -lane / 2, "lane mark") for z in range(4, 60, 6)]
    oncoming, ahead = rng.choice(["car", "truck", "bus"], 2, p=[.7, .15, .15])
    if rng.random() < .2:
        oncoming = "train"
        things += [(1, 0, -lane - .75, "rail"), (1, 0, -lane + .75, "rail")]
    things += [(4, rng.uniform(11, 22), -lane, oncoming), (4, rng.uniform(12, 24), 0, ahead)]
    for way in -1, 1:                                   # the left side, the right side
        parking = rng.choice([0, 2.3])
        curb = way * (parking + .3 + lane * (1 - .5 * way))         # we drive in the right lane
        inner = curb + way * rng.choice([0, 1.2], p=[.7, .3])       # some have a verge of grass
        edge = inner + way * rng.uniform(2.2, 3.5)                  # of the sidewalk
        barrier = rng.choice(["", "wall", "fence"], p=[.66, .17, .17])
        things += [(0, 0, curb + 30 * way, "terrain"), (0, 0, inner + 30 * way, "sidewalk"),
                   (0, 0, edge + 30 * way, "terrain")]
        for z in np.arange(rng.uniform(3, 8), 80, 11.5):
            if rng.random() < .65:
                things.append((2, z, edge + 5 * way, f"building: {rng.integers(1, 6)}"))
            things.append((2, z + 5, edge + 3 * way, f"vegetation: {rng.integers(12)}"))
            if rng.random() < .4:
                things.append((4, z + 5, inner + way, f"vegetation: {rng.integers(12)}"))
            if barrier and z < 40:
                things.append((3, z, edge, barrier))
            if parking and z < 40 and rng.random() < .7:
                things.append((4, z + 4, curb - 1.1 * way, "car"))
        for names, (mean, x0, x1, z0, z1) in BESIDE.items():
            for _ in range(rng.poisson(mean)):
                things.append((4, rng.uniform(z0, z1), inner + way * rng.uniform(x0, x1), names))
    things.sort(key=lambda thing: (thing[0], -thing[1]))            # paint far things first
    return render(things, rng)


def render(things, rng):
    """Paint (layer, z, x, names) through a pinhole camera, then add texture, light and noise."""
    focal, center, horizon, haze = rng.uniform((440, 196, 95, .002), (500, 316, 113, .012))
    air = np.array(COLORS["air"][rng.integers(3)]) + rng.normal(0, 6, 3)
    image = Image.new("RGB", (512, 256), tuple(air.astype(int)))    # twice the frame; shrunk below
    label = Image.new("L", (512, 256), LABEL_ID["sky"])
    image_pen, label_pen = ImageDraw.Draw(image), ImageDraw.Draw(label)
    for _, place_z, place_x, names in things:
        tint = rng.normal(0, 7, 3)
        colors = {name: tint + rgbs[rng.integers(len(rgbs))] for name, rgbs in COLORS.items()}
        for name in names.split(" + "):
            label_id = LABEL_ID.get(name.split(":")[0])
            for color, corners, brightness in SHAPES[name]:
                x, y, z = corners.T
                zoom = focal / (place_z + z).clip(1)
                x = center + zoom * (place_x + math.copysign(1, place_x) * x)
                points = list(zip(x, horizon + zoom * (1.6 - y)))
                if label_id:
                    label_pen.polygon(points, label_id)
                if color:
                    clear = math.exp(-haze * (place_z + z.min()))   # the rest is air
                    fill = clear * brightness * colors[color] + (1 - clear) * air
                    image_pen.polygon(points, tuple(fill.clip(0, 255).astype(int)))
    image, label = np.asarray(image.reduce(2), np.float32), np.asarray(label)[::2, ::2]
    leafy = np.isin(label, (LABEL_ID["vegetation"], LABEL_ID["terrain"]))
    for size in 1, 3, 16:                               # of the grain of a texture, in pixels
        grain = rng.normal(0, 1, (128 // size + 1, 256 // size + 1)).astype(np.float32)
        grain = np.asarray(Image.fromarray(grain).resize((256, 128), Image.BILINEAR))
        image = image + ((4 + 10 * leafy) * grain)[..., None]
    light = rng.uniform(.7, 1.15) * (1 + rng.normal(0, .03, 3))
    image = light * image + rng.normal(0, rng.uniform(1, 3.5), image.shape)
    return image.clip(0, 255).astype(np.uint8), label


def make_scenes(root, train=200, val=50, seed=0):
    """Write generated frames as a Cityscapes tree at `root`: the same bytes for the same seed.

    A finished tree stays as it is. Raises FileExistsError where something else is there.
    """
    root = Path(root)
    if (root / SCENES_MARK).exists():
        return
    if root.exists():
        raise FileExistsError(f"{root} exists but holds no generated scenes; rename it")
    print(f"drawing {train + val} street scenes into {root}, once", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    jobs = [("train", 0, i) for i in range(train)] + [("val", 1, i) for i in range(val)]
    with TemporaryDirectory(dir=root.parent, prefix=".scenes-") as folder:
        for split, number, index in jobs:
            frame = draw_scene(np.random.default_rng((seed, number, index)))
            for pixels, kind, suffix in zip(frame, ("leftImg8bit", "gtFine"), ("", "_labelIds")):
                name = f"toytown_000000_{index:06d}_{kind}{suffix}.png"
                path = Path(folder, "tree", kind, split, "toytown", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, compress_level=1)
        Path(folder, "tree", SCENES_MARK).write_text(f"Drawn by data.py with seed {seed}.\n")
        if not (root / SCENES_MARK).exists():           # else another run was first
            os.replace(Path(folder, "tree"), root)
