"""Checkpoints: nothing is lost by a kill, a full disk or another number of processes."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from packaging import version

pytest.importorskip("trl")

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.training.checkpoint import CheckpointError, last_checkpoint  # noqa: E402
from tests.helpers import kill_run, tiny  # noqa: E402
from tests.helpers.vllm_stand_in import StandIn, serving  # noqa: E402

KILLS = int(os.environ.get("KILLS", 0))  # `KILLS=20` is the long form


@pytest.mark.parametrize(
    ("world", "kills", "sharded"),
    [(1, 2, False), (2, 2, False), (2, 1, True)],
    ids=["one", "ddp", "fsdp2"],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, world, kills, sharded):
    if world > 1 and not sharded:
        if not KILLS:
            pytest.skip("two ranks are in the sharded run; `make test-kills` takes this one too")
        if version.parse(torch.__version__).release < (2, 13):
            pytest.skip("before 2.13 torch cannot load an optimizer to gloo's device cpu:0")
    kill_run.kill(tmp_path, world, KILLS or kills, 0, sharded=sharded)


@pytest.mark.skipif(not KILLS, reason="resumed in test_ahead.py; `make test-kills` kills it")
@pytest.mark.parametrize(("world", "sharded"), [(1, False), (2, False), (2, True)])
def test_a_killed_run_whose_rollouts_are_ahead_ends_with_the_same_bits(tmp_path, world, sharded):
    """The rollouts in flight are in the checkpoint, or drawn again by the same policies."""
    with serving(StandIn()) as url:
        ahead = dict(rollout_ahead=3, num_iterations=1, steps_per_generation=1)
        kill_run.kill(tmp_path, world, KILLS, 0, sharded=sharded, url=url, **ahead)


def test_saved_by_two_loaded_by_one_and_the_reverse(tmp_path):
    kill_run.resize(tmp_path)


def make(folder, model=None, lora=None, callbacks=(), eval_dataset=None, **options):
    options = dict(save_strategy="steps", save_steps=1, max_steps=3) | options
    return PowerFlowTrainer(
        model=tiny.model() if model is None else model,
        args=tiny.config(folder, **options),
        train_dataset=tiny.dataset(),
        eval_dataset=eval_dataset,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if lora is None else lora,
        rollout_func=tiny.rollout,
        callbacks=list(callbacks),
    )


class FullDisk(tiny.TrainerCallback):
    """From step 2 on, no file can grow beyond 20 kB."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    try:
        with pytest.raises(CheckpointError) as caught:
            make(tmp_path, lora=tiny.lora(r=16), callbacks=[FullDisk()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    message = str(caught.value)
    assert "\n" not in message and "checkpoint-2" in message and "checkpoint-1" in message
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert not (tmp_path / ".saving").exists()
    resumed = make(tmp_path, lora=tiny.lora(r=16))
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole", lora=tiny.lora(r=16))
    whole.train()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path):
    trainer = make(tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not write .*run/checkpoint-1.*none before"):
        trainer.train()


def test_last_is_a_start_without_a_checkpoint_and_the_newest_with_one(tmp_path):
    trainer = make(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint="last")
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    (tmp_path / ".saving" / "checkpoint-9").mkdir(parents=True)  # a kill while saving
    resumed = make(tmp_path, save_total_limit=1)
    resumed.train(resume_from_checkpoint="last")
    assert resumed.state.global_step == 3
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3"]
    with pytest.raises(ValueError, match="resume_from_checkpoint: none in"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_finished_run_that_is_started_again_stays_as_it_is(tmp_path):
    """transformers takes one step more, which a scheduler's rate of 0 hides but log Z' shows."""
    done = make(tmp_path, log_z="learned")
    done.train()
    again = make(tmp_path, log_z="learned")
    again.train(resume_from_checkpoint="last")
    assert again.state.global_step == 3
    for module, other in ((done.model, again.model), (done.log_z.head, again.log_z.head)):
        for one, two in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)


def test_the_best_checkpoint_keeps_its_place(tmp_path):
    trainer = make(
        tmp_path,
        eval_dataset=tiny.dataset(1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        per_device_eval_batch_size=8,
        max_steps=2,
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).parent == tmp_path
    assert Path(trainer.state.best_model_checkpoint).is_dir()


def test_a_checkpoint_of_another_model_is_refused_before_generation(tmp_path):
    make(tmp_path, max_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")

    def refused(match, **options):
        trainer = make(tmp_path / "other", **options)
        trainer.rollout_func = None
        with pytest.raises(ValueError, match=match):
            trainer.train(resume_from_checkpoint=checkpoint)

    refused("hidden_size is 16 there and 32 here", model=tiny.model(hidden_size=32))
    refused("trainable", lora=tiny.lora(r=2))
    other = tiny.model()
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    refused("embedding", model=other)
    refused("log_z is group there and learned here", log_z="learned")
    facts = tmp_path / "checkpoint-1" / "powerflow.json"
    facts.write_text(facts.read_text().replace('"engine": "none"', '"engine": "FSDP"'))
    refused("engine is FSDP there and none here")  # transformers keeps other files for each
    (tmp_path / "checkpoint-1" / "powerflow.json").unlink()
    refused("not a checkpoint of this trainer")


def test_a_checkpoint_of_which_something_is_missing_is_named(tmp_path):
    make(tmp_path, max_steps=1, log_z="learned").train()
    checkpoint = tmp_path / "checkpoint-1"
    state = [path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    files = [*state, checkpoint / "adapter_model.safetensors", checkpoint / "trainer_state.json"]
    assert len(files) == 8
    trainer = make(tmp_path / "other", log_z="learned", max_steps=2)

    def refused(said):
        with pytest.raises(ValueError, match=f"{checkpoint} is not whole: {said}"):
            trainer.train(resume_from_checkpoint=str(checkpoint))

    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        refused(f"{path.name} has {len(whole) - 9} bytes, expected {len(whole)}")
        path.unlink()
        refused(f"{path.name} is missing")
        path.write_bytes(whole)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path):
    make(tmp_path, max_steps=1, save_only_model=True).train()
    trainer = make(tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match="saved with save_only_model: the optimizer starts anew"):
        trainer.train(resume_from_checkpoint="last")


@pytest.mark.parametrize("stopped", [2, 3], ids=["between rollouts", "within a rollout"])
def test_half_the_batch_and_twice_the_accumulation_draws_again(tmp_path, stopped):
    """The usual answer to a full memory; nothing stale is trained on, whatever step it was."""
    options = dict(num_iterations=2, max_steps=stopped, save_steps=1)
    make(tmp_path / "run", per_device_train_batch_size=8, **options).train()
    drawn = []

    def rollout(prompts, trainer):
        drawn.append(trainer.state.global_step)
        return tiny.rollout(prompts, trainer)

    resumed = PowerFlowTrainer(
        model=tiny.model(),
        args=tiny.config(
            tmp_path / "run",
            **options | dict(max_steps=6),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        ),
        train_dataset=tiny.dataset(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(),
        rollout_func=rollout,
    )
    said = "per_device_train_batch_size 8 -> 4, gradient_accumulation_steps 1 -> 2"
    with pytest.warns(UserWarning, match=f"another shape .*{said}.*drawn again"):
        resumed.train(resume_from_checkpoint="last")
    assert drawn == list(range(stopped, 6, 2))
    assert resumed.state.global_step == 6
