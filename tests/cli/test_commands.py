"""The command line: exit codes, one-line errors, and a real run of `train` and `eval`."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("trl")

import powerflow_fast  # noqa: E402
from powerflow_fast.cli import main  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.helpers.vllm_stand_in import StandIn, serving  # noqa: E402


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in tiny.PROMPTS))
    return path


def refused(capsys, *argv):
    """The one line that a refused command prints."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("powerflow-fast: error: ")
    return err


def train_flags(model_folder, prompts, output):
    flags = {
        "model": model_folder,
        "data": prompts,
        "output_dir": output,
        "use_cpu": True,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "max_steps": 2,
        "gradient_checkpointing": False,
        "lora_rank": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return ["train", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]


def test_help_and_import_are_light():
    """--help must not load torch; it answers from a fresh interpreter."""
    code = (
        "import sys, powerflow_fast.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("train", "demo", "eval", "forecast", "merge", "plan", "info"):
        assert command in done.stdout


def test_errors_have_no_traceback_in_a_real_process(tmp_path):
    argv = [
        sys.executable,
        "-m",
        "powerflow_fast.cli",
        "eval",
        "--data",
        str(tmp_path / "no.jsonl"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"powerflow-fast: error: {tmp_path / 'no.jsonl'}: no such file\n"


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0 and "forecast" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("powerflow-fast 0.")
    argv = [sys.executable, "-m", "powerflow_fast", "--version"]
    assert subprocess.run(argv, capture_output=True, text=True).stdout.startswith("powerflow-fast")


def test_help_of_train_begins_with_ours(capsys):
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert short.index("--model") < short.index("--alpha ") < short.index("--output_dir")
    assert "--ddp_backend" not in short and "--help-all" in short and short.count("\n") < 140
    assert main(["train", "--help_all"]) == 0
    assert "--ddp_backend" in capsys.readouterr().out


def test_both_spellings_and_the_nearest_name(capsys, tmp_path):
    nothing = str(tmp_path / "no.jsonl")
    for flag in ("--max-new-tokens=3", "--max_new_tokens=3"):
        assert "no such file" in refused(capsys, "eval", flag, "--data", nothing)
    assert "did you mean --max-new-tokens?" in refused(capsys, "eval", "--max_new_token_s", "3")
    assert "did you mean --gpus?" in refused(capsys, "plan", "Llama-3-70B", "--gpu_s", "2")
    assert "did you mean --max-steps?" in refused(capsys, "train", "--max-stps", "3")
    (tmp_path / "run.yaml").write_text("alhpa: 2\n")
    assert "did you mean --alpha?" in refused(capsys, "train", "--config", tmp_path / "run.yaml")


def test_what_is_missing_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in ("powerflow_fast.training.trainer", "powerflow_fast.training.config"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "pip install 'powerflow-fast[train]'" in refused(capsys, "train", "--model", "m")
    monkeypatch.setattr(powerflow_fast, "_HOME", {"PowerFlowConfig": "training.config"})
    monkeypatch.delitem(vars(powerflow_fast), "PowerFlowConfig", raising=False)
    with pytest.raises(ImportError, match=r"PowerFlowConfig: trl is not installed: pip install"):
        powerflow_fast.PowerFlowConfig  # noqa: B018


def test_bad_commands(capsys, tmp_path):
    assert "invalid choice" in refused(capsys, "fly")
    assert "--steps" in refused(capsys, "demo", "--steps", "many")
    assert "alpha" in refused(capsys, "demo", "--alpha", "-1", "--output-dir", tmp_path / "a")
    assert "alpha" in refused(capsys, "demo", "--alpha", "inf", "--output-dir", tmp_path / "a")
    assert "samples" in refused(capsys, "eval", "--samples", "0")
    assert "samples" in refused(capsys, "forecast", "--samples", "0")
    assert "--alphas" in refused(capsys, "forecast", "--alphas", "1,x")
    assert "--alphas" in refused(capsys, "forecast", "--alphas", "0,2")


def test_bad_prompt_file_is_named_with_its_line(capsys, tmp_path, model_folder):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "rain"}\n{"prompt": \n')
    line = refused(capsys, *train_flags(model_folder, bad, tmp_path / "out"))
    assert f"{bad}: line 2: not JSON" in line
    assert not (tmp_path / "out").exists()


def test_missing_things_are_refused(capsys, tmp_path, model_folder, prompts):
    out = tmp_path / "out"
    nothing = tmp_path / "nothing"
    assert "no such folder" in refused(capsys, *train_flags(nothing, prompts, out))
    assert "no such file" in refused(capsys, *train_flags(model_folder, nothing, out))
    assert "no such file" in refused(capsys, "train", "--config", nothing)
    assert "--config" in refused(capsys, "train", "--config")
    assert "--model and --data" in refused(capsys, "train", "--output_dir", out)
    assert "adapter_config.json" in refused(capsys, "eval", "--adapter", nothing)
    assert "--data: expected questions" in refused(capsys, "eval", "--model", model_folder)
    flags = train_flags(model_folder, prompts, out)
    one = tmp_path / "one.txt"
    one.write_text("rain\n\n")
    assert "at least 2 prompts" in refused(capsys, *train_flags(model_folder, one, out))
    assert "--chat, --raw" in refused(capsys, *flags, "--chat", "--raw")
    assert "no chat template" in refused(capsys, *flags, "--chat")
    assert "wandb" in refused(capsys, *flags, "--report_to", "wandb")
    assert "report_to: " in refused(capsys, *flags, "--report_to", "paper")
    assert "no such folder" in refused(capsys, *flags, "--resume_from_checkpoint", nothing)
    nowhere = train_flags(model_folder, prompts, "/proc/powerflow")
    assert "/proc/powerflow: cannot be written" in refused(capsys, *nowhere)
    (tmp_path / "bad.yaml").write_text("alpha: 2\nmodel: [broken\n")
    assert "bad.yaml: line" in refused(capsys, "train", f"--config={tmp_path / 'bad.yaml'}")
    (tmp_path / "list.yaml").write_text("- alpha\n")
    assert "mapping" in refused(capsys, "train", "--config", tmp_path / "list.yaml")
    assert not out.exists()


def test_quantising_names_the_package_that_it_needs(
    capsys, tmp_path, model_folder, prompts, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = train_flags(model_folder, prompts, tmp_path / "out")
    assert "pip install bitsandbytes" in refused(capsys, *flags, "--quantize", "nf4")


def test_bad_options_are_refused(capsys, tmp_path, model_folder, prompts):
    flags = train_flags(model_folder, prompts, tmp_path / "out")
    assert "alpha" in refused(capsys, *flags, "--alpha", "-1")
    assert "alpha" in refused(capsys, *flags, "--alpha", "much")
    assert "min_distinct" in refused(capsys, *flags, "--min_distinct", "2")
    assert "beyond the context" in refused(capsys, *flags, "--max_completion_length", "9999")
    assert "--lora_rank" in refused(capsys, *flags, "--quantize", "nf4", "--lora_rank", "0")
    server = ("--adapter_server", "http://localhost:1")
    assert "--adapter_server" in refused(capsys, *flags, *server, "--lora_rank", "0")
    assert "url: expected" in refused(capsys, *flags, "--adapter_server", "localhost:1")
    assert "seconds > 0" in refused(capsys, *flags, *server, "--adapter_server_timeout", "0")
    nobody = refused(capsys, *flags, *server, "--adapter_server_wait", "0.1")
    assert "http://localhost:1: no vLLM server answers" in nobody
    assert "need a server of their own" in refused(capsys, *flags, "--rollout_ahead", "1")
    assert "--lora_rank: expected" in refused(capsys, *flags, "--lora_rank", "-2")
    assert "beta" in refused(capsys, *flags, "--beta", "0.1")
    assert "num_generations" in refused(capsys, *flags, "--num_generations", "1")
    assert "nonsense" in refused(capsys, *flags, "--nonsense", "1")
    assert main([*flags, "--lora_targets", "lm_head"]) == 2  # after a progress bar of loading
    assert "lm_head" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_overwritten(capsys, tmp_path, model_folder, prompts):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    for argv in (train_flags(model_folder, prompts, out), ["demo", "--output-dir", str(out)]):
        assert "holds another run" in refused(capsys, *argv)
    assert [p.name for p in out.iterdir()] == ["precious.txt"]
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(capsys, "demo", "--output-dir", tmp_path / "file")


def test_train_from_yaml_then_eval_with_the_adapter(capsys, tmp_path, model_folder, prompts):
    flags = train_flags(model_folder, prompts, tmp_path / "out")
    pairs = dict(zip(flags[1::2], flags[2::2], strict=True))
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{k[2:]}: {v}\n" for k, v in pairs.items()) + "alpha: 9.0\n")
    assert main(["train", "--config", str(config), "--alpha", "2.0"]) == 0  # a flag wins
    adapter = tmp_path / "out"
    assert (adapter / "adapter_config.json").is_file()
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "rain", "answers": ["sea"]}\n')
    capsys.readouterr()
    argv = ["eval", "--adapter", adapter, "--data", questions]  # the model is the run's
    assert main([str(a) for a in [*argv, "--max_new_tokens", 3, "--samples", 5, "--json"]]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for scores in (found["before"], found["after"]):
        assert 0 <= scores["accuracy_sampled"] <= 1 and scores["samples"] == 5
        assert scores["base_logp"] < 0 and 1 <= scores["mean_length"] <= 3
    change = found["after"]["mean_length"] - found["before"]["mean_length"]
    assert found["change"]["mean_length"] == pytest.approx(change)
    assert main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert "before" in out and "change" in out and "at most 4 tokens" in out  # the run's length
    argv = ["eval", "--model", model_folder, "--data", questions, "--json"]
    assert main([str(a) for a in argv]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["samples"] == 4 and alone["mean_length"] <= 256
    assert main([str(a) for a in argv[:-1]]) == 0
    assert "log-prob of its samples" in capsys.readouterr().out  # there is no base beside it


CHAT = (
    "{% for m in messages %}the {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}a b{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.model().save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_chat_is_decided_once_and_kept(capsys, tmp_path, chat_folder, prompts):
    """Text prompts become messages where there is a template; eval reads it off the run."""
    questions = tmp_path / "q.csv"
    questions.write_text("question,answer\nrain,sea\nthe sea is a b c,a\n")
    for extra, said in (([], "messages of the chat template (--raw"), (["--raw"], "plain text")):
        out = tmp_path / f"out{len(extra)}"
        flags = train_flags(chat_folder, prompts, out)
        assert main([*flags, *extra, "--questions", str(questions)]) == 0
        printed = capsys.readouterr().out
        assert said in printed and "change" in printed and "  after:   " in printed
        assert "step 2/2" in printed and "log pi" in printed and "tok/s" in printed
        record = json.loads((out / "run.json").read_text())
        assert record["chat"] is not bool(extra) and record["held_out"]["before"]["samples"] == 4
        assert record["model"] == str(chat_folder) and record["steps"] == 2
        card = (out / "README.md").read_text()
        assert "alpha = 4" in card and "| before | after | change |" in card
        assert (out / "curves.png").stat().st_size > 20_000
        assert main(["eval", "--adapter", str(out), "--data", str(questions)]) == 0
        assert ("in plain text" if extra else "in the chat format") in capsys.readouterr().out


def test_merged_is_the_policy(capsys, tmp_path, model_folder, prompts):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, merged = tmp_path / "out", tmp_path / "merged"
    flags = train_flags(model_folder, prompts, out)
    assert main([*flags, "--learning_rate", "0.1"]) == 0
    argv = ["merge", "--adapter", str(out), "--output", str(merged)]
    assert main(argv) == 0 and "eval --model" in capsys.readouterr().out
    ids = torch.arange(2, 9)[None]
    load = AutoModelForCausalLM.from_pretrained
    policy = PeftModel.from_pretrained(load(model_folder), out)
    torch.testing.assert_close(load(merged)(ids).logits, policy(ids).logits)
    assert (policy(ids).logits - load(model_folder)(ids).logits).abs().max() > 0.1
    assert "merged into the base" in (merged / "README.md").read_text()
    capsys.readouterr()
    assert "holds another run" in refused(capsys, *argv)
    assert main(["eval", "--model", str(merged), "--data", str(prompts)]) == 0


def test_forecast_of_a_model(capsys, tmp_path, model_folder):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "rain", "answers": ["sea"]}\n')
    argv = ["forecast", "--model", model_folder, "--data", questions, "--max-new-tokens", 3]
    argv = [str(a) for a in [*argv, "--samples", 8, "--alphas", "1,3"]]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"samples that carry it, of 8 +8.0 +\d", out)
    assert "\nrain\n  likeliest at alpha 1: '" in out and "likeliest at alpha 3" in out
    assert main([*argv, "--json"]) == 0
    one, three = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (one["alpha"], three["alpha"]) == (1.0, 3.0)
    assert three["effective_samples"] <= one["effective_samples"] == pytest.approx(8)


def test_a_run_goes_on_from_its_last_checkpoint(capsys, tmp_path, model_folder, prompts):
    flags = train_flags(model_folder, prompts, tmp_path / "out")
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint", "last"]
    assert main(flags) == 0 and main([*flags, "--max_steps", "3"]) == 0
    assert (tmp_path / "out" / "checkpoint-3" / "powerflow.json").is_file()
    other = tmp_path / "other"
    tiny.model(hidden_size=32).save_pretrained(other)
    capsys.readouterr()
    moved = [str(other) if word == str(model_folder) else word for word in flags]
    assert "belongs to another model" in refused(capsys, *moved)  # before it is loaded
    assert main([*flags, "--resume_from_checkpoint", "True", "--max_steps", "3"]) == 0
    assert "Already finished: " in capsys.readouterr().out
    (tmp_path / "out" / ".saving").write_text("in the way")
    assert main([*flags, "--max_steps", "4"]) == 1
    assert "stopped: could not write" in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_server_samples_ahead(capsys, tmp_path, model_folder, prompts):
    flags = train_flags(model_folder, prompts, tmp_path / "out")
    stand_in = StandIn()
    with serving(stand_in) as url:
        flags += ["--adapter_server", url, "--rollout_ahead", "1"]
        stand_in.updating = False
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in refused(capsys, *flags)
        assert not (tmp_path / "out").exists()  # so that the next try is no second run
        stand_in.updating, stand_in.max_len = True, 6
        assert "beyond the context of 6" in refused(capsys, *flags)
        stand_in.max_len = 64
        assert main(flags) == 0 and len(stand_in.asked) == 2 * 4 and not stand_in.adapters
        stand_in.delay = 0.5
        assert main([*flags, "--overwrite", "--adapter_server_timeout", "0.2"]) == 1
        assert "a rollout has taken more than 0.2 s" in capsys.readouterr().err.splitlines()[-1]


def test_info_says_which_back_end_and_why(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "back end" in out and "(" in out.splitlines()[-1]


def test_an_unreachable_hub_is_told_at_once(tmp_path):
    """Not after half a minute of retries; a proxy, or a variable that is set, decides instead."""
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path)}
    env.pop("HF_HUB_OFFLINE", None)
    argv = [sys.executable, "-m", "powerflow_fast", "eval", "--model", "nobody/nothing"]
    argv += ["--data", "nobody/questions"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "Retrying" not in done.stderr
    assert done.stderr.count("\n") == 1 and "nobody/questions" in done.stderr


def test_prompts_that_do_not_fit_are_left_out_on_request(capsys, tmp_path, model_folder):
    data = tmp_path / "p.txt"
    data.write_text("rain\nthe sea\n" + "rain " * 3000 + "\nfive\n")
    flags = train_flags(model_folder, data, tmp_path / "out")
    assert "prompt 2 has 3000 tokens" in refused(capsys, *flags)
    assert main([*flags, "--drop_long"]) == 0
    assert "1 of 4 prompts left out: over 2044 tokens" in capsys.readouterr().out
