"""One rank of test_fsdp2: gradients of a patched model under FSDP2, against those on one rank."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from powerflow_fast.integrations.transformers import patch_head  # noqa: E402
from tests.helpers import tiny  # noqa: E402


def gradients(own_unit: bool, tied: bool, rank: int, world: int) -> dict[str, torch.Tensor]:
    model = tiny.model(vocab_size=21, tie_word_embeddings=tied)
    patch_head(model)
    if world > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        if own_unit:
            fully_shard(model.lm_head)
        fully_shard(model)
    ids = torch.arange(2, 18).reshape(2, 8)
    own = ids if world == 1 else ids[rank : rank + 1]
    model(input_ids=own, labels=own, fused_lm_head=True).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {n: g.full_tensor() if world > 1 else g for n, g in grads.items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for own_unit, tied in ((False, False), (False, True), (True, False)):
        expected = gradients(own_unit, tied, 0, 1)
        for name, ours in gradients(own_unit, tied, rank, world).items():
            torch.testing.assert_close(
                ours, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    dist.barrier()
    os._exit(0)  # gloo's threads can hang the interpreter's exit
