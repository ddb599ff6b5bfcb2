"""Losses for semantic segmentation: cross-entropy, Dice, focal, and cross-entropy + Dice.

Every loss of `build_loss` maps logits and labels to one number and follows the same rules:
- A pixel labeled 255 is ignored exactly: its logits change neither the loss nor any gradient.
- Everything is computed in float32, even if train.py runs the network in 16 bits (autocast):
  a float16 sum over a crop overflows.
- A batch in which nothing is labeled has loss 0 and gradient 0.
- Class weights w are optional. Only their ratios matter, because each loss is divided by the sum
  of the weights in it.
"""
import torch
import torch.nn.functional as F

IGNORE = 255                                        # as in data.py


def _pixel_mean(loss, target, weights):
    """Weighted mean of a loss N x H x W over the labeled pixels: sum w l / sum w.
    As F.cross_entropy(weight=...), but 0 if no pixel is labeled."""
    table = torch.zeros(256, device=loss.device)    # weight by label; 255 keeps weight 0
    table[:len(weights)] = weights
    w = table[target]
    return (w * loss).sum() / w.sum().clamp_min(1e-30)


def cross_entropy(logits, target, weights):
    """Cross-entropy: sum_i w(y_i) (-log p_i) / sum_i w(y_i), p_i the probability of the true class.
    logits: float32 N x C x H x W, target: int64 N x H x W, weights: float32 C -> scalar >= 0"""
    nll = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")    # 0 if ignored
    return _pixel_mean(nll, target, weights)


def focal(logits, target, weights):
    """Focal loss: sum_i w(y_i) (1 - p_i)^2 (-log p_i) / sum_i w(y_i).
    Easy pixels, p near 1, hardly count. The weights do not change p_i (softmax). Shapes as above.
    Lin et al. 2017, arXiv 1708.02002, eq. 5 with gamma = 2 (there w is called alpha)."""
    nll = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    return _pixel_mean((1 - torch.exp(-nll)) ** 2 * nll, target, weights)


def dice(logits, target, weights):
    """Soft Dice loss: 1 - sum_c w_c D_c / sum_c w_c, a weighted mean over the classes c, where

        D_c = 2 sum_i p_ic t_ic / sum_i (p_ic + t_ic)

    i runs over the labeled pixels of the batch, c over the classes of those pixels. A class that is
    absent from the batch is skipped: its D_c would be 0 for any prediction. t is the one-hot
    truth, p the softmax. Shapes as in `cross_entropy`; the result lies in [0, 1].
    Milletari et al. 2016, arXiv 1606.04797, eq. 3, with p and t unsquared (arXiv 1707.03237)."""
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    t = target.unsqueeze(1) == classes                              # N x C x H x W, ignored: all 0
    p = logits.softmax(dim=1).masked_fill((target == IGNORE).unsqueeze(1), 0)
    overlap = (p * t).sum((0, 2, 3))
    predicted = p.sum((0, 2, 3))
    truth = t.sum((0, 2, 3))
    score = 2 * overlap / (predicted + truth).clamp_min(1e-6)       # no 0 / 0 for absent classes
    w = weights * (truth > 0)
    return (w * (1 - score)).sum() / w.sum().clamp_min(1e-30)


def ce_dice(logits, target, weights):
    """Cross-entropy + Dice, each with the weights.
    In Dice, a rare class counts as much as a frequent one. But the gradient of Dice with respect to
    the logit of the true class contains the factor p_i (from softmax), so that it is near 0 where
    p_i is near 0. The gradient of cross-entropy, p_i - 1, is largest in size there."""
    return cross_entropy(logits, target, weights) + dice(logits, target, weights)


LOSSES = {"ce": cross_entropy, "dice": dice, "focal": focal, "ce+dice": ce_dice}


def build_loss(name, class_weights=None):
    """A loss by its name in LOSSES: f(logits, target) -> float32 scalar.

    logits: float N x C x H x W, any precision; target: int64 N x H x W, values 0 ... C-1, or 255
    for ignored; class_weights: float C, or None for equal weights. Raises ValueError for an
    unknown name or for shapes that do not fit."""
    if name not in LOSSES:
        raise ValueError(f"no loss is called {name!r}; there are: {', '.join(LOSSES)}")

    def loss(logits, target):
        n, c, h, w = logits.shape
        if target.shape != (n, h, w):
            raise ValueError(f"target {tuple(target.shape)} does not fit logits {(n, c, h, w)}")
        if class_weights is None:
            weights = torch.ones(c, device=logits.device)
        else:
            weights = torch.as_tensor(class_weights, dtype=torch.float32, device=logits.device)
        if weights.shape != (c,):
            raise ValueError(f"{weights.numel()} class weights do not fit logits of {c} classes")
        with torch.autocast(logits.device.type, enabled=False):
            return LOSSES[name](logits.float(), target, weights)
    return loss
