"""NCSN++ written down anew from its description, with the tensor names of the published checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def fir(x, up):
    """Resamples by 2 with the filter (1, 3, 3, 1) along both axes."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    channels = x.shape[1]
    kernel = torch.outer(taps, taps)[None, None].expand(channels, 1, 4, 4)
    if not up:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel, stride=2, groups=channels)
    stuffed = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    stuffed[:, :, ::2, ::2] = x
    return F.conv2d(F.pad(stuffed, (2, 1, 2, 1)), 4 * kernel, groups=channels)


def norm(channels):
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


class Fourier(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.W = nn.Parameter(16 * torch.randn(width), requires_grad=False)

    def forward(self, t):
        angle = 2 * math.pi * t.log()[:, None] * self.W
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Residual(nn.Module):
    def __init__(self, width_in, width, embedding, resample=None):
        super().__init__()
        self.GroupNorm_0, self.Conv_0 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.Dense_0 = nn.Linear(embedding, width)
        self.GroupNorm_1, self.Conv_1 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        if width_in != width or resample:
            self.Conv_2 = nn.Conv2d(width_in, width, 1)
        self.resample = resample

    def forward(self, x, embedding):
        h = F.silu(self.GroupNorm_0(x))
        if self.resample:
            h, x = fir(h, self.resample == "up"), fir(x, self.resample == "up")
        h = self.Conv_0(h) + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        return ((self.Conv_2(x) if hasattr(self, "Conv_2") else x) + h) / math.sqrt(2)


class Projection(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.W, self.b = nn.Parameter(0.1 * torch.randn(width, width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[:, None, None]


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.GroupNorm_0 = norm(width)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (Projection(width) for _ in range(4))

    def forward(self, x):
        h = self.GroupNorm_0(x)
        q, k, v = (project(h).flatten(2) for project in (self.NIN_0, self.NIN_1, self.NIN_2))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
        return (x + self.NIN_3((v @ weights.transpose(1, 2)).reshape(x.shape))) / math.sqrt(2)


class Combine(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.Conv_0 = nn.Conv2d(4, width, 1)


class NCSNpp(nn.Module):
    """`output` with complex `x`, `y` `(batch, 1, bins, frames)` and times `(batch,)`; `divide` as its checkpoint's."""

    def __init__(self, nf, multiples, blocks, attention, pyramid=True, divide=None):
        super().__init__()
        self.output_layer = nn.Conv2d(4, 2, 1)
        self.plan, self.pyramid, self.divide = [], pyramid, divide
        layers, embedding, widths = [], 4 * nf, [nf]

        def add(what, layer):
            self.plan.append(what)
            layers.append(layer)

        add("embed", Fourier(nf))
        add("embed", nn.Linear(2 * nf, embedding))
        add("embed", nn.Linear(embedding, embedding))
        add("first", nn.Conv2d(4, nf, 3, padding=1))
        width = nf
        for level, multiple in enumerate(multiples):
            for _ in range(blocks):
                add("down", Residual(width, nf * multiple, embedding))
                width = nf * multiple
                if level in attention:
                    add("attend", Attention(width))
                self.plan.append("keep")
                widths.append(width)
            if level < len(multiples) - 1:
                add("down", Residual(width, width, embedding, "down"))
                if pyramid:
                    add("combine", Combine(width))
                self.plan.append("keep")
                widths.append(width)
        add("down", Residual(width, width, embedding))
        add("attend", Attention(width))
        add("down", Residual(width, width, embedding))
        for level, multiple in reversed(list(enumerate(multiples))):
            for _ in range(blocks + 1):
                add("up", Residual(width + widths.pop(), nf * multiple, embedding))
                width = nf * multiple
            if level in attention:
                add("attend", Attention(width))
            if pyramid or level == 0:
                add("norm", norm(width))
                add("out", nn.Conv2d(width, 4, 3, padding=1))
            if level > 0:
                add("down", Residual(width, width, embedding, "up"))
        self.all_modules = nn.ModuleList(layers)

    def forward(self, x, y, t):
        x = torch.cat([x.real, x.imag, y.real, y.imag], dim=1)
        layers, embedding, kept, skip, total, normed = iter(self.all_modules), t, [], x, None, None
        h = x
        for number, what in enumerate(self.plan):
            if what == "keep":
                kept.append(h)
                continue
            layer = next(layers)
            if what == "embed":
                embedding = layer(F.silu(embedding) if number == 2 else embedding)
            elif what == "first":
                h = layer(h)
                kept.append(h)
            elif what == "down":
                h = layer(h, embedding)
            elif what == "up":
                h = layer(torch.cat([h, kept.pop()], dim=1), embedding)
            elif what == "attend":
                h = layer(h)
            elif what == "combine":
                skip = fir(skip, up=False)
                h = h + layer.Conv_0(skip)
            elif what == "norm":
                normed = F.silu(layer(h))
            else:
                total = layer(normed) if total is None else fir(total, up=True) + layer(normed)
        t = t[:, None, None, None]
        total = total / t if self.divide == "before" else total
        total = self.output_layer(total)
        total = total / t if self.divide == "after" else total
        return torch.complex(total[:, :1], total[:, 1:])
