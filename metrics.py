"""Scores for semantic segmentation, all computed from one confusion matrix.

m[i, j] is the number of pixels of true class i that were predicted as j. Sum the matrices of all
images first, then score once: the mean of per-batch scores is a different, wrong number. IoU is
the official Cityscapes score (cityscapesScripts, evalPixelLevelSemanticLabeling.py).

    m = sum(confusion_matrix(prediction, target) for prediction, target in ...)
    print(pixel_accuracy(m), iou(m).nanmean(), dice(m).nanmean())
"""
import torch

IGNORE = 255                                        # as in data.py


def confusion_matrix(prediction, target, num_classes=19):
    """Count pixels by (truth, prediction): two integer tensors of one shape -> int64 C x C.
    target: 0 ... C-1, or 255 for ignored; prediction: 0 ... C-1, or anything where the target is
    ignored. Rows are the truth, columns the prediction. Works on any device and stays there.
    Raises ValueError for shapes that differ and for values out of range."""
    if prediction.shape != target.shape:
        raise ValueError(f"shapes differ: {tuple(prediction.shape)}, {tuple(target.shape)}")
    counted = target != IGNORE
    prediction, target = prediction[counted].long(), target[counted].long()     # 1-D
    for name, values in (("prediction", prediction), ("target", target)):
        wrong = (values < 0) | (values >= num_classes)
        if wrong.any():
            raise ValueError(f"{name} holds {values[wrong][0].item()}, "
                             f"which is neither 0 ... {num_classes - 1} nor ignored")
    cell = num_classes * target + prediction                    # the matrix, row after row
    return torch.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def pixel_accuracy(m):
    """Share of the labeled pixels predicted correctly, in [0, 1]; NaN if none is labeled."""
    return m.diag().sum().double() / m.sum()


def iou(m):
    """Intersection over union of each class, TP / (TP + FP + FN): C x C -> float64 C in [0, 1].
    A class in neither truth nor prediction is NaN, which `.nanmean()` skips; a class that is
    predicted but never true scores 0. Both as in the official scorer."""
    tp = m.diag().double()
    return tp / (m.sum(0) + m.sum(1) - tp)          # sum(1) is TP + FN, sum(0) is TP + FP


def dice(m):
    """Dice (F1) of each class, 2 TP / (2 TP + FP + FN) = 2 IoU / (1 + IoU); NaN as in `iou`."""
    return 2 * m.diag().double() / (m.sum(0) + m.sum(1))


def confusion_shares(m):
    """The share of each class's union that is confused with each other class -> float64 C x C.
    Entry i, j: pixels of i predicted as j plus pixels of j predicted as i, divided by the union
    of i, TP + FP + FN. The diagonal is 0. Row i sums to (FP + FN) / union = 1 - IoU of i (NaN
    if the IoU is NaN)."""
    tp = m.diag().double()
    lost = (m + m.T).double().fill_diagonal_(0)
    return lost / (m.sum(0) + m.sum(1) - tp).unsqueeze(1)
