"""The report of a prepared corpus: one self-contained HTML page, made from its manifest."""

import html
import json
from pathlib import Path


def write_report(manifest: dict, path: Path) -> None:
    """Write the page."""
    parts = html.escape(json.dumps(manifest["parts"], indent=1))
    path.write_text(f"<!DOCTYPE html><title>{html.escape(manifest['title'])}</title><pre>{parts}</pre>")
