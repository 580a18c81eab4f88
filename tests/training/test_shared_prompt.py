"""Training with prompts computed once is training with prompts computed for each completion."""

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, Gemma2Config  # noqa: E402

from powerflow_fast import PowerFlowConfig  # noqa: E402
from powerflow_fast.models.packed_attention import EAGER  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.training.test_trainer import assert_close, make, start_from_nonzero_adapter  # noqa: E402

WAYS = {
    "each": dict(shared_prompt="off"),
    "each, packed": dict(shared_prompt="off", padding_free=True),
    "once": dict(shared_prompt="on"),
}
FIGURES = ("kl", "entropy", "log_z", "residual/mean", "residual/std", "logps/policy")


def run(folder, **options):
    trainer, seen = make(folder, **options)
    start_from_nonzero_adapter(trainer)
    trainer.train()
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(log_z="learned"),
        dict(num_iterations=2, max_steps=2),  # with log-probs of the old policy
        dict(mask_truncated_completions=True),  # empty completions
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),  # split groups
        dict(gradient_checkpointing=True),
    ],
    ids=["group", "learned", "two updates", "masked", "split", "checkpointing"],
)
def test_loss_gradients_and_figures_are_the_same(tmp_path, options):
    runs = {name: run(tmp_path / name, **way, **options) for name, way in WAYS.items()}
    for name in ("each, packed", "once"):
        assert len(runs[name].steps) == len(runs["each"].steps)
        for got, expected in zip(runs[name].steps, runs["each"].steps, strict=True):
            assert_close(got, expected, 1e-4)
        for got, expected in zip(runs[name].logs, runs["each"].logs, strict=True):
            for figure in ("loss", *FIGURES):
                assert got[figure] == pytest.approx(expected[figure], rel=1e-4, abs=1e-5)


def test_the_logs_count_tokens(tmp_path):
    """Two prompts of 5 and 7 tokens with four completions each, padded to 7 + 6 columns."""
    logs = {name: run(tmp_path / name, **way).logs[0] for name, way in WAYS.items()}
    rollout = tiny.rollout(
        [p for p in tiny.PROMPTS[:2] for _ in range(4)], make(tmp_path / "more")[0]
    )
    completions = sum(map(len, rollout["completion_ids"]))
    longest = max(map(len, rollout["completion_ids"]))
    assert logs["each"]["tokens/computed"] == 8 * (7 + longest)
    assert logs["each, packed"]["tokens/computed"] == 4 * 5 + 4 * 7 + completions
    assert logs["once"]["tokens/computed"] == 5 + 7 + completions
    assert logs["once"]["tokens/saved"] == 3 * 5 + 3 * 7
    assert logs["each"]["tokens/saved"] == logs["each, packed"]["tokens/saved"] == 0


@pytest.mark.parametrize("log_z", ["group", "learned"])
def test_split_groups_share_what_lies_together(tmp_path, log_z):
    """TRL shuffles a rollout; that would part what shares a prompt."""
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    logs = run(tmp_path, log_z=log_z, **split).logs[0]
    assert logs["tokens/saved"] == 2 * 5 + 2 * 7


@pytest.mark.parametrize("log_z", ["group", "learned"])
def test_twenty_steps_draw_the_same_completions(tmp_path, log_z):
    drawn = {}
    for way in ("off", "on"):
        trainer, seen = make(
            tmp_path / way, rollout=None, max_steps=20, shared_prompt=way, log_z=log_z
        )
        rollouts = drawn.setdefault(way, [])
        rollout = trainer._generate_and_score_completions

        def kept(inputs, rollout=rollout, rollouts=rollouts):
            output = rollout(inputs)
            rollouts.append(output["completion_ids"])
            return output

        trainer._generate_and_score_completions = kept
        trainer.train()
        assert seen.logs[-1]["kl"] > 1e-3  # it has moved
    assert len(drawn["on"]) == 20
    assert all(map(torch.equal, drawn["on"], drawn["off"]))


@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "all parameters"])
def test_a_model_with_eager_attention(tmp_path, peft):
    config = tiny.model().config.to_dict()
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    sizes = {name: config[name] for name in (*names.split(), "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    given = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, bos_token_id=None)
    AutoModelForCausalLM.from_config(given).save_pretrained(tmp_path / "model")
    runs = {}
    for way in ("off", "on"):
        eager = dict(attn_implementation="eager")  # of older versions not the default
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **eager)
        trainer, seen = make(tmp_path / way, model=model, peft=peft, shared_prompt=way)
        trainer.train()
        names = [m.config._attn_implementation for m in (model, trainer.ref_model) if m is not None]
        assert set(names) == {EAGER if way == "on" else "eager"}
        runs[way] = seen
    assert runs["on"].logs[0]["loss"] == pytest.approx(runs["off"].logs[0]["loss"], rel=1e-4)
    assert_close(runs["on"].steps[0], runs["off"].steps[0], 1e-4)


def test_a_given_adapter_shares_as_policy_and_as_reference(tmp_path):
    runs = {}
    for way in ("off", "on"):
        model = get_peft_model(tiny.model(), tiny.lora())
        runs[way] = run(tmp_path / way, model=model, peft=False, shared_prompt=way)
    assert_close(runs["on"].steps[0], runs["off"].steps[0], 1e-4)


def test_a_model_that_cannot_share(tmp_path):
    def model():
        made = tiny.model()
        made.config.expert_capacity = 4
        return made

    with pytest.warns(UserWarning, match="shared_prompt: each completion computes its prompt: .*"):
        trainer, _ = make(tmp_path, model=model())
    assert trainer.layout.best == "padded"
    with pytest.raises(ValueError, match="shared_prompt: LlamaForCausalLM drops tokens"):
        make(tmp_path, model=model(), shared_prompt="on")


def test_on_and_off_as_yaml_reads_them(tmp_path):
    assert PowerFlowConfig(str(tmp_path), bf16=False, shared_prompt=True).shared_prompt == "on"
    assert PowerFlowConfig(str(tmp_path), bf16=False, shared_prompt=False).shared_prompt == "off"
    with pytest.raises(ValueError, match="shared_prompt: expected one of .*'auto'.*got 'yes'"):
        PowerFlowConfig(str(tmp_path), bf16=False, shared_prompt="yes")


def test_two_groups_of_one_prompt_share_it_and_keep_their_own_log_z(tmp_path):
    data = Dataset.from_dict({"prompt": [tiny.PROMPTS[1]] * 8})
    runs = {way: run(tmp_path / way, data=data, shared_prompt=way) for way in ("off", "on")}
    assert_close(runs["on"].steps[0], runs["off"].steps[0], 1e-4)
    on, off = (runs[way].logs[0] for way in ("on", "off"))
    assert on["tokens/saved"] == 7 * 7
    for figure in ("loss", "log_z", "residual/std"):
        assert on[figure] == pytest.approx(off[figure], rel=1e-4, abs=1e-6)


def test_the_name_of_the_attention_function_is_not_saved(tmp_path):
    model = tiny.model()
    model.set_attn_implementation("eager")
    trainer, _ = make(tmp_path / "run", model=model)
    assert model.config._attn_implementation == EAGER
    model.save_pretrained(tmp_path / "model")
    assert EAGER not in (tmp_path / "model" / "config.json").read_text()
