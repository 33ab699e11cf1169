"""Each example as a user runs it, for a few steps on tiny data sets in the real formats."""

from __future__ import annotations

import os
import subprocess
import sys
import wave

import pytest
import torch
from example_runs import drawn, falls, run_example, three_steps, write_idx
from paths import ROOT

from torch_hf.tracking import read_csv

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """MNIST of 96 + 40 cases, and a folder of 20 + 10 images in the classes of CIFAR-10."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, cases in (("train", 96), ("t10k", 40)):
        images = torch.randint(256, (cases, 28, 28), generator=generator)
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", torch.arange(cases) % 10)
    for part, cases in (("train", 2), ("test", 1)):
        for name in CLASSES:
            folder = root / "cifar10" / part / name
            folder.mkdir(parents=True)
            for i in range(cases):
                image = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return root


RUNS = [
    ("digits", "hf", "test_accuracy"),
    ("mnist", "hf", "test_accuracy"),
    ("mnist", "adam", "test_accuracy"),
    ("mnist", "sgd", "test_accuracy"),
    ("mnist", "lbfgs", "test_accuracy"),
    ("cifar10", "hf", "test_accuracy"),
    ("autoencoder", "hf", "train_squared_error"),
]


@pytest.mark.parametrize(("name", "optimizer", "score"), RUNS, ids=lambda value: value)
def test_three_steps(name, optimizer, score, data_root, tmp_path):
    arguments = ["--batch-size", 20, "--optimizer", optimizer, "--device", "cpu"]
    if name != "digits":
        arguments += ["--data-root", data_root]
    if name == "autoencoder":
        arguments += ["--split-size", 7]
    done, columns = three_steps(name, *arguments, cwd=tmp_path)
    assert "cases/s" in done.stderr  # the progress bar
    assert score.replace("_", " ") in done.stdout
    assert all(torch.tensor(columns["loss"]).isfinite())
    assert columns[score][-1] >= 0
    if optimizer == "hf":
        assert "λ" in done.stdout
        assert falls(columns)
    if name == "autoencoder":
        assert columns["curvature_cases"][0] == 5


SCRIPTS = [
    ("poisson", ["--points", 40], "test_relative_error", "solution.png"),
    ("burgers", ["--points", 40], "test_relative_error", "solution.png"),
    ("adding", ["--cases", 40, "--length", 6, "--width", 5], "test_squared_error", "adding.png"),
]


@pytest.mark.parametrize(("name", "sizes", "score", "picture"), SCRIPTS, ids=lambda v: str(v))
def test_scripts_with_their_own_loop(name, sizes, score, picture, tmp_path):
    _, columns = three_steps(name, *sizes, cwd=tmp_path, picture=picture)
    assert columns["loss"][-1] < columns["loss"][0]
    assert all(torch.tensor(columns[score]).isfinite())


def speech():
    """Four recordings of a second, two speakers of whom one is held out; tones stand for words."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(8000) / 8000
    for speaker in ("george", "theo"):
        for digit in (3, 7):
            tone = torch.sin(2 * torch.pi * 300 * digit * time)
            sound = 8000 * tone + 500 * torch.randn(8000, generator=generator)
            yield sound.to(torch.int16).numpy(), digit, speaker


def as_npz(root):
    import numpy as np

    sounds, digits, speakers = zip(*speech(), strict=True)
    offsets = np.cumsum([0, *map(len, sounds)])
    data = {"samples": np.concatenate(sounds), "offsets": offsets}
    np.savez(root / "fsdd.npz", **data, digit=np.array(digits), speaker=np.array(speakers))


def as_wav(root):
    folder = root / "free-spoken-digit-dataset" / "recordings"
    folder.mkdir(parents=True)
    for sound, digit, speaker in speech():
        with wave.open(str(folder / f"{digit}_{speaker}_0.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(sound.tobytes())


@pytest.mark.parametrize("write", [as_npz, as_wav])
def test_spoken_digits(write, tmp_path):
    write(tmp_path)
    sizes = ["--batch-size", 100, "--data-root", tmp_path, "--device", "cpu"]
    done = run_example("spoken_digits", "--max-steps", 4, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    columns = read_csv(tmp_path / "runs" / "spoken_digits" / "training.csv")
    assert columns["loss"][-1] < columns["loss"][0]
    assert columns["curvature_cases"][0] == 25
    assert drawn(tmp_path / "runs" / "spoken_digits", "training.png")


EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py"))
SHARED = {"cluster", "common", "data", "pairs"}


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n not in SHARED])
def test_an_example_is_short_and_in_the_gallery(name):
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert '"--max-steps"' in text or "make_parser" in text
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert f"examples/{name}.py" in gallery
    assert f"images/gallery/{name}.png" in gallery
    assert (ROOT / "docs" / "images" / "gallery" / f"{name}.png").is_file()


def test_image_folder_at_the_data_root_itself(data_root, tmp_path):
    arguments = ["--max-steps", 1, "--optimizer", "adam", "--data-root", data_root / "cifar10"]
    done = run_example("cifar10", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mnist", ["--data-root", "nowhere"], "MNIST is not in nowhere/MNIST/raw"),
        ("autoencoder", ["--data-root", "nowhere"], "MNIST is not in nowhere/MNIST/raw"),
        ("cifar10", ["--data-root", "nowhere"], "CIFAR-10 is not in nowhere/cifar-10-batches-py"),
        ("spoken_digits", ["--data-root", "."], "there are no recordings in ./free-spoken"),
        ("digits", ["--max-steps", "0"], "--max-steps must be positive; got 0"),
        ("digits", ["--device", "cuda:99"], "--device cuda:99 is not at hand"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(name, arguments, message, tmp_path):
    done = run_example(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "nowhere" in arguments:
        assert "--download" in done.stderr
        assert done.stderr.count("\n") == 1


def test_other_classes_than_cifar10s(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "unicorn").mkdir(parents=True)
        (tmp_path / part / "unicorn" / "0.png").touch()
    done = run_example("cifar10", "--data-root", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "unicorn" in done.stderr


def test_an_example_as_it_is_typed(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits.py"), "--max-steps", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert drawn(tmp_path / "runs" / "digits", "training.png")


@pytest.mark.slow
def test_digits_reach_97_percent(tmp_path):
    done = run_example("digits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    columns = read_csv(tmp_path / "runs" / "digits" / "training.csv")
    assert columns["test_accuracy"][-1] >= 0.97


@pytest.mark.slow
@pytest.mark.skipif("TORCH_HF_DATA" not in os.environ, reason="TORCH_HF_DATA names no data root")
def test_mnist_reaches_98_percent(tmp_path):
    done = run_example("mnist", "--data-root", os.environ["TORCH_HF_DATA"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    columns = read_csv(tmp_path / "runs" / "mnist" / "training.csv")
    assert columns["test_accuracy"][-1] >= 0.98
