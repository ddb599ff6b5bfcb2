"""Train a U-Net on Cityscapes, or on generated street scenes where there is no Cityscapes.

    python train.py --loss ce                             # anywhere
    python train.py --data /data/cityscapes --model convnext_tiny --loss ce+dice --copyblob 0.5
    torchrun --nproc_per_node=4 train.py --data /data/cityscapes --batch 32      # 4 GPUs
    python train.py --resume last.pt                      # go on where it stopped

Writes best.pt (the weights of the best validation mIoU, for eval.py), last.pt (all that --resume
needs) and log.csv (a row an epoch) into --out. The frames, crops and random numbers of a step
follow from (seed, step) alone, so a run that was killed and resumed ends like one that was not.
"""
import argparse
import contextlib
import csv
import io
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data import (CLASSES, SCENES_MARK, Cityscapes, class_pixels, class_weights, leave_ctrl_c,
                  make_scenes, normalize)
from eval import (autocast, command_line, evaluate, load_checkpoint, pick_amp, pick_device,
                  summarize, within)
from losses import LOSSES, build_loss
from unet import ENCODERS, MODELS, build_model

RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's


def say(words):
    """Print once, not once a process."""
    if RANK == 0:
        print(words, flush=True)


@contextlib.contextmanager
def rank_0_first():
    """What one process writes (scenes, counts, a download), the others then find."""
    if RANK > 0:
        dist.barrier()
    yield
    if RANK == 0 and WORLD > 1:
        dist.barrier()


# --------------------------------------------------------------------------------- settings

MAY_CHANGE = "data", "epochs", "workers", "device", "amp", "compile", "save_minutes"    # on resume


def parse_args(argv=None):
    """The command line of train.py. With --resume, what is not given is as it was."""
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    count = within(1, 10**6, int)
    p.add_argument("--data", help="Cityscapes' root (default: $CITYSCAPES_DATASET, else scenes)")
    p.add_argument("--model", choices=MODELS, help="default resnet34; for the scenes resnet18")
    p.add_argument("--loss", choices=LOSSES, default="ce")
    p.add_argument("--class-weights", choices=["none", "enet", "median"], default="none")
    p.add_argument("--copyblob", type=within(0, 1), default=0.0, metavar="P",
                   help="probability of pasting a rare class into a training frame (default 0)")
    p.add_argument("--epochs", type=count)
    p.add_argument("--batch", type=count, help="frames a step, over all GPUs together")
    p.add_argument("--crop", type=count, nargs=2, metavar=("H", "W"))
    p.add_argument("--scale", type=within(0.01, 100), nargs=2, metavar=("MIN", "MAX"),
                   help="range of the random enlargement before the crop")
    p.add_argument("--optimizer", choices=["sgd", "adamw"], help="default sgd; ConvNeXt adamw")
    p.add_argument("--lr", type=within(1e-9, 1e3),
                   help="peak rate (default: sgd 0.0015 x batch, for the scenes 0.05; adamw 1e-3)")
    p.add_argument("--encoder-lr", type=within(0, 1e3),
                   help="factor on --lr for a pretrained encoder (default: sgd 0.5, adamw 0.1)")
    p.add_argument("--weight-decay", type=within(0, 1e3), help="default: sgd 5e-4, adamw 0.01")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction,
                   help="ImageNet weights (default: for real frames, where there are any)")
    p.add_argument("--workers", type=within(0, 1000, int), help="processes that load data")
    p.add_argument("--seed", type=within(0, 2**31, int), default=0)
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best at hand)")
    p.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="torch.compile the network")
    p.add_argument("--save-minutes", type=within(0, 1e6), default=5.0,
                   help="write last.pt this often within an epoch, too (default 5)")
    p.add_argument("--out", type=os.path.normpath, default=".",
                   help="folder for best.pt, last.pt, log.csv (default .)")
    p.add_argument("--resume", metavar="LAST_PT", help="go on with the run of this last.pt")
    args = p.parse_args(argv)
    if args.scale and args.scale[0] > args.scale[1]:
        p.error("--scale: MIN is more than MAX")
    if args.resume:
        saved = load_checkpoint(args.resume)["settings"]
        saved = {**saved, "out": str(Path(args.resume).parent), "resume": args.resume}
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        for name in saved.keys() - MAY_CHANGE:
            if getattr(args, name) != saved[name]:
                p.error(f"--{name.replace('_', '-')} is {saved[name]} in {args.resume}: leave it "
                        "out, or start another run in another --out")
    return args


def find_data(args):
    """Settle args.data, and args.generated: whether the frames are drawn here instead of real."""
    args.data = args.data or os.environ.get("CITYSCAPES_DATASET")
    if not args.data:
        args.data = "scenes"
        say("GENERATED SCENES, not Cityscapes: neither --data nor $CITYSCAPES_DATASET is given")
        with rank_0_first():
            make_scenes(args.data)
    else:
        say(f"frames of {args.data}")
    args.data = str(Path(args.data).expanduser().resolve())     # eval.py finds it from anywhere
    args.generated = (Path(args.data) / SCENES_MARK).exists()


def adapt(args, size, device):
    """Settle what the command line left open: the one place where defaults are chosen.

    They are meant for Cityscapes on one GPU of 16 GB. The generated scenes are few and small and
    start from random weights, so they take a small network and many small steps.
    """
    def default(name, value):
        if getattr(args, name) is None:
            setattr(args, name, value)

    gpu, drawn = device.type == "cuda", args.generated
    default("model", "resnet18" if drawn else "resnet34")
    default("pretrained", args.model in ENCODERS and not drawn)
    default("epochs", 10 if drawn else 200)         # minutes on a CPU; as published U-Nets
    default("batch", 2 if drawn else 8 if gpu else 4)           # few frames: more steps of them
    default("crop", [min(512, size[0]), min(1024, size[1])])    # the usual one for Cityscapes
    default("scale", [0.8, 1.25] if drawn else [0.5, 2.0])      # usual; small frames, less
    # As ResNet and ConvNeXt were trained for ImageNet. AdamW's rates are a usual choice, not tuned.
    default("optimizer", "adamw" if args.model.startswith("convnext") else "sgd")
    sgd = args.optimizer == "sgd"
    # SGD's rate grows with the batch (Goyal et al. 2017, arXiv 1706.02677), to about the usual
    # 0.01 at batch 8. A short training from random weights wants a higher one: on the scenes,
    # mIoU is 0.28 at 0.02, 0.34 at 0.05 and 0.37 at 0.1 (README, "The recipe").
    default("lr", 1e-3 if not sgd else 0.05 if drawn else 0.0015 * args.batch)
    default("encoder_lr", 0.5 if sgd else 0.1)      # what is learnt already is to change less
    default("weight_decay", 5e-4 if sgd else 0.01)  # usual for Cityscapes; AdamW's own
    default("workers", min(8, os.cpu_count() or 1) if gpu else 0)   # a CPU is busy enough


# -------------------------------------------------------------------------------- the parts


def set_up_device(args):
    """The device and autocast dtype of this process, which joins its group under torchrun."""
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True           # all crops are of one size: find what is best
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, pick_amp(args.amp, device)


def set_up_data(args, device):
    """The training crops and the validation frames; settles the open settings."""
    find_data(args)
    val_set = Cityscapes(args.data, "val")
    adapt(args, val_set[0][1].shape, device)
    with rank_0_first():                            # which may count the pixels of each class
        train_set = Cityscapes(args.data, "train", args.crop, args.copyblob, args.seed, args.scale)
    if args.batch > len(train_set):
        raise ValueError(f"--batch {args.batch} is more than the {len(train_set)} training frames")
    if args.batch % WORLD:
        raise ValueError(f"--batch {args.batch} cannot be shared equally by {WORLD} processes")
    if args.batch == WORLD and max(args.crop) <= 32 and args.model.startswith("resnet"):
        raise ValueError("one frame of 32 x 32 is a single value at stride 32, which BatchNorm "
                         "cannot normalise: raise --batch or --crop")
    return train_set, val_set


def set_up_loss(args, train_set, device):
    """The loss function, with class weights from the training labels if asked for."""
    if args.class_weights == "none":
        return build_loss(args.loss)
    with rank_0_first():
        weights = class_weights(class_pixels(train_set), args.class_weights)
    say(f"class weights ({args.class_weights}) from the training labels: "
        + ", ".join(f"{c.name} {w:.2f}" for c, w in zip(CLASSES, weights)))
    return build_loss(args.loss, weights.to(device))


def build_optimizer(model, args, device):
    """SGD or AdamW, a peak rate for each group; no decay for biases and norms, which are 1-D."""
    groups = {}
    for name, p in model.named_parameters():
        factor = args.encoder_lr if args.pretrained and name.startswith("encoder.") else 1.0
        groups.setdefault((factor, p.ndim > 1), []).append(p)
    groups = [{"params": params, "peak_lr": args.lr * factor,
               "weight_decay": args.weight_decay * decays}
              for (factor, decays), params in groups.items()]
    fused = device.type != "mps"
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused)
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=fused)


def schedule(step, steps, warmup):
    """Share of the peak learning rate at a step: linear warm-up times poly, (1 - t)^0.9."""
    return min(1.0, (step + 1) / warmup) * (1 - step / steps) ** 0.9


def items_of(step, frames, batch, seed):
    """Items epoch * frames + index of one step, a list: this process's share of the batch.

    Each epoch takes the frames in a random order of its own, whole batches only, as BatchNorm
    cannot do with a last one of one frame. All processes together take the same items whatever
    their number.
    """
    epoch, i = divmod(step, frames // batch)
    rng = np.random.default_rng((seed, epoch, frames))          # an index that no frame has
    order = rng.permutation(frames)[i * batch:(i + 1) * batch]
    return (epoch * frames + order[RANK::WORLD]).tolist()


def write(data, path):
    """Replace a file in one stroke: a crash or a full disk leaves the old one, whole."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror}); mend that, then go on with "
                      "--resume") from error


@contextlib.contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list, to stop where it suits; a second one stops at once."""
    def collect(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    received = []
    before = {s: signal.signal(s, collect) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------- the run

LINE = ("epoch {epoch}/{epochs}  loss {loss:.3f}  lr {lr:.1e}  pixel acc {pixel_accuracy:.3f}  "
        "mIoU {miou:.3f}  Dice {mean_dice:.3f}  {images_per_s:.1f} img/s  "
        "data wait {data_wait:.0%}  left {left}")
POSITION = ("step", "loss_sum", "seconds", "best", "log")       # how far a run is


class Run:
    """One training run: its parts, how far it is, and the loop."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.device, self.dtype = set_up_device(args)
        args.amp = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        self.train_set, self.val_set = set_up_data(args, self.device)
        self.loss_function = set_up_loss(args, self.train_set, self.device)
        torch.manual_seed(args.seed)
        with rank_0_first():                        # which may download the weights
            self.model = build_model(args.model, len(CLASSES), args.pretrained and not args.resume)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, args, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.loss_sum, self.seconds, self.best, self.log = 0, 0.0, 0.0, -1.0, []
        if args.resume:
            self.restore(args.resume)
        net = nn.parallel.DistributedDataParallel(self.model) if WORLD > 1 else self.model
        self.net = torch.compile(net) if args.compile else net
        self.per_epoch = len(self.train_set) // args.batch
        self.steps = args.epochs * self.per_epoch
        if self.step > self.steps:
            raise ValueError(f"--epochs {args.epochs}: the run is further already, at epoch "
                             f"{self.step // self.per_epoch + 1}")

    def restore(self, path):
        """Load a last.pt."""
        last = load_checkpoint(path)
        if "optimizer" not in last:
            raise ValueError(f"{path}: holds a model, but not the run; resume from its last.pt")
        if last["frames"] != len(self.train_set):
            raise ValueError(f"{self.args.data}: has {len(self.train_set)} training frames, but "
                             f"the run of {path} began with {last['frames']}")
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        if last["scaler"]:                          # else the run was not one in float16
            self.scaler.load_state_dict(last["scaler"])
        for name in POSITION:
            setattr(self, name, last[name])

    def save(self, name, **more):
        """Write a checkpoint: the model, and all that eval.py needs to rebuild it."""
        if RANK == 0:
            file, miou = io.BytesIO(), self.log[-1]["miou"] if self.log else None
            torch.save({"model": self.model.state_dict(), "settings": vars(self.args),
                        "epoch": len(self.log), "miou": miou, **more}, file)
            write(file.getbuffer(), self.out / name)

    def save_last(self):
        """Write last.pt. Raises FloatingPointError instead if the weights are not finite."""
        if not torch.stack([v.isfinite().all() for v in self.model.state_dict().values()]).all():
            raise FloatingPointError(f"the weights are not finite after step {self.step}: lower "
                                     "--lr, or try --amp off; last.pt is from before")
        self.saved = time.monotonic()
        self.seconds = self.saved - self.began
        self.save("last.pt", optimizer=self.optimizer.state_dict(), frames=len(self.train_set),
                  scaler=self.scaler.state_dict(), **{k: getattr(self, k) for k in POSITION})

    def train_step(self, images, target):
        """One step -> its loss, a scalar tensor on the device."""
        images, target = (t.to(self.device, non_blocking=True) for t in (images, target))
        share = schedule(self.step, self.steps, min(500, self.per_epoch))
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]
        torch.manual_seed(hash((self.args.seed, self.step, RANK)))  # of integers: always the same
        x = normalize(images).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.dtype):
            logits = self.net(x)
        loss = self.loss_function(logits, target.long())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return loss.detach()

    def tally(self, losses, stop):
        """Add up the losses of the last steps -> whether any process was asked to stop.

        Raises FloatingPointError for one that is not finite, before anything is saved.
        """
        values = torch.stack([*losses, losses[0].new_tensor(bool(stop))])
        if WORLD > 1:
            dist.all_reduce(values)
        *values, stop = (values / WORLD).tolist()
        for step, value in enumerate(values, self.step - len(values)):
            if not math.isfinite(value):
                items = items_of(step, len(self.train_set), self.args.batch, self.args.seed)
                files = [str(self.train_set.images[i % len(self.train_set)]) for i in items]
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {value}, on {', '.join(files)}: "
                    "lower --lr, or try --amp off; last.pt is from before")
            self.loss_sum += value
        return stop > 0

    def validate(self, stop):
        """The confusion matrix of the whole split, of which each process takes a share."""
        def stop_if_asked(*frame):
            if stop:
                raise KeyboardInterrupt

        if WORLD > 1:                               # BatchNorm's averages are each process's own
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        share = torch.utils.data.Subset(self.val_set, range(RANK, len(self.val_set), WORLD))
        matrix = evaluate(self.model, share, self.device, self.dtype, visit=stop_if_asked,
                          workers=self.args.workers)
        if WORLD > 1:
            matrix = matrix.to(self.device)
            dist.all_reduce(matrix)
        return matrix.cpu()

    def end_epoch(self, stop, images_per_s, data_wait):
        """Score the validation frames, log the epoch, and keep the weights if they are the best."""
        self.save_last()                            # before the scoring, which can take its time
        scores = summarize(self.validate(stop))
        if scores["miou"] is None:
            raise ValueError(f"no validation label of {self.args.data} holds any of the 19 classes")
        self.seconds = time.monotonic() - self.began
        row = {"epoch": self.step // self.per_epoch, "loss": self.loss_sum / self.per_epoch,
               "lr": max(group["lr"] for group in self.optimizer.param_groups),
               **{k: scores[k] for k in ("pixel_accuracy", "miou", "mean_dice")},
               "images_per_s": images_per_s, "data_wait": data_wait, "seconds": self.seconds}
        left = round(self.seconds / self.step * (self.steps - self.step))
        say(LINE.format(**row, epochs=self.args.epochs, left=f"{left // 60}m{left % 60:02d}s"))
        self.log.append({**row, **{f"iou {k}": c["iou"] for k, c in scores["classes"].items()}})
        self.loss_sum = 0.0
        if scores["miou"] > self.best:
            self.best = scores["miou"]
            self.save("best.pt")
        if RANK == 0:
            table = io.StringIO(newline="")
            writer = csv.DictWriter(table, self.log[0])
            writer.writeheader()
            writer.writerows(self.log)
            write(table.getvalue().encode(), self.out / "log.csv")
        self.save_last()                            # last: a kill before it scores this epoch anew
        self.net.train()

    def fit(self, stop):
        """Train from where the run is to its end; KeyboardInterrupt once `stop` is not empty."""
        args, losses = self.args, []
        items = (items_of(step, len(self.train_set), args.batch, args.seed)
                 for step in range(self.step, self.steps))
        batches = iter(torch.utils.data.DataLoader(
            self.train_set, batch_sampler=items, num_workers=args.workers,
            worker_init_fn=leave_ctrl_c, pin_memory=self.device.type == "cuda"))
        self.net.train()
        self.saved = time.monotonic()
        self.began = self.saved - self.seconds      # as if it had never stopped
        start, waited, first = self.saved, 0.0, self.step
        while True:
            if len(self.log) < self.step // self.per_epoch:     # an epoch without its score
                spent = time.monotonic() - start
                self.end_epoch(stop, (self.step - first) * args.batch / spent, waited / spent)
                start, waited, first = time.monotonic(), 0.0, self.step
            if self.step >= self.steps:
                return
            asked = time.monotonic()
            images, target = next(batches)
            waited += time.monotonic() - asked
            losses.append(self.train_step(images, target))
            # Reading a loss waits for the GPU, so there it is done but every tenth step.
            if len(losses) < 10 and self.device.type != "cpu" and self.step % self.per_epoch:
                continue
            stopping = self.tally(losses, stop)
            if stopping or time.monotonic() > self.saved + 60 * args.save_minutes:
                self.save_last()
            if stopping:
                raise KeyboardInterrupt
            if RANK == 0 and sys.stdout.isatty():
                rate = (self.step - first) * args.batch / (time.monotonic() - start)
                print(f"\r\033[Kepoch {self.step // self.per_epoch + 1}/{args.epochs}  "
                      f"step {self.step % self.per_epoch}/{self.per_epoch}  "
                      f"loss {losses[-1]:.3f}  {rate:.1f} images/s ", end="", flush=True)
            losses.clear()


def main(argv=None):
    """Run one command line, sys.argv by default -> the rows of log.csv."""
    args = parse_args(argv)
    out = Path(args.out)
    taken = [name for name in ("best.pt", "last.pt", "log.csv") if (out / name).exists()]
    if taken and not args.resume:
        raise ValueError(f"{out.resolve()} holds the {', '.join(taken)} of another run: go on with "
                         f"it (--resume {out / 'last.pt'}) or name another folder (--out)")
    out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    say(f"{args.model}{' (ImageNet weights)' if args.pretrained else ''}, loss {args.loss}, "
        f"{len(run.train_set)} frames, {len(run.val_set)} to validate, "
        f"crop {args.crop[0]} x {args.crop[1]}, batch {args.batch}, {args.epochs} epochs, "
        f"{run.device} {run.dtype or torch.float32}"
        + (f", from step {run.step + 1} of {run.steps}" if args.resume else ""))
    try:
        with stop_signals() as stop:
            run.fit(stop)
    except KeyboardInterrupt:
        say(f"stopped; to go on: python train.py --resume {out / 'last.pt'}")
        sys.exit(130)
    if WORLD > 1:
        dist.destroy_process_group()
    say(f"best validation mIoU {run.best:.3f}; now: python eval.py --ckpt {out / 'best.pt'}")
    return run.log


if __name__ == "__main__":
    command_line(main)
