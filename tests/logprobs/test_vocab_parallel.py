"""Heads spread over two processes give the log-probs and gradients of the whole head."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from powerflow_fast import linear_logprobs, paired_linear_logprobs, reference
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import torch_backend, triton_backend
from powerflow_fast.logprobs.backend import Upstream
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers import ranks

WORLD = 2
SIZES = ((11, 12), (4, 19), None)  # None: a DTensor


def make_inputs():
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 9, 8)
    weight, bias = torch.randn(23, 8), torch.randn(23)
    targets = torch.randint(0, 23, (9,))
    targets[4] = -100
    return hidden, ref_hidden, weight, bias, targets


def spawn(worker, folder, *arguments):
    """What `worker(rank, *arguments)` returns on each rank, merged."""
    ranks.finish(WORLD, functools.partial(work, worker, folder, *arguments), folder)
    merged = {}
    for rank in range(WORLD):
        merged |= torch.load(folder / f"{rank}.pt", weights_only=True)
    return merged


def work(worker, folder, *arguments):
    dist.init_process_group("gloo")
    torch.save(worker(dist.get_rank(), *arguments), folder / f"{dist.get_rank()}.pt")


def slices_worker(rank):
    results = {}
    for sizes in SIZES:
        results[rank, sizes], results[f"error {rank}", sizes] = run_slices(rank, sizes)
    return results


def run_slices(rank, sizes):
    hidden, ref_hidden, weight, bias, targets = make_inputs()
    hidden.requires_grad_()
    if sizes is None:
        mesh = init_device_mesh("cpu", (WORLD,))
        weight, bias = (
            distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)
        )
        group = mesh.get_group()
    else:
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        weight, bias = weight[own].clone().requires_grad_(), bias[own].clone().requires_grad_()
        group = dist.group.WORLD
    logps, ref_logps, entropy = paired_linear_logprobs(
        hidden,
        weight,
        targets,
        ref_hidden,
        bias=bias,
        return_entropy=True,
        temperature=0.8,
        softcap=4.0,
        process_group=group,
    )
    (logps.sin().sum() + entropy.square().sum()).backward()
    own_grads = [x.to_local() if sizes is None else x for x in (weight.grad, bias.grad)]
    outputs = (logps, ref_logps, entropy, hidden.grad, *own_grads)
    with pytest.raises(ValueError) as error:
        linear_logprobs(hidden, weight, targets + 23, process_group=group)
    return [x.detach() for x in outputs], str(error.value)


FROZEN = {
    "plain": {},
    "softcap": {"softcap": 4.0, "temperature": 0.8},
    "sharp": {"logit_scale": 6.0, "grad_tolerance": 1e-3},
}


def frozen_worker(rank):
    """The exact route: the forward pass knows the unit gradient, the backward forms no logits."""
    results = {}
    torch_backend.backward = triton_backend.backward = None
    own = slice(0, 11) if rank == 0 else slice(11, 23)
    for name, transform in FROZEN.items():
        for backend in ("torch", "triton"):
            hidden, _, weight, bias, targets = make_inputs()
            hidden.requires_grad_()
            options = dict(bias=bias[own], process_group=dist.group.WORLD, backend=backend)
            options |= {"return_entropy": "detached", **transform}
            logps, _ = linear_logprobs(hidden, weight[own], targets, **options)
            logps.sin().sum().backward()
            results[name, backend, rank] = logps.detach(), hidden.grad
    return results


def test_two_frozen_slices_know_the_direction(tmp_path):
    results = spawn(frozen_worker, tmp_path)
    assert len(results) == 2 * 2 * len(FROZEN)
    hidden, _, weight, bias, targets = make_inputs()
    for (name, _, _), found in results.items():
        x = hidden.double().requires_grad_()
        transform = {k: v for k, v in FROZEN[name].items() if k != "grad_tolerance"}
        logps, _ = reference.linear_logprobs(x, weight, targets, bias, **transform)
        logps.sin().sum().backward()
        for actual, wanted in zip(found, (logps.detach(), x.grad), strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Results of all ways to slice, from one start of the processes."""
    return spawn(slices_worker, tmp_path_factory.mktemp("slices"))


@pytest.mark.parametrize("sizes", SIZES, ids=["even", "uneven", "DTensor"])
def test_two_slices_equal_one_head(slices, sizes):
    results = {name: value for (name, of), value in slices.items() if of == sizes}
    sizes = sizes or (12, 11)  # as DTensor cuts 23 rows
    hidden, ref_hidden, weight, bias, targets = make_inputs()
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    transform = {"temperature": 0.8, "softcap": 4.0}
    logps, entropy = reference.linear_logprobs(
        leaves[0], leaves[1], targets, leaves[2], **transform
    )
    ref_logps, _ = reference.linear_logprobs(ref_hidden, weight, targets, bias, **transform)
    (logps.sin().sum() + entropy.square().sum()).backward()
    for rank in range(WORLD):
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        expected = [logps, ref_logps, entropy, leaves[0].grad]
        expected += [leaves[1].grad[own], leaves[2].grad[own]]
        for actual, wanted in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
        assert results[f"error {rank}"].startswith("targets: expected ids in [0, 23)")


def gathered_worker(rank, trained):
    """Each rank has tokens of its own, as under FSDP2 with the head as a unit of its own."""
    hidden, _, weight, _, targets = make_inputs()
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(trained)
    own = slice(rank * 4, rank * 4 + 4)
    hidden = hidden[own].clone().requires_grad_()
    logps = linear_logprobs(hidden, weight, targets[own], temperature=0.8)
    logps.sin().sum().backward()
    outputs = [logps.detach(), hidden.grad]
    if trained:
        outputs.append(weight.grad.full_tensor())
    results = {rank: outputs}
    replicated = distribute_tensor(weight.detach().full_tensor(), mesh, [Replicate()])
    try:
        linear_logprobs(hidden, replicated, targets[own])
    except ValueError as error:
        results[f"error {rank}"] = str(error)
    return results


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_dtensor_is_gathered_and_its_gradient_is_the_mean_over_ranks(trained, tmp_path):
    results = spawn(gathered_worker, tmp_path, trained)
    hidden, _, weight, _, targets = make_inputs()
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    logps, _ = reference.linear_logprobs(hidden[:8], weight, targets[:8], temperature=0.8)
    logps.sin().sum().backward()
    for rank in range(WORLD):
        own = slice(rank * 4, rank * 4 + 4)
        expected = [logps[own].detach(), hidden.grad[own]] + [weight.grad / WORLD] * trained
        for actual, wanted in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)
        assert results[f"error {rank}"].startswith("weight: expected a plain tensor, or a DTensor")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])
def test_what_is_summed_over_ranks_has_not_been_rounded_yet(backend, device):
    """A bf16 summand of a gradient that cancels over the ranks would lose its digits."""
    hidden, _, weight, _, targets = (x.to(device) for x in make_inputs())
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logits = hidden.float() @ weight.float().T
    lse = logits.logsumexp(1)
    logps = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0] - lse
    upstream = Upstream((targets >= 0).float(), None, targets, logps, lse, None)
    head = Head(hidden, weight, None)
    grad, _, _ = backend.backward(head, upstream, HeadOptions(), (True, False, False))
    assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())
