"""Every command and code block of the README and of docs/, as a reader would run them.

Names of models stand for a toy model, files for toy files, and sizes are cut. A block that needs a
GPU, a server or several machines says so in the comment before it: `<!-- needs: ... -->`.
"""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("trl")

from powerflow_fast.cli import main  # noqa: E402
from tests.cli.test_commands import CHAT  # noqa: E402
from tests.helpers import tiny  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)```", re.S
)
INLINE = re.compile(r"`((?:powerflow-fast|make|python -m) [^`]+)`")
SMALL = {
    "train": "--max_steps 2 --num_generations 2 --per_device_train_batch_size 2 --use_cpu true "
    "--max_completion_length 4 --gradient_checkpointing false --lora_rank 2 --disable_tqdm true",
    "eval": "--max-new-tokens 4 --samples 2",
    "forecast": "--max-new-tokens 4 --samples 4",
}
TARGETS = set(re.findall(r"^([a-z0-9-]+(?: [a-z0-9-]+)*):", (ROOT / "Makefile").read_text(), re.M))
TARGETS = {name for line in TARGETS for name in line.split()}


def blocks(kinds):
    for page in PAGES:
        for i, found in enumerate(BLOCK.finditer(page.read_text())):
            if found["kind"] in kinds:
                yield pytest.param(found, id=f"{page.stem}-{i}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a user's: data, a model, and a run of the training command."""
    folder = tmp_path_factory.mktemp("user")
    model, tokenizer = tiny.model(), tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    for name in ("Qwen/Qwen2.5-1.5B-Instruct",):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    rows = ['{"question": "rain", "answers": ["sea"]}', '{"question": "the sea", "answers": ["a"]}']
    (folder / "questions.jsonl").write_text("\n".join(rows))
    return folder


def commands(body):
    """Logical lines, without comments."""
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        for command in _split(words, "&&"):
            if command:
                yield command


def _split(words, sign):
    part = []
    for word in words:
        if word == sign:
            yield part
            part = []
        else:
            part.append(word)
    yield part


def run(words, place):
    """Run one of ours; of others only that what they name is there."""
    if words[0] == "powerflow-fast":
        argv = words[1:]
        if argv[0] != "plan":
            argv += shlex.split(SMALL.get(argv[0], ""))
        if "--output_dir" in argv and Path(argv[argv.index("--output_dir") + 1]).exists():
            argv.append("--overwrite")
        if "--output" in argv:
            argv.append("--overwrite")
        assert main(argv) == 0, words
    elif words[0] == "make":
        assert words[1] in TARGETS, words
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].replace(".", "/")
        assert module.is_dir() or module.with_suffix(".py").is_file(), words
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", " ".join(words))
        assert all(f'"{extra}":' in (ROOT / "setup.py").read_text() for extra in extras), words
    else:
        raise AssertionError(f"no test knows how to run {words}")


def test_commands_of_all_pages(place, monkeypatch, capsys):
    """In the order of the pages: what one command leaves another may read."""
    monkeypatch.chdir(place)
    ran = 0
    for block in [param.values[0] for param in blocks(("", "bash"))]:
        if block["needs"]:
            continue
        for words in commands(block["body"]):
            run(words, place)
            ran += words[0] == "powerflow-fast"
    assert ran >= 9
    assert (place / "runs" / "merged" / "config.json").is_file()


def test_commands_within_the_text(place, monkeypatch):
    monkeypatch.chdir(place)
    if not (place / "runs" / "sharp").exists():
        train = (
            "train --model Qwen/Qwen2.5-1.5B-Instruct --data prompts.txt --output_dir runs/sharp"
        )
        assert main([*train.split(), *shlex.split(SMALL["train"])]) == 0
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        for command in INLINE.findall(text):
            words = shlex.split(" ".join(command.split()))
            named = words[0] == "powerflow-fast" and len(words) == 2  # the name of a command
            if named:
                with pytest.raises(SystemExit) as stop:
                    main([words[1], "--help"]) if words[1] != "train" else stop_of_train()
                assert stop.value.code == 0
            elif words[:3] == ["powerflow-fast", "train", "--help"]:
                assert main(words[1:]) == 0
            else:
                run(words, place)


def leave_a_run(place):
    """runs/sharp, where no test has left it."""
    if not (place / "runs" / "sharp" / "run.json").exists():
        train = "train --model Qwen/Qwen2.5-1.5B-Instruct --data prompts.txt --overwrite true"
        assert main([*shlex.split(f"{train} --output_dir runs/sharp {SMALL['train']}")]) == 0


def stop_of_train():
    raise SystemExit(main(["train", "--help"]))


@pytest.mark.parametrize("block", blocks(("python",)))
def test_code(block, place, monkeypatch, capsys):
    if block["needs"]:
        pytest.skip(block["needs"])
    if "def train(" in block["body"]:
        return  # the plain loop: tests/integrations/test_loops.py runs it
    monkeypatch.chdir(place)
    if "runs/sharp" in block["body"] and "PowerFlowConfig" not in block["body"]:
        leave_a_run(place)
    small = "max_steps=1, max_completion_length=4, use_cpu=True, gradient_checkpointing=False, "
    code = block["body"].replace("num_generations=8", f"{small}num_generations=8")
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def test_pages_name_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)
