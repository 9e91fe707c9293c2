"""The penalty on asymmetric Jacobians."""

import json

import pytest
import torch

from diffusers_ext import ImmiscibleRecipe, Trainer
from diffusers_ext.training.conservativity import predict_with_asymmetry
from tests.training.tiny import make_config, write_data


def test_penalty_is_that_of_the_exact_jacobian():
    """Its value is that of the exact Jacobian, its gradient makes the network more symmetric."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6)).double()
    x = torch.randn(1, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: network(v[None])[0], x[0])
    wanted = (jacobian - jacobian.T).square().sum().item() / 6
    many = x.expand(4000, 6)
    probes = torch.randn(4000, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prediction, found = predict_with_asymmetry(network, many, probes)
    assert torch.allclose(prediction, network(many))
    # (v'Aw)^2 varies by less than 2.9 times its mean: 3 standard errors are 14 %.
    assert found.item() == pytest.approx(wanted, rel=0.14)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        predict_with_asymmetry(network, many[:64], probes[:64])[1].backward()
        optimizer.step()
    assert predict_with_asymmetry(network, many, probes)[1].item() < 0.05 * wanted


def test_penalty_in_a_run(tmp_path):
    data, logs = write_data(tmp_path / "data"), []
    for weight in (0.0, 1.0):
        config = make_config(
            data, tmp_path / str(weight), conservativity_weight=weight, max_train_steps=2, num_validation_images=0
        )
        Trainer(config, ImmiscibleRecipe(config)).train()
        logs.append(json.loads((tmp_path / str(weight) / "metrics.jsonl").read_text().splitlines()[0]))
    plain, weighted = logs
    assert "asymmetry" not in plain
    assert weighted["asymmetry"] > 0
    assert weighted["loss"] == pytest.approx(plain["loss"] + weighted["asymmetry"], rel=1e-4)
    with pytest.raises(ValueError, match="`conservativity_weight` must be a number >= 0, got -1.0"):
        make_config(data, tmp_path / "bad", conservativity_weight=-1.0)
