"""Every Python example in docs/ runs as pasted."""

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = [
    pytest.param(page, code, id=f"{page.stem}-{index}")
    for page in sorted(DOCS.glob("*.md"))
    for index, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


def test_every_variant_has_a_page_with_an_example():
    pages = {parameters.values[0].stem for parameters in EXAMPLES}
    assert pages >= {"attention", "dilated", "factory", "multihead"}


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_examples_run(page, code):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        exec(compile(code, str(page), "exec"), {})
