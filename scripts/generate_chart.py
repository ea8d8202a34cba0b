"""Writes what is generated of helm/sps2: the flags and buckets in values.schema.json, README.md and the dashboard.

    python -m scripts.generate_chart

`--check` writes nothing and fails when a file differs: the services' flags or the values' comments have changed.
"""

import argparse
import json
import sys
from pathlib import Path

from scripts.chart.dashboard import dashboard
from scripts.chart.flags import CONFIGS, flags_schema
from scripts.chart.panels import ROWS
from scripts.chart.readme import readme
from sps2_router.metrics import LONG_BUCKETS, SHORT_BUCKETS

CHART = Path(__file__).resolve().parent.parent / "helm" / "sps2"


def generated(chart: Path) -> dict[Path, str]:
    """The files and what they should hold."""
    schema_path = chart / "values.schema.json"
    schema = json.loads(schema_path.read_text(encoding="utf-8"))
    for component, config in CONFIGS.items():
        schema["$defs"][f"{component}Flags"] = flags_schema(config)
    slo = schema["properties"]["monitoring"]["properties"]["slo"]["properties"]
    for name, bounds in {"ttftSeconds": LONG_BUCKETS, "itlSeconds": SHORT_BUCKETS}.items():
        slo[name] = {"description": "A bound of the histogram's buckets.", "enum": list(bounds)}
    head = (chart / "README.head.md").read_text(encoding="utf-8")
    values = (chart / "values.yaml").read_text(encoding="utf-8")
    return {
        schema_path: json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        chart / "README.md": readme(head, values),
        chart / "dashboards" / "sps2.json": dashboard(ROWS),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: written, or nothing to do; 1: a file is not current."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file differs")
    args = parser.parse_args(argv)
    stale = [path for path, text in generated(CHART).items() if not path.exists() or path.read_text() != text]
    if args.check and stale:
        print("not current; run `make chart` and commit:", *(path.name for path in stale), file=sys.stderr)
        return 1
    if not args.check:
        for path, text in generated(CHART).items():
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
