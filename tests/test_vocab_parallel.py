"""A vocabulary split over two processes gives the log-probs and gradients of the whole head."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from powerflow_fast import linear_logprobs, paired_linear_logprobs, reference

WORLD = 2


def make_inputs():
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 9, 8)
    weight, bias = torch.randn(22, 8), torch.randn(22)
    targets = torch.randint(0, 22, (9,))
    targets[4] = -100
    return hidden, ref_hidden, weight, bias, targets


def worker(rank, port, results):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    hidden, ref_hidden, weight, bias, targets = make_inputs()
    own = slice(rank * 11, rank * 11 + 11)
    hidden.requires_grad_()
    weight, bias = weight[own].clone().requires_grad_(), bias[own].clone().requires_grad_()
    logps, ref_logps, entropy = paired_linear_logprobs(
        hidden,
        weight,
        targets,
        ref_hidden,
        bias=bias,
        return_entropy=True,
        temperature=0.8,
        softcap=4.0,
        process_group=dist.group.WORLD,
    )
    (logps.sin().sum() + entropy.square().sum()).backward()
    outputs = (logps, ref_logps, entropy, hidden.grad, weight.grad, bias.grad)
    results[rank] = [x.detach().numpy() for x in outputs]
    try:
        linear_logprobs(hidden, weight, targets + 22, process_group=dist.group.WORLD)
    except ValueError as error:
        results[f"error {rank}"] = str(error)
    dist.barrier()
    os._exit(0)  # see ddp_run.py


def test_two_slices_equal_one_head():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.Manager().dict()
    mp.spawn(worker, (port, results), nprocs=WORLD)
    hidden, ref_hidden, weight, bias, targets = make_inputs()
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    transform = {"temperature": 0.8, "softcap": 4.0}
    logps, entropy = reference.linear_logprobs(
        leaves[0], leaves[1], targets, leaves[2], **transform
    )
    ref_logps, _ = reference.linear_logprobs(ref_hidden, weight, targets, bias, **transform)
    (logps.sin().sum() + entropy.square().sum()).backward()
    for rank in range(WORLD):
        own = slice(rank * 11, rank * 11 + 11)
        expected = [logps, ref_logps, entropy, leaves[0].grad]
        expected += [leaves[1].grad[own], leaves[2].grad[own]]
        for actual, wanted in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(actual).double(), wanted.detach(), rtol=1e-5, atol=1e-5
            )
        assert results[f"error {rank}"].startswith("targets: expected ids in [0, 22)")
