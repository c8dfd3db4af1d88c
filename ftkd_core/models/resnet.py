# SPDX-License-Identifier: Apache-2.0
"""ResNet (He et al. 2016) with torchvision's parameter names and any base width.

Symbols: B images, C channels of a stage, H/W input size in pixels.
"""

from typing import Final

from torch import Tensor, nn

from ftkd_core.models.recompute import recompute

_LAYERS: Final[dict[int, tuple[int, int, int, int]]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first has the stride."""

    expansion: Final = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(x)) + shortcut)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 has the stride (torchvision's "v1.5")."""

    expansion: Final = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        result: Tensor = self.relu(self.bn3(self.conv3(x)) + shortcut)
        return result


class ResNet(nn.Module):
    """Compute feature maps at strides 4, 8, 16 and 32, of widths `out_channels`, of images (B, 3, H, W). If
    `recomputes` is set, training stores only the inputs of the residual blocks."""

    def __init__(self, depth: int, base_channels: int = 64) -> None:
        super().__init__()
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth < 50 else Bottleneck
        self.conv1 = nn.Conv2d(3, base_channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [base_channels * 2**i for i in range(4)]
        layers: list[nn.Sequential] = []
        in_channels = base_channels
        for index, (width, count) in enumerate(zip(widths, _LAYERS[depth], strict=True)):
            layers.append(_stage(block, in_channels, width, count, stride=1 if index == 0 else 2))
            in_channels = width * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.out_channels = tuple(width * block.expansion for width in widths)
        self.recomputes = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stride4 = self._stage(self.layer1, self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        stride8 = self._stage(self.layer2, stride4)
        stride16 = self._stage(self.layer3, stride8)
        return stride4, stride8, stride16, self._stage(self.layer4, stride16)

    def _stage(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        if not self.recomputes:
            result: Tensor = blocks(x)
            return result
        for block in blocks:
            x = recompute(block, block, x)
        return x


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, count: int, stride: int
) -> nn.Sequential:
    out_channels = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    blocks = [block(in_channels, channels, stride, downsample)]
    blocks += [block(out_channels, channels, 1, None) for _ in range(count - 1)]
    return nn.Sequential(*blocks)
