#!/usr/bin/env python3
"""How good are samples? The Frechet distance and the share of recognised digits, by a small classifier.

Likelihoods do not say how samples look. The Frechet distance compares what the last layer of a classifier of
digits sees of the samples and of the test images: what the Inception network does for photographs (FID,
Heusel et al. 2017). The share of samples recognised with confidence says how many look like some digit; it
does not notice missing digits or repetition, and may take noise for a digit; the distance notices all three.
A distance depends on the classifier and grows as samples get fewer: compare it only with those by the same
classifier from equally many images, above all with that of training images, the floor.

It needs PyTorch and NumPy (Debian: apt-get install python3-torch).
"""

import argparse
import gzip
import hashlib
import math
import os
import struct
import sys
import zlib

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

SIZE, GAP = 28, 2  # Of an image in pixels; the white ones around it in a grid.
FEATURES, CONFIDENT = 64, 0.9
STEPS, BATCH, LEARNING_RATE = 1000, 128, 4e-3
DRAWS = 10  # Of training images, for the floor.


def read(reader, path):
    """What the reader makes of the file, or the end of the program in one line that names the file."""
    try:
        return reader(path)
    except (OSError, EOFError, ValueError, IndexError, KeyError, struct.error, zlib.error) as error:
        sys.exit(f"frechet.py: {path}: cannot be read ({type(error).__name__}: {error})")


def read_idx(path):
    with open(path, "rb") if os.path.exists(path) else gzip.open(path + ".gz") as file:
        content = file.read()
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_data(directory, part):
    """Images [N, 28, 28] and labels; part is train or t10k (the test images), as MNIST's files are named."""
    images = read(read_idx, f"{directory}/{part}-images-idx3-ubyte")
    labels = read(read_idx, f"{directory}/{part}-labels-idx1-ubyte")
    if images.shape[1:] != (SIZE, SIZE) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        sys.exit(f"frechet.py: {directory}: expected {SIZE}x{SIZE} images of {part} with a digit for each")
    return images, labels


def read_grid(path):
    """The images of a grid as ./diffenc sample writes it: a PNG, 8-bit grey, no row filtered."""
    with open(path, "rb") as file:
        content = file.read()
    chunks, at = {b"IDAT": b""}, 8
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        chunks[kind] = chunks.get(kind, b"") + content[at + 8:at + 8 + length]
        at += 12 + length  # The length, the kind and a check sum of four bytes each.
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width)
    if form != [8, 0, 0, 0, 0] or rows[:, 0].any():
        raise ValueError("expected 8-bit grey without filters")
    cell = SIZE + GAP
    cells = rows[GAP:, 1 + GAP:].reshape(height // cell, cell, width // cell, cell).swapaxes(1, 2)
    if (cells[:, :, SIZE:] != 255).any() or (cells[:, :, :, SIZE:] != 255).any():
        raise ValueError(f"expected images of {SIZE}x{SIZE} with {GAP} white pixels around each")
    images = cells[:, :, :SIZE, :SIZE].reshape(-1, SIZE, SIZE)
    is_image = (images != 255).any((1, 2))  # The last row may have cells without an image.
    return images[:len(images) - is_image[::-1].argmax()]


def read_samples(path):
    images = np.load(path, allow_pickle=False) if path.endswith(".npy") else read_grid(path)
    is_grey = images.shape[1:] in ((SIZE, SIZE), (SIZE, SIZE, 1))
    if images.dtype != np.uint8 or not is_grey or len(images) == 0:
        raise ValueError(f"{images.dtype} {images.shape}, expected uint8 [N, {SIZE}, {SIZE}]")
    return images.reshape(-1, SIZE, SIZE)


def make_classifier():
    """Two stages, features and scores. The normalisation gives the features a scale near one."""
    features = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU())
    return nn.Sequential(features, nn.Linear(FEATURES, 10))


def network_input(images):
    return torch.tensor(images)[:, None].float() / 255


def train(images, labels):
    torch.manual_seed(1)
    classifier = make_classifier()
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(images), (BATCH,)).numpy()
        loss = F.cross_entropy(classifier(network_input(images[batch])), torch.tensor(labels[batch]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"classifier: step {step}/{STEPS}  loss {loss.item():.4f}", file=sys.stderr)
    return classifier


def load_classifier(path, images, labels):
    """That of the file if there is one, else a new one. One that learned other images would mislead."""
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        torch.save({"data": digest, "parameters": train(images, labels).state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    if saved["data"] != digest:
        sys.exit(f"frechet.py: {path}: was trained on other images; name another file")
    classifier = make_classifier()
    classifier.load_state_dict(saved["parameters"])
    return classifier.eval()


def classify(classifier, images):
    """Features [N, FEATURES] in double precision, and the probabilities [N, 10] of the digits."""
    with torch.no_grad():
        features = torch.cat([classifier[0](network_input(images[begin:begin + 500]))
                              for begin in range(0, len(images), 500)])
        return features.double().numpy(), F.softmax(classifier[1](features), 1).numpy()


def frechet_distance(features1, features2):
    """Of Gaussian fits: |mean1 - mean2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); custom takes no root of it.

    C1 C2 has the eigenvalues of the symmetric r C2 r with r = C1^(1/2), so the roots have the same trace.
    """
    mean1, mean2 = features1.mean(0), features2.mean(0)
    C1, C2 = np.cov(features1, rowvar=False), np.cov(features2, rowvar=False)
    values, vectors = np.linalg.eigh(C1)
    r = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(r @ C2 @ r).clip(0)).sum()
    return ((mean1 - mean2) ** 2).sum() + np.trace(C1) + np.trace(C2) - 2 * trace_of_root


def print_row(count, distance, probabilities, name):
    share = (probabilities.max(1) > CONFIDENT).mean()
    error = math.sqrt(share * (1 - share) / len(probabilities))
    print(f"{count:7d}  {distance:>16s}  {100 * share:6.1f} +- {100 * error:3.1f}  {name}")


def score(classifier, train_images, test_images, samples):
    """Prints the table; samples is {name: images}."""
    truth, probabilities = classify(classifier, test_images)
    print(f"  count  Frechet distance  recognised, %  (with more than {CONFIDENT:g} confidence)")
    print_row(len(truth), "0", probabilities, "test images")
    order = np.random.default_rng(1).permutation(len(train_images))
    for count in sorted({len(images) for images in samples.values()}):
        draws = min(len(order) // count, DRAWS)
        if count > FEATURES and draws > 1:
            features, probabilities = classify(classifier, train_images[order[:draws * count]])
            floor = [frechet_distance(draw, truth) for draw in np.split(features, draws)]
            print_row(count, f"{np.mean(floor):.2f} +- {np.std(floor, ddof=1):.2f}", probabilities,
                      f"training images, mean of {draws} draws (and standard deviation of a distance)")
    for name, images in samples.items():
        features, probabilities = classify(classifier, images)
        distance = "-"
        if len(images) > FEATURES:
            distance = f"{frechet_distance(features, truth):.2f}"
        else:
            name += f" (the distance needs more samples than the {FEATURES} features)"
        print_row(len(images), distance, probabilities, name)


def main():
    parser = argparse.ArgumentParser(description="How good are samples of digits?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, option, help in (("train", "--out", "trains the classifier, in a minute or two"),
                               ("score", "--classifier", "measures samples; trains first if it must")):
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--data", required=True, metavar="DIR",
                         help="with four files that have the names and form of MNIST's, compressed or not")
        sub.add_argument(option, dest="classifier", default="build/classifier.pt", metavar="FILE",
                         help="default %(default)s")
    sub.add_argument("samples", nargs="+", metavar="SAMPLES",
                     help="a grid (.png) by ./diffenc sample, or uint8 [N, 28, 28] or [N, 28, 28, 1] (.npy)")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)  # The order of sums depends on it.
    samples = {path: read(read_samples, path) for path in getattr(options, "samples", [])}
    train_set, test_set = read_data(options.data, "train"), read_data(options.data, "t10k")
    if options.command == "train" and os.path.exists(options.classifier):
        os.remove(options.classifier)
    classifier = load_classifier(options.classifier, *train_set)
    accuracy = (classify(classifier, test_set[0])[1].argmax(1) == test_set[1]).mean()
    print(f"{options.classifier}: right on {100 * accuracy:.2f}% of the test images")
    if samples:
        score(classifier, train_set[0], test_set[0], samples)


if __name__ == "__main__":
    main()
