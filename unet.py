"""U-Nets for semantic segmentation, from scratch: every layer between the pixels and the logits.

A U-Net (Ronneberger et al. 2015, arXiv 1505.04597) has two halves. The encoder halves the
resolution step by step and learns what is in the image. The decoder doubles it again. At each
step it joins the coarse map to a "skip": the encoder's feature map of that resolution, which
still knows where things are. Sizes are height x width.

    image ──> stride 2 ──> stride 4 ──> stride 8 ──> stride 16 ──> stride 32       encoder
                 │             │            │             │            │
                 │ skip        │ skip       │ skip        │ skip       │
                 v             v            v             v            │
    logits <──── Up <───────── Up <──────── Up <───────── Up <─────────┘           decoder

(ConvNeXt has no map of stride 2, so its decoder has three Ups. ConvUNeXt has strides 1 to 16.)
A 1x1 convolution computes the logits. Logits smaller than the image are upsampled to its size.

The encoders, ResNet (He et al. 2015, arXiv 1512.03385) and ConvNeXt (Liu et al. 2022, arXiv
2201.03545), can load published ImageNet weights. ConvUNeXt (Han et al. 2022,
doi 10.1016/j.knosys.2022.109512) is a whole U-Net of ConvNeXt-like blocks.

    model = build_model("resnet34", num_classes=19, pretrained=True)
    logits = model(images)        # float N x 3 x H x W, ImageNet-normalized -> N x 19 x H x W
"""
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

# ------------------------------------------------------------------------------------- ResNet

class BasicBlock(nn.Module):
    """Residual block, relu(x + f(x)), f: two 3x3 convolutions (ResNet, fig. 5 left). f has to learn
    only the change of x, and the sum passes gradients on to earlier layers directly.
    N x channels x H x W -> N x width x ceil(H / stride) x ceil(W / stride)"""
    expansion = 1                       # output channels = expansion * width

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)     # named as in the published weights

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3, 1x1 convolutions (ResNet, fig. 5 right), for ResNet-50 and more.
    N x channels x H x W -> N x 4 width x ceil(H / stride) x ceil(W / stride). The stride is on the
    3x3 convolution, as in the published weights ("ResNet v1.5")."""
    expansion = 4

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        out = self.expansion * width
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = shortcut(channels, out, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def shortcut(channels, out, stride):
    """The identity where the shapes match, else a 1x1 projection (ResNet, sec. 3.3, option B)."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """ResNet without its classifier: N x 3 x H x W -> five maps, at strides 2, 4, 8, 16, 32.
    `depths` is the number of blocks in each of the four stages. The state dict has torchvision's
    keys and shapes, without `fc.*`."""

    def __init__(self, block, depths):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        e = block.expansion
        self.layer1 = self.stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = self.stage(block, 64 * e, 128, depths[1], stride=2)
        self.layer3 = self.stage(block, 128 * e, 256, depths[2], stride=2)
        self.layer4 = self.stage(block, 256 * e, 512, depths[3], stride=2)
        self.channels = [64, 64 * e, 128 * e, 256 * e, 512 * e]         # of the five maps

    @staticmethod
    def stage(block, channels, width, depth, stride):
        """`depth` blocks: channels -> block.expansion * width. The first one has the stride."""
        blocks = [block(channels, width, stride)]
        for _ in range(depth - 1):
            blocks.append(block(block.expansion * width, width))
        return nn.Sequential(*blocks)

    def forward(self, x):
        x2 = F.relu(self.bn1(self.conv1(x)), inplace=True)      # the number is the stride
        x4 = self.layer1(F.max_pool2d(x2, 3, stride=2, padding=1))
        x8 = self.layer2(x4)
        x16 = self.layer3(x8)
        x32 = self.layer4(x16)
        return [x2, x4, x8, x16, x32]


# ----------------------------------------------------------------------------------- ConvNeXt

class ConvNeXtBlock(nn.Module):
    """Residual block (ConvNeXt, fig. 4): depthwise 7x7, LayerNorm, 1x1 to 4C, GELU, 1x1 to C.
    N x C x H x W -> N x C x H x W. Depthwise: each channel has a filter of its own. `gamma` (layer
    scale) starts near 0, so that every block is nearly the identity at first. In training,
    stochastic depth ("drop path", Huang et al. 2016, arXiv 1603.09382) skips the block with
    probability `drop_path`, independently for each image."""

    def __init__(self, channels, drop_path=0.0):
        super().__init__()
        self.dwconv = DepthwiseConv(channels)       # 7x7; as nn.Conv2d, but faster on a CPU
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)        # a 1x1 convolution, as published
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop_path = drop_path

    def forward(self, x):
        y = self.dwconv(x)
        y = y.permute(0, 2, 3, 1)                   # N x H x W x C: Linear acts on the last axis
        y = self.pwconv1(self.norm(y))
        y = self.gamma * self.pwconv2(F.gelu(y))
        if self.training and self.drop_path > 0:
            keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
            y = y * keep / (1 - self.drop_path)     # so that the expected value is unchanged
        return x + y.permute(0, 3, 1, 2)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: N x C x H x W -> N x C x H x W."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt without its classifier: N x 3 x H x W -> four maps, at strides 4, 8, 16, 32.
    The state dict has the keys and shapes of facebookresearch/ConvNeXt, without `norm.*` and
    `head.*`. The rate of stochastic depth grows linearly from 0 to `drop_path` over the blocks."""

    def __init__(self, depths, channels, drop_path=0.1):
        super().__init__()
        self.channels = list(channels)              # of the four maps
        conv = nn.Conv2d(3, channels[0], 4, stride=4)
        stem = nn.Sequential(conv, ChannelLayerNorm(channels[0], 1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for fine, coarse in zip(channels, channels[1:]):
            conv = nn.Conv2d(fine, coarse, 2, stride=2)
            self.downsample_layers.append(nn.Sequential(ChannelLayerNorm(fine, 1e-6), conv))
        self.stages = nn.ModuleList()
        rates = torch.linspace(0, drop_path, sum(depths)).tolist()      # one for each block
        for depth, width in zip(depths, channels):
            blocks = [ConvNeXtBlock(width, rate) for rate in rates[:depth]]
            self.stages.append(nn.Sequential(*blocks))
            rates = rates[depth:]

    def forward(self, x):
        features = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            features.append(x)
        return features


# ---------------------------------------------------------------------------------- the U-Net

class Up(nn.Module):
    """One decoder step: x, N x C x h x w, and skip s, N x S x 2h x 2w -> N x out x 2h x 2w.

    A U-Net upsamples the coarse map, concatenates the skip, and convolves:

        y = conv1x1(concatenate(upsample(x), s))
        y = relu(norm(y))
        y = block(y)                                a residual block of two 3x3 convolutions

    `forward` computes the same without a concatenation. The 1x1 convolution of two maps is the sum
    of two 1x1 convolutions, `coarse` of x and `fine` of s. `coarse` mixes channels and upsampling
    copies pixels, so their order does not matter:

        conv1x1(concatenate(upsample(x), s)) = coarse(upsample(x)) + fine(s)
                                             = upsample(coarse(x)) + fine(s)

    The last form is the cheapest: `coarse` sees the small map. Upsampling is by nearest neighbor;
    the 3x3 convolutions smooth the squares."""

    def __init__(self, channels, skip_channels, out):
        super().__init__()
        self.coarse = nn.Conv2d(channels, out, 1, bias=False)
        self.fine = nn.Conv2d(skip_channels, out, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.block = BasicBlock(out, out)

    def forward(self, x, skip):
        upsampled = F.interpolate(self.coarse(x), scale_factor=2, mode="nearest")
        y = self.norm(upsampled + self.fine(skip))
        return self.block(F.relu(y, inplace=True))


class UNet(nn.Module):
    """An encoder, and a decoder with one `Up` for each skip.

    float N x 3 x H x W -> logits N x num_classes x H x W, for any H and W; float32, also if the
    layers are computed in 16 bits (autocast). The input is padded with zeros (the mean color, once
    normalized) to multiples of 32; the output is cropped back. `widths`: the channels of the Ups,
    coarsest first. ConvNeXt uses three. With fewer widths, the finest skips are not used.
    "resnet34" turns an image of 3 x 512 x 1024 (channels x height x width) into these maps:

        stride           2               4               8              16             32
        encoder   64 x 256 x 512  64 x 128 x 256  128 x 64 x 128  256 x 32 x 64  512 x 16 x 32
        decoder   32 x 256 x 512  64 x 128 x 256  128 x 64 x 128  256 x 32 x 64

    `head` computes 19 x 256 x 512 logits, which are upsampled to 19 x 512 x 1024."""

    def __init__(self, encoder, num_classes, widths=(256, 128, 64, 32)):
        super().__init__()
        self.encoder = encoder
        *skip_channels, channels = encoder.channels
        self.ups = nn.ModuleList()
        for skip, width in zip(reversed(skip_channels), widths):
            self.ups.append(Up(channels, skip, width))
            channels = width
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 32, 0, -height % 32))     # -width % 32: to the next multiple
        padded_size = x.shape[-2:]
        *skips, x = self.encoder(x)
        for up, skip in zip(self.ups, reversed(skips)):
            x = up(x, skip)
        logits = F.interpolate(self.head(x).float(), padded_size, mode="bilinear")
        return logits[..., :height, :width]


# ---------------------------------------------------------------------------------- ConvUNeXt

class ConvUNeXtBlock(nn.Module):
    """ConvNeXt's block with BatchNorms, a last GELU, no gamma: N x C x H x W, in and out."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = DepthwiseConv(channels, padding_mode="reflect")
        self.norm1 = nn.BatchNorm2d(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm1(self.dwconv(x))
        y = self.pwconv1(y.permute(0, 2, 3, 1))     # N x H x W x 4C
        y = self.pwconv2(F.gelu(y))
        y = self.norm2(y.permute(0, 3, 1, 2))
        return F.gelu(x + y)


class GatedUp(nn.Module):
    """One decoder step of ConvUNeXt: a gate like an LSTM's (f forget, i input, g candidate).

    x, N x C x h x w, and skip s, N x C x H x W -> y, N x out x H x W
    (h = H / 2 and w = W / 2, rounded down)

        z       = upsample(norm(x))     bilinear, align_corners, as published   N x C x H x W
        f, i, g = gate(z)                                                       N x C x H x W each
        new_s   = sigmoid(linear1(s + f)) * s + sigmoid(i) * tanh(g)            N x C x H x W
        y       = conv(conv1x1([linear2(new_s), z]))                            N x out x H x W

    gate, linear1 and linear2 act on each pixel by itself. z (through f) and the skip decide how
    much of the skip is kept, from 0 to 1. z alone decides what is added (g), and where (i)."""

    def __init__(self, channels, out):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.gate = nn.Linear(channels, 3 * channels)
        self.linear1 = nn.Linear(channels, channels)
        self.linear2 = nn.Linear(channels, channels)
        self.conv1x1 = nn.Conv2d(2 * channels, out, 1)
        self.conv = nn.Sequential(ConvUNeXtBlock(out))          # published keys: conv.0.*

    def forward(self, x, skip):
        height, width = skip.shape[-2:]
        z = F.interpolate(self.norm(x), scale_factor=2, mode="bilinear", align_corners=True)
        z = F.pad(z, (0, width - z.shape[-1], 0, height - z.shape[-2]))     # by 1 if H or W is odd
        z = z.permute(0, 2, 3, 1)                   # N x H x W x C: Linear acts on the last axis
        s = skip.permute(0, 2, 3, 1)                # N x H x W x C
        f, i, g = self.gate(z).chunk(3, dim=-1)     # N x H x W x 3C -> three of N x H x W x C
        keep = torch.sigmoid(self.linear1(s + f))   # of the skip, 0 to 1
        new_s = keep * s + torch.sigmoid(i) * torch.tanh(g)
        y = torch.cat([self.linear2(new_s), z], dim=-1)         # N x H x W x 2C
        return self.conv(self.conv1x1(y.permute(0, 3, 1, 2)))


class ConvUNeXt(nn.Module):
    """The published ConvUNeXt (base_c 32, bilinear), with the published keys; 3.5 M parameters.
    float N x 3 x H x W -> float32 logits N x num_classes x H x W, for any H and W. Below 64 pixels
    the coarsest map (stride 16) has fewer than 4 pixels: a 7x7 filter cannot reflect 3 of them, and
    the published code fails. Such an image is first extended: its last row and column repeat."""

    def __init__(self, num_classes, width=32):
        super().__init__()
        self.in_conv = nn.Sequential(
            nn.Conv2d(3, width, 7, padding=3, padding_mode="reflect"),
            nn.BatchNorm2d(width), nn.GELU(), ConvUNeXtBlock(width))
        self.down1 = self.down(width, 2 * width, depth=1)
        self.down2 = self.down(2 * width, 4 * width, depth=1)
        self.down3 = self.down(4 * width, 8 * width, depth=3)
        self.down4 = self.down(8 * width, 8 * width, depth=1)       # as down3, for GatedUp
        self.up1 = GatedUp(8 * width, 4 * width)
        self.up2 = GatedUp(4 * width, 2 * width)
        self.up3 = GatedUp(2 * width, width)
        self.up4 = GatedUp(width, width)
        self.out_conv = nn.Sequential(nn.Conv2d(width, num_classes, 1))

    @staticmethod
    def down(channels, out, depth):
        """BatchNorm, a convolution of stride 2, then `depth` blocks."""
        layers = [nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 2, stride=2)]
        for _ in range(depth):
            layers.append(ConvUNeXtBlock(out))
        return nn.Sequential(*layers)

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, max(0, 64 - width), 0, max(0, 64 - height)), mode="replicate")
        x1 = self.in_conv(x)                        # the number is the stride
        x2 = self.down1(x1)
        x4 = self.down2(x2)
        x8 = self.down3(x4)
        x16 = self.down4(x8)
        x = self.up1(x16, x8)
        x = self.up2(x, x4)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        logits = self.out_conv(x).float()
        return logits[..., :height, :width]


# --------------------------------------------------------------- models by name, with weights

# One row for each model:
#   build       a function of n, the number of classes -> model. The last weight and bias in its
#               state dict must be those of the n classes: load_weights in eval.py relies on it.
#   url         ImageNet weights of its encoder, or None (ResNet-50's: torchvision's IMAGENET1K_V2)
#   optimizer   train.py's default
#   batch       train.py's default for real frames, for a GPU of 16 GB (resnet34 was measured)
# A checkpoint stores only the name of its row, so do not change a row that you trained: add one.
# For example a deeper encoder, ResNet-101, with a decoder that is twice as wide:
#   "resnet101": Spec(
#       lambda n: UNet(ResNet(Bottleneck, (3, 4, 23, 3)), n, widths=(512, 256, 128, 64)),
#       "https://download.pytorch.org/models/resnet101-cd907fc2.pth", "sgd", 8),
# Another encoder is a module with
#   encoder.channels    list of ints: the channels of each map, finest first
#   encoder(images)     float N x 3 x H x W, H and W multiples of 32 -> list of 2 to 5 maps,
#                       finest first, each half the size of the one before, the last of stride 32
Spec = namedtuple("Spec", "build url optimizer batch")
SPECS = {
    "resnet18": Spec(lambda n: UNet(ResNet(BasicBlock, (2, 2, 2, 2)), n),
                     "https://download.pytorch.org/models/resnet18-f37072fd.pth", "sgd", 8),
    "resnet34": Spec(lambda n: UNet(ResNet(BasicBlock, (3, 4, 6, 3)), n),
                     "https://download.pytorch.org/models/resnet34-b627a593.pth", "sgd", 8),
    "resnet50": Spec(lambda n: UNet(ResNet(Bottleneck, (3, 4, 6, 3)), n),
                     "https://download.pytorch.org/models/resnet50-11ad3fa6.pth", "sgd", 8),
    "convnext_tiny": Spec(
        lambda n: UNet(ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)), n),
        "https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth", "adamw", 8),
    "convunext": Spec(ConvUNeXt, None, "adamw", 4),
}
MODELS = list(SPECS)


def build_model(name, num_classes=19, pretrained=False):
    """Build a network by its name in MODELS, in training mode, on the CPU. Random weights have
    PyTorch's default initialization. With `pretrained`, the encoder has ImageNet weights.
    forward: float N x 3 x H x W, ImageNet-normalized -> float32 logits N x num_classes x H x W, for
    any H and W. ValueError: unknown name, no published weights; OSError: they cannot be loaded."""
    if name not in SPECS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    spec = SPECS[name]
    model = spec.build(num_classes)
    if pretrained:
        if spec.url is None:
            raise ValueError(f"no ImageNet weights are known for {name}; use --no-pretrained")
        load_imagenet(model.encoder, spec.url)
    return model


def load_imagenet(encoder, url):
    """Load published ImageNet weights into `encoder`; torch.hub downloads and caches the file.
    Downloads are verified against the start of the SHA-256 hash in their URL; ConvNeXt's has none.
    Loading cannot execute code. Raises OSError if the weights cannot be loaded."""
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)
        state = state.get("model", state)           # ConvNeXt's file wraps its weights
        classifier = ("fc.", "norm.", "head.")      # published layers that the encoder lacks
        state = {k: v for k, v in state.items() if not k.startswith(classifier)}
        encoder.load_state_dict(state)
    except Exception as error:                      # no network, a full disk, a broken file, ...
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"cannot load ImageNet weights from {url} ({type(error).__name__}: {reason}); download "
            f"that file into {torch.hub.get_dir()}/checkpoints yourself, or use --no-pretrained"
        ) from error


# ------------------------------ faster training on a CPU: equal up to rounding, safe to skip

class DepthwiseConv(nn.Conv2d):
    """A 7x7 convolution with a filter for each channel, trained on a CPU with `FastDepthwise`."""

    def __init__(self, channels, padding_mode="zeros"):
        super().__init__(channels, channels, 7, padding=3, groups=channels,
                         padding_mode=padding_mode)

    def forward(self, x):
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return FastDepthwise.apply(F.pad(x, (3, 3, 3, 3), mode), self.weight, self.bias)


class FastDepthwise(torch.autograd.Function):
    """y = F.conv2d(x, weight, bias, groups=C): N x C x (H + 6) x (W + 6) -> N x C x H x W.

    In each image and channel, with i, j = 0 ... 6 and a loss L:

        y[r, q]          = bias + sum_ij weight[i, j] x[r + i, q + j]
        dL/dweight[i, j] = sum_rq dL/dy[r, q] x[r + i, q + j]           (summed over the images)

    On a CPU, PyTorch computes the second sum fast only for kernels of up to 3 columns j. Columns do
    not depend on each other, so `backward` computes 3 + 3 + 1 of them. With the forward pass, this
    takes 0.36 s instead of 0.59 s (one core, float32, 2 x 64 x 128 x 256)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):                        # grad is dL/dy, bfloat16 under autocast
        x, weight = ctx.saved_tensors
        x, weight = x.to(grad.dtype), weight.to(grad.dtype)
        channels, width = len(weight), grad.shape[3]
        grad_x = conv2d_input(x.shape, weight, grad, groups=channels)
        parts = []
        for j, columns in (0, 3), (3, 3), (6, 1):
            # For example, columns 3, 4, 5 of the kernel see columns 3 ... width + 4 of x.
            x_part = x[..., j:j + columns - 1 + width]
            parts.append(conv2d_weight(x_part, (channels, 1, 7, columns), grad, groups=channels))
        grad_weight = torch.cat(parts, dim=3)       # autograd casts it to weight's float32
        return grad_x, grad_weight, grad.sum((0, 2, 3))
