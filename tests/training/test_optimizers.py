"""Optimizers by name: they are the packages' own, and a resume with each is exact."""

import pytest
import torch

from diffusers_ext.training import optimizers
from diffusers_ext.training.optimizers import make_optimizer

from .tiny import Record, make_config, run, weights, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["sgd", "adafactor", "prodigy", "adamw8bit"])
def test_a_resume_is_exact(data, tmp_path, name):
    if name in optimizers.PACKAGES:
        pytest.importorskip(optimizers.PACKAGES[name])
    rate = {"prodigy": 1.0, "sgd": 0.1}.get(name, 1e-3)
    common = {"optimizer": name, "learning_rate": rate, "lr_scheduler": "cosine"}
    _, expected, _ = run(data, tmp_path / "whole", **common)
    _, first, _ = run(data, tmp_path / "cut", callback=Record(signal_at=4), **common)
    _, second, trainer = run(data, tmp_path / "cut", resume_from_checkpoint="latest", **common)
    assert first.losses + second.losses == expected.losses
    found, saved = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(found[key], saved[key]) for key in saved)
    assert name in type(trainer.optimizer.optimizer).__name__.lower()


def first_steps(name, count, **changes):
    """Where the minimum of x^2 / 2 is looked for from x = 1."""
    x = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([x], make_config("data", "out", optimizer=name, **changes))
    path = []
    for _ in range(count):
        (x.square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(x.item())
    return path


def test_arguments_reach_the_optimizer():
    # sgd: m = 0.5 m + g + 0.1 x, x -= 0.1 m.
    found = first_steps("sgd", 2, learning_rate=0.1, adam_beta1=0.5, adam_weight_decay=0.1)
    assert found == pytest.approx([1 - 0.11, 0.89 - 0.1 * (0.55 + 0.979)])
    # adamw and adafactor: the first step is the sign of the gradient, beside the decay.
    for name in ("adamw", "adafactor"):
        assert first_steps(name, 1, learning_rate=0.01, adam_weight_decay=0.1) == pytest.approx([1 - 0.011], abs=1e-5)


def test_what_is_missing_or_odd_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "find_spec", lambda name: None)
        for name, package in optimizers.PACKAGES.items():
            with pytest.raises(
                ValueError, match=rf"`optimizer` must be an installed one \(pip install {package}\), got"
            ):
                make_config("data", "out", optimizer=name)
    with pytest.raises(ValueError, match=r"`optimizer` must be one of \['adamw', .*got 'adam'"):
        make_config("data", "out", optimizer="adam")
    pytest.importorskip("prodigyopt")
    with pytest.warns(UserWarning, match="prodigy estimates the rate .* usually 1, got 0.0001"):
        first_steps("prodigy", 1, learning_rate=1e-4)
