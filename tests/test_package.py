"""The package's root: its names, and what importing it must not pull in."""

import subprocess
import sys

import sparsetile as st


def test_public_names_exist_and_are_few():
    assert all(hasattr(st, name) for name in st.__all__)
    assert len(st.__all__) <= 34


def test_import_needs_neither_triton_nor_numpy_nor_matplotlib():
    code = (
        "import sys\n"
        "for name in ('triton', 'numpy', 'matplotlib'): sys.modules[name] = None\n"
        "import sparsetile as st, torch\n"
        "q = torch.randn(1, 1, 40, 16)\n"
        "assert st.sparse_attention(q, q, q, st.Local(4), block_size=16).isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
