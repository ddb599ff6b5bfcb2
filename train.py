"""Train a U-Net on Cityscapes, or on generated street scenes where there is no Cityscapes.

    python train.py --loss ce                             # anywhere
    python train.py --data /data/cityscapes --model convnext_tiny --loss ce+dice --copyblob 0.5
    torchrun --nproc_per_node=4 train.py --data /data/cityscapes --batch 32      # 4 GPUs
    python train.py --resume last.pt                      # go on where it stopped

Writes best.pt (the weights of the best validation mIoU, for eval.py), last.pt (all that --resume
needs) and log.csv (a row an epoch) into --out.
"""
import argparse
import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import metrics
from data import (CLASSES, SCENES_MARK, Cityscapes, class_pixels, class_weights, make_scenes,
                  normalize)
from eval import autocast, command_line, evaluate, pick_amp, pick_device
from losses import LOSSES, build_loss
from unet import MODELS, PRETRAINED, build_model

RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's


def wait_for_all():
    """Let every process of torchrun come this far."""
    if WORLD > 1:
        dist.barrier()


def say(*words):
    """Print once, not once a GPU."""
    if RANK == 0:
        print(*words, flush=True)


# --------------------------------------------------------------------------------- settings


def parse_args(argv=None):
    """The command line of train.py. With --resume, what is not given is as it was."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", help="Cityscapes' root (default: $CITYSCAPES_DATASET, else scenes)")
    p.add_argument("--model", choices=MODELS, help="default resnet34; for the scenes resnet18")
    p.add_argument("--loss", choices=LOSSES, default="ce")
    p.add_argument("--class-weights", choices=["none", "enet", "median"], default="none")
    p.add_argument("--copyblob", type=float, default=0.0, metavar="P",
                   help="probability of pasting a rare class into a training frame (default 0)")
    p.add_argument("--epochs", type=int)
    p.add_argument("--batch", type=int, help="frames a step, over all GPUs together")
    p.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"))
    p.add_argument("--scale", type=float, nargs=2, metavar=("MIN", "MAX"),
                   help="range of the random enlargement before the crop")
    p.add_argument("--optimizer", choices=["sgd", "adamw"], help="default sgd; ConvNeXt adamw")
    p.add_argument("--lr", type=float, help="peak learning rate (default: sgd 0.05, adamw 1e-3)")
    p.add_argument("--encoder-lr", type=float, default=0.1,
                   help="factor on --lr for a pretrained encoder (default 0.1)")
    p.add_argument("--weight-decay", type=float, help="default: sgd 5e-4, adamw 0.01")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction,
                   help="ImageNet weights (default: for real frames, where there are any)")
    p.add_argument("--workers", type=int, help="processes that load data")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best at hand)")
    p.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--out", default=".", help="folder for best.pt, last.pt, log.csv (default .)")
    p.add_argument("--resume", metavar="LAST_PT", help="go on with the run of this last.pt")
    args = p.parse_args(argv)
    if args.resume:
        saved = load_last(args.resume)["settings"]
        p.set_defaults(**{**saved, "out": str(Path(args.resume).parent)})
        args = p.parse_args(argv)
    return args


def find_data(args):
    """Settle args.data, and args.generated: whether the frames are drawn here instead of real."""
    args.data = args.data or os.environ.get("CITYSCAPES_DATASET")
    if not args.data:
        args.data = "scenes"
        say("GENERATED SCENES, not Cityscapes: neither --data nor $CITYSCAPES_DATASET is given")
        if RANK == 0:
            make_scenes(args.data)
        wait_for_all()
    else:
        say(f"frames of {args.data}")
    args.data = str(Path(args.data).expanduser().resolve())     # eval.py finds it from anywhere
    args.generated = (Path(args.data) / SCENES_MARK).exists()


def adapt(args, size, frames, device):
    """Settle what the command line left open: the one place where defaults are chosen.

    They are meant for Cityscapes on one GPU of 16 GB. The generated scenes are few and small and
    start from random weights, so they take a small network and many small steps.
    """
    def default(name, value):
        if getattr(args, name) is None:
            setattr(args, name, value)

    gpu, small = device.type == "cuda", args.generated
    default("model", "resnet18" if small else "resnet34")
    default("pretrained", args.model in PRETRAINED and not small)
    default("epochs", 10 if small else 200)
    default("batch", 2 if small else 8 if gpu else 4)
    default("crop", [min(512, size[0]), min(1024, size[1])])
    default("scale", [0.8, 1.25] if small else [0.5, 2.0])
    default("optimizer", "adamw" if args.model == "convnext_tiny" else "sgd")
    default("lr", 0.05 if args.optimizer == "sgd" else 1e-3)
    default("weight_decay", 5e-4 if args.optimizer == "sgd" else 0.01)
    default("workers", min(8, os.cpu_count() or 1) if gpu else 0)   # a CPU is busy enough
    if args.batch > frames:
        say(f"only {frames} training frames: a batch of {frames}, not {args.batch}")
        args.batch = frames
    if min(args.batch, args.epochs, *args.crop) < 1:
        raise ValueError("--batch, --epochs and --crop take numbers from 1 up")
    if args.batch % WORLD:
        raise ValueError(f"a batch of {args.batch} cannot be shared equally by {WORLD} processes")


# ---------------------------------------------------------------------------- the long middle


class FrameOrder(torch.utils.data.Sampler):
    """The frames of one epoch in random order, as items epoch * frames + index of the dataset.

    Only whole batches, as BatchNorm cannot do with a last one of one frame. Each process takes
    every WORLD-th item, so all together see the same frames whatever WORLD is.
    """

    def __init__(self, frames, batch, seed):
        self.frames, self.seed, self.epoch = frames, seed, 0
        self.used = frames // batch * batch

    def __len__(self):
        return self.used // WORLD

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.frames)
        return iter((self.epoch * self.frames + order[:self.used][RANK::WORLD]).tolist())


def parameter_groups(model, args):
    """The parameters by learning rate and decay: no decay for biases and norms, which are 1-D."""
    groups = {}
    for name, p in model.named_parameters():
        factor = args.encoder_lr if args.pretrained and name.startswith("encoder.") else 1.0
        groups.setdefault((factor, p.ndim > 1), []).append(p)
    return [{"params": params, "peak_lr": args.lr * factor,
             "weight_decay": args.weight_decay * decays}
            for (factor, decays), params in groups.items()]


def schedule(step, steps, warmup):
    """Share of the peak learning rate at a step: linear warm-up, then poly (1 - t)^0.9 to 0."""
    return min(1.0, (step + 1) / warmup) * (1 - step / steps) ** 0.9


def train_epoch(net, loader, loss_function, optimizer, scaler, args, epoch, device, dtype):
    """One pass over the loader -> (mean loss, images/s, share of the time spent waiting for data).

    Raises FloatingPointError when the loss is no longer finite.
    """
    net.train()
    steps = len(loader)
    total, waited, start = torch.zeros((), device=device), 0.0, time.time()
    batches = iter(loader)
    for i in range(steps):
        asked = time.time()
        images, target = (t.to(device, non_blocking=True) for t in next(batches))
        waited += time.time() - asked
        share = schedule(epoch * steps + i, args.epochs * steps, min(500, steps))
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak_lr"]

        x = normalize(images).contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            logits = net(x)
        loss = loss_function(logits, target.long())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        total += loss.detach()
        if i % 20 == 19 or i == steps - 1:          # reading the loss waits for the GPU: seldom
            mean, rate = total.item() / (i + 1), (i + 1) * args.batch / (time.time() - start)
            if not np.isfinite(mean):
                raise FloatingPointError("the loss is not finite: lower --lr, or --amp off")
            if RANK == 0 and sys.stdout.isatty():
                print(f"\r\033[Kepoch {epoch + 1}/{args.epochs}  step {i + 1}/{steps}  "
                      f"loss {mean:.3f}  {rate:.1f} images/s ", end="", flush=True)
    return mean, rate, waited / (time.time() - start)


# -------------------------------------------------------------------------------- checkpoints


def save(state, path):
    """Write a checkpoint in one stroke: a crash leaves the old file, never half a new one."""
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def load_last(path):
    """Read a last.pt. Raises ValueError for any other file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["optimizer"]
        return saved
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such last.pt to resume from")
    except Exception as error:
        raise ValueError(f"{path}: not a last.pt that train.py wrote ({error})") from error


def write_log(rows, path):
    """log.csv anew: a row for each epoch so far."""
    with open(f"{path}.part", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.part", path)


# ------------------------------------------------------------------------------------ the run


def set_up_device(args):
    """The device and autocast dtype of this process, which joins its group under torchrun."""
    device = pick_device(args.device)
    if WORLD > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, pick_amp(args.amp, device)


def set_up_data(args, device):
    """The loader of the training crops, and the validation frames; settles the open settings."""
    find_data(args)
    val_set, train_set = Cityscapes(args.data, "val"), Cityscapes(args.data, "train")
    adapt(args, val_set[0][1].shape, len(train_set), device)
    if RANK == 0 and (args.copyblob or args.class_weights != "none"):
        class_pixels(train_set)                     # counted and cached before the others ask
    wait_for_all()
    train_set = Cityscapes(args.data, "train", args.crop, args.copyblob, args.seed, args.scale)
    loader = torch.utils.data.DataLoader(
        train_set, args.batch // WORLD, sampler=FrameOrder(len(train_set), args.batch, args.seed),
        num_workers=args.workers, persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda")
    return loader, val_set


def set_up_loss(args, train_set, device):
    """The loss function, with class weights from the training labels if asked for."""
    if args.class_weights == "none":
        return build_loss(args.loss)
    weights = class_weights(class_pixels(train_set), args.class_weights)
    say(f"class weights ({args.class_weights}) from the training labels: "
        + ", ".join(f"{c.name} {w:.2f}" for c, w in zip(CLASSES, weights)))
    return build_loss(args.loss, weights.to(device))


def validate(model, val_set, device, dtype, workers):
    """The confusion matrix of the whole split, of which each process takes a share."""
    if WORLD > 1:                                   # BatchNorm's averages are each process's own
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    share = torch.utils.data.Subset(val_set, range(RANK, len(val_set), WORLD))
    matrix = evaluate(model, share, device, dtype, workers=workers)
    if WORLD > 1:
        matrix = matrix.to(device)
        dist.all_reduce(matrix)
    return matrix.cpu()


LINE = ("loss {loss:.3f}  lr {lr:.1e}  pixel acc {pixel_accuracy:.3f}  mIoU {miou:.3f}  "
        "Dice {mean_dice:.3f}  {images_per_s:.1f} img/s  data wait {data_wait:.0%}")


def summary(matrix, **row):
    """A row of log.csv: `row`, and the scores of a confusion matrix."""
    iou = metrics.iou(matrix)
    return {**row, "pixel_accuracy": metrics.pixel_accuracy(matrix).item(),
            "miou": iou.nanmean().item(), "mean_dice": metrics.dice(matrix).nanmean().item(),
            **{f"iou {c.name}": i.item() for c, i in zip(CLASSES, iou)}}


def restore(path, model, optimizer, scaler):
    """Load a last.pt into the three -> (rows of the log so far, best mIoU so far)."""
    last = load_last(path)
    model.load_state_dict(last["model"])
    peaks = [(g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    optimizer.load_state_dict(last["optimizer"])
    for group, (peak, decay) in zip(optimizer.param_groups, peaks):     # as the command line says
        group["peak_lr"], group["weight_decay"] = peak, decay
    scaler.load_state_dict(last["scaler"])
    return last["log"], last["best"]


def main(argv=None):
    """Run one command line, sys.argv by default -> the rows of log.csv."""
    args = parse_args(argv)
    out = Path(args.out)
    taken = [name for name in ("best.pt", "last.pt", "log.csv") if (out / name).exists()]
    if taken and not (args.resume and Path(args.resume).resolve().parent == out.resolve()):
        raise ValueError(f"{out.resolve()} holds the {', '.join(taken)} of another run: go on with "
                         f"it (--resume {out / 'last.pt'}) or name another folder (--out)")
    device, dtype = set_up_device(args)
    loader, val_set = set_up_data(args, device)
    loss_function = set_up_loss(args, loader.dataset, device)

    torch.manual_seed(args.seed)
    model = build_model(args.model, len(CLASSES), args.pretrained and not args.resume)
    model.to(device, memory_format=torch.channels_last)
    groups, fused = parameter_groups(model, args), device.type != "mps"
    optimizer = (torch.optim.AdamW(groups, fused=fused) if args.optimizer == "adamw" else
                 torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=fused))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rows, best = [], -1.0
    if args.resume:
        rows, best = restore(args.resume, model, optimizer, scaler)
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    net = torch.compile(net) if args.compile else net
    out.mkdir(parents=True, exist_ok=True)
    say(f"{args.model}{' (ImageNet weights)' if args.pretrained else ''}, loss {args.loss}, "
        f"{len(loader.dataset)} frames, {len(val_set)} to validate, "
        f"crop {args.crop[0]} x {args.crop[1]}, batch {args.batch}, {args.epochs} epochs, "
        f"{device} {dtype or torch.float32}{f', from epoch {len(rows) + 1}' if rows else ''}")

    started, first = time.time(), len(rows)
    for epoch in range(first, args.epochs):
        loader.sampler.epoch = epoch
        torch.manual_seed(hash((args.seed, epoch, RANK)))       # a resumed run draws the same
        loss, rate, waiting = train_epoch(
            net, loader, loss_function, optimizer, scaler, args, epoch, device, dtype)
        matrix = validate(model, val_set, device, dtype, args.workers)
        lr = max(group["lr"] for group in optimizer.param_groups)
        seconds = time.time() - started
        rows.append(summary(matrix, epoch=epoch + 1, loss=loss, lr=lr, images_per_s=rate,
                            data_wait=waiting, seconds=seconds))
        left = seconds / (epoch + 1 - first) * (args.epochs - epoch - 1)
        say(f"epoch {epoch + 1}/{args.epochs}  " + LINE.format(**rows[-1])
            + f"  left {left // 60:.0f}m{left % 60:02.0f}s")
        if RANK == 0:
            miou = rows[-1]["miou"]
            state = {"model": model.state_dict(), "settings": vars(args), "epoch": epoch + 1,
                     "miou": miou}
            if miou > best:
                save(state, out / "best.pt")
            best = max(best, miou)
            save({**state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                  "log": rows, "best": best}, out / "last.pt")
            write_log(rows, out / "log.csv")
    if WORLD > 1:
        dist.destroy_process_group()
    say(f"best validation mIoU {best:.3f}; now: python eval.py --ckpt {out / 'best.pt'}")
    return rows


if __name__ == "__main__":
    command_line(main)
