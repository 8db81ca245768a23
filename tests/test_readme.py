"""The README's code runs as pasted."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    assert re.search(r"tiles of 128 × 128, \d+\.\d% of the causal triangle", capsys.readouterr().out)
