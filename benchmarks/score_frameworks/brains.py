"""Makes the small slices of real heads that the experiments train and test on.

    apt-get download mricron-data && dpkg-deb -x mricron-data_*.deb mricron
    pip install "setuptools<70" numpy versioneer
    pip download --no-deps --no-binary :all: --no-build-isolation pyradiomics==3.0.1
    ln -s mricron/usr/share/mricron/templates/ch2.nii.gz
    python -m benchmarks.score_frameworks.brains ch2.nii.gz pyradiomics-3.0.1.tar.gz

The two patients' slices with their tumours go to assets/brains, which ships. What is trained on goes to
runs/data/brains.npz: 4,000 images, half of the slices of Colin's head (ch2), half of those of patient 1 that show no
tumour, each turned, moved, scaled, mirrored and with other contrast at random, so that 18 slices and one head teach
more than themselves. Patient 2 is never trained on. Needs nibabel and pynrrd.
"""

import argparse
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import RESULTS
from diffusers_ext.methods.score_frameworks.volumes import read_slices

ROOT = RESULTS.parents[1]
ASSET = ROOT / "diffusers_ext" / "assets" / "brains" / "brains.npz"
TRAINING = ROOT / "runs" / "data" / "brains.npz"
SIZE, FINE, COUNT = 64, 256, 4000
SLAB = 5  # slices of a millimetre that become one, as thick as the patients'


def patient(archive, number):
    """Returns image and tumour of a patient of pyradiomics as images of nibabel."""
    import nibabel
    import nrrd

    found = []
    for kind in ("image", "label"):
        with tempfile.TemporaryDirectory() as folder:
            member = f"pyradiomics-3.0.1/data/brain{number}_{kind}.nrrd"
            path = Path(folder) / "volume.nrrd"
            path.write_bytes(archive.extractfile(member).read())
            values, header = nrrd.read(str(path))
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
        affine[:2] *= -1  # of left-posterior-superior axes, nibabel's are right-anterior-superior
        found.append(nibabel.Nifti1Image(values.astype(np.int16), affine))
    return found


def eight_bits(images):
    return (images[:, 0] * 255).round().byte().numpy()


def varied(images, count, gammas, seed):
    """Returns `count` random variations of fine images, `(count, SIZE, SIZE)` in uint8."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        image = images[i % len(images)][None]
        turn, zoom = np.deg2rad(draw.uniform(-12, 12)), draw.uniform(0.9, 1.12)
        cos, sin, mirror = np.cos(turn) / zoom, np.sin(turn) / zoom, draw.choice([-1, 1])
        x, y = draw.uniform(-0.1, 0.1, 2)
        affine = torch.tensor([[[cos * mirror, -sin, x], [sin * mirror, cos, y]]], dtype=torch.float32)
        grid = F.affine_grid(affine, list(image.shape), align_corners=False)
        moved = F.grid_sample(image, grid, align_corners=False)
        small = F.interpolate(moved, (SIZE, SIZE), mode="bilinear", antialias=True)
        found.append((small ** draw.uniform(*gammas) * draw.uniform(0.85, 1.05)).clamp(0, 1))
    return eight_bits(torch.cat(found))


def write(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)
    print(f"{path}: {len(arrays['images'])} images, {path.stat().st_size / 1024:.0f} KiB")


def main():
    parser = argparse.ArgumentParser(description="Makes small slices of real heads.")
    parser.add_argument("colin", type=Path, help="ch2.nii.gz of Debian's mricron-data")
    parser.add_argument("patients", type=Path, help="pyradiomics-3.0.1.tar.gz")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, tumours, numbers, fine = [], [], [], {}
    with tarfile.open(args.patients) as archive:
        for number in (1, 2):
            image, tumour = patient(archive, number)
            slices = read_slices(image, SIZE).images
            images.append(eight_bits(slices))
            tumours.append(read_slices(tumour, SIZE, categories=True).images[:, 0].numpy() >= 0.5)
            numbers.append(np.full(len(slices), number, np.uint8))
            fine[number] = read_slices(image, FINE).images
            seen = read_slices(tumour, FINE, categories=True).images.flatten(1).any(1)
            if number == 1:
                healthy = fine[1][~seen]
    write(ASSET, images=np.concatenate(images), tumours=np.concatenate(tumours), patient=np.concatenate(numbers))

    colin = read_slices(args.colin, FINE, field_of_view=220.0).images
    colin = colin.unfold(0, SLAB, 2).mean(-1)
    colin = colin[: int(0.93 * len(colin))]  # above is no head
    half = COUNT // 2
    # A brain with contrast agent is darker against its skin than Colin's.
    rows = np.concatenate([varied(colin, half, (0.9, 2.0), 0), varied(healthy, COUNT - half, (0.8, 1.25), 1)])
    write(TRAINING, images=rows[np.random.default_rng(2).permutation(COUNT)])
    print(f"{len(healthy)} slices of patient 1 without tumour, {len(colin)} of Colin's head")


if __name__ == "__main__":
    main()
