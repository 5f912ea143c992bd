"""Print the command lines of README.md: those in its blocks that are marked as sh.

    python .ci/readme_commands.py [NUMBER]      all, or the one with this number (from 1)

They are read from here wherever they are run, so that what is tested is what is written.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Give the lines of all sh blocks, without empty ones and comments."""
    lines = [line.strip() for block in BLOCK.findall(text) for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    found = commands(README.read_text())
    if len(sys.argv) == 2:
        print(found[int(sys.argv[1]) - 1])
    else:
        print("\n".join(found))
