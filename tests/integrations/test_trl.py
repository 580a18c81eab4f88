"""TRL's own trainers, trained with its head and with ours: the same losses and metrics."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl.trainer import utils  # noqa: E402

from powerflow_fast.integrations import host  # noqa: E402
from powerflow_fast.integrations.trl import install_head  # noqa: E402
from tests.helpers import tiny  # noqa: E402

TEXTS = [(p, c) for p in tiny.PROMPTS for c in ("Paris", "three four five", "rain sea")]
DATA = {
    "SFT": {"text": [f"{p} {c}" for p, c in TEXTS]},
    "DPO": {
        "prompt": [f"{p} " for p in tiny.PROMPTS],
        "chosen": ["Paris", "three", "rain sea a", "b c"],
        "rejected": ["rain", "one two", "sum", "three four five"],
    },
    "KTO": {
        "prompt": [f"{p} " for p, _ in TEXTS],
        "completion": [c for _, c in TEXTS],
        "label": [i % 2 == 0 for i in range(len(TEXTS))],
    },
    "GRPO": {"prompt": tiny.PROMPTS},
    "RLOO": {"prompt": tiny.PROMPTS},
}
ONLINE = dict(num_generations=4, max_completion_length=6)


class Logs(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.steps.append(dict(logs))


def short_is_good(completions, **kwargs):
    return [-float(len(c.split())) for c in completions]


def train(folder, name, model, peft_config=None, **options):
    """Logged numbers of 3 steps."""
    torch.manual_seed(0)
    config = getattr(trl, f"{name}Config")
    online = name in ("GRPO", "RLOO")
    options = (
        dict(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            **ONLINE if online else {},
        )
        | options
    )
    rewards = {"reward_funcs": short_is_good} if online else {}
    logs = Logs()
    model.save_pretrained(folder / "model")  # DPO and KTO load their reference from there
    model = type(model).from_pretrained(folder / "model")
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=config(**options),
        train_dataset=Dataset.from_dict(DATA[name]),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        callbacks=[logs],
        **rewards,
    )
    trainer.train()
    return logs.steps


def compare(folder, name, build, tolerance=2e-4, **options):
    """Train with TRL's head and with ours; every logged number but times agrees."""
    theirs = train(folder, name, build(), **options)
    with install_head():
        ours = train(folder, name, build(), **options)
    assert len(theirs) == len(ours) >= 3
    compared = 0
    for before, after in zip(theirs, ours, strict=True):
        # At the start policy and reference are the same model: which is larger is rounding.
        tied = abs(before.get("rewards/margins", 1.0)) < 1e-5
        for key, value in before.items():
            if tied and key == "rewards/accuracies":
                continue
            if isinstance(value, float) and not any(w in key for w in ("time", "runtime", "per_")):
                assert after[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
                compared += 1
    assert compared > 15
    return ours


def gemma():
    torch.manual_seed(0)
    config = dict(head_dim=8, final_logit_softcapping=3.0)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small(**config)))


def mixtral():
    torch.manual_seed(0)
    config = small(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**config))


def granite():
    torch.manual_seed(0)
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**small(logits_scaling=0.5)))


def small(**options):
    return {k: v for k, v in tiny.model().config.to_dict().items() if k in KEPT} | options


KEPT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads initializer_range bos_token_id eos_token_id pad_token_id"
).split()


@pytest.mark.parametrize("name", DATA)
def test_a_trainer_gives_the_same_losses(name, tmp_path):
    compare(tmp_path, name, tiny.model)


CASES = {
    "GRPO with adapter, entropy bonus, temperature": dict(
        name="GRPO",
        peft_config=tiny.lora(),
        temperature=0.7,
        entropy_coef=0.1,
        beta=0.1,
    ),
    "GRPO of high-entropy tokens, accumulated": dict(
        name="GRPO", top_entropy_quantile=0.5, gradient_accumulation_steps=2
    ),
    "DPO weighted (WPO) with softcap": dict(name="DPO", build=gemma, use_weighting=True),
    "DPO with a scale and an adapter": dict(name="DPO", build=granite, peft_config=tiny.lora()),
    "SFT with the MoE auxiliary loss": dict(name="SFT", build=mixtral),
    "KTO with the MoE auxiliary loss": dict(name="KTO", build=mixtral),
    "SFT with its head trained beside an adapter": dict(
        name="SFT", peft_config=tiny.lora(modules_to_save=["lm_head"])
    ),
    "SFT with dynamic weights": dict(name="SFT", loss_type="dft"),
    "SFT under autocast": dict(name="SFT", bf16=True, tolerance=2e-2),
    "GRPO with the head in float32 under autocast": dict(
        name="GRPO", bf16=True, cast_lm_head_to_fp32=True, tolerance=2e-2
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_options_that_reach_the_head(case, tmp_path):
    compare(tmp_path, **{"build": tiny.model} | CASES[case])


def test_install_head_is_undone_and_reaches_modules_imported_later(monkeypatch):
    theirs = utils.add_fused_lm_head
    grpo_trainer = import_module("trl.trainer.grpo_trainer")
    monkeypatch.delitem(sys.modules, "trl.trainer.rloo_trainer", raising=False)
    undo = install_head(backend="torch")
    rloo_trainer = import_module("trl.trainer.rloo_trainer")
    ours = utils.add_fused_lm_head
    assert ours is not theirs
    assert grpo_trainer.add_fused_lm_head is rloo_trainer.add_fused_lm_head is ours
    with install_head():  # a second one, undone first
        assert grpo_trainer.add_fused_lm_head is not ours
    assert grpo_trainer.add_fused_lm_head is ours
    undo.close()
    for module in (utils, grpo_trainer, rloo_trainer):
        assert module.add_fused_lm_head is theirs


@pytest.mark.parametrize("found", ["1.15.3", "1.17.0", "2.0.0"])
def test_an_untested_version_is_refused(found, monkeypatch):
    monkeypatch.setattr(host, "version", lambda name: found)
    with pytest.raises(ValueError, match=f"tested with 1.16, found {found}"):
        install_head()


def test_an_unknown_option_or_head_is_refused_when_installed(tmp_path):
    with pytest.raises(ValueError, match="backend: expected one of"):
        install_head(backend="cuda")
    model = tiny.model()
    model.lm_head.forward = lambda hidden: hidden.tanh() @ model.lm_head.weight.T
    with install_head(), pytest.raises(ValueError, match="not the softcap"):
        utils.add_fused_lm_head(model)
    adapted = tiny.lora(target_modules=["lm_head"])
    with install_head(), pytest.raises(ValueError, match="lm_head"):
        train(tmp_path, "SFT", tiny.model(), peft_config=adapted)


def test_importing_the_doors_imports_no_framework():
    code = (
        "import sys; from powerflow_fast.integrations import axolotl, transformers, trl, verl; "
        "loaded = {'trl', 'transformers', 'verl', 'axolotl', 'peft', 'ray'} & set(sys.modules); "
        "sys.exit(repr(loaded) if loaded else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_heads_that_are_undone_in_any_order_leave_what_is_left():
    theirs = utils.add_fused_lm_head
    first, second = install_head(grad_tolerance=1e-3), install_head(round_logits=True)
    newest = utils.add_fused_lm_head
    first.close()
    assert utils.add_fused_lm_head is newest
    second.close()
    assert utils.add_fused_lm_head is theirs
    first, second = install_head(), install_head()
    second.close()
    assert utils.add_fused_lm_head not in (theirs, newest)
    first.close()
    assert utils.add_fused_lm_head is theirs
