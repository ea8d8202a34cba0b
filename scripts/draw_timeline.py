"""Draws a Chrome trace of a prefill (`sps2 bench prefill --timeline DIR`) as a PNG.

    python scripts/draw_timeline.py trace.json timeline.png [LAYER ...]

With layers it draws those alone.
"""

import json
import sys
from pathlib import Path

from sps2_bench.timeline import draw_timeline


def main() -> None:
    """Reads and draws what the command line names."""
    source, target, *layers = sys.argv[1:]
    draw_timeline(
        json.loads(Path(source).read_text(encoding="utf-8")), Path(target), [int(one) for one in layers]
    )


if __name__ == "__main__":
    main()
