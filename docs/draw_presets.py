"""Draw the presets and write their table into docs/factory.md: ``python docs/draw_presets.py``.

The pictures are what ``sparsetile show PRESET --length 32K --png FILE`` makes.
"""

import re
import subprocess
import sys
from pathlib import Path

from sparsetile.nn.presets import PRESETS

DOCS = Path(__file__).parent
LENGTH = 32_768
TABLE = re.compile(r"(\| preset \|.*\n\| ---.*\n)(?:.*\n)*")


def main() -> None:
    rows = []
    for name, preset in PRESETS.items():
        kept = picture = "chosen from the input"
        if preset.sparse_config is not None:
            path = f"images/preset_{name}.png"
            command = [sys.executable, "-m", "sparsetile", "show", name, "--length", "32K"]
            subprocess.run([*command, "--png", str(DOCS / path)], check=True, stdout=subprocess.DEVNULL)
            kept = f"{preset.create().density_for(LENGTH).realised:.1%}"
            picture = f"![{name}]({path})"
        rows.append(f"| `{name}` | {preset.when} | {preset.reach} | {kept} |\n")
        if preset.sparse_config is not None:
            rows.append(f"| | {picture} | | |\n")
    page = DOCS / "factory.md"
    page.write_text(TABLE.sub(lambda found: found[1] + "".join(rows), page.read_text()))


if __name__ == "__main__":
    main()
