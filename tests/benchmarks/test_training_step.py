"""The whole training step: what is built for which device, and that it trains the adapter alone."""

import torch

from benchmarks import peers
from benchmarks.training_step import LoRALinear, TrainingStep, cases

CPU = torch.device("cpu")


def test_models_by_device_and_memory():
    assert [case.id for case in cases(CPU, 10**9)] == ["SmolLM2-135M shape"]
    on_80_gb = cases(torch.device("cuda"), 79 * 10**9)
    names = [case.id for case in on_80_gb]
    assert names[:2] == ["Llama-3.2-1B shape", "Llama-3-8B shape"]
    layers = on_80_gb[2].shape.num_layers
    assert names[2] == f"Llama-3-70B shape, {layers} of 80 layers" and 20 < layers < 40
    for case in on_80_gb:
        assert case.dtype.itemsize * case.shape.parameters() < 0.81 * 79e9
    assert [case.name for case in cases(torch.device("cuda"), 10**9)] == []


def test_a_step_trains_the_adapter_alone():
    (case,) = cases(CPU, 10**9, tiny=True)
    step = TrainingStep(case, peers.PowerflowFast(), CPU)
    adapters = [m for m in step.model.modules() if isinstance(m, LoRALinear)]
    assert len(adapters) == 7 * case.shape.num_layers
    before = {name: p.clone() for name, p in step.model.named_parameters()}
    first = step().item()
    # At the start policy and reference agree, so the residual is (1 - alpha) * mean log-prob, and
    # a model of random weights is close to uniform.
    uniform = ((1 - peers.ALPHA) * torch.tensor(case.shape.vocab_size).log()).square().item()
    assert abs(first / uniform - 1) < 0.05
    changed = {n for n, p in step.model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"up", "down"}
