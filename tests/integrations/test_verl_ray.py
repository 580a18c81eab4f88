"""verl's workers, two with FSDP2 under a local Ray on CPUs, give what one process gives.

`tests.helpers.verl_parts` holds what of verl cannot run without a GPU, the sampler before all.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from powerflow_fast import tb_loss
from powerflow_fast.rewards import missing_boxed
from tests.helpers import tiny
from tests.helpers.verl_completions import completion

pytest.importorskip("ray")
pytest.importorskip("verl.trainer.ppo.ray_trainer", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
STEPS, UPDATES, SAMPLES, ALPHA, LR = 3, 2, 4, 4.0, 1e-2
METRICS = ("residual_mean", "importance_mean", "clipped_share")  # means over sequences
SECONDS = 600  # until a run that hangs is ended
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_ADDRESS": "",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # else it starts a process for each CPU
    "VERL_ENGINE_DEVICE": "cuda",
    "VERL_PLATFORM": "cpu",
}
MODULES = "tests.helpers.verl_platform,tests.helpers.verl_parts"
PLUGIN = "powerflow_fast.integrations.verl_plugin"
ACTOR, REF, ROLLOUT, MODEL = (f"actor_rollout_ref.{n}" for n in "actor ref rollout model".split())
ON_CPU = [
    f"{ACTOR}.strategy=fsdp2",
    f"{ACTOR}.use_torch_compile=False",
    f"+{MODEL}.override_config.attn_implementation=sdpa",
    f"{ROLLOUT}.name=fixed",
    f"{ROLLOUT}.tensor_model_parallel_size=2",
    "trainer.device=cpu",
]
PRECISION = [
    f"+{role}.fsdp_config.mixed_precision.{name}=fp32"
    for role in (ACTOR, REF)
    for name in ("param_dtype", "reduce_dtype", "buffer_dtype")
]
SIZES = [
    f"{ACTOR}.optim.lr={LR}",
    f"{ACTOR}.ppo_epochs={UPDATES}",
    f"{ACTOR}.ppo_mini_batch_size={len(tiny.PROMPTS)}",
    f"{ROLLOUT}.n={SAMPLES}",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a toy model whose tokenizer knows a boxed answer."""
    monkeypatch.setattr(tiny, "WORDS", tiny.WORDS.replace("five", r"\boxed{5}"))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.model().save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def short():
    """A folder for Ray, whose sockets may not have long names."""
    with tempfile.TemporaryDirectory(prefix="ray") as name:
        yield name


def samples_of(step: int) -> list[dict]:
    """Completions of unequal length, `SAMPLES` of each prompt."""
    encode, psi, found = tiny.tokenizer(), missing_boxed(), []
    for group, text in enumerate(tiny.PROMPTS):
        prompt = encode(text)["input_ids"]
        for index in range(step * SAMPLES, (step + 1) * SAMPLES):
            ids = completion(prompt, index)
            score = psi([encode.decode(ids, skip_special_tokens=True)])[0]
            found.append(dict(prompt=prompt, completion=ids, group=group, psi=score))
    return found


def log_probs(model, samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, T] of the completions' tokens, where the mask [S, T] is True."""
    rows = [torch.tensor(s["prompt"] + s["completion"]) for s in samples]
    ids = pad_sequence(rows, batch_first=True)
    first = torch.tensor([len(s["prompt"]) for s in samples])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(ids.shape[1])
    logits = model(ids, attention_mask=(places < end).long()).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logps, ((places >= first) & (places < end))[:, 1:]


def one_process(steps: list[list[dict]]) -> Iterator[tuple[dict[str, float], dict]]:
    """Of each step: means over its updates, as verl names them, and the parameters after it."""
    model, reference = tiny.model(), tiny.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    for samples in steps:
        groups = torch.tensor([s["group"] for s in samples])
        keywords = dict(alpha=ALPHA, psi=torch.tensor([s["psi"] for s in samples]))
        with torch.no_grad():
            old, keywords["mask"] = log_probs(model, samples)
            ref, _ = log_probs(reference, samples)
            grouped = tb_loss(old, ref, log_z="group", group_ids=groups, **keywords)
            log_z = grouped.residual - tb_loss(old, ref, log_z=0.0, **keywords).residual
        logged = []
        for _ in range(UPDATES):
            logps, _ = log_probs(model, samples)
            out = tb_loss(logps, ref, log_z=log_z, old_logps=old, **keywords)
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            row = {f"actor/la_tb/{name}": out.metrics[name] for name in METRICS}
            logged.append(row | {"actor/loss": out.metrics["loss"], "actor/grad_norm": norm})
        means = {name: float(sum(row[name] for row in logged)) / UPDATES for name in logged[0]}
        yield means, {name: p.detach().clone() for name, p in model.named_parameters()}


def run(command: list, folder: Path, **environment: str) -> None:
    """To its end; then whatever it has left behind is ended."""
    paths = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    own = {"VERL_RUN": str(folder), "VERL_FILE_LOGGER_PATH": str(folder / "log.jsonl")}
    environment = os.environ | ENVIRONMENT | own | {"PYTHONPATH": paths} | environment
    log = folder / "log.txt"
    try:
        with log.open("wb") as out:
            done = subprocess.run(
                command, env=environment, stdout=out, stderr=out, timeout=SECONDS, cwd=folder
            )
        assert done.returncode == 0, log.read_text(errors="replace")[-6000:]
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("VERL_RUN") == str(folder):
                    process.kill()
            except psutil.Error:
                pass  # it has ended, or is another user's


def check(folder: Path, names: list[str]) -> None:
    """What verl logged of each step, and what its two workers then hold."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    expected = one_process([samples_of(step) for step in range(STEPS)])
    for row, (logged, parameters) in zip(rows, expected, strict=True):
        for name in names:
            assert row["data"][name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
        for rank in range(2):
            weights = torch.load(folder / f"weights-{row['step']}-{rank}.pt", weights_only=True)
            assert weights.keys() == parameters.keys()
            for name, value in parameters.items():
                error = (weights[name] - value).abs().max()
                assert error <= 1e-4 * value.abs().max(), (row["step"], name, float(error))


def test_verls_worker_group_equals_one_process(folder, short):
    """Padded rows, verl's own head, two micro-batches of each worker in each update."""
    overrides = [
        *ON_CPU,
        *PRECISION,
        *SIZES,
        "algorithm.adv_estimator=la_tb",
        f"+algorithm.alpha={ALPHA}",
        f"{MODEL}.path={folder / 'model'}",
        f"{MODEL}.use_remove_padding=False",
        f"{ACTOR}.policy_loss.loss_mode=la_tb",
        f"{ACTOR}.use_kl_loss=True",
        f"{ACTOR}.kl_loss_coef=0.0",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
        f"{REF}.log_prob_micro_batch_size_per_gpu=4",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4",
    ]
    steps = [samples_of(step) for step in range(STEPS)]
    settings = {"overrides": overrides, "steps": steps, "ray": short}
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "tests.helpers.verl_workers_run", "settings.json"]
    run(command, folder, VERL_USE_EXTERNAL_MODULES=f"{MODULES},{PLUGIN}")
    check(folder, ["actor/loss", "actor/grad_norm", *(f"actor/la_tb/{name}" for name in METRICS)])


def test_the_recipe_equals_one_process(folder, short):
    """The script and verl's default trainer: packed rows, our head, prompts without answers."""
    pytest.importorskip("transfer_queue")
    pandas = pytest.importorskip("pandas")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in tiny.PROMPTS]
    pandas.DataFrame(rows).to_parquet(folder / "prompts.parquet")
    settings = [
        *ON_CPU,
        *PRECISION,
        *SIZES,
        f"{ACTOR}.ppo_max_token_len_per_gpu=40",  # about half of a worker's tokens
        f"{ROLLOUT}.agent.num_workers=1",
        f"data.train_batch_size={len(rows)}",
        "data.dataloader_num_workers=0",
        "data.max_prompt_length=16",
        "data.max_response_length=8",
        "reward.num_workers=1",
        f"trainer.total_epochs={STEPS}",
        "trainer.logger=file",
        "trainer.resume_mode=disable",
        "trainer.save_freq=-1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "ray_kwargs.ray_init.num_cpus=10",
        "+ray_kwargs.ray_init.num_gpus=2",  # verl counts them
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=100000000",
        f"+ray_kwargs.ray_init._temp_dir={short}",
        f"hydra.run.dir={folder}",
    ]
    run(
        ["bash", ROOT / "recipes" / "verl" / "run.sh", *settings],
        folder,
        PYTHON=sys.executable,
        MODEL=str(folder / "model"),
        TRAIN=str(folder / "prompts.parquet"),
        GPUS="2",
        ALPHA=str(ALPHA),
        VERL_USE_EXTERNAL_MODULES=MODULES,
    )
    # Its micro-batches differ in size, so of the metrics only sums are those of one process.
    check(folder, ["actor/loss", "actor/grad_norm"])
