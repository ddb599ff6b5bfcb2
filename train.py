"""Train a U-Net on Cityscapes, or on generated street scenes if there is no Cityscapes.

    python train.py --loss ce                             # anywhere
    python train.py --resume last.pt                      # continue a run that was stopped

Writes into --out: best.pt, the weights of the best validation mIoU, for eval.py; last.pt, all that
--resume needs; log.csv, one row for each epoch; curves.png, its picture; with --copyblob also
copyblob.png. last.pt is saved after the first step of a run, every 5 minutes, on signals, and at
the end of each epoch, before and after its validation.
"""
# The training is in `train_step`, `train_epoch` and `main`. What they need is built before them.
# What they call follows: the end of an epoch, the files, resume, several processes and signals.
import argparse
import contextlib
import csv
import io
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import metrics
from data import (CLASS_WEIGHTS, CLASSES, SCENES_MARK, Cityscapes, copy_blob, count_classes,
                  epoch_batches, make_loader, make_scenes, normalize)
from eval import (PALETTE, command_line, curves_picture, find_checkpoint, load_checkpoint,
                  load_weights, number_in, path_option, pick_amp, pick_device, picture_grid,
                  predictions, progress, report_unused, summarize)
from losses import LOSSES, build_loss
from unet import MODELS, SPECS, build_model

# torchrun starts WORLD_SIZE processes, each with a RANK from 0. Without it, there is one, rank 0.
# First read the code for this case.
# All ranks must call the operations of torch.distributed together, as each waits for the others.
# NCCL executes them on GPUs, Gloo on CPUs. If one rank fails, torchrun ends the others.
#     all_reduce      the sum over all ranks, in place
#     broadcast       a copy of rank 0's value
#     barrier         wait until all ranks are here
RANK = int(os.environ.get("RANK") or 0)
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)

# ------------------------------------------------------------------------------------ options

def parse_args(argv=None):
    """Parse the command line -> Namespace; an option that was not typed is None. A new option needs
    a line here, without a default, and its default in choose_options. ValueError, SystemExit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, allow_abbrev=False)
    add, count, at_least_0 = parser.add_argument, number_in(1, 10**6, int), number_in(0, 1e6)
    add("--data", type=path_option, help="data folder (default: $CITYSCAPES_DATASET, else scenes)")
    add("--model", choices=MODELS, help="(default: that of --init, or resnet34; scenes resnet18)")
    add("--loss", choices=LOSSES, help="(default: ce, cross-entropy)")
    add("--class-weights", choices=CLASS_WEIGHTS, help="weights in the loss (default: none)")
    add("--copyblob", type=number_in(0, 1), nargs="?", const=1.0, metavar="P",
        help="paste a rare class into a frame with probability P (default: 0; without a value 1)")
    add("--epochs", type=count, help="(default: 200; for scenes 10)")
    add("--batch", type=count, help="frames, all GPUs together (default: 8; convunext 4; scenes 2)")
    add("--crop", type=number_in(64, 10**4, int), nargs=2, metavar=("H", "W"),
        help="height and width of training crops (default: 512 1024, or a smaller frame's)")
    add("--scale", type=number_in(0.01, 100), nargs=2, metavar=("MIN", "MAX"),
        help="range of the random zoom (default: 0.5 2; for scenes 0.8 1.25)")
    add("--optimizer", choices=["sgd", "adamw"], help="(default: sgd; for Conv(U)NeXt adamw)")
    add("--lr", type=number_in(1e-9, 1e3), help="peak learning rate (default: sgd 0.0015 x batch, "
        "for scenes 0.025 x batch; adamw 0.001)")
    add("--encoder-lr", type=at_least_0, metavar="FACTOR", help="factor on --lr of an encoder with "
        "weights from ImageNet or --init; not in convunext (default: sgd 0.5, adamw 0.1)")
    add("--weight-decay", type=at_least_0, metavar="W", help="(default: sgd 0.0005, adamw 0.01)")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="ImageNet weights (scenes: no)")
    add("--init", type=path_option, help="start from the weights of a checkpoint or a run")
    add("--val-every", type=count, help="epochs between validations (default: 1)")
    add("--seed", type=number_in(0, 2**31, int), help="(default: 0)")
    add("--workers", type=number_in(0, 1000, int), help="(default: up to 8 per GPU; on a CPU 0)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the fastest)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"],
        help="precision of autocast; off is float32 (default: the fastest)")
    add("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile (default: no)")
    add("--save-minutes", type=at_least_0, metavar="N", help="time between saves (default: 5)")
    add("--out", type=path_option, help="(default: here; an earlier run is moved to runs/)")
    add("--resume", type=path_option, nargs="?", const=True, metavar="LAST_PT", help="continue a "
        "run; without a value, that of --out if there is one, else start a new run")
    args = parser.parse_args(argv)
    if args.scale and args.scale[0] > args.scale[1]:
        raise ValueError("--scale: MIN is larger than MAX")
    if args.init and args.pretrained:
        raise ValueError("--init and --pretrained exclude each other")
    args.init = args.init and str(args.init)        # checkpoints hold no Path
    return args


# Options that may be changed on resume, although some of them change the results of the run.
MAY_CHANGE = {"data", "epochs", "lr", "workers", "device", "amp", "compile", "save_minutes",
              "val_every"}


def choose_options(args, saved):
    """Fill in the options that were not typed. Each `fill` sets only those that have no value yet:
    first, on resume, the `saved` settings of last.pt; then $CITYSCAPES_DATASET and the defaults.
    (Those of --data and --crop are in build_data, of --workers in make_loader.) ValueError."""
    def fill(**values):
        for name, value in values.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
    for name, value in saved.items():
        typed = getattr(args, name, None)
        if typed not in (None, value) and name not in MAY_CHANGE:
            raise ValueError(f"--{name.replace('_', '-')} is {value} in the run to resume; leave "
                             "this option out, or start a new run in another --out")
    fill(**saved)
    if os.environ.get("CITYSCAPES_DATASET"):
        fill(data=path_option(os.environ["CITYSCAPES_DATASET"]))
    is_scenes = args.data is None or (Path(args.data) / SCENES_MARK).exists()
    if args.init and args.model is None:
        args.model = load_checkpoint(find_checkpoint(args.init))["settings"]["model"]
    if is_scenes:                                   # a small network, many steps
        fill(model="resnet18", epochs=10, scale=[0.8, 1.25], batch=2, pretrained=False)
    fill(model="resnet34", loss="ce", class_weights="none", copyblob=0.0, epochs=200)
    fill(scale=[0.5, 2.0], val_every=1, seed=0)
    fill(device="auto", amp="auto", compile=False, save_minutes=5.0)
    spec = SPECS[args.model]
    fill(optimizer=spec.optimizer, batch=spec.batch)
    fill(pretrained=spec.url is not None and not args.init)
    if args.optimizer == "sgd":     # the rate grows with the batch (Goyal 2017, arXiv 1706.02677)
        rate = 0.025 if is_scenes else 0.0015
        fill(lr=rate * args.batch, encoder_lr=0.5, weight_decay=5e-4)
    else:
        fill(lr=0.001, encoder_lr=0.1, weight_decay=0.01)


# ------------------------------------------------------------------- data, network, optimizer

def build_data(args, device):
    """Build training set (random crops), validation set (whole frames), and loss function.
    Without --data, the frames are generated scenes, which are drawn at the first run."""
    if args.data is None:
        args.data = "scenes"
        say("GENERATED SCENES, not Cityscapes: neither --data nor $CITYSCAPES_DATASET is given")
        if RANK == 0:
            make_scenes(args.data)
        if WORLD_SIZE > 1:
            dist.barrier()
    args.data = str(Path(args.data).resolve())      # eval.py may run in another folder
    val_set = Cityscapes(args.data, "val")
    if args.crop is None:                           # 512 x 1024, or the frame if it is smaller
        height, width = val_set[0][1].shape
        args.crop = [max(64, min(512, height)), max(64, min(1024, width))]
    if args.copyblob > 0 or args.class_weights != "none":
        say("counting the pixels of each class in the training labels (Cityscapes.pixels)")
    train_set = Cityscapes(args.data, "train", args.crop, args.copyblob, args.seed, args.scale)
    if args.batch > len(train_set):
        raise ValueError(f"--batch {args.batch}: only {len(train_set)} training frames; lower it")
    if args.batch % WORLD_SIZE != 0:
        raise ValueError(f"--batch {args.batch} cannot be divided among {WORLD_SIZE} processes")

    for dataset, split in (train_set, "train"), (val_set, "val"):
        report_unused(dataset.unused, say)
        sample = dataset.labels[::1 + len(dataset) // 100]          # at most 100
        if count_classes(sample).sum() == 0:
            raise ValueError(f"{args.data}: {len(sample)} labels of gtFine/{split} hold none of "
                             "the classes; check them, and the label ids of CLASSES in data.py")
    weights = None
    if args.class_weights != "none":
        weights = CLASS_WEIGHTS[args.class_weights](train_set.pixels)
        weights = torch.tensor(weights, dtype=torch.float32, device=device)
    return train_set, val_set, build_loss(args.loss, weights)


def build_network(args, device, last):
    """Build the network -> (model, network): what is saved and validated, what a step calls.
    Its weights are random, of ImageNet (--pretrained), or of a checkpoint (--init). On resume
    (`last`), they are loaded by `restore`.
    `network` is `model` or a wrapper around it, with the same weights and mode (train, eval).

    Under torchrun, each process has its own frames. The wrapper DistributedDataParallel copies the
    weights of rank 0 to all, and averages the gradients in backward(), so that all ranks take the
    same step. Each rank divides its loss by the labeled pixels of its own frames, so that the step
    differs a little from one process with all frames. SyncBatchNorm (GPUs) normalizes over all."""
    torch.manual_seed(args.seed)
    pretrained = args.pretrained and last is None and RANK == 0         # DDP copies rank 0's
    model = build_model(args.model, len(CLASSES), pretrained)
    if args.init and last is None and RANK == 0:
        path = find_checkpoint(args.init)
        load_weights(model, load_checkpoint(path), path, new_head=True)
    model = model.to(device, memory_format=torch.channels_last)
    network = model
    if WORLD_SIZE > 1:
        if device.type == "cuda":                   # replaces the norms in `model` itself
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = nn.parallel.DistributedDataParallel(network)
    if args.compile:
        network = torch.compile(network)
    return model, network


def build_optimizer(model, args, dtype):
    """SGD or AdamW. Each group has a `factor` on the rate: a trained encoder should change little.
    1-D parameters have no decay, which would pull the scale of norms to 0."""
    has_trained_encoder = args.pretrained or args.init
    parameters_of = {}                              # (factor, decay) -> list of parameters
    for name, parameter in model.named_parameters():
        factor, decay = 1.0, 0.0
        if has_trained_encoder and name.startswith("encoder."):
            factor = args.encoder_lr
        if parameter.ndim > 1:                      # biases, norms, ConvNeXt's gamma are 1-D
            decay = args.weight_decay
        parameters_of.setdefault((factor, decay), []).append(parameter)
    groups = [{"params": parameters, "factor": factor, "weight_decay": decay}
              for (factor, decay), parameters in parameters_of.items()]
    # Fused is faster, but not tested on MPS, and in PyTorch 2.13 wrong with float16: if GradScaler
    # skips the first step, fused SGD starts from an uninitialized momentum. (A resume with another
    # --amp keeps the saved choice. It has a momentum already.)
    fused = dtype != torch.float16 and next(model.parameters()).device.type != "mps"
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, args.lr, fused=fused)
    return torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=fused)


def learning_rate(args, step, steps_per_epoch, factor=1.0):
    """The learning rate of a step: --lr x factor x linear warmup x polynomial decay (power 0.9, as
    in DeepLab, arXiv 1606.00915). factor: 1, or --encoder-lr for a trained encoder. Warmup, of one
    epoch, at most 500 steps: the first gradients, of random weights, are large."""
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = min(500, steps_per_epoch)
    warmup = min(1.0, (step + 1) / warmup_steps)
    decay = (1 - step / total_steps) ** 0.9
    return args.lr * factor * warmup * decay


def seed_step(seed, step):
    """Seed PyTorch from (seed, step, rank), so that stochastic depth is the same after a resume."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, RANK)).generate_state(1)[0]))


# ------------------------------------------------------------------------------- the program

def train_step(network, loss_function, optimizer, scaler, images, target, dtype):
    """Forward, loss, backward, step -> the loss. uint8 N x 3 x H x W and N x H x W, on the CPU.
    A GPU only queues all this: code that reads a value (`.item()`, `if`) waits for the result.
    The scaler (see `main`) does nothing but in float16."""
    device = next(network.parameters()).device
    images = images.to(device, non_blocking=True)
    target = target.to(device, non_blocking=True).long()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = network(normalize(images))
    loss = loss_function(logits, target)            # in float32
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def train_epoch(args, run, parts, network, loss_function, train_set, device, dtype, signals):
    """Train one epoch, or what is left of it after a resume. After a step, save last.pt if it is
    time, and end the program if a signal came. `main` builds `run`, the position and all counters,
    and `parts`, the model, optimizer and scaler; `signals` lists those that came."""
    network.train()
    torch.backends.cudnn.benchmark = True           # crops have one size: try what is fastest
    optimizer, scaler = parts["optimizer"], parts["scaler"]
    steps_per_epoch = len(train_set) // args.batch
    batches = epoch_batches(run.epoch, len(train_set), args.batch, args.seed)
    # Steps of this epoch that were done before a resume: all, if it stopped in the validation.
    done = run.step - run.epoch * steps_per_epoch
    own_batches = [batch[RANK::WORLD_SIZE] for batch in batches[done:]]
    loader = make_loader(train_set, args.workers, device, batch_sampler=own_batches)

    step_began = printed_at = saved_at = time.monotonic()
    for images, target in loader:
        run.waited += time.monotonic() - step_began
        for group in optimizer.param_groups:        # the schedule
            group["lr"] = learning_rate(args, run.step, steps_per_epoch, group["factor"])
        seed_step(args.seed, run.step)
        loss = train_step(network, loss_function, optimizer, scaler, images, target, dtype)

        run.step += 1
        run.loss_sum += over_ranks(loss) / WORLD_SIZE
        run.seconds += time.monotonic() - step_began
        if run.step == 1 and RANK == 0:
            first_save(args, run, parts, train_set)
        if time.monotonic() - printed_at > 30:
            say(format_step(args, run, steps_per_epoch))
            printed_at = time.monotonic()
        must_stop = on_any_rank(signals)
        if must_stop or time.monotonic() - saved_at > 60 * args.save_minutes:
            save("last.pt", args, run, parts)
            saved_at = time.monotonic()
        if must_stop:
            end_stopped(args, signals)
        step_began = time.monotonic()


def main(argv=None):
    """Run one command line (default: sys.argv) -> the rows of log.csv."""
    args = parse_args(argv)
    args.out, last = find_run(args)
    choose_options(args, saved=last["settings"] if last else {})
    device = pick_device(args.device)
    join_group(args, device, last)

    train_set, val_set, loss_function = build_data(args, device)
    num_frames = [len(train_set), len(val_set)]
    steps_per_epoch = len(train_set) // args.batch
    dtype = pick_amp(args.amp, device)
    start = "ImageNet weights" if args.pretrained else args.init or "random weights"
    if last is not None:
        start = f"step {last['step']} of last.pt"
    say(f"{num_frames[0]} training and {num_frames[1]} validation frames of {args.data}")
    say(f"{args.model} from {start}, loss {args.loss}, crop {args.crop}, batch {args.batch}, "
        f"{args.epochs} epochs, {WORLD_SIZE} x {device} {dtype or torch.float32}")
    model, network = build_network(args, device, last)
    optimizer = build_optimizer(model, args, dtype)
    # The scaler is active in float16 only, where small gradients would become 0: it multiplies the
    # loss, divides the gradients again, and skips a step if they overflowed.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}      # have a state_dict()

    run = argparse.Namespace(                       # all of this is in best.pt and last.pt
        epoch=0,                                    # completed and logged
        step=0,                                     # since the beginning of the run
        loss_sum=torch.zeros((), device=device),    # of this epoch's steps
        seconds=0.0,                                # that these steps took
        waited=0.0,                                 # of those seconds, for data
        best_miou=-1.0,                             # of best.pt
        log=[],                                     # the rows of log.csv
        num_frames=num_frames,                      # must be equal on resume
        frame_size=list(val_set[0][1].shape))       # height, width; for eval.py --images
    if last is not None:
        restore(last, run, parts)
        if run.step > args.epochs * steps_per_epoch:
            raise ValueError(f"--epochs {args.epochs}: the run has already trained longer")
        if not (args.out / "best.pt").exists():     # only last.pt was copied here
            run.best_miou = -1.0

    with stop_signals() as signals:
        while run.epoch < args.epochs:              # finish_epoch increases it
            train_epoch(args, run, parts, network, loss_function, train_set, device, dtype, signals)
            save("last.pt", args, run, parts)
            validation_began = time.monotonic()
            scores = NO_SCORES
            if (run.epoch + 1) % args.val_every == 0 or run.epoch + 1 == args.epochs:
                matrix = validate(model, val_set, device, dtype, args.workers, signals)
                if matrix is None:
                    end_stopped(args, signals)
                scores = summarize(matrix)
            seconds = run.seconds + time.monotonic() - validation_began
            finish_epoch(args, run, parts, scores, seconds)
    if run.best_miou >= 0:
        say(f"best validation mIoU {run.best_miou:.3f}")
        say(f"now: python eval.py --ckpt {args.out / 'best.pt'}")
    leave_group()
    return run.log


# --------------------------------------------- validation, progress, and the end of an epoch

def validate(model, val_set, device, dtype, workers, signals):
    """Predict the frames, each rank a part -> confusion matrix; None if there are `signals`.
    `model` is not wrapped in DDP, because ranks may have unequal numbers of frames."""
    if WORLD_SIZE > 1:
        # On CPUs (no SyncBatchNorm), BatchNorm's averages are of each rank's frames: take rank 0's.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    torch.backends.cudnn.benchmark = False          # frames may have many sizes
    frames = torch.utils.data.Subset(val_set, range(RANK, len(val_set), WORLD_SIZE))
    matrix = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64, device=device)
    results = predictions(model, frames, device, dtype, workers=workers)
    if RANK == 0:
        results = progress(results, lambda number: f"validating, frame {number}/{len(frames)}")
    for _, label, prediction in results:
        matrix += metrics.confusion_matrix(prediction, label.to(device), len(CLASSES))
        if signals:
            break                                   # the next line waits for the other ranks
    if on_any_rank(signals):
        return None
    return over_ranks(matrix).cpu()


def format_step(args, run, steps_per_epoch):
    """How far the epoch is, as text."""
    step = run.step - run.epoch * steps_per_epoch
    per_step = run.seconds / step
    steps_left = args.epochs * steps_per_epoch - run.step
    left = timedelta(seconds=round(per_step * steps_left))
    loss = run.loss_sum.item() / step
    speed = args.batch / per_step
    return (f"epoch {run.epoch + 1}/{args.epochs}  step {step}/{steps_per_epoch}  "
            f"loss {loss:.3f}  {speed:.1f} img/s  left {left}")


def format_row(row, epochs):
    """The main columns of a row of the log, and the time that is left, as text."""
    scores = ""
    if row["miou"] is not None:
        scores = (f"  pixel acc {row['pixel_accuracy']:.3f}  mIoU {row['miou']:.3f}  "
                  f"Dice {row['mean_dice']:.3f}")
    left = timedelta(seconds=round(row["seconds"] * (epochs - row["epoch"])))
    return (f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.3f}{scores}  "
            f"{row['images_per_s']:.1f} img/s  data wait {row['data_wait']:.0%}  left {left}")


# Of an epoch without validation: no pixel is counted, and each score is None.
NO_SCORES = summarize(torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64))


def finish_epoch(args, run, parts, scores, seconds):
    """Log the epoch, save best.pt if it is the best so far, and last.pt.
    scores: a dict of `summarize`; seconds: those of training and validation."""
    run.epoch += 1
    steps = run.num_frames[0] // args.batch         # of one epoch
    row = {"epoch": run.epoch, "loss": run.loss_sum.item() / steps,
           "lr": learning_rate(args, run.step - 1, steps)}
    for key in "pixel_accuracy", "miou", "mean_dice":
        row[key] = scores[key]
    row["images_per_s"] = steps * args.batch / run.seconds
    row["data_wait"] = run.waited / run.seconds
    row["seconds"] = seconds
    row["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30      # peak so far; 0 on a CPU
    for c in CLASSES:
        row[f"iou {c.name}"] = scores["classes"][c.name]["iou"]
    run.log.append(row)
    run.seconds = run.waited = 0.0
    run.loss_sum.zero_()
    if row["miou"] is not None and row["miou"] > run.best_miou:
        run.best_miou = row["miou"]
        save("best.pt", args, run, parts)
    if RANK == 0:
        write_log(run.log, args.out)
    save("last.pt", args, run, parts)
    say(format_row(row, args.epochs))


# ---------------------------------------------------------------------- the files of the run

RUN_FILES = "best.pt", "last.pt", "log.csv", "curves.png", "copyblob.png"


def write(path, save_to):
    """Replace a file atomically: if that fails, the old one stays. save_to(file) writes into it."""
    buffer, part = io.BytesIO(), Path(f"{path}.part")
    save_to(buffer)         # in memory: each library reports a full disk with another exception
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


def check_finite(run, parts):
    """Raise FloatingPointError if loss or weights are not finite, or if the float16 gradients
    always overflow: GradScaler then skips each step and halves its scale, from 65536 to below 1."""
    tensors = [run.loss_sum, *parts["model"].state_dict().values()]
    is_finite = [tensor.isfinite().all() for tensor in tensors]
    if not torch.stack(is_finite).all():
        raise FloatingPointError("the loss or the weights are not finite; lower --lr, or try "
                                 "--amp off; last.pt, if there is one, holds an earlier step")
    scaler = parts["scaler"]
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise FloatingPointError("the float16 gradients always overflow; use --amp off or bf16, "
                                 "or lower --lr")


def save(name, args, run, parts):
    """Write best.pt, which has the weights of the best validation mIoU, or last.pt, those of the
    last step. Both hold "model", the weights; "settings", the options; all values of `run`.
    last.pt also has the states of the other `parts`, which only --resume needs. Ranks other than 0
    do nothing. Raises OSError, FloatingPointError (see check_finite)."""
    if RANK != 0:
        return
    check_finite(run, parts)
    settings = vars(args).copy()
    del settings["out"], settings["resume"]
    checkpoint = {"settings": settings, **vars(run)}
    for key, part in parts.items():
        if key == "model" or name == "last.pt":
            checkpoint[key] = part.state_dict()
    write(args.out / name, lambda file: torch.save(checkpoint, file))


def first_save(args, run, parts, train_set):
    """After step 1 of a new run, which shows that the run works: make room for its files, save
    last.pt, and draw CopyBlob with the largest donor of each class."""
    check_finite(run, parts)                        # before files are moved
    if args.out == Path():                          # the default
        move_earlier_run()
    args.out.mkdir(parents=True, exist_ok=True)
    save("last.pt", args, run, parts)
    rows = []                                       # frame 0 with the first class, 1 with the next
    pasted_classes = sorted({train_id for _, train_id in train_set.donors})
    for index, train_id in enumerate(pasted_classes):
        image, label = train_set.read(index % len(train_set))
        largest = train_set.pixels[:, train_id].argmax()
        donor_image, donor_label = train_set.read(largest)
        pasted, new_label = copy_blob(image, label, donor_image, donor_label, train_id)
        rows.append([("before", np.asarray(image)),
                     (f"CopyBlob of a {CLASSES[train_id].name}", np.asarray(pasted)),
                     ("new label", PALETTE[np.asarray(new_label)])])
    if rows:
        write(args.out / "copyblob.png", lambda file: picture_grid(rows).save(file, "PNG"))


def move_earlier_run():
    """Move the files of an earlier run from the current folder to runs/<model>-<loss>."""
    found = [name for name in RUN_FILES if Path(name).exists()]
    if not found:
        return
    name = "earlier"
    with contextlib.suppress(OSError, ValueError):      # no checkpoint, or one of another program
        settings = load_checkpoint(find_checkpoint(".", ["last.pt", "best.pt"]))["settings"]
        if settings["loss"] in LOSSES:              # a file could hold "../"
            name = f"{settings['model']}-{settings['loss']}"
    folder, number = Path("runs", name), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{name}-{number}")
    folder.mkdir(parents=True)
    for file in found:
        os.replace(file, folder / file)
    say(f"the files of the earlier run are now in {folder}")
    if "last.pt" in found:
        say(f"to continue it: python train.py --resume {folder}")


def write_log(log, out):
    """Write log.csv and curves.png."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(log[-1]))
    writer.writeheader()
    writer.writerows(log)
    write(out / "log.csv", lambda file: file.write(text.getvalue().encode()))
    write(out / "curves.png", lambda file: curves_picture(log).save(file, "PNG"))


# ------------------------------------------------------------------------------------- resume

# A resumed run ends like one that never stopped, because last.pt holds everything that changes
# (weights, optimizer, scaler, position, log), and every random choice follows from the seed and the
# position: the order of the frames (data.epoch_batches), their crops (data.Cityscapes), stochastic
# depth (seed_step). On a GPU, or with more than two processes, sums are added in another order each
# time (a + b is b + a, but three terms round differently): results match only up to rounding.

def find_run(args):
    """The folder of the run, and its last.pt (a dict) or None. Raises ValueError or OSError."""
    out, resume = args.out or Path(), args.resume
    if resume is True:                              # a bare --resume
        resume = out if (out / "last.pt").exists() else None
    if resume is None:                              # a new run
        if args.out and any((out / name).exists() for name in RUN_FILES):
            raise ValueError(f"{out.resolve()} holds files of another run; choose another --out, "
                             f"or if it has a last.pt, continue that run with --resume {out}")
        return out, None
    path = find_checkpoint(resume, ["last.pt"])
    if args.out and out.resolve() != path.parent.resolve():
        raise ValueError(f"--out {args.out} is not the folder of {path}; omit --out")
    last = load_checkpoint(path)
    # The run will write last.pt here, so a file of another name is refused. best.pt has no scaler.
    if path.name != "last.pt" or "scaler" not in last:
        raise ValueError(f"{path}: resume from the last.pt of a run, or use this file with --init")
    return path.parent, {**last, "path": path}


def restore(last, run, parts):
    """Continue from a last.pt: set `run` and `parts`. Raises ValueError if it does not fit."""
    missing = {*vars(run), *parts} - last.keys()
    if missing:
        raise ValueError(f"{last['path']}: lacks {missing} (an old version?); use it with --init")
    if last["num_frames"] != run.num_frames:
        raise ValueError(f"--data: has {run.num_frames} training and validation frames, but the "
                         f"run began with {last['num_frames']}; restore them, or start a new run")
    load_weights(parts["model"], last, last["path"])
    for name, part in parts.items():
        if name != "model" and last[name]:          # a scaler that is not active has no state
            part.load_state_dict(last[name])
    last["loss_sum"] = last["loss_sum"].to(run.loss_sum.device)
    for name in vars(run):
        setattr(run, name, last[name])


# ---------------------------------------------------------------- several processes, and signals

def say(text):
    """Print on rank 0."""
    if RANK == 0:
        print(text, flush=True)


def over_ranks(tensor):
    """The sum of a tensor over all ranks, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def on_any_rank(condition):
    """Whether a condition holds on at least one rank."""
    value = torch.tensor(float(bool(condition)))    # on the CPU: does not wait for the GPU
    return over_ranks(value).item() > 0


def join_group(args, device, last):
    """Connect to the other ranks. Raises ValueError if only some of them have a last.pt."""
    if WORLD_SIZE > 1 and device.type == "cuda":    # NCCL; Gloo for on_any_rank's CPU tensor
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    elif WORLD_SIZE > 1:
        dist.init_process_group("gloo")
    some_rank_resumes = on_any_rank(last is not None)
    if some_rank_resumes and last is None:
        raise ValueError(f"{args.out}: not all processes find last.pt; all machines must share it")


def leave_group():
    """Wait for all ranks, then leave: torchrun kills the others if one ends with an error."""
    if WORLD_SIZE > 1:
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals():
    """Collect SIGINT (Ctrl-C) and SIGTERM in a list, instead of ending the program -> the list.
    The program looks at the list after each step and validation frame, so a second signal changes
    nothing. A signal that is ignored already (nohup, background jobs) stays ignored. Ctrl-\\ still
    ends at once."""
    received, handlers = [], {}
    for number in signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, lambda got, frame: received.append(got))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_stopped(args, signals):
    """End the program after a signal, when all is saved. The status is 128 + signal."""
    start = "python" if WORLD_SIZE == 1 else "torchrun ..."
    say(f"stopped; continue with: {start} train.py --resume {args.out / 'last.pt'}")
    leave_group()
    sys.exit(128 + (signals or [signal.SIGTERM])[0])   # another rank may have got the signal


if __name__ == "__main__":
    command_line(main)
