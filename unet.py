"""U-Nets for semantic segmentation, from scratch: every layer between the pixels and the logits.

A U-Net (Ronneberger et al. 2015, arXiv 1505.04597) walks down an encoder that halves the
resolution and gains meaning, then up a decoder that joins each coarse map to the finer one (the
"skip") that the encoder left at the same stride:

    image  ──> stride 2 ──> 4 ──> 8 ──> 16 ──> 32        encoder
                  │         │     │      │      │
    logits <──  Up  <──    Up <── Up <── Up <───┘        decoder

Encoders: ResNet (He et al. 2015, arXiv 1512.03385) and ConvNeXt (Liu et al. 2022, arXiv
2201.03545), whose weights are interchangeable with the published ImageNet ones. Last comes
ConvUNeXt (Han et al. 2022, doi 10.1016/j.knosys.2022.109512), a U-Net of ConvNeXt-like blocks.

    model = build_model("resnet34", num_classes=19, pretrained=True)
    logits = model(images)        # float N x 3 x H x W, ImageNet-normalised -> N x 19 x H x W
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

# ---------------------------------------------------------------- ResNet: the residual encoder


class BasicBlock(nn.Module):
    """Two 3x3 convolutions that learn a correction to their input (ResNet, fig. 5 left).

    N x channels x H x W -> N x width x ceil(H / stride) x ceil(W / stride)
    """
    expansion = 1

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(channels, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1 down to `width`, 3x3, 1x1 up to 4 x width: a cheap deep block (ResNet, fig. 5 right).

    N x channels x H x W -> N x 4 width x ceil(H / stride) x ceil(W / stride)
    The stride sits on the 3x3 convolution, as in the published weights ("ResNet v1.5").
    """
    expansion = 4

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(channels, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


def shortcut(channels, out, stride):
    """The identity where shapes allow it, else a 1x1 projection (ResNet, sec. 3.3, option B)."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """ResNet without its classifier: N x 3 x H x W -> five maps, strides 2 4 8 16 32.

    `depths` counts the blocks of each stage. Keys and shapes are torchvision's, less `fc.*`.
    """

    def __init__(self, block, depths):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.channels = [64]                        # of each feature map, finest first
        for i, depth in enumerate(depths):
            width, out = 64 * 2**i, 64 * 2**i * block.expansion
            layer = [block(self.channels[-1], width, stride=1 if i == 0 else 2)]
            layer += [block(out, width) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))       # the published names
            self.channels.append(out)

    def forward(self, x):
        features = [F.relu(self.bn1(self.conv1(x)), inplace=True)]
        x = F.max_pool2d(features[0], 3, stride=2, padding=1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


# ------------------------------------------------------ ConvNeXt: a ResNet after a transformer


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, N x C x H x W in and out."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DepthwiseConv(nn.Conv2d):
    """A 7x7 convolution of each channel by itself, N x C x H x W in and out."""

    def __init__(self, channels, padding_mode="zeros"):
        super().__init__(channels, channels, 7, padding=3, groups=channels,
                         padding_mode=padding_mode)

    def forward(self, x):
        if x.device.type != "cpu" or not torch.is_grad_enabled():   # only its gradient is slow
            return super().forward(x)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return ThinStrips.apply(F.pad(x, (3, 3, 3, 3), mode), self.weight, self.bias)


class ThinStrips(torch.autograd.Function):
    """F.conv2d(x, weight, bias, groups=C) with a quick gradient of the weight on CPUs.

    oneDNN, which computes there, is quick at it for kernels of up to 3 columns only. Hence the
    kernel's columns 3 at a time: 6 times as fast in float32, 15 times in bfloat16.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, groups=len(weight))

    @staticmethod
    def backward(ctx, g):
        x, weight = (t.to(g.dtype) for t in ctx.saved_tensors)
        strips = [conv2d_weight(x[..., i:i + g.shape[3] + strip.shape[3] - 1], strip.shape, g,
                                groups=len(weight))
                  for i, strip in zip((0, 3, 6), weight.split(3, dim=3))]
        return (conv2d_input(x.shape, weight, g, groups=len(weight)), torch.cat(strips, 3),
                g.sum((0, 2, 3)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, pointwise x4, GELU, pointwise back (ConvNeXt, fig. 4).

    N x C x H x W in and out. `gamma` (layer scale) starts so small that every block begins as
    the identity. While training, stochastic depth skips the block for a share `drop_path` of
    the images (Huang et al. 2016, arXiv 1603.09382).
    """

    def __init__(self, channels, drop_path=0.0):
        super().__init__()
        self.dwconv = DepthwiseConv(channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop_path = drop_path

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)      # N H W C: a Linear is a 1x1 convolution
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        if self.training and self.drop_path:
            keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
            y = y * (keep / (1 - self.drop_path))   # the expectation stays what it is
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt without its classifier: N x 3 x H x W -> four maps, strides 4 8 16 32.

    Keys and shapes are facebookresearch/ConvNeXt's, less `norm.*` and `head.*`. The rate of
    stochastic depth grows linearly from 0 at the first block to `drop_path` at the last.
    """

    def __init__(self, depths, channels, drop_path=0.1):
        super().__init__()
        self.channels = list(channels)
        self.downsample_layers = nn.ModuleList([nn.Sequential(
            nn.Conv2d(3, channels[0], 4, stride=4), ChannelLayerNorm(channels[0], 1e-6))])
        for fine, coarse in zip(channels, channels[1:]):
            self.downsample_layers.append(nn.Sequential(
                ChannelLayerNorm(fine, 1e-6), nn.Conv2d(fine, coarse, 2, stride=2)))
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width, next(rates)) for _ in range(depth)))
            for width, depth in zip(channels, depths))

    def forward(self, x):
        features = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            features.append(x)
        return features


# ------------------------------------------------------------------------------- the U-Net


class Up(nn.Module):
    """One step up: N x C x H x W, and the skip N x S x 2H x 2W -> N x out x 2H x 2W.

    Where U-Net concatenates the two and convolves, a 1x1 convolution comes first. That of a
    concatenation is the sum of one of each part, of which the coarse one is cheap: it comes before
    the upsampling, on a quarter of the pixels.
    """

    def __init__(self, channels, skip_channels, out):
        super().__init__()
        self.coarse = nn.Conv2d(channels, out, 1, bias=False)
        self.fine = nn.Conv2d(skip_channels, out, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.block = BasicBlock(out, out)

    def forward(self, x, skip):
        x = F.interpolate(self.coarse(x), scale_factor=2, mode="nearest") + self.fine(skip)
        return self.block(F.relu(self.norm(x), inplace=True))


class UNet(nn.Module):
    """An encoder, and a decoder of residual blocks, one for each skip.

    float N x 3 x H x W -> logits N x num_classes x H x W, for any H and W: the image is padded
    with zeros (the mean colour, once normalised) to whole multiples of 32, and cropped back.
    The logits are made at the encoder's finest stride (ResNet 2, ConvNeXt 4) and enlarged. `widths`
    are the channels of the decoder, coarsest first; ConvNeXt has a skip less and takes but three.
    """

    def __init__(self, encoder, num_classes, widths=(256, 128, 64, 32)):
        super().__init__()
        *skips, channels = encoder.channels
        self.ups = nn.ModuleList()
        for skip_channels, width in zip(reversed(skips), widths):
            self.ups.append(Up(channels, skip_channels, width))
            channels = width
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.encoder = encoder

    def forward(self, x):
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % 32, 0, -height % 32))     # -w % 32: what w lacks
        *skips, x = self.encoder(padded)
        for up, skip in zip(self.ups, reversed(skips)):
            x = up(x, skip)
        logits = F.interpolate(self.head(x), padded.shape[-2:], mode="bilinear")
        return logits[..., :height, :width]


# ------------------------------------------------- ConvUNeXt: ConvNeXt-like blocks, gated skips


class ConvUNeXtBlock(nn.Module):
    """ConvNeXt's block with BatchNorm and a GELU after the sum; N x C x H x W in and out."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = DepthwiseConv(channels, padding_mode="reflect")
        self.norm1 = nn.BatchNorm2d(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm1(self.dwconv(x)).permute(0, 2, 3, 1)
        y = self.pwconv2(F.gelu(self.pwconv1(y))).permute(0, 3, 1, 2)
        return F.gelu(x + self.norm2(y))


class GatedUp(nn.Module):
    """One step up through an LSTM-like gate on the skip (ConvUNeXt).

    N x C x H x W, and the skip N x C x H' x W' (about twice as large) -> N x out x H' x W'
    """

    def __init__(self, channels, out):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.gate = nn.Linear(channels, 3 * channels)
        self.linear1 = nn.Linear(channels, channels)
        self.linear2 = nn.Linear(channels, channels)
        self.conv1x1 = nn.Conv2d(2 * channels, out, 1)
        self.conv = nn.Sequential(ConvUNeXtBlock(out))

    def forward(self, x, skip):
        # As published, with z = enlarge(norm(x)) and the gate's three parts f, w, v = gate(z):
        #     skip = sigmoid(linear1(f + skip)) * skip + sigmoid(w) * tanh(v)
        #     return conv(conv1x1([linear2(skip), z]))
        # Whatever is linear in z commutes with `enlarge` and is done before it, on a quarter of
        # the pixels; two linear maps in a row are one. The same function of the same weights.
        z = self.norm(x)
        dy, dx = skip.shape[-2] - 2 * z.shape[-2], skip.shape[-1] - 2 * z.shape[-1]

        def enlarged(weight):                       # enlarge(weight @ z), N H' W' C
            y = F.conv2d(z, weight[..., None, None])
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
            return F.pad(y, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2)).permute(0, 2, 3, 1)

        wf, ww, wv = self.gate.weight.chunk(3)
        bf, bw, bv = self.gate.bias.chunk(3)
        w1, w2 = self.linear1.weight, self.linear2.weight
        from_skip, from_z = self.conv1x1.weight.flatten(1).chunk(2, dim=1)
        skip = skip.permute(0, 2, 3, 1)
        keep = torch.sigmoid(F.linear(skip, w1, self.linear1(bf)) + enlarged(w1 @ wf))
        skip = keep * skip + torch.sigmoid(enlarged(ww) + bw) * torch.tanh(enlarged(wv) + bv)
        bias = self.conv1x1.bias + from_skip @ self.linear2.bias
        y = F.linear(skip, from_skip @ w2, bias) + enlarged(from_z)
        return self.conv(y.permute(0, 3, 1, 2))


class ConvUNeXt(nn.Module):
    """The published ConvUNeXt (base_c 32, bilinear), 3.5 million parameters. The names, and each
    Sequential of one layer, are those of the published keys.

    float N x 3 x H x W -> logits N x num_classes x H x W, for any H and W. Odd sizes are met
    inside `GatedUp`, as published; images below 64 pixels, where the published code fails (the
    coarsest map is too small to reflect), are extended by their last pixel and cropped back.
    """

    def __init__(self, num_classes, width=32):
        super().__init__()

        def down(channels, out, depth=1):
            return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 2, stride=2),
                                 *(ConvUNeXtBlock(out) for _ in range(depth)))

        self.in_conv = nn.Sequential(
            nn.Conv2d(3, width, 7, padding=3, padding_mode="reflect"),
            nn.BatchNorm2d(width), nn.GELU(), ConvUNeXtBlock(width))
        self.down1 = down(width, 2 * width)
        self.down2 = down(2 * width, 4 * width)
        self.down3 = down(4 * width, 8 * width, depth=3)
        self.down4 = down(8 * width, 8 * width)
        self.up1 = GatedUp(8 * width, 4 * width)
        self.up2 = GatedUp(4 * width, 2 * width)
        self.up3 = GatedUp(2 * width, width)
        self.up4 = GatedUp(width, width)
        self.out_conv = nn.Sequential(nn.Conv2d(width, num_classes, 1))

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, max(0, 64 - width), 0, max(0, 64 - height)), mode="replicate")
        x1 = self.in_conv(x)                        # strides: x1 1, x2 2, x3 4, x4 8, x5 16
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        x = self.up4(self.up3(self.up2(self.up1(x5, x4), x3), x2), x1)
        return self.out_conv(x)[..., :height, :width]


# -------------------------------------------------------------------- by name, with weights

TORCHVISION = "https://download.pytorch.org/models"
ENCODERS = {            # how each is built, and its ImageNet-1k weights (torchvision's, Meta's)
    "resnet18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2)), f"{TORCHVISION}/resnet18-f37072fd.pth"),
    "resnet34": (lambda: ResNet(BasicBlock, (3, 4, 6, 3)), f"{TORCHVISION}/resnet34-b627a593.pth"),
    "resnet50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), f"{TORCHVISION}/resnet50-11ad3fa6.pth"),
    "convnext_tiny": (lambda: ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)),
                      "https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224_ema.pth"),
}
MODELS = [*ENCODERS, "convunext"]


def load_imagenet(encoder, url):
    """Fill `encoder` with its published ImageNet weights, downloaded once to torch.hub's folder.

    Raises OSError naming the URL, that folder and the way without if they cannot be had.
    """
    folder = f"{torch.hub.get_dir()}/checkpoints"
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True)
        state = state.get("model", state)           # ConvNeXt's file wraps its weights
        head = ("fc.", "norm.", "head.")            # the classifier, for which a U-Net has no use
        encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith(head)})
    except Exception as error:                      # no network, no room, a broken file, ...
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"no ImageNet weights from {url} ({type(error).__name__}: {reason}): put "
                      f"that file, whole, into {folder} by hand, or use --no-pretrained") from error


def build_model(name, num_classes=19, pretrained=False):
    """A network by its name in MODELS, in training mode, on the CPU.

    forward: float N x 3 x H x W, normalised with ImageNet mean and std -> logits
    N x num_classes x H x W, any H and W. Raises ValueError for an unknown name, or for
    `pretrained` where no weights are published, OSError if they cannot be downloaded.
    """
    if name not in MODELS:
        raise ValueError(f"no model is called {name!r}; there are: {', '.join(MODELS)}")
    if name == "convunext":
        if pretrained:
            raise ValueError("no ImageNet weights are published for convunext: --no-pretrained")
        return ConvUNeXt(num_classes)
    build, url = ENCODERS[name]
    model = UNet(build(), num_classes)
    if pretrained:
        load_imagenet(model.encoder, url)
    return model
