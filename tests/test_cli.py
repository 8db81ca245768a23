"""The command line: what works prints, what does not ends with one line and a non-zero code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsetile
from sparsetile import cli, doctor
from sparsetile.cli import main
from sparsetile.errors import BackendError, CheckpointError, PatternError


def test_show_draws_and_describes(capsys):
    assert main(["show", "Local(300) | Global(16)", "--length", "2K", "--causal", "--block", "64"]) == 0
    output = capsys.readouterr()
    assert "Local(300) | Global(16), causal" in output.out
    assert "2,048 queries × 2,048 keys" in output.out
    assert "1.5K ┤" in output.out
    assert output.err == ""


def test_show_draws_presets(capsys):
    assert main(["show", "ultra_sparse", "--length", "64K", "--causal"]) == 0
    assert "ultra_sparse, causal" in capsys.readouterr().out
    assert main(["show", "adaptive_standard", "--length", "64K"]) == 2
    assert "learns it" in capsys.readouterr().err


def test_show_a_million_tokens(capsys):
    assert main(["show", "(Local(4096) | Global(128)) & Causal()", "--length", "1M"]) == 0
    assert "1,048,576 queries" in capsys.readouterr().out


def test_show_a_head_of_its_own_with_other_keys(capsys):
    pattern = "Dilated(256, 2)"
    assert main(["show", pattern, "--length", "512", "--keys", "1K", "--heads", "4", "--head", "3"]) == 0
    assert "512 queries × 1,024 keys" in capsys.readouterr().out


def test_show_draws_what_a_run_trained_with(tmp_path, capsys):
    run = {
        "arms": [{"attention": "dense"}, {"attention": "Local(64) | Strided(128, head_shift=64)"}],
        "settings": {"context": 1024, "block": 64, "model": {"heads": 2, "width": 64}},
    }
    (tmp_path / "train.json").write_text(json.dumps(run))
    assert main(["show", "--run", str(tmp_path), "--head", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Strided(128, head_shift=64), causal, head 1" in printed
    assert "1,024 queries" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "broken"), ('{"arms": []}', "settings"), ('{"arms": [], "settings": {"context": 9, "block": 64, '
      '"model": {"heads": 2, "width": 64}}}', "dense only"),
     ('{"arms": [{"attention": "adaptive(base_sparsity=0.75)"}], "settings": {"context": 9, "block": 64, '
      '"model": {"heads": 2, "width": 64}}}', "show --adaptive")],
)  # fmt: skip
def test_show_says_what_is_wrong_with_a_run(tmp_path, capsys, content, words):
    (tmp_path / "train.json").write_text(content)
    assert main(["show", "--run", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_show_writes_a_png(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "layout.png"
    assert main(["show", "Local(300)", "--length", "2048", "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "backends" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["doctor"], ["show"], ["bench"], ["train"]])
def test_help_has_examples(command, capsys):
    assert main([*command, "--help"]) == 0
    output = capsys.readouterr().out
    assert "usage: sparsetile" in output
    if command:
        assert f"  sparsetile {command[0]}" in output.split("examples:")[1]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparsetile {cli.__version__}\n"


SHOW = ["show", "Local(8)", "--length", "64"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "required: command"),
        (["draw"], 2, "invalid choice: 'draw'"),
        (["show", "Local(8)"], 2, "--length"),
        (["show", "Local(8)", "--run", "runs"], 2, "--run"),
        (["show", "--run", "no/such/folder"], 1, "no/such/folder"),
        (["show", "Local(8)", "--adaptive", "run.pt", "--text", "a.txt"], 2, "--text, PATTERN"),
        (["show", "--adaptive", "run.pt", "--text", "a.txt", "--block", "64"], 2, "--block"),
        (["show", "--adaptive", "run.pt"], 2, "--text FILE"),
        (["show", "--adaptive", "run.pt", "--text", "a.txt"], 1, "run.pt"),
        (["show", "Local(8)", "--length", "0"], 2, "expected 1 to 1,099,511,627,776 tokens"),
        (["show", "Local(8)", "--length", "9" * 30], 2, "expected 1 to 1,099,511,627,776 tokens"),
        (["show", "Local(8)", "--length", "many"], 2, "like 4096, 64K or 1M"),
        (["show", "Local(-1)", "--length", "64"], 2, "Local"),
        (["show", "Nearby(8)", "--length", "64"], 2, "Nearby"),
        (["show", "Local(8", "--length", "64"], 2, "Local(8"),
        (["show", "Documents([10, 10])", "--length", "64"], 2, "Documents"),
        ([*SHOW, "--block", "24"], 2, "24"),
        ([*SHOW, "--heads", "0"], 2, "above 0"),
        ([*SHOW, "--heads", "2", "--head", "2"], 2, "--head: expected a number from 0 to 1"),
        ([*SHOW, "--png", "missing/folder/x.png"], 1, "missing/folder/x.png: No such file"),
        ([*SHOW, "--png", "."], 1, "directory"),
        (["bench", "--backends", "cpu,nope"], 2, "'nope'"),
        (["bench", "--densities", "0"], 2, "share above 0"),
        (["bench", "--lengths", "1K,,2K"], 2, "commas between"),
        (["bench", "--patterns", "nearby"], 2, "nearby"),
        (["bench", "--device", "tpu"], 2, "--device"),
        (["bench", "--device", "cuda:99"], 2, "--device"),
        (["bench", "--table", "baselines", "--lengths", "4K"], 2, "--lengths"),
        (["bench", "--replot", "missing.json"], 1, "missing.json: No such file"),
    ],
)
def test_bad_input_is_one_line(arguments, code, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("sparsetile")
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    assert says in output.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "sparsetile: stopped\n"),
        (PatternError("two\nlines"), 2, "sparsetile: two lines\n"),
        (BackendError("nothing serves"), 1, "sparsetile: nothing serves\n"),
        (CheckpointError("damaged"), 1, "sparsetile: damaged\n"),
        (PermissionError(13, "Permission denied", "a/b"), 1, "sparsetile: a/b: Permission denied\n"),
        (MemoryError(), 1, None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 1, None),
    ],
)
def test_failures_have_their_code_and_one_line(error, code, line, capsys, monkeypatch):
    def fail(_console):
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert main(["doctor"]) == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    if line is not None:
        assert printed == line


def test_other_runtime_errors_are_not_hidden(monkeypatch):
    def fail(_console):
        raise RuntimeError("a bug")

    monkeypatch.setattr(doctor, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def run_module(arguments: list[str], tmp_path: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """``python -m sparsetile`` where ``import triton`` fails and there is no GPU."""
    (tmp_path / "triton.py").write_text(
        "raise ModuleNotFoundError('No module named triton', name='triton')\n"
    )
    source = str(Path(sparsetile.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), source]),
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "80",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "sparsetile", *arguments]
    return subprocess.run(command, env=environment, text=True, timeout=120, **options)  # type: ignore[call-overload]


def test_doctor_without_triton_and_gpu(tmp_path):
    done = run_module(["doctor"], tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "works" in done.stdout and "triton" in done.stdout


def test_a_reader_that_leaves_early_causes_no_traceback(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = run_module(
            ["show", "Local(300)", "--length", "64K"], tmp_path, stdout=pipe, stderr=subprocess.PIPE
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
