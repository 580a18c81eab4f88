"""What TRL's vLLM in the trainer's process is given, with a stand-in for vLLM."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("trl")

from transformers import LlamaForCausalLM  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.training.vllm_colocated import computing_type  # noqa: E402
from tests.helpers import tiny  # noqa: E402

NORM = "model.norm.weight"
# The stand-in's log-probs are made up, and it writes a word.
pytestmark = pytest.mark.filterwarnings("ignore:the sampler's|completions have:UserWarning")


class Engine:
    """Keeps what it was started with and sent; answers every prompt with one word and an end."""

    last: "Engine"

    def __init__(self, **options):
        Engine.last = self
        self.options, self.weights, self.sent_before = options, {}, []
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load(self, named) -> None:
        self.weights |= {name: value.clone() for name, value in named}

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts, **_):
        self.sent_before.append(self.weights.get(NORM))
        answers = []
        for i, prompt in enumerate(prompts):
            ids = [2 + i % 4, tiny.EOS]
            logprobs = [{token: SimpleNamespace(rank=1, logprob=-2.0)} for token in ids]
            output = SimpleNamespace(token_ids=ids, logprobs=logprobs)
            prompt_ids = prompt["prompt_token_ids"]
            answers.append(SimpleNamespace(prompt_token_ids=prompt_ids, outputs=[output]))
        return answers


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    with mock.patch.dict(os.environ):  # TRL sets RANK and others
        yield


def make(folder, adapter=True, dtype=torch.float32, **options) -> PowerFlowTrainer:
    tiny.model().to(dtype).save_pretrained(folder / "model")
    # The stand-in's log-probs are not the policy's.
    defaults = dict(use_vllm=True, vllm_mode="colocate", stop_on_collapse=False)
    options = defaults | dict(max_sampler_gap=9.0) | options
    return PowerFlowTrainer(
        LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype),
        tiny.config(folder, **options),
        tiny.dataset(),
        eval_dataset=tiny.dataset(2),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if adapter else None,
    )


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_the_models_type(dtype, adapter, tmp_path):
    make(tmp_path, adapter, dtype)
    assert Engine.last.options["dtype"] == dtype
    assert vllm_generation.LLM is Engine


def test_it_computes_in_the_type_of_mixed_precision(tmp_path):
    make(tmp_path, bf16=True)
    assert Engine.last.options["dtype"] == torch.bfloat16


def test_quantised_weights_leave_the_type_to_vllm(tmp_path):
    trainer = make(tmp_path)
    trainer.model.get_base_model().is_quantized = True
    assert computing_type(trainer) == "auto"


def test_the_patch_is_taken_back_where_vllm_fails(tmp_path, monkeypatch):
    def fails(**_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(vllm_generation, "LLM", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        make(tmp_path)
    assert vllm_generation.LLM is fails


def norm_of(trainer) -> torch.Tensor:
    return dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())[NORM]


def test_weights_are_sent_again_for_a_second_run(tmp_path):
    """Both runs end after one step, so that the second begins at the step that was sent last."""
    trainer = make(tmp_path, adapter=False)
    for _ in range(2):
        expected = norm_of(trainer).detach().clone()
        trainer.train()
        assert torch.equal(Engine.last.sent_before[-1], expected)
    first, second = Engine.last.sent_before
    assert not torch.equal(first, second)


def test_weights_are_sent_again_before_and_after_a_run(tmp_path):
    """A checkpoint loaded at its start, or the best one at its end, has no step of its own."""
    trainer = make(tmp_path, adapter=False, eval_strategy="steps", eval_steps=1)
    for use in (trainer.evaluate, trainer.train, trainer.evaluate):
        with torch.no_grad():
            norm_of(trainer).mul_(1.001)
        expected, count = norm_of(trainer).detach().clone(), len(Engine.last.sent_before)
        use()
        assert torch.equal(Engine.last.sent_before[count], expected)
