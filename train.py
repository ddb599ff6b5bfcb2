"""Train a U-Net on Cityscapes, or on generated street scenes if there is no Cityscapes.

    python train.py --loss ce                             # anywhere
    python train.py --data /data/cityscapes --model convnext_tiny --class-weights enet --copyblob
    torchrun --standalone --nproc_per_node=4 train.py --data /data/cityscapes --batch 32    # 4 GPUs
    python train.py --resume last.pt                      # continue a run that was stopped

Writes into --out: best.pt, the weights of the best validation mIoU, for eval.py; last.pt, all that
--resume needs; log.csv, one row for each epoch; curves.png, a picture of it. Every random number is
derived from the seed and the position of the run, so a run that was stopped and resumed ends like
one that was not (on a GPU, or with more than two processes, up to rounding).
"""
import argparse
import contextlib
import csv
import io
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import nn

from data import (CLASSES, LABEL_TO_TRAIN, SCENES_MARK, Cityscapes, class_pixels, class_weights,
                  make_scenes, normalize)
from eval import (STOP_SIGNALS, autocast, command_line, curves_picture, evaluate, find_data,
                  load_checkpoint, load_weights, make_loader, number_in, pick_amp, pick_device,
                  pick_workers, rank, summarize)
from losses import LOSSES, build_loss
from unet import MODELS, SPECS, build_model

# ----------------------------------------------------------------------------------- the loop


def learning_rate(args, step, steps_per_epoch, factor=1.0):
    """The learning rate of a step: --lr x factor x linear warmup x polynomial decay (power 0.9).

    factor: 1, or --encoder-lr for an encoder that is trained already. The warmup is one epoch, at
    most 500 steps.
    """
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = min(500, steps_per_epoch)
    warmup = min(1.0, (step + 1) / warmup_steps)
    decay = (1 - step / total_steps) ** 0.9
    return args.lr * factor * warmup * decay


def train(run):
    """Train from the current step of `run` to the end of its last epoch.

    `run.network` is `run.model`, wrapped for several GPUs or compiled if that was asked for.
    `autocast` computes the network in 16 bits where that is faster. The scaler is active in float16
    only, where small gradients would become 0: it multiplies the loss, divides the gradients again
    before the step, and leaves a step out if they overflowed.
    """
    args, optimizer, scaler = run.args, run.optimizer, run.scaler
    while run.epoch < args.epochs:
        run.network.train()
        for images, target in run.batches():        # the remaining ones of this epoch
            for group in optimizer.param_groups:    # see build_optimizer
                group["lr"] = learning_rate(args, run.step, run.steps_per_epoch, group["factor"])
            seed_step(args.seed, run.step)

            with autocast(run.device, run.dtype):
                logits = run.network(normalize(images))
            loss = run.loss_function(logits, target.long())

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            clip_gradients(run)
            scaler.step(optimizer)
            scaler.update()
            run.after_step(loss.detach())           # may save everything, or stop the run

        run.save()                                  # a stop during the validation loses nothing
        scores = run.validate()
        run.end_epoch(scores)                       # log.csv, curves.png, best.pt; next epoch
        run.save()


def seed_step(seed, step):
    """Seed PyTorch from (seed, step, rank), so that stochastic depth is the same after a resume."""
    torch.manual_seed(hash((seed, step, rank())))   # integers have fixed hashes, unlike strings


def clip_gradients(run):
    """Scale the gradients so that their total norm is at most --clip-grad; 0 is off."""
    if run.args.clip_grad > 0:
        run.scaler.unscale_(run.optimizer)          # divides now; scaler.step will not again
        nn.utils.clip_grad_norm_(run.network.parameters(), run.args.clip_grad)


# ------------------------------------------------------------------------------------ the run


CHECK_EVERY = 10        # steps between checks of the losses: reading one waits for the GPU
STATE = "epoch", "step", "loss_sum", "seconds", "best_miou", "log"      # attributes of a Run


class Stopped(Exception):
    """A signal asked the run to stop. It was saved after the last step."""


class Run:
    """A training run: its parts, its position, and everything around a step.

    `step` counts steps since the beginning of the run, `epoch` completed and logged epochs.
    If a run was stopped during the validation, all steps of the epoch are done, but `epoch` is not
    yet increased: `batches` yields nothing, and the validation follows.

    Why a resumed run ends like one that never stopped: last.pt holds all that changes (weights,
    optimizer, scaler, position, log), and all that is random follows from the position: the
    order of the frames (`epoch_batches`), the crops (data.Cityscapes), stochastic depth
    (`seed_step`). On a GPU the order of summation varies, so results match only up to rounding.
    """

    def __init__(self, args, device, stop):
        self.args, self.device, self.stop, self.out = args, device, stop, Path(args.out)
        self.dtype = pick_amp(args.amp, device)
        self.workers = pick_workers(args.workers, device)
        self.train_set, self.val_set, self.loss_function = build_data_and_loss(args, device)
        _, label = self.val_set[0]
        self.frame_size = list(label.shape)         # height, width
        self.steps_per_epoch = len(self.train_set) // args.batch
        self.model = build_network(args).to(device, memory_format=torch.channels_last)
        self.network = wrap_network(self.model, args)               # gives all ranks equal weights
        self.optimizer = build_optimizer(self.model, args)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.epoch, self.step = 0, 0                # complete epochs, steps since the beginning
        self.loss_sum, self.seconds = 0.0, 0.0      # of this epoch; of the whole run
        self.best_miou, self.log = -1.0, []
        if args.resume:
            self.restore(args.resume)
        if self.step != from_rank_0(lambda: self.step):
            raise ValueError(f"{args.out}: not all processes find the same last.pt there; --out "
                             "must be a folder that all machines share")

        self.saved_at = time.monotonic()
        self.began = self.saved_at - self.seconds   # as if the run had never stopped
        self.losses = []                            # of the last steps, not yet checked
        self.images_per_s, self.data_wait = 0.0, 0.0

    def batches(self):
        """Yield the remaining batches of this epoch, on the device.

        images: uint8 N x 3 x H x W, target: uint8 N x H x W, this rank's share of --batch frames
        """
        torch.backends.cudnn.benchmark = True       # crops have one size: try what is fastest
        done = self.step - self.epoch * self.steps_per_epoch
        batches = epoch_batches(self.epoch, len(self.train_set), self.args.batch, self.args.seed)
        batches_of_rank = [batch[rank()::world_size()] for batch in batches[done:]]
        loader = make_loader(self.train_set, self.workers, batch_sampler=batches_of_rank,
                             pin_memory=self.device.type == "cuda")     # for non_blocking copies
        waited, start = 0.0, time.monotonic()
        requested = start                           # when the next batch was asked for
        for images, target in loader:
            waited += time.monotonic() - requested
            yield (images.to(self.device, non_blocking=True),
                   target.to(self.device, non_blocking=True))
            requested = time.monotonic()
        seconds = max(requested - start, 1e-9)      # 0 s if no batch was left
        self.images_per_s = len(batches_of_rank) * self.args.batch / seconds
        self.data_wait = waited / seconds

    def after_step(self, loss):
        """Count a step; then, if it is time to, check the losses, save, or stop the run."""
        self.step += 1
        self.losses.append(loss)
        save_is_due = time.monotonic() - self.saved_at > 60 * self.args.save_minutes
        # Every rank must make both calls, as each waits for the others.
        must_stop = on_any_rank(self.stop.requested)
        must_save = on_any_rank(save_is_due) or must_stop
        on_cpu = self.device.type == "cpu"          # where reading a loss costs nothing
        if len(self.losses) == CHECK_EVERY or must_save or on_cpu:
            self.check_losses()
            self.show_progress()
        if must_save:
            self.save()
        if must_stop:
            raise Stopped

    def check_losses(self):
        """Add the last losses to loss_sum. Raises FloatingPointError if one is not finite.

        Also raises it if float16 gradients always overflow. GradScaler then skips every step, so
        the network does not learn, and halves its scale each time, from 65536 to below 1.
        """
        if not self.losses:
            return
        losses = torch.stack(self.losses)
        if world_size() > 1:
            dist.all_reduce(losses)
            losses /= world_size()
        first_step = self.step - len(self.losses)
        self.losses = []
        for step, loss in enumerate(losses.tolist(), start=first_step):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {loss}, on {', '.join(self.images_of(step))}; "
                    "lower --lr, or try --amp off; what was saved before is kept")
            self.loss_sum += loss
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise FloatingPointError(f"the float16 gradients of step {self.step} and those before "
                                     "are not finite; use --amp off or bf16, or lower --lr")

    def images_of(self, step):
        """The image files of a step, of all ranks. Item k = epoch x number of frames + frame."""
        epoch, i = divmod(step, self.steps_per_epoch)
        batches = epoch_batches(epoch, len(self.train_set), self.args.batch, self.args.seed)
        return [str(self.train_set.images[k % len(self.train_set)]) for k in batches[i]]

    def validate(self):
        """Score the validation frames -> dict of `summarize`; None if --val-every skips the epoch.

        Raises Stopped if the run was asked to stop.
        """
        last = self.epoch + 1 == self.args.epochs
        if (self.epoch + 1) % self.args.val_every != 0 and not last:
            return None
        if world_size() > 1:
            # On CPUs, each rank has BatchNorm's averages of its own frames: use those of rank 0.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        torch.backends.cudnn.benchmark = False      # frames may have many sizes
        share = range(rank(), len(self.val_set), world_size())      # this rank's frames
        frames = torch.utils.data.Subset(self.val_set, share)
        matrix = evaluate(self.model, frames, self.device, self.dtype,
                          workers=self.workers, visit=self.stop_if_asked)
        if world_size() > 1:
            dist.all_reduce(matrix)
        if matrix.sum() == 0:
            raise ValueError(f"{self.args.data}: the validation labels hold none of the classes; "
                             "check the files in gtFine/val")
        return summarize(matrix.cpu())

    def stop_if_asked(self, index, *frame):
        """Raise Stopped after frame `index` of this rank's share if any rank was asked to stop.

        `on_any_rank` waits for all ranks, so all must call it equally often. Of 5 frames, for
        example, rank 0 has 3 and rank 1 has 2: both call it after their first two.
        """
        frames_all_ranks_have = len(self.val_set) // world_size()
        if index < frames_all_ranks_have and on_any_rank(self.stop.requested):
            raise Stopped

    def end_epoch(self, scores):
        """Log the epoch, and keep its weights if they are the best so far.

        Raises ValueError if all losses of the first epoch were 0: then no pixel had a class.
        """
        if self.epoch == 0 and self.loss_sum == 0:
            raise ValueError(f"{self.args.data}: the training labels hold none of the classes; "
                             "check the files in gtFine/train")
        last_step = self.step - 1
        row = {"epoch": self.epoch + 1,
               "loss": self.loss_sum / self.steps_per_epoch,
               "lr": learning_rate(self.args, last_step, self.steps_per_epoch)}
        for key in "pixel_accuracy", "miou", "mean_dice":
            row[key] = scores[key] if scores else None
        row["images_per_s"] = self.images_per_s
        row["data_wait"] = self.data_wait
        row["seconds"] = time.monotonic() - self.began
        row["gpu_gib"] = None                       # peak memory of rank 0's GPU
        if self.device.type == "cuda":
            row["gpu_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        for c in CLASSES:
            row[f"iou {c.name}"] = scores["classes"][c.name]["iou"] if scores else None
        self.log.append(row)
        self.epoch += 1
        self.loss_sum = 0.0
        if scores and scores["miou"] > self.best_miou:
            self.best_miou = scores["miou"]
            self.save_as("best.pt")
        self.write_log()
        self.print_row(row)                         # last: it fails if the terminal is gone

    def print_row(self, row):
        """Print the main columns of a row of the log, and the time that is left."""
        left = round(row["seconds"] / self.epoch * (self.args.epochs - self.epoch))
        line = (f"epoch {row['epoch']}/{self.args.epochs}  loss {row['loss']:.3f}  "
                f"lr {row['lr']:.1e}")
        if row["miou"] is not None:
            line += (f"  pixel acc {row['pixel_accuracy']:.3f}  mIoU {row['miou']:.3f}  "
                     f"Dice {row['mean_dice']:.3f}")
        line += (f"  {row['images_per_s']:.1f} img/s  data wait {row['data_wait']:.0%}  "
                 f"left {left // 60}m{left % 60:02d}s")
        say(line)

    def show_progress(self):
        """On a terminal, update one line that shows the step of the epoch."""
        if rank() == 0 and sys.stdout.isatty():
            done = self.step - self.epoch * self.steps_per_epoch
            print(f"\r\033[Kepoch {self.epoch + 1}/{self.args.epochs}  "
                  f"step {done}/{self.steps_per_epoch} ", end="", flush=True)

    # ------------------------------------------------------------- the files of the run

    def save(self):
        """Write last.pt. Raises FloatingPointError instead if losses or weights are not finite."""
        self.check_losses()
        finite = [value.isfinite().all() for value in self.model.state_dict().values()]
        if not torch.stack(finite).all():
            raise FloatingPointError(f"the weights are not finite after step {self.step}; lower "
                                     "--lr, or try --amp off; what was saved before is kept")
        self.saved_at = time.monotonic()
        self.seconds = self.saved_at - self.began
        state = {name: getattr(self, name) for name in STATE}
        self.save_as("last.pt", optimizer=self.optimizer.state_dict(),
                     scaler=self.scaler.state_dict(), num_frames=len(self.train_set), **state)
        if world_size() > 1:
            dist.barrier()                          # no rank ends before the file is complete

    def save_as(self, name, **more):
        """Write a checkpoint: the weights, all that eval.py needs, and what is passed as `more`."""
        if rank() != 0:
            return
        miou = None                                 # known after end_epoch, if it was validated
        if self.log and self.step == self.epoch * self.steps_per_epoch:
            miou = self.log[-1]["miou"]
        checkpoint = {"model": self.model.state_dict(), "settings": settings_of(self.args),
                      "epoch": self.epoch, "miou": miou, "log": self.log,
                      "frame_size": self.frame_size, "made_by": self.args.made_by,
                      "label_to_train": LABEL_TO_TRAIN.tolist()}
        buffer = io.BytesIO()
        torch.save(checkpoint | more, buffer)
        write(buffer.getbuffer(), self.out / name)

    def restore(self, path):
        """Continue from a last.pt."""
        last = load_checkpoint(path)
        missing = {"optimizer", "scaler", "num_frames", "label_to_train", *STATE} - last.keys()
        if missing:
            raise ValueError(f"{path}: has a model, but not {', '.join(sorted(missing))} of a run; "
                             "resume from the last.pt beside it, or start a new run with --init")
        if last["num_frames"] != len(self.train_set):
            raise ValueError(f"{self.args.data}: has {len(self.train_set)} training frames, but "
                             f"the run of {path} began with {last['num_frames']}; restore them, "
                             "or start a new run")
        if last["label_to_train"] != LABEL_TO_TRAIN.tolist():
            raise ValueError(f"{path}: LABEL_TO_TRAIN in data.py has changed since this run began, "
                             "so scores would not be comparable; start a new run")
        load_weights(self.model, self.args.model, last, path)
        self.optimizer.load_state_dict(last["optimizer"])
        if self.scaler.is_enabled() and last["scaler"]:
            self.scaler.load_state_dict(last["scaler"])
        for name in STATE:
            setattr(self, name, last[name])
        if not (self.out / "best.pt").exists():     # only last.pt was copied: write a new best.pt
            self.best_miou = -1.0
        if self.step > self.args.epochs * self.steps_per_epoch:
            raise ValueError(f"--epochs {self.args.epochs}: the run has trained {self.step} steps, "
                             f"which are more than {self.args.epochs} epochs")
        if self.args.epochs != last["settings"]["epochs"]:
            rate = learning_rate(self.args, self.step, self.steps_per_epoch)
            say(f"--epochs was {last['settings']['epochs']} and is {self.args.epochs}: the "
                f"learning rate follows the new number and is {rate:.1e} in the next step")

    def write_log(self):
        """Write log.csv and curves.png. Neither is needed to resume, so an error is only printed.

        On Windows, for example, a file cannot be replaced while a spreadsheet has it open.
        """
        if rank() != 0:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.log[0])
        writer.writeheader()
        writer.writerows(self.log)
        picture = io.BytesIO()
        curves_picture({self.out.resolve().name: self.log}).save(picture, "PNG")
        try:
            write(text.getvalue().encode(), self.out / "log.csv")
            write(picture.getbuffer(), self.out / "curves.png")
        except OSError as error:
            say(f"{error}; they will be written again after the next epoch")


def write(data, path):
    """Replace a file atomically: after a crash or on a full disk, the old one is still there."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


def epoch_batches(epoch, num_frames, batch, seed):
    """The items (see data.Cityscapes) of each step of an epoch -> list of lists of ints.

    Every epoch has its own random order. Frames that do not fill a batch are left out of it.
    Example: for 5 frames in batches of 2, [[3, 0], [4, 2]] may be the items of epoch 0. Those of
    epoch 1 are between 5 and 9: item 7 is frame 2 again, with new random numbers.
    """
    # Samples draw from (seed, epoch, index) with index < num_frames: never from this seed.
    rng = np.random.default_rng((seed, epoch, num_frames))
    items = epoch * num_frames + rng.permutation(num_frames)
    steps = num_frames // batch
    return items[:steps * batch].reshape(steps, batch).tolist()


# ---------------------------------------------------------------------- the parts of the run


def build_data_and_loss(args, device):
    """Build the training set (random crops), the validation set (whole frames) and the loss."""
    val_set = Cityscapes(args.data, "val")
    pixels, weights = None, None
    if args.copyblob > 0 or args.class_weights != "none":
        whole_frames = Cityscapes(args.data, "train")
        pixels = from_rank_0(lambda: class_pixels(whole_frames))    # not counted on every rank
        weights = class_weights(pixels, args.class_weights)
    train_set = Cityscapes(args.data, "train", args.crop, copyblob=args.copyblob, seed=args.seed,
                           scale=args.scale, pixels=pixels)
    if args.batch > len(train_set):
        raise ValueError(f"--batch {args.batch}: there are only {len(train_set)} training frames")
    if args.batch % world_size() != 0:
        raise ValueError(f"--batch {args.batch} cannot be divided among {world_size()} processes")
    if weights is not None:
        texts = [f"{c.name} {weight:.2f}" for c, weight in zip(CLASSES, weights)]
        say(f"class weights ({args.class_weights}): {', '.join(texts)}")
        weights = weights.to(device)
    return train_set, val_set, build_loss(args.loss, weights)


def build_network(args):
    """The network with random, ImageNet (--pretrained) or a checkpoint's weights (--init)."""
    torch.manual_seed(args.seed)
    # Rank 0 alone loads them: DistributedDataParallel begins by copying rank 0's weights to all.
    pretrained = args.pretrained and not args.resume and rank() == 0
    model = build_model(args.model, len(CLASSES), pretrained)
    if args.init and not args.resume:
        load_weights(model, args.model, load_checkpoint(args.init), args.init)
    return model


def wrap_network(model, args):
    """What a step calls: the model, with DistributedDataParallel under torchrun, compiled if asked.

    Under torchrun, each rank has a copy of the network and its own frames. DistributedDataParallel
    averages the gradients over the ranks in backward(), so all ranks take the same step.
    On several GPUs, SyncBatchNorm normalizes over the frames of all of them. PyTorch has none for
    CPUs; there each rank normalizes its own frames.
    """
    network = model
    if world_size() > 1:
        if next(model.parameters()).is_cuda:        # replaces the norms in `model` itself
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = nn.parallel.DistributedDataParallel(network)
    if args.compile:
        network = torch.compile(network)
    return network


def build_optimizer(model, args):
    """SGD or AdamW. Each group has a `factor` on the rate. 1-D parameters have no decay."""
    has_trained_encoder = args.pretrained or args.init
    groups = {}
    for name, parameter in model.named_parameters():
        factor, decay = 1.0, 0.0
        if has_trained_encoder and name.startswith("encoder."):
            factor = args.encoder_lr
        if parameter.ndim > 1:                      # biases, norms, ConvNeXt's gamma are 1-D
            decay = args.weight_decay
        groups.setdefault((factor, decay), []).append(parameter)
    groups = [{"params": parameters, "factor": factor, "weight_decay": decay}
              for (factor, decay), parameters in groups.items()]
    fused = next(model.parameters()).device.type != "mps"
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, args.lr, fused=fused)
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, nesterov=True, fused=fused)
    # Start momentum at 0. Otherwise, if GradScaler leaves out the first step, fused SGD would use
    # uninitialized buffers in the second one (PyTorch 2.13).
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# ------------------------------------------------------------------------ several processes

# With one process, from_rank_0(function) is function(), on_any_rank(condition) is condition, and
# world_size() is 1.
# The operations of torch.distributed:
#     all_reduce      the sum or maximum over all ranks, in place
#     broadcast       a copy of rank 0's value
#     barrier         wait until all ranks are here


def set_up_device(args):
    """Set up the device of this process, and its process group if torchrun started several."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1 and not os.environ.get("LOCAL_RANK"):
        raise ValueError("WORLD_SIZE is set, but LOCAL_RANK is not; start several processes with "
                         "torchrun")
    if world > 1 and ":" in args.device:
        raise ValueError(f"--device {args.device} is one device for all processes; with torchrun, "
                         "pass --device cuda")
    device = pick_device(args.device)               # selects the GPU of LOCAL_RANK first
    if world > 1 and device.type == "cuda":         # NCCL for GPU tensors, Gloo for CPU tensors
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    elif world > 1:
        dist.init_process_group("gloo")
    return device


def world_size():
    """The number of processes that torchrun started, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Print on rank 0. On a terminal, the line replaces one of `progress`."""
    if rank() == 0:
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        print(text, flush=True)


def from_rank_0(function):
    """Call the function on rank 0 only -> its result, on every rank."""
    result = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result, 0)
    return result[0]


def on_any_rank(condition):
    """Whether a condition holds on at least one rank. All ranks must call this together."""
    if world_size() == 1:
        return condition
    value = torch.tensor(float(condition))          # on the CPU: does not wait for the GPU
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item() > 0


# -------------------------------------------------------------------- signals, skip at first


class StopSignals:
    """Records that one of STOP_SIGNALS asked the run to stop. Use as a context manager.

    The run then stops after the current step or validation frame. Signals within two seconds
    count as one, as torchrun and SLURM may pass on a signal that a process has received already.
    A later one stops the run without saving.
    """

    def __init__(self):
        self.requested, self.number, self.time = False, None, None

    def receive(self, number, frame):
        now = time.monotonic()
        if self.requested and now > self.time + 2:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.number, self.time = True, number, now

    def __enter__(self):
        self.handlers = {}
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores SIGHUP
                self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error):
        if self.requested:      # keep our handlers, so that a repeated signal does not end the
            return              # program before `command_line` makes it ignore signals
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------- the command line

# For real frames: the usual settings of published training runs on Cityscapes, on a GPU of 16 GB.
# SGD's default rate is proportional to the batch (Goyal et al. 2017, arXiv 1706.02677).
REAL_DEFAULTS = {
    "model": "resnet34",
    "pretrained": True,                 # ImageNet weights, if there are any for the model
    "epochs": 200,
    "batch": 8,                         # or the model's batch in unet.SPECS if that is smaller
    "scale": [0.5, 2.0],
    "sgd_lr_per_frame": 0.0015,         # 0.012 for a batch of 8
}
# For the generated scenes: a small network, and many small steps from random weights.
SCENES_DEFAULTS = {
    "model": "resnet18",
    "pretrained": False,
    "epochs": 10,
    "batch": 2,
    "scale": [0.8, 1.25],
    "sgd_lr_per_frame": 0.025,          # 0.05 for a batch of 2
}
# `encoder_lr` is a factor on the rate of an encoder that starts from ImageNet weights or --init.
OPTIMIZER_DEFAULTS = {
    "sgd": {"encoder_lr": 0.5, "weight_decay": 5e-4},
    "adamw": {"encoder_lr": 0.1, "weight_decay": 0.01, "lr": 0.001},
}

# Options that may be changed on resume, although some of them change the results of the run.
MAY_CHANGE = {"data", "epochs", "lr", "workers", "device", "amp", "compile", "save_minutes",
              "val_every"}


def build_parser():
    """The options of train.py. A new one is saved and resumed without more code."""
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    count, positive = number_in(1, 10**6, int), number_in(1e-9, 1e3)
    p.add_argument("--data", metavar="FOLDER",
                   help="root of the dataset (default: $CITYSCAPES_DATASET, else generated scenes)")
    p.add_argument("--model", choices=MODELS,
                   help="(default: resnet34; for scenes resnet18; with --init that of the file)")
    p.add_argument("--loss", choices=LOSSES, default="ce", help="(default: ce, cross-entropy)")
    p.add_argument("--class-weights", choices=["none", "enet", "median"], default="none",
                   help="weight classes in the loss by their pixels (default: none)")
    p.add_argument("--copyblob", type=number_in(0, 1), nargs="?", const=1.0, default=0.0,
                   metavar="S", help="paste rare classes into training frames, with a strength of "
                   "0 to 1 (default: 0, off; without a value 1)")
    p.add_argument("--epochs", type=count, metavar="N", help="(default: 200; for scenes 10)")
    p.add_argument("--batch", type=count, metavar="N",
                   help="frames in a step, of all GPUs together (default: 8, for convunext "
                   "4; scenes 2)")
    p.add_argument("--crop", type=number_in(64, 10**4, int), nargs=2, metavar=("H", "W"),
                   help="height and width of training crops in pixels, at least 64 "
                   "(default: 512 1024, at most the frame)")
    p.add_argument("--scale", type=number_in(0.01, 100), nargs=2, metavar=("MIN", "MAX"),
                   help="range of the random zoom (default: 0.5 2; for scenes 0.8 1.25)")
    p.add_argument("--optimizer", choices=["sgd", "adamw"],
                   help="(default: sgd; for ConvNeXt and ConvUNeXt adamw)")
    p.add_argument("--lr", type=positive, metavar="RATE", help="peak learning rate (default: sgd "
                   "0.0015 x batch, for scenes 0.025 x batch; adamw 0.001)")
    p.add_argument("--encoder-lr", type=number_in(0, 1e3), metavar="FACTOR",
                   help="factor on --lr for an encoder (ConvUNeXt has none) that starts from "
                   "ImageNet weights or --init (default: sgd 0.5, adamw 0.1)")
    p.add_argument("--weight-decay", type=number_in(0, 1e3), metavar="W",
                   help="(default: sgd 0.0005, adamw 0.01)")
    p.add_argument("--clip-grad", type=number_in(0, 1e9), default=0.0, metavar="NORM",
                   help="largest norm of the gradient (default: 0, off)")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction,
                   help="start from ImageNet weights (default: yes for real frames)")
    p.add_argument("--init", metavar="FILE",
                   help="start from the weights of a best.pt or last.pt (default: none)")
    p.add_argument("--val-every", type=count, default=1, metavar="N",
                   help="validate after every N epochs and after the last (default: 1)")
    p.add_argument("--seed", type=number_in(0, 2**31, int), default=0, metavar="N",
                   help="seed of all random numbers (default: 0)")
    p.add_argument("--workers", type=number_in(0, 1000, int), metavar="N",
                   help="data processes for each GPU (default: the cores, at most 8; on a CPU 0)")
    p.add_argument("--device", default="auto", metavar="NAME",
                   help="cuda, cuda:1, mps or cpu (default: the fastest available)")
    p.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
                   help="precision of autocast; off is float32, with TF32 convolutions on newer "
                   "GPUs (default: the fastest available)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="use torch.compile (default: no)")
    p.add_argument("--save-minutes", type=number_in(0, 1e6), default=5.0, metavar="N",
                   help="minutes between saves within an epoch (default: 5)")
    p.add_argument("--out", default=".", metavar="FOLDER",
                   help="where the files of the run are written (default: the current folder)")
    p.add_argument("--resume", nargs="?", const="", metavar="LAST_PT",
                   help="continue the run of a last.pt; without a value, that of --out if there is "
                   "one, else start (default: start)")
    return p


def parse_args(argv=None):
    """Parse the command line. On resume, options that are not given are as in the saved run."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.resume == "":
        last = Path(args.out) / "last.pt"
        args.resume = str(last) if last.exists() else None
    if args.resume:
        args = parse_resumed(parser, argv, Path(args.resume))
    if args.scale and args.scale[0] > args.scale[1]:
        parser.error("--scale: MIN is larger than MAX")
    if args.init and args.pretrained:
        parser.error("--init and --pretrained exclude each other")
    args.made_by = provenance(argv)
    return args


def parse_resumed(parser, argv, last):
    """Parse a command line that continues the run of a last.pt.

    The saved options become the parser's defaults. So an option differs from its default only if
    the command line gives it another value, which is an error unless it is in MAY_CHANGE.
    """
    settings = load_checkpoint(last)["settings"]
    parser.set_defaults(**settings)
    parser.set_defaults(out=str(last.parent), data=find_data(settings))
    args = parser.parse_args(argv)
    if Path(args.out).resolve() != last.parent.resolve():
        parser.error(f"--out {args.out} is not the folder of {last}; leave --out out")
    for name in vars(args).keys() - MAY_CHANGE - {"out", "resume"}:
        default = parser.get_default(name)
        if getattr(args, name) != default:
            parser.error(f"--{name.replace('_', '-')} is {default} in {last}; leave this option "
                         "out, or start a new run in another --out")
    args.resume = str(last)
    return args


def settings_of(args):
    """The options of a run, as plain values for its checkpoints."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "made_by")}


def provenance(argv):
    """What made a checkpoint: the command line, the versions, and the commit if there is one."""
    here = Path(__file__).resolve().parent
    commit = None
    if (here / ".git").exists():
        with contextlib.suppress(OSError):          # git may not be installed
            result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True,
                                    text=True)
            commit = result.stdout.strip() or None
    return {"command": ["train.py", *argv], "python": platform.python_version(),
            "torch": str(torch.__version__), "numpy": np.__version__, "pillow": PIL.__version__,
            "commit": commit}


def prepare_data(args):
    """Choose the data folder, args.data -> True if it holds the generated scenes."""
    args.data = args.data or os.environ.get("CITYSCAPES_DATASET")
    if args.data:
        say(f"frames of {args.data}")
    else:
        args.data = "scenes"
        say("GENERATED SCENES, not Cityscapes: neither --data nor $CITYSCAPES_DATASET is given")
        from_rank_0(lambda: make_scenes(args.data))
    args.data = str(Path(args.data).expanduser().resolve())     # eval.py may run in another folder
    return (Path(args.data) / SCENES_MARK).exists()


def fill_defaults(args, defaults):
    """Give every option that was not set its default.

    defaults: SCENES_DEFAULTS or REAL_DEFAULTS. What depends on the model is in unet.SPECS, what
    depends on the optimizer in OPTIMIZER_DEFAULTS; SGD's rate depends on the batch.
    """
    def set_if_none(name, value):
        if getattr(args, name) is None:
            setattr(args, name, value)

    if args.init and args.model is None:            # on resume it is known: no file is needed
        args.model = load_checkpoint(args.init)["settings"]["model"]
    set_if_none("model", defaults["model"])
    spec = SPECS[args.model]
    set_if_none("pretrained", defaults["pretrained"] and spec.url is not None and not args.init)
    set_if_none("epochs", defaults["epochs"])
    set_if_none("batch", min(defaults["batch"], spec.batch))
    set_if_none("scale", defaults["scale"])
    if args.crop is None:                           # 512 x 1024, or the frame if it is smaller
        height, width = Cityscapes(args.data, "val")[0][1].shape
        args.crop = [max(64, min(512, height)), max(64, min(1024, width))]
    set_if_none("optimizer", spec.optimizer)
    for name, value in OPTIMIZER_DEFAULTS[args.optimizer].items():
        set_if_none(name, value)
    if args.optimizer == "sgd":
        set_if_none("lr", defaults["sgd_lr_per_frame"] * args.batch)


def check_out(args):
    """Create --out. Raises ValueError if it holds another run, OSError if it is not writable."""
    out = Path(args.out)
    names = [name for name in ("best.pt", "last.pt", "log.csv") if (out / name).exists()]
    if names and not args.resume:
        advice = "choose another --out"
        if "last.pt" in names:
            advice = f"continue it with --resume {out / 'last.pt'}, or {advice}"
        raise ValueError(f"{out.resolve()} has the {', '.join(names)} of another run; {advice}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written to ({error.strerror})") from error


def main(argv=None):
    """Run one command line (default: sys.argv) -> the rows of log.csv."""
    args = parse_args(argv)
    check_out(args)
    device = set_up_device(args)
    generated = prepare_data(args)
    fill_defaults(args, SCENES_DEFAULTS if generated else REAL_DEFAULTS)
    with StopSignals() as stop:
        run = Run(args, device, stop)
        say(describe(run))
        try:
            train(run)
            status = 0
            if run.best_miou >= 0:                  # -1: best.pt is missing, see Run.restore
                say(f"best validation mIoU {run.best_miou:.3f}; "
                    f"now: python eval.py --ckpt {run.out / 'best.pt'}")
        except Stopped:
            status = 128 + (stop.number or signal.SIGTERM)      # if another rank got the signal
            program = "python" if world_size() == 1 else "torchrun ..."
            say("saved and stopped; "
                f"continue with: {program} train.py --resume {run.out / 'last.pt'}")
        except KeyboardInterrupt:                   # a second signal, see StopSignals
            status = 128 + stop.number
            say("stopped at once; steps since the last save, if any, are lost")
    if dist.is_initialized():
        dist.destroy_process_group()
    if status > 0:
        sys.exit(status)
    return run.log


def describe(run):
    """One line that says what is trained on what."""
    args = run.args
    start = ""
    if args.pretrained:
        start = " (ImageNet weights)"
    elif args.init:
        start = f" (weights of {args.init})"
    text = (f"{args.model}{start}, loss {args.loss}, {len(run.train_set)} training and "
            f"{len(run.val_set)} validation frames, crop {args.crop[0]} x {args.crop[1]}, "
            f"batch {args.batch}, {args.epochs} epochs, {run.device} {run.dtype or torch.float32}")
    if world_size() > 1:
        text += f", {world_size()} processes"
    if args.resume:
        text += f", resumed after {run.step} of {args.epochs * run.steps_per_epoch} steps"
    return text


if __name__ == "__main__":
    command_line(main)
