#!/usr/bin/env python3
"""The DiffEnc training objective in PyTorch: a second opinion on the C program.

This file says the same thing as the C code in another language, written from the equations and not from the
C code, so that a misunderstanding has to be made twice to go unnoticed. The two share parameter names and
file formats and nothing else. It is a reference and a measuring stick, not a training program. It computes
the loss of a given batch and its gradients in float64, writes the golden files of the tests, and measures
what a PyTorch user would get on the same machine.

It needs PyTorch and NumPy (Debian: apt-get install python3-torch). Reading order: the networks (section 2)
and the method (section 3) are the mathematics; the rest is files, checks and clocks.

    images inside    [B, C, H, W], PyTorch's order; in files and at the interface [B, H, W, C], channels last
    kernels inside   convolution [out, in, 3, 3], upsampling [in, out, 2, 2], dense and 1x1 [in, out]
    kernels in files convolution [3, 3, in, out], upsampling [2, 2, in, out], dense and 1x1 [in, out]
    p                the parameters, a plain dict {name: tensor}
"""

import argparse
import collections
import ctypes
import gzip
import json
import math
import os
import resource
import statistics
import struct
import subprocess
import sys
import warnings
from time import perf_counter

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch.autograd import forward_ad
except ImportError:  # Told by main() in one line, after --help had its chance.
    torch = None


class Failure(Exception):
    """Something the user can understand and repair; main() prints it as one line."""


# ------------------------------------------------------------------------------------------------------------
# 1. Files: safetensors by hand, and the configuration that a checkpoint carries in its metadata
# ------------------------------------------------------------------------------------------------------------

DTYPES = {"F32": "<f4", "F64": "<f8", "U8": "|u1"}


def read_safetensors(path):
    """Returns ({name: numpy array}, {key: string}). A file: length of header, JSON header, raw data."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        length, = struct.unpack("<Q", content[:8])
        header = json.loads(content[8:8 + length])
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = content[8 + length + begin:8 + length + end]
            tensors[name] = np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"])
        return tensors, metadata
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}")
    except (struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{path}: not a safetensors file that I can read ({type(error).__name__}: {error})")


def write_safetensors(path, tensors, metadata=None):
    """Writes {name: numpy array}, wide types first, then by name: the same input gives the same bytes."""
    codes = {np.dtype(code): name for name, code in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, offset = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name in order:
        array = tensors[name]
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The data begin at a multiple of eight bytes.
    try:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                file.write(np.ascontiguousarray(tensors[name]).tobytes())
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}")


# kind is "vdm", "nt" or "diffenc"; L and E count ResBlocks; T is 0 for continuous time;
# w is sigma_Q^2 / sigma_P^2; fourier lists the powers of two of z's features; classes is 0 without labels.
Config = collections.namedtuple("Config", "model kind L E net channels encoder_channels height width "
                                          "image_channels predict schedule T w gamma_min gamma_max "
                                          "fourier classes")


def make_config(model="vdm-1", net="flat", channels=4, encoder_channels=4, height=8, width=8,
                image_channels=1, predict="v", schedule="fixed", T=0, w=1.0, gamma_min=-13.3, gamma_max=5.0,
                fourier=(6, 7), classes=0):
    """Takes the model's name apart (vdm-L, diffenc-L-nt, diffenc-L-E) and refuses what has no meaning."""
    parts = model.split("-")
    try:
        if parts[0] == "vdm" and len(parts) == 2:
            kind, L, E = "vdm", int(parts[1]), 0
        elif parts[0] == "diffenc" and len(parts) == 3 and parts[2] == "nt":
            kind, L, E = "nt", int(parts[1]), 0
        elif parts[0] == "diffenc" and len(parts) == 3:
            kind, L, E = "diffenc", int(parts[1]), int(parts[2])
        else:
            raise ValueError
    except ValueError:
        raise Failure(f"model {model}: must be vdm-L, diffenc-L-nt or diffenc-L-E")
    if L < 1 or kind == "diffenc" and E < 1:
        raise Failure(f"model {model}: L and E must be at least 1")
    for n in (channels, encoder_channels):
        if n < 4 or n % 4:
            raise Failure(f"{n} channels: must be a multiple of 4")
    for value, allowed in ((net, ("flat", "unet")), (predict, ("v", "eps", "x")),
                           (schedule, ("fixed", "learned"))):
        if value not in allowed:
            raise Failure(f"{value}: must be one of {', '.join(allowed)}")
    if T == 0 and w != 1:
        raise Failure(f"variance ratio {w:g}: in continuous time it must be 1, the loss would be infinite")
    return Config(model, kind, L, E, net, channels, encoder_channels, height, width, image_channels, predict,
                  schedule, T, w, gamma_min, gamma_max, fourier, classes)


def config_of_metadata(metadata):
    """A checkpoint that does not name the features' powers or the classes is older than these settings: it has
    the paper's, and none."""
    try:
        first, last = (int(power) for power in metadata.get("fourier", "6..7").split(".."))
        return make_config(metadata["model"], metadata["net"], int(metadata["channels"]),
                           int(metadata["encoder_channels"]), int(metadata["height"]), int(metadata["width"]),
                           int(metadata["image_channels"]), metadata["predict"], metadata["schedule"],
                           int(metadata["timesteps"]), float(metadata["variance_ratio"]),
                           float(metadata["gamma_min"]), float(metadata["gamma_max"]),
                           tuple(range(first, last + 1)), int(metadata.get("classes", 0)))
    except KeyError as error:
        raise Failure(f"the metadata lack {error}")
    except ValueError as error:
        raise Failure(f"the metadata hold a bad number ({error})")


def metadata_of_config(c):
    return {"format": "diffenc", "format_version": "1", "step": "0", "model": c.model, "net": c.net,
            "channels": str(c.channels), "encoder_channels": str(c.encoder_channels), "height": str(c.height),
            "width": str(c.width), "image_channels": str(c.image_channels), "predict": c.predict,
            "schedule": c.schedule, "timesteps": str(c.T), "variance_ratio": f"{c.w:g}",
            "gamma_min": f"{c.gamma_min:g}", "gamma_max": f"{c.gamma_max:g}", "dropout": "0",
            **({"fourier": f"{c.fourier[0]}..{c.fourier[-1]}"} if c.fourier != (6, 7) else {}),
            **({"conditional": "1", "classes": str(c.classes)} if c.classes else {})}


def from_file_layout(name, array, dtype):
    """A kernel of a file as PyTorch's convolutions want it; all else is the same inside and in files."""
    tensor = torch.tensor(np.array(array), dtype=dtype)
    if tensor.dim() == 4:
        tensor = tensor.permute(2, 3, 0, 1) if "upsample" in name else tensor.permute(3, 2, 0, 1)
    return tensor.contiguous()


def to_file_layout(name, tensor):
    if tensor.dim() == 4:
        tensor = tensor.permute(2, 3, 0, 1) if "upsample" in name else tensor.permute(2, 3, 1, 0)
    return np.ascontiguousarray(tensor.detach().numpy())


# ------------------------------------------------------------------------------------------------------------
# 2. The networks. Every function takes the parameters p and the prefix of the names that belong to it
# ------------------------------------------------------------------------------------------------------------

def groups(channels):
    return min(32, channels // 4)


def group_norm(p, name, h):
    """Per example and group of channels: mean 0, (biased) variance 1; then a scale and bias per channel."""
    if forward_ad.unpack_dual(h).tangent is not None:
        h = h.contiguous()  # PyTorch 1.13's formula for the tangent cannot do without.
    return F.group_norm(h, groups(h.shape[1]), p[name + ".scale"], p[name + ".bias"], eps=1e-6)


def convolution(p, name, h):
    """3x3, stride 1, zero padding: [B, in, H, W] -> [B, out, H, W]."""
    return F.conv2d(h, p[name + ".kernel"], p[name + ".bias"], padding=1)


def dense(p, name, h):
    """On the last axis: [..., in] -> [..., out]."""
    return h @ p[name + ".kernel"] + p[name + ".bias"]


def time_embedding(p, name, t_norm, channels, label):
    """[B] -> [B, 4 channels]. t_norm is what network_time() makes of lambda. With classes the row of each
    example's label [B] is added."""
    half = channels // 2
    j = torch.arange(half, dtype=t_norm.dtype)
    frequencies = torch.exp(-math.log(10000.0) * j / (half - 1))
    angles = 1000.0 * t_norm[:, None] * frequencies
    h = torch.cat([angles.sin(), angles.cos()], 1)
    h = F.silu(dense(p, name + ".time.dense0", h))
    h = dense(p, name + ".time.dense1", h)
    if name + ".class.kernel" in p:
        h = h + p[name + ".class.kernel"][label]
    return F.silu(h)


def res_block(p, name, x, time, dropout):
    """[B, in, H, W] and the time embedding [B, 4n] -> [B, out, H, W]; a 1x1 skip where in and out differ."""
    h = convolution(p, name + ".conv1", F.silu(group_norm(p, name + ".norm1", x)))
    h = h + (time @ p[name + ".time.kernel"])[:, :, None, None]
    h = F.silu(group_norm(p, name + ".norm2", h))
    if dropout > 0:
        h = F.dropout(h, dropout)
    h = convolution(p, name + ".conv2", h)
    if name + ".skip.kernel" in p:
        x = F.conv2d(x, p[name + ".skip.kernel"].t()[:, :, None, None], p[name + ".skip.bias"])
    return x + h


def softmax(a):
    """Over the last axis. torch.softmax, but written out where a tangent passes: PyTorch 1.13's formula for
    that tangent overwrites a number that the reverse sweep through it still needs."""
    primal, tangent = forward_ad.unpack_dual(a)
    if tangent is None:
        return torch.softmax(a, -1)
    e = torch.exp(a - primal.detach().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def attention(p, name, x):
    """One head over all H W positions. Channels are the last axis here: a position is a row of a matrix."""
    B, C, H, W = x.shape
    h = group_norm(p, name + ".norm", x).permute(0, 2, 3, 1).reshape(B, H * W, C)
    q, k, v = (dense(p, f"{name}.{which}", h) for which in "qkv")
    attend = softmax(q @ k.transpose(1, 2) / math.sqrt(C))  # [B, position, position attended to]
    h = dense(p, name + ".out", attend @ v)
    return x + h.reshape(B, H, W, C).permute(0, 3, 1, 2)


def middle(p, name, h, time, dropout):
    h = res_block(p, name + ".mid.0", h, time, dropout)
    h = attention(p, name + ".mid.attn", h)
    return res_block(p, name + ".mid.1", h, time, dropout)


def output(p, name, h):
    return convolution(p, name + ".conv_out", F.silu(group_norm(p, name + ".norm_out", h)))


def fourier_features(c, z):
    """[B, C, H, W] -> [B, 5C, H, W]: z, then sin, then cos of 2^f 2 pi z; f = 6, 7 side by side. With n powers
    of two instead of the paper's two, (1 + 2n) C channels."""
    frequencies = 2 * math.pi * torch.tensor([2.0 ** power for power in c.fourier], dtype=z.dtype)
    angles = (z[:, :, None] * frequencies[:, None, None]).flatten(1, 2)
    return torch.cat([z, angles.sin(), angles.cos()], 1)


def flat_body(p, name, h, time, L, dropout):
    """All at full resolution. The outputs of conv_in and of the down blocks are kept for the up blocks."""
    kept = [h]
    for i in range(L):
        h = res_block(p, f"{name}.down.{i}", h, time, dropout)
        kept.append(h)
    h = middle(p, name, h, time, dropout)
    for i in range(L + 1):
        h = res_block(p, f"{name}.up.{i}", torch.cat([h, kept.pop()], 1), time, dropout)
    return h


def unet_levels(height, blocks):
    """How often the U-Net halves the image: until the height is odd or at most 8, at most `blocks` times."""
    for i in range(blocks):
        halved = height // 2 ** (i + 1)
        if halved % 2 == 1 or halved <= 8:
            return i + 1
    return blocks


def unet_body(p, name, h, time, blocks, dropout):
    """Level l has n 2^l channels. What is kept of a level is its output before the pooling."""
    levels = unet_levels(h.shape[2], blocks)
    per_level = max(1, blocks // levels)
    kept = []
    for level in range(levels):
        for block in range(per_level):
            h = res_block(p, f"{name}.down.{level}.{block}", h, time, dropout)
        kept.append(h)
        h = F.max_pool2d(h, 2)
    h = middle(p, name, h, time, dropout)
    for step in range(levels):
        upsample = f"{name}.up.{step}.upsample"
        h = F.conv_transpose2d(h, p[upsample + ".kernel"], p[upsample + ".bias"], stride=2)
        h = torch.cat([h, kept.pop()], 1)
        for block in range(per_level):
            h = res_block(p, f"{name}.up.{step}.{block}", h, time, dropout)
    return h


def score(p, c, z, t_norm, label, dropout=0.0):
    """The score network's output for z_t [B, C, H, W] and t_norm [B]; c.predict says what it stands for."""
    time = time_embedding(p, "score", t_norm, c.channels, label)
    h = convolution(p, "score.conv_in", fourier_features(c, z))
    body = flat_body if c.net == "flat" else unet_body
    return z + output(p, "score", body(p, "score", h, time, c.L, dropout))


def encoder(p, c, x, t_norm, label, dropout=0.0):
    """y(x, lambda) in (-1, 1), [B, C, H, W]; lambda enters as t_norm."""
    time = time_embedding(p, "encoder", t_norm, c.encoder_channels, label)
    h = convolution(p, "encoder.conv_in", x)
    return torch.tanh(output(p, "encoder", unet_body(p, "encoder", h, time, c.E, dropout)))


def parameter_shapes(c):
    """{name: shape as in files} of every parameter, in the order of the forward pass."""
    shapes = {}

    def layer(name, *kernel):
        shapes[name + ".kernel"] = kernel
        shapes[name + ".bias"] = kernel[-1:]

    def norm(name, n):
        shapes[name + ".scale"] = shapes[name + ".bias"] = (n,)

    def block(name, n_in, n_out, n):
        norm(name + ".norm1", n_in)
        layer(name + ".conv1", 3, 3, n_in, n_out)
        shapes[name + ".time.kernel"] = (4 * n, n_out)
        norm(name + ".norm2", n_out)
        layer(name + ".conv2", 3, 3, n_out, n_out)
        if n_in != n_out:
            layer(name + ".skip", n_in, n_out)

    def mid(name, width, n):
        block(name + ".mid.0", width, width, n)
        norm(name + ".mid.attn.norm", width)
        for which in ("q", "k", "v", "out"):
            layer(f"{name}.mid.attn.{which}", width, width)
        block(name + ".mid.1", width, width, n)

    def flat(name, n, L):
        for i in range(L):
            block(f"{name}.down.{i}", n, n, n)
        mid(name, n, n)
        for i in range(L + 1):
            block(f"{name}.up.{i}", 2 * n, n, n)

    def unet(name, n, blocks):
        levels = unet_levels(c.height, blocks)
        if c.height % 2 ** levels or c.width % 2 ** levels:
            raise Failure(f"images of {c.height}x{c.width} cannot be halved {levels} times")
        per_level = max(1, blocks // levels)
        width = n
        for level in range(levels):
            for i in range(per_level):
                block(f"{name}.down.{level}.{i}", width, n * 2 ** level, n)
                width = n * 2 ** level
        mid(name, width, n)
        for step in range(levels):
            here = n * 2 ** (levels - 1 - step)
            layer(f"{name}.up.{step}.upsample", 2, 2, width, here)
            for i in range(per_level):
                block(f"{name}.up.{step}.{i}", here if i else 2 * here, here, n)
            width = here

    def network(name, n, n_in, body, blocks):
        layer(name + ".time.dense0", n, 4 * n)
        layer(name + ".time.dense1", 4 * n, 4 * n)
        if c.classes:
            shapes[name + ".class.kernel"] = (c.classes, 4 * n)
        layer(name + ".conv_in", 3, 3, n_in, n)
        body(name, n, blocks)
        norm(name + ".norm_out", n)
        layer(name + ".conv_out", 3, 3, n, c.image_channels)

    network("score", c.channels, (1 + 2 * len(c.fourier)) * c.image_channels, flat if c.net == "flat" else unet, c.L)
    if c.kind == "diffenc":
        network("encoder", c.encoder_channels, c.image_channels, unet, c.E)
    if c.schedule == "learned":
        shapes["gamma.b"] = shapes["gamma.w"] = (1,)
    return shapes


# ------------------------------------------------------------------------------------------------------------
# 3. The method. Images [B, C, H, W]; what belongs to a time [B, 1, 1, 1]; one number per example [B]
# ------------------------------------------------------------------------------------------------------------

def scale(k):
    """Integer pixels 0..255 to the middle of their 256th part of (-1, 1)."""
    return 2 * (k + 0.5) / 256 - 1


def endpoints(p, c, dtype):
    """gamma_min and gamma_max, scalars; gradients flow into gamma.b and gamma.w where they are learned."""
    if c.schedule == "learned":
        return p["gamma.b"][0], p["gamma.b"][0] + p["gamma.w"][0].abs()
    return torch.tensor(c.gamma_min, dtype=dtype), torch.tensor(c.gamma_max, dtype=dtype)


Moment = collections.namedtuple("Moment", "gamma alpha sigma")  # Each [B, 1, 1, 1].


def moment(t, ends):
    """The schedule at t [B]: gamma(t) is linear, sigma^2 = sigmoid(gamma), alpha^2 = 1 - sigma^2."""
    gamma_min, gamma_max = ends
    gamma = (gamma_min + (gamma_max - gamma_min) * t)[:, None, None, None]
    return Moment(gamma, torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt())


def network_time(c, at):
    """What the networks see of lambda, [B]. The two end points are the configuration's constants also where
    the schedule is learned, so gradients reach gamma.b and gamma.w through this input as well."""
    return ((at.gamma - c.gamma_min) / (c.gamma_max - c.gamma_min)).flatten()


def blend(x, y, at):
    """x_t = alpha_t^2 x + sigma_t^2 y, the trained encoder's image."""
    return at.alpha ** 2 * x + at.sigma ** 2 * y


def encoded(p, c, x, moments, label, dropout):
    """The encoded images x_t at several moments, a list. All go through the network as one batch."""
    if c.kind == "vdm":
        return [x for at in moments]
    if c.kind == "nt":
        return [at.alpha ** 2 * x for at in moments]
    xs = torch.cat([x] * len(moments))
    times = torch.cat([network_time(c, at) for at in moments])
    ys = encoder(p, c, xs, times, label.repeat(len(moments)), dropout)
    return [blend(x, y, at) for y, at in zip(ys.chunk(len(moments)), moments)]


def tangent_by_forward_mode(f, t_norm, direction):
    """f(t_norm) and its derivative along `direction`, by dual numbers; both can be differentiated again."""
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(t_norm, direction)))
    return dual.primal, dual.tangent


def tangent_by_double_backward(f, t_norm, direction):
    """The same with reverse mode alone: u -> J^T u is linear, its own reverse derivative is d -> J d."""
    if not t_norm.requires_grad:
        t_norm = t_norm.detach().requires_grad_()
    y = f(t_norm)
    u = torch.zeros_like(y, requires_grad=True)
    pulled, = torch.autograd.grad(y, t_norm, u, create_graph=True)
    tangent, = torch.autograd.grad(pulled, u, direction, create_graph=True)
    return y, tangent


TANGENTS = {"forward": tangent_by_forward_mode, "double-backward": tangent_by_double_backward}


def y_and_derivative(p, c, x, at, label, dropout, tangent):
    """y(x, lambda_t) and dy/dlambda at fixed x; dt_norm/dlambda = -1/(gamma_max - gamma_min)."""
    t_norm = network_time(c, at)
    direction = torch.full_like(t_norm, -1 / (c.gamma_max - c.gamma_min))
    return tangent(lambda t_norm: encoder(p, c, x, t_norm, label, dropout), t_norm, direction)


def diffuse(x_t, at, eps):
    """z_t = alpha_t x_t + sigma_t eps."""
    return at.alpha * x_t + at.sigma * eps


Prediction = collections.namedtuple("Prediction", "x v eps")


def predictions(c, out, z, at):
    """The network's output read as what it predicts, and the image x^ that follows. None: not needed."""
    if c.predict == "v":
        return Prediction(at.alpha * z - at.sigma * out, out, at.sigma * z + at.alpha * out)
    if c.predict == "eps":
        return Prediction((z - at.sigma * out) / at.alpha, None, out)
    return Prediction(out, None, None)


def square_norm(u):
    """|| u ||^2 over everything but the batch: [B]."""
    return (u ** 2).flatten(1).sum(1)


def pixel_logits(u, at_0):
    """log p(c | z_0) up to normalisation for all 256 values c, with u = z_0 / alpha_0: [B, C, H, W, 256]."""
    values = scale(torch.arange(256, dtype=u.dtype))
    return -(u[..., None] - values) ** 2 / (2 * torch.exp(at_0.gamma[..., None]))


def recon_loss(k, x_0, at_0, eps_0):
    """-log p(k | z_0), nats per example [B]."""
    u = x_0 + torch.exp(at_0.gamma / 2) * eps_0
    log_p = torch.log_softmax(pixel_logits(u, at_0), -1)
    return -log_p.gather(-1, k.long()[..., None]).flatten(1).sum(1)


def latent_loss(x_1, at_1):
    """KL(q(z_1 | x) || N(0, I)), nats per example [B]."""
    log_variance = F.logsigmoid(at_1.gamma)
    return 0.5 * (at_1.alpha ** 2 * x_1 ** 2 + at_1.sigma ** 2 - log_variance - 1).flatten(1).sum(1)


def rho(at_s, at_t):
    """sigma_{t|s}^2 / sigma_t^2, the part of the noise at t that came since s."""
    return -torch.expm1(at_s.gamma - at_t.gamma)


def posterior_mean(z_t, x_t, x_s, at_s, at_t):
    """mu_Q of q(z_s | z_t, x)."""
    return (at_t.alpha / at_s.alpha * at_s.sigma ** 2 / at_t.sigma ** 2 * z_t
            + at_s.alpha * rho(at_s, at_t) * x_t + at_s.alpha * (x_s - x_t))


def generative_mean(c, z_t, x_hat, at_s, at_t):
    """mu_P of p(z_s | z_t); DiffEnc has the counterterm, sigma_t^2 x^ in the place of dx_t/dlambda."""
    mu = (at_t.alpha / at_s.alpha * at_s.sigma ** 2 / at_t.sigma ** 2 * z_t
          + at_s.alpha * rho(at_s, at_t) * x_hat)
    if c.kind != "vdm":
        mu = mu + at_s.alpha * (at_t.gamma - at_s.gamma) * at_t.sigma ** 2 * x_hat
    return mu


def posterior_variance(at_s, at_t):
    """sigma_Q^2."""
    return at_s.sigma ** 2 * rho(at_s, at_t)


def step_kl(c, z_t, x_hat, x_t, x_s, at_s, at_t):
    """KL(q(z_s | z_t, x) || p(z_s | z_t)) with sigma_P^2 = sigma_Q^2 / w, nats per example [B]."""
    difference = generative_mean(c, z_t, x_hat, at_s, at_t) - posterior_mean(z_t, x_t, x_s, at_s, at_t)
    d = z_t[0].numel()
    variance = posterior_variance(at_s, at_t).flatten()
    return d / 2 * (c.w - 1 - math.log(c.w)) + c.w * square_norm(difference) / (2 * variance)


def residual(c, prediction, x_t, eps, y, dy, at):
    """r of the continuous loss. The bracket: what the generative model's counterterm does not know of x_t."""
    if c.kind == "vdm":
        bracket = 0
    elif c.kind == "nt":
        bracket = prediction.x - x_t
    else:
        bracket = prediction.x - x_t + y - dy
    if c.predict == "v":
        v_t = at.alpha * eps - at.sigma * x_t
        return v_t - prediction.v + at.sigma * bracket
    if c.predict == "eps":
        return eps - prediction.eps + at.alpha * at.sigma * bracket
    return prediction.x - x_t + at.sigma ** 2 * bracket


def continuous_weight(c, at, ends):
    """1/2 gamma'(t) times alpha^2, 1 or SNR: [B]. gamma is linear, so gamma' = gamma_max - gamma_min."""
    factor = {"v": at.alpha ** 2, "eps": torch.ones_like(at.alpha), "x": torch.exp(-at.gamma)}[c.predict]
    return (0.5 * (ends[1] - ends[0]) * factor).flatten()


Losses = collections.namedtuple("Losses", "recon latent diffusion")


def losses(p, c, k, t, eps, eps_0, label, dropout=0.0, tangent=tangent_by_forward_mode):
    """The three terms [B] in nats for one given t [B] per example. k, eps, eps_0 [B, C, H, W]; label [B],
    looked at by a model with classes."""
    ends = endpoints(p, c, eps.dtype)
    x = scale(k.to(eps.dtype))
    at_0, at_1, at_t = moment(torch.zeros_like(t), ends), moment(torch.ones_like(t), ends), moment(t, ends)
    if c.T == 0:
        x_0, x_1 = encoded(p, c, x, [at_0, at_1], label, dropout)
        y = dy = None
        if c.kind == "diffenc":
            y, dy = y_and_derivative(p, c, x, at_t, label, dropout, tangent)
            x_t = blend(x, y, at_t)
        else:
            x_t, = encoded(p, c, x, [at_t], label, dropout)
    else:
        at_s = moment((t - 1 / c.T).clamp(min=0), ends)
        x_0, x_1, x_s, x_t = encoded(p, c, x, [at_0, at_1, at_s, at_t], label, dropout)
    z_t = diffuse(x_t, at_t, eps)
    prediction = predictions(c, score(p, c, z_t, network_time(c, at_t), label, dropout), z_t, at_t)
    if c.T == 0:
        r = residual(c, prediction, x_t, eps, y, dy, at_t)
        diffusion = continuous_weight(c, at_t, ends) * square_norm(r)
    else:
        diffusion = c.T * step_kl(c, z_t, prediction.x, x_t, x_s, at_s, at_t)
    return Losses(recon_loss(k, x_0, at_0, eps_0), latent_loss(x_1, at_1), diffusion)


def objective(terms, d):
    """Bits per dimension, the mean over the batch."""
    return ((terms.recon + terms.latent + terms.diffusion) / (d * math.log(2))).mean()


def ancestral_sample(p, c, count, T, layout):
    """[count, C, H, W] integer pixels, of a model without classes. The encoder plays no part; sigma_P^2 =
    sigma_Q^2 / w."""
    ends = endpoints(p, c, torch.float32)
    z = torch.randn(count, c.image_channels, c.height, c.width).contiguous(memory_format=layout)
    for i in range(T, 0, -1):
        at_t, at_s = (moment(torch.full((count,), j / T), ends) for j in (i, i - 1))
        x_hat = predictions(c, score(p, c, z, network_time(c, at_t), None), z, at_t).x
        deviation = (posterior_variance(at_s, at_t) / c.w).sqrt()
        z = generative_mean(c, z, x_hat, at_s, at_t) + deviation * torch.randn_like(z)
    at_0 = moment(torch.zeros(count), ends)
    return pixel_logits(z / at_0.alpha, at_0).argmax(-1)


# ------------------------------------------------------------------------------------------------------------
# 4. grad: the loss terms and gradients of a given batch, from file to file, in float64
# ------------------------------------------------------------------------------------------------------------

def load_parameters(c, tensors, kind="params"):
    """The checkpoint's params.* or ema.*, which must be exactly the ones of this configuration."""
    shapes = parameter_shapes(c)
    held = {name[len(kind) + 1:] for name in tensors if name.startswith(kind + ".")}
    if held != set(shapes):
        raise Failure(f"parameters are missing or unknown: {', '.join(sorted(held ^ set(shapes))[:5])}")
    p = {}
    for name, shape in shapes.items():
        array = tensors[f"{kind}.{name}"]
        if array.shape != tuple(shape):
            raise Failure(f"{kind}.{name}: has shape {list(array.shape)}, should be {list(shape)}")
        p[name] = from_file_layout(name, array, torch.float64).requires_grad_()
    return p


def load_batch(c, tensors):
    """k, t, eps, eps_0, label as losses() wants them."""
    for name in ("images", "t", "eps", "eps0") + (("labels",) if c.classes else ()):
        if name not in tensors:
            raise Failure(f"{name}: missing")
    image = (len(tensors["images"]), c.height, c.width, c.image_channels)
    for name, shape in (("images", image), ("t", image[:1]), ("eps", image), ("eps0", image)):
        if tensors[name].shape != shape:
            raise Failure(f"{name}: has shape {list(tensors[name].shape)}, should be {list(shape)}")
    label = tensors["labels"] if c.classes else np.zeros(image[:1], "u1")
    if label.shape != image[:1] or c.classes and (label >= c.classes).any():
        raise Failure(f"labels: must be {image[0]}, each from 0 to {c.classes - 1}")
    t = tensors["t"].astype("f8")
    if (t < 0).any() or (t > 1).any():
        raise Failure("t: must lie in [0, 1]")
    i = t * c.T
    if c.T and ((abs(i - i.round()) > 1e-4) | (i < 0.5)).any():
        raise Failure(f"t: must be multiples of 1/{c.T}, from 1/{c.T} to 1")
    channels_first = [torch.tensor(tensors[name].astype("f8").transpose(0, 3, 1, 2).copy())
                      for name in ("images", "eps", "eps0")]
    k, eps, eps_0 = channels_first
    return k, torch.tensor(t), eps, eps_0, torch.tensor(label.astype("i8"))


def gradients(p, c, batch, tangent=tangent_by_forward_mode):
    """What `grad` writes, as numpy arrays in the order of files."""
    terms = losses(p, c, *batch, tangent=tangent)
    bpd = objective(terms, batch[0][0].numel())
    result = {"loss." + name: getattr(terms, name).detach().numpy().copy() for name in Losses._fields}
    result["bpd"] = bpd.detach().numpy().reshape(1)
    names = list(p)
    for name, g in zip(names, torch.autograd.grad(bpd, [p[n] for n in names], allow_unused=True)):
        result["grad." + name] = to_file_layout(name, torch.zeros_like(p[name]) if g is None else g)
    return result


def case_of_files(checkpoint_path, batch_path, kind):
    """A checkpoint and a batch as losses() wants them: (p, c, batch). kind: "params" or "ema"."""
    tensors, metadata = read_safetensors(checkpoint_path)
    try:
        c = config_of_metadata(metadata)
        p = load_parameters(c, tensors, kind)
    except Failure as failure:
        raise Failure(f"{checkpoint_path}: {failure}")
    tensors, _ = read_safetensors(batch_path)
    try:
        batch = load_batch(c, tensors)
    except Failure as failure:
        raise Failure(f"{batch_path}: {failure}")
    return p, c, batch


def gradients_of_files(checkpoint_path, batch_path):
    return gradients(*case_of_files(checkpoint_path, batch_path, "params"))


def command_grad(options):
    write_safetensors(options.out, gradients_of_files(options.checkpoint, options.batch))


def command_eval(options):
    """The bound as `diffenc eval` has it, with the averaged weights, on the draws of a batch."""
    p, c, batch = case_of_files(options.checkpoint, options.batch, "ema")
    for tensor in p.values():
        tensor.requires_grad_(False)
    nats_per_bit = batch[0][0].numel() * math.log(2)
    table = torch.stack(losses(p, c, *batch), 1) / nats_per_bit
    table = torch.cat([table, table.sum(1, keepdim=True)], 1)
    print("example         t       recon      latent   diffusion       total   (bits per dimension)")
    for i, row in enumerate(table.tolist()):
        print(f"{i:7d}  {batch[1][i]:.6f}" + "".join(f"  {value:10.7f}" for value in row))
    print("mean             " + "".join(f"  {value:10.7f}" for value in table.mean(0).tolist()))
    if len(table) > 1:
        error = table.std(0) / math.sqrt(len(table))
        print("standard error   " + "".join(f"  {value:10.7f}" for value in error.tolist()))


def idx_beginning(path, shape):
    """The first images or labels of an IDX file, which is plain or .gz."""
    axes = 1 if len(shape) == 1 else 3
    size, begin = math.prod(shape), 4 + 4 * axes
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            content = file.read(begin + size)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}")
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) < begin + size:
        raise Failure(f"{path}: not an IDX file of {shape[0]} such {'labels' if axes == 1 else 'images'}")
    return np.frombuffer(content, "u1", offset=begin).reshape(shape)


def command_batch(options):
    """Draws for `eval` and `grad`: the first images and labels of IDX files, or random ones; evenly spread
    times."""
    c = config_of_metadata(read_safetensors(options.checkpoint)[1])
    rng = np.random.Generator(np.random.PCG64(options.seed))
    t = (rng.random() + np.arange(options.count) / options.count) % 1
    if c.T:
        t = np.floor(t * c.T + 1) / c.T
    batch = random_batch(c, rng, t)
    for name, path in (("images", options.images), ("labels", options.labels)):
        if path and name in batch:
            batch[name] = idx_beginning(path, batch[name].shape)
    write_safetensors(options.out, batch)


# ------------------------------------------------------------------------------------------------------------
# 5. golden: small batches with their expected losses and gradients, for the tests
# ------------------------------------------------------------------------------------------------------------

GOLDEN_DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def golden_case(seed, t, **settings):
    """w_sign=-1 gives a negative gamma.w, whose magnitude counts."""
    return seed, t, settings


# name: case. One costs 12 bytes a parameter and 180 a tensor, so those of the repository have 4 channels (the
# U-Net's second level 8), but for one with 8: with 4 there are two frequencies of time, and no group
# normalisation of more than one group in most places. They are chosen so that models, nets, predictions,
# schedules, times, shapes meet. The seeds avoid near ties in the windows of max-pooling, where single
# precision might take another pixel. They also avoid a gradient of gamma that is a small difference of large
# terms: the Fourier features multiply what single precision rounds off in y by 2 pi 128, and such a
# difference would show little else.
GOLDEN_CASES = {
    "vdm-flat-v": golden_case(1, [0.03, 0.97], model="vdm-1", net="flat", predict="v", channels=8),
    "vdm-unet-x-T8": golden_case(1, [0.25, 0.875], model="vdm-2", net="unet", predict="x", schedule="learned",
                                 T=8, w=0.8),
    "vdm-unet-eps-28": golden_case(1, [0.31, 0.93], model="vdm-2", net="unet", predict="eps",
                                   height=28, width=28),
    "nt-flat-eps-T10": golden_case(1, [0.1, 0.7], model="diffenc-1-nt", net="flat", predict="eps",
                                   schedule="learned", w_sign=-1, T=10),
    "nt-unet-x": golden_case(1, [0.22, 0.78], model="diffenc-1-nt", net="unet", predict="x"),
    "diffenc-flat-v": golden_case(5, [0.12, 0.64], model="diffenc-1-1", net="flat", predict="v",
                                  schedule="learned"),
    "diffenc-unet-x-T4": golden_case(1, [0.5, 1.0], model="diffenc-1-1", net="unet", predict="x",
                                     height=8, width=6, image_channels=3, T=4, w=1.25),
    "diffenc-unet-v-3-classes": golden_case(2, [0.2, 0.7], model="diffenc-1-1", net="unet", predict="v",
                                            classes=3),
}

# The wide set: more channels and the other combinations. Too big for the repository, made on demand.
WIDE_CASES = {
    "wide-vdm-flat-eps-8ch": golden_case(1, [0.05, 0.55], model="vdm-1", net="flat", predict="eps",
                                         channels=8, schedule="learned", w_sign=-1),
    "wide-vdm-flat-v-12ch": golden_case(1, [0.36, 0.88], model="vdm-1", net="flat", predict="v", channels=12,
                                        height=12, width=8, image_channels=3, schedule="learned"),
    "wide-vdm-unet-v-T10-12ch": golden_case(1, [0.3, 0.9], model="vdm-1", net="unet", predict="v",
                                            channels=12, height=12, width=12, image_channels=3, T=10),
    "wide-nt-flat-v": golden_case(1, [0.01, 0.47, 0.81], model="diffenc-1-nt", net="flat", predict="v",
                                  height=12, width=12, image_channels=3, schedule="learned"),
    "wide-nt-flat-x-T4-8ch": golden_case(1, [0.25, 0.75], model="diffenc-1-nt", net="flat", predict="x",
                                         channels=8, T=4, w=0.9),
    "wide-nt-unet-eps-T16-28": golden_case(1, [0.0625, 0.6875], model="diffenc-2-nt", net="unet",
                                           predict="eps", height=28, width=28, T=16),
    "wide-diffenc-flat-eps": golden_case(1, [0.07, 0.58], model="diffenc-2-1", net="flat", predict="eps",
                                         height=12, width=12, image_channels=3),
    "wide-diffenc-flat-x-28": golden_case(2, [0.27, 0.73], model="diffenc-1-4", net="flat", predict="x",
                                          height=28, width=28, schedule="learned"),
    "wide-diffenc-unet-v-T10": golden_case(1, [0.1, 0.6], model="diffenc-1-2", net="unet", predict="v",
                                           encoder_channels=8, height=12, width=8, image_channels=3,
                                           schedule="learned", w_sign=-1, T=10),
    "wide-diffenc-unet-eps-T8-12ch": golden_case(1, [0.375, 0.75], model="diffenc-1-1", net="unet",
                                                 predict="eps", encoder_channels=12, T=8, w=1.1),
    "wide-diffenc-unet-v-28": golden_case(5, [0.18, 0.66], model="diffenc-2-2", net="unet", predict="v",
                                          height=28, width=28, schedule="learned"),
    # From 16 channels and 14x14 pixels on the program convolves by minimal filtering; 30x26 and 20 channels
    # leave rests of tiles and vectors.
    "wide-vdm-flat-v-28-32ch": golden_case(1, [0.2, 0.8], model="vdm-1", net="flat", predict="v", channels=32,
                                           height=28, width=28),
    "wide-nt-flat-v-30-20ch": golden_case(1, [0.1, 0.6], model="diffenc-1-nt", net="flat", predict="v",
                                          channels=20, height=30, width=26),
    "wide-diffenc-flat-v-28-16ch": golden_case(1, [0.35, 0.85], model="diffenc-1-1", net="flat", predict="v",
                                               channels=16, encoder_channels=16, height=28, width=28),
    "wide-diffenc-unet-x-32-16ch": golden_case(1, [0.15, 0.65], model="diffenc-1-2", net="unet", predict="x",
                                               channels=16, encoder_channels=16, height=32, width=32,
                                               image_channels=3, T=20),
}

ALL_CASES = {**GOLDEN_CASES, **WIDE_CASES}


def random_parameters(c, rng, w=16.2):
    """{name: float32 array as in files}: nothing is zero, so that every gradient has something to say, and
    the scales keep activations near one."""
    parameters = {}
    for name, shape in parameter_shapes(c).items():
        noise = rng.standard_normal(shape)
        if name == "gamma.b":
            value = np.full(shape, -11.7)
        elif name == "gamma.w":
            value = np.full(shape, w)
        elif name.endswith(".scale"):
            value = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            value = 0.1 * noise
        else:
            # An upsampled pixel sees one pixel; any other output the whole kernel.
            fan_in = shape[2] if "upsample" in name else math.prod(shape[:-1])
            value = 0.7 / math.sqrt(fan_in) * noise
        parameters[name] = value.astype("f4")
    return parameters


def random_batch(c, rng, t):
    image = (len(t), c.height, c.width, c.image_channels)
    batch = {"images": rng.integers(0, 256, image, dtype="u1"), "t": np.array(t, "f4"),
             "eps": rng.standard_normal(image).astype("f4"), "eps0": rng.standard_normal(image).astype("f4")}
    if c.classes:
        batch["labels"] = rng.integers(0, c.classes, len(t), dtype="u1")
    return batch


def random_case(seed, t, settings):
    """(configuration, parameters, batch), arrays as in files."""
    rng = np.random.Generator(np.random.PCG64(seed))
    settings = dict(settings)
    w = 16.2 * settings.pop("w_sign", 1)
    c = make_config(**settings)
    return c, random_parameters(c, rng, w), random_batch(c, rng, t)


def inside(c, parameters, batch):
    """A random case as losses() wants it: (p, c, batch)."""
    p = load_parameters(c, {"params." + name: array for name, array in parameters.items()})
    return p, c, load_batch(c, batch)


def closest_tie(p, c, batch):
    """The least distance of the two largest pixels in any window of max-pooling; infinite without pooling."""
    pool, gaps = F.max_pool2d, [math.inf]

    def watched(h, size):
        B, C, H, W = h.shape
        windows = h.reshape(B, C, H // 2, 2, W // 2, 2).transpose(3, 4).flatten(-2)
        largest, second = windows.topk(2).values.unbind(-1)
        gaps.append((largest - second).min().item())
        return pool(h, size)

    F.max_pool2d = watched
    try:
        losses(p, c, *batch)
    finally:
        F.max_pool2d = pool
    return min(gaps)


def golden_paths(directory, name):
    parts = ("checkpoint", "batch", "expected")
    return [os.path.join(directory, f"{name}.{part}.safetensors") for part in parts]


def command_golden(options):
    torch.set_num_threads(1)  # One thread, one order of summation, the same bytes again.
    total = 0
    try:
        os.makedirs(options.directory, exist_ok=True)
    except OSError as error:
        raise Failure(f"{options.directory}: {error.strerror}")
    for name, case in (ALL_CASES if options.wide else GOLDEN_CASES).items():
        c, parameters, batch = random_case(*case)
        paths = golden_paths(options.directory, name)
        params = {"params." + key: array for key, array in parameters.items()}
        write_safetensors(paths[0], params, metadata_of_config(c))
        write_safetensors(paths[1], batch)
        expected = gradients_of_files(paths[0], paths[1])
        write_safetensors(paths[2], expected)
        size = sum(os.path.getsize(path) for path in paths)
        total += size
        print(f"{name:32} {size:8} bytes  {c.height}x{c.width}x{c.image_channels}"
              f"  bpd {expected['bpd'][0]:.6g}  closest tie {closest_tie(*inside(c, parameters, batch)):.1e}")
    print(f"{'together':32} {total:8} bytes")


# ------------------------------------------------------------------------------------------------------------
# 6. selfcheck: the reference against its own mathematics
# ------------------------------------------------------------------------------------------------------------

class Checks:
    """Prints a line per check and remembers whether all were well."""

    def __init__(self):
        self.failed = 0

    def __call__(self, what, error, tolerance):
        good = error <= tolerance  # False for a NaN as well.
        self.failed += not good
        print(f"{'ok    ' if good else 'FAILED'} {what:74} error {error:.1e}  allowed {tolerance:.0e}",
              flush=True)


def relative(a, b):
    """The largest difference, measured by the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def worst_difference(got, expected):
    """Of two results of gradients(): the largest difference in any tensor, measured by the tensor's largest
    value. A tensor of mere rounding (a key's bias: softmax does not see it) is measured by the others."""
    if set(got) != set(expected):
        return math.inf
    largest = max(abs(array).max() for key, array in expected.items() if key.startswith("grad."))
    return max(abs(got[key] - expected[key]).max() / max(abs(expected[key]).max(), 1e-6 * largest)
               for key in expected)


def check_kernels(check):
    """Convolution and upsampling against their definition in file layout, written out as loops."""
    rng = np.random.Generator(np.random.PCG64(1))
    image, bias = rng.standard_normal((4, 6, 3)), rng.standard_normal(2)  # [H, W, in], [out]
    h = torch.tensor(image.transpose(2, 0, 1)[None].copy())
    kernel = rng.standard_normal((3, 3, 3, 2))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    expected = np.array([[bias + sum(padded[i + a, j + b] @ kernel[a, b] for a in range(3) for b in range(3))
                          for j in range(6)] for i in range(4)])
    p = {"c.kernel": from_file_layout("c.kernel", kernel, torch.float64), "c.bias": torch.tensor(bias)}
    got = convolution(p, "c", h)[0].permute(1, 2, 0).numpy()
    check("3x3 convolution is its definition", abs(got - expected).max(), 1e-12)
    kernel = rng.standard_normal((2, 2, 3, 2))
    expected = np.zeros((8, 12, 2))
    for a in range(2):
        for b in range(2):
            expected[a::2, b::2] = image @ kernel[a, b] + bias
    inside_kernel = from_file_layout("upsample.kernel", kernel, torch.float64)
    got = F.conv_transpose2d(h, inside_kernel, torch.tensor(bias), stride=2)[0].permute(1, 2, 0).numpy()
    check("upsampling is its definition", abs(got - expected).max(), 1e-12)
    back = abs(to_file_layout("upsample.kernel", inside_kernel) - kernel).max()
    check("kernels go inside and come back the same", back, 0)
    levels = [unet_levels(*of) for of in ((28, 2), (32, 8), (28, 1), (12, 4), (8, 2))]
    check("U-Net levels of heights 28, 32, 28 (E = 1), 12, 8", float(levels != [2, 2, 1, 1, 1]), 0)


def check_posterior(check):
    """mu_Q and sigma_Q against Bayes' rule: multiply the densities q(z_t | z_s, x) and q(z_s | x)."""
    ends = torch.tensor(-13.3, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    rng = np.random.Generator(np.random.PCG64(2))
    worst_mean = worst_variance = 0.0
    for s, t in ((0.1, 0.2), (0.3, 0.9), (0.0, 1.0), (0.6, 0.61)):
        at_s, at_t = (moment(torch.tensor([u], dtype=torch.float64), ends) for u in (s, t))
        x_s, x_t, z_t = (torch.tensor(rng.standard_normal((1, 1, 1, 1))) for _ in range(3))
        alpha_ts = at_t.alpha / at_s.alpha
        variance_ts = at_t.sigma ** 2 - alpha_ts ** 2 * at_s.sigma ** 2
        precision = alpha_ts ** 2 / variance_ts + 1 / at_s.sigma ** 2
        mean = (alpha_ts / variance_ts * (z_t - at_t.alpha * (x_t - x_s)) + at_s.alpha * x_s / at_s.sigma ** 2
                ) / precision
        worst_mean = max(worst_mean, relative(posterior_mean(z_t, x_t, x_s, at_s, at_t), mean))
        worst_variance = max(worst_variance, relative(posterior_variance(at_s, at_t), 1 / precision))
    check("mu_Q is Bayes' rule", worst_mean, 1e-10)
    check("sigma_Q^2 is Bayes' rule", worst_variance, 1e-10)


def check_residuals(check):
    """The forms of r belong together: r is written with x^ - x_t, and v, eps, x differ by known factors."""
    ends = torch.tensor(-13.3, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    rng = np.random.Generator(np.random.PCG64(3))
    at = moment(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), ends)
    x_t, eps, v_hat, y, dy = (torch.tensor(rng.standard_normal((3, 1, 4, 4))) for _ in range(5))
    z, v_t = diffuse(x_t, at, eps), at.alpha * eps - at.sigma * x_t
    for kind, model in (("vdm", "vdm-1"), ("nt", "diffenc-1-nt"), ("diffenc", "diffenc-1-1")):
        c = make_config(model)
        v_prediction = predictions(c, v_hat, z, at)
        r = residual(c, v_prediction, x_t, eps, y, dy, at)
        other = (v_t - v_hat) * (1 if kind == "vdm" else 1 + at.sigma ** 2)
        if kind == "diffenc":
            other = other + at.sigma * (y - dy)
        check(f"{kind}: the two forms of r agree", relative(r, other), 1e-13)
        loss = continuous_weight(c, at, ends) * square_norm(r)
        for predict, out in (("eps", v_prediction.eps), ("x", v_prediction.x)):
            c_other = c._replace(predict=predict)
            prediction = predictions(c_other, out, z, at)
            r = residual(c_other, prediction, x_t, eps, y, dy, at)
            check(f"{kind}: {predict}-prediction of the same image has the loss of v-prediction",
                  relative(continuous_weight(c_other, at, ends) * square_norm(r), loss), 1e-10)


CHECKED = ["vdm-flat-v", "vdm-unet-x-T8", "nt-flat-eps-T10", "diffenc-flat-v", "diffenc-unet-x-T4",
           "wide-diffenc-unet-eps-T8-12ch", "wide-diffenc-unet-v-28", "diffenc-unet-v-3-classes"]


def check_gradients(check):
    """Central differences (fourth order) of the loss, for every tensor in a direction that mixes its gradient
    and a random one, so that too large, too small and misplaced gradients all show."""
    rng = np.random.Generator(np.random.PCG64(4))
    for name in CHECKED:
        p, c, batch = inside(*random_case(*ALL_CASES[name]))
        d = batch[0][0].numel()
        loss = objective(losses(p, c, *batch), d)
        grads = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
        # Differences of the loss carry its rounding, so a gradient that is mere rounding itself (a key's
        # bias, which softmax does not see) cannot be measured by its own size.
        floor = 1e-4 * loss.item()
        worst, worst_name = 0.0, ""
        for (key, tensor), g in zip(list(p.items()), grads):
            g = torch.zeros_like(tensor) if g is None else g
            random = torch.tensor(rng.standard_normal(tensor.shape))
            random = random if (random * g).sum() >= 0 else -random
            direction = random / random.norm() + g / max(g.norm().item(), floor)
            direction = direction / direction.norm()

            def along(h):
                moved = {**p, key: tensor.detach() + h * direction}
                return objective(losses(moved, c, *batch), d).item()

            def error_of_step(h):
                slope = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
                return abs(slope - (g * direction).sum().item()) / max(g.norm().item(), floor)

            # A wide step is good against rounding, a narrow one jumps over fewer kinks of the max-pooling (the
            # end points of the schedule move all of the features); a gradient that is wrong is wrong with all.
            error = min(error_of_step(h) for h in (1e-5, 1e-6, 1e-7))
            if not error <= worst:
                worst, worst_name = error, key
        check(f"gradients of {name} ({len(p)} tensors, worst {worst_name})", worst, 1e-5)


def check_tangents(check):
    """dy/dlambda by both methods and by differences; and what both give as gradients of the whole loss."""
    settings = dict(model="diffenc-1-1", net="unet", schedule="learned", classes=3)
    p, c, batch = inside(*random_case(5, [0.3, 0.8], settings))
    ends = endpoints(p, c, torch.float64)
    x, t, label = scale(batch[0]), batch[1], batch[4]
    ys = {name: y_and_derivative(p, c, x, moment(t, ends), label, 0.0, TANGENTS[name]) for name in TANGENTS}
    for what, one, other in zip(("y", "dy/dlambda"), ys["double-backward"], ys["forward"]):
        check(f"{what}: double backward and forward mode", relative(one, other), 1e-11)

    def y(delta):
        # lambda + delta is gamma - delta, and gamma is linear in t.
        return encoder(p, c, x, network_time(c, moment(t - delta / (ends[1] - ends[0]), ends)), label)

    h = 1e-5
    slope = (8 * (y(h) - y(-h)) - (y(2 * h) - y(-2 * h))) / (12 * h)
    check("dy/dlambda against central differences", relative(slope, ys["forward"][1]), 1e-7)
    grads = [gradients(p, c, batch, tangent) for tangent in TANGENTS.values()]
    check("gradients of the loss: double backward and forward mode", worst_difference(*grads), 1e-10)


def check_continuous_limit(check):
    """T KL_T goes to the continuous loss like 1/T; extrapolation from T and 2 T removes that difference."""
    T = 2 ** 20
    for name, settings in (("vdm", dict(model="vdm-1", predict="v")),
                           ("nt", dict(model="diffenc-1-nt", predict="eps")),
                           ("diffenc", dict(model="diffenc-1-1", predict="v", schedule="learned")),
                           ("diffenc x", dict(model="diffenc-1-1", predict="x", net="unet"))):
        p, c, batch = inside(*random_case(6, [0.25, 0.75], settings))
        with torch.no_grad():
            finite, finer = (losses(p, c._replace(T=steps), *batch).diffusion for steps in (T, 2 * T))
        limit = losses(p, c, *batch).diffusion.detach()
        check(f"{name}: T = 2^20 is near continuous time", relative(finite, limit), 1e-3)
        check(f"{name}: and extrapolated it is there", relative(2 * finer - finite, limit), 1e-6)


def check_batches(check):
    """An example's losses do not depend on who else is in the batch."""
    p, c, batch = inside(*random_case(7, [0.2, 0.5, 0.7], dict(model="diffenc-1-1", net="unet", classes=4)))
    together = losses(p, c, *batch)
    alone = losses(p, c, *(b[1:2] for b in batch))
    check("an example alone and in a batch", max(relative(a, b[1:2]) for a, b in zip(alone, together)), 1e-12)


def check_golden_files(check):
    """The files on the disk say what this file computes; another PyTorch may sum in another order."""
    found = 0
    for name in ALL_CASES:
        paths = golden_paths(GOLDEN_DIRECTORY, name)
        if not all(os.path.exists(path) for path in paths):
            continue
        found += 1
        expected, got = read_safetensors(paths[2])[0], gradients_of_files(paths[0], paths[1])
        check(f"golden file {name}", worst_difference(got, expected), 1e-8)
    if not found:
        print(f"note: no golden files in {GOLDEN_DIRECTORY}; make them with the command golden")


def command_selfcheck(options):
    torch.set_num_threads(1)
    check = Checks()
    for part in (check_kernels, check_posterior, check_residuals, check_tangents, check_continuous_limit,
                 check_batches, check_gradients, check_golden_files):
        part(check)
    if check.failed:
        raise Failure(f"selfcheck: {check.failed} checks failed")
    print("all checks passed")


# ------------------------------------------------------------------------------------------------------------
# 7. bench: what a PyTorch user gets on this machine, with everything turned on that helps
# ------------------------------------------------------------------------------------------------------------

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last} if torch else {}
ALLOCATORS = ("keep", "system")


def choose_allocator(name):
    """"keep" tells glibc's malloc to hold on to freed memory instead of giving every large tensor back to the
    kernel, which would have to clear its pages anew each time; what others get from jemalloc or tcmalloc."""
    if name == "keep":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-4, 0)   # M_MMAP_MAX: nothing by mmap
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def blas_in_use():
    """The library behind PyTorch's matrix products. Debian's PyTorch takes whichever is installed, and the
    reference one is some thirty times slower than OpenBLAS: no honest measurement. OpenBLAS with threads of
    its own gets in the way of PyTorch's OpenMP threads; the one built with OpenMP does not."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    try:
        with open("/proc/self/maps") as maps:
            loaded = maps.read()
    except OSError:
        return "unknown"
    for word, name in (("openblas-pthread", "openblas-pthread"), ("openblas", "openblas"), ("mkl_", "mkl"),
                       ("blis", "blis"), ("libblas", "reference")):
        if word in loaded:
            return name
    return "builtin"


def bench_parameters(c, layout):
    """Random float32 parameters, convolution kernels in the memory layout that is measured."""
    rng = np.random.Generator(np.random.PCG64(1))
    p = {}
    for name, array in random_parameters(c, rng).items():
        tensor = from_file_layout(name, array, torch.float32)
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=layout)
        p[name] = tensor
    return p


def adamw(p):
    """Weight decay on all but biases; foreach handles all tensors in one call where this PyTorch has it."""
    decayed = [tensor for name, tensor in p.items() if not name.endswith(".bias")]
    biases = [tensor for name, tensor in p.items() if name.endswith(".bias")]
    options = {"foreach": True} if "foreach" in torch.optim.AdamW.__init__.__code__.co_varnames else {}
    sets = [{"params": decayed, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(sets, lr=2e-4, betas=(0.9, 0.99), eps=1e-8, **options)


def training_step(p, ema, optimizer, c, images, dropout, layout, tangent):
    """One whole step on images [B, C, H, W] of bytes: draw times and noise, loss, gradients, AdamW, EMA."""
    B = len(images)
    t = (torch.rand(()) + torch.arange(B) / B) % 1
    k = images.contiguous(memory_format=layout).float()
    noise, labels = torch.randn_like(k), torch.zeros(B, dtype=torch.int64)
    terms = losses(p, c, k, t, noise, torch.randn_like(k), labels, dropout, tangent)
    optimizer.zero_grad(set_to_none=True)
    objective(terms, images[0].numel()).backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_mul_(ema, 0.9999)
        torch._foreach_add_(ema, [tensor.detach() for tensor in p.values()], alpha=1 - 0.9999)


def time_repeatedly(work, repetitions):
    """Seconds of each of several repetitions, after one to warm up."""
    work()
    seconds = []
    for _ in range(repetitions):
        begin = perf_counter()
        work()
        seconds.append(perf_counter() - begin)
    return seconds


def bench_config(options):
    return make_config(options.model, options.net, options.channels, options.encoder_channels, 28, 28, 1)


def report(options, what, images, seconds, more):
    """The one line of a measurement. spread: (slowest - fastest) / median."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    median = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / median
    print(f"torch {options.model} {what} seconds={median:.4f} spread={spread:.3f} fastest={min(seconds):.4f} "
          f"images_per_second={images / median:.2f} peak_rss_bytes={peak} "
          f"net={options.net} channels={options.channels} encoder_channels={options.encoder_channels} "
          f"threads={options.threads} {more} layout={options.layout} allocator={options.allocator} "
          f"blas={blas_in_use()} version={torch.__version__}", flush=True)


def run_fastest(options, command, choices):
    """choices: {option: values}. Each option that is "auto" is settled by short trials, one option after the
    other, then the fastest is measured in full and its line is the result. Each run is a process of its own,
    so that none adds to another's peak memory."""

    def run(settled, steps):
        arguments = [sys.executable, os.path.abspath(__file__), command]
        for name, value in {**vars(options), **settled, "steps": steps}.items():
            if name not in ("command", "function"):
                arguments += ["--" + name.replace("_", "-"), str(value)]
        child = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
        if child.returncode:
            raise Failure(f"{command}: the measuring process ended with status {child.returncode}")
        return child.stdout

    def trial(settled):
        try:
            seconds = float(run(settled, 3).split("fastest=")[1].split()[0])
        except Failure:
            return math.inf  # Another PyTorch may be unable to do one of these; the child said why.
        print(f"trial: {seconds:.3f} s with {' '.join(settled.values())}", file=sys.stderr)
        return seconds

    if blas_in_use() in ("reference", "openblas-pthread"):
        print(f"note: PyTorch's matrix products are {blas_in_use()} here and slow it down; "
              "apt-get install libopenblas0-openmp", file=sys.stderr)
    settled = {name: values[0] if getattr(options, name) == "auto" else getattr(options, name)
               for name, values in choices.items()}
    best = None
    for name, values in choices.items():
        for value in values[1:] if getattr(options, name) == "auto" else []:
            if best is None:
                best = trial(settled)
            seconds = trial({**settled, name: value})
            if seconds < best:
                best, settled = seconds, {**settled, name: value}
    print(run(settled, options.steps), end="")


def command_bench(options):
    c = bench_config(options)
    if "auto" in (options.layout, options.tangent, options.allocator):
        # Only DiffEnc has a dy/dlambda to compute.
        tangents = list(TANGENTS) if c.kind == "diffenc" else ["forward"]
        run_fastest(options, "bench", {"layout": list(LAYOUTS), "tangent": tangents, "allocator": ALLOCATORS})
        return
    choose_allocator(options.allocator)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    layout, tangent = LAYOUTS[options.layout], TANGENTS[options.tangent]
    p = {name: tensor.requires_grad_() for name, tensor in bench_parameters(c, layout).items()}
    ema = [tensor.detach().clone() for tensor in p.values()]
    optimizer = adamw(p)
    images = torch.randint(0, 256, (options.batch, 1, 28, 28), dtype=torch.uint8)
    seconds = time_repeatedly(
        lambda: training_step(p, ema, optimizer, c, images, options.dropout, layout, tangent), options.steps)
    report(options, "step", options.batch, seconds,
           f"batch={options.batch} dropout={options.dropout:g} tangent={options.tangent}")


def command_bench_sampling(options):
    c = bench_config(options)
    if "auto" in (options.layout, options.allocator):
        run_fastest(options, "bench-sampling", {"layout": list(LAYOUTS), "allocator": ALLOCATORS})
        return
    choose_allocator(options.allocator)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    layout = LAYOUTS[options.layout]
    with torch.inference_mode():
        p = bench_parameters(c, layout)
        ancestral_sample(p, c, options.count, 1, layout)  # The warm-up need not be a whole run.
        begin = perf_counter()
        ancestral_sample(p, c, options.count, options.steps, layout)
        seconds = perf_counter() - begin
    report(options, "sampling", options.count, [seconds], f"count={options.count} steps={options.steps}")


def command_export(options):
    """Writes OUT.onnx, and OUT.safetensors with inputs z [B, C, H, W], t [B] and the output for them. The
    number of images is fixed, so that the best way to compute can be chosen for it."""
    c = bench_config(options)
    p = bench_parameters(c, torch.contiguous_format)

    class Score(torch.nn.Module):
        def forward(self, z, t):
            return score(p, c, z, t, None)

    torch.manual_seed(1)
    warnings.simplefilter("ignore", torch.jit.TracerWarning)  # Of Python's numbers, which are constants here.
    z, t = torch.randn(options.count, c.image_channels, c.height, c.width), torch.rand(options.count)
    with torch.no_grad():
        out = Score()(z, t)
        torch.onnx.export(Score(), (z, t), options.out + ".onnx", input_names=["z", "t"],
                          output_names=["out"], opset_version=17)
    write_safetensors(options.out + ".safetensors", {"z": z.numpy(), "t": t.numpy(), "out": out.numpy()})


# ------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------

def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="reference.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The DiffEnc training objective in PyTorch: golden files, gradients, checks, speed.",
        epilog="To regenerate the golden files of the tests:\n"
               "    tests/reference.py golden\n"
               "To make the wide set as well (more channels and combinations, some 3 MB):\n"
               "    tests/reference.py golden --wide --directory DIR\n"
               "To measure PyTorch, one process and one line per model:\n"
               "    tests/reference.py --bench --model vdm-4\n"
               "    tests/reference.py --bench --model diffenc-4-2\n"
               "    tests/reference.py --bench-sampling --model vdm-4 --steps 10 --count 64\n"
               "To hold the program's loss terms against these, on the same images, times and noise:\n"
               "    tests/reference.py batch CHECKPOINT --images mnist/t10k-images-idx3-ubyte.gz --out FILE\n"
               "    tests/reference.py --eval CHECKPOINT --batch FILE\n"
               "(--bench, --bench-sampling and --eval are the commands of these names.)\n"
               "Needs python3-torch; for honest speeds also libopenblas0-openmp.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, help):
        sub = commands.add_parser(name, help=help, description=help,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(function=function)
        return sub

    grad = command("grad", command_grad, "loss terms and gradients of a batch, from file to file, in float64")
    grad.add_argument("checkpoint", metavar="CHECKPOINT")
    grad.add_argument("--batch", required=True, metavar="FILE",
                      help="safetensors with images, t, eps, eps0; of a conditional model also labels")
    grad.add_argument("--out", required=True, metavar="FILE", help="where to write loss.*, bpd and grad.*")

    evaluation = command("eval", command_eval, "the loss terms of each example of a batch with the averaged "
                         "weights, in bits per dimension, and their mean; in float64")
    evaluation.add_argument("checkpoint", metavar="CHECKPOINT")
    evaluation.add_argument("--batch", required=True, metavar="FILE", help="as for grad")

    batch = command("batch", command_batch, "writes a batch for eval and grad: images, times and noise")
    batch.add_argument("checkpoint", metavar="CHECKPOINT", help="says of which shape")
    batch.add_argument("--images", metavar="FILE", help="IDX, plain or .gz; without it random pixels")
    batch.add_argument("--labels", metavar="FILE", help="the same for a conditional model")
    batch.add_argument("--count", type=positive, default=32, help="examples")
    batch.add_argument("--seed", type=int, default=1, help="of times and noise")
    batch.add_argument("--out", required=True, metavar="FILE", help="where to write it")

    golden = command("golden", command_golden, "regenerates the golden files of the tests")
    golden.add_argument("--directory", default=GOLDEN_DIRECTORY, metavar="DIR", help="where to write them")
    golden.add_argument("--wide", action="store_true", help="the wide set as well")

    command("selfcheck", command_selfcheck, "checks this reference against its own mathematics")

    def network_options(sub):
        sub.add_argument("--model", default="vdm-4", help="vdm-L, diffenc-L-nt or diffenc-L-E")
        sub.add_argument("--net", default="flat", choices=("flat", "unet"), help="the score network")
        sub.add_argument("--channels", type=positive, default=32, help="of the score network")
        sub.add_argument("--encoder-channels", type=positive, default=16, help="of the encoder")

    def bench_options(sub, steps):
        network_options(sub)
        sub.add_argument("--threads", type=positive, default=2, help="of PyTorch")
        sub.add_argument("--layout", default="auto", choices=("auto", "contiguous", "channels_last"),
                         help="of tensors in memory; auto tries and takes the fastest, here and below")
        sub.add_argument("--allocator", default="auto", choices=("auto",) + ALLOCATORS,
                         help="whether malloc keeps freed memory or gives it back to the system")
        sub.add_argument("--steps", type=positive, default=steps[0], help=steps[1])

    bench = command("bench", command_bench, "measures one training step in float32 on 28x28x1 random data")
    bench_options(bench, (5, "timed steps, after one to warm up"))
    bench.add_argument("--batch", type=positive, default=64, help="examples per step")
    bench.add_argument("--dropout", type=float, default=0.1, help="dropout rate")
    bench.add_argument("--tangent", default="auto", choices=("auto",) + tuple(TANGENTS),
                       help="how to compute dy/dlambda")

    sampling = command("bench-sampling", command_bench_sampling, "measures ancestral sampling of 28x28x1")
    bench_options(sampling, (10, "steps T of the sampler"))
    sampling.add_argument("--count", type=positive, default=64, help="images made at once")

    export = command("export", command_export, "writes the score network of 28x28x1 with random weights for "
                     "ONNX Runtime, and an example of what it computes")
    network_options(export)
    export.add_argument("--count", type=positive, default=64, help="images at once, always so many")
    export.add_argument("--out", required=True, metavar="NAME", help="of NAME.onnx and NAME.safetensors")

    for flag in ("bench", "bench-sampling", "eval"):
        if "--" + flag in arguments:
            arguments = [flag] + [a for a in arguments if a != "--" + flag]
    return parser.parse_args(arguments)


def main(arguments):
    options = parse_arguments(arguments)
    if torch is None:
        print(f"reference.py: {sys.executable or 'this Python'} lacks PyTorch or NumPy: "
              "apt-get install python3-torch installs both for /usr/bin/python3", file=sys.stderr)
        return 3
    try:
        options.function(options)
    except Failure as failure:
        print(f"reference.py: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
