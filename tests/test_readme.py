"""The README's code runs as pasted."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(capsys):
    lines, one_line = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile(lines, str(README), "exec"), {})
    assert re.search(r"tiles of 128 × 128, \d+\.\d% of the causal triangle", capsys.readouterr().out)
    exec(compile(one_line, str(README), "exec"), {})
    assert "layers.0.self_attn" in capsys.readouterr().out
