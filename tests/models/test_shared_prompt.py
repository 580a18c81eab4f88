"""`shared_prompt_hidden_states`: a prompt passes once, and the loss is that of rows apart."""

import pytest
import torch

pytest.importorskip("transformers")

from peft import get_peft_model  # noqa: E402
from transformers import FalconConfig, FalconForCausalLM  # noqa: E402

from powerflow_fast import fused_linear_tb_loss, shared_prompt_hidden_states  # noqa: E402
from tests.helpers import tiny  # noqa: E402

PROMPT = torch.tensor([2, 3, 4, 5, 6])
COMPLETIONS = [torch.tensor(ids) for ids in ([7, 8], [9], [], [10, 11, 12])]


def apart(model, prompt, completions):
    """[N, H], a pass for each completion."""
    states = []
    for completion in completions:
        ids = torch.cat([prompt, completion.long()])[None]
        hidden = model.model(input_ids=ids).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : ids.shape[1] - 1])
    return torch.cat(states)


def test_states_targets_and_places():
    model = tiny.model().eval()
    states = shared_prompt_hidden_states(model, PROMPT, COMPLETIONS)
    assert states.targets.tolist() == [7, 8, 9, 10, 11, 12]
    assert states.cu_seqlens.tolist() == [0, 2, 3, 3, 6]
    assert states.cu_seqlens.dtype == torch.int32
    expected = apart(model, PROMPT, COMPLETIONS)
    torch.testing.assert_close(states.hidden, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_loop_of_ones_own():
    model = get_peft_model(tiny.model(), tiny.lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    base, passed = model.get_base_model(), []
    weight = base.lm_head.weight
    base.model.embed_tokens.register_forward_hook(lambda m, args, out: passed.append(args[0]))

    def step(states):
        policy = states()
        with torch.no_grad(), model.disable_adapter():
            reference = states()
        out = fused_linear_tb_loss(
            policy,
            weight,
            torch.cat(COMPLETIONS).long(),
            ref_hidden=reference,
            cu_seqlens=torch.tensor([0, 2, 3, 3, 6], dtype=torch.int32),
            group_ids=torch.zeros(4, dtype=torch.long),
            log_z="group",
            alpha=2.0,
        )
        model.zero_grad()
        out.loss.backward()
        return out.loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = step(lambda: apart(base, PROMPT, COMPLETIONS))
    shared_prompt_hidden_states(model, PROMPT, COMPLETIONS)  # the trial
    passed.clear()
    got = step(lambda: shared_prompt_hidden_states(model, PROMPT, COMPLETIONS).hidden)
    assert [ids.shape for ids in passed] == [(1, 5 + 6)] * 2
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for one, other in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "prompt, completions, said",
    [
        ([2, 3], COMPLETIONS, "prompt: expected a tensor, got"),
        (PROMPT[None], COMPLETIONS, r"prompt: expected token ids \[tokens\], got .* of \(1, 5\)"),
        (PROMPT.float(), COMPLETIONS, r"prompt: expected token ids \[tokens\], got torch.float32"),
        (PROMPT[:0], COMPLETIONS, "prompt: expected at least one token, got none"),
        (PROMPT, [], "completions: expected at least one, got none"),
        (PROMPT, [torch.tensor([1, 99])], r"completions\[0\]: expected token ids of 0 to 19, got"),
        (
            PROMPT,
            [*COMPLETIONS, torch.ones(4000).long()],
            r"prompt with completions\[4\] has 4005 tokens: beyond the context of 2048",
        ),
    ],
)
def test_bad_input_is_named(prompt, completions, said):
    with pytest.raises(ValueError, match=said):
        shared_prompt_hidden_states(tiny.model(), prompt, completions)


def test_a_model_that_cannot_share_says_so():
    config = FalconConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1
    )
    with pytest.raises(ValueError, match="FalconForCausalLM has 2 layers, of which 0 attend"):
        shared_prompt_hidden_states(FalconForCausalLM(config).eval(), PROMPT, COMPLETIONS)
