"""A random Llama of 16 dimensions with a 20-word tokenizer, and rollouts that need no sampling."""

import os

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

os.environ.setdefault("CI", "1")  # no telemetry from tests
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

WORDS = "<pad> <eos> the capital of France Paris is what sum one two three four five rain sea a b c"
PROMPTS = ["the capital of France is", "what is the sum of one two", "rain", "the sea is a b c"]
EOS = 1


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS.split())}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, which now begins every text with a token of its own, as Llama's do."""
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", EOS)]
    )
    return tokenizer


def model(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = dict(
        vocab_size=len(WORDS.split()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**config | options))


def dataset(repeats: int = 4) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * repeats})


def lora(**options) -> LoraConfig:
    return LoraConfig(**dict(r=4, target_modules="all-linear", lora_dropout=0.0) | options)


def config(folder, **options):
    from powerflow_fast import PowerFlowConfig

    defaults = dict(
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        draw_curves=False,
        shuffle_dataset=False,
    )
    return PowerFlowConfig(str(folder), **defaults | options)


def rollout(prompts, trainer):
    """Completions that depend on the prompt and its place in the group alone, on any rank."""
    encode = trainer.processing_class
    size, rank = len(prompts), trainer.accelerator.process_index
    completions = []
    for i, prompt in enumerate(prompts):
        place = (rank * size + i) % trainer.num_generations
        seed = 1000 * PROMPTS.index(prompt) + 10 * place + 7 * trainer.state.global_step
        draw = torch.Generator().manual_seed(seed)
        length = int(torch.randint(1, 6, (1,), generator=draw))
        ids = torch.randint(2, len(WORDS.split()), (length,), generator=draw).tolist()
        completions.append(ids if place == 3 else [*ids, EOS])  # the last one is truncated
    ids = [encode(p)["input_ids"] for p in prompts]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def start_log_z_off_its_estimate() -> None:
    """For runs that other sums are compared with.

    At the estimate, where it starts, the last bias has a gradient of 0 but for rounding, of which
    Adam makes a whole step, up or down.
    """
    from powerflow_fast.log_z import LogZHead

    start = LogZHead.warm_start
    LogZHead.warm_start = lambda self, estimate: start(self, estimate + 1.0)


class Gradients(TrainerCallback):
    """Keeps each step's gradients, as the optimizer would get them, and the logs."""

    def __init__(self):
        self.steps, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "log_z" in logs:
            self.logs.append(dict(logs))
